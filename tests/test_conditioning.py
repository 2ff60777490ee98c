"""Conditioning ahead of the run: the same samples, and no modulation weight is read inside of the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr

from difax.build import build_setup
from difax.cli import main
from difax.config import load_config, override
from difax.core.cost import _count, model_bytes, model_cost, run_bytes, run_cost
from difax.core.guidance import cfg, interval, unguided
from difax.core.noise import sample_keys
from difax.core.sample import initial_noise, make_rows
from difax.weights.conditions import random_conditions
from tests.families import some
from tests.toys import randomise

SMALL = [("model.depth", 2), ("model.width", 32), ("model.heads", 2), ("model.size", 16)]
GUIDES = {"none": unguided, "cfg": cfg, "apart": lambda: cfg(together=False), "interval": lambda: interval(0.3, 0.7)}


def drawn(config, ahead, guide=None):
    """(run, params, samples, trace) of two samples."""
    run = build_setup(override(config, [("steps", 5), ("conditioning", "ahead" if ahead else "each")]))
    if guide is not None:
        run = run._replace(guide=GUIDES[guide]())
        rows = make_rows(run.solver, run.guide, run.process, run.times, run.accelerator, run.model.stages)
        run = run._replace(rows=rows)
    params = run.prepare(randomise(jax.eval_shape(run.model.init, jax.random.key(0))))
    keys, cond = sample_keys(0, 2), jax.tree.map(jnp.asarray, random_conditions(run.model, 2))
    x = initial_noise(run.process, keys, run.model.input_shape)
    sampler = jax.jit(run.sampler())
    samples, trace = sampler(params, x, keys, cond, run.rows, jnp.float32(2.0))
    return run, params, np.asarray(samples), jax.tree.map(np.asarray, trace)


slow = pytest.mark.slow
CELLS = [
    ("fmnist_dit", [*SMALL, ("cache.name", "fora")], "cfg"),
    pytest.param("fmnist_dit", [*SMALL, ("cache.name", "fora"), ("layout", "unstacked")], "cfg", marks=slow),
    pytest.param("fmnist_dit", [*SMALL, ("cache.name", "teacache"), ("cache.threshold", 0.5)], "interval", marks=slow),
    pytest.param(
        "fmnist_dit", [*SMALL, ("cache.name", "dbcache"), ("cache.first", 1), ("cache.warmup", 1)], "apart", marks=slow
    ),
    pytest.param("fmnist_dit", SMALL, "none", marks=slow),
    pytest.param("flux_tiny", [("cache.name", "fora")], None, marks=slow),
    pytest.param("sd3_tiny", [("cache.name", "fora")], None, marks=slow),
    pytest.param("qwen_image_tiny", [("cache.name", "fora")], None, marks=slow),
    pytest.param("flux2_tiny:dev", [("cache.name", "fora")], None, marks=slow),
    ("pixart_tiny", [("cache.name", "pab")], None),
    pytest.param("pixart_tiny", [("cache.name", "tgate")], None, marks=slow),
    pytest.param("pixart_tiny", [("cache.name", "fora"), ("layout", "unstacked")], None, marks=slow),
    pytest.param("wan_tiny", [("quant.name", "int8_w8a8")], None, marks=slow),
    pytest.param("wan_tiny", [("cache.name", "teacache"), ("cache.threshold", 0.5)], "apart", marks=slow),
    pytest.param("z_image_tiny", [("cache.name", "fora")], None, marks=slow),
]


@pytest.mark.parametrize("name, settings, guide", CELLS)
def test_samples_are_the_same(name, settings, guide):
    config = override(load_config(name), settings)
    _, _, each, trace = drawn(config, False, guide)
    _, _, ahead, other = drawn(config, True, guide)
    assert each.std() > 0.1
    np.testing.assert_allclose(ahead, each, atol=2e-4 * np.abs(each).max())
    assert trace.ahead == 0 and other.ahead == max(np.max(other.halves), 1)
    for stage in trace.computed:
        np.testing.assert_array_equal(trace.computed[stage], other.computed[stage])
        if name not in ("pixart_tiny", "wan_tiny"):  # whose modulation is a table and a sum, which stays in the loop
            assert np.all(other.entered[stage] == 1)


def products_in_the_loop(run, params):
    """Widths of the results of the products inside of the loop over evaluations."""
    keys, cond = sample_keys(0, 2), jnp.arange(2)
    x = initial_noise(run.process, keys, run.model.input_shape)
    closed = jax.make_jaxpr(run.sampler())(params, x, keys, cond, run.rows, jnp.float32(2.0))
    found = []

    def walk(jaxpr, inside):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general" and inside:
                found.append(equation.outvars[0].aval.shape[-1])
            loop = equation.primitive.name == "scan" and equation.params["length"] == len(run.rows.i)
            for value in equation.params.values():
                for part in value if isinstance(value, tuple) else (value,):
                    inner = getattr(part, "jaxpr", part)
                    if hasattr(inner, "eqns"):
                        walk(inner, inside or loop)

    walk(closed.jaxpr, False)
    return found


def test_no_modulation_weight_is_read_in_the_loop():
    config = override(load_config("fmnist_dit"), [*SMALL, ("steps", 5)])
    for conditioning in ("each", "ahead"):
        run = build_setup(override(config, [("conditioning", conditioning)]))
        params = run.prepare(randomise(jax.eval_shape(run.model.init, jax.random.key(0))))
        assert (6 * 32 in products_in_the_loop(run, params)) == (conditioning == "each")


def test_bytes_of_conditioning_ahead():
    """The modulation's weights once for each block, and not once more for each evaluation."""
    config = override(load_config("fmnist_dit"), [*SMALL, ("cache.name", "fora")])
    run, params, _, trace = drawn(config, True, "cfg")
    cost = model_bytes(run.model, params, run.attention)
    each, ahead = (run_bytes(cost, trace._replace(ahead=copies), 2) for copies in (0.0, 2.0))
    assert each - ahead == pytest.approx(4 * 2 * cost.weights.mods["blocks"])  # 5 evaluations, 2 blocks


def executed(run, params):
    """Operations of the products of a run of two samples that computes everything, in the loop and before it."""
    keys, cond = sample_keys(0, 2), jax.tree.map(jnp.asarray, random_conditions(run.model, 2))
    x = initial_noise(run.process, keys, run.model.input_shape)
    closed = jax.make_jaxpr(run.sampler())(params, x, keys, cond, run.rows, jnp.float32(2.0))
    used, _ = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    (call,) = used.eqns
    loops = [e for e in call.params["jaxpr"].jaxpr.eqns if e.primitive.name == "scan"]
    loop = next(e for e in loops if e.params["length"] == len(run.rows.i) and "dot_general" in str(e))
    body = loop.params["length"] * _count(loop.params["jaxpr"].jaxpr)
    return body, _count(used) - body


@pytest.mark.parametrize(
    "name", some(["pixart_tiny", "wan_tiny", "flux_tiny", "sd3_tiny", "z_image_tiny"], "pixart_tiny", "wan_tiny")
)
def test_what_depends_on_the_condition_alone_is_computed_once(name):
    """Text projections, keys and values of cross-attention: one copy of the batch each, whatever the evaluations, in
    the program as in the trace."""
    found = {}
    for conditioning in ("each", "ahead"):
        config = override(load_config(name), [("steps", 5), ("conditioning", conditioning)])
        run, params, _, trace = drawn(config, conditioning == "ahead")
        body, before = executed(run, params)
        cost = model_cost(run.model, params, run.attention)
        # the time's network runs once more, for the modulation
        if conditioning == "ahead" and name in ("flux_tiny", "sd3_tiny", "z_image_tiny"):
            before -= 2 * run.guide.halves * len(run.rows.i) * 2 * (256 * 64 + 64 * 64)
        assert 2 * run_cost(cost, trace) == pytest.approx(body + before, rel=1e-6)
        found[conditioning] = body, before
    once = cost.ends_once + sum(cost.depth[s] * sum(values) for s, values in cost.once.items())
    halves, evaluations = run.guide.halves, len(run.rows.i)
    assert once > 0 and found["each"][1] == 0
    mods = sum(cost.depth[s] * value for s, value in cost.mods.items())
    assert found["ahead"][1] == pytest.approx(2 * halves * (once + evaluations * mods), rel=1e-6)
    assert found["each"][0] - found["ahead"][0] == pytest.approx(2 * halves * evaluations * (once + mods), rel=1e-6)


def test_long_skips_are_refused(capsys):
    config = load_config("skip_dit_tiny")
    with pytest.raises(ValueError, match="conditioning=ahead: .*long skips.*allowed: each"):
        build_setup(override(config, [("conditioning", "ahead")]))  # before any weight is read
    assert main(["sample", "--config", "skip_dit_tiny", "--random-init", "--conditioning", "ahed"]) == 2
    assert "unknown conditioning 'ahed' (did you mean ahead?); allowed: each, ahead" in capsys.readouterr().err
