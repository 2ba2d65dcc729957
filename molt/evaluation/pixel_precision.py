"""PxAP: average precision over the pixels of a whole set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molt.evaluation._inputs import check_maps, check_thresholds
from molt.evaluation._score_bins import IGNORE, score_histogram
from molt.evaluation.bootstrap import PhotoMetric
from molt.evaluation.max_box_acc import threshold_range
from molt.evaluation.protocol import Protocol


class PxAP(PhotoMetric):
    """Pixel average precision in percent: the area under precision and recall of the pixels of all photos together.

    Scores are counted in bins [t_i, t_i+1) and precision is summed over the steps of recall, from the highest threshold
    down (Choe et al., CVPR 2020; the figure of clovaai/wsolevaluation). Pixels to ignore count nowhere. A map that
    holds a NaN counts as all zeros and is reported as ``nan_maps``.

    Counts of pixels are pooled, so each resample holds its own histogram: 200 resamples at 1000 thresholds are 3 MB.

    Args:
        thresholds: N for ``np.arange(0, 1, 1 / N)``, or an increasing sequence in [0, 1) that starts at 0.
        bootstrap: number of resamples of the photos for the interval, 0 for none.
        seed: of the resamples.
        confidence: of the interval.
        **kwargs: of `torchmetrics.Metric`.

    Raises:
        TypeError, ValueError: an argument of another type or range.
    """

    histograms: Tensor
    nan_maps: Tensor

    def __init__(
        self,
        thresholds: int | Sequence[float] = 1000,
        *,
        bootstrap: int = 200,
        seed: int = 0,
        confidence: float = 0.95,
        **kwargs: Any,
    ) -> None:
        values = check_thresholds(thresholds)
        if values[0] != 0:
            raise ValueError(f"thresholds: got {values[0]:g} as the first, expected 0, or low scores count nowhere")
        settings = {"thresholds": threshold_range(thresholds, values), "ignore": IGNORE}
        notes = ("pixels of all photos pooled",)
        super().__init__(Protocol("PxAP", settings=settings, notes=notes), bootstrap, seed, confidence, **kwargs)
        self.thresholds = values
        # The last two bins, [1, 2) and [2, 3], are wsolevaluation's: a score of 1 has a bin of its own.
        self._edges = np.append(values, [1.0, 2.0, 3.0])
        self._steps = int(thresholds) if isinstance(thresholds, int | np.integer) else None
        # Whole numbers below 2^53, so sums in float64 are exact and matrix products fast.
        shape = (1 + self.bootstrap, 2, len(values) + 2)
        self.add_state("histograms", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("nan_maps", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        maps: Tensor | NDArray[np.floating[Any]],
        masks: Tensor | NDArray[np.generic],
        ids: Sequence[str] | None = None,
    ) -> None:
        """Add photos.

        Args:
            maps: (B, H, W) floats in [0, 1].
            masks: (B, H, W) bool or integers: 1 object, 0 background, 255 ignored.
            ids: B names. A photo's name decides its resamples, in every process and metric; by default its number.

        Raises:
            TypeError, ValueError: an argument of another type, shape or range; nothing is added then.
        """
        found, nan = check_maps(maps, "(B, H, W)", self.weights.device)
        truth = _check_masks(masks, found)
        drawn = self._draw(len(found), ids).cpu().numpy()
        counts = np.zeros((len(found), self.histograms[0].numel()))
        # Photo by photo, so that what is at work stays in the cache.
        for index, (one, mask, bad) in enumerate(zip(found.cpu(), truth, nan.tolist(), strict=True)):
            scores = np.zeros(mask.shape) if bad else one.double().numpy()
            counts[index] = score_histogram(scores, mask, self._edges, self._steps).ravel()
        # Whole numbers: below 2^24 sums are exact in float32, too, and take half as long.
        small = drawn.sum(0).max(initial=0) * counts.max(initial=0) < 2**24
        kind = np.float32 if small else np.float64
        sums = torch.from_numpy(drawn.T.astype(kind) @ counts.astype(kind))
        self.histograms += sums.to(self.histograms.device).view_as(self.histograms)
        self.nan_maps += nan.sum()

    def compute(self) -> dict[str, Any]:
        """Return the figures.

        Returns:
            score, percent; interval (low, high) of it, or None without bootstrap; precision and recall in [0, 1] at
            each of thresholds, which end with 1.0: pixels at or above it, precision NaN where there are none; count;
            nan_maps; positive_pixels; protocol, one line.

        Raises:
            RuntimeError: no photo came yet, or none of their pixels is an object's.
        """
        self._totals()
        # Whole numbers, which a GPU adds up in any order alike.
        positive, negative = self.histograms.long().flip(2).cumsum(2).double().unbind(1)
        whole = positive[:, -1:]
        if whole[0] == 0:
            raise RuntimeError(
                "PxAP.compute: none of the pixels so far is an object's (1; 255 is ignored), so there is no recall"
            )
        precision = positive / (positive + negative)
        recall = positive / whole
        area = (precision[:, 1:] * recall.diff(dim=1)).nan_to_num(0.0).sum(1) * 100
        area = torch.where(whole[:, 0] > 0, area, torch.nan)
        return {
            "score": area[0].item(),
            "interval": self._interval(area),
            "precision": precision[0, 1:].flip(0).tolist(),
            "recall": recall[0, 1:].flip(0).tolist(),
            "thresholds": [*self.thresholds.tolist(), 1.0],
            "count": self.count,
            "nan_maps": int(self.nan_maps),
            "positive_pixels": int(whole[0]),
            "protocol": str(self.protocol),
        }


def _check_masks(masks: object, maps: Tensor) -> NDArray[np.uint8]:
    if not isinstance(masks, Tensor | np.ndarray):
        raise TypeError(f"masks: got {type(masks).__name__}, expected a tensor or an array (B, H, W)")
    found = masks.detach().cpu().numpy() if isinstance(masks, Tensor) else masks
    if found.dtype.kind not in "biu":
        raise TypeError(f"masks: got {found.dtype}, expected bool or integers 0, 1, 255")
    if found.shape != tuple(maps.shape):
        raise ValueError(f"masks: got shape {found.shape}, expected the maps' {tuple(maps.shape)}")
    if found.dtype == bool:
        return found.view(np.uint8)
    bad = (found != 0) & (found != 1) & (found != IGNORE)
    if bad.any():
        index = int(bad.any((1, 2)).argmax())
        raise ValueError(f"masks: mask {index} holds {found[bad][0]}, expected only 0, 1 and 255 (ignored)")
    return found.astype(np.uint8, copy=False)
