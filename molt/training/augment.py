"""What happens to a photo before the pyramid of scales is made, so that all scales see the same view of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as ops

from molt._arguments import LARGEST_SEED, check_int, check_number
from molt.data.images import _from_file, is_file, load_photo, read_photo
from molt.ops._checks import check_size

Geometry = Literal["squash", "resized-crop", "inner-crop"]


def _range(name: str, value: Any, low: float, high: float) -> tuple[float, float]:
    """Return (least, greatest) as floats, above 0 and in [low, high]."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise TypeError(f"{name} must be (least, greatest), got {value!r}")
    first, last = (check_number(name, end, above=0) for end in value)
    if not low <= first <= last <= high:
        raise ValueError(f"{name} must be (least, greatest) in [{low:g}, {high:g}], got ({first:g}, {last:g})")
    return first, last


@dataclass(frozen=True)
class Augmentation:
    """How a view is drawn from a photo; plain values, which :meth:`settings` gives as JSON knows them.

    Attributes:
        geometry: ``squash`` brings the sides of the whole photo to the view's; ``resized-crop`` does so with a random
            part of it (RandomResizedCrop: Szegedy et al., CVPR 2015, section 6); ``inner-crop`` squashes it somewhat
            larger and cuts the view out of it at random (TS-CAM: Gao et al., ICCV 2021).
        area: least and greatest share of the photo's area in a ``resized-crop``, in (0, 1].
        ratio: least and greatest width over height of a ``resized-crop``, in the photo's pixels, in [0.1, 10].
        margin: sides of the squashed photo over the view's in an ``inner-crop``, in [1, 4].
        flip: probability of mirroring left and right, in [0, 1].
        jitter: strength of colour changes in [0, 1], 0 for none: brightness, contrast and saturation are multiplied by
            factors in [1 - jitter, 1 + jitter], hue is turned by up to jitter / 4 of a full turn, in random order.

    Raises:
        TypeError, ValueError: a field of another type or out of range.
    """

    geometry: Geometry = "squash"
    area: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    margin: float = 256 / 224
    flip: float = 0.5
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.geometry not in get_args(Geometry):
            raise ValueError(f"geometry must be one of {', '.join(get_args(Geometry))}, got {self.geometry!r}")
        for name, low, high in (("area", 0.0, 1.0), ("ratio", 0.1, 10.0)):
            object.__setattr__(self, name, _range(name, getattr(self, name), low, high))
        for name, low, high in (("margin", 1.0, 4.0), ("flip", 0.0, 1.0), ("jitter", 0.0, 1.0)):
            number = check_number(name, getattr(self, name))
            if not low <= number <= high:
                raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {number:g}")
            object.__setattr__(self, name, number)

    def settings(self) -> dict[str, Any]:
        """Return the fields as JSON knows them; :func:`find_augmentation` takes them back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @property
    def random(self) -> bool:
        """Whether two views of a photo may differ."""
        return self.geometry != "squash" or self.flip > 0 or self.jitter > 0


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": Augmentation(flip=0.0),
    "flip": Augmentation(),
    "crop": Augmentation("resized-crop"),
    "ts-cam": Augmentation("inner-crop"),
}


def find_augmentation(value: Any) -> Augmentation:
    """Return an augmentation by the name of a preset, by its settings, or as it is.

    Raises:
        TypeError, ValueError: an unknown name or field, another type, or a field out of range.
    """
    if isinstance(value, Augmentation):
        return value
    if isinstance(value, Mapping):
        known = [field.name for field in fields(Augmentation)]
        if unknown := sorted(str(key) for key in value if key not in known):
            raise ValueError(f"augmentation has the fields {', '.join(known)}, got {', '.join(unknown)}")
        return Augmentation(**value)
    if not isinstance(value, str):
        raise TypeError(f"augmentation must be an Augmentation, a name or a dict, got {type(value).__name__}")
    if value not in AUGMENTATIONS:
        raise ValueError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}, got {value!r}")
    return AUGMENTATIONS[value]


def stable_generator(*parts: str | int) -> torch.Generator:
    """Return a generator on the CPU, seeded from ``parts`` alone, the same in every process."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def view(source: Any, size: Sequence[int], augmentation: Augmentation, *, seed: int, epoch: int, index: int) -> Tensor:
    """Return a view (3, H, W) float32 in [0, 1] of a photo, decided by seed, epoch and index alone.

    Of a JPEG no more is decoded than the view can show: a part that is enlarged has all of the file's pixels.

    Args:
        source: as for :func:`molt.data.load_photo`; a tensor's crop is made of 8 bits a channel.
        size: (H, W) of the view in pixels, of the finest scale.
        augmentation: what to do.
        seed: from 0.
        epoch: from 0.
        index: of the photo, its place in its set.

    Raises:
        PhotoError: the photo cannot be read.
        TypeError, ValueError: an argument of another type or out of range.
    """
    height, width = check_size(size)
    if not isinstance(augmentation, Augmentation):
        raise TypeError(f"augmentation must be an Augmentation, got {type(augmentation).__name__}")
    for name, number in (("seed", seed), ("epoch", epoch), ("index", index)):
        check_int(name, number, 0, LARGEST_SEED)
    generator = stable_generator("view", seed, epoch, index)
    # The flip is drawn first, so that it stays where only the crop is changed.
    flipped = _uniform(generator, 0, 1) < augmentation.flip
    if augmentation.geometry == "resized-crop":
        picture = _picture(source, (height, width), augmentation)
        place = _crop(generator, picture.size, augmentation)
        picture = ops.resized_crop(picture, *place, [height, width], ops.InterpolationMode.BICUBIC)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    elif augmentation.geometry == "inner-crop":
        outer = [max(side, round(side * augmentation.margin)) for side in (height, width)]
        top, left = (_integer(generator, a - b) for a, b in zip(outer, (height, width), strict=True))
        pixels = ops.crop(read_photo(source, outer).pixels, top, left, height, width)
    else:
        pixels = read_photo(source, (height, width)).pixels
    if flipped:
        pixels = ops.horizontal_flip(pixels)
    if augmentation.jitter > 0:
        pixels = _change_colours(generator, pixels, augmentation.jitter)
    return pixels.contiguous()


def _picture(source: Any, size: tuple[int, int], augmentation: Augmentation) -> PIL.Image.Image:
    """Return a photo of which every crop that may be drawn has at least the view's sides, or all the file's pixels."""
    if not is_file(source):
        return load_photo(source)
    low, high = augmentation.ratio
    # A crop of a share a of the area has at least a share a of either side; without one that fits it is cut to ratio.
    least = min(augmentation.area[0], high, 1 / low)
    wanted = math.ceil(max(size) / least) + 1
    return _from_file(source, (wanted, wanted))[0]


def _crop(generator: torch.Generator, size: tuple[int, int], augmentation: Augmentation) -> tuple[int, int, int, int]:
    """Return a random crop (top, left, height, width) of a picture of ``size`` (width, height).

    As RandomResizedCrop draws it: ten attempts, then the largest one in the middle.
    """
    width, height = size
    low, high = augmentation.ratio
    for _ in range(10):
        area = width * height * _uniform(generator, *augmentation.area)
        ratio = math.exp(_uniform(generator, math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return _integer(generator, height - h), _integer(generator, width - w), h, w
    w = min(width, max(1, round(height * high)))
    h = min(height, max(1, round(width / low)))
    return (height - h) // 2, (width - w) // 2, h, w


def _change_colours(generator: torch.Generator, pixels: Tensor, strength: float) -> Tensor:
    low, high = 1 - strength, 1 + strength
    changes = [
        (ops.adjust_brightness, _uniform(generator, low, high)),
        (ops.adjust_contrast, _uniform(generator, low, high)),
        (ops.adjust_saturation, _uniform(generator, low, high)),
        (ops.adjust_hue, _uniform(generator, -strength / 4, strength / 4)),
    ]
    for place in torch.randperm(len(changes), generator=generator).tolist():
        change, amount = changes[place]
        pixels = change(pixels, amount)
    return pixels.clamp(0, 1)


def _uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator, dtype=torch.float64))


def _integer(generator: torch.Generator, most: int) -> int:
    return int(torch.randint(most + 1, (), generator=generator))


__all__ = ["AUGMENTATIONS", "Augmentation", "find_augmentation", "stable_generator", "view"]
