"""What every method gives to the localizer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import Tensor, nn

from molt.structures import Features, WeightsInfo

Stage = Callable[[str], AbstractContextManager[None]]
"""Opens a named stage: time and memory spent inside are booked to it."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """Maps of a batch of images before fusion.

    Attributes:
        classes: (B, C) int64, the likeliest first; -1 is the class-agnostic 'object'.
        probabilities: (B, C) float in [0, 1]; for 'object' the probability of the likeliest class.
        cam: (B, C, h, w) the class activation maps the rest grew from, not normalised.
        maps: one (B, C, h, w) a scale, not normalised.
        scales: the side in pixels of each entry of ``maps``.
        features: Features of the finest scale, for the clusterer.
    """

    classes: Tensor
    probabilities: Tensor
    cam: Tensor
    maps: list[Tensor]
    scales: tuple[int, ...]
    features: Features


class Method(nn.Module):
    """Base of the localization methods: networks, and the way from what they see to maps.

    A subclass is built as ``Method(weights, backbone=, checkpoint=, source=)`` and defines ``forward``.

    Attributes:
        threshold: share of the refined map's maximum that a box encloses.
        alpha: weight of the cluster mean in the refined map.
        class_names: names of the classes, in order.
        size: side in pixels of the square images wanted.
        weights: where the weights of each network came from.
    """

    threshold: float
    alpha: float
    class_names: tuple[str, ...]
    size: int
    weights: tuple[WeightsInfo, ...]

    def forward(self, images: Tensor, classes: Tensor | None, k: int, stage: Stage) -> Evidence:
        """Return Evidence of a batch.

        Args:
            images: (B, 3, size, size) RGB in [0, 1].
            classes: (B, C) int64 wanted classes, -1 for class-agnostic; None takes the ``k`` likeliest.
            k: number of classes where none are wanted, at least 1.
            stage: opens a named stage for the profile.
        """
        raise NotImplementedError
