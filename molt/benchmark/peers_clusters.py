"""What else computes cluster means, refinement and votes: PyTorch idioms, scatter packages, SciPy, the papers' loops.

All take the public operator's arguments. Sums are in float32 at least, as ours are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molt.benchmark.registry import NotRun, Provider, given

Array = NDArray[Any]
Mean = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
LOOPS = 32  # images that a literal loop is waited for


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _rows(labels: Tensor, number: int) -> Tensor:
    """(B * P,) labels made unique over images."""
    offsets = torch.arange(len(labels), device=labels.device)[:, None] * number
    return (labels.flatten(1).long() + offsets).flatten()


def scatter_add_mean(values: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """One scatter_add of the values along the pixels, one of ones."""
    batch, channels = values.shape[:2]
    index = labels.reshape(batch, 1, -1).long()
    source = _wide(values).reshape(batch, channels, -1)
    sums = source.new_zeros(batch, channels, number).scatter_add(2, index.expand_as(source), source)
    counts = source.new_zeros(batch, 1, number).scatter_add(2, index, torch.ones_like(index, dtype=source.dtype))
    return sums / counts.clamp(min=1), counts[:, 0].long()


def index_add_mean(values: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """One index_add of rows of channels, images told apart by offsets."""
    batch, channels = values.shape[:2]
    index = _rows(labels, number)
    rows = _wide(values).flatten(2).transpose(1, 2).reshape(-1, channels)
    sums = rows.new_zeros(batch * number, channels).index_add(0, index, rows)
    counts = torch.bincount(index, minlength=batch * number)
    means = sums / counts.clamp(min=1)[:, None]
    return means.view(batch, number, channels).transpose(1, 2), counts.view(batch, number)


def bincount_mean(values: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """One weighted bincount, images and channels told apart by offsets."""
    batch, channels = values.shape[:2]
    plain = _rows(labels, number)
    counts = torch.bincount(plain, minlength=batch * number).view(batch, 1, number)
    index = plain
    if channels > 1:
        offsets = torch.arange(batch * channels, device=labels.device).view(batch, channels, 1) * number
        index = (labels.reshape(batch, 1, -1).long() + offsets).flatten()
    sums = torch.bincount(index, _wide(values).flatten(), batch * channels * number)
    return sums.view(batch, channels, number) / counts.clamp(min=1), counts[:, 0]


def _package_mean(scatter_mean: Callable[..., Tensor]) -> Mean:
    def mean(values: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
        batch, channels = values.shape[:2]
        index = labels.reshape(batch, 1, -1).long()
        source = _wide(values).reshape(batch, channels, -1)
        means = scatter_mean(source, index.expand_as(source), dim=2, dim_size=number)
        counts = torch.bincount(_rows(labels, number), minlength=batch * number)
        return means, counts.view(batch, number)

    return mean


def _torch_scatter() -> Mean:
    from torch_scatter import scatter_mean

    return _package_mean(scatter_mean)


def _pyg_lib() -> Mean:
    import pyg_lib

    scatter_mean = getattr(pyg_lib.ops, "scatter_mean", None)
    if scatter_mean is None:
        raise NotRun("this pyg-lib has no scatter_mean")
    return _package_mean(scatter_mean)


def mask_loop_mean(values: Tensor, labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Image by image and cluster by cluster, the mean of the masked values."""
    means = _wide(values).new_zeros(*values.shape[:2], number)
    counts = torch.zeros(len(labels), number, dtype=torch.int64, device=labels.device)
    for image in range(len(labels)):
        for cluster in range(number):
            mask = labels[image] == cluster
            counts[image, cluster] = mask.sum()
            if counts[image, cluster] > 0:
                means[image, :, cluster] = _wide(values[image][:, mask]).mean(1)
    return means, counts


def scipy_mean(values: Array, labels: Array, number: int) -> tuple[Array, Array]:
    """SciPy's mean by label, map by map."""
    from scipy import ndimage

    wanted = np.arange(number)
    counts = np.stack([np.bincount(image.ravel(), minlength=number) for image in labels])
    means = np.zeros((*values.shape[:2], number))
    with np.errstate(invalid="ignore"):
        for b, c in np.ndindex(values.shape[:2]):
            means[b, c] = ndimage.mean(values[b, c], labels[b], wanted)
    return np.where(counts[:, None] > 0, means, 0), counts


def _refine(mean: Mean) -> Callable[..., Tensor]:
    """Refinement out of a way to take means: gather them back and blend."""

    def refine(maps: Tensor, labels: Tensor, alpha: float, number: int) -> Tensor:
        means = mean(maps, labels, number)[0]
        index = labels.reshape(len(labels), 1, -1).long().expand(-1, maps.shape[1], -1)
        painted = means.gather(2, index).view_as(maps)
        return ((1 - alpha) * _wide(maps) + alpha * painted).to(maps.dtype)

    return refine


def mask_loop_refine(maps: Tensor, labels: Tensor, alpha: float, number: int) -> Tensor:
    """Image by image and cluster by cluster, blend the masked values with their mean."""
    out = torch.empty_like(maps)
    for image in range(len(labels)):
        for cluster in range(number):
            mask = labels[image] == cluster
            if mask.any():
                inside = _wide(maps[image][:, mask])
                out[image][:, mask] = ((1 - alpha) * inside + alpha * inside.mean(1, keepdim=True)).to(maps.dtype)
    return out


def scipy_refine(maps: Array, labels: Array, alpha: float, number: int) -> Array:
    """SciPy's mean by label, painted back by indexing."""
    means, _ = scipy_mean(maps, labels, number)
    out = np.empty_like(maps)
    for b, c in np.ndindex(maps.shape[:2]):
        out[b, c] = (1 - alpha) * maps[b, c] + alpha * means[b, c][labels[b]].astype(maps.dtype)
    return out


def _votes(labels: Tensor, segments: Tensor, clusters: int, number: int) -> Tensor:
    return _rows(segments, number) * clusters + labels.flatten().long()


def _winners(votes: Tensor, labels: Tensor, segments: Tensor, clusters: int, number: int) -> Tensor:
    winner = votes.view(len(labels), number, clusters).argmax(-1)
    return winner.gather(1, segments.flatten(1).long()).view_as(labels).to(labels.dtype)


def bincount_vote(labels: Tensor, segments: Tensor, clusters: int, number: int) -> Tensor:
    """One bincount over image, segment and label."""
    index = _votes(labels, segments, clusters, number)
    votes = torch.bincount(index, minlength=len(labels) * number * clusters)
    return _winners(votes, labels, segments, clusters, number)


def index_add_vote(labels: Tensor, segments: Tensor, clusters: int, number: int) -> Tensor:
    """One index_add of int32 ones over image, segment and label."""
    index = _votes(labels, segments, clusters, number)
    votes = torch.zeros(len(labels) * number * clusters, dtype=torch.int32, device=labels.device)
    votes.index_add_(0, index, torch.ones((), dtype=torch.int32, device=labels.device).expand_as(index))
    return _winners(votes, labels, segments, clusters, number)


def bincount_loop_vote(labels: Array, segments: Array, clusters: int, number: int) -> Array:
    """Image by image and segment by segment, NumPy's bincount of the masked labels."""
    out = labels.copy()
    for image, where in zip(out, segments, strict=True):
        for segment in range(number):
            mask = where == segment
            if mask.any():
                image[mask] = np.bincount(image[mask]).argmax()
    return out


def mean_providers() -> list[Provider]:
    """Peers of cluster_mean."""
    return _means(lambda mean: mean, mask_loop_mean, scipy_mean)


def refine_providers() -> list[Provider]:
    """Peers of cluster_refine."""
    return _means(_refine, mask_loop_refine, scipy_refine)


def _means(make: Callable[[Mean], Callable[..., Any]], loop: Any, scipy: Any) -> list[Provider]:
    return [
        Provider("scatter_add", "peer", given(make(scatter_add_mean)), differentiable=True),
        Provider("index_add", "peer", given(make(index_add_mean)), differentiable=True),
        Provider("bincount", "peer", given(make(bincount_mean))),
        Provider(
            "torch_scatter",
            "peer",
            lambda: make(_torch_scatter()),
            package="torch_scatter",
            distribution="torch-scatter",
            differentiable=True,
        ),
        Provider(
            "pyg_lib",
            "peer",
            lambda: make(_pyg_lib()),
            package="pyg_lib",
            distribution="pyg-lib",
            differentiable=True,
        ),
        Provider("scipy", "peer", given(scipy), package="scipy", devices=("cpu",), numpy=True),
        Provider("published", "published", given(loop), most_images=LOOPS),
    ]


def vote_providers() -> list[Provider]:
    """Peers of cluster_vote."""
    return [
        Provider("bincount", "peer", given(bincount_vote)),
        Provider("index_add", "peer", given(index_add_vote)),
        Provider("published", "published", given(bincount_loop_vote), devices=("cpu",), numpy=True, most_images=LOOPS),
    ]
