"""The layout of CUB-200-2011 (Wah et al., 2011) as it is published: text files of ids."""

from __future__ import annotations

from pathlib import Path

from molt._text import plain_name
from molt.data._parsing import (
    BOX_FORM,
    NAME_FORM,
    Parsed,
    Place,
    as_boxes,
    box_fault,
    is_safe,
    no_collection,
    read_lines,
    shown,
)
from molt.data.annotations import Sample

IMAGES, LABELS, SPLITS = "images.txt", "image_class_labels.txt", "train_test_split.txt"
_FORMS = {
    IMAGES: "id path",
    LABELS: "id class, a whole number from 1",
    SPLITS: "id 1 (train) or id 0 (test)",
    "bounding_boxes.txt": "id x y width height, in pixels",
    "classes.txt": "class name",
}


@no_collection()
def parse_cub(folder: Path, split: str | None = None) -> Parsed:
    """Collect the samples and problems of ``images.txt``, ``image_class_labels.txt`` and the files beside them.

    A line is an id and what it says: ``id path`` below ``images``, ``id class``, ``id 1`` for training and ``id 0`` for
    testing in train_test_split.txt, ``id x y width height`` in bounding_boxes.txt, whose edges are x, y, x + width,
    y + height, and ``class name`` in classes.txt. The last two may be missing. Labels are the class less 1.

    Args:
        folder: the one with images.txt.
        split: train or test; None takes all photos.
    """
    name = folder.resolve().name
    found = Parsed("cub", f"{name} {split}" if split else name, folder, folder / "images")
    if split not in (None, "train", "test"):
        found.problem(folder / SPLITS, None, f"no split {shown(split)}", "train or test")
        return found
    paths = _read(folder / IMAGES, found, 1)
    labels = _read(folder / LABELS, found, 1)
    parts = _read(folder / SPLITS, found, 1) if split is not None else {}
    optional = {file: folder / file for file in ("bounding_boxes.txt", "classes.txt")}
    boxes = _read(optional["bounding_boxes.txt"], found, 4) if optional["bounding_boxes.txt"].is_file() else {}
    names = _read(optional["classes.txt"], found, 1) if optional["classes.txt"].is_file() else {}
    lines: list[tuple[int, int, int | None]] = []
    most = 0
    for key, (number, (path,)) in paths.items():
        if split is not None:
            line, (part,) = parts.get(key, (0, ("",)))
            if part not in ("0", "1"):
                where = (folder / SPLITS, line) if line else (folder / IMAGES, number)
                found.problem(*where, f"photo {shown(key)} has no split, got {shown(part)}", _FORMS[SPLITS])
            if part != ("1" if split == "train" else "0"):
                continue
        at, (text,) = labels.get(key, (0, ("",)))
        if not is_safe(path):
            found.problem(folder / IMAGES, number, f"the name {shown(path)}", NAME_FORM)
        elif not at:
            found.problem(folder / IMAGES, number, f"photo {shown(key)} has no label", f"a line in {LABELS}")
        elif not text.isdecimal() or not 1 <= int(text) <= (len(names) or 100_000):
            found.problem(folder / LABELS, at, f"the class {shown(text)}", f"1 to {len(names) or 100_000:,}")
        else:
            spot, box = _box(boxes.get(key), optional["bounding_boxes.txt"], found)
            label = int(text) - 1
            most = max(most, label + 1)
            found.samples.append(Sample(path, found.photos / path, label, as_boxes(box)))
            lines.append((number, at, spot))
    if list(names) != [str(number) for number in range(1, len(names) + 1)]:
        found.problem(optional["classes.txt"], None, "its numbers have gaps or another order", "1, 2, 3...")
    found.classes = tuple(plain_name(text) for _, (text,) in names.values()) or tuple(map(str, range(1, most + 1)))

    def place(index: int) -> Place:
        listed, at, line = lines[index]
        objects = () if line is None else ((optional["bounding_boxes.txt"], line, shown(found.samples[index].name)),)
        return Place((folder / IMAGES, listed), (folder / LABELS, at), (found.samples[index].path, None), objects)

    found.place = place
    return found


def _read(file: Path, found: Parsed, count: int) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Return line and fields by id, in the file's order."""
    entries: dict[str, tuple[int, tuple[str, ...]]] = {}
    for number, line in enumerate(read_lines(file, found), 1):
        if not line:
            continue
        key, *fields = line.split(None, count)
        if len(fields) != count:
            found.problem(file, number, shown(line), _FORMS[file.name])
        elif key in entries:
            found.problem(
                file, number, f"the id {shown(key)} once more, first on line {entries[key][0]}", "each id once"
            )
        else:
            entries[key] = number, tuple(field.strip() for field in fields)
    return entries


def _box(
    entry: tuple[int, tuple[str, ...]] | None, file: Path, found: Parsed
) -> tuple[int | None, list[tuple[float, float, float, float]]]:
    if entry is None:
        return None, []
    line, texts = entry
    try:
        x, y, width, height = map(float, texts)
    except ValueError:
        found.problem(file, line, shown(" ".join(texts)), _FORMS[file.name])
        return None, []
    if (fault := box_fault(x, y, x + width, y + height)) is not None:
        found.problem(file, line, f"{fault} (its edges)", f"{_FORMS[file.name]}: {BOX_FORM}")
        return None, []
    return line, [(x, y, x + width, y + height)]
