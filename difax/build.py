"""From a configuration to objects: a run's setup, a training task, data, weights."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.attention import attention, first_of
from difax.core import grids
from difax.core.contracts import Accelerator, Attention, Guide, Model, Params, Row, Solver
from difax.core.noise import sample_keys
from difax.core.process import PREDICTIONS, Process
from difax.core.qtensor import Rules, quantize_params
from difax.core.qtensor import cast as cast_params
from difax.core.sample import initial_noise, make_rows, make_sampler
from difax.core.stack import stack, with_learned
from difax.core.trunk import unstack
from difax.models import CHECKPOINTS
from difax.registry import REGISTRIES, check_name, choose, make, shown
from difax.training.data import Images
from difax.training.train import Task, TrainOptions, last_step, read_run, restore_ema
from difax.weights.checkpoint import check_shapes, load_native, read_metadata, tensor_shapes
from difax.weights.convert import converted_model, is_converted, load_converted
from difax.weights.published import Foreign, Untold, load_foreign

ASSETS = pathlib.Path(__file__).resolve().parent / "assets"


class Setup(NamedTuple):
    """Everything that a sampling run is made of but its weights, built from one configuration."""

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
        """The jitted sampler (`difax.core.sample.make_sampler`), with another accelerator if one is given."""
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

    def inputs(self, seed: int, n: int, cond: Any, start: int = 0) -> tuple[jax.Array, jax.Array, Any]:
        """Noise, keys and conditions of samples start ... start + n - 1; conditions (leaves lead with [m]) repeat."""
        keys = sample_keys(seed, n, start)
        index = (start + np.arange(n)) % len(jax.tree.leaves(cond)[0])
        some = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[index]), cond)
        return initial_noise(self.process, keys, self.model.input_shape), keys, some

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


def build_setup(config: Mapping[str, Any], model: Model | None = None) -> Setup:
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
            f"grid {shown(config['grid']['name'])} evaluates {process.name} where alpha = 0, and a prediction of "
            f"{prediction} says nothing about the image there; allowed: a grid such as log_snr or karras"
        )
    if config["solver"].get("variance") == "learned" and not model.learn_sigma:
        raise ValueError("solver ddpm: variance='learned' needs a model with learn_sigma; allowed: small, large")
    return Setup(
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
        described={k: shown(v["name"]) for k, v in config.items() if isinstance(v, Mapping) and "name" in v},
    )


def _accelerator(section: Mapping[str, Any]) -> Accelerator:
    """One cache with its hyperparameters, or several names between plus signs, with keys "name.hyperparameter"."""
    names = split_names("cache", section.get("name", ""))
    if len(names) == 1:
        return make("cache", section)
    members: dict[str, dict[str, Any]] = {}
    for name in names:
        if name in members:
            raise ValueError(f"cache {section['name']}: {name} is named twice; allowed: once")
        members[name] = {"name": name}
    for path, value in section.items():
        if path != "name":
            name, _, key = path.rpartition(".")  # the name of a file has a dot of its own
            if not name:
                raise ValueError(f"key of cache {section['name']}: {path!r}; allowed: {names[0]}.{path}")
            members[choose("cache of the key " + path, name, names)][key] = value
    return stack(*(make("cache", member) for member in members.values()))


def _attention(section: Mapping[str, Any]) -> Attention:
    """One attention with its hyperparameters, or several names between commas, the first that can being taken."""
    names = split_names("attend", section.get("name", ""))
    if len(names) == 1:
        return first_of({shown(names[0]): make("attend", section)})  # which turns its refusal into one line
    if len(section) > 1:
        raise ValueError(f"attend {section['name']}: several names take no hyperparameters")
    for name in names:
        check_name("attend", name)
    return attention(names, factories={name: functools.partial(make, "attend", {"name": name}) for name in names})


def split_names(kind: str, name: Any) -> list[Any]:
    """The names that a section's name holds: several where the kind has a sign between them (`TOGETHER`)."""
    if kind not in TOGETHER or not isinstance(name, str):
        return [name]
    return [type(name)(part.strip()) for part in name.split(TOGETHER[kind])]


def build_task(config: Mapping[str, Any], previewer: Callable[[Setup], Any] | None = None) -> Task:
    """The training task of a configuration: a diffusion model where it has a process, else a classifier.

    Args:
      config: with sections model, loss, train (its `dtype` is the model's in training), and for a diffusion model
        those of `build_setup`.
      previewer: setup -> (params -> uint8 picture), for the sample grids of a diffusion model.
    """
    for key in ("model", "loss", "data", "train"):
        if key not in config:
            raise ValueError(f"config section {key} is missing; training needs it")
    section = dict(config["model"])
    if config["train"].get("dtype"):
        section["dtype"] = config["train"]["dtype"]
    model = make("model", section)
    if "process" not in config:
        return Task(model.init, make("loss", config["loss"], model), None, model.input_shape, model.classes)
    setup = build_setup(config, model)
    loss = make("loss", config["loss"], model, setup.process, setup.prediction)
    preview = None if previewer is None else previewer(setup)
    return Task(model.init, loss, preview, model.input_shape, model.classes)


def build_data(config: Mapping[str, Any], split: str) -> Images:
    """The data set of a configuration: "train" or "test"."""
    return make("data", config["data"], split=split)


def build_options(config: Mapping[str, Any]) -> TrainOptions:
    """The training options of a configuration."""
    section = dict(config["train"])
    for key in section:
        choose("key of train", key, TrainOptions.__dataclass_fields__)
    return TrainOptions(**section)


def embedded_weights() -> list[str]:
    """Names of the weights that difax brings along."""
    return sorted(p.stem for p in ASSETS.glob("*.safetensors"))


class Weights:
    """Weights that are found, and read when they are first asked for.

    model: that they are of; source: where they came from, in words.
    """

    def __init__(self, model: Any, source: str, read: Callable[[], Params]):
        self.model, self.source, self._read = model, source, read

    @functools.cached_property
    def params(self) -> Params:
        return self._read()


RANDOM = "random"


def find_weights(config: Mapping[str, Any], model: Any, path: str | None = None, seed: int = 0) -> Weights:
    """The weights of a model: difax's own files, the folder of a training run, a published checkpoint, or random ones.

    Args:
      config: its `weights` names an embedded file, or "random", where no path is given.
      model: as the configuration describes it.
      path: a .safetensors file (difax, facebookresearch/DiT, SiT or diffusers layout), a run's folder, or what
        `difax convert` wrote.
      seed: of random weights.

    Returns:
      `Weights`; a checkpoint may know what the configuration leaves open (a DiT of the diffusers layout differs in two
      constants from the original's), so that the model may be another than the one given.

    Raises:
      ValueError: no weights named, or a file that does not fit (names the setting or the tensor); what only the reading
        of it shows is raised then.
    """
    if path is None:
        name = config.get("weights")
        if name == RANDOM:
            return Weights(model, RANDOM, lambda: jax.jit(model.init)(jax.random.key(seed)))
        if name is None:
            raise ValueError(
                "this configuration has no weights of its own; give --weights FILE.safetensors, --weights RUN_FOLDER, "
                f"or --random-init (embedded weights: {', '.join(embedded_weights())})"
            )
        path = str(ASSETS / f"{choose('weights', name, embedded_weights())}.safetensors")
        source = f"{name} (embedded)"
    else:
        source = str(path)
    section, spec = config["model"], jax.eval_shape(model.init, jax.random.key(0))
    found = None
    if published_kind(path) is None:
        stored = stored_model(path)
    else:
        given = {k: v for k, v in section.items() if k in UNSTORED}
        found = recognise(path, fallback=settings_of(model), **without_preset(section["name"], given))
        stored = {"name": found.kind, **found.geometry}
    if stored is not None:
        check_stored(path, stored, section["name"], model)
        model = _completed(model, section, stored)
    if is_run(path):
        return Weights(model, f"{path} (step {last_step(path)}, EMA)", lambda: restore_ema(path, model.init)[1])
    if is_converted(path):
        return Weights(model, source, lambda: load_converted(path, spec))
    if found is not None:
        return Weights(model, source, lambda: load_foreign(path, found))
    return Weights(model, source, lambda: load_native(path, spec))


def is_run(path: str | os.PathLike) -> bool:
    """Whether a folder is that of a training run."""
    return os.path.isdir(os.path.join(path, "checkpoints"))


def published_kind(path: str | os.PathLike) -> str | None:
    """The name in `CHECKPOINTS` of what a checkpoint of another project holds; None for difax's own.

    Raises:
      ValueError: no checkpoint, or one of another project that is none of them.
    """
    if is_run(path) or is_converted(path) or read_metadata(path) or own_names(tensor_shapes(path)):
        return None
    return recognised_kind(path)


def own_names(names: Iterable[str]) -> bool:
    """Whether tensors are named as difax names its parameters, by their paths."""
    return any("/" in name for name in names)


def stored_model(path: str | os.PathLike) -> dict[str, Any] | None:
    """The section `model` that difax stored with weights of its own, whose names load no code; None where it is lost.

    Args:
      path: a run's folder, a converted one, or a .safetensors file that difax wrote.

    Raises:
      ValueError: a damaged file.
    """
    if is_run(path):
        config = read_run(path) if os.path.isfile(os.path.join(path, "config.json")) else {}
        section = config.get("model") if isinstance(config, Mapping) else None
    elif is_converted(path):
        section = converted_model(path)
    else:
        config = read_metadata(path).get("config")
        section = config.get("model") if isinstance(config, Mapping) else None
    if section is not None and not (isinstance(section, Mapping) and isinstance(section.get("name"), str)):
        raise ValueError(f"{path}: its section model is {str(section)[:100]!r}; allowed: a table with a name")
    return None if section is None else dict(section)


# what may differ from the checkpoint without a word: the size of what is drawn, and how it is computed
FREE = ("size", "dtype", "text_tokens")


def settings_of(model: Any) -> dict[str, Any]:
    """The arguments of a model's factory as they are in effect; {} where the model does not tell."""
    blocks = [stage.block for stage in getattr(model, "stages", ())]
    config = getattr(blocks[0], "config", None) if blocks else None
    return dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else {}


def check_stored(path: Any, stored: Mapping[str, Any], name: Any, model: Any) -> None:
    """Raises ValueError, naming the setting, where the tensors of a checkpoint cannot be those of a model.

    Args:
      stored: the section that the checkpoint knows. name, model: of the configuration.
    """
    if shown(stored["name"]) != shown(name) and {shown(stored["name"]), shown(name)} <= REGISTRIES["model"].keys():
        raise ValueError(f"{path}: holds a {stored['name']}; the configuration's model is {shown(name)}")
    if stored["name"] not in REGISTRIES["model"]:
        return  # of code that is not loaded for a name out of a file; its tensors are compared when they are read
    there = make("model", stored)
    here_settings, there_settings = settings_of(model), settings_of(there)
    other = [
        f"{key} is {there_settings[key]} in the checkpoint, {here_settings[key]} by the configuration"
        for key in here_settings
        if key in there_settings and key not in FREE and here_settings[key] != there_settings[key]
    ]
    if here_settings and here_settings.keys() == there_settings.keys() and not other:
        return
    here_spec, there_spec = (jax.eval_shape(m.init, jax.random.key(0)) for m in (model, there))
    if jax.tree.map(lambda a: a.shape, here_spec) == jax.tree.map(lambda a: a.shape, there_spec):
        return
    if other:
        raise ValueError(f"{path}: model.{'; model.'.join(other)}")
    check_shapes(str(path), there_spec, here_spec)


def _completed(model: Any, section: Mapping[str, Any], stored: Mapping[str, Any]) -> Any:
    """The model with what a configuration leaves open as the checkpoint has it; the same object if that is nothing."""
    if not settings_of(model) or section["name"] != stored["name"] or stored["name"] not in REGISTRIES["model"]:
        return model
    stated = {k: v for k, v in section.items() if k not in ("name", "variant")}
    whole = make("model", {**stored, **stated, "dtype": str(jnp.dtype(model.dtype))})
    return model if settings_of(whole) == settings_of(model) else whole


def load_weights(config: Mapping[str, Any], model: Any, path: str | None = None) -> tuple[Any, Params, str]:
    """(model, params, where they came from), as `find_weights` finds them."""
    found = find_weights(config, model, path)
    return found.model, found.params, found.source


# what a published checkpoint may not tell about its model
UNSTORED = (
    "size", "heads", "dtype", "variant", "text_tokens", "axes_dim", "base_size", "interpolation_scale", "eps",
)  # fmt: skip


VARIANTS = ("flux", "pixart")  # whose checkpoints may need one; the others' tell the geometry that it stands for


def without_preset(name: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the user tells of a published checkpoint, without a variant that stands for what its tensors tell."""
    return {k: v for k, v in given.items() if k != "variant" or name in VARIANTS}


def recognise(
    path: str,
    model: str | None = None,
    layout: str | None = None,
    fallback: Mapping[str, Any] = {},
    **geometry: Any,
) -> Foreign:
    """The model that a published checkpoint holds.

    Args:
      path: as `difax.weights.checkpoint.load_safetensors`.
      model: a name of `CHECKPOINTS`; None tries them all.
      layout, geometry: what the file does not tell, as arguments of the model's factory.
      fallback: arguments to take where neither the file nor `geometry` tells them.

    Returns:
      What is known of it; `geometry` has every argument of the factory.

    Raises:
      ValueError: an unknown model, or a file of none of them.
    """
    kind = recognised_kind(path) if model is None else choose("model", model, CHECKPOINTS)
    while True:
        try:
            found = CHECKPOINTS[kind].find(path, layout=layout, **geometry)
            break
        except Untold as untold:
            if untold.name not in fallback or untold.name in geometry:
                raise
            geometry[untold.name] = fallback[untold.name]
    defaults = {k: p.default for k, p in inspect.signature(REGISTRIES["model"][kind]).parameters.items()}
    return found._replace(kind=kind, geometry={**defaults, **found.geometry})


def recognised_kind(path: str | os.PathLike) -> str:
    """The name in `CHECKPOINTS` of what a published checkpoint holds; ValueError for one of none of them."""
    names = sorted(tensor_shapes(path))
    kind = max(CHECKPOINTS, key=lambda name: CHECKPOINTS[name].known(names))
    if not CHECKPOINTS[kind].known(names):
        first = ", ".join(names[:3]) or "none"
        raise ValueError(f"{path}: no checkpoint of {', '.join(CHECKPOINTS)}; its first tensors: {first}")
    return kind
