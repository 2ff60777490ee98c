"""Skip-DiT against plain loops over its blocks, and the cache that its long skips are for."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax import ops
from difax.build import build_run
from difax.config import load_config
from difax.contracts import Model
from difax.cost import model_cost
from difax.models import skip_dit
from difax.trunk import forward, unstack
from tests.toys import QUICK, randomise

DEPTH = 6


def tiny(**overrides: Any) -> tuple[Model, Any]:
    """A Skip-DiT of three and three blocks, every parameter random."""
    geometry = dict(depth=DEPTH, width=16, heads=2, patch=2, size=4, channels=3, classes=5, learn_sigma=False)
    model = skip_dit(**(geometry | overrides))
    return model, randomise(jax.eval_shape(model.init, jax.random.key(0)))


def block(model: Model, params: Any, i: int, tokens: Any, context: Any, taken: Any = None) -> Any:
    """Block i of all, run by its own methods."""
    down, up = model.stages
    stage, j = (down, i) if i < down.depth else (up, i - down.depth)
    p = {"params": jax.tree.map(lambda a: a[j], params[stage.name])}
    if taken is not None:
        tokens = stage.block.apply(p, tokens, taken, method="skip")
    mods = stage.block.apply(p, context, method="mods")
    for branch in stage.branches:
        update = stage.block.apply(p, tokens, mods, context, ops.attend, method=branch)
        tokens = tokens + (stage.block.apply(p, mods, branch, method="gate") * update).astype(tokens.dtype)
    return tokens


def plain(model: Model, params: Any, x: Any, t: Any, labels: Any) -> Any:
    """The network as a loop over its blocks with a stack of what the first half gave out."""
    tokens, context = model.embed(params, x, t, labels)
    outs = []
    for i in range(DEPTH):
        tokens = block(model, params, i, tokens, context, outs.pop() if i >= DEPTH // 2 else None)
        if i < DEPTH // 2:
            outs.append(tokens)
    return model.head(params, tokens, context)


def inputs(model: Model) -> Any:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, *model.input_shape)), jnp.float32)
    return x, jnp.asarray([900.0, 30.0]), jnp.asarray([3, 5], jnp.int32)


@pytest.mark.parametrize("layout", ["stacked", "unstacked"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_runner_is_the_plain_loop(dtype, layout):
    model, params = tiny(dtype=dtype)
    # in bfloat16 XLA leaves out other roundings of the one than of the other, if it may
    jit = partial(jax.jit, compiler_options=QUICK | {"xla_allow_excess_precision": False})
    arguments = inputs(model)
    want = np.asarray(jit(partial(plain, model))(params, *arguments), np.float32)
    laid = params if layout == "stacked" else unstack(model, params)
    got = np.asarray(jit(partial(forward, model))(laid, *arguments), np.float32)
    error = np.abs(got - want).max() / np.abs(want).max()
    print(f"{dtype} {layout}: error {error:.1e}")
    assert error < 1e-6


def test_the_long_skips_matter():
    """Each block of the second half gets what the block across gave out, and nothing else."""
    model, params = tiny()
    arguments = inputs(model)

    @partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def crossed(order: tuple[int, ...]) -> jax.Array:
        tokens, context = model.embed(params, *arguments)
        outs = []
        for i in range(DEPTH):
            tokens = block(model, params, i, tokens, context, outs[order[i - 3]] if i >= 3 else None)
            outs.append(tokens)
        return model.head(params, tokens, context)

    want = np.asarray(jax.jit(partial(forward, model), compiler_options=QUICK)(params, *arguments))
    scale = np.abs(want).max()
    assert np.abs(crossed((2, 1, 0)) - want).max() < 1e-5 * scale
    assert np.abs(crossed((0, 1, 2)) - want).max() > 1e-2 * scale


def test_the_skip_in_plain_numpy():
    """W norm([h, taken]) + b, with a scale and a shift over both, in place of h."""
    model, params = tiny()
    p = jax.tree.map(lambda a: np.asarray(a[1], np.float64), params["up"])
    h, taken = np.random.default_rng(1).normal(size=(2, 2, 4, 16))
    both = np.concatenate([h, taken], axis=-1)
    centred = both - both.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    normed = normed * p["skip_norm"]["scale"] + p["skip_norm"]["bias"]
    want = normed @ p["skip_linear"]["kernel"] + p["skip_linear"]["bias"]
    own = {"params": jax.tree.map(lambda a: a[1], params["up"])}
    got = model.stages[1].block.apply(own, *(jnp.asarray(a, jnp.float32) for a in (h, taken)), method="skip")
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_its_cost_counts_the_skips():
    model, params = tiny()
    cost = model_cost(model, params)
    assert cost.branches["up"] == cost.branches["down"] and cost.depth == {"down": 3, "up": 3}
    assert cost.mods["up"] - cost.mods["down"] == 2 * 4 * 32 * 16  # four tokens, two widths to one


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"depth": 5}, "skip_dit: depth=5; allowed: even"),
        ({"variant": "XXL/2"}, "unknown DiT variant 'XXL/2'"),
        ({"heads": 3}, "width=16 must be divisible by heads=3"),
    ],
)
def test_refuses(settings, said):
    with pytest.raises(ValueError, match=said):
        tiny(**settings)


def test_the_published_size():
    """A DiT-XL/2, and in half of its blocks a norm and a product over two widths."""
    model = skip_dit("XL/2")
    assert [s.depth for s in model.stages] == [14, 14] and model.name == "skip_dit-XL/2"
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    more = 14 * (2 * 2 * 1152 + 2 * 1152 * 1152 + 1152)
    from difax.models import dit

    base = jax.eval_shape(dit("XL/2").init, jax.random.key(0))
    assert sum(a.size for a in jax.tree.leaves(shapes)) - sum(a.size for a in jax.tree.leaves(base)) == more


def test_its_configuration_builds():
    run = build_run(load_config("skip_dit_tiny"))
    assert [s.name for s in run.model.stages] == ["down", "up"] and run.model.stages[1].takes == "down"
