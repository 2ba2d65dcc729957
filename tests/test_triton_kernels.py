"""The Triton kernels against float64 formulas; without a GPU they run in Triton's interpreter, in a process of its own.

The interpreter must be chosen before Triton is imported, which this process may have done already.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

from molt.kernels.fuse_maps import fuse_maps, plan  # noqa: E402
from molt.kernels.kmeans import kmeans  # noqa: E402

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# Half a unit in the last place below 1 for the 16-bit types; the interpreter cuts bfloat16 off instead of rounding.
TOLERANCE = {torch.float16: 2.5e-4, torch.bfloat16: 2e-3, torch.float32: 5e-7}
INTERPRETED = TOLERANCE | {torch.bfloat16: 4e-3}


def version(module):
    return tuple(int(part) for part in module.__version__.split(".")[:2])


def to_cuda(value):
    """Tensors with the strides they have, expanded and sliced ones too."""
    if isinstance(value, list):
        return [to_cuda(item) for item in value]
    if not torch.is_tensor(value):
        return value
    everything = value.untyped_storage().nbytes() // value.element_size()
    return (
        value.as_strided((everything,), (1,), 0).cuda().as_strided(value.shape, value.stride(), value.storage_offset())
    )


def on_cuda(function):
    def call(*arguments):
        out = function(*(to_cuda(argument) for argument in arguments))
        return out.cpu() if torch.is_tensor(out) else tuple(part.cpu() for part in out)

    return call


@pytest.fixture(scope="module", params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernels(request):
    if request.param == "cuda":
        yield SimpleNamespace(fuse_maps=on_cuda(fuse_maps), kmeans=on_cuda(kmeans), tolerance=TOLERANCE)
        return
    if version(triton) < (3, 7) and version(np) >= (2, 4):
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not work with NumPy {np.__version__}")
    setting = "import os; os.environ['TRITON_INTERPRET'] = '1'"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=exec, initargs=(setting,)) as process:
        process.submit(torch.set_num_threads, 1).result()
        yield SimpleNamespace(
            fuse_maps=lambda *a: process.submit(fuse_maps, *a).result(),
            kmeans=lambda *a: process.submit(kmeans, *a).result(),
            tolerance=INTERPRETED,
        )


def mostly_interpreted(cases, on_gpu):
    """Parameters of which a GPU gets a few: each compiles anew."""
    assert all(case in cases for case in on_gpu)
    return [pytest.param(*case, marks=() if case in on_gpu else pytest.mark.interpreted) for case in cases]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def weights_along(small, large):
    """(large, small) float64 bilinear weights with half-pixel centres, from integer positions."""
    matrix = torch.zeros(large, small, dtype=torch.float64)
    for x in range(large):
        n = max(0, (2 * x + 1) * small - large)
        i = min(n // (2 * large), small - 1)
        t = (n - 2 * large * i) / (2 * large) if i < small - 1 else 0.0
        matrix[x, i] += 1 - t
        if t:
            matrix[x, i + 1] += t
    return matrix


def fused(maps, size, weights):
    """Truth of finite maps in float64."""
    total = 0
    for scale, weight in zip(maps, weights, strict=True):
        values = scale.double()
        big = weights_along(values.shape[2], size[0]) @ values @ weights_along(values.shape[3], size[1]).T
        low, high = big.amin((2, 3), keepdim=True), big.amax((2, 3), keepdim=True)
        constant = (values == values[:, :, :1, :1]).all(-1).all(-1)[..., None, None] | (high == low)
        total = total + weight * torch.where(constant, 0, (big - low) / torch.where(constant, 1, high - low))
    return total


SIZES = [
    ((3, 4), (7, 9)),
    ((4, 3), (33, 8)),
    ((5, 5), (6, 100)),
    ((1, 5), (3, 16)),
    ((5, 1), (16, 3)),
    ((7, 6), (5, 4)),
    ((9, 9), (1, 1)),
    ((6, 8), (6, 8)),
    ((5, 3), (2, 12)),
    ((3, 5), (12, 2)),
    ((64, 3), (7, 33)),
    ((2, 300), (3, 20)),
    ((2, 300), (3, 600)),
]


@pytest.mark.parametrize(
    ("small", "size", "dtype"),
    mostly_interpreted(
        [(*sizes, torch.float32) for sizes in SIZES]
        + [(*sizes, dtype) for sizes in SIZES[1:6:2] for dtype in DTYPES[:2]],
        [
            (*SIZES[0], torch.float32),
            (*SIZES[12], torch.float32),
            (*SIZES[1], torch.float16),
            (*SIZES[5], torch.bfloat16),
        ],
    ),
    ids=str,
)
def test_one_scale_spans_0_to_1(kernels, small, size, dtype):
    maps = torch.randn(1, 2, *small).to(dtype)
    out = kernels.fuse_maps([maps], size, [1.0])
    assert out.shape == (1, 2, *size) and out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), fused([maps], size, [1.0]), rtol=0, atol=kernels.tolerance[dtype])
    if size != (1, 1):
        assert (out.amin((2, 3)) == 0).all() and (out.amax((2, 3)) == 1).all()


@pytest.mark.parametrize("offset", [-3.0, 1.0, 100.0])
def test_ends_are_exact_whatever_the_rounding(kernels, offset):
    """Reciprocals round down for about half of all ranges: with 12 maps a missing correction shows."""
    maps = torch.rand(1, 12, 3, 3) + offset
    out = kernels.fuse_maps([maps], (8, 7), [1.0])
    assert (out.amin((2, 3)) == 0).all() and (out.amax((2, 3)) == 1).all()
    error = 4 * abs(offset) * torch.finfo(torch.float32).eps + 1e-6
    torch.testing.assert_close(out.double(), fused([maps], (8, 7), [1.0]), rtol=0, atol=error)


@pytest.mark.parametrize(
    ("scales", "dtype"),
    mostly_interpreted(
        [(2, torch.float32), (3, torch.float16), (4, torch.float32), (5, torch.bfloat16), (9, torch.float32)],
        [(3, torch.float16), (9, torch.float32)],
    ),
    ids=str,
)
def test_scales(kernels, scales, dtype):
    shapes = [(3, 4), (5, 2), (1, 1), (8, 9), (20, 3), (2, 2), (4, 4), (11, 12), (6, 1)][:scales]
    maps = [torch.randn(2, 1, *shape).to(dtype) for shape in shapes]
    weights = [(i + 1) * 2 / (scales * (scales + 1)) for i in range(scales)]
    out = kernels.fuse_maps(maps, (10, 13), weights)
    # Up to nine normalised terms, each rounded in float32.
    torch.testing.assert_close(
        out.double(), fused(maps, (10, 13), weights), rtol=0, atol=kernels.tolerance[dtype] + 5e-7
    )
    assert out.min() >= 0 and out.max() <= 1


@pytest.mark.interpreted
def test_three_scales_of_the_pyramid(kernels):
    maps = [torch.randn(1, 1, side, side) for side in (14, 21, 28)]
    out = kernels.fuse_maps(maps, (56, 60), [0.2, 0.3, 0.5])
    torch.testing.assert_close(out.double(), fused(maps, (56, 60), [0.2, 0.3, 0.5]), rtol=0, atol=5e-7)


@pytest.mark.parametrize("dtype", mostly_interpreted([(d,) for d in DTYPES], [(torch.float32,)]), ids=str)
def test_constant_maps_are_zeros(kernels, dtype):
    maps = torch.randn(1, 4, 3, 4).to(dtype)
    maps[:, 1], maps[:, 2], maps[:, 3] = 1 / 3, 0, -1e4
    for size in ((7, 9), (2, 2)):
        out = kernels.fuse_maps([maps], size, [1.0])
        assert (out[:, 1:] == 0).all() and out[:, 0].max() == 1
        both = kernels.fuse_maps([maps, maps.flip(1)], size, [0.5, 0.5])
        torch.testing.assert_close(both[:, 0], out[:, 0] / 2)


@pytest.mark.parametrize(
    ("bad", "size"),
    mostly_interpreted(
        [(math.nan, (9, 10)), (math.inf, (9, 10)), (-math.inf, (2, 1)), (math.nan, (2, 1))],
        [(math.nan, (9, 10)), (math.inf, (9, 10))],
    ),
    ids=str,
)
def test_nan_and_infinity_stay_in_their_map(kernels, bad, size):
    """To (2, 1) the node at (1, 4) takes no part in any sample."""
    maps = [torch.randn(2, 2, 6, 7), torch.randn(2, 2, 3, 3)]
    clean = kernels.fuse_maps(maps, size, [0.5, 0.5])
    alone = kernels.fuse_maps(maps[:1], size, [1.0])
    maps[0][1, 0, 1, 4] = bad
    out = kernels.fuse_maps(maps, size, [0.5, 0.5])
    assert out[1, 0].isnan().all()
    assert kernels.fuse_maps(maps, size, [0.0, 1.0])[1, 0].isnan().all()
    single = kernels.fuse_maps(maps[:1], size, [1.0])
    assert single[1, 0].isnan().all()
    for got, want in ((out, clean), (single, alone)):
        got[1, 0] = want[1, 0]
        assert torch.equal(got, want)


def test_a_range_beyond_float32_is_nan(kernels):
    maps = torch.randn(1, 2, 4, 4)
    maps[0, 1, 0, 0], maps[0, 1, 3, 3] = 3e38, -3e38
    out = kernels.fuse_maps([maps], (8, 7), [1.0])
    assert out[0, 1].isnan().all() and out[0, 0].isfinite().all()


@pytest.mark.parametrize("weights", [[1.0], [0.25, 0.75]], ids=["one", "two"])
def test_ranges_whose_reciprocal_overflows(kernels, weights):
    tiny = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
    maps = [
        torch.randint(-2000, 2000, (1, 2, 3, 4)) * torch.tensor([1.0, 4.0]).view(1, 2, 1, 1) * tiny for _ in weights
    ]
    assert all(0 < m.abs().max() < torch.finfo(torch.float32).smallest_normal for m in maps)
    out = kernels.fuse_maps(maps, (9, 7), weights)
    # A sample is a multiple of the least float, a few thousandths of the range.
    torch.testing.assert_close(out.double(), fused(maps, (9, 7), weights), rtol=0, atol=2e-3)
    assert out.max() > 0.5


@pytest.mark.parametrize("side", mostly_interpreted([(3,), (41,)], [(41,)]))
@pytest.mark.parametrize(
    "weights", [pytest.param([1.0], id="one"), pytest.param([0.5, 0.5], id="two", marks=pytest.mark.interpreted)]
)
def test_huge_nodes_between_the_samples_have_no_say(kernels, side, weights):
    """Three times as many nodes as samples: two in three are not sampled, and would overflow divided by the range.

    In float32 1 / 41 * 41 is not 1.
    """
    for small, size in (((3 * side, 9), (side, 3)), ((3, 3 * side), (1, side))):
        maps = torch.full((1, 1, *small), 1e37)
        maps[:, :, 1::3, 1::3] = torch.rand(size) * 1e-6
        out = kernels.fuse_maps([maps] * len(weights), size, weights)
        want = fused([maps] * len(weights), size, weights)
        torch.testing.assert_close(out.double(), want, rtol=0, atol=5e-7)


def test_views(kernels):
    base = torch.randn(4, 6, 6, 8)
    for maps in (
        base[::3, 1::6, ::2, 1::3],
        base[:1, :2].to(memory_format=torch.channels_last),
        base[:1, :1].expand(2, -1, -1, -1),
        base[1:2, :1].expand(-1, 2, -1, -1),
        base[:1, :1].transpose(2, 3),
        base[1:2, :1, 3:, 5:],
        base[:1, :1, :1, :1].expand(-1, -1, 3, 4),
    ):
        other = base[: len(maps), : maps.shape[1], :3, :3]
        out = kernels.fuse_maps([maps, other], (5, 10), [0.5, 0.5])
        assert torch.equal(out, kernels.fuse_maps([maps.contiguous(), other.contiguous()], (5, 10), [0.5, 0.5]))


@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (0, 0)], ids=str)
def test_empty(kernels, shape):
    assert kernels.fuse_maps([torch.empty(*shape, 3, 4)], (5, 6), [1.0]).shape == (*shape, 5, 6)


@pytest.mark.parametrize(("small", "weights"), [(5, [0.3, 0.7]), (24, [1.0])], ids=["up", "down"])
def test_bits_do_not_depend_on_the_batch_or_the_split(kernels, small, weights):
    """Few maps are split by rows, many are not."""
    maps = [torch.randn(16, 1, small, 3), torch.randn(16, 1, 3, 4)][: len(weights)]
    alone, size = [m[7:8] for m in maps], (20, 9)
    split, whole = (plan(group, size, weights, 1)[0][4] for group in (alone, maps))
    assert split > 1 and whole == 1
    assert torch.equal(kernels.fuse_maps(maps, size, weights)[7:8], kernels.fuse_maps(alone, size, weights))


def test_float64_has_no_triton_form(kernels):
    with pytest.raises(TypeError, match="maps: got float64, expected float16, bfloat16, float32"):
        kernels.fuse_maps([torch.zeros(1, 1, 2, 2).double()], (3, 3), [1.0])
    with pytest.raises(TypeError, match="features: got float64, expected float16, bfloat16, float32"):
        kernels.kmeans(torch.zeros(1, 2, 2).double(), torch.zeros(1, 1, 1, 2), 1, False)


def test_maps_spread_beyond_32_bit_offsets_are_gathered_first():
    for stride, kept in ((2**29 - 1, True), (2**29, False)):
        maps = torch.empty_strided((1, 1, 2, 1), (0, 0, stride, 1), device="meta")
        used = plan([maps], (4, 4), [1.0], 132)[0][6]
        assert (used is maps) == kept and used.stride(2) == (stride if kept else 1)


@pytest.mark.gpu
def test_positions_and_outputs_beyond_32_bits():
    row = torch.randn(1, 1, 1, 70000)
    out = fuse_maps([row.cuda()], (2, 50000), [1.0]).cpu()
    step = torch.arange(50000, dtype=torch.float64)
    at = ((2 * step + 1) * 70000 / 50000 - 1) / 2
    left = at.floor().long()
    values = row[0, 0, 0].double()
    want = values[left] + (at - left) * (values[(left + 1).clamp_max(69999)] - values[left])
    want = (want - want.min()) / (want.max() - want.min())
    torch.testing.assert_close(out[0, 0, 1].double(), want, rtol=0, atol=5e-7)
    maps = torch.randn(1, 3, 2, 2, dtype=torch.float16)
    big = fuse_maps([maps.cuda()], (40000, 30000), [1.0])
    small = fuse_maps([maps.cuda()], (400, 300), [1.0])
    assert torch.equal(big[:, :, -1, -1], small[:, :, -1, -1])
    assert big[0, 2, -1].isfinite().all() and big.amax() == 1


@pytest.mark.gpu
def test_graph_capture():
    maps = [torch.randn(2, 3, side, side, device="cuda") for side in (14, 21, 28)]
    features = torch.randn(2, 300, 64, device="cuda")
    centres = features[:, None, :5].clone()

    def work():
        return fuse_maps(maps, (224, 224), [0.2, 0.3, 0.5]), *kmeans(features, centres, 3, False)

    want = work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(out, want, strict=True):
        assert torch.equal(got, expected)


def lloyd(features, centres, iterations, cosine):
    """Truth of k-means in float64, one image and restart at a time."""
    labels, ends, scores = [], [], []
    for x, starts in zip(features.double(), centres.double(), strict=True):
        for start in starts:
            c = start.clone()
            for step in range(iterations + 1):
                affinity = (2 * x[:, None] * c).sum(-1) - c.square().sum(-1)
                label = affinity.argmax(1)
                for k in range(len(c)) if step < iterations else ():
                    if (label == k).any():
                        mean = x[label == k].mean(0)
                        c[k] = mean / mean.norm().clamp_min(1e-12) if cosine else mean
            labels.append(label)
            ends.append(c)
            scores.append(affinity.amax(1).sum())
    shape = centres.shape[:2]
    return [torch.stack(part).unflatten(0, shape) for part in (labels, ends, scores)]


def blobs(batch, points, dim, k, dtype, spread=0.05):
    """Points around k well separated unit vectors, so that float32 and float64 choose the same clusters."""
    directions = torch.nn.functional.normalize(torch.randn(batch, k, dim), dim=-1)
    which = torch.randint(0, k, (batch, points, 1)).expand(-1, -1, dim)
    points = directions.gather(1, which) + spread * torch.randn(batch, points, dim) / math.sqrt(dim)
    return torch.nn.functional.normalize(points, dim=-1).to(dtype)


SHAPES = [(2, 130, 70, 2, 5), (1, 1, 3, 1, 1), (1, 1100, 8, 1, 3), (2, 70, 64, 1, 17), (1, 90, 128, 1, 70)]


@pytest.mark.parametrize(
    ("shape", "dtype", "cosine"),
    mostly_interpreted(
        list(itertools.product(SHAPES, DTYPES, (True, False))),
        [(SHAPES[0], torch.float32, True), (SHAPES[2], torch.float16, True), (SHAPES[4], torch.bfloat16, False)],
    ),
    ids=str,
)
def test_kmeans(kernels, shape, dtype, cosine):
    batch, points, dim, restarts, k = shape
    features = blobs(batch, points, dim, min(k, 8), dtype)
    start = torch.stack([torch.randperm(points)[:k] for _ in range(restarts)])
    centres = features[:, start].float()
    before = centres.clone()
    labels, ends, score = kernels.kmeans(features, centres, 3, cosine)
    assert labels.dtype == torch.int32 and ends.dtype == score.dtype == torch.float32
    want = lloyd(features, centres, 3, cosine)
    assert torch.equal(labels.long(), want[0])
    torch.testing.assert_close(ends.double(), want[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(score.double(), want[2], rtol=1e-6, atol=1e-5)
    assert torch.equal(centres, before)


def test_kmeans_of_equal_affinities_takes_the_lowest(kernels):
    """Small integers: every product is exact."""
    features = torch.randint(-3, 4, (1, 40, 6)).float()
    centres = torch.randint(-3, 4, (1, 1, 4, 6)).float()
    centres[0, 0, 3], centres[0, 0, 1] = centres[0, 0, 2], centres[0, 0, 0]
    labels, ends, _ = kernels.kmeans(features, centres, 0, False)
    assert torch.equal(labels.long(), lloyd(features, centres, 0, False)[0])
    assert set(labels.unique().tolist()) <= {0, 2} and torch.equal(ends, centres)
    moved = kernels.kmeans(features, centres, 1, False)[1]
    assert torch.equal(moved[0, 0, 1::2], centres[0, 0, 1::2]), "an empty cluster keeps its centre"
    assert not torch.equal(moved, centres)


@pytest.mark.interpreted
def test_kmeans_of_opposite_vectors(kernels):
    features = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    labels, ends, score = kernels.kmeans(features, torch.zeros(1, 1, 1, 2), 2, True)
    assert (labels == 0).all() and (ends == 0).all() and (score == 0).all()


@pytest.mark.interpreted
def test_kmeans_bits_do_not_depend_on_the_batch(kernels):
    features = torch.randn(5, 70, 20)
    centres = features[:, None, :3].expand(-1, 2, -1, -1).clone()
    centres[:, 1] = features[:, 10:13]
    together = kernels.kmeans(features, centres, 3, False)
    alone = kernels.kmeans(features[3:4], centres[3:4, 1:], 3, False)
    for got, want in zip(together, alone, strict=True):
        assert torch.equal(got[3:4, 1:], want)


VIEWS = {
    "rows": lambda base: base[:, 1:],
    "steps": lambda base: base[::2, ::3, 1::2],
    "turned": lambda base: base.transpose(1, 2),
    "expanded": lambda base: base[:1].expand(3, -1, -1),
    "columns": lambda base: base[..., :8],
}


@pytest.mark.parametrize("view", mostly_interpreted([(name,) for name in VIEWS], [("turned",)]))
def test_kmeans_views(kernels, view):
    features = VIEWS[view](torch.randn(3, 40, 24))
    centres = torch.randn(2, len(features), 3, features.shape[2]).transpose(0, 1)
    out = kernels.kmeans(features, centres, 2, False)
    want = kernels.kmeans(features.contiguous(), centres.contiguous(), 2, False)
    for got, expected in zip(out, want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_kmeans_nan_stays_in_its_image(kernels, bad):
    features = torch.randn(2, 50, 6)
    centres = features[:, None, :4].clone()
    clean = kernels.kmeans(features, centres, 2, False)
    features[1, 20, 3] = bad
    out = kernels.kmeans(features, centres, 2, False)
    assert out[0].min() >= 0 and out[0].max() < 4
    assert out[2][1] == -math.inf
    for got, expected in zip(out, clean, strict=True):
        assert torch.equal(got[0], expected[0])


@pytest.mark.parametrize(("batch", "points", "dim"), [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_kmeans_empty(kernels, batch, points, dim):
    centres = torch.randn(batch, 2, 3, dim)
    labels, ends, score = kernels.kmeans(torch.randn(batch, points, dim), centres, 2, True)
    assert labels.shape == (batch, 2, points) and (labels == 0).all()
    assert torch.equal(ends, centres) and torch.equal(score, torch.zeros(batch, 2))


def test_truth_is_bilinear_interpolation():
    for small, size in itertools.chain(SIZES, [((14, 14), (224, 224))]):
        maps = torch.randn(1, 1, *small, dtype=torch.float64)
        want = torch.nn.functional.interpolate(maps, size, mode="bilinear", align_corners=False)
        big = weights_along(small[0], size[0]) @ maps @ weights_along(small[1], size[1]).T
        torch.testing.assert_close(big, want, rtol=0, atol=1e-12)
