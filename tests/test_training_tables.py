"""What README and docs/training.md say of training is what was committed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2-cores"


def test_texts_are_those_of_the_committed_results() -> None:
    texts = [ROOT / "README.md", ROOT / "docs" / "training.md"]
    before = [path.stat().st_mtime_ns for path in texts]
    command = [sys.executable, str(ROOT / "benchmarks" / "training_tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.stat().st_mtime_ns for path in texts] == before, "--check changes nothing"


def test_texts_are_written_where_they_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("training_tables", ROOT / "benchmarks" / "training_tables.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["training_tables.py"])
    (tmp_path / "docs").mkdir()
    readme, training = tmp_path / "README.md", tmp_path / "docs" / "training.md"
    right = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    readme.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    training.write_text(right.replace("<!-- scales:begin -->", "<!-- scales:begin -->\nold"), encoding="utf-8")
    before = [path.stat().st_mtime_ns for path in (readme, training)]
    monkeypatch.setattr(sys, "argv", ["training_tables.py", "--check"])
    with pytest.raises(SystemExit, match=r"docs/training\.md: not that of the committed results"):
        script.main()
    assert [path.stat().st_mtime_ns for path in (readme, training)] == before
    monkeypatch.setattr(sys, "argv", ["training_tables.py"])
    script.main()
    assert training.read_text(encoding="utf-8") == right and readme.stat().st_mtime_ns == before[0]


def test_tables_say_seeds_intervals_and_classes() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    _, _, scales = text.partition("<!-- scales:begin -->")
    scales, _, rest = scales.partition("<!-- scales:end -->")
    terciles = scales.partition("by terciles")[2]
    rows = [line for line in terciles.splitlines() if line.startswith("| ")][1:]
    assert rows and all(line.count(" to ") == 3 for line in rows)
    seeds = json.loads((RESULTS / "training.json").read_text(encoding="utf-8"))["rows"][0]["seeds"]
    assert scales.count("the head of the first seed alone" if seeds == 1 else f"mean of {seeds} seeds") == 2
    assert "names the photo's class, %" in rest.partition("<!-- methods:begin -->")[2]


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


def test_committed_times_reach_their_targets_or_docs_say_so() -> None:
    report = json.loads((RESULTS / "training_speed.json").read_text(encoding="utf-8"))
    features = {row["precision"]: row for row in report["features"]}
    assert features["no"]["ratio"] <= report["targets"]["features"] == 1.1, "of the default precision"
    loop = {row["provider"]: row for row in report["loop"]}
    assert loop["molt"]["ratio"] >= report["targets"]["loop"] == 0.9
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert ("bf16 misses our aim of 1.1" in text) == (features["bf16"]["ratio"] > 1.1)


def test_the_default_refiner_is_what_the_committed_runs_favour() -> None:
    for name in ("ablation", "ablation-one", "ablation-animals"):
        report = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        rows = {row["name"]: row for row in report["rows"] if row["group"] == "clusterers"}
        tokens, deep = (rows[f"MOLT + {kind}, alpha auto"] for kind in ("k-means, tokens", "deep clustering"))
        assert tokens["score"] > rows["MOLT, alpha 0"]["score"] and tokens["score"] >= deep["score"]
        assert tokens["ms"] < deep["ms"] / 10


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
