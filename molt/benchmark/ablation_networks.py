"""A photo of an ablation and the networks that look at it, each at most once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molt import ops
from molt._auto_alpha import AUTO, Alpha, auto_alpha, blend
from molt.backbones.preprocess import resize
from molt.benchmark.ablation_store import Arrays, Kept, digest, file_digest
from molt.classes import OBJECT
from molt.data.annotations import Sample
from molt.data.images import read_photo
from molt.evaluation.maps import MapError
from molt.methods import MOLT, load_model
from molt.methods.molt import backbone_digest, fused_logits
from molt.methods.seeded import Seeded
from molt.methods.transformer import class_attention
from molt.structures import Features

SIDE = 448  # px, where maps are fused and refined, as the training-free default does
CLASS_SIDE = 224
Groups = Mapping[int, tuple[int, ...]]
FindClasses = Callable[[tuple[str, ...]], Groups]
PRODUCT, CLASS, ATTENTION = "attention x class map", "class map", "attention"
KINDS = {PRODUCT: "product", CLASS: "class", ATTENTION: "attention"}


@dataclass(eq=False)
class View:
    """One photo.

    Attributes:
        photo: its place in the set.
        sample: what is said of it.
        kept: where what is made of it stays.
        device: where networks look at it.
        seen: Features by network, for as long as the photo is worked on.
        forward_ms: what making them took, by network.
    """

    photo: int
    sample: Sample
    kept: Kept
    device: torch.device
    seen: dict[str, Features] = field(default_factory=dict)
    forward_ms: dict[str, float] = field(default_factory=dict)
    _pixels: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def pixels(self, size: tuple[int, int] = (SIDE, SIDE)) -> Tensor:
        """Return the photo as (1, 3, H, W) float32 RGB in [0, 1].

        Raises:
            PhotoError: it cannot be read.
        """
        if size not in self._pixels:
            self._pixels[size] = read_photo(self.sample.path, size).pixels[None].to(self.device)
        return self._pixels[size]


@dataclass(frozen=True)
class Wanted:
    """Whose map counts.

    Attributes:
        gt_map: ``"label"``, the photo's class; or ``"top1"``, the likeliest.
        find: gives the network's classes, -1 for 'object', by label of the set, for a network's class names; raises
            ValueError where they are not among them.
    """

    gt_map: str
    find: FindClasses

    def groups(self, names: tuple[str, ...]) -> Groups:
        """Return the network's classes by label; where the likeliest counts, none if it does not know the set's."""
        try:
            return self.find(names)
        except ValueError:
            if self.gt_map == "label":
                raise
            return {}

    def choose(self, groups: Groups, label: int, logits: Tensor) -> int:
        """Return the class whose map counts, of several the likeliest by (num_classes,) logits.

        Raises:
            MapError: the network has none for the label.
        """
        if self.gt_map == "top1":
            return int(logits.argmax())
        group = groups.get(label)
        if not group:
            raise MapError(f"the network has no class for label {label}", "a class of the network")
        return group[0] if len(group) == 1 else group[int(logits[list(group)].argmax())]


class TrainedMolt:
    """A trained MOLT, and each scale's maps of a photo.

    Args:
        path: what :meth:`molt.MOLT.save` wrote.
        wanted: whose map counts.
        device: where it runs.
        source: where backbones come from that the file leaves out.

    Attributes:
        key: tells its maps from others'.
        model: the network.

    Raises:
        FileNotFoundError, ValueError: see :func:`molt.load_model`; a head that was never trained; classes that are not
            the set's.
    """

    def __init__(self, path: Path, wanted: Wanted, device: torch.device, source: str = "auto") -> None:
        self.key = f"molt-{file_digest(path)}"
        self.model: MOLT = load_model(path, source=source).to(device)
        if not self.model.trained:
            raise ValueError(f"checkpoint {path} holds a head that was never trained: its maps mean nothing")
        self._wanted = wanted
        self._groups = wanted.groups(self.model.class_names)
        config = self.model.config
        self.scales = [f"{h}" if h == w else f"{h}x{w}" for h, w in config.sizes]
        self.size = self.model.finest
        self.finest = config.sizes.index(self.size)
        self._backbones = [
            f"{config.backbone}-{backbone_digest(self.model.transformer(i))}" for i in range(len(config.sizes))
        ]

    def share_backbones(self, other: TrainedMolt) -> None:
        """Hold the backbones that are another's as its own, so that memory holds them once."""
        theirs = dict(zip(other._backbones, range(len(other._backbones)), strict=True))
        for scale, name in enumerate(self._backbones):
            if name in theirs:
                self.model.transformer(scale).backbone = other.model.transformer(theirs[name]).backbone

    def maps(self, view: View) -> Arrays:
        """Return ``product``, ``class`` and ``attention`` of each scale, (h, w) float32 under ``NAME_SCALE``; ``ms``.

        ``ms`` is each scale's forward pass; ``correct`` is 1 where the likeliest class is the photo's, NaN where the
        network does not know the set's classes.

        Raises:
            PhotoError, MapError: a photo that cannot be read, or a class that the network lacks.
        """
        return view.kept.get(f"{self.key}-{self._wanted.gt_map}", view.photo, lambda: self._see(view))

    def features(self, view: View) -> Features:
        """Return the Features of the finest scale."""
        if self.key not in view.seen:
            self._see(view)
        return view.seen[self.key]

    def fused(self, maps: Arrays, scales: Sequence[int] | None = None, kind: str = PRODUCT, side: int = SIDE) -> Tensor:
        """Return the map (1, 1, side, side) that some scales, all if None, give together, as the model fuses them."""
        config = self.model.config
        chosen = range(len(config.sizes)) if scales is None else scales
        weights = None if config.scale_weights is None else [config.scale_weights[i] for i in chosen]
        given = [torch.from_numpy(maps[f"{KINDS[kind]}_{i}"])[None, None] for i in chosen]
        return ops.fuse_maps(given, (side, side), weights, order=config.order)

    @torch.inference_mode()
    def _see(self, view: View) -> Arrays:
        model, config = self.model, self.model.config
        weight = next(model.parameters())
        pyramid = model.pyramid(view.pixels(self.size).to(weight.dtype))
        seen, ms = [], []
        for i, pixels in enumerate(pyramid):
            features, taken = self._look(view, i, pixels)
            seen.append(features)
            ms.append(taken)
        logits = fused_logits(seen).float()[0]
        chosen = self._wanted.choose(self._groups, view.sample.label, logits)
        classes = torch.tensor([[chosen]], device=view.device)
        group = self._groups.get(view.sample.label)
        known = bool(group) and group != (OBJECT,)
        found: Arrays = {
            "ms": np.array(ms),
            "correct": np.array(float(int(logits.argmax()) in (group or ())) if known else np.nan),
        }
        for i, product in enumerate(model.cams(seen, classes)):
            answers = model.transformer(i).class_maps(seen[i], classes.clamp_min(0))
            attention = class_attention(seen[i], config.layers, config.over_layers, config.over_heads)
            for name, values in ((PRODUCT, product), (CLASS, answers), (ATTENTION, attention)):
                found[f"{KINDS[name]}_{i}"] = array(values)
        view.seen[self.key] = seen[self.finest]
        return found

    def _look(self, view: View, scale: int, pixels: Tensor) -> tuple[Features, float]:
        """Return what a scale's transformer sees and the milliseconds; heads of equal backbones share a pass."""
        transformer = self.model.transformer(scale)
        start = time.perf_counter()
        if self.model.config.head == "spatial":
            return transformer.see(pixels), since(start, view.device)
        key = f"backbone-{self._backbones[scale]}-{self.scales[scale]}"
        if key not in view.seen:
            view.seen[key] = transformer.backbone.see(pixels)
            view.forward_ms[key] = since(start, view.device)
        features = view.seen[key]
        start = time.perf_counter()
        logits = transformer.classify(transformer.pool(features))
        return replace(features, logits=logits), view.forward_ms[key] + since(start, view.device)


class SeededMaps:
    """The training-free method with any backbone, and its maps of a photo.

    Args:
        weights: ``"default"``: a CNN's CAM is the seed of a ViT's patches; ``"weak"``: of the CNN's own.
        wanted: whose map counts.
        device: where it runs.
        source: where weights come from.
        backbone: timm name in place of the usual one.

    Raises:
        FileNotFoundError, ValueError: see :class:`molt.methods.seeded.Seeded`; classes that are not the set's.
    """

    def __init__(
        self, weights: str, wanted: Wanted, device: torch.device, source: str = "auto", backbone: str | None = None
    ) -> None:
        self.method = Seeded(weights, backbone=backbone, source=source).to(device)
        self.key = f"seeded-{weights}-{digest([info.to_json() for info in self.method.weights])}"
        self._wanted = wanted
        self._groups = wanted.groups(self.method.class_names)

    @property
    def attends(self) -> bool:
        """Whether it has class-row attention."""
        return self.method.vit is not None and self.method.vit.no_attention is None

    def maps(self, view: View) -> Arrays:
        """Return ``cam``, (h, w) float32; ``map_0``..., one a scale; and ``ms``.

        Raises:
            PhotoError, MapError: a photo that cannot be read, or a class that the network lacks.
        """
        return view.kept.get(f"{self.key}-{self._wanted.gt_map}", view.photo, lambda: self._see(view))

    def features(self, view: View) -> Features:
        """Return the Features of the finest scale."""
        if self.key not in view.seen:
            self._see(view)
        return view.seen[self.key]

    def attention(self, view: View) -> Tensor:
        """Return what the ViT's class token attends to, all layers added up, (1, 1, h, w)."""
        vit = self.method.vit
        assert vit is not None

        @torch.inference_mode()
        def see() -> Arrays:
            return {"attention": array(class_attention(vit(view.pixels(self.method.size))))}

        found = view.kept.get(f"{self.key}-attention", view.photo, see)
        return torch.from_numpy(found["attention"])[None, None]

    def fused(self, maps: Arrays, side: int = SIDE) -> Tensor:
        """Return the map (1, 1, side, side) of all scales."""
        given = [torch.from_numpy(maps[f"map_{i}"])[None, None] for i in range(len(self.method.scales))]
        return ops.fuse_maps(given, (side, side), self.method.scale_weights, order=self.method.order)

    @torch.inference_mode()
    def _see(self, view: View) -> Arrays:
        images = view.pixels(self.method.size)
        start = time.perf_counter()
        logits = self.method.cnn(resize(images, (CLASS_SIDE, CLASS_SIDE))).logits
        assert logits is not None
        chosen = self._wanted.choose(self._groups, view.sample.label, logits.float()[0])
        evidence = self.method(images, torch.tensor([[chosen]], device=view.device), 1, lambda _: nullcontext())
        found: Arrays = {"ms": np.array([since(start, view.device)]), "cam": array(evidence.cam)}
        found |= {f"map_{i}": array(values) for i, values in enumerate(evidence.maps)}
        view.seen[self.key] = evidence.features
        return found


@dataclass(frozen=True)
class Clusters:
    """A clusterer, one instance a seed.

    Attributes:
        name: what to call it.
        instances: the same but for their seeds.
        on: what they are shown: ``"pixels"`` or ``"tokens"``.
    """

    name: str
    instances: tuple[Any, ...]
    on: str = "pixels"

    def labels(self, view: View, network: TrainedMolt | SeededMaps | None = None, side: int = SIDE) -> Arrays:
        """Return ``labels`` (seeds, side, side), ``counts`` (seeds,) and ``ms`` (seeds,) of a photo.

        Args:
            view: the photo.
            network: whose tokens are clustered.
            side: of the labels.
        """
        settings = [[type(one).__name__, _plain(one)] for one in self.instances]
        shown = "pixels" if self.on == "pixels" or network is None else network.key
        return view.kept.get(
            f"labels-{shown}-{digest([settings, side])}", view.photo, lambda: self._make(view, network, side)
        )

    @torch.inference_mode()
    def _make(self, view: View, network: TrainedMolt | SeededMaps | None, side: int) -> Arrays:
        shown: Tensor | Features = view.pixels((side, side))
        if self.on == "tokens":
            assert network is not None
            shown = network.features(view)
        labels, counts, ms = [], [], []
        for clusterer in self.instances:
            start = time.perf_counter()
            found, number = clusterer(shown, (side, side))
            ms.append(since(start, view.device))
            labels.append(found[0].cpu().numpy())
            counts.append(int(number[0]))
        kind = np.uint8 if max(counts, default=0) <= 256 else np.int32
        return {"labels": np.stack(labels).astype(kind), "counts": np.array(counts), "ms": np.array(ms)}


@dataclass(frozen=True, eq=False)
class Measured:
    """One map of a photo.

    Attributes:
        values: (h, w), on any scale.
        clusters: of the photo, where it was refined.
        ms: what it took, or None where that was not measured.
        alpha: weight of the cluster mean, where it was refined.
    """

    values: NDArray[Any]
    clusters: int | None = None
    ms: float | None = None
    alpha: float | None = None


@torch.inference_mode()
def refined(base: Tensor, found: Arrays, seed: int, alpha: Alpha) -> Measured:
    """Return a map (1, 1, H, W) refined with kept labels, as :class:`molt.Localizer` does it; ms is all it took."""
    count = int(found["counts"][seed])
    labels = torch.from_numpy(found["labels"][seed].astype(np.int32))[None]
    start = time.perf_counter()
    values = ops.upsample_normalize(blend(base, labels, alpha, count), tuple(base.shape[2:]))
    ms = 1000 * (time.perf_counter() - start) + float(found["ms"][seed])
    weight = float(auto_alpha(base, labels, count)) if alpha == AUTO else float(alpha)
    return Measured(values[0, 0].numpy(), count, ms, weight)


def since(start: float, device: torch.device) -> float:
    """Return the milliseconds since a start, all work on the device done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def array(values: Tensor) -> NDArray[np.float32]:
    """Return the first map (h, w) of (1, 1, h, w)."""
    return np.asarray(values[0, 0].detach().float().cpu().numpy())


def _plain(clusterer: Any) -> dict[str, Any]:
    """Return a clusterer's arguments, as text where they are no plain values."""
    return {name: repr(value) for name, value in sorted(vars(clusterer).items())}
