"""What every method gives to the localizer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from molt._auto_alpha import Alpha
from molt.classes import OBJECT
from molt.clustering import Clusterer
from molt.structures import Features, WeightsInfo

Stage = Callable[[str], AbstractContextManager[None]]
"""Opens a named stage: time and memory spent inside are booked to it."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """Maps of a batch of images before fusion.

    Attributes:
        classes: (B, C) int64, the likeliest first; -1 is the class-agnostic 'object'.
        probabilities: (B, C) float in [0, 1]; for 'object' the probability of the likeliest class.
        cam: (B, C, h, w) the class maps the rest grew from, not normalised.
        maps: one (B, C, h, w) a scale, not normalised.
        scales: (H, W) in pixels of each scale of ``maps``.
        features: Features of the finest scale, for the clusterer.
        attention: (B, 1, h, w) what the class token attends to at the finest scale, or None where it plays no part.
        all_probabilities: (B, num_classes) float in [0, 1], of every class, or None where it is not kept.
    """

    classes: Tensor
    probabilities: Tensor
    cam: Tensor
    maps: list[Tensor]
    scales: tuple[tuple[int, int], ...]
    features: Features
    attention: Tensor | None = None
    all_probabilities: Tensor | None = None


@dataclass(frozen=True)
class Captions:
    """What to say of the stages that differ from method to method.

    Attributes:
        cam: title and sentence of the map the rest grew from.
        scale: title, where ``{side}`` stands for the scale's size, and sentence, where ``{size}`` does.
        fused: sentence of the fused map.
        clusters: sentence of the clusters, where ``{groups}`` stands for their number.
        lead: how the method works, in half a sentence.
    """

    cam: tuple[str, str]
    scale: tuple[str, str]
    fused: str
    clusters: str
    lead: str


class Method(nn.Module):
    """Base of the localization methods: networks, and the way from what they see to maps.

    A subclass is built as ``Method(weights, backbone=, checkpoint=, source=)`` and defines ``forward`` and
    ``clusterer``.

    Attributes:
        threshold: share of the refined map's maximum that a box encloses.
        alpha: weight of the cluster mean in the refined map, or ``"auto"``.
        class_names: names of the classes, in order.
        size: (H, W) in pixels of the images wanted.
        weights: where the weights of each network came from.
        captions: what a page says of its stages.
        scale_weights: one number a scale for fusing the maps, or None for equal ones.
        order: of resize and min-max in fusing, see :func:`molt.ops.fuse_maps`.
    """

    threshold: float
    alpha: Alpha
    class_names: tuple[str, ...]
    size: tuple[int, int]
    weights: tuple[WeightsInfo, ...]
    captions: Captions
    scale_weights: tuple[float, ...] | None = None
    order: str = "resize_first"

    def forward(self, images: Tensor, classes: Tensor | None, k: int, stage: Stage) -> Evidence:
        """Return Evidence of a batch.

        Args:
            images: (B, 3, H, W) RGB in [0, 1] at ``size``.
            classes: (B, C) int64 wanted classes, -1 for class-agnostic; None takes the ``k`` likeliest.
            k: number of classes where none are wanted, at least 1.
            stage: opens a named stage for the profile.
        """
        raise NotImplementedError

    def clusterer(self) -> Clusterer:
        """Return the clusterer this method refines with unless told otherwise."""
        raise NotImplementedError


def choose(probabilities: Tensor, classes: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Return (probabilities, classes), both (B, C), the likeliest first.

    Args:
        probabilities: (B, num_classes).
        classes: (B, C) wanted classes, for 'object', -1, the probability of the likeliest class; None takes the
            ``k`` likeliest.
        k: number of classes where none are wanted.
    """
    if classes is None:
        scores, chosen = probabilities.topk(k, -1)
        return scores, chosen
    known = probabilities.gather(1, classes.clamp_min(0))
    scores = torch.where(classes == OBJECT, probabilities.amax(-1, keepdim=True), known)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return scores.gather(1, order), classes.gather(1, order)
