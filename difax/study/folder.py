"""The folder of a sweep, read back: what it is of, its rows and its images, checked before they are used."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np

from difax.core.arrays import opened_arrays
from difax.core.files import check_object, named, place_of, read_object, read_rows

IMAGES = 2**30  # bytes of a method's images
NUMBER = (int, float)
MISSING = type(None)
# what every row has, what it may have, and what a measured one has in its parts
ROW = {"method": str, "family": str, "settings": dict, "quality": (dict, MISSING), "speed": (dict, MISSING)}
ROW |= {"cost": (dict, MISSING), "decisions": (dict, MISSING), "refused": (str, MISSING), "date": (str, MISSING)}
MEASURED: dict[str, dict[str, Any]] = {
    "speed": {"ratio": NUMBER, "realised": NUMBER, "turns": list},
    "cost": {"ratio": NUMBER},
    "quality": {},
    "decisions": {},
}


def read_sweep(folder: str | os.PathLike) -> dict[str, Any]:
    """What a folder is a sweep of, whose names load no code.

    Raises:
      ValueError: a folder that is none, or a sweep.json that is damaged.
    """
    path = pathlib.Path(folder) / "sweep.json"
    if place_of(path) is None:
        raise ValueError(f"{named(folder)}: no sweep.json there; allowed: a folder that difax pareto wrote")
    sweep = read_object(path, "what difax pareto wrote", finite=False, config=dict)
    for section in ("model", "solver"):
        part = sweep["config"].get(section, {})
        check_object(part, f"{named(path)}: config.{section}", name=(str, MISSING))
    return sweep


def read_measured(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a sweep's folder; [] where nothing is measured yet, and without a last line that was cut off.

    Raises:
      ValueError: a line that is no row of a sweep (names it).
    """
    path = pathlib.Path(folder) / "rows.jsonl"
    rows = read_rows(path, **ROW)
    for number, row in enumerate(rows, 1):
        where = f"{named(path)}: line {number}"
        if row.get("speed") is not None:
            for part, kinds in MEASURED.items():
                check_object(row.get(part), f"{where}: {part}", **kinds)
            if row["speed"]["turns"]:  # none where the sweep was told to time none
                _check_numbers(row["speed"]["turns"], f"{where}: turns")
        for name, figure in (row.get("quality") or {}).items():
            if figure is not None:
                _check_numbers(figure, f"{where}: quality {name[:80]!r}", 3, (*NUMBER, MISSING))
    return rows


def _check_numbers(value: Any, where: str, count: int | None = None, kinds: tuple[type, ...] = NUMBER) -> None:
    fits = isinstance(value, list) and len(value) > 0 and count in (None, len(value))
    if not fits or any(isinstance(x, bool) or not isinstance(x, kinds) for x in value):
        raise ValueError(f"{where} is {str(value)[:80]}; allowed: a list of {count or 'some'} numbers")


def read_image_file(path: str | os.PathLike) -> np.ndarray:
    """The images of one method, uint8 [n, H, W, C] or [n, F, H, W, C].

    Raises:
      ValueError: a file that is not what `difax pareto` writes; says how to go on.
    """
    allowed = "images, uint8 [n, H, W, C] or [n, F, H, W, C]"
    try:
        with opened_arrays(path, allowed, IMAGES) as found:
            stored = found.get("images")
            if stored is None or stored.dtype != np.uint8 or len(stored.shape) not in (4, 5) or 0 in stored.shape:
                there = ", ".join(f"{k} {a.dtype} {list(a.shape)}" for k, a in found.items())[:200]
                raise ValueError(f"it holds {there or 'nothing'}; allowed: {allowed}")
            return stored.read()
    except ValueError as error:
        raise ValueError(
            f"{named(path)}: no images of difax pareto ({str(error).removeprefix(f'{named(path)}: ')}); delete the "
            "file, and the report leaves them out; delete the method's line in rows.jsonl too, and the same command "
            "draws them anew"
        ) from None
