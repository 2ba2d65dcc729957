"""Boxes in the layout of Pascal VOC: one XML file a photo, and lists of photos."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from molt._files import user_path, whole_file
from molt.data.writers import (
    Annotation,
    Checker,
    Written,
    check_line,
    check_relative,
    class_names,
    link,
    place_in,
    stem,
    whole_pixels,
)


def write_voc(
    folder: str | Path,
    items: Iterable[Annotation],
    classes: Sequence[str],
    *,
    split: str = "train",
    images: str | Path | None = None,
    rounded: bool = True,
    clip: bool = False,
) -> Written:
    """Write ``Annotations/<name without suffix>.xml`` a photo and ``ImageSets/Main/<split>.txt``, their list.

    Photos belong in ``JPEGImages`` and are not copied; folders in their names are kept. Coordinates are 1-based and
    inclusive: pixel columns xmin to xmax, so edges x0, x1 become xmin = x0 + 1, xmax = x1. ``rounded`` takes each edge
    to the nearest pixel border first, halves to the right and down; a box that would vanish takes the pixel its centre
    is in. A score becomes ``<score>`` of its object, which is not of VOC. Labels become names: their order is lost.

    Args:
        folder: made if missing. Files of the same names are replaced, each when it is whole, others stay, so several
            splits can share it.
        items: a list or generator; only names are kept in memory. None at all gives an empty list of photos.
        classes: names by label, all different; label -1 takes the class called 'object'.
        split: name of the list, such as train, val or test.
        images: folder of the photos, to each of which ``JPEGImages`` gets a relative link; photos that are there stay.
            None leaves it to you to put them there, as does a disk without links (``Written.unlinked``).
        rounded: False writes edges as they are, x0 + 1 and x1, as floats, which not every reader takes.
        clip: as for :func:`write_coco`.

    Raises:
        TypeError, ValueError: a wrong argument or item; a name twice, leading out of the folder, or that a line of
            text cannot hold; two photos that differ only in their suffix. What was written before it stays, but not
            the list.
        OSError: a file cannot be written.
    """
    names = class_names(classes)
    for name in names:
        check_line(name, "the class name")
    root, listed = user_path(folder), f"ImageSets/Main/{split_name(split)}.txt"
    images = None if images is None else user_path(images)
    if images is not None and not images.is_dir():
        raise ValueError(f"images must be a folder of photos, got {images}")
    if images is not None and (root / "JPEGImages").resolve() == images.resolve():
        images = None  # they are there
    checker, unlinked = Checker(names, clip, voc_stem), 0
    with whole_file(place_in(root, listed)) as part, part.open("w", encoding="utf-8", newline="\n") as out:
        for item in checker.each(items):
            key = voc_stem(item.name)
            with whole_file(place_in(root, f"Annotations/{key}.xml")) as xml:
                ET.ElementTree(_annotation(item, names, rounded)).write(xml, encoding="utf-8")
            out.write(f"{key}\n")
            if images is not None:
                unlinked += not link(place_in(root, f"JPEGImages/{item.name}"), images / item.name, relative=True)
    return replace(checker.written(root), unlinked=unlinked)


def voc_stem(name: str) -> str:
    """Return what VOC calls a photo, its name without suffix, or raise ValueError where a line cannot hold it."""
    return check_line(stem(check_line(name, "the name")), "the name")


def split_name(split: str) -> str:
    """Return the name of a split, or raise ValueError where it is no plain file name."""
    if "/" in check_relative(split):
        raise ValueError(f"split must be a plain name such as 'train', got {split!r}")
    return check_line(split, "the split")


def _annotation(item: Annotation, names: Sequence[str], rounded: bool) -> ET.Element:
    def add(parent: ET.Element, tag: str, text: object = None) -> ET.Element:
        child = ET.SubElement(parent, tag)
        child.text = None if text is None else str(text)
        return child

    root = ET.Element("annotation")
    add(root, "folder", "JPEGImages")
    add(root, "filename", item.name)
    size = add(root, "size")
    for tag, value in zip(("width", "height", "depth"), (*item.size, 3), strict=True):
        add(size, tag, value)
    add(root, "segmented", 0)
    boxes = (whole_pixels(item.boxes, item.size) if rounded else item.boxes).tolist()
    scores = [None] * len(boxes) if item.scores is None else item.scores.tolist()
    for (x0, y0, x1, y1), label, score in zip(boxes, item.labels.tolist(), scores, strict=True):
        found = add(root, "object")
        for tag, text in (("name", names[label]), ("pose", "Unspecified"), ("truncated", "0"), ("difficult", "0")):
            add(found, tag, text)
        if score is not None:
            add(found, "score", score)
        box = add(found, "bndbox")
        for tag, value in (("xmin", x0 + 1), ("ymin", y0 + 1), ("xmax", x1), ("ymax", y1)):
            add(box, tag, value)
    ET.indent(root)
    return root
