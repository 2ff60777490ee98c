"""DPM-Solver-12 and -23: adaptive steps. Lu, Zhou, Bao, Chen, Li & Zhu, DPM-Solver, 2022, arXiv:2206.00927."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.solvers.exponential import KINDS, checked_choice, levels_at
from difax.core.annotations import checked
from difax.core.contracts import Array, Row, Solver
from difax.core.drive import per_sample
from difax.core.grids import check_times, lay_rows
from difax.core.process import Process

KNOTS = 512  # of the tables along lambda
ENTER, FIRST, SECOND, THIRD, LEAVE = range(5)  # what an evaluation is: out of alpha = 0, of a step, into sigma = 0
INNER = {2: (0.5,), 3: (1 / 3, 2 / 3)}  # where in lambda the evaluations after the first are


class AdaptiveTable(NamedTuple):
    """Numbers of the run, the same in every row. low, high: lambda at both ends; t, log_alpha [E, K]: of lambdas evenly
    spaced between them; start: the grid's first time; enter, leave: is there a step out of alpha = 0, into sigma = 0;
    first, atol, rtol, safety: the solver's settings."""

    low: Array
    high: Array
    t: Array
    log_alpha: Array
    start: Array
    enter: Array
    leave: Array
    first: Array
    atol: Array
    rtol: Array
    safety: Array


class AdaptiveState(NamedTuple):
    """Of each sample. half, h: lambda where the step starts, and its length; x0, eps: the prediction there; second: the
    output of the second evaluation; before: the lower-order end of the last accepted step; stage; done."""

    half: jax.Array
    h: jax.Array
    x0: jax.Array
    eps: jax.Array
    second: jax.Array
    before: jax.Array
    stage: jax.Array
    done: jax.Array


@checked
def dpm_solver_12(
    first: float = 0.05,
    atol: float = 0.0078,
    rtol: float = 0.05,
    safety: float = 0.9,
    prediction: str = "eps",
) -> Solver:
    """DPM-Solver-12: single steps of order 2 whose length follows from their distance to order 1.

    From lambda_s by h to x_higher (`dpm_solver_2s`, r = 1/2) and x_lower (`ddim`), with x_before the lower end of the
    last accepted step,

      E = root mean square of (x_higher - x_lower)/max(atol, rtol max(|x_lower|, |x_before|)),
      E <= 1: accept, x = x_higher;    h = min(safety h E^{-1/2}, what is left of lambda).

    Every sample has steps of its own, so that a batch is its samples; the authors decide for a batch by its largest E.
    A rejected step is tried again from the evaluation at its start, which the authors make anew.

    The time of a lambda is read off a table of 512 with cubics in between: exact to 1e-8 where the process is smooth,
    and to 1e-5 of the samples between the steps of a discrete one.

    Of the grid only the first and the last time are used, and `steps` is the most evaluations that a sample may take
    (`Trace.unfinished`). A grid that ends at t = 0 is integrated to the process's t_min, where a last evaluation gives
    x0; one that begins where alpha = 0 is entered by a first-order step to t_max.

    Args:
      first: length of the first step in lambda, above 0 (0.05).
      atol, rtol: tolerances, above 0 (0.0078, a 256th of the range of images in [-1, 1], and 0.05).
      safety: theta, above 0, at most 1 (0.9).
      prediction: "eps", or "x0" for the adaptive form of DPM-Solver++.

    Returns:
      A `Solver` that decides in the run.

    References: Lu et al. 2022, arXiv:2206.00927, appendix C; the authors' code.
    """
    return _adaptive("dpm_solver_12", 2, first, atol, rtol, safety, prediction)


@checked
def dpm_solver_23(
    first: float = 0.05,
    atol: float = 0.0078,
    rtol: float = 0.05,
    safety: float = 0.9,
    prediction: str = "eps",
) -> Solver:
    """DPM-Solver-23: `dpm_solver_12` of orders 3 and 2, three evaluations a step.

    x_higher is `dpm_solver_3s` with r1 = 1/3 and r2 = 2/3, x_lower order 2 of its first two evaluations (r = 1/3), and
    h goes with E^{-1/3}.

    Args:
      first, atol, rtol, safety, prediction: as in `dpm_solver_12`.

    Returns:
      A `Solver` that decides in the run.

    References: Lu et al. 2022, arXiv:2206.00927, appendix C; the authors' code.
    """
    return _adaptive("dpm_solver_23", 3, first, atol, rtol, safety, prediction)


def _adaptive(name: str, order: int, first: float, atol: float, rtol: float, safety: float, prediction: str) -> Solver:
    for key, value in {"first": first, "atol": atol, "rtol": rtol}.items():
        if not value > 0:
            raise ValueError(f"{name}: {key}={value}; allowed: above 0")
    if not 0 < safety <= 1:
        raise ValueError(f"{name}: safety={safety}; allowed: above 0, at most 1")
    checked_choice(name, "prediction", prediction, KINDS)
    data, inner = prediction == "x0", INNER[order]

    def grid(process: Process, times: np.ndarray) -> Row:
        check_times(times)
        n = len(times) - 1
        enter = process.level(times[:1]).alpha[0] <= 0
        leave = process.level(times[-1:]).sigma[0] <= 0
        ends = np.array([process.t_max if enter else times[0], process.t_min if leave else times[-1]])
        if not ends[1] < ends[0]:
            raise ValueError(f"{name}: times from {times[0]:g} to {ends[1]:g}; allowed: a grid that begins above that")
        low, high = levels_at(process, ends).half
        half = np.linspace(low, high, KNOTS)
        t = np.clip(process.inverse(half), ends[1], ends[0])
        settings = {"low": low, "high": high, "start": times[0], "enter": float(enter), "leave": float(leave)}
        settings |= {"first": first, "atol": atol, "rtol": rtol, "safety": safety}
        knots = {"t": t, "log_alpha": np.log(levels_at(process, t).alpha)}
        table = AdaptiveTable(
            **{key: np.full(n, value) for key, value in settings.items()},
            **{key: np.broadcast_to(a, (n, KNOTS)) for key, a in knots.items()},
        )
        return lay_rows(process, times[:-1], np.arange(n) // order, table)

    def init(x: jax.Array) -> AdaptiveState:
        b, zero = len(x), jnp.zeros_like(x)
        nothing = jnp.zeros(b, x.dtype)
        # where a sample begins is known once a row is
        return AdaptiveState(nothing, nothing, zero, zero, zero, x, jnp.full(b, ENTER, jnp.int32), jnp.zeros(b, bool))

    def begun(state: AdaptiveState, c: AdaptiveTable) -> AdaptiveState:
        """The state with the run's numbers in it, before its first evaluation."""
        new = (state.stage == ENTER) & (state.h == 0)
        return state._replace(
            half=jnp.where(new, c.low, state.half),
            h=jnp.where(new, jnp.minimum(c.first, c.high - c.low), state.h),
            stage=jnp.where(new & (c.enter == 0), FIRST, state.stage),
        )

    def asked(state: AdaptiveState) -> jax.Array:
        """lambda of the next evaluation [B]."""
        shares = jnp.asarray((0.0, 0.0, *inner, 0.0, 0.0), state.half.dtype)
        return state.half + shares[jnp.where(state.stage == LEAVE, FIRST, state.stage)] * state.h

    def ask(x: jax.Array, state: AdaptiveState, row: Row) -> tuple[jax.Array, jax.Array]:
        c = row.coefficients
        state = begun(state, c)
        t = interpolate(c.t, (asked(state) - c.low) / (c.high - c.low))
        return jnp.where(state.stage == ENTER, c.start, t), ~state.done

    def step(prediction, x: jax.Array, state: AdaptiveState, row: Row, keys) -> tuple[jax.Array, AdaptiveState]:
        c = row.coefficients
        state = begun(state, c)
        wide = lambda a: per_sample(a, x.ndim)  # noqa: E731
        entering, starting, leaving = (state.stage == which for which in (ENTER, FIRST, LEAVE))
        ending = state.stage == order  # SECOND of order 2, THIRD of order 3
        output = prediction.x0 if data else prediction.eps

        x0 = jnp.where(wide(starting), prediction.x0, state.x0)
        eps = jnp.where(wide(starting), prediction.eps, state.eps)
        kept = x0 if data else eps
        second = jnp.where(wide(state.stage == SECOND), output, state.second)

        def reached(half, x0=x0, eps=eps):
            """The first-order step to lambda [B], and what a difference of outputs is scaled by there."""
            alpha = jnp.exp(interpolate(c.log_alpha, (half - c.low) / (c.high - c.low)))
            sigma = alpha * jnp.exp(-half)
            return wide(alpha) * x0 + wide(sigma) * eps, wide(alpha if data else sigma)

        def gains(length):
            return _gains(length if data else -length)

        end, scale = reached(state.half + state.h)
        g1, g2 = gains(state.h)
        middle = end + scale * wide(g1 / (2 * inner[0])) * (second - kept)  # of order 2
        lower, higher = end, middle
        if order == 3:
            lower, higher = middle, end + scale * wide(g2 / inner[1]) * (output - kept)
        tolerance = jnp.maximum(c.atol, c.rtol * jnp.maximum(jnp.abs(lower), jnp.abs(state.before)))
        error = jnp.sqrt(jnp.mean(jnp.square((higher - lower) / tolerance), axis=tuple(range(1, x.ndim))))
        error = jnp.maximum(error, 1e-12)

        accepted = ending & (error <= 1)
        half = jnp.where(accepted, state.half + state.h, state.half)
        left = c.high - half
        arrived = accepted & (left <= 1e-5)
        h = jnp.where(ending & ~arrived, jnp.minimum(c.safety * state.h * error ** (-1 / order), left), state.h)
        stage = jnp.where(entering, FIRST, state.stage + 1)
        stage = jnp.where(ending, jnp.where(arrived, LEAVE, jnp.where(accepted, FIRST, SECOND)), stage)

        entered, _ = reached(state.half, prediction.x0, prediction.eps)
        stepped, scale = reached(half + inner[0] * h)  # to the second evaluation, of a new try too
        if order == 3:
            after, scale = reached(half + inner[1] * h)
            g1, g2 = gains(inner[1] * h)
            after += scale * wide(g2 * inner[1] / inner[0]) * (second - kept)
            stepped = jnp.where(wide(stage == THIRD), after, stepped)
        new = jnp.where(wide(accepted), higher, stepped)
        new = jnp.where(wide(entering), entered, jnp.where(wide(leaving), prediction.x0, new))
        before = jnp.where(wide(accepted), lower, jnp.where(wide(entering), entered, state.before))
        done = leaving | (arrived & (c.leave == 0))
        return new, AdaptiveState(half, h, x0, eps, second, before, stage, done)

    return Solver(grid=grid, init=init, step=step, drive="while", ask=ask)


def interpolate(table: jax.Array, share: jax.Array) -> jax.Array:
    """Values [B] at shares [B] of a table [K] of evenly spaced ones, by the cubic through the four nearest."""
    at = jnp.clip(share, 0.0, 1.0) * (len(table) - 1)
    i = jnp.clip(jnp.floor(at).astype(jnp.int32) - 1, 0, len(table) - 4)
    s = at - i
    a, b, c, d = (table[i + k] for k in range(4))
    outer = (s * (s - 1) * (s - 2) * d - (s - 1) * (s - 2) * (s - 3) * a) / 6
    return outer + (s * (s - 2) * (s - 3) * b - s * (s - 1) * (s - 3) * c) / 2


def _gains(E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """g1 and g2 of `exponential.gains`, on the device."""
    g1 = -jnp.expm1(-E)
    series = E / 2 * (1 - E / 3 * (1 - E / 4 * (1 - E / 5 * (1 - E / 6 * (1 - E / 7)))))
    small = jnp.abs(E) < 0.1
    return g1, jnp.where(small, series, 1 - g1 / jnp.where(small, 1.0, E))
