"""Where the maps of `molt evaluate` come from: a method of molt, a baseline, or a folder."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molt.classes import OBJECT, imagenet_names
from molt.cli._network_classes import Groups, network_classes
from molt.cli._sets import check_files
from molt.data.annotations import LocalizationSet, Problem, Sample
from molt.data.images import PhotoError, read_photo
from molt.evaluation.maps import MapError, Missing, Normalize, StoredMaps
from molt.evaluation.predictions import Predictions, place
from molt.methods.evidence import Evidence, Method

if TYPE_CHECKING:
    from molt.localizer import Localizer

CENTRE = 0.7  # of each side
GT_MAPS = ("label", "top1", "agnostic")
BASELINES = ("centre", "full", "cam", "layercam")
Map = NDArray | Exception
CLASS_SIDE = 224  # px, where a class is decided


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        method: ``default``, ``weak``, a method's name, ``cam``, ``layercam``, ``centre``, ``full`` or ``maps:FOLDER``.
        gt_map: whose map counts: ``"label"``, the photo's class; ``"top1"``, the likeliest; ``"agnostic"``, none's.
        class_map: CSV of class name and network class, index or range of indices, or None; several lines of one name
            mean whichever of these is the likeliest on the photo.
        missing: see :class:`molt.evaluation.maps.StoredMaps`.
        size: side of the square the maps are compared on.
        device: ``"cpu"``, ``"cuda"``... or None.
        source: where weights come from.
        checkpoint: of a trained model.
        predictions: CSV of the likeliest classes of each photo, in place of the network's own, or None.
        whole: all samples of the set, where some were drawn, or None.
        any_object: whether the photos' own classes are given up, and with them maps of one label.
    """

    method: str
    gt_map: str = "label"
    class_map: Path | None = None
    missing: Missing = "stop"
    size: int = 224
    device: str | None = None
    source: str = "auto"
    checkpoint: Path | None = None
    predictions: Path | None = None
    whole: Sequence[Sample] | None = None
    any_object: bool = False


@dataclass(frozen=True)
class Provider:
    """Maps of photos, and what to say of them.

    Attributes:
        maps: gives one map, or exception, a sample.
        about: plain values for the run: name, weights...
        normalize: what must be done with them, or None where the user may choose.
        problems: found before the first photo.
        usual: what is done with them where the user does not choose.
        ranks: gives the place of each sample's label among the predicted classes, after its map; None where no class is
            predicted.
    """

    maps: Callable[[Sequence[Sample]], Iterator[Map]]
    about: dict[str, Any]
    normalize: Normalize | None = None
    problems: tuple[Problem, ...] = field(default=())
    usual: Normalize = "minmax"
    ranks: Callable[[Sequence[Sample]], list[int | None]] | None = None


def provider(wanted: Wanted, data: LocalizationSet) -> Provider:
    """Return what gives the maps asked for, and the classes; arguments and errors as for :func:`_maps_of`."""
    if wanted.predictions is None:
        return _maps_of(wanted, data)
    read = Predictions(wanted.predictions, data.samples, data.classes, missing=wanted.missing, of=wanted.whole)
    found = _maps_of(wanted, data)
    about = found.about | {"predictions": _file_said(wanted.predictions)}
    return replace(found, about=about, problems=(*found.problems, *read.problems), ranks=read)


def _maps_of(wanted: Wanted, data: LocalizationSet) -> Provider:
    """Return what gives the maps asked for; a network is loaded now, and what cannot work is told now.

    Raises:
        ValueError: an unknown method or option, or classes the network does not know.
        DataError: photos or masks that are not there, unless missing ones count as zero.
        ImportError: a package that the method needs.
        FileNotFoundError: weights that are nowhere to be had.
    """
    from molt.methods import METHODS

    name = wanted.method
    for option, value, choices in (("gt-map", wanted.gt_map, GT_MAPS), ("missing", wanted.missing, get_args(Missing))):
        if value not in choices:
            raise ValueError(f"--{option} {value}: expected {', '.join(choices)}")
    if name == "maps:":
        raise ValueError("--method maps: names no folder, expected maps:FOLDER")
    needed = [path for sample in data.samples for path in (*sample.masks, *([sample.ignore] if sample.ignore else []))]
    if not name.startswith("maps:") and name not in ("centre", "full"):
        needed += [sample.path for sample in data.samples]
    if wanted.missing == "stop":
        check_files(needed)
    if name.startswith("maps:"):
        stored = StoredMaps(
            name.removeprefix("maps:"),
            data.samples,
            missing=wanted.missing,
            of=wanted.whole,
            labelled=not wanted.any_object,
        )
        about_maps = {"name": name, "missing": wanted.missing, "files": stored.stamp, "weights": []}
        return Provider(stored, about_maps, None, stored.problems, stored.normalize)
    if name in ("centre", "full"):
        return Provider(_box_maps(name, wanted.size), {"name": name, "weights": []}, "none")
    known = ("default", "weak", *METHODS, *BASELINES, "maps:FOLDER")
    if name not in known:
        raise ValueError(f"--method {name}: expected {', '.join(known)}")
    if wanted.class_map is not None and wanted.gt_map != "label":
        raise ValueError(f"--class-map: goes with --gt-map label only, got {wanted.gt_map}")
    explainer = _layer_cam_class() if name == "layercam" else None
    if explainer is not None and wanted.gt_map == "agnostic":
        raise ValueError("--gt-map agnostic: layercam needs a class, expected label or top1")

    import molt.localizer

    weights = "weak" if name in ("weak", "cam", "layercam") else "default"
    method = name if name in METHODS else "seeded"
    classes: Groups | None = None
    problems: list[Problem] = []
    if wanted.gt_map == "label" and method == "seeded":  # told before its networks are loaded
        classes, problems = network_classes(data, imagenet_names(), wanted.class_map)
    loc = molt.localizer.Localizer(
        method, weights, device=wanted.device, source=wanted.source, checkpoint=wanted.checkpoint
    )
    if wanted.gt_map == "label" and classes is None:
        classes, problems = network_classes(data, loc.method.class_names, wanted.class_map)
    about: dict[str, Any] = {"name": name, "gt_map": wanted.gt_map, "weights": [info.to_json() for info in loc.weights]}
    if classes is not None:
        several = [label for label, group in classes.items() if len(group) > 1]
        if several and not hasattr(loc.method, "cnn"):
            raise ValueError(f"--class-map: {data.classes[several[0]]!r} has several classes; {name} takes one each")
        about["classes"] = {str(label): list(group) for label, group in sorted(classes.items())}
    if wanted.checkpoint is not None:
        about["checkpoint"] = _file_said(wanted.checkpoint)
    see = {"cam": _cam, "layercam": _layer_cam(loc, explainer)}.get(name, _refined)
    ranked = None if wanted.any_object else _ranked(loc, classes, data)
    maps = _Network(loc, see, classes, agnostic=wanted.gt_map == "agnostic", ranked=ranked)
    return Provider(maps, about, None, tuple(problems), ranks=None if ranked is None else maps.ranks)


def _file_said(path: Path) -> str:
    """Return what tells a file from another, or from itself after a change."""
    found = path.stat()
    return f"{path}, {found.st_size} bytes, changed at {found.st_mtime_ns} ns"


def _ranked(loc: Localizer, classes: Groups | None, data: LocalizationSet) -> Groups | None:
    """Return the network's classes by label, for Top-k, or None where it predicts none of these."""
    if not hasattr(loc.method, "register_forward_hook"):
        return None  # no network whose probabilities could be seen
    if classes is None:  # whose map counts needs no class of the set, and some sets have others
        try:
            classes = network_classes(data, loc.method.class_names, None)[0]
        except ValueError:
            return None
    return None if any(OBJECT in group for group in classes.values()) else classes


class _Network:
    """Maps of a network: reads the photos of a batch, and asks for each photo's class."""

    def __init__(
        self,
        loc: Localizer,
        see: Callable[[Localizer, Tensor, Tensor | None], Tensor],
        classes: Groups | None,
        *,
        agnostic: bool,
        ranked: Groups | None = None,
    ) -> None:
        self.loc, self.see, self.classes, self.agnostic, self.ranked = loc, see, classes, agnostic, ranked
        self._probabilities: Tensor | None = None  # of the batch that was seen last
        self._ranks: dict[tuple[str, int], int] = {}
        if ranked is not None:
            loc.method.register_forward_hook(self._note)

    def ranks(self, samples: Sequence[Sample]) -> list[int | None]:
        """Return the place of each label among the classes of the photos whose maps were given last."""
        return [self._ranks.get((sample.name, sample.label)) for sample in samples]

    def _note(self, method: Method, images: object, evidence: Evidence) -> None:
        self._probabilities = evidence.all_probabilities

    def __call__(self, samples: Sequence[Sample]) -> Iterator[Map]:
        """Yield a map, or why there is none, of each sample."""
        found: list[Map | None] = []
        pixels, groups, read = [], [], []
        for sample in samples:
            try:
                group = (OBJECT,) if self.classes is None else self.classes.get(sample.label)
                if group is None:
                    raise MapError(f"the network has no class for label {sample.label}", "a class of the network")
                pixels.append(read_photo(sample.path, self.loc.method.size).pixels)
                groups.append(group)
                read.append(sample)
                found.append(None)
            except (PhotoError, OSError, MapError) as error:
                found.append(error)
        maps = iter(self._seen(pixels, groups))
        if self.ranked is not None:
            self._rank(pixels, read)
        for entry in found:
            yield next(maps) if entry is None else entry

    def _seen(self, pixels: list[Tensor], groups: list[tuple[int, ...]]) -> list[Map]:
        if not pixels:
            return []
        images = torch.stack(pixels).to(self.loc.device)
        wanted = self._wanted(images, groups) if self.classes is not None or self.agnostic else None
        seen = self.see(self.loc, images, wanted)
        return [values.numpy() for values in seen[:, 0].detach().float().cpu()]

    @torch.inference_mode()
    def _rank(self, pixels: list[Tensor], samples: list[Sample]) -> None:
        self._ranks = {}
        if not pixels:
            return
        if self._probabilities is None:  # LayerCAM asks the CNN alone
            cnn: Any = self.loc.method.cnn
            self._probabilities = cnn(_at_class_side(torch.stack(pixels).to(self.loc.device))).logits
        assert self.ranked is not None
        for sample, row in zip(samples, self._probabilities.float().cpu(), strict=True):
            if group := self.ranked.get(sample.label):
                self._ranks[sample.name, sample.label] = place(row, group)
        self._probabilities = None

    @torch.inference_mode()
    def _wanted(self, images: Tensor, groups: list[tuple[int, ...]]) -> Tensor:
        """Return (B, 1) the class of each photo, of several the one that the CNN holds likeliest."""
        chosen = [group[0] for group in groups]
        several = [i for i, group in enumerate(groups) if len(group) > 1]
        if several:
            cnn: Any = self.loc.method.cnn
            logits = cnn(_at_class_side(images[several])).logits
            for i, scores in zip(several, logits, strict=True):
                chosen[i] = groups[i][int(scores[list(groups[i])].argmax())]
        return torch.tensor(chosen, dtype=torch.int64, device=self.loc.device)[:, None]


def _at_class_side(images: Tensor) -> Tensor:
    from molt.backbones.preprocess import resize

    return resize(images, (CLASS_SIDE, CLASS_SIDE))


def _refined(loc: Localizer, images: Tensor, wanted: Tensor | None) -> Tensor:
    return loc._maps(images, wanted).refined


@torch.inference_mode()
def _cam(loc: Localizer, images: Tensor, wanted: Tensor | None) -> Tensor:
    cam: Tensor = loc.method(images, wanted, 1, loc._stage).cam
    return cam


def _layer_cam_class() -> Any:
    try:
        return importlib.import_module("pytorch_grad_cam").LayerCAM
    except ImportError as error:
        raise ImportError("--method layercam needs the package grad-cam: pip install grad-cam") from error


def _layer_cam(loc: Localizer, explainer: Any) -> Callable[[Localizer, Tensor, Tensor | None], Tensor]:
    """Return LayerCAM of the package grad-cam on the CNN's last maps, at the photos' full size."""
    if explainer is None:
        return _cam
    import timm

    from molt.backbones.preprocess import normalize

    target = importlib.import_module("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget
    cnn: Any = loc.method.cnn
    model = timm.create_model(cnn.info.model).eval()
    model.load_state_dict(cnn.model.state_dict())
    explain = explainer(model=model.to(loc.device), target_layers=[model.bn2])

    def see(_: Localizer, images: Tensor, wanted: Tensor | None) -> Tensor:
        if wanted is None:
            with torch.inference_mode():
                wanted = cnn(_at_class_side(images)).logits.argmax(-1, keepdim=True)
        targets = [target(int(index)) for index in wanted[:, 0]]
        maps = explain(input_tensor=normalize(images.clone(), model), targets=targets)
        gc.collect()  # the package's hooks leave each batch's graph in a cycle, and few objects make a collection late
        return torch.from_numpy(np.asarray(maps))[:, None]

    return see


def _box_maps(name: str, size: int) -> Callable[[Sequence[Sample]], Iterator[NDArray]]:
    """Return the map of a box in the middle, or of the whole photo."""
    margin = 0 if name == "full" else round(size * (1 - CENTRE) / 2)
    values = np.zeros((size, size), np.float32)
    values[margin : size - margin, margin : size - margin] = 1

    def maps(samples: Sequence[Sample]) -> Iterator[NDArray]:
        for _ in samples:
            yield values

    return maps
