"""Cluster-guided refinement of heat maps from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molt import ops
from molt._arguments import check_clusterer
from molt._backend import Backend
from molt._backend import backend as use_backend
from molt.clustering import TokenKMeans
from molt.data.images import load_photo, read_photo
from molt.ops._checks import check_size
from molt.structures import Features

BACKBONE_SIDE = 448


def refine(
    maps: Any,
    images: Any = None,
    *,
    features: Features | Callable[[Tensor], Features] | None = None,
    clusterer: Any = None,
    alpha: float = 0.5,
    size: Sequence[int] | None = None,
    normalize: bool = True,
    backend: Backend | None = None,
) -> Any:
    """Blend each heat map with its mean over clusters of the photo, so that it follows the photo's regions.

    Works with no network and no weights: the photo's pixels are clustered by colour and position. With ``features``
    patch vectors are clustered instead, which is better. Refinement after the MOLT paper, section II.B; k-means in
    place of its deep clustering is our choice.

    Args:
        maps: heat maps of any library and resolution, NumPy or torch, floating point: (H, W) for one photo,
            (B, H, W) or (B, C, H, W) for B photos. Left untouched.
        images: the photos: one path, PIL image, (H, W, 3) array or (3, H, W) tensor; for B photos a list of these, a
            (B, H, W, 3) array or a (B, 3, H, W) tensor; pixels uint8, or float in [0, 1]. May be left out where
            Features are given.
        features: a backbone, ``molt.backbones.ViTBackbone()`` say, which is shown the photos at 448 px; or Features of
            the same photos.
        clusterer: callable ``labels, counts = clusterer(x, size)``, see :mod:`molt.clustering`; x is the Features
            where ``features`` is given, else the images. Default ``TokenKMeans()``.
        alpha: weight of the cluster mean, 0 to 1.
        size: (H, W) of the result in pixels; default the photos' own, else the features' image size.
        normalize: min-max each map to [0, 1], both as it comes in and as it goes out. False does neither, so that the
            result stays within the map's own range.
        backend: ``"auto"``, ``"reference"`` or ``"native"``.

    Returns:
        Refined maps of the type, dtype, device and number of dimensions given, at ``size``.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range; maps with NaN or infinity; photos of
            different sizes without ``size``; counts of maps and photos that differ. PhotoError (a ValueError) for a
            photo that is unreadable.
    """
    given, stacked = _stack(maps)
    if images is None and features is None:
        raise ValueError("images or features must be given: refinement needs the photos or what a network saw in them")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    photos = None if images is None else _list(images)
    if photos is not None and len(photos) != len(stacked):
        raise ValueError(f"maps must hold one entry a photo: got {len(stacked)} for {len(photos)} photos")
    seen = _features(features, photos)
    if seen is not None and len(seen.patches) != len(stacked):
        raise ValueError(f"features must hold {len(stacked)} photos as maps do, got {len(seen.patches)}")
    check_clusterer(clusterer)
    target = _target(photos, seen, size)
    cluster = TokenKMeans() if clusterer is None else clusterer
    with torch.no_grad():
        if seen is None:
            assert photos is not None
            labels, counts = cluster(_pixels(photos, target).to(stacked.device), target)
        else:
            labels, counts = cluster(seen, target)
    labels, counts = labels.to(stacked.device), counts.to(stacked.device)
    with use_backend(backend) if backend is not None else nullcontext():
        resized = ops.upsample_normalize(stacked, target) if normalize else _resize(stacked, target)
        refined = ops.cluster_refine(resized, labels, alpha, counts)
        if normalize:
            refined = ops.upsample_normalize(refined, target)
    refined = refined.reshape(*given.shape[:-2], *target)
    return refined.numpy() if isinstance(maps, np.ndarray) else refined


def _stack(maps: Any) -> tuple[Tensor, Tensor]:
    """Return maps as a tensor as given, and as (B, C, H, W)."""
    if isinstance(maps, np.ndarray):
        maps = maps.astype(maps.dtype.newbyteorder("="), copy=False)
        if maps.dtype not in (np.float16, np.float32, np.float64):
            raise TypeError(f"maps must be float16, float32 or float64, got an array of {maps.dtype}")
        # A copy where the array is read-only: torch would warn of it.
        given = torch.from_numpy(np.array(maps, order="C", copy=None if maps.flags.writeable else True))
    elif isinstance(maps, Tensor):
        given = maps
    else:
        raise TypeError(f"maps must be a NumPy array or torch tensor, got {type(maps).__name__}")
    if not given.is_floating_point():
        raise TypeError(f"maps must be floating point, got {given.dtype}")
    if given.ndim not in (2, 3, 4) or 0 in given.shape:
        raise ValueError(
            f"maps must have shape (H, W), (B, H, W) or (B, C, H, W) with at least one value, got {tuple(given.shape)}"
        )
    views = {2: lambda m: m[None, None], 3: lambda m: m[:, None], 4: lambda m: m}
    if not bool(given.isfinite().all()):
        raise ValueError("maps hold NaN or infinite values: set these to the map's minimum, say, or leave the map out")
    return given, views[given.ndim](given)


def _list(images: Any) -> list[Any]:
    """Return one photo an entry; files are read here, once."""
    several = isinstance(images, list | tuple) or (isinstance(images, np.ndarray | Tensor) and images.ndim == 4)
    listed = list(images) if several else [images]
    return [load_photo(photo) if isinstance(photo, str | Path) else photo for photo in listed]


def _pixels(photos: list[Any], size: tuple[int, int]) -> Tensor:
    """Return (B, 3, H, W) float in [0, 1]."""
    return torch.stack([read_photo(photo, size).pixels for photo in photos])


def _features(given: Any, photos: list[Any] | None) -> Features | None:
    """Return Features as given, or what a backbone sees in the photos."""
    if given is None or isinstance(given, Features):
        return given
    if not callable(given):
        raise TypeError(f"features must be molt.Features or a backbone, got {type(given).__name__}")
    if photos is None:
        raise ValueError("images must be given where features is a backbone")
    weight = next(given.parameters(), None) if isinstance(given, torch.nn.Module) else None
    pixels = _pixels(photos, (BACKBONE_SIDE, BACKBONE_SIDE))
    with torch.no_grad():
        seen = given(pixels if weight is None else pixels.to(weight.device, weight.dtype))
    if not isinstance(seen, Features):
        raise TypeError(f"features must be a backbone that returns molt.Features, got {type(seen).__name__} from it")
    return seen


def _target(photos: list[Any] | None, features: Features | None, size: Sequence[int] | None) -> tuple[int, int]:
    if size is not None:
        return check_size(size)
    if photos is None:
        assert features is not None
        return features.image_size
    sizes = {_size(photo) for photo in photos}
    if len(sizes) != 1:
        raise ValueError(f"size must be given where photos differ in size, got {sorted(sizes)} (height, width)")
    return sizes.pop()


def _size(photo: Any) -> tuple[int, int]:
    if isinstance(photo, Tensor) and photo.ndim == 3:
        return int(photo.shape[1]), int(photo.shape[2])
    if isinstance(photo, np.ndarray) and photo.ndim in (2, 3):
        return int(photo.shape[0]), int(photo.shape[1])
    width, height = load_photo(photo).size
    return height, width


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.nn.functional.interpolate(maps, size, mode="bilinear", align_corners=False)
