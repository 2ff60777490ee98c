"""The published files of diffusers' AutoencoderTiny, whose layers are numbered through.

The original TAESD comes as two files, one for each half, which are not read here; diffusers' folders hold the same
weights.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

from difax.models.autoencoders.kl_checkpoint import conv
from difax.models.autoencoders.tiny import ACTIVATIONS, autoencoder_tiny
from difax.weights.checkpoint import Source, tensor_shapes
from difax.weights.published import Foreign, Published, Shapes, check_arguments, choose_layout, stored_shape
from difax.weights.settings import (
    any_number,
    check_agrees,
    flag,
    listed,
    number,
    one_of,
    optional,
    read_settings,
    whole,
)


def _block(path: str, key: str) -> dict[str, Source]:
    rows = {}
    for n in range(3):
        rows |= conv(f"{path}/conv{n}", f"{key}.conv.{2 * n}")
    return rows


def layout_table(encoder_blocks: Sequence[int], decoder_blocks: Sequence[int]) -> dict[str, Source]:
    """The layout of one geometry."""
    rows, place = conv("encoder/conv_in", "encoder.layers.0"), 1
    for i, count in enumerate(encoder_blocks):
        if i:
            rows |= conv(f"encoder/stage{i}_conv", f"encoder.layers.{place}", bias=False)
            place += 1
        for j in range(count):
            rows |= _block(f"encoder/stage{i}_block{j}", f"encoder.layers.{place + j}")
        place += count
    rows |= conv("encoder/conv_out", f"encoder.layers.{place}")
    rows |= conv("decoder/conv_in", "decoder.layers.0")
    place = 2  # the activation has a number too
    for i, count in enumerate(decoder_blocks):
        for j in range(count):
            rows |= _block(f"decoder/stage{i}_block{j}", f"decoder.layers.{place + j}")
        place += count
        if i < len(decoder_blocks) - 1:  # the upsampling too
            rows |= conv(f"decoder/stage{i}_conv", f"decoder.layers.{place + 1}", bias=False)
            place += 2
    return rows | conv("decoder/conv_out", f"decoder.layers.{place}")


LAYOUTS: Mapping[str, Mapping[str, Source]] = {"diffusers": layout_table((1, 1), (1, 1))}
CLASSES = ("AutoencoderTiny",)
SETTINGS = {
    "in_channels": whole(),
    "out_channels": whole(),
    "encoder_block_out_channels": listed(whole()),
    "decoder_block_out_channels": listed(whole()),
    "act_fn": one_of(*ACTIVATIONS),
    "upsample_fn": one_of("nearest"),
    "latent_channels": whole(),
    "upsampling_scaling_factor": one_of(2),
    "num_encoder_blocks": listed(whole()),
    "num_decoder_blocks": listed(whole()),
    "scaling_factor": number(),
    "shift_factor": optional(any_number()),
    # of float16, which would overflow; here nothing is computed in it
    "force_upcast": flag(),
}


def _blocks(half: str, shapes: Shapes) -> tuple[int, ...]:
    """Blocks of each stage, by which of a half's numbers are convolutions and which are blocks."""
    kinds: dict[int, bool] = {}
    for name in shapes:
        head, _, rest = name.removeprefix(f"{half}.layers.").partition(".")
        if name.startswith(f"{half}.layers.") and head.isdecimal() and len(head) < 4:
            kinds[int(head)] = rest.startswith("conv.")
    stages: list[int] = []
    for place in sorted(kinds):
        if kinds[place] and stages:
            stages[-1] += 1
        else:
            stages.append(0)
    return tuple(stages[:-1])  # the last convolution begins no stage


def find_tiny(path: str | os.PathLike, *, layout: str | None = None, **overrides: Any) -> Foreign:
    """The AutoencoderTiny that is in a checkpoint of diffusers.

    Widths, blocks and channels come from the tensors, the activation, scale and shift from the config.json beside the
    file, where a key that is missing has the class's default, as has all of it without a file.

    Args:
      path: a .safetensors file, the .index.json of a sharded one, or a folder that holds one of the two.
      layout: "diffusers", or None.
      **overrides: arguments of `difax.models.autoencoders.tiny.autoencoder_tiny`, which win over what was found.

    Raises:
      ValueError: as `difax.weights.checkpoint.load_safetensors` and `autoencoder_tiny`; a config.json of another class
        or with a value that is not honoured.
    """
    check_arguments("find_tiny", overrides, inspect.signature(autoencoder_tiny).parameters)
    shapes = tensor_shapes(path, LAYOUTS.values())
    layout = choose_layout(path, "an AutoencoderTiny", LAYOUTS, shapes, layout)
    shape = stored_shape(path, LAYOUTS[layout], shapes)
    found: dict[str, Any] = {f"{half}_blocks": _blocks(half, shapes) for half in ("encoder", "decoder")}
    table = layout_table(**found)
    ends = stored_shape(path, table, shapes)
    found["width"], found["in_channels"] = shape("encoder/conv_in/kernel", 4)[:2]
    found["decoder_width"], found["latents"] = shape("decoder/conv_in/kernel", 4)[:2]
    found["out_channels"] = ends("decoder/conv_out/kernel", 4)[0]
    file, config = read_settings(path, CLASSES, SETTINGS)
    said = {
        "in_channels": found["in_channels"],
        "out_channels": found["out_channels"],
        "latent_channels": found["latents"],
        "num_encoder_blocks": list(found["encoder_blocks"]),
        "num_decoder_blocks": list(found["decoder_blocks"]),
        "encoder_block_out_channels": [found["width"]] * len(found["encoder_blocks"]),
        "decoder_block_out_channels": [found["decoder_width"]] * len(found["decoder_blocks"]),
    }
    check_agrees(file, config, said)
    names = {"act_fn": "activation", "scaling_factor": "scaling_factor", "shift_factor": "shift_factor"}
    found |= {field: config[key] for key, field in names.items() if key in config} | overrides
    return Foreign(autoencoder_tiny(**found), table, {}, geometry=found, kind="AutoencoderTiny")


PUBLISHED = Published(find_tiny, LAYOUTS, CLASSES)
