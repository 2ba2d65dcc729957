"""The layout of COCO (Lin et al., ECCV 2014): one JSON file a split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from molt._text import plain_name
from molt.data._layouts import PHOTO_FOLDERS
from molt.data._parsing import (
    BOX_FORM,
    MAX_CLASSES,
    MAX_TEXT,
    NAME_FORM,
    SIZE_FORM,
    Parsed,
    Place,
    Where,
    as_boxes,
    as_folder,
    box_fault,
    is_safe,
    is_size,
    no_collection,
    read_text,
    shown,
)
from molt.data.annotations import LocalizationSet, Sample

_LISTS = ("images", "annotations", "categories")
_BOX = "bbox [x, y, width, height], four numbers"


def read_coco(annotations: str | Path, photos: str | Path | None = None, *, crowd: bool = False) -> LocalizationSet:
    """Read boxes of the COCO layout, instances_*.json.

    A photo that shows several categories gives one sample each. Labels count the categories in the file's order, as
    the ids have gaps. A bbox, [x, y, width, height], becomes the edges (x, y, x + width, y + height). Segmentations
    are not read: samples have boxes only.

    Args:
        annotations: the JSON file.
        photos: folder that the photos' file_name starts from. If not given the JSON file's own, or where the first
            photo is found: in images, data... beside the file, or in a folder called as the split.
        crowd: keep annotations with ``iscrowd``, boxes round many objects. They are left out by default, and photos
            without any other; :func:`molt.data.check_set` counts both.

    Raises:
        DataError: with everything that keeps the file from being read.
    """
    return parse_coco(as_folder(annotations), None if photos is None else as_folder(photos), crowd=crowd).result()


@no_collection()
def parse_coco(file: Path, photos: Path | None = None, *, crowd: bool = False) -> Parsed:
    """Collect the samples and problems of a COCO file."""
    found = Parsed("coco", file.stem, file, file.parent if photos is None else photos)
    lists = _load(file, found)
    if lists is None:
        return found
    images, annotations, categories = lists
    names, labels = _categories(file, found, categories)
    listed = _images(file, found, images)
    if photos is None and listed:
        found.photos = _photo_folder(file, images[min(listed.values())]["file_name"])

    boxes: dict[tuple[int, int], list[tuple[float, float, float, float]]] = {}
    texts: dict[tuple[int, int], list[str]] = {}
    seen: dict[Any, int] = {}
    for number, entry in enumerate(annotations):
        which = f"annotations[{number}]"
        if not isinstance(entry, dict):
            found.problem(file, None, f"{which} is {shown(entry)}", "an object")
            continue
        key, label = entry.get("image_id"), _key(entry.get("category_id"))
        if _key(key) not in listed:
            found.problem(file, None, f"{which}: image_id {shown(key)}", "the id of one of the images")
            continue
        if label not in labels:
            text = f"{which}: category_id {shown(entry.get('category_id'))}"
            found.problem(file, None, text, "the id of one of the categories")
            continue
        if (own := _key(entry.get("id"))) is not None and seen.setdefault(own, number) != number:
            found.remark(file, None, f"{which} has the id of annotations[{seen[own]}], {own}", "ids that differ")
        if entry.get("iscrowd") and not crowd:
            found.left_out["crowd annotations"] += 1
            continue
        box = _box(file, found, which, entry.get("bbox"))
        if box is not None:
            pair = (listed[_key(key)], labels[label])
            boxes.setdefault(pair, []).append(box)
            texts.setdefault(pair, []).append(which)

    for number, label in sorted(boxes):
        name, size = images[number]["file_name"], _size(images[number])
        path = found.photos / name
        found.samples.append(Sample(name, path, label, as_boxes(boxes[number, label]), size))
    empty = len(listed) - len({number for number, _ in boxes})
    if empty:
        found.left_out["photos without an object to keep"] += empty
    found.classes = names
    pairs = sorted(boxes)
    where: Where = (file, None)

    def place(index: int) -> Place:
        return Place(where, where, where, tuple((file, None, which) for which in texts[pairs[index]]))

    found.place = place
    return found


def _load(file: Path, found: Parsed) -> list[list[Any]] | None:
    """Return the three lists of the file."""
    text = read_text(file, found, MAX_TEXT)
    if text is None:
        return None
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        found.problem(file, error.lineno, f"not JSON ({error.msg})", "JSON as in COCO's instances_*.json")
        return None
    except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        found.problem(file, None, f"not JSON that can be read ({error})", "JSON as in COCO's instances_*.json")
        return None
    lists = []
    for name in _LISTS:
        value = content.get(name) if isinstance(content, dict) else None
        if not isinstance(value, list):
            found.problem(
                file, None, f'no list "{name}"', "an object with the lists images, annotations and categories"
            )
            return None
        lists.append(value)
    return lists


def _photo_folder(file: Path, name: str) -> Path:
    """Return the folder where a photo is: that of the JSON file, or one that sets have beside it or above."""
    split = file.stem.removeprefix("instances_")
    places = [
        place / below
        for place in (file.parent, file.parent.parent)
        for below in ("", *PHOTO_FOLDERS, split, f"images/{split}")
    ]
    return next((place for place in places if (place / name).is_file()), file.parent)


def _categories(
    file: Path, found: Parsed, categories: list[Any]
) -> tuple[tuple[str, ...], dict[int | str | None, int]]:
    """Return the names by label, and the label of each id."""
    names: list[str] = []
    labels: dict[int | str | None, int] = {}
    if len(categories) > MAX_CLASSES:
        found.problem(file, None, f"{len(categories):,} categories", f"at most {MAX_CLASSES:,}")
        return (), {}
    for number, entry in enumerate(categories):
        key = _key(entry.get("id")) if isinstance(entry, dict) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        if key is None or not isinstance(name, str) or not plain_name(name):
            found.problem(file, None, f"categories[{number}] is {shown(entry)}", 'an object with "id" and "name"')
        elif key in labels:
            found.problem(file, None, f"categories[{number}] has the id {key} once more", "ids that differ")
        else:
            labels[key] = len(names)
            names.append(plain_name(name))
    return tuple(names), labels


def _images(file: Path, found: Parsed, images: list[Any]) -> dict[int | str | None, int]:
    """Return the place in the list of each image id that can be used."""
    listed: dict[int | str | None, int] = {}
    names: dict[str, int] = {}
    for number, entry in enumerate(images):
        which = f"images[{number}]"
        key = _key(entry.get("id")) if isinstance(entry, dict) else None
        name = entry.get("file_name") if isinstance(entry, dict) else None
        if key is None or not isinstance(name, str):
            found.problem(file, None, f"{which} is {shown(entry)}", 'an object with "id" and "file_name"')
        elif not is_safe(name):
            found.problem(file, None, f"{which}: the file_name {shown(name)}", NAME_FORM)
        elif key in listed:
            found.problem(file, None, f"{which} has the id {key} of images[{listed[key]}]", "ids that differ")
        elif name in names:
            found.problem(
                file, None, f"{which}: photo {shown(name)} listed twice, as in images[{names[name]}]", "it once"
            )
        else:
            if ("width" in entry or "height" in entry) and _size(entry) is None:
                size = f"{which}: size {shown(entry.get('width'))} x {shown(entry.get('height'))}"
                found.problem(file, None, size, f"width and height, {SIZE_FORM}")
            listed[key] = names[name] = number
    return listed


def _key(value: Any) -> int | str | None:
    """Return an id, or None where it is none; True is not 1."""
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    width, height = image.get("width"), image.get("height")
    if type(width) is int and type(height) is int and is_size(width, height):
        return width, height
    return None


def _box(file: Path, found: Parsed, which: str, box: Any) -> tuple[float, float, float, float] | None:
    if not isinstance(box, list) or len(box) != 4 or any(type(value) not in (int, float) for value in box):
        found.problem(file, None, f"{which}: bbox {shown(box)}", _BOX)
        return None
    try:
        x, y, width, height = map(float, box)
    except OverflowError:
        found.problem(file, None, f"{which}: bbox {shown(box)}", f"{_BOX}: {BOX_FORM}")
        return None
    fault = box_fault(x, y, x + width, y + height)
    if fault is not None:
        found.problem(file, None, f"{which}: {fault} (its edges)", f"{_BOX}: {BOX_FORM}")
        return None
    return x, y, x + width, y + height
