"""Linear mixes of remembered values: what fills a cache's gap, and what a multistep solver steps by."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def mix(ring: Any, weights: Any, like: Any) -> Any:
    """sum_j weights[j] ring[j], leaf by leaf, in the types of `like`.

    Args:
      ring: tuple of pytrees; weights: [len(ring)], or None for the first as it is.
    """
    if weights is None:
        return jax.tree.map(lambda a, b: a.astype(b.dtype), ring[0], like)

    def one(b: Any, *values: jax.Array) -> jax.Array:
        wide = jnp.promote_types(b.dtype, jnp.float32)
        total = jnp.zeros((), wide)
        for w, v in zip(weights, values, strict=True):
            total += jnp.asarray(w).astype(wide) * v.astype(wide)
        return total.astype(b.dtype)

    return jax.tree.map(one, like, *ring)


def lagrange(nodes: Any, at: Any, known: Any = None) -> Any:
    """Weights of the values at nodes [k] in the polynomial through them, taken at a point: exact up to degree k - 1.

    w_j = prod_{m != j} (at - s_m) / (s_j - s_m)

    Args:
      nodes: [k], numpy or jax. at: a scalar, of numpy nodes also any array of points.
      known: bool [k], which nodes there are; the others weigh nothing. None is all.

    Returns:
      [k], or [k, *at.shape].
    """
    xp = np if isinstance(nodes, np.ndarray) else jnp
    known = xp.ones(nodes.shape, bool) if known is None else known
    apart = xp.where(xp.eye(len(nodes), dtype=bool), 1, nodes[:, None] - nodes[None])
    at, more = xp.asarray(at), (1,) * xp.ndim(at)
    ratio = (at - nodes.reshape(1, -1, *more)) / xp.where(apart == 0, 1, apart).reshape(*apart.shape, *more)
    use = (known[:, None] & known[None] & ~xp.eye(len(nodes), dtype=bool)).reshape(*apart.shape, *more)
    return xp.where(known.reshape(-1, *more), xp.prod(xp.where(use, ratio, 1.0), axis=1), 0.0)
