"""The notebooks run from top to bottom, at toy size."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((pathlib.Path(__file__).resolve().parent.parent / "colab").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path, user_env, data_dir, tmp_path, monkeypatch):
    for name, value in {**user_env, "DIFAX_TINY": "1", "DIFAX_DATA": str(data_dir), "MPLBACKEND": "agg"}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code"), "commit without outputs"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = "".join(o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
    for word in ("GFLOPs per image", "root mean square difference", '"step": 6'):
        assert word in text


def test_there_is_a_quickstart():
    assert [p.stem for p in NOTEBOOKS] == ["quickstart"]
