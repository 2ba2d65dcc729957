"""cluster_mean against a float64 loop, on hard shapes and values, and its messages."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from molt.ops import cluster_mean

BACKENDS = ["reference", "native"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LABEL_DTYPES = [torch.uint8, torch.int32, torch.int64]
# Both sides of a group of 8, of the 512 pixels that 16-bit values are read by, and of a strip of 8192.
SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 1, 7),
    (1, 2, 3, 3),
    (3, 2, 13, 17),
    (2, 1, 19, 27),
    (10, 1, 16, 33),
    (2, 1, 64, 128),
    (1, 2, 91, 91),
    (1, 9, 70, 127),
    (9, 1, 90, 92),
]
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def looped(values: torch.Tensor, labels: torch.Tensor, size: int) -> tuple[np.ndarray, np.ndarray]:
    """In float64 by a loop over images, channels and clusters."""
    wide, index = values.double().numpy(), labels.numpy()
    means, counts = np.zeros((*wide.shape[:2], size)), np.zeros((wide.shape[0], size), dtype=np.int64)
    for b in range(wide.shape[0]):
        for k in np.unique(index[b]):
            inside = index[b] == k
            counts[b, k] = inside.sum()
            for c in range(wide.shape[1]):
                means[b, c, k] = math.fsum(wide[b, c][inside]) / counts[b, k]
    return means, counts


def check(
    values: torch.Tensor, labels: torch.Tensor, given: object, size: int, backend: str, tolerance: float = 2e-6
) -> None:
    means, counts = cluster_mean(values, labels, given, backend=backend)
    want, members = looped(values, labels, size)
    assert means.dtype == (torch.float64 if values.dtype == torch.float64 else torch.float32)
    assert counts.dtype == torch.int64 and means.shape == want.shape and means.is_contiguous()
    assert torch.equal(counts, torch.from_numpy(members))
    tolerance = 1e-14 if values.dtype == torch.float64 else tolerance
    np.testing.assert_allclose(means.double().numpy(), want, rtol=0, atol=tolerance)
    absent = torch.from_numpy(members == 0)[:, None].expand_as(means)
    assert not means[absent].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_a_loop(shape: tuple, dtype: torch.dtype, backend: str) -> None:
    values = torch.rand(shape, dtype=torch.float64).to(dtype)
    noisy = torch.randint(0, 5, (shape[0], *shape[2:]))
    noisy[:, 0, 0] = 4
    for labels in (noisy, noisy.repeat_interleave(11, 2)[:, :, : shape[3]]):
        ragged = torch.tensor([5 + b % 3 for b in range(shape[0])])
        for label_dtype, given, size in zip(LABEL_DTYPES, (None, 7, ragged), (5, 7, int(ragged.max())), strict=True):
            check(values, labels.to(label_dtype), given, size, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("used", [1, 2, 255, 256, 257, 1023, 1025, 5000])
def test_number_of_clusters(used: int, backend: str) -> None:
    values = torch.rand(2, 2, 37, 41)
    for low in (0, used // 2):
        labels = torch.randint(low, used, (2, 37, 41))
        labels[0, 0, 0], labels[1, -1, -1] = used - 1, low
        for given, size in ((None, used), (used, used), (used + 300, used + 300), (np.int32(used), used)):
            check(values, labels, given, size, backend)
            if used <= 256:
                check(values, labels.byte(), given, size, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged_numbers_and_absent_clusters(backend: str) -> None:
    values, labels = torch.rand(3, 2, 20, 21), torch.randint(0, 3, (3, 20, 21))
    labels[1] = 0
    labels[2] = labels[2] * 400 + 5
    for dtype in (torch.int64, torch.int32, torch.uint8):
        check(values[:2], labels[:2], torch.tensor([3, 1], dtype=dtype), 3, backend)
    check(values, labels, torch.tensor([3, 2, 806]), 806, backend)
    check(values, labels, torch.tensor([1000, 1, 806]), 1000, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clusters_of_strips_that_share_none(backend: str) -> None:
    # Bands of labels: most strips of the native core see few of them, and each other ones.
    labels = (torch.arange(300).repeat_interleave(300) // 3).view(1, 300, 300)
    check(torch.rand(1, 3, 300, 300), labels, None, 100, backend)
    check(torch.rand(1, 1, 300, 300), labels * 40, None, 3961, backend)
    many = torch.randint(0, 2, (1, 1500, 1400)).cumsum(2) // 8
    # The reference adds 2e4 numbers in one running sum.
    check(torch.rand(1, 1, 1500, 1400), many, 100, 100, backend, 2e-6 if backend == "native" else 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_value_reaches_its_own_mean_alone(bad: float, dtype: torch.dtype, backend: str) -> None:
    values, labels = torch.rand(2, 3, 30, 31).to(dtype), torch.randint(0, 4, (2, 30, 31))
    clean, _ = cluster_mean(values, labels, 6, backend=backend)
    values[1, 2, 5, 6] = bad
    means, _ = cluster_mean(values, labels, 6, backend=backend)
    hit = torch.zeros_like(means, dtype=torch.bool)
    hit[1, 2, labels[1, 5, 6]] = True
    assert means[hit].isnan().all() if math.isnan(bad) else (means[hit] == bad).all()
    assert torch.equal(means[~hit], clean[~hit])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_summed_in_float32(dtype: torch.dtype, backend: str) -> None:
    values = torch.full((1, 1, 300, 300), 1.0078125, dtype=dtype)
    means, counts = cluster_mean(values, torch.zeros(1, 300, 300, dtype=torch.uint8), 1, backend=backend)
    assert means.item() == pytest.approx(1.0078125, abs=1e-6) and counts.item() == 90000
    large = torch.full((1, 1, 300, 300), 32768.0, dtype=dtype)  # the sum is far beyond float16
    assert cluster_mean(large, torch.zeros(1, 300, 300, dtype=torch.int32), 1, backend=backend)[0] == 32768


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_pixels_lose_no_precision(backend: str) -> None:
    values = torch.full((1, 1, 1500, 1400), 0.1)
    means, _ = cluster_mean(values, torch.zeros(1, 1500, 1400, dtype=torch.int64), 1, backend=backend)
    # 1024 additions a lane of a strip and 257 strips bound the native error; the reference has one running sum.
    assert means.item() == pytest.approx(0.1, rel=1300 * 2.0**-24 if backend == "native" else 0.05)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 4, 5), (2, 0, 4, 5), (2, 2, 0, 5), (2, 2, 4, 0), (0, 0, 0, 0)], ids=str)
def test_empty(shape: tuple, backend: str) -> None:
    values = torch.empty(shape, requires_grad=True)
    labels = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    for given, size in ((3, 3), (torch.full((shape[0],), 2), 2 if shape[0] else 0), (0, 0)):
        if size == 0 and labels.numel():
            continue
        means, counts = cluster_mean(values, labels, given, backend=backend)
        assert means.shape == (*shape[:2], size) and counts.shape == (shape[0], size)
        assert not means.any()
        # Without a channel the pixels are still counted.
        assert counts.sum(1).tolist() == [labels[0].numel()] * shape[0] if labels.numel() else not counts.any()
    (grad,) = torch.autograd.grad(cluster_mean(values, labels, 3, backend=backend)[0].sum(), values)
    assert grad.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 2, 5, 6), (2, 1, 120, 130), (30, 1, 40, 41)], ids=str)
def test_labels_out_of_range(shape: tuple, backend: str) -> None:
    values, labels = torch.rand(shape), torch.randint(0, 3, (shape[0], *shape[2:]))
    labels[0, 0, 0] = 2
    for bad, limit, text in [
        (4, 4, r"got 4 in image 1, expected values in \[0, 4\)"),
        (-1, 4, r"got -1 in image 1, expected values in \[0, 4\)"),
        (-3, None, r"got -3 in image 1, expected values (>= 0|in \[0, 3\))"),
        (2**62, 4, rf"got {2**62} in image 1, expected values in \[0, 4\)"),
        (3, torch.tensor([4, 3, *[4] * (shape[0] - 2)]), r"got 3 in image 1, expected values in \[0, 3\)"),
    ]:
        wrong = labels.clone()
        wrong[1, -1, -1] = bad
        with pytest.raises(ValueError, match=f"^labels: {text}$"):
            cluster_mean(values, wrong, limit, backend=backend)
    with pytest.raises(ValueError, match=r"^labels: got 2 in image 0, expected values in \[0, 0\)$"):
        cluster_mean(values, labels, 0, backend=backend)


VALUES, LABELS = torch.rand(2, 1, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((VALUES.int(), LABELS), TypeError, "values: got int32, expected float16, bfloat16, float32, float64"),
        ((VALUES.tolist(), LABELS), TypeError, "values: got list, expected a tensor"),
        ((VALUES[0], LABELS), ValueError, r"values: got shape \(1, 4, 5\), expected \(B, C, H, W\)"),
        ((VALUES, LABELS.float()), TypeError, "labels: got float32, expected uint8, int32, int64"),
        ((VALUES, LABELS.short()), TypeError, "labels: got int16"),
        ((VALUES, LABELS[:, :3]), ValueError, r"labels: got shape \(2, 3, 5\), expected \(2, 4, 5\) to fit values"),
        ((VALUES, LABELS[:1]), ValueError, r"labels: got shape \(1, 4, 5\), expected \(2, 4, 5\)"),
        ((VALUES, LABELS.to("meta")), ValueError, "labels: got a tensor on meta, expected cpu"),
        ((VALUES, LABELS, -1), ValueError, "num_clusters: got -1, expected a number >= 0"),
        ((VALUES, LABELS, 2.0), TypeError, "num_clusters: got float, expected an integer"),
        ((VALUES, LABELS, True), TypeError, "num_clusters: got bool"),
        ((VALUES, LABELS, torch.ones(3, dtype=torch.int64)), ValueError, r"num_clusters: got shape \(3,\)"),
        ((VALUES, LABELS, torch.ones(2)), TypeError, "num_clusters: got float32, expected integers"),
        ((VALUES, LABELS, torch.tensor([1, -1])), ValueError, "num_clusters: got -1, expected numbers >= 0"),
    ],
)
def test_arguments_are_checked(arguments: tuple, error: type, text: str, backend: str) -> None:
    with pytest.raises(error, match="^" + text):
        cluster_mean(*arguments, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [4, 6, torch.tensor([4, 9])], ids=["all", "absent", "ragged"])
def test_gradients(given: object, backend: str) -> None:
    values = torch.rand(2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (2, 3, 5))

    def call(x: torch.Tensor) -> torch.Tensor:
        return cluster_mean(x, labels, given, backend=backend)[0]

    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(call, values)
    assert not cluster_mean(values, labels, given, backend=backend)[1].requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_the_references(dtype: torch.dtype) -> None:
    labels = torch.randint(0, 4, (3, 10, 11))
    weight = torch.randn(3, 2, 6)
    grads = []
    for backend in BACKENDS:
        base = torch.linspace(0, 1, 2 * 11 * 10).view(1, 2, 11, 10).to(dtype).requires_grad_()
        means, _ = cluster_mean(base.transpose(2, 3).expand(3, -1, -1, -1), labels, 6, backend=backend)
        grads.append(torch.autograd.grad((means * weight).sum(), base)[0])
    assert grads[0].dtype == grads[1].dtype == dtype
    torch.testing.assert_close(grads[0], grads[1])
