"""What every backbone does to images first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def check_images(images: Tensor) -> None:
    """Raise unless images is a float tensor (B, 3, H, W) with at least one pixel."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch tensor (B, 3, H, W), got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point in [0, 1], got {images.dtype}")


def normalize(images: Tensor, model: nn.Module) -> Tensor:
    """Subtract the mean and divide by the deviation that the timm network was trained with."""
    config: Any = model.pretrained_cfg
    mean = torch.tensor(config["mean"], dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(config["std"], dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    return (images - mean) / std
