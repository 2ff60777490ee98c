"""Where = the tokens that move: those whose embedding changed most since the evaluation before run among themselves."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from difax.accel.caches.token_axis import gather, top
from difax.core.contracts import Accelerator, Done, Row, State, Tokens, TrunkSpec, Where, no_memory
from difax.core.cost import count
from difax.core.fold import Compute
from difax.core.trunk import Blocks


def moving(name: str, share: float) -> Accelerator:
    """The levels of an accelerator that runs branches among the tokens that move, without its plan.

    A token moves by the sum over D of (x - x')^2, x its embedding and x' that of the evaluation before. In the mode
    "whole" of the plan all tokens run, in the mode "ask" the share of them that moves most, which lie in
    `along[name]`, int32 [B, M], while the blocks run; the update of all others is 0.

    Args:
      name: of the technique. share: of the tokens, in (0, 1]; 1 is nothing at all.

    Returns:
      An `Accelerator` that remembers the embedded tokens, B N D values.
    """

    def init(spec: TrunkSpec, modes: tuple[Any, ...]) -> State:
        memory = no_memory(spec, modes)
        if share < 1:
            if isinstance(spec.tokens, dict):
                raise ValueError(f"{name}: motion={share}; allowed: 1, as the tokens are {', '.join(spec.tokens)}")
            memory["trunk"] = jnp.zeros(spec.hidden.shape, spec.hidden.dtype)
            index = jnp.zeros((spec.hidden.shape[0], math.ceil(share * spec.hidden.shape[1])), jnp.int32)
            memory["along"][name] = index
        return memory

    def trunk(blocks: Blocks, tokens: Tokens, context: Any, before: Any, memory: State, row: Row) -> Any:
        if row.plan.mode == "ask":
            index = memory["along"][name]
            change = (tokens.astype(jnp.float32) - before.astype(jnp.float32)) ** 2
            moved = top(change.sum(-1), index.shape[1]).astype(index.dtype)
            memory = {**memory, "along": {**memory["along"], name: moved}}
        out, memory, report = blocks.run(tokens, memory)
        return out, tokens, memory, report

    def branch(compute: Compute, gate: Any, where: Where, state: State, inner: State, row: Row) -> Any:
        if row.plan.mode == "whole":
            update, inner = compute(inner)
            return gate(update), state, inner, Done(1.0)
        update, inner, computed = among(compute, inner, inner["along"][name])
        return gate(update), state, inner, Done(computed)

    if share == 1:
        return Accelerator(name=name, init=init)
    return Accelerator(name=name, init=init, trunk=trunk, branch=branch)


def among(compute: Compute, inner: State, index: jax.Array) -> tuple[jax.Array, State, float]:
    """A branch among the tokens at index [B, M] alone: (update [B, N, D], 0 elsewhere; inner; the share computed)."""
    tokens, n = compute.tokens, compute.tokens.shape[1]
    rows = jnp.arange(index.shape[0])[:, None]

    def place(a: jax.Array) -> jax.Array:
        return jnp.zeros((a.shape[0], n, *a.shape[2:]), a.dtype).at[rows, index].set(a)

    def take(a: jax.Array) -> jax.Array:
        return a[rows, index]

    def attend(q: Any, k: Any, v: Any, segments: Any, apply: Any) -> Any:
        if segments is not None:
            segments = type(segments)(*(jax.tree.map(lambda s: s[rows, index], part) for part in segments))
        return place(apply(take(q), take(k), take(v), segments))

    def dense(name: str, x: Any, apply: Any) -> Any:
        return place(apply(take(x))) if x.ndim == 3 and x.shape[1] == n else apply(x)

    def gathered(inner: State, tokens: Any) -> Any:
        update, inner = compute(inner, tokens=gather(tokens, index))
        return place(update), inner

    def hooked(inner: State, tokens: Any) -> Any:
        return compute(inner, attend=attend, dense=dense, tokens=tokens)

    try:
        jax.eval_shape(gathered, inner, tokens)
        run = gathered
    except (TypeError, ValueError):  # a rotation by place fits all tokens only: take them behind it
        run = hooked
    update, after = run(inner, tokens)
    return update, after, count(run, inner, tokens) / count(lambda i, t: compute(i, tokens=t), inner, tokens)
