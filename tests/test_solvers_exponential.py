"""Exponential-integrator solvers: the papers' algorithms, orders of convergence, diffusers' trajectories, laws of the
stochastic ones, adaptive steps, bounds and refusals."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from difax.accel.solvers import SOLVERS
from difax.accel.solvers.bounds import bounded
from difax.accel.solvers.exponential import gains
from difax.core import noise
from difax.core.contracts import Prediction, Solver, Trace
from difax.core.drive import Run, whilst
from difax.core.grids import GRIDS, make_times
from difax.core.guidance import unguided
from difax.core.process import PROCESSES, flow, vp_linear, vp_sde
from difax.core.sample import make_rows
from tests.families import some
from tests.oracles import exponential as oracle
from tests.toys import MIXTURE, predict, solve

GOLDEN = Path(__file__).parent / "golden" / "exponential.npz"
EVEN, THIRDS = (10, 20, 40, 80, 160), (11, 20, 41, 80, 161)  # THIRDS: 3 k + 2, which end with a step of order 2
NONE_LOWER = {"lower_order_final": 0}


class Case(NamedTuple):
    """One solver with one setting. order: that it must measure; None for a stochastic one."""

    solver: str
    arguments: dict[str, Any] = {}
    order: float | None = None
    steps: tuple[int, ...] = EVEN
    rows: Any = None  # n -> evaluations of n steps that end at sigma = 0; None: n

    def __str__(self) -> str:
        return "-".join([self.solver, *(f"{k}={v}" for k, v in self.arguments.items())])

    def make(self) -> Solver:
        return SOLVERS[self.solver](**self.arguments)


def twice(n: int) -> int:
    return 2 * n - 1


# order: those of diffusers and of the authors' code, where they were measured, and of `exact`, SciRE and PFDiff ours
CASES = [
    Case("dpmpp_2m", NONE_LOWER, order=2),
    Case("dpmpp_2m", NONE_LOWER | {"solver_type": "heun"}, order=2),
    Case("dpmpp_3m", NONE_LOWER, order=2),
    Case("dpmpp_3m", NONE_LOWER | {"exact": True}, order=3),
    Case("dpmpp_2s", {}, order=2),
    Case("dpmpp_2s", {"r": 0.4, "solver_type": "heun"}, order=2),
    Case("dpmpp_3s", {}, order=3, steps=THIRDS),
    Case("dpmpp_3s", {"solver_type": "heun", "r1": 1 / 3, "r2": 2 / 3}, order=3, steps=THIRDS),
    Case("dpm_solver_2m", NONE_LOWER, order=2),
    Case("dpm_solver_3m", NONE_LOWER, order=2),
    Case("dpm_solver_3m", NONE_LOWER | {"exact": True}, order=3),
    Case("dpm_solver_2s", {}, order=2),
    Case("dpm_solver_3s", {}, order=3, steps=THIRDS),
    Case("scire_2", {}, order=1, steps=THIRDS),
    Case("scire_2", {"phi": 1.0, "r": 0.5}, order=2, steps=(40, 80, 160)),
    Case("scire_3", {}, order=1, steps=(80, 161, 320, 641)),
    Case("scire_3", {"phi": 1.0}, order=2, steps=(80, 161, 320, 641)),
    Case("pfdiff", {"k": 1, "l": 1}, order=2, rows=lambda n: 1 + -(-(n - 1) // 2)),
    Case("pfdiff", {"k": 1, "l": 1, "output": "x0"}, order=2, rows=lambda n: 1 + -(-(n - 1) // 2)),
    Case("pfdiff", {"k": 3, "l": 2}, order=2, rows=lambda n: 1 + -(-(n - 1) // 4)),
    Case("pfdiff", {"k": 2, "l": 1, "output": "velocity"}, order=1, rows=lambda n: 1 + -(-(n - 1) // 3)),
    Case("dpmpp_sde", {}, rows=twice),
    Case("dpmpp_sde", {"eta": 0.5, "r": 0.3}, rows=twice),
    Case("dpmpp_2m_sde", {}),
    Case("dpmpp_2m_sde", {"eta": 0.5, "solver_type": "heun"}),
    Case("dpmpp_3m_sde", {}),
    Case("seeds_1", {}),
    Case("seeds_2", {}, rows=twice),
    Case("seeds_3", {}, rows=lambda n: 3 * n - 2),
]
ADAPTIVE = ("dpm_solver_12", "dpm_solver_23")
every = pytest.mark.parametrize("case", CASES, ids=str)


def test_the_table_has_every_solver():
    from tests.test_solvers import ELSEWHERE

    assert {case.solver for case in CASES} | set(ADAPTIVE) == {*ELSEWHERE["solvers_exponential"], "dpmpp_2m"}


def tabulated(solver: Solver, process: Any, times: np.ndarray, x: np.ndarray, model: Any, z: Any = None) -> np.ndarray:
    """What a solver's table makes of x, applied in numpy in the precision of x; model(x, level) -> x0."""
    rows = solver.grid(process, np.asarray(times, np.float64))
    weights = rows.coefficients.weights.astype(x.dtype)
    slots = [np.zeros_like(x)] * (weights.shape[1] - 1)
    for e in range(len(rows.t)):
        alpha, sigma = rows.level.alpha[e], rows.level.sigma[e]
        x0 = model(x.astype(np.float64), alpha, sigma)
        eps = (x.astype(np.float64) - alpha * x0) / sigma
        inputs = [x, x0.astype(x.dtype), eps.astype(x.dtype), *slots, *([] if z is None else z[e])]
        x, *slots = np.einsum("oi,i...->o...", weights[e], np.stack(inputs))
    return x


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


def errors_of(case: Case, process: str, exact: Any, dtype: Any = np.float64) -> list[float]:
    p, found = PROCESSES[process](), []
    for n in case.steps:
        times = p.inverse(np.linspace(-3.0, 3.0, n + 1))
        ends = p.level(times[[0, -1]])
        end = tabulated(case.make(), p, times, (exact[0] * ends.alpha[0]).astype(dtype), MIXTURE.x0)
        found.append(float(np.abs(end / ends.alpha[1] - exact[1]).max()))
    return found


@pytest.mark.parametrize("process", some(("vp_linear", "flow", "ve"), "vp_linear"))
@pytest.mark.parametrize("case", [c for c in CASES if c.order], ids=str)
def test_order_of_convergence(case, process, exact):
    errors = errors_of(case, process, exact)
    measured = -np.diff(np.log(errors)) / np.diff(np.log(case.steps))
    fitted = -np.polyfit(np.log(case.steps[-3:]), np.log(errors[-3:]), 1)[0]
    print(f"{case} on {process}: order {fitted:.2f}, by doubling {measured.round(2)}, error {errors[-1]:.1e}")
    assert abs(fitted - case.order) < 0.2


def test_three_outputs_have_a_third_of_the_error_of_two(exact):
    cases = [Case("dpmpp_2m", NONE_LOWER), *(Case("dpmpp_3m", NONE_LOWER | {"exact": e}) for e in (False, True))]
    two, three, whole = (errors_of(case._replace(steps=(160,)), "vp_linear", exact)[0] for case in cases)
    print(f"error at 160 steps: 2M {two:.1e}, 3M {three:.1e}, 3M exact {whole:.1e}")
    assert 0.2 < three / two < 0.5 and whole < three / 3


@pytest.mark.parametrize("case", [c for c in CASES if c.order], ids=str)
def test_more_steps_are_no_worse_in_single_precision(case, exact):
    errors = errors_of(case, "vp_linear", exact, np.float32)
    floor = 1e-5 * np.abs(exact[1]).max()
    print(f"{case}: {np.array(errors)}")
    assert all(b <= 1.1 * a + floor for a, b in zip(errors, errors[1:], strict=False))


# ---------------------------------------------------------------- the papers' own algorithms

LAMS = np.array([-3.0, -2.2, -1.7, -1.2, -0.3, 0.1, 0.9, 1.2, 1.9, 2.6])


def data_model(x: np.ndarray, lam: float) -> np.ndarray:
    return MIXTURE.x0(x, *oracle.vp(lam))


def noise_model(x: np.ndarray, lam: float) -> np.ndarray:
    return MIXTURE.eps(x, *oracle.vp(lam))


def laid(n: int, clean: bool) -> tuple[Any, np.ndarray, list[Any], np.ndarray]:
    """(process, times, their lambdas, x) of n steps, the last into sigma = 0 if `clean`."""
    p = vp_sde()
    lams = list(LAMS[: n + 1])
    times = p.inverse(np.array(lams))
    if clean:
        lams[-1], times[-1] = None, 0.0
    return p, times, lams, np.random.default_rng(2).normal(size=(4, 8))


def same(got: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m", "dpm_solver_2m", "dpm_solver_3m"])
def test_multistep_by_the_authors(solver, solver_type, clean):
    data, order = solver.startswith("dpmpp"), int(solver[-2])
    for n, bound in ((5, 10), (9, 0)):
        p, times, lams, x = laid(n, clean)
        made = SOLVERS[solver](lower_order_final=bound, stretch=1e9, solver_type=solver_type)
        model = data_model if data else noise_model
        wanted = oracle.multistep(x, model, lams, data, order, solver_type == "heun", bound > n)
        same(tabulated(made, p, times, x, MIXTURE.x0), wanted)


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize("solver", ["dpmpp_2s", "dpmpp_3s", "dpm_solver_2s", "dpm_solver_3s"])
def test_single_steps_by_the_authors(solver, solver_type, clean):
    """Of every remainder of the budget; at the grid's own inner times, and at the paper's."""
    data, order, taylor = solver.startswith("dpmpp"), int(solver[-2]), solver_type == "heun"
    one, two, three = oracle.dpm_solver_1, oracle.dpm_solver_2, oracle.dpm_solver_3
    if data:
        one, two, three = oracle.dpmpp_1, oracle.dpmpp_2s, oracle.dpmpp_3s
    model = data_model if data else noise_model
    for n in (6, 7, 8):
        p, times, lams, x0 = laid(n, clean)
        orders = oracle.fast_orders(n, order)
        if clean and orders[-1] > 1:
            orders[-1:] = [orders[-1] - 1, 1]
        for own in (True, False):
            x, i = x0, 0
            for q in orders:
                s, t = lams[i], lams[i + q]
                r = [(lam - s) / (t - s) for lam in lams[i + 1 : i + q]] if own else [[], [0.5], [1 / 3, 2 / 3]][q - 1]
                if q == 2 and order == 3 and not own:
                    r = [(lams[i + 1] - s) / (t - s)]  # only steps of the full order have shares of their own
                if q == 1:
                    x = one(x, model(x, s), s, t)
                else:
                    x = (two if q == 2 else three)(x, model, s, t, *r, taylor=taylor)
                i += q
            shares = {} if own else {"r": 0.5} if order == 2 else {"r1": 1 / 3, "r2": 2 / 3}
            same(tabulated(SOLVERS[solver](solver_type=solver_type, **shares), p, times, x0, MIXTURE.x0), x)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_multistep_sde_by_k_diffusion(order, eta):
    p, times, lams, x = laid(9, True)
    rho = np.exp(-np.array([*lams[:-1], np.inf]))
    z = np.random.default_rng(5).normal(size=(9, 1, 4, 8))
    for heun in (False, True) if order == 2 else (True,):
        made = SOLVERS[f"dpmpp_{order}m_sde"](eta, 0, stretch=1e9, solver_type="heun" if heun else "midpoint")
        denoise = lambda y, s: MIXTURE.x0(y, 1.0, s)  # noqa: E731
        wanted = oracle.k_diffusion_multistep_sde(x / oracle.vp(lams[0])[0], denoise, rho, z[:, 0], order, eta, heun)
        same(tabulated(made, p, times, x, MIXTURE.x0, z), wanted)


@pytest.mark.parametrize(("eta", "r"), [(1.0, 0.5), (0.6, 0.3), (0.0, 0.5)])
def test_dpmpp_sde_by_k_diffusion(eta, r):
    p, times, lams, x = laid(6, True)
    rho = np.exp(-np.array([*lams[:-1], np.inf]))
    z = np.random.default_rng(5).normal(size=(11, 1, 4, 8))

    def brownian(i, middle):
        if middle:
            return z[2 * i, 0]
        between = rho[i] ** (1 - r) * rho[i + 1] ** r
        c = np.sqrt((rho[i] - between) / (rho[i] - rho[i + 1]))
        return c * z[2 * i, 0] + np.sqrt(1 - c**2) * z[2 * i + 1, 0]

    denoise = lambda y, s: MIXTURE.x0(y, 1.0, s)  # noqa: E731
    wanted = oracle.k_diffusion_dpmpp_sde(x / oracle.vp(lams[0])[0], denoise, rho, brownian, eta, r)
    same(tabulated(SOLVERS["dpmpp_sde"](eta, r), p, times, x, MIXTURE.x0, z), wanted)
    if eta == 0:
        # two grid steps of dpmpp_2s for one of these
        inner = p.inverse(np.interp(np.arange(11) / 2, np.arange(6), np.array(lams[:-1])))
        both = tabulated(SOLVERS["dpmpp_2s"](), p, np.append(inner, 0.0), x, MIXTURE.x0)
        same(both, wanted)


@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize(
    ("solver", "shares"), [("seeds_1", ()), ("seeds_2", (0.5,)), ("seeds_2", (0.3,)), ("seeds_3", (1 / 3, 2 / 3))]
)
def test_seeds_by_the_paper(solver, shares, prediction):
    p, times, lams, x = laid(5, True)
    stages = len(shares) + 1
    z = np.random.default_rng(5).normal(size=(4 * stages + 1, 1, 4, 8))
    data, end = prediction == "x0", x
    for j in range(4):
        noises = z[j * stages : (j + 1) * stages, 0]
        end = oracle.seeds(end, data_model if data else noise_model, lams[j], lams[j + 1], noises, data, shares)
    made = SOLVERS[solver](prediction, **({"c2": shares[0]} if shares else {}))
    same(tabulated(made, p, times, x, MIXTURE.x0, z), data_model(end, lams[4]))


@pytest.mark.parametrize(("solver", "shares"), [("scire_2", (0.5,)), ("scire_3", (1 / 3, 2 / 3))])
def test_scire_by_the_authors(solver, shares):
    order, (p, times, lams, x0) = len(shares) + 1, laid(9, False)
    last = oracle.scire_phis(9 // order)[-1]
    if order == 2:
        times, lams = times[:9], lams[:9]  # an even number of evaluations
    keys = {"r": 0.5} if order == 2 else {"r1": 1 / 3, "r2": 2 / 3}
    n = 8 if order == 2 else 9
    for phi in (None, 2 / 3):
        phis = oracle.scire_phis(n // order) if phi is None else [phi] * 9
        x, i = x0, 0
        for q, correction in zip(oracle.fast_orders(n, order), [*phis, last], strict=False):
            s, t = lams[i], lams[i + q]
            if q == 1:
                x = oracle.dpm_solver_1(x, noise_model(x, s), s, t)
            else:
                own = shares if q == order else ((np.exp(-lams[i + 1]) - np.exp(-s)) / (np.exp(-t) - np.exp(-s)),)
                x = oracle.scire(x, noise_model, s, t, correction, own)
            i += q
        same(tabulated(SOLVERS[solver](phi, **keys), p, times, x0, MIXTURE.x0), x)


@pytest.mark.parametrize(("k", "l"), [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)])
def test_pfdiff_by_the_paper(k, l):  # noqa: E741
    made = SOLVERS["pfdiff"](k, l)
    for n in range(1, 10):
        p, times, lams, x = laid(n, True)
        wanted, evaluations = oracle.pfdiff(x, noise_model, lams, k, l)
        same(tabulated(made, p, times, x, MIXTURE.x0), wanted)
        assert len(made.grid(p, times).t) == evaluations == 1 + -(-(n - 1) // (k + 1))


@pytest.mark.parametrize(
    ("solver", "arguments", "first"),
    [
        ("dpmpp_2m", {"stretch": 1e-9}, ("ddim", {})),
        ("dpm_solver_3m", {"stretch": 1e-9}, ("ddim", {})),
        ("dpmpp_2m_sde", {"stretch": 1e-9}, ("ddim", {"eta": 1.0})),
        ("seeds_1", {}, ("ddim", {"eta": 1.0})),
        ("dpmpp_2m_sde", {"eta": 0.0}, ("dpmpp_2m", {})),
    ],
)
@pytest.mark.parametrize("process", some(("vp_linear", "flow", "sit"), "flow"))
def test_first_orders_are_ddim(solver, arguments, first, process, monkeypatch):
    monkeypatch.setattr("difax.accel.solvers.linear.draw", lambda keys, x, k: keys)
    p = PROCESSES[process]()
    z, times = np.random.default_rng(3).normal(size=(6, 4, 8)), np.array([1.0, 0.8, 0.55, 0.5, 0.2, 0.05, 0.0])
    with jax.enable_x64(True):
        x = jnp.asarray(z[0])
        got = solve(SOLVERS[solver](**arguments), p, times, x, predict, z)[-1]
        wanted = solve(SOLVERS[first[0]](**first[1]), p, times, x, predict, z)[-1]
    same(got, wanted)


def test_gains_are_their_integrals():
    u, w = np.polynomial.legendre.leggauss(60)
    u, w = (u + 1) / 2, w / 2
    for E in (-3.0, -0.51, -0.3, -1e-3, 1e-9, 1e-4, 0.2, 0.49, 0.7, 5.0):
        wanted = [np.sum(w * E * np.exp(-E * (1 - u)) * u**k) / (1, 1, 2)[k] for k in range(3)]
        np.testing.assert_allclose(gains(E), wanted, rtol=1e-12)


# ---------------------------------------------------------------- diffusers' schedulers


def of_diffusers(name: str) -> tuple[Solver, Any]:
    """Our solver and process of a golden case."""
    solver, _, rest = name.partition("-")
    kind = rest.partition("-")[0]
    if solver == "dpmpp_sde":
        return SOLVERS[solver](), vp_linear()
    if kind == "thresholding":
        return SOLVERS[solver](15, 1e9, thresholding=0.6, sample_max_value=1.2), vp_linear()
    settings: dict[str, Any] = {"solver_type": kind}
    if solver[-1] == "m" or solver.endswith("_sde"):
        settings |= {"stretch": 1e9, "lower_order_final": 15}
    if solver[-2:] == "3s" and kind == "midpoint":
        settings["stage"] = "midpoint"
    return SOLVERS[solver](**settings), vp_linear()


def golden_names() -> list[str]:
    with np.load(GOLDEN) as golden:
        return sorted({key.rpartition(".")[0] for key in golden})


@pytest.mark.parametrize("name", golden_names())
def test_trajectory_of_diffusers(name, monkeypatch):
    solver, process = of_diffusers(name)
    monkeypatch.setattr("difax.accel.solvers.linear.draw", lambda keys, x, k: keys)
    with np.load(GOLDEN) as golden:
        t, wanted, noises = golden[f"{name}.t"], golden[f"{name}.path"], golden.get(f"{name}.noise")
    if name == "dpmpp_sde":  # two draws of a Brownian motion as two independent ones
        rho = process.level(t[:-1]).sigma / process.level(t[:-1]).alpha
        c = np.sqrt((rho[:-1] - np.sqrt(rho[:-1] * rho[1:])) / (rho[:-1] - rho[1:])).astype(np.float32)[:, None, None]
        noises[:, 1] = (noises[:, 1] - c * noises[:, 0]) / np.sqrt(1 - c**2)
        noises = np.append(noises.reshape(-1, 4, 8), np.zeros((1, 4, 8), np.float32), 0)
    if name.startswith("dpmpp_3m_sde"):  # there g3 - 1 stands for g3, a wrong sign of its 1/2
        theirs = lambda E: (*gains(E)[:2], gains(E)[2] - 1)  # noqa: E731
        monkeypatch.setattr("difax.accel.solvers.exponential.gains", theirs)
    path = np.stack(solve(solver, process, t, jnp.asarray(wanted[0]), predict, noises))
    assert path.dtype == np.float32
    error = (np.abs(path - wanted).max((1, 2)) / np.abs(wanted).max((1, 2))).max()
    print(f"{name}: {error:.1e}")
    assert error < 1e-5


# ---------------------------------------------------------------- laws of the stochastic ones

STOCHASTIC = [c for c in CASES if c.order is None]
MEAN, STD = 0.7, 0.4


def law(solver: Solver, process: Any, times: np.ndarray) -> tuple[float, float]:
    """Mean and variance, to the last digit, of what a table makes of data N(MEAN, STD^2), each number by itself."""
    rows = solver.grid(process, times)
    weights, start = rows.coefficients.weights, process.level(times[0])
    outputs, inputs = weights.shape[1:]
    m, cov = np.zeros(outputs), np.zeros((outputs, outputs))
    m[0], cov[0, 0] = start.alpha * MEAN, (start.alpha * STD) ** 2 + start.sigma**2
    for w, alpha, sigma in zip(weights, rows.level.alpha, rows.level.sigma, strict=True):
        k = alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)  # x0 = MEAN + k (x - alpha MEAN)
        known, shift = np.zeros((inputs, outputs)), np.zeros(inputs)
        known[:3, 0] = 1.0, k, (1 - alpha * k) / sigma
        shift[1], shift[2] = MEAN * (1 - k * alpha), -alpha * MEAN * (1 - k * alpha) / sigma
        known[3 : 2 + outputs, 1:] = np.eye(outputs - 1)
        drawn = w[:, 2 + outputs :]
        m, a = w @ (known @ m + shift), w @ known
        cov = a @ cov @ a.T + drawn @ drawn.T
    return float(m[0]), float(cov[0, 0])


# weak orders as we measure them
WEAK = {"seeds_1": 1, "dpmpp_sde": 2, "dpmpp_2m_sde": 2, "dpmpp_3m_sde": 2, "seeds_2": 2, "seeds_3": 2}


@pytest.mark.parametrize("process", some(("vp_linear", "flow"), "vp_linear"))
@pytest.mark.parametrize("case", STOCHASTIC, ids=str)
def test_the_law_is_approached(case, process):
    p, errors, steps = PROCESSES[process](), [], (80, 160, 320)
    for n in steps:
        times = p.inverse(np.linspace(-3.0, 3.0, n + 1))
        end = p.level(times[-1])
        m, variance = law(case.make(), p, times)
        errors.append(max(abs(m - end.alpha * MEAN), abs(variance - (end.alpha * STD) ** 2 - end.sigma**2)))
    fitted = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    print(f"{case} on {process}: weak order {fitted:.2f}, error {errors[-1]:.1e}")
    assert fitted > WEAK[case.solver] - 0.2 and errors[-1] < 5e-3


@pytest.mark.parametrize("case", some(STOCHASTIC, STOCHASTIC[0]), ids=str)
def test_many_samples_have_the_law(case):
    """Means and covariances of 20000 samples in two dimensions, by the keys, within five standard errors of theory."""
    p, n, count = flow(), 60, 20000
    times = make_times(GRIDS["uniform"](), p, n)
    rows = case.make().grid(p, times)
    keys = noise.sample_keys(3, count)

    @jax.jit
    def run(keys):
        x = noise.normal(noise.fold(keys, 0), (2,))

        def body(carry, row):
            x, state = carry
            a, s = row.level.alpha, row.level.sigma
            k = a * STD**2 / ((a * STD) ** 2 + s**2)
            x0 = MEAN + k * (x - a * MEAN)
            prediction = Prediction(x0, (x - a * x0) / s, None)
            return case.make().step(prediction, x, state, row, noise.fold(keys, row.i + 1)), None

        single = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32) if a.dtype == np.float64 else jnp.asarray(a), rows)
        return jax.lax.scan(body, (x, case.make().init(x)), single)[0][0]

    x = np.asarray(run(keys), np.float64)
    np.testing.assert_array_equal(
        x[:100], np.asarray(run(keys[:100]))
    )  # the same key, the same result; a batch is its samples
    wanted_mean, wanted_variance = law(case.make(), p, times)
    assert abs(wanted_mean - MEAN) < 0.01 and abs(wanted_variance - STD**2) < 0.02
    cov = np.cov(x.T)
    error = np.sqrt(wanted_variance / count)
    assert np.all(np.abs(x.mean(0) - wanted_mean) < 5 * error)
    assert np.all(np.abs(np.diag(cov) - wanted_variance) < 5 * np.sqrt(2 / count) * wanted_variance)
    assert abs(cov[0, 1]) < 5 * wanted_variance / np.sqrt(count)


# ---------------------------------------------------------------- adaptive steps


def device_x0(x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
    """`MIXTURE.x0` on the device, of levels of each sample."""
    mean, std, weight = (jnp.asarray(a, x.dtype) for a in (MIXTURE.mean_KD, MIXTURE.std_K, MIXTURE.weight_K))

    def one(x, a, s):
        variance, far = a**2 * std**2 + s**2, x[None] - a * mean
        share = jax.nn.softmax(jnp.log(weight) - (far**2).sum(1) / (2 * variance) - 4 * jnp.log(variance))
        return share @ (mean + (a * std**2 / variance)[:, None] * far)

    return jax.vmap(one)(x, alpha[:, 0], sigma[:, 0])


def drive(solver: Solver, process: Any, times: np.ndarray, x: Any) -> tuple[np.ndarray, Trace]:
    """Runs a solver that decides on the mixture, by difax's own loop."""

    def evaluate(x, row, guide_state, memory):
        a, s = row.level.alpha, row.level.sigma
        x0 = device_x0(x, a, s)
        trace = Trace(jnp.float32(1), (), jnp.float32(1), (), (), (), ())
        return Prediction(x0, (x - a * x0) / s, None), guide_state, memory, trace

    @jax.jit
    def run(x, rows):
        return whilst(Run(solver, process, evaluate, rows, noise.sample_keys(0, len(x))), x, (), ())

    end, trace = run(x, jax.tree.map(jnp.asarray, solver.grid(process, times)))
    return np.asarray(end), trace


@pytest.mark.parametrize("prediction", ["eps", "x0"])
@pytest.mark.parametrize("order", [2, 3])
def test_adaptive_steps_by_the_authors_sample_by_sample(order, prediction):
    p, data = vp_sde(), prediction == "x0"
    times = np.linspace(p.inverse(-3.0), p.inverse(3.0), 301)
    x = np.random.default_rng(4).normal(size=(5, 8)) * np.array([0.2, 0.6, 1.0, 2.0, 4.0])[:, None]
    made = SOLVERS[f"dpm_solver_{order - 1}{order}"](rtol=0.01, prediction=prediction)
    with jax.enable_x64(True):
        got, trace = drive(made, p, times, jnp.asarray(x))
    model = data_model if data else noise_model
    wanted = [oracle.adaptive(x[b : b + 1], model, -3.0, 3.0, order, 0.05, 0.0078, 0.01, 0.9, data) for b in range(5)]
    counts, rejected = np.array([w[1] for w in wanted]), sum(w[2] for w in wanted)
    print(f"order {order}, {prediction}: evaluations {counts}, {rejected} steps rejected")
    assert rejected > 0 and len(set(counts)) > 1 and trace.unfinished == 0
    np.testing.assert_allclose(np.asarray(trace.live) * 5, [(counts > e).sum() for e in range(300)], atol=1e-5)
    # times along lambda are read off a table
    np.testing.assert_allclose(got, np.concatenate([w[0] for w in wanted]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", ADAPTIVE)
def test_tighter_tolerances_are_nearer(solver, exact):
    p, errors, counts = vp_sde(), [], []
    times = np.linspace(p.inverse(-3.0), p.inverse(3.0), 401)
    ends = p.level(times[[0, -1]])
    with jax.enable_x64(True):
        for by in (1, 1e-1, 1e-2):
            end, trace = drive(
                SOLVERS[solver](0.05, 0.0078 * by, 0.05 * by), p, times, jnp.asarray(exact[0] * ends.alpha[0])
            )
            assert trace.unfinished == 0
            errors.append(np.abs(end / ends.alpha[1] - exact[1]).max())
            counts.append(float(trace.live.sum()))
    print(f"{solver}: errors {np.array(errors)} with {counts} evaluations a sample")
    assert errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3


@pytest.mark.parametrize("solver", ADAPTIVE)
@pytest.mark.parametrize("process", some(PROCESSES, "flow"))
def test_adaptive_steps_go_from_pure_noise_to_a_clean_sample(solver, process):
    """Out of alpha = 0 and into sigma = 0, of a batch as of its samples; too few evaluations are told."""
    p = PROCESSES[process]()
    x = (np.random.default_rng(0).normal(size=(3, 8)) * p.prior_std).astype(np.float32)
    times = make_times(GRIDS["uniform"](), p, 300)
    end, trace = drive(SOLVERS[solver](), p, times, jnp.asarray(x))
    assert trace.unfinished == 0 and np.all(np.isfinite(end))
    with jax.enable_x64(True):  # in 32 bits, rounding decides now and then whether a step is taken
        end, _ = drive(SOLVERS[solver](), p, times, jnp.asarray(x, jnp.float64))
        for b in range(3):
            one, _ = drive(SOLVERS[solver](), p, times, jnp.asarray(x[b : b + 1], jnp.float64))
            np.testing.assert_allclose(one[0], end[b], rtol=1e-7, atol=1e-7)
    _, few = drive(SOLVERS[solver](), p, make_times(GRIDS["uniform"](), p, 6), jnp.asarray(x))
    assert few.unfinished == 1


# ---------------------------------------------------------------- bounds of the data prediction


def test_dynamic_thresholding_is_of_each_sample():
    x = np.random.default_rng(0).normal(size=(3, 4, 5, 2)) * np.array([0.2, 1.0, 3.0])[:, None, None, None]
    for most in (None, 1.5):
        threshold = bounded("s", thresholding=0.9, sample_max_value=most)
        assert threshold is not None
        got = threshold(jnp.asarray(x, jnp.float32))
        for b in range(3):
            s = min(max(np.quantile(np.abs(x[b]), 0.9), 1.0), most or np.inf)
            np.testing.assert_allclose(got[b], np.clip(x[b], -s, s) / s, rtol=1e-5, atol=1e-6)
    clip = bounded("s", clip=0.5)
    assert clip is not None and bounded("s") is None
    np.testing.assert_array_equal(clip(jnp.asarray(x)), np.clip(jnp.asarray(x), -0.5, 0.5))


@pytest.mark.parametrize("solver", sorted({c.solver for c in CASES}))
def test_every_solver_bounds_the_data_prediction(solver):
    """A wide prediction under a bound is a narrow one: of both forms, since eps follows x0."""
    p, times, c = vp_sde(), np.array([0.9, 0.6, 0.5, 0.3, 0.2]), jnp.linspace(-3, 3, 8)[None]

    def certain(x, level, c=c):
        return Prediction(c, (x - level.alpha * c) / level.sigma, None)

    x, keys = jnp.full((1, 8), 0.7), [noise.sample_keys(e, 1) for e in range(20)]
    got = solve(SOLVERS[solver](clip=1.5), p, times, x, certain, keys)[-1]
    wanted = solve(SOLVERS[solver](), p, times, x, lambda x, level: certain(x, level, jnp.clip(c, -1.5, 1.5)), keys)[-1]
    wide = solve(SOLVERS[solver](), p, times, x, certain, keys)[-1]
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)
    assert np.abs(np.asarray(wide) - wanted).max() > 0.1


# ---------------------------------------------------------------- what holds for all of them


@pytest.mark.parametrize("n", [1, 2, 7])
@every
def test_a_perfectly_known_image_is_reached(case, n):
    """If the network always says x0 = c, then every solver ends at c on every process and grid, in any noise."""
    c = np.linspace(-1, 1, 8)[None]
    for process in PROCESSES:
        p = PROCESSES[process]()
        for grid in ("uniform", "log_snr"):
            times, z = make_times(GRIDS[grid](), p, n), np.random.default_rng(0).normal(size=(3 * n, 1, 1, 8))
            x = z[0, 0] * p.prior_std
            end = tabulated(case.make(), p, times, x, lambda *_: c, z if case.order is None else None)
            np.testing.assert_allclose(end, c, rtol=1e-9, atol=1e-9)


@every
def test_the_engine_applies_the_table(case, monkeypatch):
    monkeypatch.setattr("difax.accel.solvers.linear.draw", lambda keys, x, k: keys)
    p, z = vp_sde(), np.random.default_rng(1).normal(size=(12, 4, 8))
    times = np.array([0.9, 0.7, 0.6, 0.4, 0.0])
    with jax.enable_x64(True):
        got = solve(case.make(), p, times, jnp.asarray(z[0]), predict, z)[-1]
    same(got, tabulated(case.make(), p, times, z[0], MIXTURE.x0, None if case.order else z[:, None]))


@pytest.mark.parametrize("n", [1, 2, 3, 10])
@every
def test_rows_are_finite_and_counted(case, n):
    for process in PROCESSES:
        p = PROCESSES[process]()
        for grid in ("uniform", "log_snr", "karras"):
            times = make_times(GRIDS[grid](), p, n)
            rows = make_rows(case.make(), unguided(), p, times)
            wanted = (case.rows or (lambda n: n))(n)
            alone = sum(p.level(times[:1]).alpha <= 0)  # a step out of alpha = 0 is of one evaluation
            if case.rows is not None and case.solver != "pfdiff" and n > 1:
                wanted -= alone * (case.rows(3) - case.rows(2) - 1)
            assert len(rows.t) == wanted and rows.i.tolist() == list(range(wanted))
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(rows))
            assert np.all(np.diff(rows.step) >= 0) and np.all(rows.t >= times[-2] - 1e-6)


@pytest.mark.parametrize(
    ("n", "order", "orders"),
    [(6, 2, [2, 2, 1, 1]), (7, 2, [2, 2, 2, 1]), (9, 3, [3, 3, 2, 1]), (10, 3, [3, 3, 3, 1]), (11, 3, [3, 3, 3, 1, 1])],
)
def test_the_budget_of_single_steps(n, order, orders):
    """n evaluations, of the orders of diffusers' list to sigma = 0."""
    rows = SOLVERS[f"dpm_solver_{order}s"]().grid(vp_linear(), make_times(GRIDS["uniform"](), vp_linear(), n))
    assert len(rows.t) == n and np.bincount(rows.step).tolist() == orders


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m", "dpm_solver_2m", "dpm_solver_3m"])
def test_steps_that_stretch_too_far_are_of_lower_order(solver):
    p = vp_sde()
    lams = np.array([-3.0, -2.0, -1.5, -1.1, 0.5, 1.0, 1.4, 1.8])  # the fourth step is four times as long as the third
    weights = SOLVERS[solver](lower_order_final=0).grid(p, p.inverse(lams)).coefficients.weights
    used = (weights[:, 0, 3:] != 0).sum(1).tolist()
    assert used == ([0, 1, 1, 0, 1, 1, 1] if solver[-2] == "2" else [0, 1, 2, 0, 1, 2, 2])
    lowered = SOLVERS[solver](lower_order_final=10).grid(p, p.inverse(lams)).coefficients.weights
    assert (lowered[:, 0, 3:] != 0).sum(1).tolist()[-2:] == [1, 0]


@pytest.mark.parametrize(
    ("solver", "arguments", "message"),
    [
        ("dpmpp_3m", {"stretch": 0.0}, "stretch=0.0; allowed: above 0"),
        ("dpmpp_2m", {"solver_type": "taylor"}, "solver_type='taylor'; allowed: midpoint, heun"),
        ("dpmpp_2s", {"r": 1.0}, "r=1.0; allowed: rising and between 0 and 1, or all None"),
        ("dpmpp_3s", {"r1": 0.5}, "r1=0.5, r2=None; allowed: rising"),
        ("dpm_solver_3s", {"r1": 0.5, "r2": 0.4}, "r1=0.5, r2=0.4; allowed: rising"),
        ("dpm_solver_3s", {"stage": "heun"}, "stage='heun'; allowed: exponential, midpoint"),
        ("dpmpp_2m_sde", {"eta": 1.2}, r"eta=1.2; allowed: 0 \.\.\. 1"),
        ("dpmpp_sde", {"r": 0.0}, "r=0.0; allowed: between 0 and 1"),
        ("seeds_2", {"c2": 1.0}, "c2=1.0; allowed: between 0 and 1"),
        ("seeds_3", {"c2": 0.7}, "c2=0.7; allowed: between 0 and 2/3"),
        ("seeds_1", {"prediction": "v"}, "prediction='v'; allowed: x0, eps"),
        ("scire_2", {"phi": 0.0}, "phi=0.0; allowed: above 0, up to 1"),
        ("pfdiff", {"k": 0}, "k=0; allowed: 1"),
        ("pfdiff", {"k": 2, "l": 3}, "l=3; allowed: 1 ... k=2"),
        ("pfdiff", {"output": "v"}, "output='v'; allowed: eps, x0, velocity"),
        ("dpm_solver_12", {"atol": 0.0}, "atol=0.0; allowed: above 0"),
        ("dpm_solver_23", {"safety": 1.5}, "safety=1.5; allowed: above 0, at most 1"),
        ("dpmpp_2m", {"clip": -1.0}, "clip=-1.0; allowed: > 0"),
        ("dpmpp_2m", {"clip": 1.0, "thresholding": 0.9}, "allowed: one of them"),
        ("dpmpp_2m", {"thresholding": 1.5}, "thresholding=1.5; allowed: between 0 and 1"),
        ("dpmpp_2m", {"sample_max_value": 2.0}, "sample_max_value=2.0 without thresholding"),
        ("dpmpp_2m", {"thresholding": 0.9, "sample_max_value": 0.5}, "sample_max_value=0.5; allowed: 1 or more"),
    ],
)
def test_bad_arguments_are_refused(solver, arguments, message):
    with pytest.raises(ValueError, match=f"{solver}: .*{message}"):
        SOLVERS[solver](**arguments)


@pytest.mark.parametrize("solver", sorted({c.solver for c in CASES} | set(ADAPTIVE)))
def test_bad_times_are_refused(solver):
    with pytest.raises(ValueError, match="must decrease strictly"):
        SOLVERS[solver]().grid(vp_linear(), np.array([0.2, 0.5, 0.0]))


def test_noise_predictions_of_seeds_refuse_pure_noise():
    with pytest.raises(ValueError, match="seeds_2: prediction 'eps' divides by alpha, which is 0 at t=1 of flow"):
        SOLVERS["seeds_2"]("eps").grid(flow(), np.array([1.0, 0.5, 0.0]))


def test_adaptive_steps_refuse_a_grid_without_room():
    with pytest.raises(ValueError, match="times from 0.0005 to 0.001; allowed: a grid that begins above"):
        SOLVERS["dpm_solver_12"]().grid(vp_linear(), np.array([0.0005, 0.0]))
