"""The data that flows from a photo to its boxes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    import PIL.Image

SawMasks = Literal["no", "probably", "unknown"]


@dataclass(frozen=True)
class WeightsInfo:
    """Where one network's weights came from.

    ``source`` is ``"package NAME VERSION"``, ``"hub REPO"``, ``"file PATH"`` or ``"random"``. ``saw_masks`` says
    whether pixel masks were used in its training; ``measured`` whether molt's default threshold was measured on this
    source.
    """

    model: str
    source: str
    saw_masks: SawMasks
    measured: bool

    def to_json(self) -> dict[str, Any]:
        """Return model, source, saw_masks, and threshold: ``"measured"`` or ``"not measured"`` on this source."""
        return {
            "model": self.model,
            "source": self.source,
            "saw_masks": self.saw_masks,
            "threshold": "measured" if self.measured else "not measured",
        }


@dataclass(frozen=True, eq=False)
class Features:
    """What one network saw in a batch of images at one scale.

    Attributes:
        patches: (B, h*w, D) float, one vector a patch or grid cell, row by row.
        grid: (h, w) of ``patches``.
        image_size: (H, W) in pixels of the input that the grid covers.
        class_token: (B, D) or None where the network has none.
        logits: (B, num_classes) or None where the network has no classifier.
        activations: (B, D', h', w') last maps whose spatial mean feeds a linear classifier, or None.
        attention: (B, layers, heads, h*w) float, what the class token attends to: of each block's softmax its row,
            without the columns of class, distillation and register tokens. None where there is no class token or
            where it was not asked for.
        keys: (B, h*w, D'') of the last block's attention, all heads side by side, after the key norm where there is
            one, before rotary position embedding; None as for ``attention``.
        masks: (B, layers, h*w) float in [0, 1], float32 or wider: of each block what a spatial token answers at each
            patch, see :func:`molt.backbones.spatial.see_spatial`; None where there is no such token.
    """

    patches: Tensor
    grid: tuple[int, int]
    image_size: tuple[int, int]
    class_token: Tensor | None = None
    logits: Tensor | None = None
    activations: Tensor | None = None
    attention: Tensor | None = None
    keys: Tensor | None = None
    masks: Tensor | None = None

    def __post_init__(self) -> None:
        h, w = self.grid
        if self.patches.ndim != 3 or self.patches.shape[1] != h * w:
            raise ValueError(
                f"patches must be (B, {h * w}, D) for a {h}x{w} grid, got shape {tuple(self.patches.shape)}"
            )

    def as_map(self) -> Tensor:
        """Return ``patches`` as (B, D, h, w), a view."""
        batch, _, dim = self.patches.shape
        return self.patches.transpose(1, 2).view(batch, dim, *self.grid)


@dataclass(frozen=True, eq=False)
class Localization:
    """Boxes, classes and heat map of one photo.

    Attributes:
        boxes: (n, 4) float32 xyxy in pixels of the EXIF-rotated photo, best first; n can be 0.
        classes: (n,) int64, -1 for the class-agnostic 'object'.
        names: n class names.
        scores: (n,) float32 in [0, 1]: the class's probability times the component's area over the area of the
            largest component of that class (our choice). Class-agnostic: the mean of the map in the component takes
            the place of the probability.
        size: (width, height) of the photo in pixels.
        heat: (c, h, w) float32 in [0, 1], refined maps at working resolution, one a class, the likeliest first.
        clusters: (h, w) int32 label map at working resolution.
        weights: one WeightsInfo a network used.
        source: the path, or the picture itself, that was localized.
    """

    boxes: Tensor
    classes: Tensor
    names: list[str]
    scores: Tensor
    size: tuple[int, int]
    heat: Tensor
    clusters: Tensor
    weights: tuple[WeightsInfo, ...] = ()
    source: Any = None

    def __len__(self) -> int:
        return self.boxes.shape[0]

    def __repr__(self) -> str:
        found = ", ".join(
            f"{name} {score:.2f} [{', '.join(f'{v:.0f}' for v in box)}]"
            for name, score, box in zip(self.names, self.scores.tolist(), self.boxes.tolist(), strict=True)
        )
        return f"Localization({self.size[0]}x{self.size[1]}: {found or 'nothing found'})"

    @property
    def map(self) -> Tensor:
        """(H, W) float32 in [0, 1]: the best class's refined map at the photo's size, upsampled bilinearly."""
        width, height = self.size
        return F.interpolate(self.heat[None, :1], (height, width), mode="bilinear", align_corners=False)[0, 0]

    @property
    def labels(self) -> Tensor:
        """(H, W) int32: the clusters at the photo's size (nearest neighbour)."""
        width, height = self.size
        resized = F.interpolate(self.clusters[None, None].float(), (height, width), mode="nearest-exact")
        return resized[0, 0].to(torch.int32)

    def to_dict(self) -> dict[str, Any]:
        """Return path, width, height, detections and weights as plain Python values."""
        return {
            "path": str(self.source) if isinstance(self.source, str | Path) else None,
            "width": self.size[0],
            "height": self.size[1],
            "detections": [
                {"box": [round(v, 2) for v in box], "class": index, "name": name, "score": round(score, 6)}
                for box, index, name, score in zip(
                    self.boxes.tolist(), self.classes.tolist(), self.names, self.scores.tolist(), strict=True
                )
            ],
            "weights": [info.to_json() for info in self.weights],
        }

    def to_json(self) -> str:
        """Return :meth:`to_dict` as one line of JSON."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """Return COCO result entries: image_id, category_id, bbox [x, y, width, height] in pixels, score.

        category_id is molt's class index: map it to your own data set's ids where those differ.
        """
        return [
            {
                "image_id": image_id,
                "category_id": d["class"],
                "bbox": [d["box"][0], d["box"][1], d["box"][2] - d["box"][0], d["box"][3] - d["box"][1]],
                "score": d["score"],
            }
            for d in self.to_dict()["detections"]
        ]

    def plot(self, image: Any = None, *, heat: bool = True) -> PIL.Image.Image:
        """Return the photo with heat map and boxes drawn on it, as an RGB picture at most 1600 px a side.

        Args:
            image: path, PIL image, array or tensor to draw on; by default the one that was localized.
            heat: False draws only the boxes.

        Raises:
            ValueError: if no image is given and none is known.
        """
        from molt.data.images import load_photo
        from molt.overlay import draw_localization

        image = self.source if image is None else image
        if image is None:
            raise ValueError("image must be given: this Localization does not know the photo it came from")
        return draw_localization(load_photo(image), self, heat=heat)
