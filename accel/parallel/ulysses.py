"""Ulysses: heads exchanged for tokens, so that every device attends over all tokens with some of the heads.

  [B, T/n, H, K] -> all to all -> [B, T, H/n, K] -> attention -> all to all -> [B, T/n, H, K]

Jacobs et al., DeepSpeed Ulysses, 2023, arXiv:2309.14509.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from difax.core.contracts import Attention, AttentionSpec, Row, Segments, State, Where

GROUPS = 2  # of heads that are exchanged one after the other, so that one travels while the other is attended with


def ulysses(attention: Attention, axis: str, size: int, groups: int = GROUPS) -> Attention:
    """An attention whose tokens are cut along an axis of the mesh; for use inside `jax.shard_map`.

    Args:
      attention: of the whole sequence and some heads.
      axis: of the mesh, of `size` devices, which divides the heads.
      groups: of heads, exchanged in turn, of which as many are used as divide the heads of a device (2). An attention
        that remembers has one.

    Returns:
      An `Attention` of [B, T/n, H, K].

    Reference: Jacobs et al. 2023, arXiv:2309.14509; the groups are ours.
    """

    def exchanged(a_BtHK: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(a_BtHK, axis, split_axis=2, concat_axis=1, tiled=True)

    def returned(a: jax.Array, tokens: int, heads: int) -> jax.Array:
        return jax.lax.all_to_all(a, axis, split_axis=tokens, concat_axis=heads, tiled=True)

    def run(call: Any, with_lse: bool) -> Any:
        def apply(q: Any, k: Any, v: Any, segments: Any, where: Where, row: Row | None, state: State) -> Any:
            if segments is not None:
                segments = Segments(*(jax.lax.all_gather(ids, axis, axis=1, tiled=True) for ids in segments))
            n = 1 if jax.tree.leaves(state) else max(g for g in range(1, groups + 1) if q.shape[2] % (size * g) == 0)
            done = []
            for part in zip(*(_grouped(a, size, n) for a in (q, k, v)), strict=True):
                out, state = call(*map(exchanged, part), segments, where, row, state)
                o, lse = out if with_lse else (out, None)
                done.append((returned(o, 1, 2), lse if lse is None else returned(lse, 2, 1)))
            o = _ungrouped([o for o, _ in done], size, 2)
            return ((o, _ungrouped([lse for _, lse in done], size, 1)) if with_lse else o), state

        return apply

    def init(spec: AttentionSpec) -> State:
        def whole(a: Any) -> Any:
            b, t, *heads = a.shape
            return jax.ShapeDtypeStruct((b, t * size, *(heads and (heads[0] // size, heads[1]))), a.dtype)

        return attention.init(jax.tree.map(whole, spec))

    lse = None if attention.lse is None else run(attention.lse, True)
    return Attention(init, run(attention.apply, False), lse, attention.ordered)


def _grouped(a_BtHK: jax.Array, size: int, groups: int) -> list[jax.Array]:
    """Groups of heads, each with as many for every device."""
    b, t, h, k = a_BtHK.shape
    parts = a_BtHK.reshape(b, t, size, groups, h // (size * groups), k)
    return [parts[:, :, :, g].reshape(b, t, h // groups, k) for g in range(groups)]


def _ungrouped(parts: list[jax.Array], size: int, axis: int) -> jax.Array:
    """The heads of `_grouped` in their own order again."""
    if len(parts) == 1:
        return parts[0]
    cut = [a.reshape(*a.shape[:axis], size, 1, a.shape[axis] // size, *a.shape[axis + 1 :]) for a in parts]
    both = jnp.concatenate(cut, axis=axis + 1)
    return both.reshape(*both.shape[:axis], -1, *both.shape[axis + 3 :])
