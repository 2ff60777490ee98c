"""The Mosaic GPU kernel: interpreted with races looked for, against its formula in float64; compiled for GPUs that are
not here, down to their instructions; lowered where no CUDA is installed; and what it declines."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from difax.accel.kernels import mosaic_attention
from difax.accel.kernels.mosaic_attention import block_sparse
from difax.core.contracts import BlockScales, Segments
from difax.core.target import Target, lowering_for
from tests.families import some

HOPPER = Target("gpu", "NVIDIA H100 80GB HBM3", (9, 0))
BLOCK_Q = 128
E4M3 = jnp.dtype("float8_e4m3fn")


class Case(NamedTuple):
    """A call: its lengths, what is quantised, and which samples and heads have lists of their own."""

    queries: int
    keys: int
    kind: str = "bfloat16"
    width: int = 64
    block_k: int = 64
    batch: int = 1
    heads: int = 1
    lists: tuple[int, int] = (1, 1)  # of samples and heads
    listed: int = 3
    segments: bool = False
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def blocks(self) -> tuple[int, int]:
        return -(-self.queries // BLOCK_Q), -(-self.keys // self.block_k)

    @property
    def dtypes(self) -> tuple[Any, Any]:
        """Of queries and keys, and of values."""
        quantised = self.kind.startswith("int8")
        plain = jnp.dtype(self.kind if not quantised else "bfloat16")
        return jnp.dtype("int8") if quantised else plain, E4M3 if self.kind == "int8_fp8" else plain


CASES = {
    "float16, segments, ragged": Case(131, 75, "float16", segments=True),
    "bfloat16": Case(256, 256),
    "width 128": Case(128, 384, width=128, block_k=128),
    "float16": Case(128, 192, "float16"),
    "int8": Case(128, 384, "int8", width=128, block_k=128),
    "int8, width 64": Case(128, 256, "int8"),
    "int8, float8": Case(128, 384, "int8_fp8", width=128, block_k=128),
    "int8, float8, width 64": Case(128, 256, "int8_fp8"),
    "no turns": Case(256, 320, listed=5, settings=(("turns", False),)),
    "deeper ring": Case(128, 512, listed=7, settings=(("depth", 3),)),
    "ring of one": Case(128, 256, listed=4, settings=(("depth", 1),)),
    "ragged keys": Case(128, 200, block_k=128, listed=2),
    "ragged queries": Case(200, 128),
    "one query, one key": Case(1, 1, listed=1),
    "ragged, odd": Case(189, 331, listed=6),
    "ragged, int8": Case(150, 270, "int8", listed=5),
    "ragged, int8, float8": Case(150, 270, "int8_fp8", width=128, block_k=128),
    "segments": Case(256, 256, batch=2, segments=True),
    "segments, int8, float8, ragged": Case(140, 200, "int8_fp8", listed=4, segments=True),
    "heads and samples": Case(256, 192, batch=2, heads=2, lists=(2, 2)),
    "lists by sample": Case(256, 192, batch=2, heads=2, lists=(2, 1)),
    "lists by head": Case(256, 192, batch=2, heads=2, lists=(1, 2)),
    "counts of 1": Case(384, 256, listed=1, heads=2, lists=(1, 2)),
}
TOLERANCE = {"bfloat16": 4e-3, "float16": 6e-4, "int8": 4e-3, "int8_fp8": 4e-2}


class Call(NamedTuple):
    """The arrays of a case, what they stand for in float64, and its lists."""

    q: Any
    k: Any
    v: Any
    exact: tuple[np.ndarray, np.ndarray, np.ndarray]
    indices: np.ndarray
    counts: np.ndarray
    segments: Segments | None
    scales: BlockScales | None


def by_block(x: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 values of x [B, T, H, K], and [B, H, blocks] of what they are multiplied by."""
    padded = np.pad(np.abs(x), ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))
    largest = padded.reshape(x.shape[0], -1, block, *x.shape[2:]).max((2, 4))
    scale = (largest / 127).astype(np.float32)
    values = np.rint(x / np.repeat(scale, block, 1)[:, : x.shape[1], :, None])
    return values.astype(np.int8), np.moveaxis(scale, 1, 2)


def call_of(case: Case, seed: int = 0) -> Call:
    rng = np.random.default_rng([seed, case.queries, case.keys])
    shapes = ((case.batch, n, case.heads, case.width) for n in (case.queries, case.keys, case.keys))
    q, k, v = (1.5 * rng.standard_normal(shape) for shape in shapes)
    v = v + 0.5  # so that a mean of values is seen
    rows, blocks = case.blocks
    indices = np.argsort(rng.random((*case.lists, rows, blocks)), -1)[..., : case.listed].astype(np.int32)
    counts = rng.integers(1, indices.shape[-1] + 1, (*case.lists, rows)).astype(np.int32)
    counts[..., -1] = indices.shape[-1]  # the longest list that there is
    segments = scales = None
    if case.segments:  # no key has the id 2
        ids = (rng.integers(0, n, (case.batch, length)) for n, length in ((3, case.queries), (2, case.keys)))
        segments = Segments(*(jnp.asarray(a, jnp.int32) for a in ids))
    of_qk, of_v = case.dtypes
    if of_qk == jnp.int8:
        (q, scale_q), (k, scale_k) = by_block(q, BLOCK_Q), by_block(k, case.block_k)
        scale_v = None
        if of_v == E4M3:
            scale_v = (np.abs(v).max(1) / 448).astype(np.float32)
            v = np.moveaxis(np.moveaxis(v, 1, -1) / np.moveaxis(scale_v, 1, 1)[..., None], -1, 1)
        scales = BlockScales(
            *(a if a is None else jnp.asarray(a) for a in (scale_q, scale_k, scale_v)), BLOCK_Q, case.block_k
        )
    q, k, v = (np.asarray(a).astype(dtype) for a, dtype in ((q, of_qk), (k, of_qk), (v, of_v)))
    exact = [a.astype(np.float64) for a in (q, k, v)]
    if scales is not None:
        for i, (scale, block) in enumerate(((scales.q, BLOCK_Q), (scales.k, case.block_k))):
            spread = np.repeat(np.asarray(scale, np.float64), block, -1)[..., : exact[i].shape[1]]
            exact[i] = exact[i] * np.swapaxes(spread, 1, 2)[..., None]
        if scales.v is not None:
            exact[2] = exact[2] * np.asarray(scales.v, np.float64)[:, None]
    return Call(q, k, v, (exact[0], exact[1], exact[2]), indices, counts, segments, scales)


def oracle(case: Case, call: Call) -> tuple[np.ndarray, np.ndarray]:
    """o [B, T, H, K] and lse [B, H, T] query by query, each over the keys that its list names and that exist.

    A key of another segment has a logit of -1e30 in place of its own.
    """
    q, k, v = call.exact
    o, lse = np.zeros_like(q), np.zeros((case.batch, case.heads, case.queries))
    for b, t, h in np.ndindex(q.shape[:3]):
        place = b % case.lists[0], h % case.lists[1], t // BLOCK_Q
        spans = [np.arange(j * case.block_k, (j + 1) * case.block_k) for j in call.indices[place][: call.counts[place]]]
        at = np.concatenate(spans)
        at = at[at < case.keys]
        x = k[b, at, h] @ q[b, t, h] * case.width**-0.5
        if call.segments is not None:
            x = np.where(np.asarray(call.segments.q)[b, t] == np.asarray(call.segments.k)[b, at], x, -1e30)
        weights = np.exp(x - x.max())
        o[b, t, h] = weights / weights.sum() @ v[b, at, h]
        lse[b, h, t] = x.max() + np.log(weights.sum())
    return o, lse


def kernel(case: Case, interpret: Any = False):
    """(q, k, v, indices, counts, segments, scales) -> (o, lse), for one device."""
    settings = dict(case.settings) | {"block_q": BLOCK_Q, "block_k": case.block_k, "interpret": interpret}

    def run(q, k, v, indices, counts, segments, scales):
        return block_sparse(
            q, k, v, indices, counts, softmax_scale=case.width**-0.5, segments=segments, scales=scales, **settings
        )

    return run


@functools.cache
def interpreted(case: Case):
    """The kernel in the interpreter, compiled once; a race fails the call or is asked for by `races`."""
    if jax.__version_info__ < (0, 11, 2):
        pytest.skip("the interpreter of Mosaic GPU has what the kernel needs from jax 0.11.2 on")
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return jax.jit(kernel(case, plgpu.InterpretGPUParams(detect_races=True)))


def races() -> bool:
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call  # nothing public says so in jax 0.11

    return interpret_pallas_call.get_races().races_found


def arrays(call: Call) -> tuple[Any, ...]:
    return (*(jnp.asarray(a) for a in (call.q, call.k, call.v, call.indices, call.counts)), call.segments, call.scales)


def check(case: Case, call: Call, o: jax.Array, lse: jax.Array) -> None:
    """Every row of blocks is as near to the formula as the dtypes allow."""
    expected, expected_lse = oracle(case, call)
    assert o.shape == expected.shape and lse.shape == expected_lse.shape and lse.dtype == jnp.float32
    assert o.dtype == (jnp.bfloat16 if case.dtypes[0] == jnp.int8 else case.dtypes[0])
    for first in range(0, case.queries, BLOCK_Q):
        rows = slice(first, first + BLOCK_Q)
        off = np.linalg.norm(np.asarray(o, np.float64)[:, rows] - expected[:, rows], axis=(1, 3))
        assert (off < TOLERANCE[case.kind] * np.linalg.norm(expected[:, rows], axis=(1, 3))).all()
    np.testing.assert_allclose(lse, expected_lse, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("name", some(CASES, "float16, segments, ragged"))
def test_formula(name):
    case = CASES[name]
    run = interpreted(case)
    call = call_of(case)
    o, lse = run(*arrays(call))
    assert not races()
    check(case, call, o, lse)
    if case.segments:  # some queries have no key of their segment, and get a mean of values
        assert (np.asarray(lse) < -1e29).any() and np.isfinite(np.asarray(o, np.float32)).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bfloat16", "int8, float8", "ragged, odd", "lists by head"])
def test_one_wrong_entry_of_a_list_is_seen(name):
    case = CASES[name]
    run = interpreted(case)
    call = call_of(case)
    rows, blocks = case.blocks
    for row in range(rows):
        place = (-1, -1, row)
        count = call.counts[place]
        left = np.setdiff1d(np.arange(blocks), call.indices[place][:count])
        if len(left):
            break
    else:
        raise AssertionError("every list names every block: none can be wrong")
    wrong = call.indices.copy()
    wrong[(*place, count - 1)] = left[0]
    results = run(*arrays(call._replace(indices=wrong)))
    with pytest.raises(AssertionError):
        check(case, call, *results)
    check(case, call._replace(indices=wrong), *results)


@pytest.mark.slow
def test_entries_past_the_count_are_not_read():
    case = CASES["heads and samples"]
    run = interpreted(case)
    call = call_of(case)
    past = np.arange(call.indices.shape[-1]) >= call.counts[..., None]
    other = call._replace(indices=np.where(past, 0, call.indices).astype(np.int32))
    assert past.any() and (other.indices != call.indices).any()
    for a, b in zip(run(*arrays(call)), run(*arrays(other)), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.slow
def test_a_missing_fence_is_found_as_a_race(monkeypatch):
    case = CASES["ragged queries"]
    interpreted(case)  # skips where there is no interpreter
    monkeypatch.setattr(mosaic_attention.plgpu, "commit_smem", lambda: None)
    found = False
    try:
        interpreted.__wrapped__(case)(*arrays(call_of(case)))
        found = races()
    except Exception as error:
        found = "RACE DETECTED" in str(error) or "race" in str(error).lower()
    assert found


# what it declines, and what no mask costs where there is none


def shapes(case: Case, sharding: Any = lambda *axes: None) -> tuple[Any, ...]:
    """The arguments of a case as shapes; `sharding(*axes)` of an array whose axes have these names."""
    s = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(*axes))  # noqa: E731
    (rows, blocks), (of_qk, of_v), (b, h) = case.blocks, case.dtypes, (case.batch, case.heads)
    q, k, v = (
        s((b, n, h, case.width), dtype, "b", None, "h", None)
        for n, dtype in ((case.queries, of_qk), (case.keys, of_qk), (case.keys, of_v))
    )
    own = tuple(name if size > 1 else None for name, size in zip("bh", case.lists, strict=True))
    indices, counts = (
        s((*case.lists, rows, case.listed), jnp.int32, *own, None, None),
        s((*case.lists, rows), jnp.int32, *own, None),
    )
    segments = scales = None
    if case.segments:
        segments = Segments(*(s((b, n), jnp.int32, "b", None) for n in (case.queries, case.keys)))
    if of_qk == jnp.int8:
        of_values = s((b, h, case.width), jnp.float32, "b", "h", None) if of_v == E4M3 else None
        by_rows, by_keys = (s((b, h, n), jnp.float32, "b", "h", None) for n in (rows, blocks))
        scales = BlockScales(by_rows, by_keys, of_values, BLOCK_Q, case.block_k)
    return q, k, v, indices, counts, segments, scales


PLAIN = Case(256, 256, width=128, block_k=128, listed=2)
with_dtypes = lambda *dtypes: lambda given: tuple(  # noqa: E731
    a.update(dtype=jnp.dtype(d)) for a, d in zip(given[:3], dtypes, strict=True)
) + given[3:]  # fmt: skip
DECLINES = {
    "a CPU": (PLAIN, Target("cpu"), None, "platform cpu"),
    "Ada": (PLAIN, Target("gpu", "NVIDIA L40S", (8, 9)), None, "compute capability 8.9"),
    "Blackwell": (PLAIN, Target("gpu", "NVIDIA B200", (10, 0)), None, "compute capability 10.0"),
    "an unknown GPU": (PLAIN, Target("gpu"), None, "compute capability unknown"),
    "a width": (PLAIN._replace(width=72), HOPPER, None, "head width 72"),
    "blocks": (PLAIN._replace(block_k=32), HOPPER, None, "blocks of 128 x 32"),
    "float32": (PLAIN._replace(kind="float32"), HOPPER, None, "float32"),
    "mixed": (PLAIN, HOPPER, with_dtypes("bfloat16", "bfloat16", "float16"), "bfloat16, bfloat16, float16"),
    "int8 without scales": (PLAIN, HOPPER, with_dtypes("int8", "int8", "bfloat16"), "without scales"),
    "scales without int8": (
        PLAIN._replace(kind="int8"), HOPPER, with_dtypes("bfloat16", "bfloat16", "bfloat16"), "with scales",
    ),
    "scales of other values": (
        PLAIN._replace(kind="int8_fp8"), HOPPER, with_dtypes("int8", "int8", "bfloat16"), "with scales",
    ),
    "scales by other blocks": (
        PLAIN._replace(kind="int8"), HOPPER, lambda given: (*given[:6], given[6].replace(block_k=64)), "128 x 64",
    ),
    "a deep ring": (PLAIN._replace(settings=(("depth", 3),)), HOPPER, None, "depth=3"),
    "no ring": (PLAIN._replace(settings=(("depth", 0),)), HOPPER, None, "depth=0"),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINES)
def test_declines(name):
    case, device, change, reason = DECLINES[name]
    given = shapes(case)
    with lowering_for(device), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(kernel(case), *(given if change is None else change(given)))


def test_refuses_lists_of_other_shapes():
    q, k, v, indices, counts, *rest = shapes(PLAIN)
    with lowering_for(HOPPER):
        jax.eval_shape(kernel(PLAIN), q, k, v, indices, counts, *rest)
        for wrong in ((1, 1, 3), (2, 1, 2), (1, 2, 2), (1, 2)):
            with pytest.raises(ValueError, match=r"counts .*allowed: \[1 or 1, 1 or 1, 2\]"):
                jax.eval_shape(kernel(PLAIN), q, k, v, indices, counts.update(shape=wrong), *rest)


def test_whole_blocks_have_no_masks_and_no_copies():
    def traced(case: Case) -> set[str]:
        with lowering_for(HOPPER):
            text = str(jax.make_jaxpr(kernel(case))(*shapes(case)))
        return {name for name in ("select_n", "iota", "cond", "pad", "slice") if re.search(rf"= {name}\[", text)}

    whole = traced(PLAIN)  # `pl.when` is a cond too
    assert whole == {"cond"} == traced(PLAIN._replace(kind="int8_fp8")) - {"transpose"}
    assert traced(PLAIN._replace(segments=True)) == whole | {"select_n"}
    assert traced(PLAIN._replace(keys=248)) == whole | {"select_n", "iota"}  # copied in whole tiles of 8 rows
    assert traced(PLAIN._replace(keys=247)) == whole | {"select_n", "iota", "pad"}  # keys and values padded to tiles
    assert traced(PLAIN._replace(queries=248)) == whole | {"slice"}  # of the log-sum-exp


# lowered for a GPU, with or without CUDA here

LOWERED = {
    "bfloat16": Case(4471, 4500, width=128, block_k=128, heads=24, listed=9, segments=True),
    "float16": Case(4608, 4608, "float16", heads=24, listed=9),
    "int8": Case(4471, 4500, "int8", width=128, block_k=128, heads=24, listed=9, segments=True),
    "int8_fp8": Case(4471, 4500, "int8_fp8", width=128, block_k=128, heads=24, listed=9, segments=True),
}


@pytest.mark.parametrize("name", some(LOWERED, "bfloat16"))
def test_lowers_without_cuda(name):
    case = LOWERED[name]
    custom = [export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")]
    with lowering_for(HOPPER):
        made = export.export(jax.jit(kernel(case)), platforms=["cuda"], disabled_checks=custom)(*shapes(case))
    assert [tuple(a.shape) for a in made.out_avals] == [
        (1, case.queries, 24, case.width),
        (1, 24, case.queries),
    ]
    assert "wgmma" in made.mlir_module()
