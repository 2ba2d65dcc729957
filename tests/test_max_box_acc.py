"""MaxBoxAcc against an evaluator on OpenCV, threshold by threshold, and its intervals."""

from __future__ import annotations

import pickle

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage

from molt.evaluation import MaxBoxAcc

pytestmark = pytest.mark.usefixtures("one_thread")


def opencv_iou(levels: np.ndarray, cut: int, truth: np.ndarray, largest: bool) -> float:
    """The best IoU at one cut: contours, their boxes kept inside the frame, sides counted with one more."""
    binary = np.where(levels > cut, 255, 0).astype(np.uint8)
    contours = cv2.findContours(binary, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    if largest and contours:
        contours = [max(contours, key=cv2.contourArea)]
    height, width = levels.shape
    boxes = [(0, 0, 0, 0)]
    if contours:
        rects = [cv2.boundingRect(contour) for contour in contours]
        boxes = [(x, y, min(x + w, width - 1), min(y + h, height - 1)) for x, y, w, h in rects]
    best = 0.0
    for x0, y0, x1, y1 in boxes:
        for u0, v0, u1, v1 in truth:
            across, down = min(x1, u1) - max(x0, u0) + 1, min(y1, v1) - max(y0, v0) + 1
            common = max(across, 0) * max(down, 0)
            union = (x1 - x0 + 1) * (y1 - y0 + 1) + (u1 - u0 + 1) * (v1 - v0 + 1) - common
            best = max(best, common / union)
    return best


def opencv_curves(maps, boxes, thresholds: np.ndarray, ious, largest: bool) -> dict[float, np.ndarray]:
    right = {iou: np.zeros(len(thresholds)) for iou in ious}
    for values, truth in zip(maps, boxes, strict=True):
        levels = (np.nan_to_num(values, nan=0.0) * 255).astype(np.uint8)
        if np.isnan(values).any():
            levels[:] = 0
        cuts = [int(t * np.max(levels)) for t in thresholds]
        reached = {cut: opencv_iou(levels, cut, truth, largest) for cut in set(cuts)}
        for iou in ious:
            right[iou] += [reached[cut] >= iou for cut in cuts]
    return {iou: found * 100.0 / len(maps) for iou, found in right.items()}


def hard_maps(height: int, width: int, rng: np.random.Generator) -> list[np.ndarray]:
    """What breaks evaluators: thin, nested, touching, equal, constant, empty, one pixel, spikes, NaN."""
    y, x = np.mgrid[:height, :width]
    far = np.maximum(abs(y - height // 2), abs(x - width // 2))
    blank = np.zeros((height, width))
    maps = [blank, blank + 1, blank + 0.5, blank + 0.003, np.where(blank == 0, np.nan, 0)]
    for pixel in [(0, 0), (height - 1, width - 1), (height // 2, width // 3)]:
        maps.append(blank.copy())
        maps[-1][pixel] = 1.0
    maps += [np.where(x == y, 1.0, 0.2), np.where(x == width // 2, 0.8, 0.0), np.where((x + y) % 2 == 0, 1.0, 0.0)]
    maps += [
        (far % 2) * 0.9,
        (far % 4 < 2) * (0.4 + 0.05 * far).clip(0, 1),
        np.where((x % 3 < 2) & (y % 3 < 2), 0.7, 0),
    ]
    maps += [np.where(x < 2, 1.0, 0.1), np.where((y == 0) | (x == width - 1), 0.6, 0.3), rng.random((height, width))]
    spiky = ndimage.gaussian_filter(rng.random((height, width)), 2)
    spiky[rng.random((height, width)) < 0.02] = 1.0
    broken = rng.random((height, width))
    broken[height // 2, width // 2] = np.nan
    return [*maps, spiky.clip(0, 1), broken]


def smooth_maps(number: int, height: int, width: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Blobs, most of them in few steps, which the plain sweep takes quickly; the others in all that uint8 has."""
    maps = []
    for index in range(number):
        values = ndimage.gaussian_filter(rng.random((height, width)), rng.uniform(0.5, 3))
        values = (values - values.min()) / max(np.ptp(values), 1e-9)
        if index % 12:
            steps = rng.integers(2, 14)
            values = np.round(values * steps) / steps
        maps.append(values if rng.random() < 0.8 else values / 1.3)
    return maps


def true_boxes(number: int, height: int, width: int, rng: np.random.Generator) -> list[np.ndarray]:
    found = []
    for _ in range(number):
        corners = [
            np.sort(rng.integers(0, (width, height), (2, 2)), axis=0).reshape(4) for _ in range(rng.integers(1, 4))
        ]
        found.append(np.array(corners, dtype=np.float64))
    return found


def photos(height: int, width: int, seed: int, number: int = 20) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    maps = np.stack(hard_maps(height, width, rng) + smooth_maps(number, height, width, rng))
    return maps, true_boxes(len(maps), height, width, rng)


def few_photos(seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    maps = np.stack(smooth_maps(13, 12, 14, rng)[1:])
    return maps, true_boxes(len(maps), 12, 14, rng)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(
    ("size", "number"), [((16, 16), 45), ((11, 19), 40), ((1, 17), 50), ((9, 1), 50), ((2, 3), 30)]
)
def test_curves_are_those_of_opencv(version: str, size: tuple[int, int], number: int) -> None:
    maps, boxes = photos(*size, seed=sum(size), number=number)
    metric = MaxBoxAcc(version, 200, bootstrap=0)
    for part in (slice(0, 7), slice(7, None)):
        metric.update(torch.from_numpy(maps[part]), boxes[part])
    found = metric.compute()
    ious = (0.5,) if version == "v1" else (0.3, 0.5, 0.7)
    expected = opencv_curves(maps, boxes, np.arange(0, 1, 1 / 200), ious, largest=version == "v1")
    for iou in ious:
        assert np.array_equal(found["curves"][iou], expected[iou])
        assert found["per_iou"][iou] == expected[iou].max()
        assert found["threshold"][iou] == np.arange(0, 1, 1 / 200)[expected[iou].argmax()]
    assert found["score"] == pytest.approx(np.mean([expected[iou].max() for iou in ious]), abs=1e-12)
    assert found["count"] == len(maps) and found["nan_maps"] == 2
    assert found["interval"] is None and found["thresholds"] == np.arange(0, 1, 1 / 200).tolist()


def test_thousand_thresholds_and_float32() -> None:
    maps, boxes = photos(9, 12, seed=3, number=4)
    maps = maps.astype(np.float32)
    metric = MaxBoxAcc("v2", bootstrap=0)
    metric.update(maps, [box.tolist() for box in boxes])
    expected = opencv_curves(maps.astype(np.float64), boxes, np.arange(0, 1, 0.001), metric.iou, largest=False)
    assert all(np.array_equal(metric.compute()["curves"][iou], expected[iou]) for iou in metric.iou)
    assert len(metric.thresholds) == 1000


def test_knobs_change_the_figure() -> None:
    level = torch.zeros(1, 10, 10)
    level[0, :4, :4] = 1.0
    level[0, 6:, 5:] = 0.5

    def score(truth: list[float], **knobs) -> float:
        metric = MaxBoxAcc(knobs.pop("version", "v1"), 10, bootstrap=0, iou=knobs.pop("iou", (0.5,)), **knobs)
        metric.update(level, [[truth]])
        return metric.compute()["score"]

    assert score([5, 6, 10, 10], version="v2", clip=False, iou=(1.0,)) == 100
    assert score([5, 6, 10, 10], version="v2", clip=True, iou=(1.0,)) == 0
    # Without the extra pixel 16 of 25 are shared, with it 25 of 36.
    assert score([0, 0, 5, 5], iou=(0.66,), plus_one=False) == 0
    assert score([0, 0, 5, 5], iou=(0.66,), plus_one=True) == 100
    empty = {"empty": (2, 2, 8, 8), "bootstrap": 0}
    for box, right in (((2, 2, 8, 8), 100), ((0, 0, 1, 1), 0)):
        metric = MaxBoxAcc("v1", 10, **empty)
        metric.update(torch.zeros(1, 10, 10), [[box]])
        assert metric.compute()["score"] == right


def test_largest_by_pixels_is_another_component_than_by_contour() -> None:
    values = torch.zeros(1, 12, 12)
    values[0, 0, :11] = 1.0  # a line of 11 pixels has no area
    values[0, 4:7, 4:7] = 1.0
    for area, box in (("pixels", [0, 0, 11, 1]), ("contour", [4, 4, 7, 7])):
        metric = MaxBoxAcc("v1", 5, area=area, bootstrap=0)
        metric.update(values, [[box]])
        assert metric.compute()["score"] == 100
        metric.update(values, [[[8, 8, 11, 11]]])
        assert metric.compute()["score"] == 50


def test_any_array_or_tensor_of_floats() -> None:
    maps, boxes = few_photos(4)
    locked = maps.copy()
    locked.setflags(write=False)
    plain = MaxBoxAcc("v2", 30, bootstrap=20)
    plain.update(maps, boxes)
    torch_view = torch.from_numpy(maps).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    for same in (locked, maps.astype(">f8"), maps[:, ::-1].copy()[:, ::-1], np.asfortranarray(maps), torch_view):
        metric = MaxBoxAcc("v2", 30, bootstrap=20)
        metric.update(same, [torch.from_numpy(box) for box in boxes])
        assert metric.compute() == plain.compute()


def test_thresholds_given_one_by_one() -> None:
    maps, boxes = few_photos(5)
    metric = MaxBoxAcc("v1", [0.0, 0.125, 0.7, 0.999], bootstrap=0)
    metric.update(maps, boxes)
    expected = opencv_curves(maps, boxes, np.array([0.0, 0.125, 0.7, 0.999]), (0.5,), largest=True)
    assert np.array_equal(metric.compute()["curves"][0.5], expected[0.5])


def test_bootstrap_is_that_of_the_weights() -> None:
    from molt.evaluation.bootstrap import poisson_weights

    maps, boxes = few_photos(6)
    names = [f"photo {i}" for i in range(len(maps))]
    metric = MaxBoxAcc("v2", 50, bootstrap=300, seed=4, confidence=0.8)
    metric.update(maps, boxes, ids=names)
    weights = poisson_weights([f"={name}" for name in names], 300, 4).numpy()[:, 1:]
    best = []
    for iou in metric.iou:
        hits = np.stack(
            [
                opencv_curves(maps[i : i + 1], boxes[i : i + 1], metric.thresholds, (iou,), False)[iou]
                for i in range(len(maps))
            ]
        )
        best.append((weights.T @ hits / weights.sum(0)[:, None]).max(1))
    found = metric.compute()
    for iou, row in zip(metric.iou, best, strict=True):
        assert found["per_iou_interval"][iou] == pytest.approx(np.quantile(row, [0.1, 0.9]))
    assert found["interval"] == pytest.approx(np.quantile(np.mean(best, 0), [0.1, 0.9]))
    low, high = found["interval"]
    assert low < found["score"] < high


def test_order_batches_and_numbers_do_not_matter() -> None:
    maps, boxes = few_photos(7)
    names = [str(i) for i in range(len(maps))]
    one, many, other = (MaxBoxAcc("v1", 40, bootstrap=100, seed=seed) for seed in (0, 0, 1))
    one.update(maps, boxes, ids=names)
    other.update(maps, boxes, ids=names)
    for i in reversed(range(len(maps))):
        many.update(maps[i : i + 1], boxes[i : i + 1], ids=names[i : i + 1])
    assert one.compute() == many.compute()
    assert (
        one.compute()["interval"] != other.compute()["interval"] and one.compute()["score"] == other.compute()["score"]
    )
    unnamed = [MaxBoxAcc("v1", 40, bootstrap=100) for _ in range(2)]
    unnamed[0].update(maps, boxes)
    for i in range(len(maps)):
        unnamed[1].update(maps[i : i + 1], boxes[i : i + 1])
    assert unnamed[0].compute() == unnamed[1].compute()


def test_weights_are_poisson_and_fixed_for_good() -> None:
    from molt.evaluation.bootstrap import poisson_weights

    weights = poisson_weights([str(i) for i in range(400)], 500, 0)
    assert weights.shape == (400, 501) and weights.dtype == torch.int32 and (weights[:, 0] == 1).all()
    shares = torch.bincount(weights[:, 1:].flatten().long())[:5] / weights[:, 1:].numel()
    assert torch.allclose(shares, torch.tensor([0.36788, 0.36788, 0.18394, 0.06131, 0.01533]), atol=0.004)
    assert poisson_weights(["=a"], 8, 0)[0].tolist() == [1, 2, 0, 3, 1, 1, 0, 3, 2]


def test_state_does_not_grow_and_pickles() -> None:
    maps, boxes = few_photos(8)
    metric = MaxBoxAcc("v2", 100, bootstrap=50)
    sizes = []
    for _ in range(2):
        metric.update(maps, boxes)
        sizes.append(sum(state.numel() for state in metric.metric_state.values()))
    assert sizes[0] == sizes[1]
    again = pickle.loads(pickle.dumps(metric))
    again.update(maps, boxes)
    metric.update(maps, boxes)
    assert again.compute() == metric.compute()
    for one in (metric, again):
        one.reset()
        with pytest.warns(UserWarning, match="before the"), pytest.raises(RuntimeError, match="no photo came yet"):
            one.compute()
    for one in (metric, again):
        one.update(maps[:9], boxes[:9])
    assert metric.compute() == again.compute() and metric.compute()["count"] == 9


def test_protocol_line() -> None:
    line = str(MaxBoxAcc("v2").protocol)
    assert line == (
        "MaxBoxAccV2: thresholds=arange(0, 1, 1/1000), components=all by contour, iou=(0.3, 0.5, 0.7), clip=True, "
        "plus_one=True, empty=(0, 0, 0, 0); best threshold of each IoU on the scored photos (oracle)"
    )
    metric = MaxBoxAcc("v1", [0.1, 0.5], area="pixels", bootstrap=0)
    metric.update(np.ones((1, 4, 4)), [[[0, 0, 3, 3]]])
    assert metric.compute()["protocol"] == str(metric.protocol)
    assert "components=largest by pixels" in str(metric.protocol) and "2 from 0.1 to 0.5" in str(metric.protocol)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.full((2, 4, 4), [[[0.5]], [[1.5]]]), [[[0, 0, 1, 1]]] * 2), r"maps: map 1 has values from 1.5 to 1.5"),
        ((np.full((1, 4, 4), -0.25), [[[0, 0, 1, 1]]]), r"maps: map 0 has values from -0.25"),
        ((np.full((1, 4, 4), np.inf), [[[0, 0, 1, 1]]]), "to inf"),
        ((np.ones((4, 4)), [[[0, 0, 1, 1]]]), r"expected \(B, H, W\)"),
        ((np.ones((1, 0, 4)), [[[0, 0, 1, 1]]]), "at least one pixel"),
        ((np.ones((1, 4, 4), np.uint8), [[[0, 0, 1, 1]]]), "maps: got uint8, expected floats"),
        ((np.ones((1, 4, 4), complex), [[[0, 0, 1, 1]]]), "maps: got complex128, expected floats"),
        (("x", []), "maps: got str"),
        ((np.ones((2, 4, 4)), [[[0, 0, 1, 1]]]), "boxes: got 1 entry, expected 2"),
        ((np.ones((1, 4, 4)), [np.zeros((0, 4))]), r"boxes\[0\]: got shape \(0, 4\)"),
        ((np.ones((1, 4, 4)), [[0, 0, 1, 1]]), r"boxes\[0\]: got shape \(4,\)"),
        ((np.ones((1, 4, 4)), [[[0, 0, -1, 1]]]), "x0 <= x1"),
        ((np.ones((1, 4, 4)), [[[0, 0, np.nan, 1]]]), "finite"),
        ((np.ones((1, 4, 4)), [[[0, 0, 1, 1]]], "x"), "ids: got 'x', expected 1 strings"),
        ((np.ones((1, 4, 4)), [[[0, 0, 1, 1]]], [3]), "ids: "),
    ],
)
def test_bad_photos_add_nothing(arguments: tuple, message: str) -> None:
    metric = MaxBoxAcc("v1", 10, bootstrap=5)
    with pytest.raises((TypeError, ValueError), match=message):
        metric.update(*arguments)
    assert metric.count == 0 and not metric.differences.any() and not metric.nan_maps and not metric.weights.any()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"version": "v3"}, "version: got 'v3'"),
        ({"thresholds": 0}, "thresholds: got 0"),
        ({"thresholds": [0.5, 0.2]}, "each above the one before"),
        ({"thresholds": [0.5, 1.0]}, r"\[0, 1\)"),
        ({"iou": (0.5, 0.5)}, "different"),
        ({"iou": (0,)}, r"\(0, 1\]"),
        ({"area": "box"}, "area: got 'box'"),
        ({"confidence": 1.0}, "confidence: got 1.0"),
        ({"bootstrap": -1}, "bootstrap must be at least 0"),
        ({"empty": (0, 0, 1)}, "empty: got"),
    ],
)
def test_bad_knobs(knobs: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        MaxBoxAcc(**knobs)


def test_an_empty_batch_is_nothing() -> None:
    metric = MaxBoxAcc("v1", 10)
    metric.update(torch.zeros(0, 5, 5), [])
    assert metric.count == 0


@pytest.mark.parametrize("thresholds", [[0.2], 1])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_one_threshold_is_fixed_and_no_oracle(version, thresholds) -> None:
    maps = torch.rand(6, 20, 17, generator=torch.Generator().manual_seed(0)) ** 3
    maps[5] = 0
    boxes = [[[2, 3, 9, 12]]] * 3 + [[[0, 0, 16, 19], [4, 4, 9, 9]]] * 3
    for knobs in ({}, {"area": "pixels", "clip": False, "plus_one": False, "empty": (1, 1, 5, 5)}):
        iou = (0.01, 0.1, 0.3, 0.5, 0.7)
        one = MaxBoxAcc(version, thresholds, bootstrap=0, iou=iou, **knobs)
        at = float(one.thresholds[0])
        many = MaxBoxAcc(version, [at, at + 0.5], bootstrap=0, iou=iou, **knobs)
        one.update(maps, boxes)
        many.update(maps, boxes)
        assert {k: v[0] for k, v in one.compute()["curves"].items()} == {
            k: v[0] for k, v in many.compute()["curves"].items()
        }
        assert "oracle" not in str(one.protocol) and f"thresholds={at:g}," in str(one.protocol)
        assert "oracle" in str(many.protocol)
