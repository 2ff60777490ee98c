"""Grids that are even in some measure of the noise level sigma/alpha: EDM's, log-SNR, exponential, beta."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from difax.core.annotations import checked
from difax.core.grids.times import Grid, ratios, times_of_ratios
from difax.core.process import Process

Last = Literal["zero", "sigma_min"]


def level_range(name: str, process: Process, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
    """The smallest and largest sigma/alpha of a grid: what was given, or those of the process at t_min and t_max.

    Raises:
      ValueError: values that the process does not have, or that do not increase.
    """
    low, high = (float(a) for a in ratios(process, np.array([process.t_min, process.t_max])))
    found = (low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max)
    lowest = 0.0 if process.steps is None else low
    highest = float(ratios(process, np.array(1.0)))
    if not (lowest * (1 - 1e-6) <= found[0] < found[1] <= highest * (1 + 1e-6) and found[0] > 0):
        raise ValueError(
            f"{name}: sigma_min={found[0]:g}, sigma_max={found[1]:g}; allowed: sigma_min < sigma_max, of "
            f"{process.name} {lowest:g} ... {highest:g} (sigma/alpha)"
        )
    return max(found[0], lowest), min(found[1], highest)


def ended(times: np.ndarray, last: Last) -> np.ndarray:
    """Times with the clean sample behind them, or as they are: the last of them is where the run ends."""
    return np.append(times, 0.0) if last == "zero" else times


def _even_in(
    name: str, process: Process, n: int, sigma_min: float | None, sigma_max: float | None, last: Last, spread
) -> np.ndarray:
    """Times of the ratios spread(low, high, m), high first; one more of them where the run ends at the lowest."""
    low, high = level_range(name, process, sigma_min, sigma_max)
    return ended(times_of_ratios(process, spread(low, high, n + (last != "zero"))), last)


@checked
def exponential(sigma_min: float | None = None, sigma_max: float | None = None, last: Last = "zero") -> Grid:
    """Times whose sigma/alpha falls by the same factor each, so that log(alpha/sigma) is even, then 0.

    With the whole range of a process this is DPM-Solver's `logSNR`, and what diffusers calls `use_lu_lambdas`; EDM's
    schedulers there call it `sigma_schedule="exponential"`.

    Args:
      sigma_min, sigma_max: of sigma/alpha, above 0; None takes the process's at t_min and t_max.
      last: "zero" adds the clean sample behind sigma_min; "sigma_min" ends the run there.

    References: Lu et al., DPM-Solver, 2022, arXiv:2206.00927.
    """
    return lambda process, n: _even_in("exponential", process, n, sigma_min, sigma_max, last, geometric)


def log_snr_uniform() -> Grid:
    """Times evenly spaced in log(alpha/sigma) between t_max and t_min, then 0 (DPM-Solver's `logSNR`).

    References: Lu et al., DPM-Solver, 2022, arXiv:2206.00927.
    """
    return exponential()


@checked
def karras(
    rho: float = 7.0, sigma_min: float | None = None, sigma_max: float | None = None, last: Last = "zero"
) -> Grid:
    """Times evenly spaced in (sigma/alpha)^(1/rho) between t_max and t_min, then 0.

    Args:
      rho: exponent, 0.01 ... 1000 (7 in the paper).
      sigma_min, sigma_max, last: as of `exponential`.

    References: Karras et al. (EDM), 2022, arXiv:2206.00364, equation 5.
    """
    if not 0.01 <= rho <= 1000:
        raise ValueError(f"karras: rho={rho}; allowed: > 0, 0.01 ... 1000")

    def spread(low: float, high: float, m: int) -> np.ndarray:
        return powers(low, high, m, rho)

    return lambda process, n: _even_in("karras", process, n, sigma_min, sigma_max, last, spread)


@checked
def beta(
    alpha: float = 0.6,
    beta: float = 0.6,
    of: Literal["time", "sigma"] = "time",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    last: Last = "zero",
) -> Grid:
    """Times at even quantiles of a beta distribution: dense at both ends.

    t = t_min + q (t_max - t_min), q the quantiles of Beta(alpha, beta) at 1 ... 0; of="sigma" does so with sigma/alpha,
    as diffusers' `use_beta_sigmas`. Then 0.

    Args:
      alpha, beta: of the distribution, 0.2 ... 100 (0.6 and 0.6 in the paper).
      of: what is distributed so.
      sigma_min, sigma_max, last: as of `exponential`.

    References: Lee et al., Beta Sampling is All You Need, 2024, arXiv:2407.12173.
    """
    for key, value in (("alpha", alpha), ("beta", beta)):
        if not 0.2 <= value <= 100:
            raise ValueError(f"beta: {key}={value}; allowed: > 0, 0.2 ... 100")

    def spread(low: float, high: float, m: int) -> np.ndarray:
        return low + beta_quantiles(1 - np.linspace(0, 1, m), alpha, beta) * (high - low)

    def grid(process: Process, n: int) -> np.ndarray:
        if of == "sigma":
            return _even_in("beta", process, n, sigma_min, sigma_max, last, spread)
        low, high = level_range("beta", process, sigma_min, sigma_max)
        start, end = times_of_ratios(process, np.array([high, low]))
        return ended(spread(end, start, n + (last != "zero")), last)

    return grid


def geometric(low: float, high: float, m: int) -> np.ndarray:
    """m values from high to low, each the same factor below the one before; high alone for m = 1."""
    return np.exp(np.linspace(math.log(high), math.log(low), m))


def powers(low: float, high: float, m: int, rho: float) -> np.ndarray:
    """m values from high to low whose (1/rho)-th powers are even."""
    return np.linspace(high ** (1 / rho), low ** (1 / rho), m) ** rho


def beta_quantiles(q: np.ndarray, a: float, b: float) -> np.ndarray:
    """x with I_x(a, b) = q, the quantiles of a beta distribution, by bisection to 2^-64."""
    q = np.asarray(q, np.float64)
    low, high = np.zeros_like(q), np.ones_like(q)
    for _ in range(64):
        middle = (low + high) / 2
        below = incomplete_beta(middle, a, b) < q
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(q <= 0, 0.0, np.where(q >= 1, 1.0, (low + high) / 2))


def incomplete_beta(x: np.ndarray, a: float, b: float) -> np.ndarray:
    """The regularised incomplete beta function I_x(a, b) for x in [0, 1], by its continued fraction.

    References: Abramowitz & Stegun 1964, 26.5.8; Lentz's evaluation of continued fractions (1976).
    """
    x = np.asarray(x, np.float64)
    swap = x > (a + 1) / (a + b + 2)  # where the fraction converges slowly, I_x(a, b) = 1 - I_{1-x}(b, a)
    p, r, y = np.where(swap, b, a), np.where(swap, a, b), np.where(swap, 1 - x, x)
    with np.errstate(divide="ignore", invalid="ignore"):
        front = p * np.log(y) + r * np.log1p(-y) - (math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))
    tiny = 1e-300
    c, d = np.ones_like(y), 1 - (p + r) * y / (p + 1)
    d = 1 / np.where(np.abs(d) < tiny, tiny, d)
    value = d.copy()
    for m in range(1, 300):
        for term in (
            m * (r - m) * y / ((p + 2 * m - 1) * (p + 2 * m)),
            -(p + m) * (p + r + m) * y / ((p + 2 * m) * (p + 2 * m + 1)),
        ):
            d, c = 1 + term * d, 1 + term / c
            d = 1 / np.where(np.abs(d) < tiny, tiny, d)
            c = np.where(np.abs(c) < tiny, tiny, c)
            value = value * d * c
        if np.all(np.abs(d * c - 1) < 1e-16):
            break
    found = np.where(y > 0, np.exp(front) * value / p, 0.0)
    return np.where(swap, 1 - found, found)
