"""`difax convert`: a published safetensors checkpoint, of any number of shards, as an orbax one with difax's names.

Tensors are read and written one at a time, a stacked parameter layer by layer, so that a conversion holds one tensor
of the file in memory, however large the model.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import unflatten_dict
from orbax.checkpoint import future, type_handlers

from difax.core.contracts import Params
from difax.core.files import makeable, read_json
from difax.core.writing import beside, remove_left
from difax.weights.checkpoint import Streamed
from difax.weights.orbax_errors import readable
from difax.weights.published import Foreign, opened_parameters

_CONCURRENT_GB = 1


class _StreamHandler(type_handlers.NumpyHandler):
    """Writes a parameter into its array file layer by layer, each layer a chunk of the file."""

    async def _write(self, value: Streamed, info: Any, arg: Any) -> None:
        await info.await_path_creation()
        spec = type_handlers.get_json_tspec_write(
            info,
            use_ocdbt=False,
            global_shape=value.shape,
            local_shape=value.shape,
            dtype=value.dtype,
            process_index=None,
            arg=arg,
        )
        spec["metadata"]["chunks"] = [1, *value.shape[1:]] if value.layers else list(value.shape)
        array = await ts.open(ts.Spec(spec), create=True, open=True, context=info.ts_context)
        if value.layers is None:
            await array.write(value.read(None))
        for layer in range(value.layers or 0):
            await array[layer].write(value.read(layer))

    async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
        for value, info, arg in zip(values, infos, args, strict=True):  # one after the other: that bounds the memory
            await self._write(value, info, arg)

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Sequence[future.Future]:
        args = args or [type_handlers.SaveArgs()] * len(values)
        return [
            future.CommitFutureAwaitingContractedSignals(
                self._background_serialize(values, infos, args), name="difax_stream"
            )
        ]


def _checkpointer(streaming: bool) -> ocp.Checkpointer:
    more: dict[str, Any] = {}
    if streaming:
        kinds = (jax.Array, type_handlers.ArrayHandler()), (Streamed, _StreamHandler())
        more["type_handler_registry"] = type_handlers.create_type_handler_registry(*kinds)
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(save_concurrent_gb=_CONCURRENT_GB, use_ocdbt=False, **more))


SETTINGS = "difax.json"


def check_target(target: str | os.PathLike) -> pathlib.Path:
    """The absolute path of a folder that `convert` may make; what dead processes left of it is removed.

    Raises:
      ValueError: a target that exists, or whose folder does not exist or cannot be written.
    """
    path = pathlib.Path(target).absolute()
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that no folder can have
        raise ValueError(f"{str(path)!r}: {getattr(error, 'strerror', None) or error}") from None
    else:
        raise ValueError(f"{path}: exists already; allowed: a folder that does not exist yet")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: the folder {path.parent} does not exist or is not writable")
    makeable(path, "target")
    remove_left(path.parent)
    return path


def convert(path: str | os.PathLike, target: str | os.PathLike, found: Foreign, dtype: Any = None) -> dict[str, Any]:
    """Writes the parameters of a checkpoint of another project as an orbax checkpoint, with what is known of its model.

    Beside the arrays lies `difax.json`: {"model": the model's name and every argument of its factory, "files": size and
    checksum of each file}.

    Args:
      path: a .safetensors file, the .index.json of a sharded one, or a folder that holds one of the two.
      target: a folder that does not exist yet; it appears whole or not at all.
      found: the model and the layout table of the file.
      dtype: floating dtype of the result; None keeps the file's, or the one that holds all of them.

    Returns:
      {"parameters", "tensors", "bytes", "largest_tensor_bytes"}.

    Raises:
      ValueError: a target that exists or cannot be written, before anything is read; everything that
        `load_safetensors` refuses.
    """
    target = check_target(target)
    with opened_parameters(path, found, dtype) as parameters:
        sizes = [int(np.prod(p.shape)) for p in parameters.values()]
        each = [p.dtype.itemsize * s // (p.layers or 1) for p, s in zip(parameters.values(), sizes, strict=True)]
        total = sum(p.nbytes for p in parameters.values())
        free = shutil.disk_usage(target.parent).free
        if total > free:
            raise ValueError(f"{target}: needs {total} bytes, {free} are free there")
        with beside(target) as aside:
            aside.mkdir()
            made = aside / "weights"  # orbax writes beside it first, in `aside` too
            with _checkpointer(streaming=True) as checkpointer:
                checkpointer.save(made, unflatten_dict(parameters, sep="/"))
            _write_settings(made, found)
            os.replace(made, target)
        return {
            "parameters": sum(sizes),
            "tensors": sum(p.layers or 1 for p in parameters.values()),
            "bytes": total,
            "largest_tensor_bytes": max(each),
        }


def _write_settings(folder: pathlib.Path, found: Foreign) -> None:
    files = {str(f.relative_to(folder)): f for f in sorted(folder.rglob("*")) if f.is_file()}
    sums = {name: [f.stat().st_size, _checksum(f)] for name, f in files.items()}
    content: dict[str, Any] = {"files": sums}
    if found.kind:
        content["model"] = {"name": found.kind, **{k: v for k, v in found.geometry.items() if k != "dtype"}}
    text = json.dumps(content, sort_keys=True)
    (folder / SETTINGS).write_text(json.dumps({"difax": content, "checksum": zlib.crc32(text.encode())}, indent=1))


def _checksum(file: pathlib.Path) -> int:
    found = 0
    with file.open("rb") as f:
        while block := f.read(2**22):
            found = zlib.crc32(block, found)
    return found


def is_converted(path: str | os.PathLike) -> bool:
    """Whether a folder is an orbax checkpoint of parameters."""
    return any(os.path.isfile(os.path.join(path, name)) for name in (SETTINGS, "_METADATA"))


def converted_model(path: str | os.PathLike) -> dict[str, Any] | None:
    """The model that `convert` stored beside the arrays: its name and the arguments of its factory; None for a folder
    without it, which an older difax or another program wrote.

    Raises:
      ValueError: a file of it that is damaged.
    """
    model = _settings(pathlib.Path(path)).get("model")
    return None if model is None else {key: _tuples(value) for key, value in model.items()}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _settings(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / SETTINGS
    if not file.is_file():
        return {}
    try:
        found = read_json(file)
        content = found["difax"]
        fine = zlib.crc32(json.dumps(content, sort_keys=True).encode()) == found["checksum"]
    except (ValueError, TypeError, KeyError, RecursionError):
        fine, content = False, {}
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror or error}") from None
    if not fine:
        raise ValueError(f"{file}: damaged; convert the checkpoint again, or remove this file and name a configuration")
    return content


def _check_files(folder: pathlib.Path) -> None:
    """Raises ValueError naming the first file of a converted checkpoint that is missing or damaged."""
    stored = _settings(folder).get("files")
    if stored is None:  # no checksums: at least what cannot be read
        for file in sorted(folder.glob("*/.zarray")):
            _check_array(file.parent)
        return

    def fault(name: str) -> str | None:
        file, (size, checksum) = folder / name, stored[name]
        try:
            if file.stat().st_size != size:
                return f"{file}: damaged ({file.stat().st_size} bytes, expected {size})"
            return None if _checksum(file) == checksum else f"{file}: damaged (its checksum differs)"
        except OSError as error:
            return f"{file}: {'missing' if isinstance(error, FileNotFoundError) else error.strerror or error}"

    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = next(filter(None, pool.map(fault, sorted(stored))), None)
    if first is not None:
        raise ValueError(first)


def _check_array(folder: pathlib.Path) -> None:
    """Raises ValueError for a zarr array with a chunk that is missing, which would be read as zeros, or damaged."""
    try:
        spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder)}, "fill_missing_data_reads": False}
        array = ts.open(spec, read=True).result()
        for index in range(array.shape[0]) if array.rank else [...]:
            array[index].read().result()
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder}: missing or damaged ({_first_line(error)})") from None


def load_converted(path: str | os.PathLike, spec: Params) -> Params:
    """Reads what `convert` wrote, or any orbax checkpoint of a model's parameters.

    Args:
      path: the folder. spec: of the parameters; leaves with a `sharding` are restored onto it.

    Raises:
      ValueError: a folder that is no orbax checkpoint, or of other parameters; a file that is missing or damaged;
        values that are not finite.
    """
    path = pathlib.Path(path).absolute()
    _check_files(path)
    with _checkpointer(streaming=False) as checkpointer:
        stored = readable(lambda: checkpointer.metadata(path).item_metadata.tree, path)
        shapes = lambda tree: {  # noqa: E731
            jax.tree_util.keystr(p, simple=True, separator="/"): tuple(a.shape)
            for p, a in jax.tree_util.tree_leaves_with_path(tree)
        }
        here, wanted = shapes(stored), shapes(spec)
        for name in sorted(here.keys() | wanted.keys()):
            if here.get(name) != wanted.get(name):
                raise ValueError(f"{path}: parameter {name} is {here.get(name)}, expected {wanted.get(name)}")
        params = readable(lambda: checkpointer.restore(path, restore_args=jax.tree.map(_restored, spec)), path)
    for p, leaf in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(leaf).all()):
            name = jax.tree_util.keystr(p, simple=True, separator="/")
            raise ValueError(f"{path}: parameter {name} holds values that are not finite")
    return params


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def _restored(leaf: Any) -> type_handlers.ArrayRestoreArgs:
    """How one parameter is restored: as a jax array, in the dtype of the file, onto the sharding of its leaf."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return type_handlers.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)
