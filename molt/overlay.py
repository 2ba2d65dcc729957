"""Pictures of results: heat maps, clusters and boxes over a photo."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from torch import Tensor

from molt._text import readable
from molt.data._folders import OVERLAY
from molt.structures import Localization

MAX_SIDE = 1600
HEAT_OPACITY = 0.55
CLUSTER_OPACITY = 0.6

# Dark blue over magenta to pale yellow: lightness grows with the value, so it reads in grey as well.
_HEAT = np.array(
    [[12, 7, 60], [78, 14, 110], [140, 35, 112], [199, 62, 89], [240, 106, 56], [252, 165, 40], [252, 240, 150]],
    dtype=np.float64,
)
# Told apart by people with colour blindness too (after Okabe and Ito).
_COLOURS = [
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (150, 150, 150),
]


def colour(index: int) -> tuple[int, int, int]:
    """Return the RGB colour of a box or cluster number; it repeats after eight."""
    return _COLOURS[index % len(_COLOURS)]


def heat_overlay(photo: PIL.Image.Image, heat: Tensor) -> PIL.Image.Image:
    """Return the RGB photo with a (h, w) map in [0, 1] laid over it, stretched to the photo's shape."""
    resized = _resize(heat.detach().float().cpu().clamp(0, 1).numpy(), photo.size)
    stops = np.linspace(0, 1, len(_HEAT))
    tint = np.stack([np.interp(resized, stops, _HEAT[:, channel]) for channel in range(3)], -1)
    return _blend(photo, tint, HEAT_OPACITY)


def cluster_overlay(photo: PIL.Image.Image, labels: Tensor) -> PIL.Image.Image:
    """Return the RGB photo tinted by a (h, w) integer label map, stretched to the photo's shape."""
    index = labels.detach().cpu().numpy()
    picture = PIL.Image.fromarray((index % 256).astype(np.uint8)).resize(photo.size, PIL.Image.Resampling.NEAREST)
    table = np.array([colour(i) for i in range(256)], dtype=np.float64)
    return _blend(photo, table[np.asarray(picture)], CLUSTER_OPACITY)


def draw_boxes(
    photo: PIL.Image.Image,
    boxes: Tensor,
    names: Sequence[str],
    scores: Sequence[float] | Tensor | None = None,
    size: tuple[int, int] | None = None,
) -> PIL.Image.Image:
    """Return a copy of the photo with labelled boxes.

    Args:
        photo: RGB picture.
        boxes: (n, 4) xyxy in pixels of a photo of ``size``.
        names: n labels.
        scores: n numbers shown behind the names, or None.
        size: (width, height) the boxes are in; default the picture's own.
    """
    picture = photo.copy()
    draw = PIL.ImageDraw.Draw(picture)
    width, height = picture.size
    given = size or picture.size
    line = max(2, round(max(picture.size) / 250))
    font = PIL.ImageFont.load_default(size=max(11, round(max(picture.size) / 36)))
    shown = [f"{s:.2f}" for s in scores] if scores is not None else [""] * len(names)
    # The best box is drawn last, on top.
    for i, (box, name, score) in reversed(list(enumerate(zip(boxes.tolist(), names, shown, strict=True)))):
        scale = (width / given[0], height / given[1]) * 2
        x0, y0, x1, y1 = (value * factor for value, factor in zip(box, scale, strict=True))
        x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
        x1, y1 = min(max(x1 - 1, x0), width - 1), min(max(y1 - 1, y0), height - 1)
        # A dark rim keeps the line visible on any ground.
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline="black", width=line + 2)
        draw.rectangle((x0, y0, x1, y1), outline=colour(i), width=line)
        text = f"{readable(name).split(',')[0]} {score}".strip()
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        pad = line
        wide, high = right - left + 2 * pad, bottom - top + 2 * pad
        at_x = min(max(x0, 0), max(width - wide, 0))
        at_y = y0 - high if y0 >= high else y0
        draw.rectangle((at_x, at_y, at_x + wide, at_y + high), fill=colour(i))
        draw.text((at_x + pad - left, at_y + pad - top), text, fill="black", font=font)
    return picture


def draw_localization(photo: PIL.Image.Image, result: Localization, *, heat: bool = True) -> PIL.Image.Image:
    """Return the photo with the best class's map and all boxes drawn, at most 1600 px a side.

    Args:
        photo: RGB picture, upright.
        result: what was found in it.
        heat: False leaves the map out.
    """
    picture = photo.copy()
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    if heat:
        picture = heat_overlay(picture, result.heat[0])
    drawn = draw_boxes(picture, result.boxes, result.names, result.scores, result.size)
    drawn.info["comment"] = OVERLAY  # Pillow writes it to a JPEG file, which is then taken for no photo
    return drawn


def _resize(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(PIL.Image.fromarray(values.astype(np.float32)).resize(size, PIL.Image.Resampling.BILINEAR))


def _blend(photo: PIL.Image.Image, tint: np.ndarray, opacity: float) -> PIL.Image.Image:
    mixed = np.asarray(photo, dtype=np.float64) * (1 - opacity) + tint * opacity
    return PIL.Image.fromarray(mixed.round().astype(np.uint8))
