"""Learned solvers: their starts are generic solvers exactly, fits lower losses on held-out noise, files are refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from difax import cli
from difax.accel.fit import SOLVER_FITS, by_label, descent, learned, usf
from difax.accel.fit.learned import kernel_loss
from difax.accel.solvers import SOLVERS
from difax.accel.solvers.learned import full_table, read_learned, slots_of, table_of, unrolled
from difax.accel.solvers.linear import linear, tabulated
from difax.accel.solvers.usf import Choice, taylor
from difax.build import build_setup
from difax.core import process as P
from difax.core.grids import lay_rows
from difax.program import draw
from difax.run import load
from difax.study import calibrate as C
from difax.study.metrics import kernel_distance
from tests.families import some
from tests.toys import MIXTURE, predict, randomise, solve

TIMES = np.array([0.95, 0.8, 0.55, 0.5, 0.2, 0.05, 0.0])
CONFIG = {
    "model": {
        "name": "dit",
        "depth": 1,
        "width": 16,
        "heads": 2,
        "patch": 2,
        "size": 4,
        "channels": 3,
        "classes": 5,
        "learn_sigma": False,
    },
    "process": {"name": "flow"},
    "prediction": "velocity",
    "solver": {"name": "euler"},
    "grid": {"name": "uniform"},
    "steps": 4,
    "guide": {"name": "none"},
    "scale": 1.0,
}


class Toy(C.Sampler):
    """A sampler of a tiny model, with features of its own."""

    def features(self):
        return lambda x: jnp.tanh(x.reshape(len(x), -1)[:, ::3])


def sampler_of(steps: int) -> Toy:
    setup = build_setup(CONFIG | {"steps": steps})
    params = randomise(jax.eval_shape(setup.model.init, jax.random.key(0)))
    return Toy(setup, setup.prepare(params), np.array([3, 1]), 0)


@pytest.fixture(scope="module")
def sampler():
    return sampler_of(4)


def path(name: str, process: str, times=TIMES, **arguments) -> np.ndarray:
    """The end of a run on the mixture in float64."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)) * P.PROCESSES[process]().prior_std)
        keys = jax.vmap(jax.random.split, (0, None))(jax.random.split(jax.random.key(0), len(times)), 4)
        return np.asarray(solve(SOLVERS[name](**arguments), P.PROCESSES[process](), times, x, predict, keys)[-1])


# ---------------------------------------------------------------- starts

# a learned solver before it has learned, and what it is then
STARTS = [
    ("bns", {"start": "euler"}, "euler", {}),
    ("ddss", {"eta": 0.0}, "ddim", {}),
    ("ltsl", {}, "ddim", {}),
    ("iia", {"base": "ddim"}, "ddim", {}),
    ("iia", {"base": "dpmpp_2m"}, "dpmpp_2m", {}),
    ("usf", {"order": 1}, "ddim", {}),
    ("usf", {"order": 1, "prediction": "noise"}, "ddim", {}),
    ("usf", {"relaxation": "dpmsolver-2"}, "dpmpp_2m", {"lower_order_final": 0, "stretch": 1e9}),
]


@pytest.mark.parametrize("process", some(P.PROCESSES, "vp_linear", "flow", "ve"))
@pytest.mark.parametrize(("name", "arguments", "known", "settings"), STARTS, ids=lambda v: str(v))
def test_starts_are_known_solvers(name, arguments, known, settings, process):
    wanted = path(known, process, **settings)
    np.testing.assert_allclose(path(name, process, **arguments), wanted, rtol=0, atol=1e-12 * abs(wanted).max())


def test_the_start_of_ddss_with_noise_is_ddim():
    np.testing.assert_allclose(path("ddss", "vp_linear", eta=0.7), path("ddim", "vp_linear", eta=0.7), atol=1e-12)


ORDERS = [
    ("bns", {"start": "midpoint"}, 2),
    ("bns", {"start": "ab2"}, 2),
    ("iia", {"base": "edm"}, 2),
    *(("usf", {"order": p, "prediction": kind}, p) for p in (2, 3) for kind in ("data", "noise")),
    ("usf", {"order": 2, "estimate": 3}, 2),
    ("usf", {"order": 2, "relaxation": "unipc-bh1"}, 2),
    ("usf", {"order": 2, "prediction": "noise", "corrector": True}, 2),
]


@pytest.fixture(scope="module")
def exact():
    """The start and the end of the mixture's path over rho = sigma/alpha in [e^-3, e^3]."""
    start = np.random.default_rng(3).normal(size=(4, 8)) * np.exp(3.0)

    def slope(s, y):
        return (np.exp(s) * MIXTURE.eps(y.reshape(4, 8), 1.0, np.exp(s))).ravel()

    done = solve_ivp(slope, (3.0, -3.0), start.ravel(), method="DOP853", rtol=1e-12, atol=1e-12)
    return start, done.y[:, -1].reshape(4, 8)


@pytest.mark.parametrize(("name", "arguments", "order"), ORDERS, ids=lambda v: str(v))
def test_order_of_convergence(name, arguments, order, exact):
    process, errors, steps = P.vp_linear(), [], (40, 80, 160)
    with jax.enable_x64(True):
        for n in steps:
            times = process.inverse(np.linspace(-3.0, 3.0, n + 1))
            ends = process.level(times[[0, -1]])
            x = jnp.asarray(exact[0] * ends.alpha[0])
            end = solve(SOLVERS[name](**arguments), process, times, x, predict)[-1]
            errors.append(np.abs(np.asarray(end) / ends.alpha[1] - exact[1]).max())
    measured = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order - 0.2 < measured < order + (0.6 if arguments.get("corrector") else 0.25), (measured, errors)


@pytest.mark.parametrize("process", some(P.PROCESSES, "vp_linear", "flow"))
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("bns", {"start": "midpoint"}), ("bns", {"start": "ab2"}), ("usf", {"order": 3, "corrector": True})],
    ids=lambda v: str(v),
)
def test_linear_solvers_multiply_out(name, arguments, process):
    """The non-stationary form of a solver draws what the solver does, and a jax table is the numpy one."""
    p = P.PROCESSES[process]()
    rows = SOLVERS[name](**arguments).grid(p, TIMES)
    (a, b), n = unrolled(rows), len(rows.t)
    table = table_of(a, b, rows.level)
    with jax.enable_x64(True):
        traced = table_of(jnp.asarray(a), jnp.asarray(b), jax.tree.map(jnp.asarray, rows.level), jnp)
        np.testing.assert_allclose(traced, table, atol=1e-14)
        form = linear(lambda *_: None, slots_of(n))._replace(
            grid=lambda process, times: lay_rows(process, rows.t, np.arange(n), tabulated(table))
        )
        x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)) * p.prior_std)
        got = np.asarray(solve(form, p, TIMES, x, predict)[-1])
    wanted = path(name, process, **arguments)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-11 * abs(wanted).max())
    assert all(set(i) <= set(j) for i, j in zip(tabulated(table).used, full_table(n).used, strict=True) if min(i) >= 0)


def test_what_cannot_be_multiplied_out_is_refused():
    with pytest.raises(ValueError, match="linear engine"):
        unrolled(SOLVERS["ddpm"]().grid(P.flow(), TIMES))
    with pytest.raises(ValueError, match="draws noise"):
        unrolled(SOLVERS["ddss"](eta=1.0).grid(P.vp_linear(), TIMES))


def test_taylor_weights_integrate_polynomials():
    """Weights of the values of a polynomial, against its integral on a fine mesh."""
    nodes, end = np.array([0.3, -0.1, -0.8]), 1.1
    at = np.linspace(0.3, end, 200_001)
    for rate in (1.0, -1.0):
        for order, f in ((3, lambda v: 1 + 2 * v - 0.7 * v**2), (2, lambda v: 1 + 2 * v)):
            weights = taylor(nodes, 0.3, end, rate, order, "none")
            np.testing.assert_allclose(
                weights @ f(nodes), np.trapezoid(np.exp(rate * (at - end)) * f(at), at), rtol=1e-8
            )


# ---------------------------------------------------------------- gradients and fits


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bns", "ddss", "ltsl"])
def test_gradients_by_differences(kind, sampler):
    process, times = sampler.run.process, sampler.run.times
    table = {
        "bns": lambda: learned.bns_table(SOLVERS["bns"](start="ab2").grid(process, times)),
        "ddss": lambda: learned.ddss_table(process, times, 0.0),
        "ltsl": lambda: learned.ltsl_table(process, times),
    }[kind]()
    with jax.enable_x64(True):
        run, at = descent.program(sampler, table.solver, remat=True), table.rows(sampler)
        x, keys, cond = sampler.inputs(0, 2)
        params = jax.tree.map(lambda a: a.astype("float64"), sampler.params)

        def loss(theta):
            return jnp.mean(run(params, x.astype("float64"), keys, cond, at(theta), 1.0)[0] ** 3)

        theta = jax.tree.map(jnp.asarray, table.theta)
        slope = jax.grad(loss)(theta)
        for name, value in theta.items():
            rng = np.random.default_rng(1)
            d = rng.normal(size=value.shape)
            if value.ndim == 2:
                d = np.tril(d)
            moved = [float(loss(theta | {name: value + e * d})) for e in (1e-4, -1e-4)]
            got = float(jnp.sum(slope[name] * d))
            # the network runs in float32
            np.testing.assert_allclose(got, (moved[0] - moved[1]) / 2e-4, rtol=2e-2, atol=2e-4, err_msg=name)


FIT = {"steps": 16, "iterations": 20}
# name, settings of the fit, samples, batch
FITS = [
    ("bns", FIT | {"rate": 0.003}, 24, 4),
    ("ddss", FIT | {"rate": 0.001}, 256, 32),
    ("ltsl", FIT | {"rate": 0.001}, 256, 32),
    ("iia", {"parts": 6, "steps": 16}, 24, 4),
    ("dc_solver", FIT, 24, 4),
    ("usf", {"measured": 90, "steps": 16}, 16, 8),
]


ROWS = [row if row[0] in ("bns", "iia") else pytest.param(*row, marks=pytest.mark.slow) for row in FITS]


@pytest.mark.parametrize(("name", "settings", "samples", "batch"), ROWS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_fit_lowers_the_loss_on_held_out_noise_and_is_sampled_with(name, settings, samples, batch, sampler, tmp_path):
    lines, steps = [], 6 if name == "usf" else 4  # of four steps of a flow, one alone has settings that change anything
    sampler = sampler if steps == 4 else sampler_of(steps)
    file = tmp_path / "found.json"
    content = C.calibrate_to(name, sampler, file, samples, batch, lines.append, "solver", **settings)
    before, after = ("steps before", "steps after") if name == "iia" else ("before", "after")
    assert np.sum(content[after]) < np.sum(content[before]) and lines
    assert content == json.loads(file.read_text()) and content["technique"] == content["solver"] == name
    config = CONFIG | {"steps": steps, "solver": {"name": name, "file": str(file)}}
    setup = build_setup(config, sampler.run.model)
    assert content["steps"] == steps
    if name != "dc_solver":
        np.testing.assert_allclose(setup.rows.t, content["times"], rtol=1e-6)
    # the file draws what was measured: the loss of a plain run on the same held-out samples
    most, held = descent.shares(samples, batch)
    test = descent.batches(sampler, held, batch, most, settings["steps"])
    run = setup.sampler()
    rows = jax.tree.map(jnp.asarray, setup.rows)
    got = [run(sampler.params, jnp.array(b.x), b.keys, b.cond, rows, 1.0)[0] for b in test]
    loss = {"dc_solver": lambda a, b: jnp.mean((a - b.wanted) ** 2)}.get(
        name,
        kernel_loss(sampler.features()) if name in ("ddss", "ltsl") else lambda a, b: descent.log_error(a, b.wanted),
    )
    np.testing.assert_allclose(
        np.mean([loss(a, b) for a, b in zip(got, test, strict=True)]), content["after"], rtol=1e-3
    )


def test_the_least_squares_of_iia_by_numpy(sampler):
    """The first fitted coefficient of a step, from differences and a finer run that are made one step at a time."""
    found = SOLVER_FITS["iia"].fit(sampler, 8, 4, lambda text: None, order=1, parts=5, steps=8)
    times, process = sampler.run.times, sampler.run.process
    (train,) = descent.batches(sampler, 4, 4, 0, 1)

    def ends(name, times):
        """x at the end of a run over some times, from noise."""
        solver = SOLVERS[name]()
        rows = descent.rows_of(sampler, solver, times)
        run = descent.program(sampler, solver)
        return np.asarray(run(sampler.params, jnp.array(train.x), train.keys, train.cond, rows, 1.0)[0], np.float64)

    level = process.level(times)
    x0, x1, base = np.asarray(train.x, np.float64), ends("ddim", times[:2]), ends("ddim", times[:3])

    def eps(x, new, i):  # of the step from x to new: new = alpha_s x0 + sigma_s eps and x = alpha_t x0 + sigma_t eps
        a, s = level.alpha, level.sigma
        return (a[i] * new - a[i + 1] * x) / (a[i] * s[i + 1] - a[i + 1] * s[i])

    fine = ends("ddim", np.r_[times[0], np.linspace(times[1], times[2], 6)])
    difference = eps(x1, base, 1) - eps(x0, x1, 0)
    gamma = np.sum(difference * (fine - base)) / np.sum(difference**2)
    np.testing.assert_allclose(found["gamma"][1], [gamma], rtol=2e-3)
    assert found["gamma"][0] == [0.0]


def test_kernel_loss_is_the_kernel_distance():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 12, 5)) + np.array([0.0, 0.3])[:, None, None]
    mean, std = b.mean(0), b.std(0) + 0.1 * b.std() + 1e-6
    a_, b_ = (a - mean) / std, (b - mean) / std
    wanted = (kernel_distance(a_[:6], b_[6:]) + kernel_distance(a_[6:], b_[:6])) / 2
    got = kernel_loss(lambda x: x)(jnp.asarray(a), descent.Batch(None, None, None, jnp.asarray(b)))
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


def test_times_stay_between_the_ends():
    times = np.array([1.0, 0.7, 0.2, 0.1])
    np.testing.assert_allclose(descent.times_of(jnp.asarray(descent.gaps_of(times)), 1.0), times, rtol=1e-6)
    moved = np.asarray(descent.times_of(jnp.asarray([3.0, -4.0, 0.0, 1.0]), 0.9))
    assert moved[0] == pytest.approx(0.9) and np.all(np.diff(moved) < 0) and moved[-1] > 0


def test_the_predictor_ranks_what_it_has_seen_and_what_is_near():
    rng = np.random.default_rng(0)
    times = np.linspace(1, 0, 5)[:-1]
    every = [
        usf.Schedule(times, tuple(Choice(int(p), "data", 0, "none", False) for p in rng.integers(1, 5, size=4)))
        for _ in range(60)
    ]
    losses = np.array([sum(abs(c.order - 2) for c in one.chosen) for one in every], float)
    guess = usf.predicted(every[:45], losses[:45], every[45:])
    assert np.corrcoef(guess, losses[45:])[0, 1] > 0.6


# ---------------------------------------------------------------- steps of each label


@pytest.mark.parametrize("name", ["stepsaver", "adadiff"])
def test_steps_of_each_label(name, sampler, tmp_path):
    """Errors of a table, 0.5/n for label 1 and 2/n else: the least n that is enough, and the best reward, by hand."""
    sampler = sampler._replace(cond=np.arange(5))
    choices, file = [2, 4, 8], tmp_path / "steps.json"
    labels = np.arange(40) % 5
    errors = np.where(labels == 1, 0.5, 2.0)[:, None] / np.array(choices)[None]
    given = labels, errors, (labels, errors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_label, "_errors", lambda *_: given)
        more = {"tolerance": 0.25} if name == "stepsaver" else {"cost": 0.3}
        content = C.calibrate_to(name, sampler, file, 40, 10, print, "solver", choices=choices, **more)
    # rewards of label 1: 0.675, 0.725, 0.6375; of the others -0.075, 0.35, 0.45
    wanted = [8, 2, 8, 8, 8] if name == "stepsaver" else [8, 4, 8, 8, 8]
    assert content["steps_of"] == wanted
    config = CONFIG | {"steps_by": str(file)}
    assert build_setup(config, sampler.run.model).by_label == tuple(wanted)


def test_errors_are_those_of_runs_of_that_many_steps(sampler):
    sampler = sampler._replace(cond=np.arange(5))
    labels, errors, (held, rest) = by_label._errors(sampler, 20, 10, [2, 4], 16, print)
    assert len(labels) == 10 and len(held) == 10 and errors.shape == rest.shape == (10, 2)
    (one,) = descent.batches(sampler, 10, 10, 0, 16)
    drawn = draw(build_setup(CONFIG | {"steps": 2}), sampler.params, np.arange(5).repeat(1))
    apart = np.sqrt(((drawn.samples - np.asarray(one.wanted)[:5]) ** 2).sum((1, 2, 3)))
    np.testing.assert_allclose(
        errors[:5, 0], apart / np.sqrt((np.asarray(one.wanted)[:5] ** 2).sum((1, 2, 3))), rtol=1e-4
    )


@pytest.mark.slow
def test_a_run_draws_each_label_with_its_steps(tmp_path):
    config = CONFIG | {
        "solver": {"name": "ddim", "eta": 1.0},
        "process": {"name": "vp_linear"},
    }
    config |= {"prediction": "eps"}
    file = tmp_path / "steps.json"
    file.write_text(json.dumps({"technique": "adadiff", "steps_of": [2, 3, 2, 2, 2]}))
    run = load(config, weights="random", steps_by=str(file))
    found = run.sample([1, 0, 4, 1])
    for n, of in ((3, [0, 3]), (2, [1, 2])):
        wanted = load(config, weights="random", steps=n).sample([1, 0, 4, 1]).images
        np.testing.assert_allclose(found.images[of], wanted[of], rtol=1e-5, atol=1e-5)
    assert found.table["steps"] == "2 (2 images), 3 (2 images)"
    assert found.table["network_evaluations"] == 2.5 and sorted(found.trace) == [2, 3]
    with pytest.raises(ValueError, match="several lengths"):
        found.save_trace(tmp_path / "trace.npz")
    with pytest.raises(ValueError, match="steps_by"):
        run.setup.sampler()


# ---------------------------------------------------------------- refusals

GOOD = {"technique": "bns", "times": [1.0, 0.5], "a": [1, 1], "b": [[1, 0], [1, 1]]}
DAMAGED = [
    ({"technique": "ddss"}, "was measured for ddss"),
    ({"times": [0.5, 1.0]}, "do not decrease"),
    ({"times": [1.0, 0.0]}, "do not decrease"),
    ({"times": [1.0, None]}, "numbers"),
    ({"a": [1, 1, 1]}, "allowed: \\[n\\]"),
    ({"b": [[1, 0]]}, "allowed: \\[n, n\\]"),
    ({"b": "none"}, "no array of numbers"),
    ({"a": [1, float("nan")]}, "finite|NaN"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED, ids=lambda v: str(v)[:24])
def test_damaged_files_are_refused(change, message, tmp_path):
    file = tmp_path / "bns.json"
    file.write_text(json.dumps(GOOD | change))
    with pytest.raises(ValueError, match=message):
        SOLVERS["bns"](file=str(file))


def test_files_of_other_runs_are_refused(tmp_path):
    file = tmp_path / "bns.json"
    file.write_text(json.dumps(GOOD))
    solver = SOLVERS["bns"](file=str(file))
    with pytest.raises(ValueError, match="measured over 2 evaluations; allowed: the 6 of this run"):
        solver.grid(P.flow(), TIMES)
    found = read_learned("bns", str(file), {"times": ("n",)})
    assert found["times"].tolist() == [1.0, 0.5]
    for name in ("bns", "ddss", "ltsl", "iia", "usf"):
        with pytest.raises(ValueError, match="no such file"):
            SOLVERS[name](file=str(tmp_path / "none.json"))


REFUSED = [
    ("bns", {"start": "rk4"}, "unknown start"),
    ("ddss", {"eta": 2.0}, "allowed: 0 ... 1"),
    ("iia", {"base": "heun"}, "unknown base"),
    ("usf", {"order": 5}, "allowed: 1 ... 4"),
    ("usf", {"order": 3, "estimate": 1}, "allowed: 0, or 2"),
    ("usf", {"prediction": "velocity"}, "prediction"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED, ids=lambda v: str(v)[:20])
def test_settings_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        SOLVERS[name](**arguments)


def test_grids_that_a_solver_cannot_take_are_refused():
    with pytest.raises(ValueError, match="alpha = 0"):
        SOLVERS["iia"](base="edm").grid(P.flow(), np.array([1.0, 0.5, 0.0]))
    with pytest.raises(ValueError, match="one value, or 6"):
        SOLVERS["usf"](order=[1, 2]).grid(P.flow(), TIMES)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bns", {"rate": 0.0}, "allowed: above 0"),
        ("ddss", {}, "multiples of 4"),
        ("iia", {"order": 0}, "order=0"),
        ("usf", {"measured": 1}, "measured=1"),
        ("stepsaver", {"choices": [3]}, "two or more"),
        ("stepsaver", {"choices": [2, 3]}, "in no sample"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_fits_refuse(name, settings, message, sampler):
    with pytest.raises(ValueError, match=message):
        SOLVER_FITS[name].fit(sampler, 6, 2, lambda text: None, **settings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"technique": "bns", "steps_of": [1] * 5}, "stepsaver, or adadiff"),
        ({"technique": "adadiff", "steps_of": [1] * 4}, "4 labels; allowed: 5"),
        ({"technique": "adadiff", "steps_of": [0] * 5}, "whole numbers of 1"),
        ({"technique": "adadiff"}, "whole numbers of 1"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_files_of_steps_are_refused(content, message, tmp_path, sampler):
    file = tmp_path / "steps.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        build_setup(CONFIG | {"steps_by": str(file)}, sampler.run.model)


@pytest.mark.slow
def test_the_command_line(tmp_path, capsys):
    file = tmp_path / "iia.json"
    settings = "--fit parts=2 --fit order=1 --fit steps=3 --samples 4 --batch 2 --steps 3 --quiet".split()
    assert cli.main(["calibrate", "--config", "fmnist_dit", "--solver", "iia", *settings, "--out", str(file)]) == 0
    assert json.loads(file.read_text())["base"] == "ddim"
    run = ["sample", "--solver", "iia", "--config.solver.file", str(file), "--labels", "bag", "--quiet"]
    assert cli.main([*run, "--steps", "3", "--out", str(tmp_path / "bag.png")]) == 0
    assert cli.main([*run, "--steps", "4", "--out", str(tmp_path / "bag.png")]) != 0
    assert "measured over 3 evaluations" in capsys.readouterr().err
