"""Conditions that are no labels: embeddings from a file, random ones, and models too large for the machine."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from difax import program, run
from difax.build import build_setup
from difax.cli import main
from difax.config import load_config
from difax.weights.conditions import check_conditions, labelled, load_conditions, random_conditions

TINY = ["--steps", "2", "--no-compile-cache", "--json"]
MODELS = {name: build_setup(load_config(f"{name}_tiny")).model for name in ("flux", "pixart", "wan")}
DIT = build_setup(load_config("fmnist_smoke")).model


@pytest.mark.parametrize("name", MODELS)
def test_random_conditions_have_the_models_shapes(name):
    model = MODELS[name]
    cond = random_conditions(model, 3, seed=1)
    jax.tree.map(lambda a, s: np.testing.assert_equal((a.shape, a.dtype), ((3, *s.shape), s.dtype)), cond, model.cond)
    other = random_conditions(model, 3, seed=2)
    assert not np.array_equal(cond["text"], other["text"]) and not labelled(model)
    assert labelled(DIT) and random_conditions(DIT, 12).tolist() == [*range(10), 0, 1]


@pytest.mark.parametrize("name", MODELS)
def test_null_swaps_the_unconditional_half_in(name):
    model = MODELS[name]
    cond = random_conditions(model, 2)
    null = model.null(cond)
    assert jax.tree.structure(null) == jax.tree.structure(cond)
    np.testing.assert_array_equal(null["text"], cond["null_text"])


def write(path, n=2, **other):
    cond = random_conditions(MODELS["pixart"], n) | other
    save_file({k: np.ascontiguousarray(v) for k, v in cond.items()}, path)
    return cond


def test_conditions_come_from_a_file(tmp_path, capsys):
    cond = write(tmp_path / "c.safetensors")
    found = load_conditions(MODELS["pixart"], str(tmp_path / "c.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, found, cond)
    command = ["sample", "--config", "pixart_tiny", "--out", str(tmp_path / "a.png"), *TINY]
    assert main([*command, "--cond", str(tmp_path / "c.safetensors"), "--repeat", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 4


REFUSALS = {
    "missing": (lambda c: c.pop("null_text"), "tensor 'null_text' .*missing"),
    "surplus": (lambda c: c.update(pooled=np.zeros((2, 3), np.float32)), "surplus tensor 'pooled'"),
    "length": (lambda c: c.update(text=c["text"][:1]), r"lead with \[1, 2\]; allowed: one number"),
    "shape": (lambda c: c.update(text=c["text"][:, :, :-1]), "'text' .*wrong shape"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses_files(tmp_path, capsys, case):
    import re

    edit, message = REFUSALS[case]
    cond = random_conditions(MODELS["pixart"], 2)
    edit(cond)
    save_file({k: np.ascontiguousarray(v) for k, v in cond.items()}, tmp_path / "c.safetensors")
    out = tmp_path / "a.png"
    assert (
        main(["sample", "--config", "pixart_tiny", "--cond", str(tmp_path / "c.safetensors"), "--out", str(out)]) == 2
    )
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1 and not out.exists(), error


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_embeddings_are_finite_where_no_mask_hides_them(tmp_path, value):
    model = MODELS["pixart"]
    cond = random_conditions(model, 2)
    half = cond["text"].shape[1] // 2
    cond["mask"][:, half:] = 0
    cond["text"][:, half:] = value  # an encoder that overflows on padding
    save_file({k: np.ascontiguousarray(v) for k, v in cond.items()}, tmp_path / "c.safetensors")
    np.testing.assert_array_equal(load_conditions(model, str(tmp_path / "c.safetensors"))["text"], cond["text"])
    check_conditions(model, cond)
    cond["text"][1, 0, 2] = value
    save_file({k: np.ascontiguousarray(v) for k, v in cond.items()}, tmp_path / "c.safetensors")
    message = rf"tensor 'text' is {value} at \[1, 0, 2\]; allowed: finite numbers"
    with pytest.raises(ValueError, match=f"c.safetensors: {message}"):
        load_conditions(model, str(tmp_path / "c.safetensors"))
    with pytest.raises(ValueError, match=f"cond: {message}"):
        check_conditions(model, cond)
    with pytest.raises(ValueError, match="allowed: one condition or more"):
        write(tmp_path / "none.safetensors", 0)
        load_conditions(model, str(tmp_path / "none.safetensors"))
    with pytest.raises(ValueError, match="cond: .*allowed: arrays of numbers"):
        check_conditions(model, cond | {"text": "a bag"})


def test_video_makes_a_row_of_frames(tmp_path, capsys):
    from PIL import Image

    out = tmp_path / "w.png"
    assert main(["sample", "--config", "wan_tiny", "--out", str(out), *TINY]) == 0
    frames, height, width, _ = MODELS["wan"].input_shape
    with Image.open(out) as picture:
        columns = min(frames, 8)
        scale = max(1, 96 // height)
        assert picture.size == (scale * (2 + columns * (width + 2)), scale * (height + 4))


CONFIG = """
from difax.configs.flux_tiny import get_config as tiny
def get_config():
    config = tiny()
    config.reduced = {"model": {"double_depth": 1, "size": 8}, "steps": 1}
    return config
"""


@pytest.mark.slow
def test_a_model_too_large_is_compiled_whole_and_drawn_reduced(tmp_path, capsys, monkeypatch):
    (tmp_path / "big.py").write_text(CONFIG)
    command = ["sample", "--config", str(tmp_path / "big.py"), "--out", str(tmp_path / "a.png")]
    assert main([*command, *TINY]) == 0
    assert "full_size" not in json.loads(capsys.readouterr().out)
    monkeypatch.setattr(run, "memory_available", lambda: 1000)
    assert main([*command, "--json", "--no-compile-cache"]) == 0
    table = json.loads(capsys.readouterr().out)
    whole = table["full_size"]
    assert table["steps"] == 1 and whole["evaluations"] == 8
    assert whole["parameters"] == program.parameter_count(MODELS["flux"])
    assert whole["gflops_per_evaluation"] > 2 * table["gflops_per_image"]
    assert whole["weights_mib"] > table["weights_mib"] and whole["peak_memory_mib"] > whole["weights_mib"]


def test_a_model_too_large_without_a_reduced_size_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "memory_available", lambda: 1000)
    assert main(["sample", "--config", "flux_tiny", "--out", str(tmp_path / "a.png")]) == 2
    error = capsys.readouterr().err
    assert "no `reduced` size" in error and error.count("\n") == 1
