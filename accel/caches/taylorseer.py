"""TaylorSeer. Liu et al., From Reusing to Forecasting, 2025, arXiv:2503.06923."""

from __future__ import annotations

import numpy as np

from difax.accel.caches.fill import check_order, taylor
from difax.accel.caches.planned import everywhere, planned
from difax.core.annotations import checked
from difax.core.contracts import Accelerator


@checked
def taylorseer(interval: int = 4, order: int = 4, first: int = 2, dtype: str | None = None) -> Accelerator:
    """Computes every branch at every `interval`-th evaluation and extrapolates its output, before the gate, between.

    compute at evaluation i iff i < first or `interval` evaluations have passed since the last computed one;
    else F_0 + sum_k G_k x^k / k!, with the backward differences G_k of `difax.accel.caches.fill.taylor`.

    Args:
      interval: evaluations from one computation to the next, 1 or more (DiT: 3 to 6; FLUX: 6; HunyuanVideo: 5).
      order: highest difference, 0 or more (DiT: 4, FLUX: 1, HunyuanVideo: 1; 0 holds).
      first: evaluations that are all computed at the start, 1 or more (DiT: 2, FLUX: 3, HunyuanVideo: 1).
      dtype: of what is remembered; None is the model's.

    Returns:
      An `Accelerator` that remembers order + 1 outputs per branch and layer.

    References: Liu et al. 2025, arXiv:2503.06923. `taylorseer_diffusers` has the clock of diffusers 0.42, and
      `dbcache(forecast="taylor")` is cache-dit's.
    """
    _check("taylorseer", interval, order, first)

    def schedule(rows, stages):
        return everywhere(_clock(len(rows.i), interval, first), stages)

    # the authors form a difference from the evaluation first - 1 on
    return planned("taylorseer", schedule, taylor(order, first - 1), dtype=dtype)


@checked
def taylorseer_diffusers(interval: int = 5, order: int = 1, first: int = 3, dtype: str = "bfloat16") -> Accelerator:
    """TaylorSeer with the clock and the types of diffusers 0.42.

    compute at evaluation i iff i < first or (i - first - 1) mod interval = 0: behind the first ones a single evaluation
    is filled, interval - 1 from then on.

    Args:
      interval, order: as in `taylorseer` (5, 1).
      first: evaluations that are all computed at the start (3).
      dtype: of what is remembered ("bfloat16").

    References: diffusers 0.42.1, `TaylorSeerCacheConfig`, which with its defaults finds the attention of FLUX only
      and nothing at all in DiT or Wan; here every branch is filled.
    """
    _check("taylorseer_diffusers", interval, order, first)

    def schedule(rows, stages):
        i = np.arange(len(rows.i))
        return everywhere((i < first) | ((i - first - 1) % interval == 0), stages)

    return planned("taylorseer_diffusers", schedule, taylor(order), dtype=dtype)


def _clock(evaluations: int, interval: int, first: int) -> np.ndarray:
    full, since = np.zeros(evaluations, bool), 0
    for i in range(evaluations):
        full[i] = i < first or since == interval - 1
        since = 0 if full[i] else since + 1
    return full


def _check(name: str, interval: int, order: int, first: int) -> None:
    check_order(name, order)
    if interval < 1 or first < 1:
        raise ValueError(
            f"{name}: interval={interval}, order={order}, first={first}; allowed: 1 or more, 0 or more, 1 or more"
        )
