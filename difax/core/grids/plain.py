"""Grids that are even in the time: linspace, leading, trailing, quadratic, and times shifted towards noise."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from difax.core.annotations import checked
from difax.core.grids.times import Grid, from_indices
from difax.core.process import Process, check_shift

Spacing = Literal["linspace", "leading", "trailing"]


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
        return from_indices(process, np.round(np.cumsum(np.append(0.0, strides)))[::-1])

    return grid


@checked
def linspace(rounded: bool = True, more: bool = False) -> Grid:
    """Steps evenly spaced between 0 and T - 1, by the rule and the rounding of diffusers' timestep_spacing="linspace".

    On a continuous process t_i = 1 - i/n. `uniform` differs by how it rounds ties, and by n = 1, which is here step 0.

    Args:
      rounded: to whole steps; False leaves them between two, as diffusers' Euler, Heun, LMS and KDPM2.
      more: n + 1 steps of which the last is left out, as diffusers' DPM-Solver, UniPC, DEIS and SA-Solver.

    References: https://github.com/huggingface/diffusers, 0.42.1.
    """

    def grid(process: Process, n: int) -> np.ndarray:
        if process.steps is None:
            return np.linspace(1.0, 0.0, n + 1)
        k = spaced("linspace", process.steps, n, more=more)
        return from_indices(process, np.round(k) if rounded else k)

    return grid


@checked
def leading(steps_offset: int = 0, more: bool = False) -> Grid:
    """Every (T // n)-th discrete step counted from 0, the stride of DDIM and of most DiT caching papers.

    The first evaluation is at k = (n - 1)(T // n), below T - 1.

    Args:
      steps_offset: added to every step, 0 or more (0; 1 in Stable Diffusion).
      more: every (T // (n + 1))-th, the lowest of them left out, as diffusers' DPM-Solver, UniPC, DEIS and SA-Solver.

    References: Song et al. (DDIM), 2020, arXiv:2010.02502.
    """
    if steps_offset < 0:
        raise ValueError(f"leading: steps_offset={steps_offset}; allowed: 0 or more")

    def grid(process: Process, n: int) -> np.ndarray:
        if process.steps is None:
            raise ValueError(f"grid leading needs a process of discrete steps; {process.name} is continuous")
        return from_indices(process, spaced("leading", process.steps, n, steps_offset, more))

    return grid


def trailing() -> Grid:
    """Times t_i = 1 - i/n; on T discrete steps the indices round(T - i T/n) - 1, so the first is always T - 1.

    References: Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, 2023, arXiv:2305.08891.
    """

    def grid(process: Process, n: int) -> np.ndarray:
        if process.steps is None:
            return np.linspace(1.0, 0.0, n + 1)
        return from_indices(process, spaced("trailing", process.steps, n))

    return grid


def spaced(
    spacing: str, steps: int, n: int, offset: int = 0, more: bool = False, last: int | None = None
) -> np.ndarray:
    """Steps k [n] of a discrete process, descending, by the rules that diffusers calls linspace, leading and trailing.

    Args:
      steps: T. offset: added to the steps of "leading". more: are n + 1 laid out, the lowest being left out.
      last: T of the part that is spaced, where the noisiest steps are cut off; then "trailing" may have fewer than n.

    Returns:
      float64; those of "linspace" lie between whole steps.

    Raises:
      ValueError: an offset with which the first step is none of the process.
    """
    last = steps if last is None else last
    if spacing == "linspace":
        return np.linspace(0, last - 1, n + more)[::-1][: n if more else None]
    if spacing == "trailing":  # arange as in the paper and in diffusers, since rounding decides; it can be one too long
        return np.round(np.arange(last, 0, -steps / n)[:n]) - 1
    k = (np.arange(n + more) * (last // (n + more)))[::-1][:n] + offset
    if k[0] >= steps:
        raise ValueError(
            f"leading: steps_offset={offset}; allowed: 0 ... {offset + steps - 1 - int(k[0])} for {n} steps"
        )
    return k.astype(np.float64)


def quadratic() -> Grid:
    """Times evenly spaced in sqrt(t) between t_max and t_min, then 0: denser near the data.

    References: Song et al. (DDIM), 2020, arXiv:2010.02502; DPM-Solver's `time_quadratic`, arXiv:2206.00927.
    """

    def grid(process: Process, n: int) -> np.ndarray:
        low = max(process.t_min, 0.0)
        times = np.linspace(np.sqrt(process.t_max), np.sqrt(low), n) ** 2 if n > 1 else [process.t_max]
        return np.append(times, 0.0)

    return grid


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


@checked
def logit(mu: float = 0.0, scale: float = 1.0) -> Grid:
    """Uniform times moved in log(t/(1 - t)): t' = 1/(1 + e^-mu (1/t - 1)^scale), on any process.

    mu = log s and scale = 1 is `shifted`; scale below 1 draws times to the middle, above 1 to both ends.

    Args:
      mu: towards noise, -7 ... 7. scale: 0.1 ... 10; 1 is the shift of flows.

    References: Esser et al. (SD3), 2024, arXiv:2403.03206; Black Forest Labs 2024 (FLUX's `time_shift`).
    """
    if not -7 <= mu <= 7 or not 0.1 <= scale <= 10:
        raise ValueError(f"logit: mu={mu}, scale={scale}; allowed: -7 ... 7 and 0.1 ... 10")
    return lambda process, n: logit_shift(np.linspace(1.0, 0.0, n + 1), math.exp(mu), scale)


def logit_shift(t: np.ndarray, shift: float, scale: float = 1.0) -> np.ndarray:
    """shift/(shift + (1/t - 1)^scale), in numpy, in float64 unless t is in float32; 0 at t = 0."""
    t = np.asarray(t)
    with np.errstate(divide="ignore"):
        return shift / (shift + (1 / (t if t.dtype == np.float32 else t.astype(np.float64)) - 1) ** scale)
