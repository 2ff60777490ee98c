"""Learned routers: a trained score per evaluation, layer and branch says what is computed.

Learning-to-Cache (L2C): Ma et al., Learning-to-Cache: Accelerating Diffusion Transformer via Layer Caching, 2024,
arXiv:2406.01733. HarmoniCa: Huang et al., HarmoniCa: Harmonizing Training and Inference for Better Feature Caching in
Diffusion Transformer Acceleration, 2024, arXiv:2410.01723.

Logits are [E, L, branches] per stage, evaluations counted from the noise, branches in the order of `Stage.branches`.
A file is an .npz with one such array per stage, named as the stage. The authors' routers are numbered from the image
and hold attention and MLP of each layer in turn: logits = prob [steps, 2 L].reshape(steps, L, 2)[::-1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from difax.accel.caches import measured
from difax.accel.caches.planned import Schedule, planned
from difax.core.annotations import checked
from difax.core.contracts import Accelerator, Row, Stage

# [E, L, branches], or {stage: the same}
Array = np.ndarray | Sequence[Sequence[Sequence[float]]]
Logits = Array | Mapping[str, Array]


@checked
def learning_to_cache(
    logits: Logits | None = None, *, file: str | None = None, threshold: float = 0.1, dtype: str | None = None
) -> Accelerator:
    """Every second evaluation is a full one; in the others a branch is computed iff its router says so, else held.

    With s = E - 1 - i, the authors' step: all is computed at odd s (and at the first evaluation); at even s branch b
    of layer l is computed iff sigmoid(logits[i, l, b]) > threshold, and what stands in is the output before the gate
    of the full evaluation before.

    Args:
      logits: of the routers (see above); an array for a model of one stage, or {stage: array}.
      file: in place of them, an .npz.
      threshold: of the sigmoid, 0 (all is computed) to 1 (0.1; 0.9 for 512 x 512).
      dtype: of what is held; None is the model's.

    Returns:
      An `Accelerator` that remembers one output per branch and layer.

    References: Ma et al. 2024, by the rule of horseee/learning-to-cache (DiT/models/dynamic_models.py). Of the authors'
      router for 50 steps the plan is, entry by entry, the schedule that SmoothCache's authors publish for L2C.
    """
    return _routed("learning_to_cache", logits, file, threshold, dtype, every_second=True)


@checked
def harmonica(
    logits: Logits | None = None, *, file: str | None = None, threshold: float = 0.1, dtype: str | None = None
) -> Accelerator:
    """A branch is computed iff its router says so, else the last output that was computed is held.

    Computed iff sigmoid(logits[i, l, b]) > threshold; the first evaluation is a full one, any later one may hold.

    Args:
      logits, file, threshold, dtype: as in `learning_to_cache`.

    References: Huang et al. 2024, by the rule of ModelTC/HarmoniCa (models/dynamic_models.py).
    """
    return _routed("harmonica", logits, file, threshold, dtype, every_second=False)


def _routed(
    name: str, logits: Any, file: str | None, threshold: float, dtype: str | None, every_second: bool
) -> Accelerator:
    if (logits is None) == (file is None):
        raise ValueError(
            f"{name}: {'nothing' if file is None else 'logits and file'} was given; allowed: the logits of trained "
            "routers, or a file of them (.npz, one array [E, L, branches] per stage)"
        )
    if not 0 <= threshold <= 1:
        raise ValueError(f"{name}: threshold={threshold}; allowed: 0 to 1")
    given = logits if file is None else _stored(name, file)

    def schedule(rows: Row, stages: tuple[Stage, ...]) -> Schedule:
        i = np.asarray(rows.i)
        full = (i == 0) | ((len(i) - 1 - i) % 2 == 1) if every_second else i == 0
        flags: Schedule = {}
        with measured.naming(file):
            scores = _per_stage(name, given, len(i), stages)
        for stage in stages:
            computed = full[:, None, None] | (1 / (1 + np.exp(-scores[stage.name])) > threshold)
            flags[stage.name] = {b: computed[:, :, j] for j, b in enumerate(stage.branches)}
        return flags

    return planned(name, schedule, dtype=dtype)


def _stored(name: str, file: str) -> dict[str, np.ndarray]:
    return measured.finite_arrays(name, file)


def _per_stage(name: str, given: Any, evaluations: int, stages: tuple[Stage, ...]) -> dict[str, np.ndarray]:
    if not isinstance(given, Mapping):
        if len(stages) > 1:
            names = ", ".join(s.name for s in stages)
            raise ValueError(f"{name}: one array of logits; allowed for this model: one for each stage of {names}")
        given = {s.name: given for s in stages}
    scores = {}
    for stage in stages:
        want = (evaluations, stage.depth, len(stage.branches))
        if stage.name not in given:
            raise ValueError(
                f"{name}: no logits for the stage {stage.name}; there are some for {', '.join(map(str, given))}"
            )
        array = measured.finite(f"{name}: logits of {stage.name}", given[stage.name]).astype(np.float64)
        if array.shape != want:
            raise ValueError(
                f"{name}: the logits of {stage.name} are {array.shape}; allowed: {want}, evaluations of this run, "
                f"layers, and branches ({', '.join(stage.branches)})"
            )
        scores[stage.name] = array
    measured.by_stage(name, {s: {} for s in given}, stages)
    return scores
