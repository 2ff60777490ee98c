"""Samplers of k-diffusion, EDM, Score SDE, Restart, FastDPM and MCG from their papers, in numpy float64."""

import math

import numpy as np


def dpm_2(x, denoiser, sigma, eta, noise):
    """k-diffusion's DPM2 and DPM2 ancestral on sigma [n + 1] that ends at 0; noise: the draw of each step.

    Returns:
      x after every evaluation.
    """
    path = []
    for i in range(len(sigma) - 1):
        now, then = sigma[i], sigma[i + 1]
        up = min(then, eta * np.sqrt(then**2 * (now**2 - then**2) / now**2))
        down = np.sqrt(then**2 - up**2)
        d = (x - denoiser(x, now)) / now
        if down == 0:
            x = x + d * (down - now)
            path.append(x)
        else:
            middle = np.exp((np.log(now) + np.log(down)) / 2)
            between = x + d * (middle - now)
            path.append(between)
            x = x + (between - denoiser(between, middle)) / middle * (down - now) + up * noise[i]
            path.append(x)
    return path


def edm_stochastic(x, denoiser, sigma, churn, low, high, factor, noise, order=2):
    """Karras et al. 2022, algorithm 2 with s(t) = 1 and sigma(t) = t; noise: the draw of each step."""
    n = len(sigma) - 1
    for i in range(n):
        now, then = sigma[i], sigma[i + 1]
        gamma = min(churn / n, math.sqrt(2) - 1) if low <= now <= high else 0.0
        hat = now + gamma * now
        x_hat = x + np.sqrt(hat**2 - now**2) * factor * noise[i]
        d = (x_hat - denoiser(x_hat, hat)) / hat
        x = x_hat + (then - hat) * d
        if then != 0 and order == 2:
            x = x_hat + (then - hat) * (d + (x - denoiser(x, then)) / then) / 2
    return x


def restart(x, denoiser, sigma, plan, factor, noise, rho=7.0):
    """Xu et al. 2023, algorithm 2, with the authors' plan {index of an interval: [N, K, t_min, t_max]}.

    Args:
      noise: an iterator of draws.
    """

    def heun(x, levels):
        for now, then in zip(levels[:-1], levels[1:], strict=True):
            d = (x - denoiser(x, now)) / now
            y = x + (then - now) * d
            x = y if then == 0 else x + (then - now) * (d + (y - denoiser(y, then)) / then) / 2
        return x

    at = {int(np.argmin(np.abs(sigma - v[2]))): v for v in plan.values()}
    for i in range(len(sigma) - 1):
        x = heun(x, sigma[i : i + 2])
        if i + 1 in at:
            n, times, _, top = at[i + 1]
            for _ in range(times):
                k = np.arange(n) / (n - 1)
                inner = (top ** (1 / rho) + k * (sigma[i + 1] ** (1 / rho) - top ** (1 / rho))) ** rho
                x = x + np.sqrt(inner[0] ** 2 - inner[-1] ** 2) * factor * next(noise)
                x = heun(x, inner)
    return x


def langevin(x, score, a2, snr, z):
    """Song et al. 2021, algorithms 4 and 5, with the norms of each sample, sqrt(d) for the noise as they suggest for
    small batches; a2: alpha_i of VP, 1 of VE."""
    ratio = np.sqrt(x.shape[1]) / np.linalg.norm(score, axis=1, keepdims=True)
    step = 2 * a2 * (snr * ratio) ** 2
    return x + step * score + np.sqrt(2 * step) * z


def reverse_diffusion_vp(x, score, beta, z):
    """Song et al. 2021, appendix E: x_i = (2 - sqrt(1 - beta)) x_{i+1} + beta s + sqrt(beta) z."""
    return (2 - np.sqrt(1 - beta)) * x + beta * score + np.sqrt(beta) * z


def reverse_diffusion_ve(x, score, now, then, z):
    """Equation 47 without the ancestral variance: x + (sigma_i^2 - sigma_{i-1}^2) s + sqrt(...) z."""
    return x + (now**2 - then**2) * score + np.sqrt(now**2 - then**2) * z


def ancestral_ve(x, score, now, then, z):
    """Equation 47: the mean of the reverse diffusion, and the variance of the posterior."""
    return x + (now**2 - then**2) * score + np.sqrt(then**2 * (now**2 - then**2) / now**2) * z


def maruyama_vp(x, score, beta, dt, z):
    """Euler-Maruyama of dx = (-beta x/2 - beta s) dt + sqrt(beta) dw backwards over dt."""
    return x + (beta * x / 2 + beta * score) * dt + np.sqrt(beta * dt) * z


def fastdpm_var(first, last, count, target, spacing):
    """Kong & Ping 2021, section 3.2: levels of a chain of `count` steps whose product of 1 - beta is `target`.

    By bisection, as the authors; `last` bounds the search.
    """

    def betas(d):
        i = np.arange(count)
        return first + i * d if spacing == "linear" else first * (1 + i * d) ** 2

    low, high = 0.0, last
    for _ in range(300):
        d = (low + high) / 2
        some = betas(d)
        if some.max() >= 1 or np.prod(1 - some) < target:
            high = d
        else:
            low = d
    return np.cumprod(1 - betas(low))


def fastdpm_level(t, beta_start, beta_end, steps):
    """Kong & Ping 2021, equation 8: abar at any t from the Gamma function, t = 0 being the first step."""
    delta = (beta_end - beta_start) / (steps - 1)
    c = (1 - beta_start) / delta
    return math.exp((t + 1) * math.log(delta) + math.lgamma(c + 1) - math.lgamma(c - t))


def adams_bashforth(x, velocity, t, order):
    """Bashforth & Adams on even times, begun with the lower orders."""
    weights = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    known = []
    for now, then in zip(t[:-1], t[1:], strict=True):
        known = [velocity(x, now), *known][:order]
        x = x + (then - now) * sum(w * v for w, v in zip(weights[len(known)], known, strict=True))
    return x


def mcg_step(moved, x, x0, jacobian, a, y, alpha, sigma, weight, z):
    """Chung et al. 2022, equations 14 to 16, for one sample [D], a measurement matrix with orthonormal rows and the
    Jacobian dx0/dx of the denoiser; z: noise of the measurement."""
    residual = a.T @ (y - a @ x0)
    gradient = -jacobian.T @ a.T @ a @ residual / np.linalg.norm(residual)  # of the norm
    corrected = moved - weight * gradient
    return corrected - a.T @ (a @ corrected) + a.T @ (alpha * y + sigma * z)
