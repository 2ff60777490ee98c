"""Attention by blocks with a running softmax (`running`), in plain lax: no [T, S] logits, on every platform.

Milakov & Gimelshein, Online normalizer calculation for softmax, 2018, arXiv:1805.02867; Rabe & Staats, Self-attention
does not need O(n^2) memory, 2021, arXiv:2112.05682; Dao et al., FlashAttention, 2022, arXiv:2205.14135.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from difax.accel.attention.listed import by_list
from difax.accel.attention.running import (
    add,
    cut,
    dequantized,
    each_block,
    empty,
    finished,
    keys_in_blocks,
    over_heads,
)
from difax.core import ops
from difax.core.annotations import checked
from difax.core.contracts import BlockList, BlockScales, Scales, Segments
from difax.core.ops import attended_values


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
      The function. It takes every option: segments, scales, the log-sum-exp, and lists of distinct blocks of whatever
      size, of which it computes the listed ones alone (`listed`).

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
        q_BTHK, k_BSHK, v_BSHK = dequantized(q_BTHK, k_BSHK, v_BSHK, scales)
        if blocks is not None:
            o_BTHK, lse_BHT = by_list(heads)(q_BTHK, k_BSHK, v_BSHK, segments, blocks)
        else:
            head, v_BSHK = (
                partial(_head, _equal(queries, block_q), _equal(keys, block_k)),
                attended_values(v_BSHK, segments),
            )
            o_BTHK, lse_BHT = over_heads(head, heads, q_BTHK, k_BSHK, v_BSHK, segments)
        return (o_BTHK, lse_BHT) if with_lse else o_BTHK

    return attend


def _equal(length: int, most: int) -> int:
    """The size of the fewest equal blocks of at most `most` that cover a length."""
    return -(-length // -(-length // most))


def _head(
    block_q: int, block_k: int, q_TK: jax.Array, k_SK: jax.Array, v_SK: jax.Array, ids: Any, _: None
) -> tuple[jax.Array, jax.Array]:
    queries, n_q = q_TK.shape[0], -(-q_TK.shape[0] // block_q)
    every = keys_in_blocks(block_k, k_SK, v_SK, ids)
    n_k = every.k_SK.shape[0]

    @partial(jax.checkpoint, prevent_cse=False)
    def one(block: Any) -> tuple[jax.Array, jax.Array]:
        q_TK, ids_T = block
        step = jax.checkpoint(partial(add, q_TK, ids_T), prevent_cse=False)
        none = empty(block_q, v_SK.shape[-1], (block, every))
        if n_k == 1:
            return finished(step(none, jax.tree.map(lambda a: a[0], every)))
        return finished(jax.lax.scan(lambda running, keys: (step(running, keys), None), none, every)[0])

    ids_q = None if ids is None else cut(ids.q, block_q, n_q)
    o_nTK, lse_nT = each_block(one, (cut(q_TK, block_q, n_q), ids_q), n_q)
    return o_nTK.reshape(n_q * block_q, -1)[:queries], lse_nT.reshape(-1)[:queries]
