"""Photos in one folder a class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from molt._files import user_path
from molt._text import plain_name
from molt.data._folders import OWN, foreign
from molt.data._parsing import Parsed, Place, no_collection
from molt.data.annotations import LocalizationSet, Sample
from molt.data.images import PhotoError, photo_suffixes, walk_photos
from molt.data.voc import boxes_of_class


def read_image_folder(folder: str | Path) -> LocalizationSet:
    """Read photos from class folders: ``folder/CLASS/.../photo.jpg``.

    Labels count the class folders sorted by name, as torchvision's ImageFolder does. Hidden folders, those of systems
    and what molt itself wrote are no classes (:func:`molt.data.find_photos`). A class is called as its folder, in the
    normal form NFC and without white space at its ends. Photos are known by suffix, at any depth; links to folders
    inside a class folder are not followed. Boxes are read where all folders are ILSVRC's WordNet ids and its XML is in
    Annotations, in or beside the folder or as ILSVRC has it; there are none otherwise. Other files are left out
    (:func:`molt.data.check_set` counts them).

    Raises:
        DataError: no such folder, one that cannot be read, no photo in it, or two folders of one class name.
    """
    return parse_image_folder(user_path(folder)).result()


@no_collection()
def parse_image_folder(folder: Path) -> Parsed:
    """Collect the samples and problems of class folders."""
    found = Parsed("folder", folder.resolve().name, folder, folder)
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: (plain_name(entry.name), entry.name))
    except OSError as error:
        found.problem(folder, None, f"cannot be read ({error.strerror})", "a folder with one folder a class")
        return found
    folders: dict[str, str] = {}  # class name -> folder
    for entry in entries:
        if whose := foreign(entry.name):
            found.left_out[f"{whose} {'folders' if entry.is_dir() else 'files'}"] += 1
        elif entry.is_dir():
            name = plain_name(entry.name)
            if folders.setdefault(name, entry.name) != entry.name:
                text = f"the folders {folders[name]!a} and {entry.name!a} are the same class name, {name!r}"
                found.problem(
                    folder, None, text, "one folder a class: names count in Unicode NFC, without blanks around"
                )
        elif Path(entry.name).suffix.lower() in photo_suffixes():
            found.remark(
                Path(entry.path), None, "a photo outside the class folders", "it in a folder named as its class"
            )
        else:
            found.left_out["other files"] += 1

    def unreadable(error: PhotoError) -> None:
        found.problem(folder, None, str(error), "folders that can be read")

    boxes = _xml_folder(folder, list(folders))
    if boxes is not None and boxes.parent == folder:
        del folders[boxes.name]
    classes: list[str] = []
    for name, title in folders.items():
        seen = walk_photos(folder / title, unreadable)
        if not seen.photos and seen.left_out[f"{OWN} files"]:
            found.left_out[f"{OWN} folders"] += 1
            continue
        for path in seen.photos:
            relative = path.relative_to(folder).as_posix()
            own, size = _boxes(boxes, name, path, found)
            found.samples.append(Sample(relative, path, len(classes), own, size))
        found.left_out += seen.left_out
        if seen.others:
            found.left_out["other files"] += seen.others
        if not seen.photos:
            found.remark(folder / title, None, "no photo in this class folder", "at least one")
        for parent, below, _ in os.walk(folder / title):
            below[:] = [entry for entry in below if not foreign(entry)]
            for link in (Path(parent, entry) for entry in below if Path(parent, entry).is_symlink()):
                found.remark(link, None, "a link to a folder, which is not followed", "photos in folders of their own")
        classes.append(name)
    found.classes = tuple(classes)

    def place(index: int) -> Place:
        where = (found.samples[index].path, None)
        return Place(
            where, where, where, tuple((*where, f"box {i + 1}") for i in range(len(found.samples[index].boxes)))
        )

    found.place = place
    return found


def _xml_folder(folder: Path, names: list[str]) -> Path | None:
    """Return the folder of ILSVRC's XML files for class folders of WordNet ids, or None."""
    if not any(map(is_wordnet_id, names)) or not all(is_wordnet_id(name) or name == "Annotations" for name in names):
        return None
    full = folder.resolve()
    places = [folder / "Annotations", full.parent / "Annotations" / full.name, full.parent / "Annotations"]
    places.append(Path(str(full).replace("/Data/", "/Annotations/", 1)))
    return next((place for place in places if place.is_dir() and place != full), None)


def is_wordnet_id(name: str) -> bool:
    """Return whether a folder is called as one of ImageNet's classes, n01440764 say."""
    return len(name) == 9 and name[0] == "n" and name[1:].isdecimal()


def _boxes(
    annotations: Path | None, name: str, photo: Path, found: Parsed
) -> tuple[NDArray[np.float64], tuple[int, int] | None]:
    for file in (
        () if annotations is None else (annotations / f"{photo.stem}.xml", annotations / name / f"{photo.stem}.xml")
    ):
        if file.is_file():
            return boxes_of_class(file, name, found)
    return np.zeros((0, 4)), None
