"""The TPU kernel: each option in Pallas' interpreter against float64 numpy, what is declined, what libtpu compiles."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from difax.accel.kernels.tpu_attention import block_sparse
from difax.core.contracts import BlockScales, Segments
from difax.core.target import Target, lowering_for
from tests.compile_for_tpu import VARIANTS
from tests.families import some
from tests.oracles.attention import listed_attention, random_lists

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Case(NamedTuple):
    """Lengths, blocks, and what the kernel is asked for; `shared` of the list is (samples, heads)."""

    t: int = 256
    s: int = 384
    width: int = 128
    block_q: int = 128
    block_k: int = 128
    listed: int = 3
    shared: tuple[int, int] = (1, 2)
    kind: str = "float32"
    segmented: bool = False
    settings: dict[str, Any] = {}  # noqa: RUF012
    samples: int = 1
    tolerance: float = 2e-6


CASES = {
    "plain": Case(),
    "one a product": Case(settings={"at_once": 1}),
    "two a product": Case(settings={"at_once": 2}),
    "own lists of samples": Case(samples=2, shared=(2, 2), listed=2),
    "one list for all": Case(samples=2, shared=(1, 1)),
    "width 64": Case(width=64),
    "64 x 64": Case(width=64, block_q=64, block_k=64, listed=5),
    "64 x 128": Case(block_q=64),
    "128 x 64": Case(block_k=64, listed=4),
    "256 x 128": Case(block_q=256),
    "ragged": Case(t=200, s=300),
    "ragged 64 x 64 segments": Case(t=150, s=170, block_q=64, block_k=64, segmented=True),
    "an odd number of rows": Case(t=190, block_q=64),
    "segments": Case(segmented=True),
    "bfloat16": Case(kind="bfloat16", tolerance=1e-2),
    "copied": Case(settings={"resident": False, "at_once": 2}),
    "copied one a product": Case(settings={"resident": False, "at_once": 1}),
    "copied ragged segments 64 x 64": Case(
        t=150, s=300, block_q=64, block_k=64, segmented=True, settings={"resident": False}
    ),
    "int8": Case(kind="int8", tolerance=1e-2),
    "int8 ragged segments": Case(t=200, s=300, kind="int8", segmented=True, tolerance=1e-2),
    "int8 copied": Case(kind="int8", settings={"resident": False}, tolerance=1e-2),
    "int8 fp8": Case(kind="int8 fp8", width=64, tolerance=1e-2),
}
EVERY_RUN = ("64 x 64", "ragged 64 x 64 segments", "copied ragged segments 64 x 64", "int8 fp8", "bfloat16")


def made(case: Case, seed: int = 0) -> tuple[list[Any], Any, Any, Any]:
    """q, k, v, indices and counts of a case, its segments and scales, and what they stand for in float64."""
    rng = np.random.default_rng([seed, *map(len, CASES)])
    n_q, n_k = -(-case.t // case.block_q), -(-case.s // case.block_k)
    q, k, v = (rng.normal(size=(case.samples, n, 2, case.width)) for n in (case.t, case.s, case.s))
    indices, counts = random_lists(rng, case.shared, n_q, n_k, min(case.listed, n_k))
    segments = None
    if case.segmented:
        ids = (rng.integers(0, most, (case.samples, n)) for n, most in ((case.t, 4), (case.s, 3)))  # no key has 3
        segments = Segments(*(jnp.asarray(a, jnp.int32) for a in ids))
    if not case.kind.startswith("int8"):
        q, k, v = (jnp.asarray(a, case.kind) for a in (q, k, v))
        return [q, k, v, indices, counts], segments, None, (q, k, v)

    def in_blocks(a: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        parts = range(0, a.shape[1], block)
        tops = np.stack([np.abs(a[:, i : i + block]).max((1, 3)) / 127 for i in parts], -1)  # [B, H, n]
        each = np.repeat(tops, block, -1)[..., : a.shape[1]].swapaxes(1, 2)[..., None]
        whole = np.round(a / each)
        return whole.astype(np.int8), tops.astype(np.float32), whole * each

    (q8, sq, q), (k8, sk, k) = in_blocks(q, case.block_q), in_blocks(k, case.block_k)
    v16, sv = jnp.asarray(v, jnp.bfloat16), None
    if case.kind == "int8 fp8":
        sv = np.abs(v).max(1) / 448
        v16 = jnp.asarray(v / sv[:, None], jnp.float8_e4m3fn)
        v, sv = np.asarray(v16, np.float64) * sv[:, None], jnp.asarray(sv, jnp.float32)
    scales = BlockScales(jnp.asarray(sq), jnp.asarray(sk), sv, case.block_q, case.block_k)
    return [jnp.asarray(q8), jnp.asarray(k8), v16, indices, counts], segments, scales, (q, k, v)


def blocks_of(case: Case) -> dict[str, Any]:
    return {"block_q": case.block_q, "block_k": case.block_k, "scale": case.width**-0.5}


def run(case: Case, interpret: Any = True, **settings: Any) -> Any:
    def kernel(arrays: Any, segments: Any, scales: Any) -> Any:
        return block_sparse(
            *arrays,
            block_q=case.block_q,
            block_k=case.block_k,
            softmax_scale=case.width**-0.5,
            segments=segments,
            scales=scales,
            interpret=interpret,
            **case.settings,
            **settings,
        )

    return kernel


@pytest.mark.parametrize("name", some(CASES, *EVERY_RUN))
def test_formula(name):
    case = CASES[name]
    arrays, segments, scales, real = made(case)
    o, lse = jax.jit(run(case))(arrays, segments, scales)
    ids = None if segments is None else (segments.q, segments.k)
    want, want_lse = listed_attention(*real, indices=arrays[3], counts=arrays[4], **blocks_of(case), segments=ids)
    assert o.shape == arrays[0].shape and lse.shape == want_lse.shape and lse.dtype == jnp.float32
    assert o.dtype == (jnp.bfloat16 if case.kind != "float32" else jnp.float32)
    assert (want_lse == -1e30).any() == case.segmented  # some query has no key at all
    error = float(np.abs(np.asarray(o, np.float64) - want).max() / np.abs(want).max())
    error_lse = float((np.abs(lse - want_lse) / np.maximum(1, np.abs(want_lse))).max())
    print(f"{name}: o {error:.1e}, lse {error_lse:.1e}")
    assert error < case.tolerance and error_lse < 2e-6


def test_a_wrong_list_is_seen():
    """The oracle with another block in one row is far from the kernel, so that the comparison above can fail."""
    case = CASES["64 x 64"]
    arrays, _, _, real = made(case)
    o, _ = jax.jit(run(case))(arrays, None, None)
    indices = np.array(arrays[3])
    indices[0, 0, 1, 0] = (set(range(6)) - set(indices[0, 0, 1])).pop()
    want, _ = listed_attention(*real, indices=indices, counts=arrays[4], **blocks_of(case))
    off = np.abs(np.asarray(o) - want).max((0, 2, 3))
    assert off[64:128].max() > 1e-2 and off[:64].max() < 2e-6 > off[128:].max()


@pytest.mark.parametrize("resident", some([True, False], False))
def test_blocks_past_the_count_may_hold_anything(resident):
    case = Case(width=64, block_q=64, block_k=64, t=64, s=256, listed=4, settings={"resident": resident, "at_once": 2})
    arrays, _, _, _ = made(case)
    arrays[4] = np.full_like(arrays[4], 1)
    want, _ = jax.jit(run(case))(arrays, None, None)
    first = arrays[3][0, :, 0, 0]
    for head in range(2):
        at = np.arange(256) // 64 != first[head]
        arrays[1:3] = [a.at[:, at, head].set(jnp.nan) for a in arrays[1:3]]
    o, _ = jax.jit(run(case))(arrays, None, None)
    np.testing.assert_array_equal(o, want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ragged", "copied"])
def test_no_races(name):
    case = CASES[name]
    arrays, segments, scales, real = made(case)
    o, _ = jax.jit(run(case, pltpu.InterpretParams(detect_races=True)))(arrays, segments, scales)
    want, _ = listed_attention(*real, indices=arrays[3], counts=arrays[4], **blocks_of(case))
    assert np.abs(np.asarray(o) - want).max() < 1e-5


def test_inside_of_shard_map():
    """Heads on two devices, with every axis that a value varies over checked."""
    case = Case(width=64, block_q=64, block_k=64, t=128, s=128, listed=2)
    arrays, _, _, _ = made(case)
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    tokens, rows = PartitionSpec(None, None, "heads"), PartitionSpec(None, "heads")

    def kernel(*arrays: Any) -> Any:
        return run(case)(arrays, None, None)

    # the interpreter's loops mix what varies with what does not; the lowering for TPUs is compiled with the check
    split = jax.shard_map(
        kernel, mesh=mesh, in_specs=(tokens,) * 3 + (rows,) * 2, out_specs=(tokens, rows), check_vma=False
    )
    for got, want in zip(jax.jit(split)(*arrays), jax.jit(kernel)(*arrays), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


V5E, V5P, V4 = (Target("tpu", kind) for kind in ("TPU v5 lite", "TPU v5", "TPU v4"))
DECLINES = [
    (Target("cpu"), Case(), {}, "the platform cpu; it needs a TPU"),
    (Target("gpu", "NVIDIA H100", (9, 0)), Case(), {}, "the platform gpu; it needs a TPU"),
    (V5E, Case(width=72), {}, "head widths 72 and 72; it takes 64 or 128 of both"),
    (V5E, Case(block_k=96), {}, "a list of blocks of 128 x 96; it takes multiples of 64"),
    (V5E, Case(kind="float16"), {}, "queries and keys in float16 and float16; it takes bfloat16 or float32"),
    (V4, Case(kind="int8"), {}, "int8 on a TPU v4; it needs v5e, v5p, v6e or later"),
]


@pytest.mark.parametrize("target, case, settings, reason", DECLINES, ids=[d[-1][:30] for d in DECLINES])
def test_what_is_declined(target, case, settings, reason):
    arrays, segments, scales, _ = made(case)
    with lowering_for(target), pytest.raises(NotImplementedError, match=reason):
        run(case, False, **settings)(arrays, segments, scales)


@pytest.mark.parametrize(
    "target, tokens, copied",
    [(V5E, 32768, False), (V5E, 75776, False), (V5P, 32768, False), (V5P, 75776, True), (V4, 4608, False),
     (V4, 32768, True), (Target("tpu"), 32768, True)],
)  # fmt: skip
def test_a_head_that_fits_into_the_chip_is_held(target, tokens, copied):
    x = jax.ShapeDtypeStruct((1, tokens, 1, 128), jnp.bfloat16)
    n = tokens // 128
    lists = jax.ShapeDtypeStruct((1, 1, n, 8), jnp.int32), jax.ShapeDtypeStruct((1, 1, n), jnp.int32)
    with lowering_for(target):
        text = str(jax.make_jaxpr(lambda *a: run(Case(), False)(a, None, None))(x, x, x, *lists))
    assert ("dma_start" in text) == copied


# ---------------------------------------------------------------- compiled, without a TPU


QUICK = ("bf16 64 x 64 segments ragged", "int8 copied ragged segments", "sharded")
SLOW = [pytest.param(t, tuple(VARIANTS), marks=pytest.mark.slow) for t in ("v5e:2x4", "v6e:2x4", "v5p:2x2x2")]


@pytest.mark.parametrize("topology, names", [("v6e:2x4", QUICK), *SLOW])
def test_compiles(topology, names):
    """By libtpu's own compiler, for chips that are not there."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu (pip install 'difax[tpu]'; no TPU)")
    command = [sys.executable, "-m", "tests.compile_for_tpu", topology, *names]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=600)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {row["variant"]: row["said"] for row in rows} == dict.fromkeys(names, "ok"), done.stderr[-2000:]
