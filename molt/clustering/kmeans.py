"""Batched k-means on patch tokens, or on colour and position where there are no tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from molt.backbones.preprocess import check_images
from molt.structures import Features


class TokenKMeans:
    """k-means over one image's vectors at a time, all images of a batch at once.

    Features are clustered by the cosine between patch vectors; images by squared distance in colour and position, on
    a copy at most ``working_size`` pixels a side. Centres are chosen by k-means++ from a seeded draw that is the same
    for every image, so a result does not depend on the batch around it. Labels are decided at the output's own
    pixels: the similarity to each centre is upsampled bilinearly and the nearest centre taken (our choice: smoother
    outlines than repeating each patch's label).

    Args:
        num_clusters: clusters an image, 1 to 256; fewer remain where an image has fewer distinct vectors.
        restarts: independent starts, at least 1; the one that explains the vectors best is kept, which makes the
            result depend less on the seed.
        iterations: Lloyd steps, at least 1.
        position: weight of position against colour for images; 1.0 makes crossing the image count as much as black
            to white in one channel.
        working_size: longest side in pixels at which images are clustered.
        seed: integer seed of the draw.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        num_clusters: int = 5,
        *,
        restarts: int = 1,
        iterations: int = 20,
        position: float = 1.0,
        working_size: int = 112,
        seed: int = 0,
    ) -> None:
        if not 1 <= num_clusters <= 256:
            raise ValueError(f"num_clusters must be in 1..256, got {num_clusters}")
        if restarts < 1:
            raise ValueError(f"restarts must be at least 1, got {restarts}")
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations}")
        if position < 0:
            raise ValueError(f"position must not be negative, got {position}")
        if working_size < 1:
            raise ValueError(f"working_size must be at least 1, got {working_size}")
        self.num_clusters = num_clusters
        self.restarts = restarts
        self.iterations = iterations
        self.position = position
        self.working_size = working_size
        self.seed = seed

    def __call__(self, x: Tensor | Features, size: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return labels (B, H, W) int32 in 0..count-1 and counts (B,) int64 of the clusters that occur.

        Args:
            x: images (B, 3, H, W) RGB float in [0, 1], or Features.
            size: (H, W) of the labels; by default the images' own.

        Raises:
            TypeError, ValueError: images of another type or shape.
        """
        if isinstance(x, Features):
            height, width = x.image_size if size is None else size
            return self._from_features(x, (int(height), int(width)))
        check_images(x)
        height, width = x.shape[2:] if size is None else size
        return self._from_images(x, (int(height), int(width)))

    def _from_features(self, features: Features, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        vectors = F.normalize(features.patches.float(), dim=-1)
        centres = self._fit(vectors, cosine=True)
        affinity = (vectors @ centres.transpose(1, 2)).transpose(1, 2).unflatten(2, features.grid)
        return _compact(_nearest(_upsample(affinity, size)), self.num_clusters)

    def _from_images(self, images: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        shrink = min(1.0, self.working_size / max(images.shape[2:]))
        small = [max(1, round(side * shrink)) for side in images.shape[2:]]
        pixels = images.float()
        if small != list(images.shape[2:]):
            pixels = F.interpolate(pixels, small, mode="bilinear", align_corners=False, antialias=True)
        rows = (torch.arange(small[0], device=images.device) + 0.5) / small[0]
        columns = (torch.arange(small[1], device=images.device) + 0.5) / small[1]
        place = torch.stack(torch.meshgrid(rows, columns, indexing="ij")) * self.position
        vectors = torch.cat([pixels, place.expand(len(pixels), -1, -1, -1)], 1).flatten(2).transpose(1, 2)
        centres = self._fit(vectors, cosine=False)
        affinity = -torch.cdist(vectors, centres).square().transpose(1, 2).unflatten(2, small)
        return _compact(_nearest(_upsample(affinity, size)), self.num_clusters)

    def _fit(self, vectors: Tensor, *, cosine: bool) -> Tensor:
        """Return centres (B, k, D) of vectors (B, N, D): of all restarts, those with the least squared distance."""
        batch, number, dim = vectors.shape
        centres = self._choose(vectors).flatten(1, 2)
        shape = (batch, number, self.restarts, self.num_clusters)
        before = None
        for _ in range(self.iterations):
            labels = _affinity(vectors, centres).view(shape).argmax(-1)
            # A fixed point stays one, so stopping changes nothing; on a GPU asking would cost more than going on.
            if vectors.device.type == "cpu" and before is not None and torch.equal(labels, before):
                break
            before = labels
            member = vectors.new_zeros(shape).scatter_(-1, labels[..., None], 1).flatten(2)
            count = member.sum(1)[..., None]
            means = member.transpose(1, 2) @ vectors / count.clamp_min(1)
            if cosine:
                means = F.normalize(means, dim=-1)
            centres = torch.where(count > 0, means, centres)
        fit = _affinity(vectors, centres).view(shape).amax(-1).sum(1)
        best = fit.argmax(-1)
        return centres.view(batch, self.restarts, self.num_clusters, dim)[torch.arange(batch), best]

    def _choose(self, vectors: Tensor) -> Tensor:
        """k-means++, (B, restarts, k, D): a next centre's probability is proportional to its squared distance."""
        batch, number, _ = vectors.shape
        generator = torch.Generator().manual_seed(self.seed)
        draws = torch.rand(self.num_clusters, self.restarts, generator=generator, dtype=torch.float64)
        draws = draws.to(vectors.device)
        image = torch.arange(batch, device=vectors.device)[:, None]
        pick = (draws[0] * number).long().clamp_max(number - 1).expand(batch, -1)
        chosen = [vectors[image, pick]]
        distance = _distance(vectors, chosen[0])
        for draw in draws[1:]:
            total = distance.double().cumsum(1).transpose(1, 2).contiguous()
            pick = torch.searchsorted(total, draw[:, None] * total[..., -1:])[..., 0].clamp_max(number - 1)
            chosen.append(vectors[image, pick])
            distance = torch.minimum(distance, _distance(vectors, chosen[-1]))
        return torch.stack(chosen, 2)


def _affinity(vectors: Tensor, centres: Tensor) -> Tensor:
    """(B, N, k): the squared length of each vector less its squared distance to each centre."""
    return 2 * vectors @ centres.transpose(1, 2) - centres.square().sum(-1)[:, None]


def _distance(vectors: Tensor, centres: Tensor) -> Tensor:
    """Squared distance (B, N, k), clipped at 0."""
    cross = vectors @ centres.transpose(1, 2)
    return (vectors.square().sum(-1, keepdim=True) - 2 * cross + centres.square().sum(-1)[:, None]).clamp_min(0)


def _upsample(affinity: Tensor, size: tuple[int, int]) -> Tensor:
    if affinity.shape[2:] == size:
        return affinity
    return F.interpolate(affinity, size, mode="bilinear", align_corners=False)


def _nearest(affinity: Tensor) -> Tensor:
    """Return the channel of the maximum, (B, H, W) int64, the first of equals; argmax over channels is slow."""
    best = affinity[:, 0]
    labels = torch.zeros_like(best, dtype=torch.int64)
    for channel in range(1, affinity.shape[1]):
        higher = affinity[:, channel] > best
        best = torch.where(higher, affinity[:, channel], best)
        labels.masked_fill_(higher, channel)
    return labels


def _compact(labels: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Renumber labels so that each image's clusters are 0..count-1."""
    flat = labels.flatten(1)
    present = torch.zeros(len(flat), num_clusters, dtype=torch.int64, device=labels.device)
    present.scatter_(1, flat, 1)
    renumbered = (present.cumsum(1) - 1).gather(1, flat).view_as(labels)
    return renumbered.to(torch.int32), present.sum(1)
