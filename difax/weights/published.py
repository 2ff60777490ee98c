"""The published checkpoints of an architecture: what their files tell before a weight is read.

A `models/*_checkpoint.py` is one table a layout and a `find_*` that makes a `Foreign` of a file, with the pieces here.
The weights are then read (`load_foreign`) or streamed (`opened_parameters`, for `difax.weights.convert`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from difax.core.contracts import Params
from difax.weights.checkpoint import (
    Layers,
    Source,
    Streamed,
    load_safetensors,
    nearest,
    network_prefix,
    opened_safetensors,
)

Table = Mapping[str, Source]
Shapes = Mapping[str, tuple[int, ...]]


class Foreign(NamedTuple):
    """What is known of another project's checkpoint before its weights are read: the model and the layout table.

    table, layers, constants: as `difax.weights.checkpoint.load_safetensors` takes them.
    geometry: the arguments that the model's factory was called with.
    kind: the model's name in `difax.models.MODELS`, or "" before it is known.
    assumed: keys of the geometry that neither the file nor the caller tells: the factory's defaults.
    ignored: regular expression of names of which the file may have more than the table.
    """

    model: Any
    table: Table
    layers: Layers
    constants: Mapping[str, np.ndarray | None] = {}
    geometry: Mapping[str, Any] = {}
    kind: str = ""
    assumed: frozenset[str] = frozenset()
    ignored: str | None = None

    @property
    def spec(self) -> Params:
        """Shapes of the model's parameters."""
        return jax.eval_shape(self.model.init, jax.random.key(0))


class Untold(ValueError):
    """An argument of the model's factory, `name`, that neither a checkpoint nor the caller gives."""

    def __init__(self, message: str, name: str):
        super().__init__(message)
        self.name = name


class Published(NamedTuple):
    """The checkpoints of one architecture.

    find(path, layout=None, **geometry) -> `Foreign`; tables: {layout: table}, by whose names a file is recognised;
    classes: the values of _class_name that the config.json beside a file may have.
    """

    find: Callable[..., Foreign]
    tables: Mapping[str, Table]
    classes: tuple[str, ...] = ()

    def known(self, names: Iterable[str]) -> int:
        """How many tensors of a file have a place in the best of the layouts, behind whatever prefix."""
        names = list(names)
        return max(known(table, names) for table in self.tables.values())


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Within it a refusal that does not name the checkpoint, such as one of a model's factory, begins with its path."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, Untold) or os.fspath(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from None


def load_foreign(path: str | os.PathLike, found: Foreign, dtype: Any = None, shardings: Params | None = None) -> Params:
    """`difax.weights.checkpoint.load_safetensors` for a checkpoint that has been looked at."""
    return load_safetensors(
        path, found.spec, found.table, found.layers, found.constants, dtype, shardings, found.ignored
    )


@contextlib.contextmanager
def opened_parameters(
    path: str | os.PathLike, found: Foreign, dtype: Any = None, each: bool = False
) -> Iterator[dict[str, Streamed]]:
    """The parameters of a checkpoint by path, checked as `load_safetensors` does and not read yet.

    Args:
      each: without a dtype, every parameter has its own, and not all of them one.
    """
    with opened_safetensors(
        path, found.spec, found.table, found.layers, found.constants, dtype, each, ignored=found.ignored
    ) as parameters:
        yield parameters


def known(table: Table, names: Iterable[str]) -> int:
    """How many names have a place in a table, whatever the numbers in them and whatever prefix they share."""
    return network_prefix(names, (key for source in table.values() for key in source.keys))[0]


def dense(path: str, *keys: str, **more: Any) -> dict[str, Source]:
    """The rows of one dense layer, whose kernels other projects store as [out, in]."""
    weights, biases = tuple(f"{k}.weight" for k in keys), tuple(f"{k}.bias" for k in keys)
    return {f"{path}/kernel": Source(weights, (1, 0), **more), f"{path}/bias": Source(biases, None, **more)}


def check_arguments(function: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raises ValueError for an argument that a `find_*` does not know."""
    allowed = sorted(allowed)
    for name in given:
        if name not in allowed:
            raise ValueError(
                f"{function}: unknown argument {name!r}; nearest: {nearest(name, allowed)!r}; "
                f"allowed: {', '.join(allowed)}"
            )


def choose_layout(path: Any, what: str, tables: Mapping[str, Table], shapes: Shapes, layout: str | None = None) -> str:
    """The layout that was asked for, or the one that knows most of the file's tensors.

    Args:
      what: the architecture, with its article, for the message. tables: {layout: table}.

    Raises:
      ValueError: an unknown layout, difax's own file, or one without a single tensor of the tables.
    """
    if layout is not None:
        if layout not in tables:
            raise ValueError(
                f"unknown layout {layout!r}; allowed: {', '.join(tables)}; nearest: {nearest(layout, tables)!r}"
            )
        return layout
    if any(name in shapes for table in tables.values() for name in table):
        raise ValueError(f"{path}: difax's own layout; read it with difax.weights.checkpoint.load_native")
    best = max(tables, key=lambda name: known(tables[name], shapes))
    if not known(tables[best], shapes):
        raise ValueError(
            f"{path}: no tensor of {what} in the layouts {', '.join(tables)}; "
            f"the file's first tensors: {', '.join(sorted(shapes)[:3]) or 'none'}"
        )
    return best


def stored_shape(path: Any, table: Table, shapes: Shapes) -> Callable[..., tuple[int, ...]]:
    """(parameter, rank=2) -> the shape of its first tensor in the file, of layer 0.

    The function raises ValueError for a tensor that is missing or of another rank.
    """

    def shape(parameter: str, rank: int = 2) -> tuple[int, ...]:
        name = re.sub(r"\{\w+\}", "0", table[parameter].keys[0])
        if name not in shapes:
            raise ValueError(
                f"{path}: tensor {name!r} (for {parameter}) is missing; nearest in the file: {nearest(name, shapes)!r}"
            )
        if len(shapes[name]) != rank or 0 in shapes[name]:
            raise ValueError(
                f"{path}: tensor {name!r} has the wrong shape {shapes[name]}; expected {rank} axes, none of them empty"
            )
        return shapes[name]

    return shape


def stored_depth(table: Table, shapes: Shapes, parameter: str) -> int:
    """Layers of the file, by the largest number in the place of a parameter's placeholder; 1 if there is none, and no
    more than the file has tensors (a number that is missing among them is then named as missing)."""
    prefix = table[parameter].keys[0].partition("{")[0]
    layer = re.compile(re.escape(prefix) + r"(\d{1,9})\.")
    return min(1 + max((int(m[1]) for m in map(layer.match, shapes) if m), default=0), max(len(shapes), 1))


def check_known(path: Any, fields: Mapping[str, Any], what: Mapping[str, str], hints: Mapping[str, str] = {}) -> None:
    """Raises `Untold` for a field of the geometry that neither the file nor the caller gives.

    Args:
      fields: the geometry, with depth and width. what: field -> its meaning. hints: field -> more of the advice.
    """
    for name, meaning in what.items():
        if name not in fields:
            raise Untold(
                f"{path}: {meaning} cannot be known from the tensors (depth {fields['depth']}, width "
                f"{fields['width']}); give {name}=...{hints.get(name, '')}",
                name,
            )


def read_config(path: str | os.PathLike, rules: Mapping[str, tuple[Any, ...]]) -> tuple[Path, dict[str, Any]]:
    """The config.json that its project writes beside a checkpoint.

    Args:
      rules: key -> the values that it may have; the first stands for a key that is absent.

    Returns:
      (the file, its entries): none where there is no file, or one of some other program.

    Raises:
      ValueError: a file that is no JSON object, or a value that is not allowed.
    """
    file, config = read_description(path)
    if "_class_name" not in config:
        return file, {}
    for name, only in rules.items():
        if config.get(name, only[0]) not in only:
            raise ValueError(f"{file}: {name}={config[name]!r}; allowed: {' or '.join(map(str, only))}")
    return file, config


def read_description(path: str | os.PathLike) -> tuple[Path, dict[str, Any]]:
    """The config.json in a folder or beside a file, whatever program wrote it: (its path, its entries or none).

    Raises:
      ValueError: a file that is no JSON object.
    """
    file = (Path(path) if Path(path).is_dir() else Path(path).parent) / "config.json"
    if not file.is_file():
        return file, {}
    try:
        return file, dict(json.loads(file.read_text()))
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror or error}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: not a JSON object") from error


def published_file(folder: str | os.PathLike, variant: str | None = None) -> Path:
    """The safetensors file of a network's folder, or the index of its shards.

    Projects put several precisions of the same weights side by side, told apart by a variant in the name:
    model.safetensors, model.fp16.safetensors, model.safetensors.index.fp16.json. Without one asked for, the file
    whose name has none is taken, else the only one that there is.

    Args:
      variant: such as "fp16".

    Raises:
      ValueError: none, or several that no name tells apart; the folder and what it holds.
    """
    folder = Path(folder)
    if folder.is_file():
        return folder
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such file or folder")
    indices = [f for f in folder.iterdir() if re.search(r"\.safetensors\.index(\.[^.]+)?\.json$", f.name)]
    files = indices + [f for f in folder.iterdir() if f.suffix == ".safetensors"]
    chosen = [f for f in files if _variant(f.name) == variant]
    chosen = chosen if chosen or variant is not None else files
    of_shards = [f for f in chosen if f in indices]
    whole = [f for f in chosen if any(f.name == i.name.partition(".index")[0] for i in of_shards)]
    chosen = whole or of_shards or chosen
    if len(chosen) != 1:
        names = ", ".join(sorted(f.name for f in files)[:10]) or "no .safetensors file"
        asked = "" if variant is None else f" of variant={variant}"
        raise ValueError(f"{folder}: expected one .safetensors file or one index{asked}; found {names}")
    return chosen[0]


def _variant(name: str) -> str | None:
    """ "fp16" of model.fp16.safetensors, model.safetensors.index.fp16.json or model.fp16.safetensors.index.json."""
    words = [w for w in name.split(".")[1:] if w not in ("safetensors", "index", "json")]
    return ".".join(words) or None
