"""From a configuration to objects: the registries, and the one place that turns names and keys into factories."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from difax import grids, guidance, losses
from difax.accel.caches import CACHES
from difax.accel.solvers import SOLVERS
from difax.contracts import Accelerator, Guide, Model, Row, Solver
from difax.data import DATASETS, Images
from difax.losses import Loss
from difax.models import MODELS
from difax.process import PREDICTIONS, PROCESSES, Process
from difax.sample import make_rows
from difax.train import TrainOptions
from difax.trunk import neutral

ACCELERATORS: dict[str, Callable[..., Accelerator]] = {"none": neutral, **CACHES}

REGISTRIES: dict[str, Mapping[str, Callable[..., Any]]] = {
    "model": MODELS,
    "process": PROCESSES,
    "solver": SOLVERS,
    "grid": grids.GRIDS,
    "guide": guidance.GUIDES,
    "accelerator": ACCELERATORS,
    "loss": losses.LOSSES,
    "data": DATASETS,
}


def choose(kind: str, value: str, allowed: Any) -> str:
    """Returns `value` if it is allowed, else raises ValueError with the list and the nearest match."""
    names = list(allowed)
    if value in names:
        return value
    near = difflib.get_close_matches(str(value), names, 1, 0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"unknown {kind} {value!r}{hint}; allowed: {', '.join(names)}")


def make(kind: str, section: Mapping[str, Any], *args: Any, **more: Any) -> Any:
    """Calls the factory that `section["name"]` names in the registry of `kind` with the section's other keys.

    Args:
      kind: a key of `REGISTRIES`.
      section: {"name": ..., **hyperparameters}.
      args, more: passed on before and besides the section's own keys.

    Raises:
      ValueError: unknown name or key (with the nearest match), or whatever the factory refuses.
    """
    keys = dict(section)
    if "name" not in keys:
        raise ValueError(f"{kind}: the name is missing; allowed: {', '.join(REGISTRIES[kind])}")
    name = choose(kind, keys.pop("name"), REGISTRIES[kind])
    factory = REGISTRIES[kind][name]
    parameters = list(inspect.signature(factory).parameters)[len(args) :]
    for key in keys:
        choose(f"key of {kind} {name}", key, [p for p in parameters if p not in more])
    try:
        return factory(*args, **keys, **more)
    except TypeError as error:
        raise ValueError(f"{kind} {name}: {error}") from None


class Run(NamedTuple):
    """Everything that a sampling run is made of, built from one configuration."""

    model: Model
    process: Process
    prediction: str
    solver: Solver
    guide: Guide
    accelerator: Accelerator
    times: np.ndarray
    rows: Row
    scale: float


SECTIONS = ("model", "process", "prediction", "sampler", "data", "loss", "train")
SAMPLER = ("solver", "grid", "steps", "guide", "scale", "accelerator")


def build_run(config: Mapping[str, Any]) -> Run:
    """Builds model, process and seams of a configuration; every refusal is a ValueError."""
    for key in config:
        choose("section", key, SECTIONS)
    sampler = config["sampler"]
    for key in sampler:
        choose("key of sampler", key, SAMPLER)
    model = make("model", config["model"])
    process = make("process", config["process"])
    prediction = choose("prediction", config["prediction"], PREDICTIONS)
    solver = make("solver", sampler["solver"])
    guide = make("guide", sampler["guide"])
    accelerator = make("accelerator", sampler["accelerator"])
    times = grids.make_times(make("grid", sampler["grid"]), process, sampler["steps"])
    rows = make_rows(solver, guide, process, times)
    return Run(
        model, process, prediction, solver, guide, accelerator, times, rows, float(sampler["scale"])
    )


def build_loss(config: Mapping[str, Any], model: Model, process: Process) -> Loss:
    """The training loss of a configuration."""
    return make("loss", config["loss"], model, process, config["prediction"])


def build_data(config: Mapping[str, Any], split: str, data_dir: str | None = None) -> Images:
    """The data set of a configuration."""
    return make("data", config["data"], split=split, data_dir=data_dir)


def build_options(config: Mapping[str, Any]) -> TrainOptions:
    """The training options of a configuration."""
    section = dict(config["train"])
    for key in section:
        choose("key of train", key, TrainOptions.__dataclass_fields__)
    return TrainOptions(**section)
