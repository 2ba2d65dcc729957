"""The majority label inside every superpixel."""

from __future__ import annotations

import torch
from torch import Tensor

from molt._backend import Backend, use_native
from molt.ops import reference
from molt.ops._checks import LABELS, check_labels, check_limit, check_tensor
from molt.ops._native import call, register


def cluster_vote(
    labels: Tensor,
    segments: Tensor,
    num_clusters: int | None = None,
    num_segments: int | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Give every pixel the label that most pixels of its segment have (Kanezaki, ICASSP 2018).

    Of labels that are equally frequent the lowest wins. A segment need not be connected.

    Args:
        labels: (B, H, W) uint8, int32 or int64, at least 0.
        segments: (B, H, W) uint8, int32 or int64, at least 0, each image's own numbering.
        num_clusters: above every label; None looks for the largest, which on a GPU is read back.
        num_segments: above every segment; None looks for the largest, likewise. On a GPU their product may be up to
            2^31. The reference needs both in a compiled graph.
        backend: ``"auto"``, ``"reference"`` or ``"native"``; None for the one in force (`molt.backend`).

    Returns:
        (B, H, W) of the labels' dtype. On a GPU, where reading them back would stall the device, values out of range
        are not errors: such a pixel has no vote and keeps its label.

    Raises:
        TypeError, ValueError: tensors of another dtype or shape, or on different devices; on the CPU a value out of
            range, which in a compiled graph is a RuntimeError.
        RuntimeError: backend ``"native"`` where there is none.
    """
    check_tensor("labels", labels, LABELS, "(B, H, W)")
    check_tensor("segments", segments, LABELS, "(B, H, W)")
    if segments.shape != labels.shape:
        raise ValueError(f"segments: got shape {tuple(segments.shape)}, expected {tuple(labels.shape)} as labels have")
    if segments.device != labels.device:
        raise ValueError(f"segments: got a tensor on {segments.device}, expected {labels.device}, where labels are")
    clusters, limit = check_limit("num_clusters", num_clusters), check_limit("num_segments", num_segments)
    if use_native("cluster_vote", labels.device, backend):
        if labels.device.type != "cpu" and labels.numel() > 0:
            clusters = int(labels.max()) + 1 if clusters < 0 else clusters
            limit = int(segments.max()) + 1 if limit < 0 else limit
        result: Tensor = call("cluster_vote", labels, segments, clusters, limit)
        return result
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        check_labels(labels, clusters, None)
        check_labels(segments, limit, None, "segments")
    if labels.numel() == 0:
        return labels.clone(memory_format=torch.contiguous_format)
    return reference.cluster_vote(labels, segments, clusters, limit)


def _fake(labels: Tensor, segments: Tensor, num_clusters: int, num_segments: int) -> Tensor:
    return labels.new_empty(labels.shape)


register("cluster_vote", _fake)
