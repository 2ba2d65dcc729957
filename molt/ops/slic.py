"""Batched SLIC superpixels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from molt._arguments import check_int, check_number
from molt._backend import Backend, use_native
from molt.ops import reference
from molt.ops._checks import FLOATS, check_tensor
from molt.ops._native import call, register


class Superpixels(NamedTuple):
    """Superpixels of a batch of images: labels (B, H, W) int32 in 0..count-1, and counts (B,) int64."""

    labels: Tensor
    counts: Tensor


def slic(
    images: Tensor,
    num_segments: int = 100,
    compactness: float = 10.0,
    *,
    iterations: int = 10,
    lab: bool = True,
    enforce_connectivity: bool = True,
    min_size_factor: float = 0.5,
    max_size_factor: float = 3.0,
    backend: Backend | None = None,
) -> Superpixels:
    """Cut images into superpixels: k-means in colour and position around a grid of seeds (Achanta et al., PAMI 2012).

    Parameters mean what they mean in scikit-image. A pixel looks at the centres within two steps of the grid of seeds;
    the first round goes by position alone. There is nothing random in it, and a result depends neither on the batch
    nor on the number of threads. Images on a GPU are computed on the CPU and brought back.

    Args:
        images: (B, D, H, W) float16, bfloat16, float32 or float64, finite, at least a channel and a pixel; computed
            in float32.
        num_segments: superpixels wanted, at least 1; more than pixels are as many as pixels. The grid has whole steps,
            so that there may be some more or fewer.
        compactness: how far apart, in channels' units, pixels count as much as a step of the grid does; above 0.
            Higher makes squarer superpixels.
        iterations: most rounds of assigning and averaging, at least 1; fewer where no pixel moves any more.
        lab: True takes images (B, 3, H, W) for RGB, stretches each to [0, 1], so that its contrast does not matter,
            and compares colours in CIELAB. False compares channels as they are.
        enforce_connectivity: True makes every superpixel one 4-connected piece.
        min_size_factor: pieces below this share of the mean size H * W / seeds join the neighbour of nearest colour
            (our choice); at least 0.
        max_size_factor: pieces above this share are cut; at least 0. Both are for connected superpixels only.
        backend: ``"auto"``, ``"reference"`` or ``"native"``; None for the one in force (`molt.backend`).

    Returns:
        Labels of each image numbered in reading order of their first pixels, without gaps, and how many there are. No
        gradient flows through them.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range; NaN or infinite values, which in a
            compiled graph is a RuntimeError.
        RuntimeError: backend ``"native"`` where there is none.
    """
    check_tensor("images", images, FLOATS, "(B, D, H, W)")
    if 0 in images.shape[1:]:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected at least a channel and a pixel")
    if lab and images.shape[1] != 3:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected (B, 3, H, W) for lab")
    num_segments = check_int("num_segments", num_segments, 1)
    iterations = check_int("iterations", iterations, 1)
    compactness = check_number("compactness", compactness, above=0)
    sizes = (check_number("min_size_factor", min_size_factor), check_number("max_size_factor", max_size_factor))
    num_segments = min(num_segments, 2**62)
    meta = images.device.type == "meta"
    values = images.detach() if meta else images.detach().cpu()
    if use_native("slic", values.device, backend):
        labels, counts = call(
            "slic", values, num_segments, compactness, iterations, bool(lab), bool(enforce_connectivity), *sizes
        )
    else:
        labels, counts = reference.slic(
            values, num_segments, compactness, iterations, lab, enforce_connectivity, *sizes
        )
    return Superpixels(labels.to(images.device), counts.to(images.device))


def _fake(
    images: Tensor,
    num_segments: int,
    compactness: float,
    iterations: int,
    lab: bool,
    connected: bool,
    min_size: float,
    max_size: float,
) -> tuple[Tensor, Tensor]:
    batch, _, height, width = images.shape
    return images.new_empty((batch, height, width), dtype=torch.int32), images.new_empty(batch, dtype=torch.int64)


register("slic", _fake)
