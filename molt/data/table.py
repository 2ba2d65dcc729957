"""Photos and classes in a table: a CSV file of path and label."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from molt._text import plain_name
from molt.data._layouts import PHOTO_FOLDERS, split_word
from molt.data._parsing import MAX_CLASSES, NAME_FORM, Parsed, Place, is_safe, no_collection, read_text, shown
from molt.data.annotations import Sample
from molt.data.images import photo_suffixes

PATHS = (
    "path",
    "image",
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image_path",
    "image_name",
    "img",
    "image_id",
    "id",
)
LABELS = ("label", "class", "labels", "category", "class_name", "classname", "target", "name")
_FORM = "path,label in each line"
_Rows = tuple[tuple[int, int] | None, list[tuple[int, list[str]]], list[str]]


@no_collection()
def parse_table(
    file: Path, photos: Path | None = None, classes: Sequence[str] | None = None, split: str | None = None
) -> Parsed:
    """Collect the samples and problems of a CSV file.

    Its first line may name the columns, a path (path, image, file, filename...) and a label (label, class,
    category...), others being left out; without such a line there are two columns, path and label. Commas, semicolons
    or tabs part them. Labels are class names, sorted; whole numbers are sorted as numbers, and with ``classes`` are
    indices into these. A photo with several labels gives a sample each.

    Where the first photo is there with .jpg, .jpeg or .png added, all names get it.

    Args:
        file: in UTF-8.
        photos: folder the paths start from; the file's own if not given, or where the first photo is found below it.
        classes: class names by label.
        split: which rows, where a column split, set or subset says train, val or test; None where it says but one.
    """
    found = Parsed("csv", file.stem, file, file.parent if photos is None else photos)
    text = read_text(file, found)
    columns, rows, head = (None, [], []) if text is None else _rows(file, text, found)
    if columns is None:
        return found
    at, what = columns
    parted = next((cell for cell in head if cell.casefold() in ("split", "set", "subset")), None)
    if parted is not None or split is not None:
        rows = _of_split(found, file, rows, None if parted is None else head.index(parted), split)
    listed: dict[tuple[str, str], int] = {}
    for line, row in rows:
        if len(row) <= max(at, what) or not row[at].strip() or not (label := plain_name(row[what])):
            found.problem(file, line, shown(",".join(row)), _FORM)
        elif not is_safe(name := _relative(row[at].strip(), found.photos)):
            found.problem(file, line, f"the name {shown(name)}", NAME_FORM)
        elif (earlier := listed.setdefault((name, label), line)) != line:
            found.remark(file, line, f"repeats line {earlier}, {shown(','.join(row))}", "each photo and label once")
    titles = {label for _, label in listed}
    for (_, label), line in listed.items():
        if titles & {plain_name(part) for part in re.split("[|;,]", label)} - {label}:
            found.problem(file, line, f"the label {shown(label)} looks like several", "a line for each of them")
    numbers = all(title.isdecimal() for title in titles)
    names = sorted(titles, key=int) if numbers else sorted(titles)
    labels = {name: label for label, name in enumerate(names)}
    if classes is not None:
        names = list(map(plain_name, classes))
        labels = {str(i) if numbers else name: i for i, name in enumerate(names)}
    if len(names) > MAX_CLASSES:
        found.problem(file, None, f"{len(names):,} classes", f"at most {MAX_CLASSES:,}")
        return found
    suffix = ""
    if listed:
        places = [found.photos] if photos is not None else _places(file.parent)
        found.photos, suffix = _first(places, next(iter(listed))[0])
    lines = []
    for (name, title), line in listed.items():
        if title not in labels:
            found.problem(file, line, f"the class {shown(title)}", f"one of {', '.join(list(labels)[:20])}")
            continue
        full = f"{name}{suffix}"
        found.samples.append(Sample(full, found.photos / full, labels[title], np.zeros((0, 4))))
        lines.append((file, line))
    found.classes = tuple(names)
    found.place = lambda index: Place(lines[index], lines[index], lines[index], ())
    return found


def _of_split(
    found: Parsed, file: Path, rows: list[tuple[int, list[str]]], column: int | None, split: str | None
) -> list[tuple[int, list[str]]]:
    """Return the rows of a split; a problem where there is none, or where several are not told apart."""
    said = ["" if column is None or len(row) <= column else row[column].strip() for _, row in rows]
    there = list(dict.fromkeys(filter(None, said)))
    if split is None:
        if len(there) > 1 and all(split_word(name)[0] for name in there):
            found.problem(file, 1, f"rows of the splits {shown(', '.join(there))}", "split to be one of them")
        return rows
    same = [name for name in there if name == split] or [
        name for name in there if split_word(name)[0] and split_word(name)[0] == split_word(split)[0]
    ]
    if not same:
        where = f"the column has {shown(', '.join(there))}" if there else "there is no column split, set or subset"
        found.problem(file, 1, f"no split {shown(split)}: {where}", "a split of the table, or none")
    return [row for row, name in zip(rows, said, strict=True) if name in same]


def is_table(file: Path) -> bool:
    """Return whether a CSV file has paths of photos and labels."""
    found = Parsed("csv", file.stem, file, file.parent)
    text = read_text(file, found)
    return text is not None and _rows(file, "\n".join(text.split("\n", 100)[:100]), found)[0] is not None


def _rows(file: Path, text: str, found: Parsed) -> _Rows:
    """Return where path and label are, rows with their lines, and columns; None, and a problem, where unknown."""
    try:
        between = csv.Sniffer().sniff(text[: 1 << 14], ",;\t|").delimiter
    except csv.Error:
        between = ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=between, skipinitialspace=True, strict=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        rows.extend((reader.line_num, row) for row in reader if any(cell.strip() for cell in row))
    except csv.Error as error:
        found.problem(file, reader.line_num, f"no CSV ({error})", _FORM)
        return None, [], []
    head = [cell.strip().casefold() for cell in rows[0][1]] if rows else []
    at = next((head.index(name) for name in PATHS if name in head), None)
    what = next((head.index(name) for name in LABELS if name in head), None)
    if at is not None and what is None and len(head) == 2:  # whatever the other is called
        what = 1 - at
    if at is not None and what is not None:
        return (at, what), rows[1:], head
    if len(head) == 2:  # the first line may be one of names that are not known
        for first, (_, row) in enumerate(rows[:2]):
            for column in (0, 1):
                if len(row) == 2 and Path(row[column].strip()).suffix.lower() in photo_suffixes():
                    return (column, 1 - column), rows[first:], []
    came = f"the columns {shown(','.join(head))}" if head else "no line"
    expected = (
        f"a path ({', '.join(PATHS[:4])}...) and a label ({', '.join(LABELS[:2])}...) in the first line, or {_FORM}"
    )
    found.problem(file, 1, came, expected)
    return None, [], []


def _places(folder: Path) -> list[Path]:
    """Return where the photos of a table may be."""
    return [folder, *(folder / below for below in (*PHOTO_FOLDERS, "train"))]


def _relative(name: str, folder: Path) -> str:
    """Return a name without the folder that it starts from where it is absolute, and without ./ in front."""
    path = PurePosixPath(name)
    top = PurePosixPath(folder.absolute())
    return str(path.relative_to(top) if path.is_relative_to(top) else path)


def _first(places: list[Path], name: str) -> tuple[Path, str]:
    """Return the folder that has a photo, and what its name lacks."""
    tries = ((place, suffix) for suffix in ("", ".jpg", ".jpeg", ".png") for place in places)
    return next(((place, suffix) for place, suffix in tries if (place / f"{name}{suffix}").is_file()), (places[0], ""))
