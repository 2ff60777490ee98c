"""Quantisation of weights: named recipes, each a factory of rules for `difax.core.qtensor.quantize_params`, and which
product serves them on which device."""

from difax.accel.quant.products import check_kernels as check_kernels
from difax.accel.quant.products import fitted as fitted
from difax.accel.quant.products import products_of as products_of
from difax.accel.quant.uniform import (
    fp8,
    fp8_weight,
    int4_w4a8,
    int4_weight,
    int8_w8a8,
    int8_weight,
    none,
    svdquant_w4a8,
)

QUANTS = {
    "none": none,
    "int8_weight": int8_weight,
    "int8_w8a8": int8_w8a8,
    "int4_weight": int4_weight,
    "int4_w4a8": int4_w4a8,
    "svdquant_w4a8": svdquant_w4a8,
    "fp8_weight": fp8_weight,
    "fp8": fp8,
}
