"""Noising processes against the papers' formulas, and every conversion between predictions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax.core import process as P
from difax.core.contracts import Level
from tests.oracles import processes as oracle
from tests.oracles.schedulers import alphas_cumprod

K = np.arange(1, 1001) / 1000
BETWEEN = (np.arange(1, 1000, 37) + 0.4) / 1000
INSIDE = np.linspace(0.02, 0.98, 25)


class Case(NamedTuple):
    name: str
    t: np.ndarray  # where the oracle is compared
    expected: tuple[np.ndarray, np.ndarray]  # its alpha, sigma
    inside: np.ndarray  # where slopes are: away from the kinks of the discrete processes
    model_time: tuple[float, float]  # what the network is told at t_min and at t = 1
    unit: float = 1.0  # model time per unit of the slopes' time


CASES = [
    Case("vp_linear", K, oracle.vp_linear(), BETWEEN, (0.0, 999.0)),
    Case("vp_cosine", K, oracle.vp_cosine(), BETWEEN, (0.0, 999.0)),
    Case("vp_sde", INSIDE, oracle.vp_sde(INSIDE), INSIDE, (0.999, 999.0)),
    Case("subvp", INSIDE, oracle.subvp(INSIDE), INSIDE, (0.999, 999.0)),
    Case("ve", INSIDE, oracle.ve(INSIDE), INSIDE, (np.log(0.002) / 4, np.log(80) / 4)),
    Case("flow", INSIDE, oracle.flow(INSIDE), INSIDE, (1.0, 1000.0), unit=1000.0),
    Case("sit", INSIDE, oracle.flow(INSIDE), INSIDE, (0.999, 0.0)),
    Case("vp", K, oracle.vp_linear(), BETWEEN, (0.0, 999.0)),
    Case("edm", INSIDE, oracle.edm(INSIDE), INSIDE, (np.log(0.002) / 4, np.log(80) / 4)),
    Case("trig", INSIDE, oracle.trig(INSIDE), INSIDE, (0.001, 1.0)),
]
cases = pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])


def test_every_process_has_a_row():
    assert [c.name for c in CASES] == list(P.PROCESSES)


@cases
def test_level_is_the_papers_in_double_precision(case):
    process = P.PROCESSES[case.name]()
    alpha, sigma = case.expected
    level = process.level(case.t)
    assert all(a.dtype == np.float64 and a.shape == case.t.shape for a in level)
    # the oracle of the cosine divides by cos^2 near its zero and subtracts from 1: nine digits at the ends
    rtol = 1e-9 if case.name == "vp_cosine" else 1e-12
    np.testing.assert_allclose(level.alpha, alpha, rtol=rtol)
    np.testing.assert_allclose(level.sigma, sigma, rtol=rtol)
    np.testing.assert_allclose(P.log_snr(process, case.t), np.log(alpha**2 / sigma**2), rtol=rtol, atol=1e-9)


@cases
def test_clean_end_and_noisy_end(case):
    process = P.PROCESSES[case.name]()
    clean = process.level(np.zeros(1))
    assert clean.alpha == 1 and clean.sigma == 0
    assert P.log_snr(process, np.zeros(1)) == np.inf
    np.testing.assert_allclose(
        process.model_time(np.array([process.t_min, process.t_max if case.name == "ve" else 1.0])),
        case.model_time,
        atol=1e-8,
    )
    ends = P.log_snr(process, np.array([process.t_min, process.t_max]))
    assert np.all(np.isfinite(ends)) and ends[0] > ends[1]
    # the prior is what the data of unit variance has become
    last = process.level(np.ones(1))
    np.testing.assert_allclose(process.prior_std, np.hypot(last.alpha, last.sigma), rtol=1e-4)


@cases
def test_jax_path_agrees_in_single_precision(case):
    process = P.PROCESSES[case.name]()
    got = jax.jit(lambda t: process.level(t, jnp))(jnp.asarray(case.inside, jnp.float32))
    for a, b in zip(got, process.level(case.inside), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=3e-5, atol=1e-7)


@cases
def test_inverse_of_half_log_snr(case):
    process = P.PROCESSES[case.name]()
    for t in (case.inside, np.array([process.t_min, process.t_max])):
        np.testing.assert_allclose(process.inverse(0.5 * P.log_snr(process, t)), t, rtol=1e-6, atol=1e-13)
    np.testing.assert_allclose(process.inverse(0.5 * P.log_snr(process, case.inside)), case.inside, rtol=1e-10)


@cases
def test_slopes_against_finite_differences(case):
    process, d = P.PROCESSES[case.name](), 1e-6
    after, before = process.level(case.inside + d), process.level(case.inside - d)
    elapsed = (process.model_time(case.inside + d) - process.model_time(case.inside - d)) / case.unit
    level = process.level(case.inside)
    np.testing.assert_allclose(level.alpha_dot, (after.alpha - before.alpha) / elapsed, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(level.sigma_dot, (after.sigma - before.sigma) / elapsed, rtol=1e-5, atol=1e-8)


@cases
@pytest.mark.parametrize("kind", P.PREDICTIONS)
def test_convert_undoes_target(case, kind):
    rng = np.random.default_rng(0)
    x0, eps = rng.normal(size=(2, len(case.inside), 3))
    level = Level(*(a[:, None] for a in P.PROCESSES[case.name]().level(case.inside)))
    x = level.alpha * x0 + level.sigma * eps
    wanted = P.target(kind, x0, eps, level)
    for got, true in zip(P.convert(wanted, kind, x, level), (x0, eps), strict=True):
        np.testing.assert_allclose(got, true, rtol=1e-8, atol=1e-8)
    assert P.PREDICTIONS[kind]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("eps", lambda x0, e, a, s: e),
        ("x0", lambda x0, e, a, s: x0),
        ("score", lambda x0, e, a, s: -(a * x0 + s * e - a * x0) / s**2),  # grad log N(x; alpha x0, sigma^2)
        ("v", lambda x0, e, a, s: a * e - s * x0),
        ("edm", lambda x0, e, a, s: s * x0 - a * e),
    ],
)
def test_targets_by_definition(kind, expected):
    level = P.vp_linear().level(np.array([0.4]))
    got = P.target(kind, 0.7, -1.3, level)
    np.testing.assert_allclose(got, expected(0.7, -1.3, level.alpha, level.sigma), rtol=1e-12)


@pytest.mark.parametrize(("name", "sign"), [("flow", 1), ("sit", -1)])
def test_velocity_of_the_straight_paths(name, sign):
    level = P.PROCESSES[name]().level(np.array([0.3]))
    assert P.target("velocity", 2.0, 5.0, level) == sign * 3.0


@pytest.mark.parametrize("name", ["flow", "sit"])
@pytest.mark.parametrize("kind", ["x0", "velocity", "v"])
def test_pure_noise_converts_where_alpha_is_zero(name, kind):
    level = P.PROCESSES[name]().level(np.ones(1))
    x0, eps = np.array([0.25]), np.array([-1.5])
    assert level.alpha == 0
    got = P.convert(P.target(kind, x0, eps, level), kind, eps, level)
    np.testing.assert_array_equal(got, (x0, eps))


def test_predict_splits_off_the_variance_and_works_in_single_precision():
    level = Level(*(np.float32(a) for a in P.vp_linear().level(np.float64(0.3))))
    x = jnp.ones((2, 3, 3, 4))
    output = jnp.concatenate([jnp.full_like(x, 0.5), jnp.full_like(x, -0.25)], -1).astype(jnp.bfloat16)
    got = P.predict(output, "eps", True, x, level)
    assert {a.dtype for a in got[:3] if a is not None} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(got.eps, jnp.full_like(x, 0.5))
    np.testing.assert_array_equal(got.variance, jnp.full_like(x, -0.25))
    assert P.predict(output[..., :4], "eps", False, x, level).variance is None


@pytest.mark.parametrize(("w", "expected"), [(-1.0, np.log(0.01)), (0.0, np.log(0.02)), (1.0, np.log(0.04))])
def test_learned_variance_interpolates_in_the_logarithm(w, expected):
    got = P.learned_log_variance(np.array([w]), np.log(0.04), np.log(0.01))
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vp_linear", {"steps": 0}, "steps=0"),
        ("vp_linear", {"beta_start": 0.0}, "beta_start=0.0"),
        ("vp_linear", {"beta_start": 0.1, "beta_end": 0.01}, "beta_end=0.01"),
        ("vp_linear", {"beta_end": 1.0}, "beta_end=1.0"),
        ("vp_cosine", {"steps": -1}, "steps=-1"),
        ("vp_cosine", {"s": -0.1}, "s=-0.1"),
        ("vp_cosine", {"max_beta": 1.0}, "max_beta=1.0"),
        ("vp_sde", {"beta_min": 0.0}, "beta_min=0.0"),
        ("vp_sde", {"beta_min": 3.0, "beta_max": 2.0}, "beta_max=2.0"),
        ("vp_sde", {"t_min": 0.0}, "t_min=0.0"),
        ("subvp", {"t_min": 1.0}, "subvp: t_min=1.0"),
        ("subvp", {"beta_max": 1e3}, "subvp: beta_min=0.1, beta_max=1000.0"),
        ("ve", {"sigma_min": 0.0}, "sigma_min=0.0"),
        ("ve", {"sigma_min": 5.0, "sigma_max": 1.0}, "sigma_max=1.0"),
        ("flow", {"shift": 0.0}, "shift=0.0"),
        ("vp", {"schedule": "scaled_linaer"}, "scaled_linaer.*did you mean scaled_linear"),
        ("vp", {"beta_start": 0.1, "beta_end": 0.01}, "beta_end=0.01"),
        ("vp", {"trained": [0.1, 1.0]}, "trained=.*between 0 and 1"),
        ("vp", {"trained": []}, "steps=0"),
        ("vp", {"snr_shift": 0.0}, "snr_shift=0.0"),
        ("vp", {"terminal": 0.1}, "terminal=0.1"),
        ("vp", {"between": "alpha"}, "between='alpha'"),
        ("vp", {"prior_std": 0.0}, "prior_std=0.0"),
        ("vp", {"precision": "float32", "snr_shift": 3.0}, "precision='float32' with snr_shift=3.0"),
        ("vp", {"precision": "float32", "beta_start": 1e-9}, "beta 1e-09 of step 0 is lost in float32"),
        ("edm", {"sigma_min": 5.0, "sigma_max": 1.0}, "sigma_max=1.0"),
        ("edm", {"sigma_data": 0.0}, "sigma_data=0.0"),
        ("edm", {"time_scale": 0.0}, "time_scale=0.0"),
        ("edm", {"prior_std": 100.0}, "prior_std=100.0"),
        ("sit", {"time_scale": 0.0}, "time_scale=0.0"),
        ("flow", {"time_scale": -1.0}, "time_scale=-1.0"),
    ],
)
def test_refusals(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        P.PROCESSES[name](**arguments)


@pytest.mark.parametrize("function", [P.convert, P.target])
def test_unknown_prediction_is_refused(function):
    level = P.flow().level(np.array([0.5]))
    arguments = (1.0, "noise", 1.0, level) if function is P.convert else ("noise", 1.0, 1.0, level)
    with pytest.raises(ValueError, match="'noise'; allowed: eps, x0, v, velocity, score"):
        function(*arguments)


SCHEDULES = {
    "scaled": {"schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"schedule": "squaredcos_cap_v2"},
    "sigmoid": {"schedule": "sigmoid"},
    "laplace": {"schedule": "laplace"},
    "trained": {"trained": [0.1, 0.2, 0.4, 0.3]},
    "shifted": {"schedule": "scaled_linear", "snr_shift": 3.0},
    "terminal": {"schedule": "scaled_linear", "terminal": 0.0},
}


@pytest.mark.parametrize("between", ["log_alpha", "log_sigma"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_betas_at_their_steps_and_between(name, between):
    keys = SCHEDULES[name]
    config = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
    names = {"schedule": "beta_schedule", "trained": "trained_betas", "snr_shift": "snr_shift_scale"}
    config |= {names.get(k, k): v for k, v in keys.items()} | {"rescale_betas_zero_snr": "terminal" in keys}
    a2 = alphas_cumprod(config)
    process = P.vp(**keys, between=between)
    k = np.arange(1, len(a2) + 1) / len(a2)
    level = process.level(k)
    np.testing.assert_allclose(level.alpha**2, a2, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(level.sigma**2, 1 - a2, rtol=1e-9)
    inner = k[k <= process.t_max]
    np.testing.assert_allclose(process.inverse(0.5 * P.log_snr(process, inner)), inner, rtol=1e-9)
    pairs = np.array([inner[:-1], inner[1:]])
    middle = 0.5 * P.log_snr(process, pairs.mean(0))
    at = process.level(pairs)
    if between == "log_sigma":
        np.testing.assert_allclose(middle, np.log(at.alpha / at.sigma).mean(0), rtol=1e-9, atol=1e-9)
    else:
        np.testing.assert_allclose(process.level(pairs.mean(0)).alpha, np.sqrt(at.alpha.prod(0)), rtol=1e-9)
    d = 1e-7
    t = pairs.mean(0)[:: max(1, len(inner) // 20)]
    assert process.steps is not None
    slope = (process.level(t + d).alpha - process.level(t - d).alpha) / (2 * d * process.steps)
    np.testing.assert_allclose(process.level(t).alpha_dot, slope, rtol=1e-4, atol=1e-9)


def test_zero_terminal_snr_ends_at_pure_noise_or_at_the_given_level():
    zero, least = P.vp(terminal=0.0), P.vp(terminal=2.0**-24)
    assert zero.level(np.ones(1)).alpha == 0 and zero.level(np.ones(1)).sigma == 1
    assert zero.t_max == 0.999 and np.isfinite(P.log_snr(zero, zero.t_max))
    np.testing.assert_allclose(least.level(np.ones(1)).alpha, 2.0**-12, rtol=1e-12)
    np.testing.assert_allclose(zero.level(K[:-1]).alpha, least.level(K[:-1]).alpha, rtol=1e-12)
    np.testing.assert_allclose(zero.level(K[:1]).alpha, P.vp().level(K[:1]).alpha, rtol=1e-12)


@pytest.mark.parametrize("sigma", [0.01, 1.0, 60.0])
def test_edm_is_its_preconditioning(sigma):
    process = P.edm(sigma_data=0.5)
    x0, eps = 0.8, -1.2
    t = process.inverse(np.log(0.5 / sigma))
    level = process.level(t)
    y = x0 + sigma * eps
    c_in, c_skip = 1 / np.hypot(sigma, 0.5), 0.25 / (sigma**2 + 0.25)
    c_out = sigma * 0.5 / np.hypot(sigma, 0.5)
    np.testing.assert_allclose(level.alpha * x0 / 0.5 + level.sigma * eps, c_in * y, rtol=1e-10)
    found, noise = P.convert((x0 - c_skip * y) / c_out, "edm", c_in * y, level)
    np.testing.assert_allclose((0.5 * found, noise), (x0, eps), rtol=1e-9)
    np.testing.assert_allclose(process.model_time(t), np.log(sigma) / 4, rtol=1e-9)
    assert process.level(np.zeros(1)).alpha == 0.5  # what comes out is the data itself
    np.testing.assert_allclose(
        P.edm(sigma_data=0.5, told="atan").model_time(t), np.arctan(sigma) * 2 / np.pi, rtol=1e-9
    )
