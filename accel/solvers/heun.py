"""Heun's method. Karras, Aittala, Aila & Laine, Elucidating the Design Space (EDM), 2022, arXiv:2206.00364."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.core.contracts import Array, Solver
from difax.core.grids import check_times, lay_rows
from difax.core.process import Process

SPACES = ("sigma", "flow")


class HeunTable(NamedTuple):
    """y_s = keep x + slope d + slope_first d_first, with d the slope at this evaluation."""

    x: Array
    slope: Array
    slope_first: Array
    start: Array  # bool: first evaluation of a step


class HeunState(NamedTuple):
    x: jax.Array  # the point that the step started from
    slope: jax.Array  # its slope


def heun(space: str | None = None) -> Solver:
    """Heun's second-order method: Euler to the next time, then the mean of both slopes; 2n - 1 evaluations.

    space "sigma" integrates dy/du = eps with y = x/alpha, u = sigma/alpha, as EDM; "flow" integrates
    dy/du = eps - x0 with y = x/(alpha + sigma), u = sigma/(alpha + sigma), which also works where alpha = 0.
    A last step that ends at t = 0 is a plain Euler step, because the network is not defined there.

    Args:
      space: "sigma", "flow", or None: flow for the flow processes, sigma for the others.

    Returns:
      A `Solver` whose state is the start of the step and its slope.

    Raises:
      ValueError: unknown space; or, from `grid`, space "sigma" with a time where alpha = 0.

    References: Karras et al. 2022, arXiv:2206.00364, algorithm 1 (without churn).
    """
    if space not in (*SPACES, None):
        raise ValueError(f"heun: space={space!r}; allowed: {', '.join(SPACES)}, or None")

    def chosen(process: Process) -> str:
        return space or ("flow" if process.name in ("flow", "sit") else "sigma")

    def grid(process: Process, times: np.ndarray):
        check_times(times)
        level = process.level(times)
        straight = chosen(process) == "flow"
        if not straight and np.any(level.alpha <= 0):
            raise ValueError(
                f"heun: space 'sigma' divides by alpha, which is 0 at t={times[np.argmin(level.alpha)]:g} "
                f"of {process.name}; allowed: space 'flow', or a grid such as karras or log_snr"
            )
        scale = level.alpha + level.sigma if straight else level.alpha
        u = level.sigma / scale
        t, step, rows = [], [], []
        for j in range(len(times) - 1):
            du, ratio, end = u[j + 1] - u[j], scale[j + 1] / scale[j], scale[j + 1]
            t.append(times[j])
            step.append(j)
            rows.append((ratio, end * du, 0.0, True))
            if level.sigma[j + 1] > 0:
                t.append(times[j + 1])
                step.append(j)
                rows.append((ratio, end * du / 2, end * du / 2, False))
        columns = [np.asarray(c) for c in zip(*rows, strict=True)]
        coefficients = (HeunTable(*columns), np.full(len(t), straight))
        return lay_rows(process, np.asarray(t), np.asarray(step), coefficients)

    def step(prediction, x, state, row, keys):
        c, straight = row.coefficients
        slope = prediction.eps - jnp.where(straight, prediction.x0, 0.0)
        start = HeunState(jnp.where(c.start, x, state.x), jnp.where(c.start, slope, state.slope))
        return c.x * start.x + c.slope * slope + c.slope_first * start.slope, start

    return Solver(grid=grid, init=lambda x: HeunState(jnp.zeros_like(x), jnp.zeros_like(x)), step=step)
