"""What was measured on a model before the run: the tables that a cache plans from, and the files that hold them.

A file is one JSON object, written by `difax calibrate`:

  {"technique": "smoothcache",                     the cache that plans from it
   "model": "dit-XL/2", "solver": "ddim",          what was run
   "steps": 50,                                    model evaluations of that run
   "data": "16 samples, seed 0, guidance 1.5",     on what, in words
   "kmax": 3,                                      settings of the technique, if it has some
   "errors": {stage: {branch: nested lists}}}      its table, or several

null in a table is a value that does not exist. Technique, evaluations, stages and branches must be those of the run;
the rest tells a reader what the numbers are worth.
"""

from __future__ import annotations

import contextlib
import difflib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from difax.core.contracts import Stage
from difax.core.files import check_finite, place_of, read_arrays, read_json, replacing


def load(technique: str, file: str) -> Any:
    """What a JSON file holds.

    Raises:
      ValueError: no such file, or no JSON.
    """
    if place_of(file) is None:
        raise ValueError(f"{technique}: file={file!r}: no such file")
    try:
        return read_json(file, "a JSON file of difax calibrate")
    except ValueError as error:
        raise ValueError(f"{technique}: file={file!r} is not JSON: {error}") from None


def read(technique: str, file: str, tables: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object of a calibration.

    Raises:
      ValueError: as `load`, or a file of another technique, or one without a table that is asked for.
    """
    content = load(technique, file)
    found = content.get("technique") if isinstance(content, dict) else None
    if found != technique:
        raise ValueError(f"{technique}: file={file!r} was measured for {found}; allowed: {technique}")
    for key in tables:
        if key not in content:
            raise ValueError(f"{technique}: file={file!r} has no {key!r}; it has {', '.join(sorted(content))}")
    return content


def by_stage_arrays(technique: str, file: str, wrote: str = "") -> dict[str, dict[str, np.ndarray]]:
    """{stage: {name: array}} of an .npz file whose arrays are named "stage.name".

    Args:
      wrote: what the error says of allowed files.

    Raises:
      ValueError: no such file, or another suffix.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, array in finite_arrays(technique, file, wrote=wrote).items():
        stage, _, name = key.partition(".")
        found.setdefault(stage, {})[name] = array
    return found


def given_or_read(
    technique: str, name: str, given: Any, file: str | None, wrote: str = ""
) -> Mapping[str, Mapping[str, Any]] | None:
    """{stage: {name: array}} as it was given, or as `by_stage_arrays` reads it; None where neither was.

    Raises:
      ValueError: both were given, or as `by_stage_arrays`.
    """
    if given is not None and file is not None:
        raise ValueError(f"{technique}: {name} and file were both given; allowed: one of them")
    return given if file is None else by_stage_arrays(technique, file, wrote)


def save_by_stage(path: str | pathlib.Path, arrays: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Writes the .npz that `by_stage_arrays` reads, in float32."""
    flat: dict[str, Any] = {f"{stage}.{n}": np.float32(a) for stage, of in arrays.items() for n, a in of.items()}
    with replacing(path) as aside, open(aside, "wb") as out:
        np.savez(out, **flat)


def same_length(technique: str, steps: int, evaluations: int) -> None:
    """Refuses what was measured over another number of evaluations."""
    if steps != evaluations:
        raise ValueError(f"{technique}: measured over {steps} evaluations; allowed: the {evaluations} of this run")


def by_stage(technique: str, given: Mapping[str, Any], stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
    """{stage: {branch: value}} of the same, or of {branch: value}, which speaks of every stage that has the branch.

    Raises:
      ValueError: a stage or branch that the model does not have (with the nearest match).
    """
    if all(isinstance(value, Mapping) for value in given.values()):
        for stage in given:
            _known(technique, "stage", stage, [s.name for s in stages])
        nested = {s.name: dict(given.get(s.name, {})) for s in stages}
    else:
        for branch in given:
            _known(technique, "branch", branch, [b for s in stages for b in s.branches])
        nested = {s.name: {b: given[b] for b in s.branches if b in given} for s in stages}
    for s in stages:
        for branch in nested[s.name]:
            _known(technique, f"branch of {s.name}", branch, s.branches)
    return nested


def table(
    technique: str,
    given: Mapping[str, Any],
    stages: tuple[Stage, ...],
    shape: Callable[[Stage], tuple[int | None, ...]],
) -> dict[str, dict[str, np.ndarray]]:
    """A table as float64 arrays, null as nan.

    Args:
      shape: stage -> the shape of one branch's numbers; None is any length.

    Raises:
      ValueError: names that the model does not have, or numbers of another shape.
    """
    nested = by_stage(technique, given, stages)
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for stage in stages:
        arrays[stage.name] = {}
        for branch, numbers in nested[stage.name].items():
            want = shape(stage)
            try:
                array = np.asarray(numbers, np.float64)
            except (TypeError, ValueError):
                raise ValueError(f"{technique}: the numbers of {stage.name}.{branch} are no table") from None
            fits = array.ndim == len(want) and all(w in (None, n) for w, n in zip(want, array.shape, strict=True))
            if not fits:
                allowed = " x ".join("any" if w is None else str(w) for w in want)
                raise ValueError(
                    f"{technique}: the numbers of {stage.name}.{branch} are {' x '.join(map(str, array.shape))}; "
                    f"allowed: {allowed}"
                )
            arrays[stage.name][branch] = array
    return arrays


def _known(technique: str, kind: str, name: str, allowed: Any) -> None:
    names = list(dict.fromkeys(allowed))
    if name not in names:
        near = difflib.get_close_matches(str(name), names, 1, 0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{technique}: no {kind} {name!r} in this model{hint}; allowed: {', '.join(names)}")


def finite_arrays(technique: str, file: str, key: str = "file", wrote: str = "") -> dict[str, np.ndarray]:
    """The arrays of an .npz file that a technique plans from: numbers, all of them finite.

    Args:
      key: under which the file was named. wrote: what the error says of allowed files.

    Raises:
      ValueError: no such file, another suffix, or one that is damaged or empty (names the array).
    """
    where = f"{technique}: {key}={file!r}"
    if place_of(file) is None or pathlib.Path(file).suffix != ".npz":
        raise ValueError(f"{where}; allowed: an .npz file{wrote}")
    try:
        found = read_arrays(file, f"an .npz file{wrote}")
    except ValueError as error:
        raise ValueError(f"{technique}: {key}={error}") from None
    wrong = [name for name, array in found.items() if array.dtype.kind not in "biuf" or not array.size]
    if wrong or not found:
        what = f"the array {wrong[0]!r} is {found[wrong[0]].dtype} {list(found[wrong[0]].shape)}" if wrong else "empty"
        raise ValueError(f"{where}: {what}; allowed: arrays of numbers")
    with np.errstate(over="ignore"):
        check_finite({name: array.astype(np.float32) for name, array in found.items()}, where)  # as it is computed with
    return found


@contextlib.contextmanager
def naming(file: str | None) -> Iterator[None]:
    """What is refused of numbers that came from a file names the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} (in {file})" if file and file not in str(error) else str(error)) from None
