"""A timm vision transformer as a source of Features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from molt.backbones.preprocess import check_images, normalize
from molt.backbones.weights import VIT, create_timm
from molt.structures import Features, WeightsInfo


class ViTBackbone(nn.Module):
    """Patch tokens and class token of a timm ViT, for images of any size and aspect ratio.

    Images whose sides are no multiple of the patch size are resized to the nearest multiple (at least one patch), so
    that the grid covers the image exactly; position embeddings are resampled by timm.

    Args:
        name: timm model name, default DINOv2 ViT-S/14.
        checkpoint, source, pretrained: see :func:`molt.backbones.weights.create_timm`.

    Raises:
        ValueError: the network is no ViT with a patch grid and dynamic image size.
    """

    model: Any
    info: WeightsInfo

    def __init__(
        self,
        name: str = VIT,
        *,
        checkpoint: str | Path | None = None,
        source: str = "auto",
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        try:
            self.model, self.info = create_timm(
                name, checkpoint=checkpoint, source=source, pretrained=pretrained, num_classes=0, dynamic_img_size=True
            )
        except TypeError as error:
            raise ValueError(f"backbone {name!r} is not a timm ViT that takes any image size: {error}") from error
        if not hasattr(self.model, "patch_embed") or not hasattr(self.model, "num_prefix_tokens"):
            raise ValueError(f"backbone {name!r} is not a timm ViT: it has no patch grid with prefix tokens")
        self.patch_size: tuple[int, int] = tuple(self.model.patch_embed.patch_size)

    def forward(self, images: Tensor) -> Features:
        """Return Features of (B, 3, H, W) RGB images in [0, 1]; patches are the output tokens after the last norm.

        Raises:
            TypeError, ValueError: images of another type, shape or channel count. NaN and infinity are not looked for:
                they spread to the tokens.
        """
        check_images(images)
        ph, pw = self.patch_size
        size = (max(1, round(images.shape[2] / ph)) * ph, max(1, round(images.shape[3] / pw)) * pw)
        if size != tuple(images.shape[2:]):
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        tokens = self.model.forward_features(normalize(images, self.model))
        prefix = self.model.num_prefix_tokens
        return Features(
            patches=tokens[:, prefix:],
            grid=(size[0] // ph, size[1] // pw),
            image_size=size,
            class_token=tokens[:, 0] if getattr(self.model, "cls_token", None) is not None else None,
        )
