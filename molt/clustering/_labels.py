"""What the clusterers share: the unit of work, the working size, and labels at the output's own pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from molt.backbones.preprocess import check_images, resize
from molt.ops._checks import check_size
from molt.structures import Features

# Photos a pass on a GPU. Kernels may add in another order for another batch size, so there are only two of them, and
# a lone photo pays for two. On the CPU the unit is one photo.
SMALL_CHUNK, LARGE_CHUNK = 2, 8
NEVER = -1e30  # below every affinity; infinity would turn NaN in an interpolation


def prepare(x: Tensor | Features, size: Sequence[int] | None) -> tuple[Tensor, tuple[int, int]]:
    """Return images as they are, or Features as unit vectors (B, D, h, w), with the size of the labels.

    Raises:
        TypeError, ValueError: images or a size of another type or shape; on the CPU NaN or infinite values, which on
            a GPU are not looked for, as reading would stall it.
    """
    if isinstance(x, Features):
        values, default = F.normalize(x.as_map().detach().float(), dim=1), x.image_size
    else:
        check_images(x)
        values, default = x.detach().float(), (x.shape[2], x.shape[3])
    if values.device.type == "cpu" and not bool(values.isfinite().all()):
        what = "features" if isinstance(x, Features) else "images"
        raise ValueError(f"{what} hold NaN or infinite values, which cannot be clustered")
    return values, default if size is None else check_size(size)


def shrink(images: Tensor, working_size: int | None) -> Tensor:
    """Return images with the longer side at most ``working_size``, antialiased; None leaves them."""
    longest = max(images.shape[2:])
    if working_size is None or longest <= working_size:
        return images
    small = [max(1, round(side * working_size / longest)) for side in images.shape[2:]]
    return resize(images, small)


def in_chunks(
    run: Callable[[Tensor], tuple[Tensor, Tensor]], values: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return labels (B, *size) and counts of a batch in units of fixed size, so that they do not depend on the batch.

    One photo at a time on the CPU; on other devices 8 at a time, and the rest as 2 or 8, filled up with copies of the
    last photo.
    """
    results = [
        (
            torch.zeros(0, *size, dtype=torch.int32, device=values.device),
            torch.zeros(0, dtype=torch.int64, device=values.device),
        )
    ]
    for start, stop, padded in chunks(len(values), values.device.type):
        chunk = values[start:stop]
        if padded > len(chunk):
            chunk = torch.cat([chunk, chunk[-1:].expand(padded - len(chunk), -1, -1, -1)])
        labels, counts = run(chunk)
        results.append((labels[: stop - start], counts[: stop - start]))
    return torch.cat([labels for labels, _ in results]), torch.cat([counts for _, counts in results])


def chunks(number: int, device_type: str) -> list[tuple[int, int, int]]:
    """Return (start, stop, size of the pass) of each unit."""
    if device_type == "cpu":
        return [(i, i + 1, 1) for i in range(number)]
    found, start = [], 0
    while start < number:
        # Up to half a large pass is cheaper as small ones, so that no photo pays for more than two.
        unit = LARGE_CHUNK if number - start > LARGE_CHUNK // 2 else SMALL_CHUNK
        found.append((start, min(start + unit, number), unit))
        start += unit
    return found


def nearest(affinity: Tensor, size: tuple[int, int], present: Tensor | None = None) -> Tensor:
    """Return the channel of the maximum at ``size``, (B, H, W) int64, the first of equals.

    Labels are decided at the output's own pixels: each channel is upsampled bilinearly (our choice: smoother outlines
    than repeating a cell's label). One channel at a time, because argmax over channels is slow and large photos times
    many channels would fill the memory.

    Args:
        affinity: (B, K, h, w).
        size: (H, W).
        present: (B, K) bool, the channels that may win in each image; None lets all.
    """
    channels: Sequence[int] = range(affinity.shape[1])
    if present is not None:
        channels = present.any(0).nonzero().flatten().tolist()
        affinity = affinity.masked_fill(~present[..., None, None], NEVER)
    best: Tensor | None = None
    labels = torch.zeros(len(affinity), *size, dtype=torch.int64, device=affinity.device)
    for channel in channels:
        values = affinity[:, channel]
        if values.shape[1:] != size:
            values = F.interpolate(values[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        if best is None:
            best = values
            labels.fill_(channel)
            continue
        higher = values > best
        best = torch.where(higher, values, best)
        labels.masked_fill_(higher, channel)
    return labels


def repeat(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Return labels (B, h, w) at ``size``, each pixel that of the cell it lies in."""
    if labels.shape[1:] == size:
        return labels
    rows, columns = (
        (torch.arange(out, device=labels.device) * 2 + 1) * cells // (2 * out)
        for out, cells in zip(size, labels.shape[1:], strict=True)
    )
    return labels[:, rows[:, None], columns]


def compact(labels: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Renumber labels below ``limit`` so that each image's clusters are 0..count-1; int32 labels, int64 counts."""
    flat = labels.flatten(1).long()
    present = torch.zeros(len(flat), limit, dtype=torch.int64, device=labels.device)
    present.scatter_(1, flat, 1)
    renumbered = (present.cumsum(1) - 1).gather(1, flat).view_as(labels)
    return renumbered.to(torch.int32), present.sum(1)
