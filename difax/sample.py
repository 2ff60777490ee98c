"""The sampling loop: one `lax.scan` over model evaluations, the only one in difax.

  rows  = solver.grid(process, times)            on the host, float64, rounded once
  carry = (x, solver state, guide state, accelerator state, keys)
  body  : x -> guide(denoise) -> prediction -> solver.step -> x

A technique enters through its seam (solver, guide, accelerator, attention) and never needs a loop of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difax import noise
from difax import process as process_
from difax.contracts import Accelerator, Attention, Guide, Model, Row, Solver, State, Trace
from difax.guidance import unguided
from difax.process import Process
from difax.trunk import memory_for, neutral, reference_attention, run_trunk, trunk_spec


def make_rows(solver: Solver, guide: Guide, process: Process, times: np.ndarray) -> Row:
    """Lays out the evaluations of a run: the solver's table with the guide's plan, rounded to float32 once.

    Args:
      times: decreasing times [n + 1] in [0, 1], from `difax.grids.make_times`.

    Returns:
      Rows [E] as numpy arrays (E = n for one-evaluation solvers, 2n - 1 for Heun).
    """
    rows = guide.plan(solver.grid(process, np.asarray(times, np.float64)))
    return jax.tree.map(lambda a: a.astype(np.float32) if a.dtype == np.float64 else a, rows)


def initial_noise(process: Process, keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """x at t = 1: prior_std times standard normal noise [len(keys), *shape], one key per sample."""
    return process.prior_std * noise.normal(noise.fold(keys, 0), shape)


def make_sampler(
    model: Model,
    process: Process,
    prediction: str,
    solver: Solver,
    guide: Guide | None = None,
    accelerator: Accelerator | None = None,
    *,
    attention: Attention | None = None,
    on_step: Callable[[Any], None] | None = None,
) -> Any:
    """Builds the jitted sampler `sample(params, x, keys, cond, rows, scale) -> (samples, trace)`.

    Everything in `rows`, the keys and the guidance scale are traced, so that seeds, scales, grids, eta, intervals
    and thresholds of one shape share one compilation. `x` is donated: its buffer becomes the result's.

    Args of the factory:
      model, process, prediction: the network, its noising process, and what it predicts (`PREDICTIONS`).
      solver, guide, accelerator, attention: the seams; they default to no guidance, the neutral accelerator and the
        reference attention.
      on_step: called on the host with the index of each finished evaluation (a progress bar); costs a callback.

    Args of the sampler:
      params: the model's parameters.
      x: [B, ...] initial noise, float32 (`initial_noise`).
      keys: [B] one key per sample (`difax.noise.sample_keys`).
      cond: the model's condition, leaves lead with [B] (labels, int32).
      rows: `make_rows`.
      scale: guidance scale, a scalar (1 is unguided).

    Returns:
      The jitted function; it returns samples [B, ...] float32 and the `Trace` of what was computed.
    """
    if prediction not in process_.PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; allowed: {', '.join(process_.PREDICTIONS)}")
    guide = guide or unguided()
    accelerator = accelerator or neutral()
    attention = attention or reference_attention()

    def sample(params, x, keys, cond, rows, scale):
        null = model.null(cond)
        axes, memory = _memory(model, params, accelerator, attention, x, cond, guide.halves)
        whole = guide.halves * x.shape[0]

        def denoise(x_in, cond_in, row, state, half):
            part = state if x_in.shape[0] == whole else _slice(state, axes, x_in.shape[0])
            time = jnp.full(x_in.shape[:1], row.model_time)
            tokens, context = model.embed(params, x_in, time, cond_in)
            tokens, part, computed = run_trunk(model, params, tokens, context, accelerator, attention, part, row)
            output = model.head(params, tokens, context).astype(jnp.float32)
            state = part if x_in.shape[0] == whole else _write(state, part, axes)
            return output, state, Trace(computed, jnp.asarray(2.0 if half == "both" else 1.0))

        def body(carry, row):
            x, solver_state, guide_state, memory, keys = carry
            output, guide_state, memory, trace = guide.apply(denoise, x, cond, null, scale, row, guide_state, memory)
            predicted = process_.predict(output, prediction, model.learn_sigma, x, row.level)
            # evaluation i draws from index i + 1; index 0 made the initial noise
            x, solver_state = solver.step(predicted, x, solver_state, row, noise.fold(keys, row.i + 1))
            if on_step is not None:
                jax.debug.callback(on_step, row.i)
            return (x, solver_state, guide_state, memory, keys), trace

        carry = (x, solver.init(x), guide.init(x), memory, keys)
        (x, *_), trace = jax.lax.scan(body, carry, rows)
        return x, trace

    return jax.jit(sample, donate_argnames="x")


def _memory(model, params, accelerator, attention, x, cond, halves) -> tuple[Any, State]:
    """The runner's memory for `halves` copies of the batch, and the batch axis of each of its leaves."""

    def spec(copies: int):
        grow = lambda a: jax.ShapeDtypeStruct((copies * a.shape[0], *a.shape[1:]), a.dtype)  # noqa: E731
        return trunk_spec(model, params, grow(x), jax.tree.map(grow, cond))

    small = jax.eval_shape(lambda: memory_for(spec(1), accelerator, attention))
    large = jax.eval_shape(lambda: memory_for(spec(2), accelerator, attention))
    axes = jax.tree.map(_batch_axis, small, large)
    return axes, memory_for(spec(halves), accelerator, attention)


def _batch_axis(small: Any, large: Any) -> int:
    """Where a leaf grows with the batch; -1 for a leaf that all samples share."""
    grown = [i for i, (a, b) in enumerate(zip(small.shape, large.shape, strict=True)) if a != b]
    return grown[0] if grown else -1


def _slice(state: State, axes: Any, size: int) -> State:
    cut = lambda a, axis: a if axis < 0 else jax.lax.slice_in_dim(a, 0, size, axis=axis)  # noqa: E731
    return jax.tree.map(cut, state, axes)


def _write(state: State, part: State, axes: Any) -> State:
    def put(a, p, axis):
        return p if axis < 0 else jax.lax.dynamic_update_slice_in_dim(a, p, 0, axis)

    return jax.tree.map(put, state, part, axes)
