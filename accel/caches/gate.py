"""When = an online gate: a number that the run itself gives decides whether a span of blocks is computed or filled.

Six switches make TeaCache, FBCache, DBCache and their relatives one function: the probe, the map of its relative
change, whether that accumulates, when the probe's reference is refreshed, the span of blocks, and the caps.

  d = mean|p_ref - p| / mean|p_ref|;   a = map(d), or acc + map(d) where it accumulates
  reuse iff a < threshold, and nothing forbids it;   tokens = span's input + fill(span's last residuals)

Everything that a sweep varies (threshold, warm-up, masks, caps) enters with the rows and is traced.

Who decides, in gates of every level: all samples of a batch as one, so that an image depends on its companions (as
the originals do, which saves most), or with `per_sample` each sample for itself: sample i is then that of a batch of
one, to rounding. What is gated is computed for the whole batch as soon as one sample asks for it, and samples that
reuse keep their filled value.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches.fill import Fill, check_dtype, hold, stored
from difax.core.contracts import Accelerator, Plan, Report, Row, Stage, State, Tokens, TrunkSpec, no_memory
from difax.core.trunk import Blocks

ASK, COMPUTE, REUSE = 0, 1, 2
UNKNOWN = -1.0  # a change with nothing to compare with: below no threshold, and no NaN in a healthy program
UNLIMITED = float(np.finfo(np.float32).max)


class Rule(NamedTuple):
    """What a gate asks at one evaluation; every field is [E], and traced.

    force: ASK, COMPUTE or REUSE. threshold: of a. certain: a threshold from here on reuses unseen (cache-dit: 1).
    most, streak: reused evaluations at most, in all and in a row (-1: no limit). cap: of the sum of all d so far.
    begins: the evaluation from which on anything is remembered: what is older, counts and sums included, is dropped.
    """

    force: Any
    threshold: Any
    certain: Any
    most: Any
    streak: Any
    cap: Any
    begins: Any


class Told(NamedTuple):
    """The change that the half of guidance that ran first has measured, and at which evaluation; [G] of one half."""

    at: Any
    change: Any


class Memory(NamedTuple):
    """What a gate remembers: G groups decide each for itself (all samples as one, or one by one)."""

    reference: Any  # the probe, float32
    ring: tuple[Tokens, ...]  # the span's last residuals, the newest first, then the last values of either kind
    steps: Any  # int32 [depth, G], when they were computed; -1: not yet
    accumulated: Any  # float32 [G]
    total: Any  # float32 [G]
    streak: Any  # int32 [G]
    hits: Any  # int32 [G]
    told: Any  # `Told`, or () where each half measures for itself


def rule(rows: Row, force: Any, threshold: float, begins: Any = 0, **limits: float) -> Rule:
    """A `Rule` for all evaluations from the settings of a technique."""
    values = {"certain": UNLIMITED, "most": -1, "streak": -1, "cap": UNLIMITED, **limits, "threshold": threshold}
    e = len(rows.i)
    whole = {k: np.broadcast_to(np.asarray(v, np.int32), (e,)) for k, v in (("force", force), ("begins", begins))}
    return Rule(**whole, **{k: np.full(e, v, np.float64) for k, v in values.items()})


def groups_of(spec: TrunkSpec, per_sample: bool) -> int:
    """How many groups of rows decide each for itself: the batch or every sample of it, in each half of guidance that
    runs by itself."""
    own = spec.hidden.shape[0] // spec.halves if per_sample else 1
    return own if spec.together else own * spec.halves


def by_group(a: jax.Array, halves: int, per_sample: bool) -> jax.Array:
    """Numbers [G] of groups as a trace has them: [halves], or [samples, halves] where every sample is a group."""
    return jnp.repeat(a[:, None] if per_sample else a, halves, axis=-1).astype(jnp.float32)


def gated(
    name: str,
    rules: Callable[[Row, tuple[Stage, ...]], Rule],
    *,
    first: Callable[[int], int] = lambda depth: 0,
    last: Callable[[int], int] = lambda depth: 0,
    probe: str = "input",
    transform: Callable[[jax.Array], jax.Array] = lambda d: d,
    accumulate: bool = False,
    refresh: str = "compute",
    fill: Fill | None = None,
    per_sample: bool = False,
    one_change: bool = False,
    dtype: str | None = None,
) -> Accelerator:
    """An accelerator that fills a span of blocks where a gate allows it.

    Args:
      name: of the technique.
      rules: (rows, stages) -> what the gate asks at each evaluation.
      first, last: depth of the model -> how many blocks before and behind the span always run.
      probe: "input", what the first dense layer of the model is given; "residual", what the `first` blocks added;
        "time" or "modulation", what the model makes of the time alone (`Model.told`).
      transform: of the relative change d.
      accumulate: add up since the last computed evaluation.
      refresh: the probe's reference is that of the last "compute", or "always" of the evaluation before.
      fill: of the span's residual (the newest as it is).
      per_sample: every sample decides for itself, so that a batch of N equals N batches of one. The span is computed
        for the whole batch as soon as one sample asks for it: what is saved is what all agree to save.
      one_change: where the halves of guidance decide each for itself, the second goes by the change that the first has
        measured at the same evaluation, if it has.
      dtype: of the residuals that are kept; None: that of the model.

    Returns:
      An `Accelerator` that remembers a probe and `fill.depth` residuals of the tokens, and reports the metric d. While
      the span is computed its input is kept besides, of which the residual is the difference: a program takes one copy
      of the tokens more than what is remembered, and up to two where the fill mixes several residuals.
    """
    check_dtype(name, dtype)
    fill = fill or hold()

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
        depth = sum(stage.depth for stage in stages)
        if first(depth) + last(depth) >= depth or min(first(depth), last(depth)) < 0:
            raise ValueError(
                f"{name}: first={first(depth)} and last={last(depth)} blocks always run; allowed: 0 or more, together "
                f"less than the {depth} blocks of the model"
            )
        if last(depth) > first(depth) and any(stage.takes for stage in stages):
            raise ValueError(
                f"{name}: last={last(depth)} blocks would take, by long skips, what blocks in the span give out; "
                f"allowed: at most first={first(depth)}"
            )
        if probe == "residual" and first(depth) < 1:
            raise ValueError(f"{name}: first={first(depth)}; allowed: 1 or more, whose residual is the probe")
        return Plan(np.zeros(len(rows.i), np.int32), rules(rows, stages), owner=name)

    def init(spec: TrunkSpec, modes: tuple[Any, ...]) -> State:
        memory = no_memory(spec, modes)
        groups = groups_of(spec, per_sample)
        if probe not in ("input", "residual", *spec.told):
            allowed = ", ".join(("input", *spec.told))
            raise ValueError(f"{name}: probe={probe!r}, of which the model tells nothing; allowed: {allowed}")
        shape = {"input": spec.first_input, "residual": spec.hidden, **spec.told}[probe]
        empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype if dtype is None else dtype), spec.tokens)
        number = partial(jnp.zeros, (groups,))
        memory["trunk"] = Memory(
            reference=jnp.zeros(shape.shape, _wide(shape.dtype)),
            ring=(empty,) * (fill.depth + fill.recent),
            steps=jnp.full((fill.depth, groups), -1, jnp.int32),
            accumulated=number(jnp.float32),
            total=number(jnp.float32),
            streak=number(jnp.int32),
            hits=number(jnp.int32),
            told=(),
        )
        if one_change:  # of one half's size whatever the halves, which is how both see the same
            one = groups if spec.together else groups // spec.halves
            told = Told(jnp.full((one,), -1, jnp.int32), jnp.zeros((one,), _wide(shape.dtype)))
            memory["trunk"] = memory["trunk"]._replace(told=told)
        return memory

    def trunk(blocks: Blocks, tokens: Tokens, context: Any, state: Memory, memory: State, row: Row) -> Any:
        ask: Rule = row.plan.values
        state, now = _begun(state, row.i == ask.begins), row.i - ask.begins
        entered, report = tokens, None
        low, high = first(blocks.depth), blocks.depth - last(blocks.depth)
        if low:
            tokens, memory, report = blocks.run(tokens, memory, 0, low)
        hidden = blocks.hidden(tokens)
        if probe == "residual":
            seen = hidden - blocks.hidden(entered)
        else:
            seen = blocks.first_input(entered) if probe == "input" else blocks.told[probe]
        groups = state.hits.shape[0]
        d = relative_change(state.reference, seen, groups)
        if one_change:
            d = jnp.where(state.told.at == row.i, state.told.change, d)
        score = transform(jnp.maximum(d, 0)) + (state.accumulated if accumulate else 0.0)
        known = (state.steps[0] >= 0) & ~row.fresh
        limited = (ask.most >= 0) & (state.hits >= ask.most) | (ask.streak >= 0) & (state.streak >= ask.streak)
        limited |= (state.total >= ask.cap) | (ask.threshold <= 0)
        asked = known & (ask.force == ASK) & ~limited
        certain = ask.threshold >= ask.certain
        reuse = known & (ask.force == REUSE) | asked & (certain | (d >= 0) & (score < ask.threshold))
        measured = asked & ~certain

        def compute(memory: State) -> Any:
            out, memory, done = blocks.run(tokens, memory, low, high)
            residual = jax.tree.map(jnp.subtract, out, tokens)
            new = _pushed(state, residual, now, fill, dtype)
            if groups > 1:  # samples that reuse go on as if the span had been filled
                value = _value(state, now, residual, fill)
                out = jax.tree.map(lambda o, t, v: where_group(reuse, t + v, o), out, tokens, value)
                (ring, steps), (old, at) = new, _recalled(state, value, fill, dtype)
                new = jax.tree.map(partial(where_group, reuse), old, ring), jnp.where(reuse, at, steps)
            return out, memory, done, *new

        def filled(memory: State) -> Any:
            value = _value(state, now, tokens, fill)
            out, memory, done = blocks.skip(jax.tree.map(jnp.add, tokens, value), memory)
            return out, memory, done, *_recalled(state, value, fill, dtype)

        tokens, memory, done, ring, steps = jax.lax.cond(jnp.all(reuse), filled, compute, memory)
        report = done if report is None else added(report, done)
        if high < blocks.depth:
            tokens, memory, done = blocks.run(tokens, memory, high, blocks.depth)
            report = added(report, done)
        keep = reuse if refresh == "compute" else jnp.zeros_like(reuse)
        state = Memory(
            reference=where_group(keep, state.reference, seen.astype(state.reference.dtype)),
            ring=ring,
            steps=steps,
            accumulated=jnp.where(reuse, score, 0.0).astype(jnp.float32) if accumulate else state.accumulated,
            total=state.total + jnp.where(measured & (d > 0), d, 0.0).astype(jnp.float32),
            streak=jnp.where(reuse, state.streak + 1, 0),
            hits=state.hits + reuse,
            told=Told(*(jnp.where(measured, a, b) for a, b in zip((row.i, d), state.told, strict=True)))
            if one_change
            else (),
        )
        shown = {"metric": jnp.where(known, d, UNKNOWN), "asked": asked, "reused": reuse}
        shown = {k: by_group(a, row.plan.halves, per_sample) for k, a in shown.items()}
        report = report._replace(metric={**report.metric, "trunk": shown})
        return tokens, state, memory, report

    return Accelerator(name=name, plan=plan, init=init, trunk=trunk, batchwide=not per_sample)


def relative_change(reference: jax.Array, now: jax.Array, groups: int) -> jax.Array:
    """mean|reference - now| / mean|reference| of each group of rows, [groups]; `UNKNOWN` where the reference is 0.

    Args:
      reference, now: [B, ...]; the rows of group g are g, g + groups, ... (the halves of guidance lie one behind
        the other). One group is the whole batch.
    """
    wide = _wide(reference.dtype)
    change = jnp.abs(reference.astype(wide) - now.astype(wide))

    return over(per_group(change, groups), per_group(jnp.abs(reference.astype(wide)), groups))


def per_group(a: jax.Array, groups: int) -> jax.Array:
    """The sum of a [B, ...] over the rows of each group, [groups]."""
    return a.reshape(a.shape[0], -1).sum(1).reshape(-1, groups).sum(0)


def over(change: jax.Array, size: jax.Array) -> jax.Array:
    """change / size, of sizes of 0 or more; `UNKNOWN` where the size is 0."""
    return jnp.where(size > 0, change / jnp.where(size > 0, size, 1), UNKNOWN)


def added(one: Report, other: Report) -> Report:
    """What two runs over different blocks did, together."""
    return jax.tree.map(jnp.add, one, other)


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def where_group(choose: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    """yes where a row's group [G] chooses so, [B, ...]; the rows of group g are g, g + G, ..."""
    if choose.shape[0] > 1:
        rows = jnp.tile(choose, yes.shape[0] // choose.shape[0])
        choose = rows.reshape(-1, *(1,) * (yes.ndim - 1))
    return jnp.where(choose, yes, no)


def _begun(state: Memory, begins: jax.Array) -> Memory:
    """The memory, of which nothing is left where a run begins anew."""
    drop = partial(jnp.where, begins)
    return state._replace(
        steps=drop(-1, state.steps),
        **{k: drop(0, getattr(state, k)) for k in ("accumulated", "total", "streak", "hits")},
    )


def _value(state: Memory, now: jax.Array, like: Tokens, fill: Fill) -> Tokens:
    """What the fill makes of the ring, in the types of `like`."""
    if fill.weights is None:
        return jax.tree.map(lambda r, a: r.astype(a.dtype), state.ring[0], like)
    weigh = fill.weights
    weights = jax.vmap(lambda steps: weigh(steps, now), in_axes=1, out_axes=1)(state.steps)  # [depth, G]

    def one(a: Any, *values: jax.Array) -> jax.Array:
        wide = _wide(a.dtype)
        total = jnp.zeros(a.shape, wide)
        for w, v in zip(weights, values, strict=True):
            rows = jnp.tile(w, v.shape[0] // w.shape[0]).reshape(-1, *(1,) * (v.ndim - 1))
            total += rows.astype(wide) * v.astype(wide)
        return total.astype(a.dtype)

    return jax.tree.map(one, like, *state.ring)


def _pushed(state: Memory, residual: Tokens, now: jax.Array, fill: Fill, dtype: str | None) -> Any:
    """The ring and its steps behind a computed evaluation."""
    new = stored(residual, dtype)
    ring = (new, *state.ring[: fill.depth - 1])
    if fill.recent:
        ring += (new, *state.ring[fill.depth : fill.depth + fill.recent - 1])
    return ring, jnp.concatenate([jnp.full((1, state.steps.shape[1]), now, jnp.int32), state.steps[:-1]])


def _recalled(state: Memory, value: Tokens, fill: Fill, dtype: str | None) -> Any:
    """The ring and its steps behind a filled evaluation."""
    if not fill.recent:
        return state.ring, state.steps
    full = state.steps[1] >= 0  # before the second computed value nothing is extrapolated, and nothing remembered
    recent = (stored(value, dtype), *state.ring[fill.depth : fill.depth + fill.recent - 1])
    old = state.ring[fill.depth :]
    recent = jax.tree.map(lambda n, o: where_group(full, n, o), recent, old)
    return (*state.ring[: fill.depth], *recent), state.steps
