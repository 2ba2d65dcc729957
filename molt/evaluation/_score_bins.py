"""Counting scores in bins, by np.histogram's rule but faster."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from molt import _extension
from molt._backend import Backend, use_native

IGNORE = 255


def score_histogram(
    scores: NDArray[np.float64],
    mask: NDArray[np.uint8],
    edges: NDArray[np.float64],
    steps: int | None,
    backend: Backend | None = None,
) -> NDArray[np.int64]:
    """Return (2, len(edges) - 1) counts of scores between the edges: where the mask is 1, and where it is 0.

    Args:
        scores: in [0, 1].
        mask: of the same shape: 1 object, 0 background, 255 ignored.
        edges: rising from 0 on, with two above 1.
        steps: as for :func:`score_bins`.
        backend: as for :func:`molt.ops.sweep_boxes`.
    """
    if use_native("score_histogram", torch.device("cpu"), backend):
        module: Any = _extension.CPU.module
        found: NDArray[np.int64] = module.count_scores_numpy(scores, mask, edges)
        return found
    bins = len(edges) - 1
    row = np.zeros(256, np.int64)
    row[[0, IGNORE]] = bins, 2 * bins
    where = row[mask] + score_bins(scores, edges, steps)
    return np.bincount(where.ravel(), minlength=3 * bins)[: 2 * bins].reshape(2, bins)


def score_bins(scores: NDArray[np.float64], edges: NDArray[np.float64], steps: int | None) -> NDArray[np.integer[Any]]:
    """Return the bin of each score: ``edges[i] <= score < edges[i + 1]``.

    Args:
        scores: in [0, 1].
        edges: rising from 0 on, with two above 1.
        steps: N where the edges in [0, 1] are ``np.arange(0, 1, 1 / N)`` and 1; None for any others.
    """
    if steps is None:
        return edges.searchsorted(scores, side="right") - 1
    # The edges are rounded multiples, so the product is at most one bin off.
    index = (scores * steps).astype(np.int32)
    index -= scores < edges[index]
    index += scores >= edges[index + 1]
    return index
