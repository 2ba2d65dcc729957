"""YOLO's layout: what is written is read back, what others write is read, what is broken is told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import yaml

from molt.data import Annotation, join_samples, photo_size, read_yolo, write_yolo
from molt.data.annotations import DataError

CLASSES = ("cat", "café & <co>", "object")


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


def photos(folder: Path, items: list[Annotation]) -> None:
    for item in items:
        (folder / item.name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("1", item.size).save(folder / item.name, "PNG")


def test_yolo_round_trip(tmp_path: Path) -> None:
    items = random_notes()
    photos(tmp_path / "photos", items)
    done = write_yolo(tmp_path / "set", iter(items), CLASSES, images=tmp_path / "photos")
    assert (done.photos, done.boxes) == (12, sum(len(item.boxes) for item in items))
    assert (tmp_path / "set" / "labels" / "a" / "photo 0.txt").read_text() == ""
    for path in (tmp_path / "set", tmp_path / "set" / "data.yaml"):
        found = read_yolo(path)
        assert found.classes == CLASSES and found.kind == "yolo" and found.name == "set train"
        joined = {item.name: item for item in join_samples(found.samples)}
        assert list(joined) == [item.name for item in items if len(item.boxes)]
        for item in items:
            if not len(item.boxes):
                continue
            back = joined[item.name]
            order = np.argsort(item.labels, kind="stable"), np.argsort(back.labels, kind="stable")
            assert back.size == item.size and back.labels[order[1]].tolist() == item.labels[order[0]].tolist()
            assert np.abs(back.boxes[order[1]] - item.boxes[order[0]]).max() < 1e-6, "pixels"
    for sample in found.samples:
        assert photo_size(sample.path) == sample.size


def test_yolo_lines_are_plain_shares(tmp_path: Path) -> None:
    write_yolo(tmp_path, [note(boxes=[[0, 0, 60, 40], [15, 10, 30, 20]], labels=[1, 0], scores=[1, 0.25])], CLASSES)
    assert (tmp_path / "labels" / "x.txt").read_text() == "1 0.5 0.5 1 1\n0 0.375 0.375 0.25 0.25\n"
    assert (tmp_path / "train.txt").read_text() == "./images/x.jpg\n"
    write_yolo(tmp_path, [note(boxes=[[15, 10, 30, 20]], scores=[0.25])], CLASSES, split="val", confidence=True)
    assert (tmp_path / "labels" / "x.txt").read_text() == "0 0.375 0.375 0.25 0.25 0.25\n"
    tiny = note("tiny.jpg", [[0, 0, 1e-7, 1e-7]], (10_000, 10_000))
    write_yolo(tmp_path, [tiny], CLASSES, split="test")
    assert (
        tmp_path / "labels" / "tiny.txt"
    ).read_text() == "0 0.000000000005 0.000000000005 0.00000000001 0.00000000001\n"
    with pytest.raises(ValueError, match=r"scores must be given, in \[0, 1\]"):
        write_yolo(tmp_path, [note()], CLASSES, confidence=True)
    with pytest.raises(ValueError, match=r"scores must be given, in \[0, 1\]"):
        write_yolo(tmp_path, [note(scores=[1.5])], CLASSES, confidence=True)


def test_yolo_splits_share_a_folder(tmp_path: Path) -> None:
    root = tmp_path / "set"
    photos(root / "images", [note("a.jpg"), note("b.jpg")])
    write_yolo(root, [note("a.jpg", scores=[0.5])], ("yes", "1", "ü: 'x'"), confidence=True)
    write_yolo(root, [note("b.jpg", labels=[2])], ("yes", "1", "ü: 'x'"), split="val")
    for split, name in (("train", "a.jpg"), ("val", "b.jpg")):
        found = read_yolo(root, split)
        assert [s.name for s in found.samples] == [name] and found.classes == ("yes", "1", "ü: 'x'")
    with pytest.raises(DataError, match="several splits and none asked for; there: train, val"):
        read_yolo(root)
    with pytest.raises(DataError, match="no split test; there: train, val"):
        read_yolo(root, "test")
    with pytest.raises(ValueError, match="classes and place must be those of"):
        write_yolo(root, [], ("no",), split="test")
    with pytest.raises(ValueError, match="split must be one of train, val, test, got '../x'"):
        write_yolo(root, [], CLASSES, split="../x")


def test_yolo_images_is_a_link_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for _ in range(2):
        write_yolo(tmp_path / "set", [], CLASSES, images=tmp_path / "photos")
        assert (tmp_path / "set" / "images").readlink() == tmp_path / "photos"
    with pytest.raises(ValueError, match="images must be what .* already is or leads to"):
        write_yolo(tmp_path / "set", [], CLASSES, images=tmp_path)
    with pytest.raises(ValueError, match="images must be a folder of photos"):
        write_yolo(tmp_path / "other", [], CLASSES, images=tmp_path / "none")
    with pytest.raises(ValueError, match="name must have no folder 'images', which YOLO replaces"):
        write_yolo(tmp_path / "set", [note("a/images/x.jpg")], CLASSES)
    write_yolo(tmp_path / "set", [note("a/images.jpg"), note("labels/x.jpg")], CLASSES)
    assert (tmp_path / "set" / "labels" / "labels" / "x.txt").is_file() and not list((tmp_path / "photos").iterdir())


def yolo_set(root: Path, lines: str = "0 0.5 0.5 1 1\n", data: str = "names: [cat]\ntrain: images/train\n") -> Path:
    photos(root / "images" / "train", [note("x.png")])
    (root / "labels" / "train").mkdir(parents=True)
    (root / "labels" / "train" / "x.txt").write_text(lines)
    (root / "data.yaml").write_text(data)
    return root


@pytest.mark.parametrize(
    "data",
    [
        "train: images/train\nnc: 1\nnames: [cat]\nval: null\ndownload: |\n  import os\n",
        "names: {0: cat}\ntrain: [images/train]\nroboflow: {a: 1}\n",
        "names: [cat]\ntrain: ../images/train\n",
        "path: .\nnames:\n  - cat\ntrain: ./images/\n",
        "names: [cat]\ntrain: lists/all.txt\n",
        "names: {'0': cat}\nnc: '1'\ntrain: images/train\n",
        "nc: 1.0\nnames: [cat]\n",
        "names: [cat]\ntrain: images/train\nval: images/train\n",
        "names: [cat]\nvalidation: images/train\n",
    ],
)
def test_yolo_data_of_others_is_read(data: str, tmp_path: Path) -> None:
    root = yolo_set(tmp_path / "set", "0 0.5 0.5 1 1 0.75\n\n0.0 0.25 0.25 0.5 0.5\n", data)
    (root / "lists").mkdir()
    (root / "lists" / "all.txt").write_text("\n\nimages/train/x.png\r\n")
    (sample,) = read_yolo(root).samples
    assert (sample.name, sample.size, sample.label) == ("train/x.png", (60, 40), 0)
    assert sample.boxes.tolist() == [[0, 0, 60, 40], [0, 0, 30, 20]] and sample.path.is_file()


@pytest.mark.parametrize(
    ("data", "line", "text"),
    [
        ("names: [cat]\npath: labels\n", None, "no split at all; there: none .* or photos in images beside it"),
        ("train: images/train\nnames: [cat, dog, cat]\n", 2, "classes 0 and 2 are both called 'cat'"),
        ("train: images/train\nnames: {'0': cat, '1': cat}\n", 2, "classes 0 and 1 are both called 'cat'"),
        ("train: images/train\nnames: {'a': cat}\n", 2, "names with the keys 'a' .expected each number from 0 to 0"),
        ("names: [cat]\nnc: '2'\ntrain: images/train\n", 2, "nc: '2'"),
        ("names: [cat]\nkpt_shape: 17\ntrain: images/train\n", 2, "kpt_shape: 17"),
        ("names: [cat]\nkpt_shape: [17, 4]\ntrain: images/train\n", 2, "kpt_shape:"),
        ("train: images/train\n", None, "names: missing"),
        ("train: images/train\nnames: cat\n", 2, "names: no list"),
        ("train: images/train\nnames: []\n", 2, "names: no list"),
        ("train: images/train\nnames: {1: cat}\n", 2, "names with the keys 1"),
        ("train: images/train\nnames: [yes]\n", 2, "the class name True"),
        ("train: images/train\nnames: [1.10]\n", 2, "the class name 1.1"),
        ("names: [cat]\nnc: 2\ntrain: images/train\n", 2, "nc: 2"),
        ("names: [cat]\nnames: [dog]\ntrain: images/train\n", 2, "the key 'names', or one in it, comes twice"),
        ("names: {0: cat, 0: dog}\ntrain: images/train\n", 1, "comes twice"),
        ("names: [cat]\ntrain: 3\n", 2, "train: 3"),
        ("names: [cat]\ntrain: []\n", 2, r"train: \[\]"),
        ("names: [cat]\ntrain: /etc\n", 2, "train: '/etc'"),
        ("names: [cat]\ntrain: images/../../x\n", 2, "train: 'images/../../x'"),
        ("names: [cat]\ntrain: ../../x\n", 2, "train: '../../x'"),
        ("names: [cat]\npath: ../x\ntrain: images/train\n", 2, "path: '../x'"),
        ("names: [cat]\ntrain: none.txt\n", 2, "train: 'none.txt': no such folder or file"),
        ("names: [cat]\ntrain: images/x*\n", 2, "no such folder or file below"),
        ("names: [cat]\ntrain: labels\n", 2, "none of 0 photos of train has a box"),
        ("- cat\n", 1, "no mapping"),
        ("", 1, "no mapping"),
        ("names: [cat\n", 2, "broken YAML"),
        ("names: !!python/object/apply:os.system ['true']\n", 1, "broken YAML"),
        ("[" * 1500, None, "broken YAML: RecursionError"),
    ],
)
def test_broken_yolo_data_is_told(data: str, line: int | None, text: str, tmp_path: Path) -> None:
    root = yolo_set(tmp_path / "set", data=data)
    with pytest.raises(DataError, match=text) as caught:
        read_yolo(root)
    assert len(caught.value.problems) == 1 and caught.value.problems[0].line == line


def test_broken_yolo_labels_are_all_told(tmp_path: Path) -> None:
    wrong = [
        ("0 0.5 0.5 1", "4 values"),
        ("0 0 0 1 0 1 1 0.5", "8 values"),
        ("0 0 0 1 0 1 1.1", "a box outside its photo"),
        ("0 0 0 120 0 120 90 0 90", "a box outside its photo"),
        ("0 0.2 0.5 0.3 0.5 0.4 0.5", "a box outside its photo"),
        ("0 a 0.5 1 1", "not all numbers"),
        ("0 nan 0.5 1 1", "not finite"),
        ("1 0.5 0.5 1 1", "the class '1' is not in 0..0"),
        ("-1 0.5 0.5 1 1", "the class '-1'"),
        ("0.5 0.5 0.5 1 1", "the class '0.5'"),
        ("0 0.5 0.5 1 1 2", "the confidence '2'"),
        ("0 0.5 0.5 0 1", "a box without area"),
        ("0 0.5 0.5 1.1 1", "a box outside its photo of 60x40 pixels"),
        ("0 1.5 0.5 0.1 0.1", "a box outside"),
    ]
    root = yolo_set(tmp_path / "set", "0 0.5 0.5 1 1\n" + "\n".join(line for line, _ in wrong))
    with pytest.raises(DataError, match="and 13 more problems") as caught:
        read_yolo(root)
    assert [p.line for p in caught.value.problems] == list(range(2, 16))
    for problem, (_, text) in zip(caught.value.problems, wrong, strict=True):
        assert problem.file == root / "labels" / "train" / "x.txt" and text in problem.message


def test_yolo_photos_that_are_missing_twice_or_broken_are_told(tmp_path: Path) -> None:
    root = yolo_set(tmp_path / "set", data="names: [cat]\ntrain: train.txt\n")
    listed = ["images/train/x.png", "./images/train/x.png", "images/none.png", "../x.png", "/x.png", "images/bad.png"]
    (root / "train.txt").write_text("\n".join(listed))
    (root / "images" / "bad.png").write_text("no photo")
    (root / "labels" / "bad.txt").write_text("0 0.5 0.5 1 1")
    with pytest.raises(DataError) as caught:
        read_yolo(root)
    told = [(p.file.name, p.line, p.message) for p in caught.value.problems]
    assert told[:4] == [
        ("train.txt", 2, "photo images/train/x.png is listed twice"),
        ("none.png", None, "no such photo"),
        ("train.txt", 4, "photo '../x.png'"),
        ("train.txt", 5, "photo '/x.png'"),
    ]
    assert told[4][:2] == ("bad.png", None) and "not a photo" in told[4][2] and len(told) == 5
    (root / "train.txt").write_bytes(b"images/train/x.png\n\xff\xfe\n")
    with pytest.raises(DataError, match="train.txt:2: no UTF-8"):
        read_yolo(root)


def test_yolo_files_that_are_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.yaml: cannot be read \(No such file or directory\)"):
        read_yolo(tmp_path)
    root = yolo_set(tmp_path / "set")
    (root / "labels" / "train" / "x.txt").unlink()
    os.mkfifo(root / "labels" / "train" / "x.txt")
    with pytest.raises(DataError, match="x.txt: is not a regular file"):
        read_yolo(root)
    (root / "labels" / "train" / "x.txt").unlink()
    with pytest.raises(DataError, match="data.yaml:2: none of 1 photo of train has a box"):
        read_yolo(root)
    (root / "data.yaml").rename(root / "data.yml")
    (root / "labels" / "train" / "x.txt").write_text("0 0.5 0.5 1 1")
    assert len(read_yolo(root)) == len(read_yolo(root / "data.yml")) == 1


@pytest.mark.parametrize(
    ("place", "split"),
    [
        ("images/train", "train"),
        ("images/val", "val"),
        ("train/images", "train"),
        ("valid/images", "val"),
        ("test/images", "test"),
        ("images", "train"),
    ],
)
def test_photos_are_found_where_data_yaml_says_nothing_of_them(place: str, split: str, tmp_path: Path) -> None:
    photos(tmp_path / place, [note("a.png"), note("deep/b.png")])
    labels = tmp_path / place.replace("images", "labels")
    labels.mkdir(parents=True)
    (labels / "a.txt").write_text("1 0.5 0.5 1 1")
    (tmp_path / "data.yaml").write_text("nc: 2\nnames: [cat, dog]\n")
    for found in (read_yolo(tmp_path), read_yolo(tmp_path, split)):
        assert found.name == f"{tmp_path.name} {split}" and [s.label for s in found.samples] == [1]
        assert [Path(s.name).name for s in found.unlabelled] == ["b.png"]


def test_yolo_photos_without_a_box_count(tmp_path: Path) -> None:
    root = yolo_set(tmp_path / "set")
    photos(root / "images" / "train", [note("empty.png"), note("missing.png")])
    (root / "labels" / "train" / "empty.txt").write_text("\n")
    found = read_yolo(root)
    assert [s.name for s in found.samples] == ["train/x.png"]
    names = ["train/empty.png", "train/missing.png"]
    assert [(s.name, s.label, len(s.boxes), s.path) for s in found.unlabelled] == [
        (name, -1, 0, root / "images" / name) for name in names
    ]
    assert found.left_out == {"photos without an object to keep": 2}
    assert found.notes == ("photos without a label file, taken as showing none of the classes: 1",)
    items = join_samples([*found.samples, *found.unlabelled])
    again = read_yolo(write_yolo(tmp_path / "again", items, ("cat",), images=root / "images").path)
    assert [s.name for s in again.unlabelled] == names and again.notes == ()


@pytest.mark.parametrize(
    ("rows", "data", "boxes", "note"),
    [
        (
            "0 0.1 0.5 0.5 0.1 0.9 1",
            "",
            [[6, 4, 54, 40]],
            "polygons or rotated boxes (keypoints need kpt_shape), of which the upright box is taken: 1",
        ),
        (
            "0 0.5 0 1 0.5 0.5 1 0 0.5",
            "",
            [[0, 0, 60, 40]],
            "polygons or rotated boxes (keypoints need kpt_shape), of which the upright box is taken: 1",
        ),
        (
            "0 -0.1 0.5 0.5 -0.2 0.9 0.5 0.5 1",
            "",
            [[0, 0, 54, 40]],
            "polygons or rotated boxes (keypoints need kpt_shape), of which the upright box is taken: 1",
        ),
        (
            "0 0.5 0.5 0.5 0.5 0 0 2 1 1 2 1 0 0",
            "kpt_shape: [3, 3]\n",
            [[15, 10, 45, 30]],
            "rows with keypoints, of which the box is taken: 1",
        ),
        (
            "0 0.5 0.5 0.5 0.5 0 0 1 1",
            "kpt_shape: ['2', 2]\n",
            [[15, 10, 45, 30]],
            "rows with keypoints, of which the box is taken: 1",
        ),
        ("0 0.5 0.5 0.5 0.5", "kpt_shape: [3, 3]\n", [[15, 10, 45, 30]], None),
    ],
)
def test_yolo_rows_of_other_tasks_have_a_box(
    rows: str, data: str, boxes: list, note: str | None, tmp_path: Path
) -> None:
    found = read_yolo(yolo_set(tmp_path / "set", rows, f"names: [cat]\n{data}train: images/train\n"))
    np.testing.assert_allclose(found.samples[0].boxes, boxes, atol=1e-9)
    assert found.notes == (() if note is None else (note,))


def test_yolo_boxes_that_come_twice_are_kept_once_and_told(tmp_path: Path) -> None:
    rows = ["0 0.5 0.5 1 1", "1 0.5 0.5 1 1", "0 0.50 .5 1 1.0", "0 0.5 0.5 1 1 0.75", "0 0 0 1 0 1 1", "0 0 0 1 1 0 1"]
    root = yolo_set(tmp_path / "set", "\n".join(rows), "names: [cat, dog]\ntrain: images/train\n")
    found = read_yolo(root)
    assert [len(s.boxes) for s in found.samples] == [3, 1] and found.left_out == {"boxes that come twice": 2}
    assert [(p.line, p.message) for p in found.remarks] == [
        (3, "repeats line 1, '0 0.50 .5 1 1.0'"),
        (4, "repeats line 1, '0 0.5 0.5 1 1 0.75'"),
    ]


def test_yolo_data_has_what_trainers_ask_for(tmp_path: Path) -> None:
    """Ultralytics' check: train and val are there, and as many names as nc says."""
    root, splits = tmp_path / "set", {"train": "train.txt", "val": "train.txt", "test": "test.txt"}
    photos(root / "images", [note("a.jpg"), note("b.jpg"), note("c.jpg")])
    for split, name, expected in (
        ("test", "c.jpg", {"train": "test.txt", "val": "test.txt", "test": "test.txt"}),
        ("train", "a.jpg", splits),
        ("val", "b.jpg", splits | {"val": "val.txt"}),
        ("train", "a.jpg", splits | {"val": "val.txt"}),
    ):
        write_yolo(root, [note(name)], CLASSES, split=split)
        data = yaml.safe_load((root / "data.yaml").read_text("utf-8"))
        assert data == {"names": dict(enumerate(CLASSES)), "nc": 3} | expected
        if split == "test":
            assert read_yolo(root).name == "set test"
            assert read_yolo(root, "val").notes == (
                f"{root / 'data.yaml'} names the same photos for val and train and test",
            )
    assert [s.name for s in read_yolo(root, "val").samples] == ["b.jpg"] and read_yolo(root, "val").notes == ()
