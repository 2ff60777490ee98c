"""DBPrune. vipshop, cache-dit, 2025, https://github.com/vipshop/cache-dit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches.dbcache import check, check_caps, forced
from difax.accel.caches.fill import check_dtype, stored
from difax.accel.caches.gate import ASK, REUSE, Rule, relative_change, rule
from difax.accel.caches.tally import Tally, after, at_block, caps_reached, empty, raised
from difax.core.contracts import Accelerator, Plan, Row, Stage, State, Tokens, TrunkSpec, Where, no_memory
from difax.core.fold import Block
from difax.core.stack import indexed


class Values(NamedTuple):
    """rule: of every evaluation; free: {stage: bool [E, L]}, may be pruned; relax, top: of the dynamic threshold."""

    rule: Rule
    free: dict[str, Any]
    relax: Any
    top: Any


class Own(NamedTuple):
    """Of one block: its input and what it added when it was last computed, and when that was (-1: never)."""

    reference: Any
    residual: Tokens
    at: Any


def dbprune(
    threshold: float = 0.08,
    *,
    first: int | None = None,
    last: int = 0,
    never: Sequence[int] = (),
    warmup: int = 8,
    warmup_interval: int = 1,
    max_cached: int = -1,
    max_continuous: int = -1,
    mask: Sequence[int] | None = None,
    policy: str = "dynamic",
    dynamic: bool = False,
    relax: float = 1.25,
    dynamic_limit: float | None = None,
    dtype: str | None = None,
) -> Accelerator:
    """Leaves out each block whose input is nearly that of its last computation, and adds its old residual instead.

    d = mean|h' - h| / mean|h'|, h' the block's input when it was last computed;  d < threshold: h += R', else
    h += R = block(h) - h. Warm-up, mask and caps are those of `dbcache`, an evaluation that prunes any block counting
    as one that reuses. With `dynamic`, m the mean of the first 5 differences of the evaluation so far, the threshold
    is max(threshold, relax m) where relax m < dynamic_limit.

    Args:
      threshold: of d; 0 never prunes, 1 and above always does (0.08).
      first, last: blocks at both ends of the model that are never pruned; None is 8, or half of a model of fewer than
        16 blocks (8, 0). never: others, counted over all stages.
      warmup, warmup_interval, max_cached, max_continuous, mask, policy: as in `dbcache`. Once max_cached is reached,
        no further block of that evaluation is pruned.
      dynamic, relax, dynamic_limit: False, 1.25, and None, twice the threshold.
      dtype: of the residuals that are kept; None is the model's.

    Returns:
      An `Accelerator` that remembers each block's input and residual: 2 L B N D values.

    References: cache-dit 1.5.3, whose decisions and results tests/golden/dbprune.json holds. As there, the
      accumulated-difference cap of `dbcache` has no effect, so it is no argument. There the
      unconditional half's dynamic threshold reads the conditional half's differences; here each half's are its own. The
      blocks are counted over the whole model, as there by default; with CACHE_DIT_FLUX_ENABLE_DUMMY_BLOCKS=0 each of
      FLUX's two lists has its own counters, first and last, which is not here.
    """
    check("dbprune", threshold, warmup, warmup_interval, mask, policy)
    check_dtype("dbprune", dtype)
    check_caps("dbprune", max_cached=max_cached, max_continuous=max_continuous)
    if not relax >= 0 or (dynamic_limit is not None and not dynamic_limit >= 0):
        raise ValueError(f"dbprune: relax={relax}, dynamic_limit={dynamic_limit}; allowed: 0 or more")

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
        e, depth = len(rows.i), sum(stage.depth for stage in stages)
        start = min(8, depth // 2) if first is None else first
        kept = {*range(start), *range(depth - last, depth), *never}
        if min(start, last) < 0 or not kept < set(range(depth)):
            raise ValueError(
                f"dbprune: first={start}, last={last}, never={tuple(never)}; allowed: 0 or more, and blocks of the "
                f"{depth} of the model, of which one at least is left to prune"
            )
        free = np.asarray([block not in kept for block in range(depth)])
        cuts = np.cumsum([stage.depth for stage in stages])[:-1]
        of = {s.name: np.tile(part, (e, 1)) for s, part in zip(stages, np.split(free, cuts), strict=True)}
        force = forced("dbprune", e, warmup, warmup_interval, mask, policy)
        ask = rule(rows, force, threshold, certain=1.0, most=max_cached, streak=max_continuous)
        top = 2 * threshold if dynamic_limit is None else dynamic_limit
        values = Values(ask, of, np.full(e, relax if dynamic else 0.0), np.full(e, float(top)))
        return Plan(**indexed([()] * e), values=values, owner="dbprune")

    def init(spec: TrunkSpec, modes: tuple[Any, ...]) -> State:
        memory = no_memory(spec, modes)
        groups = 1 if spec.together else spec.halves
        memory["along"]["dbprune"] = empty(groups, spec.hidden.dtype)
        for stage, depth in spec.depth.items():
            memory["block"][stage] = Own(
                jnp.zeros((depth, *spec.hidden.shape), spec.hidden.dtype),
                jax.tree.map(lambda a, n=depth: jnp.zeros((n, *a.shape), dtype or a.dtype), spec.tokens),
                jnp.full((depth, groups), -1, jnp.int32),
            )
        return memory

    def block(run: Block, where: Where, tokens: Tokens, own: Own, inner: State, row: Row) -> Any:
        ask, free = row.plan.values.rule, row.plan.values.free[where.stage][where.layer]
        tally: Tally = at_block(inner["along"]["dbprune"], row.i)
        d = relative_change(own.reference, run.hidden(tokens), 1)
        limit = raised(tally, ask.threshold, row.plan.values.relax, row.plan.values.top)
        known = free & (own.at >= 0) & ~row.fresh
        asked = known & (ask.force == ASK) & ~caps_reached(tally, ask, row.i) & (limit > 0)
        measured = asked & (limit < ask.certain)
        prune = known & (ask.force == REUSE) | asked & (~measured | (d < limit))

        def compute(inner: State) -> Any:
            out, inner, done = run(tokens, inner)
            residual = stored(jax.tree.map(jnp.subtract, out, tokens), dtype)
            return out, Own(run.hidden(tokens), residual, jnp.full_like(own.at, row.i)), inner, done

        def filled(inner: State) -> Any:
            out = jax.tree.map(lambda t, r: t + r.astype(t.dtype), tokens, own.residual)
            out, inner, done = run.skip(out, inner)
            return out, own, inner, done

        out, own, inner, done = jax.lax.cond(prune[0], filled, compute, inner)
        tally = after(tally, row.i, d, asked, measured, prune)
        shown = {"metric": jnp.where(known, d, jnp.nan), "asked": asked, "reused": prune}
        shown = {k: jnp.repeat(a.astype(jnp.float32), row.plan.halves) for k, a in shown.items()}
        inner = {**inner, "along": {**inner["along"], "dbprune": tally}}
        return out, own, inner, done._replace(metric={**done.metric, "block": shown})

    return Accelerator(name="dbprune", plan=plan, init=init, block=block)
