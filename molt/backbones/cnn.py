"""A timm CNN classifier as a source of Features and of its exact CAM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molt.backbones.preprocess import check_images, normalize
from molt.backbones.weights import CNN, create_timm
from molt.structures import Features, WeightsInfo


class CNNBackbone(nn.Module):
    """Feature maps, logits and exact class activation maps of a timm CNN classifier.

    The CAM (Zhou et al., CVPR 2016) is exact where the logits are a linear layer on the spatial mean of the last
    maps; this is checked once on random pixels when the network is built.

    Args:
        name: timm model name, default EfficientNet-Lite0 trained with ImageNet-1k labels.
        checkpoint, source, pretrained: see :func:`molt.backbones.weights.create_timm`.
        stride: pixels a cell of ``Features.patches``; the network's deepest stage with that reduction is taken.

    Raises:
        ValueError: no stage with that stride, or logits that are not linear in the mean of the last maps.
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
        self.model, self.info = create_timm(name, checkpoint=checkpoint, source=source, pretrained=pretrained)
        if not hasattr(self.model, "forward_intermediates") or hasattr(self.model, "patch_embed"):
            raise ValueError(f"backbone {name!r} is not a timm CNN with intermediate feature maps")
        reductions = [stage["reduction"] for stage in self.model.feature_info]
        if stride not in reductions:
            raise ValueError(f"stride must be one of {reductions} for {name}, got {stride}")
        self.stage = len(reductions) - 1 - reductions[::-1].index(stride)
        self._check_linear(name)

    @property
    def num_classes(self) -> int:
        """Number of classes of the classifier."""
        return int(self.model.num_classes)

    def forward(self, images: Tensor) -> Features:
        """Return Features of (B, 3, H, W) RGB images in [0, 1], with logits and the maps behind the CAM.

        Raises:
            TypeError, ValueError: images of another type, shape or channel count.
        """
        check_images(images)
        last, (patches,) = self.model.forward_intermediates(normalize(images, self.model), indices=[self.stage])
        return Features(
            patches=patches.flatten(2).transpose(1, 2),
            grid=(patches.shape[2], patches.shape[3]),
            image_size=(images.shape[2], images.shape[3]),
            logits=self.model.forward_head(last),
            activations=last,
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

    @torch.no_grad()
    def _check_linear(self, name: str) -> None:
        """Hold the CAM to its promise: its mean plus bias is the logit."""
        generator = torch.Generator().manual_seed(0)
        pixels = torch.rand(1, 3, 96, 96, generator=generator)
        classifier = self.model.get_classifier()
        if not isinstance(classifier, nn.Linear | nn.Conv2d):
            raise ValueError(f"backbone {name!r} has no linear classifier, so it has no exact CAM")
        features = self(pixels)
        expected = features.logits
        assert expected is not None
        assert features.activations is not None
        if classifier.weight.flatten(1).shape[1] == features.activations.shape[1]:
            classes = torch.arange(self.num_classes)[None]
            logits = self.cam(features, classes).mean((2, 3))
            if classifier.bias is not None:
                logits = logits + classifier.bias
            if torch.allclose(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
                return
        raise ValueError(f"backbone {name!r} has no exact CAM: its logits are not linear in the mean of its last maps")
