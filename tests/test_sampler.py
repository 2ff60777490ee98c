"""The sampling loop: equal to a plain loop, independent of the batch, compiled once, and counted."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax.accel.caches import CACHES
from difax.accel.solvers import SOLVERS
from difax.core import noise
from difax.core import process as P
from difax.core.contracts import Model
from difax.core.grids import GRIDS, make_times
from difax.core.guidance import GUIDES
from difax.core.sample import Held, initial_noise, make_rows, make_sampler
from difax.core.trunk import forward, neutral
from tests.toys import FULL, network, tiny_dit

LABELS = (3, 0, 4)
cached_dit = functools.cache(tiny_dit)


class Setup(NamedTuple):
    """Everything that one sampling run needs, at a tiny size."""

    model: Model
    params: Any
    process: P.Process
    prediction: str
    solver: Any
    guide: Any
    rows: Any

    def sampler(self, accelerator=None):
        return make_sampler(
            self.model, self.process, self.prediction, self.solver, self.guide, accelerator or neutral()
        )

    def inputs(self, labels=LABELS, seed=0, keys=None):
        """(x, keys, cond); x is new at every call, because the sampler takes it."""
        keys = noise.sample_keys(seed, len(labels)) if keys is None else keys
        x = initial_noise(self.process, keys, self.model.input_shape)
        return x, keys, jnp.asarray(labels, jnp.int32)

    def planned(self, accelerator=None):
        """The rows, with the plan of an accelerator."""
        return (
            self.rows
            if accelerator is None
            else self.rows._replace(plan=accelerator.plan(self.rows, self.model.stages))
        )

    def quick(self, accelerator=None, **inputs):
        """The sampler compiled ahead of time, with no effort, for inputs of one shape."""
        rows = self.planned(accelerator)
        lowered = self.sampler(accelerator).lower(self.params, *self.inputs(**inputs), rows, 1.0)
        return lowered.compile()

    def run(self, scale=1.0, accelerator=None, **inputs):
        program, rows = self.quick(accelerator, **inputs), self.planned(accelerator)
        return program(self.params, *self.inputs(**inputs), rows, scale)


def setup(
    solver="ddim", arguments=(), guide="none", guidance=(), process="vp_linear", n=4, grid="uniform", **dit
) -> Setup:
    arguments, guidance = dict(arguments), dict(guidance)
    dit = {"learn_sigma": arguments.get("variance") == "learned"} | dit
    p, g, s = P.PROCESSES[process](), GUIDES[guide](**guidance), SOLVERS[solver](**arguments)
    model, params = cached_dit(**dit)
    rows = make_rows(s, g, p, make_times(GRIDS[grid](), p, n))
    return Setup(model, params, p, "velocity" if process in ("flow", "sit") else "eps", s, g, rows)


# solver, its arguments, process
SOLVES = [
    ("ddpm", {"variance": "learned"}, "vp_linear"),
    ("ddim", {"eta": 0.8}, "vp_linear"),
    ("euler", {}, "flow"),
    ("heun", {}, "flow"),
    ("dpmpp_2m", {}, "vp_linear"),
    ("euler_ancestral", {}, "vp_linear"),
    ("kdpm2", {"eta": 1.0}, "flow"),
    ("edm", {}, "ve"),
    ("restart", {}, "vp_linear"),
    ("pc", {}, "subvp"),
    ("flow_ab", {}, "flow"),
    ("sampler_scheduler", {}, "vp_linear"),
    ("mcg", {"measurement": 0.0, "mask": 0.0}, "vp_linear"),
    ("unipc", {"order": 3}, "vp_linear"),
    ("sa_solver", {}, "flow"),
    ("dc_solver", {"dc_order": 1}, "vp_linear"),
    ("deis", {}, "flow"),
    ("ipndm", {}, "flow"),
    ("pndm", {}, "vp_linear"),
    ("lms", {}, "flow"),
    ("dpm_solver_v3", {}, "flow"),
    ("bns", {"start": "midpoint"}, "flow"),
    ("ddss", {"eta": 0.5}, "vp_linear"),
    ("ltsl", {}, "flow"),
    ("iia", {"base": "edm"}, "vp_linear"),
    ("usf", {"order": 3, "corrector": True}, "vp_linear"),
    ("gotta_go_fast", {"relative": 1.0}, "vp_linear"),
    ("paradigms", {"tolerance": 0.0, "window": 3}, "vp_linear"),
    ("parataa", {"tolerance": 0.0}, "vp_linear"),
    ("deq", {"tolerance": 0.0}, "flow"),
    ("dpmpp_3m", {}, "flow"),
    ("dpmpp_2s", {"thresholding": 0.9}, "vp_linear"),
    ("dpmpp_3s", {}, "flow"),
    ("dpmpp_sde", {}, "vp_linear"),
    ("dpmpp_2m_sde", {"eta": 0.5}, "flow"),
    ("dpmpp_3m_sde", {}, "vp_linear"),
    ("dpm_solver_2m", {}, "vp_linear"),
    ("dpm_solver_3m", {}, "flow"),
    ("dpm_solver_2s", {"r": 0.5}, "vp_linear"),
    ("dpm_solver_3s", {}, "vp_linear"),
    ("dpm_solver_12", {}, "vp_linear"),
    ("dpm_solver_23", {}, "flow"),
    ("scire_2", {}, "vp_linear"),
    ("scire_3", {}, "flow"),
    ("seeds_1", {}, "flow"),
    ("seeds_2", {"prediction": "eps"}, "vp_linear"),
    ("seeds_3", {}, "flow"),
    ("pfdiff", {"k": 2}, "vp_linear"),
    ("gddim", {"order": 2, "corrector": True}, "vp_linear"),
    ("genie", {}, "flow"),
]
IN_EVERY_RUN = ("ddpm", "ddim", "euler", "heun", "dpmpp_2m", "edm", "sa_solver", "dpm_solver_12")
solves = pytest.mark.parametrize(
    ("solver", "arguments", "process"),
    [pytest.param(*s, marks=() if s[0] in IN_EVERY_RUN else pytest.mark.slow) for s in SOLVES],
    ids=[f"{s}-{'-'.join(map(str, a.values()))}-{p}" for s, a, p in SOLVES],
)


def test_every_solver_is_sampled_with():
    elsewhere = {"sscs", "cld_em"}  # of position and velocity: tests/test_augmented.py
    assert {s for s, _, _ in SOLVES} == set(SOLVERS) - elsewhere


# ---------------------------------------------------------------- the loop itself


def plain_loop(s: Setup, guided: bool):
    """The sampler as one would write it by hand, without seams."""

    def run(params, x, keys, cond, rows, scale):
        def body(carry, row):
            x, state = carry
            if guided:
                both = jnp.concatenate([cond, s.model.null(cond)])
                time = jnp.full(both.shape, row.model_time)
                output = forward(s.model, params, jnp.concatenate([x, x]), time, both)
                on, off = jnp.split(output.astype(jnp.float32), 2)
                output = off + scale * (on - off)
            else:
                output = forward(s.model, params, x, jnp.full(cond.shape, row.model_time), cond)
            prediction = P.predict(output, s.prediction, s.model.learn_sigma, x, row.level)
            return s.solver.step(prediction, x, state, row, noise.fold(keys, row.i + 1)), None

        return jax.lax.scan(body, (x, s.solver.init(x)), rows)[0][0]

    return run


def optimised(function):
    """Compiled as users have it."""
    return jax.jit(function, compiler_options=FULL)


@pytest.mark.parametrize(
    ("solver", "guide", "dtype"),
    [
        pytest.param("ddpm", "none", "float32", marks=pytest.mark.slow),
        ("ddpm", "cfg", "bfloat16"),
        pytest.param("dpmpp_2m", "cfg", "float32", marks=pytest.mark.slow),
        pytest.param("dpmpp_2m", "none", "float32", marks=pytest.mark.slow),
        pytest.param("dpmpp_2m", "none", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_neutral_sampler_is_bitwise_a_plain_loop(solver, guide, dtype):
    s = setup(solver, guide=guide, dtype=dtype)
    got, trace = optimised(s.sampler())(s.params, *s.inputs(), s.rows, 2.5)
    want = optimised(plain_loop(s, guide == "cfg"))(s.params, *s.inputs(), s.rows, 2.5)
    np.testing.assert_array_equal(got, want)
    assert got.dtype == jnp.float32 and np.all(np.isfinite(got))
    assert np.all(trace.computed["blocks"] == 1)


def test_plain_loop_in_python():
    """The scan against single calls of the network from Python, with the formulas of DDIM written out."""
    s = setup("ddim", process="vp_linear", n=3)
    abar = np.append(s.process.level(np.array([1000, 501, 1]) / 1000).alpha ** 2, 1.0)  # k = 999, 500, 0
    x, _, labels = s.inputs()
    got = np.asarray(s.run()[0])
    x = np.asarray(x, np.float64)
    for k, now, then in zip((999, 500, 0), abar[:-1], abar[1:], strict=True):
        time = jnp.full(labels.shape, k, jnp.float32)
        eps = np.asarray(network(s.model, s.params, jnp.asarray(x, jnp.float32), time, labels), np.float64)
        x0 = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
        x = np.sqrt(then) * x0 + np.sqrt(1 - then) * eps
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-4 * np.abs(x).max())


def test_labels_seeds_and_scale_matter():
    s = setup("ddim", guide="cfg")
    sampler = s.quick()
    base = np.asarray(sampler(s.params, *s.inputs(), s.rows, 2.0)[0])
    for inputs, scale in (((1, 1, 1), 0), 2.0), ((LABELS, 1), 2.0), ((LABELS, 0), 3.0):
        other = np.asarray(sampler(s.params, *s.inputs(*inputs), s.rows, scale)[0])
        assert np.abs(other - base).max() > 1e-3


# ---------------------------------------------------------------- one key per sample


@solves
def test_a_sample_does_not_depend_on_its_batch(solver, arguments, process):
    s = setup(solver, arguments, process=process, guide="cfg")
    whole = np.asarray(s.run(scale=1.5)[0])
    one = s.quick(labels=(0,))
    keys = noise.sample_keys(0, len(LABELS))
    for b in range(len(LABELS)):
        x, key, cond = s.inputs((LABELS[b],), keys=keys[b : b + 1])
        alone = np.asarray(one(s.params, x, key, cond, s.rows, 1.5)[0])
        np.testing.assert_allclose(whole[b], alone[0], rtol=1e-5, atol=1e-5 * np.abs(whole).max())


def test_other_samples_labels_and_keys_do_not_matter():
    s = setup("ddpm", {"variance": "small"}, guide="cfg")
    sampler, keys = s.quick(), noise.sample_keys(0, 3)
    base = sampler(s.params, *s.inputs(keys=keys), s.rows, 1.5)[0]
    others = jnp.concatenate([noise.sample_keys(9, 1), keys[1:2], noise.sample_keys(8, 1)])
    got = sampler(s.params, *s.inputs((1, LABELS[1], 2), keys=others), s.rows, 1.5)[0]
    np.testing.assert_array_equal(got[1], base[1])
    assert not np.allclose(got[0], base[0])


def test_keys_of_a_later_start_continue_the_run():
    a, b = noise.sample_keys(5, 8), noise.sample_keys(5, 3, start=5)
    np.testing.assert_array_equal(jax.random.key_data(a[5:]), jax.random.key_data(b))


def test_noise_is_standard_normal_and_differs_by_sample_and_evaluation():
    keys = noise.sample_keys(0, 4)
    like = jax.ShapeDtypeStruct((4, 50, 50), jnp.float32)
    draws = np.stack([noise.normal_like(noise.fold(keys, i), like) for i in range(3)])
    assert abs(draws.mean()) < 0.03 and abs(draws.std() - 1) < 0.03  # five standard errors of 30,000 draws
    correlation = np.corrcoef(draws.reshape(12, -1)) - np.eye(12)
    assert np.abs(correlation).max() < 0.1
    x = initial_noise(P.ve(), keys, (50, 50))
    np.testing.assert_allclose(x, 80.0 * draws[0], rtol=1e-6)


# ---------------------------------------------------------------- compilation, buffers, transfers


def counted(s: Setup) -> tuple[Setup, list[int]]:
    """The set-up with a network that counts how often it is traced."""
    traces = [0]

    def embed(*a):
        traces[0] += 1
        return s.model.embed(*a)

    return s._replace(model=s.model._replace(embed=embed)), traces


def test_one_compilation_for_seeds_scales_labels_etas_and_grids():
    s, traces = counted(setup("ddim", {"eta": 0.5}, guide="cfg", n=4))
    sampler = s.sampler()
    sampler(s.params, *s.inputs(), s.rows, 1.0)
    first = traces[0]
    assert first > 0
    results = []
    for seed in (1, 2):
        results.append(sampler(s.params, *s.inputs((1, 2, 0), seed), s.rows, 4.0 + seed)[0])
    for other in (
        setup("ddim", {"eta": 0.9}, guide="cfg", n=4),
        setup("ddim", {"eta": 0.5}, guide="cfg", n=4, grid="log_snr"),
    ):
        results.append(sampler(s.params, *s.inputs(), other.rows, 1.0)[0])
    assert traces[0] == first
    assert len({np.asarray(r).tobytes() for r in results}) == len(results)


def test_one_compilation_for_guidance_intervals():
    s, traces = counted(setup(guide="interval", guidance={"low": 0.3, "high": 0.8}, n=4))
    sampler = s.sampler()
    halves = [sampler(s.params, *s.inputs(), s.rows, 2.0)[1].halves.sum()]
    first = traces[0]
    for low, high in (0.0, 1.0), (0.9, 0.95):
        rows = setup(guide="interval", guidance={"low": low, "high": high}, n=4).rows
        halves.append(sampler(s.params, *s.inputs(), rows, 2.0)[1].halves.sum())
    assert traces[0] == first
    assert halves == [6, 8, 4]


def test_initial_noise_is_donated():
    s = setup()
    x, keys, cond = s.inputs()
    s.sampler()(s.params, x, keys, cond, s.rows, 1.0)
    assert x.is_deleted()
    assert not keys.is_deleted() and not cond.is_deleted()


def test_nothing_is_transferred_during_a_run():
    s = setup("ddpm", {"variance": "small"}, guide="interval", guidance={"low": 0.3, "high": 0.8})
    sampler, rows, scale = s.sampler(), jax.device_put(s.rows), jax.device_put(jnp.float32(2.0))
    sampler(s.params, *s.inputs(), rows, scale)
    x, keys, cond = s.inputs()
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(sampler(s.params, x, keys, cond, rows, scale))


def test_ahead_of_time_compilation_is_the_same_program():
    s = setup()
    want = s.sampler()(s.params, *s.inputs(), s.rows, 1.0)[0]
    compiled = s.sampler().lower(s.params, *s.inputs(), s.rows, 1.0).compile()
    np.testing.assert_array_equal(compiled(s.params, *s.inputs(), s.rows, 1.0)[0], want)


def test_on_step_hears_of_every_evaluation():
    s, heard = setup("heun", process="flow", n=3), []
    sampler = make_sampler(s.model, s.process, s.prediction, s.solver, on_step=lambda i: heard.append(int(i)))
    jax.block_until_ready(sampler(s.params, *s.inputs(), s.rows, 1.0))
    jax.effects_barrier()
    assert sorted(heard) == [0, 1, 2, 3, 4]


def test_what_is_watched_is_the_path():
    s, seen = setup("euler", process="flow", n=4), {}
    watch = lambda i, x, x0: seen.update({int(i): (np.array(x), np.array(x0))})  # noqa: E731
    x = np.array(s.inputs()[0])
    sampler = make_sampler(s.model, s.process, s.prediction, s.solver, watch=watch)
    last = sampler(s.params, *s.inputs(), s.rows, 1.0)[0]
    jax.effects_barrier()
    assert sorted(seen) == [0, 1, 2, 3]
    np.testing.assert_array_equal(seen[0][0], x)
    np.testing.assert_allclose(seen[3][1], last, atol=1e-6)  # the last step of a flow ends at x0


@pytest.mark.parametrize("solver", ["ddpm", "euler_ancestral"])
def test_noise_that_is_given_is_the_noise_of_the_steps(solver):
    s = setup(solver, n=3)
    x, keys, cond = s.inputs()
    drawn = [noise.normal(noise.fold(keys, e + 1), x.shape[1:]) for e in range(len(s.rows.i))]
    want = s.sampler()(s.params, *s.inputs(), s.rows, 1.0)[0]
    found = s.sampler()(s.params, x, noise.Given(jnp.stack(drawn, 1)), cond, s.rows, 1.0)[0]
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="one draw an evaluation"):
        noise.fold(noise.fold(noise.Given(jnp.stack(drawn, 1)), 1), 1)


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
def test_what_is_known_is_held(solver):
    s = setup(solver, process="flow", n=4)
    (x, keys, cond), x0 = s.inputs(), jnp.full(s.inputs()[0].shape, 0.25)
    free = jnp.zeros((*x.shape[:-1], 1)).at[:, :2].set(1.0)
    eps, plain = jnp.array(x), s.run()[0]
    found = s.sampler()(s.params, x, Held(keys, x0, eps, free), cond, s.rows, 1.0)[0]
    np.testing.assert_array_equal(found[:, 2:], x0[:, 2:])
    assert np.abs(found[:, :2] - x0[:, :2]).max() > 0.1 and np.abs(found[:, :2] - plain[:, :2]).max() > 1e-3
    everywhere = s.sampler()(s.params, s.inputs()[0], Held(keys, x0, eps, jnp.ones_like(free)), cond, s.rows, 1.0)[0]
    np.testing.assert_allclose(everywhere, plain, atol=1e-5)


def test_unknown_prediction_is_refused():
    s = setup()
    with pytest.raises(ValueError, match="unknown prediction 'noise'; allowed: eps, x0"):
        make_sampler(s.model, s.process, "noise", s.solver)


# ---------------------------------------------------------------- guidance


def test_scale_one_is_unguided():
    a, b = setup("dpmpp_2m"), setup("dpmpp_2m", guide="cfg")
    plain, guided = a.run()[0], b.run(scale=1.0)[0]
    np.testing.assert_allclose(plain, guided, rtol=1e-5, atol=1e-5 * np.abs(plain).max())


@pytest.mark.parametrize("channels", [None, 2])
def test_guidance_by_its_formula(channels):
    """One evaluation of DDIM to t = 0 returns x0, from which the guided eps and nothing else is read."""
    s = setup("ddim", guide="cfg", guidance={"channels": channels}, n=1, learn_sigma=True)
    x, _, labels = s.inputs()
    time = jnp.full(labels.shape, s.rows.model_time[0])
    on, off = (network(s.model, s.params, x, time, c)[..., :3] for c in (labels, s.model.null(labels)))
    guided = 3 if channels is None else min(channels, 3)
    eps = jnp.concatenate([(off + 4.0 * (on - off))[..., :guided], on[..., guided:]], -1)
    assert np.abs(on - off).max() > 0.01
    level = jax.tree.map(lambda a: a[0], s.rows.level)
    want = (x - level.sigma * eps) / level.alpha
    got = s.run(scale=4.0)[0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("channels", [None, 3])
def test_variance_is_never_guided(channels):
    guide, row = GUIDES["cfg"](channels=channels), None
    cond, null = jnp.asarray([1]), jnp.asarray([5])
    x = jnp.zeros((1, 2, 2, 4))

    def denoise(x, labels, row, state, half):
        return jnp.broadcast_to(labels[:, None, None, None] * 1.0, (2, 2, 2, 8)), state, half

    output, _, _, half = guide.apply(denoise, x, cond, null, 3.0, row, (), ())
    assert half == "both"
    guided = 4 if channels is None else 3
    np.testing.assert_array_equal(output[..., :guided], np.full((1, 2, 2, guided), 5 + 3.0 * (1 - 5)))
    np.testing.assert_array_equal(output[..., guided:], np.ones((1, 2, 2, 8 - guided)))


@pytest.mark.parametrize(("bounds", "same_as"), [((0.0, 1.0), "cfg"), ((0.999, 0.9991), "none")])
def test_interval_covers_all_or_nothing(bounds, same_as):
    """n = 4 evaluates at t = 1, 0.667, 0.334, 0.001; a bound between them switches nothing on."""
    s = setup(guide="interval", guidance={"low": bounds[0], "high": bounds[1]})
    got, trace = s.run(scale=3.0)
    want, other = setup(guide=same_as).run(scale=3.0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    np.testing.assert_array_equal(trace.halves, other.halves)


def test_interval_switches_by_time():
    """Guided at t = 0.667 and 0.334 only: the run is the concatenation of an unguided and a guided one."""
    s = setup(guide="interval", guidance={"low": 0.3, "high": 0.7})
    np.testing.assert_array_equal(s.rows.guided, [False, True, True, False])
    np.testing.assert_array_equal(s.rows.fresh, [True, True, False, False])
    got, trace = s.run(scale=3.0)
    np.testing.assert_array_equal(trace.halves, [1, 2, 2, 1])
    x, keys, cond = s.inputs()
    for guide, part in ("none", slice(0, 1)), ("cfg", slice(1, 3)), ("none", slice(3, 4)):
        rows = jax.tree.map(lambda a, part=part: a[part], s.rows)
        x, _ = setup(guide=guide)._replace(rows=rows).quick()(s.params, x, keys, cond, rows, 3.0)
    np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-5 * np.abs(x).max())


def test_outside_the_interval_the_unconditional_half_is_not_computed():
    """The loop's body holds one conditional whose branches multiply matrices of one and of two batches."""
    s = setup(guide="interval", guidance={"low": 0.3, "high": 0.7})
    program = jax.make_jaxpr(s.sampler())(s.params, *s.inputs(), s.rows, 3.0)
    conditionals = [e for e in equations(program.jaxpr) if e.primitive.name == "cond"]
    assert len(conditionals) == 1
    tokens = 4 * len(LABELS)
    sizes = [
        {e.outvars[0].aval.shape[0] for e in equations(branch.jaxpr) if e.primitive.name == "dot_general"}
        for branch in conditionals[0].params["branches"]
    ]
    one, two = sizes  # lax.cond keeps false first
    assert tokens in one and 2 * tokens not in one
    assert 2 * tokens in two and tokens not in two
    outside = [e for e in equations(program.jaxpr, into_cond=False) if e.primitive.name == "dot_general"]
    assert not outside


def equations(jaxpr, into_cond=True):
    """Every equation of a program, those of its inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name == "cond" and not into_cond:
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner, into_cond)


@pytest.mark.parametrize(
    ("guide", "arguments", "message"),
    [
        ("cfg", {"channels": 0}, "channels=0; allowed: 1 or more"),
        ("interval", {"low": 0.7, "high": 0.2}, "need 0 <= low <= high <= 1"),
        ("interval", {"low": -0.1}, "low=-0.1"),
        ("interval", {"high": 1.2}, "high=1.2"),
        ("interval", {"channels": -1}, "channels=-1"),
    ],
)
def test_bad_guidance_is_refused(guide, arguments, message):
    with pytest.raises(ValueError, match=message):
        GUIDES[guide](**arguments)


# ---------------------------------------------------------------- what a run costs


@pytest.mark.parametrize(
    ("solver", "process", "n", "guide", "evaluations", "halves"),
    [
        ("dpmpp_2m", "vp_linear", 12, "none", 12, 12),
        ("dpmpp_2m", "vp_linear", 12, "cfg", 12, 24),
        ("heun", "flow", 5, "cfg", 9, 18),
    ],
)
def test_evaluations_are_counted_per_half(solver, process, n, guide, evaluations, halves):
    s = setup(solver, process=process, n=n, guide=guide)
    assert len(s.rows.t) == evaluations
    trace = s.run(scale=2.0)[1]
    assert trace.halves.shape == (evaluations,) and trace.halves.sum() == halves
    assert trace.computed["blocks"].shape == (evaluations, s.model.stages[0].depth, 2, halves // evaluations)
    assert np.all(trace.computed["blocks"] == 1)


def test_trace_shows_what_a_cache_skipped():
    s = setup(guide="cfg", n=5)
    trace = s.run(scale=2.0, accelerator=CACHES["fora"](interval=2))[1]
    np.testing.assert_array_equal(trace.computed["blocks"].mean((1, 2, 3)), [1, 0, 1, 0, 1])
    assert trace.halves.sum() == 10
