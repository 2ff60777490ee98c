"""Ring attention: keys and values go from device to device, and each merges what it attended to.

Of two disjoint sets of keys with results o_1, o_2 and log-sum-exps l_1, l_2,

  l = log(exp l_1 + exp l_2),    o = exp(l_1 - l) o_1 + exp(l_2 - l) o_2.

Liu, Zaharia & Abbeel, Ring Attention with Blockwise Transformers, 2023, arXiv:2310.01889.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from difax.core.contracts import Attention, Row, Segments, State, Where


def ring(attention: Attention, axis: str, size: int) -> Attention:
    """An attention whose tokens are cut along an axis of the mesh; for use inside `jax.shard_map`.

    Keys and values are passed on while they are attended to, so that the two overlap; n - 1 of n times.

    Args:
      attention: of the queries and keys of one device; it has a log-sum-exp, and remembers nothing.
      axis: of the mesh, of `size` devices.

    Returns:
      An `Attention` of [B, T/n, H, K].

    Raises:
      ValueError: at trace time, an attention that remembers.

    Reference: Liu et al. 2023, arXiv:2310.01889.
    """
    if attention.lse is None:
        raise ValueError("ring: an attention without a log-sum-exp; allowed: one that has it")
    attend = attention.lse
    following = [(i, (i + 1) % size) for i in range(size)]

    def lse(q: Any, k: Any, v: Any, segments: Any, where: Where, row: Row | None, state: State) -> Any:
        if jax.tree.leaves(state):
            raise ValueError("ring: an attention that remembers; allowed: one that does not")
        k_ids = None if segments is None else segments.k

        def part(keys: Any) -> tuple[jax.Array, jax.Array]:
            k, v, ids = keys
            return attend(q, k, v, segments and Segments(segments.q, ids), where, row, state)[0]

        def step(carry: Any, _: None) -> Any:
            keys, o, l_BHT = carry
            following_keys = jax.tree.map(lambda a: jax.lax.ppermute(a, axis, following), keys)
            return (following_keys, *merged(o, l_BHT, *part(keys))), None

        first = (k, v, k_ids)
        keys = jax.tree.map(lambda a: jax.lax.ppermute(a, axis, following), first)
        o, l_BHT = part(first)
        carry = keys, o.astype(jnp.float32), l_BHT
        if size > 2:
            carry, _ = jax.lax.scan(step, carry, None, length=size - 2)
        keys, o, l_BHT = carry
        o, l_BHT = merged(o, l_BHT, *part(keys))
        return (o.astype(q.dtype), l_BHT), state

    def apply(*arguments: Any) -> Any:
        (o, _), state = lse(*arguments)
        return o, state

    return Attention(attention.init, apply, lse, attention.ordered)


def merged(o_BTHK: jax.Array, l_BHT: jax.Array, more_BTHK: jax.Array, m_BHT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The attention to two disjoint sets of keys together, from that to each, in float32."""
    both_BHT = jnp.logaddexp(l_BHT, m_BHT)
    weight = lambda part: jnp.exp(part - both_BHT).swapaxes(1, 2)[..., None]  # noqa: E731
    return weight(l_BHT) * o_BTHK + weight(m_BHT) * more_BTHK.astype(jnp.float32), both_BHT
