"""upsample_normalize, fuse_maps and component_boxes against independent forms, on hard shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from molt import ops

GEN = torch.Generator().manual_seed(0)


def slow_upsample(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Half-pixel bilinear sampling, sample by sample, then min-max."""
    h, w = values.shape
    out = np.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            sy = min(max((y + 0.5) * h / size[0] - 0.5, 0), h - 1)
            sx = min(max((x + 0.5) * w / size[1] - 0.5, 0), w - 1)
            y0, x0 = int(sy), int(sx)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            fy, fx = sy - y0, sx - x0
            top = values[y0, x0] * (1 - fx) + values[y0, x1] * fx
            bottom = values[y1, x0] * (1 - fx) + values[y1, x1] * fx
            out[y, x] = top * (1 - fy) + bottom * fy
    low, high = out.min(), out.max()
    return np.zeros(size) if low == high or values.min() == values.max() else (out - low) / (high - low)


@pytest.mark.parametrize(
    ("shape", "size"), [((3, 4), (7, 9)), ((14, 14), (5, 6)), ((1, 1), (4, 3)), ((1, 5), (1, 11)), ((6, 2), (6, 2))]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_upsample_normalize_matches_a_loop(shape: tuple, size: tuple, dtype: torch.dtype) -> None:
    maps = torch.randn(2, 3, *shape, generator=GEN, dtype=torch.float64).to(dtype)
    out = ops.upsample_normalize(maps, size)
    assert out.dtype == dtype and out.shape == (2, 3, *size)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3}[dtype]
    for b in range(2):
        for c in range(3):
            expected = slow_upsample(maps[b, c].double().numpy(), size)
            assert np.abs(out[b, c].double().numpy() - expected).max() < tolerance


def test_constant_maps_are_zero_and_nan_stays_in_its_map() -> None:
    maps = torch.rand(1, 3, 4, 4, generator=GEN)
    maps[0, 0], maps[0, 1, 2, 2] = 7.5, float("nan")
    out = ops.upsample_normalize(maps, (8, 8))
    assert not out[0, 0].any() and out[0, 1].isnan().all() and out[0, 2].amax() == 1


def test_strides_and_input_do_not_matter() -> None:
    maps = torch.rand(2, 4, 5, 3, generator=GEN).permute(0, 3, 1, 2)[:, :, ::2]
    before = maps.clone()
    assert torch.equal(ops.upsample_normalize(maps, (9, 9)), ops.upsample_normalize(maps.contiguous(), (9, 9)))
    assert torch.equal(maps, before)


def test_empty_batch_is_empty() -> None:
    assert ops.upsample_normalize(torch.rand(0, 2, 3, 3), (4, 5)).shape == (0, 2, 4, 5)
    assert ops.fuse_maps([torch.rand(2, 0, 3, 3)], (4, 5)).shape == (2, 0, 4, 5)
    assert len(ops.component_boxes(torch.rand(0, 2, 3, 3)).boxes) == 0


def test_gradients_flow_through_minimum_and_maximum() -> None:
    maps = torch.randn(1, 2, 3, 4, generator=GEN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: ops.upsample_normalize(m, (5, 7)), (maps,))


def test_fuse_is_the_weighted_sum_of_its_scales() -> None:
    maps = [torch.randn(2, 3, s, s + 1, generator=GEN) for s in (4, 7, 5)]
    single = [ops.upsample_normalize(m, (11, 13)) for m in maps]
    assert torch.allclose(ops.fuse_maps(maps, (11, 13)), sum(single) / 3, atol=1e-6)
    weighted = ops.fuse_maps(maps, (11, 13), weights=[1, 0, 3])
    assert torch.allclose(weighted, 0.25 * single[0] + 0.75 * single[2], atol=1e-6)


@pytest.mark.parametrize(
    ("maps", "weights", "word"),
    [
        ([], None, "maps: "),
        (torch.rand(1, 1, 2, 2), None, "maps: got Tensor"),
        ([torch.rand(1, 1, 2, 2), torch.rand(2, 1, 2, 2)], None, r"maps\[1\].*\(2, 1\), expected \(1, 1\)"),
        ([torch.rand(1, 1, 2, 2), torch.rand(1, 1, 2, 2).double()], None, r"maps\[1\]: got dtype"),
        ([torch.rand(1, 1, 2, 2)], [1, 2], "weights: got 2 numbers"),
        ([torch.rand(1, 1, 2, 2)], [0], "weights"),
        ([torch.rand(1, 1, 2, 2)], [float("nan")], "weights"),
        ([torch.rand(1, 1, 2, 2)] * 2, [2, -1], "weights"),
    ],
)
def test_fuse_names_bad_arguments(maps: list, weights: list | None, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ops.fuse_maps(maps, (4, 4), weights)


@pytest.mark.parametrize("size", [(0, 4), (4,), 4, (4.5, 2), "44"])
def test_size_is_checked(size: object) -> None:
    with pytest.raises((TypeError, ValueError), match="size"):
        ops.upsample_normalize(torch.rand(1, 1, 2, 2), size)


def slow_components(values: np.ndarray, threshold: float, neighbours: int) -> list[tuple]:
    """Flood fill in reading order: (box, area, mean), largest first."""
    keep = (values >= threshold * values.max()) & (values > 0)
    steps = [(0, 1), (0, -1), (1, 0), (-1, 0)] + ([(1, 1), (1, -1), (-1, 1), (-1, -1)] if neighbours == 8 else [])
    seen, found = np.zeros_like(keep), []
    for start in zip(*np.nonzero(keep), strict=True):
        if seen[start]:
            continue
        stack, inside = [start], []
        seen[start] = True
        while stack:
            y, x = stack.pop()
            inside.append((y, x))
            for dy, dx in steps:
                at = (y + dy, x + dx)
                if 0 <= at[0] < keep.shape[0] and 0 <= at[1] < keep.shape[1] and keep[at] and not seen[at]:
                    seen[at] = True
                    stack.append(at)
        ys, xs = zip(*inside, strict=True)
        box = (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
        found.append((box, len(inside), float(np.mean([values[p] for p in inside]))))
    return sorted(found, key=lambda item: -item[1])


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("shape", [(17, 23), (1, 40), (1, 1), (30, 2)])
def test_components_match_a_flood_fill(connectivity: int, shape: tuple[int, int]) -> None:
    maps = torch.rand(2, 2, *shape, generator=GEN) ** 2
    found = ops.component_boxes(maps, 0.5, connectivity=connectivity)
    for b in range(2):
        for c in range(2):
            expected = slow_components(maps[b, c].numpy(), 0.5, connectivity)
            mine = (found.image == b) & (found.channel == c)
            assert [tuple(row) for row in found.boxes[mine].int().tolist()] == [row[0] for row in expected]
            assert found.area[mine].tolist() == [row[1] for row in expected]
            assert np.allclose(found.mean[mine].numpy(), [row[2] for row in expected], atol=1e-6)
    one = ops.component_boxes(maps, 0.5, connectivity=connectivity, largest=True)
    assert one.image.tolist() == [0, 0, 1, 1] and one.channel.tolist() == [0, 1, 0, 1]


def test_nothing_is_found_where_nothing_is() -> None:
    maps = torch.zeros(1, 4, 5, 5)
    maps[0, 1], maps[0, 2, 0, 0], maps[0, 3, 4, 4] = -1, float("nan"), 0.3
    found = ops.component_boxes(maps)
    assert found.channel.tolist() == [3] and found.boxes.tolist() == [[4, 4, 5, 5]]


def test_threshold_is_inclusive_and_relative() -> None:
    maps = torch.tensor([[[[0.0, 1.0, 2.0, 4.0]]]])
    assert ops.component_boxes(maps, 0.5).boxes.tolist() == [[2, 0, 4, 1]]
    assert ops.component_boxes(maps, 1.0).boxes.tolist() == [[3, 0, 4, 1]]


@pytest.mark.parametrize("arguments", [{"threshold": 0}, {"threshold": 1.5}, {"connectivity": 6}])
def test_component_arguments_are_named(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ops.component_boxes(torch.rand(1, 1, 4, 4), **arguments)


def test_maps_are_checked() -> None:
    for call in (
        lambda m: ops.upsample_normalize(m, (2, 2)),
        ops.component_boxes,
        lambda m: ops.fuse_maps([m], (2, 2)),
    ):
        with pytest.raises(ValueError, match="maps"):
            call(torch.rand(3, 3))
        with pytest.raises(TypeError, match="maps"):
            call(torch.ones(1, 1, 3, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match="maps"):
            call(torch.rand(1, 1, 0, 3))
