"""Which weights a run takes: files found and recognised, and held against the model of a configuration."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from difax.core.contracts import Model, Network, Params
from difax.core.placement import shapes_at
from difax.models import CHECKPOINTS
from difax.registry import REGISTRIES, choose, make, shown
from difax.training.train import last_step, read_run, restore_ema
from difax.weights.checkpoint import check_shapes, load_native, name_pattern, read_metadata, tensor_shapes
from difax.weights.convert import converted_model, is_converted, load_converted
from difax.weights.published import Foreign, Untold, load_foreign, read_config
from difax.weights.random import random_weights

ASSETS = pathlib.Path(__file__).resolve().parent / "assets"


def embedded_weights() -> list[str]:
    """Names of the weights that difax brings along."""
    return sorted(p.stem for p in ASSETS.glob("*.safetensors"))


class Weights:
    """Weights that are found, and read when they are first asked for.

    model: that they are of; source: where they came from, in words; section: that the model was made from, of the
    configuration or with what the checkpoint knows.
    """

    def __init__(self, model: Any, source: str, section: Mapping[str, Any], read: Callable[[], Params]):
        self.model, self.source, self.section, self._read = model, source, section, read

    @functools.cached_property
    def params(self) -> Params:
        return self._read()


RANDOM = "random"


def find_weights(
    config: Mapping[str, Any],
    model: Any,
    path: str | None = None,
    seed: int = 0,
    shardings: Callable[[Params], Any] | None = None,
) -> Weights:
    """The weights of a model: difax's own files, the folder of a training run, a published checkpoint, or random ones.

    Args:
      config: its `weights` names an embedded file, or "random", where no path is given.
      model: as the configuration describes it.
      path: a .safetensors file (difax, facebookresearch/DiT, SiT or diffusers layout), a run's folder, or what
        `difax convert` wrote.
      seed: of random weights.
      shardings: shapes -> where each parameter is read to; None is the first device of this process.

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
            return Weights(model, RANDOM, config["model"], lambda: random_weights(model, seed))
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
    kind = published_kind(path)
    if kind is None:
        stored = stored_model(path)
    else:
        _check_kind(path, kind, section)
        given = {k: v for k, v in section.items() if k in UNSTORED}
        found = recognise(path, fallback=settings_of(model), **without_preset(section["name"], given))
        stored = {"name": found.kind, **found.geometry}
    if stored is not None:
        check_stored(path, stored, section, model)
        model, section = _completed(model, section, stored)
    where = None if shardings is None else shardings(spec)
    if is_run(path):
        named_step = f"{path} (step {last_step(path)}, EMA)"
        return Weights(model, named_step, section, lambda: restore_ema(path, model.init, where)[1])
    if is_converted(path):
        if where is not None:
            spec = shapes_at(spec, where)
        return Weights(model, source, section, lambda: load_converted(path, spec))
    if found is not None:
        return Weights(model, source, section, lambda: load_foreign(path, found, shardings=where))
    return Weights(model, source, section, lambda: load_native(path, spec, shardings=where))


def second_network(
    path: str,
    config: Mapping[str, Any],
    model: Model,
    shared: bool = False,
    shardings: Callable[[Params], Any] | None = None,
) -> Network:
    """A network that runs beside a model for the same samples, from weights of difax, which say of what model.

    Args:
      path: a run's folder, a .safetensors file that difax wrote, or a name of embedded weights.
      config: of the run, whose process and prediction must be those that a run's folder was trained for.
      shared: are they other weights of the model itself; then a published checkpoint is taken too.
      shardings: as of `find_weights`.

    Raises:
      ValueError: no such weights, of a model that is not known, or of another size, condition, process or prediction;
        shared ones whose model differs in a setting.
    """
    said = f"weights={path}"
    file = str(ASSETS / f"{path}.safetensors") if path in embedded_weights() else path
    if not os.path.exists(file):
        raise ValueError(f"{said}: no such file or folder; allowed: one, or {', '.join(embedded_weights())}")
    kind = published_kind(file)
    if shared and kind is not None:
        settings = settings_of(model)
        free = {k: settings[k] for k in FREE if k in settings} | {"dtype": str(jnp.dtype(model.dtype))}
        found = recognise(file, fallback=settings, **free)
        _check_same(said, found.model, model)
        where = None if shardings is None else shardings(found.spec)
        return Network(model, load_foreign(file, found, shardings=where), shared)
    stored = stored_model(file) if kind is None else None
    if stored is None:
        raise ValueError(f"{said} say nothing of their model; allowed: a run's folder, or a file of difax")
    section = {**stored, "dtype": str(jnp.dtype(model.dtype))}
    second = make("model", section)
    for key in ("input_shape", "learn_sigma", "classes", "cond"):
        has, needs = getattr(second, key, None), getattr(model, key)
        if has != needs:
            raise ValueError(f"{said} are of {shown(second)} with {key}={has}; allowed: that of {model.name}, {needs}")
    trained = read_run(file) if is_run(file) else {}
    for key in ("process", "prediction"):
        if key in trained and trained[key] != config[key]:
            raise ValueError(f"{said} were trained with {key}={trained[key]}; allowed: {config[key]}")
    if shared:
        _check_same(said, second, model)
    return Network(second, find_weights({"model": section}, second, file, shardings=shardings).params, shared)


def _check_same(said: str, second: Model, model: Model) -> None:
    """Raises ValueError, naming the setting, where weights are not of the model itself."""
    has, needs = settings_of(second), settings_of(model)
    for key in needs:
        if has.get(key) != needs[key]:
            raise ValueError(f"{said} are of {shown(second)} with {key}={has.get(key)}; allowed: {needs[key]}, as the "
                             f"model itself has")  # fmt: skip


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
FREE = ("size", "dtype", "text_tokens", "image_tokens", "first_frame")


def settings_of(model: Any) -> dict[str, Any]:
    """The arguments of a model's factory as they are in effect; {} where the model does not tell."""
    blocks = [stage.block for stage in getattr(model, "stages", ())]
    config = getattr(blocks[0], "config", None) if blocks else None
    return dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else {}


def _check_kind(path: Any, stored: Any, section: Mapping[str, Any]) -> None:
    """Raises ValueError where a checkpoint holds another of difax's models than a configuration has."""
    here, there = shown(section["name"]), shown(stored)
    if here != there and {here, there} <= REGISTRIES["model"].keys():
        raise ValueError(f"{path}: holds a {there}; the configuration's model is {here}")


def check_stored(path: Any, stored: Mapping[str, Any], section: Mapping[str, Any], model: Any) -> None:
    """Raises ValueError, naming the setting, where the tensors of a checkpoint cannot be those of a model.

    Args:
      stored: the section that the checkpoint knows. section: of the configuration; what it does not state is the
        checkpoint's. model: of that section alone.
    """
    name = section["name"]
    _check_kind(path, stored["name"], section)
    if stored["name"] not in REGISTRIES["model"]:
        return  # of code that is not loaded for a name out of a file; its tensors are compared when they are read
    there = make("model", stored)
    if shown(stored["name"]) == shown(name):
        with contextlib.suppress(ValueError):  # the two do not go together: then it is named in what they differ
            model = make("model", _completed_section(section, stored))
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


def _completed_section(section: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """A section with what it does not state as a checkpoint has it, but for what its own variant stands for."""
    preset = presets(section["name"]) if section.get("variant") is not None else set()
    return {**{k: v for k, v in stored.items() if k not in preset}, **section}


def presets(name: Any) -> set[str]:
    """The arguments of a model's factory that its variants set: those without a default of their own."""
    if not isinstance(name, str) or name not in REGISTRIES["model"]:
        return set()
    return {k for k, p in inspect.signature(REGISTRIES["model"][name]).parameters.items() if p.default is None}


def _completed(model: Any, section: Mapping[str, Any], stored: Mapping[str, Any]) -> tuple[Any, Mapping[str, Any]]:
    """The model with what a configuration leaves open as the checkpoint has it, and the section that it is made from;
    the same objects if that is nothing."""
    if not settings_of(model) or section["name"] != stored["name"] or stored["name"] not in REGISTRIES["model"]:
        return model, section
    stated = {k: v for k, v in section.items() if k not in ("name", "variant")}
    completed = {**stored, **stated, "dtype": str(jnp.dtype(model.dtype))}
    whole = make("model", completed)
    return (model, section) if settings_of(whole) == settings_of(model) else (whole, completed)


# what a published checkpoint may not tell about its model
UNSTORED = (
    "size", "heads", "dtype", "variant", "text_tokens", "axes_dim", "base_size", "interpolation_scale", "eps",
    "norm_eps", "mlp_norm_eps", "activation", "max_positions", "theta", "time_scale", "image_tokens", "first_frame",
    "ignores_guidance",
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
    if model is not None:
        _check_architecture(path, kind)
    while True:
        try:
            found = CHECKPOINTS[kind].find(path, layout=layout, **geometry)
            break
        except Untold as untold:
            if untold.name not in fallback or untold.name in geometry:
                raise
            geometry[untold.name] = fallback[untold.name]
    defaults = {k: p.default for k, p in inspect.signature(REGISTRIES["model"][kind]).parameters.items()}
    assumed = frozenset(defaults.keys() - found.geometry.keys())
    return found._replace(kind=kind, geometry={**defaults, **found.geometry}, assumed=assumed)


def recognised_kind(path: str | os.PathLike) -> str:
    """The name in `CHECKPOINTS` of what a published checkpoint holds; ValueError for one of none of them."""
    names = sorted(tensor_shapes(path))
    kind = max(CHECKPOINTS, key=lambda name: CHECKPOINTS[name].known(names))
    _check_architecture(path, kind)
    return kind


# of the kinds of tensors in a file, those that a model has to know: HunyuanVideo has 56 of FLUX's 60, and 24 others
LEAST_KNOWN = 0.8


def _check_architecture(path: str | os.PathLike, kind: str) -> None:
    """Raises ValueError for a checkpoint of another architecture, by its config.json, else by its tensors' names."""
    tables = CHECKPOINTS[kind].tables
    names = sorted(tensor_shapes(path, tables.values()))
    patterns = {name_pattern(name): name for name in reversed(names)}
    ours = max(
        ({name_pattern(key) for row in table.values() for key in row.keys} for table in tables.values()),
        key=lambda some: len(some & patterns.keys()),
    )
    both, other = ours & patterns.keys(), sorted(patterns[p] for p in patterns.keys() - ours)
    file, config = read_config(path, {})
    classes = [name for published in CHECKPOINTS.values() for name in published.classes]
    said = config.get("_class_name")
    strange = said is not None and said not in classes and bool(other)
    if not strange and both and (not ours - both or len(both) >= LEAST_KNOWN * len(patterns)):
        return
    near = f"nearest {kind}, which knows {len(both)} of its {len(patterns)} kinds of tensors" if both else ""
    if strange:
        allowed = ", ".join(dict.fromkeys(classes))
        raise ValueError(
            f"{file}: _class_name={said!r} is none of {', '.join(CHECKPOINTS)}; allowed: {allowed}"
            + (f"; {near}" if near else "")
        )
    first = ", ".join(names[:3]) or "none"
    what = f"{near}, not {other[0]!r}" if near and other else f"its first tensors: {first}"
    raise ValueError(f"{path}: no checkpoint of {', '.join(CHECKPOINTS)}; {what}")
