"""Improved integration approximation. Zhang, Niwa & Kleijn, 2023 (ICLR 2024), arXiv:2304.11328."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from difax.accel.caches.measured import source
from difax.accel.solvers.dpmpp_2m import dpmpp_2m
from difax.accel.solvers.learned import check_steps, read_learned
from difax.accel.solvers.linear import Steps, linear
from difax.core.annotations import checked, choose
from difax.core.contracts import Solver
from difax.core.process import Process

Lay = Callable[[Steps, Process, np.ndarray], None]


@checked
def iia(file: str | None = None, base: str = "ddim") -> Solver:
    """A known solver, and in every step a few multiples of the last differences of its outputs, fitted in advance.

    x_s = base(x) + sum_{j < r} gamma_{k,j} (g_{k-j} - g_{k-j-1})

    where g_k is the output at evaluation k. `difax calibrate --solver iia` finds gamma by least squares, step by step,
    against the base on finer times from the same x. gamma = 0 is the base.

    Args:
      file: of `difax calibrate --solver iia`, which says its base and its times; they are taken and not those of
        the grid, and the run has as many steps. None is the base alone.
      base: "ddim" (g = eps), "dpmpp_2m" (g = x0), or "edm" (g = eps): Heun along sigma/alpha, two evaluations a step,
        of which only the one that ends the step is corrected, and one in a step to sigma = 0; it needs alpha > 0.

    Returns:
      A `Solver` whose state is the last outputs.

    References: Zhang et al. 2023, arXiv:2304.11328. For EDM they have a second form, which scales parts of the update;
      here all three bases have the form of differences.
    """
    if file is None:
        return linear(improved(choose("base of iia", base, BASES), np.zeros((0, 0))), slots_of(1))
    found = read_learned("iia", file, {"times": ("n",), "gamma": ("e", "r")}, words=("base",))
    name, gamma, t = str(found["base"]), found["gamma"], found["times"]
    choose(f"{source('iia', file)}: base of iia", name, BASES)
    solver = linear(improved(name, gamma), slots_of(gamma.shape[1]))
    most = len(t) if name != "edm" else 2 * len(t) - 1
    if len(gamma) != most:
        raise ValueError(f"{source('iia', file)}: 'gamma' has {len(gamma)} rows; allowed: {most}, its evaluations")

    def grid(process: Process, times: np.ndarray):
        check_steps("iia", file, times, len(t))
        return solver.grid(process, np.append(t, 0.0))

    return solver._replace(grid=grid)


def slots_of(r: int) -> tuple[str, ...]:
    """What is kept: x at the start of a step (of edm), and the last r outputs."""
    return ("anchor", *(f"g{j + 1}" for j in range(r)))


def improved(base: str, gamma: np.ndarray) -> Lay:
    """The lay of a base with its corrections.

    Args:
      base: of `BASES`. gamma: [E, r], or empty for none; those of differences that are not there yet are not read.
    """
    output, lay = BASES[base]

    def laid(steps: Steps, process: Process, times: np.ndarray) -> None:
        r, depth = gamma.shape[1], sum(name.startswith("g") for name in steps.outputs)
        older = {f"g{j + 1}": {f"g{j}": 1.0} for j in range(1, depth)}

        def row(t: float, step: int, x: Mapping[str, float], ends: bool = True, **slots: Mapping[str, float]) -> None:
            k = len(steps.t)
            total = dict(x)
            for j in range(min(r, k) if ends else 0):
                for name, sign in ((output if j == 0 else f"g{j}", 1.0), (f"g{j + 1}", -1.0)):
                    total[name] = total.get(name, 0.0) + sign * gamma[k, j]
            steps.row(t, step, total, g1={output: 1.0}, **older, **slots)

        lay(row, process, times)

    return laid


def _ddim(row: Callable[..., None], process: Process, times: np.ndarray) -> None:
    level = process.level(times[1:])
    for j in range(len(times) - 1):
        row(times[j], j, {"x0": level.alpha[j], "eps": level.sigma[j]})


def _dpmpp_2m(row: Callable[..., None], process: Process, times: np.ndarray) -> None:
    weights = dpmpp_2m().grid(process, times).coefficients.weights[:, 0]  # of x, x0, eps and the x0 before
    for j in range(len(times) - 1):
        row(times[j], j, dict(zip(("x", "x0", "eps", "g1"), weights[j].tolist(), strict=True)))


def _edm(row: Callable[..., None], process: Process, times: np.ndarray) -> None:
    level = process.level(times)
    if not np.all(level.alpha > 0):
        raise ValueError(f"iia: base=edm at a time of {process.name} where alpha = 0; allowed: base ddim, dpmpp_2m")
    rho = level.sigma / level.alpha
    for j in range(len(times) - 1):
        h, here, there = rho[j + 1] - rho[j], level.alpha[j], level.alpha[j + 1]
        euler = {"x": there / here, "eps": there * h}
        if rho[j + 1] == 0:
            row(times[j], j, euler)
            continue
        row(times[j], j, euler, ends=False, anchor={"x": there / here, "eps": there * h / 2})
        row(times[j + 1], j, {"anchor": 1.0, "eps": there * h / 2})


BASES: dict[str, tuple[str, Callable[..., None]]] = {
    "ddim": ("eps", _ddim),
    "dpmpp_2m": ("x0", _dpmpp_2m),
    "edm": ("eps", _edm),
}
