"""From maps to scores: against wsolevaluation's rules spelled out, in batches, interrupted, with things wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL.Image
import pytest
import torch

from molt.data.annotations import LocalizationSet, Problem, Sample
from molt.evaluation import MaxBoxAcc, PxAP
from molt.evaluation._spool import RunError
from molt.evaluation.maps import prepare
from molt.evaluation.runs import Run, Settings, evaluate, read_masks
from molt.evaluation.scores import error_kind, over_thresholds, pixel_histogram, pixel_precision, redraw, thresholds
from molt.evaluation.summary import protocol_line, scaled

SMALL = Settings(size=24, thresholds=50, draws=40)


def blobs(number: int, side: int = 12) -> list[np.ndarray]:
    """Smooth maps with a few bumps, of odd shapes."""
    generator = np.random.default_rng(number)
    maps = []
    for i in range(number):
        y, x = np.mgrid[: side + i % 3, : side + i % 2] / side
        peaks = generator.random((3, 3))
        maps.append(sum(h * np.exp(-30 * ((y - a) ** 2 + (x - b) ** 2)) for a, b, h in peaks))
    return maps


def photos(number: int, seed: int = 0, **extra: Any) -> LocalizationSet:
    generator = np.random.default_rng(seed)
    samples = []
    for i in range(number):
        low = generator.integers(0, 60, (1 + i % 2, 2))
        boxes = np.concatenate([low, low + generator.integers(5, 60, low.shape)], 1).clip(0, 100).astype(float)
        samples.append(Sample(f"{i}.jpg", Path(f"{i}.jpg"), i % 3, boxes, (120, 100), **extra))
    return LocalizationSet("some", "folder", tuple(samples), ("cat", "dog", "<b>bird"))


def by_name(maps: Sequence[np.ndarray]) -> Any:
    def give(samples: Sequence[Sample]) -> Iterator[np.ndarray]:
        for sample in samples:
            yield maps[int(sample.name.split(".")[0])]

    return give


def wsol_scores(data: LocalizationSet, maps: Sequence[np.ndarray], settings: Settings) -> dict[str, float]:
    """MaxBoxAcc and V2 by the rules of wsolevaluation, threshold by threshold, with OpenCV."""
    size = settings.size
    hits: dict[Any, np.ndarray] = {key: np.zeros(settings.thresholds) for key in ("v1", 0.3, 0.5, 0.7)}
    for sample, values in zip(data.samples, maps, strict=True):
        big = cv2.resize(values, (size, size), interpolation=cv2.INTER_CUBIC)
        grey = (255 * ((big - big.min()) / (big.max() - big.min()))).astype(np.uint8)
        truth = (sample.boxes * size / np.array([120, 100, 120, 100])).astype(int)
        for number, threshold in enumerate(np.arange(0, 1, 1 / settings.thresholds)):
            kept = (grey > int(threshold * grey.max())).astype(np.uint8)
            contours = cv2.findContours(kept, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
            ious, areas = [0.0], [-1.0]
            for contour in contours:
                x, y, w, h = cv2.boundingRect(contour)
                x1, y1 = min(x + w, size - 1), min(y + h, size - 1)
                best = 0.0
                for a0, b0, a1, b1 in truth:
                    across, down = min(x1, a1) - max(x, a0) + 1, min(y1, b1) - max(y, b0) + 1
                    shared = max(across, 0) * max(down, 0)
                    both = (x1 - x + 1) * (y1 - y + 1) + (a1 - a0 + 1) * (b1 - b0 + 1) - shared
                    best = max(best, shared / both)
                ious.append(best)
                areas.append(cv2.contourArea(contour))
            hits["v1"][number] += ious[int(np.argmax(areas))] >= 0.5
            for iou in (0.3, 0.5, 0.7):
                hits[iou][number] += max(ious) >= iou
    best_of = {key: 100 * values.max() / len(data) for key, values in hits.items()}
    return {"v1": best_of["v1"], "v2": float(np.mean([best_of[iou] for iou in (0.3, 0.5, 0.7)]))} | {
        "at": float(np.argmax(hits["v1"]) / settings.thresholds)
    }


def test_scores_are_wsolevaluations() -> None:
    data, maps = photos(12), blobs(12)
    settings = Settings(size=32, thresholds=40, draws=10)
    run, expected = evaluate(data, by_name(maps), settings), wsol_scores(data, maps, settings)
    assert run.info["scores"]["max_box_acc"]["value"] == pytest.approx(expected["v1"])
    assert run.info["scores"]["max_box_acc_v2"]["value"] == pytest.approx(expected["v2"])
    assert run.info["by_iou"][0]["threshold"] == pytest.approx(expected["at"])
    assert 0 < expected["v1"] < 100 and 0 < expected["v2"] < 100, "the test must see hits and misses"


def test_a_perfect_map_and_an_empty_one() -> None:
    boxes = np.array([[30.0, 20, 90, 70]])
    samples = tuple(Sample(f"{i}.jpg", Path(), 0, boxes, (120, 100)) for i in range(2))
    values = np.zeros((100, 120))
    values[20:70, 30:90] = 1
    data = LocalizationSet("two", "folder", samples, ("it",))
    settings = Settings(size=100, thresholds=10, draws=20, plus_one=False, clip=False)
    run = evaluate(data, by_name([values, np.zeros((5, 5))]), settings)
    assert run.info["scores"]["max_box_acc"] | {"interval": None} == {"value": 50, "interval": None, "photos": 2}
    assert run.info["scores"]["mean_iou"]["value"] == pytest.approx(50 * run.rows[0]["iou"], abs=1e-3)
    assert run.rows[0]["iou"] > 0.95 and run.rows[0]["error"] == "right"
    np.testing.assert_allclose(run.rows[0]["box"], boxes[0], atol=1.5)
    assert run.rows[1]["iou"] == 0 and run.rows[1]["box"] is None and run.rows[1]["error"] == "wrong"
    assert run.rows[1]["peak"] == 0 and run.rows[0]["peak"] == 255


def test_rows_classes_and_sizes_agree_with_the_whole() -> None:
    data = photos(15)
    run = evaluate(data, by_name(blobs(15)), SMALL)
    info = run.to_json()
    ious = np.array([row["iou"] for row in run.rows])
    assert info["scores"]["max_box_acc"]["value"] == pytest.approx(100 * (ious >= 0.5).mean())
    assert info["scores"]["mean_iou"]["value"] == pytest.approx(100 * ious.mean(), abs=1e-3)
    for parts in (info["classes"], info["sizes"]):
        assert sum(part["photos"] for part in parts) == 15
        total = sum(part["photos"] * part["max_box_acc"] for part in parts)
        assert total == pytest.approx(15 * info["scores"]["max_box_acc"]["value"])
        total = sum(part["photos"] * part["max_box_acc_v2"] for part in parts)
        assert total == pytest.approx(15 * info["scores"]["max_box_acc_v2"]["value"])
    assert [part["name"] for part in info["sizes"]] == ["small", "medium", "large"]
    assert sum(info["errors"].values()) == 15
    assert info["errors"]["right"] == (ious >= 0.5).sum()
    for name, threshold in (("0.3", 0.3), ("0.7", 0.7)):
        hit = 100 * np.mean([row["iou_v2"][name] >= threshold for row in run.rows])
        assert hit == pytest.approx(next(e["value"] for e in info["by_iou"] if e["iou"] == threshold))
    low, high = info["scores"]["max_box_acc"]["interval"]
    assert 0 <= low <= info["scores"]["max_box_acc"]["value"] <= high <= 100 and low < high
    for word in ("24 px", "cubic", "minmax", "50 thresholds", "0.3, 0.5, 0.7", "contour", "clipped"):
        assert word in protocol_line(info)


def test_batch_size_and_iterators_change_nothing(tmp_path: Path) -> None:
    data, maps = photos(7), blobs(7)
    once = evaluate(data, by_name(maps), SMALL, batch=7)
    for given, batch in ((by_name(maps), 2), (iter(maps), 3), (maps, 7)):
        again = evaluate(data, given, SMALL, batch=batch)
        assert again.info == once.info and list(again.rows) == list(once.rows)


def test_knobs_change_what_they_say() -> None:
    data, maps = photos(9), blobs(9)
    base = evaluate(data, by_name(maps), SMALL)
    for change in ({"truncate": False}, {"plus_one": False}, {"clip": False}, {"resize": "bilinear"}):
        other = evaluate(data, by_name(maps), Settings(size=24, thresholds=50, draws=40, **change))
        assert not np.array_equal(other.curves.largest, base.curves.largest), change
        assert protocol_line(other.info) != protocol_line(base.info)


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    data, maps = photos(10), blobs(10)
    asked: list[str] = []

    def dying(samples: Sequence[Sample]) -> Iterator[np.ndarray]:
        if len(asked) >= 6:
            raise Killed
        asked.extend(sample.name for sample in samples)
        return by_name(maps)(samples)

    with pytest.raises(Killed):
        evaluate(data, dying, SMALL, out=tmp_path, batch=3)
    with pytest.raises(RunError, match="no complete run"):
        Run.load(tmp_path)
    with (tmp_path / "done.jsonl").open("a") as file:
        file.write('{"name": "half a li')
    later: list[str] = []
    steps: list[int] = []

    def noting(samples: Sequence[Sample]) -> Iterator[np.ndarray]:
        later.extend(sample.name for sample in samples)
        return by_name(maps)(samples)

    run = evaluate(data, noting, SMALL, out=tmp_path, batch=3, step=steps.append)
    assert asked == [f"{i}.jpg" for i in range(6)] and later == [f"{i}.jpg" for i in range(6, 10)]
    assert steps == [6, 9, 10]
    whole = evaluate(data, by_name(maps), SMALL, out=tmp_path / "whole")
    assert run.info == whole.info and list(run.rows) == list(whole.rows)
    loaded = Run.load(tmp_path)
    assert loaded.info == json.loads(json.dumps(whole.info)) and list(loaded.rows) == list(whole.rows)
    assert np.array_equal(loaded.curves.any, whole.curves.any)
    assert sorted(p.name for p in tmp_path.glob("*.*")) == [
        *("boxes.npy", "curves.npy", "photos.jsonl", "run.json", "state.json")
    ]


def never(samples: Sequence[Sample]) -> Iterator[np.ndarray]:
    raise AssertionError("no map is needed")


def test_a_finished_run_asks_for_no_map(tmp_path: Path) -> None:
    data, maps = photos(6), blobs(6)
    first = evaluate(data, by_name(maps), SMALL, out=tmp_path)
    assert evaluate(data, never, SMALL, out=tmp_path).info == json.loads(json.dumps(first.info))
    finer = Settings(size=24, thresholds=100, draws=10, ious=(0.4,))
    again = evaluate(data, never, finer, out=tmp_path)
    assert again.info["scores"] == evaluate(data, by_name(maps), finer).info["scores"]
    assert Run.load(tmp_path).settings == finer


def test_other_settings_are_refused_unless_restarted(tmp_path: Path) -> None:
    data, maps = photos(4), blobs(4)
    evaluate(data, by_name(maps), SMALL, out=tmp_path, method={"name": "one"})
    with pytest.raises(RunError, match=r"protocol.size 24 there, 32 now.*--restart"):
        evaluate(data, never, Settings(size=32, thresholds=50), out=tmp_path, method={"name": "one"})
    with pytest.raises(RunError, match=r'method.name "one" there, "two" now'):
        evaluate(data, never, SMALL, out=tmp_path, method={"name": "two"})
    with pytest.raises(RunError, match="photos"):
        evaluate(photos(4, seed=1), never, SMALL, out=tmp_path, method={"name": "one"})
    assert evaluate(data, by_name(maps), SMALL, out=tmp_path, method={"name": "two"}, restart=True).name == "two"


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for restart in (False, True):
        with pytest.raises(RunError, match="other files"):
            evaluate(photos(2), never, SMALL, out=tmp_path, restart=restart)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(RunError, match="is a file"):
        evaluate(photos(2), never, SMALL, out=tmp_path / "thesis.txt")


def test_what_a_kill_left_in_a_new_folder_is_no_file(tmp_path: Path) -> None:
    data, maps = photos(2), blobs(2)
    left = tmp_path / ".abcdefgh.part"
    left.write_text("half a state")
    os.utime(left, (0, 0))
    assert evaluate(data, by_name(maps), SMALL, out=tmp_path).name and not left.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.json", "{"),
        ("run.json", "[]"),
        ("run.json", '{"format": 99}'),
        ("run.json", '{"format": 1}'),
        ("photos.jsonl", "no json\n"),
        ("photos.jsonl", '{"name": 1}\n'),
        ("photos.jsonl", ""),
        ("curves.npy", "x"),
    ],
)
def test_a_damaged_run_is_told(tmp_path: Path, name: str, text: str) -> None:
    evaluate(photos(3), by_name(blobs(3)), SMALL, out=tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(RunError):
        Run.load(tmp_path)


def test_bad_maps_count_as_zeros_and_are_named() -> None:
    data, maps = photos(6), blobs(6)
    good = evaluate(data, by_name(maps), SMALL)
    bad: list[Any] = [*maps]
    bad[1], bad[2], bad[4] = np.full((3, 3), np.nan), KeyError("gone"), np.zeros((2, 2), np.int64)
    run = evaluate(data, by_name(bad), SMALL, problems=[Problem(Path("x.npy"), None, "a stray", "none")])
    assert run.info["problems"]["count"] == 4
    assert [problem["file"] for problem in run.info["problems"]["listed"]] == ["x.npy", "1.jpg", "2.jpg", "4.jpg"]
    assert [i for i, row in enumerate(run.rows) if row["box"] is None and row["peak"] == 0] == [1, 2, 4]
    assert run.info["scores"]["max_box_acc"]["photos"] == 6
    assert np.array_equal(run.curves.largest[0], good.curves.largest[0])
    with pytest.raises(TypeError, match="list"):
        evaluate(data, by_name([[1, 2]] * 6), SMALL)  # type: ignore[list-item]


def test_photos_without_truth_or_size_are_named() -> None:
    data = photos(4)
    samples = [*data.samples]
    samples[1] = Sample("1.jpg", Path("1.jpg"), 0, np.zeros((0, 4)), (120, 100))
    samples[2] = Sample("2.jpg", Path("nowhere/2.jpg"), 0, samples[2].boxes, None)
    run = evaluate(LocalizationSet("x", "folder", tuple(samples), data.classes), by_name(blobs(4)), SMALL)
    listed = {problem["file"]: problem["message"] for problem in run.info["problems"]["listed"]}
    assert set(listed) == {"1.jpg", "2.jpg"} and "no truth" in listed["1.jpg"] and "no such file" in listed["2.jpg"]
    assert run.info["scores"]["max_box_acc"]["photos"] == 3
    assert run.rows[1]["iou"] is None and run.rows[2]["iou"] == 0 and run.rows[2]["error"] == "wrong"


def test_the_size_comes_from_the_photo_turned_upright(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (100, 120)).save(tmp_path / "a.jpg", exif=exif)
    data = photos(1)
    given = data.samples[0]
    turned = Sample(given.name, tmp_path / "a.jpg", 0, given.boxes, None)
    run = evaluate(LocalizationSet("x", "folder", (turned,), data.classes), by_name(blobs(1)), SMALL)
    assert (run.rows[0]["width"], run.rows[0]["height"]) == (120, 100)
    assert np.array_equal(run.curves.any, evaluate(data, by_name(blobs(1)), SMALL).curves.any)


def test_wrong_numbers_of_maps_and_arguments() -> None:
    data = photos(4)
    for maps in (blobs(3), blobs(5)):
        with pytest.raises(ValueError, match="maps gave"):
            evaluate(data, iter(maps), SMALL)
    with pytest.raises(ValueError, match="at least one photo"):
        evaluate(LocalizationSet("x", "folder", (), ()), never)
    for change in ({"size": 1}, {"thresholds": 0}, {"ious": ()}, {"ious": (1.5,)}, {"area": "x"}, {"resize": "x"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            Settings(**change)


def masked(folder: Path, number: int, side: int = 30) -> LocalizationSet:
    generator = np.random.default_rng(5)
    samples = []
    for i in range(number):
        paths = []
        for k in range(3):
            values = np.zeros((side, side + 7), np.uint8)
            y, x = generator.integers(0, 20, 2)
            values[y : y + 9, x : x + 9] = 255
            paths.append(folder / f"{i}-{k}.png")
            PIL.Image.fromarray(values).save(paths[-1])
        samples.append(
            Sample(f"{i}.jpg", Path(), 0, np.zeros((0, 4)), None, tuple(paths[:2]), paths[2] if i % 2 else None)
        )
    return LocalizationSet("masks", "wsol", tuple(samples), ("it",))


def test_masks_are_wsolevaluations(tmp_path: Path) -> None:
    (sample,) = masked(tmp_path, 2).samples[1:]
    small = [
        cv2.resize(cv2.imread(str(path), 0).astype(np.float32), (19, 19), interpolation=cv2.INTER_NEAREST) > 0.5
        for path in (*sample.masks, sample.ignore)
    ]
    truth = small[0] | small[1]
    expected = np.where(truth, 1, np.where(small[2], 255, 0))
    assert np.array_equal(read_masks(sample, 19), expected) and set(np.unique(expected)) == {0, 1, 255}


def test_pixel_precision_is_the_area_under_the_pooled_curve(tmp_path: Path) -> None:
    data, maps = masked(tmp_path, 4), blobs(4)
    run = evaluate(data, by_name(maps), SMALL, out=tmp_path / "run")
    assert set(run.info["scores"]) == {"pxap"} and run.info["by_iou"] == []
    scores, truth = [], []
    for sample, values in zip(data.samples, maps, strict=True):
        mask = read_masks(sample, 24)
        scores.append(prepare(values, 24)[mask != 255].astype(float))
        truth.append(mask[mask != 255])
    score, positive = np.concatenate(scores), np.concatenate(truth) == 1
    area, recall = 0.0, 0.0
    for threshold in [1.0, *thresholds(50)[::-1]]:
        kept = score >= threshold
        if kept.any():
            hit = (positive & kept).sum()
            area += hit / kept.sum() * (hit / positive.sum() - recall)
            recall = hit / positive.sum()
    assert run.info["scores"]["pxap"]["value"] == pytest.approx(100 * area)
    assert Run.load(tmp_path / "run").curves.pixels.shape == (4, 2, 51)


def test_a_broken_mask_leaves_its_photo_out_and_is_named(tmp_path: Path) -> None:
    data = masked(tmp_path, 3)
    data.samples[1].masks[0].write_bytes(b"broken")
    run = evaluate(data, by_name(blobs(3)), SMALL)
    assert run.info["scores"]["pxap"]["photos"] == 2
    assert run.info["problems"]["listed"][0]["file"] == "1.jpg"


def test_histogram_and_precision_of_few_pixels() -> None:
    grid = thresholds(4)
    scores = np.array([[0, 0.25, 0.6, 1]])
    counts = pixel_histogram(scores, np.array([[0, 1, 1, 255]], np.uint8), grid, 4)
    assert counts.tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert pixel_precision(counts[None])[0] == 1
    nothing = np.zeros((1, 2, 5), np.uint32)
    assert pixel_precision(nothing)[0] == 0


def test_weights_count_photos_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    curve = generator.random((5, 255)).astype(np.float32)
    peak = np.array([255, 0, 7, 255, 100])
    weights = np.array([[1, 1, 1, 1, 1], [2, 0, 1, 0, 3]], np.uint16)
    found = over_thresholds(curve, peak, thresholds(1000), 0.5, weights)
    repeated = np.array([0, 0, 2, 4, 4, 4])
    expected = over_thresholds(curve[repeated], peak[repeated], thresholds(1000), 0.5)
    np.testing.assert_allclose(found[1], expected[0])
    t = 437
    direct = np.mean([curve[i, int(t / 1000 * p)] >= 0.5 for i, p in enumerate(peak)])
    assert found[0, t] == pytest.approx(direct)
    parts = list(redraw(30, 230, 3))
    assert [len(part) for part in parts] == [100, 100, 30], "some at a time"
    counts = np.concatenate(parts)
    assert (counts.sum(1) == 30).all() and np.array_equal(counts, np.concatenate(list(redraw(30, 230, 3))))
    assert counts.std() > 0.5


@pytest.mark.parametrize("iou", [0.3, 0.5, 0.7])
def test_an_iou_that_is_just_reached_counts(iou: float) -> None:
    curve = np.full((1, 255), iou).astype(np.float32)
    assert over_thresholds(curve, np.array([255]), thresholds(10), iou).all()


@pytest.mark.parametrize(
    ("box", "truth", "iou", "kind"),
    [
        ([0, 0, 9, 9], [[0, 0, 9, 9]], 1.0, "right"),
        ([0, 0, 9, 9], [[0, 0, 9, 19]], 0.5, "right"),
        ([2, 2, 5, 5], [[0, 0, 19, 19]], 0.04, "part"),
        ([0, 0, 19, 19], [[0, 0, 4, 4]], 0.06, "more"),
        ([0, 0, 19, 19], [[0, 0, 4, 4], [15, 15, 19, 19]], 0.06, "multi_instance"),
        ([0, 0, 9, 9], [[0, 0, 4, 4], [30, 30, 39, 39]], 0.25, "more"),
        ([0, 0, 9, 9], [[8, 8, 30, 30]], 0.01, "wrong"),
        ([0, 0, 9, 9], [[20, 20, 30, 30]], 0.0, "wrong"),
        (None, [[20, 20, 30, 30]], 0.0, "wrong"),
    ],
)
def test_error_kinds(box: list[float] | None, truth: list[list[float]], iou: float, kind: str) -> None:
    assert error_kind(box, np.array(truth, float), iou) == kind


def test_scores_are_those_of_the_metrics(tmp_path: Path) -> None:
    data, maps = photos(20), blobs(20)
    run = evaluate(data, by_name(maps), SMALL)
    ready = torch.from_numpy(np.stack([prepare(values, 24) for values in maps]))
    truth = [scaled(row, 24, truncate=True) for row in run.rows]
    for version, name in (("v1", "max_box_acc"), ("v2", "max_box_acc_v2")):
        metric = MaxBoxAcc(version, 50, bootstrap=0)
        metric.update(ready, truth)
        assert metric.compute()["score"] == pytest.approx(run.info["scores"][name]["value"])
    data = masked(tmp_path, 6)
    run = evaluate(data, by_name(maps), SMALL)
    metric = PxAP(50, bootstrap=0)
    metric.update(ready[:6], torch.from_numpy(np.stack([read_masks(sample, 24) for sample in data.samples])))
    assert metric.compute()["score"] == pytest.approx(run.info["scores"]["pxap"]["value"])
