"""The parts of a step: they are all there, and their operations are those of the whole."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import save_file

import difax
from difax.cli import main
from difax.study import profile
from difax.study.profile import Part, Profile, draw_profile, format_profile
from difax.weights.checkpoint import save_safetensors
from difax.weights.conditions import random_conditions
from tests.toys import randomise

CEILING = profile.ceiling
TINY = ["--random-init", "--steps", "2", "--turns", "1"]


@pytest.fixture(autouse=True)
def known_ceiling(monkeypatch):
    """Timing large products tells nothing here."""
    monkeypatch.setattr(profile, "ceiling", lambda dtype: 100.0)


def test_the_ceiling_is_that_of_a_product():
    assert CEILING("float32", sizes=(64,), repeats=2) > 0.01


def profiled(capsys, *arguments):
    assert main(["profile", *arguments, "--json", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "config,stages",
    [
        ("skip_dit_tiny", ["down: attn", "down: mlp", "up: attn", "up: mlp"]),
        pytest.param(
            "flux_tiny", ["double: attn", "double: mlp", "single: attn_mlp"], marks=pytest.mark.slow, id="flux_tiny"
        ),
        pytest.param(
            "sd3_tiny",
            ["dual: attn", "dual: attn2", "dual: mlp", "joint: attn", "joint: mlp", "last: attn", "last: mlp"],
            marks=pytest.mark.slow,
            id="sd3_tiny",
        ),
        pytest.param(
            "wan_tiny", ["blocks: attn", "blocks: cross", "blocks: mlp"], marks=pytest.mark.slow, id="wan_tiny"
        ),
        pytest.param(
            "pixart_tiny", ["blocks: attn", "blocks: cross", "blocks: mlp"], marks=pytest.mark.slow, id="pixart_tiny"
        ),
    ],
)
def test_the_parts_have_the_operations_of_the_whole(config, stages, capsys):
    found = profiled(capsys, "--config", config, *TINY)
    parts = {p["name"]: p for p in found["parts"]}
    assert [n for n in parts if ": " in n and "conditioning" not in n] == stages
    np.testing.assert_allclose(sum(p["gflops"] for p in parts.values()), found["evaluation"]["gflops"], rtol=1e-6)
    seconds = [p["seconds"] for p in parts.values()]
    np.testing.assert_allclose(sum(seconds), found["evaluation"]["seconds"], rtol=1e-9)
    assert all(p["seconds"] > 0 for n, p in parts.items() if "loop" not in n) and found["cached"] is None


@pytest.mark.slow
def test_a_cache_is_beside_the_whole(capsys):
    found = profiled(capsys, "--config", "flux_tiny", "--cache", "fora", "--config.cache.interval=2", *TINY)
    assert 0.4 < found["cached"]["gflops"] / found["evaluation"]["gflops"] < 0.7
    parts = {p["name"]: p["seconds"] for p in found["parts"]}
    branches = sum(seconds for name, seconds in parts.items() if ": " in name and "conditioning" not in name)
    # two steps, of which one is computed
    computed = sum(parts.values()) - 0.5 * branches
    np.testing.assert_allclose(found["remembering"]["seconds"], found["cached"]["seconds"] - computed, rtol=1e-6)


def test_table_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    parts = [Part("blocks: attention", 0.03, 3.0), Part("memory, loop", -0.01, 0.0)]
    cached = Part("cached", 0.01, 1.0), Part("cache", 0.002, 0.0)
    found = Profile(parts, Part("uncached", 0.02, 3.0), *cached, 200.0, 4, "cpu")
    lines = format_profile(found).splitlines()
    assert lines[1].split()[:8] == ["blocks:", "attention", "30.00", "150.0%", "3.00", "100.0", "50", "%"]
    assert lines[1].count("#") == 40  # a part that took longer than the whole, by noise, has no longer bar
    assert lines[2].startswith("memory, loop") and "-50.0%" in lines[2]
    assert lines[4].startswith("evaluation, cached") and lines[5].split()[:5] == ["of", "it", "the", "cache", "2.00"]
    draw_profile(found, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.size[0] > 1000


def test_parts_that_took_no_time(tmp_path):
    nothing = Part("uncached", 0.0, 0.0)
    found = Profile([Part("blocks: attention", 0.0, 3.0)], nothing, None, None, 0.0, 1, "cpu")
    assert format_profile(found).splitlines()[1].split()[:4] == ["blocks:", "attention", "0.00", "0.0%"]
    if importlib.util.find_spec("matplotlib"):
        draw_profile(found, tmp_path / "p.png")


def test_weights_and_conditions_of_a_model_of_embeddings(tmp_path, capsys):
    """What sample takes: a file of weights with its settings, and embeddings; and in calibrate too."""
    run = difax.load("pixart_tiny", weights="random", model={"depth": 1, "size": 4})
    weights, cond, out = tmp_path / "w.safetensors", tmp_path / "c.safetensors", tmp_path / "m.json"
    save_safetensors(weights, randomise(run.params), {"config": run.config})
    save_file(flatten_dict(random_conditions(run.setup.model, 2), sep="/"), cond)
    given = ["--weights", str(weights), "--cond", str(cond), "--solver", "euler", "--steps", "2", "--scale", "2"]
    found = profiled(capsys, *given, "--turns", "1")
    assert found["batch"] == 2 and found["evaluation"]["seconds"] > 0
    samples = ["--samples", "2", "--batch", "2"]
    assert main(["calibrate", "--cache", "magcache", *given, *samples, "--out", str(out), "--quiet"]) == 0
    assert len(json.loads(out.read_text())["ratios"]) == 2
    capsys.readouterr()
    for command in (["profile"], ["calibrate", "--cache", "magcache", "--out", str(out)]):
        assert main([*command, "--weights", str(weights)]) == 2  # real weights, and nothing to draw
        error = capsys.readouterr().err
        assert "pixart" in error and "give --cond FILE.safetensors with the tensors" in error


@pytest.mark.parametrize(
    "arguments,match",
    [
        (["--turns", "0"], "--turns=0; allowed: 1 or more"),
        (["--figure", "p.jpg"], "allowed: a name that ends in .png"),
        (["--config.conditioning=ahead", "--config", "flux_tiny", "--random-init"], "allowed: each"),
        (["--layout", "unstacked", "--config", "flux_tiny", "--random-init"], "allowed: stacked"),
        (["--perfetto", ""], "--perfetto is empty"),
        (["--perfetto", str(pathlib.Path(__file__) / "trace")], "is no folder"),
    ],
)
def test_mistakes_are_one_line(arguments, match, capsys):
    assert main(["profile", *arguments]) == 2
    error = capsys.readouterr().err
    assert match in error and error.count("\n") == 1
