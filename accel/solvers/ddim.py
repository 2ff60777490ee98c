"""DDIM. Song, Meng & Ermon, Denoising Diffusion Implicit Models, 2020, arXiv:2010.02502."""

from __future__ import annotations

import numpy as np

from difax.accel.solvers.bounds import bounded
from difax.accel.solvers.linear import Steps, linear
from difax.core.annotations import checked
from difax.core.contracts import Level, Solver
from difax.core.process import Process

SIGMA_DATA = 0.5  # of the boundary condition of LCM


@checked
def ddim(
    eta: float = 0.0,
    gamma: float | None = None,
    boundary: float | None = None,
    clip: float | None = None,
    thresholding: float | None = None,
    sample_max_value: float | None = None,
    equal_steps: bool = False,
) -> Solver:
    """DDIM, the deterministic (eta = 0) to ancestral (eta = 1) family, for any (alpha, sigma).

    x_s = alpha_s x0 + sqrt(sigma_s^2 - w^2) eps + w z,
    w = eta (sigma_s/sigma_t) sqrt(sigma_t^2 - (alpha_t/alpha_s)^2 sigma_s^2),

    where w at eta = 1 is the standard deviation of q(x_s | x_t, x0); for a variance-preserving process this is
    equation 16 of the paper. `gamma` gives the width as networks distilled to few steps want it: the step goes down to
    s' = (1 - gamma) s without noise and up again with it,

    w^2 = sigma_s^2 - (alpha_s sigma_s'/alpha_s')^2,

    which is TCD's strategic stochastic sampling, and at gamma = 1 multistep consistency sampling, x0 with noise of the
    whole width sigma_s (LCM; on a flow FlowMatchLCM, and FlowMatchEuler with stochastic_sampling, of diffusers).

    Args:
      eta: stochasticity in [0, 1] (0 in the paper's fast sampler).
      gamma: in [0, 1] instead of eta (0.3 in TCD, 1 in LCM); on T discrete steps s' is a whole step, rounded down.
      boundary: LCM's timestep_scaling c, 0.001 ... 1e6 (10 in LCM; None: no scaling), with gamma = 1: x0 is then
        (0.25 x + q sqrt(q^2 + 0.25) x0)/(q^2 + 0.25), q = c times what the network is told. It is x itself at q = 0,
        and changes the second digit below 1/c alone.
      clip, thresholding, sample_max_value: bounds of the data prediction (`bounds.bounded`). eps stays as predicted, as
        in diffusers without use_clipped_model_output.
      equal_steps: each of n steps goes T // n discrete steps down, wherever the grid goes on, as diffusers' DDIM does:
        the same on "leading", and on "trailing" where n divides T; elsewhere x is not at the level of the next time.

    Returns:
      A `Solver` without state.

    References: Song et al. 2020, arXiv:2010.02502, equations 12 and 16; Luo et al. (LCM) 2023, arXiv:2310.04378,
      algorithm 3; Zheng et al. (TCD) 2024, arXiv:2402.19159, algorithm 4. TCD in diffusers ends at the first discrete
      step and not at t = 0 (times that end there do the same), and at gamma = 1 still goes down to that step's level.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim: eta={eta}; allowed: 0 ... 1")
    if gamma is not None and not 0 <= gamma <= 1:
        raise ValueError(f"ddim: gamma={gamma}; allowed: 0 ... 1, or None")
    if gamma is not None and eta > 0:
        raise ValueError(f"ddim: eta={eta} and gamma={gamma} both say how much noise; allowed: one of them")
    if boundary is not None and gamma != 1:
        raise ValueError(f"ddim: boundary={boundary} with gamma={gamma}; allowed: with gamma=1, or None")
    if boundary is not None and not 1e-3 <= boundary <= 1e6:
        raise ValueError(f"ddim: boundary={boundary}; allowed: 0.001 ... 1e6, or None")

    bound = bounded("ddim", clip, thresholding, sample_max_value)

    def lay(steps: Steps, process: Process, times: np.ndarray) -> None:
        ends = _equal_ends(process, times) if equal_steps else times[1:]
        t, s = process.level(times[:-1]), process.level(ends)
        w = width(t, s, eta) if gamma is None else _down_and_up(process, ends, s, gamma)
        eps = np.sqrt(np.maximum(s.sigma**2 - w**2, 0.0))
        skip, out = np.zeros(len(w)), np.ones(len(w))
        if boundary is not None:
            q = boundary * process.model_time(times[:-1])
            skip = SIGMA_DATA**2 / (q**2 + SIGMA_DATA**2)
            out = q / np.sqrt(q**2 + SIGMA_DATA**2)
        for j in range(len(w)):
            x = {"x": s.alpha[j] * skip[j], "x0": s.alpha[j] * out[j], "eps": eps[j], "z1": w[j]}
            steps.row(times[j], j, x=x)

    return linear(lay, noises=1, bound=bound, follows=False)


@checked
def euler_ancestral(eta: float = 1.0) -> Solver:
    """Euler's method of k-diffusion with ancestral noise: DDIM with eta = 1, step for step.

    With y = x/alpha and rho = sigma/alpha, the step goes to rho_down = sqrt(rho_s^2 - rho_up^2) without noise and adds
    rho_up z, rho_up = eta rho_s sqrt(1 - rho_s^2/rho_t^2), which is DDIM's width over alpha_s.

    Args:
      eta: in [0, 1] (1).

    References: Crowson, k-diffusion, `sample_euler_ancestral`; EulerAncestralDiscreteScheduler of diffusers.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"euler_ancestral: eta={eta}; allowed: 0 ... 1")
    return ddim(eta)


def width(t: Level, s: Level, eta: float) -> np.ndarray:
    """Standard deviation of DDIM's noise in a step from t to s."""
    between = t.sigma**2 - (t.alpha / s.alpha) ** 2 * s.sigma**2
    return eta * s.sigma / t.sigma * np.sqrt(np.maximum(between, 0.0))


def _equal_ends(process: Process, times: np.ndarray) -> np.ndarray:
    """Where steps of T // n discrete steps end, and the grid's own end for those that would go below the first one."""
    if process.steps is None:
        raise ValueError(f"ddim: equal_steps=True needs discrete steps; {process.name} is continuous; allowed: false")
    k = np.round(times[:-1] * process.steps) - process.steps // (len(times) - 1)
    return np.where(k > 0, k / process.steps, times[-1])


def _down_and_up(process: Process, s: np.ndarray, at: Level, gamma: float) -> np.ndarray:
    """The width with which a step goes down to (1 - gamma) s and up to s again."""
    down = (1 - gamma) * s
    if process.steps is not None and gamma < 1:  # rounding of k, not of the product of floats
        k = np.round(s * process.steps) - 1
        down = np.where(s > 0, (np.floor((1 - gamma) * k + 1e-9) + 1) / process.steps, 0.0)
    low = process.level(down)
    return np.sqrt(np.maximum(at.sigma**2 - (at.alpha * low.sigma / low.alpha) ** 2, 0.0))
