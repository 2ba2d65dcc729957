"""The layout of PASCAL VOC (Everingham et al., IJCV 2010): one XML file a photo."""

from __future__ import annotations

import codecs
import math
import os
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from molt._files import user_path
from molt._text import plain_name
from molt.data._folders import foreign
from molt.data._layouts import PHOTO_FOLDERS, child, files, holds
from molt.data._parsing import (
    BOX_FORM,
    NAME_FORM,
    SIZE_FORM,
    Parsed,
    Place,
    as_boxes,
    as_flag,
    as_integer,
    box_fault,
    check_names,
    decode,
    is_safe,
    is_size,
    no_collection,
    read_bytes,
    read_lines,
    shown,
)
from molt.data.annotations import LocalizationSet, Sample
from molt.data.images import photo_suffixes, walk_photos

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_MAX_XML = 4 << 20  # bytes; the largest official file has some 30 kB
_DECLARATIONS = re.compile(r"<!(DOCTYPE|ENTITY)", re.IGNORECASE)
_ENCODING = re.compile(rb"\s*<\?xml[^>]*?\sencoding\s*=\s*[\"']([!-~]+?)[\"']")
_MARKS = (
    *((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"), (b"<\0", "utf-16-le"), (b"\0<", "utf-16-be")),
)
_YEAR = re.compile(r"VOC\d{4}")
Box = tuple[float, float, float, float]
_BOX = ("xmin", "ymin", "xmax", "ymax")
_BOX_TEXT = "<bndbox> with xmin, ymin, xmax, ymax, pixels counted from 1 and the last one included"


def read_voc(
    root: str | Path,
    split: str | None = None,
    year: int | str | None = None,
    *,
    difficult: bool = False,
    classes: Sequence[str] | None = None,
) -> LocalizationSet:
    """Read the VOC layout: Annotations/*.xml, JPEGImages/, ImageSets/Main/SPLIT.txt.

    Other sets of such XML files, too: annotations/ and images/, or the files beside their photos, as Roboflow has them.

    A photo that shows several classes gives one sample each. VOC counts pixels from 1 and includes the last one, so a
    box becomes the edges (xmin - 1, ymin - 1, xmax, ymax). Of a box that comes twice in a photo and class one is kept.
    XML may be in any encoding that Python knows; with a document type or entities it is refused. A photo has the name
    of its XML file, as in VOC, whatever its suffix; <filename> decides between several, and where there is none.

    Args:
        root: folder with these folders, or the VOCdevkit above it.
        split: list in ImageSets/Main, one photo a line; all annotation files if not given.
        year: which VOC<year> below ``root``, where there are several.
        difficult: keep objects marked difficult. The VOC metric does not count them, so they are left out by default,
            and photos that show nothing else are ``unlabelled``; :func:`molt.data.check_set` counts both.
        classes: names by label. If not given: VOC's 20 where the folder is called VOC<year> and has no other, else the
            names found, sorted.

    Raises:
        DataError: with everything that keeps the files from being read.
    """
    return parse_voc(user_path(root), split, year, difficult=difficult, classes=classes).result()


def voc_folder(root: Path, year: int | str | None = None) -> Path:
    """Return the folder that holds Annotations: ``root``, or the VOC<year> below it."""
    if year is not None and root.resolve().name != f"VOC{year}":
        return root / f"VOC{year}"
    if not (root / "Annotations").is_dir():
        years = [path for path in sorted(root.glob("VOC*")) if (path / "Annotations").is_dir()]
        if len(years) == 1:
            return years[0]
    return root


def voc_places(folder: Path) -> tuple[Path, Path] | None:
    """Return the folders of the XML files and of the photos, or None where there is no XML.

    They are Annotations and JPEGImages in VOC, annotations and images in other sets, or one folder that has both.
    """
    annotations = child(folder, "Annotations", "annotation", "xmls", "xml")
    if annotations is not None and (annotations.name == "Annotations" or _xml_files(annotations, Counter())):
        photos = child(folder, "JPEGImages", *PHOTO_FOLDERS)
        if photos is None:
            places = (one for one in (annotations, folder) if files(one, *photo_suffixes()))
            photos = next(places, folder / "JPEGImages")
        return annotations, photos
    beside = [file for file in files(folder, ".xml") if not holds(file, b"<annotations>")]  # those are CVAT's
    return (folder, folder) if beside and files(folder, *photo_suffixes()) else None


def _xml_files(folder: Path, left_out: Counter[str]) -> list[Path]:
    """Return the annotation files below a folder, and count what is not looked at, such as ``._x.xml`` of macOS."""
    kept = []
    for file in sorted(file for file in folder.rglob("*") if file.suffix.lower() == ".xml"):
        whose = next(filter(None, map(foreign, file.relative_to(folder).parts)), None)
        if whose is None:
            kept.append(file)
        else:
            left_out[f"{whose} files"] += 1
    return kept


@no_collection()
def parse_voc(
    root: Path,
    split: str | None = None,
    year: int | str | None = None,
    *,
    difficult: bool = False,
    classes: Sequence[str] | None = None,
) -> Parsed:
    """Collect the samples and problems of the VOC layout."""
    folder = voc_folder(root, year)
    named = folder.resolve().name
    both = voc_places(folder)
    annotations, images = both or (folder / "Annotations", folder / "JPEGImages")
    found = Parsed("voc", f"{named} {split}" if split else named, folder, images)
    if both is None:
        years = sorted(path.name for path in root.glob("VOC*") if (path / "Annotations").is_dir())
        hint = f"; there are {', '.join(years)}" if years else ""
        found.problem(folder / "Annotations", None, f"no such folder{hint}", "XML files there, or the year of one VOC")
        return found
    entries = _listed(folder, annotations, split, found)
    photos: dict[str, tuple[_Photo, Place]] = {}
    there = _photos_by_stem(found.photos)
    for listed, file in entries:
        own = file.relative_to(annotations).with_suffix("").as_posix()
        photo = _Photo(file, own, there, found, difficult)
        if not photo.name:
            continue
        if photo.name in photos:
            text = f"photo {shown(photo.name)} annotated twice, first in {photos[photo.name][0].file.name}"
            found.problem(file, None, text, "one file a photo")
            continue
        photos[photo.name] = (photo, Place(listed, (file, None), (file, None), ()))
        if not photo.objects:
            found.blank(photo.name, found.photos / photo.name, photo.size)
    renamed = sum(photo.renamed for photo, _ in photos.values())
    if renamed:
        found.notes.append(f"photos of another name than <filename> has: {renamed:,}")
    if split is None and (rest := {name for own in there.values() for name in own} - photos.keys()):
        found.notes.append(f"photos without an XML file, left out: {len(rest):,}")

    names = tuple(sorted({name for photo, _ in photos.values() for name in photo.objects}))
    if classes is None and _YEAR.fullmatch(named):
        if set(names) <= set(VOC_CLASSES):
            classes = VOC_CLASSES
        else:
            text = f"{folder} has classes other than VOC's 20, so they are those found, sorted: {', '.join(names)}"
            found.notes.append(f"{text[:300]}; classes= or --classes gives others")
    if classes is not None:
        names = tuple(map(plain_name, classes))
        found.problems += check_names(names, folder, None)
    labels = {name: label for label, name in enumerate(names)}
    places: list[Place] = []
    for photo, place in photos.values():
        for name, objects in sorted(photo.objects.items(), key=lambda item: labels.get(item[0], -1)):
            if name not in labels:
                found.problem(photo.file, None, f"an object of class {shown(name)}", f"one of {', '.join(names)}")
                continue
            path, boxes = found.photos / photo.name, as_boxes([*objects])
            hard = tuple(i for i, (_, flag) in enumerate(objects.values()) if flag)
            found.samples.append(Sample(photo.name, path, labels[name], boxes, photo.size, difficult=hard))
            places.append(place._replace(objects=tuple((photo.file, None, f"object {n}") for n, _ in objects.values())))
    found.classes = names
    found.place = places.__getitem__
    return found


def _photos_by_stem(folder: Path) -> dict[str, list[str]]:
    """Return the photos below a folder, by their names without and with suffix."""
    found: dict[str, list[str]] = {}
    for photo in walk_photos(folder, lambda _: None).photos:
        path = photo.relative_to(folder)
        for key in (path.with_suffix("").as_posix(), path.as_posix()):
            found.setdefault(key, []).append(path.as_posix())
    return found


def _listed(
    folder: Path, annotations: Path, split: str | None, found: Parsed
) -> list[tuple[tuple[Path, int | None], Path]]:
    """Return for each photo where it is listed, and its annotation file."""
    if split is None:
        return [((file, None), file) for file in _xml_files(annotations, found.left_out)]
    main = folder / "ImageSets" / "Main"
    if not is_safe(split) or not (main / f"{split}.txt").is_file():
        there = sorted(path.stem for path in main.glob("*.txt") if "_" not in path.stem)
        hint = f"; there are {', '.join(there)}" if there else ""
        found.problem(main / f"{split}.txt", None, f"no such file{hint}", "a list of photos, one a line")
        return []
    file = main / f"{split}.txt"
    entries: list[tuple[tuple[Path, int | None], Path]] = []
    lines: dict[str, int] = {}
    for number, text in enumerate(read_lines(file, found), 1):
        name = text.strip()
        if not name:
            continue
        if not is_safe(name):
            found.problem(file, number, f"the name {shown(name)}", NAME_FORM)
        elif len(name.split()) > 1 and not (folder / "Annotations" / f"{name}.xml").is_file():
            found.problem(file, number, shown(name), "one photo's name a line, without a class's flag")
        elif name in lines:
            found.problem(file, number, f"photo {shown(name)} listed twice, first on line {lines[name]}", "it once")
        elif not (annotation := annotations / f"{name}.xml").is_file():
            found.problem(file, number, f"photo {shown(name)} has no annotation", f"a file {annotation}")
        else:
            entries.append(((file, number), annotation))
        lines.setdefault(name, number)
    return entries


class _Photo:
    """What one XML file says; ``name`` is empty where it cannot be used.

    ``objects`` has, by class and box, the object's number in the file, counted from 1, and whether it is difficult.
    """

    def __init__(self, file: Path, own: str, there: dict[str, list[str]], found: Parsed, difficult: bool) -> None:
        self.file = file
        self.name = ""
        self.renamed = False
        self.size: tuple[int, int] | None = None
        self.objects: dict[str, dict[tuple[float, float, float, float], tuple[int, bool]]] = {}
        tree = _tree(file, found)
        if tree is None:
            return
        said = (tree.findtext("filename") or "").strip()
        # The file's own name is VOC's id of the photo; <filename> is often left behind when files are renamed.
        ours = there.get(own) or there.get(said) or there.get(os.path.splitext(said)[0]) or [said]  # noqa: PTH122
        name = said if said in ours else ours[0]
        if not is_safe(name or f"{own}.jpg"):
            found.problem(file, None, f"the <filename> {shown(name)}", NAME_FORM)
            return
        self.name = name or f"{own}.jpg"
        self.renamed = bool(said) and self.name.rpartition("/")[2] != said.rpartition("/")[2]
        if self.renamed and is_safe(said) and (found.photos / said).is_file():
            text = f"<filename> is {shown(said)}, but {shown(name)} is there too and is what was taken"
            found.remark(file, None, text, "a photo of the XML file's own name, or no other one")
        self.size = _size(tree, file, found)
        for number, element in enumerate(tree.iterfind("object"), 1):
            self._add(number, element, file, found, difficult)

    def _add(self, number: int, element: ET.Element, file: Path, found: Parsed, difficult: bool) -> None:
        name = plain_name(element.findtext("name") or "")
        if not name:
            found.problem(file, None, f"object {number} has no <name>", "the name of its class")
            return
        text = element.findtext("difficult") or "0"
        flag = as_flag(text)
        if flag is None:
            found.problem(file, None, f"object {number}: <difficult> {shown(text)}", "0 or 1")
            return
        if flag and not difficult:
            found.left_out["difficult objects"] += 1
            return
        if (box := _edges(number, element, file, found)) is None:
            return
        objects = self.objects.setdefault(name, {})
        earlier, _ = objects.setdefault(box, (number, flag))
        if earlier != number:
            found.left_out["boxes that come twice"] += 1
            found.remark(file, None, f"object {number} has class and box of object {earlier}", "each box once")


def _tree(file: Path, found: Parsed) -> ET.Element | None:
    data = read_bytes(file, found, _MAX_XML)
    text = None if data is None else decode(data, _encoding(data), file, found)
    if text is None:
        return None
    # Entities can grow without bound or name other files; annotations need neither.
    declaration = _DECLARATIONS.search(text)
    if declaration is not None:
        line = text.count("\n", 0, declaration.start()) + 1
        found.problem(file, line, "a document type or entity declaration", "XML without <!DOCTYPE and <!ENTITY")
        return None
    try:
        tree = ET.fromstring(text)
    except (ET.ParseError, UnicodeEncodeError) as error:  # the second: half a pair of surrogates, of UTF-7 for one
        at = error.position[0] if isinstance(error, ET.ParseError) else None
        found.problem(file, at, f"not XML ({error})", "XML as in PASCAL VOC")
        return None
    if tree.tag != "annotation":
        found.problem(file, None, f"the outermost element {shown(tree.tag)}", "<annotation>")
        return None
    return tree


def _encoding(data: bytes) -> str:
    """Return in what an XML file is encoded, by its byte order mark, else its declaration, else UTF-8."""
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name
    declared = _ENCODING.match(data)
    if declared is None:
        return "utf-8"
    name = declared[1].decode()
    # What can be read byte by byte has no two or four of them a character.
    return "utf-8" if re.match(r"(?i)utf[-_]?(16|32)|ucs|iso-10646", name) else name


def _size(tree: ET.Element, file: Path, found: Parsed) -> tuple[int, int] | None:
    if tree.find("size") is None:
        return None
    texts = [(tree.findtext(f"size/{side}") or "").strip() for side in ("width", "height")]
    if texts == ["0", "0"]:  # what some tools write where they did not look
        found.remark(file, None, "size '0x0'", f"<width> and <height>, {SIZE_FORM}")
        return None
    width, height = (as_integer(text) or 0 for text in texts)
    if not is_size(width, height):
        found.problem(file, None, f"size {shown('x'.join(texts))}", f"<width> and <height>, {SIZE_FORM}")
        return None
    return width, height


def boxes_of_class(file: Path, name: str, found: Parsed) -> tuple[NDArray[np.float64], tuple[int, int] | None]:
    """Return the boxes (n, 4) that an XML file has of one class, and the photo's size, as for ILSVRC's class folders.

    ILSVRC's boxes begin at 0 where they touch the border, VOC's at 1: what would lie outside is moved to the border.
    """
    tree = _tree(file, found)
    if tree is None:
        return as_boxes([]), None
    boxes: dict[Box, int] = {}
    for number, element in enumerate(tree.iterfind("object"), 1):
        if plain_name(element.findtext("name") or "") != name:
            continue
        if (box := _edges(number, element, file, found, 0)) is None:
            continue
        if (earlier := boxes.setdefault(box, number)) != number:
            found.left_out["boxes that come twice"] += 1
            found.remark(file, None, f"object {number} has class and box of object {earlier}", "each box once")
    return as_boxes([*boxes]), _size(tree, file, found)


def _edges(number: int, element: ET.Element, file: Path, found: Parsed, least: float = -math.inf) -> Box | None:
    """Return an object's box by its edges, none of them below ``least``; None, and a problem, where it is no box."""
    texts = [(element.findtext(f"bndbox/{side}") or "").strip() for side in _BOX]
    try:
        x0, y0, x1, y1 = map(float, texts)
    except ValueError:
        found.problem(file, None, f"object {number}: box {shown(','.join(texts))}", _BOX_TEXT)
        return None
    box = (max(x0 - 1, least), max(y0 - 1, least), x1, y1)
    if (fault := box_fault(*box)) is not None:
        found.problem(file, None, f"object {number}: {fault} (its edges)", f"{_BOX_TEXT}: {BOX_FORM}")
        return None
    return box
