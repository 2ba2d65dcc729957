"""Reading the data set that a command's options name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from molt.data.annotations import LocalizationSet


def read(
    path: Path,
    kind: str,
    *,
    split: str | None = None,
    photos: Path | None = None,
    masks: Path | None = None,
    classes: Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    difficult: bool = False,
    crowd: bool = False,
) -> LocalizationSet:
    """Read the data set, or as many of its photos as wanted, see :func:`some`.

    Raises:
        ValueError: options that do not fit the set.
        DataError: what is wrong with its files.
    """
    from molt.cli._say import later_process, say
    from molt.cli.data import read_names
    from molt.data.reading import read_set

    options: dict[str, Any] = {"split": split, "photos": photos, "masks": masks}
    options |= {"difficult": difficult or None, "crowd": crowd or None}
    if classes is not None:
        options["classes"] = read_names(classes)
    data: LocalizationSet = read_set(
        path, kind=cast("Any", kind), **{k: v for k, v in options.items() if v is not None}
    )
    if not later_process():
        for note in data.notes:
            say(note)
    return some(data, limit, seed)


def some(data: LocalizationSet, limit: int | None, seed: int) -> LocalizationSet:
    """Return as many photos of a set as wanted, drawn by the seed and kept in order, each with all its classes.

    Raises:
        ValueError: a limit below 1.
    """
    import numpy as np

    if limit is None:
        return data
    if limit < 1:
        raise ValueError(f"--limit {limit}: expected at least 1")
    names = list(dict.fromkeys(sample.name for sample in data.samples))
    if limit >= len(names):
        return data
    chosen = {names[i] for i in np.random.default_rng(seed).choice(len(names), limit, replace=False)}
    samples = tuple(sample for sample in data.samples if sample.name in chosen)
    return replace(data, name=f"{data.name}, {limit} of {len(names)} photos", samples=samples)


def any_object(data: LocalizationSet) -> LocalizationSet:
    """Return the set with each photo once, with all its boxes and masks, whatever their class."""
    import numpy as np

    photos: dict[str, list[Any]] = {}
    for sample in data.samples:
        photos.setdefault(sample.name, []).append(sample)
    samples = tuple(
        replace(
            own[0],
            label=0,
            boxes=np.concatenate([sample.boxes for sample in own]),
            masks=tuple(path for sample in own for path in sample.masks),
            difficult=(),  # their numbers are of the single classes' boxes
            crowd=(),
        )
        for own in photos.values()
    )
    return replace(data, samples=samples, classes=("object",))


def check_files(paths: Sequence[Path]) -> None:
    """Raise DataError with every file that is not there."""
    from molt.data.annotations import DataError, Problem

    absent = [path for path in dict.fromkeys(paths) if not path.is_file()]
    if absent:
        raise DataError(
            [Problem(path, None, "no such file", "a photo or mask there (--photos, --masks)") for path in absent]
        )
