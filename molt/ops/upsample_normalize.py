"""Resize maps and stretch each to [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from molt._backend import Backend, use_native
from molt.ops import reference
from molt.ops._checks import check_maps, check_order, check_size
from molt.ops._native import call, register
from molt.ops._resize import fuse_backward, no_kernel


def upsample_normalize(
    maps: Tensor, size: Sequence[int], *, order: str = "resize_first", backend: Backend | None = None
) -> Tensor:
    """Resize maps bilinearly and min-max normalise each.

    Half-pixel centres (``align_corners=False``), no antialiasing, no epsilon. Differentiable in ``maps``, through the
    minimum and the maximum too. Where several pixels share one of these, the reference spreads its gradient over all
    output pixels that do, the native forms over the first and last of each source cell. The native forms compute
    positions in exact integers, the reference (`torch.nn.functional.interpolate`) in float32, which for maps of
    thousands of pixels moves samples by up to 1e-3 of a source pixel.

    Args:
        maps: (B, C, h, w) float16, bfloat16, float32 or float64, any strides; computed in float32, or float64.
        size: (H, W) in pixels.
        order: ``"resize_first"``, then min-max, as TS-CAM and wsolevaluation do, so that the result spans [0, 1]; or
            ``"normalize_first"``, as SAT does, where upsampling can miss the extremes (it has no native form).
        backend: ``"auto"``, ``"reference"`` or ``"native"``; None for the one in force (`molt.backend`).

    Returns:
        (B, C, H, W) of the same dtype, in [0, 1]. A constant map gives zeros; NaN or infinite values, or a range too
        wide for the dtype it is computed in, make their own map NaN.

    Raises:
        TypeError, ValueError: maps of another type or shape, or with no pixel; a size that is no pair of positive
            integers; another order.
        RuntimeError: backend ``"native"`` where there is none.
    """
    check_maps(maps)
    height, width = check_size(size)
    order = check_order(order)
    if not use_native("upsample_normalize", maps.device, backend, no_kernel(order, maps)):
        return reference.upsample_normalize(maps, (height, width), order)
    result: Tensor = call("upsample_normalize", maps, height, width)
    return result


def _fake(maps: Tensor, height: int, width: int) -> Tensor:
    return maps.new_empty((maps.shape[0], maps.shape[1], height, width))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (maps,) = ctx.saved_tensors
    return fuse_backward(grad, maps, 1.0), None, None


register("upsample_normalize", _fake, _backward, _setup_context)
