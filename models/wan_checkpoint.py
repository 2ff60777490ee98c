"""Wan 2.1 and 2.2 weights of other projects: the two published layouts as tables, and `load_wan`.

"original" is the layout of Wan-Video/Wan2.1 and Wan2.2, "diffusers" that of WanTransformer3DModel. Both compute the
same function; what diffusers calls norm2 (before the cross-attention) is norm3 in the original.
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
IMAGE = "condition_embedder.image_embedder"


def _norm(path: str, key: str) -> dict[str, Source]:
    return {f"{path}/scale": Source((f"{key}.weight",)), f"{path}/bias": Source((f"{key}.bias",))}


def _table(
    attn: str,
    cross: str,
    cross_norm: str,
    out: str,
    part: str,
    ffn: tuple[str, str],
    table: str,
    image: tuple[str, str, str],
    embedder: tuple[str, str, str, str],
) -> dict[str, Source]:
    """What both layouts have in common, but for the names. image: of its keys, values and their norm; embedder: of the
    norm, the two layers and the norm that the image goes through."""
    first, one, two, last = embedder
    return {
        **_norm("ends/image_norm1", first),
        **dense("ends/image1", one),
        **dense("ends/image2", two),
        **_norm("ends/image_norm2", last),
        **dense("blocks/image_kv", f"{cross}.{image[0]}", f"{cross}.{image[1]}"),
        "blocks/image_norm_k/scale": Source((f"{cross}.{image[2]}.weight",)),
        # a convolution's [D, C, p, q, r] -> [p, q, r, C, D]: our patches run over frame, row, column, channel
        "ends/patch/kernel": Source(("patch_embedding.weight",), (2, 3, 4, 1, 0)),
        "ends/patch/bias": Source(("patch_embedding.bias",)),
        "blocks/table": Source((f"blocks.{{layer}}.{table}",), TABLE_AXES),
        **dense("blocks/qkv", *(f"{attn}.{part}{p}" for p in "qkv")),
        "blocks/norm_q/scale": Source((f"{attn}.norm_q.weight",)),
        "blocks/norm_k/scale": Source((f"{attn}.norm_k.weight",)),
        **dense("blocks/out", f"{attn}.{out}"),
        **_norm("blocks/cross_norm", cross_norm),
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
        f"{_BLOCK}.self_attn",
        f"{_BLOCK}.cross_attn",
        f"{_BLOCK}.norm3",
        "o",
        "",
        ("ffn.0", "ffn.2"),
        "modulation",
        ("k_img", "v_img", "norm_k_img"),
        ("img_emb.proj.0", "img_emb.proj.1", "img_emb.proj.3", "img_emb.proj.4"),
    ),
    "ends/image_positions": Source(("img_emb.emb_pos",), TABLE_AXES),
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
        ("add_k_proj", "add_v_proj", "norm_added_k"),
        (f"{IMAGE}.norm1", f"{IMAGE}.ff.net.0.proj", f"{IMAGE}.ff.net.2", f"{IMAGE}.norm2"),
    ),
    "ends/image_positions": Source((f"{IMAGE}.pos_embed",), TABLE_AXES),
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
    """A Wan network and its weights from a safetensors checkpoint: `find_wan`, then read.

    Args:
      path, layout, overrides: as `find_wan`.
      param_dtype: floating dtype of the parameters; None keeps the file's.

    Returns:
      (model, params), params a nested dict of jax arrays with blocks stacked on a leading [depth] axis.
    """
    found = find_wan(path, layout=layout, **overrides)
    return found.model, load_foreign(path, found, param_dtype)


def find_wan(path: str | os.PathLike, *, layout: str | None = None, **overrides: Any) -> Foreign:
    """The Wan 2.1 or 2.2 network that is in a checkpoint of Wan-Video or diffusers.

    Depth, width, ffn, patch, channels, those of the condition, text_width, freq_dim, the image's layers and which norms
    there are come from the tensors, heads from the published sizes or, with eps, text_tokens and max_positions, from a
    config.json beside the file. The size of the latents stands nowhere and must be given, and so must first_frame be.

    Args:
      path: a .safetensors file, the .index.json of a sharded one, or a folder that holds one of the two.
      layout: "original", "diffusers", or None to recognise it by the tensors' names.
      **overrides: arguments of `difax.models.wan.wan` (size, heads, dtype, ...), which win over what was found.

    Returns:
      The model and the layout table, for `load_wan` and `difax.weights.convert`.

    Raises:
      ValueError: as `difax.weights.checkpoint.load_safetensors` and `wan`; an unknown layout or argument; a config.json
        of another function; heads or size that neither the file nor the caller gives.

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
    unused = {name: None for name in shapes if name.endswith(UNUSED)}
    return Foreign(model, table, {"layer": fields["depth"]}, unused, fields)


UNUSED = ".attn2.norm_added_q.weight"  # which some versions of diffusers wrote and none reads


def _geometry(path: Any, table: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The arguments of `wan` that the tensors' shapes tell."""

    shape = stored_shape(path, table, shapes)
    stored = lambda parameter: table[parameter].keys[0].format(layer=0) in shapes  # noqa: E731
    width, taken, *patch = shape("ends/patch/kernel", 5)
    emitted, most = shape("ends/out/kernel", 2)[0], math.prod(patch) * taken
    if emitted % math.prod(patch) or emitted > most:
        raise ValueError(
            f"{path}: the final layer emits {emitted} features for patches of {patch} with {taken} channels; "
            f"expected {most}, or fewer by whole channels in image-to-video networks"
        )
    channels = emitted // math.prod(patch)
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
        "condition_channels": taken - channels,
    }
    if stored("ends/image1/kernel"):
        fields |= {"image_width": shape("ends/image1/kernel", 2)[1], "added_kv": stored("blocks/image_kv/kernel")}
        if stored("ends/image_positions"):
            fields |= {"image_positions": True, "image_tokens": shape("ends/image_positions", 3)[1]}
    for _, preset_width, heads, _ in VARIANTS.values():
        if preset_width == width:
            fields["heads"] = heads
    return fields


CLASSES = ("WanTransformer3DModel", "WanModel")
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
    "image_dim": optional(whole()),
    "added_kv_proj_dim": optional(whole()),
    "pos_embed_seq_len": optional(whole()),
    # of the original
    "model_type": one_of("t2v", "i2v", "flf2v", "ti2v", but="the others are other networks"),
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
    same |= dict.fromkeys(("out_channels", "out_dim"), "channels")
    said = {name: found[field] for name, field in same.items()} | {"patch_size": list(found["patch"])}
    said |= dict.fromkeys(("in_channels", "in_dim"), found["channels"] + found["condition_channels"])
    image = found.get("image_width")
    said |= {"image_dim": image, "added_kv_proj_dim": found["width"] if image and found["added_kv"] else None}
    said["pos_embed_seq_len"] = found["image_tokens"] if "image_tokens" in found else None
    check_agrees(file, config, said | {"cross_attn_norm": found["cross_attn_norm"]})
    if config.get("qk_norm") and not found["qk_norm"]:  # where there are norms, diffusers takes them without asking
        raise ValueError(f"{file}: qk_norm={config['qk_norm']!r}; allowed: null, as the checkpoint has no such norms")
    kind, more = config.get("model_type"), found["condition_channels"]
    if kind is not None and (kind in ("i2v", "flf2v")) != (more > 0):
        kinds = "i2v or flf2v" if more else "t2v or ti2v"
        raise ValueError(f"{file}: model_type={kind!r}; allowed: {kinds}, by its {more} channels of a condition")
    which = "num_heads" if "num_heads" in config else "num_attention_heads"
    heads = stored_heads(file, config, which, "attention_head_dim", found["width"], 128)
    names = (
        ("eps", "eps"),
        ("text_tokens", "text_len"),
        ("max_positions", "rope_max_seq_len"),
    )
    return heads | {field: config[name] for field, name in names if name in config}


PUBLISHED = Published(find_wan, LAYOUTS, CLASSES)
