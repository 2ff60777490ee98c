"""Scheduler files of diffusers, read: their class, and every key of it, checked."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from difax.core.annotations import brief, choose
from difax.core.files import parse_json, read_text
from difax.weights.scheduler.keys import CLASSES, INERT, LISTS, REFUSED, STORED, TEXTS, Keys

Sections = dict[str, Any]
FILE = "scheduler_config.json"


def read_scheduler(path: str | os.PathLike) -> dict[str, Any]:
    """A scheduler file: itself, its folder, or a pipeline's folder with scheduler/scheduler_config.json.

    Raises:
      ValueError: no such file, or what is no JSON object.
    """
    place = pathlib.Path(path)
    tried = [place / "scheduler" / FILE, place / FILE] if place.is_dir() else [place]
    found = next((p for p in tried if p.is_file()), None)
    if found is None:
        raise ValueError(f"scheduler {brief(os.fspath(path))}: no such file; allowed: a {FILE}, or a folder with one")
    config = parse_json(read_text(found), f"scheduler {found}", "a JSON object of keys", finite=False)
    if not isinstance(config, dict):
        raise ValueError(f"scheduler {found}: {brief(config)}; allowed: a JSON object of keys")
    return config


class Case:
    """One scheduler file: its class, all keys of that class, and what a pipeline adds."""

    def __init__(
        self,
        name: str,
        keys: Keys,
        steps: int,
        shape: tuple[int, ...] | None = None,
        mu: float | None = None,
        sigmas: str | Sequence[float] | None = None,
    ):
        self.name, self.keys, self.steps, self.shape, self.mu, self.sigmas = name, keys, steps, shape, mu, sigmas

    def __getitem__(self, key: str) -> Any:
        return self.keys[key]

    def get(self, key: str, otherwise: Any = None) -> Any:
        return self.keys.get(key, otherwise)

    def refuse(self, key: str, why: str) -> ValueError:
        return ValueError(f"scheduler {self.name}: {key}={brief(self.keys[key])}; {why}")

    def only(self, key: str, values: Mapping[Any, Any] | Collection[Any], why: str = "") -> Any:
        """The value of a key, or what `values` maps it to; refused with what is allowed where it is none of them."""
        if self.keys[key] not in values:
            allowed = ", ".join(map(str, values))
            raise self.refuse(key, (why and f"{why}; ") + f"allowed: {allowed}")
        return values[self.keys[key]] if isinstance(values, Mapping) else self.keys[key]


def scheduler_keys(config: Mapping[str, Any]) -> tuple[str, Keys]:
    """The class of a scheduler file and all of its keys, those that the file leaves out at diffusers' default.

    Keys of other classes of diffusers are passed over, as diffusers does: files carry them from conversions.

    Raises:
      ValueError: an unknown class or one that is not taken, an unknown key, a value of another type.
    """
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(f"scheduler: _class_name={brief(name)}; allowed: {', '.join(CLASSES)}")
    if name in REFUSED:
        raise ValueError(f"scheduler {name} is not taken: {REFUSED[name]}; allowed: {', '.join(CLASSES)}")
    own = CLASSES[choose("scheduler class", name, CLASSES)]
    known = dict.fromkeys((*own, *STORED, *(key for keys in CLASSES.values() for key in keys)))
    for key in config:
        choose(f"key of scheduler {name}", key, known)
    read = {key: value for key, value in config.items() if key in own and key not in INERT.get(name, ())}
    return name, {**own, **{key: _checked(name, key, value, own[key]) for key, value in read.items()}}


def _checked(name: str, key: str, value: Any, default: Any) -> Any:
    """A value as the type of diffusers' own default; refused if it is of another."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    finite = number and (math.isfinite(value) or default in (math.inf, -math.inf))
    if key in TEXTS:
        good, allowed = value in TEXTS[key], ", ".join(TEXTS[key])
    elif key in LISTS:
        types = (int, float) if default is None else (int,)
        numbers = isinstance(value, list) and all(type(v) in types and math.isfinite(v) for v in value)
        good, allowed = numbers or value is default is None, "a list of numbers"
    elif isinstance(default, bool):
        good, allowed = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        good, allowed = number and abs(value) < 2**31 and value == int(value), "a whole number"
    elif isinstance(default, float):
        good, allowed = finite, "a number"
    elif isinstance(default, str):
        good, allowed = isinstance(value, str), "a text"
    else:  # None by default: a number, a text, or what only None is taken of
        good, allowed = value is None or finite or isinstance(value, str), "a number, a text or null"
    if not good:
        raise ValueError(f"scheduler {name}: {key}={brief(value)}; allowed: {allowed}")
    known: Any = value
    whole = isinstance(default, int) and not isinstance(default, bool)
    return int(known) if whole else float(known) if isinstance(default, float) else known
