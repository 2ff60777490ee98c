"""PNDM and iPNDM. Liu, Ren, Lin & Zhao, Pseudo Numerical Methods for Diffusion Models, 2022, arXiv:2202.09778."""

from __future__ import annotations

from typing import Literal

import numpy as np

from difax.accel.solvers.adams import (
    Ladder,
    Mix,
    Update,
    combine,
    from_prediction,
    ladder,
    lay_adams,
    past,
    ratio_of,
    slots_of,
)
from difax.accel.solvers.linear import Steps, linear
from difax.core.annotations import checked
from difax.core.contracts import Solver
from difax.core.process import Process

# Adams-Bashforth of steps of equal length, newest first
ADAMS_BASHFORTH = {
    1: np.array([1.0]),
    2: np.array([3.0, -1.0]) / 2,
    3: np.array([23.0, -16.0, 5.0]) / 12,
    4: np.array([55.0, -59.0, 37.0, -9.0]) / 24,
}


@checked
def pndm(order: int = 4, start: Literal["prk", "plms"] = "plms") -> Solver:
    """Adams-Bashforth of equal steps in the noise prediction, carried over by DDIM's step.

      x_s = phi(x, e, t -> s) = (alpha_s/alpha_t) x + (sigma_s - alpha_s sigma_t/alpha_t) e
      e = (55 e_j - 59 e_{j-1} + 37 e_{j-2} - 9 e_{j-3})/24,      or (3 e_j - e_{j-1})/2

    Before there are enough outputs, order 4 takes three steps of four evaluations each ("prk", F-PNDM: the stages of
    the classical Runge-Kutta method, of which e_j is the first, with times halfway between t and s); or it takes steps
    of lower order ("plms"), the first of two evaluations, at t and at s, whose mean it goes by. Order 2 begins so too
    (S-PNDM). So prk has n + 9 evaluations and the others n + 1, and a time is evaluated twice; out of alpha = 0 the
    first step is DDIM's, of one evaluation. prk multiplies rounding where alpha grows much in its first steps.

    Args:
      order: 2 (S-PNDM) or 4 (F-PNDM) (4).
      start: "prk" (the paper's F-PNDM; diffusers with `skip_prk_steps=False`) or "plms" (Stable Diffusion's,
        `skip_prk_steps=True`).

    Returns:
      A `Solver` whose state is the start of a step, the mean so far, and the past noise predictions.

    Raises:
      ValueError: from `grid`, fewer than four steps to sigma = 0 for prk, which evaluates the network at the ends of
        three; times at which alpha = 0.

    References: Liu et al. 2022, arXiv:2202.09778, algorithms 1 and 2. diffusers takes the halfway time on whole steps,
      rounded down, and stops at the smallest sigma unless `set_alpha_to_one`.
    """
    if order not in (2, 4):
        raise ValueError(f"pndm: order={order}; allowed: 2, 4")
    prk = order == 4 and start == "prk"

    def lay(steps: Steps, process: Process, times: np.ndarray) -> None:
        levels, n = ladder(process, times), len(times) - 1
        alpha, sigma = levels.level.alpha, levels.level.sigma
        if prk and alpha[0] == 0:
            raise ValueError(
                f"pndm: start='prk' divides by alpha, which is 0 at t={times[0]:g} of {process.name}; allowed: "
                "start='plms', or a grid such as karras or log_snr"
            )
        if prk and n < 3 + (sigma[-1] == 0):
            raise ValueError(f"pndm: steps={n}; allowed: 4 or more with start='prk'; start='plms' takes any number")
        for j in range(n):
            if prk and j < 3:
                _pseudo_runge_kutta(steps, process, times, j, order)
            elif j == 0 and sigma[1] > 0 and alpha[0] > 0:
                _improved_euler(steps, levels, times, order)
            else:
                known = [{"eps": 1.0}, *({past(k): 1.0} for k in range(1, order))]
                weights = _equal_steps(levels, j, min(order, j + 1)).outputs
                steps.row(times[j], j, x=from_prediction(levels, j, weights, known), **_shifted(order))

    return linear(lay, ("start", *(("mean",) if prk else ()), *slots_of(order - 1)))


def _equal_steps(levels: Ladder, j: int, order: int) -> Update:
    """phi from time j to j + 1 by Adams-Bashforth."""
    ratio, sigma = ratio_of(levels, j), levels.level.sigma
    return Update(ratio, (sigma[j + 1] - ratio * sigma[j]) * ADAMS_BASHFORTH[order])


def _transfer(levels: Ladder, j: int, k: int, x: Mix, e: Mix) -> dict[str, float]:
    """phi from time j to time k of the ladder."""
    alpha, sigma = levels.level.alpha, levels.level.sigma
    ratio = alpha[k] / alpha[j]
    return combine((ratio, x), (sigma[k] - ratio * sigma[j], e))


def _shifted(order: int) -> dict[str, Mix]:
    """The slots of past outputs after this one."""
    return {past(k): {past(k - 1): 1.0} if k > 1 else {"eps": 1.0} for k in range(1, order)}


def _improved_euler(steps: Steps, levels: Ladder, times: np.ndarray, order: int) -> None:
    """The first step: to s by e(t), and again from the start by the mean of e(t) and e(s), which is not kept."""
    first = _transfer(levels, 0, 1, {"x": 1.0}, {"eps": 1.0})
    steps.row(times[0], 0, x=first, start={"x": 1.0}, **_shifted(order))
    mean = {past(1): 0.5, "eps": 0.5}
    steps.row(times[1], 0, x=_transfer(levels, 0, 1, {"start": 1.0}, mean))


def _pseudo_runge_kutta(steps: Steps, process: Process, times: np.ndarray, j: int, order: int) -> None:
    """Four evaluations from times[j] to times[j + 1]; the first is the output that is kept."""
    t, s = times[j], times[j + 1]
    points = np.array([t, (t + s) / 2, s])
    levels, x, e = ladder(process, points), {"start": 1.0}, {"eps": 1.0}
    first = _transfer(levels, 0, 1, {"x": 1.0}, e)
    steps.row(t, j, x=first, start={"x": 1.0}, mean={"eps": 1 / 6}, **_shifted(order))
    for k in (1, 2):
        steps.row(points[1], j, x=_transfer(levels, 0, k, x, e), mean={"mean": 1.0, "eps": 1 / 3})
    steps.row(s, j, x=_transfer(levels, 0, 2, x, {"mean": 1.0, "eps": 1 / 6}))


@checked
def ipndm(order: int = 4, zero_at_noise: bool = False) -> Solver:
    """PNDM's steps without a start of its own: Adams-Bashforth of equal steps, of order 1, 2, 3, then 4.

    One evaluation a step (Zhang & Chen 2022 name it iPNDM); x_s and the weights are those of `pndm`.

    Args:
      order: 1 ... 4 (4).
      zero_at_noise: out of alpha = 0, where eps is x and says nothing of the image, take x0 for 0, as diffusers'
        IPNDMScheduler does; else it is the predicted one.

    Returns:
      A `Solver` whose state is the past noise predictions.

    References: Zhang & Chen 2022, arXiv:2204.13902, appendix; diffusers' IPNDMScheduler, which is bound to a process of
      its own (`trig`).
    """
    if not 1 <= order <= 4:
        raise ValueError(f"ipndm: order={order}; allowed: 1 ... 4")

    def lay(steps: Steps, process: Process, times: np.ndarray) -> None:
        levels = ladder(process, times)
        lay_adams(steps, times, levels, "eps", lambda j: _equal_steps(levels, j, min(order, j + 1)))
        if zero_at_noise and levels.level.alpha[0] == 0:
            steps.weights[0][steps.outputs.index("x"), steps.inputs.index("x0")] = 0.0

    return linear(lay, slots_of(order - 1))
