"""Descent through the sampler: a table is an argument of the compiled program, so that what depends on the samples has
a gradient in every one of its numbers, and in the times of the evaluations.

  theta -> rows(theta) -> samples -> loss -> d loss/d theta, each evaluation kept by its input alone (remat)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from difax.accel.solvers.bns import bns
from difax.core.contracts import Accelerator, Row, Solver
from difax.core.sample import make_rows

Theta = Any
Progress = Callable[[str], None]
FINE = 100  # steps of the runs that others are held against


class Batch(NamedTuple):
    """Noise, keys and conditions of some samples, and what is wanted of them (their samples of many steps)."""

    x: Any
    keys: Any
    cond: Any
    wanted: Any


def program(sampler: Any, solver: Solver, remat: bool = False) -> Any:
    """The jitted sampler of a run (`difax.study.calibrate.Sampler`) with another solver and without a cache."""
    return sampler.run._replace(solver=solver, accelerator=Accelerator()).sampler(remat=remat)


def rows_of(sampler: Any, solver: Solver, times: np.ndarray) -> Row:
    """The rows of a run with another solver and other times, without a cache."""
    return make_rows(solver, sampler.run.guide, sampler.run.process, times, None, sampler.run.model.stages)


def finer(times: np.ndarray, steps: int) -> np.ndarray:
    """Times [n + 1] with each interval divided evenly, in at least so many steps."""
    parts = -(-steps // (len(times) - 1))
    at = np.arange(parts * (len(times) - 1) + 1) / parts
    return np.interp(at, np.arange(len(times)), times)


def batches(
    sampler: Any, samples: int, batch: int, start: int = 0, steps: int = FINE, progress: Progress = lambda text: None
) -> list[Batch]:
    """Samples start ... start + samples - 1 in batches of one size, with their fine ones: Adams-Bashforth of order 2 on
    the run's own times, divided into at least so many steps.

    Returns:
      At least one batch; what does not fill another one is left out.
    """
    solver = bns(start="ab2")
    run, rows = program(sampler, solver), rows_of(sampler, solver, finer(sampler.run.times, steps))
    found = []
    for k in range(max(1, samples // batch)):
        x, keys, cond = sampler.inputs(start + k * batch, batch)
        wanted, _ = run(sampler.params, jnp.array(x), keys, cond, rows, sampler.scale())
        found.append(Batch(x, keys, cond, wanted))
        progress(f"{(k + 1) * batch} fine samples")
    return found


def gaps_of(times: np.ndarray) -> np.ndarray:
    """Logits [n] of decreasing times [n], of which the first is fixed: softmax of them are the shares of the way from
    the first time to 0."""
    return np.log(-np.diff(np.append(times, 0.0)) / times[0])


def times_of(gaps: Any, first: float) -> Any:
    """The times [n] of logits, always decreasing and above 0."""
    share = jax.nn.softmax(gaps)
    return first * (jnp.cumsum(share[::-1])[::-1])


class Found(NamedTuple):
    """theta: the best on the batches that were held out. before, after: the loss on them at the start and there.
    history: of the losses on them."""

    theta: Theta
    before: float
    after: float
    history: list[float]


def descend(
    loss: Callable[[Theta, Any, Batch], jax.Array],
    theta: Theta,
    params: Any,
    train: Sequence[Batch],
    held: Sequence[Batch],
    *,
    rate: float,
    iterations: int,
    progress: Progress,
    optimiser: Callable[[Any], optax.GradientTransformation] = optax.adam,
    judged: Callable[[Theta, Any, Batch], jax.Array] | None = None,
    looks: int = 10,
) -> Found:
    """Adam with a cosine decay of its rate, through the batches in turn; what is best on held-out ones is kept.

    Args:
      loss(theta, params, batch) -> scalar. judged: what is measured on the held-out batches; None is the loss.
      looks: how often they are measured, besides at the start.

    Raises:
      ValueError: a loss that is not finite at the start.
    """
    theta = jax.tree.map(lambda a: jnp.asarray(a, jnp.result_type(float)), theta)
    tool = optimiser(optax.cosine_decay_schedule(rate, max(iterations, 1)))
    state = tool.init(theta)

    @jax.jit
    def update(theta, state, params, batch):
        slope = jax.grad(loss)(theta, params, batch)
        change, state = tool.update(slope, state, theta)
        return optax.apply_updates(theta, change), state

    measured = jax.jit(judged or loss)

    def on_held(theta) -> float:
        return float(np.mean([measured(theta, params, batch) for batch in held]))

    before = on_held(theta)
    if not np.isfinite(before):
        raise ValueError(f"the loss of the start is {before}; allowed: a finite one, so another start or another grid")
    best, least, history = theta, before, [before]
    every = max(1, iterations // looks)
    for k in range(iterations):
        theta, state = update(theta, state, params, train[k % len(train)])
        if (k + 1) % every == 0 or k + 1 == iterations:
            value = on_held(theta)
            history.append(value)
            if not np.isfinite(value):
                raise ValueError(f"the descent left finite numbers after {k + 1} iterations; allowed: a smaller rate")
            if value < least:
                best, least = theta, value
            progress(f"{k + 1} of {iterations} iterations, loss on held-out samples {value:.5g} (start {before:.5g})")
    return Found(jax.tree.map(lambda a: np.asarray(a, np.float64), best), before, least, history)


def shares(samples: int, batch: int) -> tuple[int, int]:
    """How many samples are learned from, and how many are held out: a quarter, and one batch of each at least."""
    whole = max(2, samples // batch)
    held = max(1, whole // 4)
    return (whole - held) * batch, held * batch


def log_error(got: jax.Array, wanted: jax.Array) -> jax.Array:
    """The mean over samples of the logarithm of the mean squared distance: PSNR but for sign and scale."""
    axes = tuple(range(1, got.ndim))
    return jnp.mean(jnp.log(jnp.mean((got - wanted) ** 2, axes) + 1e-12))
