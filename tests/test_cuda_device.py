"""The CUDA operators on a device. Tests named sanitized are short enough for tests/sanitize.sh."""

from __future__ import annotations

import importlib

import pytest
import torch

pytestmark = pytest.mark.gpu
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LABELS = [torch.uint8, torch.int32, torch.int64]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 3e-6, torch.float64: 1e-14}


@pytest.fixture(scope="module", autouse=True)
def ops():
    importlib.import_module("molt._C")
    importlib.import_module("molt._C_cuda")
    return torch.ops.molt


def case(shape, clusters, dtype=torch.float32, label_dtype=torch.int32):
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(shape, dtype=torch.float64, generator=generator).to(dtype)
    labels = torch.randint(0, clusters, (shape[0], *shape[2:]), generator=generator)
    return maps, labels.to(label_dtype)


def expected(maps, labels, alpha, clusters):
    values = maps.double().flatten(2)
    index = labels.flatten(1).long()[:, None].expand(-1, maps.shape[1], -1)
    sums = torch.zeros(*maps.shape[:2], clusters, dtype=torch.float64).scatter_add_(2, index, values)
    counts = torch.zeros_like(sums).scatter_add_(2, index, torch.ones_like(values))
    return ((1 - alpha) * values + alpha * (sums / counts.clamp(min=1)).gather(2, index)).view(maps.shape)


@pytest.mark.parametrize("clusters", [1, 31, 33, 256, 1025, 20_000])
def test_refine_sanitized(ops, clusters):
    maps, labels = case((2, 2, 67, 71), clusters)
    out = ops.cluster_refine(maps.cuda(), labels.cuda(), 0.5, clusters, None).cpu()
    torch.testing.assert_close(out.double(), expected(maps, labels, 0.5, clusters), rtol=0, atol=3e-6)
    means, counts = ops.cluster_mean(maps.cuda(), labels.cuda(), clusters, None)
    assert counts.sum(1).tolist() == [67 * 71] * 2
    whole = (means.cpu().double() * counts.cpu()[:, None]).sum(2)
    torch.testing.assert_close(whole, maps.double().sum((2, 3)), rtol=1e-5, atol=0)


def test_fuse_sanitized(ops):
    maps, labels = case((2, 2, 67, 70), 9)
    small = [maps[:, :, :7, :9].contiguous().cuda(), maps[:, :, 9:14, :5].contiguous().cuda()]
    plain = ops.fuse_and_refine(small, labels.cuda(), [0.5, 0.5], 0.0, 9, None)
    out = ops.fuse_and_refine(small, labels.cuda(), [0.5, 0.5], 0.5, 9, None)
    assert torch.equal(out, ops.cluster_refine(plain, labels.cuda(), 0.5, 9, None))
    total = torch.zeros(2, 2, 67, 70, dtype=torch.float64)
    for scale in small:
        large = torch.nn.functional.interpolate(scale.cpu().double(), (67, 70), mode="bilinear")
        low, high = large.amin((2, 3), keepdim=True), large.amax((2, 3), keepdim=True)
        total += 0.5 * (large - low) / (high - low)
    torch.testing.assert_close(plain.cpu().double(), total, rtol=0, atol=2e-6)


def table(*columns):
    return torch.cat([c.double() if c.dim() == 2 else c.double()[:, None] for c in columns], 1)


def test_sweep_sanitized(ops):
    maps, _ = case((2, 2, 45, 47), 6)
    levels = (maps * 5).byte() * 50
    for own in (levels, levels[:, :1, :20, :21]):
        found = [t.cpu() for t in ops.sweep_boxes(own.cuda(), False, 8)]
        largest, size = (t.cpu() for t in ops.largest_at_cuts(own.cuda(), False, 8))
        rows = table(found[5], found[6], found[0], found[1])
        for cut in (0, 49, 50, 120, 199, 200):
            boxes, area, _, image, channel = ops.component_boxes((own > cut).float(), 0.5, 8, False)
            want = table(image, channel, boxes, area)
            there = rows[(found[2] <= cut) & (cut <= found[3])]
            assert sorted(there.tolist()) == sorted(want.tolist())
            expected, pixels, _ = ops.largest_box((own > cut).float(), 0.5, 8)
            assert torch.equal(largest[:, :, cut], expected) and torch.equal(size[:, :, cut], pixels.double())


def test_vote_and_boxes_sanitized(ops):
    maps, labels = case((2, 2, 45, 47), 6, label_dtype=torch.uint8)
    segments = (torch.arange(45 * 47).view(1, 45, 47) // 60).expand(2, -1, -1).contiguous()
    reference = importlib.import_module("molt.ops.reference")
    want = reference.cluster_vote(labels, segments, 6, 40)
    assert torch.equal(ops.cluster_vote(labels.cuda(), segments.cuda(), 6, 40).cpu(), want)
    for largest in (False, True):
        found = ops.component_boxes(maps.cuda(), 0.6, 8, largest)
        for got, wanted in zip(found, reference.component_boxes(maps, 0.6, 8, largest), strict=True):
            torch.testing.assert_close(got.cpu(), wanted, rtol=1e-6, atol=0)
    boxes, area, mean = ops.largest_box(maps.cuda(), 0.6, 8)
    assert torch.equal(boxes.flatten(0, 1), found[0])
    assert torch.equal(area.flatten(), found[1])
    assert torch.equal(mean.flatten(), found[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("label_dtype", LABELS, ids=str)
def test_refine_of_a_large_batch(ops, dtype, label_dtype):
    """Enough maps for every block, the look-ahead and several rounds of tickets."""
    maps, labels = case((600, 1, 224, 224), 32, dtype, label_dtype)
    maps, labels = maps.cuda(), labels.cuda()
    out = ops.cluster_refine(maps, labels, 0.5, 32, None)
    for i in (0, 1, 299, 599):
        want = expected(maps[i : i + 1].cpu(), labels[i : i + 1].cpu(), 0.5, 32)
        torch.testing.assert_close(out[i : i + 1].cpu().double(), want, rtol=0, atol=TOLERANCE[dtype])
        assert torch.equal(out[i : i + 1], ops.cluster_refine(maps[i : i + 1], labels[i : i + 1], 0.5, 32, None))
    for _ in range(3):
        assert torch.equal(out, ops.cluster_refine(maps, labels, 0.5, 32, None))


def test_bits_do_not_depend_on_what_else_runs(ops):
    maps, labels = (t.cuda() for t in case((64, 3, 225, 223), 100))
    want = ops.cluster_refine(maps, labels, 0.5, 100, None)
    streams = [torch.cuda.Stream() for _ in range(3)]
    outs = []
    torch.cuda.synchronize()
    for _ in range(3):
        for stream in streams:
            with torch.cuda.stream(stream):
                outs.append(ops.cluster_refine(maps, labels, 0.5, 100, None))
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for out in outs)


@pytest.mark.parametrize("clusters", [3, 200])
def test_starved_calls_on_poisoned_scratch_give_the_same_bits(ops, clusters):
    """Painters wait for the very map before theirs, scratch is full of NaN, and another kernel takes the GPU away."""
    module = importlib.import_module("molt._C_cuda")
    maps, labels = (t.cuda() for t in case((64, 2, 130, 131), clusters))
    want = ops.cluster_refine(maps, labels, 0.5, clusters, None)
    table = 128 * 5 * clusters * 4  # of maps, strips and clusters
    sizes = [maps.nbytes, table, table, 128 * clusters * 4, 129 * 4]
    rival, product, stream = torch.rand(4096, 4096).cuda(), torch.empty(4096, 4096).cuda(), torch.cuda.Stream()
    wrong = torch.zeros((), dtype=torch.int64).cuda()
    torch.cuda.synchronize()
    module.set_look_ahead(1)
    try:
        for turn in range(1000):
            if turn % 50 == 0:
                with torch.cuda.stream(stream):
                    torch.mm(rival, rival, out=product)
            freed = [torch.full((size,), 255, dtype=torch.uint8, device="cuda") for size in sizes]
            del freed
            if turn == 0:
                again = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes]
                assert all(bool((t == 255).all()) for t in again), "the allocator gives other memory than was freed"
                del again
            out = ops.cluster_refine(maps, labels, 0.5, clusters, None)
            wrong += (out != want).any()
            del out
        assert int(wrong) == 0
    finally:
        module.set_look_ahead(0)


def test_graph_capture(ops):
    maps, labels = (t.cuda() for t in case((8, 2, 65, 67), 40))
    small = [maps[:, :, :9, :9].contiguous()]

    def step():
        refined = ops.cluster_refine(maps, labels, 0.5, 40, None)
        fused = ops.fuse_and_refine(small, labels, [1.0], 0.5, 40, None)
        voted = ops.cluster_vote(labels, labels, 40, 40)
        return (refined, fused, voted, *ops.cluster_mean(maps, labels, 40, None), *ops.largest_box(refined, 0.5, 8))

    want = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_counts_on_the_cpu_are_refused_in_a_graph(ops):
    maps, labels = (t.cuda() for t in case((2, 1, 9, 9), 4))
    counts = torch.tensor([4, 3])
    want = ops.cluster_refine(maps, labels, 0.5, 4, counts.cuda())
    assert torch.equal(ops.cluster_refine(maps, labels, 0.5, 4, counts), want)
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="counts: got a CPU tensor while"):
        ops.cluster_refine(maps, labels, 0.5, 4, counts)


@pytest.mark.parametrize(("name", "instead"), [("component_boxes", "largest_box"), ("sweep_boxes", "largest_at_cuts")])
def test_a_size_read_back_is_refused_in_a_graph(ops, name, instead):
    public = importlib.import_module("molt.ops")
    levels = torch.randint(0, 255, (2, 1, 9, 9), dtype=torch.uint8).cuda()
    calls = {
        "component_boxes": lambda: ops.component_boxes(levels.float(), 0.5, 8, False),
        "sweep_boxes": lambda: ops.sweep_boxes(levels, False, 8),
    }
    text = f"^{name}: got a call while a CUDA graph is captured, expected {instead}"
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        kept = levels + 1  # an empty graph is warned of
        for call in (calls[name], lambda: getattr(public, name)(levels, backend="reference")):
            with pytest.raises(RuntimeError, match=text):
                call()
    assert kept.shape == levels.shape


def test_more_than_two_to_the_31_elements(ops):
    """12 GiB: offsets beyond 32 bits."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    maps = torch.rand(1, 1, 224, 224).half().cuda().expand(43_000, 1, -1, -1).contiguous()
    labels = torch.randint(0, 9, (1, 224, 224), dtype=torch.uint8).cuda().expand(43_000, -1, -1).contiguous()
    out = ops.cluster_refine(maps, labels, 0.5, 9, None)
    assert torch.equal(out[-1], out[0])
    assert torch.equal(out[:1], ops.cluster_refine(maps[:1], labels[:1], 0.5, 9, None))


def test_wrong_arguments_say_what_was_expected(ops):
    maps, labels = (t.cuda() for t in case((2, 1, 4, 5), 3))
    for call, text in [
        (lambda: ops.cluster_refine(maps, labels, 0.5, -1, None), "num_clusters: got -1, expected a number >= 0"),
        (
            lambda: ops.cluster_refine(maps, labels[:, :3], 0.5, 3, None),
            r"labels: got shape \(2, 3, 5\), expected shape",
        ),
        (
            lambda: ops.cluster_refine(maps, labels.cpu(), 0.5, 3, None),
            "labels: got a tensor not on CUDA, expected cuda:0",
        ),
        (lambda: ops.cluster_refine(maps, labels.short(), 0.5, 3, None), "labels: got scalar type"),
        (lambda: ops.largest_box(maps, 0.0, 8), "threshold: got 0"),
        (lambda: ops.cluster_vote(labels, labels, 1 << 20, 1 << 20), "num_segments: got .* at most 2"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            call()
