"""The wsolevaluation layout's localization.txt, boxes or masks, and how many lines the official files have."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from molt.data._parsing import BOX_FORM, NAME_FORM, Parsed, box_fault, is_safe, read_lines, shown

_BOX_LINE = "path,x0,y0,x1,y1"
_MASK_LINE = "path,mask.png,ignore.png"


@dataclass(frozen=True)
class Official:
    """Lines of an official split: photos, boxes or masks, and how many of these repeat an earlier line."""

    photos: int
    objects: int
    repeated: int = 0


# Counted in the files of github.com/clovaai/wsolevaluation; ILSVRC's training split in its list of photos.
OFFICIAL = {
    ("cub", "train"): Official(5_994, 5_994),
    ("cub", "val"): Official(1_000, 1_000),
    ("cub", "test"): Official(5_794, 5_794),
    ("ilsvrc", "train"): Official(1_281_167, 0),
    ("ilsvrc", "val"): Official(10_000, 18_532),
    ("ilsvrc", "test"): Official(50_000, 80_477, repeated=4),
    ("openimages", "train"): Official(29_819, 0),
    ("openimages", "val"): Official(2_500, 3_854),
    ("openimages", "test"): Official(5_000, 7_632),
}
_OFFICIAL_NAME = re.compile(r"(cub|ilsvrc|openimages)(?![a-z])", re.IGNORECASE)


def official_split(folder: Path) -> Official | None:
    """Return the counts of the official split that a folder and the one above it are named after."""
    full = folder.resolve()
    named = _OFFICIAL_NAME.match(full.parent.name)
    return OFFICIAL.get((named[1].lower(), full.name)) if named else None


class Objects:
    """Boxes or masks, in lists as long as there are of them, and ignore masks by photo."""

    def __init__(self, file: Path, root: Path, ids: dict[str, int], found: Parsed) -> None:
        self.file = file
        self.names: list[str] = []
        self.lines: list[int] = []
        self.edges: list[float] = []  # four a box: flat, as many small lists would keep the garbage collector busy
        self.masks: list[Path] = []
        self.ignore: dict[str, Path] = {}
        self.count = 0
        self._root = root
        self._ids = ids
        self._found = found
        self._masked: set[str] = set()

    def by_photo(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the objects' numbers sorted by photo, and where each photo's start in them, the end last."""
        numbers = {name: number for number, name in enumerate(self._ids)}
        owners = np.array([numbers[name] for name in self.names], np.int64)
        starts = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=len(numbers)))])
        return np.argsort(owners, kind="stable"), starts

    def read(self, official: Official | None) -> list[tuple[int, str]]:
        """Read the file; return line and photo of what is of none of the photos."""
        lines = read_lines(self.file, self._found)
        entries = [(number, line) for number, line in enumerate(lines, 1) if line]
        self.count = len(entries)
        # By most of the lines: one that lacks a field does not make all others wrong.
        masks = 2 * sum(line.count(",") == 2 for _, line in entries) > len(entries)
        add = self._add_mask if masks else self._add_box
        others: list[tuple[int, str]] = []
        seen: dict[object, int] = {}
        repeated: list[tuple[int, int]] = []
        for number, line in entries:
            name = add(line, number)
            if name is None:
                continue
            if name not in self._ids:
                others.append((number, name))
                continue
            key = line if masks else (name, *self.edges[-4:])
            if seen.setdefault(key, number) != number:
                repeated.append((number, seen[key]))
        if repeated and official is not None and (official.objects, official.repeated) == (self.count, len(repeated)):
            self._found.notes.append(f"repeated lines in {self.file.name}: {len(repeated)}, as in the official file")
        else:
            for number, earlier in repeated:
                text = f"repeats line {earlier}, {shown(lines[number - 1])}"
                self._found.remark(self.file, number, text, "each box or mask once")
        return others

    def _add_box(self, line: str, number: int) -> str | None:
        """Keep the box of one line and return its photo's name, or None where the line is wrong."""
        name, *fields = line.rsplit(",", 4)
        try:
            x0, y0, x1, y1 = map(float, fields)
        except ValueError:
            self._found.problem(self.file, number, shown(line), _BOX_LINE)
            return None
        fault = box_fault(x0, y0, x1, y1)
        if fault is not None:
            self._found.problem(self.file, number, f"{fault}, photo {shown(name)}", f"{_BOX_LINE}: {BOX_FORM}")
            return None
        if name in self._ids:
            self.names.append(name)
            self.lines.append(number)
            self.edges += (x0, y0, x1, y1)
        return name

    def _add_mask(self, line: str, number: int) -> str | None:
        """Keep the mask of one line and return its photo's name, or None where the line is wrong."""
        fields = line.split(",")
        if len(fields) != 3 or not fields[1]:
            self._found.problem(self.file, number, shown(line), _MASK_LINE)
            return None
        name, mask, ignore = fields
        for path in (mask, ignore):
            if path and not is_safe(path):
                self._found.problem(self.file, number, f"the name {shown(path)}", NAME_FORM)
                return None
        if name not in self._ids:
            return name
        if ignore and name in self._masked:
            text = f"an ignore mask, {shown(ignore)}, not on the first line of photo {shown(name)}"
            form = f"{_MASK_LINE} on its first line, 'path,mask.png,' on the others"
            self._found.problem(self.file, number, text, form)
            return None
        if ignore:
            self.ignore[name] = self._root / ignore
        self._masked.add(name)
        self.names.append(name)
        self.lines.append(number)
        self.masks.append(self._root / mask)
        return name
