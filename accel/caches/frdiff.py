"""FRDiff. So et al., FRDiff: Feature Reuse for Universal Training-free Acceleration of Diffusion Models, 2023."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from difax.accel.caches.output import planned_output
from difax.accel.caches.planned import Schedule, everywhere, planned
from difax.core.annotations import checked
from difax.core.contracts import Accelerator, Plan, Row, Stage
from difax.core.stack import stack


@checked
def frdiff(
    interval: int = 2,
    *,
    bias: float = 0.5,
    slope: float = 30.0,
    keyframes: Sequence[int] | None = None,
    branches: tuple[str, ...] | None = None,
    dtype: str | None = None,
) -> Accelerator:
    """Between keyframes mixes the keyframe's output with that of a network whose branches are held.

    i a keyframe (i mod interval = 0): all is computed, the branches' outputs (before the gate) and the network's are
    kept. Else, with w(i) = clip((slope (i / E - bias) + 2) / 4, 0, 1):
    output = w * (the network with its branches held) + (1 - w) * (the keyframe's output), and the network is not run
    where w = 0. Early evaluations so are those of fewer steps, late ones reuse features.

    Args:
      interval: evaluations from one keyframe to the next, 1 or more (2; 1 is no cache).
      bias: i / E at which w = 1/2 (0.5). slope: of w (30; w rises over 4 / slope of the run).
      keyframes: in place of the interval, the evaluations that are keyframes, as the authors' Auto-FR learns them
        (those whose gate sigmoid(g) is above 1/2); the first is always one.
      branches: which are held; None is all, ("attn",) is what the authors' DiT code holds.
      dtype: of what is kept; None is the model's.

    Returns:
      An `Accelerator` that remembers one output per branch and layer, and one of the network.

    References: So et al. 2023, arXiv:2312.03517, by the rule of Jungwon-Lee/FRDiff (Stable-Diffusion/frdiff.py); its
      DiT code has keyframes that are learned, and no mixing. Auto-FR itself is not here.
    """
    if interval < 1:
        raise ValueError(f"frdiff: interval={interval}; allowed: 1 or more")
    if not slope > 0:
        raise ValueError(f"frdiff: slope={slope}; allowed: more than 0")
    if keyframes is not None and (not len(keyframes) or min(keyframes) < 0):
        raise ValueError(f"frdiff: keyframes={tuple(keyframes)}; allowed: evaluations, counted from 0")

    def keys(rows: Row) -> np.ndarray:
        i = np.asarray(rows.i)
        if keyframes is None:
            return i % interval == 0
        if max(keyframes) >= len(i):
            raise ValueError(f"frdiff: keyframe {max(keyframes)}; allowed: up to {len(i) - 1}, the run's last")
        return np.isin(i, keyframes)

    def share(rows: Row) -> np.ndarray:
        i = np.asarray(rows.i)
        return np.clip((slope * (i / len(i) - bias) + 2) / 4, 0.0, 1.0)

    def schedule(rows: Row, stages: tuple[Stage, ...]) -> Schedule:
        return everywhere(keys(rows), stages, branches)

    both = stack(
        planned("frdiff", schedule, branches=branches, dtype=dtype),
        planned_output("frdiff", keys, share=share, dtype=dtype),
        one_clock=True,  # features are computed at keyframes, where the output is
    )

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
        return dataclasses.replace(both.plan(rows, stages), owner="frdiff")

    return both._replace(name="frdiff", plan=plan)
