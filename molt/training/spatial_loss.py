"""What a spatial token's map is held to besides the class loss: a size, and a decision at every patch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from molt._arguments import check_number

AREA = 0.35
# Along each axis, as in the authors' code.
NEIGHBOUR = 0.0513


def spatial_loss(maps: Tensor, *, area: float = AREA, area_weight: float = 1.0, decision_weight: float = 1.0) -> Tensor:
    """Return the weighted sum of :func:`area_loss` and :func:`decision_loss`, a scalar (SAT, ICCV 2023).

    To be added to the cross-entropy of the logits that came with the maps::

        seen = transformer.see(pixels, attention=False)
        loss = cross_entropy(seen.logits, labels) + spatial_loss(spatial_map(seen))

    Args:
        maps: (B, 1, h, w) or (B, h, w) float in [0, 1], from :func:`molt.backbones.spatial.spatial_map`.
        area: share of the patches that objects are expected to cover, in [0, 1].
        area_weight: of the area, at least 0.
        decision_weight: of the decision, at least 0.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range. Values of maps are not looked at.
    """
    for name, weight in (("area_weight", area_weight), ("decision_weight", decision_weight)):
        check_number(name, weight)
    return area_weight * area_loss(maps, area) + decision_weight * decision_loss(maps)


def area_loss(maps: Tensor, area: float = AREA) -> Tensor:
    """Return how far the mean over all patches of the whole batch is from ``area``, a scalar.

    Single objects may so be smaller or larger than that; without this term a map of ones would cost nothing. Arguments
    as for :func:`spatial_loss`.
    """
    if check_number("area", area) > 1:
        raise ValueError(f"area must be in [0, 1], got {area}")
    return (_planes(maps).mean() - area).abs()


def decision_loss(maps: Tensor) -> Tensor:
    """Return the mean of S (1 - S), a scalar in [0, 0.25], for maps S smoothed by a fixed 3x3 kernel.

    It is smallest where neighbours agree on 0 or on 1. Outside the grid the smoothing sees zeros, as in the authors'
    code. Arguments as for :func:`spatial_loss`.
    """
    padded = F.pad(_planes(maps), (1, 1, 1, 1))
    # Sums and no convolution, which autocast would round.
    own = 1 - 2 * NEIGHBOUR
    lines = own * padded[..., 1:-1] + NEIGHBOUR * (padded[..., :-2] + padded[..., 2:])
    smooth = own * lines[:, :, 1:-1] + NEIGHBOUR * (lines[:, :, :-2] + lines[:, :, 2:])
    return (smooth * (1 - smooth)).mean()


def _planes(maps: object) -> Tensor:
    """Return maps as (B, 1, h, w), in float32 or wider."""
    if not isinstance(maps, Tensor):
        raise TypeError(f"maps must be a torch tensor (B, 1, h, w), got {type(maps).__name__}")
    if not maps.is_floating_point():
        raise TypeError(f"maps must be floating point, got {maps.dtype}")
    planes = maps[:, None] if maps.ndim == 3 else maps
    if planes.ndim != 4 or planes.shape[1] != 1 or planes.numel() == 0:
        raise ValueError(f"maps must have shape (B, 1, h, w) or (B, h, w) and not be empty, got {tuple(maps.shape)}")
    return planes.to(torch.promote_types(planes.dtype, torch.float32))
