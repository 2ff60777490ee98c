"""What was measured on a model before the run: the tables that a cache plans from, and the files that hold them.

A file is one JSON object, written by `difax calibrate`:

  {"technique": "smoothcache",                     the cache that plans from it
   "model": "dit-XL/2", "solver": "ddim",          what was run
   "stages": {"blocks": {"depth": 28, "branches": ["attn", "mlp"]}},
   "steps": 50,                                    model evaluations of that run
   "guide": "cfg", "scale": 1.5,                   how it was guided
   "data": "16 samples, seed 0, guidance 1.5",     on what, in words
   "kmax": 3,                                      settings of the technique, if it has some
   "errors": {stage: {branch: nested lists}}}      its table, or several

null in a table is a value that does not exist. Technique, stages and branches must be those of the run, and evaluations
and depth where the table has them; what else differs is warned of by `compare`. An .npz file of learned arrays says the
same of itself in the comment of its archive.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import pathlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from difax.core.arrays import check_finite, read_arrays, read_comment, save_arrays
from difax.core.contracts import Stage
from difax.core.files import check_object, named, parse_json, place_of, read_json
from difax.core.shell import DifaxWarning


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
        raise ValueError(f"{technique}: file={file!r}: {str(error).removeprefix(f'{named(file)}: ')}") from None


def read(technique: str, file: str, tables: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object of a calibration.

    Raises:
      ValueError: as `load`, or a file of another technique, or one without a table that is asked for, or with numbers
        that are not finite in it.
    """
    content = load(technique, file)
    found = content.get("technique") if isinstance(content, dict) else None
    if found != technique:
        raise ValueError(f"{technique}: file={file!r} was measured for {str(found)[:80]}; allowed: {technique}")
    for key in tables:
        if key not in content:
            raise ValueError(f"{technique}: file={file!r} has no {key!r}; it has {_short(sorted(content))}")
    return content


def source(technique: str, file: str | None) -> str:
    """What errors begin with: the technique, and the file if the numbers came from one."""
    return technique if file is None else f"{technique}: file={file!r}"


def numbers(what: str, given: Any) -> np.ndarray:
    """A list of numbers as float64 [n].

    Args:
      what: what errors begin with.

    Raises:
      ValueError: no list of one or more finite numbers.
    """
    try:
        array = np.asarray(given if isinstance(given, (np.ndarray, Mapping)) else list(given))
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.ndim != 1 or not len(array) or array.dtype.kind not in "iuf":
        raise ValueError(f"{what}: {_short(given)}; allowed: a list of one or more numbers")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        at = int(np.argmin(np.isfinite(array)))
        raise ValueError(f"{what}: {array[at]} at {at}; allowed: finite numbers")
    return array


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:77]}..."


class MeasuredElsewhere(DifaxWarning):
    """A cache plans from what was measured in another run, or a grid or a solver was fitted to one."""


def record(technique: str, file: str | None) -> tuple[Mapping[str, Any], ...]:
    """What a calibration says of itself, for `Accelerator.measured`: () for no file, or one that says nothing.

    Returns:
      (one mapping,) with "technique" and "file", and of `SAYS` the keys that the file has.
    """
    if file is None:
        return ()
    if pathlib.Path(file).suffix == ".npz":
        comment = read_comment(file)
        content = parse_json(comment, f"{source(technique, file)}: its comment") if comment else {}
    else:
        content = load(technique, file)
    content = check_object(content, source(technique, file))
    found = {key: content[key] for key in SAYS if key in content}
    return ({"technique": technique, "file": file, **found},) if found else ()


def fitted_record(kind: str, section: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """What the file of a grid or a solver says of itself, for `compare`: () without a file.

    Steps and stages are left out, which a grid or a solver holds against the run itself, or does not depend on.

    Args:
      kind: "grid" or "solver". section: of the configuration, whose key "file" is the file.
    """
    name, file = section["name"], section.get("file")
    ours = isinstance(name, str) and ":" not in name and isinstance(file, str) and file.endswith((".json", ".npz"))
    found = record(f"{kind} {name}", file) if ours else ()
    without = ("stages", "steps", *(("solver",) if kind == "solver" else ()))
    return tuple({key: value for key, value in said.items() if key not in without} for said in found)


SAYS = ("model", "stages", "solver", "steps", "guide", "scale")


def says_of(stages: tuple[Stage, ...]) -> dict[str, Any]:
    """The stages of a model as a calibration records them."""
    return {s.name: {"depth": s.depth, "branches": list(s.branches)} for s in stages}


def compare(
    records: tuple[Mapping[str, Any], ...],
    *,
    model: str,
    stages: tuple[Stage, ...],
    solver: str,
    steps: int,
    guide: str,
    scale: float,
) -> None:
    """Holds what calibrations say of themselves against a run.

    Args:
      records: of `record`.
      model, stages: the network's. solver, guide, scale: of the run. steps: its evaluations.

    Warns:
      MeasuredElsewhere: one line for each file whose model's size, solver, evaluations or guidance are not the run's.

    Raises:
      ValueError: a file of a model of other stages or branches.
    """
    guidance = {"guide": guide, "scale": scale}
    for said in records:
        if "published" in said:
            _compare_published(said, model, stages, steps)
            continue
        begins = f"{source(said['technique'], said['file'])} was measured on {said.get('model', 'another model')}"
        theirs, ours = _branches(said.get("stages")), {s.name: list(s.branches) for s in stages}
        if theirs is not None and theirs != ours:
            raise ValueError(f"{begins}, with {_listed(theirs)}; allowed: one of {model}, with {_listed(ours)}")
        now = {"model": model, "solver": solver, "steps": steps, **(guidance if guide != said.get("guide") else {})}
        if guide == said.get("guide") and guide != "none":
            now["scale"] = scale
        other = [key for key, value in now.items() if key in said and said[key] != value]
        if other:
            there = ", ".join(f"{WORDS[key]} {_short(said[key])}" for key in other)
            here = ", ".join(f"{now[key]}" for key in other)
            warnings.warn(
                f"{source(said['technique'], said['file'])} was measured in another run ({there}; here: {here})",
                MeasuredElsewhere,
                stacklevel=3,
            )


def _compare_published(said: Mapping[str, Any], model: str, stages: tuple[Stage, ...], steps: int) -> None:
    """Warns where published numbers (`difax.accel.caches.published`) are those of a model of other blocks, or of a run
    of another length."""
    begins, ours = f"{said['technique']}: {said['published']}", [s.depth for s in stages]
    theirs = said["blocks"]
    if theirs is None or list(theirs) != ours:
        had = "" if theirs is None else f", which has {' + '.join(map(str, theirs))} blocks"
        text = f"{begins} was fitted to {said['of']}{had}; here: {model}, with {' + '.join(map(str, ours))}"
        warnings.warn(text, MeasuredElsewhere, stacklevel=4)
    elif said.get("evaluations", steps) != steps:
        text = f"{begins} was measured over {said['evaluations']} evaluations, and is taken at the nearest of {steps}"
        warnings.warn(text, MeasuredElsewhere, stacklevel=4)


WORDS = {"model": "model", "solver": "solver", "steps": "evaluations", "guide": "guidance", "scale": "scale"}


def _branches(stages: Any) -> dict[str, list[str]] | None:
    """{stage: branches} of what a file says, None where it says nothing of that kind."""
    parts = stages.values() if isinstance(stages, Mapping) else ()
    if not parts or not all(isinstance(of, Mapping) and isinstance(of.get("branches"), list) for of in parts):
        return None
    return {str(name): [str(b) for b in of["branches"]] for name, of in stages.items()}


def _listed(stages: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{name} ({', '.join(branches)})" for name, branches in stages.items())


def by_stage_arrays(technique: str, file: str, wrote: str = "") -> dict[str, dict[str, np.ndarray]]:
    """{stage: {name: array}} of an .npz file whose arrays are named "stage.name".

    Args:
      wrote: what the error says of allowed files.

    Raises:
      ValueError: no such file, or another suffix.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, array in finite_arrays(technique, file, wrote=wrote).items():
        stage, dot, name = key.partition(".")
        if not dot:
            raise ValueError(f"{technique}: file={file!r}: the array {key!r}; allowed: names such as STAGE.NAME")
        found.setdefault(stage, {})[name] = array
    return found


def given_or_read(
    technique: str, name: str, given: Any, file: str | None, wrote: str = ""
) -> Mapping[str, Mapping[str, Any]] | None:
    """{stage: {name: array}} as it was given, or as `by_stage_arrays` reads it; None where neither was.

    Raises:
      ValueError: both were given, or as `by_stage_arrays`, or what is no such mapping, empty or not finite.
    """
    if given is not None and file is not None:
        raise ValueError(f"{technique}: {name} and file were both given; allowed: one of them")
    if given is None and file is None:
        return None
    found = given if file is None else by_stage_arrays(technique, file, wrote)
    what = source(technique, file) if file is not None else f"{technique}: {name}"
    if not isinstance(found, Mapping) or not found or not all(isinstance(of, Mapping) and of for of in found.values()):
        raise ValueError(f"{what}: {_short(found)}; allowed: {{stage: {{name: array}}}}, none of them empty")
    for stage, arrays in found.items():
        for key, array in arrays.items():
            finite(f"{what}: {stage}.{key}", array)
    return found


def finite(what: str, array: Any) -> np.ndarray:
    """An array of numbers, none of which is nan or infinite.

    Args:
      what: what errors begin with.

    Raises:
      ValueError: no array of numbers, an empty one, or one with a number that is not finite.
    """
    try:
        numbers = np.asarray(array)
    except ValueError:  # lists of different lengths
        numbers = np.zeros(0, object)
    # types of their own, as bfloat16 is, are numpy's kind V
    if numbers.dtype.kind not in "biufV" or not numbers.size:
        raise ValueError(f"{what} is {_short(array)}; allowed: an array of numbers")
    if not np.isfinite(numbers.astype(np.float64)).all():
        raise ValueError(f"{what} has numbers that are not finite")
    return numbers


def save_by_stage(
    path: str | pathlib.Path, arrays: Mapping[str, Mapping[str, np.ndarray]], says: Mapping[str, Any] | None = None
) -> None:
    """Writes the .npz that `by_stage_arrays` reads, in float32, with what it says of itself (`record`)."""
    flat = {f"{stage}.{n}": np.float32(a) for stage, of in arrays.items() for n, a in of.items()}
    save_arrays(path, flat, comment=json.dumps(says) if says else "")


def same_length(technique: str, steps: Any, evaluations: int) -> None:
    """Refuses what was measured over another number of evaluations."""
    if steps != evaluations:
        raise ValueError(f"{technique}: measured over {steps} evaluations; allowed: the {evaluations} of this run")


def check_named(technique: str, given: Any) -> None:
    """Refuses what is no mapping of branches, or stages, to numbers."""
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{technique}: {_short(given)}; allowed: {{branch: numbers}}, or {{stage: {{branch: numbers}}}}"
        )


def by_stage(technique: str, given: Mapping[str, Any], stages: tuple[Stage, ...]) -> dict[str, dict[str, Any]]:
    """{stage: {branch: value}} of the same, or of {branch: value}, which speaks of every stage that has the branch.

    Raises:
      ValueError: a stage or branch that the model does not have (with the nearest match), or no mapping.
    """
    check_named(technique, given)
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
    *,
    read: Callable[[np.ndarray], np.ndarray] = np.ones_like,
    low: float = 0.0,
) -> dict[str, dict[str, np.ndarray]]:
    """A table as float64 arrays, null as nan.

    Args:
      technique: what errors begin with (`source`).
      shape: stage -> the shape of one branch's numbers; None is any length, 1 or more.
      read: an array -> which of its numbers are read, which may not be null (all).
      low: least of the numbers that are read (0).

    Raises:
      ValueError: names that the model does not have, no numbers at all, numbers of another shape, and such that are not
        finite or below `low`.
    """
    nested = by_stage(technique, given, stages)
    if not any(nested.values()):
        raise ValueError(f"{technique}: an empty table; allowed: numbers of one branch or more")
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for stage in stages:
        arrays[stage.name] = {}
        for branch, found in nested[stage.name].items():
            want, what = shape(stage), f"{technique}: the numbers of {stage.name}.{branch}"
            try:
                array = np.asarray(found, np.float64)
            except (TypeError, ValueError):
                raise ValueError(f"{what} are no table") from None
            fits = array.ndim == len(want) and all(
                n == w if w is not None else n > 0 for w, n in zip(want, array.shape, strict=True)
            )
            if not fits:
                allowed = " x ".join("any" if w is None else str(w) for w in want)
                raise ValueError(f"{what} are {' x '.join(map(str, array.shape))}; allowed: {allowed}")
            bad = np.argwhere(read(array).astype(bool) & ~(np.isfinite(array) & (array >= low)))
            if len(bad):
                at = tuple(int(i) for i in bad[0])
                raise ValueError(f"{what} have {array[at]:g} at {list(at)}; allowed: finite numbers of {low:g} or more")
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
