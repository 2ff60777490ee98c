"""Noise schedules written from the papers' definitions, in numpy float64. k counts discrete steps from 0."""

import numpy as np


def chain(betas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(alpha, sigma) after each step of x_k = sqrt(1 - beta_k) x_{k-1} + sqrt(beta_k) eps (Ho et al., equation 2).

    The variance is carried forward with the chain, because 1 - alpha^2 cancels at the first steps.
    """
    alphas, sigmas, alpha, variance = [], [], 1.0, 0.0
    for beta in betas:
        alpha *= np.sqrt(1 - beta)
        variance = (1 - beta) * variance + beta
        alphas.append(alpha)
        sigmas.append(np.sqrt(variance))
    return np.array(alphas), np.array(sigmas)


def vp_linear(steps: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Ho et al. 2020, section 4: betas linear from 1e-4 to 0.02."""
    return chain(1e-4 + (0.02 - 1e-4) * np.arange(steps) / (steps - 1))


def vp_cosine(steps: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Nichol & Dhariwal 2021, equation 17: abar_k = f(k)/f(0), with beta at most 0.999 (the last step)."""
    f = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    abar = f[1:] / f[0]
    abar[-1] = abar[-2] * (1 - 0.999)
    return np.sqrt(abar), np.sqrt(1 - abar)


def vp_sde(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Song et al. 2021, equation 33: the perturbation kernel of beta(t) = 0.1 + 19.9 t, with its integral by hand."""
    integral = 0.1 * t + 19.9 * t**2 / 2
    return np.exp(-integral / 2), np.sqrt(1 - np.exp(-integral))


def subvp(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Song et al. 2021, equation 34: the mean of the variance-preserving SDE, and 1 - e^(-integral) as deviation."""
    integral = 0.1 * t + 19.9 * t**2 / 2
    return np.exp(-integral / 2), 1 - np.exp(-integral)


def ve(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Song et al. 2021, equation 30: sigma_min (sigma_max/sigma_min)^t, with EDM's 0.002 and 80."""
    return np.ones_like(t), 0.002 * 40000.0**t


def flow(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Liu et al. 2022, equation 1, with X_1 the data: x_t = (1 - t) x0 + t eps."""
    return 1 - t, t


def edm(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Karras et al. 2022, table 1, of data of unit variance: c_in y = c_in x0 + c_in sigma eps."""
    sigma = 0.002 * 40000.0**t
    c_in = (sigma**2 + 1) ** -0.5
    return c_in, sigma * c_in


def trig(t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Salimans & Ho 2022, section 4: alpha = cos(phi), sigma = sin(phi)."""
    return np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)
