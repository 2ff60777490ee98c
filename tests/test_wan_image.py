"""Wan's image-to-video networks and the one with a time per token, against diffusers' WanTransformer3DModel.

tests/golden/wan_more.npz holds what diffusers computed (tests/golden/make_wan_more.py); weights and inputs are drawn
anew.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import difax
from difax.accel.caches import CACHES
from difax.accel.solvers import euler
from difax.checkpoints import recognise, settings_of
from difax.config import load_config, override
from difax.core.grids import make_times, uniform
from difax.core.guidance import cfg
from difax.core.noise import sample_keys
from difax.core.process import flow
from difax.core.sample import initial_noise, make_rows, make_sampler
from difax.core.shapes import trunk_spec
from difax.core.trunk import forward
from difax.models.wan import VARIANTS, image_condition, wan, with_first_frame
from difax.models.wan_checkpoint import load_wan
from difax.weights.published import load_foreign
from tests.families import some
from tests.golden.make_wan_more import CASES, SIZE, TEXT, draw_inputs, draw_tensors
from tests.toys import randomise

GOLDEN = Path(__file__).parent / "golden" / "wan_more.npz"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files} | {"facts": json.loads(str(file["facts"]))}


def write(folder: Path, facts: dict[str, Any], case: str, layout: str = "diffusers", **changes: Any) -> dict[str, Any]:
    """A folder as diffusers writes it, or the original's file alone; the arguments that neither tells."""
    tensors = draw_tensors(case, facts[case]["shapes"])
    if layout == "original":
        tensors = {facts[case]["original"][name]: a for name, a in tensors.items()}
    else:
        (folder / "config.json").write_text(json.dumps(facts[case]["config"] | changes))
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    given: dict[str, Any] = {"size": SIZE, "text_tokens": TEXT, "first_frame": case == "ti2v"}
    if layout == "original":
        given |= {"heads": 2, "eps": facts[case]["config"]["eps"], "max_positions": 32}
    tokens = draw_inputs(case).get("image")
    return given if tokens is None else given | {"image_tokens": tokens.shape[1]}


def output_of(model: Any, params: Any, case: str, **changed: Any) -> np.ndarray:
    inputs = draw_inputs(case) | changed
    x, t = inputs.pop("x"), inputs.pop("t")
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda p, *given: forward(model, p, *given))(params, x, t, inputs))


def error_of(output: np.ndarray, golden: Any, case: str) -> float:
    """Largest difference from diffusers, over its largest output."""
    wanted = np.moveaxis(golden[case], 1, -1)
    return float(np.abs(output - wanted).max() / np.abs(wanted).max())


EVERY_RUN = ("i2v 2.1", "ti2v")


@pytest.mark.parametrize("case", some(CASES, *EVERY_RUN))
def test_matches_diffusers(tmp_path, golden, case):
    given = write(tmp_path, golden["facts"], case)
    found = recognise(str(tmp_path), **given)
    output = output_of(found.model, load_foreign(tmp_path, found), case)
    error = error_of(output, golden, case)
    print(f"{case}: error {error:.1e}")
    assert error <= TOLERANCE


@pytest.mark.parametrize("case", some(CASES, "flf2v"))
def test_both_layouts_are_the_same_parameters(tmp_path, golden, case):
    loaded = []
    for layout in ("diffusers", "original"):
        (tmp_path / layout).mkdir()
        given = write(tmp_path / layout, golden["facts"], case, layout)
        loaded.append(load_wan(tmp_path / layout, **given))
    (model, params), (other, same) = loaded
    assert settings_of(model) == settings_of(other)
    jax.tree.map(np.testing.assert_array_equal, params, same)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["condition", "image", "first_frame"])
def test_another_input_is_another_output(tmp_path, golden, name):
    """Whatever a picture gives reaches the output."""
    case = "ti2v" if name == "first_frame" else "flf2v"
    model, params = load_wan(tmp_path, **write(tmp_path, golden["facts"], case))
    other = output_of(model, params, case, **{name: draw_inputs(case)[name][::-1]})
    assert error_of(other, golden, case) > 1e-2


@pytest.mark.slow
def test_the_image_is_attended_to_apart(tmp_path, golden):
    """With one softmax over caption and image the function is another."""
    model, params = load_wan(tmp_path, **write(tmp_path, golden["facts"], "i2v 2.1"))
    together = wan(**{**settings_of(model), "dtype": "float32", "added_kv": False})
    assert error_of(output_of(together, params, "i2v 2.1"), golden, "i2v 2.1") > 1e-3


def test_norms_that_no_version_reads_are_passed_over(tmp_path, golden):
    tensors = draw_tensors("i2v 2.1", golden["facts"]["i2v 2.1"]["shapes"])
    given = write(tmp_path, golden["facts"], "i2v 2.1")
    known = load_wan(tmp_path, **given)[1]
    tensors |= {f"blocks.{i}.attn2.norm_added_q.weight": np.ones(20, np.float32) for i in range(2)}
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, known, load_wan(tmp_path, **given)[1])


@pytest.mark.slow
def test_published_geometries():
    """Image-to-video of 2.1, first and last frame, 2.2's A14B and 5B: parameters of diffusers' models."""
    i2v = {"condition_channels": 20}
    clip = i2v | {"image_width": 1280}
    for variant, settings, count in (
        ("14B", clip, 16_394_878_784),
        ("14B", clip | {"image_tokens": 514, "image_positions": True}, 16_395_536_704),
        ("14B", i2v, 14_288_901_184),
        ("5B", {"channels": 48, "size": (31, 44, 80), "first_frame": True}, 4_999_787_712),
    ):
        model = wan(variant, **settings)
        spec = jax.eval_shape(model.init, jax.random.key(0))
        assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(spec)) == count, (variant, settings)
    assert VARIANTS["5B"] == (30, 3072, 24, 14336)
    assert model.cond["first_frame"].shape == (44, 80, 48)


@pytest.mark.parametrize("last", [False, True])
def test_the_mask_of_the_frames_that_are_given(last):
    """As WanImageToVideoPipeline makes it: of all frames, the first one four times, folded into channels."""
    frames = 9
    mask = np.ones((2, 1, frames, 4, 6), np.float32)
    mask[:, :, 1 : frames - 1 if last else frames] = 0
    mask = np.concatenate([np.repeat(mask[:, :, :1], 4, axis=2), mask[:, :, 1:]], axis=2)
    mask = mask.reshape(2, -1, 4, 4, 6)  # [B, F, 4, H, W]
    latents = np.random.default_rng(0).normal(size=(2, 3, 4, 6, 5)).astype(np.float32)
    wanted = np.concatenate([mask.transpose(0, 1, 3, 4, 2), latents], axis=-1)
    np.testing.assert_array_equal(image_condition(jnp.asarray(latents), last), wanted)


# ---- sampling --------------------------------------------------------------------------------------------------------


def test_the_first_frame_is_put_in():
    x, first = np.zeros((2, 3, 4, 6, 5)), np.ones((2, 4, 6, 5))
    placed = np.asarray(with_first_frame(jnp.asarray(x), jnp.asarray(first)))
    assert (placed[:, 0] == 1).all() and (placed[:, 1:] == 0).all()


def tiny(**settings: Any) -> tuple[Any, Any, Any]:
    geometry: dict[str, Any] = dict(depth=2, width=16, heads=2, ffn=24, channels=3, text_tokens=3, text_width=8)
    model = wan(**geometry, size=(2, 4, 4), **settings)
    rng = np.random.default_rng(0)
    cond = {k: rng.normal(size=(2, *s.shape)).astype(np.float32) for k, s in model.cond.items()}
    return model, randomise(jax.eval_shape(model.init, jax.random.key(0))), cond


ALL: dict[str, Any] = {"condition_channels": 2, "image_width": 8, "image_tokens": 5, "first_frame": True}


def drawn(model: Any, params: Any, cond: Any, cache: Any = None, **options: Any) -> np.ndarray:
    process, keys, guide = flow(), sample_keys(0, 2), cfg()
    rows = make_rows(euler(), guide, process, make_times(uniform(), process, 4), cache, model.stages)
    sampler = make_sampler(model, process, "velocity", euler(), guide, cache, **options)
    return np.asarray(sampler(params, initial_noise(process, keys, model.input_shape), keys, cond, rows, 3.0)[0])


def test_samples_with_all_of_it():
    """A branch attends once; what is known ahead changes nothing."""
    model, params, cond = tiny(**ALL)
    spec = trunk_spec(model, params, jnp.zeros((2, 2, 4, 4, 3)), cond)
    call = spec.attention["blocks"]["cross"]
    assert call is not None and call.segments is not None
    assert (call.q.shape, call.k.shape) == ((2, 16, 2, 8), (2, 8, 2, 8))
    plain, ahead = drawn(model, params, cond), drawn(model, params, cond, ahead=True)
    assert np.isfinite(plain).all() and np.abs(ahead - plain).max() <= 1e-5 * np.abs(plain).max()


@pytest.mark.slow
def test_a_cache_acts():
    model, params, cond = tiny(**ALL)
    plain = drawn(model, params, cond)
    cached = drawn(model, params, cond, CACHES["fora"](interval=2))
    assert 1e-4 < np.abs(cached - plain).max() / np.abs(plain).max() < 1


@pytest.mark.slow
def test_a_mesh_draws_what_one_device_draws():
    config = override(load_config("wan_tiny"), [("model.size", (2, 4, 4)), ("model.depth", 1), ("steps", 2)])
    config["model"] |= ALL | {"image_tokens": 8}
    runs = (difax.load(config, **more) for more in ({}, {"mesh": "seq=2,tensor=2"}))
    one, many = (np.asarray(run.sample(repeat=2).images) for run in runs)
    assert np.abs(one - many).max() <= 1e-5 * np.abs(one).max()


# ---- refusals --------------------------------------------------------------------------------------------------------

SAYS = {
    "no image": ("i2v 2.2", {"image_dim": 12}, r"image_dim=12; allowed: null, as the checkpoint's tensors say"),
    "another image": ("i2v 2.1", {"image_dim": 13}, r"image_dim=13; allowed: 12, as"),
    "no keys": ("image without keys of its own", {"added_kv_proj_dim": 20}, r"added_kv_proj_dim=20; allowed: null"),
    "positions": ("flf2v", {"pos_embed_seq_len": 7}, r"pos_embed_seq_len=7; allowed: 14, as"),
    "channels": ("i2v 2.1", {"in_channels": 3}, r"in_channels=3; allowed: 8, as"),
    "text-to-video": ("i2v 2.2", {"model_type": "t2v"}, r"model_type='t2v'; allowed: i2v or flf2v, by its 5 channels"),
    "another kind": ("i2v 2.2", {"model_type": "vace"}, r"model_type='vace'; allowed: t2v or i2v or flf2v or ti2v"),
}


@pytest.mark.parametrize("says", SAYS)
def test_a_config_that_contradicts_is_refused(tmp_path, golden, says):
    case, changes, words = SAYS[says]
    with pytest.raises(ValueError, match=words):
        load_wan(tmp_path, **write(tmp_path, golden["facts"], case, **changes))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"condition_channels": -1}, "condition_channels=-1; allowed: 0 or more"),
        ({"image_width": 0}, "image_width=0, image_tokens=257; allowed: 1 or more"),
        ({"first_frame": True, "patch": (2, 2, 2)}, "first_frame=True with patch=.*; allowed: patches of one frame"),
    ],
)
def test_factory_refuses(settings, words):
    with pytest.raises(ValueError, match=words):
        tiny(**settings)
