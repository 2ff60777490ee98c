"""Processes of position and velocity and their solvers; derivatives along the flow; two networks in one run."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.optimize import brentq

import difax
from difax.accel.caches import NETWORKS
from difax.accel.fit.genie import fit as fit_genie
from difax.accel.fit.genie import secant
from difax.accel.solvers import SOLVERS
from difax.build import build_setup, build_task
from difax.config import load_config
from difax.core.arrays import save_arrays
from difax.core.contracts import Level, Network, Prediction
from difax.core.cost import model_bytes, model_cost, run_bytes, run_cost
from difax.core.decisions import strip
from difax.core.grids import GRIDS, make_times
from difax.core.guidance import GUIDES, unguided
from difax.core.langevin import AUGMENTED, cld
from difax.core.noise import sample_keys
from difax.core.process import PROCESSES, flow, vp_linear, vp_sde
from difax.core.sample import initial_noise, make_rows, make_sampler
from difax.core.stack import with_learned
from difax.core.trunk import neutral
from difax.registry import make
from difax.study.calibrate import Sampler
from difax.weights.checkpoint import save_safetensors
from tests.families import some
from tests.oracles.augmented import Langevin, sscs
from tests.toys import MIXTURE, predict, randomise, solve, tiny_dit

D = 3
GAUSS = Langevin(0.25, 0.04, [1.0], np.full((1, D), 0.3), [0.5])
DATA = Langevin(0.25, 0.04, [0.4, 0.6], np.array([[0.7, -0.2, 0.1], [-0.5, 0.4, -0.6]]), [0.3, 0.5])
SETTINGS = [{}, {"beta": 2.0, "beta_slope": 3.0, "mass": 0.5, "gamma": 0.2, "mixed_score": False}]


def level_of(process: Any, t: float) -> Any:
    """A `LangevinLevel`, in float64."""
    return process.level(np.float64(t))


def parts(x: Any) -> np.ndarray:
    """[B, 2d] as [B, 2, d]."""
    return np.asarray(x, np.float64).reshape(len(x), 2, -1)


def network(process: Any, data: Langevin, kind: str = "eps") -> Any:
    """What a perfect network of some data gives a solver, by the process's own conversion."""
    p = process.augmented

    @functools.cache
    def known(b: float) -> np.ndarray:
        return data.known(b)

    def predicted(x: Any, level: Any) -> Prediction:
        # the time of the row is not told here: it is where alpha is that of the level
        b = clock_of(float(np.asarray(level.alpha)), p.friction)
        u = parts(x)
        score = data.score(u, b, known(b))[:, 1]
        lv = [float(np.asarray(a)) for a in level]
        e_v = -lv[6] * score
        if kind == "score":
            half = score + lv[7] * u[:, 1] / lv[6]
        elif kind == "eps":
            half = e_v - lv[7] * u[:, 1]
        else:
            tilt = lv[5] / lv[1]
            half = (u[:, 1] - lv[6] * e_v - tilt * u[:, 0]) / (lv[4] - tilt * lv[0])
        poison = np.full_like(half, 7.0)  # the other half of the output is not read
        output = np.concatenate([half, poison] if kind == "x0" else [poison, half], -1)
        x0, eps = p.convert(jnp.asarray(output, x.dtype), kind, x, level)
        return Prediction(x0, eps, None)

    return predicted


def clock_of(alpha: float, friction: float) -> float:
    """B where (1 + 2 B/Gamma) e^{-2 B/Gamma} is alpha."""
    f = lambda y: (1 + y) * np.exp(-y) - alpha  # noqa: E731
    return friction / 2 * float(brentq(f, 1e-9, 60, xtol=1e-15, rtol=1e-15))


def keys_of(n: int, rows: int) -> list[Any]:
    keys = sample_keys(1, n)
    return [jax.vmap(jax.random.fold_in, (0, None))(keys, i) for i in range(rows)]


# ---------------------------------------------------------------- the process


@pytest.mark.parametrize("settings", SETTINGS, ids=["paper", "other"])
def test_levels_of_cld_are_those_of_its_equation(settings):
    process = cld(**settings)
    p = process.augmented
    data = Langevin(p.mass, settings.get("gamma", 0.04), [1.0], np.zeros((1, 1)), [0.0])
    for t in (1e-5, 1e-3, 0.04, 0.3, 1.0):
        b, level = float(p.clock(t)), level_of(process, t)
        covariance, motion = data.known(b), data.moved(b)
        np.testing.assert_allclose(p.root(t) @ p.root(t).T, covariance, rtol=1e-9)
        np.testing.assert_allclose(p.transition(b), motion, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose([level.alpha, level.alpha_v], motion[:, 0], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(p.spread(b), data.covariance(b, np.zeros((2, 2))), rtol=1e-7)
        assert p.time(b) == pytest.approx(t)
        single = process.level(jnp.float32(t), jnp)
        assert all(a.dtype == jnp.float32 for a in single)
        np.testing.assert_allclose(single, level, rtol=2e-5)
        if settings.get("mixed_score", True):  # e_v of data N(0, 1) is mixed v
            whole = data.covariance(b, np.diag([1.0, data.first]))
            np.testing.assert_allclose(level.mixed, level.sigma_v / whole[1, 1], rtol=1e-9)
    d, t = 1e-6, np.array([0.02, 0.3, 0.9])
    for name in ("alpha", "sigma"):
        slope = (getattr(process.level(t + d), name) - getattr(process.level(t - d), name)) / (2 * d * 999)
        np.testing.assert_allclose(getattr(process.level(t), f"{name}_dot"), slope, rtol=1e-5)
    level = process.level(t)
    np.testing.assert_allclose(process.inverse(np.log(level.alpha / level.sigma)), t, rtol=1e-9)


@pytest.mark.parametrize("settings", SETTINGS, ids=["paper", "other"])
def test_gddims_root_solves_its_equation(settings):
    p = cld(**settings).augmented
    data = Langevin(p.mass, settings.get("gamma", 0.04), [1.0], np.zeros((1, 1)), [0.0])
    first = p.root(0.01) @ p.turn(0.01)
    for t in (0.1, 1.0):
        np.testing.assert_allclose(
            p.root(t) @ p.turn(t), data.root(p.clock(0.01), p.clock(t), first), rtol=1e-8, atol=1e-9
        )


@pytest.mark.parametrize("kind", ["eps", "x0", "score"])
@pytest.mark.parametrize("settings", SETTINGS, ids=["paper", "other"])
def test_the_velocitys_half_says_all(kind, settings):
    """Conversion there and back, for each kind of prediction; what the other half holds is not read."""
    process = cld(**settings)
    p, rng = process.augmented, np.random.default_rng(0)
    with jax.enable_x64(True):
        for t in (0.01, 0.4, 0.95):
            level = level_of(process, t)
            x0, e_x, e_v = rng.normal(size=(3, 5, D))
            x = level.alpha * x0 + level.sigma * e_x
            v = level.alpha_v * x0 + level.cross * e_x + level.sigma_v * e_v
            u, eps = np.concatenate([x, v], -1), np.concatenate([e_x, e_v], -1)
            half = p.target(kind, x0, jnp.asarray(eps), jnp.asarray(u), level)
            order = [half, 9 + 0 * half] if kind == "x0" else [9 + 0 * half, half]
            found = p.convert(jnp.concatenate(order, -1), kind, jnp.asarray(u), level)
            np.testing.assert_allclose(found[0], np.concatenate([x0, 0 * x0], -1), rtol=1e-7, atol=1e-8)
            np.testing.assert_allclose(found[1], eps, rtol=1e-7, atol=1e-8)


def test_the_noise_begins_as_both_halves_prior():
    x = np.asarray(initial_noise(cld(), sample_keys(0, 4000), (2, 4)))
    np.testing.assert_allclose(x[..., :2].std(), 1.0, atol=0.02)
    np.testing.assert_allclose(x[..., 2:].std(), 0.5, atol=0.01)


# ---------------------------------------------------------------- gDDIM


@pytest.mark.parametrize("settings", [{}, {"order": 1}, {"order": 3, "corrector": True}], ids=str)
@pytest.mark.parametrize("times", [[1.0, 0.0], [0.95, 0.6, 0.5, 0.1, 0.0], [0.9, 0.5, 0.3]], ids=str)
def test_gddim_is_exact_for_one_image(settings, times):
    """Of data that is one point eps is constant along the flow: any steps, any order, to rounding."""
    process, c = cld(), np.linspace(-1, 1, D)[None]
    point = Langevin(0.25, 0.04, [1.0], c, [0.0])
    t = np.array(times)
    with jax.enable_x64(True):
        x = initial_noise(process, sample_keys(0, 4), (2 * D,)).astype(jnp.float64)
        end = parts(solve(SOLVERS["gddim"](**settings), process, t, x, network(process, point))[-1])
    p = process.augmented
    if times[-1] == 0:
        np.testing.assert_allclose(end[:, 0], np.broadcast_to(c, (4, D)), rtol=1e-8, atol=1e-9)
    else:
        np.testing.assert_allclose(end, point.flow(parts(x), p.clock(t[0]), p.clock(t[-1])), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("order", some([1, 2, 3], 2))
def test_gddims_weights_are_the_integrals_of_the_paper(order):
    process, t = cld(), np.array([0.8, 0.6, 0.45, 0.3])
    p = process.augmented
    b = p.clock(t)
    table = np.asarray(SOLVERS["gddim"](order=order).grid(process, t).coefficients.weights)[2, :2]
    root_at = lambda at: p.root(p.time(at)) @ p.turn(p.time(at))  # noqa: E731
    wanted = GAUSS.weights(b[2 - np.arange(order)], b[2], b[3], root_at)
    # ours acts on (x, x0, eps, past); x0 and eps give Psi(s, t) u = Psi(s, 0) x0 + Psi(s, t) K eps
    q = p.turn(t[2])
    held = p.transition(b[3] - b[2]) @ p.root(t[2])
    np.testing.assert_allclose(table[:, 2:4], p.transition(b[3]), rtol=1e-9)
    np.testing.assert_allclose(table[:, 4:6], held + wanted[0] @ q.T, rtol=1e-5, atol=1e-7)
    for k in range(1, order):
        np.testing.assert_allclose(table[:, 4 + 2 * k : 6 + 2 * k], wanted[k], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def flown():
    """(start, end) of the probability flow of `DATA` from t = 0.9 to t = 0.1."""
    p, start = cld().augmented, np.random.default_rng(3).normal(size=(4, 2, D)) * np.array([1, 0.5])[:, None]
    return start, DATA.flow(start, float(p.clock(0.9)), float(p.clock(0.1)))


@pytest.mark.parametrize(
    ("settings", "order"),
    [
        ({"order": 1}, 1),
        ({"order": 2}, 2),
        pytest.param({"order": 3}, 2.8, marks=pytest.mark.slow),  # its first step, of order 1, caps it
        ({"order": 1, "corrector": True}, 2),
        pytest.param({"order": 2, "corrector": True}, 3, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gddims_order_of_convergence_on_cld(settings, order, flown):
    process, steps, errors = cld(), (40, 80, 160), []
    with jax.enable_x64(True):
        for n in steps:
            x = jnp.asarray(flown[0].reshape(4, -1))
            end = solve(SOLVERS["gddim"](**settings), process, np.linspace(0.9, 0.1, n + 1), x, network(process, DATA))
            errors.append(np.abs(parts(end[-1]) - flown[1]).max())
    measured = -np.diff(np.log(errors)) / np.log(2)
    print(f"gddim {settings} on cld: order by doubling {measured.round(2)}, errors {np.array(errors)}")
    assert measured[-1] == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("process", some(PROCESSES, "vp_sde", "flow"))
def test_gddim_of_order_one_is_ddim_on_a_scalar_process(process):
    p = PROCESSES[process]()
    times = np.array([0.95, 0.8, 0.55, 0.5, 0.2, 0.0])
    keys = keys_of(4, 5)
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(5).normal(size=(4, 8)) * p.level(times[:1]).sigma)
        for ours, theirs in (({"order": 1}, {}), ({"order": 1, "lam": 1.0}, {"eta": 1.0})):
            a = solve(SOLVERS["gddim"](**ours), p, times, x, predict, keys)[-1]
            b = solve(SOLVERS["ddim"](**theirs), p, times, x, predict, keys)[-1]
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "order"), [({"order": 2}, 2), ({"order": 3}, 3), ({"corrector": True}, 3)], ids=str
)
def test_gddims_order_of_convergence_on_a_scalar_process(settings, order):
    """Against many steps of itself: vp_sde, whose coefficients are smooth in t."""
    p, ends = vp_sde(), []
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(5).normal(size=(4, 8)))
        for n in (20, 40, 80, 320):
            times = np.linspace(0.8, 0.2, n + 1)
            ends.append(np.asarray(solve(SOLVERS["gddim"](**settings), p, times, x, predict)[-1]))
    errors = [np.abs(e - ends[-1]).max() for e in ends[:-1]]
    fitted = -np.diff(np.log(errors)).mean() / np.log(2)
    print(f"gddim {settings} on vp_sde: order {fitted:.2f}, errors {np.array(errors)}")
    assert fitted == pytest.approx(order, abs=0.2)


def moments(solver: Any, process: Any, times: np.ndarray, data: Langevin) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance [2], [2, 2] of one coordinate of Gaussian data through a linear solver's own table, exactly.

    A perfect network of a Gaussian is affine in u, and so is every step.
    """
    p = process.augmented
    rows = solver.grid(process, times)
    mean, spread = np.zeros(2), np.diag(np.square(p.prior_std))
    mean0, std = float(data.mean[0, 0]), float(data.std[0])
    for e, t in enumerate(rows.t):
        b, w = float(p.clock(t)), np.asarray(rows.coefficients.weights)[e]
        motion, known = data.moved(b), data.known(b)
        inverse = np.linalg.inv(known + std**2 * np.outer(motion[:, 0], motion[:, 0]))
        # E[eps | u] = K^T S^-1 (u - m), and x0 from the position's line
        by_u = p.root(t).T @ inverse
        level = process.level(t)
        x0_by_u = (np.array([1.0, 0.0]) - level.sigma * by_u[0]) / level.alpha
        at = motion[:, 0] * mean0
        x0_by_u, x0_at = np.stack([x0_by_u, np.zeros(2)]), np.array([level.sigma * by_u[0] @ at / level.alpha, 0.0])
        total = w[:2, 0:2] + w[:2, 2:4] @ x0_by_u + w[:2, 4:6] @ by_u
        mean = total @ mean + w[:2, 2:4] @ x0_at - w[:2, 4:6] @ by_u @ at
        noise = w[:2, 6:8] if w.shape[1] > 6 else np.zeros((2, 2))
        spread = total @ spread @ total.T + noise @ noise.T
    return mean, spread


@pytest.mark.parametrize(
    ("solver", "settings"),
    [
        ("gddim", {"order": 1}),
        pytest.param("gddim", {"order": 1, "lam": 0.5}, marks=pytest.mark.slow),
        ("sscs", {}),
        pytest.param("cld_em", {}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gaussian_data_is_drawn_with_its_mean_and_covariance(solver, settings):
    """No sampling error: the moments go through the table. The error falls as the number of steps grows, at least."""
    process, errors = cld(), []
    for n in (25, 50, 100):
        times = process.inverse(
            np.linspace(np.log(level_ratio(process, 1.0)), np.log(level_ratio(process, 0.02)), n + 1)
        )
        times[0] = 1.0
        mean, spread = moments(SOLVERS[solver](**settings), process, times, GAUSS)
        b = float(process.augmented.clock(times[-1]))
        motion = GAUSS.moved(b)
        wanted = GAUSS.known(b) + 0.25 * np.outer(motion[:, 0], motion[:, 0])
        errors.append(max(np.abs(mean - 0.3 * motion[:, 0]).max(), np.abs(spread - wanted).max()))
    print(f"{solver} {settings}: {np.array(errors)}")
    assert errors[2] < 0.6 * errors[1] < 0.36 * errors[0] and errors[2] < 0.03


def level_ratio(process: Any, t: Any) -> np.ndarray:
    level = process.level(np.asarray(t))
    return level.alpha / level.sigma


def test_what_gddim_keeps_is_by_its_equation():
    """Psi^ of F^ = F + (1 + lambda^2)/2 G G^T (R R^T)^-1, as the authors integrate it."""
    process, lam, t = cld(), 0.8, np.array([0.5, 0.2])
    p = process.augmented
    w = np.asarray(SOLVERS["gddim"](order=1, lam=lam).grid(process, t).coefficients.weights)[0, :2, 4:6]

    def slope(b, psi):
        inverse = np.linalg.inv(p.root(p.time(b)) @ p.root(p.time(b)).T)
        return ((GAUSS.F + (1 + lam**2) / 2 * GAUSS.N @ inverse) @ psi.reshape(2, 2)).ravel()

    ends = p.clock(t)
    psi = solve_ivp(slope, ends, np.eye(2).ravel(), rtol=1e-9, atol=1e-11).y[:, -1].reshape(2, 2)
    np.testing.assert_allclose(w, psi @ p.root(0.5), rtol=5e-4)  # second order in the stretches


def test_what_gddim_keeps_of_the_noise_and_adds_is_whole():
    """The stochastic step keeps the covariance given x0, whatever lambda, as the reverse diffusion does; lam = 0 is the
    deterministic table, and to t = 0 nothing random is left in the position."""
    process, t = cld(), np.array([0.9, 0.5, 0.2, 0.0])
    p = process.augmented
    plain = np.asarray(SOLVERS["gddim"](order=1).grid(process, t).coefficients.weights)
    for lam in (1e-6, 0.3, 1.0, 10.0):
        w = np.asarray(SOLVERS["gddim"](order=1, lam=lam).grid(process, t).coefficients.weights)[:, :2]
        for e in range(3):
            kept, drawn = w[e][:, 4:6], w[e][:, 6:8]
            whole = p.root(t[e + 1]) @ p.root(t[e + 1]).T
            np.testing.assert_allclose(kept @ kept.T + drawn @ drawn.T, whole, rtol=1e-7, atol=1e-9)
        if lam < 1e-3:
            np.testing.assert_allclose(w[..., :6], plain[:, :2, :6], atol=1e-6)
        np.testing.assert_allclose(w[2][0, 4:8], 0.0, atol=1e-6)


# ---------------------------------------------------------------- SSCS and Euler-Maruyama


def test_sscs_is_the_authors_with_the_same_noise():
    """Theirs draws two halves between evaluations, ours one: the joint law is compared by moments of one step, and the
    whole path, with no noise."""
    process = cld(mixed_score=False)
    p, times = process.augmented, np.array([1.0, 0.7, 0.5, 0.2])
    u = np.random.default_rng(0).normal(size=(5, 2, D))
    known = {t: DATA.known(float(p.clock(t))) for t in times[:-1]}
    score = lambda u, t: DATA.score(u, float(p.clock(t)), known[t])[:, 1]  # noqa: E731
    quiet = np.zeros((3, 2, 5, 2, D))
    wanted = sscs(u, score, times, 4.0, 0.25, quiet)
    # theirs has a half step of the Ornstein-Uhlenbeck part before the first evaluation
    half = p.transition(float(p.clock(1.0) - p.clock(0.85))) * np.array([[1, -1], [-1, 1]])
    rows = SOLVERS["sscs"]().grid(process, times)
    x = jnp.asarray(np.einsum("ij,bjd->bid", half, u).reshape(5, -1))
    with jax.enable_x64(True):
        x = jnp.asarray(np.einsum("ij,bjd->bid", half, u).reshape(5, -1))
        weights = np.asarray(rows.coefficients.weights).copy()
        weights[..., 6:8] = 0
        solver = SOLVERS["sscs"]()
        quietly = solver._replace(
            grid=lambda *a: rows._replace(coefficients=rows.coefficients.replace(weights=weights))
        )
        got = solve(quietly, process, times, x, network(process, DATA), keys_of(5, 3))[-1]
    np.testing.assert_allclose(parts(got), wanted, rtol=1e-7, atol=1e-8)
    # the noise of the two halves after the first evaluation, as one
    b1, b2 = float(p.clock(0.85) - p.clock(0.7)), float(p.clock(0.7) - p.clock(0.6))
    flip = np.array([[1, -1], [-1, 1]])
    second = p.transition(b2) * flip
    both = second @ (p.spread(b1) * flip) @ second.T + p.spread(b2) * flip
    drawn = np.asarray(rows.coefficients.weights)[0, :2, 6:8]
    np.testing.assert_allclose(drawn @ drawn.T, both, rtol=1e-9)
    # and theirs of one half, by its closed form
    one = [sscs(np.zeros((1, 2, 1)), lambda u, t: -4 * u[:, 1], [0.3, 0.0], 4.0, 0.25, z) for z in unit_noise()]
    np.testing.assert_allclose(
        np.stack([o.ravel() for o in one], 1) @ np.stack([o.ravel() for o in one], 1).T,
        p.spread(1.2) * flip,
        rtol=1e-9,
    )


def unit_noise() -> list[np.ndarray]:
    """Each of the four numbers that two half steps draw, alone."""
    found = []
    for k in range(4):
        z = np.zeros(4)
        z[k] = 1
        found.append(z.reshape(1, 2, 1, 2, 1))
    return found


def test_euler_maruyama_by_its_equation():
    process, times = cld(mixed_score=False), np.array([0.9, 0.6, 0.0])
    p = process.augmented
    w = np.asarray(SOLVERS["cld_em"]().grid(process, times).coefficients.weights)[0, :2]
    h, sigma_v = 0.3 * 4.0, p.root(0.9)[1, 1]
    np.testing.assert_allclose(w[:, :2], [[1, -4 * h], [h, 1 + 4 * h]])
    np.testing.assert_allclose(w[:, 4:6], [[0, 0], [0, -2 * h / sigma_v]])
    np.testing.assert_allclose(w[:, 6:8], [[0, 0], [0, np.sqrt(2 * h)]])
    last = np.asarray(SOLVERS["cld_em"]().grid(process, times).coefficients.weights)[1, :2]
    np.testing.assert_allclose(last, np.eye(2, 8, 2))


# ---------------------------------------------------------------- in the sampler, and its refusals

LANGEVIN = {**load_config("fmnist_smoke"), "weights": "random", "process": {"name": "cld"}, "prediction": "eps"}
LANGEVIN |= {"steps": 3, "grid": {"name": "quadratic"}, "loss": {"name": "hsm"}, "solver": {"name": "gddim"}}
LANGEVIN["model"] = {**LANGEVIN["model"], "depth": 1, "width": 16, "heads": 2, "size": 8, "patch": 2, "channels": 2}


@pytest.mark.parametrize("solver", some(["gddim", "sscs", "cld_em"], "sscs"))
def test_the_sampler_gives_out_positions(solver):
    """As many channels as the data has; the same keys give the same samples, and a batch is its singles."""
    setup = build_setup({**LANGEVIN, "solver": {"name": solver}})
    params = setup.prepare(setup.model.init(jax.random.key(0)))
    params = jax.tree.map(lambda a: a + 0.02, params)
    sampler, labels = setup.sampler(), np.array([1, 2, 3], np.int32)
    drawn = lambda n, start: sampler(  # noqa: E731
        params, *setup.inputs(0, n, labels, start), setup.rows, setup.scale
    )[0]
    several, single = np.asarray(drawn(3, 0)), np.asarray(drawn(1, 1))
    assert several.shape == (3, 8, 8, 1) and np.isfinite(several).all()
    np.testing.assert_array_equal(several, drawn(3, 0))
    np.testing.assert_allclose(several[1:2], single, rtol=1e-4, atol=1e-4)


def test_the_loss_is_that_of_the_velocitys_noise():
    """A network that says nothing has, with the mixed score, the error of taking data for N(0, 1)."""
    task = build_task(LANGEVIN)
    assert task.input_shape == (8, 8, 1)
    params = jax.tree.map(jnp.zeros_like, task.init(jax.random.key(0)))
    batch = {"image": np.full((64, 8, 8, 1), 255, np.uint8), "label": np.zeros(64, np.int32)}
    loss, _ = task.loss(params, batch, jax.random.key(3))
    time_key, noise_key, _ = jax.random.split(jax.random.key(3), 3)
    t = np.asarray(jax.random.uniform(time_key, (64,), jnp.float32, 1e-5, 1.0), np.float64)
    e_x, e_v = np.asarray(jax.random.normal(noise_key, (2, 64, 8, 8, 1)), np.float64)
    data = Langevin(0.25, 0.04, [1.0], np.zeros((1, 1)), [0.0])
    wanted = []
    for i, b in enumerate(4 * t):
        given = data.known(b)
        l11 = np.sqrt(given[0, 0])
        l21 = given[1, 0] / l11
        l22 = np.sqrt(given[1, 1] - l21**2)
        v = data.moved(b)[1, 0] + l21 * e_x[i] + l22 * e_v[i]
        whole = data.covariance(b, np.diag([1.0, data.first]))[1, 1]
        wanted.append(((e_v[i] - l22 / whole * v) ** 2).mean())
    np.testing.assert_allclose(loss, np.mean(wanted), rtol=1e-4)


NEEDS = {"mcg": {"measurement": 0.0, "mask": 0.0}}  # what a factory must be given


SCALAR = [s for s in SOLVERS if not SOLVERS[s](**NEEDS.get(s, {})).augmented]


@pytest.mark.parametrize("solver", some(SCALAR, "ddim", "heun", "unipc", "gotta_go_fast", "mcg"))
def test_scalar_solvers_are_refused_a_process_of_position_and_velocity(solver):
    with pytest.raises(ValueError, match=f"solver {solver}.*: process cld has positions.*allowed: sscs, cld_em, gddim"):
        build_setup({**LANGEVIN, "solver": {"name": solver, **NEEDS.get(solver, {})}})
    with pytest.raises(ValueError, match="process cld has positions"):
        make_rows(SOLVERS[solver](**NEEDS.get(solver, {})), unguided(), cld(), np.array([0.9, 0.5, 0.0]))


REFUSED = [
    (
        lambda: SOLVERS["sscs"]().grid(vp_linear(), np.array([0.9, 0.0])),
        "sscs: process vp_linear has no velocities; al",
    ),
    (lambda: SOLVERS["cld_em"]().grid(flow(), np.array([0.9, 0.0])), "cld_em: process flow has no velocities"),
    (
        lambda: build_setup({**LANGEVIN, "prediction": "velocity"}),
        "prediction=velocity of process cld; allowed: eps, x0",
    ),
    (
        lambda: build_setup({**LANGEVIN, "model": {**LANGEVIN["model"], "channels": 1}}),
        "process cld takes as many channels of velocity as of position, and dit-.* has channels=1",
    ),
    (lambda: build_task({**LANGEVIN, "loss": {"name": "flow"}}), "flow loss: process cld has positions"),
    (lambda: build_task({**load_config("fmnist_smoke"), "loss": {"name": "hsm"}}), "hsm loss: process flow has no vel"),
    (lambda: SOLVERS["gddim"](order=5), "gddim: order=5; allowed: 1, 2, 3, 4"),
    (lambda: SOLVERS["gddim"](lam=0.5), "gddim: lam=0.5 with order=2, corrector=False; allowed: order=1"),
    (lambda: SOLVERS["gddim"](order=1, lam=-1.0), "gddim: lam=-1.0; allowed: 0 ... 10"),
    (lambda: cld(mass=0.0), "cld: mass=0.0; allowed: 0.001"),
    (lambda: cld(gamma=0.0), "cld: gamma=0.0; allowed: 1e-6"),
    (lambda: cld(beta=0.0), "cld: beta=0.0"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[m[:40] for _, m in REFUSED])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message.replace("...", r"\.\.\.")):
        call()


def test_registered():
    assert set(AUGMENTED) == {"cld"} and not set(AUGMENTED) & set(PROCESSES)
    assert Level._fields == type(cld().level(np.float64(0.5)))._fields[:4]
    assert make_times(GRIDS["quadratic"](), cld(), 4)[-2] == pytest.approx(1e-3)
    assert MIXTURE.mean_KD.shape[1] == 8


# ---------------------------------------------------------------- two networks in one run


def duo(switch: float, guide: Any = None, n: int = 4, **shallow: Any) -> tuple[Any, Any, Any]:
    """(full alone, both, shallow alone) as functions of nothing that give (samples, trace), on tiny networks."""
    model, params = tiny_dit(depth=3)
    other, weights = tiny_dit(depth=1, **shallow)
    weights = jax.tree.map(lambda a: 1.1 * a, weights)
    process, guide = flow(), guide or GUIDES["cfg"]()
    times, keys = make_times(GRIDS["uniform"](), process, n), sample_keys(0, 2)

    def run(model: Any, params: Any, cache: Any) -> Any:
        rows = make_rows(SOLVERS["euler"](), guide, process, times, cache, model.stages)
        sampler = make_sampler(model, process, "velocity", SOLVERS["euler"](), guide, cache)
        x = initial_noise(process, keys, model.input_shape)
        return sampler(with_learned(params, cache), x, keys, jnp.array([1, 4]), rows, 1.5)

    cache = NETWORKS["duodiff"](switch, network=Network(other, weights))
    return (
        lambda: run(model, params, neutral()),
        lambda: run(model, params, cache),
        lambda: run(other, weights, neutral()),
    )


@pytest.mark.parametrize("guide", some(["cfg", "none", "apart"], "cfg"))
def test_a_switch_at_either_end_is_one_network_alone(guide):
    guide = {"cfg": GUIDES["cfg"](), "none": GUIDES["none"](), "apart": GUIDES["cfg"](together=False)}[guide]
    for switch, which in ((1.0, 0), (0.0, 2)):
        runs = duo(switch, guide)
        alone, both = runs[which](), runs[1]()
        np.testing.assert_array_equal(both[0], alone[0])
        named = "blocks" if which == 0 else "1/blocks"
        np.testing.assert_array_equal(both[1].computed[named], alone[1].computed["blocks"])
        assert sum(float(a.sum()) for n, a in both[1].computed.items() if n != named) == 0


def test_two_networks_cost_what_ran_of_each():
    """t = 1, 0.75, 0.5, 0.25 with the switch at 0.6: the shallow network twice, the full one twice."""
    model, params = tiny_dit(depth=3)
    other, weights = tiny_dit(depth=1)
    full, both, shallow = (run() for run in duo(0.6))
    assert strip(both[1]) == "ssFF"
    costs = model_cost(model, params, networks=(Network(other, weights),))
    one, two = model_cost(model, params), model_cost(other, weights)
    assert run_cost(costs, both[1]) == pytest.approx(2 * 2 * (one.evaluation + two.evaluation))
    assert run_cost(one, full[1]) == pytest.approx(4 * 2 * one.evaluation)
    bytes_ = model_bytes(model, params, networks=(Network(other, weights),))
    alone = [
        run_bytes(model_bytes(*of), run[1], 2) for of, run in (((model, params), full), ((other, weights), shallow))
    ]
    assert run_bytes(bytes_, both[1], 2) == pytest.approx(sum(alone) / 2)


def test_the_network_that_does_not_run_is_not_read():
    """Poisoned weights of the other network change nothing."""
    model, params = tiny_dit(depth=3)
    spoiled = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), params)
    for switch, first, second in ((1.0, params, spoiled), (0.0, spoiled, params)):
        cache = NETWORKS["duodiff"](switch, network=Network(model, second))
        process, times = flow(), np.linspace(1, 0, 3)
        rows = make_rows(SOLVERS["euler"](), unguided(), process, times, cache, model.stages)
        sampler = make_sampler(model, process, "velocity", SOLVERS["euler"](), None, cache)
        x, keys = initial_noise(process, sample_keys(0, 1), model.input_shape), sample_keys(0, 1)
        assert np.isfinite(sampler(with_learned(first, cache), x, keys, jnp.array([1]), rows, 1.0)[0]).all()


@pytest.mark.slow
def test_the_second_networks_depth_is_that_of_its_weights(tmp_path, capsys):
    """By the command, from the file of a model of another depth."""
    smoke = load_config("fmnist_smoke")
    section = {**smoke["model"], "depth": 2, "size": 8, "patch": 2, "width": 16}
    shallow = make("model", section)
    path = tmp_path / "shallow.safetensors"
    save_safetensors(path, shallow.init(jax.random.key(0)), {"config": {"model": section}})
    run = difax.load(
        {**smoke, "weights": "random", "steps": 4, "model": {**section, "depth": 3}},
        cache={"name": "duodiff", "weights": str(path), "switch": 0.5},
    )
    result = run.sample([1, 2])
    assert result.cost["decisions"] == ["ssFF", "ssFF"]
    assert [a.shape[1] for _, a in sorted(result.trace.computed.items())] == [2, 3]
    for said, keys in {
        r"weights=nowhere: no such file or folder": {"weights": "nowhere"},
        r"with input_shape=\(28, 28, 1\); allowed: that of dit-3x16/2": {"weights": "fmnist_dit"},
        r"duodiff: weights=None; allowed: a run's folder": {"weights": None},
        r"duodiff: switch=2.0; allowed: 0 \.\.\. 1": {"weights": str(path), "switch": 2.0},
    }.items():
        with pytest.raises(ValueError, match=said):
            run.replace(cache={"name": "duodiff", **keys})
    with pytest.raises(ValueError, match="conditioning=ahead: cache duodiff runs another network too; allowed: each"):
        run.replace(conditioning="ahead")


# ---------------------------------------------------------------- GENIE


def perfect(process: Any) -> Any:
    """(x, t) -> what a perfect network of the mixture gives, with its derivative along (dx, dt)."""
    mean, std, weight = (jnp.asarray(a) for a in (MIXTURE.mean_KD, MIXTURE.std_K, MIXTURE.weight_K))

    def said(x: Any, t: Any) -> Any:
        level = process.level(t, jnp)
        variance = level.alpha**2 * std**2 + level.sigma**2
        far = x[:, None] - level.alpha * mean[None]
        log = jnp.log(weight)[None] - 0.5 * (far**2).sum(-1) / variance[None] - 4 * jnp.log(variance)[None]
        share = jax.nn.softmax(log, axis=1)
        x0 = jnp.einsum("bk,bkd->bd", share, mean[None] + (level.alpha * std**2 / variance)[None, :, None] * far)
        return x0, (x - level.alpha * x0) / level.sigma

    def predicted(x: Any, t: Any) -> Prediction:
        x0, eps = said(x, t)
        jvp = lambda dx, dt: jax.jvp(said, (x, jnp.asarray(t)), (dx, jnp.asarray(dt)))[1]  # noqa: E731
        return Prediction(x0, eps, None, jvp)

    return predicted


def flowed(solver: Any, process: Any, times: np.ndarray, x: Any) -> np.ndarray:
    """A solver's own table and step with derivatives, for `solve` hands out none."""
    rows, predicted = solver.grid(process, times), perfect(process)

    @jax.jit
    def step(x: Any, row: Any) -> Any:
        return solver.step(predicted(x, row.t), x, (), row, None)[0]

    for e in range(len(rows.t)):
        x = step(x, jax.tree.map(lambda a, e=e: jnp.asarray(a[e]), rows))
    return np.asarray(x)


@pytest.mark.parametrize("case", some(["vp_sde", "vp_sde flow", "flow", "ve", "sit"], "vp_sde", "flow"))
def test_genies_order_is_two(case):
    process, _, space = case.partition(" ")
    p, errors = PROCESSES[process](), []
    with jax.enable_x64(True):
        start = np.random.default_rng(3).normal(size=(4, 8)) * np.exp(3.0)  # of y = x/alpha at sigma/alpha = e^3

        def slope(s: float, y: np.ndarray) -> np.ndarray:
            rho = np.exp(s)
            return (rho * MIXTURE.eps(y.reshape(4, 8), 1.0, rho)).ravel()

        exact = solve_ivp(slope, (3.0, -3.0), start.ravel(), method="DOP853", rtol=1e-10, atol=1e-10)
        for n in (40, 80, 160):
            times = p.inverse(np.linspace(-3.0, 3.0, n + 1))
            ends = p.level(times[[0, -1]])
            end = flowed(SOLVERS["genie"](space or None), p, times, jnp.asarray(start * ends.alpha[0]))
            errors.append(np.abs(end / ends.alpha[1] - exact.y[:, -1].reshape(4, 8)).max())
    measured = -np.diff(np.log(errors)) / np.log(2)
    print(f"genie {case}: order by doubling {measured.round(2)}, errors {np.array(errors)}")
    assert measured[-1] == pytest.approx(2, abs=0.2)


def test_genie_by_the_papers_step():
    """x/alpha <- x/alpha + h eps + h^2/2 d eps/d gamma, the derivative by differences along the flow."""
    p, times, delta = vp_sde(), np.array([0.6, 0.4]), 1e-4
    x = np.random.default_rng(0).normal(size=(3, 8))
    with jax.enable_x64(True):
        got = flowed(SOLVERS["genie"](), p, times, jnp.asarray(x))
    level = p.level(times)
    y, gamma = x / level.alpha[0], level.sigma / level.alpha
    eps = MIXTURE.eps(y, 1.0, gamma[0])
    slope = (
        MIXTURE.eps(y + delta * eps, 1.0, gamma[0] + delta) - MIXTURE.eps(y - delta * eps, 1.0, gamma[0] - delta)
    ) / (2 * delta)
    h = gamma[1] - gamma[0]
    np.testing.assert_allclose(got, level.alpha[1] * (y + h * eps + h**2 / 2 * slope), rtol=1e-6, atol=1e-7)


# told times of 0 to 1, in which a network of random weights is smooth
SMALL = {**load_config("fmnist_smoke"), "weights": "random", "steps": 4, "process": {"name": "flow", "time_scale": 1.0}}
SMALL["model"] = {**SMALL["model"], "depth": 1, "width": 16, "heads": 2, "size": 8, "patch": 2}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """(run with random weights, file of a head that was fitted to it, the lines that it told)."""
    run, lines = difax.load({**SMALL, "solver": {"name": "genie"}}), []
    params = randomise(run.params)
    sampler = Sampler(run.setup, run.setup.prepare(params), np.arange(10, dtype=np.int32), 0)
    arrays = fit_genie(sampler, 48, 16, lines.append, nodes=3, width=32, steps=150, rate=1e-2)
    path = tmp_path_factory.mktemp("genie") / "head.npz"
    save_arrays(path, arrays)
    return sampler, path, arrays, lines


@pytest.mark.slow
def test_a_head_is_fitted_to_the_exact_derivative(fitted):
    _, _, arrays, lines = fitted
    print(lines[-1])
    assert arrays["error"] < 0.7 and arrays["flow"] == 1  # of a random network, from 48 samples


def test_a_derivative_over_a_reach_is_the_change_of_the_slope_on_the_way():
    """d = u (2 - y) of a flow, whose way from y at u is 2 - (2 - y) exp(-(u'^2 - u^2)/2)."""
    x, t, reach = jnp.asarray([[[[0.3, -1.0]]]]), jnp.asarray([0.6]), 0.2

    def predicted(x, t):
        d = t[:, None, None, None] * (2.0 - x)  # a flow: y = x, u = t, d = eps - x0
        return x - t[:, None, None, None] * d, x + (1 - t[:, None, None, None]) * d

    got = secant(predicted, flow(), x, t, 0.6 * (2.0 - x), 1.0, reach)
    there = 2 - (2 - np.asarray(x)) * np.exp(-(0.4**2 - 0.6**2) / 2)
    wanted = (0.4 * (2 - there) - 0.6 * (2 - np.asarray(x))) / -0.2
    np.testing.assert_allclose(got, wanted, rtol=5e-3)
    np.testing.assert_allclose(secant(predicted, flow(), x, jnp.asarray([1e-4]), 0 * x, 1.0, reach), 0)


def test_a_fitted_head_is_sampled_with_and_a_zero_one_is_ddim(fitted, tmp_path):
    sampler, path, arrays, _ = fitted

    def drawn(solver: dict[str, Any]) -> np.ndarray:
        setup = build_setup({**SMALL, "solver": solver})
        x, keys, cond = setup.inputs(0, 3, np.arange(3, dtype=np.int32))
        return np.asarray(setup.sampler()(sampler.params, x, keys, cond, setup.rows, setup.scale)[0])

    zeros = {k: 0 * v if k.startswith("out") else v for k, v in arrays.items()}
    save_arrays(tmp_path / "zero.npz", zeros)
    ddim, exact = drawn({"name": "euler"}), drawn({"name": "genie"})
    none, ours = (drawn({"name": "genie", "file": str(f)}) for f in (tmp_path / "zero.npz", path))
    np.testing.assert_allclose(none, ddim, rtol=1e-4, atol=1e-5)
    assert np.abs(ours - exact).mean() < np.abs(none - exact).mean()


def test_bad_heads_are_refused(fitted, tmp_path):
    sampler, path, arrays, _ = fitted
    path = str(path)
    for said, change in {
        "has no array out/bias": {"out/bias": None},
        "its arrays have shapes": {"in/bias": np.zeros(3, np.float32)},
        "not finite": {"out/bias": np.full_like(arrays["out/bias"], np.nan)},
    }.items():
        save_arrays(tmp_path / "bad.npz", {k: v for k, v in {**arrays, **change}.items() if v is not None})
        with pytest.raises(ValueError, match=said):
            SOLVERS["genie"](file=str(tmp_path / "bad.npz"))
    with pytest.raises(ValueError, match="nowhere.npz.*no such file"):
        SOLVERS["genie"](file="nowhere.npz")
    with pytest.raises(ValueError, match="space='time'; allowed: sigma, flow"):
        SOLVERS["genie"]("time")
    with pytest.raises(ValueError, match="is of space flow; allowed: that of vp_sde"):
        SOLVERS["genie"](file=path).grid(vp_sde(), np.array([0.9, 0.5]))
    with pytest.raises(ValueError, match="divides by alpha, which is 0 at t=1"):
        SOLVERS["genie"]("sigma").grid(flow(), np.array([1.0, 0.5]))
    with pytest.raises(ValueError, match="fora.*differentiates the network"):
        build_setup({**SMALL, "solver": {"name": "genie"}, "cache": {"name": "fora"}})
    with pytest.raises(ValueError, match="duodiff acts on the output, and this solver reads the tokens too"):
        cache = NETWORKS["duodiff"](0.5, network=Network(sampler.run.model, sampler.params))
        make_rows(
            SOLVERS["genie"](file=path), unguided(), flow(), np.array([1.0, 0.5]), cache, sampler.run.model.stages
        )
    for key, value in {"nodes": 1, "width": 0, "steps": 0, "rate": 2.0, "reach": 0.9}.items():
        with pytest.raises(ValueError, match=f"genie: {key}={value}; allowed"):
            fit_genie(sampler, 48, 16, print, **{key: value})
    with pytest.raises(ValueError, match="two batches or more"):
        fit_genie(sampler, 16, 16, print)
