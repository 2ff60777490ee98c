"""The published files of AutoencoderKL and of FLUX.2's: three sets of names, and what config.json says.

"diffusers" is the layout of diffusers' classes, "diffusers_old" the same with the attention's older names (the files
of Stable Diffusion and SDXL have them), "original" that of latent diffusion, of SD3 and of Black Forest Labs
(ae.safetensors), which counts the decoder's levels from the finest.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from difax.models.autoencoders.kl import autoencoder_kl, autoencoder_kl_flux2
from difax.weights.checkpoint import Source, network_prefix, tensor_shapes
from difax.weights.published import (
    Foreign,
    Published,
    Shapes,
    Untold,
    check_arguments,
    choose_layout,
    dense,
    read_config,
    stored_shape,
)
from difax.weights.settings import (
    Setting,
    any_number,
    check_agrees,
    either,
    flag,
    listed,
    number,
    one_of,
    optional,
    read_settings,
    several,
    whole,
)


class Names(NamedTuple):
    """How a layout calls the parts; {i} is the level, {j} the resnet, {k} the number of the middle's resnet.

    finest: are the decoder's levels counted from the finest. quant, post_quant: the 1 x 1 convolutions.
    attention: behind the middle's name; then its norm, and its four products.
    """

    down: str
    down_conv: str
    up: str
    up_conv: str
    mid: str
    shortcut: str
    norm_out: str
    attention: str
    norm: str
    products: tuple[str, str, str, str]
    finest: bool = False
    first_mid: int = 0
    quant: str = "quant_conv"
    post_quant: str = "post_quant_conv"


DIFFUSERS = Names(
    "encoder.down_blocks.{i}.resnets.{j}",
    "encoder.down_blocks.{i}.downsamplers.0.conv",
    "decoder.up_blocks.{i}.resnets.{j}",
    "decoder.up_blocks.{i}.upsamplers.0.conv",
    "mid_block.resnets.{k}",
    "conv_shortcut",
    "conv_norm_out",
    "mid_block.attentions.0",
    "group_norm",
    ("to_q", "to_k", "to_v", "to_out.0"),
)
ORIGINAL = Names(
    "encoder.down.{i}.block.{j}",
    "encoder.down.{i}.downsample.conv",
    "decoder.up.{i}.block.{j}",
    "decoder.up.{i}.upsample.conv",
    "mid.block_{k}",
    "nin_shortcut",
    "norm_out",
    "mid.attn_1",
    "norm",
    ("q", "k", "v", "proj_out"),
    finest=True,
    first_mid=1,
)
NAMES = {
    "diffusers": DIFFUSERS,
    "diffusers_old": DIFFUSERS._replace(products=("query", "key", "value", "proj_attn")),
    "original": ORIGINAL,
}
FLUX2_NAMES = NAMES | {"original": ORIGINAL._replace(quant="encoder.quant_conv", post_quant="decoder.post_quant_conv")}


def conv(path: str, key: str, bias: bool = True) -> dict[str, Source]:
    """The rows of a convolution, which torch stores as [out, in, height, width]."""
    rows = {f"{path}/kernel": Source((f"{key}.weight",), (2, 3, 1, 0))}
    return rows | ({f"{path}/bias": Source((f"{key}.bias",))} if bias else {})


def _norm(path: str, key: str) -> dict[str, Source]:
    return {f"{path}/scale": Source((f"{key}.weight",)), f"{path}/bias": Source((f"{key}.bias",))}


def _resnet(path: str, key: str, names: Names, shortcut: bool) -> dict[str, Source]:
    rows = {}
    for n in (1, 2):
        rows |= _norm(f"{path}/norm{n}", f"{key}.norm{n}") | conv(f"{path}/conv{n}", f"{key}.conv{n}")
    return rows | (conv(f"{path}/shortcut", f"{key}.{names.shortcut}") if shortcut else {})


def _middle(half: str, names: Names, attention: bool, rank: int) -> dict[str, Source]:
    rows = {}
    for n in (0, 1):
        key = f"{half}.{names.mid.format(k=n + names.first_mid)}"
        rows |= _resnet(f"{half}/mid/resnet{n}", key, names, shortcut=False)
    if not attention:
        return rows
    base = f"{half}.{names.attention}"
    *qkv, out = (f"{base}.{product}" for product in names.products)
    axes = (*range(2, rank), 1, 0)  # the products are linear, or convolutions over a single pixel
    products = dense(f"{half}/mid/qkv", *qkv) | dense(f"{half}/mid/out", out)
    products = {p: row._replace(axes=axes) if row.axes else row for p, row in products.items()}
    return rows | products | _norm(f"{half}/mid/norm", f"{base}.{names.norm}")


def layout_table(
    names: Names,
    widths: tuple[int, ...],
    decoder_widths: tuple[int, ...],
    layers: int,
    attention: bool = True,
    quant: bool = True,
    post_quant: bool = True,
    rank: int = 2,
) -> dict[str, Source]:
    """The layout of one geometry. rank: of the weights of the attention's products."""
    rows, levels = {}, len(widths)
    for half in ("encoder", "decoder"):
        rows |= conv(f"{half}/conv_in", f"{half}.conv_in") | conv(f"{half}/conv_out", f"{half}.conv_out")
        rows |= _norm(f"{half}/norm_out", f"{half}.{names.norm_out}") | _middle(half, names, attention, rank)
    before = widths[0]
    for i, width in enumerate(widths):
        for j in range(layers):
            rows |= _resnet(f"encoder/down{i}_resnet{j}", names.down.format(i=i, j=j), names, before != width)
            before = width
        if i < levels - 1:
            rows |= conv(f"encoder/down{i}_conv", names.down_conv.format(i=i))
    before = decoder_widths[-1]
    for i, width in enumerate(reversed(decoder_widths)):
        theirs = levels - 1 - i if names.finest else i
        for j in range(layers + 1):
            rows |= _resnet(f"decoder/up{i}_resnet{j}", names.up.format(i=theirs, j=j), names, before != width)
            before = width
        if i < levels - 1:
            rows |= conv(f"decoder/up{i}_conv", names.up_conv.format(i=theirs))
    rows |= conv("encoder/quant", names.quant) if quant else {}
    return rows | (conv("decoder/quant", names.post_quant) if post_quant else {})


STATISTICS = {
    "latents/mean": Source(("bn.running_mean",)),
    "latents/var": Source(("bn.running_var",)),
}
# by whose names a file is recognised: all patterns stand in two levels of different widths
LAYOUTS = {name: layout_table(names, (1, 2), (1, 2), 1) for name, names in NAMES.items()}
FLUX2_LAYOUTS = {name: layout_table(names, (1, 2), (1, 2), 1) | STATISTICS for name, names in FLUX2_NAMES.items()}


def _geometry(path: Any, names: Names, table: Mapping[str, Source], shapes: Shapes) -> dict[str, Any]:
    """The arguments of a factory that the tensors tell, and the rank of the attention's weights."""
    shape = stored_shape(path, table, shapes)
    levels = _count(names.down, "i", shapes)
    layers = _count(names.down.replace("{i}", "0"), "j", shapes)
    first = {"decoder_widths": names.up, "widths": names.down}
    found = {
        field: tuple(_rows(path, f"{part.format(i=i, j=0)}.conv1.weight", shapes) for i in range(levels))
        for field, part in first.items()
    }
    if not names.finest:
        found["decoder_widths"] = found["decoder_widths"][::-1]
    product = f"decoder.{names.attention}.{names.products[0]}.weight"
    return {
        **found,
        "layers": layers,
        "latents": shape("decoder/conv_in/kernel", 4)[1],
        "in_channels": shape("encoder/conv_in/kernel", 4)[1],
        "out_channels": shape("decoder/conv_out/kernel", 4)[0],
        "attention": product in shapes,
        "quant": f"{names.quant}.weight" in shapes,
        "post_quant": f"{names.post_quant}.weight" in shapes,
        "rank": len(shapes.get(product, (1, 1))),
    }


def _count(pattern: str, number: str, shapes: Shapes) -> int:
    """How many values a number has in the names of a file, counted from 0; at least one."""
    head = re.escape(pattern.partition(f"{{{number}}}")[0])
    found = {int(m[1]) for m in (re.match(head + r"(\d{1,3})\.", name) for name in shapes) if m}
    return next(n for n in range(1, 1002) if n not in found)


def _rows(path: Any, name: str, shapes: Shapes) -> int:
    if len(shapes.get(name, ())) != 4:
        raise ValueError(f"{path}: tensor {name!r} is missing, or no convolution")
    return shapes[name][0]


SHARED_SETTINGS = {
    "in_channels": whole(),
    "out_channels": whole(),
    "down_block_types": listed(one_of("DownEncoderBlock2D")),
    "up_block_types": listed(one_of("UpDecoderBlock2D")),
    "block_out_channels": listed(whole()),
    "layers_per_block": whole(),
    "act_fn": one_of("silu", "swish"),
    "latent_channels": whole(),
    "norm_num_groups": whole(),
    "sample_size": either(whole(), several(2, whole())),
    "use_quant_conv": flag(),
    "use_post_quant_conv": flag(),
    "mid_block_add_attention": flag(),
    # of float16, which would overflow; here nothing is computed in it
    "force_upcast": flag(),
}
SETTINGS = SHARED_SETTINGS | {
    "scaling_factor": number(),
    "shift_factor": optional(any_number()),
    "latents_mean": optional(listed(any_number())),
    "latents_std": optional(listed(any_number())),
}
FLUX2_SETTINGS = SHARED_SETTINGS | {
    "decoder_block_out_channels": optional(listed(whole())),
    "batch_norm_eps": number(0.0, open_end=False),
    "patch_size": several(2, one_of(2)),
}
# key of config.json -> what the tensors say of it
_SAID = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "layers_per_block": "layers",
    "latent_channels": "latents",
    "use_quant_conv": "quant",
    "use_post_quant_conv": "post_quant",
    "mid_block_add_attention": "attention",
}
_TAKEN = {
    "norm_num_groups": "groups",
    "sample_size": "sample_size",
    "scaling_factor": "scaling_factor",
    "shift_factor": "shift_factor",
    "latents_mean": "latents_mean",
    "latents_std": "latents_std",
    "batch_norm_eps": "eps",
}
# the published files without a config.json, in the original layout: (channels of the latents, prefix of the names) ->
# scale and shift
_BARE = {
    (16, ""): {"scaling_factor": 0.3611, "shift_factor": 0.1159},  # ae.safetensors of FLUX.1
    (16, "first_stage_model."): {"scaling_factor": 1.5305, "shift_factor": 0.0609},  # in the files of SD3 and 3.5
}


def find_kl(path: str | os.PathLike, *, layout: str | None = None, **overrides: Any) -> Foreign:
    """The AutoencoderKL that is in a checkpoint of diffusers, latent diffusion, SD3 or FLUX.1.

    Widths, layers, channels, attention and 1 x 1 convolutions come from the tensors; groups, scale, shift, means and
    deviations from the config.json beside the file, where a key that is missing has the class's default. Without one,
    a file in the original layout with latents of 16 channels has FLUX.1's scale and shift, below `first_stage_model.`
    SD3's; of any other it has to be given, since files of SD and SDXL differ in nothing else.

    Args:
      path: a .safetensors file, the .index.json of a sharded one, or a folder that holds one of the two.
      layout: "diffusers", "diffusers_old", "original", or None to recognise it by the tensors' names.
      **overrides: arguments of `difax.models.autoencoders.kl.autoencoder_kl` (scaling_factor, dtype, ...), which win
        over what was found.

    Returns:
      The `Autoencoder` and the layout table, for `difax.weights.published.load_foreign`.

    Raises:
      ValueError: as `difax.weights.checkpoint.load_safetensors` and `autoencoder_kl`; a config.json of another class or
        with a value that is not honoured; a scale that neither the file nor the caller gives.
    """
    found, names, told = _found(path, layout, overrides, autoencoder_kl, LAYOUTS, NAMES, CLASSES, SETTINGS)
    if found["widths"] != found.pop("decoder_widths"):
        raise ValueError(f"{path}: encoder and decoder have other widths; allowed: the same")
    if not told and "scaling_factor" not in found:
        prefix = network_prefix(tensor_shapes(path), _keys(LAYOUTS[names]))[1]
        bare = _BARE.get((found["latents"], prefix)) if names == "original" else None
        if bare is None:
            raise Untold(
                f"{path}: the latents' scale cannot be known without a config.json; give scaling_factor=... "
                "(0.18215 of Stable Diffusion 1 and 2, 0.13025 of SDXL; with shift_factor 1.5305 and 0.0609 of SD3, "
                "0.3611 and 0.1159 of FLUX.1)",
                "scaling_factor",
            )
        found = {**bare, **found}
    return _foreign(found, names, NAMES, autoencoder_kl, "AutoencoderKL", {})


def find_flux2(path: str | os.PathLike, *, layout: str | None = None, **overrides: Any) -> Foreign:
    """The autoencoder of FLUX.2 that is in a checkpoint of diffusers or Black Forest Labs; as `find_kl`.

    Raises:
      ValueError: as `find_kl`, the scale aside, which is in the tensors.
    """
    found, names, _ = _found(
        path, layout, overrides, autoencoder_kl_flux2, FLUX2_LAYOUTS, FLUX2_NAMES, FLUX2_CLASSES, FLUX2_SETTINGS
    )
    return _foreign(found, names, FLUX2_NAMES, autoencoder_kl_flux2, "AutoencoderKLFlux2", STATISTICS)


def _found(
    path: str | os.PathLike,
    layout: str | None,
    overrides: Mapping[str, Any],
    factory: Callable[..., Any],
    layouts: Mapping[str, Mapping[str, Source]],
    names: Mapping[str, Names],
    classes: tuple[str, ...],
    settings: Mapping[str, Setting],
) -> tuple[dict[str, Any], str, bool]:
    """What tensors, config.json and the caller say of a factory's arguments; the layout; is there a config.json."""
    check_arguments(f"find_{factory.__name__}", overrides, inspect.signature(factory).parameters)
    shapes = tensor_shapes(path, layouts.values())
    layout = choose_layout(path, "an autoencoder", layouts, shapes, layout)
    found = _geometry(path, names[layout], layouts[layout], shapes)
    file, config = read_settings(path, classes, settings)
    said = {key: found[field] for key, field in _SAID.items()} | {"block_out_channels": list(found["widths"])}
    said["decoder_block_out_channels"] = list(found["decoder_widths"])
    check_agrees(file, config, said)
    taken = {field: config[key] for key, field in _TAKEN.items() if key in config}
    if isinstance(taken.get("sample_size"), list):
        taken["sample_size"] = taken["sample_size"][0]  # as diffusers takes it for its tiles
    return {**found, **taken, **overrides}, layout, bool(read_config(path, {})[1])


def _foreign(
    found: dict[str, Any],
    layout: str,
    names: Mapping[str, Names],
    factory: Callable[..., Any],
    kind: str,
    more: dict[str, Source],
) -> Foreign:
    rank = found.pop("rank")
    ups = found.get("decoder_widths", found["widths"])
    parts = {name: found[name] for name in ("attention", "quant", "post_quant")}
    table = layout_table(names[layout], found["widths"], ups, found["layers"], **parts, rank=rank) | more
    defaults = {p.name: p.default for p in inspect.signature(factory).parameters.values() if p.name != "attend"}
    return Foreign(factory(**found), table, {}, geometry={**defaults, **found}, kind=kind)


def _keys(table: Mapping[str, Source]) -> set[str]:
    return {key for source in table.values() for key in source.keys}


CLASSES, FLUX2_CLASSES = ("AutoencoderKL",), ("AutoencoderKLFlux2",)
KL = Published(find_kl, LAYOUTS, CLASSES)
FLUX2 = Published(find_flux2, FLUX2_LAYOUTS, FLUX2_CLASSES)
