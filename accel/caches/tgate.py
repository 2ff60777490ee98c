"""T-GATE. Liu et al., Faster Diffusion via Temporal Attention Decomposition, 2024, arXiv:2404.02747."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches.planned import Schedule, everywhere, planned
from difax.core.annotations import checked
from difax.core.contracts import Accelerator, Guide, Row, Stage, State


class Table(NamedTuple):
    """Leaves [E]: are the halves averaged now; the table of the guide that is wrapped."""

    now: Any
    inner: Any


@checked
def tgate(
    gate: int = 10,
    *,
    sp_interval: int = 5,
    fi_interval: int = 1,
    warmup: int = 2,
    cross: str = "cross",
    attn: str = "attn",
    dtype: str | None = None,
) -> Accelerator:
    """From the gate on holds cross-attention and ends guidance; before it, holds self-attention now and then.

    i < gate - 1: cross-attention is computed; self-attention iff i <= warmup or i mod sp_interval = 0, else held.
    i = gate - 1: both are computed, and what is held of them becomes the mean over the two halves of guidance.
    i >= gate: the conditional half alone, unguided; cross-attention is held, self-attention computed iff
    i mod fi_interval = 0.

    Args:
      gate: evaluations with guidance, 1 or more (10 of 25 for SDXL; 15 of 25 for PixArt).
      sp_interval, fi_interval: of self-attention in the two phases, 1 or more (5 and 1; PixArt: 3 and 1); the first
        version of the method has 1 and 1.
      warmup: up to this evaluation self-attention is always computed (2).
      cross, attn: names of the branches.
      dtype: of what is held; None is the model's.

    Returns:
      An `Accelerator` that remembers one output per layer of each of the two branches, before the gate of adaLN.

    References: Liu et al. 2024; the authors' code (commit ab2a88f), whose scheduler function gives the same phases;
      the rest is checked against plain Python. Behind the gate their PixArt pipeline runs the negative prompt, which
      by then reaches nothing but the cross-attention that is held. Without guidance there is nothing to average.
    """
    for name, value in (("gate", gate), ("sp_interval", sp_interval), ("fi_interval", fi_interval)):
        if value < 1:
            raise ValueError(f"tgate: {name}={value}; allowed: 1 or more")
    if warmup < 0 or cross == attn:
        raise ValueError(f"tgate: warmup={warmup}, cross={cross!r}, attn={attn!r}; allowed: 0 or more, two branches")

    def schedule(rows: Row, stages: tuple[Stage, ...]) -> Schedule:
        i = np.arange(len(rows.i))
        planning = (i <= warmup) | (i % sp_interval == 0) | (i == gate - 1)
        flags = {cross: i < gate, attn: np.where(i < gate, planning, i % fi_interval == 0)}
        try:
            found = [everywhere(f, stages, (branch,)) for branch, f in flags.items()]
        except ValueError as error:
            raise ValueError(f"tgate: {error}") from None
        return {s.name: {b: f for of in found for b, f in of[s.name].items()} for s in stages}

    def guide(inner: Guide) -> Guide:
        if inner.halves == 1:
            return inner

        def plan(rows: Row) -> Row:
            laid, before = inner.plan(rows), np.asarray(rows.i) < gate
            guided = laid.guided & before
            fresh = np.where(before, laid.fresh, rows.fresh)  # guidance that would begin later does not
            now = guided & (np.asarray(rows.i) == gate - 1)
            return laid._replace(guided=guided, fresh=fresh, guide=Table(now, laid.guide))

        def apply(denoise, x, cond, null, scale, row, state, memory):
            table: Table = row.guide
            row = row._replace(guide=table.inner)

            def guided(memory: State) -> Any:
                output, new, memory, trace = inner.apply(denoise, x, cond, null, scale, row, state, memory)
                return output, new, _averaged(memory, (cross, attn), table.now), trace

            def alone(memory: State) -> Any:
                output, memory, trace = denoise(x, cond, row, memory, "cond")
                return output, state, memory, trace

            return jax.lax.cond(row.guided, guided, alone, memory)

        return inner._replace(plan=plan, apply=apply)

    return planned("tgate", schedule, branches=(cross, attn), dtype=dtype)._replace(guide=guide)


def _averaged(memory: State, branches: tuple[str, ...], now: jax.Array) -> State:
    """The memory in which both halves hold the mean of what each of them held of these branches, if `now`."""

    def mean(a: jax.Array) -> jax.Array:  # [L, 2 B, ...]
        halves = a.reshape(a.shape[0], 2, -1, *a.shape[2:]).astype(jnp.promote_types(a.dtype, jnp.float32))
        return jnp.broadcast_to(halves.mean(1, keepdims=True), halves.shape).reshape(a.shape).astype(a.dtype)

    held = {s: {b: of[b] for b in branches if b in of} for s, of in memory["branch"].items()}
    held = jax.lax.cond(now, lambda h: jax.tree.map(mean, h), lambda h: h, held)
    return {**memory, "branch": {s: {**of, **held[s]} for s, of in memory["branch"].items()}}
