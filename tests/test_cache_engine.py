"""What all caches share: sweeps compile once, nothing leaves the device, stacks, samples and devices that agree."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax.accel.caches import CACHES
from difax.accel.caches.fill import damped, foca, hold, newton, taylor
from difax.accel.solvers import SOLVERS
from difax.core import process as P
from difax.core.contracts import Accelerator
from difax.core.decisions import averaged, inert, strip, summary
from difax.core.device import peak_memory
from difax.core.grids import GRIDS, make_times
from difax.core.guidance import GUIDES
from difax.core.noise import sample_keys
from difax.core.placement import Axes, make_placement
from difax.core.sample import initial_noise, make_rows, make_sampler
from difax.core.shapes import trunk_spec
from difax.core.stack import stack, with_learned
from difax.core.trunk import neutral, unstack
from tests.families import some
from tests.toys import tiny_dit, tiny_skip_dit

STEPS = 8


class Problem:
    """Guided DDIM on a tiny DiT of four blocks."""

    def __init__(self, guide="cfg", together=True, depth=4, dtype="float32"):
        self.model, self.params = tiny_dit(depth=depth, dtype=dtype)
        self.process, self.solver = P.vp_linear(), SOLVERS["ddim"]()
        self.guide = GUIDES[guide](together=together) if guide == "cfg" else GUIDES[guide]()
        self.times = make_times(GRIDS["uniform"](), self.process, STEPS)

    def rows(self, accelerator: Accelerator):
        return make_rows(self.solver, self.guide, self.process, self.times, accelerator, self.model.stages)

    def sampler(self, accelerator: Accelerator):
        sampler = make_sampler(self.model, self.process, "eps", self.solver, self.guide, accelerator)
        return jax.jit(sampler)

    def inputs(self, labels=(3, 0), seed=0):
        keys = sample_keys(seed, len(labels))
        return initial_noise(self.process, keys, self.model.input_shape), keys, jnp.asarray(labels, jnp.int32)

    def run(self, accelerator: Accelerator, params=None, **inputs):
        x, keys, labels = self.inputs(**inputs)
        return self.sampler(accelerator)(params or self.params, x, keys, labels, self.rows(accelerator), 2.0)


# ---------------------------------------------------------------- fills


def weigh(fill, steps, now):
    """A fill's weights; one that holds has none."""
    assert fill.weights is not None
    return fill.weights(steps, now)


def ring(values, steps, fill):
    padded = np.asarray([*steps, *[-1] * (fill.depth - len(steps))])
    return lambda now: float(np.dot(weigh(fill, padded, now)[: len(values)], values))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_newton_is_exact_to_its_degree_at_any_distances(order):
    steps = np.asarray([9, 7, 4, 0])[: order + 1]
    curve = np.polynomial.Polynomial(np.arange(1.0, order + 2))
    fill = newton(order)
    assert ring(curve(steps), steps, fill)(11) == pytest.approx(curve(11))
    with_less = ring(curve(steps)[:2], steps[:2], fill)  # two values known: the straight line through them
    line = curve(steps[0]) + (curve(steps[0]) - curve(steps[1])) / (steps[0] - steps[1]) * 2
    assert with_less(11) == pytest.approx(line)


def test_weights_of_the_papers():
    steps = lambda n: np.arange(n)[::-1]  # noqa: E731
    np.testing.assert_allclose(weigh(taylor(2), steps(3), 3), [5 / 2, -2, 1 / 2])
    np.testing.assert_allclose(weigh(taylor(3), steps(4), 4), [8 / 3, -5 / 2, 1, -1 / 6])
    np.testing.assert_allclose(weigh(newton(2), steps(3), 3), [3, -3, 1])
    np.testing.assert_allclose(weigh(newton(3), steps(4), 4), [4, -6, 4, -1])
    np.testing.assert_allclose(weigh(damped(lambda now: 0.5), np.asarray([4, 2]), 5), [1.5, -0.5])
    np.testing.assert_allclose(weigh(foca(), np.asarray([4, 3]), 8), [1 + 4.5 / 4, -4.5 / 4, 4.5 / 4, -4.5 / 4])


def test_taylor_misses_a_parabola_as_published():
    """On t^2 + 2t + 1 with computed values two apart it errs where Newton's polynomial is exact."""
    curve, steps = np.polynomial.Polynomial([1.0, 2.0, 1.0]), np.asarray([6, 3, 0])
    for now in (7, 8):
        assert ring(curve(steps), steps, newton(2))(now) == pytest.approx(curve(now))
        assert abs(ring(curve(steps), steps, taylor(2))(now) - curve(now)) > 1


@pytest.mark.parametrize("make", [lambda: taylor(2), lambda: taylor(3, 2), lambda: newton(2), foca])
def test_weights_are_the_same_traced(make):
    fill = make()
    for steps in ([7, 5, 2, 0], [7, 5, -1, -1], [7, -1, -1, -1]):
        host = np.asarray(steps[: fill.depth])
        traced = jax.jit(partial(weigh, fill))(jnp.asarray(host), jnp.int32(9))
        np.testing.assert_allclose(traced, weigh(fill, host, 9), rtol=1e-6)
    assert hold().weights is None


# ---------------------------------------------------------------- one program


SWEEPS = {
    "fora": [dict(interval=n) for n in (2, 3, 4)],
    "taylorseer": [dict(interval=n, order=1) for n in (2, 3)],
    "teacache": [dict(threshold=t) for t in (0.0, 0.2, 0.5)],
    "dbcache": [dict(threshold=t, warmup=w, max_continuous=c) for t, w, c in ((0.0, 2, -1), (0.6, 2, 2), (0.9, 3, 1))],
}


@pytest.mark.parametrize("name", some(SWEEPS, "taylorseer", "dbcache"))
def test_a_sweep_compiles_once(name):
    p, traces = Problem(), [0]
    embed = p.model.embed

    def counted(*a):
        traces[0] += 1
        return embed(*a)

    p.model = p.model._replace(embed=counted)
    sampler = p.sampler(CACHES[name](**SWEEPS[name][0]))
    seen = []
    for setting in SWEEPS[name]:
        samples, trace = sampler(p.params, *p.inputs(), p.rows(CACHES[name](**setting)), 2.0)
        want, _ = p.run(CACHES[name](**setting))
        np.testing.assert_allclose(samples, want, rtol=1e-5, atol=1e-5)
        seen.append((traces[0], np.asarray(trace.computed["blocks"]).sum()))
        traces[0] = 0
    assert [n for n, _ in seen[1:]] == [seen[1][0]] * len(seen[1:])
    sampled = [c for _, c in seen]
    assert len(set(sampled)) == len(sampled)  # and every setting did something else


@pytest.mark.parametrize("name", some(["none", "fora", "taylorseer", "teacache", "dbcache"], "fora", "dbcache"))
def test_nothing_is_fetched_or_sent_during_a_run(name):
    p, accelerator = Problem(), neutral() if name == "none" else CACHES[name]()
    sampler = p.sampler(accelerator)
    rows, scale = jax.tree.map(jnp.asarray, p.rows(accelerator)), jnp.float32(2.0)
    sampler(p.params, *p.inputs(), rows, scale)
    inputs = p.inputs()
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(sampler(p.params, *inputs, rows, scale))


def test_rows_of_another_accelerator_are_refused():
    p = Problem()
    with pytest.raises(ValueError, match="laid out for none, the sampler runs fora"):
        p.sampler(CACHES["fora"]())(p.params, *p.inputs(), p.rows(neutral()), 2.0)


@pytest.mark.parametrize("name", some(["taylorseer", "dbcache"], "dbcache"))
def test_written_out_blocks_give_the_same(name):
    p = Problem()
    accelerator = CACHES[name](**{"threshold": 0.3} if name in ("teacache", "dbcache") else {})
    want, trace = p.run(accelerator)
    got, other = p.run(accelerator, params=unstack(p.model, p.params))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, trace.computed, other.computed)


# ---------------------------------------------------------------- memory


def memory_values(name, dtype=None, **settings):
    p = Problem()
    accelerator = CACHES[name](dtype=dtype, **settings)
    shapes = [jax.ShapeDtypeStruct((2 * 2, *p.model.input_shape), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)]
    spec = trunk_spec(p.model, p.params, *shapes, halves=2)
    memory = jax.eval_shape(lambda: accelerator.init(spec, p.rows(accelerator).plan.modes))
    leaves = [a for a in jax.tree.leaves(memory) if a.ndim > 2]
    return sum(a.size for a in leaves), sum(a.size * a.dtype.itemsize for a in leaves), spec


@pytest.mark.parametrize(
    ("name", "settings", "branches", "tokens"),
    [
        ("fora", dict(interval=3), 8, 0),
        ("fora", dict(interval=1), 0, 0),
        ("taylorseer", dict(interval=3, order=2), 3 * 8, 0),
        ("teacache", {}, 0, 2),
        ("fbcache", {}, 0, 2),
        ("dbcache", dict(forecast="taylor", order=2), 0, 4),
    ],
)
def test_memory_is_what_the_docstring_says(name, settings, branches, tokens):
    """In outputs of a branch of one layer, and in copies of the tokens: each is 2 halves x 2 samples x N x D."""
    values, size, spec = memory_values(name, **settings)
    assert values == (branches + tokens) * spec.hidden.size
    assert size == 4 * values


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("taylorseer", dict(interval=3, order=2)),
        ("toca", {}),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in (("fora", dict(interval=3)), ("duca", {}), ("frdiff", {}))),
    ],
)
def test_a_program_takes_no_more_memory_than_is_remembered(name, settings):
    """XLA of jax before 0.12 copies what a conditional of three modes or more hands on."""
    p, accelerator = Problem(), CACHES[name](**settings)
    inputs = p.inputs(labels=(3, 0) * 32)

    def peak(accelerator):
        program = p.sampler(accelerator).lower(p.params, *inputs, p.rows(accelerator), 2.0)
        return peak_memory(program.compile())

    both = [jnp.concatenate([a, a]) for a in (inputs[0], inputs[2])]
    spec = trunk_spec(p.model, p.params, *both, halves=2)
    memory = jax.eval_shape(lambda: accelerator.init(spec, p.rows(accelerator).plan.modes))
    remembered = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(memory))
    more = peak(accelerator) - peak(neutral())
    assert 0.9 * remembered < more < (1.05 if jax.__version_info__ >= (0, 12) else 2.1) * remembered


@pytest.mark.parametrize(("dtype", "itemsize"), [("bfloat16", 2), ("float8_e4m3fn", 1)])
def test_a_narrow_ring_is_narrow_and_close(dtype, itemsize):
    values, size, _ = memory_values("fora", dtype)
    assert size == itemsize * values
    p = Problem()
    want, _ = p.run(CACHES["fora"](interval=2))
    got, _ = p.run(CACHES["fora"](interval=2, dtype=dtype))
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    print(f"ring in {dtype}: {error:.1e}")
    assert 0 < error < {"bfloat16": 2e-2, "float8_e4m3fn": 0.2}[dtype]


# ---------------------------------------------------------------- batches, halves and devices


@pytest.mark.parametrize("name", ["teacache", "fbcache", "dbcache"])
@pytest.mark.parametrize("together", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_per_sample_a_batch_is_its_singles(name, together):
    """With a threshold at which the samples disagree; one number for the whole batch gives other images."""
    p = Problem(together=together)
    settings = {
        "teacache": dict(threshold=0.34),
        "fbcache": dict(threshold=0.5),
        "dbcache": dict(threshold=0.45, warmup=1),
    }
    accelerator = CACHES[name](per_sample=True, **settings[name])
    labels = (3, 0, 1, 4)
    samples, trace = p.run(accelerator, labels=labels)
    keys, singles, decisions = sample_keys(0, 4), [], []
    x = initial_noise(p.process, keys, p.model.input_shape)
    sampler, rows = p.sampler(accelerator), p.rows(accelerator)
    for b in range(4):
        one = slice(b, b + 1)
        alone, alone_trace = sampler(p.params, x[one], keys[one], jnp.asarray(labels[one], jnp.int32), rows, 2.0)
        singles.append(alone)
        decisions.append(alone_trace.metric["trunk"]["reused"][:, 0])
    np.testing.assert_allclose(samples, jnp.concatenate(singles), rtol=1e-4, atol=1e-4)
    reused = np.stack(decisions, 1)
    np.testing.assert_array_equal(trace.metric["trunk"]["reused"], reused)
    assert (reused.any(1) & ~reused.all(1)).any()  # they disagreed somewhere
    # whatever one sample asks for is computed for all
    ran = np.asarray(trace.computed["blocks"])[:, -1, 0, 0]
    np.testing.assert_array_equal(ran, 1 - reused[..., 0].all(1))


def test_halves_that_run_apart_decide_apart():
    p = Problem(together=False)
    accelerator = CACHES["fbcache"](threshold=0.5)
    _, trace = p.run(accelerator)
    strips = summary(trace)["decisions"]
    print(strips)
    assert strips[0] != strips[1]
    np.testing.assert_array_equal(trace.halves, np.full(STEPS, 2))


@pytest.mark.parametrize("name", ["dbcache", pytest.param("teacache", marks=pytest.mark.slow)])
def test_decisions_are_the_same_on_any_number_of_devices(name):
    p = Problem()
    accelerator = CACHES[name](**{"teacache": dict(threshold=0.35), "dbcache": dict(threshold=0.5, warmup=2)}[name])
    labels, found = (0, 1, 2, 3, 4, 0, 1, 2), []
    rows, sampler = p.rows(accelerator), p.sampler(accelerator)
    for devices in (1, 2, 4, 8):
        place = make_placement(Axes(data=devices), jax.devices())
        x, keys, cond = (jax.device_put(a, place.batch()) for a in p.inputs(labels=labels))
        params = jax.device_put(p.params, place.sharding())
        samples, trace = sampler(params, x, keys, cond, rows, 2.0)
        found.append((strip(trace), np.asarray(samples)))
    assert len({s for s, _ in found}) == 1 and "F" in found[0][0][1:-1] and set(found[0][0]) != {"F"}
    for _, samples in found[1:]:
        np.testing.assert_allclose(samples, found[0][1], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- several at once


def test_different_levels_stack_in_any_order():
    """A step gate around a held stack: where the gate opens, FORA decides; both have their plan and their memory."""
    p = Problem()
    gate, inner = CACHES["teacache"](threshold=0.25), CACHES["fora"](interval=2)
    one, trace = p.run(stack(gate, inner))
    other, _ = p.run(stack(inner, gate))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    _, alone = p.run(gate)
    full = np.asarray(alone.computed["blocks"]).mean((1, 2, 3))
    got = np.asarray(trace.computed["blocks"]).mean((1, 2, 3))
    reached = np.asarray(trace.entered["blocks"]).min((1, 2)) > 0
    assert 2 < reached.sum() < STEPS and got.sum() < full.sum()
    np.testing.assert_array_equal(got[reached], np.arange(reached.sum()) % 2 == 0)


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        (("teacache", dict(threshold=0.25)), ("taylorseer", dict(interval=3, order=2))),
        pytest.param(
            ("dbcache", dict(threshold=0.5, warmup=1, first=1)),
            ("taylorseer", dict(interval=2, order=1)),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("delta_dit", dict(interval=2)), ("taylorseer", dict(interval=3, order=1)), marks=pytest.mark.slow
        ),
        pytest.param(
            ("ab_cache", dict(where="output", interval=2)), ("delta_dit", dict(interval=2)), marks=pytest.mark.slow
        ),
        pytest.param(
            ("ab_cache", dict(where="output", interval=2)), ("fora", dict(interval=2)), marks=pytest.mark.slow
        ),
    ],
    ids=lambda pair: pair[0],
)
@pytest.mark.parametrize("together", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_inner_plan_counts_what_reaches_it_and_never_mixes_what_was_not_computed(outer, inner, together):
    p = Problem(together=together)
    stacked = stack(*(CACHES[name](**settings) for name, settings in (outer, inner)))

    def poisoned(spec, modes):
        absurd = lambda a: jnp.full_like(a, 1e6) if a.ndim > 2 else a  # noqa: E731
        return jax.tree.map(absurd, stacked.init(spec, modes))

    want, trace = p.run(stacked)
    got, _ = p.run(stacked._replace(init=poisoned))
    np.testing.assert_array_equal(got, want)
    assert np.all(np.isfinite(want))
    # where the outer one runs the whole network, the inner plan is at its own next evaluation
    computed = np.asarray(trace.computed["blocks"])[..., 0].mean((1, 2))
    entered = np.asarray(trace.entered["blocks"])[..., 0].min(1) > 0
    alone = CACHES[inner[0]](**inner[1])
    _, own = p.run(alone)
    planned = np.asarray(own.computed["blocks"])[..., 0].mean((1, 2))
    if inner[0] != "delta_dit":
        np.testing.assert_allclose(computed[entered], planned[: entered.sum()])
        assert 2 < entered.sum() < STEPS and (computed[entered] == 0).any()


def test_a_plan_inside_of_blocks_that_are_left_out_is_refused():
    p = Problem()
    stacked = stack(CACHES["dbprune"](), CACHES["fora"]())
    with pytest.raises(ValueError, match="fora plans branches of blocks that dbprune leaves out one by one"):
        p.rows(stacked)


def test_a_plan_tied_to_guidance_is_refused_where_evaluations_are_left_out():
    p, name = Problem(), "fastercache plans branches along with guidance, and teacache leaves evaluations out"
    with pytest.raises(ValueError, match=name):
        p.rows(stack(CACHES["teacache"](), CACHES["fastercache"]()))


def test_a_gate_whose_last_blocks_take_from_its_span_is_refused():
    model, _ = tiny_skip_dit()
    accelerator = CACHES["dbcache"](first=1, last=2)
    with pytest.raises(ValueError, match="last=2 blocks would take, by long skips"):
        accelerator.plan(Problem().rows(neutral()), model.stages)


def test_branches_apart_stack():
    p = Problem()
    accelerator = stack(CACHES["fora"](interval=2)._replace(branches=("attn",)), neutral())
    assert accelerator.name == "fora"
    both = stack(
        CACHES["fora"](interval=2)._replace(branches=("attn",)),
        CACHES["taylorseer"](interval=4, order=1)._replace(branches=("mlp",)),
    )
    _, trace = p.run(both)
    computed = np.asarray(trace.computed["blocks"]).mean((1, 3))
    np.testing.assert_array_equal(computed[:, 0], [1, 0, 1, 0, 1, 0, 1, 0])
    np.testing.assert_array_equal(computed[:, 1], [1, 1, 0, 0, 0, 1, 0, 0])


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (("fora", "taylorseer"), "fora and taylorseer both act on branches"),
        (("teacache", "dbcache"), "teacache and dbcache both act on the trunk"),
    ],
)
def test_the_same_level_is_refused_by_name(names, match):
    with pytest.raises(ValueError, match=match):
        stack(*(CACHES[n]() for n in names))


# ---------------------------------------------------------------- what a run says


def test_strip_and_summary():
    p = Problem()
    _, trace = p.run(CACHES["fora"](interval=3))
    assert strip(trace) == "F..F..F."
    found = summary(averaged([trace, trace]))
    assert found["decisions"] == ["F..F..F."] * 2 and found["hit_rate"] == 0.625 and found["metric"] is None


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("teacache", dict(threshold=1e-9), r"filled nothing in this run; its metric .*50 %: .*threshold 1e-09"),
        (
            "dbcache",
            dict(threshold=0.9, warmup=7, warmup_interval=6, max_cached=1),
            "filled nothing behind its warm-up",
        ),
        ("dbprune", dict(threshold=1e-9, warmup=2), r"filled nothing in this run; .*50 %: [\d.]+, .*threshold 1e-09"),
        ("fastcache", dict(threshold=1e-9), r"filled nothing in this run; .*50 %: [\d.]+, .*threshold 1e-09"),
        ("lazydit", {}, r"filled nothing in this run; .*5 %: 0.5, 50 %: 0.5, 95 %: 0.5 \(threshold 0.5\)"),
        ("adacache", dict(codebook=((1.0, 1),)), r"filled nothing in this run; its metric .*95 %: [\d.]+$"),
        ("fora", dict(interval=2), None),
        ("none", {}, None),
    ],
)
def test_a_cache_that_does_nothing_is_told(name, settings, match):
    p, accelerator = Problem(), neutral() if name == "none" else CACHES[name](**settings)
    _, trace = p.run(accelerator)
    told = inert(p.rows(accelerator), trace)
    print(strip(trace), told)
    if match is None:
        assert told is None
    else:
        assert told and re.search(match, told)


def percentiles(values):
    return {f"{p} %": pytest.approx(np.percentile(values, p), rel=1e-6) for p in (5, 50, 95)}


def test_percentiles_of_blocks_are_those_that_were_asked():
    """Guidance from the third of eight evaluations to the sixth: elsewhere the unconditional half has zeros."""
    p = Problem()
    p.guide = GUIDES["interval"](0.2, 0.8)
    _, trace = p.run(CACHES["dbprune"](threshold=0.3, first=1, warmup=1))
    gate = jax.tree.map(np.asarray, trace.metric["block"]["blocks"])
    guided = np.asarray(trace.halves) == 2
    assert 0 < guided.sum() < STEPS and not gate["metric"][~guided, :, 1].any()
    # where guidance begins everything is computed; the first block never asks, all others do from the second on
    asked = ~np.asarray(p.rows(CACHES["dbprune"]()).fresh)
    asked[0] = False
    shown = [gate["metric"][i, 1:, : 1 + guided[i]].ravel() for i in np.flatnonzero(asked)]
    assert summary(trace)["metric"] == percentiles(np.concatenate(shown))


def test_percentiles_of_branches_are_those_of_all_samples():
    rng = np.random.default_rng(0)
    weights = {b: 0.05 * rng.normal(size=(4, STEPS, 16)).astype(np.float32) for b in ("attn", "mlp")}
    p, accelerator = Problem(), CACHES["lazydit"]({"blocks": weights})
    _, trace = p.run(accelerator, params=with_learned(p.params, accelerator))
    scores = [np.asarray(of["metric"])[1:] for of in trace.metric["branch"]["blocks"].values()]
    assert scores[0].shape == (STEPS - 1, 4, 2, 2)  # evaluations, layers, samples, halves
    assert summary(trace)["metric"] == percentiles(np.concatenate([a.ravel() for a in scores]))


def test_gates_of_two_levels_are_told_apart():
    """What a gate around the blocks leaves out reports zeros, which are no measurement of theirs."""
    trunk, block = CACHES["teacache"](threshold=1.0), CACHES["dbprune"](threshold=0.2, first=1, warmup=1)
    _, trace = Problem().run(stack(trunk, block))
    reused = np.asarray(trace.metric["trunk"]["reused"])[:, 0] == 1
    metric = np.asarray(trace.metric["block"]["blocks"]["metric"])
    assert 0 < reused.sum() < STEPS - 1 and not metric[reused].any()
    want = {f"trunk {k}": v for k, v in percentiles(trace.metric["trunk"]["metric"][1:-1]).items()}
    computed = np.flatnonzero(~reused)[1:]
    want |= {f"block {k}": v for k, v in percentiles(metric[computed, 1:].ravel()).items()}
    assert summary(trace)["metric"] == want


def test_the_mean_of_a_metric_is_over_the_runs_that_asked():
    _, trace = Problem().run(CACHES["teacache"](threshold=1.0))
    jax.tree.map(np.testing.assert_array_equal, averaged([trace]), jax.tree.map(np.asarray, trace))
    gate = {k: np.asarray(a) for k, a in trace.metric["trunk"].items()}
    idle = {**gate, "metric": gate["metric"] * 0, "asked": gate["asked"] * 0}
    other = trace._replace(metric={**trace.metric, "trunk": idle})
    mean = averaged([trace, other])
    asked = gate["asked"] == 1
    assert asked.any() and np.all(mean.metric["trunk"]["asked"][asked] == 0.5)
    np.testing.assert_array_equal(mean.metric["trunk"]["metric"][asked], gate["metric"][asked])
    assert summary(mean)["metric"] == summary(trace)["metric"]


def test_a_learned_accelerator_sees_its_own_layer():
    """Per-layer parameters arrive with the layer, in both layouts of the weights."""
    from difax.core.contracts import Done

    def branch(compute, gate, where, state, inner, row):
        update, inner = compute(inner)
        return gate(update * where.learned["factor"]), state, inner, Done(1.0)

    factors = np.asarray([1.0, 0.5, 0.0, 2.0], np.float32)
    accelerator = Accelerator(name="scaled", branch=branch, learned={"blocks": {"factor": factors}})
    p = Problem("none")
    params = with_learned(p.params, accelerator)
    got, _ = p.run(accelerator, params=params)
    scaled = jax.tree.map(lambda a: a, p.params)
    for dense in ("out", "fc2"):
        for leaf in ("kernel", "bias"):
            a = scaled["blocks"][dense][leaf]
            scaled["blocks"][dense][leaf] = a * factors.reshape(-1, *(1,) * (a.ndim - 1))
    want, _ = p.run(neutral(), params=scaled)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    out, _ = p.run(accelerator, params=unstack(p.model, params))
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
