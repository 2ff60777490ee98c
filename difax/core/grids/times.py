"""What every grid promises: strictly decreasing times in float64, and what the network is told at them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from difax.core.contracts import Row
from difax.core.process import Process, log_snr


class Times(NamedTuple):
    """What a grid returns where the network is told something else than `Process.model_time` says of its times.

    times: [n + 1], as a grid returns them alone. told: [n], the model's time at each of times[:-1] (a rounded one).
    """

    times: np.ndarray
    told: np.ndarray


Grid = Callable[[Process, int], np.ndarray | Times]

MOST_STEPS = 10_000  # of a run: each is tabulated on the host, and planned for one by one


def make_times(grid: Grid, process: Process, n: int) -> np.ndarray:
    """Evaluates a grid and checks it: n in range, times strictly decreasing from at most 1 to 0 or to where it ends.

    Raises:
      ValueError: n < 1, more steps than the process has, or a grid that repeats a time.
    """
    return lay_times(grid, process, n)[1]


def lay_times(grid: Grid, process: Process, n: int) -> tuple[Process, np.ndarray]:
    """The times of a grid (`make_times`), with the process whose model times are those that the grid tells.

    Returns:
      The process, as it was where the grid says nothing of model times, else with another `model_time` at these very
      times; and the times [n + 1].
    """
    if not 1 <= n <= MOST_STEPS:
        raise ValueError(f"steps={n}; allowed: 1 or more, up to {MOST_STEPS}")
    if process.steps is not None and n > process.steps:
        raise ValueError(f"steps={n}; {process.name} has {process.steps} steps; allowed: 1 ... {process.steps}")
    with np.errstate(all="ignore"):  # times that are no numbers are refused
        found = grid(process, n)
    told = None
    if isinstance(found, Times):
        found, told = found
    times = np.asarray(found, np.float64)
    check_times(times)
    return process if told is None else telling(process, times[:-1], np.asarray(told, np.float64)), times


def telling(process: Process, times: np.ndarray, told: np.ndarray) -> Process:
    """A process that tells the network `told` at `times` [n], and what it told before elsewhere, or where times are
    decided in the run: a midpoint between two times of a grid has a model time of its own."""
    if told.shape != times.shape or not np.isfinite(told).all():
        raise ValueError(f"a grid tells model times of shape {told.shape} for {len(times)} evaluations")
    ascending, own = np.argsort(times), process.model_time

    def model_time(t):
        if isinstance(t, jax.Array):
            return own(t)
        t = np.asarray(t, np.float64)
        at = ascending[np.minimum(np.searchsorted(times[ascending], t), len(times) - 1)]
        return np.where(times[at] == t, told[at], own(t))

    return process._replace(model_time=model_time)


def check_times(times: np.ndarray) -> None:
    """Raises ValueError unless times decrease strictly within [0, 1]."""
    if times.ndim != 1 or len(times) < 2 or not np.all(np.diff(times) < 0) or times[0] > 1 or times[-1] < 0:
        raise ValueError(f"times must decrease strictly within [0, 1], at least two of them; got {_shown(times)}")


def _shown(times: np.ndarray) -> str:
    """The first times that are not less than the one before them, or all of few."""
    bad = np.flatnonzero(~(np.diff(times) < 0)) if times.ndim == 1 else np.zeros(0, int)
    if times.ndim != 1 or len(times) <= 8 or not len(bad):
        return " ".join(np.array2string(times, threshold=8).split())
    return f"{times[bad[0]]:g} and then {times[bad[0] + 1]:g}, of {len(times)}"


def lay_rows(process: Process, t: np.ndarray, step: np.ndarray, coefficients) -> Row:
    """Rows of the evaluations at times t [E], with the noise levels and model times filled in, all float64.

    Args:
      step: [E] index of the solver step of each evaluation.
      coefficients: the solver's table, a pytree whose leaves lead with [E].
    """
    t = np.asarray(t, np.float64)
    return Row(
        i=np.arange(len(t), dtype=np.int32),
        step=np.asarray(step, np.int32),
        t=t,
        model_time=process.model_time(t),
        level=process.level(t),
        coefficients=coefficients,
        guided=np.zeros(len(t), bool),
        fresh=np.arange(len(t)) == 0,
    )


def ratios(process: Process, t: np.ndarray) -> np.ndarray:
    """The noise levels sigma/alpha at times t, float64; 0 at t = 0, infinite where alpha = 0."""
    return np.exp(-0.5 * log_snr(process, np.asarray(t, np.float64)))


def times_of_ratios(process: Process, ratio: np.ndarray) -> np.ndarray:
    """The times at which sigma/alpha takes these values; those at the ends of the process are its t_max and t_min."""
    ratio = np.asarray(ratio, np.float64)
    with np.errstate(divide="ignore"):
        times = np.asarray(process.inverse(-np.log(ratio)), np.float64)
    for end in (process.t_min, process.t_max):
        times = np.where(np.isclose(ratio, ratios(process, np.array(end)), rtol=1e-12, atol=0), end, times)
    return np.where(ratio == 0, 0.0, times)


def from_indices(process: Process, k: np.ndarray) -> np.ndarray:
    """The times of discrete steps k, and then 0."""
    assert process.steps is not None
    return np.append((np.asarray(k, np.float64) + 1) / process.steps, 0.0)
