"""A timm classifier with feature maps (CNN, Swin, ConvNeXt) as a source of Features and of its exact CAM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molt.backbones.preprocess import check_images, check_range, normalize, to_multiple
from molt.backbones.weights import CNN, create_timm
from molt.structures import Features, WeightsInfo

SWIN = ("swin_", "swinv2_tiny", "swinv2_small", "swinv2_base", "swinv2_large")


class CNNBackbone(nn.Module):
    """Feature maps, logits and exact class activation maps of a timm classifier: CNN, Swin or ConvNeXt.

    The CAM (Zhou et al., CVPR 2016) is exact where the logits are a linear layer on the spatial mean of some maps;
    this is checked once on random pixels when the network is built. For a CNN those are the last maps, for a Swin
    transformer the tokens after its last norm. ConvNeXt normalises after the mean, which is linear too once the
    deviation it divides by is known: every position is then normalised by the deviation of the image's mean (our
    choice of maps: the only ones linear in the last maps that keep their mean).

    When the network is built a few small images are shown to it. Where it takes whole patches (Swin) or whole cells of
    its last stage (HRNet, DLA) only, sides are resized to the nearest multiple; a side too short for it is enlarged.

    Args:
        name: timm model name, default EfficientNet-Lite0 trained with ImageNet-1k labels.
        checkpoint, source, pretrained: see :func:`molt.backbones.weights.create_timm`.
        stride: pixels a cell of ``Features.patches``; the network's deepest stage with that reduction is taken.

    Attributes:
        multiple: (H, W) in pixels, what sides are multiples of.
        least: pixels, the shortest side shown to the network.

    Raises:
        TypeError: a name of another type.
        ValueError: a network that takes images of one size only, without such a stride or without a linear classifier,
            or whose logits are not linear in the mean of the last maps.
    """

    model: Any
    info: WeightsInfo

    def __init__(
        self,
        name: str = CNN,
        *,
        checkpoint: str | Path | None = None,
        source: str = "auto",
        pretrained: bool = True,
        stride: int = 16,
    ) -> None:
        super().__init__()
        # A Swin transformer takes one size only unless it is told otherwise.
        options = {"strict_img_size": False} if isinstance(name, str) and name.startswith(SWIN) else {}
        self.model, self.info = create_timm(
            name, checkpoint=checkpoint, source=source, pretrained=pretrained, **options
        )
        if getattr(self.model, "num_prefix_tokens", 0):
            raise ValueError(
                f"backbone {name!r} is a vision transformer with prefix tokens, no CNN: ViTBackbone takes ViTs"
            )
        if not hasattr(self.model, "forward_intermediates"):
            raise ValueError(f"backbone {name!r} is not a timm network with intermediate feature maps")
        if not isinstance(self.model.get_classifier(), nn.Linear | nn.Conv2d):
            raise ValueError(f"backbone {name!r} has no linear classifier, so it has no exact CAM")
        reductions = [stage["reduction"] for stage in self.model.feature_info]
        if stride not in reductions:
            raise ValueError(f"stride must be one of {sorted(set(reductions))} for {name}, got {stride}")
        self.stage = len(reductions) - 1 - reductions[::-1].index(stride)
        self.multiple: tuple[int, int] = tuple(self.model.patch_embed.patch_size) if options else (1, 1)
        self.least = 1 if options else max(reductions)
        self._fit_sizes(name, max(reductions))
        self._check_linear(name)

    @property
    def num_classes(self) -> int:
        """Number of classes of the classifier."""
        return int(self.model.num_classes)

    def forward(self, images: Tensor) -> Features:
        """Return Features of (B, 3, H, W) RGB images in [0, 1], with logits and the maps behind the CAM.

        Raises:
            TypeError, ValueError: images of another type, dtype, device, shape or channel count, none, or far outside
                [0, 1] (on a GPU the first call alone looks).
        """
        check_images(images, self.model)
        check_range(images, self)
        images = to_multiple(images, self.multiple, self.least)
        last, (patches,) = self.model.forward_intermediates(normalize(images, self.model), indices=[self.stage])
        return Features(
            patches=patches.flatten(2).transpose(1, 2),
            grid=(patches.shape[2], patches.shape[3]),
            image_size=(images.shape[2], images.shape[3]),
            logits=self.model.forward_head(last),
            activations=self._before_classifier(last),
        )

    def cam(self, features: Features, classes: Tensor) -> Tensor:
        """Return class activation maps (B, C, h, w) for ``classes`` (B, C) int64, without bias and without ReLU.

        Their spatial mean plus the classifier's bias is the logit.

        Raises:
            ValueError: features of another network, classes of another shape or out of range.
        """
        if features.activations is None:
            raise ValueError("features must come from this CNN: they hold no activations")
        batch = features.activations.shape[0]
        if classes.ndim != 2 or classes.shape[0] != batch:
            raise ValueError(f"classes must have shape ({batch}, C), got {tuple(classes.shape)}")
        # On a GPU reading the classes back would stall it; there an index out of range fails in the gather.
        on_cpu = classes.device.type == "cpu" and classes.numel() > 0
        if on_cpu and (classes.min() < 0 or classes.max() >= self.num_classes):
            raise ValueError(f"classes must be in 0..{self.num_classes - 1}, got {classes.tolist()}")
        weight = self.model.get_classifier().weight.flatten(1)
        return torch.einsum("bcd,bdhw->bchw", weight[classes], features.activations)

    def _before_classifier(self, last: Tensor) -> Tensor:
        """Return maps (B, D, h, w) whose spatial mean is what the classifier is given."""
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            last = last.permute(0, 3, 1, 2)
        norm = getattr(getattr(self.model, "head", None), "norm", None)
        if not isinstance(norm, nn.LayerNorm):
            return last
        variance = last.mean((2, 3), keepdim=True).var(1, keepdim=True, correction=0)
        maps = (last - last.mean(1, keepdim=True)) * (variance + norm.eps).rsqrt()
        if norm.weight is not None:
            maps = maps * norm.weight.view(-1, 1, 1)
        return maps if norm.bias is None else maps + norm.bias.view(-1, 1, 1)

    @torch.no_grad()
    def _fit_sizes(self, name: str, step: int) -> None:
        """Find the sides that the network takes."""
        fault = ""
        for multiple in dict.fromkeys((self.multiple, (step, step))):
            for least in (self.least, 2 * step, 3 * step):
                self.multiple, self.least = multiple, least
                try:
                    for size in ((1, 1), *_sizes(max(least, step), step)):
                        self.model(normalize(to_multiple(_pixels(*size), multiple, least), self.model))
                except (AssertionError, RuntimeError, ValueError, IndexError) as error:
                    fault = str(error) or "a check of timm's fails"
                else:
                    return
            self.least = step
        raise ValueError(f"backbone {name!r} does not take images of any size: {fault:.200}")

    @torch.no_grad()
    def _check_linear(self, name: str) -> None:
        """Hold the CAM to its promise: its mean plus bias is the network's own logit."""
        images = to_multiple(_pixels(96, 160), self.multiple, self.least)
        expected = self.model(normalize(images, self.model))
        try:
            features = self(images)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ValueError(f"backbone {name!r} does not give its last maps: {error!s:.200}") from error
        assert features.activations is not None
        assert features.logits is not None
        classifier = self.model.get_classifier()
        if classifier.weight.flatten(1).shape[1] == features.activations.shape[1]:
            classes = torch.arange(self.num_classes)[None]
            logits = self.cam(features, classes).mean((2, 3))
            if classifier.bias is not None:
                logits = logits + classifier.bias
            limit = 1e-3 * float(expected.abs().max())
            if all(torch.allclose(found, expected, rtol=1e-3, atol=limit) for found in (logits, features.logits)):
                return
        raise ValueError(f"backbone {name!r} has no exact CAM: its logits are not linear in the mean of its last maps")


def _sizes(least: int, step: int) -> list[tuple[int, int]]:
    """Return sides that halve unevenly, each at another stage: 336 px do as the last one's height."""
    return [(least + 1, least + 2), (2 * least + 1, 3 * least - 1), (least + step // 2, least + step // 4)]


def _pixels(height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
