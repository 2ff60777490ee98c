"""Samplers written from the papers' algorithms in their own notation, in numpy float64."""

import numpy as np


def ddim(x, eps, abar_t, abar_s, eta, z):
    """Song, Meng & Ermon 2020, equations 12 and 16."""
    sigma = eta * np.sqrt((1 - abar_s) / (1 - abar_t)) * np.sqrt(1 - abar_t / abar_s)
    predicted_x0 = (x - np.sqrt(1 - abar_t) * eps) / np.sqrt(abar_t)
    return np.sqrt(abar_s) * predicted_x0 + np.sqrt(1 - abar_s - sigma**2) * eps + sigma * z


def ddpm(x, eps, v, abar_t, abar_s, abar_before_last, variance, z):
    """Ho et al. 2020, equations 7 and 15 on the respaced chain; Nichol & Dhariwal 2021, equation 15.

    abar_before_last: abar of the chain's first two levels (abar_0, abar_1), whose beta~ stands in for the 0 of the
    last step, as in Improved DDPM's clipped logarithm. v in [-1, 1] becomes the paper's (v + 1)/2.
    """
    beta = 1 - abar_t / abar_s
    x0 = (x - np.sqrt(1 - abar_t) * eps) / np.sqrt(abar_t)
    mean = (np.sqrt(abar_s) * beta * x0 + np.sqrt(1 - beta) * (1 - abar_s) * x) / (1 - abar_t)
    tilde = (1 - abar_s) / (1 - abar_t) * beta
    if tilde == 0:
        first, second = abar_before_last
        tilde = (1 - first) / (1 - second) * (1 - second / first)
    chosen = {
        "small": tilde,
        "large": beta,
        "learned": np.exp((v + 1) / 2 * np.log(beta) + (1 - v) / 2 * np.log(tilde)),
    }[variance]
    return mean + (abar_s < 1) * np.sqrt(chosen) * z


def dpmpp_2m(x, x0_model, alpha, sigma, last_first_order):
    """Lu et al. 2022, algorithm 2, on alpha and sigma [n + 1]; x0_model(x, i) is the data prediction at level i."""
    n = len(alpha) - 1
    half = np.log(alpha) - np.log(np.maximum(sigma, 1e-300))
    h = np.diff(half)
    before, current = None, x0_model(x, 0)
    for i in range(1, n + 1):
        if before is None or (i == n and last_first_order):
            d = current
        else:
            r = h[i - 2] / h[i - 1]
            d = (1 + 1 / (2 * r)) * current - 1 / (2 * r) * before
        x = sigma[i] / sigma[i - 1] * x - alpha[i] * (np.exp(-h[i - 1]) - 1) * d
        if i < n:
            before, current = current, x0_model(x, i)
    return x


def edm_heun(x, denoiser, sigma):
    """Karras et al. 2022, algorithm 1 with s(t) = 1 and sigma(t) = t; denoiser(x, sigma); sigma [n + 1] ends at 0."""
    for t, s in zip(sigma[:-1], sigma[1:], strict=True):
        d = (x - denoiser(x, t)) / t
        y = x + (s - t) * d
        if s != 0:
            d_after = (y - denoiser(y, s)) / s
            y = x + (s - t) * (d + d_after) / 2
        x = y
    return x


def flow_euler(x, velocity, t):
    """Liu et al. 2022: x + (s - t) v(x, t) with v = dx/dt."""
    for now, then in zip(t[:-1], t[1:], strict=True):
        x = x + (then - now) * velocity(x, now)
    return x


def flow_heun(x, velocity, t):
    """Heun's method on dx/dt = v(x, t), with an Euler step to t = 0."""
    for now, then in zip(t[:-1], t[1:], strict=True):
        v = velocity(x, now)
        y = x + (then - now) * v
        x = y if then == 0 else x + (then - now) * (v + velocity(y, then)) / 2
    return x
