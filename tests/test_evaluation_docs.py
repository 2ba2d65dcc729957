"""docs/evaluation.md: its examples run as printed, its commands exist, its tables are the committed runs."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2-cores"


def between(marker: str) -> str:
    (text,) = re.findall(rf"<!-- {marker}:begin -->\n?(.*?)<!-- {marker}:end -->", PAGE, re.DOTALL)
    return str(text).strip()


def test_examples_run_as_printed_and_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(block, {})
    out = capsys.readouterr().out
    for said in ("MaxBoxAccV2: thresholds=arange(0, 1, 1/1000)", "100.0", "gt_known_loc", "multi_instance", "tensor(["):
        assert said in out, said


def test_commands_have_right_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from molt.cli import main

    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^molt (evaluate .*)$", PAGE, re.M)
    assert len(commands) == 3
    for command in commands:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), pytest.raises(SystemExit) as stopped:
            main(shlex.split(command))
        assert stopped.value.code in (1, 2), command
        said = out.getvalue()
        assert "no such file or folder" in said or "holds no complete run" in said, (command, said)


def test_table_of_methods_is_that_of_the_committed_run() -> None:
    spec = importlib.util.spec_from_file_location("evaluation_benchmark", ROOT / "benchmarks" / "evaluation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    report = json.loads((RESULTS / "evaluation.json").read_text(encoding="utf-8"))
    assert module.table(report["sets"]).strip() in between("evaluation")
    assert [one["set"] for one in report["sets"]] == list(module.SETS)
    for one in report["sets"]:
        assert [row["method"] for row in one["rows"]] == list(module.METHODS)
        assert all(row["problems"] == 0 for row in one["rows"])
        page = (RESULTS / f"evaluation-{one['set']}.html").read_text(encoding="utf-8")
        assert "data:image" not in page, "photos are not committed"


def test_times_are_those_of_the_committed_runs() -> None:
    rows = json.loads((RESULTS / "sweep.json").read_text(encoding="utf-8"))["rows"]
    ms = {(row["operation"], row["case"], row["provider"]): row["median_ms"] for row in rows}
    lines = re.findall(
        r"^\| `(\w+)` \| ([^|]+) \| ([\d.]+) ms \| ([\d.]+) x \| ([\d.]+) x \| ([\d.]*) ?x? ?\|$",
        between("sweep"),
        re.M,
    )
    assert len(lines) == 6
    for operation, case, native, single, threads, published in lines:
        mine = ms[operation, case, "native"]
        images = int(case.split()[0])
        assert float(native) == pytest.approx(mine / images, rel=0.02)
        assert float(single) == pytest.approx(ms[operation, case, "opencv"] / mine, rel=0.02)
        assert float(threads) == pytest.approx(ms[operation, case, "opencv_threads"] / mine, rel=0.02)
        if published:
            assert float(published) == pytest.approx(ms[operation, case, "published"] / mine, rel=0.02)
    large = json.loads((RESULTS / "evaluation_speed.json").read_text(encoding="utf-8"))["rows"]
    (seconds,) = re.findall(r"5,794 maps of 224 x 224 takes ([\d.]+) s", PAGE)
    assert float(seconds) == pytest.approx(large[-1]["total"], rel=0.02)
    assert large[-1]["maps"] == 5794
    assert large[-1]["total"] < 60
    assert large[-1]["peak_MiB"] < 1.1 * large[0]["peak_MiB"], "memory does not grow with the maps"


def test_times_beside_the_published_calls_are_those_of_the_committed_run() -> None:
    rows = {
        row["metric"]: row
        for row in json.loads((RESULTS / "evaluation_peers.json").read_text(encoding="utf-8"))["rows"]
    }
    said = re.findall(r"([\d.]+) times less", between("peers"))
    assert len(said) == len(rows) == 2
    for text, name in zip(said, ("TopKLoc, fixed threshold", "PxAP"), strict=True):
        assert float(text) == pytest.approx(rows[name]["times"], abs=0.06)
        assert rows[name]["times"] > 1 and rows[name]["off"] < 1e-9
