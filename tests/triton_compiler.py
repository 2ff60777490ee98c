"""What calls of Triton kernels become for GPUs that are not here: PTX, SASS, registers. Skips without triton."""

from __future__ import annotations

import pathlib
import re
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from difax.accel.kernels import triton_launch
from difax.core.target import Target, lowering_for

KINDS = {
    "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int8": "i8", "int32": "i32", "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
}  # fmt: skip


class Compiled(NamedTuple):
    """A kernel as ptxas made it: bytes spilled, bytes of shared memory."""

    ptx: str
    sass: str
    registers: int
    spilled: int
    shared: int


def compiled(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, what: Target, call: Callable[..., Any], *args: Any
) -> Compiled:
    """The one kernel that a function calls, with the constants, warps and stages of the call.

    Args:
      folder: for what the compilers write. what: the target. call, args: a function, and shapes for it.
    """
    pytest.importorskip("triton", reason="needs triton (the extra triton)")
    from triton import compile as compile_kernel  # pyright: ignore[reportMissingImports]
    from triton.backends import nvidia  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    tools = pathlib.Path(nvidia.__file__).parent / "bin"
    if not all((tools / tool).exists() for tool in ("ptxas", "cuobjdump")):
        pytest.skip("needs the CUDA tools of Triton's wheel")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    made = []

    def stand_in(
        *arrays: Any, kernel: Any, out: Any, grid: Any, num_warps: int, num_stages: int, **constants: Any
    ) -> Any:
        at = constants.pop("compute_capability")
        pointers = [*arrays, *jax.tree.leaves(out)]
        types = ["*" + KINDS[str(a.dtype)] for a in pointers]
        signature = dict(zip(kernel.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
        )
        options = {"num_warps": num_warps, "num_stages": num_stages}
        made.append((compile_kernel(source, target=GPUTarget("cuda", at, 32), options=options), at))
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), out)

    monkeypatch.setattr(triton_launch, "triton_call", lambda: stand_in)
    with lowering_for(what):
        jax.eval_shape(call, *args)
    [(binary, at)] = made
    (folder / "k.ptx").write_text(binary.asm["ptx"])
    (folder / "k.cubin").write_bytes(binary.asm["cubin"])
    arch = f"sm_{at}{'a' if at == 90 else ''}"
    said = subprocess.run(
        [tools / "ptxas", "-v", f"--gpu-name={arch}", folder / "k.ptx", "-o", folder / "again.cubin"],
        capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    number = lambda pattern: int(re.search(pattern, said)[1])  # noqa: E731 # pyright: ignore[reportOptionalSubscript]
    sass = subprocess.run(
        [tools / "cuobjdump", "-sass", folder / "k.cubin"], capture_output=True, text=True, check=True
    )
    spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return Compiled(binary.asm["ptx"], sass.stdout, number(r"Used (\d+) registers"), spilled, binary.metadata.shared)
