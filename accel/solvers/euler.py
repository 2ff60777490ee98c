"""Euler's method on the flow ODE. Liu, Gong & Liu, Flow Straight and Fast, 2022, arXiv:2209.03003."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from difax.core.contracts import Array, Solver
from difax.core.grids import check_times, lay_rows
from difax.core.process import Process


class EulerTable(NamedTuple):
    x: Array
    velocity: Array


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

    def grid(process: Process, times: np.ndarray):
        check_times(times)
        u, scale = straighten(process, times)
        table = EulerTable(x=scale[1:] / scale[:-1], velocity=scale[1:] * np.diff(u))
        return lay_rows(process, times[:-1], np.arange(len(times) - 1), table)

    def step(prediction, x, state, row, keys):
        c = row.coefficients
        return c.x * x + c.velocity * (prediction.eps - prediction.x0), state

    return Solver(grid=grid, init=lambda x: (), step=step)
