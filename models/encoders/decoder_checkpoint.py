"""The weights of decoder-only language models: one layout, transformers', and what each family's settings mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from difax.core.annotations import LARGEST
from difax.models.encoders.decoder import decoder
from difax.models.encoders.folder import EncoderFolder
from difax.models.encoders.layers import ACTIVATIONS
from difax.weights.checkpoint import Source
from difax.weights.published import Foreign, dense, stored_depth, stored_shape
from difax.weights.settings import Setting, check_agrees, flag, number, one_of, optional, rows_of, whole


class Family(NamedTuple):
    """What a language model's class says by itself, and what its settings are where config.json lacks them.

    heads, groups (None: as many), head_width (None: width / heads), eps, theta, window (None: a query sees all before
    it): defaults of its configuration. asked: does `use_sliding_window` have to ask for the window. qk_norm, gemma: are
    queries and keys normed; are norms, scale, gate and the layers that have a window Gemma's.
    """

    heads: int = 32
    groups: int | None = 32
    head_width: int | None = None
    eps: float = 1e-6
    theta: float = 10_000.0
    window: int | None = 4096
    asked: bool = True
    qk_norm: bool = False
    gemma: bool = False


FAMILIES = {
    "llama": Family(groups=None, window=None),
    "qwen2": Family(),
    "qwen2_vl": Family(heads=64, groups=8, eps=1e-5, theta=1e6),
    "qwen2_5_vl": Family(heads=64, groups=8, eps=1e-5, theta=1e6),
    "qwen3": Family(head_width=128, qk_norm=True),
    "qwen3_vl": Family(head_width=128, theta=5e5, window=None, qk_norm=True),
    "gemma2": Family(heads=8, groups=4, head_width=256, asked=False, gemma=True),
    "mistral": Family(groups=8, asked=False),
}


def layout(heads: int = 1, groups: int = 1, gemma: bool = False) -> dict[str, Source]:
    """The table for so many heads; what a model has not (biases, norms of heads) goes with `rows_of`."""
    block, fused = "layers.{layer}", {"widths": (heads, groups, groups)}
    norms = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
    if gemma:
        norms["norm2"], norms["behind1"] = "pre_feedforward_layernorm", "post_attention_layernorm"
        norms["behind2"] = "post_feedforward_layernorm"
    norms |= {"norm_q": "self_attn.q_norm", "norm_k": "self_attn.k_norm"}
    return {
        "ends/tokens/embedding": Source(("embed_tokens.weight",)),
        "ends/final/scale": Source(("norm.weight",)),
        **{f"blocks/{path}/scale": Source((f"{block}.{name}.weight",)) for path, name in norms.items()},
        **dense("blocks/qkv", *(f"{block}.self_attn.{p}_proj" for p in "qkv"), **fused),
        **dense("blocks/out", f"{block}.self_attn.o_proj"),
        **dense("blocks/up", f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"),
        **dense("blocks/down", f"{block}.mlp.down_proj"),
    }


LAYOUTS = {"transformers": layout()}
IGNORED = r"rotary_emb\.inv_freq$"

_ACTIVATION = one_of(*ACTIVATIONS)


def _settings(family: Family) -> dict[str, tuple[Setting, Any]]:
    return {
        "hidden_size": (whole(), None),
        "intermediate_size": (whole(), None),
        "num_hidden_layers": (whole(), None),
        "vocab_size": (whole(), None),
        "num_attention_heads": (whole(), family.heads),
        "num_key_value_heads": (optional(whole()), family.groups),
        "head_dim": (optional(whole(2)), family.head_width),
        "rms_norm_eps": (number(), family.eps),
        "rope_theta": (optional(number()), None),
        "partial_rotary_factor": (one_of(1, 1.0, None), None),
        "max_position_embeddings": (whole(), LARGEST),
        "attention_bias": (flag(), None),
        "mlp_bias": (flag(), None),
        "sliding_window": (optional(whole()), family.window),
        "use_sliding_window": (optional(flag()), False),
        "max_window_layers": (optional(whole(0)), 0),
        "use_bidirectional_attention": (one_of(False, None), None),
        "hidden_act": (_ACTIVATION, "silu"),
        "hidden_activation": (optional(_ACTIVATION), "gelu_pytorch_tanh"),
        "query_pre_attn_scalar": (number(), 256),
        "attn_logit_softcapping": (optional(number()), 50.0),
    }


def find_decoder(folder: EncoderFolder, **overrides: Any) -> Foreign:
    """The language model of a folder; sizes and biases from the tensors, the rest from its config.

    Of a model with pictures it is the part for text; the rest of its tensors is left alone.

    Args:
      **overrides: arguments of `difax.models.encoders.decoder.decoder`, which win over what was found.

    Raises:
      ValueError: as `load_safetensors` and `decoder`; no config.json, one of another kind of model, or one that
        contradicts the tensors.
    """
    if not folder.config:
        raise ValueError(
            f"{folder.path}: heads and positions of a language model stand in a config.json beside it alone"
        )
    folder = folder.part("text_config")
    family = FAMILIES[_family(folder)]
    config = folder.settled(_settings(family))
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"] or config["num_attention_heads"]
    _, shapes = folder.tensors("a language model", LAYOUTS)
    table = layout(heads, groups, family.gemma)
    shape = stored_shape(folder.path, table, shapes)
    stored = lambda name: f"layers.0.{name}.bias" in shapes  # noqa: E731
    vocabulary, width = shape("ends/tokens/embedding")
    theta, rope, length = _rope(folder.file, folder.config, config, family)
    depth = stored_depth(table, shapes, "blocks/down/kernel")
    window, length = _window(folder, config, family, depth, length)
    fields: dict[str, Any] = {
        "depth": depth,
        "width": width,
        "heads": heads,
        "groups": groups,
        "head_width": config["head_dim"] or width // heads,
        "ffn": shape("blocks/up/kernel")[0],
        "vocabulary": vocabulary,
        "activation": config["hidden_act"],
        "theta": float(theta),
        "rope": rope,
        "window": window,
        "length": length,
        "qkv_bias": stored("self_attn.q_proj"),
        "out_bias": stored("self_attn.o_proj"),
        "mlp_bias": stored("mlp.down_proj"),
        "qk_norm": family.qk_norm,
        "eps": config["rms_norm_eps"],
    }
    if family.gemma:
        fields |= {
            "activation": config["hidden_activation"] or "gelu_pytorch_tanh",
            "scale": config["query_pre_attn_scalar"] ** -0.5,
            "cap": config["attn_logit_softcapping"],
            "outer_norms": True,
            "norm_offset": 1.0,
            "embedding_scale": math.sqrt(width),
        }
    said = {"hidden_size": width, "intermediate_size": fields["ffn"], "num_hidden_layers": depth}
    said |= {"vocab_size": vocabulary, "attention_bias": fields["out_bias"], "mlp_bias": fields["mlp_bias"]}
    check_agrees(folder.file, folder.config, said)
    for key, name, count in (("num_attention_heads", "q", heads), ("num_key_value_heads", "k", groups)):
        rows = shapes.get(f"layers.0.self_attn.{name}_proj.weight", (0,))[0]
        if rows != count * fields["head_width"]:
            raise ValueError(
                f"{folder.file}: {key}={count} times head_dim={fields['head_width']}; allowed: {rows}, the rows of the "
                f"checkpoint's {name}_proj"
            )
    encoder = decoder(**fields | overrides)
    spec = jax.eval_shape(encoder.init, jax.random.key(0))
    return Foreign(encoder, rows_of(table, spec), {"layer": depth}, geometry=fields, ignored=IGNORED)


def _family(folder: EncoderFolder) -> str:
    """The name in `FAMILIES`, by model_type where config.json says it, else by the class."""
    said = str(folder.config.get("model_type", "")).removesuffix("_text")
    by_class = {"Mistral3": "mistral", "Llava": "llama", "Qwen2_5_VL": "qwen2_5_vl", "Qwen2VL": "qwen2_vl"}
    by_class |= {"Qwen3VL": "qwen3_vl", "Qwen2": "qwen2", "Qwen3": "qwen3", "Gemma2": "gemma2", "Mistral": "mistral"}
    return said if said in FAMILIES else next((v for k, v in by_class.items() if folder.kind.startswith(k)), "llama")


def _rope(
    file: Path, said: Mapping[str, Any], config: Mapping[str, Any], family: Family
) -> tuple[float, dict[str, Any] | None, int]:
    """Base of the frequencies, what is done to them, and the longest text: as old and new files write it."""
    inner = said.get("rope_scaling") or said.get("rope_parameters") or {}
    if not isinstance(inner, dict):
        raise ValueError(f"{file}: rope_scaling={inner!r}; allowed: a table of settings, or null")
    name = inner.get("rope_type", inner.get("type", "default"))
    theta = inner.get("rope_theta") or config["rope_theta"] or family.theta
    keys = {"factor": "factor", "low_freq_factor": "low", "high_freq_factor": "high"}
    keys |= {"original_max_position_embeddings": "original"}
    wanted = {"linear": ("factor",), "llama3": tuple(keys)}.get(name, ())
    # positions of three axes are one for text; frequencies that grow with the text begin to behind the longest
    allowed = ("default", "mrope", "linear", "llama3", "dynamic")
    if name not in allowed:
        raise ValueError(f"{file}: rope_type={name!r}; allowed: {', '.join(allowed)}")
    inner = {"original_max_position_embeddings": config["max_position_embeddings"], **inner}
    for key, value in {"rope_theta": theta, "partial_rotary_factor": 1.0, **inner}.items():
        if key in (*wanted, "rope_theta") and not number().fits(value):
            raise ValueError(f"{file}: {key}={value!r}; allowed: {number().allowed}")
        if key == "partial_rotary_factor" and value not in (1, None):
            raise ValueError(f"{file}: {key}={value!r}; allowed: 1")
    for key in wanted:
        if key not in inner:
            raise ValueError(f"{file}: {key} is missing beside rope_type={name!r}")
    rope = {"name": name} | {keys[key]: float(inner[key]) for key in wanted} if wanted else None
    return theta, rope, config["max_position_embeddings"] if name == "dynamic" else LARGEST


def _window(
    folder: EncoderFolder, config: Mapping[str, Any], family: Family, depth: int, length: int
) -> tuple[int | None, int]:
    """The window of all layers, and the longest text: where some layers have a window, none that is longer than it."""
    window = config["sliding_window"]
    if window is None or (family.asked and not config["use_sliding_window"]):
        return None, length
    if family.gemma:
        has = [layer % 2 == 0 for layer in range(depth)]
    else:
        has = [not family.asked or layer >= config["max_window_layers"] for layer in range(depth)]
    kinds = folder.config.get("layer_types")
    if kinds is not None and (family.asked or family.gemma):  # Mistral's class does not read them
        if not isinstance(kinds, list) or len(kinds) != depth:
            raise ValueError(f"{folder.file}: layer_types={kinds!r}; allowed: a list of {depth}, one a layer")
        has = [kind == "sliding_attention" for kind in kinds]
    if all(has):
        return window, length
    return None, min(length, window) if any(has) else length
