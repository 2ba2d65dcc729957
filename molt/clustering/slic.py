"""SLIC superpixels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from molt import ops
from molt._arguments import check_int, check_number
from molt.clustering._labels import compact, prepare, repeat, shrink
from molt.structures import Features

CIELAB_UNITS = 2 / 100  # a unit of CIELAB, in distances between unit vectors


class Slic:
    """Superpixels: k-means in colour and position, with connected clusters (Achanta et al., PAMI 2012).

    Runs on the CPU, whatever the device of the images (`molt.ops.slic`). There is nothing random in it. A photo's
    contrast does not matter: its values are stretched to [0, 1] first.

    Args:
        num_segments: superpixels wanted, at least 1; SLIC comes near, with fewer where they do not fit.
        compactness: weight of position against colour, above 0: higher makes squarer superpixels. For Features a
            distance of 2, opposite directions, counts as much as 100 in CIELAB, black to white.
        working_size: longest side in pixels at which images are clustered, at least 1; None takes their own size.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.
    """

    takes_features = False  # it takes them, but was made for pixels

    def __init__(self, num_segments: int = 100, *, compactness: float = 10.0, working_size: int | None = 448) -> None:
        self.num_segments = check_int("num_segments", num_segments, 1)
        self.compactness = check_number("compactness", compactness, above=0)
        self.working_size = None if working_size is None else check_int("working_size", working_size, 1)

    def __call__(self, x: Tensor | Features, size: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return labels (B, H, W) int32 in 0..count-1 and counts (B,) int64.

        Args:
            x: images (B, 3, H, W) RGB float in [0, 1], compared in CIELAB; or Features, whose patch directions are
                compared on their own grid.
            size: (H, W) of the labels; by default the images' own.

        Raises:
            TypeError, ValueError: images of another type or shape, or with NaN or infinite values.
        """
        values, target = prepare(x, size)
        lab = not isinstance(x, Features)
        labels = segment(
            shrink(values, self.working_size) if lab else values, self.num_segments, self.compactness, lab=lab
        )
        return compact(repeat(labels, target), int(labels.max()) + 1 if labels.numel() else 0)


def segment(images: Tensor, num_segments: int, compactness: float, *, lab: bool = True) -> Tensor:
    """Return SLIC labels (B, H, W) int64 from 0 of images (B, D, H, W), computed on the CPU.

    Args:
        images: finite floats.
        num_segments: superpixels wanted.
        compactness: weight of position against the channels' distance.
        lab: True takes them for RGB in [0, 1] and compares them in CIELAB.
    """
    weight = compactness if lab else compactness * CIELAB_UNITS
    return ops.slic(images, num_segments, weight, lab=lab).labels.long()
