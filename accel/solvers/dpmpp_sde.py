"""SDE forms of DPM-Solver++: 2M, 3M, and the single steps of k-diffusion. Lu et al. 2022; Crowson 2022."""

from __future__ import annotations

import numpy as np

from difax.accel.solvers.bounds import bounded
from difax.accel.solvers.exponential import check_eta, levels_at, multistep
from difax.accel.solvers.linear import Steps, linear
from difax.core.annotations import checked
from difax.core.contracts import Solver
from difax.core.process import Process


@checked
def dpmpp_2m_sde(
    eta: float = 1.0,
    lower_order_final: int = 10,
    stretch: float = 2.0,
    solver_type: str = "midpoint",
    clip: float | None = None,
    thresholding: float | None = None,
    sample_max_value: float | None = None,
    euler_at_final: bool = False,
) -> Solver:
    """DPM-Solver++ 2M on the reverse SDE, one evaluation and one draw a step.

    With h and r of `dpmpp_2m`, k = 1 + eta and z normal noise,

      x_s = (sigma_s/sigma_t) e^{-eta h} x + alpha_s (1 - e^{-k h}) (D0 + (D0 - D_before)/(2 r))
            + sigma_s sqrt(1 - e^{-2 eta h}) z.

    In first order this is `ddim` with as much noise (DDPM's posterior at eta = 1). eta = 0 is `dpmpp_2m`.

    Args:
      eta: share of the reverse SDE's noise, 0 ... 1 (1: SDE-DPM-Solver++, as the authors and diffusers; k-diffusion
        has it as a setting).
      lower_order_final, stretch: as in `dpmpp_2m`.
      solver_type: "midpoint", or "heun", where the difference weighs its exact integral.
      clip, thresholding, sample_max_value: bounds of the data prediction (`bounds.bounded`).
      euler_at_final: the last step is of first order whatever its end (false; a key of diffusers).

    Returns:
      A `Solver` whose state is the previous data prediction.

    References: Lu et al. 2022, arXiv:2211.01095, section 4.3; Crowson, k-diffusion, 2022 (eta).
    """
    check_eta("dpmpp_2m_sde", eta)
    bound = bounded("dpmpp_2m_sde", clip, thresholding, sample_max_value)
    return multistep(
        "dpmpp_2m_sde", "x0", 2, lower_order_final, stretch, solver_type, bound, euler_at_final=euler_at_final, eta=eta
    )


@checked
def dpmpp_3m_sde(
    eta: float = 1.0,
    lower_order_final: int = 0,
    stretch: float = 2.0,
    solver_type: str = "heun",
    exact: bool = False,
    clip: float | None = None,
    thresholding: float | None = None,
    sample_max_value: float | None = None,
    euler_at_final: bool = False,
) -> Solver:
    """DPM-Solver++ 3M on the reverse SDE, one evaluation and one draw a step.

    `dpmpp_3m` with the decay, the gains of (1 + eta) h and the noise of `dpmpp_2m_sde`. In k-diffusion steps of second
    order are of type heun and none is lowered at the end, which are the defaults here; in diffusers they are of its
    solver type, and lowered at the end below 15 steps. Diffusers weighs D2 by g3 - 1, a sign of the 1/2 in it, which is
    not followed.

    Args:
      eta: share of the reverse SDE's noise, 0 ... 1 (1).
      lower_order_final, stretch: as in `dpmpp_3m`; a large stretch is the rule of k-diffusion and diffusers.
      solver_type: of the steps of second order, "midpoint" or "heun".
      exact: as in `dpmpp_3m`.
      clip, thresholding, sample_max_value: bounds of the data prediction (`bounds.bounded`).
      euler_at_final: the last step is of first order whatever its end (false; a key of diffusers).

    Returns:
      A `Solver` whose state is the two previous data predictions.

    References: Crowson, k-diffusion, 2022; Lu et al. 2022, arXiv:2211.01095.
    """
    check_eta("dpmpp_3m_sde", eta)
    bound = bounded("dpmpp_3m_sde", clip, thresholding, sample_max_value)
    return multistep(
        "dpmpp_3m_sde",
        "x0",
        3,
        lower_order_final,
        stretch,
        solver_type,
        bound,
        euler_at_final=euler_at_final,
        exact=exact,
        eta=eta,
    )


@checked
def dpmpp_sde(
    eta: float = 1.0,
    r: float = 0.5,
    clip: float | None = None,
    thresholding: float | None = None,
    sample_max_value: float | None = None,
) -> Solver:
    """DPM-Solver++ (stochastic) of k-diffusion: two evaluations a step, the noise of both from one Brownian motion.

    With rho = sigma/alpha and y = x/alpha, an ancestral step from s to u goes to rho_d and draws the rest,

      rho_n = eta rho_u sqrt(1 - rho_u^2/rho_s^2),  rho_d = sqrt(rho_u^2 - rho_n^2),
      y_u = (rho_d/rho_s) y + (1 - rho_d/rho_s) D + rho_n w_u,

    first to s1, where lambda is lambda_s + r h, with D = D0, then from s again to t with D = D0 + (D1 - D0)/(2 r). w_u
    is (W(rho_s) - W(rho_u))/sqrt(rho_s - rho_u) of one Brownian motion W over rho: w_t = c w_1 + sqrt(1 - c^2) z with
    c^2 = (rho_s - rho_1)/(rho_s - rho_t). The steps into sigma = 0 and out of alpha = 0 are of one evaluation.

    W runs over rho as in k-diffusion, not over the clock of the reverse SDE, whose correlation `seeds_2` has.

    Args:
      eta: share of the noise, 0 ... 1 (1; 0 is `dpmpp_2s` with r in every step).
      r: where the second evaluation is, in (0, 1) (0.5).
      clip, thresholding, sample_max_value: bounds of the data prediction (`bounds.bounded`).

    Returns:
      A `Solver` of 2n - 1 evaluations in n steps to sigma = 0; its state is the first prediction and noise of a step.

    References: Crowson, k-diffusion `sample_dpmpp_sde`, 2022; diffusers' `DPMSolverSDEScheduler`.
    """
    check_eta("dpmpp_sde", eta)
    if not 0 < r < 1:
        raise ValueError(f"dpmpp_sde: r={r}; allowed: between 0 and 1")

    def lay(steps: Steps, process: Process, times: np.ndarray) -> None:
        half = levels_at(process, times).half
        for j in range(len(times) - 1):
            if not np.isfinite(half[j + 1] - half[j]):
                at = levels_at(process, times[j : j + 2])
                decay = np.sqrt(1 - eta**2)
                x = {"x0": at.alpha[1], "eps": at.sigma[1] * decay, "z1": at.sigma[1] * eta}
                if at.sigma[1] > 0:  # out of alpha = 0: of first order
                    steps.row(times[j], j, x)
                else:
                    steps.row(times[j], j, {"x0": at.alpha[1]})
                continue
            middle = float(process.inverse(half[j] + r * (half[j + 1] - half[j])))
            at = levels_at(process, np.array([times[j], middle, times[j + 1]]))
            q = np.exp(at.half[0] - at.half[1:])  # rho_u/rho_s
            noise = eta * at.sigma[1:] * np.sqrt(1 - q**2)
            down = np.sqrt(1 - eta**2 * (1 - q**2))  # rho_d/rho_u
            first = {"x0": at.alpha[1], "eps": at.sigma[1] * down[0], "z1": noise[0]}
            kept = {"first_x0": {"x0": 1.0}, "first_eps": {"eps": 1.0}, "noise": {"z1": 1.0}}
            steps.row(times[j], j, first, **kept)
            c = np.sqrt((1 - q[0]) / (1 - q[1]))
            new = at.alpha[2] * (1 - q[1] * down[1]) / (2 * r)
            second = {
                "first_x0": at.alpha[2] - new,
                "first_eps": at.sigma[2] * down[1],
                "x0": new,
                "noise": noise[1] * c,
                "z1": noise[1] * np.sqrt(1 - c**2),
            }
            steps.row(middle, j, second)

    bound = bounded("dpmpp_sde", clip, thresholding, sample_max_value)
    return linear(lay, slots=("first_x0", "first_eps", "noise"), noises=1, bound=bound)
