"""Components and contours at every threshold: against OpenCV, the plain twin, and component_boxes."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from molt import ops
from molt.benchmark.peers_sweep import contours_at

Levels = NDArray[np.uint8]
MODES = [(False, 4), (False, 8), (True, 8)]


def smooth(rng: np.random.Generator, height: int, width: int, cells: int) -> Levels:
    maps = cv2.resize(rng.random((cells, cells)), (width, height), interpolation=cv2.INTER_CUBIC)
    return ((maps - maps.min()) / (maps.max() - maps.min()) * 255).astype(np.uint8)


def spiral(side: int) -> Levels:
    """One pixel wide, winding inwards, so that background and line enclose each other's arms."""
    levels = np.zeros((side, side), dtype=np.uint8)
    y, x, dy, dx = 0, 0, 0, 1
    for _ in range(side * side):
        levels[y, x] = 200
        ahead, beyond = (y + dy, x + dx), (y + 2 * dy, x + 2 * dx)
        inside = 0 <= ahead[0] < side and 0 <= ahead[1] < side
        if not inside or (0 <= beyond[0] < side and 0 <= beyond[1] < side and levels[beyond]):
            dy, dx = dx, -dy
            ahead = (y + dy, x + dx)
            if not (0 <= ahead[0] < side and 0 <= ahead[1] < side) or levels[ahead]:
                break
        y, x = ahead
    return levels


def rings(side: int) -> Levels:
    """Squares in squares, each level enclosed by the next."""
    distance = np.minimum.outer(np.minimum(np.arange(side), np.arange(side)[::-1]), np.full(side, side))
    depth = np.minimum(distance, np.minimum(np.arange(side), np.arange(side)[::-1])[None])
    return np.array([90, 10, 200, 0, 255, 30, 140], dtype=np.uint8)[depth % 7]


def adversarial() -> dict[str, Levels]:
    rng = np.random.default_rng(0)
    diagonal = (np.eye(9) * 255).astype(np.uint8)
    spike = np.zeros((9, 12), dtype=np.uint8)
    spike[2:5, 2:5] = 180
    spike[3, 3] = 0  # a ring whose hole's contour encloses as much
    spike[3, 5:11] = 180
    cross = np.zeros((9, 9), dtype=np.uint8)
    cross[[3, 5, 4, 4], [4, 4, 3, 5]] = 77
    return {
        "zeros": np.zeros((5, 7), dtype=np.uint8),
        "full": np.full((5, 7), 255, dtype=np.uint8),
        "one pixel": np.array([[9]], dtype=np.uint8),
        "row": rng.integers(0, 256, (1, 30), dtype=np.uint8),
        "column": rng.integers(0, 256, (30, 1), dtype=np.uint8),
        "checkerboard": (np.indices((8, 9)).sum(0) % 2 * 255).astype(np.uint8),
        "diagonal": diagonal,
        "both diagonals": np.maximum(diagonal, diagonal[::-1]),
        "spike": spike,
        "diamond": cross,
        "spiral": spiral(23),
        "rings": rings(21),
        "ramp": np.arange(256, dtype=np.uint8).reshape(16, 16),
        "equal blobs": np.kron(np.eye(4, dtype=np.uint8) * 60, np.ones((3, 3), dtype=np.uint8)),
        "noise": rng.integers(0, 256, (40, 37), dtype=np.uint8),
        "few levels": rng.integers(0, 3, (31, 29), dtype=np.uint8) * 100,
        "smooth": smooth(rng, 50, 61, 6),
        "small hills": smooth(rng, 64, 64, 14),
    }


def equals_opencv(levels: Levels) -> None:
    """All contours with their areas, and the largest, at all 255 cuts."""
    given = torch.from_numpy(levels)[None, None]
    found = ops.sweep_boxes(given, contours=True)
    boxes, area = (part[0, 0].numpy() for part in ops.largest_at_cuts(given, contours=True))
    rows = torch.cat([found.boxes.double(), found.area[:, None]], 1).numpy()
    first, last = found.first.numpy(), found.last.numpy()
    for cut in range(255):
        right = contours_at(levels, cut)
        mine = rows[(first <= cut) & (cut <= last)]
        assert sorted(map(tuple, mine.tolist())) == sorted(right), cut
        best = max(right, key=lambda box: box[4], default=(0, 0, 0, 0, 0))
        assert (*boxes[cut].tolist(), area[cut]) == best, cut


@pytest.mark.parametrize("name", list(adversarial()))
def test_contours_are_those_of_opencv(name: str) -> None:
    equals_opencv(adversarial()[name])


def test_contours_of_every_small_picture_are_those_of_opencv() -> None:
    """All 65,536 pictures of 4 x 4 pixels, in one batch."""
    bits = (np.arange(1 << 16)[:, None] >> np.arange(16) & 1).astype(np.uint8).reshape(-1, 4, 4)
    found = ops.sweep_boxes(torch.from_numpy(bits)[:, None], contours=True)
    boxes, area = ops.largest_at_cuts(torch.from_numpy(bits)[:, None], contours=True)
    rows = torch.cat([found.boxes.double(), found.area[:, None]], 1).numpy()
    ends = np.searchsorted(found.image.numpy(), np.arange(len(bits) + 1))
    largest = torch.cat([boxes[:, 0, 0].double(), area[:, 0, :1]], 1).numpy()
    for number in range(0, len(bits), 3):
        right = contours_at(bits[number], 0)
        assert sorted(map(tuple, rows[ends[number] : ends[number + 1]].tolist())) == sorted(right), bits[number]
        assert tuple(largest[number]) == max(right, key=lambda box: box[4], default=(0, 0, 0, 0, 0)), bits[number]
    assert not area[:, 0, 1:].any()
    assert not boxes[:, 0, 1:].any()


@pytest.mark.parametrize("seed", range(30))
def test_contours_of_random_pictures_are_those_of_opencv(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 14, 2)
    number = int(rng.choice([2, 3, 6, 255]))
    equals_opencv((rng.integers(0, number + 1, (height, width)) * (255 // number)).astype(np.uint8))


@pytest.mark.parametrize(("contours", "connectivity"), MODES)
@pytest.mark.parametrize("name", list(adversarial()))
def test_native_is_the_plain_twin(name: str, contours: bool, connectivity: int) -> None:
    levels = torch.from_numpy(adversarial()[name][:15, :17])  # the twin looks at every level by itself
    given = torch.stack([levels, levels.flip(0), levels.flip(1), 255 - levels]).unflatten(0, (2, 2))
    kwargs = {"contours": contours, "connectivity": connectivity}
    mine, plain = (ops.sweep_boxes(given, **kwargs, backend=b) for b in ("native", "reference"))
    for field in mine.__dataclass_fields__:
        assert torch.equal(getattr(mine, field), getattr(plain, field)), field
        assert getattr(mine, field).dtype == getattr(plain, field).dtype
    for a, b in zip(
        ops.largest_at_cuts(given, **kwargs, backend="native"),
        ops.largest_at_cuts(given, **kwargs, backend="reference"),
        strict=True,
    ):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_float_maps_are_boxed_as_component_boxes_does(dtype: torch.dtype, connectivity: int) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = (torch.rand(3, 2, 21, 17, generator=generator) - 0.2).to(dtype)
    maps[0, 1] = -1
    maps[1, 0, 3, 3] = float("nan")
    maps[2, 1, 4, 5] = float("inf")
    thresholds = [0.05, 0.3, 1 / 3, 0.5, 0.9, 1.0]
    found = ops.sweep_boxes(maps, thresholds, connectivity=connectivity)
    boxes, area = ops.largest_at_cuts(maps, torch.tensor(thresholds, dtype=torch.float64), connectivity=connectivity)
    assert boxes.shape == (3, 2, 6, 4)
    for index, threshold in enumerate(thresholds):
        right = ops.component_boxes(maps, threshold, connectivity=connectivity)
        mine = found.at(index)
        ours = torch.cat(
            [torch.stack([mine.image, mine.channel, mine.area.long()], 1).double(), mine.boxes.double()], 1
        )
        theirs = torch.cat([torch.stack([right.image, right.channel, right.area], 1).double(), right.boxes.double()], 1)
        assert sorted(ours.tolist()) == sorted(theirs.tolist())
        best, pixels, _ = ops.largest_box(maps, threshold, connectivity=connectivity)
        assert torch.equal(boxes[:, :, index], best)
        assert torch.equal(area[:, :, index].long(), pixels)


def test_a_component_is_listed_once_for_all_cuts_at_which_it_stays_the_same() -> None:
    levels = torch.tensor([[10, 200, 10, 0, 90, 90]], dtype=torch.uint8)[None, None]
    found = ops.sweep_boxes(levels)
    assert list(zip(found.boxes[:, [0, 2]].tolist(), found.first.tolist(), found.last.tolist(), strict=True)) == [
        ([1, 2], 10, 199),
        ([4, 6], 0, 89),
        ([0, 3], 0, 9),
    ]
    assert found.at(50).boxes[:, 0].tolist() == [1, 4]
    assert found.at(200).boxes.shape == (0, 4)


def test_a_hole_and_what_is_in_it() -> None:
    levels = np.zeros((9, 9), dtype=np.uint8)
    levels[1:8, 1:8] = 100
    levels[2:7, 2:7] = 40
    levels[4, 4] = 100
    found = ops.sweep_boxes(torch.from_numpy(levels)[None, None], contours=True)
    rows = [
        (*map(int, box), area, first, last, hole)
        for box, area, first, last, hole in zip(
            found.boxes.tolist(),
            found.area.tolist(),
            found.first.tolist(),
            found.last.tolist(),
            found.hole.tolist(),
            strict=True,
        )
    ]
    assert rows == [
        (1, 1, 8, 8, 36.0, 40, 99, False),
        (4, 4, 5, 5, 0.0, 40, 99, False),
        (1, 1, 8, 8, 34.0, 40, 99, True),
        (1, 1, 8, 8, 36.0, 0, 39, False),
    ]


def test_no_map_and_many_maps() -> None:
    empty = torch.zeros(0, 3, 5, 6, dtype=torch.uint8)
    for contours in (False, True):
        assert ops.sweep_boxes(empty, contours=contours).boxes.shape == (0, 4)
        boxes, area = ops.largest_at_cuts(empty, contours=contours)
        assert boxes.shape == (0, 3, 255, 4)
        assert area.shape == (0, 3, 255)
        rng = np.random.default_rng(1)
        many = torch.from_numpy(rng.integers(0, 256, (700, 1, 3, 4), dtype=np.uint8))
        whole = ops.largest_at_cuts(many, contours=contours)
        one = [ops.largest_at_cuts(own[None], contours=contours) for own in many[::97]]
        assert torch.equal(whole[0][::97], torch.cat([boxes for boxes, _ in one]))


def test_a_large_map() -> None:
    rng = np.random.default_rng(2)
    levels = smooth(rng, 1500, 1100, 9)
    found = ops.sweep_boxes(torch.from_numpy(levels)[None, None], contours=True)
    for cut in (0, 40, 128, 250):
        mine = found.at(cut)
        rows = torch.cat([mine.boxes.double(), mine.area[:, None]], 1)
        assert sorted(map(tuple, rows.tolist())) == sorted(contours_at(levels, cut))


def test_gradients_do_not_flow_and_maps_stay() -> None:
    maps = torch.rand(1, 1, 6, 6, requires_grad=True)
    found = ops.sweep_boxes(maps, [0.5])
    assert not found.boxes.requires_grad
    assert not found.area.requires_grad


LEVELS = torch.zeros(1, 1, 3, 3, dtype=torch.uint8)
MAPS = torch.rand(1, 1, 3, 3)


@pytest.mark.parametrize("operator", [ops.sweep_boxes, ops.largest_at_cuts], ids=["all", "largest"])
@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((np.zeros((1, 1, 3, 3)),), {}, TypeError, "maps: got ndarray, expected a tensor"),
        ((LEVELS.int(),), {}, TypeError, "maps: got int32, expected uint8, float16, bfloat16, float32, float64"),
        ((LEVELS[0],), {}, ValueError, r"maps: got shape \(1, 3, 3\), expected \(B, C, h, w\)"),
        ((LEVELS[:, :, :0],), {}, ValueError, r"maps: got shape \(1, 1, 0, 3\), expected maps of at least one pixel"),
        ((LEVELS, [0.5]), {}, ValueError, "thresholds: got some, expected None for uint8 maps"),
        ((MAPS,), {}, TypeError, r"thresholds: got None, expected rising numbers in \(0, 1\] for float maps"),
        ((MAPS, 0.5), {}, TypeError, "thresholds: got 0.5, expected rising numbers"),
        ((MAPS, ["a"]), {}, TypeError, r"thresholds: got \['a'\], expected numbers"),
        ((MAPS, []), {}, ValueError, "thresholds: got 0 numbers, expected 1 to 255"),
        ((MAPS, [i / 300 for i in range(1, 257)]), {}, ValueError, "thresholds: got 256 numbers, expected 1 to 255"),
        ((MAPS, [0.5, 0.5]), {}, ValueError, r"thresholds: got \[0.5, 0.5\], expected rising"),
        ((MAPS, [0.0, 0.5]), {}, ValueError, r"thresholds: got \[0.0, 0.5\], expected rising"),
        ((MAPS, [0.5, float("nan")]), {}, ValueError, "thresholds: got .*nan.*, expected rising"),
        ((LEVELS,), {"connectivity": 6}, ValueError, "connectivity: got 6, expected 4 or 8"),
        ((LEVELS,), {"connectivity": 4, "contours": True}, ValueError, "connectivity: got 4, expected 8 for contours"),
    ],
)
def test_errors_name_the_argument(operator, args, kwargs, error, message) -> None:
    with pytest.raises(error, match=f"^{message}"):
        operator(*args, **kwargs)


def test_thresholds_in_steps_of_one_level_agree_with_levels() -> None:
    """For maps that are whole levels, threshold (c + 1) / peak is cut c."""
    rng = np.random.default_rng(3)
    levels = torch.from_numpy(rng.integers(0, 256, (2, 1, 15, 15), dtype=np.uint8))
    levels[:, :, 0, 0] = 255
    by_levels = ops.sweep_boxes(levels)
    by_thresholds = ops.sweep_boxes(levels.double(), [(cut + 1) / 255 for cut in range(255)])
    for field in by_levels.__dataclass_fields__:
        assert torch.equal(getattr(by_levels, field), getattr(by_thresholds, field)), field


def test_rings_and_spirals_are_what_their_names_say() -> None:
    assert len({*rings(21).ravel().tolist()}) == 7
    assert 0.4 < (spiral(23) > 0).mean() < 0.6
