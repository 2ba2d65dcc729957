"""What molt writes, molt reads: each layout by its own reader, and one set through all of them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from molt.data import Annotation, inspect_set, join_samples, read_yolo, write_coco, write_voc, write_wsol, write_yolo
from molt.data.annotations import LocalizationSet
from molt.data.coco import read_coco
from molt.data.reading import read_set
from molt.data.voc import read_voc
from molt.data.wsol import read_wsol

CLASSES = ("zebra", "café & <co>", "object")


def notes(labels: int = 3) -> list[Annotation]:
    """Whole edges, so that layouts that round say the same; folders, blanks and names without ASCII."""
    rng = np.random.default_rng(5)
    found = []
    for i, name in enumerate(("a.jpg", "folder/b.JPEG", "folder/deep/c d.png", "ü.jpg", "one pixel.png", "f.g.jpg")):
        size = (1, 1) if "pixel" in name else (40 + i, 30)
        number = 1 if "pixel" in name else 1 + i % 3
        low = rng.integers(0, np.array(size), (number, 2))
        high = rng.integers(low + 1, np.array(size) + 1)
        each = rng.integers(0, 3, number) if labels == 3 else np.full(number, i % 3)
        found.append(Annotation(name, size, np.hstack([low, high]), each, rng.uniform(0, 1, number)))
    return found


def photos(folder: Path, items: list[Annotation]) -> Path:
    for item in items:
        (folder / item.name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("1", item.size).save(folder / item.name, "PNG")
    return folder


def content(items: list[Annotation], classes: tuple[str, ...]) -> dict[str, object]:
    """By photo: its size and its boxes with their classes' names, sorted."""
    return {
        item.name: (
            item.size,
            sorted(
                (classes[label], *np.round(box, 6).tolist())
                for label, box in zip(item.labels.tolist(), item.boxes, strict=True)
            ),
        )
        for item in items
    }


def check(found: LocalizationSet, items: list[Annotation], folder: Path) -> None:
    assert content(join_samples(found.samples), found.classes) == content(items, CLASSES)
    for sample in found.samples:
        assert sample.path.resolve() == (folder / sample.name).resolve() and sample.path.is_file()


def test_coco(tmp_path: Path) -> None:
    items = notes()
    folder = photos(tmp_path / "photos", items)
    path = write_coco(tmp_path / "boxes.json", items, CLASSES).path
    found = read_coco(path, folder)
    assert found.classes == CLASSES
    check(found, items, folder)
    check(read_set(path, photos=folder), items, folder)


def test_yolo(tmp_path: Path) -> None:
    items = notes()
    folder = photos(tmp_path / "photos", items)
    root = write_yolo(tmp_path / "set", items, CLASSES, images=folder, split="val").path
    found = read_yolo(root)
    assert found.classes == CLASSES
    check(found, items, folder)
    check(read_set(root, split="val"), items, folder)


@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("split", [None, "val"])
def test_voc(rounded: bool, split: str | None, tmp_path: Path) -> None:
    items = notes()
    folder = photos(tmp_path / "set" / "JPEGImages", items)
    root = write_voc(tmp_path / "set", items, CLASSES, split="val", rounded=rounded).path
    check(read_voc(root, split), items, folder)
    check(read_set(root, split=split), items, folder)


@pytest.mark.parametrize("rounded", [True, False])
def test_wsol(rounded: bool, tmp_path: Path) -> None:
    items = notes(labels=1)
    folder = photos(tmp_path / "photos", items)
    write_wsol(tmp_path / "metadata" / "test", items, CLASSES, rounded=rounded)
    for metadata, split in ((tmp_path / "metadata", "test"), (tmp_path / "metadata" / "test", None)):
        check(read_wsol(metadata, folder, split, classes=CLASSES), items, folder)
        check(read_set(metadata, split=split, photos=folder, classes=CLASSES), items, folder)


def test_one_set_through_all_layouts(tmp_path: Path) -> None:
    items = notes(labels=1)
    folder = photos(tmp_path / "photos", items)
    first = read_coco(write_coco(tmp_path / "boxes.json", items, CLASSES).path, folder)
    second = read_yolo(write_yolo(tmp_path / "yolo", join_samples(first.samples), first.classes, images=folder).path)
    write_wsol(tmp_path / "wsol", join_samples(second.samples), second.classes)
    third = read_wsol(tmp_path / "wsol", folder, classes=CLASSES)
    photos(tmp_path / "voc" / "JPEGImages", items)
    write_voc(tmp_path / "voc", join_samples(third.samples), third.classes)
    last = read_voc(tmp_path / "voc", "train")
    check(last, items, tmp_path / "voc" / "JPEGImages")


Found = dict[str, list[tuple[str, float, float, float, float]]]


def by_molt(path: Path, photos: Path) -> Found:
    options = {"wsol": {"photos": photos, "classes": CLASSES}, "boxes.json": {"photos": photos}}.get(path.name, {})
    problems = inspect_set(path, **options).problems
    assert problems == ()
    data = read_set(path, **options)
    found = content(join_samples([*data.samples, *data.unlabelled]), data.classes)
    return {name: boxes for name, (_, boxes) in found.items()}


def by_pycocotools(path: Path, photos: Path) -> Found:
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        data = COCO(str(path))
    return {
        image["file_name"]: corners((data.cats[a["category_id"]]["name"], a["bbox"]) for a in data.imgToAnns[number])
        for number, image in data.imgs.items()
    }


def by_torchvision(path: Path, photos: Path) -> Found:
    from torchvision.datasets import CocoDetection, VOCDetection

    found: Found = {}
    if path.name == "boxes.json":
        with contextlib.redirect_stdout(io.StringIO()):
            data = CocoDetection(photos, str(path))
        for number, (picture, notes) in zip(data.ids, data, strict=True):
            name = data.coco.imgs[number]["file_name"]
            assert picture.size == PIL.Image.open(photos / name).size
            found[name] = corners((data.coco.cats[a["category_id"]]["name"], a["bbox"]) for a in notes)
        return found
    for picture, whole in VOCDetection(path.parent.parent, path.name.removeprefix("VOC"), "train"):
        note = whole["annotation"]
        assert [str(side) for side in picture.size] == [note["size"]["width"], note["size"]["height"]]
        boxes = [
            (one["name"], {side: int(text) for side, text in one["bndbox"].items()}) for one in note.get("object", ())
        ]
        found[note["filename"]] = sorted((n, b["xmin"] - 1, b["ymin"] - 1, b["xmax"], b["ymax"]) for n, b in boxes)
    return found


def by_supervision(path: Path, photos: Path) -> Found:
    from supervision import DetectionDataset

    if path.name == "boxes.json":
        data = DetectionDataset.from_coco(str(photos), str(path))
    elif path.name == "yolo":
        data = DetectionDataset.from_yolo(str(path / "images"), str(path / "labels"), str(path / "data.yaml"))
    else:
        data = DetectionDataset.from_pascal_voc(str(path / "JPEGImages"), str(path / "Annotations"))
    found = {}
    for name, picture, boxes in data:
        labels = [] if boxes.class_id is None else [data.classes[label] for label in boxes.class_id]
        found[Path(name).name] = sorted((n, *box) for n, box in zip(labels, boxes.xyxy.tolist(), strict=True))
        assert picture is not None
    return found


def corners(notes: Iterable[tuple[str, list[float]]]) -> list[tuple[str, float, float, float, float]]:
    return sorted((name, x, y, x + w, y + h) for name, (x, y, w, h) in notes)


@pytest.mark.parametrize(
    ("place", "reader"),
    [
        *(("boxes.json", reader) for reader in (by_molt, by_pycocotools, by_torchvision, by_supervision)),
        *(("yolo", reader) for reader in (by_molt, by_supervision)),
        *(("VOCdevkit/VOC2012", reader) for reader in (by_molt, by_torchvision, by_supervision)),
        ("wsol", by_molt),
    ],
)
def test_what_is_written_is_read_by_all(place: str, reader: Callable[[Path, Path], Found], tmp_path: Path) -> None:
    """With a background photo, where the layout has such; supervision and torchvision know no folders in names."""
    size, folder = (60, 40), tmp_path / "photos"
    items = [
        Annotation("a.jpg", size, [[0, 0, 60, 40], [1, 2, 30, 20]], [1, 1]),
        Annotation("ü b.jpg", size, [[7, 8, 9, 10]], [0]),
        *([] if place == "wsol" else [Annotation("none.jpg", size, [], [])]),
    ]
    folder.mkdir()
    for item in items:
        PIL.Image.new("RGB", size).save(folder / item.name)
    write = {"boxes.json": write_coco, "wsol": write_wsol, "yolo": partial(write_yolo, images=folder)}
    write.get(place, partial(write_voc, images=folder))(tmp_path / place, items, CLASSES)
    found = reader(tmp_path / place, folder)
    expected = {name: boxes for name, (_, boxes) in content(items, CLASSES).items()}
    assert found.keys() == expected.keys()
    for name, boxes in expected.items():
        assert [one[0] for one in found[name]] == [one[0] for one in boxes]
        for one, other in zip(found[name], boxes, strict=True):
            assert one[1:] == pytest.approx(other[1:], abs=1e-4), name
