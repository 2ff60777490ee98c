"""Settings of config.json against the classes of diffusers that they are of, and values that are refused.

tests/golden/settings.npz holds what diffusers computed (tests/golden/make_settings.py); weights and inputs are drawn
anew.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from difax.checkpoints import find_weights, recognise, settings_of
from difax.config import configuration
from difax.core.trunk import forward
from difax.models import CHECKPOINTS
from difax.registry import make
from difax.weights.published import load_foreign
from tests.families import some
from tests.golden.make_settings import CASES, draw_inputs, draw_tensors

GOLDEN = Path(__file__).parent / "golden" / "settings.npz"
TOLERANCE = 1e-5
KINDS = ", ".join(CHECKPOINTS)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files} | {"facts": json.loads(str(file["facts"]))}


def write(folder: Path, facts: dict[str, Any], case: str, **changes: Any) -> None:
    """A folder as diffusers writes it, with other values in its config.json."""
    tensors = draw_tensors(case, facts[case]["shapes"])
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(facts[case]["config"] | changes))


def find(folder: Path, case: str, **more: Any) -> Any:
    kind, _, size = CASES[case]
    given = {} if kind == "dit" else {"text_tokens": 3}
    return CHECKPOINTS[kind].find(folder, **({"size": size} | given | more))


def error_of(folder: Path, case: str, golden: dict[str, Any], **more: Any) -> float:
    """Largest difference from diffusers, over its largest output."""
    found = find(folder, case, **more)
    inputs = draw_inputs(case)
    x, t = inputs.pop("x"), inputs.pop("t")
    cond = inputs.get("label", inputs)
    with jax.default_matmul_precision("highest"):
        output = jax.jit(lambda p, *given: forward(found.model, p, *given))(load_foreign(folder, found), x, t, cond)
    return float(np.abs(np.asarray(output) - golden[case]).max() / np.abs(golden[case]).max())


EVERY_RUN = ("dit own embedders", "dit larger", "pixart without projection", "wan without cross norm")


@pytest.mark.parametrize("case", some(CASES, *EVERY_RUN))
def test_a_setting_is_that_of_diffusers(tmp_path, golden, case):
    write(tmp_path, golden["facts"], case)
    error = error_of(tmp_path, case, golden)
    print(f"{case}: error {error:.1e}")
    assert error <= TOLERANCE


# what would be computed if the setting were not read: the comparison can fail
OTHERWISE = {
    "dit norm_eps": {"mlp_norm_eps": 1e-5},
    "dit larger": {"base_size": None},
    "dit linear-silu": {"activation": "gelu-approximate"},
    "pixart norm_eps": {"norm_eps": 1e-6},
    "pixart interpolation": {"interpolation_scale": 1},
    "wan eps": {"eps": 1e-6},
    "flux axes": {"axes_dim": (4, 6, 6)},
}


@pytest.mark.parametrize("case", some(OTHERWISE))
def test_without_the_setting_it_is_another_function(tmp_path, golden, case):
    write(tmp_path, golden["facts"], case)
    assert error_of(tmp_path, case, golden, **OTHERWISE[case]) > 10 * TOLERANCE


# (case, key) -> the values that are refused besides those of WRONG
WRONG: tuple[Any, ...] = ("text", -1, float("nan"), float("inf"), [1], {}, 0, "")
NUMBERS = {
    "dit as it is": ("num_attention_heads", "norm_eps", "sample_size", "patch_size", "num_layers", "in_channels"),
    "pixart as it is": ("num_attention_heads", "norm_eps", "sample_size", "interpolation_scale", "caption_channels"),
    "wan as it is": ("num_attention_heads", "eps", "freq_dim", "ffn_dim", "rope_max_seq_len", "patch_size"),
    "flux as it is": ("axes_dims_rope", "num_attention_heads", "joint_attention_dim", "pooled_projection_dim"),
}
FLAGS = {
    "dit as it is": ("attention_bias", "norm_elementwise_affine", "activation_fn", "norm_type"),
    "pixart as it is": ("attention_bias", "use_additional_conditions", "activation_fn", "attention_type"),
    "wan as it is": ("cross_attn_norm", "qk_norm", "image_dim", "added_kv_proj_dim"),
    "flux as it is": ("guidance_embeds", "patch_size"),
}


@pytest.mark.parametrize("case", some(NUMBERS, "dit as it is", "wan as it is"))
def test_values_of_another_kind_are_refused(tmp_path, golden, case):
    """Every key with every kind of nonsense: the file, the key and the value are named."""
    write(tmp_path, golden["facts"], case)
    for key in (*NUMBERS[case], *FLAGS[case]):
        for value in (*WRONG, 3.5) if key in FLAGS[case] else WRONG:
            config = golden["facts"][case]["config"] | {key: value}
            (tmp_path / "config.json").write_text(json.dumps(config))
            with pytest.raises(ValueError) as error:
                find(tmp_path, case)
            assert str(error.value).startswith(f"{tmp_path / 'config.json'}: {key}={value!r}"), (key, value)
            assert "allowed: " in str(error.value)


REFUSALS = {
    "gated": ("pixart as it is", {"attention_type": "gated"}, "attention_type='gated'; allowed: default .*another"),
    "image to video": ("wan as it is", {"image_dim": 1280}, "image_dim=1280; allowed: null, as"),
    "image keys": ("wan as it is", {"added_kv_proj_dim": 24}, "added_kv_proj_dim=24; allowed: null, as"),
    "patches of latents": ("flux as it is", {"patch_size": 2}, "patch_size=2; allowed: 1 .latents are packed"),
    "rotary sections": ("flux as it is", {"axes_dims_rope": [4, 6, 8]}, "allowed: three even widths .* 16"),
    "heads": (
        "dit as it is",
        {"num_attention_heads": 4},
        "num_attention_heads=4 times attention_head_dim=8; allowed: 16",
    ),
    "layers": ("dit as it is", {"num_layers": 28}, "num_layers=28; allowed: 2, as the checkpoint's tensors say"),
    "biases": ("dit as it is", {"attention_bias": False}, "attention_bias=False; allowed: True, as"),
    "norms": ("wan qk_norm null", {"cross_attn_norm": False}, "cross_attn_norm=False; allowed: True, as"),
    "embedders": ("pixart as it is", {"use_additional_conditions": True}, "use_additional_conditions=True, but"),
    "guidance": ("flux without guidance", {"guidance_embeds": True}, "guidance_embeds=True; allowed: False, as"),
    "another class": (
        "flux as it is",
        {"_class_name": "FluxControlNetModel"},
        "_class_name='FluxControlNetModel'; all",
    ),
    "positions": (
        "wan as it is",
        {"rope_max_seq_len": 2},
        "patches .*; allowed: max_positions=2 on an axis",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_of_another_function_is_refused_by_name(tmp_path, golden, case):
    of, changes, words = REFUSALS[case]
    write(tmp_path, golden["facts"], of, **changes)
    with pytest.raises(ValueError, match=words):
        find(tmp_path, of)


@pytest.mark.parametrize(
    "key", ["dropout", "norm_num_groups", "upcast_attention", "num_vector_embeds", "_name_or_path"]
)
def test_keys_without_a_say_are_read_over(tmp_path, golden, key):
    value = {"dropout": 0.1, "norm_num_groups": 16, "upcast_attention": True}.get(key)
    write(tmp_path, golden["facts"], "dit as it is", **{key: value})
    assert find(tmp_path, "dit as it is").geometry["heads"] == 2


def test_one_embedder_for_all_blocks_is_kept_once(tmp_path, golden):
    write(tmp_path, golden["facts"], "dit as it is")
    assert not find(tmp_path, "dit as it is").geometry["block_embedders"]
    write(tmp_path, golden["facts"], "dit own embedders")
    found = find(tmp_path, "dit own embedders")
    assert found.geometry["block_embedders"] and "blocks/label" in found.table


# ---- what a configuration does not state comes from the file ---------------------------------------------------------

# case -> the key that a section of a configuration leaves open, whose default is another than the file's
LEFT_OPEN = {
    "dit without biases": "qkv_bias",
    "dit own embedders": "block_embedders",
    "dit affine": "mlp_norm_affine",
    "dit geglu": "activation",
    "pixart without projection": "caption_projection",
    "pixart conditions": "micro_conditioning",
    "wan without cross norm": "cross_attn_norm",
    "wan freq_dim": "freq_dim",
    "flux without guidance": "guidance_embedding",
}


@pytest.mark.parametrize("case", some(LEFT_OPEN, "dit without biases", "wan without cross norm"))
def test_what_a_section_does_not_state_comes_from_the_file(tmp_path, golden, case):
    write(tmp_path, golden["facts"], case)
    found, key, path = find(tmp_path, case), LEFT_OPEN[case], str(tmp_path)
    kind, known = CASES[case][0], settings_of(found.model)
    section = {"name": kind, **{k: v for k, v in found.geometry.items() if k not in (key, "variant")}}
    assert settings_of(make("model", section))[key] != known[key]
    opened = configuration({"model": section}, path)
    # the file's own size comes before that of a configuration
    assert settings_of(make("model", {**opened["model"], "size": section["size"]})) == known
    assert settings_of(find_weights({"model": section}, make("model", section), path).model) == known
    if isinstance(known[key], bool):
        words = f"model.{key} is {known[key]} in the checkpoint, {not known[key]} by the configuration"
        with pytest.raises(ValueError, match=words):
            configuration({"model": {**section, key: not known[key]}}, path)


# ---- other architectures ---------------------------------------------------------------------------------------------


KINDS = ", ".join(CHECKPOINTS)


def other_architecture(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a relative: some kinds are missing, as many are its own, the rest are named alike."""
    moved = {
        name: name.replace("norm1", "another.norm").replace("ff.", "experts.").replace("ffn.", "experts.")
        for name in tensors
    }
    return {new: tensors[old] for old, new in moved.items()}


@pytest.mark.parametrize("case", ["dit as it is", "pixart as it is", "wan as it is", "flux as it is"])
def test_another_architecture_is_named(tmp_path, golden, case):
    write(tmp_path, golden["facts"], case, _class_name="AuraTransformer2DModel")
    tensors = other_architecture(draw_tensors(case, golden["facts"][case]["shapes"]))
    tensors |= {f"blocks.{i}.vace.{n}.weight": np.ones(2, np.float32) for i in range(2) for n in "abcdefghi"}
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    kind = CASES[case][0]
    words = rf"config.json: _class_name='AuraTransformer2DModel' is none of {KINDS}; allowed: DiT.*Wan"
    with pytest.raises(ValueError, match=f"{words}.*; nearest {kind}, which knows .* of its .* kinds of tensors"):
        recognise(str(tmp_path))
    with pytest.raises(ValueError, match=words):
        recognise(str(tmp_path), kind)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=f"no checkpoint of {KINDS}; nearest {kind}, which knows"):
        recognise(str(tmp_path))


PIPELINES = Path(__file__).parents[2] / "shared" / "pipelines"
OTHERS = ("cogvideox_2b", "hunyuan_video", "ltx", "sd15", "svd")


@pytest.mark.skipif(not PIPELINES.is_dir(), reason="the tiny pipelines are not there")
@pytest.mark.parametrize("name", OTHERS)
def test_pipelines_of_other_architectures_are_named(name):
    (file,) = (*PIPELINES.glob(f"{name}/transformer/config.json"), *PIPELINES.glob(f"{name}/unet/config.json"))
    said = json.loads(file.read_text())["_class_name"]
    with pytest.raises(ValueError, match=f"config.json: _class_name='{said}' is none of {KINDS}"):
        recognise(str(file.parent))
    with pytest.raises(ValueError, match=f"{name}: expected one .*; a pipeline, whose network is in {file.parent}"):
        recognise(str(PIPELINES / name))
