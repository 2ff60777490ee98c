"""When = a static plan, where = the network's output: what it gave out stands in for it, and nothing of it is run.

As in `planned`, evaluations that do the same share a mode that is traced once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from difax.accel.caches.fill import Fill, check_dtype, hold, stored
from difax.accel.caches.planned import ring_plan
from difax.core.contracts import Accelerator, Plan, Row, Stage, State, TrunkSpec, no_memory
from difax.core.mixing import mix
from difax.core.shapes import zeros_of
from difax.core.stack import indexed


def planned_output(
    name: str,
    schedule: Callable[[Row], np.ndarray],
    fill: Fill | None = None,
    *,
    share: Callable[[Row], np.ndarray] | None = None,
    dtype: str | None = None,
) -> Accelerator:
    """An accelerator that fills the network's output by a static plan.

    Args:
      name: of the technique.
      schedule: rows -> bool [E], where the output is computed; an evaluation that is `fresh` is always computed.
      fill: what stands in (the newest value).
      share: rows -> float [E], of the other evaluations: how much of the output is the network's, 0 to 1. Where it is
        0 the network is not run; elsewhere it is, share * output + (1 - share) * fill is given out, and the output is
        not remembered. None is 0 everywhere.
      dtype: of what is remembered; None: that of the model.

    Returns:
      An `Accelerator` that remembers up to `fill.depth` outputs of the network, of both halves of guidance.
    """
    check_dtype(name, dtype)
    fill = fill or hold()

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
        fresh = np.asarray(rows.fresh, bool).copy()
        fresh[0] = True
        computed = np.asarray(schedule(rows), bool) | fresh
        shares = np.zeros(len(computed)) if share is None else np.asarray(share(rows), np.float64)
        doing, weights = ring_plan(computed, fresh, fill)
        doing = ["mix" if d == "fill" and s > 0 else d for d, s in zip(doing, shares, strict=True)]
        values = {"share": shares} | ({} if fill.weights is None else {"weights": weights})
        return Plan(**indexed(doing), values=values, owner=name)

    def init(spec: TrunkSpec, modes: tuple[Any, ...]) -> State:
        memory = no_memory(spec, modes)
        slots = max((mode[1] + 1 for mode in modes if isinstance(mode, tuple)), default=0)
        kept = jnp.zeros(spec.output.shape, spec.output.dtype if dtype is None else dtype)
        memory["output"] = (kept,) * slots
        return memory

    def output(run: Any, ring: State, memory: State, row: Row) -> Any:
        doing, numbers = row.plan.mode, row.plan.values
        if doing is None or isinstance(doing, tuple):
            value, memory, report = run(memory)
            if doing is not None:
                slot = doing[1]
                ring = (*ring[:slot], stored(value, ring[slot].dtype.name), *ring[slot + 1 :])
            return value, ring, memory, report, 1.0
        like, nothing = zeros_of(lambda: run(memory)[::2])
        filled = mix(ring[:1], None, like) if fill.weights is None else mix(ring, numbers["weights"][: len(ring)], like)
        if doing == "fill":
            return filled, ring, memory, nothing, 0.0
        value, memory, report = run(memory)
        share = numbers["share"].astype(value.dtype)
        return share * value + (1 - share) * filled, ring, memory, report, 1.0

    return Accelerator(name=name, plan=plan, init=init, output=output)
