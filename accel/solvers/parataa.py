"""ParaTAA: triangular Anderson acceleration over a window of steps. Tang, Tang, Luo, Wang & Chang, Accelerating
Parallel Sampling of Diffusion Models, 2024, arXiv:2402.09970."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.solvers.time_parallel import check_window, leading, mean_square, slid, summed, time_parallel
from difax.core.annotations import checked
from difax.core.contracts import Solver
from difax.core.drive import per_sample


class Past(NamedTuple):
    """points, change: [B, m - 1, W, ...] of the iterations before, the last first. seen: [B, W], how many of them each
    row was in the window for."""

    points: jax.Array
    change: jax.Array
    seen: jax.Array


@checked
def parataa(
    tolerance: float = 1e-3,
    window: int | None = None,
    order: int | None = None,
    memory: int = 3,
    ridge: float = 1e-3,
    eta: float = 0.0,
) -> Solver:
    """DDIM's steps as a triangular system of all points of a window, solved by Anderson's acceleration row by row.

      R_i: the change of point i if the last `order` steps were taken with the predictions at hand
      x_i <- x_i + R_i - sum_p gamma_{i,p} (dx_{i,p} + dR_{i,p}),   (B_i + ridge I) gamma_i = d_i
      B_i = sum_{j <= i} dR_j dR_j^T,  d_i = sum_{j <= i} dR_j R_j

    with differences d of the last `memory` iterations. Sums over rows up to i keep point i a function of points before
    it. The first point whose own residual is above the tolerance, and all before it, take plain steps (the safeguard),
    so each batch of evaluations ends one step or more, and tolerance 0 gives DDIM's own samples.

    Args:
      tolerance: of the root mean square of F_i(x_i) - x_{i+1}, 0 or more (1e-3), in the values' own units and, where
        the noise of a step would be above 1, a share of that.
      window: rows that are evaluated at once, 1 or more; None (the paper's): all.
      order: k, rows that a residual goes back, 1 ... window; None (the paper's): the window's.
      memory: m, iterations that are mixed, 1 ... 10 (2 to 5 in the paper); 1 is the plain fixed-point iteration.
      ridge: above 0 (1e-3). eta: of DDIM, 0 ... 1.

    Returns:
      A `Solver` of windows.

    Raises:
      ValueError: numbers out of range, or what `ddim` refuses.

    References: Tang et al. 2024, arXiv:2402.09970, equations 7, 11 and 17 to 19;
    https://github.com/TZW1998/ParaTAA-Diffusion, which computes in float64 (here residuals are summed, which float32
    bears), and which, for rows that have come into a sliding window lately, takes the oldest differences, zeros, for
    theirs (here those that they have).
    """
    check_window("parataa", window, tolerance)
    if order is not None and not 1 <= order <= (window or order):
        raise ValueError(f"parataa: order={order}; allowed: 1 ... window={window}")
    if not 1 <= memory <= 10:
        raise ValueError(f"parataa: memory={memory}; allowed: 1 ... 10")
    if not ridge > 0:
        raise ValueError(f"parataa: ridge={ridge}; allowed: above 0")

    def begin(points):
        past = jnp.zeros((len(points), memory - 1, *points.shape[1:]), points.dtype)
        return Past(past, past, jnp.zeros(points.shape[:2], jnp.int32))

    def update(state, found):
        past, x, change = state.memory, state.x[:, 1:], summed(found, order)
        error = jnp.sqrt(mean_square(found.residual))
        settled = leading((error <= found.rows.coefficients.limit) & found.there)
        points = x + change
        every = jnp.concatenate([x[:, None], past.points], 1), jnp.concatenate([change[:, None], past.change], 1)
        if memory > 1:
            known = past.seen[..., None] > jnp.arange(memory - 1)[None, None]  # [B, W, m - 1]
            here = per_sample(jnp.moveaxis(known, 1, 2), x.ndim + 1)
            dx, dr = (jnp.where(here, a[:, :-1] - a[:, 1:], 0) for a in every)
            gram = jnp.cumsum(jnp.einsum("bpw...,bqw...->bwpq", dr, dr, precision="highest"), 1)
            right = jnp.cumsum(jnp.einsum("bpw...,bw...->bwp", dr, change, precision="highest"), 1)
            gram = jnp.where(known[..., None] & known[..., None, :], gram, 0)
            right = jnp.where(known, right, 0)
            gamma = jnp.linalg.solve(gram + ridge * jnp.eye(memory - 1, dtype=x.dtype)[None, None], right[..., None])[
                ..., 0
            ]
            mixed = jnp.einsum("bwp,bpw...->bw...", gamma, dx + dr, precision="highest")
            behind = jnp.arange(x.shape[1])[None] > settled[:, None]
            points = points - jnp.where(per_sample(behind, x.ndim), mixed, 0)
        points = points.at[:, 0].set(found.mapped[:, 0])  # to the bit

        def slide(done):
            points, change = (slid(a[:, : memory - 1], done, 2) for a in every)
            return Past(points, change, slid(past.seen + found.there, done, 1))

        return points, 1 + settled, slide

    return time_parallel(
        eta,
        window,
        scale=np.copy,
        limit=lambda w: tolerance * np.maximum(w[:-1], 1.0),
        begin=begin,
        update=update,
    )
