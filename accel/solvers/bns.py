"""Bespoke non-stationary solvers. Shaul, Singer, Chen, Le, Thabet, Pumarola & Lipman, 2024, arXiv:2403.01329."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from difax.accel.solvers.euler import straighten
from difax.accel.solvers.learned import check_steps, read_learned, slots_of, table_of
from difax.accel.solvers.linear import Steps, linear, tabulated
from difax.core.annotations import checked, choose
from difax.core.contracts import Solver
from difax.core.grids import check_times, lay_rows
from difax.core.process import Process


@checked
def bns(file: str | None = None, start: str = "euler") -> Solver:
    """A solver whose every coefficient, and every time, was learned for one model and one number of evaluations.

    x_{i+1} = a_i x_0 + sum_{j <= i} b_ij u_j(x_j, t_j),

    with u as `difax.accel.solvers.learned` has it. `difax calibrate --solver bns` learns a, b and t by descent through
    the sampler, from the table of a generic solver, so that samples come as near as they can to those of many steps.

    Args:
      file: of `difax calibrate --solver bns`. Its times are taken and not those of the grid; the run has as many steps
        as the file has evaluations. None is the generic solver that learning begins with:
      start: on the straight path y = x/(alpha + sigma), whose velocity along r = sigma/(alpha + sigma) is eps - x0,
        "euler" (which is DDIM), "midpoint" (two evaluations a step, but one in a step to sigma = 0) or "ab2"
        (Adams-Bashforth of order 2 on uneven steps, the first one Euler's).

    Returns:
      A `Solver` whose state is x_0 and the velocities so far; of a start, what that keeps.

    Raises:
      ValueError: another start, or a file that is none of bns; times that are not as many as its evaluations.

    References: Shaul et al. 2024, arXiv:2403.01329, equations 10 to 12 (the family) and 14 (the loss). Their velocity
      is along the model's clock; ours is that over alpha sigma' - alpha' sigma, which is the same for flows and spans
      the same family for all.
    """
    if file is None:
        lay, slots = STARTS[choose("start of bns", start, STARTS)]
        return linear(lay, slots)
    found = read_learned("bns", file, {"times": ("n",), "a": ("n",), "b": ("n", "n")})
    t, a, b = found["times"], found["a"], found["b"]

    def grid(process: Process, times: np.ndarray):
        check_times(times)
        check_steps("bns", file, times, len(t))
        return lay_rows(process, t, np.arange(len(t)), tabulated(table_of(a, b, process.level(t))))

    return linear(lambda *_: None, slots_of(len(t)))._replace(grid=grid)


def _euler(steps: Steps, process: Process, times: np.ndarray) -> None:
    r, norm = straighten(process, times)
    for j in range(len(times) - 1):
        h = norm[j + 1] * (r[j + 1] - r[j])
        steps.row(times[j], j, x={"x": norm[j + 1] / norm[j], "x0": -h, "eps": h})


def _midpoint(steps: Steps, process: Process, times: np.ndarray) -> None:
    r, norm = straighten(process, times)
    middle = process.inverse(np.log1p(-(r[:-1] + r[1:]) / 2) - np.log((r[:-1] + r[1:]) / 2))
    r_m, norm_m = straighten(process, middle)
    for j in range(len(times) - 1):
        half, whole = norm_m[j] * (r_m[j] - r[j]), norm[j + 1] * (r[j + 1] - r[j])
        if r[j + 1] == 0:
            steps.row(times[j], j, x={"x": norm[j + 1] / norm[j], "x0": -whole, "eps": whole})
            continue
        steps.row(
            times[j], j, x={"x": norm_m[j] / norm[j], "x0": -half, "eps": half}, anchor={"x": norm[j + 1] / norm[j]}
        )
        steps.row(middle[j], j, x={"anchor": 1.0, "x0": -whole, "eps": whole})


def _ab2(steps: Steps, process: Process, times: np.ndarray) -> None:
    r, norm = straighten(process, times)
    h = np.diff(r)
    for j in range(len(times) - 1):
        w = h[j] / (2 * h[j - 1]) if j else 0.0
        new, old = norm[j + 1] * h[j] * (1 + w), norm[j + 1] * h[j] * w
        steps.row(
            times[j],
            j,
            x={"x": norm[j + 1] / norm[j], "x0": -new, "eps": new, "before": -old},
            before={"x0": -1.0, "eps": 1.0},
        )


STARTS: dict[str, tuple[Callable[[Steps, Process, np.ndarray], None], tuple[str, ...]]] = {
    "euler": (_euler, ()),
    "midpoint": (_midpoint, ("anchor",)),
    "ab2": (_ab2, ("before",)),
}
