"""What every backbone does to images first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def check_images(images: Tensor, network: nn.Module | None = None) -> None:
    """Raise unless images is a float tensor (B, 3, H, W) with at least one pixel, of a network's dtype and device."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch tensor (B, 3, H, W), got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point in [0, 1], got {images.dtype}")
    if network is None:
        return
    weight = next(network.parameters())
    if len(images) == 0:
        raise ValueError("images must hold at least one image, got none")
    if images.device != weight.device:
        raise ValueError(f"images must be on {weight.device}, where the network is, got {images.device}")
    if images.dtype != weight.dtype and not torch.is_autocast_enabled(images.device.type):
        raise TypeError(f"images must be {weight.dtype} as the network is, got {images.dtype}")


def normalize(images: Tensor, model: nn.Module) -> Tensor:
    """Subtract the mean and divide by the deviation that the timm network was trained with."""
    mean, std = (
        torch.tensor(values, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
        for values in mean_and_std(model)
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
