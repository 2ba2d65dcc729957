"""Cluster refinement of heat maps."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molt import _extension
from molt._backend import Backend, use_native
from molt.ops import reference
from molt.ops._checks import check_fraction, check_maps_labels, check_num_clusters, table_size
from molt.ops._native import call, register

FloatArray = NDArray[np.floating[Any]]
IntArray = NDArray[np.integer[Any]]


@overload
def cluster_refine(
    maps: Tensor,
    labels: Tensor,
    alpha: float = ...,
    num_clusters: int | Tensor | None = ...,
    *,
    backend: Backend | None = ...,
) -> Tensor: ...
@overload
def cluster_refine(
    maps: FloatArray,
    labels: IntArray,
    alpha: float = ...,
    num_clusters: int | IntArray | None = ...,
    *,
    backend: Backend | None = ...,
) -> FloatArray: ...
def cluster_refine(
    maps: Tensor | FloatArray,
    labels: Tensor | IntArray,
    alpha: float = 0.5,
    num_clusters: int | Tensor | IntArray | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor | FloatArray:
    """Blend each heat map with its mean over the pixel's cluster: ``(1 - alpha) * map + alpha * mean``.

    Section II.B of the MOLT paper; the result is not normalised again. The default alpha, accumulating in float32
    (float64 for float64 maps) and all rules below are our choice. Differentiable in maps, any number of times. The
    bits of a map's result do not depend on the threads, the batch or the place in it.

    Args:
        maps: (B, C, H, W) float16, bfloat16, float32 or float64, any values and strides.
        labels: (B, H, W) uint8, int32 or int64, the cluster of every pixel, in [0, num_clusters); all C maps of an
            image share it.
        alpha: share of the mean, in [0, 1]. 0 returns a copy of maps, 1 the mean alone.
        num_clusters: upper limit of the labels, for all images or as (B,) integers one an image; None sets none. Where
            the reference runs in a compiled graph it must be an integer. On a GPU a kernel must know how many clusters
            there are: with an integer, a tensor on the CPU, or uint8 labels nothing is read back from the device.
        backend: ``"auto"``, ``"reference"`` or ``"native"``; None for the one in force (`molt.backend`).

    Returns:
        (B, C, H, W), contiguous, in the dtype of maps. NumPy arrays (no bfloat16) give a NumPy array. Clusters without
        a pixel have no effect, so num_clusters may exceed H * W. A NaN or infinity spreads over its own cluster of its
        own map, and not at all with alpha 0. Where maps have no element the result has none, and labels are not read.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: shapes that do not fit, alpha or num_clusters out of range, or (on the CPU) a label out of range,
            which in a compiled graph is a RuntimeError. On other devices labels are not read back: a pixel with such
            a label joins no mean and keeps its value.
        RuntimeError: backend ``"native"`` where there is none.
    """
    if isinstance(maps, np.ndarray) or isinstance(labels, np.ndarray):
        return _numpy(maps, labels, alpha, num_clusters, backend)
    maps, labels = check_maps_labels(maps, labels)
    alpha = check_fraction("alpha", alpha)
    limit, counts = check_num_clusters(num_clusters, labels)
    if not use_native("cluster_refine", maps.device, backend):
        return reference.cluster_refine(maps, labels, alpha, limit, counts)
    result: Tensor = call("cluster_refine", maps, labels, alpha, *table_size(labels, limit, counts))
    return result


def _numpy(maps: object, labels: object, alpha: float, num_clusters: object, backend: Backend | None) -> FloatArray:
    for name, value in (("maps", maps), ("labels", labels)):
        if not isinstance(value, np.ndarray):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a NumPy array, as the other is")
    assert isinstance(maps, np.ndarray)
    assert isinstance(labels, np.ndarray)
    alpha = check_fraction("alpha", alpha)
    if not isinstance(num_clusters, np.ndarray):
        num_clusters = None if num_clusters is None else check_num_clusters(num_clusters, torch.empty(len(maps)))[0]
    if use_native("cluster_refine", torch.device("cpu"), backend):
        assert _extension.CPU.module is not None
        refined: FloatArray = _extension.CPU.module.cluster_refine_numpy(maps, labels, alpha, num_clusters)
        return refined
    limit: Any = torch.as_tensor(num_clusters) if isinstance(num_clusters, np.ndarray) else num_clusters
    values, index = (torch.from_numpy(np.ascontiguousarray(value)) for value in (maps, labels))
    result: FloatArray = cluster_refine(values, index, alpha, limit, backend="reference").numpy()
    return result


def _fake(maps: Tensor, labels: Tensor, alpha: float, num_clusters: int, counts: Tensor | None) -> Tensor:
    return maps.new_empty(maps.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, labels, ctx.alpha, ctx.num_clusters, counts = inputs
    ctx.save_for_backward(labels, counts)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    # The operator is linear in maps and symmetric, so it is its own backward.
    labels, counts = ctx.saved_tensors
    return torch.ops.molt.cluster_refine(grad, labels, ctx.alpha, ctx.num_clusters, counts), None, None, None, None


register("cluster_refine", _fake, _backward, _setup_context)
