"""Writers of annotations: what is written is valid, whole, and reads back; what cannot be written is refused."""

from __future__ import annotations

import contextlib
import io
import json
import tracemalloc
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from molt import Localization
from molt.data import (
    Annotation,
    PhotoError,
    Written,
    join_samples,
    photo_size,
    write_coco,
    write_voc,
    write_wsol,
    write_yolo,
)
from molt.data.annotations import Sample
from molt.data.writers import whole_pixels

CLASSES = ("cat", "café & <co>", "object")
WRITERS: list[Callable[..., Written]] = [write_coco, write_yolo, write_voc, write_wsol]


def note(
    name: str = "x.jpg", boxes: Any = ((1, 2, 30, 20),), size: tuple[int, int] = (60, 40), **more: Any
) -> Annotation:
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    return Annotation(name, size, boxes, more.pop("labels", np.zeros(len(boxes), np.int64)), **more)


def random_notes(count: int = 12, seed: int = 0, labels: int = 3, decimals: int = 3) -> list[Annotation]:
    """Photos of several sizes, in folders, some without boxes, of one pixel and of 10,000 a side."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        width, height = [(60, 40), (1, 1), (10_000, 99), (333, 500)][i % 4]
        number = i % 3
        corners = np.sort(rng.uniform(0, 1, (number, 2, 2)), axis=1) * (width, height)
        corners = corners.round(decimals)
        corners[:, 1] = np.maximum(corners[:, 1], corners[:, 0] + 0.001).clip(max=(width, height))
        corners[:, 0] = np.minimum(corners[:, 0], corners[:, 1] - 0.001)
        boxes, each = corners.reshape(-1, 4), rng.integers(0, labels, number)
        scores = rng.uniform(0, 1, number)
        found.append(Annotation(f"{'abc'[i % 3]}/photo {i}.jpg", (width, height), boxes, each, scores))
    return found


def target(writer: Callable[..., Written], tmp_path: Path) -> Path:
    return tmp_path / ("boxes.json" if writer is write_coco else "boxes")


def load(path: Path) -> Any:
    from pycocotools.coco import COCO  # here, so that GPU machines without it can collect the tests

    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(path))


def evaluate(truth: Path, results: Path) -> np.ndarray:
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth_set = load(truth)
        run = COCOeval(truth_set, truth_set.loadRes(str(results)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def localization(source: object, boxes: Any = ((1.0, 2, 30, 20),), classes: Any = (2,)) -> Localization:
    return Localization(
        boxes=torch.tensor(boxes).reshape(-1, 4),
        classes=torch.tensor(classes, dtype=torch.int64),
        names=["?"] * len(classes),
        scores=torch.full((len(classes),), 0.1),
        size=(60, 40),
        heat=torch.rand(1, 2, 2),
        clusters=torch.zeros(2, 2, dtype=torch.int32),
        source=source,
    )


def test_of_a_localization() -> None:
    item = Annotation.from_localization(localization(Path("some/photo.png")))
    assert (item.name, item.size) == ("photo.png", (60, 40))
    assert item.boxes.tolist() == [[1, 2, 30, 20]] and item.boxes.dtype == np.float64
    assert item.labels.tolist() == [2] and item.labels.dtype == np.int64
    assert item.scores is not None and item.scores.tolist() == [float(np.float32(0.1))]
    assert Annotation.from_localization(localization(None), name="a/b.jpg").name == "a/b.jpg"
    with pytest.raises(ValueError, match="name must be given"):
        Annotation.from_localization(localization(None))
    empty = Annotation.from_localization(localization("x.jpg", (), ()))
    assert empty.boxes.shape == (0, 4) and empty.labels.shape == (0,)


def test_of_samples_which_are_joined_by_photo(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (7, 5)).save(tmp_path / "x.png")
    one = Sample("x.png", tmp_path / "x.png", 0, np.array([[0.0, 0, 2, 2]]))
    two = Sample("y.png", Path("nowhere.png"), 1, np.zeros((0, 4)), (9, 8))
    three = Sample("x.png", tmp_path / "x.png", 2, np.array([[1.0, 1, 3, 3], [0, 0, 7, 5]]), (7, 5))
    first, second = join_samples([one, two, three])
    assert first.size == (7, 5) and first.labels.tolist() == [0, 2, 2] and first.present == (0, 2)
    assert first.boxes.tolist() == [[0, 0, 2, 2], [1, 1, 3, 3], [0, 0, 7, 5]]
    assert second.name == "y.png" and len(second.boxes) == 0 and second.present == (1,)
    with pytest.raises(
        ValueError, match=r"'x.png': samples of one photo must have one size, got \(7, 5\) and \(8, 5\)"
    ):
        join_samples([three, Sample("x.png", Path("x"), 0, np.zeros((0, 4)), (8, 5))])
    with pytest.raises(PhotoError, match="no such file"):
        Annotation.from_sample(Sample("n", Path("none.png"), 0, np.zeros((0, 4))))
    with pytest.raises(ValueError, match="has masks and no boxes"):
        Annotation.from_sample(Sample("n", Path("n.png"), 0, np.zeros((0, 4)), (1, 1), masks=(Path("m.png"),)))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_sizes_are_those_of_the_upright_photo(form: str, orientation: int | None, tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    path = tmp_path / "photo"
    PIL.Image.new("RGB", (20, 10)).save(path, form, exif=exif)
    assert photo_size(path) == ((10, 20) if orientation in (6, 8) else (20, 10))


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("name", 3, "name must be a string"),
        ("size", (60,), r"size must be \(width, height\)"),
        ("size", (0, 40), "each at least 1"),
        ("size", (60.5, 40), "must hold integers"),
        ("boxes", [[1, 2, 3]], r"boxes must have shape \(n, 4\), got \(1, 3\)"),
        ("boxes", [1, 2, 3, 4], r"boxes must have shape \(n, 4\), got \(4,\)"),
        ("boxes", [[1, 2, np.nan, 4]], "boxes must be finite, got"),
        ("boxes", [[1, 2, np.inf, 4]], "boxes must be finite, got"),
        ("boxes", [[3, 2, 1, 4]], r"x0 < x1 and y0 < y1, got \[3.0, 2.0, 1.0, 4.0\]"),
        ("boxes", [[1, 4, 3, 4]], "x0 < x1 and y0 < y1"),
        ("boxes", [["a", "b", "c", "d"]], "boxes must hold numbers"),
        ("boxes", [[1, 2], [3]], "boxes must be an array of numbers"),
        ("labels", [0.0], "labels must hold integers, got float64"),
        ("labels", [True], "labels must hold integers, got bool"),
        ("labels", [0, 1], r"labels must have shape \(1,\), got \(2,\)"),
        ("scores", [np.nan], "scores must be finite"),
        ("scores", [0.5, 0.5], r"of shape \(1,\)"),
        ("present", (0.5,), "must hold integers"),
    ],
)
def test_wrong_fields_are_refused(field: str, value: Any, text: str) -> None:
    fields: dict[str, Any] = {"name": "x.jpg", "size": (60, 40), "boxes": [[1, 2, 3, 4]], "labels": [0]}
    with pytest.raises((TypeError, ValueError), match=text):
        Annotation(**(fields | {field: value}))


def test_fields_are_copies_of_any_layout() -> None:
    boxes = np.arange(16, dtype=np.float32).reshape(4, 4).T[::-1].T[:, ::-1].copy()[:, ::-1]
    boxes = np.asfortranarray(np.sort(boxes, axis=1))
    item = Annotation("x", (60, 40), boxes, np.arange(8, dtype=np.uint8)[::2])
    boxes[:] = 0
    assert item.boxes.min(axis=0).tolist() == [0, 1, 2, 3] and item.boxes.flags.c_contiguous
    assert item.labels.tolist() == [0, 2, 4, 6]
    assert Annotation("x", (1, 1), [], []).boxes.shape == (0, 4)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    ("items", "text"),
    [
        ([note(boxes=[[1, 2, 61, 20]])], "is not in the photo of 60x40 pixels"),
        ([note(boxes=[[-1, 2, 30, 20]])], "is not in the photo"),
        ([note(labels=[3])], r"labels must be in 0..2, got 3$"),
        ([note(labels=[-2])], r"labels must be in 0..2, got -2$"),
        ([note("first.jpg")], "name must be that of one item, got 'first.jpg' twice"),
        ([note("../x.jpg")], "must not lead out of the folder"),
        ([note("a/../../x.jpg")], "must not lead out of the folder"),
        ([note("/x.jpg")], "must be a plain path"),
        ([note("")], "must be a plain path"),
        ([note(".")], "must be a plain path"),
        ([note("a//x.jpg")], "must be a plain path"),
        ([note("./x.jpg")], "must be a plain path"),
        ([note("a\\x.jpg")], "must be a plain path"),
        ([note("x\0.jpg")], "must be a plain path"),
        (["x.jpg"], "items must be Annotations, got str"),
    ],
)
def test_wrong_items_are_refused_by_all(writer: Callable[..., Written], items: list, text: str, tmp_path: Path) -> None:
    place = target(writer, tmp_path)
    with pytest.raises((TypeError, ValueError), match=text):
        writer(place, [note("first.jpg"), *items], CLASSES)
    left = [name for name in files(tmp_path) if "first" not in name]
    assert left == [], "no half file, no list, nothing outside"


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("classes", ["cat", [], ["cat", " "], [1, 2], ["crane", "cat", "crane"]])
def test_wrong_classes_are_refused(writer: Callable[..., Written], classes: Any, tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError), match="classes must"):
        writer(target(writer, tmp_path), [], classes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writer", WRITERS)
def test_a_failing_generator_leaves_the_old_files(writer: Callable[..., Written], tmp_path: Path) -> None:
    place = target(writer, tmp_path)
    writer(place, [note("old.jpg")], CLASSES)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    def items() -> Iterator[Annotation]:
        raise RuntimeError("the network is gone")
        yield

    with pytest.raises(RuntimeError, match="gone"):
        writer(place, items(), CLASSES)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


@pytest.mark.parametrize("writer", WRITERS)
def test_clipping_is_asked_for_and_counted(writer: Callable[..., Written], tmp_path: Path) -> None:
    place = target(writer, tmp_path)
    items = [note(boxes=[[-5, 2, 30, 20], [0, 0, 60, 40], [1, 1, 60.009, 40]])]
    done = writer(place, iter(items), CLASSES, clip=True)
    assert done == Written(place, 1, 3, 1, 0), "rounding of two decimals is no overhang"
    with pytest.raises(ValueError, match="lies outside the photo of 60x40 pixels"):
        writer(place, [note(boxes=[[60, 0, 70, 40]])], CLASSES, clip=True)


@pytest.mark.parametrize("writer", WRITERS)
def test_nothing_at_all_is_a_valid_set(writer: Callable[..., Written], tmp_path: Path) -> None:
    place = target(writer, tmp_path)
    assert writer(place, iter(()), CLASSES) == Written(place, 0, 0, 0, 0)
    if writer is write_coco:
        assert load(place).getCatIds() == [1, 2, 3] and load(place).getImgIds() == []
        write_coco(place, [], CLASSES, results=True)
        assert json.loads(place.read_text()) == []


@pytest.mark.parametrize("writer", WRITERS)
def test_labels_without_a_box_are_counted(writer: Callable[..., Written], tmp_path: Path) -> None:
    items = [note("a.jpg", present=(0,)), note("b.jpg", (), present=(1,)), note("c.jpg", labels=[1], present=(1,))]
    assert writer(target(writer, tmp_path), items, CLASSES).unboxed == 1


@pytest.mark.parametrize("writer", WRITERS)
def test_the_class_agnostic_label_needs_its_name(writer: Callable[..., Written], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="for -1 classes must hold 'object'"):
        writer(target(writer, tmp_path), [note(labels=[-1])], ["cat"])
    writer(target(writer, tmp_path), [note(labels=[-1])], CLASSES)
    if writer is write_coco:
        assert load(tmp_path / "boxes.json").anns[1]["category_id"] == 3


@pytest.mark.parametrize("writer", [write_yolo, write_voc])
def test_label_files_do_not_fall_together(writer: Callable[..., Written], tmp_path: Path) -> None:
    writer(tmp_path / "boxes", [note("a/x.jpg"), note("b/x.jpg"), note("x.y.jpg"), note("x.z.jpg")], CLASSES)
    assert len([name for name in files(tmp_path / "boxes") if name.startswith(("labels", "Annotations"))]) == 4
    with pytest.raises(ValueError, match=r"the photos 'a/x.jpg' and 'a/x.png' would share one annotation file"):
        writer(tmp_path / "boxes", [note("a/x.jpg"), note("a/x.png")], CLASSES)


@pytest.mark.parametrize("writer", [write_yolo, write_voc])
def test_a_link_does_not_lead_files_away(writer: Callable[..., Written], tmp_path: Path) -> None:
    away, boxes = tmp_path / "away", tmp_path / "boxes"
    for kind in ("labels", "Annotations"):
        (boxes / kind).mkdir(parents=True)
        (boxes / kind / "sub").symlink_to(away)
    away.mkdir()
    with pytest.raises(ValueError, match="a link leads (labels|Annotations)/sub out of it"):
        writer(boxes, [note("sub/x.jpg")], CLASSES)
    assert not list(away.iterdir())


@pytest.mark.parametrize("writer", [write_yolo, write_voc, write_wsol])
@pytest.mark.parametrize("name", ["a\nb.jpg", "a\x85b.jpg", "a\u2028b.jpg", "a\udc80b.jpg", " a.jpg", "a/b.jpg "])
def test_names_that_no_line_holds_are_refused(writer: Callable[..., Written], name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be written in this format"):
        writer(tmp_path / "boxes", [note(name)], CLASSES)
    write_coco(tmp_path / "boxes.json", [note(name)], CLASSES)
    assert json.loads((tmp_path / "boxes.json").read_text())["images"][0]["file_name"] == name


@pytest.mark.parametrize("results", [True, False])
def test_memory_stays_flat(results: bool, tmp_path: Path) -> None:
    """1,500 boxes a time: six times as many take no more memory at once."""
    boxes = np.tile([[1.0, 2, 3, 4]], (1_500, 1))
    scores = np.full(1_500, 0.5)

    def items() -> Iterator[Annotation]:
        for i in range(6):
            yield note(f"{i}.jpg", boxes, scores=scores)

    def peak(count: int) -> int:
        tracemalloc.start()
        write_coco(tmp_path / "x.json", (item for i, item in enumerate(items()) if i < count), CLASSES, results=results)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    one, six = peak(1), peak(6)
    assert six < 1.5 * one, (one, six)


def test_coco_round_trip(tmp_path: Path) -> None:
    items = random_notes()
    done = write_coco(tmp_path / "deep" / "er" / "x.json", (item for item in items), CLASSES)
    assert (done.photos, done.boxes) == (12, sum(len(item.boxes) for item in items))
    coco = load(done.path)
    assert {cat["id"]: cat["name"] for cat in coco.loadCats(coco.getCatIds())} == dict(enumerate(CLASSES, 1))
    assert sorted(coco.anns) == list(range(1, done.boxes + 1)) and sorted(coco.imgs) == list(range(1, 13))
    for number, item in enumerate(items, 1):
        image = coco.imgs[number]
        assert (image["file_name"], image["width"], image["height"]) == (item.name, *item.size)
        found = coco.loadAnns(coco.getAnnIds(imgIds=number))
        assert [a["category_id"] - 1 for a in found] == item.labels.tolist()
        assert item.scores is not None and [a["score"] for a in found] == item.scores.tolist()
        boxes = np.array([a["bbox"] for a in found]).reshape(-1, 4)
        np.testing.assert_allclose(boxes[:, :2], item.boxes[:, :2], rtol=0, atol=0)
        np.testing.assert_allclose(boxes[:, :2] + boxes[:, 2:], item.boxes[:, 2:], rtol=0, atol=1e-9)
        assert [a["area"] for a in found] == (boxes[:, 2] * boxes[:, 3]).tolist()
        assert all(a["iscrowd"] == 0 for a in found)


def test_coco_results_of_perfect_boxes_score_one(tmp_path: Path) -> None:
    items = [item for item in random_notes(24, labels=2, decimals=0) if item.size != (1, 1)]
    write_coco(tmp_path / "truth.json", items, CLASSES)
    write_coco(tmp_path / "results.json", items, CLASSES, results=True)
    stats = evaluate(tmp_path / "truth.json", tmp_path / "results.json")
    assert stats[:3].tolist() == pytest.approx([1, 1, 1])
    shifted = [Annotation(i.name, i.size, i.boxes / 2 if len(i.boxes) else i.boxes, i.labels, i.scores) for i in items]
    write_coco(tmp_path / "results.json", shifted, CLASSES, results=True)
    assert evaluate(tmp_path / "truth.json", tmp_path / "results.json")[0] < 0.2


def test_coco_ids_may_be_those_of_another_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    items = [note("a.jpg", scores=[0.5]), note("b.jpg", labels=[2], scores=[1]), note("c.jpg", ())]
    ids = {"a.jpg": 40, "b.jpg": 7, "c.jpg": 9}
    write_coco(path, items, CLASSES, results=True, image_ids=ids, category_ids=(90, 1, 0))
    assert json.loads(path.read_text()) == [
        {"image_id": 40, "category_id": 90, "bbox": [1, 2, 29, 18], "score": 0.5},
        {"image_id": 7, "category_id": 0, "bbox": [1, 2, 29, 18], "score": 1},
    ]
    write_coco(path, items, CLASSES, image_ids=ids, category_ids=range(3))
    assert sorted(load(path).imgs) == [7, 9, 40] and load(path).getCatIds() == [0, 1, 2]
    for options, text in (
        ({"image_ids": {"a.jpg": 1}}, "got none for 'b.jpg'"),
        ({"image_ids": dict.fromkeys(ids, 3)}, "must differ, got 3 for 'a.jpg' and 'b.jpg'"),
        ({"category_ids": (1, 2)}, "must be 3 different integers"),
        ({"category_ids": (1, 2, 2)}, "must be 3 different integers"),
        ({"category_ids": (1, 2, 0.5)}, "must be integers"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            write_coco(path, items, CLASSES, **options)
    with pytest.raises(ValueError, match="'x.jpg': scores must be given"):
        write_coco(path, [note()], CLASSES, results=True)
    with pytest.raises(ValueError, match="path must be a file"):
        write_coco(tmp_path, [note()], CLASSES)


def read_xml(path: Path) -> tuple[str, tuple[int, int], list[tuple[str, list[float]]]]:
    """Return name, size and objects with xyxy edges."""
    root = ET.parse(path).getroot()
    found = []
    for item in root.findall("object"):
        x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{tag}", "")) for tag in ("xmin", "ymin", "xmax", "ymax"))
        found.append((item.findtext("name", ""), [x0 - 1, y0 - 1, x1, y1]))
    size = int(root.findtext("size/width", "")), int(root.findtext("size/height", ""))
    return root.findtext("filename", ""), size, found


@pytest.mark.parametrize("rounded", [True, False])
def test_voc_round_trip(rounded: bool, tmp_path: Path) -> None:
    items = random_notes(decimals=0)
    done = write_voc(tmp_path, iter(items), CLASSES, split="val", rounded=rounded)
    assert (done.photos, done.boxes) == (12, sum(len(item.boxes) for item in items))
    listed = (tmp_path / "ImageSets" / "Main" / "val.txt").read_text().splitlines()
    assert listed == [item.name.removesuffix(".jpg") for item in items]
    for key, item in zip(listed, items, strict=True):
        name, size, found = read_xml(tmp_path / "Annotations" / f"{key}.xml")
        assert (name, size) == (item.name, item.size)
        assert [label for label, _ in found] == [CLASSES[label] for label in item.labels]
        boxes = np.array([box for _, box in found]).reshape(-1, 4)
        expected = whole_pixels(item.boxes, item.size) if rounded else item.boxes
        np.testing.assert_allclose(boxes, expected, rtol=0, atol=0 if rounded else 1e-9)


def test_voc_is_laid_out_as_voc(tmp_path: Path) -> None:
    write_voc(tmp_path, [note(boxes=[[0, 0, 60, 40], [2.4, 3.6, 2.45, 3.65]], scores=[0.5, 1])], CLASSES)
    root = ET.parse(tmp_path / "Annotations" / "x.xml").getroot()
    assert [child.tag for child in root] == ["folder", "filename", "size", "segmented", "object", "object"]
    assert [child.tag for child in root[4]] == ["name", "pose", "truncated", "difficult", "score", "bndbox"]
    assert [child.text for child in root[4][5]] == ["1", "1", "60", "40"], "pixels from 1, the last one included"
    assert [child.text for child in root[5][5]] == ["3", "4", "3", "4"], "the pixel that holds its centre"
    assert [item.findtext("score") for item in root.findall("object")] == ["0.5", "1.0"]


def test_voc_refuses_what_it_cannot_tell_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="classes must have different names, got 'crane' 2 times"):
        write_voc(tmp_path, [], ["crane", "crane"])
    with pytest.raises(ValueError, match="the class name 'a\\\\x01' cannot be written"):
        write_voc(tmp_path, [], ["a\x01"])
    for split in ("a/b", "../x", ""):
        with pytest.raises(ValueError, match="split must|name must"):
            write_voc(tmp_path, [], CLASSES, split=split)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [(1, 1), (60, 40), (7, 10_000)])
def test_whole_pixels_are_near_whole_and_inside(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    corners = np.sort(rng.uniform(0, 1, (2000, 2, 2)) ** 3, axis=1)
    corners[:500, 1] = np.minimum(corners[:500, 0] + 1e-6, 1)
    corners[500:600, 1] = 1
    boxes = (corners * size).reshape(-1, 4)
    out = whole_pixels(boxes, size)
    assert (out[:, :2] >= 0).all() and (out[:, 2:] <= size).all() and (out[:, :2] < out[:, 2:]).all()
    assert np.abs(out - boxes).max() <= 1, "a pixel at most, where a box would vanish"
    thick = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
    if thick.any():
        assert np.abs(out - boxes)[thick].max() <= 0.5
    whole = np.array([[0, 0, *size]])
    assert np.array_equal(whole_pixels(whole.astype(float), size), whole)
    assert whole_pixels(np.zeros((0, 4)), size).shape == (0, 4)


def test_wsol_round_trip(tmp_path: Path) -> None:
    items = [
        note("a/x.jpg", [[0, 0, 60, 40], [1.4, 1.5, 2.6, 9]], labels=[1, 1], scores=[1, 1]),
        note("b.JPEG", (), (1, 1), present=(2,)),
        note("c.jpg", present=(0,)),
    ]
    done = write_wsol(tmp_path / "CUB" / "test", iter(items), CLASSES)
    assert done.path == tmp_path / "CUB" / "test" and (done.photos, done.boxes, done.unboxed) == (3, 3, 1)
    read = {name: (done.path / name).read_text().splitlines() for name in files(done.path)}
    assert read == {
        "image_ids.txt": ["a/x.jpg", "b.JPEG", "c.jpg"],
        "class_labels.txt": ["a/x.jpg,1", "b.JPEG,2", "c.jpg,0"],
        "image_sizes.txt": ["a/x.jpg,60,40", "b.JPEG,1,1", "c.jpg,60,40"],
        "localization.txt": ["a/x.jpg,0,0,60,40", "a/x.jpg,1,2,3,9", "c.jpg,1,2,30,20"],
    }
    write_wsol(done.path, [note("a.jpg", [[0.5, 1.25, 3, 4]])], CLASSES, rounded=False)
    assert (done.path / "localization.txt").read_text() == "a.jpg,0.5,1.25,3.0,4.0\n"


def test_wsol_refuses_what_its_lines_do_not_hold(tmp_path: Path) -> None:
    for item, text in (
        (note("a,b.jpg"), "cannot be written in this format: it holds ','"),
        (note(boxes=[[0, 0, 1, 1], [1, 1, 2, 2]], labels=[0, 2]), r"one label a photo, got \[0, 2\]"),
        (note(present=(1,)), r"one label a photo, got \[0, 1\]"),
        (note(boxes=()), "one label a photo, got none"),
    ):
        with pytest.raises(ValueError, match=text):
            write_wsol(tmp_path, [item], CLASSES)
    assert not files(tmp_path)
