"""The operators in plain PyTorch: batched, no loop over images. Arguments come checked from the public functions."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from molt.ops._checks import check_labels
from molt.ops._slic_reference import slic
from molt.ops._sweep_reference import largest_at_cuts, sweep_boxes

__all__ = [
    "cluster_mean",
    "cluster_refine",
    "cluster_vote",
    "component_boxes",
    "fuse_and_refine",
    "fuse_maps",
    "kmeans",
    "largest_at_cuts",
    "largest_box",
    "slic",
    "sweep_boxes",
    "upsample_normalize",
]


def cluster_mean(values: Tensor, labels: Tensor, num_clusters: int, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Per-cluster means (B, C, num_clusters) and counts (B, num_clusters); the twin of `molt.ops.cluster_mean`."""
    batch, channels = values.shape[:2]
    on_cpu = values.device.type == "cpu"
    compiling = torch.compiler.is_compiling()
    if on_cpu and not compiling:
        check_labels(labels, num_clusters, counts)
    wide = _wide(values).flatten(2)
    index = labels.flatten(1).long()
    limits = num_clusters if counts is None else counts.to(values.device).view(batch, 1)
    inside = (index >= 0) & (index < limits)
    if on_cpu and compiling:
        torch._assert_async(inside.all(), "labels: expected values in [0, num_clusters)")
    # One more cluster takes what is out of range.
    index = torch.where(inside, index, num_clusters)
    spread = index[:, None].expand(batch, channels, index.shape[1])
    sums = wide.new_zeros(batch, channels, num_clusters + 1).scatter_add(2, spread, wide)[..., :num_clusters]
    members = torch.zeros(batch, num_clusters + 1, dtype=torch.int64, device=values.device)
    members = members.scatter_add_(1, index, torch.ones_like(index))[:, :num_clusters]
    return sums / members.clamp(min=1)[:, None], members


def cluster_refine(maps: Tensor, labels: Tensor, alpha: float, num_clusters: int, counts: Tensor | None) -> Tensor:
    """Blend each map with its mean over the pixel's cluster; the twin of `molt.ops.cluster_refine`.

    Args:
        maps: (B, C, H, W) floats.
        labels: (B, H, W) integers.
        alpha: share of the mean.
        num_clusters: number of clusters, -1 to take it from the labels.
        counts: (B,) int64, the number of each image, or None.

    On the CPU a label out of range raises; elsewhere, where reading labels back would stall the device, its pixel
    joins no mean and keeps its value.
    """
    if maps.numel() == 0:
        return maps.clone(memory_format=torch.contiguous_format)
    batch, channels, height, width = maps.shape
    pixels = height * width
    index = labels.reshape(batch, 1, pixels).long()
    on_cpu = maps.device.type == "cpu"
    if on_cpu and not torch.compiler.is_compiling():
        check_labels(labels, num_clusters, counts)
    size = num_clusters if counts is None else int(counts.max())
    if size < 0:
        size = int(labels.max()) + 1
    inside = None
    if not on_cpu or torch.compiler.is_compiling():
        limits = size if counts is None else counts.to(maps.device).view(batch, 1, 1)
        inside = (index >= 0) & (index < limits)
        if on_cpu:
            torch._assert_async(inside.all(), "labels: expected values in [0, num_clusters)")
            inside = None
        else:
            index = torch.where(inside, index, size)
            size += 1
    if alpha == 0:
        return maps.clone(memory_format=torch.contiguous_format)

    accumulate = torch.float64 if maps.dtype == torch.float64 else torch.float32
    values = maps.reshape(batch, channels, pixels).to(accumulate)
    spread = index.expand(batch, channels, pixels)
    sums = values.new_zeros(batch, channels, size).scatter_add(2, spread, values)
    ones = torch.ones((), dtype=torch.int64, device=maps.device).expand(batch, 1, pixels)
    members = torch.zeros(batch, 1, size, dtype=torch.int64, device=maps.device).scatter_add_(2, index, ones)
    painted = (sums / members.clamp(min=1)).gather(2, spread)
    out = painted if alpha == 1 else (1 - alpha) * values + alpha * painted
    if inside is not None:
        out = torch.where(inside, out, values)
    return out.to(maps.dtype).contiguous().view(batch, channels, height, width)


def cluster_vote(labels: Tensor, segments: Tensor, num_clusters: int, num_segments: int) -> Tensor:
    """Majority label of each segment, the lowest of equals; -1 takes a limit from the values.

    On the CPU values come checked, or in a compiled graph raise here; elsewhere a pixel that has one out of range has
    no vote and keeps its label.
    """
    batch = len(labels)
    clusters = num_clusters if num_clusters >= 0 else int(labels.max()) + 1
    limit = num_segments if num_segments >= 0 else int(segments.max()) + 1
    where, label = segments.reshape(batch, -1).long(), labels.reshape(batch, -1).long()
    cell = where * clusters + label
    inside = None
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        inside = (label >= 0) & (label < clusters) & (where >= 0) & (where < limit)
        if labels.device.type == "cpu":
            torch._assert_async(inside.all(), "labels, segments: expected values in [0, limit)")
        # One more cell takes the votes that do not count.
        cell, where = torch.where(inside, cell, limit * clusters), torch.where(inside, where, 0)
    votes = torch.zeros(batch, limit * clusters + 1, dtype=torch.int32, device=labels.device)
    ones = torch.ones((), dtype=torch.int32, device=labels.device).expand_as(label)
    votes.scatter_add_(1, cell, ones)
    if limit * clusters == 0:
        return labels.clone(memory_format=torch.contiguous_format)
    winner = votes[:, :-1].unflatten(1, (limit, clusters)).argmax(-1).gather(1, where)
    kept = winner if inside is None else torch.where(inside, winner, label)
    return kept.view(labels.shape).to(labels.dtype)


def upsample_normalize(maps: Tensor, size: tuple[int, int], order: str = "resize_first") -> Tensor:
    """Bilinear resize, then per-map min-max without epsilon; a constant map gives zeros. See the public operator."""
    if maps.numel() == 0:
        return maps[:, :, :1, :1].expand(-1, -1, *size).contiguous()
    if order == "normalize_first":
        small = upsample_normalize(_wide(maps), (maps.shape[2], maps.shape[3]))
        return F.interpolate(small, size, mode="bilinear", align_corners=False).to(maps.dtype)
    resized = F.interpolate(_wide(maps), size, mode="bilinear", align_corners=False)
    low, high = resized.amin((2, 3), keepdim=True), resized.amax((2, 3), keepdim=True)
    # Interpolating equal values can round them apart, so constancy is read off the input too.
    constant = (maps == maps[:, :, :1, :1]).flatten(2).all(-1)[..., None, None] | (high == low)
    # Not every value of a map is sampled when it shrinks, so NaN and infinity are read off the input too.
    sound = maps.isfinite().flatten(2).all(-1)[..., None, None] & (high - low).isfinite()
    # A range of infinity gives zeros and one of NaN NaN, without another pass over the large map.
    span = torch.where(sound, torch.where(constant, torch.inf, high - low), torch.nan)
    return ((resized - low) / span).to(maps.dtype)


def fuse_maps(maps: list[Tensor], size: tuple[int, int], weights: list[float], order: str = "resize_first") -> Tensor:
    """Weighted sum over scales of :func:`upsample_normalize`, added in the order given."""
    total = torch.zeros((*maps[0].shape[:2], *size), dtype=_wide(maps[0]).dtype, device=maps[0].device)
    for scale, weight in zip(maps, weights, strict=True):
        total += weight * upsample_normalize(_wide(scale), size, order)
    return total.to(maps[0].dtype)


def fuse_and_refine(
    maps: list[Tensor],
    labels: Tensor,
    weights: list[float],
    alpha: float,
    num_clusters: int,
    counts: Tensor | None,
) -> Tensor:
    """:func:`fuse_maps` at the labels' size, then :func:`cluster_refine`."""
    fused = fuse_maps([_wide(scale) for scale in maps], (labels.shape[1], labels.shape[2]), weights)
    return cluster_refine(fused, labels, alpha, num_clusters, counts).to(maps[0].dtype)


def kmeans(vectors: Tensor, starts: Tensor, iterations: int, cosine: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's algorithm from given starts; the twin of the native operator behind `molt.ops.kmeans`."""
    vectors = _wide(vectors)
    batch, restarts, clusters, _ = starts.shape
    shape = (batch, vectors.shape[1], restarts, clusters)
    centres = starts.flatten(1, 2)

    def affinity() -> Tensor:
        return (2 * vectors @ centres.transpose(1, 2) - centres.square().sum(-1)[:, None]).view(shape)

    before = None
    for _ in range(iterations):
        labels = affinity().argmax(-1)
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
    best, labels = affinity().max(-1)
    return labels.transpose(1, 2).int().contiguous(), centres.view(starts.shape), best.sum(1)


def component_boxes(
    maps: Tensor, threshold: float, connectivity: int, largest: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Components map by map with SciPy on the CPU. See the public operator."""
    structure = np.ones((3, 3)) if connectivity == 8 else None
    rows: list[tuple[float, ...]] = []
    for image, channels in enumerate(maps.detach().double().cpu().numpy()):
        for channel, values in enumerate(channels):
            # NaN compares false everywhere, so a map that holds one has no components.
            peak = values.max(initial=0.0)
            labels, count = ndimage.label((values >= threshold * peak) & (values > 0), structure)
            if count == 0:
                continue
            index = np.arange(1, count + 1)
            area = np.bincount(labels.ravel(), minlength=count + 1)[1:]
            mean = np.asarray(ndimage.mean(values, labels, index))
            order = np.argsort(-area, kind="stable")[: 1 if largest else None]
            slices = ndimage.find_objects(labels)
            for i in order:
                y, x = slices[i]
                rows.append((x.start, y.start, x.stop, y.stop, area[i], mean[i], image, channel))
    table = torch.tensor(rows, dtype=torch.float64).view(-1, 8).to(maps.device)
    return (
        table[:, :4].float(),
        table[:, 4].long(),
        table[:, 5].float(),
        table[:, 6].long(),
        table[:, 7].long(),
    )


def largest_box(maps: Tensor, threshold: float, connectivity: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest component of each map, zeros where there is none."""
    boxes, area, mean, image, channel = component_boxes(maps, threshold, connectivity, True)
    shape = maps.shape[:2]
    found = (image, channel)
    return (
        boxes.new_zeros(*shape, 4).index_put_(found, boxes),
        area.new_zeros(shape).index_put_(found, area),
        mean.new_zeros(shape).index_put_(found, mean),
    )


def _wide(maps: Tensor) -> Tensor:
    return maps if maps.dtype == torch.float64 else maps.float()
