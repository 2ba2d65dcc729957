"""One map out of several scales."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from molt.ops import reference
from molt.ops._checks import check_maps, check_order, check_size


def fuse_maps(
    maps: Sequence[Tensor],
    size: Sequence[int],
    weights: Sequence[float] | None = None,
    *,
    order: str = "resize_first",
) -> Tensor:
    """Upsample, min-max normalise and add up the maps of several scales (MOLT, section II.A; weights: our choice).

    Args:
        maps: one (B, C, h, w) tensor a scale; B, C, dtype and device agree, h and w may differ.
        size: (H, W) in pixels of the result.
        weights: one non-negative number a scale, scaled here to sum to 1; None weighs all alike.
        order: of resize and min-max, see :func:`upsample_normalize`.

    Returns:
        (B, C, H, W), the weighted sum of each scale's :func:`upsample_normalize`; not normalised again.

    Raises:
        TypeError, ValueError: no maps; maps that disagree; weights of another count, negative, not finite or all zero;
            another order.
    """
    if not isinstance(maps, list | tuple) or not maps:
        got = "none" if isinstance(maps, list | tuple) else type(maps).__name__
        raise ValueError(f"maps: got {got}, expected a list of (B, C, h, w) tensors, one a scale")
    for i, scale in enumerate(maps):
        check_maps(scale, f"maps[{i}]")
        for what in ("dtype", "device"):
            if getattr(scale, what) != getattr(maps[0], what):
                raise ValueError(
                    f"maps[{i}]: got {what} {getattr(scale, what)}, expected {getattr(maps[0], what)} as maps[0] has"
                )
        if scale.shape[:2] != maps[0].shape[:2]:
            raise ValueError(f"maps[{i}]: got (B, C) = {tuple(scale.shape[:2])}, expected {tuple(maps[0].shape[:2])}")
    shares = [1.0] * len(maps) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(maps):
        raise ValueError(f"weights: got {len(shares)} numbers, expected one a scale ({len(maps)})")
    total = sum(shares)
    if not all(math.isfinite(share) and share >= 0 for share in shares) or total == 0:
        raise ValueError(f"weights: got {shares}, expected finite numbers, not negative and not all zero")
    return reference.fuse_maps(list(maps), check_size(size), [share / total for share in shares], check_order(order))
