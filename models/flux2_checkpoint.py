"""FLUX.2 weights of other projects: the two published layouts as tables, and `load_flux2`.

"original" is the layout of black-forest-labs/flux2 (flux2-dev.safetensors, flux-2-klein-4b.safetensors, ...),
"diffusers" that of Flux2Transformer2DModel. They are the same function of the same numbers: diffusers stores queries,
keys and values of the double blocks apart, and (scale, shift) of the final layer where the original has (shift, scale).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax

from difax.core.contracts import Model, Params
from difax.models.flux2 import VARIANTS, Flux2Config, flux2
from difax.weights.checkpoint import Source, tensor_shapes
from difax.weights.published import (
    Foreign,
    Published,
    Table,
    Untold,
    check_arguments,
    choose_layout,
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
    whole,
)


def _kernel(path: str, *keys: str, **more: Any) -> dict[str, Source]:
    """The row of a dense layer, none of which has a bias."""
    return {f"{path}/kernel": Source(tuple(f"{key}.weight" for key in keys), (1, 0), **more)}


def _norms(path: str, q: str, k: str) -> dict[str, Source]:
    return {f"{path}/q_norm": Source((q,)), f"{path}/k_norm": Source((k,))}


def _original_stream(stream: str) -> dict[str, Source]:
    block, path = f"double_blocks.{{double}}.{stream}", f"double/{stream}"
    norm = f"{block}_attn.norm"
    return {
        **_kernel(f"{path}/qkv", f"{block}_attn.qkv"),
        **_norms(path, f"{norm}.query_norm.scale", f"{norm}.key_norm.scale"),
        **_kernel(f"{path}/out", f"{block}_attn.proj"),
        **_kernel(f"{path}/fc1", f"{block}_mlp.0"),
        **_kernel(f"{path}/fc2", f"{block}_mlp.2"),
    }


_ORIGINAL_SINGLE = "single_blocks.{single}"
ORIGINAL = {
    **_kernel("ends/img", "img_in"),
    **_kernel("ends/txt", "txt_in"),
    **_kernel("ends/time1", "time_in.in_layer"),
    **_kernel("ends/time2", "time_in.out_layer"),
    **_kernel("ends/guidance1", "guidance_in.in_layer"),
    **_kernel("ends/guidance2", "guidance_in.out_layer"),
    **_kernel("ends/mod_img", "double_stream_modulation_img.lin"),
    **_kernel("ends/mod_txt", "double_stream_modulation_txt.lin"),
    **_kernel("ends/mod_single", "single_stream_modulation.lin"),
    **_kernel("ends/ada", "final_layer.adaLN_modulation.1"),
    **_kernel("ends/out", "final_layer.linear"),
    **_original_stream("img"),
    **_original_stream("txt"),
    **_kernel("single/linear1", f"{_ORIGINAL_SINGLE}.linear1"),
    **_norms("single", f"{_ORIGINAL_SINGLE}.norm.query_norm.scale", f"{_ORIGINAL_SINGLE}.norm.key_norm.scale"),
    **_kernel("single/linear2", f"{_ORIGINAL_SINGLE}.linear2"),
}


_DOUBLE, _SINGLE = "transformer_blocks.{double}", "single_transformer_blocks.{single}"


def _diffusers_stream(stream: str, attn: str, norm: str, out: str, ff: str) -> dict[str, Source]:
    path = f"double/{stream}"
    return {
        **_kernel(f"{path}/qkv", *(f"{_DOUBLE}.attn.{attn.format(part)}" for part in "qkv")),
        **_norms(path, f"{_DOUBLE}.attn.{norm}q.weight", f"{_DOUBLE}.attn.{norm}k.weight"),
        **_kernel(f"{path}/out", f"{_DOUBLE}.attn.{out}"),
        **_kernel(f"{path}/fc1", f"{_DOUBLE}.{ff}.linear_in"),
        **_kernel(f"{path}/fc2", f"{_DOUBLE}.{ff}.linear_out"),
    }


DIFFUSERS = {
    **_kernel("ends/img", "x_embedder"),
    **_kernel("ends/txt", "context_embedder"),
    **_kernel("ends/time1", "time_guidance_embed.timestep_embedder.linear_1"),
    **_kernel("ends/time2", "time_guidance_embed.timestep_embedder.linear_2"),
    **_kernel("ends/guidance1", "time_guidance_embed.guidance_embedder.linear_1"),
    **_kernel("ends/guidance2", "time_guidance_embed.guidance_embedder.linear_2"),
    **_kernel("ends/mod_img", "double_stream_modulation_img.linear"),
    **_kernel("ends/mod_txt", "double_stream_modulation_txt.linear"),
    **_kernel("ends/mod_single", "single_stream_modulation.linear"),
    **_kernel("ends/ada", "norm_out.linear", order=(1, 0)),
    **_kernel("ends/out", "proj_out"),
    **_diffusers_stream("img", "to_{}", "norm_", "to_out.0", "ff"),
    **_diffusers_stream("txt", "add_{}_proj", "norm_added_", "to_add_out", "ff_context"),
    **_kernel("single/linear1", f"{_SINGLE}.attn.to_qkv_mlp_proj"),
    **_norms("single", f"{_SINGLE}.attn.norm_q.weight", f"{_SINGLE}.attn.norm_k.weight"),
    **_kernel("single/linear2", f"{_SINGLE}.attn.to_out"),
}
# placeholders are the names of the stages, {double} and {single}
LAYOUTS = {"original": ORIGINAL, "diffusers": DIFFUSERS}
AXES = (32, 32, 32, 32)  # of a head of 128


def load_flux2(
    path: str | os.PathLike, *, layout: str | None = None, param_dtype: Any = None, **overrides: Any
) -> tuple[Model, Params]:
    """A FLUX.2 and its weights from a safetensors checkpoint: `find_flux2`, then read.

    Args:
      path, layout, overrides: as `find_flux2`.
      param_dtype: floating dtype of the parameters; None keeps the file's.

    Returns:
      (model, params), params a nested dict of jax arrays, each stage's stacked on a leading [depth] axis.
    """
    found = find_flux2(path, layout=layout, **overrides)
    return found.model, load_foreign(path, found, param_dtype)


def find_flux2(path: str | os.PathLike, *, layout: str | None = None, **overrides: Any) -> Foreign:
    """The FLUX.2 that is in a safetensors checkpoint of black-forest-labs/flux2 or diffusers.

    Depths, widths, heads, channels, freq_dim and whether there is a guidance embedding come from the tensors' shapes,
    theta and eps from diffusers' config.json beside the file (2000 and 1e-6 without). The rotary sections are those of
    its head width of 128; otherwise they come from that file, or must be given.

    Args:
      path: a .safetensors file, the .index.json of a sharded one, or a folder that holds one of the two.
      layout: "original", "diffusers", or None to recognise it by the tensors' names.
      **overrides: arguments of `difax.models.flux2.flux2` (size, text_tokens, dtype, ...), which win over what was
        found.

    Returns:
      The model and the layout table, for `load_flux2` and `difax.weights.convert`.

    Raises:
      ValueError: as `difax.weights.checkpoint.load_safetensors` and `flux2`; an unknown layout or argument; rotary
        sections that neither the file nor the caller gives.

    References: Black Forest Labs 2025, https://github.com/black-forest-labs/flux2.
    """
    known = {field.name for field in dataclasses.fields(Flux2Config)} | {"variant"}
    check_arguments("load_flux2", overrides, known)
    shapes = tensor_shapes(path, LAYOUTS.values())
    layout = choose_layout(path, "a FLUX.2", LAYOUTS, shapes, layout)
    fields = _geometry(path, LAYOUTS[layout], shapes)
    fields = {**fields, **_config(path, fields), **overrides}
    if "axes_dim" not in fields:
        k = fields["width"] // fields["heads"]
        if k != sum(AXES):
            raise Untold(
                f"{path}: the rotary sections of a head width of {k} are not stored; give axes_dim=...", "axes_dim"
            )
        fields["axes_dim"] = AXES
    geometry = tuple(fields[name] for name in PRESET)
    fields = {"variant": next((n for n, preset in VARIANTS.items() if preset == geometry), None), **fields}
    model = flux2(**fields)
    table = rows_of(LAYOUTS[layout], jax.eval_shape(model.init, jax.random.key(0)))
    return Foreign(model, table, {stage.name: stage.depth for stage in model.stages}, geometry=fields)


# what a variant stands for
PRESET = ("double_depth", "single_depth", "width", "heads", "ffn", "text_width", "guidance_embedding")


def _geometry(path: Any, table: Table, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The arguments of `flux2` that the tensors' shapes tell."""
    shape = stored_shape(path, table, shapes)
    width, channels = shape("ends/img/kernel")
    (head_width,) = shape("single/q_norm", 1)
    emitted = shape("ends/out/kernel")[0]
    if emitted != channels:
        raise ValueError(f"{path}: takes {channels} features a token and emits {emitted}; a FLUX.2 has equal ones")
    if width % head_width:
        raise ValueError(f"{path}: width {width} is not divisible by the head width {head_width}")
    return {
        "double_depth": stored_depth(table, shapes, "double/img/qkv/kernel"),
        "single_depth": stored_depth(table, shapes, "single/linear1/kernel"),
        "width": width,
        "heads": width // head_width,
        "ffn": shape("double/img/fc2/kernel")[1],
        "channels": channels,
        "text_width": shape("ends/txt/kernel")[1],
        "freq_dim": shape("ends/time1/kernel")[1],
        "guidance_embedding": any(s.keys[0] in shapes for p, s in table.items() if p.startswith("ends/guidance")),
    }


CLASSES = ("Flux2Transformer2DModel",)
SETTINGS = {
    "patch_size": one_of(1, but="latents are cut into 2 x 2 before the network, and no further in it"),
    "in_channels": whole(),
    "out_channels": optional(whole()),
    "num_layers": whole(),
    "num_single_layers": whole(),
    "attention_head_dim": whole(),
    "num_attention_heads": whole(),
    "joint_attention_dim": whole(),
    "timestep_guidance_channels": whole(2),
    "mlp_ratio": number(),
    "axes_dims_rope": several(4, whole(2)),
    "rope_theta": number(),
    "eps": number(),
    "guidance_embeds": flag(),
}


def _config(path: str | os.PathLike, found: dict[str, Any]) -> dict[str, Any]:
    """Rotary sections, their base and eps from the config.json that diffusers writes beside the weights, if there."""
    file, config = read_settings(path, CLASSES, SETTINGS)
    head_width = found["width"] // found["heads"]
    same = {
        "in_channels": "channels",
        "out_channels": "channels",
        "num_layers": "double_depth",
        "num_single_layers": "single_depth",
        "num_attention_heads": "heads",
        "joint_attention_dim": "text_width",
        "timestep_guidance_channels": "freq_dim",
        "guidance_embeds": "guidance_embedding",
    }
    check_agrees(
        file, config, {name: found[field] for name, field in same.items()} | {"attention_head_dim": head_width}
    )
    ratio = config.get("mlp_ratio")
    if ratio is not None and int(found["width"] * ratio) != found["ffn"]:
        raise ValueError(
            f"{file}: mlp_ratio={ratio} of a width of {found['width']}; allowed: {found['ffn'] / found['width']:g}, as "
            "the checkpoint's tensors say"
        )
    axes = config.get("axes_dims_rope")
    if axes is not None and (sum(axes) != head_width or any(width % 2 for width in axes)):
        raise ValueError(f"{file}: axes_dims_rope={axes}; allowed: four even widths that add up to {head_width}")
    fields = {field: config[name] for field, name in {"theta": "rope_theta", "eps": "eps"}.items() if name in config}
    return fields if axes is None else {**fields, "axes_dim": tuple(axes)}


PUBLISHED = Published(find_flux2, LAYOUTS, CLASSES)
