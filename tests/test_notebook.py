"""Runs all cells of docs/homework.ipynb with a small trained run."""

from pathlib import Path

import pytest

import minigpt_pl

nbclient = pytest.importorskip("nbclient", reason="no nbclient: pip install 'minigpt_pl[test]'")
nbformat = pytest.importorskip("nbformat", reason="no nbformat: pip install 'minigpt_pl[test]'")
pytest.importorskip("ipykernel", reason="no ipykernel: pip install 'minigpt_pl[test]'")

NOTEBOOK = Path(__file__).parent.parent / "docs" / "homework.ipynb"


def test_it_runs(trained, monkeypatch):
    monkeypatch.setenv("MINIGPT_RUN", "outputs/tiny")
    monkeypatch.delenv("MINIGPT_SOURCE", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(trained)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()

    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = ["".join(o.get("text", "") for o in cell.outputs if o.get("name") == "stdout") for cell in code]
    model = minigpt_pl.load(trained / "outputs" / "tiny")
    assert printed[2] == minigpt_pl.generate_text(model, "the film is", 40, 0.8, 20, seed=1) + "\n"
    assert printed[3].count("different pairs") == 5 and printed[4].count("\n") == 11
    assert printed[5].count("repeated 4-word runs") == 9 and "words of context" in printed[-1]
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs) == 1


def test_stored_outputs_are_complete_and_small():
    """The stored outputs come from one run of all cells in order."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {output.output_type for cell in code for output in cell.outputs} == {"stream", "display_data"}
    assert not any(output.get("name") == "stderr" for cell in code for output in cell.outputs)
    assert NOTEBOOK.stat().st_size < 200_000
