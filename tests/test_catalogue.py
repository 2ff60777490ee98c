"""The catalogue is true: every factory has its line, and every line names what there is."""

import ast
import functools
import os
import pathlib
import re
import subprocess
import sys

import pytest

from difax.cli import main
from difax.commands import LISTS
from difax.registry import REGISTRIES
from difax.study.catalogue import CATEGORIES, HERE, NOT_SYSTEMS, STATUSES, System, check, count, select, systems

ROOT = pathlib.Path(__file__).resolve().parent.parent
CATALOGUE = systems()
GROUPS = {"processes": "process", "losses": "loss"} | {
    group: group.removesuffix("s") for group in ("models", "solvers", "grids", "guides", "caches", "attends", "quants")
}
FACTORIES = {group: list(REGISTRIES[kind]) for group, kind in GROUPS.items()}


@functools.cache
def functions_of(file: str) -> set[str]:
    """The test functions of a file, without parameters."""
    tree = ast.parse((ROOT / file).read_text())
    return {f"{file}::{f.name}" for f in tree.body if isinstance(f, ast.FunctionDef) and f.name.startswith("test_")}


def named_tests() -> list[str]:
    return sorted({test for s in CATALOGUE for test in s.verified})


@functools.cache
def all_tests() -> frozenset[str]:
    """Those of every file in this folder, and those that a line names with parameters of an existing function."""
    functions = {t for file in (ROOT / "tests").glob("test_*.py") for t in functions_of(f"tests/{file.name}")}
    return frozenset(functions | {t for t in named_tests() if t.partition("[")[0] in functions})


# ---------------------------------------------------------------- the catalogue


def test_the_lists_of_the_catalogue_are_those_of_the_command():
    assert set(GROUPS) <= set(LISTS)
    # nothing of them is a technique or a denoiser
    others = {"data", "weights", "configs", "pipelines", "encoders", "autoencoders"}
    assert set(LISTS) - set(GROUPS) == others


def test_every_line_is_consistent():
    """Closed lists, unique names, arXiv numbers, factories and tests that exist; no factory without a line."""
    check(CATALOGUE, FACTORIES, all_tests())
    assert len(CATALOGUE) >= 230
    assert {
        factory for factory in NOT_SYSTEMS if factory.partition(":")[2] not in FACTORIES[factory.partition(":")[0]]
    } == set()


def test_arxiv_numbers_are_of_their_years():
    """The number begins with year and month of the first version, which may be submitted on the last day before."""
    for s in CATALOGUE:
        found = re.fullmatch(r"arXiv:(\d\d)(\d\d)\..*", s.reference)
        if found:
            year, month = 2000 + int(found[1]), int(found[2])
            assert 1 <= month <= 12 and s.year in ({year, year - 1} if month == 1 else {year}), s.name


@pytest.mark.slow
def test_named_parameters_are_collected():
    """Every named test is one that pytest runs, with the parameters that are named."""
    files = sorted({t.partition("::")[0] for t in named_tests()})
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-m",
        "slow or not slow",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run([*command, *files], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    collected = set(done.stdout.splitlines())
    known = collected | {t.partition("[")[0] for t in collected}
    assert [t for t in named_tests() if t not in known] == []


LIES = {
    "a test": ({"verified": ("tests/test_caches.py::test_forra",)}, "no test tests/test_caches.py::test_forra"),
    "no test": ({"verified": ()}, "is exact and names no test"),
    "a factory": ({"factories": ("caches:foraa",)}, r"no factory caches:foraa \(did you mean fora\?\)"),
    "a list": ({"factories": ("cache:fora",)}, "no factory cache:fora"),
    "no list": ({"factories": ("fora",)}, "no factory fora"),
    "status": ({"status": "exakt"}, r"unknown status .*'exakt' \(did you mean exact\?\); allowed: exact, variant"),
    "category": ({"category": "cachings"}, r"\(did you mean caching\?\)"),
    "training": ({"training": "none"}, "unknown training"),
    "note": ({"note": "as in the paper"}, "must say 'checked against"),
    "planned, but checked": ({"status": "planned"}, "must not say 'checked against"),
    "not applicable, but here": ({"status": "not applicable", "note": "a U-Net"}, "names factories or tests"),
    "number": ({"reference": "arXiv:2407.1425x"}, "allowed: arXiv:YYMM.NNNNN"),
    "year": ({"year": 24}, "year 24; allowed: 2000"),
    "no year": ({"year": None}, "without a year"),
    "no composition": ({"composition": ""}, "no composition"),
    "twice": ({"name": "TaylorSeer"}, "'TaylorSeer' stands there twice"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_line_that_lies_is_refused(lie):
    changed, message = LIES[lie]
    told = [s._replace(**changed) if s.name == "FORA" else s for s in CATALOGUE]
    with pytest.raises(ValueError, match=message):
        check(told, FACTORIES, all_tests())


def test_a_factory_without_a_line_is_refused():
    without = [s for s in CATALOGUE if s.name != "FORA"]
    with pytest.raises(ValueError, match="caches:fora is neither named by a system nor in NOT_SYSTEMS"):
        check(without, FACTORIES)
    added = {**FACTORIES, "solvers": [*FACTORIES["solvers"], "unlisted"]}
    with pytest.raises(ValueError, match="solvers:unlisted is neither"):
        check(CATALOGUE, added)
    doubled = [s._replace(factories=(*s.factories, "caches:none")) if s.name == "FORA" else s for s in CATALOGUE]
    with pytest.raises(ValueError, match="caches:none is both"):
        check(doubled, FACTORIES)


# ---------------------------------------------------------------- the command


def listed(capsys, *arguments: str) -> tuple[list[str], dict[str, list[int]]]:
    """The names of the systems, and the numbers of each category."""
    assert main(["list", "--systems", *arguments]) == 0
    lines, _, table = capsys.readouterr().out.partition("\n\n")
    rows = [re.split(r"\s{2,}", row) for row in table.strip().splitlines()]
    assert rows[0] == ["category", *STATUSES, "total"]
    start = lines.splitlines()[0].index("year")
    return [line[:start].strip() for line in lines.splitlines()[1:]], {r[0]: list(map(int, r[1:])) for r in rows[1:]}


def test_the_list_shows_every_system_and_its_numbers_add_up(capsys):
    names, numbers = listed(capsys)
    assert names == [s.name for s in CATALOGUE]
    total = numbers.pop("total")
    assert list(numbers) == list(CATEGORIES)
    assert total[-1] == len(CATALOGUE) == sum(row[-1] for row in numbers.values()) == sum(total[:-1])
    assert all(row[-1] == sum(row[:-1]) for row in numbers.values())
    assert total[: len(HERE)] == [sum(s.status == status for s in CATALOGUE) for status in HERE]


def test_filters(capsys):
    names, numbers = listed(capsys, "--category", "caching", "--status", "exact")
    want = [s.name for s in CATALOGUE if (s.category, s.status) == ("caching", "exact")]
    assert names == want and len(want) > 5 and list(numbers) == ["caching", "total"]
    assert select(CATALOGUE, status="planned") == tuple(s for s in CATALOGUE if s.status == "planned")
    assert sum(sum(n.values()) for n in count(select(CATALOGUE, "solver")).values()) == len(select(CATALOGUE, "solver"))
    names, _ = listed(capsys, "--status", "not applicable")
    assert "Hash3D" in names


REFUSALS = {
    "category": (["--systems", "--category", "cashing"], ["'cashing'", "did you mean caching?", "quantisation"]),
    "status": (["--systems", "--status", "exakt"], ["'exakt'", "did you mean exact?", "planned, not applicable"]),
    "kind": (["caches", "--systems"], ["list caches --systems", "one of the two"]),
    "category alone": (["--category", "caching"], ["--category caching", "--systems"]),
    "status alone": (["caches", "--status", "exact"], ["--status exact", "--systems"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(name, capsys):
    arguments, wanted = REFUSALS[name]
    assert main(["list", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("difax: error: ") and err.count("\n") == 1
    for word in wanted:
        assert word in err, err


def test_a_broken_file_is_refused(tmp_path, monkeypatch):
    import difax.study.catalogue

    file = tmp_path / "catalogue.csv"
    monkeypatch.setattr(difax.study.catalogue, "FILE", file)
    header = ",".join(System._fields)
    for content, message in [
        ("name,title\n", "columns .*; allowed: name, title, authors"),
        (f"{header}\nFORA,,\n", "12 columns are needed in the line of 'FORA'"),
        (f"{header}\nFORA,,,now,,caching,free,x,,exact,x,\n", "year 'now'; allowed: a number"),
        (f"{header}\nFORA,,,,,caching,free,x,,exact,x,\n", "must say 'checked against"),
    ]:
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            systems()
