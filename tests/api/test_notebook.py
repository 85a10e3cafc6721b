"""The notebook of the examples, run as a reader would run it."""

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "three-specialists.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_and_its_merge_knows_every_skill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # beside other tests
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    probe = nbformat.v4.new_code_cell("print(*(found.losses[str(merged)][s] for s in SKILLS))")
    probe.source += "\nprint(*(found.losses[s][s] for s in SKILLS))"
    probe.source += "\nprint(*(found.losses['base'][s] for s in SKILLS))"
    notebook.cells.append(probe)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1200, resources=resources).execute()
    printed = "".join(out.get("text", "") for out in probe.outputs)
    merged, own, base = ([float(loss) for loss in line.split()] for line in printed.splitlines())
    for ours, theirs, before in zip(merged, own, base, strict=True):
        assert theirs < before - 4
        assert ours < theirs + 0.2
    pictures = [out for cell in notebook.cells for out in cell.get("outputs", []) if "data" in out]
    assert any("image/png" in out["data"] for out in pictures)


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = [
        cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"
    ]
    assert cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
