"""The running softmax that attention by blocks is made of, and its way over heads and blocks.

For the key blocks j = 1 ... n of a block of queries, with logits x_j = q k_j^T / sqrt(K),

  top    <- max(top', rowmax x_j)
  total  <- exp(top' - top) total + rowsum exp(x_j - top)
  o      <- exp(top' - top) o + exp(x_j - top) v_j,            at the end o / total, lse = top + log total.

Milakov & Gimelshein, Online normalizer calculation for softmax, 2018, arXiv:1805.02867.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from difax.core import ops
from difax.core.contracts import BlockList, BlockScales, Scales, Segments
from difax.core.ops import MASKED
from difax.core.target import target

LOWEST = float(jnp.finfo(jnp.float32).min)  # below every logit, and no infinity


class Running(NamedTuple):
    """The softmax of one block of queries over the keys seen so far, in float32."""

    top_T: jax.Array
    total_T: jax.Array
    o_TK: jax.Array  # not yet divided by the total


class Keys(NamedTuple):
    """One block of keys of one head; ids and existence are None where every pair attends."""

    k_SK: jax.Array
    v_SK: jax.Array
    ids_S: jax.Array | None
    exists_S: jax.Array | None  # False for padding


def dequantized(
    q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, scales: Scales | BlockScales | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k, v times their scales in float32, or as they are."""
    if scales is None:
        return q_BTHK, k_BSHK, v_BSHK
    f32, scales = jnp.float32, ops.per_element(scales, q_BTHK.shape[1], k_BSHK.shape[1])
    return q_BTHK.astype(f32) * scales.q, k_BSHK.astype(f32) * scales.k, v_BSHK.astype(f32) * scales.v


def over_heads(
    head: Callable[..., tuple[jax.Array, jax.Array]],
    at_once: int | None,
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    segments: Segments | None,
    blocks: BlockList | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs the attention of one head on all heads of all samples.

    Args:
      head: (q_TK scaled by 1/sqrt(K), k_SK, v_SK, ids of queries and keys or None, indices and counts of the block
        list or None) -> (o_TK, lse_T), both float32.
      at_once: heads at once; None is one on a CPU and all elsewhere.

    Returns:
      o [B, T, H, K] in the dtype of q and lse [B, H, T].
    """
    b, _, h, width = q_BTHK.shape
    rows = (*map(by_head, (q_BTHK * width**-0.5, k_BSHK, v_BSHK)), *options_by_head(b, h, segments, blocks))
    o_GTK, lse_GT = each_head(head, at_once, rows)
    return of_heads(o_GTK.astype(q_BTHK.dtype), b), lse_GT.reshape(b, h, -1)


def by_head(a_BTHK: jax.Array) -> jax.Array:
    """[B, T, H, K] -> [B H, T, K]."""
    return jnp.swapaxes(a_BTHK, 1, 2).reshape(-1, a_BTHK.shape[1], a_BTHK.shape[3])


def of_heads(a_GTK: jax.Array, samples: int) -> jax.Array:
    """[B H, T, K] -> [B, T, H, K]."""
    return jnp.swapaxes(a_GTK.reshape(samples, -1, *a_GTK.shape[1:]), 1, 2)


def options_by_head(b: int, h: int, segments: Segments | None, blocks: BlockList | None) -> tuple[Any, Any]:
    """Ids of queries and keys, indices and counts of the list, as they lead with [B H]; None where there is none."""
    per_head = lambda a: jnp.broadcast_to(a, (b, h, *a.shape[2:])).reshape(b * h, *a.shape[2:])  # noqa: E731
    ids = None if segments is None else jax.tree.map(lambda a: per_head(a[:, None]), segments)
    return ids, None if blocks is None else (per_head(blocks.indices), per_head(blocks.counts))


def each_head(head: Callable[..., Any], at_once: int | None, rows: Sequence[Any]) -> Any:
    """`head` on every row of trees that lead with [B H], so many at once; None is one on a CPU and all elsewhere."""
    count = rows[0].shape[0]
    together = (1 if target().platform == "cpu" else count) if at_once is None else at_once
    if together == 1 or count == 1:
        return each_block(lambda row: head(*row), tuple(rows), count)
    if together >= count:
        return jax.vmap(head)(*rows)
    return jax.lax.map(lambda row: head(*row), tuple(rows), batch_size=together)


def cut(a: jax.Array, size: int, count: int) -> jax.Array:
    """[T, ...] -> [count, size, ...], with zeros after the end."""
    return jnp.pad(a, [(0, count * size - a.shape[0])] + [(0, 0)] * (a.ndim - 1)).reshape(count, size, *a.shape[1:])


def keys_in_blocks(block_k: int, k_SK: jax.Array, v_SK: jax.Array, ids: Segments | None) -> Keys:
    """The keys of one head as blocks [S / block_k, block_k, ...], the last of which is filled up."""
    keys, n_k = k_SK.shape[0], -(-k_SK.shape[0] // block_k)
    exists = None if n_k * block_k == keys else (jnp.arange(n_k * block_k) < keys).reshape(n_k, block_k)
    ids_S = None if ids is None else cut(ids.k, block_k, n_k)
    return Keys(cut(k_SK, block_k, n_k), cut(v_SK, block_k, n_k), ids_S, exists)


def each_block(function: Callable[..., Any], blocks: Any, count: int) -> Any:
    """`function` on every block of a tree that leads with [count], in a loop unless there is only one."""
    if count > 1:
        return jax.lax.map(function, blocks)
    return jax.tree.map(lambda a: a[None], function(jax.tree.map(lambda a: a[0], blocks)))


def empty(queries: int, width: int, among: Any) -> Running:
    """The running softmax of a block of queries that has seen no key; `among` is all that the sum will come from."""
    full = lambda shape, value: like_all(among, jnp.full(shape, value, jnp.float32))  # noqa: E731
    return Running(full(queries, LOWEST), full(queries, 0), full((queries, width), 0))


def like_all(among: Any, start: jax.Array) -> jax.Array:
    """A constant that starts a loop, made different over all mesh axes over which one of the arrays is."""
    # inside of `jax.shard_map` a loop's carry must be so from its start
    like = sum((a.ravel()[0].astype(start.dtype) for a in jax.tree.leaves(among)), jnp.zeros((), start.dtype))
    return jnp.where(jnp.zeros_like(like, bool), like, start)


def add(q_TK: jax.Array, ids_T: jax.Array | None, running: Running, keys: Keys) -> Running:
    """The running softmax with one more block of keys."""
    x_TS = jnp.einsum("tk,sk->ts", q_TK, keys.k_SK, preferred_element_type=jnp.float32)
    if ids_T is not None and keys.ids_S is not None:
        x_TS = jnp.where(ids_T[:, None] == keys.ids_S[None], x_TS, MASKED)
    if keys.exists_S is not None:  # below MASKED, so that a query without any key still averages real values
        x_TS = jnp.where(keys.exists_S[None], x_TS, LOWEST)
    # the result does not depend on top, so neither do its gradients
    top_T = jax.lax.stop_gradient(jnp.maximum(running.top_T, x_TS.max(-1)))
    shrink_T = jnp.exp(jax.lax.stop_gradient(running.top_T) - top_T)
    p_TS = jnp.exp(x_TS - top_T[:, None])
    o_TK = jnp.einsum("ts,sk->tk", p_TS.astype(keys.v_SK.dtype), keys.v_SK, preferred_element_type=jnp.float32)
    return Running(top_T, shrink_T * running.total_T + p_TS.sum(-1), shrink_T[:, None] * running.o_TK + o_TK)


def finished(running: Running) -> tuple[jax.Array, jax.Array]:
    """o_TK and lse_T of all keys that were added."""
    return running.o_TK / running.total_T[:, None], running.top_T + jnp.log(running.total_T)
