"""cluster_refine, cluster_mean and fuse_and_refine as CUDA kernels, run on the CPU."""

from __future__ import annotations

import ctypes
import math
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SHAPES = [(1, 1, 1, 1), (2, 3, 1, 7), (3, 2, 13, 17), (1, 1, 64, 64), (2, 1, 65, 67), (1, 2, 91, 139)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LABELS = [torch.uint8, torch.int32, torch.int64]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 3e-6, torch.float64: 1e-14}


def case(shape, clusters, dtype=torch.float32, label_dtype=torch.int64, coherent=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(shape, dtype=torch.float64, generator=generator).to(dtype)
    labels = torch.randint(0, clusters, (shape[0], *shape[2:]), generator=generator)
    if coherent:
        labels = labels.repeat_interleave(13, 2)[:, :, : shape[3]].contiguous()
    return maps, labels.to(label_dtype)


def cluster_means(maps, labels, limit):
    """Means and counts in float64, 0 for absent clusters; labels out of range join none."""
    batch, channels = maps.shape[:2]
    values, index = maps.double().flatten(2), labels.flatten(1).long()
    index = torch.where((index >= 0) & (index < limit), index, limit)
    counts = torch.zeros(batch, limit + 1, dtype=torch.int64).scatter_add_(1, index, torch.ones_like(index))
    spread = index[:, None].expand(-1, channels, -1)
    sums = torch.zeros(batch, channels, limit + 1, dtype=torch.float64).scatter_add_(2, spread, values)
    return (sums / counts[:, None].clamp(min=1))[..., :limit], counts[:, :limit]


def expected(maps, labels, alpha, limit):
    means, _ = cluster_means(maps, labels, max(limit, 1))
    index = labels.flatten(1).long()
    inside = ((index >= 0) & (index < limit))[:, None]
    painted = means.gather(2, index.clamp(0, max(limit - 1, 0))[:, None].expand(-1, maps.shape[1], -1))
    values = maps.double().flatten(2)
    blended = painted if alpha == 1 else (1 - alpha) * values + alpha * painted
    return torch.where(inside, blended, values).view(maps.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_scatter(emulator, shape, dtype):
    for i, label_dtype in enumerate(LABELS):
        for coherent in (False, True):
            maps, labels = case(shape, 5, dtype, label_dtype, coherent)
            alignment = None if coherent else 16
            (out,) = emulator.refine(maps, labels, 0.3, 5, seed=i, alignment=alignment)
            want = expected(maps, labels, 0.3, 5)
            torch.testing.assert_close(out.double(), want, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("clusters", [1, 2, 31, 32, 33, 64, 65, 255, 256, 257, 512, 513, 1000, 1024, 1025, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_number_of_clusters(emulator, clusters, dtype):
    shape = (2, 2, 67, 71)
    for coherent in (False, True):
        maps, labels = case(shape, clusters, dtype, torch.int32, coherent)
        (out,) = emulator.refine(maps, labels, 0.5, clusters)
        want = expected(maps, labels, 0.5, clusters)
        torch.testing.assert_close(out.double(), want, rtol=0, atol=TOLERANCE[dtype])
        means, counts = emulator.refine(maps, labels, 1.0, clusters, means=True)
        true_means, true_counts = cluster_means(maps, labels, clusters)
        assert torch.equal(counts, true_counts)
        torch.testing.assert_close(means.double(), true_means, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("limit", [20_000, 2**40, 2**63 - 1])
def test_labels_far_apart_are_numbered_through(emulator, limit):
    maps, labels = case((3, 2, 41, 43), 1500)
    spread = labels * (limit // 1500)
    spread[0, 3, 5] = -1
    spread[1, 2, 2] = limit - 1
    (out,) = emulator.refine(maps, spread, 0.5, limit)
    labels[1, 2, 2] = 1500
    for image in range(3):
        want = expected(maps[image : image + 1], labels[image : image + 1], 0.5, 1501)[0]
        keeps = spread[image] < 0
        want = torch.where(keeps, maps[image].double(), want) if image else want
        if image == 0:
            labels[0, 3, 5] = -1
            want = expected(maps[:1], labels[:1], 0.5, 1501)[0]
        torch.testing.assert_close(out[image].double(), want, rtol=0, atol=3e-6)


@pytest.mark.parametrize("clusters", [7, 40, 1300, 20_000])
def test_bits_do_not_depend_on_the_schedule(emulator, clusters):
    maps, labels = case((3, 2, 97, 101), clusters, label_dtype=torch.int32)
    (first,) = emulator.refine(maps, labels, 0.37, clusters, seed=0, resident=1)
    for seed in (1, 2, 3):
        (out,) = emulator.refine(maps, labels, 0.37, clusters, seed=seed, resident=2 * seed, processors=seed)
        assert torch.equal(out, first)


@pytest.mark.parametrize("clusters", [30, 300, 1500])
def test_bits_do_not_depend_on_the_batch_or_the_address(emulator, clusters):
    maps, labels = case((4, 2, 65, 67), clusters, label_dtype=torch.int32)
    (whole,) = emulator.refine(maps, labels, 0.37, clusters)
    for i in range(4):
        (alone,) = emulator.refine(maps[i : i + 1, 1:], labels[i : i + 1].long(), 0.37, clusters, alignment=None)
        assert torch.equal(alone[:, 0], whole[i : i + 1, 1])


@pytest.mark.parametrize("bound", [40, 700, 5000, 10**6])
def test_an_image_gets_the_bits_of_its_own_number_of_clusters(emulator, bound):
    """A larger bound, for other images of the batch, shows nowhere."""
    maps, labels = case((3, 2, 65, 67), 40, label_dtype=torch.int32)
    counts = torch.tensor([40, 31, 8])
    (out,) = emulator.refine(maps, labels, 0.37, bound, counts)
    for i, count in enumerate(counts.tolist()):
        (alone,) = emulator.refine(maps[i : i + 1], labels[i : i + 1], 0.37, count)
        assert torch.equal(alone[0], out[i])
        want = expected(maps[i : i + 1], labels[i : i + 1], 0.37, count)
        torch.testing.assert_close(alone.double(), want, rtol=0, atol=3e-6)


@pytest.mark.parametrize("label_dtype", LABELS, ids=str)
@pytest.mark.parametrize("limit", [0, 3, 200, 1500, 50_000])
def test_labels_out_of_range_keep_their_value(emulator, label_dtype, limit):
    maps, labels = case((2, 2, 23, 29), 250, label_dtype=torch.int64)
    if label_dtype != torch.uint8:
        labels[0, ::3] = -labels[0, ::3] - 1
        labels[1, 0, :4] = torch.tensor([2**31 - 1, -(2**31), limit, limit - 1])
    if label_dtype == torch.int64:
        labels[1, 1, :3] = torch.tensor([2**63 - 1, -(2**63), 2**32])
    labels = labels.to(label_dtype)
    (out,) = emulator.refine(maps, labels, 0.5, limit)
    torch.testing.assert_close(out.double(), expected(maps, labels, 0.5, limit), rtol=0, atol=3e-6)
    means, counts = emulator.refine(maps, labels, 1.0, limit, means=True)
    true_means, true_counts = cluster_means(maps, labels, limit)
    assert torch.equal(counts, true_counts)
    torch.testing.assert_close(means.double(), true_means, rtol=0, atol=3e-6)


def test_negative_counts_are_no_limit_at_all(emulator):
    maps, labels = case((2, 1, 9, 9), 4)
    (out,) = emulator.refine(maps, labels, 0.5, 4, torch.tensor([-3, 9]))
    assert torch.equal(out[0], maps[0])
    torch.testing.assert_close(out[1:].double(), expected(maps[1:], labels[1:], 0.5, 4), rtol=0, atol=3e-6)


@pytest.mark.parametrize("clusters", [6, 1200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_cluster_and_map(emulator, dtype, clusters):
    maps, labels = case((2, 3, 30, 31), clusters, dtype)
    (clean,) = emulator.refine(maps, labels, 0.5, clusters)
    maps[1, 2, 5, 6] = math.nan
    (out,) = emulator.refine(maps, labels, 0.5, clusters)
    poisoned = torch.zeros_like(maps, dtype=torch.bool)
    poisoned[1, 2] = labels[1] == labels[1, 5, 6]
    assert torch.equal(out.isnan(), poisoned)
    assert torch.equal(out[~poisoned], clean[~poisoned])


@pytest.mark.parametrize("clusters", [4, 1100])
def test_alpha_ends(emulator, clusters):
    maps, labels = case((2, 2, 20, 21), clusters)
    maps[0, 0, 0, 0], maps[1, 1, 3, 3] = math.nan, math.inf
    (kept,) = emulator.refine(maps, labels, 0.0, clusters)
    assert torch.equal(kept.nan_to_num(), maps.nan_to_num())
    assert torch.equal(kept.isnan(), maps.isnan())
    (mean,) = emulator.refine(maps, labels, 1.0, clusters)
    cluster = labels[1] == labels[1, 3, 3]
    assert mean[1, 1][cluster].isposinf().all()
    assert mean[1, 1][~cluster].isfinite().all()


def test_many_small_maps(emulator):
    """More maps than look ahead, and many more items than blocks."""
    maps, labels = case((40, 3, 5, 7), 4, label_dtype=torch.uint8)
    for resident in (1, 3, 9):
        (out,) = emulator.refine(maps, labels, 0.5, 4, resident=resident, seed=resident)
        torch.testing.assert_close(out.double(), expected(maps, labels, 0.5, 4), rtol=0, atol=3e-6)


def test_look_ahead_shorter_than_the_batch(emulator):
    """Maps and labels of more than 16 MiB, so that summing and painting take turns."""
    maps, labels = case((4, 1, 1, 1_060_000), 9, torch.float64, torch.int64, coherent=True)
    (out,) = emulator.refine(maps, labels, 0.5, 9, processors=1, resident=8)
    torch.testing.assert_close(out, expected(maps, labels, 0.5, 9), rtol=0, atol=1e-12)


@pytest.mark.parametrize("clusters", [1, 9, 300])
def test_little_look_ahead_shows_nowhere(emulator, clusters):
    """Most blocks wait for sums that others have yet to add up."""
    maps, labels = case((5, 2, 91, 97), clusters, label_dtype=torch.uint8 if clusters < 256 else torch.int32)
    (want,) = emulator.refine(maps, labels, 0.5, clusters, resident=1)
    for seed in range(4):
        order = {"seed": seed, "resident": 3 + 4 * seed, "look_ahead": 1 + seed // 2, "processors": 1 + seed}
        (out,) = emulator.refine(maps, labels, 0.5, clusters, **order)
        assert torch.equal(out, want)


def test_no_barrier_and_no_order_can_be_left_out(wrong_refine):
    """With any one missing, some schedule of a few fails or gives other numbers."""
    lost = {"__syncthreads": [0], "load_acquire": [1], "add_release": [2], "add_acq_rel": [1, 2]}
    places = []
    for start, name in ((0, "cluster_refine"), (1000, "cluster_wide"), (2000, "fuse")):
        for line, text in enumerate((ROOT / f"csrc/cuda/{name}.cuh").read_text().splitlines(), start + 1):
            found = re.findall(r"__syncthreads|load_acquire|add_release|add_acq_rel", text.split("//")[0])
            assert len(found) < 2, text
            places += [(name, line, what) for word in found for what in lost[word]]
    assert len(places) >= 16 and {what for *_, what in places} == {0, 1, 2}
    run = wrong_refine.refine_with_mistake
    run.restype = ctypes.c_double

    def results(line: int, what: int):
        for seed in range(6):
            yield run(ctypes.c_uint(line), what, ctypes.c_uint64(seed))

    (right,) = set(results(0, 0))
    assert right > 0
    unseen = [place for place in places if not any(result != right for result in results(*place[1:]))]
    assert not unseen


@pytest.mark.parametrize("clusters", [9, 300, 1100, 30_000])
@pytest.mark.parametrize("most", [1, 100_000])
def test_little_scratch_changes_nothing(emulator, clusters, most):
    maps, labels = case((7, 2, 31, 33), clusters, label_dtype=torch.int32)
    want = emulator.refine(maps, labels, 0.5, clusters), emulator.refine(maps, labels, 1.0, clusters, means=True)
    with emulator.scratch(most):
        got = emulator.refine(maps, labels, 0.5, clusters), emulator.refine(maps, labels, 1.0, clusters, means=True)
    for ours, theirs in zip(got, want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
