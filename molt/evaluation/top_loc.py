"""Top-1 and Top-5 localization and GT-known localization, with the error split of TS-CAM."""

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
    check_integers,
    check_maps,
    check_ranking,
    check_thresholds,
)
from molt.evaluation._overlap import clipped, overlap_pairs
from molt.evaluation.bootstrap import PhotoMetric, add_steps, curves
from molt.evaluation.box_curves import Area, largest_at_one_cut, to_levels
from molt.evaluation.max_box_acc import threshold_range
from molt.evaluation.protocol import Protocol
from molt.ops.sweep_boxes import largest_at_cuts

ERRORS = ("right", "class", "multi_instance", "part", "more", "wrong")


class TopKLoc(PhotoMetric):
    """Top-k Loc, GT-known Loc and what goes wrong, in percent, as TS-CAM's evaluation defines them.

    The largest component above the threshold gives each map's box. Top-k Loc: one of the k likeliest classes is the
    label and its box fits. GT-known Loc: the box fits, whatever class was predicted. Papers differ in each argument
    below; the defaults are TS-CAM's (Gao et al., ICCV 2021), others come by :meth:`from_protocol`.

    A map that holds a NaN counts as all zeros and is reported as ``nan_maps``.

    Args:
        threshold: share of the map's maximum above which pixels are kept, in [0, 1); ``"best"`` or None takes, for each
            figure, the best of ``thresholds`` on the scored photos, an oracle where these are several, and
            :attr:`protocol` says so.
        k: the k of Top-k, such as (1, 5).
        thresholds: for ``"best"``: N for ``np.arange(0, 1, 1 / N)``, or an increasing sequence in [0, 1).
        gt_map: the map of GT-known: the ``"label"``'s; ``"top1"``, that of the likeliest class; or ``"agnostic"``, the
            photo's only map.
        topk_box: whose box Top-k takes: the class's ``"own"``, or that of the ``"top1"`` class for all k.
        strict_topk: Top-k asks for more than ``iou``; False for at least.
        strict_gt: the same of GT-known.
        iou: to reach.
        area: what the largest component is measured by: ``"contour"``, OpenCV's contours and `contourArea`, or
            ``"pixels"``, 8-connected components and their pixels.
        relative: False takes the threshold as a share of 1 and not of the map's maximum.
        clip: x1 and y1 are at most W - 1 and H - 1.
        plus_one: widths count as x1 - x0 + 1.
        empty: the box where nothing is kept.
        oracle: says in :attr:`protocol` that the given threshold was chosen on the scored photos.
        bootstrap: number of resamples of the photos for intervals, 0 for none.
        seed: of the resamples.
        confidence: of the intervals.
        name: what :attr:`protocol` calls these settings.
        **kwargs: of `torchmetrics.Metric`.

    Raises:
        TypeError, ValueError: an argument of another type or range.
    """

    differences: Tensor
    classified: Tensor
    errors: Tensor
    nan_maps: Tensor

    def __init__(
        self,
        threshold: float | Literal["best"] | None,
        k: Sequence[int] = (1, 5),
        *,
        thresholds: int | Sequence[float] = 1000,
        gt_map: Literal["label", "top1", "agnostic"] = "label",
        topk_box: Literal["own", "top1"] = "own",
        strict_topk: bool = True,
        strict_gt: bool = False,
        iou: float = 0.5,
        area: Area = "contour",
        relative: bool = True,
        clip: bool = False,
        plus_one: bool = True,
        empty: Sequence[float] = (0, 0, 1, 1),
        oracle: bool = False,
        bootstrap: int = 1000,
        seed: int = 0,
        confidence: float = 0.95,
        name: str = "custom",
        **kwargs: Any,
    ) -> None:
        check_choice(gt_map, ("label", "top1", "agnostic"), "gt_map")
        check_choice(topk_box, ("own", "top1"), "topk_box")
        check_choice(area, ("contour", "pixels"), "area")
        if gt_map == "agnostic" and topk_box == "own":
            raise ValueError("topk_box: got 'own', expected 'top1': with gt_map='agnostic' a photo has one map")
        best = threshold is None or threshold == "best"
        self.thresholds = check_thresholds(thresholds) if best else check_threshold(threshold)
        self.k = _check_k(k)
        self.iou = check_fraction(iou, "iou")
        self.gt_map, self.topk_box, self.area = gt_map, topk_box, area
        self.strict_topk, self.strict_gt, self.relative = bool(strict_topk), bool(strict_gt), bool(relative)
        self.clip, self.plus_one, self.empty = bool(clip), bool(plus_one), check_empty(empty)
        chosen = (
            f"best of {threshold_range(thresholds, self.thresholds)}"
            if len(self.thresholds) > 1
            else float(self.thresholds[0])
        )
        settings = {"threshold": chosen, "k": self.k} | {
            key: getattr(self, key)
            for key in ("gt_map", "topk_box", "strict_topk", "strict_gt", "iou", "area", "relative", "clip", "plus_one")
        }
        chosen_here = len(self.thresholds) > 1 or oracle
        notes = ("threshold chosen on the scored photos (oracle)",) if chosen_here else ()
        protocol = Protocol("TopKLoc", name, settings | {"empty": self.empty}, notes)
        super().__init__(protocol, bootstrap, seed, confidence, **kwargs)
        number = len(self.thresholds)
        for state, shape, dtype in (
            ("differences", (1 + len(self.k), number, 1 + self.bootstrap), torch.int32),
            ("classified", (len(self.k), 1 + self.bootstrap), torch.int64),
            ("errors", (len(ERRORS), number), torch.int64),
            ("nan_maps", (), torch.int64),
        ):
            self.add_state(state, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    @classmethod
    def from_protocol(cls, name: str, **changes: Any) -> TopKLoc:
        """Return the metric with a paper's settings, ``changes`` over them: see :meth:`Protocol.preset`.

        Raises:
            TypeError: no ``threshold`` where the preset has none.
            ValueError: an unknown name, or as the class itself.
        """
        preset = Protocol.preset(name, **changes)
        settings = dict(preset.settings)
        if "threshold" not in settings:
            raise TypeError(f"threshold: missing, and it differs between data sets; {name!r} needs a number in [0, 1)")
        label = f"{name}, {'; '.join(preset.notes)}" if preset.notes else name
        return cls(**settings, name=label)

    def update(
        self,
        maps: Tensor | NDArray[np.floating[Any]],
        predicted: ArrayLike | Tensor,
        labels: ArrayLike | Tensor,
        boxes: Sequence[ArrayLike | Tensor],
        gt_maps: Tensor | NDArray[np.floating[Any]] | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        """Add photos.

        Args:
            maps: (B, K, H, W) floats in [0, 1], of the predicted classes, the likeliest first, K at least the largest
                k; with ``gt_map="agnostic"`` (B, 1, H, W), the photo's only map. With ``topk_box="top1"`` only the
                first is used, and one is enough.
            predicted: (B, K') integers, the classes from the likeliest down, K' at least the largest k.
            labels: (B,) integers, the true classes.
            boxes: B times (n, 4) xyxy in map pixels, n at least 1, used as they are: scale and round them first as
                your protocol does.
            gt_maps: (B, H, W) floats in [0, 1], of the label's class; only ``gt_map="label"`` reads it.
            ids: B names. A photo's name decides its resamples, in every process and metric; by default its number.

        Raises:
            TypeError, ValueError: an argument of another type, shape or range; nothing is added then.
        """
        device = self.weights.device
        ranked, nan = check_maps(maps, "(B, K, H, W)", device)
        number = len(ranked)
        classes = check_ranking(predicted, number, max(self.k), device)
        same = classes == check_integers(labels, number, "labels", device)[:, None]
        truth = check_boxes(boxes, number)
        least = max(self.k) if self.topk_box == "own" else 1
        if ranked.shape[1] < least or (self.gt_map == "agnostic" and ranked.shape[1] != 1):
            expected = "1 map a photo" if self.gt_map == "agnostic" else f"at least {least} maps a photo"
            raise ValueError(f"maps: got shape {tuple(ranked.shape)}, expected {expected}")
        same = same[:, : max(self.k)]
        # The place of the label among the predicted classes, or a place beyond every k.
        place = torch.where(same.any(1), same.int().argmax(1), max(self.k))
        pick = place.clamp(max=ranked.shape[1] - 1) if self.topk_box == "own" else torch.zeros_like(place)
        read = [ranked[torch.arange(number, device=device), pick]]
        if self.gt_map == "label":
            if gt_maps is None:
                raise ValueError(
                    "gt_maps: got None, expected (B, H, W): gt_map='label' needs the map of the label's class"
                )
            known, nan_known = check_maps(gt_maps, "(B, H, W)", device, "gt_maps")
            if known.shape != read[0].shape:
                raise ValueError(f"gt_maps: got shape {tuple(known.shape)}, expected {tuple(read[0].shape)}")
            read.append(known)
            nan = torch.cat([nan, nan_known[:, None]], 1)
        elif self.topk_box == "own":
            read.append(ranked[:, 0])
        if number == 0:
            return
        found = self._boxes(read)
        place = place.cpu()
        hits, errors = self._judge(found, truth, place.numpy())
        drawn = self._draw(number, ids)
        add_steps(self.differences, hits.to(device), drawn)
        for row, k in enumerate(self.k):
            self.classified[row] += drawn[(place < k).to(device)].sum(0)
        self.errors += errors.to(device)
        self.nan_maps += nan.sum()

    def compute(self) -> dict[str, Any]:
        """Return the figures.

        Returns:
            score, which is gt_known_loc; gt_known_loc, top{k}_loc and top{k}_cls, percent; errors, the split of Top-1
            in percent: right, class, multi_instance, part, more, wrong; interval (low, high) of the score and intervals
            of all, None without bootstrap; threshold {figure: the one it was taken at}; count; nan_maps; protocol, one
            line. With the best threshold also thresholds and curves {figure: percent at each}; errors are then those at
            the best threshold of Top-1 Loc.

        Raises:
            RuntimeError: no photo came yet.
        """
        totals = self._totals()
        names = ["gt_known_loc", *(f"top{k}_loc" for k in self.k)]
        counts = curves(self.differences)
        best = counts.amax(1) * 100.0 / totals
        at = counts[..., 0].argmax(1).tolist()
        figures = dict(zip(names, best, strict=True))
        shares = self.classified.double() * 100.0 / totals
        figures |= {f"top{k}_cls": row for k, row in zip(self.k, shares, strict=True)}
        split = self.errors[:, int(self.errors[0].argmax())].double() * 100.0 / totals[0]
        intervals = {name: self._interval(row) for name, row in figures.items()}
        found: dict[str, Any] = {"score": best[0, 0].item()}
        found |= {name: row[0].item() for name, row in figures.items()}
        found |= {
            "errors": dict(zip(ERRORS, split.tolist(), strict=True)),
            "interval": intervals["gt_known_loc"],
            "intervals": intervals,
            "threshold": {name: float(self.thresholds[index]) for name, index in zip(names, at, strict=True)},
            "count": self.count,
            "nan_maps": int(self.nan_maps),
            "protocol": str(self.protocol),
        }
        if len(self.thresholds) > 1:
            plain = counts[..., 0] * 100.0 / totals[0]
            found |= {"thresholds": self.thresholds.tolist(), "curves": dict(zip(names, plain.tolist(), strict=True))}
        return found

    def _boxes(self, read: list[Tensor]) -> NDArray[np.float64]:
        """Return the box (B, C, T, 4) of each of C times B maps (H, W) at each threshold."""
        height, width = read[0].shape[1:]
        if len(self.thresholds) == 1:
            cut = float(self.thresholds[0])
            found = [largest_at_one_cut(one, cut, relative=self.relative, area=self.area) for one in read]
            boxes = np.stack(found, 1)[:, :, None]
        else:
            maps = torch.stack([one.double() for one in read], 1)
            levels = to_levels(maps.flatten(0, 1)).view(maps.shape).cpu()
            peak = levels.flatten(2).amax(2).numpy() if self.relative else np.full(levels.shape[:2], 255)
            cuts = (self.thresholds * peak[..., None]).astype(np.int64)
            swept, _ = largest_at_cuts(levels, contours=self.area == "contour")
            boxes = np.take_along_axis(swept.numpy(), cuts[..., None], axis=2).astype(np.float64)
        nothing = boxes[..., 2] == 0
        boxes = clipped(boxes, width, height) if self.clip else boxes
        boxes[nothing] = self.empty
        return boxes

    def _judge(
        self, found: NDArray[np.float64], truth: list[NDArray[np.float64]], place: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        """Compare with the true boxes: hits (B, 1 + len(k), T) bool and counts of errors (6, T)."""
        counts = [len(true) for true in truth]
        first = np.cumsum([0, *counts[:-1]])
        owner = np.repeat(np.arange(len(truth)), counts)
        true = np.concatenate(truth)[:, None]
        used = overlap_pairs(found[owner, 0], true, plus_one=self.plus_one)  # (all true boxes, T)
        best = np.maximum.reduceat(used.iou, first)
        known = best
        if found.shape[1] > 1:
            known = np.maximum.reduceat(overlap_pairs(found[owner, 1], true, plus_one=self.plus_one).iou, first)
        fits = self._reaches(best, self.strict_topk)
        hits = [self._reaches(known, self.strict_gt), *(fits & (place < k)[:, None] for k in self.k)]
        # Of equally good true boxes the first one counts.
        rows = np.where(used.iou == best[owner], np.arange(len(owner))[:, None], len(owner))
        fitting = np.minimum.reduceat(rows, first)
        cases = [
            np.broadcast_to(place[:, None] > 0, fits.shape),
            fits,
            np.add.reduceat(used.of_truth > 0.3, first, dtype=np.int64) > 1,
            np.take_along_axis(used.of_box, fitting, 0) > 0.5,
            np.take_along_axis(used.of_truth, fitting, 0) >= 0.7,
        ]
        numbers = [ERRORS.index(name) for name in ("class", "right", "multi_instance", "part", "more")]
        kind = np.select(cases, numbers, ERRORS.index("wrong"))
        errors = np.stack([(kind == number).sum(0) for number in range(len(ERRORS))])
        return torch.from_numpy(np.stack(hits, 1)), torch.from_numpy(errors)

    def _reaches(self, best: NDArray[np.float64], strict: bool) -> NDArray[np.bool_]:
        return np.asarray(best > self.iou if strict else best >= self.iou)


def check_threshold(value: object) -> NDArray[np.float64]:
    """Check for one threshold in [0, 1) and return it as an array of one.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating) or not 0 <= value < 1:
        raise ValueError(f"threshold: got {value!r}, expected a number in [0, 1), 'best' or None")
    return np.array([value], dtype=np.float64)


def _check_k(k: object) -> tuple[int, ...]:
    if isinstance(k, str) or not isinstance(k, Sequence) or not k:
        raise TypeError(f"k: got {k!r}, expected one or more integers, such as (1, 5)")
    if not all(isinstance(n, int | np.integer) and not isinstance(n, bool) and n >= 1 for n in k) or len(set(k)) < len(
        k
    ):
        raise ValueError(f"k: got {k!r}, expected different integers of at least 1")
    return tuple(int(n) for n in k)
