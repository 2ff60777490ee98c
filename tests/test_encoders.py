"""Text encoders against transformers: states by number, pooled states, padding; folders as published; streaming.

The golden file (tests/golden/make_encoders.py) holds what transformers 5.24 computes of tiny random encoders of every
class. Errors are printed (pytest -rP): largest difference over the largest value.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from difax.core.placement import Axes, make_placement, placed
from difax.core.qtensor import QTensor, Quantisation, quantize_params
from difax.models.encoders import (
    ENCODERS,
    bert,
    clip_text,
    clip_vision,
    decoder,
    encode,
    find_encoder,
    image_states,
    load,
    states,
    t5,
)
from difax.models.encoders.attention import attend
from difax.models.encoders.decoder import rotary_rates
from difax.models.encoders.t5 import position_buckets
from tests.families import some
from tests.golden.encoder_cases import CASES, L, kind_of, pixels, text, weights

GOLDEN = np.load(Path(__file__).parent / "golden" / "encoders.npz")
PIPELINES = Path(__file__).parents[2] / "shared" / "pipelines"
TOLERANCE = 2e-5  # of the largest value
NAMES = {"last_hidden_state": -1, "pooler_output": "pooled", "text_embeds": "projected", "image_embeds": "projected"}


def error(found: Any, wanted: np.ndarray) -> float:
    return float(np.abs(np.asarray(found, np.float64) - wanted).max() / np.abs(wanted).max())


def tensors(name: str) -> dict[str, np.ndarray]:
    return weights({key: tuple(shape) for key, shape in json.loads(str(GOLDEN[f"{name}.shapes"])).items()})


def config(name: str) -> dict[str, Any]:
    return json.loads(str(GOLDEN[f"{name}.config"]))


def write(path: Path, settings: dict[str, Any], values: dict[str, np.ndarray], file: str = "model.safetensors") -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(settings))
    save_file(values, path / file)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """name of a case -> its folder, as transformers saves it."""
    return lambda name: write(tmp_path / name, config(name), tensors(name))


def run(found: Any, name: str, wanted: tuple[int, ...] = (-1,), pooled: bool = False) -> dict[Any, Any]:
    if kind_of(name) == "vision":
        return image_states(found, pixels(), wanted, pooled)
    ids, mask = text(name)
    return states(found, ids, None if kind_of(name) == "clip" else mask, wanted, pooled)


# ---- transformers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some(CASES, "umt5", "clip_g", "clip_vision", "gemma2", "llama"))
def test_every_state_and_pooled_state_is_transformers(folder, name):
    found = find_encoder(folder(name))
    wanted = GOLDEN[f"{name}.states"]
    depth = len(wanted) - 1
    assert found.encoder.depth == depth
    pools = f"{name}.pooled" in GOLDEN or f"{name}.projected" in GOLDEN
    out = run(found, name, (*range(depth + 1), -1, -2), pooled=pools)
    # rows that see no key get the mean of all values in the one class without a fused attention
    rows = np.s_[:2] if name == "gemma2" else np.s_[:]
    errors = {i: error(out[i][rows], wanted[i][rows]) for i in range(depth + 1)}
    errors |= {-1: error(out[-1][rows], GOLDEN[f"{name}.last"][rows]), -2: error(out[-2][rows], wanted[-2][rows])}
    errors |= {k: error(out[k], GOLDEN[f"{name}.{k}"]) for k in ("pooled", "projected") if f"{name}.{k}" in GOLDEN}
    print(name, errors)
    assert max(errors.values()) < TOLERANCE
    assert ("projected" in out) == (f"{name}.projected" in GOLDEN)


@pytest.mark.slow
def test_real_tokens_of_a_left_padded_text_are_gemmas(folder):
    seen = text("gemma2")[1][2] != 0
    out = run(find_encoder(folder("gemma2")), "gemma2")[-1]
    assert error(out[2][seen], GOLDEN["gemma2.last"][2][seen]) < TOLERANCE


def test_buckets_of_places_are_those_of_t5():
    found = position_buckets(301)
    distances = np.arange(301)[None] - np.arange(301)[:, None]
    np.testing.assert_array_equal(found, GOLDEN["buckets"][distances + 300])


def recorded() -> list[Any]:
    if not PIPELINES.is_dir():
        return []
    return [
        pytest.param(f, id=f"{f.parent.name}/{f.name}") for f in sorted(PIPELINES.glob("*/*encoder*")) if f.is_dir()
    ]


@pytest.mark.slow
@pytest.mark.skipif(not PIPELINES.is_dir(), reason="the tiny pipelines are not beside this checkout")
@pytest.mark.parametrize("path", recorded())
def test_recorded_runs_of_pipelines_are_repeated(path):
    arrays = np.load(path.parent / "run.npz")
    same = json.loads((path.parent / "run.json").read_text())["same"]
    here = f"enc/{path.name}/"
    keys = [key for key in (*arrays.files, *same) if key.startswith(here)]
    read = lambda key: arrays[same.get(key, key)]  # noqa: E731
    found, errors = find_encoder(path), {}
    for call in sorted({key.removeprefix(here).split("/")[0] for key in keys}):
        prefix = f"{here}{call}/"
        names = [key.removeprefix(prefix) for key in keys if key.startswith(prefix) and "/in/" not in key]
        which = {n: NAMES[n] if n in NAMES else int(n.removeprefix("hidden_states/")) for n in names}
        numbers = tuple(i for i in which.values() if isinstance(i, int))
        pooled = len(numbers) < len(which)
        if f"{prefix}in/pixel_values" in keys:
            out = image_states(found, read(f"{prefix}in/pixel_values").transpose(0, 2, 3, 1), numbers, pooled)
        else:
            mask = f"{prefix}in/attention_mask"
            out = states(found, read(f"{prefix}in/input_ids"), read(mask) if mask in keys else None, numbers, pooled)
        errors |= {f"{call}/{n}": error(out[i], read(prefix + n)) for n, i in which.items()}
    print(path.parent.name, path.name, errors)
    assert errors and max(errors.values()) < TOLERANCE


# ---- what published folders vary in ---------------------------------------------------------------------------


def renamed(values: dict[str, np.ndarray], old: str, new: str) -> dict[str, np.ndarray]:
    return {new + key.removeprefix(old) if key.startswith(old) else key: value for key, value in values.items()}


def split_in_two(path: Path, values: dict[str, np.ndarray], index: str, part: str) -> None:
    names = sorted(values)
    halves = {part.format(1): names[: len(names) // 2], part.format(2): names[len(names) // 2 :]}
    for file, some_names in halves.items():
        save_file({n: values[n] for n in some_names}, path / file)
    where = {n: file for file, some_names in halves.items() for n in some_names}
    (path / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def without(settings: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in keys}


ONE = np.ones((2, 2), "f")  # a tensor that is none of the encoder's
OTHERS = {"decoder.block.0.x.weight": ONE, "lm_head.weight": ONE}


def with_both_embeddings(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return values | OTHERS | {"encoder.embed_tokens.weight": values["shared.weight"].copy()}


def with_old_rope(settings: dict[str, Any]) -> dict[str, Any]:
    rope = settings["rope_parameters"]
    old = {"rope_theta": rope["rope_theta"], "rope_scaling": without(rope, "rope_theta")}
    return without(settings, "rope_parameters") | old


def flat(settings: dict[str, Any]) -> dict[str, Any]:
    return without(settings, "text_config") | settings["text_config"] | {"model_type": "qwen2_5_vl"}


def with_new_prefix(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return renamed(renamed(values, "model.", "model.language_model."), "visual.", "model.visual.")


def under(prefix: str, *others: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda values: renamed(values, "", prefix) | dict.fromkeys(others, ONE)


# what was done -> case, change(configuration) -> configuration or None, change(tensors) -> tensors or None
HARMLESS: dict[str, tuple[str, Any, Any]] = {
    "T5 untied": ("umt5", lambda c: c | {"tie_word_embeddings": False}, None),
    "T5 embedding of the encoder": ("t5", None, lambda v: renamed(v, "shared.", "encoder.embed_tokens.")),
    "T5 both embeddings, and a decoder": ("t5", None, with_both_embeddings),
    "CLIP prefixed": ("clip_l", None, under("text_model.")),
    "CLIP not prefixed": ("clip_g", None, lambda v: renamed(v, "text_model.", "")),
    "CLIP with its places": ("clip_l", None, lambda v: v | {"embeddings.position_ids": np.arange(14)[None]}),
    "CLIP of two": ("clip_g", None, lambda v: v | dict.fromkeys(("logit_scale", "vision_model.x.weight"), ONE)),
    "vision not prefixed": ("clip_vision", None, lambda v: renamed(v, "vision_model.", "")),
    "Llama behind model.": ("llama", None, under("model.", "lm_head.weight")),
    "Llama behind language_model.": ("llama", None, under("language_model.")),
    "Qwen new prefix": ("qwen2_5_vl", None, with_new_prefix),
    "unknown keys": ("llama", lambda c: c | {"_name_or_path": "x", "quantum": 3, "pretraining_tp": 1}, None),
    "rope as old files write it": ("llama", with_old_rope, None),
    "flat configuration": ("qwen2_5_vl", flat, None),
    "no model_type": ("qwen3", lambda c: without(c, "model_type"), None),
    "no class: Qwen": ("qwen3", lambda c: without(c, "architectures"), None),
    "no class: CLIP": ("clip_g", lambda c: without(c, "architectures"), None),
    "no class: T5": ("umt5", lambda c: without(c, "architectures"), None),
    "no class: vision": ("clip_vision", lambda c: without(c, "architectures"), None),
    "no class: BERT": ("bert", lambda c: without(c, "architectures"), None),
}


@pytest.mark.parametrize("change", some(HARMLESS, "T5 untied", "CLIP not prefixed"))
def test_harmless_changes_of_a_folder_change_no_number(tmp_path, change):
    name, settings, values = HARMLESS[change]
    settings, values = settings or (lambda c: c), values or (lambda v: v)
    path = write(tmp_path / "x", settings(config(name)), values(tensors(name)))
    assert error(run(find_encoder(path), name)[-1][:2], GOLDEN[f"{name}.last"][:2]) < TOLERANCE


@pytest.mark.parametrize(
    ("index", "part", "variant"),
    [
        ("model.safetensors.index.json", "model-0000{}-of-00002.safetensors", None),
        ("model.safetensors.index.json", "part{}.safetensors", None),
        ("model.safetensors.index.fp16.json", "model.fp16-0000{}-of-00002.safetensors", None),
        ("model.safetensors.index.fp16.json", "model.fp16-0000{}-of-00002.safetensors", "fp16"),
    ],
)
def test_shards_with_an_index(tmp_path, index, part, variant):
    path = tmp_path / "x"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config("t5")))
    split_in_two(path, tensors("t5"), index, part)
    found = find_encoder(path, variant=variant)
    assert found.path.name == index
    out = np.asarray(load(found)["ends"]["tokens"]["embedding"])
    np.testing.assert_array_equal(out, tensors("t5")["shared.weight"])


def test_of_several_precisions_the_one_without_a_name_or_the_one_that_is_named(folder):
    path = folder("t5")
    save_file({k: v.astype("float16") for k, v in tensors("t5").items()}, path / "model.fp16.safetensors")
    assert find_encoder(path).path.name == "model.safetensors"
    assert find_encoder(path, variant="fp16").path.name == "model.fp16.safetensors"
    with pytest.raises(ValueError, match=r"of variant=bf16; found model.fp16.safetensors, model.safetensors"):
        find_encoder(path, variant="bf16")


DEFAULTS = {
    "t5": ("relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon", "is_decoder"),
    "umt5": ("relative_attention_num_buckets", "relative_attention_max_distance", "feed_forward_proj"),
    "clip_l": ("hidden_act", "layer_norm_eps"),
    "gemma2": ("sliding_window", "hidden_activation", "rms_norm_eps", "rope_parameters", "layer_types"),
    "qwen2_5_vl": ("sliding_window", "use_sliding_window", "hidden_act", "layer_types"),
    "mistral3": ("rms_norm_eps", "hidden_act", "max_position_embeddings"),
    "bert": ("hidden_act", "layer_norm_eps", "type_vocab_size"),
}


@pytest.mark.parametrize("name", some(DEFAULTS, "gemma2"))
def test_a_missing_key_is_the_classes_default(tmp_path, name):
    settings = config(name)
    part = settings.get("text_config", settings)
    assert all(key in part for key in DEFAULTS[name] if key not in ("layer_types", "sliding_window"))
    for key in DEFAULTS[name]:
        part.pop(key, None)
    path = write(tmp_path / "x", settings, tensors(name))
    assert error(run(find_encoder(path), name)[-1][:2], GOLDEN[f"{name}.last"][:2]) < TOLERANCE


def wan_names(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """umT5's tensors as Wan's own file names them."""
    pairs = {
        "layer.0.SelfAttention.relative_attention_bias": "pos_embedding.embedding", "layer.0.SelfAttention": "attn",
        "layer.0.layer_norm": "norm1", "layer.1.layer_norm": "norm2", "layer.1.DenseReluDense.wi_0": "ffn.gate.0",
        "layer.1.DenseReluDense.wi_1": "ffn.fc1", "layer.1.DenseReluDense.wo": "ffn.fc2", "encoder.block": "blocks",
        "encoder.final_layer_norm": "norm", "shared": "token_embedding",
    }  # fmt: skip
    out = {}
    for name, value in values.items():
        for old, new in pairs.items():
            name = name.replace(old, new)
        out[name] = value
    return out


def openclip_names(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A CLIP text encoder's tensors as OpenCLIP names and fuses them."""
    layer, out = "text_model.encoder.layers.{}.", {}
    for i in range(3):
        old, new = layer.format(i), f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            out[f"{new}attn.in_proj_{kind}"] = np.concatenate(
                [values[f"{old}self_attn.{p}_proj.{kind}"] for p in "qkv"]
            )
            pairs = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
            for a, b in (pairs | {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}).items():
                out[f"{new}{b}.{kind}"] = values[f"{old}{a}.{kind}"]
    out |= {f"ln_final.{kind}": values[f"text_model.final_layer_norm.{kind}"] for kind in ("weight", "bias")}
    out["positional_embedding"] = values["text_model.embeddings.position_embedding.weight"]
    out["token_embedding.weight"] = values["text_model.embeddings.token_embedding.weight"]
    return out | {
        "text_projection": np.ascontiguousarray(values["text_projection.weight"].T),
        "logit_scale": np.ones((), "f"),
    }


def test_a_single_file_of_wan_is_known_by_its_names(tmp_path):
    save_file(wan_names(tensors("umt5")), tmp_path / "umt5.safetensors")
    assert error(run(find_encoder(tmp_path / "umt5.safetensors"), "umt5")[-1], GOLDEN["umt5.last"]) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("by_row", [False, True])
def test_a_file_of_eighths_with_scales_and_a_tokenizer_beside_them(tmp_path, by_row):
    """As ComfyUI writes T5's; the same values are read as from a file of float32."""
    exact, stored = {}, {"scaled_fp8": np.zeros((0,), "f"), "spiece_model": np.arange(9, dtype=np.uint8)}
    for name, value in tensors("umt5").items():
        exact[name] = stored[name] = value
        if value.ndim == 2:
            scale = np.linspace(1, 3, len(value), dtype="f")[:, None] if by_row else np.asarray(2.0, "f")
            stored[name] = np.asarray(jnp.asarray(value / scale, jnp.float8_e4m3fn))
            stored[name.removesuffix("weight") + "scale_weight"] = scale
            exact[name] = stored[name].astype("f") * scale
    save_file(stored, tmp_path / "fp8.safetensors")
    save_file(exact, tmp_path / "exact.safetensors")
    found = [run(find_encoder(tmp_path / f"{file}.safetensors"), "umt5")[-1] for file in ("fp8", "exact")]
    np.testing.assert_array_equal(*found)


@pytest.mark.slow
def test_a_single_file_of_openclip_is_known_by_its_names(tmp_path):
    save_file(openclip_names(tensors("clip_g")), tmp_path / "g.safetensors")
    found = find_encoder(tmp_path / "g.safetensors")
    assert found.encoder.width == 16 and found.foreign.geometry["activation"] == "gelu"
    # heads of 64 features and the norms' usual eps are assumed there, and these tiny ones have others
    fields = {"heads": 4, "eps": 1e-3, "end": 38}
    out = run(find_encoder(tmp_path / "g.safetensors", **fields), "clip_g", pooled=True)
    assert error(out[-1], GOLDEN["clip_g.last"]) < TOLERANCE
    assert error(out["projected"], GOLDEN["clip_g.projected"]) < TOLERANCE


# ---- bad input -------------------------------------------------------------------------------------------------

# what is wrong -> case, keys of its configuration (None: left out), arguments, message
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "class": ("t5", {"architectures": ["T5EncoderModl"]}, {}, r"T5EncoderModl.*did you mean T5EncoderModel"),
    "width": ("t5", {}, {"width": 4096}, "width 16; allowed: 4096"),
    "size": ("t5", {"d_model": 32}, {}, "d_model=32; allowed: 16"),
    "vocabulary": ("clip_l", {"vocab_size": 41}, {}, "vocab_size=41; allowed: 40"),
    "heads": ("qwen3", {"head_dim": 8}, {}, "num_attention_heads=4 times head_dim=8; allowed: 24"),
    "gates": ("t5", {"feed_forward_proj": "relu"}, {}, "feed_forward_proj='relu'"),
    "activation": ("clip_l", {"hidden_act": "mish"}, {}, "hidden_act='mish'; allowed: relu"),
    "rope": ("llama", {"rope_parameters": {"rope_type": "yarn"}}, {}, "rope_type='yarn'; allowed: default"),
    "factor": ("llama", {"rope_parameters": {"rope_type": "linear"}}, {}, "factor is missing"),
    "both ways": ("gemma2", {"use_bidirectional_attention": True}, {}, "use_bidirectional_attention=True; allowed"),
    "quantised": ("t5", {"quantization_config": {"quant_method": "bnb"}}, {}, "quantization_config of bnb"),
    "dtype": ("t5", {}, {"dtype": "float16"}, "dtype=float16; allowed: float32, bfloat16"),
    "projection": ("clip_l", {}, {"kind": "CLIPTextModelWithProjection"}, "text_projection.weight"),
    "other weights": ("t5", {}, {"kind": "CLIPTextModel"}, "tensor 'embeddings.token_embedding.weight' .* is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, case):
    name, settings, arguments, message = REFUSED[case]
    settings = without(config(name) | settings, *(key for key, value in settings.items() if value is None))
    path = write(tmp_path / "x", settings, tensors(name))
    with pytest.raises(ValueError, match=message) as refused:
        find_encoder(path, **arguments)
    assert "\n" not in str(refused.value)


def test_what_is_no_folder_of_an_encoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        find_encoder(tmp_path / "absent")
    with pytest.raises(ValueError, match="found no .safetensors file"):
        find_encoder(tmp_path)
    save_file({"a": np.ones(3)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no tensor of a text encoder; its first: a"):
        find_encoder(tmp_path)
    with pytest.raises(ValueError, match="config.json beside it"):
        save_file(tensors("llama"), tmp_path / "x.safetensors")
        find_encoder(tmp_path)


def test_a_tensor_that_no_parameter_takes_is_refused(tmp_path):
    values = tensors("umt5") | {"encoder.block.0.layer.2.weight": np.ones(3, "f")}
    found = find_encoder(write(tmp_path / "x", config("umt5"), values))
    with pytest.raises(ValueError, match="surplus tensor 'encoder.block.0.layer.2.weight'"):
        run(found, "umt5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(ids=[[1, 40]]), "token 40; allowed: 0 ... 39"),
        (dict(ids=[[-1, 4]]), "token -1"),
        (dict(ids=[[1.0, 4.0]]), "ids float64 of shape"),
        (dict(ids=[1, 4]), r"of shape \(2,\)"),
        (dict(ids=[[1, 4]], mask=[[1]]), r"mask of shape \(1, 1\)"),
        (dict(ids=[[1] * 15]), "texts of 15 tokens; allowed: up to 14"),
        (dict(ids=[[1, 4]], wanted=(4,)), r"state 4; allowed: -4 ... 3"),
        (dict(ids=[[1, 4]], wanted=(-5,)), "state -5"),
    ],
)
def test_texts_and_states_that_there_are_not(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        states(find_encoder(folder("clip_l")), **arguments)


def test_pooled_states_of_an_encoder_without_and_pictures_of_another_size(folder):
    with pytest.raises(ValueError, match="pools nothing"):
        states(find_encoder(folder("t5")), [[1]], pooled=True)
    with pytest.raises(ValueError, match=r"\(1, 8, 8, 3\); allowed: \[B, 20, 20, 3\]"):
        image_states(find_encoder(folder("clip_vision")), np.zeros((1, 8, 8, 3)))


TINY: dict[str, Any] = dict(depth=1, width=8, heads=2, ffn=8)
LM = TINY | {"vocabulary": 9}
FACTORIES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "buckets": (t5, TINY | {"buckets": 6}, "t5: buckets=6"),
    "type": (t5, TINY | {"depth": "2"}, "t5: depth='2'; allowed: an integer"),
    "heads": (clip_text, TINY | {"heads": 3}, "clip_text: width=8; allowed: divisible by heads=3"),
    "patch": (clip_vision, TINY | {"size": 8}, "clip_vision: size=8; allowed: patch=14 or more"),
    "groups": (decoder, LM | {"heads": 3, "groups": 2}, "heads=3; allowed: divisible by groups=2"),
    "odd": (decoder, LM | {"width": 6}, "head_width=3; allowed: even"),
    "rope": (decoder, LM | {"rope": {"name": "liner"}}, "did you mean linear"),
    "rope key": (decoder, LM | {"rope": {"name": "linear", "facto": 2.0}}, "did you mean factor"),
    "eps": (bert, TINY | {"eps": 0.0}, "bert: eps=0.0"),
    "activation": (bert, TINY | {"activation": "gelou"}, "did you mean gelu"),
}


@pytest.mark.parametrize("case", FACTORIES)
def test_factories_refuse_what_they_cannot_make(case):
    factory, arguments, message = FACTORIES[case]
    with pytest.raises(ValueError, match=message):
        factory(**arguments)


# ---- streamed, whole, quantised --------------------------------------------------------------------------------


def counted(found: Any) -> tuple[Any, dict[str, int]]:
    """The same encoder, whose functions count how often they are traced."""
    traced: dict[str, int] = {}

    def counting(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            traced[name] = traced.get(name, 0) + 1
            return function(*arguments)

        return call

    parts = {name: counting(name, getattr(found.encoder, name)) for name in ("embed", "block", "norm")}
    return found._replace(foreign=found.foreign._replace(model=found.encoder._replace(**parts))), traced


def test_one_block_is_compiled_for_all_layers_and_texts_of_a_shape(folder):
    found, traced = counted(find_encoder(folder("umt5")))
    ids, mask = text("umt5")
    first = states(found, ids, mask)[-1]
    second = states(found, ids[::-1], mask[::-1])[-1]
    assert traced == {"embed": 1, "block": 1, "norm": 1}
    assert error(second, np.asarray(first)[::-1]) < 1e-6


@pytest.mark.parametrize("name", some(CASES, "qwen3"))
def test_an_encoder_that_is_found_again_is_compiled_already(folder, tmp_path, name):
    path, again = folder(name), write(tmp_path / "again", config(name), tensors(name))
    one, other = find_encoder(path).encoder, find_encoder(again).encoder
    assert one == other and hash(one) == hash(other) and one.block is other.block
    assert one != find_encoder(path, "bfloat16").encoder


def test_no_layer_behind_the_last_that_is_wanted_is_read(folder):
    path = folder("qwen3")
    found = find_encoder(path)
    whole = states(found, *text("qwen3"), (1, -3))
    values = tensors("qwen3")
    for name in [name for name in values if "layers.1." in name or "layers.2." in name]:
        values[name] = np.full_like(values[name], np.nan)  # which a read refuses
    save_file(values, path / "model.safetensors")
    with pytest.raises(ValueError, match="not finite"):
        states(found, *text("qwen3"), (2,))
    again = states(found, *text("qwen3"), (1, -3))
    np.testing.assert_array_equal(again[1], whole[1])
    np.testing.assert_array_equal(again[-3], whole[1])
    assert error(again[1], GOLDEN["qwen3.states"][1]) < TOLERANCE


@pytest.mark.parametrize("name", some(CASES, "clip_l"))
def test_the_whole_encoder_in_memory_is_the_streamed_one(folder, name):
    found = find_encoder(folder(name))
    pools = found.encoder.pool is not None
    ids, mask = text(name)
    mask = np.ones_like(mask) if kind_of(name) == "clip" else mask
    inputs = (pixels(),) if kind_of(name) == "vision" else (ids, mask)
    function = jax.jit(lambda p, *a: encode(found.encoder, p, *a, wanted=(0, 1, -2, -1), pooled=pools))
    whole, more = function(load(found), *inputs)
    whole |= more
    part = run(found, name, (0, 1, -2, -1), pools)
    assert whole.keys() == part.keys()
    for key in part:
        assert error(whole[key], np.asarray(part[key])) < 5e-6


def test_a_quantised_encoder_is_near_the_exact_one(folder):
    found = find_encoder(folder("umt5"))
    params = load(found)
    ids, mask = text("umt5")
    run_whole = jax.jit(lambda p: encode(found.encoder, p, ids, mask)[0][-1])
    exact = np.asarray(run_whole(params))
    rounded = quantize_params(params, [("blocks/", Quantisation("int8"))])
    assert isinstance(rounded["blocks"]["qkv"]["kernel"], QTensor)
    far = error(run_whole(rounded), exact)
    print("int8 weights", far)
    assert 1e-4 < far < 0.1


@pytest.mark.parametrize("name", some(("umt5", "clip_l", "gemma2", "qwen3", "bert"), "qwen3"))
def test_bfloat16_is_the_same_function_to_its_rounding(folder, name):
    found = find_encoder(folder(name), "bfloat16")
    out = run(found, name)[-1]
    assert out.dtype == jnp.bfloat16
    assert error(out[:2], GOLDEN[f"{name}.last"][:2]) < 0.06


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_weights_of_half_precision_are_read_as_they_are(tmp_path, stored):
    values = {k: np.asarray(jnp.asarray(v, stored)) for k, v in tensors("t5").items()}
    found = find_encoder(write(tmp_path / "x", config("t5"), values))
    assert error(run(found, "t5")[-1], GOLDEN["t5.last"]) < 0.03


def test_attention_can_be_replaced(folder):
    calls = []

    def other(q, k, v, **more):
        calls.append((q.shape, k.shape, sorted(more)))
        return attend(q, k, v, **more)

    out = run(find_encoder(folder("gemma2"), attend=other), "gemma2")[-1]
    assert calls[-1] == ((3, L, 4, 6), (3, L, 2, 6), ["cap", "scale", "seen"])
    assert error(out[:2], GOLDEN["gemma2.last"][:2]) < TOLERANCE


def test_attention_is_the_rule():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 5, h, 4)).astype("f") for h in (6, 3, 3))
    bias, seen = rng.standard_normal((1, 6, 5, 5)).astype("f"), rng.random((2, 1, 5, 5)) < 0.6
    seen[0, 0, 2] = False
    out = np.asarray(attend(q, k, v, scale=0.7, seen=seen, bias=bias, cap=1.5))
    for b, t, h in np.ndindex(2, 5, 6):
        logits = 1.5 * np.tanh(k[b, :, h // 2] @ q[b, t, h] * 0.7 / 1.5) + bias[0, h, t]
        p = np.where(seen[b, 0, t], np.exp(logits), 0)
        wanted = p @ v[b, :, h // 2] / p.sum() if p.any() else np.zeros(4)
        np.testing.assert_allclose(out[b, t, h], wanted, atol=1e-6)


def test_right_padded_rows_see_the_text_before_them_and_not_themselves(folder):
    found = find_encoder(folder("llama"))
    ids, mask = text("llama")
    out = np.asarray(states(found, ids, mask)[-1])
    other = ids.copy()
    other[1, 9] = (other[1, 9] + 1) % 37  # a padded token
    changed = np.abs(np.asarray(states(found, other, mask)[-1]) - out)[1].max(-1) > 0
    assert changed.tolist() == [i == 9 for i in range(L)]  # its own row alone
    other = ids.copy()
    other[1, 5] = (other[1, 5] + 1) % 37  # a real one
    changed = np.abs(np.asarray(states(found, other, mask)[-1]) - out)[1].max(-1) > 0
    assert changed.tolist() == [i >= 5 for i in range(L)]


@pytest.mark.parametrize("length", some([5, 6], 6))
def test_a_window_of_some_layers_limits_the_length(folder, tmp_path, length):
    settings = config("gemma2") | {"sliding_window": 5}
    found = find_encoder(write(tmp_path / "x", settings, tensors("gemma2")))
    ids, mask = text("gemma2")
    if length > 5:
        with pytest.raises(ValueError, match="texts of 6 tokens; allowed: up to 5"):
            states(found, ids[:, :length], mask[:, :length])
    else:
        wide = states(find_encoder(folder("gemma2")), ids[:, :length], mask[:, :length])[-1]
        np.testing.assert_array_equal(states(found, ids[:, :length], mask[:, :length])[-1], wide)


def test_frequencies_of_llama_3():
    """Waves below original / high are kept, those longer than original / low are slowed, between them a mixture."""
    plain = rotary_rates(16, 500.0)
    found = rotary_rates(16, 500.0, dict(name="llama3", factor=8.0, low=1.0, high=4.0, original=32.0))
    for rate, changed in zip(plain, found, strict=True):
        wave = 2 * np.pi / rate
        smooth = (32 / wave - 1) / 3
        wanted = rate if wave < 8 else rate / 8 if wave > 32 else (1 - smooth) * rate / 8 + smooth * rate
        assert changed == pytest.approx(wanted, rel=1e-6)
    np.testing.assert_allclose(rotary_rates(16, 500.0, dict(name="linear", factor=4.0)), plain / 4, rtol=1e-6)


MEMORY = """
import json, re, sys
import numpy as np
from difax.models.encoders import find_encoder, states

def run(path):
    return np.asarray(states(find_encoder(path, "bfloat16"), np.arange(8)[None])[-1], "f")

# not of getrusage, which begins with what the process had that started this one
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
run(sys.argv[1])  # one layer of the same shape: the memory of the compiler and of one layer
before = peak()
out = run(sys.argv[2])
print(json.dumps({"growth": peak() - before, "before": before, "finite": bool(np.isfinite(out).all())}))
"""


def made_up(path: Path, depth: int, vocabulary: int, width: int = 1024, ffn: int = 2816, heads: int = 16) -> int:
    """Writes a umT5 of zeros, a file of holes, in bfloat16; returns the bytes of its tensors."""
    shapes = {"shared.weight": (vocabulary, width), "encoder.final_layer_norm.weight": (width,)}
    for i in range(depth):
        block = f"encoder.block.{i}.layer"
        shapes |= {f"{block}.0.SelfAttention.{p}.weight": (width, width) for p in "qkvo"}
        shapes |= {f"{block}.0.SelfAttention.relative_attention_bias.weight": (32, heads)}
        shapes |= {f"{block}.{j}.layer_norm.weight": (width,) for j in (0, 1)}
        shapes |= {f"{block}.1.DenseReluDense.wi_{j}.weight": (ffn, width) for j in (0, 1)}
        shapes |= {f"{block}.1.DenseReluDense.wo.weight": (width, ffn)}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    path.mkdir()
    encoded = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    settings = {"architectures": ["UMT5EncoderModel"], "feed_forward_proj": "gated-gelu"}
    (path / "config.json").write_text(json.dumps(settings))
    return end


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak that Linux keeps of a process")
def test_an_encoder_needs_the_memory_of_a_layer_however_deep_it_is(tmp_path, user_env):
    """24 layers and a table of 64 000 tokens need no more than one layer and a table of 16: 0.7 GB are never there."""
    small, large = made_up(tmp_path / "small", 1, 16), made_up(tmp_path / "large", 24, 64_000)
    assert large > 512 * 2**20
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, env=user_env, check=True)
    found = json.loads(done.stdout)
    print({**found, "small": small, "large": large})
    assert found["finite"]
    assert found["growth"] < 3 * small < large / 9


def test_registry_names_classes_of_the_pipelines():
    named = {
        entry[1]
        for file in PIPELINES.glob("*/model_index.json")
        for key, entry in json.loads(file.read_text()).items()
        if "encoder" in key and isinstance(entry, list) and entry[1]
    }
    assert named <= ENCODERS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["umt5", "qwen3", "clip_l", "bert"])
def test_an_encoder_cut_among_devices_is_the_whole_one(folder, name):
    found = find_encoder(folder(name))
    params, (ids, mask) = load(found), text(name)
    function = lambda p: encode(found.encoder, p, ids, mask)[0][-1]  # noqa: E731
    whole = np.asarray(jax.jit(function)(params))
    placement = make_placement(Axes(tensor=2), jax.devices(), (2,), found.encoder.shards)
    cut = jax.device_put(placement.arranged(params), placement.params(params))
    named = [
        jax.tree_util.keystr(path)
        for path, a in jax.tree_util.tree_leaves_with_path(cut)
        if "tensor" in a.sharding.spec
    ]
    with placed(placement):
        found_cut = jax.jit(function)(cut)
    assert sum("kernel" in path for path in named) == 4 and all("blocks" in path for path in named)
    assert error(found_cut, whole) < 5e-6
