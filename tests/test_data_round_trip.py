"""What molt writes, molt reads: each layout by its own reader, and one set through all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from molt.data import Annotation, join_samples, read_yolo, write_coco, write_voc, write_wsol, write_yolo
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
