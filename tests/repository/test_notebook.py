"""The notebooks in examples/ are committed clean and run from top to bottom."""

import base64
from pathlib import Path

import nbclient
import nbformat
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
CELL_SECONDS = 900  # what stops a hung kernel, not a measure of speed
PNG = b"\x89PNG\r\n"


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: nbformat.NotebookNode, kind: str) -> list[nbformat.NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs if output.output_type == kind]


def test_there_is_a_quickstart():
    assert EXAMPLES / "quickstart.ipynb" in NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_clean(path):
    """No outputs, no counts, nothing of the machine or editor it was written on."""
    notebook = read(path)
    nbformat.validate(notebook)
    assert not [cell.id for cell in code_cells(notebook) if cell.outputs or cell.execution_count is not None]
    assert not [cell.id for cell in notebook.cells if cell.metadata]
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    # As nbformat writes it, so that a later edit shows as a small change.
    assert path.read_text(encoding="utf-8") == nbformat.writes(notebook) + "\n"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_teaches(path):
    """Text stands before code: never more than two code cells in a row, and the first cell is a title."""
    kinds = [cell.cell_type for cell in read(path).cells]
    assert kinds[0] == "markdown"
    assert not [i for i in range(len(kinds) - 2) if set(kinds[i : i + 3]) == {"code"}]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Jupyter's, IPython's and matplotlib's files go to a folder of the test's."""
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR", "MPLCONFIGDIR"):
        folder = tmp_path / name.lower()
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    return tmp_path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, home):
    notebook = read(path)
    # A warning that a reader would see is a fault, as it is everywhere in these tests.
    nbclient.NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(home)}}
    ).execute()
    assert not outputs(notebook, "error")
    said = "".join(output.text for output in outputs(notebook, "stream") if output.name == "stderr")
    assert "Warning" not in said, said
    plots = [out.data["image/png"] for out in outputs(notebook, "display_data") if "image/png" in out.data]
    assert len(plots) >= 2
    assert all(base64.b64decode(plot).startswith(PNG) for plot in plots)
