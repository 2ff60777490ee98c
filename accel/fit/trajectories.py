"""What a model says along fine trajectories: the measurements that grids are fitted to.

The network, with the run's guidance, is evaluated through a sampler of one row that returns its data prediction, so
that all points of all trajectories share one compilation. What is made of them is numpy in float64 on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.core.contracts import Accelerator, Solver
from difax.core.grids import GRIDS, lay_rows, make_times
from difax.core.grids.times import ratios, times_of_ratios
from difax.core.process import Process
from difax.core.sample import make_rows


def probe() -> Solver:
    """A solver of one evaluation at each time, whose samples are the data prediction there."""

    def grid(process: Process, times: np.ndarray):
        return lay_rows(process, times, np.arange(len(times)), ())

    return Solver(grid, lambda x: (), lambda prediction, x, state, row, keys: (prediction.x0, state))


class Batch(NamedTuple):
    """One batch of the samples that are measured on.

    noise: float64 [B, ...]; predict(x, i) -> the data prediction of x [B, ...] at the i-th time, float64.
    start: index of its first sample.
    """

    noise: np.ndarray
    predict: Callable[[np.ndarray, int], np.ndarray]
    start: int


def batches(
    sampler: Any, times: np.ndarray, samples: int, batch: int, progress: Callable[[str], None]
) -> Iterator[Batch]:
    """The run's samples in batches, with its network at each of `times` [m], all of them above 0."""
    run, solver, neutral = sampler.run, probe(), Accelerator()
    rows = make_rows(solver, run.guide, run.process, times, neutral, run.model.stages)
    each = [jax.tree.map(lambda a, i=i: jnp.asarray(a[i : i + 1]), rows) for i in range(len(times))]
    program = sampler._replace(run=run._replace(solver=solver)).program(neutral)
    for start in range(0, samples, batch):
        x, keys, cond = sampler.inputs(start, min(batch, samples - start))
        kind = x.dtype

        def predict(x, i, keys=keys, cond=cond, kind=kind):
            found, _ = program(sampler.params, jnp.asarray(x, kind), keys, cond, each[i], sampler.scale())
            return np.asarray(found, np.float64)

        yield Batch(np.asarray(x, np.float64), predict, start)
        progress(f"{min(start + batch, samples)} of {samples} samples")


def trajectory(process: Process, times: np.ndarray, of: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The deterministic trajectory of a batch along fine times [m + 1], by DPM-Solver++ 2M in float64.

    Returns:
      x [m + 1, B, ...] at every time, and the data predictions [m, B, ...] at all but the last.
    """
    level = process.level(times)
    with np.errstate(divide="ignore"):
        lam = np.log(level.alpha) - np.log(level.sigma)
    x, outputs = [of.noise], []
    for i in range(len(times) - 1):
        outputs.append(of.predict(x[-1], i))
        towards = outputs[-1]
        if i > 0 and np.all(np.isfinite(lam[i - 1 : i + 2])):
            ratio = (lam[i + 1] - lam[i]) / (lam[i] - lam[i - 1])
            if ratio <= 2:  # as `dpmpp_2m` does, further it would reach too far
                towards = towards + ratio / 2 * (outputs[-1] - outputs[-2])
        x.append(ddim_step(level, i, i + 1, x[-1], towards))
    return np.stack(x), np.stack(outputs)


def ddim_step(level: Any, i: int, j: int, x: np.ndarray, x0: np.ndarray) -> np.ndarray:
    """From the i-th to the j-th level towards a data prediction: (sigma_j/sigma_i)(x - alpha_i x0) + alpha_j x0."""
    return level.sigma[j] / level.sigma[i] * (x - level.alpha[i] * x0) + level.alpha[j] * x0


def fine_times(process: Process, base: str, fine: int, sigma_min: float | None = None) -> np.ndarray:
    """The times [fine + 1] of a plain grid: to the clean sample, or to the noise level sigma/alpha = sigma_min."""
    if sigma_min is None:
        return make_times(GRIDS[base](), process, fine)
    end = float(times_of_ratios(process, np.array(max(sigma_min, ratios(process, np.array(process.t_min))))))
    return make_times(GRIDS[base](), process._replace(t_min=end), fine + 1)[:-1]
