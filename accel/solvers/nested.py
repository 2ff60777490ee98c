"""Solvers inside of solvers: by name, or ready made."""

from __future__ import annotations

from difax.core.annotations import choose
from difax.core.contracts import Solver


def inner(what: str, solver: str | Solver) -> Solver:
    """The solver that a key of another one names, with its own defaults, or that it was given.

    Args:
      what: that the message begins with ("mcg: solver").

    Raises:
      ValueError: an unknown name, one of another such solver, or a solver that decides in the run.
    """
    from difax.accel.solvers import NESTING, SOLVERS  # the registry holds those that are made here too

    if isinstance(solver, Solver):
        made = solver
    else:
        made: Solver = SOLVERS[choose(what, solver, [name for name in SOLVERS if name not in NESTING])]()
    if made.drive != "scan":
        raise ValueError(f"{what} decides on its evaluations in the run; allowed: one that takes them in order")
    return made
