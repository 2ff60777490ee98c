"""The README keeps its word: its example runs, its commands parse, its links lead somewhere."""

import pathlib
import re

import pytest

from difax.cli import _join_overrides, _parser

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"]


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
    words = re.split(r"\s{3,}", line)[0].split()[1:]
    _parser().parse_args(_join_overrides(words))


def test_there_are_commands():
    assert {line.split()[1] for line in COMMANDS} == {
        "sample",
        "calibrate",
        "pareto",
        "profile",
        "train",
        "convert",
        "export",
        "list",
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []
