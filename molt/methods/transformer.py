"""One object localization transformer: a ViT and a head on its patch sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molt.backbones import ViTBackbone
from molt.backbones.spatial import check_spatial, see_spatial, spatial_map
from molt.classes import OBJECT
from molt.structures import Features

Head = Literal["patches", "class_token", "spatial"]
HEADS = ("patches", "class_token", "spatial")
Pooling = Literal["mean", "attention"]
POOLINGS = ("mean", "attention")
OVER_LAYERS = ("sum", "mean", "max")
OVER_HEADS = ("mean", "max")


class ObjectLocalizationTransformer(nn.Module):
    """A ViT that classifies by its patch sequence, for images of one scale (MOLT, section II.A; TS-CAM's head).

    Args:
        backbone: a ViT with a class token; for ``"spatial"`` a plain one, with or without.
        num_classes: at least 1.
        head: ``"patches"``: a 3x3 convolution over the patch sequence, whose spatial mean is the logits;
            ``"class_token"``: a linear layer on the class token, for comparison; ``"spatial"``: the convolution, and a
            learned token that says of each patch whether it belongs to an object (SAT, ICCV 2023): that is the map of
            every class. See :func:`molt.backbones.spatial.see_spatial` and :mod:`molt.training.spatial_loss`.
        pooling: of the patch head's responses: ``"mean"``, TS-CAM's, or ``"attention"``: weighted by what the class
            token attends to, the sum over all blocks of the mean over heads, through which no gradient goes (our
            choice: the class is then learnt less from the background); with a spatial token, weighted by its map.

    Attributes:
        spatial_token: (1, 1, D), which is no part of the backbone; None for the other heads.

    Raises:
        ValueError: a backbone without class-row attention or, for ``"spatial"``, with blocks that cannot take the
            token; or an argument out of range.
    """

    def __init__(
        self, backbone: ViTBackbone, num_classes: int, head: Head = "patches", pooling: Pooling = "mean"
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}")
        if head == "spatial":
            check_spatial(backbone)
        elif backbone.no_attention is not None:
            raise ValueError(f"backbone {backbone.info.model!r} gives no class-row attention: {backbone.no_attention}")
        self.backbone = backbone
        self.pooling = pooling
        width = int(backbone.model.num_features)
        self.head: nn.Conv2d | nn.Linear = (
            nn.Linear(width, num_classes) if head == "class_token" else nn.Conv2d(width, num_classes, 3, padding=1)
        )
        self.spatial_token: nn.Parameter | None = None
        if head == "spatial":
            self.spatial_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits (B, num_classes) of normalised pixels (B, 3, H, W), sides multiples of the patch size."""
        logits = self.see(pixels, attention=False).logits
        assert logits is not None
        return logits

    def see(self, pixels: Tensor, *, attention: bool = True) -> Features:
        """Return Features with logits of normalised pixels (B, 3, H, W), sides multiples of the patch size.

        Args:
            pixels: float.
            attention: False leaves out attention and keys, unless the logits depend on them. A spatial token's masks
                are there either way, with gradient.
        """
        if self.spatial_token is not None:
            features = see_spatial(self.backbone, self.spatial_token, pixels, attention=attention)
        else:
            weighted = self.pooling == "attention" and not isinstance(self.head, nn.Linear)
            features = self.backbone.see(pixels, attention=attention or weighted)
        return replace(features, logits=self.classify(self.pool(features)))

    def pool(self, features: Features) -> Tensor:
        """Return (B, F), all that the logits depend on, for :meth:`classify`: fixed where the backbone is frozen."""
        if isinstance(self.head, nn.Linear):
            assert features.class_token is not None
            return features.class_token
        weights = None
        if self.pooling == "attention":
            weights = class_attention(features).detach().flatten(1)
            weights = weights / weights.sum(1, keepdim=True)
        return pooled_windows(features.as_map(), weights)

    def classify(self, pooled: Tensor) -> Tensor:
        """Return logits (B, num_classes) of what :meth:`pool` returned: the head is linear in it."""
        return F.linear(pooled, self.head.weight.flatten(1), self.head.bias)

    def class_maps(self, features: Features, classes: Tensor) -> Tensor:
        """Return the head's response (B, C, h, w) at each patch for ``classes`` (B, C) int64.

        With the patch head its spatial mean is the logit. A class-token head is applied to each patch token in the
        class token's place (our choice).
        """
        tokens = features.as_map()
        batch, dim, height, width = tokens.shape
        weight = self.head.weight[classes]
        bias = None if self.head.bias is None else self.head.bias[classes]
        if isinstance(self.head, nn.Linear):
            maps = (weight @ tokens.flatten(2)).view(batch, -1, height, width)
            return maps if bias is None else maps + bias[..., None, None]
        # Every image has its own classes: one group of the convolution an image.
        maps = F.conv2d(
            tokens.reshape(1, batch * dim, height, width),
            weight.flatten(0, 1),
            None if bias is None else bias.flatten(),
            padding=1,
            groups=batch,
        )
        return maps.view(batch, -1, height, width)

    def cam(
        self,
        features: Features,
        classes: Tensor,
        *,
        layers: Sequence[int] | None = None,
        over_layers: str = "sum",
        over_heads: str = "mean",
        clip: bool = False,
    ) -> Tensor:
        """Return class activation maps (B, C, h, w): class-row attention times class map (TS-CAM, ICCV 2021).

        Of the tokens' dtype, not normalised, of any sign unless ``clip``.

        The class-agnostic 'object', -1, is the attention alone. With a spatial token the map of every class, and of
        'object', is the mean of its last masks.

        Args:
            features: what :meth:`see` returned, with attention.
            classes: (B, C) int64.
            layers: blocks whose attention counts, negative ones from the end; None takes all.
            over_layers: ``"sum"``, ``"mean"`` or ``"max"``.
            over_heads: ``"mean"`` or ``"max"``.
            clip: True takes negative responses for 0, so that where the token attends and the class is denied is no
                darker than where it does not attend (our choice).
        """
        attention = class_attention(features, layers, over_layers, over_heads)
        if self.spatial_token is not None:
            return attention.to(features.patches.dtype).expand(-1, classes.shape[1], -1, -1)
        maps = self.class_maps(features, classes.clamp_min(0))
        maps = maps.clamp_min(0) if clip else maps
        agnostic = (classes == OBJECT)[..., None, None]
        return attention.to(maps.dtype) * torch.where(agnostic, 1, maps)


def class_attention(
    features: Features, layers: Sequence[int] | None = None, over_layers: str = "sum", over_heads: str = "mean"
) -> Tensor:
    """Return one attention map (B, 1, h, w) out of all layers and heads; of a spatial token the mean of its last masks.

    Raises:
        ValueError: features without attention, or with masks and a choice that does not apply to them.
    """
    if features.masks is not None:
        check_spatial_map(layers, over_layers, over_heads)
        return spatial_map(features)
    if features.attention is None:
        raise ValueError("features hold no attention: take them from a transformer with a class token")
    rows = features.attention if layers is None else features.attention[:, list(layers)]
    rows = rows.mean(2) if over_heads == "mean" else rows.amax(2)
    one = rows.amax(1) if over_layers == "max" else rows.sum(1)
    if over_layers == "mean":
        one = one / rows.shape[1]
    return one.view(len(one), 1, *features.grid)


def check_spatial_map(layers: Sequence[int] | None, over_layers: str, over_heads: str) -> None:
    """Raise ValueError for choices that the map of a spatial token, which is fixed, would not heed."""
    for name, value, usual in (
        ("layers", layers, None),
        ("over_layers", over_layers, "sum"),
        ("over_heads", over_heads, "mean"),
    ):
        if value != usual:
            raise ValueError(
                f"{name} does not apply to head 'spatial', whose map is the mean of its last three masks, got {value!r}"
            )


def pooled_windows(maps: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return (B, 9 D) what the spatial mean of any 3x3 convolution with padding 1 depends on.

    The mean of a convolution is linear in nine sums over the input, one a kernel position: exact, and the cost no
    longer depends on the number of classes times the number of patches. Its kernel (C, D, 3, 3), flattened to
    (C, 9 D), times these sums plus its bias is the mean of its maps.

    Args:
        maps: (B, D, h, w).
        weights: (B, h * w) of the outputs in the mean, which add up to 1 an image; None weighs all alike.
    """
    height, width = maps.shape[2:]
    if weights is not None:
        # The output at p reads the input at p + offset: the input at q counts with the weight of q - offset.
        padded = F.pad(weights.to(maps.dtype).view(-1, 1, height, width), (1, 1, 1, 1))
        shifted = [
            padded[:, 0, 2 - down : 2 - down + height, 2 - right : 2 - right + width]
            for down in range(3)
            for right in range(3)
        ]
        return (maps.flatten(2) @ torch.stack(shifted, 1).flatten(2).transpose(1, 2)).flatten(1)

    def window(offset: int, length: int) -> slice:
        # At this kernel position the output sees the input from here to here; the rest is padding.
        return slice(max(offset, 0), length + min(offset, 0))

    columns = torch.stack([maps[..., window(offset, width)].sum(3) for offset in (-1, 0, 1)], -1)
    sums = torch.stack([columns[:, :, window(offset, height)].sum(2) for offset in (-1, 0, 1)], -2)
    return sums.flatten(1) / (height * width)
