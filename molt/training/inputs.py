"""What goes through the network in a step: photos as they are read, or features that were kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from molt.backbones.spatial import spatial_map
from molt.methods.molt import MOLT
from molt.training.augment import find_augmentation, stable_generator
from molt.training.batches import BatchLoader, Order, Photos, share_of
from molt.training.checkpoints import TrainingError
from molt.training.features import FeatureStore
from molt.training.recipe import Recipe
from molt.training.setup import LabelledPhotos, networks

Outputs = tuple[list[Tensor], list[Tensor] | None]


@dataclass(frozen=True, eq=False)
class Inputs:
    """One forward pass: pixels (b, 3, H, W) or features a scale, labels (b,), and photos in the whole batch."""

    values: Tensor | list[Tensor]
    labels: Tensor
    total: int


class LivePhotos:
    """Photos, read and augmented anew in every epoch: this process's part of each batch.

    Attributes:
        net: from ``Inputs.values`` to logits (b, num_classes) a scale, and maps of spatial tokens or None.
    """

    def __init__(
        self,
        model: MOLT,
        photos: LabelledPhotos,
        recipe: Recipe,
        accelerator: Accelerator,
        seed: int,
        micro: int | None,
        workers: int,
        note_bad: Callable[[int, str], None],
    ) -> None:
        self.photos = photos
        self.note_bad = note_bad
        self.net = _Whole(model)

        def loader(places: Sequence[int], augment: str, *, shuffle: bool) -> BatchLoader:
            return BatchLoader(
                Photos([photos.samples[i] for i in places], model.finest, augment, seed),
                batch=recipe.batch,
                micro=micro or recipe.batch,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                workers=workers,
                shuffle=shuffle,
            )

        self.loaders = loader(photos.train, recipe.augment, shuffle=True), loader(photos.held, "none", shuffle=False)
        self.finest = model.finest

    def train(self, epoch: int, start: int) -> Iterator[list[Inputs]]:
        """Yield the batches of an epoch from ``start`` on, each in forward passes, perhaps none."""
        return self._batches(self.loaders[0], self.photos.train, epoch, start)

    def held(self) -> Iterator[list[Inputs]]:
        """Yield the photos held out, as they are."""
        return self._batches(self.loaders[1], self.photos.held, 0, 0)

    def nothing(self) -> Tensor:
        """Return one black photo, which is to count for nothing."""
        return torch.zeros(1, 3, *self.finest)

    def _batches(self, loader: BatchLoader, places: Sequence[int], epoch: int, start: int) -> Iterator[list[Inputs]]:
        for number, passes in enumerate(loader.epoch(epoch, start), start):
            for part in passes:
                for index, message in part.bad:
                    self.note_bad(places[index], message)
            total = min(loader.batch, len(places) - number * loader.batch)
            yield [Inputs(part.pixels, part.labels, total) for part in passes if len(part)]


class KeptFeatures:
    """Features of frozen backbones, computed once a photo and view; otherwise as :class:`LivePhotos`."""

    def __init__(
        self,
        model: MOLT,
        photos: LabelledPhotos,
        recipe: Recipe,
        accelerator: Accelerator,
        seed: int,
        micro: int | None,
        workers: int,
        folder: Path,
    ) -> None:
        self.model, self.photos, self.recipe, self.seed, self.micro = model, photos, recipe, seed, micro
        self.accelerator, self.readers, self.folder = accelerator, workers or None, folder
        self.store = FeatureStore(
            model, folder, photos.samples, recipe.views, find_augmentation(recipe.augment), recipe.precision
        )
        self.net = _Heads(model)

    def fill(self, tell: Callable[[str, dict[str, Any]], None]) -> float:
        """Compute what is missing, each process its share; return the seconds that took."""
        device, store = self.accelerator.device, self.store
        train, held = list(self.photos.train), list(self.photos.held)
        # Shares are cut from one and the same list, whatever another run fills meanwhile.
        (rows,) = broadcast_object_list([sorted({*store.missing(train), *store.missing(held, 1)})])
        began = time.monotonic()
        if rows:
            share = self._share(torch.tensor(rows)).tolist()

            def step(done: int) -> None:
                tell("features", {"done": done, "total": len(share), "bytes": store.bytes})

            step(0)
            batch = self.micro or (64 if device.type == "cuda" else 8)
            store.fill(share, batch=batch, device=device, step=step, readers=self.readers)
        self.accelerator.wait_for_everyone()
        if store.missing(train) or store.missing(held, 1):
            raise TrainingError("cache must be a folder that all processes share: features of others are missing here")
        store.look([*train, *held])
        return time.monotonic() - began

    def train(self, epoch: int, start: int) -> Iterator[list[Inputs]]:
        """Yield the batches of an epoch from ``start`` on; each photo in one of its views."""
        train, size = self.photos.train, self.recipe.batch
        order = Order(len(train), self.seed).epoch(epoch)
        views = torch.randint(self.recipe.views, (len(train),), generator=stable_generator("views", self.seed, epoch))
        for first in range(start * size, len(train), size):
            batch = order[first : first + size]
            yield self._passes([(train[i], int(views[i])) for i in self._share(batch).tolist()], len(batch))

    def held(self) -> Iterator[list[Inputs]]:
        """Yield the photos held out, in their first view."""
        held, size = self.photos.held, self.recipe.batch
        for first in range(0, len(held), size):
            batch = torch.tensor(held[first : first + size])
            yield self._passes([(i, 0) for i in self._share(batch).tolist()], len(batch))

    def nothing(self) -> list[Tensor]:
        """Return zeros, which are to count for nothing."""
        return [torch.zeros(1, self.model.transformer(i).head.weight[0].numel()) for i in range(len(self.store.caches))]

    def _passes(self, chosen: Sequence[tuple[int, int]], total: int) -> list[Inputs]:
        good = [pair for pair in chosen if pair[0] not in self.store.bad]
        size = self.micro or max(1, len(good))
        found = []
        for first in range(0, len(good), size):
            part = good[first : first + size]
            labels = torch.tensor([self.photos.samples[i].label for i, _ in part], dtype=torch.int64)
            found.append(Inputs(self.store.read([i * self.store.views + v for i, v in part]), labels, total))
        return found

    def _share(self, rows: Tensor) -> Tensor:
        return share_of(rows, self.accelerator.process_index, self.accelerator.num_processes)


class _Whole(nn.Module):
    """A MOLT from pixels in [0, 1] to each scale's logits, and maps of spatial tokens."""

    def __init__(self, model: MOLT) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Outputs:
        x = pixels.to(next(self.model.parameters()).dtype)
        seen = [
            self.model.transformer(scale).see(shown, attention=False)
            for scale, shown in enumerate(self.model.pyramid(x))
        ]
        logits = [one.logits for one in seen if one.logits is not None]
        return logits, None if seen[0].masks is None else [spatial_map(one) for one in seen]


class _Heads(nn.Module):
    """A MOLT's heads alone, from kept features to each scale's logits."""

    def __init__(self, model: MOLT) -> None:
        super().__init__()
        self.per_scale = [model.transformer(scale) for scale in range(len(model.config.sizes))]
        self.heads = nn.ModuleList(transformer.head for transformer in networks(model))

    def forward(self, pooled: list[Tensor]) -> Outputs:
        pairs = zip(self.per_scale, pooled, strict=True)
        return [t.classify(p.to(t.head.weight.dtype)) for t, p in pairs], None
