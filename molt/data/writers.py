"""What every writer of annotations takes, checks and tells; the formats are in writers_coco, _yolo, _voc and _wsol."""

from __future__ import annotations

import operator
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from molt._text import plain_name
from molt.classes import OBJECT, OBJECT_NAME
from molt.data.annotations import Sample
from molt.data.sizes import photo_size
from molt.structures import Localization

ROUNDING = 0.01  # pixels; files with two decimals, and float32, put an edge no further out than this


@dataclass(frozen=True, eq=False)
class Annotation:
    """The boxes of one photo, as writers take them. Arrays are copied.

    Attributes:
        name: the photo's name relative to the folder of photos, with / between folders; unique in what is written.
        size: (width, height) in pixels of the EXIF-rotated photo.
        boxes: (n, 4) float64 xyxy, edges in pixels of the photo; n may be 0.
        labels: (n,) int64, index into the writer's ``classes``; -1 is the class-agnostic 'object'.
        scores: (n,) float64, finite, or None.
        present: labels the photo is known to show, boxed or not. Only wsol holds those without a box.

    Raises:
        TypeError, ValueError: a field of another type, shape or range, such as NaN or a box whose right edge is not
            right of its left one; the message names the photo.
    """

    name: str
    size: tuple[int, int]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float64] | None = None
    present: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a string, got {self.name!r}")
        try:
            sides = tuple(operator.index(side) for side in self.size)
            present = tuple(operator.index(label) for label in self.present)
        except TypeError as error:
            raise TypeError(f"{self.name!r}: size and present must hold integers ({error})") from error
        if len(sides) != 2 or min(sides) < 1:
            raise ValueError(f"{self.name!r}: size must be (width, height), each at least 1, got {self.size!r}")
        boxes = _array(self.name, "boxes", self.boxes, "fiu")
        boxes = boxes.reshape(0, 4) if boxes.shape == (0,) else boxes
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{self.name!r}: boxes must have shape (n, 4), got {boxes.shape}")
        if not np.isfinite(boxes).all():
            raise ValueError(
                f"{self.name!r}: boxes must be finite, got {boxes[~np.isfinite(boxes).all(1)][0].tolist()}"
            )
        thin = ~(boxes[:, :2] < boxes[:, 2:]).all(1)
        if thin.any():
            raise ValueError(f"{self.name!r}: boxes must have x0 < x1 and y0 < y1, got {boxes[thin][0].tolist()}")
        labels = _array(self.name, "labels", self.labels, "iu")
        if labels.shape != (len(boxes),):
            raise ValueError(f"{self.name!r}: labels must have shape ({len(boxes)},), got {labels.shape}")
        scores = None if self.scores is None else _array(self.name, "scores", self.scores, "fiu")
        if scores is not None and (scores.shape != (len(boxes),) or not np.isfinite(scores).all()):
            raise ValueError(f"{self.name!r}: scores must be finite, of shape ({len(boxes)},), got {str(scores)[:200]}")
        values = {"size": sides, "boxes": boxes, "labels": labels, "scores": scores, "present": present}
        for key, value in values.items():
            object.__setattr__(self, key, value)

    @classmethod
    def from_localization(cls, localization: Localization, name: str | None = None) -> Self:
        """Return what was found in a photo; ``name`` is that of its file if not given.

        Labels are the network's class indices, -1 for the class-agnostic 'object'.

        Raises:
            ValueError: no name is given and the localized photo was not a file.
        """
        if name is None:
            if not isinstance(localization.source, str | Path):
                raise ValueError("name must be given: this Localization does not know the file it came from")
            name = Path(localization.source).name
        return cls(
            name,
            localization.size,
            localization.boxes.detach().cpu().double().numpy(),
            localization.classes.detach().cpu().numpy(),
            localization.scores.detach().cpu().double().numpy(),
        )

    @classmethod
    def from_sample(cls, sample: Sample) -> Self:
        """Return a sample's boxes, all of its label; the photo's header is read where ``sample.size`` is None.

        Several samples of one photo become one annotation with :func:`join_samples`. Masks are not carried.

        Raises:
            PhotoError: the photo is needed and cannot be read.
            ValueError: a sample with masks and no box, of which nothing would be left.
        """
        if sample.masks and not len(sample.boxes):
            raise ValueError(f"{sample.name!r}: the sample has masks and no boxes, expected boxes")
        size = photo_size(sample.path) if sample.size is None else sample.size
        labels = np.full(len(sample.boxes), sample.label, np.int64)
        present = (sample.label,) if sample.label != OBJECT or len(labels) else ()  # else it is of no class
        return cls(sample.name, size, sample.boxes, labels, present=present)


@dataclass(frozen=True)
class Written:
    """What a writer wrote.

    Attributes:
        path: the file or folder.
        photos: number of photos.
        boxes: number of boxes.
        clipped: boxes that overhung their photo by more than 0.01 pixels and were cut, with ``clip=True``.
        unboxed: pairs of photo and label in ``present`` without a box, of which only wsol keeps a trace.
        unlinked: photos that are not where the layout has them, as no link to them could be made; copy them there.
    """

    path: Path
    photos: int
    boxes: int
    clipped: int
    unboxed: int
    unlinked: int = 0


def join_samples(samples: Iterable[Sample]) -> list[Annotation]:
    """Return one annotation a photo, in order of first appearance: samples of the same name are joined.

    Raises:
        PhotoError, ValueError: as for :meth:`Annotation.from_sample`; or samples of one name differ in size.
    """
    photos: dict[str, list[Annotation]] = {}
    for sample in samples:
        parts = photos.setdefault(sample.name, [])
        if parts and sample.size is None:
            sample = replace(sample, size=parts[0].size)  # noqa: PLW2901
        parts.append(Annotation.from_sample(sample))
    return [_join(parts) for parts in photos.values()]


def _join(parts: Sequence[Annotation]) -> Annotation:
    first = parts[0]
    sizes = sorted({part.size for part in parts})
    if len(sizes) > 1:
        raise ValueError(f"{first.name!r}: samples of one photo must have one size, got {sizes[0]} and {sizes[1]}")
    present = tuple(dict.fromkeys(label for part in parts for label in part.present))
    boxes, labels = (np.concatenate(list(arrays)) for arrays in zip(*((p.boxes, p.labels) for p in parts), strict=True))
    return Annotation(first.name, first.size, boxes, labels, present=present)


def _array(name: str, field_name: str, given: Any, kinds: str) -> NDArray[Any]:
    """Return a copy as float64, or as int64 where only integers are allowed."""
    wanted = np.float64 if "f" in kinds else np.int64
    try:
        array = np.asarray(given)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name!r}: {field_name} must be an array of numbers ({error})") from error
    if array.size and array.dtype.kind not in kinds:
        what = "numbers" if "f" in kinds else "integers"
        raise TypeError(f"{name!r}: {field_name} must hold {what}, got {array.dtype}")
    return array.astype(wanted, order="C")


def class_names(classes: Sequence[str]) -> tuple[str, ...]:
    """Return the class names as a tuple, each in its normal form.

    Raises:
        TypeError: not a sequence of strings.
        ValueError: no class, one without a name, or two of one name.
    """
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise TypeError(f"classes must be a sequence of names, got {classes!r:.200}")
    names = tuple(map(plain_name, classes))
    if not all(names) or not names:
        raise ValueError(f"classes must be at least one name, none of them empty, got {names!r:.200}")
    for name, times in Counter(names).items():
        if times > 1:
            raise ValueError(f"classes must have different names, got {name!r} {times} times: readers refuse it")
    return names


def check_relative(name: str) -> str:
    """Return the photo's name.

    Raises:
        ValueError: it is not a plain path below a folder: empty, absolute, with ``..``, a backslash, a drive (``C:``),
            a null character, or parts that say nothing (``./``, ``//``), as two spellings of one file's name would
            look like two files.
    """
    path = PurePosixPath(name)
    unsafe = path.is_absolute() or name == "." or set("\\\0") & set(name) or re.match("[A-Za-z]:", name)
    if not name.strip() or str(path) != name or unsafe:
        raise ValueError(f"name must be a plain path below the folder of photos, got {name!r}")
    if ".." in path.parts:
        raise ValueError(f"name must not lead out of the folder of photos, got {name!r}")
    return name


def check_line(text: str, what: str, without: str = "") -> str:
    """Return a text that a line of a UTF-8 file, or XML, can hold.

    Raises:
        ValueError: it has control characters, line breaks, lone surrogates, blanks at its ends or one of ``without``.
    """
    bad = [c for c in text if c in without or not _holds(ord(c))]
    if bad or text != text.strip():
        why = f"holds {bad[0]!r}" if bad else "begins or ends with a blank"
        raise ValueError(f"{what} {text!r} cannot be written in this format: it {why}")
    return text


def _holds(code: int) -> bool:
    return not (
        code < 0x20
        or 0x7F <= code <= 0x9F
        or code in (0x2028, 0x2029, 0xFFFE, 0xFFFF)  # line breaks to str.splitlines; no characters in XML
        or 0xD800 <= code <= 0xDFFF
    )


def stem(name: str) -> str:
    """Return a photo's name without its last suffix, its folders kept."""
    return str(PurePosixPath(name).with_suffix(""))


def place_in(folder: Path, relative: str) -> Path:
    """Return the path of a file below ``folder``.

    Raises:
        ValueError: a link leads out of the folder.
    """
    target = folder / relative
    if not target.parent.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder}: a link leads {PurePosixPath(relative).parent} out of it")
    return target


def link(place: Path, to: Path, relative: bool = False) -> bool:
    """Make a link to a photo or a folder of photos, unless something is there; return whether there now is.

    A link that leads elsewhere, or nowhere, is replaced. Some systems and disks have no links.
    """
    if not to.exists():
        return False
    try:
        if place.is_symlink() and place.resolve() != to.resolve():
            place.unlink()
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            target = to.absolute()
            place.symlink_to(os.path.relpath(target, place.parent.resolve()) if relative else target, to.is_dir())
    except (OSError, ValueError):  # ValueError: another drive
        return False
    return True


def whole_pixels(boxes: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.int64]:
    """Return (n, 4) int64 edges: each goes to the nearest pixel border, halves to the right and down.

    A box that would vanish takes the pixel its centre is in. Boxes must lie in the photo, and then still do.
    """
    edges = np.floor(boxes + 0.5).astype(np.int64).reshape(-1, 2, 2)
    limits = np.array(size, np.int64)
    centre = np.minimum(np.floor((boxes[:, :2] + boxes[:, 2:]) / 2).astype(np.int64), limits - 1)
    gone = edges[:, 0] >= edges[:, 1]
    edges[:, 0] = np.where(gone, centre, edges[:, 0])
    edges[:, 1] = np.where(gone, centre + 1, edges[:, 1])
    return edges.reshape(-1, 4)


@dataclass
class Checker:
    """Checks annotations one by one against what all formats hold, and counts.

    Args:
        classes: names by label.
        clip: cut boxes that overhang their photo; False refuses them.
        key: what must differ between two photos, of a name; it may refuse a name.
    """

    classes: tuple[str, ...]
    clip: bool
    key: Callable[[str], str]
    photos: int = 0
    boxes: int = 0
    clipped: int = 0
    unboxed: int = 0
    seen: dict[str, str] = field(default_factory=dict)

    def each(self, items: Iterable[Annotation]) -> Iterator[Annotation]:
        """Yield each item with its boxes in the photo and its labels in 0..len(classes)-1."""
        for item in items:
            if not isinstance(item, Annotation):
                raise TypeError(f"items must be Annotations, got {type(item).__name__}")
            self.name(item.name)
            labels = self._labels(item)
            present = tuple(self._label(label, item.name) for label in item.present)
            boxes = self._boxes(item)
            self.photos += 1
            self.boxes += len(boxes)
            self.unboxed += len(set(present) - set(labels.tolist()))
            yield replace(item, boxes=boxes, labels=labels, present=present)

    def name(self, name: str) -> None:
        """Check a name alone."""
        key = self.key(check_relative(name))
        other = self.seen.get(key)
        if other == name:
            raise ValueError(f"name must be that of one item, got {name!r} twice")
        if other is not None:
            raise ValueError(f"the photos {other!r} and {name!r} would share one annotation file ({key!r})")
        self.seen[key] = name

    def written(self, path: Path) -> Written:
        """Return the counts."""
        return Written(path, self.photos, self.boxes, self.clipped, self.unboxed)

    def _label(self, label: int, name: str) -> int:
        if 0 <= label < len(self.classes):
            return label
        if label == OBJECT and OBJECT_NAME in self.classes:
            return self.classes.index(OBJECT_NAME)
        hint = f"; for -1 classes must hold {OBJECT_NAME!r}" if label == OBJECT else ""
        raise ValueError(f"{name!r}: labels must be in 0..{len(self.classes) - 1}, got {label}{hint}")

    def _labels(self, item: Annotation) -> NDArray[np.int64]:
        return np.array([self._label(label, item.name) for label in item.labels.tolist()], np.int64)

    def _boxes(self, item: Annotation) -> NDArray[np.float64]:
        width, height = item.size
        inside = item.boxes.clip(0, (width, height, width, height))
        overhang = np.abs(inside - item.boxes).max(axis=1, initial=0) > ROUNDING
        if overhang.any():
            box = item.boxes[overhang][0].tolist()
            if not self.clip:
                raise ValueError(
                    f"{item.name!r}: box {box} is not in the photo of {width}x{height} pixels; clip=True cuts it"
                )
            self.clipped += int(overhang.sum())
        gone = ~(inside[:, :2] < inside[:, 2:]).all(1)
        if gone.any():
            box = item.boxes[gone][0].tolist()
            raise ValueError(f"{item.name!r}: box {box} lies outside the photo of {width}x{height} pixels")
        return inside
