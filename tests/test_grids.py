"""Time grids: what every one promises, known sequences, and refusals."""

import numpy as np
import pytest

from difax.core.grids import GRIDS, check_times, make_times
from difax.core.process import PROCESSES, flow, log_snr, sit, ve, vp_linear, vp_sde
from tests.oracles import timesteps as oracle

DISCRETE_ONLY, FLOW_ONLY = ("leading",), ("shifted",)
# where the first evaluation is; grids in log-SNR or sqrt(t) start at t_max
IN_LEVELS = ("quadratic", "log_snr", "karras", "exponential", "beta")
STARTS = {"uniform": 1.0, "linspace": 1.0, "trailing": 1.0, "shifted": 1.0, "logit": 1.0, **dict.fromkeys(IN_LEVELS)}


def allowed(grid: str, process) -> bool:
    if grid in DISCRETE_ONLY:
        return process.steps is not None
    return grid not in FLOW_ONLY or process.name in ("flow", "sit")


def indices(times: np.ndarray, steps: int = 1000) -> list[int]:
    k = times[:-1] * steps - 1
    np.testing.assert_allclose(k, np.round(k), atol=1e-9)
    return np.round(k).astype(int).tolist()


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("n", [1, 2, 7, 50, 250])
def test_every_grid_on_every_process(grid, process, n):
    p = PROCESSES[process]()
    if not allowed(grid, p):
        with pytest.raises(ValueError, match=f"grid {grid} needs a .*process.*{process} is"):
            make_times(GRIDS[grid](), p, n)
        return
    times = make_times(GRIDS[grid](), p, n)
    assert times.dtype == np.float64 and times.shape == (n + 1,)
    assert np.all(np.diff(times) < 0) and times[-1] == 0
    if grid == "leading":
        assert times[0] == ((n - 1) * (1000 // n) + 1) / 1000
    elif grid == "linspace" and n == 1 and p.steps is not None:
        assert times[0] == 1 / 1000  # as numpy's linspace, and diffusers
    else:
        np.testing.assert_allclose(times[0], STARTS.get(grid) or p.t_max, rtol=1e-14)
    if grid in IN_LEVELS and n > 1:
        np.testing.assert_allclose(times[-2], p.t_min, rtol=1e-4)


@pytest.mark.parametrize("n", [2, 10, 50, 250, 999, 1000, *range(21, 400, 23)])
def test_uniform_is_space_timesteps_of_improved_ddpm(n):
    assert indices(make_times(GRIDS["uniform"](), vp_linear(), n)) == oracle.space_timesteps(1000, n)


@pytest.mark.parametrize("n", [10, 12, 25, 48, 50, 96, 112, 250, 1000])
def test_trailing_by_its_rule(n):
    got = indices(make_times(GRIDS["trailing"](), vp_linear(), n))
    assert got == oracle.trailing(1000, n)[:n]


@pytest.mark.parametrize(("n", "expected"), [(50, range(980, -1, -20)), (250, range(996, -1, -4)), (3, [666, 333, 0])])
def test_leading_strides_from_zero(n, expected):
    assert indices(make_times(GRIDS["leading"](), vp_linear(), n)) == list(expected)


@pytest.mark.parametrize("steps", [1, 4, 100])
def test_one_evaluation_per_step_of_a_short_process(steps):
    for grid in ("uniform", "trailing", "leading"):
        times = make_times(GRIDS[grid](), vp_linear(steps=steps), steps)
        assert indices(times, steps) == list(range(steps))[::-1]


@pytest.mark.parametrize("rho", [3.0, 7.0])
@pytest.mark.parametrize("n", [2, 18])
def test_karras_formula(rho, n):
    process = ve(sigma_min=0.002, sigma_max=80.0)
    times = make_times(GRIDS["karras"](rho=rho), process, n)
    np.testing.assert_allclose(process.level(times[:-1]).sigma, oracle.karras(80.0, 0.002, rho, n), rtol=1e-7)


def test_log_snr_is_evenly_spaced():
    for process in (vp_linear(), vp_sde(), flow()):
        gaps = np.diff(log_snr(process, make_times(GRIDS["log_snr"](), process, 9)[:-1]))
        np.testing.assert_allclose(gaps, gaps[0], rtol=1e-9)


def test_quadratic_is_evenly_spaced_in_the_square_root():
    gaps = np.diff(np.sqrt(make_times(GRIDS["quadratic"](), vp_sde(), 9)[:-1]))
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-9)


@pytest.mark.parametrize(("shift", "process"), [(3.0, flow()), (0.5, sit()), (None, flow(shift=3.0))])
def test_shifted_formula(shift, process):
    times = make_times(GRIDS["shifted"](shift), process, 10)
    np.testing.assert_allclose(times, oracle.shifted(shift or 3.0, 10), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("grid", "process", "n", "message"),
    [
        ("uniform", vp_linear(), 0, "steps=0; allowed: 1 or more"),
        ("uniform", vp_linear(), -3, "steps=-3"),
        ("uniform", vp_linear(), 1001, "steps=1001; vp_linear has 1000 steps; allowed: 1 ... 1000"),
        ("trailing", vp_linear(steps=4), 5, "allowed: 1 ... 4"),
        ("leading", flow(), 10, "discrete steps; flow is continuous"),
        ("shifted", vp_linear(), 10, "needs a flow process; vp_linear is none"),
    ],
)
def test_refusals(grid, process, n, message):
    with pytest.raises(ValueError, match=message):
        make_times(GRIDS[grid](), process, n)


@pytest.mark.parametrize(("grid", "arguments"), [("karras", {"rho": 0.0}), ("shifted", {"shift": -1.0})])
def test_bad_hyperparameters_are_refused(grid, arguments):
    with pytest.raises(ValueError, match=f"{grid}: .*allowed: > 0"):
        GRIDS[grid](**arguments)


@pytest.mark.parametrize("times", [[0.5], [0.5, 0.5], [0.2, 0.6], [1.1, 0.0], [0.5, -0.1], [0.5, np.nan], [[1.0, 0.0]]])
def test_times_must_decrease_within_the_unit_interval(times):
    with pytest.raises(ValueError, match="must decrease strictly"):
        check_times(np.array(times))
