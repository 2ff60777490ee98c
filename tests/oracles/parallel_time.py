"""Gotta Go Fast, ParaDiGMS, ParaTAA and DEQ-DDIM by their papers, for one sample, in numpy and float64."""

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray


def gotta_go_fast(
    x: Array,
    drift: Callable[[Array, float], Array],
    diffusion: Callable[[float], float],
    z: Callable[[int], Array],
    start: float,
    stop: float,
    relative: float,
    absolute: float,
    first: float = 0.01,
    safety: float = 0.9,
    exponent: float = 0.9,
) -> tuple[Array, int]:
    """Algorithm 1, the noise of a rejected step kept. z(e): of evaluation e. Returns (x at stop, evaluations)."""
    t, h, before, e, noise = start, first, x, 0, None
    while t - stop > 1e-6:
        noise = z(e) if noise is None else noise
        euler = x - h * drift(x, t) + np.sqrt(h) * diffusion(t) * noise
        other = x - h * drift(euler, t - h) + np.sqrt(h) * diffusion(t - h) * noise
        improved = (euler + other) / 2
        delta = np.maximum(absolute, relative * np.maximum(np.abs(euler), np.abs(before)))
        error = np.linalg.norm((euler - improved) / delta) / np.sqrt(x.size)
        e += 2
        if error <= 1:
            x, t, before, noise = improved, t - h, euler, None
        h = min(t - stop, safety * h * error**-exponent)
    return x, e


# A chain of n steps: maps[j](x) -> x after step j, w[j] the standard deviation of step j's noise at eta = 1


def paradigms(x: Array, maps: list[Any], w: Array, tolerance: float, window: int) -> tuple[Array, int]:
    """Algorithm 1: (x_n, batches of evaluations)."""
    n = len(maps)
    path = [x] * (n + 1)
    begin, batches = 0, 0
    while begin < n:
        end = min(begin + window, n)
        drifts = [maps[j](path[j]) - path[j] for j in range(begin, end)]
        new = [path[begin] + sum(drifts[: k + 1]) for k in range(end - begin)]
        stride = end - begin
        for k in range(end - begin):
            following = begin + k + 1
            variance = w[following] ** 2 if following < n else 0.0
            if np.sum((new[k] - path[following]) ** 2) / x.size > tolerance**2 * variance:
                stride = k + 1
                break
        path[begin + 1 : end + 1] = new
        path[end + 1 :] = [path[end]] * (n - end)
        begin, batches = begin + min(stride, window), batches + 1
    return path[n], batches


def chain(alpha: Array, sigma: Array, eta: float) -> tuple[Array, Array, Array, Array]:
    """x_{j+1} = a_j x_j + b_j eps_j + c_j z_j of DDIM, and w_j, c_j at eta = 1."""
    a = alpha[1:] / alpha[:-1]
    w = sigma[1:] / sigma[:-1] * np.sqrt(np.maximum(0, sigma[:-1] ** 2 - sigma[1:] ** 2 / a**2))
    b = np.sqrt(np.maximum(0, sigma[1:] ** 2 - (eta * w) ** 2)) - sigma[:-1] * a
    return a, b, eta * w, w


def several(path: Array, eps: Array, z: Array, of: tuple[Array, Array, Array], i: int, first: int) -> Array:
    """x_{i+1} by steps first ... i at once, predictions and noise being at hand (equation 7 of ParaTAA)."""
    a, b, c = of
    total = np.prod(a[first : i + 1]) * path[first]
    for j in range(first, i + 1):
        total = total + np.prod(a[j + 1 : i + 1]) * (b[j] * eps[j] + c[j] * z[j])
    return total


def parataa(
    x: Array,
    eps: Callable[[int, Array], Array],
    z: Array,
    of: tuple[Array, Array, Array],
    w: Array,
    tolerance: float,
    window: int,
    order: int,
    memory: int,
    ridge: float = 1e-3,
) -> tuple[Array, int]:
    """Triangular Anderson acceleration in a sliding window: (x_n, batches of evaluations)."""
    n = len(z)
    path = np.stack([x] * (n + 1))
    begin, batches, history = 0, 0, []  # history: ({row: x}, {row: R}) of the iterations before, the last first
    while begin < n:
        rows = range(begin, min(begin + window, n))
        found = {j: eps(j, path[j]) for j in rows}
        ahead = np.stack([found.get(j, np.zeros_like(x)) for j in range(n)])
        single = {j: several(path, ahead, z, of, j, j) - path[j + 1] for j in rows}
        change = {i: several(path, ahead, z, of, i, max(begin, i + 1 - order)) - path[i + 1] for i in rows}
        bad = [j for j in rows if np.sqrt(np.mean(single[j] ** 2)) > tolerance * max(1.0, w[j])]
        safe = bad[0] if bad else rows[-1]
        now = ({i: path[i + 1].copy() for i in rows}, dict(change))
        steps = [now, *history]
        new = {}
        for i in rows:
            new[i] = path[i + 1] + change[i]
            pairs = [(p, q) for p, q in zip(steps, steps[1:], strict=False) if i in p[0] and i in q[0]][: memory - 1]
            if i > safe and pairs:
                m = len(pairs)
                gram, right = ridge * np.eye(m), np.zeros(m)
                for row in range(begin, i + 1):
                    d = [p[1][row] - q[1][row] for p, q in pairs]
                    gram += np.array([[np.vdot(u, v) for v in d] for u in d])
                    right += np.array([np.vdot(u, change[row]) for u in d])
                gamma = np.linalg.solve(gram, right)
                for g, (p, q) in zip(gamma, pairs, strict=True):
                    new[i] = new[i] - g * (p[0][i] - q[0][i] + p[1][i] - q[1][i])
        for i in rows:
            path[i + 1] = new[i]
        end = rows[-1] + 1
        path[end + 1 :] = path[end]
        history = steps[: max(memory - 1, 0)]
        begin, batches = safe + 1, batches + 1
    return path[n], batches


def deq(
    x: Array,
    eps: Callable[[int, Array], Array],
    z: Array,
    of: tuple[Array, Array, Array],
    tolerance: float,
    memory: int,
    ridge: float = 1e-3,
) -> tuple[Array, int]:
    """The chain as one fixed point, by Anderson's acceleration for each point: (x_n, batches of evaluations)."""
    n = len(z)
    path, past = np.stack([x] * (n + 1)), []
    for batch in range(n):
        found = np.stack([eps(j, path[j]) for j in range(n)])
        mapped = np.stack([several(path, found, z, of, i, 0) for i in range(n)])
        far = mapped - path[1:]
        if np.linalg.norm(far) <= tolerance * np.linalg.norm(mapped) or batch == n - 1:
            return mapped[-1], batch + 1
        past = [(mapped, far), *past][:memory]
        m = len(past)
        for i in range(batch, n):
            g = np.stack([f[i].ravel() for _, f in past])
            mean = np.trace(g @ g.T) / m
            system = np.zeros((m + 1, m + 1))
            system[0, 1:] = system[1:, 0] = 1
            system[1:, 1:] = g @ g.T + ridge * mean * np.eye(m)
            weights = np.linalg.solve(system, np.eye(m + 1)[0])[1:] if i > batch else np.eye(m)[0]
            path[i + 1] = sum(a * h[i] for a, (h, _) in zip(weights, past, strict=True))
    return path[n], n
