"""The section `pipeline` of a configuration: what is asked of a pipeline, filled up with its own values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from difax.core.annotations import brief, check_value, choose
from difax.core.contracts import Autoencoder
from difax.pipelines.folder import Folder
from difax.pipelines.recipes import Recipe

COMPONENTS = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")  # that may lie elsewhere
KEYS: dict[str, Any] = {
    "folder": str,
    "height": int | None,
    "width": int | None,
    "frames": int | None,
    "fps": float | None,
    "negative": str | None,
    "guidance": float | None,
    "scale_2": float | None,
    "tokens": int | None,
    "shift": float | None,
    "sigmas": Sequence[float] | None,
    "tile": int | None,
    "preview": str | None,
    "embeddings": str | None,
    **dict.fromkeys(COMPONENTS, str | None),
}
WORDS = {
    "height": "of the picture in pixels",
    "width": "of the picture in pixels",
    "frames": "of the film",
    "fps": "frames of a second of the film",
    "negative": "prompt of the unconditional half",
    "guidance": "scale that the network takes as an input",
    "scale_2": "guidance scale of the network for weak noise, of pipelines with two",
    "tokens": "of the longest prompt",
    "shift": "of the flow's times",
    "sigmas": "of the flow before the shift, one for each step",
    "tile": "side of what is decoded and encoded at once, in pixels; none takes all of a picture",
    "preview": "a small autoencoder (AutoencoderTiny) that previews are decoded by; none takes the pipeline's",
    "embeddings": "folder in which embeddings are kept by their prompts",
    "vae": "elsewhere than in the folder",
    "text_encoder": "elsewhere than in the folder",
}
OVERLAP = 4  # a tile shares one part in so many of its side with the next
MOST_SIDE, MOST_FRAMES, MOST_TOKENS = 2**15, 2**14, 2**14


def checked(section: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a section, each of its type; ValueError for an unknown one or another type."""
    for key in section:
        choose("config key of pipeline", key, KEYS)
    return {key: check_value(f"pipeline.{key}", value, KEYS[key]) for key, value in section.items()}


def given_components(section: Mapping[str, Any]) -> dict[str, str]:
    """{component: path} of those that a section says to lie elsewhere."""
    return {name: section[name] for name in COMPONENTS if section.get(name)}


def filled(folder: Folder, recipe: Recipe, autoencoder: Autoencoder, section: Mapping[str, Any]) -> dict[str, Any]:
    """A section with the pipeline's own values where none is given.

    Args:
      section: `checked`.

    Raises:
      ValueError: a size that is no multiple of a token's, frames that the autoencoder cannot make, and settings that
        this pipeline does not have.
    """
    given = {key: value for key, value in section.items() if value is not None}
    height, width = _sides(folder, recipe, autoencoder.side, given)
    found: dict[str, Any] = {**given, "folder": str(folder.path), "height": height, "width": width}
    _check_counts(folder, recipe, given)
    if "tile" in given and given["tile"] % (OVERLAP * autoencoder.side):
        least = OVERLAP * autoencoder.side
        near = max(round(given["tile"] / least), 1) * least
        raise ValueError(f"pipeline.tile={given['tile']}; allowed: multiples of {least}, such as {near}")
    if recipe.frames:
        found["frames"] = frames = given.get("frames", recipe.frames)
        found["fps"] = float(given.get("fps", recipe.fps))
        step = autoencoder.time
        if (frames - 1) % step:
            raise ValueError(
                f"frames={frames}; allowed: 1 and multiples of {step} more, such as {frames // step * step + 1}"
            )
    if recipe.prompts:
        found["tokens"] = given.get("tokens", recipe.prompts)
    if recipe.guidance is not None:
        found["guidance"] = float(given.get("guidance", recipe.guidance))
    return found


def latent_size(recipe: Recipe, autoencoder: Autoencoder, section: Mapping[str, Any]) -> tuple[int, ...]:
    """The latents' (height, width), of a film (frames, height, width)."""
    sides = section["height"] // autoencoder.side, section["width"] // autoencoder.side
    return sides if not recipe.frames else ((section["frames"] - 1) // autoencoder.time + 1, *sides)


def _sides(folder: Folder, recipe: Recipe, side: int, given: Mapping[str, Any]) -> tuple[int, int]:
    own = (0, 0) if {"height", "width"} <= given.keys() else recipe.side(folder, side)
    sides = given.get("height", own[0]), given.get("width", own[1])
    multiple = side * recipe.patch
    for key, value in zip(("height", "width"), sides, strict=True):
        if not 0 < value <= MOST_SIDE or value % multiple:
            near = max(min(round(value / multiple), MOST_SIDE // multiple), 1) * multiple
            raise ValueError(f"{key}={value}; allowed: multiples of {multiple} up to {MOST_SIDE}, such as {near}")
    return sides


def _check_counts(folder: Folder, recipe: Recipe, given: Mapping[str, Any]) -> None:
    """Refuses settings that the pipeline does not have, and numbers out of range."""
    without = {
        "frames": not recipe.frames,
        "fps": not recipe.frames,
        "negative": not recipe.prompts,
        "tokens": not recipe.prompts,
        "guidance": recipe.guidance is None,
        "scale_2": folder.settings.get("boundary_ratio") is None,
    }
    for key in without.keys() & given.keys():
        if without[key]:
            raise ValueError(f"pipeline.{key}={brief(given[key])}: {folder.name} has no {key}; allowed: without it")
    for key, most in (("frames", MOST_FRAMES), ("tokens", MOST_TOKENS), ("tile", MOST_SIDE)):
        if key in given and not 1 <= given[key] <= most:
            raise ValueError(f"pipeline.{key}={given[key]}; allowed: 1 ... {most}")
    if "fps" in given and not 1 <= given["fps"] <= 120:
        raise ValueError(f"pipeline.fps={given['fps']}; allowed: 1 ... 120")
    if "shift" in given and not 0 < given["shift"] <= 1000:
        raise ValueError(f"pipeline.shift={given['shift']}; allowed: above 0, up to 1000")


def shifted(scheduler: Mapping[str, Any], shift: float | None) -> dict[str, Any]:
    """What a scheduler's file says with another shift of the flow's times; as it is for None.

    Raises:
      ValueError: a scheduler that has no shift.
    """
    found = dict(scheduler)
    if shift is None:
        return found
    key = "flow_shift" if "flow_shift" in found or "prediction_type" in found else "shift"
    flow = key == "shift" or found.get("use_flow_sigmas")
    if not flow:
        raise ValueError(f"pipeline.shift={shift}: {found.get('_class_name')} is of no flow; allowed: without it")
    return found | {key: shift, "use_dynamic_shifting": False}
