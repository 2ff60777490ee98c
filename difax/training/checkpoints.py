"""The checkpoints of a run, read back: whatever is wrong with them is one line that names the file or the folder."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from difax.core.files import read_object
from difax.weights.orbax_errors import readable


def open_checkpoints(workdir: str | os.PathLike, **options: Any) -> ocp.CheckpointManager:
    """The checkpoints of a run.

    Args:
      workdir: the run's folder. options: of `orbax.checkpoint.CheckpointManager`.

    Raises:
      ValueError: what is there says nothing of its steps (names the file).
    """
    folder = pathlib.Path(workdir).absolute() / "checkpoints"
    for file in sorted(folder.glob("*/_CHECKPOINT_METADATA")):
        read_object(file, "what a checkpoint says of itself")
    return readable(lambda: ocp.CheckpointManager(folder, **options), folder, "")


def restored(workdir: str | os.PathLike, checkpoints: ocp.CheckpointManager, step: int, like: Any = None) -> Any:
    """The state of a step.

    Args:
      workdir: the run's folder. like: shapes, types and shardings of the state; None restores what is there.

    Raises:
      ValueError: a checkpoint that is damaged, of no training run, or not finite (names its folder, and the step that
        there is beside it).
    """

    def read() -> Any:
        state: Any = checkpoints.restore(step, args=ocp.args.StandardRestore(like))
        fields = state if isinstance(state, dict) else state._asdict()
        for name in ("step", "params", "ema", "optimizer"):
            if name not in fields:
                raise ValueError(f"it has no {name}")
        for where, leaf in jax.tree_util.tree_leaves_with_path({k: fields[k] for k in ("params", "ema")}):
            if not np.all(np.isfinite(np.asarray(leaf, np.float32))):
                raise ValueError(f"{jax.tree_util.keystr(where, simple=True, separator='/')} is not finite")
        return state

    before = max((s for s in checkpoints.all_steps() if s < step), default=None)
    go_on = "" if before is None else f"; without this folder the run goes on from step {before}"
    return readable(read, pathlib.Path(workdir) / "checkpoints" / str(step), go_on)
