"""The command line: what it does, and that every mistake is one line on stderr, exit code 2 and nothing written."""

import errno
import gzip
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import difax
import difax.checkpoints
from difax import commands
from difax.build import build_setup
from difax.cli import main
from difax.config import config_names, gin_settings, load_config, override
from difax.models.dit import dit
from difax.registry import REGISTRIES
from difax.run import parse_labels
from difax.weights.checkpoint import save_safetensors
from tests.families import some
from tests.toys import randomise

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = ["--config", "fmnist_smoke", "--config.steps=3", "--random-init", "--labels", "1,bag", "--no-compile-cache"]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# what is asked -> what the one line must name
REFUSALS = {
    "solver": (["sample", "--solver", "dpmpp"], ["'dpmpp'", "did you mean dpmpp_", "euler, heun"]),
    "grid": (["sample", "--grid", "karas"], ["'karas'", "did you mean karras?", "log_snr"]),
    "scheduler": (["sample", "--scheduler", "none.json"], ["'none.json'", "no such file", "scheduler_config.json"]),
    "guide": (["sample", "--guide", "cgf"], ["'cgf'", "interval"]),
    "cache": (["sample", "--cache", "foraa"], ["'foraa'", "did you mean fora?"]),
    "quant": (["sample", "--quant", "int8_w8"], ["'int8_w8'", "did you mean int8_w8a8?"]),
    "key of a quantisation": (["sample", "--quant", "int8_w8a8", "--config.quant.grup=8"], ["'grup'", "group"]),
    "group": (["sample", "--quant", "int8_w8a8", "--config.quant.group=0"], ["/kernel", "group=0", "number of inputs"]),
    "rank": (["sample", "--quant", "svdquant_w4a8", "--config.quant.rank=999"], ["/kernel", "rank=999", "0 ... 192"]),
    "layers": (["sample", "--quant", "fp8", "--config.quant.layers=^block/"], ["'^block/'", "blocks/qkv/kernel"]),
    "attention": (["sample", "--attend", "chunkd"], ["'chunkd'", "did you mean chunked?"]),
    "attention in a list": (["sample", "--attend", "cudnn,xl"], ["'xl'", "did you mean xla?"]),
    "attention that cannot": (["sample", "--attend", "cudnn"], ["no attention takes this call", "cudnn: float32"]),
    "layout": (["sample", "--layout", "unstaked"], ["'unstaked'", "did you mean unstacked?"]),
    "embeddings for labels": (["sample", "--cond", "x.safetensors"], ["--cond x.safetensors", "takes labels"]),
    "labels for embeddings": (["sample", "--config", "flux_tiny", "--labels", "1"], ["takes no labels", "--cond"]),
    "config": (["sample", "--config", "fmnist_dti"], ["'fmnist_dti'", "did you mean fmnist_dit?"]),
    "config file": (["sample", "--config", "nowhere/x.py"], ["nowhere/x.py", "no such file"]),
    "config argument": (["sample", "--config", "fmnist_smoke:sde"], ["fmnist_smoke:sde", "flow, ddpm"]),
    "section": (["sample", "--config.sovler.eta=1"], ["'sovler'", "did you mean solver?"]),
    "key of a solver": (["sample", "--solver", "ddim", "--config.solver.etaa=1"], ["'etaa'", "did you mean eta?"]),
    "value of a solver": (["sample", "--solver", "ddim", "--config.solver.eta=2"], ["eta=2", "0 ... 1"]),
    "type of a value": (["sample", "--config.steps=many"], ["steps='many'", "int"]),
    "no value": (["sample", "--config.steps"], ["--config.steps", "missing"]),
    "label": (["sample", "--labels", "3,10"], ["label 10", "0 ... 9"]),
    "negative label": (["sample", "--labels=-1"], ["label -1", "0 ... 9"]),
    "class name": (["sample", "--labels", "sneakers"], ["'sneakers'", "did you mean sneaker?"]),
    "steps": (["sample", "--steps", "0"], ["steps=0", "1 or more"]),
    "steps of a discrete process": (
        ["sample", "--config", "fmnist_smoke:ddpm", "--steps", "1001", "--random-init"],
        ["steps=1001", "1 ... 1000"],
    ),
    "grid for the process": (["sample", "--grid", "leading"], ["leading", "flow is continuous"]),
    "grid for the solver": (
        ["sample", "--solver", "heun", "--config.solver.space=sigma"],
        ["space 'sigma'", "alpha", "karras or log_snr"],
    ),
    "grid for the prediction": (["sample", "--config.prediction=eps"], ["alpha = 0", "log_snr"]),
    "learned variance": (["sample", "--solver", "ddpm", "--config.solver.variance=learned"], ["learn_sigma"]),
    "no weights": (["sample", "--config", "fmnist_smoke"], ["--weights", "--random-init"]),
    "weights file": (["sample", "--weights", "nothing.safetensors"], ["nothing.safetensors"]),
    "both weights": (["sample", "--weights", "a.safetensors", "--random-init"], ["exclude"]),
    "empty out": (["sample", "--out", ""], ["--out is empty"]),
    "empty workdir": (["train", "--config", "fmnist_smoke", "--workdir", ""], ["--workdir is empty"]),
    "empty log": (["pareto", "--log="], ["--log is empty"]),
    "empty source": (["convert", "", "dst"], ["source is empty"]),
    "empty config": (["calibrate", "--config", "", "--out", "x.json"], ["--config is empty"]),
    "out suffix": (["sample", "--out", "a.bmp"], ["a.bmp", ".png"]),
    "out folder": (["sample", "--out", "none/a.png"], ["none", "does not exist"]),
    "one file for two": (["sample", "--out", "a.npz", "--trace", "./a.npz"], ["--trace ./a.npz", "--out is written"]),
    "repeat before weights": (["sample", "--weights", "none.safetensors", "--repeat", "0"], ["--repeat=0"]),
    "seeds before weights": (["pareto", "--weights", "none.safetensors", "--seeds", "0"], ["--seeds=0"]),
    "turns before weights": (["profile", "--weights", "none.safetensors", "--turns", "0"], ["--turns=0"]),
    "rank before weights": (
        ["calibrate", "--random-init", "--cache", "icc", "--rank", "0", "--out", "x.npz"],
        ["--rank=0"],
    ),
    "seed": (["sample", "--seed", "-1"], ["--seed=-1"]),
    "repeat": (["sample", "--repeat", "0"], ["--repeat=0"]),
    "flag": (["sample", "--sovler", "ddim"], ["--sovler"]),
    "command": (["smaple"], ["smaple", "sample"]),
    "list": (["list", "solver"], ["'solver'", "did you mean solvers?"]),
    "gin file": (["sample", "--gin_file", "no.gin"], ["no.gin", "no such file"]),
    "gin section": (["sample", "--gin_param", "sovler.name = 'ddim'"], ["sovler"]),
    "gin without a section": (["sample", "--gin_param", "steps = 3"], ["'steps = 3'", "config.steps = VALUE"]),
    "gin scope": (["sample", "--gin_param", "a/solver.name = 'ddim'"], ["scope 'a'", "SECTION.KEY = VALUE"]),
    "gin syntax": (["sample", "--gin_param", "solver.name = "], ["gin"]),
    "train without config": (["train", "--workdir", "w"], ["--config"]),
    "data": (
        ["train", "--config", "fmnist_smoke", "--workdir", "w", "--data", "none"],
        ["apt-get install dataset-fashion-mnist", "git clone", "torchvision"],
    ),
    "train key": (["train", "--config", "fmnist_smoke", "--workdir", "w", "--config.train.step=3"], ["mean steps?"]),
    "train value": (["train", "--config", "fmnist_smoke", "--workdir", "w", "--config.train.ema=1.0"], ["ema=1.0"]),
    "export": (["export", "--workdir", "none", "--out", "x.safetensors"], ["none", "no training run"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name, here, capsys):
    arguments, wanted = REFUSALS[name]
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("difax: error: ") and err.count("\n") == 1, err
    for word in wanted:
        assert word in err, err
    assert list(here.iterdir()) == []


class JaxRuntimeError(RuntimeError):
    """As jax names what XLA raises."""


# what a command raises -> the exit code, and what the one line must name
ERRORS = {
    "mistake": (ValueError("steps=0; allowed: 1 or more"), 2, ["steps=0"]),
    "permission": (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, ["a/b: Permission denied"]),
    "existing file": (FileExistsError(errno.EEXIST, "File exists", "a/b"), 2, ["a/b: File exists"]),
    "no folder": (FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"), 2, ["a/b: No such file"]),
    "a file for a folder": (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), 2, ["a/b: Not a directory"]),
    "a folder for a file": (IsADirectoryError(errno.EISDIR, "Is a directory", b"a/b"), 2, ["a/b: Is a directory"]),
    "name too long": (OSError(errno.ENAMETOOLONG, "File name too long", "a/b"), 2, ["a/b: File name too long"]),
    "full disk": (OSError(errno.ENOSPC, "No space left on device", "a/b"), 1, ["a/b: No space left on device"]),
    "full disk without a name": (OSError(errno.ENOSPC, "No space left on device"), 1, ["No space left", "in difax."]),
    "input and output": (OSError(errno.EIO, "Input/output error", "a/b"), 1, ["a/b: Input/output error"]),
    "gzip": (gzip.BadGzipFile("Not a gzipped file (b'ab')"), 2, ["Not a gzipped file"]),
    "zip": (zipfile.BadZipFile("File is not a zip file"), 2, ["damaged", "File is not a zip file"]),
    "end of file": (EOFError("No data left in file"), 2, ["damaged", "No data left in file"]),
    "deep": (RecursionError("maximum recursion depth exceeded"), 2, ["nested too deeply"]),
    "key": (KeyError("model"), 2, ["the key 'model' is missing"]),
    "letters": (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2, ["not text in UTF-8"]),
    "memory": (MemoryError("Unable to allocate 8.00 TiB"), 1, ["out of memory", "8.00 TiB"]),
    "memory of a device": (JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 1, ["out of memory", "RESOURCE"]),
    "XLA": (JaxRuntimeError("INTERNAL: no\nkernel"), 1, ["INTERNAL: no kernel"]),
    "no device": (RuntimeError("Unable to initialize backend 'x': none"), 2, ["no such device", "backend 'x'"]),
    "not a number": (FloatingPointError("loss is nan at step 3"), 1, ["loss is nan at step 3"]),
    "package": (ModuleNotFoundError("No module named 'torch'", name="torch"), 1, ["package is missing", "'torch'"]),
    "interrupted": (KeyboardInterrupt(), 130, ["interrupted"]),
    "cannot": (NotImplementedError("no attention takes this call"), 2, ["no attention takes this call"]),
}
BUGS = {
    "type": TypeError("unsupported operand\ntype(s)"),
    "attribute": AttributeError("'NoneType' object has no attribute 'x'"),
    "exit": SystemExit("in the middle"),
    "assertion": AssertionError(),
    "module of its own": ModuleNotFoundError("No module named 'difax.x'", name="difax.x"),
}


def raises(monkeypatch, error: BaseException) -> None:
    def raising(options):
        raise error

    monkeypatch.setattr(commands, "list_names", raising)


@pytest.mark.parametrize("name", ERRORS)
def test_an_expected_error_is_one_line(name, here, capsys, monkeypatch):
    error, wanted, words = ERRORS[name]
    raises(monkeypatch, error)
    code, out, err = run(capsys, "list")
    assert (code, out) == (wanted, "")
    assert err.startswith("difax: error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", BUGS)
def test_what_nobody_foresaw_leaves_its_traceback(name, here, capsys, monkeypatch):
    raises(monkeypatch, BUGS[name])
    monkeypatch.setattr(tempfile, "tempdir", str(here))
    code, out, err = run(capsys, "list")
    assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith("difax: error: ")
    (path,) = here.iterdir()
    assert err.endswith(f"the traceback is in {path}\n")
    assert "in raising" in path.read_text() and type(BUGS[name]).__name__ in path.read_text()


@pytest.mark.parametrize("arguments", [["--traceback", "list"], ["list", "--traceback"]])
def test_traceback_is_shown_instead(arguments, here, capsys, monkeypatch):
    for error in (TypeError("odd"), ValueError("asked")):
        raises(monkeypatch, error)
        monkeypatch.setattr(tempfile, "tempdir", str(here))
        code, _, err = run(capsys, *arguments)
        assert code == (1 if isinstance(error, TypeError) else 2)
        assert "in raising" in err and err.splitlines()[-1].startswith("difax: error: ")
    assert list(here.iterdir()) == []


def test_the_traceback_lies_beside_the_log_and_may_fail(here, capsys, monkeypatch):
    def raising(options):
        raise TypeError("odd")

    monkeypatch.setattr(commands, "profile", raising)
    (here / "logs").mkdir()
    code, _, err = run(capsys, "profile", "--log", "logs/a.jsonl")
    (path,) = (here / "logs").iterdir()
    assert code == 1 and str(path) in err
    monkeypatch.setattr(tempfile, "tempdir", str(here / "none"))
    code, _, err = run(capsys, "profile", "--log", "none/a.jsonl")
    assert code == 1 and err.count("\n") == 1 and "TypeError: odd" in err and "traceback is in" not in err


def test_version_and_help(capsys):
    assert run(capsys, "--version") == (0, f"difax {difax.__version__}\n", "")
    for command in ("sample", "train", "export", "calibrate", "pareto", "profile", "plan", "convert", "list"):
        code, out, err = run(capsys, command, "--help")
        assert (code, err) == (0, "") and f"usage: difax {command}" in out and "--traceback" in out
    code, out, err = run(capsys)
    assert (code, out, err.count("\n")) == (2, "", 1) and "COMMAND" in err


class Broken(io.StringIO):
    """A stream that cannot be written, as soon as it is written or when it is flushed."""

    def __init__(self, number: int, late: bool):
        super().__init__()
        self.number, self.late = number, late

    def write(self, text):
        if self.late:
            return len(text)
        raise OSError(self.number, os.strerror(self.number))

    def flush(self):
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("number, code", [(errno.EPIPE, 0), (errno.ENOSPC, 1)])
def test_a_stdout_that_cannot_be_written(number, code, late, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken(number, late))
    assert main(["list", "solvers"]) == code
    said = "" if code == 0 else "difax: error: cannot write to stdout: No space left on device\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("stream", [None, Broken(errno.ENOSPC, False), Broken(errno.EPIPE, True)])
def test_a_stderr_that_cannot_be_written_changes_no_exit_code(stream, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    assert main(["list", "solver"]) == 2


def test_a_stdout_that_is_closed_or_knows_few_letters(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["list", "solvers"]) == 0
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(commands, "list_names", lambda options: print("a \u2192 b") or 0)
    assert main(["list"]) == 0 and raw.getvalue() == b"a \\u2192 b\n"


STREAMS = {
    "full": ("list solvers >/dev/full", 1, "difax: error: cannot write to stdout: No space left on device\n"),
    "closed": ("list solvers >&-", 0, ""),
    "all closed": ("list solvers >&- 2>&- <&-", 0, ""),
    "no stderr": ("list solver 2>/dev/full", 2, ""),
    "help": ("--help >/dev/full", 1, "difax: error: cannot write to stdout: No space left on device\n"),
    "XLA_FLAGS": ("sample", 2, "difax: error: XLA_FLAGS=--xla_nope=1: Unknown flag in XLA_FLAGS: --xla_nope=1\n"),
}


@pytest.mark.parametrize("name", some(STREAMS, "full", "XLA_FLAGS"))
def test_a_process_and_its_shell(name, tmp_path, user_env):
    command, code, said = STREAMS[name]
    env = user_env | ({"XLA_FLAGS": "--xla_nope=1"} if name == "XLA_FLAGS" else {})
    shell = f"{sys.executable} -m difax {command}"
    done = subprocess.run(shell, shell=True, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", some(["cuda", "nonsense", "tpu,nonsense"], "cuda"))
def test_a_platform_that_is_not_there(name, tmp_path, user_env):
    done = subprocess.run(
        [sys.executable, "-m", "difax", "sample"],
        env=user_env | {"JAX_PLATFORMS": name},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    if done.returncode == 0 and name == "cuda":
        pytest.skip("this machine has one")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"JAX_PLATFORMS={name}: no such device here" in done.stderr


def _native(path, width=64):
    model = dit(depth=3, width=width, heads=2, patch=4, size=28, channels=1, classes=10, learn_sigma=False)
    save_safetensors(path, randomise(jax.eval_shape(model.init, jax.random.key(0))), {"step": 0})


CHECKPOINTS = {
    "truncated": (lambda p: (_native(p), p.write_bytes(p.read_bytes()[:5000])), ["truncated"]),
    "foreign": (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(100)), ["safetensors"]),
    "wrong shape": (lambda p: _native(p, 32), ["blocks/ada/bias", "(3, 192)", "(3, 384)"]),
    "another project's": (
        lambda p: __import__("safetensors.numpy").numpy.save_file({"conv1.weight": np.zeros((3, 3))}, p),
        ["conv1.weight"],
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_refusal(name, here, capsys):
    make, wanted = CHECKPOINTS[name]
    make(here / "w.safetensors")
    code, out, err = run(capsys, "sample", "--config", "fmnist_smoke", "--weights", "w.safetensors")
    assert code == 2 and out == "" and err.count("\n") == 1, err
    for word in ["w.safetensors", *wanted]:
        assert word in err, err
    assert [p.name for p in here.iterdir()] == ["w.safetensors"]


def test_unwritable_output_folder(here, capsys, monkeypatch):
    import os

    monkeypatch.setattr(os, "access", lambda path, mode: False)
    code, _, err = run(capsys, "sample", "--out", "a.png")
    assert code == 2 and "not writable" in err


def test_sample_json_is_reproducible_and_counts(here, capsys):
    arguments = ["sample", *TINY, "--solver", "dpmpp_2m", "--steps", "4", "--seed", "3", "--json"]
    code, first, err = run(capsys, *arguments, "--out", "a.png")
    assert (code, err) == (0, "")
    code, second, _ = run(capsys, *arguments, "--out", "b.png")
    table = json.loads(second)
    assert (here / "a.png").read_bytes() == (here / "b.png").read_bytes()
    assert (table["steps"], table["evaluations"], table["network_evaluations"]) == (4, 4, 8)
    assert table["images"] == 2 and table["gflops_per_image"] > 0
    assert json.loads(first)["gflops_per_image"] == table["gflops_per_image"]
    code, third, _ = run(capsys, *arguments, "--out", "c.png", "--seed", "4")
    assert (here / "c.png").read_bytes() != (here / "a.png").read_bytes()


def test_sample_table_and_cache(here, capsys):
    code, plain, _ = run(capsys, "sample", *TINY, "--json", "--config.steps=4")
    code, cached, _ = run(capsys, "sample", *TINY, "--json", "--config.steps=4", "--cache", "fora", "--quiet")
    assert code == 0
    before, after = json.loads(plain), json.loads(cached)
    assert after["computed_fraction"] == 0.5  # evaluations 0 and 3 of 4, interval 3
    assert after["gflops_per_image"] < 0.6 * before["gflops_per_image"]
    code, table, _ = run(capsys, "sample", *TINY)
    assert code == 0
    for row in ("steps", "evaluations", "GFLOPs", "compile seconds", "seconds per image", "peak memory"):
        assert row in table


def test_sample_shows_the_metric_of_gates_of_single_blocks(here, capsys):
    model = build_setup(load_config("fmnist_smoke")).model
    save_safetensors(here / "w.safetensors", randomise(jax.eval_shape(model.init, jax.random.key(0))), {"step": 0})
    settings = ["--weights", "w.safetensors", "--cache", "dbprune", "--config.cache.warmup=1"]
    settings += ["--config.cache.threshold=1e-9", "--trace", "a.npz"]
    code, table, told = run(capsys, "sample", *[a for a in TINY if a != "--random-init"], *settings)
    assert code == 0
    (shown,) = [line for line in table.splitlines() if line.startswith("the gate's metric")]
    with np.load("a.npz") as trace:
        gate = {k: trace[f"metric/block/blocks/{k}"] for k in ("metric", "asked")}
    asked = gate["metric"][gate["asked"] > 0]
    assert asked.size and np.all(asked > 0)
    percentiles = ", ".join(f"{p} %: {np.percentile(asked.astype(np.float64), p):.3g}" for p in (5, 50, 95))
    assert shown.endswith(percentiles)
    assert f"the cache dbprune filled nothing in this run; its metric where it was asked: {percentiles}" in told


def test_sample_from_own_file(here, capsys):
    _native(here / "w.safetensors")
    code, out, err = run(capsys, "sample", *[a for a in TINY if a != "--random-init"], "--weights", "w.safetensors")
    assert code == 0, err
    assert "w.safetensors" in out


def test_list_names_everything(capsys):
    code, out, _ = run(capsys, "list")
    assert code == 0
    for word in ("dit", "ddpm", "ddim", "euler", "heun", "dpmpp_2m", "karras", "fora", "interval", *config_names()):
        assert f"  {word} " in out
    for line in out.splitlines():
        assert line.endswith(":") or len(line.split()) >= 3, line


@pytest.mark.parametrize("name", config_names())
def test_configs_build(name):
    from difax.build import build_setup, build_task

    config = load_config(name)
    if "process" in config:
        assert build_setup(config).rows.i.shape[0] >= config["steps"]
    if "train" in config:
        build_task(config)


def test_gin_says_the_same_as_overrides():
    bindings = ["config.base = 'fmnist_smoke'", "solver.name = 'ddim'", "solver.eta = 0.5", "config.scale = 3"]
    base, settings = gin_settings([str(ROOT / "configs/fmnist_smoke.gin")], bindings)
    config = override(load_config(base), settings)
    assert config["solver"] == {"name": "ddim", "eta": 0.5}
    assert (config["scale"], config["steps"], config["train"]["steps"]) == (3.0, 10, 40)


def test_another_name_drops_the_old_hyperparameters():
    config = override(load_config("dit_imagenet"), [("solver.eta", 0.3), ("solver.name", "ddim")])
    assert config["solver"] == {"name": "ddim", "eta": 0.3}


def test_embeddings_are_asked_for_before_weights_are_read(here, capsys, monkeypatch):
    model = build_setup(load_config("flux_tiny")).model
    save_safetensors("w.safetensors", jax.jit(model.init)(jax.random.key(0)), {"made": "here"})
    monkeypatch.setattr(difax.checkpoints, "load_native", lambda *a: pytest.fail("read"))
    code, out, err = run(capsys, "sample", "--config", "flux_tiny", "--weights", "w.safetensors")
    assert code == 2 and "takes embeddings; give --cond FILE.safetensors" in err and "pooled [n, 16]" in err


def test_labels():
    assert parse_labels(["2", " bag"], 10, ("hat", "bag")) == [2, 1]
    run = difax.load("fmnist_smoke", weights="random")
    assert run.conditions().tolist() == list(range(10))
    assert run.conditions("2, bag").tolist() == run.conditions([2, "bag"]).tolist() == [2, 8]


def test_scale_one_is_the_conditional_model(here, capsys):
    from PIL import Image

    pictures = []
    for extra in (["--scale", "1"], ["--guide", "none"]):
        code, _, err = run(capsys, "sample", *TINY, *extra, "--out", "a.png")
        assert code == 0, err
        pictures.append(np.asarray(Image.open("a.png"), np.int32))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert jnp.asarray(pictures[0]).std() > 1


LANGEVIN = ["--config.process.name=cld", "--config.prediction=eps", "--config.model.channels=2"]
# what only some processes, platforms or settings take
PARTNERS = {
    ("guide", "interval"): [],
    ("attend", "cudnn"): None,  # needs a GPU
    ("attend", "window"): ["--config.attend.radius=8"],
    ("grid", "leading"): ["--config", "fmnist_smoke:ddpm"],
    ("grid", "quadratic"): ["--config", "fmnist_smoke:ddpm"],
    ("solver", "ddpm"): ["--config", "fmnist_smoke:ddpm"],
    ("quant", "int4_weight"): ["--config.quant.group=8"],
    ("quant", "svdquant_w4a8"): ["--config.quant.rank=4"],
    # what a calibration, a training or a search would have found, for three evaluations
    ("cache", "scheduled"): ["--config.cache.schedule=(1,0,1)"],
    ("cache", "smoothcache"): ["--config.cache.schedule={'attn':(1,0,1)}"],
    ("cache", "magcache"): ["--config.cache.ratios=flux"],
    ("cache", "learning_to_cache"): ["--config.cache.file=router.npz"],
    ("cache", "harmonica"): ["--config.cache.file=router.npz"],
    ("cache", "block_caching"): [f"--config.cache.changes={{'attn': {[[0.3] * 3] * 3}}}"],
    ("cache", "bacache"): [
        f"--config.cache.similarities={{'attn': {[[[0.5] * 3] * 3] * 3}}}",
        "--config.cache.updates=2",
        "--config.cache.bubble=0",
    ],
    ("cache", "icc"): ["--config.cache.period=1"],
    ("cache", "tgate"): ["--config", "pixart_tiny", "--config.cache.gate=1"],
    ("cache", "skipcache"): ["--config", "skip_dit_tiny"],
    ("cache", "autodiffusion"): ["--config.cache.skip=((),(1,),())"],
    ("grid", "given"): ["--config.grid.times=(1.0,0.6,0.3,0.0)"],
    ("grid", "measured"): ["--config.grid.file=times.json"],
    ("grid", "lcm"): ["--config", "fmnist_smoke:ddpm"],
    ("grid", "diffusers"): ["--config", "fmnist_smoke:ddpm"],
    ("solver", "gotta_go_fast"): ["--grid", "log_snr", "--steps", "200"],
    ("solver", "mcg"): ["--config.solver.measurement=0.0", "--config.solver.mask=0.0"],
    ("solver", "sscs"): LANGEVIN,
    ("solver", "cld_em"): LANGEVIN,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, name",
    [
        (kind, name)
        for kind in ("solver", "grid", "guide", "cache", "attend", "quant")
        for name in REGISTRIES[kind]
        if name not in ("duodiff", "experts")  # which need weights: tests/test_augmented.py, tests/test_experts.py
    ],
)
def test_every_name_of_the_lists_runs(here, capsys, kind, name):
    more = PARTNERS.get((kind, name), [])
    if more is None:
        pytest.skip("needs a GPU")
    np.savez(here / "router.npz", blocks=np.linspace(-5, 5, 3 * 3 * 2).reshape(3, 3, 2))  # of three layers
    (here / "times.json").write_text(json.dumps({"process": "flow", "times": [1.0, 0.6, 0.3, 0.0]}))
    base = TINY
    if "--config" in more and "fmnist_smoke" not in " ".join(more):  # a model without labels, with a run of its own
        base = ["--config.steps=3", "--random-init", "--no-compile-cache"]
    code, out, err = run(capsys, "sample", *base, f"--{kind}", name, *more, "--json")
    assert code == 0, err
    assert json.loads(out)["images"] >= 1 and (here / "samples.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in config_names() if load_config(n).get("weights") == "random"])
def test_every_configuration_with_random_weights_runs(here, capsys, name):
    code, out, err = run(capsys, "sample", "--config", name, "--json", "--no-compile-cache")
    assert code == 0, err
    assert json.loads(out)["weights"] == "random"


KEPT_IN = {  # the folder of compilations, by the user's settings; "." stands for the test's folder
    "told": ({"XDG_CACHE_HOME": "."}, "./mine", "./mine"),
    "standard": ({"XDG_CACHE_HOME": ".", "HOME": "/"}, None, "./difax/xla"),
    "home": ({"HOME": "."}, None, "./.cache/difax/xla"),
    "a file": ({"XDG_CACHE_HOME": "./file"}, None, None),
    "nobody's home": ({"HOME": "~"}, None, None),
}


@pytest.mark.parametrize("name", KEPT_IN)
def test_where_compilations_are_kept(name, tmp_path, monkeypatch):
    """A folder that cannot be is none: the run does without."""
    at = lambda text: text and text.replace("./", f"{tmp_path}/") if text != "." else str(tmp_path)  # noqa: E731
    settings, told, expected = KEPT_IN[name]
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for key, value in settings.items():
        monkeypatch.setenv(key, at(value))
    keys = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {key: jax.config.values[key] for key in keys}
    try:
        jax.config.update("jax_compilation_cache_dir", at(told))
        commands._keep_compilations()
        assert jax.config.values[keys[0]] == at(expected)
    finally:
        for key, value in before.items():
            jax.config.update(key, value)
