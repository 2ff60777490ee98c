"""FastDPM's grids. Kong & Ping, On Fast Sampling of Diffusion Probabilistic Models, 2021, arXiv:2106.00132."""

from __future__ import annotations

import numpy as np

from difax.core.grids.times import Grid, from_indices
from difax.core.process import Process, log_snr


def fastdpm(schedule: str = "var", spacing: str = "linear") -> Grid:
    """FastDPM's levels for n steps: by variances ("var") or by steps ("step"), linear or quadratic.

    "var" takes betas of a chain of n steps, b + i d or b (1 + i d)^2 for i = 0 ... n - 1, b that of the process at
    t_min and d such that prod (1 - beta) is the process's at t_max; its levels lie between the discrete steps, and so
    do the times that the network is told. "step" takes floor(i (T - 1)/(n - 1)), or (i/(n - 1))^2 0.8 T rounded down,
    which begins below t_max. With `ddim`, eta = 0 is the paper's DDIM-reverse and eta = 1 its DDPM-reverse.

    Args:
      schedule: "var" or "step" ("var" with many steps, "step" with few, the paper finds).
      spacing: "linear" or "quadratic" (both in the paper).

    References: Kong & Ping 2021, arXiv:2106.00132; https://github.com/zhifengkong/FastDPM_pytorch. Between the steps
      their bijection of levels and times is the Gamma function's, here the process's own, log(alpha) linear in between;
      the times that the network is told differ by less than 0.03 steps. Processes that do not preserve variance are
      taken at the same alpha/sigma.
    """
    if schedule not in ("var", "step"):
        raise ValueError(f"fastdpm: schedule={schedule!r}; allowed: var, step")
    if spacing not in ("linear", "quadratic"):
        raise ValueError(f"fastdpm: spacing={spacing!r}; allowed: linear, quadratic")

    def by_step(process: Process, n: int) -> np.ndarray:
        share = np.linspace(1.0, 0.0, n) if n > 1 else np.ones(1)
        top = 1.0
        if spacing == "quadratic":
            share, top = share**2, 0.8
        if process.steps is None:
            return np.append(process.t_min + share * (top * process.t_max - process.t_min), 0.0)
        last = process.steps - 1 if spacing == "linear" else top * process.steps
        return from_indices(process, np.floor(share * last + 1e-9))

    def by_variance(process: Process, n: int) -> np.ndarray:
        first, last = -np.logaddexp(0.0, -log_snr(process, np.array([process.t_min, process.t_max])))  # log(1 - beta)
        start = -np.expm1(first)
        i = np.arange(n)

        def betas(d: float) -> np.ndarray:
            return start + i * d if spacing == "linear" else start * (1 + i * d) ** 2

        low, high = 0.0, (1 - start) / max(n - 1, 1)
        if spacing == "quadratic":
            high = (1 / np.sqrt(start) - 1) / max(n - 1, 1)
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (low, middle) if np.log1p(-betas(middle)).sum() < last else (middle, high)
        kept = np.cumsum(np.log1p(-betas(low)))[::-1]
        times = process.inverse(0.5 * (kept - np.log(-np.expm1(kept))))
        times[0] = process.t_max
        return np.append(times, 0.0)

    return by_step if schedule == "step" else by_variance
