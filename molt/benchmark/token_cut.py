"""TokenCut (Wang et al., CVPR 2022): a normalised cut of a photo's patches, one photo at a time on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molt._arguments import check_number
from molt.structures import Features

TAU, EPS = 0.2, 1e-5
OF = ("keys", "patches")


def token_cut(features: Features, *, of: str = "keys", tau: float = TAU, eps: float = EPS) -> Tensor:
    """Return class-agnostic maps of the object that stands out, by the normalised cut of each photo's patches.

    Patches are nodes of a graph whose edges weigh 1 where the cosine of two patches is above ``tau``, else ``eps``
    (section 3.2). See :func:`cut`.

    Args:
        features: of B photos; on any device, what follows is computed on the CPU in float64.
        of: ``"keys"`` of the last block, as published, or the output ``"patches"``.
        tau: at least 0.
        eps: above 0, so that no patch is without edges.

    Returns:
        (B, 1, h, w) float32 on the CPU, at least 0: the score of the patches on the object's side, 0 elsewhere; all 0
        where nothing can be cut.

    Raises:
        ValueError: an argument out of range, features without keys or with values that are not finite.
    """
    if of not in OF:
        raise ValueError(f"of must be one of {', '.join(OF)}, got {of!r}")
    check_number("tau", tau)
    check_number("eps", eps, above=0)
    tokens = features.keys if of == "keys" else features.patches
    if tokens is None:
        raise ValueError("features must hold keys, which a ViT gives with attention=True; of='patches' needs none")
    maps = np.zeros((len(tokens), 1, *features.grid), np.float32)
    for image, vectors in enumerate(tokens.detach().double().cpu().numpy()):
        maps[image, 0] = side_of_object(cut(affinity(vectors, tau, eps))).reshape(features.grid)
    return torch.from_numpy(maps)


def affinity(vectors: NDArray[np.float64], tau: float = TAU, eps: float = EPS) -> NDArray[np.float64]:
    """Return (N, N) edges between (N, D) vectors: 1 where their cosine is above ``tau``, else ``eps``.

    Raises:
        ValueError: vectors with values that are not finite.
    """
    if not np.isfinite(vectors).all():
        raise ValueError("features must be finite, got NaN or infinity")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    return np.where(unit @ unit.T > tau, 1.0, eps)


def cut(edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (N,) the second smallest eigenvector x of (D - A) x = lambda D x, D being the row sums of ``edges`` A.

    Zeros where there is a single node or all edges are equal: then no cut is better than another.
    """
    from scipy.linalg import eigh

    if len(edges) < 2 or edges.min() == edges.max():
        return np.zeros(len(edges))
    degrees = np.diag(edges.sum(1))
    _, vectors = eigh(degrees - edges, degrees, subset_by_index=[1, 1])
    return np.asarray(vectors[:, 0])


def side_of_object(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (N,) how far above the mean each node's value is on the side of the largest absolute value, else 0."""
    score = vector - vector.mean()
    largest = int(np.abs(vector).argmax())
    return np.asarray(np.clip(score if score[largest] >= 0 else -score, 0, None))
