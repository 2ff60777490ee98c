"""From the trace of a recorded run to the table that a cache plans from, one function per technique.

Each takes the traces of several runs (other seeds) and returns the keys of the technique's file
(`difax.accel.caches.measured`); the sampled numbers are averaged over runs and over the halves of guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from difax.core.contracts import Trace


def smoothcache(traces: Sequence[Trace]) -> dict[str, Any]:
    """errors[stage][branch][i][k - 1] = ||F_i - F_{i+k}||_1 / ||F_{i+k}||_1, averaged over the layers."""
    errors: dict[str, dict[str, Any]] = {}
    kmax = 0
    for stage, branch, changes in _of_branches(traces, "change"):  # [E, L, kmax]
        now = changes.mean(1)
        kmax = now.shape[1]
        table = np.full_like(now, np.nan)
        for k in range(1, kmax + 1):
            table[: len(now) - k, k - 1] = now[k:, k - 1]
        errors.setdefault(stage, {})[branch] = _listed(table)
    return {"kmax": kmax, "errors": errors}


def block_caching(traces: Sequence[Trace]) -> dict[str, Any]:
    """changes[stage][branch][l][i] = ||F_i - F_{i-1}||_1 / ||F_i||_1."""
    changes: dict[str, dict[str, Any]] = {}
    for stage, branch, found in _of_branches(traces, "change"):
        changes.setdefault(stage, {})[branch] = _listed(found[..., 0].T)
    return {"changes": changes}


def bacache(traces: Sequence[Trace]) -> dict[str, Any]:
    """similarities[stage][branch][l][i][j] = cosine of F_i and F_j for i < j, and spreads[stage][branch][l], the mean
    of mean|F_i - F_j|; from runs recorded with as many distances as there are.

    Raises:
      ValueError: fewer distances were recorded.
    """
    similarities: dict[str, dict[str, Any]] = {}
    spreads: dict[str, dict[str, Any]] = {}
    for stage, branch, found in _of_branches(traces, "similarity"):  # [E, L, kmax]
        evaluations, depth, kmax = found.shape
        if kmax < evaluations - 1:
            raise ValueError(f"bacache: {kmax} distances were recorded; needed: {evaluations - 1}")
        table = np.full((depth, evaluations, evaluations), np.nan)
        for k in range(1, evaluations):
            for i in range(evaluations - k):
                table[:, i, i + k] = found[i + k, :, k - 1]
        similarities.setdefault(stage, {})[branch] = _listed(table)
    for stage, branch, found in _of_branches(traces, "difference"):
        pairs = np.nansum(found, axis=(0, 2)) / np.isfinite(found).sum((0, 2))
        spreads.setdefault(stage, {})[branch] = _listed(pairs)
    return {"similarities": similarities, "spreads": spreads}


def magcache(traces: Sequence[Trace]) -> dict[str, Any]:
    """ratios[i] = mean over tokens of ||R_i|| / ||R_{i-1}||, ratios[0] = 1."""
    ratios = _mean([t.metric["trunk"]["ratio"] for t in traces])
    ratios[0] = 1.0
    return {"ratios": _listed(ratios)}


def teacache(traces: Sequence[Trace], degree: int = 4) -> dict[str, Any]:
    """The polynomial that takes the modulated input's relative change to the output's, by least squares.

    Returns:
      coefficients, highest power first; r2, the share of the outputs' variance that it explains; points, how many.
    """
    x = np.concatenate([np.asarray(t.metric["trunk"]["input"], np.float64).ravel() for t in traces])
    y = np.concatenate([np.asarray(t.metric["output"], np.float64).ravel() for t in traces])
    there = np.isfinite(x) & np.isfinite(y)
    x, y = x[there], y[there]
    if len(x) <= degree or y.var() == 0:  # a head of zeros, as random weights may have, has no change
        what = "all alike" if len(x) > degree else "too few"
        raise ValueError(
            f"teacache: {len(x)} changes of the network's output, {what}; allowed: more than {degree}, that differ "
            "(more samples or steps, trained weights)"
        )
    coefficients = np.polyfit(x, y, degree)
    left = y - np.polyval(coefficients, x)
    return {
        "coefficients": coefficients.tolist(),
        "r2": float(1 - left.var() / y.var()),
        "points": int(len(x)),
        "range": [float(x.min()), float(x.max())],
    }


def icc(traces: Sequence[Trace]) -> dict[str, Any]:
    """inputs and outputs [stage][branch][dense layer]: mean |x| and |y| of each channel, [L, channels]."""
    found: dict[str, dict[str, dict[str, Any]]] = {"inputs": {}, "outputs": {}}
    for stage, branches in traces[0].metric["branch"].items():
        for branch, shown in branches.items():
            for name in shown["magnitude"]:
                for side, key in (("inputs", "x"), ("outputs", "y")):
                    each = [t.metric["branch"][stage][branch]["magnitude"][name][key] for t in traces]
                    layers = found[side].setdefault(stage, {}).setdefault(branch, {})
                    layers[name] = _mean(each).mean(0)  # over evaluations, of [E, L, channels]
    return found


def _of_branches(traces: Sequence[Trace], key: str) -> list[tuple[str, str, np.ndarray]]:
    """(stage, branch, mean over runs and halves of a metric [E, L, ...])."""
    return [
        (stage, branch, _mean([t.metric["branch"][stage][branch][key] for t in traces]))
        for stage, branches in traces[0].metric["branch"].items()
        for branch in branches
    ]


def _mean(values: Sequence[Any]) -> np.ndarray:
    return np.mean([np.asarray(v, np.float64).mean(-1) for v in values], axis=0)  # nan only where all are


def _listed(array: np.ndarray) -> Any:
    """Nested lists with None for nan, in six digits."""
    if array.ndim:
        return [_listed(a) for a in array]
    return None if np.isnan(array) else float(f"{float(array):.6g}")
