"""Boxes as a COCO file: ground truth, or a list of results."""

from __future__ import annotations

import json
import operator
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import IO, Any

from molt._files import user_path, whole_file
from molt.data.writers import Annotation, Checker, Written, class_names


def write_coco(
    path: str | Path,
    items: Iterable[Annotation],
    classes: Sequence[str],
    *,
    results: bool = False,
    image_ids: Mapping[str, int] | None = None,
    category_ids: Sequence[int] | None = None,
    clip: bool = False,
) -> Written:
    """Write boxes as one COCO JSON file, which takes the place of any other when it is whole.

    Ground truth has ``images``, ``annotations`` and ``categories``; bbox is [x, y, width, height] in pixels, not
    rounded, area that of the box, iscrowd 0, and ``score`` is there where the item has scores. Results are a list of
    image_id, category_id, bbox and score: a photo without boxes leaves no trace there, nor do names and sizes.

    Args:
        path: the file; folders above are made.
        items: a list or generator; only names are kept in memory. None at all gives a valid, empty file.
        classes: names by label, all different; label -1 takes the class called 'object'.
        results: True writes a list of results; every item with boxes must have scores.
        image_ids: photo name -> id, as an existing ground truth has them; None counts from 1 in order of the items, so
            the same items as ground truth and as results agree.
        category_ids: one id a class; None takes label + 1, as COCO's begin with 1 and 0 often means background.
            ``range(len(classes))`` gives the labels themselves, as :meth:`molt.Localization.to_coco` does.
        clip: True cuts boxes that overhang their photo by more than 0.01 pixels, and counts them; False refuses them.
            A box wholly outside is always refused.

    Raises:
        TypeError, ValueError: a wrong argument or item, a name twice or leading out of the folder of photos; nothing
            is written then.
        OSError: the file cannot be written.
    """
    names = class_names(classes)
    ids = _category_ids(category_ids, len(names))
    checker = Checker(names, clip, str)
    numbered = _numbered(checker.each(items), image_ids)
    target = user_path(path)
    if target.is_dir():
        raise ValueError(f"path must be a file, got the folder {target}")
    with whole_file(target) as part, part.open("w", encoding="ascii") as out:
        if results:
            _write_list(out, (entry for image, item in numbered for entry in _results(image, item, ids)))
        else:
            _write_truth(out, numbered, names, ids)
        out.write("\n")
    return checker.written(target)


def _category_ids(given: Sequence[int] | None, number: int) -> list[int]:
    if given is None:
        return list(range(1, number + 1))
    try:
        ids = [operator.index(value) for value in given]
    except TypeError as error:
        raise TypeError(f"category_ids must be integers ({error})") from error
    if len(ids) != number or len(set(ids)) != number:
        raise ValueError(f"category_ids must be {number} different integers, one a class, got {ids!r:.200}")
    return ids


def _numbered(items: Iterable[Annotation], given: Mapping[str, int] | None) -> Iterator[tuple[int, Annotation]]:
    if given is None:
        yield from enumerate(items, 1)
        return
    seen: dict[int, str] = {}
    for item in items:
        if item.name not in given:
            raise ValueError(f"image_ids must have an id for each item, got none for {item.name!r}")
        number = operator.index(given[item.name])
        if number in seen:
            raise ValueError(f"image_ids must differ, got {number} for {seen[number]!r} and {item.name!r}")
        seen[number] = item.name
        yield number, item


def _entries(image: int, item: Annotation, ids: Sequence[int]) -> Iterator[dict[str, Any]]:
    scores = [None] * len(item.boxes) if item.scores is None else item.scores.tolist()
    for (x0, y0, x1, y1), label, score in zip(item.boxes.tolist(), item.labels.tolist(), scores, strict=True):
        entry = {"image_id": image, "category_id": ids[label], "bbox": [x0, y0, x1 - x0, y1 - y0]}
        yield entry if score is None else entry | {"score": score}


def _results(image: int, item: Annotation, ids: Sequence[int]) -> Iterator[dict[str, Any]]:
    if item.scores is None and len(item.boxes):
        raise ValueError(f"{item.name!r}: scores must be given to be written as results, got None")
    return _entries(image, item, ids)


def _write_list(out: IO[str], entries: Iterable[dict[str, Any]]) -> None:
    before = "[\n"
    for entry in entries:
        out.write(before + json.dumps(entry))
        before = ",\n"
    out.write("[]" if before == "[\n" else "\n]")


def _write_truth(
    out: IO[str], numbered: Iterable[tuple[int, Annotation]], names: Sequence[str], ids: Sequence[int]
) -> None:
    """Write images while annotations wait in a second file, so that neither is held in memory."""
    number = count(1)  # COCOeval takes an annotation of id 0 for none
    with tempfile.TemporaryFile("w+", encoding="ascii") as waiting:

        def images() -> Iterator[dict[str, Any]]:
            before = ""
            for image, item in numbered:
                width, height = item.size
                for entry in _entries(image, item, ids):
                    _, _, w, h = entry["bbox"]
                    whole = {"id": next(number), **entry, "area": w * h, "iscrowd": 0}
                    waiting.write(before + json.dumps(whole))
                    before = ",\n"
                yield {"id": image, "file_name": item.name, "width": width, "height": height}

        out.write('{"info": {"description": "boxes written by molt"}, "licenses": [],\n"images": ')
        _write_list(out, images())
        out.write(',\n"annotations": [')
        waiting.seek(0)
        shutil.copyfileobj(waiting, out)
        out.write('],\n"categories": ')
        _write_list(out, ({"id": ids[i], "name": name, "supercategory": ""} for i, name in enumerate(names)))
        out.write("}")
