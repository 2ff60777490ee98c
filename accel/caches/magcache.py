"""MagCache. Ma et al., MagCache: Fast Video Generation with Magnitude-Aware Cache, 2025, arXiv:2506.09045.

A calibration (the JSON file of `difax.accel.caches.measured`) has the key

  "ratios": [r_0, ..., r_{steps-1}], r_t = mean over tokens of ||R_t|| / ||R_{t-1}||, r_0 = 1,

R_t being what all blocks together add to the tokens at evaluation t.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from difax.accel.caches import measured
from difax.accel.caches.span import Span, planned_span
from difax.core.contracts import Accelerator, Row

# published by the authors
RATIOS = {
    "flux": (
        1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125, 1.02344, 0.98047, 1.01562,
        1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609, 0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359,
        0.89062,
    ),
}  # fmt: skip


def magcache(
    ratios: str | Sequence[float] | None = None,
    *,
    file: str | None = None,
    threshold: float = 0.06,
    streak: int = 3,
    retention: float = 0.2,
    dtype: str | None = None,
) -> Accelerator:
    """Skips all blocks while the calibrated magnitude of what they add has drifted little since they last ran.

    From evaluation int(retention E + 1/2) on: a *= r_t, n += 1, err += |1 - a|; reuse iff err <= threshold and
    n <= streak: tokens += the whole stack's last residual; else compute, a = 1, n = 0, err = 0.

    Args:
      ratios: r_t, or the name of published ones (`RATIOS`); those of a run of another length are taken at the nearest
        evaluation, index round(t (len - 1) / (E - 1)).
      file: in place of them, a calibration.
      threshold: of the accumulated error, 0 or more (0.06; 0.12 and 0.24 with streaks of 2 to 6 in the authors'
        scripts).
      streak: reused evaluations in a row at most, 0 or more (3; FLUX 5).
      retention: fraction of the evaluations, at the start, that are always computed, 0 to 1 (0.2; FLUX 0.1).
      dtype: of the residual that is kept; None is the model's.

    Returns:
      An `Accelerator` that remembers one residual of the tokens; its plan is made before the run.

    References: Ma et al. 2025. Defaults, rounding and plans are those of diffusers 0.42's `MagCacheConfig`. To FLUX's
      text tokens, too, the residual is added, where diffusers passes them through unchanged, and both halves of
      guidance share one list of ratios, where the authors' Wan has two. The authors' FLUX script forces one more
      evaluation.
    """
    if (ratios is None) == (file is None):
        raise ValueError(
            f"magcache: {'nothing' if file is None else 'ratios and file'} was given; allowed: the model's ratios "
            f"(numbers, or {', '.join(RATIOS)}), or a file of them as difax calibrate --cache magcache writes"
        )
    if not threshold >= 0 or streak < 0 or not 0 <= retention <= 1:
        raise ValueError(
            f"magcache: threshold={threshold}, streak={streak}, retention={retention}; allowed: 0 or more, 0 or more, "
            "and 0 to 1"
        )
    given = _ratios(ratios if file is None else measured.read("magcache", file, ("ratios",))["ratios"])

    def schedule(rows: Row, depth: int) -> list[Span | None]:
        evaluations = len(rows.i)
        first = int(retention * evaluations + 0.5)
        fresh = np.asarray(rows.fresh, bool)
        spans: list[Span | None] = []
        drift, skipped, error = 1.0, 0, 0.0
        for t, ratio in enumerate(nearest(given, evaluations)):
            reuse = False
            if t >= first:
                drift, skipped = drift * ratio, skipped + 1
                error += abs(1 - drift)
                reuse = t > 0 and not fresh[t] and error <= threshold and skipped <= streak
            if not reuse:
                drift, skipped, error = 1.0, 0, 0.0
            spans.append((0, depth) if reuse else None)
        return spans

    return planned_span("magcache", schedule, dtype=dtype)


def nearest(ratios: np.ndarray, evaluations: int) -> np.ndarray:
    """The ratios of a run of another length, each that of the nearest evaluation."""
    if len(ratios) == evaluations:
        return ratios
    if evaluations == 1:
        return ratios[-1:]
    return ratios[np.round(np.arange(evaluations) * (len(ratios) - 1) / (evaluations - 1)).astype(int)]


def _ratios(ratios: str | Sequence[float] | None) -> np.ndarray:
    if isinstance(ratios, str):
        if ratios not in RATIOS:
            raise ValueError(f"magcache: ratios={ratios!r}; allowed: numbers, or {', '.join(RATIOS)}")
        ratios = RATIOS[ratios]
    array = np.asarray(ratios, np.float64)
    if array.ndim != 1 or len(array) < 1 or not (array > 0).all():
        raise ValueError("magcache: ratios must be positive numbers, one for each evaluation of the calibrated run")
    return array
