"""The majority label inside every superpixel."""

from __future__ import annotations

import torch
from torch import Tensor

from molt.ops import reference
from molt.ops._checks import LABELS, check_labels, check_limit, check_tensor


def cluster_vote(
    labels: Tensor, segments: Tensor, num_clusters: int | None = None, num_segments: int | None = None
) -> Tensor:
    """Give every pixel the label that most pixels of its segment have (Kanezaki, ICASSP 2018).

    Of labels that are equally frequent the lowest wins. A segment need not be connected.

    Args:
        labels: (B, H, W) uint8, int32 or int64, at least 0.
        segments: (B, H, W) uint8, int32 or int64, at least 0, each image's own numbering.
        num_clusters: above every label; None looks for the largest.
        num_segments: above every segment; None looks for the largest. Compiled graphs need both.

    Returns:
        (B, H, W) of the labels' dtype. A label or segment out of range is not looked for on a GPU, where reading it
        back would stall the device.

    Raises:
        TypeError, ValueError: tensors of another dtype or shape, or on different devices; on the CPU a value out of
            range.
    """
    check_tensor("labels", labels, LABELS, "(B, H, W)")
    check_tensor("segments", segments, LABELS, "(B, H, W)")
    if segments.shape != labels.shape:
        raise ValueError(f"segments: got shape {tuple(segments.shape)}, expected {tuple(labels.shape)} as labels have")
    if segments.device != labels.device:
        raise ValueError(f"segments: got a tensor on {segments.device}, expected {labels.device}, where labels are")
    clusters, limit = check_limit("num_clusters", num_clusters), check_limit("num_segments", num_segments)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        check_labels(labels, clusters, None)
        check_labels(segments, limit, None, "segments")
    if labels.numel() == 0:
        return labels.clone()
    return reference.cluster_vote(labels, segments, clusters, limit)
