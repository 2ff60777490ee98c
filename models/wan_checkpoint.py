"""Wan 2.1 text-to-video weights of other projects: the two published layouts as tables, and `load_wan`.

"original" is the layout of Wan-Video/Wan2.1, "diffusers" that of WanTransformer3DModel. Both compute the same function;
what diffusers calls norm2 (before the cross-attention) is norm3 in the original.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import jax

from difax.core.contracts import Model, Params
from difax.models.wan import VARIANTS, WanConfig, wan
from difax.weights.checkpoint import Source, tensor_shapes
from difax.weights.published import (
    Foreign,
    Published,
    check_arguments,
    check_known,
    choose_layout,
    dense,
    load_foreign,
    stored_depth,
    stored_shape,
)
from difax.weights.settings import (
    check_agrees,
    flag,
    number,
    one_of,
    optional,
    read_settings,
    rows_of,
    several,
    stored_heads,
    whole,
)

TABLE_AXES = (0, 1, 2)  # tables are stored as [1, 6, D] and folded to [6, D]


def _table(
    attn: str, cross: str, cross_norm: str, out: str, part: str, ffn: tuple[str, str], table: str
) -> dict[str, Source]:
    """What the blocks of both layouts have in common, but for the names."""
    return {
        # a convolution's [D, C, p, q, r] -> [p, q, r, C, D]: our patches run over frame, row, column, channel
        "ends/patch/kernel": Source(("patch_embedding.weight",), (2, 3, 4, 1, 0)),
        "ends/patch/bias": Source(("patch_embedding.bias",)),
        "blocks/table": Source((f"blocks.{{layer}}.{table}",), TABLE_AXES),
        **dense("blocks/qkv", *(f"{attn}.{part}{p}" for p in "qkv")),
        "blocks/norm_q/scale": Source((f"{attn}.norm_q.weight",)),
        "blocks/norm_k/scale": Source((f"{attn}.norm_k.weight",)),
        **dense("blocks/out", f"{attn}.{out}"),
        "blocks/cross_norm/scale": Source((f"{cross_norm}.weight",)),
        "blocks/cross_norm/bias": Source((f"{cross_norm}.bias",)),
        **dense("blocks/cross_q", f"{cross}.{part}q"),
        **dense("blocks/cross_kv", f"{cross}.{part}k", f"{cross}.{part}v"),
        "blocks/cross_norm_q/scale": Source((f"{cross}.norm_q.weight",)),
        "blocks/cross_norm_k/scale": Source((f"{cross}.norm_k.weight",)),
        **dense("blocks/cross_out", f"{cross}.{out}"),
        **dense("blocks/fc1", f"blocks.{{layer}}.{ffn[0]}"),
        **dense("blocks/fc2", f"blocks.{{layer}}.{ffn[1]}"),
    }


_BLOCK, _CONDITION = "blocks.{layer}", "condition_embedder"
ORIGINAL = {
    **_table(
        f"{_BLOCK}.self_attn", f"{_BLOCK}.cross_attn", f"{_BLOCK}.norm3", "o", "", ("ffn.0", "ffn.2"), "modulation"
    ),
    **dense("ends/time1", "time_embedding.0"),
    **dense("ends/time2", "time_embedding.2"),
    **dense("ends/six", "time_projection.1"),
    **dense("ends/text1", "text_embedding.0"),
    **dense("ends/text2", "text_embedding.2"),
    "ends/table": Source(("head.modulation",), TABLE_AXES),
    **dense("ends/out", "head.head"),
}
DIFFUSERS = {
    **_table(
        f"{_BLOCK}.attn1",
        f"{_BLOCK}.attn2",
        f"{_BLOCK}.norm2",
        "to_out.0",
        "to_",
        ("ffn.net.0.proj", "ffn.net.2"),
        "scale_shift_table",
    ),
    **dense("ends/time1", f"{_CONDITION}.time_embedder.linear_1"),
    **dense("ends/time2", f"{_CONDITION}.time_embedder.linear_2"),
    **dense("ends/six", f"{_CONDITION}.time_proj"),
    **dense("ends/text1", f"{_CONDITION}.text_embedder.linear_1"),
    **dense("ends/text2", f"{_CONDITION}.text_embedder.linear_2"),
    "ends/table": Source(("scale_shift_table",), TABLE_AXES),
    **dense("ends/out", "proj_out"),
}
LAYOUTS = {"original": ORIGINAL, "diffusers": DIFFUSERS}


def load_wan(
    path: str | os.PathLike, *, layout: str | None = None, param_dtype: Any = None, **overrides: Any
) -> tuple[Model, Params]:
    """A Wan 2.1 text-to-video network and its weights from a safetensors checkpoint: `find_wan`, then read.

    Args:
      path, layout, overrides: as `find_wan`.
      param_dtype: floating dtype of the parameters; None keeps the file's.

    Returns:
      (model, params), params a nested dict of jax arrays with blocks stacked on a leading [depth] axis.
    """
    found = find_wan(path, layout=layout, **overrides)
    return found.model, load_foreign(path, found, param_dtype)


def find_wan(path: str | os.PathLike, *, layout: str | None = None, **overrides: Any) -> Foreign:
    """The Wan 2.1 text-to-video network that is in a checkpoint of Wan-Video/Wan2.1 or diffusers.

    Depth, width, ffn, patch, channels, text_width, freq_dim and which norms there are come from the tensors, heads from
    the published sizes or, with eps, text_tokens and max_positions, from a config.json beside the file. The size of the
    latents stands nowhere and must be given.

    Args:
      path: a .safetensors file, the .index.json of a sharded one, or a folder that holds one of the two.
      layout: "original", "diffusers", or None to recognise it by the tensors' names.
      **overrides: arguments of `difax.models.wan.wan` (size, heads, dtype, ...), which win over what was found.

    Returns:
      The model and the layout table, for `load_wan` and `difax.weights.convert`.

    Raises:
      ValueError: as `difax.weights.checkpoint.load_safetensors` and `wan`; an unknown layout or argument; a config.json
        of another function (image-to-video); heads or size that neither the file nor the caller gives.

    References: Wan Team 2025, arXiv:2503.20314.
    """
    check_arguments("load_wan", overrides, {field.name for field in dataclasses.fields(WanConfig)})
    shapes = tensor_shapes(path, LAYOUTS.values())
    layout = choose_layout(path, "a Wan", LAYOUTS, shapes, layout)
    fields = _geometry(path, LAYOUTS[layout], shapes)
    fields = {**fields, **_config(path, fields), **overrides}
    unknown = {"heads": "the number of attention heads", "size": "the latents' (frames, height, width)"}
    check_known(path, fields, unknown)
    geometry = tuple(fields[name] for name in ("depth", "width", "heads", "ffn"))
    fields = {"variant": next((n for n, preset in VARIANTS.items() if preset == geometry), None), **fields}
    model = wan(**fields)
    table = rows_of(LAYOUTS[layout], jax.eval_shape(model.init, jax.random.key(0)))
    return Foreign(model, table, {"layer": fields["depth"]}, geometry=fields)


def _geometry(path: Any, table: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The arguments of `wan` that the tensors' shapes tell."""

    shape = stored_shape(path, table, shapes)
    stored = lambda parameter: table[parameter].keys[0].format(layer=0) in shapes  # noqa: E731
    width, channels, *patch = shape("ends/patch/kernel", 5)
    emitted, expected = shape("ends/out/kernel", 2)[0], math.prod(patch) * channels
    if emitted != expected:
        raise ValueError(
            f"{path}: the final layer emits {emitted} features for patches of {patch} with {channels} channels; "
            f"expected {expected} (image-to-video networks take more channels than they emit)"
        )
    fields = {
        "depth": stored_depth(table, shapes, "blocks/qkv/kernel"),
        "width": width,
        "ffn": shape("blocks/fc1/kernel", 2)[0],
        "channels": channels,
        "patch": tuple(patch),
        "text_width": shape("ends/text1/kernel", 2)[1],
        "freq_dim": shape("ends/time1/kernel", 2)[1],
        "cross_attn_norm": stored("blocks/cross_norm/scale"),
        "qk_norm": stored("blocks/norm_q/scale"),
    }
    for _, preset_width, heads, _ in VARIANTS.values():
        if preset_width == width:
            fields["heads"] = heads
    return fields


CLASSES = ("WanTransformer3DModel", "WanModel")
_IMAGE = "image-to-video is another network"
SETTINGS = {
    "patch_size": several(3, whole()),
    "eps": number(),
    "freq_dim": whole(2),
    "ffn_dim": whole(),
    "num_layers": whole(),
    "text_dim": whole(),
    "cross_attn_norm": flag(),
    "qk_norm": one_of("rms_norm_across_heads", None, True, False),
    # of diffusers
    "num_attention_heads": whole(),
    "attention_head_dim": whole(),
    "in_channels": whole(),
    "out_channels": optional(whole()),
    "rope_max_seq_len": whole(),
    "image_dim": one_of(None, but=_IMAGE),
    "added_kv_proj_dim": one_of(None, but=_IMAGE),
    "pos_embed_seq_len": one_of(None, but=_IMAGE),
    # of the original
    "model_type": one_of("t2v", but=_IMAGE),
    "num_heads": whole(),
    "dim": whole(),
    "in_dim": whole(),
    "out_dim": whole(),
    "text_len": whole(),
}


def _config(path: str | os.PathLike, found: dict[str, Any]) -> dict[str, Any]:
    """Heads, eps, caption tokens and positions from the config.json that both projects put beside the weights."""
    file, config = read_settings(path, CLASSES, SETTINGS)
    same = {"freq_dim": "freq_dim", "ffn_dim": "ffn", "num_layers": "depth", "text_dim": "text_width", "dim": "width"}
    same |= dict.fromkeys(("in_channels", "in_dim", "out_channels", "out_dim"), "channels")
    said = {name: found[field] for name, field in same.items()} | {"patch_size": list(found["patch"])}
    check_agrees(file, config, said | {"cross_attn_norm": found["cross_attn_norm"]})
    if config.get("qk_norm") and not found["qk_norm"]:  # where there are norms, diffusers takes them without asking
        raise ValueError(f"{file}: qk_norm={config['qk_norm']!r}; allowed: null, as the checkpoint has no such norms")
    which = "num_heads" if "num_heads" in config else "num_attention_heads"
    heads = stored_heads(file, config, which, "attention_head_dim", found["width"], 128)
    names = (
        ("eps", "eps"),
        ("text_tokens", "text_len"),
        ("max_positions", "rope_max_seq_len"),
    )
    return heads | {field: config[name] for field, name in names if name in config}


PUBLISHED = Published(find_wan, LAYOUTS, CLASSES)
