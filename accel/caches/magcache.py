"""MagCache. Ma et al., MagCache: Fast Video Generation with Magnitude-Aware Cache, 2025, arXiv:2506.09045.

A calibration (the JSON file of `difax.accel.caches.measured`) has the key

  "ratios": [r_0, ..., r_{steps-1}], r_t = mean over tokens of ||R_t|| / ||R_{t-1}||, r_0 = 1,

R_t being what all blocks together add to the tokens at evaluation t; and "halves": 2 where the list has two numbers an
evaluation, of the conditional and of the unconditional half in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from difax.accel.caches import measured, published
from difax.accel.caches.span import Span, planned_span
from difax.core.annotations import checked
from difax.core.contracts import Accelerator, Row

# published by the authors; those of two halves have two numbers an evaluation
RATIOS = {name: tuple(fit["ratios"]) for name, fit in published.table("magcache").items()}
RATIOS |= {alias: RATIOS[name] for alias, name in published.ALIASES.items() if name in RATIOS}


@checked
def magcache(
    ratios: str | Sequence[float] | Sequence[Sequence[float]] | None = None,
    *,
    halves: int | None = None,
    file: str | None = None,
    threshold: float = 0.06,
    streak: int = 3,
    retention: float = 0.2,
    dtype: str | None = None,
) -> Accelerator:
    """Skips all blocks while the calibrated magnitude of what they add has drifted little since they last ran.

    From evaluation int(retention E + 1/2) on: a *= r_t, n += 1, err += |1 - a|; reuse iff err <= threshold and
    n <= streak: tokens += the whole stack's last residual; else compute, a = 1, n = 0, err = 0. With numbers for both
    halves of guidance each half has its own a and err, and err <= threshold is asked of every half that is evaluated:
    the halves run in one batch, and so neither drifts further than its numbers allow.

    Args:
      ratios: r_t, above 0, or the name of published ones (`RATIOS`), or two lists, of the conditional and of the
        unconditional half; those of a run of another length are taken at the nearest evaluation, index
        round(t (len - 1) / (E - 1)), of the half that they are of.
      halves: 1: one number an evaluation; 2: two, conditional and unconditional in turn, as the authors publish them
        for guided models (100 for the 50 steps of Wan 2.1). None: 2 for a list that is not as long as the run and
        begins with two ones, as those do, and for twice as many numbers as a guided run has evaluations; else 1.
      file: in place of them, a calibration.
      threshold: of the accumulated error, 0 or more (0.06; 0.12 and 0.24 with streaks of 2 to 6 in the authors'
        scripts).
      streak: reused evaluations in a row at most, 0 or more (3; FLUX 5).
      retention: fraction of the evaluations, at the start, that are always computed, 0 to 1 (0.2; FLUX 0.1).
      dtype: of the residual that is kept; None is the model's.

    Returns:
      An `Accelerator` that remembers one residual of the tokens; its plan is made before the run.

    References: Ma et al. 2025. Defaults, rounding and plans are those of diffusers 0.42's `MagCacheConfig`. To FLUX's
      text tokens, too, the residual is added, where diffusers passes them through unchanged. The authors' Wan decides
      for each half apart. Sums are in float64, as in the authors' code; diffusers has float32, which may decide
      otherwise where a sum is the threshold but for rounding. The authors' FLUX script forces one more evaluation.
    """
    if (ratios is None) == (file is None):
        raise ValueError(
            f"magcache: {'nothing' if file is None else 'ratios and file'} was given; allowed: the model's ratios "
            f"(numbers, or {', '.join(published.table('magcache'))}), or a file of them as difax calibrate --cache "
            "magcache writes"
        )
    if not threshold >= 0 or streak < 0 or not 0 <= retention <= 1:
        raise ValueError(
            f"magcache: threshold={threshold}, streak={streak}, retention={retention}; allowed: 0 or more, 0 or more, "
            "and 0 to 1"
        )
    if halves not in (None, 1, 2):
        raise ValueError(f"magcache: halves={halves!r}; allowed: 1, 2, or None")
    given, halves = _ratios(ratios, halves) if file is None else _measured(file, halves)

    def schedule(rows: Row, depth: int) -> list[Span | None]:
        evaluations = len(rows.i)
        first = int(retention * evaluations + 0.5)
        fresh = np.asarray(rows.fresh, bool)
        guided = np.asarray(rows.guided, bool)
        spans: list[Span | None] = []
        drift, skipped, error = np.float64(1.0), 0, np.float64(0.0)
        taken = nearest(given, evaluations, halves, bool(guided.any())).reshape(evaluations, -1)
        for t, ratio in enumerate(taken):
            reuse = False
            if t >= first:
                drift, skipped = drift * ratio, skipped + 1
                error = error + abs(1 - drift)
                seen = error if guided[t] else error[:1]
                reuse = t > 0 and not fresh[t] and bool((seen <= threshold).all()) and skipped <= streak
            if not reuse:
                drift, skipped, error = np.float64(1.0), 0, np.float64(0.0)
            spans.append((0, depth) if reuse else None)
        return spans

    named = isinstance(ratios, str)
    says = published.says("magcache", "ratios", ratios) if named else measured.record("magcache", file)
    return planned_span("magcache", schedule, dtype=dtype)._replace(measured=says)


def nearest(ratios: np.ndarray, evaluations: int, halves: int | None = None, guided: bool = True) -> np.ndarray:
    """The ratios of a run of another length, each that of the nearest evaluation, of the half that it is of.

    Args:
      ratios: [n] in the order of a list of `magcache`. halves: as there. guided: has the run both halves.

    Returns:
      [evaluations], or [evaluations, 2] where the list has two numbers an evaluation.
    """
    if halves is None:
        pairs = len(ratios) % 2 == 0 and len(ratios) > 2 and bool((ratios[:2] == 1).all())
        halves = 2 if (pairs and len(ratios) != evaluations) or (guided and len(ratios) == 2 * evaluations) else 1
    if halves == 2:
        ratios = ratios.reshape(-1, 2)
    if len(ratios) == evaluations:
        return ratios
    if evaluations == 1:
        return ratios[-1:]
    return ratios[np.round(np.arange(evaluations) * (len(ratios) - 1) / (evaluations - 1)).astype(int)]


def _ratios(ratios: Any, halves: int | None) -> tuple[np.ndarray, int | None]:
    """Numbers one after the other, and how many an evaluation has, where that is known."""
    if isinstance(ratios, str):
        _, fit = published.entry("magcache", "ratios", ratios)
        if halves not in (None, fit["halves"]):
            each = "one number each" if fit["halves"] == 1 else "two numbers each"
            raise ValueError(
                f"magcache: halves={halves} with ratios={ratios!r}; allowed: {fit['halves']}, or None: they have {each}"
            )
        return np.asarray(fit["ratios"], np.float64), fit["halves"]
    try:
        array = np.asarray(ratios)
        array = array.astype(np.float64) if array.dtype.kind in "iuf" else np.zeros(0)
    except ValueError:  # lists of different lengths
        array = np.zeros(0)
    if array.ndim == 2 and len(array) == 2:
        if halves == 1:
            raise ValueError("magcache: halves=1 with two lists of ratios; allowed: 2, or None")
        array, halves = array.T.ravel(), 2
    if array.ndim != 1 or len(array) < 1 or not (np.isfinite(array) & (array > 0)).all():
        raise ValueError(
            "magcache: ratios must be positive numbers, one or two for each evaluation of the calibrated run, or two "
            "lists of them, as long as each other"
        )
    if halves == 2 and len(array) % 2:
        raise ValueError(f"magcache: halves=2 with {len(array)} ratios; allowed: an even number of them")
    return array, halves


def _measured(file: str, halves: int | None) -> tuple[np.ndarray, int]:
    content, source = measured.read("magcache", file, ("ratios",)), measured.source("magcache", file)
    says = content.get("halves", 1)
    if says not in (1, 2) or halves not in (None, says):
        raise ValueError(f"{source}: halves={says!r}, of which halves={halves} is asked; allowed: 1 or 2, the same")
    ratios = measured.numbers(f"{source}: ratios", content["ratios"])
    if not (ratios > 0).all():
        raise ValueError(f"{source}: ratios: {ratios.min():g}; allowed: above 0")
    if "steps" in content and content["steps"] != len(ratios) / says or len(ratios) % says:
        raise ValueError(
            f"{source}: {len(ratios)} ratios of {content.get('steps')} evaluations; allowed: {says} for each of them"
        )
    return ratios, says
