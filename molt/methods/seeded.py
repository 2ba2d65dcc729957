"""`seeded`: the training-free default. A CNN's CAM says which patches to look for, patch similarity finds the rest."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from molt.backbones import CNNBackbone, ViTBackbone
from molt.backbones.preprocess import resize
from molt.backbones.weights import CNN, VIT
from molt.classes import OBJECT, imagenet_names
from molt.clustering import Clusterer, TokenKMeans
from molt.methods.evidence import Captions, Evidence, Method, Stage, choose
from molt.structures import Features

SCALES = (224, 336, 448)
CLASS_SIZE = 224


def contrast_maps(features: Features, cam: Tensor, *, power: float = 2.0) -> Tensor:
    """Return how much more each patch resembles the CAM's foreground than its background.

    The CAM, cut at zero and scaled to a maximum of 1, weights the patches: raised to ``power`` it gives the mean
    direction of the foreground, one minus it that of the background. A patch's value is the cosine to the first less
    the cosine to the second. Our choice.

    Args:
        features: patches of B images.
        cam: (B, C, h', w') float class activation maps.
        power: at least 1; higher trusts only the CAM's peak.

    Returns:
        (B, C, h, w) on the features' grid, in [-2, 2]; 0 everywhere where a CAM has no positive value.
    """
    patches = F.normalize(features.patches.float(), dim=-1)
    seed = F.interpolate(cam.float().clamp_min(0), features.grid, mode="bilinear", align_corners=False).flatten(2)
    peak = seed.amax(-1, keepdim=True)
    seed = torch.where(peak > 0, seed / peak, 0)
    foreground = F.normalize(seed.pow(power) @ patches, dim=-1)
    background = F.normalize((1 - seed) @ patches, dim=-1)
    maps = (foreground - background) @ patches.transpose(1, 2)
    return torch.where(peak > 0, maps, 0).view(*maps.shape[:2], *features.grid)


class Seeded(Method):
    """Class decided by a CNN at 224 px, its CAM at 448 px seeds patch similarity at three scales.

    Args:
        weights: ``"default"``: patches of a three-scale ViT; ``"weak"``: of the CNN itself, so that every weight has
            seen image labels only.
        backbone: timm name of the ViT (``"default"``) or of the CNN (``"weak"``) in place of the usual one.
        checkpoint: local weight file for that network.
        source: ``"auto"``, ``"package"`` or ``"hub"``, see :func:`molt.backbones.weights.create_timm`.
        scales: sides in pixels of the three squares the photo is resized to.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: see :func:`molt.backbones.weights.create_timm`.
    """

    # Refined maps are min-max normalised; .5 is near the best of a .05 grid for the ViT's and the CNN's patches alike.
    threshold = 0.5
    # Its maps follow the object already: of .3, .4 and .5, .3 cost the ViT's least and helped the CNN's most.
    alpha = 0.3
    captions = Captions(
        cam=(
            "Where the class shows",
            "Class activation map: the places the classifier looked at to decide. Coarse, and often only a part.",
        ),
        scale=(
            "Similar parts, {side}",
            "Photo at {size}: how much more each patch resembles those places than the rest.",
        ),
        fused="The mean of the similarity maps, each scaled to the same range.",
        clusters="Patches that look alike, in {groups}; no class is involved.",
        lead="an image classifier says what is there and roughly where, and comparing parts of the photo with each "
        "other fills in the rest",
    )

    def __init__(
        self,
        weights: str = "default",
        *,
        backbone: str | None = None,
        checkpoint: str | Path | None = None,
        source: str = "auto",
        scales: tuple[int, ...] = SCALES,
    ) -> None:
        super().__init__()
        if weights not in ("default", "weak"):
            raise ValueError(f"weights must be 'default' or 'weak', got {' '.join(repr(weights).split()):.60}")
        self.cnn: CNNBackbone
        self.vit: ViTBackbone | None = None
        if weights == "weak":
            self.cnn = CNNBackbone(CNN if backbone is None else backbone, checkpoint=checkpoint, source=source)
            self.weights = (self.cnn.info,)
        else:
            self.cnn = CNNBackbone(source=source)
            self.vit = ViTBackbone(VIT if backbone is None else backbone, checkpoint=checkpoint, source=source)
            self.weights = (self.cnn.info, self.vit.info)
        self.scales = scales
        self.size = (max(scales), max(scales))
        names, count = imagenet_names(), self.cnn.num_classes
        self.class_names = names if count == len(names) else tuple(f"class {i}" for i in range(count))

    def forward(self, images: Tensor, classes: Tensor | None, k: int, stage: Stage) -> Evidence:
        """Return Evidence of (B, 3, size, size) RGB images in [0, 1]; see :class:`molt.methods.Method`."""
        finest = max(self.scales)
        with stage("pyramid"):
            pyramid = {side: resize(images, (side, side)) for side in {*self.scales, CLASS_SIZE}}
        with stage("forward"):
            sides = {CLASS_SIZE, finest} if self.vit is not None else {*self.scales, CLASS_SIZE}
            seen = {side: self.cnn(pyramid[side]) for side in sorted(sides)}
            source = (
                seen if self.vit is None else {side: self.vit(pyramid[side], attention=False) for side in self.scales}
            )
        with stage("seed"):
            logits = seen[CLASS_SIZE].logits
            assert logits is not None
            probabilities = logits.float().softmax(-1)
            scores, chosen = choose(probabilities, classes, k)
            cam = self._cam(seen[finest], chosen, probabilities, agnostic=classes is not None)
            maps = [contrast_maps(source[side], cam) for side in self.scales]
            return Evidence(
                classes=chosen,
                probabilities=scores,
                cam=cam,
                maps=maps,
                scales=tuple((side, side) for side in self.scales),
                features=source[finest],
                all_probabilities=probabilities,
            )

    def clusterer(self) -> Clusterer:
        """Return k-means on the patches; one threshold serves all photos, so the spread between starts counts."""
        return TokenKMeans(restarts=4)

    def _cam(self, features: Features, classes: Tensor, probabilities: Tensor, *, agnostic: bool) -> Tensor:
        """CAMs of the classes; for 'object' the mean of all classes' CAMs weighted by their probability."""
        cam = self.cnn.cam(features, classes.clamp_min(0))
        if not agnostic:
            return cam
        assert features.activations is not None
        weight = probabilities.to(features.activations.dtype) @ self.cnn.model.get_classifier().weight.flatten(1)
        expected = torch.einsum("bd,bdhw->bhw", weight, features.activations)[:, None]
        return torch.where((classes == OBJECT)[..., None, None], expected, cam)
