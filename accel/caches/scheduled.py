"""Any static plan of whole evaluations, such as a search finds one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from difax.accel.caches import measured
from difax.accel.caches.fill import Fill, hold, newton, taylor
from difax.accel.caches.planned import everywhere, planned
from difax.accel.caches.span import planned_span
from difax.core.annotations import checked
from difax.core.contracts import Accelerator

FORECASTS = ("hold", "taylor", "newton")
PLACES = ("branches", "stack")


@checked
def scheduled(
    schedule: Sequence[int] | None = None,
    *,
    file: str | None = None,
    where: str = "branches",
    forecast: str = "hold",
    order: int = 1,
    dtype: str | None = None,
) -> Accelerator:
    """Computes the evaluations that a list names and fills the others.

    Args:
      schedule: per evaluation 1 (compute) or 0 (fill); the first is computed anyway.
      file: in place of it, what `difax calibrate --cache scheduled` found: {"technique": "scheduled", "schedule":
        [...], "where": ..., "forecast": ..., "order": ...}; the file's settings hold.
      where: "branches", the outputs of all branches before their gates; "stack", what all blocks add to the tokens.
      forecast: "hold", "taylor" or "newton" with `order`.
      order: of the forecast, 1 or more.
      dtype: of what is kept; None is the model's.

    Returns:
      An `Accelerator` that remembers, for "branches", one output per branch and layer (order + 1 with a forecast), for
      "stack" as many residuals of the tokens.
    """
    if (schedule is None) == (file is None):
        given = "nothing" if file is None else "schedule and file"
        raise ValueError(f"scheduled: {given} was given; allowed: a schedule, or a file of difax calibrate")
    if file is not None:
        found = measured.read("scheduled", file, ("schedule",))
        schedule = found["schedule"]
        where, forecast = found.get("where", where), found.get("forecast", forecast)
        order = found.get("order", order)
    assert schedule is not None
    source, says = measured.source("scheduled", file), measured.record("scheduled", file)
    listed = isinstance(schedule, (list, tuple, np.ndarray)) and len(schedule) > 0
    if not listed or not all(isinstance(f, (int, float, np.generic)) and f in (0, 1) for f in schedule):
        raise ValueError(f"{source}: schedule={schedule!r}; allowed: a list of 1 (compute) and 0 (fill)")
    if where not in PLACES:
        raise ValueError(f"{source}: where={where!r}; allowed: {', '.join(PLACES)}")
    fill, full = forecasting(source, forecast, order), np.asarray(schedule, bool)

    if where == "stack":

        def spans(rows, depth):
            measured.same_length(source, len(full), len(rows.i))
            return [None if f else (0, depth) for f in full]

        return planned_span("scheduled", spans, fill, dtype=dtype)._replace(measured=says)

    def flags(rows, stages):
        measured.same_length(source, len(full), len(rows.i))
        return everywhere(full, stages)

    return planned("scheduled", flags, fill, dtype=dtype)._replace(measured=says)


def forecasting(name: str, forecast: str, order: int) -> Fill:
    """The fill of a name and an order."""
    if forecast not in FORECASTS:
        raise ValueError(f"{name}: forecast={forecast!r}; allowed: {', '.join(FORECASTS)}")
    if isinstance(order, bool) or not isinstance(order, int) or order < 1:
        raise ValueError(f"{name}: order={order}; allowed: 1 or more")
    return {"hold": hold, "taylor": lambda: taylor(order), "newton": lambda: newton(order)}[forecast]()
