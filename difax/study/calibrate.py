"""`difax calibrate`: runs a model and makes what a cache plans from or has learned, or searches a plan for a budget;
fits a grid or a solver."""

from __future__ import annotations

import inspect
import json
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches.measured import save_by_stage, says_of
from difax.accel.caches.scheduled import scheduled
from difax.accel.fit import CALIBRATIONS, FITS, GRID_FITS, SOLVER_FITS, Made
from difax.accel.fit.search import by_dynamic_programming, refine, soft_hold, uniform
from difax.build import Setup, check_laid_out
from difax.core.annotations import annotations_of, check_arguments, check_keys, check_value
from difax.core.arrays import save_arrays
from difax.core.contracts import Accelerator, Params, Trace
from difax.core.cost import model_cost
from difax.core.sample import rounded
from difax.core.stack import stack, with_learned
from difax.core.writing import replacing
from difax.registry import choose

Progress = Callable[[str], None]


TECHNIQUES = tuple(dict.fromkeys(["scheduled", *CALIBRATIONS, *FITS]))
MADE: dict[str, dict[str, Made]] = {"grid": GRID_FITS, "solver": SOLVER_FITS}
KINDS: dict[str, Collection[str]] = {"cache": TECHNIQUES, **MADE}  # what is calibrated, by its flag


class Sampler(NamedTuple):
    """A setup's sampler with another accelerator, for fixed noise; params as `Setup.prepare` returns them."""

    run: Setup
    params: Params
    cond: Any
    seed: int

    def inputs(self, start: int, n: int) -> tuple[jax.Array, jax.Array, Any]:
        """Noise, keys and conditions of samples start ... start + n - 1; conditions repeat."""
        return self.run.inputs(self.seed, n, self.cond, start)

    def acting(self, accelerator: Accelerator) -> Accelerator:
        """An accelerator in place of the run's; networks that take turns by the noise are the model, and stay."""
        own = self.run.accelerator
        return stack(own, accelerator) if own.networks else accelerator

    def program(self, accelerator: Accelerator, remat: bool = False) -> Any:
        """The jitted sampler with an accelerator in place of the run's."""
        return self.run.sampler(self.acting(accelerator), remat=remat)

    def rows(self, accelerator: Accelerator) -> Any:
        """The run's rows with an accelerator's plan."""
        plan = self.acting(accelerator).plan(self.run.rows, self.run.model.stages)
        return jax.tree.map(jnp.asarray, self.run.rows._replace(plan=rounded(plan)))

    def scale(self) -> jax.Array:
        """Of the guidance."""
        return jnp.asarray(self.run.scale, jnp.float32)

    def features(self) -> Callable[[jax.Array], jax.Array]:
        """samples [B, ...] -> features [B, F], by the classifier that ships.

        Raises:
          ValueError: a model that draws what it does not know.
        """
        from difax.study.judge import shipped_features

        return shipped_features(self.run.model)


def calibrate_to(
    technique: str,
    sampler: Sampler,
    out: str | os.PathLike | None,
    samples: int,
    batch: int,
    progress: Progress,
    kind: str = "cache",
    **settings: Any,
) -> dict[str, Any]:
    """Calibrates, fits or searches by the name of the technique, and writes its file.

    Args:
      technique: of `KINDS[kind]`.
      out: file to write, .npz for what a cache has learned, else .json, or as `Made` says; None writes none.
      samples, batch: to draw, and at a time.
      kind: "cache", "grid" or "solver".
      settings: of `search` (budget, rounds, where, forecast, order) for "scheduled", rank for what is fitted; of grids
        and solvers those of the fit (`Made`).

    Returns:
      What the JSON file holds; of what is fitted what was run, and under "arrays" what the .npz holds.

    Raises:
      ValueError: an unknown technique or setting, or a file of another ending.
    """
    check_settings(technique, {"samples": samples, "batch": batch, **settings}, kind)
    check_laid_out(sampler.run, "difax calibrate")
    suffix = ending(technique, kind)
    if out is not None and pathlib.Path(out).suffix != suffix:
        raise ValueError(f"{out}: allowed: a name that ends in {suffix}")
    if kind != "cache":
        return _made(MADE[kind][technique], technique, sampler, out, samples, batch, progress, settings)
    if technique in FITS:
        arrays = fit(technique, sampler, samples, batch, progress, **settings)
        if out is not None:
            save_by_stage(pathlib.Path(out), arrays, {"technique": technique, **about(sampler, samples)})
        return {"technique": technique, **about(sampler, samples), "arrays": arrays}
    if technique == "scheduled":
        content = search(sampler, settings.pop("budget", 0.4), samples, progress, **settings)
    else:
        content = calibrate(technique, sampler, samples, batch, progress)
    if out is not None:
        save_json(out, content)
    return content


SEARCH_SETTINGS = ("budget", "rounds", "where", "forecast", "order")


def check_settings(technique: str, settings: Mapping[str, Any], kind: str = "cache") -> None:
    """Refuses settings that a calibration does not have, and numbers below 1 of those that count."""
    choose("calibration" if kind == "cache" else f"calibration of a {kind}", technique, KINDS[kind])
    if kind != "cache":
        function = MADE[kind][technique].fit
        own = {k: v for k, v in settings.items() if k not in ("samples", "batch")}
        check_keys(f"--{kind} {technique}", function, own, list(inspect.signature(function).parameters)[:4])
        check_arguments(f"--{kind} {technique}", function, own)
        settings = {k: v for k, v in settings.items() if k not in own}
    allowed = SEARCH_SETTINGS if technique == "scheduled" else ("rank",) if technique in FITS else ()
    for key, value in settings.items():
        if key not in ("samples", "batch") and not allowed:
            raise ValueError(f"cache {technique}: a calibration takes no keys, not {key}")
        if key not in ("samples", "batch"):
            choose(f"key of cache {technique}", key, allowed)
        known = annotations_of(search if key in SEARCH_SETTINGS else fit)
        check_value(f"--{key}", value, known[key])
        if key in ("samples", "batch", "rounds", "rank") and value < 1:
            raise ValueError(f"--{key}={value}; allowed: 1 or more")
        if key == "budget" and not 0 < value <= 1:
            raise ValueError(f"--budget={value}; allowed: above 0, at most 1")


def ending(technique: str, kind: str = "cache") -> str:
    """Of the file that a technique's calibration is written to."""
    if kind != "cache":
        return MADE[kind][technique].suffix
    return ".npz" if technique in FITS else ".json"


def _made(
    made: Made, technique: str, sampler: Sampler, out: Any, samples: int, batch: int, progress: Progress, settings: Any
) -> dict[str, Any]:
    """What a fit of a grid or a solver gives, with what it says of itself; written where there is a file."""
    content = dict(made.fit(sampler, samples, batch, progress, **settings))
    says = {"technique": technique, **about(sampler, samples)}
    if made.suffix == ".json":
        content = {**says, **content}
        if out is not None:
            save_json(out, content)
        return content
    if out is not None:
        save_arrays(out, content, comment=json.dumps(says))
    return {**says, "arrays": content}


def calibrate(technique: str, sampler: Sampler, samples: int, batch: int, progress: Progress) -> dict[str, Any]:
    """Measures the table that a technique plans from.

    Args:
      technique: a key of `CALIBRATIONS`.
      samples: how many are drawn, in batches of `batch`.

    Returns:
      The object of the file (`difax.accel.caches.measured`).
    """
    calibration = CALIBRATIONS[choose("calibration", technique, CALIBRATIONS)]
    recorder = calibration.recorder(len(sampler.run.rows.i))
    traces = [trace for _, _, trace in _recorded(sampler, recorder, samples, batch, progress)]
    return {"technique": technique, **about(sampler, samples), **calibration.table(traces)}


def fit(
    technique: str, sampler: Sampler, samples: int, batch: int, progress: Progress, rank: int = 32
) -> dict[str, dict[str, Any]]:
    """Fits the parameters that a technique has learned to what the model does in its own runs.

    Args:
      technique: a key of `FITS`.
      samples: how many are drawn, in batches of `batch`.
      rank: of icc's factors.

    Returns:
      {stage: {name: array}}, the arrays of the file (`save_by_stage`).
    """
    if sampler.run.accelerator.networks:
        raise ValueError(f"cache {technique}: a run of two networks; allowed: what is fitted is of one")
    found = FITS[choose("fit", technique, FITS)]
    recorder = found.recorder(len(sampler.run.rows.i))
    runs = _recorded(sampler, recorder, samples, batch, progress)
    return found.arrays(sampler.run.model, sampler.params, runs, rank)


def _recorded(
    sampler: Sampler, recorder: Accelerator, samples: int, batch: int, progress: Progress
) -> Iterator[tuple[Any, Any, Trace]]:
    """(rows, conditions, trace) of each batch of a run with a recorder."""
    program, rows = sampler.program(recorder), sampler.rows(recorder)
    params = with_learned(sampler.params, recorder)
    for start in range(0, samples, batch):
        x, keys, cond = sampler.inputs(start, min(batch, samples - start))
        _, trace = program(params, x, keys, cond, rows, sampler.scale())
        yield rows, cond, jax.tree.map(np.asarray, trace)
        progress(f"{min(start + batch, samples)} of {samples} samples")


def search(
    sampler: Sampler,
    budget: float,
    samples: int,
    progress: Progress,
    *,
    where: str = "branches",
    forecast: str = "hold",
    order: int = 1,
    rounds: int = 12,
    gradient_samples: int = 4,
) -> dict[str, Any]:
    """Searches the evaluations to compute for a budget (`difax.accel.fit.search`).

    Args:
      budget: of the operations of a run without a cache, 0 to 1.
      samples: on whose distance to the uncached ones the search is made.
      where, forecast, order: of `scheduled`.
      rounds: of exchanges, at most. gradient_samples: of the soft run that is differentiated.

    Returns:
      The object of the file that `scheduled` reads, with the losses of the starts and of what was found.
    """
    run, evaluations = sampler.run, len(sampler.run.rows.i)
    full = computed_for(run, sampler.params, budget)
    make = partial(scheduled, where=where, forecast=forecast, order=order)
    loss = Loss(sampler, make, samples)
    gradient = None
    if where == "branches" and forecast == "hold" and not run.accelerator.networks:
        gradient = _gradient(sampler, min(gradient_samples, samples), loss.wanted)
    starts = {"uniform": uniform(evaluations, full)}
    if evaluations > 2:
        table = calibrate("smoothcache", sampler, min(samples, 8), min(samples, 8), progress)["errors"]
        found = [np.asarray(e, np.float64) for branches in table.values() for e in branches.values()]
        starts["dynamic programming"] = by_dynamic_programming(np.mean(found, axis=0), full)
    losses = {name: loss(schedule) for name, schedule in starts.items()}
    best = min(losses, key=lambda name: losses[name])
    done = refine(
        starts[best],
        loss,
        gradient,
        rounds=rounds,
        progress=lambda n, value: progress(f"{n} plans measured, loss {value:.4g}"),
    )
    return {
        "technique": "scheduled",
        **about(sampler, samples),
        "budget": budget,
        "schedule": done.schedule.astype(int).tolist(),
        "where": where,
        "forecast": forecast,
        "order": order,
        "losses": {**losses, "found": done.loss},
        "history": [float(value) for value, _ in done.history],
    }


class Loss:
    """schedule -> mean squared distance of its samples to the uncached ones."""

    def __init__(self, sampler: Sampler, make: Callable[..., Accelerator], samples: int, start: int = 0):
        self.sampler, self.make, self.samples, self.start = sampler, make, samples, start
        neutral = Accelerator()
        x, keys, cond = sampler.inputs(start, samples)
        program = sampler.program(neutral)
        self.wanted, _ = program(sampler.params, x, keys, cond, sampler.rows(neutral), sampler.scale())
        self.program: Any = None

    def samples_of(self, schedule: np.ndarray) -> jax.Array:
        """The samples of a schedule."""
        accelerator = self.make(schedule.astype(int).tolist())
        if self.program is None:  # the rows say what is computed: one program runs all plans
            self.program = self.sampler.program(accelerator)
        x, keys, cond = self.sampler.inputs(self.start, self.samples)
        rows = self.sampler.rows(accelerator)
        return self.program(self.sampler.params, x, keys, cond, rows, self.sampler.scale())[0]

    def __call__(self, schedule: np.ndarray) -> float:
        return float(jnp.mean((self.samples_of(schedule) - self.wanted) ** 2))


def computed_for(run: Setup, params: Params, budget: float) -> int:
    """How many evaluations of a run a budget allows to compute, the others paying for conditioning and ends alone.

    Raises:
      ValueError: a budget outside 0 to 1, or below what one computed evaluation needs.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"--budget={budget}; allowed: above 0, at most 1")
    cost, evaluations = model_cost(run.model, params, run.attention), len(run.rows.i)
    held = cost.held
    full = int((budget * cost.evaluation - held) * evaluations / (cost.evaluation - held))
    if full < 1:
        least = (held * (evaluations - 1) + cost.evaluation) / (evaluations * cost.evaluation)
        raise ValueError(f"--budget={budget}; allowed: {least:.3f} or more, which computes one evaluation")
    return min(full, evaluations)


def _gradient(sampler: Sampler, samples: int, wanted: jax.Array) -> Callable[[np.ndarray], np.ndarray]:
    accelerator = soft_hold()
    program, rows = sampler.program(accelerator, remat=True), sampler.rows(accelerator)

    @jax.jit
    def slope(weights: jax.Array, params: Params, x: Any, keys: Any, cond: Any, want: jax.Array) -> jax.Array:
        def distance(w: jax.Array) -> jax.Array:
            planned = rows._replace(plan=rows.plan.replace(values=w))
            return jnp.mean((program(params, x, keys, cond, planned, sampler.scale())[0] - want) ** 2)

        return jax.grad(distance)(weights)

    def gradient(schedule: np.ndarray) -> np.ndarray:
        x, keys, cond = sampler.inputs(0, samples)
        weights = jnp.asarray(schedule, jnp.result_type(float))
        return np.asarray(slope(weights, sampler.params, x, keys, cond, wanted[:samples]))

    return gradient


def about(sampler: Sampler, samples: int) -> dict[str, Any]:
    """What was run, for whoever reads the file."""
    run = sampler.run
    return {
        "model": run.model.name,
        "stages": says_of(run.model.stages),
        "solver": run.described.get("solver", ""),
        "grid": run.described.get("grid", ""),
        "steps": len(run.rows.i),
        "guide": run.described.get("guide", ""),
        "scale": run.scale,
        "data": f"{samples} samples, seed {sampler.seed}, guidance {run.described.get('guide', '')} {run.scale:g}",
    }


def save_json(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Writes one JSON object; the file appears whole or not at all."""
    with replacing(path) as aside:
        pathlib.Path(aside).write_text(json.dumps(content) + "\n")
