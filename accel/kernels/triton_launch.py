"""Triton kernels called from JAX: what the files triton_*.py share.

A kernel's file takes `jit` and `tl` from here, and says `from __future__ import annotations`: it then imports on a
machine without Triton, and only a call refuses. Kernels run through jax-triton, which has neither batching
(`jax.vmap`) nor derivatives: it raises NotImplementedError for both.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from typing import Any

from difax.core.extras import needs
from difax.core.target import target


def _plain(function: Any) -> Any:
    return function


try:
    import triton  # pyright: ignore[reportMissingImports]
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    jit: Any = triton.jit
except ImportError:  # kernels stay plain functions, which `launch` does not come to
    tl: Any = None
    jit: Any = _plain


def capability(lowest: int = 80) -> int:
    """The compute capability of the NVIDIA GPU that is compiled for, 90 for Hopper.

    Args:
      lowest: the first that serves.

    Raises:
      NotImplementedError: another platform, an unknown GPU, or an older one.
    """
    device = target()
    if device.platform != "gpu":
        raise NotImplementedError(f"the platform {device.platform}; Triton needs an NVIDIA GPU")
    major, minor = device.capability
    known = 10 * major + minor
    if not known:
        raise NotImplementedError(f"the GPU {device.kind or 'that is compiled for'}: its compute capability is unknown")
    if known < lowest:
        raise NotImplementedError(f"compute capability {major}.{minor}; from {lowest // 10}.{lowest % 10} on")
    return known


def launch(
    kernel: Any,
    *arrays: Any,
    out: Any,
    grid: tuple[int, ...],
    warps: int,
    stages: int,
    interpret: bool = False,
    lowest: int = 80,
    **constants: Any,
) -> Any:
    """Calls a kernel on jax arrays, compiled for `target()` whether or not that is there.

    Args:
      kernel: made by `jit`; its parameters are the arrays, then the outputs, then the constants (`tl.constexpr`).
      out: tree of ShapeDtypeStructs of the outputs.
      grid: programs along one to three axes.
      warps: of a program. stages: of the pipeline of its loads.
      interpret: refused: Triton interprets on arrays of the host, outside of JAX (tests/triton_interpreter.py).
      lowest: compute capability from which the kernel compiles.

    Returns:
      The outputs.

    Raises:
      NotImplementedError: jax-triton is not installed, another device than `capability` takes, `interpret`.
    """
    if interpret:
        raise NotImplementedError("interpret: Triton has no interpreter inside of JAX")
    serves = capability(lowest)  # jax-triton would ask a device, which may be absent or another
    return triton_call()(
        *arrays,
        kernel=kernel,
        out=out,
        grid=grid,
        num_warps=warps,
        num_stages=stages,
        compute_capability=serves,
        **constants,
    )


@functools.cache
def triton_call() -> Callable[..., Any]:
    """`jax_triton.triton_call`, with the shapes of the outputs as `out` in every version.

    Raises:
      NotImplementedError: it is not installed, or does not load on this jax.
    """
    try:
        needs("a Triton kernel", "triton", "jax_triton")
    except ValueError as error:
        raise NotImplementedError(str(error)) from None
    before = os.environ.get("TRITON_CACHE_DIR")
    try:
        import jax_triton  # pyright: ignore[reportMissingImports]
    except (ImportError, AttributeError) as error:  # made for another jax
        raise NotImplementedError(f"jax_triton, which does not load on this jax: {error}") from None
    finally:  # 0.3.1 sets it to "", and triton's own compiler then writes its cache into the working folder
        os.environ.pop("TRITON_CACHE_DIR", None)
        if before is not None:
            os.environ["TRITON_CACHE_DIR"] = before
    new = "out_type" in inspect.signature(jax_triton.triton_call).parameters  # from 0.4 on
    named = "out_type" if new else "out_shape"
    # multiply-add in one instruction, which Triton leaves out by default from 3.10 on
    fused = {"enable_fp_fusion": True}
    more = {"backend_options": fused} if new else fused

    def call(*arrays: Any, out: Any, **options: Any) -> Any:
        return jax_triton.triton_call(*arrays, **{named: out}, **more, **options)

    return call
