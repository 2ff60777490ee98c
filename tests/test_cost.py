"""Operations counted from a model's parts and a run's trace, against a hand count and against the unrolled program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax.accel.caches import CACHES
from difax.accel.quant import QUANTS
from difax.accel.solvers import SOLVERS
from difax.core.contracts import Trace
from difax.core.cost import count, model_bytes, model_cost, run_bytes, run_cost
from difax.core.grids import GRIDS, make_times
from difax.core.guidance import cfg, interval, unguided
from difax.core.noise import sample_keys
from difax.core.process import flow
from difax.core.qtensor import quantize_params
from difax.core.sample import initial_noise, make_rows, make_sampler
from difax.core.trunk import forward
from difax.models.dit import dit
from tests.families import some


def shapes(model):
    return jax.eval_shape(model.init, jax.random.key(0))


def hand_count(depth: int, width: int, tokens: int, patch: int, channels: int) -> float:
    """Multiply-adds of a DiT on one sample, from the shapes of the paper."""
    block = tokens * 12 * width**2 + 2 * tokens**2 * width + 6 * width**2
    features = patch * patch * channels
    ends = tokens * features * width + 256 * width + width**2 + 2 * width**2 + tokens * 2 * features * width
    return depth * block + ends


@pytest.mark.parametrize(
    "variant, depth, width, patch, published",
    [("XL/2", 28, 1152, 2, 118.64), ("B/4", 12, 768, 4, 5.56), ("S/8", 12, 384, 8, 0.36)],
)
def test_hand_count_and_the_papers_table(variant, depth, width, patch, published):
    model = dit(variant)
    gmacs = model_cost(model, shapes(model)).evaluation / 2e9
    assert gmacs == pytest.approx(hand_count(depth, width, (32 // patch) ** 2, patch, 4) / 1e9, rel=1e-12)
    assert gmacs == pytest.approx(published, rel=0.03)  # Gflops of table 4, which are multiply-adds


TINY = dict(depth=2, width=32, heads=2, patch=4, size=8, channels=2, classes=5)
RUNS = {
    "plain": (unguided(), CACHES["fora"](1)),
    "guided": (cfg(), CACHES["fora"](1)),
    "interval": (interval(0.3, 0.7), CACHES["fora"](1)),
    "cached": (cfg(), CACHES["fora"](3)),
}


@pytest.mark.parametrize("name", some(RUNS, "interval", "cached"))
def test_trace_counts_what_an_unrolled_run_computes(name):
    """The trace's cost equals the sum, evaluation by evaluation, over whole networks or their ends alone."""
    guide, cache = RUNS[name]
    model = dit(**TINY)
    params = jax.jit(model.init)(jax.random.key(0))
    process, solver = flow(), SOLVERS["ddim"]()
    rows = make_rows(solver, guide, process, make_times(GRIDS["uniform"](), process, 7), cache, model.stages)
    keys = sample_keys(0, 2)
    x = initial_noise(process, keys, model.input_shape)
    sampler = make_sampler(model, process, "velocity", solver, guide, cache)
    _, trace = sampler(params, x, keys, jnp.arange(2), rows, 2.0)
    one = jnp.zeros((1, *model.input_shape))
    args = (params, one, jnp.zeros(1), jnp.zeros(1, int))
    whole = count(lambda *a: forward(model, *a), *args)
    cost = model_cost(model, params)
    assert cost.evaluation == whole
    skipped = whole - sum(cost.depth[s] * sum(b) for s, b in cost.branches.items())
    guided = rows.guided if name != "plain" else np.zeros(7, bool)
    full = np.arange(7) % 3 == 0 if name == "cached" else np.ones(7, bool)
    expected = sum((2 if g else 1) * (whole if f else skipped) for g, f in zip(guided, full, strict=True))
    assert run_cost(cost, trace) == pytest.approx(expected, rel=1e-6)
    assert run_cost(cost, trace) > 0


def test_trace_of_nothing_costs_the_ends():
    model = dit(**TINY)
    cost = model_cost(model, shapes(model))
    trace = Trace({"blocks": jnp.zeros((3, 2, 2, 1))}, {"blocks": jnp.ones((3, 2, 1))}, jnp.ones(3), {})
    assert run_cost(cost, trace) == 3 * (cost.ends + 2 * cost.mods["blocks"])


def moved_by_hand(width: int, tokens: int, heads: int) -> tuple[float, float]:
    """Bytes of float32 that the products of DiT's attention and MLP read and write for one sample, weights not."""
    rows = tokens * width
    attn = (rows + 3 * rows) + (2 * rows + heads * tokens**2) + (heads * tokens**2 + 2 * rows) + 2 * rows
    return 4.0 * attn, 4.0 * 2 * (rows + 4 * rows)


def test_bytes_by_hand():
    model = dit("B/2")
    moved = model_bytes(model, shapes(model))
    parameters = sum(a.size for a in jax.tree.leaves(shapes(model)))
    assert moved.weights.evaluation == 4 * parameters
    assert moved.weights.mods["blocks"] == 4 * (768 * 6 * 768 + 6 * 768)
    assert moved.activations.branches["blocks"] == moved_by_hand(768, 256, 12)


def test_quantised_weights_count_as_they_are_stored():
    model = dit(**TINY | {"width": 64})
    params = jax.jit(model.init)(jax.random.key(0))
    plain = model_bytes(model, params).weights
    for kind, share in (("int8_weight", 1 / 4), ("int4_weight", 1 / 8)):
        quantised = model_bytes(model, quantize_params(params, QUANTS[kind](model))).weights
        for a, b in zip(plain.branches["blocks"], quantised.branches["blocks"], strict=True):
            assert share < b / a < share + 0.1  # scales and biases beside


def test_bytes_of_a_run():
    """Weights once for both halves of guidance, and only where some half computes them; activations for each."""
    model = dit(**TINY)
    cost = model_bytes(model, shapes(model))
    weights, moved = cost
    computed = np.zeros((3, 2, 2, 2))
    computed[0], computed[1, 0, 0, 0] = 1, 0.5
    trace = Trace({"blocks": computed}, {"blocks": np.ones((3, 2, 2))}, np.asarray([2, 2, 2]), {})
    attn, mlp = weights.branches["blocks"]
    read = 3 * (weights.ends + 2 * weights.mods["blocks"]) + 2 * (attn + mlp) + attn
    assert run_bytes(cost, trace, 5) == pytest.approx(read + 5 * run_cost(moved, trace), rel=1e-12)
    apart = 6 * (weights.ends + 2 * weights.mods["blocks"]) + 4 * (attn + mlp) + attn
    assert run_bytes(cost, trace, 5, together=False) == pytest.approx(apart + 5 * run_cost(moved, trace), rel=1e-12)


def test_count_of_known_programs():
    a, b = jnp.zeros((3, 5, 7)), jnp.zeros((3, 7, 2))
    assert count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), a, b) == 2 * 3 * 5 * 7 * 2
    assert count(lambda a: jax.lax.scan(lambda c, _: (c @ c, None), a, None, length=4)[0], jnp.zeros((6, 6))) == 4 * 432
    assert count(lambda a: jax.lax.cond(True, lambda: a @ a, lambda: a), jnp.zeros((6, 6))) == 432
    image, kernel = jnp.zeros((1, 8, 8, 3)), jnp.zeros((3, 3, 3, 4))
    dims = ("NHWC", "HWIO", "NHWC")
    conv = lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dims)  # noqa: E731
    assert count(conv, image, kernel) == 2 * 8 * 8 * 4 * 27
    with pytest.raises(ValueError, match="while loop"):
        count(lambda a: jax.lax.while_loop(lambda c: c[0, 0] < 1, lambda c: c @ c, a), jnp.zeros((6, 6)))
