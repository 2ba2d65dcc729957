"""What else resizes, fuses, boxes and clusters: PyTorch idioms, OpenCV, SciPy, scikit-image, scikit-learn.

All take the public operator's arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from molt.benchmark.peers_clusters import LOOPS, mask_loop_refine, scatter_add_mean
from molt.benchmark.registry import NotRun, Provider, given, operator

Array = NDArray[Any]
Rows = tuple[Array, Array, Array, Array, Array]


def interpolate(maps: Tensor, size: Sequence[int]) -> Tensor:
    """F.interpolate, then min-max by amin and amax."""
    big = F.interpolate(maps.float(), tuple(size), mode="bilinear", align_corners=False)
    low, high = big.amin((2, 3), keepdim=True), big.amax((2, 3), keepdim=True)
    return ((big - low) / (high - low)).to(maps.dtype)


def interpolate_loop(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Map by map: F.interpolate, less the minimum, over the maximum of that."""
    out = maps.new_empty(*maps.shape[:2], *size)
    for image in range(len(maps)):
        for channel in range(maps.shape[1]):
            one = maps[image : image + 1, channel : channel + 1].float()
            big = F.interpolate(one, tuple(size), mode="bilinear", align_corners=False)[0, 0]
            big = big - big.min()
            out[image, channel] = (big / big.max()).to(maps.dtype)
    return out


def opencv_resize(maps: Array, size: Sequence[int]) -> Array:
    """cv2.resize and cv2.normalize, map by map."""
    import cv2

    if maps.dtype != np.float32:
        raise NotRun(f"OpenCV resizes no {maps.dtype}")
    height, width = size
    out = np.empty((*maps.shape[:2], height, width), np.float32)
    for place in np.ndindex(maps.shape[:2]):
        big = cv2.resize(maps[place], (width, height), interpolation=cv2.INTER_LINEAR)
        cv2.normalize(big, out[place], 0, 1, cv2.NORM_MINMAX)
    return out


def _fuse(resize: Callable[..., Any]) -> Callable[..., Any]:
    """Fusion out of a way to resize and normalise one scale."""

    def fuse(maps: Sequence[Any], size: Sequence[int], weights: Sequence[float]) -> Any:
        total = resize(maps[0], size) * weights[0]
        for scale, weight in zip(maps[1:], weights[1:], strict=True):
            total = total + resize(scale, size) * weight
        return total

    return fuse


def resize_providers() -> list[Provider]:
    """Peers of upsample_normalize."""
    return _resizers(lambda resize: resize)


def fuse_providers() -> list[Provider]:
    """Peers of fuse_maps."""
    return _resizers(_fuse)


def _resizers(make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> list[Provider]:
    return [
        Provider("interpolate", "peer", given(make(interpolate)), differentiable=True),
        Provider(
            "opencv",
            "peer",
            given(make(opencv_resize)),
            package="cv2",
            distribution="opencv-python-headless",
            devices=("cpu",),
            numpy=True,
        ),
        Provider("published", "published", given(make(interpolate_loop)), most_images=LOOPS),
    ]


def _two_calls() -> Callable[..., Any]:
    fuse, refine = operator("fuse_maps", "native")(), operator("cluster_refine", "native")()

    def call(maps: Any, labels: Tensor, alpha: float, number: int, weights: Sequence[float]) -> Any:
        return refine(fuse(maps, labels.shape[1:], weights), labels, alpha, number)

    return call


def scatter_add_fused(
    maps: Sequence[Tensor], labels: Tensor, alpha: float, number: int, weights: Sequence[float]
) -> Tensor:
    """F.interpolate, min-max, weighted sum, scatter_add, gather."""
    fused: Tensor = _fuse(interpolate)(maps, labels.shape[1:], weights)
    means, _ = scatter_add_mean(fused, labels, number)
    index = labels.reshape(len(labels), 1, -1).long().expand(-1, fused.shape[1], -1)
    return ((1 - alpha) * fused + alpha * means.gather(2, index).view_as(fused)).to(maps[0].dtype)


def loop_fused(maps: Sequence[Tensor], labels: Tensor, alpha: float, number: int, weights: Sequence[float]) -> Tensor:
    """The loop over maps, then the loop over clusters."""
    return mask_loop_refine(_fuse(interpolate_loop)(maps, labels.shape[1:], weights), labels, alpha, number)


def fuse_and_refine_providers() -> list[Provider]:
    """Peers of fuse_and_refine, and the library's own two calls in its place."""
    return [
        Provider("two_calls", "variant", _two_calls, differentiable=True),
        Provider("scatter_add", "peer", given(scatter_add_fused), differentiable=True),
        Provider("published", "published", given(loop_fused), most_images=LOOPS),
    ]


def _masks(maps: Array, threshold: float) -> Iterator[tuple[int, int, Array, Array]]:
    """Image, channel, map and what of it is kept."""
    for image, channel in np.ndindex(maps.shape[:2]):
        values = maps[image, channel]
        # In float64, as the operator compares.
        least = np.float64(threshold) * np.float64(values.max())
        yield image, channel, values, (values > 0) & (values >= least)


def _table(parts: list[tuple[Array, Array, Array, int, int]], largest: bool) -> Rows:
    """Boxes, area, sum over each map's components, image and channel as the operator returns them."""
    boxes, areas, means, images, channels = [], [], [], [], []
    for box, area, total, image, channel in parts:
        order = np.argsort(-area, kind="stable")[: 1 if largest else None]
        boxes.append(box[order])
        areas.append(area[order])
        means.append(total[order] / area[order])
        images.append(np.full(len(order), image))
        channels.append(np.full(len(order), channel))
    return (
        np.concatenate(boxes).astype(np.float32),
        np.concatenate(areas).astype(np.int64),
        np.concatenate(means).astype(np.float32),
        np.concatenate(images),
        np.concatenate(channels),
    )


def opencv_boxes(maps: Array, threshold: float, *, connectivity: int, largest: bool) -> Rows:
    """connectedComponentsWithStats, map by map."""
    import cv2

    parts = []
    for image, channel, values, kept in _masks(maps, threshold):
        count, labels, stats, _ = cv2.connectedComponentsWithStats(kept.view(np.uint8), connectivity=connectivity)
        total = np.bincount(labels.ravel(), values.ravel(), count)[1:]
        left, top, width, height, area = stats[1:].T
        box = np.stack([left, top, left + width, top + height], 1)
        parts.append((box, area, total, image, channel))
    return _table(parts, largest)


def scipy_boxes(maps: Array, threshold: float, *, connectivity: int, largest: bool) -> Rows:
    """ndimage.label and find_objects, map by map."""
    from scipy import ndimage

    structure = np.ones((3, 3)) if connectivity == 8 else None
    parts = []
    for image, channel, values, kept in _masks(maps, threshold):
        labels, count = ndimage.label(kept, structure)
        flat = labels.ravel()
        area = np.bincount(flat, minlength=count + 1)[1:]
        total = np.bincount(flat, values.ravel(), count + 1)[1:]
        ends = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(labels)]
        parts.append((np.array(ends).reshape(-1, 4), area, total, image, channel))
    return _table(parts, largest)


def skimage_boxes(maps: Array, threshold: float, *, connectivity: int, largest: bool) -> Rows:
    """measure.label and regionprops_table, map by map."""
    from skimage import measure

    parts = []
    for image, channel, values, kept in _masks(maps, threshold):
        labels = measure.label(kept, connectivity=2 if connectivity == 8 else 1)
        found = measure.regionprops_table(labels, values, properties=("bbox", "area", "mean_intensity"))
        box = np.stack([found[f"bbox-{side}"] for side in (1, 0, 3, 2)], 1)
        parts.append((box, found["area"], found["mean_intensity"] * found["area"], image, channel))
    return _table(parts, largest)


def _largest(boxes: Callable[..., Rows]) -> Callable[..., Any]:
    """largest_box out of a way to box all components; a map of these cases always has one."""

    def largest(maps: Array, threshold: float, *, connectivity: int) -> tuple[Array, Array, Array]:
        box, area, mean, _, _ = boxes(maps, threshold, connectivity=connectivity, largest=True)
        shape = maps.shape[:2]
        return box.reshape(*shape, 4), area.reshape(shape), mean.reshape(shape)

    return largest


def box_providers(*, largest: bool) -> list[Provider]:
    """Peers of component_boxes, or of largest_box."""
    peers = [
        ("opencv", opencv_boxes, "cv2", "opencv-python-headless"),
        ("scipy", scipy_boxes, "scipy", "scipy"),
        ("scikit_image", skimage_boxes, "skimage", "scikit-image"),
    ]
    return [
        Provider(
            name,
            "peer",
            given(_largest(boxes) if largest else boxes),
            package=package,
            distribution=distribution,
            devices=("cpu",),
            numpy=True,
        )
        for name, boxes, package, distribution in peers
    ]


def torch_kmeans(
    features: Tensor, k: int, *, metric: str, iterations: int, centres: Tensor, **_: Any
) -> tuple[Tensor, Tensor]:
    """Lloyd's steps with batched matrix products and one-hot means."""
    means = centres.float()
    for _step in range(iterations):
        member = F.one_hot(_nearest(features, means), k).to(features.dtype)
        count = member.sum(1, dtype=torch.float32)[..., None]
        moved = (member.transpose(1, 2) @ features).float() / count.clamp(min=1)
        if metric == "cosine":
            moved = F.normalize(moved, dim=-1)
        means = torch.where(count > 0, moved, means)
    return _nearest(features, means).int(), means


def _nearest(features: Tensor, centres: Tensor) -> Tensor:
    affinity = 2 * (features @ centres.to(features.dtype).transpose(1, 2)).float() - centres.square().sum(-1)[:, None]
    return affinity.argmax(-1)


def sklearn_kmeans(
    features: Array, k: int, *, metric: str, iterations: int, centres: Array, **_: Any
) -> tuple[Array, Array]:
    """KMeans from the same start, one run, image by image, until nothing changes or the steps are used up."""
    from sklearn.cluster import KMeans

    if metric != "l2":
        raise NotRun("scikit-learn's KMeans is Euclidean only")
    fits = [
        KMeans(k, init=start, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd").fit(points)
        for points, start in zip(features, centres, strict=True)
    ]
    return np.stack([fit.labels_ for fit in fits]), np.stack([fit.cluster_centers_ for fit in fits])


def kmeans_providers() -> list[Provider]:
    """Peers of kmeans."""
    return [
        Provider("bmm", "peer", given(torch_kmeans)),
        Provider(
            "scikit_learn",
            "peer",
            given(sklearn_kmeans),
            package="sklearn",
            distribution="scikit-learn",
            devices=("cpu",),
            numpy=True,
        ),
    ]


def skimage_slic(images: Array, number: int, compactness: float) -> Array:
    """segmentation.slic, image by image."""
    from skimage.segmentation import slic

    wanted = min(number, images.shape[2] * images.shape[3])
    found = [slic(image, wanted, compactness, start_label=0) for image in images.transpose(0, 2, 3, 1)]
    return np.stack(found)


def slic_providers() -> list[Provider]:
    """Peers of slic."""
    return [
        Provider(
            "scikit_image",
            "peer",
            given(skimage_slic),
            package="skimage",
            distribution="scikit-image",
            devices=("cpu",),
            numpy=True,
        )
    ]
