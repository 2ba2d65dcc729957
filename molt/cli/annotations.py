"""The boxes of a run of `molt localize` as one annotated set: `--annotations`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from molt._text import readable

if TYPE_CHECKING:
    from molt.data.writers import Annotation, Written
    from molt.structures import Localization

PLACES = {"coco": "molt-coco.json", "yolo": "molt-yolo", "voc": "molt-voc"}


@dataclass
class BoxSet:
    """Boxes found so far and where they go.

    Attributes:
        kind: coco, yolo or voc.
        target: the file, or the folder.
        base: folder that photos' names start from.
        classes: names by label, once :meth:`name_classes` was called.
        found: what was found, by photo's name: a photo given twice is in the set once.
        unwritable: why a photo cannot be in a set of this format, by its name.
    """

    kind: str
    target: Path
    base: Path
    classes: tuple[str, ...] = ()
    found: dict[str, Annotation] = field(default_factory=dict)
    unwritable: dict[str, str] = field(default_factory=dict)

    @property
    def images(self) -> Path | None:
        """The folder of photos to link to; YOLO's is linked as a whole, which is never that of the whole machine."""
        return self.base if self.kind != "yolo" or self.base != self.base.parent else None

    def name_of(self, photo: Path) -> str:
        """Return the photo's path below the folder that all inputs share."""
        return Path(os.path.abspath(photo)).relative_to(self.base).as_posix()  # noqa: PTH100 - links are kept

    def name_classes(self, names: Sequence[str], wanted: Iterable[str]) -> None:
        """Set the classes: the network's, so that labels are the same in every run; 'object' alone, or after them.

        Names that several classes share get their index.

        Raises:
            ValueError: the folder is there and holds a set of other classes or photos.
        """
        from molt.classes import OBJECT, OBJECT_NAME, find_class
        from molt.data.writers_yolo import check_folder

        times = Counter(names)
        classes = tuple(f"{name} ({i})" if times[name] > 1 else name for i, name in enumerate(names))
        labels = {find_class(name, tuple(names)) for name in wanted}
        if labels == {OBJECT}:
            classes = (OBJECT_NAME,)
        elif OBJECT in labels and OBJECT_NAME not in classes:
            classes += (OBJECT_NAME,)
        # XML holds no bytes that are no text; what a class is called there is for people.
        self.classes = tuple(map(readable, classes)) if self.kind == "voc" else classes
        if self.kind == "yolo":
            check_folder(self.target, classes, self.images)

    def add(self, photo: Path, result: Localization) -> None:
        """Take the boxes of one photo.

        Raises:
            ValueError: the format cannot hold its name.
        """
        from molt.data.writers import Annotation

        name = self.name_of(photo)
        if name in self.unwritable:
            raise ValueError(self.unwritable[name])
        self.found[name] = Annotation.from_localization(result, name=name)

    def write(self) -> Written:
        """Write all boxes.

        Raises:
            OSError, ValueError: they could not be written.
        """
        from molt.data import write_coco, write_voc, write_yolo

        items = self.found.values()
        if self.kind == "coco":
            return write_coco(self.target, items, self.classes, clip=True)
        if self.kind == "voc":
            return write_voc(self.target, items, self.classes, images=self.images, clip=True)
        return write_yolo(self.target, items, self.classes, images=self.images, clip=True)


def plan(kind: str | None, to: Path | None, out: Path | None, paths: list[Path], photos: list[Path]) -> BoxSet | None:
    """Return where boxes go, or None where none are asked for; what cannot be written is told before a network runs.

    Args:
        kind: coco, yolo or voc.
        to: the file or folder; None takes molt's own name in ``out``.
        out: folder of the other outputs.
        paths: the inputs; the folder they share is where names start.
        photos: those found below them.

    Raises:
        ValueError: an option that does not fit, or photos that the format cannot tell apart.
    """
    if kind is None:
        if to is not None:
            raise ValueError(f"--annotations-to {to}: in which format? Give it with --annotations coco, yolo or voc")
        return None
    if kind not in PLACES:
        raise ValueError(f"--annotations must be one of {', '.join(PLACES)}, got {kind!r}")
    if to is None and out is None:
        raise ValueError(f"--annotations {kind}: where to? Give it with --annotations-to PATH, or --out")
    target = to if to is not None else (out or Path()) / PLACES[kind]
    if target.exists() and target.is_dir() == (kind == "coco"):
        raise ValueError(f"--annotations-to {target}: is a {'folder, expected a file' if kind == 'coco' else 'file'}")
    if target.resolve() in {photo.resolve() for photo in photos}:
        raise ValueError(f"--annotations-to {target}: is a photo given as input")
    boxes = BoxSet(kind, target, _shared(paths))
    _check_names(boxes, photos)
    return boxes


def _shared(paths: list[Path]) -> Path:
    """Return the folder that all inputs, each a folder or a photo, are below; missing inputs do not count."""
    there = [Path(os.path.abspath(path)) for path in paths if path.exists()]  # noqa: PTH100 - links are kept
    folders = [path if path.is_dir() else path.parent for path in there]
    return Path(os.path.commonpath(folders)) if folders else Path.cwd()


def _check_names(boxes: BoxSet, photos: list[Path]) -> None:
    """Note the photos whose names are no text of the format; they fail alone, as the others can be written."""
    from molt.data.writers import Checker, check_line, check_relative
    from molt.data.writers_voc import voc_stem
    from molt.data.writers_yolo import yolo_label

    keys: dict[str, Callable[[str], str]] = {"coco": str, "voc": voc_stem, "yolo": yolo_label}
    checker = Checker((), False, keys[boxes.kind])
    names = dict.fromkeys(map(boxes.name_of, photos))
    for name in names:
        try:
            check_relative(name if boxes.kind == "coco" else check_line(name, "the name"))
        except ValueError as error:
            boxes.unwritable[name] = str(error)
    try:
        for name in names:
            if name not in boxes.unwritable:
                checker.name(name)
    except ValueError as error:
        raise ValueError(f"--annotations {boxes.kind}, photos below {boxes.base}: {error}") from error
