"""Self-attention within a window along the tokens, with a prefix (text) that everything sees and that sees everything.

Query i attends key j iff |i - j| <= radius, or i < prefix, or j < prefix.

Beltagy et al., Longformer, 2020, arXiv:2004.05150; Yuan et al., DiTFastAttn, 2024, arXiv:2406.08552.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from difax.accel.attention.chunked import chunked
from difax.accel.attention.running import cut, dequantized, each_block, over_heads
from difax.core.annotations import checked
from difax.core.contracts import Attention, BlockList, BlockScales, Scales, Segments, State, Where
from difax.core.ops import MASKED, attended_values


@checked
def windowed(
    radius: int = 128, prefix: int = 0, block: int = 256, heads: int | None = None, full: Sequence[str] = ("cross",)
) -> Attention:
    """Self-attention within a window along the tokens (`window`); cross-attention is full.

    A window says which tokens of one sequence are near to each other; of two sequences, image and text, it says
    nothing. So a call with another number of keys than queries is full, and so are the branches of `full`, in which
    queries and keys may come to be as many.

    Args:
      radius, prefix, block, heads: of `window`.
      full: branches that attend to all keys: those of cross-attention.

    Returns:
      An `Attention` that remembers nothing.

    Raises:
      ValueError: as `window`.
    """
    near, every = window(radius, prefix, block, heads), chunked(block, heads=heads)

    def apply(q: jax.Array, k: jax.Array, v: jax.Array, segments: Any, where: Where, row: Any, state: State) -> Any:
        attend = every if q.shape[1] != k.shape[1] or where.branch in full else near
        return attend(q, k, v, segments), state

    return Attention(init=lambda spec: (), apply=apply, ordered=True)


@checked
def window(radius: int = 128, prefix: int = 0, block: int = 256, heads: int | None = None) -> Callable[..., Any]:
    """Attention to the keys at most `radius` tokens away and to the prefix, in O(T (radius + prefix)) work and memory.

    A block of queries is compared with one slice of `block + 2 radius` keys, beside the prefix. A query without any
    key (which only segments can bring about) gets the mean of the values it was compared with.

    Args:
      radius: tokens to either side, 0 or more (128); T - 1 or more is full attention.
      prefix: leading tokens that attend to, and are attended by, all tokens; 0 or more (0; the text of a joint
        attention).
      block: queries at once, 1 or more (256).
      heads: heads (of all samples) at once; None is 1 on a CPU and all of them elsewhere.

    Returns:
      The function. It takes segments, scales and the log-sum-exp; it declines cross-attention (T != S) and block lists.

    Raises:
      ValueError: a size below what is allowed.

    References: Beltagy et al. 2020, arXiv:2004.05150 (a window in one dimension, symmetric global attention); Yuan et
    al. 2024, arXiv:2406.08552, which adds the residual of the full attention of an earlier evaluation, not done here.
    """
    for name, value, least in (("radius", radius, 0), ("prefix", prefix, 0), ("block", block, 1), ("heads", heads, 1)):
        if value is not None and value < least:
            raise ValueError(f"window: {name}={value}; allowed: {least} or more")
    full = chunked(block, heads=heads)

    def attend(
        q_BTHK: jax.Array,
        k_BSHK: jax.Array,
        v_BSHK: jax.Array,
        segments: Segments | None = None,
        blocks: BlockList | None = None,
        scales: Scales | BlockScales | None = None,
        with_lse: bool = False,
    ) -> Any:
        tokens, keys = q_BTHK.shape[1], k_BSHK.shape[1]
        if tokens != keys:
            raise NotImplementedError(f"{tokens} queries of {keys} keys; a window needs as many of both")
        if blocks is not None:
            raise NotImplementedError("a list of blocks")
        q_BTHK, k_BSHK, v_BSHK = dequantized(q_BTHK, k_BSHK, v_BSHK, scales)
        v_BSHK = attended_values(v_BSHK, segments)
        o_BTHK, lse_BHT = over_heads(head, heads, q_BTHK, k_BSHK, v_BSHK, segments)
        if prefix:
            ids = None if segments is None else Segments(segments.q[:, :prefix], segments.k)
            first_BPHK, first_BHP = full(q_BTHK[:, :prefix], k_BSHK, v_BSHK, ids, with_lse=True)
            o_BTHK = jnp.concatenate([first_BPHK, o_BTHK[:, prefix:]], 1)
            lse_BHT = jnp.concatenate([first_BHP, lse_BHT[..., prefix:]], 2)
        return (o_BTHK, lse_BHT) if with_lse else o_BTHK

    def head(q_TK: jax.Array, k_TK: jax.Array, v_TK: jax.Array, ids: Any, _: None) -> tuple[jax.Array, jax.Array]:
        tokens = q_TK.shape[0]
        size = min(block, tokens)
        count, span = -(-tokens // size), size + 2 * radius
        # keys of the prefix that stand beside the slice, unless both together are as good as all keys
        span, before = (span, prefix) if span + prefix < tokens else (tokens, 0)

        def near(a: jax.Array, start: jax.Array) -> jax.Array:
            return jnp.concatenate([a[:before], jax.lax.dynamic_slice_in_dim(a, start, span)])

        @partial(jax.checkpoint, prevent_cse=False)
        def one(part: Any) -> tuple[jax.Array, jax.Array]:
            i_T, q_TK, ids_T = part
            start = jnp.clip(i_T[0] - radius, 0, tokens - span)
            k_SK, v_SK, j_S = near(k_TK, start), near(v_TK, start), near(jnp.arange(tokens), start)
            sliced_S = jnp.arange(before + span) >= before
            close_TS = jnp.abs(i_T[:, None] - j_S[None]) <= radius
            # a key of the prefix that the slice holds too is counted once
            keep_TS = jnp.where((sliced_S & (j_S >= before))[None], close_TS, ~sliced_S[None])
            if before == 0:
                keep_TS = keep_TS | (j_S < prefix)[None]
            if ids is not None:
                keep_TS = keep_TS & (ids_T[:, None] == near(ids.k, start)[None])
            x_TS = jnp.einsum("tk,sk->ts", q_TK, k_SK, preferred_element_type=jnp.float32)
            x_TS = jnp.where(keep_TS, x_TS, MASKED)
            top_T1 = jax.lax.stop_gradient(x_TS.max(-1, keepdims=True))
            p_TS = jnp.exp(x_TS - top_T1)
            total_T1 = p_TS.sum(-1, keepdims=True)
            o_TK = jnp.einsum("ts,sk->tk", p_TS.astype(v_SK.dtype), v_SK, preferred_element_type=jnp.float32)
            return o_TK / total_T1, (top_T1 + jnp.log(total_T1))[:, 0]

        i_nT = jnp.arange(count * size).reshape(count, size)
        ids_q = None if ids is None else cut(ids.q, size, count)
        o_nTK, lse_nT = each_block(one, (i_nT, cut(q_TK, size, count), ids_q), count)
        return o_nTK.reshape(count * size, -1)[:tokens], lse_nT.reshape(-1)[:tokens]

    return attend
