"""Stable Diffusion 3 and 3.5 against diffusers' SD3Transformer2DModel, in both published layouts of their weights.

The golden files (tests/golden/make_sd3.py) hold tiny models of each form, every layer random, under the names of
diffusers and of Stability AI's single files, and what diffusers computed. Errors are printed (pytest -rP): largest
difference over the largest output.
"""

# pyright: reportMissingImports=false

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from difax.accel.caches.tokens import attends_itself
from difax.build import build_setup
from difax.config import checkpoint_config, load_config
from difax.configs import sd3 as published
from difax.core.shapes import trunk_spec
from difax.core.trunk import forward
from difax.models.sd3 import VARIANTS, layer_runs, sd3
from difax.models.sd3_checkpoint import LAYOUTS, find_sd3, load_sd3
from tests.families import some
from tests.golden import make_sd3
from tests.toys import randomise

GOLDEN = Path(__file__).parent / "golden"
PIPELINE = Path(__file__).parents[2] / "shared" / "pipelines" / "sd3"
TOLERANCE = 3e-5
FORMS = ("3", "35_large", "35_medium", "odd")
GIVEN: dict[str, Any] = {"size": (8, 12), "heads": 2}  # what no layout stores of a model without norms
TINY: dict[str, Any] = {k: v for k, v in load_config("sd3_tiny")["model"].items() if k != "name"}


def weights(form: str, layout: str) -> Path:
    return GOLDEN / f"sd3_{form}_{layout}.safetensors"


def compiled(model: Any) -> Any:
    """(params, x, model_time, cond) -> output."""
    return jax.jit(functools.partial(forward, model))


@functools.cache
def loaded(form: str, layout: str = "diffusers") -> Any:
    """(model, params, network)"""
    model, params = load_sd3(weights(form, layout), layout=layout, param_dtype="float32", **GIVEN)
    return model, params, compiled(model)


@functools.cache
def golden_run(form: str) -> dict[str, np.ndarray]:
    return load_file(GOLDEN / f"sd3_{form}_run.safetensors")


def relative_errors(network: Any, params: Any, run: dict[str, np.ndarray]) -> np.ndarray:
    """Per sample: largest difference from the reference, over the reference's largest output."""
    x = run["x"].transpose(0, 2, 3, 1)  # the reference takes [B, C, H, W]
    cond = {name: run[name] for name in ("text", "pooled")}
    with jax.default_matmul_precision("highest"):
        output = network(params, x, run["t"], cond)
    difference = np.abs(np.asarray(output).transpose(0, 3, 1, 2) - run["output"])
    return difference.max(axis=(1, 2, 3)) / np.abs(run["output"]).max()


# ---- parity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", some(FORMS, "35_medium"))
def test_matches_diffusers(form):
    _, params, network = loaded(form)
    run = golden_run(form)
    errors = relative_errors(network, params, run)
    for t, error in zip(run["t"], errors, strict=True):
        print(f"{form}: t={t:<7.2f} error {error:.1e}")
    assert errors.max() <= TOLERANCE


@pytest.mark.parametrize("form", some(FORMS, "35_medium"))
def test_both_layouts_hold_the_same_parameters(form):
    """The original's file is turned into diffusers' state dict by diffusers' own converter (make_sd3.py)."""
    one, other = (loaded(form, layout) for layout in LAYOUTS)
    assert [s.name for s in one[0].stages] == [s.name for s in other[0].stages]
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


RECORDED = {
    "x": "in/hidden_states",
    "t": "in/timestep",
    "text": "in/encoder_hidden_states",
    "pooled": "in/pooled_projections",
    "output": "out",
}


@pytest.mark.skipif(not PIPELINE.is_dir(), reason="the tiny pipelines are not there")
def test_recorded_calls_of_a_pipeline_are_repeated():
    """The folder as it is, with nothing but the size; its network was told 1000 sigma."""
    model, params = load_sd3(PIPELINE / "transformer", size=(8, 12))
    network = compiled(model)
    same = json.loads((PIPELINE / "run.json").read_text())["same"]
    with np.load(PIPELINE / "run.npz") as file:
        for i in range(4):
            places = {ours: f"call/{i}/{theirs}" for ours, theirs in RECORDED.items()}
            run = {name: file[same.get(place, place)] for name, place in places.items()}
            error = relative_errors(network, params, run).max()
            print(f"call {i}: t={run['t'][0]:.2f} error {error:.1e}")
            assert error <= TOLERANCE
        # the times that its configuration here lays are the recorded ones
        setup = build_setup({**load_config("sd3_tiny"), "steps": 4})
        np.testing.assert_allclose(setup.times, file["sigmas"], rtol=1e-6)


def _swap_halves(params: Any, *path: str) -> Any:
    """With shift and scale of a modulation in each other's place."""
    first, *rest = path
    if rest:
        return {**params, first: _swap_halves(params[first], *rest)}
    return {**params, first: {k: np.roll(a, a.shape[-1] // 2, axis=-1) for k, a in params[first].items()}}


def _swap_streams(params):
    return {**params, "joint": {"img": params["joint"]["txt"], "txt": params["joint"]["img"]}}


def _moved(params, by):
    table = params["ends"]["positions"]
    side = int(len(table) ** 0.5)
    moved = np.roll(np.asarray(table).reshape(side, side, -1), by, axis=(0, 1)).reshape(table.shape)
    return {**params, "ends": {**params["ends"], "positions": moved}}


def _no_norm(params):
    img = {k: jnp.ones_like(a) if k == "q_norm2" else a for k, a in params["dual"]["img"].items()}
    return {**params, "dual": {**params["dual"], "img": img}}


def _one_after_the_other(model):
    return model._replace(stages=tuple(stage._replace(beside=()) for stage in model.stages))


# a change of the weights, of the model or of the inputs, that a wrong implementation would amount to
WRONG: dict[str, Any] = {
    "scale and shift of the final layer swapped": (lambda p: _swap_halves(p, "ends", "ada"), None, {}),
    "scale and shift of the last text swapped": (lambda p: _swap_halves(p, "last", "txt", "ada"), None, {}),
    "text and image streams swapped": (_swap_streams, None, {}),
    "positions of the table's corner": (lambda p: _moved(p, (3, 2)), None, {}),
    "positions of the other row in the middle": (lambda p: _moved(p, (-1, 0)), None, {}),
    "no scale of the second attention's queries": (_no_norm, None, {}),
    "the second attention behind the first": (None, _one_after_the_other, {}),
    "time of 0 ... 1": (None, None, {"t": 1e-3}),
    "no pooled text": (None, None, {"pooled": 0}),
}


EVERY_RUN = ("scale and shift of the last text swapped", "the second attention behind the first")


@pytest.mark.parametrize("case", some(WRONG, *EVERY_RUN))
def test_wrong_numerics_fail(case):
    """The comparison can fail: each error is far above the tolerance."""
    edit, change, scaled = WRONG[case]
    model, params, network = loaded("35_medium")
    network = compiled(change(model)) if change else network
    run = golden_run("35_medium")
    run = run | {name: np.float32(factor) * run[name] for name, factor in scaled.items()}
    error = relative_errors(network, edit(params) if edit else params, run).max()
    print(f"{case}: error {error:.1e}")
    assert error > 1e-2


# ---- geometry --------------------------------------------------------------------------------------------------

STAGES = {
    "3": [("joint", 2), ("last", 1)],
    "35_large": [("joint", 2), ("last", 1)],
    "35_medium": [("dual", 2), ("joint", 1), ("last", 1)],
    "odd": [("joint", 1), ("dual", 1), ("joint2", 1), ("dual_last", 1)],
}


@pytest.mark.parametrize("form", some(FORMS, "odd"))
def test_geometry_comes_from_the_tensors(form):
    for layout in LAYOUTS:
        file = weights(form, layout)
        given = {} if "35" in form else {"heads": 2}  # head widths are those of the norms
        found = find_sd3(file, size=(8, 12), **given)
        assert [(s.name, s.depth) for s in found.model.stages] == STAGES[form]
        assert all(s.beside == (("attn2",) if "dual" in s.name else ()) for s in found.model.stages)
        known = {"width": 16, "heads": 2, "position_rows": 10, "channels": 4, "text_width": 12, "pooled_width": 6}
        assert {k: found.geometry[k] for k in known} == known
        assert found.geometry["qk_norm"] == ("35" in form) and found.model.input_shape == (8, 12, 4)
        if not given:
            continue
        with pytest.raises(ValueError, match="number of attention heads cannot be known .*width 16.*; give heads="):
            find_sd3(file, size=(8, 12))


def test_runs_of_layers():
    names = lambda *given: [(r.name, *r.layers) for r in layer_runs(*given)]  # noqa: E731
    assert names(1, ()) == [("last", 0)]
    assert names(1, (0,)) == [("dual_last", 0)]
    assert names(5, (1, 3)) == [("joint", 0), ("dual", 1), ("joint2", 2), ("dual2", 3), ("last", 4)]
    assert names(4, (0, 1)) == [("dual", 0, 1), ("joint", 2), ("last", 3)]
    assert names(4, (0, 1, 2)) == [("dual", 0, 1, 2), ("last", 3)]


# name -> stages, parameters but for the table of positions, GB of the half-precision files in the published folder
PUBLISHED = {
    "medium": ([("joint", 23), ("last", 1)], 2_028_328_000, 4.17),
    "3.5-medium": ([("dual", 13), ("joint", 10), ("last", 1)], 2_243_171_520, 4.94),
    "3.5-large": ([("joint", 37), ("last", 1)], 8_056_627_520, 9.99 + 6.31),
    "3.5-large-turbo": ([("joint", 37), ("last", 1)], 8_056_627_520, 9.99 + 6.31),
}


@pytest.mark.parametrize("name", some(PUBLISHED, "medium", "3.5-medium", "3.5-large"))
def test_geometry_of_the_published_models(name):
    """Stability AI says 2, 2.5 (with the table of positions) and 8.1 billion; the files on its pages are as long as
    all of it is."""
    stages, total, gigabytes = PUBLISHED[name]
    model = sd3(name)
    spec = jax.eval_shape(model.init, jax.random.key(0))
    sizes = [sum(a.size for a in jax.tree.leaves(tree)) for tree in (spec, spec["ends"]["positions"])]
    print(f"{name}: {sizes[0] / 1e9:.3f} billion parameters, {sizes[1] / 1e9:.3f} of them positions")
    assert [(s.name, s.depth) for s in model.stages] == stages and sizes[0] - sizes[1] == total
    assert 2 * sizes[0] / 1e9 == pytest.approx(gigabytes, abs=0.01)
    assert (model.input_shape, model.cond["text"].shape) == ((128, 128, 16), (333, 4096))
    assert model.cond["pooled"].shape == (2048,) and VARIANTS[name]["width"] == 64 * VARIANTS[name]["heads"]


def test_configurations_are_the_published_models():
    for name, (steps, scale) in published.VARIANTS.items():
        config = load_config(f"sd3:{name}")
        assert (config["steps"], config["scale"], config["process"]["shift"]) == (steps, scale, 3.0)
        assert config["guide"]["name"] == ("none" if "turbo" in name else "cfg")
        assert config["reduced"]["model"]["dual_layers"] == ((0,) if VARIANTS[name]["dual_layers"] else ())
    with pytest.raises(ValueError, match="config sd3:large; allowed: medium, 3.5-medium"):
        load_config("sd3:large")
    config = checkpoint_config(str(weights("35_medium", "original")), [("model.size", (8, 8))])
    assert (config["model"]["name"], config["model"]["dual_layers"]) == ("sd3", (0, 1))
    assert config["grid"]["name"] == "flow_match" and build_setup(config).process.shift == 3.0


# ---- files -----------------------------------------------------------------------------------------------------


# config.json of the form 35_medium as diffusers writes it
CONFIG = {"_class_name": "SD3Transformer2DModel", **make_sd3.GEOMETRY, **make_sd3.FORMS["35_medium"]}


def folder(path: Path, form: str = "35_medium", drop: tuple[str, ...] = (), **changes: Any) -> Path:
    config = {k: v for k, v in (CONFIG | changes).items() if k not in drop}
    (path / "config.json").write_text(json.dumps(config))
    (path / "diffusion_pytorch_model.safetensors").symlink_to(weights(form, "diffusers"))
    return path


HARMLESS: dict[str, Any] = {
    "as it is": {},
    "other keys": {"_name_or_path": "x", "guidance_embeds": True, "activation_fn": "silu"},
    "no output channels": {"out_channels": None},
    "defaults left out": {"drop": ("patch_size",)},
    "layers in another order": {"dual_attention_layers": [1, 0]},
}


@pytest.mark.parametrize("case", some(HARMLESS, "defaults left out"))
def test_harmless_changes_of_a_folder(tmp_path, case):
    found = find_sd3(folder(tmp_path, **HARMLESS[case]))
    model = loaded("35_medium")[0]
    config = {k: getattr(model.stages[0].block.config, k) for k in found.geometry if k not in ("variant", "dtype")}
    assert found.geometry == config | {"variant": None, "base_size": 6, "size": 12}  # the size trained on


def test_heads_come_from_a_folder_without_norms(tmp_path):
    plain = {"form": "3", "qk_norm": None, "dual_attention_layers": [], "num_layers": 3}
    for i, drop in enumerate((("attention_head_dim",), ("num_attention_heads",), ())):
        (tmp_path / str(i)).mkdir()
        found = find_sd3(folder(tmp_path / str(i), drop=(*drop, "dual_attention_layers", "qk_norm"), **plain))
        assert found.geometry["heads"] == 2
    assert find_sd3(folder(tmp_path, drop=("caption_projection_dim",), **plain)).geometry["heads"] == 2


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "another class": ({"_class_name": "SD3ControlNetModel"}, "_class_name='SD3ControlNetModel'; allowed: SD3Trans"),
    "other norms": ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm'; allowed: rms_norm .other norms"),
    "no norms": ({"qk_norm": None}, "qk_norm=None; allowed: 'rms_norm', as the checkpoint's tensors say"),
    "norms by default": ({"drop": ("qk_norm",)}, "qk_norm=None; allowed: 'rms_norm', as"),
    "other layers": ({"dual_attention_layers": [0, 2]}, r"dual_attention_layers=\[0, 2\]; allowed: \[0, 1\], as"),
    "no layers": ({"dual_attention_layers": "0-1"}, "dual_attention_layers='0-1'; allowed: a list of layers"),
    "depth": ({"num_layers": 24}, "num_layers=24; allowed: 4, as the checkpoint's tensors say"),
    "width": ({"caption_projection_dim": 24}, "caption_projection_dim=24; allowed: 16, as"),
    "heads": ({"num_attention_heads": 4}, "num_attention_heads=4 times attention_head_dim=8; allowed: 16"),
    "head width": ({"num_attention_heads": 4, "attention_head_dim": 4}, "num_attention_heads=4; allowed: 2, as"),
    "table": ({"pos_embed_max_size": 96}, "pos_embed_max_size=96; allowed: 10, as the checkpoint's tensors say"),
    "channels": ({"out_channels": 8}, "out_channels=8; allowed: 4, as"),
    "a number": ({"sample_size": "12"}, "sample_size='12'; allowed: a whole number"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_of_another_function_is_refused_by_name(tmp_path, case):
    changes, words = REFUSALS[case]
    with pytest.raises(ValueError, match=f"config.json: {words}"):
        find_sd3(folder(tmp_path, **changes), size=(8, 12))


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "variant": ({"variant": "large"}, "unknown SD3 variant 'large'; allowed: medium, 3.5-medium"),
    "open": ({"depth": None}, "sd3: depth missing; give it, or a variant: medium"),
    "zero": ({"pooled_width": 0}, "sd3: pooled_width=0; allowed: 1 or more"),
    "heads": ({"heads": 5}, "sd3: width=64 must be divisible by heads=5 and by 4"),
    "layers": ({"dual_layers": (0, 3)}, r"sd3: dual_layers=\(0, 3\); allowed: layers of 0 ... 2, each once"),
    "twice": ({"dual_layers": (1, 1)}, r"sd3: dual_layers=\(1, 1\); allowed"),
    "odd size": ({"size": (16, 15)}, "sd3: size=16x15 must be divisible by patch=2"),
    "beyond the table": ({"size": (26, 8)}, r"sd3: size=26x8 with patch=2; allowed: sides up to 24.*position_rows=12"),
    "beyond memory": ({"position_rows": 10**6}, "position_rows=1000000 of width=64: .*GiB of memory are needed"),
    "dtype": ({"dtype": "float16"}, "sd3: dtype=float16; allowed"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_refuses_arguments(case):
    changes, words = ARGUMENTS[case]
    with pytest.raises(ValueError, match=words):
        sd3(**{**TINY, **changes})


def test_a_single_file_holds_more_than_the_network(tmp_path):
    """As Stability AI publishes it: behind a prefix, in half precision, text encoders and autoencoder beside it."""
    tensors = {f"model.diffusion_model.{k}": v for k, v in load_file(weights("35_medium", "original")).items()}
    beside = ("text_encoders.clip_l.transformer.text_model.final_layer_norm.weight", "first_stage_model.conv_out.bias")
    save_file(tensors | dict.fromkeys(beside, np.ones(3, np.float16)), tmp_path / "sd3.5.safetensors")
    _, params = load_sd3(tmp_path / "sd3.5.safetensors", size=(8, 12))
    jax.tree.map(np.testing.assert_array_equal, params, loaded("35_medium", "original")[1])


# ---- as a model of difax ---------------------------------------------------------------------------------------


@functools.cache
def tiny() -> Any:
    """(model, params, network)"""
    model = sd3(**TINY)
    return model, randomise(jax.eval_shape(model.init, jax.random.key(0))), compiled(model)


def conditions(model: Any, batch: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(size=(batch, *s.shape)), s.dtype) for k, s in model.cond.items()}


def test_init_makes_the_table_that_is_published():
    """The form 3 of the golden files has diffusers' own table, of 10 x 10 patches trained on 6 x 6."""
    model = sd3(**{**TINY, "depth": 1, "dual_layers": (), "width": 16, "heads": 2, "position_rows": 10, "base_size": 6})
    params = jax.jit(model.init)(jax.random.key(0))
    stored = load_file(weights("3", "original"))["pos_embed"][0]
    np.testing.assert_allclose(params["ends"]["positions"], stored, atol=2e-3)  # it is in half precision
    assert set(params) == {"ends", "last"} and set(params["last"]["txt"]) == {"ada", "qkv", "q_norm", "k_norm"}
    np.testing.assert_array_equal(params["ends"]["out"]["kernel"], 0)


def test_each_branch_attends_once():
    model, params, _ = tiny()
    x = jax.ShapeDtypeStruct((2, *model.input_shape), jnp.float32)
    spec = trunk_spec(model, params, x, conditions(model, 2))
    attends = {
        (s, b): call.q.shape for s, calls in spec.attention.items() for b, call in calls.items() if call is not None
    }
    joint = (2, 8 + 64, 4, 16)
    assert attends == {
        ("dual", "attn"): joint,
        ("dual", "attn2"): (2, 64, 4, 16),
        ("joint", "attn"): joint,
        ("last", "attn"): joint,
    }
    shapes = {"txt": (2, 8, 64), "img": (2, 64, 64)}
    assert jax.tree.map(jnp.shape, spec.tokens) == shapes and spec.hidden.shape == (2, 64, 64)
    for updates in spec.update.values():
        assert all(jax.tree.map(jnp.shape, update) == shapes for update in updates.values())
    # caches of tokens hold the second attention whole: its keys are the image's tokens
    assert {(s, b) for s, b in attends if attends_itself(spec, s, b)} == set(attends)


def test_text_is_a_set_and_ends_in_the_last_block():
    model, params, network = tiny()
    x = jnp.asarray(np.random.default_rng(3).normal(size=(2, *model.input_shape)), jnp.float32)
    cond, time = conditions(model, 2), jnp.full(2, 500.0)
    output = network(params, x, time, cond)
    turned = network(params, x, time, {**cond, "text": cond["text"][:, ::-1]})
    np.testing.assert_allclose(turned, output, atol=1e-5)
    assert jnp.abs(network(params, x[:, ::-1], time, cond)[:, ::-1] - output).max() > 1e-2
    null = model.null(cond)
    assert jax.tree.structure(null) == jax.tree.structure(cond)
    assert null["text"] is cond["null_text"] and null["pooled"] is cond["null_pooled"]


@pytest.mark.slow
def test_bfloat16_is_near_float32():
    model, params, network = tiny()
    half = compiled(sd3(**{**TINY, "dtype": "bfloat16"}))
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, *model.input_shape)), jnp.float32)
    cond, time = conditions(model, 2), jnp.array([900.0, 100.0])
    output = network(params, x, time, cond)
    rounded = half(jax.tree.map(lambda a: a.astype(jnp.bfloat16), params), x, time, cond)
    assert rounded.dtype == jnp.bfloat16 and bool(jnp.isfinite(rounded).all())
    error = jnp.linalg.norm(rounded.astype(jnp.float32) - output) / jnp.linalg.norm(output)
    print(f"bfloat16: relative error {error:.1e}")
    assert error < 0.05


# ---- live, with the `parity` extra -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dual", [(), (0,), (1, 2)], ids=str)
def test_matches_diffusers_live(tmp_path, dual):
    """Models of another geometry than the golden ones, saved by diffusers itself in shards with its config.json."""
    pytest.importorskip("torch", reason="needs the parity extra (torch, diffusers)")
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra (torch, diffusers)")
    reference = diffusers.SD3Transformer2DModel(
        sample_size=10,
        patch_size=1,
        in_channels=3,
        out_channels=None,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=20,
        caption_projection_dim=48,
        pooled_projection_dim=24,
        pos_embed_max_size=9,
        dual_attention_layers=dual,
        qk_norm="rms_norm" if dual else None,
    )
    reference = reference.eval().requires_grad_(False)
    make_sd3.randomise(reference, seed=2)
    run = {name: np.asarray(a) for name, a in make_sd3.run(reference, (8, 5), 7, (900.0, 500.5, 1.0), seed=3).items()}
    reference.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, params = load_sd3(tmp_path, size=(8, 5))
    errors = relative_errors(compiled(model), params, run)
    print(f"{dual}, live: " + ", ".join(f"t={t:.1f}: {e:.1e}" for t, e in zip(run["t"], errors, strict=True)))
    assert errors.max() <= TOLERANCE
