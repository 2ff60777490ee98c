"""What a cache decided in a run, read off its trace: for people, for files, and as a warning where it did nothing.

A gate of any level hands out {"metric": the number that it decides by, "asked": 1 where it was asked, "reused": 1 where
it took what was remembered} as its metric, leaves [E, ..., halves], or [E, ..., samples, halves] where every sample
decides for itself: where nothing was asked, or a half did not run, the number means nothing. On the device a number
that is not known is negative, which no metric is (a program without NaN); `known` makes it NaN.

What was computed and what was reused are two things: a gate that decides by samples computes for the whole batch as
soon as one sample asks, and the others still take what they remember.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from difax.core.arrays import save_arrays
from difax.core.contracts import Row, Trace

LEVELS = ("trunk", "block", "branch")  # on which gates are


def strip(trace: Trace, half: int = 0) -> str:
    """One character per evaluation that was made: F everything computed, . nothing, 1 to 9 tenths in between, a blank
    where the half did not run; f everything computed, but not for every sample: some took what was remembered; s
    another network ran (`Accelerator.networks`). Of a mean over runs whose solver decides how many there are, what only
    some of the runs made is in between too."""
    own = [c for name, c in trace.computed.items() if "/" not in name]
    parts = [np.asarray(c, np.float64)[..., half].sum((1, 2)) for c in own]
    computed = np.sum(parts, axis=0)
    total = sum(c.shape[1] * c.shape[2] for c in own)
    others = [np.asarray(c, np.float64)[..., half].sum((1, 2)) for name, c in trace.computed.items() if "/" in name]
    other = np.sum([*others, np.zeros(len(computed))], axis=0) > 0
    ran = np.asarray(trace.halves) > half
    # a half may run its ends alone, or the whole network be left out: then nothing was computed, which is a decision
    ran = ran | (np.asarray(trace.halves) == 0)
    partly = _reused(trace, half)
    each = zip(computed / total, ran, partly, other, strict=True)
    each = ["s" if o else _character(float(f), p) if r else " " for f, r, p, o in each]
    made = np.broadcast_to(np.asarray(trace.live) > 0, len(each))
    return "".join(c for c, m in zip(each, made, strict=True) if m)


def _character(fraction: float, reused: bool) -> str:
    if fraction <= 0:
        return "."
    return ("f" if reused else "F") if fraction >= 1 else str(min(max(round(10 * fraction), 1), 9))


def _reused(trace: Trace, half: int) -> np.ndarray:
    """Where some sample of a half took what some gate remembered: bool [E]."""
    found = np.zeros(len(trace.halves), bool)
    for level in LEVELS:
        for gate in _gates(trace.metric[level]):
            reused = np.asarray(gate.get("reused", np.zeros_like(gate["metric"])))[..., half]
            found |= (reused.reshape(len(found), -1) > 0).any(1)
    return found


def known(trace: Trace) -> Trace:
    """A trace whose gates have NaN for the numbers that are not known."""

    def of(metric: Any) -> Any:
        if not isinstance(metric, dict):
            return metric
        if "metric" not in metric:
            return {name: of(part) for name, part in metric.items()}
        values = np.asarray(metric["metric"])
        return {**metric, "metric": np.where(values < 0, np.nan, values)}

    return trace._replace(metric={level: of(part) if level in LEVELS else part for level, part in trace.metric.items()})


def summary(trace: Trace) -> dict[str, Any]:
    """Decisions of each half, the share of evaluations that filled something, and percentiles of the gates' metric.

    Returns:
      {"decisions": [strip of each half], "hit_rate": ..., "metric": {"5 %": ..., "50 %": ..., "95 %": ...} or None};
      of gates on several levels "trunk 5 %" and so on.
    """
    halves = next(iter(trace.computed.values())).shape[-1]
    strips = [strip(trace, half) for half in range(halves)]
    hits = np.mean([c not in "F " for s in strips for c in s])
    measured = {level: values for level in LEVELS if len(values := _measured(trace, level))}
    percentiles = {
        f"{level} {p} %" if len(measured) > 1 else f"{p} %": float(np.percentile(values, p))
        for level, values in measured.items()
        for p in (5, 50, 95)
    }
    return {"decisions": strips, "hit_rate": round(float(hits), 4), "metric": percentiles or None}


def _measured(trace: Trace, level: str) -> np.ndarray:
    """Every number that a gate of a level was asked about, in a half that ran."""
    found = [np.zeros(0)]
    for gate in _gates(trace.metric[level]):
        values = np.asarray(gate["metric"], np.float64)
        ran = np.arange(values.shape[-1]) < np.asarray(trace.halves)[:, None]
        ran = ran.reshape(len(values), *(1,) * (values.ndim - 2), -1)
        asked = np.asarray(gate.get("asked", np.ones_like(values)))
        found.append(values[np.isfinite(values) & (values >= 0) & (asked > 0) & ran])
    return np.concatenate(found)


def _gates(metric: Any) -> Iterator[dict[str, Any]]:
    """What gates handed out, of all stages and branches."""
    if isinstance(metric, dict):
        if "metric" in metric:
            yield metric
        else:
            for part in metric.values():
                yield from _gates(part)


def inert(rows: Row, trace: Trace) -> str | None:
    """Why a cache did nothing, or nothing behind its warm-up; None where it did something.

    Args:
      rows: that the run was made with; trace: of the run.
    """
    if rows.plan == () or rows.plan.owner in ("none", "experts"):  # a network in place of another fills nothing
        return None
    found = summary(trace)
    filled = [i for s in found["decisions"] for i, c in enumerate(s) if c not in "F "]
    values = getattr(rows.plan.values, "rule", rows.plan.values)
    told = ""
    if found["metric"]:
        told = "; its metric where it was asked: " + ", ".join(f"{k}: {v:.3g}" for k, v in found["metric"].items())
        threshold = getattr(values, "threshold", None)
        if threshold is not None:
            told += f" (threshold {float(np.max(threshold)):g})"
    if not filled:
        return f"the cache {rows.plan.owner} filled nothing in this run{told}"
    force = getattr(values, "force", None)
    if force is not None and len(force) > 1:
        forced = np.flatnonzero(np.asarray(force)[:-1] == 1)
        asked = np.asarray(force) == 0
        if len(forced) and asked[forced[-1] :].any() and max(filled) < forced[-1]:
            return f"the cache {rows.plan.owner} filled nothing behind its warm-up{told}"
    return None


def save_trace(path: str | pathlib.Path, rows: Row, trace: Trace) -> None:
    """Writes a trace as .npz: computed/STAGE [E, L, branches, halves], entered/STAGE, halves, t, ahead, live,
    unfinished, and the metrics."""
    arrays = {"t": rows.t, "halves": trace.halves, "ahead": trace.ahead}
    arrays |= {"live": np.broadcast_to(trace.live, len(rows.i)), "unfinished": trace.unfinished}
    arrays |= {f"computed/{s}": a for s, a in trace.computed.items()}
    arrays |= {f"entered/{s}": a for s, a in trace.entered.items()}
    for where, leaf in jax.tree_util.tree_flatten_with_path(known(trace).metric)[0]:
        arrays["metric/" + jax.tree_util.keystr(where, simple=True, separator="/")] = leaf
    save_arrays(path, arrays)


def averaged(traces: list[Trace]) -> Trace:
    """The mean of several runs' traces; of a gate's metric, over the runs in which it was asked."""
    mean = jax.tree.map(lambda *a: np.mean([np.asarray(x, np.float64) for x in a], axis=0), *traces)
    return mean._replace(metric=_where_asked([t.metric for t in traces], mean.metric))


def _where_asked(metrics: list[Any], mean: Any) -> Any:
    if not isinstance(mean, dict):
        return mean
    if not {"metric", "asked"} <= mean.keys():
        return {k: _where_asked([m[k] for m in metrics], part) for k, part in mean.items()}
    values, asked = (np.asarray([m[k] for m in metrics], np.float64) for k in ("metric", "asked"))
    weight = np.where(values >= 0, asked, 0.0)
    total = np.where(weight > 0, values * weight, 0.0).sum(0)
    return {**mean, "metric": np.where(weight.sum(0) > 0, total / np.maximum(weight.sum(0), 1e-9), mean["metric"])}
