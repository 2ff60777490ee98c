"""The README keeps its word: its example runs, its commands parse, its links lead somewhere."""

import pathlib
import re
import shlex
from collections import Counter

import pytest

import difax
from difax.cli import _join_overrides, _parser
from difax.registry import REGISTRIES
from difax.study.catalogue import HERE, systems
from experiments import api_page

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "API.md"]


def test_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    lines = example.strip().splitlines()
    assert len(lines) <= 8 and [line for line in lines if "import" in line] == ["import difax"]
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "garments.png").stat().st_size > 1000
    plain, cached = map(float, capsys.readouterr().out.split())
    assert 0 < cached < 0.5 * plain


COMMANDS = [line for line in README.splitlines() if line.startswith("difax ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(line):
    words = shlex.split(re.split(r"\s{3,}", line)[0])[1:]
    _parser().parse_args(_join_overrides(words))


def test_there_are_commands():
    assert {line.split()[1] for line in COMMANDS} == {
        "sample",
        "calibrate",
        "pareto",
        "profile",
        "plan",
        "train",
        "convert",
        "export",
        "encode",
        "list",
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []


def test_the_numbers_of_systems_are_those_of_the_catalogue():
    statuses = Counter(s.status for s in systems())
    here = sum(statuses[status] for status in HERE)
    (told,) = re.findall(
        r"of (\d+) published\s+systems: (\d+) are here \((\d+) exact, (\d+) a variant, (\d+) adapted\), "
        r"(\d+) planned, and (\d+) do not apply",
        README,
    )
    of = [statuses[status] for status in ("exact", "variant", "adapted", "planned", "not applicable")]
    assert [int(n) for n in told] == [statuses.total(), here, *of]


def test_the_page_of_the_api_is_that_of_the_code():
    """`python -m experiments.api_page` writes it again."""
    assert (ROOT / "API.md").read_text() == api_page.page()
    page = (ROOT / "API.md").read_text()
    assert all(f"`difax.{name}" in page for name in difax.__all__)
    assert all(f"- `{name}(" in page for entries in REGISTRIES.values() for name in entries)
    assert not re.search(r" at 0x|ForwardRef|<function", page)
