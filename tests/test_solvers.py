"""Solvers: their papers' algorithms, their order of convergence, diffusers' trajectories, and invariants of all."""

import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.stats import norm

from difax.accel.solvers import SOLVERS
from difax.core.contracts import Level, Prediction, Solver
from difax.core.grids import GRIDS, make_times
from difax.core.guidance import unguided
from difax.core.process import PROCESSES, flow, ve, vp_cosine, vp_linear, vp_sde
from difax.core.sample import make_rows
from tests.families import some
from tests.oracles import solvers as oracle
from tests.toys import MIXTURE, predict, solve, takes

GOLDEN = Path(__file__).parent / "golden" / "solvers.npz"
MIXED_TIMES = np.array([0.95, 0.8, 0.55, 0.5, 0.2, 0.05, 0.0])


class Case(NamedTuple):
    """One solver with one setting: how it is built and what it promises."""

    solver: str
    arguments: dict[str, Any] = {}
    order: float | None = None  # of convergence; None for a stochastic one
    processes: tuple[str, ...] = tuple(PROCESSES)

    def __str__(self) -> str:
        return "-".join([self.solver, *(f"{k}={v}" for k, v in self.arguments.items())])

    def make(self) -> Solver:
        return SOLVERS[self.solver](**self.arguments)


SIGMA_SPACE = tuple(name for name in PROCESSES if name not in ("flow", "sit", "trig"))
CASES = [
    Case("ddpm", {"variance": "small"}),
    Case("ddpm", {"variance": "large"}),
    Case("ddpm", {"variance": "learned"}),
    Case("ddim", {"eta": 0.0}, order=1),
    Case("ddim", {"eta": 0.7}),
    Case("ddim", {"eta": 1.0}),
    Case("euler", order=1),
    Case("heun", {"space": "sigma"}, order=2, processes=SIGMA_SPACE),
    Case("heun", {"space": "flow"}, order=2),
    Case("heun"),
    Case("dpmpp_2m", {"lower_order_final": 0}, order=2),
    Case("dpmpp_2m"),
    Case("bns", order=1),
    Case("ddss", order=1),
    Case("ltsl", order=1),
    Case("iia", order=1),
    Case("usf", order=2),
]
# tests/test_<file>.py -> the solvers whose cases are in its own table
ELSEWHERE = {
    "solvers_exponential": (
        "dpmpp_3m", "dpmpp_2s", "dpmpp_3s", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpm_solver_2m",
        "dpm_solver_3m", "dpm_solver_2s", "dpm_solver_3s", "dpm_solver_12", "dpm_solver_23", "scire_2", "scire_3",
        "seeds_1", "seeds_2", "seeds_3", "pfdiff",
    ),
    "solvers_adams": ("unipc", "dc_solver", "sa_solver", "deis", "ipndm", "pndm", "lms", "dpm_solver_v3"),
    "augmented": ("gddim", "genie", "sscs", "cld_em"),
    "solvers_kdiffusion": (
        "euler_ancestral", "kdpm2", "edm", "restart", "pc", "flow_ab", "sampler_scheduler", "mcg",
    ),
    "parallel_time": ("gotta_go_fast", "paradigms", "parataa", "deq"),
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES, ids=str)


def test_every_solver_has_a_row():
    assert {case.solver for case in CASES} | {s for solvers in ELSEWHERE.values() for s in solvers} == set(SOLVERS)


def module_of(solver: str):
    return sys.modules[f"difax.accel.solvers.{solver}"]  # the attribute of that name is the factory


@pytest.fixture
def given_noise(monkeypatch):
    """Makes the stochastic solvers take their keys for the noise itself."""
    monkeypatch.setattr(module_of("ddpm"), "normal_like", lambda keys, x: keys)
    monkeypatch.setattr(module_of("linear"), "draw", lambda keys, x, k: keys)


# ---------------------------------------------------------------- order of convergence


@pytest.fixture(scope="module")
def exact():
    """(y at the start [4, 8], y at the end): the solution of dy/d rho = eps on rho = sigma/alpha in [e^-3, e^3]."""
    start = np.random.default_rng(3).normal(size=(4, 8)) * np.exp(3.0)

    def slope(s, y):
        rho = np.exp(s)
        return (rho * MIXTURE.eps(y.reshape(4, 8), 1.0, rho)).ravel()

    done = solve_ivp(slope, (3.0, -3.0), start.ravel(), method="DOP853", rtol=1e-12, atol=1e-12)
    assert done.success
    return start, done.y[:, -1].reshape(4, 8)


@pytest.mark.parametrize(
    ("case", "process"),
    [(c, p) for c in CASES if c.order for p in ("vp_linear", "flow") if p in c.processes],
    ids=str,
)
def test_order_of_convergence(case, process, exact):
    p, steps, errors = PROCESSES[process](), (10, 20, 40, 80, 160), []
    with jax.enable_x64(True):
        for n in steps:
            times = p.inverse(np.linspace(-3.0, 3.0, n + 1))
            ends = p.level(times[[0, -1]])
            x = jnp.asarray(exact[0] * ends.alpha[0])
            end = solve(case.make(), p, times, x, predict)[-1]
            assert end.dtype == jnp.float64  # or rounding would hide the order
            errors.append(np.abs(np.asarray(end) / ends.alpha[1] - exact[1]).max())
    measured = -np.diff(np.log(errors)) / np.log(2)
    fitted = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    print(f"{case} on {process}: order {fitted:.2f}, by doubling {measured.round(2)}, error at 160 {errors[-1]:.1e}")
    assert abs(fitted - case.order) < 0.15
    assert abs(measured[-1] - case.order) < 0.15


def test_mixture_denoiser_is_the_score_of_its_density():
    x, d = np.random.default_rng(0).normal(size=(3, 8)), 1e-5
    alpha, sigma = 0.8, 0.6
    for j in range(8):
        e = np.eye(8)[j] * d
        slope = (MIXTURE.log_density(x + e, alpha, sigma) - MIXTURE.log_density(x - e, alpha, sigma)) / (2 * d)
        np.testing.assert_allclose(-MIXTURE.eps(x, alpha, sigma)[:, j] / sigma, slope, rtol=1e-7, atol=1e-8)


# ---------------------------------------------------------------- the papers' own algorithms


@pytest.mark.parametrize("process", [vp_linear(), vp_cosine(), vp_sde()], ids=lambda p: p.name)
@pytest.mark.parametrize("case", [c for c in CASES if c.solver in ("ddpm", "ddim")], ids=str)
def test_ancestral_steps_by_the_paper(case, process, given_noise):
    rng = np.random.default_rng(1)
    z = rng.normal(size=(6, 4, 8))
    abar = process.level(MIXED_TIMES).alpha ** 2
    with jax.enable_x64(True):
        path = solve(case.make(), process, MIXED_TIMES, jnp.asarray(rng.normal(size=(4, 8))), predict, z)
        x = np.asarray(path[0])
        for i in range(6):
            eps = MIXTURE.eps(x, np.sqrt(abar[i]), np.sqrt(1 - abar[i]))
            if case.solver == "ddim":
                x = oracle.ddim(x, eps, abar[i], abar[i + 1], case.arguments["eta"], z[i])
            else:
                v, variance = MIXTURE.variance(x), case.arguments["variance"]
                x = oracle.ddpm(x, eps, v, abar[i], abar[i + 1], (abar[-2], abar[-3]), variance, z[i])
            np.testing.assert_allclose(path[i + 1], x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", ["vp_linear", "vp_cosine", "ve", "flow"])
@pytest.mark.parametrize(("n", "first_order_last"), [(6, True), (12, False)])
@pytest.mark.parametrize("end", [0.0, 0.06])
def test_dpmpp_2m_by_the_paper(process, n, first_order_last, end):
    p = PROCESSES[process]()
    times = np.linspace(0.97, end, n + 1)
    level = p.level(times)
    x = np.random.default_rng(2).normal(size=(4, 8)) * level.sigma[0]
    with jax.enable_x64(True):
        got = solve(SOLVERS["dpmpp_2m"](), p, times, jnp.asarray(x), predict)[-1]
    # with sigma = 0 at the end, the last step is of first order whatever its number
    wanted = oracle.dpmpp_2m(
        x,
        lambda x, i: MIXTURE.x0(x, level.alpha[i], level.sigma[i]),
        level.alpha,
        level.sigma,
        first_order_last or end == 0,
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("bound", "n", "first_order"), [(0, 3, False), (10, 9, True), (10, 10, False), (15, 14, True)])
def test_lower_order_final(bound, n, first_order):
    rows = SOLVERS["dpmpp_2m"](lower_order_final=bound).grid(vp_sde(), np.linspace(0.9, 0.1, n + 1))
    previous = rows.coefficients.weights[:, 0, 3]  # of the next x: its inputs are x, x0, eps and the slot
    assert (previous[-1] == 0) == first_order
    assert previous[0] == 0 and np.all(previous[1:-1] != 0)


# the grids of a process; the longest h/h_before of each, in lambda, at any number of steps from 8 on
EVEN = ("uniform", "leading", "trailing", "quadratic", "log_snr", "karras", "shifted")
LAID = [(p, g) for p, g in itertools.product(PROCESSES, EVEN) if takes(g, PROCESSES[p]())]
FAMILIAR = ("vp_linear", "vp_cosine", "vp_sde", "ve", "flow")  # with which every run tests; the others are slow
laid = pytest.mark.parametrize(
    ("process", "grid"),
    [pytest.param(*at, marks=() if at[0] in FAMILIAR else pytest.mark.slow, id="-".join(at)) for at in LAID],
)


def _ratios(process: Any, times: np.ndarray) -> np.ndarray:
    level = process.level(times)
    with np.errstate(divide="ignore", invalid="ignore"):
        h = np.diff(np.log(level.alpha) - np.log(level.sigma))
        return np.nan_to_num(h[1:-1] / h[:-2])  # 0 behind a step of infinite length


@laid
def test_dpmpp_2m_steps_in_second_order_as_far_as_it_has_measured(process, grid):
    """The authors' table wherever no step is over twice as long as the one before; nowhere weights beyond 2 and 1."""
    p = PROCESSES[process]()
    for n in (3, 4, 5, 8, 10, 14, 20, 25, 50, 100, 200, 500):
        times = make_times(GRIDS[grid](), p, n)
        ours = SOLVERS["dpmpp_2m"]().grid(p, times).coefficients.weights
        authors = SOLVERS["dpmpp_2m"](stretch=1e9).grid(p, times).coefficients.weights
        alpha, long = p.level(times[1:]).alpha, np.r_[False, _ratios(p, times) > 2, False]
        x0, previous = ours[:, 0, 1], ours[:, 0, 3]
        assert np.all(np.abs(previous) <= alpha * (1 + 1e-12)) and np.all(x0 <= 2 * alpha)
        np.testing.assert_array_equal(ours[~long], authors[~long])
        assert not previous[long].any()
        even = grid in ("trailing", "shifted", "log_snr") or process == "ve" or (process in ("flow", "sit", "vp_sde"))
        if n >= 8 and grid != "quadratic" and even:
            assert not long.any()


class Known(NamedTuple):
    """Numbers whose density is a mixture of equal Gaussians of one width: what a perfect network says of them, and
    where the probability flow takes them, which in one dimension keeps every number's rank."""

    means: tuple[float, ...]
    std: float

    def _at(self, x: np.ndarray, level: Any) -> tuple[np.ndarray, np.ndarray, Any]:
        m = np.asarray(self.means)
        return m, x[:, None] - level.alpha * m, level.alpha**2 * self.std**2 + level.sigma**2

    def predict(self, x: np.ndarray, level: Any) -> Prediction:
        m, far, variance = self._at(x, level)
        log = -(far**2) / (2 * variance)
        share = np.exp(log - log.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        x0 = (share * (m + level.alpha * self.std**2 / variance * far)).sum(1)
        return Prediction(x0, (x - level.alpha * x0) / level.sigma, None)

    def below(self, x: np.ndarray, level: Any) -> np.ndarray:
        _, far, variance = self._at(x, level)
        return norm.cdf(far / np.sqrt(variance)).mean(1)

    def end(self, x: np.ndarray, level: Any) -> np.ndarray:
        clean = np.linspace(min(self.means) - 6 * self.std, max(self.means) + 6 * self.std, 20001)
        return np.interp(self.below(x, level), self.below(clean, Level(1.0, 0.0, 0.0, 0.0)), clean)


KNOWN = (Known((0.3,), 0.5), Known((0.0,), 1.0), Known((-0.6, 0.8), 0.4), Known((-0.6, 0.8), 0.15))


def _mean_error(solver: Solver, p: Any, times: np.ndarray, known: Known) -> float:
    rows, start = solver.grid(p, times), p.level(times[0])
    x = start.sigma * np.random.default_rng(0).normal(size=100)
    wanted, state = known.end(x, start), solver.init(x)
    for e in range(len(rows.t)):
        row = jax.tree.map(lambda a, e=e: a[e], rows)
        x, state = solver.step(known.predict(np.asarray(x), row.level), x, state, row, None)
    return float(np.abs(x - wanted).mean())


@laid
def test_second_order_is_about_as_good_as_first_everywhere(process, grid):
    """Errors with exact predictions are at most twice Euler's of as many steps; Heun's, of as many steps too, four
    times (ve and vp_cosine in 8 steps even in log-SNR, which the equation in sigma/alpha costs)."""
    p = PROCESSES[process]()
    with jax.enable_x64(True):
        for n in (8, 20):
            times = make_times(GRIDS[grid](), p, n)
            first = [_mean_error(SOLVERS["euler"](), p, times, known) for known in KNOWN]
            for solver in ("dpmpp_2m", "heun"):
                ratio = np.array([_mean_error(SOLVERS[solver](), p, times, k) for k in KNOWN]) / first
                print(f"{solver} on {process}, {grid}, {n} steps: {ratio.round(2)} of Euler's error")
                assert ratio.max() < {"dpmpp_2m": 2, "heun": 4}[solver]


def test_heun_by_edm_algorithm_1():
    process, times = ve(), make_times(GRIDS["karras"](), ve(), 8)
    sigma = process.level(times).sigma
    x = np.random.default_rng(2).normal(size=(4, 8)) * 80
    with jax.enable_x64(True):
        got = solve(SOLVERS["heun"](), process, times, jnp.asarray(x), predict)[-1]
    wanted = oracle.edm_heun(x, lambda x, s: MIXTURE.x0(x, 1.0, s), sigma)
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("process", ["flow", "sit"])
def test_flow_solvers_by_their_definition(solver, process):
    p = PROCESSES[process]()
    times = make_times(GRIDS["shifted"](3.0), p, 7)
    assert times[0] == 1  # where alpha = 0
    x = np.random.default_rng(2).normal(size=(4, 8))

    def velocity(x, t):
        return MIXTURE.eps(x, 1 - t, t) - MIXTURE.x0(x, 1 - t, t)

    with jax.enable_x64(True):
        got = solve(SOLVERS[solver](), p, times, jnp.asarray(x), predict)[-1]
    wanted = {"euler": oracle.flow_euler, "heun": oracle.flow_heun}[solver](x, velocity, times)
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)


def test_heun_takes_steps_out_of_pure_noise_along_the_straight_path():
    """EDM's table wherever 1 + u falls by no more than a factor of 4 in a step, the flow's elsewhere."""
    p = vp_cosine()
    times = make_times(GRIDS["uniform"](), p, 8)
    level, solve_in = p.level(times), {s: SOLVERS["heun"](s).grid(p, times) for s in (None, "sigma", "flow")}
    scale = 1 + level.sigma / level.alpha
    long = (scale[:-1] > 4 * scale[1:])[solve_in[None].step]
    assert 0 < long.sum() < len(long) / 2
    tables = [jax.tree.leaves(solve_in[space].coefficients) for space in (None, "sigma", "flow")]
    for ours, edm, straight in zip(*tables, strict=True):
        np.testing.assert_array_equal(ours, np.where(long[:, None, None], straight, edm))


# ---------------------------------------------------------------- diffusers' schedulers

# golden case -> our solver, our process
DIFFUSERS = {
    "ddpm_small": (SOLVERS["ddpm"]("small"), vp_linear()),
    "ddpm_large": (SOLVERS["ddpm"]("large"), vp_linear()),
    "ddpm_learned": (SOLVERS["ddpm"]("learned"), vp_linear()),
    "ddim_eta0": (SOLVERS["ddim"](), vp_linear()),
    "ddim_eta0.7": (SOLVERS["ddim"](0.7), vp_linear()),
    "dpmpp_2m_10": (SOLVERS["dpmpp_2m"](lower_order_final=15), vp_linear()),
    "dpmpp_2m_16": (SOLVERS["dpmpp_2m"](lower_order_final=15), vp_linear()),
    "heun_vp": (SOLVERS["heun"](), vp_linear()),
    "edm_euler": (SOLVERS["ddim"](), ve()),
    "flow_euler": (SOLVERS["euler"](), flow()),
    "flow_heun": (SOLVERS["heun"](), flow()),
}


@pytest.mark.parametrize("name", DIFFUSERS)
def test_trajectory_of_diffusers(name, given_noise):
    solver, process = DIFFUSERS[name]
    with np.load(GOLDEN) as golden:
        assert {key.rpartition(".")[0] for key in golden} == set(DIFFUSERS)
        t, wanted, noise = golden[f"{name}.t"], golden[f"{name}.path"], golden.get(f"{name}.noise")
    path = np.stack(solve(solver, process, t, jnp.asarray(wanted[0]), predict, noise))
    assert path.dtype == np.float32
    # of the largest value of each state: sigma falls from 80 to 0 within one run
    error = (np.abs(path - wanted).max((1, 2)) / np.abs(wanted).max((1, 2))).max()
    print(f"{name}: {error:.1e}")
    assert error < 1e-5


# ---------------------------------------------------------------- what holds for all of them


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize(("case", "process"), [(c, p) for c in CASES for p in c.processes], ids=str)
def test_a_perfectly_known_image_is_reached(case, process, n, given_noise):
    """If the network always says x0 = c, then every solver ends at c on every process and grid, in any noise."""
    p, c = PROCESSES[process](), np.linspace(-1, 1, 8)[None]

    def certain(x, level):
        return Prediction(c, (x - level.alpha * c) / level.sigma, jnp.sin(x))

    noise = np.random.default_rng(0).normal(size=(2 * n, 1, 8))
    with jax.enable_x64(True):
        for grid in ("uniform", "log_snr"):
            times = make_times(GRIDS[grid](), p, n)
            x = jnp.asarray(noise[0] * p.prior_std)
            end = solve(case.make(), p, times, x, certain, noise)[-1]
            np.testing.assert_allclose(end, c, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", some([1, 2, 10], 2))
@cases
def test_rows_are_finite_single_precision_and_counted(case, n):
    per_step = 2 if case.solver == "heun" else 1
    for process in case.processes:
        p = PROCESSES[process]()
        for grid in GRIDS:
            if not takes(grid, p):
                continue
            times = make_times(GRIDS[grid](), p, n)
            exact = case.make().grid(p, times)
            assert all(a.dtype == np.float64 for a in (exact.t, *exact.level))
            rows = make_rows(case.make(), unguided(), p, times)
            evaluations = per_step * n - (per_step - 1)
            for leaf in jax.tree.leaves(rows):
                assert len(leaf) == evaluations
                assert leaf.dtype in (np.float32, np.int32, np.bool_)
                assert np.all(np.isfinite(leaf))
            assert rows.i.tolist() == list(range(evaluations)) and rows.step[-1] == n - 1
            assert rows.fresh.tolist() == [True] + [False] * (evaluations - 1)
            assert not rows.guided.any()
            np.testing.assert_array_equal(rows.model_time, p.model_time(exact.t).astype(np.float32))


@pytest.mark.parametrize("process", PROCESSES)
def test_euler_is_ddim_without_noise(process):
    p = PROCESSES[process]()
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(5).normal(size=(4, 8)) * p.level(MIXED_TIMES[:1]).sigma)
        a, b = (solve(SOLVERS[s](), p, MIXED_TIMES, x, predict)[-1] for s in ("ddim", "euler"))
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", PROCESSES)
def test_ddim_at_eta_one_is_ddpm(process, given_noise):
    p, z = PROCESSES[process](), np.random.default_rng(5).normal(size=(6, 4, 8))
    with jax.enable_x64(True):
        x = jnp.asarray(z[0] * p.level(MIXED_TIMES[:1]).sigma)
        a = solve(SOLVERS["ddim"](1.0), p, MIXED_TIMES, x, predict, z)[-1]
        b = solve(SOLVERS["ddpm"]("small"), p, MIXED_TIMES, x, predict, z)[-1]
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def test_ddpm_clips_the_data_prediction(given_noise):
    p, x = vp_linear(), jnp.full((1, 8), 3.0)
    wide = Prediction(jnp.full((1, 8), 7.0), jnp.zeros((1, 8)), None)
    narrow = wide._replace(x0=jnp.full((1, 8), 1.5))
    z = np.zeros((1, 1, 8))
    got = solve(SOLVERS["ddpm"](clip=1.5), p, np.array([0.5, 0.3]), x, lambda *_: wide, z)[-1]
    want = solve(SOLVERS["ddpm"](), p, np.array([0.5, 0.3]), x, lambda *_: narrow, z)[-1]
    np.testing.assert_array_equal(got, want)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("solver", "arguments", "message"),
    [
        ("ddim", {"eta": 1.5}, r"eta=1.5; allowed: 0 \.\.\. 1"),
        ("ddim", {"eta": -0.1}, "eta=-0.1"),
        ("ddpm", {"variance": "fixed"}, "variance='fixed'; allowed: learned, small, large"),
        ("ddpm", {"clip": 0.0}, "clip=0.0; allowed: > 0"),
        ("dpmpp_2m", {"stretch": 0.0}, "stretch=0.0; allowed: above 0"),
        ("dpmpp_2m", {"lower_order_final": -1}, "lower_order_final=-1; allowed: 0 or more"),
        ("heun", {"space": "time"}, "space='time'; allowed: sigma, flow"),
    ],
)
def test_bad_arguments_are_refused(solver, arguments, message):
    with pytest.raises(ValueError, match=message):
        SOLVERS[solver](**arguments)


@cases
def test_bad_times_are_refused(case):
    with pytest.raises(ValueError, match="must decrease strictly"):
        case.make().grid(vp_linear(), np.array([0.2, 0.5, 0.0]))


@pytest.mark.parametrize("process", ["flow", "sit", "trig"])
def test_heun_in_sigma_space_refuses_pure_noise(process):
    with pytest.raises(ValueError, match=f"divides by alpha, which is 0 at t=1 of {process}; allowed: space 'flow'"):
        SOLVERS["heun"]("sigma").grid(PROCESSES[process](), np.array([1.0, 0.5, 0.0]))


def test_learned_variance_needs_variance_channels(given_noise):
    certain = Prediction(jnp.zeros((1, 8)), jnp.zeros((1, 8)), None)
    with pytest.raises(ValueError, match="needs a model with learn_sigma; allowed: small, large"):
        solve(SOLVERS["ddpm"]("learned"), vp_linear(), np.array([0.5, 0.0]), jnp.zeros((1, 8)), lambda *_: certain)
