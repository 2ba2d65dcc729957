"""How far boxes overlap."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Overlap(NamedTuple):
    """Shares of the area that boxes and true boxes have in common, each in [0, 1], of m and n boxes (m, n).

    Attributes:
        iou: of their union.
        of_truth: of the true box ("IoG").
        of_box: of the box ("IoB").
    """

    iou: Floats
    of_truth: Floats
    of_box: Floats


def overlap(boxes: Floats, truth: Floats, *, plus_one: bool) -> Overlap:
    """Compare boxes (m, 4) with true boxes (n, 4), all xyxy; ``plus_one`` counts widths as x1 - x0 + 1.

    A share of nothing is 0.
    """
    return overlap_pairs(boxes[:, None], truth[None], plus_one=plus_one)


def overlap_pairs(a: Floats, b: Floats, *, plus_one: bool) -> Overlap:
    """Compare boxes ``a`` (..., 4) with true boxes ``b`` (..., 4), each with its own as NumPy broadcasts."""
    extra = 1.0 if plus_one else 0.0
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + extra
    common = np.prod(np.maximum(sides, 0), axis=-1)
    area_a = np.prod(a[..., 2:] - a[..., :2] + extra, axis=-1)
    area_b = np.prod(b[..., 2:] - b[..., :2] + extra, axis=-1)
    return Overlap(
        _share(common, area_a + area_b - common),
        _share(common, area_b + 0 * area_a),
        _share(common, area_a + 0 * area_b),
    )


def clipped(boxes: Floats, width: int, height: int) -> Floats:
    """Return boxes (..., 4) whose x1 and y1 are at most the last pixel's, as wsolevaluation has them."""
    out = boxes.copy()
    out[..., 2:] = np.minimum(out[..., 2:], [width - 1, height - 1])
    return out


def _share(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
