"""Clusters from a small network trained on one image at a time, without labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from molt import ops
from molt._arguments import LARGEST_SEED, check_int, check_number
from molt.clustering._labels import compact, in_chunks, nearest, prepare, shrink
from molt.clustering._network import respond_shared
from molt.clustering._training import Job, train
from molt.clustering.slic import segment
from molt.ops._checks import FLOATS, LABELS, check_tensor
from molt.ops.kmeans import MAX_CLUSTERS
from molt.structures import Features

LEAST_PIXELS = 2  # batch normalization over one pixel is undefined
MOST_CHANNELS, MOST_LAYERS, MOST_STARTS = 1024, 16, 64
FITTED = 4096  # pixels an image, on a regular grid, that merging clusters; all are then assigned
DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Preset:
    """Settings that go together; see :class:`DeepClustering` for their meaning."""

    channels: int
    layers: int
    steps: int
    min_labels: int
    num_segments: int
    continuity: float
    compactness: float
    working_size: int | None
    starts: int
    merged: int


PRESETS = {
    "published": Preset(100, 2, 1000, 3, 10000, 0.0, 100.0, None, 1, 0),
    "fast": Preset(32, 2, 5, 3, 800, 0.0, 100.0, 112, 4, 32),
    "amortised": Preset(32, 2, 0, 3, 0, 0.0, 100.0, 112, 1, 0),
}


class DeepClustering:
    """A convolutional network per image learns to agree with its own labels, until few are left.

    Each step takes the strongest channel of each pixel as its label and trains the network to answer with it. Two
    published forms, which may be combined: superpixels that vote for one label (Kanezaki, ICASSP 2018: the default),
    and a loss on differences between neighbouring responses (Kim, Kanezaki and Tanaka, TIP 2020: ``num_segments=0,
    continuity=1``). Which of these the MOLT paper used is not known. Network, optimiser (SGD, 0.1, momentum 0.9) and
    stopping rule are those papers'.

    Presets, of which any value can be overridden by an argument of its name:

    - ``"published"``: the published size, 100 channels, up to 1000 steps, 10000 superpixels, at the image's own size.
      Minutes a photo on a CPU.
    - ``"fast"``, the default: smaller input and network, few steps, and four networks whose answers are merged, which
      makes labels depend less on the seed; chosen on a curve of quality against time (our choice; docs/method.md has
      the curve).
    - ``"amortised"``: one network, trained once on many photos by :func:`molt.clustering.fit`, then a forward pass a
      photo. Needs ``checkpoint``, whose size and input it takes.

    Each image has its own network, whose initial state depends on the seed only, and images are worked on in passes
    of one size, so that a photo's labels do not depend on its batch. Training amplifies rounding, though: where
    kernels add in another order, which is so for another number of CPU threads and on a GPU for passes of 2 instead
    of 8 photos, pixels here and there end in another cluster.
    Labels are decided at the output's own pixels, from responses upsampled bilinearly.

    Args:
        preset: ``"published"``, ``"fast"`` or ``"amortised"``.
        channels: width of the network and most labels an image can have, 2 to 1024.
        layers: 3x3 convolutions, 1 to 16; a 1x1 convolution follows.
        steps: most gradient steps, at least 0.
        min_labels: training stops once an image has this few labels, at least 1.
        num_segments: superpixels wanted for the vote; 0 does without.
        continuity: weight of the loss on neighbouring differences, at least 0; 0 does without.
        seed: integer seed of the initial state.
        compactness: of the superpixels, above 0; high makes them nearly square.
        working_size: longest side in pixels at which images are clustered; None takes their own size.
        starts: networks an image, 1 to 64, each from a random state of its own.
        merged: clusters that k-means makes of the pixels by the responses of all the image's networks, 1 to 256; 0
            takes the strongest channel instead, as published, and needs ``starts=1``.
        checkpoint: file that :func:`molt.clustering.fit` wrote, whose network is the initial state; with steps above 0
            it is trained on.
        dtype: of the convolutions, ``torch.float32`` or ``torch.bfloat16``; None takes bfloat16 on a GPU.

    Raises:
        TypeError, ValueError: an argument of another type, unknown or out of range, or a checkpoint that does not fit.
        FileNotFoundError: no such checkpoint.
    """

    takes_features = False  # it takes them, but was made for pixels

    def __init__(
        self,
        preset: str = "fast",
        *,
        channels: int | None = None,
        layers: int | None = None,
        steps: int | None = None,
        min_labels: int | None = None,
        num_segments: int | None = None,
        continuity: float | None = None,
        seed: int = 0,
        compactness: float | None = None,
        working_size: int | Literal["preset"] | None = "preset",
        starts: int | None = None,
        merged: int | None = None,
        checkpoint: str | Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        base = asdict(PRESETS[preset])
        self.preset = preset
        self.checkpoint = None
        if checkpoint is not None:
            from molt.clustering.fitting import load_network

            self.checkpoint = load_network(checkpoint)
            base |= {"channels": self.checkpoint.channels, "layers": self.checkpoint.layers}
            base["working_size"] = self.checkpoint.working_size
            for name, value in (("channels", channels), ("layers", layers)):
                if value is not None and value != base[name]:
                    raise ValueError(f"{name} must be {base[name]}, as checkpoint {checkpoint} has, got {value}")
        elif preset == "amortised":
            raise ValueError(
                "preset 'amortised' needs checkpoint=FILE, a network trained once on photos: "
                "molt.clustering.fit(FOLDER, FILE) or `molt fit-clusters FOLDER --out FILE` makes one"
            )

        def chosen(name: str, value: Any) -> Any:
            return base[name] if value is None else value

        self.channels = check_int("channels", chosen("channels", channels), 2, MOST_CHANNELS)
        self.layers = check_int("layers", chosen("layers", layers), 1, MOST_LAYERS)
        self.steps = check_int("steps", chosen("steps", steps), 0)
        self.min_labels = check_int("min_labels", chosen("min_labels", min_labels), 1)
        self.num_segments = check_int("num_segments", chosen("num_segments", num_segments), 0)
        self.continuity = check_number("continuity", chosen("continuity", continuity))
        self.seed = check_int("seed", seed, 0, LARGEST_SEED)
        self.compactness = check_number("compactness", chosen("compactness", compactness), above=0)
        size = base["working_size"] if working_size == "preset" else working_size
        self.working_size = None if size is None else check_int("working_size", size, 1)
        self.starts = check_int("starts", chosen("starts", starts), 1, MOST_STARTS)
        self.merged = check_int("merged", chosen("merged", merged), 0, MAX_CLUSTERS)
        if self.starts > 1 and not self.merged:
            raise ValueError(f"merged must be at least 1 where there are {self.starts} starts, got 0")
        if self.checkpoint is not None and self.starts > 1:
            raise ValueError(
                f"starts must be 1 where a checkpoint is the initial state, got {self.starts} (preset {preset!r}); "
                "preset 'amortised' takes the checkpoint's network as it is"
            )
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype must be torch.float32, torch.bfloat16 or None, got {dtype}")
        self.dtype = dtype

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"DeepClustering({self.preset!r}, {given})"

    @property
    def num_clusters(self) -> int:
        """Above every label."""
        return self.merged or self.channels

    @property
    def settings(self) -> dict[str, int | float | str | None]:
        """All that labels depend on besides the image."""
        names = (*PRESETS["fast"].__dataclass_fields__, "seed")
        settings = {name: getattr(self, name) for name in names}
        settings["checkpoint"] = None if self.checkpoint is None else self.checkpoint.digest
        settings["dtype"] = None if self.dtype is None else str(self.dtype)
        return settings

    def __call__(self, x: Tensor | Features, size: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return labels (B, H, W) int32 in 0..count-1 and counts (B,) int64.

        Args:
            x: images (B, 3, H, W) RGB float in [0, 1]; or Features, whose patch directions then take the place of
                colours, on their own grid (our choice).
            size: (H, W) of the labels; by default the images' own.

        Raises:
            TypeError, ValueError: images of another type or shape, or with NaN or infinite values (on a GPU only told
                where superpixels are made); Features where there is a checkpoint, whose network sees colours.
        """
        values, target = prepare(x, size)
        if self.checkpoint is not None and isinstance(x, Features):
            raise ValueError("x: got Features, expected images (B, 3, H, W), which the checkpoint was trained on")

        def run(chunk: Tensor) -> tuple[Tensor, Tensor]:
            small = chunk if isinstance(x, Features) else shrink(chunk, self.working_size)
            responses = self._train(small, lab=not isinstance(x, Features))
            affinity = self._merge(responses) if self.merged else responses
            present = torch.zeros(affinity.shape[:2], dtype=torch.bool, device=chunk.device)
            present.scatter_(1, affinity.argmax(1).flatten(1), True)
            return compact(nearest(affinity, target, present), self.num_clusters)

        return in_chunks(run, values, target)

    def _merge(self, responses: Tensor) -> Tensor:
        """Return the affinity (B, merged, h, w) of each pixel to k-means clusters of the networks' responses.

        Responses of a network are scaled to unit length at each pixel, so that all networks count alike.
        """
        directions = F.normalize(responses.unflatten(1, (self.starts, -1)), dim=2).flatten(1, 2)
        step = math.ceil(math.sqrt(directions[0, 0].numel() / FITTED))
        fitted = directions[..., ::step, ::step].flatten(2).transpose(1, 2).contiguous()
        centres = ops.kmeans(fitted, self.merged, metric="cosine", iterations=15, seed=self.seed).centres
        return (centres @ directions.flatten(2)).view(len(responses), -1, *responses.shape[2:])

    def initial_states(self, in_channels: int = 3) -> list[list[Tensor]]:
        """Return the initial parameters of an image's networks, on the CPU, as PyTorch initialises such layers.

        A convolution's weight and bias, then its batch normalization's weight and bias, layer by layer. With a
        checkpoint these are its own.
        """
        if self.checkpoint is not None:
            return [list(self.checkpoint.state)]
        generator = torch.Generator().manual_seed(self.seed)
        return [random_state(self.channels, self.layers, generator, in_channels) for _ in range(self.starts)]

    def train(self, images: Tensor, segments: Tensor | None = None) -> Tensor:
        """Return the responses (B, starts * channels, H, W) of each image's networks after training, at its own size.

        Args:
            images: (B, D, H, W) float, finite, worked on together.
            segments: (B, H, W) integers from 0, superpixels that vote, or None.

        Raises:
            TypeError, ValueError: tensors of another dtype or shape.
        """
        check_tensor("images", images, FLOATS, "(B, D, H, W)")
        if segments is not None:
            check_tensor("segments", segments, LABELS, "(B, H, W)")
            if segments.shape != images[:, 0].shape:
                expected = tuple(images[:, 0].shape)
                raise ValueError(f"segments: got shape {tuple(segments.shape)}, expected {expected} as images have")
        if len(images) == 0 or images.shape[2] * images.shape[3] < LEAST_PIXELS:
            return images.new_zeros(len(images), self.starts * self.channels, *images.shape[2:], dtype=torch.float32)
        dtype = self.dtype or (torch.bfloat16 if images.device.type == "cuda" else torch.float32)
        job = Job(self.steps, self.min_labels, self.continuity, dtype)
        # inference_mode's tensors take no gradient, so those that enter the graph are made anew outside it.
        with torch.inference_mode(False), torch.autocast(images.device.type, enabled=False):
            pixels = images.detach().float().clone()
            votes = None if segments is None else segments.clone()
            limit = None if votes is None else int(votes.max()) + 1
            if self.checkpoint is not None and self.steps == 0 and images.device.type != "cpu":
                state = [value.to(images.device) for value in self.checkpoint.state]
                return respond_shared(pixels.to(dtype), state).float()
            return train(pixels, votes, limit, self.initial_states(images.shape[1]), job)

    def _train(self, images: Tensor, *, lab: bool) -> Tensor:
        """:meth:`train` with the images' own superpixels."""
        if self.num_segments == 0 or self.steps == 0:
            return self.train(images)
        return self.train(images, segment(images, self.num_segments, self.compactness, lab=lab))


def random_state(channels: int, layers: int, generator: torch.Generator, in_channels: int) -> list[Tensor]:
    """Return a network's initial parameters: uniform within 1 / sqrt(fan-in), as PyTorch's layers have it."""
    state = []
    widths = [in_channels, *[channels] * (layers + 1)]
    kernels = [3] * layers + [1]
    for wide, out, kernel in zip(widths[:-1], widths[1:], kernels, strict=True):
        bound = 1 / math.sqrt(wide * kernel * kernel)
        for shape in ((out, wide, kernel, kernel), (out,)):
            state.append((2 * torch.rand(shape, generator=generator) - 1) * bound)
        state += [torch.ones(out), torch.zeros(out)]
    return state
