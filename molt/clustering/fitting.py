"""One clustering network for many photos: trained once on a folder, then a forward pass a photo."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from molt import ops
from molt._arguments import LARGEST_SEED, check_device, check_int
from molt._files import check_readable_later, save_tensors, user_path
from molt._words import count
from molt.clustering._labels import shrink
from molt.clustering._network import LEARNING_RATE, MOMENTUM, respond_shared
from molt.clustering.deep import MOST_CHANNELS, MOST_LAYERS, PRESETS, random_state
from molt.clustering.slic import segment
from molt.data.images import PhotoError, find_photos, read_photo

FORMAT = 1
SIDE = 448  # a photo is squashed to this square before the working size, as the localizer's photos are
COMPACTNESS = PRESETS["fast"].compactness
MOST_KEPT_BYTES = 2**29  # of photos in memory, 125 kB each at the preset's size; of a larger folder some are read again
MOST_BYTES = 256 * 2**20  # of a checkpoint: the largest network allowed takes less


@dataclass(frozen=True, eq=False)
class Network:
    """A trained clustering network.

    Attributes:
        state: weight, bias, scale and shift of each layer, float32 on the CPU.
        channels: its width.
        layers: its 3x3 convolutions.
        working_size: longest side in pixels of the images it was trained on, None for their own size.
        digest: a hash of all of it.
    """

    state: tuple[Tensor, ...]
    channels: int
    layers: int
    working_size: int | None
    digest: str


@dataclass(frozen=True)
class Fit:
    """How a fit went: steps taken, photos used, errors of those that could not be read, mean loss of the last steps."""

    steps: int
    photos: int
    errors: tuple[PhotoError, ...]
    loss: float


def fit(
    photos: str | Path | Sequence[Any],
    out: str | Path,
    *,
    steps: int = 400,
    batch_size: int = 8,
    channels: int | None = None,
    layers: int | None = None,
    num_segments: int | None = None,
    working_size: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Fit:
    """Train one clustering network on many photos and write it, for ``DeepClustering(preset="amortised")``.

    As deep clustering of a single photo (Kanezaki, ICASSP 2018), with weights that all photos share and batch
    normalization by each photo's own statistics, which keeps every photo's labels apart (our choice). No labels are
    used. Photos that cannot be read are skipped and reported.

    Args:
        photos: a folder, searched recursively, or a list of paths, PIL images, arrays or tensors.
        out: safetensors file to write, atomically, at the end.
        steps: gradient steps, at least 1.
        batch_size: photos a step, at least 1.
        channels: of the network, and most labels of a photo; None takes the preset's, as for layers and working_size.
        layers: 3x3 convolutions.
        num_segments: superpixels that vote; None takes those of ``fast``.
        working_size: longest side in pixels of what the network sees.
        seed: of the initial state and of the order of photos.
        device: where to train; None takes a GPU where there is one.
        on_step: called with the step, from 0, and its loss.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.
        PhotoError: no photo that can be read (a ValueError).
        FileNotFoundError: no such folder.
        OSError: the file cannot be written; a folder in its place is told before the first step.
    """
    base, amortised = PRESETS["fast"], PRESETS["amortised"]
    steps = check_int("steps", steps, 1)
    batch_size = check_int("batch_size", batch_size, 1)
    channels = check_int("channels", amortised.channels if channels is None else channels, 2, MOST_CHANNELS)
    layers = check_int("layers", amortised.layers if layers is None else layers, 1, MOST_LAYERS)
    device = check_device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    out = check_readable_later(user_path(out))
    if out.is_dir():
        raise IsADirectoryError(f"out: {out} is a folder, expected a file to write")
    out.parent.mkdir(parents=True, exist_ok=True)
    wanted = check_int("num_segments", base.num_segments if num_segments is None else num_segments, 1)
    side = check_int("working_size", amortised.working_size if working_size is None else working_size, 2)
    seed = check_int("seed", seed, 0, LARGEST_SEED)
    sources = _sources(photos)
    generator = torch.Generator().manual_seed(seed)
    state = [value.to(device).requires_grad_() for value in random_state(channels, layers, generator, 3)]
    optimiser = torch.optim.SGD(state, lr=LEARNING_RATE, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    shown = _Photos(sources, side, wanted, generator)
    losses: list[float] = []
    for number in range(steps):
        images, segments = (part.to(device) for part in shown.batch(batch_size))
        responses = respond_shared(images, state)
        labels = ops.cluster_vote(responses.detach().argmax(1), segments, channels, int(segments.max()) + 1)
        loss = F.cross_entropy(responses, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if on_step is not None:
            on_step(number, losses[-1])
    save_network(out, [value.detach().cpu() for value in state], side)
    last = losses[-max(1, steps // 10) :]
    errors = tuple(shown.errors[i] for i in sorted(shown.errors))
    return Fit(steps, len(shown.used), errors, sum(last) / len(last))


def save_network(path: str | Path, state: Sequence[Tensor], working_size: int | None) -> None:
    """Write a network's state as safetensors, atomically; OSError where that cannot be done."""
    header = {"format": FORMAT, "working_size": working_size}
    tensors = {f"{i:03d}": value.contiguous() for i, value in enumerate(state)}
    save_tensors(user_path(path), tensors, {"molt_clusters": json.dumps(header)})


def load_network(path: str | Path) -> Network:
    """Read a network that :func:`fit` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or one whose tensors do not fit together; the message says what.
    """
    path = user_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist or is not a file")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"checkpoint {path} is larger than {MOST_BYTES} bytes, no clustering network is")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("molt_clusters", "null"))
            tensors = {key: file.get_tensor(key) for key in sorted(file.keys())}
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint {path} is not a safetensors file of molt: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"checkpoint {path} holds no clustering network: molt.clustering.fit(FOLDER, FILE) writes one")
    state = list(tensors.values())
    size = header.get("working_size")
    try:
        if size is not None:
            check_int("working_size", size, 1)
        channels, layers = _shape(state)
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {path} does not hold together: {error}") from error
    content = b"".join(value.numpy().tobytes() for value in state) + json.dumps(header, sort_keys=True).encode()
    return Network(tuple(state), channels, layers, size, hashlib.blake2b(content, digest_size=16).hexdigest())


def _shape(state: Sequence[Tensor]) -> tuple[int, int]:
    """Return channels and layers of a state whose tensors fit together."""
    if len(state) < 8 or len(state) % 4:
        raise ValueError(f"it has {count(len(state), 'tensor')}, expected four a layer and two layers or more")
    if any(value.dtype != torch.float32 or not bool(value.isfinite().all()) for value in state):
        raise ValueError("expected finite float32 values")
    channels, layers = len(state[1]) if state[1].ndim == 1 else 0, len(state) // 4 - 1
    check_int("channels", channels, 2, MOST_CHANNELS)
    check_int("layers", layers, 1, MOST_LAYERS)
    for found, expected in zip(state, random_state(channels, layers, torch.Generator(), 3), strict=True):
        if found.shape != expected.shape:
            raise ValueError(f"it has {tuple(found.shape)} where {tuple(expected.shape)} is expected")
    return channels, layers


def _size(held: tuple[Tensor, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in held)


def _sources(photos: str | Path | Sequence[Any]) -> list[Any]:
    if isinstance(photos, str | Path):
        if not user_path(photos).is_dir():
            raise FileNotFoundError(f"photos: {photos} is no folder")
        found = find_photos(photos)[0]
        if not found:
            raise PhotoError(f"photos: no photo in {photos}")
        return list(found)
    if not isinstance(photos, Sequence):
        raise TypeError(f"photos must be a folder or a list of photos, got {type(photos).__name__}")
    listed = list(photos)
    if not listed:
        raise ValueError("photos: got an empty list, expected at least one photo")
    return listed


def _order(number: int, generator: torch.Generator) -> Iterator[int]:
    """Yield photos without end, each once a round."""
    while True:
        yield from torch.randperm(number, generator=generator).tolist()


class _Photos:
    """Photos and their superpixels, read as they are needed; those read last are kept.

    Attributes:
        used: places in the list of photos that could be read.
        errors: of those that could not, by place.
    """

    def __init__(self, sources: list[Any], side: int, num_segments: int, generator: torch.Generator) -> None:
        self.sources, self.side, self.num_segments = sources, side, num_segments
        self.used: set[int] = set()
        self.errors: dict[int, PhotoError] = {}
        self._kept: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()
        self._bytes = 0
        self._order = _order(len(sources), generator)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Return pixels (B, 3, h, w) and superpixels (B, h, w) of the next photos that can be read."""
        found: list[tuple[Tensor, Tensor]] = []
        while len(found) < size:
            index = next(self._order)
            if index not in self.errors:
                try:
                    found.append(self._read(index))
                    self.used.add(index)
                except (PhotoError, OSError, TypeError) as error:
                    # Its text alone: a traceback would keep what was decoded of the photo.
                    self.errors[index] = PhotoError(f"photo {index}: {error}" if self._nameless(index) else str(error))
            if len(self.errors) == len(self.sources):
                raise PhotoError(f"photos: none of {len(self.sources)} can be read: {self.errors[index]}")
        pixels, segments = zip(*found, strict=True)
        return torch.stack(pixels).float(), torch.stack(segments)

    def _nameless(self, index: int) -> bool:
        return not isinstance(self.sources[index], str | Path)

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        held = self._kept.pop(index, None)
        if held is not None:
            self._bytes -= _size(held)
        else:
            pixels = shrink(read_photo(self.sources[index], SIDE).pixels[None], self.side)
            held = pixels[0].half(), segment(pixels, self.num_segments, COMPACTNESS)[0].to(torch.int32)
        self._kept[index] = held
        self._bytes += _size(held)
        while self._bytes > MOST_KEPT_BYTES:
            self._bytes -= _size(self._kept.popitem(last=False)[1])
        return held
