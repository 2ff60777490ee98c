"""Schedules of betas, beta_k = 1 - alpha_k^2/alpha_{k-1}^2 of the discrete steps k = 0 ... T - 1, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def linear(start: float, end: float, steps: int) -> np.ndarray:
    """Evenly spaced betas (Ho et al. 2020, arXiv:2006.11239)."""
    return np.linspace(start, end, steps, dtype=np.float64)


def scaled_linear(start: float, end: float, steps: int) -> np.ndarray:
    """Betas whose square roots are evenly spaced (Rombach et al., latent diffusion, 2021, arXiv:2112.10752)."""
    return np.linspace(start**0.5, end**0.5, steps, dtype=np.float64) ** 2


def sigmoid(start: float, end: float, steps: int) -> np.ndarray:
    """Betas along a sigmoid between -6 and 6 (GeoDiff, Xu et al. 2022, arXiv:2203.02923)."""
    return (end - start) / (1 + np.exp(-np.linspace(-6, 6, steps))) + start


def of_alpha_bar(alpha_bar: np.ndarray, most: float = 0.999) -> np.ndarray:
    """min(1 - alpha_bar_{k+1}/alpha_bar_k, most) of alpha_bar [T + 1] at k/T."""
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], most)


def cosine(s: float, most: float, steps: int) -> np.ndarray:
    """Betas of alpha_bar(u) = cos^2((u + s)/(1 + s) pi/2) (Nichol & Dhariwal 2021, arXiv:2102.09672)."""
    u = np.arange(steps + 1, dtype=np.float64) / steps
    return of_alpha_bar(np.cos((u + s) / (1 + s) * math.pi / 2) ** 2, most)


def laplace(steps: int) -> np.ndarray:
    """Betas of diffusers' "laplace": alpha_bar = sqrt(snr/(1 + snr)), log(snr) = -sign(1/2 - u) log(1 - 2|1/2 - u|)/2.

    References: Hang et al., Improved Noise Schedule for Diffusion Training, 2024, arXiv:2407.03297.
    """
    u = np.arange(steps + 1, dtype=np.float64) / steps
    log_snr = -0.5 * np.copysign(1.0, 0.5 - u) * np.log(1 - 2 * np.abs(0.5 - u) + 1e-6)
    return of_alpha_bar(np.sqrt(1 / (1 + np.exp(-log_snr))))


def exponential(steps: int) -> np.ndarray:
    """Betas of alpha_bar(u) = exp(-12 u), as in diffusers."""
    return of_alpha_bar(np.exp(-12.0 * np.arange(steps + 1, dtype=np.float64) / steps))


# by diffusers' names: (beta_start, beta_end, steps) -> betas
SCHEDULES = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "squaredcos_cap_v2": lambda start, end, steps: cosine(0.008, 0.999, steps),
    "sigmoid": sigmoid,
    "laplace": lambda start, end, steps: laplace(steps),
    "exp": lambda start, end, steps: exponential(steps),
}


def log_alphas(
    betas: np.ndarray | Sequence[float],
    snr_shift: float = 1.0,
    terminal: float | None = None,
    precision: str = "float64",
) -> np.ndarray:
    """log(alpha_k) [T] of betas, float64.

    Args:
      snr_shift: r, alpha^2 becomes alpha^2/(r + (1 - r) alpha^2), that is alpha^2/sigma^2 is divided by r (CogVideoX).
      terminal: if given, alpha is then shifted and scaled so that its first value stays and its last one is 0 (zero
        terminal SNR), whose square is then set to this.
      precision: "float32" rounds alpha^2 as diffusers does, which computes with 1 - beta and its products in it.

    References: Lin et al., Common Diffusion Noise Schedules and Sample Steps are Flawed, 2023, arXiv:2305.08891; Yang
    et al., CogVideoX, 2024, arXiv:2408.06072.
    """
    if precision == "float32":
        square = _products(np.float32(1) - np.asarray(betas, np.float32))
        if terminal is not None:
            root = np.sqrt(square)
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            alphas = np.append(root[:1] ** 2, root[1:] ** 2 / root[:-1] ** 2)
            square = _products(np.float32(1) - (np.float32(1) - alphas))
            square[-1] = terminal
        with np.errstate(divide="ignore"):
            return 0.5 * np.log(square.astype(np.float64))
    log_alpha = 0.5 * np.cumsum(np.log1p(-np.asarray(betas, np.float64)))
    if snr_shift != 1.0:
        log_alpha = log_alpha - 0.5 * np.log(snr_shift + (1 - snr_shift) * np.exp(2 * log_alpha))
    if terminal is None:
        return log_alpha
    alpha = np.exp(log_alpha)
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    with np.errstate(divide="ignore"):
        return np.append(np.log(alpha[:-1]), 0.5 * np.log(terminal))


def _products(alphas: np.ndarray) -> np.ndarray:
    """Cumulative products of float32 numbers, multiplied in float64 and rounded each, as torch has them on CPUs."""
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)
