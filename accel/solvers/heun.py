"""Heun's method. Karras, Aittala, Aila & Laine, Elucidating the Design Space (EDM), 2022, arXiv:2206.00364."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from difax.accel.solvers.bounds import bounded
from difax.accel.solvers.linear import Steps, linear
from difax.core.annotations import checked
from difax.core.contracts import Level, Solver
from difax.core.process import Process

SPACES = ("sigma", "flow")
STRETCH = 4.0  # of 1 + sigma/alpha, over one step
SLOTS = ("start", "slope")  # of a step: the point that it started from, its slope there

Weights = dict[str, float]


@checked
def heun(space: str | None = None, clip: float | None = None) -> Solver:
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
      clip: bound of |x0|, which eps follows, or None (none, as in the paper; a key of diffusers).

    Returns:
      A `Solver` whose state is the start of the step and its slope.

    Raises:
      ValueError: unknown space; or, from `grid`, space "sigma" with a time where alpha = 0.

    References: Karras et al. 2022, arXiv:2206.00364, algorithm 1 (without churn, which is `edm`).
    """
    check_space("heun", space)

    def lay(steps: Steps, process: Process, times: np.ndarray) -> None:
        flow = straight("heun", space, process, times)
        for j in range(len(times) - 1):
            lay_step(steps, process, times[j], times[j + 1], j, flow[j])

    return linear(lay, SLOTS, bound=bounded("heun", clip))


def check_space(name: str, space: str | None) -> None:
    """Refuses an unknown space."""
    if space not in (*SPACES, None):
        raise ValueError(f"{name}: space={space!r}; allowed: {', '.join(SPACES)}, or None")


def straight(name: str, space: str | None, process: Process, times: np.ndarray) -> np.ndarray:
    """Which steps between times [n + 1] are taken in "flow", [n].

    Raises:
      ValueError: space "sigma" with a time where alpha = 0.
    """
    level = process.level(times)
    if space == "sigma" and np.any(level.alpha <= 0):
        raise ValueError(
            f"{name}: space 'sigma' divides by alpha, which is 0 at t={times[np.argmin(level.alpha)]:g} "
            f"of {process.name}; allowed: space 'flow', or a grid such as karras or log_snr"
        )
    if space is not None or process.name in ("flow", "sit"):
        return np.full(len(times) - 1, space != "sigma")
    scale = level.alpha + level.sigma
    return scale[:-1] * level.alpha[1:] > STRETCH * scale[1:] * level.alpha[:-1]


def coordinates(level: Level, flow: bool) -> tuple[float, float]:
    """(u, scale) of a level: x = scale y, and y moves along u."""
    scale = level.alpha + level.sigma if flow else level.alpha
    return level.sigma / scale, scale


def slope(flow: bool, weight: float) -> Weights:
    """Weights of dy/du times a number."""
    return {"eps": weight, "x0": -weight} if flow else {"eps": weight}


def lay_step(
    steps: Steps,
    process: Process,
    t: float,
    s: float,
    step: int,
    flow: bool,
    second: bool = True,
    rise: Callable[[Weights], Weights] = lambda x: x,
) -> None:
    """The rows of one step of Heun's from t to s, on `SLOTS`.

    Args:
      flow: is it taken in "flow". second: with the mean of both slopes, unless sigma = 0 at s; else Euler's.
      rise: what is made of the weights of x at s, such as noise to begin the next step with.
    """
    start, end = process.level(t), process.level(s)
    (u, before), (v, after) = coordinates(start, flow), coordinates(end, flow)
    ratio, du = after / before, after * (v - u)
    straight_on = {"x": ratio, **slope(flow, du)}
    if not second or end.sigma == 0:
        steps.row(t, step, x=rise(straight_on))
        return
    steps.row(t, step, x=straight_on, start={"x": 1.0}, slope=slope(flow, 1.0))
    steps.row(s, step, x=rise({"start": ratio, **slope(flow, du / 2), "slope": du / 2}))


def risen(process: Process, s: float, up: float, factor: float = 1.0) -> Callable[[Weights], Weights]:
    """Noise that raises the level from s to a higher one: x -> (alpha_up/alpha_s) x + w z.

    w = factor alpha_up sqrt(rho_up^2 - rho_s^2), rho = sigma/alpha.

    Returns:
      What adds it to the weights of x at s.
    """
    low, high = process.level(s), process.level(up)
    ratio = high.alpha / low.alpha
    w = factor * np.sqrt(max(high.sigma**2 - (ratio * low.sigma) ** 2, 0.0))
    return lambda x: {**{key: ratio * value for key, value in x.items()}, "z1": w}
