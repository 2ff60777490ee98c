"""The section `cache` of a pipeline's run: its second network, and the numbers that are published for its model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from difax.accel.caches import published
from difax.pipelines.folder import Folder
from difax.pipelines.recipes import Recipe

# technique -> the arguments of which one is enough for it
NUMBERS = {"teacache": ("coefficients", "file"), "magcache": ("ratios", "file")}
BETWEEN = "+"  # the names of several caches
EXPERTS = "experts"  # not a cache: the pipeline's second network, which stays beside any


def cache_section(
    section: Mapping[str, Any], folder: Folder, recipe: Recipe, model: Mapping[str, Any], steps: int
) -> dict[str, Any]:
    """A section `cache` with what the pipeline adds: the network for weak noise (`experts`), and published numbers of
    TeaCache and MagCache where none are given and the model is one that has some.

    Args:
      model: the section of the denoiser. steps: of the run.
    """
    found = dict(section)
    if not isinstance(found.get("name"), str):
        return found
    names = [name.strip() for name in found["name"].split(BETWEEN)]
    for name in names:
        if name in NUMBERS:
            found |= _published(name, found, folder, model, steps)
    boundary = folder.settings.get("boundary_ratio")
    second = recipe.networks[1] if len(recipe.networks) > 1 else None
    if boundary is None or second is None or second not in folder.components or EXPERTS in names:
        return found
    weights = os.fspath(folder.component(second))
    rest = found["name"]
    if rest == "none":
        return {"name": EXPERTS, "boundary": float(boundary), "weights": weights}
    keys = {key if BETWEEN in rest else f"{rest}.{key}": value for key, value in found.items() if key != "name"}
    return {
        "name": f"{EXPERTS}{BETWEEN}{rest}",
        f"{EXPERTS}.boundary": float(boundary),
        f"{EXPERTS}.weights": weights,
        **keys,
    }


def _published(
    name: str, section: Mapping[str, Any], folder: Folder, model: Mapping[str, Any], steps: int
) -> dict[str, Any]:
    """The arguments that published numbers give a cache, as keys of the section; {} where there are none."""
    prefix = f"{name}." if BETWEEN in section["name"] else ""
    if any(f"{prefix}{key}" in section for key in NUMBERS[name]):
        return {}
    fit = fit_of(name, folder, model, steps)
    if fit is None:
        return {}
    return {f"{prefix}{k}": v for k, v in fit.arguments.items() if f"{prefix}{k}" not in section}


def fit_of(name: str, folder: Folder, model: Mapping[str, Any], steps: int) -> published.Fit | None:
    """What is published for a cache of the model that a folder holds, by its name or else by its geometry."""
    said = folder.config("transformer").get("_name_or_path")
    blocks = tuple(model[key] for key in ("depth", "double_depth", "single_depth") if isinstance(model.get(key), int))
    geometry = {"pipeline": folder.name, "width": model.get("width"), "blocks": blocks}
    geometry["guidance"] = model.get("guidance_embedding")
    names = [os.fspath(folder.path.absolute()), *([said] if isinstance(said, str) else [])]
    found = published.model_of(names, geometry)
    return None if found is None else published.published(name, found, steps)
