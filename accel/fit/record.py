"""Accelerators that compute everything and hand out what calibrations are made of."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from difax.core.contracts import Accelerator, Done, Guide, Row, State, TrunkSpec, Where, no_memory
from difax.core.trunk import Blocks


def record(kmax: int = 1, *, branches: bool = True, dense: bool = False) -> Accelerator:
    """Measures what calibrations are made of, in a run in which nothing is filled.

    The trace's metrics, all with the halves of guidance as their last axis, nan where there is nothing to compare:
      branch, per layer: "change" [L, kmax, halves], ||F_{i-k} - F_i||_1 / ||F_i||_1 for k = 1 ... kmax, F the output
        before the gate; "similarity", the mean over tokens of the cosine of F_{i-k} and F_i; "difference",
        mean|F_{i-k} - F_i|; "magnitude" (if `dense`) {layer's name: {"x", "y": mean |.| of each channel}}.
      trunk: "input", mean|m_{i-1} - m_i| / mean|m_{i-1}| of the modulated input of the first block; "ratio", the mean
        over tokens of ||R_i|| / ||R_{i-1}||, R what all blocks add to the hidden stream.
      output: mean|o_{i-1} - o_i| / mean|o_{i-1}| of what the network predicts.

    Args:
      kmax: distances that are compared, 1 or more; as many outputs per branch and layer are remembered.
      branches: measure in the branches at all.
      dense: also the magnitudes of dense layers' inputs and outputs.
    """
    if kmax < 1:
        raise ValueError(f"record: kmax={kmax}; allowed: 1 or more")

    def init(spec: TrunkSpec, modes: tuple[Any, ...]) -> State:
        memory = no_memory(spec, modes)
        memory["output"] = jnp.zeros(spec.output.shape, jnp.float32)
        memory["trunk"] = tuple(jnp.zeros(a.shape, jnp.float32) for a in (spec.first_input, spec.hidden))
        for stage, updates in spec.update.items():
            depth = spec.depth[stage]
            for branch, update in updates.items() if branches else ():
                held = jax.tree.map(lambda a, d=depth: jnp.zeros((d, *a.shape), a.dtype), update)
                memory["branch"][stage][branch] = (held,) * kmax
        return memory

    def output(run: Any, before: Any, memory: State, row: Row) -> Any:
        value, memory, report = run(memory)
        shown = known(change(before, value, row.plan.halves, of=before), row, 1)
        return value, value.astype(jnp.float32), memory, report._replace(metric={**report.metric, "output": shown}), 1.0

    def trunk(blocks: Blocks, tokens: Any, context: Any, state: Any, memory: State, row: Row) -> Any:
        halves, (first, added) = row.plan.halves, state
        seen, entered = blocks.first_input(tokens), blocks.hidden(tokens)
        tokens, memory, report = blocks.run(tokens, memory)
        residual = (blocks.hidden(tokens) - entered).astype(jnp.float32)
        norms = [jnp.linalg.norm(a, axis=-1) for a in (residual, added)]
        ratio = (norms[0] / jnp.maximum(norms[1], 1e-30)).reshape(halves, -1).mean(1)
        shown = {
            "input": known(change(first, seen, halves, of=first), row, 1),
            "ratio": known(ratio, row, 1),
        }
        report = report._replace(metric={**report.metric, "trunk": shown})
        return tokens, (seen.astype(jnp.float32), residual), memory, report

    def branch(compute: Any, gate: Any, where: Where, ring: Any, inner: State, row: Row) -> Any:
        halves, magnitude = row.plan.halves, {}

        def channels(a: jax.Array) -> jax.Array:
            return jnp.abs(a.astype(jnp.float32)).reshape(halves, -1, a.shape[-1]).mean(1).T  # [channels, halves]

        def measured(name: str, x: jax.Array, apply: Any) -> jax.Array:
            y = apply(x)
            magnitude[name] = {"x": channels(x), "y": channels(y)}
            return y

        update, inner = compute(inner, dense=measured) if dense else compute(inner)
        shown: dict[str, Any] = {
            "change": jnp.stack([known(change(r, update, halves, of=update), row, k + 1) for k, r in enumerate(ring)]),
            "difference": jnp.stack([known(difference(r, update, halves), row, k + 1) for k, r in enumerate(ring)]),
            "similarity": jnp.stack([known(cosine(r, update, halves), row, k + 1) for k, r in enumerate(ring)]),
        }
        if dense:
            shown["magnitude"] = magnitude
        return gate(update), (update, *ring[:-1]), inner, Done(1.0, shown)

    return Accelerator(
        name="record", init=init, output=output, trunk=trunk, branch=branch if branches else None
    )  # its plan is the neutral one


def record_inputs() -> Accelerator:
    """Hands out what the network is given at each evaluation, x [B, ..., 1], as the trace's metric of the output."""

    def guide(inner: Guide) -> Guide:
        def apply(denoise: Any, x: jax.Array, *arguments: Any) -> Any:
            output, state, memory, trace = inner.apply(denoise, x, *arguments)
            return output, state, memory, trace._replace(metric={**trace.metric, "output": x[..., None]})

        return inner._replace(apply=apply)

    return Accelerator(name="record_inputs", guide=guide)


def known(values: jax.Array, row: Row, distance: int) -> jax.Array:
    """nan where no evaluation lies so far back."""
    return jnp.where(row.i >= distance, values, jnp.nan).astype(jnp.float32)


def change(before: Any, now: Any, halves: int, of: Any) -> jax.Array:
    """||before - now||_1 / ||of||_1 of each half, over all leaves: [halves]."""

    def total(tree: Any) -> jax.Array:
        parts = [jnp.abs(a.astype(jnp.float32)).reshape(halves, -1).sum(1) for a in jax.tree.leaves(tree)]
        return jnp.sum(jnp.stack(parts), axis=0)

    moved = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), before, now)
    return total(moved) / total(of)


def difference(before: Any, now: Any, halves: int) -> jax.Array:
    """mean|before - now| of each half, over all leaves: [halves]."""
    moved = jax.tree.map(lambda a, b: jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)), before, now)
    leaves = jax.tree.leaves(moved)
    total = jnp.sum(jnp.stack([a.reshape(halves, -1).sum(1) for a in leaves]), axis=0)
    return total * halves / sum(a.size for a in leaves)


def cosine(before: Any, now: Any, halves: int) -> jax.Array:
    """Mean over samples and tokens of the cosine of each token then and now, over all leaves: [halves]."""
    found, tokens = jnp.zeros(halves), 0
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(now), strict=True):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
        each = (a * b).sum(-1) / jnp.maximum(norms, 1e-30)
        found += each.reshape(halves, -1).sum(1)
        tokens += each.size // halves
    return found / tokens
