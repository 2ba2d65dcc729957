"""Argument checks that operators share. Every message names the argument, what came and what was expected."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABELS = (torch.uint8, torch.int32, torch.int64)
ORDERS = ("resize_first", "normalize_first")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_tensor(name: str, value: object, dtypes: Sequence[torch.dtype], shape: str) -> None:
    """Check for a tensor of one of `dtypes` with as many dimensions as `shape`, e.g. ``"(B, H, W)"``, has names.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another number of dimensions.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a tensor")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: got {_short(value.dtype)}, expected {', '.join(_short(d) for d in dtypes)}")
    if value.dim() != shape.count(",") + (not shape.endswith(",)")):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {shape}")


def check_maps(maps: object, name: str = "maps", *, empty: bool = False) -> None:
    """Check for maps (B, C, h, w) of floats, with at least one pixel each unless `empty`.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another number of dimensions, or no pixel.
    """
    check_tensor(name, maps, FLOATS, "(B, C, h, w)")
    assert isinstance(maps, Tensor)
    if not empty and 0 in maps.shape[2:]:
        raise ValueError(f"{name}: got shape {tuple(maps.shape)}, expected maps of at least one pixel")


def as_maps(maps: object, name: str = "maps") -> Tensor:
    """Return maps (h, w), (B, h, w) or (B, C, h, w), a tensor or array of floats, as a tensor (B, C, h, w).

    Raises:
        TypeError: neither, or another dtype.
        ValueError: another number of dimensions, or no pixel.
    """
    if isinstance(maps, np.ndarray):
        if maps.dtype.kind != "f" or maps.dtype.itemsize > 8:
            raise TypeError(f"{name}: got an array of {maps.dtype}, expected float16, float32 or float64")
        maps = from_array(maps)
    if isinstance(maps, Tensor) and maps.dim() in (2, 3):
        maps = maps[None, None] if maps.dim() == 2 else maps[:, None]
    elif isinstance(maps, Tensor) and maps.dim() != 4:
        raise ValueError(f"{name}: got shape {tuple(maps.shape)}, expected (h, w), (B, h, w) or (B, C, h, w)")
    check_maps(maps, name)
    assert isinstance(maps, Tensor)
    return maps


def from_array(array: np.ndarray) -> Tensor:
    """Return an array of any byte order and strides as a tensor, sharing its memory where torch can."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    # A copy where the array is read-only: torch would warn of it.
    return torch.from_numpy(np.array(array, order="C", copy=None if array.flags.writeable else True))


def check_not_captured(operator: str, instead: str, maps: object) -> None:
    """Check that no CUDA graph is captured on the maps' device, for an operator that reads its result's size back.

    Raises:
        RuntimeError: one is; names what can be captured instead.
    """
    if not isinstance(maps, Tensor) or not maps.is_cuda or torch.compiler.is_compiling():
        return
    if torch.cuda.is_current_stream_capturing():
        fixed = f"{instead}, whose results' size does not depend on the values"
        raise RuntimeError(f"{operator}: got a call while a CUDA graph is captured, expected {fixed}")


def check_size(size: object, name: str = "size") -> tuple[int, int]:
    """Check for (H, W) in pixels and return it.

    Raises:
        TypeError: not a pair of integers.
        ValueError: not positive.
    """
    given = size.tolist() if isinstance(size, np.ndarray | Tensor) else size
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != 2:
        raise TypeError(f"{name}: got {size!r}, expected (H, W)")
    try:
        height, width = (n if isinstance(n, torch.SymInt) else _index(n) for n in given)
    except TypeError:
        raise TypeError(f"{name}: got {size!r}, expected two integers") from None
    if height < 1 or width < 1:
        raise ValueError(f"{name}: got {size!r}, expected positive numbers")
    return height, width  # type: ignore[return-value]  # a SymInt stands for an int


def _index(value: object) -> int:
    """Return an integer of Python, NumPy or torch as Python's; a bool is none."""
    return operator.index(None if isinstance(value, bool) else value)  # type: ignore[arg-type]


def check_order(order: object) -> str:
    """Check for the order of resize and min-max and return it.

    Raises:
        ValueError: neither ``"resize_first"`` nor ``"normalize_first"``.
    """
    if order not in ORDERS:
        raise ValueError(f"order: got {order!r}, expected {' or '.join(map(repr, ORDERS))}")
    return str(order)


def check_maps_labels(maps: object, labels: object, name: str = "maps") -> tuple[Tensor, Tensor]:
    """Check maps (B, C, H, W) of floats and labels (B, H, W) of integers on one device; return them.

    Raises:
        TypeError: not tensors, or other dtypes.
        ValueError: shapes or devices that do not fit.
    """
    check_tensor(name, maps, FLOATS, "(B, C, H, W)")
    check_tensor("labels", labels, LABELS, "(B, H, W)")
    assert isinstance(maps, Tensor)
    assert isinstance(labels, Tensor)
    expected = (maps.shape[0], maps.shape[2], maps.shape[3])
    if tuple(labels.shape) != expected:
        came, fits = tuple(labels.shape), tuple(maps.shape)
        raise ValueError(f"labels: got shape {came}, expected {expected} to fit {name} {fits}")
    if labels.device != maps.device:
        raise ValueError(f"labels: got a tensor on {labels.device}, expected {maps.device}, where {name} are")
    return maps, labels


def check_fraction(name: str, value: object) -> float:
    """Check for a number in [0, 1] and return it.

    Raises:
        TypeError: not a number.
        ValueError: NaN or outside [0, 1].
    """
    if isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a number")
    number = float(value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name}: got {value}, expected a number in [0, 1]")
    return number


def check_num_clusters(value: object, labels: Tensor) -> tuple[int, Tensor | None]:
    """Check a number of clusters: one for all images of labels (B, H, W), one an image, or None.

    Returns:
        The number, -1 where it is to be taken from the labels, and the (B,) int64 numbers or None: where labels are, or
        on the CPU.

    Raises:
        TypeError: neither integers nor None.
        ValueError: negative (not looked for in a tensor on a GPU), or not one number an image.
    """
    if value is None:
        return -1, None
    if isinstance(value, Tensor):
        batch = labels.shape[0]
        if value.dtype not in INTEGERS:
            raise TypeError(f"num_clusters: got {_short(value.dtype)}, expected integers")
        if tuple(value.shape) != (batch,):
            raise ValueError(f"num_clusters: got shape {tuple(value.shape)}, expected {(batch,)}, one number an image")
        if value.device.type == "cpu" and not torch.compiler.is_compiling() and batch and int(value.min()) < 0:
            raise ValueError(f"num_clusters: got {int(value.min())}, expected numbers >= 0")
        return -1, value.to(value.device if value.device.type == "cpu" else labels.device, torch.int64)
    if isinstance(value, bool):
        raise TypeError("num_clusters: got bool, expected an integer, a (B,) integer tensor or None")
    if not isinstance(value, (int, torch.SymInt)):
        try:
            value = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            kind = type(value).__name__
            raise TypeError(f"num_clusters: got {kind}, expected an integer, a (B,) integer tensor or None") from None
    if value < 0:
        raise ValueError(f"num_clusters: got {value}, expected a number >= 0")
    return value, None  # type: ignore[return-value]  # a SymInt stands for an int


def table_size(labels: Tensor, limit: int, counts: Tensor | None) -> tuple[int, Tensor | None]:
    """Return the number of clusters and counts as the operators take them.

    The CPU core finds the size of its tables by itself; a GPU kernel must be told, which reads back from the device
    unless one number was given, or numbers on the CPU, or labels are uint8.
    """
    if limit >= 0 or labels.device.type == "cpu":
        return limit, counts
    if labels.dtype == torch.uint8:
        return 256, counts
    if labels.numel() == 0:
        return 0, counts
    return max(0, int(labels.max()) + 1 if counts is None else int(counts.max())), counts


def check_limit(name: str, value: object) -> int:
    """Check for a number of at least 0, or None, and return it; -1 stands for None.

    Raises:
        TypeError: neither an integer nor None.
        ValueError: negative.
    """
    if value is None:
        return -1
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]  # a SymInt stands for an int
    try:
        number = _index(value)
    except TypeError:
        raise TypeError(f"{name}: got {type(value).__name__}, expected an integer or None") from None
    if number < 0:
        raise ValueError(f"{name}: got {number}, expected a number >= 0")
    return number


def check_labels(labels: Tensor, num_clusters: int, counts: Tensor | None, name: str = "labels") -> None:
    """Check labels (B, ...) on the CPU against one limit (-1: none) or one an image, as the native operators do.

    Reads the values, so it belongs outside compiled regions.

    Raises:
        ValueError: a label out of range; names the first image that has one.
    """
    if labels.numel() == 0:
        return
    low, high = (ends.tolist() for ends in torch.aminmax(labels.flatten(1), dim=1))
    limits = counts.tolist() if counts is not None else [num_clusters] * labels.shape[0]
    for image, limit in enumerate(limits):
        label = low[image] if low[image] < 0 else high[image]
        if label < 0 or 0 <= limit <= label:
            expected = "values >= 0" if limit < 0 else f"values in [0, {limit})"
            raise ValueError(f"{name}: got {label} in image {image}, expected {expected}")
