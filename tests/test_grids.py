"""Time grids: what every one promises, known sequences, and refusals."""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from difax.accel.solvers import SOLVERS
from difax.core.grids import GRIDS, Times, check_times, lay_times, make_times
from difax.core.grids.dm_nonuniform import error_bound, orders_of, step_weights
from difax.core.grids.levels import beta_quantiles
from difax.core.grids.times import ratios
from difax.core.process import PROCESSES, flow, log_snr, sit, ve, vp_linear, vp_sde
from tests.oracles import timesteps as oracle
from tests.toys import KEYED, takes

# where the first evaluation is; grids in log-SNR or sqrt(t) start at t_max
FIRST = (
    "uniform",
    "linspace",
    "trailing",
    "shifted",
    "logit",
    "lcm",
    "flow_match",
    "diffusers",
    "diffusers_flow",
    "ipndm",
)
IN_LEVELS = ("quadratic", "log_snr", "karras", "exponential", "beta")
STARTS = {**dict.fromkeys(FIRST, 1.0), **dict.fromkeys(IN_LEVELS), "dm_nonuniform": None}


def indices(times: np.ndarray, steps: int = 1000) -> list[int]:
    k = times[:-1] * steps - 1
    np.testing.assert_allclose(k, np.round(k), atol=1e-9)
    return np.round(k).astype(int).tolist()


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("grid", [name for name in GRIDS if name not in KEYED])
@pytest.mark.parametrize("n", [1, 2, 7, 50, 250])
def test_every_grid_on_every_process(grid, process, n):
    p = PROCESSES[process]()
    if grid == "lcm":
        n = min(n, 50)  # distilled on so many
    if grid == "dm_nonuniform":
        n = min(n, 20)
    if not takes(grid, p):
        with pytest.raises(ValueError, match=f"grid {grid} needs a .*process.*{process} is"):
            make_times(GRIDS[grid](), p, n)
        return
    times = make_times(GRIDS[grid](), p, n)
    assert times.dtype == np.float64 and times.shape == (n + 1,)
    assert np.all(np.diff(times) < 0) and times[-1] == 0
    if grid == "leading":
        assert times[0] == ((n - 1) * (1000 // n) + 1) / 1000
    elif grid in ("linspace", "diffusers") and n == 1 and p.steps is not None:
        assert times[0] == 1 / 1000  # as numpy's linspace, and diffusers
    else:
        rounding = 2e-6 if grid == "diffusers_flow" else 1e-14  # which starts at 1 - 1e-6
        np.testing.assert_allclose(times[0], STARTS.get(grid) or p.t_max, rtol=rounding)
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


# ---------------------------------------------------------------- diffusers, number for number

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "grids.npz")


class Laid(NamedTuple):
    """What a scheduler of diffusers laid out: noise levels with where it ends, and timesteps."""

    name: str
    config: dict[str, Any]
    more: dict[str, Any]
    n: int
    betas: list[Any]
    sigmas: np.ndarray
    told: np.ndarray

    @property
    def ours(self) -> tuple[Any, Any]:
        """The same as process and grid of difax."""
        config = {key: value for key, value in self.config.items() if key != "prediction_type"}
        if "FlowMatch" in self.name:
            return flow(), GRIDS["flow_match"](**config, **self.more)
        if "EDM" in self.name:
            return ve(), GRIDS[config["sigma_schedule"]]()
        process = vp_linear(*self.betas[1:]) if self.betas[0] == "linear" else vp_linear()
        if config.pop("use_flow_sigmas", False):
            if "use_karras_sigmas" in config:
                config["table"] = tuple(map(float, ratios(process, np.array([process.t_min, process.t_max]))))
            return flow(), GRIDS["diffusers_flow"](scheduler=self.name, **config, **self.more)
        if self.name in ("LCMScheduler", "TCDScheduler"):
            return process, GRIDS["lcm"](**config)
        return process, GRIDS["diffusers"](scheduler=self.name, **config)


def laid_out() -> list[Laid]:
    found, at = [], [0, 0]
    for row in json.loads(bytes(GOLDEN["cases"]).decode()):
        ends = [a + size for a, size in zip(at, row["sizes"], strict=True)]
        parts = [GOLDEN[key][a:b] for key, a, b in zip(("sigmas", "told"), at, ends, strict=True)]
        found.append(Laid(row["class"], row["config"], row["more"], row["n"], row["betas"], *parts))
        at = ends
    return found


@pytest.mark.parametrize("name", dict.fromkeys(case.name for case in laid_out()))
def test_grids_are_those_of_diffusers(name):
    cases = [case for case in laid_out() if case.name == name]
    assert cases
    for case in cases:
        process, grid = case.ours
        telling, times = lay_times(grid, process, case.n)
        if len(case.sigmas):
            ours = times if process.name == "flow" else ratios(process, times)
            ours = 1 - ours if case.config.get("invert_sigmas") else ours
            wanted = case.sigmas
            if len(ours) < len(wanted) and case.config.get("interpolation_type") != "log_linear":
                assert len(ours) == len(wanted) - 1 and wanted[-1] == wanted[-2], case  # a step that is none
            np.testing.assert_allclose(ours, wanted[: len(ours)], rtol=1e-6, atol=1e-7, err_msg=str(case[:4]))
        told = telling.model_time(times[:-1])
        np.testing.assert_allclose(told, case.told[: len(told)], rtol=1e-6, atol=2e-4, err_msg=str(case[:4]))


def test_the_steps_told_are_those_as_shipped():
    """Tables in float32 move what is told by a step where it is cut off next to a whole number, and nowhere else."""
    assert len(GOLDEN["told"]) == len(GOLDEN["shipped_told"])
    other = np.abs(GOLDEN["told"] - GOLDEN["shipped_told"])
    assert other.max() <= 1 and np.mean(other > 0.01) < 0.01


# ---------------------------------------------------------------- what is told


def test_what_a_grid_tells_reaches_the_rows_and_nothing_else():
    process, grid = vp_linear(), GRIDS["diffusers"]("DPMSolverMultistepScheduler", use_karras_sigmas=True)
    telling, times = lay_times(grid, process, 6)
    rows, plain = (SOLVERS["ddim"]().grid(p, times) for p in (telling, process))
    assert np.all(rows.model_time == np.round(rows.model_time)) and np.any(plain.model_time != rows.model_time)
    assert np.abs(plain.model_time - rows.model_time).max() <= 1
    for key in ("t", "level", "coefficients"):
        for one, other in zip(jax.tree.leaves(getattr(rows, key)), jax.tree.leaves(getattr(plain, key)), strict=True):
            np.testing.assert_array_equal(one, other)
    middle = (times[1] + times[2]) / 2
    assert telling.model_time(middle) == process.model_time(middle)  # a midpoint is told as it is
    assert telling.model_time(jnp.asarray(times[1])) == pytest.approx(process.model_time(times[1]), rel=1e-6)
    np.testing.assert_array_equal(make_times(grid, process, 6), times)


@pytest.mark.parametrize("told", [[1.0], [1.0, np.nan], [[1.0, 2.0]]])
def test_told_times_fit_the_evaluations(told):
    with pytest.raises(ValueError, match="model times of shape"):
        lay_times(lambda process, n: Times(np.array([1.0, 0.5, 0.0]), np.array(told)), flow(), 2)


# ---------------------------------------------------------------- levels


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (0.3, 2.0), (5.0, 0.5), (30.0, 40.0)])
def test_quantiles_of_the_beta_distribution(a, b):
    stats = pytest.importorskip("scipy.stats")
    q = np.array([0.0, 1e-6, 0.01, 0.2, 0.5, 0.77, 0.999, 1.0])
    np.testing.assert_allclose(beta_quantiles(q, a, b), stats.beta.ppf(q, a, b), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("name", ["karras", "exponential", "beta"])
def test_curves_between_levels_of_ones_own(name):
    process, keys = vp_linear(), {"of": "sigma"} if name == "beta" else {}
    times = make_times(GRIDS[name](sigma_min=0.05, sigma_max=80.0, last="sigma_min", **keys), process, 9)
    np.testing.assert_allclose(ratios(process, times[[0, -1]]), [80.0, 0.05], rtol=1e-9)
    zero = make_times(GRIDS[name](sigma_min=0.05, sigma_max=80.0, **keys), process, 9)
    assert zero[-1] == 0 and ratios(process, zero[-2:-1]) == pytest.approx(0.05, rel=1e-9)


def test_exponential_is_the_grid_in_log_snr():
    for process in (vp_linear(), flow(), ve()):
        given = make_times(GRIDS["exponential"](), process, 8), make_times(GRIDS["log_snr"](), process, 8)
        np.testing.assert_array_equal(*given)


def test_logit_with_the_shift_of_flows():
    ours = make_times(GRIDS["logit"](mu=np.log(3.0)), flow(), 10)
    np.testing.assert_allclose(ours, make_times(GRIDS["shifted"](3.0), flow(), 10), rtol=1e-12, atol=1e-15)


# ---------------------------------------------------------------- lists


@pytest.mark.parametrize(
    ("keys", "process", "expected"),
    [
        ({"times": [1.0, 0.4]}, flow(), [1.0, 0.4, 0.0]),
        ({"times": [1.0, 0.4, 0.0]}, flow(), [1.0, 0.4, 0.0]),
        ({"times": [1.0, 0.4, 0.1], "ends": True}, flow(), [1.0, 0.4, 0.1]),
        ({"sigmas": [0.9, 0.4]}, flow(), [0.9, 0.4, 0.0]),
        ({"timesteps": [999, 499]}, vp_linear(), [1.0, 0.5, 0.0]),
        ({"timesteps": [1000.0, 400.0]}, flow(), [1.0, 0.4, 0.0]),
        ({"timesteps": [0.1, 0.7]}, sit(), [0.9, 0.3, 0.0]),
    ],
)
def test_given_lists(keys, process, expected):
    np.testing.assert_allclose(make_times(GRIDS["given"](**keys), process, 2), expected, atol=1e-12)


def test_given_noise_levels():
    for process in (vp_linear(), ve()):
        times = make_times(GRIDS["given"](sigmas=[20.0, 3.0, 0.1]), process, 3)
        np.testing.assert_allclose(ratios(process, times), [20.0, 3.0, 0.1, 0.0], rtol=1e-9)


def test_a_measured_grid(tmp_path):
    file = tmp_path / "g.json"
    file.write_text(json.dumps({"technique": "gits", "process": "flow", "times": [1.0, 0.3, 0.0]}))
    grid = GRIDS["measured"](str(file))
    np.testing.assert_array_equal(make_times(grid, flow(), 2), [1.0, 0.3, 0.0])
    for process, n, said in ((flow(), 3, "times for 2 steps; allowed: the 3"), (vp_linear(), 2, "process 'flow'")):
        with pytest.raises(ValueError, match=said):
            make_times(grid, process, n)
    for text, said in (
        ('{"times": [1]}', "two times or more"),
        ("[1]", "times=None"),
        ('{"times": ["a", 1]}', "times="),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=said):
            GRIDS["measured"](str(file))
    with pytest.raises(ValueError, match=r"measured: file='none\.json'.*"):
        GRIDS["measured"]("none.json")


# ---------------------------------------------------------------- the bound of DM-NonUniform


@pytest.mark.parametrize("n", [2, 5, 7, 12])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_bound_is_that_of_the_authors(n, power):
    process = vp_sde()
    lambdas = np.sort(np.random.default_rng(n).uniform(-5, 4.6, n + 1))
    ours = error_bound(lambdas, process, orders_of(n, 3), power)
    np.testing.assert_allclose(ours, oracle.dm_nonuniform_bound(lambdas, power, 3), rtol=1e-8)


@pytest.mark.parametrize(("n", "start"), [(5, "time"), (6, "log_snr"), (8, "time")])
def test_its_minimum_is_no_worse_than_a_constrained_minimiser_finds(n, start):
    optimize = pytest.importorskip("scipy.optimize")
    process, power, orders = vp_sde(), 2.0 if start == "time" else 1.0, orders_of(n, 3)
    ends = 0.5 * log_snr(process, np.array([1.0, process.t_min]))
    begin = np.linspace(1.0, process.t_min, n + 1)
    begin = 0.5 * log_snr(process, begin) if start == "time" else np.linspace(ends[0], ends[1], n + 1)

    def bound(inner):
        lambdas = np.concatenate([ends[:1], inner, ends[1:]])
        return float(error_bound(lambdas, process, orders, power))

    apart = [{"type": "ineq", "fun": lambda x: np.diff(np.concatenate([ends[:1], x, ends[1:]])) - 1e-6}]
    theirs = optimize.minimize(bound, begin[1:-1], method="SLSQP", constraints=apart)
    times = make_times(GRIDS["dm_nonuniform"](start=start), process, n)
    ours = bound(0.5 * log_snr(process, times[1:-1]))
    assert ours <= theirs.fun * (1 + 1e-3) and ours < bound(begin[1:-1])


@pytest.mark.parametrize("n", [5, 8, 10])
def test_its_grid_helps_a_multistep_solver(n):
    """Third order on a mixture of Gaussians: nearer to the fine solution than on even times or even log-SNR."""
    process, draw = vp_sde(), np.random.default_rng(0)
    means, spread, noise = draw.normal(size=(40, 16)) * 0.6, 0.15, draw.normal(size=(64, 16))

    def solve(times):
        level, x, outputs = process.level(times), noise, []
        lambdas = np.log(level.alpha) - np.log(np.maximum(level.sigma, 1e-300))
        for s, order in enumerate(orders_of(len(times) - 1, 3)):
            a, variance = level.alpha[s], (level.alpha[s] * spread) ** 2 + level.sigma[s] ** 2
            apart = x[:, None] - a * means
            share = -np.sum(apart**2, -1) / (2 * variance)
            share = np.exp(share - share.max(1, keepdims=True))
            towards = means + a * spread**2 / variance * apart
            outputs.append(np.einsum("bk,bkd->bd", share / share.sum(1, keepdims=True), towards))
            if times[s + 1] == 0:
                return outputs[-1]
            w = step_weights(lambdas[s - order + 1 : s + 1], lambdas[s], lambdas[s + 1])
            x = level.sigma[s + 1] * (x / level.sigma[s] + np.tensordot(w, np.stack(outputs[-order:]), 1))
        return x

    wanted = solve(make_times(GRIDS["log_snr"](), process, 400))
    times = {name: make_times(GRIDS[name](), process, n) for name in ("uniform", "log_snr", "dm_nonuniform")}
    error = {name: np.sqrt(np.mean((solve(t) - wanted) ** 2)) for name, t in times.items()}
    assert error["dm_nonuniform"] < 0.9 * min(error["uniform"], error["log_snr"]), error


def test_the_bound_of_first_order_is_the_sum_over_steps():
    process, lambdas = vp_sde(), np.array([-4.0, -1.0, 0.5, 4.0])
    level = process.level(process.inverse(lambdas[:-1]))
    parts = np.diff(np.exp(lambdas)) * level.sigma**2 / level.alpha
    assert error_bound(lambdas, process, orders_of(3, 1), 2.0) == pytest.approx(parts.sum(), rel=1e-10)


# ---------------------------------------------------------------- refusals

REFUSED = {
    "karras range": (lambda: make_times(GRIDS["karras"](sigma_max=200.0), vp_linear(), 5), "vp_linear 0.01.* 157"),
    "karras order": (
        lambda: make_times(GRIDS["karras"](sigma_min=3.0, sigma_max=2.0), ve(), 5),
        "sigma_min < sigma_max",
    ),
    "beta": (lambda: GRIDS["beta"](alpha=0.0), "beta: alpha=0.0; allowed"),
    "logit": (lambda: GRIDS["logit"](scale=0.0), "logit: mu=0.0, scale=0.0; allowed"),
    "offset": (lambda: make_times(GRIDS["leading"](steps_offset=30), vp_linear(), 50), r"allowed: 0 ... 19 for 50"),
    "a scheduler": (lambda: GRIDS["diffusers"]("EulerScheduler"), "did you mean EulerDiscreteScheduler"),
    "two curves": (
        lambda: GRIDS["diffusers"](use_karras_sigmas=True, use_beta_sigmas=True),
        "karras, beta are all used",
    ),
    "no curve": (lambda: GRIDS["diffusers"]("DDIMScheduler", use_karras_sigmas=True), "no curve karras"),
    "no end": (lambda: GRIDS["diffusers"]("DEISMultistepScheduler", final_sigmas_type="zero"), "ends at sigma_min"),
    "a flow": (lambda: make_times(GRIDS["diffusers"](), flow(), 5), "discrete steps; flow is continuous"),
    "no flow": (lambda: make_times(GRIDS["flow_match"](), vp_linear(), 5), "needs a flow process; vp_linear"),
    "no mu": (lambda: GRIDS["diffusers_flow"](use_dynamic_shifting=True), "without mu"),
    "linear mu": (
        lambda: GRIDS["flow_match"](use_dynamic_shifting=True, time_shift_type="linear", mu=-0.5),
        "mu=-0.5 with time_shift_type=linear; allowed: above 0",
    ),
    "a range of a curve": (
        lambda: make_times(GRIDS["diffusers"](use_karras_sigmas=True, sigma_max=700.0), vp_linear(), 5),
        "diffusers: sigma_min=0.01.*, sigma_max=700",
    ),
    "no table": (lambda: GRIDS["diffusers_flow"](use_karras_sigmas=True), "table is missing"),
    "a table": (lambda: GRIDS["diffusers_flow"](use_karras_sigmas=True, table=(2.0, 1.0)), "the smaller first"),
    "terminal": (lambda: GRIDS["flow_match"](shift_terminal=1.0), "shift_terminal=1.0; allowed: above 0"),
    "lcm": (lambda: make_times(GRIDS["lcm"](4), vp_linear(), 5), "original_inference_steps=4; allowed: 5"),
    "nothing given": (lambda: GRIDS["given"](), "given: nothing; allowed: one of"),
    "two given": (lambda: GRIDS["given"](times=[1.0], sigmas=[1.0]), r"times=\[1.0\] and sigmas=\[1.0\]; allowed: one"),
    "other steps": (
        lambda: make_times(GRIDS["given"](times=[1.0, 0.5]), flow(), 5),
        "2 evaluations in times.*allowed: the 5",
    ),
    "order": (lambda: GRIDS["dm_nonuniform"](order=4), "order=4; allowed: 1 ... 3"),
    "many steps": (lambda: make_times(GRIDS["dm_nonuniform"](), vp_linear(), 101), "steps=101; allowed: 1 ... 100"),
    "power": (lambda: GRIDS["dm_nonuniform"](power=9.0), "power=9.0; allowed: 0 ... 4"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_other_refusals(what):
    call, said = REFUSED[what]
    with pytest.raises(ValueError, match=said):
        call()
