"""DiT and SiT weights of other projects: the two published layouts as tables, and `load_dit`.

"original" is the layout of facebookresearch/DiT; SiT (willisma/SiT) names its tensors the same way and
computes the same function, so it serves both. A DiT is sampled with the process `vp_linear`, a SiT with
`sit`, whose time runs from noise to data and whose network predicts the velocity (the channels of its
learn_sigma are not used).

"diffusers" is the layout of DiTTransformer2DModel, which computes another function of the same weights: its
time frequencies divide by (half - 1) instead of half, the norm before the MLP has epsilon 1e-5 instead
of 1e-6, and at another size than the trained one positions are stretched to the trained extent. Each layout sets the
numerics of its own reference.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import jax

from difax.core.contracts import Model, Params
from difax.models.dit import SIZES, DiTConfig, dit
from difax.models.layers import ACTIVATIONS, sincos_positions
from difax.weights.checkpoint import Source, equal_copies, tensor_shapes
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

PATCH_AXES = (
    2,
    3,
    1,
    0,
)  # a convolution's [D, C, p, p] -> [p, p, C, D]: our patches run over row, column, channel


ORIGINAL = {
    "ends/patch/kernel": Source(("x_embedder.proj.weight",), PATCH_AXES),
    "ends/patch/bias": Source(("x_embedder.proj.bias",)),
    **dense("ends/time1", "t_embedder.mlp.0"),
    **dense("ends/time2", "t_embedder.mlp.2"),
    "ends/label": Source(("y_embedder.embedding_table.weight",)),
    **dense("ends/ada", "final_layer.adaLN_modulation.1"),
    **dense("ends/out", "final_layer.linear"),
    **dense("blocks/ada", "blocks.{layer}.adaLN_modulation.1"),
    **dense("blocks/qkv", "blocks.{layer}.attn.qkv"),
    **dense("blocks/out", "blocks.{layer}.attn.proj"),
    **dense("blocks/fc1", "blocks.{layer}.mlp.fc1"),
    **dense("blocks/fc2", "blocks.{layer}.mlp.fc2"),
}

_BLOCK = "transformer_blocks.{layer}"
DIFFUSERS = {
    "ends/patch/kernel": Source(("pos_embed.proj.weight",), PATCH_AXES),
    "ends/patch/bias": Source(("pos_embed.proj.bias",)),
    # every block carries its own embedder; the published conversion filled all of them with one (`_block_embedders`)
    **dense("ends/time1", f"{_BLOCK}.norm1.emb.timestep_embedder.linear_1", shared=True),
    **dense("ends/time2", f"{_BLOCK}.norm1.emb.timestep_embedder.linear_2", shared=True),
    "ends/label": Source((f"{_BLOCK}.norm1.emb.class_embedder.embedding_table.weight",), shared=True),
    **dense("ends/ada", "proj_out_1"),
    **dense("ends/out", "proj_out_2"),
    **dense("blocks/ada", f"{_BLOCK}.norm1.linear"),
    **dense("blocks/qkv", *(f"{_BLOCK}.attn1.to_{part}" for part in "qkv")),
    **dense("blocks/out", f"{_BLOCK}.attn1.to_out.0"),
    **dense("blocks/fc1", f"{_BLOCK}.ff.net.0.proj"),
    **dense("blocks/fc2", f"{_BLOCK}.ff.net.2"),
    "blocks/mlp_norm/scale": Source((f"{_BLOCK}.norm3.weight",)),
    "blocks/mlp_norm/bias": Source((f"{_BLOCK}.norm3.bias",)),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A table, the name of the stored positions (a fixed buffer) and the numerics of the reference."""

    table: dict[str, Source]
    positions: str
    freq_shift: int
    mlp_norm_eps: float


LAYOUTS = {
    "original": Layout(ORIGINAL, "pos_embed", 0, 1e-6),
    "diffusers": Layout(DIFFUSERS, "pos_embed.pos_embed", 1, 1e-5),
}


def load_dit(
    path: str | os.PathLike, *, layout: str | None = None, param_dtype: Any = None, **overrides: Any
) -> tuple[Model, Params]:
    """A DiT or SiT and its weights from a safetensors checkpoint: `find_dit`, then read.

    Args:
      path, layout, overrides: as `find_dit`.
      param_dtype: floating dtype of the parameters; None keeps the file's.

    Returns:
      (model, params), params a nested dict of jax arrays with blocks stacked on a leading [depth] axis.
    """
    found = find_dit(path, layout=layout, **overrides)
    return found.model, load_foreign(path, found, param_dtype)


def find_dit(path: str | os.PathLike, *, layout: str | None = None, **overrides: Any) -> Foreign:
    """The DiT or SiT that is in a safetensors checkpoint of facebookresearch/DiT, SiT or diffusers.

    Depth, width, patch, channels, classes, MLP ratio, learn_sigma, biases and norms come from the tensors' shapes,
    heads from the paper's sizes, the input size from stored positions (taken as square). For diffusers, a config.json
    beside the file gives heads, size, epsilon and activation; the size that was trained at, from either, is the
    base_size of another `size`. Blocks whose embedders differ keep their own. What cannot be known must be given.

    Args:
      path: a .safetensors file, the .index.json of a sharded one, or a folder that holds one of the two. The
        .pt files of the original projects are pickles and are refused; convert them with torch once.
      layout: "original" (DiT and SiT), "diffusers", or None to recognise it by the tensors' names.
      **overrides: fields of `difax.models.dit.dit` (size, heads, dtype, ...), which win over what was found.

    Returns:
      The model and the layout table, for `load_dit` and `difax.weights.convert`.

    Raises:
      ValueError: as `difax.weights.checkpoint.load_safetensors`; an unknown layout or override; heads or size that
        neither the file nor the caller gives; stored positions that are not the fixed ones.

    References: Peebles & Xie 2022, arXiv:2212.09748; Ma et al. (SiT) 2024, arXiv:2401.08740.
    """
    check_arguments("load_dit", overrides, {field.name for field in dataclasses.fields(DiTConfig)})
    tables = {name: rules.table for name, rules in LAYOUTS.items()}
    shapes = tensor_shapes(path, tables.values())
    layout = choose_layout(path, "a DiT", tables, shapes, layout)
    rules = LAYOUTS[layout]
    fields = {
        **_geometry(path, rules, shapes),
        "freq_shift": rules.freq_shift,
        "mlp_norm_eps": rules.mlp_norm_eps,
    }
    if layout == "diffusers":
        fields |= _diffusers_config(path, fields)
        if "size" in fields:
            fields["base_size"] = fields["size"] // fields["patch"]
        if "block_embedders" not in overrides:
            fields["block_embedders"] = not equal_copies(path, rules.table, {"layer": fields["depth"]})
    fields |= overrides
    check_known(path, fields, {"heads": "the number of attention heads", "size": "the input's height and width"})
    geometry = (fields["depth"], fields["width"], fields["heads"])
    letter = next((s for s, preset in SIZES.items() if preset == geometry), None)
    named = letter is not None and fields["patch"] in (2, 4, 8)
    fields = {"variant": f"{letter}/{fields['patch']}" if named else None, **fields}
    model = dit(**fields)
    table = _block_embedders(rules.table) if fields.get("block_embedders") else rules.table
    table = rows_of(table, jax.eval_shape(model.init, jax.random.key(0)))
    side = _stored_side(rules, shapes)
    grid = model.stages[0].block.config.grid if side is None else (side, side)
    positions = sincos_positions(fields["width"], *grid)[None]
    return Foreign(model, table, {"layer": model.stages[0].depth}, {rules.positions: positions}, fields)


def _stored_side(rules: Layout, shapes: dict[str, tuple[int, ...]]) -> int | None:
    """Patches on a side of the square that the stored positions are of, where there are any."""
    stored = shapes.get(rules.positions, ())
    square = len(stored) == 3 and stored[1] > 0 and math.isqrt(stored[1]) ** 2 == stored[1]
    return math.isqrt(stored[1]) if square else None


def _block_embedders(table: dict[str, Source]) -> dict[str, Source]:
    """The table of a file whose blocks have embedders of their own; the final layer goes by the first block's."""
    first, own = {}, {}
    for path, source in table.items():
        if source.shared:
            first[path] = source._replace(keys=tuple(k.format(layer=0) for k in source.keys), shared=False)
            own[path.replace("ends/", "blocks/")] = source._replace(shared=False)
    return {**table, **first, **own}


def _geometry(path: Any, rules: Layout, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of `dit` that the tensors' shapes tell."""

    shape = stored_shape(path, rules.table, shapes)
    stored = lambda parameter: rules.table[parameter].keys[0].format(layer=0) in shapes  # noqa: E731
    width, channels, patch, other = shape("ends/patch/kernel", 4)
    if patch != other:
        raise ValueError(f"{path}: patches of {patch} x {other}; allowed: square ones")
    depth = stored_depth(rules.table, shapes, "blocks/qkv/kernel")
    emitted, plain = shape("ends/out/kernel", 2)[0], patch * patch * channels
    if emitted not in (plain, 2 * plain):
        raise ValueError(
            f"{path}: the final layer emits {emitted} features for {patch} x {patch} patches of {channels} "
            f"channels; expected {plain}, or {2 * plain} with learn_sigma"
        )
    fields = {
        "depth": depth,
        "width": width,
        "patch": patch,
        "channels": channels,
        "classes": shape("ends/label", 2)[0] - 1,  # the last row is the null label
        "mlp_ratio": max(shape("blocks/fc2/kernel", 2)[1] // width, 1),
        "learn_sigma": emitted == 2 * plain,
        "qkv_bias": stored("blocks/qkv/bias"),
        "mlp_norm_affine": "blocks/mlp_norm/scale" in rules.table and stored("blocks/mlp_norm/scale"),
    }
    for preset_depth, preset_width, heads in SIZES.values():
        if (preset_depth, preset_width) == (depth, width):
            fields["heads"] = heads
    side = _stored_side(rules, shapes)
    return fields if side is None else {**fields, "size": side * patch}


# published conversions carry the name of the class that held DiT before it had its own
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
# what a file of the class leaves out, of the keys that no tensor tells; the old class is loaded as the new one
DEFAULTS = {"sample_size": 32}
SETTINGS = {
    "norm_type": one_of("ada_norm_zero"),
    "num_attention_heads": whole(),
    "attention_head_dim": whole(),
    "in_channels": whole(),
    "out_channels": optional(whole()),
    "num_layers": whole(),
    "sample_size": whole(),
    "patch_size": whole(),
    "num_embeds_ada_norm": whole(),
    "norm_eps": number(most=1),
    "activation_fn": one_of(*ACTIVATIONS),
    "attention_bias": flag(),
    "norm_elementwise_affine": flag(),
    "upcast_attention": flag(),  # the softmax is float32 here, always
    "dropout": number(0.0, open_end=False),  # in training alone
    "norm_num_groups": whole(),  # of a norm that this class does not have
    # of the class that held DiT before
    "attention_type": optional(one_of("default")),
    "only_cross_attention": optional(one_of(False)),
    "double_self_attention": optional(one_of(False)),
    "cross_attention_dim": one_of(None, but="cross-attention is of another network"),
}


def _diffusers_config(path: str | os.PathLike, found: dict[str, Any]) -> dict[str, Any]:
    """Heads, size, epsilon and activation from the config.json that diffusers writes beside the weights, if there."""
    file, config = read_settings(path, CLASSES, SETTINGS, DEFAULTS)
    channels = found["channels"]
    said = {
        "in_channels": channels,
        "out_channels": channels * (2 if found["learn_sigma"] else 1),
        "num_layers": found["depth"],
        "patch_size": found["patch"],
        "num_embeds_ada_norm": found["classes"],
        "attention_bias": found["qkv_bias"],
        "norm_elementwise_affine": found["mlp_norm_affine"],
    }
    check_agrees(file, config, said)
    heads = stored_heads(file, config, "num_attention_heads", "attention_head_dim", found["width"], 72)
    names = {
        "size": "sample_size",
        "mlp_norm_eps": "norm_eps",
        "activation": "activation_fn",
    }
    return heads | {field: config[name] for field, name in names.items() if name in config}


PUBLISHED = Published(find_dit, {name: layout.table for name, layout in LAYOUTS.items()}, CLASSES)
