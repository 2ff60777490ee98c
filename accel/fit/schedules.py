"""Grids by dynamic programming over what was measured on fine trajectories: GITS, Align Your Steps, Watson's.

Each measures a table of what a step from one fine time to another costs, and takes the path of so many steps that costs
least (`difax.accel.fit.search.cheapest_path`). What they return is what the grid `measured` reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from difax.accel.fit.search import cheapest_path
from difax.accel.fit.trajectories import batches, ddim_step, fine_times, trajectory
from difax.core.process import Process, log_snr

Base = Literal["uniform", "quadratic", "log_snr", "karras"]
Levels = Literal["quadratic", "log_snr", "karras"]
Progress = Callable[[str], None]


def gits(
    sampler: Any,
    samples: int,
    batch: int,
    progress: Progress,
    fine: int = 60,
    base: Base = "uniform",
    metric: Literal["deviation", "l2", "l1"] = "deviation",
    growth: float = 1.15,
) -> dict[str, Any]:
    """GITS: the steps that leave a fine trajectory least, each an Euler step from a point of it to another.

    cost(i, j) = |x_i + (step from i to j along the slope at i) - x_j|, or, metric "deviation", how much farther from
    the straight line between noise and sample that point lies than x_j does. Paths weigh a step by growth to the number
    of steps before it. Everything in y = x/(alpha + sigma), in which Euler's step is DDIM's, and finite at pure noise.

    Args:
      fine: steps of the trajectory, more than the run has (60). base: their grid.
      metric, growth: of the cost ("deviation" and 1.15 in the authors' code).

    Where we differ: the authors go along x in EDM's variables, sigma to 1/7 between 80 and 0.002, by iPNDM; here by
    DPM-Solver++ 2M along `base`, to t = 0. Distances are per pixel.

    References: Chen et al., On the Trajectory Regularity of ODE-based Diffusion Sampling, 2024, arXiv:2405.11326;
    https://github.com/zju-pi/diff-sampler, gits-main.
    """
    process, n = sampler.run.process, steps_of(sampler, fine)
    if not 0.5 <= growth <= 2:
        raise ValueError(f"gits: growth={growth}; allowed: 0.5 ... 2")
    times = fine_times(process, base, fine)
    level = process.level(times)
    cost = np.zeros((fine + 1, fine + 1))
    for of in batches(sampler, times[:-1], samples, batch, progress):
        x, outputs = trajectory(process, times, of)
        x, outputs = (a.reshape(*a.shape[:2], -1) for a in (x, outputs))
        scale = (level.alpha + level.sigma)[:, None, None]
        y = x / scale
        away = deviation(y, y[0], y[-1])
        for i in range(fine):
            stepped = np.stack([ddim_step(level, i, j, x[i], outputs[i]) for j in range(i + 1, fine + 1)])
            stepped = stepped / scale[i + 1 :]
            if metric == "deviation":
                found = deviation(stepped, y[0], y[-1]) - away[i + 1 :]
            elif metric == "l2":
                found = np.sqrt(np.mean((stepped - y[i + 1 :]) ** 2, -1))
            else:
                found = np.mean(np.abs(stepped - y[i + 1 :]), -1)
            cost[i, i + 1 :] += found.sum(-1) / samples
    path = cheapest_path(cost, n, growth)
    return content(process, times[path], fine=fine, base=base, metric=metric, growth=growth)


def deviation(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """How far points [m, B, D] lie from the lines through start and end [B, D], root mean square over D: [m, B]."""
    along = end - start
    along = along / np.linalg.norm(along, axis=-1, keepdims=True)
    away = end - points
    away = away - np.sum(away * along, -1, keepdims=True) * along
    return np.sqrt(np.mean(away**2, -1))


def align_your_steps(
    sampler: Any,
    samples: int,
    batch: int,
    progress: Progress,
    fine: int = 60,
    base: Levels = "log_snr",
    sigma_min: float = 0.02,
) -> dict[str, Any]:
    """Align Your Steps: the grid whose steps, each with the prediction frozen at its start, have the least KL bound.

    The bound of the divergence between the generative SDE and its discretisation is the sum over the steps of the
    integral of E |D(x_t) - D(x_start)|^2 dSNR / 2 over the step (1/t^3 dt in VE's time), x_t and x_start on one path of
    the forward SDE. As it is a sum over steps, dynamic programming over a fine grid finds its minimum.

    Args:
      fine: steps of the paths, more than the run has (60). base: their grid.
      sigma_min: where the paths end, of sigma/alpha, above 0 (0.02): the bound goes by the noise level there, and the
        smaller it is the more of the steps lie near the data.

    Where we differ: the authors start from a few steps, minimise coordinate by coordinate over 11 candidates each, stop
    early by quality, and halve the steps; they draw x0 from data, here it is the model's own fine samples.

    References: Sabour et al., Align Your Steps, 2024, arXiv:2404.14507, theorem 3.1 (the bound).
    """
    process, n = sampler.run.process, steps_of(sampler, fine)
    times = _between(process, base, fine, sigma_min, "align_your_steps")
    snr = np.exp(log_snr(process, times))
    distance = np.zeros((fine + 1, fine + 1))  # [start, t]
    for of in batches(sampler, times, samples, batch, progress):
        x0, path = forward_paths(process, times, of, sampler.seed)
        found = np.stack([of.predict(x, i) for i, x in enumerate(path)]).reshape(fine + 1, len(x0), -1)
        for i in range(fine + 1):
            distance[i, i:] += np.mean((found[i:] - found[i]) ** 2, -1).sum(-1) / samples
    slices = 0.5 * np.diff(snr) * 0.5 * (distance[:, 1:] + distance[:, :-1])  # [start, slice], by trapezoids
    cost = np.zeros((fine + 1, fine + 1))
    for i in range(fine):
        cost[i, i + 1 :] = np.cumsum(slices[i, i:])
    return content(process, ended(times[cheapest_path(cost, n)]), fine=fine, base=base, sigma_min=sigma_min)


def watson(
    sampler: Any,
    samples: int,
    batch: int,
    progress: Progress,
    fine: int = 100,
    base: Levels = "log_snr",
    sigma_min: float = 0.02,
) -> dict[str, Any]:
    """Watson's schedule: the path with the best variational bound among all of so many steps.

    With the ancestral posterior the bound's term for a step from t to s is (SNR(s) - SNR(t)) E|x0 - x0_theta(x_t)|^2
    over 2, so the table needs the mean squared error of the prediction at each fine time alone.

    Args:
      fine: steps of the table, more than the run has (100; T in the paper). base: their grid.
      sigma_min: where the table ends, as of `align_your_steps` (0.02).

    Where we differ: the paper fills the table for all T steps from data and counts the last term by a discretised
    decoder; here x0 is the model's own fine samples, and the last step ends at sigma_min (of continuous data the bound
    has no end); the run then goes to t = 0 from where that step began.

    References: Watson et al., Learning to Efficiently Sample from Diffusion Probabilistic Models, 2021,
    arXiv:2106.03802; Kingma et al., Variational Diffusion Models, 2021, arXiv:2107.00630, equation 15 (the term).
    """
    process, n = sampler.run.process, steps_of(sampler, fine)
    times = _between(process, base, fine, sigma_min, "watson")
    snr = np.exp(log_snr(process, times))
    errors = np.zeros(fine + 1)
    for of in batches(sampler, times, samples, batch, progress):
        x0, path = forward_paths(process, times, of, sampler.seed)
        for i, x in enumerate(path):
            errors[i] += np.sum((x0 - of.predict(x, i)) ** 2) / samples
    cost = bound_terms(snr, errors)
    path = cheapest_path(cost, n)
    found = float(sum(cost[i, j] for i, j in zip(path[:-1], path[1:], strict=True)))
    return content(process, ended(times[path]), fine=fine, base=base, sigma_min=sigma_min, bound=found)


def bound_terms(snr: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """(SNR_j - SNR_i) errors_i / 2 for j > i, in nats a sample: [m, m]."""
    return np.triu(0.5 * (snr[None, :] - snr[:, None]) * errors[:, None], 1)


def forward_paths(process: Process, times: np.ndarray, of: Any, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Fine samples x0 [B, ...] of a batch, and one path of the forward process from each, x [m, B, ...] at `times`.

    x_t = alpha (x0 + W(sigma^2/alpha^2)), W a Brownian motion, so that neighbours on a path share their noise.
    """
    x, _ = trajectory(process, np.append(times, 0.0), of)
    x0, level = x[-1], process.level(times)
    variance = (level.sigma / level.alpha) ** 2
    draws = np.random.default_rng((seed, of.start)).standard_normal((len(times), *x0.shape))
    steps = np.sqrt(np.append(-np.diff(variance), variance[-1]))  # the last one from the clean sample
    walk = np.cumsum((draws * steps.reshape(-1, *[1] * x0.ndim))[::-1], 0)[::-1]
    return x0, level.alpha.reshape(-1, *[1] * x0.ndim) * (x0 + walk)


def _between(process: Process, base: Base, fine: int, sigma_min: float, name: str) -> np.ndarray:
    if not 1e-6 <= sigma_min <= 1:
        raise ValueError(f"{name}: sigma_min={sigma_min}; allowed: > 0, 1e-6 ... 1")
    return fine_times(process, base, fine, sigma_min)


def ended(times: np.ndarray) -> np.ndarray:
    """Times whose last one is the clean sample's."""
    return np.append(times[:-1], 0.0)


def steps_of(sampler: Any, fine: int) -> int:
    """The steps that a grid is fitted for, those of the run.

    Raises:
      ValueError: a fine grid of no more steps, or of more than the process has.
    """
    n, most = len(sampler.run.times) - 1, sampler.run.process.steps or 1000
    if not n < fine < most:
        raise ValueError(f"--fit fine={fine}; allowed: more than the {n} steps of the run, below {most}")
    return n


def content(process: Process, times: np.ndarray, **settings: Any) -> dict[str, Any]:
    """What a grid's file holds beside what it says of the run."""
    return {"process": process.name, "times": [float(t) for t in times], "settings": settings}
