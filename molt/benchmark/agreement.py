"""How alike two results are, and how near boxes come to the truth."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_iou(first: Tensor, second: Tensor, threshold: float) -> Tensor:
    """Return the IoU (B,) float32 of what two maps hold to be the object.

    Args:
        first: (B, H, W) float in [0, 1].
        second: likewise, on the same device.
        threshold: in (0, 1): the object is what is positive and at least this share of its map's maximum.

    Returns:
        In [0, 1]; 1 where both hold nothing.
    """
    masks = []
    for maps in (first, second):
        wide = maps.float()
        masks.append((wide > 0) & (wide >= threshold * wide.amax((1, 2), keepdim=True)))
    both, either = (masks[0] & masks[1]).sum((1, 2)), (masks[0] | masks[1]).sum((1, 2))
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)


def adjusted_rand(first: Tensor, second: Tensor) -> float:
    """Return the adjusted Rand index of two label maps of one photo (Hubert and Arabie, 1985, equation 5).

    Args:
        first: (H, W) integers from 0.
        second: likewise; the numbers themselves do not matter, only which pixels share one.

    Returns:
        1 for the same clusters, about 0 for unrelated ones, which can be below 0.

    Raises:
        ValueError: maps of other shapes, or without a pixel.
    """
    if first.shape != second.shape or first.numel() == 0:
        raise ValueError(f"labels: got shapes {tuple(first.shape)} and {tuple(second.shape)}, expected one, not empty")
    _, rows = first.flatten().unique(return_inverse=True)
    _, columns = second.flatten().unique(return_inverse=True)
    height, width = int(rows.max()) + 1, int(columns.max()) + 1
    table = torch.bincount(rows * width + columns, minlength=height * width).view(height, width).double()

    def pairs(counts: Tensor) -> float:
        return float((counts * (counts - 1) / 2).sum())

    together, of_rows, of_columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    everything = pairs(table.sum())
    expected = of_rows * of_columns / everything if everything else 0.0
    most = (of_rows + of_columns) / 2
    # One cluster each, or one a pixel each: the same clusters.
    return 1.0 if most == expected else (together - expected) / (most - expected)


def best_iou(box: Tensor | None, truth: Tensor) -> float:
    """Return the IoU of a box with the true box it fits best.

    Args:
        box: (4,) float xyxy, or None where nothing was found, which scores 0.
        truth: (n, 4) float xyxy, n at least 1.
    """
    if box is None:
        return 0.0
    low, high = torch.maximum(box[:2], truth[:, :2]), torch.minimum(box[2:], truth[:, 2:])
    shared = (high - low).clamp_min(0).prod(1)
    areas = (truth[:, 2:] - truth[:, :2]).prod(1) + (box[2:] - box[:2]).prod()
    return float((shared / (areas - shared)).max())
