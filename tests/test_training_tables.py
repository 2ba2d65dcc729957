"""What README and docs/training.md say of training is what was committed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2-cores"


def test_texts_are_those_of_the_committed_results() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "training_tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_committed_results_hold_what_the_project_promises() -> None:
    report = json.loads((RESULTS / "training.json").read_text(encoding="utf-8"))
    rows: dict[tuple[str, str], dict[str, Any]] = {
        (row["set"], row["name"]): row for row in report["rows"] if row["group"] == "heads"
    }
    whole, kind = "attention x class map", "patches, attention pooling"
    two = rows["two", f"{kind}: {whole}"]
    plain = rows["two", f"{kind}: class map, 224 px alone"]
    assert two["photos"] == 250 and two["seeds"] == 3
    assert two["score"] >= plain["score"] + 5, "at least five points over the plain CAM of the same head"
    assert plain["difference_interval"][1] < -5
    assert two["score"] > rows["two", f"{kind}: attention"]["score"], "above the class-agnostic map"
    assert ("one", f"{kind}: {whole}") in rows
    assert max(run["seconds"] for run in report["trained"]) < 15 * 60
    assert all(run["trained_parameters"] < 1_000_000 for run in report["trained"])


def test_ablation_and_methods_have_their_rows() -> None:
    ablation = json.loads((RESULTS / "ablation.json").read_text(encoding="utf-8"))
    groups = {row["group"] for row in ablation["rows"] if row["status"] == "ran"}
    assert groups == {"scales", "heads", "clusters", "clusterers", "backbones"} and ablation["seeds"] == 5
    for row in ablation["rows"]:
        assert {"name", "photos", "seeds", "score", "interval"} <= row.keys()
        assert row["status"] == "ran" or row["reason"]
    methods = json.loads((RESULTS / "methods.json").read_text(encoding="utf-8"))
    named = {row["name"] for row in methods["rows"]}
    assert {"cam", "gradcam", "layercam", "ts-cam", "molt-1", "molt-2", "molt-3", "seeded", "weak", "tokencut"} <= named
    assert all({"name", "photos", "seeds", "score", "interval"} <= row.keys() for row in methods["rows"])
