"""What every backbone does to images first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLACK = 0.1  # bicubic resizing overshoots a little
_looked_at: WeakSet[nn.Module] = WeakSet()  # networks on a GPU that were given images in [0, 1] once


def check_images(images: Tensor, network: nn.Module | None = None) -> None:
    """Raise unless images is a float tensor (B, 3, H, W) with at least one pixel, of a network's dtype and device."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch tensor (B, 3, H, W), got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point in [0, 1] (uint8: divide by 255), got {images.dtype}")
    if network is None:
        return
    weight = next(network.parameters())
    if len(images) == 0:
        raise ValueError("images must hold at least one image, got none")
    if images.device != weight.device:
        raise ValueError(f"images must be on {weight.device}, where the network is, got {images.device}")
    if images.dtype != weight.dtype and not torch.is_autocast_enabled(images.device.type):
        raise TypeError(f"images must be {weight.dtype} as the network is, got {images.dtype}")


def check_range(images: Tensor, network: nn.Module, name: str = "images") -> None:
    """Raise ValueError where images are not in [0, 1], give or take 0.1: normalised already, or in 0..255.

    Every call looks on the CPU; on a GPU, which would have to be waited for, a network's first call alone. Nothing is
    looked at while ``torch.compile`` traces or a CUDA graph is captured.
    """
    if torch.compiler.is_compiling() or images.numel() == 0 or images.is_meta:
        return
    if images.device.type != "cpu":
        if network in _looked_at or (images.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        _looked_at.add(network)
    low, high = (float(end) for end in images.detach().aminmax())
    if low < -SLACK or high > 1 + SLACK:
        why = "it looks normalised, which the network does itself" if low < -SLACK else "divide 0..255 by 255"
        raise ValueError(f"{name} must be RGB in [0, 1], got {low:.4g} to {high:.4g}: {why}")


def normalize(images: Tensor, model: nn.Module) -> Tensor:
    """Subtract the mean and divide by the deviation that the timm network was trained with."""
    # Filled where they are needed: a copy from the CPU would wait, and end the capture of a CUDA graph.
    mean, std = (
        torch.cat([images.new_full((1, 1, 1, 1), value) for value in values], 1) for values in mean_and_std(model)
    )
    return (images - mean) / std


def mean_and_std(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and deviation of RGB in [0, 1] that the timm network was trained with."""
    config: Any = model.pretrained_cfg
    return tuple(config["mean"]), tuple(config["std"])


def resize(images: Tensor, size: Sequence[int]) -> Tensor:
    """Return images (B, C, H, W) at ``size`` (H, W), bilinear and antialiased; as they are where they have it."""
    if tuple(images.shape[2:]) == tuple(size):
        return images
    # Antialiasing has no half precision on the CPU.
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    return F.interpolate(wide, list(size), mode="bilinear", align_corners=False, antialias=True).to(images.dtype)


def to_multiple(images: Tensor, multiple: tuple[int, int], least: int = 1) -> Tensor:
    """Return images resized, where they must be, to sides that are multiples of ``multiple`` and at least ``least``."""
    sides = zip(images.shape[2:], multiple, strict=True)
    return resize(images, [max(least, max(1, round(side / step)) * step) for side, step in sides])
