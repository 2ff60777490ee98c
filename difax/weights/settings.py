"""What the config.json beside a published checkpoint may say: one `Setting` a key, checked before a weight is read.

Keys that are not listed are of no account: files carry entries of other versions and programs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict

from difax.core.contracts import Params
from difax.weights.checkpoint import Source
from difax.weights.published import Table, read_config


class Setting(NamedTuple):
    """Which values a key may have.

    allowed: in words. fits(value) -> bool.
    """

    allowed: str
    fits: Callable[[Any], bool]


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def whole(least: int = 1) -> Setting:
    """A whole number, `least` or more."""
    return Setting(f"a whole number, {least} or more", lambda value: _is_whole(value, least))


def number(least: float = 0.0, open_end: bool = True, most: float = math.inf) -> Setting:
    """A finite number above `least`, or from it on where the end is not open, up to `most`."""

    def fits(value: Any) -> bool:
        given = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return given and (value > least if open_end else value >= least) and value <= most

    return Setting(f"a number, {'>' if open_end else '>='} {least:g}{f', up to {most:g}' * (most < math.inf)}", fits)


def one_of(*values: Any, but: str = "") -> Setting:
    """One of these values. but: what the others would stand for, for the message."""
    shown = [v if isinstance(v, str) else json.dumps(v) for v in values]
    same = lambda value: any(type(value) is type(v) and value == v for v in values)  # noqa: E731
    return Setting(" or ".join(shown) + (f" ({but})" if but else ""), same)


def flag() -> Setting:
    """true or false, or null, which the classes take for false and which the tensors then decide."""
    return optional(one_of(True, False))


def optional(setting: Setting) -> Setting:
    """As a setting says, or null, which is the same as no key."""
    return Setting(f"{setting.allowed}, or null", lambda value: value is None or setting.fits(value))


def any_number() -> Setting:
    """A finite number."""
    return Setting("a number", number(-math.inf).fits)


def listed(setting: Setting) -> Setting:
    """A list of any length of values of a setting."""
    fits = lambda value: isinstance(value, list) and all(map(setting.fits, value))  # noqa: E731
    return Setting(f"a list, each {setting.allowed}", fits)


def either(*settings: Setting) -> Setting:
    """What one of these allows."""
    return Setting(" or ".join(s.allowed for s in settings), lambda value: any(s.fits(value) for s in settings))


def several(count: int, setting: Setting) -> Setting:
    """A list of `count` values of a setting."""
    fits = lambda value: isinstance(value, list) and len(value) == count and all(map(setting.fits, value))  # noqa: E731
    return Setting(f"a list of {count}, each {setting.allowed}", fits)


def read_settings(
    path: str | os.PathLike,
    classes: Sequence[str],
    settings: Mapping[str, Setting],
    defaults: Mapping[str, Any] = {},
) -> tuple[Path, dict[str, Any]]:
    """The entries of a checkpoint's config.json whose keys have a setting, those that are null left out.

    Args:
      classes: the values of _class_name that the file may have.
      defaults: {key: what it stands for where the file leaves it out}, of the keys that no tensor tells.

    Returns:
      (the file, {key: value}): none where there is no file, or one of some other program.

    Raises:
      ValueError: a file that is no JSON object, of another class, or a value that is not allowed (file, key, value).
    """
    file, config = read_config(path, {"_class_name": tuple(classes)})
    for name, setting in settings.items():
        if name in config and not setting.fits(config[name]):
            raise ValueError(f"{file}: {name}={config[name]!r}; allowed: {setting.allowed}")
    said = {name: config[name] for name in settings if config.get(name) is not None}
    return file, {**defaults, **said} if config else said


def check_agrees(file: Path, config: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises ValueError for a key of config.json that says something else than the checkpoint's tensors.

    Args:
      found: {key of config.json: what the tensors say}.
    """
    for name, value in found.items():
        if name in config and config[name] != value:
            allowed = "null" if value is None else repr(value)
            raise ValueError(f"{file}: {name}={config[name]!r}; allowed: {allowed}, as the checkpoint's tensors say")


def check_head_width(file: Path, config: Mapping[str, Any], heads: str, head_width: str, width: int) -> None:
    """Raises ValueError where heads times head width is not the width of the checkpoint."""
    if heads in config and head_width in config and config[heads] * config[head_width] != width:
        raise ValueError(
            f"{file}: {heads}={config[heads]} times {head_width}={config[head_width]}; allowed: {width}, the width of "
            "the checkpoint's tensors"
        )


def stored_heads(
    file: Path, config: Mapping[str, Any], heads: str, head_width: str, width: int, default: int
) -> dict[str, int]:
    """{"heads": their number} by a config.json: as it says, or by the width of one, given or of the class.

    Args:
      heads, head_width: the keys of both. width: of the checkpoint's tensors. default: of one head, of the class.

    Returns:
      Nothing where there is no config.json, or the class's heads do not make up the width.

    Raises:
      ValueError: heads times head width is not the width.
    """
    check_head_width(file, config, heads, head_width, width)
    if heads in config or not config:
        return {"heads": config[heads]} if config else {}
    one = config.get(head_width, default)
    return {} if width % one else {"heads": width // one}


def rows_of(table: Table, spec: Params) -> dict[str, Source]:
    """The rows of a layout table that a model's parameters need: a layer may lack its bias, a block its norm."""
    wanted = flatten_dict(spec, sep="/")
    return {path: source for path, source in table.items() if path in wanted}
