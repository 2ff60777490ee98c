"""Round-to-nearest recipes: one format for all weights of the blocks, embeddings and head left as they are.

Every recipe takes `layers`, a regular expression on the weights' paths ("blocks/qkv/kernel"); None is every weight of
the model's stages. Recipes with activations in 8 bits take `kernel`, what multiplies them: "auto" (by device and shape,
`difax.accel.quant.products`), "xla", or "triton" (the fused kernel for Hopper, or a refusal).
"""

from __future__ import annotations

import re
from typing import Literal

from difax.core.annotations import checked
from difax.core.contracts import Model
from difax.core.qtensor import Quantisation, Rules

Kernel = Literal["auto", "xla", "triton"]


def _rules(model: Model, how: Quantisation, layers: str | None) -> Rules:
    if layers is not None:
        try:
            re.compile(layers)
        except re.error as error:
            raise ValueError(f"layers={layers!r}: {error}; allowed: a regular expression, such as blocks/.*") from None
    stages = "|".join(stage.name for stage in model.stages)
    return ((layers if layers is not None else f"^({stages})/", how),)


def none(model: Model) -> Rules:
    """No quantisation."""
    return ()


@checked
def int8_weight(
    model: Model, group: int | str = "channel", zero_point: bool = False, layers: str | None = None
) -> Rules:
    """Weights in int8, widened for products in the activations' dtype.

    Args:
      group: "channel" (one scale per output), "tensor", or the number of inputs that share a scale.
      zero_point: asymmetric. layers: see the module.

    References: Jacob et al. 2018, arXiv:1712.05877.
    """
    return _rules(model, Quantisation("int8", None, group, zero_point), layers)


@checked
def int8_w8a8(
    model: Model,
    group: int | str = "channel",
    zero_point: bool = False,
    layers: str | None = None,
    kernel: Kernel = "auto",
) -> Rules:
    """Weights and, row by row while running, activations in int8, multiplied as integers.

    Args:
      group, zero_point: of the weights; layers, kernel: see the module.

    References: Dettmers et al. (vector-wise quantisation), 2022, arXiv:2208.07339; without its outlier columns.
    """
    return _rules(model, Quantisation("int8", "int8", group, zero_point, kernel=kernel), layers)


@checked
def int4_weight(model: Model, group: int | str = 64, zero_point: bool = False, layers: str | None = None) -> Rules:
    """Weights in int4, two per byte, widened for products in the activations' dtype.

    Args:
      group: inputs that share a scale (64), "channel" or "tensor"; zero_point: asymmetric; layers: see the module.
    """
    return _rules(model, Quantisation("int4", None, group, zero_point), layers)


@checked
def int4_w4a8(
    model: Model,
    group: int | str = "channel",
    zero_point: bool = False,
    layers: str | None = None,
    kernel: Kernel = "auto",
) -> Rules:
    """Weights in int4, two per byte, unpacked to int8 for a product with activations in int8.

    Args:
      group: "channel" leaves one integer product per weight; a number of inputs makes one product for each group.
      zero_point: asymmetric. layers, kernel: see the module.
    """
    return _rules(model, Quantisation("int4", "int8", group, zero_point, kernel=kernel), layers)


@checked
def svdquant_w4a8(
    model: Model,
    rank: int = 32,
    group: int | str = "channel",
    zero_point: bool = False,
    layers: str | None = None,
    kernel: Kernel = "auto",
) -> Rules:
    """int4_w4a8 beside a low-rank branch at full precision that takes the largest part of each weight.

    w = down up + Q(w - down up), where down up is the best approximation of rank `rank`.

    Args:
      rank: of the branch (32 in the paper). group, zero_point: of the rest; layers, kernel: see the module.

    References: Li et al., SVDQuant, 2024, arXiv:2411.05007. Without its smoothing and its iteration, which need
    calibration data, and with activations in int8 where the paper has int4.
    """
    return _rules(model, Quantisation("int4", "int8", group, zero_point, rank, kernel=kernel), layers)


@checked
def fp8_weight(model: Model, format: str = "float8_e4m3fn", layers: str | None = None) -> Rules:
    """Weights in fp8, widened for products in the activations' dtype.

    Args:
      format: "float8_e4m3fn" or "float8_e5m2". layers: see the module.
    """
    return _rules(model, Quantisation(format), layers)


@checked
def fp8(
    model: Model,
    format: str = "float8_e4m3fn",
    activation: str = "float8_e4m3fn",
    layers: str | None = None,
    kernel: Kernel = "auto",
) -> Rules:
    """Weights and, row by row while running, activations in fp8, multiplied with float32 sums.

    Args:
      format, activation: "float8_e4m3fn" or "float8_e5m2". layers, kernel: see the module.

    References: Micikevicius et al., FP8 Formats for Deep Learning, 2022, arXiv:2209.05433.
    """
    return _rules(model, Quantisation(format, activation, kernel=kernel), layers)
