"""The kmeans operator against a float64 loop from the same starts, on hard shapes, and its messages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from molt import ops
from molt.ops.kmeans import lloyd, spread_starts

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = ["reference", "native"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def affinities(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return 2 * points @ centres.T - (centres**2).sum(1)


def averaged(points: np.ndarray, labels: np.ndarray, centres: np.ndarray, cosine: bool) -> np.ndarray:
    """One round's new centres, cluster by cluster; one without a point keeps its centre."""
    out = centres.copy()
    for k in range(len(centres)):
        if (labels == k).any():
            mean = points[labels == k].sum(0) / (labels == k).sum()
            out[k] = unit(mean) if cosine else mean
    return out


def looped(
    points: np.ndarray, centres: np.ndarray, iterations: int, cosine: bool
) -> tuple[np.ndarray, np.ndarray, float]:
    for _ in range(iterations):
        centres = averaged(points, affinities(points, centres).argmax(1), centres, cosine)
    scores = affinities(points, centres)
    return scores.argmax(1), centres, scores.max(1).sum()


def clustered(batch: int, number: int, dims: int, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around well separated directions, and one start near each: no label hangs on rounding."""
    middles = 8 * torch.nn.functional.normalize(torch.randn(batch, clusters, dims), dim=-1)
    which = torch.randint(0, clusters, (batch, number))
    points = middles.gather(1, which[..., None].expand(-1, -1, dims)) + 0.05 * torch.randn(batch, number, dims)
    return points, middles + 0.1 * torch.randn_like(middles)


def check(points: torch.Tensor, starts: torch.Tensor, iterations: int, metric: str, backend: str) -> None:
    """Labels are compared where the loop's best two centres are further apart than rounding, and that is nearly all."""
    found = ops.kmeans(points, starts.shape[1], metric=metric, iterations=iterations, centres=starts, backend=backend)
    wide = torch.float64 if points.dtype == torch.float64 else torch.float32
    assert found.labels.dtype == torch.int32 and found.labels.shape == points.shape[:2]
    assert found.centres.dtype == wide and found.centres.shape == starts.shape and found.centres.is_contiguous()
    tolerance = 1e-11 if wide == torch.float64 else 2e-5
    for b in range(len(points)):
        values, own = points[b].double().numpy(), starts[b].to(wide).double().numpy()
        if metric == "cosine":
            values, own = unit(values), unit(own)
        labels, centres, _ = looped(values, own, iterations, metric == "cosine")
        np.testing.assert_allclose(found.centres[b].double().numpy(), centres, rtol=0, atol=tolerance)
        scores = affinities(values, centres)
        best = np.sort(scores, 1)
        clear = (best[:, -1] - best[:, -2] > 1e-3) if scores.shape[1] > 1 else np.ones(len(values), bool)
        assert (found.labels[b].numpy() == labels)[clear].all()
        assert clear.mean() >= 0.9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_a_loop(dtype: torch.dtype, metric: str, backend: str) -> None:
    for number, dims, clusters in (
        (1, 5, 1),
        (3, 8, 2),
        (4, 37, 3),
        (5, 16, 5),
        (511, 8, 4),
        (512, 5, 4),
        (513, 37, 7),
        (1030, 384, 5),
        (200, 384, 33),
        (600, 64, 256),
    ):
        points, starts = clustered(2, number, dims, clusters)
        for iterations in (0, 1, 4) if dims < 64 else (3,):
            check(points.to(dtype), starts.to(dtype), iterations, metric, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_number_of_clusters(backend: str) -> None:
    for clusters in range(1, 34):
        points, starts = clustered(2, 70, 24, clusters)
        check(points, starts, 3, "cosine" if clusters % 2 else "l2", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_settled_points_and_many_rounds(metric: str, backend: str) -> None:
    """Without clear clusters: in float64 both sides take the same turns, until labels settle and after."""
    points, starts = torch.randn(2, 400, 6, dtype=torch.float64), torch.randn(2, 9, 6, dtype=torch.float64)
    for iterations in (1, 2, 3, 5, 8, 200):
        found = ops.kmeans(points, 9, metric=metric, iterations=iterations, centres=starts, backend=backend)
        for b in range(2):
            values, own = points[b].numpy(), starts[b].numpy()
            if metric == "cosine":
                values, own = unit(values), unit(own)
            labels, centres, _ = looped(values, own, iterations, metric == "cosine")
            np.testing.assert_allclose(found.centres[b].numpy(), centres, rtol=0, atol=1e-12)
            assert (found.labels[b].numpy() == labels).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_dimension(backend: str) -> None:
    points = torch.tensor([0.0, 1.0, 2.0, 10.0, 11.0, 12.0, 100.0]).view(1, 7, 1)
    starts = torch.tensor([0.0, 10.0, 50.0]).view(1, 3, 1)
    found = ops.kmeans(points, 3, metric="l2", centres=starts, backend=backend)
    assert found.labels.tolist() == [[0, 0, 0, 1, 1, 1, 2]] and found.centres.flatten().tolist() == [1, 11, 100]
    found = ops.kmeans(points - 5, 2, centres=torch.tensor([-3.0, 2.0]).view(1, 2, 1), backend=backend)
    assert found.labels.tolist() == [[0, 0, 0, 1, 1, 1, 1]] and found.centres.flatten().tolist() == [-1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_an_empty_cluster_keeps_its_centre(metric: str, backend: str) -> None:
    points, starts = clustered(2, 50, 10, 3)
    lost = torch.cat([starts[:, :1], -starts.sum(1, keepdim=True) * 9, starts[:, 1:]], 1)
    found = ops.kmeans(points, 4, metric=metric, centres=lost, backend=backend)
    want = torch.nn.functional.normalize(lost[:, 1], dim=-1) if metric == "cosine" else lost[:, 1]
    assert torch.equal(found.centres[:, 1], want) and not (found.labels == 1).any()
    check(points, lost, 4, metric, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", [1, 5, 8, 37])
def test_of_equally_near_centres_the_first(dims: int, backend: str) -> None:
    # Whole numbers, so that equal distances are equal in any order of addition.
    points, starts = torch.randint(-9, 10, (1, 41, dims)).float(), torch.randint(-9, 10, (1, 3, dims)).float()
    found = ops.kmeans(points, 9, metric="l2", iterations=0, centres=starts.repeat(1, 3, 1), backend=backend)
    nearest = affinities(points[0].double().numpy(), starts[0].double().numpy()).argmax(1)
    assert found.labels[0].tolist() == nearest.tolist()
    if backend == "native":  # adds in one order whatever the centre's place
        points, starts = clustered(1, 41, dims, 3)
        found = ops.kmeans(points, 9, metric="l2", iterations=0, centres=starts.repeat(1, 3, 1), backend=backend)
        assert found.labels.max() <= 2
    ahead = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]])
    found = ops.kmeans(torch.zeros(1, 6, 2), 3, metric="l2", iterations=0, centres=ahead, backend=backend)
    assert not found.labels.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_and_restarts(dtype: torch.dtype, backend: str) -> None:
    points, wide = torch.randn(2, 130, 7).to(dtype), torch.float64 if dtype == torch.float64 else torch.float32
    starts = torch.randn(2, 5, 6, 7).to(wide)
    labels, centres, score = lloyd(points, starts, 6, cosine=False, backend=backend)
    assert labels.shape == (2, 5, 130) and labels.dtype == torch.int32 and score.dtype == centres.dtype == wide
    for b in range(2):
        for r in range(5):
            values = affinities(points[b].double().numpy(), centres[b, r].double().numpy())
            assert score[b, r].item() == pytest.approx(values.max(1).sum(), rel=1e-5)
            assert (values.max(1) - values[np.arange(130), labels[b, r].numpy()]).max() < 1e-4
            alone = lloyd(points[b : b + 1], starts[b : b + 1, r : r + 1], 6, cosine=False, backend=backend)
            torch.testing.assert_close(centres[b, r], alone[1][0, 0], rtol=0, atol=0 if backend == "native" else 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_the_best_restart_is_kept(metric: str, backend: str) -> None:
    points = torch.randn(3, 150, 4, dtype=torch.float64)
    vectors = torch.nn.functional.normalize(points, dim=-1) if metric == "cosine" else points
    for iterations in (0, 20):
        every = lloyd(vectors, spread_starts(vectors, 6, 8, 5), iterations, cosine=metric == "cosine", backend=backend)
        assert (every[2].amax(1) > every[2].amin(1) + 0.1).all(), "the starts do differ"
        found = ops.kmeans(points, 6, metric=metric, iterations=iterations, restarts=8, seed=5, backend=backend)
        best = every[2].argmax(1)
        assert torch.equal(found.centres, every[1][torch.arange(3), best])
        assert torch.equal(found.labels, every[0][torch.arange(3), best])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 40, 5), (3, 513, 37), (20, 300, 8)], ids=str)
def test_bits_do_not_depend_on_the_batch(shape: tuple, dtype: torch.dtype) -> None:
    points = torch.randn(shape).to(dtype)
    whole = ops.kmeans(points, 7, restarts=3, backend="native")
    for b in range(shape[0]):
        alone = ops.kmeans(points[b : b + 1], 7, restarts=3, backend="native")
        assert torch.equal(alone.labels[0], whole.labels[b]) and torch.equal(alone.centres[0], whole.centres[b])


@pytest.mark.parametrize("backend", BACKENDS)
def test_seeds_and_degenerate_points(backend: str) -> None:
    points = torch.randn(2, 300, 5)
    first, again, other = (ops.kmeans(points, 9, iterations=1, seed=s, backend=backend) for s in (3, 3, 4))
    assert torch.equal(first.centres, again.centres) and not torch.equal(first.centres, other.centres)
    for metric in ("cosine", "l2"):
        same = ops.kmeans(torch.ones(2, 7, 3), 4, metric=metric, backend=backend)
        assert not same.labels.any() and same.centres.isfinite().all()
        zero = ops.kmeans(torch.zeros(1, 7, 3), 2, metric=metric, backend=backend)
        assert not zero.labels.any() and not zero.centres.any()
        few = ops.kmeans(torch.randn(1, 2, 3), 5, metric=metric, backend=backend)
        assert few.labels.shape == (1, 2) and few.centres.isfinite().all()
    empty = ops.kmeans(torch.rand(0, 4, 3), 2, backend=backend)
    assert empty.labels.shape == (0, 4) and empty.centres.shape == (0, 2, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_points_lose_no_precision(backend: str) -> None:
    points = torch.full((1, 200000, 1), 0.1)
    found = ops.kmeans(points, 1, metric="l2", iterations=1, centres=torch.zeros(1, 1, 1), backend=backend)
    # Strips of 512 points bound the native error; the reference is as good as one matrix product.
    assert found.centres.item() == pytest.approx(0.1, rel=513 * 2.0**-24 if backend == "native" else 1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("given", "error", "word"),
    [
        ({"features": torch.rand(4, 3)}, ValueError, r"features: got shape \(4, 3\), expected \(B, N, D\)"),
        ({"features": torch.ones(1, 4, 3, dtype=torch.int64)}, TypeError, "features: got int64"),
        ({"features": torch.rand(1, 0, 3)}, ValueError, r"features: got shape \(1, 0, 3\)"),
        ({"features": None}, TypeError, "features: got NoneType"),
        ({"num_clusters": 0}, ValueError, "num_clusters"),
        ({"num_clusters": 257}, ValueError, "num_clusters"),
        ({"num_clusters": 2.0}, TypeError, "num_clusters"),
        ({"iterations": -1}, ValueError, "iterations"),
        ({"restarts": 0}, ValueError, "restarts"),
        ({"seed": -1}, ValueError, "seed"),
        ({"metric": "dot"}, ValueError, "metric: got 'dot', expected 'cosine' or 'l2'"),
        ({"centres": torch.rand(1, 3, 3)}, ValueError, r"centres: got shape \(1, 3, 3\), expected \(1, 2, 3\)"),
        ({"centres": torch.rand(2, 3)}, ValueError, r"centres: got shape \(2, 3\)"),
        ({"centres": torch.ones(1, 2, 3, dtype=torch.int32)}, TypeError, "centres: got int32"),
        ({"centres": torch.rand(1, 2, 3, device="meta")}, ValueError, "centres: got a tensor on meta"),
        ({"centres": torch.rand(1, 2, 3), "restarts": 2}, ValueError, "restarts: got 2, expected 1"),
    ],
)
def test_arguments_are_checked(given: dict, error: type, word: str, backend: str) -> None:
    with pytest.raises(error, match="^" + word):
        ops.kmeans(**{"features": torch.rand(1, 4, 3), "num_clusters": 2, "backend": backend} | given)
