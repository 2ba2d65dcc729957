"""Stand-in on the plain twin."""

from __future__ import annotations

from torch import Tensor

from molt.ops import _sweep_reference


def largest_at_cuts(levels: Tensor, *, contours: bool = False, connectivity: int = 8) -> tuple[Tensor, Tensor]:
    """Return the largest component at every cut."""
    return _sweep_reference.largest_at_cuts(levels, contours, connectivity)
