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


def test_python_examples_run_as_printed_and_alone(tmp_path: Path) -> None:
    first, second, third, metrics, fourth = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    second += "\nassert refined.shape == (300, 451), refined.shape\n"
    third += "\nassert loc.method.model.trained and set(result.names) <= {'cat', 'cup'} and loc.alpha == 'auto'\n"
    fourth += "\nassert refined.shape == fused.shape and means.shape == (8, 1, 50) and len(found.boxes)\n"
    for number, script in enumerate((first, second, third, metrics, fourth)):
        (tmp_path / str(number)).mkdir()
        result = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            cwd=tmp_path / str(number),
            timeout=240,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        if script == first:
            assert "Egyptian cat" in result.stdout
        if script == metrics:
            assert "MaxBoxAccV2: thresholds=arange(0, 1, 1/1000)" in result.stdout
    assert (tmp_path / "0" / "cat-boxes.jpg").is_file()


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


def test_change_by_deep_clustering_is_that_of_the_committed_run() -> None:
    rows = {row["name"]: row for row in json.loads((RESULTS / "clusterers.json").read_text())["rows"]}
    text = " ".join(README.split())
    said = re.findall(r"by ([+-][.\d]+) \((-?[.\d]+) to ([+-]?[.\d]+)\)", text)
    assert len(said) == 4
    at = [(base, alpha) for alpha in (0.5, "auto") for base in ("CAM, 448 px", "seed map, ViT patches")]
    for (base, alpha), (change, low, high) in zip(at, said, strict=True):
        row = rows[f"{base} + deep, fast, alpha {alpha}"]
        assert float(change) == pytest.approx(row["change"], abs=0.0051)
        assert [float(low), float(high)] == pytest.approx(row["change_interval"], abs=0.0051)


def test_links_in_the_repository_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_commands_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in re.findall(r"^make ([a-z-]+)", README, re.M):
        assert re.search(rf"^{name}:", makefile, re.M), name


def test_times_are_those_of_the_committed_run() -> None:
    runs = {run["weights"]: run for run in json.loads((RESULTS / "speed.json").read_text())["runs"]}
    lines = re.findall(r"^\| (default|weak) \| ([.\d]+) s \| ([.\d]+) s \| ([.\d]+) x \|$", README, re.M)
    assert [line[0] for line in lines] == ["default", "weak"]
    for weights, whole, forward, ratio in lines:
        run = runs[weights]
        assert float(whole) == pytest.approx(run["seconds_per_photo"], abs=0.0051)
        assert float(forward) == pytest.approx(run["forward_seconds"] / run["photos"], abs=0.0051)
        assert float(ratio) == pytest.approx(run["total_over_forwards"], abs=0.0051)


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"\b[A-Z]{3,}_[A-Z]{3,}\b", README)


def test_committed_runs_hold_what_the_project_promises() -> None:
    """The promises on two CPU cores and on the benchmark photos; a worse run must not be committed unseen."""
    photos = json.loads((RESULTS / "photos.json").read_text())
    rows = {row["name"]: row for row in photos["rows"]}
    default, weak, cam = rows["default"], rows["weak"], rows["CAM, 448 px"]
    assert default["hits_single"] >= 15 and default["hits_all"] >= 18 and default["mean_iou_single"] >= 0.78
    assert weak["mean_iou_single"] >= max(0.60, cam["mean_iou_single"] + 0.05)
    for pair in photos["refinement"]:
        if pair["name"].endswith("refine, ViT features"):
            assert pair["mean_iou_change"] >= -0.01, pair
    for row in json.loads((RESULTS / "clusterers.json").read_text())["rows"]:
        if row["name"] == "CAM, 448 px + deep, superpixel vote":
            assert row["change"] > 0 and row["seeds"] == 3, "the paper's refinement raises a plain CAM"
    for run in json.loads((RESULTS / "speed.json").read_text())["runs"]:
        assert run["total_over_forwards"] <= 1.6 and run["seconds_per_photo"] <= 2
