"""Stable Diffusion 3 and 3.5 weights of other projects: the two published layouts as tables, and `load_sd3`.

"original" is the layout of Stability AI's single files (sd3_medium.safetensors, sd3.5_large.safetensors, behind
model.diffusion_model., with or without text encoders and autoencoder beside it), "diffusers" that of
SD3Transformer2DModel. They are the same function of the same numbers: diffusers stores queries, keys and values apart,
and (scale, shift) of the final layer and of the last block's text where the original has (shift, scale).
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax

from difax.core.contracts import Model, Params
from difax.models.sd3 import VARIANTS, LayerRun, SD3Config, layer_runs, sd3
from difax.weights.checkpoint import Source, tensor_shapes
from difax.weights.published import (
    Foreign,
    Published,
    Untold,
    check_arguments,
    choose_layout,
    dense,
    load_foreign,
    read_config,
    stored_depth,
    stored_shape,
)
from difax.weights.settings import (
    Setting,
    check_agrees,
    check_head_width,
    one_of,
    optional,
    read_settings,
    rows_of,
    whole,
)

HEAD_WIDTH = 64  # of every published one, and of one whose config.json does not say
Table = dict[str, Source]


def _norms(path: str, q: str, k: str, number: str = "") -> Table:
    return {f"{path}/q_norm{number}": Source((f"{q}.weight",)), f"{path}/k_norm{number}": Source((f"{k}.weight",))}


def _original_stream(run: LayerRun, stream: str) -> Table:
    block, path = f"joint_blocks.{{{run.name}}}.{'x' if stream == 'img' else 'context'}_block", f"{run.name}/{stream}"
    table = {
        **dense(f"{path}/ada", f"{block}.adaLN_modulation.1"),
        **dense(f"{path}/fc1", f"{block}.mlp.fc1"),
        **dense(f"{path}/fc2", f"{block}.mlp.fc2"),
    }
    for number in ("", "2"):
        attn = f"{block}.attn{number}"
        table |= dense(f"{path}/qkv{number}", f"{attn}.qkv") | dense(f"{path}/out{number}", f"{attn}.proj")
        table |= _norms(path, f"{attn}.ln_q", f"{attn}.ln_k", number)
    return table


def _diffusers_stream(run: LayerRun, stream: str) -> Table:
    block, path = f"transformer_blocks.{{{run.name}}}", f"{run.name}/{stream}"
    context = "" if stream == "img" else "_context"
    order = (1, 0) if run.last and stream == "txt" else None
    table = {
        **dense(f"{path}/ada", f"{block}.norm1{context}.linear", order=order),
        **dense(f"{path}/fc1", f"{block}.ff{context}.net.0.proj"),
        **dense(f"{path}/fc2", f"{block}.ff{context}.net.2"),
    }
    if stream == "txt":
        table |= dense(f"{path}/qkv", *(f"{block}.attn.add_{part}_proj" for part in "qkv"))
        table |= dense(f"{path}/out", f"{block}.attn.to_add_out")
        return table | _norms(path, f"{block}.attn.norm_added_q", f"{block}.attn.norm_added_k")
    for number in ("", "2"):
        attn = f"{block}.attn{number}"
        table |= dense(f"{path}/qkv{number}", *(f"{attn}.to_{part}" for part in "qkv"))
        table |= dense(f"{path}/out{number}", f"{attn}.to_out.0")
        table |= _norms(path, f"{attn}.norm_q", f"{attn}.norm_k", number)
    return table


def _ends(patch: str, positions: str, text: str, time: tuple[str, str], pooled: tuple[str, str]) -> Table:
    """What stands before the blocks, by the names of a layout."""
    return {
        # a convolution's [D, C, p, q] -> [p, q, C, D]: our patches run over row, column, channel
        "ends/patch/kernel": Source((f"{patch}.weight",), (2, 3, 1, 0)),
        "ends/patch/bias": Source((f"{patch}.bias",)),
        "ends/positions": Source((positions,), (0, 1, 2)),  # [1, P P, D]
        **dense("ends/text", text),
        **dense("ends/time1", time[0]),
        **dense("ends/time2", time[1]),
        **dense("ends/pooled1", pooled[0]),
        **dense("ends/pooled2", pooled[1]),
    }


_TIME = "time_text_embed.timestep_embedder"
_POOLED = "time_text_embed.text_embedder"
ENDS = {
    "original": {
        **_ends(
            "x_embedder.proj",
            "pos_embed",
            "context_embedder",
            ("t_embedder.mlp.0", "t_embedder.mlp.2"),
            ("y_embedder.mlp.0", "y_embedder.mlp.2"),
        ),
        **dense("ends/ada", "final_layer.adaLN_modulation.1"),
        **dense("ends/out", "final_layer.linear"),
    },
    "diffusers": {
        **_ends(
            "pos_embed.proj",
            "pos_embed.pos_embed",
            "context_embedder",
            (f"{_TIME}.linear_1", f"{_TIME}.linear_2"),
            (f"{_POOLED}.linear_1", f"{_POOLED}.linear_2"),
        ),
        **dense("ends/ada", "norm_out.linear", order=(1, 0)),
        **dense("ends/out", "proj_out"),
    },
}
STREAMS = {"original": _original_stream, "diffusers": _diffusers_stream}


def layout_table(layout: str, runs: list[LayerRun]) -> Table:
    """Every row that a layout may have for a model of these stages, whose names are the placeholders."""
    streams = [STREAMS[layout](run, stream) for run in runs for stream in ("img", "txt")]
    return {path: source for part in (ENDS[layout], *streams) for path, source in part.items()}


LAYOUTS = {layout: layout_table(layout, layer_runs(3, (0,))) for layout in STREAMS}


def load_sd3(
    path: str | os.PathLike, *, layout: str | None = None, param_dtype: Any = None, **overrides: Any
) -> tuple[Model, Params]:
    """A Stable Diffusion 3 and its weights from a safetensors checkpoint: `find_sd3`, then read.

    Args:
      path, layout, overrides: as `find_sd3`.
      param_dtype: floating dtype of the parameters; None keeps the file's.

    Returns:
      (model, params), params a nested dict of jax arrays, each stage's stacked on a leading [depth] axis.
    """
    found = find_sd3(path, layout=layout, **overrides)
    return found.model, load_foreign(path, found, param_dtype)


def find_sd3(path: str | os.PathLike, *, layout: str | None = None, **overrides: Any) -> Foreign:
    """The Stable Diffusion 3 or 3.5 that is in a checkpoint of Stability AI or diffusers.

    Depth, width, patch, channels, widths of the text, the table of positions, which layers have two attentions and
    whether there are norms come from the tensors, and heads with them where there are norms; else heads, as size and
    base_size, from a config.json beside the file, or from the head width of 64 that all published ones have.

    Args:
      path: a .safetensors file, the .index.json of a sharded one, or a folder that holds one of the two.
      layout: "original", "diffusers", or None to recognise it by the tensors' names.
      **overrides: arguments of `difax.models.sd3.sd3` (size, text_tokens, dtype, ...), which win over what was found.

    Returns:
      The model and the layout table, for `load_sd3` and `difax.weights.convert`.

    Raises:
      ValueError: as `difax.weights.checkpoint.load_safetensors` and `sd3`; an unknown layout or argument; a config.json
        of another function; a relative that takes other channels than it emits; heads that nothing tells.

    References: Esser et al. 2024, arXiv:2403.03206; https://github.com/Stability-AI/sd3.5.
    """
    check_arguments("load_sd3", overrides, {field.name for field in dataclasses.fields(SD3Config)})
    shapes = tensor_shapes(path, LAYOUTS.values())
    layout = choose_layout(path, "a Stable Diffusion 3", LAYOUTS, shapes, layout)
    fields = _geometry(path, layout, shapes)
    fields = {**fields, **(_diffusers_config(path, fields) if layout == "diffusers" else {}), **overrides}
    if "heads" not in fields and fields["width"] % HEAD_WIDTH:
        raise Untold(
            f"{path}: the number of attention heads cannot be known from the tensors (width {fields['width']}); "
            "give heads=...",
            "heads",
        )
    fields = {"heads": fields["width"] // HEAD_WIDTH, **fields}
    variant = next((name for name, preset in VARIANTS.items() if preset == {k: fields[k] for k in preset}), None)
    model = sd3(**{"variant": variant, **fields})
    runs = layer_runs(fields["depth"], fields["dual_layers"])
    table = rows_of(layout_table(layout, runs), jax.eval_shape(model.init, jax.random.key(0)))
    layers = {run.name: run.layers for run in runs}
    return Foreign(model, table, layers, geometry={"variant": variant, **fields})


def _geometry(path: Any, layout: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The arguments of `sd3` that the tensors' shapes tell."""
    table = LAYOUTS[layout]
    shape = stored_shape(path, table, shapes)
    stored = lambda parameter: re.sub(r"\{\w+\}", "0", table[parameter].keys[0]) in shapes  # noqa: E731
    width, channels, patch, other = shape("ends/patch/kernel", 4)
    if patch != other:
        raise ValueError(f"{path}: patches of {patch} x {other}; allowed: square ones")
    emitted, expected = shape("ends/out/kernel")[0], patch * patch * channels
    if emitted != expected:
        raise ValueError(
            f"{path}: the final layer emits {emitted} features for patches of {patch} x {patch} with {channels} "
            f"channels; expected {expected} (relatives that take more channels than they emit are not supported)"
        )
    places = shape("ends/positions", 3)[1]
    if math.isqrt(places) ** 2 != places:
        raise ValueError(f"{path}: a table of {places} positions; allowed: a square")
    depth = stored_depth(table, shapes, "joint/img/qkv/kernel")
    second = table["dual/img/qkv2/kernel"].keys[0]
    norm = "joint/img/q_norm"
    fields = {
        "depth": depth,
        "width": width,
        "dual_layers": tuple(layer for layer in range(depth) if second.format(dual=layer) in shapes),
        "qk_norm": stored(norm),
        "position_rows": math.isqrt(places),
        "patch": patch,
        "channels": channels,
        "text_width": shape("ends/text/kernel")[1],
        "pooled_width": shape("ends/pooled1/kernel")[1],
    }
    if stored(norm):
        (head_width,) = shape(norm, 1)
        if width % head_width:
            raise ValueError(f"{path}: width {width} is not divisible by the head width {head_width}")
        fields["heads"] = width // head_width
    return fields


def _layers() -> Setting:
    """A list of layers, maybe empty."""
    fits = lambda value: isinstance(value, list) and all(map(whole(0).fits, value))  # noqa: E731
    return Setting("a list of layers, 0 or more each", fits)


CLASSES = ("SD3Transformer2DModel",)
SETTINGS = {
    "sample_size": whole(),
    "patch_size": whole(),
    "in_channels": whole(),
    "out_channels": optional(whole()),
    "num_layers": whole(),
    "attention_head_dim": whole(),
    "num_attention_heads": whole(),
    "joint_attention_dim": whole(),
    "caption_projection_dim": whole(),
    "pooled_projection_dim": whole(),
    "pos_embed_max_size": whole(),
    "dual_attention_layers": _layers(),
    "qk_norm": optional(one_of("rms_norm", but="other norms are of no published Stable Diffusion 3")),
}


def _diffusers_config(path: str | os.PathLike, found: dict[str, Any]) -> dict[str, Any]:
    """Heads, size and the trained grid from the config.json that diffusers writes beside the weights, if there."""
    file, config = read_settings(path, CLASSES, SETTINGS)
    said = {
        "patch_size": found["patch"],
        "in_channels": found["channels"],
        "out_channels": found["channels"],
        "num_layers": found["depth"],
        "joint_attention_dim": found["text_width"],
        "caption_projection_dim": found["width"],
        "pooled_projection_dim": found["pooled_width"],
        "pos_embed_max_size": found["position_rows"],
        "qk_norm": "rms_norm" if found["qk_norm"] else None,
    }
    config = {name: sorted(set(v)) if name == "dual_attention_layers" else v for name, v in config.items()}
    check_agrees(file, config, {**said, "dual_attention_layers": list(found["dual_layers"])})
    check_head_width(file, config, "num_attention_heads", "attention_head_dim", found["width"])
    if found["qk_norm"] and "qk_norm" not in config and read_config(path, {})[1]:
        # diffusers would leave the norms that are stored out, with a warning
        raise ValueError(f"{file}: qk_norm=None; allowed: 'rms_norm', as the checkpoint's tensors say")
    fields: dict[str, Any] = {}
    if "heads" in found:
        check_agrees(file, config, {"num_attention_heads": found["heads"]})
    elif "attention_head_dim" in config:
        fields["heads"], rest = divmod(found["width"], config["attention_head_dim"])
        if rest:
            what = f"attention_head_dim={config['attention_head_dim']}; allowed: divisors of {found['width']}"
            raise ValueError(f"{file}: {what}, the width of the checkpoint's tensors")
    elif "num_attention_heads" in config:
        fields["heads"] = config["num_attention_heads"]
    if "sample_size" in config:
        size, patch = config["sample_size"], found["patch"]
        fields |= {"size": size, "base_size": max(size // patch, 1)}
    return fields


PUBLISHED = Published(find_sd3, LAYOUTS, CLASSES)
