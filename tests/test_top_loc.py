"""Top-k and GT-known localization against an evaluator on OpenCV, and each knob of a protocol."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage

from molt.evaluation import MaxBoxAcc, Protocol, TopKLoc

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 12
SPLIT = ["right", "class", "multi_instance", "part", "more", "wrong"]


def opencv_box(values: np.ndarray, threshold: float) -> tuple[int, ...]:
    levels = (np.nan_to_num(values) * 255).astype(np.uint8)
    _, kept = cv2.threshold(levels, int(threshold * levels.max()), 255, cv2.THRESH_BINARY)
    contours = cv2.findContours(kept, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    if not contours:
        return 0, 0, 1, 1
    x, y, w, h = cv2.boundingRect(max(contours, key=cv2.contourArea))
    return x, y, x + w, y + h


def shares(box, truth) -> tuple[float, float, float]:
    """IoU, share of the true box and share of the box, sides counted with one more."""
    sides = [min(box[i + 2], truth[i + 2]) - max(box[i], truth[i]) + 1 for i in (0, 1)]
    common = max(sides[0], 0) * max(sides[1], 0)
    areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, truth)]
    return common / (sum(areas) - common), common / areas[1], common / areas[0]


def by_hand(photo: dict, threshold: float) -> dict[str, float | str]:
    """One photo by TS-CAM's definitions: class by class, box by box."""
    found: dict[str, float | str] = {}
    known = opencv_box(photo["all"][photo["label"]], threshold)
    found["gt_known_loc"] = float(max(shares(known, true)[0] for true in photo["boxes"]) >= 0.5)
    for k in (1, 5):
        fits = [
            max(shares(opencv_box(photo["all"][index], threshold), true)[0] for true in photo["boxes"]) > 0.5
            for index in photo["predicted"][:k]
            if index == photo["label"]
        ]
        found[f"top{k}_cls"], found[f"top{k}_loc"] = float(len(fits) > 0), float(any(fits))
    top = photo["predicted"][0]
    table = [shares(opencv_box(photo["all"][top], threshold), true) for true in photo["boxes"]]
    best = max(table, key=lambda row: row[0])
    if top != photo["label"]:
        found["split"] = "class"
    elif best[0] > 0.5:
        found["split"] = "right"
    elif sum(row[1] > 0.3 for row in table) > 1:
        found["split"] = "multi_instance"
    elif best[2] > 0.5:
        found["split"] = "part"
    else:
        found["split"] = "more" if best[1] >= 0.7 else "wrong"
    return found


def photos(seed: int, number: int = 60, height: int = 14, width: int = 17) -> list[dict]:
    rng = np.random.default_rng(seed)
    found = []
    for index in range(number):
        maps = np.stack(
            [ndimage.gaussian_filter(rng.random((height, width)), rng.uniform(1, 3)) for _ in range(CLASSES)]
        )
        maps -= maps.min((1, 2), keepdims=True)
        maps = np.round(maps / maps.max((1, 2), keepdims=True) * 9) / 9
        predicted = rng.permutation(CLASSES)[:6]
        label = int(predicted[rng.choice([0, 0, 0, 2, 4, 5])]) if index % 7 else int(rng.integers(CLASSES))
        box = np.array(opencv_box(maps[label], rng.uniform(0.2, 0.8)))
        boxes = [np.clip(box + rng.integers(-2, 3, 4) * [1, 1, 1, 1], 0, None)]
        for _ in range(rng.integers(0, 3)):
            x, y = rng.integers(0, width - 4), rng.integers(0, height - 4)
            boxes.append(np.array([x, y, x + rng.integers(1, 9), y + rng.integers(1, 9)]))
        ordered = [[min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])] for b in boxes]
        found.append({"all": maps, "predicted": predicted, "label": label, "boxes": np.array(ordered, dtype=float)})
    found[1]["all"][found[1]["label"]] = np.nan
    found[2]["all"][:] = 0.0
    return found


def batch(found: list[dict], kept: int = 6) -> dict:
    return {
        "maps": torch.from_numpy(np.stack([p["all"][p["predicted"][:kept]] for p in found])),
        "predicted": torch.from_numpy(np.stack([p["predicted"] for p in found])),
        "labels": [p["label"] for p in found],
        "boxes": [p["boxes"] for p in found],
        "gt_maps": torch.from_numpy(np.stack([p["all"][p["label"]] for p in found])),
    }


@pytest.mark.parametrize("threshold", [0.0, 0.12, 0.45, 0.8])
def test_fixed_threshold_is_ts_cam(threshold: float) -> None:
    given = photos(0)
    metric = TopKLoc(threshold, bootstrap=0)
    metric.update(**batch(given[:5]))
    metric.update(**batch(given[5:]))
    found, expected = metric.compute(), [by_hand(photo, threshold) for photo in given]
    for name in ("gt_known_loc", "top1_loc", "top5_loc", "top1_cls", "top5_cls"):
        assert found[name] == pytest.approx(100 * np.mean([row[name] for row in expected])), name
        assert found["intervals"][name] is None
    split = {name: pytest.approx(100 * np.mean([row["split"] == name for row in expected])) for name in SPLIT}
    assert found["errors"] == split and sum(found["errors"].values()) == pytest.approx(100)
    assert found["score"] == found["gt_known_loc"] and found["errors"]["right"] == found["top1_loc"]
    assert found["top1_cls"] < found["top5_cls"] < 100 and found["count"] == len(given) and found["nan_maps"] >= 1
    assert found["threshold"] == dict.fromkeys(("gt_known_loc", "top1_loc", "top5_loc"), threshold)
    assert "oracle" not in found["protocol"] and "curves" not in found


def test_the_cases_hold_every_error() -> None:
    seen = {by_hand(photo, threshold)["split"] for photo in photos(0) for threshold in (0.0, 0.12, 0.45, 0.8)}
    assert seen == set(SPLIT)


@pytest.mark.parametrize("threshold", ["best", None])
def test_best_threshold_is_an_oracle_and_says_so(threshold) -> None:
    given = photos(1, 30)
    metric = TopKLoc(threshold, thresholds=25, bootstrap=0)
    metric.update(**batch(given))
    found = metric.compute()
    table = [[by_hand(photo, t) for photo in given] for t in np.arange(0, 1, 1 / 25)]
    for name in ("gt_known_loc", "top1_loc", "top5_loc"):
        curve = [100 * np.mean([row[name] for row in rows]) for rows in table]
        assert found["curves"][name] == pytest.approx(curve) and found[name] == pytest.approx(max(curve))
        assert found["threshold"][name] == found["thresholds"][int(np.argmax(np.round(curve, 9)))]
    rows = table[found["thresholds"].index(found["threshold"]["top1_loc"])]
    assert found["errors"] == {n: pytest.approx(100 * np.mean([row["split"] == n for row in rows])) for n in SPLIT}
    assert "threshold=best of arange(0, 1, 1/25)" in found["protocol"] and "(oracle)" in found["protocol"]


def test_with_wsolevaluations_knobs_gt_known_is_its_box_accuracy() -> None:
    given = batch(photos(2, 30))
    metric, other = TopKLoc.from_protocol("wsolevaluation", thresholds=100), MaxBoxAcc("v1", 100)
    metric.update(**given)
    other.update(given["gt_maps"], given["boxes"])
    assert metric.compute()["curves"]["gt_known_loc"] == other.compute()["curves"][0.5]
    assert metric.compute()["interval"] == other.compute()["interval"]


def one_photo(**changes) -> dict:
    """The first class's map has a box (0, 0, 4, 4), the second's, which is the label's, (6, 6, 12, 12)."""
    maps = torch.zeros(1, 2, 12, 14)
    maps[0, 0, :4, :4] = 0.5
    maps[0, 1, 6:, 6:12] = 1.0
    return {
        "maps": maps,
        "predicted": [[3, 8]],
        "labels": [8],
        "boxes": [[[6, 6, 12, 12]]],
        "gt_maps": maps[:, 1],
    } | changes


def figures(given: dict, *names: str, **knobs) -> list[float]:
    metric = TopKLoc(knobs.pop("threshold", 0.2), (1, 2), bootstrap=0, **knobs)
    metric.update(**given)
    return [metric.compute()[name] for name in names]


def test_whose_map_and_whose_box() -> None:
    names = ("gt_known_loc", "top1_loc", "top2_loc")
    assert figures(one_photo(), *names) == [100, 0, 100]
    assert figures(one_photo(), *names, topk_box="top1") == [100, 0, 0]
    assert figures(one_photo(), *names, gt_map="top1") == [0, 0, 100]
    assert figures(one_photo(gt_maps=None), *names, gt_map="top1", topk_box="top1") == [0, 0, 0]
    agnostic = one_photo(maps=one_photo()["maps"][:, 1:], gt_maps=None)
    assert figures(agnostic, *names, gt_map="agnostic", topk_box="top1") == [100, 0, 100]
    assert figures(agnostic, "top1_cls", "top2_cls", gt_map="agnostic", topk_box="top1") == [0, 100]


def test_strict_or_not_clip_and_one_more_pixel() -> None:
    half = one_photo(boxes=[[[6, 6, 12, 9]]], predicted=[[8, 3]], maps=one_photo()["maps"].flip(1))
    names = ("gt_known_loc", "top1_loc")
    assert figures(half, *names, plus_one=False) == [100, 0]
    assert figures(half, *names, plus_one=False, strict_gt=True, strict_topk=False) == [0, 100]
    assert figures(half, *names, plus_one=True) == [100, 100]
    # The map's last row is 11: kept inside the frame the box is (6, 6, 12, 11).
    assert figures(one_photo(), "gt_known_loc", iou=1.0, clip=False) == [100]
    assert figures(one_photo(), "gt_known_loc", iou=1.0, clip=True) == [0]
    inside = one_photo(boxes=[[[6, 6, 12, 11]]])
    assert figures(inside, "gt_known_loc", iou=1.0, clip=True) == [100]


def test_threshold_of_the_maximum_or_absolute_and_nothing_kept() -> None:
    given = one_photo(gt_maps=one_photo()["maps"][:, 0], boxes=[[[0, 0, 4, 4]]])
    assert figures(given, "gt_known_loc", threshold=0.7, relative=True) == [100]
    assert figures(given, "gt_known_loc", threshold=0.7, relative=False, empty=(0, 0, 1, 1)) == [0]
    assert figures(given, "gt_known_loc", threshold=0.7, relative=False, empty=(0, 0, 4, 4)) == [100]
    assert figures(given, "gt_known_loc", threshold=0.4, relative=False) == [100]


def test_area_by_pixels() -> None:
    values = torch.zeros(1, 12, 14)
    values[0, 0, :11] = 1.0  # a line has no area inside its contour
    values[0, 4:7, 4:7] = 1.0
    for area, right in (("pixels", 100), ("contour", 0)):
        assert figures(one_photo(gt_maps=values, boxes=[[[0, 0, 11, 1]]]), "gt_known_loc", area=area) == [right]


def test_intervals_are_those_of_the_weights() -> None:
    from molt.evaluation.bootstrap import poisson_weights

    given = photos(3, 40)
    names = [str(i) for i in range(40)]
    weights = poisson_weights([f"={name}" for name in names], 150, 5)[:, 1:].numpy()
    metric = TopKLoc(0.3, bootstrap=150, seed=5)
    metric.update(**batch(given), ids=names)
    rows, found = [by_hand(photo, 0.3) for photo in given], metric.compute()
    for name in ("gt_known_loc", "top1_loc", "top5_loc", "top1_cls", "top5_cls"):
        figure = 100 * np.array([row[name] for row in rows]) @ weights / weights.sum(0)
        assert found["intervals"][name] == pytest.approx(np.quantile(figure, [0.025, 0.975]))
    assert found["interval"] == found["intervals"]["gt_known_loc"]


def test_presets() -> None:
    assert Protocol.names() == ["wsolevaluation", "ts-cam", "scm", "catr", "sat"]
    for name in Protocol.names():
        changes = {} if name in ("wsolevaluation", "scm") else {"threshold": 0.1}
        metric = TopKLoc.from_protocol(name, bootstrap=0, **changes)
        assert str(metric.protocol).startswith(f"TopKLoc [{name}]: threshold=")
        assert ("oracle" in str(metric.protocol)) == (name in ("wsolevaluation", "scm"))
        for key, value in Protocol.preset(name).settings.items():
            if key not in ("threshold", "thresholds"):
                assert getattr(metric, key) == value
        if changes:
            with pytest.raises(TypeError, match="threshold: missing"):
                TopKLoc.from_protocol(name)
    assert len(TopKLoc.from_protocol("scm").thresholds) == 100
    changed = TopKLoc.from_protocol("ts-cam", threshold=0.1, clip=True)
    assert "[ts-cam, changed from the preset: clip]" in str(changed.protocol)
    with pytest.raises(ValueError, match="expected one of wsolevaluation, ts-cam"):
        Protocol.preset("tscam")


def test_protocol_line() -> None:
    assert str(TopKLoc(0.12, oracle=True).protocol) == (
        "TopKLoc: threshold=0.12, k=(1, 5), gt_map=label, topk_box=own, strict_topk=True, strict_gt=False, iou=0.5, "
        "area=contour, relative=True, clip=False, plus_one=True, empty=(0, 0, 1, 1); "
        "threshold chosen on the scored photos (oracle)"
    )


@pytest.mark.parametrize(
    ("changes", "knobs", "message"),
    [
        ({"gt_maps": None}, {}, "gt_maps: got None"),
        ({"gt_maps": torch.zeros(1, 12, 13)}, {}, "gt_maps: got shape"),
        ({"maps": torch.zeros(1, 1, 12, 14)}, {}, "at least 2 maps a photo"),
        ({}, {"gt_map": "agnostic", "topk_box": "top1"}, "expected 1 map a photo"),
        ({"predicted": [[3]]}, {}, r"predicted: got shape \(1, 1\)"),
        ({"predicted": [[3.0, 8.0]]}, {}, "predicted: got float32"),
        ({"labels": [8, 8]}, {}, r"labels: got shape \(2,\)"),
        ({"labels": [8.5]}, {}, "labels: got float32"),
        ({"maps": torch.full((1, 2, 12, 14), 2.0)}, {}, r"maps: map \(0, 0\) has values from 2 to 2"),
        ({"gt_maps": torch.full((1, 12, 14), -1.0)}, {}, "gt_maps: map 0 has values"),
        ({"ids": ["a", "b"]}, {}, "ids: "),
    ],
)
def test_bad_photos_add_nothing(changes: dict, knobs: dict, message: str) -> None:
    metric = TopKLoc(0.2, (1, 2), **knobs)
    with pytest.raises((TypeError, ValueError), match=message):
        metric.update(**one_photo(**changes))
    assert metric.count == 0 and not metric.errors.any() and not metric.nan_maps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.0}, "threshold: got 1.0"),
        ({"threshold": "top"}, "threshold: got 'top'"),
        ({"threshold": 0.1, "k": ()}, "k: got"),
        ({"threshold": 0.1, "k": (1, 1)}, "k: got"),
        ({"threshold": 0.1, "k": (0,)}, "k: got"),
        ({"threshold": 0.1, "gt_map": "agnostic"}, "topk_box: got 'own'"),
        ({"threshold": 0.1, "gt_map": "mine"}, "gt_map: got 'mine'"),
        ({"threshold": 0.1, "iou": 0}, "iou: got 0"),
    ],
)
def test_bad_knobs(arguments: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        TopKLoc(**arguments)


def test_one_threshold_is_no_oracle() -> None:
    for metric in (TopKLoc(0.2), TopKLoc("best", thresholds=[0.2])):
        assert "oracle" not in str(metric.protocol) and "threshold=0.2," in str(metric.protocol)
    assert "oracle" in str(TopKLoc("best", thresholds=[0.1, 0.2]).protocol)
    assert "oracle" in str(TopKLoc(0.2, oracle=True).protocol), "it was chosen on these photos, as the caller says"
