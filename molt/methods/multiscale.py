"""`molt_*`: the paper's method, from a trained MOLT to maps and the clusters that refine them."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from molt._auto_alpha import AUTO
from molt.backbones.weights import VIT
from molt.classes import OBJECT
from molt.clustering import Clusterer, DeepClustering, TokenKMeans
from molt.methods.evidence import Captions, Evidence, Method, Stage, choose
from molt.methods.molt import MOLT, fused_logits
from molt.methods.registry import load_model
from molt.methods.transformer import class_attention

logger = logging.getLogger("molt")

# Measured to be the better clusters (ablation.json under benchmarks/results); a CNN's were the worse ones.
CLUSTER_BY_TOKENS = (VIT,)


class Multiscale(Method):
    """Multiscale object localization transformers with deep-clustering-guided refinement (the MOLT paper).

    Where the network is DINOv2's, k-means on its tokens takes the place of deep clustering (our choice): on the three
    sets measured (docs/training.md) it refined the maps of trained heads better, in a twenty-fifth of the time.

    Args:
        model: a trained MOLT, which is put into evaluation mode, or the name of one, whose weights are then in
            ``checkpoint``.
        weights: ``"default"``, the only ones.
        backbone: must be None: the checkpoint says which.
        checkpoint: file that :meth:`molt.MOLT.save` wrote.
        source: where backbones come from that the file leaves out.

    Raises:
        ValueError: no checkpoint, a file of another model, or an argument that does not apply.
        FileNotFoundError: no such file, or backbone weights that are nowhere to be had.
    """

    # Our choice, the paper gives neither: TS-CAM's threshold on ILSVRC is lower, but its maps are not refined.
    threshold = 0.3
    alpha = AUTO  # a fixed weight would hurt strong maps; how strong a trained head's are is not known before
    captions = Captions(
        cam=("Class map", "What the class head answers at each patch of the finest scale."),
        scale=(
            "Class activation map, {side}",
            "Photo at {size}: the class map of this scale times what its class token attends to.",
        ),
        fused="The mean of the class activation maps, each scaled to the same range.",
        clusters="Pixels that belong together, found without labels, in {groups}; no class is involved.",
        lead="transformers look at the photo at several scales, and clusters of its pixels, "
        "found without labels, carry their maps to the outlines",
    )

    def __init__(
        self,
        model: str | MOLT,
        weights: str = "default",
        *,
        backbone: str | None = None,
        checkpoint: str | Path | None = None,
        source: str = "auto",
    ) -> None:
        super().__init__()
        name = model if isinstance(model, str) else model.config.name
        if weights != "default":
            raise ValueError(f"weights must be 'default' for {name}, got {weights!r}")
        if backbone is not None:
            raise ValueError(f"backbone {backbone!r} does not apply to {name}: its checkpoint says which it has")
        if isinstance(model, str):
            if checkpoint is None:
                raise ValueError(
                    f"{name} has no trained head: give a checkpoint (checkpoint=FILE, --checkpoint FILE), the file "
                    f"that model.save(FILE) writes after molt.create_model({name!r}, num_classes=N) was trained on "
                    "image labels; method 'seeded' needs no training"
                )
            model = load_model(checkpoint, source=source)
            if model.config.name != name:
                raise ValueError(f"checkpoint {checkpoint} holds {model.config.name}, expected {name}")
        elif checkpoint is not None:
            raise ValueError("checkpoint does not apply where the model itself is given")
        if not model.trained:
            held = f"checkpoint {checkpoint} holds" if checkpoint is not None else "the model has"
            logger.warning("%s a head that was never trained: its classes and maps mean nothing until it is", held)
        self.model = model.eval()
        self.size = model.finest
        if model.config.head == "spatial":
            self.captions = replace(
                self.captions,
                cam=(
                    "Object map",
                    "What the spatial token answers at each patch of the finest scale, for all classes.",
                ),
                scale=("Object map, {side}", "Photo at {size}: what the spatial token answers at each patch."),
                fused="The mean of the object maps, each scaled to the same range.",
            )
        self.class_names = model.class_names
        self.scale_weights = model.config.scale_weights
        self.order = model.config.order
        self.weights = tuple(replace(info, measured=False) for info in dict.fromkeys(model.weights))

    def forward(self, images: Tensor, classes: Tensor | None, k: int, stage: Stage) -> Evidence:
        """Return Evidence of images (B, 3, H, W) RGB in [0, 1] at ``size``; see :class:`molt.methods.Method`."""
        config = self.model.config
        with stage("pyramid"):
            weight = next(self.model.parameters())
            pyramid = self.model.pyramid(images.to(weight.dtype))
        with stage("forward"):
            features = self.model.see_pyramid(pyramid)
        with stage("cam"):
            probabilities = fused_logits(features).float().softmax(-1)
            scores, chosen = choose(probabilities, classes, k)
            maps = self.model.cams(features, chosen)
            finest = config.sizes.index(self.size)
            seen = features[finest]
            if config.head == "spatial":
                return Evidence(
                    classes=chosen,
                    probabilities=scores,
                    cam=maps[finest],
                    maps=maps,
                    scales=config.sizes,
                    features=seen,
                    all_probabilities=probabilities,
                )
            attention = class_attention(seen, config.layers, config.over_layers, config.over_heads)
            answers = self.model.transformer(finest).class_maps(seen, chosen.clamp_min(0))
            return Evidence(
                classes=chosen,
                probabilities=scores,
                cam=torch.where((chosen == OBJECT)[..., None, None], attention.to(answers.dtype), answers),
                maps=maps,
                scales=config.sizes,
                features=seen,
                attention=attention,
                all_probabilities=probabilities,
            )

    def clusterer(self) -> Clusterer:
        """Return what the method refines with: deep clustering, as the paper does, or k-means on good tokens."""
        return TokenKMeans(restarts=4) if self.model.config.backbone in CLUSTER_BY_TOKENS else DeepClustering()
