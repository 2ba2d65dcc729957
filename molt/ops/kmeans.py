"""Batched k-means for few clusters of many-dimensional vectors."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from molt._arguments import LARGEST_SEED, check_int
from molt._backend import Backend, use_native
from molt.ops import reference
from molt.ops._checks import FLOATS, check_tensor
from molt.ops._native import call, register

METRICS = ("cosine", "l2")
MAX_CLUSTERS = 256
MAX_ON_GPU = 32
FIXED = 2.0**31  # a share of at most 1 times it, added up over 2^31 points, fits 64 bits


class KMeans(NamedTuple):
    """Clusters of a batch of vectors: labels (B, N) int32, and centres (B, k, D) float32 (float64 for float64)."""

    labels: Tensor
    centres: Tensor


def kmeans(
    features: Tensor,
    num_clusters: int,
    *,
    metric: str = "cosine",
    iterations: int = 20,
    restarts: int = 1,
    seed: int = 0,
    centres: Tensor | None = None,
    backend: Backend | None = None,
) -> KMeans:
    """Cluster each image's vectors by Lloyd's algorithm from k-means++ starts.

    The starts come from a seeded draw that is the same for every image, so a result does not depend on the batch.

    Args:
        features: (B, N, D) float16, bfloat16, float32 or float64, finite; computed in float32, or float64.
        num_clusters: 1 to 256.
        metric: ``"cosine"``, where vectors are scaled to unit length first and so are the centres, or ``"l2"``.
        iterations: rounds of assigning and averaging, at least 0.
        restarts: independent starts; the one that explains the vectors best is kept.
        seed: of the draw.
        centres: (B, k, D) to start from instead, k being num_clusters; restarts must then be 1.
        backend: ``"auto"``, ``"reference"`` or ``"native"``; None for the one in force (`molt.backend`). On a GPU the
            native form is for up to 32 clusters and not for float64.

    Returns:
        Labels, of equally near centres the first; and centres. A cluster that loses its last point keeps its centre.
        NaN or infinite features leave their image's centres NaN; labels stay in range.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range.
        RuntimeError: backend ``"native"`` where there is none.
    """
    check_tensor("features", features, FLOATS, "(B, N, D)")
    if features.shape[1] == 0:
        raise ValueError(f"features: got shape {tuple(features.shape)}, expected at least one vector an image")
    num_clusters = check_int("num_clusters", num_clusters, 1, MAX_CLUSTERS)
    iterations = check_int("iterations", iterations, 0)
    restarts = check_int("restarts", restarts, 1)
    seed = check_int("seed", seed, 0, LARGEST_SEED)
    if metric not in METRICS:
        raise ValueError(f"metric: got {metric!r}, expected {' or '.join(map(repr, METRICS))}")
    if centres is not None:
        check_tensor("centres", centres, FLOATS, "(B, k, D)")
        expected = (features.shape[0], num_clusters, features.shape[2])
        if tuple(centres.shape) != expected:
            raise ValueError(f"centres: got shape {tuple(centres.shape)}, expected {expected}")
        if centres.device != features.device:
            raise ValueError(f"centres: got a tensor on {centres.device}, expected {features.device}")
        if restarts != 1:
            raise ValueError(f"restarts: got {restarts}, expected 1 where centres are given")
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    cosine = metric == "cosine"
    vectors = F.normalize(features.detach().to(wide), dim=-1) if cosine else features.detach()
    starts = spread_starts(vectors, num_clusters, restarts, seed) if centres is None else centres.detach()[:, None]
    starts = starts.to(wide)
    if cosine and centres is not None:
        starts = F.normalize(starts, dim=-1)
    labels, found, score = lloyd(vectors, starts, iterations, cosine=cosine, backend=backend)
    image, best = torch.arange(len(features), device=features.device), score.argmax(1)
    return KMeans(labels[image, best], found[image, best])


def lloyd(
    vectors: Tensor, starts: Tensor, iterations: int, *, cosine: bool, backend: Backend | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run Lloyd's algorithm on vectors (B, N, D) from starts (B, R, k, D) float32, or float64 for float64 vectors.

    Returns labels (B, R, N) int32, centres like starts and score (B, R): the sum of 2 x.c - |c|^2 over the points.
    """
    without = None
    if vectors.device.type == "cuda":
        if vectors.dtype == torch.float64:
            without = "there is no native kernel for float64 vectors on cuda"
        elif starts.shape[2] > MAX_ON_GPU:
            without = f"the native kernel on cuda is for up to {MAX_ON_GPU} clusters, got {starts.shape[2]}"
    if use_native("kmeans", vectors.device, backend, without):
        labels, centres, score = call("kmeans", vectors, starts, iterations, cosine)
        return labels, centres, score
    return reference.kmeans(vectors, starts, iterations, cosine)


def spread_starts(vectors: Tensor, num_clusters: int, restarts: int, seed: int) -> Tensor:
    """Return k-means++ starts (B, restarts, k, D): a next one's probability is proportional to its squared distance."""
    batch, number, _ = vectors.shape
    wide = vectors if vectors.dtype == torch.float64 else vectors.float()
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(num_clusters, restarts, generator=generator, dtype=torch.float64).to(vectors.device)
    image = torch.arange(batch, device=vectors.device)[:, None]
    pick = (draws[0] * number).long().clamp_max(number - 1).expand(batch, -1)
    chosen = [wide[image, pick]]
    distance = _distance(wide, chosen[0])
    for draw in draws[1:]:
        pick = _draw(distance.double(), draw)
        chosen.append(wide[image, pick])
        distance = torch.minimum(distance, _distance(wide, chosen[-1]))
    return torch.stack(chosen, 2)


def _draw(distance: Tensor, draw: Tensor) -> Tensor:
    """Return the point (B, R) that a draw (R,) in [0, 1) falls on when each of distance (B, N, R) has its share.

    Added up in integers: sums of floating point on a GPU are in no fixed order, which PyTorch refuses where it is asked
    for determinism. The last point where a distance is NaN, else the first at infinity where there is one.
    """
    peak = distance.amax(1, keepdim=True)
    share = distance / torch.where(peak > 0, peak, 1.0)
    total = (share * FIXED).round().long().cumsum(1).double().transpose(1, 2).contiguous()
    last = distance.shape[1] - 1
    pick = torch.searchsorted(total, draw[:, None] * total[..., -1:])[..., 0].clamp_max(last)
    odd = torch.where(peak.isnan(), last, distance.argmax(1, keepdim=True))
    return torch.where(peak.isfinite()[:, 0], pick, odd[:, 0])


def _distance(vectors: Tensor, centres: Tensor) -> Tensor:
    """Squared distance (B, N, R), clipped at 0."""
    cross = vectors @ centres.transpose(1, 2)
    return (vectors.square().sum(-1, keepdim=True) - 2 * cross + centres.square().sum(-1)[:, None]).clamp_min(0)


def _fake(features: Tensor, centres: Tensor, iterations: int, cosine: bool) -> tuple[Tensor, Tensor, Tensor]:
    labels = features.new_empty((*centres.shape[:2], features.shape[1]), dtype=torch.int32)
    return labels, centres.new_empty(centres.shape), centres.new_empty(centres.shape[:2])


register("kmeans", _fake)
