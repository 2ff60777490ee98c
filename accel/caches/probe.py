"""A probe on one branch of one block: how much what it adds has changed since it was last computed, and its motion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches.gate import groups_of, over, per_group
from difax.core.contracts import Done, Row, Stage, State, Tokens, TrunkSpec, Where


class Probe(NamedTuple):
    """What the branch added when it was last computed; its relative change [G] (`UNKNOWN` where that was nothing), and
    its motion [G]."""

    reference: Tokens
    change: Any
    motion: Any


def unread(name: str, spec: TrunkSpec, stage: str, frames: int | None, per_sample: bool = False) -> Probe:
    """The probe of a block of this stage before the first evaluation; per_sample: of every sample for itself.

    Raises:
      ValueError: motion is measured between frames that the model does not have.
    """
    if frames is not None and (spec.output.ndim < 5 or spec.output.shape[1] % frames or spec.hidden.shape[1] % frames):
        raise ValueError(
            f"{name}: frames={frames}; allowed: a model of videos, the frames of its token grid; this one has outputs "
            f"{spec.output.shape[1:]} and {spec.hidden.shape[1]} tokens"
        )
    groups = groups_of(spec, per_sample)
    reference = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), spec.within[stage])
    return Probe(reference, jnp.zeros(groups), jnp.zeros(groups))


def place(name: str, stages: tuple[Stage, ...], block: int | None, branch: str | None) -> tuple[str, str, int]:
    """Stage, branch and layer of the one that is measured, which is the mode of a plan.

    Args:
      name: of the technique. block: counted over all stages; None is the middle one. branch: None is the first.

    Raises:
      ValueError: a block or branch that the model does not have.
    """
    places = [(stage, layer) for stage in stages for layer in range(stage.depth)]
    at = (len(places) - 1) // 2 if block is None else block
    check_blocks(name, "block", at, len(places))
    stage, layer = places[at]
    found = stage.branches[0] if branch is None else branch
    if found not in stage.branches:
        raise ValueError(f"{name}: branch={branch!r}; allowed: {', '.join(stage.branches)} in block {at}")
    return stage.name, found, layer


def check_blocks(name: str, key: str, blocks: int | Sequence[int], depth: int) -> None:
    """Refuses an index, or several, of blocks that a model of `depth` blocks over all stages does not have."""
    if not set(np.ravel(blocks)) <= set(range(depth)):
        raise ValueError(f"{name}: {key}={blocks}; allowed: 0 to {depth - 1}, the blocks of this model")


def probing(name: str, frames: int | None) -> Callable[..., Any]:
    """The level `branch` of an accelerator that computes all branches, and reads the probe `along[name]` at the place
    that is the plan's mode.

    Args:
      frames: of the token grid, between which motion is measured; None measures none.
    """

    def branch(compute: Any, gate: Any, where: Where, state: State, inner: State, row: Row) -> Any:
        update, inner = compute(inner)
        residual, (stage, measured, layer) = gate(update), row.plan.mode
        if (where.stage, where.branch) == (stage, measured):
            read = partial(_read, frames=frames)
            probe = inner["along"][name]
            probe = jax.lax.cond(where.layer == layer, read, lambda probe, _: probe, probe, residual)
            inner = {**inner, "along": {**inner["along"], name: probe}}
        return residual, state, inner, Done(1.0)

    return branch


def _read(probe: Probe, residual: Tokens, frames: int | None) -> Probe:
    """|r' - r|_1 / |r'|_1 of the residuals r' before and r now, and the same between the frames of r."""

    groups = probe.change.shape[0]

    def norm(tree: Tokens) -> Any:
        return sum(per_group(jnp.abs(a), groups) for a in jax.tree.leaves(tree))

    wide = partial(jax.tree.map, lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32)))
    old, new, motion = wide(probe.reference), wide(residual), probe.motion
    change = over(norm(jax.tree.map(jnp.subtract, old, new)), norm(old))
    if frames is not None:
        step = new.shape[1] // frames
        later, earlier = new[:, step:], new[:, :-step]
        moved = over(norm(later - earlier), norm(later) + norm(earlier))
        motion = jnp.maximum(moved, 0).astype(motion.dtype)  # nothing does not move
    return Probe(residual, change.astype(probe.change.dtype), motion)
