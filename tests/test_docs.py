"""docs/method.md: its examples run as printed, its table is the committed run, its pictures are there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results" / "cpu-2-cores" / "clusterers.json"


def test_examples_run_as_printed_and_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))
        names = {"__name__": "__main__"}
        exec(block, names)
    assert names["refined"].shape == (300, 451) and names["maps"].shape == (14, 14)
    assert "['carnivore']" in capsys.readouterr().out
    assert (tmp_path / "0" / "head.safetensors").stat().st_size < 100_000


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
    for base in ("CAM, 448 px", "seed map, CNN patches", "seed map, ViT patches"):
        (mean,) = re.findall(rf"^\| {base} \| none \| {number} \|", PAGE, re.M)
        assert float(mean) == pytest.approx(rows[base]["mean_iou"], abs=0.00051)


def test_numbers_of_presets_are_those_of_the_committed_runs() -> None:
    presets = json.loads((RESULTS.parent / "presets.json").read_text())
    speed = json.loads((RESULTS.parent / "deep_speed.json").read_text())
    text = " ".join(PAGE.split())
    rows = {row["name"]: row for row in presets["rows"]}
    said = re.search(r"average, instead of ([.\d]+) \(one network, 20 steps\) and ([.\d]+) \(40 steps\)", text)
    fast = re.search(r"moves the IoU of a photo's box by ([.\d]+) on average", text)
    assert said is not None and fast is not None
    found = [float(v) for v in (fast[1], *said.groups())]
    names = ("fast", "one network, 20 steps", "one network, 40 steps")
    assert found == pytest.approx([rows[name]["spread"] for name in names], abs=0.00051)
    zero = re.search(r"a mean IoU of ([.\d]+) already, against ([.\d]+) with 5 steps and ([.\d]+) with 10", text)
    assert zero is not None
    names = ("fast, 0 steps", "fast", "fast, 10 steps")
    assert [float(v) for v in zero.groups()] == pytest.approx([rows[n]["mean_iou"] for n in names], abs=0.00051)
    less = re.search(r"is higher by ([.\d]+) \(95 % interval ([+-][.\d]+) to ([+-][.\d]+)\)", text)
    assert less is not None and float(less[1]) == pytest.approx(presets["fast_less_published"]["mean_iou"], abs=0.00051)
    assert [float(less[2]), float(less[3])] == pytest.approx(presets["fast_less_published"]["interval"], abs=0.00051)
    photos = {row["name"]: row["ms"] for row in speed["photos_224_px"]}
    (minutes,) = re.findall(r"\| ([\d.]+) minutes for 1000 steps, extrapolated from 20 \|", PAGE)
    steps = {row["form"]: row for row in speed["steps"] if row["side"] == 224}
    assert float(minutes) == pytest.approx(steps["molt, fused"]["full_run_s"]["seconds"] / 60, rel=0.1)
    said = re.findall(r"^\| `DeepClustering\([^|]*\| [^|]* \| ([.\d]+) s \|$", PAGE, re.M)
    assert [1000 * float(v) for v in said] == pytest.approx([photos["fast"], photos["amortised"]], rel=0.2)


def test_deep_clusterings_promises_hold_in_the_committed_runs() -> None:
    """On two CPU cores; a worse run must not be committed unseen."""
    presets = json.loads((RESULTS.parent / "presets.json").read_text())
    speed = json.loads((RESULTS.parent / "deep_speed.json").read_text())
    assert presets["fast_less_published"]["mean_iou"] >= -0.02
    photos = {row["name"]: row["ms"] for row in speed["photos_224_px"]}
    assert photos["fast"] <= 500
    for number in (100, 800, 10000):
        assert photos[f"scikit-image slic, {number}"] >= 5 * photos[f"ops.slic, {number}"]
    fused = next(row for row in speed["steps"] if row["side"] == 224 and row["form"] == "molt, fused")
    assert fused["times_faster_than_numpy_vote"] >= 1.6 and fused["times_faster_than_bincount_vote"] >= 1.1


def test_differences_by_the_automatic_weight_are_those_of_the_committed_run() -> None:
    pairs = {pair["name"]: pair for pair in json.loads(RESULTS.read_text())["auto_less_fixed"]}
    text = " ".join(PAGE.split())
    (less, *weak) = re.search(r"for `fast` ([.\d]+) less .*?interval ([+-][.\d]+) to ([+-][.\d]+)\)", text).groups()  # type: ignore[union-attr]
    (more, *strong) = re.search(r"as it is \(([.\d]+) better, ([+-][.\d]+) to ([+-][.\d]+)\)", text).groups()  # type: ignore[union-attr]
    for base, change, interval in (("CAM, 448 px", -float(less), weak), ("seed map, ViT patches", float(more), strong)):
        pair = pairs[f"{base} + deep, fast"]
        assert change == pytest.approx(pair["auto_less_fixed"], abs=0.00051)
        assert [float(v) for v in interval] == pytest.approx(pair["interval"], abs=0.00051)
    (gain,) = re.findall(r"a fixed weight of 0.5 gains ([.\d]+) more on the CAM", text)
    assert float(gain) == pytest.approx(-pairs["CAM, 448 px + k-means 5, ViT features"]["auto_less_fixed"], abs=0.0051)


def test_pictures_and_links_exist_and_are_small() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", PAGE) if not target.startswith("http")]
    pictures = {ROOT / "docs" / target for target in targets if target.endswith(".jpg")}
    assert len(pictures) >= 9
    for target in targets:
        assert (ROOT / "docs" / target).exists(), target
    assert sum(picture.stat().st_size for picture in pictures) < 500_000
    assert pictures == set((ROOT / "docs" / "method").glob("*.jpg")), "no picture that nothing shows"
    assert "PLACEHOLDER" not in PAGE


def test_table_of_signed_maps_is_the_report() -> None:
    report = json.loads((RESULTS.parent / "signed.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    ways = ("auto", "clip", "stretch")
    for row in report["rows"]:
        figures = [row["below_zero"], *(row[way][at] for at in ("at_half", "best") for way in ways)]
        assert f"| {row['map']} | {' | '.join(f'{value:.2f}' for value in figures)} |" in text
    assert len(report["rows"]) == 8 and f"{report['photos']} photos of one" in text
