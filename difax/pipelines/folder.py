"""A pipeline's folder as diffusers saves it: model_index.json, and a folder for each component."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from difax.core.annotations import choose
from difax.core.files import named, place_of, read_object

INDEX = "model_index.json"
OTHER = "modular_model_index.json"  # of a folder whose pipeline is written down in code


class Folder(NamedTuple):
    """A pipeline on disk, before any weight is read.

    path: of the folder. name: the pipeline's class. components: {name: class}, of those that it has. settings: what
    else its index says (`boundary_ratio`, `is_distilled`, ...). given: {component: path} of those that lie elsewhere.
    scheduler: of a network's file without a folder: section `pipeline` -> what its scheduler_config.json would say.
    """

    path: pathlib.Path
    name: str
    components: Mapping[str, str]
    settings: Mapping[str, Any]
    given: Mapping[str, str] = {}
    scheduler: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None

    def component(self, name: str) -> pathlib.Path:
        """The folder (or the file) of a component.

        Raises:
          ValueError: the pipeline has none of that name, or it is not there.
        """
        if name in self.given:
            place = pathlib.Path(self.given[name])
        elif name in self.components:
            place = self.path / name
        else:
            raise ValueError(
                f"{named(self.path)}: {self.name} has no {name} here; allowed: {', '.join(self.components)}"
            )
        if place_of(place) is None:
            raise ValueError(f"{named(place)}: no such file or folder; {INDEX} names {name}")
        return place

    def config(self, name: str) -> dict[str, Any]:
        """What the config.json of a component says; {} where there is none.

        Raises:
          ValueError: a damaged file.
        """
        place = self.component(name)
        file = (place if place.is_dir() else place.parent) / "config.json"
        return read_object(file, f"the config.json of {name}") if place_of(file) == "file" else {}


def is_pipeline(path: str | os.PathLike) -> bool:
    """Whether a folder is a pipeline's."""
    return os.path.isdir(path) and any(os.path.lexists(os.path.join(path, name)) for name in (INDEX, OTHER))


def open_folder(path: str | os.PathLike, known: Mapping[str, Any], given: Mapping[str, str] | None = None) -> Folder:
    """Reads the index of a pipeline's folder.

    Args:
      known: pipelines by class. given: components that lie elsewhere.

    Raises:
      ValueError: no folder, no model_index.json, a damaged one, or a pipeline that is not known (the nearest is named).
    """
    place = pathlib.Path(path)
    if place_of(place) != "folder":
        raise ValueError(f"pipeline {named(path)}: no such folder; allowed: one with a {INDEX}")
    if place_of(place / INDEX) is None:
        modular = f" ({OTHER} is of a pipeline in code)" if place_of(place / OTHER) else ""
        raise ValueError(f"pipeline {named(path)}: no {INDEX} in it{modular}; allowed: a folder as diffusers saves it")
    index = read_object(place / INDEX, "the index of a pipeline", _class_name=str)
    components, settings = {}, {}
    for key, value in index.items():
        if isinstance(value, list) and len(value) == 2 and not key.startswith("_"):
            if isinstance(value[1], str):
                components[key] = str(value[1])
        elif not key.startswith("_"):
            settings[key] = value
    name = choose(f"pipeline of {named(path)}", str(index["_class_name"]), known)
    for key in given or {}:
        choose("component", key, dict.fromkeys((*components, *(k for k in index if not k.startswith("_")))))
    return Folder(place, name, {**components, **dict.fromkeys(given or {}, "")}, settings, dict(given or {}))
