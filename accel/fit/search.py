"""The search for a static plan: which evaluations to compute for a budget, so that the samples change least.

The loss of a plan is the mean squared distance of its samples to the uncached ones from the same noise, measured by
running it; all plans share one compilation. Candidates come from two sources: dynamic programming over errors that
were measured feature by feature, and the gradient of the loss by soft reuse weights through the sampler, which says of
every evaluation what computing or filling it would change. Exchanges that the gradient puts first are measured, and
the best is taken, until none helps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.core.contracts import Accelerator, Done, Plan, Row, Stage, State, TrunkSpec, Where, no_memory

Loss = Callable[[np.ndarray], float]


class Found(NamedTuple):
    """schedule: bool [E]; loss: of it; history: [(loss, schedule)] of every improvement, the starts first."""

    schedule: np.ndarray
    loss: float
    history: list[tuple[float, np.ndarray]]


def soft_hold(weights: np.ndarray | None = None) -> Accelerator:
    """Reuse as a differentiable weight: every branch gives w F + (1 - w) (what it gave before), which is remembered.

    At w = 1 a branch is computed, at w = 0 held: the same samples as `scheduled` with "hold"; in between the loss of a
    run can be differentiated by w (`rows.plan.values`). Everything is computed, whatever w is.

    Args:
      weights: [E] in [0, 1]; None is all ones. The first evaluation has 1 anyway.
    """

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
        w = np.ones(len(rows.i)) if weights is None else np.array(weights, np.float64)
        w[np.asarray(rows.fresh, bool)] = 1.0
        w[0] = 1.0
        return Plan(np.zeros(len(rows.i), np.int32), w, owner="soft_hold")

    def init(spec: TrunkSpec, modes: tuple[Any, ...]) -> State:
        memory = no_memory(spec, modes)
        for stage, updates in spec.update.items():
            depth = spec.depth[stage]
            for branch, update in updates.items():
                held = jax.tree.map(lambda a, d=depth: jnp.zeros((d, *a.shape), a.dtype), update)
                memory["branch"][stage][branch] = held
        return memory

    def branch(compute: Any, gate: Any, where: Where, held: Any, inner: State, row: Row) -> Any:
        update, inner = compute(inner)
        w = row.plan.values
        mixed = jax.tree.map(lambda u, h: (w * u + (1 - w) * h).astype(u.dtype), update, held)
        return gate(mixed), mixed, inner, Done(w)

    return Accelerator(name="soft_hold", plan=plan, init=init, branch=branch)


def uniform(evaluations: int, full: int) -> np.ndarray:
    """`full` evaluations as evenly as whole numbers allow, the first among them: bool [E]."""
    schedule = np.zeros(evaluations, bool)
    schedule[np.floor(np.arange(full) * evaluations / full).astype(int)] = True
    return schedule


def by_dynamic_programming(errors: np.ndarray, full: int) -> np.ndarray:
    """The schedule of `full` computed evaluations with the least sum of reuse errors.

    minimise sum over filled evaluations j of errors[c(j), j - c(j) - 1], c(j) the last computed one before j.

    Args:
      errors: [E, kmax], of holding evaluation i's value k = 1 ... kmax evaluations later; nan, or beyond kmax, is not
        allowed to happen unless nothing else is left.
      full: computed evaluations, 1 to E.
    """
    evaluations, kmax = errors.shape
    far = 1e6
    cost = np.where(np.isfinite(errors), errors, far)
    run = np.zeros((evaluations, evaluations + 1))  # run[i, j]: computed at i, filled up to, not with, j
    for i in range(evaluations):
        for j in range(i + 2, evaluations + 1):
            k = j - 1 - i
            run[i, j] = run[i, j - 1] + (cost[i, k - 1] if k <= kmax else far)
    schedule = np.zeros(evaluations, bool)
    schedule[cheapest_path(run, full)[:-1]] = True
    return schedule


def cheapest_path(cost: np.ndarray, steps: int, growth: float = 1.0) -> np.ndarray:
    """The indices [steps + 1], from 0 to the last, whose steps cost least: by dynamic programming.

    minimise sum_m growth^m cost[j_m, j_{m + 1}] over 0 = j_0 < j_1 < ... < j_steps = the last index.

    Args:
      cost: [n, n + 1] or more of them, of a step from i to j > i; infinite where it is not allowed.
      steps: 1 ... n. growth: of what a later step costs, above 0.
    """
    last = cost.shape[1] - 1
    best = np.full((steps + 1, last + 1), np.inf)
    came = np.zeros((steps + 1, last + 1), int)
    best[0, 0] = 0.0
    for m in range(1, steps + 1):
        for j in range(m, last + 1):
            options = best[m - 1, :j] + growth ** (m - 1) * cost[:j, j]
            came[m, j] = int(np.argmin(options))
            best[m, j] = options[came[m, j]]
    path = [last]
    for m in range(steps, 0, -1):
        path.append(int(came[m, path[-1]]))
    return np.array(path[::-1])


def refine(
    start: np.ndarray,
    loss: Loss,
    gradient: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    width: int = 12,
    rounds: int = 20,
    fixed: Sequence[int] = (0,),
    progress: Callable[[int, float], None] = lambda n, value: None,
) -> Found:
    """Exchanges a computed for a filled evaluation while that makes the loss smaller.

    An exchange of i for j promises |g_i| + g_j less loss than it costs, g the gradient by the weights: what filling i
    loses, and what computing j wins. A round measures the `width` most promising ones, and only if none of them helps
    all exchanges between neighbours, and takes the best; it is the last if none helps.

    Args:
      start: bool [E]. loss: schedule -> number, measured. gradient: schedule -> d loss / d weight [E].
      width: exchanges that are measured in a round. rounds: at most. fixed: evaluations that stay computed.
      progress: called with (losses measured, best loss).

    Returns:
      What was found; its schedule computes as many evaluations as `start`.
    """
    now, seen = start.copy(), {}

    def measured(schedule: np.ndarray) -> float:
        key = schedule.tobytes()
        if key not in seen:
            seen[key] = loss(schedule)
        return seen[key]

    def exchanged(i: int, j: int) -> np.ndarray:
        other = now.copy()
        other[i], other[j] = False, True
        return other

    best = measured(now)
    history = [(best, now.copy())]
    for _ in range(rounds):
        on = [int(i) for i in np.flatnonzero(now) if i not in fixed]
        off = [int(i) for i in np.flatnonzero(~now)]
        neighbours = [(i, j) for i in on for j in (i - 1, i + 1) if j in off]
        promising = [] if gradient is None else _promising(on, off, np.asarray(gradient(now)))[:width]
        before = best
        for pairs in (promising, neighbours):
            candidates = []
            for i, j in pairs:
                candidates.append((measured(exchanged(i, j)), exchanged(i, j)))
                progress(len(seen), min(best, candidates[-1][0]))
            if candidates and min(c[0] for c in candidates) < best:
                best, now = min(candidates, key=lambda c: c[0])
                history.append((best, now.copy()))
                break
        if best == before:
            break
    return Found(now, best, history)


def _promising(on: list[int], off: list[int], g: np.ndarray) -> list[tuple[int, int]]:
    return sorted(((i, j) for i in on for j in off), key=lambda pair: abs(g[pair[0]]) + g[pair[1]])
