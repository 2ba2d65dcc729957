"""Batched k-means on patch tokens, or on colour and position where there are no tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from molt._arguments import LARGEST_SEED, check_int, check_number
from molt.clustering._labels import compact, in_chunks, nearest, prepare, shrink
from molt.ops.kmeans import lloyd, spread_starts
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
        centres = self._fit(directions.flatten(2).transpose(1, 2), cosine=True)
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
        starts = spread_starts(vectors, self.num_clusters, self.restarts, self.seed)
        _, centres, score = lloyd(vectors, starts, self.iterations, cosine=cosine)
        return centres[torch.arange(len(vectors), device=vectors.device), score.argmax(-1)]
