"""Everything wrong with a data set, found before hours of training or evaluation do."""

from __future__ import annotations

import itertools
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from molt._words import count
from molt.data._parsing import Parsed, Place, ranges, shown
from molt.data.annotations import DataError, LocalizationSet, Problem, Sample, SetKind
from molt.data.images import PhotoError, _guard, _limit, _one_line, _open, _orientation, load_photo
from molt.data.reading import parse_set

_BATCH = 1024  # files asked for at once, so that a million of them do not wait in memory
_UNTURNED = ("JPEG", "MPO", "PNG", "WEBP")  # formats whose headers Pillow gives as they are
SCALED = " the proportions but not the size of {} photo"
_SLACK = 0.5  # pixels a box may reach out of its photo: annotations are rounded


@dataclass(frozen=True)
class Findings:
    """What a check found.

    Attributes:
        name: of the set.
        kind: its layout, or None where it was not recognised.
        problems: everything wrong.
        photos: how many photos, those without an object to keep among them.
        samples: how many pairs of a photo and a label.
        classes: how many classes.
        boxes: how many boxes.
        masks: how many masks of objects.
        smallest: name and number of samples of the class with the fewest, or None without classes.
        empty_classes: how many classes have no sample.
        left_out: what the reader left out on purpose, and how often.
        notes: what is worth knowing and no problem.
    """

    name: str
    kind: SetKind | None
    problems: tuple[Problem, ...]
    photos: int
    samples: int
    classes: int
    boxes: int
    masks: int
    smallest: tuple[str, int] | None
    empty_classes: int
    left_out: dict[str, int]
    notes: tuple[str, ...]


def check_set(path: str | Path, **options: Any) -> list[Problem]:
    """Return everything wrong with a data set; empty where nothing is. Arguments as for :func:`inspect_set`."""
    return list(inspect_set(path, **options).problems)


def inspect_set(
    path: str | Path,
    *,
    kind: Literal["auto"] | SetKind = "auto",
    split: str | None = None,
    photos: str | Path | None = None,
    masks: str | Path | None = None,
    classes: Sequence[str] | None = None,
    num_classes: int | None = None,
    deep: bool = False,
    on_progress: Callable[[int, int], object] | None = None,
) -> Findings:
    """Check annotations, photos and masks of a data set.

    Of each photo the header is read: its size, turned as its EXIF orientation says, must be the annotated one. A mask
    must have its photo's proportions; that it has another size is only noted, as OpenImages' do.

    Args:
        path: as for :func:`molt.data.read_set`, as are the next five.
        kind: the layout.
        split: which part of the set.
        photos: folder of the photos.
        masks: folder of the masks.
        classes: class names by label.
        num_classes: classes of the network that is meant; labels from there on are problems.
        deep: decode each photo and mask whole, which finds damaged ones and masks without a pixel.
        on_progress: called with the number of photos looked at and that of all.

    Raises:
        ValueError: an argument that the layout does not take, or lacks.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    try:
        found = parse_set(path, kind=kind, split=split, photos=photos, masks=masks, classes=classes)
    except DataError as error:
        return Findings(Path(path).name, None, error.problems, 0, 0, 0, 0, 0, None, 0, {}, ())
    problems = found.problems + found.remarks
    if not found.samples and not found.problems:
        problems.append(Problem(found.root, None, "there is no photo with a label", "at least one"))
    problems += _check_labels(found, num_classes)
    problems += _check_objects(found)
    sizes: dict[Path, tuple[int, int]] = {}
    problems += _check_photos(found, deep, on_progress, sizes)
    problems += _check_boxes(found, sizes)
    problems += _check_masks(found, deep, sizes)
    counts = Counter(sample.label for sample in found.samples)
    least = min(range(len(found.classes)), key=lambda label: counts[label], default=None)
    return Findings(
        name=found.name,
        kind=found.kind,
        problems=tuple(problems),
        photos=len({sample.path for sample in (*found.samples, *found.unlabelled)}),
        samples=len(found.samples),
        classes=len(found.classes),
        boxes=sum(len(sample.boxes) for sample in found.samples),
        masks=sum(len(sample.masks) for sample in found.samples),
        smallest=None if least is None else (found.classes[least], counts[least]),
        empty_classes=len(found.classes) - len(counts),
        left_out=dict(found.left_out),
        notes=tuple(found.notes),
    )


def _place(found: Parsed, index: int) -> Place:
    if found.place is not None:
        return found.place(index)
    sample = found.samples[index]
    where = (sample.path, None)
    return Place(where, where, where, tuple((*where, f"box {i + 1}") for i in range(len(sample.boxes))))


def _check_labels(found: Parsed, num_classes: int | None) -> Iterator[Problem]:
    used = {sample.label for sample in found.samples}
    # The other layouts name their classes, and a split may lack some.
    if found.kind == "wsol" and used and len(used) <= max(used):
        missing = sorted(set(range(max(used))) - used)
        file = _place(found, 0).label[0]
        text = f"no photo has label {ranges(missing)} ({len(missing)} of {max(used) + 1})"
        yield Problem(file, None, text, f"each number from 0 to {max(used)}")
    if num_classes is None:
        return
    for index, sample in enumerate(found.samples):
        if sample.label >= num_classes:
            text = f"photo {shown(sample.name)} has label {sample.label}"
            yield Problem(
                *_place(found, index).label, text, f"0 to {num_classes - 1}, of {count(num_classes, 'class')}"
            )


def _check_objects(found: Parsed) -> Iterator[Problem]:
    """Find photos without a box or mask where others have some."""
    if not any(len(sample.boxes) or sample.masks for sample in found.samples):
        return
    for index, sample in enumerate(found.samples):
        if not len(sample.boxes) and not sample.masks:
            text = f"photo {shown(sample.name)} has no box and no mask, others have"
            yield Problem(*_place(found, index).listed, text, "at least one")


class _Header(NamedTuple):
    """Size of a file's picture, upright, and its EXIF orientation, from 5 on the sides are swapped; or its fault."""

    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    missing: bool = False
    fault: str | None = None


def _header(path: Path) -> _Header:
    """Read a picture's size without decoding it."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return _Header(missing=True, fault="no such file")
    except OSError as error:
        return _Header(fault=f"cannot be looked at ({error.strerror})")
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
        return _Header(fault="is a folder, not a photo" if stat.S_ISDIR(status.st_mode) else "is not a regular file")
    if status.st_size == 0:
        return _Header(fault="the file is empty")

    def read() -> _Header:
        with _open(path, _limit()) as image:
            if 0 in image.size:
                raise PhotoError(f"has no pixels ({image.width}x{image.height})")
            if image.width * image.height > _limit():
                raise PhotoError(f"{image.width}x{image.height} pixels are over the limit of {_limit():,}")
            orientation = _orientation(image)
            size = image.size
            if orientation >= 5:  # other formats may have swapped their sides already
                size = size[::-1] if image.format in _UNTURNED else load_photo(path).size
            return _Header(size, orientation)

    try:
        return _guard(_one_line(path), read)
    except PhotoError as error:
        return _Header(fault=_reason(path, error))


def _reason(path: Path, error: PhotoError) -> str:
    return str(error).removeprefix(f"{_one_line(path)}: ")


def _decoded(path: Path) -> _Header:
    """Read a picture whole."""
    header = _header(path)
    if header.fault is None:
        try:
            load_photo(path)
        except PhotoError as error:
            return _Header(fault=_reason(path, error))
    return header


def _decoded_mask(path: Path) -> _Header:
    header = _header(path)
    if header.fault is None:
        try:
            if not np.asarray(load_photo(path).convert("L")).any():
                return header._replace(fault="has no pixel of the object")
        except PhotoError as error:
            return _Header(fault=_reason(path, error))
    return header


def _each(read: Callable[[Path], _Header], paths: Sequence[Path]) -> Iterator[_Header]:
    """Call ``read`` on the paths, several at a time: the files may be far away, and decoding takes a core each."""
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        for start in range(0, len(paths), _BATCH):
            yield from pool.map(read, paths[start : start + _BATCH])


def _check_photos(
    found: Parsed, deep: bool, on_progress: Callable[[int, int], object] | None, sizes: dict[Path, tuple[int, int]]
) -> Iterator[Problem]:
    """Find photos that are missing, unreadable or of another size; put the sizes of the others into ``sizes``."""
    if found.samples and found.kind != "yolo" and not found.photos.is_dir():
        yield Problem(found.photos, None, "no such folder", "the folder of the photos")
        return
    first: dict[Path, int] = {}
    for index, sample in enumerate(found.samples):
        first.setdefault(sample.path, index)
    boxed = {sample.path for sample in found.samples if len(sample.boxes) or sample.masks}
    turned = 0
    hint = ", or another folder given as photos (--photos)" if found.kind in ("wsol", "coco", "csv") else ""
    headers = _each(_decoded if deep else _header, list(first))
    for done, ((path, index), header) in enumerate(zip(first.items(), headers, strict=True), 1):
        if on_progress is not None:
            on_progress(done, len(first))
        sample = found.samples[index]
        if header.missing:
            text = f"photo {shown(sample.name)}: no such file"
            yield Problem(*_place(found, index).listed, text, f"a photo at {path}{hint}")
        elif header.fault is not None:
            yield Problem(path, None, header.fault, "a photo that Pillow can read")
        else:
            sizes[path] = header.size
            width, height = header.size
            # The size tells which way the boxes are meant if turning changes it and if it was not read off the photo.
            sized = (sample.size is not None or sample.masks) and found.kind != "yolo"
            told = header.orientation >= 5 and width != height and sized
            turned += header.orientation != 1 and not told and path in boxed
            if sample.size is not None and sample.size != header.size:
                yield _other_size(sample, header, _place(found, index))
    if turned:
        found.notes.append(
            f"photos with an EXIF orientation of which no size tells whether boxes or masks heed it: {turned:,}; they "
            "are taken to be on the photo as it is seen, turned, so any drawn on the raw pixels are in the wrong place"
        )


def _other_size(sample: Sample, header: _Header, place: Place) -> Problem:
    assert sample.size is not None
    width, height = header.size
    text = f"photo {shown(sample.name)} is annotated as {sample.size[0]}x{sample.size[1]}"
    expected = f"{width}x{height}, its width and height in pixels"
    if sample.size == (height, width):
        if header.orientation >= 5:
            text += ", that before its EXIF orientation turns it"
            expected += " as it is seen, and boxes to match"
        else:
            text += ", its sides swapped"
    return Problem(*place.size, text, expected)


def _check_boxes(found: Parsed, sizes: dict[Path, tuple[int, int]]) -> Iterator[Problem]:
    for index, sample in enumerate(found.samples):
        # A wrong annotated size is told of already; what the boxes refer to is that size.
        size = sample.size or sizes.get(sample.path)
        for number, (x0, y0, x1, y1) in enumerate(sample.boxes.tolist()):
            text = None
            if x0 == x1 or y0 == y1:
                text, expected = "has no area", "x0 < x1 and y0 < y1"
            elif size is not None and not (
                min(x0, y0) >= -_SLACK and x1 <= size[0] + _SLACK and y1 <= size[1] + _SLACK
            ):
                text, expected = f"reaches out of its photo of {size[0]}x{size[1]}", "0 <= x <= width, 0 <= y <= height"
            if text is not None:
                file, line, name = _place(found, index).objects[number]
                yield Problem(file, line, f"{name}: box {x0:g},{y0:g},{x1:g},{y1:g} {text}", f"edges {expected}")


def _check_masks(found: Parsed, deep: bool, sizes: dict[Path, tuple[int, int]]) -> Iterator[Problem]:
    entries = [
        (mask, index, number)
        for index, sample in enumerate(found.samples)
        for number, mask in itertools.chain(enumerate(sample.masks), [(0, sample.ignore)] if sample.ignore else [])
    ]
    ignored = {sample.ignore for sample in found.samples}
    scaled = 0

    def read(path: Path) -> _Header:
        return (_decoded_mask if path not in ignored else _decoded)(path) if deep else _header(path)

    headers = _each(read, [path for path, _, _ in entries])
    for (path, index, number), header in zip(entries, headers, strict=True):
        photo = sizes.get(found.samples[index].path)
        file, line, name = _place(found, index).objects[number]
        if header.fault is not None:
            expected = "the picture of a mask" if not header.missing else f"a mask at {path}"
            yield Problem(file, line, f"mask {shown(path.name)} of photo {name}: {header.fault}", expected)
        elif photo is not None and header.size != photo:
            width, height = header.size
            # Sides are rounded to whole pixels when a picture is scaled.
            if abs(width * photo[1] - height * photo[0]) <= max(photo) + max(width, height):
                scaled += 1
                continue
            text = f"mask {shown(path.name)} has size {width}x{height}, photo {name} {photo[0]}x{photo[1]}"
            yield Problem(file, line, text, "the photo's size, or its proportions")
    if scaled:
        found.notes.append(count(scaled, "mask has" + SCALED.format("its"), "masks have" + SCALED.format("their")))


def check_sizes(data: LocalizationSet) -> tuple[Problem, ...]:
    """Stop where photos are not of the size that their annotations say: boxes would lie elsewhere than they are meant.

    The header of each photo is read once, and its EXIF orientation turns it. A photo that is not there or cannot be
    read is passed over.

    Returns:
        A remark where boxes are on photos with an EXIF orientation of which no size tells whether they heed it.

    Raises:
        DataError: one problem: how many photos, and the first few with both sizes.
    """
    first: dict[Path, Sample] = {}
    for sample in data.samples:
        if sample.size is not None or len(sample.boxes) or sample.masks:
            first.setdefault(sample.path, sample)
    wrong, turned = [], []
    for sample, header in zip(first.values(), _each(_header, list(first)), strict=True):
        if header.fault is None and sample.size is not None and sample.size != header.size:
            said = "{}x{} annotated, {}x{} in the file".format(*sample.size, *header.size)
            said += ", turned by its EXIF orientation" * (header.orientation >= 5)
            wrong.append(f"{shown(sample.name)} ({said})")
        elif header.orientation != 1 and (len(sample.boxes) or sample.masks):
            # YOLO's sizes are read off the photos.
            sized = sample.size is not None and data.kind != "yolo" and header.size[0] != header.size[1]
            if header.orientation < 5 or not sized:
                turned.append(sample)
    if wrong:
        listed = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        text = f"photos of another size than the annotations say: {len(wrong)} of {len(first)}, {listed}"
        expected = "the photos that were annotated; molt data check lists all"
        raise DataError([Problem(Path(data.name), None, text, expected)])
    if not turned:
        return ()
    text = f"photos with an EXIF orientation of which no size tells whether the boxes heed it: {len(turned)}"
    return (Problem(turned[0].path, None, text, "boxes on the photo as it is seen, turned"),)
