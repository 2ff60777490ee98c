"""FBCache and DBCache: a probe of the first blocks decides about those in the middle.

FBCache: Cheng, ParaAttention, 2024, https://github.com/chengzeyi/ParaAttention. DBCache: vipshop, cache-dit, 2025,
https://github.com/vipshop/cache-dit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from difax.accel.caches.fill import Fill, check_order, foca, hold, taylor
from difax.accel.caches.gate import ASK, COMPUTE, REUSE, UNLIMITED, gated, rule
from difax.core.annotations import OrInfinite, checked
from difax.core.contracts import Accelerator

POLICIES = ("dynamic", "static")
REFRESHES = ("once", "repeat")
FORECASTS = ("hold", "taylor", "foca")


@checked
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
    cfg_diff_compute_separate: bool = True,
    force_refresh_step_hint: int | None = None,
    force_refresh_step_policy: str = "once",
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
      cfg_diff_compute_separate: where the halves of guidance run apart, each goes by its own d (True), or the
        unconditional one by the d that the conditional one measured at the same evaluation, if it did (False): its
        warm-up, caps and what it remembers stay its own. Where the halves run as one batch, one d is of both.
      force_refresh_step_hint: at this evaluation, 1 or more, a run begins anew: everything remembered, counted and
        summed is dropped, and warm-up and mask begin again (None: never).
      force_refresh_step_policy: "once", or "repeat": every so many evaluations.
      per_sample: every sample decides for itself, so that sample i is that of a batch of one, to rounding; without it
        one decision serves the batch, so that an image depends on its companions.
      dtype: of the residuals that are kept; None is the model's.

    Returns:
      An `Accelerator` that remembers one probe in float32 and the residuals of the tokens that the forecast needs (1,
      order + 1, or 4).

    References: cache-dit 1.5.3, whose decisions and results tests/golden/dbcache.json holds. Halves of guidance that
      run in one batch decide as one ("fused"); separate contexts (its enable_separate_cfg) are those of the guide,
      `cfg(together=False)`, which runs the conditional half first. There a forced refresh counts calls of the
      transformer, of which separate halves make two an evaluation: give it half of that number. Where the
      unconditional half runs first (its cfg_compute_first), there is no d to share, so that it is no argument. Not here
      are its experimental ways to measure d: of hidden states, of important tokens, of every n-th feature.
    """
    check("dbcache", threshold, warmup, warmup_interval, mask, policy)
    check_refresh("dbcache", force_refresh_step_hint, force_refresh_step_policy)
    if forecast not in FORECASTS:
        raise ValueError(f"dbcache: forecast={forecast!r}; allowed: {', '.join(FORECASTS)}")
    check_order("dbcache", order)
    check_caps("dbcache", max_cached=max_cached, max_continuous=max_continuous)
    if max_accumulated is not None and not max_accumulated >= 0:
        raise ValueError(f"dbcache: max_accumulated={max_accumulated}; allowed: 0 or more, or none")

    def rules(rows, stages):
        begins = beginnings(len(rows.i), force_refresh_step_hint, force_refresh_step_policy)
        return rule(
            rows,
            forced("dbcache", begins, warmup, warmup_interval, mask, policy),
            threshold,
            begins,
            certain=1.0,
            most=max_cached,
            streak=max_continuous,
            cap=UNLIMITED if max_accumulated is None else max_accumulated,
        )

    return gated(
        "dbcache",
        rules,
        first=lambda depth: min(8, depth // 2) if first is None else first,
        last=lambda depth: last,
        probe="residual",
        fill=_fill(forecast, order),
        per_sample=per_sample,
        one_change=not cfg_diff_compute_separate,
        dtype=dtype,
    )


@checked
def fbcache(threshold: float = 0.08, *, per_sample: bool = False, dtype: str | None = None) -> Accelerator:
    """Skips all blocks but the first while the first block's residual has changed little since they last ran.

    DBCache with first = 1, last = 0 and no warm-up: reuse iff mean|r' - r| / mean|r'| < threshold.

    Args:
      threshold: 0 never reuses (0.08 for FLUX, 0.06 for HunyuanVideo; 0.05 in diffusers, which reuses at d <=
        threshold).
      per_sample: as in `dbcache`.
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


def beginnings(evaluations: int, hint: int | None, policy: str) -> np.ndarray:
    """The evaluation at which the run that each evaluation belongs to began: 0, or where a refresh was forced."""
    i = np.arange(evaluations)
    if hint is None:
        return np.zeros_like(i)
    return i // hint * hint if policy == "repeat" else np.where(i >= hint, hint, 0)


def forced(
    name: str, begins: np.ndarray, warmup: int, interval: int, mask: Sequence[int] | None, policy: str
) -> np.ndarray:
    """ASK, COMPUTE or REUSE at each evaluation, from cache-dit's warm-up and mask, counted from where a run begins."""
    k = np.arange(len(begins)) - begins
    force = np.full(len(begins), ASK)
    if mask is not None:
        if len(mask) != len(begins):
            raise ValueError(f"{name}: the mask has {len(mask)} entries; the run has {len(begins)} evaluations")
        steps = np.asarray(mask)[k]
        force[steps == 1] = COMPUTE
        if policy == "static":
            force[steps == 0] = REUSE
        warmup = min(warmup, int(np.argmin(np.append(mask, 0))))
    force[(k < warmup) & (k % interval == 0)] = COMPUTE
    return force


def check_caps(name: str, **caps: int) -> None:
    """Refuses caps on reused evaluations below -1, which is none."""
    for key, value in caps.items():
        if value < -1:
            raise ValueError(f"{name}: {key}={value}; allowed: 0 or more, or -1 for no limit")


def check_refresh(name: str, hint: int | None, policy: str) -> None:
    """Refuses forced refreshes that mean nothing."""
    if hint is not None and hint < 1:
        raise ValueError(f"{name}: force_refresh_step_hint={hint}; allowed: 1 or more, or None")
    if policy not in REFRESHES:
        raise ValueError(f"{name}: force_refresh_step_policy={policy!r}; allowed: {', '.join(REFRESHES)}")


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
