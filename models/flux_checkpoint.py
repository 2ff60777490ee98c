"""FLUX.1 weights of other projects: the two published layouts as tables, and `load_flux`.

"original" is the layout of black-forest-labs/flux (flux1-dev.safetensors, flux1-schnell.safetensors), "diffusers" that
of FluxTransformer2DModel. They are the same function of the same numbers: diffusers stores queries, keys, values and
the first MLP product of a single block apart, and (scale, shift) of the final layer where the original has (shift,
scale).
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

from difax.core.contracts import Model, Params
from difax.models.flux import PATCH, flux
from difax.weights.checkpoint import Source, nearest, tensor_shapes
from difax.weights.published import (
    Foreign,
    Published,
    Untold,
    check_arguments,
    choose_layout,
    dense,
    load_foreign,
    stored_depth,
    stored_shape,
)
from difax.weights.settings import check_agrees, flag, one_of, optional, read_settings, several, whole

MLP_RATIO = 4  # of every published FLUX
Table = dict[str, Source]


def _original_stream(stream: str) -> Table:
    block, path = f"double_blocks.{{double}}.{stream}", f"double/{stream}"
    return {
        **dense(f"{path}/ada", f"{block}_mod.lin"),
        **dense(f"{path}/qkv", f"{block}_attn.qkv"),
        f"{path}/q_norm": Source((f"{block}_attn.norm.query_norm.scale",)),
        f"{path}/k_norm": Source((f"{block}_attn.norm.key_norm.scale",)),
        **dense(f"{path}/out", f"{block}_attn.proj"),
        **dense(f"{path}/fc1", f"{block}_mlp.0"),
        **dense(f"{path}/fc2", f"{block}_mlp.2"),
    }


_ORIGINAL_SINGLE = "single_blocks.{single}"
ORIGINAL = {
    **dense("ends/img", "img_in"),
    **dense("ends/txt", "txt_in"),
    **dense("ends/time1", "time_in.in_layer"),
    **dense("ends/time2", "time_in.out_layer"),
    **dense("ends/pooled1", "vector_in.in_layer"),
    **dense("ends/pooled2", "vector_in.out_layer"),
    **dense("ends/guidance1", "guidance_in.in_layer"),
    **dense("ends/guidance2", "guidance_in.out_layer"),
    **dense("ends/ada", "final_layer.adaLN_modulation.1"),
    **dense("ends/out", "final_layer.linear"),
    **_original_stream("img"),
    **_original_stream("txt"),
    **dense("single/ada", f"{_ORIGINAL_SINGLE}.modulation.lin"),
    **dense("single/linear1", f"{_ORIGINAL_SINGLE}.linear1"),
    "single/q_norm": Source((f"{_ORIGINAL_SINGLE}.norm.query_norm.scale",)),
    "single/k_norm": Source((f"{_ORIGINAL_SINGLE}.norm.key_norm.scale",)),
    **dense("single/linear2", f"{_ORIGINAL_SINGLE}.linear2"),
}

_DOUBLE, _SINGLE = "transformer_blocks.{double}", "single_transformer_blocks.{single}"
DIFFUSERS = {
    **dense("ends/img", "x_embedder"),
    **dense("ends/txt", "context_embedder"),
    **dense("ends/time1", "time_text_embed.timestep_embedder.linear_1"),
    **dense("ends/time2", "time_text_embed.timestep_embedder.linear_2"),
    **dense("ends/pooled1", "time_text_embed.text_embedder.linear_1"),
    **dense("ends/pooled2", "time_text_embed.text_embedder.linear_2"),
    **dense("ends/guidance1", "time_text_embed.guidance_embedder.linear_1"),
    **dense("ends/guidance2", "time_text_embed.guidance_embedder.linear_2"),
    **dense("ends/ada", "norm_out.linear", order=(1, 0)),
    **dense("ends/out", "proj_out"),
    **dense("double/img/ada", f"{_DOUBLE}.norm1.linear"),
    **dense("double/img/qkv", *(f"{_DOUBLE}.attn.to_{part}" for part in "qkv")),
    "double/img/q_norm": Source((f"{_DOUBLE}.attn.norm_q.weight",)),
    "double/img/k_norm": Source((f"{_DOUBLE}.attn.norm_k.weight",)),
    **dense("double/img/out", f"{_DOUBLE}.attn.to_out.0"),
    **dense("double/img/fc1", f"{_DOUBLE}.ff.net.0.proj"),
    **dense("double/img/fc2", f"{_DOUBLE}.ff.net.2"),
    **dense("double/txt/ada", f"{_DOUBLE}.norm1_context.linear"),
    **dense("double/txt/qkv", *(f"{_DOUBLE}.attn.add_{part}_proj" for part in "qkv")),
    "double/txt/q_norm": Source((f"{_DOUBLE}.attn.norm_added_q.weight",)),
    "double/txt/k_norm": Source((f"{_DOUBLE}.attn.norm_added_k.weight",)),
    **dense("double/txt/out", f"{_DOUBLE}.attn.to_add_out"),
    **dense("double/txt/fc1", f"{_DOUBLE}.ff_context.net.0.proj"),
    **dense("double/txt/fc2", f"{_DOUBLE}.ff_context.net.2"),
    **dense("single/ada", f"{_SINGLE}.norm.linear"),
    **dense(
        "single/linear1",
        *(f"{_SINGLE}.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        widths=(1, 1, 1, MLP_RATIO),
    ),
    "single/q_norm": Source((f"{_SINGLE}.attn.norm_q.weight",)),
    "single/k_norm": Source((f"{_SINGLE}.attn.norm_k.weight",)),
    **dense("single/linear2", f"{_SINGLE}.proj_out"),
}


# placeholders are the names of the stages, {double} and {single}
LAYOUTS = {"original": ORIGINAL, "diffusers": DIFFUSERS}


def layout_table(name: str, guidance_embedding: bool = True, mlp_ratio: int = MLP_RATIO) -> Table:
    """The table of a layout for a FLUX with or without a guidance embedding.

    Args:
      name: "original" or "diffusers".
      guidance_embedding: False (schnell) leaves its rows out.
      mlp_ratio: hidden over model width (4).

    Raises:
      ValueError: unknown layout.
    """
    if name not in LAYOUTS:
        raise ValueError(f"unknown layout {name!r}; allowed: {', '.join(LAYOUTS)}; nearest: {nearest(name, LAYOUTS)!r}")
    return {
        path: source if source.widths is None else source._replace(widths=(1, 1, 1, mlp_ratio))
        for path, source in LAYOUTS[name].items()
        if guidance_embedding or not path.startswith("ends/guidance")
    }


def load_flux(
    path: str | os.PathLike, *, layout: str | None = None, param_dtype: Any = None, **overrides: Any
) -> tuple[Model, Params]:
    """A FLUX.1 and its weights from a safetensors checkpoint: `find_flux`, then read.

    Args:
      path, layout, overrides: as `find_flux`.
      param_dtype: floating dtype of the parameters; None keeps the file's.

    Returns:
      (model, params), params a nested dict of jax arrays, each stage's stacked on a leading [depth] axis.
    """
    found = find_flux(path, layout=layout, **overrides)
    return found.model, load_foreign(path, found, param_dtype)


def find_flux(path: str | os.PathLike, *, layout: str | None = None, **overrides: Any) -> Foreign:
    """The FLUX.1 that is in a safetensors checkpoint of black-forest-labs/flux or diffusers.

    Depths, widths, heads, latent channels, MLP ratio and whether there is a guidance embedding come from the tensors'
    shapes. The rotary sections are FLUX.1's for its head width of 128; otherwise they come from diffusers' config.json
    beside the file, or must be given.

    Args:
      path: a .safetensors file, the .index.json of a sharded one, or a folder that holds one of the two.
      layout: "original", "diffusers", or None to recognise it by the tensors' names.
      **overrides: arguments of `difax.models.flux.flux` (size, text_tokens, dtype, ...), which win over what was found.

    Returns:
      The model and the layout table, for `load_flux` and `difax.weights.convert`.

    Raises:
      ValueError: as `difax.weights.checkpoint.load_safetensors`; an unknown layout or override; a relative of FLUX.1
        that takes more channels than it emits; rotary sections that neither the file nor the caller gives.

    References: Black Forest Labs 2024, https://github.com/black-forest-labs/flux.
    """
    check_arguments("load_flux", overrides, inspect.signature(flux).parameters)
    shapes = tensor_shapes(path, LAYOUTS.values())
    layout = choose_layout(path, "a FLUX", LAYOUTS, shapes, layout)
    fields = _geometry(path, layout_table(layout), shapes)
    if layout == "diffusers":
        fields |= _diffusers_config(path, fields)
    fields |= overrides
    if "axes_dim" not in fields:
        k = fields["width"] // fields["heads"]
        if k != 128:
            raise Untold(
                f"{path}: the rotary sections of a head width of {k} are not stored; give axes_dim=...", "axes_dim"
            )
        fields["axes_dim"] = (16, 56, 56)
    if fields.get("variant") is None and _published(fields):
        fields["variant"] = "dev" if fields["guidance_embedding"] else "schnell"
    model = flux(**fields)
    table = layout_table(layout, fields["guidance_embedding"], fields["mlp_ratio"])
    return Foreign(model, table, {stage.name: stage.depth for stage in model.stages}, geometry=fields)


def _published(fields: Mapping[str, Any]) -> bool:
    """Are these the geometry of FLUX.1 dev or schnell, by `flux`'s own defaults?"""
    defaults = inspect.signature(flux).parameters
    return all(fields[name] == defaults[name].default for name in ("double_depth", "single_depth", "width", "heads"))


def _geometry(path: Any, table: Table, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The arguments of `flux` that the tensors' shapes tell."""

    shape = stored_shape(path, table, shapes)
    width, features = shape("ends/img/kernel")
    (head_width,) = shape("single/q_norm", 1)
    emitted = shape("ends/out/kernel")[0]
    if features % PATCH**2 or emitted != features:
        raise ValueError(
            f"{path}: takes {features} features a token and emits {emitted}; a FLUX.1 has equal ones, divisible by "
            f"{PATCH**2} (its relatives with an image or mask beside the latents are not supported)"
        )
    if width % head_width:
        raise ValueError(f"{path}: width {width} is not divisible by the head width {head_width}")
    return {
        "double_depth": stored_depth(table, shapes, "double/img/qkv/kernel"),
        "single_depth": stored_depth(table, shapes, "single/linear1/kernel"),
        "width": width,
        "heads": width // head_width,
        "channels": features // PATCH**2,
        "text_width": shape("ends/txt/kernel")[1],
        "pooled_width": shape("ends/pooled1/kernel")[1],
        "guidance_embedding": any(s.keys[0] in shapes for p, s in table.items() if p.startswith("ends/guidance")),
        "mlp_ratio": max(shape("double/img/fc1/kernel")[0] // width, 1),
    }


CLASSES = ("FluxTransformer2DModel",)
SETTINGS = {
    "patch_size": one_of(1, but="latents are packed 2 x 2 before the network, and cut no further in it"),
    "in_channels": whole(),
    "out_channels": optional(whole()),
    "num_layers": whole(),
    "num_single_layers": whole(),
    "attention_head_dim": whole(),
    "num_attention_heads": whole(),
    "joint_attention_dim": whole(),
    "pooled_projection_dim": whole(),
    "guidance_embeds": flag(),
    "axes_dims_rope": several(3, whole(2)),
}


def _diffusers_config(path: str | os.PathLike, found: dict[str, Any]) -> dict[str, Any]:
    """The rotary sections from the config.json that diffusers writes beside the weights, if there."""
    file, config = read_settings(path, CLASSES, SETTINGS)
    features, head_width = found["channels"] * PATCH**2, found["width"] // found["heads"]
    check_agrees(
        file,
        config,
        {
            "in_channels": features,
            "out_channels": features,
            "num_layers": found["double_depth"],
            "num_single_layers": found["single_depth"],
            "attention_head_dim": head_width,
            "num_attention_heads": found["heads"],
            "joint_attention_dim": found["text_width"],
            "pooled_projection_dim": found["pooled_width"],
            "guidance_embeds": found["guidance_embedding"],
        },
    )
    axes = config.get("axes_dims_rope")
    if axes is None:
        return {}
    if sum(axes) != head_width or any(width % 2 for width in axes):
        raise ValueError(f"{file}: axes_dims_rope={axes}; allowed: three even widths that add up to {head_width}")
    return {"axes_dim": tuple(axes)}


PUBLISHED = Published(find_flux, LAYOUTS, CLASSES)
