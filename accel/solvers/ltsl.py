"""Learned schedules. Learning to Schedule in Diffusion Probabilistic Models, KDD 2023, doi:10.1145/3580305.3599412."""

from __future__ import annotations

from typing import Any

import numpy as np

from difax.accel.solvers.learned import check_steps, read_learned, scattered
from difax.accel.solvers.linear import linear, tabulated
from difax.core.annotations import checked
from difax.core.contracts import Array, Level, Solver
from difax.core.grids import check_times, lay_rows
from difax.core.process import Process


@checked
def ltsl(file: str | None = None) -> Solver:
    """DDIM at learned times, with a learned scale of each part of a step.

    x_s = c_i alpha_s x0 + d_i sigma_s eps

    `difax calibrate --solver ltsl` learns both, in two levels: the times by descent on the quality of the samples, and
    c and d, at these times, on the distance to the samples of many steps.

    Args:
      file: of `difax calibrate --solver ltsl`. Its times are taken and not those of the grid; the run has as many steps
        as the file has evaluations. None is DDIM (c = d = 1), with which learning begins.

    Returns:
      A `Solver` without state.

    References: doi:10.1145/3580305.3599412, whose rule could not be read: that the schedule and the parameters of the
      sampler are learned in two levels, against a reward of sample quality, is what is known of it. Which parameters
      and which reward is our reading.
    """
    if file is None:
        return linear(_lay)
    found = read_learned("ltsl", file, {"times": ("n",), "data": ("n",), "noise": ("n",)})
    t, n = found["times"], len(found["times"])

    def grid(process: Process, times: np.ndarray):
        check_times(times)
        check_steps("ltsl", file, times, n)
        table = scaled_table(found["data"], found["noise"], process.level(np.append(t[1:], 0.0)))
        return lay_rows(process, t, np.arange(n), tabulated(table))

    return linear(lambda *_: None)._replace(grid=grid)


def _lay(steps, process: Process, times: np.ndarray) -> None:
    level = process.level(times[1:])
    for j in range(len(times) - 1):
        steps.row(times[j], j, x={"x0": level.alpha[j], "eps": level.sigma[j]})


def scaled_table(data: Array, noise: Array, level: Level, xp: Any = np) -> Array:
    """W [n, 1, 3] of the linear engine, without slots.

    Args:
      data, noise: [n], c and d. level: at the ends of the n steps. xp: numpy, or jax.numpy.
    """
    every = np.arange(len(data))
    return scattered((len(data), 1, 3), [(every, 0, 1, data * level.alpha), (every, 0, 2, noise * level.sigma)], xp)
