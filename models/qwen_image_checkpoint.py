"""Qwen-Image weights of other projects: their layout as a table, and `load_qwen_image`.

There is one layout, "diffusers", that of QwenImageTransformer2DModel; single files have the same names behind
`model.diffusion_model.`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from difax.core.contracts import Model, Params
from difax.models.flux import FREQUENCIES, PATCH
from difax.models.qwen_image import QwenImageConfig, qwen_image
from difax.weights.checkpoint import Source, tensor_shapes
from difax.weights.published import (
    Foreign,
    Published,
    Table,
    Untold,
    check_arguments,
    choose_layout,
    dense,
    load_foreign,
    stored_depth,
    stored_shape,
)
from difax.weights.settings import check_agrees, one_of, optional, read_settings, several, whole

_BLOCK = "transformer_blocks.{double}"


def _stream(path: str, name: str, attn: str, norm: str, out: str) -> dict[str, Source]:
    return {
        **dense(f"{path}/ada", f"{_BLOCK}.{name}_mod.1"),
        **dense(f"{path}/qkv", *(f"{_BLOCK}.attn.{attn.format(part)}" for part in "qkv")),
        f"{path}/q_norm": Source((f"{_BLOCK}.attn.{norm}q.weight",)),
        f"{path}/k_norm": Source((f"{_BLOCK}.attn.{norm}k.weight",)),
        **dense(f"{path}/out", f"{_BLOCK}.attn.{out}"),
        **dense(f"{path}/fc1", f"{_BLOCK}.{name}_mlp.net.0.proj"),
        **dense(f"{path}/fc2", f"{_BLOCK}.{name}_mlp.net.2"),
    }


DIFFUSERS = {
    **dense("ends/img", "img_in"),
    "ends/txt_norm": Source(("txt_norm.weight",)),
    **dense("ends/txt", "txt_in"),
    **dense("ends/time1", "time_text_embed.timestep_embedder.linear_1"),
    **dense("ends/time2", "time_text_embed.timestep_embedder.linear_2"),
    **dense("ends/ada", "norm_out.linear", order=(1, 0)),  # (scale, shift) there
    **dense("ends/out", "proj_out"),
    **_stream("double/img", "img", "to_{}", "norm_", "to_out.0"),
    **_stream("double/txt", "txt", "add_{}_proj", "norm_added_", "to_add_out"),
}
LAYOUTS = {"diffusers": DIFFUSERS}
AXES = (16, 56, 56)  # of a head of 128


def load_qwen_image(
    path: str | os.PathLike, *, layout: str | None = None, param_dtype: Any = None, **overrides: Any
) -> tuple[Model, Params]:
    """A Qwen-Image and its weights from a safetensors checkpoint: `find_qwen_image`, then read.

    Args:
      path, layout, overrides: as `find_qwen_image`.
      param_dtype: floating dtype of the parameters; None keeps the file's.

    Returns:
      (model, params), params a nested dict of jax arrays with blocks stacked on a leading [depth] axis.
    """
    found = find_qwen_image(path, layout=layout, **overrides)
    return found.model, load_foreign(path, found, param_dtype)


def find_qwen_image(path: str | os.PathLike, *, layout: str | None = None, **overrides: Any) -> Foreign:
    """The Qwen-Image that is in a checkpoint of diffusers, or in a single file of the same names.

    Depth, width, heads, latent channels, text width and MLP ratio come from the tensors' shapes. The rotary sections
    are those of its head width of 128; otherwise they come from a config.json beside the file, or must be given.

    Args:
      path: a .safetensors file, the .index.json of a sharded one, or a folder that holds one of the two.
      layout: "diffusers" or None.
      **overrides: arguments of `difax.models.qwen_image.qwen_image` (size, text_tokens, dtype, ...), which win over
        what was found.

    Returns:
      The model and the layout table, for `load_qwen_image` and `difax.weights.convert`.

    Raises:
      ValueError: as `difax.weights.checkpoint.load_safetensors` and `qwen_image`; an unknown layout or argument; a
        config.json of another function (the networks that edit or that draw layers); rotary sections that neither the
        file nor the caller gives.

    References: Qwen Team 2025, arXiv:2508.02324.
    """
    check_arguments("load_qwen_image", overrides, {field.name for field in dataclasses.fields(QwenImageConfig)})
    shapes = tensor_shapes(path, LAYOUTS.values())
    table = LAYOUTS[choose_layout(path, "a Qwen-Image", LAYOUTS, shapes, layout)]
    fields = _geometry(path, table, shapes)
    fields = {**fields, **_config(path, fields), **overrides}
    if "axes_dim" not in fields:
        k = fields["width"] // fields["heads"]
        if k != sum(AXES):
            raise Untold(
                f"{path}: the rotary sections of a head width of {k} are not stored; give axes_dim=...", "axes_dim"
            )
        fields["axes_dim"] = AXES
    return Foreign(qwen_image(**fields), table, {"double": fields["depth"]}, geometry=fields)


def _geometry(path: Any, table: Table, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The arguments of `qwen_image` that the tensors' shapes tell."""
    shape = stored_shape(path, table, shapes)
    width, features = shape("ends/img/kernel")
    (head_width,) = shape("double/img/q_norm", 1)
    emitted, waves = shape("ends/out/kernel")[0], shape("ends/time1/kernel")[1]
    if features % PATCH**2 or emitted != features:
        raise ValueError(
            f"{path}: takes {features} features a token and emits {emitted}; a Qwen-Image has equal ones, divisible by "
            f"{PATCH**2}"
        )
    if width % head_width:
        raise ValueError(f"{path}: width {width} is not divisible by the head width {head_width}")
    if waves != FREQUENCIES:
        raise ValueError(f"{path}: its time embedding takes {waves} features; a Qwen-Image's takes {FREQUENCIES}")
    return {
        "depth": stored_depth(table, shapes, "double/img/qkv/kernel"),
        "width": width,
        "heads": width // head_width,
        "channels": features // PATCH**2,
        "text_width": shape("ends/txt/kernel")[1],
        "mlp_ratio": max(shape("double/img/fc1/kernel")[0] // width, 1),
    }


CLASSES = ("QwenImageTransformer2DModel",)
SETTINGS = {
    "patch_size": whole(),
    "in_channels": whole(),
    "out_channels": optional(whole()),
    "num_layers": whole(),
    "attention_head_dim": whole(),
    "num_attention_heads": whole(),
    "joint_attention_dim": whole(),
    "guidance_embeds": one_of(False, but="no Qwen-Image takes the guidance scale"),
    "axes_dims_rope": several(3, whole(2)),
    "zero_cond_t": one_of(False, but="with it the network edits pictures, which stand beside the latents at time 0"),
    "use_additional_t_cond": one_of(False, but="with it the network draws layers"),
    "use_layer3d_rope": one_of(False, but="with it the network draws layers"),
}


def _config(path: str | os.PathLike, found: dict[str, Any]) -> dict[str, Any]:
    """The rotary sections from the config.json that diffusers writes beside the weights, if there."""
    file, config = read_settings(path, CLASSES, SETTINGS)
    head_width, features = found["width"] // found["heads"], found["channels"] * PATCH**2
    said = {
        "in_channels": features,
        "num_layers": found["depth"],
        "attention_head_dim": head_width,
        "num_attention_heads": found["heads"],
        "joint_attention_dim": found["text_width"],
    }
    check_agrees(file, config, said)
    patch = config.get("patch_size", PATCH)
    if "out_channels" in config and patch**2 * config["out_channels"] != features:
        raise ValueError(
            f"{file}: patch_size={patch} and out_channels={config['out_channels']}; allowed: the square of one times "
            f"the other {features}, as the checkpoint's tensors say"
        )
    axes = config.get("axes_dims_rope")
    if axes is None:
        return {}
    if sum(axes) != head_width or any(width % 2 for width in axes):
        raise ValueError(f"{file}: axes_dims_rope={axes}; allowed: three even widths that add up to {head_width}")
    return {"axes_dim": tuple(axes)}


PUBLISHED = Published(find_qwen_image, LAYOUTS, CLASSES)
