"""The truth of a photo, pixel by pixel, from its mask files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from molt.data.annotations import Sample
from molt.data.images import load_photo


def read_masks(sample: Sample, size: int) -> NDArray[np.uint8]:
    """Return the (size, size) truth of a photo: 1 in any of its masks, 255 to ignore, else 0.

    Resized to the nearest pixel as OpenCV does (:func:`nearest`); a pixel counts from a grey of 1 on.

    Raises:
        PhotoError: a mask that cannot be read.
    """

    def load(path: Path) -> NDArray[np.bool_]:
        grey = np.asarray(load_photo(path).convert("L"))
        rows, columns = (nearest(side, size) for side in grey.shape)
        return np.asarray(grey[rows[:, None], columns] > 0)

    truth = np.zeros((size, size), np.uint8)
    if sample.ignore is not None:
        truth[load(sample.ignore)] = 255
    for path in sample.masks:
        truth[load(path)] = 1
    return truth


def nearest(old: int, new: int) -> NDArray[np.int64]:
    """Return which of ``old`` pixels each of ``new`` takes where OpenCV resizes to the nearest.

    In double precision and in OpenCV's order, floor(i * (1 / (new / old))): where i * old / new is whole, how that is
    rounded decides.
    """
    at = np.floor(np.arange(new) * (1.0 / (new / old))).astype(np.int64)
    return np.asarray(np.minimum(at, old - 1))
