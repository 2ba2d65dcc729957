"""Reads boxes in the layout of YOLO: data.yaml, photos below images, one text file a photo below labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

from molt._files import user_path
from molt._text import plain_name
from molt._words import count
from molt.data._layouts import files, splits
from molt.data._parsing import Parsed, as_integer, check_names, shown
from molt.data.annotations import DataError, LocalizationSet, Problem, Sample
from molt.data.images import PhotoError, find_photos, photo_suffixes
from molt.data.sizes import photo_size

DATA, OTHER, NAMES = "data.yaml", "data.yml", "classes.txt"
SPLITS = ("train", "val", "test")
MOST_BYTES = 16 * 2**20  # of one text file
OVERHANG = 0.5  # pixels
ROTATED = 0.5  # share of a photo that a corner of a rotated box may lie outside
FORM = (
    "class cx cy width height, all but the class in [0, 1], and perhaps a confidence, or the keypoints of data.yaml's "
    "kpt_shape; or class and polygon x y x y..."
)
# Where a split's photos are, if data.yaml does not say: as Ultralytics' sets have them, Roboflow's, and lists.
USUAL = {
    "train": ("images/train", "train/images", "train.txt"),
    "val": ("images/val", "val/images", "images/valid", "valid/images", "val.txt"),
    "test": ("images/test", "test/images", "test.txt"),
}


@dataclass
class YoloData:
    """What a data.yaml says: class names, folder of the photos, and the splits with the lines they stand on."""

    file: Path
    names: tuple[str, ...] = ()
    root: Path = Path()
    splits: dict[str, tuple[list[str], int]] = field(default_factory=dict)
    keypoints: int = 0
    keys: dict[str, Any] = field(default_factory=dict)


def read_yolo(path: str | Path, split: str | None = None) -> LocalizationSet:
    """Return the photos of one split, one sample a photo and class.

    data.yaml names the classes (``names``, a list or ``0: name`` lines) and for each of train, val and test a folder,
    a text file with a photo a line, or a list of these, below its own folder or ``path``, which may lie elsewhere and
    starts from the file or the working folder. Where it names no split, they are looked for in ``images/train``,
    ``train/images`` or ``train.txt`` and so on, then in ``images``, which is train. The boxes of ``images/a/x.jpg`` are
    in ``labels/a/x.txt``, the last folder called images becoming labels; a photo without that file, or with an empty
    one, is one of the set's ``unlabelled``. Of polygons, rotated boxes and, with data.yaml's ``kpt_shape``, rows with
    keypoints the box is taken. Confidences are checked and left out. Of a box that comes twice in a photo and class one
    is kept. A sample's name is the photo's path below ``images``. Photos' headers are read, as coordinates are shares
    of the size. Edges up to half a pixel outside the photo are rounding and moved to its border, as are the corners of
    rotated boxes.

    Without a data.yaml, classes.txt names the classes, one a line, and the photos are those in ``images``, in
    ``images/train``..., in ``train/images``..., or beside their labels; the split is then called ``all`` where there
    are none.

    Args:
        path: data.yaml, or the folder that holds it, or data.yml.
        split: train, val or test; None takes the only one there, or the one of which the others name the photos too.

    Raises:
        DataError: with everything found wrong: a missing or broken file, an unknown class, a box that is none or not
            in its photo, a path that leads out of the folder, a photo listed twice or that cannot be read, no box
            at all.
    """
    data = read_data(user_path(path))
    own = [name for name, (places, _) in data.splits.items() if places == [f"{name}.txt"]]
    if split is None and data.splits and len({tuple(places) for places, _ in data.splits.values()}) == 1:
        split = [*own, *data.splits][0]
    if split is None or split not in data.splits:
        there = ", ".join(data.splits) or "none"
        came = "several splits and none asked for" if split is None and data.splits else f"no split {split or 'at all'}"
        expected = f"one of {', '.join(SPLITS)}" + ("" if data.splits else " in it, or photos in images beside it")
        raise DataError([Problem(data.file, None, f"{came}; there: {there}", expected)])
    found = Parsed("yolo", f"{data.file.absolute().parent.name} {split}", data.file, data.root, classes=data.names)
    problems = found.problems
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    for place, photo, line in _photos(data, split, problems):
        name = photo.removeprefix("images/")
        if name in seen:
            problems.append(Problem(place, line, f"photo {photo} is listed twice", "each photo once"))
            continue
        seen.add(name)
        _samples(data, photo, name, found, counts)
    if not problems and not found.samples:
        message = f"none of {count(len(seen), 'photo')} of {split} has a box"
        problems.append(Problem(data.file, data.splits[split][1], message, "labels beside images"))
    found.notes += [f"{what}: {count:,}" for what, count in sorted(counts.items())]
    same = [name for name, (places, _) in data.splits.items() if name != split and places == data.splits[split][0]]
    if same and split not in own:
        found.notes.append(f"{data.file} names the same photos for {split} and {' and '.join(same)}")
    return found.result()


def names_file(folder: Path) -> Path | None:
    """Return the classes.txt of a folder with labels and no data.yaml, as labelImg and others write it."""
    labels = folder / "labels" if (folder / "images").is_dir() and (folder / "labels").is_dir() else None
    file = next((one / NAMES for one in (folder, labels) if one is not None and (one / NAMES).is_file()), None)
    if file is None or labels is not None or any((part / "labels").is_dir() for part in splits(folder).values()):
        return file
    beside = (photo.with_suffix(".txt") for photo in files(folder, *photo_suffixes()))
    return file if any(one.is_file() for one in beside) else None


def read_data(path: Path) -> YoloData:
    """Return what a data.yaml, or the one in a folder, says, or raise DataError with everything wrong in it."""
    file = path / (DATA if (path / DATA).exists() or not (path / OTHER).exists() else OTHER) if path.is_dir() else path
    if path.is_dir() and not file.exists() and (listed := names_file(path)) is not None:
        return _without_yaml(path, listed)
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


def _without_yaml(root: Path, file: Path) -> YoloData:
    """Return what a folder without data.yaml says: a name a line, and splits as folders of images or with one each."""
    problems: list[Problem] = []
    text = _text(file, problems)
    data = YoloData(file, tuple(map(plain_name, (text or "").strip().splitlines())), root)
    if text is not None and not all(data.names or [""]):
        problems.append(Problem(file, None, "a blank line or no class", "one class name a line"))
    problems += check_names(data.names, file, None)
    if problems:
        raise DataError(problems)
    images = root / "images"
    if images.is_dir():
        found = splits(images) or {"all": images}
    else:
        found = {split: folder / "images" for split, folder in splits(root).items()} or {"all": root}
    for split, folder in found.items():
        data.splits[split] = ([folder.relative_to(root).as_posix()], 1)
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
        numbered = {as_integer(key): name for key, name in given.items()}
        if set(numbered) != set(range(len(given))):
            keys = ", ".join(map(repr, given))[:100]
            wrong(line, f"names with the keys {keys}", f"each number from 0 to {len(given) - 1}")
            return
        given = [numbered[i] for i in range(len(given))]
    if not isinstance(given, list) or not given:
        wrong(line, f"names: {'missing' if line is None else 'no list'}", "the class names, a list or 0: NAME lines")
    else:
        for name in given:
            if type(name) not in (str, int) or not str(name).strip():
                wrong(line, f"the class name {name!r}", "a text; quote what YAML takes for something else")
        data.names = tuple(plain_name(str(name)) for name in given)
        problems += check_names(data.names, data.file, line)
        number, at = values.get("nc", (len(given), None))
        if as_integer(number) != len(given):
            wrong(at, f"nc: {number!r}", f"{len(given)}, the number of names")
    shape, at = values.get("kpt_shape", (None, None))
    if shape is not None:
        sides = [as_integer(side) for side in shape] if isinstance(shape, list) else []
        if len(sides) != 2 or sides[0] is None or sides[0] < 1 or sides[1] not in (2, 3):
            wrong(at, f"kpt_shape: {shape!r}", "[number of keypoints, 2 or 3]")
        else:
            data.keypoints = sides[0] * sides[1]
    base, at = values.get("path", (None, None))
    data.root = data.file.parent
    if base is not None:
        # As trainers look for it: from this file, from the working folder, or absolute.
        bases = [data.root / base, Path(base)] if isinstance(base, str) and "\0" not in base else []
        there = next((folder for folder in bases if folder.is_dir()), None)
        if there is None:
            wrong(at, f"path: {base!r}", "a folder, from that of this file or from the working folder")
        else:
            data.root = there
    for split in SPLITS:
        value, at = values.get(split, values.get("validation", (None, None)) if split == "val" else (None, None))
        places: list[Any] = value if isinstance(value, list) else [value]
        if value is None or at is None:
            continue
        if not places or not all(isinstance(place, str) and place for place in places):
            wrong(at, f"{split}: {value!r}", "a folder or text file, or a list of these")
        else:
            data.splits[split] = (places, at)
    if not data.splits and not problems:
        _find_splits(data, 1 if line is None else line)


def _find_splits(data: YoloData, line: int) -> None:
    """Look for photos where a data.yaml does not say where they are."""
    for split, places in USUAL.items():
        there = [place for place in places if (data.root / place).exists()]
        if there:
            data.splits[split] = (there[:1], line)
    if not data.splits and (data.root / "images").is_dir():
        data.splits["train"] = (["images"], line)


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
        elif not (data.root / below).exists():
            message = f"{split}: {place!r}: no such folder or file below {data.root}"
            problems.append(Problem(data.file, at, message, "a folder of photos, or a text file that lists them"))
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


def _samples(data: YoloData, photo: str, name: str, found: Parsed, counts: Counter[str]) -> None:
    """Add the photo's samples, one a class, in order of first appearance, or the photo alone."""
    file, path, problems = data.root / label_file(photo), data.root / photo, found.problems
    if not path.is_file():
        problems.append(Problem(path, None, "no such photo", "the file that is listed"))
        return
    text = _text(file, problems) if file.exists() else None
    rows = [(i, line.split()) for i, line in enumerate((text or "").splitlines(), 1) if line.strip()]
    if not rows:
        found.blank(name, path)
        if not file.exists():
            counts["photos without a label file, taken as showing none of the classes"] += 1
        return
    try:
        size = photo_size(path)
    except PhotoError as error:
        problems.append(Problem(path, None, str(error), "a photo"))
        return
    boxes: dict[int, list[list[float]]] = {}
    first: dict[tuple[float, ...], int] = {}
    for number, row in rows:
        read = _box(row, size, len(data.names), data.keypoints)
        if isinstance(read, str):
            problems.append(Problem(file, number, read, FORM))
            continue
        key, box, form = read
        if form is not None:
            counts[form] += 1
        if (earlier := first.setdefault(key, number)) != number:
            found.left_out["boxes that come twice"] += 1
            found.remark(file, number, f"repeats line {earlier}, {shown(' '.join(row))}", "each box once")
        else:
            boxes.setdefault(int(key[0]), []).append(box)
    found.samples += [Sample(name, path, label, np.array(each), size) for label, each in boxes.items()]


def _box(
    row: list[str], size: tuple[int, int], classes: int, keypoints: int
) -> tuple[tuple[float, ...], list[float], str | None] | str:
    """Return what tells the box from others, xyxy in pixels and what was left out of the row; or what is wrong."""
    of_pose = keypoints > 0 and len(row) == 5 + keypoints
    if len(row) < 5 or (len(row) > 6 and len(row) % 2 == 0 and not of_pose):
        return count(len(row), "value")
    try:
        values = [float(value) for value in row]
    except ValueError:
        return f"not all numbers: {' '.join(row)[:100]!r}"
    if not all(map(math.isfinite, values)):
        return f"not finite: {' '.join(row)[:100]!r}"
    if not (values[0].is_integer() and 0 <= values[0] < classes):
        return f"the class {row[0][:100]!r} is not in 0..{classes - 1}"
    if len(row) == 6 and not of_pose and not 0 <= values[5] <= 1:
        return f"the confidence {row[5][:100]!r} is not in [0, 1]"
    form, overhang = None, np.array(OVERHANG)
    if len(row) <= 6 or of_pose:
        cx, cy, w, h = values[1:5]
        if w <= 0 or h <= 0:
            return f"a box without area: {' '.join(row)[:100]!r}"
        shares = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        form = "rows with keypoints, of which the box is taken" if of_pose else None
        values = values[:5]
    else:
        shares = (min(values[1::2]), min(values[2::2]), max(values[1::2]), max(values[2::2]))
        form = "polygons or rotated boxes (keypoints need kpt_shape), of which the upright box is taken"
        if len(row) == 9:
            overhang = ROTATED * np.array([*size, *size])
    edges = np.array([*size, *size])
    given = np.array(shares) * edges
    box = given.clip(0, edges)
    if (np.abs(box - given) > overhang).any() or not (box[:2] < box[2:]).all():
        return f"a box outside its photo of {size[0]}x{size[1]} pixels: {' '.join(row)[:100]!r}"
    return tuple(values), [float(edge) for edge in box], form
