"""What solvers with learned tables share: their file, and the form that every deterministic linear solver takes.

  x_{i+1} = a_i x_0 + sum_{j <= i} b_ij u_j,    u_j = (alpha' x0_j + sigma' eps_j)/(alpha sigma' - alpha' sigma) at t_j

x_0 is the initial noise, x0_j and eps_j the prediction at x_j. u is the velocity: eps - x0 of a flow, alpha eps - sigma
x0 (v) of a variance-preserving process, eps of a variance-exploding one, whatever clock the process has. Since
x0 = q x - sigma u and eps = alpha u - p x, with (p, q) = (alpha', sigma')/(alpha sigma' - alpha' sigma), that of any
linear solver can be multiplied out into this form (`unrolled`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from difax.accel.caches.measured import naming, read, same_length, source
from difax.accel.solvers.linear import LinearTable, tabulated
from difax.core.contracts import Array, Level, Row


def slopes(level: Level) -> tuple[Array, Array]:
    """(p, q) of u = p x0 + q eps."""
    d = level.alpha * level.sigma_dot - level.alpha_dot * level.sigma
    return level.alpha_dot / d, level.sigma_dot / d


def slots_of(n: int) -> tuple[str, ...]:
    """What a table of n evaluations keeps: x_0, and all velocities but the last."""
    return ("start", *(f"u{j}" for j in range(n - 1)))


def scattered(shape: tuple[int, ...], entries: Sequence[tuple[Any, Any, Any, Any]], xp: Any = np) -> Array:
    """Zeros [E, outputs, inputs] with values put in.

    Args:
      entries: (evaluations, outputs, inputs, values), which are broadcast against each other; no place twice.
      xp: numpy, or jax.numpy for values that are traced.
    """
    places, values = [], []
    for *place, value in entries:
        size = np.broadcast_shapes(*map(np.shape, place))
        places.append([np.broadcast_to(k, size).ravel() for k in place])
        values.append(xp.broadcast_to(xp.asarray(value), size).ravel())
    at = tuple(map(np.concatenate, zip(*places, strict=True)))
    flat = xp.concatenate(values)
    if xp is np:
        w = np.zeros(shape)
        w[at] = flat
        return w
    return xp.zeros(shape, flat.dtype).at[at].set(flat)


def kept(n: int, first: int, inputs: int) -> list[tuple[Any, Any, Any, Any]]:
    """Entries of n - 1 slots, of which the j-th is made at evaluation j, in which they stay as they are elsewhere.

    Args:
      first: index of the output of slot 0. inputs: of the input of slot 0.
    """
    i, j = np.nonzero(~np.eye(n, n - 1, dtype=bool))
    return [(i, first + j, inputs + j, 1.0)]


def table_of(a: Array, b: Array, level: Level, xp: Any = np) -> Array:
    """W [n, outputs, inputs] of the linear engine, with `slots_of(n)`.

    Args:
      a: [n]. b: [n, n], of which the lower triangle is read. level: at the n times. xp: numpy, or jax.numpy.
    """
    n, (p, q) = len(a), slopes(level)
    every, last, (i, j) = np.arange(n), xp.diagonal(b), np.tril_indices(n, -1)
    own = np.arange(n - 1)
    x, x0, eps, start, u = 0, 1, 2, 3, 4  # inputs; of the outputs, x is 0, start 1, and the velocities begin at 2
    entries = [
        (0, 0, x, a[0]),
        (every[1:], 0, start, a[1:]),
        (every, 0, x0, p * last),
        (every, 0, eps, q * last),
        (i, 0, u + j, b[i, j]),
        (0, 1, x, 1.0),
        (every[1:], 1, start, 1.0),
        (own, 2 + own, x0, p[:-1]),
        (own, 2 + own, eps, q[:-1]),
        *kept(n, 2, u),
    ]
    return scattered((n, 1 + n, 3 + n), entries, xp)


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
    technique: str, file: str, shapes: Mapping[str, tuple[str, ...]], words: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The numbers of a learned solver's file.

    Args:
      shapes: {name: the axes of its array, each a letter}; axes of one letter have one length, that of "times" is n.
      words: names of what it holds besides, as it stands there.

    Raises:
      ValueError: no such file, one of another technique, or numbers that are missing, not finite or of another shape;
        times that do not decrease within (0, 1].
    """
    content = read(technique, file, (*shapes, *words))
    found: dict[str, Any] = {name: content[name] for name in words}
    lengths: dict[str, int] = {}
    for name, axes in shapes.items():
        what = f"{source(technique, file)}: {name!r}"
        try:
            array = np.asarray(content[name], np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"{what} is no array of numbers; allowed: [{', '.join(axes)}] of them") from None
        fits = array.ndim == len(axes) and array.size > 0
        fits = fits and all(
            lengths.setdefault(axis, size) == size for axis, size in zip(axes, array.shape, strict=True)
        )
        if not fits:
            known = ", ".join(f"{axis} = {size}" for axis, size in lengths.items())
            raise ValueError(f"{what} is {list(array.shape)}; allowed: [{', '.join(axes)}] ({known or 'one or more'})")
        if not np.isfinite(array).all():
            raise ValueError(f"{what} has numbers that are not finite; allowed: finite numbers")
        found[name] = array
    times = found["times"]
    if not np.all(np.diff(times) < 0) or times[0] > 1 or times[-1] <= 0:
        raise ValueError(f"{source(technique, file)}: 'times' do not decrease within (0, 1]; allowed: such that do")
    return found


def check_steps(technique: str, file: str, times: np.ndarray, evaluations: int) -> None:
    """Refuses a run, with its times [steps + 1], of another number of steps than a file is for."""
    with naming(file):
        same_length(technique, evaluations, len(times) - 1)
