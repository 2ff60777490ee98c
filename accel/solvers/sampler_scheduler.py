"""One solver and then another. Cheng, Sampler Scheduler for Diffusion Models, 2023, arXiv:2311.06845."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from difax.accel.solvers.nested import inner
from difax.core.annotations import checked
from difax.core.contracts import Array, Row, Solver
from difax.core.grids import check_times
from difax.core.process import Process


class Switched(NamedTuple):
    """The tables of both solvers, padded to all evaluations; that of one without a step is None."""

    first: Any
    second: Any
    late: Array  # bool: an evaluation of the second


@checked
def sampler_scheduler(
    first: str | Solver = "euler_ancestral", second: str | Solver = "heun", switch: float = 0.5
) -> Solver:
    """The steps that begin above a time are the first solver's, the others the second's; one grid for both.

    The second begins as it always does, with nothing remembered, where the first has stopped; both states are carried,
    and each evaluation runs the step of one of them.

    Args:
      first, second: names of solvers, with their own defaults, or ready ones (`SOLVERS["ddim"](eta=0.5)`).
      switch: process time in [0, 1] (0.5); 1 is the second alone, 0 the first. The authors switch from a stochastic
        solver to one of the ODE.

    Returns:
      A `Solver` whose state is both.

    Raises:
      ValueError: an unknown name, a solver that decides in the run, a second one that begins with noise of its own.

    References: Cheng 2023, arXiv:2311.06845. The authors give the index of the step and schedules of more samplers;
      here it is a time, and two of them.
    """
    if not 0 <= switch <= 1:
        raise ValueError(f"sampler_scheduler: switch={switch}; allowed: 0 ... 1")
    one, two = inner("sampler_scheduler: first", first), inner("sampler_scheduler: second", second)
    if two.start is not None and switch < 1:
        raise ValueError(
            "sampler_scheduler: second begins with noise before its first evaluation; allowed: such a solver as first"
        )

    def grid(process: Process, times: np.ndarray) -> Row:
        check_times(times)
        early = int(np.sum(times[:-1] > switch))
        begun = one.grid(process, times[: early + 1]) if early else None
        ended = two.grid(process, times[early:]) if early < len(times) - 1 else None
        return _joined(begun, ended, early)

    def step(prediction, x, state, row, keys):
        c = row.coefficients

        def run(solver: Solver, table: Any, own: Any):
            return solver.step(prediction, x, own, row._replace(coefficients=table), keys)

        def begin(x, state):
            x, own = run(one, c.first, state[0])
            return x, (own, state[1])

        def end(x, state):
            x, own = run(two, c.second, state[1])
            return x, (state[0], own)

        if c.first is None or c.second is None:
            return (end if c.first is None else begin)(x, state)
        return jax.lax.cond(c.late, end, begin, x, state)

    def start(x, row, keys):
        c = row.coefficients
        solver, table = (one, c.first) if c.first is not None else (two, c.second)
        return x if solver.start is None else solver.start(x, row._replace(coefficients=table), keys)

    return Solver(
        grid=grid,
        init=lambda x: (one.init(x), two.init(x)),
        step=step,
        start=None if one.start is None and two.start is None else start,
        derivatives=one.derivatives or two.derivatives,
    )


def _joined(begun: Row | None, ended: Row | None, early: int) -> Row:
    """The rows of both, one behind the other."""
    parts = [rows for rows in (begun, ended) if rows is not None]
    e = [0 if rows is None else len(rows.i) for rows in (begun, ended)]
    tables = [
        None if rows is None else _padded(rows.coefficients, pad)
        for rows, pad in ((begun, (0, e[1])), (ended, (e[0], 0)))
    ]
    plain = [rows._replace(coefficients=(), step=rows.step + (early if rows is ended else 0)) for rows in parts]
    joined = jax.tree.map(lambda *a: np.concatenate(a), *plain)
    count = np.arange(sum(e), dtype=np.int32)
    table = Switched(*tables, late=count >= e[0])
    return joined._replace(i=count, fresh=count == 0, coefficients=table)


def _padded(table: Any, rows: tuple[int, int]) -> Any:
    """A table with so many rows of zeros before and behind."""
    return jax.tree.map(lambda a: np.pad(a, [rows] + [(0, 0)] * (np.ndim(a) - 1)), table)
