"""Safetensors: foreign checkpoints read through a table, and difax's own files. Knows no model.

Every refusal that a header allows comes before a weight is read; then tensors are read one at a time, so that
a load needs the parameters themselves and one tensor more. A parameter is named by its path, such as
'blocks/qkv/kernel'.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from difax.core.contracts import Params
from difax.core.files import from_data, replacing

FLOATS = ("F32", "F16", "BF16")
# what safetensors calls the dtypes of parameters
CODES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": jnp.bfloat16} | {
    f"{kind.upper()}{8 * size}": f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)
}
_METADATA = "difax"  # one entry: the library writes several in random order, and files should be reproducible


class Source(NamedTuple):
    """Where one parameter stands in a foreign checkpoint: one row of a layout table.

    keys: the tensor's name, or several names whose tensors are concatenated along the parameter's last axis
        (q, k, v). A placeholder such as `{layer}` runs over all layers, stacked on a new leading axis.
    axes: permutation of the tensor's axes, after which it is folded into the parameter's shape (None: as is).
    shared: the file repeats one parameter in every layer; the copies must be equal, and one is taken.
    widths: of several names' parts, relative to each other (None: equal); (1, 1, 1, 4) for q, k, v and an MLP.
    order: the parameter's last axis is made of as many equal pieces of each tensor, in this order; (1, 0) swaps the
        halves, (scale, shift) for (shift, scale).
    """

    keys: tuple[str, ...]
    axes: tuple[int, ...] | None = None
    shared: bool = False
    widths: tuple[int, ...] | None = None
    order: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Streamed:
    """One parameter of an open checkpoint, read when asked: `read(layer)`, or `read(None)` without layers."""

    shape: tuple[int, ...]
    dtype: np.dtype
    layers: int | None
    read: Callable[[int | None], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Tensor(NamedTuple):
    file: Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def tensor_shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors at `path` (as `load_safetensors` takes it), from the headers alone."""
    with _opened(path) as tensors:
        return {name: t.shape for name, t in tensors.items()}


def load_safetensors(
    path: str | os.PathLike,
    spec: Params,
    table: Mapping[str, Source],
    layers: Mapping[str, int] | None = None,
    constants: Mapping[str, np.ndarray] | None = None,
    dtype: Any = None,
) -> Params:
    """Reads a checkpoint of another project into a parameter tree, through a layout table.

    Args:
      path: a .safetensors file, the .index.json of a sharded one, or a folder that holds one of the two.
      spec: nested dict of what is wanted: leaves with shape and dtype (`jax.eval_shape(model.init, key)`).
      table: for every path of `spec` ('blocks/qkv/kernel') its `Source`.
      layers: how many values each placeholder takes, e.g. {"layer": 28}.
      constants: tensors that the file may hold and the model computes itself (fixed positions); each must
        agree within 1e-5, or within the rounding of the file's half precision.
      dtype: floating dtype of the result; None keeps the file's.

    Returns:
      A nested dict of jax arrays like `spec`.

    Raises:
      ValueError: no, truncated or foreign file; missing, surplus, wrongly shaped or typed tensor; copies or
        constants that differ. The message names the file, the tensor, what was found and what was expected.
    """
    with opened_safetensors(path, spec, table, layers or {}, constants or {}, dtype) as parameters:
        return unflatten_dict({p: jnp.asarray(_whole(parameter)) for p, parameter in parameters.items()}, sep="/")


@contextlib.contextmanager
def opened_safetensors(
    path: str | os.PathLike,
    spec: Params,
    table: Mapping[str, Source],
    layers: Mapping[str, int],
    constants: Mapping[str, np.ndarray],
    dtype: Any,
) -> Iterator[dict[str, Streamed]]:
    """The parameters of a checkpoint by path, checked as `load_safetensors` does, and not read yet."""
    wanted: dict[str, Any] = dict(flatten_dict(spec, sep="/"))
    if set(wanted) != set(table):
        raise ValueError(f"the layout table and the model differ in {sorted(set(wanted) ^ set(table))}")
    rows = {p: _expand(source, layers) for p, source in table.items()}
    with _opened(path) as tensors:
        _check_names(path, tensors, rows, constants)
        for p, row in rows.items():
            _check_tensors(p, table[p], wanted[p], row, tensors)
        for name in tensors.keys() & constants.keys():
            _check_constant(name, tensors[name], constants[name])
        yield {p: _streamed(p, table[p], wanted[p].shape, row, tensors, dtype) for p, row in rows.items()}


def _whole(parameter: Streamed) -> np.ndarray:
    if parameter.layers is None:
        return parameter.read(None)
    out = np.empty(parameter.shape, parameter.dtype)
    for layer in range(parameter.layers):
        out[layer] = parameter.read(layer)
    return out


def load_native(path: str | os.PathLike, spec: Params) -> Params:
    """Reads what `save_safetensors` wrote into a nested dict of jax arrays like `spec`, in the file's dtypes.

    Raises:
      ValueError: as `load_safetensors`.
    """
    return load_safetensors(path, spec, {p: Source((p,)) for p in flatten_dict(spec, sep="/")})


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """What `save_safetensors` stored beside the parameters; {} for a file of another project."""
    found: dict[str, Any] = {}
    for file, _ in _files(path):
        with _safe_open(file) as handle:
            found |= from_data(json.loads((handle.metadata() or {}).get(_METADATA, "{}")))
    return found


def save_safetensors(path: str | os.PathLike, params: Params, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes nested dicts as one safetensors file, aside and then renamed; equal inputs give equal bytes.

    Args:
      path: of the file; its folder must exist.
      params: nested dict of arrays, any dtype that safetensors knows (bfloat16 too).
      metadata: JSON-able values, such as the model's configuration, for `read_metadata`.

    Raises:
      ValueError: a leaf that is no array, or a path that cannot be written.
    """
    flat = {}
    for name, leaf in flatten_dict(params, sep="/").items():
        if not hasattr(leaf, "dtype"):
            raise ValueError(f"cannot write {name}: {type(leaf).__name__} is no array")
        flat[name] = np.asarray(leaf, order="C")  # safetensors reads the buffer, whatever the strides
    header = {_METADATA: json.dumps(dict(metadata), sort_keys=True)} if metadata else None
    with replacing(path) as aside:
        aside.touch()
        mode = aside.stat().st_mode  # the library's own files are readable by their owner only
        save_file(flat, aside, header)
        aside.chmod(mode)


def check_shapes(where: str, params: Params, spec: Params) -> None:
    """Raises ValueError naming the first tensor in which two trees of parameters differ."""
    shapes = [
        {jax.tree_util.keystr(p, simple=True, separator="/"): a.shape for p, a in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (params, spec))
    ]
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(name) != shapes[1].get(name):
            raise ValueError(f"{where}: tensor {name} is {shapes[0].get(name)}, expected {shapes[1].get(name)}")


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that looks most like `name`, if any does."""
    return next(iter(difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.4)), None)


# ---- files -------------------------------------------------------------------------------------------------


def _files(path: str | os.PathLike) -> list[tuple[Path, set[str] | None]]:
    """The files of a checkpoint, each with the names that the index promises in it (None: no index)."""
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            names = ", ".join(f.name for f in found) or "none"
            raise ValueError(f"{path}: expected one .safetensors file or one index in the folder; found {names}")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix != ".json":
        return [(path, None)]
    try:
        where = json.loads(path.read_text())["weight_map"]
        shards: dict[str, set[str]] = {}
        for name, file in where.items():
            shards.setdefault(str(file), set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not an index of a sharded checkpoint (no 'weight_map')") from error
    for file in shards:
        if Path(file).name != file or not (path.parent / file).is_file():
            raise ValueError(f"{path}: its shard {file!r} is not beside it")
    return [(path.parent / file, names) for file, names in sorted(shards.items())]


def _safe_open(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except OSError as error:
        raise ValueError(f"{file}: {error}") from error
    except SafetensorError as error:
        raise ValueError(f"{file}: {_diagnose(file, error)}") from error


def _diagnose(file: Path, error: Exception) -> str:
    """Why safetensors refused a file, with the first tensor that a truncation hits."""
    size = file.stat().st_size
    with file.open("rb") as f:
        start, text = f.read(8), f.read(1)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if text == b"{":
            text += f.read(min(length, size) - 1)
    if not text.startswith(b"{"):
        if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
            return (
                "a PyTorch pickle; only safetensors files are read. Convert it where torch is installed: "
                "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'x.safetensors')"
            )
        return f"not a safetensors file ({size} bytes; {error})"
    try:
        header = json.loads(text)
        ends = sorted((v["data_offsets"][1], k) for k, v in header.items() if k != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"truncated or damaged in its header ({size} bytes, header of {length}; {error})"
    base = 8 + length
    cut = next((f"tensor {k!r} ends at byte {base + end}" for end, k in ends if base + end > size), None)
    return f"truncated: {cut}, the file at {size}" if cut else f"damaged ({error})"


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[dict[str, _Tensor]]:
    with contextlib.ExitStack() as stack:
        tensors: dict[str, _Tensor] = {}
        for file, promised in _files(path):
            handle = stack.enter_context(_safe_open(file))
            names = set(handle.keys())
            for name in sorted(names ^ promised) if promised is not None else ():
                fault = "lacks" if name not in names else "holds, unknown to its index,"
                raise ValueError(f"{file}: this shard {fault} tensor {name!r}")
            begins = _begins(file)
            for name in names:
                view = handle.get_slice(name)
                shape, dtype = tuple(view.get_shape()), view.get_dtype()
                if dtype in CODES:
                    read = partial(_read_tensor, file, shape, dtype, begins[name])
                else:
                    read = partial(handle.get_tensor, name)
                tensors[name] = _Tensor(file, shape, dtype, read)
        yield tensors


def _begins(file: Path) -> dict[str, int]:
    """Where each tensor of a file that safetensors has accepted begins."""
    with file.open("rb") as f:
        length = struct.unpack("<Q", f.read(8))[0]
        header = json.loads(f.read(length))
    return {name: 8 + length + v["data_offsets"][0] for name, v in header.items() if name != "__metadata__"}


def _read_tensor(file: Path, shape: tuple[int, ...], dtype: str, begin: int) -> np.ndarray:
    # not through the library's memory map, whose pages stay with the process: a conversion would hold the whole file
    return np.fromfile(file, np.dtype(CODES[dtype]), math.prod(shape), offset=begin).reshape(shape)


# ---- checks and assembly -----------------------------------------------------------------------------------


def _expand(source: Source, layers: Mapping[str, int]) -> list[list[str]]:
    """Tensor names [layers][parts] of one parameter; a single row without a placeholder."""
    used = [p for p in layers if any(f"{{{p}}}" in key for key in source.keys)]
    if not used:
        return [list(source.keys)]
    (placeholder,) = used
    return [[key.format(**{placeholder: i}) for key in source.keys] for i in range(layers[placeholder])]


def _stacked(source: Source) -> bool:
    return not source.shared and "{" in source.keys[0]


def _parts(p: str, source: Source, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """What each tensor of a parameter fills: the parameter's shape without layers, cut along its last axis."""
    shape = shape[1:] if _stacked(source) else shape
    if len(source.keys) == 1:
        parts = [shape]
    else:
        widths = source.widths or (1,) * len(source.keys)
        unit, rest = divmod(shape[-1], sum(widths))
        if rest or len(widths) != len(source.keys):
            raise ValueError(f"{p}: {len(source.keys)} tensors of widths {widths} do not add up to {shape[-1]}")
        parts = [(*shape[:-1], width * unit) for width in widths]
    if source.order is not None:
        pieces = len(source.order)
        if sorted(source.order) != list(range(pieces)) or any(part[-1] % pieces for part in parts):
            raise ValueError(
                f"{p}: order={source.order} does not name each equal piece of {parts[0][-1]} features once"
            )
    return parts


def _check_names(
    path: Any,
    tensors: Mapping[str, _Tensor],
    rows: Mapping[str, list[list[str]]],
    constants: Mapping[str, Any],
) -> None:
    expected = {name: p for p, row in rows.items() for names in row for name in names}
    missing = [name for name in expected if name not in tensors]
    surplus = sorted(tensors.keys() - expected.keys() - constants.keys())
    if missing:
        close = nearest(missing[0], surplus) or nearest(missing[0], tensors)
        raise ValueError(
            f"{path}: tensor {missing[0]!r} (for {expected[missing[0]]}) is missing{_more(missing)}; "
            + (f"nearest in the file: {close!r}" if close else f"the file holds {len(tensors)} other tensors")
        )
    if surplus:
        close = nearest(surplus[0], expected)
        raise ValueError(
            f"{path}: surplus tensor {surplus[0]!r} of shape {tensors[surplus[0]].shape}{_more(surplus)}, "
            f"which no parameter takes" + (f"; nearest expected: {close!r}" if close else "")
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _check_tensors(p: str, source: Source, want: Any, row: list[list[str]], tensors: Mapping[str, _Tensor]) -> None:
    if _stacked(source) and want.shape[0] != len(row):
        raise ValueError(f"{p} has {want.shape[0]} layers in the model, {len(row)} in the checkpoint")
    parts = _parts(p, source, want.shape)
    axes = source.axes or tuple(range(len(parts[0])))
    unfolded = len(axes) == len(parts[0])
    kind = np.dtype(want.dtype)
    # any of the three floats serves a float parameter; an integer one must be exactly what it is
    codes = FLOATS if jnp.issubdtype(kind, jnp.floating) else (f"{kind.kind.upper()}{8 * kind.itemsize}",)
    for name, part in ((name, part) for names in row for name, part in zip(names, parts, strict=True)):
        file, shape, dtype, _ = tensors[name]
        expected = tuple(part[axes.index(i)] for i in range(len(axes))) if unfolded else None
        if expected is None:
            fits = len(shape) == len(axes) and math.prod(shape) == math.prod(part)
            fits = fits and shape[axes[-1]] == part[-1]
        else:
            fits = shape == expected
        if not fits:
            allowed = expected or f"{len(axes)} axes that fold into {part}"
            raise ValueError(f"{file}: tensor {name!r} (for {p}) has the wrong shape {shape}; expected {allowed}")
        if dtype not in codes:
            raise ValueError(f"{file}: tensor {name!r} (for {p}) is {dtype}; expected {' or '.join(codes)}")
        if dtype != tensors[row[0][0]].dtype:
            raise ValueError(
                f"{file}: tensor {name!r} is {dtype}, but {row[0][0]!r} of the same parameter {p} is "
                f"{tensors[row[0][0]].dtype}"
            )


def _check_constant(name: str, tensor: _Tensor, expected: np.ndarray) -> None:
    if tensor.shape != expected.shape:
        raise ValueError(
            f"{tensor.file}: tensor {name!r} has the wrong shape {tensor.shape}; expected {expected.shape}"
        )
    found = tensor.read()
    tolerance = 1e-5 if tensor.dtype == "F32" else float(jnp.finfo(found.dtype).eps)
    difference = float(np.abs(found.astype(np.float32) - expected).max())
    if not difference <= tolerance:
        raise ValueError(
            f"{tensor.file}: tensor {name!r} differs from the fixed value that the model computes by "
            f"{difference:.3g}; allowed: {tolerance:.3g}"
        )


def _streamed(
    p: str,
    source: Source,
    shape: tuple[int, ...],
    row: list[list[str]],
    tensors: Mapping[str, _Tensor],
    dtype: Any,
) -> Streamed:
    parts = _parts(p, source, shape)
    stored = np.dtype(dtype or CODES[tensors[row[0][0]].dtype])

    def read(layer: int | None) -> np.ndarray:
        if source.shared:
            _check_copies([names[0] for names in row], tensors)
        out, start = np.empty(shape[1:] if _stacked(source) else shape, stored), 0
        for name, part in zip(row[layer or 0], parts, strict=True):
            tensor = tensors[name].read()
            values = (tensor if source.axes is None else tensor.transpose(source.axes)).reshape(part)
            if source.order is not None:
                pieces = np.split(values, len(source.order), axis=-1)
                values = np.concatenate([pieces[i] for i in source.order], axis=-1)
            target = out
            if len(parts) > 1:
                target = out[..., start : start + part[-1]]
                start += part[-1]
            target[...] = values
        return out

    return Streamed(shape, stored, len(row) if _stacked(source) else None, read)


def _check_copies(names: list[str], tensors: Mapping[str, _Tensor]) -> None:
    first = tensors[names[0]].read()
    for name in names[1:]:
        copy = tensors[name].read()
        if not np.array_equal(copy, first):
            difference = np.abs(copy.astype(np.float32) - first.astype(np.float32)).max()
            raise ValueError(
                f"{tensors[name].file}: tensor {name!r} must equal {names[0]!r} (one embedder, "
                f"repeated in every layer); they differ by {difference:.3g}"
            )
