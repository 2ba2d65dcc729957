"""docs/method.md: its examples run as printed, its table is the committed run, its pictures are there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2-cores" / "clusterers.json"


def test_examples_run_as_printed_and_in_order(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    checks = "\nassert refined.shape == (300, 451) and maps.shape == (14, 14), (refined.shape, maps.shape)\n"
    command = [sys.executable, "-c", "\n".join(blocks) + checks]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "cat" in done.stdout and (tmp_path / "head.safetensors").stat().st_size < 100_000


def test_table_is_that_of_the_committed_run() -> None:
    rows = {row["name"]: row for row in json.loads(RESULTS.read_text())["rows"]}
    number = r"([+-]?[.\d]+)"
    lines = re.findall(
        rf"^\| ([^|]+) \| ([^|]+) \| {number} \| {number} \({number} to {number}\) \| (\d+) % \| (\d+) % \|$",
        PAGE,
        re.M,
    )
    assert len(lines) >= 8
    for base, clusterer, mean, change, low, high, improved, worsened in lines:
        row = rows[f"{base} + {clusterer}"]
        assert float(mean) == pytest.approx(row["mean_iou"], abs=0.00051), row["name"]
        assert float(change) == pytest.approx(row["change"], abs=0.00051), row["name"]
        assert [float(low), float(high)] == pytest.approx(row["change_interval"], abs=0.00051), row["name"]
        assert int(improved) == pytest.approx(100 * row["improved"], abs=0.51), row["name"]
        assert int(worsened) == pytest.approx(100 * row["worsened"], abs=0.51), row["name"]
    for base in ("CAM, 448 px", "seed map, ViT patches"):
        (mean,) = re.findall(rf"^\| {base} \| none \| {number} \|", PAGE, re.M)
        assert float(mean) == pytest.approx(rows[base]["mean_iou"], abs=0.00051)


def test_pictures_and_links_exist_and_are_small() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", PAGE) if not target.startswith("http")]
    pictures = {ROOT / "docs" / target for target in targets if target.endswith(".jpg")}
    assert len(pictures) >= 9
    for target in targets:
        assert (ROOT / "docs" / target).exists(), target
    assert sum(picture.stat().st_size for picture in pictures) < 500_000
    assert pictures == set((ROOT / "docs" / "method").glob("*.jpg")), "no picture that nothing shows"
    assert "PLACEHOLDER" not in PAGE
