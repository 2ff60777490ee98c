"""Predictor-corrector sampling of Score SDE. Song, Sohl-Dickstein, Kingma, Kumar, Ermon & Poole, arXiv:2011.13456."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from difax.core.annotations import checked
from difax.core.contracts import Array, Level, Solver
from difax.core.drive import per_sample
from difax.core.grids import check_times, lay_rows
from difax.core.noise import normal_like
from difax.core.process import Process

PREDICTORS = ("reverse_diffusion", "ancestral", "euler_maruyama")
MOST = 100  # of the corrector's steps


class PCTable(NamedTuple):
    """x' = x x + x0 x0 + eps eps + noise z + e score + sqrt(2 e) z, e = size d/|score|^2."""

    x: Array
    x0: Array
    eps: Array
    noise: Array
    size: Array


@checked
def pc(predictor: str = "reverse_diffusion", corrections: int = 1, snr: float = 0.16) -> Solver:
    """Steps of the reverse SDE, before each of them Langevin steps that stay at the level; n (m + 1) evaluations.

    With a = alpha_t/alpha_s and b^2 = sigma_t^2 - a^2 sigma_s^2 (x_t = a x_s + b z is the chain forwards) and the score
    -eps/sigma_t, a predictor goes

      reverse_diffusion: x_s = (2 - a) x + b^2 score + b z
      ancestral:         x_s ~ q(x_s | x_t, x0), which is DDIM with eta = 1
      euler_maruyama:    x_s = x - (f x - g^2 score) dt + g sqrt(dt) z

    with f = dlog(alpha)/dt and g^2 = dsigma^2/dt - 2 f sigma^2,

    and to sigma = 0 always to x0, which is the mean of the first two in the limit. The corrector makes, m times,

      x <- x + e score + sqrt(2 e) z, e = 2 a^2 (snr/|score|)^2 d,

    |score| and d, the number of values, of each sample, so that a batch is its singles.

    Args:
      predictor: one of the three.
      corrections: m, 0 ... 100 (1).
      snr: above 0, up to 10 (0.16 for VE, 0.01 to 0.05 for VP).

    Returns:
      A `Solver` without state.

    Raises:
      ValueError: an unknown predictor, numbers out of range; or, from `grid`, euler_maruyama where alpha = 0.

    References: Song et al. 2021, arXiv:2011.13456, algorithms 2 to 5 and appendix G. The authors' code takes |z| for
      sqrt(d), and the means of both norms over the batch; that they depend on no sample alone is what makes the law of
      the corrector that of the data: here it is wider by a share of about 1/d. Their ancestral predictor of VP has the
      noise b, here as for VE that of q, b sigma_s/sigma_t; their last step of VP is the predictor's mean.
    """
    if predictor not in PREDICTORS:
        raise ValueError(f"pc: predictor={predictor!r}; allowed: {', '.join(PREDICTORS)}")
    if not 0 <= corrections <= MOST:
        raise ValueError(f"pc: corrections={corrections}; allowed: 0 ... {MOST}")
    if not 0 < snr <= 10:
        raise ValueError(f"pc: snr={snr}; allowed: > 0, up to 10")

    def grid(process: Process, times: np.ndarray):
        check_times(times)
        t, s = process.level(times[:-1]), process.level(times[1:])
        if predictor == "euler_maruyama" and np.any(t.alpha <= 0):
            raise ValueError(
                f"pc: predictor=euler_maruyama divides by alpha, which is 0 at t={times[np.argmin(t.alpha)]:g} of "
                f"{process.name}; allowed: reverse_diffusion, ancestral, or a grid such as karras or log_snr"
            )
        a = t.alpha / s.alpha
        dt = np.abs(np.diff(process.model_time(times)))
        step = {"reverse_diffusion": _reverse, "ancestral": _ancestral, "euler_maruyama": _maruyama}[predictor]
        predicted = np.stack(np.broadcast_arrays(*step(t, s, a, dt, process), 0.0))
        clean = np.array([0.0, 1.0, 0.0, 0.0, 0.0])
        predicted = np.where(s.sigma > 0, predicted, clean[:, None])
        zero = np.zeros_like(a)
        corrected = np.stack([zero + 1, zero, zero, zero, 2 * a**2 * snr**2])
        table = np.stack([corrected] * corrections + [predicted], axis=-1).reshape(5, -1)  # of a step, in order
        several = corrections + 1
        at, index = np.repeat(times[:-1], several), np.repeat(np.arange(len(a)), several)
        return lay_rows(process, at, index, PCTable(*table))

    def step(prediction, x, state, row, keys):
        c, z = row.coefficients, normal_like(keys, x)
        score = -prediction.eps / row.level.sigma
        norm = jnp.sqrt(jnp.sum(score**2, axis=tuple(range(1, x.ndim))))
        ratio = per_sample(jnp.where(norm > 0, math.sqrt(x[0].size) / jnp.where(norm > 0, norm, 1.0), 0.0), x.ndim)
        langevin = c.size * ratio**2 * score + jnp.sqrt(2 * c.size) * ratio * z
        return c.x * x + c.x0 * prediction.x0 + c.eps * prediction.eps + c.noise * z + langevin, state

    return Solver(grid=grid, init=lambda x: (), step=step)


def _reverse(t: Level, s: Level, a: np.ndarray, dt: np.ndarray, process: Process) -> tuple[np.ndarray, ...]:
    b2 = t.sigma**2 - a**2 * s.sigma**2
    return 2 - a, np.zeros_like(a), -b2 / t.sigma, np.sqrt(b2)


def _ancestral(t: Level, s: Level, a: np.ndarray, dt: np.ndarray, process: Process) -> tuple[np.ndarray, ...]:
    b2 = t.sigma**2 - a**2 * s.sigma**2
    return a * s.sigma**2 / t.sigma**2, s.alpha * b2 / t.sigma**2, np.zeros_like(a), np.sqrt(b2) * s.sigma / t.sigma


def _maruyama(t: Level, s: Level, a: np.ndarray, dt: np.ndarray, process: Process) -> tuple[np.ndarray, ...]:
    # slopes are along the model's time, in which SiT's run backwards
    forward = np.sign(np.diff(process.model_time(np.array([0.4, 0.5]))))
    f = forward * t.alpha_dot / t.alpha
    g2 = 2 * t.sigma * (forward * t.sigma_dot - f * t.sigma)
    return 1 - f * dt, np.zeros_like(a), -g2 * dt / t.sigma, np.sqrt(g2 * dt)
