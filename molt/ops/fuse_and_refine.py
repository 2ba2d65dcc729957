"""Fusion of scales and cluster refinement in one go."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from molt._backend import Backend, use_native
from molt._words import count
from molt.ops import reference
from molt.ops._checks import LABELS, check_fraction, check_num_clusters, check_tensor, table_size
from molt.ops._native import call, register
from molt.ops.fuse_maps import backward_of_scales, check_scales

MOST_ON_GPU = 8


def fuse_and_refine(
    maps: Sequence[Tensor],
    labels: Tensor,
    alpha: float = 0.5,
    num_clusters: int | Tensor | None = None,
    weights: Sequence[float] | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Fuse the maps of several scales and refine the result by clusters, without the fused maps in between.

    The same as :func:`cluster_refine` of :func:`fuse_maps` at the labels' size, but for rounding: on the CPU 16-bit
    maps stay in float32 between the two. Differentiable in maps.

    Args:
        maps: one (B, C, h, w) tensor a scale; B, C, dtype and device agree, h and w may differ.
        labels: (B, H, W) uint8, int32 or int64, the cluster of every pixel of the result.
        alpha: share of the mean, in [0, 1].
        num_clusters: upper limit of the labels, see :func:`cluster_refine`.
        weights: one non-negative number a scale, scaled here to sum to 1; None weighs all alike.
        backend: ``"auto"``, ``"reference"`` or ``"native"``; None for the one in force (`molt.backend`). On a GPU the
            native form is for up to 8 scales.

    Returns:
        (B, C, H, W) in the dtype of maps.

    Raises:
        TypeError, ValueError, RuntimeError: as the two operators.
    """
    shares = check_scales(maps, weights)
    check_tensor("labels", labels, LABELS, "(B, H, W)")
    if labels.shape[0] != maps[0].shape[0]:
        got = count(labels.shape[0], "image")
        raise ValueError(f"labels: got {got}, expected {maps[0].shape[0]} as maps have")
    if 0 in labels.shape[1:]:
        raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected at least one pixel an image")
    if labels.device != maps[0].device:
        raise ValueError(f"labels: got a tensor on {labels.device}, expected {maps[0].device}, where maps are")
    alpha = check_fraction("alpha", alpha)
    limit, counts = check_num_clusters(num_clusters, labels)
    without = None
    if labels.device.type == "cuda" and len(maps) > MOST_ON_GPU:
        without = f"the native kernel on cuda is for up to {MOST_ON_GPU} scales, got {len(maps)}"
    if not use_native("fuse_and_refine", labels.device, backend, without):
        return reference.fuse_and_refine(list(maps), labels, shares, alpha, limit, counts)
    result: Tensor = call("fuse_and_refine", list(maps), labels, shares, alpha, *table_size(labels, limit, counts))
    return result


def _fake(
    maps: list[Tensor],
    labels: Tensor,
    weights: list[float],
    alpha: float,
    num_clusters: int,
    counts: Tensor | None,
) -> Tensor:
    return maps[0].new_empty((maps[0].shape[0], maps[0].shape[1], labels.shape[1], labels.shape[2]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, labels, ctx.weights, ctx.alpha, ctx.num_clusters, counts = inputs
    ctx.save_for_backward(*maps, labels, counts)


def _backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None, None, None, None, None]:
    *maps, labels, counts = ctx.saved_tensors
    refined = torch.ops.molt.cluster_refine(grad, labels, ctx.alpha, ctx.num_clusters, counts)
    scales = SimpleNamespace(saved_tensors=maps, weights=ctx.weights)
    return backward_of_scales(scales, refined), None, None, None, None, None


register("fuse_and_refine", _fake, _backward, _setup_context)
