"""The search over the settings of every step of `usf`: evolution guided by a predictor of the loss (2312.07243)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from difax.accel.fit.descent import FINE, Batch, Progress, batches, log_error, program, rows_of, shares
from difax.accel.solvers.linear import LinearTable, Steps, linear, tabulated
from difax.accel.solvers.usf import ORDERS, SLOTS, Choice, lay_usf
from difax.core.grids import lay_rows

KINDS, RELAXATIONS = ("data", "noise"), ("none", "dpmsolver-2", "unipc-bh1")
LIKELY = {1: 0.2, 2: 0.4, 3: 0.3, 4: 0.1}  # of orders, as the authors draw them
CHANGE, SPREAD = 0.3, 0.1  # how often a kind of setting changes, and it at a step; how far a gap of times moves, in log


class Schedule(NamedTuple):
    """times [n] and the choice of each of the n steps."""

    times: np.ndarray
    chosen: tuple[Choice, ...]


def fit_usf(
    sampler: Any,
    samples: int,
    batch: int,
    progress: Progress,
    *,
    measured: int = 120,
    population: int = 24,
    candidates: int = 200,
    move_times: bool = True,
    quality: Literal["distance", "features"] = "distance",
    seed: int = 0,
    steps: int = FINE,
) -> dict[str, Any]:
    """The settings of each step, and its time, by evolution.

    The first schedules are hand-made ones (one setting for all steps). Each round makes `candidates` of the best by
    crossing and changing them, ranks those by a predictor that was fitted to all that are measured, and measures the
    best few. The one that is best on the samples that are learned from is compared with the best hand-made one on those
    that are held out, and told as it is.

    Args:
      measured: schedules that are drawn with, at most. population: of the best, from which others are made.
      candidates: that the predictor ranks in a round; 0 measures them unranked.
      move_times: are the times searched too.
      quality: what is searched for: "distance" to the fine samples, or "features", the kernel distance of features.
      seed: of the search. steps: of the fine samples, at least.
    """
    for key, value, least in (("measured", measured, 8), ("population", population, 2), ("candidates", candidates, 0)):
        if not least <= value <= 1_000_000:
            raise ValueError(f"{key}={value}; allowed: {least} ... 1000000")
    most, held = shares(samples, batch)
    features = None
    if quality == "features":
        from difax.accel.fit.learned import check_batch, kernel_loss

        check_batch(sampler, batch)
        features = kernel_loss(sampler.features())
    loss = _Loss(sampler, features, len(sampler.run.times) - 1)
    train = batches(sampler, most, batch, 0, steps, progress)
    rng = np.random.default_rng(seed)
    first = np.asarray(sampler.run.times[:-1], np.float64)
    hand = [Schedule(first, (choice,) * len(first)) for choice in HAND]
    known = [(loss(one, train), one) for one in hand]
    best_hand = min(known, key=lambda pair: pair[0])[1]
    while len(known) < measured:
        known.sort(key=lambda pair: pair[0])
        best = [one for _, one in known[:population]]
        new = [_changed(rng, *_picked(rng, best), move_times) for _ in range(max(candidates, 8))]
        if candidates:
            guess = predicted([one for _, one in known], np.array([value for value, _ in known]), new)
            new = [new[k] for k in np.argsort(guess)]
        known += [(loss(one, train), one) for one in new[: min(8, measured - len(known))]]
        progress(f"{len(known)} of {measured} schedules measured, loss {min(value for value, _ in known):.5g}")
    found = min(known, key=lambda pair: pair[0])[1]
    test = batches(sampler, held, batch, most, steps, progress)
    return {
        "solver": "usf",
        "steps": len(first),
        "times": found.times.tolist(),
        **{name: [getattr(choice, name) for choice in found.chosen] for name in Choice._fields},
        "before": loss(best_hand, test),
        "after": loss(found, test),
        "hand-made": dict(best_hand.chosen[0]._asdict()),
        "measured": len(known),
    }


HAND = [
    Choice(order, kind, 0, relaxation, corrector)
    for order in (1, 2, 3)
    for kind in KINDS
    for corrector in (False, True)
    for relaxation in (RELAXATIONS[:2] if order == 2 else RELAXATIONS[:1])
]


class _Loss:
    """(schedule, batches) -> the mean loss of its samples; one program draws all schedules."""

    def __init__(self, sampler: Any, features: Any, n: int):
        self.sampler, self.features = sampler, features
        self.used = tabulated(np.full((n, 1 + len(SLOTS), 3 + len(SLOTS)), 0.5)).used
        self.program: Any = None

    def __call__(self, schedule: Schedule, given: Sequence[Batch]) -> float:
        sampler, times = self.sampler, np.append(schedule.times, 0.0)
        steps = Steps(SLOTS)
        lay_usf(steps, sampler.run.process, times, schedule.chosen)
        table = LinearTable(np.stack(steps.weights), self.used)
        if not np.isfinite(table.weights).all():
            return np.inf
        solver = linear(lambda *_: None, SLOTS)._replace(
            grid=lambda process, t: lay_rows(process, t[:-1], np.arange(len(t) - 1), table)
        )
        if self.program is None:
            self.program = program(sampler, solver)
        rows, found = rows_of(sampler, solver, times), []
        for one in given:
            got, _ = self.program(sampler.params, jnp.array(one.x), one.keys, one.cond, rows, sampler.scale())
            found.append(float(log_error(got, one.wanted) if self.features is None else self.features(got, one)))
        value = float(np.mean(found))
        return value if np.isfinite(value) else np.inf


def _picked(rng: np.random.Generator, best: Sequence[Schedule]) -> tuple[Schedule, Schedule]:
    """Two of the best, the better the likelier."""
    first, second = (len(best) * rng.random(2) ** 2).astype(int)
    return best[first], best[second]


def _changed(rng: np.random.Generator, one: Schedule, other: Schedule, move_times: bool) -> Schedule:
    """A child of two schedules: half of the time steps of both; then some kinds of settings change, at some steps."""
    n = len(one.times)
    crossed = rng.random(n) < 0.5 if rng.random() < 0.5 else np.zeros(n, bool)
    chosen = [b if c else a for a, b, c in zip(one.chosen, other.chosen, crossed, strict=True)]
    orders, likely = list(LIKELY), list(LIKELY.values())
    kinds = rng.random(6) < CHANGE
    kinds[rng.integers(6 if move_times and n > 1 else 5)] = True
    for k, choice in enumerate(chosen):
        change = kinds[:5] & (rng.random(5) < CHANGE)
        order = int(rng.choice(orders, p=likely)) if change[0] else choice.order
        kind = str(rng.choice(KINDS)) if change[1] else choice.prediction
        estimate = int(rng.choice([0, *range(max(order - 1, 1), ORDERS + 1)])) if change[2] else choice.estimate
        relaxation = str(rng.choice(RELAXATIONS)) if change[3] else choice.relaxation
        corrector = bool(rng.random() < 0.5) if change[4] else choice.corrector
        chosen[k] = Choice(order, kind, 0 if estimate < order - 1 else estimate, relaxation, corrector)
    times = one.times
    if move_times and n > 1 and kinds[5]:
        gaps = -np.diff(np.append(times, 0.0)) * np.exp(rng.normal(size=n) * SPREAD)
        times = times[0] * np.cumsum((gaps / gaps.sum())[::-1])[::-1]
        times[0] = one.times[0]
    return Schedule(times, tuple(chosen))


def encoded(schedule: Schedule) -> np.ndarray:
    """A schedule as numbers: one-hot settings of each step, and its time."""
    parts = []
    for t, choice in zip(schedule.times, schedule.chosen, strict=True):
        one_hot = [choice.order == p for p in range(1, ORDERS + 1)]
        one_hot += [choice.relaxation == name for name in RELAXATIONS]
        one_hot += [choice.prediction == "data", choice.corrector]
        parts.append([*map(float, one_hot), choice.estimate / ORDERS, 4 * t])
    return np.ravel(parts)


def predicted(
    known: Sequence[Schedule], losses: np.ndarray, new: Sequence[Schedule], ridge: float = 1e-2
) -> np.ndarray:
    """What losses [m] new schedules may have: Gaussian kernel ridge regression on the ranks of the known ones.

    The authors train a network for that; of a hundred measurements there is no more to be learned.
    """
    x, y = np.stack([encoded(one) for one in known]), np.stack([encoded(one) for one in new])
    ranks = np.argsort(np.argsort(losses)) / max(len(losses) - 1, 1) - 0.5

    def square(a, b):
        return ((a[:, None] - b[None]) ** 2).sum(-1)

    apart = square(x, x)
    width = np.median(apart[apart > 0]) if (apart > 0).any() else 1.0
    weights = np.linalg.solve(np.exp(-apart / width) + ridge * np.eye(len(x)), ranks)
    return np.exp(-square(y, x) / width) @ weights
