"""Attention to listed blocks in float64 numpy, row by row from the formula, and random lists."""

from typing import Any

import numpy as np


def listed_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    indices: Any,
    counts: Any,
    block_q: int,
    block_k: int,
    scale: float,
    segments: tuple[Any, Any] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """softmax(scale q k^T) v over the keys of the listed blocks and its log-sum-exp; q, k, v [B, T or S, H, K].

    A query all of whose listed keys have other ids gets the mean of their values, and -1e30.
    """
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    (b, t, h, _), s = q.shape, k.shape[1]
    indices, counts = np.asarray(indices), np.asarray(counts)
    o, lse = np.zeros((b, t, h, v.shape[-1])), np.zeros((b, h, t))
    for i, j, row in np.ndindex(b, h, t):
        at = i % indices.shape[0], j % indices.shape[1], row // block_q
        blocks = indices[at][: counts[at]]
        seen = np.concatenate([np.arange(x * block_k, min((x + 1) * block_k, s)) for x in blocks])
        if segments is not None:
            equal = np.asarray(segments[0])[i, row] == np.asarray(segments[1])[i, seen]
            if not equal.any():
                o[i, row, j], lse[i, j, row] = v[i, seen, j].mean(0), -1e30
                continue
            seen = seen[equal]
        x = scale * k[i, seen, j] @ q[i, row, j]
        p = np.exp(x - x.max())
        o[i, row, j], lse[i, j, row] = p @ v[i, seen, j] / p.sum(), x.max() + np.log(p.sum())
    return o, lse


def random_lists(
    rng: np.random.Generator, shape: tuple[int, int], n_q: int, n_k: int, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lists of n distinct blocks with counts of 1 to n, int32 [*shape, n_q, n] and [*shape, n_q]."""
    indices = np.argsort(rng.random((*shape, n_q, n_k)), -1)[..., :n].astype(np.int32)
    return indices, rng.integers(1, n + 1, (*shape, n_q)).astype(np.int32)
