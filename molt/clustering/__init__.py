"""From images or Features to integer label maps.

A clusterer is called ``labels, counts = clusterer(x, size)``: x images (B, 3, H, W) RGB float in [0, 1], or Features;
labels (B, H, W) int32 in 0..count-1, counts (B,) int64. An attribute ``num_clusters``, where it has one, is above every
label: it spares a GPU from reading counts back.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from molt.clustering.cache import CachedClusterer
from molt.clustering.deep import PRESETS, DeepClustering
from molt.clustering.fitting import Fit, fit
from molt.clustering.kmeans import TokenKMeans
from molt.clustering.slic import Slic

Clusterer = Callable[..., tuple[Tensor, Tensor]]


def wants_features(clusterer: Any) -> bool:
    """Return whether a clusterer is better shown Features than pixels, where both are at hand.

    Its attribute ``takes_features`` says so; a callable without one gets Features.
    """
    return bool(getattr(clusterer, "takes_features", True))


__all__ = [
    "PRESETS",
    "CachedClusterer",
    "Clusterer",
    "DeepClustering",
    "Fit",
    "Slic",
    "TokenKMeans",
    "fit",
    "wants_features",
]
