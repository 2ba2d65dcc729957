"""How far a map should follow its clusters, told from the map and the clusters alone."""

from __future__ import annotations

import numbers
from typing import Literal

import torch
from torch import Tensor

from molt import ops

AUTO: Literal["auto"] = "auto"
Alpha = float | Literal["auto"]

# Of a grid, what served weak and strong maps together best on the development photos.
CLEAR, GAIN = 0.85, 3.0
ENOUGH = 0.2  # share of a map's variance: clusters that explain less have little to do with it
LEVELS = 256


def check_alpha(value: object) -> Alpha:
    """Check for ``"auto"`` or a number in [0, 1] and return it.

    Raises:
        TypeError: another type.
        ValueError: out of range, or another string.
    """
    wanted = "alpha must be 'auto' or a number in [0, 1]"
    if isinstance(value, str):
        if value != AUTO:
            raise ValueError(f"{wanted}, got {value!r}")
        return AUTO
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{wanted}, got {value!r:.60}")
    number = float(value)
    if not 0 <= number <= 1:
        raise ValueError(f"{wanted}, got {value}")
    return number


def auto_alpha(maps: Tensor, labels: Tensor, num_clusters: int | Tensor | None = None) -> Tensor:
    """Choose the weight of the cluster mean for each map, with no box: the vaguer the map, the more.

    A map's contrast is the share of its variance that the best split into two levels explains (Otsu, 1979): 1 for a
    map of object and ground only. A map with a contrast of 0.85 or more is left alone: refinement with a fixed weight
    makes such maps worse. Below, the weight is 3 times what is missing. Clusters that explain less than a fifth of
    the map's variance count for less, in proportion. The rule and its numbers are our choice (docs/method.md).

    Args:
        maps: (B, C, H, W) floating point, on any scale.
        labels: (B, H, W) uint8, int32 or int64.
        num_clusters: above every label, for all images or as (B,); None looks for the largest.

    Returns:
        (B, C) float32 in [0, 1]; 0 for a constant map or one with NaN or infinity.

    Raises:
        TypeError, ValueError: see :func:`molt.ops.cluster_mean`.
    """
    # In double throughout: a map on a large scale, or far from 0, keeps its shape.
    values = maps.detach().flatten(2).double()
    if values.numel() == 0:
        ops.cluster_mean(maps, labels, num_clusters)  # for its checks
        return values.new_zeros(values.shape[:2], dtype=torch.float32)
    low, high = values.amin(2, keepdim=True), values.amax(2, keepdim=True)
    sound = ((high - low) > 0) & (high - low).isfinite()
    unit = torch.where(sound, (values - low) / (high - low), torch.zeros_like(values))
    means, counts = ops.cluster_mean(unit.view(maps.shape), labels, num_clusters)
    level = (unit * LEVELS).long().clamp_(0, LEVELS - 1)
    histogram = level.new_zeros(*values.shape[:2], LEVELS).scatter_add_(2, level, torch.ones_like(level))
    contrast, variance = _contrast(histogram)
    shares = counts[:, None].double() / counts.sum(1)[:, None, None].clamp_min(1)
    centre = (shares * means).sum(2, keepdim=True)
    explained = (shares * (means - centre).square()).sum(2) / variance.clamp_min(1e-12)
    alpha = (GAIN * (CLEAR - contrast) * (explained / ENOUGH).clamp_max(1)).clamp(0, 1)
    return torch.where(sound[..., 0], alpha, torch.zeros_like(alpha)).float()


def _contrast(histogram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest share of the variance that a split of the levels in two explains, and the variance, (...).

    Args:
        histogram: (..., LEVELS) int64, how often each occurs. Added up as it is: on a GPU a sum of floating point is in
            no fixed order.
    """
    twice = 2 * torch.arange(LEVELS, device=histogram.device) + 1  # a level's centre, in halves
    number = histogram.sum(-1, keepdim=True).clamp_min(1).double()
    shares, levels = histogram / number, twice.double() / (2 * LEVELS)
    below = histogram.cumsum(-1) / number
    sums = (histogram * twice).cumsum(-1) / (2 * LEVELS * number)
    mean = sums[..., -1:]
    variance = (shares * (levels - mean).square()).sum(-1)
    apart = (mean * below - sums).square() / (below * (1 - below)).clamp_min(1e-12)
    contrast = torch.where(variance > 1e-12, apart.amax(-1) / variance.clamp_min(1e-12), torch.zeros_like(variance))
    return contrast, variance


def blend(maps: Tensor, labels: Tensor, alpha: Alpha, num_clusters: int | Tensor | None = None) -> Tensor:
    """Return :func:`molt.ops.cluster_refine` of the maps, with a number, or with each map's own ``"auto"`` weight."""
    if alpha != AUTO:
        return ops.cluster_refine(maps, labels, float(alpha), num_clusters)
    weight = auto_alpha(maps, labels, num_clusters)[..., None, None]
    painted = ops.cluster_refine(maps, labels, 1.0, num_clusters)
    wide = torch.float64 if maps.dtype == torch.float64 else torch.float32
    share = weight.to(wide)
    mixed = ((1 - share) * maps.to(wide) + share * painted.to(wide)).to(maps.dtype)
    # A map that is left alone stays as it is, to the bit, NaN and all.
    return torch.where(weight > 0, mixed, maps)
