"""`difax pareto --search`: the best composition of solver, steps, guidance, cache and dtype for a speed or a quality.

Bayesian optimisation (optuna's tree-structured Parzen estimator, with the budget as a constraint) proposes settings,
which are measured on a few images; the better third goes on to more of them, and so on by successive halving, until
the last are measured like any method of the sweep. Every measurement is a row of a folder, so that a search that is
killed proposes the same settings again and measures none of them twice.

References: Bergstra et al. 2011 (TPE); Jamieson & Talwalkar 2015, arXiv:1502.07943 (successive halving).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from difax.core.extras import needs
from difax.study.frontier import QUALITIES
from difax.study.methods import Method
from difax.study.pareto import Sweep, check_quality

CACHES = ("none", "fora", "taylorseer", "teacache", "fbcache")


class Goal(NamedTuple):
    """speedup: in seconds over the baseline, at least, the quality being what is made better; or floor: of the quality,
    at least (at most, where less is better), the speed being what is made better. One of the two is None."""

    quality: str = "psnr"
    speedup: float | None = None
    floor: float | None = None


class Score(NamedTuple):
    """value: larger is better; short: what is missing to the goal, 0 or less where it is met."""

    value: float
    short: float


def score(row: dict[str, Any], goal: Goal) -> Score:
    """How good a measured row is for a goal; a row without a figure misses it."""
    found = row.get("quality", {}).get(goal.quality)
    if "speed" not in row or not found or found[0] is None:
        return Score(-1e9, 1e9)
    quality = found[0] if QUALITIES[goal.quality].more else -found[0]
    if goal.speedup is not None:
        return Score(quality, goal.speedup - row["speed"]["ratio"])
    assert goal.floor is not None
    return Score(row["speed"]["ratio"], (goal.floor if QUALITIES[goal.quality].more else -goal.floor) - quality)


def proposed(trial: Any, steps: int, guided: bool) -> dict[str, Any]:
    """Settings of one trial.

    Args:
      trial: optuna's. steps: of the baseline, at most. guided: may guidance be left out at some times.
    """
    found: dict[str, Any] = {
        "solver.name": trial.suggest_categorical("solver", ("euler", "dpmpp_2m", "heun")),
        "steps": trial.suggest_int("steps", min(4, steps), steps, log=True),
        "model.dtype": trial.suggest_categorical("dtype", ("float32", "bfloat16")),
        "layout": trial.suggest_categorical("layout", ("stacked", "unstacked")),
    }
    if guided and trial.suggest_categorical("interval", (False, True)):
        found["guide.name"] = "interval"
        found["guide.low"] = round(trial.suggest_float("low", 0.0, 0.4), 2)
        found["guide.high"] = round(trial.suggest_float("high", 0.6, 1.0), 2)
    cache = trial.suggest_categorical("cache", CACHES)
    if cache != "none":
        found["cache.name"] = cache
    if cache in ("fora", "taylorseer"):
        found["cache.interval"] = trial.suggest_int("interval of the cache", 2, 6)
    if cache == "taylorseer":
        found["cache.order"] = trial.suggest_int("order", 1, 2)
    if cache in ("teacache", "fbcache"):
        found["cache.threshold"] = round(trial.suggest_float("threshold", 0.02, 0.6, log=True), 3)
    return found


def name_of(settings: dict[str, Any]) -> str:
    """Settings as the name of a method, which `difax pareto --methods` takes."""
    return ",".join(f"{k}={v}" for k, v in settings.items())


def search(sweep: Sweep, goal: Goal, trials: int = 30, keep: int = 3) -> list[dict[str, Any]]:
    """Searches settings, and measures the best of them in the sweep itself.

    Args:
      sweep: of which the last measurements become rows; the others go to its folder `search`.
      trials: settings that are proposed. keep: of every `keep` settings one goes on; so many are measured last.

    Returns:
      The rows of the last ones, the best first; those that miss the goal behind those that meet it. What failed
      misses every goal and has no row (`Sweep.measure`).

    Raises:
      ValueError: a goal without a bound or with two, or optuna is missing (the extra `search`).
    """
    needs("--search", "optuna")
    import optuna

    if (goal.speedup is None) == (goal.floor is None):
        raise ValueError("--search needs one of --speedup and --floor")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seeds = sweep.options.seeds
    rungs = sorted({max(seeds // keep**2, min(seeds, 8)), max(seeds // keep, min(seeds, 8))})
    sampler = optuna.samplers.TPESampler(n_startup_trials=min(20, trials // 2), seed=0)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    small = _rung(sweep, rungs[0])
    check_quality(goal.quality, small.qualities(), rungs[0])
    found: dict[str, tuple[dict[str, Any], Score]] = {}
    for number in range(trials):
        trial: Any = study.ask()
        settings = proposed(trial, sweep.run.config["steps"], sweep.run.config["guide"]["name"] == "cfg")
        row = _measured(small, settings)
        scored = score(row, goal)
        found[name_of(settings)] = settings, scored
        trial.set_constraint("goal", scored.short)
        study.tell(trial, scored.value)
        sweep.tell(f"trial {number + 1} of {trials}")
    left = _best(found, -(-len(found) // keep))
    for rung in rungs[1:]:
        wider = _rung(sweep, rung)
        found = {name_of(s): (s, score(_measured(wider, s), goal)) for s in left}
        left = _best(found, max(keep, -(-len(found) // keep)))
    rows = [row for settings in left[:keep] if "failed" not in (row := _measured(sweep, settings))]
    return sorted(rows, key=lambda row: _order(score(row, goal)))


def _rung(sweep: Sweep, seeds: int) -> Sweep:
    options = sweep.options._replace(seeds=seeds, batch=min(sweep.options.batch, seeds))
    out = sweep.out / "search" / str(seeds)
    return Sweep(sweep.name, sweep.run, options, out, sweep.judge, sweep.tell, sweep.eyes, cond=sweep.cond)


def _measured(sweep: Sweep, settings: dict[str, Any]) -> dict[str, Any]:
    name = name_of(settings)
    rows = sweep.measure({name: Method("together", settings)})
    found = next((row for row in rows if row["method"] == name), None)
    return {"method": name, "failed": sweep.failed[name]} if found is None else found


def _order(scored: Score) -> tuple[float, float]:
    return (max(scored.short, 0.0), -scored.value)


def _best(found: dict[str, tuple[dict[str, Any], Score]], n: int) -> list[dict[str, Any]]:
    return [settings for settings, _ in sorted(found.values(), key=lambda pair: _order(pair[1]))[:n]]


def summary(rows: Sequence[dict[str, Any]], goal: Goal) -> str:
    """What was found, in a line each."""
    lines = []
    for row in rows:
        met = "" if score(row, goal).short <= 0 else "  (misses the goal)"
        lines.append(f"{row['command']}{met}")
    return "\n".join(lines)
