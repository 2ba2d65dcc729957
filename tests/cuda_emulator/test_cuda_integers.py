"""cluster_vote, component_boxes and largest_box as CUDA kernels, run on the CPU."""

from __future__ import annotations

import math

import pytest
import torch

from molt.ops import reference

LABELS = [torch.uint8, torch.int32, torch.int64]
SHAPES = [(1, 1, 1), (2, 1, 9), (3, 7, 13), (2, 33, 31), (1, 40, 65)]


def vote_by_hand(labels, segments, clusters, limit):
    out = labels.clone()
    for image, (label, segment) in enumerate(zip(labels.long(), segments.long(), strict=True)):
        votes = (label >= 0) & (label < clusters) & (segment >= 0) & (segment < limit)
        for s in segment[votes].unique():
            where = votes & (segment == s)
            out[image][where] = label[where].bincount().argmax().to(out.dtype)
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("label_dtype", LABELS, ids=str)
@pytest.mark.parametrize("clusters", [1, 3, 40])
def test_vote(emulator, shape, label_dtype, clusters):
    generator = torch.Generator().manual_seed(0)
    for seed, segment_dtype in enumerate(LABELS):
        labels = torch.randint(0, clusters, shape, generator=generator).to(label_dtype)
        segments = torch.randint(0, 9, shape, generator=generator).repeat_interleave(2, 2)[..., : shape[2]]
        segments = segments.contiguous().to(segment_dtype)
        out = emulator.vote(labels, segments, clusters, 9, seed=seed, resident=3)
        assert torch.equal(out, reference.cluster_vote(labels, segments, clusters, 9))
        assert torch.equal(out, vote_by_hand(labels, segments, clusters, 9))


@pytest.mark.parametrize("label_dtype", LABELS, ids=str)
@pytest.mark.parametrize(("clusters", "limit"), [(0, 5), (5, 0), (4, 6), (200, 300)])
def test_votes_out_of_range_do_not_count(emulator, label_dtype, clusters, limit):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 250, (2, 17, 19), generator=generator)
    segments = torch.randint(-3, 9, (2, 17, 19), generator=generator)
    if label_dtype != torch.uint8:
        labels[:, ::4] *= -1
        labels[0, 1, :2] = torch.tensor([2**31 - 1, -(2**31)])
    labels = labels.to(label_dtype)
    out = emulator.vote(labels, segments, clusters, limit)
    assert torch.equal(out, vote_by_hand(labels, segments, clusters, limit))


def rows_by_scipy(maps, threshold, connectivity, largest):
    # No native type holds a bfloat16 in NumPy; the reference itself widens.
    boxes, area, mean, image, channel = reference.component_boxes(maps, threshold, connectivity, largest)
    return torch.cat([boxes.double(), area[:, None], mean[:, None], image[:, None], channel[:, None]], 1)


def blobs(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(shape, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    return torch.where(noise > 0.9, 0, smooth).to(dtype)


MAPS = [(1, 1, 1, 1), (2, 2, 1, 9), (1, 2, 9, 1), (2, 3, 13, 17), (1, 2, 31, 33), (1, 1, 64, 64), (1, 1, 37, 100)]


@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_components(emulator, shape, connectivity, dtype):
    for seed, threshold in enumerate((0.3, 0.75, 1.0)):
        maps = blobs(shape, dtype, seed)
        for largest in (False, True):
            rows = emulator.components(maps, threshold, connectivity, largest, seed=seed, resident=seed + 1)
            want = rows_by_scipy(maps, threshold, connectivity, largest)
            assert torch.equal(rows[:, [0, 1, 2, 3, 4, 6, 7]], want[:, [0, 1, 2, 3, 4, 6, 7]])
            torch.testing.assert_close(rows[:, 5], want[:, 5], rtol=2e-7, atol=1e-9)
        boxes, area, mean = emulator.largest_box(maps, threshold, connectivity, seed=seed)
        want = torch.zeros(*shape[:2], 6, dtype=torch.float64)
        for row in rows:
            want[int(row[6]), int(row[7])] = row[:6]
        assert torch.equal(torch.cat([boxes.double(), area[..., None], mean[..., None].double()], 2), want)


def snake(size):
    """One component that winds through the whole map, the hardest case of union-find."""
    maps = torch.zeros(1, 1, size, size)
    maps[..., ::2, :] = 1
    maps[..., 1::4, -1] = 1
    maps[..., 3::4, 0] = 1
    return maps


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("name", ["snake", "board", "diagonal", "full", "comb", "spiral"])
def test_shapes_that_are_hard_to_join(emulator, name, connectivity):
    size = 35
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    ring = torch.minimum(torch.minimum(y, x), torch.minimum(size - 1 - y, size - 1 - x))
    maps = {
        "snake": snake(size)[0, 0],
        "board": (y + x) % 2,
        "diagonal": (y + x == size - 1) | (y == x),
        "full": y >= 0,
        "comb": (x % 2 == 0) | (y == size - 1),
        "spiral": (ring % 2 == 0) | ((y == x + 1) & (x < size // 2)),
    }[name].float()[None, None]
    want = rows_by_scipy(maps, 0.5, connectivity, False)
    for seed in range(3):
        rows = emulator.components(maps, 0.5, connectivity, seed=seed, resident=3 * seed + 1)
        assert torch.equal(rows, want)


def test_maps_without_a_component(emulator):
    maps = blobs((5, 1, 8, 9))
    maps[0], maps[1], maps[2, 0, 3, 3], maps[3, 0, 2, 2] = 0, -1, math.nan, math.inf
    boxes, area, mean = emulator.largest_box(maps, 0.5)
    for i in (0, 1, 2):
        assert boxes[i].eq(0).all() and area[i] == 0 and mean[i] == 0
    assert boxes[3, 0].tolist() == [2, 2, 3, 3]
    assert area[3, 0] == 1 and mean[3, 0] == math.inf
    rows = emulator.components(maps, 0.5)
    assert set(rows[:, 6].tolist()) == {3.0, 4.0}


def test_the_threshold_is_compared_in_float64(emulator):
    peak = torch.tensor(0.7)
    at = (0.3 * peak.double()).float()
    for value in (at.nextafter(torch.tensor(0.0)), at, at.nextafter(torch.tensor(1.0))):
        maps = torch.stack([peak, torch.tensor(0.0), value]).view(1, 1, 1, 3)
        rows = emulator.components(maps, 0.3)
        assert len(rows) == 1 + (value.double() >= 0.3 * peak.double())


def test_of_equal_areas_the_one_met_first_leads(emulator):
    maps = torch.zeros(1, 1, 9, 9)
    maps[0, 0, [0, 4, 8], [7, 1, 5]] = 1
    rows = emulator.components(maps, 0.5)
    assert rows[:, :2].tolist() == [[7, 0], [1, 4], [5, 8]]
    assert emulator.largest_box(maps, 0.5)[0].tolist() == [[[7, 0, 8, 1]]]


def test_bits_do_not_depend_on_the_schedule(emulator):
    maps = blobs((3, 2, 45, 47))
    first = emulator.components(maps, 0.6, resident=1)
    for seed in (1, 2, 3):
        assert torch.equal(emulator.components(maps, 0.6, seed=seed, resident=2 * seed), first)


@pytest.mark.parametrize("most", [1, 50_000])
def test_little_scratch_changes_nothing(emulator, most):
    maps = blobs((5, 2, 17, 19))
    labels = (maps[:, 0] * 9).int()
    segments = torch.arange(5 * 17 * 19).view(5, 17, 19) % 77

    def run():
        return (
            emulator.vote(labels, segments, 10, 77),
            emulator.components(maps, 0.6),
            emulator.components(maps, 0.6, largest=True),
            *emulator.largest_box(maps, 0.6),
        )

    want = run()
    with emulator.scratch(most):
        assert all(torch.equal(a, b) for a, b in zip(run(), want, strict=True))
