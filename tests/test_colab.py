"""The notebooks run from top to bottom, at toy size."""

import pathlib
import sys

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((pathlib.Path(__file__).resolve().parent.parent / "colab").glob("*.ipynb"))


PIPELINE = pathlib.Path(__file__).resolve().parent / "golden" / "pipeline_pixart"
# notebook -> the extra that it installs, and what it must have printed
EXTRAS = {"quickstart": "", "text_to_image": "[text]"}
WORDS = {
    "quickstart": ("GFLOPs per image", "root mean square difference", '"step": 6'),
    "text_to_image": (
        "PixArtSigmaPipeline 16 x 16 pixels, 4 steps",
        "0.0 s compiled for this one",
        "FORA 2: 50% computed",
        "root mean square difference",
        "the first picture again: True",
        "2 evaluations of 4",
        "saved cats.png",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path, user_env, data_dir, tmp_path, monkeypatch):
    if path.stem == "text_to_image":
        pytest.importorskip("tokenizers")
    told = {"DIFAX_TINY": "1", "DIFAX_DATA": str(data_dir), "DIFAX_PIPELINE": str(PIPELINE), "MPLBACKEND": "agg"}
    for name, value in {**user_env, **told}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code"), "commit without outputs"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = "".join(o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
    for word in WORDS[path.stem]:
        assert word in text, text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_notebook_clones_and_installs_what_no_index_has(path, tmp_path, monkeypatch):
    """Its first cell, where difax is not installed: from the address that is set, and from nowhere without one."""
    ran: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("subprocess.run", lambda command, check: ran.append(command))
    monkeypatch.setattr(sys, "path", [*sys.path])
    cell = next(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
    monkeypatch.delenv("DIFAX_SOURCE", raising=False)
    with pytest.raises(ValueError, match="set SOURCE"):
        exec(cell, {})
    assert ran == []
    monkeypatch.setenv("DIFAX_SOURCE", "https://example.org/difax.git")
    exec(cell, {})
    clone = str(tmp_path / "difax_clone")
    assert ran[0] == ["git", "clone", "--depth", "1", "https://example.org/difax.git", clone]
    assert ran[1][1:] == ["-m", "pip", "install", "-q", "-e", f"{clone}{EXTRAS[path.stem]}"] and sys.path[0] == clone


def test_there_is_a_quickstart():
    assert [p.stem for p in NOTEBOOKS] == ["quickstart", "text_to_image"]
