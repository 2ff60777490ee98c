"""Time grids: decreasing times [n + 1] in float64 from noise (t = t_max) to data (t = 0), n model evaluations apart.

Every grid is a factory of hyperparameters that returns `grid(process, n) -> times`. The last entry is t = 0, the
clean sample; the network is never evaluated there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from difax.core.contracts import Row
from difax.core.process import Process, check_shift, log_snr

Grid = Callable[[Process, int], np.ndarray]


def uniform() -> Grid:
    """Evenly spaced times; on T discrete steps the n rounded indices from T - 1 to 0, both included.

    This is `space_timesteps(T, str(n))` of Improved DDPM and DiT; on a continuous process t_i = 1 - i/n.

    References: Nichol & Dhariwal 2021, arXiv:2102.09672; Peebles & Xie 2022, arXiv:2212.09748.
    """

    def grid(process: Process, n: int) -> np.ndarray:
        if process.steps is None:
            return np.linspace(1.0, 0.0, n + 1)
        if n == 1:
            return np.array([1.0, 0.0])
        # summed up from 0 as the original does, since rounding decides on ties
        strides = np.full(n - 1, (process.steps - 1) / (n - 1))
        return _from_indices(process, np.round(np.cumsum(np.append(0.0, strides)))[::-1])

    return grid


def leading() -> Grid:
    """Every (T // n)-th discrete step counted from 0, the stride of DDIM and of most DiT caching papers.

    The first evaluation is at k = (n - 1)(T // n), below T - 1.

    References: Song et al. (DDIM), 2020, arXiv:2010.02502.
    """

    def grid(process: Process, n: int) -> np.ndarray:
        if process.steps is None:
            raise ValueError(f"grid leading needs a process of discrete steps; {process.name} is continuous")
        return _from_indices(process, np.arange(n)[::-1] * (process.steps // n))

    return grid


def trailing() -> Grid:
    """Times t_i = 1 - i/n; on T discrete steps the indices round(T - i T/n) - 1, so the first is always T - 1.

    References: Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, 2023, arXiv:2305.08891.
    """

    def grid(process: Process, n: int) -> np.ndarray:
        if process.steps is None:
            return np.linspace(1.0, 0.0, n + 1)
        # arange as in the paper and in diffusers, since rounding decides on ties; it can be one too long
        return _from_indices(process, np.round(np.arange(process.steps, 0, -process.steps / n)[:n]) - 1)

    return grid


def quadratic() -> Grid:
    """Times evenly spaced in sqrt(t) between t_max and t_min, then 0: denser near the data.

    References: Song et al. (DDIM), 2020, arXiv:2010.02502; DPM-Solver's `time_quadratic`, arXiv:2206.00927.
    """

    def grid(process: Process, n: int) -> np.ndarray:
        low = max(process.t_min, 0.0)
        times = np.linspace(np.sqrt(process.t_max), np.sqrt(low), n) ** 2 if n > 1 else [process.t_max]
        return np.append(times, 0.0)

    return grid


def log_snr_uniform() -> Grid:
    """Times evenly spaced in log(alpha/sigma) between t_max and t_min, then 0 (DPM-Solver's `logSNR`).

    References: Lu et al., DPM-Solver, 2022, arXiv:2206.00927.
    """

    def grid(process: Process, n: int) -> np.ndarray:
        start, end = 0.5 * log_snr(process, np.array([process.t_max, process.t_min]))
        times = process.inverse(np.linspace(start, end, n))
        times[0] = process.t_max
        return np.append(times, 0.0)

    return grid


def karras(rho: float = 7.0) -> Grid:
    """Times evenly spaced in (sigma/alpha)^(1/rho) between t_max and t_min, then 0.

    Args:
      rho: exponent, 0.01 ... 1000 (7 in the paper).

    References: Karras et al. (EDM), 2022, arXiv:2206.00364, equation 5.
    """
    if not 0.01 <= rho <= 1000:
        raise ValueError(f"karras: rho={rho}; allowed: > 0, 0.01 ... 1000")

    def grid(process: Process, n: int) -> np.ndarray:
        start, end = np.exp(-0.5 * log_snr(process, np.array([process.t_max, process.t_min])))
        ratio = np.linspace(start ** (1 / rho), end ** (1 / rho), n) ** rho
        times = process.inverse(-np.log(ratio))
        times[0] = process.t_max
        return np.append(times, 0.0)

    return grid


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
        return _from_indices(process, np.floor(share * last + 1e-9))

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


def shifted(shift: float | None = None) -> Grid:
    """Uniform times of a flow, shifted towards noise: t' = s t/(1 + (s - 1) t).

    Args:
      shift: s, 0.001 ... 1000; None takes the process's own (3 in SD3).

    References: Esser et al. (SD3), 2024, arXiv:2403.03206, equation 23.
    """
    if shift is not None:
        check_shift("shifted", shift)

    def grid(process: Process, n: int) -> np.ndarray:
        if process.name not in ("flow", "sit"):
            raise ValueError(f"grid shifted needs a flow process; {process.name} is none (flow, sit are)")
        return shift_time(np.linspace(1.0, 0.0, n + 1), process.shift if shift is None else shift)

    return grid


def shift_time(t, shift: float):
    """s t/(1 + (s - 1) t), the time shift of flows, on numpy or jax arrays."""
    return shift * t / (1 + (shift - 1) * t)


GRIDS = {
    "uniform": uniform,
    "leading": leading,
    "trailing": trailing,
    "quadratic": quadratic,
    "log_snr": log_snr_uniform,
    "karras": karras,
    "shifted": shifted,
    "fastdpm": fastdpm,
}


MOST_STEPS = 10_000  # of a run: each is tabulated on the host, and planned for one by one


def make_times(grid: Grid, process: Process, n: int) -> np.ndarray:
    """Evaluates a grid and checks it: n in range, times strictly decreasing from at most 1 to 0.

    Raises:
      ValueError: n < 1, more steps than the process has, or a grid that repeats a time.
    """
    if not 1 <= n <= MOST_STEPS:
        raise ValueError(f"steps={n}; allowed: 1 or more, up to {MOST_STEPS}")
    if process.steps is not None and n > process.steps:
        raise ValueError(f"steps={n}; {process.name} has {process.steps} steps; allowed: 1 ... {process.steps}")
    with np.errstate(all="ignore"):  # times that are no numbers are refused
        times = np.asarray(grid(process, n), np.float64)
    check_times(times)
    return times


def check_times(times: np.ndarray) -> None:
    """Raises ValueError unless times decrease strictly within [0, 1]."""
    if times.ndim != 1 or len(times) < 2 or not np.all(np.diff(times) < 0) or times[0] > 1 or times[-1] < 0:
        raise ValueError(f"times must decrease strictly within [0, 1], at least two of them; got {_shown(times)}")


def _shown(times: np.ndarray) -> str:
    """The first times that are not less than the one before them, or all of few."""
    bad = np.flatnonzero(~(np.diff(times) < 0)) if times.ndim == 1 else np.zeros(0, int)
    if times.ndim != 1 or len(times) <= 8 or not len(bad):
        return " ".join(np.array2string(times, threshold=8).split())
    return f"{times[bad[0]]:g} and then {times[bad[0] + 1]:g}, of {len(times)}"


def lay_rows(process: Process, t: np.ndarray, step: np.ndarray, coefficients) -> Row:
    """Rows of the evaluations at times t [E], with the noise levels and model times filled in, all float64.

    Args:
      step: [E] index of the solver step of each evaluation.
      coefficients: the solver's table, a pytree whose leaves lead with [E].
    """
    t = np.asarray(t, np.float64)
    return Row(
        i=np.arange(len(t), dtype=np.int32),
        step=np.asarray(step, np.int32),
        t=t,
        model_time=process.model_time(t),
        level=process.level(t),
        coefficients=coefficients,
        guided=np.zeros(len(t), bool),
        fresh=np.arange(len(t)) == 0,
    )


def _from_indices(process: Process, k: np.ndarray) -> np.ndarray:
    assert process.steps is not None
    return np.append((np.asarray(k, np.float64) + 1) / process.steps, 0.0)
