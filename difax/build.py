"""From a configuration to objects: the registries, and the one place that turns names and keys into factories."""

from __future__ import annotations

import difflib
import inspect
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from difax import grids, guidance, losses
from difax.accel.caches import CACHES
from difax.accel.solvers import SOLVERS
from difax.checkpoint import check_shapes, load_native, read_metadata
from difax.contracts import Accelerator, Guide, Model, Params, Row, Solver
from difax.data import DATASETS, Images
from difax.models import MODELS
from difax.models.dit_checkpoint import load_dit
from difax.process import PREDICTIONS, PROCESSES, Process
from difax.sample import make_rows
from difax.train import Task, TrainOptions, restore_ema
from difax.trunk import neutral

ASSETS = pathlib.Path(__file__).resolve().parent / "assets"
ACCELERATORS: dict[str, Callable[..., Accelerator]] = {"none": neutral, **CACHES}

REGISTRIES: dict[str, Mapping[str, Callable[..., Any]]] = {
    "model": MODELS,
    "process": PROCESSES,
    "solver": SOLVERS,
    "grid": grids.GRIDS,
    "guide": guidance.GUIDES,
    "cache": ACCELERATORS,
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


SECTIONS = (
    "model", "process", "prediction", "weights",
    "solver", "grid", "steps", "guide", "scale", "cache",
    "data", "loss", "train",
)  # fmt: skip


def build_run(config: Mapping[str, Any], model: Model | None = None) -> Run:
    """Builds process, seams and (unless given) the model of a configuration; every refusal is a ValueError."""
    for key in config:
        choose("config section", key, SECTIONS)
    for key in ("process", "prediction", "solver", "grid", "steps", "guide", "scale"):
        if key not in config:
            raise ValueError(f"config section {key} is missing; a sampling run needs it")
    if model is None:
        model = cast(Model, make("model", config["model"]))
    process = make("process", config["process"])
    prediction = choose("prediction", config["prediction"], PREDICTIONS)
    solver = make("solver", config["solver"])
    guide = make("guide", config["guide"])
    accelerator = make("cache", config.get("cache", {"name": "none"}))
    times = grids.make_times(make("grid", config["grid"]), process, config["steps"])
    rows = make_rows(solver, guide, process, times)
    if prediction in ("eps", "score") and not np.all(rows.level.alpha > 0):
        raise ValueError(
            f"grid {config['grid']['name']} evaluates {process.name} where alpha = 0, and a prediction of "
            f"{prediction} says nothing about the image there; allowed: a grid such as log_snr or karras"
        )
    if config["solver"].get("variance") == "learned" and not model.learn_sigma:
        raise ValueError("solver ddpm: variance='learned' needs a model with learn_sigma; allowed: small, large")
    return Run(model, process, prediction, solver, guide, accelerator, times, rows, float(config["scale"]))


def build_task(config: Mapping[str, Any], previewer: Callable[[Run], Any] | None = None) -> Task:
    """The training task of a configuration: a diffusion model where it has a process, else a classifier.

    Args:
      config: with sections model, loss, train (its `dtype` is the model's in training), and for a diffusion model
        those of `build_run`.
      previewer: run -> (params -> uint8 picture), for the sample grids of a diffusion model.
    """
    for key in ("model", "loss", "data", "train"):
        if key not in config:
            raise ValueError(f"config section {key} is missing; training needs it")
    section = dict(config["model"])
    if config["train"].get("dtype"):
        section["dtype"] = config["train"]["dtype"]
    model = make("model", section)
    if "process" not in config:
        return Task(model.init, make("loss", config["loss"], model))
    run = build_run(config, model)
    loss = make("loss", config["loss"], model, run.process, run.prediction)
    return Task(model.init, loss, None if previewer is None else previewer(run))


def build_data(config: Mapping[str, Any], split: str, data_dir: str | None = None) -> Images:
    """The data set of a configuration."""
    return make("data", config["data"], split=split, data_dir=data_dir)


def build_options(config: Mapping[str, Any]) -> TrainOptions:
    """The training options of a configuration."""
    section = dict(config["train"])
    for key in section:
        choose("key of train", key, TrainOptions.__dataclass_fields__)
    return TrainOptions(**section)


def embedded_weights() -> list[str]:
    """Names of the weights that difax brings along."""
    return sorted(p.stem for p in ASSETS.glob("*.safetensors"))


def load_weights(config: Mapping[str, Any], model: Model, path: str | None = None) -> tuple[Model, Params, str]:
    """Reads the weights of a model: difax's own files, the folder of a training run, or a published DiT checkpoint.

    Args:
      config: its `weights` names an embedded file, where no path is given.
      model: as the configuration describes it.
      path: a .safetensors file (difax, facebookresearch/DiT, SiT or diffusers layout), or a run's folder.

    Returns:
      (model, params, where they came from); a DiT of the diffusers layout differs in two constants from the
      original's, so that the model may be another than the one given.

    Raises:
      ValueError: no weights named, or a file that does not fit (names the tensor).
    """
    if path is None:
        name = config.get("weights")
        if name is None:
            raise ValueError(
                "this configuration has no weights of its own; give --weights FILE.safetensors, --weights RUN_FOLDER, "
                f"or --random-init (embedded weights: {', '.join(embedded_weights())})"
            )
        path = str(ASSETS / f"{choose('weights', name, embedded_weights())}.safetensors")
        source = f"{name} (embedded)"
    else:
        source = str(path)
    spec = jax.eval_shape(model.init, jax.random.key(0))
    if pathlib.Path(path).is_dir() and (pathlib.Path(path) / "checkpoints").is_dir():
        step, params = restore_ema(path, model.init)
        return model, params, f"{path} (step {step}, EMA)"
    if config["model"]["name"] == "dit" and not read_metadata(path):
        given = {k: v for k, v in config["model"].items() if k in ("size", "heads", "dtype")}
        found, params = load_dit(path, **given)
        check_shapes(path, params, spec)
        return found, params, source
    return model, load_native(path, spec), source
