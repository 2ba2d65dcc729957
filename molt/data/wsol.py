"""The layout of wsolevaluation (Choe et al., CVPR 2020): text files of names, labels, sizes, and boxes or masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from molt._files import user_path
from molt._text import plain_name
from molt.data._parsing import (
    MAX_CLASSES,
    NAME_FORM,
    SIZE_FORM,
    Parsed,
    Place,
    Where,
    as_integer,
    check_names,
    is_safe,
    is_size,
    no_collection,
    read_lines,
    shown,
)
from molt.data._wsol_objects import Objects, official_split
from molt.data.annotations import LocalizationSet, Sample

SPLITS = ("train", "val", "test")


def read_wsol(
    metadata: str | Path,
    photos: str | Path,
    split: str | None = None,
    masks: str | Path | None = None,
    proxy: bool = False,
    classes: Sequence[str] | None = None,
) -> LocalizationSet:
    """Read the wsolevaluation layout: CUB, ILSVRC, OpenImages30k, or photos of one's own.

    A split's folder holds image_ids.txt (``path`` a line) and class_labels.txt (``path,label``), and may hold
    image_sizes.txt (``path,width,height``) and localization.txt: ``path,x0,y0,x1,y1``, edges in pixels of the photo,
    or ``path,mask.png,ignore.png``, the last one only on a photo's first line. Lines about photos that image_ids.txt
    does not list are not used.

    Args:
        metadata: the split's own folder, or its parent with ``split``.
        photos: folder the paths start from.
        split: train, val, test or another folder of ``metadata``.
        masks: folder the paths of masks start from; ``photos`` if not given.
        proxy: read image_ids_proxy.txt, the subset for search, in place of image_ids.txt.
        classes: class names by label. If not given: the folders of the photos where each class has one of its own,
            else the numbers.

    Raises:
        DataError: with everything that keeps the files from being read.
    """
    return parse_wsol(user_path(metadata), user_path(photos), split, masks, proxy, classes).result()


def split_folder(metadata: Path, split: str | None) -> Path:
    """Return the folder that holds a split's files."""
    if split is None or ((metadata / "image_ids.txt").is_file() and metadata.resolve().name == split):
        return metadata
    return metadata / split


@dataclass
class _Fields:
    """Whole numbers by photo, none where they are not such, and the line of each photo."""

    values: dict[str, tuple[int, ...]] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)


@no_collection()
def parse_wsol(
    metadata: Path,
    photos: Path,
    split: str | None = None,
    masks: str | Path | None = None,
    proxy: bool = False,
    classes: Sequence[str] | None = None,
) -> Parsed:
    """Collect the samples and problems of the wsolevaluation layout."""
    found = Parsed("wsol", "", metadata, photos)
    # The files have numbers, and two of ImageNet's classes are called crane.
    found.remarks += check_names(classes or (), metadata, None)
    if split is not None and not is_safe(split):
        found.problem(metadata, None, f"the split {shown(split)}", NAME_FORM)
        return found
    folder = split_folder(metadata, split)
    full = folder.resolve()
    split_of = full.name in SPLITS or full.name == "metadata"
    found.name = f"{full.parent.name} {full.name}" if split_of else full.name
    ids_file = folder / ("image_ids_proxy.txt" if proxy else "image_ids.txt")
    if not ids_file.is_file():
        there = [name for name in SPLITS if (metadata / name / "image_ids.txt").is_file()]
        hint = f"; there are the splits {', '.join(there)}" if there else ""
        found.problem(ids_file, None, f"no such file{hint}", "the split's own folder, or its parent and a split")
        return found

    ids = _read_ids(ids_file, found)
    labels = _read_fields(folder / "class_labels.txt", found, ids, 1, "path,label", proxy)
    sizes = _Fields()
    if (folder / "image_sizes.txt").is_file():
        sizes = _read_fields(folder / "image_sizes.txt", found, ids, 2, "path,width,height", proxy)
    objects = Objects(folder / "localization.txt", photos if masks is None else user_path(masks), ids, found)
    counts = {ids_file.name: len(ids)}
    if objects.file.is_file():
        others = objects.read(official_split(folder))
        if not proxy:
            _unlisted(objects.file, found, others)
        counts["localization.txt"] = objects.count

    labelled = _labels(folder, found, ids_file, ids, labels, classes)
    measured = _sizes(folder, found, ids_file, ids, sizes)
    order, starts = objects.by_photo()
    boxes = np.array(objects.edges, np.float64).reshape(-1, 4)
    boxes = boxes[order] if len(boxes) else boxes
    kept: list[int] = []
    for index, (name, start, end) in enumerate(zip(ids, starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        label = labelled.get(name)
        if label is None:
            continue
        kept.append(index)
        of_masks = tuple(objects.masks[i] for i in order[start:end].tolist()) if objects.masks else ()
        size, ignore = measured.get(name), objects.ignore.get(name)
        found.samples.append(Sample(name, photos / name, label, boxes[start:end], size, of_masks, ignore))
    found.classes = tuple(classes) if classes is not None else _class_names(found.samples)
    if not proxy:
        _compare_official(folder, found, counts)

    def place(index: int) -> Place:
        name = found.samples[index].name
        size: Where = (folder / "image_sizes.txt", sizes.lines.get(name))
        at = [objects.lines[i] for i in order[starts[kept[index]] : starts[kept[index] + 1]]]
        of_objects = tuple((objects.file, line, shown(name)) for line in at)
        return Place((ids_file, ids[name]), (folder / "class_labels.txt", labels.lines[name]), size, of_objects)

    found.place = place
    return found


def _read_ids(file: Path, found: Parsed) -> dict[str, int]:
    """Return the line of each photo, in order."""
    ids: dict[str, int] = {}
    for number, name in enumerate(read_lines(file, found), 1):
        if not name:
            continue
        if not is_safe(name):
            found.problem(file, number, f"the name {shown(name)}", NAME_FORM)
        elif name in ids:
            found.problem(file, number, f"photo {shown(name)} listed twice, first on line {ids[name]}", "it once")
        else:
            ids[name] = number
    return ids


def _read_fields(file: Path, found: Parsed, ids: dict[str, int], count: int, form: str, proxy: bool) -> _Fields:
    """Return what is said of the photos in ``ids``, ``count`` numbers each."""
    fields = _Fields()
    values, lines = fields.values, fields.lines
    others: list[tuple[int, str]] = []
    for number, line in enumerate(read_lines(file, found), 1):
        if not line:
            continue
        name, *texts = line.rsplit(",", count)
        if len(texts) != count:
            found.problem(file, number, shown(line), form)
            continue
        if name not in ids:
            others.append((number, name))
            continue
        entry = tuple(number for number in map(as_integer, texts) if number is not None)
        if len(entry) < count:
            found.problem(file, number, shown(line), f"{form} in whole numbers")
            entry = ()
        if name not in values:
            values[name], lines[name] = entry, number
        elif values[name] == entry:
            found.remark(file, number, f"repeats line {lines[name]}, {shown(line)}", "one line a photo")
        else:
            found.problem(
                file, number, f"{shown(line)} is not what line {lines[name]} says", f"one line a photo, {form}"
            )
    if not proxy:
        _unlisted(file, found, others)
    return fields


def _unlisted(file: Path, found: Parsed, others: list[tuple[int, str]]) -> None:
    if others:
        count = f"{len(others):,} lines are" if len(others) > 1 else "1 line is"
        text = f"{count} of photos that image_ids.txt does not list, so not used; here {shown(others[0][1])}"
        found.remark(file, others[0][0], text, "photos that image_ids.txt lists")


def _labels(
    folder: Path,
    found: Parsed,
    ids_file: Path,
    ids: dict[str, int],
    labels: _Fields,
    classes: Sequence[str] | None,
) -> dict[str, int]:
    """Return the label of each photo that has a good one."""
    file = folder / "class_labels.txt"
    if not file.is_file():
        return {}  # which is a problem already
    limit = MAX_CLASSES if classes is None else len(classes)
    good: dict[str, int] = {}
    for name, number in ids.items():
        values = labels.values.get(name)
        if values is None:
            text = f"photo {shown(name)} has no label"
            found.problem(ids_file, number, text, f"a line in {file.name}")
        elif values and 0 <= values[0] < limit:
            good[name] = values[0]
        elif values:
            found.problem(file, labels.lines[name], f"label {shown(str(values[0]))}", f"0 to {limit - 1:,}")
    return good


def _sizes(
    folder: Path, found: Parsed, ids_file: Path, ids: dict[str, int], sizes: _Fields
) -> dict[str, tuple[int, int]]:
    """Return the size of each photo that has a good one; an empty file says that there are none."""
    file = folder / "image_sizes.txt"
    good: dict[str, tuple[int, int]] = {}
    if not sizes.values:
        return good
    for name, number in ids.items():
        values = sizes.values.get(name)
        if values is None:
            found.problem(ids_file, number, f"photo {shown(name)} has no size", f"a line in {file.name}")
        elif values and is_size(*values):
            good[name] = (values[0], values[1])
        elif values:
            text = f"size {shown(f'{values[0]}x{values[1]}')}"
            found.problem(file, sizes.lines[name], text, f"path,width,height: {SIZE_FORM}")
    return good


def _class_names(samples: Sequence[Sample]) -> tuple[str, ...]:
    """Return the folders of the photos where these and the labels stand for each other, else the labels as text."""
    count = max((sample.label for sample in samples), default=-1) + 1
    folders: dict[int, str] = {}
    for sample in samples:
        parent = plain_name(sample.name.rpartition("/")[0].rpartition("/")[2])
        if not parent or folders.setdefault(sample.label, parent) != parent:
            break
    else:
        if len(folders) == count and max(Counter(folders.values()).values(), default=1) == 1:
            return tuple(folders[label] for label in range(count))
    return tuple(map(str, range(count)))


def _compare_official(folder: Path, found: Parsed, counts: dict[str, int]) -> None:
    official = official_split(folder)
    if official is None:
        return
    for name, expected in (("image_ids.txt", official.photos), ("localization.txt", official.objects)):
        count = counts.get(name, 0)
        if count != expected:
            text = f"has {count:,} of the official {expected:,} lines"
            found.remark(folder / name, None, text, f"all {expected:,} lines of {folder.resolve().parent.name}")
