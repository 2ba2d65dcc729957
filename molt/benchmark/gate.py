"""Is a result right? Compared with the reference in float64 on fresh inputs, before anything is timed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molt.benchmark.registry import Inputs, Operation

WRONG = math.inf


def convert(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Apply ``change`` to every tensor in lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(convert(item, change) for item in value)
    if isinstance(value, dict):
        return {key: convert(item, change) for key, item in value.items()}
    return value


def changed(inputs: Inputs, change: Callable[[Tensor], Any]) -> Inputs:
    """Return inputs with ``change`` applied to every tensor."""
    return Inputs(convert(inputs.args, change), convert(dict(inputs.kwargs), change))


def tensors(value: Any, device: torch.device | str) -> list[Tensor]:
    """Return a result of any provider as a flat list of tensors on a device."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, part.name) for part in dataclasses.fields(value)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors(item, device)]
    tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))
    return [tensor.detach().to(device)]


def upcast(inputs: Inputs) -> Inputs:
    """Return inputs with floating tensors in float64, for the truth."""
    return changed(inputs, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def with_backward(run: Callable[..., Any], gradient: Tensor) -> Callable[..., Any]:
    """Return a function that also takes the gradient of its first argument, a tensor or a list of them."""

    def step(first: Any, *rest: Any, **kwargs: Any) -> Any:
        leaves = convert(first, lambda tensor: tensor.detach().requires_grad_())
        with torch.enable_grad():
            out = run(leaves, *rest, **kwargs)
            out = out[0] if isinstance(out, tuple) else out
            flat = [leaves] if isinstance(leaves, Tensor) else list(leaves)
            return torch.autograd.grad(out, flat, gradient.to(out.dtype))

    return step


def check(operation: Operation, result: Any, truth: Any, inputs: Inputs, *, backward: bool) -> float:
    """Return the error that the operation's tolerance is for; of gradients relative to the largest if above 1."""
    return gradients(result, truth, inputs) if backward else operation.compare(result, truth, inputs)


def values(result: Any, truth: Any, inputs: Inputs) -> float:
    """Largest absolute difference of floats; integers must be equal."""
    device = _device(inputs)
    return _largest(tensors(result, device), tensors(truth, device))


def gradients(result: Any, truth: Any, inputs: Inputs) -> float:
    """Largest difference, relative to the largest gradient where that is above 1."""
    device = _device(inputs)
    found, right = tensors(result, device), tensors(truth, device)
    scale = max(1.0, *(float(tensor.abs().max()) for tensor in right))
    return _largest(found, right) / scale


def labels(result: Any, truth: Any, inputs: Inputs) -> float:
    """Share of labels that differ."""
    device = _device(inputs)
    (found,), (right,) = tensors(result, device), tensors(truth, device)
    if found.shape != right.shape:
        return WRONG
    return float((found.long() != right.long()).double().mean()) if right.numel() else 0.0


def boxes(result: Any, truth: Any, inputs: Inputs) -> float:
    """Largest difference of means; all else must be equal, in whatever order components of equal area come."""
    found, right = (_sorted(tensors(value, "cpu")) for value in (result, truth))
    return _largest(found, right)


def clusters(result: Any, truth: Any, inputs: Inputs) -> float:
    """How far labels and centres fall short of the truth's squared distance, as a share of it; either way counts.

    Points halfway between centres may go either way, so labels themselves need not agree.
    """
    features, number = inputs.args[:2]
    device = features.device
    scores = []
    for value in (result, truth):
        found, centres = tensors(value, device)
        if found.shape != features.shape[:2] or centres.shape != (len(features), number, features.shape[2]):
            return WRONG
        if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < number:
            return WRONG
        scores.append(_distance(features, found.long(), centres))
    short = (scores[0] - scores[1]).abs() / scores[1]
    return float(short.max().nan_to_num(nan=WRONG))


def superpixels(result: Any, truth: Any, inputs: Inputs) -> float:
    """How far superpixels fall short of the truth's at explaining the colours, as a share of the images' variance.

    One that is better is not wrong, so only falling short counts. Labels themselves need not agree: a pixel halfway
    between two centres takes others with it, and who joins small pieces to which neighbour is free. A result is wrong
    where its segments are not about as many, so that more of them cannot buy the colours.
    """
    images = inputs.args[0]
    explained = []
    for value in (result, truth):
        found = tensors(value, images.device)[0].long()
        if found.shape != (len(images), *images.shape[2:]) or (found.numel() and int(found.min()) < 0):
            return WRONG
        explained.append(_explained(images, found))
    (mine, many), (right, expected) = explained
    if ((many - expected).abs() > 0.1 * expected + 2).any():
        return WRONG
    return float((right - mine).clamp_min(0).max().nan_to_num(nan=WRONG)) if len(images) else 0.0


def swept(result: Any, truth: Any, inputs: Inputs) -> float:
    """0 where all boxes at all cuts are the truth's; cuts between two levels need not be looked at.

    Results are SweptBoxes, equal row by row, or (P, 3) the image, channel and cut looked at and (R, 8) a row a box, in
    whatever order.
    """
    right, found = tensors(truth, "cpu"), tensors(result, "cpu")
    if len(found) == len(right):
        return 0.0 if all(map(torch.equal, found, right)) else WRONG
    looked, rows = found[0].long(), found[1].double()
    if not set(map(tuple, _changes(inputs.args[0]).tolist())) <= set(map(tuple, looked.tolist())):
        return WRONG
    expected = _expand(right, looked)
    same = rows.shape == expected.shape and torch.equal(_ranked(rows), _ranked(expected))
    return 0.0 if same else WRONG


def largest_swept(result: Any, truth: Any, inputs: Inputs) -> float:
    """0 where the largest boxes at all cuts are the truth's; forms as for `swept`."""
    boxes, area = tensors(truth, "cpu")
    found = tensors(result, "cpu")
    if found[0].dim() == 4:
        same = torch.equal(found[0], boxes) and torch.equal(found[1], area)
        return 0.0 if same else WRONG
    image, channel, cut = found[0].long().unbind(1)
    there = area[image, channel, cut] > 0
    there |= boxes[image, channel, cut].any(1)
    where = torch.stack([image, channel, cut], 1)[there]
    index = tuple(where.unbind(1))
    expected = torch.cat([where.double(), boxes[index].double(), area[index][:, None]], 1)
    rows = found[1].double()
    if not set(map(tuple, _changes(inputs.args[0]).tolist())) <= set(map(tuple, found[0].tolist())):
        return WRONG
    return 0.0 if rows.shape == expected.shape and torch.equal(_ranked(rows), _ranked(expected)) else WRONG


def _changes(levels: Tensor) -> Tensor:
    """(P, 3) image, channel and cut of every level of every map but its highest."""
    pairs = []
    for image, channels in enumerate(levels.cpu()):
        for channel, own in enumerate(channels):
            cuts = own.unique()[:-1].long()
            pairs.append(torch.stack([torch.full_like(cuts, image), torch.full_like(cuts, channel), cuts], 1))
    return torch.cat(pairs) if pairs else torch.zeros(0, 3, dtype=torch.int64)


def _expand(found: Sequence[Tensor], pairs: Tensor) -> Tensor:
    """(R, 8) a row a box at each pair of map and cut."""
    boxes, area, first, last, _, image, channel = found
    rows = []
    for own_image, own_channel in pairs[:, :2].unique(dim=0).tolist():
        mine = (image == own_image) & (channel == own_channel)
        cuts = pairs[(pairs[:, 0] == own_image) & (pairs[:, 1] == own_channel), 2]
        there = (first[mine][None] <= cuts[:, None]) & (cuts[:, None] <= last[mine][None])
        at, which = there.nonzero(as_tuple=True)
        where = torch.stack([torch.full_like(at, own_image), torch.full_like(at, own_channel), cuts[at]], 1)
        rows.append(torch.cat([where.double(), boxes[mine][which].double(), area[mine][which].double()[:, None]], 1))
    return torch.cat(rows) if rows else torch.zeros(0, 8, dtype=torch.float64)


def _ranked(rows: Tensor) -> Tensor:
    return rows[torch.from_numpy(np.lexsort(rows.numpy().T[::-1]))]


def _explained(images: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Share (B,) of each image's variance between its segments, and how many (B,) there are."""
    values, index = images.double().flatten(2), found.flatten(1)
    number = int(index.max()) + 1
    members = values.new_zeros(len(values), number).scatter_add_(1, index, torch.ones_like(index, dtype=values.dtype))
    sums = values.new_zeros(*values.shape[:2], number)
    sums.scatter_add_(2, index[:, None].expand_as(values), values)
    centre = values.mean(2, keepdim=True)
    between = ((sums / members.clamp_min(1)[:, None] - centre).square() * members[:, None]).sum((1, 2))
    return between / (values - centre).square().sum((1, 2)).clamp_min(1e-30), (members > 0).sum(1)


def _distance(features: Tensor, found: Tensor, centres: Tensor) -> Tensor:
    """(B,) squared distance of the points to their centres, image by image to save memory."""
    return torch.stack(
        [
            (points.double() - own.double()[mine]).square().sum()
            for points, mine, own in zip(features, found, centres, strict=True)
        ]
    )


def _device(inputs: Inputs) -> torch.device:
    first = inputs.args[0]
    tensor = first if isinstance(first, Tensor) else first[0]
    assert isinstance(tensor, Tensor)
    return tensor.device


def _sorted(parts: Sequence[Tensor]) -> list[Tensor]:
    """Rows of components in an order of their own; maps of one box each keep theirs."""
    arrays = [part.numpy() for part in parts]
    if len(arrays) == 3:
        return list(parts)
    box, area, mean, image, channel = arrays
    order = np.lexsort((mean, *box.T, -area, channel, image))
    return [part[torch.from_numpy(order)] for part in parts]


def _largest(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    if len(found) != len(right):
        return WRONG
    error = 0.0
    for ours, theirs in zip(found, right, strict=True):
        if ours.shape != theirs.shape:
            return WRONG
        if not theirs.numel():
            continue
        if not theirs.is_floating_point():
            if not torch.equal(ours.long(), theirs.long()):
                return WRONG
            continue
        difference = (ours.double() - theirs.double()).abs()
        both = ours.isnan() & theirs.isnan()
        error = max(error, float(difference.masked_fill(both, 0).nan_to_num(nan=WRONG).max()))
    return error
