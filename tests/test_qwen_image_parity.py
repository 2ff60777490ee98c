"""Qwen-Image against diffusers' QwenImageTransformer2DModel.

The golden files (tests/golden/make_qwen_image.py) hold one tiny model, every layer random, and what diffusers computed
of it for prompts of several lengths on two sizes. Errors are printed (pytest -rP): largest difference over the largest
output.
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

import difax
from difax.build import build_setup
from difax.checkpoints import recognise
from difax.config import load_config, mesh_settings, override
from difax.configs import qwen_image as published
from difax.core.shapes import trunk_spec
from difax.core.trunk import forward
from difax.models.qwen_image import centred_positions, qwen_image
from difax.models.qwen_image_checkpoint import DIFFUSERS, load_qwen_image
from difax.weights.conditions import random_conditions
from tests.families import some

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = GOLDEN / "qwen_image_diffusers.safetensors"
PIPELINE = Path(__file__).parents[2] / "shared" / "pipelines" / "qwen_image"
TOLERANCE = 1e-5  # measured 4e-6
AXES = (2, 4, 4)
SIZES = [(8, 12), (10, 6)]  # the second has odd numbers of rows and columns of tokens
TINY: dict[str, Any] = dict(
    depth=1, width=12, heads=2, size=(4, 6), channels=2, text_tokens=3, text_width=5, axes_dim=(2, 2, 2)
)
CONFIG = {
    "_class_name": "QwenImageTransformer2DModel",
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 10,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "guidance_embeds": False,
    "axes_dims_rope": list(AXES),
    "zero_cond_t": False,
    "use_additional_t_cond": False,
    "use_layer3d_rope": False,
}


@functools.cache
def loaded(size: tuple[int, int]) -> Any:
    """(model, params, network)"""
    model, params = load_qwen_image(WEIGHTS, size=size, axes_dim=AXES, param_dtype="float32")
    return model, params, jax.jit(functools.partial(forward, model))


def golden(size: tuple[int, int]) -> dict[str, np.ndarray]:
    """x and output [B, H, W, C], t, text and mask."""
    run, name = load_file(GOLDEN / "qwen_image_run.safetensors"), "x".join(map(str, size))
    x, output = (run[f"{key}_{name}"].transpose(0, 2, 3, 1) for key in ("x", "output"))
    return {"x": x, "output": output, **{key: run[key] for key in ("t", "text", "mask")}}


def answer(network: Any, params: Any, run: dict[str, Any]) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(network(params, run["x"], 1000 * run["t"], {key: run[key] for key in ("text", "mask")}))


def errors(output: np.ndarray, run: dict[str, Any]) -> np.ndarray:
    """Per sample: largest difference from the reference, over the reference's largest output."""
    return np.abs(output - run["output"]).max(axis=(1, 2, 3)) / np.abs(run["output"]).max()


# ---- parity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_matches_diffusers(size):
    _, params, network = loaded(size)
    run = golden(size)
    found = errors(answer(network, params, run), run)
    for t, length, error in zip(run["t"], run["mask"].sum(1), found, strict=True):
        print(f"{size}: t={t:<4.2f}, a prompt of {length}: error {error:.1e}")
    assert found.max() <= TOLERANCE


def _swap_halves(params):
    ada = {k: np.roll(a, a.shape[-1] // 2, axis=-1) for k, a in params["ends"]["ada"].items()}
    return {**params, "ends": {**params["ends"], "ada": ada}}


def _swap_streams(params):
    return {**params, "double": {"img": params["double"]["txt"], "txt": params["double"]["img"]}}


def _no_text_norm(params):
    return {**params, "ends": {**params["ends"], "txt_norm": jnp.ones_like(params["ends"]["txt_norm"])}}


# a change of the weights or of the inputs that a wrong implementation would amount to
WRONG: dict[str, Any] = {
    "scale and shift of the final layer swapped": (_swap_halves, lambda run: run),
    "text and image streams swapped": (_swap_streams, lambda run: run),
    "no scale of the normed text": (_no_text_norm, lambda run: run),
    "padding not masked": (None, lambda run: {**run, "mask": np.ones_like(run["mask"])}),
    "time without its factor": (None, lambda run: {**run, "t": run["t"] / 1000}),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_numerics_fail(case):
    """The comparison can fail: each error is far above the tolerance."""
    edit, change = WRONG[case]
    _, params, network = loaded(SIZES[0])
    run = change(golden(SIZES[0]))
    error = errors(answer(network, edit(params) if edit else params, run), run).max()
    print(f"{case}: error {error:.1e}")
    assert error > 1e-2


@pytest.mark.parametrize("rows, columns", [(4, 6), (5, 3), (1, 1)])
def test_positions_are_centred_and_text_begins_behind_them(rows, columns):
    """As QwenEmbedRope lays them: from -(n - n//2) up to n//2 - 1."""
    text = max(rows // 2, columns // 2)
    expected = [[text + i] * 3 for i in range(4)]
    expected += [[0, i - (rows - rows // 2), j - (columns - columns // 2)] for i in range(rows) for j in range(columns)]
    np.testing.assert_array_equal(centred_positions(4, rows, columns), expected)


def test_a_prompt_alone_is_the_prompt_with_padding():
    """However long the padding is and whatever stands in it."""
    model, params, _ = loaded(SIZES[0])
    run = {key: a[:2] for key, a in golden(SIZES[0]).items()}
    network = jax.jit(functools.partial(forward, model))
    one = {**run, "text": run["text"][:, :3], "mask": np.ones((2, 3), np.int32)}
    alone = answer(network, params, one)
    for fill in (0.0, np.nan, 1e30):
        text = np.full((2, 9, 12), fill, np.float32)
        text[:, :3] = one["text"]
        padded = {**run, "text": text, "mask": np.broadcast_to(np.int32(np.arange(9) < 3), (2, 9))}
        output = answer(network, params, padded)
        assert np.abs(output - alone).max() <= 2e-6 * np.abs(alone).max(), fill
    assert np.abs(answer(network, params, {**one, "mask": np.int32([[1, 1, 0]] * 2)}) - alone).max() > 1e-3


@pytest.mark.skipif(not PIPELINE.is_dir(), reason="the tiny pipelines are not there")
def test_recorded_calls_of_a_pipeline():
    """Opened from its folder; both prompts are padded to one length, so that they are one program."""
    with np.load(PIPELINE / "run.npz") as file:
        arrays = {name: file[name] for name in file.files}
    arrays |= {name: arrays[of] for name, of in json.loads((PIPELINE / "run.json").read_text())["same"].items()}
    rows, columns = (int(arrays[f"call/0/in/img_shapes/0/0/{i}"]) for i in (1, 2))
    model, params = load_qwen_image(PIPELINE / "transformer", size=(2 * rows, 2 * columns), text_tokens=40)
    network = jax.jit(functools.partial(forward, model))

    def unpacked(a: np.ndarray) -> np.ndarray:
        parts = a.reshape(-1, rows, columns, model.input_shape[-1], 2, 2).transpose(0, 1, 4, 2, 5, 3)
        return parts.reshape(-1, *model.input_shape)

    for i in range(8):
        call = {name.removeprefix(f"call/{i}/in/"): a for name, a in arrays.items() if name.startswith(f"call/{i}/")}
        text = call["encoder_hidden_states"]
        more = 40 - text.shape[1]
        mask = np.pad(np.ones(text.shape[:2], np.int32), ((0, 0), (0, more)))
        run = {"x": unpacked(call["hidden_states"]), "t": call["timestep"], "mask": mask}
        run["text"] = np.pad(text, ((0, 0), (0, more), (0, 0)))
        run["output"] = unpacked(arrays[f"call/{i}/out"])
        (error,) = errors(answer(network, params, run), run)
        print(f"call {i}: t={run['t'][0]:.3f}, a prompt of {text.shape[1]}: error {error:.1e}")
        assert error <= 3e-5
    config = override(load_config("qwen_image"), [("model.depth", 1), ("model.width", 128), ("model.heads", 1)])
    setup = build_setup(override(config, [("model.size", (2 * rows, 2 * columns)), ("steps", 4)]))
    np.testing.assert_allclose(setup.times, arrays["sigmas"], atol=1e-6)  # the published configuration's times


# ---- checkpoints -----------------------------------------------------------------------------------------------


def write(folder: Path, edit: Any = None, prefix: str = "", **config: Any) -> Path:
    """A folder as diffusers writes it."""
    tensors = load_file(WEIGHTS)
    if edit is not None:
        edit(tensors)
    save_file({prefix + name: a for name, a in tensors.items()}, folder / "diffusion_pytorch_model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return folder


def test_geometry_comes_from_the_tensors():
    model, params = load_qwen_image(WEIGHTS, size=(8, 12), axes_dim=AXES)
    c = model.stages[0].block.config
    assert [(s.name, s.depth, s.branches) for s in model.stages] == [("double", 2, ("attn", "mlp"))]
    assert (c.width, c.heads, c.channels, c.text_width, c.mlp_ratio) == (20, 2, 4, 12, 4)
    assert model.input_shape == (8, 12, 4) and (model.classes, model.learn_sigma) == (0, False)
    assert {str(a.dtype) for a in jax.tree.leaves(params)} == {"float16"}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_folder_and_a_single_file_are_recognised(tmp_path, prefix):
    """Keys that say nothing are read over, missing ones are the class's defaults."""
    write(tmp_path, prefix=prefix, **CONFIG | {"num_layers": ..., "_name_or_path": "x", "pooled_projection_dim": 768})
    found = recognise(str(tmp_path), size=(8, 12))
    assert (found.kind, found.geometry["axes_dim"]) == ("qwen_image", AXES)
    _, params = load_qwen_image(tmp_path, size=(8, 12))
    jax.tree.map(np.testing.assert_array_equal, params, load_qwen_image(WEIGHTS, axes_dim=AXES)[1])


def _put(name: str, *shape: int) -> Any:
    return lambda tensors: tensors.__setitem__(name, np.zeros(shape, np.float16))


# edit of the tensors, of config.json, words of the message
REFUSALS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "a network that edits": (
        None,
        {"zero_cond_t": True},
        "zero_cond_t=True; allowed: false .with it the network edits",
    ),
    "layers": (None, {"use_additional_t_cond": True}, "use_additional_t_cond=True; allowed: false .*layers"),
    "positions of layers": (None, {"use_layer3d_rope": True}, "use_layer3d_rope=True; allowed: false .*layers"),
    "guidance": (None, {"guidance_embeds": True}, "guidance_embeds=True; allowed: false"),
    "sections": (None, {"axes_dims_rope": [4, 4, 4]}, "axes_dims_rope=.*; allowed: three even widths .* 10"),
    "heads": (None, {"num_attention_heads": 4}, "num_attention_heads=4; allowed: 2, as the checkpoint's tensors say"),
    "channels": (None, {"out_channels": 8}, "patch_size=2 and out_channels=8; allowed: the square"),
    "no sections": (None, {"axes_dims_rope": ...}, "rotary sections of a head width of 10 .*give axes_dim="),
    "another class": (None, {"_class_name": "QwenImageControlNetModel"}, "_class_name='QwenImageControlNetModel'; all"),
    "missing": (
        lambda t: t.pop("transformer_blocks.1.attn.to_add_out.weight"),
        {},
        "'transformer_blocks.1.attn.to_add_out.weight' .for double/txt/out/kernel. is missing",
    ),
    "surplus": (_put("time_text_embed.addition_t_embedding.weight", 2, 20), {}, "addition_t_embedding"),
    "another output": (_put("proj_out.weight", 32, 20), {}, "takes 16 features a token and emits 32"),
    "another time": (_put("time_text_embed.timestep_embedder.linear_1.weight", 20, 64), {}, "takes 64 features"),
    "wrong shape": (_put("transformer_blocks.1.img_mod.1.weight", 119, 20), {}, r"wrong shape \(119, 20\)"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses(tmp_path, case):
    edit, changes, words = REFUSALS[case]
    write(tmp_path, edit, **CONFIG | changes)
    with pytest.raises(ValueError, match=words):
        load_qwen_image(tmp_path)


def test_refuses_arguments():
    for arguments, words in (
        ({"head": 2}, "unknown argument 'head'; nearest: 'heads'"),
        ({"layout": "original"}, "unknown layout 'original'; allowed: diffusers"),
        ({"size": (7, 8)}, "size=7x8; allowed: even"),
        ({"axes_dim": (4, 4, 4)}, r"axes_dim=\(4, 4, 4\); allowed: three even widths"),
    ):
        with pytest.raises(ValueError, match=words):
            load_qwen_image(WEIGHTS, **{"axes_dim": AXES, **arguments})
    for name in ("depth", "width", "heads", "channels", "text_tokens", "text_width", "mlp_ratio"):
        with pytest.raises(ValueError, match=f"qwen_image: {name}=0; allowed: 1 or more"):
            qwen_image(**TINY | {name: 0})


# ---- the published model ---------------------------------------------------------------------------------------


def test_geometry_of_the_published_model():
    """The default geometry has the parameters of diffusers' defaults, 20 billion, and the table names them all."""
    model = qwen_image()
    spec = jax.eval_shape(model.init, jax.random.key(0))
    total = sum(a.size for a in jax.tree.leaves(spec))
    print(f"Qwen-Image: {total / 1e9:.3f} billion parameters")
    assert total == 20_430_401_088
    paths = {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(spec)}
    assert set(DIFFUSERS) == paths
    assert (model.name, model.input_shape, model.cond["text"].shape) == ("qwen-image", (128, 128, 16), (512, 3584))
    assert model.cond["mask"].dtype == jnp.int32


def test_the_configuration_has_the_published_times():
    """mu is linear in the tokens, and the last time that is evaluated is 0.02."""
    config = override(load_config("qwen_image:928x1664"), [("model.depth", 1), ("model.width", 128)])
    setup = build_setup(override(config, [("model.heads", 1)]))
    tokens = 58 * 104
    shift = np.exp(0.5 + 0.4 * (tokens - 256) / 7936)
    s = np.linspace(1, 1 / 50, 50)
    s = shift * s / (1 + (shift - 1) * s)
    # in float32, as diffusers has them
    np.testing.assert_allclose(setup.times, [*(1 - (1 - s) * 0.98 / (1 - s[-1])), 0.0], atol=1.2e-7)
    assert setup.model.input_shape == (116, 208, 16)
    with pytest.raises(ValueError, match="config qwen_image:1000; allowed"):
        published.get_config("1000")


@pytest.mark.parametrize("dtype", some(["float32", "bfloat16"], "bfloat16"))
def test_what_the_head_reads_and_what_blocks_hold(dtype):
    model = qwen_image(**TINY, dtype=dtype)
    params = jax.eval_shape(model.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((2, *model.input_shape), jnp.float32)
    cond = jax.tree.map(lambda s: jax.ShapeDtypeStruct((2, *s.shape), s.dtype), model.cond)
    spec = trunk_spec(model, params, x, cond)
    assert spec.hidden.shape == (2, 6, 12) and str(spec.hidden.dtype) == dtype
    assert {a.shape for a in jax.tree.leaves(spec.update["double"]["attn"])} == {(2, 6, 12), (2, 3, 12)}
    attention = spec.attention["double"]["attn"]
    assert attention is not None and attention.q.shape == (2, 9, 2, 6) and attention.segments is not None


MESHES = ("seq=4,ulysses=1", "seq=4,ulysses=2", "seq=2,tensor=2", "cfg=2,seq=2", "fsdp=2,tensor=2")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_masked_text_on_a_mesh(mesh):
    """Tokens that are cut are masked as they are on one device, and the padding does not matter there either."""
    run = difax.load("qwen_image_tiny", weights="random", steps=2)
    cond = random_conditions(run.setup.model, 2)
    cond["mask"][0, 3:] = cond["null_mask"][1, 5:] = 0
    one = np.asarray(run.sample(cond).images)
    over = run.replace(**dict(mesh_settings(mesh)))
    scale = np.abs(one).max()
    assert np.abs(np.asarray(over.sample(cond).images) - one).max() <= 1e-4 * scale
    cond["text"][0, 3:] = cond["null_text"][1, 5:] = 100.0
    assert np.abs(np.asarray(over.sample(cond).images) - one).max() <= 1e-4 * scale
    cond["mask"][0, 3] = 1
    assert np.abs(np.asarray(over.sample(cond).images) - one).max() > 1e-2 * scale


# ---- live, with the `parity` extra -----------------------------------------------------------------------------


def test_matches_diffusers_live(tmp_path):
    """A model of another geometry than the golden one, saved by diffusers itself in shards with its config.json."""
    pytest.importorskip("torch", reason="needs the parity extra (torch, diffusers)")
    diffusers = pytest.importorskip("diffusers", reason="needs the parity extra (torch, diffusers)")
    from tests.golden import make_flux, make_qwen_image

    reference = diffusers.QwenImageTransformer2DModel(
        in_channels=8,
        out_channels=2,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=20,
        axes_dims_rope=(4, 6, 6),
    )
    reference = reference.eval().requires_grad_(False)
    make_flux.randomise(reference, seed=2)
    run = make_qwen_image.run(reference, [(10, 6)], (0.9, 0.5, 0.1), (7, 2, 4), seed=3)
    reference.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, params = load_qwen_image(tmp_path, size=(10, 6))
    found = {name.removesuffix("_10x6"): np.asarray(a) for name, a in run.items()}
    found |= {name: found[name].transpose(0, 2, 3, 1) for name in ("x", "output")}
    error = errors(answer(jax.jit(functools.partial(forward, model)), params, found), found)
    print(f"live: {error}")
    assert error.max() <= TOLERANCE
