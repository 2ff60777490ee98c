"""`difax convert`: a published safetensors checkpoint, of any number of shards, as an orbax one with difax's names.

Tensors are read and written one at a time, a stacked parameter layer by layer, so that a conversion holds one tensor
of the file in memory, however large the model.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax.traverse_util import unflatten_dict
from orbax.checkpoint import future, type_handlers

from difax.core.contracts import Params
from difax.core.files import beside
from difax.weights.checkpoint import Streamed
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


def convert(path: str | os.PathLike, target: str | os.PathLike, found: Foreign, dtype: Any = None) -> dict[str, Any]:
    """Writes the parameters of a checkpoint of another project as an orbax checkpoint.

    Args:
      path: a .safetensors file, the .index.json of a sharded one, or a folder that holds one of the two.
      target: a folder that does not exist yet; it appears whole or not at all.
      found: the model and the layout table of the file.
      dtype: floating dtype of the result; None keeps the file's.

    Returns:
      {"parameters", "tensors", "bytes", "largest_tensor_bytes"}.

    Raises:
      ValueError: a target that exists or cannot be written; everything that `load_safetensors` refuses, before
        anything is written.
    """
    target = pathlib.Path(target).absolute()
    if target.exists():
        raise ValueError(f"{target}: exists already; allowed: a folder that does not exist yet")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise ValueError(f"{target}: the folder {target.parent} does not exist or is not writable")
    with opened_parameters(path, found, dtype) as parameters:
        tree = unflatten_dict(parameters, sep="/")
        with beside(target) as aside, _checkpointer(streaming=True) as checkpointer:
            checkpointer.save(aside / "whole", tree)  # orbax writes beside it first, in `aside` too
            os.replace(aside / "whole", target)
        sizes = [int(np.prod(p.shape)) for p in parameters.values()]
        each = [p.dtype.itemsize * s // (p.layers or 1) for p, s in zip(parameters.values(), sizes, strict=True)]
        total = sum(p.dtype.itemsize * s for p, s in zip(parameters.values(), sizes, strict=True))
        return {
            "parameters": sum(sizes),
            "tensors": sum(p.layers or 1 for p in parameters.values()),
            "bytes": total,
            "largest_tensor_bytes": max(each),
        }


def is_converted(path: str | os.PathLike) -> bool:
    """Whether a folder is an orbax checkpoint of parameters."""
    return (pathlib.Path(path) / "_METADATA").is_file()


def load_converted(path: str | os.PathLike, spec: Params) -> Params:
    """Reads what `convert` wrote, or any orbax checkpoint of a model's parameters.

    Args:
      path: the folder. spec: of the parameters; leaves with a `sharding` are restored onto it.

    Raises:
      ValueError: a folder that is no orbax checkpoint, or of other parameters.
    """
    path = pathlib.Path(path).absolute()
    with _checkpointer(streaming=False) as checkpointer:
        try:
            stored = checkpointer.metadata(path).item_metadata.tree
        except (FileNotFoundError, ValueError, AttributeError, KeyError) as error:
            raise ValueError(f"{path}: not an orbax checkpoint ({error})") from None
        shapes = lambda tree: {  # noqa: E731
            jax.tree_util.keystr(p, simple=True, separator="/"): tuple(a.shape)
            for p, a in jax.tree_util.tree_leaves_with_path(tree)
        }
        here, wanted = shapes(stored), shapes(spec)
        for name in sorted(here.keys() | wanted.keys()):
            if here.get(name) != wanted.get(name):
                raise ValueError(f"{path}: parameter {name} is {here.get(name)}, expected {wanted.get(name)}")
        return checkpointer.restore(path, restore_args=jax.tree.map(_restored, spec))


def _restored(leaf: Any) -> type_handlers.ArrayRestoreArgs:
    """How one parameter is restored: as a jax array, in the dtype of the file, onto the sharding of its leaf."""
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return type_handlers.ArrayRestoreArgs(restore_type=jax.Array, sharding=sharding)
