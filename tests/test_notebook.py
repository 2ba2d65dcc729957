"""examples/training.ipynb runs from top to bottom, learns, and is committed without outputs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "training.ipynb"


def cells(notebook: Any, kind: str) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == kind]


@pytest.fixture
def notebook() -> Any:
    import nbformat  # here, so that GPU machines without it can collect the tests

    found = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(found)
    return found


def test_it_is_committed_without_outputs(notebook: Any) -> None:
    assert len(cells(notebook, "code")) >= 8
    for cell in cells(notebook, "code"):
        assert cell.outputs == [] and cell.execution_count is None, cell.source[:60]
    assert set(notebook.metadata) == {"kernelspec", "language_info"} and len(notebook.metadata.language_info) == 1
    assert NOTEBOOK.stat().st_size < 30_000


def test_it_fetches_nothing_and_its_links_exist(notebook: Any) -> None:
    code = "\n".join(cell.source for cell in cells(notebook, "code"))
    assert not re.search(r"https?:|^[!%]|urlopen|requests", code, re.M)
    text = "\n".join(cell.source for cell in cells(notebook, "markdown"))
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    assert targets and all((NOTEBOOK.parent / target).exists() for target in targets)


def test_it_runs_and_learns(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    # The plots' backend for notebooks, which writes pictures into cells.
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    install = [sys.executable, "-m", "ipykernel", "install", "--prefix", str(tmp_path / "prefix"), "--name", "here"]
    subprocess.run(install, check=True, capture_output=True)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "prefix" / "share" / "jupyter"))
    NotebookClient(notebook, timeout=200, kernel_name="here", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in cells(notebook, "code") for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4, "photos, before, the loss, after"
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "{'cat': 12, 'cup': 12}" in said
    scores = {name: (float(v2), float(iou)) for name, v2, iou in re.findall(
        r"^(before|after)\s+MaxBoxAccV2\s+([\d.]+) %\s+mean IoU\s+([\d.]+) %$", said, re.M
    )}  # fmt: skip
    assert scores["after"][0] >= scores["before"][0] + 10, scores
    assert scores["after"][1] >= scores["before"][1] + 15, scores
