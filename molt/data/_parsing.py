"""What the readers of annotations share: what they find, safe names, text files and boxes."""

from __future__ import annotations

import codecs
import gc
import math
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from molt._text import plain_name
from molt.data.annotations import DataError, LocalizationSet, Problem, Sample, SetKind

_NO_CHARSETS = {"punycode", "idna", "unicode_escape", "raw_unicode_escape"}  # slow, or no text of a file
MAX_TEXT = 2 << 30  # bytes; the largest official file, COCO's train2017, has 448 MB
MAX_CLASSES = 100_000
MAX_DIGITS = 100  # of a whole number written as text
MAX_COORDINATE = 1 << 24  # from here on float32 does not count single pixels
BOX_FORM = f"finite edges x0 <= x1, y0 <= y1 within {MAX_COORDINATE:,} pixels"
SIZE_FORM = f"whole numbers of pixels, 1 to {MAX_COORDINATE:,}"
NAME_FORM = "a relative name with / between folders that stays below its folder"

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_IN_LINES = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
_DRIVE = re.compile(r"[A-Za-z]:")

Where = tuple[Path, int | None]


class Place(NamedTuple):
    """Where the annotations speak of a sample: file and line of each, and of each box or mask also how to call it."""

    listed: Where
    label: Where
    size: Where
    objects: tuple[tuple[Path, int | None, str], ...]


@dataclass
class Parsed:
    """Everything one layout's parser found.

    Attributes:
        kind: the layout.
        name: what to call the set.
        root: what was read, to name where a file or line cannot be.
        photos: folder that holds the photos.
        samples: those that are fine.
        unlabelled: photos without an object to keep.
        classes: class names by label.
        place: gives the place of a sample by its index; None: its own file.
        problems: what keeps the annotations from being read; a reader raises them.
        remarks: what only the check reports: it can be read, but is hardly meant so.
        left_out: what was left out on purpose, and how often.
        notes: lines for the summary.
    """

    kind: SetKind
    name: str
    root: Path
    photos: Path
    samples: list[Sample] = field(default_factory=list)
    unlabelled: list[Sample] = field(default_factory=list)
    classes: tuple[str, ...] = ()
    place: Callable[[int], Place] | None = None
    problems: list[Problem] = field(default_factory=list)
    remarks: list[Problem] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def problem(self, file: Path, line: int | None, message: str, expected: str) -> None:
        """Add what keeps the annotations from being read."""
        self.problems.append(Problem(file, line, message, expected))

    def remark(self, file: Path, line: int | None, message: str, expected: str) -> None:
        """Add what only the check reports."""
        self.remarks.append(Problem(file, line, message, expected))

    def blank(self, name: str, path: Path, size: tuple[int, int] | None = None) -> None:
        """Add a photo without an object to keep."""
        self.unlabelled.append(Sample(name, path, -1, as_boxes([]), size))
        self.left_out["photos without an object to keep"] += 1

    def result(self) -> LocalizationSet:
        """Return the set.

        Raises:
            DataError: there are problems, or no sample.
        """
        if not self.problems and not self.samples:
            left = "".join(f"; {what}: {count:,}" for what, count in self.left_out.items())
            self.problem(self.root, None, f"there is no photo with a label{left}", "at least one")
        if self.problems:
            raise DataError(self.problems)
        return LocalizationSet(
            self.name,
            self.kind,
            tuple(self.samples),
            self.classes,
            dict(self.left_out),
            tuple(self.remarks),
            tuple(self.notes),
            tuple(self.unlabelled),
        )


@contextmanager
def no_collection() -> Iterator[None]:
    """Pause the garbage collector, which takes half of the time to find that nothing of a large set is garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def shown(text: object) -> str:
    """Return text from a file, quoted, on one line and not too long; anything else so that its type can be seen."""
    if isinstance(text, str):
        return repr(text if len(text) <= 120 else text[:119] + "…")
    text = repr(text)
    return text if len(text) <= 120 else text[:119] + "…"


def as_number(value: Any) -> float | None:
    """Return a number, also where it is written as text, or None; True is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str) or (isinstance(value, str) and "_" in value):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        return None


def as_integer(value: Any) -> int | None:
    """Return a whole number, also where it is written as text or with .0, or None; True is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().removeprefix("-").isdecimal() and len(value) < MAX_DIGITS:
        return int(value)
    number = as_number(value)
    return int(number) if number is not None and number.is_integer() else None


def as_flag(value: Any) -> bool | None:
    """Return whether 0 or 1, false or true, a text of these, or nothing stands there; None for anything else."""
    if isinstance(value, str):
        value = {"": 0, "false": 0, "true": 1}.get(value.strip().lower(), value)
    number = 0 if value is None else int(value) if isinstance(value, bool) else as_integer(value)
    return bool(number) if number in (0, 1) else None


def check_names(names: Sequence[str], file: Path, line: int | None, ids: Sequence[object] = ()) -> list[Problem]:
    """Return a problem for each class whose name another one has; ``ids`` are theirs, else they count from 0."""
    ids = ids or range(len(names))
    first: dict[str, int] = {}
    problems = []
    for number, name in enumerate(names):
        if (earlier := first.setdefault(plain_name(name), number)) != number:
            text = f"the classes {shown(ids[earlier])} and {shown(ids[number])} are both called {shown(name)}"
            problems.append(Problem(file, line, text, "names that differ"))
    return problems


def is_safe(name: str) -> bool:
    """Return whether a name from a file stays below the folder it is joined to."""
    if not name or name[0] == "/" or "\\" in name or name.isspace() or _CONTROL.search(name):
        return False
    if ":" in name and _DRIVE.match(name):
        return False
    return ".." not in name or ".." not in name.split("/")


def read_bytes(path: Path, found: Parsed, limit: int) -> bytes | None:
    """Return what a file holds; None, and a problem, where it cannot be read or is over ``limit`` bytes."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            found.problem(path, None, "is not a file", "a text file")
            return None
        if status.st_size > limit:
            found.problem(path, None, f"has {status.st_size:,} bytes", f"at most {limit:,}")
            return None
        return path.read_bytes()
    except FileNotFoundError:
        found.problem(path, None, "no such file", "a text file")
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        found.problem(path, None, f"cannot be read ({getattr(error, 'strerror', None) or error})", "a text file")
    return None


def read_text(path: Path, found: Parsed, limit: int = MAX_TEXT) -> str | None:
    """Return a UTF-8 file's text without its byte order mark; None, and a problem, where there is none."""
    data = read_bytes(path, found, limit)
    return None if data is None else decode(data, "utf-8-sig", path, found)


def decode(data: bytes, encoding: str, path: Path, found: Parsed) -> str | None:
    """Return what a file's bytes say in an encoding; None, and a problem, where they say nothing or it is unknown."""
    name = encoding.upper().removesuffix("-SIG")
    try:
        if codecs.lookup(encoding).name in _NO_CHARSETS:
            raise LookupError
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found.problem(path, line, f"the byte 0x{error.object[error.start]:02x} is not {name}", f"text in {name}")
    except (LookupError, ValueError):  # ValueError: what is no text, and codecs that end so
        found.problem(path, 1, f"the encoding {shown(encoding)} is unknown", "one that Python knows, such as utf-8")
    return None


def read_lines(path: Path, found: Parsed) -> list[str]:
    """Return a file's lines, blank ones as "" so that line n stays at n - 1; line ends may be those of Windows."""
    text = read_text(path, found)
    if text is None:
        return []
    # Not splitlines: a name may hold what Unicode calls a line separator.
    lines = text.replace("\r\n", "\n").split("\n")
    if _IN_LINES.search(text.replace("\r\n", "\n")):
        for number, line in enumerate(lines, 1):
            if _IN_LINES.search(line):
                found.problem(path, number, f"control character in {shown(line)}", "one entry a line, without any")
                lines[number - 1] = ""
    return ["" if line.isspace() else line for line in lines]


def box_fault(x0: float, y0: float, x1: float, y1: float) -> str | None:
    """Return what makes a box unusable, or None; a box without area is usable, though no map will match it."""
    if -MAX_COORDINATE <= x0 <= x1 <= MAX_COORDINATE and -MAX_COORDINATE <= y0 <= y1 <= MAX_COORDINATE:
        return None
    box = f"box {x0:g},{y0:g},{x1:g},{y1:g}"
    if not all(np.isfinite((x0, y0, x1, y1))):
        return f"{box} is not finite"
    if x1 < x0 or y1 < y0:
        return f"{box} is inverted"
    return f"{box} is out of all proportion"


def is_size(*sides: int) -> bool:
    """Return whether width and height can be a photo's."""
    return min(sides) >= 1 and max(sides) <= MAX_COORDINATE


def as_boxes(boxes: Sequence[tuple[float, float, float, float]]) -> NDArray[np.float64]:
    """Return boxes as (n, 4) float64, also where n is 0."""
    return np.array(boxes, np.float64).reshape(-1, 4)


def ranges(numbers: Sequence[int], most: int = 8) -> str:
    """Return sorted numbers in short: "3, 7-9", at most ``most`` groups of them."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][1] + 1:
            groups[-1][1] = number
        else:
            groups.append([number, number])
    texts = [f"{low}-{high}" if high > low else f"{low}" for low, high in groups[:most]]
    return ", ".join(texts) + (", ..." if len(groups) > most else "")
