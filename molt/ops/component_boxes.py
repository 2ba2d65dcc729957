"""Boxes around the connected components of thresholded maps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from molt.ops import reference
from molt.ops._checks import check_maps


@dataclass(frozen=True, eq=False)
class Components:
    """Connected components of a batch of maps, map by map, the largest first.

    Attributes:
        boxes: (N, 4) float32 xyxy in map pixels, edges: a lone pixel at the origin is [0, 0, 1, 1].
        area: (N,) int64 pixels.
        mean: (N,) float32 mean of the map inside the component.
        image: (N,) int64 index into the batch.
        channel: (N,) int64 index of the map within its image.
    """

    boxes: Tensor
    area: Tensor
    mean: Tensor
    image: Tensor
    channel: Tensor


def component_boxes(
    maps: Tensor, threshold: float = 0.5, *, connectivity: int = 8, largest: bool = False
) -> Components:
    """Threshold each map at a share of its maximum and box the connected components.

    A pixel is kept where it is positive and at least ``threshold`` times its map's maximum. A map with no positive
    value, or with a NaN, has no components. Of components of equal area the one met first in reading order leads.
    SciPy on the CPU for now; the result is on the CPU.

    Args:
        maps: (B, C, h, w) float.
        threshold: in (0, 1].
        connectivity: 4 or 8 neighbours.
        largest: True keeps only the largest component of each map.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range, or maps without a pixel.
    """
    check_maps(maps)
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: got {threshold}, expected a number in (0, 1]")
    if connectivity not in (4, 8):
        raise ValueError(f"connectivity: got {connectivity}, expected 4 or 8")
    return Components(*reference.component_boxes(maps, threshold, connectivity, largest))
