"""FBCache and DBCache: a probe of the first blocks decides about those in the middle.

FBCache: Cheng, ParaAttention, 2024, https://github.com/chengzeyi/ParaAttention. DBCache: vipshop, cache-dit, 2025,
https://github.com/vipshop/cache-dit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from difax.accel.caches.fill import Fill, check_order, foca, hold, taylor
from difax.accel.caches.gate import ASK, COMPUTE, REUSE, gated, rule
from difax.core.annotations import OrInfinite
from difax.core.contracts import Accelerator

POLICIES = ("dynamic", "static")
FORECASTS = ("hold", "taylor", "foca")


def dbcache(
    threshold: float = 0.08,
    *,
    first: int | None = None,
    last: int = 0,
    warmup: int = 8,
    warmup_interval: int = 1,
    max_cached: int = -1,
    max_continuous: int = -1,
    max_accumulated: OrInfinite | None = None,
    mask: Sequence[int] | None = None,
    policy: str = "dynamic",
    forecast: str = "hold",
    order: int = 1,
    per_sample: bool = False,
    dtype: str | None = None,
) -> Accelerator:
    """Runs the first and the last blocks always, and those between only while the first blocks' residual changes.

    r = first blocks' output - input;  d = mean|r' - r| / mean|r'| with r' of the last computed evaluation; reuse iff
    d < threshold: the middle's last residual R, or its forecast, stands in for it. Evaluation k is computed whatever d
    is if k < warmup and k mod warmup_interval = 0, if the mask says so, or where a cap is reached.

    Args:
      threshold: of d; 0 never reuses, 1 and above always does (0.08).
      first: blocks whose residual is the probe, 1 or more; None is 8, or half of a model of fewer than 16 blocks.
      last: blocks behind the span that always run (0).
      warmup, warmup_interval: evaluations that are computed at first (8), and which of them (every one).
      max_cached, max_continuous: reused evaluations at most, in all and in a row; -1 is no limit.
      max_accumulated: no more reuse once the sum of all d that were measured has reached it; it is never reset.
      mask: per evaluation 1 (compute) or 0 (may be reused), as `difax.accel.caches.masks.steps_mask` makes it; the
        warm-up is then as long as the ones that it begins with, at most `warmup`.
      policy: at a 0 of the mask, ask the probe ("dynamic"), or reuse unseen ("static").
      forecast: of R: "hold", "taylor" with `order`, or "foca".
      per_sample: every sample decides for itself.
      dtype: of the residuals that are kept; None is the model's.

    Returns:
      An `Accelerator` that remembers one probe in float32 and the residuals of the tokens that the forecast needs (1,
      order + 1, or 4).

    References: cache-dit 1.5.3. Halves of guidance that run in one batch decide as one ("fused"); separate contexts
      are those of the guide, `cfg(together=False)`.
    """
    check("dbcache", threshold, warmup, warmup_interval, mask, policy)
    if forecast not in FORECASTS:
        raise ValueError(f"dbcache: forecast={forecast!r}; allowed: {', '.join(FORECASTS)}")
    check_order("dbcache", order)
    check_caps("dbcache", max_cached=max_cached, max_continuous=max_continuous)
    if max_accumulated is not None and not max_accumulated >= 0:
        raise ValueError(f"dbcache: max_accumulated={max_accumulated}; allowed: 0 or more, or none")

    def rules(rows, stages):
        return rule(
            rows,
            forced("dbcache", len(rows.i), warmup, warmup_interval, mask, policy),
            threshold,
            certain=1.0,
            most=max_cached,
            streak=max_continuous,
            cap=np.inf if max_accumulated is None else max_accumulated,
        )

    return gated(
        "dbcache",
        rules,
        first=lambda depth: min(8, depth // 2) if first is None else first,
        last=lambda depth: last,
        probe="residual",
        fill=_fill(forecast, order),
        per_sample=per_sample,
        dtype=dtype,
    )


def fbcache(threshold: float = 0.08, *, per_sample: bool = False, dtype: str | None = None) -> Accelerator:
    """Skips all blocks but the first while the first block's residual has changed little since they last ran.

    DBCache with first = 1, last = 0 and no warm-up: reuse iff mean|r' - r| / mean|r'| < threshold.

    Args:
      threshold: 0 never reuses (0.08 for FLUX, 0.06 for HunyuanVideo; 0.05 in diffusers, which reuses at d <=
        threshold).
      per_sample: every sample decides for itself.
      dtype: of the residual that is kept; None is the model's.

    References: ParaAttention. As there, r' is that of the last computed evaluation.
    """
    if not threshold >= 0:
        raise ValueError(f"fbcache: threshold={threshold}; allowed: 0 or more")
    return gated(
        "fbcache",
        lambda rows, stages: rule(rows, ASK, threshold),
        first=lambda depth: 1,
        probe="residual",
        per_sample=per_sample,
        dtype=dtype,
    )


def _fill(forecast: str, order: int) -> Fill:
    # cache-dit's clock starts at -1 and forms no difference before it reaches 2
    return {"hold": hold, "taylor": lambda: taylor(order, first=3), "foca": foca}[forecast]()


def forced(
    name: str, evaluations: int, warmup: int, interval: int, mask: Sequence[int] | None, policy: str
) -> np.ndarray:
    """ASK, COMPUTE or REUSE at each evaluation, from cache-dit's warm-up and mask."""
    force = np.full(evaluations, ASK)
    if mask is not None:
        if len(mask) != evaluations:
            raise ValueError(f"{name}: the mask has {len(mask)} entries; the run has {evaluations} evaluations")
        steps = np.asarray(mask)
        force[steps == 1] = COMPUTE
        if policy == "static":
            force[steps == 0] = REUSE
        warmup = min(warmup, int(np.argmin(np.append(steps, 0))))
    force[:warmup:interval] = COMPUTE
    return force


def check_caps(name: str, **caps: int) -> None:
    """Refuses caps on reused evaluations below -1, which is none."""
    for key, value in caps.items():
        if value < -1:
            raise ValueError(f"{name}: {key}={value}; allowed: 0 or more, or -1 for no limit")


def check(name: str, threshold: float, warmup: int, interval: int, mask: Sequence[int] | None, policy: str) -> None:
    """Refuses settings that cache-dit's rules cannot mean."""
    if not threshold >= 0:
        raise ValueError(f"{name}: threshold={threshold}; allowed: 0 or more")
    if warmup < 0 or interval < 1:
        raise ValueError(f"{name}: warmup={warmup}, warmup_interval={interval}; allowed: 0 or more, and 1 or more")
    if mask is not None and not set(mask) <= {0, 1}:
        raise ValueError(f"{name}: mask={tuple(mask)}; allowed: 1 (compute) and 0 (may be reused)")
    if policy not in POLICIES:
        raise ValueError(f"{name}: policy={policy!r}; allowed: {', '.join(POLICIES)}")
