"""SLIC superpixels in plain PyTorch; the twin of `molt.ops.slic`. Pieces are found image by image with SciPy."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

REACH = 2  # steps of the grid from a centre to the ends of its window
FARTHEST = 1e15  # between colours, in units of compactness
NOBODY = 2**63 - 1
ENTRIES = 2**20  # pixels of windows looked at together, for the memory they take
TO_XYZ = (
    (0.4124564, 0.3575761, 0.1804375),
    (0.2126729, 0.7151522, 0.0721750),
    (0.0193339, 0.1191920, 0.9503041),
)
WHITE = (0.95047, 1.0, 1.08883)


def slic(
    images: Tensor,
    num_segments: int,
    compactness: float,
    iterations: int,
    lab: bool,
    connected: bool,
    min_size: float,
    max_size: float,
) -> tuple[Tensor, Tensor]:
    """Labels (B, H, W) int32 and counts (B,) int64 of images on the CPU. See the public operator."""
    batch, _, height, width = images.shape
    bad = (~images.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"images: got NaN or infinite values in image {bad[0]}, expected finite values")
    rows, columns = _grid(height, width, num_segments)
    seeds = len(rows) * len(columns)
    if batch == 0:
        return images.new_empty((0, height, width), dtype=torch.int32), images.new_empty(0, dtype=torch.int64)
    values, place = _values(images, compactness, lab)
    labels = _rounds(values, place, (rows, columns), iterations).view(batch, height, width)
    found = [
        _connect(one, own, *(int(min(f * (height * width / seeds), height * width)) for f in (min_size, max_size)))
        if connected
        else _renumber(one)
        for one, own in zip(labels.numpy(), values.numpy(), strict=True)
    ]
    return (
        torch.from_numpy(np.stack(found).astype(np.int32)),
        torch.tensor([int(one.max()) + 1 for one in found]),
    )


def _grid(height: int, width: int, wanted: int) -> tuple[range, range]:
    """Rows and columns of the seeds."""
    pixels = height * width
    down = across = math.sqrt(pixels / min(wanted, pixels))
    shorter = min(height, width)
    if shorter < down:
        longer = pixels / shorter / min(wanted, pixels)
        down, across = (shorter, longer) if height <= width else (longer, shorter)
    return (
        range(int(down / 2), height, max(1, round(down))),
        range(int(across / 2), width, max(1, round(across))),
    )


def _values(images: Tensor, compactness: float, lab: bool) -> tuple[Tensor, Tensor]:
    """Pixels (B, H * W, D) in units of compactness from each image's lowest value, and the scale (B,) of places."""
    wide = images.double().flatten(2) * 0.5
    if lab:
        low, high = wide.amin((1, 2), keepdim=True), wide.amax((1, 2), keepdim=True)
        wide = (wide - low) / torch.where(high > low, high - low, 1)
        light = torch.where(wide > 0.04045, ((wide + 0.055) / 1.055) ** 2.4, wide / 12.92)
        xyz = torch.tensor(TO_XYZ, dtype=torch.float64) @ light
        xyz = xyz / torch.tensor(WHITE, dtype=torch.float64)[:, None]
        x, y, z = torch.where(xyz > 0.008856452, xyz.clamp_min(0) ** (1 / 3), 7.787037 * xyz + 16 / 116).unbind(1)
        wide = torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1) * 0.5
        half = torch.full((len(images),), 50.0, dtype=torch.float64)
    else:
        wide = wide - wide.amin(2, keepdim=True)
        half = wide.amax((1, 2)).clamp_min(1e-300)
    place = (FARTHEST * (0.5 * compactness / half)).clamp_max(1)
    unit = torch.where(place < 1, FARTHEST / half, 2 / compactness)
    return (wide * unit[:, None, None]).float().transpose(1, 2), place


def _rounds(values: Tensor, place: Tensor, grid: tuple[range, range], iterations: int) -> Tensor:
    """The centre that each pixel joins, (B, H * W) int64: lines of the windows of all centres at once."""
    batch, pixels, channels = values.shape
    rows, columns = grid
    height, width = rows.stop, columns.stop
    seeds = torch.cartesian_prod(torch.tensor(rows), torch.tensor(columns)).double().expand(batch, -1, -1)
    number = seeds.shape[1]
    centres = torch.cat([seeds, seeds.new_zeros(batch, number, channels)], 2)
    reach = torch.tensor([REACH * rows.step, REACH * columns.step])
    wide = min(2 * REACH * columns.step + 2, width)
    lines = max(1, ENTRIES // (batch * number * wide))
    index = torch.arange(pixels)
    points = torch.cat([torch.stack([index // width, index % width], 1).expand(batch, -1, -1).double(), values], 2)
    labels = torch.full((batch, pixels), -1)
    name = torch.arange(number)[:, None, None]
    for turn in range(iterations):
        first = (centres[..., :2] - reach).clamp_min(0).long()[..., None, None]
        last = torch.minimum((centres[..., :2] + reach + 1).long(), torch.tensor([height, width]))[..., None, None]
        weight = (place**2 if turn else torch.ones(batch)) / max(rows.step, columns.step) ** 2
        # The distance above the centre's number: the nearest, of equals the first, is then the lowest.
        best = torch.full((batch, pixels), NOBODY)
        for line in range(0, min(2 * REACH * rows.step + 2, height), lines):
            y = first[:, :, 0] + torch.arange(line, line + lines)[:, None]
            x = first[:, :, 1] + torch.arange(wide)
            inside = (y < last[:, :, 0]) & (x < last[:, :, 1])
            at = (y * width + x).clamp_max(pixels - 1).flatten(1)
            apart = (y - centres[..., :1, None]) ** 2 + (x - centres[..., 1:2, None]) ** 2
            distance = (apart * weight[:, None, None, None]).float()
            if turn:
                colours = values.gather(1, at[..., None].expand(-1, -1, channels)).unflatten(1, inside.shape[1:])
                distance += (colours - centres[:, :, None, None, 2:].float()).square().sum(-1)
            key = torch.where(inside, (distance.view(torch.int32).long() << 32) + name, NOBODY)
            best.scatter_reduce_(1, at, key.flatten(1), "amin")
        reached = best < NOBODY
        owner = torch.where(reached, best & (2**32 - 1), number)
        moved = (reached & (owner != labels)).any(1)
        labels = torch.where(reached, owner, labels)
        if not moved.any():
            break
        sums = points.new_zeros(batch, number + 1, channels + 2)
        sums.scatter_add_(1, owner[..., None].expand_as(points), points)
        members = torch.zeros(batch, number + 1, dtype=torch.float64)
        members.scatter_add_(1, owner, torch.ones_like(owner, dtype=torch.float64))
        members = members[:, :number, None]
        centres = torch.where((members > 0) & moved[:, None, None], sums[:, :number] / members.clamp_min(1), centres)
    return labels


def _renumber(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels numbered in reading order of their first pixels."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].reshape(labels.shape)


def _connect(labels: NDArray[np.int64], values: NDArray[np.float32], least: int, most: int) -> NDArray[np.int64]:
    """One 4-connected piece a label, of pixels (H * W, D). See `slic_connect` in csrc/cpu/slic.h."""
    pieces = _cut(_pieces(labels), max(most, 1))
    sizes = np.bincount(pieces.ravel())
    means = np.stack([np.bincount(pieces.ravel(), channel) for channel in values.T], 1) / sizes[:, None]
    touching = _touching(pieces)
    names = np.zeros(len(sizes), np.int64)
    colours = [means[0]]
    for piece in range(1, len(sizes)):
        if sizes[piece] >= least:
            names[piece] = len(colours)
            colours.append(means[piece])
        else:
            before = touching.indices[touching.indptr[piece] : touching.indptr[piece + 1]]
            names[piece] = _nearest(names[before[before < piece]], means[piece], colours)
    found = names[pieces]
    if not found.any() or (found == 0).sum() >= least:
        return found
    around = _touching(found)
    other = _nearest(around.indices[: around.indptr[1]], means[0], colours)
    return _renumber(np.where(found == other, 0, found))


def _nearest(names: NDArray[np.int64], mean: NDArray[np.float64], colours: list[NDArray[np.float64]]) -> int:
    """The name whose colour is nearest, of equals the lowest."""
    names = np.unique(names)
    apart = ((np.stack([colours[name] for name in names]) - mean) ** 2).sum(1)
    return int(names[apart.argmin()])


def _touching(labels: NDArray[np.int64]) -> sparse.csr_matrix:
    """Which labels touch which, both ways."""
    pairs = [(labels[:, 1:], labels[:, :-1]), (labels[1:], labels[:-1])]
    ends = np.concatenate([np.stack([a[a != b], b[a != b]]) for a, b in pairs], 1)
    ends = np.concatenate([ends, ends[::-1]], 1)
    number = int(labels.max()) + 1
    return sparse.coo_matrix((np.ones(ends.shape[1]), tuple(ends)), (number, number)).tocsr()


def _pieces(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """4-connected pieces of equal labels, numbered in reading order."""
    index = np.arange(labels.size).reshape(labels.shape)
    across, down = labels[:, 1:] == labels[:, :-1], labels[1:] == labels[:-1]
    ends = np.concatenate(
        [
            np.stack([index[:, 1:][across], index[:, :-1][across]]),
            np.stack([index[1:][down], index[:-1][down]]),
        ],
        1,
    )
    graph = sparse.coo_matrix((np.ones(ends.shape[1], bool), tuple(ends)), (labels.size, labels.size))
    return _renumber(sparse.csgraph.connected_components(graph, directed=False)[1].reshape(labels.shape))


def _cut(pieces: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Cut pieces above a size: each flood from the first pixel left, breadth first, takes as many as may be."""
    sizes = np.bincount(pieces.ravel())
    if sizes.max() <= most:
        return pieces
    width = pieces.shape[1] + 2
    field = np.pad(pieces, 1, constant_values=-1).ravel().tolist()
    number = len(sizes)
    for start in np.flatnonzero(np.isin(np.pad(pieces, 1, constant_values=-1), np.flatnonzero(sizes > most))).tolist():
        piece = field[start]
        if piece >= len(sizes):
            continue
        field[start] = number
        queue = [start]
        for at in queue:
            for to in (at - width, at - 1, at + 1, at + width):
                if field[to] == piece and len(queue) < most:
                    field[to] = number
                    queue.append(to)
        number += 1
    return _renumber(np.array(field).reshape(-1, width)[1:-1, 1:-1])
