"""Pixel values of any dtype and shape brought to one form.

The rule: integers within 0..255, whatever their dtype, are 8-bit levels, and floats within [0, 1] are shares of white.
What goes beyond are levels of as many bits as the largest value needs, up to 16: 0 is black, white is 511, 1023... or
65535. Values below 0 or above 65535, and such as would show less than a quarter of the way from black to white, are
stretched: the smallest is black, the largest white. This holds for all channels of a photo together and for each photo
by itself. Our choice: files do not reliably say how many of their bits are used, or what is white.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def to_levels(values: np.ndarray, seen: np.ndarray | None = None) -> np.ndarray:
    """Return integers or floats of any size as uint8 levels.

    Args:
        values: (H, W, C) of one photo, alpha apart.
        seen: (H, W) mask of the pixels that count for the range; of the others the levels are undefined.

    Raises:
        ValueError: NaN or infinite values.
    """
    if values.dtype == np.uint8:
        return values
    shown = values if seen is None or not seen.any() else values[seen]
    low, span = _range(float(shown.min()), float(shown.max()), integer=values.dtype.kind in "iu")
    return np.clip((values.astype(np.float64) - low) * (255 / span), 0, 255).round().astype(np.uint8)


def to_alpha(values: np.ndarray) -> np.ndarray:
    """Return opacity, integers or floats, as uint8: beyond 8 bits and beyond 1 the largest value is opaque."""
    if values.dtype == np.uint8:
        return values
    top = float(values.max())
    whole = 255 if values.dtype.kind in "iu" else 1
    return (values.astype(np.float64).clip(0) * (255 / max(top, whole))).round().astype(np.uint8)


def to_unit(values: Tensor) -> Tensor:
    """Return a tensor of integers, floats or bools as float32 in [0, 1], on its own device.

    Raises:
        ValueError: NaN or infinite values.
    """
    if values.dtype == torch.uint8:
        return values.float() / 255
    if values.dtype == torch.bool:
        return values.float()
    integer = not values.is_floating_point()
    exact = values.double() if integer or values.dtype == torch.float64 else values.float()
    low, span = _range(*(float(end) for end in torch.aminmax(exact)), integer=integer)
    # What the rule leaves alone stays as it is, to the last bit.
    return (exact if (low, span) == (0, 1) else ((exact - low) / span).clamp(0, 1)).float()


def _range(low: float, high: float, *, integer: bool) -> tuple[float, float]:
    """Return what is black, and how far above it white is, of values from ``low`` to ``high``."""
    if not np.isfinite(low) or not np.isfinite(high):
        raise ValueError("NaN or infinite values")
    least = 255 if integer else 1
    if low >= 0 and high <= least:
        return 0, least
    if low == high:  # no range to tell bits from: integers of 16 bits, white floats, or black
        return (0, 65535 if integer else low) if 0 < low <= 65535 else (low, 1)
    white = 2 ** max(8, math.ceil(math.log2(high + 1))) - 1 if low >= 0 and high <= 65535 else 0
    return (0, white) if 4 * (high - low) >= white > 0 else (low, high - low)


def as_channels_last(array: np.ndarray) -> np.ndarray | None:
    """Return an array as (H, W), (H, W, 3) or (H, W, 4), None where it has another shape.

    A last side of 1, 3 or 4 counts as channels before a first side of 1 does.
    """
    if array.ndim == 3 and array.shape[2] == 1:
        return array[..., 0]
    if array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)):
        return array
    return array[0] if array.ndim == 3 and array.shape[0] == 1 else None


def as_channels_first(tensor: Tensor) -> Tensor | None:
    """Return a tensor as (3, H, W), None where it has another shape.

    A first side of 1 or 3 counts as channels before a last side of 1 does.
    """
    if tensor.ndim == 3 and tensor.shape[0] not in (1, 3) and tensor.shape[2] == 1:
        tensor = tensor[..., 0]
    if tensor.ndim == 2:
        tensor = tensor[None]
    return tensor.expand(3, -1, -1) if tensor.ndim == 3 and tensor.shape[0] in (1, 3) else None
