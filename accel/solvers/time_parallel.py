"""What the solvers that are parallel in time have in common: a window of DDIM's steps as a triangular system.

Of a window of W rows the points x_0 ... x_W are unknown but for x_0; row j maps x_j to F_j(x_j), its noise being the
one that the scan would give it. With residuals r_j = F_j(x_j) - x_{j+1} and a scale s_j of the points,

  x_{i+1} + R_i,  R_i = sum over the last k rows j <= i of (s_{i+1}/s_{j+1}) r_j

is x_{i+1} from k steps at once whose predictions are taken at the points as they are: with s = 1 Picard's iteration,
with s = alpha the same for eps alone, x/alpha being linear in it. A sum of residuals has no cancelling of large terms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.solvers.ddim import ddim
from difax.accel.solvers.ddim import width as ddim_width
from difax.core.contracts import Array, Prediction, Row, Solver
from difax.core.drive import per_sample, width
from difax.core.process import Process


class WindowTable(NamedTuple):
    """step: of DDIM. scale: s at the row's end. limit: what a row's error is held against."""

    step: Any
    scale: Array
    limit: Array


class Window(NamedTuple):
    """at: [B] the first row of the window. x: [B, W + 1, ...] its points; those behind the last row are copies.
    memory: of the method, leaves lead with [B]."""

    at: jax.Array
    x: jax.Array
    memory: Any


class Found(NamedTuple):
    """What the evaluations of a window came to.

    mapped: F [B, W, ...]. residual: r [B, W, ...], 0 where there is no row. there: [B, W], is there a row. rows: of
    them.
    """

    mapped: jax.Array
    residual: jax.Array
    there: jax.Array
    rows: Row


def time_parallel(
    eta: float,
    window: int | None,
    scale: Callable[[Array], Array],
    limit: Callable[[Array], Array],
    begin: Callable[[jax.Array], Any],
    update: Callable[[Window, Found], tuple[jax.Array, jax.Array, Callable[[jax.Array], Any]]],
) -> Solver:
    """A solver of DDIM's chain by windows.

    Args:
      eta: of DDIM. window: W; None: all rows.
      scale(alpha) -> s. limit(w) -> what each row's error is held against, of w [E + 1], the standard deviations of the
        noise that the rows would have at eta = 1 (and one 0 behind them).
      begin(points [B, W, ...]) -> the method's memory.
      update(state, found) -> (points [B, W, ...] behind each row, done, slide): done [B], how many leading rows of the
        window are final; slide(done) -> the memory of the window that has moved on by so many.
    """
    base = ddim(eta)

    def grid(process: Process, times: np.ndarray) -> Row:
        rows = base.grid(process, times)
        t, s = process.level(times[:-1]), process.level(times[1:])
        table = WindowTable(rows.coefficients, scale(s.alpha), limit(np.append(ddim_width(t, s, 1.0), 0.0)))
        return rows._replace(coefficients=table)

    def init(x, rows):
        points = jnp.repeat(x[:, None], width(solver, rows) + 1, 1)
        return Window(jnp.zeros(len(x), jnp.int32), points, begin(points[:, 1:]))

    def ask(state, rows):
        index = state.at[:, None] + jnp.arange(state.x.shape[1] - 1, dtype=jnp.int32)[None]
        return state.x[:, :-1], jnp.minimum(index, len(rows.i) - 1), state.at < len(rows.i)

    def step(prediction, x, state, row, keys):
        batch, wide = x.shape[:2]
        flat = lambda a: a.reshape(batch * wide, *a.shape[2:])  # noqa: E731
        table = jax.tree.map(flat, row.coefficients.step)
        each = Prediction(flat(prediction.x0), flat(prediction.eps), None)
        mapped, _ = base.step(each, flat(x), (), row._replace(coefficients=table), keys.reshape(-1))
        mapped = mapped.reshape(x.shape)
        # rows in order are distinct; the last one, again, stands for those behind it
        there = jnp.concatenate([jnp.ones((batch, 1), bool), row.i[:, 1:] > row.i[:, :-1]], 1)
        residual = jnp.where(per_sample(there, x.ndim), mapped - state.x[:, 1:], 0)
        points, done, slide = update(state, Found(mapped, residual, there, row))
        done = jnp.minimum(done, there.sum(1)).astype(jnp.int32)
        points = jnp.concatenate([state.x[:, :1], points], 1)
        from_ = jnp.minimum(jnp.arange(wide + 1)[None] + done[:, None], wide)
        points = jax.vmap(lambda a, i: a[i])(points, from_)
        return points[:, 0], Window(state.at + done, points, slide(done))

    solver = Solver(grid=grid, init=init, step=step, drive="window", ask=ask, window=window)
    return solver


def summed(found: Found, order: int | None = None) -> jax.Array:
    """R [B, W, ...] of the last `order` rows (None: of all in the window)."""
    r, s = found.residual, found.rows.coefficients.scale
    i = jnp.arange(r.shape[1])
    near = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - (order or r.shape[1]))
    weights = jnp.where(near[None], s[:, :, None] / s[:, None, :], 0)
    return jnp.einsum("bij,bj...->bi...", weights, r, precision="highest")


def mean_square(a: jax.Array) -> jax.Array:
    """[B, W], over each point."""
    return jnp.mean(jnp.square(a), axis=tuple(range(2, a.ndim)))


def leading(good: jax.Array) -> jax.Array:
    """[B], how many of [B, W] hold from the first on."""
    return jnp.cumprod(good.astype(jnp.int32), 1).sum(1)


def slid(a: jax.Array, done: jax.Array, axis: int) -> jax.Array:
    """What lies along a window's rows, each sample's moved on by `done` [B], with zeros behind."""
    wide = a.shape[axis]
    index = jnp.arange(wide)[None] + done[:, None]
    moved = jax.vmap(lambda a, i: jnp.take(a, jnp.minimum(i, wide - 1), axis - 1))(a, index)
    inside = (index < wide).reshape(len(a), *(1,) * (axis - 1), wide, *(1,) * (a.ndim - axis - 1))
    return jnp.where(inside, moved, 0)


def check_window(name: str, window: int | None, tolerance: float) -> None:
    """Refuses a window that is none, and a tolerance below 0."""
    if window is not None and window < 1:
        raise ValueError(f"{name}: window={window}; allowed: 1 or more, or None: all rows at once")
    if tolerance < 0:
        raise ValueError(f"{name}: tolerance={tolerance}; allowed: 0 or more")
