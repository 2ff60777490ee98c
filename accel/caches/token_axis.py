"""The axis of tokens: choosing some by a score, taking them out and putting them back, and what attention says of them.

Shape letters: B batch, T queries, S keys, N tokens, D width, H heads, K head width, M chosen tokens.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from difax.core import ops
from difax.core.contracts import Segments, Tokens
from difax.core.placement import cut

STREAMS = ("txt", "img")  # the order in which a joint attention takes the streams of a model with several
QUERIES = 128  # so many rows of an attention map exist at once while its columns are summed


def gather(tokens: Tokens, index: Any) -> Tokens:
    """The tokens [B, N, D] at index [B, M], stream by stream: [B, M, D]."""
    return jax.tree.map(lambda a, i: jnp.take_along_axis(a, i[..., None], axis=1), tokens, index)


def scatter(held: jax.Array, index: jax.Array, fresh: Any, number: Any = None) -> jax.Array:
    """held [B, N, ...] with `fresh` [B, M, ...] at index [B, M]; of the first `number` of them only, None for all."""
    rows = jnp.arange(held.shape[0])[:, None]
    if number is not None:  # the others point behind the end
        index = jnp.where(jnp.arange(index.shape[1])[None] < number, index, held.shape[1])
    return held.at[rows, index].set(fresh, mode="drop")


def top(score: jax.Array, number: int) -> jax.Array:
    """Index [B, number] of the tokens of the highest score [B, N], the best first; of equal ones the earlier."""
    return jax.lax.top_k(score, number)[1]


def stratified(score: jax.Array, number: Any) -> jax.Array:
    """score [B, N] with all at the lowest number but the best of each of so many stretches of (nearly) equal length."""
    b, n = score.shape
    stretch, lowest = jnp.arange(n) * number // n, jnp.finfo(score.dtype).min  # finite: no technique makes infinities
    best = jnp.full_like(score, lowest).at[:, stretch].max(score)[:, stretch]
    place = jnp.where(score == best, jnp.arange(n)[None], n)
    first = jax.vmap(lambda at: jax.ops.segment_min(at, stretch, n))(place)[:, stretch]
    return jnp.where(jnp.arange(n)[None] == first, score, lowest)


def with_bonus(score: jax.Array, share: Any, grid: tuple[int, ...] | None, cell: int = 2) -> jax.Array:
    """score [B, N] with the highest of each cell x cell of the grid raised by `share` of itself."""
    if grid is None:
        return score
    b, (*frames, rows, columns) = score.shape[0], grid
    cells = score.reshape(b, math.prod(frames), rows // cell, cell, columns // cell, cell).swapaxes(3, 4)
    flat = cells.reshape(*cells.shape[:-2], cell * cell)
    best = jax.nn.one_hot(jnp.argmax(flat, axis=-1), cell * cell, dtype=bool)
    raised = jnp.where(best, flat * jnp.asarray(1 + share, flat.dtype), flat)
    return raised.reshape(cells.shape).swapaxes(3, 4).reshape(score.shape)


def attended_score(kind: str, q_BTHK: Any, k_BSHK: Any, v_BSHK: Any, segments: Segments | None = None) -> jax.Array:
    """What an attention says about each of its keys, [B, S] in float32."""
    if kind == "attention":
        return column_sums(q_BTHK, k_BSHK, segments)
    if kind == "key_norm":
        return jnp.linalg.norm(k_BSHK.astype(jnp.float32), axis=-1).mean(-1)
    return (1 - jnp.linalg.norm(v_BSHK.astype(jnp.float32), axis=-1)).sum(-1)


def column_sums(q_BTHK: jax.Array, k_BSHK: jax.Array, segments: Segments | None = None) -> jax.Array:
    """sum over queries of softmax(q k^T / sqrt(K)), mean over heads: [B, S], a few rows of the map at a time."""
    b, t, h, width = q_BTHK.shape
    rows = min(QUERIES, t)
    blocks = -(-t // rows)
    q = jnp.pad(q_BTHK, ((0, 0), (0, blocks * rows - t), (0, 0), (0, 0))) * width**-0.5
    real = jnp.arange(blocks * rows) < t
    ids = jnp.zeros((b, blocks * rows), jnp.int32)
    if segments is not None:
        ids = jnp.pad(segments.q, ((0, 0), (0, blocks * rows - t)))

    def add(total: jax.Array, part: Any) -> Any:
        q_BRHK, real_R, ids_BR = part
        logits = jnp.einsum("brhk,bshk->bhrs", q_BRHK, k_BSHK, preferred_element_type=jnp.float32)
        if segments is not None:
            logits = jnp.where(ids_BR[:, None, :, None] == segments.k[:, None, None, :], logits, ops.MASKED)
        return total + (ops.softmax(logits) * real_R[None, None, :, None]).sum(2).mean(1), None

    parts = (
        jnp.moveaxis(q.reshape(b, blocks, rows, h, width), 1, 0),
        real.reshape(blocks, rows),
        jnp.moveaxis(ids.reshape(b, blocks, rows), 1, 0),
    )
    return jax.lax.scan(add, jnp.zeros((b, k_BSHK.shape[1]), jnp.float32), parts)[0]


def by_stream(score_BS: jax.Array, like: Tokens) -> Any:
    """The score of a joint attention's keys, cut into the streams of the tokens."""
    if not isinstance(like, dict):
        return score_BS
    if not set(like) <= set(STREAMS):
        raise ValueError(f"tokens of the streams {', '.join(like)}; allowed: {', '.join(STREAMS)}, in this order")
    names = [s for s in STREAMS if s in like]
    return dict(zip(names, cut(score_BS, [like[s].shape[1] for s in names]), strict=True))


def normalised(score: jax.Array) -> jax.Array:
    """score [B, N] over its norm."""
    return score / jnp.maximum(jnp.linalg.norm(score, axis=1, keepdims=True), 1e-12)
