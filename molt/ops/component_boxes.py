"""Boxes around the connected components of thresholded maps."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from molt._backend import Backend, use_native
from molt.ops import reference
from molt.ops._checks import as_maps, check_not_captured
from molt.ops._native import call, register


@dataclass(frozen=True, eq=False)
class Components:
    """Connected components of a batch of maps, map by map, the largest first.

    Attributes:
        boxes: (N, 4) float32 xyxy in map pixels, edges: a lone pixel at the origin is [0, 0, 1, 1].
        area: (N,) int64 pixels.
        mean: (N,) float32 mean of the map inside the component; on a GPU added in steps of 2^-30 of the map's maximum.
        image: (N,) int64 index into the batch.
        channel: (N,) int64 index of the map within its image.
    """

    boxes: Tensor
    area: Tensor
    mean: Tensor
    image: Tensor
    channel: Tensor

    def to(self, device: torch.device | str) -> Components:
        """Return the same on another device."""
        return Components(*(getattr(self, field.name).to(device) for field in fields(self)))


def component_boxes(
    maps: Tensor | np.ndarray,
    threshold: float = 0.5,
    *,
    connectivity: int = 8,
    largest: bool = False,
    backend: Backend | None = None,
) -> Components:
    """Threshold each map at a share of its maximum and box the connected components.

    A pixel is kept where it is positive and at least ``threshold`` times its map's maximum, compared in double
    precision. A map with no positive value, or with a NaN, has no components. Of components of equal area the one met
    first in reading order leads. How many there are depends on the values, so on a GPU the number is read back;
    :func:`largest_box` never reads back.

    Args:
        maps: (B, C, h, w), (B, h, w) or (h, w) float, tensor or array, any strides.
        threshold: in (0, 1].
        connectivity: 4 or 8 neighbours.
        largest: True keeps only the largest component of each map.
        backend: ``"auto"``, ``"reference"`` (SciPy on the CPU) or ``"native"``; None for the one in force.

    Returns:
        Components on the maps' device; image 0 for a single map, channel 0 where there are no channels.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range, or maps without a pixel.
        RuntimeError: backend ``"native"`` where there is none; maps on a GPU while a CUDA graph is captured, which
            :func:`largest_box` can be.
    """
    check_not_captured("component_boxes", "largest_box", maps)
    maps, threshold = _check(maps, threshold, connectivity)
    if use_native("component_boxes", maps.device, backend):
        return Components(*call("component_boxes", maps.detach(), threshold, connectivity, bool(largest)))
    return Components(*reference.component_boxes(maps, threshold, connectivity, largest))


def largest_box(
    maps: Tensor | np.ndarray, threshold: float = 0.5, *, connectivity: int = 8, backend: Backend | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Threshold each map at a share of its maximum and box its largest connected component.

    The same component as ``component_boxes(..., largest=True)``, in tensors whose size does not depend on the values:
    the native form reads nothing back from a GPU.

    Args:
        maps: (B, C, h, w), (B, h, w) or (h, w) float, tensor or array, any strides.
        threshold: in (0, 1].
        connectivity: 4 or 8 neighbours.
        backend: ``"auto"``, ``"reference"`` (SciPy on the CPU) or ``"native"``; None for the one in force.

    Returns:
        boxes (B, C, 4) float32 xyxy in map pixels, area (B, C) int64 pixels and mean (B, C) float32 of the map inside,
        on the maps' device; all zero where a map has no component. Without the dimensions that maps do not have.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`component_boxes`.
    """
    shape = maps.shape[:-2] if isinstance(maps, Tensor | np.ndarray) else ()
    maps, threshold = _check(maps, threshold, connectivity)
    if use_native("largest_box", maps.device, backend):
        boxes, area, mean = call("largest_box", maps.detach(), threshold, connectivity)
    else:
        boxes, area, mean = reference.largest_box(maps, threshold, connectivity)
    return boxes.view(*shape, 4), area.view(shape), mean.view(shape)


def _check(maps: object, threshold: object, connectivity: object) -> tuple[Tensor, float]:
    stack = as_maps(maps)
    if isinstance(threshold, bool) or not isinstance(threshold, (float, int, numbers.Real)):
        raise TypeError(f"threshold: got {type(threshold).__name__}, expected a number in (0, 1]")
    if not 0 < float(threshold) <= 1:
        raise ValueError(f"threshold: got {threshold}, expected a number in (0, 1]")
    if connectivity not in (4, 8):
        raise ValueError(f"connectivity: got {connectivity}, expected 4 or 8")
    return stack, float(threshold)


def _fake_all(
    maps: Tensor, threshold: float, connectivity: int, largest: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    number = torch.library.get_ctx().new_dynamic_size()
    integers = [maps.new_empty(number, dtype=torch.int64) for _ in range(3)]
    boxes, mean = (maps.new_empty(shape, dtype=torch.float32) for shape in ((number, 4), (number,)))
    return boxes, integers[0], mean, integers[1], integers[2]


def _fake_largest(maps: Tensor, threshold: float, connectivity: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = maps.shape[:2]
    boxes, mean = (maps.new_empty(size, dtype=torch.float32) for size in ((*shape, 4), shape))
    return boxes, maps.new_empty(shape, dtype=torch.int64), mean


register("component_boxes", _fake_all)
register("largest_box", _fake_largest)
