"""SA-Solver. Xue, Yi, Luo, Zhang, Sun, Li & Ma, SA-Solver: Stochastic Adams Solver, 2023, arXiv:2309.05019."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from difax.accel.solvers.adams import Ladder, Update, exponential, ladder, lay_adams, order_at, slots_of
from difax.accel.solvers.bounds import bounded
from difax.accel.solvers.linear import Steps, linear
from difax.core.annotations import checked
from difax.core.contracts import Solver
from difax.core.process import Process


@checked
def sa_solver(
    tau: float | Callable[[float], float] = 1.0,
    interval: Sequence[float] = (0.2, 0.8),
    variable: Literal["time", "sigma"] = "time",
    predictor_order: int = 2,
    corrector_order: int = 2,
    few_steps: bool = True,
    lower_order_final: bool = True,
    thresholding: float | None = None,
    sample_max_value: float | None = None,
) -> Solver:
    """Stochastic Adams predictor and corrector on the data prediction, of any amount of noise.

    The reverse SDE whose noise is tau times that of the time reversal has, for a tau that is constant over a step, with
    h = lambda_s - lambda_t and r = 1 + tau^2, the solution

      x_s = (sigma_s/sigma_t) e^{-tau^2 h} x + alpha_s r int e^{r (lambda - lambda_s)} x0 d lambda
            + sigma_s sqrt(1 - e^{-2 tau^2 h}) z,

    whose integral is taken of the polynomial through the last outputs (predictor), or through these and the new one
    (corrector, which keeps the predictor's z). tau is that of the time at which the step begins.

    Args:
      tau: in `interval`, 0 elsewhere; 0 or more (1). 0 is the probability flow. A function of the variable, in place
        of both.
      interval: lowest and highest value of the variable at which there is noise, both included ([0.2, 0.8]: steps 200
        to 800 of 1000, as the authors and diffusers have them; [0, 1] is everywhere).
      variable: "time", k/T of discrete processes and t of the others; or "sigma", sigma/alpha, in which the paper's
        intervals for EDM's networks are ([0.05, 1] for CIFAR-10, [0.05, 50] for ImageNet 64).
      predictor_order: outputs that the predictor uses, 1 ... 4 (2 with guidance, 3 without).
      corrector_order: outputs that the corrector uses, the new one included, 0 ... 4, 0 for none (2 with guidance, 4
        without; 3 in text to image).
      few_steps: order 2 takes int r e^{r (lambda - lambda_s)} (lambda - lambda_t) as r h^2/2, which is of third order
        from it, as the authors do for few steps and diffusers always.
      lower_order_final: the last steps are of order ..., 2, 1 (true).
      thresholding, sample_max_value: dynamic thresholding of the data prediction (`bounds.bounded`).

    Returns:
      A `Solver` whose state is the past outputs, the corrected start of the step and its noise.

    References: Xue et al. 2023, arXiv:2309.05019, equations 14 to 18 and algorithm 1. Of the forms, the data prediction
      alone is here; the paper finds it better, and the other has noise left at sigma = 0. diffusers and the authors
      stop at the smallest sigma of the process, the authors with one more step to the data prediction, as here to 0.
    """
    if not callable(tau) and not tau >= 0:
        raise ValueError(f"sa_solver: tau={tau}; allowed: 0 or more")
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1]:
        raise ValueError(f"sa_solver: interval={list(interval)}; allowed: lowest and highest value, 0 or more")
    if not 1 <= predictor_order <= 4:
        raise ValueError(f"sa_solver: predictor_order={predictor_order}; allowed: 1 ... 4")
    if not 0 <= corrector_order <= 4:
        raise ValueError(f"sa_solver: corrector_order={corrector_order}; allowed: 0 ... 4")
    noisy = callable(tau) or tau > 0
    corrects = corrector_order > 0

    def taus(process: Process, times: np.ndarray, levels: Ladder) -> np.ndarray:
        at = times - 1 / process.steps if process.steps else times
        if variable == "sigma":
            with np.errstate(over="ignore"):
                at = np.exp(-levels.half)
        if callable(tau):
            return np.array([_checked_tau(tau(float(value))) for value in at[:-1]])
        # a step k that is an end of the interval lies within it whatever the rounding of k/T
        low, high = np.nextafter(interval[0], -1) - 1e-12, np.nextafter(interval[1], np.inf) + 1e-12
        return np.where((at[:-1] >= low) & (at[:-1] <= high), tau, 0.0)

    def lay(steps: Steps, process: Process, times: np.ndarray) -> None:
        levels, n = ladder(process, times), len(times) - 1
        noise = taus(process, times, levels)
        half = levels.half

        def moved(j: int, nodes: np.ndarray) -> Update:
            full = exponential(levels, j, nodes, "data", noise[j])
            h = half[j + 1] - half[j]
            if len(nodes) != 2 or not few_steps or not np.isfinite(h) or not np.isfinite(half[nodes]).all():
                return full
            one = exponential(levels, j, np.array([j]), "data", noise[j])
            other = nodes[nodes != j][0]
            change = levels.level.alpha[j + 1] * (1 + noise[j] ** 2) * h**2 / 2 / (half[other] - half[j])
            return one._replace(outputs=np.where(nodes == j, one.outputs[0] - change, change))

        def predict(j: int) -> Update:
            order = order_at(predictor_order, j, n, levels, lower_order_final)
            return moved(j, np.arange(j, j - order, -1))

        def correct(j: int) -> Update:
            order = min(corrector_order, j + 1, n - j + 2 if lower_order_final else j + 1)
            return moved(j - 1, np.arange(j, j - order, -1))

        lay_adams(steps, times, levels, "x0", predict, correct if corrects else None)

    kept = max(predictor_order, corrector_order) - 1
    bound = bounded("sa_solver", None, thresholding, sample_max_value)
    return linear(lay, slots_of(kept, corrects, noisy), noises=int(noisy), bound=bound)


def _checked_tau(value: float) -> float:
    if not 0 <= value < np.inf:
        raise ValueError(f"sa_solver: tau gives {value}; allowed: 0 or more")
    return value
