"""Photos in one folder a class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from molt.data._parsing import Parsed, Place, as_folder, no_collection
from molt.data.annotations import LocalizationSet, Sample
from molt.data.images import PhotoError, find_photos, photo_suffixes


def read_image_folder(folder: str | Path) -> LocalizationSet:
    """Read photos from class folders: ``folder/CLASS/.../photo.jpg``, without boxes.

    Labels count the class folders sorted by name, as torchvision's ImageFolder does, except that folders whose name
    starts with a dot are none. Photos are known by suffix, at any depth; links to folders inside a class folder are
    not followed. Other files are left out (:func:`molt.data.check_set` counts them).

    Raises:
        DataError: no such folder, one that cannot be read, or no photo in it.
    """
    return parse_image_folder(as_folder(folder)).result()


@no_collection()
def parse_image_folder(folder: Path) -> Parsed:
    """Collect the samples and problems of class folders."""
    found = Parsed("folder", folder.resolve().name, folder, folder)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        found.problem(folder, None, f"cannot be read ({error.strerror})", "a folder with one folder a class")
        return found
    classes = []
    for entry in entries:
        if entry.is_dir() and not entry.name.startswith("."):
            classes.append(entry.name)
        elif entry.is_dir():
            found.left_out["hidden folders"] += 1
        elif Path(entry.name).suffix.lower() in photo_suffixes():
            found.remark(
                Path(entry.path), None, "a photo outside the class folders", "it in a folder named as its class"
            )
        else:
            found.left_out["other files"] += 1
    found.classes = tuple(classes)

    def unreadable(error: PhotoError) -> None:
        found.problem(folder, None, str(error), "folders that can be read")

    for label, name in enumerate(classes):
        photos, others = find_photos(folder / name, unreadable)
        for path in photos:
            relative = path.relative_to(folder).as_posix()
            found.samples.append(Sample(relative, path, label, np.zeros((0, 4))))
        if others:
            found.left_out["other files"] += others
        if not photos:
            found.remark(folder / name, None, "no photo in this class folder", "at least one")
        for parent, below, _ in os.walk(folder / name):
            for link in (Path(parent, entry) for entry in below if Path(parent, entry).is_symlink()):
                found.remark(link, None, "a link to a folder, which is not followed", "photos in folders of their own")

    def place(index: int) -> Place:
        where = (found.samples[index].path, None)
        return Place(where, where, where, ())

    found.place = place
    return found
