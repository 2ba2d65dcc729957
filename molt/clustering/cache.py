"""Label maps kept on disk, so that the clusters of a photo are computed once."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from molt import __version__
from molt._arguments import check_clusterer, check_int
from molt._backend import current
from molt._files import user_path
from molt.backbones.preprocess import check_images
from molt.clustering._cache_files import LabelFiles, clear, is_map_name
from molt.ops._checks import INTEGERS, check_size
from molt.structures import Features

FORMAT = 2  # raised when files or keys change, or one of molt's clusterers answers differently


class CachedClusterer:
    """A clusterer that keeps the label maps of another on disk, one PNG file an image.

    Labels come back bit for bit as they were computed. A file is found again by what the image's labels depend on: its
    pixels or Features, their dtype and shape, the size of the labels, the clusterer's class and settings, the type of
    device, the backend in force, and molt's version. What else they may depend on is not looked at: another PyTorch,
    another number of threads or, on a GPU, the images computed in the same pass; the labels are then those computed
    first.

    Several processes may share a folder. A file that is damaged is logged, computed again and replaced; a folder that
    cannot be written is logged once. Keys are computed on the CPU, so images on a GPU are copied from there.

    Args:
        clusterer: callable ``labels, counts = clusterer(x, size)``, see :mod:`molt.clustering`. Its attribute
            ``settings``, a dict, says all that its labels depend on; molt's own need none.
        folder: where files are kept, as ``folder/xx/HASH.png``; made when first needed.
        max_bytes: of all files, at least 1; beyond it the least recently used are removed. Processes that write at
            once may each pass it by a 64th for a while.

    Attributes:
        hits: images whose labels were found, or are those of another image of the same batch.
        misses: images whose labels were computed.

    Raises:
        TypeError: an argument of another type; a clusterer whose settings are not known, or are no plain values.
        ValueError: max_bytes below 1, or a folder that is a file.
    """

    def __init__(self, clusterer: Any, folder: str | Path, *, max_bytes: int = 2**30) -> None:
        if clusterer is None:
            raise TypeError("clusterer must be callable, such as molt.clustering.DeepClustering(), got None")
        check_clusterer(clusterer)
        self.clusterer = clusterer
        self.folder = check_folder("folder", folder)
        self.max_bytes = check_int("max_bytes", max_bytes, 1)
        self.hits = 0
        self.misses = 0
        self._files = LabelFiles(self.folder, self.max_bytes)
        _settings(clusterer)

    def __repr__(self) -> str:
        return f"CachedClusterer({self.clusterer!r}, {str(self.folder)!r})"

    @property
    def takes_features(self) -> bool:
        """Whether the clusterer is better shown Features than pixels; see :func:`molt.clustering.wants_features`."""
        return bool(getattr(self.clusterer, "takes_features", True))

    @property
    def num_clusters(self) -> Any:
        """The clusterer's own, above every label; AttributeError where it has none."""
        return self.clusterer.num_clusters

    @property
    def settings(self) -> dict[str, Any]:
        """Class and settings of the clusterer, as they go into the key."""
        return {"clusterer": _name(self.clusterer), "settings": _settings(self.clusterer)}

    def __call__(self, x: Tensor | Features, size: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return labels (B, H, W) int32 in 0..count-1 and counts (B,) int64, on the device of x.

        The clusterer is called at most once, with those images of the batch that have no file.

        Args:
            x: images (B, 3, H, W) RGB float in [0, 1], or Features.
            size: (H, W) of the labels; by default the images' own.

        Raises:
            TypeError, ValueError: images of another type or shape; labels of the clusterer that are not integers of
                that size in 0..count-1.
        """
        tensors = _tensors(x)
        device = tensors[0][1].device
        default = x.image_size if isinstance(x, Features) else (x.shape[2], x.shape[3])
        height, width = default if size is None else check_size(size)
        made = json.dumps(self._description(x, tensors, (height, width)), sort_keys=True)
        keys = _keys(made, [tensor for _, tensor in tensors])
        limit = getattr(self.clusterer, "num_clusters", None)
        limit = limit if isinstance(limit, int) else None
        found = {key: self._files.load(key, made, (height, width), limit) for key in dict.fromkeys(keys)}
        missing = [keys.index(key) for key, held in found.items() if held is None]
        if missing:
            shown = x if len(missing) == len(keys) else _pick(x, missing)
            computed = self._compute(shown, size, (len(missing), height, width))
            for image, labels, count in zip(missing, *computed, strict=True):
                self._files.store(keys[image], made, labels, count)
                found[keys[image]] = labels, count
        self.misses += len(missing)
        self.hits += len(keys) - len(missing)
        held = [entry for entry in map(found.get, keys) if entry is not None]
        stacked = np.stack([labels for labels, _ in held]) if held else np.empty((0, height, width), np.int32)
        counts = torch.tensor([count for _, count in held], dtype=torch.int64)
        return torch.from_numpy(stacked).to(device), counts.to(device)

    def _description(self, x: Any, tensors: list[tuple[str, Tensor]], size: tuple[int, int]) -> dict[str, Any]:
        """Return all that labels depend on, but for the values of the tensors."""
        return {
            "format": FORMAT,
            "molt": __version__,
            **self.settings,
            "size": size,
            "device": tensors[0][1].device.type,
            "backend": current(),
            "shown": {name: [str(tensor.dtype), *tensor.shape[1:]] for name, tensor in tensors},
            "grid": [*x.grid, *x.image_size] if isinstance(x, Features) else None,
        }

    def _compute(self, x: Any, size: Any, shape: tuple[int, int, int]) -> tuple[np.ndarray, list[int]]:
        """Return the clusterer's labels, checked."""
        labels, counts = self.clusterer(x, size)
        name = f"clusterer {_name(self.clusterer)}"
        for what, tensor, expected in (("labels", labels, shape), ("counts", counts, shape[:1])):
            if not isinstance(tensor, Tensor) or tensor.dtype not in INTEGERS or tuple(tensor.shape) != expected:
                came = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"{name}: its {what} must be a tensor of integers {expected}, got {came}")
        values, numbers = labels.cpu().numpy(), counts.tolist()
        for image, count in enumerate(numbers):
            low, high = int(values[image].min()), int(values[image].max())
            if low < 0 or high >= min(count, 2**31):
                wrong = low if low < 0 else high
                raise ValueError(f"{name}: its labels must be in 0..count-1, got {wrong} where its count is {count}")
        return values.astype(np.int32), numbers


def check_folder(name: str, value: Any) -> Path:
    """Check for a path that is a folder, or nothing yet, and return it.

    Raises:
        TypeError: another type.
        ValueError: a file, or an empty path.
    """
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path, got {type(value).__name__}")
    if not os.fspath(value):
        raise ValueError(f"{name} must be a folder, got an empty path")
    path = user_path(value)
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except OSError:
        return path  # not there yet, or out of reach, which is told at the first write
    if not is_folder:
        raise ValueError(f"{name} must be a folder, got the file {path}")
    return path


def is_label_map(path: Path, folder: Path) -> bool:
    """Return whether a file is named as a :class:`CachedClusterer` of that folder names its own: no photo."""
    return is_map_name(path.parent.name, path.name) and path.parent.parent.resolve() == folder.resolve()


def _name(clusterer: Any) -> str:
    kind = clusterer if hasattr(clusterer, "__qualname__") else type(clusterer)
    return f"{kind.__module__}.{kind.__qualname__}"


def _settings(clusterer: Any) -> dict[str, Any]:
    """Return what a clusterer says of itself.

    Raises:
        TypeError: it says nothing, or something that has no fixed JSON form.
    """
    add = "give it an attribute `settings`, a dict of plain values that says all its labels depend on"
    name = _name(clusterer)
    if hasattr(clusterer, "settings"):
        settings = clusterer.settings
        if not isinstance(settings, dict):
            kind = type(settings).__name__
            raise TypeError(f"clusterer {name} cannot be cached: its settings must be a dict, got {kind}")
    elif type(clusterer).__module__.startswith("molt.clustering."):
        settings = {name: value for name, value in vars(clusterer).items() if not name.startswith("_")}
    else:
        raise TypeError(f"clusterer {name} cannot be cached, as its settings are not known: {add}")
    for key, value in settings.items():
        if not isinstance(key, str) or not _is_plain(value):
            raise TypeError(
                f"clusterer {name} cannot be cached: its setting {key!r} must be made of numbers, strings, bools and "
                f"None, got {type(value).__name__}; {add}"
            )
    return settings


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    return value is None or isinstance(value, str | bool | int | float)


def _tensors(x: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors that a clusterer is shown, by name."""
    if not isinstance(x, Features):
        check_images(x)
        return [("images", x)]
    named = [(field.name, getattr(x, field.name)) for field in fields(x)]
    return [(name, value) for name, value in named if isinstance(value, Tensor)]


def _keys(made: str, tensors: list[Tensor]) -> list[str]:
    """Return a key an image: a hash of the description and of each tensor's bytes."""
    on_cpu = [tensor.detach().cpu() for tensor in tensors]
    keys = []
    for image in range(len(tensors[0])):
        found = hashlib.blake2b(made.encode(), digest_size=32)
        for tensor in on_cpu:
            found.update(tensor[image].contiguous().flatten().view(torch.uint8).numpy().data)
        keys.append(found.hexdigest())
    return keys


def _pick(x: Any, images: list[int]) -> Any:
    """Return some images of a batch."""
    if isinstance(x, Features):
        picked: dict[str, Any] = {name: tensor[images] for name, tensor in _tensors(x)}
        return replace(x, **picked)
    return x[images]


__all__ = ["CachedClusterer", "check_folder", "clear", "is_label_map"]
