"""DEIS. Zhang & Chen, Fast Sampling of Diffusion Models with Exponential Integrator, 2022, arXiv:2204.13902."""

from __future__ import annotations

from typing import Literal

import numpy as np

from difax.accel.solvers.adams import Ladder, Update, combine, exponential, ladder, lay_adams, ratio_of, slots_of
from difax.accel.solvers.bounds import bounded
from difax.accel.solvers.linear import Steps, linear
from difax.accel.solvers.quadrature import integrated_lagrange
from difax.core.annotations import checked
from difax.core.contracts import Solver
from difax.core.process import Process

# order -> a [stages, stages], b [stages], c [stages] of the Runge-Kutta methods of the paper's rhoRK
RUNGE_KUTTA = {
    1: ([[0.0]], [1.0], [0.0]),
    2: ([[0.0, 0.0], [1.0, 0.0]], [0.5, 0.5], [0.0, 1.0]),
    3: ([[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [-1.0, 2.0, 0.0]], [1 / 6, 2 / 3, 1 / 6], [0.0, 0.5, 1.0]),
    4: (
        [[0.0, 0.0, 0.0, 0.0], [0.5, 0.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]],
        [1 / 6, 1 / 3, 1 / 3, 1 / 6],
        [0.0, 0.5, 0.5, 1.0],
    ),
}


@checked
def deis(
    kind: Literal["tab", "rhoab", "logrho", "rhork"] = "tab",
    order: int = 3,
    lower_order_final: int = 0,
    thresholding: float | None = None,
    sample_max_value: float | None = None,
) -> Solver:
    """Exponential integrator on the noise prediction, in rho = sigma/alpha: with y = x/alpha, dy/d rho = eps.

      x_s = alpha_s (x/alpha_t + sum_i eps_{j-i} int l_i d rho)

    with l_i the Lagrange polynomials of the last `order` evaluations, in one of three variables: the time (tab), rho
    (rhoab, which is the Adams-Bashforth method of `lms`), or log rho (logrho, as in diffusers' DEISMultistepScheduler).
    "rhork" is a Runge-Kutta method in rho instead: Heun's of order 2, Kutta's of order 3, the classical one of order 4,
    with as many evaluations a step. The first steps are of lower order. A step to sigma = 0 is of first order, but in
    rhoab; the network is not evaluated there. So is one out of alpha = 0.

    Args:
      kind: "tab", "rhoab", "logrho" or "rhork" (tab, the paper's best).
      order: how many evaluations a step rests on, 1 ... 4 (3; the paper counts degrees of polynomials, so that its
        tAB3 is order 4 here).
      lower_order_final: with fewer steps than this, the last steps are of order ..., 2, 1 (0, never, as in the paper;
        15 in diffusers).
      thresholding, sample_max_value: dynamic thresholding of the data prediction, which eps follows (`bounds.bounded`).

    Returns:
      A `Solver` whose state is the past noise predictions, or the stages of a step.

    References: Zhang & Chen 2022, arXiv:2204.13902, equations 14 and 15 and appendix on rhoRK. The authors integrate by
      10 000 points on the left ends of intervals; here it is Gauss-Legendre in rho, in float64: diffusers' closed forms
      cancel in float32 (its order 3 diverges above 80 steps).
    """
    if not 1 <= order <= 4:
        raise ValueError(f"deis: order={order}; allowed: 1 ... 4")
    if lower_order_final < 0:
        raise ValueError(f"deis: lower_order_final={lower_order_final}; allowed: 0 or more")

    def lay(steps: Steps, process: Process, times: np.ndarray) -> None:
        levels, n = ladder(process, times), len(times) - 1
        if kind == "rhork":
            return lay_runge_kutta(steps, process, times, levels, order)

        def predict(j: int) -> Update:
            many = min(order, j + 1)
            if n < lower_order_final:
                many = min(many, n - j)
            return adams_bashforth(process, times, levels, j, many, kind)

        return lay_adams(steps, times, levels, "eps", predict)

    stages = tuple(f"stage{k + 1}" for k in range(order - 1))
    bound = bounded("deis", None, thresholding, sample_max_value)
    return linear(lay, ("start", *stages) if kind == "rhork" else slots_of(order - 1), bound=bound)


def adams_bashforth(process: Process, times: np.ndarray, levels: Ladder, j: int, order: int, kind: str) -> Update:
    """The step from times[j] by the last `order` noise predictions, interpolated in a variable; one at rho = infinity
    is left out of those in rho."""
    nodes = np.arange(j, j - order, -1)
    alpha, sigma = levels.level.alpha, levels.level.sigma
    if kind != "tab" and alpha[nodes[-1]] == 0:
        nodes = nodes[:-1] if len(nodes) > 1 else nodes
    if len(nodes) == 1 or (sigma[j + 1] == 0 and kind != "rhoab"):
        return exponential(levels, j, nodes[:1], "noise")
    if kind == "logrho":
        return exponential(levels, j, nodes, "noise")
    start, end = sigma[j : j + 2] / alpha[j : j + 2]
    if kind == "rhoab":
        weights = integrated_lagrange(sigma[nodes] / alpha[nodes], start, end)
    else:
        weights = integrated_lagrange(times[nodes], start, end, lambda r: process.inverse(-np.log(r)))
    return Update(ratio_of(levels, j), alpha[j + 1] * weights)


def lay_runge_kutta(steps: Steps, process: Process, times: np.ndarray, levels: Ladder, order: int) -> None:
    """The rows of rhoRK: a step's x waits in "start", its noise predictions in "stage1", ..."""
    alpha, sigma = levels.level.alpha, levels.level.sigma
    for j in range(len(times) - 1):
        if alpha[j] == 0 or sigma[j + 1] == 0:
            steps.row(times[j], j, x={"x0": alpha[j + 1], "eps": sigma[j + 1]})
            continue
        a, b, c = RUNGE_KUTTA[order]
        rho, drho = sigma[j] / alpha[j], sigma[j + 1] / alpha[j + 1] - sigma[j] / alpha[j]
        points = [float(process.inverse(-np.log(rho + share * drho))) for share in c]
        points = [times[j] if s == 0 else times[j + 1] if s == 1 else t for s, t in zip(c, points, strict=True)]
        scales = process.level(np.asarray(points)).alpha
        for k in range(len(b)):
            start = {"x": 1 / alpha[j]} if k == 0 else {"start": 1 / alpha[j]}
            known = [*({f"stage{i + 1}": 1.0} for i in range(k)), {"eps": 1.0}]
            last = k == len(b) - 1
            slopes, scale = (b, alpha[j + 1]) if last else (a[k + 1], scales[k + 1])
            terms = [(scale * drho * w, mix) for w, mix in zip(slopes, known, strict=False)]
            slots = {} if last else {f"stage{k + 1}": {"eps": 1.0}}
            if k == 0 and not last:
                slots["start"] = {"x": 1.0}
            steps.row(points[k], j, x=combine((scale, start), *terms), **slots)
