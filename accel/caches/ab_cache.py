"""AB-Cache. Yu et al., Training-Free Acceleration of Diffusion Models via Adams-Bashforth Cached Feature Reuse."""

from __future__ import annotations

import numpy as np

from difax.accel.caches.fill import check_order, newton
from difax.accel.caches.output import planned_output
from difax.accel.caches.planned import everywhere, planned
from difax.core.annotations import checked
from difax.core.contracts import Accelerator, Row

WHERE = ("branches", "output")


@checked
def ab_cache(
    order: int = 2,
    interval: int = 3,
    *,
    first: int | None = None,
    where: str = "branches",
    dtype: str | None = None,
) -> Accelerator:
    """Computes at every `interval`-th evaluation and extrapolates the last `order` computed values between.

    computed at evaluation i iff i < first or (i - first + 1) mod interval = 0; else the polynomial through the last k
    values, at unit distances sum_{j=1..k} (-1)^{j+1} C(k, j) F_{-j}: exact for polynomials of degree k - 1.

    Args:
      order: k, 1 or more (1 holds, 2 is a straight line).
      interval: evaluations from one computation to the next, 1 or more (1 is no cache).
      first: evaluations that are all computed at the start, 1 or more; None is `order`, as many as the rule needs.
      where: "branches", every branch's output before the gate; "output", what the network gives out: then nothing of
        it is run in between.
      dtype: of what is remembered; None is the model's.

    Returns:
      An `Accelerator` that remembers `order` outputs, per branch and layer or of the network.

    References: Yu et al. 2025, arXiv:2504.10540. Not checked against code, and the coefficients are derived, from the
      paper's k-step linear relation of O(h^k). Values that lie further apart than one evaluation are weighed by their
      true distances. Equal to `taylorseer` for k = 1 and 2, not beyond. Defaults are ours: the paper's are not known.
    """
    start = order if first is None else first
    if order < 1 or interval < 1 or start < 1:
        raise ValueError(f"ab_cache: order={order}, interval={interval}, first={start}; allowed: 1 or more")
    check_order("ab_cache", order, 1)
    if where not in WHERE:
        raise ValueError(f"ab_cache: where={where!r}; allowed: {', '.join(WHERE)}")

    def computed(rows: Row) -> np.ndarray:
        i = np.asarray(rows.i)
        return (i < start) | ((i - start + 1) % interval == 0)

    if where == "output":
        return planned_output("ab_cache", computed, newton(order - 1), dtype=dtype)
    return planned("ab_cache", lambda rows, stages: everywhere(computed(rows), stages), newton(order - 1), dtype=dtype)
