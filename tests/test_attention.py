"""One row per attention: its formula in float64, log-sum-exp, segments, gradients, what it declines; and the choice."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from difax.accel.attention import ATTENTIONS, attention, first_of
from difax.accel.attention.block_sparse import block_sparse
from difax.accel.attention.chunked import chunked
from difax.accel.attention.cudnn import cudnn
from difax.accel.attention.window import window
from difax.accel.attention.xla import xla
from difax.accel.solvers import SOLVERS
from difax.core import process as P
from difax.core.contracts import Attention, AttentionSpec, BlockList, Scales, Segments, Where
from difax.core.grids import GRIDS, make_times
from difax.core.guidance import unguided
from difax.core.noise import sample_keys
from difax.core.sample import initial_noise, make_rows, make_sampler
from difax.core.target import Target, lowering_for
from difax.core.trunk import forward, stateless
from tests.toys import tiny_dit

B, H, K = 2, 2, 4
BACKENDS = {"xla": xla, "chunked": chunked, "cudnn": cudnn, "window": window, "block_sparse": block_sparse}
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}


class Case(NamedTuple):
    """One backend with its settings, the lengths (queries, keys) that it is tried on, and which pairs attend."""

    name: str
    settings: dict[str, Any]
    lengths: list[tuple[int, int]]

    def keep(self, t: int, s: int) -> np.ndarray:
        if self.name != "window":
            return np.ones((t, s), bool)
        radius, prefix = self.settings["radius"], self.settings.get("prefix", 0)
        return np.array([[abs(i - j) <= radius or i < prefix or j < prefix for j in range(s)] for i in range(t)])

    def function(self):
        return BACKENDS[self.name](**self.settings)


CASES = [
    Case("xla", {}, [(5, 7)]),
    Case("chunked", {"block_q": 4, "block_k": 3}, [(8, 6), (7, 10), (9, 2), (3, 7), (4, 3)]),
    Case("chunked", {"block_q": 4, "block_k": 3, "heads": 9}, [(7, 10)]),
    Case("chunked", {"block_q": 4, "block_k": 3, "heads": 3}, [(7, 10)]),
    Case("window", {"radius": 2, "block": 4}, [(13, 13), (3, 3)]),
    Case("window", {"radius": 1, "prefix": 3, "block": 2}, [(11, 11)]),
    Case("window", {"radius": 2, "prefix": 9, "block": 4}, [(11, 11), (7, 7)]),
    Case("window", {"radius": 0, "block": 5}, [(8, 8)]),
    Case("block_sparse", {}, [(7, 10)]),
]
ids = [f"{c.name}-{'-'.join(map(str, c.settings.values()))}" for c in CASES]
cases = pytest.mark.parametrize("case", CASES, ids=ids)


def test_every_attention_is_tried():
    assert [*BACKENDS, "auto"] == list(ATTENTIONS)  # auto is a choice among the others: tests/test_block_sparse.py
    assert {c.name for c in CASES} | {"cudnn"} == set(BACKENDS)


def inputs(t: int, s: int, dtype="float32", seed=0):
    rng = np.random.default_rng([seed, t, s])
    return tuple(jnp.asarray(rng.normal(size=(B, n, H, K)), dtype) for n in (t, s, s))


def some_segments(t: int, s: int) -> Segments:
    """Two samples a row; one query that has no key in sight, and where T = S the same ids on both sides."""
    if t == s:
        ids = np.stack([np.arange(t) >= t // 3, np.arange(t) >= 1]).astype(np.int32)
        return Segments(jnp.asarray(ids), jnp.asarray(ids))
    q = np.stack([np.arange(t) % 2, np.arange(t) % 3])  # no key has the id 2
    return Segments(jnp.asarray(q, jnp.int32), jnp.asarray(np.arange(2 * s).reshape(2, s) % 2, jnp.int32))


def oracle(q: Any, k: Any, v: Any, keep: np.ndarray, segments: Segments | None = None):
    """softmax over the pairs that attend and its log-sum-exp, in float64; mean of v where a query has no key.

    Args:
      keep: [T, S] or [B, H, T, S].
    """
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    x = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(K)
    keep = np.broadcast_to(keep, x.shape)
    if segments is not None:
        equal = np.asarray(segments.q)[:, None, :, None] == np.asarray(segments.k)[:, None, None, :]
        keep = keep & equal
    some = np.asarray(keep.any(-1, keepdims=True))
    p = np.where(keep | ~some, np.exp(np.where(some, x, 0)), 0)
    total = p.sum(-1)
    o = np.einsum("bhts,bshk->bthk", p / total[..., None], v)
    return o, np.where(some[..., 0], np.log(total), -1e30)


def masked(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """o and log-sum-exp by JAX's own softmax of all logits, to be differentiated."""
    x = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(K)
    x = jnp.where(mask, x, -1e30)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(x), v), jax.nn.logsumexp(x, -1)


def compiled(function: Any, *arguments: Any) -> Any:
    return jax.jit(function).lower(*arguments).compile()(*arguments)


def compare(what: str, got: Any, want: Any, tolerance: float) -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    print(f"{what}: largest error {np.abs(got - want).max():.1e}")
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- every backend


@pytest.mark.parametrize("with_segments", [False, True], ids=["plain", "segments"])
@cases
def test_formula(case, with_segments):
    function = case.function()
    for t, s in case.lengths:
        q, k, v = inputs(t, s)
        segments = some_segments(t, s) if with_segments else None
        o, lse = compiled(lambda *a: function(*a, with_lse=True), q, k, v, segments)
        want_o, want_lse = oracle(q, k, v, case.keep(t, s), segments)
        assert o.shape == (B, t, H, K) and o.dtype == jnp.float32
        assert lse.shape == (B, H, t) and lse.dtype == jnp.float32
        compare(f"{case.name} {t} x {s} o", o, want_o, TOLERANCE["float32"])
        compare(f"{case.name} {t} x {s} lse", lse, want_lse, TOLERANCE["float32"])


@cases
def test_bfloat16(case):
    t, s = case.lengths[0]
    q, k, v = inputs(t, s, "bfloat16")
    o, lse = compiled(lambda *a: case.function()(*a, with_lse=True), q, k, v)
    want_o, want_lse = oracle(q, k, v, case.keep(t, s))
    assert o.dtype == jnp.bfloat16 and lse.dtype == jnp.float32  # the sum is not rounded
    compare(f"{case.name} o", o, want_o, TOLERANCE["bfloat16"])
    compare(f"{case.name} lse", lse, want_lse, 1e-5)


@pytest.mark.parametrize("case", [CASES[i] for i in (1, 3, 5)], ids=[ids[i] for i in (1, 3, 5)])
def test_scales_are_those_of_the_reference(case):
    t, s = case.lengths[0] if case.name == "window" else (7, 10)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.integers(-9, 9, (B, n, H, K)), jnp.int8) for n in (t, s, s))
    q_scale, k_scale, v_scale = (
        jnp.asarray(rng.uniform(0.1, 0.3, n), jnp.float32) for n in ((B, t, H, 1), (1, 1, H, 1), K)
    )
    scales = Scales(q_scale, k_scale, v_scale.reshape(1, 1, 1, K))
    o = compiled(lambda q, k, v, scales: case.function()(q, k, v, scales=scales), q, k, v, scales)
    q, k, v = (np.asarray(a) * np.asarray(b) for a, b in zip((q, k, v), scales, strict=True))
    assert o.dtype == jnp.float32
    compare(case.name, o, oracle(q, k, v, case.keep(t, s))[0], TOLERANCE["float32"])


@pytest.mark.parametrize("with_segments", [False, True], ids=["plain", "segments"])
@pytest.mark.parametrize("case", [CASES[i] for i in (1, 2, 5)], ids=[ids[i] for i in (1, 2, 5)])
def test_gradients_are_those_of_masked_softmax(case, with_segments):
    """Of o and of the log-sum-exp, against the reference's logits written out with a mask."""
    t, s = case.lengths[-1] if case.name == "window" else (7, 10)
    arguments, keep = inputs(t, s), case.keep(t, s)
    segments = some_segments(t, t) if with_segments and t == s else None
    if with_segments and t != s:
        segments = Segments(
            jnp.zeros((B, t), jnp.int32), jnp.asarray(np.arange(B * s).reshape(B, s) % 3 > 1, jnp.int32)
        )
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(B, t, H, K)), jnp.float32)

    mask = jnp.asarray(keep)[None, None]
    if segments is not None:
        mask = mask & (segments.q[:, None, :, None] == segments.k[:, None, None, :])

    def value(function):
        def scalar(*arguments):
            o, lse = function(*arguments)
            return jnp.sum(jnp.sin(o) * weight) + jnp.sum(lse**2)

        return jax.grad(scalar, (0, 1, 2))

    function = case.function()
    got = compiled(value(lambda *a: function(*a, segments, with_lse=True)), *arguments)
    want = compiled(value(lambda q, k, v: masked(q, k, v, mask)), *arguments)
    for name, a, b in zip("qkv", got, want, strict=True):
        assert np.abs(b).max() > 0.1
        compare(f"{case.name} d{name}", a, b, 2e-5)


DECLINES = [
    ("window", {"radius": 1}, {"keys": 9}, "8 queries of 9 keys"),
    ("window", {"radius": 1}, {"blocks": (4, 4)}, "a list of blocks"),
    ("cudnn", {}, {"dtype": "float32"}, "float32; it computes in one of bfloat16, float16"),
    ("cudnn", {}, {"segments": True}, "segments"),
    ("cudnn", {}, {"blocks": (4, 4)}, "a list of blocks"),
    ("cudnn", {}, {"scales": True}, "scales"),
    ("cudnn", {}, {"with_lse": True}, "a log-sum-exp that is not rounded"),
    ("cudnn", {"rounded_lse": True}, {"with_lse": True}, "the platform cpu"),
    ("cudnn", {}, {}, "the platform cpu; it needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("name, settings, call, reason", DECLINES, ids=[f"{d[0]}-{'-'.join(d[2])}" for d in DECLINES])
def test_what_is_declined(name, settings, call, reason):
    t, s = 8, call.get("keys", 8)
    q, k, v = inputs(t, s, call.get("dtype", "bfloat16"))
    options = {"with_lse": call.get("with_lse", False)}
    if "segments" in call:
        options["segments"] = some_segments(t, s)
    if "scales" in call:
        options["scales"] = Scales(*(jnp.ones((1, 1, 1, 1)),) * 3)
    if "blocks" in call:
        options["blocks"] = BlockList(
            jnp.zeros((1, 1, 2, 1), jnp.int32), jnp.ones((1, 1, 2), jnp.int32), *call["blocks"]
        )
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(lambda: BACKENDS[name](**settings)(q, k, v, **options))


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("chunked", {"block_q": 0}, "block_q=0; allowed: 1 or more"),
        ("chunked", {"block_k": -1}, "block_k=-1; allowed: 1 or more"),
        ("chunked", {"heads": 0}, "heads=0; allowed: 1 or more"),
        ("window", {"radius": -1}, "radius=-1; allowed: 0 or more"),
        ("window", {"radius": 1, "prefix": -1}, "prefix=-1; allowed: 0 or more"),
        ("window", {"radius": 1, "block": 0}, "block=0; allowed: 1 or more"),
    ],
)
def test_bad_settings(name, settings, message):
    with pytest.raises(ValueError, match=message):
        ATTENTIONS[name](**settings)


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("seed", range(3))
def test_order_of_keys_does_not_matter(seed):
    q, k, v = inputs(6, 11, seed=seed)
    order = np.random.default_rng(seed).permutation(11)
    function = jax.jit(chunked(4, 4))
    compare("permuted", function(q, k[:, order], v[:, order]), function(q, k, v), TOLERANCE["float32"])


@pytest.mark.parametrize("radius, prefix, block", [(12, 0, 4), (12, 5, 4), (40, 0, 64), (0, 13, 4)])
def test_a_window_that_holds_everything_is_plain_attention(radius, prefix, block):
    q, k, v = inputs(13, 13)
    o, lse = compiled(lambda *a: window(radius, prefix, block)(*a, with_lse=True), q, k, v)
    want_o, want_lse = xla()(q, k, v, with_lse=True)
    compare("o", o, want_o, TOLERANCE["float32"])
    compare("lse", lse, want_lse, TOLERANCE["float32"])


@pytest.mark.parametrize("at", [1, 5, 8])
def test_halves_of_the_keys_merge_by_their_log_sum_exp(at):
    """o = sum_i exp(lse_i - lse) o_i with lse = log sum_i exp(lse_i): what ring attention relies on."""
    q, k, v = inputs(6, 11)
    function = jax.jit(lambda *a: chunked(4, 4)(*a, with_lse=True))
    (o_1, lse_1), (o_2, lse_2) = function(q, k[:, :at], v[:, :at]), function(q, k[:, at:], v[:, at:])
    lse = np.logaddexp(lse_1, lse_2)
    weigh = lambda a: np.swapaxes(np.exp(a - lse), 1, 2)[..., None]  # noqa: E731
    want_o, want_lse = function(q, k, v)
    compare("merged lse", lse, want_lse, TOLERANCE["float32"])
    compare("merged o", weigh(lse_1) * o_1 + weigh(lse_2) * o_2, want_o, TOLERANCE["float32"])


def largest(jaxpr: Any) -> int:
    """Elements of the largest intermediate, inside of loops too."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [int(np.prod(getattr(out.aval, "shape", ()))) for out in equation.outvars]
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda a: hasattr(a, "eqns") or hasattr(a, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                sizes.append(largest(inner))
    return max(sizes)


@pytest.mark.parametrize(
    "function, gradient",
    [(chunked(8, 8), False), (chunked(8, 8), True), (window(4, 2, 8), False), (window(4, 2, 8), True)],
)
def test_logits_are_never_whole(function, gradient):
    t = 256
    q = jax.ShapeDtypeStruct((1, t, 1, 4), jnp.float32)

    def run(function):
        forward = lambda *a: jnp.sum(function(*a))  # noqa: E731
        return jax.make_jaxpr(jax.grad(forward, (0, 1, 2)) if gradient else forward)(q, q, q).jaxpr

    print(f"largest: {largest(run(function))} of {t * t}")
    assert largest(run(xla())) == t * t
    assert largest(run(function)) <= t * t // 16


def test_inside_of_shard_map():
    """Heads on four devices: constants that start a loop must count as different on every device."""
    q, k, v = (jnp.concatenate([a, a + 1], 2) for a in inputs(7, 10))
    mesh = jax.make_mesh((4,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    spec = PartitionSpec(None, None, "heads")
    split = jax.shard_map(chunked(4, 3), mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    compare("split", compiled(split, q, k, v), xla()(q, k, v), TOLERANCE["float32"])


# ---------------------------------------------------------------- lists of blocks


@pytest.mark.parametrize("heads", [None, 9], ids=["by-head", "together"])
@pytest.mark.parametrize("shape", [(B, H), (1, H), (B, 1), (1, 1)])
def test_listed_blocks_alone_are_computed(shape, heads):
    """Blocks of 4 x 3 over 10 queries and 11 keys. Keys that no row lists are NaN: one look would spread it."""
    rng = np.random.default_rng(sum(shape))
    n_q, n = 3, 3
    indices = np.stack([rng.permutation([0, 2, 3])[:n] for _ in range(shape[0] * shape[1] * n_q)])
    indices = indices.reshape(*shape, n_q, n)  # block 1 is in no list, block 3 is short
    counts = rng.integers(1, n + 1, (*shape, n_q))
    keep = np.zeros((*shape, n_q, 4), bool)
    for at in np.ndindex(*shape, n_q):
        keep[at][indices[at][: counts[at]]] = True
    keep = keep.repeat(4, 2).repeat(3, 3)[..., :10, :11]
    q, k, v = inputs(10, 11)
    want_o, want_lse = oracle(q, k, v, keep)
    k, v = (a.at[:, 3:6].set(jnp.nan) for a in (k, v))
    blocks = BlockList(jnp.asarray(indices, jnp.int32), jnp.asarray(counts, jnp.int32), 4, 3)
    function = chunked(4, 3, heads)
    o, lse = compiled(lambda *a: function(*a[:3], blocks=a[3], with_lse=True), q, k, v, blocks)
    compare("o", o, want_o, TOLERANCE["float32"])
    compare("lse", lse, want_lse, TOLERANCE["float32"])


def test_blocks_beyond_the_count_are_not_computed():
    """Every row lists blocks 0 and 1 but counts one of them."""
    q, k, v = inputs(8, 6)
    blocks = BlockList(jnp.tile(jnp.arange(2), (1, 1, 2, 1)), jnp.ones((1, 1, 2), jnp.int32), 4, 3)
    want, _ = oracle(q, k, v, np.arange(6) < 3)
    k, v = (a.at[:, 3:].set(jnp.nan) for a in (k, v))
    compare("first", compiled(lambda *a: chunked(4, 3)(*a, blocks=blocks), q, k, v), want, TOLERANCE["float32"])


def test_gradients_through_a_list_of_blocks():
    q, k, v = inputs(8, 6)
    blocks = BlockList(jnp.asarray([[[[0, 1], [1, 0]]]]), jnp.asarray([[[2, 1]]]), 4, 3)
    keep = jnp.ones((8, 6), bool).at[4:, :3].set(False)[None, None]

    def gradient(function):
        return compiled(jax.grad(lambda q, k, v: jnp.sum(jnp.sin(function(q, k, v))), (0, 1, 2)), q, k, v)

    got = gradient(lambda q, k, v: chunked(4, 3)(q, k, v, blocks=blocks))
    want = gradient(lambda q, k, v: masked(q, k, v, keep)[0])
    for name, a, b in zip("qkv", got, want, strict=True):
        compare(f"d{name}", a, b, 2e-5)


def test_a_list_of_another_length_is_refused():
    q, k, v = inputs(8, 6)
    blocks = BlockList(jnp.zeros((1, 1, 3, 1), jnp.int32), jnp.ones((1, 1, 3), jnp.int32), 4, 3)
    with pytest.raises(ValueError, match="a block list of 3 rows for 2 blocks of queries"):
        chunked(4, 3)(q, k, v, blocks=blocks)


# ---------------------------------------------------------------- cuDNN, without the device


def test_cudnn_hands_over_what_jax_asks_for(monkeypatch):
    """On a machine that says it has a GPU, with jax's own other implementation in the place of the kernel."""
    q, k, v = inputs(8, 6, "bfloat16")
    real = jax.nn.dot_product_attention
    asked = []

    def kernel(*arguments, implementation, **options):
        asked.append(implementation)
        return real(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    want_o, want_lse = oracle(q, k, v, np.ones((8, 6), bool))
    with lowering_for(Target("gpu")):
        o = cudnn()(q, k, v)
        o_again, lse = cudnn(rounded_lse=True)(q, k, v, with_lse=True)
    assert asked == ["cudnn", "cudnn"] and o.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    np.testing.assert_array_equal(o, o_again)
    compare("o", o, want_o, TOLERANCE["bfloat16"])
    compare("lse", lse, want_lse, TOLERANCE["bfloat16"])


def test_cudnn_declines_an_installation_without_the_library():
    with lowering_for(Target("gpu")), pytest.raises(NotImplementedError, match="this installation: cuDNN is not dete"):
        cudnn()(*inputs(8, 6, "bfloat16"))


# ---------------------------------------------------------------- the first that can


def spec_of(t: int, s: int, dtype="float32", segments=False) -> AttentionSpec:
    q, k, v = inputs(t, s, dtype)
    spec = AttentionSpec(q, k, v, some_segments(t, s) if segments else None)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), spec)


def call(chosen: Attention, t: int, s: int, dtype="float32") -> Any:
    state = chosen.init(spec_of(t, s, dtype))
    return chosen.apply(*inputs(t, s, dtype), None, Where("blocks", "attn", 0, 1), None, state)


def counting(allow: Any) -> tuple[Attention, list[Any]]:
    """An attention that remembers how often it was applied, takes the shapes that `allow` says, and logs its traces."""
    traces: list[Any] = []

    def apply(q, k, v, segments, where, row, state):
        traces.append(q.shape)
        if not allow(q.shape[1], k.shape[1]):
            raise NotImplementedError("not these lengths")
        return xla()(q, k, v, segments), state + 1

    return Attention(lambda spec: jnp.zeros((), jnp.int32), apply), traces


def test_the_first_that_can_is_chosen_for_each_shape():
    both = attention(["window", "chunked"], {"window": {"radius": 1}, "chunked": {"block_k": 4}})
    one = attention("window", {"window": {"radius": 1}})
    np.testing.assert_array_equal(call(both, 9, 9)[0], call(one, 9, 9)[0])
    q, k, v = inputs(9, 9)
    assert np.abs(call(both, 9, 9)[0] - xla()(q, k, v)).max() > 0.1
    q, k, v = inputs(9, 6)
    compare("cross", call(both, 9, 6)[0], xla()(q, k, v), TOLERANCE["float32"])


def test_a_window_leaves_cross_attention_whole():
    """Keys that are others than the queries, in number or by the name of the branch, are all attended to."""
    narrow = attention("window", {"window": {"radius": 1}})
    named = attention("window", {"window": {"radius": 1, "full": ("text",)}})
    for branch, t, s, alone, whole in [
        ("attn", 9, 9, narrow, False),
        ("cross", 9, 9, narrow, True),
        ("attn", 9, 6, narrow, True),
        ("attn", 5, 11, narrow, True),
        ("text", 9, 9, named, True),
        ("cross", 9, 9, named, False),
    ]:
        q, k, v = inputs(t, s)
        ids = Segments(jnp.ones((B, t), jnp.int32), (jnp.arange(s)[None] % 3 > 0) * jnp.ones((B, 1), jnp.int32))
        o, _ = alone.apply(q, k, v, ids, Where("", branch, 0, 1), None, ())
        error = np.abs(o - xla()(q, k, v, ids)).max()
        assert (error < 1e-5) == whole, (branch, t, s, error)


def test_state_is_that_of_the_chosen_one_and_the_decision_is_made_once():
    square, traces = counting(lambda t, s: t == s)
    chosen = first_of({"square": square, "xla": ATTENTIONS["xla"]()})
    assert chosen.init(spec_of(5, 7)) == ()
    assert chosen.init(spec_of(5, 5)).shape == ()
    assert len(traces) == 2  # tried on shapes, once for each
    o, state = call(chosen, 5, 5)
    assert state == 1 and len(traces) == 3  # the call itself
    call(chosen, 5, 5)
    assert len(traces) == 4
    assert call(chosen, 5, 7)[1] == () and len(traces) == 4


def test_a_choice_that_reads_the_row_is_tried_with_one():
    reads = Attention(
        lambda spec: (),
        lambda q, k, v, segments, where, row, state: (
            jnp.where(row.fresh | (row.i % 2 == 0), q, q + where.layer),
            state,
        ),
    )
    assert first_of({"reads": reads}).init(spec_of(5, 5)) == ()


def test_a_refusal_in_init_counts():
    def init(spec):
        raise NotImplementedError("no room")

    never = Attention(init, lambda *a: pytest.fail("applied"))
    chosen = first_of({"never": never, "xla": ATTENTIONS["xla"]()})
    assert call(chosen, 5, 5)[1] == ()
    with pytest.raises(ValueError, match=r"no attention takes this call .*never: no room$"):
        first_of({"never": never}).init(spec_of(5, 5))


def test_when_all_decline_every_reason_is_told():
    chosen = first_of({"cudnn": ATTENTIONS["cudnn"](), "window": stateless(window(radius=1))})
    with pytest.raises(ValueError) as error:
        chosen.init(spec_of(5, 7))
    assert str(error.value) == (
        f"no attention takes this call (q {[B, 5, H, K]} float32, S 7): "
        "cudnn: float32; it computes in one of bfloat16, float16; "
        "window: 5 queries of 7 keys; a window needs as many of both"
    )
    with pytest.raises(ValueError, match=r"S 7\): cudnn: the platform cpu; it needs an NVIDIA GPU$"):
        call(attention("cudnn"), 5, 7, "bfloat16")
    with pytest.raises(ValueError, match=r"S 7, segments\): cudnn: segments$"):
        attention("cudnn").init(spec_of(5, 7, segments=True))


def test_other_errors_are_not_refusals():
    def broken(q, k, v, segments):
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        first_of({"broken": stateless(broken), "xla": ATTENTIONS["xla"]()}).init(spec_of(5, 5))


@pytest.mark.parametrize(
    "names, settings, message",
    [
        ("chunkd", {}, r"unknown attention 'chunkd' \(did you mean chunked\?\); allowed: xla, chunked, cudnn, window"),
        ("xla,xla", {}, "attention names xla, xla; allowed: each once"),
        ([], {}, "attention names none; allowed: each once"),
        ("", {}, "unknown attention ''; allowed: xla"),
        ("xla", {"chunked": {}}, "unknown attention with settings 'chunked'; allowed: xla"),
        (
            "chunked",
            {"chunked": {"blocks_q": 4}},
            r"unknown key of attention chunked 'blocks_q' \(did you mean block_q",
        ),
        ("window", {"window": {"radius": "wide"}}, "attention window: radius='wide'; allowed: an integer"),
        ("window", {"window": {"radius": 1.5}}, "attention window: radius=1.5; allowed: an integer"),
        ("window", {"window": 3}, "attention settings=.*allowed: a mapping"),
        (3, {}, "attention names=3; allowed: a text, or a list of texts"),
        ("window", {"window": {"radius": -2}}, "radius=-2"),
    ],
)
def test_names_and_settings(names, settings, message):
    with pytest.raises(ValueError, match=message):
        attention(names, settings)


def test_no_choices():
    with pytest.raises(ValueError, match="no choices"):
        first_of({})


# ---------------------------------------------------------------- in the sampler


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sampler(dtype):
    """DDIM on a DiT of 16 tokens: chunked is plain attention, a window is not; no shape is traced twice."""
    model, params = tiny_dit(size=8, dtype=dtype)
    process, solver = P.vp_linear(), SOLVERS["ddim"]()
    rows = make_rows(solver, unguided(), process, make_times(GRIDS["leading"](), process, 3))
    keys, labels = sample_keys(0, 2), jnp.asarray([3, 0], jnp.int32)
    traces = [0]

    def embed(*arguments):
        traces[0] += 1
        return model.embed(*arguments)

    def arguments(scale=1.0):
        return params, initial_noise(process, keys, model.input_shape), keys, labels, rows, scale

    def sampler(names, settings):
        counted = model._replace(embed=embed)
        return make_sampler(counted, process, "eps", solver, attention=attention(names, settings))

    def sample(names, settings):
        return sampler(names, settings).lower(*arguments()).compile()(*arguments())[0]

    plain, narrow = sample("xla", {}), sample("window,xla", {"window": {"radius": 2, "block": 4}})
    blocks = sampler("cudnn,chunked", {"chunked": {"block_q": 6, "block_k": 5}})
    image, before = blocks(*arguments())[0], traces[0]
    np.testing.assert_array_equal(blocks(*arguments(2.0))[0], image)  # there is no guidance to scale
    assert traces[0] == before > 0
    error, change = (float(jnp.abs(a - plain).max() / jnp.abs(plain).max()) for a in (image, narrow))
    print(f"{dtype}: chunked {error:.1e}, window {change:.1e}")
    assert error < (1e-5 if dtype == "float32" else 3e-2) and change > 1e-2


def test_training_through_chunked_attention():
    """Gradients of the whole network with respect to every parameter."""
    model, params = tiny_dit(size=8, depth=1)
    x, time_, labels = jnp.ones((1, *model.input_shape)), jnp.full((1,), 500.0), jnp.zeros((1,), jnp.int32)

    def gradient(how):
        loss = lambda p: jnp.mean(forward(model, p, x, time_, labels, how) ** 2)  # noqa: E731
        return compiled(jax.grad(loss), params)

    got = gradient(attention("chunked", {"chunked": {"block_q": 6, "block_k": 5}}))
    want = gradient(None)
    scale = max(np.abs(a).max() for a in jax.tree.leaves(want))
    worst = max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    print(f"largest error {worst / scale:.1e} of the largest gradient")
    assert worst < 1e-5 * scale
