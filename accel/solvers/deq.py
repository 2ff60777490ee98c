"""DEQ-DDIM: the whole chain as one fixed point. Pokle, Geng & Kolter, Deep Equilibrium Approaches to Diffusion Models,
2022, arXiv:2210.12867."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.solvers.time_parallel import check_window, summed, time_parallel
from difax.core.annotations import checked
from difax.core.contracts import Solver
from difax.core.drive import per_sample


class Past(NamedTuple):
    """times: [B], iterations so far. mapped, change: [B, m - 1, W, ...] of those before, the last first."""

    times: jax.Array
    mapped: jax.Array
    change: jax.Array


@checked
def deq(tolerance: float = 1e-3, memory: int = 3, ridge: float = 1e-3, eta: float = 0.0) -> Solver:
    """All steps of DDIM as one fixed point x = H(x) of all points, solved by Anderson's acceleration.

      H_{i+1}(x) = alpha_{i+1} (x_0/alpha_0 + sum_{j <= i} c_j eps(x_j, t_j)),  c_j = the change of sigma/alpha
      x <- sum_p a_p H(x^(p)),  a the weights, of sum 1, with the least |sum_p a_p (H(x^(p)) - x^(p))|^2 + ridge |a|^2

    over the last `memory` iterations, with weights for each point by itself. It ends where
    |H(x) - x| <= tolerance |H(x)| over all points of a sample. All rows are one batch; point i is exact after i
    iterations and is then left as it is, so that there are never more of them than steps, and tolerance 0 gives DDIM's
    own samples. With eta > 0 the noise of the chain is part of H.

    Args:
      tolerance: 0 or more (1e-3). memory: m, iterations that are mixed, 1 ... 10 (3).
      ridge: above 0 (1e-3), relative to the mean square of the residuals. eta: of DDIM, 0 ... 1.

    Returns:
      A `Solver` of one window with all rows.

    Raises:
      ValueError: numbers out of range, or what `ddim` refuses.

    References: Pokle et al. 2022, arXiv:2210.12867, equations 9 and 10; https://github.com/locuslab/deq-ddim. There the
    ridge is absolute, which takes plain means of the last iterations once residuals are below it, and exact points are
    not held. The inversion of images by implicit differentiation is not here.
    """
    check_window("deq", None, tolerance)
    if not 1 <= memory <= 10:
        raise ValueError(f"deq: memory={memory}; allowed: 1 ... 10")
    if not ridge > 0:
        raise ValueError(f"deq: ridge={ridge}; allowed: above 0")

    def begin(points):
        past = jnp.zeros((len(points), memory - 1, *points.shape[1:]), points.dtype)
        return Past(jnp.zeros(len(points), jnp.int32), past, past)

    def update(state, found):
        past, x, change = state.memory, state.x[:, 1:], summed(found)
        wide, mapped = x.shape[1], state.x[:, 1:] + change
        far, size = (jnp.sqrt(jnp.sum(jnp.square(a), tuple(range(1, a.ndim)))) for a in (change, mapped))
        last = past.times + 1 >= wide
        h = jnp.concatenate([mapped[:, None], past.mapped], 1)
        g = jnp.concatenate([change[:, None], past.change], 1)
        known = (jnp.arange(memory)[None] <= past.times[:, None])[:, None]  # [B, 1, m]
        gram = jnp.einsum("bpw...,bqw...->bwpq", g, g, precision="highest")
        trace = jnp.trace(gram, axis1=2, axis2=3)[..., None, None] / known.sum(-1)[..., None, None]
        eye = jnp.eye(memory, dtype=x.dtype)
        # iterations that have not been have weight 0
        gram = gram / jnp.maximum(trace, jnp.finfo(x.dtype).tiny) + ridge * eye[None, None]
        ones = jnp.broadcast_to(known, (*x.shape[:2], memory)).astype(x.dtype)
        weights = jnp.linalg.solve(gram, ones[..., None])[..., 0] * known
        weights = weights / weights.sum(-1, keepdims=True)
        mixed = jnp.einsum("bwp,bpw...->bw...", weights, h, precision="highest")
        i, count = jnp.arange(wide)[None], past.times[:, None]
        points = jnp.where(per_sample(i == count, x.ndim), found.mapped, mixed)
        points = jnp.where(per_sample(i < count, x.ndim), x, points)
        # what is handed out where it ends is H itself
        ended = (far <= tolerance * size) | last
        final = jnp.where(per_sample(i < count + 1, x.ndim), points, mapped)
        points = jnp.where(per_sample(ended, x.ndim), final, points)
        kept = Past(past.times + 1, h[:, : memory - 1], g[:, : memory - 1])
        return points, jnp.where(ended, wide, 0), lambda done: kept

    return time_parallel(
        eta,
        None,
        scale=np.copy,
        limit=lambda w: np.zeros(len(w) - 1),
        begin=begin,
        update=update,
    )
