"""One composite for composites.py: cut-outs on a crop of a background, with exact masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageFilter
import PIL.ImageOps
from composites_sources import THRESHOLD, Background, Cutout
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
TRIES = 400


@dataclass(frozen=True)
class Knobs:
    """How composites are made; areas are shares of the photo that a mask covers before truncation.

    Attributes:
        size: side of the square photos in pixels.
        area_one: the object's area in a one-object photo, log-uniform.
        area_two: the labelled object's area in a two-object photo, log-uniform.
        upscale: the most that a cut-out is enlarged, by side; what cannot reach the smallest area is not used.
        ratio: the most by which the two visible areas differ.
        overlap: the most of the smaller mask that the other may share before one hides the other.
        overhang: the most of an object's width and height beyond the frame; positions are uniform.
        visible: the least of an object's mask that is in the photo and not hidden.
        crop: the least share of the background's shorter side that is its crop's side (never enlarged).
        match: how far the object's mean brightness and contrast go towards those of the ground around it.
        feather: radius in pixels of the Gaussian that softens alpha, inwards only.
        quality: of the JPEG, without chroma subsampling.
    """

    size: int = 336
    area_one: tuple[float, float] = (0.05, 0.45)
    area_two: tuple[float, float] = (0.05, 0.2)
    upscale: float = 1.75
    ratio: float = 1.5
    overlap: float = 0.05
    overhang: float = 0.1
    visible: float = 0.85
    crop: float = 0.4
    match: float = 0.3
    feather: float = 0.8
    quality: int = 95


@dataclass(frozen=True, eq=False)
class Scene:
    """A composite: (S, S, 3) uint8 pixels and one (S, S) mask of visible pixels an object, the labelled one first."""

    pixels: NDArray[np.uint8]
    masks: tuple[Mask, ...]


@dataclass(frozen=True, eq=False)
class _Placed:
    """A cut-out at its size and place: colour and alpha inside the frame, its corner, and its mask on the photo."""

    colour: NDArray[np.uint8]
    alpha: NDArray[np.uint8]
    corner: tuple[int, int]
    mask: Mask
    whole: int  # mask pixels before the frame cuts some off


class NoRoom(ValueError):
    """Two cut-outs for which no sizes and places were found that obey the rules."""


def largest_area(cutout: Cutout, knobs: Knobs) -> float:
    """Return the largest share of the photo that a cut-out may cover: it must fit the frame and not be blurred."""
    height, width = cutout.pixels.shape[:2]
    scale = min(knobs.upscale, knobs.size / max(height, width))
    return cutout.area * (scale / knobs.size) ** 2


def compose(background: Background, cutouts: Sequence[Cutout], knobs: Knobs, rng: np.random.Generator) -> Scene:
    """Return a composite of one or two cut-outs, the labelled one first; which of two is in front is drawn.

    Raises:
        NoRoom: no arrangement obeys the knobs after 400 tries.
    """
    ground = _crop(background, knobs, rng)
    placed, front = _arrange(cutouts, knobs, rng)
    pixels = ground.astype(np.float32)
    for which in [i for i in range(len(placed)) if i != front] + [front]:
        _paste(pixels, ground, placed[which], knobs)
    masks = tuple(_visible(placed, which, front) for which in range(len(placed)))
    return Scene(pixels.round().clip(0, 255).astype(np.uint8), masks)


def box_of(mask: Mask) -> tuple[int, int, int, int]:
    """Return the box xyxy of a mask's pixels as edges, so that one pixel at the origin is (0, 0, 1, 1)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _crop(background: Background, knobs: Knobs, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return a square crop at the photo's size, flipped half of the time."""
    height, width = background.pixels.shape[:2]
    short = min(height, width)
    side = int(rng.integers(max(knobs.size, math.ceil(knobs.crop * short)), short + 1))
    x, y = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
    crop = PIL.Image.fromarray(background.pixels[y : y + side, x : x + side])
    crop = crop.resize((knobs.size, knobs.size), PIL.Image.Resampling.BICUBIC)
    pixels = np.asarray(crop)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def _arrange(cutouts: Sequence[Cutout], knobs: Knobs, rng: np.random.Generator) -> tuple[tuple[_Placed, ...], int]:
    """Return the placed cut-outs and which is in front."""
    low, high = knobs.area_one if len(cutouts) == 1 else knobs.area_two
    reach = [largest_area(cutout, knobs) for cutout in cutouts]
    for _ in range(TRIES):
        front = int(rng.integers(len(cutouts)))
        areas = [_log_uniform(low, min(high, reach[0]), rng)]
        if len(cutouts) == 2:
            bounds = max(low, areas[0] / knobs.ratio), min(reach[1], areas[0] * knobs.ratio)
            if bounds[0] > bounds[1]:
                continue
            areas.append(_log_uniform(*bounds, rng))
        placed = tuple(_place(cutout, area, knobs, rng) for cutout, area in zip(cutouts, areas, strict=True))
        if _allowed(placed, front, knobs):
            return placed, front
    raise NoRoom(" and ".join(cutout.name for cutout in cutouts))


def _log_uniform(low: float, high: float, rng: np.random.Generator) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(max(low, high))))


def _place(cutout: Cutout, area: float, knobs: Knobs, rng: np.random.Generator) -> _Placed:
    """Resize, flip half of the time, soften and place a cut-out."""
    scale = knobs.size * math.sqrt(area / cutout.area)
    height, width = (max(1, min(knobs.size, round(side * scale))) for side in cutout.pixels.shape[:2])
    # Pillow resizes RGBA with its colours premultiplied, so what is transparent does not bleed in.
    stamp = PIL.Image.fromarray(cutout.pixels).resize((width, height), PIL.Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        stamp = stamp.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    alpha = np.asarray(stamp.getchannel("A"))
    border = math.ceil(4 * knobs.feather)
    soft = PIL.ImageOps.expand(stamp.getchannel("A"), border).filter(PIL.ImageFilter.GaussianBlur(knobs.feather))
    # Inwards only: outwards there would be no colour to show.
    alpha = np.minimum(alpha, np.asarray(soft)[border : border + height, border : border + width])
    colour = np.asarray(stamp)[..., :3]
    x, y = (_position(side, knobs, rng) for side in (width, height))
    inside = np.s_[max(0, -y) : knobs.size - y, max(0, -x) : knobs.size - x]
    corner = max(0, y), max(0, x)
    mask = np.zeros((knobs.size, knobs.size), bool)
    kept = alpha[inside] >= THRESHOLD
    mask[corner[0] : corner[0] + kept.shape[0], corner[1] : corner[1] + kept.shape[1]] = kept
    return _Placed(colour[inside], alpha[inside], corner, mask, int((alpha >= THRESHOLD).sum()))


def _position(side: int, knobs: Knobs, rng: np.random.Generator) -> int:
    """Return the place of an object's first row or column: anywhere, up to the overhang beyond the frame."""
    beyond = int(knobs.overhang * side)
    return int(rng.integers(-beyond, knobs.size - side + beyond + 1))


def _visible(placed: Sequence[_Placed], which: int, front: int) -> Mask:
    mask = placed[which].mask
    return mask if which == front else mask & ~placed[front].mask


def _allowed(placed: Sequence[_Placed], front: int, knobs: Knobs) -> bool:
    """Return whether enough of every object is seen and two of them are about as large and hardly overlap."""
    seen = [int(_visible(placed, which, front).sum()) for which in range(len(placed))]
    if any(area < max(1.0, knobs.visible * each.whole) for area, each in zip(seen, placed, strict=True)):
        return False
    if len(placed) == 1:
        return True
    shared = int((placed[0].mask & placed[1].mask).sum())
    smaller = min(int(each.mask.sum()) for each in placed)
    return shared <= knobs.overlap * smaller and max(seen) <= knobs.ratio * min(seen)


def _paste(pixels: NDArray[np.float32], ground: NDArray[np.uint8], placed: _Placed, knobs: Knobs) -> None:
    """Paste a cut-out, its brightness and contrast brought nearer to those of the ground it covers."""
    height, width = placed.alpha.shape
    window = np.s_[placed.corner[0] : placed.corner[0] + height, placed.corner[1] : placed.corner[1] + width]
    kept = placed.alpha >= THRESHOLD
    weights = np.array([0.299, 0.587, 0.114], np.float32)
    colour = placed.colour.astype(np.float32)
    own, around = (colour @ weights)[kept], ground[window].astype(np.float32) @ weights
    contrast = 1 + knobs.match * (float(np.clip(around.std() / max(own.std(), 1.0), 0.5, 2.0)) - 1)
    shift = knobs.match * float(around.mean() - own.mean())
    # The same change to red, green and blue keeps the hue about as it was.
    matched = np.clip((colour - own.mean()) * contrast + own.mean() + shift, 0, 255)
    opacity = placed.alpha[..., None].astype(np.float32) / 255
    pixels[window] += opacity * (matched - pixels[window])
