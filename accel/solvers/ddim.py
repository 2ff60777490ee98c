"""DDIM. Song, Meng & Ermon, Denoising Diffusion Implicit Models, 2020, arXiv:2010.02502."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from difax.core.annotations import checked
from difax.core.contracts import Array, Solver
from difax.core.grids import check_times, lay_rows
from difax.core.noise import normal_like
from difax.core.process import Process


class DDIMTable(NamedTuple):
    x0: Array
    eps: Array
    noise: Array


@checked
def ddim(eta: float = 0.0) -> Solver:
    """DDIM, the deterministic (eta = 0) to ancestral (eta = 1) family, for any (alpha, sigma).

    x_s = alpha_s x0 + sqrt(sigma_s^2 - w^2) eps + w z,
    w = eta (sigma_s/sigma_t) sqrt(sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2),

    where w at eta = 1 is the standard deviation of q(x_s | x_t, x0); for a variance-preserving process this is
    equation 16 of the paper.

    Args:
      eta: stochasticity in [0, 1] (0 in the paper's fast sampler).

    Returns:
      A `Solver` without state.

    References: Song et al. 2020, arXiv:2010.02502, equations 12 and 16.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim: eta={eta}; allowed: 0 ... 1")

    def grid(process: Process, times: np.ndarray):
        check_times(times)
        table = ddim_table(process, times, eta)
        return lay_rows(process, times[:-1], np.arange(len(table.eps)), table)

    def step(prediction, x, state, row, keys):
        c = row.coefficients
        x = c.x0 * prediction.x0 + c.eps * prediction.eps
        if eta > 0:
            x = x + c.noise * normal_like(keys, x)
        return x, state

    return Solver(grid=grid, init=lambda x: (), step=step)


def ddim_table(process: Process, times: np.ndarray, eta: float) -> DDIMTable:
    """Weights [n] of x0, eps and noise in the steps between times [n + 1]."""
    t, s = process.level(times[:-1]), process.level(times[1:])
    between = t.sigma**2 - (t.alpha / s.alpha) ** 2 * s.sigma**2
    w = eta * s.sigma / t.sigma * np.sqrt(np.maximum(between, 0.0))
    return DDIMTable(s.alpha, np.sqrt(np.maximum(s.sigma**2 - w**2, 0.0)), w)
