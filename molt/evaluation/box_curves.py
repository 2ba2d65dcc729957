"""How well the boxes of a map fit the true ones at every threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from molt import _extension
from molt._backend import Backend, use_native
from molt.evaluation._inputs import check_boxes, check_choice, check_empty
from molt.ops import _sweep_reference
from molt.ops._native import call, register
from molt.ops.sweep_boxes import CUTS

Area = Literal["contour", "pixels"]
AREAS: tuple[Area, ...] = ("contour", "pixels")
Maps = TypeVar("Maps", Tensor, NDArray[Any])
Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class BoxCurves:
    """IoU with the best fitting true box at each cut of 8-bit maps; cut c keeps the pixels above c.

    Attributes:
        any: (B, 255) float64, of the best of all boxes; (0, 255) where not asked for.
        largest: (B, 255) float64, of the largest component's box; (0, 255) where not asked for.
        peak: (B,) int64, each map's highest level.
    """

    any: NDArray[np.float64]
    largest: NDArray[np.float64]
    peak: NDArray[np.int64]

    def cuts(self, thresholds: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return (B, T) the cut at which each map is read for each threshold, a share of its highest level."""
        return np.asarray(thresholds[None] * self.peak[:, None], dtype=np.int64)


def to_levels(maps: Maps) -> Maps:
    """Return maps as 8-bit levels: 255 times the value, cut off after the point, in double precision.

    Args:
        maps: (B, H, W) float in [0, 1], tensor or array. A map that holds NaN becomes zeros (as wsolevaluation does).

    Returns:
        (B, H, W) uint8 of the same kind, on the maps' device.
    """
    if isinstance(maps, Tensor):
        wide = maps.detach().double()
        bad = wide.isnan().flatten(1).any(1)
        levels = (wide * 255).nan_to_num(0.0).to(torch.uint8)
        levels[bad] = 0
        return levels
    wide_array = np.asarray(maps, dtype=np.float64)
    broken = np.isnan(wide_array).any(axis=tuple(range(1, wide_array.ndim)))
    levels_array = np.nan_to_num(wide_array * 255, nan=0.0).astype(np.uint8)
    levels_array[broken] = 0
    return levels_array


def box_curves(
    levels: Tensor | NDArray[np.uint8],
    boxes: Sequence[ArrayLike | Tensor],
    *,
    area: Area = "contour",
    clip: bool = True,
    plus_one: bool = True,
    empty: Sequence[float] = (0, 0, 0, 0),
    which: Literal["both", "any", "largest"] = "both",
    backend: Backend | None = None,
) -> BoxCurves:
    """Find every map's boxes at every cut and their IoU with the true boxes, in one pass a map, on the CPU.

    Args:
        levels: (B, H, W) uint8 (see :func:`to_levels`), tensor or array; arrays go to the core without torch.
        boxes: B tensors, arrays or lists (n, 4), true boxes xyxy in map pixels, at least one a map.
        area: ``"contour"``: boxes of OpenCV's outer and hole contours, the largest by contourArea (wsolevaluation,
            TS-CAM); ``"pixels"``: of 8-connected components, the largest by its pixels (SAT).
        clip: right and lower edges at most W - 1 and H - 1 (wsolevaluation).
        plus_one: a side is one pixel longer than its ends are apart.
        empty: the box where a cut keeps nothing, xyxy.
        which: the curves wanted; one alone takes less time.
        backend: as for :func:`molt.ops.sweep_boxes`.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range.
        RuntimeError: backend ``"native"`` where there is none.
    """
    if not isinstance(levels, Tensor | np.ndarray):
        raise TypeError(f"levels: got {type(levels).__name__}, expected a tensor or array")
    if levels.ndim != 3 or 0 in levels.shape[1:]:
        raise ValueError(f"levels: got shape {tuple(levels.shape)}, expected (B, H, W) of at least one pixel")
    if levels.dtype not in (torch.uint8, np.uint8):
        raise TypeError(f"levels: got {levels.dtype}, expected uint8 (to_levels makes them)")
    check_choice(area, AREAS, "area")
    own = check_boxes(boxes, levels.shape[0])
    truths = np.concatenate(own) if own else np.zeros((0, 4))
    offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in own])]).astype(np.int64)
    check_choice(which, ("both", "any", "largest"), "which")
    knobs = (area == "contour", bool(clip), float(plus_one), list(check_empty(empty)))
    wanted = (which != "largest", which != "any")
    if not use_native("box_curves", torch.device("cpu"), backend):
        return _reference(levels, truths, offsets, *knobs, *wanted)
    if isinstance(levels, np.ndarray):
        module: Any = _extension.CPU.module
        return BoxCurves(*module.box_curves_numpy(levels, truths, offsets, *knobs, *wanted))
    found = call(
        "box_curves", levels.detach().cpu(), torch.from_numpy(truths), torch.from_numpy(offsets), *knobs, *wanted
    )
    return BoxCurves(*(value.numpy() for value in found))


def largest_at_one_cut(
    maps: Tensor, threshold: float, *, relative: bool = True, area: Area = "contour", backend: Backend | None = None
) -> NDArray[np.float64]:
    """Box the largest component of each map at one threshold, without a sweep over the others, on the CPU.

    Args:
        maps: (N, H, W) float in [0, 1]; one that holds NaN counts as zeros.
        threshold: in [0, 1), the share of the map's highest level (see :func:`to_levels`) above which pixels are kept.
        relative: False takes it as a share of 255.
        area: as for :func:`box_curves`.
        backend: as for :func:`molt.ops.sweep_boxes`.

    Returns:
        (N, 4) xyxy, right and bottom outside, zeros where nothing is kept: what :func:`molt.ops.largest_at_cuts` has at
        this cut.
    """
    given = maps.detach().cpu()
    given = given if given.dtype in (torch.float32, torch.float64) else given.double()
    if use_native("largest_at_one_cut", torch.device("cpu"), backend):
        module: Any = _extension.CPU.module
        found = module.largest_at_one_cut_numpy(given.numpy(), threshold, relative, area == "contour")
        return np.asarray(found, dtype=np.float64)
    levels = to_levels(given)
    peak = levels.flatten(1).amax(1).numpy() if relative else np.full(len(levels), 255)
    kept = levels > torch.from_numpy((threshold * peak).astype(np.int64))[:, None, None]
    boxes, _ = _sweep_reference.largest_at_cuts(kept.to(torch.uint8)[:, None], area == "contour", 8)
    return boxes[:, 0, 0].double().numpy()


def _reference(
    levels: Tensor | NDArray[np.uint8],
    truths: NDArray[np.float64],
    offsets: NDArray[np.int64],
    contours: bool,
    clip: bool,
    extra: float,
    empty: list[float],
    any_box: bool,
    largest: bool,
) -> BoxCurves:
    """The same from the plain sweep, box by box."""
    values = torch.as_tensor(levels).cpu()
    count, height, width = values.shape
    edge = np.array([np.inf, np.inf, width - 1, height - 1]) if clip else np.full(4, np.inf)

    def fit(rows: NDArray[np.float64], index: int) -> NDArray[np.float64]:
        own = truths[offsets[index] : offsets[index + 1]][None]
        rows = rows[:, None]
        sides = np.minimum(rows[..., 2:], own[..., 2:]) - np.maximum(rows[..., :2], own[..., :2]) + extra
        both = sides.clip(min=0).prod(-1)
        whole = (rows[..., 2:] - rows[..., :2] + extra).prod(-1) + (own[..., 2:] - own[..., :2] + extra).prod(-1) - both
        best: NDArray[np.float64] = np.divide(both, whole, out=np.zeros_like(both), where=whole > 0).max(1)
        return best

    found = _sweep_reference.sweep_boxes(values[:, None], contours, 8)
    rows, _, first, last, _, image, _ = (part.numpy() for part in found)
    biggest = _sweep_reference.largest_at_cuts(values[:, None], contours, 8)[0][:, 0].double().numpy()
    peak = values.flatten(1).amax(1).long().numpy()
    at_any, at_largest = np.zeros((count, CUTS)), np.zeros((count, CUTS))
    for index in range(count):
        mine = image == index
        ious = fit(np.minimum(rows[mine].astype(np.float64), edge), index)
        for iou, a, b in zip(ious, first[mine], last[mine], strict=True):
            at_any[index, a : b + 1] = np.maximum(at_any[index, a : b + 1], iou)
        at_largest[index] = fit(np.minimum(biggest[index], edge), index)
        nothing = fit(np.array([empty]), index)
        at_any[index, peak[index] :] = at_largest[index, peak[index] :] = nothing
    return BoxCurves(at_any if any_box else at_any[:0], at_largest if largest else at_largest[:0], peak)


def _fake(
    levels: Tensor,
    truths: Tensor,
    offsets: Tensor,
    contours: bool,
    clip: bool,
    extra: float,
    empty: list[float],
    any_box: bool,
    largest: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = levels.shape[0]
    curves = [levels.new_empty((batch if own else 0, CUTS), dtype=torch.float64) for own in (any_box, largest)]
    return curves[0], curves[1], levels.new_empty(levels.shape[0], dtype=torch.int64)


register("box_curves", _fake)
