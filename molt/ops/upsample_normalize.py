"""Resize maps and stretch each to [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from molt.ops import reference
from molt.ops._checks import check_maps, check_order, check_size


def upsample_normalize(maps: Tensor, size: Sequence[int], *, order: str = "resize_first") -> Tensor:
    """Resize maps bilinearly and min-max normalise each.

    Half-pixel centres (``align_corners=False``), no antialiasing, no epsilon. Differentiable in ``maps``.

    Args:
        maps: (B, C, h, w) float16, bfloat16, float32 or float64.
        size: (H, W) in pixels.
        order: ``"resize_first"``, then min-max, as TS-CAM and wsolevaluation do, so that the result spans [0, 1]; or
            ``"normalize_first"``, as SAT does, where upsampling can miss the extremes.

    Returns:
        (B, C, H, W) of the same dtype, in [0, 1]. A constant map gives zeros; NaN or infinite values make their own
        map NaN.

    Raises:
        TypeError, ValueError: maps of another type or shape, or with no pixel; a size that is no pair of positive
            integers; another order.
    """
    check_maps(maps)
    return reference.upsample_normalize(maps, check_size(size), check_order(order))
