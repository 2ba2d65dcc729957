"""Figures of one box a photo: CorLoc and mean IoU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from molt.evaluation._inputs import as_floats, check_boxes, check_edges, check_fraction, check_integers
from molt.evaluation._overlap import overlap
from molt.evaluation.bootstrap import PhotoMetric
from molt.evaluation.protocol import Protocol


class CorLoc(PhotoMetric):
    """Share of photos whose box reaches an IoU with any true box, in percent (Deselaers et al., IJCV 2012).

    With labels also the mean over classes, which is what papers on PASCAL VOC report. A photo in which nothing was
    found counts as wrong: give it the box 0, 0, 0, 0.

    Args:
        iou: to reach.
        classes: number of classes, or their names, where labels will be given; None for no labels.
        strict: True asks for more than ``iou``, as PASCAL's own evaluation does.
        plus_one: widths count as x1 - x0 + 1.
        bootstrap: number of resamples of the photos for intervals, 0 for none.
        seed: of the resamples.
        confidence: of the intervals.
        **kwargs: of `torchmetrics.Metric`.

    Raises:
        TypeError, ValueError: an argument of another type or range.
    """

    hits: Tensor
    members: Tensor

    def __init__(
        self,
        iou: float = 0.5,
        *,
        classes: int | Sequence[str] | None = None,
        strict: bool = False,
        plus_one: bool = False,
        bootstrap: int = 1000,
        seed: int = 0,
        confidence: float = 0.95,
        **kwargs: Any,
    ) -> None:
        wanted = check_fraction(iou, "iou")
        names = _class_names(classes)
        settings = {"iou": wanted, "strict": strict, "plus_one": plus_one}
        super().__init__(Protocol("CorLoc", settings=settings), bootstrap, seed, confidence, **kwargs)
        self.iou, self.strict, self.plus_one, self.classes = wanted, bool(strict), bool(plus_one), names
        shape = (1 if names is None else len(names), 1 + self.bootstrap)
        self.add_state("hits", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("members", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        predicted: ArrayLike | Tensor,
        boxes: Sequence[ArrayLike | Tensor],
        labels: ArrayLike | Tensor | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        """Add photos.

        Args:
            predicted: (B, 4) xyxy, one box a photo, in any unit.
            boxes: B times (n, 4) xyxy in the same unit, n at least 1; with labels those of the label's class.
            labels: (B,) integers, each photo's class; needs ``classes``, and is needed then.
            ids: B names. A photo's name decides its resamples, in every process and metric; by default its number.

        Raises:
            TypeError, ValueError: an argument of another type, shape or range; nothing is added then.
        """
        best = _best_iou(predicted, boxes, self.plus_one)
        device = self.weights.device
        if (labels is None) != (self.classes is None):
            given = "none were given" if labels is None else "some were given"
            raise ValueError(
                f"labels: {given}, expected {'none' if self.classes is None else f'{len(best)}'} (classes=)"
            )
        if self.classes is None:
            rows = torch.zeros(len(best), dtype=torch.int64, device=device)
        else:
            rows = check_integers(labels, len(best), "labels", device)
            if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < len(self.classes)):
                raise ValueError(
                    f"labels: got values from {int(rows.min())} to {int(rows.max())}, expected 0 to "
                    f"{len(self.classes) - 1}"
                )
        drawn = self._draw(len(best), ids).long()
        right = torch.from_numpy(best > self.iou if self.strict else best >= self.iou).to(device)
        self.hits.index_add_(0, rows[right], drawn[right])
        self.members.index_add_(0, rows, drawn)

    def compute(self) -> dict[str, Any]:
        """Return the figures.

        Returns:
            score, percent of all photos; interval (low, high) of it, or None without bootstrap; count; protocol, one
            line. With labels also class_mean, over the classes that occur, class_mean_interval and per_class {class:
            percent, None where it does not occur}.

        Raises:
            RuntimeError: no photo came yet.
        """
        share = self.hits.sum(0).double() * 100.0 / self._totals()
        found: dict[str, Any] = {
            "score": share[0].item(),
            "interval": self._interval(share),
            "count": self.count,
            "protocol": str(self.protocol),
        }
        if self.classes is not None:
            # 0 / 0: a class without photos has no share.
            table = self.hits.double() * 100.0 / self.members.double()
            mean = table.nanmean(0)
            found["class_mean"] = mean[0].item()
            found["class_mean_interval"] = self._interval(mean)
            shares = [None if np.isnan(value) else value for value in table[:, 0].tolist()]
            found["per_class"] = dict(zip(self.classes, shares, strict=True))
        return found


class MeanIoU(PhotoMetric):
    """Mean over photos of the IoU of its box with the best fitting true box, in percent.

    Args:
        plus_one: widths count as x1 - x0 + 1.
        bootstrap: number of resamples of the photos for the interval, 0 for none.
        seed: of the resamples.
        confidence: of the interval.
        **kwargs: of `torchmetrics.Metric`.

    Raises:
        TypeError, ValueError: an argument of another type or range.
    """

    sums: Tensor
    squares: Tensor
    tenths: Tensor

    def __init__(
        self,
        *,
        plus_one: bool = False,
        bootstrap: int = 1000,
        seed: int = 0,
        confidence: float = 0.95,
        **kwargs: Any,
    ) -> None:
        protocol = Protocol("MeanIoU", settings={"plus_one": plus_one})
        super().__init__(protocol, bootstrap, seed, confidence, **kwargs)
        self.plus_one = bool(plus_one)
        self.add_state("sums", torch.zeros(1 + self.bootstrap, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squares", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tenths", torch.zeros(10, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        predicted: ArrayLike | Tensor,
        boxes: Sequence[ArrayLike | Tensor],
        ids: Sequence[str] | None = None,
    ) -> None:
        """Add photos.

        Args:
            predicted: (B, 4) xyxy, one box a photo, in any unit; 0, 0, 0, 0 where nothing was found.
            boxes: B times (n, 4) xyxy in the same unit, n at least 1.
            ids: B names. A photo's name decides its resamples, in every process and metric; by default its number.

        Raises:
            TypeError, ValueError: an argument of another type, shape or range; nothing is added then.
        """
        best = torch.from_numpy(_best_iou(predicted, boxes, self.plus_one)).to(self.weights.device)
        drawn = self._draw(len(best), ids)
        self.sums += best @ drawn.double()
        self.squares += (best**2).sum()
        edges = torch.arange(1, 10, dtype=torch.float64, device=best.device) / 10
        self.tenths += torch.bincount(torch.bucketize(best, edges, right=True), minlength=10)

    def compute(self) -> dict[str, Any]:
        """Return the figures.

        Returns:
            score, percent; interval (low, high) of it, or None without bootstrap; std over photos (of the set, not an
            estimate from a sample), in percent; histogram, the numbers of photos with an IoU in [0, 0.1), [0.1, 0.2),
            ..., [0.9, 1]; count; protocol, one line.

        Raises:
            RuntimeError: no photo came yet.
        """
        totals = self._totals()
        mean = self.sums / totals
        variance = (self.squares / totals[0] - mean[0] ** 2).clamp(min=0)
        return {
            "score": mean[0].item() * 100,
            "interval": self._interval(mean * 100),
            "std": variance.sqrt().item() * 100,
            "histogram": self.tenths.tolist(),
            "count": self.count,
            "protocol": str(self.protocol),
        }


def _best_iou(predicted: ArrayLike | Tensor, boxes: object, plus_one: bool) -> NDArray[np.float64]:
    """Return the IoU of each photo's box with the best fitting true box, (B,)."""
    table = as_floats(predicted, "predicted")
    if table.size == 0:
        table = table.reshape(-1, 4)
    if table.ndim != 2 or table.shape[1] != 4:
        raise ValueError(f"predicted: got shape {table.shape}, expected (B, 4), one box a photo")
    check_edges(table, "predicted")
    truth = check_boxes(boxes, len(table))
    pairs = zip(table, truth, strict=True)
    return np.array([overlap(box[None], true, plus_one=plus_one).iou.max() for box, true in pairs], dtype=np.float64)


def _class_names(classes: object) -> tuple[int | str, ...] | None:
    if classes is None:
        return None
    if isinstance(classes, int | np.integer) and not isinstance(classes, bool):
        if classes < 1:
            raise ValueError(f"classes: got {classes}, expected at least 1")
        return tuple(range(int(classes)))
    if isinstance(classes, str) or not isinstance(classes, Sequence) or not classes:
        raise TypeError(f"classes: got {type(classes).__name__}, expected a number, names or None")
    if len(set(classes)) < len(classes):
        raise ValueError("classes: expected names that differ")
    return tuple(classes)
