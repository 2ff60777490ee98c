"""What a cache decided in a run, read off its trace: for people, for files, and as a warning where it did nothing."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np

from difax.contracts import Row, Trace
from difax.files import replacing


def strip(trace: Trace, half: int = 0) -> str:
    """One character per evaluation: F everything computed, . nothing, 1 to 9 tenths in between, a blank where the half
    did not run."""
    parts = [np.asarray(c, np.float64)[..., half].sum((1, 2)) for c in trace.computed.values()]
    computed = np.sum(parts, axis=0)
    total = sum(c.shape[1] * c.shape[2] for c in trace.computed.values())
    ran = np.asarray(trace.halves) > half
    # a half may run its ends alone, or the whole network be left out: then nothing was computed, which is a decision
    ran = ran | (np.asarray(trace.halves) == 0)
    return "".join(_character(float(f)) if r else " " for f, r in zip(computed / total, ran, strict=True))


def _character(fraction: float) -> str:
    if fraction <= 0:
        return "."
    return "F" if fraction >= 1 else str(min(max(round(10 * fraction), 1), 9))


def summary(trace: Trace) -> dict[str, Any]:
    """Decisions of each half, the share of evaluations that filled something, and percentiles of a gate's metric.

    Returns:
      {"decisions": [strip of each half], "hit_rate": ..., "metric": {"5 %": ..., "50 %": ..., "95 %": ...} or None}.
    """
    halves = next(iter(trace.computed.values())).shape[-1]
    strips = [strip(trace, half) for half in range(halves)]
    hits = np.mean([c not in "F " for s in strips for c in s])
    measured = _metric(trace)
    percentiles = None
    if measured.size:
        percentiles = {f"{p} %": float(np.percentile(measured, p)) for p in (5, 50, 95)}
    return {"decisions": strips, "hit_rate": round(float(hits), 4), "metric": percentiles}


def _metric(trace: Trace) -> np.ndarray:
    gate = trace.metric.get("trunk", ()) if isinstance(trace.metric, dict) else ()
    if not isinstance(gate, dict) or "metric" not in gate:
        return np.zeros(0)
    values = np.asarray(gate["metric"], np.float64)
    asked = np.asarray(gate.get("asked", np.ones_like(values)))
    return values[np.isfinite(values) & (asked > 0)]


def inert(rows: Row, trace: Trace) -> str | None:
    """Why a cache did nothing, or nothing behind its warm-up; None where it did something.

    Args:
      rows: that the run was made with; trace: of the run.
    """
    if rows.plan == () or rows.plan.owner == "none":
        return None
    found = summary(trace)
    filled = [i for s in found["decisions"] for i, c in enumerate(s) if c not in "F "]
    told = ""
    if found["metric"]:
        told = "; its metric where it was asked: " + ", ".join(f"{k}: {v:.3g}" for k, v in found["metric"].items())
        threshold = getattr(rows.plan.values, "threshold", None)
        if threshold is not None:
            told += f" (threshold {float(np.max(threshold)):g})"
    if not filled:
        return f"the cache {rows.plan.owner} filled nothing in this run{told}"
    force = getattr(rows.plan.values, "force", None)
    if force is not None and len(force) > 1:
        forced = np.flatnonzero(np.asarray(force)[:-1] == 1)
        asked = np.asarray(force) == 0
        if len(forced) and asked[forced[-1] :].any() and max(filled) < forced[-1]:
            return f"the cache {rows.plan.owner} filled nothing behind its warm-up{told}"
    return None


def save_trace(path: str | pathlib.Path, rows: Row, trace: Trace) -> None:
    """Writes a trace as .npz: computed/STAGE [E, L, branches, halves], entered/STAGE, halves, t, and the metrics."""
    arrays = {"t": rows.t, "halves": trace.halves}
    arrays |= {f"computed/{s}": a for s, a in trace.computed.items()}
    arrays |= {f"entered/{s}": a for s, a in trace.entered.items()}
    for where, leaf in jax.tree_util.tree_flatten_with_path(trace.metric)[0]:
        arrays["metric/" + jax.tree_util.keystr(where, simple=True, separator="/")] = leaf
    with replacing(path) as aside, open(aside, "wb") as file:
        found: dict[str, Any] = {k: np.asarray(a) for k, a in arrays.items()}
        np.savez(file, **found)


def averaged(traces: list[Trace]) -> Trace:
    """The mean of several runs' traces."""
    return jax.tree.map(lambda *a: np.mean([np.asarray(x, np.float64) for x in a], axis=0), *traces)
