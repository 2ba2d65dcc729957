"""Boxes around the connected components of maps at every threshold, found in one pass."""

from __future__ import annotations

import itertools
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from molt._backend import Backend, use_native
from molt._words import count
from molt.ops import reference
from molt.ops._checks import FLOATS, check_not_captured, check_tensor
from molt.ops._native import call, register

CUTS = 255  # of 8-bit levels, and the most thresholds that one pass takes


@dataclass(frozen=True, eq=False)
class SweptBoxes:
    """Connected components, or contours, of a batch of maps, each with the thresholds at which it exists.

    Map by map, by descending ``last``; of the same ``last`` components before holes, then by first pixel in reading
    order (a hole's own).

    Attributes:
        boxes: (N, 4) float32 xyxy in map pixels, edges: a lone pixel at the origin is [0, 0, 1, 1].
        area: (N,) float64: pixels; of contours what OpenCV's contourArea gives.
        first: (N,) int64, the first threshold, by its index, at which these very pixels are one component.
        last: (N,) int64, the last one.
        hole: (N,) bool, True for the contour of a hole.
        image: (N,) int64 index into the batch.
        channel: (N,) int64 index of the map within its image.
    """

    boxes: Tensor
    area: Tensor
    first: Tensor
    last: Tensor
    hole: Tensor
    image: Tensor
    channel: Tensor

    def at(self, index: int) -> SweptBoxes:
        """Return what exists at one threshold, given by its index."""
        there = (self.first <= index) & (index <= self.last)
        return SweptBoxes(*(getattr(self, field.name)[there] for field in fields(self)))

    def to(self, device: torch.device | str) -> SweptBoxes:
        """Return the same on another device."""
        return SweptBoxes(*(getattr(self, field.name).to(device) for field in fields(self)))


def sweep_boxes(
    maps: Tensor,
    thresholds: Sequence[float] | Tensor | None = None,
    *,
    contours: bool = False,
    connectivity: int = 8,
    backend: Backend | None = None,
) -> SweptBoxes:
    """Box the connected components of each map at every threshold.

    The pixels are sorted by level once and joined from the highest down (union-find); a component is listed once for
    all thresholds at which its pixels stay the same. How many there are depends on the values, so on a GPU the number
    is read back.

    Args:
        maps: (B, C, h, w), any strides: uint8 levels, of which threshold ``c``, 0 to 254, keeps the pixels above c;
            or float with ``thresholds``, kept as :func:`component_boxes` does: positive and at least the threshold
            times the map's maximum, compared in double precision; a map with NaN keeps nothing.
        thresholds: at most 255 rising numbers in (0, 1]; None for uint8 maps.
        contours: list OpenCV's contours (``findContours`` with ``RETR_TREE``) instead of components: the outer contour
            of each 8-connected component, and that of each hole, background joined by its four sides that does not
            reach the frame. A hole's contour runs through the pixels around it, which its box includes. Found on the
            CPU, whatever the device, without OpenCV.
        connectivity: 4 or 8 neighbours; contours have 8.
        backend: ``"auto"``, ``"reference"`` (SciPy on the CPU, threshold by threshold) or ``"native"``; None for the
            one in force.

    Returns:
        SweptBoxes on the maps' device.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range, or maps without a pixel.
        RuntimeError: backend ``"native"`` where there is none; maps on a GPU while a CUDA graph is captured, which
            :func:`largest_at_cuts` can be.
    """
    check_not_captured("sweep_boxes", "largest_at_cuts", maps)
    levels, _ = _levels(maps, thresholds, contours, connectivity)
    if use_native("sweep_boxes", levels.device, backend):
        found = SweptBoxes(*call("sweep_boxes", levels, bool(contours), connectivity))
    else:
        found = SweptBoxes(*reference.sweep_boxes(levels, bool(contours), connectivity))
    return found.to(maps.device)


def largest_at_cuts(
    maps: Tensor,
    thresholds: Sequence[float] | Tensor | None = None,
    *,
    contours: bool = False,
    connectivity: int = 8,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Box the largest connected component of each map at every threshold.

    The same components as :func:`sweep_boxes`, in tensors whose size does not depend on the values: the native form
    reads nothing back from a GPU. Of equal areas the component whose first pixel comes first in reading order leads;
    of contours the outermost one whose first pixel comes last, as ``max(contours, key=cv2.contourArea)`` has it.

    Args:
        maps: as :func:`sweep_boxes`, like all that follow.
        thresholds: rising numbers in (0, 1], None for uint8 maps.
        contours: contours instead of components.
        connectivity: 4 or 8 neighbours.
        backend: ``"auto"``, ``"reference"`` or ``"native"``.

    Returns:
        boxes (B, C, T, 4) float32 xyxy in map pixels and area (B, C, T) float64, T the number of thresholds (255 for
        uint8 maps), on the maps' device; all zero where a threshold keeps nothing.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`sweep_boxes`.
    """
    levels, count = _levels(maps, thresholds, contours, connectivity)
    if use_native("largest_at_cuts", levels.device, backend):
        boxes, area = call("largest_at_cuts", levels, bool(contours), connectivity)
    else:
        boxes, area = reference.largest_at_cuts(levels, bool(contours), connectivity)
    return boxes[:, :, :count].to(maps.device), area[:, :, :count].to(maps.device)


def _levels(maps: Tensor, thresholds: object, contours: bool, connectivity: object) -> tuple[Tensor, int]:
    """Check the arguments; return uint8 levels, for contours on the CPU, and the number of thresholds."""
    check_tensor("maps", maps, (torch.uint8, *FLOATS), "(B, C, h, w)")
    if 0 in maps.shape[2:]:
        raise ValueError(f"maps: got shape {tuple(maps.shape)}, expected maps of at least one pixel")
    if connectivity not in (4, 8):
        raise ValueError(f"connectivity: got {connectivity}, expected 4 or 8")
    if contours and connectivity != 8:
        raise ValueError("connectivity: got 4, expected 8 for contours")
    maps = maps.detach()
    if contours and maps.device.type != "meta":
        maps = maps.cpu()
    if maps.dtype == torch.uint8:
        if thresholds is not None:
            raise ValueError("thresholds: got some, expected None for uint8 maps, whose thresholds are 0 to 254")
        return maps, CUTS
    shares = _thresholds(thresholds)
    return threshold_levels(maps, shares), len(shares)


def _thresholds(thresholds: object) -> list[float]:
    if thresholds is None:
        raise TypeError("thresholds: got None, expected rising numbers in (0, 1] for float maps")
    given = thresholds.tolist() if isinstance(thresholds, Tensor | np.ndarray) else thresholds
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"thresholds: got {thresholds!r}, expected rising numbers in (0, 1]")
    if not all(isinstance(share, numbers.Real) and not isinstance(share, bool) for share in given):
        raise TypeError(f"thresholds: got {thresholds!r}, expected numbers in (0, 1]")
    shares = [float(share) for share in given]
    if not 1 <= len(shares) <= CUTS:
        raise ValueError(f"thresholds: got {count(len(shares), 'number')}, expected 1 to {CUTS}")
    if not all(0 < share <= 1 for share in shares) or any(b <= a for a, b in itertools.pairwise(shares)):
        raise ValueError(f"thresholds: got {shares}, expected rising numbers in (0, 1]")
    return shares


def threshold_levels(maps: Tensor, shares: Sequence[float]) -> Tensor:
    """Return how many thresholds each pixel passes.

    Args:
        maps: (B, C, h, w) float.
        shares: rising shares of each map's maximum, at most 255.

    Returns:
        (B, C, h, w) uint8, 0 for pixels that are not positive and for maps that hold NaN.
    """
    values = maps.double().flatten(2)
    peak = values.amax(2, keepdim=True)  # NaN where a value is
    cutoffs = peak * torch.tensor(shares, dtype=torch.float64, device=maps.device)
    passed = torch.searchsorted(cutoffs, values.contiguous(), right=True)
    kept = (values > 0) & ~peak.isnan()
    return torch.where(kept, passed, 0).to(torch.uint8).view(maps.shape)


def _fake_sweep(levels: Tensor, contours: bool, connectivity: int) -> tuple[Tensor, ...]:
    number = torch.library.get_ctx().new_dynamic_size()
    dtypes = (torch.float64, torch.int64, torch.int64, torch.bool, torch.int64, torch.int64)
    boxes = levels.new_empty((number, 4), dtype=torch.float32)
    return boxes, *(levels.new_empty(number, dtype=dtype) for dtype in dtypes)


def _fake_largest(levels: Tensor, contours: bool, connectivity: int) -> tuple[Tensor, Tensor]:
    shape = (*levels.shape[:2], CUTS)
    return levels.new_empty((*shape, 4), dtype=torch.float32), levels.new_empty(shape, dtype=torch.float64)


register("sweep_boxes", _fake_sweep)
register("largest_at_cuts", _fake_largest)
