"""What a method costs: parameters, multiply-adds, memory and time from a photo to its map and to its box."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from molt import ops
from molt._backend import backend as use_backend
from molt._words import count
from molt.benchmark import timing
from molt.benchmark.method_rows import Entry
from molt.clustering import _training
from molt.data.annotations import LocalizationSet
from molt.data.images import PhotoError, read_photo

SETS = 4  # batches of photos that take turns in timing
LEAST_READINGS = 3
BOX_AT = 0.5  # share of the maximum where boxes are taken; only their time counts
COUNTED = (
    "multiply-adds of convolutions, matrix products and attention, forward and where the method takes gradients "
    "backward, of one photo to its map; operators in their plain PyTorch form; not resizing, normalisation, "
    "superpixels or eigenvectors"
)
COLUMNS: tuple[str, ...] = ("gmacs", "ms", "p20_ms", "p80_ms", "box_ms", "box_p20_ms", "box_p80_ms")
COLUMNS += ("weights_mib", "extra_mib", "peak_mib")


def parameters(entry: Entry) -> dict[str, int]:
    """Return the number of parameters in all networks that run, and of those trained for the set."""
    seen = {id(p): p for network in entry.networks for p in network.parameters()}
    trained = {id(p): p for network in entry.trained for p in network.parameters() if p.requires_grad}
    return {
        "parameters": sum(p.numel() for p in seen.values()),
        "trained_parameters": sum(p.numel() for p in trained.values()),
    }


def saw_masks(entry: Entry) -> str:
    """Return whether any network's training used pixel masks: ``"probably"``, ``"unknown"`` or ``"no"``."""
    said = {info.saw_masks for info in entry.weights}
    return next((value for value in ("probably", "unknown") if value in said), "no")


def gmacs(run: Callable[[], Any]) -> float:
    """Return the multiply-adds of a call, in 10^9, as PyTorch counts them; see ``COUNTED``."""
    # PyTorch's own count of a grouped convolution's gradients forgets the groups (2.10 to 2.15 at least).
    own: Any = {torch.ops.aten.convolution_backward: _convolution_backward}
    # No PyTorch counts every fused attention (2.10 to 2.14 miss the CPU's): its plain form is matrix products.
    plain = sdpa_kernel(SDPBackend.MATH)
    with _unrecorded(), use_backend("reference"), plain, FlopCounterMode(display=False, custom_mapping=own) as counter:
        run()
    return float(counter.get_total_flops()) / 2e9


def _convolution_backward(
    gradient: Sequence[int], images: Sequence[int], weight: Sequence[int], *rest: Any, **_: Any
) -> int:
    """Return the FLOPs of a convolution's gradients: as many as forward for the input's, and for the weight's."""
    mask = rest[-1]
    transposed = rest[4]
    places = math.prod((images if transposed else gradient)[2:])
    return (int(mask[0]) + int(mask[1])) * 2 * images[0] * places * math.prod(weight)


@contextmanager
def _unrecorded() -> Iterator[None]:
    """Train clustering networks without a recorded CUDA graph, whose replays nobody can count."""
    kept, _training.WARM_UP = _training.WARM_UP, sys.maxsize
    try:
        yield
    finally:
        _training.WARM_UP = kept


def to_map(entry: Entry, images: Tensor) -> Tensor:
    """Return the maps (B, 1, H, W) of each photo's likeliest class in [0, 1], at the size of the images."""
    maps, _ = entry.see(images, None)
    with torch.inference_mode():
        return ops.upsample_normalize(maps.detach().float(), (images.shape[2], images.shape[3]))


def to_box(entry: Entry, images: Tensor) -> Tensor:
    """Return the box (n, 4) of the largest component of each map, on the host."""
    maps = to_map(entry, images)
    with torch.inference_mode():
        return ops.component_boxes(maps, BOX_AT, largest=True).to("cpu").boxes


def measured(entry: Entry, sets: Sequence[Tensor]) -> dict[str, float | None]:
    """Return gmacs a photo, weights_mib, extra_mib (what a call holds beyond them and its result) and peak_mib, both.

    Memory is of the first batch; see :func:`molt.benchmark.timing.extra_bytes`.
    """
    device = sets[0].device
    found: dict[str, float | None] = {"gmacs": gmacs(partial(to_map, entry, sets[0][:1]))}
    to_map(entry, sets[0])  # what libraries set up the first time
    timing.release(device)
    extra = timing.extra_bytes(partial(to_map, entry, sets[0]), device)
    held = _bytes(entry.networks)
    found["weights_mib"] = held / 2**20
    found["extra_mib"] = None if extra is None else extra / 2**20
    found["peak_mib"] = None if extra is None else (held + extra) / 2**20
    return found


def times(
    ready: Mapping[str, tuple[Entry, Sequence[Tensor]]], device: torch.device, batch: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Return the columns on time by name, ms a photo, and how often each was read; all take turns.

    Args:
        ready: methods and their batches of photos.
        device: that all run on.
        batch: photos of a batch.
        seconds: for each function, see :func:`molt.benchmark.timing.measure`.
    """
    timing.release(device)
    runs: dict[str, timing.Run] = {}
    for name, (entry, sets) in ready.items():
        for kind, call in (("map", to_map), ("box", to_box)):
            runs[f"{kind} {name}"] = partial(_turn, call, entry, sets)
    found: dict[str, dict[str, Any]] = {name: {} for name in ready}
    for key, taken in _readings(runs, device, seconds).items():
        kind, _, name = key.partition(" ")
        prefix = "" if kind == "map" else "box_"
        for column, share in (("ms", 0.5), ("p20_ms", 0.2), ("p80_ms", 0.8)):
            found[name][prefix + column] = timing.quantile(taken, share) / batch
        if kind == "map":
            found[name]["runs"] = len(taken)
    return found


def _turn(call: Callable[[Entry, Tensor], Tensor], entry: Entry, sets: Sequence[Tensor], turn: int) -> Tensor:
    return call(entry, sets[turn % len(sets)])


def _readings(runs: Mapping[str, timing.Run], device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Return milliseconds by name; what is too slow for more than one reading at a time is read again."""
    clock = timing.make_clock(device)
    found: dict[str, list[float]] = {name: [] for name in runs}
    few = dict(runs)
    while few:
        for name, taken in timing.measure(few, clock, seconds).items():
            found[name] += taken
        few = {name: run for name, run in few.items() if len(found[name]) < LEAST_READINGS}
    return found


def _bytes(networks: Sequence[nn.Module]) -> int:
    held = {id(t): t for network in networks for t in itertools.chain(network.parameters(), network.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in held.values())


def batches(data: LocalizationSet, size: tuple[int, int], batch: int, device: str) -> list[Tensor]:
    """Return ``SETS`` batches (batch, 3, H, W) of a set's photos on a device, repeated where there are too few.

    Raises:
        ValueError: none of the photos can be read.
    """
    pixels: list[Tensor] = []
    for sample in data.samples:
        if len(pixels) == SETS * batch:
            break
        try:
            pixels.append(read_photo(sample.path, size).pixels)
        except (PhotoError, OSError):
            continue  # scoring lists it
    if not pixels:
        raise ValueError(f"data: none of {count(len(data), 'photo')} of {data.name!r} can be read")
    endless = itertools.cycle(pixels)
    return [torch.stack(list(itertools.islice(endless, batch))).to(device) for _ in range(SETS)]
