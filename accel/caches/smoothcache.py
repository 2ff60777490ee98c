"""SmoothCache. Liu et al., SmoothCache: A Universal Inference Acceleration Technique for Diffusion Transformers, 2024.

A calibration (the JSON file of `difax.accel.caches.measured`) has the keys "kmax" and

  "errors": {stage: {branch: e}}, e[i][k - 1] = ||F_i - F_{i+k}||_1 / ||F_{i+k}||_1, k = 1 ... kmax

for every evaluation i (null where i + k is not one any more), F being the branch's output before the gate, e averaged
over layers and samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from difax.accel.caches import measured
from difax.accel.caches.planned import Schedule, planned
from difax.core.annotations import checked
from difax.core.contracts import Accelerator, Row, Stage

NAME = "smoothcache"


@checked
def smoothcache(
    schedule: Mapping[str, Any] | None = None,
    *,
    errors: Mapping[str, Any] | None = None,
    file: str | None = None,
    alpha: float = 0.18,
    dtype: str | None = None,
) -> Accelerator:
    """Computes each kind of branch where a calibrated schedule says so and holds its output, before the gate, between.

    From evaluation i, which is computed, the next k are held, k the largest with e(i, k) <= alpha (0 if there is
    none), and i + k + 1 is computed; the first and the last always are.

    Args:
      schedule: {branch: [E] of 1 (compute) and 0 (hold)}, or [E, L] where layers differ; a branch that is not named
        is always computed.
      errors: in place of a schedule, {branch: e [E, kmax]}, or {stage: {branch: e}}.
      file: in place of both: a calibration, or a schedule as the authors publish them ({"attn": [...], "mlp": [...]},
        or per layer {"attn-0": [...], ...}).
      alpha: highest error that is accepted, 0 or more (0.08 to 0.35 for DiT-XL; 0 of a real model computes all).
      dtype: of what is held; None is the model's.

    Returns:
      An `Accelerator` that remembers one output per branch and layer that is ever held.

    References: Liu et al. 2024, arXiv:2411.10510. The greedy choice is the authors' calibration code's; from errors
      measured elsewhere it gives their published schedules only if those errors are the same.
    """
    given = [k for k, v in {"schedule": schedule, "errors": errors, "file": file}.items() if v is not None]
    if len(given) != 1:
        raise ValueError(
            f"smoothcache: {' and '.join(given) or 'nothing'} was given; allowed: one of schedule, errors and file, "
            "such as difax calibrate --cache smoothcache writes"
        )
    if not alpha >= 0:
        raise ValueError(f"smoothcache: alpha={alpha}; allowed: 0 or more")
    steps = None
    if file is not None:
        schedule = _published(file)
        if schedule is None:
            content = measured.read(NAME, file, ("errors", "steps"))
            errors, steps = content["errors"], content["steps"]
    if errors is not None:
        measured.check_named(measured.source(NAME, file), errors)

    def flags(rows: Row, stages: tuple[Stage, ...]) -> Schedule:
        evaluations = len(rows.i)
        if schedule is not None:
            return _checked(measured.source(NAME, file), schedule, evaluations, stages)
        assert errors is not None
        source = measured.source(NAME, file)
        if file is not None:
            measured.same_length(source, steps, evaluations)
        curves = measured.table(source, errors, stages, lambda stage: (evaluations, None), read=lambda e: ~np.isnan(e))
        for stage, branch, e in ((s, b, e) for s, of in curves.items() for b, e in of.items()):
            if within(e).any() and np.isnan(e[within(e)]).all():
                raise ValueError(f"{source}: the numbers of {stage}.{branch} are null; allowed: an error or more")
        return {s: {b: greedy(e, alpha) for b, e in of.items()} for s, of in curves.items()}

    return planned(NAME, flags, dtype=dtype)._replace(measured=measured.record(NAME, file))


def within(errors: np.ndarray) -> np.ndarray:
    """Of errors [E, kmax], which are of two evaluations of the run: i + k < E."""
    i, k = np.indices(errors.shape)
    return np.asarray(i + k + 1 < len(errors))


def greedy(errors: np.ndarray, alpha: float) -> np.ndarray:
    """Where a branch with the errors e [E, kmax] is computed, bool [E]."""
    evaluations, kmax = errors.shape
    full, i = np.zeros(evaluations, bool), 0
    while i < evaluations:
        full[i] = True
        reach = min(kmax, evaluations - 1 - i)
        i += 1 + max((k for k in range(1, reach + 1) if errors[i, k - 1] <= alpha), default=0)
    full[-1] = True
    return full


def _published(file: str) -> dict[str, Any] | None:
    """The schedule of a file in the authors' layout, per branch or (layer, branch); None for another layout."""
    content = measured.load(NAME, file)
    if not isinstance(content, dict) or "technique" in content:
        return None
    layers: dict[str, dict[int, Any]] = {}
    whole: dict[str, Any] = {}
    for key, steps in content.items():
        branch, dash, layer = key.rpartition("-")
        if dash and layer.isdecimal():
            layers.setdefault(branch, {})[int(layer)] = steps
        else:
            whole[key] = steps
    for branch, of in layers.items():
        lengths = {len(steps) if isinstance(steps, list) else -1 for steps in of.values()}
        if sorted(of) != list(range(len(of))) or len(lengths) > 1 or -1 in lengths:
            raise ValueError(
                f"{measured.source(NAME, file)}: the schedules of {branch} are of the layers "
                f"{', '.join(map(str, sorted(of)))}; allowed: one of each layer from 0 on, lists of one length"
            )
    return whole | {b: np.transpose([of[i] for i in sorted(of)]) for b, of in layers.items()}


def _checked(source: str, schedule: Mapping[str, Any], evaluations: int, stages: tuple[Stage, ...]) -> Schedule:
    depth = {s.name: s.depth for s in stages}
    nested = measured.by_stage(source, schedule, stages)
    if not any(nested.values()):
        raise ValueError(f"{source}: an empty schedule; allowed: one of a branch or more")
    checked: Schedule = {}
    for stage, of in nested.items():
        checked[stage] = {}
        for branch, steps in of.items():
            try:
                flags = np.asarray(steps)
            except ValueError:  # lists of different lengths
                flags = np.zeros(0)
            if flags.shape not in {(evaluations,), (evaluations, depth[stage])} or not np.isin(flags, (0, 1)).all():
                raise ValueError(
                    f"{source}: the schedule of {branch} is {' x '.join(map(str, flags.shape))}; allowed: 1 and 0 "
                    f"for each of the run's {evaluations} evaluations, or of its {depth[stage]} layers too"
                )
            checked[stage][branch] = flags.astype(bool)
    return checked
