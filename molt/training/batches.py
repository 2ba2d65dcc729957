"""Photos in a fixed order, in batches that several processes share and a stopped training takes up again."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from molt._arguments import LARGEST_SEED, check_int
from molt.data.annotations import Sample
from molt.data.images import PhotoError
from molt.ops._checks import check_size
from molt.training.augment import Augmentation, find_augmentation, stable_generator, view

PREFETCH = 2  # micro-batches that each worker reads ahead

Work = tuple[int, tuple[int, ...]]  # epoch and indices of a micro-batch


@dataclass(frozen=True)
class Order:
    """The order of a set's photos in each epoch, decided by seed and epoch alone.

    Attributes:
        count: of photos, at least 0.
        seed: from 0, or None for the order of the set.
    """

    count: int
    seed: int | None = 0

    def __post_init__(self) -> None:
        check_int("count", self.count, 0)
        if self.seed is not None:
            check_int("seed", self.seed, 0, LARGEST_SEED)

    def epoch(self, epoch: int) -> Tensor:
        """Return a permutation (count,) int64 of 0..count-1."""
        check_int("epoch", epoch, 0)
        if self.seed is None:
            return torch.arange(self.count)
        return torch.randperm(self.count, generator=stable_generator("order", self.seed, epoch))


@dataclass(frozen=True, eq=False)
class Batch:
    """A micro-batch: photos that go through the network at once.

    Attributes:
        pixels: (b, 3, H, W) float32 RGB in [0, 1]; b is 0 where no photo could be read.
        labels: (b,) int64.
        indices: (b,) int64, places in the set.
        bad: place in the set and message of the photos that could not be read, which are missing above.
    """

    pixels: Tensor
    labels: Tensor
    indices: Tensor
    bad: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Photos:
    """A set's photos and how they are looked at.

    Attributes:
        samples: with ``path`` and ``label``.
        size: (H, W) of the views in pixels.
        augmentation: an :class:`Augmentation`, its settings, or the name of a preset.
        seed: of views and order, from 0.
    """

    samples: Sequence[Sample]
    size: tuple[int, int]
    augmentation: Any = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", check_size(self.size))
        object.__setattr__(self, "augmentation", find_augmentation(self.augmentation))
        check_int("seed", self.seed, 0, LARGEST_SEED)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def order(self) -> Order:
        """The order of training."""
        return Order(len(self.samples), self.seed)

    def read(self, indices: Sequence[int], epoch: int = 0) -> Batch:
        """Return the photos at these places, as they are seen in an epoch."""
        augmentation: Augmentation = self.augmentation
        pixels, kept, bad = [], [], []
        for index in indices:
            try:
                path = self.samples[index].path
                pixels.append(view(path, self.size, augmentation, seed=self.seed, epoch=epoch, index=index))
                kept.append(index)
            except PhotoError as error:
                bad.append((index, str(error)))
        stacked = torch.stack(pixels) if pixels else torch.empty(0, 3, *self.size)
        labels = torch.tensor([self.samples[index].label for index in kept], dtype=torch.int64)
        return Batch(stacked, labels, torch.tensor(kept, dtype=torch.int64), tuple(bad))


def count_batches(count: int, batch: int) -> int:
    """Return how many global batches an epoch of ``count`` photos has; the last may be smaller."""
    return -(-count // batch)


def share_of(batch: Tensor, rank: int, world: int) -> Tensor:
    """Return the contiguous part of a global batch that process ``rank`` of ``world`` reads; it may be empty."""
    return batch[len(batch) * rank // world : len(batch) * (rank + 1) // world]


class BatchLoader:
    """Reads this process's part of each global batch, ahead of time where there are workers.

    A global batch is a slice of the epoch's order, the last one as long as what is left. Each process reads its
    contiguous share of it, which may be empty, so that all see equally many global batches and together every photo
    once, however many they are. What is read does not depend on workers, and PyTorch's global generator is not touched.
    Workers are kept from one epoch to the next, until :meth:`close` or the end of a ``with`` block.

    Args:
        photos: what to read.
        batch: photos in a global batch, at least 1.
        micro: most photos in a micro-batch, at least 1.
        rank: of this process, in 0..world-1.
        world: number of processes, at least 1.
        workers: processes that read photos, 0 to read them here.
        shuffle: False takes the order of the set in every epoch.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.
    """

    def __init__(
        self,
        photos: Photos,
        *,
        batch: int,
        micro: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        shuffle: bool = True,
    ) -> None:
        if not isinstance(photos, Photos):
            raise TypeError(f"photos must be Photos, got {type(photos).__name__}")
        self.photos = photos
        self.batch = check_int("batch", batch, 1)
        self.micro = check_int("micro", micro, 1)
        self.world = check_int("world", world, 1)
        self.rank = check_int("rank", rank, 0, world - 1)
        self.workers = check_int("workers", workers, 0)
        self.order = photos.order if shuffle else Order(len(photos), None)
        self._plan = _Plan()
        self._loader: DataLoader | None = None
        self._turn = 0

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; another epoch starts new ones."""
        loader, self._loader = self._loader, None
        # Left to the garbage collector, workers that met an error are waited for in vain, 5 s each.
        end = getattr(getattr(loader, "_iterator", None), "_shutdown_workers", None)
        if end is not None:
            end()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """Yield the micro-batches of this process, a list for each global batch from number ``start`` on.

        One epoch at a time: another one ends what is left of this.

        Raises:
            TypeError, ValueError: an argument of another type, or start beyond the epoch's number of batches.
            RuntimeError: a worker died.
        """
        check_int("epoch", epoch, 0)
        check_int("start", start, 0, count_batches(len(self.photos), self.batch))
        cut = self._works(epoch, start)
        found = self._read([work for works in cut for work in works])
        return (list(itertools.islice(found, len(works))) for works in cut)

    def _works(self, epoch: int, start: int) -> list[list[Work]]:
        """Return what this process reads, a list of micro-batches for each global batch."""
        order = self.order.epoch(epoch)
        cut = []
        for first in range(start * self.batch, len(order), self.batch):
            share = share_of(order[first : first + self.batch], self.rank, self.world).tolist()
            cut.append([(epoch, tuple(share[i : i + self.micro])) for i in range(0, len(share), self.micro)])
        return cut

    def _read(self, works: list[Work]) -> Iterator[Batch]:
        self._turn += 1
        turn = self._turn
        found: Iterator[Batch] | None = None
        for _ in works:
            if turn != self._turn:
                raise RuntimeError("another epoch of this loader was begun, which ended this one")
            try:
                if found is None:
                    if self._loader is None:
                        self._loader = self._start()
                    self._plan.works = works
                    found = iter(self._loader)
                batch = next(found)
            except Exception as error:
                self.close()
                if not isinstance(error, RuntimeError) or not str(error).startswith("DataLoader worker"):
                    raise
                raise RuntimeError(
                    f"a process that reads photos died, for want of memory or because it was killed: fewer workers "
                    f"than {self.workers} need less memory, and 0 reads the photos in this process ({error})"
                ) from error
            yield batch

    def _start(self) -> DataLoader:
        return DataLoader(
            _Reader(self.photos),
            batch_size=None,
            sampler=self._plan,
            collate_fn=_as_it_is,
            num_workers=self.workers,
            prefetch_factor=PREFETCH if self.workers else None,
            persistent_workers=self.workers > 0,
            generator=torch.Generator(),  # or a number for the workers is drawn from the global one
        )


class _Plan(Sampler[Work]):
    """What is read next; it changes from epoch to epoch, while the workers stay."""

    def __init__(self) -> None:
        self.works: list[Work] = []

    def __iter__(self) -> Iterator[Work]:
        return iter(self.works)

    def __len__(self) -> int:
        return len(self.works)


class _Reader(Dataset[Batch]):
    """Micro-batches by epoch and indices, for the workers."""

    def __init__(self, photos: Photos) -> None:
        self.photos = photos

    def __getitem__(self, work: Work) -> Batch:
        epoch, indices = work
        return self.photos.read(indices, epoch)


def _as_it_is(batch: Any) -> Any:
    return batch


__all__ = ["Batch", "BatchLoader", "Order", "Photos", "count_batches", "share_of"]
