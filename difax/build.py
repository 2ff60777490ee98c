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
from difax.accel.attention import ATTENTIONS, attention, first_of
from difax.accel.caches import CACHES
from difax.accel.caches.measured import save_by_stage
from difax.accel.caches.scheduled import scheduled
from difax.accel.fit import CALIBRATIONS, FITS
from difax.accel.fit.search import by_dynamic_programming, refine, soft_hold, uniform
from difax.accel.quant import QUANTS
from difax.accel.solvers import SOLVERS
from difax.checkpoint import check_shapes, load_native, read_metadata, tensor_shapes
from difax.contracts import Accelerator, Attention, Guide, Model, Params, Row, Solver
from difax.convert import is_converted, load_converted
from difax.data import DATASETS, Images
from difax.models import CHECKPOINTS, MODELS
from difax.process import PREDICTIONS, PROCESSES, Process
from difax.published import Foreign, load_foreign
from difax.qtensor import Rules, quantize_params
from difax.qtensor import cast as cast_params
from difax.sample import make_rows, make_sampler
from difax.stack import stack, with_learned
from difax.train import Task, TrainOptions, restore_ema
from difax.trunk import neutral, unstack

__all__ = [
    "CALIBRATIONS",
    "FITS",
    "by_dynamic_programming",
    "refine",
    "save_by_stage",
    "scheduled",
    "soft_hold",
    "uniform",
]  # for the entry points
ASSETS = pathlib.Path(__file__).resolve().parent / "assets"
ACCELERATORS: dict[str, Callable[..., Accelerator]] = {"none": neutral, **CACHES}

REGISTRIES: dict[str, Mapping[str, Callable[..., Any]]] = {
    "model": MODELS,
    "process": PROCESSES,
    "solver": SOLVERS,
    "grid": grids.GRIDS,
    "guide": guidance.GUIDES,
    "cache": ACCELERATORS,
    "attend": ATTENTIONS,
    "quant": QUANTS,
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
    attention: Attention
    rules: Rules
    stacked: bool
    ahead: bool
    times: np.ndarray
    rows: Row
    scale: float
    described: Mapping[str, str]  # the names that the configuration gave to its sections

    def sampler(self, accelerator: Accelerator | None = None, **options: Any) -> Any:
        """The jitted sampler (`difax.sample.make_sampler`), with another accelerator if one is given."""
        return make_sampler(
            self.model,
            self.process,
            self.prediction,
            self.solver,
            self.guide,
            self.accelerator if accelerator is None else accelerator,
            attention=self.attention,
            ahead=self.ahead,
            **options,
        )

    def prepare(self, params: Params) -> Params:
        """Parameters as they are sampled with: quantised, cast to the model's dtype, with those that the cache has
        learned, in the layout that was chosen."""
        params = cast_params(quantize_params(params, self.rules), self.model.dtype)
        params = with_learned(params, self.accelerator)
        return params if self.stacked else unstack(self.model, params)


SECTIONS = (
    "model", "process", "prediction", "weights",
    "solver", "grid", "steps", "guide", "scale", "cache", "attend", "quant", "layout", "conditioning", "reduced",
    "data", "loss", "train",
)  # fmt: skip
LAYOUTS = ("stacked", "unstacked")
CONDITIONINGS = ("each", "ahead")  # is the blocks' modulation computed at each evaluation, or before all of them
TOGETHER = {"attend": ",", "cache": "+"}  # what stands between several names in one section


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
    accelerator = _accelerator(config.get("cache", {"name": "none"}))
    attending = _attention(config.get("attend", {"name": "xla"}))
    rules = make("quant", config.get("quant", {"name": "none"}), model)
    layout = choose("layout", config.get("layout", "stacked"), LAYOUTS)
    conditioning = choose("conditioning", config.get("conditioning", "each"), CONDITIONINGS)
    times = grids.make_times(make("grid", config["grid"]), process, config["steps"])
    rows = make_rows(solver, guide, process, times, accelerator, model.stages)
    if prediction in ("eps", "score") and not np.all(rows.level.alpha > 0):
        raise ValueError(
            f"grid {config['grid']['name']} evaluates {process.name} where alpha = 0, and a prediction of "
            f"{prediction} says nothing about the image there; allowed: a grid such as log_snr or karras"
        )
    if config["solver"].get("variance") == "learned" and not model.learn_sigma:
        raise ValueError("solver ddpm: variance='learned' needs a model with learn_sigma; allowed: small, large")
    return Run(
        model=model,
        process=process,
        prediction=prediction,
        solver=solver,
        guide=guide,
        accelerator=accelerator,
        attention=attending,
        rules=rules,
        stacked=layout == "stacked",
        ahead=conditioning == "ahead",
        times=times,
        rows=rows,
        scale=float(config["scale"]),
        described={k: str(v["name"]) for k, v in config.items() if isinstance(v, Mapping) and "name" in v},
    )


def _accelerator(section: Mapping[str, Any]) -> Accelerator:
    """One cache with its hyperparameters, or several names between plus signs, with keys "name.hyperparameter"."""
    names = str(section.get("name", "")).split(TOGETHER["cache"])
    if len(names) == 1:
        return make("cache", section)
    members: dict[str, dict[str, Any]] = {}
    for name in names:
        choose("cache", name, ACCELERATORS)
        if name in members:
            raise ValueError(f"cache {section['name']}: {name} is named twice; allowed: once")
        members[name] = {"name": name}
    for path, value in section.items():
        if path != "name":
            name, _, key = path.partition(".")
            if not key:
                raise ValueError(f"key of cache {section['name']}: {path!r}; allowed: {names[0]}.{path}")
            members[choose("cache of the key " + path, name, names)][key] = value
    return stack(*(make("cache", member) for member in members.values()))


def _attention(section: Mapping[str, Any]) -> Attention:
    """One attention with its hyperparameters, or several names between commas, the first that can being taken."""
    if "name" not in section:
        raise ValueError(f"attend: the name is missing; allowed: {', '.join(ATTENTIONS)}")
    name, settings = section["name"], {k: v for k, v in section.items() if k != "name"}
    if "," in name:
        if settings:
            raise ValueError(f"attend {name}: several names take no hyperparameters")
        return attention(name)
    return first_of({name: make("attend", section)})  # which turns its refusal into one line


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
    if is_converted(path):
        return model, load_converted(path, spec), source
    name = config["model"]["name"]
    if name in CHECKPOINTS and not read_metadata(path):
        given = {k: v for k, v in config["model"].items() if k in UNSTORED and (name != "dit" or k != "variant")}
        found = CHECKPOINTS[name].find(path, **given)
        check_shapes(path, found.spec, spec)
        return found.model, load_foreign(path, found), source
    return model, load_native(path, spec), source


# what a published checkpoint may not tell about its model
UNSTORED = (
    "size", "heads", "dtype", "variant", "text_tokens", "axes_dim", "base_size", "interpolation_scale", "eps",
)  # fmt: skip


def recognise(path: str, model: str | None = None, layout: str | None = None, **geometry: Any) -> Foreign:
    """The model that a published checkpoint holds.

    Args:
      path: as `difax.checkpoint.load_safetensors`.
      model: a name of `CHECKPOINTS`; None tries them all.
      layout, geometry: what the file does not tell, as arguments of the model's factory.

    Raises:
      ValueError: an unknown model, or a file of none of them.
    """
    names = sorted(tensor_shapes(path))
    if model is None:
        model = max(CHECKPOINTS, key=lambda name: CHECKPOINTS[name].known(names))
        if not CHECKPOINTS[model].known(names):
            raise ValueError(
                f"{path}: no checkpoint of {', '.join(CHECKPOINTS)}; its first tensors: "
                f"{', '.join(names[:3]) or 'none'}"
            )
    return CHECKPOINTS[choose("model", model, CHECKPOINTS)].find(path, layout=layout, **geometry)
