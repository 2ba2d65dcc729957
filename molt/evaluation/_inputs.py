"""Checks of what metrics are given. Every message names the argument, what came and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from molt._words import count

Floats = NDArray[np.float64]


def check_maps(maps: object, shape: str, device: torch.device, name: str = "maps") -> tuple[Tensor, Tensor]:
    """Check for maps in [0, 1] and return them, on ``device``, and which of them hold a NaN.

    Args:
        maps: tensor or array of floats, or a list of such maps, with the dimensions that ``shape``, e.g.
            ``"(B, H, W)"``, names; the last two are a map's.
        shape: what is expected.
        device: where the maps go.
        name: of the argument.

    Returns:
        the maps and (...,) bool, True where a map holds a NaN.

    Raises:
        TypeError: neither tensor, array nor list of them, or not of floats.
        ValueError: another number of dimensions, no pixel, or a value outside [0, 1].
    """
    if isinstance(maps, list | tuple) and maps:
        maps = _stacked(maps, shape, name)
    if not isinstance(maps, Tensor | np.ndarray):
        raise TypeError(f"{name}: got {type(maps).__name__}, expected a tensor or an array {shape}")
    if isinstance(maps, np.ndarray):
        if maps.dtype.kind not in "biuf" or maps.dtype.itemsize > 8:
            raise TypeError(f"{name}: got {maps.dtype}, expected floats in [0, 1]")
        # A copy in the machine's byte order: files that are mapped read-only or flipped views are no tensors.
        maps = torch.from_numpy(maps.astype(maps.dtype.newbyteorder("="), order="C", copy=True))
    found = maps.detach().to(device)
    if not found.is_floating_point():
        raise TypeError(f"{name}: got {str(found.dtype).removeprefix('torch.')}, expected floats in [0, 1]")
    if found.dim() != shape.count(",") + 1 or 0 in found.shape[-2:]:
        raise ValueError(f"{name}: got shape {tuple(found.shape)}, expected {shape} with at least one pixel")
    low, high = _ends(found)
    outside = (low < 0) | (high > 1)
    if outside.any():
        where = tuple(outside.nonzero()[0].tolist())
        raise ValueError(
            f"{name}: map {where[0] if len(where) == 1 else where} has values from {low[where].item():g} to "
            f"{high[where].item():g}, expected all in [0, 1]"
        )
    return found, low.isnan()


def _ends(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest value of each map; NaN goes through both, and compares false."""
    if maps.device.type != "cpu" or not maps.numel():
        return maps.flatten(-2).amin(-1), maps.flatten(-2).amax(-1)
    # Map by map, so that it is fetched once; over a dimension aminmax() takes 20 times as long.
    ends = [torch.aminmax(one) for one in maps.reshape(-1, *maps.shape[-2:])]
    low, high = (torch.stack(part).view(maps.shape[:-2]) for part in zip(*ends, strict=True))
    return low, high


def _stacked(maps: Sequence[Any], shape: str, name: str) -> Tensor | NDArray[Any]:
    """Return a list of maps as one tensor or array."""
    try:
        if all(isinstance(one, Tensor) for one in maps):
            return torch.stack(tuple(maps))
        return np.stack([np.asarray(one.cpu() if isinstance(one, Tensor) else one) for one in maps])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: got maps of different shapes or kinds ({error}), expected {shape}") from None


def check_boxes(boxes: object, number: int, name: str = "boxes") -> list[Floats]:
    """Check for the true boxes of ``number`` photos, at least one each, and return them as arrays (n, 4).

    Raises:
        TypeError: not a list.
        ValueError: another number of photos, a photo without a box, or a box that is not finite x0 <= x1, y0 <= y1.
    """
    if isinstance(boxes, str | dict) or not isinstance(boxes, Sequence | Tensor | np.ndarray):
        raise TypeError(f"{name}: got {type(boxes).__name__}, expected a list of (n, 4) boxes, one entry a photo")
    if len(boxes) != number:
        raise ValueError(f"{name}: got {count(len(boxes), 'entry', 'entries')}, expected {number}, one a photo")
    found = []
    for index, one in enumerate(boxes):
        table = as_floats(one, f"{name}[{index}]")
        if table.ndim != 2 or table.shape[1] != 4 or len(table) == 0:
            raise ValueError(f"{name}[{index}]: got shape {table.shape}, expected (n, 4) with n at least 1")
        check_edges(table, f"{name}[{index}]")
        found.append(table)
    return found


def check_edges(table: Floats, name: str) -> None:
    """Check that boxes (n, 4) are finite with x0 <= x1 and y0 <= y1, or raise ValueError."""
    if not (np.isfinite(table).all() and (table[:, :2] <= table[:, 2:]).all()):
        bad = next(
            row for row in table.tolist() if not (np.isfinite(row).all() and row[0] <= row[2] and row[1] <= row[3])
        )
        raise ValueError(f"{name}: got {bad}, expected finite x0, y0, x1, y1 with x0 <= x1 and y0 <= y1")


def as_floats(values: ArrayLike | Tensor, name: str) -> Floats:
    """Return numbers of any kind as a float64 array, or raise TypeError."""
    try:
        if isinstance(values, Tensor):
            values = values.detach().cpu().numpy()
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected numbers ({error})") from None


def check_integers(values: object, number: int, name: str, device: torch.device) -> Tensor:
    """Check for ``number`` integers, in a tensor, array or list, and return them (number,) int64.

    Raises:
        TypeError: no integers.
        ValueError: another shape.
    """
    found = _as_tensor(values, name).to(device)
    if found.dtype.is_floating_point or found.dtype.is_complex or found.dtype == torch.bool:
        if found.numel():
            raise TypeError(f"{name}: got {str(found.dtype).removeprefix('torch.')}, expected integers")
        found = found.long()
    if tuple(found.shape) != (number,):
        raise ValueError(f"{name}: got shape {tuple(found.shape)}, expected ({number},), one a photo")
    return found.long()


def check_ranking(values: object, number: int, least: int, device: torch.device) -> Tensor:
    """Check for (number, K) predicted classes, K at least ``least``, and return them as int64.

    Raises:
        TypeError: no integers.
        ValueError: another shape.
    """
    found = _as_tensor(values, "predicted").to(device)
    if found.dtype.is_floating_point or found.dtype.is_complex or found.dtype == torch.bool:
        raise TypeError(f"predicted: got {str(found.dtype).removeprefix('torch.')}, expected integers")
    if found.dim() != 2 or len(found) != number or found.shape[1] < least:
        expected = f"({number}, K) with K at least {least}"
        raise ValueError(f"predicted: got shape {tuple(found.shape)}, expected {expected}")
    return found.long()


def check_thresholds(thresholds: object) -> Floats:
    """Return ``np.arange(0, 1, 1 / N)`` for a number N, or an increasing sequence in [0, 1) as it is.

    Raises:
        TypeError: neither.
        ValueError: not positive, not increasing or out of range.
    """
    if isinstance(thresholds, bool):
        raise TypeError(f"thresholds: got {thresholds}, expected a number of thresholds or a sequence of them")
    if isinstance(thresholds, int | np.integer):
        if not 1 <= thresholds <= 100_000:
            raise ValueError(f"thresholds: got {thresholds}, expected 1 to 100000")
        return np.arange(0, 1, 1 / int(thresholds))
    if not isinstance(thresholds, Sequence | Tensor | np.ndarray) or isinstance(thresholds, str):
        raise TypeError(f"thresholds: got {type(thresholds).__name__}, expected a number or a sequence of them")
    found = as_floats(thresholds, "thresholds")
    if found.ndim != 1 or len(found) == 0 or not (np.diff(found) > 0).all() or not (found[0] >= 0 and found[-1] < 1):
        raise ValueError("thresholds: expected one or more numbers in [0, 1), each above the one before")
    return found


def check_fraction(value: Any, name: str) -> float:
    """Check for an IoU to reach, a number in (0, 1], and return it.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating) or not 0 < value <= 1:
        raise ValueError(f"{name}: got {value!r}, expected a number in (0, 1]")
    return float(value)


def check_choice(value: object, choices: Sequence[str], name: str) -> None:
    """Check for one of some words, or raise ValueError."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}")


def check_empty(value: Any) -> tuple[float, float, float, float]:
    """Check for the box that stands for nothing found and return it.

    Raises:
        ValueError: not a box.
    """
    table = as_floats(value, "empty")
    if table.shape != (4,):
        raise ValueError(f"empty: got {value!r}, expected x0, y0, x1, y1")
    check_edges(table[None], "empty")
    x0, y0, x1, y1 = table.tolist()
    return x0, y0, x1, y1


def _as_tensor(values: object, name: str) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a tensor, array or list of integers ({error})") from None
