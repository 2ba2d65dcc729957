"""The whole way from decoded photos to boxes, by the library and by the papers' loops, and the bare forward passes."""

from __future__ import annotations

import copy
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molt import ops
from molt.backbones import CNNBackbone, ViTBackbone
from molt.backbones.preprocess import normalize, resize
from molt.benchmark import published
from molt.benchmark.photos import made
from molt.benchmark.registry import NotRun
from molt.clustering import DeepClustering, Slic, TokenKMeans, fit
from molt.clustering._labels import shrink
from molt.localizer import Localizer
from molt.methods import Multiscale, Seeded, create_model, list_models
from molt.methods.seeded import CLASS_SIZE
from molt.methods.transformer import ObjectLocalizationTransformer, pooled_windows

CLUSTERERS = ("none", "token_kmeans", "slic", "deep_fast", "deep_amortised", "deep_published")
FULL_STEPS = 1000  # of deep_published
ALPHA = 0.5  # of molt_*: the papers' loops know no other than a fixed one
CLASSES = 1000
SHARES = (0.5, 0.75, 1.0)
LOOP_SETTINGS = ("channels", "layers", "steps", "min_labels", "num_segments", "compactness", "continuity")
Stage = Callable[[str], AbstractContextManager[Any]]


@dataclass(frozen=True, eq=False)
class Found:
    """What a run over a batch found.

    Attributes:
        refined: (B, H, W) float in [0, 1], the map of the likeliest class.
        labels: (B, H, W) integers, or None without clusters.
        boxes: (4,) float32 xyxy on the CPU, a photo each, None where there is none.
    """

    refined: Tensor
    labels: Tensor | None
    boxes: list[Tensor | None]


@dataclass(frozen=True)
class Method:
    """A method to measure.

    Attributes:
        build: returns a Localizer for a device and a side in pixels; with ``pretrained=False`` of random weights.
        trained: False where a head is random, which is enough for time and agreement, not for true boxes.
    """

    build: Callable[..., Localizer]
    trained: bool = True


def scales(size: int, patch: int) -> tuple[int, ...]:
    """Return the sides of three scales up to a size, as the methods' own stand to theirs; multiples of the patch."""
    return tuple(max(1, round(size * share / patch)) * patch for share in SHARES)


def sides(loc: Localizer) -> tuple[int, ...]:
    """Return the longer side of each scale of a Localizer's method."""
    method = loc.method
    if isinstance(method, Multiscale):
        return tuple(max(size) for size in method.model.config.sizes)
    return method.scales if isinstance(method, Seeded) else (max(method.size),)


def _seeded(device: str, size: int, weights: str = "default", pretrained: bool = True) -> Localizer:
    source = "auto" if pretrained else "random"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        loc = Localizer("seeded", weights, device=device, source=source)
    assert isinstance(loc.method, Seeded)
    loc.method.scales = scales(size, 14)
    loc.method.size = (max(loc.method.scales),) * 2
    return loc


def _untrained(name: str, device: str, size: int, pretrained: bool = True) -> Localizer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(name, CLASSES, scales(size, 14 if "dinov2" in name else 16), pretrained=pretrained)
    model.mark_trained(True)  # spares a warning that the row gives anyway
    return Localizer(model, device=device, alpha=ALPHA)


METHODS: dict[str, Method] = {
    "seeded": Method(_seeded),
    "weak": Method(partial(_seeded, weights="weak")),
    **{name: Method(partial(_untrained, name), trained=False) for name in list_models()},
}


def make_clusterer(name: str, steps: int | None = None, dtype: torch.dtype | None = None, *, tiny: bool = False) -> Any:
    """Return a clusterer by its name here, None for none; ``steps`` for those of deep_published.

    Args:
        name: of ``CLUSTERERS``.
        steps: of deep_published; None takes them all.
        dtype: of the convolutions of deep clustering.
        tiny: networks as small as they go, where times mean nothing.
    """
    small: dict[str, Any] = {"channels": 8, "num_segments": 40, "working_size": 32} if tiny else {}
    if name == "deep_published":
        # Full steps: its own rule would end a run earlier once few labels are left.
        return DeepClustering(
            "published", steps=FULL_STEPS if steps is None else steps, min_labels=1, dtype=dtype, **small
        )
    makers: dict[str, Callable[[], Any]] = {
        "none": lambda: None,
        "token_kmeans": lambda: TokenKMeans(restarts=4),
        "slic": Slic,
        "deep_fast": partial(DeepClustering, dtype=dtype, **small),
        "deep_amortised": partial(_amortised, dtype),
    }
    return makers[name]()


@functools.cache
def _amortised(dtype: torch.dtype | None) -> DeepClustering:
    """Return amortised clustering by a network fitted on the spot to a few made-up images, which is enough for time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clusters.safetensors")
        fit(list(made((112, 112))), path, steps=10, batch_size=4)
        return DeepClustering("amortised", checkpoint=path, dtype=dtype)


@torch.inference_mode()
def library(loc: Localizer, clusterer: Any, images: Tensor) -> Found:
    """Run a Localizer's way from images (B, 3, H, W) on its device to the largest component's boxes on the host.

    Without a clusterer maps are not refined at all.
    """
    if clusterer is None:
        evidence = loc.method(images, None, loc.k, loc._stage)
        size = tuple(images.shape[2:])
        with loc._ops(), loc._stage("fuse"):
            fused = ops.fuse_maps(evidence.maps, size, loc.method.scale_weights, order=loc.method.order)
            refined, labels = ops.upsample_normalize(fused, size), None
    else:
        loc.clusterer = clusterer
        maps = loc._maps(images, None)
        refined, labels = maps.refined, maps.clusters
    with loc._ops(), loc._stage("boxes"):
        found = ops.component_boxes(refined, loc.threshold, largest=True).to("cpu")
    boxes: list[Tensor | None] = [None] * len(images)
    for image, channel, box in zip(found.image.tolist(), found.channel.tolist(), found.boxes, strict=True):
        if channel == 0:
            boxes[image] = box.float()
    return Found(refined[:, 0], labels, boxes)


def literal(loc: Localizer, clusterer: Any, vote: published.Vote, stage: Stage, images: Tensor) -> Found:
    """Run the papers' loops (:mod:`molt.benchmark.published`) over images, one after the other.

    Raises:
        NotRun: the papers have no such method or clusterer.
    """
    if not isinstance(loc.method, Multiscale) or loc.method.model.config.head != "patches":
        raise NotRun("the papers' loops are those of molt_*")
    if clusterer is not None and (not isinstance(clusterer, DeepClustering) or clusterer.checkpoint is not None):
        raise NotRun("the papers' loops cluster by a network a photo only")
    if clusterer is not None and clusterer.merged:
        raise NotRun("the papers' loops have one network a photo, and do not merge several")
    model = loc.method.model
    scaled = [model.transformer(scale) for scale in range(len(model.config.sizes))]
    state, settings = None, {}
    if clusterer is not None:
        state = [value.to(images.device) for value in clusterer.initial_states()[0]]
        settings = {name: getattr(clusterer, name) for name in LOOP_SETTINGS}

    @contextmanager
    def opened(name: str) -> Iterator[None]:
        with stage(name):
            if name != "cluster":
                yield
                return
            low = clusterer is not None and clusterer.dtype == torch.bfloat16
            # As molt's networks of the same run; autocast keeps no copies of weights that training changes.
            with torch.autocast(images.device.type, torch.bfloat16, enabled=low, cache_enabled=False):
                yield

    size = (images.shape[2], images.shape[3])
    refined, labels, boxes = [], [], []
    for image in images.split(1):
        with torch.no_grad(), stage("pyramid"):
            pyramid = model.pyramid(image)
            small = image if clusterer is None else shrink(image, clusterer.working_size)
            array = small[0].permute(1, 2, 0).cpu().contiguous().numpy()
        found = published.localize(
            [transformer.backbone.model for transformer in scaled],
            [(transformer.head.weight, transformer.head.bias) for transformer in scaled],
            pyramid,
            size,
            None,
            array,
            state,
            **settings,
            alpha=ALPHA,
            vote=vote,
            stage=opened,
        )
        with stage("boxes"):
            box = published.largest_box(found.refined[0], loc.threshold)
        refined.append(torch.from_numpy(found.refined[0]))
        labels.append(torch.from_numpy(found.labels))
        boxes.append(None if box is None else torch.from_numpy(box))
    return Found(torch.stack(refined), None if clusterer is None else torch.stack(labels), boxes)


def bare(loc: Localizer, images: Tensor) -> Callable[[], None]:
    """Return a function that does a method's forward passes on a batch and nothing else.

    The timm networks without molt's hooks, their classifiers or heads included, on images already resized and
    normalised.

    Raises:
        NotRun: a method whose networks are not known here.
    """
    method = loc.method
    runs: list[Callable[[], Any]]
    with torch.inference_mode():
        if isinstance(method, Multiscale):
            model = method.model
            pyramid = model.pyramid(images)
            runs = [partial(_transformer(model.transformer(i)), x) for i, x in enumerate(pyramid)]
        elif isinstance(method, Seeded):
            vit, seen = method.vit, {CLASS_SIZE, max(method.scales)}
            sides: list[tuple[CNNBackbone | ViTBackbone, set[int]]]
            sides = [(method.cnn, seen | set(method.scales) if vit is None else seen)]
            if vit is not None:
                sides.append((vit, set(method.scales)))
            runs = []
            for backbone, wanted in sides:
                net = without_hooks(backbone.model)
                call = net if isinstance(backbone, CNNBackbone) else net.forward_features
                for side in sorted(wanted):
                    runs.append(partial(call, normalize(resize(images, (side, side)), backbone.model)))
        else:
            raise NotRun(f"the bare forward passes of {type(method).__name__} are not known")

    @torch.inference_mode()
    def forwards() -> None:
        for run in runs:
            run()

    return forwards


def _transformer(transformer: ObjectLocalizationTransformer) -> Callable[[Tensor], Tensor]:
    """Return a ViT with its head, from pixels to logits, without hooks."""
    net, head = without_hooks(transformer.backbone.model), transformer.head

    def run(pixels: Tensor) -> Tensor:
        tokens = net.forward_features(pixels)
        if isinstance(head, nn.Linear):
            logits: Tensor = head(tokens[:, 0])
            return logits
        height, width = (
            side // patch for side, patch in zip(pixels.shape[2:], transformer.backbone.patch_size, strict=True)
        )
        patches = tokens[:, net.num_prefix_tokens :].transpose(1, 2).unflatten(2, (height, width))
        return F.linear(pooled_windows(patches), head.weight.flatten(1), head.bias)

    return run


def without_hooks(model: nn.Module) -> Any:
    """Return a copy of a network that shares its weights and has no hooks."""
    memo = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    net = copy.deepcopy(model, memo)
    for module in net.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    return net
