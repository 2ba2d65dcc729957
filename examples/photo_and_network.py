"""A photo and a classifier that need no network; a script of your own has others in their place."""

from __future__ import annotations

from PIL import Image
from torch import nn

from molt.backbones.weights import create_timm
from molt.data import load_photo, sample_photos


def photo() -> Image.Image:
    """Return the RGB photo of a cat, 451 by 300 pixels."""
    return load_photo(sample_photos()[0].path)


def network() -> nn.Module:
    """Return timm's EfficientNet-Lite0 with ImageNet weights, wherever molt finds them on this machine or the hub."""
    model, _ = create_timm("tf_efficientnet_lite0.in1k")
    return model.requires_grad_()
