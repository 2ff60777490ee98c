"""Configurations: `get_config(arg)` files of ml_collections, overrides, and the same from gin bindings.

A configuration is a dictionary of sections; a section with a "name" is one entry of a registry and its other keys are
that factory's hyperparameters. Setting another name drops the old hyperparameters.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import math
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
from flax.traverse_util import flatten_dict

from difax.build import ALONE, SECTIONS, check_alone, check_config, split_names
from difax.checkpoints import (
    FREE,
    UNSTORED,
    check_stored,
    is_run,
    presets,
    published_kind,
    recognise,
    settings_of,
    stored_model,
    without_preset,
)
from difax.core.annotations import brief, check_value
from difax.core.contracts import Autoencoder, Model
from difax.core.files import named
from difax.core.placement import Axes
from difax.core.shell import DifaxWarning
from difax.models.autoencoders import find_autoencoder
from difax.pipelines.caches import cache_section
from difax.pipelines.folder import Folder
from difax.pipelines.prompts import prompting
from difax.pipelines.recipes import Recipe, open_pipeline
from difax.pipelines.section import checked as checked_section
from difax.pipelines.section import filled, given_components, latent_size, shifted
from difax.registry import REGISTRIES, check_name, choose, make, shown
from difax.training.train import read_run
from difax.weights.checkpoint import Source, read_metadata, tensor_shapes, tensor_types
from difax.weights.convert import is_converted
from difax.weights.scheduler import read_scheduler, scheduler_sections

# the configuration that a published checkpoint is sampled with where none is named
PUBLISHED = {
    "dit": "dit_imagenet",
    "flux": "flux_dev",
    "pixart": "pixart_sigma",
    "wan": "wan2_1",
    "sd3": "sd3",
    "qwen_image": "qwen_image",
    "flux2": "flux2_klein",
    "z_image": "z_image",
}
FOLDER = pathlib.Path(__file__).resolve().parent / "configs"
if not FOLDER.is_dir():  # a checkout without its links, see difax/__init__.py
    FOLDER = FOLDER.parent.parent / "configs"


def config_names() -> list[str]:
    """Names of the configurations that difax brings along."""
    return sorted(p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith("_"))


def load_config(where: str) -> dict[str, Any]:
    """Runs `get_config` of a configuration.

    Args:
      where: a name of difax's own configs ("fmnist_dit"), or a path to a .py file; either with ":arg" behind it.

    Returns:
      The configuration as a plain nested dict.

    Raises:
      ValueError: unknown name, missing file, a file without get_config, what its code raises, or something else than a
        configuration; the message names the file.
    """
    name, _, arg = where.partition(":")
    if not name or "\0" in name:
        raise ValueError(f"config {brief(where)}: no name; allowed: a .py file, or {', '.join(config_names())}")
    path = pathlib.Path(name)
    own = path.suffix != ".py" and len(path.parts) == 1 and name not in (".", "..")
    if own:
        path = FOLDER / f"{choose('config', name, config_names())}.py"
    elif path.suffix != ".py":
        raise ValueError(f"config {name}: allowed: a .py file, or {', '.join(config_names())}")
    elif not _is_file(path):
        raise ValueError(f"config {name}: no such file")
    if path.resolve().parent == FOLDER.resolve():
        get_config = importlib.import_module(f"difax.configs.{path.stem}").get_config
    else:
        get_config = _get_config_of(name, path)
    try:
        inspect.signature(get_config).bind(*([arg] if arg else []))
    except (TypeError, ValueError):
        wrong = f"takes no argument, but {arg!r} was given" if arg else "needs an argument, as in FILE.py:ARGUMENT"
        raise ValueError(f"config {where}: its get_config {wrong}") from None
    config = _running(where, lambda: get_config(arg) if arg else get_config())
    if not own and hasattr(config, "to_dict"):
        config = _running(where, config.to_dict)
    config = config.to_dict() if own else config
    if not isinstance(config, Mapping):
        what = f"{type(config).__name__} {brief(config)}"
        raise ValueError(f"config {where}: get_config returned {what}; allowed: a ConfigDict or a dict of sections")
    config = _running(where, lambda: _copied(config))
    try:
        check_config(config)
    except ValueError as error:
        raise ValueError(f"config {where}: {error}") from None
    return config


def _copied(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in config.items()}


def _is_file(path: pathlib.Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that may not be searched
        return False


def _get_config_of(name: str, path: pathlib.Path) -> Callable[..., Any]:
    """The get_config of a file outside of difax; runs that file."""
    spec = importlib.util.spec_from_file_location(f"difax_config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    loader = spec.loader
    _running(name, lambda: loader.exec_module(module))
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        what = "defines no get_config()" if get_config is None else f"get_config is {brief(get_config)}"
        raise ValueError(f"config {name}: the file {what}; allowed: a function that returns a ConfigDict")
    return get_config


def _running(where: str, code: Callable[[], Any]) -> Any:
    """What a configuration's code returns; whatever it raises, or its exit, is one line that names the file."""
    try:
        return code()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        said = " ".join(str(error).split())
        refused = isinstance(error, ValueError) and said.startswith("config ")
        raise ValueError(said if refused else f"config {where}: {type(error).__name__}: {said}"[:500]) from None


def configuration(
    base: str | Mapping[str, Any] | None, weights: str | None, settings: Sequence[tuple[str, Any]] = ()
) -> dict[str, Any]:
    """The configuration of a run, by the one rule for where a model's settings come from.

    What the user sets comes first, then what the checkpoint knows (what difax stored with it, its config.json, its
    tensors), then the configuration that is named; what none of them tells is the default.

    Args:
      base: of `load_config`, a configuration, or None for that of the checkpoint.
      weights: the path of a checkpoint, or None for weights that are none of a file's.
      settings: dotted ones, as `override` takes them.

    Raises:
      ValueError: settings, or a configuration, that the checkpoint's tensors contradict (both are named); a checkpoint
        that needs a configuration and has none.
    """
    if base is None:
        if weights is None:
            raise ValueError("which configuration? Give --config NAME (see difax list configs)")
        return override(checkpoint_config(weights, settings), settings)
    named = load_config(base) if isinstance(base, str) else dict(base)
    if weights is None or "model" not in named:
        return override(named, settings)
    own = [setting for setting in settings if setting[0].partition(".")[0] == "model"]
    section = override(named, own)["model"]  # names and values are checked before the weights are looked at
    return override({**named, "model": _agreed(weights, named["model"], section, own)}, settings)


SCHEDULED = ("process", "prediction", "solver", "grid")  # sections that a scheduler file is


def scheduled(
    config: Mapping[str, Any],
    scheduler: str | os.PathLike | Mapping[str, Any],
    settings: Sequence[tuple[str, Any]] = (),
) -> dict[str, Any]:
    """A configuration whose process, prediction, solver and grid are those of a scheduler file of diffusers.

    Args:
      config: with the user's settings. scheduler: the file, a folder that has it, or what it says.
      settings: the user's own, which stay; of them `grid.mu` and `grid.sigmas` are what a pipeline gives the scheduler.

    Raises:
      ValueError: no such file, or a class, key or value that is not taken.
    """
    said = scheduler if isinstance(scheduler, Mapping) else read_scheduler(scheduler)
    for key in ("model", "steps"):
        if key not in config:
            raise ValueError(f"config section {key} is missing; a scheduler file needs it")
    shape = getattr(make("model", config["model"]), "input_shape", None)
    own = [setting for setting in settings if setting[0].partition(".")[0] in SCHEDULED]
    given = {key: value for key, value in own if key in ("grid.mu", "grid.sigmas")}
    found = scheduler_sections(
        said, steps=config["steps"], shape=shape, mu=given.get("grid.mu"), sigmas=given.get("grid.sigmas")
    )
    return override({**config, **found}, own)


def pipeline_config(
    path: str | os.PathLike,
    settings: Sequence[tuple[str, Any]] = (),
    scheduler: str | os.PathLike | Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The configuration that a pipeline's folder is sampled with: its network, its scheduler, and the values that the
    pipeline itself takes where none are given.

    Args:
      path: a folder with a model_index.json, or a network's file, beside which `pipeline.vae` and
        `pipeline.text_encoder` (`_2`) are given (`difax.pipelines.single`).
      settings: the user's own, as `override` takes them; those of `pipeline` say what is asked of it
        (`difax.pipelines.section.KEYS`).
      scheduler: in place of the folder's, as `scheduled` takes it; the pipeline gives it what it gives its own.

    Raises:
      ValueError: no such folder, a pipeline or component of an unknown class, a size or setting that it cannot have.
    """
    own = checked_section({k.partition(".")[2]: v for k, v in settings if k.partition(".")[0] == "pipeline"})
    folder, recipe = open_pipeline(path, given_components(own))
    autoencoder = find_autoencoder(folder.component("vae")).model
    section = filled(folder, recipe, autoencoder, own)
    size, told = latent_size(recipe, autoencoder, section), dict(settings)
    network = os.fspath(folder.component(recipe.networks[0]))
    given = {key.removeprefix("model."): value for key, value in told.items() if key.startswith("model.")}
    found = recognise(network, recipe.model, **{"size": size, **recipe.geometry(folder, section), **given})
    scale = recipe.offset + check_alone("scale", told.get("scale", recipe.scale))
    guided = scale > 1 and not (recipe.prompts and _negative(folder, section, "scale" in told) is None)
    steps = told.get("steps", len(section["sigmas"]) if "sigmas" in section else recipe.steps)
    model = cast(Model, make("model", {"name": recipe.model, **found.geometry}))
    _check_decoder(folder, recipe, autoencoder, model)
    tokens = math.prod(size) // recipe.patch**2
    guide: dict[str, Any] = dict(recipe.guide) if guided else {"name": "none"}
    if guided and folder.settings.get("boundary_ratio") is not None and "scale_2" in section:
        guide |= {"boundary": folder.settings["boundary_ratio"], "scale_below": section["scale_2"]}
    config = override(
        {
            "model": {"name": recipe.model, **found.geometry, "dtype": given.get("dtype", _half_or_single(network))},
            **_scheduled_by(
                _own_scheduler(folder, section) if scheduler is None else scheduler,
                section.get("shift"),
                steps=check_alone("steps", steps),
                shape=model.input_shape,
                mu=None if recipe.mu is None or "shift" in section else recipe.mu(tokens, steps),
                sigmas=section.get("sigmas", recipe.sigmas),
            ),
            "steps": steps,
            "guide": guide,
            "scale": scale if guided else 1.0,
            "cache": {"name": "none"},
            "pipeline": section,
        },
        [(key, value) for key, value in settings if key.partition(".")[0] not in ("pipeline", "scale")],
    )
    return piped(config)


def _own_scheduler(folder: Folder, section: Mapping[str, Any]) -> pathlib.Path | Mapping[str, Any]:
    return folder.component("scheduler") if folder.scheduler is None else folder.scheduler(section)


def _scheduled_by(
    scheduler: str | os.PathLike | Mapping[str, Any], shift: float | None, **given: Any
) -> dict[str, Any]:
    """The sections that a pipeline's scheduler is; a refusal names the file."""
    if isinstance(scheduler, Mapping):
        return scheduler_sections(shifted(scheduler, shift), **given)
    said = shifted(read_scheduler(scheduler), shift)
    try:
        return scheduler_sections(said, **given)
    except ValueError as error:
        raise ValueError(f"{named(scheduler)}: {error}") from None


def first_frame_settings(path: str | os.PathLike) -> list[tuple[str, Any]]:
    """What an image adds to a pipeline's settings: a network with a time per token takes it as its first frame."""
    folder, recipe = open_pipeline(path)
    expands = recipe.frames and folder.settings.get("expand_timesteps") is True
    return [("model.first_frame", True)] if expands else []


def _check_decoder(folder: Folder, recipe: Recipe, autoencoder: Autoencoder, model: Model) -> None:
    """Refuses an autoencoder whose latents are not those of the denoiser."""
    place = folder.component("vae")
    if autoencoder.channels != model.input_shape[-1]:
        raise ValueError(
            f"{place}: an autoencoder of {autoencoder.channels} channels; allowed: {model.input_shape[-1]}, as "
            f"{model.name} has"
        )
    if bool(autoencoder.time) != bool(recipe.frames):
        what = "films" if recipe.frames else "pictures"
        raise ValueError(f"{place}: {autoencoder.name} is not of {what}; allowed: an autoencoder of {what}")


def piped(config: dict[str, Any], before: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A configuration whose cache has what its pipeline adds (`difax.pipelines.caches`); as it is without one.

    Args:
      before: that it was made of, perhaps by other steps: a shift that goes by these goes along, unless it is set.
    """
    if "pipeline" not in config:
        return config
    folder, recipe = open_pipeline(config["pipeline"]["folder"], given_components(config["pipeline"]))
    grid = config.get("grid", {})
    if before is not None and recipe.mu is not None and "mu" in grid and config["steps"] != before["steps"]:
        tokens = math.prod(config["model"]["size"]) // recipe.patch**2
        old, new = (recipe.mu(tokens, steps) for steps in (before["steps"], config["steps"]))
        if grid["mu"] == old:
            process = dict(config["process"])
            if process.get("shift") == math.exp(old):
                process["shift"] = math.exp(new)
            config = {**config, "grid": {**grid, "mu": new}, "process": process}
    cache = cache_section(config.get("cache", {"name": "none"}), folder, recipe, config["model"], config["steps"])
    return {**config, "cache": cache}


def _negative(folder: Folder, section: Mapping[str, Any], scaled: bool) -> str | None:
    """The negative prompt of a pipeline; None where it has none, and so no guidance by two evaluations."""
    own = prompting(folder.name, folder.settings).negative
    if folder.settings.get("is_distilled") is True:
        return None
    found = section.get("negative", own)
    if found is None and scaled:
        warnings.warn(
            f"{folder.name} is guided by a negative prompt alone; without --negative the scale does nothing",
            DifaxWarning,
            stacklevel=3,
        )
    return found


def _half_or_single(network: str) -> str:
    """The type that a network is computed in: float32 where it is stored so, else bfloat16."""
    types = {str(t) for t in tensor_types(network).values() if t is not None and t.kind not in "iub"}
    return "float32" if types <= {"float32", "float64"} else "bfloat16"


def _agreed(
    path: str, named: Mapping[str, Any], section: Mapping[str, Any], own: Sequence[tuple[str, Any]]
) -> dict[str, Any]:
    """The section `model` of a configuration with what a checkpoint knows in place of what it says.

    Args:
      named: the section as the configuration has it; section: with the user's settings; own: those.
    """
    here, told = make("model", section), {key.partition(".")[2]: value for key, value in own}
    if published_kind(path) is None:
        stored = stored_model(path)
    else:
        given = {k: v for k, v in told.items() if k in UNSTORED}
        found = recognise(path, fallback=settings_of(here), **without_preset(section["name"], given))
        stored = {
            "name": found.kind,
            **{k: v for k, v in found.geometry.items() if k not in found.assumed & named.keys()},
        }
    if stored is None:
        return dict(named)
    check_stored(path, stored, section, here)
    if stored["name"] not in REGISTRIES["model"]:
        return dict(named)
    knows, states = settings_of(make("model", stored)), settings_of(here)
    for key in named.keys() & knows.keys() & stored.keys() - set(FREE) - told.keys():
        if knows[key] != states[key]:
            raise ValueError(
                f"{path}: model.{key} is {knows[key]} in the checkpoint, {states[key]} by the configuration; "
                f"set model.{key} to choose"
            )
    kept = {k: v for k, v in stored.items() if k not in ("name", "dtype")}
    if section["name"] != named.get("name"):
        named = {"name": section["name"]}
    return {**named, **kept}


def checkpoint_config(path: str, settings: Sequence[tuple[str, Any]] = ()) -> dict[str, Any]:
    """The configuration that a checkpoint brings along, or that its kind is sampled with.

    Args:
      settings: that are made afterwards; of a published checkpoint those of the model tell what the file does not.

    Raises:
      ValueError: a checkpoint of no known kind, or one that says nothing of its model (difax's weights that another
        tool has written, or what an older `difax convert` wrote); the message says which configurations fit.
    """
    folder = pathlib.Path(path)
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file or folder")
    if is_run(path) and (folder / "config.json").is_file():
        return _whole(folder / "config.json", read_run(folder))
    kind = published_kind(path)
    if kind is not None:
        told = {key.removeprefix("model."): value for key, value in settings if key.startswith("model.")}
        size = {"size": load_config(PUBLISHED[kind])["model"]["size"]}
        given = without_preset(kind, {key: value for key, value in told.items() if key in UNSTORED})
        found = recognise(path, kind, fallback=size, **given)
        return _sampled_with(path, kind, found.geometry)
    if not is_run(path) and not is_converted(path) and read_metadata(path).get("config") is not None:
        return _whole(path, read_metadata(path)["config"])
    stored = stored_model(path)
    if stored is not None and stored["name"] in PUBLISHED:
        return _sampled_with(path, stored["name"], {k: v for k, v in stored.items() if k != "name"})
    raise ValueError(f"{path}: says nothing of its model; give its configuration by --config{_fitting(path)}")


def _whole(path: Any, config: Any) -> dict[str, Any]:
    if not isinstance(config, Mapping) or not isinstance(config.get("model"), Mapping):
        raise ValueError(f"{path}: the configuration there has no section model")
    return {k: v for k, v in config.items() if k != "mesh"}  # weights lie wherever they are read


def _sampled_with(path: str, kind: str, geometry: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that a published model is sampled with, of the geometry that its checkpoint has."""
    model = cast(Model, make("model", {"name": kind, **geometry}))
    name = PUBLISHED[kind]
    if kind == "flux" and "guidance" not in model.cond:
        name = "flux_schnell"
    if kind == "flux2" and "guidance" in model.cond:
        name = "flux2_klein:dev"
    if kind == "pixart" and model.cond["text"].shape[0] == 120:
        name = "pixart_alpha"
    if kind == "sd3" and geometry.get("variant") is not None:
        name = f"sd3:{geometry['variant']}"
    config = load_config(name)
    return {**config, "model": {"name": kind, **geometry, "dtype": config["model"]["dtype"]}}


def _fitting(path: str) -> str:
    """Which of difax's configurations have a model of the shapes of a file whose own one is lost, as words."""
    if is_run(path) or is_converted(path):
        return ""
    fit = []
    for name in config_names():
        model = make("model", load_config(name)["model"])
        spec = jax.tree.map(lambda a: a.shape, jax.eval_shape(model.init, jax.random.key(0)))
        spec = flatten_dict(spec, sep="/")
        if tensor_shapes(path, [{p: Source((p,)) for p in spec}]) == spec:
            fit.append(name)
    return f" (its tensors fit {', '.join(fit)})" if fit else " (its tensors fit none of those that difax brings along)"


def _order(setting: tuple[str, Any]) -> int:
    """Names of sections first, then what presets other keys."""
    return 0 if setting[0].endswith(".name") else 1 if setting[0] == "model.variant" else 2


def override(config: dict[str, Any], settings: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Applies dotted settings ("solver.eta", 0.5) to a copy of a configuration, names of sections first.

    Raises:
      ValueError: an unknown section or key (with the nearest match), or a value of another type.
    """
    check_config(config)
    config = {k: dict(v) if isinstance(v, Mapping) else v for k, v in config.items()}
    for path, value in sorted(settings, key=_order):
        section, _, key = path.partition(".")
        choose("config section", section, SECTIONS)
        if not key:
            if section not in ALONE:
                name = f"{section}.name={value}" if isinstance(value, str) and value else f"{section}.KEY=VALUE"
                raise ValueError(f"config section {section}={brief(value)}; it holds keys, allowed: {name}")
            config[section] = check_alone(section, value)
            continue
        if "." in key and section != "cache":  # of several caches together: cache.fora.interval
            raise ValueError(f"config key {path!r}: sections are one level deep")
        if not isinstance(config.setdefault(section, {}), dict):
            raise ValueError(f"config key {path!r}: {section} is a single value, set it by --config.{section}=")
        if key == "name":
            value = "none" if value is None else value  # as a command line's none is read
            if section not in REGISTRIES:
                raise ValueError(f"config key {path!r}: {section} has no name")
            for name in split_names(section, value):
                check_name(section, name)
            before = config[section].get("name")
            same = isinstance(value, str) and before == value
            config[section] = {**(config[section] if same else {}), "name": value}
        elif path == "model.variant" and config[section].get(key) != value:
            # which gives what the factory would else be told one by one
            preset = presets(config[section].get("name"))
            config[section] = {**{k: v for k, v in config[section].items() if k not in preset}, key: value}
        else:
            # `difax.registry.make` holds keys and values against the factory's signature when it is called
            config[section][key] = value
    return config


# single words for keys of sections, on the command line and in Python
SHORT = {
    "solver": "solver.name",
    "grid": "grid.name",
    "guide": "guide.name",
    "cache": "cache.name",
    "attend": "attend.name",
    "quant": "quant.name",
    "layout": "layout",
    "conditioning": "conditioning",
    "steps": "steps",
    "scale": "scale",
    "dtype": "model.dtype",
}


def keyword_settings(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Settings as Python's keywords give them, for `override`.

    Args:
      settings: {section: its name, a factory, what a factory made, or a mapping of its keys; "dtype" or a value that
        stands alone (steps, scale, ...): the value; "section.key": the value}.

    Raises:
      ValueError: no such section (with the nearest match).
    """
    found: list[tuple[str, Any]] = []
    for key, value in settings.items():
        section = key.partition(".")[0]
        choose("setting", section, dict.fromkeys((*SECTIONS, "dtype")))
        if isinstance(value, Mapping):
            found += [(f"{key}.{k}", v) for k, v in value.items()]
        elif key == "mesh":
            found += mesh_settings(check_value("mesh", value, str))
        elif "." in key or key in ALONE:
            found.append((key, value))
        else:
            found.append((SHORT.get(key, f"{key}.name"), value))
    return found


def mesh_settings(text: str) -> list[tuple[str, Any]]:
    """The axes of a mesh, "data=2,cfg=2,seq=4", as settings.

    Raises:
      ValueError: what is no axis, or no number.
    """
    settings = []
    for part in text.split(","):
        name, given, value = part.partition("=")
        choose("axis of --mesh", name.strip(), Axes._fields)
        if not given or not (value.strip().isascii() and value.strip().isdigit() and len(value) < 10):
            raise ValueError(f"--mesh {brief(text)}: {brief(part)}; allowed: {name.strip()}=N, N 1 or more")
        settings.append((f"mesh.{name.strip()}", int(value)))
    return settings


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON gives it back; what is no text is named by its own name."""
    return json.loads(json.dumps(config, default=shown))


def parse_value(text: str, key: str = "value") -> Any:
    """A Python literal (0.5, true, (1, 2), none, inf), or the text itself.

    Args:
      key: that a refusal names.

    Raises:
      ValueError: a literal that no configuration holds (a set, bytes, a complex number), or one nested too deeply.
    """
    words = {"true": True, "false": False, "none": None, "nan": math.nan, "inf": math.inf, "-inf": -math.inf}
    if text.lower() in words:
        return words[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    except (RecursionError, MemoryError):
        raise ValueError(f"{key}={brief(text)} is nested too deeply; allowed: {LITERALS}") from None
    if not _is_literal(value):
        raise ValueError(f"{key}={brief(value)}; allowed: {LITERALS}")
    return value


LITERALS = "numbers, texts, true, false, none, and lists and mappings of them"


def _is_literal(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_literal, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_literal(v) for k, v in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


def gin_settings(files: Sequence[str], bindings: Sequence[str]) -> tuple[str | None, list[tuple[str, Any]]]:
    """Reads gin files and bindings: `solver.name = "ddim"`, `train.steps = 40`, `config.base = "fmnist_dit"`.

    Every section is a gin configurable; the values that stand alone (`steps`, `scale`, `prediction`, `weights`) and
    the base configuration are parameters of `config`. Gin binds values here and nothing else: a file may include
    another one, but imports are refused.

    Returns:
      (base or None, dotted settings for `override`).

    Raises:
      ValueError: a file that cannot be read, a syntax error, an import, or an unknown configurable or parameter.
    """
    import gin

    def collect(**bound: Any) -> dict[str, Any]:
        return bound

    macros: dict[str, str] = {}  # name -> where it is bound
    text = ""
    for file in files:
        text += _check_gin(file, _gin_text(file), macros)
    for binding in bindings:
        text += _check_gin(f"--gin_param {brief(binding)}", binding, macros)
    for name, where in macros.items():
        if f"%{name}" not in text:
            near = f"config.{name}" if name in ALONE else f"{name}.KEY" if name in SECTIONS else "SECTION.KEY"
            raise ValueError(f"gin {where}: {name} binds nothing; allowed: {near} = VALUE, or a macro that is used")
    gin.clear_config()
    sections = {}
    with gin.unlock_config():
        for name in (*(s for s in SECTIONS if s not in ALONE), "config"):
            if name not in _configurables:
                _configurables[name] = gin.external_configurable(
                    lambda _name=name, **bound: collect(**bound), name=name, module="difax"
                )
            sections[name] = _configurables[name]
        try:
            gin.parse_config_files_and_bindings(list(files), list(bindings), finalize_config=False)
            bound = {name: function() for name, function in sections.items()}
        except Exception as error:
            raise ValueError(f"gin: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from None
        finally:
            gin.clear_config()
    top = bound.pop("config")
    base = top.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise ValueError(f"gin parameter config.base={brief(base)}; allowed: the name of a configuration")
    for key in top:
        choose("gin parameter of config", key, ("base", *ALONE))
    nested = [(f"{section}.{key}", value) for section, keys in bound.items() for key, value in keys.items()]
    return base, [*top.items(), *nested]


def _gin_text(file: str) -> str:
    path = pathlib.Path(file)
    if not _is_file(path):
        raise ValueError(f"gin file {file}: no such file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"gin file {file}: cannot be read ({error})") from None


def _check_gin(where: str, text: str, macros: dict[str, str], including: tuple[str, ...] = ()) -> str:
    """Refuses what gin would run beside binding values: imports, here and in the files that are included.

    Args:
      macros: to which the names that are bound alone are added, with where.

    Returns:
      The text, with that of the files that it includes.
    """
    from gin import config_parser
    from gin.config import ParserDelegate

    try:
        statements = list(config_parser.ConfigParser(text, ParserDelegate(skip_unknown=True)))
    except Exception as error:
        raise ValueError(f"gin {where}: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from None
    for statement in statements:
        if isinstance(statement, config_parser.ImportStatement):
            line = statement.location.line_num
            raise ValueError(
                f"gin {where}, line {line}: {statement.format()!r} runs code; allowed: values alone (name code of your "
                "own as SECTION.name = 'module:factory')"
            )
        if isinstance(statement, config_parser.IncludeStatement):
            if statement.filename in including or len(including) > 20:
                raise ValueError(f"gin {where}: {statement.filename!r} includes itself; allowed: files that do not")
            inner = _gin_text(statement.filename)
            text += _check_gin(statement.filename, inner, macros, (*including, statement.filename))
        elif isinstance(statement, config_parser.BindingStatement) and statement.scope:
            line = statement.location.line_num
            raise ValueError(
                f"gin {where}, line {line}: scope {statement.scope!r} binds nothing; allowed: SECTION.KEY = VALUE"
            )
        elif isinstance(statement, config_parser.BindingStatement) and not statement.arg_name:
            macros.setdefault(statement.selector, where)
    return text


_configurables: dict[str, Any] = {}
