"""Techniques from outside of difax: CONTRIBUTING's own page runs, names of every kind load code, data never does."""

import json
import pathlib
import re
import shlex

import jax
import numpy as np
import pytest

import difax
from difax.accel.caches.planned import every, everywhere, planned
from difax.cli import main
from difax.config import gin_settings, keyword_settings, load_config, override
from difax.registry import REGISTRIES, make
from difax.study.pareto_report import write_report
from difax.training.train import read_run
from difax.weights.checkpoint import save_safetensors

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text().split("## A technique that lives elsewhere")[1].split("\n## ")[0]
TINY = {"steps": 4, "weights": "random", "model": {"depth": 2, "width": 32}}

OUTSIDE = """
import pathlib
pathlib.Path(__file__).with_suffix(".ran").write_text("ran")
import numpy as np
import difax
from difax.accel.attention import ATTENTIONS
from difax.accel.caches import CACHES
from difax.accel.solvers import SOLVERS
from difax.core.grids import GRIDS
from difax.core.guidance import GUIDES
from difax.core.process import PROCESSES
from difax.models import MODELS
from difax.training.losses import LOSSES


def solver():
    return SOLVERS["ddim"](eta=0.0)

def grid():
    return GRIDS["uniform"]()

def guide():
    return GUIDES["cfg"]()

def cache(interval: int = 2):
    return CACHES["fora"](interval=interval)

def attend():
    return ATTENTIONS["chunked"]()

def quant(model):
    return []

def model(**geometry):
    return MODELS["dit"](**geometry)

def process():
    return PROCESSES["flow"]()

def loss(model, process, prediction):
    return LOSSES["flow"](model, process, prediction)

def data(split: str = "train"):
    return difax.Images(np.full((16, 28, 28, 1), 99, np.uint8), np.zeros(16, np.int32))

def number():
    return 3

def broken():
    raise ValueError("broken: interval=0; allowed: 1 or more")

def failing():
    raise KeyError("of its own")

def leaving():
    raise SystemExit(0)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "that").mkdir()
    (tmp_path / "that" / "file.py").write_text(OUTSIDE)
    return tmp_path


@pytest.mark.slow
def test_the_page_of_contributing_runs(tmp_path, monkeypatch, capsys):
    """The page's cache, under the name that the page gives it, in a folder outside of the repository, by the page's
    own commands: sampled with and measured beside a built-in one."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert 15 <= len(code.strip().splitlines()) <= 25
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "middle.py").write_text(code)
    commands = re.findall(r"^difax .*$", PAGE, re.MULTILINE)
    assert [c.split()[1] for c in commands] == ["sample", "pareto"]
    sample, pareto = (shlex.split(c)[1:] for c in commands)
    assert main([*sample, "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["cache"] == "mine/middle.py:middle" and table["decisions"][0] == "FFF.F.F.F.FF"
    assert main([*pareto, "--json", "--quiet"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    own = [row for name, row in rows.items() if "middle" in name]
    assert len(own) == 1 and "fora" in rows
    for row in own:
        assert 1.2 < row["cost"]["ratio"] < 2 and row["quality"]["psnr"][0] > 20 and "refused" not in row
    assert "mine/middle.py:middle" in (tmp_path / "pareto" / "report.html").read_text()


@pytest.mark.parametrize("kind", [*REGISTRIES])
def test_every_kind_of_name_may_be_a_file_or_a_module(kind, here, monkeypatch):
    arguments = {"quant": [None], "loss": [difax.load("fmnist_smoke", **TINY).setup.model]}.get(kind, [])
    if kind == "loss":
        arguments += [make("process", {"name": "flow"}), "velocity"]
    geometry = {"depth": 2, "width": 32, "heads": 2, "patch": 4} if kind == "model" else {}
    more = {"split": "train"} if kind == "data" else {}
    monkeypatch.syspath_prepend(str(here / "that"))
    (here / "that" / "difax_test_module.py").write_text(OUTSIDE)
    of_file, of_module = (
        make(kind, {"name": f"{where}:{kind}", **geometry}, *arguments, **more)
        for where in ("that/file.py", "difax_test_module")
    )
    assert type(of_file) is type(of_module)
    with pytest.raises(ValueError, match=f"{kind} that/file.py:{kind}x|function of that/file.py '{kind}x'"):
        make(kind, {"name": f"that/file.py:{kind}x"}, *arguments, **more)


def test_names_compose_with_those_inside(here):
    """Along with entries of the registry, with hyperparameters of their own."""
    run = difax.load(
        "fmnist_smoke",
        **{**TINY, "steps": 6},
        cache={"name": "teacache+that/file.py:cache", "that/file.py:cache.interval": 3, "teacache.threshold": 0.0},
        attend="that/file.py:attend,xla",
        solver="that/file.py:solver",
    )
    assert run.setup.accelerator.name == "teacache+fora"
    assert run.sample([1]).cost["decisions"][0] == "F..F.."


def test_configs_and_gin_take_them(here):
    (here / "mine.py").write_text(
        "from difax.configs.fmnist_smoke import get_config as smoke\n"
        "def get_config():\n"
        "    config = smoke()\n"
        "    config.weights, config.cache = 'random', {'name': 'that/file.py:cache', 'interval': 5}\n"
        "    return config\n"
    )
    assert difax.load("mine.py").sample([0]).cost["decisions"][0] == "F....F...."
    _, settings = gin_settings([], ["cache.name = 'that/file.py:cache'", "cache.interval = 4", "config.steps = 4"])
    config = override(load_config("fmnist_smoke"), settings)
    assert difax.load(config, weights="random").sample([0]).cost["decisions"][0] == "F..."


def test_what_a_factory_made_and_the_factory_itself():
    def mine(interval=2):
        return planned("mine", lambda rows, stages: everywhere(every(interval, rows), stages))

    run = difax.load("fmnist_smoke", **TINY, cache=mine(4))
    assert run.sample([3]).table["cache"] == "mine" and run.sample([3]).cost["decisions"][0] == "F..."
    other = run.replace(cache={"name": mine, "interval": 3})
    assert other.sample([3]).cost["decisions"][0] == "F..F"
    with pytest.raises(ValueError, match="cache mine is made already; allowed: no keys, not interval"):
        run.replace(cache={"name": mine(4), "interval": 3})
    with pytest.raises(ValueError, match=r"key of cache mine 'intervall' \(did you mean interval\?\)"):
        run.replace(cache={"name": mine, "intervall": 3})


# what is asked -> what the one line must name
REFUSALS = {
    "no file": ("nowhere/file.py:cache", "no such file: nowhere/file.py"),
    "a name of 300 letters": (f"{'n' * 300}.py:cache", "cannot be read"),
    "bytes that are no text": ("\udcff/file.py:cache", "no such file"),
    "a zero byte": ("a\0.py:cache", "cannot be read"),
    "no function": ("that/file.py:cach", "unknown function of that/file.py 'cach' (did you mean cache?)"),
    "no module": ("difax_no_such_module:cache", "ModuleNotFoundError"),
    "no name": ("that/file.py:", "allowed: package.module:factory or path/to/file.py:factory"),
    "code that fails": ("that/syntax.py:cache", "SyntaxError"),
    "no accelerator": ("that/file.py:number", "made an int; allowed: a Accelerator"),
    "a refusal of its own": ("that/file.py:broken", "broken: interval=0; allowed: 1 or more"),
    "a failure of its own": ("that/file.py:failing", "cache that/file.py:failing: KeyError: 'of its own'"),
    "an exit of its own": ("that/file.py:leaving", "cache that/file.py:leaving: SystemExit: 0"),
    "twice": ("that/file.py:cache+that/file.py:cache", "named twice"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_mistake_is_one_line(name, here, capsys):
    (here / "that" / "syntax.py").write_text("def cache(:\n")
    given, wanted = REFUSALS[name]
    code = main(["sample", "--config", "fmnist_smoke", "--random-init", "--cache", given])
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and wanted in err, err
    assert not (here / "samples.png").exists()


def ran(here) -> bool:
    return (here / "that" / "file.ran").exists()


NAMED = {"model": "that/file.py:model", "cache": "that/file.py:cache", "solver": "that/file.py:solver"}


@pytest.mark.parametrize("section", NAMED)
def test_a_checkpoint_loads_no_code(section, here):
    """Neither the configuration in the folder of a run nor that inside of a file of weights; the same name written by
    the user does."""
    config = override(load_config("fmnist_smoke"), keyword_settings({k: v for k, v in TINY.items() if k != "weights"}))
    poisoned = {**config, section: {**config[section], "name": NAMED[section]}}
    if section != "model":
        poisoned[section] = {"name": NAMED[section]}
    model = difax.load(config, weights="random")
    save_safetensors("w.safetensors", model.params, {"config": poisoned})
    (here / "run" / "checkpoints").mkdir(parents=True)
    (here / "run" / "config.json").write_text(json.dumps(poisoned))
    for where in ("w.safetensors", "run"):
        with pytest.raises(ValueError, match="comes from a file of data, for which no code is loaded"):
            difax.load(where)
    assert main(["sample", "--weights", "w.safetensors"]) == 2
    assert main(["export", "--workdir", "run", "--out", "e.safetensors"]) == 2
    assert not ran(here)
    difax.load("w.safetensors", **{section: {"name": NAMED[section]}}).sample([1])
    assert ran(here)


def test_calibrations_and_sweeps_load_no_code(here, capsys):
    name = "that/file.py:cache"
    for technique in (name, "smoothcache"):
        content = {"technique": technique, "model": name, "solver": name, "steps": 10, "kmax": 1, "errors": {}}
        (here / "c.json").write_text(json.dumps(content))
        assert main(["sample", "--cache", "smoothcache", "--config.cache.file=c.json", "--config.cache.alpha=0.1"]) == 2
    capsys.readouterr()
    (here / "sweep").mkdir()
    images = np.zeros((1, 4, 4, 1), np.uint8)
    quality = {"psnr": [30.0, 29.0, 31.0]}
    row = {"method": "baseline", "family": "baseline", "settings": {"cache.name": name}, "calibrated": None}
    row |= {"command": f"difax sample --cache {name}", "config": {"cache": {"name": name}}, "quality": quality}
    row |= {"cost": {"gflops_per_image": 1.0, "ratio": 1.0}, "evaluations": 4, "date": "2026-01-01 00:00 UTC"}
    row |= {"speed": {"seconds_per_image": 1.0, "ratio": 1.0, "turns": [1.0], "realised": 1.0}, "decisions": {}}
    (here / "sweep" / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (here / "sweep" / "sweep.json").write_text(json.dumps({"config": {"cache": {"name": name}}, "seeds": 1}))
    (here / "sweep" / "images").mkdir()
    del images
    write_report(here / "sweep")
    with pytest.raises(ValueError, match="holds another sweep"):
        difax.study.pareto.Sweep("x", difax.load("fmnist_dit"), difax.study.pareto.Options(1, 1, 1), here / "sweep")
    assert not ran(here)


def test_names_out_of_data_are_texts_like_any_other(here):
    (here / "run").mkdir()
    (here / "run" / "config.json").write_text(json.dumps(load_config("fmnist_smoke")))
    config = read_run("run")
    assert json.loads(json.dumps(config)) == json.loads(json.dumps(load_config("fmnist_smoke")))
    run = difax.load({**config, "weights": "random"}, steps=2)
    assert jax.tree.leaves(run.params) and run.setup.described["solver"] == "euler"
