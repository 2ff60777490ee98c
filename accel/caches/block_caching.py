"""Block caching. Wimbauer et al., Cache Me if You Can: Accelerating Diffusion Models through Block Caching, 2023.

A calibration (the JSON file of `difax.accel.caches.measured`) has the key

  "changes": {stage: {branch: c}}, c[l][i] = ||F_i - F_{i-1}||_1 / ||F_i||_1 of layer l, c[l][0] = null,

F being the branch's output before the gate, averaged over samples. The scale-shift adjustment is an .npz file with the
arrays "stage.branch.scale" and "stage.branch.shift", [L, E, D] or [L, E, 1], float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from difax.accel.caches import measured
from difax.accel.caches.planned import Schedule, planned
from difax.core.annotations import checked
from difax.core.contracts import Accelerator, Plan, Row, Stage, Where

NAME = "block_caching"
PARTS = ("scale", "shift")


@checked
def block_caching(
    changes: Mapping[str, Any] | None = None,
    *,
    file: str | None = None,
    threshold: float = 0.5,
    adjust: str | None = None,
    dtype: str | None = None,
) -> Accelerator:
    """Holds each branch of each layer until its calibrated change since it was last computed exceeds a threshold.

    acc += c[l][i]; computed iff acc > threshold, and then acc = 0. What is held is adjusted, channel by channel:
    scale[l, i] * F + shift[l, i], the identity where nothing was learned.

    Args:
      changes: {branch: c [L, E]}, or {stage: {branch: c}}; a branch that is not named is always computed.
      file: in place of them, a calibration.
      threshold: of the accumulated change, 0 or more (0.5; 0 of a real model computes all).
      adjust: file of a scale-shift adjustment; its numbers become learned parameters, so that they are part of what a
        gradient reaches, and of the parameters that `difax.core.stack.with_learned` returns. None is the identity.
      dtype: of what is held; None is the model's.

    Returns:
      An `Accelerator` that remembers one output per branch and layer.

    References: Wimbauer et al. 2023, arXiv:2312.03209, section 3.3 and 3.4; not checked against code: none is
      published. Their unit is a residual Transformer block of a U-Net, here a residual branch; their equation 7 adds
      up from the computed evaluation on, read here as the changes behind it. They predict scale and shift from the
      time embedding, which at the evaluations of one run is a table.
    """
    if (changes is None) == (file is None):
        raise ValueError(
            f"block_caching: {'nothing' if file is None else 'changes and file'} was given; allowed: changes, or a "
            "file of them as difax calibrate --cache block_caching writes"
        )
    if not threshold >= 0:
        raise ValueError(f"block_caching: threshold={threshold}; allowed: 0 or more")
    content: dict[str, Any] = {"changes": changes} if file is None else measured.read(NAME, file, ("changes", "steps"))
    learned = None if adjust is None else _adjustment(adjust)

    def schedule(rows: Row, stages: tuple[Stage, ...]) -> Schedule:
        evaluations, source = len(rows.i), measured.source(NAME, file)
        if file is not None:
            measured.same_length(source, content["steps"], evaluations)
        fresh = np.asarray(rows.fresh, bool)
        curves = measured.table(source, content["changes"], stages, lambda s: (s.depth, evaluations), read=behind_first)
        return {s: {b: refreshed(c, threshold, fresh) for b, c in of.items()} for s, of in curves.items()}

    def correct(value: Any, where: Where, row: Row) -> Any:
        if learned is None or f"{where.branch}.scale" not in learned.get(where.stage, {}):
            return value
        if not where.learned:
            raise ValueError("block_caching: the parameters hold no adjustment; see difax.core.stack.with_learned")
        scale, shift = (where.learned[f"{where.branch}.{part}"][row.i] for part in PARTS)
        return jax.tree.map(lambda v: (v * scale[None, None] + shift[None, None]).astype(v.dtype), value)

    held = planned(NAME, schedule, correct=correct, dtype=dtype)

    def plan(rows: Row, stages: tuple[Stage, ...]) -> Plan:
        if learned is not None:
            with measured.naming(adjust):
                _check(learned, len(rows.i), stages)
        return held.plan(rows, stages)

    return held._replace(plan=plan, learned=learned, measured=measured.record(NAME, file))


def behind_first(changes: np.ndarray) -> np.ndarray:
    """Of changes [L, E], which are read: all but the first evaluation's, before which there is none."""
    return np.broadcast_to(np.arange(changes.shape[-1]) > 0, changes.shape)


def refreshed(changes: np.ndarray, threshold: float, fresh: np.ndarray) -> np.ndarray:
    """Where layers with the changes c [L, E] are computed, bool [E, L]."""
    layers, evaluations = changes.shape
    computed = np.ones((evaluations, layers), bool)
    total = np.zeros(layers)
    for i in range(1, evaluations):
        total += changes[:, i]
        computed[i] = (total > threshold) | fresh[i]
        total[computed[i]] = 0.0
    return computed


def _adjustment(file: str) -> dict[str, dict[str, Any]]:
    """{stage: {"branch.scale": [L, E, D], "branch.shift": the same}}."""
    learned: dict[str, dict[str, Any]] = {}
    for key, array in measured.finite_arrays(NAME, file, "adjust").items():
        stage, _, name = key.partition(".")
        learned.setdefault(stage, {})[name] = jnp.asarray(array, jnp.float32)
    return learned


def _check(learned: Mapping[str, Mapping[str, Any]], evaluations: int, stages: tuple[Stage, ...]) -> None:
    names = {stage: dict.fromkeys(n.rpartition(".")[0] for n in of) for stage, of in learned.items()}
    depth = {s.name: s.depth for s in stages}
    for stage, branches in measured.by_stage(NAME, names, stages).items():
        for branch in branches:
            for part in PARTS:
                if f"{branch}.{part}" not in learned[stage]:
                    raise ValueError(f"block_caching: the adjustment of {stage}.{branch} has no {part}")
                shape = np.shape(learned[stage][f"{branch}.{part}"])
                measured.finite(f"block_caching: {stage}.{branch}.{part}", learned[stage][f"{branch}.{part}"])
                if len(shape) != 3 or shape[:2] != (depth[stage], evaluations):
                    raise ValueError(
                        f"block_caching: {stage}.{branch}.{part} is {shape}; allowed: ({depth[stage]}, {evaluations}, "
                        "channels), layers and evaluations of this run"
                    )
