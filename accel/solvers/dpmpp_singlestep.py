"""DPM-Solver++ 2S and 3S. Lu, Zhou, Bao, Chen, Li & Zhu, DPM-Solver++, 2022, arXiv:2211.01095."""

from __future__ import annotations

from functools import partial

from difax.accel.solvers.bounds import bounded
from difax.accel.solvers.exponential import check_singlestep, lay_singlestep, singlestep_slots
from difax.accel.solvers.linear import linear
from difax.core.annotations import checked
from difax.core.contracts import Solver


@checked
def dpmpp_2s(
    r: float | None = None,
    solver_type: str = "midpoint",
    clip: float | None = None,
    thresholding: float | None = None,
    sample_max_value: float | None = None,
) -> Solver:
    """DPM-Solver++ 2S: single steps of second order on the data prediction, two evaluations each.

    From s to t with h = lambda_t - lambda_s, and s1 where lambda is lambda_s + r h,

      x_1 = (sigma_1/sigma_s) x - alpha_1 (e^{-r h} - 1) D0,
      x_t = (sigma_t/sigma_s) x - alpha_t (e^{-h} - 1) (D0 + (D1 - D0)/(2 r)).

    n steps of the grid are n evaluations: two of them make one single step, the last alone is of first order, and so
    are both halves of a step that ends at sigma = 0 or begins at alpha = 0, where h is infinite.

    Args:
      r: in (0, 1), 0.5 in the paper; None: as the grid's own time in between has it (0.5 on log_snr), as in diffusers
        and, but for rounding, in the authors' sampler.
      solver_type: "midpoint", or "heun", where D1 - D0 weighs its exact integral alpha_t (1 + (e^{-h} - 1)/h)/r
        ("dpmsolver" and "taylor" in the authors' code).
      clip, thresholding, sample_max_value: bounds of the data prediction (`bounds.bounded`).

    Returns:
      A `Solver` whose state is the first prediction of a step.

    References: Lu et al. 2022, arXiv:2211.01095, algorithm 1. First order ends a run as with `lower_order_final` in
      diffusers; the authors' code ends above sigma = 0 instead.
    """
    ratios = check_singlestep("dpmpp_2s", solver_type, r=r)
    lay = partial(lay_singlestep, kind="x0", order=2, solver_type=solver_type, ratios={2: ratios})
    bound = bounded("dpmpp_2s", clip, thresholding, sample_max_value)
    return linear(lay, slots=singlestep_slots(2), bound=bound)


@checked
def dpmpp_3s(
    r1: float | None = None,
    r2: float | None = None,
    solver_type: str = "midpoint",
    stage: str = "exponential",
    clip: float | None = None,
    thresholding: float | None = None,
    sample_max_value: float | None = None,
) -> Solver:
    """DPM-Solver++ 3S: single steps of third order on the data prediction, three evaluations each.

    With g1(h) = 1 - e^{-h}, g2(h) = 1 - g1(h)/h, g3(h) = 1/2 - g2(h)/h, at s1 and s2 where lambda is r1 h and r2 h on,

      x_1 = (sigma_1/sigma_s) x + alpha_1 g1(r1 h) D0,
      x_2 = (sigma_2/sigma_s) x + alpha_2 (g1(r2 h) D0 + (r2/r1) g2(r2 h) (D1 - D0)),
      x_t = (sigma_t/sigma_s) x + alpha_t (g1(h) D0 + g2(h) (D2 - D0)/r2).

    n steps of the grid are n evaluations, three to a single step; what is left over at the end is steps of lower order,
    of orders 2 and 1 where n is divisible by three (DPM-Solver-fast). Steps into sigma = 0 are of first order.

    Args:
      r1, r2: 0 < r1 < r2 < 1, 1/3 and 2/3 in the paper; None (both): as the grid's own times have them. Others than
        these cost the third order, which a smooth grid comes back to in many steps.
      solver_type: "midpoint", or "heun": the second derivative too, from all three outputs ("taylor" of the authors).
      stage: how x_2 weighs D1 - D0: "exponential", or "midpoint": (r2/(2 r1)) g1(r2 h), as diffusers does with solver
        type midpoint.
      clip, thresholding, sample_max_value: bounds of the data prediction (`bounds.bounded`).

    Returns:
      A `Solver` whose state is the first two predictions of a step.

    References: Lu et al. 2022, arXiv:2211.01095, appendix; the authors' code.
    """
    ratios = check_singlestep("dpmpp_3s", solver_type, stage, r1=r1, r2=r2)
    lay = partial(lay_singlestep, kind="x0", order=3, solver_type=solver_type, ratios={3: ratios}, stage=stage)
    bound = bounded("dpmpp_3s", clip, thresholding, sample_max_value)
    return linear(lay, slots=singlestep_slots(3), bound=bound)
