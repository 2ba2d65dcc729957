"""Runs beside each other: which photos count, and whether the intervals are those of paired differences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from molt.evaluation.compare import compare, names
from molt.evaluation.runs import Run, Settings
from molt.evaluation.scores import Curves


def made(name: str, ious: list[float], *, first: int = 0, size: int = 224, pixels: bool = False) -> Run:
    """A run whose largest boxes have these IoUs at every threshold."""
    number = len(ious)
    curve = np.repeat(np.array(ious, np.float32)[:, None], 255, 1)
    rows = [
        {"name": f"{first + i}.jpg", "label": 0, "truth": [[0.0, 0.0, 5.0, first + i]], "masks": int(pixels)}
        for i in range(number)
    ]
    counts = None
    if pixels:
        counts = np.zeros((number, 2, 11), np.uint32)
        counts[:, 0, 5] = (10 * np.array(ious)).astype(int)
        counts[:, 0, 0] = 10 - counts[:, 0, 5]
        counts[:, 1, 0] = 10
    info = {"method": {"name": name}, "protocol": Settings(size=size, thresholds=10).to_json()}
    return Run(info, rows, Curves(curve, curve, np.full(number, 255), counts))


GENERATOR = np.random.default_rng(0)
BASE = GENERATOR.random(200)


def test_a_run_against_itself_differs_by_nothing() -> None:
    found = compare([made("a", list(BASE)), made("a", list(BASE))])
    assert found["runs"] == ["a", "a (2)"] and found["photos"] == 200
    assert not found["unshared"] and not found["protocol"]
    for entry in found["differences"]:
        assert entry["difference"] == 0 and entry["interval"] == [0, 0] and entry["better"] == 0


def test_differences_are_paired() -> None:
    better = (BASE + 0.05).clip(0, 1)
    found = compare([made("a", list(BASE)), made("b", list(better))], draws=400, seed=1)
    (entry,) = [e for e in found["differences"] if e["metric"] == "mean_iou"]
    change = 100 * (better - BASE)
    assert entry["difference"] == pytest.approx(change.mean(), abs=1e-4)
    low, high = entry["interval"]
    assert low < change.mean() < high
    width = 3.92 * change.std() / np.sqrt(200)
    assert high - low == pytest.approx(width, rel=0.25), "not the interval of two independent means"
    assert high - low < 0.2 * np.subtract(*found["scores"]["mean_iou"][0]["interval"][::-1])
    assert entry["better"] == 1
    (v1,) = [e for e in found["differences"] if e["metric"] == "max_box_acc"]
    assert v1["difference"] == pytest.approx(100 * ((better >= 0.5).mean() - (BASE >= 0.5).mean()), abs=1e-4)
    again = compare([made("b", list(better)), made("a", list(BASE))], draws=400, seed=1)["differences"]
    assert [-e["difference"] for e in again] == [e["difference"] for e in found["differences"]]


def test_only_shared_photos_count_and_the_others_are_named() -> None:
    one, two = made("a", list(BASE[:10])), made("b", list(BASE[:10]), first=4)
    moved = [dict(row) for row in two.rows]
    moved[0]["truth"] = [[1.0, 1.0, 2.0, 2.0]]
    found = compare([one, replace(two, rows=moved)], draws=20)
    assert found["photos"] == 5
    assert found["scores"]["mean_iou"][0]["value"] == pytest.approx(100 * BASE[5:10].mean(), abs=1e-4)
    assert found["scores"]["mean_iou"][1]["value"] == pytest.approx(100 * BASE[1:6].mean(), abs=1e-4)
    assert [(left["count"], left["photos"][0]) for left in found["unshared"]] == [
        (4, "0.jpg"),
        (4, "10.jpg"),
        (1, "4.jpg"),
    ]


def test_order_of_photos_does_not_matter() -> None:
    run, other = made("a", list(BASE[:30])), made("b", list(BASE[30:60]))
    turned = Run(other.info, other.rows[::-1], other.curves.take(np.arange(30)[::-1]))
    assert compare([run, other], draws=30) == compare([run, turned], draws=30)


def test_other_protocols_are_told() -> None:
    found = compare([made("a", [0.5]), made("b", [0.5], size=64), made("c", [0.7])], draws=5)
    assert found["protocol"] == [{"setting": "size", "values": {"a": 224, "b": 64, "c": 224}}]
    assert [(e["run"], e["against"]) for e in found["differences"]][:2] == [("b", "a"), ("c", "a")]
    runs = [made("a", [0.5]), made("b", [0.5]), made("c", [0.5])]
    runs[1].info["protocol"]["threshold"] = 0.2
    runs[2].info["data"] = {"any_object": True, "counted": ["crowds"]}
    assert compare(runs, draws=5)["protocol"] == [
        {"setting": "any_object", "values": {"a": False, "b": False, "c": True}},
        {"setting": "counted", "values": {"a": "none", "b": "none", "c": "crowds"}},
        {"setting": "threshold", "values": {"a": "the best", "b": 0.2, "c": "the best"}},
    ]


def test_the_class_of_the_maps_is_part_of_the_protocol() -> None:
    runs = [made("a", [0.5]), made("b", [0.5]), made("box", [0.5])]
    for run, gt_map in zip(runs, ("label", "top1", None), strict=True):
        run.info["method"]["gt_map"] = gt_map
    runs[1].info["protocol"]["draws"] = 7
    found = compare(runs, draws=5)["protocol"]
    assert found == [{"setting": "gt_map", "values": {"a": "label", "b": "top1", "box": None}}]
    assert compare([runs[0], runs[2]], draws=5)["protocol"] == []


def test_pixel_precision_is_compared_where_all_have_it() -> None:
    one, two = made("a", list(BASE[:20]), pixels=True), made("b", list(BASE[:20] / 2), pixels=True)
    found = compare([one, two], draws=30)
    (entry,) = [e for e in found["differences"] if e["metric"] == "pxap"]
    assert entry["interval"][1] < 0
    assert "pxap" not in compare([one, made("b", list(BASE[:20]))], draws=5)["scores"]


def test_what_cannot_be_compared_is_told() -> None:
    with pytest.raises(ValueError, match="two or more"):
        compare([made("a", [0.5])])
    with pytest.raises(ValueError, match="share no photo"):
        compare([made("a", [0.5]), made("b", [0.5], first=5)])
    with pytest.raises(ValueError, match="draws"):
        compare([made("a", [0.5]), made("b", [0.5])], draws=0)
    assert names([made("a", [1]), made("a", [1]), made("a", [1])]) == ["a", "a (2)", "a (3)"]
