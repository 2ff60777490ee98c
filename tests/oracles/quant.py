"""Quantisation in numpy, written from the formulas: codes, scales and products in float64."""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

TOP = {"int8": 127, "int4": 7, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
BOTTOM = {"int8": -128, "int4": -8}


class Quantised(NamedTuple):
    codes: np.ndarray  # [K, N]
    scale: np.ndarray  # [G, N] or [1, 1]
    weight: np.ndarray  # [K, N]


def grid(x: np.ndarray, name: str) -> np.ndarray:
    """The nearest value of a format, ties to even, clipped to its symmetric range."""
    x = np.clip(x, -TOP[name], TOP[name])
    return np.rint(x) if name.startswith("int") else x.astype(np.float32).astype(name_dtype(name)).astype(np.float64)


def name_dtype(name: str) -> Any:
    return np.dtype(getattr(ml_dtypes, name))


def quantize(w: np.ndarray, how: Any) -> Quantised:
    """One weight [K, N]."""
    w = w.astype(np.float64)
    low_rank = np.zeros_like(w)
    if how.rank:
        u, s, vh = np.linalg.svd(w)
        low_rank = (u[:, : how.rank] * s[: how.rank]) @ vh[: how.rank]
    rest = w - low_rank
    k, n = w.shape
    size = how.group if isinstance(how.group, int) else k
    codes, scales, weight = np.zeros_like(w), [], np.zeros_like(w)
    for start in range(0, k, size):
        block = rest[start : start + size]
        axis = None if how.group == "tensor" else 0
        if how.zero_point:
            low, high = np.minimum(block.min(0), 0), np.maximum(block.max(0), 0)
            scale = (high - low) / (TOP[how.format] - BOTTOM[how.format])
            zero = BOTTOM[how.format] - np.rint(low / scale)
            code = np.clip(np.rint(block / scale) + zero, BOTTOM[how.format], TOP[how.format])
        else:
            scale, zero = np.abs(block).max(axis) / TOP[how.format], 0
            code = grid(block / scale, how.format)
        codes[start : start + size] = code
        weight[start : start + size] = (code - zero) * scale
        scales.append(np.broadcast_to(scale, 1 if how.group == "tensor" else n))
    return Quantised(codes, np.stack(scales), weight + low_rank)


def product(x: np.ndarray, weight: np.ndarray, activation: str | None) -> np.ndarray:
    """x @ weight, with each row of x rounded to the activations' format first."""
    x = x.astype(np.float64)
    if activation is not None:
        scale = np.abs(x).max(1, keepdims=True) / TOP[activation]
        scale[scale == 0] = 1
        x = grid(x / scale, activation) * scale
    return x @ weight


def unpack(packed: np.ndarray) -> np.ndarray:
    """int8 bytes [K/2, N] -> codes [K, N]: low halves first, in two's complement of four bits."""
    low, high = packed.astype(np.int16) & 15, (packed.astype(np.int16) >> 4) & 15
    codes = np.concatenate([low, high])
    return np.where(codes > 7, codes - 16, codes)
