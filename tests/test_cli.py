"""The command line: what it does, and that every mistake is one line on stderr, exit code 2 and nothing written."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import difax
import difax.build
from difax.build import build_setup
from difax.cli import main
from difax.config import config_names, gin_settings, load_config, override
from difax.models.dit import dit
from difax.registry import REGISTRIES
from difax.run import parse_labels
from difax.weights.checkpoint import save_safetensors
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
    "solver": (["sample", "--solver", "dpmpp"], ["'dpmpp'", "did you mean dpmpp_2m?", "euler, heun"]),
    "grid": (["sample", "--grid", "karas"], ["'karas'", "did you mean karras?", "log_snr"]),
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
    "out suffix": (["sample", "--out", "a.jpg"], ["a.jpg", ".png"]),
    "out folder": (["sample", "--out", "none/a.png"], ["none", "does not exist"]),
    "seed": (["sample", "--seed", "-1"], ["--seed=-1"]),
    "repeat": (["sample", "--repeat", "0"], ["--repeat=0"]),
    "flag": (["sample", "--sovler", "ddim"], ["--sovler"]),
    "command": (["smaple"], ["smaple", "sample"]),
    "list": (["list", "solver"], ["'solver'", "did you mean solvers?"]),
    "gin file": (["sample", "--gin_file", "no.gin"], ["no.gin", "no such file"]),
    "gin section": (["sample", "--gin_param", "sovler.name = 'ddim'"], ["sovler"]),
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
    monkeypatch.setattr(difax.build, "load_native", lambda *a: pytest.fail("read"))
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
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, name",
    [(kind, name) for kind in ("solver", "grid", "guide", "cache", "attend", "quant") for name in REGISTRIES[kind]],
)
def test_every_name_of_the_lists_runs(here, capsys, kind, name):
    more = PARTNERS.get((kind, name), [])
    if more is None:
        pytest.skip("needs a GPU")
    np.savez(here / "router.npz", blocks=np.linspace(-5, 5, 3 * 3 * 2).reshape(3, 3, 2))  # of three layers
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
