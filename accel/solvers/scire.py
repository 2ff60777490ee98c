"""SciRE-Solver. Li, Chen & Zeng, Score-integrand Solver with Recursive Difference, 2023, arXiv:2308.07896."""

from __future__ import annotations

import numpy as np

from difax.accel.solvers.bounds import bounded
from difax.accel.solvers.exponential import blocks, check_ratios, levels_at, singlestep_slots
from difax.accel.solvers.linear import Steps, linear
from difax.core.annotations import checked
from difax.core.contracts import Solver
from difax.core.process import Process


@checked
def scire_2(
    phi: float | None = None,
    r: float | None = None,
    clip: float | None = None,
    thresholding: float | None = None,
    sample_max_value: float | None = None,
) -> Solver:
    """SciRE-Solver-2: single steps on eps along the noise-to-signal ratio, two evaluations each.

    With rho = sigma/alpha, h = rho_t - rho_s and s1 where rho is rho_s + r h,

      x_1 = alpha_1 (x/alpha_s + r h eps0),
      x_t = alpha_t (x/alpha_s + h eps0 + h/(2 r phi) (eps1 - eps0)).

    phi is the paper's correction of the difference as an estimate of the derivative (recursive difference). It is not
    1, so that the method measures order 1: the derivative is taken 1/phi = 1.5 to 1.6 times too large, however short
    the steps. With phi = 1 it is the midpoint rule in rho, of order 2.

    n steps of the grid are n evaluations, laid out as in `dpmpp_2s`.

    Args:
      phi: in (0, 1]; None: the authors' phi_1(m) = sum_{k=1}^m (-1)^{k-1}/k!, m growing to the middle of the run and
        falling again, 0.625 ... 0.667; the constants that they name are (e - 1)/e = 0.632 and 2/3.
      r: in (0, 1) (0.5 in the paper); None: as the grid's own time in between has it (the authors, for discrete steps).
      clip, thresholding, sample_max_value: bounds of the data prediction, which eps follows (`bounds.bounded`).

    Returns:
      A `Solver` whose state is the first prediction of a step.

    References: Li et al. 2023, arXiv:2308.07896; the authors' code (scire_v1, singlestep).
    """
    return _scire("scire_2", 2, phi, {"r": r}, bounded("scire_2", clip, thresholding, sample_max_value))


@checked
def scire_3(
    phi: float | None = None,
    r1: float | None = None,
    r2: float | None = None,
    clip: float | None = None,
    thresholding: float | None = None,
    sample_max_value: float | None = None,
) -> Solver:
    """SciRE-Solver-3: single steps on eps along the noise-to-signal ratio, three evaluations each.

    With the rho and h of `scire_2`, s1 and s2 where rho is r1 h and r2 h on,

      x_1 = alpha_1 (x/alpha_s + r1 h eps0),
      x_2 = alpha_2 (x/alpha_s + r2 h eps0 + r2 h/(2 r1 phi) (eps1 - eps0)),
      x_t = alpha_t (x/alpha_s + h eps0 + h/(2 r2 phi) (eps2 - eps0)).

    It measures order 1 for the reason in `scire_2`, and order 2 with phi = 1: x_2 is as in the authors' code, where a
    rule of third order has r2^2 for r2.

    n steps of the grid are n evaluations, laid out as in `dpmpp_3s`.

    Args:
      phi: as in `scire_2`.
      r1, r2: 0 < r1 < r2 < 1, 1/3 and 2/3 in the paper; None (both): as the grid's own times have them.
      clip, thresholding, sample_max_value: bounds of the data prediction, which eps follows (`bounds.bounded`).

    Returns:
      A `Solver` whose state is the first predictions of a step.

    References: Li et al. 2023, arXiv:2308.07896; the authors' code (scire_v1, singlestep).
    """
    return _scire("scire_3", 3, phi, {"r1": r1, "r2": r2}, bounded("scire_3", clip, thresholding, sample_max_value))


def _phis(steps: int, n: int) -> list[float]:
    """The authors' phi of each step: partial sums up to the middle of n steps and back, at most `steps` of them."""
    k = np.arange(1, n + 3)
    sums = np.cumsum((-1.0) ** (k - 1) * np.cumprod(1.0 / k))[2:]  # from m = 3 on
    at = [2 * j if j < n // 2 else -1 if j == n // 2 or j >= n else 2 * (n - j) - 1 for j in range(steps)]
    return [float(sums[i]) for i in at]


def _scire(name: str, order: int, phi: float | None, ratios: dict[str, float | None], bound) -> Solver:
    if phi is not None and not 0 < phi <= 1:
        raise ValueError(f"{name}: phi={phi}; allowed: above 0, up to 1")
    shares = check_ratios(name, **ratios)

    def lay(steps: Steps, process: Process, times: np.ndarray) -> None:
        laid = blocks(times, levels_at(process, times).half, order)
        n = max((len(times) - 1) // order, 1)
        phis = [phi] * len(laid) if phi is not None else _phis(len(laid), n)
        for step, ((i, p), correction) in enumerate(zip(laid, phis, strict=True)):
            t = times[i : i + p + 1].copy()
            if p == order and shares is not None:
                ends = levels_at(process, t[[0, -1]])
                rho = ends.sigma / ends.alpha
                t[1:-1] = process.inverse(-np.log(rho[0] + np.asarray(shares) * (rho[1] - rho[0])))
            _step(steps, step, t, levels_at(process, t), correction)

    def _step(steps: Steps, step: int, t: np.ndarray, at, phi: float) -> None:
        p = len(t) - 1
        steps_in_rho = at.sigma / at.alpha - at.sigma[0] / at.alpha[0] if p > 1 else np.zeros(2)
        for k in range(p):
            names = ("x0", "eps") if k == 0 else ("first_x0", "first_eps")
            x = {names[0]: at.alpha[k + 1], names[1]: at.sigma[k + 1]}
            if k:
                # h/(2 r phi) with h and r h of the whole step, r h/(2 r phi) of a part of it
                c = at.alpha[k + 1] * steps_in_rho[p] / (2 * phi * steps_in_rho[k])
                c *= steps_in_rho[k + 1]
                x |= {"eps": c, "first_eps": x["first_eps"] - c}
            kept = {"first_x0": {"x0": 1.0}, "first_eps": {"eps": 1.0}} if k == 0 and p > 1 else {}
            steps.row(t[k], step, x, **kept)

    return linear(lay, slots=singlestep_slots(2), bound=bound)
