"""Solvers of k-diffusion, EDM, Score SDE and Restart, consistency steps, flows, and solvers that are made of others."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax.accel.solvers import SOLVERS
from difax.core import noise
from difax.core.contracts import Prediction, Solver
from difax.core.grids import GRIDS, check_times, make_times
from difax.core.guidance import GUIDES, unguided
from difax.core.process import PROCESSES, flow, subvp, ve, vp_linear, vp_sde
from difax.core.sample import initial_noise, make_rows, make_sampler
from difax.registry import make
from tests.oracles import kdiffusion as oracle
from tests.test_solvers import exact  # noqa: F401, a fixture
from tests.toys import MIXTURE, predict, solve, tiny_dit

GOLDEN = Path(__file__).parent / "golden" / "kdiffusion.npz"
EVERY = tuple(PROCESSES)
MIXED_TIMES = np.array([0.95, 0.8, 0.55, 0.5, 0.2, 0.05, 0.0])


class Case(NamedTuple):
    """One solver with one setting: how it is built and what it promises."""

    solver: str
    arguments: dict[str, Any] = {}
    order: float | None = None  # of convergence; None for a stochastic one
    evaluations: Any = lambda n: n
    noisy: bool = False

    def __str__(self) -> str:
        return "-".join([self.solver, *(f"{k}={v}" for k, v in self.arguments.items())])

    def make(self) -> Solver:
        return SOLVERS[self.solver](**self.arguments)


def twice(n: int) -> int:
    return 2 * n - 1


CASES = [
    Case("ddim", {"gamma": 0.3}, noisy=True),
    Case("ddim", {"gamma": 1.0}, noisy=True),
    Case("euler_ancestral", noisy=True),
    Case("kdpm2", order=2, evaluations=twice),
    Case("kdpm2", {"space": "flow"}, order=2, evaluations=twice),
    Case("kdpm2", {"eta": 1.0}, evaluations=twice, noisy=True),
    Case("edm", evaluations=twice, noisy=True),
    Case("edm", {"order": 1, "s_tmax": float("inf")}, noisy=True),
    Case("edm", {"s_churn": 0.0}, order=2, evaluations=twice),
    Case("restart", evaluations=None, noisy=True),
    Case("pc", evaluations=lambda n: 2 * n, noisy=True),
    Case("pc", {"predictor": "ancestral", "corrections": 2}, evaluations=lambda n: 3 * n, noisy=True),
    Case("flow_ab", order=2),
    Case("flow_ab", {"order": 3}, order=3),
    Case("flow_ab", {"order": 4}),
    Case("sampler_scheduler", evaluations=None, noisy=True),
    Case("sampler_scheduler", {"first": "euler", "second": "kdpm2", "switch": 0.3}, evaluations=None),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def module_of(solver: str):
    return sys.modules[f"difax.accel.solvers.{solver}"]


@pytest.fixture
def given_noise(monkeypatch):
    """Makes the solvers take their keys for the noise itself."""
    for module in ("linear", "edm"):
        monkeypatch.setattr(module_of(module), "draw", lambda keys, x, k: keys)
    monkeypatch.setattr(module_of("pc"), "normal_like", lambda keys, x: keys)


def begun(solver: Solver, process: Any, times: np.ndarray, x: Any, key: Any) -> Any:
    """What a solver makes of the initial noise."""
    if solver.start is None:
        return x
    return solver.start(x, jax.tree.map(lambda a: a[0], solver.grid(process, np.asarray(times, np.float64))), key)


def ratio(process: Any, times: np.ndarray) -> np.ndarray:
    """sigma/alpha."""
    level = process.level(times)
    return level.sigma / level.alpha


def denoised(y: np.ndarray, rho: float) -> np.ndarray:
    """E[x0 | y] of the mixture in EDM's variables, y = x0 + rho eps."""
    return MIXTURE.x0(y, 1.0, rho)


# ---------------------------------------------------------------- order of convergence


@pytest.mark.parametrize(
    ("case", "process"), [(c, p) for c in CASES if c.order for p in ("vp_linear", "flow")], ids=str
)
def test_order_of_convergence(case, process, exact):  # noqa: F811
    p, steps, errors = PROCESSES[process](), (10, 20, 40, 80, 160), []
    with jax.enable_x64(True):
        for n in steps:
            times = p.inverse(np.linspace(-3.0, 3.0, n + 1))
            ends = p.level(times[[0, -1]])
            end = solve(case.make(), p, times, jnp.asarray(exact[0] * ends.alpha[0]), predict)[-1]
            errors.append(np.abs(np.asarray(end) / ends.alpha[1] - exact[1]).max())
    measured = -np.diff(np.log(errors)) / np.log(2)
    print(f"{case} on {process}: order by doubling {measured.round(2)}, error at 160 {errors[-1]:.1e}")
    assert abs(measured[-1] - case.order) < 0.2


@pytest.mark.parametrize("case", [c for c in CASES if c.order], ids=str)
def test_single_precision_does_not_grow(case, exact):  # noqa: F811
    p, errors = vp_linear(), []
    for n in (10, 40, 160, 640):
        times = p.inverse(np.linspace(-3.0, 3.0, n + 1))
        ends = p.level(times[[0, -1]])
        x = jnp.asarray(exact[0] * ends.alpha[0], jnp.float32)
        end = solve(case.make(), p, times, x, predict)[-1]
        assert end.dtype == jnp.float32
        errors.append(np.abs(np.asarray(end) / ends.alpha[1] - exact[1]).max() / np.abs(exact[1]).max())
    print(f"{case}: {[f'{e:.1e}' for e in errors]}")
    assert all(after < max(before, 1e-5) for before, after in zip(errors[:-1], errors[1:], strict=True))


# ---------------------------------------------------------------- the papers' own algorithms


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("process", ["vp_linear", "ve", "subvp"])
def test_kdpm2_by_k_diffusion(process, eta, given_noise):
    p = PROCESSES[process]()
    rho, rng = ratio(p, MIXED_TIMES), np.random.default_rng(1)
    y, z = rng.normal(size=(4, 8)) * rho[0], rng.normal(size=(11, 4, 8))
    wanted = oracle.dpm_2(y, denoised, rho, eta, z[1::2])
    with jax.enable_x64(True):
        x = jnp.asarray(y * p.level(MIXED_TIMES[0]).alpha)
        solver = SOLVERS["kdpm2"](eta, "sigma")
        path = solve(solver, p, MIXED_TIMES, x, predict, z)
        after = [*solver.grid(p, MIXED_TIMES).level.alpha[1:], 1.0]
    assert len(path) == 12
    for got, alpha, y in zip(path[1:], after, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(got) / alpha, y, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("process", ["ve", "vp_linear"])
def test_edm_by_algorithm_2(process, order, given_noise):
    p = PROCESSES[process]()
    times = make_times(GRIDS["karras"](), p, 8)
    rho, rng = ratio(p, times), np.random.default_rng(2)
    churn = dict(s_churn=3.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.007)
    z = rng.normal(size=(8, 4, 8))
    y = rng.normal(size=(4, 8)) * rho[0]
    wanted = oracle.edm_stochastic(y, denoised, rho, 3.0, 0.05, 50.0, 1.007, z, order)
    quiet = np.zeros_like(z[0])
    keys = [*z[1:], quiet] if order == 1 else [a for each in z[1:] for a in (quiet, each)] + [quiet]
    with jax.enable_x64(True):
        solver = SOLVERS["edm"](order, space="sigma", **churn)
        x = begun(solver, p, times, jnp.asarray(y * p.level(times[0]).alpha), z[0])
        got = solve(solver, p, times, x, predict, keys)[-1]
    np.testing.assert_allclose(got, wanted, rtol=1e-7, atol=1e-7)
    levels = ratio(p, solver.grid(p, times).t)
    assert np.sum(np.diff(levels) > 0) >= (0 if order == 1 else 3)  # levels do rise


def test_edm_without_churn_is_heun():
    for a, b in zip(
        *(jax.tree.leaves(s.grid(vp_linear(), MIXED_TIMES)) for s in (SOLVERS["edm"](s_churn=0.0), SOLVERS["heun"]())),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_edm_begins_with_noise_where_the_first_level_is_churned(given_noise):
    p, times = ve(), make_times(GRIDS["karras"](), ve(sigma_max=40.0), 6)
    p = ve(sigma_max=80.0)
    times = p.inverse(-np.log(np.array([40.0, 10.0, 1.0])))
    solver, z = SOLVERS["edm"](), np.ones((1, 8))
    x = np.asarray(begun(solver, p, times, jnp.zeros((1, 8)), z))
    hat = 40 * np.sqrt(2)
    np.testing.assert_allclose(x, 1.003 * np.sqrt(hat**2 - 40**2) * z, rtol=1e-5)
    np.testing.assert_allclose(p.level(solver.grid(p, times).t[0]).sigma, hat)
    # at the noisiest level that the process has there is no higher one
    top = p.inverse(-np.log(np.array([80.0, 10.0, 1.0])))
    x = begun(SOLVERS["edm"](s_tmax=float("inf")), p, top, jnp.ones((1, 8)), z)
    np.testing.assert_allclose(x, 1.0, rtol=1e-6)


@pytest.mark.parametrize("process", ["ve", "vp_linear"])
@pytest.mark.parametrize("plan", [{"0": [3, 2, 0.06, 0.30]}, {"0": [4, 1, 5.0, 11.0], "1": [3, 3, 0.06, 0.30]}])
def test_restart_by_the_authors_algorithm(process, plan, given_noise):
    p = PROCESSES[process]()
    times = make_times(GRIDS["karras"](), p, 10)
    rho, rng = ratio(p, times), np.random.default_rng(3)
    z = rng.normal(size=(9, 4, 8))
    y = rng.normal(size=(4, 8)) * rho[0]
    wanted = oracle.restart(y, denoised, rho, plan, 1.003, iter(z))
    with jax.enable_x64(True):
        solver = SOLVERS["restart"](plan, space="sigma")
        rows = solver.grid(p, times)
        rises = np.flatnonzero(rows.coefficients.weights[:, 0, -1] > 0)
        keys = np.zeros((len(rows.t), 4, 8))
        keys[rises] = z[: len(rises)]
        got = solve(solver, p, times, jnp.asarray(y * p.level(times[0]).alpha), predict, keys)[-1]
    assert len(rises) == sum(k for _, k, _, _ in plan.values())
    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)
    assert rows.step.tolist() == sorted(rows.step) and set(np.diff(rows.step)) <= {0, 1}


def test_restart_goes_down_to_the_lowest_level_and_then_to_zero():
    p = vp_linear()
    times = make_times(GRIDS["karras"](), p, 6)
    rows = SOLVERS["restart"]([[4, 2, 0.0, 0.5]]).grid(p, times)
    inside = rows.t[len(SOLVERS["heun"]().grid(p, times).t) :]
    assert len(inside) == 2 * (2 * 4 - 1)
    np.testing.assert_allclose(inside[-1:], 1e-3, rtol=1e-6)
    np.testing.assert_allclose(ratio(p, inside[:1]), 0.5, rtol=1e-6)


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral", "euler_maruyama"])
@pytest.mark.parametrize("process", ["ve", "vp_sde"])
def test_predictor_corrector_by_the_authors_steps(process, predictor, given_noise):
    p, rng = PROCESSES[process](), np.random.default_rng(4)
    times = np.array([0.9, 0.7, 0.4, 0.2, 0.1])
    z = rng.normal(size=(12, 4, 8))
    x = rng.normal(size=(4, 8)) * p.level(times[0]).sigma
    with jax.enable_x64(True):
        path = solve(SOLVERS["pc"](predictor, 2, 0.1), p, times, jnp.asarray(x), predict, z)
    assert len(path) == 13
    for j in range(4):
        t, s = p.level(times[j]), p.level(times[j + 1])
        a2 = (t.alpha / s.alpha) ** 2
        dt = times[j] - times[j + 1]

        def score(x, t=t):
            return -MIXTURE.eps(x, t.alpha, t.sigma) / t.sigma

        for k in (3 * j, 3 * j + 1):
            x = oracle.langevin(x, score(x), a2, 0.1, z[k])
            np.testing.assert_allclose(path[k + 1], x, rtol=1e-9, atol=1e-9)
        draw = z[3 * j + 2]
        if predictor == "reverse_diffusion":
            if process == "ve":
                x = oracle.reverse_diffusion_ve(x, score(x), t.sigma, s.sigma, draw)
            else:
                x = oracle.reverse_diffusion_vp(x, score(x), 1 - a2, draw)
        elif predictor == "euler_maruyama":
            if process == "ve":
                slope = 2 * t.sigma**2 * np.log(40000.0)
                x = x + slope * score(x) * dt + np.sqrt(slope * dt) * draw
            else:
                x = oracle.maruyama_vp(x, score(x), 0.1 + 19.9 * times[j], dt, draw)
        elif process == "ve":
            x = oracle.ancestral_ve(x, score(x), t.sigma, s.sigma, draw)
        else:
            tilde = (1 - a2) * s.sigma**2 / t.sigma**2
            x = (x + (1 - a2) * score(x)) / np.sqrt(a2) + np.sqrt(tilde) * draw
        np.testing.assert_allclose(path[3 * j + 3], x, rtol=1e-9, atol=1e-9)
        x = np.asarray(path[3 * j + 3])


@pytest.mark.parametrize("name", ["ddim-gamma=1.0", "ddim-gamma=0.3"])
@pytest.mark.parametrize("process", ["vp_sde", "ve", "flow"])
def test_consistency_steps_go_down_and_up(name, process, given_noise):
    """DDIM without noise to (1 - gamma) s, then the forward process up to s."""
    (case,) = [c for c in CASES if str(c) == name]
    p, rng, gamma = PROCESSES[process](), np.random.default_rng(5), case.arguments["gamma"]
    x, z = rng.normal(size=(4, 8)), rng.normal(size=(6, 4, 8))
    with jax.enable_x64(True):
        path = solve(case.make(), p, MIXED_TIMES, jnp.asarray(x), predict, z)
    for j in range(6):
        t = p.level(MIXED_TIMES[j])
        x0, eps = (f(np.asarray(path[j]), t.alpha, t.sigma) for f in (MIXTURE.x0, MIXTURE.eps))
        low, s = p.level((1 - gamma) * MIXED_TIMES[j + 1]), p.level(MIXED_TIMES[j + 1])
        a = s.alpha / low.alpha
        wanted = a * (low.alpha * x0 + low.sigma * eps) + np.sqrt(s.sigma**2 - (a * low.sigma) ** 2) * z[j]
        np.testing.assert_allclose(path[j + 1], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_flow_multistep_by_adams_and_bashforth(order):
    p, times = flow(), np.linspace(0.95, 0.0, 9)
    x = np.random.default_rng(2).normal(size=(4, 8))
    with jax.enable_x64(True):
        got = solve(SOLVERS["flow_ab"](order), p, times, jnp.asarray(x), predict)[-1]
    wanted = oracle.adams_bashforth(x, lambda x, t: MIXTURE.eps(x, 1 - t, t) - MIXTURE.x0(x, 1 - t, t), times, order)
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- FastDPM


@pytest.mark.parametrize("spacing", ["linear", "quadratic"])
@pytest.mark.parametrize("n", [5, 20, 100])
def test_fastdpm_levels_by_the_authors_search(spacing, n):
    p = vp_linear()
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    wanted = oracle.fastdpm_var(1e-4, 1.0 if spacing == "linear" else 100.0, n, abar[-1], spacing)
    times = make_times(GRIDS["fastdpm"]("var", spacing), p, n)
    np.testing.assert_allclose(p.level(times[:-1]).alpha[::-1] ** 2, wanted, rtol=1e-9)


def test_fastdpm_with_all_steps_is_the_process_itself():
    times = make_times(GRIDS["fastdpm"](), vp_linear(), 1000)
    np.testing.assert_allclose(times, np.arange(1000, -1, -1) / 1000, atol=1e-12)


@pytest.mark.parametrize("n", [6, 10, 50])
def test_fastdpm_steps_by_the_authors_rule(n):
    p = vp_linear()
    k = lambda times: np.round(times[:-1] * 1000 - 1).astype(int).tolist()[::-1]  # noqa: E731
    assert k(make_times(GRIDS["fastdpm"]("step"), p, n)) == [int(np.floor(i * 999 / (n - 1))) for i in range(n)]
    quadratic = [int(v) for v in np.linspace(0, np.sqrt(800), n) ** 2]
    if n < 50:
        assert k(make_times(GRIDS["fastdpm"]("step", "quadratic"), p, n)) == quadratic
    else:  # the authors evaluate step 0 twice
        with pytest.raises(ValueError, match="must decrease strictly"):
            make_times(GRIDS["fastdpm"]("step", "quadratic"), p, n)


def test_fastdpm_between_the_steps_is_the_gamma_function_to_a_thirtieth_of_a_step():
    p, k = vp_linear(), np.linspace(0, 998.99, 4000)
    level = np.array([oracle.fastdpm_level(t, 1e-4, 0.02, 1000) for t in k])
    told = p.model_time(p.inverse(0.5 * (np.log(level) - np.log1p(-level))))
    print(f"largest difference of the times that the network is told: {np.abs(told - k).max():.4f} steps")
    assert np.abs(told - k).max() < 0.03


# ---------------------------------------------------------------- diffusers' schedulers

# golden case -> our solver, our process
DIFFUSERS = {
    "kdpm2": (SOLVERS["kdpm2"](space="sigma"), vp_linear()),
    "kdpm2_ancestral": (SOLVERS["kdpm2"](1.0, "sigma"), vp_linear()),
    "euler_ancestral": (SOLVERS["euler_ancestral"](), vp_linear()),
    "edm_churn": (SOLVERS["edm"](1, 6.0, 0.05, 50.0, 1.007), ve()),
    "lcm": (SOLVERS["ddim"](gamma=1.0, boundary=10.0), vp_linear()),
    "tcd": (SOLVERS["ddim"](gamma=0.3), vp_linear()),
    "flow_lcm": (SOLVERS["ddim"](gamma=1.0), flow()),
    "flow_stochastic": (SOLVERS["ddim"](gamma=1.0), flow()),
}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_trajectory_of_diffusers(name, given_noise):
    solver, process = DIFFUSERS[name]
    with np.load(GOLDEN) as golden:
        assert {key.rpartition(".")[0] for key in golden} == set(DIFFUSERS)
        t, wanted, draws = (golden[f"{name}.{key}"] for key in ("t", "path", "noise"))
    x = jnp.asarray(wanted[0])
    if solver.start is not None:
        x, wanted, draws = begun(solver, process, t, x, draws[0]), wanted[1:], draws[1:]
    path = np.stack(solve(solver, process, t, x, predict, draws))
    assert path.dtype == np.float32
    error = (np.abs(path - wanted).max((1, 2)) / np.abs(wanted).max((1, 2))).max()
    print(f"{name}: {error:.1e}")
    assert error < 1e-5


def test_boundary_scaling_changes_early_steps_alone():
    """At the first discrete step the network counts for nothing, from the tenth on it is all but a millionth."""
    p = vp_linear()
    weights = SOLVERS["ddim"](gamma=1.0, boundary=10.0).grid(p, np.array([0.5, 0.011, 0.001, 0.0])).coefficients.weights
    np.testing.assert_allclose(weights[-1, 0, :2], [1, 0], atol=1e-12)
    np.testing.assert_allclose(weights[1, 0, :2], [0.25 / (100**2 + 0.25), 1], rtol=2e-4)


# ---------------------------------------------------------------- means and covariances


SIZE = 64
MEAN, DEVIATION = 0.4, np.where(np.arange(SIZE) % 2, 0.5, 1.2)


def gaussian(x: jax.Array, level: Any) -> Prediction:
    """A perfect network for N(MEAN, diag DEVIATION^2)."""
    square = jnp.broadcast_to(jnp.asarray(DEVIATION**2, x.dtype), x.shape)
    x0 = MEAN + level.alpha * square / (level.alpha**2 * square + level.sigma**2) * (x - level.alpha * MEAN)
    eps = level.sigma / (level.alpha**2 * square + level.sigma**2) * (x - level.alpha * MEAN)  # not lost in rounding
    return Prediction(x0, eps, None)


def drawn(solver: Solver, process: Any, times: np.ndarray, count: int, first: int = 0, denoise: Any = gaussian) -> Any:
    """Samples first ... first + count - 1, from the exact law at the first time, as the sampler draws them."""
    rows = make_rows(solver, unguided(), process, times)
    keys = noise.sample_keys(3, count, first)
    start = process.level(times[0])
    spread = np.sqrt(start.alpha**2 * DEVIATION**2 + start.sigma**2)

    @jax.jit
    def run(rows, keys):
        x = start.alpha * MEAN + jnp.asarray(spread, jnp.float32)[None] * noise.normal(noise.fold(keys, 0), (SIZE,))
        if solver.start is not None:
            x = solver.start(x, jax.tree.map(lambda a: a[0], rows), noise.fold(keys, len(rows.i) + 1))

        def body(carry, row):
            x, state = carry
            return solver.step(denoise(x, row.level), x, state, row, noise.fold(keys, row.i + 1)), None

        return jax.lax.scan(body, (x, solver.init(x)), rows)[0][0]

    return np.asarray(run(jax.tree.map(jnp.asarray, rows), keys))


# case, process, steps
STOCHASTIC = [
    (Case("euler_ancestral"), "vp_linear", 300),
    (Case("kdpm2", {"eta": 1.0}), "vp_sde", 150),
    (Case("kdpm2", {"eta": 1.0}), "flow", 150),
    (Case("edm", {"s_noise": 1.0}), "ve", 60),
    (Case("restart", {"s_noise": 1.0, "plan": [[6, 3, 0.2, 2.0]]}), "ve", 60),
    (Case("pc", {"snr": 0.1}), "vp_sde", 150),
    (Case("pc", {"snr": 0.1}), "subvp", 150),
    (Case("pc", {"snr": 0.1, "predictor": "euler_maruyama"}), "subvp", 150),
    (Case("pc", {"snr": 0.1, "predictor": "ancestral"}), "ve", 150),
    (Case("sampler_scheduler"), "vp_sde", 200),
]
EVERY_RUN = ("edm", "restart", "sampler_scheduler")


@pytest.mark.parametrize(
    ("case", "process", "n"),
    [
        pytest.param(*s, marks=() if s[0].solver in EVERY_RUN or s[1] == "subvp" else pytest.mark.slow)
        for s in STOCHASTIC
    ],
    ids=[f"{c}-{p}" for c, p, _ in STOCHASTIC],
)
def test_mean_and_covariance_of_a_gaussian(case, process, n):
    p = PROCESSES[process]()
    x = drawn(case.make(), p, make_times(GRIDS["karras" if process != "vp_linear" else "log_snr"](), p, n), 1500)
    covariance = np.cov(x.T)
    mean, spread = x.mean(0), np.sqrt(np.diag(covariance)) / DEVIATION
    print(f"{case} on {process}: mean {mean.mean():.3f}, deviations {spread.min():.3f} to {spread.max():.3f}")
    assert np.abs(mean - MEAN).max() < 0.15 and abs(mean.mean() - MEAN) < 0.02
    for some_of in (DEVIATION == 0.5, DEVIATION == 1.2):
        assert abs(spread[some_of].mean() - 1) < 0.03
    correlation = covariance / np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    assert np.abs(correlation - np.eye(SIZE)).max() < 0.15


@pytest.mark.parametrize("case", [c for c in CASES if c.noisy], ids=str)
def test_a_batch_is_its_singles(case):
    p = vp_sde()
    times = make_times(GRIDS["karras"](), p, 4)
    together = drawn(case.make(), p, times, 3)
    np.testing.assert_array_equal(together, drawn(case.make(), p, times, 3))
    np.testing.assert_allclose(
        drawn(case.make(), p, times, 1, 2), together[2:], rtol=1e-4, atol=1e-5
    )  # sums differ in order
    assert np.abs(together[0] - together[1]).max() > 0.01


# ---------------------------------------------------------------- what holds for all of them


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize(
    ("case", "process"),
    [pytest.param(c, p, marks=() if p in ("vp_sde", "flow") else pytest.mark.slow) for c in CASES for p in EVERY],
    ids=str,
)
def test_a_perfectly_known_image_is_reached(case, process, n, given_noise):
    """If the network always says x0 = c, then every solver ends at c on every process and grid, in any noise."""
    p, c = PROCESSES[process](), np.linspace(-1, 1, 8)[None]

    def certain(x, level):
        return Prediction(c, (x - level.alpha * c) / level.sigma, None)

    draws = np.random.default_rng(0).normal(size=(40, 1, 8))
    with jax.enable_x64(True):
        for grid in ("uniform", "log_snr"):
            times = make_times(GRIDS[grid](), p, n)
            solver = case.make()
            x = begun(solver, p, times, jnp.asarray(draws[-1] * p.prior_std), draws[-2])
            np.testing.assert_allclose(solve(solver, p, times, x, certain, draws)[-1], c, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("n", [1, 2, 10])
@cases
def test_rows_are_finite_single_precision_and_counted(case, n):
    for process in EVERY:
        p = PROCESSES[process]()
        for grid in ("uniform", "karras", "fastdpm"):
            times = make_times(GRIDS[grid](), p, n)
            rows = make_rows(case.make(), unguided(), p, times)
            e = len(rows.i)
            assert case.evaluations is None or e == case.evaluations(n)
            for leaf in jax.tree.leaves(rows):
                assert leaf.shape[0] == e and leaf.dtype in (np.float32, np.int32, np.bool_)
                assert np.all(np.isfinite(leaf))
            assert rows.i.tolist() == list(range(e)) and rows.fresh.tolist() == [True] + [False] * (e - 1)
            assert rows.step.tolist() == sorted(rows.step) and rows.step[0] == 0
            assert np.all((rows.t > 0) & (rows.t <= 1))


# ---------------------------------------------------------------- one solver and then another


@pytest.mark.parametrize("switch", [0.0, 0.5, 1.0])
def test_sampler_scheduler_is_the_pure_solvers_at_its_ends(switch, given_noise):
    p, rng = vp_linear(), np.random.default_rng(6)
    first, second = SOLVERS["ddim"](0.7), SOLVERS["dpmpp_2m"]()
    x, z = rng.normal(size=(4, 8)), rng.normal(size=(6, 4, 8))
    with jax.enable_x64(True):
        both = SOLVERS["sampler_scheduler"](first, second, switch)
        got = solve(both, p, MIXED_TIMES, jnp.asarray(x), predict, z)
        early = {0.0: 6, 0.5: 3, 1.0: 0}[switch]  # the step from 0.5 is the second's
        path = [jnp.asarray(x)]
        if early:
            path = solve(first, p, MIXED_TIMES[: early + 1], path[0], predict, z)
        if early < 6:
            path += solve(second, p, MIXED_TIMES[early:], path[-1], predict)[1:]
    for a, b in zip(got, path, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_sampler_scheduler_hands_on_the_first_solvers_noise(given_noise):
    p = ve()
    times = p.inverse(-np.log(np.array([40.0, 10.0, 1.0, 0.1])))
    edm = SOLVERS["edm"]()
    both = SOLVERS["sampler_scheduler"](edm, "heun", float(times[2]))
    a, b = (begun(s, p, times, jnp.ones((1, 8)), np.ones((1, 8))) for s in (both, edm))
    np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="second begins with noise"):
        SOLVERS["sampler_scheduler"]("heun", edm)


# ---------------------------------------------------------------- inverse problems

CORRELATED = np.array([[1.0, 0.8, 0.3], [0.8, 1.0, 0.2], [0.3, 0.2, 1.0]])


def correlated(x: jax.Array, level: Any) -> Prediction:
    """A perfect network for N(0, CORRELATED), with the transpose of its derivative."""

    def at(x):
        gain = level.alpha * CORRELATED @ jnp.linalg.inv(level.alpha**2 * CORRELATED + level.sigma**2 * jnp.eye(3))
        x0 = x @ gain.T
        return x0, (x - level.alpha * x0) / level.sigma

    (x0, eps), pull = jax.vjp(at, x)
    return Prediction(x0, eps, None, vjp=lambda dx0, deps: pull((dx0, deps))[0])


@pytest.mark.parametrize("by", ["mask", "operator"])
def test_mcg_steps_by_the_paper(by, monkeypatch, given_noise):
    p, rng = vp_linear(), np.random.default_rng(7)
    monkeypatch.setattr(noise, "fold", lambda keys, index: keys)
    monkeypatch.setattr(noise, "normal", lambda keys, shape, dtype: jnp.broadcast_to(0.7, (4, *shape)))
    a = np.eye(3)[:1] if by == "mask" else np.array([[0.6, 0.8, 0.0]])  # orthonormal rows
    x, z = rng.normal(size=(4, 3)), rng.normal(size=(4, 4, 3))
    times, y = np.array([0.9, 0.6, 0.3, 0.1, 0.0]), 1.3
    measured = dict(mask=np.eye(3)[0]) if by == "mask" else dict(operator=lambda x: x @ a.T)
    with jax.enable_x64(True):
        solver = SOLVERS["mcg"](y, weight=0.4, solver=SOLVERS["ddim"](1.0), **measured)
        path = solve(solver, p, times, jnp.asarray(x), correlated, z)
        for j in range(4):
            t, s = p.level(times[j]), p.level(times[j + 1])
            plain = solve(SOLVERS["ddim"](1.0), p, times[j : j + 2], path[j], correlated, z[j:])[-1]
            gain = t.alpha * CORRELATED @ np.linalg.inv(t.alpha**2 * CORRELATED + t.sigma**2 * np.eye(3))
            for b in range(4):
                x0 = gain @ np.asarray(path[j][b])
                wanted = oracle.mcg_step(
                    np.asarray(plain[b]), path[j][b], x0, gain, a, np.array([y]), s.alpha, s.sigma, 0.4, 0.7
                )
                np.testing.assert_allclose(path[j + 1][b], wanted, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(np.asarray(path[-1]) @ a.T, y, rtol=1e-9)


def test_mcg_comes_nearer_to_the_posterior_than_projection_alone():
    """One of three numbers is measured; of the others the posterior mean is known, and the gradient moves to it."""
    p, y, mask = vp_linear(), 1.5, np.eye(3)[0]
    times = make_times(GRIDS["uniform"](), p, 100)
    posterior = CORRELATED[1:, 0] * y
    off = {}
    for weight in (0.0, 0.1):
        solver = SOLVERS["mcg"](y, mask, weight=weight)
        rows = jax.tree.map(jnp.asarray, make_rows(solver, unguided(), p, times))
        keys = noise.sample_keys(0, 4000)

        @jax.jit
        def run(rows, keys, solver=solver):
            x = noise.normal(noise.fold(keys, 0), (3,))

            def body(x, row):
                return solver.step(correlated(x, row.level), x, (), row, noise.fold(keys, row.i + 1))[0], None

            return jax.lax.scan(body, x, rows)[0]

        x = np.asarray(run(rows, keys))
        np.testing.assert_allclose(x[:, 0], y, rtol=1e-5)
        off[weight] = np.abs(x[:, 1:].mean(0) - posterior).max()
        print(f"weight {weight}: mean {x[:, 1:].mean(0).round(3)}, posterior {posterior}")
    assert off[0.1] < 0.9 * off[0.0]


def test_mcg_needs_a_measurement():
    with pytest.raises(ValueError, match="solver mcg: missing a required argument: 'measurement'"):
        make("solver", {"name": "mcg"})


def test_mcg_inpaints_in_the_sampler():
    model, params = tiny_dit()
    p, guide = vp_linear(), GUIDES["cfg"]()
    mask = np.zeros((4, 4, 3))
    mask[:, :2] = 1
    image = np.linspace(-1, 1, 48).reshape(4, 4, 3)
    solver = SOLVERS["mcg"](image, mask)
    rows = make_rows(solver, guide, p, make_times(GRIDS["uniform"](), p, 3), None, model.stages)
    keys = noise.sample_keys(0, 2)
    x = initial_noise(p, keys, model.input_shape)
    sampler = make_sampler(model, p, "eps", solver, guide)
    samples, _ = sampler(params, x, keys, jnp.asarray([1, 2], jnp.int32), rows, 2.0)
    np.testing.assert_allclose(np.asarray(samples)[:, :, :2], np.broadcast_to(image[:, :2], (2, 4, 2, 3)), atol=1e-5)
    assert np.isfinite(samples).all() and np.abs(np.asarray(samples)[:, :, 2:]).max() > 0.1


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("solver", "arguments", "message"),
    [
        ("ddim", {"gamma": 1.5}, r"gamma=1.5; allowed: 0 \.\.\. 1"),
        ("ddim", {"gamma": 0.3, "eta": 0.5}, "eta=0.5 and gamma=0.3 both"),
        ("ddim", {"boundary": 10.0}, "boundary=10.0 with gamma=None"),
        ("ddim", {"boundary": 0.0, "gamma": 1.0}, "boundary=0.0; allowed: 0.001"),
        ("euler_ancestral", {"eta": 2.0}, "euler_ancestral: eta=2.0"),
        ("kdpm2", {"eta": -1.0}, r"kdpm2: eta=-1.0; allowed: 0 \.\.\. 1"),
        ("kdpm2", {"space": "time"}, "kdpm2: space='time'; allowed: sigma, flow"),
        ("edm", {"order": 3}, "order=3; allowed: 1, 2"),
        ("edm", {"s_churn": -1.0}, "s_churn=-1.0; allowed: 0 or more"),
        ("edm", {"s_tmin": 60.0}, "s_tmin=60.0, s_tmax=50.0"),
        ("edm", {"s_noise": 0.0}, "s_noise=0.0; allowed: > 0"),
        ("restart", {"plan": []}, r"plan=\[\]; allowed: one interval"),
        ("restart", {"plan": [[3, 2, 0.06]]}, r"plan has \[3.0, 2.0, 0.06\]; allowed: \[N, K, t_min, t_max\]"),
        ("restart", {"plan": {"0": [1, 2, 0.06, 0.3]}}, "plan has .*N 2 or more"),
        ("restart", {"plan": [[3, 2, 0.3, 0.06]]}, "0 <= t_min < t_max"),
        ("restart", {"s_noise": 3.0}, "s_noise=3.0"),
        ("restart", {"rho": 0.0}, "rho=0.0"),
        ("pc", {"predictor": "euler"}, "predictor='euler'; allowed: reverse_diffusion"),
        ("pc", {"corrections": -1}, "corrections=-1"),
        ("pc", {"snr": 0.0}, "snr=0.0"),
        ("flow_ab", {"order": 5}, r"order=5; allowed: 1 \.\.\. 4"),
        ("sampler_scheduler", {"switch": 2.0}, "switch=2.0"),
        ("sampler_scheduler", {"first": "huen"}, "first 'huen' .did you mean heun"),
        ("sampler_scheduler", {"second": "mcg"}, "unknown sampler_scheduler: second 'mcg'"),
        ("mcg", {"measurement": 0.0, "weight": -1.0}, "weight=-1.0"),
        ("mcg", {"measurement": 0.0, "mask": 0.5}, "mask=0.5; allowed: 0 and 1"),
        ("mcg", {"measurement": 0.0, "pseudo_inverse": np.sum}, "pseudo_inverse without operator"),
        ("mcg", {"measurement": 0.0, "operator": np.sum, "mask": np.zeros(3)}, "operator and mask both"),
    ],
)
def test_bad_arguments_are_refused(solver, arguments, message):
    with pytest.raises(ValueError, match=message):
        SOLVERS[solver](**arguments)


@pytest.mark.parametrize(
    ("solver", "process", "times", "message"),
    [
        (SOLVERS["kdpm2"](space="sigma"), flow(), [1.0, 0.5, 0.0], "kdpm2: space 'sigma' divides by alpha"),
        (SOLVERS["pc"]("euler_maruyama"), flow(), [1.0, 0.5, 0.0], "divides by alpha, which is 0 at t=1 of flow"),
        (
            SOLVERS["restart"]([[3, 1, 0.06, 100.0]]),
            ve(),
            [1.0, 0.5, 0.0],
            r"t_max above 0.002, up to 80 \(ve at t=1\)",
        ),
        (SOLVERS["restart"]([[3, 1, 70.0, 75.0]]), ve(), [1.0, 0.5, 0.0], "falls on the first time"),
        (SOLVERS["restart"]([[3, 1, 0.1, 1.0], [3, 1, 0.05, 0.1]]), ve(), [1.0, 0.5, 0.0], "the time of another"),
    ],
)
def test_times_that_a_solver_cannot_take_are_refused(solver, process, times, message):
    with pytest.raises(ValueError, match=message):
        solver.grid(process, np.asarray(times))


@cases
def test_times_that_rise_are_refused(case):
    with pytest.raises(ValueError, match="must decrease strictly"):
        case.make().grid(subvp(), np.array([0.2, 0.5, 0.0]))
    check_times(MIXED_TIMES)


def test_fastdpm_refuses_other_schedules():
    with pytest.raises(ValueError, match="schedule='time'; allowed: var, step"):
        GRIDS["fastdpm"]("time")
    with pytest.raises(ValueError, match="spacing='cubic'; allowed: linear, quadratic"):
        GRIDS["fastdpm"](spacing="cubic")
