"""One call that reads any layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from molt._files import user_path
from molt._words import count
from molt.data import cub
from molt.data._layouts import (
    MAYBE,
    PARTS,
    TRUTH,
    are_roles,
    files,
    folders,
    holds,
    is_coco,
    masks_among,
    refuse,
    split_folder,
    split_word,
    splits,
    unpacked,
)
from molt.data._parsing import Parsed, is_safe
from molt.data.annotations import DataError, LocalizationSet, Problem, SetKind
from molt.data.coco import parse_coco
from molt.data.folder import is_wordnet_id, parse_image_folder
from molt.data.images import photo_suffixes
from molt.data.table import is_table, parse_table
from molt.data.voc import parse_voc, voc_folder, voc_places
from molt.data.wsol import SPLITS, parse_wsol
from molt.data.wsol import split_folder as wsol_folder
from molt.data.yolo import names_file, read_yolo

KINDS = ("auto", *get_args(SetKind))
_YAML = ("data.yaml", "data.yml")
_LOOKED_FOR = (
    "image_ids.txt (wsol), images.txt and image_class_labels.txt (cub), Annotations/ of XML, or XML beside photos "
    "(voc), data.yaml, or classes.txt with labels/ (yolo), a .json file with the lists images and annotations (coco), "
    "a .csv file of path,label (csv), or one folder of photos a class (folder)"
)
_LOOKED_INTO = 100  # class folders; thousands take time, and all are alike
_LISTS = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".mat")  # that may say the classes of photos
_WITH_TABLE = PARTS | {"train", "test", "val"}  # folders beside a table of labels that are no classes


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
            VOCdevkit above; coco: the JSON file, or a folder that has one; yolo: data.yaml or its folder, or one with
            classes.txt, images and labels; cub: the folder of images.txt; csv: the file, or its folder; folder: the
            folder of class folders, or its parent with ``split``.
        kind: the layout; "auto" looks at what is there.
        split: which part of the set. Where each part has a folder of its own, whatever its layout, the folder of that
            name, or that says it in another way: ``train`` is training_set, too. A file of coco takes none; one of csv
            may have a column split, set or subset.
        photos: folder the photos' names start from. wsol needs it; coco and csv look beside their file if not given;
            the others know where their photos are, and take none.
        masks: wsol's folder of masks; ``photos`` if not given.
        classes: class names by label, for wsol, voc and csv.
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
    given = user_path(path)
    if kind == "auto":
        kind, given, split = _locate(given, split)
    elif split is not None and kind in ("folder", "coco", "voc", "csv") and not (given / "ImageSets").is_dir():
        folder = (_coco_of(given, split) if kind == "coco" else None) or split_folder(given, split)
        given, split = (folder, None) if folder.exists() or kind == "folder" else (given, split)
    for name, value, takers in (
        ("photos", photos, ("wsol", "coco", "csv")),
        ("masks", masks, ("wsol",)),
        ("classes", classes, ("wsol", "voc", "csv")),
        ("split", split, ("folder", "wsol", "voc", "yolo", "cub", "csv")),
        ("difficult", difficult, ("voc",)),
        ("crowd", crowd, ("coco",)),
    ):
        if value is not None and kind not in takers:
            raise ValueError(f"{name}: the {kind} layout of {given} takes none, got {value!r}")
    if kind == "wsol":
        if photos is None:
            raise ValueError(f"photos: the wsol layout of {given} does not say where they are; give their folder")
        return parse_wsol(given, user_path(photos), split, masks, classes=classes)
    if kind == "voc":
        return parse_voc(given, split, difficult=bool(difficult), classes=classes)
    if kind == "coco":
        return parse_coco(_json_file(given), None if photos is None else user_path(photos), crowd=bool(crowd))
    if kind == "yolo":
        word = None if split is None else split_word(split)[0]
        return _parse_yolo(given, word or split)
    if kind == "cub":
        return cub.parse_cub(given, split)
    if kind == "csv":
        return parse_table(_csv_file(given), None if photos is None else user_path(photos), classes, split)
    return parse_image_folder(given)


def recognise(path: Path, split: str | None = None) -> SetKind:
    """Return the layout of what is at ``path``, by the files that are there.

    Raises:
        DataError: it is none that molt reads, or class folders that look like splits or parts of a layout; the message
            says what was looked for.
    """
    return _locate(path, split)[0]


def _locate(path: Path, split: str | None) -> tuple[SetKind, Path, str | None]:
    """Return the layout, where it is, and the split to read there, None where its folder is the place already."""
    if path.is_file():
        refuse(path)
        kinds: dict[str, SetKind] = {".json": "coco", ".yaml": "yolo", ".yml": "yolo", ".csv": "csv"}
        if (known := kinds.get(path.suffix.lower())) is None:
            raise DataError([Problem(path, None, "a file of no known layout", _LOOKED_FOR)])
        return known, path, split
    if not path.is_dir():
        raise DataError([Problem(path, None, "no such file or folder", "a data set")])
    if (data := path / "Data" / "CLS-LOC").is_dir():  # as ILSVRC is packed
        path = data
    kind = _layout(path, split)
    if kind is not None:
        other = _other_yaml(path) if kind == "yolo" else None
        return kind, other or path, split
    refuse(path)
    if (file := _coco_of(path, split)) is not None:
        return "coco", file, None
    if split is not None and (folder := split_folder(path, split)).is_dir():
        return _locate(folder, None)
    if (inner := unpacked(path)) != path:
        return _locate(inner, split)
    parts = splits(path)
    jsons = files(path / "annotations", ".json")
    if jsons:
        text = f"holds {count(len(jsons), 'JSON file')} in annotations/, one a split"
        one = next((file for file in jsons if file.name.startswith("instances_")), jsons[0])
        raise DataError([Problem(path, None, text, f"one of them, such as {one}, and the folder of its photos")])
    if split is not None:
        if not parts:
            _check_classes(path, parts)
        hint = f"; there are the splits {', '.join(parts)}" if parts else ""
        raise DataError([Problem(path / split, None, f"no such folder{hint}", f"a split of {path}")])
    if not parts and not _has_class_folder(path):
        raise DataError([Problem(path, None, "no known layout", _LOOKED_FOR)])
    _check_classes(path, parts)
    return "folder", path, None


def _coco_of(path: Path, split: str | None) -> Path | None:
    """Return COCO's file of a split in annotations, instances_val2017.json say, or the only one, beside images."""
    there = files(path / "annotations", ".json")
    if split is None:
        there = there if (path / "images").is_dir() else []
    else:
        word = split_word(split)[0]
        there = [file for file in there if file.name.startswith("instances_")] or there
        exact = [file for file in there if file.stem.removeprefix("instances_") == split]
        there = exact or [file for file in there if word is not None and split_word(file.stem)[0] == word]
    return there[0] if len(there) == 1 and is_coco(there[0]) else None


def _layout(path: Path, split: str | None) -> SetKind | None:
    """Return the layout of a folder that has its files, or None."""
    metadata = [path, wsol_folder(path, split), *(path / name for name in SPLITS)]
    if any((folder / "image_ids.txt").is_file() for folder in metadata):
        return "wsol"
    if (path / cub.IMAGES).is_file() and (path / cub.LABELS).is_file():
        return "cub"
    voc = voc_places(voc_folder(path))
    if voc is not None and not _has_wordnet_ids(path) and (voc[1].is_dir() or not _has_class_folder(path)):
        return "voc"
    if any((path / name).is_file() for name in _YAML) or _other_yaml(path) or names_file(path):
        return "yolo"
    jsons = [file for file in files(path, ".json") if is_coco(file)]
    if len(jsons) > 1:
        text = f"holds {len(jsons)} JSON files of COCO, {', '.join(file.name for file in jsons[:5])}"
        raise DataError([Problem(path, None, text, "one of them, and the folder of its photos")])
    if jsons:
        return "coco"
    if len(files(path, ".json")) == 1 and not _has_class_folder(path):
        refuse(path)
        return "coco"
    tables = files(path, ".csv")
    if len(tables) == 1 and is_table(tables[0]):
        refuse(path)
        parts = splits(path).values()
        below = folders(path)
        alone = len(below) < 2 or all(folder.name.casefold() in _WITH_TABLE for folder in below)
        if alone and not any(map(_has_class_folder, parts)):
            return "csv"
    return None


def _other_yaml(path: Path) -> Path | None:
    """Return the YAML file of a YOLO set without data.yaml: the only one there that names classes and a split."""
    there = [file for file in files(path, ".yaml", ".yml") if holds(file, b"names", b"train")]
    return there[0] if len(there) == 1 and there[0].name not in _YAML else None


def _has_wordnet_ids(path: Path) -> bool:
    """Return whether XML files belong to class folders of ILSVRC, here or a split further down."""
    return any(is_wordnet_id(folder.name) for one in (path, *folders(path)) for folder in folders(one))


def _check_classes(path: Path, parts: dict[str, Path]) -> None:
    """Stop where the folders of a folder would hardly be classes, whatever photos are in them.

    Raises:
        DataError: they are splits, parts of a layout, or one folder round all others.
    """
    below = folders(path)
    kinds = f"kind (--kind) to be one of {', '.join(KINDS[1:])}"
    if parts:
        names = ", ".join(folder.name for folder in below)
        text = f"its folders, {names}, look like splits, not classes"
        raise DataError([Problem(path, None, text, f"split to be one of {', '.join(parts)}, or {kinds}")])
    known = PARTS - {"annotations"} if any(is_wordnet_id(folder.name) for folder in below) else PARTS
    odd = [folder.name for folder in below if folder.name.casefold() in known]
    if len(below) == 1:
        refuse(below[0])
        alone = not files(below[0], *photo_suffixes())
        if alone or _layout(below[0], None) is not None:
            text = f"its only folder, {below[0].name}, holds {'folders of photos' if alone else 'a set'}"
            raise DataError([Problem(path, None, text, f"{below[0]}, or {kinds}")])
        first = next(iter(files(below[0], *photo_suffixes())), below[0])
        if lists := [file for file in files(path, *_LISTS) if holds(file, first.stem.encode())]:
            text = f"its only folder, {below[0].name}, holds photos, of which {lists[0].name} may say the classes"
            raise DataError([Problem(path, None, text, f"{_LOOKED_FOR}; or {kinds}")])
    if odd and (len(odd) == len(below) or any(name.casefold() not in MAYBE for name in odd)):
        text = f"its folders, {', '.join(odd)}, look like parts of a layout, of which the rest is missing, not classes"
        sets = [folder for folder in below if folder.name not in odd and _layout(folder, None) is not None]
        raise DataError([Problem(path, None, text, f"{sets[0] if len(sets) == 1 else _LOOKED_FOR}; or {kinds}")])
    if len(below) > 1 and are_roles([folder.name for folder in below]):
        text = f"its folders, {', '.join(folder.name for folder in below)}, do not look like classes"
        raise DataError([Problem(path, None, text, f"the folder of the wanted photos, or {kinds}")])
    inside = [folder for title in below[:_LOOKED_INTO] for folder in folders(title)]
    if held := [folder for folder in inside if folder.name.casefold() in TRUTH and _has_photo(folder)]:
        named = ", ".join(folder.relative_to(path).as_posix() for folder in held[:4])
        text = f"its folders hold {named}, whose pictures would count as photos of a class"
        raise DataError([Problem(path, None, text, f"folders of photos alone, or {kinds}")])
    for title in below[:_LOOKED_INTO]:
        if masks := masks_among(files(title, *photo_suffixes())):
            text = f"its folders hold what looks like masks, {title.name}/{masks[0].name}, which would count as photos"
            raise DataError([Problem(path, None, text, f"folders of photos alone, or {kinds}")])
    parted = [list(splits(title)) for title in below[:_LOOKED_INTO]]
    if all(parted) and len(most := max(parted, key=len)) > 1:
        text = f"each of its folders holds splits, {', '.join(most)}, which would be one set"
        raise DataError([Problem(path, None, text, f"folders of one split, or {kinds}")])
    if len(below) > 1 and len(same := set.intersection(*map(_inner, below[:_LOOKED_INTO]))) > 1:
        text = f"each of its folders holds the folders {', '.join(sorted(same)[:5])}, which are rather the classes"
        raise DataError([Problem(path, None, text, f"one of the folders, such as {below[0]}, or {kinds}")])


def _inner(path: Path) -> set[str]:
    """Return the names of the folders in one that holds no photo itself, or in the only one in it."""
    there = folders(path)
    if files(path, *photo_suffixes()):
        return set()
    return _inner(there[0]) if len(there) == 1 else {folder.name for folder in there}


def _has_class_folder(path: Path) -> bool:
    """Return whether a photo lies below one of the folders; the first one ends the search."""
    return any(map(_has_photo, folders(path)))


def _has_photo(path: Path) -> bool:
    return any(file.suffix.lower() in photo_suffixes() for file in path.rglob("*"))


def _json_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = files(path, ".json") or files(path / "annotations", ".json")
    found = [file for file in found if is_coco(file)] or found
    if len(found) != 1:
        raise DataError([Problem(path, None, f"holds {len(found)} JSON files", "one, or the path of one")])
    return found[0]


def _csv_file(path: Path) -> Path:
    found = files(path, ".csv") if path.is_dir() else [path]
    if len(found) != 1:
        raise DataError([Problem(path, None, f"holds {len(found)} CSV files", "one, or the path of one")])
    return found[0]


def _parse_yolo(path: Path, split: str | None) -> Parsed:
    found = Parsed("yolo", path.name, path, path)
    try:
        data = read_yolo(path, split)
    except DataError as error:
        found.problems += error.problems
        return found
    found.name, found.classes, found.samples = data.name, data.classes, list(data.samples)
    found.unlabelled, found.remarks, found.notes = list(data.unlabelled), list(data.remarks), list(data.notes)
    found.left_out.update(data.left_out)
    return found
