"""What solvers with learned tables share: their file, and the form that every deterministic linear solver takes.

  x_{i+1} = a_i x_0 + sum_{j <= i} b_ij u_j,    u_j = (alpha' x0_j + sigma' eps_j)/(alpha sigma' - alpha' sigma) at t_j

x_0 is the initial noise, x0_j and eps_j the prediction at x_j. u is the velocity: eps - x0 of a flow, alpha eps - sigma
x0 (v) of a variance-preserving process, eps of a variance-exploding one, whatever clock the process has. Since
x0 = q x - sigma u and eps = alpha u - p x, with (p, q) = (alpha', sigma')/(alpha sigma' - alpha' sigma), the table of any
linear solver can be multiplied out into this form (`unrolled`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from difax.accel.caches.measured import naming, read, record, same_length, source
from difax.core.contracts import Array, Level, Row
from difax.accel.solvers.linear import LinearTable, tabulated


def slopes(level: Level) -> tuple[Array, Array]:
    """(p, q) of u = p x0 + q eps."""
    d = level.alpha * level.sigma_dot - level.alpha_dot * level.sigma
    return level.alpha_dot / d, level.sigma_dot / d


def slots_of(n: int) -> tuple[str, ...]:
    """What a table of n evaluations keeps: x_0, and all velocities but the last."""
    return ("start", *(f"u{j}" for j in range(n - 1)))


def table_of(a: Array, b: Array, level: Level, xp: Any = np) -> Array:
    """W [n, outputs, inputs] of the linear engine, with `slots_of(n)`.

    Args:
      a: [n]. b: [n, n], of which the lower triangle is read. level: at the n times. xp: numpy, or jax.numpy.
    """
    n, (p, q) = len(a), slopes(level)
    first, own = xp.arange(n) == 0, xp.eye(n)[:, : n - 1]  # own: [i, j], is u_j made at evaluation i
    last = xp.diagonal(b)
    before = xp.tril(b, -1)[:, : n - 1]
    zero = xp.zeros(n)
    x = xp.concatenate([xp.stack([xp.where(first, a, 0), p * last, q * last, xp.where(first, 0, a)], 1), before], 1)
    start = xp.concatenate([xp.stack([1.0 * first, zero, zero, 1.0 - first], 1), xp.zeros((n, n - 1))], 1)
    made = xp.stack([0 * own, p[:, None] * own, q[:, None] * own, 0 * own], 2)  # of u_j: [n, n - 1, 4]
    kept = xp.eye(n - 1)[None] * (1 - own)[:, :, None]
    return xp.concatenate([x[:, None], start[:, None], xp.concatenate([made, kept], 2)], 1)


def full_table(n: int) -> LinearTable:
    """A table in which every entry of a and b has a weight, for fits: its `used` holds for all of them."""
    ones = Level(*(np.full(n, v) for v in (0.5, 0.5, -1.0, 1.0)))
    return tabulated(table_of(np.ones(n), np.ones((n, n)), ones))


def unrolled(rows: Row) -> tuple[np.ndarray, np.ndarray]:
    """(a [n], b [n, n]) of a linear solver's rows, in float64.

    Raises:
      ValueError: rows of a solver that is not linear, or that draws noise.
    """
    table = rows.coefficients
    if not isinstance(table, LinearTable):
        raise ValueError("a start is unrolled from a table of the linear engine, which this solver has not")
    w, (p, q) = np.asarray(table.weights, np.float64), slopes(rows.level)
    n, outputs, inputs = w.shape
    if inputs > outputs + 2 and w[:, :, outputs + 2 :].any():
        raise ValueError("a start draws noise; allowed: a deterministic solver")
    state = np.zeros((outputs, 1 + n))  # of x and the slots: how much of x_0 and of each u is in them
    state[0, 0] = 1.0
    a, b = np.zeros(n), np.zeros((n, n))
    for i in range(n):
        u = np.eye(1 + n)[1 + i]
        x0 = q[i] * state[0] - rows.level.sigma[i] * u
        eps = rows.level.alpha[i] * u - p[i] * state[0]
        state = w[i, :, : outputs + 2] @ np.stack([state[0], x0, eps, *state[1:]])
        a[i], b[i] = state[0, 0], state[0, 1:]
    return a, b


def read_learned(
    technique: str, file: str, shapes: Mapping[str, tuple[str, ...]]
) -> tuple[dict[str, np.ndarray], tuple[Mapping[str, Any], ...]]:
    """The numbers of a learned solver's file, and what it says of itself.

    Args:
      shapes: {name: the axes of its array, each a letter}; axes of one letter have one length, that of "times" is n.

    Raises:
      ValueError: no such file, one of another technique, or numbers that are missing, not finite or of another shape;
        times that do not decrease within (0, 1].
    """
    content = read(technique, file, tuple(shapes))
    found, lengths = {}, {}
    for name, axes in shapes.items():
        what = f"{source(technique, file)}: {name!r}"
        try:
            array = np.asarray(content[name], np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"{what} is no array of numbers; allowed: [{', '.join(axes)}] of them") from None
        fits = array.ndim == len(axes) and array.size > 0
        fits = fits and all(lengths.setdefault(axis, size) == size for axis, size in zip(axes, array.shape, strict=True))
        if not fits:
            known = ", ".join(f"{axis} = {size}" for axis, size in lengths.items())
            raise ValueError(f"{what} is {list(array.shape)}; allowed: [{', '.join(axes)}] ({known or 'one or more'})")
        if not np.isfinite(array).all():
            raise ValueError(f"{what} has numbers that are not finite; allowed: finite numbers")
        found[name] = array
    times = found["times"]
    if not np.all(np.diff(times) < 0) or times[0] > 1 or times[-1] <= 0:
        raise ValueError(f"{source(technique, file)}: 'times' do not decrease within (0, 1]; allowed: such that do")
    return found, record(technique, file)


def check_steps(technique: str, file: str, times: np.ndarray, evaluations: int) -> None:
    """Refuses a run of another number of steps than a learned table has evaluations."""
    with naming(file):
        same_length(technique, evaluations, len(times) - 1)
