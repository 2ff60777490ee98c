"""PAB. Zhao et al., Real-Time Video Generation with Pyramid Attention Broadcast, 2024, arXiv:2408.12588."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from difax.accel.caches.measured import by_stage
from difax.accel.caches.planned import Schedule, planned
from difax.core.annotations import OrInfinite, checked
from difax.core.contracts import Accelerator, Row, Stage

# the authors' spatial, temporal and cross attention; attn2 is Stable Diffusion 3.5's second spatial one
RANGES = {"attn": 2, "attn2": 2, "temporal": 4, "cross": 6}


@checked
def pab(
    ranges: Mapping[str, int] | None = None,
    window: tuple[OrInfinite, OrInfinite] = (100.0, 850.0),
    *,
    mlp: Sequence[float] = (),
    mlp_blocks: int = 5,
    mlp_skip: int = 2,
    dtype: str | None = None,
) -> Accelerator:
    """Inside a window of timesteps, holds each kind of attention, before the gate, over a range of its own.

    held at evaluation i iff low < t < high, strictly, and i mod range != 0, t being the time that the network is
    told. The counter i runs over all evaluations, so that its phase is not that of the entry into the window.

    Args:
      ranges: {branch: evaluations from one computation to the next}, 1 or more (1 is no cache); None is attn and
        attn2 2, temporal 4, cross 6, as far as the model has them. A branch that is not named is always computed, such
        as FLUX's attn_mlp, whose attention cannot be held without its MLP.
      window: (low, high) of t. (100, 850) for CogVideoX and Open-Sora-Plan, (450, 930) for Open-Sora, (100, 800)
        for Latte; give others for a network that is told a time outside of 0 ... 1000 (SiT, EDM).
      mlp: timesteps at which the MLP is computed and then held for `mlp_skip` evaluations; each is the evaluation
        next to it (Open-Sora: 864, 788, 676 of 30 evaluations). () holds no MLP.
      mlp_blocks: how many of the first blocks of each stage do so (5).
      mlp_skip: 0 or more (2).
      dtype: of what is held; None is the model's.

    Returns:
      An `Accelerator` that remembers one output per layer of the branches named.

    References: Zhao et al. 2024, by the rule of NUS-HPC-AI-Lab/VideoSys (core/pab/pab_mgr.py), where the timesteps
      of `mlp` must be those of the run exactly.
    """
    for branch, interval in (ranges or {}).items():
        if interval < 1:
            raise ValueError(f"pab: the range of {branch} is {interval}; allowed: 1 or more")
    low, high = window
    if not low < high:
        raise ValueError(f"pab: window=({low}, {high}); allowed: low < high")
    if mlp_skip < 0 or mlp_blocks < 1:
        raise ValueError(f"pab: mlp_skip={mlp_skip}, mlp_blocks={mlp_blocks}; allowed: 0 or more, and 1 or more")

    def schedule(rows: Row, stages: tuple[Stage, ...]) -> Schedule:
        time = np.round(np.asarray(rows.model_time, np.float64), 6)  # a bound may be the time of an evaluation
        inside = (low < time) & (time < high)
        have = {b for s in stages for b in s.branches}
        chosen = {b: r for b, r in RANGES.items() if b in have} if ranges is None else ranges
        if not inside.any() and any(r > 1 for r in chosen.values()):
            raise ValueError(
                f"pab: window=({low:g}, {high:g}) holds none of the run's times, {time.min():g} to {time.max():g}; "
                "allowed: one that does"
            )
        computed = {b: ~inside | (np.asarray(rows.i) % r == 0) for b, r in chosen.items()}
        flags: Schedule = by_stage("pab", computed, stages)
        if len(mlp):
            by_stage("pab", {"mlp": None}, stages)  # refuses a model without
            gap = np.max(np.abs(np.diff(time))) if len(time) > 1 else np.inf
            for stage in stages:
                if "mlp" in stage.branches:
                    held = np.zeros((len(time), stage.depth), bool)
                    for at in mlp:
                        if not time.min() - gap <= at <= time.max() + gap:
                            raise ValueError(
                                f"pab: mlp has {at:g}, which is none of the run's times, {time.min():g} to "
                                f"{time.max():g}; allowed: timesteps of the run"
                            )
                    firsts = [int(np.argmin(np.abs(time - at))) for at in mlp]
                    for first in firsts:
                        held[first + 1 : first + 1 + mlp_skip, :mlp_blocks] = True
                    held[firsts] = False
                    flags[stage.name]["mlp"] = ~held
        return flags

    return planned("pab", schedule, dtype=dtype)
