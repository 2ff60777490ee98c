"""HURRY and PHAST. Hunter et al., Fast Sampling Through The Reuse Of Attention Maps In Diffusion Models, 2023."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches.fill import check_dtype, stored
from difax.accel.caches.planned import Schedule, everywhere, planned
from difax.core.annotations import checked
from difax.core.contracts import Accelerator, Done, Row, Segments, Stage, State, TrunkSpec, Where, no_memory
from difax.core.ops import MASKED, attended_values, softmax


@checked
def attention_map(
    reuse: int | None = None,
    *,
    schedule: Sequence[int] | None = None,
    branches: tuple[str, ...] | None = None,
    dtype: str | None = None,
) -> Accelerator:
    """Remembers the softmax maps P of an evaluation and attends with them later, to fresh values: o = P v.

    What is saved is q k^T and the softmax; queries and keys are still projected, since they are one product with the
    values. `computed` of such a branch is the part of its products that still runs, 1 - (q k^T) / (all of them).

    Args:
      reuse: how many evaluations at the end reuse the maps of the one before them (10 of 20 in the paper); None is
        half of them. 0 is no cache. This is HURRY: the later a map is reused, the smaller the harm.
      schedule: in place of it, 1 (compute) or 0 (reuse) per evaluation, such as a search (PHAST) finds.
      branches: whose maps; None is every branch that attends.
      dtype: of the maps; None is that of the values.

    Returns:
      An `Accelerator` that remembers a map [B, H, T, S] per branch and layer: L B H T S values, which for long
      sequences is far more than any other cache keeps.

    References: Hunter et al. 2023, arXiv:2401.01008. Not checked against code: none is published; the strategies are
      taken from the abstract and its summaries, the search itself is not here. At evaluations whose maps are kept or
      used the branch attends by the reference rule, whatever the run's attention is: fused kernels have no map.
    """
    check_dtype("attention_map", dtype)
    if reuse is not None and (reuse < 0 or schedule is not None):
        raise ValueError(f"attention_map: reuse={reuse}, schedule={schedule}; allowed: 0 or more, or a schedule alone")
    if schedule is not None and not set(schedule) <= {0, 1}:
        raise ValueError(f"attention_map: schedule={tuple(schedule)}; allowed: 1 (compute) and 0 (reuse)")

    def flags(rows: Row, stages: tuple[Stage, ...]) -> Schedule:
        i = np.asarray(rows.i)
        if schedule is None:
            return everywhere(i < len(i) - (len(i) // 2 if reuse is None else reuse), stages, branches)
        if len(schedule) != len(i):
            raise ValueError(f"attention_map: {len(schedule)} entries in the schedule; the run has {len(i)}")
        return everywhere(np.asarray(schedule, bool), stages, branches)

    def init(spec: TrunkSpec, modes: tuple[Any, ...]) -> State:
        memory = no_memory(spec, modes)
        for stage, branch in {site for mode in modes for site, what in mode if what != "fill"}:
            call = spec.attention[stage][branch]
            if call is not None:
                b, t, h, _ = call.q.shape
                shape = (spec.depth[stage], b, h, t, call.k.shape[1])
                memory["branch"][stage][branch] = (jnp.zeros(shape, call.v.dtype if dtype is None else dtype),)
            elif branches is not None:
                attend = [b for b, c in spec.attention[stage].items() if c is not None]
                raise ValueError(f"attention_map: {branch} of {stage} does not attend; allowed: {', '.join(attend)}")
        return memory

    def branch(compute: Any, gate: Any, where: Where, maps: State, inner: State, row: Row) -> Any:
        doing = dict(row.plan.mode).get((where.stage, where.branch))
        if doing is None or maps == ():
            update, inner = compute(inner)
            return gate(update), maps, inner, Done(1.0)
        kept, work, saved = list(maps), [], []

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, segments: Segments | None, apply: Any) -> jax.Array:
            if doing != "fill":
                kept[:] = [stored(_map(q, k, segments), maps[0].dtype.name)]
            product = 2 * math.prod(q.shape) * k.shape[1]
            work.append(2 * product)
            saved.append(product)
            p_BHTS, v = kept[0].astype(v.dtype), attended_values(v, segments)
            return jnp.einsum("bhts,bshk->bthk", p_BHTS, v, preferred_element_type=jnp.float32).astype(q.dtype)

        def dense(name: str, x: jax.Array, apply: Any) -> jax.Array:
            y = apply(x)
            work.append(2 * math.prod(y.shape) * x.shape[-1])
            return y

        update, inner = compute(inner, attend=attend, dense=dense)
        if doing == "fill":
            return gate(update), maps, inner, Done(1 - sum(saved) / sum(work))
        return gate(update), tuple(kept), inner, Done(1.0)

    plan = planned("attention_map", flags, branches=branches).plan
    return Accelerator(name="attention_map", branches=branches, plan=plan, init=init, branch=branch)


def _map(q_BTHK: jax.Array, k_BSHK: jax.Array, segments: Segments | None) -> jax.Array:
    """softmax(q k^T / sqrt(K)) [B, H, T, S] in float32, as `difax.core.ops.attend` defines it."""
    q = q_BTHK * q_BTHK.shape[-1] ** -0.5
    logits = jnp.einsum("bthk,bshk->bhts", q, k_BSHK, preferred_element_type=jnp.float32)
    if segments is not None:
        logits = jnp.where(segments.q[:, None, :, None] == segments.k[:, None, None, :], logits, MASKED)
    return softmax(logits)
