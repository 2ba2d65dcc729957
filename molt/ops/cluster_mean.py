"""The mean of each cluster."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from molt._backend import Backend, use_native
from molt.ops import reference
from molt.ops._checks import check_maps_labels, check_num_clusters, table_size
from molt.ops._native import call, register


def cluster_mean(
    values: Tensor, labels: Tensor, num_clusters: int | Tensor | None = None, *, backend: Backend | None = None
) -> tuple[Tensor, Tensor]:
    """Average each map over each cluster of its image.

    Differentiable in values. The bits of a mean do not depend on the threads, the batch or the place in it.

    Args:
        values: (B, C, H, W) float16, bfloat16, float32 or float64, any strides.
        labels: (B, H, W) uint8, int32 or int64, in [0, num_clusters); all C maps of an image share it.
        num_clusters: upper limit of the labels, for all images or as (B,) integers one an image; None takes the
            largest label, which on a GPU is read back. In a compiled graph it must be an integer.
        backend: ``"auto"``, ``"reference"`` or ``"native"``; None for the one in force (`molt.backend`).

    Returns:
        means (B, C, K) float32, or float64 for float64 values, 0 for a cluster without a pixel; and counts (B, K)
        int64 of its pixels. K is the (largest) num_clusters, or one more than the largest label. A NaN or infinity
        reaches the mean of its own cluster of its own map.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: shapes that do not fit, num_clusters out of range, or (on the CPU) a label out of range, which in a
            compiled graph is a RuntimeError. On other devices a pixel with such a label joins no mean.
        RuntimeError: backend ``"native"`` where there is none.
    """
    values, labels = check_maps_labels(values, labels, "values")
    limit, counts = check_num_clusters(num_clusters, labels)
    native = use_native("cluster_mean", values.device, backend)
    if limit < 0:
        limit = _size(labels, counts)
    if not native:
        return reference.cluster_mean(values, labels, limit, counts)
    means, members = call("cluster_mean", values, labels, *table_size(labels, limit, counts))
    return means, members


def _size(labels: Tensor, counts: Tensor | None) -> int:
    if counts is not None:
        return int(counts.max()) if counts.numel() else 0
    return max(0, int(labels.max()) + 1) if labels.numel() else 0


def _fake(values: Tensor, labels: Tensor, num_clusters: int, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    means = values.new_empty((values.shape[0], values.shape[1], num_clusters), dtype=wide)
    return means, values.new_empty((values.shape[0], num_clusters), dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[1], output[1])
    ctx.dtype = inputs[0].dtype
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
    labels, members = ctx.saved_tensors
    shares = torch.where((members > 0)[:, None], grad / members.clamp_min(1).to(grad.dtype)[:, None], 0)
    # A column of zeros for labels out of range, which no mean contains.
    shares = torch.cat([shares, shares.new_zeros(*shares.shape[:2], 1)], 2)
    index = labels.long().flatten(1)
    index = torch.where((index >= 0) & (index < members.shape[1]), index, members.shape[1])
    spread = shares.gather(2, index[:, None].expand(-1, grad.shape[1], -1))
    return spread.unflatten(2, labels.shape[1:]).to(ctx.dtype), None, None, None


register("cluster_mean", _fake, _backward, _setup_context)
