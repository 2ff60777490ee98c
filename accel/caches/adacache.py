"""AdaCache. Kahatapitiya et al., Adaptive Caching for Faster Video Generation with Diffusion Transformers, 2024."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches.fill import check_dtype, stored
from difax.accel.caches.gate import UNKNOWN, by_group, where_group
from difax.accel.caches.probe import Probe, place, probing, unread
from difax.core.annotations import OrInfinite, checked
from difax.core.contracts import Accelerator, Plan, Row, Stage, State, Tokens, TrunkSpec, no_memory
from difax.core.trunk import Blocks

# change below which the next so many evaluations make one interval; the last interval has no bound
CODEBOOKS = {
    "100": ((0.03, 12), (0.05, 10), (0.07, 8), (0.09, 6), (0.11, 4), (1.0, 3)),
    "30-fast": ((0.08, 6), (0.16, 5), (0.24, 4), (0.32, 3), (0.40, 2), (1.0, 1)),
    "30-slow": ((0.08, 3), (0.16, 2), (0.24, 1), (0.32, 1), (0.40, 1), (1.0, 1)),
}
WINDOWS = {100: (10, 90), 30: (4, 26)}  # evaluations, counted from 1, in which motion is measured
# m = (motion / USUAL)^SHARPNESS, and m + SLOPE |m - m'| / interval
USUAL, SHARPNESS, SLOPE = 0.385, 8, 10


class Values(NamedTuple):
    """Leaves [E, ...]: always computed; bounds and intervals of the codebook; is motion measured."""

    force: Any
    bounds: Any
    intervals: Any
    moving: Any


class Clock(NamedTuple):
    """residual: of all blocks; [G] each: the next evaluation to compute, the interval it ends, the last motion."""

    residual: Tokens
    next: Any
    interval: Any
    motion: Any


@checked
def adacache(
    codebook: str | Sequence[tuple[OrInfinite, int]] = "100",
    *,
    block: int | None = None,
    branch: str | None = None,
    moreg: bool = False,
    frames: int | None = None,
    window: tuple[int, int] | None = None,
    per_sample: bool = False,
    dtype: str | None = None,
) -> Accelerator:
    """Computes all blocks, or adds what they added last; how much one of them changes says for how long.

    At a computed evaluation d = |r' - r|_1 / |r'|_1 / interval, r what one branch of one block added (behind its gate),
    r' at the computed evaluation before; the codebook gives d the next interval. The first, the second, and the last
    two evaluations are always computed. With `moreg`, d is multiplied by m + 10 |m - m_before| / interval with
    m = (motion / 0.385)^8 of motion = |r[later frame] - r[frame]|_1 / (|r[later frames]|_1 + |r[earlier frames]|_1).

    Args:
      codebook: pairs (bound, interval), d < bound, in increasing order, the last without bound; or the name of one of
        the authors': "100" (steps), "30-fast", "30-slow".
      block: whose change is measured, counted over all stages (None: the middle one, 13 of 28).
      branch: which of its branches (None: the first, self-attention).
      moreg: motion regularisation, for videos (False).
      frames: of the token grid, which moreg needs (Wan: its latents' frames, 21 for 81 frames of 480p).
      window: first and last evaluation, counted from 1, whose motion counts (None: (10, 90) of 100, (4, 26) of 30, and
        the same share of another number).
      per_sample: every sample has its own clock, so that sample i is that of a batch of one, to rounding; without it
        one clock serves the batch, so that an image depends on its companions.
      dtype: of the residual of all blocks; None is the model's.

    Returns:
      An `Accelerator` that remembers one residual of the tokens and the measured branch's.

    References: Kahatapitiya et al. 2024, arXiv:2411.02397, and their code, which holds two residuals in each block; as
      all blocks share one clock, the sum of them is held here, which adds up the same in another order. There the
      measured branch is a temporal attention, and d may be the mean over several blocks (one by default). Change,
      motion and intervals equal those of its compute_next_step (commit 2c6d3ca); a whole run was compared with plain
      Python only.
    """
    bounds, intervals = _codebook(codebook)
    check_dtype("adacache", dtype)
    if moreg and frames is None:
        raise ValueError("adacache: moreg=True with frames=None; give the frames of the token grid, 2 or more")
    if frames is not None and frames < 2:
        raise ValueError(f"adacache: frames={frames}; allowed: 2 or more")
    if window is not None and not 1 <= window[0] <= window[1]:
        raise ValueError(f"adacache: window={tuple(window)}; allowed: the first evaluation, 1 or more, and the last")
    watched = frames if moreg else None

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
        e = len(rows.i)
        force = np.zeros(e, bool)
        force[[0, max(e - 2, 0), e - 1]] = True
        low, high = WINDOWS.get(e, (round(0.1 * e), round(0.9 * e))) if window is None else window
        if window is not None and not 1 <= low <= high <= e:
            raise ValueError(f"adacache: window={window}; allowed: 1 to {e}, evaluations of this run, in order")
        moving = (np.arange(1, e + 1) >= low) & (np.arange(1, e + 1) <= high)
        values = Values(force, np.tile(bounds[:-1], (e, 1)), np.tile(intervals, (e, 1)), moving)
        return Plan(np.zeros(e, np.int32), values, (place("adacache", stages, block, branch),), "adacache")

    def init(spec: TrunkSpec, modes: tuple[Any, ...]) -> State:
        memory, probe = no_memory(spec, modes), unread("adacache", spec, modes[0][0], watched, per_sample)
        groups = probe.change.shape
        kept = jax.tree.map(lambda a: jnp.zeros(a.shape, dtype or a.dtype), spec.tokens)
        memory["trunk"] = Clock(kept, jnp.zeros(groups, jnp.int32), jnp.ones(groups, jnp.int32), jnp.ones(groups))
        memory["along"]["adacache"] = probe
        return memory

    def trunk(blocks: Blocks, tokens: Tokens, context: Any, state: Clock, memory: State, row: Row) -> Any:
        values: Values = row.plan.values

        due = values.force | row.fresh | (row.i >= state.next)  # [G]

        def filled(memory: State) -> Any:
            out, memory, done = blocks.skip(held(tokens), memory)
            return out, memory, done, state, jnp.full(due.shape, UNKNOWN, jnp.float32)

        def held(tokens: Tokens) -> Tokens:
            return jax.tree.map(lambda t, r: t + r.astype(t.dtype), tokens, state.residual)

        def compute(memory: State) -> Any:
            before: Probe = memory["along"]["adacache"]
            out, memory, done = blocks.run(tokens, memory)
            probe: Probe = memory["along"]["adacache"]
            # the second of two computed evaluations is the first that has something to be compared with
            first = (row.i == 0) | row.fresh
            known = ~first & (probe.change >= 0)
            motion = jnp.where(values.moving, (probe.motion / USUAL) ** SHARPNESS, 1.0)
            pace = motion + SLOPE * jnp.abs(motion - state.motion) / state.interval if moreg else 1.0
            d = probe.change / state.interval * pace
            level = jnp.where(known, (d[:, None] >= values.bounds[None]).sum(1), len(intervals) - 1)
            interval = jnp.where(first, 1, values.intervals[level]).astype(jnp.int32)
            residual = stored(jax.tree.map(jnp.subtract, out, tokens), dtype)
            motion = jnp.where(first, 1.0, motion).astype(state.motion.dtype) if moreg else state.motion
            clock = Clock(residual, (row.i + interval).astype(jnp.int32), interval, motion)
            if due.shape[0] > 1:  # of the samples that are not due, nothing is new
                keep = partial(jax.tree.map, partial(where_group, due))
                out, clock, probe = keep(out, held(tokens)), keep(clock, state), keep(probe, before)
                memory = {**memory, "along": {**memory["along"], "adacache": probe}}
            return out, memory, done, clock, jnp.where(due & known, d, UNKNOWN).astype(jnp.float32)

        tokens, memory, report, state, d = jax.lax.cond(jnp.any(due), compute, filled, memory)
        shown = {"metric": d, "asked": d >= 0, "interval": state.interval, "reused": ~due}
        shown = {k: by_group(a, row.plan.halves, per_sample) for k, a in shown.items()}
        return tokens, state, memory, report._replace(metric={**report.metric, "trunk": shown})

    return Accelerator(
        name="adacache",
        plan=plan,
        init=init,
        trunk=trunk,
        branch=probing("adacache", watched),
        batchwide=not per_sample,
    )


def _codebook(codebook: str | Sequence[tuple[float, int]]) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(codebook, str) and codebook not in CODEBOOKS:
        raise ValueError(f"adacache: codebook={codebook!r}; allowed: pairs of numbers, or {', '.join(CODEBOOKS)}")
    pairs = CODEBOOKS[codebook] if isinstance(codebook, str) else codebook
    bounds, intervals = (np.asarray([pair[k] for pair in pairs]) for k in (0, 1))
    rises = len(pairs) > 0 and bounds[0] > 0 and bool(np.all(bounds[1:] > bounds[:-1]))
    if not rises or np.any((intervals < 1) | (intervals % 1 != 0)):
        raise ValueError(
            f"adacache: codebook={codebook}; allowed: increasing bounds, and intervals of 1 or more; bounds above 0"
        )
    return bounds.astype(np.float64), intervals.astype(np.int32)
