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
) -> LocalizationSet:
    """Read the data set, or as many of its photos as wanted, drawn by the seed and kept in order.

    Raises:
        ValueError: options that do not fit the set.
        DataError: what is wrong with its files.
    """
    import numpy as np

    from molt.cli._say import later_process, say
    from molt.cli.data import read_names
    from molt.data.reading import read_set

    options: dict[str, Any] = {"split": split, "photos": photos, "masks": masks}
    if classes is not None:
        options["classes"] = read_names(classes)
    data: LocalizationSet = read_set(
        path, kind=cast("Any", kind), **{k: v for k, v in options.items() if v is not None}
    )
    if not later_process():
        for note in data.notes:
            say(note)
    if limit is not None:
        if limit < 1:
            raise ValueError(f"--limit {limit}: expected at least 1")
        if limit < len(data):
            chosen = np.sort(np.random.default_rng(seed).choice(len(data), limit, replace=False))
            name = f"{data.name}, {limit} of {len(data)} photos"
            data = replace(data, name=name, samples=tuple(data.samples[i] for i in chosen))
    return data


def check_files(paths: Sequence[Path]) -> None:
    """Raise DataError with every file that is not there."""
    from molt.data.annotations import DataError, Problem

    absent = [path for path in dict.fromkeys(paths) if not path.is_file()]
    if absent:
        raise DataError(
            [Problem(path, None, "no such file", "a photo or mask there (--photos, --masks)") for path in absent]
        )
