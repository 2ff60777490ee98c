"""Z-Image against diffusers' ZImageTransformer2DModel, in both published layouts of its weights.

The golden files (tests/golden/make_z_image.py) hold one tiny model, every layer random, under the names of diffusers
and of single files, and what diffusers computed for captions of unequal lengths. Errors are printed (pytest -rP):
largest difference over the largest output.
"""

# pyright: reportMissingImports=false

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from difax.accel.caches import CACHES
from difax.accel.solvers import SOLVERS
from difax.build import make_process
from difax.configs import z_image as z_image_config
from difax.configs import z_image_tiny
from difax.core import noise
from difax.core.grids import GRIDS, make_times
from difax.core.guidance import GUIDES
from difax.core.process import PROCESSES
from difax.core.sample import initial_noise, make_rows, make_sampler
from difax.core.shapes import trunk_spec
from difax.core.trunk import forward
from difax.models.z_image import z_image
from difax.models.z_image_checkpoint import LAYOUTS, load_z_image
from difax.weights.conditions import random_conditions
from tests.families import some
from tests.toys import randomise

GOLDEN = Path(__file__).parent / "golden"
PIPELINE = Path(__file__).parents[2] / "shared" / "pipelines" / "z_image"
TOLERANCE = 3e-5
# what no layout stores; the files hold float16
GIVEN: dict[str, Any] = {"size": (8, 12), "axes_dim": (2, 4, 4), "text_tokens": 63}
TINY: dict[str, Any] = dict(
    depth=2,
    refiner_depth=1,
    width=12,
    heads=2,
    size=(4, 6),
    channels=2,
    text_tokens=3,
    text_width=5,
    time_hidden=8,
    axes_dim=(2, 2, 2),
)


def weights(layout: str) -> Path:
    return GOLDEN / f"z_image_{layout}.safetensors"


def compiled(model: Any) -> Any:
    """(params, x, model_time, cond) -> output."""
    return jax.jit(functools.partial(forward, model))


@functools.cache
def loaded(layout: str) -> Any:
    """(model, params, network)"""
    model, params = load_z_image(weights(layout), layout=layout, param_dtype="float32", **GIVEN)
    return model, params, compiled(model)


@functools.cache
def golden_run() -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "z_image_run.safetensors")


def relative_errors(network: Any, params: Any, run: dict[str, np.ndarray]) -> np.ndarray:
    """Per sample: largest difference from the reference, which is of the other sign, over its largest output."""
    x = run["x"].transpose(0, 2, 3, 1)  # the reference takes [B, C, H, W]
    with jax.default_matmul_precision("highest"):
        output = network(params, x, 1000 * run["t"], {"text": run["text"], "mask": run["mask"]})
    difference = np.abs(np.asarray(output).transpose(0, 3, 1, 2) + run["output"])
    return difference.max(axis=(1, 2, 3)) / np.abs(run["output"]).max()


# ---- parity ----------------------------------------------------------------------------------------------------


def test_matches_diffusers():
    _, params, network = loaded("diffusers")
    run = golden_run()
    errors = relative_errors(network, params, run)
    for t, length, error in zip(run["t"], run["mask"].sum(1), errors, strict=True):
        print(f"diffusers: t={t:<4.2f} caption of {length:<2} error {error:.1e}")
    assert errors.max() <= TOLERANCE


def test_both_layouts_hold_the_same_parameters():
    """The original's file is turned into diffusers' state dict by diffusers' own converter (make_z_image.py)."""
    assert set(load_file(weights("original"))) != set(load_file(weights("diffusers")))
    jax.tree.map(np.testing.assert_array_equal, loaded("original")[1], loaded("diffusers")[1])


def test_matches_diffusers_in_any_company():
    """A caption in an array of its own length, among others, or scattered over a longer one with noise between."""
    _, params, _ = loaded("diffusers")
    network, run = compiled(z_image_of(text_tokens=90)), golden_run()
    text, mask = np.full((4, 90, 12), np.nan, np.float32), np.zeros((4, 90), np.int32)
    for i, length in enumerate(run["mask"].sum(1)):
        places = np.sort(np.random.default_rng(i).permutation(90)[:length])
        text[i, places], mask[i, places] = run["text"][i, :length], 1
    errors = relative_errors(network, params, {**run, "text": text, "mask": mask})
    print(f"scattered: error {errors.max():.1e}")
    assert errors.max() <= TOLERANCE
    one = {name: a[:1] for name, a in run.items()}
    one |= {"text": run["text"][:1, :5], "mask": run["mask"][:1, :5]}  # where nothing can be masked
    error = relative_errors(compiled(z_image_of(text_tokens=5)), params, one | {"output": run["output"][:1]}).max()
    print(f"alone: error {error:.1e}")
    assert error <= TOLERANCE


def z_image_of(**changed: Any) -> Any:
    c = loaded("diffusers")[0].stages[0].block.config
    return z_image(**{k: getattr(c, k) for k in c.__dataclass_fields__} | changed)


def _of_blocks(path: tuple[str, ...], edit: Any) -> Any:
    """An edit of the parameter at `path` in the joint blocks."""

    def change(tree: Any, path: tuple[str, ...]) -> Any:
        return edit(tree) if not path else {**tree, path[0]: change(tree[path[0]], path[1:])}

    return lambda params: {**params, "blocks": change(params["blocks"], path)}


def _quarters(ada: Any) -> Any:
    """(scale, gate, ...) read as (gate, scale, ...)."""
    return {k: jnp.concatenate([jnp.split(a, 4, -1)[i] for i in (1, 0, 3, 2)], -1) for k, a in ada.items()}


def _pads(params: Any) -> Any:
    ends = params["ends"]
    return {**params, "ends": {**ends, "img_pad": ends["txt_pad"], "txt_pad": ends["img_pad"]}}


# a change of the weights, of the geometry or of the inputs, that a wrong implementation would amount to
WRONG: dict[str, Any] = {
    "scale and gate swapped": (_of_blocks(("ada",), _quarters), {}, {}),
    "the gated half of the MLP swapped": (
        _of_blocks(("fc1",), lambda p: {"kernel": jnp.roll(p["kernel"], 53, -1)}),
        {},
        {},
    ),
    "no scale of the second norm": (_of_blocks(("mlp_norm2", "scale"), jnp.ones_like), {}, {}),
    "no scale of the normed queries": (_of_blocks(("q_norm", "scale"), jnp.ones_like), {}, {}),
    "the learned tokens swapped": (_pads, {}, {}),
    "refiners swapped": (lambda p: {**p, "caption": {k: p["refiner"][k] for k in p["caption"]}}, {}, {}),
    "padding taken for tokens": (None, {}, {"mask": lambda mask: np.ones_like(mask)}),
    "time the other way round": (None, {}, {"t": lambda t: 1 - t}),
    "rotary sections of other axes": (None, {"axes_dim": (4, 4, 2)}, {}),
    "rotary frequencies of another base": (None, {"theta": 10_000.0}, {}),
}


@pytest.mark.parametrize("case", some(WRONG, *[k for k in WRONG if not k.startswith("rotary")]))
def test_wrong_numerics_fail(case):
    """The comparison can fail: each error is far above the tolerance."""
    edit, geometry, inputs = WRONG[case]
    _, params, network = loaded("diffusers")
    if geometry:
        network = compiled(z_image_of(**geometry))
    run = golden_run()
    run = run | {name: change(run[name]) for name, change in inputs.items()}
    error = relative_errors(network, edit(params) if edit else params, run).max()
    print(f"{case}: error {error:.1e}")
    assert error > 5e-3


def test_geometry_comes_from_the_tensors():
    for layout in LAYOUTS:
        model, params = load_z_image(weights(layout), **GIVEN)  # recognised by its names
        c = model.stages[0].block.config
        assert [(s.name, s.depth, s.branches, s.streams) for s in model.stages] == [
            ("refiner", 2, ("attn", "mlp"), ("img",)),
            ("blocks", 3, ("attn", "mlp"), None),
        ]
        assert (c.width, c.heads, c.ffn, c.channels, c.text_width, c.time_hidden) == (20, 2, 53, 4, 12, 24)
        assert c.qk_norm and model.input_shape == (8, 12, 4)
        assert {str(a.dtype) for a in jax.tree.leaves(params)} == {"float16"}
        spec = jax.eval_shape(model.init, jax.random.key(0))
        assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, spec)


def test_geometry_of_the_published_model():
    """The default geometry has as many parameters as the class of diffusers makes by default, 6 billion."""
    model = z_image()
    total = sum(a.size for a in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
    print(f"Z-Image: {total / 1e9:.3f} billion parameters")
    assert total == PARAMETERS
    assert (model.name, model.input_shape, model.cond["text"].shape) == ("z_image", (128, 128, 16), (512, 2560))


PARAMETERS = 6_154_908_736


@pytest.mark.skipif(not PIPELINE.is_dir(), reason="the tiny pipelines are not there")
def test_recorded_calls_of_a_pipeline():
    """Every call of the network that ZImagePipeline made, conditional and unconditional caption side by side."""
    recorded = np.load(PIPELINE / "run.npz")
    model, params = load_z_image(PIPELINE / "transformer", size=(8, 12), text_tokens=40, param_dtype="float32")
    network = compiled(model)
    for i in range(sum(name.startswith("call/") and name.endswith("/in/t") for name in recorded)):
        captions = [recorded[f"call/{i}/in/cap_feats/{j}"] for j in range(2)]
        text, mask = np.zeros((2, 40, 32), np.float32), np.zeros((2, 40), np.int32)
        for j, caption in enumerate(captions):
            text[j, : len(caption)], mask[j, : len(caption)] = caption, 1
        x, output = (np.stack([recorded[f"call/{i}/{of}/{j}"][:, 0] for j in range(2)]) for of in ("in/x", "out"))
        run = {"x": x, "t": 1 - recorded[f"call/{i}/in/t"], "text": text, "mask": mask, "output": output}
        error = relative_errors(network, params, run).max()
        print(f"call {i}: error {error:.1e}")
        assert error <= TOLERANCE


@pytest.mark.skipif(not PIPELINE.is_dir(), reason="the tiny pipelines are not there")
def test_recorded_run_of_a_pipeline():
    """Its four guided steps from its first latents: sigmas 1 ... 1/n shifted by 3, c + 4 (c - u), which is a scale of
    5."""
    recorded = np.load(PIPELINE / "run.npz")
    captions = [recorded[f"embeds/0/{j}/0"] for j in range(2)]
    most = max(map(len, captions))
    model, params = load_z_image(PIPELINE / "transformer", size=(8, 12), text_tokens=most, param_dtype="float32")
    text, mask = np.zeros((2, most, 32), np.float32), np.zeros((2, most), np.int32)
    for j, caption in enumerate(captions):
        text[j, : len(caption)], mask[j, : len(caption)] = caption, 1
    cond = {"text": text[:1], "mask": mask[:1], "null_text": text[1:], "null_mask": mask[1:]}
    process = PROCESSES["flow"](shift=3.0)
    times = make_times(GRIDS["shifted"](), process, 4)
    np.testing.assert_allclose(times, recorded["sigmas"], atol=1e-6)
    rows = make_rows(SOLVERS["euler"](), GUIDES["cfg"](), process, times)
    sampler = make_sampler(model, process, "velocity", SOLVERS["euler"](), GUIDES["cfg"]())
    x = jnp.asarray(recorded["latents0"].transpose(0, 2, 3, 1))
    with jax.default_matmul_precision("highest"):
        got, _ = sampler(params, x, noise.sample_keys(0, 1), jax.tree.map(jnp.asarray, cond), rows, 5.0)
    want = recorded["step/3/prev"].transpose(0, 2, 3, 1)
    error = np.abs(np.asarray(got) - want).max() / np.abs(want).max()
    print(f"four steps: error {error:.1e}")
    assert error <= 1e-4


# ---- as a model of difax ---------------------------------------------------------------------------------------


@functools.cache
def tiny() -> Any:
    """(model, params, network)"""
    model = z_image(**TINY)
    return model, randomise(jax.eval_shape(model.init, jax.random.key(0))), compiled(model)


def test_init_makes_the_parameters_and_starts_from_zero():
    model, _, network = tiny()
    params = jax.jit(model.init)(jax.random.key(0))
    x = jnp.ones((2, *model.input_shape))
    np.testing.assert_array_equal(network(params, x, jnp.ones(2), random_conditions(model, 2)), jnp.zeros_like(x))
    np.testing.assert_array_equal(params["blocks"]["attn_norm1"]["scale"], 1)
    assert params["caption"]["qkv"]["kernel"].shape == (1, 12, 36) and params["blocks"]["qkv"]["kernel"].std() > 0.1


def test_refiners_have_the_image_alone_and_blocks_both_streams():
    model, params, _ = tiny()
    x = jax.ShapeDtypeStruct((2, *model.input_shape), jnp.float32)
    spec = trunk_spec(model, params, x, random_conditions(model, 2))
    whole = {"txt": (2, 32, 12), "img": (2, 32, 12)}
    assert jax.tree.map(jnp.shape, spec.tokens) == whole and spec.hidden.shape == (2, 6, 12)
    for stage, shapes in {"refiner": {"img": (2, 32, 12)}, "blocks": whole}.items():
        assert jax.tree.map(jnp.shape, spec.within[stage]) == shapes
        assert all(jax.tree.map(jnp.shape, u) == shapes for u in spec.update[stage].values())
        call = spec.attention[stage]["attn"]
        assert call is not None and call.q.shape == (2, 32 * len(shapes), 2, 6) and spec.attention[stage]["mlp"] is None
        assert call.segments is None  # a caption of up to 32 tokens is filled to 32, and nothing is beyond it


def test_null_replaces_text_and_mask():
    model, _, _ = tiny()
    cond = random_conditions(model, 2)
    null = model.null(cond)
    assert jax.tree.structure(null) == jax.tree.structure(cond)
    assert null["text"] is cond["null_text"] and null["mask"] is cond["null_mask"]


def run_of(cache: Any = None, ahead: bool = False, steps: int = 2) -> Any:
    """(samples, trace, what the plain network gives step by step) of two guided Euler steps."""
    model, params, network = tiny()
    process, scale = PROCESSES["flow"](shift=3.0), 2.0
    times = make_times(GRIDS["shifted"](), process, steps)
    rows = make_rows(SOLVERS["euler"](), GUIDES["cfg"](), process, times, cache, model.stages)
    cond, keys = random_conditions(model, 2), noise.sample_keys(0, 2)
    x = initial_noise(process, keys, model.input_shape)
    expected = x
    for now, then in zip(times, times[1:], strict=False):
        on, off = (network(params, expected, jnp.full(2, 1000.0 * now), c) for c in (cond, model.null(cond)))
        assert jnp.abs(off - on).max() > 1e-2
        expected = expected + (then - now) * (off + scale * (on - off))
    sampler = make_sampler(model, process, "velocity", SOLVERS["euler"](), GUIDES["cfg"](), cache, ahead=ahead)
    samples, trace = sampler(params, x, keys, jax.tree.map(jnp.asarray, cond), rows, scale)
    return samples, trace, expected


@pytest.mark.parametrize("ahead", some([False, True], True))
def test_sampler_integrates_the_velocity(ahead):
    """Against the same written out with the plain network, the caption refined before the run or in every step."""
    samples, trace, expected = run_of(ahead=ahead)
    error = float(jnp.abs(samples - expected).max() / jnp.abs(expected).max())
    print(f"sampler, ahead {ahead}: error {error:.1e}")
    assert error < 1e-5 and float(trace.ahead) == 2 * ahead
    assert {n: a.shape for n, a in trace.computed.items()} == {"refiner": (2, 1, 2, 2), "blocks": (2, 2, 2, 2)}


# what fills a branch, a span that begins behind the refiners or within them, a block, some of the tokens: over the
# border between one stream and both; the share of the refiners' and of the blocks' branches that the last of 6
# evaluations computes
FILLED: dict[str, Any] = {
    "fora": ({"interval": 6}, (0.0, 0.0)),
    "teacache": ({"threshold": 1e6}, (1.0, 1.0)),
    "dbcache": ({"threshold": 1e6, "first": 1, "last": 1, "warmup": 1}, (1.0, 0.5)),
    "dbprune": ({"threshold": 2.0, "first": 0, "last": 0, "warmup": 1}, (0.0, 0.0)),
    "fastcache": ({"threshold": 1e6}, (0.0, 0.0)),
    "adacache": ({"block": 0, "codebook": ((1e6, 4),)}, (1.0, 1.0)),
    "toca": ({"interval": 4}, None),
    "delta_dit": ({}, None),
}


@pytest.mark.parametrize("name", some(FILLED, "dbcache"))
def test_caches_cross_the_border_between_the_stages(name):
    settings, share = FILLED[name]
    samples, trace, expected = run_of(CACHES[name](**settings), steps=6)
    computed = tuple(float(trace.computed[s][-1].mean()) for s in ("refiner", "blocks"))
    error = float(jnp.linalg.norm(samples - expected) / jnp.linalg.norm(expected))
    print(f"{name}: error {error:.1e}, of the last evaluation computed {computed}")
    assert bool(jnp.isfinite(samples).all()) and 1e-6 < error < 1
    assert float(trace.computed["blocks"].min()) == 0 or name == "toca"
    assert share is None or computed == pytest.approx(share)


@pytest.mark.slow
def test_bfloat16_is_near_float32():
    model, params, network = tiny()
    half = compiled(z_image(**TINY, dtype="bfloat16"))
    x = jnp.asarray(np.random.default_rng(4).normal(size=(2, *model.input_shape)), jnp.float32)
    cond, time = random_conditions(model, 2), jnp.array([900.0, 100.0])
    output = network(params, x, time, cond)
    rounded = half(jax.tree.map(lambda a: a.astype(jnp.bfloat16), params), x, time, cond)
    assert rounded.dtype == jnp.bfloat16 and bool(jnp.isfinite(rounded).all())
    error = jnp.linalg.norm(rounded.astype(jnp.float32) - output) / jnp.linalg.norm(output)
    print(f"bfloat16: relative error {error:.1e}")
    assert error < 0.05


GEOMETRY_REFUSALS = {
    "depth": ({"refiner_depth": 0}, "refiner_depth=0; allowed: 1 or more"),
    "heads": ({"heads": 5}, "width=12 must be divisible by heads=5"),
    "axes": ({"axes_dim": (2, 2, 4)}, r"axes_dim=\(2, 2, 4\); allowed: three even .* head width 6"),
    "theta": ({"theta": 0}, "theta=0.0; allowed: > 0"),
    "eps": ({"norm_eps": 0.0}, "norm_eps=0.0; allowed: > 0"),
    "odd size": ({"size": (4, 5)}, "size=4x5; allowed: even"),
    "places": ({"max_positions": (33, 2, 3)}, r"have places up to \(34, 2, 3\); allowed: max_positions=\(33, 2, 3\)"),
    "axes of places": ({"max_positions": (64, 8)}, r"max_positions=\(64, 8\); allowed: three"),
    "dtype": ({"dtype": "float16"}, "dtype=float16; allowed: float32, bfloat16"),
}


@pytest.mark.parametrize("case", GEOMETRY_REFUSALS)
def test_geometry_is_refused(case):
    overrides, words = GEOMETRY_REFUSALS[case]
    with pytest.raises(ValueError, match=words):
        z_image(**(TINY | overrides))


# ---- layouts and config.json -----------------------------------------------------------------------------------


def _put(name: str, *shape: int) -> Any:
    return lambda t: t.update({name: np.ones(shape, np.float16)})


REFUSALS: dict[str, Any] = {
    "missing": ("original", lambda t: t.pop("cap_pad_token"), {}, ["'cap_pad_token'", "ends/txt_pad", "missing"]),
    "surplus": ("original", _put("siglip_embedder.0.weight", 2), {}, ["surplus tensor 'siglip_embedder.0.weight'"]),
    "grouped keys": (
        "original",
        _put("layers.1.attention.qkv.weight", 40, 20),
        {},
        ["'layers.1.attention.qkv.weight'", "wrong shape (40, 20)", "expected (60, 20)"],
    ),
    "another input than output": (
        "diffusers",
        _put("all_x_embedder.2-1.weight", 20, 32),
        {},
        ["takes 32 features a token and emits 16"],
    ),
    "no rotary sections": ("original", None, {"axes_dim": None}, ["head width of 10", "give axes_dim="]),
    "unknown argument": ("original", None, {"head": 2}, ["'head'", "nearest: 'heads'"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses(tmp_path, case):
    layout, edit, arguments, words = REFUSALS[case]
    tensors = load_file(weights(layout))
    if edit is not None:
        edit(tensors)
    save_file(tensors, tmp_path / "z_image.safetensors")
    arguments = {k: v for k, v in (GIVEN | arguments).items() if v is not None}
    with pytest.raises(ValueError) as error:
        load_z_image(tmp_path / "z_image.safetensors", **arguments)
    for word in words:
        assert word in str(error.value)


def test_a_norm_that_nothing_reads_may_be_there(tmp_path):
    """As diffusers' converter drops it."""
    save_file(
        load_file(weights("original")) | {"norm_final.weight": np.ones(20, np.float16)}, tmp_path / "a.safetensors"
    )
    _, params = load_z_image(tmp_path / "a.safetensors", param_dtype="float32", **GIVEN)
    jax.tree.map(np.testing.assert_array_equal, params, loaded("original")[1])


CONFIG = {
    "_class_name": "ZImageTransformer2DModel",
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "axes_dims": [2, 4, 4],
    "axes_lens": [128, 16, 16],
    "n_heads": 2,
    "n_kv_heads": 1,  # which the class does not read
    "norm_eps": 1e-3,
    "rope_theta": 100.0,
    "t_scale": 10.0,
    "siglip_feat_dim": None,
    "of another version": True,
}
CONFIG_REFUSALS = {
    "patch": ({"all_patch_size": [1]}, "all_patch_size=.*allowed: a list of 1, each 2"),
    "patches": ({"all_patch_size": [2, 4], "all_f_patch_size": [1, 1]}, "all_patch_size="),
    "frames": ({"all_f_patch_size": [2]}, "all_f_patch_size="),
    "omni": ({"siglip_feat_dim": 1152}, "siglip_feat_dim=1152; allowed: null .*omni"),
    "heads": ({"n_heads": 4}, "n_heads=4; allowed: 2, as the checkpoint's tensors say"),
    "norms": ({"qk_norm": False}, "qk_norm=False; allowed: True, as the checkpoint's tensors say"),
    "axes": ({"axes_dims": [4, 4, 4]}, r"axes_dims=\[4, 4, 4\]; allowed: three even widths that add up to 10"),
    "places": ({"axes_lens": [64, 16, 16]}, r"max_positions=\(64, 16, 16\)"),
    "class": ({"_class_name": "Lumina2Transformer2DModel"}, "allowed: ZImageTransformer2DModel"),
}


def test_config_json_is_read(tmp_path):
    save_file(load_file(weights("diffusers")), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    model, _ = load_z_image(tmp_path, size=(8, 12), text_tokens=63)
    c = model.stages[0].block.config
    assert (c.axes_dim, c.max_positions, c.norm_eps, c.theta, c.time_scale) == ((2, 4, 4), (128, 16, 16), 1e-3, 100, 10)
    for case, (changed, words) in CONFIG_REFUSALS.items():
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | changed))
        with pytest.raises(ValueError, match=words):
            load_z_image(tmp_path, size=(8, 12), text_tokens=63)
            pytest.fail(case)


def test_configurations_build_their_models():
    found = {}
    for module, arg in ((z_image_config, "base"), (z_image_config, "turbo-768x1360"), (z_image_tiny, "")):
        config = (module.get_config(arg) if arg else module.get_config()).to_dict()
        section = dict(config["model"])
        assert section.pop("name") == "z_image"
        model = z_image(**section)
        times = make_times(GRIDS[config["grid"]["name"]](), make_process(config["process"], model), config["steps"])
        sigmas = np.linspace(1, 1 / config["steps"], config["steps"])  # of the pipeline, which shifts them by 3
        np.testing.assert_allclose(times, [*(3 * sigmas / (1 + 2 * sigmas)), 0], rtol=1e-6)
        found[f"{model.name}:{arg}"] = (model.input_shape, config["steps"], config["guide"]["name"], config["scale"])
    assert found["z_image:base"] == ((128, 128, 16), 50, "cfg", 6.0)
    assert found["z_image:turbo-768x1360"] == ((96, 170, 16), 8, "none", 1.0)
    for arg, words in {"fast": "fast; allowed: base, turbo", "turbo-1000": "1000; allowed"}.items():
        with pytest.raises(ValueError, match=f"config z_image:{words}"):
            z_image_config.get_config(arg)


# ---- live, with the `parity` extra -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("qk_norm", [True, False])
def test_matches_diffusers_live(tmp_path, qk_norm):
    """A model of another geometry than the golden one, saved by diffusers itself in shards with its config.json."""
    pytest.importorskip("torch", reason="needs the parity extra (torch, diffusers)")
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra (torch, diffusers)")
    spec = importlib.util.spec_from_file_location("make_z_image", GOLDEN / "make_z_image.py")
    assert spec is not None and spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    reference = diffusers.ZImageTransformer2DModel(
        in_channels=8,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=1,
        cap_feat_dim=20,
        norm_eps=1e-3,
        qk_norm=qk_norm,
        rope_theta=100.0,
        t_scale=500.0,
        axes_dims=[4, 8, 4],
        axes_lens=[256, 32, 32],
    )
    reference = reference.eval().requires_grad_(False)
    make.randomise(reference, seed=2)
    run = {k: np.asarray(a) for k, a in make.run(reference, (16, 8), (7, 100, 33), (0.9, 0.5, 0.1), seed=3).items()}
    state = {name: a.clone() for name, a in reference.state_dict().items()}
    reference.save_pretrained(tmp_path / "diffusers", max_shard_size="700KB")
    assert len(list((tmp_path / "diffusers").glob("*.safetensors"))) > 1
    original = make.to_original(state)
    make.check_conversion(original, state)
    save_file({name: a.numpy() for name, a in original.items()}, tmp_path / "original.safetensors")
    model, params = load_z_image(tmp_path / "diffusers", size=(16, 8), text_tokens=100)
    errors = relative_errors(compiled(model), params, run)
    print("live: " + ", ".join(f"t={t:.1f}: {e:.1e}" for t, e in zip(run["t"], errors, strict=True)))
    assert errors.max() <= TOLERANCE
    _, same = load_z_image(tmp_path / "original.safetensors", size=(16, 8), heads=3, axes_dim=(4, 8, 4))
    jax.tree.map(np.testing.assert_array_equal, params, same)
