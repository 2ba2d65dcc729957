"""TokenCut: the published formula, and what it does where there is nothing to cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from molt.benchmark.token_cut import EPS, TAU, affinity, cut, side_of_object, token_cut
from molt.structures import Features

pytestmark = pytest.mark.usefixtures("one_thread")


def features(tokens: torch.Tensor, grid: tuple[int, int], keys: torch.Tensor | None = None) -> Features:
    return Features(tokens, grid, (grid[0] * 14, grid[1] * 14), keys=keys)


def blob(grid: tuple[int, int], rows: slice, columns: slice, seed: int, noise: float = 0.3) -> tuple[Features, NDArray]:
    """Patches of one direction inside a rectangle, of another outside, and a little noise; where the rectangle is."""
    generator = torch.Generator().manual_seed(seed)
    inside = torch.zeros(grid, dtype=torch.bool)
    inside[rows, columns] = True
    directions = torch.eye(16)[:2]
    tokens = torch.where(inside.flatten()[:, None], directions[0], directions[1])
    tokens = tokens + noise * torch.randn(tokens.shape, generator=generator) / math.sqrt(16)
    return features(tokens[None], grid, keys=tokens[None]), inside.numpy()


def literal(vectors: NDArray[np.float64], tau: float, eps: float) -> NDArray[np.float64]:
    """The cut from its definition, entry by entry, by the symmetric Laplacian in place of the generalised problem."""
    count = len(vectors)
    edges = np.empty((count, count))
    for i in range(count):
        for j in range(count):
            cosine = vectors[i] @ vectors[j] / math.sqrt((vectors[i] @ vectors[i]) * (vectors[j] @ vectors[j]))
            edges[i, j] = 1 if cosine > tau else eps
    root = 1 / np.sqrt(edges.sum(1))
    values, found = np.linalg.eigh(np.eye(count) - root[:, None] * edges * root)
    assert values[1] - values[0] > 1e-9 and values[2] - values[1] > 1e-9  # a second vector that is unique
    return np.asarray(root * found[:, 1])


@pytest.mark.parametrize("tau", [0.0, 0.2, 0.35])
def test_the_cut_is_the_second_eigenvector_of_the_normalised_laplacian(tau: float) -> None:
    vectors = np.random.default_rng(3).normal(size=(30, 6))
    ours, expected = cut(affinity(vectors, tau, EPS)), literal(vectors, tau, EPS)
    ours, expected = ours / np.linalg.norm(ours), expected / np.linalg.norm(expected)
    np.testing.assert_allclose(ours * np.sign(ours @ expected), expected, atol=1e-8)


@pytest.mark.parametrize(
    ("grid", "rows", "columns"),
    [((12, 9), slice(2, 6), slice(3, 8)), ((7, 16), slice(0, 3), slice(12, 16)), ((1, 20), slice(0, 1), slice(4, 8))],
)
@pytest.mark.parametrize("of", ["keys", "patches"])
def test_it_finds_the_smaller_of_two_blobs(grid: tuple[int, int], rows: slice, columns: slice, of: str) -> None:
    seen, inside = blob(grid, rows, columns, seed=5)
    maps = token_cut(seen, of=of)
    assert maps.shape == (1, 1, *grid) and maps.dtype == torch.float32
    np.testing.assert_array_equal(maps[0, 0].numpy() > 0, inside)


def test_keys_and_patches_are_not_mixed_up() -> None:
    first, inside = blob((8, 8), slice(1, 4), slice(1, 4), seed=0)
    second, elsewhere = blob((8, 8), slice(5, 8), slice(4, 8), seed=1)
    both = features(first.patches, (8, 8), keys=second.keys)
    np.testing.assert_array_equal(token_cut(both, of="patches")[0, 0].numpy() > 0, inside)
    np.testing.assert_array_equal(token_cut(both)[0, 0].numpy() > 0, elsewhere)


def test_each_photo_of_a_batch_is_cut_alone() -> None:
    parts = [blob((6, 6), slice(i, i + 3), slice(1, 4), seed=i)[0] for i in range(3)]
    together = features(
        torch.cat([part.patches for part in parts]), (6, 6), torch.cat([part.patches for part in parts])
    )
    for i, part in enumerate(parts):
        torch.testing.assert_close(token_cut(together)[i : i + 1], token_cut(part), rtol=0, atol=0)


def test_the_sign_of_the_eigenvector_does_not_matter() -> None:
    vector = np.array([0.1, 0.2, -0.9, 0.1])
    np.testing.assert_allclose(side_of_object(vector), side_of_object(-vector))
    assert (side_of_object(vector) > 0).tolist() == [False, False, True, False]
    np.testing.assert_allclose(side_of_object(vector)[2], 0.9 + vector.mean())


@pytest.mark.parametrize(
    "tokens", [torch.ones(1, 1, 5), torch.ones(2, 9, 5), torch.zeros(1, 9, 5), torch.ones(0, 4, 5)]
)
def test_where_there_is_nothing_to_cut_the_map_is_zero(tokens: torch.Tensor) -> None:
    side = math.isqrt(tokens.shape[1])
    maps = token_cut(features(tokens, (side, side)), of="patches")
    assert maps.shape == (len(tokens), 1, side, side)
    assert not maps.any()


def test_two_patches_half_precision_and_strides() -> None:
    pair = torch.tensor([[[1.0, 0], [0, 1]]])
    assert int((token_cut(features(pair, (1, 2)), of="patches") > 0).sum()) == 1
    seen, inside = blob((6, 6), slice(0, 2), slice(0, 3), seed=2)
    halved = token_cut(
        features(seen.patches.bfloat16().transpose(1, 2).contiguous().transpose(1, 2), (6, 6)), of="patches"
    )
    np.testing.assert_array_equal(halved[0, 0].numpy() > 0, inside)


def test_edges_are_one_or_eps() -> None:
    edges = affinity(np.array([[1.0, 0], [1, 1], [0, 3], [0, 0]]))
    assert TAU == 0.2
    expected = [[1, 1, EPS, EPS], [1, 1, 1, EPS], [EPS, 1, 1, EPS], [EPS] * 4]
    np.testing.assert_array_equal(edges, expected)


def test_wrong_arguments_are_named() -> None:
    seen = features(torch.rand(1, 4, 3), (2, 2))
    with pytest.raises(ValueError, match="of must be one of keys, patches, got 'values'"):
        token_cut(seen, of="values")
    with pytest.raises(ValueError, match="features must hold keys"):
        token_cut(seen)
    with pytest.raises(ValueError, match="eps must be finite and above 0"):
        token_cut(seen, of="patches", eps=0)
    with pytest.raises(ValueError, match="tau"):
        token_cut(seen, of="patches", tau=math.nan)
    with pytest.raises(ValueError, match="must be finite"):
        token_cut(features(torch.full((1, 4, 3), math.inf), (2, 2)), of="patches")
