"""Configurations: `get_config(arg)` files of ml_collections, overrides, and the same from gin bindings.

A configuration is a dictionary of sections; a section with a "name" is one entry of a registry and its other keys are
that factory's hyperparameters. Setting another name drops the old hyperparameters.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from difax.build import SECTIONS, UNSTORED, recognise, recognised_kind, split_names
from difax.registry import REGISTRIES, check_name, choose, shown
from difax.training.train import read_run
from difax.weights.checkpoint import read_metadata
from difax.weights.convert import is_converted
from difax.weights.published import Foreign

# the configuration that a published checkpoint is sampled with where none is named
PUBLISHED = {"dit": "dit_imagenet", "flux": "flux_dev", "pixart": "pixart_sigma", "wan": "wan2_1"}
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
      ValueError: unknown name, missing file, a file without get_config, or what get_config refuses.
    """
    name, _, arg = where.partition(":")
    path = pathlib.Path(name)
    if path.suffix == ".py" or len(path.parts) > 1:
        if not path.is_file():
            raise ValueError(f"config {name}: no such file")
    else:
        path = FOLDER / f"{choose('config', name, config_names())}.py"
    if path.resolve().parent == FOLDER.resolve():
        module = importlib.import_module(f"difax.configs.{path.stem}")
    else:
        spec = importlib.util.spec_from_file_location(f"difax_config_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ValueError(f"config {name}: {type(error).__name__}: {error}") from None
    if not hasattr(module, "get_config"):
        raise ValueError(f"config {name}: the file defines no get_config()")
    config = module.get_config(arg) if arg else module.get_config()
    return config.to_dict()


def checkpoint_config(path: str, settings: Sequence[tuple[str, Any]] = ()) -> dict[str, Any]:
    """The configuration that a checkpoint brings along, or that its kind is sampled with.

    Args:
      settings: that are made afterwards; of a published checkpoint those of the model tell what the file does not.

    Raises:
      ValueError: a checkpoint of no known kind, or one that says nothing of its model (what `difax convert` writes).
    """
    folder = pathlib.Path(path)
    if (folder / "checkpoints").is_dir():
        return read_run(folder)
    if not folder.exists():
        raise ValueError(f"{path}: no such file or folder")
    metadata = {} if is_converted(path) else read_metadata(path)
    if is_converted(path) or (metadata and "config" not in metadata):
        raise ValueError(f"{path}: says nothing of its model; give its configuration, and this as the weights")
    if metadata:
        return metadata["config"]
    told = {key.removeprefix("model."): value for key, value in settings if key.startswith("model.")}
    kind, found = published(path, {key: value for key, value in told.items() if key in UNSTORED})
    name = PUBLISHED[kind]
    if kind == "flux" and not found.geometry["guidance_embedding"]:
        name = "flux_schnell"
    if kind == "pixart" and found.model.cond["text"].shape[0] == 120:
        name = "pixart_alpha"
    config = load_config(name)
    return {**config, "model": {"name": kind, **found.geometry, "dtype": config["model"]["dtype"]}}


def published(path: str, told: Mapping[str, Any]) -> tuple[str, Foreign]:
    """The kind of a published checkpoint and what is known of it; a size that neither it nor the caller tells is that
    of the configuration of its kind."""
    kind = recognised_kind(path)
    try:
        return kind, recognise(path, kind, **told)
    except ValueError:
        if "size" in told:
            raise
        return kind, recognise(path, kind, **{"size": load_config(PUBLISHED[kind])["model"]["size"], **told})


def override(config: dict[str, Any], settings: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Applies dotted settings ("solver.eta", 0.5) to a copy of a configuration, names of sections first.

    Raises:
      ValueError: an unknown section or key (with the nearest match), or a value of another type.
    """
    config = {k: dict(v) if isinstance(v, dict) else v for k, v in config.items()}
    for path, value in sorted(settings, key=lambda s: not s[0].endswith(".name")):
        section, _, key = path.partition(".")
        choose("config section", section, SECTIONS)
        if not key:
            config[section] = _typed(path, value, config.get(section))
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
        else:
            # keys of a registry entry are checked against the factory's signature when it is called
            config[section][key] = _typed(path, value, config[section].get(key))
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
        elif "." in key or key in SCALARS:
            found.append((key, value))
        else:
            found.append((SHORT.get(key, f"{key}.name"), value))
    return found


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON gives it back; what is no text is named by its own name."""
    return json.loads(json.dumps(config, default=shown))


def parse_value(text: str) -> Any:
    """A Python literal (0.5, true, (1, 2), none), or the text itself."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def gin_settings(files: Sequence[str], bindings: Sequence[str]) -> tuple[str | None, list[tuple[str, Any]]]:
    """Reads gin files and bindings: `solver.name = "ddim"`, `train.steps = 40`, `config.base = "fmnist_dit"`.

    Every section is a gin configurable; the values that stand alone (`steps`, `scale`, `prediction`, `weights`) and
    the base configuration are parameters of `config`.

    Returns:
      (base or None, dotted settings for `override`).

    Raises:
      ValueError: a missing file, a syntax error, or an unknown configurable or parameter.
    """
    import gin

    def collect(**bound: Any) -> dict[str, Any]:
        return bound

    for file in files:
        if not pathlib.Path(file).is_file():
            raise ValueError(f"gin file {file}: no such file")
    gin.clear_config()
    sections = {}
    with gin.unlock_config():
        for name in (*(s for s in SECTIONS if s not in SCALARS), "config"):
            if name not in _configurables:
                _configurables[name] = gin.external_configurable(
                    lambda _name=name, **bound: collect(**bound), name=name, module="difax"
                )
            sections[name] = _configurables[name]
        try:
            gin.parse_config_files_and_bindings(list(files), list(bindings), finalize_config=False)
        except Exception as error:
            raise ValueError(f"gin: {str(error).strip().splitlines()[0]}") from None
        bound = {name: function() for name, function in sections.items()}
    gin.clear_config()
    top = bound.pop("config")
    base = top.pop("base", None)
    for key in top:
        choose("gin parameter of config", key, ("base", *SCALARS))
    nested = [(f"{section}.{key}", value) for section, keys in bound.items() for key, value in keys.items()]
    return base, [*top.items(), *nested]


SCALARS = ("prediction", "steps", "scale", "weights", "layout", "conditioning")
_configurables: dict[str, Any] = {}


def _typed(path: str, value: Any, before: Any) -> Any:
    if before is None or value is None:
        return value
    if isinstance(before, bool) != isinstance(value, bool):
        raise ValueError(f"config key {path}={value!r}; it is {type(before).__name__} ({before!r})")
    if isinstance(before, float) and isinstance(value, int):
        return float(value)
    if isinstance(before, (int, float, str)) and not isinstance(value, type(before)):
        raise ValueError(f"config key {path}={value!r}; it is {type(before).__name__} ({before!r})")
    return value
