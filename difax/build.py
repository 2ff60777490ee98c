"""From a configuration to objects: a run's setup, a training task, data, weights."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.attention import attention, first_of
from difax.accel.caches import NETWORKS, measured
from difax.accel.parallel import parallel
from difax.accel.quant import check_kernels, fitted
from difax.checkpoints import find_weights, second_network
from difax.core import grids, hosts
from difax.core.annotations import annotations_of, brief, check_value
from difax.core.contracts import Accelerator, Attention, Guide, Model, Params, Row, Solver, TrunkSpec
from difax.core.device import check_memory
from difax.core.drive import width
from difax.core.langevin import KINDS
from difax.core.noise import keys_of, sample_keys
from difax.core.placement import SAMPLES, Axes, Placement, make_placement, shapes_at
from difax.core.placement import described as placement_in_words
from difax.core.process import PREDICTIONS, Process, check_parts, observed_shape
from difax.core.qtensor import Rules, quantize_params, size_in_bytes
from difax.core.qtensor import cast as cast_params
from difax.core.sample import initial_noise, make_rows, make_sampler
from difax.core.shapes import trunk_spec
from difax.core.stack import stack, with_learned
from difax.core.target import Target, target
from difax.core.trunk import unstack
from difax.models import MODELS
from difax.registry import REGISTRIES, check_name, choose, is_outside, make, resolved, shown
from difax.training.data import Images
from difax.training.train import Task, TrainOptions


class Recipe(NamedTuple):
    """A setup as plain data, by which its program is found again without being traced.

    text: of all that the setup was built from. parts: the setup that it describes, and no other.
    """

    text: str
    parts: tuple[Any, ...]


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
    placement: Placement | None = None  # None: the device that jax runs on
    recipe: Recipe | None = None
    grid: grids.Grid | None = None
    by_label: tuple[int, ...] | None = None  # how many steps each label has, where that differs (`steps_by`)

    @property
    def target(self) -> Target:
        """What its programs are compiled for."""
        return target() if self.placement is None else self.placement.target

    def sampler(self, accelerator: Accelerator | None = None, **options: Any) -> Any:
        """The jitted sampler (`difax.core.sample.make_sampler`), with another accelerator if one is given.

        Raises:
          ValueError: a setup in which each label has a number of steps of its own, which is a sampler each.
        """
        if self.by_label is not None:
            raise ValueError(
                "config steps_by: each label has steps of its own, and this runs one number of them; allowed: difax "
                "sample, or steps_by=none with steps"
            )
        return make_sampler(
            self.model,
            self.process,
            self.prediction,
            self.solver,
            self.guide,
            self.accelerator if accelerator is None else accelerator,
            attention=self.attention,
            ahead=self.ahead,
            placement=self.placement,
            **options,
        )

    def times_of(self, steps: int) -> np.ndarray:
        """The times [steps + 1] of the run's grid for another number of steps."""
        assert self.grid is not None
        return grids.lay_times(self.grid, self.process, steps)[1]

    def started(self, strength: float) -> Setup:
        """The last part of a run, which begins at a known sample with noise: all but int(steps (1 - strength)) of its
        steps, as diffusers counts them.

        Args:
          strength: (0, 1], 1 is the whole run.

        Raises:
          ValueError: another strength, or one of no step.
        """
        n = len(self.times) - 1
        first = int(max(n - n * strength, 0)) if 0 < strength <= 1 else n
        if first >= n:
            raise ValueError(f"strength={strength}; allowed: above 0 up to 1, and one of {n} steps at least")
        if not first:
            return self
        times = self.times[first:]
        rows = make_rows(self.solver, self.guide, self.process, times, self.accelerator, self.model.stages)
        return self._replace(times=times, rows=rows, recipe=None)

    def inputs(
        self, seed: int, n: int, cond: Any, start: int = 0, numbers: np.ndarray | None = None
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Noise, keys and conditions of samples start ... start + n - 1; conditions (leaves lead with [m]) repeat.

        Args:
          numbers: [m] of the samples in the run, where they are others than 0 ... m - 1; they repeat too.
        """
        if numbers is None:
            keys = sample_keys(seed, n, start)
        else:
            keys = keys_of(seed, numbers[(start + np.arange(n)) % len(numbers)])
        index = (start + np.arange(n)) % len(jax.tree.leaves(cond)[0])
        some = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[index]), cond)
        return self.placed_samples((initial_noise(self.process, keys, self.model.input_shape), keys, some))

    @property
    def width(self) -> int:
        """Evaluations of each sample that lie in one batch: more than 1 for solvers that are parallel in time."""
        return width(self.solver, self.rows)

    @property
    def parts(self) -> int:
        """Devices that the evaluations of a batch are cut among."""
        return 1 if self.placement is None else self.placement.size(*SAMPLES)

    @property
    def shards(self) -> int:
        """A batch has a multiple of so many samples, for its evaluations, `width` of each, to divide evenly among
        `parts`."""
        return self.parts // math.gcd(self.parts, self.width)

    def placed_samples(self, tree: Any) -> Any:
        """Arrays that lead with the samples, cut along the mesh's axes of samples as far as these divide them."""
        if self.placement is None:
            return tree
        return hosts.put(tree, self.placement.batch(len(jax.tree.leaves(tree)[0])))

    def prepare(self, params: Params) -> Params:
        """Parameters as they are sampled with: quantised, cast to the model's dtype, as the target multiplies them,
        with those that the cache has learned, in the layout that was chosen."""
        devices = 1 if self.placement is None else self.placement.mesh.size

        def ready(params: Params) -> Params:
            if self.placement is not None:
                params = self.placement.arranged(params)
            return fitted(cast_params(quantize_params(params, self.rules), self.model.dtype), self.target, devices)

        def laid(params: Params) -> Params:
            return params if self.stacked else unstack(self.model, params)

        return laid(with_learned(ready(params), self.accelerator, lambda params: laid(ready(params))))

    def placed_shapes(self, shapes: Params) -> Params:
        """The shapes of prepared parameters, with where each will lie on the mesh."""
        return shapes if self.placement is None else shapes_at(shapes, self.placement.params(shapes))

    def place(self, params: Params) -> Params:
        """Prepared parameters where the run has them: on the device, or cut over those of the mesh."""
        return params if self.placement is None else hosts.put(params, self.placement.params(params))


def check_laid_out(setup: Setup, command: str) -> None:
    """Refuses, for a command that goes by the rows, a solver that decides in the run which of them there are, or makes
    several at once.

    Raises:
      ValueError: naming the command and the solver.
    """
    if setup.solver.drive != "scan":
        name = setup.described.get("solver", "of the run")
        what = "several at once" if setup.solver.drive == "window" else "as many as it finds it needs"
        raise ValueError(
            f"{command} counts the evaluations before the run, and solver {name} makes {what}; allowed: a solver such "
            "as ddim"
        )


SECTIONS = (
    "model", "process", "prediction", "weights",
    "solver", "grid", "steps", "steps_by", "guide", "scale", "cache", "attend", "quant", "layout", "conditioning",
    "reduced",
    "mesh", "pipeline", "data", "loss", "train",
)  # fmt: skip
# the values that stand alone, and what each may be
ALONE: dict[str, Any] = {
    "prediction": str, "steps": int, "steps_by": str | None, "scale": float, "weights": str | None, "layout": str,
    "conditioning": str,
}  # fmt: skip
LAYOUTS = ("stacked", "unstacked")
CONDITIONINGS = ("each", "ahead")  # is the blocks' modulation computed at each evaluation, or before all of them
TOGETHER = {"attend": ",", "cache": "+"}  # what stands between several names in one section


def check_alone(key: str, value: Any) -> Any:
    """A value that stands alone in a configuration, if it is of its type (`ALONE`); ValueError otherwise."""
    return check_value(f"config {key}", value, ALONE[key])


def check_config(config: Mapping[str, Any]) -> None:
    """Refuses unknown sections, sections that are no mappings of keys, and values that stand alone of another type.

    What the keys of a section may be says its factory (`difax.registry.make`).

    Raises:
      ValueError: the section, what it is and what is allowed.
    """
    if not isinstance(config, Mapping):
        raise ValueError(f"a configuration is {brief(config)}; allowed: a mapping of {', '.join(SECTIONS)}")
    for key, value in config.items():
        choose("config section", key, SECTIONS)
        if key in ALONE:
            check_alone(key, value)
        elif not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            inside = f"{key}.name=..." if key in REGISTRIES else f"its keys, such as {key}.{EXAMPLES[key]}"
            raise ValueError(f"config section {key}={brief(value)}; allowed: {inside}")
        elif key == "reduced":
            if "reduced" in value:
                raise ValueError("config section reduced has a section reduced; allowed: the others")
            check_config(value)


EXAMPLES = {"train": "steps=1000", "reduced": "model", "mesh": "seq=4", "pipeline": "height=512"}


def build_setup(config: Mapping[str, Any], model: Model | None = None, devices: Sequence[Any] | None = None) -> Setup:
    """Builds process, seams and (unless given) the model of a configuration; every refusal is a ValueError.

    Args:
      devices: that a section `mesh` is laid over; None is all of this process.
    """
    check_config(config)
    own = model is None
    model = _sampled(config) if model is None else model
    for key in ("process", "prediction", "solver", "grid", "steps", "guide", "scale"):
        if key not in config:
            raise ValueError(f"config section {key} is missing; a sampling run needs it")
    process = make_process(config["process"], model)
    prediction = choose("prediction", config["prediction"], PREDICTIONS)
    solver = make("solver", config["solver"])
    _check_parts(config, process, prediction, solver, model)
    guide = make("guide", config["guide"])
    accelerator = _accelerator(config.get("cache", {"name": "none"}), config, model, devices)
    attending = _attention(config.get("attend", {"name": "xla"}))
    placement = build_placement(config, model, accelerator, devices)
    if placement is not None and not all(network.shared for network in accelerator.networks):
        raise ValueError(f"cache {accelerator.name} runs another network too, on one device; allowed: no section mesh")
    if conditioning_of(config) == "ahead" and not all(network.shared for network in accelerator.networks):
        raise ValueError(f"conditioning=ahead: cache {accelerator.name} runs another network too; allowed: each")
    if placement is not None:
        attending = parallel(attending, placement, joint=_is_joint(model))
    rules = make("quant", config.get("quant", {"name": "none"}), model)
    if rules:
        with _naming("quant", config):
            shapes = jax.eval_shape(model.init, jax.random.key(0))
            jax.eval_shape(lambda params: quantize_params(params, rules), shapes)  # before any weight is read
            check_kernels(rules, target() if placement is None else placement.target, model.dtype)
    layout = choose("layout", config.get("layout", "stacked"), LAYOUTS)
    conditioning = conditioning_of(config)
    if conditioning == "ahead" and any(stage.takes for stage in model.stages):
        raise ValueError(f"conditioning=ahead: {model.name} has long skips, which are not conditioning; allowed: each")
    depth = sum(stage.depth for stage in model.stages)
    if layout == "unstacked" and depth > MOST_UNSTACKED:
        raise ValueError(f"layout=unstacked writes out {depth} blocks; allowed: up to {MOST_UNSTACKED}, or stacked")
    size = 4 * math.prod(model.input_shape) + size_in_bytes(model.cond)
    check_memory(f"one sample of {described(config, 'model')}", 4 * size, None, "a smaller size")
    if "data" in config and isinstance(data := config["data"].get("name"), str) and not is_outside(data):
        resolved("data", config["data"], 0, ("split",))  # which names the classes; it is not read
    make_grid = make("grid", config["grid"])
    with _naming("grid", config):
        process, times = grids.lay_times(make_grid, process, config["steps"])
    sites = sum(stage.depth * len(stage.branches) for stage in model.stages)
    check_memory(
        f"the tables of steps={config['steps']} and {depth} blocks",
        2 * len(times) * (ROW_BYTES + SITE_BYTES * sites),
        None,
        "fewer steps, or a smaller model.depth",
    )
    with _naming("cache" if "cache" in config else "solver", config), np.errstate(all="ignore"):
        rows = make_rows(solver, guide, process, times, accelerator, model.stages)
    _check_rows(rows, config)
    names = {k: shown(v["name"]) for k, v in config.items() if isinstance(v, Mapping) and "name" in v}
    fitted_to = (said for kind in ("grid", "solver") for said in measured.fitted_record(kind, config[kind]))
    measured.compare(
        (*accelerator.measured, *fitted_to, *_says_of_steps(config.get("steps_by"))),
        model=model.name,
        stages=model.stages,
        solver=names["solver"],
        steps=len(rows.i),
        guide=names["guide"],
        scale=float(config["scale"]),
    )
    if prediction in ("eps", "score") and not np.all(rows.level.alpha > 0):
        raise ValueError(
            f"grid {shown(config['grid']['name'])} evaluates {process.name} where alpha = 0, and a prediction of "
            f"{prediction} says nothing about the image there; allowed: a grid such as log_snr or karras"
        )
    if config["solver"].get("variance") == "learned" and not model.learn_sigma:
        raise ValueError("solver ddpm: variance='learned' needs a model with learn_sigma; allowed: small, large")
    setup = Setup(
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
        described=names,
        placement=placement,
        grid=make_grid,
        by_label=steps_by_label(config.get("steps_by"), model),
    )
    return with_recipe(setup, config, config.get("model") if own else None)


def _says_of_steps(file: str | None) -> tuple[Mapping[str, Any], ...]:
    """What a file of `steps_by` says of itself, but for the steps, of which it has several."""
    return tuple({k: v for k, v in said.items() if k != "steps"} for said in measured.record("steps_by", file))


def steps_by_label(file: str | None, model: Model) -> tuple[int, ...] | None:
    """How many steps each label has, of a file of `difax calibrate --solver stepsaver` or `adadiff`; None for no file.

    Raises:
      ValueError: no such file, one of something else, or of a model of other labels.
    """
    if file is None:
        return None
    where = f"config steps_by={file!r}"
    if not model.classes:
        raise ValueError(f"{where}: {model.name} has no labels; allowed: none")
    content = measured.load("steps_by", file)
    if not isinstance(content, Mapping) or content.get("technique") not in ("stepsaver", "adadiff"):
        raise ValueError(f"{where}: allowed: a file of difax calibrate --solver stepsaver, or adadiff")
    steps = content.get("steps_of")
    if not isinstance(steps, list) or not all(
        isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= grids.MOST_STEPS for n in steps
    ):
        raise ValueError(f"{where}: 'steps_of' is {brief(steps)}; allowed: a list of whole numbers of 1 or more")
    if len(steps) != model.classes:
        raise ValueError(f"{where}: {len(steps)} labels; allowed: {model.classes}, those of {model.name}")
    return tuple(steps)


def with_recipe(setup: Setup, config: Mapping[str, Any], section: Mapping[str, Any] | None) -> Setup:
    """A setup with its recipe, where it has one: it is built by difax's own factories from plain data alone.

    Args:
      config: that the setup was built from. section: that its model was made from, None where that is not known. What
        is not plain (a factory, what one made, code of a user's own, whose modules may import any other) has no recipe.
        Files that the configuration names, such as calibrations, are part of the recipe by their content.
    """
    sections = {**{k: v for k, v in config.items() if k not in UNDRAWN}, "made": section}
    try:
        text = json.dumps([sections, _files_in(sections)], sort_keys=True)
    except (TypeError, ValueError, OSError):
        text = None
    plain = section is not None and text is not None and all(map(_is_own, TOLD, [config.get(k) for k in TOLD]))
    parts = tuple(setup._replace(recipe=None))
    return setup._replace(recipe=Recipe(text, parts) if plain and text is not None else None)


def recipe_of(setup: Setup) -> str | None:
    """The text of a setup's recipe; None where it has none, or where a part was replaced since."""
    parts = tuple(setup._replace(recipe=None))
    known = setup.recipe
    if known is None or not all(part is was for part, was in zip(parts, known.parts, strict=True)):
        return None
    return known.text


UNDRAWN = ("weights", "data", "loss", "train", "reduced")  # sections that say nothing of the program that draws
TOLD = ("model", "process", "solver", "grid", "guide", "cache", "attend", "quant")


def _is_own(kind: str, section: Any) -> bool:
    """Whether what a section names are entries of the registries that are code of difax."""
    if section is None:
        return True
    names = split_names(kind, section.get("name"))
    factories = [REGISTRIES[kind].get(name) if isinstance(name, str) else None for name in names]
    return all(str(getattr(f, "__module__", "")).partition(".")[0] == "difax" for f in factories)


def _files_in(value: Any) -> list[Any]:
    """Digests of the files that texts of a configuration name; ValueError where one may name anything else."""
    if isinstance(value, Mapping):
        return [found for part in value.values() for found in _files_in(part)]
    if isinstance(value, (list, tuple)):
        return [found for part in value for found in _files_in(part)]
    if not isinstance(value, str):
        return []
    if is_outside(value) or os.path.isdir(value):
        raise ValueError(value)
    return [hashlib.sha256(pathlib.Path(value).read_bytes()).hexdigest()] if os.path.isfile(value) else []


def axes_of(section: Mapping[str, Any]) -> Axes:
    """The section `mesh` of a configuration, its keys and values checked."""
    known = annotations_of(Axes)
    for key, value in section.items():
        check_value(f"mesh.{choose('key of mesh', key, known)}", value, known[key], Axes._field_defaults[key])
    return Axes(**section)


def build_placement(
    config: Mapping[str, Any], model: Model, accelerator: Accelerator, devices: Sequence[Any] | None = None
) -> Placement | None:
    """The placement of a configuration's section `mesh`; None where it has none. The processes of a job share all their
    devices, and without a section the samples."""
    several = devices is None and hosts.processes() > 1
    if "mesh" not in config and not several:
        return None
    axes = axes_of(config["mesh"]) if "mesh" in config else Axes(data=jax.device_count())
    if several and axes.devices != jax.device_count():
        raise ValueError(
            f"mesh of {axes.devices} devices ({placement_in_words(axes)}); allowed: {jax.device_count()}, all those of "
            f"the {hosts.processes()} processes"
        )
    if axes.cfg > 1 and make("guide", config["guide"]).halves == 1:
        name = shown(config["guide"]["name"])
        raise ValueError(
            f"mesh.cfg={axes.cfg} with guide {name}, which runs one half; allowed: 1, or a guide such as cfg"
        )
    if axes.tensor > 1 and accelerator.learned is not None:
        raise ValueError(
            f"mesh.tensor={axes.tensor} with cache {accelerator.name}, whose factors were fitted to whole layers; "
            "allowed: tensor=1"
        )
    spec = _abstract_trunk(model)
    attends = [c for branches in spec.attention.values() for c in branches.values() if c is not None]
    heads = [call.q.shape[2] for call in attends]
    return make_placement(axes, jax.devices() if devices is None else devices, heads, model.shards)


def _abstract_trunk(model: Model) -> TrunkSpec:
    """Shapes of everything that one sample of a model makes."""
    x, _, cond = input_shapes(model, 1)
    return trunk_spec(model, jax.eval_shape(model.init, jax.random.key(0)), x, cond)


def input_shapes(model: Model, n: int) -> tuple[Any, Any, Any]:
    """Shapes of the noise, keys and conditions of n samples."""
    x = jax.ShapeDtypeStruct((n, *model.input_shape), jnp.float32)
    keys = jax.eval_shape(lambda: sample_keys(0, n))
    cond = jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *a.shape), a.dtype), model.cond)
    return x, keys, cond


def _is_joint(model: Model) -> bool:
    """Whether a model has several streams of tokens."""
    return len(jax.tree.leaves(_abstract_trunk(model).tokens)) > 1


def _sampled(config: Mapping[str, Any]) -> Model:
    """The model of a configuration, which must be one that draws."""
    if "model" not in config:
        raise ValueError("config section model is missing; a sampling run needs it")
    model = make("model", config["model"])
    if not isinstance(model, Model):
        named = [name for name, factory in MODELS.items() if annotations_of(factory).get("return") is Model]
        raise ValueError(
            f"model {shown(config['model']['name'])} is a classifier, which draws nothing; allowed: {', '.join(named)}"
        )
    return model


# bytes of an evaluation in the tables of a run: of its own numbers, and of a plan for each branch of each block
ROW_BYTES, SITE_BYTES = 1024, 32
MOST_UNSTACKED = 1000  # blocks that are written out one by one, each with arrays and a piece of the program of its own


@contextlib.contextmanager
def _naming(section: str, config: Mapping[str, Any]) -> Iterator[None]:
    """Puts a section before what is refused while its part is used, where the refusal does not name it."""
    try:
        yield
    except ValueError as error:
        name = shown(config[section].get("name", ""))
        known = [*name.replace("+", ",").split(","), shown(config.get("solver", {}).get("name", ""))]
        if section in str(error) or any(part and part in str(error) for part in known):
            raise
        raise ValueError(f"{described(config, section)}: {error}") from None


def described(config: Mapping[str, Any], section: str) -> str:
    """A section as a message shows it: "cache fora (interval=3)"."""
    keys = ", ".join(f"{k}={brief(v)}" for k, v in config.get(section, {}).items() if k != "name")
    name = shown(config.get(section, {}).get("name", ""))
    return f"{section} {name}{f' ({keys})' if keys else ''}"


def _check_rows(rows: Row, config: Mapping[str, Any]) -> None:
    """Refuses tables of a run that are not finite; a plan may hold infinity, which is a cap that is none."""
    numbers = lambda tree: [a for a in jax.tree.leaves(tree) if np.issubdtype(np.asarray(a).dtype, np.floating)]  # noqa: E731
    finite = all(np.isfinite(a).all() for a in numbers(rows._replace(plan=())))
    if not finite or any(np.isnan(a).any() for a in numbers(rows.plan.values)):
        sections = ("process", "solver", "grid", "guide") if not finite else ("cache",)
        what = ", ".join(described(config, section) for section in sections)
        raise ValueError(f"{what}: the tables of this run are not finite; allowed: values nearer the defaults")


def make_process(section: Mapping[str, Any], model: Model) -> Process:
    """The process of a section, with what follows from the size of the model's samples (`shift_by`)."""
    more = {"shape": tuple(model.input_shape)} if section.get("shift_by") is not None else {}
    return make("process", section, **more)


def _check_parts(config: Mapping[str, Any], process: Process, prediction: str, solver: Solver, model: Model) -> None:
    """Refuses what does not go with a process of position and velocity, if it is one."""
    if process.augmented is None:
        return
    check_parts(process, solver.augmented, described(config, "solver"))
    if prediction not in KINDS:
        raise ValueError(f"prediction={prediction} of process {process.name}; allowed: {', '.join(KINDS)}")
    channels = model.input_shape[-1]
    if channels % len(process.augmented.prior_std):
        raise ValueError(
            f"process {process.name} takes as many channels of velocity as of position, and {model.name} has "
            f"channels={channels}; allowed: twice those of the data"
        )


def conditioning_of(config: Mapping[str, Any]) -> str:
    """When what no image goes into is computed, of a configuration."""
    return choose("conditioning", config.get("conditioning", "each"), CONDITIONINGS)


def _cache(
    section: Mapping[str, Any], config: Mapping[str, Any], model: Model, devices: Sequence[Any] | None
) -> Accelerator:
    """One cache; one that runs a second network gets it read from its key `weights`, to where the model's would lie."""
    name = section.get("name")
    if not isinstance(name, str) or name not in NETWORKS:
        return make("cache", section)
    path = check_value(f"{name}: weights", section.get("weights"), str | None)
    with _naming("cache", config):
        shared, where = name == "experts", None
        if shared and devices is None:  # described devices hold nothing
            placement = build_placement(config, model, Accelerator())
            where = None if placement is None else placement.params
        second = None if path is None else second_network(path, config, model, shared, where)
    return make("cache", section, network=second)


def _accelerator(
    section: Mapping[str, Any], config: Mapping[str, Any], model: Model, devices: Sequence[Any] | None
) -> Accelerator:
    """One cache with its hyperparameters, or several names between plus signs, with keys "name.hyperparameter"."""
    names = split_names("cache", section.get("name", ""))
    if len(names) == 1:
        return _cache(section, config, model, devices)
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
    return stack(*(_cache(member, config, model, devices) for member in members.values()))


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
    check_config(config)
    for key in ("model", "loss", "data", "train"):
        if key not in config:
            raise ValueError(f"config section {key} is missing; training needs it")
    section = dict(config["model"])
    if config["train"].get("dtype"):
        section["dtype"] = config["train"]["dtype"]
    model = make("model", section)
    if "process" not in config:
        if isinstance(model, Model):
            raise ValueError(f"config section process is missing; {model.name} is trained to sample, along a process")
        if "mesh" in config:
            raise ValueError(f"config section mesh: {model.name} is no model that samples; allowed: train.devices=N")
        return Task(model.init, make("loss", config["loss"], model), None, model.input_shape, model.classes)
    setup = build_setup(config, model)
    loss = make("loss", config["loss"], model, setup.process, setup.prediction)
    preview = None if previewer is None else previewer(setup)
    place = setup.placement if "mesh" in config else None
    place = None if place is None else dataclasses.replace(place, arranges=False)
    return Task(model.init, loss, preview, observed_shape(setup.process, model.input_shape), model.classes, place)


def build_data(config: Mapping[str, Any], split: str) -> Images:
    """The data set of a configuration: "train" or "test"."""
    return make("data", config["data"], split=split)


def build_options(config: Mapping[str, Any]) -> TrainOptions:
    """The training options of a configuration."""
    check_config(config)
    section, known = dict(config.get("train", {})), annotations_of(TrainOptions)
    for key, value in section.items():
        field = TrainOptions.__dataclass_fields__[choose("key of train", key, TrainOptions.__dataclass_fields__)]
        section[key] = check_value(f"train.{key}", value, known[key], field.default)
    if "steps" not in section:
        raise ValueError("train.steps is missing; training needs it")
    return TrainOptions(**section)


def load_weights(config: Mapping[str, Any], model: Any, path: str | None = None) -> tuple[Any, Params, str]:
    """(model, params, where they came from), as `find_weights` finds them."""
    found = find_weights(config, model, path)
    return found.model, found.params, found.source
