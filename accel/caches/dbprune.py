"""DBPrune. vipshop, cache-dit, 2025, https://github.com/vipshop/cache-dit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches.dbcache import beginnings, check, check_caps, check_refresh, forced
from difax.accel.caches.fill import check_dtype, stored
from difax.accel.caches.gate import (
    ASK,
    REUSE,
    UNKNOWN,
    Rule,
    by_group,
    groups_of,
    relative_change,
    rule,
    where_group,
)
from difax.accel.caches.probe import check_blocks
from difax.accel.caches.tally import Tally, after, at_block, caps_reached, empty, raised
from difax.core.annotations import checked
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


@checked
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
    force_refresh_step_hint: int | None = None,
    force_refresh_step_policy: str = "once",
    per_sample: bool = False,
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
      force_refresh_step_hint, force_refresh_step_policy: as in `dbcache`.
      per_sample: every sample decides for itself at each block, so that sample i is that of a batch of one, to
        rounding; without it one decision serves the batch, so that an image depends on its companions. A block is run
        for the whole batch as soon as one sample asks for it.
      dtype: of the residuals that are kept; None is the model's.

    Returns:
      An `Accelerator` that remembers each block's input and residual: 2 L B N D values.

    References: cache-dit 1.5.3, whose decisions and results tests/golden/dbprune.json holds. As there, the
      accumulated-difference cap of `dbcache` has no effect, so it is no argument, and there one half of guidance
      cannot go by the other's differences (its cfg_diff_compute_separate=False ends in an error). There the
      unconditional half's dynamic threshold reads the conditional half's differences; here each half's are its own. The
      blocks are counted over the whole model, as there by default; with CACHE_DIT_FLUX_ENABLE_DUMMY_BLOCKS=0 each of
      FLUX's two lists has its own counters, first and last, which is not here.
    """
    check("dbprune", threshold, warmup, warmup_interval, mask, policy)
    check_dtype("dbprune", dtype)
    check_caps("dbprune", max_cached=max_cached, max_continuous=max_continuous)
    check_refresh("dbprune", force_refresh_step_hint, force_refresh_step_policy)
    if not relax >= 0 or (dynamic_limit is not None and not dynamic_limit >= 0):
        raise ValueError(f"dbprune: relax={relax}, dynamic_limit={dynamic_limit}; allowed: 0 or more")

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
        e, depth = len(rows.i), sum(stage.depth for stage in stages)
        start = min(8, depth // 2) if first is None else first
        check_blocks("dbprune", "never", never, depth)
        kept = {*range(start), *range(depth - last, depth), *never}
        if min(start, last) < 0 or not kept < set(range(depth)):
            raise ValueError(
                f"dbprune: first={start}, last={last}, never={tuple(never)}; allowed: 0 or more, and blocks of the "
                f"{depth} of the model, of which one at least is left to prune"
            )
        free = np.asarray([block not in kept for block in range(depth)])
        cuts = np.cumsum([stage.depth for stage in stages])[:-1]
        of = {s.name: np.tile(part, (e, 1)) for s, part in zip(stages, np.split(free, cuts), strict=True)}
        begins = beginnings(e, force_refresh_step_hint, force_refresh_step_policy)
        force = forced("dbprune", begins, warmup, warmup_interval, mask, policy)
        ask = rule(rows, force, threshold, begins, certain=1.0, most=max_cached, streak=max_continuous)
        top = 2 * threshold if dynamic_limit is None else dynamic_limit
        values = Values(ask, of, np.full(e, relax if dynamic else 0.0), np.full(e, float(top)))
        return Plan(**indexed([()] * e), values=values, owner="dbprune")

    def init(spec: TrunkSpec, modes: tuple[Any, ...]) -> State:
        memory = no_memory(spec, modes)
        groups = groups_of(spec, per_sample)
        memory["along"]["dbprune"] = empty(groups, spec.hidden.dtype)
        for stage, depth in spec.depth.items():
            memory["block"][stage] = Own(
                jnp.zeros((depth, *spec.hidden.shape), spec.hidden.dtype),
                jax.tree.map(lambda a, n=depth: jnp.zeros((n, *a.shape), dtype or a.dtype), spec.within[stage]),
                jnp.full((depth, groups), -1, jnp.int32),
            )
        return memory

    def block(run: Block, where: Where, tokens: Tokens, own: Own, inner: State, row: Row) -> Any:
        ask, free = row.plan.values.rule, row.plan.values.free[where.stage][where.layer]
        tally: Tally = at_block(inner["along"]["dbprune"], row.i, row.i == ask.begins)
        d = relative_change(own.reference, run.hidden(tokens), own.at.shape[0])
        limit = raised(tally, ask.threshold, row.plan.values.relax, row.plan.values.top)
        known = free & (own.at >= ask.begins) & ~row.fresh
        asked = known & (ask.force == ASK) & ~caps_reached(tally, ask, row.i) & (limit > 0)
        measured = asked & (limit < ask.certain)
        prune = known & (ask.force == REUSE) | asked & (~measured | (d >= 0) & (d < limit))

        def filled(inner: State) -> Any:
            out, inner, done = run.skip(_with(tokens, own.residual), inner)
            return out, own, inner, done

        def compute(inner: State) -> Any:
            out, inner, done = run(tokens, inner)
            residual = stored(jax.tree.map(jnp.subtract, out, tokens), dtype)
            new = Own(run.hidden(tokens), residual, jnp.full_like(own.at, row.i))
            if own.at.shape[0] > 1:  # of the samples that reuse, nothing is new
                keep = partial(jax.tree.map, partial(where_group, prune))
                out, new = keep(_with(tokens, own.residual), out), keep(own, new)
            return out, new, inner, done

        out, own, inner, done = jax.lax.cond(jnp.all(prune), filled, compute, inner)
        tally = after(tally, row.i, d, asked, measured, prune)
        shown = {"metric": jnp.where(known, d, UNKNOWN), "asked": asked, "reused": prune}
        shown = {k: by_group(a, row.plan.halves, per_sample) for k, a in shown.items()}
        inner = {**inner, "along": {**inner["along"], "dbprune": tally}}
        return out, own, inner, done._replace(metric={**done.metric, "block": shown})

    return Accelerator(name="dbprune", plan=plan, init=init, block=block, batchwide=not per_sample)


def _with(tokens: Tokens, residual: Tokens) -> Tokens:
    """Tokens with a residual added, in their own types."""
    return jax.tree.map(lambda t, r: t + r.astype(t.dtype), tokens, residual)
