"""PixArt weights of other projects: the two published layouts as tables, and `load_pixart`.

"diffusers" is the layout of PixArtTransformer2DModel, "original" that of PixArt-alpha/PixArt-alpha and PixArt-sigma,
whose own files are pickles, of which there are copies in safetensors. Published are alpha (XL-2-256x256, 512x512,
1024-MS) and Sigma (XL-2-256 ... 2K-MS). Which of the two a file is, its tensors do not tell; they differ in the number
of caption tokens.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import jax

from difax.core.contracts import Model, Params
from difax.models.layers import ACTIVATIONS, sincos_positions
from difax.models.pixart import XL, PixArtConfig, pixart
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
    stored_heads,
    whole,
)

_BLOCK, _TIME = "transformer_blocks.{layer}", "adaln_single.emb"
DIFFUSERS = {
    # a convolution's [D, C, p, p] -> [p, p, C, D]: our patches run over row, column, channel
    "ends/patch/kernel": Source(("pos_embed.proj.weight",), (2, 3, 1, 0)),
    "ends/patch/bias": Source(("pos_embed.proj.bias",)),
    **dense("ends/time1", f"{_TIME}.timestep_embedder.linear_1"),
    **dense("ends/time2", f"{_TIME}.timestep_embedder.linear_2"),
    **dense("ends/six", "adaln_single.linear"),
    **dense("ends/text1", "caption_projection.linear_1"),
    **dense("ends/text2", "caption_projection.linear_2"),
    "ends/table": Source(("scale_shift_table",)),
    **dense("ends/out", "proj_out"),
    "blocks/table": Source((f"{_BLOCK}.scale_shift_table",)),
    **dense("blocks/qkv", *(f"{_BLOCK}.attn1.to_{part}" for part in "qkv")),
    **dense("blocks/out", f"{_BLOCK}.attn1.to_out.0"),
    **dense("blocks/cross_q", f"{_BLOCK}.attn2.to_q"),
    **dense("blocks/cross_kv", f"{_BLOCK}.attn2.to_k", f"{_BLOCK}.attn2.to_v"),
    **dense("blocks/cross_out", f"{_BLOCK}.attn2.to_out.0"),
    **dense("blocks/fc1", f"{_BLOCK}.ff.net.0.proj"),
    **dense("blocks/fc2", f"{_BLOCK}.ff.net.2"),
    # norm2 stands before the MLP, whatever its number
    "blocks/attn_norm/scale": Source((f"{_BLOCK}.norm1.weight",)),
    "blocks/attn_norm/bias": Source((f"{_BLOCK}.norm1.bias",)),
    "blocks/mlp_norm/scale": Source((f"{_BLOCK}.norm2.weight",)),
    "blocks/mlp_norm/bias": Source((f"{_BLOCK}.norm2.bias",)),
}
MICRO_CONDITIONS = {
    **dense("ends/resolution1", f"{_TIME}.resolution_embedder.linear_1"),
    **dense("ends/resolution2", f"{_TIME}.resolution_embedder.linear_2"),
    **dense("ends/aspect1", f"{_TIME}.aspect_ratio_embedder.linear_1"),
    **dense("ends/aspect2", f"{_TIME}.aspect_ratio_embedder.linear_2"),
}
_ORIGINAL = "blocks.{layer}"
ORIGINAL = {
    "ends/patch/kernel": Source(("x_embedder.proj.weight",), (2, 3, 1, 0)),
    "ends/patch/bias": Source(("x_embedder.proj.bias",)),
    **dense("ends/time1", "t_embedder.mlp.0"),
    **dense("ends/time2", "t_embedder.mlp.2"),
    **dense("ends/six", "t_block.1"),
    **dense("ends/text1", "y_embedder.y_proj.fc1"),
    **dense("ends/text2", "y_embedder.y_proj.fc2"),
    **dense("ends/resolution1", "csize_embedder.mlp.0"),
    **dense("ends/resolution2", "csize_embedder.mlp.2"),
    **dense("ends/aspect1", "ar_embedder.mlp.0"),
    **dense("ends/aspect2", "ar_embedder.mlp.2"),
    "ends/table": Source(("final_layer.scale_shift_table",)),
    **dense("ends/out", "final_layer.linear"),
    "blocks/table": Source((f"{_ORIGINAL}.scale_shift_table",)),
    **dense("blocks/qkv", f"{_ORIGINAL}.attn.qkv"),
    **dense("blocks/out", f"{_ORIGINAL}.attn.proj"),
    **dense("blocks/cross_q", f"{_ORIGINAL}.cross_attn.q_linear"),
    **dense("blocks/cross_kv", f"{_ORIGINAL}.cross_attn.kv_linear"),
    **dense("blocks/cross_out", f"{_ORIGINAL}.cross_attn.proj"),
    **dense("blocks/fc1", f"{_ORIGINAL}.mlp.fc1"),
    **dense("blocks/fc2", f"{_ORIGINAL}.mlp.fc2"),
}
LAYOUTS = {"diffusers": {**DIFFUSERS, **MICRO_CONDITIONS}, "original": ORIGINAL}
# a fixed buffer that some versions stored, and what only training has
POSITIONS = {"diffusers": "pos_embed.pos_embed", "original": "pos_embed"}
UNUSED = ("y_embedder.y_embedding",)


def load_pixart(
    path: str | os.PathLike, *, layout: str | None = None, param_dtype: Any = None, **overrides: Any
) -> tuple[Model, Params]:
    """A PixArt and its weights from a safetensors checkpoint: `find_pixart`, then read.

    Args:
      path, layout, overrides: as `find_pixart`.
      param_dtype: floating dtype of the parameters; None keeps the file's.

    Returns:
      (model, params), params a nested dict of jax arrays with blocks stacked on a leading [depth] axis.
    """
    found = find_pixart(path, layout=layout, **overrides)
    return found.model, load_foreign(path, found, param_dtype)


def find_pixart(
    path: str | os.PathLike, *, layout: str | None = None, variant: str | None = None, **overrides: Any
) -> Foreign:
    """The PixArt that is in a safetensors checkpoint of diffusers, or with the names of the original projects.

    Depth, width, patch, channels, text_width, learn_sigma, micro_conditioning, biases, norms and the caption's
    projection come from the tensors; 16 heads from the width of XL; heads, base_size, size, interpolation_scale,
    norm_eps and activation from a config.json beside the file. What cannot be known must be given.

    Args:
      path: a .safetensors file, the .index.json of a sharded one, or a folder that holds one of the two.
      layout: "diffusers", "original", or None to recognise it by the tensors' names.
      variant: "alpha" or "sigma", for the number of caption tokens (120, 300); or give text_tokens.
      **overrides: arguments of `difax.models.pixart.pixart` (size, heads, dtype, ...), which win over what was found.

    Returns:
      The model and the layout table, for `load_pixart` and `difax.weights.convert`.

    Raises:
      ValueError: as `difax.weights.checkpoint.load_safetensors` and `pixart`; an unknown layout or argument; a
        config.json of another function; heads, size or caption tokens that neither the file nor the caller gives.

    References: Chen et al. 2023, arXiv:2310.00426; Chen et al. 2024, arXiv:2403.04692.
    """
    check_arguments("load_pixart", overrides, {field.name for field in dataclasses.fields(PixArtConfig)})
    shapes = tensor_shapes(path, LAYOUTS.values())
    layout = choose_layout(path, "a PixArt", LAYOUTS, shapes, layout)
    fields = _geometry(path, layout, shapes)
    said = _diffusers_config(path, fields) if layout == "diffusers" else {}
    fields = {**fields, **said, **overrides}
    unknown = {"heads": "the number of attention heads", "size": "the latents' height and width"}
    if variant is None:
        unknown["text_tokens"] = "the number of caption tokens"
    check_known(path, fields, unknown, {"text_tokens": " (or variant='alpha' or 'sigma')"})
    fields = {"variant": variant, **fields}
    model = pixart(**fields)
    c = model.stages[0].block.config
    table = rows_of(LAYOUTS[layout], jax.eval_shape(model.init, jax.random.key(0)))
    stored = sincos_positions(c.width, c.base_size, c.base_size, c.base_size, c.interpolation_scale)
    constants = {POSITIONS[layout]: stored[None], **dict.fromkeys(UNUSED)}
    return Foreign(model, table, {"layer": c.depth}, constants, fields)


def _geometry(path: Any, layout: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The arguments of `pixart` that the tensors' shapes tell."""
    table = LAYOUTS[layout]
    shape = stored_shape(path, table, shapes)
    width, channels, patch, other = shape("ends/patch/kernel", 4)
    if patch != other:
        raise ValueError(f"{path}: patches of {patch} x {other}; allowed: square ones")
    stored = lambda parameter: parameter in table and table[parameter].keys[0].format(layer=0) in shapes  # noqa: E731
    emitted, plain = shape("ends/out/kernel", 2)[0], patch * patch * channels
    projection = stored("ends/text1/kernel") or not stored("blocks/cross_kv/kernel")
    if emitted not in (plain, 2 * plain):
        raise ValueError(
            f"{path}: the final layer emits {emitted} features for {patch} x {patch} patches of {channels} "
            f"channels; expected {plain}, or {2 * plain} with learn_sigma"
        )
    fields = {
        "depth": stored_depth(table, shapes, "blocks/qkv/kernel"),
        "width": width,
        "patch": patch,
        "channels": channels,
        "text_width": shape("ends/text1/kernel" if projection else "blocks/cross_kv/kernel", 2)[1],
        "caption_projection": projection,
        "qkv_bias": stored("blocks/qkv/bias"),
        "norm_affine": stored("blocks/attn_norm/scale"),
        "micro_conditioning": any(map(stored, MICRO_CONDITIONS)),
        "learn_sigma": emitted == 2 * plain,
    }
    if width == XL["width"]:
        fields["heads"] = XL["heads"]
    positions = shapes.get(POSITIONS[layout])
    if positions is not None and len(positions) == 3 and math.isqrt(positions[1]) ** 2 == positions[1]:
        fields |= {"base_size": math.isqrt(positions[1]), "size": math.isqrt(positions[1]) * patch}
    return fields


# the first published files carry the name of the class that held PixArt before it had its own
CLASSES = ("PixArtTransformer2DModel", "Transformer2DModel")
# what a file of the class leaves out, of the keys that no tensor tells; the old class is loaded as the new one
DEFAULTS = {"sample_size": 128}
SETTINGS = {
    "norm_type": one_of("ada_norm_single"),
    "num_attention_heads": whole(),
    "attention_head_dim": whole(),
    "in_channels": whole(),
    "out_channels": optional(whole()),
    "num_layers": whole(),
    "cross_attention_dim": optional(whole()),
    "caption_channels": optional(whole()),
    "sample_size": whole(),
    "patch_size": whole(),
    "interpolation_scale": optional(number()),
    "use_additional_conditions": optional(flag()),
    "norm_eps": number(most=1),
    "norm_elementwise_affine": flag(),
    "activation_fn": one_of(*ACTIVATIONS),
    "attention_bias": flag(),
    "attention_type": optional(one_of("default", but="gated attention is of another network")),
    "upcast_attention": flag(),  # the softmax is float32 here, always
    "dropout": number(0.0, open_end=False),  # in training alone
    "num_embeds_ada_norm": optional(whole()),  # of a table that this class does not have
    "norm_num_groups": whole(),  # of a norm that this class does not have
    # of the class that held PixArt before
    "only_cross_attention": optional(one_of(False)),
    "double_self_attention": optional(one_of(False)),
}


def _diffusers_config(path: str | os.PathLike, found: dict[str, Any]) -> dict[str, Any]:
    """Heads, size, positions, epsilon and activation from the config.json that diffusers writes beside the weights."""
    file, config = read_settings(path, CLASSES, SETTINGS, DEFAULTS)
    channels, projected = found["channels"], found["caption_projection"]
    check_agrees(
        file,
        config,
        {
            "in_channels": channels,
            "out_channels": channels * (2 if found["learn_sigma"] else 1),
            "num_layers": found["depth"],
            "patch_size": found["patch"],
            "caption_channels": found["text_width"] if projected else None,
            "cross_attention_dim": found["width"] if projected else found["text_width"],
            "attention_bias": found["qkv_bias"],
            "norm_elementwise_affine": found["norm_affine"],
        },
    )
    heads = stored_heads(file, config, "num_attention_heads", "attention_head_dim", found["width"], 72)
    said, size = config.get("use_additional_conditions"), config.get("sample_size")
    if said is not None and said != found["micro_conditioning"]:
        state = "holds" if found["micro_conditioning"] else "lacks"
        raise ValueError(f"{file}: use_additional_conditions={said}, but the checkpoint {state} their embedders")
    names = {
        "interpolation_scale": "interpolation_scale",
        "size": "sample_size",
        "norm_eps": "norm_eps",
        "activation": "activation_fn",
    }
    fields = heads | {field: config[name] for field, name in names.items() if name in config}
    return fields if size is None else {**fields, "base_size": size // found["patch"]}


PUBLISHED = Published(find_pixart, LAYOUTS, CLASSES)
