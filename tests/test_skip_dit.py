"""Skip-DiT against plain loops over its blocks, and the cache that its long skips are for."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax.accel.caches import CACHES
from difax.accel.caches.skipcache import power_law
from difax.build import build_setup
from difax.config import load_config
from difax.core import ops
from difax.core.contracts import Model
from difax.core.cost import model_cost
from difax.core.trunk import forward, neutral, unstack
from difax.models import dit, skip_dit
from tests.families import some
from tests.test_caches import Problem, problem
from tests.toys import tiny_skip_dit

DEPTH = 6


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


@pytest.mark.parametrize("dtype", some(["float32", "bfloat16"], "float32"))
def test_the_runner_is_the_plain_loop(dtype):
    """In both layouts of the parameters."""
    model, params = tiny_skip_dit(depth=DEPTH, dtype=dtype)
    # in bfloat16 XLA leaves out other roundings of the one than of the other, if it may
    jit = partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    arguments = inputs(model)
    want = np.asarray(jit(partial(plain, model))(params, *arguments), np.float32)
    for laid in (params, unstack(model, params)):
        got = np.asarray(jit(partial(forward, model))(laid, *arguments), np.float32)
        error = np.abs(got - want).max() / np.abs(want).max()
        print(f"{dtype}: error {error:.1e}")
        assert error < 1e-6


def test_the_long_skips_matter():
    """Each block of the second half gets what the block across gave out, and nothing else."""
    model, params = tiny_skip_dit(depth=DEPTH)
    arguments = inputs(model)

    @partial(jax.jit, static_argnums=0)
    def crossed(order: tuple[int, ...]) -> jax.Array:
        tokens, context = model.embed(params, *arguments)
        outs = []
        for i in range(DEPTH):
            tokens = block(model, params, i, tokens, context, outs[order[i - 3]] if i >= 3 else None)
            outs.append(tokens)
        return model.head(params, tokens, context)

    want = np.asarray(jax.jit(partial(forward, model))(params, *arguments))
    scale = np.abs(want).max()
    assert np.abs(crossed((2, 1, 0)) - want).max() < 1e-5 * scale
    assert np.abs(crossed((0, 1, 2)) - want).max() > 1e-2 * scale


def test_the_skip_in_plain_numpy():
    """W norm([h, taken]) + b, with a scale and a shift over both, in place of h."""
    model, params = tiny_skip_dit(depth=DEPTH)
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
    model, params = tiny_skip_dit(depth=DEPTH)
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
        tiny_skip_dit(**settings)


def test_the_published_size():
    """A DiT-XL/2, and in half of its blocks a norm and a product over two widths."""
    model = skip_dit("XL/2")
    assert [s.depth for s in model.stages] == [14, 14] and model.name == "skip_dit-XL/2"
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    more = 14 * (2 * 2 * 1152 + 2 * 1152 * 1152 + 1152)
    base = jax.eval_shape(dit("XL/2").init, jax.random.key(0))
    assert sum(a.size for a in jax.tree.leaves(shapes)) - sum(a.size for a in jax.tree.leaves(base)) == more


def test_its_configuration_builds():
    run = build_setup(load_config("skip_dit_tiny"))
    assert [s.name for s in run.model.stages] == ["down", "up"] and run.model.stages[1].takes == "down"


# ---------------------------------------------------------------- the cache of Skip-DiT


def guided_ddim(p: Problem, settings: dict[str, Any], steps: int) -> tuple[np.ndarray, list[int]]:
    """DDIM with guidance; at a step that is not full the outermost blocks, and the deep stream of the last full one."""
    n, interval, (low, high) = settings["blocks"], settings["interval"], settings["window"]

    @partial(jax.jit, static_argnums=4)
    def network(x, k, labels, deep, full):
        tokens, context = p.model.embed(p.params, x, jnp.full(labels.shape, k, jnp.float32), labels)
        outs = []
        for i in range(DEPTH):
            if not full and n <= i < DEPTH - n:
                continue
            if i == DEPTH - n:
                deep = tokens if full else deep
                tokens = deep
            tokens = block(p.model, p.params, i, tokens, context, outs.pop() if i >= DEPTH // 2 else None)
            if i < DEPTH // 2:
                outs.append(tokens)
        return p.model.head(p.params, tokens, context), deep

    _, x, _, labels = p.inputs()
    rows = p.rows()
    x, k = np.asarray(x), np.round(rows.model_time).astype(int)
    abar = np.append(p.process.level(rows.t.astype(np.float64)).alpha ** 2, 1.0)
    deep: dict[str, Any] = {"on": jnp.zeros((2, 4, 16)), "off": jnp.zeros((2, 4, 16))}
    counter, count = 0, []
    for i in range(steps):
        full = counter % interval == 0 or k[i] >= high
        counter = 0 if k[i] <= low else counter + 1  # the counter starts anew behind the window
        eps = {}
        for half, y in (("on", labels), ("off", p.model.null(labels))):
            eps[half], deep[half] = network(x.astype(np.float32), k[i], y, deep[half], full)
        e = np.asarray(eps["off"] + 2.0 * (eps["on"] - eps["off"]))
        x0 = (x - np.sqrt(1 - abar[i]) * e) / np.sqrt(abar[i])
        x = np.sqrt(abar[i + 1]) * x0 + np.sqrt(1 - abar[i + 1]) * e
        count.append(DEPTH if full else 2 * n)
    return x, count


def skip_problem(**more: Any) -> Problem:
    return problem(toy=tiny_skip_dit, depth=DEPTH, **more)


@pytest.mark.parametrize(
    ("settings", "blocks"),
    [
        pytest.param(
            {"interval": 3, "blocks": 1, "window": (0.0, 1000.0)},
            [6, 2, 2, 6, 2, 2, 6, 2, 2],
            marks=pytest.mark.slow,
        ),
        # the first two times lie above the window, the last two behind one at or below its end
        ({"interval": 4, "blocks": 2, "window": (250.0, 870.0)}, [6, 6, 4, 4, 6, 4, 4, 6, 6]),
    ],
)
def test_skipcache_by_plain_loops(settings, blocks):
    p = skip_problem(steps=len(blocks))
    want, count = guided_ddim(p, settings, len(blocks))
    got, trace = p.run(CACHES["skipcache"](**settings))
    without, _ = p.run(neutral())
    scale = np.abs(want).max()
    error, effect = np.abs(got - want).max() / scale, np.abs(without - want).max() / scale
    print(f"{count}: error {error:.1e}, effect of the cache {effect:.1e}")
    assert error < min(1e-5, 0.1 * effect)
    assert count == blocks
    computed = np.concatenate([trace.computed[s] for s in ("down", "up")], axis=1)
    np.testing.assert_array_equal(computed[:, :, 0, 0].sum(1), blocks)


def test_long_skips_reach_over_a_gate():
    """Blocks behind a gate's span take what those before it gave out, whatever was computed in the span."""
    p = skip_problem()
    want, _ = p.run(neutral())
    got, _ = p.run(CACHES["dbcache"](0.0, first=2, last=2, warmup=0))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


POWER_LAW = {  # what DeepCache's own function gives
    (50, 10, 15, 1.4): [0, 5, 9, 13, 17, 21, 26, 31, 37, 43],
    (20, 7, 5, 1.4): [0, 3, 5, 6, 9, 12, 16],
    (100, 20, 0, 1.3): [0, 2, 5, 8, 12, 16, 20, 25, 30, 35, 40, 45, 51, 57, 62, 68, 74, 80, 87, 93],
}


@pytest.mark.parametrize("case", POWER_LAW)
def test_keys_of_a_power_law(case):
    assert power_law(*case) == POWER_LAW[case]


def test_a_power_law_plans_as_many_full_evaluations():
    p = skip_problem(steps=20)
    plan = p.rows(CACHES["skipcache"](3, 1, keys="power", center=5, window=(-1.0, 2000.0))).plan
    full = [i for i in range(20) if plan.modes[plan.index[i]][0] is None]
    assert full == POWER_LAW[20, 7, 5, 1.4]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"interval": 0}, "interval=0, blocks=None; allowed: 1 or more"),
        ({"blocks": 0}, "interval=2, blocks=0; allowed: 1 or more"),
        ({"keys": "quadratic"}, "keys='quadratic'; allowed: uniform, power"),
        ({"power": 1.0}, "center=15, power=1.0; allowed: 0 or more, and more than 1"),
        ({"dtype": "int4"}, "dtype='int4'; allowed"),
    ],
)
def test_skipcache_refuses(settings, said):
    with pytest.raises(ValueError, match=said):
        CACHES["skipcache"](**settings)


def test_skipcache_refuses_by_the_plan():
    with pytest.raises(ValueError, match="no long skips from its first stage to its last"):
        problem().rows(CACHES["skipcache"](blocks=1))
    with pytest.raises(ValueError, match="blocks=3; allowed: 1 or more, less than half of the 6 blocks"):
        skip_problem().rows(CACHES["skipcache"](blocks=3))
    with pytest.raises(ValueError, match="no 3 keys of 6 evaluations around the 15th"):
        skip_problem().rows(CACHES["skipcache"](2, 1, keys="power"))
