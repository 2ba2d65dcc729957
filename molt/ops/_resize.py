"""Bilinear resizing as matrices, and with them the gradient of min-max normalised maps."""

from __future__ import annotations

import torch
from torch import Tensor


def no_kernel(order: str, maps: Tensor | None = None) -> str | None:
    """Say why no kernel resizes such maps, or None."""
    if order != "resize_first":
        return f"there is no native kernel for order {order!r}, only for 'resize_first'"
    if maps is not None and maps.device.type == "cuda" and maps.dtype == torch.float64:
        return "there is no native kernel for float64 maps on cuda"
    return None


def _matrix(where: Tensor, source: int, target: int, dtype: torch.dtype) -> Tensor:
    """Return (len(where), source): what the output coordinates `where` of `target` take from each source coordinate."""
    position = ((2 * where + 1) * source - target).clamp_min(0)
    cell = (position // (2 * target)).clamp_max(source - 1)
    share = torch.where(cell == source - 1, 0, (position - 2 * target * cell).to(dtype) / (2 * target))
    nodes = torch.arange(source, device=where.device)
    return (nodes == cell[:, None]) * (1 - share)[:, None] + (nodes == cell[:, None] + 1) * share[:, None]


def _resizing(source: int, target: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the matrix (target, source) of one axis, and its rows at the first and last coordinate of each cell."""
    every = torch.arange(target, device=like.device)
    cells = torch.arange(source + 1, device=like.device)
    # Of a cell without a coordinate these are coordinates of its neighbours, which does no harm.
    first = ((2 * cells + 1) * target - source + 2 * source - 1) // (2 * source)
    first = torch.where(cells == 0, 0, first).clamp(0, target)
    last = torch.where(cells[1:] == source, target, first[1:]) - 1
    corners = torch.cat([first[:-1], last]).clamp(0, target - 1)
    return _matrix(every, source, target, like.dtype), _matrix(corners, source, target, like.dtype)


def fuse_backward(grad: Tensor, maps: Tensor, weight: float) -> Tensor:
    """Return the gradient in one scale's maps (B, C, h, w) of ``weight * upsample_normalize(maps)``.

    With v = resized maps, n = (v - low) / (high - low) and g the gradient, all that is needed of g is its sum back
    onto the source grid, as the sums of g and of g * v follow from it.
    """
    with torch.autocast(grad.device.type, enabled=False):
        return _fuse_backward(grad, maps, weight)


def _fuse_backward(grad: Tensor, maps: Tensor, weight: float) -> Tensor:
    wide = maps if maps.dtype == torch.float64 else maps.float()
    down, down_corners = _resizing(maps.shape[2], grad.shape[2], wide)
    right, right_corners = _resizing(maps.shape[3], grad.shape[3], wide)
    onto = down.T @ (grad.to(wide.dtype) @ right)

    # The extremes lie on a corner sample of some cell, resizing being linear in each axis inside it.
    samples = down_corners @ wide @ right_corners.T
    low, high = samples.amin((2, 3), keepdim=True), samples.amax((2, 3), keepdim=True)
    span = high - low
    flat = span == 0
    safe = torch.where(flat, 1, span)
    total = onto.sum((2, 3), keepdim=True)
    stretched = (onto * (wide - low)).sum((2, 3), keepdim=True) / safe

    def at(extreme: Tensor) -> Tensor:
        here = (samples == extreme).to(wide.dtype)
        return down_corners.T @ (here / here.sum((2, 3), keepdim=True)) @ right_corners

    result = (onto - (total - stretched) * at(low) - stretched * at(high)) * (weight / safe)
    return torch.where(flat, 0, result).to(maps.dtype)
