"""MaxBoxAcc and MaxBoxAccV2: box accuracy at the best threshold of the whole set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from molt.evaluation._inputs import (
    check_boxes,
    check_choice,
    check_empty,
    check_fraction,
    check_maps,
    check_thresholds,
)
from molt.evaluation._overlap import clipped, overlap
from molt.evaluation.bootstrap import PhotoMetric, add_steps, curves
from molt.evaluation.box_curves import Area, box_curves, largest_at_one_cut, to_levels
from molt.evaluation.protocol import Protocol


class MaxBoxAcc(PhotoMetric):
    """Share of photos whose map gives a right box, at the threshold that suits the whole set best, in percent.

    A map becomes uint8 by ``trunc(255 * map)``; it is not normalised again. At threshold t the pixels strictly above
    ``int(t * max)`` are kept. Version 1 boxes the largest contour and asks for IoU 0.5 with any true box; version 2
    takes the best of all contours' boxes, and is the mean over IoUs 0.3, 0.5 and 0.7 of each one's own best (Choe et
    al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020, and its extended version; the
    defaults give the figures of clovaai/wsolevaluation). The threshold is chosen on the photos that are scored: on a
    test set that is an oracle, and :attr:`protocol` says so; a single one is fixed.

    A map that holds a NaN counts as all zeros (wsolevaluation's own rule) and is reported as ``nan_maps``.

    Args:
        version: ``"v1"`` or ``"v2"``.
        thresholds: N for ``np.arange(0, 1, 1 / N)``, or an increasing sequence in [0, 1).
        iou: IoUs to reach; None for (0.5,) in version 1 and (0.3, 0.5, 0.7) in version 2. With several the score is
            the mean over them.
        bootstrap: number of resamples of the photos for intervals, 0 for none.
        seed: of the resamples.
        confidence: of the intervals.
        area: what the largest component is measured by: ``"contour"``, OpenCV's contours and `contourArea`, or
            ``"pixels"``, 8-connected components and their pixels.
        clip: x1 and y1 are at most W - 1 and H - 1.
        plus_one: widths count as x1 - x0 + 1.
        empty: the box where nothing is kept.
        **kwargs: of `torchmetrics.Metric`.

    Raises:
        TypeError, ValueError: an argument of another type or range.
    """

    differences: Tensor
    nan_maps: Tensor

    def __init__(
        self,
        version: Literal["v1", "v2"] = "v1",
        thresholds: int | Sequence[float] = 1000,
        *,
        iou: Sequence[float] | None = None,
        bootstrap: int = 1000,
        seed: int = 0,
        confidence: float = 0.95,
        area: Area = "contour",
        clip: bool = True,
        plus_one: bool = True,
        empty: Sequence[float] = (0, 0, 0, 0),
        **kwargs: Any,
    ) -> None:
        check_choice(version, ("v1", "v2"), "version")
        check_choice(area, ("contour", "pixels"), "area")
        values = check_thresholds(thresholds)
        if iou is None:
            iou = (0.5,) if version == "v1" else (0.3, 0.5, 0.7)
        wanted = tuple(check_fraction(value, "iou") for value in (iou if isinstance(iou, Sequence) else (iou,)))
        if not wanted or len(set(wanted)) < len(wanted):
            raise ValueError(f"iou: got {iou!r}, expected one or more different numbers")
        settings = {
            "thresholds": threshold_range(thresholds, values),
            "components": ("largest" if version == "v1" else "all") + f" by {area}",
            "iou": wanted if len(wanted) > 1 else wanted[0],
            "clip": clip,
            "plus_one": plus_one,
            "empty": check_empty(empty),
        }
        oracle = f"best threshold{' of each IoU' if len(wanted) > 1 else ''} on the scored photos (oracle)"
        notes = (oracle,) if len(values) > 1 else ()
        name = "MaxBoxAcc" if version == "v1" else "MaxBoxAccV2"
        super().__init__(Protocol(name, settings=settings, notes=notes), bootstrap, seed, confidence, **kwargs)
        self.version, self.iou, self.area = version, wanted, area
        self.clip, self.plus_one, self.empty = bool(clip), bool(plus_one), check_empty(empty)
        self.thresholds = values
        shape = (len(wanted), len(values), 1 + self.bootstrap)
        self.add_state("differences", torch.zeros(shape, dtype=torch.int32), dist_reduce_fx="sum")
        self.add_state("nan_maps", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        maps: Tensor | NDArray[np.floating[Any]],
        boxes: Sequence[ArrayLike | Tensor],
        ids: Sequence[str] | None = None,
    ) -> None:
        """Add photos.

        Args:
            maps: (B, H, W) floats in [0, 1], of the class each photo is known to show.
            boxes: B times (n, 4) xyxy in map pixels, n at least 1, used as they are: scale and round them first as
                your protocol does.
            ids: B names. A photo's name decides its resamples, in every process and metric; by default its number.

        Raises:
            TypeError, ValueError: an argument of another type, shape or range; nothing is added then.
        """
        found, nan = check_maps(maps, "(B, H, W)", self.weights.device)
        truth = check_boxes(boxes, len(found))
        if len(found) == 0:
            return
        ious = self._ious(found, truth)
        at = ious[:, None] >= np.array(self.iou)[:, None]
        drawn = self._draw(len(found), ids)
        add_steps(self.differences, torch.from_numpy(at).to(self.differences.device), drawn)
        self.nan_maps += nan.sum()

    def _ious(self, maps: Tensor, truth: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        """Return (B, T) the IoU of the map's box, or of the best of its boxes, at each threshold."""
        if self.version == "v1" and len(self.thresholds) == 1:
            boxes = largest_at_one_cut(maps, float(self.thresholds[0]), area=self.area)
            nothing = boxes[:, 2] == 0
            boxes = clipped(boxes, *maps.shape[:0:-1]) if self.clip else boxes
            boxes[nothing] = self.empty
            pairs = zip(boxes, truth, strict=True)
            return np.array([overlap(box[None], true, plus_one=self.plus_one).iou.max(1) for box, true in pairs])
        curve = box_curves(
            to_levels(maps).cpu(),
            truth,
            area=self.area,
            clip=self.clip,
            plus_one=self.plus_one,
            empty=self.empty,
            which="largest" if self.version == "v1" else "any",
        )
        return np.take_along_axis(
            curve.largest if self.version == "v1" else curve.any, curve.cuts(self.thresholds), axis=1
        )

    def compute(self) -> dict[str, Any]:
        """Return the figures.

        Returns:
            score, percent; interval (low, high) of it, or None without bootstrap; per_iou {IoU: best accuracy};
            per_iou_interval; threshold {IoU: the best one, the lowest of equals}; curves {IoU: accuracy at each
            threshold}; thresholds; count; nan_maps; protocol, one line.

        Raises:
            RuntimeError: no photo came yet.
        """
        totals = self._totals()
        counts = curves(self.differences)
        best = counts.amax(1) * 100.0 / totals
        plain = counts[..., 0] * 100.0 / totals[0]
        score = best.mean(0)
        return {
            "score": score[0].item(),
            "interval": self._interval(score),
            "per_iou": dict(zip(self.iou, best[:, 0].tolist(), strict=True)),
            "per_iou_interval": {iou: self._interval(row) for iou, row in zip(self.iou, best, strict=True)},
            "threshold": {
                iou: float(self.thresholds[int(row.argmax())])
                for iou, row in zip(self.iou, plain.cpu().numpy(), strict=True)
            },
            "curves": dict(zip(self.iou, plain.tolist(), strict=True)),
            "thresholds": self.thresholds.tolist(),
            "count": self.count,
            "nan_maps": int(self.nan_maps),
            "protocol": str(self.protocol),
        }


def threshold_range(given: object, values: NDArray[np.float64]) -> str:
    """Say which thresholds those are, for a protocol line."""
    if len(values) == 1:
        return f"{values[0]:g}"
    if isinstance(given, int | np.integer):
        return f"arange(0, 1, 1/{given})"
    return f"{len(values)} from {values[0]:g} to {values[-1]:g}"
