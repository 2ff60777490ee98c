"""Conditions that are no labels: embeddings from a file, random ones, and models too large for the machine."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from difax import program, run
from difax.accel.attention.chunked import chunked
from difax.accel.attention.window import window
from difax.build import build_setup
from difax.cli import main
from difax.config import load_config
from difax.core import ops
from difax.core.contracts import Segments
from difax.core.trunk import forward
from difax.models import dit
from difax.weights.conditions import check_conditions, labelled, load_conditions, random_conditions
from difax.weights.random import random_weights
from tests.families import some

TINY = ["--steps", "2", "--no-compile-cache", "--json"]
MODELS = {
    name: build_setup(load_config(f"{name}_tiny")).model
    for name in ("flux", "pixart", "wan", "sd3", "qwen_image", "flux2", "z_image")
}
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
    message = rf"text holds 1 numbers that are not finite, the first, {value}, at \[1, 0, 2\]; allowed: finite numbers"
    with pytest.raises(ValueError, match=f"c.safetensors {message}"):
        load_conditions(model, str(tmp_path / "c.safetensors"))
    with pytest.raises(ValueError, match=f"cond {message}"):
        check_conditions(model, cond)
    with pytest.raises(ValueError, match="allowed: one condition or more"):
        write(tmp_path / "none.safetensors", 0)
        load_conditions(model, str(tmp_path / "none.safetensors"))
    with pytest.raises(ValueError, match="cond text is of type .*allowed: numbers"):
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


# ---- masks: what stands where no token is ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def masked_pixart():
    """(network(cond) of a PixArt with random weights, a condition with padding)."""
    model = MODELS["pixart"]
    params = random_weights(model)
    cond = random_conditions(model, 2)
    cond["mask"][:, 3:] = 0
    x = np.random.default_rng(0).normal(size=(2, *model.input_shape)).astype(np.float32)
    run_it = jax.jit(lambda cond: forward(model, params, x, np.full(2, 500.0, np.float32), cond))
    return lambda cond: np.asarray(run_it(cond)), cond


@pytest.mark.parametrize("fill", [0.0, 1e4, 3e38, np.inf, -np.inf, np.nan])
def test_masked_tokens_do_not_matter(masked_pixart, fill):
    network, cond = masked_pixart
    text = np.array(cond["text"])
    text[:, 3:] = fill
    output = network(cond | {"text": text})
    assert np.isfinite(output).all() and output.any()
    np.testing.assert_array_equal(output, network(cond))
    text = np.array(cond["text"])
    text[:, 2] = 0.5
    assert np.abs(network(cond | {"text": text}) - network(cond)).max() > 1e-4  # but those that are there do


BACKENDS = {
    "xla": ops.attend,
    "chunked": chunked(block_q=2, block_k=2),
    "window": window(radius=8, block=4),
    "narrow window": window(radius=1, prefix=1, block=2),
}


@pytest.mark.parametrize("name", some(BACKENDS, "xla", "chunked"))
@pytest.mark.parametrize("fill", some([np.inf, -np.inf, np.nan], np.nan))
def test_keys_that_no_query_attends_to_do_not_matter(name, fill):
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 1, 8, 2, 4)).astype(np.float32)
    ids = np.array([[1, 1, 1, 2, 2, 2, 2, 2]], np.int32)
    there = np.array([[1, 0, 1, 2, 0, 2, 0, 2]], np.int32)
    segments = Segments(ids, there)
    wanted = np.asarray(BACKENDS[name](q, k, v, segments))
    k, v = (np.where(there[..., None, None] == 0, np.float32(fill), a) for a in (k, v))
    output = np.asarray(BACKENDS[name](q, k, v, segments))
    assert np.isfinite(output).all()
    np.testing.assert_array_equal(output, wanted)


BAD = {
    "half": ("mask", lambda a: a * 0.5, r"mask holds 0.5; allowed: 0 \(no token\) and 1"),
    "additive": (
        "mask",
        lambda a: np.where(np.arange(8) < 4, 0.0, -1e9) + 0 * a,
        r"mask holds -1000000000.0; allowed: 0",
    ),
    "weights": ("null_mask", lambda a: a * 3, r"null_mask holds 3; allowed: 0"),
    "not a number": ("mask", lambda a: a * np.nan, r"mask holds nan; allowed: 0"),
    "no token": ("mask", lambda a: a * np.array([[1], [0]]), "mask has no token in condition 1; allowed: one or more"),
    "text": ("text", lambda a: a.astype(str), "text is of type <U32; allowed: numbers"),
    "objects": ("text", lambda a: a.astype(object), "text is of type object; allowed: numbers"),
    "infinite": ("null_text", lambda a: a + np.float32(np.inf), "null_text holds 256 numbers that are not finite"),
    "one NaN": ("text", lambda a: np.where(np.arange(a.size).reshape(a.shape) == 5, np.nan, a), "text holds 1 num"),
    "too large": ("resolution", lambda a: a.astype(np.float64) * 1e300, "resolution holds 4 numbers that are not fin"),
}


@pytest.mark.parametrize("case", BAD)
def test_refuses_numbers(case):
    name, edit, words = BAD[case]
    cond = random_conditions(MODELS["pixart"], 2)
    with pytest.raises(ValueError, match=f"^cond {words}"):
        check_conditions(MODELS["pixart"], cond | {name: edit(cond[name])})


@pytest.mark.parametrize("dtype", some(["bool", "int64", "uint8", "int8", "float32", "float16"], "bool", "int64"))
def test_masks_come_in_any_type(tmp_path, dtype):
    cond = random_conditions(MODELS["pixart"], 2)
    cond["mask"][:, 4:] = 0
    cond["text"][:, 4:] = np.nan  # an encoder that overflows on padding
    save_file({k: a.astype(dtype) if k == "mask" else a for k, a in cond.items()}, tmp_path / "c.safetensors")
    found = load_conditions(MODELS["pixart"], str(tmp_path / "c.safetensors"))
    assert found["mask"].dtype == np.int32
    np.testing.assert_array_equal(found["mask"], cond["mask"])
    cond["mask"][1, 6] = 1
    save_file({k: a.astype(dtype) if k == "mask" else a for k, a in cond.items()}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"c.safetensors text holds 16 numbers that are not finite"):
        load_conditions(MODELS["pixart"], str(tmp_path / "c.safetensors"))


# ---- random weights ----------------------------------------------------------------------------------------------

DRAWN = (
    "flux_tiny",
    "wan_tiny",
    "pixart_tiny",
    "pixart_tiny:sigma",
    "skip_dit_tiny",
    "fmnist_smoke",
    "fmnist_dit",
    "sd3_tiny",
    "qwen_image_tiny",
    "flux2_tiny",
    "flux2_tiny:dev",
    "z_image_tiny",
)


@pytest.mark.parametrize("name", some(DRAWN, "skip_dit_tiny"))
def test_random_weights_draw_images_that_differ(name):
    """By the condition, the seed, and a cache at a coarse setting; the same of the same seed."""
    opened = run.load(name, weights="random", steps=4)
    model = opened.setup.model
    first, other = ([1], [2]) if labelled(model) else (random_conditions(model, 1, s) for s in (0, 1))
    image = np.asarray(opened.sample(first).images, np.float32)
    assert np.isfinite(image).all() and image.std() > 0.1
    np.testing.assert_array_equal(image, opened.sample(first).images)
    cached = opened.replace(cache={"name": "fora", "interval": 4})
    for what in (opened.sample(other), opened.sample(first, seed=1), cached.sample(first)):
        seen = [np.clip(np.asarray(a, np.float32), -1, 1) for a in (what.images, image)]  # as a picture shows it
        assert np.abs(seen[0] - seen[1]).max() > 0.02  # some five of 256 shades


def test_random_weights_are_those_of_the_initialisation_but_where_that_is_zero():
    model = MODELS["pixart"]
    init, drawn, again, other = (
        jax.jit(model.init)(jax.random.key(3)),
        random_weights(model, 3),
        random_weights(model, 3),
        random_weights(model, 4),
    )
    jax.tree.map(np.testing.assert_array_equal, drawn, again)
    for before, after, of_another_seed in zip(*map(jax.tree.leaves, (init, drawn, other)), strict=True):
        assert np.asarray(after).any() and (before.shape, before.dtype) == (after.shape, after.dtype)
        assert not np.array_equal(after, of_another_seed)
        if np.asarray(before).any():
            np.testing.assert_array_equal(before, after)
    assert not np.array_equal(drawn["blocks"]["cross_out"]["bias"], drawn["blocks"]["fc2"]["bias"])


@pytest.mark.slow
def test_random_weights_stay_finite_through_depth():
    """28 blocks in bfloat16: the stream's numbers stay of the order that a network's are."""
    model = dit(depth=28, width=64, heads=4, patch=2, size=8, channels=4, classes=10, dtype="bfloat16")
    params = random_weights(model)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    output = jax.jit(lambda p: forward(model, p, x, np.array([10.0, 900.0], np.float32), np.array([1, 2])))(params)
    assert 0.05 < np.asarray(output, np.float32).std() < 20
