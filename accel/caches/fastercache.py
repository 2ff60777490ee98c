"""FasterCache. Lv et al., FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality, 2024."""

from __future__ import annotations

from typing import Any

import numpy as np

from difax.accel.caches.cfg_cache import Table, estimating
from difax.accel.caches.fill import damped
from difax.accel.caches.planned import Schedule, everywhere, planned
from difax.core.annotations import checked
from difax.core.contracts import Accelerator, Row, Stage

STEPS, RAMP = 30, 20  # of the run that the windows are given for; steps in which the slope grows to its weight


@checked
def fastercache(
    interval: int = 2,
    *,
    start: int = 7,
    weight: float = 0.9,
    cfg: bool = True,
    cfg_interval: int = 5,
    cfg_start: int = 11,
    low_end: int = 25,
    high_start: int = 20,
    growth: float = 1.15,
    branches: tuple[str, ...] = ("attn",),
    dtype: str | None = None,
) -> Accelerator:
    """Extrapolates every second attention output, and estimates the unconditional half from the conditional one.

    With c = i + 1 counted from the noise, c' = 30 c / E: attention is computed iff c' <= start or c mod interval = 1;
    else it is A_1 + (A_1 - A_0) weight (c' - start) / 20, of the last two computed outputs, before the gate. The
    unconditional half is evaluated iff c' <= cfg_start or c mod cfg_interval = 0, and behind an estimate attention with
    it; else it is cond + l low + h high, low + high the difference uncond - cond when it was last evaluated, by spatial
    frequency (low: a disc of min(H, W) // 5); at each estimate l grows by `growth` iff c' <= low_end, h iff
    c' >= high_start.

    Args:
      interval, start, weight: of attention (2, 7, 0.9); interval 1 computes all.
      cfg: estimate the unconditional half (True); it needs a guide that has one.
      cfg_interval, cfg_start, low_end, high_start, growth: of that (5, 11, 25, 20, 1.15); cfg_interval 1 evaluates it
        always. All windows are counters of a run of 30 evaluations; intervals are not scaled.
      branches: that are extrapolated; others are computed (("attn",)).
      dtype: of the held outputs; None is the model's.

    Returns:
      An `Accelerator` that remembers two outputs per layer of these branches, and two images per sample.

    References: Lv et al. 2024, arXiv:2410.19355, with the numbers of the authors' Open-Sora script (commit 02d05ef),
      whose bands were compared; the rest is checked against plain Python. Where guidance is evaluated among estimates,
      attention is computed, as in their Latte script (their Open-Sora script then broadcasts the conditional half's).
      As the transform is linear, estimates are made without one. diffusers has other numbers.
    """
    for name, value in (("interval", interval), ("cfg_interval", cfg_interval)):
        if value < 1:
            raise ValueError(f"fastercache: {name}={value}; allowed: 1 or more")
    if start < 1 or cfg_start < 1:
        raise ValueError(f"fastercache: start={start}, cfg_start={cfg_start}; allowed: 1 or more")

    if not 0 <= weight <= 10 or not 0 < growth <= 10:  # differences grow with each estimate
        raise ValueError(f"fastercache: weight={weight}, growth={growth}; allowed: 0 ... 10, and above 0, up to 10")

    def counters(rows: Row) -> tuple[np.ndarray, np.ndarray]:
        c = np.arange(1, len(rows.i) + 1)
        return c, STEPS * c / len(c)

    def schedule(rows: Row, stages: tuple[Stage, ...]) -> Schedule:
        c, scaled = counters(rows)
        computed = (scaled <= start) | (c % interval == 1 % interval)
        if cfg:
            skip = np.asarray(rows.guide.skip, bool)
            computed |= ~skip & np.append(False, skip[:-1])
        try:
            return everywhere(computed, stages, branches)
        except ValueError as error:
            raise ValueError(f"fastercache: {error}") from None

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Any:
        fill = damped(lambda now: weight * (STEPS * (now + 1) / len(rows.i) - start) / RAMP)
        return planned("fastercache", schedule, fill).plan(rows, stages)

    def estimates(rows: Row) -> Table:
        c, scaled = counters(rows)
        skip = (scaled > cfg_start) & (c % cfg_interval != 0) & (c > 1)
        low, high = (np.where(window, growth, 1.0) for window in (scaled <= low_end, scaled >= high_start))
        return Table(skip, low, high)

    base = planned("fastercache", schedule, damped(lambda now: 1.0), branches=branches, dtype=dtype)
    return base._replace(plan=plan, guide=estimating("fastercache", estimates) if cfg else None)
