"""Z-Image weights of other projects: the two published layouts as tables, and `load_z_image`.

"diffusers" is the layout of ZImageTransformer2DModel, in which Tongyi-MAI publishes (Z-Image, Z-Image-Turbo),
"original" that of single files, which fuse queries, keys and values. Both are the same function of the same numbers.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

import jax

from difax.core.contracts import Model, Params
from difax.models.z_image import PATCH, z_image
from difax.weights.checkpoint import Source, tensor_shapes
from difax.weights.published import (
    Foreign,
    Published,
    Untold,
    check_arguments,
    check_known,
    choose_layout,
    dense,
    load_foreign,
    stored_depth,
    stored_shape,
)
from difax.weights.settings import check_agrees, flag, number, one_of, read_settings, rows_of, several, whole

Table = dict[str, Source]

# stage, or the caption's refiners -> their name in both layouts
LISTS = {"caption": "context_refiner", "refiner": "noise_refiner", "blocks": "layers"}


def _kernel(path: str, *keys: str) -> Table:
    """The kernel of a dense layer without a bias."""
    return {f"{path}/kernel": Source(tuple(f"{key}.weight" for key in keys), (1, 0))}


def _blocks(stage: str, original: bool) -> Table:
    block = f"{LISTS[stage]}.{{{stage}}}"
    attention = f"{block}.attention"
    parts = [f"{attention}.qkv"] if original else [f"{attention}.to_{part}" for part in "qkv"]
    norm = "{}_norm" if original else "norm_{}"
    return {
        **_kernel(f"{stage}/qkv", *parts),
        f"{stage}/q_norm/scale": Source((f"{attention}.{norm.format('q')}.weight",)),
        f"{stage}/k_norm/scale": Source((f"{attention}.{norm.format('k')}.weight",)),
        **_kernel(f"{stage}/out", f"{attention}.{'out' if original else 'to_out.0'}"),
        # what is gated by silu is w1, and stands behind in ours
        **_kernel(f"{stage}/fc1", f"{block}.feed_forward.w3", f"{block}.feed_forward.w1"),
        **_kernel(f"{stage}/fc2", f"{block}.feed_forward.w2"),
        f"{stage}/attn_norm1/scale": Source((f"{block}.attention_norm1.weight",)),
        f"{stage}/attn_norm2/scale": Source((f"{block}.attention_norm2.weight",)),
        f"{stage}/mlp_norm1/scale": Source((f"{block}.ffn_norm1.weight",)),
        f"{stage}/mlp_norm2/scale": Source((f"{block}.ffn_norm2.weight",)),
        **({} if stage == "caption" else dense(f"{stage}/ada", f"{block}.adaLN_modulation.0")),
    }


def _table(original: bool) -> Table:
    embedder, final = ("x_embedder", "final_layer") if original else ("all_x_embedder.2-1", "all_final_layer.2-1")
    blocks: Table = {}
    for stage in LISTS:
        blocks |= _blocks(stage, original)
    return {
        **dense("ends/img", embedder),
        # stored as [1, D] and folded
        "ends/img_pad": Source(("x_pad_token",), (0, 1)),
        "ends/txt_norm/scale": Source(("cap_embedder.0.weight",)),
        **dense("ends/txt", "cap_embedder.1"),
        "ends/txt_pad": Source(("cap_pad_token",), (0, 1)),
        **dense("ends/time1", "t_embedder.mlp.0"),
        **dense("ends/time2", "t_embedder.mlp.2"),
        **dense("ends/ada", f"{final}.adaLN_modulation.1"),
        **dense("ends/out", f"{final}.linear"),
        **blocks,
    }


LAYOUTS = {"original": _table(True), "diffusers": _table(False)}


def load_z_image(
    path: str | os.PathLike, *, layout: str | None = None, param_dtype: Any = None, **overrides: Any
) -> tuple[Model, Params]:
    """A Z-Image and its weights from a safetensors checkpoint: `find_z_image`, then read.

    Args:
      path, layout, overrides: as `find_z_image`.
      param_dtype: floating dtype of the parameters; None keeps the file's.

    Returns:
      (model, params), params a nested dict of jax arrays, blocks stacked on a leading [depth] axis.
    """
    found = find_z_image(path, layout=layout, **overrides)
    return found.model, load_foreign(path, found, param_dtype)


def find_z_image(path: str | os.PathLike, *, layout: str | None = None, **overrides: Any) -> Foreign:
    """The Z-Image that is in a safetensors checkpoint of diffusers, or in a single file.

    Depths, widths, channels and whether queries and keys are normed come from the tensors, heads too where they are;
    the rotary sections are Z-Image's for its head width of 128; these and the rest (norm_eps, theta, time_scale,
    max_positions) come from a config.json beside the file, which has the class's defaults for keys that it lacks.

    Args:
      path: a .safetensors file, the .index.json of a sharded one, or a folder that holds one of the two.
      layout: "original", "diffusers", or None to recognise it by the tensors' names.
      **overrides: arguments of `difax.models.z_image.z_image` (size, text_tokens, ...), which win over what was found.

    Returns:
      The model and the layout table, for `load_z_image` and `difax.weights.convert`.

    Raises:
      ValueError: as `difax.weights.checkpoint.load_safetensors` and `z_image`; an unknown layout or argument; a
        config.json of another function (the omni network, other patches); heads or rotary sections that neither the
        file nor the caller gives.

    References: Z-Image Team 2025, arXiv:2511.22699.
    """
    check_arguments("load_z_image", overrides, inspect.signature(z_image).parameters)
    shapes = tensor_shapes(path, LAYOUTS.values())
    layout = choose_layout(path, "a Z-Image", LAYOUTS, shapes, layout)
    fields = _geometry(path, LAYOUTS[layout], shapes)
    fields = {**fields, **_config(path, fields), **overrides}
    check_known(path, fields, {"heads": "the number of attention heads"})
    if "axes_dim" not in fields:
        k = fields["width"] // fields["heads"]
        if k != 128:
            raise Untold(
                f"{path}: the rotary sections of a head width of {k} are not stored; give axes_dim=...", "axes_dim"
            )
    model = z_image(**fields)
    table = rows_of(LAYOUTS[layout], jax.eval_shape(model.init, jax.random.key(0)))
    layers = {"caption": fields["refiner_depth"], **{stage.name: stage.depth for stage in model.stages}}
    return Foreign(model, table, layers, UNUSED, geometry=fields)


# a norm that single files may hold and no forward pass reads
UNUSED = {"norm_final.weight": None}


def _geometry(path: Any, table: Table, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The arguments of `z_image` that the tensors' shapes tell."""
    shape = stored_shape(path, table, shapes)
    width, features = shape("ends/img/kernel")
    emitted = shape("ends/out/kernel")[0]
    if features % PATCH**2 or emitted != features:
        raise ValueError(
            f"{path}: takes {features} features a token and emits {emitted}; a Z-Image has equal ones, divisible by "
            f"{PATCH**2}"
        )
    normed = table["blocks/q_norm/scale"].keys[0].format(blocks=0) in shapes
    found = {
        "depth": stored_depth(table, shapes, "blocks/qkv/kernel"),
        "refiner_depth": stored_depth(table, shapes, "refiner/qkv/kernel"),
        "width": width,
        "ffn": shape("blocks/fc1/kernel")[0],
        "channels": features // PATCH**2,
        "text_width": shape("ends/txt/kernel")[1],
        "time_hidden": shape("ends/time1/kernel")[0],
        "qk_norm": normed,
    }
    if normed:
        (head_width,) = shape("blocks/q_norm/scale", 1)
        if width % head_width:
            raise ValueError(f"{path}: width {width} is not divisible by the head width {head_width}")
        found["heads"] = width // head_width
    return found


CLASSES = ("ZImageTransformer2DModel",)
_PATCHES = "other patches are other networks, of which the pipelines use none"
SETTINGS = {
    "all_patch_size": several(1, one_of(PATCH, but=_PATCHES)),
    "all_f_patch_size": several(1, one_of(1, but=_PATCHES)),
    "in_channels": whole(),
    "dim": whole(),
    "n_layers": whole(),
    "n_refiner_layers": whole(),
    "n_heads": whole(),
    "norm_eps": number(most=1),
    "qk_norm": flag(),
    "cap_feat_dim": whole(),
    "siglip_feat_dim": one_of(None, but="the omni network takes other pictures too"),
    "rope_theta": number(),
    "t_scale": number(),
    "axes_dims": several(3, whole(2)),
    "axes_lens": several(3, whole()),
}  # n_kv_heads is not read there either: keys are as wide as queries


def _config(path: str | os.PathLike, found: dict[str, Any]) -> dict[str, Any]:
    """Heads, rotary sections and numbers from the config.json that diffusers writes beside the weights, if there."""
    file, config = read_settings(path, CLASSES, SETTINGS)
    same = {
        "in_channels": "channels",
        "dim": "width",
        "n_layers": "depth",
        "n_refiner_layers": "refiner_depth",
        "n_heads": "heads",
        "qk_norm": "qk_norm",
        "cap_feat_dim": "text_width",
    }
    check_agrees(file, config, {key: found[field] for key, field in same.items() if field in found})
    names = {
        "heads": "n_heads",
        "norm_eps": "norm_eps",
        "theta": "rope_theta",
        "time_scale": "t_scale",
        "axes_dim": "axes_dims",
        "max_positions": "axes_lens",
    }
    said = {field: config[key] for field, key in names.items() if key in config}
    heads = said.get("heads", found.get("heads"))
    axes = said.get("axes_dim")
    if axes is not None and heads and (sum(axes) * heads != found["width"] or any(width % 2 for width in axes)):
        allowed = f"three even widths that add up to {found['width'] // heads}"
        raise ValueError(f"{file}: axes_dims={axes}; allowed: {allowed}")
    return {field: tuple(value) if isinstance(value, list) else value for field, value in said.items()}


PUBLISHED = Published(find_z_image, LAYOUTS, CLASSES)
