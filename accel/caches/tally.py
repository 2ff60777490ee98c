"""What online gates of single blocks count, and hand on from block to block: evaluations that reused, and differences.

A cap counts evaluations in which any block was filled; the dynamic threshold follows the differences that the blocks of
the evaluation have shown so far. Both are cache-dit's, by version 1.5.3 (vipshop, 2025).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from difax.accel.caches.gate import Rule

AVERAGED = 5  # differences that the dynamic threshold is made of: the first so many of an evaluation


class Tally(NamedTuple):
    """What the blocks hand on, [G] each: this evaluation, the last one that reused, how many did so in a row and in
    all; and of this evaluation: differences that were measured, the sum and the number of those averaged."""

    now: Any
    reused: Any
    streak: Any
    hits: Any
    seen: Any
    total: Any
    averaged: Any


def empty(groups: int, dtype: Any) -> Tally:
    """Before the first block of a run of groups that decide each for itself; dtype: of the tokens."""

    def whole(value: int) -> jax.Array:
        return jnp.full((groups,), value, jnp.int32)

    total = jnp.zeros((groups,), jnp.promote_types(dtype, jnp.float32))
    return Tally(whole(-1), whole(-2), whole(0), whole(0), whole(0), total, whole(0))


def at_block(tally: Tally, now: jax.Array, anew: jax.Array) -> Tally:
    """At the first block of an evaluation its own counts start anew, and a row that the last one broke is over.

    Args:
      anew: begins a run with this evaluation, so that none of the counts goes on.
    """
    begins = tally.now != now
    return tally._replace(
        now=jnp.full_like(tally.now, now),
        hits=jnp.where(begins & anew, 0, tally.hits),
        streak=jnp.where(begins & (anew | (tally.reused != now - 1)), 0, tally.streak),
        seen=jnp.where(begins, 0, tally.seen),
        total=jnp.where(begins, 0.0, tally.total),
        averaged=jnp.where(begins, 0, tally.averaged),
    )


def caps_reached(tally: Tally, ask: Rule, now: jax.Array) -> jax.Array:
    """Do the rule's caps forbid to reuse: bool [G]."""
    streak = tally.streak - (tally.reused == now)
    return (ask.most >= 0) & (tally.hits >= ask.most) | (ask.streak >= 0) & (streak >= ask.streak)


def raised(tally: Tally, threshold: jax.Array, relax: jax.Array, top: jax.Array) -> jax.Array:
    """max(threshold, relax m) where relax m < top, else threshold; m the mean of the first differences so far: [G]."""
    relaxed = relax * tally.total / jnp.maximum(tally.averaged, 1)
    return jnp.where(relaxed < top, jnp.maximum(threshold, relaxed), threshold)


def after(tally: Tally, now: jax.Array, d: jax.Array, asked: Any, measured: Any, reused: Any) -> Tally:
    """Behind a block.

    Args:
      d: its difference. asked: was the gate; measured: did the difference decide; reused: was the block filled.
    """
    first_here = reused & (tally.reused != now)
    counts = measured & (d > 0) & (tally.seen < AVERAGED)
    return tally._replace(
        reused=jnp.where(reused, now, tally.reused),
        streak=tally.streak + first_here,
        hits=tally.hits + first_here,
        seen=tally.seen + asked,
        total=tally.total + jnp.where(counts, d, 0.0).astype(tally.total.dtype),
        averaged=tally.averaged + counts,
    )
