"""Scores of many photos from their curves: IoU of a map's box at every cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from molt.evaluation._inputs import check_thresholds
from molt.evaluation._score_bins import score_histogram

BOX_SCORES = ("max_box_acc", "max_box_acc_v2", "mean_iou")
TOP_K = (1, 5)
TITLES = {
    "max_box_acc": "MaxBoxAcc",
    "max_box_acc_v2": "MaxBoxAccV2",
    "mean_iou": "mean IoU",
    "gt_known_loc": "GT-known Loc",
    "top1_loc": "Top-1 Loc",
    "top5_loc": "Top-5 Loc",
    "top1_cls": "Top-1 accuracy",
    "top5_cls": "Top-5 accuracy",
    "corloc": "CorLoc",
    "pxap": "PxAP",
}
V1_IOU = 0.5  # MaxBoxAcc's
DRAWS = 100  # at a time, for the same reason
BLOCK = 4096  # photos at a time, so that memory does not grow with their number
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Curves:
    """What is kept of n photos.

    Attributes:
        any: (n, 255) float32: at each cut the best IoU of any contour's box.
        largest: (n, 255) float32: at each cut the IoU of the largest contour's box.
        peak: (n,) int64, the highest level, 0 to 255, of each map.
        pixels: (n, 2, bins) counts of scores on foreground and on background pixels, or None.
        rank: (n,) int64, the place of each label among the predicted classes, 0 the likeliest, or None.
    """

    any: NDArray[np.float32]
    largest: NDArray[np.float32]
    peak: NDArray[np.int64]
    pixels: NDArray[np.uint32] | None = None
    rank: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.peak)

    def take(self, rows: NDArray) -> Curves:
        """Return the curves of some photos, by index or mask."""
        pixels = None if self.pixels is None else self.pixels[rows]
        rank = None if self.rank is None else self.rank[rows]
        return Curves(self.any[rows], self.largest[rows], self.peak[rows], pixels, rank)


def thresholds(number: int) -> Array:
    """Return ``np.arange(0, 1, 1 / number)``, as the metrics do."""
    return check_thresholds(number)


def at_threshold(curve: NDArray[np.float32], peak: NDArray[np.int64], threshold: float) -> Array:
    """Return (n,) values of (n, 255) curves at one threshold, which is a share of each map's maximum."""
    cut = (peak * threshold).astype(np.int64)
    return np.take_along_axis(curve, cut[:, None], 1)[:, 0].astype(np.float64)


def over_thresholds(
    curve: NDArray[np.float32],
    peak: NDArray[np.int64],
    grid: Array,
    iou: float | None,
    weights: NDArray | None = None,
    only: NDArray[np.bool_] | None = None,
) -> Array:
    """Return (draws, T): at each threshold the weighted share of photos whose value is at least ``iou``.

    Args:
        curve: (n, 255), n at least 1.
        peak: (n,) as in :class:`Curves`.
        grid: (T,) thresholds in [0, 1).
        iou: None averages the values themselves.
        weights: (draws, n) how often each photo counts; None gives one draw in which each counts once.
        only: (n,) the photos that can count as right; None for all.
    """
    # Most thresholds read the same cuts as their neighbours.
    cuts = (np.unique(peak)[:, None] * grid).astype(np.int64)
    _, first, inverse = np.unique(cuts, axis=1, return_index=True, return_inverse=True)
    weights = np.ones((1, len(peak)), np.uint16) if weights is None else weights
    total = np.zeros((len(weights), len(first)))
    for start in range(0, len(peak), BLOCK):
        some = slice(start, start + BLOCK)
        read = np.take_along_axis(curve[some], (peak[some, None] * grid[first]).astype(np.int64), 1)
        # In float32 on both sides: 0.7 is not the same number in float64.
        values = read if iou is None else (read >= np.float32(iou)).astype(np.float32)
        if only is not None:
            values = values * only[some, None]
        total += weights[:, some].astype(np.float32) @ values
    return np.asarray((total / weights.sum(1, dtype=np.float64)[:, None])[:, inverse.reshape(-1)])


def pixel_histogram(
    scores: NDArray[np.float64], mask: NDArray[np.uint8], grid: Array, steps: int
) -> NDArray[np.uint32]:
    """Return (2, T + 1) counts of scores in [t, next t) on foreground (1) and background (0); 255 does not count.

    ``grid`` is ``thresholds(steps)``.
    """
    return score_histogram(scores, mask, np.append(grid, [1.0, 2.0]), steps).astype(np.uint32)


def pixel_precision(pixels: NDArray[np.uint32], weights: NDArray | None = None) -> Array:
    """Return (draws,) PxAP in [0, 1], all pixels pooled; 0 where there is no foreground (wsolevaluation's sum).

    Args:
        pixels: (n, 2, bins), see :func:`pixel_histogram`.
        weights: (draws, n) as in :func:`over_thresholds`.
    """
    weights = np.ones((1, len(pixels)), np.uint16) if weights is None else weights
    total = np.zeros((len(weights), *pixels.shape[1:]))
    for start in range(0, len(pixels), BLOCK):
        some = slice(start, start + BLOCK)
        total += np.tensordot(weights[:, some].astype(np.float64), pixels[some].astype(np.float64), 1)
    hits, kept = total[:, 0, ::-1].cumsum(1), total.sum(1)[:, ::-1].cumsum(1)
    precision = np.divide(hits, kept, out=np.zeros_like(hits), where=kept > 0)
    found = hits[:, -1:]
    recall = np.divide(hits, found, out=np.zeros_like(hits), where=found > 0)
    return np.asarray((precision * np.diff(recall, axis=1, prepend=0)).sum(1))


def scores(curves: Curves, grid: Array, ious: Sequence[float], weights: NDArray | None = None) -> dict[str, Array]:
    """Return (draws,) values in [0, 1] by name: those of :data:`TITLES` but pxap, and "any IOU" at each IoU.

    Each draw takes its own best thresholds, as a data set of these photos would; mean_iou is at MaxBoxAcc's, of equally
    good ones the one of the best mean IoU. GT-known Loc and CorLoc are other names of MaxBoxAcc; Top-k Loc and accuracy
    are there where the curves have ranks.
    """
    v1 = over_thresholds(curves.largest, curves.peak, grid, V1_IOU, weights)
    means = over_thresholds(curves.largest, curves.peak, grid, None, weights)
    best = best_threshold(v1, means)
    reached = {f"any {iou:g}": over_thresholds(curves.any, curves.peak, grid, iou, weights).max(1) for iou in ious}
    v2 = np.mean(list(reached.values()), 0)
    rows = np.arange(len(v1))
    found = {"max_box_acc": v1[rows, best], "max_box_acc_v2": v2, "mean_iou": means[rows, best]} | reached
    found |= {"gt_known_loc": v1[rows, best], "corloc": v1[rows, best]}
    if curves.rank is not None:
        often = np.ones((1, len(curves))) if weights is None else weights.astype(np.float64)
        for k in TOP_K:
            named = curves.rank < k
            right = over_thresholds(curves.largest, curves.peak, grid, V1_IOU, weights, only=named)
            found |= {f"top{k}_loc": right.max(1), f"top{k}_cls": often @ named / often.sum(1)}
    return found


def figures(*, ranked: bool, fixed: bool, any_object: bool) -> tuple[str, ...]:
    """Return which of :func:`scores` a run reports.

    Args:
        ranked: whether classes are predicted.
        fixed: whether there is one threshold only.
        any_object: whether every object of a photo counts.
    """
    found = [*BOX_SCORES]
    if ranked or fixed:
        found.append("gt_known_loc")
    if ranked:
        found += [f"top{k}_{what}" for what in ("loc", "cls") for k in TOP_K]
    return (*found, "corloc") if any_object else tuple(found)


def title(name: str, *, fixed: bool) -> str:
    """Return what a metric is called in tables: what is at a fixed threshold is no maximum."""
    found = TITLES.get(name, name)
    return found.removeprefix("Max") if fixed else found


def best_threshold(accuracy: Array, means: Array) -> NDArray[np.int64]:
    """Return (draws,) the index of the best of (draws, T) accuracies, of equals the one whose mean IoU is best."""
    best: NDArray[np.int64] = np.where(accuracy == accuracy.max(1, keepdims=True), means, -1.0).argmax(1)
    return best


def redraw(number: int, draws: int, seed: int) -> Iterator[NDArray[np.uint16]]:
    """Yield (some draws, number): how often each photo comes when as many are drawn with replacement (bootstrap)."""
    generator = np.random.default_rng(seed)
    for start in range(0, draws, DRAWS):
        counts = np.empty((min(DRAWS, draws - start), number), np.uint16)
        for row in counts:
            row[:] = np.bincount(generator.integers(0, number, number), minlength=number)
        yield counts


def drawn_scores(curves: Curves, grid: Array, ious: Sequence[float], draws: int, seed: int) -> dict[str, Array]:
    """Return (draws,) values of :func:`scores` by name, photos redrawn."""
    parts = [scores(curves, grid, ious, weights) for weights in redraw(len(curves), draws, seed)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def drawn_precision(pixels: NDArray[np.uint32], draws: int, seed: int) -> Array:
    """Return (draws,) values of :func:`pixel_precision`, photos redrawn."""
    return np.concatenate([pixel_precision(pixels, weights) for weights in redraw(len(pixels), draws, seed)])


def interval(values: Array) -> tuple[float, float]:
    """Return the bounds of the middle 95 %."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def error_kind(box: Sequence[float] | None, truth: NDArray[np.float64], iou: float, plus_one: bool = True) -> str:
    """Return what is wrong with a box: right, multi_instance, part, more or wrong (TS-CAM's split, without the class).

    Right is an IoU of at least 0.5. More than one true box covered by over 0.3 of its area is multi_instance. Else
    the true box of best IoU decides: over half of the box inside it is part, at least 0.7 of it inside the box is more.

    Args:
        box: xyxy, or None where there is none.
        truth: (n, 4) xyxy in the same pixels.
        iou: of the box with the true box it fits best.
        plus_one: whether a box from x0 to x1 is x1 - x0 + 1 wide.
    """
    if iou >= V1_IOU:
        return "right"
    if box is None:
        return "wrong"
    extra = 1.0 if plus_one else 0.0
    x0, y0, x1, y1 = box
    across = np.minimum(truth[:, 2], x1) - np.maximum(truth[:, 0], x0) + extra
    down = np.minimum(truth[:, 3], y1) - np.maximum(truth[:, 1], y0) + extra
    shared = across.clip(0) * down.clip(0)
    of_truth = (truth[:, 2] - truth[:, 0] + extra) * (truth[:, 3] - truth[:, 1] + extra)
    of_box = (x1 - x0 + extra) * (y1 - y0 + extra)
    if (shared > 0.3 * of_truth).sum() > 1:
        return "multi_instance"
    best = (shared / np.maximum(of_truth + of_box - shared, 1e-9)).argmax()
    if shared[best] > 0.5 * of_box:
        return "part"
    return "more" if shared[best] > 0 and shared[best] >= 0.7 * of_truth[best] else "wrong"
