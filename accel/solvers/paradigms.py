"""ParaDiGMS: Picard's iteration over a window of steps. Shih, Belkhale, Ermon, Sadigh & Anari, Parallel Sampling of
Diffusion Models, 2023, arXiv:2305.16317."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from difax.accel.solvers.time_parallel import check_window, leading, mean_square, time_parallel
from difax.core.annotations import checked
from difax.core.contracts import Solver


@checked
def paradigms(tolerance: float = 0.1, window: int | None = 10, eta: float = 0.0) -> Solver:
    """DDIM's steps, a window of them evaluated at once, their drifts summed up from the window's start.

      x_{b+k} <- x_b + sum_{j < k} (F_{b+j}(x_{b+j}) - x_{b+j})
      the window moves on over all leading points with |change|^2/dimension <= tolerance^2 w^2, and one more

    with w^2 the variance of the noise that the next step would have at eta = 1: the tolerance is a share of the noise.
    The point behind those that have settled follows from settled ones alone, so each batch of evaluations ends one step
    or more, and tolerance 0 gives DDIM's own samples. New points of the window begin as its last one. Each sample has a
    window of its own; `steps` is the number of steps of DDIM.

    Args:
      tolerance: 0 or more (0.1). window: rows that are evaluated at once, 1 or more (10); None: all.
      eta: of DDIM, 0 ... 1; 1 is DDPM.

    Returns:
      A `Solver` of windows.

    Raises:
      ValueError: numbers out of range, or what `ddim` refuses.

    References: Shih et al. 2023, arXiv:2305.16317, algorithm 1; https://github.com/AndyShih12/paradigms, whose batch
    has one window, which moves as its slowest sample does.
    """
    check_window("paradigms", window, tolerance)

    def update(state, found):
        change = jnp.cumsum(found.residual, 1)
        error, limit = mean_square(change), found.rows.coefficients.limit
        points = state.x[:, 1:] + change
        points = points.at[:, 0].set(found.mapped[:, 0])  # to the bit
        return points, 1 + leading(error <= limit), lambda done: ()

    return time_parallel(
        eta,
        window,
        scale=np.ones_like,
        limit=lambda w: (tolerance * w[1:]) ** 2,
        begin=lambda points: (),
        update=update,
    )
