"""Weights of Wan's autoencoders by other projects: four published layouts as tables, and `find_wan_autoencoder`.

"diffusers" is that of AutoencoderKLWan and AutoencoderKLQwenImage, "original" that of Wan-Video's Wan2.1_VAE; the
other two are those of Wan 2.2, whose levels have names of their own. Levels and blocks are counted by tensors' names.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from difax.models.autoencoders.wan import wan_autoencoder
from difax.weights.checkpoint import Source, tensor_shapes
from difax.weights.published import Foreign, Published, check_arguments, choose_layout, dense
from difax.weights.settings import (
    any_number,
    check_agrees,
    flag,
    listed,
    number,
    one_of,
    optional,
    read_settings,
    rows_of,
    whole,
)

CLASSES = ("AutoencoderKLWan", "AutoencoderKLQwenImage")


class Names(NamedTuple):
    """How a project names what all layouts have.

    residual: norm1, conv1, norm2, conv2 and shortcut of a residual block. middle: of the three modules. ends: conv_in,
    norm_out, conv_out of both networks. quant: the products behind the encoder and before the decoder. levels: of the
    encoder and of the decoder.
    """

    residual: tuple[str, str, str, str, str]
    middle: tuple[str, str, str]
    ends: tuple[str, str, str]
    quant: tuple[str, str]
    levels: tuple[str, str]


_DIFFUSERS = Names(
    ("norm1", "conv1", "norm2", "conv2", "conv_shortcut"),
    ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    ("conv_in", "norm_out", "conv_out"),
    ("quant_conv", "post_quant_conv"),
    ("encoder.down_blocks", "decoder.up_blocks"),
)
_ORIGINAL = Names(
    ("residual.0", "residual.2", "residual.3", "residual.6", "shortcut"),
    ("middle.0", "middle.1", "middle.2"),
    ("conv1", "head.0", "head.2"),
    ("conv1", "conv2"),
    ("encoder.downsamples", "decoder.upsamples"),
)
NAMES = {
    "diffusers": _DIFFUSERS,
    "diffusers_2.2": _DIFFUSERS,
    "original": _ORIGINAL,
    "original_2.2": _ORIGINAL,
}
LEVELS = 32  # of a network, at most: a side of 2^31 pixels would be one latent


class Level(NamedTuple):
    """The modules of a level as a file names them: residual blocks, each with its attention or None; resampling or
    None."""

    blocks: tuple[tuple[str, str | None], ...]
    resample: str | None


def _levels(layout: str, net: int, depth: int, attention: tuple[bool, ...]) -> Iterator[Level]:
    """The levels of the encoder (net 0) or the decoder (1), from first to last; attention: of each."""
    names, last, k = NAMES[layout], len(attention) - 1, 0
    for i, attends in enumerate(attention):
        level, count = f"{names.levels[net]}.{i}", depth + net
        if layout == "diffusers" and net:
            own = tuple((f"{level}.resnets.{j}", None) for j in range(count))
            yield Level(own, f"{level}.upsamplers.0" if i < last else None)
        elif layout == "diffusers_2.2":
            own = tuple((f"{level}.resnets.{j}", None) for j in range(count))
            yield Level(own, f"{level}.{('downsampler', 'upsampler')[net]}" if i < last else None)
        elif layout == "original_2.2":
            inner = f"{level}.{('downsamples', 'upsamples')[net]}"
            own = tuple((f"{inner}.{j}", None) for j in range(count))
            yield Level(own, f"{inner}.{count}" if i < last else None)
        else:  # one list of modules for all levels
            own = []
            for _ in range(count):
                own.append((f"{names.levels[net]}.{k}", f"{names.levels[net]}.{k + 1}" if attends else None))
                k += 1 + attends
            yield Level(tuple(own), f"{names.levels[net]}.{k}" if i < last else None)
            k += i < last


def _conv(path: str, key: str, rank: int = 5) -> dict[str, Source]:
    """A convolution's [D, C, p, q, r] -> [p, q, r, C, D], and its bias."""
    axes = (*range(2, rank), 1, 0)
    return {f"{path}/kernel": Source((f"{key}.weight",), axes), f"{path}/bias": Source((f"{key}.bias",))}


def _product(path: str, key: str, rank: int) -> dict[str, Source]:
    """A convolution of one pixel as a product: its [D, C, 1, ...] folds to [C, D]."""
    return dense(path, key) | {f"{path}/kernel": Source((f"{key}.weight",), (*range(2, rank), 1, 0))}


def _norm(path: str, key: str, rank: int = 4) -> dict[str, Source]:
    """[C, 1, ...] folds to [C]."""
    return {f"{path}/scale": Source((f"{key}.gamma",), (*range(1, rank), 0))}


def _residual(path: str, key: str, names: Names) -> dict[str, Source]:
    norm1, conv1, norm2, conv2, shortcut = (f"{key}.{name}" for name in names.residual)
    return {
        **_norm(f"{path}/norm1", norm1),
        **_conv(f"{path}/conv1", conv1),
        **_norm(f"{path}/norm2", norm2),
        **_conv(f"{path}/conv2", conv2),
        **_product(f"{path}/shortcut", shortcut, 5),
    }


def _attention(path: str, key: str) -> dict[str, Source]:
    return {
        **_norm(f"{path}/norm", f"{key}.norm", 3),
        **_product(f"{path}/qkv", f"{key}.to_qkv", 4),
        **_product(f"{path}/proj", f"{key}.proj", 4),
    }


def layout_table(layout: str, depth: int, attention: tuple[bool, ...]) -> dict[str, Source]:
    """The table of a layout: every parameter that an autoencoder of these levels may have, and where it stands.

    Args:
      layout: of `NAMES`. depth: residual blocks of a level. attention: is there attention in each level of the encoder.
    """
    names, table = NAMES[layout], {}
    for net, (stem, step) in enumerate((("encoder", "down"), ("decoder", "up"))):
        conv_in, norm_out, conv_out = (f"{stem}.{name}" for name in names.ends)
        first, attn, second = (f"{stem}.{name}" for name in names.middle)
        table |= {
            **_conv(f"{stem}/conv_in", conv_in),
            **_residual(f"{stem}/middle/res_0", first, names),
            **_attention(f"{stem}/middle/attn", attn),
            **_residual(f"{stem}/middle/res_1", second, names),
            **_norm(f"{stem}/norm_out", norm_out),
            **_conv(f"{stem}/conv_out", conv_out),
            **_product(f"{stem}/{('quant', 'post_quant')[net]}", names.quant[net], 5),
        }
        attends = len(attention) * (False,) if net else attention
        for i, level in enumerate(_levels(layout, net, depth, attends)):
            path = f"{stem}/{step}_{i}"
            for j, (block, beside) in enumerate(level.blocks):
                table |= _residual(f"{path}/res_{j}", block, names)
                table |= _attention(f"{path}/attn_{j}", beside) if beside else {}
            if level.resample is not None:
                table |= _conv(f"{path}/resample/conv", f"{level.resample}.resample.1", 4)
                table |= _conv(f"{path}/resample/time_conv", f"{level.resample}.time_conv")
    return table


# by whose names a file is recognised, whatever the numbers in them
LAYOUTS = {layout: layout_table(layout, 2, 4 * (True,)) for layout in NAMES}


def find_wan_autoencoder(path: str | os.PathLike, *, layout: str | None = None, **overrides: Any) -> Foreign:
    """The autoencoder that is in a checkpoint of Wan 2.1, Wan 2.2 or Qwen-Image.

    Widths, levels, blocks, attention and what is halved in time come from the tensors; patch, means, deviations and the
    factors that pipelines count with from a config.json of diffusers beside the file, whose missing keys have the
    class's defaults. Without one they follow from the tensors, and the statistics are the published ones.

    Args:
      path: a .safetensors file, the .index.json of a sharded one, or a folder that holds one of the two.
      layout: of `NAMES`, or None to recognise it by the tensors' names.
      **overrides: arguments of `wan_autoencoder` (dtype, chunk, ...), which win over what was found.

    Returns:
      The autoencoder and the layout table, for `difax.weights.published.load_foreign`.

    Raises:
      ValueError: as `difax.weights.checkpoint.load_safetensors` and `wan_autoencoder`; an unknown layout or argument; a
        config.json of another class, or one that contradicts the tensors.

    References: Wan Team 2025, arXiv:2503.20314.
    """
    check_arguments("find_wan_autoencoder", overrides, inspect.signature(wan_autoencoder).parameters)
    shapes = tensor_shapes(path, LAYOUTS.values())
    layout = choose_layout(path, "a Wan autoencoder", LAYOUTS, shapes, layout)
    fields = _geometry(path, layout, shapes)
    fields = {**fields, **_config(path, fields), **overrides}
    model = wan_autoencoder(**fields)
    table = layout_table(layout, fields["depth"], fields["attention"])
    return Foreign(model, rows_of(table, jax.eval_shape(model.init, jax.random.key(0))), {}, geometry=fields)


def _geometry(path: Any, layout: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The arguments of `wan_autoencoder` that the tensors' names and shapes tell."""
    names = NAMES[layout]

    def width(name: str, axis: int = 0) -> int:
        shape = shapes.get(f"{name}.weight", ())
        if len(shape) != 5 or 0 in shape:
            raise ValueError(
                f"{path}: tensor {name + '.weight'!r} is {shape or 'missing'}; expected a kernel of 5 axes"
            )
        return shape[axis]

    conv_in, _, conv_out = names.ends
    base, colours = width(f"encoder.{conv_in}"), width(f"encoder.{conv_in}", 1)
    decoder_base, channels = width(f"decoder.{conv_out}", 1), width(names.quant[1])
    widths, depth, time, attention = _counted(path, layout, shapes)
    if any(w % base for w in widths) or decoder_base % (widths[0] // base):
        raise ValueError(f"{path}: levels of {widths} channels; allowed: multiples of {base}, the first convolution's")
    patch = math.isqrt(colours // 3)
    patch = patch if layout.endswith("2.2") and 3 * patch**2 == colours else 1
    return {
        "base": base,
        "decoder_base": decoder_base // (widths[0] // base),
        "channels": channels,
        "multipliers": tuple(w // base for w in widths),
        "depth": depth,
        "time": time,
        "attention": attention,
        "residual": layout.endswith("2.2"),
        "colours": colours // patch**2,
        "patch": patch,
    }


def _counted(
    path: Any, layout: str, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[int, ...], int, tuple[bool, ...], tuple[bool, ...]]:
    """(widths, depth, time, attention) of the encoder's levels, by walking through its modules in order."""
    names, last = NAMES[layout], "1.weight"
    stem = names.levels[0]
    inner = {"diffusers_2.2": "resnets", "original_2.2": "downsamples"}.get(layout)
    resample = lambda key: f"{key}.resample.{last}" in shapes  # noqa: E731
    width = lambda key: shapes.get(f"{key}.{names.residual[1]}.weight", (0,))[0]  # noqa: E731
    levels: list[dict[str, Any]] = [{"width": 0, "depth": 0, "attention": False, "time": None}]
    if inner is None:
        modules = (f"{stem}.{k}" for k in range(len(shapes)))
    else:  # those of a level, then the next level's
        modules = (
            key
            for i in range(LEVELS)
            for key in (*(f"{stem}.{i}.{inner}.{j}" for j in range(len(shapes))), f"{stem}.{i}.downsampler")
            if width(key) or resample(key)
        )
    for key in modules:
        level = levels[-1]
        if width(key):
            level["width"], level["depth"] = width(key), level["depth"] + 1
        elif f"{key}.to_qkv.weight" in shapes:
            level["attention"] = True
        elif resample(key):
            level["time"] = f"{key}.time_conv.weight" in shapes
            levels.append({"width": 0, "depth": 0, "attention": False, "time": None})
        else:
            break
    depths = {level["depth"] for level in levels}
    if len(depths) > 1 or not levels[-1]["depth"] or len(levels) > LEVELS:
        raise ValueError(
            f"{path}: levels of {', '.join(str(level['depth']) for level in levels[:8])} residual blocks in "
            f"{stem!r}; allowed: as many in each of at most {LEVELS} levels"
        )
    return (
        tuple(level["width"] for level in levels),
        levels[0]["depth"],
        tuple(level["time"] for level in levels[:-1]),
        tuple(level["attention"] for level in levels),
    )


SETTINGS = {
    "_class_name": one_of(*CLASSES),
    "base_dim": whole(),
    "decoder_base_dim": optional(whole()),
    "z_dim": whole(),
    "dim_mult": listed(whole()),
    "num_res_blocks": whole(),
    "attn_scales": listed(number()),
    "temperal_downsample": listed(flag()),
    "latents_mean": optional(listed(any_number())),
    "latents_std": optional(listed(number())),
    # of AutoencoderKLWan alone
    "is_residual": flag(),
    "in_channels": whole(),
    "patch_size": optional(whole()),
    "scale_factor_temporal": optional(whole()),
    "scale_factor_spatial": optional(whole()),
    # of AutoencoderKLQwenImage
    "input_channels": whole(),
}


def _config(path: str | os.PathLike, found: dict[str, Any]) -> dict[str, Any]:
    """What a config.json of diffusers says beside the tensors, which it must not contradict; {} without one."""
    file, config = read_settings(path, CLASSES, SETTINGS)
    if not config:
        return {}
    image = config["_class_name"] == "AutoencoderKLQwenImage"
    entered = found["colours"] * found["patch"] ** 2
    said = {
        "base_dim": found["base"],
        "z_dim": found["channels"],
        "dim_mult": list(found["multipliers"]),
        "num_res_blocks": found["depth"],
        "temperal_downsample": list(found["time"]),
    }
    if image:
        said["input_channels"] = entered
    else:
        said |= {"decoder_base_dim": found["decoder_base"], "is_residual": found["residual"], "in_channels": entered}
    check_agrees(file, config, said)
    scales = config.get("attn_scales", [])
    if not found["residual"] and found["attention"] != tuple(2.0**-i in scales for i in range(len(found["attention"]))):
        raise ValueError(
            f"{file}: attn_scales={scales}; allowed: those of the levels that have attention in the tensors"
        )
    patch = 1 if image else config.get("patch_size", 1)
    if entered % patch**2:
        raise ValueError(f"{file}: patch_size={patch}; allowed: one whose square divides {entered} channels")
    fields = {"patch": patch, "colours": entered // patch**2, "images": image}
    names = {"latents_mean": "mean", "latents_std": "deviation"}
    fields |= {field: config[name] for name, field in names.items() if name in config}
    if image:
        return fields
    # pipelines count with these two, whatever the levels do
    return fields | {"side": config.get("scale_factor_spatial", 8), "frames": config.get("scale_factor_temporal", 4)}


PUBLISHED = Published(find_wan_autoencoder, LAYOUTS, CLASSES)
