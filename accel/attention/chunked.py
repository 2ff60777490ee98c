"""Attention by blocks with a running softmax, in plain lax: no [T, S] logits, on every platform.

For the key blocks j = 1 ... n of a block of queries, with logits x_j = q k_j^T / sqrt(K),

  top    <- max(top', rowmax x_j)
  total  <- exp(top' - top) total + rowsum exp(x_j - top)
  o      <- exp(top' - top) o + exp(x_j - top) v_j,            at the end o / total, lse = top + log total.

Milakov & Gimelshein, Online normalizer calculation for softmax, 2018, arXiv:1805.02867; Rabe & Staats, Self-attention
does not need O(n^2) memory, 2021, arXiv:2112.05682; Dao et al., FlashAttention, 2022, arXiv:2205.14135.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from difax.core import ops
from difax.core.annotations import checked
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


@checked
def chunked(block_q: int = 512, block_k: int = 1024, heads: int | None = None) -> Callable[..., Any]:
    """Exact attention one block of queries and keys at a time, which never holds more than block_q x block_k logits.

    Lengths that the blocks do not divide are cut into equal smaller blocks. Gradients recompute the logits of a
    block, so that their memory grows with T + S too. A query without any key gets the mean of the values it was
    compared with: all, or those of its listed blocks.

    Args:
      block_q, block_k: the most queries and keys at once, 1 or more (512 and 1024: of the sizes from 256 x 256 to
        1024 x 1024 the fewest seconds at 4096 tokens on a CPU; experiments/results/attention).
      heads: heads (of all samples) at once, 1 or more; None is 1 on a CPU, where larger products gain nothing, and
        all of them elsewhere.

    Returns:
      The function. It takes segments, scales, the log-sum-exp, and lists of distinct blocks of its own block sizes,
      of which it computes the listed ones alone; it declines lists of other sizes.

    Raises:
      ValueError: a size below 1.

    References: Milakov & Gimelshein 2018, arXiv:1805.02867; Rabe & Staats 2021, arXiv:2112.05682; Dao et al. 2022,
    arXiv:2205.14135. FlashAttention's order of loops, queries outside, is that of its second version
    (arXiv:2307.08691).
    """
    for name, value in (("block_q", block_q), ("block_k", block_k), ("heads", heads)):
        if value is not None and value < 1:
            raise ValueError(f"chunked: {name}={value}; allowed: 1 or more")

    def attend(
        q_BTHK: jax.Array,
        k_BSHK: jax.Array,
        v_BSHK: jax.Array,
        segments: Segments | None = None,
        blocks: BlockList | None = None,
        scales: Scales | BlockScales | None = None,
        with_lse: bool = False,
    ) -> Any:
        queries, keys = q_BTHK.shape[1], k_BSHK.shape[1]
        if blocks is None and queries <= block_q and keys <= block_k:
            return ops.attend(q_BTHK, k_BSHK, v_BSHK, segments, scales=scales, with_lse=with_lse)
        if blocks is None:
            sizes = _equal(queries, block_q), _equal(keys, block_k)
        elif (blocks.block_q, blocks.block_k) == (block_q, block_k):
            sizes = block_q, block_k
        else:
            raise NotImplementedError(
                f"a list of blocks of {blocks.block_q} x {blocks.block_k}, made for {block_q} x {block_k}"
            )
        q_BTHK, k_BSHK, v_BSHK = dequantized(q_BTHK, k_BSHK, v_BSHK, scales)
        head = partial(_head, *sizes)
        o_BTHK, lse_BHT = over_heads(head, heads, q_BTHK, k_BSHK, v_BSHK, segments, blocks)
        return (o_BTHK, lse_BHT) if with_lse else o_BTHK

    return attend


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
    b, t, h, width = q_BTHK.shape
    v_BSHK = ops.attended_values(v_BSHK, segments)
    fold = lambda a_BTHK: jnp.swapaxes(a_BTHK, 1, 2).reshape(b * h, a_BTHK.shape[1], -1)  # noqa: E731
    per_head = lambda a: jnp.broadcast_to(a, (b, h, *a.shape[2:])).reshape(b * h, *a.shape[2:])  # noqa: E731
    ids = None if segments is None else jax.tree.map(lambda a: per_head(a[:, None]), segments)
    listed = None if blocks is None else (per_head(blocks.indices), per_head(blocks.counts))
    if at_once is None:
        at_once = 1 if target().platform == "cpu" else b * h
    rows = (fold(q_BTHK * width**-0.5), fold(k_BSHK), fold(v_BSHK), ids, listed)
    if at_once >= b * h:
        o_GTK, lse_GT = jax.vmap(head)(*rows)
    else:
        o_GTK, lse_GT = jax.lax.map(lambda row: head(*row), rows, batch_size=at_once if at_once > 1 else None)
    o_BHTK = o_GTK.astype(q_BTHK.dtype).reshape(b, h, t, v_BSHK.shape[-1])
    return jnp.swapaxes(o_BHTK, 1, 2), lse_GT.reshape(b, h, t)


def cut(a: jax.Array, size: int, count: int) -> jax.Array:
    """[T, ...] -> [count, size, ...], with zeros after the end."""
    return jnp.pad(a, [(0, count * size - a.shape[0])] + [(0, 0)] * (a.ndim - 1)).reshape(count, size, *a.shape[1:])


def each_block(function: Callable[..., Any], blocks: Any, count: int) -> Any:
    """`function` on every block of a tree that leads with [count], in a loop unless there is only one."""
    if count > 1:
        return jax.lax.map(function, blocks)
    return jax.tree.map(lambda a: a[None], function(jax.tree.map(lambda a: a[0], blocks)))


def _equal(length: int, most: int) -> int:
    """The size of the fewest equal blocks of at most `most` that cover a length."""
    return -(-length // -(-length // most))


def _head(
    block_q: int, block_k: int, q_TK: jax.Array, k_SK: jax.Array, v_SK: jax.Array, ids: Any, listed: Any
) -> tuple[jax.Array, jax.Array]:
    queries, keys = q_TK.shape[0], k_SK.shape[0]
    n_q, n_k = -(-queries // block_q), -(-keys // block_k)
    every = Keys(
        cut(k_SK, block_k, n_k),
        cut(v_SK, block_k, n_k),
        None if ids is None else cut(ids.k, block_k, n_k),
        None if n_k * block_k == keys else (jnp.arange(n_k * block_k) < keys).reshape(n_k, block_k),
    )
    if listed is not None and listed[1].shape != (n_q,):
        raise ValueError(f"a block list of {listed[1].shape[0]} rows for {n_q} blocks of queries; allowed: equal")

    @partial(jax.checkpoint, prevent_cse=False)
    def one(block: Any) -> tuple[jax.Array, jax.Array]:
        q_TK, ids_T, row = block
        add = jax.checkpoint(partial(_add, q_TK, ids_T), prevent_cse=False)
        empty = _empty(block_q, q_TK, every)
        if row is None and n_k == 1:
            done = add(empty, jax.tree.map(lambda a: a[0], every))
        elif row is None:
            done, _ = jax.lax.scan(lambda running, keys: (add(running, keys), None), empty, every)
        else:
            indices, count = row

            def step(running: Running, j: jax.Array) -> tuple[Running, None]:
                take = lambda running: add(running, jax.tree.map(lambda a: a[indices[j]], every))  # noqa: E731
                return jax.lax.cond(j < count, take, lambda running: running, running), None

            done, _ = jax.lax.scan(step, empty, jnp.arange(indices.shape[0]))
        return done.o_TK / done.total_T[:, None], done.top_T + jnp.log(done.total_T)

    ids_q = None if ids is None else cut(ids.q, block_q, n_q)
    o_nTK, lse_nT = each_block(one, (cut(q_TK, block_q, n_q), ids_q, listed), n_q)
    return o_nTK.reshape(n_q * block_q, -1)[:queries], lse_nT.reshape(-1)[:queries]


def _empty(queries: int, q_TK: jax.Array, keys: Keys) -> Running:
    # like the sum, so that inside of `jax.shard_map` it counts as different wherever one of them is
    like = (q_TK[0, 0] + keys.k_SK.ravel()[0] + keys.v_SK.ravel()[0]).astype(jnp.float32)
    full = lambda shape, value: jnp.full_like(jnp.broadcast_to(like, shape), value)  # noqa: E731
    return Running(full(queries, LOWEST), full(queries, 0), full((queries, keys.v_SK.shape[-1]), 0))


def _add(q_TK: jax.Array, ids_T: jax.Array | None, running: Running, keys: Keys) -> Running:
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
