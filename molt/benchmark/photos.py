"""Decoded photos for `molt benchmark --end-to-end`: a folder's, scikit-image's, or made ones."""

from __future__ import annotations

import csv
import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from molt.data.images import Photo, PhotoError, find_photos, read_photo
from molt.data.samples import sample_photos

logger = logging.getLogger("molt")

BOXES = "boxes.csv"
MADE = 8
MOST = 256  # photos held at a time, 2.4 MB each at 448 px


@dataclass(frozen=True, eq=False)
class Photos:
    """Photos at one size.

    Attributes:
        source: where they are from, in words.
        images: (N, 3, H, W) float32 RGB in [0, 1], on the CPU, N at least 1.
        boxes: the true boxes of each photo, (n, 4) float32 xyxy in pixels of ``images``; None where there are none.
    """

    source: str
    images: Tensor
    boxes: tuple[Tensor, ...] | None = None

    def batch(self, number: int, device: torch.device | str) -> Tensor:
        """Return ``number`` photos on a device, the first ones again where there are fewer."""
        return self.images[torch.arange(number) % len(self.images)].to(device)


def as_photo(image: Tensor) -> Photo:
    """Return a decoded photo (3, H, W) as the Localizer has it, without a copy."""
    return Photo(image, (image.shape[2], image.shape[1]), image)


def load(folder: Path | None, size: tuple[int, int]) -> Photos:
    """Return the photos of a folder; without one scikit-image's samples, and where those are missing made ones.

    Args:
        folder: of photos, with their true boxes in boxes.csv as benchmarks/photos/fetch.py writes it, or without.
        size: (H, W) in pixels that they are resized to, their sides squashed.

    Raises:
        ValueError: a folder without photos, or boxes.csv that is another table, or of other photos.
    """
    if folder is not None:
        return _from_folder(folder, size)
    try:
        samples = [sample.path for sample in sample_photos()]
    except FileNotFoundError:
        return Photos("made from a seed", made(size))
    return Photos("scikit-image's samples", torch.stack([read_photo(path, size).pixels for path in samples]))


def _from_folder(folder: Path, size: tuple[int, int]) -> Photos:
    paths = find_photos(folder)[0] if folder.is_dir() else []
    if not paths:
        raise ValueError(f"{folder} holds no photos; benchmarks/photos/fetch.py fetches some")
    table = folder / BOXES
    if not table.is_file():
        read = _read(paths, size)
        return Photos(folder.name, torch.stack([photo.pixels for _, photo in read]))
    by_name: dict[str, list[list[float]]] = defaultdict(list)
    with table.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            try:
                by_name[line["photo"]].append([float(line[side]) for side in ("x0", "y0", "x1", "y1")])
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{table}: expected columns photo, x0, y0, x1, y1, got {line}") from None
    paths = [path for path in paths if path.stem in by_name]
    if not paths:
        raise ValueError(f"{table} names none of the photos beside it")
    images, boxes = [], []
    for path, photo in _read(paths, size):
        scale = torch.tensor([size[1] / photo.size[0], size[0] / photo.size[1]]).repeat(2)
        images.append(photo.pixels)
        boxes.append(torch.tensor(by_name[path.stem]) * scale)
    return Photos(folder.name, torch.stack(images), tuple(boxes))


def _read(paths: list[Path], size: tuple[int, int]) -> list[tuple[Path, Photo]]:
    """Return the photos that can be read, the first ``MOST`` of them."""
    found: list[tuple[Path, Photo]] = []
    for path in paths:
        if len(found) == MOST:
            logger.warning("%s: only the first %d photos are used", path.parent, MOST)
            break
        try:
            found.append((path, read_photo(path, size)))
        except (PhotoError, OSError) as error:
            logger.warning("left out: %s", error)
    if not found:
        raise ValueError(f"{paths[0].parent}: none of its photos can be read")
    return found


def made(size: tuple[int, int]) -> Tensor:
    """Return images (B, 3, H, W) of smooth noise with a bright disc each, from a seed."""
    generator = torch.Generator().manual_seed(0)
    ground = 0.4 * torch.rand(MADE, 3, 8, 8, generator=generator)
    centres = torch.rand(MADE, 2, 1, 1, generator=generator) * 0.4 + 0.3
    rows, columns = torch.meshgrid(*((torch.arange(side) + 0.5) / side for side in size), indexing="ij")
    disc = (rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2 < 0.04
    images = F.interpolate(ground, size, mode="bilinear", align_corners=False)
    return torch.where(disc[:, None], torch.tensor([0.9, 0.6, 0.2]).view(1, 3, 1, 1), images)
