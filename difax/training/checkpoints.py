"""The checkpoints of a run, read back: whatever is wrong with them is one line that names the file or the folder."""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from difax.core.files import named, place_of, read_object
from difax.weights.orbax_errors import readable


def open_checkpoints(workdir: str | os.PathLike, **options: Any) -> ocp.CheckpointManager:
    """The checkpoints of a run.

    Args:
      workdir: the run's folder. options: of `orbax.checkpoint.CheckpointManager`.

    Raises:
      ValueError: what is there says nothing of its steps (names the file, and the step before it).
    """
    folder = pathlib.Path(workdir).absolute() / "checkpoints"
    steps = sorted(int(p.parent.name) for p in folder.glob("*/_CHECKPOINT_METADATA") if p.parent.name.isdigit())
    for step in steps:
        try:
            read_object(folder / str(step) / "_CHECKPOINT_METADATA", "what a checkpoint says of itself")
        except ValueError as error:
            raise ValueError(f"{folder / str(step)}: {error}{_instead(step, steps)}") from None
    return readable(lambda: ocp.CheckpointManager(folder, **options), folder)


def restored(workdir: str | os.PathLike, checkpoints: ocp.CheckpointManager, step: int, like: Any) -> Any:
    """The state of a step, each leaf read straight to where it is to lie, whatever devices it was written from.

    Args:
      workdir: the run's folder. like: shapes, types and shardings of the state.

    Raises:
      ValueError: a checkpoint that is damaged or not finite (names its folder, and the step before it).
    """
    folder, how = _step_folder(workdir, checkpoints, step)
    state = readable(lambda: checkpoints.restore(step, args=ocp.args.StandardRestore(like)), folder, how)
    return _checked(state, folder, how)


def restored_part(
    workdir: str | os.PathLike,
    checkpoints: ocp.CheckpointManager,
    step: int,
    part: str,
    check: Callable[[Any], None],
    sharding: Any = None,
) -> Any:
    """One part of the state of a step, such as "ema"; nothing else of it is read.

    Args:
      workdir: the run's folder. check: is given the shapes and types that are stored, before any of it is read.
      sharding: of every leaf, or a tree of them; None is the first device of this process.

    Raises:
      ValueError: a checkpoint that is damaged, not finite or has no such part; whatever `check` raises.
    """
    folder, how = _step_folder(workdir, checkpoints, step)
    item = folder.absolute() / "default"  # orbax's name for the only thing in a step
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0]) if sharding is None else sharding
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        stored = readable(lambda: reader.metadata(item).item_metadata.tree, folder, how)  # type: ignore[union-attr]
        if not isinstance(stored, dict) or not isinstance(stored.get(part), dict):
            raise ValueError(f"{named(folder)}: no part {part} in it")
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), stored[part])
        check(shapes)
        where = jax.tree.map(lambda _: sharding, shapes) if isinstance(sharding, jax.sharding.Sharding) else sharding
        how_read = jax.tree.map(lambda s: ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=s), where)
        asked = ocp.args.PyTreeRestore({part: shapes}, restore_args={part: how_read}, partial_restore=True)
        found = readable(lambda: reader.restore(item, args=asked), folder, how)[part]
    return _checked(found, folder, how)


def _step_folder(workdir: str | os.PathLike, checkpoints: ocp.CheckpointManager, step: int) -> tuple[pathlib.Path, str]:
    """The folder of a step, in which nothing is waited for, and what to do without it."""
    folder, how = pathlib.Path(workdir) / "checkpoints" / str(step), _instead(step, checkpoints.all_steps())
    for entry in itertools.chain([folder], folder.rglob("*")):
        if place_of(entry) == "other":  # a pipe would be waited for
            raise ValueError(f"{named(folder)}: its {named(entry.name)} is no regular file{how}")
    return folder, how


def _checked(state: Any, folder: pathlib.Path, how: str) -> Any:
    bad = not_finite(state)
    if bad:
        raise ValueError(f"{named(folder)}: {bad[0]} is not finite{how}")
    return state


def _instead(step: int, steps: Iterable[int]) -> str:
    """What to do without a checkpoint, as the end of a message."""
    before = max((s for s in steps if s < step), default=None)
    return "; there is no earlier one" if before is None else f"; remove that folder to go on from step {before}"


@jax.jit
def _finite(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.all(jnp.isfinite(a)), tree)


def not_finite(tree: Any) -> list[str]:
    """Paths of the arrays of a tree that hold an infinity or a nan."""
    found = jax.tree_util.tree_leaves_with_path(jax.device_get(_finite(tree)))
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, finite in found if not finite]
