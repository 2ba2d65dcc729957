"""Stand-in on the plain sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from molt.evaluation._overlap import clipped, overlap
from molt.ops import _sweep_reference


@dataclass(frozen=True)
class BoxCurves:
    """IoU with the best fitting true box at every cut."""

    any: Tensor
    largest: Tensor
    peak: Tensor


def to_levels(maps: Tensor) -> Tensor:
    """Return trunc(255 * map), zeros for a map with NaN."""
    wide = torch.as_tensor(maps).double()
    nan = wide.isnan().flatten(1).any(1)
    return (torch.where(nan.view(-1, *[1] * (wide.dim() - 1)), 0.0, wide) * 255).to(torch.uint8)


def box_curves(levels, boxes: Sequence, *, area="contour", clip=True, plus_one=True, empty=(0, 0, 0, 0)) -> BoxCurves:  # type: ignore[no-untyped-def]
    """Stand-in."""
    levels = torch.as_tensor(levels)
    height, width = levels.shape[1:]
    contours = area == "contour"
    box, _, first, last, _, image, _ = _sweep_reference.sweep_boxes(levels[:, None], contours, 8)
    big, _ = _sweep_reference.largest_at_cuts(levels[:, None], contours, 8)
    best = torch.zeros(len(levels), 255, dtype=torch.float64)
    top = best.clone()
    for b, truth in enumerate(boxes):
        truth = np.asarray(truth, dtype=np.float64)  # noqa: PLW2901
        nothing = overlap(np.array([empty], dtype=np.float64), truth, plus_one=plus_one).iou.max()

        def iou(found, truth=truth):  # type: ignore[no-untyped-def]
            found = found.double().numpy()
            return overlap(clipped(found, width, height) if clip else found, truth, plus_one=plus_one).iou.max(1)

        mine = image == b
        kept = np.zeros(255, dtype=bool)
        for value, f, t in zip(iou(box[mine]), first[mine].tolist(), last[mine].tolist(), strict=True):
            best[b, f : t + 1] = best[b, f : t + 1].clamp(min=value)
            kept[f : t + 1] = True
        best[b, ~torch.from_numpy(kept)] = nothing
        top[b] = torch.from_numpy(np.where(kept, iou(big[b, 0]), nothing))
    return BoxCurves(best, top, levels.flatten(1).amax(1).long())
