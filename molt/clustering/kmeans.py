"""Batched k-means on patch tokens, or on colour and position where there are no tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from molt._arguments import LARGEST_SEED, check_int, check_number
from molt.clustering._labels import compact, in_chunks, nearest, prepare, shrink
from molt.structures import Features


class TokenKMeans:
    """k-means over each image's vectors.

    Features are clustered by the cosine between patch vectors; images by squared distance in colour and position, on
    a copy at most ``working_size`` pixels a side. Centres are chosen by k-means++ from a seeded draw that is the same
    for every image, and images are worked on one at a time (on a GPU 2 or 8), so a result does not depend on the batch
    around it. Labels are decided at the output's own pixels: the similarity to each centre is upsampled bilinearly and
    the nearest centre taken (our choice: smoother outlines than repeating each patch's label).

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
        TypeError, ValueError: an argument of another type or out of range.
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
        self.num_clusters = check_int("num_clusters", num_clusters, 1, 256)
        self.restarts = check_int("restarts", restarts, 1)
        self.iterations = check_int("iterations", iterations, 1)
        self.position = check_number("position", position)
        self.working_size = check_int("working_size", working_size, 1)
        self.seed = check_int("seed", seed, 0, LARGEST_SEED)

    def __call__(self, x: Tensor | Features, size: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return labels (B, H, W) int32 in 0..count-1 and counts (B,) int64 of the clusters that occur.

        Args:
            x: images (B, 3, H, W) RGB float in [0, 1], or Features.
            size: (H, W) of the labels; by default the images' own.

        Raises:
            TypeError, ValueError: images of another type or shape, or on the CPU with NaN or infinite values.
        """
        values, target = prepare(x, size)

        def run(chunk: Tensor) -> tuple[Tensor, Tensor]:
            affinity = self._from_features(chunk) if isinstance(x, Features) else self._from_images(chunk)
            return compact(nearest(affinity, target), self.num_clusters)

        return in_chunks(run, values, target)

    def _from_features(self, directions: Tensor) -> Tensor:
        """Return the similarity (B, k, h, w) of unit vectors (B, D, h, w) to each centre."""
        vectors = directions.flatten(2).transpose(1, 2)
        centres = self._fit(vectors, cosine=True)
        return (centres @ directions.flatten(2)).view(len(centres), -1, *directions.shape[2:])

    def _from_images(self, images: Tensor) -> Tensor:
        """Return the negative squared distance (B, k, h, w) in colour and position to each centre."""
        pixels = shrink(images, self.working_size)
        height, width = pixels.shape[2:]
        rows = (torch.arange(height, device=images.device) + 0.5) / height
        columns = (torch.arange(width, device=images.device) + 0.5) / width
        place = torch.stack(torch.meshgrid(rows, columns, indexing="ij")) * self.position
        vectors = torch.cat([pixels, place.expand(len(pixels), -1, -1, -1)], 1).flatten(2).transpose(1, 2)
        centres = self._fit(vectors, cosine=False)
        return -torch.cdist(centres, vectors).square().view(len(pixels), -1, height, width)

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
