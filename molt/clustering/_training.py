"""The training loop of deep clustering: a batch of images, a network each."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from molt import ops
from molt._backend import current, use_native
from molt.clustering._network import Fused, Grouped

logger = logging.getLogger("molt")

FORM = {"cuda": "products"}  # elsewhere grouped convolutions
WARM_UP = 3  # steps before a CUDA graph is recorded, in which libraries take their workspaces
MOST_RECORDED = 2  # each holds the memory of a pass


@dataclass(frozen=True)
class Job:
    """How the networks of one pass are trained.

    Attributes:
        steps: most steps.
        min_labels: an image with this few labels stops.
        continuity: weight of the loss on neighbouring differences.
        dtype: of the convolutions.
    """

    steps: int
    min_labels: int
    continuity: float
    dtype: torch.dtype


@torch.no_grad()
def train(
    images: Tensor, segments: Tensor | None, limit: int | None, states: Sequence[Sequence[Tensor]], job: Job
) -> Tensor:
    """Return the responses (B, starts * C, h, w) float32 of each image's networks after training.

    Args:
        images: (B, D, h, w) float32, at least one, of at least two pixels.
        segments: (B, h, w) superpixels that vote, or None.
        limit: above every segment.
        states: initial parameters of every image's networks, one list a start.
        job: how to train.
    """
    if job.dtype == torch.float32 and images.device.type == "cpu" and use_native("deep_norm", images.device, None):
        return torch.cat([_train_one(images, segments, limit, states, job, i) for i in range(len(images))])
    if images.device.type == "cuda" and job.steps > WARM_UP:
        with torch.cuda.device(images.device), _lock:
            responses = _replay(images, segments, limit, states, job)
    else:
        network = _grouped(images, states, job)
        responses = _run(network, None if segments is None else network.repeat(segments), limit, job)
    ordered: Tensor = responses.unflatten(0, (len(states), -1)).transpose(0, 1).flatten(1, 2)
    return ordered


def _train_one(
    images: Tensor, segments: Tensor | None, limit: int | None, states: Sequence[Sequence[Tensor]], job: Job, index: int
) -> Tensor:
    """Train one image's networks, one after the other."""
    image = images[index : index + 1]
    votes = None if segments is None else segments[index : index + 1]
    return torch.cat([_run(Fused(image, state, job.continuity), votes, limit, job) for state in states], 1)


def _grouped(images: Tensor, states: Sequence[Sequence[Tensor]], job: Job) -> Grouped:
    return Grouped(images, states, job.continuity, job.dtype, FORM.get(images.device.type, "grouped"))


def _run(network: Grouped | Fused, segments: Tensor | None, limit: int | None, job: Job) -> Tensor:
    """Train step by step; on the CPU until all images have stopped."""
    responses = network.respond()
    active = torch.ones(len(responses), dtype=torch.bool, device=responses.device)
    for _ in range(job.steps):
        step(network, segments, limit, active, job.min_labels)
        responses = network.respond()
        if responses.device.type == "cpu" and not bool(active.any()):
            break
    return responses


def step(network: Grouped | Fused, segments: Tensor | None, limit: int | None, active: Tensor, min_labels: int) -> None:
    """Learn from the latest responses, and mark in ``active`` (B,) which images go on."""
    labels = network.answers()
    channels = len(network.parameters[-1]) // len(active)
    voted = labels if segments is None else ops.cluster_vote(labels, segments, channels, limit)
    network.learn(voted, active)
    kinds = torch.zeros(len(active), channels, dtype=torch.int64, device=labels.device)
    kinds.scatter_(1, labels.flatten(1).long(), 1)
    active &= kinds.sum(1) > min_labels


def _record(step: Callable[[], None]) -> Callable[[], None]:
    """Record what a function does on the GPU, after a few runs to warm up; return what does it again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


class _Recorded:
    """A training step recorded on a GPU, to be replayed on other images of the same shape."""

    def __init__(self, network: Grouped, segments: Tensor | None, limit: int | None, job: Job) -> None:
        self.network, self.segments, self.limit, self.least = network, segments, limit, job.min_labels
        self.active = torch.ones(network.group, dtype=torch.bool, device=network.pixels.device)
        self.initial = [value.detach().clone() for value in network.parameters]
        self.replay = _record(self._step)

    def _step(self) -> None:
        self.network.respond()
        step(self.network, self.segments, self.limit, self.active, self.least)

    def run(self, images: Tensor, segments: Tensor | None, steps: int) -> Tensor:
        """Train on images from the initial state; nothing is read back."""
        self.network.pixels.copy_(self.network.repeat(images).view_as(self.network.pixels))
        if self.segments is not None and segments is not None:
            self.segments.copy_(self.network.repeat(segments))
        for value, first in zip(self.network.parameters, self.initial, strict=True):
            value.copy_(first)
        for speed in self.network.speeds:
            speed.zero_()
        self.active.fill_(True)
        for _ in range(steps):
            self.replay()
        responses = self.network.respond().clone()
        self.network.responses = responses  # instead of those with a graph of gradients behind them
        return responses


_lock = threading.Lock()  # two threads must not train in the same recording
_recorded: OrderedDict[tuple, _Recorded | None] = OrderedDict()  # None where recording failed


def forget() -> None:
    """Give back the memory of recorded steps."""
    _recorded.clear()


def _replay(
    images: Tensor, segments: Tensor | None, limit: int | None, states: Sequence[Sequence[Tensor]], job: Job
) -> Tensor:
    """Train by replaying a recorded step, which spares a GPU the host's time for every launch."""
    if limit is not None:
        limit = 1 << (limit - 1).bit_length()  # so that one recording serves photos with about as many superpixels
    content = b"".join(value.cpu().numpy().tobytes() for state in states for value in state)
    # What is recorded does not depend on the number of steps, but on what chooses kernels.
    key = (
        images.device,
        images.shape,
        limit,
        None if segments is None else segments.dtype,
        hashlib.blake2b(content).digest(),
        len(states),
        replace(job, steps=0),
        current(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )
    if key not in _recorded:
        while len(_recorded) >= MOST_RECORDED:
            _recorded.popitem(last=False)
        _recorded[key] = _try_to_record(images, segments, limit, states, job)
    _recorded.move_to_end(key)
    recorded = _recorded[key]
    if recorded is not None:
        return recorded.run(images, segments, job.steps)
    network = _grouped(images, states, job)
    return _run(network, None if segments is None else network.repeat(segments), limit, job)


def _try_to_record(
    images: Tensor, segments: Tensor | None, limit: int | None, states: Sequence[Sequence[Tensor]], job: Job
) -> _Recorded | None:
    network = _grouped(images, states, job)
    try:
        return _Recorded(network, None if segments is None else network.repeat(segments), limit, job)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        logger.warning("deep clustering runs without a CUDA graph, which is slower: %s", reason)
        return None
