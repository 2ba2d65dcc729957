"""Where the maps of `molt evaluate` come from: a method of molt, a baseline, or a folder."""

from __future__ import annotations

import csv
import gc
import importlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molt._words import count
from molt.classes import OBJECT, find_class, imagenet_names
from molt.cli._sets import check_files
from molt.data.annotations import LocalizationSet, Problem, Sample
from molt.data.images import PhotoError, read_photo
from molt.evaluation.maps import MapError, Missing, Normalize, StoredMaps

if TYPE_CHECKING:
    from molt.localizer import Localizer

CENTRE = 0.7  # of each side
GT_MAPS = ("label", "top1", "agnostic")
BASELINES = ("centre", "full", "cam", "layercam")
Map = NDArray | Exception
Groups = dict[int, tuple[int, ...]]
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
    """

    method: str
    gt_map: str = "label"
    class_map: Path | None = None
    missing: Missing = "stop"
    size: int = 224
    device: str | None = None
    source: str = "auto"
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Provider:
    """Maps of photos, and what to say of them.

    Attributes:
        maps: gives one map, or exception, a sample.
        about: plain values for the run: name, weights...
        normalize: what must be done with them, or None where the user may choose.
        problems: found before the first photo.
        usual: what is done with them where the user does not choose.
    """

    maps: Callable[[Sequence[Sample]], Iterator[Map]]
    about: dict[str, Any]
    normalize: Normalize | None = None
    problems: tuple[Problem, ...] = field(default=())
    usual: Normalize = "minmax"


def provider(wanted: Wanted, data: LocalizationSet) -> Provider:
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
        stored = StoredMaps(name.removeprefix("maps:"), data.samples, missing=wanted.missing)
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
        found = wanted.checkpoint.stat()
        about["checkpoint"] = f"{wanted.checkpoint}, {found.st_size} bytes, changed at {found.st_mtime_ns} ns"
    see = {"cam": _cam, "layercam": _layer_cam(loc, explainer)}.get(name, _refined)
    return Provider(_Network(loc, see, classes, agnostic=wanted.gt_map == "agnostic"), about, None, tuple(problems))


def network_classes(
    data: LocalizationSet, known: tuple[str, ...], class_map: Path | None
) -> tuple[Groups, list[Problem]]:
    """Return the network's class indices, -1 for 'object', by label of the set, and labels that have none.

    Without a file a class is found by name, by WordNet id where the network knows ImageNet's classes, or by its number
    where the set has as many classes as the network. A class in the file that the network lacks is a problem, and its
    photos count as missed.

    Raises:
        ValueError: classes that are not the network's, or a file that does not hold.
    """
    used = Counter(sample.label for sample in data.samples)
    said = {} if class_map is None else _read_class_map(class_map)
    numbers = len(data.classes) == len(known)
    ids = _wordnet_ids(known)
    found: Groups = {}
    wrong: list[tuple[int, str]] = []
    for label in sorted(used):
        name = data.classes[label] if 0 <= label < len(data.classes) else str(label)
        try:
            if class_map is not None:
                if name not in said:
                    raise ValueError(f"class {name!r} is not in {class_map}")
                found[label] = _group(said[name], known)
            elif name in ids:
                found[label] = (ids[name],)
            elif not numbers and name.removeprefix("-").isdecimal():
                raise ValueError(f"class {name!r} is a number, and the set has {count(len(data.classes), 'class')}")
            else:
                found[label] = (find_class(name, known),)
        except ValueError as error:
            wrong.append((label, f"{name}: {error}"))
    if wrong and (class_map is None or any("is not in" in text for _, text in wrong)):
        listed = "; ".join(text for _, text in wrong[:3]) + ("; ..." if len(wrong) > 3 else "")
        photos = sum(used[label] for label, _ in wrong)
        raise ValueError(
            f"{len(wrong)} of the set's {count(len(used), 'class')} ({count(photos, 'photo')}) "
            f"{'is' if len(wrong) == 1 else 'are'} not among the network's {len(known)}: {listed}. Say which are meant "
            "with --class-map FILE (lines: class name, network class name or index, or object), or take --gt-map top1 "
            "or agnostic"
        )
    expected = f"a class of the network, 0 to {len(known) - 1}; its photos count as missed"
    return found, [
        Problem(class_map or Path(data.name), None, f"{text} ({count(used[label], 'photo')})", expected)
        for label, text in wrong
    ]


class _Network:
    """Maps of a network: reads the photos of a batch, and asks for each photo's class."""

    def __init__(
        self,
        loc: Localizer,
        see: Callable[[Localizer, Tensor, Tensor | None], Tensor],
        classes: Groups | None,
        *,
        agnostic: bool,
    ) -> None:
        self.loc, self.see, self.classes, self.agnostic = loc, see, classes, agnostic

    def __call__(self, samples: Sequence[Sample]) -> Iterator[Map]:
        """Yield a map, or why there is none, of each sample."""
        found: list[Map | None] = []
        pixels, groups = [], []
        for sample in samples:
            try:
                group = (OBJECT,) if self.classes is None else self.classes.get(sample.label)
                if group is None:
                    raise MapError(f"the network has no class for label {sample.label}", "a class of the network")
                pixels.append(read_photo(sample.path, self.loc.method.size).pixels)
                groups.append(group)
                found.append(None)
            except (PhotoError, OSError, MapError) as error:
                found.append(error)
        maps = iter(self._seen(pixels, groups))
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
    def _wanted(self, images: Tensor, groups: list[tuple[int, ...]]) -> Tensor:
        """Return (B, 1) the class of each photo, of several the one that the CNN holds likeliest."""
        chosen = [group[0] for group in groups]
        several = [i for i, group in enumerate(groups) if len(group) > 1]
        if several:
            from molt.backbones.preprocess import resize

            cnn: Any = self.loc.method.cnn
            logits = cnn(resize(images[several], (CLASS_SIDE, CLASS_SIDE))).logits
            for i, scores in zip(several, logits, strict=True):
                chosen[i] = groups[i][int(scores[list(groups[i])].argmax())]
        return torch.tensor(chosen, dtype=torch.int64, device=self.loc.device)[:, None]


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

    from molt.backbones.preprocess import normalize, resize

    target = importlib.import_module("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget
    cnn: Any = loc.method.cnn
    model = timm.create_model(cnn.info.model).eval()
    model.load_state_dict(cnn.model.state_dict())
    explain = explainer(model=model.to(loc.device), target_layers=[model.bn2])

    def see(_: Localizer, images: Tensor, wanted: Tensor | None) -> Tensor:
        if wanted is None:
            with torch.inference_mode():
                wanted = cnn(resize(images, (224, 224))).logits.argmax(-1, keepdim=True)
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


def _group(texts: Sequence[str], known: tuple[str, ...]) -> tuple[int, ...]:
    """Return the network's classes behind names, indices and ranges such as 80-100, each once.

    Raises:
        ValueError: one that the network lacks, or 'object' among others.
    """
    found: list[int] = []
    for text in texts:
        if span := re.fullmatch(r"(\d{1,9})-(\d{1,9})", text):
            first, last = int(span[1]), int(span[2])
            if not first <= last < len(known):
                raise ValueError(f"{text!r} is no range of classes 0 to {len(known) - 1}")
            found += range(first, last + 1)
        else:
            found.append(find_class(text, known))
    if OBJECT in found and len(set(found)) > 1:
        raise ValueError("'object' is no class among others")
    return tuple(dict.fromkeys(found))


def _read_class_map(path: Path) -> dict[str, list[str]]:
    """Return the network classes, as written, by class name.

    Raises:
        ValueError: a line that has not two columns, or a file that cannot be read.
    """
    found: dict[str, list[str]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if not row:
                    continue
                # A network class may hold commas itself: tabby, tabby cat.
                name, text = row[0].strip(), ", ".join(part.strip() for part in row[1:] if part.strip())
                if not name or not text:
                    raise ValueError(f"--class-map {path}:{number}: got {row!r}, expected name,network class")
                found.setdefault(name, []).append(text)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"--class-map {path}: cannot be read ({error})") from error
    return found


def _wordnet_ids(known: tuple[str, ...]) -> dict[str, int]:
    """Return ImageNet's WordNet ids by number where these are the network's classes."""
    from timm.data.imagenet_info import ImageNetInfo

    return {} if known != imagenet_names() else {name: i for i, name in enumerate(ImageNetInfo().label_names())}
