"""One call that reads any layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from molt.data._parsing import Parsed, as_folder, is_safe
from molt.data.annotations import DataError, LocalizationSet, Problem, SetKind
from molt.data.coco import parse_coco
from molt.data.folder import parse_image_folder
from molt.data.images import photo_suffixes
from molt.data.voc import parse_voc, voc_folder
from molt.data.wsol import SPLITS, parse_wsol, split_folder
from molt.data.yolo import read_yolo

KINDS = ("auto", *get_args(SetKind))
_YAML = ("data.yaml", "data.yml")
_LOOKED_FOR = (
    "image_ids.txt (wsol), Annotations/ (voc), data.yaml (yolo), a .json file with the lists images and annotations "
    "(coco), or one folder of photos a class (folder)"
)


def read_set(
    path: str | Path,
    *,
    kind: Literal["auto"] | SetKind = "auto",
    split: str | None = None,
    photos: str | Path | None = None,
    masks: str | Path | None = None,
    classes: Sequence[str] | None = None,
    difficult: bool | None = None,
    crowd: bool | None = None,
) -> LocalizationSet:
    """Read a data set of any layout molt knows.

    Args:
        path: what holds the annotations. wsol: the metadata folder, a split's own or its parent; voc: VOC<year> or the
            VOCdevkit above; coco: the JSON file, or a folder that has one; yolo: data.yaml or its folder; folder: the
            folder of class folders, or its parent with ``split``.
        kind: the layout; "auto" looks at what is there.
        split: which part of the set; coco has one file a split and takes none.
        photos: folder the photos' names start from. wsol needs it; coco takes the JSON file's own folder if not given;
            the others know where their photos are, and take none.
        masks: wsol's folder of masks; ``photos`` if not given.
        classes: class names by label, for wsol and voc.
        difficult: of voc, keep objects marked difficult, which are left out if not given.
        crowd: of coco, keep annotations with ``iscrowd``, which are left out if not given.

    Raises:
        ValueError: an argument that the layout does not take, or lacks.
        DataError: a ValueError too: with everything that keeps the annotations from being read.
    """
    flags = {"difficult": difficult, "crowd": crowd}
    return parse_set(path, kind=kind, split=split, photos=photos, masks=masks, classes=classes, **flags).result()


def parse_set(
    path: str | Path,
    *,
    kind: str = "auto",
    split: str | None = None,
    photos: str | Path | None = None,
    masks: str | Path | None = None,
    classes: Sequence[str] | None = None,
    difficult: bool | None = None,
    crowd: bool | None = None,
) -> Parsed:
    """Collect the samples and problems of a data set; arguments as for :func:`read_set`."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if split is not None and not is_safe(split):
        raise ValueError(f"split must be the name of a part of the set, got {split!r}")
    given = as_folder(path)
    kind = recognise(given, split) if kind == "auto" else kind
    for name, value, takers in (
        ("photos", photos, ("wsol", "coco")),
        ("masks", masks, ("wsol",)),
        ("classes", classes, ("wsol", "voc")),
        ("split", split, ("folder", "wsol", "voc", "yolo")),
        ("difficult", difficult, ("voc",)),
        ("crowd", crowd, ("coco",)),
    ):
        if value is not None and kind not in takers:
            raise ValueError(f"{name}: the {kind} layout of {given} takes none, got {value!r}")
    if kind == "wsol":
        if photos is None:
            raise ValueError(f"photos: the wsol layout of {given} does not say where they are; give their folder")
        return parse_wsol(given, as_folder(photos), split, masks, classes=classes)
    if kind == "voc":
        return parse_voc(given, split, difficult=bool(difficult), classes=classes)
    if kind == "coco":
        return parse_coco(_json_file(given), None if photos is None else as_folder(photos), crowd=bool(crowd))
    if kind == "yolo":
        return _parse_yolo(given, split)
    return parse_image_folder(given if split is None else given / split)


def recognise(path: Path, split: str | None = None) -> SetKind:
    """Return the layout of what is at ``path``, by the files that are there.

    Raises:
        DataError: it is none, or class folders that look like splits; the message says what was looked for.
    """
    if path.is_file():
        if path.suffix.lower() == ".json":
            return "coco"
        if path.suffix.lower() in (".yaml", ".yml"):
            return "yolo"
        raise DataError([Problem(path, None, "a file of no known layout", _LOOKED_FOR)])
    if not path.is_dir():
        raise DataError([Problem(path, None, "no such file or folder", "a data set")])
    metadata = [path, split_folder(path, split), *(path / name for name in SPLITS)]
    if any((folder / "image_ids.txt").is_file() for folder in metadata):
        return "wsol"
    if (voc_folder(path) / "Annotations").is_dir():
        return "voc"
    if any((path / name).is_file() for name in _YAML):
        return "yolo"
    if len(list(path.glob("*.json"))) == 1 and not _has_class_folder(path):
        return "coco"
    files = sorted((path / "annotations").glob("*.json"))
    if files:
        text = f"holds {len(files)} JSON files in annotations/, one a split"
        raise DataError([Problem(path, None, text, f"one of them, such as {files[0]}, and the folder of its photos")])
    folder = path if split is None else path / split
    if _has_class_folder(folder):
        below = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if set(below) <= {*SPLITS, "valid", "validation"}:
            text = f"its folders, {', '.join(below)}, look like splits, not classes"
            raise DataError([Problem(folder, None, text, "split to be one of them, or the kind folder")])
        return "folder"
    raise DataError([Problem(folder, None, "no known layout", _LOOKED_FOR)])


def _has_class_folder(path: Path) -> bool:
    """Return whether a photo lies below one of the folders; the first one ends the search."""
    if not path.is_dir():
        return False
    folders = [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return any(file.suffix.lower() in photo_suffixes() for folder in folders for file in folder.rglob("*"))


def _json_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.json"))
    if len(files) != 1:
        raise DataError([Problem(path, None, f"holds {len(files)} JSON files", "one, or the path of one")])
    return files[0]


def _parse_yolo(path: Path, split: str | None) -> Parsed:
    found = Parsed("yolo", path.name, path, path)
    try:
        data = read_yolo(path, split)
    except DataError as error:
        found.problems += error.problems
        return found
    found.name, found.classes, found.samples = data.name, data.classes, list(data.samples)
    return found
