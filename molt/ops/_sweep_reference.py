"""The components at every cut of a map, in NumPy and SciPy: a labelling at each distinct level. Slow and plain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

CUTS = 255

_FOUR = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], dtype=bool)
_EIGHT = np.ones((3, 3), dtype=bool)

Mask = NDArray[np.bool_]


_Key = tuple[bool, bytes, tuple[int, int, int, int], float]


@dataclass(frozen=True)
class _Region:
    """One component, or in contour mode one hole, at one cut; ``key`` is the same where nothing about it changed."""

    key: _Key
    first_pixel: int

    @property
    def hole(self) -> bool:
        return self.key[0]

    @property
    def box(self) -> tuple[int, int, int, int]:
        return self.key[2]

    @property
    def area(self) -> float:
        return self.key[3]


def sweep_boxes(levels: Tensor, contours: bool, connectivity: int) -> tuple[Tensor, ...]:
    """Every component at every cut, one row for each that lasts; the twin of `molt.ops.sweep_boxes`.

    At cut c in 0..254 the pixels with a level above c are kept. A row's cuts ``first..last`` are all those in a row at
    which the very same pixels, box and area exist. Rows go map by map, by ``last`` from high to low, components before
    holes, then by first pixel in reading order (a hole's own).

    Args:
        levels: (B, C, h, w) uint8.
        contours: False gives components and their pixels; True gives OpenCV's contours: the outer one of each
            8-connected component and the one around each 4-connected hole, with `cv2.contourArea`.
        connectivity: 4 or 8, of the kept pixels; contours need 8.

    Returns:
        boxes (N, 4) float32 xyxy edges, area (N,) float64, first (N,) int64, last (N,) int64, hole (N,) bool,
        image (N,) int64, channel (N,) int64, on the levels' device.
    """
    rows: list[tuple[float, ...]] = []
    for image, channels in enumerate(levels.cpu().numpy()):
        for channel, values in enumerate(channels):
            lasting: dict[_Key, tuple[_Region, int, int]] = {}
            ended: list[tuple[_Region, int, int]] = []
            for low, high, mask in _cuts(values):
                now = {}
                for region in _regions(mask, contours, connectivity):
                    first = lasting.pop(region.key, (region, low, high))[1]
                    now[region.key] = (region, first, high)
                ended += lasting.values()
                lasting = now
            ended += lasting.values()
            ended.sort(key=lambda row: (-row[2], row[0].hole, row[0].first_pixel))
            rows += [(*r.box, r.area, first, last, r.hole, image, channel) for r, first, last in ended]
    table = torch.tensor(rows, dtype=torch.float64).view(-1, 10).to(levels.device)
    whole = table[:, 5:].long()
    return table[:, :4].float(), table[:, 4], whole[:, 0], whole[:, 1], whole[:, 2].bool(), whole[:, 3], whole[:, 4]


def largest_at_cuts(levels: Tensor, contours: bool, connectivity: int) -> tuple[Tensor, Tensor]:
    """The largest component by area at every cut; the twin of `molt.ops.largest_at_cuts`.

    Of equal areas the component whose first pixel in reading order comes first wins; with ``contours`` the one whose
    first pixel comes last, which OpenCV lists first.

    Args:
        levels: (B, C, h, w) uint8.
        contours: area by `cv2.contourArea` instead of pixels.
        connectivity: 4 or 8, of the kept pixels; contours need 8.

    Returns:
        boxes (B, C, 255, 4) float32 xyxy edges and area (B, C, 255) float64, zeros where a cut keeps nothing, on the
        levels' device.
    """
    shape = levels.shape[:2]
    boxes = np.zeros((*shape, CUTS, 4), dtype=np.float32)
    area = np.zeros((*shape, CUTS))
    for image, channels in enumerate(levels.cpu().numpy()):
        for channel, values in enumerate(channels):
            for low, high, mask in _cuts(values):
                # A hole is never larger than the contour it lies in, and is listed after it.
                parts = [region for region in _regions(mask, contours, connectivity) if not region.hole]
                best = max(parts, key=lambda r: (r.area, r.first_pixel if contours else -r.first_pixel))
                boxes[image, channel, low : high + 1] = best.box
                area[image, channel, low : high + 1] = best.area
    return torch.from_numpy(boxes).to(levels.device), torch.from_numpy(area).to(levels.device)


def _cuts(values: NDArray[np.uint8]) -> Iterator[tuple[int, int, Mask]]:
    """Give each different non-empty mask of a map with the first and last cut that makes it."""
    low = 0
    for level in np.unique(values[values > 0]).tolist():
        yield low, level - 1, values >= level
        low = level


def _regions(mask: Mask, contours: bool, connectivity: int) -> Iterator[_Region]:
    """Give the components of a mask, and with ``contours`` its holes."""
    labels, count = ndimage.label(mask, _EIGHT if connectivity == 8 else _FOUR)
    for index in range(1, count + 1):
        own = labels == index
        filled = ndimage.binary_fill_holes(own, _FOUR) if contours else own
        area = _outer_area(filled) if contours else float(own.sum())
        yield _region(own, area, hole=False)
    if not contours:
        return
    # A frame of background joins all that is not enclosed.
    ground, count = ndimage.label(np.pad(~mask, 1, constant_values=True), _FOUR)
    for index in range(1, count + 1):
        if index != ground[0, 0]:
            own = (ground == index)[1:-1, 1:-1]
            yield _region(own, _hole_area(ndimage.binary_fill_holes(own, _EIGHT)), hole=True)


def _region(own: Mask, area: float, *, hole: bool) -> _Region:
    pixels = np.flatnonzero(own)
    y, x = np.unravel_index(pixels, own.shape)
    # A hole's contour runs through the kept pixels around it.
    wider = int(hole)
    box = (int(x.min()) - wider, int(y.min()) - wider, int(x.max()) + 1 + wider, int(y.max()) + 1 + wider)
    return _Region((hole, pixels.tobytes(), box, area), int(pixels[0]))


def _blocks(filled: Mask) -> NDArray[np.int64]:
    """How many pixels of a region each 2x2 block holds, blocks over the frame's edge included."""
    wide = np.pad(filled, 1).astype(np.int64)
    return wide[:-1, :-1] + wide[1:, :-1] + wide[:-1, 1:] + wide[1:, 1:]


def _outer_area(filled: Mask) -> float:
    """The area inside the polygon through a filled component's border pixels: a block of 4 is a square, of 3 a half."""
    blocks = _blocks(filled)
    return float((blocks == 4).sum() + (blocks == 3).sum() / 2)


def _hole_area(filled: Mask) -> float:
    """The area inside the polygon through the kept pixels around a filled hole."""
    blocks = _blocks(filled)
    return float((blocks >= 2).sum() + (blocks == 1).sum() / 2)
