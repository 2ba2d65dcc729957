"""fuse_and_refine as CUDA kernels, run on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6, torch.float64: 1e-13}


def fused(maps, size, weights):
    """In float64."""
    total = torch.zeros(*maps[0].shape[:2], *size, dtype=torch.float64)
    for scale, weight in zip(maps, weights, strict=True):
        large = F.interpolate(scale.double(), size, mode="bilinear", align_corners=False)
        low, high = large.amin((2, 3), keepdim=True), large.amax((2, 3), keepdim=True)
        flat = (scale == scale[:, :, :1, :1]).flatten(2).all(-1)[..., None, None] | (high == low)
        share = torch.where(flat, 0, (large - low) / torch.where(flat, 1, high - low))
        broken = ~scale.isfinite().flatten(2).all(-1)[..., None, None]
        total += weight * torch.where(broken, math.nan, share)
    return total


def case(batch, channels, smalls, size, dtype=torch.float32, clusters=5):
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(batch, channels, *s, dtype=torch.float64, generator=generator).to(dtype) for s in smalls]
    labels = torch.randint(0, clusters, (batch, *size), generator=generator).repeat_interleave(3, 2)[..., : size[1]]
    return maps, labels.int().contiguous()


SIZES = [
    ([(7, 7)], (56, 56)),
    ([(4, 6), (5, 3)], (33, 61)),
    ([(1, 1)], (3, 5)),
    ([(1, 4), (3, 1)], (1, 9)),
    ([(14, 14), (7, 9)], (5, 4)),
    ([(6, 6)], (6, 6)),
    ([(10, 3)], (1, 1)),
    ([(3, 4)] * 8, (20, 22)),
    ([(9, 8)], (70, 71)),
]


@pytest.mark.parametrize(("smalls", "size"), SIZES, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_matches_interpolate(emulator, smalls, size, dtype):
    maps, labels = case(2, 2, smalls, size, dtype)
    weights = [(i + 1) / sum(range(1, len(smalls) + 1)) for i in range(len(smalls))]
    want = fused(maps, size, weights)
    (plain,) = emulator.refine(maps, labels, 0.0, 5, weights=weights, alignment=None)
    torch.testing.assert_close(plain.double(), want, rtol=0, atol=TOLERANCE[dtype])
    for clusters in (5, 2000):
        (out,) = emulator.refine(maps, labels, 0.4, clusters, weights=weights)
        (two_steps,) = emulator.refine(plain, labels, 0.4, clusters)
        assert torch.equal(out, two_steps)


def test_constant_maps_give_zeros(emulator):
    maps, labels = case(2, 1, [(5, 5)], (31, 33))
    maps[0][1] = 0.1
    (out,) = emulator.refine(maps, labels, 0.0, 5, weights=[1.0])
    assert out[1].eq(0).all()
    assert out[0].amin() < 1e-6 and out[0].amax() > 1 - 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_a_number_that_is_none_spoils_its_map_alone(emulator, bad, weight):
    maps, labels = case(2, 2, [(4, 4), (40, 40)], (9, 9))
    (clean,) = emulator.refine(maps, labels, 0.5, 5, weights=[1 - weight, weight])
    maps[1][0, 1, 1, 1] = bad
    (out,) = emulator.refine(maps, labels, 0.5, 5, weights=[1 - weight, weight])
    assert out[0, 1].isnan().all()
    out[0, 1] = clean[0, 1]
    assert torch.equal(out, clean)


def test_a_range_that_is_none_spoils_its_map(emulator):
    maps = [torch.tensor([-3e38, 3e38, 0.0, 1.0]).view(1, 1, 2, 2)]
    (out,) = emulator.refine(maps, torch.zeros(1, 4, 4, dtype=torch.uint8), 0.0, 1, weights=[1.0])
    assert out.isnan().all()


def test_equal_neighbours_stay_equal(emulator):
    maps = torch.zeros(1, 1, 6, 6)
    maps[..., 3:] = 0.7
    labels = torch.zeros(1, 50, 49, dtype=torch.uint8)
    (out,) = emulator.refine([maps], labels, 0.0, 1, weights=[1.0])
    assert out[..., :18].eq(0).all()
    assert out[..., 32:].eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_bits_do_not_depend_on_schedule_or_batch(emulator, dtype):
    maps, labels = case(3, 2, [(5, 6), (8, 7)], (67, 70), dtype, clusters=40)
    (first,) = emulator.refine(maps, labels, 0.5, 40, weights=[0.5, 0.5], resident=1)
    (other,) = emulator.refine(maps, labels, 0.5, 40, weights=[0.5, 0.5], seed=5, resident=7, processors=3)
    assert torch.equal(first, other)
    (alone,) = emulator.refine([m[2:, 1:] for m in maps], labels[2:], 0.5, 40, weights=[0.5, 0.5], alignment=None)
    assert torch.equal(alone[0, 0], first[2, 1])
