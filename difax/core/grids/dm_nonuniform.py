"""DM-NonUniform: the grid that minimises a bound of a multistep solver's global error; of the process alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from difax.core.annotations import checked
from difax.core.grids.times import Grid, ratios
from difax.core.process import Process, log_snr

POINTS, WEIGHTS = np.polynomial.legendre.leggauss(16)
ROUNDS = 400  # of the minimiser, at most
RADIUS = 0.1  # of a step of the minimiser: it stays in the valley that it begins in
MOST = 100  # steps, which take tens of seconds; 20 take one
known: dict[tuple, np.ndarray] = {}  # grids that were found before
ALONE = 3  # so many first steps count for themselves


@checked
def dm_nonuniform(
    order: int = 3,
    power: float | None = None,
    start: Literal["time", "log_snr"] = "time",
    lower_order_final: bool = True,
) -> Grid:
    """Times at which the data prediction's error, weighted as a multistep solver of that order sums it up, is least.

    Over lambda = log(alpha/sigma) the solver adds e^lambda x0 integrated through the last outputs, so the output at
    lambda_i enters with the weight c_i, the sum over the steps that use it of the integral of e^lambda l_i(lambda).
    With |x0 - x0_theta| taken as sigma^power / alpha, what is minimised is sum_i |c_i| sigma_i^power / alpha_i. The
    first three steps count for themselves, by the root of their squares, as in the authors' code, whose comment says to
    let them join the sum above 7 steps: then minima have weights that cancel, and the solver two to four times the
    error (vp_sde, 8 to 15 steps, a mixture of Gaussians).

    Args:
      order: of the solver, 1 ... 3 (3). Its first steps are of lower order, and with lower_order_final its last ones.
      power: of the assumed error; None is 2 (latent spaces) for start="time" and 1 (pixels) for "log_snr", as the
        authors recommend.
      start: the grid that the minimisation begins at; the bound has several minima.
      lower_order_final: are the last order - 1 steps of falling order.

    Where we differ: the authors minimise by scipy's trust-constr under linear constraints; here the steps in lambda are
    a softmax, and the minimiser BFGS with differences, which finds bounds as low (tests). The run ends at t = 0 and not
    at t_min.

    References: Xue et al., Accelerating Diffusion Sampling with Optimized Time Steps, 2024, arXiv:2402.17376;
    https://github.com/scxue/DM-NonUniform, step_optim.py.
    """
    if not 1 <= order <= 3:
        raise ValueError(f"dm_nonuniform: order={order}; allowed: 1 ... 3")
    power = (2.0 if start == "time" else 1.0) if power is None else power
    if not 0 <= power <= 4:
        raise ValueError(f"dm_nonuniform: power={power}; allowed: 0 ... 4")

    def grid(process: Process, n: int) -> np.ndarray:
        ends = 0.5 * log_snr(process, np.array([process.t_max, process.t_min]))
        if n == 1:
            return np.array([process.t_max, 0.0])
        if n > MOST:
            raise ValueError(f"dm_nonuniform: steps={n}; allowed: 1 ... {MOST}, it is for few")
        key = (
            n,
            order,
            power,
            start,
            lower_order_final,
            *ratios(process, np.linspace(process.t_max, process.t_min, 33)),
        )
        if key in known:
            return known[key].copy()
        orders = orders_of(n, order, lower_order_final)
        size = ends[1] - ends[0]

        def lambdas(free: np.ndarray) -> np.ndarray:
            gaps = np.exp(free - free.max(-1, keepdims=True))
            inner = ends[0] + size * np.cumsum(gaps / gaps.sum(-1, keepdims=True), -1)[..., :-1]
            edges = [np.full((*inner.shape[:-1], 1), end) for end in ends]
            return np.concatenate([edges[0], inner, edges[1]], -1)

        def loss(free: np.ndarray) -> np.ndarray:
            return np.log(error_bound(lambdas(free), process, orders, power))

        times = np.linspace(process.t_max, process.t_min, n + 1)
        first = 0.5 * log_snr(process, times) if start == "time" else np.linspace(ends[0], ends[1], n + 1)
        free = minimised(loss, np.log(np.diff(first)))
        found = process.inverse(lambdas(free))
        found[0], found[-1] = process.t_max, 0.0
        known[key] = found
        return found.copy()

    return grid


def orders_of(n: int, order: int, lower_order_final: bool = True) -> np.ndarray:
    """The order of each of n steps of a multistep solver [n]."""
    rising = np.minimum(np.arange(n) + 1, order)
    return np.minimum(rising, np.arange(n, 0, -1)) if lower_order_final else rising


def error_bound(lambdas: np.ndarray, process: Process, orders: np.ndarray, power: float) -> np.ndarray:
    """The bound that `dm_nonuniform` minimises, for grids [..., n + 1] of ascending log(alpha/sigma)."""
    n = lambdas.shape[-1] - 1
    level = process.level(process.inverse(lambdas[..., :-1]))
    error = level.sigma**power / level.alpha
    total, weights = np.zeros(lambdas.shape[:-1]), np.zeros((*lambdas.shape[:-1], n))
    for p in np.unique(orders):
        steps = np.flatnonzero(orders == p)
        used = steps[:, None] + np.arange(1 - p, 1)  # [steps, p]
        parts = error[..., used] * step_weights(lambdas[..., used], lambdas[..., steps], lambdas[..., steps + 1])
        alone = (steps < ALONE) | (p == 1)
        total = total + np.sqrt(np.sum(parts[..., alone, :] ** 2, -1)).sum(-1)
        for k in range(p):  # the k-th output that a step uses is another one for each step
            weights[..., used[~alone, k]] += parts[..., ~alone, k]
    return total + np.sum(np.abs(weights), -1)


def step_weights(nodes: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Integrals of e^lambda l_j(lambda) from start to end, l_j the Lagrange polynomials through nodes [..., p]."""
    half = (end - start)[..., None] / 2
    at = start[..., None] + half * (1 + POINTS)  # [..., 16]
    p = nodes.shape[-1]
    found = []
    for j in range(p):
        others = [k for k in range(p) if k != j]
        value = np.exp(at)
        for k in others:
            value = value * (at - nodes[..., k, None]) / (nodes[..., j, None] - nodes[..., k, None])
        found.append(np.sum(value * WEIGHTS * half, -1))
    return np.stack(found, -1)


def minimised(loss: Callable[[np.ndarray], np.ndarray], start: np.ndarray) -> np.ndarray:
    """A local minimum of loss([..., m] -> [...]) near a start [m], by BFGS with central differences.

    Steps are halved until the loss falls; where the quasi-Newton direction brings nothing, the steepest one is tried,
    and the search ends where that brings nothing either.
    """
    x, m, width = np.array(start, np.float64), len(start), 1e-6
    steps = width * np.eye(m)

    def slope(at: np.ndarray) -> np.ndarray:
        return (loss(at + steps) - loss(at - steps)) / (2 * width)

    value, g, inverse = float(loss(x)), slope(x), np.eye(m)
    for _ in range(ROUNDS):
        moved = None
        for direction in (-inverse @ g, -g):
            sizes = min(1.0, RADIUS / max(float(np.abs(direction).max()), 1e-30)) * 0.5 ** np.arange(24)
            tried = x + sizes[:, None] * direction
            losses = loss(tried)
            good = losses < value + 1e-4 * sizes * (g @ direction)
            if good.any():
                moved = tried[int(np.argmax(good))]
                break
            inverse = np.eye(m)
        if moved is None:
            break
        new = slope(moved)
        s, y = moved - x, new - g
        fell = value - float(loss(moved))
        x, g, value = moved, new, value - fell
        if s @ y > 1e-12:
            rho = 1 / (s @ y)
            left = np.eye(m) - rho * np.outer(s, y)
            inverse = left @ inverse @ left.T + rho * np.outer(s, s)
        if fell < 1e-10:
            break
    return x
