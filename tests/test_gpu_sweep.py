"""The threshold sweep on a GPU against the CPU: the same rows, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from molt import ops

pytestmark = pytest.mark.gpu

COLUMNS = ("boxes", "area", "first", "last", "hole", "image", "channel")
SHAPES = [
    (1, 1, 1, 1),
    (3, 2, 7, 7),
    (2, 1, 1, 3000),
    (2, 1, 3000, 1),
    (3, 2, 45, 46),
    (2, 2, 224, 224),
    (1, 1, 300, 333),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def smooth(shape: tuple[int, ...]) -> Tensor:
    maps = torch.nn.functional.interpolate(torch.rand(*shape[:2], 14, 14), shape[2:], mode="bicubic")
    return (maps.clamp(0, 1) * 255).byte()


def kinds(shape: tuple[int, ...]) -> dict[str, Tensor]:
    y, x = torch.meshgrid(torch.arange(shape[2]), torch.arange(shape[3]), indexing="ij")
    board = ((y + x) % 2 * 150 + 1).byte().expand(shape)
    return {
        "smooth": smooth(shape),
        "noise": torch.randint(256, shape, dtype=torch.uint8),
        "few": torch.randint(4, shape, dtype=torch.uint8) * 85,
        "board": board,
        "full": torch.full(shape, 255, dtype=torch.uint8),
        "black": torch.zeros(shape, dtype=torch.uint8),
        "walls": ((x % 2 == 0) * 200 + (y == shape[2] - 1) * 20).byte().expand(shape),
        "growing up": (y * 255 // shape[2]).byte().expand(shape),
    }


def agree(levels: Tensor, connectivity: int) -> None:
    want = ops.sweep_boxes(levels, connectivity=connectivity)
    found = ops.sweep_boxes(levels.cuda(), connectivity=connectivity)
    for name in COLUMNS:
        ours, theirs = getattr(found, name), getattr(want, name)
        assert ours.is_cuda and ours.dtype == theirs.dtype
        assert torch.equal(ours.cpu(), theirs), name
    boxes, area = ops.largest_at_cuts(levels.cuda(), connectivity=connectivity)
    expected = ops.largest_at_cuts(levels, connectivity=connectivity)
    assert boxes.is_cuda and torch.equal(boxes.cpu(), expected[0])
    assert torch.equal(area.cpu(), expected[1])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("connectivity", [4, 8])
def test_agrees_with_the_cpu(shape: tuple[int, ...], connectivity: int) -> None:
    for levels in kinds(shape).values():
        agree(levels, connectivity)


@pytest.mark.parametrize("side", [448, 1024])
def test_large_maps_agree_with_the_cpu(side: int) -> None:
    for levels in kinds((1, 1, side, side)).values():
        agree(levels, 8)


def test_views_agree_with_the_cpu() -> None:
    agree(smooth((4, 3, 50, 60)).transpose(2, 3)[::2, 1:], 8)
    agree(smooth((2, 3, 50, 60)).contiguous(memory_format=torch.channels_last), 8)


def test_more_maps_than_go_at_once() -> None:
    few = torch.cat([smooth((3, 1, 224, 224)), torch.randint(256, (2, 1, 224, 224), dtype=torch.uint8)])
    one = ops.sweep_boxes(few.cuda())
    all_rows = ops.sweep_boxes(few.cuda().repeat(100, 1, 1, 1))
    rows = len(one.area)
    for name in COLUMNS:
        ours = getattr(all_rows, name)
        assert len(ours) == 100 * rows
        shift = 5 * torch.arange(100, device="cuda").repeat_interleave(rows) if name == "image" else None
        want = getattr(one, name).repeat(100, *[1] * (ours.dim() - 1))
        assert torch.equal(ours, want if shift is None else want + shift), name
    boxes, area = ops.largest_at_cuts(few.cuda().repeat(100, 1, 1, 1))
    expected = ops.largest_at_cuts(few.cuda())
    assert torch.equal(boxes, expected[0].repeat(100, 1, 1, 1)) and torch.equal(area, expected[1].repeat(100, 1, 1))


def test_many_tiny_maps() -> None:
    agree(torch.randint(256, (2000, 1, 7, 7), dtype=torch.uint8), 8)


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (2, 0, 8, 8), (2, 1, 0, 8), (2, 1, 8, 0)], ids=str)
def test_nothing(shape: tuple[int, ...]) -> None:
    agree(torch.empty(shape, dtype=torch.uint8), 8)


def test_bits_repeat() -> None:
    levels = torch.cat([smooth((20, 2, 224, 224)), torch.randint(9, (20, 2, 224, 224), dtype=torch.uint8) * 28]).cuda()
    first = ops.sweep_boxes(levels)
    for _ in range(5):
        again = ops.sweep_boxes(levels)
        assert all(torch.equal(getattr(again, name), getattr(first, name)) for name in COLUMNS)


def test_the_largest_is_not_waited_for() -> None:
    levels = smooth((8, 1, 224, 224)).cuda()
    want = ops.largest_at_cuts(levels)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        boxes, area = torch.ops.molt.largest_at_cuts(levels, False, 8)
    graph.replay()
    assert torch.equal(boxes, want[0]) and torch.equal(area, want[1])


def test_contours_of_the_operator_are_refused() -> None:
    levels = torch.zeros(1, 1, 4, 4, dtype=torch.uint8, device="cuda")
    with pytest.raises(RuntimeError, match="contours: got True, expected False on CUDA"):
        torch.ops.molt.sweep_boxes(levels, True, 8)
