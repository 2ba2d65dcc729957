"""What every method gives to the localizer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from molt.structures import Features, WeightsInfo

Stage = Callable[[str], AbstractContextManager[None]]
"""Opens a named stage: time and memory spent inside are booked to it."""


@dataclass(frozen=True)
class Evidence:
    """Maps of a batch of images before fusion.

    Attributes:
        classes: (B, C) int64, best first; -1 is the class-agnostic 'object'.
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


class Method(Protocol):
    """A localization method: networks and the way from their Features to maps."""

    threshold: float
    class_names: tuple[str, ...]

    @property
    def size(self) -> int:
        """Side in pixels of the square images the method wants."""

    @property
    def weights(self) -> tuple[WeightsInfo, ...]:
        """Where the weights of each network came from."""

    def __call__(self, images: Tensor, classes: Tensor | None, k: int, stage: Stage) -> Evidence:
        """Return Evidence of (B, 3, size, size) RGB images in [0, 1].

        Args:
            classes: (B, C) int64 wanted classes, -1 for class-agnostic; None takes the ``k`` likeliest.
        """
