"""BAC. Ji et al., Block-wise Adaptive Caching for Accelerating Diffusion Policy, 2025, arXiv:2506.13456.

A calibration (the JSON file of `difax.accel.caches.measured`) has the keys

  "similarities": {stage: {branch: s}}, s[l][i][j] = cosine of F_i and F_j of layer l
  "spreads": {stage: {branch: d}}, d[l] = mean over all i < j of mean|F_i - F_j|

F being the branch's output, averaged over samples; only s with i < j is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from difax.accel.caches import measured
from difax.accel.caches.planned import Schedule, planned
from difax.core.annotations import checked
from difax.core.contracts import Accelerator, Row, Stage

NAME = "bacache"
FEEDFORWARD = ("mlp", "attn_mlp")


@checked
def bacache(
    similarities: Mapping[str, Any] | None = None,
    *,
    spreads: Mapping[str, Any] | None = None,
    file: str | None = None,
    updates: int = 10,
    bubble: int = 3,
    dtype: str | None = None,
) -> Accelerator:
    """Gives every branch of every layer the evaluations at which computing it keeps most similarity to what is held.

    Each branch of each layer: 0 = c_1 < ... < c_M are the evaluations that maximise
    sum_m sum_{c_m < j < c_{m+1}} s[c_m][j] (c_{M+1} = E), found by dynamic programming. Then the bubbling union: the
    branches with the largest spread are also computed wherever an MLP of the same or a later layer is.

    Args:
      similarities: {branch: s [L, E, E]}, or {stage: {branch: s}}; a branch that is not named is always computed.
      spreads: {branch: d [L]} or {stage: {branch: d}}, by which the union chooses.
      file: in place of both, a calibration.
      updates: M, 1 to E (5 to 20 of 100 in the authors' scripts).
      bubble: how many branches the union extends, 0 or more (3 to 5); 0 needs no spreads.
      dtype: of what is held; None is the model's.

    Returns:
      An `Accelerator` that remembers one output per branch and layer.

    References: Ji et al. 2025, by the rule of the authors' BACInfer package. There a union of one branch does nothing,
      and the evaluations 99 and 100 are always computed; not here.
    """
    if (similarities is None) == (file is None):
        raise ValueError(
            f"bacache: {'nothing' if file is None else 'similarities and file'} was given; allowed: similarities, or a "
            "file of them as difax calibrate --cache bacache writes"
        )
    if updates < 1 or bubble < 0:
        raise ValueError(f"bacache: updates={updates}, bubble={bubble}; allowed: 1 or more, and 0 or more")
    content: dict[str, Any] = {"similarities": similarities, "spreads": spreads}
    if file is not None:
        content = measured.read(NAME, file, ("similarities", "steps", *(("spreads",) if bubble else ())))
    if bubble and content["spreads"] is None:
        raise ValueError(f"bacache: bubble={bubble} needs spreads; allowed without: 0")

    def schedule(rows: Row, stages: tuple[Stage, ...]) -> Schedule:
        evaluations, source = len(rows.i), measured.source(NAME, file)
        if file is not None:
            measured.same_length(source, content["steps"], evaluations)
        if updates > evaluations:
            raise ValueError(f"bacache: updates={updates}; allowed: up to the {evaluations} evaluations of this run")
        tables = measured.table(
            source,
            content["similarities"],
            stages,
            lambda s: (s.depth, evaluations, evaluations),
            read=lambda s: np.broadcast_to(np.triu(np.ones(s.shape[-2:]), 1), s.shape),
            low=-1.0,
        )
        flags: Schedule = {
            s: {b: np.stack([best_updates(layer, updates) for layer in t], axis=1) for b, t in of.items()}
            for s, of in tables.items()
        }
        if bubble:
            extents = measured.table(source, content["spreads"], stages, lambda s: (s.depth,))
            _bubble(flags, extents, bubble, stages)
        return flags

    return planned(NAME, schedule, dtype=dtype)._replace(measured=measured.record(NAME, file))


def best_updates(similarity: np.ndarray, updates: int) -> np.ndarray:
    """The `updates` evaluations, the first among them, of the highest summed similarity s [E, E]: bool [E]."""
    n = len(similarity)
    kept = np.cumsum(np.triu(similarity, 1), axis=1)  # [i, j]: what i earns by standing in up to and with j
    best = np.full((updates + 1, n), -np.inf)  # [m, j]: m updates serve the evaluations up to and with j
    start = np.zeros((updates + 1, n), int)
    best[1] = kept[0]
    for m in range(2, updates + 1):
        for j in range(m - 1, n):
            earned = best[m - 1, m - 2 : j] + kept[m - 1 : j + 1, j]  # the last update at m - 1 ... j
            start[m, j] = m - 1 + int(np.argmax(earned))
            best[m, j] = earned.max()
    computed, j = np.zeros(n, bool), n - 1
    for m in range(updates, 1, -1):
        computed[start[m, j]] = True
        j = start[m, j] - 1
    computed[0] = True
    return computed


def _bubble(flags: Schedule, spreads: Mapping[str, Mapping[str, np.ndarray]], most: int, stages: Any) -> None:
    """Extends, in place, the branches of the largest spread by what the MLPs behind them compute."""
    before, depth = {}, 0
    for stage in stages:
        before[stage.name] = depth
        depth += stage.depth
    feeding = [
        (before[s] + layer, f[:, layer].copy())
        for s, of in flags.items()
        for b, f in of.items()
        if b in FEEDFORWARD
        for layer in range(f.shape[1])
    ]
    sites = [(s, b, layer) for s, of in flags.items() for b, f in of.items() for layer in range(f.shape[1])]
    for s, b, _ in sites:
        if b not in spreads[s]:
            raise ValueError(f"bacache: no spreads for {s}.{b}")
    sites.sort(key=lambda site: -spreads[site[0]][site[1]][site[2]])
    for s, b, layer in sites[:most]:
        for at, computed in feeding:
            if at >= before[s] + layer:
                flags[s][b][:, layer] |= computed
