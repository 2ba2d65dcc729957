"""The README keeps its promises: its examples run as printed, its numbers are the committed ones."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2-cores"


def test_python_examples_run_as_printed(tmp_path: Path) -> None:
    first, second = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for script in (first, second + "\nassert refined.shape == (300, 451), refined.shape\n"):
        result = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=240, check=False
        )
        assert result.returncode == 0, result.stderr
        if script == first:
            assert "Egyptian cat" in result.stdout
    assert (tmp_path / "cat-boxes.jpg").is_file()


def test_table_is_that_of_the_committed_run() -> None:
    rows = {row["name"]: row for row in json.loads((RESULTS / "photos.json").read_text())["rows"]}
    lines = re.findall(
        r"^\| ([^|]+) \| (\d+)/22 \| (\d+)/17 \| ([.\d]+) \(([.\d]+) to ([.\d]+)\) \| (\w+) \|$", README, re.M
    )
    assert len(lines) >= 6
    for name, hits, single, mean, low, high, masks in lines:
        row = rows[name.strip("*` ")]
        assert (int(hits), int(single)) == (row["hits_all"], row["hits_single"]), name
        assert float(mean) == pytest.approx(row["mean_iou_single"], abs=0.0051), name
        assert [float(low), float(high)] == pytest.approx(row["interval"], abs=0.0051), name
        assert masks == row["saw_masks"], name


def test_changes_by_refinement_are_those_of_the_committed_run() -> None:
    pairs = {row["name"]: row for row in json.loads((RESULTS / "photos.json").read_text())["refinement"]}
    lines = re.findall(r"^\| ([^|]+?) \| ([+-][.\d]+) \| ([+-][.\d]+) \| ([+-][.\d]+) \|$", README, re.M)
    assert len(lines) == 3
    for base, *changes in lines:
        for kind, change in zip(("colour", "CNN features", "ViT features"), changes, strict=True):
            assert float(change) == pytest.approx(pairs[f"{base} + refine, {kind}"]["mean_iou_change"], abs=0.0051)


def test_links_in_the_repository_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_commands_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in re.findall(r"^make ([a-z-]+)", README, re.M):
        assert re.search(rf"^{name}:", makefile, re.M), name
