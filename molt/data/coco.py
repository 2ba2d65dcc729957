"""The layout of COCO (Lin et al., ECCV 2014): one JSON file a split."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import numpy as np

from molt._files import user_path
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
    as_flag,
    as_integer,
    as_number,
    box_fault,
    check_names,
    is_safe,
    is_size,
    no_collection,
    read_text,
    shown,
)
from molt.data.annotations import LocalizationSet, Sample

_Edges = tuple[float, float, float, float]
_LISTS = ("images", "annotations", "categories")
_BOX = "bbox [x, y, width, height], four numbers"
_SEGMENTS = "bbox, or a segmentation: polygons [x, y, x, y, ...], or an RLE of counts and size"


def read_coco(annotations: str | Path, photos: str | Path | None = None, *, crowd: bool = False) -> LocalizationSet:
    """Read boxes of the COCO layout, instances_*.json.

    A photo that shows several categories gives one sample each. Labels count the categories in the file's order, as
    the ids have gaps. A bbox, [x, y, width, height], becomes the edges (x, y, x + width, y + height). An
    object without a bbox gets the box round its polygons, or round its RLE where pycocotools is installed; masks
    themselves are not read. Numbers may be written as text. Of a box that comes twice in a photo and category one is
    kept. Photos without an object to keep are the set's ``unlabelled``.

    Args:
        annotations: the JSON file.
        photos: folder that the photos' file_name starts from. If not given the JSON file's own, or where the first
            photo is found: in images, data... beside the file, or in a folder called as the split.
        crowd: keep annotations with ``iscrowd``, boxes round many objects, which samples then tell. They are left out
            by default, and photos without any other; :func:`molt.data.check_set` counts both.

    Raises:
        DataError: with everything that keeps the file from being read.
    """
    return parse_coco(user_path(annotations), None if photos is None else user_path(photos), crowd=crowd).result()


@no_collection()
def parse_coco(file: Path, photos: Path | None = None, *, crowd: bool = False) -> Parsed:
    """Collect the samples and problems of a COCO file."""
    found = Parsed("coco", file.stem, file, file.parent if photos is None else photos)
    lists = _load(file, found)
    if lists is None:
        return found
    images, annotations, categories = lists
    used = {_key(entry.get("category_id")) for entry in annotations if isinstance(entry, dict)}
    names, labels = _categories(file, found, categories, used)
    listed = _images(file, found, images)
    if photos is None and listed:
        found.photos = _photo_folder(file, images[min(listed.values())]["file_name"])

    kept: dict[tuple[int, int], dict[_Edges, tuple[int, bool]]] = {}
    seen: dict[Any, int] = {}
    without = 0
    for number, entry in enumerate(annotations):
        which = f"annotations[{number}]"
        if not isinstance(entry, dict):
            found.problem(file, None, f"{which} is {shown(entry)}", "an object")
            continue
        key, label = _key(entry.get("image_id")), _key(entry.get("category_id"))
        if key not in listed:
            text = f"{which}: image_id {shown(entry.get('image_id'))}"
            found.problem(file, None, text, f"the id of one of the images{_such_as(listed)}")
            continue
        if label not in labels:
            text = f"{which}: category_id {shown(entry.get('category_id'))}"
            found.problem(file, None, text, f"the id of one of the categories{_such_as(labels)}")
            continue
        again = (own := _key(entry.get("id"))) is not None and seen.setdefault(own, number) != number
        if again:
            found.remark(file, None, f"{which} has the id of annotations[{seen[own]}], {own}", "ids that differ")
        many = as_flag(entry.get("iscrowd"))
        if many is None:
            found.problem(file, None, f"{which}: iscrowd {shown(entry['iscrowd'])}", "0 or 1")
            continue
        if many and not crowd:
            found.left_out["crowd annotations"] += 1
            continue
        bbox = entry.get("bbox")
        if bbox not in (None, []):
            box = _box(file, found, which, bbox)
        else:
            box = _around(file, found, which, entry, _size(images[listed[key]]))
        if box is None:
            continue
        without += bbox in (None, [])
        earlier, _ = kept.setdefault((listed[key], labels[label]), {}).setdefault(box, (number, many))
        if earlier != number:
            found.left_out["boxes that come twice"] += 1
            if not again:
                text = f"{which} has photo, category and box of annotations[{earlier}]"
                found.remark(file, None, text, "each box once")

    pairs = sorted(kept)
    for number, label in pairs:
        name, size, entries = images[number]["file_name"], _size(images[number]), kept[number, label]
        crowds = tuple(i for i, (_, many) in enumerate(entries.values()) if many)
        found.samples.append(Sample(name, found.photos / name, label, as_boxes([*entries]), size, crowd=crowds))
    shows = {number for number, _ in pairs}
    for number in sorted(set(listed.values()) - shows):
        name = images[number]["file_name"]
        found.blank(name, found.photos / name, _size(images[number]))
    if without:
        found.notes.append(f"objects without a bbox, of which the box round the segmentation is taken: {without:,}")
    found.classes = names
    where: Where = (file, None)

    def place(index: int) -> Place:
        entries = kept[pairs[index]].values()
        return Place(where, where, where, tuple((file, None, f"annotations[{number}]") for number, _ in entries))

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
    file: Path, found: Parsed, categories: list[Any], used: set[int | str | None]
) -> tuple[tuple[str, ...], dict[int | str | None, int]]:
    """Return the names by label, and the label of each id."""
    names: list[str] = []
    labels: dict[int | str | None, int] = {}
    if len(categories) > MAX_CLASSES:
        found.problem(file, None, f"{len(categories):,} categories", f"at most {MAX_CLASSES:,}")
        return (), {}
    # Exports of Roboflow begin with a category for the group, which may have the name of a class in it.
    objects = [one for one in categories if isinstance(one, dict) and isinstance(one.get("name"), str)]
    grouped = {one.get("supercategory") for one in objects}
    for number, entry in enumerate(categories):
        key = _key(entry.get("id")) if isinstance(entry, dict) else None
        name = entry.get("name") if isinstance(entry, dict) else None
        name = str(name) if type(name) is int else name
        if key is None or not isinstance(name, str) or not plain_name(name):
            found.problem(file, None, f"categories[{number}] is {shown(entry)}", 'an object with "id" and "name"')
        elif name in grouped and entry.get("supercategory") == "none" and key not in used:
            continue
        elif key in labels:
            found.problem(file, None, f"categories[{number}] has the id {key} once more", "ids that differ")
        else:
            labels[key] = len(names)
            names.append(plain_name(name))
    found.problems += check_names(names, file, None, [*labels])
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
            sides = entry.get("width"), entry.get("height")
            if sides == (0, 0):  # what some tools write where they did not look
                found.remark(file, None, f"{which}: size 0 x 0", f"width and height, {SIZE_FORM}")
            elif sides != (None, None) and _size(entry) is None:
                size = f"{which}: size {shown(entry.get('width'))} x {shown(entry.get('height'))}"
                found.problem(file, None, size, f"width and height, {SIZE_FORM}")
            listed[key] = names[name] = number
    return listed


def _key(value: Any) -> int | str | None:
    """Return an id, or None where it is none; True is not 1, "1" and 1.0 are, "007" is a name of its own."""
    number = as_integer(value)
    if isinstance(value, str) and (number is None or re.match(r"-?0\d", value)):
        return value
    return number


def _such_as(ids: dict[int | str | None, int]) -> str:
    return f", such as {shown(next(iter(ids)))}" if ids else ""


def _size(image: dict[str, Any]) -> tuple[int, int] | None:
    width, height = as_integer(image.get("width")), as_integer(image.get("height"))
    return (width, height) if width is not None and height is not None and is_size(width, height) else None


def _box(file: Path, found: Parsed, which: str, box: Any) -> _Edges | None:
    values = _numbers(box)
    if values is None or len(values) != 4:
        found.problem(file, None, f"{which}: bbox {shown(box)}", _BOX)
        return None
    x, y, width, height = values
    return _checked(file, found, which, (x, y, x + width, y + height))


def _checked(file: Path, found: Parsed, which: str, edges: _Edges) -> _Edges | None:
    fault = box_fault(*edges)
    if fault is not None:
        found.problem(file, None, f"{which}: {fault} (its edges)", f"{_BOX}: {BOX_FORM}")
        return None
    return edges


def _numbers(values: Any) -> list[float] | None:
    numbers = [as_number(value) for value in values] if isinstance(values, list) else [None]
    return None if None in numbers else cast("list[float]", numbers)


def _around(
    file: Path, found: Parsed, which: str, entry: dict[str, Any], size: tuple[int, int] | None
) -> _Edges | None:
    """Return the box round an object's segmentation."""
    given = entry.get("segmentation")
    if isinstance(given, dict):
        return _around_rle(file, found, which, given, size)
    nested = given if isinstance(given, list) and given and isinstance(given[0], list) else [given]
    polygons = [numbers for one in nested if (numbers := _numbers(one)) and len(numbers) >= 6 and len(numbers) % 2 == 0]
    if len(polygons) < len(nested):
        came = f"no bbox, and the segmentation {shown(given)}" if given else "neither bbox nor segmentation"
        found.problem(file, None, f"{which}: {came}", _SEGMENTS)
        return None
    points = np.concatenate(polygons).reshape(-1, 2)  # whose min and max, unlike Python's, are NaN where one is
    return _checked(file, found, which, (*points.min(0).tolist(), *points.max(0).tolist()))


def _around_rle(
    file: Path, found: Parsed, which: str, given: dict[str, Any], size: tuple[int, int] | None
) -> _Edges | None:
    try:
        from pycocotools import mask
    except ImportError:
        found.problem(file, None, f"{which}: no bbox, and an RLE", "bbox, or pycocotools installed to decode it")
        return None
    sides = [as_integer(side) or 0 for side in _numbers(given.get("size")) or ()]
    if len(sides) == 2 and is_size(*sides):
        height, width = sides
        rle = given | {"size": [height, width]}
        try:
            x, y, w, h = mask.toBbox(mask.frPyObjects(rle, height, width) if isinstance(rle["counts"], list) else rle)
        except (LookupError, TypeError, ValueError, OverflowError):
            w = 0
        if w > 0 and x + w <= width and y + h <= height:
            if size is not None and size != (width, height):
                text = f"{which}: no bbox, and an RLE of size {[*sides]}"
                found.problem(file, None, text, f"[height, width] of its photo, {[*reversed(size)]}")
                return None
            return float(x), float(y), float(x + w), float(y + h)
    found.problem(file, None, f"{which}: no bbox, and the RLE {shown(given)}", _SEGMENTS)
    return None
