"""The methods that `molt benchmark --methods` compares: published baselines, a MOLT by its scales, molt's own."""

from __future__ import annotations

import copy
import functools
import gc
import hashlib
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from molt import ops
from molt.backbones import CNNBackbone, ViTBackbone
from molt.backbones.preprocess import normalize, resize
from molt.benchmark.registry import NotRun
from molt.benchmark.token_cut import token_cut
from molt.localizer import Localizer
from molt.methods.molt import MOLT, fused_logits
from molt.methods.registry import SIZES, load_model
from molt.methods.seeded import CLASS_SIZE, Seeded
from molt.methods.seeded import SCALES as SEEDED_SCALES
from molt.structures import WeightsInfo

SIDE = max(SEEDED_SCALES)  # px, of photos for the methods on one network that has no sizes of its own
EXPECTED = {
    "checkpoint": "patches",
    "checkpoint-ts-cam": "patches",
    "checkpoint-class-token": "class_token",
    "checkpoint-spatial": "spatial",
}
TS_CAM_SIDE = 224  # px
# The map of TS-CAM, section 3: mean over heads, sum over layers, times the class map as it is.
TS_CAM_MAP = {"layers": None, "over_layers": "sum", "over_heads": "mean", "clip": False}
CENTRE, CENTRE_SIDE = 0.7, 224
CHECKPOINTS = tuple(EXPECTED)
Pick = Callable[[Tensor], Tensor]
"""From logits (B, classes) to the classes (B, 1) int64 whose maps are wanted, -1 for none in particular."""
See = Callable[[Tensor, Pick | None], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True, eq=False)
class Entry:
    """A method that is ready to run.

    Attributes:
        see: maps (B, 1, h, w) of any scale and logits (B, classes), or None, of images (B, 3, H, W) in [0, 1] at
            ``size``. Where it is given no pick, the map is that of each photo's likeliest class, and logits may be
            left out; that is what is timed.
        size: (H, W) in pixels of the images it wants.
        networks: all that run.
        trained: those whose parameters that take gradients were trained for the data set.
        class_names: of the logits; None where it knows no classes.
        needs_class: False where it has a map of 'object' too.
        weights: where they came from.
        said: what else a row must say, plain values.
    """

    see: See
    size: tuple[int, int]
    networks: tuple[nn.Module, ...] = ()
    trained: tuple[nn.Module, ...] = ()
    class_names: tuple[str, ...] | None = None
    needs_class: bool = False
    weights: tuple[WeightsInfo, ...] = ()
    said: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Plan:
    """A row of the table.

    Attributes:
        name: of the row.
        does: the method in a few words.
        build: makes it ready; raises NotRun, or what is wrong with its weights.
        key: what it runs; rows of one key are measured once.
    """

    name: str
    does: str
    build: Callable[[], Entry]
    key: Any = None


class Networks:
    """Loads each network once, when it is first asked for.

    Args:
        device: where they go.
        source: where weights come from, see :func:`molt.backbones.weights.create_timm`.
        files: checkpoints by option, see ``CHECKPOINTS``.
    """

    def __init__(
        self, device: torch.device | str, source: str = "auto", files: Mapping[str, Path | None] | None = None
    ) -> None:
        self.device = torch.device(device)
        self.source = source
        self.files = dict(files or {})
        if unknown := set(self.files) - set(CHECKPOINTS):
            raise ValueError(f"files must be of {', '.join(CHECKPOINTS)}, got {', '.join(sorted(unknown))}")
        self._models: dict[str, MOLT | Exception] = {}

    @functools.cached_property
    def cnn(self) -> CNNBackbone:
        """The CNN of `seeded`."""
        return CNNBackbone(source=self.source).to(self.device)

    @functools.cached_property
    def vit(self) -> ViTBackbone:
        """The ViT of `seeded`."""
        return ViTBackbone(source=self.source).to(self.device)

    def model(self, option: str) -> MOLT:
        """Return the trained model of a checkpoint.

        Raises:
            NotRun: no file was given, or its head was never trained.
            FileNotFoundError, ValueError: see :func:`molt.load_model`.
        """
        if option not in self._models:
            try:
                self._models[option] = self._load(option)
            except (NotRun, OSError, ValueError) as error:
                self._models[option] = error
        found = self._models[option]
        if isinstance(found, Exception):
            raise found
        return found

    def _load(self, option: str) -> MOLT:
        path = self.files.get(option)
        if path is None:
            raise NotRun(f"needs a trained model: --{option} FILE")
        model = load_model(path, source=self.source)
        if not model.trained:
            raise NotRun(f"--{option} {path.name}: its head was never trained")
        return model.eval().to(self.device)

    def file(self, option: str) -> dict[str, Any]:
        """Return name and digest of a checkpoint."""
        path = self.files[option]
        assert path is not None
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return {"checkpoint": path.name, "sha256": digest}


def at_scales(model: MOLT, scales: Sequence[int]) -> MOLT:
    """Return a MOLT of some of a model's scales, which shares its weights and runs nothing else.

    Args:
        model: is left as it is.
        scales: places in ``model.config.sizes``, at least one.

    Raises:
        ValueError: no scale, or one the model does not have.
    """
    sizes = model.config.sizes
    if not scales or any(not 0 <= scale < len(sizes) for scale in scales):
        raise ValueError(f"scales must be one or more of 0 to {len(sizes) - 1}, got {list(scales)}")
    weights = model.config.scale_weights
    view = copy.copy(model)
    view._modules = dict(model._modules)
    if not model.config.shared:
        view.transformers = nn.ModuleList(model.transformers[scale] for scale in scales)
    view.config = replace(
        model.config,
        sizes=tuple(sizes[scale] for scale in scales),
        scale_weights=None if weights is None or len(scales) == 1 else tuple(weights[scale] for scale in scales),
    )
    view.mark_trained(model.trained)
    return view


def plans(networks: Networks) -> list[Plan]:
    """Return all rows, in the table's order; those of a MOLT by the sizes in its checkpoint, where it can be read."""
    made = [
        Plan("centre", f"a box in the middle, {CENTRE:.0%} of each side", _centre),
        Plan("cam", "class activation map of the CNN", lambda: _cam(networks)),
        Plan("gradcam", "Grad-CAM of the package grad-cam on the CNN", lambda: _explained(networks, "GradCAM")),
        Plan("layercam", "LayerCAM of the package grad-cam on the CNN", lambda: _explained(networks, "LayerCAM")),
        Plan(
            "ts-cam",
            f"TS-CAM: a head pooled by the mean, its scale nearest {TS_CAM_SIDE} px, not clipped",
            lambda: _ts_cam(networks),
        ),
        *_by_scales(networks),
    ]
    for name, option, does in (
        ("class-token", "checkpoint-class-token", "MOLT with a class token head, all its scales, not refined"),
        ("spatial", "checkpoint-spatial", "MOLT with a spatial token, all its scales, not refined"),
    ):
        made.append(Plan(name, does, functools.partial(_all_scales, networks, option)))
    return [
        *made,
        Plan("tokencut", "TokenCut as published: the ViT's keys, no class", lambda: _token_cut(networks, "keys")),
        Plan("tokencut-patches", "the same on its output patches", lambda: _token_cut(networks, "patches")),
        Plan("seeded", "molt's default, no training", lambda: _seeded(networks, "default")),
        Plan("weak", "the same on the CNN alone", lambda: _seeded(networks, "weak")),
    ]


def _by_scales(networks: Networks) -> list[Plan]:
    """Rows of the trained MOLT: every scale alone, the first one, two, three together, and all of them refined."""
    try:
        sizes = networks.model("checkpoint").config.sizes
    except (NotRun, ValueError, OSError):
        sizes = tuple((side, side) for side in SIZES)  # each row will say what is missing
    order = sorted(range(len(sizes)), key=lambda scale: sizes[scale][0] * sizes[scale][1])

    def plan(name: str, does: str, scales: tuple[int, ...], refined: bool = False) -> Plan:
        return Plan(name, does, lambda: _molt(networks, "checkpoint", scales, refined), ("molt", scales, refined))

    found: list[Plan] = []
    for scale in order:
        height, width = sizes[scale]
        name = f"scale-{height}" if height == width else f"scale-{height}x{width}"
        again = sum(other.name.partition("#")[0] == name for other in found)
        name += f"#{again + 1}" if again else ""
        found.append(plan(name, f"the scale of {height} x {width} px alone", (scale,)))
    for number in range(1, len(sizes) + 1):
        some = tuple(sorted(order[:number]))
        found.append(plan(f"molt-{number}", f"the {number} smallest scales, not refined", some))
    every = tuple(range(len(sizes)))
    found.append(
        plan(f"molt-{len(sizes)}+refined", "all scales, refined by the method's own clusters", every, refined=True)
    )
    return found


def _all_scales(networks: Networks, option: str) -> Entry:
    scales = tuple(range(len(networks.model(option).config.sizes)))
    return _molt(networks, option, scales, refined=False)


def _ts_cam(networks: Networks) -> Entry:
    option = "checkpoint-ts-cam"
    config = networks.model(option).config
    if config.head == "patches" and config.pooling != "mean":
        raise NotRun(f"--{option}: its head is pooled by {config.pooling!r}, expected 'mean'")
    nearest = min(range(len(config.sizes)), key=lambda scale: abs(math.prod(config.sizes[scale]) ** 0.5 - TS_CAM_SIDE))
    return _molt(networks, option, (nearest,), refined=False, as_maps=TS_CAM_MAP)


def _molt(
    networks: Networks, option: str, scales: tuple[int, ...], refined: bool, as_maps: Mapping[str, Any] | None = None
) -> Entry:
    """Return a MOLT of some scales; ``as_maps`` changes how its maps are made, see :meth:`molt.MOLT.reconfigure`."""
    model = at_scales(networks.model(option), scales)
    head = model.config.head
    expected = EXPECTED[option]
    if head != expected:
        raise NotRun(f"--{option}: its head is {head!r}, expected {expected!r}")
    model.reconfigure(**(as_maps or {}))
    size = max(model.config.sizes, key=lambda size: size[0] * size[1])
    loc = Localizer(model, device=networks.device) if refined else None

    @torch.inference_mode()
    def see(images: Tensor, pick: Pick | None) -> tuple[Tensor, Tensor | None]:
        if loc is not None:
            if pick is None:
                return loc._maps(images, None).refined, None
            logits: Tensor = model(images)
            return loc._maps(images, pick(logits)).refined, logits
        features = model.see(images)
        logits = fused_logits(features)
        maps = model.cams(features, _wanted(logits, pick))
        target = (images.shape[2], images.shape[3])
        return ops.fuse_maps(maps, target, model.config.scale_weights, order=model.config.order), logits

    path = networks.files[option]
    weights = tuple(
        replace(info, source=info.source.replace(str(path), str(getattr(path, "name", path))))
        for info in dict.fromkeys(model.weights)
    )
    said = (
        {"scales": [list(one) for one in model.config.sizes], "head": head}
        | networks.file(option)
        | dict(as_maps or {})
    )
    return Entry(see, size, (model,), (model,), model.class_names, weights=weights, said=said)


def _cam(networks: Networks) -> Entry:
    cnn = networks.cnn

    @torch.inference_mode()
    def see(images: Tensor, pick: Pick | None) -> tuple[Tensor, Tensor | None]:
        logits = _classify(cnn, images)
        return cnn.cam(cnn(images), _wanted(logits, pick)), logits

    return _of_cnn(cnn, see, (cnn,))


def _explained(networks: Networks, name: Literal["GradCAM", "LayerCAM"]) -> Entry:
    try:
        explainer = getattr(importlib.import_module("pytorch_grad_cam"), name)
    except ImportError as error:
        raise NotRun("needs the package grad-cam: pip install grad-cam") from error
    import timm

    target = importlib.import_module("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget
    cnn = networks.cnn
    # A network of its own, as it must take gradients and hooks.
    model: Any = timm.create_model(cnn.info.model).eval()
    model.load_state_dict(cnn.model.state_dict())
    model.to(networks.device)
    explain = explainer(model=model, target_layers=[model.bn2])

    def see(images: Tensor, pick: Pick | None) -> tuple[Tensor, Tensor | None]:
        with torch.inference_mode():
            logits = _classify(cnn, images)
            wanted = _wanted(logits, pick)[:, 0].tolist()
        maps = explain(input_tensor=normalize(images.clone(), model), targets=[target(index) for index in wanted])
        model.zero_grad(set_to_none=True)
        # The package's hooks leave each batch's graph in a cycle, and few objects make a collection late. Only young
        # ones are looked at, as all would take longer than the method.
        gc.collect(1)
        return torch.from_numpy(maps)[:, None], logits

    return replace(_of_cnn(cnn, see, (cnn,)), said={"package": "grad-cam"})


def _of_cnn(cnn: CNNBackbone, see: See, networks: tuple[nn.Module, ...]) -> Entry:
    from molt.classes import imagenet_names

    names = imagenet_names()
    known = names if len(names) == cnn.num_classes else tuple(f"class {i}" for i in range(cnn.num_classes))
    return Entry(see, (SIDE, SIDE), networks, (), known, needs_class=True, weights=(cnn.info,))


def _classify(cnn: CNNBackbone, images: Tensor) -> Tensor:
    """Return logits at the size the CNN was trained at, which is also how `seeded` tells the class."""
    logits: Tensor | None = cnn(resize(images, (CLASS_SIZE, CLASS_SIZE))).logits
    assert logits is not None
    return logits


def _seeded(networks: Networks, weights: str) -> Entry:
    loc = Localizer("seeded", weights, device=networks.device, source=networks.source)
    method = loc.method
    assert isinstance(method, Seeded)

    @torch.inference_mode()
    def see(images: Tensor, pick: Pick | None) -> tuple[Tensor, Tensor | None]:
        if pick is None:
            return loc._maps(images, None).refined, None
        logits = _classify(method.cnn, images)
        return loc._maps(images, pick(logits)).refined, logits

    said = {"scales": [[side, side] for side in method.scales]}
    return Entry(see, method.size, (method,), (), method.class_names, weights=method.weights, said=said)


def _token_cut(networks: Networks, of: str) -> Entry:
    vit = networks.vit
    keys = of == "keys"
    if keys and vit.no_attention is not None:
        raise NotRun(f"the ViT gives no keys: {vit.no_attention}")

    @torch.inference_mode()
    def see(images: Tensor, pick: Pick | None) -> tuple[Tensor, Tensor | None]:
        return token_cut(vit(images, attention=keys), of=of), None

    said = {"of": of, "note": "eigenvectors on the CPU, one photo at a time"}
    return Entry(see, (SIDE, SIDE), (vit,), weights=(vit.info,), said=said)


def _centre() -> Entry:
    margin = round(CENTRE_SIDE * (1 - CENTRE) / 2)
    inside = slice(margin, CENTRE_SIDE - margin)

    def see(images: Tensor, pick: Pick | None) -> tuple[Tensor, Tensor | None]:
        maps = images.new_zeros(len(images), 1, CENTRE_SIDE, CENTRE_SIDE)
        maps[:, :, inside, inside] = 1
        return maps, None

    return Entry(see, (CENTRE_SIDE, CENTRE_SIDE))


def _wanted(logits: Tensor, pick: Pick | None) -> Tensor:
    return logits.argmax(-1, keepdim=True) if pick is None else pick(logits)
