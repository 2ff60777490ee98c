"""Safetensors: foreign checkpoints read through a table, and difax's own files. Knows no model.

Every refusal that a header allows comes before a weight is read; then tensors are read one at a time, so that
a load needs the parameters themselves and one tensor more. A parameter is named by its path, such as
'blocks/qkv/kernel'.

What other tools do to a file is undone here, for every layout:
  - names behind a common prefix (`model.diffusion_model.`, `module.`): the prefix is what has to be dropped for the
    names to be the table's; tensors that lie outside of it (a VAE, text encoders) are left out;
  - fp8 weights X.weight with their scale beside them, X.scale_weight, X.weight_scale or X.weight_scale_inv: value times
    scale (the last is a factor too, despite its name);
  - tensors of several floating dtypes: read in the one that holds them all;
  - how many batches a norm has seen in training: left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from difax.core.contracts import Params
from difax.core.files import from_data
from difax.core.writing import replacing

# what safetensors calls the dtypes of parameters
FP8 = {"F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2}
FLOATS = {"F32": "float32", "F16": "float16", "BF16": jnp.bfloat16, "F64": "float64", **FP8}
CODES = (
    FLOATS | {"BOOL": "bool"} | {f"{kind.upper()}{8 * size}": f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)}
)
# beside an fp8 tensor X.weight: X. and one of these
SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
UNUSED = ("scale_input", "input_scale", "comfy_quant")  # the scale of activations, a description of the format
MARKER = "scaled_fp8"  # an empty tensor that says of a file that it has scales
COUNTER = "num_batches_tracked"  # of torch's BatchNorm, beside its statistics: of training alone
OWN = ("diffusion_pytorch_model", "model")  # how diffusers and transformers call the weights of a folder
MOST_HEADER = 2**25  # bytes; FLUX.1's is 0.1 MB
MOST_LETTERS = 512  # of a tensor's name
MOST_DEPTH = 8  # parts of a prefix
Layers = Mapping[str, int | Sequence[int]]
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
    """One parameter of an open checkpoint, read when asked: `read(layer)`, or `read(None)` without layers.

    rows(indices [N]) -> [N, ...]: some entries of its first axis, of which no others are read, for a parameter that is
    one tensor as the file has it (a table of embeddings); None for others.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    layers: int | None
    read: Callable[[int | None], np.ndarray]
    rows: Callable[[np.ndarray], np.ndarray] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Tensor(NamedTuple):
    """A tensor of a file; scale: the tensor that its values are to be multiplied by; finite: must they be so?"""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    begin: int
    scale: _Tensor | None = None
    finite: bool = True

    def stored(self) -> np.ndarray:
        """The values of the file."""
        # not through a memory map, whose pages stay with the process: a conversion would hold the whole file
        found = np.fromfile(self.file, np.dtype(CODES[self.dtype]), math.prod(self.shape), offset=self.begin)
        if found.size != math.prod(self.shape):
            raise ValueError(f"{self.file}: truncated within tensor {self.name!r}")
        return found.reshape(self.shape)

    def read(self) -> np.ndarray:
        """The values times their scale (then in float32); ValueError for values that are not finite."""
        return self._scaled(self.stored(), slice(None))

    def read_rows(self, indices: np.ndarray) -> np.ndarray:
        """`read()[indices]` of which only these rows are read."""
        size = math.prod(self.shape[1:])
        row = self._replace(shape=(1, *self.shape[1:]), scale=None, finite=False)
        begins = self.begin + np.asarray(indices, np.int64) * size * np.dtype(CODES[self.dtype]).itemsize
        found = [row._replace(begin=int(begin)).stored() for begin in begins]
        return self._scaled(
            np.concatenate(found) if found else np.empty((0, *self.shape[1:]), CODES[self.dtype]), indices
        )

    def _scaled(self, found: np.ndarray, rows: Any) -> np.ndarray:
        """Values of the file times the scales of their rows, where they have some."""
        found = _finite(self, found) if self.finite else found
        if self.scale is None:
            return found
        scale = _finite(self.scale, self.scale.stored())
        scale = scale if scale.size == 1 else scale[rows]
        with np.errstate(over="ignore"):  # what is beyond float32 is refused where it is used, by the scale's name
            scale = scale.astype(np.float32)
            return found.astype(np.float32) * scale.reshape((-1,) + (1,) * (len(self.shape) - 1))


def tensor_shapes(path: str | os.PathLike, tables: Iterable[Mapping[str, Source]] = ()) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors at `path` (as `load_safetensors` takes it), from the headers alone.

    Args:
      tables: layouts, one of which is the file's; then what they know is named as they name it: without a prefix,
        without what lies outside of it and without scales.

    Raises:
      ValueError: no, truncated or damaged file; two networks under different prefixes.
    """
    tensors = _opened(path)
    best = max(tables, key=lambda table: network_prefix(tensors, _keys(table))[0], default=None)
    return {name: t.shape for name, t in (tensors if best is None else _network(path, tensors, _keys(best))).items()}


def tensor_types(path: str | os.PathLike) -> dict[str, np.dtype | None]:
    """Types of all tensors at `path`, from the headers alone; None for one that numpy has no type for."""
    return {name: np.dtype(CODES[t.dtype]) if t.dtype in CODES else None for name, t in _opened(path).items()}


def load_safetensors(
    path: str | os.PathLike,
    spec: Params,
    table: Mapping[str, Source],
    layers: Layers | None = None,
    constants: Mapping[str, np.ndarray | None] | None = None,
    dtype: Any = None,
    shardings: Params | None = None,
    ignored: str | None = None,
) -> Params:
    """Reads a checkpoint of another project into a parameter tree, through a layout table.

    Args:
      path: a .safetensors file, the .index.json of a sharded one, or a folder that holds one of the two.
      spec: nested dict of what is wanted: leaves with shape and dtype (`jax.eval_shape(model.init, key)`).
      table: for every path of `spec` ('blocks/qkv/kernel') its `Source`.
      layers: how many values each placeholder takes, e.g. {"layer": 28}, or which ones, where it does not begin at 0.
      constants: tensors that the file may hold and the model computes itself (fixed positions); each must
        agree within 1e-5, or within the rounding of the file's half precision. None: that no forward pass reads.
      dtype: floating dtype of the result; None keeps the file's: where it has several the one that holds them all
        (float32 for bfloat16 beside float16 or float32, for fp8 with scales and for float64; bfloat16 for fp8 alone).
      shardings: a tree like `spec` of where each parameter lies; None is the first device. A host then holds one
        parameter at a time, and of those that a file has by layers one layer.
      ignored: as of `opened_safetensors`.

    Returns:
      A nested dict of jax arrays like `spec`.

    Raises:
      ValueError: no, truncated or foreign file; missing, surplus, wrongly shaped or typed tensor; copies or
        constants that differ; values that are not finite. The message names the file, the tensor, what was found and
        what was expected.
    """
    with opened_safetensors(path, spec, table, layers or {}, constants or {}, dtype, ignored=ignored) as parameters:
        return _read_all(parameters, shardings)


@contextlib.contextmanager
def opened_safetensors(
    path: str | os.PathLike,
    spec: Params,
    table: Mapping[str, Source],
    layers: Layers,
    constants: Mapping[str, np.ndarray | None],
    dtype: Any,
    each: bool = False,
    finite: bool = True,
    ignored: str | None = None,
) -> Iterator[dict[str, Streamed]]:
    """The parameters of a checkpoint by path, checked as `load_safetensors` does, and not read yet.

    Args:
      each: without a dtype, every parameter has its own, and not all of them one. finite: as `load_native`.
      ignored: regular expression of names of which the file may have more than the table (`re.search`).
    """
    wanted: dict[str, Any] = dict(flatten_dict(spec, sep="/"))
    if set(wanted) != set(table):
        raise ValueError(f"the layout table and the model differ in {sorted(set(wanted) ^ set(table))}")
    rows = {p: _expand(source, layers) for p, source in table.items()}
    tensors = _network(path, _opened(path), _keys(table))
    known = {name for row in rows.values() for names in row for name in names}
    tensors = {
        name: tensor._replace(finite=finite)
        for name, tensor in tensors.items()
        if ignored is None or name in known or not re.search(ignored, name)
    }
    _check_names(path, tensors, rows, constants)
    for p, row in rows.items():
        _check_tensors(p, table[p], wanted[p], row, tensors)
    for name in tensors.keys() & constants.keys():
        if (expected := constants[name]) is not None:
            _check_constant(name, tensors[name], expected)
    floats = {p for p in rows if jnp.issubdtype(wanted[p].dtype, jnp.floating)}
    alike = [{p} for p in floats] if each else [floats]
    dtypes = {p: wanted[p].dtype for p in rows} | {
        p: dtype or _holds_all(tensors[name] for q in some for names in rows[q] for name in names)
        for some in alike
        for p in some
    }
    yield {p: _streamed(table[p], wanted[p].shape, row, tensors, dtypes[p]) for p, row in rows.items()}


def _read_all(parameters: Mapping[str, Streamed], shardings: Params | None = None) -> Params:
    where: dict[str, Any] = {} if shardings is None else dict(flatten_dict(shardings, sep="/"))
    read = lambda p, parameter: _placed(parameter, where[p]) if p in where else _on_one(parameter)  # noqa: E731
    return unflatten_dict({p: read(p, parameter) for p, parameter in parameters.items()}, sep="/")


PART = 2**22  # values that are looked at together
LARGE = 2**26  # bytes of a parameter that is laid on its device layer by layer


def _on_one(parameter: Streamed) -> jax.Array:
    """A parameter on the first device; of a large one the host holds a layer at a time."""
    if parameter.layers is None or parameter.nbytes < LARGE:
        return jnp.asarray(_whole(parameter))
    return _by_layers(parameter, None, jnp.asarray)


def _by_layers(parameter: Streamed, sharding: Any, put: Callable[[np.ndarray], jax.Array]) -> jax.Array:
    """A parameter into which `put` lays one layer after another, in place."""
    array = jax.jit(lambda: jnp.zeros(parameter.shape, parameter.dtype), out_shardings=sharding)()
    write = jax.jit(
        lambda array, row, layer: jax.lax.dynamic_update_index_in_dim(array, row, layer, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )
    for layer in range(parameter.layers or 0):
        array = jax.block_until_ready(write(array, put(parameter.read(layer)), layer))
    return array


def _placed(parameter: Streamed, sharding: NamedSharding) -> jax.Array:
    """A parameter on the devices that hold its parts, one layer of it at a time."""

    def put(values: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(values.shape, sharding, lambda part: values[part])

    spec = [*sharding.spec, *[None] * (len(parameter.shape) - len(sharding.spec))]
    if parameter.layers is None or spec[0] is not None:
        return put(_whole(parameter), sharding)
    of_layer = NamedSharding(sharding.mesh, PartitionSpec(*spec[1:]))
    return _by_layers(parameter, sharding, lambda values: put(values, of_layer))


def _whole(parameter: Streamed) -> np.ndarray:
    if parameter.layers is None:
        return parameter.read(None)
    out = np.empty(parameter.shape, parameter.dtype)
    for layer in range(parameter.layers):
        out[layer] = parameter.read(layer)
    return out


def load_native(path: str | os.PathLike, spec: Params, finite: bool = True, shardings: Params | None = None) -> Params:
    """Reads what `save_safetensors` wrote into a nested dict of jax arrays like `spec`, in the file's dtypes.

    Args:
      finite: are values that are not refused? shardings: as of `load_safetensors`.

    Raises:
      ValueError: as `load_safetensors`.
    """
    table = {p: Source((p,)) for p in flatten_dict(spec, sep="/")}
    with opened_safetensors(path, spec, table, {}, {}, None, each=True, finite=finite) as parameters:
        return _read_all(parameters, shardings)


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """What `save_safetensors` stored beside the parameters; {} for a file of another project."""
    found: dict[str, Any] = {}
    for file, _ in _files(path):
        metadata = _header(file)[1].get(_METADATA, "{}")
        try:
            found |= from_data(json.loads(metadata))
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"{file}: what difax stored beside the weights is damaged (no JSON object)") from None
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


def equal_copies(path: str | os.PathLike, table: Mapping[str, Source], layers: Layers) -> bool:
    """Whether the layers of a file repeat the shared parameters of a table; reads them, up to the first that differs.

    Tensors that are missing or of another shape are for `load_safetensors` to refuse, and count as equal.
    """
    tensors = _network(path, _opened(path), _keys(table))
    for source in (source for source in table.values() if source.shared):
        copies = (tensors[name].read() for names in _expand(source, layers) for name in names if name in tensors)
        first = next(copies, None)
        if first is not None and any(copy.shape == first.shape and not _same(copy, first) for copy in copies):
            return False
    return True


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
    some = list(itertools.islice(allowed, 10_000))
    return next(iter(difflib.get_close_matches(name, some, n=1, cutoff=0.4)), None)


# ---- files -------------------------------------------------------------------------------------------------


def _files(path: str | os.PathLike) -> list[tuple[Path, set[str] | None]]:
    """The files of a checkpoint, each with the names that the index promises in it (None: no index)."""
    path = Path(path)
    try:
        if path.is_dir():
            indices = [*path.glob("*.safetensors.index.json"), *path.glob("*.safetensors.index.*.json")]
            found = _plain(indices) or _plain(path.glob("*.safetensors"))
            # what stands under the library's own name, beside the same weights as another program has them
            found = [f for f in found if len(found) > 1 and f.name.split(".")[0] in OWN] or found
            if len(found) != 1:
                names = ", ".join(f.name for f in found[:10]) or "none"
                inside = [folder for folder in ("transformer", "unet") if (path / folder).is_dir()]
                hint = f"; a pipeline, whose network is in {path / inside[0]}" if inside else ""
                raise ValueError(
                    f"{path}: expected one .safetensors file or one index in the folder; found {names}{hint}"
                )
            path = found[0]
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        if path.suffix != ".json":
            return [(path, None)]
        if path.stat().st_size > MOST_HEADER:
            raise ValueError(f"{path}: an index of {path.stat().st_size} bytes; allowed: up to {MOST_HEADER}")
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    try:
        where = json.loads(text)["weight_map"]
        shards: dict[str, set[str]] = {}
        for name, file in where.items():
            shards.setdefault(file, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not an index of a sharded checkpoint (no 'weight_map')") from error
    for file in shards:
        if not isinstance(file, str) or not file.endswith(".safetensors") or not _beside(path, file):
            raise ValueError(f"{path}: its shard {str(file)[:MOST_LETTERS]!r} is not beside it")
    if not shards:
        raise ValueError(f"{path}: its 'weight_map' is empty")
    return [(path.parent / file, names) for file, names in sorted(shards.items())]


def _plain(files: Iterable[Path]) -> list[Path]:
    """Files by name, without those that are variants of another of them (`x.fp16.safetensors` beside
    `x.safetensors`), which diffusers takes where they are asked for alone."""
    names = {f.name: f for f in files}
    parts = {name: name.split(".") for name in names}
    without = {name: {".".join([*p[:i], *p[i + 1 :]]) for i in range(1, len(p) - 1)} for name, p in parts.items()}
    return [f for name, f in sorted(names.items()) if not without[name] & names.keys()]


def _beside(path: Path, file: str) -> bool:
    try:
        return Path(file).name == file and (path.parent / file).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _header(file: Path) -> tuple[dict[str, _Tensor], dict[str, str]]:
    """The tensors and the metadata that a safetensors file's header tells, all of it checked.

    Raises:
      ValueError: no safetensors file, a truncated one, or one whose header is not of the format: the tensors' bytes
        must follow each other without gap or overlap to the end of the file.
    """
    try:
        with file.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            start = f.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            begins = f.read(1)
            text = begins + f.read(min(length, MOST_HEADER) - 1) if length and begins == b"{" else b""
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror or error}") from None
    if not text:
        if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
            raise ValueError(
                f"{file}: a PyTorch pickle; only safetensors files are read. Convert it where torch is installed: "
                "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'x.safetensors')"
            )
        raise ValueError(f"{file}: not a safetensors file ({size} bytes)")
    if length > MOST_HEADER and size >= length:
        raise ValueError(f"{file}: a header of {length} bytes; allowed: up to {MOST_HEADER}")
    try:
        header = dict(json.loads(text, object_pairs_hook=_once))
    except (ValueError, TypeError, RecursionError) as error:
        twice = f"; {error}" if isinstance(error, _Twice) else ""
        raise ValueError(
            f"{file}: truncated or damaged in its header ({size} bytes, header of {length}{twice})"
        ) from None
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{file}: damaged in its header (__metadata__ is no table of texts)")
    tensors, ends = {}, []
    for name, said in header.items():
        tensors[name], end = _entry(file, name, said, 8 + length)
        ends.append((tensors[name].begin, end, name))
    ends.sort()
    cut = next(((end, name) for _, end, name in ends if end > size), None)
    if cut:
        raise ValueError(f"{file}: truncated: tensor {cut[1]!r} ends at byte {cut[0]}, the file at {size}")
    before = 8 + length
    for begin, end, name in ends:
        if begin != before:
            raise ValueError(f"{file}: damaged: tensor {name!r} begins at byte {begin}, expected {before}")
        before = end
    if before != size:
        raise ValueError(f"{file}: damaged: the last tensor ends at byte {before}, the file at {size}")
    return tensors, metadata


class _Twice(ValueError):
    """A name that stands twice in a JSON object."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise _Twice(f"{twice[:MOST_LETTERS]!r} stands there twice")
    return found


def _entry(file: Path, name: str, said: Any, base: int) -> tuple[_Tensor, int]:
    """One tensor of a header and where it ends."""
    if len(name) > MOST_LETTERS:
        raise ValueError(
            f"{file}: a tensor's name of {len(name)} letters ({name[:20]!r}...); allowed: up to {MOST_LETTERS}"
        )
    count = lambda n: type(n) is int and 0 <= n < 2**63  # noqa: E731
    try:
        dtype, shape, (begin, end) = str(said["dtype"]), [*said["shape"]], said["data_offsets"]
    except (KeyError, TypeError, ValueError):
        dtype, shape, begin, end = "", [], -1, -1
    if not (dtype and len(dtype) < 20 and len(shape) <= 16 and all(map(count, [*shape, begin, end])) and begin <= end):
        raise ValueError(f"{file}: damaged in its header: tensor {name!r} has no dtype, shape or place that make sense")
    if dtype in CODES and math.prod(shape) * np.dtype(CODES[dtype]).itemsize != end - begin:
        raise ValueError(
            f"{file}: damaged in its header: tensor {name!r} of {dtype} {tuple(shape)} has {end - begin} bytes"
        )
    return _Tensor(file, name, tuple(shape), dtype, base + begin), base + end


def _opened(path: str | os.PathLike) -> dict[str, _Tensor]:
    """The tensors of a checkpoint by name, of all its shards."""
    tensors: dict[str, _Tensor] = {}
    for file, promised in _files(path):
        here = _header(file)[0]
        for name in sorted(here.keys() ^ promised) if promised is not None else ():
            fault = "lacks" if name not in here else "holds, unknown to its index,"
            raise ValueError(f"{file}: this shard {fault} tensor {name[:MOST_LETTERS]!r}")
        tensors |= here
    return tensors


# ---- what other tools do to names and values ---------------------------------------------------------------

_NUMBER = re.compile(r"\{\w+\}|\d+")


def name_pattern(name: str) -> str:
    """A tensor's name, or a layout table's, whatever the numbers in it."""
    return _NUMBER.sub("#", name)


def network_prefix(names: Iterable[str], keys: Iterable[str]) -> tuple[int, str, list[str]]:
    """What has to be dropped from the names of a file for most of them to be names of a layout.

    Args:
      names: of the file's tensors. keys: of the layout, with placeholders.

    Returns:
      (how many names are the layout's then, the prefix, all prefixes that do as well); a prefix ends with a dot or is
      empty, and the shortest comes first.
    """
    patterns, counts = {name_pattern(key) for key in keys}, Counter()
    for name in names:
        parts = name.split(".")
        for i in range(min(len(parts), MOST_DEPTH)):
            if name_pattern(".".join(parts[i:])) in patterns:
                counts["".join(f"{part}." for part in parts[:i])] += 1
    most = max(counts.values(), default=0)
    best = sorted((p for p, n in counts.items() if n == most), key=lambda p: (len(p), p)) or [""]
    return most, best[0], best


def _keys(table: Mapping[str, Source]) -> set[str]:
    return {key for source in table.values() for key in source.keys}


def _network(path: Any, tensors: Mapping[str, _Tensor], keys: set[str]) -> dict[str, _Tensor]:
    """The tensors of the network that a layout describes, named as it names them, with their scales."""
    count, prefix, others = network_prefix(tensors, keys)
    if prefix and len(others) > 1 and count >= len({name_pattern(key) for key in keys}):
        found = ", ".join(repr(p) for p in others[:5])
        raise ValueError(f"{path}: holds several networks, under {found}; allowed: a file of one of them")
    inside = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    scaled = {name: t for name, t in inside.items() if name.rpartition(".")[2] != COUNTER}
    eighths = {name for name, t in inside.items() if t.dtype in FP8}
    scaled.pop(MARKER, None)
    for name in eighths:
        base = name.removesuffix("weight")
        if base == name:
            continue
        beside = [base + suffix for suffix in SCALES if base + suffix in inside]
        if len(beside) > 1:
            raise ValueError(
                f"{inside[name].file}: tensor {inside[name].name!r} has two scales, {' and '.join(map(repr, beside))}"
            )
        for other in (*beside, *(base + suffix for suffix in UNUSED)):
            scaled.pop(other, None)
        if beside:
            scaled[name] = inside[name]._replace(scale=_checked_scale(inside[beside[0]], inside[name]))
    return scaled


def _checked_scale(scale: _Tensor, weight: _Tensor) -> _Tensor:
    """The scale of an fp8 tensor: one number, or one for each row."""
    rows = weight.shape[:1]
    allowed = {(), (1,), (1, 1), rows, rows + (1,), rows + (1,) * (len(weight.shape) - 1)}
    if scale.shape not in allowed:
        raise ValueError(
            f"{scale.file}: scale {scale.name!r} of tensor {weight.name!r} has the shape {scale.shape}; allowed: one "
            f"number, or one for each of the {weight.shape[0] if rows else 1} rows"
        )
    if scale.dtype not in FLOATS or scale.dtype in FP8:
        raise ValueError(f"{scale.file}: scale {scale.name!r} is {scale.dtype}; expected F32 or F16 or BF16 or F64")
    _finite(scale, scale.stored())
    return scale


def _finite(tensor: _Tensor, values: np.ndarray) -> np.ndarray:
    flat = values.reshape(-1)
    # part by part: what is said of each value takes as much memory as the values
    bad = sum(int(_not_finite(flat[i : i + PART]).sum()) for i in range(0, flat.size, PART))
    if bad:
        raise ValueError(
            f"{tensor.file}: tensor {tensor.name!r} holds {bad} values that are not finite, of {flat.size}"
        )
    return values


def _not_finite(values: np.ndarray) -> np.ndarray:
    if values.dtype == jnp.bfloat16:  # by its bits, which is many times quicker
        return (values.view(np.uint16) & 0x7F80) == 0x7F80
    return ~np.isfinite(values) if jnp.issubdtype(values.dtype, jnp.floating) else np.zeros(1, bool)


def _fill(target: np.ndarray, values: np.ndarray, tensor: _Tensor) -> None:
    """Writes a tensor's values into an array of another dtype; ValueError where that does not reach so far."""
    # a transposed matrix goes in slabs whose rows stay in the processor's cache, which is several times quicker
    turned = values.ndim == 2 and values.strides[0] < values.strides[1]
    slabs = [np.s_[:, i : i + 256] for i in range(0, values.shape[1], 256)] if turned else [np.s_[...]]
    with np.errstate(over="ignore", invalid="ignore"):
        for slab in slabs:
            target[slab] = values[slab]
    narrower = target.dtype != values.dtype and jnp.issubdtype(target.dtype, jnp.floating)
    if tensor.finite and (tensor.scale is not None or narrower) and _not_finite(np.ascontiguousarray(target)).any():
        most = float(np.abs(values.astype(np.float64)).max())
        times = "" if tensor.scale is None else f" times {tensor.scale.name!r}"
        raise ValueError(
            f"{tensor.file}: tensor {tensor.name!r}{times} holds {most:.3g}; allowed in {target.dtype}: up to "
            f"{float(jnp.finfo(target.dtype).max):.3g}"
        )


def _holds_all(tensors: Iterable[_Tensor]) -> Any:
    """The floating dtype that holds the values of all tensors; float64 counts as float32, in which networks compute."""
    kinds = {"F32" if t.scale is not None or t.dtype == "F64" else t.dtype for t in tensors}
    kinds = kinds - FP8.keys() or {"BF16"}  # the halves hold every value of fp8
    return FLOATS[kinds.pop()] if len(kinds) == 1 else "float32"


# ---- checks and assembly -----------------------------------------------------------------------------------


def _expand(source: Source, layers: Layers) -> list[list[str]]:
    """Tensor names [layers][parts] of one parameter; a single row without a placeholder."""
    used = [p for p in layers if any(f"{{{p}}}" in key for key in source.keys)]
    if not used:
        return [list(source.keys)]
    (placeholder,) = used
    numbers = layers[placeholder]
    numbers = range(numbers) if isinstance(numbers, int) else numbers
    return [[key.format(**{placeholder: i}) for key in source.keys] for i in numbers]


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
    # any float serves a float parameter; an integer one must be exactly what it is
    whole = "BOOL" if kind.kind == "b" else f"{kind.kind.upper()}{8 * kind.itemsize}"
    codes = FLOATS if jnp.issubdtype(kind, jnp.floating) else (whole,)
    for name, part in ((name, part) for names in row for name, part in zip(names, parts, strict=True)):
        file, shape, dtype = tensors[name].file, tensors[name].shape, tensors[name].dtype
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


def _check_constant(name: str, tensor: _Tensor, expected: np.ndarray) -> None:
    if tensor.shape != expected.shape:
        raise ValueError(
            f"{tensor.file}: tensor {name!r} has the wrong shape {tensor.shape}; expected {expected.shape}"
        )
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{tensor.file}: tensor {name!r} is {tensor.dtype}; expected {' or '.join(FLOATS)}")
    found = tensor.read()
    tolerance = max(1e-5, float(jnp.finfo(CODES[tensor.dtype]).eps) if tensor.dtype != "F32" else 0)
    difference = float(np.abs(found.astype(np.float32) - expected).max())
    if not difference <= tolerance:
        raise ValueError(
            f"{tensor.file}: tensor {name!r} differs from the fixed value that the model computes by "
            f"{difference:.3g}; allowed: {tolerance:.3g}"
        )


def _streamed(
    source: Source,
    shape: tuple[int, ...],
    row: list[list[str]],
    tensors: Mapping[str, _Tensor],
    dtype: Any,
) -> Streamed:
    parts, stored = _parts("", source, shape), np.dtype(dtype)

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
            _fill(target, values, tensors[name])
        return out

    def read_rows(indices: np.ndarray) -> np.ndarray:
        tensor = tensors[row[0][0]]
        out = np.empty((len(indices), *shape[1:]), stored)
        _fill(out, tensor.read_rows(indices), tensor)
        return out

    plain = len(row) == len(row[0]) == 1 and source.axes is None and source.order is None
    rows = read_rows if plain and tensors[row[0][0]].shape == shape else None
    return Streamed(shape, stored, len(row) if _stacked(source) else None, read, rows)


def _check_copies(names: list[str], tensors: Mapping[str, _Tensor]) -> None:
    """Raises ValueError where the copies of one tensor differ, in the coarser dtype of two."""
    first = tensors[names[0]].read()
    for name in names[1:]:
        copy = tensors[name].read()
        if not _same(copy, first):
            difference = np.abs(copy.astype(np.float32) - first.astype(np.float32)).max()
            raise ValueError(
                f"{tensors[name].file}: tensor {name!r} must equal {names[0]!r} (one embedder, "
                f"repeated in every layer); they differ by {difference:.3g}"
            )


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are equal, whatever their dtypes."""
    return np.array_equal(one.astype(np.float64), other.astype(np.float64))
