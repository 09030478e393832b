"""Runs all cells of the notebooks in docs with a small trained run."""

from pathlib import Path

import pytest

import minigpt_pl

nbclient = pytest.importorskip("nbclient", reason="no nbclient: pip install 'minigpt_pl[test]'")
nbformat = pytest.importorskip("nbformat", reason="no nbformat: pip install 'minigpt_pl[test]'")
pytest.importorskip("ipykernel", reason="no ipykernel: pip install 'minigpt_pl[test]'")

DOCS = Path(__file__).parent.parent / "docs"
HOMEWORK, SOLUTIONS = DOCS / "homework.ipynb", DOCS / "solutions" / "solutions.ipynb"


def run(path, folder, monkeypatch):
    """Runs a notebook in a folder. Returns its code cells, and what each of them printed."""
    monkeypatch.setenv("MINIGPT_RUN", "outputs/tiny")
    monkeypatch.delenv("MINIGPT_SOURCE", raising=False)
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return code, ["".join(o.get("text", "") for o in cell.outputs if o.get("name") == "stdout") for cell in code]


def test_the_homework(trained, monkeypatch):
    code, printed = run(HOMEWORK, trained, monkeypatch)
    model = minigpt_pl.load(trained / "outputs" / "tiny")
    assert printed[2] == minigpt_pl.generate_text(model, "the film is", 40, 0.8, 20, seed=1) + "\n"
    assert printed[3].count("different pairs") == 5 and printed[4].count("\n") == 11
    assert printed[5].count("repeated 4-word runs") == 9 and "words of context" in printed[-1]
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs) == 1


def test_the_solutions(trained, monkeypatch):
    """The notebook itself checks that its function passes the calls of the homework page."""
    _, printed = run(SOLUTIONS, trained, monkeypatch)
    assert printed[1].startswith("the cat") and printed[-1].count("temperature ") == 3
    names = [line.partition(":")[0] for line in printed[2].splitlines()]
    assert names == ["temperature=-1", "top_k=0", "top_k=1000000", "prompt"]


@pytest.mark.parametrize("path", [HOMEWORK, SOLUTIONS], ids=lambda path: path.stem)
def test_stored_outputs_are_complete_and_small(path):
    """The stored outputs come from one run of all cells in order."""
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {output.output_type for cell in code for output in cell.outputs} <= {"stream", "display_data"}
    assert not any(output.get("name") == "stderr" for cell in code for output in cell.outputs)
    assert path.stat().st_size < 200_000
