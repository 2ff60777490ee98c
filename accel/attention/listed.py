"""Attention to listed blocks of keys in plain lax: on a CPU it takes the time of what is listed.

The blocks of a list come in any size. Those of one row are taken in groups that make one product of about `TOGETHER`
keys, then in smaller ones, by loops that end with the row's count. Gradients recompute the logits of the listed blocks
from the log-sum-exp: with p = exp(x - lse), D = rowsum(do o) - dlse, ds = p (do v^T - D),

  dq = ds k / sqrt(K),   dk = ds^T q / sqrt(K),   dv = p^T do,

so that they hold no [T, S] logits either, and serve every lowering (`differentiable`).

Dao et al., FlashAttention, 2022, arXiv:2205.14135 (appendix B.2).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from difax.accel.attention.running import (
    Keys,
    add,
    by_head,
    cut,
    each_block,
    each_head,
    empty,
    finished,
    keys_in_blocks,
    like_all,
    of_heads,
    options_by_head,
    over_heads,
)
from difax.core.contracts import BlockList, Segments
from difax.core.ops import MASKED, attended_values

TOGETHER = 1024  # keys of one product, at most


def by_list(heads: int | None = None) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Exact attention to the listed blocks alone, with its gradient.

    A query without any key (which only segments can bring about) gets the mean of the values of its listed blocks.

    Args:
      heads: heads (of all samples) at once; None is 1 on a CPU and all of them elsewhere.

    Returns:
      The function (q_BTHK, k_BSHK, v_BSHK, segments, blocks) -> (o in the dtype of q, lse [B, H, T] float32).
    """

    def forward(
        q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, segments: Segments | None, blocks: BlockList
    ) -> tuple[jax.Array, jax.Array]:
        head = partial(_head, blocks.block_q, blocks.block_k)
        return over_heads(head, heads, q_BTHK, k_BSHK, v_BSHK, segments, blocks)

    return differentiable(forward, heads)


def differentiable(
    forward: Callable[..., tuple[jax.Array, jax.Array]], heads: int | None = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A lowering of attention to listed blocks, with the reference backward of this file.

    Args:
      forward: (q_BTHK, k_BSHK, v_BSHK, segments, blocks) -> (o, lse). It is asked for floating q, k and v.
      heads: at once in the backward; None is 1 on a CPU and all of them elsewhere.

    Returns:
      The same function. Its values are without the non-finite ones that no query attends to.

    Raises:
      ValueError: (the function) a list of another number of rows than there are blocks of queries.
    """
    attend = jax.custom_vjp(forward)

    def keep(q: jax.Array, k: jax.Array, v: jax.Array, segments: Any, blocks: BlockList) -> tuple[Any, Any]:
        o, lse = forward(q, k, v, segments, blocks)
        return (o, lse), (q, k, v, segments, blocks, o, lse)

    def back(kept: Any, given: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
        q, k, v, segments, blocks, o, lse = kept
        return (*_gradients(heads, q, k, v, segments, blocks, o, lse, *given), None, None)

    attend.defvjp(keep, back)

    def checked_attend(
        q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, segments: Segments | None, blocks: BlockList
    ) -> tuple[jax.Array, jax.Array]:
        check_rows(blocks, q_BTHK.shape[1])
        return attend(q_BTHK, k_BSHK, attended_values(v_BSHK, segments), segments, blocks)

    return checked_attend


def check_rows(blocks: BlockList, queries: int) -> None:
    """Refuses a list of another number of rows than there are blocks of queries."""
    rows, n_q = blocks.counts.shape[-1], -(-queries // blocks.block_q)
    if rows != n_q:
        raise ValueError(f"a block list of {rows} rows for {n_q} blocks of queries; allowed: equal")


def _groups(block_k: int, listed: int) -> list[int]:
    """How many blocks make one product: the most that are worth it, then a quarter of those, down to one."""
    sizes = [max(1, min(TOGETHER // block_k, listed))]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 4 or 1)
    return sizes


def _over_list(step: Callable[[Any, jax.Array], Any], start: Any, block_k: int, row_n: jax.Array, count: Any) -> Any:
    """Folds `step(carry, some blocks)` over the first `count` entries of a row, in groups."""
    done, carry = like_all((row_n, count), jnp.zeros((), jnp.int32)), start
    for size in _groups(block_k, row_n.shape[0]):

        def more(state: Any, size: int = size) -> jax.Array:
            return state[0] + size <= count

        def take(state: Any, size: int = size) -> Any:
            done, carry = state
            return done + size, step(carry, jax.lax.dynamic_slice_in_dim(row_n, done, size))

        done, carry = jax.lax.while_loop(more, take, (done, carry))
    return carry


def _some(keys: Keys, which_g: jax.Array) -> Keys:
    """Some blocks of keys as one."""
    return jax.tree.map(lambda a: a[which_g].reshape(-1, *a.shape[2:]), keys)


def _head(
    block_q: int, block_k: int, q_TK: jax.Array, k_SK: jax.Array, v_SK: jax.Array, ids: Any, listed: Any
) -> tuple[jax.Array, jax.Array]:
    queries, n_q = q_TK.shape[0], -(-q_TK.shape[0] // block_q)
    every = keys_in_blocks(block_k, k_SK, v_SK, ids)

    def one(block: Any) -> tuple[jax.Array, jax.Array]:
        q_TK, ids_T, (row_n, count) = block
        start = empty(block_q, v_SK.shape[-1], (block, every))
        step = lambda running, which: add(q_TK, ids_T, running, _some(every, which))  # noqa: E731
        return finished(_over_list(step, start, block_k, row_n, count))

    ids_q = None if ids is None else cut(ids.q, block_q, n_q)
    o_nTK, lse_nT = each_block(one, (cut(q_TK, block_q, n_q), ids_q, listed), n_q)
    return o_nTK.reshape(n_q * block_q, -1)[:queries], lse_nT.reshape(-1)[:queries]


def _gradients(
    heads: int | None,
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    segments: Segments | None,
    blocks: BlockList,
    o_BTHK: jax.Array,
    lse_BHT: jax.Array,
    do_BTHK: jax.Array,
    dlse_BHT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    b, _, h, width = q_BTHK.shape
    delta_BTH = (do_BTHK.astype(jnp.float32) * o_BTHK.astype(jnp.float32)).sum(-1)
    less_BHT = jnp.swapaxes(delta_BTH, 1, 2) - dlse_BHT
    rows = (
        *map(by_head, (q_BTHK * width**-0.5, k_BSHK, v_BSHK)),
        *options_by_head(b, h, segments, blocks),
        lse_BHT.reshape(b * h, -1),
        less_BHT.reshape(b * h, -1),
        by_head(do_BTHK.astype(v_BSHK.dtype)),
    )
    dq_GTK, dk_GSK, dv_GSK = each_head(partial(_head_gradients, blocks.block_q, blocks.block_k), heads, rows)
    of = lambda d, a: of_heads(d, b).astype(a.dtype)  # noqa: E731
    return of(dq_GTK * width**-0.5, q_BTHK), of(dk_GSK, k_BSHK), of(dv_GSK, v_BSHK)


def _head_gradients(
    block_q: int,
    block_k: int,
    q_TK: jax.Array,
    k_SK: jax.Array,
    v_SK: jax.Array,
    ids: Any,
    listed: Any,
    lse_T: jax.Array,
    less_T: jax.Array,
    do_TK: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q (times 1/sqrt(K), as q is), k and v of one head, in float32."""
    n_q = -(-q_TK.shape[0] // block_q)
    every = keys_in_blocks(block_k, k_SK, v_SK, ids)
    n_k = every.k_SK.shape[0]
    sizes_n = jnp.minimum(block_k, k_SK.shape[0] - block_k * jnp.arange(n_k))  # keys of each block
    f32 = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def one(sums: tuple[jax.Array, jax.Array], block: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        q_TK, ids_T, (row_n, count), lse_T, less_T, do_TK = block
        seen = jnp.where(jnp.arange(row_n.shape[0]) < count, sizes_n[row_n], 0).sum()

        def step(carry: Any, which: jax.Array) -> Any:
            dq_TK, dk_nSK, dv_nSK = carry
            keys = _some(every, which)
            x_TS = f32("tk,sk->ts", q_TK, keys.k_SK)
            p_TS = jnp.exp(x_TS - lse_T[:, None])
            ds_TS = p_TS * (f32("tk,sk->ts", do_TK, keys.v_SK) - less_T[:, None])
            if ids_T is not None and keys.ids_S is not None:
                equal_TS = ids_T[:, None] == keys.ids_S[None]
                alone_TS = jnp.broadcast_to((lse_T < MASKED / 2)[:, None], equal_TS.shape)  # no key: the mean of all
                p_TS = jnp.where(equal_TS, p_TS, jnp.where(alone_TS, 1 / seen, 0))
                ds_TS = jnp.where(equal_TS, ds_TS, 0)
            if keys.exists_S is not None:
                p_TS, ds_TS = (jnp.where(keys.exists_S[None], a, 0) for a in (p_TS, ds_TS))
            split = lambda a: a.reshape(-1, block_k, a.shape[-1])  # noqa: E731
            ds_TS = ds_TS.astype(k_SK.dtype)
            dq_TK = dq_TK + f32("ts,sk->tk", ds_TS, keys.k_SK)
            dk_nSK = dk_nSK.at[which].add(split(f32("ts,tk->sk", ds_TS, q_TK)))
            return dq_TK, dk_nSK, dv_nSK.at[which].add(split(f32("ts,tk->sk", p_TS.astype(v_SK.dtype), do_TK)))

        start = like_all((block, every), jnp.zeros((block_q, k_SK.shape[-1]), jnp.float32))
        dq_TK, dk_nSK, dv_nSK = _over_list(step, (start, *sums), block_k, row_n, count)
        return (dk_nSK, dv_nSK), dq_TK

    rows = jax.tree.map(lambda a: cut(a, block_q, n_q), (q_TK, None if ids is None else ids.q))
    rows = (*rows, listed, *(cut(a, block_q, n_q) for a in (lse_T, less_T, do_TK)))
    none = lambda a: like_all((rows, every), jnp.zeros(a.shape, jnp.float32))  # noqa: E731
    (dk_nSK, dv_nSK), dq_nTK = jax.lax.scan(one, (none(every.k_SK), none(every.v_SK)), rows)
    whole = lambda a, like: a.reshape(-1, a.shape[-1])[: like.shape[0]]  # noqa: E731
    return whole(dq_nTK, q_TK), whole(dk_nSK, k_SK), whole(dv_nSK, v_SK)
