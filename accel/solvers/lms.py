"""The linear multistep method of k-diffusion: Adams-Bashforth on any levels. Crowson, k-diffusion, 2022."""

from __future__ import annotations

import numpy as np

from difax.accel.solvers.adams import Update, ladder, lay_adams, slots_of
from difax.accel.solvers.deis import adams_bashforth
from difax.accel.solvers.linear import Steps, linear
from difax.core.annotations import checked
from difax.core.contracts import Solver
from difax.core.process import Process


@checked
def lms(order: int = 4) -> Solver:
    """Adams-Bashforth in u = sigma/alpha: with y = x/alpha, dy/du = eps, on steps of any lengths.

      x_s = alpha_s (x/alpha_t + sum_{i<order} eps_{j-i} int_{u_t}^{u_s} l_i du),

    l_i the Lagrange polynomials of the last `order` evaluations, fewer in the first steps; the last step goes to
    sigma = 0 in full order, and one out of alpha = 0 is of first order. It is `deis` of kind "rhoab".

    Args:
      order: 1 ... 4 (4).

    Returns:
      A `Solver` whose state is the past noise predictions.

    References: k-diffusion, `sample_lms`; diffusers' LMSDiscreteScheduler. Both integrate adaptively to 1e-4, here it
      is exact.
    """
    if not 1 <= order <= 4:
        raise ValueError(f"lms: order={order}; allowed: 1 ... 4")

    def lay(steps: Steps, process: Process, times: np.ndarray) -> None:
        levels = ladder(process, times)

        def predict(j: int) -> Update:
            return adams_bashforth(process, times, levels, j, min(order, j + 1), "rhoab")

        lay_adams(steps, times, levels, "eps", predict)

    return linear(lay, slots_of(order - 1))
