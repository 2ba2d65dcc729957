"""Boxing, shapes, checks and scratch of the CUDA operators, with emulated kernels on CPU tensors."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from molt.ops import reference


def case(shape=(3, 2, 33, 35), clusters=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(shape, generator=generator).to(dtype)
    return maps, torch.randint(0, clusters, (shape[0], *shape[2:]), generator=generator, dtype=torch.int32)


@pytest.mark.parametrize("clusters", [5, 1500, 40_000])
def test_refine(emulated_ops, clusters):
    maps, labels = case(clusters=clusters)
    want = reference.cluster_refine(maps, labels, 0.4, clusters, None)
    torch.testing.assert_close(emulated_ops.cluster_refine(maps, labels, 0.4, clusters), want, rtol=0, atol=2e-6)
    counts = torch.tensor([clusters, clusters + 4, clusters])
    out = emulated_ops.cluster_refine(maps, labels, 0.4, clusters, counts)
    torch.testing.assert_close(out, want, rtol=0, atol=2e-6)


def test_views_are_read_as_they_are(emulated_ops):
    maps, labels = case((4, 4, 20, 22))
    turned = labels.transpose(1, 2).contiguous().transpose(1, 2)
    want = emulated_ops.cluster_refine(maps[::2, 1:3].contiguous(), labels[::2].contiguous(), 0.5, 5)
    got = emulated_ops.cluster_refine(maps[::2, 1:3], turned[::2], 0.5, 5)
    assert torch.equal(got, want)
    assert got.is_contiguous()
    last = emulated_ops.cluster_refine(maps.to(memory_format=torch.channels_last), labels, 0.5, 5)
    assert torch.equal(last, emulated_ops.cluster_refine(maps, labels, 0.5, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_mean(emulated_ops, dtype):
    maps, labels = case(dtype=dtype)
    means, counts = emulated_ops.cluster_mean(maps, labels, 7)
    assert means.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert means.shape == (3, 2, 7) and counts.shape == (3, 7)
    for k in range(7):
        inside = labels == k
        assert counts[:, k].tolist() == inside.sum((1, 2)).tolist()
        sums = (maps.double() * inside[:, None]).sum((2, 3)) / inside.sum((1, 2)).clamp(min=1)[:, None]
        torch.testing.assert_close(means[:, :, k].double(), sums, rtol=1e-5, atol=0)
    none, same = emulated_ops.cluster_mean(maps[:, :0], labels, 7)
    assert none.shape == (3, 0, 7)
    assert torch.equal(same, counts)


def test_fuse(emulated_ops):
    maps, labels = case()
    scales = [maps[:, :, :5, :6], maps[:, :, 4:8, 9:18]]
    plain = reference.fuse_maps(scales, (33, 35), [0.25, 0.75])
    want = reference.cluster_refine(plain, labels, 0.5, 5, None)
    out = emulated_ops.fuse_and_refine(scales, labels, [0.25, 0.75], 0.5, 5)
    torch.testing.assert_close(out, want, rtol=0, atol=2e-6)


def test_vote(emulated_ops):
    _, labels = case()
    segments = (torch.arange(33 * 35).view(1, 33, 35) // 40).expand(3, -1, -1)
    want = reference.cluster_vote(labels, segments, 5, 30)
    for dtype in (torch.uint8, torch.int64):
        out = emulated_ops.cluster_vote(labels.to(dtype), segments, 5, 30)
        assert out.dtype == dtype
        assert torch.equal(out.int(), want)


@pytest.mark.parametrize("connectivity", [4, 8])
def test_boxes(emulated_ops, connectivity):
    maps, _ = case()
    maps[1, 1] = 0
    for largest in (False, True):
        got = emulated_ops.component_boxes(maps, 0.7, connectivity, largest)
        for ours, theirs in zip(got, reference.component_boxes(maps, 0.7, connectivity, largest), strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    boxes, area, mean = emulated_ops.largest_box(maps, 0.7, connectivity)
    assert boxes.shape == (3, 2, 4) and area.shape == mean.shape == (3, 2)
    there = area > 0
    assert there.tolist() == [[True, True], [True, False], [True, True]]
    assert torch.equal(boxes[there], got[0]) and torch.equal(area[there], got[1]) and torch.equal(mean[there], got[2])
    assert boxes[1, 1].eq(0).all() and mean[1, 1] == 0


@pytest.mark.parametrize("connectivity", [4, 8])
def test_sweep(emulated_ops, emulator, connectivity):
    levels = (case((3, 2, 13, 15))[0] * 9).byte() * 28
    levels[1, 1] = 0
    boxes, area, first, last, hole, image, channel = emulated_ops.sweep_boxes(levels, False, connectivity)
    assert [t.dtype for t in (boxes, area, first, hole)] == [torch.float32, torch.float64, torch.int64, torch.bool]
    assert not hole.any()
    columns = [t.double()[:, None] for t in (area, first, last, image, channel)]
    assert torch.equal(torch.cat([boxes.double(), *columns], 1), emulator.sweep(levels, connectivity))
    boxes, area = emulated_ops.largest_at_cuts(levels, False, connectivity)
    assert boxes.shape == (3, 2, 255, 4) and boxes.dtype == torch.float32
    assert area.shape == (3, 2, 255) and area.dtype == torch.float64
    want = emulator.largest_at_cuts(levels, connectivity)
    assert torch.equal(torch.cat([boxes.double(), area[..., None]], 3), want)
    assert want[1, 1].eq(0).all() and want[1, 0, 0, 4] > 0
    turned = levels.transpose(2, 3).contiguous().transpose(2, 3)[::2]
    for ours, theirs in zip(
        emulated_ops.sweep_boxes(turned, False, connectivity),
        emulated_ops.sweep_boxes(levels[::2].contiguous(), False, connectivity),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 2, 4, 5), (2, 0, 4, 5), (2, 2, 0, 5), (2, 2, 4, 0)], ids=str)
def test_empty_sweep(emulated_ops, shape):
    levels = torch.empty(shape, dtype=torch.uint8)
    found = emulated_ops.sweep_boxes(levels, False, 8)
    assert [tuple(t.shape) for t in found] == [(0, 4), *[(0,)] * 6]
    boxes, area = emulated_ops.largest_at_cuts(levels, False, 8)
    assert boxes.shape == (*shape[:2], 255, 4) and area.shape == (*shape[:2], 255)
    assert boxes.eq(0).all() and area.eq(0).all()


@pytest.mark.parametrize("shape", [(0, 2, 4, 5), (2, 0, 4, 5), (2, 2, 0, 5), (2, 2, 4, 0)], ids=str)
def test_empty(emulated_ops, shape):
    maps = torch.empty(shape)
    labels = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    counts = torch.zeros(shape[0], dtype=torch.int64)
    assert emulated_ops.cluster_refine(maps, labels, 0.5, 0, counts).shape == shape
    means, totals = emulated_ops.cluster_mean(maps, labels, 3)
    assert means.shape == (shape[0], shape[1], 3)
    assert means.eq(0).all()
    assert totals.sum() == labels.numel()
    assert emulated_ops.cluster_vote(labels, labels, 3, 3).shape == labels.shape
    assert [t.shape[0] for t in emulated_ops.component_boxes(maps, 0.5, 8, False)] == [0] * 5
    boxes, area, mean = emulated_ops.largest_box(maps, 0.5, 8)
    assert boxes.shape == (*shape[:2], 4)
    assert boxes.eq(0).all() and area.eq(0).all() and mean.eq(0).all()
    fused = emulated_ops.fuse_and_refine([torch.rand(*shape[:2], 2, 2)], labels, [1.0], 0.5, 3)
    assert fused.shape == shape


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (0, 1, 4, 5)], ids=str)
def test_what_reads_its_size_back_is_refused_in_a_graph(emulated_ops, pretend, shape):
    """Before anything is launched: every launch fails here."""
    maps, no_kernel_image = torch.rand(shape), 209
    pretend(no_kernel_image, True)
    text = r"^{}: got a call while a CUDA graph is captured, expected {}, whose"
    with pytest.raises(RuntimeError, match=text.format("component_boxes", "largest_box")):
        emulated_ops.component_boxes(maps, 0.5, 8, False)
    with pytest.raises(RuntimeError, match=text.format("sweep_boxes", "largest_at_cuts")):
        emulated_ops.sweep_boxes(maps.byte(), False, 8)
    pretend(0, True)
    emulated_ops.largest_box(maps, 0.5, 8)
    emulated_ops.largest_at_cuts(maps.byte(), False, 8)
    labels = torch.zeros(shape[0], 4, 5, dtype=torch.int64)
    counts = torch.ones(shape[0], dtype=torch.int64)
    if shape[0]:
        with pytest.raises(RuntimeError, match="^counts: got a CPU tensor while a CUDA graph is captured"):
            emulated_ops.cluster_refine(maps, labels, 0.5, 1, counts)


def test_a_gpu_that_nothing_was_compiled_for(emulated_ops, pretend):
    pretend(209, False)
    text = r"older than, or other than, what molt was compiled for \(8.0;9.0\+PTX\); set TORCH_CUDA_ARCH_LIST .* again"
    with pytest.raises(RuntimeError, match=text):
        emulated_ops.largest_box(torch.rand(1, 1, 4, 5), 0.5, 8)


def test_a_look_ahead_of_one_shows_nowhere(emulated_ops, glue):
    spec = importlib.util.spec_from_file_location("_C_cuda", glue)
    module = importlib.util.module_from_spec(spec)
    maps, labels = case((4, 2, 70, 72))
    want = emulated_ops.cluster_refine(maps, labels, 0.4, 5)
    try:
        module.set_look_ahead(1)
        assert torch.equal(emulated_ops.cluster_refine(maps, labels, 0.4, 5), want)
        with pytest.raises(TypeError):
            module.set_look_ahead("one")
    finally:
        module.set_look_ahead(0)


MAPS, LABELS = torch.rand(2, 1, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64)
SMALL = [torch.rand(2, 1, 2, 2)]
WIDE = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(1, 1, 1 << 16, (1 << 14) + 1)


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("cluster_refine", (MAPS[0], LABELS, 0.5, 1), r"maps: got shape \(1, 4, 5\), expected \(B, C, H, W\)"),
        ("cluster_refine", (MAPS.int(), LABELS, 0.5, 1), "maps: got scalar type 3, expected float16"),
        ("cluster_refine", (MAPS, LABELS[:, :2], 0.5, 1), r"labels: got shape \(2, 2, 5\), expected shape \(2, 4, 5\)"),
        ("cluster_refine", (MAPS, LABELS[0], 0.5, 1), r"labels: got shape \(4, 5\), expected \(B, H, W\)"),
        ("cluster_refine", (MAPS, LABELS.short(), 0.5, 1), "labels: got scalar type 2, expected uint8"),
        ("cluster_refine", (MAPS, LABELS, 1.5, 1), r"alpha: got 1.5\d*, expected a number in \[0, 1\]"),
        ("cluster_refine", (MAPS, LABELS, math.nan, 1), "alpha: got nan"),
        ("cluster_refine", (MAPS, LABELS, 0.5, -1), "num_clusters: got -1, expected a number >= 0"),
        ("cluster_refine", (MAPS, LABELS, 0.5, 1, torch.ones(3).long()), r"counts: got shape \(3\), expected"),
        ("cluster_refine", (MAPS, LABELS, 0.5, 1, torch.ones(2)), "counts: got scalar type 6, expected int64"),
        ("cluster_mean", (MAPS, LABELS, -1), "num_clusters: got -1"),
        ("cluster_mean", (MAPS[0], LABELS, 1), "values: got shape"),
        ("fuse_and_refine", ([], LABELS, [], 0.5, 1), "maps: got 0 scales, expected 1 to 8"),
        ("fuse_and_refine", (SMALL * 9, LABELS, [0.1] * 9, 0.5, 1), "maps: got 9 scales"),
        ("fuse_and_refine", (SMALL, LABELS, [], 0.5, 1), "weights: got 0 numbers, expected 1"),
        ("fuse_and_refine", ([SMALL[0][:1]], LABELS, [1.0], 0.5, 1), r"labels: got shape \(2, 4, 5\)"),
        ("fuse_and_refine", ([*SMALL, SMALL[0].half()], LABELS, [0.5, 0.5], 0.5, 1), r"maps\[1\]: got scalar type 5"),
        (
            "fuse_and_refine",
            ([*SMALL, MAPS[:, :0]], LABELS, [0.5, 0.5], 0.5, 1),
            r"maps\[1\]: got shape \(2, 0, 4, 5\)",
        ),
        ("fuse_and_refine", ([MAPS[:, :, :0]], LABELS, [1.0], 0.5, 1), r"maps\[0\]: got shape \(2, 1, 0, 5\)"),
        ("cluster_vote", (LABELS.float(), LABELS, 1, 1), "labels: got scalar type 6"),
        ("cluster_vote", (LABELS, LABELS[:1], 1, 1), r"segments: got shape \(1, 4, 5\)"),
        ("cluster_vote", (LABELS, LABELS, -1, 1), "num_clusters: got -1"),
        (
            "cluster_vote",
            (LABELS, LABELS, 1 << 20, 1 << 12),
            "num_segments: got 4096 x 1048576 clusters, expected at most",
        ),
        ("component_boxes", (MAPS, 0.0, 8, False), "threshold: got 0"),
        ("component_boxes", (MAPS, 0.5, 6, False), "connectivity: got 6, expected 4 or 8"),
        ("largest_box", (LABELS, 0.5, 8), "maps: got shape"),
        ("largest_box", (MAPS.int(), 0.5, 8), "maps: got scalar type 3"),
        ("sweep_boxes", (MAPS, False, 8), "levels: got scalar type 6, expected uint8"),
        ("sweep_boxes", (MAPS.byte()[0], False, 8), r"levels: got shape \(1, 4, 5\), expected \(B, C, h, w\)"),
        ("sweep_boxes", (MAPS.byte(), True, 8), "contours: got True, expected False on CUDA"),
        ("sweep_boxes", (WIDE, False, 8), "levels: got 65536 x 16385 pixels, expected at most"),
        ("largest_at_cuts", (MAPS.byte(), False, 6), "connectivity: got 6, expected 4 or 8"),
        ("largest_at_cuts", (MAPS.byte(), True, 8), "contours: got True"),
    ],
)
def test_wrong_arguments(emulated_ops, name, arguments, text):
    with pytest.raises(RuntimeError, match="^" + text):
        getattr(emulated_ops, name)(*arguments)
