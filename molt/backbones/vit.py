"""A timm vision transformer as a source of Features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from molt.backbones.attention import ClassRows
from molt.backbones.preprocess import check_images, check_range, normalize, to_multiple
from molt.backbones.weights import VIT, create_timm
from molt.structures import Features, WeightsInfo


class ViTBackbone(nn.Module):
    """Patch tokens, class token and class-row attention of a timm ViT, for images of any size and aspect ratio.

    timm's fused attention stays on. ``no_attention`` says why a network has no class-row attention, or is None.

    Images whose sides are no multiple of the patch size are resized to the nearest multiple (at least one patch), so
    that the grid covers the image exactly; position embeddings are resampled by timm. A hybrid's patch is what a token
    covers of the image, its convolutions included. When the network is built a small image is shown to it.

    Args:
        name: timm model name, default DINOv2 ViT-S/14.
        checkpoint, source, pretrained: see :func:`molt.backbones.weights.create_timm`.

    Attributes:
        patch_size: (H, W) in pixels of a patch.

    Raises:
        TypeError: a name of another type.
        ValueError: the network is no ViT with a patch grid that takes images of any size.
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
        except (TypeError, FileNotFoundError) as error:  # of a CNN no weights need be looked for
            if not isinstance(name, str) or _takes_any_size(name):
                raise
            raise ValueError(f"backbone {name!r} is {_other_kind(name)}") from error
        embed: Any = getattr(self.model, "patch_embed", None)
        if not hasattr(embed, "feat_ratio") or not hasattr(self.model, "num_prefix_tokens"):
            raise ValueError(f"backbone {name!r} is {_other_kind(name)}")
        self.patch_size: tuple[int, int] = tuple(embed.feat_ratio(as_scalar=False))
        self.no_attention: str | None = None
        self._rows: ClassRows | None = None
        try:
            self._rows = ClassRows(self.model)
        except ValueError as error:
            self.no_attention = str(error)
        self._probe(name)

    def forward(self, images: Tensor, *, attention: bool = True) -> Features:
        """Return Features of (B, 3, H, W) RGB images in [0, 1].

        Patches are the output tokens, after the last norm where the network has one before its pooling.

        Args:
            images: float, of any size.
            attention: False leaves out attention and keys, whose cost is within the spread of runs.

        Raises:
            TypeError, ValueError: images of another type, dtype, device, shape or channel count, none, or far outside
                [0, 1] (on a GPU the first call alone looks). NaN and infinity are not looked for: they spread to the
                tokens.
        """
        check_images(images, self.model)
        check_range(images, self)
        return self.see(normalize(to_multiple(images, self.patch_size), self.model), attention=attention)

    def see(self, pixels: Tensor, *, attention: bool = True) -> Features:
        """Return Features of normalised pixels (B, 3, H, W) whose sides are multiples of the patch size."""
        rows = self._rows if attention else None
        # No context manager, as torch.compile of 2.10 enters none that it did not make.
        recording = None if rows is None else rows.start()
        try:
            tokens = self.model.forward_features(pixels)
        finally:
            if rows is not None:
                rows.stop()
        prefix = self.model.num_prefix_tokens
        size = (pixels.shape[2], pixels.shape[3])
        return Features(
            patches=tokens[:, prefix:],
            grid=(size[0] // self.patch_size[0], size[1] // self.patch_size[1]),
            image_size=size,
            class_token=tokens[:, 0] if getattr(self.model, "cls_token", None) is not None else None,
            attention=None if recording is None else torch.stack(recording.rows, 1)[..., prefix:],
            keys=None if recording is None else recording.last_keys()[:, :, prefix:].transpose(1, 2).flatten(2),
        )

    @torch.no_grad()
    def _probe(self, name: str) -> None:
        """Make sure that images of another size and shape than the network's own give a token a patch."""
        if next(self.model.parameters()).is_meta:
            return
        try:
            seen = self(torch.full((1, 3, 2 * self.patch_size[0], 3 * self.patch_size[1]), 0.5))
            if seen.attention is not None and seen.attention.shape[-1] != seen.patches.shape[1]:
                raise RuntimeError(f"class rows of {seen.attention.shape[-1]} for {seen.patches.shape[1]} patches")
        except (AssertionError, RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"backbone {name!r} does not take images of any size: {error!s:.200}") from error


def _takes_any_size(name: str) -> bool:
    """Return whether timm builds the network for images of any size."""
    try:
        with torch.device("meta"):
            timm.create_model(name, dynamic_img_size=True)
    except TypeError:
        return False
    return True


def _other_kind(name: str) -> str:
    """Return what a network is that is no ViT for us."""
    with torch.device("meta"):
        model = timm.create_model(name)
    return f"no timm ViT that takes images of any size: {type(model).__name__}; CNNBackbone (weights='weak') takes CNNs"
