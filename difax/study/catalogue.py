"""The catalogue of published systems: one line each in catalogue.csv, what difax has of it and what was checked.

A system is a method or a model with a name of its own in the field. `composition` says what it is in difax: for a cache
"when x where x fill" (ARCHITECTURE.md), else the seam and what stands there. `note` says what differs, what is missing,
or why it has no place here; of what is there also "checked against: ...": another implementation's results, a golden
schedule, the authors' code as read, or an oracle in numpy, from the paper's rule or from no more than its abstract's.
"""

from __future__ import annotations

import csv
import difflib
import pathlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

FILE = pathlib.Path(__file__).resolve().parent / "catalogue.csv"

CATEGORIES = {
    "solver": "processes, time grids, and the rule of a step",
    "guidance": "what the unconditional half does, and other control of what is drawn",
    "caching": "features of one evaluation that stand in at another",
    "tokens": "fewer tokens: merged, pruned, downsampled",
    "pruning": "fewer layers, channels or weights",
    "quantisation": "fewer bits in weights, and in activations outside of attention",
    "attention": "exact and linear attention",
    "low-bit-attention": "attention with quantised queries, keys, values or probabilities",
    "sparse-attention": "attention to some of the keys",
    "kv-cache": "smaller keys and values of what was drawn before",
    "parallelism": "over devices, or over times",
    "distillation": "training for fewer evaluations, or a smaller student",
    "rollout": "autoregressive and long video, and other mixtures with autoregression",
    "model": "networks",
    "serving": "toolboxes, engines, stores across requests",
    "study": "measurements and courses",
}

TRAINING = {
    "free": "nothing is fitted",
    "calibrated": "fitted or searched on data, without gradients on the network's weights",
    "trained": "weights, or a router's, are trained by gradient",
}

STATUSES = {
    "exact": "the published rule, checked against another implementation or an oracle",
    "variant": "a named variant of it; the note says what differs",
    "adapted": "an idea for U-Nets or other models, carried over to Diffusion Transformers",
    "planned": "not here yet; the composition says what it would be",
    "not applicable": "the note says why",
}

HERE = ("exact", "variant", "adapted")

# entries of the lists of `difax list` that are no published system
NOT_SYSTEMS = {
    "attends:xla": "the definition of softmax attention",
    "caches:none": "no cache",
    "caches:experts": "two networks of one published model, and no technique",
    "caches:scheduled": "any static plan; the search for one is difax's own",
    "grids:given": "a list of a user's own",
    "grids:exponential": "log_snr between noise levels of a user's own",
    "grids:lcm": "the steps that a model was distilled on",
    "grids:diffusers": "how diffusers' schedulers of a VP process lay the times of several papers",
    "grids:diffusers_flow": "how diffusers' multistep schedulers lay the times of a flow",
    "grids:ipndm": "the times of one scheduler of diffusers",
    "guides:none": "no guidance",
    "losses:cross_entropy": "trains the classifier that judges samples",
    "models:cnn": "that classifier",
    "processes:edm": "ve in the coordinates in which EDM's networks are called, for files of schedulers",
    "processes:trig": "the path of v-diffusion, for files of schedulers",
    "processes:vp": "every schedule of betas that files of schedulers name",
    "quants:none": "no quantisation",
    "quants:int4_weight": "rounding to nearest, every paper's baseline",
    "quants:int4_w4a8": "rounding to nearest, every paper's baseline",
}

REQUIRED = ("name", "category", "training", "composition", "status", "note")


class System(NamedTuple):
    """One published system.

    name: the field's. title, authors ("Liu et al."), year, reference (arXiv:..., doi:..., or where it is published): of
    the paper, empty where no source says it. category, training, status: keys of `CATEGORIES`, `TRAINING`, `STATUSES`.
    composition, note: see the module. factories: entries of difax's lists, "caches:fora". verified: the tests of this
    repository that check it, as pytest names them.
    """

    name: str
    title: str
    authors: str
    year: int | None
    reference: str
    category: str
    training: str
    composition: str
    factories: tuple[str, ...]
    status: str
    note: str
    verified: tuple[str, ...]


def systems() -> tuple[System, ...]:
    """All systems, in the file's order.

    Raises:
      ValueError: a line that `check` refuses.
    """
    with FILE.open(encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file, strict=True)
        if tuple(lines.fieldnames or ()) != System._fields:
            raise ValueError(f"{FILE.name}: columns {lines.fieldnames}; allowed: {', '.join(System._fields)}")
        found = tuple(_system(line) for line in lines)
    check(found)
    return found


def select(catalogue: Iterable[System], category: str | None = None, status: str | None = None) -> tuple[System, ...]:
    """The systems of a category and of a status; None is any.

    Raises:
      ValueError: a category or status that there is not, with the nearest one.
    """
    if category is not None:
        _choose("category", category, CATEGORIES)
    if status is not None:
        _choose("status", status, STATUSES)
    return tuple(s for s in catalogue if category in (None, s.category) and status in (None, s.status))


def count(catalogue: Iterable[System]) -> dict[str, dict[str, int]]:
    """{category: {status: number}} of the categories that occur, every status given."""
    pairs = Counter((s.category, s.status) for s in catalogue)
    occurring = [c for c in CATEGORIES if any(category == c for category, _ in pairs)]
    return {c: {s: pairs[c, s] for s in STATUSES} for c in occurring}


def check(
    catalogue: Collection[System],
    factories: Mapping[str, Collection[str]] | None = None,
    tests: Collection[str] | None = None,
) -> None:
    """Raises ValueError at the first system that is not consistent.

    Args:
      catalogue: the systems.
      factories: {list: its names}, such as {"caches": ["fora", ...]}: every factory that a system names must be there,
        and each must be named by a system or by `NOT_SYSTEMS`. None: not looked at.
      tests: all tests that there are, as pytest names them, without or with parameters. None: not looked at.
    """
    seen: set[str] = set()
    for s in catalogue:
        where = f"system {s.name!r}"
        for field in REQUIRED:
            if not getattr(s, field):
                raise ValueError(f"{where}: no {field}")
        if s.name in seen:
            raise ValueError(f"{where} stands there twice")
        seen.add(s.name)
        _choose(f"category of {where}", s.category, CATEGORIES)
        _choose(f"training of {where}", s.training, TRAINING)
        _choose(f"status of {where}", s.status, STATUSES)
        if s.year is not None and not 2000 <= s.year <= 2100:
            raise ValueError(f"{where}: year {s.year}; allowed: 2000 to 2100")
        if "arxiv" in s.reference.lower():
            if not re.fullmatch(r"arXiv:\d{4}\.\d{4,5}", s.reference):
                raise ValueError(f"{where}: reference {s.reference!r}; allowed: arXiv:YYMM.NNNNN")
            if s.year is None:
                raise ValueError(f"{where}: {s.reference} without a year")
        if (s.status in HERE) != ("checked against: " in s.note):
            raise ValueError(f"{where} is {s.status}: its note must {'' if s.status in HERE else 'not '}say "
                             "'checked against: ...'")  # fmt: skip
        if s.status in HERE and not s.verified:
            raise ValueError(f"{where} is {s.status} and names no test")
        if s.status == "not applicable" and (s.factories or s.verified):
            raise ValueError(f"{where} is not applicable and names factories or tests")
        for test in s.verified:
            if tests is not None and test not in tests:
                raise ValueError(f"{where}: no test {test}{_near(test, tests)}")
        for factory in s.factories:
            group, _, name = factory.partition(":")
            if not name or factories is not None and name not in factories.get(group, ()):
                raise ValueError(f"{where}: no factory {factory}{_near(name, (factories or {}).get(group, ()))}")
    named = {factory for s in catalogue for factory in s.factories}
    for group, names in (factories or {}).items():
        for factory in (f"{group}:{name}" for name in names):
            if (factory in named) == (factory in NOT_SYSTEMS):
                told = "both named by a system and" if factory in named else "neither named by a system nor"
                raise ValueError(f"{factory} is {told} in NOT_SYSTEMS")


def _system(line: Mapping[str, str]) -> System:
    if None in line or None in line.values():
        raise ValueError(f"{FILE.name}: {len(System._fields)} columns are needed in the line of {line['name']!r}")
    year = line["year"]
    if year and not year.isdecimal():
        raise ValueError(f"system {line['name']!r}: year {year!r}; allowed: a number, or nothing")
    lists = {field: tuple(line[field].split()) for field in ("factories", "verified")}
    return System(**{**line, **lists, "year": int(year) if year else None})


def _choose(kind: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"unknown {kind} {value!r}{_near(value, allowed)}; allowed: {', '.join(allowed)}")


def _near(value: str, allowed: Collection[str]) -> str:
    near = difflib.get_close_matches(value, allowed, 1, 0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def format_systems(systems: Sequence[System]) -> str:
    """The catalogue for people: a line for each system, and their numbers by category and status."""
    columns = ("name", "year", "reference", "category", "training", "status", "composition")
    lines = [columns, *(tuple(str(getattr(s, c) or "") for c in columns) for s in systems)]
    numbers = {category: [*n.values(), sum(n.values())] for category, n in count(systems).items()}
    numbers["total"] = [sum(column) for column in zip(*numbers.values(), strict=True)] or [0] * (len(STATUSES) + 1)
    table = [("category", *STATUSES, "total"), *((category, *n) for category, n in numbers.items())]
    return _columns(lines) + "\n\n" + _columns(table, ">")


def _columns(rows: Sequence[Sequence[Any]], align: str = "<") -> str:
    """Rows of equal length in columns of equal width; the first column is aligned left."""
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [f"{str(v):{align if i else '<'}{w}}" for i, (v, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
