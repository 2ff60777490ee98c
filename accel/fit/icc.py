"""The low-rank factors of ICC, by a channel-aware singular value decomposition of a model's own weights.

Chen et al., Accelerating Diffusion Transformer via Increment-Calibrated Caching with Channel-Aware Singular Value
Decomposition, 2025, arXiv:2505.05829.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from difax.accel.caches import measured
from difax.core.contracts import Params, Stage

Factors = dict[str, dict[str, np.ndarray]]  # {stage: {"icc.LAYER.a": [L, K, P, R], "icc.LAYER.b": [L, P, R, N/P]}}
PARTS = {"qkv": 3, "kv": 2}  # products that one kernel holds side by side, by how the layer's name ends
APART = ("ada", "skip")  # dense layers of a block that stand outside of its branches
LARGEST = 1000.0  # no channel weighs less than the heaviest over this


def icc_factors(
    params: Params,
    stages: tuple[Stage, ...],
    rank: int = 128,
    inputs: Mapping[str, Any] | None = None,
    outputs: Mapping[str, Any] | None = None,
) -> Factors:
    """Wa, Wb of the best approximation of that rank to each dense layer of the blocks, in float64 on the host.

    With channel weights u = (mean|x|)^1/2 of inputs and v = (mean|y|)^1/2 of outputs, diag(u) W diag(v) is cut to its
    largest singular values, and divided by the weights again.

    Args:
      params: of the model, before they are quantised.
      stages: `model.stages`.
      rank: of each product, 1 or more; of queries, keys and values each its own.
      inputs, outputs: {stage: {branch: {layer: mean|.| of each channel [L, channels]}}}; None weighs all alike (plain
        SVD). `difax calibrate --cache icc` measures both.

    Returns:
      {stage: {"icc.LAYER.a": [L, K, P, R], "icc.LAYER.b": [L, P, R, N/P]}} in float32, P products in the layer.
    """
    if rank < 1:
        raise ValueError(f"icc_factors: rank={rank}; allowed: 1 or more")
    factors: Factors = {}
    for stage in stages:
        layers = params[stage.name]
        if isinstance(layers, tuple):
            layers = jax.tree.map(lambda *a: np.stack(a), *layers)
        x, y = (_by_layer(given, stage.name) for given in (inputs, outputs))
        factors[stage.name] = {}
        for name, kernel in _kernels(layers).items():
            a, b = _cut(np.asarray(kernel, np.float64), _parts(name), rank, x.get(name), y.get(name))
            factors[stage.name] |= {f"icc.{name}.a": a.astype(np.float32), f"icc.{name}.b": b.astype(np.float32)}
    return factors


def save_factors(path: str | pathlib.Path, factors: Factors) -> None:
    """Writes an .npz with one array "STAGE.NAME" for each factor, for `icc(file=...)`."""
    measured.save_by_stage(path, factors)


def _parts(name: str) -> int:
    last = name.rsplit("/", 1)[-1]
    return next((n for end, n in PARTS.items() if last.endswith(end)), 1)


def _kernels(layers: Any, place: str = "") -> dict[str, Any]:
    """The kernels [L, K, N] of a stage's dense layers by name."""
    found: dict[str, Any] = {}
    for key, value in layers.items():
        if key == "kernel":
            found[place] = value
        elif isinstance(value, Mapping) and key not in APART:
            found |= _kernels(value, f"{place}/{key}" if place else key)
    return found


def _by_layer(given: Mapping[str, Any] | None, stage: str) -> dict[str, Any]:
    return {name: m for layers in (given or {}).get(stage, {}).values() for name, m in layers.items()}


def _weights(magnitude: Any, like: tuple[int, ...]) -> np.ndarray:
    """Of channels [..., C]: the roots of their mean magnitudes, none much smaller than the largest."""
    if magnitude is None:
        return np.ones(like)
    w = np.sqrt(np.asarray(magnitude, np.float64)).reshape(like)
    return np.maximum(w, w.max(-1, keepdims=True) / LARGEST) + 1e-6


def _cut(kernel_LKN: np.ndarray, parts: int, rank: int, inputs: Any, outputs: Any) -> tuple[np.ndarray, np.ndarray]:
    depth, k, n = kernel_LKN.shape
    u_L1K1 = _weights(inputs, (depth, k))[:, None, :, None]
    v_LP1M = _weights(outputs, (depth, parts, n // parts))[:, :, None]
    kernel_LPKM = np.moveaxis(kernel_LKN.reshape(depth, k, parts, n // parts), 2, 1)
    left, values, right = np.linalg.svd(u_L1K1 * kernel_LPKM * v_LP1M, full_matrices=False)
    r = min(rank, values.shape[-1])
    a_LPKR = left[..., :r] / u_L1K1
    b_LPRM = values[..., :r, None] * right[..., :r, :] / v_LP1M
    return np.moveaxis(a_LPKR, 1, 2), b_LPRM
