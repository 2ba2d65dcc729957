"""Reads boxes in the layout of YOLO: data.yaml, photos below images, one text file a photo below labels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

from molt._words import count
from molt.data.annotations import DataError, LocalizationSet, Problem, Sample
from molt.data.images import PhotoError, find_photos
from molt.data.sizes import photo_size

DATA, OTHER = "data.yaml", "data.yml"
SPLITS = ("train", "val", "test")
MOST_BYTES = 16 * 2**20  # of one text file
OVERHANG = 0.5  # pixels
FORM = "class cx cy width height, all but the class in [0, 1], and perhaps a confidence"


@dataclass
class YoloData:
    """What a data.yaml says: class names, folder of the photos, and the splits with the lines they stand on."""

    file: Path
    names: tuple[str, ...] = ()
    root: Path = Path()
    splits: dict[str, tuple[list[str], int]] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)


def read_yolo(path: str | Path, split: str | None = None) -> LocalizationSet:
    """Return the photos of one split that have boxes, one sample a photo and class.

    data.yaml names the classes (``names``, a list or ``0: name`` lines) and for each of train, val and test a folder,
    a text file with a photo a line, or a list of these, below its own folder or ``path``. The boxes of
    ``images/a/x.jpg`` are in ``labels/a/x.txt``, the last folder called images becoming labels; a photo without that
    file, or with an empty one, has no boxes and so gives no sample. Confidences are checked and left out. A
    sample's name is the photo's path below ``images``. Photos' headers are read, as coordinates are shares of the size.
    Edges up to half a pixel outside the photo are rounding and moved to its border.

    Args:
        path: data.yaml, or the folder that holds it, or data.yml.
        split: train, val or test; None takes the only one there.

    Raises:
        DataError: with everything found wrong: a missing or broken file, an unknown class, a box that is none or not
            in its photo, a path that leads out of the folder, a photo listed twice or that cannot be read, no box
            at all.
    """
    data = read_data(Path(path))
    if split is None and len(data.splits) == 1:
        (split,) = data.splits
    if split is None or split not in data.splits:
        there = ", ".join(data.splits) or "none"
        came = "several splits and none asked for" if split is None and data.splits else f"no split {split or 'at all'}"
        raise DataError([Problem(data.file, None, f"{came}; there: {there}", f"one of {', '.join(SPLITS)}")])
    problems: list[Problem] = []
    samples: list[Sample] = []
    seen: set[str] = set()
    for place, photo, line in _photos(data, split, problems):
        name = photo.removeprefix("images/")
        if name in seen:
            problems.append(Problem(place, line, f"photo {photo} is listed twice", "each photo once"))
            continue
        seen.add(name)
        samples += _samples(data, photo, name, problems)
    if not problems and not samples:
        message = f"none of the {count(len(seen), 'photo')} of {split} has a box"
        problems.append(Problem(data.file, data.splits[split][1], message, "labels beside images"))
    if problems:
        raise DataError(problems)
    return LocalizationSet(f"{data.file.absolute().parent.name} {split}", "yolo", tuple(samples), data.names)


def read_data(path: Path) -> YoloData:
    """Return what a data.yaml, or the one in a folder, says, or raise DataError with everything wrong in it."""
    file = path / (DATA if (path / DATA).exists() or not (path / OTHER).exists() else OTHER) if path.is_dir() else path
    problems: list[Problem] = []
    data = YoloData(file)
    values: dict[str, tuple[Any, int]] = {}
    text = _text(file, problems)
    if text is not None:
        try:
            values = _top_level(file, text, problems)
        except yaml.MarkedYAMLError as error:
            line = None if error.problem_mark is None else error.problem_mark.line + 1
            problems.append(Problem(file, line, f"broken YAML: {error.problem}", "a YAML mapping"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            problems.append(Problem(file, None, f"broken YAML: {type(error).__name__}", "a YAML mapping"))
        if not problems:
            _interpret(data, values, problems)
    if problems:
        raise DataError(problems)
    data.keys = {key: value for key, (value, _) in values.items()}
    return data


def label_file(photo: str) -> str:
    """Return where the boxes of a photo are, both relative to the set: labels in place of the last folder images."""
    path = PurePosixPath(photo)
    folders = list(path.parts[:-1])
    if "images" in folders:
        folders[len(folders) - 1 - folders[::-1].index("images")] = "labels"
    return str(PurePosixPath(*folders, path.with_suffix("").name + ".txt"))


def _text(file: Path, problems: list[Problem]) -> str | None:
    if file.exists() and not file.is_file():
        problems.append(Problem(file, None, "is not a regular file", "a text file"))
        return None
    try:
        with file.open("rb") as opened:
            raw = opened.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            problems.append(Problem(file, None, "the file is too large", f"at most {MOST_BYTES >> 20} MiB"))
            return None
        return raw.decode("utf-8-sig")
    except OSError as error:
        problems.append(Problem(file, None, f"cannot be read ({error.strerror})", "a text file"))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        problems.append(Problem(file, line, "no UTF-8", "a text file in UTF-8"))
    return None


def _top_level(file: Path, text: str, problems: list[Problem]) -> dict[str, tuple[Any, int]]:
    """Return value and line of each key; keys that come twice, here or in names, are problems."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            problems.append(Problem(file, 1, "no mapping", "lines of KEY: VALUE"))
            return {}
        found: dict[str, tuple[Any, int]] = {}
        for key, value in node.value:
            keys = [key] + ([inner for inner, _ in value.value] if isinstance(value, yaml.MappingNode) else [])
            lines = {str(k.value): k.start_mark.line + 1 for k in keys[1:]}
            if str(key.value) in found or len(lines) < len(keys) - 1:
                line = key.start_mark.line + 1
                problems.append(Problem(file, line, f"the key {key.value!r}, or one in it, comes twice", "each once"))
            found[str(key.value)] = (loader.construct_object(value, deep=True), key.start_mark.line + 1)
        return found
    finally:
        loader.dispose()


def _interpret(data: YoloData, values: dict[str, tuple[Any, int]], problems: list[Problem]) -> None:
    def wrong(line: int | None, came: str, expected: str) -> None:
        problems.append(Problem(data.file, line, came, expected))

    given, line = values.get("names", (None, None))
    if isinstance(given, dict):
        if set(given) != set(range(len(given))):
            wrong(line, f"names with the keys {', '.join(map(str, given))[:100]}", f"0 to {len(given) - 1}")
            return
        given = [given[i] for i in range(len(given))]
    if not isinstance(given, list) or not given:
        wrong(line, f"names: {'missing' if line is None else 'no list'}", "the class names, a list or 0: NAME lines")
    else:
        for name in given:
            if type(name) not in (str, int) or not str(name).strip():
                wrong(line, f"the class name {name!r}", "a text; quote what YAML takes for something else")
        data.names = tuple(map(str, given))
        number, at = values.get("nc", (len(given), None))
        if number != len(given) or isinstance(number, bool):
            wrong(at, f"nc: {number!r}", f"{len(given)}, the number of names")
    base, at = values.get("path", (None, None))
    data.root = data.file.parent
    if base is not None:
        below = _below(data.root, base) if isinstance(base, str) else None
        if below is None:
            wrong(at, f"path: {base!r}", "a folder below that of this file")
        else:
            data.root = data.root / below
    for split in SPLITS:
        value, at = values.get(split, (None, None))
        places: list[Any] = value if isinstance(value, list) else [value]
        if value is None or at is None:
            continue
        if not places or not all(isinstance(place, str) and place for place in places):
            wrong(at, f"{split}: {value!r}", "a folder or text file, or a list of these")
        else:
            data.splits[split] = (places, at)


def _below(root: Path, place: str) -> str | None:
    """Return a path relative to the root, or None where it leads out; links are followed."""
    path = PurePosixPath(place)
    if path.is_absolute():
        try:
            path = path.relative_to(PurePosixPath(root.absolute()))
        except ValueError:
            return None
    return None if ".." in path.parts or "\0" in place else str(path)


def _photos(data: YoloData, split: str, problems: list[Problem]) -> Iterator[tuple[Path, str, int | None]]:
    """Yield the file that lists a photo, its path relative to the root, and the line there."""
    places, at = data.splits[split]
    for place in places:
        below = _below(data.root, place)
        if below is None and place.startswith("../"):  # many exports have one too many, which trainers take off too
            below = _below(data.root, place.removeprefix("../"))
        if below is None:
            problems.append(Problem(data.file, at, f"{split}: {place!r}", "a place below the folder of this file"))
        elif (data.root / below).is_dir():
            try:
                found = find_photos(data.root / below)[0]
            except PhotoError as error:
                problems.append(Problem(data.file, at, str(error), "a folder that can be read"))
                continue
            for photo in found:
                yield data.file, photo.relative_to(data.root).as_posix(), at
        else:
            yield from _listed(data, below, problems)


def _listed(data: YoloData, below: str, problems: list[Problem]) -> Iterator[tuple[Path, str, int]]:
    file = data.root / below
    text = _text(file, problems)
    for number, line in enumerate((text or "").splitlines(), 1):
        photo = line.strip()
        # As trainers read it: ./ is the folder of the list, anything else that of the set.
        folder = PurePosixPath(below).parent if photo.startswith("./") else PurePosixPath()
        inside = _below(data.root, photo)
        if inside is None:
            problems.append(Problem(file, number, f"photo {photo!r}", "a path below the folder of data.yaml"))
        elif photo:
            yield file, str(folder / inside), number


def _samples(data: YoloData, photo: str, name: str, problems: list[Problem]) -> list[Sample]:
    """Return the photo's samples, one a class, in order of first appearance."""
    file, path = data.root / label_file(photo), data.root / photo
    if not path.is_file():
        problems.append(Problem(path, None, "no such photo", "the file that is listed"))
        return []
    text = _text(file, problems) if file.exists() else None
    rows = [(i, line.split()) for i, line in enumerate((text or "").splitlines(), 1) if line.strip()]
    if not rows:
        return []
    try:
        size = photo_size(path)
    except PhotoError as error:
        problems.append(Problem(path, None, str(error), "a photo"))
        return []
    boxes: dict[int, list[list[float]]] = {}
    for number, row in rows:
        found = _box(row, size, len(data.names))
        if isinstance(found, str):
            problems.append(Problem(file, number, found, FORM))
        else:
            boxes.setdefault(found[0], []).append(found[1])
    return [Sample(name, path, label, np.array(found), size) for label, found in boxes.items()]


def _box(row: list[str], size: tuple[int, int], classes: int) -> tuple[int, list[float]] | str:
    """Return label and xyxy in pixels, or what is wrong."""
    if len(row) not in (5, 6):
        return count(len(row), "value") + (", a polygon" if len(row) > 6 and len(row) % 2 else "")
    try:
        values = [float(value) for value in row]
    except ValueError:
        return f"not all numbers: {' '.join(row)[:100]!r}"
    if not all(map(math.isfinite, values)):
        return f"not finite: {' '.join(row)[:100]!r}"
    if not (values[0].is_integer() and 0 <= values[0] < classes):
        return f"the class {row[0][:100]!r} is not in 0..{classes - 1}"
    if len(row) == 6 and not 0 <= values[5] <= 1:
        return f"the confidence {row[5][:100]!r} is not in [0, 1]"
    cx, cy, w, h = values[1:5]
    if w <= 0 or h <= 0:
        return f"a box without area: {' '.join(row)[:100]!r}"
    width, height = size
    given = np.array([(cx - w / 2) * width, (cy - h / 2) * height, (cx + w / 2) * width, (cy + h / 2) * height])
    box = given.clip(0, (width, height, width, height))
    if np.abs(box - given).max() > OVERHANG or not (box[:2] < box[2:]).all():
        return f"a box outside its photo of {width}x{height} pixels: {' '.join(row)[:100]!r}"
    return int(values[0]), [float(edge) for edge in box]
