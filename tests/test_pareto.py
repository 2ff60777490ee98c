"""The sweep: rows that can be trusted, resumed and compared."""

import errno
import importlib.util
import json
import math
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

import difax
import difax.checkpoints
import difax.run
from difax import commands
from difax.cli import _join_overrides, _parser, main
from difax.commands import writable
from difax.config import load_config, override, parse_value
from difax.core.files import read_rows
from difax.core.writing import NoRoom, append_line, drop_cut_line
from difax.study.frontier import BASELINE, CONTROL, finite, frontier, line, table
from difax.study.methods import BUDGETS, FAMILIES, METHODS, SOLVER_METHODS, Method, chosen
from difax.study.pareto import Options, Sweep, Timed, described, slug, with_steps
from difax.weights.checkpoint import save_safetensors
from difax.weights.conditions import random_conditions
from tests.families import some
from tests.toys import randomise

LOW, HIGH = (f"cache.name=teacache,cache.threshold={t}" for t in (0.5, 9.0))
SHORT = Options(seeds=3, batch=2, turns=1)


@pytest.fixture(scope="module")
def sweep(small_weights):
    """(folder, steps=4, options=SHORT, ...) -> a sweep of the small model."""

    def made(folder, steps=4, options=SHORT, **keys):
        run = difax.load(small_weights, steps=steps)
        return Sweep(f"--weights {small_weights}", run, options, folder, **keys)

    return made


@pytest.fixture(scope="module")
def measured(tmp_path_factory, sweep):
    """One sweep of five methods, in two goes."""
    folder = tmp_path_factory.mktemp("pareto")
    names = ["cache.name=none", LOW, HIGH]
    sweep(folder).measure(chosen(names, parse_value))
    first = (folder / "rows.jsonl").read_text()
    rows = sweep(folder).measure(chosen([*names, "tgate", "steps=2"], parse_value))
    return folder, first, {row["method"]: row for row in rows}


def test_a_sweep_goes_on_where_it_stopped(measured):
    folder, first, rows = measured
    text = (folder / "rows.jsonl").read_text()
    assert text.startswith(first) and first.count("\n") == 4 and text.count("\n") == 6
    assert list(rows) == [BASELINE, "cache.name=none", LOW, HIGH, "tgate", "steps=2"]


def test_what_changes_nothing_is_the_baseline(measured):
    _, _, rows = measured
    for name in (BASELINE, "cache.name=none"):
        found = rows[name]
        assert found["quality"]["psnr"] == [100, 100, 100] and found["quality"]["relative_l2"] == [0, 0, 0]
        np.testing.assert_allclose(found["cost"]["ratio"], 1.0)
        np.testing.assert_allclose(found["cost"]["bytes_ratio"], 1.0)
        assert found["decisions"]["strips"] == ["FFFF", "FFFF"] and found["decisions"]["computed_fraction"] == 1


def test_costs_are_those_of_the_trace(measured):
    _, _, rows = measured
    np.testing.assert_allclose(rows["steps=2"]["cost"]["ratio"], 2.0)
    assert rows[BASELINE]["speed"]["ratio"] == 1.0  # it is the unit; its turns are the machine's noise
    np.testing.assert_allclose(rows["steps=2"]["speed"]["realised"], rows["steps=2"]["speed"]["ratio"] / 2.0, rtol=1e-9)
    strip = rows[HIGH]["decisions"]["strips"][0]
    assert strip == "F..F"
    assert rows[HIGH]["decisions"]["blocks"] == [[100 * (c == "F")] * 2 for c in strip]


def test_equal_programs_are_compiled_once(measured):
    _, _, rows = measured
    assert rows[HIGH]["speed"]["shared_compilation"] and rows["cache.name=none"]["speed"]["shared_compilation"]
    assert not rows["steps=2"]["speed"]["shared_compilation"]


def test_what_a_model_cannot_have_is_said(measured):
    _, _, rows = measured
    assert "no branch 'cross'" in rows["tgate"]["refused"] and "speed" not in rows["tgate"]


def test_images_are_kept(measured):
    folder, _, _ = measured
    images = np.load(folder / "images" / f"{slug('steps=2')}.npz")["images"]
    assert images.shape == (3, 28, 28, 1) and images.dtype == np.uint8 and images.std() > 0


def test_the_command_of_a_row_is_one_that_difax_takes(measured, tmp_path, capsys):
    _, _, rows = measured
    command = rows[HIGH]["command"].split()
    assert command[:2] == ["difax", "sample"]
    out = str(tmp_path / "x.png")
    assert main([*command[1:], "--steps", "2", "--labels", "0", "--out", out, "--json", "--no-compile-cache"]) == 0
    assert json.loads(capsys.readouterr().out)["cache"] == "teacache"


def test_another_sweep_is_refused(measured, sweep):
    folder, _, _ = measured
    with pytest.raises(ValueError, match="seeds: 3 there, 4 here"):
        sweep(folder, options=SHORT._replace(seeds=4))
    with pytest.raises(ValueError, match="another configuration"):
        sweep(folder, steps=5)
    with pytest.raises(ValueError, match="other settings"):
        sweep(folder).measure({LOW: METHODS["teacache 0.2"]})


def test_a_setting_without_a_bound_is_the_same_when_a_sweep_goes_on(measured, sweep, tmp_path):
    folder, _, rows = measured
    shutil.copytree(folder, tmp_path / "p")
    method = Method("cache", {"cache.name": "teacache", "cache.threshold": math.inf})
    row = {**rows[LOW], "method": "never", "settings": finite(method.settings)}
    append_line(tmp_path / "p" / "rows.jsonl", json.dumps(row))
    assert sweep(tmp_path / "p").measure({"never": method})[-1] == row
    with pytest.raises(ValueError, match="other settings"):
        sweep(tmp_path / "p").measure({"never": METHODS["teacache 0.2"]})


def test_damaged_images_are_refused_before_more_is_measured(measured, sweep, tmp_path, monkeypatch):
    folder, _, _ = measured
    shutil.copytree(folder, tmp_path / "p")
    path = tmp_path / "p" / "images" / f"{slug(LOW)}.npz"
    path.write_bytes(path.read_bytes()[:-99])
    monkeypatch.setattr(Sweep, "_wanted", lambda *a: pytest.fail("it was measured"))
    with pytest.raises(ValueError, match=f"{path.name}: no images of difax pareto"):
        sweep(tmp_path / "p").measure(chosen(["steps=1"], parse_value))


def test_a_line_that_was_cut_off_is_measured_again(measured, tmp_path):
    folder, _, _ = measured
    whole = (folder / "rows.jsonl").read_text()
    path = tmp_path / "rows.jsonl"
    path.write_text(whole[: -len(whole.splitlines()[-1]) // 2])
    assert [r["method"] for r in read_rows(path)] == [json.loads(x)["method"] for x in whole.splitlines()[:-1]]
    assert not path.read_text().endswith("\n")  # who reads does not write
    drop_cut_line(path)
    assert path.read_text() == "".join(x + "\n" for x in whole.splitlines()[:-1])
    drop_cut_line(tmp_path / "nothing")
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_a_budget_ends_a_sweep(sweep, tmp_path):
    said = []
    rows = sweep(tmp_path, options=SHORT._replace(budget=1e-9), tell=said.append).measure(
        chosen(["steps=2"], parse_value)
    )
    assert [r["method"] for r in rows] == [BASELINE] and "1 methods are left" in said[-1]


def test_a_method_that_fails_costs_no_other_its_row(small_weights, tmp_path, monkeypatch, capsys):
    whole, errors = Sweep._measured, [RuntimeError("RESOURCE_EXHAUSTED: out\nof memory")]
    errors += [NoRoom(errno.ENOSPC, "cannot write x.npz: No space left on device")]

    def failing(self, name, program):
        if name == "steps=2":
            raise errors.pop()
        return whole(self, name, program)

    monkeypatch.setattr(Sweep, "_measured", failing)
    command = ["pareto", "--methods", "steps=2", "cache.name=none", "--no-judge", "--set", "steps=1", "--quiet"]
    command += ["--weights", small_weights]
    command += ["--seeds", "1", "--batch", "1", "--turns", "1", "--out", str(tmp_path / "p")]
    assert main(command) == 1  # no room for one is none for the next
    assert capsys.readouterr().err == "difax: error: cannot write x.npz: No space left on device\n"
    assert [r["method"] for r in read_rows(tmp_path / "p" / "rows.jsonl")] == [BASELINE]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "steps=2 failed" in error and "RuntimeError: RESOURCE_EXHAUSTED: out of memory" in error
    assert [r["method"] for r in read_rows(tmp_path / "p" / "rows.jsonl")] == [BASELINE, "cache.name=none"]
    monkeypatch.setattr(Sweep, "_measured", whole)
    assert main(command) == 0 and "failed" not in capsys.readouterr().err
    assert [r["method"] for r in read_rows(tmp_path / "p" / "rows.jsonl")] == [BASELINE, "cache.name=none", "steps=2"]


def test_a_failing_baseline_is_raised(sweep, tmp_path, monkeypatch):
    def failing(self, name, program):
        raise RuntimeError("no baseline")

    monkeypatch.setattr(Sweep, "_measured", failing)
    with pytest.raises(RuntimeError, match="no baseline"):
        sweep(tmp_path, steps=1).measure({})


def fake(method, psnr, ratio, flops=None):
    return {
        "method": method,
        "speed": {"ratio": ratio, "realised": 1.0, "turns": [ratio - 0.1, ratio, ratio + 0.2]},
        "cost": {"ratio": flops or ratio},
        "quality": {"psnr": [psnr, psnr, psnr], "frechet": None},
    }


def test_frontier_by_hand():
    rows = [fake("a", 30, 2), fake("b", 25, 3), fake("c", 24, 2.5, 4), fake("d", 30, 2), fake("e", 20, 2)]
    found = {r["method"]: r["dominated_by"] for r in frontier([*rows, {"method": "x", "refused": "why"}])}
    # equal points do not dominate each other
    assert found == {"a": None, "b": None, "c": "b", "d": None, "e": "b"}
    assert {r["method"]: r["dominated_by"] for r in frontier(rows, cost="flops")}["c"] is None
    assert frontier(rows, "frechet") == []
    broken = fake("broken", 1, 9)
    broken["quality"]["psnr"] = [None, None, None]  # images that were not finite
    assert len(frontier([*rows, broken])) == 5 and "not finite" in line(broken | {"cost": {"ratio": 1.0}})
    text = table(rows)
    assert text.splitlines()[2].startswith("| **b** | x3.00 | x3.00 (2.90-3.20) | 1.00 | 25.0 [25.0, 25.0]")
    assert "| c | x4.00 | x2.50 (2.40-2.70) |" in text and text.splitlines()[3].endswith("| b |")


def test_without_turns_seconds_are_compared_with_those_of_the_start(sweep, tmp_path):
    made = sweep(tmp_path / "p", options=SHORT._replace(turns=0))
    rows = {r["method"]: r for r in made.measure({LOW: METHODS["teacache 0.2"]})}
    for name in (BASELINE, LOW):
        speed = rows[name]["speed"]
        assert speed["turns"] == [] and speed["seconds_per_image"] > 0
        assert speed["baseline_seconds_per_image"] == statistics.median(made.seconds) / SHORT.batch
    assert rows[BASELINE]["speed"]["ratio"] == 1.0
    assert "()" not in table(list(rows.values())) and "| x1.00 | x1.00 |" in table(list(rows.values()))


def test_methods_have_families_and_known_settings():
    for name, method in METHODS.items():
        assert method.family in FAMILIES, name
        override(load_config("fmnist_dit"), list(method.settings.items()))
    assert {m.family for m in METHODS.values()} == set(FAMILIES)


def test_methods_are_chosen_by_name_family_and_settings():
    assert list(chosen(["steps", "fora 2"], parse_value)) == [
        *(n for n in METHODS if n.startswith("steps ") and "+" not in n),
        "fora 2",
    ]
    assert chosen(["steps=12, cache.name=fora"], parse_value).popitem()[1].settings == {
        "steps": 12,
        "cache.name": "fora",
    }
    written = chosen(["solver=heun,cache.name=x,cache.at=(1, 2),dtype=bfloat16"], parse_value).popitem()[1].settings
    assert written == {"solver.name": "heun", "cache.name": "x", "cache.at": (1, 2), "model.dtype": "bfloat16"}
    with pytest.raises(ValueError, match="did you mean 'fora 3'"):
        chosen(["forra 3"], parse_value)


def test_solvers_are_compared_at_equal_evaluations():
    run = difax.load("fmnist_dit", weights="random")
    for name, steps in {"heun, 10 evaluations": 5, "euler, 10 evaluations": 10, "heun, 15 evaluations": 8}.items():
        found = with_steps(run, SOLVER_METHODS[name])
        assert found.settings["steps"] == steps and found.family == "solver"
    few = Method("solver", {"grid.name": "leading"}, evaluations=4)
    assert with_steps(run, few).settings["steps"] == 4  # which says why it is refused, as any other
    assert {m.evaluations for m in SOLVER_METHODS.values()} == set(BUDGETS)
    assert {*SOLVER_METHODS, "heun 8"} <= {*chosen(["solver"], parse_value)}
    assert not {*SOLVER_METHODS} & {*chosen(["all"], parse_value)}
    assert [*chosen(["euler, 8 evaluations"], parse_value)] == ["euler, 8 evaluations"]


@pytest.mark.parametrize(
    "arguments,match",
    [
        (["--methods", "nothing"], "unknown method"),
        (["--seeds", "0"], "--seeds=0; allowed: 1 or more"),
        (["--seeds", "1000000000"], "GiB are free; allowed: "),
        (["--batch", "1000000000"], "--batch=1000000000: the samples alone take"),
        (["--turns", "1000000000"], "--turns=1000000000; allowed: 1000 at most"),
        (["--seed", "-1"], "--seed=-1; allowed: 0 ... 4294967295"),
        (["--search", "--speedup", "nan"], "--speedup=nan; allowed: above 0"),
        (["--search", "--floor", "inf"], "--floor=inf; allowed: a finite number"),
        (["--budget", "nan"], "--budget=nan; allowed: above 0"),
        (["--out", ""], "--out is empty"),
        (["--out", "x" * 300], "a name of 300 bytes; allowed: up to 255"),
        (["--out", __file__], "is no folder"),
        (["--budget", "-1"], "--budget=-1.0; allowed: above 0"),
        (["--quality", "pnsr"], "did you mean psnr"),
        (["--figure", "elsewhere/a.png"], "the folder elsewhere does not exist"),
        (["--methods", "stepz=3", "--no-judge"], "config section"),
        (["--methods", "cache.name=fora,cache.intervl=3"], "--methods cache.name=fora,cache.intervl=3: unknown key"),
        (["--methods", "cache.name=fora,cache.interval=0"], "interval=0"),
        (["--methods", "steps=0"], "--methods steps=0: "),
        (["--methods", "steps="], "'steps='; allowed: KEY=VALUE"),
        (["--methods", "steps=2,steps=3"], "steps is set twice"),
        (["--methods", "model.size=14"], "--methods model.size=14: "),
        (["--quality", "lpips"], "--network lpips=FILE"),
        (["--quality", "agreement", "--no-judge"], "--judge NAME"),
        (["--quality", "fid", "--no-judge"], "--network inception=FILE"),
        (["--cache", "fora"], "fora among --methods"),
        (["--labels", "77"], "label 77; allowed: 0 ... 9"),
        (["--cond", "a.safetensors"], "takes labels"),
        (["--config", "wan_tiny", "--labels", "1"], "takes no labels"),
        (["--config", "wan_tiny", "--quality", "agreement"], "it needs a judge"),
        (["--random-init", "--weights", "w"], "exclude each other"),
    ],
)
def test_mistakes_are_one_line_and_make_no_folder(arguments, match, tmp_path, capsys):
    assert main(["pareto", "--out", str(tmp_path / "p"), *arguments, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert match in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_pictures_may_lie_where_the_sweep_makes_folders(tmp_path):
    out = tmp_path / "runs" / "pareto"
    for picture in (tmp_path / "runs" / "a.png", out / "a.png", tmp_path / "a.png"):
        assert writable(str(picture), (".png",), "--figure", made=str(out)) == picture
    with pytest.raises(ValueError, match="does not exist"):
        writable(str(out / "more" / "a.png"), (".png",), "--figure", made=str(out))


def embeddings(model, n=2):
    """Conditions of a model that takes embeddings, as `--cond` reads them."""
    return flatten_dict(random_conditions(model, n, seed=3), sep="/")


MODELS = {  # configuration: the smallest of its kind
    "wan_tiny": {"depth": 1, "size": (3, 4, 6)},
    "flux_tiny": {"double_depth": 1, "single_depth": 1, "size": 4},
    "pixart_tiny": {"depth": 1, "size": 4},
    "sd3_tiny": {"depth": 2, "size": 4},
}


@pytest.mark.parametrize("config", some(MODELS, "wan_tiny"))
def test_models_that_take_embeddings_and_draw_latents_or_videos(config, tmp_path, capsys):
    """With weights and conditions from files; what a judge would say is left out by name."""
    run = difax.load(config, weights="random", model=MODELS[config])
    weights, cond, out = tmp_path / "w.safetensors", tmp_path / "c.safetensors", tmp_path / "p"
    save_safetensors(weights, randomise(run.params), {"config": run.config})
    save_file({k: np.asarray(v) for k, v in embeddings(run.setup.model).items()}, cond)
    command = ["pareto", "--weights", str(weights), "--cond", str(cond), "--solver", "euler", "--steps", "2"]
    command += ["--methods", "steps=1", "--seeds", "3", "--batch", "2", "--turns", "1", "--out", str(out)]
    assert main(command) == 0
    told = capsys.readouterr().err
    assert "takes no labels: agreement, frechet, kernel, precision, recall are left out" in told
    rows = {row["method"]: row for row in read_rows(out / "rows.jsonl")}
    found = rows["steps=1"]
    assert set(found["quality"]) >= {"psnr", "ssim", "relative_l1", "relative_l2"} and CONTROL not in rows
    assert not {"agreement", "frechet"} & set(found["quality"]) and 0 < found["quality"]["psnr"][0] < 100
    # what is compared is what sample draws, of the conditions in turn
    opened = [difax.load(weights, solver="euler", steps=n) for n in (1, 2)]
    one, two = (run.sample(str(cond), repeat=2).images[:3] for run in opened)
    np.testing.assert_allclose(found["range"], [two.min(), two.max()], rtol=1e-5)
    frames = [(a, b) for a, b in zip(one, two, strict=True)]
    if one.ndim == 5:
        assert one.shape[1] == 3
        frames = [pair for a, b in frames for pair in zip(a, b, strict=True)]
    errors = np.asarray([np.mean((a - b) ** 2, dtype=np.float64) for a, b in frames])
    wanted = 10 * np.log10((two.max() - two.min()) ** 2 / errors)
    np.testing.assert_allclose(found["quality"]["psnr"][0], wanted.mean(), rtol=1e-3)
    kept = np.load(out / "images" / f"{slug(BASELINE)}.npz")["images"]
    scaled = np.round(255 * (two[..., :3] - two.min()) / (two.max() - two.min()))
    assert kept.dtype == np.uint8 and np.abs(kept - scaled).max() <= 1
    page = (out / "report.html").read_text()
    assert "channels 1 to 3 of 4 of the latents" in page and "latents: PSNR and SSIM by the range" in page
    # the same command finds all that it has, another condition is another sweep
    assert main([*command, "--json"]) == 0 and len(json.loads(capsys.readouterr().out)) == 2
    other = {k: v if "mask" in k else np.asarray(v) + 1 for k, v in embeddings(run.setup.model).items()}
    save_file(other, cond)
    assert main(command) == 2 and "conditions: 2 of" in capsys.readouterr().err
    words = found["command"].split()[1:]
    again = _parser().parse_args(_join_overrides(words))
    assert (again.weights, again.cond, again.solver, again.steps) == (str(weights), str(cond), "euler", 2)
    assert again.run is commands.sample and again.set == ["steps=1"]


def test_a_judge_whose_data_set_is_not_there_is_left_out_by_name(small_weights, tmp_path, monkeypatch, capsys):
    def nowhere(*args):
        raise FileNotFoundError("no Fashion-MNIST here")

    monkeypatch.setattr("difax.study.judge.build_data", nowhere)
    command = ["pareto", "--weights", small_weights, "--steps", "1", "--methods", "cache.name=none", "--turns", "1"]
    command += ["--seeds", "4", "--batch", "4", "--labels", "2,5", "--out", str(tmp_path / "p")]
    assert main(command) == 0
    told = capsys.readouterr().err
    assert "needs its data set: no Fashion-MNIST here" in told and "precision, recall are left out" in told
    claim = json.loads((tmp_path / "p" / "sweep.json").read_text())
    assert claim["judged"] is False and claim["labels"] == [2, 5]
    assert main([*command, "--judge", "fmnist_cnn", "--out", str(tmp_path / "q")]) == 2
    assert "no Fashion-MNIST here" in capsys.readouterr().err and not (tmp_path / "q").exists()


def test_random_weights_need_no_conditions(tmp_path, capsys):
    """And a method that a user wrote, which turns out not to suit the model, is said in the exit code."""
    command = ["pareto", "--config", "flux_tiny", "--random-init", "--steps", "1", "--methods", "attend.name=cudnn"]
    command += [f"--config.model.{key}={value}" for key, value in MODELS["flux_tiny"].items()]
    command += ["--seeds", "1", "--batch", "1", "--turns", "1", "--quiet", "--out", str(tmp_path / "p")]
    assert main(command) == 1
    told = capsys.readouterr()
    assert "error: attend.name=cudnn: refused: " in told.err and "| **baseline** |" in told.out
    assert json.loads((tmp_path / "p" / "sweep.json").read_text())["weights"] == "random"


@pytest.fixture
def lossy(monkeypatch):
    """Methods by the name of their cache, whose images come out broken."""
    whole, names = Timed.draw, set()

    def draw(self, index):
        samples, trace, seconds = whole(self, index)
        if self.setup.described["cache"] in names:
            samples = samples.copy()
            samples[0, 0, 0] = np.nan
        return samples, trace, seconds

    monkeypatch.setattr(Timed, "draw", draw)
    return names


def test_images_that_are_not_finite_are_marked_and_compared_with_nothing(small_weights, tmp_path, lossy, capsys):
    lossy.add("fora")
    out = tmp_path / "p"
    command = ["pareto", "--weights", small_weights, "--no-judge", "--steps", "2", "--methods", "cache.name=fora"]
    command += ["--seeds", "3", "--batch", "2", "--turns", "1", "--quiet", "--out", str(out)]
    if importlib.util.find_spec("matplotlib"):
        command += ["--figure", str(out / "a.png"), "--sheet", str(out / "b.png")]
    assert main(command) == 1
    told = capsys.readouterr()
    assert "cache.name=fora: images that are not finite" in told.err and told.err.count("\n") == 1
    rows = {row["method"]: row for row in read_rows(out / "rows.jsonl")}
    assert rows["cache.name=fora"]["not_finite"] == 2 and rows["cache.name=fora"]["quality"] == {}
    assert [r["method"] for r in frontier(list(rows.values()))] == [BASELINE]
    assert [x for x in told.out.splitlines() if "fora" in x][0].endswith("| 2 images are not finite |")
    assert '"not_finite": 2' in (out / "report.html").read_text()


def test_a_baseline_that_is_not_finite_makes_no_folder(small_weights, tmp_path, lossy, capsys):
    lossy.add("none")
    command = ["pareto", "--weights", small_weights, "--no-judge", "--steps", "1", "--methods", "steps=1"]
    assert main([*command, "--seeds", "1", "--batch", "1", "--quiet", "--out", str(tmp_path / "p")]) == 1
    assert "1 of 1 images of the baseline are not finite" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, package, extra",
    [
        (["pareto", "--figure", "a.png"], "matplotlib", "plot"),
        (["pareto", "--sheet", "a.png"], "matplotlib", "plot"),
        (["pareto", "--search", "--speedup", "2"], "optuna", "search"),
        (["pareto", "--network", "lpips=x.pt"], "torch", "features"),
        (["pareto", "--network", "clip=x"], "transformers", "features"),
        (["profile", "--figure", "a.png"], "matplotlib", "plot"),
    ],
)
def test_missing_packages_are_missed_before_anything_is_read(flags, package, extra, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("matplotlib", "optuna", "torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None if name == package else types.ModuleType(name))
    monkeypatch.setattr(difax.run, "load", lambda *a, **k: pytest.fail("something was opened"))
    assert main([*flags, "--quiet"]) == 2
    told = capsys.readouterr().err
    assert f"needs {package}, of the extra {extra}: pip install 'difax[{extra}]'" in told and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags, match",
    [
        (["--seeds", "2"], "--seeds=2: a judge compares sets of 4 images or more"),
        (["--seeds", "4", "--steps", "3"], "holds another sweep (another configuration)"),
        (["--seeds", "5"], "seeds: 4 there, 5 here"),
        (["--seeds", "4", "--batch", "3"], "batch: 4 there, 3 here"),
        (["--seeds", "4", "--labels", "1,2"], "labels: None there, [1, 2] here"),
        (["--seeds", "4", "--random-init"], "weights: fmnist_dit (embedded) there, random here"),
    ],
)
def test_another_sweep_is_refused_before_weights_or_a_judge_are_read(flags, match, tmp_path, monkeypatch, capsys):
    out = tmp_path / "p"
    if "2" not in flags[:2]:
        run = difax.load("fmnist_dit", steps=2)
        out.mkdir()
        there = described(run, run.conditions(), Options(4, 4, 1))
        (out / "sweep.json").write_text(json.dumps({**there, "judged": True}))
    monkeypatch.setattr(difax.checkpoints, "load_native", lambda *a, **k: pytest.fail("weights were read"))
    monkeypatch.setattr("difax.study.judge.make_judge", lambda *a, **k: pytest.fail("a judge was made"))
    flags = flags if "--batch" in flags else [*flags, "--batch", "4"]
    flags = flags if "--steps" in flags else [*flags, "--steps", "2"]
    assert main(["pareto", *flags, "--out", str(out), "--quiet"]) == 2
    told = capsys.readouterr().err
    assert match in told and told.count("\n") == 1
    assert [p.name for p in out.iterdir()] == ["sweep.json"] if out.exists() else "2" in flags


def test_rows_without_what_they_are_of_are_refused(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("")
    assert main(["pareto", "--methods", "fora", "--no-judge", "--seeds", "4", "--out", str(tmp_path), "--quiet"]) == 2
    assert "has rows.jsonl without the sweep.json that says what they are of" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.slow
def test_a_killed_sweep_continues(tmp_path):
    command = [
        sys.executable,
        "-m",
        "difax",
        "pareto",
        "--methods",
        "steps=2",
        "fora 2",
        "--no-judge",
        "--set",
        "steps=3",
    ]
    command += ["--seeds", "2", "--batch", "2", "--turns", "1", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    path = tmp_path / "rows.jsonl"
    while not path.exists() or "steps=2" not in path.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_text()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert path.read_text().startswith(before.rsplit("\n", 1)[0])
    assert [r["method"] for r in read_rows(path)] == [BASELINE, "steps=2", "fora 2"]
    assert "steps=2" not in done.stderr and "fora 2" in done.stdout


def test_equal_texts_of_other_plans_are_compiled_apart(sweep, tmp_path):
    """These two are the same program with other numbers, under other names."""
    names = ["cache.name=taylorseer,cache.interval=3,cache.order=1", "cache.name=ab_cache"]
    rows = sweep(tmp_path, steps=8, options=Options(1, 1, 1)).measure(chosen(names, parse_value))
    assert ["speed" in row for row in rows] == [True] * 3
