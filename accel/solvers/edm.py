"""EDM's stochastic sampler. Karras, Aittala, Aila & Laine, 2022, arXiv:2206.00364."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from difax.accel.solvers.heun import SLOTS, check_space, lay_step, risen, straight
from difax.accel.solvers.linear import LinearTable, Steps, draw, linear
from difax.core.annotations import OrInfinite, checked
from difax.core.contracts import Array, Solver
from difax.core.process import Process

MOST = math.sqrt(2) - 1  # of gamma


class EDMTable(NamedTuple):
    """The steps, and what is made of the initial noise: first_x x + first_z z."""

    linear: LinearTable
    first_x: Array
    first_z: Array


@checked
def edm(
    order: int = 2,
    s_churn: float = 40.0,
    s_tmin: float = 0.05,
    s_tmax: OrInfinite = 50.0,
    s_noise: float = 1.003,
    space: str | None = None,
) -> Solver:
    """Heun's method (or Euler's) with churn: noise that raises the level before each step.

    In rho = sigma/alpha, where s_tmin <= rho <= s_tmax, a step from rho begins at

      rho^ = (1 + gamma) rho, gamma = min(s_churn/n, sqrt(2) - 1), y^ = y + s_noise sqrt(rho^^2 - rho^2) z,

    y = x/alpha, and goes from there as `heun`. rho^ is at most the process's own at t = 1. Noise is drawn with the
    evaluation before the step; that of the first step, with the initial noise (`Solver.start`).

    Args:
      order: 2, Heun's, 2n - 1 evaluations; or 1, Euler's (EulerDiscrete and EDMEuler of diffusers), n of them.
      s_churn: 0 (no noise, which is `heun`) or more (40 for ImageNet 64, 30 and 80 for CIFAR-10's VP and VE).
      s_tmin, s_tmax: in units of rho, 0 or more (0.05 and 50 for ImageNet 64; 0.01 and 1 for CIFAR-10's VP).
      s_noise: factor of the noise, above 0, up to 2 (1.003 for ImageNet 64, 1.007 for CIFAR-10).
      space: as in `heun`.

    Returns:
      A `Solver` whose state is the start of the step and its slope.

    References: Karras et al. 2022, arXiv:2206.00364, algorithm 2 and table 5. The schedulers of diffusers add
      the noise behind the evaluation, which is made at x and rho, and take its output for one at x^ and rho^.
    """
    if order not in (1, 2):
        raise ValueError(f"edm: order={order}; allowed: 1, 2")
    if s_churn < 0:
        raise ValueError(f"edm: s_churn={s_churn}; allowed: 0 or more")
    if not 0 <= s_tmin <= s_tmax:
        raise ValueError(f"edm: s_tmin={s_tmin}, s_tmax={s_tmax}; allowed: 0 <= s_tmin <= s_tmax")
    if not 0 < s_noise <= 2:
        raise ValueError(f"edm: s_noise={s_noise}; allowed: > 0, up to 2")
    check_space("edm", space)

    def raised(process: Process, times: np.ndarray) -> np.ndarray:
        """The time at which each step begins."""
        level, last = process.level(times[:-1]), process.level(np.ones(()))
        gamma = min(s_churn / (len(times) - 1), MOST)
        with np.errstate(divide="ignore"):
            rho, most = level.sigma / level.alpha, last.sigma / last.alpha
        up = np.minimum(rho * (1 + gamma), most)
        churned = (rho >= s_tmin) & (rho <= s_tmax) & (up > rho)
        with np.errstate(divide="ignore"):
            return np.where(churned, np.minimum(process.inverse(-np.log(up)), 1.0), times[:-1])

    def lay(steps: Steps, process: Process, times: np.ndarray) -> None:
        up = raised(process, times)
        n = len(up)
        for j in range(n):
            rise = risen(process, times[j + 1], up[j + 1], s_noise) if _higher(times, up, j + 1) else lambda x: x
            t, s = up[j], times[j + 1]
            flow = straight("edm", space, process, np.array([t, s]))[0]
            lay_step(steps, process, t, s, j, flow, order == 2, rise)

    base = linear(lay, SLOTS, noises=int(s_churn > 0))
    if s_churn == 0:
        return base

    def grid(process: Process, times: np.ndarray):
        rows, up = base.grid(process, times), raised(process, times)
        first = {"x": 1.0}
        if _higher(times, up, 0):
            first = risen(process, times[0], up[0], s_noise)(first)
        x, z = (np.full(len(rows.i), first.get(key, 0.0)) for key in ("x", "z1"))
        return rows._replace(coefficients=EDMTable(rows.coefficients, x, z))

    def start(x, row, keys):
        return row.coefficients.first_x * x + row.coefficients.first_z * draw(keys, x, 0)

    def step(prediction, x, state, row, keys):
        return base.step(prediction, x, state, row._replace(coefficients=row.coefficients.linear), keys)

    return base._replace(grid=grid, step=step, start=start)


def _higher(times: np.ndarray, up: np.ndarray, j: int) -> bool:
    return j < len(up) and bool(up[j] > times[j])
