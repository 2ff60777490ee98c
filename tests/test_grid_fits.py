"""Grids that are fitted to a model: their tables against closed forms, their search, and the files that they write."""

import itertools
import json
from typing import Any, NamedTuple

import numpy as np
import pytest

import difax
from difax import cli
from difax.accel.caches import CACHES
from difax.accel.caches.measured import MeasuredElsewhere
from difax.accel.fit import GRID_FITS, SOLVER_FITS, Made, evolution, schedules
from difax.accel.fit.search import cheapest_path
from difax.accel.fit.trajectories import Batch, ddim_step, trajectory
from difax.core.grids import GRIDS, make_times
from difax.core.process import flow, log_snr, vp_linear, vp_sde
from difax.study import calibrate as study
from experiments import grids as experiment
from tests.families import some

# ---------------------------------------------------------------- the path


@pytest.mark.parametrize("growth", [1.0, 1.3])
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_no_path_costs_less(steps, growth):
    cost = np.random.default_rng(steps).normal(size=(7, 7))

    def total(path):
        return sum(growth**m * cost[i, j] for m, (i, j) in enumerate(itertools.pairwise(path)))

    ours = cheapest_path(cost, steps, growth)
    assert list(ours[[0, -1]]) == [0, 6] and np.all(np.diff(ours) > 0) and len(ours) == steps + 1
    paths = [(0, *inner, 6) for inner in itertools.combinations(range(1, 6), steps - 1)]
    assert total(ours) == pytest.approx(min(map(total, paths)), rel=1e-12)


# ---------------------------------------------------------------- tables, on data whose prediction is known

PIXELS, SPREAD = 400, 0.5


class Known(NamedTuple):
    """As much of a calibration's sampler as the tables look at: a run of n steps of a process."""

    run: Any
    seed: int = 0


class KnownRun(NamedTuple):
    process: Any
    times: np.ndarray


def gaussian(monkeypatch, process, mean=0.0, spread=SPREAD, samples=64):
    """Data of N(mean, spread^2), whose prediction is exact, in place of a model."""

    def batches(sampler, times, n, batch, progress):
        level = process.level(times)

        def predict(x, i):
            a, s = level.alpha[i], level.sigma[i]
            return mean + spread**2 * a / (spread**2 * a**2 + s**2) * (x - a * mean)

        noise = np.random.default_rng(1).standard_normal((samples, PIXELS)) * process.prior_std
        yield Batch(noise, predict, 0)

    monkeypatch.setattr(schedules, "batches", batches)
    return {"samples": samples, "batch": samples, "progress": lambda text: None}


def known(process, n):
    return Known(KnownRun(process, np.linspace(1, 0, n + 1)))


@pytest.mark.parametrize("metric", ["deviation", "l2", "l1"])
def test_gits_finds_no_cost_where_trajectories_are_straight(metric, monkeypatch):
    of = gaussian(monkeypatch, flow(), mean=0.7, spread=1e-9)  # one point: the flow is a line
    seen = []
    monkeypatch.setattr(schedules, "cheapest_path", lambda cost, n, growth: seen.append(cost) or np.array([0, 5, 12]))
    found = schedules.gits(known(flow(), 2), **of, fine=12, metric=metric)
    assert np.abs(seen[0]).max() < 1e-6
    np.testing.assert_allclose(found["times"], [1.0, 7 / 12, 0.0])


def test_gits_goes_by_the_error_of_a_step(monkeypatch):
    process, of = vp_sde(), gaussian(monkeypatch, vp_sde())
    seen = []
    monkeypatch.setattr(schedules, "cheapest_path", lambda cost, n, growth: seen.append(cost) or np.array([0, 40]))
    schedules.gits(known(process, 1), **of, fine=40, metric="l2")
    times = make_times(GRIDS["uniform"](), process, 40)
    level = process.level(times)
    std = np.sqrt(
        SPREAD**2 * level.alpha**2 + level.sigma**2
    )  # the trajectory of the flow is x_t = (std_t / std_1) x_1
    for i, j in ((0, 20), (10, 11), (25, 40)):
        x = std[i] * np.ones(1)  # scaled to unit noise
        x0 = SPREAD**2 * level.alpha[i] / std[i] ** 2 * x
        wanted = abs(ddim_step(level, i, j, x, x0) - std[j])[0] / std[0] / (level.alpha[j] + level.sigma[j])
        assert seen[0][i, j] == pytest.approx(wanted, rel=0.05, abs=2e-3), (i, j)


def test_align_your_steps_measures_the_bound_of_gaussian_data(monkeypatch):
    process, of = vp_linear(), gaussian(monkeypatch, vp_linear(), samples=200)
    seen = []
    monkeypatch.setattr(schedules, "cheapest_path", lambda cost, n: seen.append(cost) or np.array([0, 10, 20]))
    found = schedules.align_your_steps(known(process, 2), **of, fine=20, sigma_min=0.1)
    assert found["times"][0] == 1.0 and found["times"][-1] == 0.0 and len(found["times"]) == 3
    ratio = np.exp(np.linspace(np.log(157.4069), np.log(0.1), 21))  # of the grid log_snr
    gain = SPREAD**2 / (SPREAD**2 + ratio**2)
    for i, j in ((0, 5), (3, 12), (8, 20), (15, 20)):
        steps = range(i, j + 1)
        apart = [(gain[k] - gain[i]) ** 2 * (SPREAD**2 + ratio[k] ** 2) for k in steps]
        apart = [a + gain[i] ** 2 * (ratio[i] ** 2 - ratio[k] ** 2) for a, k in zip(apart, steps, strict=True)]
        snr = [1 / ratio[k] ** 2 for k in steps]
        wanted = 0.5 * np.trapezoid(apart, snr)
        assert seen[0][i, j] == pytest.approx(wanted, rel=0.05), (i, j)


def test_watson_measures_the_terms_of_the_bound(monkeypatch):
    process, of = vp_linear(), gaussian(monkeypatch, vp_linear())
    seen, drawn = [], []
    monkeypatch.setattr(schedules, "cheapest_path", lambda cost, n: seen.append(cost) or np.array([0, 10, 20]))
    paths = schedules.forward_paths
    monkeypatch.setattr(schedules, "forward_paths", lambda *a: [out := paths(*a), drawn.append(out[0])][0])
    found = schedules.watson(known(process, 2), **of, fine=20, sigma_min=0.1)
    ratio = np.exp(np.linspace(np.log(157.4069), np.log(0.1), 21))
    gain = SPREAD**2 / (SPREAD**2 + ratio**2)
    error = PIXELS * ((1 - gain) ** 2 * np.mean(drawn[0] ** 2) + gain**2 * ratio**2)  # of the samples that it drew
    for i, j in ((0, 5), (3, 12), (8, 20), (15, 16)):
        wanted = 0.5 * (1 / ratio[j] ** 2 - 1 / ratio[i] ** 2) * error[i]
        assert seen[0][i, j] == pytest.approx(wanted, rel=0.03), (i, j)
    assert found["settings"]["bound"] == pytest.approx(seen[0][0, 10] + seen[0][10, 20])


def test_a_term_of_the_bound_is_the_divergence_of_two_gaussians():
    process = vp_linear()
    t = process.level(np.array([0.8, 0.5]))
    (at, as_), (st, ss) = t.alpha, t.sigma
    variance = ss**2 - (as_ * ss**2 / at) ** 2 * 0  # of x_s given x0, before x_t is known
    step = st**2 - (at / as_) ** 2 * ss**2  # of x_t given x_s
    posterior = 1 / ((at / as_) ** 2 / step + 1 / variance)
    weight = posterior * as_ / ss**2  # of x0 in the mean of x_s given x_t and x0
    snr = np.exp(log_snr(process, np.array([0.8, 0.5])))
    ours = schedules.bound_terms(snr, np.array([2.0, 0.0]))
    assert ours[0, 1] == pytest.approx(weight**2 * 2.0 / (2 * posterior), rel=1e-9)


def test_the_fine_trajectory_is_of_second_order_or_better():
    process, errors = vp_sde(), []
    for fine in (40, 80):
        times = np.linspace(0.9, 0.1, fine + 1)
        level = process.level(times)
        std = np.sqrt(SPREAD**2 * level.alpha**2 + level.sigma**2)
        of = Batch(np.ones((1, 1)), lambda x, i, a=level.alpha, s=std: SPREAD**2 * a[i] / s[i] ** 2 * x, 0)
        errors.append(abs(trajectory(process, times, of)[0][-1][0, 0] - std[-1] / std[0]))
    assert np.log2(errors[0] / errors[1]) > 1.8 and errors[1] < 1e-4  # Gaussian data are kind to it


def test_forward_paths_share_their_noise():
    process, times = vp_linear(), np.array([1.0, 0.6, 0.3, 0.1])
    level = process.level(times)
    of = Batch(np.zeros((2000, 3)), lambda x, i: np.full_like(x, 0.25), 0)
    x0, x = schedules.forward_paths(process, times, of, 0)
    assert np.all(x0 == 0.25)
    walk = x / level.alpha[:, None, None] - x0
    variance = (level.sigma / level.alpha) ** 2
    np.testing.assert_allclose(walk.var((1, 2)), variance, rtol=0.06)
    assert np.mean(walk[1] * walk[2]) == pytest.approx(variance[2], rel=0.2)  # the smaller one, of a Brownian motion
    np.testing.assert_allclose(np.var(walk[1] - walk[2]), variance[1] - variance[2], rtol=0.06)


# ---------------------------------------------------------------- the evolution


def test_an_evolution_finds_what_it_is_told_to_look_for():
    wanted = evolution.Candidate((3, 9, 20, 33), ((1,), (), (0, 2), ()))

    def score(one):
        apart = sum(abs(a - b) for a, b in zip(one.times, wanted.times, strict=True))
        return apart + sum(len(set(a) ^ set(b)) for a, b in zip(one.skip, wanted.skip, strict=True))

    draw = np.random.default_rng(0)
    first = evolution.Candidate((0, 10, 20, 30), evolution.spread(draw, 4, 3, 3))
    best, losses = evolution.evolved(first, score, draw, 40, 3, 40, 30, 8, 0.2)
    assert losses[0] == score(first) and losses[-1] == score(best) < 0.35 * losses[0]
    assert losses == sorted(losses, reverse=True) and len(losses) == 31
    assert sum(map(len, best.skip)) == 3


def test_candidates_stay_candidates():
    draw = np.random.default_rng(1)
    one = evolution.Candidate((0, 1, 2, 7), evolution.spread(draw, 4, 6, 9))
    other = evolution.Candidate((1, 2, 3, 4), evolution.spread(draw, 4, 6, 9))
    for _ in range(200):
        for child in (evolution.mutated(one, draw, 10, 6, 0.5), evolution.crossed(one, other, draw)):
            assert len(set(child.times)) == 4 and list(child.times) == sorted(child.times) and child.times[-1] < 10
            assert sum(map(len, child.skip)) == 9
            assert all(len(set(row)) == len(row) and set(row) <= set(range(6)) for row in child.skip)
    assert evolution.nearest(np.linspace(1, 0, 11), np.array([1.0, 0.98, 0.5])) == (0, 1, 5)


# ---------------------------------------------------------------- the command

TINY = ["--labels", "0,1", "--steps", "3", "--quiet", "--samples", "2", "--batch", "2"]
QUICK = {
    "gits": ["--fit", "fine=6"],
    "align_your_steps": ["--fit", "fine=6"],
    "watson": ["--fit", "fine=6", "--fit", "base=karras"],
    "autodiffusion": ["--fit", "fine=8", "--fit", "population=4", "--fit", "generations=2", "--fit", "select=2"],
}


def test_every_fit_of_a_grid_is_run():
    assert set(QUICK) == set(GRID_FITS)


@pytest.mark.parametrize("name", some(list(GRID_FITS), "gits", "autodiffusion"))
def test_calibrate_writes_a_grid_that_sample_reads(name, small_weights, tmp_path, capsys):
    file = tmp_path / "grid.json"
    more = ["--fit", "blocks=0.5"] if name == "autodiffusion" else []
    command = ["calibrate", "--grid", name, *QUICK[name], *more, "--weights", small_weights, *TINY]
    assert cli.main([*command, "--out", str(file)]) == 0
    assert "times" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert (found["technique"], found["process"], found["solver"], found["steps"]) == (name, "flow", "euler", 3)
    assert len(found["times"]) == 4 and found["settings"]["fine"] in (6, 8)
    run = difax.load(small_weights, steps=3, grid={"name": "measured", "file": str(file)})
    np.testing.assert_array_equal(run.setup.times, found["times"])
    if name == "autodiffusion":
        assert sum(map(len, found["skip"])) == 3 and found["losses"]["found"] <= found["losses"]["the run's grid"]
        skipping = run.replace(cache={"name": "autodiffusion", "file": str(file)})
        assert skipping.sample([1]).cost["computed_fraction"] == pytest.approx(0.5)


def test_a_grid_says_what_it_was_fitted_to(small_weights, tmp_path):
    file = tmp_path / "grid.json"
    says = {
        "technique": "gits",
        "process": "flow",
        "model": "dit-2x32/4",
        "solver": "euler",
        "steps": 3,
        "guide": "cfg",
    }
    file.write_text(json.dumps({**says, "times": [1.0, 0.6, 0.2, 0.0]}))
    grid = {"name": "measured", "file": str(file)}
    load = lambda **more: difax.load(small_weights, **{"steps": 3, "grid": grid, **more})  # noqa: E731
    load()
    other = {"solver": "ddim", "process": "vp_linear", "prediction": "eps"}
    with pytest.warns(MeasuredElsewhere, match=r"grid measured: .*in another run \(solver 'euler'; here: ddim"):
        load(**other, grid={**grid, "file": other_process(file)})
    with pytest.raises(ValueError, match="times for 3 steps; allowed: the 4 of this run"):
        load(steps=4)
    with pytest.raises(ValueError, match="times of the process 'flow'; allowed: of vp_linear"):
        load(**other)


def other_process(file) -> str:
    content = json.loads(file.read_text())
    path = file.with_name("vp.json")
    path.write_text(json.dumps({**content, "process": "vp_linear"}))
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid", "gitts"], ["unknown calibration of a grid 'gitts'", "did you mean gits?"]),
        (["--grid", "uniform"], ["--cache is missing", "--grid: gits"]),
        (["--grid", "gits", "--cache", "teacache"], ["two calibrations", "one at a time"]),
        (["--grid", "gits", "--fit", "fine"], ["--fit fine", "KEY=VALUE"]),
        (["--grid", "gits", "--fit", "finer=3"], ["'finer'", "did you mean fine?"]),
        (["--grid", "gits", "--fit", "fine=many"], ["fine='many'", "an integer"]),
        (["--grid", "gits", "--fit", "fine=3"], ["fine=3", "more than the 3 steps"]),
        (["--grid", "gits", "--fit", "metric=l3"], ["metric='l3'", "deviation, l2, l1"]),
        (["--grid", "watson", "--fit", "sigma_min=0"], ["sigma_min=0", "1e-6 ... 1"]),
        (["--grid", "autodiffusion", "--fit", "blocks=0"], ["blocks=0", "0.1 ... 1"]),
        (["--grid", "gits", "--rank", "3"], ["--rank is of caches", "--fit KEY=VALUE"]),
        (["--cache", "teacache", "--fit", "fine=3"], ["--fit fine=3", "allowed: --config.cache.KEY=VALUE"]),
        (["--grid", "gits", "--samples", "0"], ["--samples=0", "1 or more"]),
    ],
)
def test_calibrations_of_grids_are_refused(arguments, said, small_weights, tmp_path, capsys):
    command = ["calibrate", "--weights", small_weights, *TINY, *arguments, "--out", str(tmp_path / "x.json")]
    assert cli.main(command) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and all(word in told for word in said), told
    assert not list(tmp_path.iterdir())


def test_a_solver_is_fitted_by_the_same_command(small_weights, tmp_path, capsys, monkeypatch):
    """What a fit of a solver gives is written with what was run, as JSON or arrays."""

    def fit(sampler, samples, batch, progress, times: int = 1) -> dict[str, Any]:
        return {"weights": np.full(len(sampler.run.times), float(times * samples))}

    monkeypatch.setitem(SOLVER_FITS, "made_up", Made(fit, ".npz"))
    file = tmp_path / "s.npz"
    command = ["calibrate", "--weights", small_weights, *TINY, "--out", str(file), "--fit", "times=3"]
    assert cli.main([*command, "--solver", "made_up"]) == 0
    np.testing.assert_array_equal(np.load(file)["weights"], [6.0] * 4)
    assert "made_up" in capsys.readouterr().out
    content = difax.load(small_weights, steps=3).calibrate("made_up", kind="solver", samples=2, times=2)
    np.testing.assert_array_equal(content["arrays"]["weights"], [4.0] * 4)
    assert content["technique"] == "made_up" and content["steps"] == 3
    assert cli.main([*command, "--solver", "made_up", "--grid", "gits"]) == 2
    assert "two calibrations" in capsys.readouterr().err
    with pytest.raises(ValueError, match="unknown kind 'grids'"):
        difax.load(small_weights, steps=3).calibrate("gits", kind="grids")
    assert study.ending("made_up", "solver") == ".npz" and study.ending("gits", "grid") == ".json"


# ---------------------------------------------------------------- blocks left out


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, "nothing was given; allowed: skip"),
        ({"skip": [[0]], "file": "x.json"}, "skip and file was given"),
        ({"skip": [0, 1]}, r"skip=\[0, 1\]; allowed: a list"),
        ({"skip": [[True]]}, "allowed: a list"),
        ({"file": "none.json"}, "none.json"),
    ],
)
def test_lists_of_blocks_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        CACHES["autodiffusion"](**keys)


# ---------------------------------------------------------------- the comparison


def test_the_page_of_the_comparison_shows_every_row():
    where = {"device": "cpu", "cores": 2, "date": "2026-01-01", "command": "python -m experiments.grids"}
    row = {"kind": "fitted", "best_plain": "uniform", "psnr": 20.0, "gain": 1.5, "gain_interval": [0.5, 2.5]}
    row |= {"provenance": where, "fitted": {"samples": 40}, "held_out": {"samples": 200}}
    rows = [
        {**row, "solver": "euler", "steps": 5, "grid": "uniform", "kind": "plain"},
        {**row, "solver": "euler", "steps": 5, "grid": "gits"},
        {**row, "solver": "euler", "steps": 8, "grid": "gits", "gain": -0.5},
    ]
    text = experiment.page(rows)
    assert "| gits | fitted | 20.00 (+1.50 [+0.50, +2.50]) | 20.00 (-0.50 [+0.50, +2.50]) |" in text
    assert "| uniform | plain | 20.00 (best plain) |  |" in text and "Fitted on 40 samples, held out 200" in text
    assert {name for name, _ in experiment.FITS.values()} == set(GRID_FITS)


@pytest.mark.slow
def test_the_comparison_runs(small_weights, tmp_path, monkeypatch):
    tiny = difax.load(small_weights)
    monkeypatch.setattr(experiment.difax, "load", lambda config: tiny)
    monkeypatch.setattr(experiment, "FITS", {"gits": ("gits", {"fine": 6})})
    monkeypatch.setattr(experiment, "REFERENCE", {"solver": "dpmpp_2m", "grid": "uniform", "steps": 8})
    out = tmp_path / "rows.jsonl"
    command = ["grids", "--solvers", "euler", "--steps", "3", "--samples", "2", "--held-out", "3", "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    experiment.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == len(experiment.PLAIN) + len(experiment.BOUNDS) + 1
    assert all(len(row["times"]) == 4 for row in rows)
    [best] = {row["best_plain"] for row in rows}
    assert next(row["gain"] for row in rows if row["grid"] == best) == 0
    monkeypatch.setattr("sys.argv", [*command, "--page"])
    experiment.main()
    assert "| gits | fitted |" in (tmp_path / "README.md").read_text()
