"""Learned non-Markovian samplers (GGDM). Watson, Chan, Ho & Norouzi, 2022, arXiv:2202.05830."""

from __future__ import annotations

from typing import Any

import numpy as np

from difax.accel.solvers.ddim import width
from difax.accel.solvers.learned import check_steps, kept, read_learned, scattered
from difax.accel.solvers.linear import linear, tabulated
from difax.core.annotations import checked
from difax.core.contracts import Array, Solver
from difax.core.grids import check_times, lay_rows
from difax.core.process import Process


@checked
def ddss(file: str | None = None, eta: float = 0.0) -> Solver:
    """A generalised Gaussian diffusion model: each x is mixed of all earlier ones, all predictions and noise.

    x_{i+1} = sum_{j <= i} mu_ij x_j + sum_{j <= i} nu_ij x0(x_j, t_j) + w_i z_i

    `difax calibrate --solver ddss` learns mu, nu, w and t by descent through the sampler, from DDIM, so that features
    of samples are distributed as those of many steps are (differentiable diffusion sampler search).

    Args:
      file: of `difax calibrate --solver ddss`. Its times are taken and not those of the grid; the run has as many steps
        as the file has evaluations. None is the DDIM that learning begins with:
      eta: its stochasticity in [0, 1] (0).

    Returns:
      A `Solver` whose state is all earlier x and predictions.

    References: Watson et al. 2022, arXiv:2202.05830, sections 3 and 4. Here mu and nu are free of each other (their
      GGDM with all past predictions and with learned times).
    """
    if file is None:
        if not 0 <= eta <= 1:
            raise ValueError(f"ddss: eta={eta}; allowed: 0 ... 1")

        def lay(steps, process: Process, times: np.ndarray) -> None:
            last, data, noise = ddim_mix(process, times, eta)
            for j in range(len(last)):
                steps.row(times[j], j, x={"x": last[j], "x0": data[j], "z1": noise[j]})

        return linear(lay, noises=1)
    shapes = {"times": ("n",), "mu": ("n", "n"), "nu": ("n", "n"), "noise": ("n",)}
    found = read_learned("ddss", file, shapes)
    t, n = found["times"], len(found["times"])

    def grid(process: Process, times: np.ndarray):
        check_times(times)
        check_steps("ddss", file, times, n)
        return lay_rows(process, t, np.arange(n), tabulated(mixed_table(found["mu"], found["nu"], found["noise"])))

    return linear(lambda *_: None, mixed_slots(n), noises=1)._replace(grid=grid)


def ddim_mix(process: Process, times: np.ndarray, eta: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights [n] of x, x0 and noise in the steps of DDIM."""
    t, s = process.level(times[:-1]), process.level(times[1:])
    noise = width(t, s, eta)
    last = np.sqrt(np.maximum(s.sigma**2 - noise**2, 0.0)) / t.sigma
    return last, s.alpha - last * t.alpha, noise


def mixed_slots(n: int) -> tuple[str, ...]:
    """What a table of n evaluations keeps: all x but the last, and all predictions but the last."""
    return (*(f"x_{j}" for j in range(n - 1)), *(f"x0_{j}" for j in range(n - 1)))


def mixed_table(mu: Array, nu: Array, noise: Array, xp: Any = np) -> Array:
    """W [n, outputs, inputs] of the linear engine, with `mixed_slots(n)` and one noise.

    Args:
      mu, nu: [n, n], of which the lower triangles are read. noise: [n]. xp: numpy, or jax.numpy.
    """
    n = len(noise)
    every, own, (i, j) = np.arange(n), np.arange(n - 1), np.tril_indices(n, -1)
    slot, prediction, z = 3, 3 + n - 1, 3 + 2 * (n - 1)  # inputs; an output comes two before its input
    entries = [
        (every, 0, 0, xp.diagonal(mu)),
        (every, 0, 1, xp.diagonal(nu)),
        (i, 0, slot + j, mu[i, j]),
        (i, 0, prediction + j, nu[i, j]),
        (every, 0, z, noise),
        (own, slot - 2 + own, 0, 1.0),
        (own, prediction - 2 + own, 1, 1.0),
        *kept(n, slot - 2, slot),
        *kept(n, prediction - 2, prediction),
    ]
    return scattered((n, 1 + 2 * (n - 1), z + 1), entries, xp)
