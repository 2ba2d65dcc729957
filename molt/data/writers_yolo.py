"""Boxes in the layout of YOLO: one text file a photo, lists of photos, data.yaml."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

from molt._files import user_path, whole_file
from molt.data.writers import Annotation, Checker, Written, check_line, check_relative, class_names, link, place_in
from molt.data.yolo import DATA, SPLITS, label_file, read_data


def write_yolo(
    folder: str | Path,
    items: Iterable[Annotation],
    classes: Sequence[str],
    *,
    split: str = "train",
    images: str | Path | None = None,
    confidence: bool = False,
    clip: bool = False,
) -> Written:
    """Write ``labels/<name without suffix>.txt`` a photo, the list ``<split>.txt`` and data.yaml.

    A line is ``class cx cy width height``, shares of the photo's sides with 12 digits; a photo without boxes has an
    empty file. Ultralytics asks for both train and val: until the other one is written, data.yaml names the same list
    for both. Photos belong in ``images``, under their names, and are not copied. Folders in names are kept.

    Args:
        folder: made if missing. Files of the same names are replaced, each when it is whole, others stay; a data.yaml
            that is there must have the same classes and gets the split, so that several can share a folder.
        items: a list or generator; only names are kept in memory. None at all gives an empty list of photos.
        classes: names by label, all different; label -1 takes the class called 'object'.
        split: train, val or test.
        images: folder of the photos, to which ``images`` becomes a link; None leaves it to you to put them there, as
            does a disk without links (``Written.unlinked``).
        confidence: True adds the score, in [0, 1], as a sixth value; trainers take five.
        clip: as for :func:`write_coco`.

    Raises:
        TypeError, ValueError: a wrong argument or item; a name twice, leading out of the folder, with a folder called
            images (which the layout replaces by labels), or that a line of text cannot hold; two photos that differ
            only in their suffix. What was written before it stays, but neither list nor data.yaml.
        DataError: the data.yaml that is there is broken.
        OSError: a file cannot be written.
    """
    names, root = class_names(classes), user_path(folder)
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    keys = check_folder(root, names, None if images is None else user_path(images))
    root.mkdir(parents=True, exist_ok=True)
    linked = images is None or link(root / "images", user_path(images))
    checker = Checker(names, clip, yolo_label)
    with whole_file(root / f"{split}.txt") as part, part.open("w", encoding="utf-8", newline="\n") as out:
        for item in checker.each(items):
            with whole_file(place_in(root, yolo_label(item.name))) as file:
                file.write_text("".join(_lines(item, confidence)), encoding="ascii", newline="\n")
            out.write(f"./images/{item.name}\n")
    with whole_file(root / DATA) as part:
        told = {"names": dict(enumerate(names)), "nc": len(names)} | _splits(keys, split)
        part.write_text(yaml.safe_dump(told, sort_keys=False, allow_unicode=True), encoding="utf-8", newline="\n")
    return replace(checker.written(root), unlinked=0 if linked else checker.photos)


def _splits(keys: dict[str, Any], split: str) -> dict[str, Any]:
    """Return what a data.yaml says with a split's list in it; train or val, not written so far, is the other one's."""
    lists = {one: f"{one}.txt" for one in SPLITS}
    own = {key: value for key, value in keys.items() if value not in lists.values() or value == lists.get(key)}
    own |= {split: lists[split]}
    some = next(own[one] for one in SPLITS if own.get(one))
    return own | {one: some for one in ("train", "val") if not own.get(one)}


def yolo_label(name: str) -> str:
    """Return the label file of a photo relative to the set, or raise ValueError where the layout has none for it."""
    if "images" in PurePosixPath(check_relative(check_line(name, "the name"))).parts[:-1]:
        raise ValueError(f"name must have no folder 'images', which YOLO replaces by 'labels', got {name!r}")
    return label_file(f"images/{name}")


def check_folder(root: Path, names: tuple[str, ...], images: Path | None) -> dict[str, Any]:
    """Return what the data.yaml of a folder says, nothing where there is none.

    Raises:
        ValueError: the folder holds a set of other classes or at another ``path``, or other photos; or ``images`` is
            no folder.
        DataError: the data.yaml is broken.
    """
    if images is not None:
        link = root / "images"
        if not images.is_dir():
            raise ValueError(f"images must be a folder of photos, got {images}")
        if (link.exists() or link.is_symlink()) and link.resolve() != images.resolve():
            raise ValueError(f"images must be what {link} already is or leads to, got {images}")
    if not (root / DATA).exists():
        return {}
    there = read_data(root)
    if there.names != names or there.root.resolve() != root.resolve():
        raise ValueError(f"classes and place must be those of {there.file}, which names others")
    return there.keys


def _lines(item: Annotation, confidence: bool) -> Iterator[str]:
    if confidence and len(item.boxes) and (item.scores is None or not ((item.scores >= 0) & (item.scores <= 1)).all()):
        raise ValueError(f"{item.name!r}: scores must be given, in [0, 1], to be written as confidences")
    corners = item.boxes.reshape(-1, 2, 2) / np.array(item.size)
    shares = np.concatenate([corners.mean(axis=1), corners[:, 1] - corners[:, 0]], axis=1)
    if confidence and item.scores is not None:
        shares = np.concatenate([shares, item.scores[:, None]], axis=1)
    for label, values in zip(item.labels.tolist(), shares, strict=True):
        yield " ".join([str(label), *(np.format_float_positional(v, 12, fractional=False, trim="-") for v in values)])
        yield "\n"
