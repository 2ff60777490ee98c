"""ICC. Chen et al., Accelerating Diffusion Transformer via Increment-Calibrated Caching with Channel-Aware Singular
Value Decomposition, 2025, arXiv:2505.05829."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches import measured
from difax.accel.caches.fill import check_dtype, stored
from difax.accel.caches.planned import every
from difax.core import ops
from difax.core.annotations import checked
from difax.core.contracts import Accelerator, Done, Plan, Row, Stage, State, TrunkSpec, Where, no_memory
from difax.core.cost import count
from difax.core.fold import Compute
from difax.core.stack import indexed


@checked
def icc(
    period: int = 2,
    factors: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    file: str | None = None,
    dtype: str | None = None,
) -> Accelerator:
    """Between full evaluations corrects what each dense layer gave by a low-rank product of its input's change.

    A full evaluation, every `period`-th, remembers input x' and output y' of every dense layer in a branch; any other
    computes y = y' + ((x - x') Wa) Wb, and everything else as always: norms, activations, attention. x' and y' stay
    those of the full evaluation.

    Args:
      period: evaluations from one full one to the next, 1 or more (2; 1 is no cache).
      factors: Wa and Wb of every dense layer, as `difax.accel.fit.icc` makes them of the model's own weights. They
        become learned parameters (`difax.core.stack.with_learned`).
      file: in place of them, an .npz that `save_factors` wrote.
      dtype: of what is remembered; None is the model's.

    Returns:
      An `Accelerator` that remembers input and output of every dense layer: in a DiT 16 values for each of L B N D.

    References: Chen et al. 2025 (rank 128 in a DiT-XL/2); the authors' DiT code, read. Queries, keys and values have
      factors of their own, as there; FLUX's fused first product of a single block is one.
    """
    if period < 1:
        raise ValueError(f"icc: period={period}; allowed: 1 or more")
    if period > 1 and factors is None and file is None:
        raise ValueError(f"icc: period={period} without factors or file; allowed: 1, or one of them (icc_factors)")
    check_dtype("icc", dtype)
    given = measured.given_or_read("icc", "factors", factors, file, " that save_factors wrote")
    says = measured.record("icc", file)
    learned = None if given is None else {s: dict(of) for s, of in given.items()}

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
        full = every(period, rows) | np.asarray(rows.fresh, bool)
        full[0] = True
        used = np.append(~full[1:], False)  # an evaluation that is followed by a full one need not be remembered
        what = ["increment" if not f else "store" if u else "full" for f, u in zip(full, used, strict=True)]
        return Plan(**indexed(what), owner="icc")

    def init(spec: TrunkSpec, modes: tuple[Any, ...]) -> State:
        memory = no_memory(spec, modes)
        if learned is None or tuple(modes) == ("full",):
            return memory
        for stage, branches in spec.dense.items():
            depth = spec.depth[stage]
            for branch, layers in branches.items():
                for name, (x, y) in layers.items():
                    _check_fit(learned, stage, name, depth, x.shape[-1], y.shape[-1])
                empty = lambda a, n=depth: jnp.zeros((n, *a.shape), dtype or a.dtype)  # noqa: E731
                memory["branch"][stage][branch] = {n: jax.tree.map(empty, pair) for n, pair in layers.items()}
        return memory

    def branch(compute: Compute, gate: Any, where: Where, held: State, inner: State, row: Row) -> Any:
        seen: dict[str, Any] = {}

        def remembered(name: str, x: jax.Array, apply: Any) -> jax.Array:
            y = apply(x)
            seen[name] = stored((x, y), dtype)
            return y

        def increment(name: str, x: jax.Array, apply: Any) -> jax.Array:
            before, y = (a.astype(x.dtype) for a in held[name])
            a_KPR, b_PRN = (where.learned[f"icc.{name}.{f}"].astype(x.dtype) for f in ("a", "b"))
            z = (x - before) @ a_KPR.reshape(a_KPR.shape[0], -1)
            z = jnp.einsum("...pr,prn->...pn", z.reshape(*z.shape[:-1], *a_KPR.shape[1:]), b_PRN)
            return y + z.reshape(y.shape)

        if row.plan.mode == "full":
            update, inner = compute(inner)
            return gate(update), held, inner, Done(1.0)
        if not where.learned:
            raise ValueError("icc: the parameters hold no factors; see difax.core.stack.with_learned")
        if row.plan.mode == "store":
            update, inner = compute(inner, dense=remembered)
            return gate(update), seen, inner, Done(1.0)
        left = _products(compute, inner, increment) / _products(compute, inner, None)
        update, inner = compute(inner, dense=increment)
        return gate(update), held, inner, Done(left)

    return Accelerator(name="icc", plan=plan, init=init, branch=branch, learned=learned, measured=says)


def _check_fit(factors: Mapping[str, Mapping[str, Any]], stage: str, name: str, depth: int, k: int, n: int) -> None:
    a, b = (factors.get(stage, {}).get(f"icc.{name}.{f}") for f in ("a", "b"))
    if a is None or b is None:
        raise ValueError(f"icc: no factors for the dense layer {name} of the stage {stage}; allowed: one of each layer")
    if a.shape[:2] != (depth, k) or (b.shape[0], b.shape[1] * b.shape[3]) != (depth, n):
        raise ValueError(
            f"icc: factors {a.shape} and {b.shape} for the layer {name} of {stage}; allowed: "
            f"[{depth}, {k}, products, rank] and [{depth}, products, rank, {n}/products]"
        )


def _products(compute: Compute, inner: State, dense: Any) -> float:
    """Operations of the products of a branch."""

    def attend(q: Any, k: Any, v: Any, segments: Any, apply: Any) -> Any:
        return ops.attend(q, k, v, segments)

    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), compute.tokens)
    return count(lambda tokens: compute(inner, attend=attend, dense=dense, tokens=tokens)[0], shapes)
