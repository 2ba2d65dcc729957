"""Cluster-guided refinement of heat maps from anywhere."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from molt import ops
from molt._arguments import check_clusterer
from molt._auto_alpha import AUTO, Alpha, blend, check_alpha
from molt._backend import Backend
from molt._backend import backend as use_backend
from molt._words import count
from molt.backbones import CNNBackbone, ViTBackbone
from molt.clustering import CachedClusterer, TokenKMeans
from molt.clustering.cache import check_folder
from molt.data.images import is_file, load_photo, read_photo
from molt.data.pixels import as_channels_first, as_channels_last
from molt.ops._checks import check_size, from_array
from molt.structures import Features

BACKBONE_SIDE = 448
Signed = Literal["auto", "clip", "stretch"]
OnNan = Literal["stop", "skip"]


def refine(
    maps: Any,
    images: Any = None,
    *,
    features: Features | Callable[[Tensor], Features] | None = None,
    clusterer: Any = None,
    cache: str | Path | None = None,
    alpha: Alpha = AUTO,
    size: Sequence[int] | None = None,
    normalize: bool = True,
    signed: Signed = "auto",
    on_nan: OnNan = "stop",
    backend: Backend | None = None,
) -> Any:
    """Blend each heat map with its mean over clusters of the photo, so that it follows the photo's regions.

    Works with no network and no weights: the photo's pixels are clustered by colour and position. With ``features``
    patch vectors are clustered instead, which is better. Refinement after the MOLT paper, section II.B; k-means in
    place of its deep clustering is our choice.

    Args:
        maps: heat maps of any library and resolution, NumPy or torch, floating point: (H, W) for one photo,
            (B, H, W) or (B, C, H, W) for B photos; or a list of these, one a layer of the network, as torch-cam
            returns them, sizes may differ. Left untouched.
        images: the photos: one path, file object, PIL image, (H, W, 3) array or (3, H, W) tensor, or what else
            :func:`molt.data.load_photo` takes; for B photos a list of these, a (B, H, W, C) array or a (B, C, H, W)
            tensor. May be left out where Features are given.
        features: a backbone, ``molt.backbones.ViTBackbone()`` say, which is shown the photos at 448 px; or Features of
            the same photos.
        clusterer: callable ``labels, counts = clusterer(x, size)``, see :mod:`molt.clustering`; x is the Features
            where ``features`` is given, else the images. Default ``TokenKMeans()``.
        cache: folder where label maps are kept, so that a photo's clusters are computed once, see
            :class:`molt.clustering.CachedClusterer`; None keeps none.
        alpha: weight of the cluster mean, 0 to 1; ``"auto"`` chooses it for each map, see :func:`molt.auto_alpha`.
        size: (H, W) of the result in pixels; default the photos' own, else the features' image size.
        normalize: min-max each map to [0, 1], both as it comes in and as it goes out. False does neither, so that the
            result stays within the map's own range.
        signed: what heat below 0, as captum gives it, means. ``"auto"`` cuts it off at minus the median size of the
            map's values, or at minus half its maximum where that is nearer to 0, so that ground around 0 stays cold and
            ground below 0 is told from the object; our choice, measured in docs/method.md. ``"clip"`` cuts it off at 0,
            also where ``normalize`` is False, which the others leave as it is; ``"stretch"`` makes the lowest value 0.
            Cut off, a map with nothing above 0 comes back as zeros. ``"auto"`` warns where much is cut off.
        on_nan: ``"stop"`` raises where a map holds NaN or infinity; ``"skip"`` returns such a map as NaN, of which
            :func:`molt.ops.component_boxes` gives no box, and refines the others.
        backend: ``"auto"``, ``"reference"`` or ``"native"``.

    Returns:
        Refined maps of the type, dtype, device and number of dimensions given, at ``size``; for a list a list, each
        entry refined by itself, all with the same clusters.

    Raises:
        TypeError, ValueError: an argument of another type, shape or range; maps with NaN or infinity, by their index;
            photos of different sizes without ``size``; counts of maps and photos that differ. PhotoError (a ValueError)
            for a photo that is unreadable.
    """
    layers = maps if isinstance(maps, list) else [maps]
    names = [f"maps[{i}]" for i in range(len(layers))] if isinstance(maps, list) else ["maps"]
    if not layers:
        raise ValueError("maps must hold at least one map, got an empty list")
    for option, value, kinds in (("signed", signed, Signed), ("on_nan", on_nan, OnNan)):
        if value not in get_args(kinds):
            raise ValueError(f"{option} must be one of {', '.join(get_args(kinds))}, got {value!r}")
    stacks = [_stack(layer, name) for layer, name in zip(layers, names, strict=True)]
    broken = [
        _broken(stack, layer.ndim, name, on_nan) for stack, layer, name in zip(stacks, layers, names, strict=True)
    ]
    stacks = [stack if bad is None else stack.where(~bad, 0) for stack, bad in zip(stacks, broken, strict=True)]
    if images is None and features is None:
        raise ValueError("images or features must be given: refinement needs the photos or what a network saw in them")
    alpha = check_alpha(alpha)
    photos = None if images is None else _list(images)
    for stack, name in zip(stacks, names, strict=True):
        if photos is not None and len(photos) != len(stack):
            why = "; a list holds a map a layer, not a map a photo" if isinstance(maps, list) else ""
            shown = count(len(photos), "photo")
            raise ValueError(f"{name} must hold one entry a photo: got {len(stack)} for {shown}{why}")
    seen = _features(features, photos)
    for stack, name in zip(stacks, names, strict=True):
        if seen is not None and len(seen.patches) != len(stack):
            wanted = f"{count(len(stack), 'photo')}, as many as {name}"
            raise ValueError(f"features must hold {wanted}, got {len(seen.patches)}")
    check_clusterer(clusterer)
    target = _target(photos, seen, size)
    cluster = TokenKMeans() if clusterer is None else clusterer
    if cache is not None:
        cluster = CachedClusterer(cluster, check_folder("cache", cache))
    with torch.no_grad(), use_backend(backend) if backend is not None else nullcontext():
        if seen is None:
            assert photos is not None
            labels, counts = cluster(_pixels(photos, target).to(stacks[0].device), target)
        else:
            labels, counts = cluster(seen, target)
    results: list[Any] = []
    limit = getattr(cluster, "num_clusters", counts)  # a known limit spares a GPU from reading the counts back
    for layer, raw, bad, name in zip(layers, stacks, broken, names, strict=True):
        labels = labels.to(raw.device)
        stack = _above_ground(raw, name, signed) if normalize or signed == "clip" else raw
        with use_backend(backend) if backend is not None else nullcontext():
            if not normalize:
                refined = blend(_resize(stack, target), labels, alpha, limit)
            elif alpha == AUTO:
                refined = ops.upsample_normalize(
                    blend(ops.upsample_normalize(stack, target), labels, alpha, limit), target
                )
            else:
                refined = ops.upsample_normalize(ops.fuse_and_refine([stack], labels, alpha, limit), target)
        if bad is not None:
            refined = refined.masked_fill(bad, torch.nan)
        refined = refined.reshape(*layer.shape[:-2], *target)
        results.append(refined.numpy() if isinstance(layer, np.ndarray) else refined)
    return results if isinstance(maps, list) else results[0]


def _stack(maps: Any, name: str) -> Tensor:
    """Return maps as a tensor (B, C, H, W)."""
    if isinstance(maps, np.ndarray):
        if maps.dtype.newbyteorder("=") not in (np.float16, np.float32, np.float64):
            raise TypeError(f"{name} must be float16, float32 or float64, got an array of {maps.dtype}")
        given = from_array(maps)
    elif isinstance(maps, Tensor):
        given = maps
    else:
        raise TypeError(f"{name} must be a NumPy array or torch tensor, got {type(maps).__name__}")
    if not given.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {given.dtype}")
    if given.ndim not in (2, 3, 4) or 0 in given.shape:
        shape = tuple(given.shape)
        raise ValueError(
            f"{name} must have shape (H, W), (B, H, W) or (B, C, H, W) with at least one value, got {shape}"
        )
    if given.ndim == 4:
        return given
    return given[None, None] if given.ndim == 2 else given[:, None]


def _broken(stack: Tensor, ndim: int, name: str, on_nan: OnNan) -> Tensor | None:
    """Return which maps of a stack hold NaN or infinity, (B, C, 1, 1), or None where none does."""
    finite = stack.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    if bool(finite.all()):
        return None
    if on_nan == "skip":
        return ~finite
    bad = (~finite[..., 0, 0]).nonzero().tolist()
    which = [str(index if ndim == 4 else index[:1]) for index in bad]
    told = f", got NaN or infinity in {len(bad)} of {finite.numel()}: {', '.join(which[:8])}" if ndim > 2 else ""
    told += ", ..." if ndim > 2 and len(which) > 8 else ""
    way = 'set these values to the map\'s minimum, say, leave the map out or give on_nan="skip"'
    raise ValueError(f"{name} must be finite{told}: {way}")


def _above_ground(stack: Tensor, name: str, signed: Signed) -> Tensor:
    """Return maps whose heat below the ground is cut off, see :func:`refine`; differentiable."""
    if signed == "stretch" or not bool((stack < 0).any()):
        return stack
    values = stack.detach().flatten(2)
    low, high = values.amin(-1), values.amax(-1)
    floor = torch.zeros_like(low)
    if signed == "auto":
        # The median by sorting: torch.median refuses to be deterministic on a GPU.
        middle = values.abs().sort(-1).values[..., (values.shape[-1] - 1) // 2]
        floor = -middle.minimum(high.clamp(min=0) / 2)
        much = ((low < 0) & (4 * low < -high)).sum().item()
        if much:
            text = f"{name}: much heat below 0 is cut off in {much} of {low.numel()}"
            warnings.warn(f"{text}; say what it means by signed='clip' or 'stretch'", stacklevel=3)
    return stack.clamp(min=floor[..., None, None])


def _list(images: Any) -> list[Any]:
    """Return one photo an entry; files are read here, once."""
    several = isinstance(images, list | tuple) or (isinstance(images, np.ndarray | Tensor) and images.ndim == 4)
    listed = list(images) if several else [images]
    return [load_photo(photo) if is_file(photo) else photo for photo in listed]


def _pixels(photos: list[Any], size: tuple[int, int]) -> Tensor:
    """Return (B, 3, H, W) float in [0, 1]."""
    return torch.stack([read_photo(photo, size).pixels for photo in photos])


def _features(given: Any, photos: list[Any] | None) -> Features | None:
    """Return Features as given, or what a backbone sees in the photos."""
    if given is None or isinstance(given, Features):
        return given
    ours = isinstance(given, ViTBackbone | CNNBackbone)
    kind = f"the class {given.__name__}" if isinstance(given, type) else type(given).__name__
    if not callable(given) or isinstance(given, type) or (not ours and hasattr(given, "pretrained_cfg")):
        raise TypeError(
            f"features must be molt.Features or a backbone, got {kind}: molt.backbones.ViTBackbone(NAME) makes one"
        )
    if photos is None:
        raise ValueError("images must be given where features is a backbone")
    weight = next(given.parameters(), None) if isinstance(given, torch.nn.Module) else None
    pixels = _pixels(photos, (BACKBONE_SIDE, BACKBONE_SIDE))
    with torch.no_grad():
        try:
            seen = given(pixels if weight is None else pixels.to(weight.device, weight.dtype))
        except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            if ours or isinstance(error, torch.OutOfMemoryError):
                raise
            shape = tuple(pixels.shape)
            raise TypeError(f"features must be a backbone that takes images {shape}: {kind} says {error}") from error
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
    if isinstance(photo, Tensor) and (first := as_channels_first(photo)) is not None:
        return int(first.shape[1]), int(first.shape[2])
    if isinstance(photo, np.ndarray) and (last := as_channels_last(photo)) is not None:
        return int(last.shape[0]), int(last.shape[1])
    width, height = load_photo(photo).size
    return height, width


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.nn.functional.interpolate(maps, size, mode="bilinear", align_corners=False)
