"""Photos in, boxes out: the whole pipeline."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from molt import ops
from molt._arguments import check_clusterer, check_device, check_int, check_number
from molt._auto_alpha import Alpha, blend, check_alpha
from molt._backend import Backend, use_native
from molt._backend import backend as use_backend
from molt._files import user_path
from molt._words import count
from molt.classes import OBJECT, class_name, find_class
from molt.clustering import CachedClusterer, wants_features
from molt.clustering.cache import check_folder, is_label_map
from molt.data.images import Photo, PhotoError, find_photos, load_photo, read_photo
from molt.methods import METHODS, MOLT, Evidence, Multiscale, model_in
from molt.methods.evidence import Captions
from molt.ops._resize import no_kernel
from molt.profiling import Profile
from molt.structures import Localization, WeightsInfo

Source = str | Path | IO[bytes] | PIL.Image.Image | np.ndarray | Tensor
logger = logging.getLogger("molt")

PREVIEW = 1000


@dataclass(frozen=True, eq=False)
class Explanation:
    """Every stage of one photo, for a page or a notebook.

    Attributes:
        photo: RGB picture, at most 1000 px a side.
        result: the Localization.
        class_probability: of the result's first class, in [0, 1].
        cam: (h, w) class map in [0, 1] that the method grew its maps from.
        scale_maps: ((H, W) in pixels, (h, w) map in [0, 1]) a scale.
        fused: (H, W) in [0, 1].
        clusters: (H, W) int32.
        refined: (H, W) in [0, 1].
        captions: what to say of the stages that differ from method to method.
        attention: (h, w) in [0, 1], what the class token attends to, or None where it plays no part.
    """

    photo: PIL.Image.Image
    result: Localization
    class_probability: float
    cam: Tensor
    scale_maps: list[tuple[tuple[int, int], Tensor]]
    fused: Tensor
    clusters: Tensor
    refined: Tensor
    captions: Captions
    attention: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Maps:
    """A batch between the networks and the boxes."""

    evidence: Evidence
    fused: Tensor
    clusters: Tensor
    refined: Tensor


_Wanted = Tensor | list[Tensor] | None  # for all photos, a row a photo, or the likeliest
_NO_ROW = torch.empty(0)


class Localizer:
    """Find the object of a class in photos, with no training and no boxes.

    ::

        loc = molt.Localizer()
        result = loc("photo.jpg")
        result.boxes, result.names, result.scores

    Args:
        method: ``"seeded"``, which needs no training; a name of :func:`molt.list_models`, the MOLT paper's method, with
            ``checkpoint``; or a trained :class:`molt.MOLT` itself, which is then put into evaluation mode and moved to
            the device. None takes the model that ``checkpoint`` holds, else ``"seeded"``.
        weights: of ``seeded``: ``"default"`` (CNN + ViT) or ``"weak"`` (the CNN alone: image labels only).
        k: how many of the likeliest classes to localize, 1 to the network's number of classes.
        threshold: in (0, 1): a box encloses map values of at least this share of the maximum; None takes the
            method's own.
        multi: True gives a box to every component of the map.
        device: ``"cpu"``, ``"cuda"``...; None takes a GPU where there is one.
        backend: ``"auto"``, ``"reference"`` or ``"native"`` for the operators; None leaves what is in force.
        backbone: of ``seeded``: timm name of the network whose patches are compared, in place of the usual one.
        checkpoint: of ``seeded``: local weight file for that network; else the file that :meth:`molt.MOLT.save` wrote.
        source: ``"auto"``, ``"package"`` or ``"hub"``: where weights are taken from.
        clusterer: callable ``labels, counts = clusterer(x, size)``, see :mod:`molt.clustering`; x is the Features of
            the finest scale, or the images where the clusterer's ``takes_features`` is False. None takes the method's
            own: ``TokenKMeans(restarts=4)`` for ``seeded`` and ``molt_dinov2_small``, ``DeepClustering()`` for other
            ``molt_*``.
        cache: folder where label maps are kept, so that a photo's clusters are computed once; None keeps none. See
            :class:`molt.clustering.CachedClusterer`, which then is :attr:`clusterer` and counts hits and misses.
        alpha: weight of the cluster mean in the refined map, 0 (no refinement) to 1; ``"auto"`` chooses it for each
            map, see :func:`molt.auto_alpha`; None takes the method's own.
        profile: True books time and memory of each stage in :attr:`profile`.

    Under torch.autocast the networks and the maps have its precision; clusters are found outside of it.

    Raises:
        TypeError, ValueError: an argument of another type, unknown or out of range.
        FileNotFoundError: weights that are nowhere to be had; the message says how to get them.
        RuntimeError: backend ``"native"`` where it is not compiled in, or weights that do not fit.
    """

    def __init__(
        self,
        method: str | MOLT | None = None,
        weights: str = "default",
        k: int = 1,
        threshold: float | None = None,
        multi: bool = False,
        device: str | torch.device | None = None,
        *,
        backend: Backend | None = None,
        backbone: str | None = None,
        checkpoint: str | Path | None = None,
        source: str = "auto",
        clusterer: Any = None,
        cache: str | Path | None = None,
        alpha: Alpha | None = None,
        profile: bool = False,
    ) -> None:
        if method is None:
            method = (None if checkpoint is None else model_in(checkpoint)) or "seeded"
        if not isinstance(method, MOLT) and (not isinstance(method, str) or method not in METHODS):
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        k = check_int("k", k, 1)
        if threshold is not None and not 0 < check_number("threshold", threshold) < 1:
            raise ValueError(f"threshold must be in (0, 1), got {threshold}")
        alpha = None if alpha is None else check_alpha(alpha)
        check_clusterer(clusterer)
        if cache is not None:
            cache = check_folder("cache", cache)
            clusterer = None if clusterer is None else CachedClusterer(clusterer, cache)
        self.device = _pick_device(device)
        for op in ("fuse_maps", "cluster_refine", "component_boxes"):
            use_native(op, self.device, backend)  # a backend that is missing is told now
        self.backend = backend
        build = partial(Multiscale, method) if isinstance(method, MOLT) else METHODS[method]
        self.method = build(weights, backbone=backbone, checkpoint=checkpoint, source=source)
        self.method.to(self.device)
        use_native("fuse_maps", self.device, backend, no_kernel(self.method.order))
        if k > len(self.method.class_names):
            raise ValueError(f"k must be at most {len(self.method.class_names)}, the number of classes, got {k}")
        self.k = k
        self.threshold = self.method.threshold if threshold is None else threshold
        self.multi = multi
        if clusterer is None:
            clusterer = self.method.clusterer() if cache is None else CachedClusterer(self.method.clusterer(), cache)
        self.clusterer = clusterer
        self.alpha = self.method.alpha if alpha is None else alpha
        self.profile = Profile(self.device) if profile else None

    @property
    def weights(self) -> tuple[WeightsInfo, ...]:
        """One WeightsInfo a network: where its weights came from and whether they saw masks."""
        return self.method.weights

    def __call__(self, x: Any, classes: Any = None) -> Any:
        """Localize one photo, or many.

        Args:
            x: a path, file object, PIL image, (H, W, 3) array or (3, H, W) tensor, or what else
                :func:`molt.data.load_photo` takes, gives one Localization. A list of these, a folder (searched
                recursively), a (B, H, W, C) array or a (B, C, H, W) tensor gives a list in input order.
            classes: a class name or index, ``"object"`` for the class-agnostic mode, or a list of these, for all
                photos; a list of lists, or (B, C) indices, has a row a photo. None takes the ``k`` likeliest classes of
                each photo.

        Raises:
            PhotoError: a photo that cannot be read (a ValueError; :meth:`stream` goes on instead).
            TypeError, ValueError: a class that is unknown or no name or index; another number of rows than of photos.
        """
        if isinstance(x, list | tuple) or (isinstance(x, Tensor | np.ndarray) and x.ndim == 4):
            return self._all(list(x), classes)
        if isinstance(x, str | os.PathLike) and user_path(x).is_dir():
            found = find_photos(x)[0]
            if isinstance(self.clusterer, CachedClusterer):
                found = [photo for photo in found if not is_label_map(photo, self.clusterer.folder)]
            return self._all(found, classes)
        return self._all([x], classes)[0]

    def stream(
        self,
        sources: Iterable[Source],
        classes: Any = None,
        batch_size: int | None = None,
        *,
        explain: bool = False,
    ) -> Iterator[tuple[Source, Any]]:
        """Yield (source, Localization) in input order as each batch finishes; a bad photo yields its error instead.

        Args:
            sources: photos as for :meth:`__call__`.
            classes: as for :meth:`__call__`.
            batch_size: photos a forward pass, at least 1; None takes 1 on the CPU and 16 on a GPU.
            explain: True yields an Explanation, every stage, in place of each Localization.

        Raises:
            TypeError, ValueError: a class that is unknown or no name or index, or a batch_size below 1, before the
                first photo; another number of rows of classes than of sources, before it where these have a length.
        """
        if batch_size is not None:
            batch_size = check_int("batch_size", batch_size, 1)
        wanted = self._wanted(classes)
        if isinstance(wanted, list) and isinstance(sources, Sized) and len(sources) != len(wanted):
            raise ValueError(f"classes must hold a row a photo: got {len(wanted)} for {count(len(sources), 'photo')}")
        size = batch_size or (16 if self.device.type == "cuda" else 1)
        return self._stream(iter(sources), wanted, size, explain=explain)

    def explain(self, x: Source, classes: Any = None) -> Explanation:
        """Localize one photo and return every stage on the way; arguments as for :meth:`__call__`."""
        found = next(self._stream(iter([x]), self._wanted(classes), 1, explain=True))[1]
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, Explanation)
        return found

    def _all(self, sources: Sequence[Source], classes: Any) -> list[Localization]:
        results = []
        for _, result in self.stream(sources, classes):
            if isinstance(result, Exception):
                raise result
            results.append(result)
        return results

    def _stream(
        self, sources: Iterator[Source], wanted: _Wanted, size: int, *, explain: bool = False
    ) -> Iterator[tuple[Source, Any]]:
        rows = iter(wanted) if isinstance(wanted, list) else repeat(wanted)
        batch: list[tuple[Source, Photo | Exception]] = []
        chosen: list[Tensor | None] = []
        for source in sources:
            row = next(rows, _NO_ROW)
            if row is _NO_ROW or (chosen and _width(row) != _width(chosen[0])):
                yield from self._finish(batch, chosen, explain)
                batch, chosen = [], []
            if row is _NO_ROW:
                raise ValueError("classes must hold a row a photo: got fewer than photos")
            try:
                with self._stage("read"):
                    batch.append((source, read_photo(source, self.method.size)))
            except (PhotoError, OSError, TypeError) as error:
                batch.append((source, error))
            chosen.append(row)
            if len(batch) == size:
                yield from self._finish(batch, chosen, explain)
                batch, chosen = [], []
        yield from self._finish(batch, chosen, explain)
        if isinstance(wanted, list) and next(rows, _NO_ROW) is not _NO_ROW:
            raise ValueError("classes must hold a row a photo: got more than photos")

    def _finish(
        self, batch: list[tuple[Source, Photo | Exception]], chosen: list[Tensor | None], explain: bool
    ) -> Iterator[tuple[Source, Any]]:
        read = [(photo, row) for (_, photo), row in zip(batch, chosen, strict=True) if not isinstance(photo, Exception)]
        results = iter(self._results([photo for photo, _ in read], [row for _, row in read], explain))
        for source, photo in batch:
            yield source, photo if isinstance(photo, Exception) else next(results)

    def _results(self, photos: list[Photo], chosen: list[Tensor | None], explain: bool) -> list[Any]:
        """Results of photos that were read; where a batch fails, each is tried alone, so that one costs no other."""
        if not photos:
            return []
        rows = [row for row in chosen if row is not None]
        try:
            maps = self._maps(self._batch(photos), torch.stack(rows) if rows else None)
            found = self._boxes(photos, maps)
            return [self._explanation(r, maps, i) for i, r in enumerate(found)] if explain else found
        except Exception as error:
            if len(photos) == 1:
                return [error]
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning("a batch of %d photos failed (%s): each is tried alone", len(photos), first)
        return [self._results([photo], [row], explain)[0] for photo, row in zip(photos, chosen, strict=True)]

    @torch.inference_mode()
    def _explanation(self, result: Localization, maps: _Maps, image: int) -> Explanation:
        """Every stage of one photo of a batch."""
        picture = load_photo(result.source).copy()
        picture.thumbnail((PREVIEW, PREVIEW))
        evidence = maps.evidence

        def stretched(values: Tensor) -> Tensor:
            return ops.upsample_normalize(values[image : image + 1, :1], values.shape[2:])[0, 0].cpu()

        return Explanation(
            photo=picture,
            result=result,
            class_probability=float(evidence.probabilities[image, 0]),
            cam=stretched(evidence.cam),
            attention=None if evidence.attention is None else stretched(evidence.attention),
            scale_maps=list(zip(evidence.scales, map(stretched, evidence.maps), strict=True)),
            fused=maps.fused[image, 0].cpu(),
            clusters=maps.clusters[image].cpu(),
            refined=maps.refined[image, 0].cpu(),
            captions=self.method.captions,
        )

    def _wanted(self, classes: Any) -> _Wanted:
        """Return indices (C,) for all photos, or a list of them, one a photo."""
        if classes is None:
            return None
        if isinstance(classes, Tensor | np.ndarray):
            classes = classes.tolist()
        if not isinstance(classes, list | tuple):
            classes = [classes]
        rows = [isinstance(row, list | tuple) or getattr(row, "ndim", 0) > 0 for row in classes]
        if any(rows):
            if not all(rows):
                raise ValueError("classes must be all classes, or all lists of classes, one a photo; got both")
            return [self._indices(row) for row in classes]
        return self._indices(classes)

    def _indices(self, row: Any) -> Tensor:
        row = row.tolist() if isinstance(row, Tensor | np.ndarray) else row
        if not row:
            raise ValueError("classes must not be an empty list; None takes the likeliest classes")
        return torch.tensor([find_class(name, self.method.class_names) for name in row], device=self.device)

    def _batch(self, photos: list[Photo]) -> Tensor:
        return torch.stack([photo.pixels.to(self.device) for photo in photos])

    @torch.inference_mode()
    def _maps(self, images: Tensor, wanted: Tensor | None) -> _Maps:
        """The way of a batch: networks, fusion, clusters, refinement."""
        classes = None if wanted is None else wanted.expand(len(images), -1)  # (C,), or (B, C)
        evidence = self.method(images, classes, self.k, self._stage)
        size = tuple(images.shape[2:])
        with self._ops():
            with self._stage("fuse"):
                fused = ops.fuse_maps(evidence.maps, size, self.method.scale_weights, order=self.method.order)
            with self._stage("cluster"):
                shown = evidence.features if wants_features(self.clusterer) else images
                with full_precision(self.device):
                    clusters, counts = self.clusterer(shown, size)
            with self._stage("refine"):
                # A known limit spares the GPU from reading the counts back.
                limit = getattr(self.clusterer, "num_clusters", counts)
                refined = blend(fused, clusters, self.alpha, limit)
                refined = ops.upsample_normalize(refined, size)
        return _Maps(evidence, fused, clusters, refined)

    @torch.inference_mode()
    def _boxes(self, photos: list[Photo], maps: _Maps) -> list[Localization]:
        """Boxes of a batch in the photos' own pixels."""
        with self._stage("boxes"), self._ops():
            found = ops.component_boxes(maps.refined, self.threshold, largest=not self.multi).to("cpu")
            classes = maps.evidence.classes.cpu()
            probabilities = maps.evidence.probabilities.float().cpu()
            heat, clusters = maps.refined.float().cpu(), maps.clusters.cpu()
            if not bool(heat.isfinite().all()):  # as of half precision that overflowed; no component would be found
                raise ValueError("the photo's map holds NaN or infinity")
            height, width = heat.shape[2:]
            results = []
            for i, photo in enumerate(photos):
                here = found.image == i
                channel, boxes, area = found.channel[here], found.boxes[here], found.area[here].float()
                share = area / torch.zeros(heat.shape[1]).scatter_reduce(0, channel, area, "amax")[channel]
                score = probabilities[i, channel] * share
                score = torch.where(classes[i, channel] == OBJECT, found.mean[here] * share, score)
                order = score.argsort(descending=True, stable=True)
                channel, boxes, score = channel[order], boxes[order], score[order]
                scale = torch.tensor([photo.size[0] / width, photo.size[1] / height]).repeat(2)
                results.append(
                    Localization(
                        boxes=boxes * scale,
                        classes=classes[i, channel],
                        names=[class_name(int(c), self.method.class_names) for c in classes[i, channel]],
                        scores=score,
                        size=photo.size,
                        heat=heat[i],
                        clusters=clusters[i],
                        weights=self.weights,
                        source=photo.source,
                    )
                )
        if self.profile is not None:
            self.profile.photos += len(photos)
        return results

    def _stage(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self.profile is None else self.profile.stage(name)

    def _ops(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.backend is None else use_backend(self.backend)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Leave autocast: it keeps the copies it made of weights, and a clusterer that trains would not see its steps."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _width(row: Tensor | None) -> int:
    return 0 if row is None else len(row)


def _pick_device(device: str | torch.device | None) -> torch.device:
    picked = check_device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    assert isinstance(picked, torch.device)
    return picked
