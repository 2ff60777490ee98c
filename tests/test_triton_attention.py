"""Triton's block-sparse attention: its formula in float64, in Triton's interpreter; what it is compiled to for GPUs
that are not here; through jax-triton into a program; what it refuses. It skips what is not installed."""

import functools
import importlib.metadata
import importlib.util
import pathlib
import re
import sys
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from difax.accel.kernels import triton_attention, triton_launch
from difax.accel.kernels.triton_attention import block_sparse, tuned
from difax.core import ops
from difax.core.contracts import BlockList, BlockScales, Segments
from difax.core.ops import MASKED
from difax.core.target import Target, lowering_for
from tests.families import some
from tests.triton_compiler import Compiled
from tests.triton_compiler import compiled as compiled_call

FOLDER = pathlib.Path(triton_launch.__file__).parent
HOPPER, AMPERE, ADA = (Target("gpu", kind, at) for kind, at in (("H100", (9, 0)), ("A100", (8, 0)), ("L40", (8, 9))))
FP8 = ml_dtypes.float8_e4m3fn


class Case(NamedTuple):
    """A call: lengths, width, blocks, types and options; (B or 1, H or 1) of the list's indices and of its counts."""

    name: str
    t: int = 64
    s: int = 96
    width: int = 64
    blocks: tuple[int, int] = (32, 32)
    dtype: Any = ml_dtypes.bfloat16
    v_dtype: Any = None  # None: dtype
    segments: bool = False
    indices_of: tuple[int, int] = (2, 2)
    counts_of: tuple[int, int] = (2, 2)
    most: int = 3  # blocks in a row of the list
    fewest: int = 1
    size: float = 1.0  # of q
    tuning: dict[str, int] = {}  # noqa: RUF012
    bound: float = 5e-3  # of the relative error


CASES = [
    Case("bf16"),
    Case("f16", dtype=np.float16, bound=2e-3),
    Case("width 128", width=128),
    Case("int8", dtype=np.int8),
    Case("int8, f16", dtype=np.int8, v_dtype=np.float16),
    Case("int8 and fp8", dtype=np.int8, v_dtype=FP8, width=128, bound=5e-2),
    Case("bf16 and fp8", v_dtype=FP8, bound=5e-2),
    Case("segments", segments=True),
    Case("ragged", t=50, s=75),
    Case("all of it", t=50, s=75, dtype=np.int8, v_dtype=FP8, segments=True, bound=5e-2),
    Case("ragged, segments, split", t=50, s=75, segments=True, tuning={"split": 2, "split_k": 2}),
    Case("split", tuning={"split": 2, "split_k": 2}),
    Case("split, a tile behind the end", t=48, tuning={"split": 2, "split_k": 1}),
    Case("one list", indices_of=(1, 1), counts_of=(1, 1)),
    Case("a list a sample", indices_of=(2, 1), counts_of=(2, 1)),
    Case("a list a head", indices_of=(1, 2), counts_of=(1, 2)),
    Case("one list, own counts", indices_of=(1, 1)),
    Case("counts of 1", most=1),
    Case("counts of 0", most=2, fewest=0),
    Case("wide blocks", t=200, s=40, blocks=(128, 16), most=2),
    Case("high blocks", t=40, s=300, blocks=(16, 128), most=2),
    Case("fewer than a block", t=5, s=7, most=1),
    Case("large logits", size=300.0),
]
names = [case.name for case in CASES]
B, H = 2, 2


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run in Triton's interpreter, as if compiled for a Hopper GPU."""
    pytest.importorskip("triton", reason="needs triton (the extra triton)")
    from tests import triton_interpreter

    monkeypatch.setattr(triton_launch, "triton_call", lambda: triton_interpreter.call)


def quantised(x: np.ndarray, dtype: Any, block: int) -> tuple[np.ndarray, np.ndarray]:
    """x [B, n, H, K] as int8 with scales [B, H, ceil(n / block)], or fp8 with scales [B, H, K]."""
    if dtype is FP8:
        scales = (np.abs(x).max(1) / 448).astype(np.float32)
        return np.clip(x / scales[:, None], -448, 448).astype(FP8), scales
    n = x.shape[1]
    padded = np.pad(x, ((0, 0), (0, -n % block), (0, 0), (0, 0))).reshape(B, -1, block, H, x.shape[-1])
    scales = (np.abs(padded).max((2, 4)).swapaxes(1, 2) / 127).astype(np.float32)
    return np.rint(x / spread(scales, block, n)).astype(np.int8), scales


def spread(scales: np.ndarray, block: int, n: int) -> np.ndarray:
    """[B, H, blocks] -> [B, n, H, 1]."""
    return np.repeat(scales, block, -1)[..., :n].swapaxes(1, 2)[..., None]


class Inputs(NamedTuple):
    """Arguments of a call, and q, k, v in float64 as they were before the rounding that scales undo."""

    arrays: tuple[np.ndarray, ...]
    options: dict[str, Any]
    exact: tuple[np.ndarray, ...]


def inputs(case: Case) -> Inputs:
    rng = np.random.default_rng([7, names.index(case.name)])
    bq, bk = case.blocks
    q, k, v = (rng.standard_normal((B, n, H, case.width)) for n in (case.t, case.s, case.s))
    q *= case.size
    n_q, n_k = -(-case.t // bq), -(-case.s // bk)
    order = np.argsort(rng.random((*case.indices_of, n_q, n_k)), -1)[..., : case.most].astype(np.int32)
    counts = rng.integers(case.fewest, case.most + 1, (*case.counts_of, n_q)).astype(np.int32)
    by: list[Any] = [np.ones((B, H, n_q), np.float32), np.ones((B, H, n_k), np.float32), None]
    v_dtype = case.v_dtype or case.dtype
    if case.dtype is np.int8:
        (q, by[0]), (k, by[1]) = quantised(q, np.int8, bq), quantised(k, np.int8, bk)
        v_dtype = case.v_dtype or ml_dtypes.bfloat16
    else:
        q, k = q.astype(case.dtype), k.astype(case.dtype)
    if v_dtype is FP8:
        v, by[2] = quantised(v, FP8, bk)
    else:
        v = v.astype(v_dtype)
    scales = BlockScales(by[0], by[1], by[2], bq, bk) if q.dtype == np.int8 or v_dtype is FP8 else None
    segments = None
    if case.segments:  # 0 ... 2 in order, and a query of the id 9, which no key has
        ids = [np.sort(rng.integers(0, 3, (B, n)), -1).astype(np.int32) for n in (case.t, case.s)]
        ids[0][:, case.t // 2] = 9
        segments = Segments(*ids)
    wide = lambda a, s: a.astype(np.float64) * s  # noqa: E731
    exact = (
        wide(q, spread(by[0], bq, case.t)),
        wide(k, spread(by[1], bk, case.s)),
        wide(v, 1 if by[2] is None else by[2][:, None]),
    )
    options = {"block_q": bq, "block_k": bk, "softmax_scale": case.width**-0.5, "segments": segments, "scales": scales}
    return Inputs((q, k, v, order, counts), options, exact)


def oracle(case: Case, given: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """o and the log-sum-exp in float64, query by query: the mean of what is listed where ids leave no key; 0 and
    MASKED where nothing is listed."""
    (q, k, v), (_, _, _, indices, counts) = given.exact, given.arrays
    segments = given.options["segments"]
    o, lse = np.zeros((B, case.t, H, case.width)), np.full((B, H, case.t), MASKED)
    bq, bk = case.blocks
    for b, h, t in np.ndindex(B, H, case.t):
        row = (b % indices.shape[0], h % indices.shape[1], t // bq)
        listed = indices[row][: counts[b % counts.shape[0], h % counts.shape[1], t // bq]]
        keys = [j * bk + i for j in listed for i in range(bk) if j * bk + i < case.s]
        if not keys:
            continue
        x = k[b, keys, h] @ q[b, t, h] * case.width**-0.5
        if segments is not None:
            x = np.where(segments.k[b, keys] == segments.q[b, t], x, MASKED)
        p = np.exp(x - x.max())
        o[b, t, h], lse[b, h, t] = p @ v[b, keys, h] / p.sum(), x.max() + np.log(p.sum())
    return o, lse


def relative(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


# ---------------------------------------------------------------- numbers, in the interpreter


@pytest.mark.parametrize("case", some(CASES, CASES[0], CASES[9]), ids=names)
def test_formula(case: Case, interpreted: None):
    given = inputs(case)
    with lowering_for(HOPPER):
        o, lse = block_sparse(*given.arrays, **given.options, **case.tuning)
    want_o, want_lse = oracle(case, given)
    assert o.dtype == (ml_dtypes.bfloat16 if case.dtype is np.int8 else case.dtype) and lse.dtype == np.float32
    assert np.isfinite(np.asarray(o, np.float32)).all() and np.isfinite(lse).all()
    print(f"{case.name}: o {relative(o, want_o):.1e}, lse {np.abs(lse - want_lse).max():.1e}")
    assert relative(o, want_o) < case.bound
    np.testing.assert_allclose(lse, want_lse, rtol=2e-6, atol=2e-5)


@pytest.mark.slow
def test_the_reference_gives_the_same(interpreted: None):
    case = next(c for c in CASES if c.name == "ragged")
    given = inputs(case)
    q, k, v, indices, counts = given.arrays
    with lowering_for(HOPPER):
        o, lse = block_sparse(*given.arrays, **given.options)
    blocks = BlockList(jnp.asarray(indices), jnp.asarray(counts), *case.blocks)
    with jax.numpy_rank_promotion("allow"):
        want_o, want_lse = ops.attend(*map(jnp.asarray, (q, k, v)), blocks=blocks, with_lse=True)
    assert relative(o, want_o) < 5e-3
    np.testing.assert_allclose(lse, want_lse, rtol=2e-6, atol=2e-2)  # its q is scaled, and rounded, before the product


@pytest.mark.slow
def test_the_interpreter_leaves_triton_as_it_was(interpreted: None):
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    before = [dict(vars(place)) for place in (tl, tl.core, tl.math, tl.standard, tl.tensor)]
    given = inputs(CASES[0])
    with lowering_for(HOPPER):
        block_sparse(*given.arrays, **given.options)
    assert before == [dict(vars(place)) for place in (tl, tl.core, tl.math, tl.standard, tl.tensor)]


# ---------------------------------------------------------------- compilers, without the hardware


def abstract(dtype: Any = "bfloat16", v_dtype: Any = None, width: int = 128, n: int = 4608, block: int = 128) -> Any:
    """Shapes of FLUX's attention, as the arguments of a call."""
    heads, blocks = 24, -(-n // block)
    shape = lambda *dims, dtype="float32": jax.ShapeDtypeStruct(dims, dtype)  # noqa: E731
    q, v = (shape(1, n, heads, width, dtype=of) for of in (dtype, v_dtype or ("bfloat16", dtype)[dtype != "int8"]))
    lists = shape(1, heads, blocks, 9, dtype="int32"), shape(1, heads, blocks, dtype="int32")
    by = shape(1, heads, blocks)
    low = v.dtype == FP8
    scales = BlockScales(by, by, shape(1, heads, width) if low else None, block, block)
    return (q, q, v, *lists), (scales if low or dtype == "int8" else None)


def call(arrays: Any, scales: Any, segments: Any = None, block: int = 128, **tuning: int) -> Any:
    sizes = {"block_q": block, "block_k": block, "softmax_scale": arrays[0].shape[-1] ** -0.5}
    return block_sparse(*arrays, **sizes, scales=scales, segments=segments, **tuning)


def compiled(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, what: Target, *args: Any, **options: Any
) -> Compiled:
    """What a call of the kernel is compiled to."""
    return compiled_call(folder, monkeypatch, what, functools.partial(call, **options), *args)


def triton_version() -> tuple[int, ...]:
    return tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))


BF16, F16 = "m64n128k16.f32.bf16.bf16", "m64n128k16.f32.f16.f16"
S8, E4M3 = "m64n128k32.s32.s8.s8", "m64n128k32.f32.e4m3.e4m3"
IDS = Segments(jax.ShapeDtypeStruct((1, 4608), "int32"), jax.ShapeDtypeStruct((1, 4608), "int32"))
# types, more, warp-group products of PTX, of SASS
PRODUCTS = [
    (("bfloat16",), {}, {BF16}, {"HGMMA"}),
    (("float16",), {}, {F16}, {"HGMMA"}),
    (("int8",), {}, {S8, BF16}, {"IGMMA", "HGMMA"}),
    (("int8", "float8_e4m3fn"), {}, {S8, E4M3}, {"IGMMA", "QGMMA"}),
    (("bfloat16", "float8_e4m3fn"), {}, {BF16, E4M3}, {"HGMMA", "QGMMA"}),
    (("bfloat16",), {"segments": IDS}, {BF16}, {"HGMMA"}),
    (("bfloat16", None, 128, 4600), {}, {BF16}, {"HGMMA"}),
    (("int8", "float8_e4m3fn", 128, 4600), {}, {S8, E4M3}, {"IGMMA", "QGMMA"}),
    (("bfloat16", None, 64), {}, {BF16, "m64n64k16.f32.bf16.bf16"}, {"HGMMA"}),
    (("int8", "float8_e4m3fn", 64), {}, {S8, "m64n64k32.f32.e4m3.e4m3"}, {"IGMMA", "QGMMA"}),
]


@pytest.mark.slow
@pytest.mark.parametrize("types, more, in_ptx, in_sass", PRODUCTS)
def test_hopper_multiplies_with_warp_groups_and_spills_nothing(
    types, more, in_ptx, in_sass, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    made = compiled(tmp_path, monkeypatch, HOPPER, *abstract(*types), **more)
    if triton_version() >= (3, 9) and len(types) > 3 and types[0] == "bfloat16":
        pytest.skip("Triton 3.9, which the extra does not take, spills 24 bytes of a ragged length in bfloat16")
    print(types, list(more), f"{made.registers} registers, {made.shared / 1024:.0f} KiB shared")
    found = {kind.split("aligned.")[1] for kind in re.findall(r"wgmma\.mma_async\S+", made.ptx)}
    assert found == in_ptx and "mma.sync" not in made.ptx
    assert {kind for kind in ("HGMMA", "IGMMA", "QGMMA") if kind in made.sass} == in_sass
    assert made.spilled == 0 and "STL" not in made.sass
    assert made.shared <= 227 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("what, room", [(AMPERE, 163), (ADA, 99)])
@pytest.mark.parametrize("types", [("bfloat16",), ("int8",), ("int8", "float8_e4m3fn"), ("bfloat16", None, 64, 4600)])
def test_older_gpus_have_room_for_it(types, what, room, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    if what is AMPERE and "float8_e4m3fn" in types:
        pytest.skip("sm_80 has no fp8, which is refused")
    made = compiled(tmp_path, monkeypatch, what, *abstract(*types))
    print(types, f"{made.registers} registers, {made.shared / 1024:.0f} KiB shared")
    assert "mma.sync" in made.ptx and made.spilled == 0 and "STL" not in made.sass
    assert made.shared <= room * 1024


@pytest.mark.slow
def test_a_spill_would_be_seen(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    made = compiled(tmp_path, monkeypatch, AMPERE, *abstract(), warps=4)
    assert made.spilled > 0 and "STL" in made.sass


# ---------------------------------------------------------------- into a program, through jax-triton


def exported(function: Any, *args: Any) -> list[bytes]:
    """Exports a function for CUDA; what each kernel call in the program carries, unpacked."""
    skip = [jax.export.DisabledSafetyCheck.custom_call(f"triton_kernel_call{end}") for end in ("", "_ffi")]
    with lowering_for(HOPPER):
        made = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=skip)(*args)
    # jax-triton 0.3: backend_config = "..."; 0.4: another call, mhlo.backend_config = {opaque = "..."}
    carried = re.findall(r'@triton_kernel_call(?:_ffi)?\(.*?"(x\\9C[^"]*)"', made.mlir_module())
    octet = lambda m: m[1] if m[1] == b"\\" else bytes([int(m[1], 16)])  # noqa: E731
    octets = lambda text: re.sub(rb"\\(\\|[0-9A-F]{2})", octet, text.encode())  # noqa: E731
    return [zlib.decompress(octets(text)) for text in carried]


@pytest.fixture
def jax_triton() -> None:
    """Skips where jax-triton is not installed, or does not load: it wants jax's CUDA plugin."""
    try:
        triton_launch.triton_call()
    except NotImplementedError as reason:
        pytest.skip(str(reason))


def test_a_program_for_hopper_carries_its_kernel(jax_triton: None):
    arrays, _ = abstract()
    [kernel] = exported(lambda *a: call(a, None)[0], *arrays)
    assert b"wgmma.mma_async" in kernel and b"sm_90a" in kernel


@pytest.mark.slow
def test_in_a_scan_and_in_a_mesh(jax_triton: None):
    arrays, scales = abstract("int8", "float8_e4m3fn")
    q = jax.ShapeDtypeStruct((1, 4608, 24, 128), "bfloat16")

    def scanned(x: jax.Array, *rest: Any) -> jax.Array:
        step = lambda x, _: (call((x, x, x, *rest), None)[0], None)  # noqa: E731
        return jax.lax.scan(step, x, None, length=3)[0]

    assert len(exported(scanned, q, *arrays[3:])) == 1
    mesh = jax.make_mesh((8,), ("heads",), axis_types=(AxisType.Auto,))
    wide, lists = PartitionSpec(None, None, "heads"), PartitionSpec(None, "heads")
    sharded = jax.shard_map(
        lambda *a: call(a[:5], a[5]),
        mesh=mesh,
        in_specs=(wide, wide, wide, lists, lists, lists),
        out_specs=(wide, lists),
    )
    assert len(exported(sharded, *arrays, scales)) == 1


@pytest.mark.slow
def test_no_batching_and_no_gradient(jax_triton: None):
    with lowering_for(HOPPER):
        arrays, _ = abstract()
        batch = [jax.ShapeDtypeStruct((2, *a.shape), a.dtype) for a in arrays]
        with pytest.raises(NotImplementedError, match="vmap"):
            jax.eval_shape(jax.vmap(lambda *a: call(a, None)), *batch)
        with pytest.raises(NotImplementedError, match="differentiation"):
            jax.eval_shape(jax.grad(lambda q, *a: call((q, *a), None)[1].sum()), *arrays)


# ---------------------------------------------------------------- what it refuses, with or without Triton


def test_files_of_kernels_import_without_triton(monkeypatch: pytest.MonkeyPatch):
    for name in ("triton", "triton.language", "jax_triton"):
        monkeypatch.setitem(sys.modules, name, None)
    launch = FOLDER / "triton_launch.py"
    for file in (launch, *(f for f in sorted(FOLDER.glob("triton_*.py")) if f != launch)):
        name = f"difax.accel.kernels.{file.stem}"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    without = sys.modules["difax.accel.kernels.triton_launch"]
    assert without.tl is None
    with pytest.raises(NotImplementedError, match=r"pip install 'difax\[triton\]'"):
        without.triton_call()


CPU, UNKNOWN, TURING = Target("cpu"), Target("gpu", "some GPU"), Target("gpu", "T4", (7, 5))
q64 = jax.ShapeDtypeStruct((1, 4608, 24, 96), "bfloat16")
REFUSED = [
    (NotImplementedError, "the platform cpu", CPU, abstract(), {}),
    (NotImplementedError, "some GPU: its compute capability is unknown", UNKNOWN, abstract(), {}),
    (NotImplementedError, "7.5; from 8.0 on", TURING, abstract(), {}),
    (NotImplementedError, "from 8.9 on", AMPERE, abstract("int8", "float8_e4m3fn"), {}),
    (NotImplementedError, "q and k in float32", HOPPER, abstract("float32", "bfloat16"), {}),
    (NotImplementedError, "v in float32", HOPPER, abstract("bfloat16", "float32"), {}),
    (NotImplementedError, "int8 without scales", HOPPER, (abstract("int8")[0], None), {}),
    (NotImplementedError, "without scales of v", HOPPER, (abstract("int8", FP8)[0], abstract("int8")[1]), {}),
    (NotImplementedError, "heads of 96", HOPPER, abstract(width=96), {}),
    (NotImplementedError, "block_q=96", HOPPER, abstract(block=96), {"block": 96}),
    (NotImplementedError, "block_q=128 in 16 parts", HOPPER, abstract(), {"split": 16}),
    (NotImplementedError, "block_k=16 in 1 parts", HOPPER, abstract("int8", block=16), {"block": 16}),
    (NotImplementedError, "scales of blocks", HOPPER, (abstract("int8")[0], abstract("int8", block=64)[1]), {}),
    (NotImplementedError, "no interpreter inside of JAX", HOPPER, abstract(), {"interpret": True}),
    (ValueError, "allowed: \\[1 or 1, 24 or 1, 72\\]", HOPPER, abstract(), {"block": 64}),
]


@pytest.mark.parametrize("error, says, what, args, more", REFUSED, ids=[row[1] for row in REFUSED])
def test_refusals(error, says, what, args, more):
    with lowering_for(what), pytest.raises(error, match=says):
        jax.eval_shape(lambda *given: call(*given, **more), *args)


def test_tuning_of_gpus():
    assert tuned(90, 128, 128) == (1, 1, 2, 8)
    assert tuned(90, 256, 256) == (2, 2, 2, 8)
    assert tuned(80, 128, 128) == tuned(120, 128, 128) == (1, 2, 3, 8)
    assert tuned(89, 64, 64) == (1, 1, 3, 4)
    assert triton_attention.kernel is not None
