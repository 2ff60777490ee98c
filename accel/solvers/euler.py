"""Euler's and Adams' methods on the flow ODE. Liu, Gong & Liu, Flow Straight and Fast, 2022, arXiv:2209.03003."""

from __future__ import annotations

import numpy as np

from difax.accel.solvers.linear import Steps, linear
from difax.core.annotations import checked
from difax.core.contracts import Solver
from difax.core.mixing import lagrange
from difax.core.process import Process

HIGHEST = 4


def straighten(process: Process, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The flow that any process is a rescaling of: y = x/(alpha + sigma) = (1 - u) x0 + u eps.

    Returns:
      (u, scale): u = sigma/(alpha + sigma) in [0, 1] and scale = alpha + sigma at each time.
    """
    level = process.level(times)
    scale = level.alpha + level.sigma
    return level.sigma / scale, scale


def euler() -> Solver:
    """Euler steps along the straight path: y_s = y_t + (u_s - u_t)(eps - x0), one evaluation a step.

    y and u are those of `straighten`, so that the method serves every process: for a rectified flow y = x and
    u = t, for the others it is the same step after rescaling. In exact arithmetic it is DDIM with eta = 0.

    Returns:
      A `Solver` without state.

    References: Liu et al. 2022, arXiv:2209.03003.
    """
    return flow_ab(1)


@checked
def flow_ab(order: int = 2) -> Solver:
    """Adams-Bashforth steps along the straight path, one evaluation a step: y_s = y_t + int_{u_t}^{u_s} P(u) du.

    P is the polynomial in u through the last slopes eps - x0; y and u are those of `straighten`. Steps of any lengths;
    the first ones have the order of the slopes that there are. That leaves an error of second order, which shows late:
    on 20 to 160 steps the error falls with the powers 2.0, 2.9 and 3.9 (then 2.3) of orders 2, 3 and 4. Order 1 is
    `euler`.

    Args:
      order: how many slopes, 1 ... 4 (2).

    Returns:
      A `Solver` whose state is the slopes before.

    References: Liu et al. 2022, arXiv:2209.03003, for the equation; Bashforth & Adams 1883 for the method.
    """
    if not 1 <= order <= HIGHEST:
        raise ValueError(f"flow_ab: order={order}; allowed: 1 ... {HIGHEST}")
    slots = tuple(f"slope{k}" for k in range(1, order))
    points, share = np.polynomial.legendre.leggauss(HIGHEST)

    def lay(steps: Steps, process: Process, times: np.ndarray) -> None:
        u, scale = straighten(process, times)
        for j in range(len(times) - 1):
            nodes = u[max(j - order + 1, 0) : j + 1][::-1]
            du = u[j + 1] - u[j]
            w = scale[j + 1] * du / 2 * (lagrange(nodes, u[j] + du * (1 + points) / 2) @ share)
            x = {"x": scale[j + 1] / scale[j], "eps": w[0], "x0": -w[0], **dict(zip(slots, w[1:], strict=False))}
            kept = {slot: {before: 1.0} for before, slot in zip(slots, slots[1:], strict=False)}
            if slots:
                kept[slots[0]] = {"eps": 1.0, "x0": -1.0}
            steps.row(times[j], j, x=x, **kept)

    return linear(lay, slots)
