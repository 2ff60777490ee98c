"""The drives of a run: solvers that decide in it or take several rows at once, against the scan; derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax.accel.caches import CACHES
from difax.accel.solvers import SOLVERS
from difax.core import noise
from difax.core.contracts import Solver
from difax.core.grids import GRIDS, make_times
from difax.core.guidance import GUIDES
from difax.core.process import PROCESSES
from difax.core.sample import initial_noise, make_rows, make_sampler
from tests.toys import tanh_stack, tiny_dit

N = 6
COND = jnp.asarray([3, 0, 4], jnp.int32)


def run(solver, process="flow", guide="cfg", n=N, scale=2.0, cond=COND, start=0, **more):
    """(samples, trace) of a tiny DiT."""
    model, params = tiny_dit()
    process, guide = PROCESSES[process](), GUIDES[guide]()
    prediction = "velocity" if process.name == "flow" else "eps"
    times = make_times(GRIDS["uniform"](), process, n)
    rows = make_rows(solver, guide, process, times, more.get("accelerator"), model.stages)
    keys = noise.sample_keys(0, len(cond), start)
    x = initial_noise(process, keys, model.input_shape)
    return make_sampler(model, process, prediction, solver, guide, **more)(params, x, keys, cond, rows, scale)


def decided(stop=0.0) -> Solver:
    """Euler's method on a flow, which asks for its times in the run; samples whose first value is above 0 go half as
    far at a time."""
    euler = SOLVERS["euler"]()

    def ask(x, state, row):
        return state["t"], state["t"] > stop

    def step(prediction, x, state, row, keys):
        to = jnp.maximum(state["t"] - state["h"], 0.0)
        x = x + (to - state["t"])[:, None, None, None] * (prediction.eps - prediction.x0)
        return x, {"t": jnp.where(to < 1e-6, 0.0, to), "h": state["h"]}

    def init(x):
        return {"t": jnp.ones(len(x)), "h": jnp.where(x[:, 0, 0, 0] > 0, 0.5 / N, 1.0 / N)}

    return euler._replace(
        grid=lambda process, times: euler.grid(process, np.linspace(1, 0, 2 * N + 3)),
        init=init,
        step=step,
        drive="while",
        ask=ask,
    )


def picard(wide: int) -> Solver:
    """Euler's method with the whole path kept; `wide` rows are evaluated at once, and each sample goes on by one."""
    euler = SOLVERS["euler"]()

    def init(x, rows):
        return {"at": jnp.zeros(len(x), jnp.int32), "x": jnp.repeat(x[:, None], len(rows.i) + 1, 1)}

    def ask(state, rows):
        index = jnp.minimum(state["at"][:, None] + jnp.arange(wide)[None], len(rows.i) - 1)
        points = jax.vmap(lambda x, i: x[i])(state["x"], index)
        return points, index, state["at"] < len(rows.i)

    def step(prediction, x, state, row, keys):
        one = jax.tree.map(lambda a: a[:, 0, None, None, None], row.coefficients)
        new, _ = euler.step(
            jax.tree.map(lambda a: a[:, 0], prediction), x[:, 0], (), row._replace(coefficients=one), keys
        )
        path = jax.vmap(lambda path, at, new: path.at[at + 1].set(new))(state["x"], state["at"], new)
        return new, {"at": state["at"] + 1, "x": path}

    return euler._replace(init=init, step=step, drive="window", ask=ask, window=wide)


def test_a_solver_that_decides_equals_the_scan_of_its_own_times():
    samples, trace = run(decided())
    firsts = np.asarray(initial_noise(PROCESSES["flow"](), noise.sample_keys(0, 3), (4, 4, 3)))[:, 0, 0, 0] > 0
    assert firsts.any() and not firsts.all()
    for i, half in enumerate(firsts):
        wanted, _ = run(SOLVERS["euler"](), n=2 * N if half else N)
        np.testing.assert_allclose(samples[i], wanted[i], rtol=2e-5, atol=2e-5)
    made = np.r_[np.full(N, 1.0), np.full(N, np.float32(firsts.mean())), 0, 0]
    np.testing.assert_allclose(trace.live, made)
    assert trace.halves.tolist() == [2.0] * (2 * N) + [0.0] * 2 and trace.unfinished == 0
    assert [float(a.sum()) for a in trace.computed["blocks"]] == [8.0] * (2 * N) + [0.0] * 2


def test_who_has_not_arrived_is_told():
    _, trace = run(decided(stop=-1.0))
    assert trace.unfinished == 1 and np.all(trace.live == 1)


@pytest.mark.parametrize("make", [decided, lambda: picard(3)], ids=["while", "window"])
def test_a_batch_equals_its_samples(make):
    many, _ = run(make())
    for i in range(3):
        one, _ = run(make(), cond=COND[i : i + 1], start=i)
        np.testing.assert_allclose(one[0], many[i], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("guide", ["none", "cfg"])
def test_a_window_is_evaluated_as_its_rows_are(guide):
    samples, trace = run(picard(3), guide=guide)
    wanted, one = run(SOLVERS["euler"](), guide=guide)
    np.testing.assert_allclose(samples, wanted, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(trace.halves, 3 * one.halves)
    assert trace.unfinished == 0 and np.all(trace.live == 1)


@pytest.mark.parametrize(
    "make, cache, message",
    [
        (decided, CACHES["fora"](2), "cache fora plans"),
        (lambda: picard(2), CACHES["teacache"](0.1, coefficients=(1.0, 0.0)), "cache teacache goes from one"),
        (lambda: SOLVERS["euler"]()._replace(derivatives=True), CACHES["fora"](2), "differentiates"),
    ],
    ids=["planned", "window", "derivatives"],
)
def test_caches_that_cannot_act_are_refused(make, cache, message):
    with pytest.raises(ValueError, match=message):
        run(make(), accelerator=cache)


def test_guidance_over_a_part_and_conditions_ahead_are_refused():
    model, _ = tiny_dit()
    times = np.linspace(1, 0, N + 1)
    with pytest.raises(ValueError, match="guide: guidance that differs"):
        make_rows(decided(), GUIDES["interval"](0.2, 0.6), PROCESSES["flow"](), times)
    with pytest.raises(ValueError, match="ahead"):
        make_sampler(model, PROCESSES["flow"](), "velocity", decided(), ahead=True)


def test_a_cache_that_decides_in_the_run_goes_with_such_a_solver():
    cache = CACHES["teacache"](1e9, coefficients=(1.0, 0.0))
    samples, trace = run(decided(), accelerator=cache)
    assert np.isfinite(samples).all() and trace.computed["blocks"][2:].sum() < 8 * N


@pytest.mark.parametrize("process", ["flow", "vp_sde"])
def test_derivatives_of_the_prediction(process):
    """Against differences of predictions, along a direction in x and along the time; the transpose by a product."""
    rng = np.random.default_rng(0)
    dx, cotangent = (rng.normal(size=(3, 4, 8)) for _ in range(2))
    with jax.enable_x64(True):
        dx, cotangent = jnp.asarray(dx), jnp.asarray(cotangent)

        def predicted(which, shift=0.0, time=0.0):
            """One of the outputs of a step, at a point that is moved by `shift` of dx, at another time."""
            euler = SOLVERS["euler"]()

            def start(x, row, keys):
                return (x + shift * dx).astype(x.dtype)

            def grid(p, times):
                return euler.grid(p, np.array([0.7 + time, 0.3]))

            def step(prediction, x, state, row, keys):
                out = (prediction.x0, prediction.eps, *prediction.jvp(dx, 0.0), *prediction.jvp(0 * dx, 1.0))
                both = prediction.vjp(cotangent, 2 * cotangent)
                return jnp.stack([*out, both])[which], state

            model, params, _ = tanh_stack()
            p = PROCESSES[process]()
            solver = euler._replace(grid=grid, start=start, step=step, derivatives=True)
            rows = make_rows(solver, GUIDES["cfg"](), p, np.array([0.7, 0.3]))
            keys = noise.sample_keys(0, 3)
            x = noise.normal(keys, model.input_shape, jnp.float64)
            kind = "velocity" if process == "flow" else "eps"
            sampler = make_sampler(model, p, kind, solver, GUIDES["cfg"]())
            return np.asarray(sampler(params, x, keys, jnp.asarray([0.8, 1.0, 1.1]), rows, 2.0)[0])

        d = 1e-7  # the toy's time runs to 1000
        _, _, along_x0, along_eps, time_x0, time_eps, pulled = map(predicted, range(7))
        for got, which, moved in (
            (along_x0, 0, {"shift": d}),
            (along_eps, 1, {"shift": d}),
            (time_x0, 0, {"time": d}),
            (time_eps, 1, {"time": d}),
        ):
            low = {key: -value for key, value in moved.items()}
            slope = (predicted(which, **moved) - predicted(which, **low)) / (2 * d)
            np.testing.assert_allclose(got, slope, rtol=1e-4, atol=1e-4)
    product = np.sum(np.asarray(cotangent) * along_x0 + 2 * np.asarray(cotangent) * along_eps)
    np.testing.assert_allclose(np.sum(pulled * np.asarray(dx)), product, rtol=1e-10)
