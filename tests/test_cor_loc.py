"""CorLoc and mean IoU against sums by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from molt.evaluation import CorLoc, MeanIoU

pytestmark = pytest.mark.usefixtures("one_thread")


def iou(a, b, extra: float) -> float:
    across, down = min(a[2], b[2]) - max(a[0], b[0]) + extra, min(a[3], b[3]) - max(a[1], b[1]) + extra
    common = max(across, 0) * max(down, 0)
    union = sum((box[2] - box[0] + extra) * (box[3] - box[1] + extra) for box in (a, b)) - common
    return common / union


def photos(seed: int, number: int = 60):
    rng = np.random.default_rng(seed)

    def box() -> np.ndarray:
        return np.sort(rng.integers(0, 12, (2, 2)) * [1, 1], axis=0).reshape(4) + np.array([0.0, 0.0, 1.0, 1.0])

    truth = [np.stack([box() for _ in range(rng.integers(1, 4))]) for _ in range(number)]
    return np.stack([box() for _ in range(number)]), truth, rng.integers(0, 3, number)


@pytest.mark.parametrize("plus_one", [False, True])
def test_share_and_mean_over_classes(plus_one: bool) -> None:
    predicted, truth, labels = photos(0)
    best = np.array([max(iou(p, t, plus_one) for t in ts) for p, ts in zip(predicted, truth, strict=True)])
    metric = CorLoc(0.4, classes=["a", "b", "c", "never"], plus_one=plus_one, bootstrap=0)
    metric.update(torch.from_numpy(predicted[:10]), truth[:10], torch.from_numpy(labels[:10]))
    metric.update(predicted[10:].tolist(), truth[10:], labels[10:].tolist())
    found = metric.compute()
    shares = [100 * (best[labels == c] >= 0.4).mean() for c in range(3)]
    assert 0 < found["score"] < 100 and found["score"] == pytest.approx(100 * (best >= 0.4).mean())
    assert found["class_mean"] == pytest.approx(np.mean(shares)) and found["class_mean_interval"] is None
    assert found["per_class"] == {**{n: pytest.approx(s) for n, s in zip("abc", shares, strict=True)}, "never": None}
    mean = MeanIoU(plus_one=plus_one, bootstrap=0)
    mean.update(predicted, truth)
    assert mean.compute()["score"] == pytest.approx(100 * best.mean())
    assert mean.compute()["std"] == pytest.approx(100 * best.std())
    assert mean.compute()["histogram"] == np.histogram(best, np.arange(11) / 10)[0].tolist()


def test_at_least_or_more() -> None:
    for strict, score in ((False, 100), (True, 0)):
        metric = CorLoc(0.5, strict=strict, bootstrap=0)
        metric.update([[0, 0, 2, 1]], [[[0, 0, 1, 1]]])
        assert metric.compute()["score"] == score
        assert f"strict={strict}" in metric.compute()["protocol"]


def test_nothing_found_is_wrong_and_perfect_is_in_the_last_tenth() -> None:
    metric, mean = CorLoc(bootstrap=0), MeanIoU(bootstrap=0)
    for one in (metric, mean):
        one.update([[0, 0, 0, 0], [1, 2, 3, 4]], [[[0, 0, 0, 0], [0, 0, 5, 5]], [[1, 2, 3, 4]]])
    assert metric.compute()["score"] == 50 and mean.compute()["histogram"] == [1, *[0] * 8, 1]


def test_intervals_are_those_of_the_weights() -> None:
    from molt.evaluation.bootstrap import poisson_weights

    predicted, truth, labels = photos(1)
    names = [str(i) for i in range(len(truth))]
    weights = poisson_weights([f"={name}" for name in names], 200, 0)[:, 1:].numpy()
    best = np.array([max(iou(p, t, 0) for t in ts) for p, ts in zip(predicted, truth, strict=True)])
    metric, mean = CorLoc(classes=3, bootstrap=200), MeanIoU(bootstrap=200)
    metric.update(predicted, truth, labels, ids=names)
    mean.update(predicted, truth, ids=names)
    right = (best >= 0.5).astype(float)
    ends = [0.025, 0.975]
    assert metric.compute()["interval"] == pytest.approx(np.quantile(100 * right @ weights / weights.sum(0), ends))
    classes = [(right * (labels == c)) @ weights / weights[labels == c].sum(0) for c in range(3)]
    assert metric.compute()["class_mean_interval"] == pytest.approx(np.quantile(100 * np.mean(classes, 0), ends))
    assert mean.compute()["interval"] == pytest.approx(np.quantile(100 * best @ weights / weights.sum(0), ends))
    assert list(metric.compute()["per_class"]) == [0, 1, 2]


@pytest.mark.parametrize(
    ("classes", "arguments", "message"),
    [
        (None, ([[0, 0, 1, 1]], [[[0, 0, 1, 1]]], [0]), "labels: some were given"),
        (3, ([[0, 0, 1, 1]], [[[0, 0, 1, 1]]]), "labels: none were given"),
        (3, ([[0, 0, 1, 1]], [[[0, 0, 1, 1]]], [3]), "labels: got values from 3 to 3, expected 0 to 2"),
        (3, ([[0, 0, 1, 1]], [[[0, 0, 1, 1]]], [0.5]), "labels: got float32, expected integers"),
        (3, ([[0, 0, 1, 1]], [[[0, 0, 1, 1]]], [0, 1]), r"labels: got shape \(2,\)"),
        (None, ([[0, 0, 1]], [[[0, 0, 1, 1]]]), r"predicted: got shape \(1, 3\)"),
        (None, ([[0, 0, np.nan, 1]], [[[0, 0, 1, 1]]]), "predicted: got"),
        (None, ([[2, 0, 1, 1]], [[[0, 0, 1, 1]]]), "x0 <= x1"),
        (None, ([[0, 0, 1, 1]], []), "boxes: got 0 entries, expected 1"),
        (None, ([[0, 0, 1, 1]], [[]]), r"boxes\[0\]: got shape"),
        (None, ("box", [[]]), "predicted: expected numbers"),
    ],
)
def test_bad_photos_add_nothing(classes, arguments: tuple, message: str) -> None:
    metric = CorLoc(classes=classes)
    with pytest.raises((TypeError, ValueError), match=message):
        metric.update(*arguments)
    assert metric.count == 0 and not metric.members.any()


@pytest.mark.parametrize("classes", [0, "abc", [], ["a", "a"], True])
def test_bad_classes(classes) -> None:
    with pytest.raises((TypeError, ValueError), match="classes: "):
        CorLoc(classes=classes)


def test_an_empty_batch_is_nothing() -> None:
    for metric, more in ((CorLoc(classes=2), ([],)), (CorLoc(), ()), (MeanIoU(), ())):
        metric.update(torch.zeros(0, 4), [], *more)
        assert metric.count == 0
