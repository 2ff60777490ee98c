"""Time grids written from their sources' rules, in plain Python. Indices count discrete steps from 0."""

import numpy as np


def space_timesteps(steps: int, n: int) -> list[int]:
    """Improved DDPM's rule for one section: n indices from 0 to steps - 1 at a fractional stride, rounded as Python
    does, here from the noise to the data."""
    stride, position, kept = (steps - 1) / (n - 1), 0.0, []
    for _ in range(n):
        kept.append(round(position))
        position += stride
    return kept[::-1]


def trailing(steps: int, n: int) -> list[int]:
    """Lin et al. 2023, table 2: round(flip(arange(T, 0, -T/S))), with indices from 0."""
    return [int(k) - 1 for k in np.round(np.arange(steps, 0, -steps / n))]


def karras(sigma_max: float, sigma_min: float, rho: float, n: int) -> list[float]:
    """Karras et al. 2022, equation 5."""
    a, b = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(a + i / (n - 1) * (b - a)) ** rho for i in range(n)]


def shifted(shift: float, n: int) -> list[float]:
    """Esser et al. 2024, equation 23, for t_i = 1 - i/n with sqrt(m/n) = shift."""
    return [shift * (1 - i / n) / (1 + (shift - 1) * (1 - i / n)) for i in range(n + 1)]


def dm_nonuniform_bound(lambdas: np.ndarray, power: float, alone: int) -> float:
    """Xue et al. 2024's bound for a VP process and a multistep solver of orders 1, 2, 3, ..., 3, 2, 1.

    Integrals of e^lambda times a polynomial q by parts: [e^lambda (q - q' + q'' ...)] at the ends.
    """
    n = len(lambdas) - 1
    alpha, sigma = 1 / np.sqrt(1 + np.exp(-2 * lambdas)), 1 / np.sqrt(1 + np.exp(2 * lambdas))
    error, total, weights = sigma**power / alpha, 0.0, np.zeros(n)
    for s in range(n):
        nodes = range(s - min(s + 1, n - s, 3) + 1, s + 1)
        parts = []
        for j in nodes:
            others = [lambdas[k] - lambdas[s] for k in nodes if k != j]
            q = np.poly1d(np.poly(others) / np.prod([lambdas[j] - lambdas[s] - o for o in others]))
            primitive = sum(((-1) ** m * q.deriv(m) for m in range(1, q.order + 1)), q)
            h = lambdas[s + 1] - lambdas[s]
            parts.append(error[j] * np.exp(lambdas[s]) * (np.exp(h) * primitive(h) - primitive(0)))
        if len(parts) == 1 or s < alone:
            total += np.sqrt(np.sum(np.square(parts)))
        else:
            weights[list(nodes)] += parts
    return float(total + np.abs(weights).sum())
