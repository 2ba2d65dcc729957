"""IoU of boxes at every cut, boxes at one, counts of scores: the core against the plain twin, and wrong arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from molt import ops
from molt.evaluation import box_curves, to_levels
from molt.evaluation._inputs import check_thresholds
from molt.evaluation._score_bins import score_histogram
from molt.evaluation.box_curves import Area, largest_at_one_cut


def made(seed: int, count: int = 3) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 16, 2)
    number = int(rng.choice([1, 2, 4, 255]))
    levels = (rng.integers(0, number + 1, (count, height, width)) * (255 // number)).astype(np.uint8)
    boxes = []
    for _ in range(count):
        corner = rng.uniform(0, 12, (rng.integers(1, 4), 2))
        boxes.append(np.concatenate([corner, corner + rng.uniform(0, 8, corner.shape)], 1))
    return levels, boxes


@pytest.mark.parametrize("area", ["contour", "pixels"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("plus_one", [True, False])
def test_native_reference_arrays_and_tensors_agree(area: str, clip: bool, plus_one: bool) -> None:
    for seed in range(12):
        levels, boxes = made(seed)
        knobs = {"area": area, "clip": clip, "plus_one": plus_one, "empty": (0, 0, 1, 1)}
        native = box_curves(levels, boxes, **knobs)
        assert native.any.shape == native.largest.shape == (3, 255)
        for other in (
            box_curves(levels, boxes, **knobs, backend="reference"),
            box_curves(torch.from_numpy(levels), boxes, **knobs),
            box_curves(levels[:, ::-1][:, ::-1], [torch.from_numpy(own).tolist() for own in boxes], **knobs),
        ):
            for field in ("any", "largest", "peak"):
                np.testing.assert_array_equal(getattr(native, field), getattr(other, field))
        assert (native.any >= native.largest).all()
        any_only, largest_only = (box_curves(levels, boxes, **knobs, which=which) for which in ("any", "largest"))
        np.testing.assert_array_equal(any_only.any, native.any)
        np.testing.assert_array_equal(largest_only.largest, native.largest)
        assert any_only.largest.shape == largest_only.any.shape == (0, 255)


def test_one_box_by_hand() -> None:
    levels = np.zeros((1, 10, 10), np.uint8)
    levels[0, 2:5, 3:9] = 200
    levels[0, 7, 7] = 90
    found = box_curves(levels, [[[3, 2, 9, 5]]])
    assert found.peak.tolist() == [200]
    # wsolevaluation: the box 3, 2, 9, 5 is 7 x 4 pixels.
    assert found.largest[0, :200].tolist() == [1.0] * 200
    assert found.any[0, 199] == 1.0
    assert found.largest[0, 200:].tolist() == [0.0] * 55, "the box 0, 0, 0, 0 does not touch the true one"
    assert found.cuts(np.array([0.0, 0.5, 0.999])).tolist() == [[0, 100, 199]]
    at_corner = box_curves(levels, [[[0, 0, 1, 1]]], empty=(0, 0, 1, 1))
    assert at_corner.largest[0, 200:].tolist() == [1.0] * 55
    one = box_curves(levels, [[[6.0, 7, 7, 8]]], plus_one=False)
    assert one.any[0, 0] == 0.0
    assert box_curves(levels, [[[7.0, 7, 8, 8]]], plus_one=False).any[0, 89] == 1.0


def test_levels_cut_off_after_the_point_in_double_precision() -> None:
    values = np.array([[[0.0, 1.0, 0.5, 127 / 255, np.nextafter(127 / 255, 0), 1 / 255, 0.999999]]])
    assert to_levels(values).tolist() == [[[0, 255, 127, 127, 126, 1, 254]]]
    assert to_levels(torch.from_numpy(values)).tolist() == to_levels(values).tolist()
    single = torch.tensor([[[0.1]]])
    assert to_levels(single).tolist() == [[[int(255 * float(single))]]]
    assert to_levels(torch.full((2, 2, 2), 0.3, dtype=torch.float16)).dtype == torch.uint8


def test_a_map_with_nan_becomes_zeros_and_no_other() -> None:
    values = np.full((3, 2, 2), 0.8)
    values[1, 0, 1] = np.nan
    for given in (values, torch.from_numpy(values)):
        assert np.asarray(to_levels(given)).max((1, 2)).tolist() == [204, 0, 204]


def test_no_map() -> None:
    empty = box_curves(np.zeros((0, 4, 4), np.uint8), [])
    assert empty.any.shape == (0, 255)
    assert box_curves(torch.zeros(0, 4, 4, dtype=torch.uint8), []).peak.shape == (0,)


LEVELS = np.zeros((2, 4, 4), np.uint8)
BOXES = [[[0, 0, 1, 1]], [[0, 0, 1, 1]]]


@pytest.mark.parametrize(
    ("levels", "boxes", "knobs", "error", "message"),
    [
        (LEVELS.tolist(), BOXES, {}, TypeError, "levels: got list, expected a tensor or array"),
        (LEVELS[0], BOXES, {}, ValueError, r"levels: got shape \(4, 4\), expected \(B, H, W\)"),
        (LEVELS[:, :0], BOXES, {}, ValueError, r"levels: got shape \(2, 0, 4\), expected \(B, H, W\)"),
        (LEVELS.astype(float), BOXES, {}, TypeError, "levels: got float64, expected uint8"),
        (LEVELS, BOXES[:1], {}, ValueError, "boxes: got 1 entry, expected 2"),
        (LEVELS, [BOXES[0], []], {}, ValueError, r"boxes\[1\]: got shape \(0,\), expected \(n, 4\)"),
        (LEVELS, [BOXES[0], [[0, 0, np.nan, 1]]], {}, ValueError, r"boxes\[1\]: got .*nan"),
        (LEVELS, [BOXES[0], [[3, 0, 1, 1]]], {}, ValueError, r"boxes\[1\]: got .*expected finite"),
        (LEVELS, BOXES, {"area": "box"}, ValueError, "area: got 'box', expected one of contour, pixels"),
        (LEVELS, BOXES, {"which": "all"}, ValueError, "which: got 'all', expected one of both, any, largest"),
        (LEVELS, BOXES, {"empty": (0, 0)}, ValueError, "empty: got"),
        (LEVELS, BOXES, {"backend": "fast"}, ValueError, "backend: got 'fast'"),
    ],
)
def test_errors_name_the_argument(levels, boxes, knobs, error, message) -> None:
    with pytest.raises(error, match=f"^{message}"):
        box_curves(levels, boxes, **knobs)


def test_the_operator_refuses_what_would_read_other_memory() -> None:
    levels, truths = torch.zeros(1, 3, 3, dtype=torch.uint8), torch.zeros(2, 4, dtype=torch.float64)
    operator = torch.ops.molt.box_curves
    knobs = (True, True, 1.0, [0.0] * 4, True, True)
    assert operator(levels, truths, torch.tensor([0, 2]), *knobs)[0].shape == (1, 255)
    for offsets in ([0, 3], [1, 2], [0, 1, 2], [2, 0]):
        with pytest.raises(RuntimeError, match="offsets"):
            operator(levels, truths, torch.tensor(offsets), *knobs)
    with pytest.raises(RuntimeError, match="truths"):
        operator(levels, truths.float(), torch.tensor([0, 2]), *knobs)
    torch.library.opcheck(operator.default, (levels, truths, torch.tensor([0, 2]), *knobs))


@pytest.mark.parametrize("area", ["contour", "pixels"])
@pytest.mark.parametrize("relative", [True, False])
def test_one_cut_is_the_sweep_s_answer_at_that_cut(area: Area, relative: bool) -> None:
    rng = np.random.default_rng(3)
    for seed in range(60):
        levels, _ = made(seed, count=4)
        maps = torch.from_numpy(levels / 255).to(torch.float64 if seed % 2 else torch.float32)
        maps[3, 0, 0] = torch.nan
        # On levels, just below and just above them, where one rounding decides.
        whole = float(rng.integers(0, 255)) / 255
        for threshold in (0.0, whole, np.nextafter(whole, 0), np.nextafter(whole, 1), rng.uniform(0, 1)):
            share = float(np.clip(threshold, 0, np.nextafter(1.0, 0)))
            at = to_levels(maps)
            peak = at.flatten(1).amax(1).numpy() if relative else np.full(4, 255)
            swept = ops.largest_at_cuts(at[:, None], contours=area == "contour")[0][:, 0].double().numpy()
            want = swept[np.arange(4), (share * peak).astype(np.int64)]
            for backend in ("native", "reference"):
                found = largest_at_one_cut(maps, share, relative=relative, area=area, backend=backend)
                np.testing.assert_array_equal(found, want, f"{seed} {share} {backend}")


def test_one_cut_of_smooth_maps_with_rings_and_equal_parts() -> None:
    rings = np.zeros((40, 61))
    for inset, value in enumerate((0.9, 0.9, 0.2, 0.8, 0.8, 0.1, 0.9)):
        rings[2 * inset : 40 - 2 * inset, 2 * inset : 61 - 2 * inset] = value
    twins = np.zeros((40, 61))
    twins[3:9, 3:9] = twins[3:9, 20:26] = twins[20:26, 3:9] = 1.0
    thin = np.eye(40, 61)
    noise = torch.nn.functional.interpolate(torch.rand(1, 1, 9, 9), (40, 61), mode="bicubic")[0, 0].clamp(0, 1).numpy()
    maps = torch.from_numpy(np.stack([rings, rings.T.copy().reshape(40, 61), twins, thin, noise]))
    swept = {
        c: ops.largest_at_cuts(to_levels(maps)[:, None], contours=c)[0][:, 0].double().numpy() for c in (True, False)
    }
    for threshold in np.arange(0, 1, 0.01):
        cuts = (threshold * to_levels(maps).flatten(1).amax(1).numpy()).astype(np.int64)
        for area, contours in (("contour", True), ("pixels", False)):
            found = largest_at_one_cut(maps, float(threshold), area=area)
            np.testing.assert_array_equal(found, swept[contours][np.arange(5), cuts])
    assert largest_at_one_cut(maps[2:3], 0.5).tolist() == [[3, 20, 9, 26]], "of equal contours the last one"
    assert largest_at_one_cut(maps[2:3], 0.5, area="pixels").tolist() == [[3, 3, 9, 9]], "of equal parts the first one"
    assert largest_at_one_cut(maps[:0], 0.5).shape == (0, 4)


@pytest.mark.parametrize("thresholds", [1000, 7, [0.0, 0.3, 0.3000000001, 0.9]])
def test_scores_are_counted_as_histogram_does(thresholds) -> None:
    grid = check_thresholds(thresholds)
    edges = np.append(grid, [1.0, 2.0])
    steps = thresholds if isinstance(thresholds, int) else None
    around = np.concatenate([edges[:-1], np.nextafter(edges[1:-1], 0), np.nextafter(edges[:-2], 1)])
    scores = np.concatenate([around, np.random.default_rng(0).random(500)])
    mask = np.random.default_rng(1).choice(np.array([0, 1, 255], np.uint8), scores.shape)
    want = [np.histogram(scores[mask == value], edges)[0] for value in (1, 0)]
    for backend in ("native", "reference"):
        np.testing.assert_array_equal(score_histogram(scores, mask, edges, steps, backend), want)
    for bad in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="scores: expected"):
            score_histogram(np.array([bad]), np.ones(1, np.uint8), edges, steps)
