"""When = a static plan, where = a span of blocks: what the span added to the tokens, or gave out, stands in for it.

As in `planned`, evaluations that do the same share a mode that is traced once, and a span that a mode fills is not in
its program at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches.fill import Fill, check_dtype, hold, stored
from difax.accel.caches.gate import added
from difax.core.contracts import Accelerator, Plan, Row, Stage, State, Tokens, TrunkSpec, no_memory
from difax.core.mixing import mix
from difax.core.stack import indexed
from difax.core.trunk import Blocks

Span = tuple[int, int]  # blocks from the first up to, not with, the second, counted over all stages
KINDS = ("residual", "output")


def planned_span(
    name: str,
    schedule: Callable[[Row, int], Sequence[Span | None]],
    fill: Fill | None = None,
    *,
    keep: str = "residual",
    dtype: str | None = None,
) -> Accelerator:
    """An accelerator that fills spans of blocks by a static plan.

    Args:
      name: of the technique.
      schedule: (rows, depth of the model) -> per evaluation the span that is filled, None where every block runs. An
        evaluation that is `fresh` runs every block.
      fill: what stands in (the newest value).
      keep: "residual", what the span added, which is added anew; "output", the tokens behind it, as they were.
      dtype: of what is kept; None: that of the model.

    Returns:
      An `Accelerator` that remembers, per span that the plan ever fills, up to `fill.depth` copies of the tokens.
    """
    check_dtype(name, dtype)
    if keep not in KINDS:
        raise ValueError(f"{name}: keep={keep!r}; allowed: {', '.join(KINDS)}")
    fill = fill or hold()

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
        depth = sum(stage.depth for stage in stages)
        fresh = np.asarray(rows.fresh, bool).copy()
        fresh[0] = True
        spans = [None if f else s for s, f in zip(schedule(rows, depth), fresh, strict=True)]
        for span in spans:
            if span is not None and not 0 <= span[0] < span[1] <= depth:
                raise ValueError(f"{name}: blocks {span[0]} to {span[1]}; allowed: within the {depth} of the model")
        modes, weights = _tabulate(spans, fresh, fill)
        values = {} if fill.weights is None else {"weights": weights}
        return Plan(**indexed(modes), values=values, owner=name)

    def init(spec: TrunkSpec, modes: tuple[Any, ...]) -> State:
        memory = no_memory(spec, modes)
        kept = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype if dtype is None else dtype), spec.tokens)
        slots = sorted({key for _, stores in modes for key in stores})
        memory["trunk"] = {key: kept for key in slots}
        return memory

    def trunk(blocks: Blocks, tokens: Tokens, context: Any, state: State, memory: State, row: Row) -> Any:
        filled, stores = row.plan.mode
        cuts = sorted({0, blocks.depth, *(filled or ()), *(cut for span, _ in stores for cut in span)})
        report, inputs = None, {}
        for low, high in zip(cuts, cuts[1:], strict=False):
            inputs[low] = tokens
            if filled is not None and filled[0] <= low and high <= filled[1]:
                if low > filled[0]:
                    continue
                tokens = _filled(state, filled, tokens, row.plan.values.get("weights"))
                _, memory, done = blocks.skip(tokens, memory)
            else:
                tokens, memory, done = blocks.run(tokens, memory, low, high)
                for span, slot in stores:
                    if span[1] == high:
                        value = tokens if keep == "output" else jax.tree.map(jnp.subtract, tokens, inputs[span[0]])
                        state = {**state, (span, slot): stored(value, dtype)}
            report = done if report is None else added(report, done)
        return tokens, state, memory, report

    def _filled(state: State, span: Span, tokens: Tokens, weights: Any) -> Tokens:
        ring = tuple(state[key] for key in sorted(state) if key[0] == span)
        value = mix(ring, None if weights is None else weights[: len(ring)], tokens)
        return value if keep == "output" else jax.tree.map(jnp.add, tokens, value)

    return Accelerator(name=name, plan=plan, init=init, trunk=trunk)


def _tabulate(spans: Sequence[Span | None], fresh: np.ndarray, fill: Fill) -> tuple[list[Any], np.ndarray]:
    """Per evaluation (span that is filled or None, ((span, slot), ...) that are stored), and the weights by slot."""
    weights = np.zeros((len(spans), fill.depth))
    stores: list[set[Any]] = [set() for _ in spans]
    for span in {s for s in spans if s is not None}:
        ring: list[tuple[int, int]] = []
        for e, filled in enumerate(spans):
            if fresh[e]:
                ring = []
            if filled is None:
                slot = min(set(range(fill.depth)) - {slot for _, slot in ring[: fill.depth - 1]})
                ring = [(e, slot), *ring[: fill.depth - 1]]
            elif filled == span:
                steps = np.asarray([at for at, _ in ring] + [-1] * (fill.depth - len(ring)))
                mixed = [1.0] if fill.weights is None else fill.weights(steps, e)
                for (at, slot), w in zip(ring, mixed, strict=False):
                    weights[e, slot] = w
                    if w != 0:
                        stores[at].add((span, slot))
    return [(span, tuple(sorted(s))) for span, s in zip(spans, stores, strict=True)], weights
