"""Ancestral sampling of DDPM. Ho, Jain & Abbeel, Denoising Diffusion Probabilistic Models, 2020, arXiv:2006.11239."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from difax.accel.solvers.bounds import bounded
from difax.core.annotations import checked
from difax.core.contracts import Array, Solver
from difax.core.grids import check_times, lay_rows
from difax.core.noise import normal_like
from difax.core.process import Process, learned_log_variance

VARIANCES = ("learned", "small", "large")
LEAST_VARIANCE = 1e-20  # that diffusers has for the 0 of the last step


class DDPMTable(NamedTuple):
    x: Array
    x0: Array
    log_beta: Array
    log_beta_tilde: Array
    noisy: Array


@checked
def ddpm(
    variance: str = "small",
    clip: float | None = None,
    thresholding: float | None = None,
    sample_max_value: float | None = None,
    end_noise: bool = False,
) -> Solver:
    """Ancestral sampling x_s ~ N(mean, variance) on any decreasing times, for any (alpha, sigma).

    With a = alpha_t/alpha_s and b^2 = sigma_t^2 - a^2 sigma_s^2 (the beta of the respaced chain),

      mean = (a sigma_s^2 x + alpha_s b^2 x0)/sigma_t^2, beta~ = b^2 sigma_s^2/sigma_t^2,

    and the variance is beta~ ("small"), b^2 ("large"), or exp(w log b^2 + (1 - w) log beta~) with the network's own
    w ("learned", Improved DDPM and DiT). No noise is added in the last step.

    Args:
      variance: "small", "large" or "learned" (small in the paper's tables; learned in DiT).
      clip: bound of |x0|, or None (DiT samples without clipping).
      thresholding, sample_max_value: dynamic thresholding of x0 instead (`bounds.bounded`).
      end_noise: is noise added in the last step too, where it is not taken from the first discrete step: what diffusers
        does to grids whose last evaluation is at a later one. Its "small" variance is 0 there, "large" and "learned"
        ones leave noise in the image.

    Returns:
      A `Solver` without state.

    References: Ho et al. 2020, arXiv:2006.11239, equation 7; Nichol & Dhariwal 2021, arXiv:2102.09672, equation 15.
    """
    if variance not in VARIANCES:
        raise ValueError(f"ddpm: variance={variance!r}; allowed: {', '.join(VARIANCES)}")
    if clip is not None and not clip > 0:
        raise ValueError(f"ddpm: clip={clip}; allowed: > 0, or None")
    bound = bounded("ddpm", clip, thresholding, sample_max_value)

    def grid(process: Process, times: np.ndarray):
        check_times(times)
        t, s = process.level(times[:-1]), process.level(times[1:])
        a = t.alpha / s.alpha
        beta = t.sigma**2 - a**2 * s.sigma**2
        tilde = beta * s.sigma**2 / t.sigma**2
        # the variance of the last step is 0; the original takes the next one's logarithm there, and adds no noise
        safe = np.where(tilde > 0, tilde, tilde[-2] if len(tilde) > 1 and tilde[-2] > 0 else beta)
        noisy = s.sigma > 0
        if end_noise and not noisy[-1] and (process.steps is None or round(times[-2] * process.steps) > 1):
            noisy[-1], safe[-1] = True, LEAST_VARIANCE
        table = DDPMTable(
            x=a * s.sigma**2 / t.sigma**2,
            x0=s.alpha * beta / t.sigma**2,
            log_beta=np.log(beta),
            log_beta_tilde=np.log(safe),
            noisy=noisy.astype(np.float64),
        )
        return lay_rows(process, times[:-1], np.arange(len(a)), table)

    def step(prediction, x, state, row, keys):
        c = row.coefficients
        x0 = prediction.x0 if bound is None else bound(prediction.x0)
        mean = c.x * x + c.x0 * x0
        if variance == "learned":
            if prediction.variance is None:
                raise ValueError("ddpm: variance='learned' needs a model with learn_sigma; allowed: small, large")
            log_variance = learned_log_variance(prediction.variance, c.log_beta, c.log_beta_tilde)
        else:
            log_variance = c.log_beta if variance == "large" else c.log_beta_tilde
        return mean + c.noisy * jnp.exp(0.5 * log_variance) * normal_like(keys, x), state

    return Solver(grid=grid, init=lambda x: (), step=step)
