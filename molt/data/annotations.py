"""What annotations say: photos, their labels, boxes and masks, and what is wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from molt._text import plain_name
from molt._words import count

SetKind = Literal["folder", "wsol", "voc", "coco", "yolo", "cub", "csv"]


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a data set.

    Attributes:
        file: the annotation file, photo or folder where it is.
        line: line in that file, counted from 1, or None where the file has no lines.
        message: what came.
        expected: the form or value expected.
    """

    file: Path
    line: int | None
    message: str
    expected: str

    def __str__(self) -> str:
        where = str(self.file) if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.message} (expected {self.expected})"


class DataError(ValueError):
    """A data set that cannot be used; ``problems`` holds everything found, the message the first and how many."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        more = len(self.problems) - 1
        super().__init__(f"{self.problems[0]}" + (f"; and {count(more, 'more problem')}" if more else ""))


@dataclass(frozen=True, eq=False)
class Sample:
    """One photo of one class.

    A photo that shows several classes is several samples, which differ in ``label``.

    Attributes:
        name: the photo's name in its annotations, with / between folders; with ``label`` it is unique in a set.
        path: the photo's file; it need not exist before it is read.
        label: index into the set's ``classes``.
        boxes: (n, 4) float64 xyxy, edges in pixels of the photo; n is 0 where there are none.
        size: (width, height) in pixels as the annotations say, or None where they do not.
        masks: files of the object's masks, one an instance.
        ignore: file of the pixels that do not count, or None.
        difficult: numbers of the boxes that VOC marks as difficult, counted from 0.
        crowd: numbers of the boxes that COCO marks as round a crowd, counted from 0.
    """

    name: str
    path: Path
    label: int
    boxes: NDArray[np.float64]
    size: tuple[int, int] | None = None
    masks: tuple[Path, ...] = ()
    ignore: Path | None = None
    difficult: tuple[int, ...] = ()
    crowd: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class LocalizationSet:
    """Photos with one label each, to localize or to train on.

    Attributes:
        name: what to call it in tables.
        kind: the layout it was read from.
        samples: in the order of the annotations.
        classes: class names by label, in Unicode NFC and without white space around them.
        left_out: what the reader left out on purpose, such as objects marked difficult, and how often.
        remarks: what could be read but is hardly meant so, such as lines about photos that are not listed.
        notes: how something was read, a line each.
        unlabelled: photos without an object to keep, such as YOLO's background images: a sample each without boxes,
            of label -1. There is no class to train or to score on.
    """

    name: str
    kind: SetKind
    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    remarks: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    unlabelled: tuple[Sample, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(map(plain_name, self.classes)))

    def __len__(self) -> int:
        return len(self.samples)

    def counts(self) -> list[int]:
        """Return the number of samples of each class."""
        found = Counter(sample.label for sample in self.samples)
        return [found[label] for label in range(len(self.classes))]
