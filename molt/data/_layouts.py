"""What the folders of a data set are: its splits, parts of a layout, or a layout that molt does not read."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path

from molt.data._folders import entries
from molt.data.annotations import DataError, Problem
from molt.data.images import photo_suffixes

# Folders of a layout, which are no classes.
TRUTH = frozenset(
    {"labels", "annotations", "annotation", "anns", "ann", "bboxes", "boxes", "xml", "xmls", "json", "txt", "gt"}
    | {"masks", "segmentation", "segmentations", "segmentationclass", "segmentationobject", "trimaps", "groundtruth"}
    | {"ground_truth", "annotated"}
)
PARTS = TRUTH | frozenset(
    {"images", "imgs", "img", "image", "jpegimages", "pngimages", "jpg", "jpeg", "png", "photos", "pictures", "frames"}
    | {"data", "dataset", "datasets", "imagesets"}
)
# Of these, those that may be classes as well, beside others that are.
MAYBE = frozenset({"boxes", "frames", "photos", "pictures", "data", "gt", "txt", "json", "xml", "jpg", "jpeg", "png"})
PHOTO_FOLDERS = ("images", "JPEGImages", "PNGImages", "image", "img", "imgs", "photos", "data")

_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trainset", "trainingset"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation", "valset", "validationset", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing", "testset"), "test"),
    **dict.fromkeys(("pred", "unlabeled", "unlabelled"), "unlabelled"),
    **{word: word for word in ("trainval", "holdout")},
}
_FILLERS = {"set", "data", "dataset", "images", "imgs", "photos", "split"}
_ROLES = frozenset(  # of folders, beside splits and parts: what photos are for, or a form of the same photos
    {"evaluation", "query", "gallery", "bounding", "box", "labeled", "labelled", "extra", "fold", "part", "subset"}
    | {"input", "inputs", "output", "outputs", "source", "target", "targets", "original", "originals", "raw"}
    | {"cropped", "crops", "thumbnails", "thumbs", "hr", "lr", "high", "low", "res"}
)
_SUFFIXES = (".json", ".ndjson", ".csv", ".xml", ".data", ".labels", ".tfrecord", ".tfrecords")
_END = 1 << 20  # bytes of a JSON file that are looked into, at either end
_MOST = 50  # files that are looked into: those of a layout are alike
_MASK = re.compile(r"(.+?)[ _.-](?:masks?|seg|segmentation|gt|label)(?:[ _-]?\d+)?", re.IGNORECASE)
_COCO = (b'"images"', b'"annotations"')


def folders(path: Path) -> list[Path]:
    """Return the folders in a folder that may belong to a set."""
    try:
        return [Path(entry.path) for entry in entries(path) if entry.is_dir()]
    except OSError:
        return []


def files(path: Path, *suffixes: str) -> list[Path]:
    """Return the files in a folder with one of the suffixes, in lower case, that may belong to a set."""
    try:
        return [Path(e.path) for e in entries(path) if Path(e.name).suffix.lower() in suffixes and e.is_file()]
    except OSError:
        return []


def child(path: Path, *names: str) -> Path | None:
    """Return the folder in a folder that has one of the names, whatever their case; the first name that is there."""
    there = {folder.name.casefold(): folder for folder in folders(path)}
    return next((there[name.casefold()] for name in names if name.casefold() in there), None)


def split_word(name: str) -> tuple[str | None, tuple[str, ...]]:
    """Return the split that a folder's name says, train, val or test, and what else it says."""
    words = [word.casefold() for word in re.findall(r"[^\W\d_]+", name)]
    found = {_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS}
    rest = tuple(word for word in words if word not in _SPLIT_WORDS and word not in _FILLERS)
    return (found.pop() if len(found) == 1 else None), rest


def are_roles(names: list[str]) -> bool:
    """Return whether folders' names say what photos are for and nothing that tells classes: trainA and testB."""
    rests = set()
    for name in names:
        words = [word.casefold() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name) if len(word) > 1]
        rests.add(tuple(word for word in words if not (word in _SPLIT_WORDS or word in PARTS or word in _ROLES)))
        if len(rests) > 1 or len(words) == len(next(iter(rests))):
            return False
    return True


def splits(path: Path) -> dict[str, Path]:
    """Return the folders that are one split each, by split: training_set, Test, valid, seg_train...; none are classes.

    They are where all folders' names say a split and nothing else that differs, or where two say different splits and
    nothing else that differs.
    """
    there = [(folder, *split_word(folder.name)) for folder in folders(path)]
    rests = {rest for _, _, rest in there}
    if any(split is None for _, split, _ in there) or len(rests) != 1 or (len(there) == 1 and rests != {()}):
        alike = ([one for one in there if one[1] and one[2] == rest] for rest in sorted(rests))
        there = next((group for group in alike if len({split for _, split, _ in group}) > 1), [])
    return {split: folder for folder, split, _ in reversed(there) if split}


def split_folder(path: Path, split: str) -> Path:
    """Return the folder of a split: the one of that name, or that says it in another way."""
    if not (path / split).is_dir():
        wanted, _ = split_word(split)
        path = splits(path).get(wanted or "", path / split)
    else:
        path = path / split
    return unpacked(path)


def unpacked(path: Path) -> Path:
    """Return the folder of the same name inside, where that is all there is: archives are often packed so."""
    there = folders(path)
    if len(there) == 1 and there[0].name.casefold() == path.name.casefold():
        return unpacked(there[0])
    return path


def masks_among(photos: list[Path]) -> list[Path]:
    """Return the photos that are called as masks of others, x_mask.png beside x.png, where they are four in ten."""
    stems = {photo.stem for photo in photos}
    found = [photo for photo in photos if (named := _MASK.fullmatch(photo.stem)) and named[1] in stems]
    return found if 10 * len(found) >= 4 * len(photos) else []


def holds(file: Path, *words: bytes) -> bool:
    """Return whether all of the words are somewhere in a file."""
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return all(content.find(word) >= 0 for word in words)
    except (OSError, ValueError):  # ValueError: an empty file
        return False


def is_coco(file: Path) -> bool:
    """Return whether a JSON file has COCO's lists, and is of a kind that molt reads."""
    return holds(file, *_COCO) and _json_kind(file) is None


def refuse(path: Path) -> None:
    """Stop at a file or folder of a layout that molt knows by name and does not read.

    Raises:
        DataError: it is one; the message names it and what converts it.
    """
    for file, what, how in _known(path):
        other = "" if path.is_file() else "; or kind (--kind) folder, for class folders"
        raise DataError(
            [Problem(file, None, f"{what}, which molt does not read", f"a set that it reads: {how}{other}")]
        )


def _known(path: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield file, what it is, and what makes of it a set that molt reads."""

    def convert(form: str) -> str:
        return f"`datum convert -if {form} -f coco` of datumaro"

    names = {folder.name.casefold() for folder in folders(path)}
    there = [path] if path.is_file() else files(path, *_SUFFIXES)[:_MOST]
    for folder in folders(path):
        inside = files(folder, ".json", ".csv") if folder.name.casefold() in PARTS else []
        if not any(file.name.startswith("instances_") for file in inside):  # COCO, with captions and others
            there += inside[:1]
    if any(name.startswith("obj_") and name.endswith("_data") for name in names) and not path.is_file():
        yield (
            path,
            "a set of darknet, as CVAT exports it (obj.data, obj_train_data)",
            f"{convert('yolo')}, or CVAT's export as COCO",
        )
    if {"image_2", "label_2"} <= names:
        yield path, "a set of KITTI (image_2, label_2)", convert("kitti")
    if {"leftimg8bit", "gtfine"} <= names:
        yield path, "a set of Cityscapes (leftImg8bit, gtFine)", convert("cityscapes")
    for file in there:
        suffix, how = file.suffix.lower(), None
        if file.name == "_darknet.labels" or (suffix == ".data" and holds(file, b"names")):
            how = f"a set of darknet ({file.name})", f"{convert('yolo')}, or CVAT's export as COCO"
        elif suffix.startswith(".tfrecord"):
            how = "a TFRecord file", convert("tf_detection_api")
        elif suffix == ".xml" and holds(file, b"<annotations>", b"<image "):
            how = "CVAT's XML", f"{convert('cvat')}, or CVAT's export as COCO"
        elif suffix in (".json", ".ndjson"):
            how = _json_kind(file, beside=path.is_dir())
        elif suffix == ".csv":
            how = _csv_kind(file)
        if how is not None:
            yield file, *how


def _json_kind(file: Path, *, beside: bool = True) -> tuple[str, str] | None:
    """Return what a JSON file is and what converts it, where molt does not read it; by its first and last MiB."""
    if file.name == "meta.json" and beside and any(child(one, "ann") for one in (file.parent, *folders(file.parent))):
        return "a project of Supervisely (meta.json, ann)", "its app Export to COCO"
    try:
        with file.open("rb") as opened:
            text = opened.read(_END)
            opened.seek(max(_END, file.stat().st_size - _END))
            text += opened.read(_END)
    except OSError:
        return None

    def said(*words: bytes) -> bool:
        return all(word in text for word in words)

    if said(b'"shapes"', b'"imagePath"'):
        return "JSON of labelme", "`labelme2coco`, or labelme's own labelme2voc.py"
    if said(b'"regions"') and (said(b'"file_attributes"') or said(b'"_via_img_metadata"')):
        return "JSON of the VGG Image Annotator (VIA)", "VIA's own export as COCO"
    if said(b'"segments_info"', *_COCO):
        return "COCO's panoptic JSON", "its instances_*.json, or panoptic2detection_coco_format.py of panopticapi"
    if said(b'"caption"', *_COCO) and not said(b'"bbox"'):
        return "COCO's captions", "its instances_*.json, of the same photos"
    if said(b'"coordinates"', b'"annotations"', b'"image"') and not said(b'"images"'):
        return "JSON of CreateML", "Roboflow's export as COCO"
    if said(b'"asset"', b'"regions"', b'"boundingBox"'):
        return "JSON of VoTT", "VoTT's export as Pascal VOC"
    if said(b'"from_name"', b'"to_name"'):
        return "JSON of Label Studio", "its export as COCO, YOLO or Pascal VOC"
    if said(b'"box2d"', b'"labels"'):
        return "JSON of BDD100K", "`python -m bdd100k.label.to_coco`"
    if said(b'"data_row"') or said(b'"Labeled Data"'):
        return "an export of Labelbox", "`fiftyone.utils.labelbox`, then FiftyOne's export as COCO"
    if said(b'"items"', b'"categories"', b'"label_categories"') or said(b'"dm_format_version"'):
        return "JSON of datumaro", "`datum convert -if datumaro -f coco`"
    if said(b'"classTitle"', b'"objects"'):
        return "JSON of Supervisely", "its app Export to COCO"
    return None


def _csv_kind(file: Path) -> tuple[str, str] | None:
    """Return what a CSV file is and what converts it, where molt does not read it."""
    try:
        with file.open("rb") as opened:
            head = opened.readline(1 << 16).decode("utf-8-sig", "replace").strip().casefold()
    except OSError:
        return None
    cells = [column.strip(' "') for column in re.split("[,;\t]", head)]
    columns = set(cells)
    if "imageid" in columns and {"labelname", "xmin"} & columns:
        return "a table of OpenImages", "FiftyOne's zoo has it, `foz.load_zoo_dataset`, and exports COCO"
    if {"imageid", "predictionstring"} <= columns:
        return "Kaggle's table of ILSVRC", "the text files of wsolevaluation for it"
    if {"region_shape_attributes", "file_attributes"} <= columns:
        return "a table of the VGG Image Annotator (VIA)", "VIA's own export as COCO"
    numbers = sum(cell.replace(".", "", 1).isdecimal() for cell in cells)  # no names of columns, but a first row
    if numbers > 3 and Path(cells[0]).suffix in photo_suffixes():
        return "a table with boxes", "Roboflow's or FiftyOne's export as COCO"
    if len({"xmin", "ymin", "xmax", "ymax", "x1", "y1", "x2", "y2", "bbox", "x_min", "y_min"} & columns) > 3 - 3 * (
        "bbox" in columns
    ):
        return "a table with boxes", "Roboflow's or FiftyOne's export as COCO"
    if file.name.casefold() == "_classes.csv":
        return "Roboflow's table of several classes a photo", "Roboflow's export as COCO, or as folders"
    return None
