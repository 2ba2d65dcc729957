"""The plain sweep over cuts against OpenCV's contours and SciPy's components, cut by cut."""

from __future__ import annotations

from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from scipy import ndimage

from molt.ops import _sweep_reference as sweep

Found = tuple[tuple[int, int, int, int], float]


def opencv(mask: np.ndarray) -> list[Found]:
    """Box and area of every contour, in OpenCV's order."""
    contours = cv2.findContours(mask.astype(np.uint8) * 255, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    rects = [cv2.boundingRect(contour) for contour in contours]
    return [((x, y, x + w, y + h), cv2.contourArea(c)) for (x, y, w, h), c in zip(rects, contours, strict=True)]


def swept(levels: np.ndarray, contours: bool = True, connectivity: int = 8) -> list[tuple]:
    """The rows of one map as plain values: box, area, first, last, hole."""
    found = sweep.sweep_boxes(torch.from_numpy(levels)[None, None], contours, connectivity)
    boxes, area, first, last, hole, image, channel = (tensor.tolist() for tensor in found)
    assert set(image) <= {0} and set(channel) <= {0}
    return [(tuple(box), *rest) for box, *rest in zip(boxes, area, first, last, hole, strict=True)]


def largest(levels: np.ndarray, contours: bool = True, connectivity: int = 8) -> list[Found]:
    boxes, area = sweep.largest_at_cuts(torch.from_numpy(levels)[None, None], contours, connectivity)
    assert boxes.shape == (1, 1, 255, 4) and area.shape == (1, 1, 255)
    return [(tuple(box), size) for box, size in zip(boxes[0, 0].tolist(), area[0, 0].tolist(), strict=True)]


def all_masks(rng: np.random.Generator) -> list[np.ndarray]:
    """Some of the 65536 binary 4x4 images; all of them agree too, which takes 40 s."""
    bits = np.arange(16)
    return [((number >> bits) & 1).astype(bool).reshape(4, 4) for number in rng.permutation(65536)[:2500]]


def random_masks(rng: np.random.Generator) -> list[np.ndarray]:
    shapes = [(1, 1), (1, 9), (9, 1), (2, 7), (5, 5), (11, 8), (17, 13)]
    return [rng.random(shape) < share for shape in shapes for share in (0.3, 0.5, 0.7, 0.8, 0.9) for _ in range(8)]


@pytest.mark.parametrize("masks", [all_masks, random_masks])
def test_a_mask_has_the_contours_that_opencv_finds(masks) -> None:
    holes = 0
    for mask in masks(np.random.default_rng(0)):
        rows = swept(mask.astype(np.uint8))
        expected = opencv(mask)
        assert Counter((box, area) for box, area, *_ in rows) == Counter(expected), mask.astype(int)
        assert all((first, last) == (0, 0) for _, _, first, last, _ in rows)
        holes += sum(row[4] for row in rows)
        winner = max(expected, key=lambda found: found[1], default=((0, 0, 0, 0), 0))
        assert largest(mask.astype(np.uint8))[0] == winner, mask.astype(int)
    assert holes > 50


def maps(rng: np.random.Generator) -> list[np.ndarray]:
    """Few and many levels, the lowest and highest among them, smooth and rough."""
    rough = [rng.integers(0, top, (7, 9)) for top in (2, 4, 9)]
    smooth = ndimage.gaussian_filter(rng.random((12, 10)), 1.5)
    smooth = np.trunc((smooth - smooth.min()) / np.ptp(smooth) * 255)
    return [m.astype(np.uint8) for m in (*rough, smooth, rng.choice([0, 1, 254, 255], (6, 6)), rough[2] * 30)]


@pytest.mark.parametrize("seed", range(3))
def test_every_cut_has_the_contours_that_opencv_finds(seed: int) -> None:
    for levels in maps(np.random.default_rng(seed)):
        rows, best = swept(levels), largest(levels)
        for cut in range(255):
            expected = opencv(levels > cut)
            assert Counter(row[:2] for row in rows if row[2] <= cut <= row[3]) == Counter(expected)
            assert best[cut] == max(expected, key=lambda found: found[1], default=((0, 0, 0, 0), 0))


@pytest.mark.parametrize("connectivity", [4, 8])
def test_every_cut_has_the_components_that_scipy_finds(connectivity: int) -> None:
    for levels in maps(np.random.default_rng(9)):
        rows, best = swept(levels, False, connectivity), largest(levels, False, connectivity)
        assert not any(row[4] for row in rows)
        for cut in range(255):
            labels, count = ndimage.label(levels > cut, np.ones((3, 3)) if connectivity == 8 else None)
            expected = [
                ((x.start, y.start, x.stop, y.stop), float((labels == i + 1).sum()))
                for i, (y, x) in enumerate(ndimage.find_objects(labels))
            ]
            assert Counter(row[:2] for row in rows if row[2] <= cut <= row[3]) == Counter(expected)
            # SciPy numbers components by their first pixel, and max takes the first of equals.
            assert best[cut] == max(expected, key=lambda found: found[1], default=((0, 0, 0, 0), 0))


def test_rows_are_as_long_as_they_can_be() -> None:
    levels = np.zeros((5, 9), dtype=np.uint8)
    levels[1:4, 1:4] = 200  # a ring around a pixel that closes at cut 90
    levels[2, 2] = 90
    levels[2, 6] = 120  # apart from it, and changing nothing about it
    assert swept(levels) == [
        ((1, 1, 4, 4), 4.0, 90, 199, False),
        ((1, 1, 4, 4), 2.0, 90, 199, True),
        ((6, 2, 7, 3), 0.0, 0, 119, False),
        ((1, 1, 4, 4), 4.0, 0, 89, False),
    ], "at cut 90 the component loses a pixel, which nobody sees from outside"
    assert swept(levels, contours=False) == [
        ((1, 1, 4, 4), 8.0, 90, 199, False),
        ((6, 2, 7, 3), 1.0, 0, 119, False),
        ((1, 1, 4, 4), 9.0, 0, 89, False),
    ]


def test_rows_go_by_image_channel_last_cut_and_first_pixel() -> None:
    levels = torch.from_numpy(np.random.default_rng(3).integers(0, 5, (2, 3, 6, 7)).astype(np.uint8))
    _, _, first, last, hole, image, channel = sweep.sweep_boxes(levels, True, 8)
    order = list(zip(image.tolist(), channel.tolist(), (-last).tolist(), hole.tolist(), strict=True))
    assert order == sorted(order) and len(set(zip(image.tolist(), channel.tolist(), strict=True))) == 6
    assert hole.any() and (first <= last).all() and (last <= 254).all()
    pair = swept(np.array([[0, 0, 0, 7], [7, 0, 0, 0]], dtype=np.uint8))
    assert [row[0] for row in pair] == [(3, 0, 4, 1), (0, 1, 1, 2)]


def test_types_and_nothing_to_find() -> None:
    levels = torch.zeros(2, 2, 3, 4, dtype=torch.uint8)
    found = sweep.sweep_boxes(levels, True, 8)
    assert [tuple(t.shape) for t in found] == [(0, 4)] + [(0,)] * 6
    kinds = [torch.float32, torch.float64, torch.int64, torch.int64, torch.bool, torch.int64, torch.int64]
    assert [t.dtype for t in found] == kinds
    boxes, area = sweep.largest_at_cuts(levels, True, 8)
    assert boxes.dtype == torch.float32 and area.dtype == torch.float64 and not boxes.any() and not area.any()
    assert sweep.largest_at_cuts(levels[:0], True, 8)[0].shape == (0, 2, 255, 4)
