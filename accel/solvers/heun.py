"""Heun's method. Karras, Aittala, Aila & Laine, Elucidating the Design Space (EDM), 2022, arXiv:2206.00364."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.core.annotations import checked
from difax.core.contracts import Array, Level, Solver
from difax.core.grids import check_times, lay_rows
from difax.core.process import Process

SPACES = ("sigma", "flow")
STRETCH = 4.0  # of 1 + sigma/alpha, over one step


class HeunTable(NamedTuple):
    """y_s = keep x + slope d + slope_first d_first, with d the slope at this evaluation."""

    x: Array
    slope: Array
    slope_first: Array
    start: Array  # bool: first evaluation of a step


class HeunState(NamedTuple):
    x: jax.Array  # the point that the step started from
    slope: jax.Array  # its slope


@checked
def heun(space: str | None = None) -> Solver:
    """Heun's second-order method: Euler to the next time, then the mean of both slopes; 2n - 1 evaluations.

    space "sigma" integrates dy/du = eps with y = x/alpha, u = sigma/alpha, as EDM; "flow" integrates
    dy/du = eps - x0 with y = x/(alpha + sigma), u = sigma/(alpha + sigma), which also works where alpha = 0.
    A last step that ends at t = 0 is a plain Euler step, because the network is not defined there.

    In "sigma" the mean of the slopes is off by du/2 times their difference, which a step over which 1 + u falls by more
    than a factor of 4 turns into an error above the samples (the first steps of vp_cosine: 500 times, in 8 uniform
    steps). Such a step is taken in "flow" where the space is left to the method. Why 4: error all in "sigma" over error
    so, geometric mean over four denoisers of known data, of 5 to 50 steps:

      largest (1 + u_t)/(1 + u_s)   to 4   4 to 5        5 to 6       6 to 12     above 12
      error                         1      0.99 to 1.2   0.98 to 14   1.0 to 9    1.2 to 9000

    Args:
      space: "sigma", "flow", or None: flow for the flow processes, for the others sigma but for such steps.

    Returns:
      A `Solver` whose state is the start of the step and its slope.

    Raises:
      ValueError: unknown space; or, from `grid`, space "sigma" with a time where alpha = 0.

    References: Karras et al. 2022, arXiv:2206.00364, algorithm 1 (without churn).
    """
    if space not in (*SPACES, None):
        raise ValueError(f"heun: space={space!r}; allowed: {', '.join(SPACES)}, or None")

    def straight(process: Process, level: Level) -> np.ndarray:
        """Which steps are taken in "flow"."""
        if space is not None or process.name in ("flow", "sit"):
            return np.full(len(level.sigma) - 1, space != "sigma")
        scale = level.alpha + level.sigma
        return scale[:-1] * level.alpha[1:] > STRETCH * scale[1:] * level.alpha[:-1]

    def grid(process: Process, times: np.ndarray):
        check_times(times)
        level = process.level(times)
        if space == "sigma" and np.any(level.alpha <= 0):
            raise ValueError(
                f"heun: space 'sigma' divides by alpha, which is 0 at t={times[np.argmin(level.alpha)]:g} "
                f"of {process.name}; allowed: space 'flow', or a grid such as karras or log_snr"
            )
        flow = straight(process, level)
        t, step, rows = [], [], []
        for j in range(len(times) - 1):
            ends = Level(*(a[j : j + 2] for a in level))
            scale = ends.alpha + ends.sigma if flow[j] else ends.alpha
            u = ends.sigma / scale
            du, ratio, end = u[1] - u[0], scale[1] / scale[0], scale[1]
            t.append(times[j])
            step.append(j)
            rows.append((ratio, end * du, 0.0, True))
            if level.sigma[j + 1] > 0:
                t.append(times[j + 1])
                step.append(j)
                rows.append((ratio, end * du / 2, end * du / 2, False))
        columns = [np.asarray(c) for c in zip(*rows, strict=True)]
        coefficients = (HeunTable(*columns), flow[step])
        return lay_rows(process, np.asarray(t), np.asarray(step), coefficients)

    def step(prediction, x, state, row, keys):
        c, straight = row.coefficients
        slope = prediction.eps - jnp.where(straight, prediction.x0, 0.0)
        start = HeunState(jnp.where(c.start, x, state.x), jnp.where(c.start, slope, state.slope))
        return c.x * start.x + c.slope * slope + c.slope_first * start.slope, start

    return Solver(grid=grid, init=lambda x: HeunState(jnp.zeros_like(x), jnp.zeros_like(x)), step=step)
