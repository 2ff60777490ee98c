"""AutoDiffusion: evolution of the times of a run and of the blocks that each of its evaluations leaves out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches.autodiffusion import autodiffusion as left_out
from difax.accel.fit.schedules import Base, content, steps_of
from difax.accel.fit.trajectories import batches, fine_times, trajectory
from difax.core.sample import make_rows

Progress = Callable[[str], None]


class Candidate(NamedTuple):
    """times: [n] increasing indices into the fine times; skip: for each evaluation the blocks that are left out."""

    times: tuple[int, ...]
    skip: tuple[tuple[int, ...], ...]


def autodiffusion(
    sampler: Any,
    samples: int,
    batch: int,
    progress: Progress,
    fine: int = 100,
    base: Base = "uniform",
    blocks: float = 1.0,
    population: int = 24,
    generations: int = 8,
    select: int = 6,
    mutation: float = 0.1,
) -> dict[str, Any]:
    """AutoDiffusion: the times, and the blocks that are left out, that an evolution finds best for a run's solver.

    Candidates are the run's own grid, mutations of it, and random ones; each generation keeps the `select` best of all
    so far and makes two fifths of the next by mutation (each time and each block changes with that probability), two
    fifths by exchanging evaluations between two of them, and draws the rest anew. All candidates run in one program.

    Args:
      fine: times that may be taken, more than the run has steps (100; all steps of the process in the paper).
      base: their grid.
      blocks: share of all blocks of all evaluations that are computed, 0.1 ... 1 (1: times alone).
      population, generations, select, mutation: of the evolution; 50, 20, 10 and 0.1 in the authors' code.

    Where we differ: the score is the mean squared distance to the samples of the fine trajectory from the same noise,
    not the FID of some thousand; the number of evaluations is the run's, and every candidate leaves out equally many
    blocks, where the authors share a budget of blocks among any number of evaluations; noise in a stochastic solver is
    the same for all candidates.

    References: Li et al., AutoDiffusion, 2023, arXiv:2309.10438; https://github.com/lilijiangg/AutoDiffusion.
    """
    run = sampler.run
    steps_of(sampler, fine)
    depth = sum(stage.depth for stage in run.model.stages)
    evaluations = len(run.rows.i)
    for key, value, low, high in (
        ("blocks", blocks, 0.1, 1.0), ("mutation", mutation, 0.0, 1.0), ("population", population, 4, 1000),
        ("generations", generations, 1, 1000), ("select", select, 2, population),
    ):  # fmt: skip
        if not low <= value <= high:
            raise ValueError(f"autodiffusion: {key}={value}; allowed: {low} ... {high}")
    times = fine_times(run.process, base, fine)
    wanted = []
    for of in batches(sampler, times[:-1], samples, batch, progress):
        wanted.append(trajectory(run.process, times, of)[0][-1])
    score = scorer(sampler, times, np.concatenate(wanted), samples, batch)
    draw = np.random.default_rng(sampler.seed)
    away = round((1 - blocks) * depth * evaluations)
    first = Candidate(nearest(times, run.times[:-1]), spread(draw, evaluations, depth, away))
    found = evolved(
        first, score, draw, fine, depth, population, generations, select, mutation,
        lambda g, best: progress(f"generation {g} of {generations}: {best:.4g}"),
    )  # fmt: skip
    best, losses = found
    chosen = np.append(times[list(best.times)], 0.0)
    return {
        **content(run.process, chosen, fine=fine, base=base, blocks=blocks, population=population),
        "skip": [list(row) for row in best.skip],
        "losses": {"the run's grid": losses[0], "found": losses[-1]},
        "history": losses,
    }


def evolved(
    first: Candidate,
    score: Callable[[Candidate], float],
    draw: np.random.Generator,
    fine: int,
    depth: int,
    population: int,
    generations: int,
    select: int,
    mutation: float,
    progress: Callable[[int, float], None] = lambda g, best: None,
) -> tuple[Candidate, list[float]]:
    """The best candidate of an evolution, and the best score before it and after each generation."""
    known: dict[Candidate, float] = {}

    def take(candidates: list[Candidate]) -> None:
        for one in candidates:
            if one not in known:
                known[one] = score(one)

    def anew() -> Candidate:
        picked = np.sort(draw.choice(fine, len(first.times), replace=False))
        away = sum(map(len, first.skip))
        return Candidate(tuple(map(int, picked)), spread(draw, len(first.skip), depth, away))

    take([first])
    losses = [known[first]]
    near = [mutated(first, draw, fine, depth, mutation) for _ in range(population // 2)]
    take(near + [anew() for _ in range(population - 1 - len(near))])
    for g in range(1, generations + 1):
        best = sorted(known, key=lambda one: known[one])[:select]
        losses.append(known[best[0]])
        progress(g, losses[-1])
        if g == generations:
            break
        pick = lambda best=best: best[draw.integers(len(best))]  # noqa: E731
        some = 2 * population // 5
        children = [mutated(pick(), draw, fine, depth, mutation) for _ in range(some)]
        children += [crossed(pick(), pick(), draw) for _ in range(some)]
        take(children + [anew() for _ in range(population - len(children))])
    return min(known, key=lambda one: known[one]), losses


def mutated(one: Candidate, draw: np.random.Generator, fine: int, depth: int, chance: float) -> Candidate:
    """A candidate in which each time is another with that chance, and each block that is left out too."""
    times = list(one.times)
    for i in np.flatnonzero(draw.random(len(times)) < chance):
        times[i] = int(draw.choice([k for k in range(fine) if k not in times]))
    skip = [list(row) for row in one.skip]
    for row in skip:
        for i in np.flatnonzero(draw.random(len(row)) < chance):
            others = [b for b in range(depth) if b not in row]
            row[i] = int(draw.choice(others)) if others else row[i]
    return Candidate(tuple(sorted(times)), tuple(tuple(sorted(row)) for row in skip))


def crossed(one: Candidate, other: Candidate, draw: np.random.Generator) -> Candidate:
    """A candidate with each time from either of two, and the blocks of either: both have equally many of them."""
    times = {a if draw.random() < 0.5 else b for a, b in zip(one.times, other.times, strict=True)}
    spare = [k for k in (*one.times, *other.times) if k not in times]
    while len(times) < len(one.times):  # two of them came out alike
        times.add(spare.pop(int(draw.integers(len(spare)))))
    return Candidate(tuple(sorted(times)), (one if draw.random() < 0.5 else other).skip)


def spread(draw: np.random.Generator, evaluations: int, depth: int, away: int) -> tuple[tuple[int, ...], ...]:
    """`away` of all blocks of all evaluations, at random: for each evaluation the blocks that are left out."""
    left = np.zeros(evaluations * depth, bool)
    left[draw.choice(evaluations * depth, away, replace=False)] = True
    return tuple(tuple(map(int, np.flatnonzero(row))) for row in left.reshape(evaluations, depth))


def nearest(times: np.ndarray, wanted: np.ndarray) -> tuple[int, ...]:
    """Different indices of the fine times that lie nearest to the wanted ones."""
    found: list[int] = []
    for t in wanted:
        order = np.argsort(np.abs(times[:-1] - t), kind="stable")
        found.append(int(next(k for k in order if k not in found)))
    return tuple(sorted(found))


def scorer(
    sampler: Any, times: np.ndarray, wanted: np.ndarray, samples: int, batch: int
) -> Callable[[Candidate], float]:
    """candidate -> mean squared distance of its samples to the wanted ones; all candidates run in one program."""
    run, program = sampler.run, None

    def score(one: Candidate) -> float:
        nonlocal program
        accelerator = left_out([list(row) for row in one.skip])
        chosen = np.append(times[list(one.times)], 0.0)
        rows = make_rows(run.solver, run.guide, run.process, chosen, accelerator, run.model.stages)
        program = program or sampler.program(accelerator)
        total = 0.0
        for start in range(0, samples, batch):
            x, keys, cond = sampler.inputs(start, min(batch, samples - start))
            found = program(sampler.params, x, keys, cond, jax.tree.map(jnp.asarray, rows), sampler.scale())[0]
            total += float(np.sum((np.asarray(found, np.float64) - wanted[start : start + batch]) ** 2))
        return total / wanted.size

    return score
