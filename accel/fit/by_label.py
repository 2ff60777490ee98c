"""How many steps each label needs: StepSaver's classifier (arXiv:2408.02054) and AdaDiff's policy (arXiv:2311.14768).

Both choose a number of steps for a prompt, of a few that are allowed. Of a model with labels the prompt is the label,
and either way of learning ends in a table: labels -> steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from difax.accel.fit.descent import FINE, Progress, batches, program, rows_of, shares

CHOICES = (5, 10, 15, 20)


def fit_stepsaver(
    sampler: Any,
    samples: int,
    batch: int,
    progress: Progress,
    *,
    choices: Sequence[int] = CHOICES,
    tolerance: float = 0.1,
    iterations: int = 500,
    rate: float = 0.1,
    steps: int = FINE,
) -> dict[str, Any]:
    """A classifier of the label that predicts the least number of steps that is enough.

    Enough is a number of steps from which on samples are within `tolerance` of the fine ones, ||x - fine||/||fine||;
    where none is, the largest. The classifier is a softmax over the choices, with logits for each label (a linear map
    of the label's one-hot vector), learned by cross entropy; a label gets the most likely.

    Args:
      choices: numbers of steps, rising. tolerance: above 0. iterations, rate: of Adam. steps: of the fine samples, at
        least.

    The paper fine-tunes a language model on prompts, with the least number of steps by similarity of images as labels.
    """
    _check(choices, tolerance=tolerance, iterations=iterations, rate=rate)
    labels, errors, rest = _errors(sampler, samples, batch, choices, steps, progress)
    enough = np.minimum.accumulate((errors <= tolerance)[:, ::-1], 1)[:, ::-1]  # from there on
    least = np.where(enough.any(1), enough.argmax(1), len(choices) - 1)

    def loss(logits: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits[labels], jnp.asarray(least)).mean()

    logits = _descent(loss, np.zeros((sampler.run.model.classes, len(choices))), iterations, rate)
    return _contents(sampler, choices, logits, labels, rest, {"tolerance": tolerance})


def fit_adadiff(
    sampler: Any,
    samples: int,
    batch: int,
    progress: Progress,
    *,
    choices: Sequence[int] = CHOICES,
    cost: float = 0.1,
    iterations: int = 500,
    rate: float = 0.1,
    seed: int = 0,
    steps: int = FINE,
) -> dict[str, Any]:
    """A policy over numbers of steps for each label, by policy gradient on quality minus cost.

    reward = 1 - ||x - fine||/||fine|| - cost n/n_max;  the policy is a softmax with logits for each label, and the
    gradient REINFORCE's, with the mean reward of the label as its baseline. The actions are drawn, and their rewards
    looked up among those measured, since a label's samples of every choice are drawn once. A label gets the most
    likely action.

    Args:
      choices: numbers of steps, rising. cost: of the largest number of steps, 0 to 10. iterations, rate: of Adam. seed:
        of the actions. steps: of the fine samples, at least.

    The paper's policy is a transformer on the prompt, its quality a learned reward of images.
    """
    _check(choices, cost=cost, iterations=iterations, rate=rate)
    labels, errors, rest = _errors(sampler, samples, batch, choices, steps, progress)
    reward = jnp.asarray(1 - errors - cost * np.asarray(choices) / choices[-1])
    classes, index = sampler.run.model.classes, jnp.arange(len(labels))
    one_hot = jax.nn.one_hot(labels, classes)
    counts = jnp.maximum(one_hot.sum(0), 1)

    def loss(logits: jax.Array, key: jax.Array) -> jax.Array:
        action = jax.random.categorical(key, jax.lax.stop_gradient(logits)[labels])
        got = reward[index, action]
        better = got - (one_hot.T @ got / counts)[labels]
        return -jnp.mean(better * jax.nn.log_softmax(logits)[labels, action])

    keys = jax.random.split(jax.random.key(seed), iterations)
    logits = _descent(loss, np.zeros((classes, len(choices))), iterations, rate, keys)
    return _contents(sampler, choices, logits, labels, rest, {"cost": cost})


def _descent(loss: Any, start: np.ndarray, iterations: int, rate: float, keys: Any = None) -> np.ndarray:
    tool = optax.adam(rate)

    def update(carry, key):
        logits, state = carry
        slope = jax.grad(loss)(logits) if keys is None else jax.grad(loss)(logits, key)
        change, state = tool.update(slope, state)
        return (optax.apply_updates(logits, change), state), ()

    logits = jnp.asarray(start, jnp.float32)
    run = jax.jit(lambda carry: jax.lax.scan(update, carry, keys, length=iterations)[0])
    return np.asarray(run((logits, tool.init(logits)))[0])


def _errors(
    sampler: Any, samples: int, batch: int, choices: Sequence[int], steps: int, progress: Progress
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """(labels [N], relative distances to the fine samples [N, choices]) of what is learned from, and of the rest."""
    model = sampler.run.model
    if not model.classes:
        raise ValueError(f"{model.name} has no labels to choose steps for; allowed: a model of labels")
    most, held = shares(samples, batch)
    drawn = batches(sampler, most + held, batch, 0, steps, progress)
    labels = np.concatenate([np.asarray(one.cond) for one in drawn])
    missing = sorted(set(range(model.classes)) - set(labels[:most].tolist()))
    if missing:
        raise ValueError(f"labels {', '.join(map(str, missing))} are in no sample; allowed: --samples of all labels")
    solver, errors = sampler.run.solver, []
    run = program(sampler, solver)
    for count in choices:
        rows = rows_of(sampler, solver, sampler.run.times_of(count))
        found = []
        for one in drawn:
            got, _ = run(sampler.params, jnp.array(one.x), one.keys, one.cond, rows, sampler.scale())
            axes = tuple(range(1, got.ndim))
            norm = lambda a, axes=axes: jnp.sqrt(jnp.sum(a**2, axes))  # noqa: E731
            found.append(np.asarray(norm(got - one.wanted) / norm(one.wanted)))
        errors.append(np.concatenate(found))
        progress(f"{count} steps: relative distance {errors[-1].mean():.4f}")
    table = np.stack(errors, 1)
    return labels[:most], table[:most], (labels[most:], table[most:])


def _contents(
    sampler: Any, choices: Sequence[int], logits: np.ndarray, labels: np.ndarray, rest: Any, said: dict[str, Any]
) -> dict[str, Any]:
    """The file: steps of each label, and what they do on held-out samples beside each number of steps for all."""
    chosen = logits.argmax(1)
    held, errors = rest
    own = errors[np.arange(len(held)), chosen[held]]
    return {
        "steps_of": [int(choices[k]) for k in chosen],
        "choices": list(map(int, choices)),
        **said,
        "held-out steps": float(np.mean(np.asarray(choices)[chosen[held]])),
        "held-out distance": float(own.mean()),
        "distance of each choice": [float(e) for e in errors.mean(0)],
    }


def _check(choices: Sequence[int], **numbers: float) -> None:
    if len(choices) < 2 or list(choices) != sorted(set(choices)) or choices[0] < 1:
        raise ValueError(f"choices={list(choices)}; allowed: two or more rising numbers of steps")
    for key, value in numbers.items():
        low, high = {"cost": (0, 10), "iterations": (1, 100_000)}.get(key, (1e-9, 10))
        if not low <= value <= high:
            raise ValueError(f"{key}={value}; allowed: {low:g} ... {high:g}")
