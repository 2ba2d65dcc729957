"""PxAP against histograms and sums by NumPy, its bins at their edges, and its intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from molt.evaluation import PxAP
from molt.evaluation._score_bins import score_bins

pytestmark = pytest.mark.usefixtures("one_thread")


def photos(seed: int, number: int = 8, shape: tuple[int, int] = (13, 9)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    masks = rng.choice([0, 1, 255], (number, *shape), p=[0.6, 0.3, 0.1])
    maps = (rng.random(masks.shape) * 0.7 + 0.3 * (masks == 1)).clip(0, 1)
    maps[rng.random(maps.shape) < 0.05] = 1.0
    maps[rng.random(maps.shape) < 0.05] = 0.0
    return maps, masks.astype(np.uint8)


def by_numpy(maps: np.ndarray, masks: np.ndarray, thresholds: np.ndarray) -> float:
    """Precision summed over the steps of recall, from histograms of all pixels of each kind."""
    edges = np.concatenate([thresholds, [1.0, 2.0, 3.0]])
    right, wrong = (np.histogram(maps[masks == kind], edges)[0][::-1].cumsum() for kind in (1, 0))
    area = 0.0
    for i in range(1, len(right)):
        if right[i] + wrong[i]:
            area += right[i] / (right[i] + wrong[i]) * (right[i] - right[i - 1]) / right[-1]
    return 100 * area


@pytest.mark.parametrize("thresholds", [1000, 49, 1, 7, [0.0, 0.3, 0.31, 0.9]])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_matches_numpy(thresholds, dtype) -> None:
    maps, masks = photos(0)
    maps = maps.astype(dtype)
    metric = PxAP(thresholds, bootstrap=0)
    metric.update(torch.from_numpy(maps[:3]), torch.from_numpy(masks[:3]))
    metric.update(maps[3:], masks[3:])
    values = np.arange(0, 1, 1 / thresholds) if isinstance(thresholds, int) else np.array(thresholds)
    found = metric.compute()
    assert found["score"] == pytest.approx(by_numpy(maps.astype(np.float64), masks, values), abs=1e-10)
    assert found["count"] == 8 and found["positive_pixels"] == (masks == 1).sum() and found["interval"] is None


def test_many_thresholds_come_close_to_average_precision() -> None:
    maps, masks = photos(1, number=20)
    kept = (masks != 255) & (maps < 1) & (maps > 0)  # without ties the area is a sum over pixels
    again = PxAP(20_000, bootstrap=0)
    again.update(maps, np.where(kept, masks, 255))
    right = (masks[kept] == 1)[np.argsort(-maps[kept])]
    expected = (right.cumsum() / np.arange(1, len(right) + 1))[right].mean()
    assert again.compute()["score"] == pytest.approx(100 * expected, abs=0.05)


@pytest.mark.parametrize("thresholds", [1000, 49, 3, 98, 997, [0.0, 0.1, 0.100000001, 0.5]])
def test_bins_are_those_of_histogram_at_the_edges(thresholds) -> None:
    metric = PxAP(thresholds, bootstrap=0)
    edges = np.append(metric.thresholds, [1.0, 2.0, 3.0])
    scores = np.concatenate([edges[:-2], np.nextafter(edges[:-2], 0), np.nextafter(edges[:-3], 1)])
    scores = scores[scores <= 1]
    metric.update(scores[None, None], np.ones((1, 1, len(scores)), dtype=bool))
    assert np.array_equal(metric.histograms[0, 0].numpy(), np.histogram(scores, edges)[0])
    each = score_bins(scores, edges, thresholds if isinstance(thresholds, int) else None)
    assert np.array_equal(each, np.searchsorted(edges, scores, side="right") - 1)


def test_curve() -> None:
    metric = PxAP(4, bootstrap=0)
    metric.update(np.array([[[0.0, 0.25, 0.3, 1.0, 0.9]]]), np.array([[[0, 1, 0, 1, 255]]]))
    found = metric.compute()
    assert found["thresholds"] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert found["recall"] == [1.0, 1.0, 0.5, 0.5, 0.5]
    assert found["precision"] == [0.5, pytest.approx(2 / 3), 1.0, 1.0, 1.0]
    assert found["score"] == pytest.approx(100 * (0.5 + 0.5 * 2 / 3))
    empty = PxAP(4, bootstrap=0)
    empty.update(np.array([[[0.3]]]), np.array([[[1]]]))
    assert np.isnan(empty.compute()["precision"][2:]).all() and empty.compute()["score"] == 100


def test_nan_map_counts_as_zeros() -> None:
    maps, masks = photos(2)
    zeroed = maps.copy()
    zeroed[3] = 0
    maps[3, 5, 5] = np.nan
    found, expected = PxAP(100, bootstrap=0), PxAP(100, bootstrap=0)
    found.update(maps, masks)
    expected.update(zeroed, masks)
    assert found.compute() | {"nan_maps": 0} == expected.compute() and found.compute()["nan_maps"] == 1


def test_bootstrap_is_that_of_the_weights() -> None:
    from molt.evaluation.bootstrap import poisson_weights

    maps, masks = photos(3, number=15)
    names = [str(i) for i in range(15)]
    metric = PxAP(50, bootstrap=60, seed=2)
    metric.update(maps[:4], masks[:4], ids=names[:4])
    metric.update(maps[4:], masks[4:], ids=names[4:])
    weights = poisson_weights([f"={name}" for name in names], 60, 2)[:, 1:].numpy()
    scores = [by_numpy(np.repeat(maps, w, 0), np.repeat(masks, w, 0), metric.thresholds) for w in weights.T]
    assert metric.compute()["interval"] == pytest.approx(np.quantile(scores, [0.025, 0.975]))


def test_resamples_without_an_object_are_left_out() -> None:
    metric = PxAP(10, bootstrap=100)
    metric.update(np.full((2, 3, 3), 0.5), np.array([np.zeros((3, 3)), np.eye(3)], dtype=int))
    low, high = metric.compute()["interval"]
    assert 0 < low < high <= 100


def test_no_object_pixel_is_an_error() -> None:
    metric = PxAP(10)
    metric.update(np.ones((1, 3, 3)), np.zeros((1, 3, 3), dtype=bool))
    with pytest.raises(RuntimeError, match="none of the pixels so far is an object's"):
        metric.compute()
    metric.update(np.ones((1, 3, 3)), np.ones((1, 3, 3), dtype=np.int64))
    assert metric.compute()["score"] == 50


@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        (np.ones((1, 2, 2)), np.full((1, 2, 2), 7), "masks: mask 0 holds 7"),
        (np.ones((1, 2, 2)), np.full((1, 2, 2), -1), "holds -1"),
        (np.ones((1, 2, 2)), np.ones((1, 2, 2)), "masks: got float64"),
        (np.ones((1, 2, 2)), np.ones((1, 2, 3), int), r"masks: got shape \(1, 2, 3\)"),
        (np.ones((1, 2, 2)), [[[1, 1], [1, 1]]], "masks: got list"),
        (np.full((1, 2, 2), 1.01), np.ones((1, 2, 2), int), "maps: map 0 has values"),
    ],
)
def test_bad_photos_add_nothing(maps, masks, message: str) -> None:
    metric = PxAP(10)
    with pytest.raises((TypeError, ValueError), match=message):
        metric.update(maps, masks)
    assert metric.count == 0 and not metric.histograms.any()


def test_thresholds_must_start_at_zero() -> None:
    with pytest.raises(ValueError, match=r"got 0\.1 as the first"):
        PxAP([0.1, 0.2])


@pytest.mark.parametrize("number", [3, 400])
def test_sums_are_whole_in_small_and_in_large_batches(number: int) -> None:
    maps = np.full((number, 224, 224), 0.4)  # all pixels in one bin, the most that can come together
    maps[:, 0, 0] = np.linspace(0, 1, number)
    masks = np.ones(maps.shape, dtype=bool)
    one, many = (PxAP(10, bootstrap=20) for _ in range(2))
    one.update(maps, masks)
    for start in range(number):
        many._seen = start  # as it is after as many photos
        many.update(maps[start : start + 1], masks[start : start + 1])
    assert torch.equal(one.histograms, many.histograms)
    assert one.histograms[0].sum() == number * 224 * 224
