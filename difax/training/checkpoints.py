"""The checkpoints of a run, read back: whatever is wrong with them is one line that names the file or the folder."""

from __future__ import annotations

import itertools
import os
import pathlib
from collections.abc import Iterable
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


def restored(workdir: str | os.PathLike, checkpoints: ocp.CheckpointManager, step: int, like: Any = None) -> Any:
    """The state of a step.

    Args:
      workdir: the run's folder. like: shapes, types and shardings of the state; None restores what is there.

    Raises:
      ValueError: a checkpoint that is damaged or not finite (names its folder, and the step before it).
    """
    folder, how = pathlib.Path(workdir) / "checkpoints" / str(step), _instead(step, checkpoints.all_steps())
    for entry in itertools.chain([folder], folder.rglob("*")):
        if place_of(entry) == "other":  # a pipe would be waited for
            raise ValueError(f"{named(folder)}: its {named(entry.name)} is no regular file{how}")
    state = readable(lambda: checkpoints.restore(step, args=ocp.args.StandardRestore(like)), folder, how)
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
