"""upsample_normalize, fuse_maps and fuse_and_refine against float64 loops, on hard shapes and values."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from molt import ops

BACKENDS = ["reference", "native"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NAN, INF = math.nan, math.inf
# Half a unit in the last place below 1.
ROUNDING = {torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9, torch.float32: 0, torch.float64: 0}
SIZES = [
    ((1, 1), (4, 3)),
    ((1, 5), (1, 11)),
    ((6, 2), (6, 2)),
    ((14, 14), (5, 6)),
    ((3, 40), (9, 7)),
    ((40, 3), (7, 33)),
    ((8, 9), (32, 33)),
    ((9, 7), (33, 511)),
    ((5, 513), (3, 512)),
    ((2, 3), (1, 1)),
    ((33, 1), (65, 1)),
    ((16, 17), (64, 128)),
    ((16, 17), (129, 64)),
    ((31, 6), (10, 2)),
    ((2, 2), (3, 8192)),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def matrix(source: int, target: int) -> np.ndarray:
    """What each output coordinate takes from each source coordinate, from the sampling position in exact integers."""
    out = np.zeros((target, source))
    for i in range(target):
        n = max(0, (2 * i + 1) * source - target)
        cell = min(n // (2 * target), source - 1)
        share = 0.0 if cell == source - 1 else (n - 2 * target * cell) / (2 * target)
        out[i, cell] = 1 - share
        if share:
            out[i, cell + 1] = share
    return out


def upsampled(maps: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """Each map resized and stretched in float64; zeros where it is constant."""
    values = maps.double().numpy()
    down, right = matrix(values.shape[2], size[0]), matrix(values.shape[3], size[1])
    out = np.zeros((*values.shape[:2], *size))
    for b in range(values.shape[0]):
        for c in range(values.shape[1]):
            resized = down @ values[b, c] @ right.T
            low, high = resized.min(), resized.max()
            if high > low and values[b, c].min() < values[b, c].max():
                out[b, c] = (resized - low) / (high - low)
    return out


def refined(fused: np.ndarray, labels: torch.Tensor, alpha: float) -> np.ndarray:
    """Each pixel blended with the mean of its cluster, cluster by cluster."""
    out, index = fused.copy(), labels.numpy()
    for b in range(fused.shape[0]):
        for k in np.unique(index[b]):
            inside = index[b] == k
            for c in range(fused.shape[1]):
                out[b, c][inside] = (1 - alpha) * fused[b, c][inside] + alpha * math.fsum(
                    fused[b, c][inside]
                ) / inside.sum()
    return out


def close(out: torch.Tensor, want: np.ndarray, backend: str) -> None:
    wide = {"native": 2e-6, "reference": 1e-5}[backend] if out.dtype != torch.float64 else 1e-12
    np.testing.assert_allclose(out.double().numpy(), want, rtol=0, atol=wide + ROUNDING[out.dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "size"), SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upsampling_matches_a_loop(shape: tuple, size: tuple, dtype: torch.dtype, backend: str) -> None:
    maps = torch.randn(2, 3, *shape, dtype=torch.float64).to(dtype)
    out = ops.upsample_normalize(maps, size, backend=backend)
    want = upsampled(maps, size)
    assert out.dtype == dtype and out.shape == (2, 3, *size) and out.is_contiguous()
    close(out, want, backend)
    varied = torch.from_numpy(want.max((2, 3)) > 0)
    assert (out.amin((2, 3)) == 0).all() and (out.amax((2, 3))[varied] == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_upsampling_a_large_map(dtype: torch.dtype, backend: str) -> None:
    maps = torch.randn(1, 1, 37, 29).to(dtype)
    out = ops.upsample_normalize(maps, (1500, 1400), backend=backend)
    want = upsampled(maps, (1500, 1400))
    # The reference takes its positions in float32.
    tolerance = {"native": 2e-6, "reference": 2e-4}[backend] + ROUNDING[dtype]
    np.testing.assert_allclose(out.double().numpy(), want, rtol=0, atol=tolerance)
    assert out.amin() == 0 and out.amax() == 1


def test_many_shapes_attain_both_ends() -> None:
    generator = np.random.default_rng(0)
    for h, w, height, width in generator.integers(1, 40, (300, 4)).tolist():
        maps = torch.randn(1, 1, h, w)
        out = ops.upsample_normalize(maps, (height, width), backend="native")
        want = upsampled(maps, (height, width))
        # Two float32 samples that differ by rounding only stretch to anything.
        if want.max() == 0:
            assert not out.any()
            continue
        assert out.amin() == 0 and out.amax() == 1
        small = np.ptp(matrix(h, height) @ maps[0, 0].double().numpy() @ matrix(w, width).T)
        np.testing.assert_allclose(out.double().numpy(), want, rtol=0, atol=2e-6 / min(small, 1))


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (1e-40, torch.float32),
        (1e-38, torch.float32),
        (1e-30, torch.float32),
        (3.3e38, torch.float32),
        (1e-310, torch.float64),
        (1.7e308, torch.float64),
        (6e-7, torch.float16),
        (65504, torch.float16),
        (1e-39, torch.bfloat16),
        (3.3e38, torch.bfloat16),
    ],
)
def test_ranges_near_the_ends_of_a_type(scale: float, dtype: torch.dtype) -> None:
    maps = (torch.rand(2, 2, 5, 6, dtype=torch.float64) * scale).to(dtype)
    maps[0] *= -1
    for size in ((11, 13), (3, 13), (5, 6)):
        out = ops.upsample_normalize(maps, size, backend="native")
        close(out, upsampled((maps.double() / scale), size), "native")
        assert (out.amin((2, 3)) == 0).all() and (out.amax((2, 3)) == 1).all()
    offset = torch.ones(1, 1, 5, 6, dtype=dtype) * scale
    offset[0, 0, 2, 3] = torch.nextafter(offset[0, 0, 2, 3], torch.zeros((), dtype=dtype))
    out = ops.upsample_normalize(offset, (5, 6), backend="native")
    want = torch.ones(1, 1, 5, 6, dtype=dtype)
    want[0, 0, 2, 3] = 0
    assert torch.equal(out, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scales", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "huge"), [(torch.float32, 1e37), (torch.float64, 1e305)])
def test_huge_nodes_between_the_samples_have_no_say(dtype: torch.dtype, huge: float, scales: int, backend: str) -> None:
    """At a third of the size two nodes in three are not sampled, and would overflow divided by the range."""
    for small, size in (((9, 9), (3, 3)), ((3, 9), (1, 3)), ((9, 3), (3, 1))):
        maps = torch.full((1, 2, *small), huge, dtype=dtype)
        maps[:, 1] *= -1
        seen = torch.rand(size, dtype=dtype) * 1e-6
        maps[:, :, 1::3, 1::3] = seen
        want = ((seen - seen.min()) / (seen.max() - seen.min())).expand(1, 2, -1, -1)
        out = ops.fuse_maps([maps] * scales, size, backend=backend)
        torch.testing.assert_close(out, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(5, 6), (10, 12), (15, 18), (7, 4), (1, 2)])
@pytest.mark.parametrize(("dtype", "huge"), [(torch.float32, 3e38), (torch.float64, 1.7e308), (torch.bfloat16, 3e38)])
def test_a_range_that_overflows_is_nan(size: tuple, dtype: torch.dtype, huge: float, backend: str) -> None:
    maps = torch.rand(1, 3, 5, 6).to(dtype)
    clean = ops.upsample_normalize(maps, size, backend=backend)
    maps[0, 1] = huge
    maps[0, 1, :, ::2] *= -1  # neighbours, so that their difference overflows too
    maps[0, 2, :, :3], maps[0, 2, :, 3:] = -huge, huge
    out = ops.upsample_normalize(maps, size, backend=backend)
    assert out[0, 2].isnan().all() and torch.equal(out[0, 0], clean[0, 0])
    # Samples of the shrunk map 1 lie close enough together, though their neighbours do not.
    assert out[0, 1].isnan().all() or (size[1] < 6 and out[0, 1].amax() == 1)
    fused = ops.fuse_maps([torch.rand(1, 3, 4, 4).to(dtype), maps], size, backend=backend)
    assert fused[0, 2].isnan().all() and not fused[0, 0].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(5, 6), (17, 19), (2, 9), (3, 2), (1, 1)])
def test_constant_maps_are_zero(size: tuple, dtype: torch.dtype, backend: str) -> None:
    values = torch.tensor([0.1, 1 / 3, -7.7, 0.0, -0.0, 65504, 1e-7, 1e-40, 3e38, -3e38], dtype=torch.float64).to(dtype)
    values = values[values.isfinite()]
    maps = values.view(1, -1, 1, 1).repeat(1, 1, 5, 6)
    assert torch.equal(
        ops.upsample_normalize(maps, size, backend=backend), torch.zeros(1, len(values), *size).to(dtype)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_one_bad_value_anywhere_spoils_its_map_alone(bad: float, dtype: torch.dtype, backend: str) -> None:
    maps = torch.rand(43, 1, 6, 7).to(dtype)
    for size in ((2, 2), (13, 15), (1, 20)):
        clean = ops.upsample_normalize(maps, size, backend=backend)
        spoiled = maps.clone()
        spoiled.view(43, 42)[torch.arange(42), torch.arange(42)] = bad
        out = ops.upsample_normalize(spoiled, size, backend=backend)
        assert out[:42].isnan().all() and torch.equal(out[42], clean[42])
        for weights in (None, [1, 0]):  # a weight of 0 does not hide it
            fused = ops.fuse_maps([maps, spoiled], size, weights, backend=backend)
            assert fused[:42].isnan().all() and not fused[42].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches_are_empty(backend: str) -> None:
    for batch, channels in ((0, 2), (2, 0), (0, 0)):
        maps = torch.rand(batch, channels, 3, 3, requires_grad=True)
        labels = torch.full((batch, 4, 5), 99)
        for out in (
            ops.upsample_normalize(maps, (4, 5), backend=backend),
            ops.fuse_maps([maps, maps], (4, 5), backend=backend),
            ops.fuse_and_refine([maps, maps], labels, 0.5, 100, backend=backend),
        ):
            assert out.shape == (batch, channels, 4, 5)
            (grad,) = torch.autograd.grad(out.sum(), maps)
            assert grad.shape == maps.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scales", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fusing_matches_a_loop(scales: int, dtype: torch.dtype, backend: str) -> None:
    maps = [
        torch.randn(2, 3, *shape, dtype=torch.float64).to(dtype)
        for shape in [(4, 5), (40, 7), (7, 40), (1, 1), (9, 33)]
    ]
    for size in ((11, 34), (1, 1), (33, 9)):
        for weights in (None, [3, 0, 1, 2, 0.5], [1, 0, 0, 0, 0]):
            given = None if weights is None else weights[:scales]
            shares = np.array([1.0] * scales if given is None else given)
            want = sum(s * upsampled(m, size) for s, m in zip(shares / shares.sum(), maps, strict=False))
            out = ops.fuse_maps(maps[:scales], size, given, backend=backend)
            assert out.dtype == dtype and out.is_contiguous()
            close(out, want, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_fusing_and_refining_matches_a_loop(label_dtype: torch.dtype, dtype: torch.dtype, backend: str) -> None:
    for batch, channels, size in ((1, 1, (91, 91)), (13, 1, (8, 9)), (2, 3, (1, 1))):
        maps = [torch.randn(batch, channels, *shape).to(dtype) for shape in [(4, 5), (40, 7), (3, 3)]]
        labels = torch.randint(0, 6, (batch, *size)).to(label_dtype)
        shares = (0.5, 0.2, 0.3)
        fused = sum(s * upsampled(m, size) for s, m in zip(shares, maps, strict=True))
        for alpha in (0.0, 0.3, 1.0):
            want = refined(fused, labels, alpha)
            for given in (6, None, torch.tensor([7] * batch)):
                out = ops.fuse_and_refine(maps, labels, alpha, given, [5, 2, 3], backend=backend)
                assert out.dtype == dtype and out.shape == (batch, channels, *size)
                close(out, want, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "size"), [(2, (150, 149)), (13, (20, 21)), (20, (130, 131))])
def test_the_parts_in_one_go_round_once(dtype: torch.dtype, batch: int, size: tuple[int, int]) -> None:
    maps = [torch.randn(batch, 2, *shape).to(dtype) for shape in [(14, 15), (7, 9)]]
    labels = torch.randint(0, 2**40, (batch, *size)) % torch.tensor([[[300]]])
    labels[-1] *= 2**40
    wide = [m if dtype == torch.float64 else m.float() for m in maps]
    apart = ops.cluster_refine(ops.fuse_maps(wide, size, backend="native"), labels, 0.5, backend="native")
    assert torch.equal(ops.fuse_and_refine(maps, labels, 0.5, backend="native"), apart.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(40, 1, 5, 6), (40, 1, 90, 91), (3, 2, 130, 131)], ids=str)
def test_labels_out_of_range_name_their_image(shape: tuple, backend: str) -> None:
    maps = [torch.rand(*shape[:2], 3, 4)]
    for value, limit, words in (
        (6, 6, r"values in \[0, 6\)"),
        (-2, None, "values >= 0"),
        (-1, 6, r"values in \[0, 6\)"),
    ):
        labels = torch.randint(0, 6, (shape[0], *shape[2:]))
        labels[-2, -1, -1] = value
        with pytest.raises(ValueError, match=f"^labels: got {value} in image {shape[0] - 2}, expected {words}$"):
            ops.fuse_and_refine(maps, labels, 0.5, limit, backend=backend)
    limits = torch.full((shape[0],), 9)
    limits[-1] = 2
    with pytest.raises(ValueError, match=rf"^labels: got 5 in image {shape[0] - 1}, expected values in \[0, 2\)$"):
        ops.fuse_and_refine(maps, torch.full((shape[0], *shape[2:]), 5), 0.5, limits, backend=backend)


SINGLE = ("up", "up and down", "down", "same", "fused", "fused, one unused")
LABELS = torch.randint(0, 3, (2, 5, 4), generator=torch.Generator().manual_seed(1))
FORMS = {
    "up": lambda a, b, k: ops.upsample_normalize(a, (5, 6), **k),
    "up and down": lambda a, b, k: ops.upsample_normalize(a, (7, 2), **k),
    "down": lambda a, b, k: ops.upsample_normalize(b, (2, 3), **k),
    "same": lambda a, b, k: ops.upsample_normalize(a, (3, 4), **k),
    "fused": lambda a, b, k: ops.fuse_maps([a, b], (5, 4), [1, 3], **k),
    "fused, one unused": lambda a, b, k: ops.fuse_maps([a, b], (5, 4), [1, 0], **k),
    "refined": lambda a, b, k: ops.fuse_and_refine([a, b], LABELS, 0.3, 3, [1, 3], **k),
    "refined, ragged": lambda a, b, k: ops.fuse_and_refine([a, b], LABELS, 1.0, torch.tensor([3, 5]), **k),
}


@pytest.fixture
def alone() -> Iterator[None]:
    """One thread: on tensors this small threads mostly wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_gradients(form: str, backend: str) -> None:
    maps = [torch.randn(2, 1, *shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (4, 3))]

    def call(*given: torch.Tensor) -> torch.Tensor:
        # A term that needs both keeps gradcheck from an input without a gradient.
        return FORMS[form](*given, {"backend": backend}) + 0 * (given[0].sum() + given[1].sum())

    assert torch.autograd.gradcheck(call, maps)
    assert torch.autograd.gradgradcheck(
        call, [m[:1].detach().requires_grad_() for m in maps] if form in SINGLE else maps
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_are_the_references(form: str, dtype: torch.dtype) -> None:
    bases = [torch.randn(1, 1, *shape).to(dtype) for shape in ((4, 6), (5, 6))]
    weight = torch.randn(2, 1, 8, 7)
    grads = []
    for backend in BACKENDS:
        leaves = [base.clone().requires_grad_() for base in bases]
        views = [leaves[0].expand(2, -1, -1, -1)[:, :, 1:, 1:5], leaves[1].expand(2, -1, -1, -1)]
        out = FORMS[form](*views, {"backend": backend})
        loss = (out.float() * weight[:, :, : out.shape[2], : out.shape[3]]).sum() + 0 * sum(x.sum() for x in leaves)
        grads.append(torch.autograd.grad(loss, leaves))
    for mine, theirs in zip(*grads, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_extremes_share_their_gradient(dtype: torch.dtype, backend: str) -> None:
    maps = torch.tensor([[[[0, 0.25, 1, 1, 0]]]], dtype=dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.upsample_normalize(maps, (1, 5), backend=backend)[0, 0, 0, 1], maps)
    assert grad.flatten().tolist() == [-0.375, 1, -0.125, -0.125, -0.375]
    flat = torch.full((1, 1, 3, 3), 0.1, dtype=dtype, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.upsample_normalize(flat, (7, 7), backend=backend).sum(), flat)
    assert not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("maps", "weights", "word"),
    [
        ([], None, "maps: "),
        (torch.rand(1, 1, 2, 2), None, "maps: got Tensor"),
        ([torch.rand(1, 1, 2, 2), torch.rand(2, 1, 2, 2)], None, r"maps\[1\].*\(2, 1\), expected \(1, 1\)"),
        ([torch.rand(1, 1, 2, 2), torch.rand(1, 1, 2, 2).double()], None, r"maps\[1\]: got dtype"),
        ([torch.rand(1, 1, 2, 2), torch.rand(1, 1, 2, 2, device="meta")], None, r"maps\[1\]: got device meta"),
        ([torch.rand(1, 1, 2, 0)], None, r"maps\[0\]: got shape \(1, 1, 2, 0\)"),
        ([torch.rand(1, 1, 2, 2)], [1, 2], "weights: got 2 numbers"),
        ([torch.rand(1, 1, 2, 2)] * 2, [1e308, 1e308], "weights: .* expected numbers of finite sum"),
        ([torch.rand(1, 1, 2, 2)], [0], "weights"),
        ([torch.rand(1, 1, 2, 2)], [NAN], "weights"),
        ([torch.rand(1, 1, 2, 2)], [INF], "weights"),
        ([torch.rand(1, 1, 2, 2)] * 2, [2, -1], "weights"),
    ],
)
def test_scales_and_weights_are_checked(maps: list, weights: list | None, word: str, backend: str) -> None:
    with pytest.raises(ValueError, match=word):
        ops.fuse_maps(maps, (4, 4), weights, backend=backend)
    with pytest.raises(ValueError, match=word):
        ops.fuse_and_refine(maps, torch.zeros(1, 4, 4, dtype=torch.int64), 0.5, 1, weights, backend=backend)


GOOD = torch.zeros(1, 4, 4, dtype=torch.int64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changed", "error", "word"),
    [
        ({"labels": GOOD.float()}, TypeError, "labels: got float32"),
        ({"labels": GOOD[0]}, ValueError, r"labels: got shape \(4, 4\)"),
        ({"labels": GOOD.repeat(2, 1, 1)}, ValueError, "labels: got 2 images, expected 1"),
        ({"labels": GOOD[:, :0]}, ValueError, r"labels: got shape \(1, 0, 4\)"),
        ({"labels": GOOD.to("meta")}, ValueError, "labels: got a tensor on meta"),
        ({"alpha": 1.5}, ValueError, "alpha: got 1.5"),
        ({"num_clusters": -1}, ValueError, "num_clusters: got -1"),
        ({"num_clusters": torch.ones(3, dtype=torch.int64)}, ValueError, r"num_clusters: got shape \(3,\)"),
    ],
)
def test_arguments_of_fuse_and_refine_are_checked(changed: dict, error: type, word: str, backend: str) -> None:
    given = {"maps": [torch.rand(1, 1, 2, 2)], "labels": GOOD, "backend": backend} | changed
    with pytest.raises(error, match="^" + word):
        ops.fuse_and_refine(**given)


@pytest.mark.parametrize("size", [(0, 4), (4,), 4, (4.5, 2), "44", (True, 2), (3, -1)])
def test_size_is_checked(size: object) -> None:
    for call in (
        lambda: ops.upsample_normalize(torch.rand(1, 1, 2, 2), size),
        lambda: ops.fuse_maps([GOOD[None] / 1], size),
    ):
        with pytest.raises((TypeError, ValueError), match="^size: got"):
            call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_maps_are_checked(backend: str) -> None:
    for call in (
        lambda m: ops.upsample_normalize(m, (2, 2), backend=backend),
        lambda m: ops.fuse_maps([m], (2, 2), backend=backend),
    ):
        for wrong, error in (
            (torch.rand(3, 3), ValueError),
            (GOOD[None], TypeError),
            (torch.rand(1, 1, 0, 3), ValueError),
        ):
            with pytest.raises(error, match="^maps"):
                call(wrong)


def test_sizes_of_every_kind_of_integer() -> None:
    maps = torch.rand(1, 1, 4, 5)
    sizes = [(np.int64(8), np.uint8(9)), np.array([8, 9]), torch.tensor([8, 9]), torch.Size([8, 9])]
    for size in [*sizes, [np.array(8), torch.tensor(9)]]:
        assert ops.upsample_normalize(maps, size).shape == (1, 1, 8, 9), size
    for size in ((True, 9), (8.0, 9), np.array([8.0, 9.0]), torch.tensor([[8, 9]]), np.array(8), "89", (8, None)):
        with pytest.raises(TypeError, match="^size: got .*, expected"):
            ops.upsample_normalize(maps, size)
