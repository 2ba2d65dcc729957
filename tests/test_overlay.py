"""Pictures: the right pixels are coloured, and nothing leaves the frame."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch

from molt import Localization
from molt.overlay import MAX_SIDE, cluster_overlay, colour, draw_boxes, draw_localization, heat_overlay

GREY = (128, 128, 128)


def grey(width: int, height: int) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (width, height), GREY)


def test_heat_grows_lighter_and_fits_the_photo() -> None:
    heat = torch.linspace(0, 1, 16).expand(4, 16)
    picture = heat_overlay(grey(160, 90), heat)
    light = np.asarray(picture.convert("L"), dtype=float).mean(0)
    assert picture.size == (160, 90)
    assert (np.diff(light) > -1).all() and light[-1] > light[0] + 60


def test_clusters_have_colours_of_their_own() -> None:
    labels = torch.tensor([[0, 1], [2, 9]], dtype=torch.int32)
    pixels = np.asarray(cluster_overlay(grey(40, 40), labels))
    corners = {tuple(pixels[y, x]) for y in (5, 35) for x in (5, 35)}
    assert len(corners) == 3, "label 9 repeats the colour of label 1"
    assert len({colour(i) for i in range(8)}) == 8


def test_box_lies_where_it_should() -> None:
    picture = grey(200, 100)
    before = picture.tobytes()
    drawn = np.asarray(draw_boxes(picture, torch.tensor([[100.0, 100, 300, 180]]), ["cat"], None, (400, 200)))
    edge = (drawn == colour(0)).all(-1)
    assert edge[51:89, 50].all() and edge[51:89, 149].all() and edge[89, 51:149].all()
    assert not edge[60:80, 60:140].any() and not edge[:, 152:].any()
    assert picture.tobytes() == before, "the photo itself is left alone"


@pytest.mark.parametrize("size", [(1, 1), (3, 700), (700, 3), (40, 30)])
def test_any_frame_takes_any_box(size: tuple[int, int]) -> None:
    box = torch.tensor([[0.0, 0, *size], [-5, -5, 2 * size[0], 2 * size[1]]])
    drawn = draw_boxes(grey(*size), box, ["a very long name, another", "x"], [0.5, 1.0])
    assert drawn.size == size and drawn.tobytes() != grey(*size).tobytes()


def test_big_photos_are_drawn_small() -> None:
    result = Localization(
        boxes=torch.tensor([[0.0, 0, 2000, 3000]]),
        classes=torch.tensor([0]),
        names=["x"],
        scores=torch.tensor([1.0]),
        size=(4000, 3000),
        heat=torch.rand(1, 8, 8),
        clusters=torch.zeros(8, 8, dtype=torch.int32),
    )
    picture = draw_localization(grey(4000, 3000), result)
    assert picture.size == (MAX_SIDE, MAX_SIDE * 3 // 4)
    plain = np.asarray(draw_localization(grey(4000, 3000), result, heat=False))
    assert tuple(plain[600, 1500]) == GREY
