"""Which classes a classifier holds likeliest: from a file, or from its probabilities."""

from __future__ import annotations

import csv
import functools
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from molt._words import count
from molt.classes import find_class
from molt.data.annotations import DataError, Problem, Sample
from molt.evaluation.maps import Missing
from molt.evaluation.scores import TOP_K

OTHER = "-"  # a class that the set does not have


class Predictions:
    """Classes by photo from a CSV file: its lines are a photo's name, then its classes from the likeliest down.

    Called with samples it gives each the place of its label among these, 0 the likeliest, or None where it is not one.

    Args:
        path: the file.
        samples: the photos whose classes are wanted.
        classes: class names by label; a class may also be given by its number, and ``-`` is one the set does not have.
        missing: ``"stop"``: a photo without a line is an error; ``"zero"``: none of its classes is right.
        of: all photos of the set where ``samples`` are some of them.

    Attributes:
        problems: lines of no photo.

    Raises:
        DataError: a file that cannot be read, and every line that does not hold.
    """

    def __init__(
        self,
        path: Path,
        samples: Sequence[Sample],
        classes: Sequence[str],
        *,
        missing: Missing = "stop",
        of: Sequence[Sample] | None = None,
    ) -> None:
        known = {sample.name for sample in (samples if of is None else of)}
        find = functools.cache(lambda text: find_class(text, tuple(classes)))
        least = min(max(TOP_K), len(classes))
        self._found: dict[str, list[int | None]] = {}
        wrong, stray = [], []
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                for number, row in enumerate(csv.reader(file), 1):
                    name, *texts = [cell.strip() for cell in row] or [""]
                    if not any(row):
                        continue
                    if name not in known:
                        stray.append(Problem(path, number, f"{name!r} is no photo of the set", "a photo's name"))
                        continue
                    try:
                        if name in self._found or len(texts) < least:
                            what = "comes twice" if name in self._found else f"has {count(len(texts), 'class')}"
                            raise ValueError(f"photo {name!r} {what}")
                        self._found[name] = [None if text == OTHER else find(text) for text in texts]
                    except ValueError as error:
                        expected = f"one line a photo: its name and at least {least} classes of the set, or {OTHER}"
                        wrong.append(Problem(path, number, str(error), expected))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError([Problem(path, None, f"cannot be read ({error})", "a CSV file of classes")]) from error
        if missing == "stop" and not wrong:
            names = dict.fromkeys(sample.name for sample in samples if sample.name not in self._found)
            wrong = [
                Problem(path, None, f"photo {name!r} has no line", "one a photo, or --missing zero") for name in names
            ]
        if wrong:
            raise DataError(wrong)
        self.problems = tuple(stray)

    def __call__(self, samples: Sequence[Sample]) -> list[int | None]:
        """Return the place of each sample's label among its photo's classes."""
        named = [self._found.get(sample.name, []) for sample in samples]
        return [own.index(s.label) if s.label in own else None for own, s in zip(named, samples, strict=True)]


def place(probabilities: Tensor, group: Sequence[int]) -> int:
    """Return the place, 0 the likeliest, of the likeliest class of a group among (num_classes,) probabilities.

    Of equally likely classes the one of the lower index comes first.
    """
    best = min(group, key=lambda index: (-float(probabilities[index]), index))
    ahead = (probabilities > probabilities[best]).sum() + (probabilities[:best] == probabilities[best]).sum()
    return int(ahead)
