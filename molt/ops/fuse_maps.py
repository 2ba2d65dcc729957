"""One map out of several scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from molt._backend import Backend, use_native
from molt._words import count
from molt.ops import reference
from molt.ops._checks import check_maps, check_order, check_size
from molt.ops._native import call, register
from molt.ops._resize import fuse_backward, no_kernel


def fuse_maps(
    maps: Sequence[Tensor],
    size: Sequence[int],
    weights: Sequence[float] | None = None,
    *,
    order: str = "resize_first",
    backend: Backend | None = None,
) -> Tensor:
    """Upsample, min-max normalise and add up the maps of several scales (MOLT, section II.A; weights: our choice).

    Args:
        maps: one (B, C, h, w) tensor a scale; B, C, dtype and device agree, h and w may differ.
        size: (H, W) in pixels of the result.
        weights: one non-negative number a scale, scaled here to sum to 1; None weighs all alike.
        order: of resize and min-max, see :func:`upsample_normalize`.
        backend: ``"auto"``, ``"reference"`` or ``"native"``; None for the one in force (`molt.backend`).

    Returns:
        (B, C, H, W), the weighted sum of each scale's :func:`upsample_normalize`, added in float32 (float64 for
        float64 maps); not normalised again. Differentiable in the maps. A map that is NaN at one scale is NaN, whatever
        that scale's weight.

    Raises:
        TypeError, ValueError: no maps; maps that disagree; weights of another count, negative, not finite or all zero;
            another order.
        RuntimeError: backend ``"native"`` where there is none.
    """
    shares = check_scales(maps, weights)
    height, width = check_size(size)
    order = check_order(order)
    if not use_native("fuse_maps", maps[0].device, backend, no_kernel(order, maps[0])):
        return reference.fuse_maps(list(maps), (height, width), shares, order)
    result: Tensor = call("fuse_maps", list(maps), height, width, shares)
    return result


def check_scales(maps: object, weights: Sequence[float] | None) -> list[float]:
    """Check the maps of several scales and return their weights, scaled to sum to 1.

    Raises:
        TypeError, ValueError: see :func:`fuse_maps`.
    """
    if not isinstance(maps, list | tuple) or not maps:
        got = "none" if isinstance(maps, list | tuple) else type(maps).__name__
        raise ValueError(f"maps: got {got}, expected a list of (B, C, h, w) tensors, one a scale")
    for i, scale in enumerate(maps):
        check_maps(scale, f"maps[{i}]")
        for what in ("dtype", "device"):
            if getattr(scale, what) != getattr(maps[0], what):
                raise ValueError(
                    f"maps[{i}]: got {what} {getattr(scale, what)}, expected {getattr(maps[0], what)} as maps[0] has"
                )
        if scale.shape[:2] != maps[0].shape[:2]:
            raise ValueError(f"maps[{i}]: got (B, C) = {tuple(scale.shape[:2])}, expected {tuple(maps[0].shape[:2])}")
    shares = [1.0] * len(maps) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(maps):
        raise ValueError(f"weights: got {count(len(shares), 'number')}, expected one a scale ({len(maps)})")
    total = sum(shares)
    if not all(share >= 0 for share in shares) or total == 0 or not math.isfinite(total):
        raise ValueError(f"weights: got {shares}, expected numbers of finite sum, not negative and not all zero")
    return [share / total for share in shares]


def _fake(maps: list[Tensor], height: int, width: int, weights: list[float]) -> Tensor:
    return maps[0].new_empty((maps[0].shape[0], maps[0].shape[1], height, width))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[0])
    ctx.weights = inputs[3]


def backward_of_scales(ctx: Any, grad: Tensor) -> list[Tensor]:
    """Return each scale's gradient; ctx holds the maps and their weights."""
    pairs = zip(ctx.saved_tensors, ctx.weights, strict=True)
    return [fuse_backward(grad, scale, weight) for scale, weight in pairs]


def _backward(ctx: Any, grad: Tensor) -> tuple[list[Tensor], None, None, None]:
    return backward_of_scales(ctx, grad), None, None, None


register("fuse_maps", _fake, _backward, _setup_context)
