"""Restart sampling. Xu, Deng, Cheng, Tian, Liu & Jaakkola, 2023, arXiv:2306.14878."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from difax.accel.solvers.heun import SLOTS, check_space, lay_step, risen, straight
from difax.accel.solvers.linear import Steps, linear
from difax.core.annotations import brief, checked
from difax.core.contracts import Solver
from difax.core.process import Process

MOST = 10_000  # evaluations of an interval


@checked
def restart(
    plan: Mapping[Any, Sequence[float]] | Sequence[Sequence[float]] = ((3, 2, 0.06, 0.3),),
    s_noise: float = 1.003,
    rho: float = 7.0,
    space: str | None = None,
) -> Solver:
    """Heun's method that goes back up with fresh noise, K times over an interval, and down again.

    In rho = sigma/alpha: when the main times have reached the one nearest to t_min, K times

      y <- y + s_noise sqrt(t_max^2 - t_min^2) z, y = x/alpha,

    and Heun's steps from t_max down to that time, over N points evenly spaced in rho^(1/7). Where that time is 0, they
    are spaced down to the lowest level of the process, and 0 behind them, to which the step is Euler's. The main times
    decrease as ever; the solver lays those that rise.

    Args:
      plan: [N, K, t_min, t_max] of each interval, alone or as the authors write them, {"0": [N, K, t_min, t_max], ...};
        N 2 or more, K 1 or more, 0 <= t_min < t_max (3, 2, 0.06, 0.3 is the shortest of CIFAR-10; ImageNet 64 has five,
        up to t_max = 40.79).
      s_noise: factor of the noise, above 0, up to 2 (1.003; 1 in the authors' commands).
      rho: exponent of the spacing inside, 0.01 ... 1000 (7).
      space: as in `heun`.

    Returns:
      A `Solver` whose state is the start of the step and its slope.

    Raises:
      ValueError: a plan of other numbers; or, from `grid`, t_max beyond the process, two intervals at one time, an
        interval above the first time or below where it begins.

    References: Xu et al. 2023, arXiv:2306.14878, algorithm 2, table 3; https://github.com/Newbeeer/diffusion_restart_sampling.
      The authors' code also churns inside (restart_gamma, 0.05 from rho 0.01 to 1 in their commands); the algorithm of
      the paper, as here, does not.
    """
    intervals = [_interval(part) for part in (plan.values() if isinstance(plan, Mapping) else plan)]
    if not intervals:
        raise ValueError(f"restart: plan={brief(plan)}; allowed: one interval or more (heun does without)")
    if not 0 < s_noise <= 2:
        raise ValueError(f"restart: s_noise={s_noise}; allowed: > 0, up to 2")
    if not 0.01 <= rho <= 1000:
        raise ValueError(f"restart: rho={rho}; allowed: 0.01 ... 1000")
    check_space("restart", space)

    def lay(steps: Steps, process: Process, times: np.ndarray) -> None:
        at = _places(process, times, intervals)
        count = 0
        for j in range(len(times) - 1):
            inner, again = at.get(j + 1, (None, 0))
            paths = [times[j : j + 2]]
            if inner is not None:
                inside = _inside(process, times[j + 1], *inner, rho)
                paths += [inside] * again
            for k, path in enumerate(paths):
                flow = straight("restart", space, process, path)
                for i in range(len(path) - 1):
                    last = i == len(path) - 2 and k < len(paths) - 1
                    rise = risen(process, path[-1], paths[k + 1][0], s_noise) if last else lambda x: x
                    lay_step(steps, process, path[i], path[i + 1], count, flow[i], rise=rise)
                    count += 1

    return linear(lay, SLOTS, noises=1)


def _interval(part: Any) -> tuple[int, int, float, float]:
    """N, K, t_min and t_max, checked."""
    allowed = "allowed: [N, K, t_min, t_max], N 2 or more, K 1 or more, 0 <= t_min < t_max"
    if not isinstance(part, (list, tuple)) or len(part) != 4:
        raise ValueError(f"restart: plan has {brief(part)}; {allowed}")
    points, again, low, high = part
    whole = all(float(v).is_integer() for v in (points, again))
    if not whole or points < 2 or again < 1 or not 0 <= low < high or points * again > MOST:
        raise ValueError(f"restart: plan has {brief(part)}; {allowed}, N K up to {MOST}")
    return int(points), int(again), float(low), float(high)


def _places(process: Process, times: np.ndarray, intervals: list) -> dict[int, tuple[tuple[int, float], int]]:
    """{index of the main time: ((N, t_max), K)}."""
    level, last = process.level(times), process.level(np.ones(()))
    with np.errstate(divide="ignore"):
        ratio, most = level.sigma / level.alpha, last.sigma / last.alpha
    at: dict[int, tuple[tuple[int, float], int]] = {}
    for points, again, low, high in intervals:
        j = int(np.argmin(np.abs(ratio - low)))
        where = f"restart: the interval from t_min={low:g} to t_max={high:g}"
        if j == 0 or j in at:
            raise ValueError(
                f"{where} falls on {'the first time' if j == 0 else 'the time of another'}; allowed: other bounds, or "
                "more steps"
            )
        least = max(ratio[j], _lowest(process))
        if not least < high <= most:
            raise ValueError(f"{where}; allowed here: t_max above {least:g}, up to {most:g} ({process.name} at t=1)")
        at[j] = ((points, high), again)
    return at


def _inside(process: Process, low: float, points: int, high: float, rho: float) -> np.ndarray:
    """The times of one way down again, the main time last."""
    level = process.level(low)
    end = level.sigma / level.alpha
    ratio = np.linspace(high ** (1 / rho), max(end, _lowest(process)) ** (1 / rho), points) ** rho
    inside = np.minimum(process.inverse(-np.log(ratio)), 1.0)
    return np.append(inside if end == 0 else inside[:-1], low)


def _lowest(process: Process) -> float:
    """sigma/alpha at the lowest level of the process."""
    level = process.level(np.float64(process.t_min))
    return float(level.sigma / level.alpha)
