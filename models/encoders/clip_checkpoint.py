"""The weights of CLIP encoders: the layouts of transformers, with its two prefixes or none, and of OpenCLIP."""

from __future__ import annotations

from typing import Any

import jax

from difax.models.encoders.clip import clip_text, clip_vision
from difax.models.encoders.folder import EncoderFolder
from difax.models.encoders.layers import ACTIVATIONS
from difax.weights.checkpoint import Source
from difax.weights.published import Foreign, Table, dense, stored_depth, stored_shape
from difax.weights.settings import Setting, check_agrees, number, one_of, rows_of, whole


def _norm(path: str, name: str) -> dict[str, Source]:
    return {f"{path}/scale": Source((f"{name}.weight",)), f"{path}/bias": Source((f"{name}.bias",))}


def _blocks(prefix: str) -> dict[str, Source]:
    layer = f"{prefix}encoder.layers.{{layer}}"
    return {
        **_norm("blocks/norm1", f"{layer}.layer_norm1"),
        **_norm("blocks/norm2", f"{layer}.layer_norm2"),
        **dense("blocks/qkv", *(f"{layer}.self_attn.{p}_proj" for p in "qkv")),
        **dense("blocks/out", f"{layer}.self_attn.out_proj"),
        **dense("blocks/fc1", f"{layer}.mlp.fc1"),
        **dense("blocks/fc2", f"{layer}.mlp.fc2"),
    }


def _text(prefix: str) -> dict[str, Source]:
    return {
        "ends/tokens/embedding": Source((f"{prefix}embeddings.token_embedding.weight",)),
        "ends/places": Source((f"{prefix}embeddings.position_embedding.weight",)),
        **_norm("ends/final", f"{prefix}final_layer_norm"),
        "ends/projection/kernel": Source(("text_projection.weight",), (1, 0)),
        **_blocks(prefix),
    }


def _vision(prefix: str) -> dict[str, Source]:
    return {
        "ends/whole": Source((f"{prefix}embeddings.class_embedding",)),
        # a convolution's [D, C, p, q] -> [p, q, C, D]: our patches run over row, column, channel
        "ends/patch/kernel": Source((f"{prefix}embeddings.patch_embedding.weight",), (2, 3, 1, 0)),
        "ends/places": Source((f"{prefix}embeddings.position_embedding.weight",)),
        **_norm("ends/before", f"{prefix}pre_layrnorm"),  # as the library spells it
        **_norm("ends/final", f"{prefix}post_layernorm"),
        "ends/projection/kernel": Source(("visual_projection.weight",), (1, 0)),
        **_blocks(prefix),
    }


_BLOCK = "transformer.resblocks.{layer}"
OPENCLIP = {
    "ends/tokens/embedding": Source(("token_embedding.weight",)),
    "ends/places": Source(("positional_embedding",)),
    **_norm("ends/final", "ln_final"),
    "ends/projection/kernel": Source(("text_projection",)),
    **_norm("blocks/norm1", f"{_BLOCK}.ln_1"),
    **_norm("blocks/norm2", f"{_BLOCK}.ln_2"),
    "blocks/qkv/kernel": Source((f"{_BLOCK}.attn.in_proj_weight",), (1, 0)),
    "blocks/qkv/bias": Source((f"{_BLOCK}.attn.in_proj_bias",)),
    **dense("blocks/out", f"{_BLOCK}.attn.out_proj"),
    **dense("blocks/fc1", f"{_BLOCK}.mlp.c_fc"),
    **dense("blocks/fc2", f"{_BLOCK}.mlp.c_proj"),
}
LAYOUTS = {"transformers": _text("text_model."), "transformers 5": _text(""), "openclip": OPENCLIP}
VISION_LAYOUTS = {"transformers": _vision("vision_model."), "transformers 5": _vision("")}
# the other encoder of a whole CLIP, its temperature, and a table of places that counts from 0
IGNORED = r"position_ids$|^(logit_scale|attn_mask|visual\.|vision_model\.|text_model\.|(text|visual)_projection)"


_ACTIVATION = one_of(*ACTIVATIONS)
# what a missing key means, of CLIPTextConfig and CLIPVisionConfig
SETTINGS: dict[str, tuple[Setting, Any]] = {
    "hidden_size": (whole(), None),
    "intermediate_size": (whole(), None),
    "num_hidden_layers": (whole(), None),
    "num_attention_heads": (whole(), 8),
    "vocab_size": (whole(), None),
    "max_position_embeddings": (whole(), None),
    "hidden_act": (_ACTIVATION, "quick_gelu"),
    "layer_norm_eps": (number(), 1e-5),
    "eos_token_id": (whole(0), 49407),
}
VISION_SETTINGS: dict[str, tuple[Setting, Any]] = {
    "hidden_size": (whole(), None),
    "intermediate_size": (whole(), None),
    "num_hidden_layers": (whole(), None),
    "num_attention_heads": (whole(), 12),
    "num_channels": (whole(), None),
    "image_size": (whole(), 224),
    "patch_size": (whole(), None),
    "hidden_act": (_ACTIVATION, "quick_gelu"),
    "layer_norm_eps": (number(), 1e-5),
}
KEYS = {"hidden_size": "width", "intermediate_size": "ffn", "num_hidden_layers": "depth"}


def find_clip_text(folder: EncoderFolder, **overrides: Any) -> Foreign:
    """The CLIP text encoder of a folder, or of a single file; geometry from the tensors, the rest from its config.

    Without a config.json, heads have 64 features, the end token is the largest id, and the activation is that of L (of
    width 768) or of OpenCLIP.

    Args:
      **overrides: arguments of `difax.models.encoders.clip.clip_text`, which win over what was found.

    Raises:
      ValueError: as `load_safetensors` and `clip_text`; a config.json that contradicts the tensors.
    """
    folder = folder.part("text_config")
    table, shapes = folder.tensors("a CLIP text encoder", LAYOUTS)
    shape = stored_shape(folder.path, table, shapes)
    vocabulary, width = shape("ends/tokens/embedding")
    config = folder.settled(SETTINGS)
    known = bool(folder.config)
    projected = not folder.kind or "WithProjection" in folder.kind
    stored = table["ends/projection/kernel"].keys[0] in shapes
    if folder.kind and projected and not stored:
        shape("ends/projection/kernel")  # says that it is missing
    side = 1 if table is OPENCLIP else 0
    fields = {
        "depth": stored_depth(table, shapes, "blocks/fc1/kernel"),
        "width": width,
        "heads": config["num_attention_heads"] if known else max(width // 64, 1),
        "ffn": shape("blocks/fc1/kernel")[0],
        "vocabulary": vocabulary,
        "length": shape("ends/places")[0],
        "activation": config["hidden_act"] if known or width == 768 else "gelu",
        "projection": shape("ends/projection/kernel")[side] if projected and stored else None,
        "end": config["eos_token_id"] if known else 2,
        "eps": config["layer_norm_eps"],
    }
    keys = KEYS | {"vocab_size": "vocabulary", "max_position_embeddings": "length"}
    check_agrees(folder.file, folder.config, {key: fields[name] for key, name in keys.items()})
    return _found(clip_text(**fields | overrides), table, fields)


def find_clip_vision(folder: EncoderFolder, **overrides: Any) -> Foreign:
    """The CLIP vision encoder of a folder; geometry from the tensors, the rest from its config.

    Args:
      **overrides: arguments of `difax.models.encoders.clip.clip_vision`, which win over what was found.

    Raises:
      ValueError: as `load_safetensors` and `clip_vision`; no config.json, or one that contradicts the tensors.
    """
    folder = folder.part("vision_config")
    table, shapes = folder.tensors("a CLIP vision encoder", VISION_LAYOUTS)
    shape = stored_shape(folder.path, table, shapes)
    width, channels, patch, _ = shape("ends/patch/kernel", 4)
    config = folder.settled(VISION_SETTINGS)
    fields = {
        "depth": stored_depth(table, shapes, "blocks/fc1/kernel"),
        "width": width,
        "heads": config["num_attention_heads"],
        "ffn": shape("blocks/fc1/kernel")[0],
        "size": config["image_size"],
        "patch": patch,
        "channels": channels,
        "activation": config["hidden_act"],
        "projection": shape("ends/projection/kernel")[0] if "WithProjection" in folder.kind else None,
        "eps": config["layer_norm_eps"],
    }
    keys = KEYS | {"num_channels": "channels", "patch_size": "patch"}
    check_agrees(folder.file, folder.config, {key: fields[name] for key, name in keys.items()})
    return _found(clip_vision(**fields | overrides), table, fields)


def _found(encoder: Any, table: Table, fields: dict[str, Any]) -> Foreign:
    spec = jax.eval_shape(encoder.init, jax.random.key(0))
    return Foreign(encoder, rows_of(table, spec), {"layer": fields["depth"]}, geometry=fields, ignored=IGNORED)
