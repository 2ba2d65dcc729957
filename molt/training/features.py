"""What frozen backbones see of each photo, computed once and kept on disk: all that the logits of a head depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor

from molt._files import check_writable
from molt._text import slug
from molt.backbones.weights import cache_dir
from molt.data.annotations import Sample
from molt.data.images import _MAX_PIXELS, PhotoError, _limit
from molt.methods.molt import MOLT, backbone_digest
from molt.methods.transformer import class_attention, pooled_windows
from molt.structures import Features
from molt.training.augment import Augmentation, find_augmentation, view
from molt.training.checkpoints import TrainingError
from molt.training.feature_cache import FeatureCache, photo_identity
from molt.training.run_files import FEATURES

logger = logging.getLogger("molt")

SEED = 0  # of views: runs of any seed share them
PLAIN = find_augmentation("none")
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MOST_READERS = 8
AHEAD = 2  # batches that are read ahead
MOST_HELD = 2**30  # bytes of features in memory

Found = tuple[int, list[int], dict[str, Tensor]]  # a scale, rows, and the values of each array


def shared_folder(samples: Sequence[Sample], out: Path) -> Path:
    """Return where features of these photos are kept for all runs of the user, in ``MOLT_CACHE`` or its usual place.

    Photos of other folders go elsewhere, as names, sizes and times may be the same there; and so do those that formats
    known now and not before can read. Where nothing can be written it is ``out/features``.
    """
    PIL.Image.init()
    places = sorted(os.path.realpath(place) for place in {sample.path.parent for sample in samples})
    digest = hashlib.sha256(json.dumps([places, sorted(PIL.Image.ID)]).encode()).hexdigest()[:12]
    folder = cache_dir() / "features" / f"{slug(Path(os.path.commonpath(places)).name)}-{digest}"
    try:
        check_writable(folder, keep=True)
    except OSError as error:
        logger.warning("features are kept in %s, for this run alone: %s", out / FEATURES, error)
        return out / FEATURES
    return folder


class FeatureStore:
    """Pooled features of photos and their views, one cache on disk a scale.

    Kept for every kind of head and pooling at once, 29 kB a photo, view and scale of a ViT-S: a head is linear in what
    it pools, so that training it takes no more than this.

    Args:
        model: a MOLT whose backbones are frozen and whose heads leave them as they are.
        folder: where caches are kept, one below it for each network, size and list of photos.
        samples: the photos.
        views: of each photo; the first is the photo as it is, the others are augmented.
        augmentation: of these.
        precision: of the forward passes: ``"no"``, ``"bf16"`` or ``"fp16"``.

    Attributes:
        bad: why photos cannot be read, by place in ``samples``.
    """

    def __init__(
        self,
        model: MOLT,
        folder: Path,
        samples: Sequence[Sample],
        views: int,
        augmentation: Augmentation,
        precision: str,
    ) -> None:
        if model.config.head == "spatial":
            raise ValueError("features of head 'spatial' cannot be kept: its token changes what the backbone sees")
        self.model, self.samples, self.views = model, samples, views
        self.augmentation, self.precision = augmentation, precision
        self.size = model.finest
        self.bad: dict[int, str] = {}
        self._held: list[Tensor] | None = None
        self._here = torch.zeros(0, dtype=torch.bool)  # rows that are held
        self._photos = photo_identity(samples)
        self._dtype = next(model.parameters()).dtype
        # What most people never change is left out, so that their features are found.
        changed: dict[str, object] = {"max_pixels": limit} if (limit := _limit()) != _MAX_PIXELS else {}
        if self._dtype != torch.float32:
            changed["dtype"] = str(self._dtype)
        self.caches = []
        for scale, size in enumerate(model.config.sizes):
            transformer = model.transformer(scale)
            width = int(transformer.backbone.model.num_features)
            identity = {
                "backbone": model.config.backbone,
                "digest": backbone_digest(transformer),
                "size": list(size),
                "seen": list(self.size),
                "precision": precision,
                "views": views,
                "augmentation": augmentation.settings() if views > 1 else None,
                "photos": self._photos,
                **changed,
            }
            arrays = {
                "mean": ((9 * width,), torch.float32),
                "attention": ((9 * width,), torch.float32),
                "class_token": ((width,), torch.float32),
            }
            self.caches.append(FeatureCache.open(folder, identity, arrays=arrays, rows=len(samples) * views))
        self.kind = "class_token" if model.config.head == "class_token" else model.config.pooling

    def missing(self, photos: Sequence[int], views: int | None = None) -> list[int]:
        """Return the rows, photo * views + view, that no pass has filled yet, of some photos and their first views."""
        return self._lacking(
            [i * self.views + v for i in photos for v in range(self.views if views is None else views)]
        )

    def _lacking(self, rows: Sequence[int]) -> list[int]:
        """Return those of the rows that a scale lacks."""
        lacking = set()
        for cache in self.caches:
            lacking |= set(cache.missing(rows))
        return [row for row in rows if row in lacking]

    @torch.inference_mode()
    def fill(
        self,
        rows: Sequence[int],
        *,
        batch: int,
        device: torch.device,
        step: Callable[[int], None] | None = None,
        readers: int | None = None,
    ) -> None:
        """Compute rows; those of photos that cannot be decoded are marked bad, and never tried again.

        While the network looks at a batch, threads read the next ones and write those before. Rows that another run
        has filled by then are left out; where two runs meet, they share what is left.

        Args:
            rows: of :meth:`missing`.
            batch: photos a forward pass.
            device: where the model is.
            step: called with the number of rows done.
            readers: threads that read photos; None takes one on the CPU, whose cores the network needs, else up to 8.

        Raises:
            TrainingError: a photo that could be read when the store was made cannot be now; its row stays missing.
        """
        for transformer in {self.model.transformer(scale) for scale in range(len(self.caches))}:
            transformer.backbone.eval()  # stochastic depth would be kept for good
        if readers is None:
            readers = min(MOST_READERS, os.cpu_count() or 1) if device.type == "cuda" else 1
        left = deque(rows[start : start + batch] for start in range(0, len(rows), batch))
        threads = torch.get_num_threads()
        reading = ThreadPoolExecutor(readers, "molt-read", initializer=_alone)
        writing = ThreadPoolExecutor(1, "molt-write", initializer=_alone)
        ahead: deque[tuple[int, list[int], list[Future[Tensor | str]]]] = deque()
        behind: deque[tuple[int, Future[bool]]] = deque()
        done = 0

        def settle(most: int) -> None:
            while len(behind) > most:
                written, write = behind.popleft()
                if write.result():  # in the same order both would go on to compute the same rows
                    random.Random().shuffle(left)
                if step is not None:
                    step(written)

        try:
            while left or ahead:
                while left and len(ahead) <= AHEAD:
                    cut = left.popleft()
                    lacking = self._lacking(cut)
                    ahead.append((len(cut), lacking, [reading.submit(self._view, row) for row in lacking]))
                count, lacking, views = ahead.popleft()
                done += count
                found = [(row, seen.result()) for row, seen in zip(lacking, views, strict=True)]
                values = self._see([(row, one) for row, one in found if isinstance(one, Tensor)], device)
                bad = [(row, message) for row, message in found if isinstance(message, str)]
                # Two at most: on a GPU the first waits for what the network has been given since.
                settle(1)
                behind.append((done, writing.submit(self._write, values, bad)))
            settle(0)
        finally:
            reading.shutdown(cancel_futures=True)
            writing.shutdown()
            torch.set_num_threads(threads)  # what threads to come begin with

    def _view(self, row: int) -> Tensor | str:
        """Return a row's pixels, or why its photo, as the store knows it, can never be read.

        Raises:
            TrainingError: it cannot be read now.
        """
        index, number = divmod(row, self.views)
        sample, augmentation = self.samples[index], PLAIN if number == 0 else self._augmentation(number)
        known = self._photos[index]
        try:
            seen = view(sample.path, self.size, augmentation, seed=SEED, epoch=number, index=index)
        except (PhotoError, OSError) as error:
            if known[1] is None:
                return str(error)
            cause = error if isinstance(error, OSError) else error.__cause__
            failed = isinstance(cause, OSError) and cause.errno is not None  # without one it is the decoder's
            if not failed and photo_identity([sample]) == [known]:
                return str(error)
            what = (
                "features done so far are kept, and resume=True (--resume) goes on when it can be read again"
                if failed
                else "it was changed while features were computed: begin again when photos stay as they are"
            )
            raise TrainingError(f"{error}; {what}") from error
        # Features of a file that nobody knows the bytes of would be found where it is away again.
        return seen if known[1] is not None else f"{sample.path}: was not there when the features were begun"

    def _see(self, found: Sequence[tuple[int, Tensor]], device: torch.device) -> list[Found]:
        """Return rows and features of each scale that lacks them."""
        if not found:
            return []
        rows = [row for row, _ in found]
        # Page-locked, so that the copy to a GPU does not keep the network waiting.
        pixels = torch.empty(len(rows), 3, *self.size, pin_memory=device.type == "cuda")
        torch.stack([one for _, one in found], out=pixels)
        x = pixels.to(device, non_blocking=True).to(self._dtype)
        seen = []
        for scale, shown in enumerate(self.model.pyramid(x)):
            if absent := set(self.caches[scale].missing(rows)):
                picked = [i for i, row in enumerate(rows) if row in absent]
                part = shown if len(picked) == len(rows) else shown[picked]
                with torch.autocast(device.type, TYPES.get(self.precision), enabled=self.precision in TYPES):
                    features = self.model.transformer(scale).backbone.see(part)
                seen.append((scale, [rows[i] for i in picked], _pooled(features)))
        return seen

    def _write(self, found: Sequence[Found], bad: Sequence[tuple[int, str]]) -> bool:
        """Write what no other run has written; return whether one has."""
        for row, message in bad:
            for cache in self.caches:
                cache.mark_bad(row, message, keep_first=True)
        met = False
        for scale, rows, values in found:
            met |= self.caches[scale].write(rows, values, keep_first=True) < len(rows)
        return met

    def _augmentation(self, number: int) -> Augmentation:
        """Return what view ``number`` is made by; where there are flips, views are flipped in turns."""
        return replace(self.augmentation, flip=float(number % 2)) if self.augmentation.flip else self.augmentation

    def read(self, rows: Sequence[int]) -> list[Tensor]:
        """Return what each scale's head depends on, (rows, F) each; from memory where all of it fits in 1 GiB."""
        count, widths = len(self.samples) * self.views, [cache.width(self.kind) for cache in self.caches]
        if 4 * count * sum(widths) > MOST_HELD:
            return [cache.read(rows, [self.kind])[self.kind] for cache in self.caches]
        if self._held is None:
            self._held = [torch.empty(count, width) for width in widths]
            self._here = torch.zeros(count, dtype=torch.bool)
        places = torch.as_tensor(rows, dtype=torch.int64)
        lacking = places[~self._here[places]]
        if len(lacking) > 0:
            for held, cache in zip(self._held, self.caches, strict=True):
                held[lacking] = cache.read(lacking, [self.kind])[self.kind]
            self._here[lacking] = True
        return [held[places] for held in self._held]

    def look(self, photos: Sequence[int]) -> None:
        """Note the photos that were marked bad in :attr:`bad`."""
        wanted = set(photos)
        for cache in self.caches:
            for row, message in cache.bad().items():
                if row // self.views in wanted:
                    self.bad.setdefault(row // self.views, message)

    @property
    def bytes(self) -> int:
        """On disk, of all scales."""
        return sum(cache.bytes for cache in self.caches)


def _alone() -> None:
    """Keep a thread from taking helpers of its own, which would wait for work on the cores that the network needs."""
    torch.set_num_threads(1)


def _pooled(seen: Features) -> dict[str, Tensor]:
    maps = seen.as_map().float()
    weights = class_attention(seen).float().flatten(1)
    found = {"mean": pooled_windows(maps), "attention": pooled_windows(maps, weights / weights.sum(1, keepdim=True))}
    if seen.class_token is not None:
        found["class_token"] = seen.class_token.float()
    return found
