"""LazyDiT. Shen et al., LazyDiT: Lazy Learning for the Acceleration of Diffusion Transformers, 2024.

The weights of its gates are an .npz file with the arrays "stage.branch", [L, E, D] float32: of each layer, at each
evaluation counted from the noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches import measured
from difax.accel.caches.fill import check_dtype, stored
from difax.core.annotations import checked
from difax.core.contracts import Accelerator, Done, Plan, Row, Stage, State, TrunkSpec, Where, no_memory
from difax.core.hooks import modulated_input

Weights = Mapping[str, Mapping[str, Any]]


class Values(NamedTuple):
    """Leaves [E]: the score from which on a branch is computed."""

    threshold: Any


@checked
def lazydit(
    weights: Weights | None = None,
    *,
    file: str | None = None,
    threshold: float = 0.5,
    soft: bool = False,
    per_sample: bool = True,
    dtype: str | None = None,
) -> Accelerator:
    """A linear gate on each branch's modulated input says whether its last output, before the gate, is held.

    s = sigmoid(sum over tokens of <w, z>), z the modulated input, w of this layer, branch and evaluation;
    s >= threshold: computed, else held. Every sample of each half decides for itself, and a branch is left out where
    all agree: where one wants it, the whole batch is computed, and the others keep what they held.

    Args:
      weights: {stage: {branch: w [L, E, D]}}; a branch that is not named is always computed. They become learned
        parameters (`difax.core.stack.with_learned`). None, with no file: zeros for every branch, s = 1/2.
      file: in place of them.
      threshold: of s (0.5, at which zeros compute everything).
      soft: as in training: everything is computed, and s F + (1 - s) F' stands for F, which gradients reach. The
        penalty on computing is the sum of the scores that the trace hands out.
      per_sample: every sample of each half decides for itself, as in the authors' code, so that sample i is that of a
        batch of one, to rounding (True). False: the mean of the scores decides for all of them, so that an image
        depends on its companions, and a batch saves as much as one image.
      dtype: of what is held; None is the model's.

    Returns:
      An `Accelerator` that remembers one output per branch and layer.

    References: Shen et al. 2024, arXiv:2412.12444, equations 4 to 6, and their code (commit 0c49526), read, not run;
      checked against plain Python. There the samples of a batch that agree to compute are gathered; an array of a fixed
      size cannot be, so that a batch saves less here, the fewer of its samples agree. Their steps are counted from
      the data.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"lazydit: threshold={threshold}; allowed: 0 to 1")
    check_dtype("lazydit", dtype)
    given = measured.given_or_read("lazydit", "weights", weights, file)
    says = measured.record("lazydit", file)
    learned: dict[str, dict[str, Any]] | None = None
    if given is not None:
        learned = {s: {f"{b}.lazy": np.asarray(w, np.float32) for b, w in of.items()} for s, of in given.items()}

    def acts(stage: str, branch: str) -> bool:
        return learned is None or f"{branch}.lazy" in learned.get(stage, {})

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
        e = len(rows.i)
        depths = {f"{s.name}.{b}": s.depth for s in stages for b in s.branches}
        for place, w in _places(learned):
            if place not in depths:
                raise ValueError(f"lazydit: weights of {place}; allowed: {', '.join(depths)}")
            if w.ndim != 3 or w.shape[:2] != (depths[place], e):
                raise ValueError(
                    f"lazydit: the weights of {place} have the shape {w.shape}; expected [{depths[place]}, {e}, D]: "
                    f"the model's {depths[place]} layers, the run's {e} evaluations"
                )
        return Plan(np.zeros(e, np.int32), Values(np.full(e, float(threshold))), owner="lazydit")

    def init(spec: TrunkSpec, modes: tuple[Any, ...]) -> State:
        memory = no_memory(spec, modes)
        for stage, updates in spec.update.items():
            for branch, update in updates.items():
                if acts(stage, branch):
                    empty = lambda a, n=spec.depth[stage]: jnp.zeros((n, *a.shape), dtype or a.dtype)  # noqa: E731
                    memory["branch"][stage][branch] = jax.tree.map(empty, update)
        return memory

    def branch(compute: Any, gate: Any, where: Where, held: State, inner: State, row: Row) -> Any:
        name = where.branch or ""
        if not acts(where.stage, name):
            update, inner = compute(inner)
            return gate(update), held, inner, Done(1.0)
        if learned is None:
            rows = jax.tree.leaves(held)[0].shape[0]
            score = jnp.full((rows,), 0.5)
        elif not where.learned:
            raise ValueError("lazydit: the parameters hold no weights; see difax.core.stack.with_learned")
        else:
            z_BND = modulated_input(compute, inner).astype(jnp.float32)
            w_D = where.learned[f"{name}.lazy"][row.i]
            if w_D.shape != z_BND.shape[-1:]:
                raise ValueError(
                    f"lazydit: weights of {w_D.shape[0]} features; {where.stage}.{name} has {z_BND.shape[-1]}"
                )
            score = jax.nn.sigmoid((z_BND * w_D[None, None]).sum((1, 2)))
        if not per_sample:
            score = jnp.broadcast_to(score.mean(keepdims=True), score.shape)
        known = (row.i > 0) & ~row.fresh
        keep = jnp.zeros_like(score) if soft else (score < row.plan.values.threshold).astype(score.dtype)
        keep = jnp.where(known, 1 - score if soft else keep, 0.0)  # the share of the held output, of each row

        def computed(inner: State) -> Any:
            update, inner = compute(inner)
            return jax.tree.map(lambda new, old: _mixed(new, old, keep, soft), update, held), inner

        def filled(inner: State) -> Any:
            like = jax.eval_shape(lambda: compute(inner)[0])
            return jax.tree.map(lambda old, a: old.astype(a.dtype), held, like), inner

        lazy = jnp.zeros((), bool) if soft else jnp.all(keep == 1)
        update, inner = jax.lax.cond(lazy, filled, computed, inner)
        held = stored(update, dtype)  # a value that was held comes back as it was: narrow types round once
        halves = row.plan.halves
        shown = {"metric": score, "asked": jnp.full_like(score, known), "reused": (keep == 1) & (not soft)}
        shown = {k: a.astype(jnp.float32).reshape(halves, -1).T for k, a in shown.items()}  # [samples, halves]
        return gate(update), held, inner, Done(1.0 - lazy.astype(jnp.float32), shown)

    return Accelerator(
        name="lazydit", plan=plan, init=init, branch=branch, learned=learned, measured=says, batchwide=not per_sample
    )


def _mixed(new: jax.Array, old: jax.Array, keep: jax.Array, soft: bool) -> jax.Array:
    """The held value in the share that each row keeps of it."""
    share, old = keep.reshape(-1, *(1,) * (new.ndim - 1)), old.astype(new.dtype)
    if not soft:
        return jnp.where(share == 1, old, new)
    return ((1 - share) * new + share * old).astype(new.dtype)


def _places(learned: Mapping[str, Mapping[str, Any]] | None) -> list[tuple[str, np.ndarray]]:
    return [(f"{s}.{name.removesuffix('.lazy')}", w) for s, of in (learned or {}).items() for name, w in of.items()]
