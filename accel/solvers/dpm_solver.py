"""DPM-Solver of orders 2 and 3, single-step and multistep. Lu, Zhou, Bao, Chen, Li & Zhu, 2022, arXiv:2206.00927.

Names are as the field has them: s is a single step of several evaluations, m a multistep method of one a step. On noise
predictions; `dpmpp_2s` and so on are the same on data predictions. The first order of all of them is `ddim`.
"""

from __future__ import annotations

from functools import partial

from difax.accel.solvers.bounds import bounded
from difax.accel.solvers.exponential import (
    check_singlestep,
    lay_singlestep,
    multistep,
    singlestep_slots,
)
from difax.accel.solvers.linear import linear
from difax.core.annotations import checked
from difax.core.contracts import Solver


@checked
def dpm_solver_2s(
    r: float | None = None,
    solver_type: str = "midpoint",
    clip: float | None = None,
    thresholding: float | None = None,
    sample_max_value: float | None = None,
) -> Solver:
    """DPM-Solver-2: single steps of second order on the noise prediction, two evaluations each.

    From s to t with h = lambda_t - lambda_s, and s1 where lambda is lambda_s + r h,

      x_1 = (alpha_1/alpha_s) x - sigma_1 (e^{r h} - 1) eps0,
      x_t = (alpha_t/alpha_s) x - sigma_t (e^h - 1) (eps0 + (eps1 - eps0)/(2 r)).

    n steps of the grid are n evaluations, laid out as in `dpmpp_2s`.

    Args:
      r: in (0, 1), 0.5 in the paper; None: as the grid's own time in between has it.
      solver_type: "midpoint" or "heun" ("dpmsolver" and "taylor" in the authors' code), as in `dpmpp_2s`.
      clip, thresholding, sample_max_value: bounds of the data prediction, which eps follows (`bounds.bounded`).

    Returns:
      A `Solver` whose state is the first prediction of a step.

    References: Lu et al. 2022, arXiv:2206.00927, algorithm 1.
    """
    ratios = check_singlestep("dpm_solver_2s", solver_type, r=r)
    lay = partial(lay_singlestep, kind="eps", order=2, solver_type=solver_type, ratios={2: ratios})
    bound = bounded("dpm_solver_2s", clip, thresholding, sample_max_value)
    return linear(lay, slots=singlestep_slots(2), bound=bound)


@checked
def dpm_solver_3s(
    r1: float | None = None,
    r2: float | None = None,
    solver_type: str = "midpoint",
    stage: str = "exponential",
    clip: float | None = None,
    thresholding: float | None = None,
    sample_max_value: float | None = None,
) -> Solver:
    """DPM-Solver-3: single steps of third order on the noise prediction, three evaluations each.

    With f1(h) = e^h - 1, f2(h) = f1(h)/h - 1, at s1 and s2 where lambda is r1 h and r2 h on,

      x_1 = (alpha_1/alpha_s) x - sigma_1 f1(r1 h) eps0,
      x_2 = (alpha_2/alpha_s) x - sigma_2 (f1(r2 h) eps0 + (r2/r1) f2(r2 h) (eps1 - eps0)),
      x_t = (alpha_t/alpha_s) x - sigma_t (f1(h) eps0 + f2(h) (eps2 - eps0)/r2).

    n steps of the grid are n evaluations (DPM-Solver-fast), laid out as in `dpmpp_3s`.

    Args:
      r1, r2: 0 < r1 < r2 < 1, 1/3 and 2/3 in the paper; None (both): as the grid's own times have them.
      solver_type, stage: as in `dpmpp_3s`.
      clip, thresholding, sample_max_value: bounds of the data prediction, which eps follows (`bounds.bounded`).

    Returns:
      A `Solver` whose state is the first two predictions of a step.

    References: Lu et al. 2022, arXiv:2206.00927, algorithm 2 and section 3.4.
    """
    ratios = check_singlestep("dpm_solver_3s", solver_type, stage, r1=r1, r2=r2)
    lay = partial(lay_singlestep, kind="eps", order=3, solver_type=solver_type, ratios={3: ratios}, stage=stage)
    bound = bounded("dpm_solver_3s", clip, thresholding, sample_max_value)
    return linear(lay, slots=singlestep_slots(3), bound=bound)


@checked
def dpm_solver_2m(
    lower_order_final: int = 10,
    stretch: float = 2.0,
    solver_type: str = "midpoint",
    clip: float | None = None,
    thresholding: float | None = None,
    sample_max_value: float | None = None,
    euler_at_final: bool = False,
) -> Solver:
    """Multistep DPM-Solver of second order on the noise prediction, one evaluation a step.

    With h = lambda_s - lambda_t and r = h_before/h,

      x_s = (alpha_s/alpha_t) x - sigma_s (e^h - 1) (eps0 + (eps0 - eps_before)/(2 r)).

    Steps of first order are those of `dpmpp_2m`.

    Args:
      lower_order_final, stretch: as in `dpmpp_2m`.
      solver_type: "midpoint", or "heun", where the difference weighs its exact integral -sigma_s ((e^h - 1)/h - 1).
      clip, thresholding, sample_max_value: bounds of the data prediction, which eps follows (`bounds.bounded`).
      euler_at_final: the last step is of first order whatever its end (false; a key of diffusers).

    Returns:
      A `Solver` whose state is the previous noise prediction.

    References: Lu et al. 2022, arXiv:2206.00927 and arXiv:2211.01095; the authors' code.
    """
    bound = bounded("dpm_solver_2m", clip, thresholding, sample_max_value)
    return multistep(
        "dpm_solver_2m", "eps", 2, lower_order_final, stretch, solver_type, bound, euler_at_final=euler_at_final
    )


@checked
def dpm_solver_3m(
    lower_order_final: int = 10,
    stretch: float = 2.0,
    solver_type: str = "midpoint",
    exact: bool = False,
    clip: float | None = None,
    thresholding: float | None = None,
    sample_max_value: float | None = None,
    euler_at_final: bool = False,
) -> Solver:
    """Multistep DPM-Solver of three outputs on the noise prediction, one evaluation a step.

    With f1 = e^h - 1, f2 = f1/h - 1, f3 = f2/h - 1/2 and the differences D1, D2 of `dpmpp_3m`, of eps,

      x_s = (alpha_s/alpha_t) x - sigma_s (f1 eps0 + f2 D1 + f3 D2).

    It measures order 2, and 3 if `exact`, as `dpmpp_3m` does and for the same reason.

    Args:
      lower_order_final, stretch, solver_type, exact: as in `dpmpp_3m`.
      clip, thresholding, sample_max_value: bounds of the data prediction, which eps follows (`bounds.bounded`).
      euler_at_final: the last step is of first order whatever its end (false; a key of diffusers).

    Returns:
      A `Solver` whose state is the two previous noise predictions.

    References: Lu et al. 2022, arXiv:2206.00927 and arXiv:2211.01095; the authors' code.
    """
    bound = bounded("dpm_solver_3m", clip, thresholding, sample_max_value)
    return multistep(
        "dpm_solver_3m",
        "eps",
        3,
        lower_order_final,
        stretch,
        solver_type,
        bound,
        euler_at_final=euler_at_final,
        exact=exact,
    )
