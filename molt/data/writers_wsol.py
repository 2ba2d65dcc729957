"""Boxes in the text files of wsolevaluation (Choe et al., CVPR 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from molt._files import user_path, whole_file
from molt.data.writers import Annotation, Checker, Written, check_line, class_names, whole_pixels

FILES = ("image_ids.txt", "class_labels.txt", "image_sizes.txt", "localization.txt")


def write_wsol(
    folder: str | Path,
    items: Iterable[Annotation],
    classes: Sequence[str],
    *,
    rounded: bool = True,
    clip: bool = False,
) -> Written:
    """Write image_ids.txt, class_labels.txt, image_sizes.txt and localization.txt of one split.

    A line is ``name``, ``name,label``, ``name,width,height`` and, one a box, ``name,x0,y0,x1,y1``, edges in pixels of
    the photo. wsolevaluation reads integers: ``rounded`` takes each edge to the nearest pixel border, halves to the
    right and down; a box that would vanish takes the pixel its centre is in. Scores and class names have no place in
    this layout and are not written.

    Args:
        folder: that of the split, such as ``metadata/CUB/test``; made if missing. The four files replace others of
            their names, each in one step, after the last item.
        items: a list or generator; only names are kept in memory. Each must have one label, of its boxes and
            ``present`` together: the layout has one a photo. None at all gives four empty files.
        classes: names by label, all different; label -1 takes the class called 'object'.
        rounded: False writes edges as floats.
        clip: as for :func:`write_coco`.

    Raises:
        TypeError, ValueError: a wrong argument or item; a name twice, leading out of the folder, or with a comma or
            what else a line cannot hold; a photo of no label or of several. Nothing is written then.
        OSError: a file cannot be written.
    """
    checker = Checker(class_names(classes), clip, _key)
    root = user_path(folder)
    with ExitStack() as stack:
        parts = [stack.enter_context(whole_file(root / name)) for name in FILES]
        ids, labels, sizes, boxes = (
            stack.enter_context(part.open("w", encoding="utf-8", newline="\n")) for part in parts
        )
        for item in checker.each(items):
            found = sorted({*item.labels.tolist(), *item.present})
            if len(found) != 1:
                raise ValueError(f"{item.name!r}: this layout has one label a photo, got {found or 'none'}")
            ids.write(f"{item.name}\n")
            labels.write(f"{item.name},{found[0]}\n")
            sizes.write(f"{item.name},{item.size[0]},{item.size[1]}\n")
            for box in (whole_pixels(item.boxes, item.size) if rounded else item.boxes).tolist():
                boxes.write(",".join([item.name, *map(str, box)]) + "\n")
    return checker.written(root)


def _key(name: str) -> str:
    return check_line(name, "the name", without=",")
