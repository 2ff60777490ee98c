"""Grids that are lists: times, noise levels or timesteps that a user gives, or a file of `difax calibrate --grid`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from difax.core.annotations import brief, checked
from difax.core.files import named, read_json
from difax.core.grids.times import Grid, times_of_ratios
from difax.core.process import Process


@checked
def given(
    times: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    ends: bool = False,
) -> Grid:
    """The times of a list, as many as the run has steps.

    Args:
      times: in [0, 1], descending; 0 is put behind them where the last is another.
      sigmas: noise levels sigma/alpha instead (of a flow sigma, which is its time); 0 is put behind them likewise.
      timesteps: what the network is told instead (0 ... T - 1 of a discrete process), then the clean sample.
      ends: does the run end at the last of them, which is no evaluation then. A 0 at the end always does.

    Raises:
      ValueError: none or several of them, or another number than the run's steps.
    """
    lists = {k: v for k, v in (("times", times), ("sigmas", sigmas), ("timesteps", timesteps)) if v is not None}
    if len(lists) != 1:
        told = " and ".join(f"{key}={brief(numbers)}" for key, numbers in lists.items()) or "nothing"
        raise ValueError(f"given: {told}; allowed: one of times, sigmas, timesteps")
    [(key, numbers)] = lists.items()
    values = np.asarray(numbers, np.float64)
    if not len(values) or not np.all(np.isfinite(values)):
        raise ValueError(f"given: {key}={brief(numbers)}; allowed: one or more finite numbers")

    def grid(process: Process, n: int) -> np.ndarray:
        found = values
        if key == "timesteps":
            low, high = process.model_time(np.array(0.0)), process.model_time(np.array(1.0))  # affine in t
            found = (values - low) / (high - low)
        elif key == "sigmas" and process.name not in ("flow", "sit"):
            if np.any(values < 0):
                raise ValueError(f"given: sigmas={brief(numbers)}; allowed: 0 or more")
            found = times_of_ratios(process, values)
        if not ends and found[-1] != 0:
            found = np.append(found, 0.0)
        if len(found) != n + 1:
            raise ValueError(
                f"given: {len(found) - 1} evaluations in {key}, ends={ends}; allowed: the {n} of steps={n}"
            )
        return found

    return grid


@checked
def measured(file: str) -> Grid:
    """The times that `difax calibrate --grid` wrote, for the number of steps that they were found for.

    Args:
      file: JSON with "times", and with "process", whose times they are.

    Raises:
      ValueError: no such file, or no times in it; times for another process or another number of steps.
    """
    where = f"measured: file={file!r}"
    try:
        content = read_json(file, "a JSON file of difax calibrate --grid")
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix(f'{named(file)}: ')}") from None
    times = content.get("times") if isinstance(content, Mapping) else None
    try:
        found = np.asarray(times, np.float64)
    except (TypeError, ValueError):
        found = np.zeros(0)
    if found.ndim != 1 or len(found) < 2:
        raise ValueError(f"{where} has times={brief(times)}; allowed: a list of two times or more")

    def grid(process: Process, n: int) -> np.ndarray:
        theirs = content.get("process", process.name)
        if theirs != process.name:
            raise ValueError(f"{where} has times of the process {brief(theirs)}; allowed: of {process.name}")
        if len(found) != n + 1:
            raise ValueError(f"{where} has times for {len(found) - 1} steps; allowed: the {n} of this run")
        return found

    return grid
