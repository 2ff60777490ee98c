"""The front door of kernels for listed blocks: what serves which target, what is shared, gradients, and the choice."""

import importlib.util
import types
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from difax.accel.attention import ATTENTIONS, BEST, attention
from difax.accel.attention.block_sparse import KERNELS, block_sparse, every_block, kernels_for
from difax.accel.attention.chunked import chunked
from difax.core import ops
from difax.core.contracts import BlockList, BlockScales, Scales, Segments, Where
from difax.core.target import Target, lowering_for, target, target_of
from tests.families import some
from tests.oracles.attention import listed_attention, random_lists

CPU, TPU = Target("cpu"), Target("tpu", "TPU v6 lite")
HOPPER, AMPERE, BLACKWELL = (Target("gpu", "NVIDIA", capability) for capability in ((9, 0), (8, 0), (10, 0)))


def inputs(t: int, s: int, width: int, seed: int = 0, dtype: str = "float32") -> list[jax.Array]:
    rng = np.random.default_rng([seed, t, s, width])
    return [jnp.asarray(rng.normal(size=(1, n, 2, width)), dtype) for n in (t, s, s)]


def a_list(t: int, s: int, block_q: int, block_k: int, n: int, shape: tuple[int, int] = (1, 2)) -> BlockList:
    n_q, n_k = -(-t // block_q), -(-s // block_k)
    indices, counts = random_lists(np.random.default_rng([t, s, n]), shape, n_q, n_k, n)
    return BlockList(jnp.asarray(indices), jnp.asarray(counts), block_q, block_k)


def some_segments(t: int, s: int) -> Segments:
    """No key has the id 2 of some queries."""
    return Segments(jnp.arange(t, dtype=jnp.int32)[None] % 3, jnp.arange(s, dtype=jnp.int32)[None] % 2)


def largest_error(got: Any, want: Any) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float((np.abs(got - want) / np.maximum(1, np.abs(want))).max())


# ---------------------------------------------------------------- the blocked path of a CPU


LISTS = [(10, 11, 4, 3, 3), (64, 70, 8, 4, 11), (9, 40, 16, 2, 20)]  # T, S, their blocks, and how many are listed


@pytest.mark.parametrize("segmented", [False, True], ids=["plain", "segments"])
@pytest.mark.parametrize("lengths", some(LISTS, LISTS[1]))
def test_lists_of_any_size(lengths, segmented):
    t, s, block_q, block_k, n = lengths
    arrays, blocks = inputs(t, s, 4), a_list(t, s, block_q, block_k, n)
    ids = some_segments(t, s) if segmented else None
    o, lse = jax.jit(lambda *a: block_sparse()(*a, ids, blocks, with_lse=True))(*arrays)
    both = None if ids is None else (ids.q, ids.k)
    want = listed_attention(
        *arrays,
        indices=blocks.indices,
        counts=blocks.counts,
        block_q=block_q,
        block_k=block_k,
        scale=0.5,
        segments=both,
    )
    assert max(map(largest_error, (o, lse), want)) < 2e-6
    np.testing.assert_array_equal(o, jax.jit(lambda *a: chunked()(*a, ids, blocks))(*arrays))


def trips(function: Any, *arguments: Any) -> list[tuple[int, int]]:
    """How many keys each product of logits has, and how often each ran, found by running the loops op by op."""
    seen: dict[int, int] = {}
    real = jnp.einsum

    def einsum(what: str, a: jax.Array, b: jax.Array, **options: Any) -> jax.Array:
        if what == "tk,sk->ts":
            seen[b.shape[0]] = seen.get(b.shape[0], 0) + 1
        return real(what, a, b, **options)

    with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
        patch.setattr(jnp, "einsum", einsum)
        function(*arguments)
    return sorted(seen.items())


def test_the_loops_end_with_the_count():
    """Of 40 blocks of 64 keys a row lists 21: one product of 16 blocks, one of 4, one of 1, in each of two heads."""
    arrays, indices = inputs(4, 40 * 64, 4), jnp.arange(40, dtype=jnp.int32)[::-1][None, None, None]
    for count, want in ((21, [(64, 2), (256, 2), (1024, 2)]), (1, [(64, 2)]), (40, [(256, 4), (1024, 4)])):
        blocks = BlockList(indices, jnp.full((1, 1, 1), count, jnp.int32), 4, 64)
        assert trips(lambda *a, blocks=blocks: chunked()(*a, blocks=blocks), *arrays) == want


# ---------------------------------------------------------------- gradients

GRADIENTS = {
    "blocked": {"kernel": "blocked"},
    "tpu, interpreted": {"kernel": "tpu", "interpret": True},
}


@pytest.mark.parametrize("segmented", [False, True], ids=["plain", "segments"])
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_those_of_the_reference(name, segmented):
    """Of o and of the log-sum-exp, against autodiff of `ops.attend`; ragged lengths, and a width that is filled up."""
    t, s, block_q, block_k = (100, 150, 64, 64)
    arrays, blocks = inputs(t, s, 16), a_list(t, s, block_q, block_k, 2)
    ids = None
    if segmented:  # every query has a key in each block: the reference's mean is over all keys, not the listed
        ids = Segments(jnp.arange(t, dtype=jnp.int32)[None] % 2, jnp.arange(s, dtype=jnp.int32)[None] % 3)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.float32)

    def gradient(function: Any) -> Any:
        def scalar(*arrays: Any) -> jax.Array:
            o, lse = function(*arrays, ids, blocks, with_lse=True)
            return jnp.sum(jnp.sin(o) * weight) + jnp.sum(lse**2)

        return jax.jit(jax.grad(scalar, (0, 1, 2)))(*arrays)

    for part, got, want in zip("qkv", gradient(block_sparse(**GRADIENTS[name])), gradient(ops.attend), strict=True):
        print(f"{name} d{part} {largest_error(got, want):.1e}")
        assert np.abs(want).max() > 0.1 and largest_error(got, want) < 2e-5


def test_the_gradient_of_a_query_without_a_key():
    """It gets the mean of its listed values, so each of them gets its part, and q and k nothing."""
    t = s = 6
    arrays, blocks = inputs(t, s, 4), every_block(t, s, 2, 4)
    ids = Segments(jnp.asarray([[0, 0, 0, 0, 0, 5]]), jnp.zeros((1, s), jnp.int32))

    def gradient(function: Any) -> Any:
        return jax.jit(jax.grad(lambda *a: jnp.sum(function(*a, ids, blocks)[:, -1] ** 2), (0, 1, 2)))(*arrays)

    reference = gradient(ops.attend)
    for got, want in zip(gradient(block_sparse()), reference, strict=True):
        assert largest_error(got, want) < 1e-6
    assert np.abs(reference[2]).max() > 0.01


def test_a_gradient_holds_no_logits():
    t, blocks = 512, every_block(512, 512, 8, 8)
    x = jax.ShapeDtypeStruct((1, t, 1, 4), jnp.float32)
    text = str(jax.make_jaxpr(jax.grad(lambda *a: jnp.sum(chunked()(*a, blocks=blocks)), (0, 1, 2)))(x, x, x))
    assert f"f32[{t},{t}]" not in text and "f32[8,512]" in text


def test_quantised_operands_have_no_gradient_in_a_kernel():
    q, k, v = inputs(64, 64, 64)
    scales = BlockScales(jnp.ones((1, 2, 1)), jnp.ones((1, 2, 1)), None, 64, 64)
    q, k, attend = q.astype(jnp.int8), k.astype(jnp.int8), block_sparse("tpu", True)
    with pytest.raises(NotImplementedError, match="a gradient through scales"):
        jax.grad(lambda v: jnp.sum(attend(q, k, v, scales=scales)))(v.astype(jnp.bfloat16))


def test_gradients_inside_of_shard_map():
    """Heads on two devices: what starts a loop counts as different on each, forward and backward."""
    arrays, blocks = inputs(12, 10, 4), a_list(12, 10, 4, 3, 2)
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    tokens, rows = PartitionSpec(None, None, "heads"), PartitionSpec(None, "heads")
    run = lambda q, k, v, i, c: chunked()(q, k, v, blocks=BlockList(i, c, 4, 3))  # noqa: E731
    split = jax.shard_map(run, mesh=mesh, in_specs=(tokens,) * 3 + (rows,) * 2, out_specs=tokens)
    both = [
        jax.jit(jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a, blocks.indices, blocks.counts))), (0, 1, 2)))(*arrays)
        for f in (split, run)
    ]
    for got, want in zip(*both, strict=True):
        assert largest_error(got, want) < 1e-6


# ---------------------------------------------------------------- what all kernels share, through the TPU's interpreter


@pytest.mark.parametrize("width", some([16, 64, 72, 128], 72))
def test_widths_are_filled_up_and_a_full_list_is_dense(width):
    q, k, v = inputs(70, 90, width)
    o, lse = jax.jit(lambda *a: block_sparse("tpu", True)(*a, with_lse=True))(q, k, v)
    want = ops.attend(q, k, v, with_lse=True)
    assert o.shape == q.shape and max(map(largest_error, (o, lse), want)) < 2e-6


def test_values_that_no_query_sees_may_be_infinite():
    q, k, v = inputs(64, 64, 64)
    ids = Segments(jnp.zeros((1, 64), jnp.int32), (jnp.arange(64)[None] == 3).astype(jnp.int32))
    v = v.at[:, 3].set(jnp.inf)
    o = jax.jit(lambda *a: block_sparse("tpu", True)(*a, ids))(q, k, v)
    assert largest_error(o, ops.attend(q, k, v, ids)) < 2e-6


@pytest.mark.parametrize("made_for", some([(64, 64), (128, 192), (64, 128)], (64, 128)))
@pytest.mark.parametrize("kernel", ["tpu", "blocked"])
def test_scales_of_larger_blocks_serve(kernel, made_for):
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.integers(-127, 128, (1, 150, 2, 72)), jnp.int8) for _ in range(2))
    v = jnp.asarray(rng.normal(size=(1, 150, 2, 72)), jnp.bfloat16)
    parts = [jnp.asarray(rng.uniform(0.005, 0.02, (1, 2, -(-150 // size))), jnp.float32) for size in made_for]
    scales, blocks = BlockScales(parts[0], parts[1], None, *made_for), a_list(150, 150, 64, 64, 2)
    o, lse = jax.jit(lambda *a: block_sparse(kernel, True)(*a, None, blocks, scales, with_lse=True))(q, k, v)
    want, want_lse = ops.attend(q, k, v, None, blocks, scales, with_lse=True)
    assert o.dtype == want.dtype == jnp.float32
    assert largest_error(o, want) < 1e-2 and largest_error(lse, want_lse) < 2e-6


# ---------------------------------------------------------------- what serves which target


def test_the_order_of_kernels():
    served = {what: kernels_for(what) for what in (CPU, TPU, HOPPER, AMPERE, BLACKWELL)}
    assert served == {
        CPU: ("blocked",), TPU: ("tpu",), HOPPER: ("mosaic", "triton"), AMPERE: ("triton",), BLACKWELL: ("triton",),
    }  # fmt: skip


F32 = inputs(8, 8, 4)
DECLINES = [
    (Target("gpu"), {}, {}, "a GPU of compute capability unknown; kernels are for 8.0 and later"),
    (Target("gpu", "T4", (7, 5)), {}, {}, "a GPU of compute capability 7.5"),
    (Target("neuron"), {}, {}, "the platform neuron; there is a kernel for NVIDIA GPUs, TPUs and CPUs"),
    (HOPPER, {}, {"width": 160}, "mosaic: heads of 160; kernels are for up to 128; triton: heads of 160"),
    (TPU, {}, {"scales": Scales(*(jnp.ones((1, 1, 1, 1)),) * 3)}, "tpu: scales by element; kernels take them by block"),
    (
        TPU,
        {},
        {
            "scales": BlockScales(jnp.ones((1, 2, 1)), jnp.ones((1, 2, 1)), None, 32, 64),
            "blocks": a_list(8, 8, 64, 64, 1),
        },
        "scales of blocks of 32 x 64, which are not some whole ones of 64 x 64",
    ),
    (TPU, {}, {"blocks": a_list(8, 8, 4, 4, 1)}, "tpu: a list of blocks of 4 x 4; it takes multiples of 64"),
    (CPU, {"kernel": "tpu"}, {}, "tpu: the platform cpu; it needs a TPU"),
    (HOPPER, {"kernel": "tpu"}, {}, "tpu: the platform gpu; it needs a TPU"),
]


@pytest.mark.parametrize("target, settings, call, reason", DECLINES, ids=[d[-1][:40] for d in DECLINES])
def test_what_is_declined(target, settings, call, reason):
    q, k, v = inputs(8, 8, call.get("width", 4))
    options = {name: call[name] for name in ("scales", "blocks") if name in call}
    with lowering_for(target), pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(lambda: block_sparse(**settings)(q, k, v, **options))


@pytest.mark.parametrize("name", KERNELS)
def test_a_package_that_is_missing_is_named(name, monkeypatch):
    def absent(path: str) -> Any:
        raise ImportError(f"No module named what {path} needs")

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(NotImplementedError, match=rf"pip install 'difax\[{KERNELS[name]}\]'"):
        block_sparse(name)(*F32)


def test_a_list_of_another_length_is_refused():
    with pytest.raises(ValueError, match="a block list of 3 rows for 1 blocks of queries"):
        block_sparse("tpu", True)(*inputs(8, 8, 4), blocks=every_block(192, 8, 64, 64))


@pytest.mark.parametrize("kernel, message", [("mosiac", r"'mosiac' \(did you mean mosaic\?\); allowed: auto, mosaic"),
                                             (3, "kernel=3; allowed: a text")])  # fmt: skip
def test_bad_settings(kernel, message):
    for make in (block_sparse, ATTENTIONS["block_sparse"]):
        with pytest.raises(ValueError, match=message):
            make(kernel)


def lowered(what: Target, dtype: str = "bfloat16") -> str:
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), dtype)
    known = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("tpu_custom_call", "mosaic_gpu_v2")]
    with lowering_for(what):
        program = jax.jit(block_sparse())  # a function of its own: what was traced is not traced again for a target
        platform = {"gpu": "cuda"}.get(what.platform, what.platform)
        return jax.export.export(program, platforms=[platform], disabled_checks=known)(x, x, x).mlir_module()


def test_what_is_lowered_is_the_targets_and_not_the_hosts():
    """On a host with a CPU alone: the TPU's kernel is in the program for a TPU, loops are in the one for a CPU."""
    assert "tpu_custom_call" in lowered(TPU) and "custom_call" not in lowered(CPU)


def test_what_is_lowered_for_hopper_is_mosaic():
    if importlib.util.find_spec("difax.accel.kernels.mosaic_attention") is None:
        pytest.skip("needs difax.accel.kernels.mosaic_attention")
    assert "mosaic_gpu" in lowered(HOPPER)


# ---------------------------------------------------------------- the choice, and what can be read of it


def call(chosen: Any, t: int, s: int, dtype: str = "float32", segments: Any = None) -> Any:
    return jax.eval_shape(
        lambda *a: chosen.apply(*a, segments, Where("", "attn", 0, 1), None, ())[0], *inputs(t, s, 64, 0, dtype)
    )


def words(t: int, s: int, dtype: str = "float32") -> str:
    return f"q [1, {t}, 2, 64] {dtype}, S {s}"


def test_one_jitted_function_is_traced_for_each_target():
    seen = []

    @jax.jit
    def function(x):
        seen.append(target().platform)
        return x

    for what in (CPU, TPU, CPU, TPU):
        with lowering_for(what):
            function(jnp.ones(3))
    assert seen == ["cpu", "tpu"]


@pytest.mark.parametrize(
    "platform, said, want", [("cuda", "9.0", (9, 0)), ("rocm", "gfx942", (0, 0)), ("tpu", None, (0, 0))]
)
def test_a_device_is_a_target(platform, said, want):
    device = types.SimpleNamespace(platform=platform, device_kind="kind", compute_capability=said)
    assert target_of(device) == Target("gpu" if platform == "cuda" else platform, "kind", want)


def test_what_was_chosen_can_be_read_for_each_call_and_target():
    chosen = attention("window,block_sparse", {"window": {"radius": 1, "full": ()}})
    assert chosen.chosen() == {}
    with lowering_for(TPU):
        call(chosen, 128, 128)
        assert chosen.chosen() == {words(128, 128): "window"}
    served = attention("cudnn,block_sparse,chunked")
    with lowering_for(TPU):
        call(served, 128, 64, "bfloat16")
        call(served, 128, 64, "float16")
    call(served, 128, 64)
    assert served.chosen() == {words(128, 64): "block_sparse (blocked)"}
    with lowering_for(TPU):
        assert served.chosen() == {
            words(128, 64, "bfloat16"): "block_sparse (tpu)",
            words(128, 64, "float16"): "chunked",
        }


def test_attend_auto():
    """The first of the target's that takes the call; what it is stands in `chosen`."""
    assert set(BEST) == {"cpu", "gpu", "tpu"} and all(set(best) <= set(ATTENTIONS) for best in BEST.values())
    auto = attention("auto")
    for what in (CPU, TPU):
        with lowering_for(what):
            call(auto, 128, 128)
            assert auto.chosen() == {words(128, 128): "chunked"}
    with lowering_for(Target("gpu", "T4", (7, 5))):
        call(auto, 128, 128)  # float32, which cuDNN declines, on a GPU that no kernel is for
        assert auto.chosen() == {words(128, 128): "chunked"}
    with lowering_for(Target("neuron")), pytest.raises(ValueError, match="'neuron'; allowed: gpu, tpu, cpu"):
        call(auto, 128, 128)
