"""TokenKMeans: separable data, hard shapes, and independence of the batch."""

from __future__ import annotations

import pytest
import torch

from molt import Features
from molt.clustering import TokenKMeans
from molt.ops.kmeans import lloyd, spread_starts


def features(batch: int = 2, grid: tuple[int, int] = (6, 8), dim: int = 16, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(torch.randn(batch, grid[0] * grid[1], dim, generator=generator), grid, (grid[0] * 14, grid[1] * 14))


def blocks() -> tuple[Features, torch.Tensor]:
    """Four quadrants with four orthogonal directions."""
    truth = torch.zeros(8, 8, dtype=torch.int64)
    truth[:4, 4:], truth[4:, :4], truth[4:, 4:] = 1, 2, 3
    noise = 0.05 * torch.randn(64, 12, generator=torch.Generator().manual_seed(3))
    return Features((torch.eye(12)[truth.flatten()] + noise)[None], (8, 8), (64, 64)), truth


def test_finds_separable_clusters() -> None:
    x, truth = blocks()
    labels, counts = TokenKMeans(4)(x, (8, 8))
    assert counts.tolist() == [4]
    pairs = set(zip(truth.flatten().tolist(), labels.flatten().tolist(), strict=True))
    assert len(pairs) == 4


def test_upsampled_labels_keep_the_quadrants() -> None:
    x, truth = blocks()
    labels, _ = TokenKMeans(4)(x)
    assert labels.shape == (1, 64, 64)
    centre = labels[0, 4::8, 4::8]
    assert len(set(zip(truth.flatten().tolist(), centre.flatten().tolist(), strict=True))) == 4


def test_types_and_ranges() -> None:
    labels, counts = TokenKMeans(5)(features(), (31, 45))
    assert labels.dtype == torch.int32 and labels.shape == (2, 31, 45)
    assert counts.dtype == torch.int64 and counts.shape == (2,)
    for image, count in zip(labels, counts, strict=True):
        assert sorted(image.unique().tolist()) == list(range(count))


def test_result_does_not_depend_on_the_batch() -> None:
    x = features(3)
    labels, counts = TokenKMeans(5)(x)
    for i in range(3):
        alone = Features(x.patches[i : i + 1], x.grid, x.image_size)
        one, count = TokenKMeans(5)(alone)
        assert torch.equal(one[0], labels[i]) and count[0] == counts[i]


def test_seed_decides_and_repeats() -> None:
    x = features(1, (20, 20))
    first, second = (TokenKMeans(8, seed=1)(x)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, TokenKMeans(8, seed=2)(x)[0])


def test_steps_match_a_plain_loop() -> None:
    """From the same start Lloyd's steps end where a plain loop ends."""
    x = features(1, (12, 12), 5)
    vectors = torch.nn.functional.normalize(x.patches[0], dim=-1).double()
    kmeans = TokenKMeans(4, iterations=50, restarts=1)
    centres = spread_starts(vectors[None], 4, 1, 0)[0, 0]
    for _ in range(50):
        labels = (vectors @ centres.T).argmax(1)
        centres = torch.stack([vectors[labels == j].mean(0) for j in range(4)])
        centres = torch.nn.functional.normalize(centres, dim=-1)
    assert torch.allclose(kmeans._fit(vectors[None], cosine=True)[0], centres, atol=1e-9)


def test_restarts_keep_the_best_start() -> None:
    x = features(2, (15, 15), 8)
    vectors = torch.nn.functional.normalize(x.patches, dim=-1)

    def fit(centres: torch.Tensor) -> torch.Tensor:
        return (vectors @ centres.transpose(1, 2)).amax(-1).sum(1)

    several = TokenKMeans(6, restarts=8)
    starts = spread_starts(vectors, 6, 8, 0)
    assert starts.shape == (2, 8, 6, 8)
    single = torch.stack([fit(lloyd(vectors, starts[:, i : i + 1], 20, cosine=True)[1][:, 0]) for i in range(8)])
    assert torch.allclose(fit(several._fit(vectors, cosine=True)), single.amax(0), atol=1e-3)
    assert (single.amax(0) > single.amin(0) + 0.1).all(), "the starts do differ"


def test_images_without_a_network(photo: torch.Tensor) -> None:
    labels, counts = TokenKMeans(2, position=0.1)(photo[None])
    assert labels.shape == (1, 120, 160) and counts.tolist() == [2]
    disc = labels[0, 50, 100]
    assert (labels[0, 35:65, 85:115] == disc).all() and (labels[0, :10] != disc).all()


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 3, 1, 50), (1, 3, 7, 3), (1, 3, 333, 40)])
def test_hard_image_shapes(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    labels, counts = TokenKMeans(5)(images)
    assert labels.shape == (shape[0], *shape[2:])
    assert (counts >= 1).all() and (labels.flatten(1).amax(1) == counts - 1).all()


def test_constant_image_is_one_cluster() -> None:
    labels, counts = TokenKMeans(5, position=0)(torch.full((1, 3, 20, 30), 0.4))
    assert counts.tolist() == [1] and not labels.any()


def test_one_cluster_and_non_contiguous() -> None:
    labels, counts = TokenKMeans(1)(features())
    assert counts.tolist() == [1, 1] and not labels.any()
    images = torch.rand(1, 40, 30, 3, generator=torch.Generator().manual_seed(0)).permute(0, 3, 1, 2)
    assert torch.equal(TokenKMeans(3)(images)[0], TokenKMeans(3)(images.contiguous())[0])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"num_clusters": 0}, "num_clusters"),
        ({"num_clusters": 257}, "num_clusters"),
        ({"iterations": 0}, "iterations"),
        ({"restarts": 0}, "restarts"),
        ({"position": -1}, "position"),
        ({"working_size": 0}, "working_size"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        TokenKMeans(**arguments)


def test_bad_images_are_named() -> None:
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, H, W\), got \(2, 4, 5, 5\)"):
        TokenKMeans()(torch.rand(2, 4, 5, 5))
    with pytest.raises(TypeError, match="floating point"):
        TokenKMeans()(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
