"""The operators' kernels on a GPU against float64 on the CPU, and what only a GPU can show: graphs, streams, size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from molt import _extension, ops

pytestmark = pytest.mark.gpu

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 4e-6, torch.float64: 1e-12}
LABELS = [torch.uint8, torch.int32, torch.int64]
SHAPES = [(1, 1, 1, 1), (3, 2, 5, 7), (2, 1, 64, 128), (1, 3, 91, 91), (5, 2, 224, 224), (1, 1, 700, 513)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_sync() -> Iterator[None]:
    """Make every wait for the device an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def labels_of(shape: tuple[int, ...], clusters: int, dtype: torch.dtype, step: int) -> Tensor:
    batch, _, height, width = shape
    small = torch.randint(clusters, (batch, -(-height // step), -(-width // step)))
    return small.repeat_interleave(step, 1).repeat_interleave(step, 2)[:, :height, :width].contiguous().to(dtype)


def test_extension_is_there() -> None:
    assert _extension.CUDA.module is not None, _extension.CUDA.reason
    assert _extension.TRITON_MISSING is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_cluster_operators_agree_with_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    maps = torch.rand(shape).to(dtype)
    for clusters in (1, 5, 32, 33, 100, 256, 257, 1000):
        for label_dtype in LABELS:
            used = min(clusters, 256) if label_dtype == torch.uint8 else clusters
            for step in (1, 8):
                labels = labels_of(shape, used, label_dtype, step)
                want = ops.cluster_refine(maps.double(), labels, 0.3, clusters, backend="reference")
                out = ops.cluster_refine(maps.cuda(), labels.cuda(), 0.3, clusters, backend="native")
                torch.testing.assert_close(out.cpu().double(), want, rtol=0, atol=TOLERANCE[dtype])
        means, members = ops.cluster_mean(maps.cuda(), labels.cuda(), clusters, backend="native")
        want_means, want_members = ops.cluster_mean(maps.double(), labels, clusters, backend="reference")
        assert torch.equal(members.cpu(), want_members)
        torch.testing.assert_close(means.cpu().double(), want_means, rtol=0, atol=4e-6)


# Few: sizes, scales and dtypes each compile anew. The interpreter covers the rest (tests/test_triton_kernels.py).
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float32, (224, 224)),
        (torch.float32, (1000, 37)),
        (torch.float16, (100, 100)),
        (torch.bfloat16, (33, 130)),
    ],
    ids=str,
)
def test_fusion_agrees_with_float64(size: tuple[int, int], dtype: torch.dtype) -> None:
    for sides in (
        [(14, 14), (21, 21), (28, 28)],
        [(40, 1), (64, 64), (7, 9), (8, 8), (3, 3)],
        [(14, 14)],
    ):
        maps = [torch.randn(3, 2, *side).to(dtype) for side in sides]
        weights = [1.0 + i for i in range(len(maps))]
        want = ops.fuse_maps([m.double() for m in maps], size, weights, backend="reference")
        out = ops.fuse_maps([m.cuda() for m in maps], size, weights, backend="native")
        torch.testing.assert_close(out.cpu().double(), want, rtol=0, atol=TOLERANCE[dtype])
        labels = labels_of((3, 2, *size), 9, torch.int32, 4)
        want = ops.cluster_refine(want, labels, 0.4, 9, backend="reference")
        out = ops.fuse_and_refine([m.cuda() for m in maps], labels.cuda(), 0.4, 9, weights, backend="native")
        torch.testing.assert_close(out.cpu().double(), want, rtol=0, atol=TOLERANCE[dtype])
    one = ops.upsample_normalize(maps[0].cuda(), size, backend="native").flatten(2)
    assert (one.amin(2) == 0).all() and (one.amax(2) == 1).all()


def test_special_values() -> None:
    maps = torch.rand(2, 4, 9, 9)
    maps[0, 1], maps[0, 2, 3, 3], maps[1, 0, 0, 0] = 7.5, torch.nan, torch.inf
    out = ops.upsample_normalize(maps.cuda(), (224, 224), backend="native").cpu()
    assert not out[0, 1].any() and out[0, 2].isnan().all() and out[1, 0].isnan().all()
    assert out[1, 1:].isfinite().all() and out[0, 0].isfinite().all()
    labels = labels_of((2, 4, 9, 9), 3, torch.int32, 3)
    refined = ops.cluster_refine(maps.cuda(), labels.cuda(), 0.5, 3, backend="native").cpu()
    want = ops.cluster_refine(maps, labels, 0.5, 3, backend="reference")
    torch.testing.assert_close(refined, want, rtol=0, atol=4e-6, equal_nan=True)


def test_labels_out_of_range_keep_their_pixels() -> None:
    maps, labels = torch.rand(2, 2, 30, 31), labels_of((2, 2, 30, 31), 4, torch.int64, 3)
    inside = ops.cluster_refine(maps, labels, 0.5, 4, backend="reference")
    wrong = labels.clone()
    wrong[0, 3:9, 4], wrong[1, 0, 0], wrong[1, 29, 30] = -1, 2**40, 4
    out = ops.cluster_refine(maps.cuda(), wrong.cuda(), 0.5, 4, backend="native").cpu()
    twin = ops.cluster_refine(maps.cuda(), wrong.cuda(), 0.5, 4, backend="reference").cpu()
    torch.testing.assert_close(out, twin, rtol=0, atol=4e-6)
    kept = (wrong < 0) | (wrong >= 4)
    assert torch.equal(out[:, 0][kept], maps[:, 0][kept]) and not torch.equal(out, inside)
    ragged = torch.tensor([2, 4]).cuda()
    out = ops.cluster_refine(maps.cuda(), labels.cuda(), 0.5, ragged, backend="native")
    twin = ops.cluster_refine(maps.cuda(), labels.cuda(), 0.5, ragged, backend="reference")
    torch.testing.assert_close(out, twin, rtol=0, atol=4e-6)


def test_votes_and_boxes_agree_with_the_cpu() -> None:
    for shape in [(1, 1, 1), (3, 50, 61), (2, 224, 224), (1, 700, 513)]:
        for step in (1, 6):
            labels = labels_of((shape[0], 1, *shape[1:]), 30, torch.int32, step)
            segments = labels_of((shape[0], 1, *shape[1:]), 400, torch.int32, 9)
            out = ops.cluster_vote(labels.cuda(), segments.cuda(), 30, 400, backend="native")
            assert torch.equal(out.cpu(), ops.cluster_vote(labels, segments, 30, 400, backend="reference"))
    for dtype in (*FLOATS, torch.float64):
        for side in ((1, 1), (17, 230), (224, 224), (600, 333)):
            maps = torch.rand(2, 3, *side, dtype=torch.float64).pow(3).to(dtype)
            smooth = ops.upsample_normalize(torch.rand(2, 3, 9, 9), side).to(dtype)
            for given in (maps, smooth):
                for connectivity in (4, 8):
                    for largest in (True, False):
                        want = ops.component_boxes(given, 0.5, connectivity=connectivity, largest=largest)
                        found = ops.component_boxes(
                            given.cuda(), 0.5, connectivity=connectivity, largest=largest, backend="native"
                        )
                        for name in ("boxes", "area", "image", "channel"):
                            assert torch.equal(getattr(found, name).cpu(), getattr(want, name)), name
                        torch.testing.assert_close(found.mean.cpu(), want.mean, rtol=1e-5, atol=1e-6)
                    boxes, area, mean = ops.largest_box(given.cuda(), 0.5, connectivity=connectivity, backend="native")
                    expected = ops.largest_box(given, 0.5, connectivity=connectivity, backend="reference")
                    assert torch.equal(boxes.cpu(), expected[0]) and torch.equal(area.cpu(), expected[1])
                    torch.testing.assert_close(mean.cpu(), expected[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_kmeans_agrees_with_the_cpu(metric: str) -> None:
    for number, dim, clusters in [(5, 70, 2), (1024, 384, 5), (3600, 384, 2)]:
        # Well apart, so that rounding moves no point to another cluster.
        truth = torch.randint(clusters, (2, number))
        features = torch.randn(clusters, dim)[truth] * 3 + 0.05 * torch.randn(2, number, dim)
        on_cpu = ops.kmeans(features, clusters, metric=metric)
        found = ops.kmeans(features.cuda(), clusters, metric=metric, backend="native")
        assert (found.labels.cpu() == on_cpu.labels).float().mean() > 0.999
        torch.testing.assert_close(found.centres.cpu(), on_cpu.centres, rtol=1e-3, atol=1e-3)


CALLS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "upsample_normalize": lambda x: ops.upsample_normalize(x["small"][0], (224, 224), backend="native"),
    "fuse_maps": lambda x: ops.fuse_maps(x["small"], (224, 224), backend="native"),
    "cluster_mean": lambda x: ops.cluster_mean(x["maps"], x["labels"], 100, backend="native"),
    "cluster_refine": lambda x: ops.cluster_refine(x["maps"], x["labels"], 0.5, 100, backend="native"),
    "cluster_refine-wide": lambda x: ops.cluster_refine(x["maps"], x["labels"], 0.5, 1000, backend="native"),
    "cluster_refine-uint8": lambda x: ops.cluster_refine(x["maps"], x["labels"].byte(), 0.5, backend="native"),
    "cluster_refine-ragged": lambda x: ops.cluster_refine(x["maps"], x["labels"], 0.5, x["counts"], backend="native"),
    "fuse_and_refine": lambda x: ops.fuse_and_refine(x["small"], x["labels"], 0.5, 100, backend="native"),
    "cluster_vote": lambda x: ops.cluster_vote(x["labels"], x["segments"], 100, 400, backend="native"),
    "largest_box": lambda x: ops.largest_box(x["maps"], 0.9, backend="native"),
    "kmeans": lambda x: torch.ops.molt.kmeans(x["vectors"], x["starts"], 5, False),
}


def inputs(batch: int = 6) -> dict[str, Any]:
    labels = labels_of((batch, 1, 224, 224), 100, torch.int32, 8)
    vectors = torch.randn(batch, 300, 64)
    on_cpu = {
        "small": [torch.randn(batch, 2, side, side) for side in (14, 21, 28)],
        "maps": torch.rand(batch, 2, 224, 224),
        "labels": labels,
        "segments": labels_of((batch, 1, 224, 224), 400, torch.int32, 11),
        "counts": torch.full((batch,), 90),
        "vectors": vectors,
        "starts": vectors[:, None, :4].clone(),
    }
    return {
        k: [m.cuda() for m in v] if isinstance(v, list) else v if k == "counts" else v.cuda() for k, v in on_cpu.items()
    }


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_read_back(name: str, no_sync: None) -> None:
    torch.cuda.set_sync_debug_mode("default")
    given = inputs()
    CALLS[name](given)  # the first call may compile
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    CALLS[name](given)


@pytest.mark.parametrize("name", [n for n in CALLS if n != "cluster_refine-ragged"])  # its counts come from the host
def test_graphs_replay(name: str) -> None:
    given, other = inputs(), inputs()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            CALLS[name](given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = CALLS[name](given)
    for key, value in other.items():
        pairs = zip(given[key], value, strict=True) if isinstance(value, list) else [(given[key], value)]
        for to, source in pairs:
            to.copy_(source)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert same(out, CALLS[name](other))


@pytest.mark.parametrize("name", CALLS)
def test_another_stream_is_honoured(name: str) -> None:
    given = inputs()
    want = [t.clone() for t in flat(CALLS[name](given))]
    source = inputs()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # a kernel on the default stream would now read the wrong values
        late = {k: [m.clone() for m in v] if isinstance(v, list) else v.clone() for k, v in given.items()}
        out = CALLS[name](late)
        # What comes after on the same stream must not overtake.
        for value in late.values():
            for tensor in value if isinstance(value, list) else [value]:
                tensor.zero_()
    stream.synchronize()
    assert same(out, want) and len(source) == len(given)


@pytest.mark.parametrize("name", CALLS)
def test_bits_repeat_wherever_an_image_stands(name: str) -> None:
    given = inputs()
    whole = flat(CALLS[name](given))
    for _ in range(5):
        assert same(CALLS[name](given), whole)
    for image in (0, 3, 5):
        part = {
            k: [m[image : image + 1] for m in v] if isinstance(v, list) else v[image : image + 1]
            for k, v in given.items()
        }
        for a, b in zip(flat(CALLS[name](part)), whole, strict=True):
            assert torch.equal(a[0], b[image])


@pytest.mark.parametrize("name", ["upsample_normalize", "fuse_maps", "cluster_refine", "fuse_and_refine"])
def test_gradients_agree_with_the_reference(name: str) -> None:
    given = inputs(2)
    key = "maps" if name == "cluster_refine" else "small"
    leaves = [t.requires_grad_() for t in flat(given[key])]
    out = CALLS[name](given)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    calls: dict[str, Callable[[], Tensor]] = {
        "upsample_normalize": lambda: ops.upsample_normalize(leaves[0], (224, 224), backend="reference"),
        "fuse_maps": lambda: ops.fuse_maps(leaves, (224, 224), backend="reference"),
        "cluster_refine": lambda: ops.cluster_refine(leaves[0], given["labels"], 0.5, 100, backend="reference"),
        "fuse_and_refine": lambda: ops.fuse_and_refine(leaves, given["labels"], 0.5, 100, backend="reference"),
    }
    twins = torch.autograd.grad((calls[name]() * weight).sum(), leaves, allow_unused=True)
    for mine, twin in zip(grads, twins, strict=True):
        if twin is not None:
            assert mine is not None
            assert (mine - twin).norm() <= 1e-4 * twin.norm()


@pytest.mark.parametrize("name", [n for n in CALLS if "-" not in n])
def test_compiles_as_one_graph(name: str) -> None:
    given = inputs()
    compiled = torch.compile(CALLS[name], fullgraph=True)
    assert same(compiled(given), CALLS[name](given))


def test_operators_pass_opcheck() -> None:
    small, maps = torch.randn(2, 1, 5, 6, device="cuda"), torch.rand(2, 1, 9, 11, device="cuda")
    labels = torch.randint(4, (2, 9, 11), device="cuda")
    torch.library.opcheck(torch.ops.molt.upsample_normalize, (small, 9, 11))
    torch.library.opcheck(torch.ops.molt.fuse_maps, ([small, small], 9, 11, [0.5, 0.5]))
    torch.library.opcheck(torch.ops.molt.cluster_mean, (maps, labels, 4, None))
    torch.library.opcheck(torch.ops.molt.cluster_refine, (maps, labels, 0.5, 4, None))
    torch.library.opcheck(torch.ops.molt.fuse_and_refine, ([small], labels, [1.0], 0.5, 4, None))
    torch.library.opcheck(torch.ops.molt.cluster_vote, (labels, labels, 4, 4))
    torch.library.opcheck(torch.ops.molt.largest_box, (maps, 0.5, 8))
    torch.library.opcheck(torch.ops.molt.kmeans, (maps.flatten(2).repeat(1, 5, 1), maps.new_ones(2, 1, 2, 99), 2, True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_more_than_two_to_the_31_elements(dtype: torch.dtype) -> None:
    number = 2**31 // 224**2 + 40
    small = torch.randn(number, 1, 14, 14, device="cuda", dtype=dtype)
    fused = ops.fuse_maps([small], (224, 224), backend="native")
    assert fused.numel() > 2**31
    labels = torch.randint(0, 100, (1, 28, 28), device="cuda", dtype=torch.uint8)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2).expand(number, -1, -1)
    refined = ops.cluster_refine(fused, labels, 0.5, 100, backend="native")
    for image in (0, number // 2, number - 1):
        want = ops.upsample_normalize(small[image : image + 1], (224, 224), backend="native")
        assert torch.equal(fused[image : image + 1], want)
        want = ops.cluster_refine(want, labels[:1], 0.5, 100, backend="native")
        assert torch.equal(refined[image : image + 1], want)
    del refined
    boxes, area, _ = ops.largest_box(fused, 0.5, backend="native")
    last, last_area, _ = ops.largest_box(fused[-20:], 0.5, backend="native")
    assert (area > 0).all() and torch.equal(boxes[-20:], last) and torch.equal(area[-20:], last_area)


def test_one_map_of_many_pixels() -> None:
    maps = torch.rand(1, 1, 20000, 20000, device="cuda", dtype=torch.float16)
    labels = (torch.arange(20000, device="cuda") // 100).int().expand(1, 20000, -1)
    out = ops.cluster_refine(maps, labels, 1.0, 200, backend="native")
    want = maps[0, 0].float().view(20000, 200, 100).mean((0, 2))
    torch.testing.assert_close(out[0, 0, 0, ::100].float(), want, rtol=0, atol=2e-3)
