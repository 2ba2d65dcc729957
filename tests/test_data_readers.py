"""Class folders, wsolevaluation and read_set: what they return, and that each wrong line is named with its form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from molt.data import (
    DataError,
    LocalizationSet,
    Problem,
    Sample,
    read_image_folder,
    read_set,
    read_wsol,
)


def photo(path: Path, size: tuple[int, int] = (60, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, "teal").save(path)
    return path


def wsol(folder: Path, **files: str) -> Path:
    """Write a split of two photos; files of that name take the place of the right ones."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "image_ids": "a/1.jpg\nb/2.jpg",
        "class_labels": "a/1.jpg,0\nb/2.jpg,1",
        "image_sizes": "a/1.jpg,60,40\nb/2.jpg,30,20",
        "localization": "a/1.jpg,1,2,30,20\nb/2.jpg,0,0,30,20\na/1.jpg,5,6,7,8",
    }
    for name, text in (texts | files).items():
        (folder / f"{name}.txt").write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def coco(file: Path, **lists: object) -> Path:
    content = {
        "images": [{"id": 7, "file_name": "1.jpg", "width": 60, "height": 40}, {"id": 3, "file_name": "s/2.jpg"}],
        "categories": [{"id": 44, "name": "cup"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 2, "bbox": [1, 2, 3, 4], "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [0.5, 0, 10, 10.25]},
            {"id": 3, "image_id": 7, "category_id": 44, "bbox": [5, 5, 5, 5]},
            {"id": 4, "image_id": 7, "category_id": 2, "bbox": [20, 0, 10, 10]},
        ],
    } | lists
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
    return file


def faults(read: object, *arguments: object, **options: object) -> tuple[Problem, ...]:
    with pytest.raises(DataError) as raised:
        read(*arguments, **options)
    return raised.value.problems


def test_image_folder(tmp_path: Path) -> None:
    for name in ("b/2.jpg", "b/deep/er/3.PNG", "a/é ü.jpg", "a/1.jpg"):
        photo(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("not a photo")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "empty").mkdir()
    found = read_image_folder(tmp_path)
    assert found.classes == ("a", "b", "empty") and found.kind == "folder" and found.name == tmp_path.name
    assert [(s.name, s.label) for s in found.samples] == [
        ("a/1.jpg", 0), ("a/é ü.jpg", 0), ("b/2.jpg", 1), ("b/deep/er/3.PNG", 1),
    ]  # fmt: skip
    assert all(s.path.is_file() and s.boxes.shape == (0, 4) and s.size is None for s in found.samples)
    assert found.counts() == [2, 2, 0]


def test_image_folder_that_is_none(tmp_path: Path) -> None:
    (problem,) = faults(read_image_folder, tmp_path / "no")
    assert problem.file == tmp_path / "no" and "No such file" in problem.message
    (problem,) = faults(read_image_folder, tmp_path)
    assert problem.expected == "at least one"


def test_wsol(tmp_path: Path) -> None:
    folder = wsol(tmp_path / "Mine" / "test")
    for found in (
        read_wsol(folder, "/photos"),
        read_wsol(folder.parent, "/photos", "test"),
        read_wsol(folder, "/photos", "test"),
        read_set(folder, photos="/photos"),
        read_set(folder.parent, photos="/photos", split="test"),
    ):
        assert found.name == "Mine test" and found.kind == "wsol" and found.classes == ("a", "b")
        first, second = found.samples
        assert (first.name, first.path, first.label, first.size) == ("a/1.jpg", Path("/photos/a/1.jpg"), 0, (60, 40))
        assert first.boxes.dtype == np.float64
        np.testing.assert_array_equal(first.boxes, [[1, 2, 30, 20], [5, 6, 7, 8]])
        np.testing.assert_array_equal(second.boxes, [[0, 0, 30, 20]])


@pytest.mark.parametrize("form", ["windows", "bom", "final newline", "blank lines"])
def test_wsol_other_text_forms(tmp_path: Path, form: str) -> None:
    texts = {p.stem: p.read_text() for p in wsol(tmp_path / "a").iterdir()}
    change = {
        "windows": lambda t: t.replace("\n", "\r\n"),
        "bom": lambda t: "\ufeff" + t,
        "final newline": lambda t: t + "\n",
        "blank lines": lambda t: "\n" + t.replace("\n", "\n \n") + "\n\n",
    }[form]
    found = read_wsol(wsol(tmp_path / "b", **{name: change(text) for name, text in texts.items()}), "/photos")
    assert [(s.name, s.label, s.size, len(s.boxes)) for s in found.samples] == [
        ("a/1.jpg", 0, (60, 40), 2), ("b/2.jpg", 1, (30, 20), 1),
    ]  # fmt: skip


def test_wsol_odd_names(tmp_path: Path) -> None:
    names = ["ä b,c.jpg", "日本/\u2028x.jpg", "x..y.jpg"]
    found = read_wsol(
        wsol(
            tmp_path,
            image_ids="\n".join(names),
            class_labels="\n".join(f"{n},{i}" for i, n in enumerate(names)),
            image_sizes="",
            localization="\n".join(f"{n},0,0,{i + 1},1.5" for i, n in enumerate(names)),
        ),
        "/photos",
    )
    assert [s.name for s in found.samples] == names and found.classes == ("0", "1", "2")
    assert [s.boxes.tolist() for s in found.samples] == [[[0, 0, i + 1, 1.5]] for i in range(3)]


def test_wsol_without_boxes(tmp_path: Path) -> None:
    one = {"image_ids": "1.jpg", "class_labels": "1.jpg,4", "image_sizes": "", "localization": ""}
    found = read_wsol(wsol(tmp_path / "train", **one), "/photos")
    assert len(found) == 1 and found.samples[0].size is None and found.samples[0].boxes.shape == (0, 4)
    assert found.classes == tuple("01234")
    (tmp_path / "train" / "image_sizes.txt").unlink()
    (tmp_path / "train" / "localization.txt").unlink()
    assert len(read_wsol(tmp_path, "/photos", "train", classes=list("vwxyz")).samples) == 1
    (problem,) = faults(read_wsol, tmp_path / "train", "/photos", classes=list("vw"))
    assert (problem.line, problem.message, problem.expected) == (1, "label '4'", "0 to 1")


def test_wsol_masks(tmp_path: Path) -> None:
    lines = "b/2.jpg,m/2.png,m/2i.png\na/1.jpg,m/1a.png,m/1i.png\na/1.jpg,m/1b.png,"
    found = read_wsol(wsol(tmp_path, localization=lines, image_sizes=""), "/photos", masks="/masks")
    first, second = found.samples
    assert first.masks == (Path("/masks/m/1a.png"), Path("/masks/m/1b.png"))
    assert first.ignore == Path("/masks/m/1i.png") and second.masks == (Path("/masks/m/2.png"),)
    assert read_wsol(tmp_path, "/photos").samples[0].ignore == Path("/photos/m/1i.png")


def test_wsol_proxy(tmp_path: Path) -> None:
    wsol(tmp_path)
    (tmp_path / "image_ids_proxy.txt").write_text("b/2.jpg")
    assert [s.name for s in read_wsol(tmp_path, "/photos", proxy=True).samples] == ["b/2.jpg"]


@pytest.mark.parametrize(
    ("file", "text", "line", "message", "expected"),
    [
        ("image_ids", "a/1.jpg\n../2.jpg", 2, "the name '../2.jpg'", "stays below its folder"),
        ("image_ids", "a/1.jpg\nx/../../2.jpg", 2, "the name", "stays below its folder"),
        ("image_ids", "a/1.jpg\n/etc/passwd", 2, "the name '/etc/passwd'", "a relative name"),
        ("image_ids", "a/1.jpg\nC:/x.jpg", 2, "the name 'C:/x.jpg'", "a relative name"),
        ("image_ids", "a/1.jpg\nb\\2.jpg", 2, "the name", "/ between folders"),
        ("image_ids", "a/1.jpg\nb/2.jpg\na/1.jpg", 3, "listed twice, first on line 1", "it once"),
        ("image_ids", "a/1.jpg\nb/2\x00.jpg", 2, "control character", "one entry a line"),
        ("image_ids", "a/1.jpg\nb/2.jpg\nc/3.jpg", 3, "photo 'c/3.jpg' has no label", "a line in class_labels.txt"),
        ("image_ids", b"a/1.jpg\nb/\xff.jpg", 2, "0xff is not UTF-8", "text in UTF-8"),
        ("class_labels", "a/1.jpg,0\nb/2.jpg", 2, "'b/2.jpg'", "path,label"),
        ("class_labels", "a/1.jpg,0\nb/2.jpg,one", 2, "'b/2.jpg,one'", "path,label in whole numbers"),
        ("class_labels", "a/1.jpg,0\nb/2.jpg,1.5", 2, "'b/2.jpg,1.5'", "path,label in whole numbers"),
        ("class_labels", "a/1.jpg,0\nb/2.jpg,-1", 2, "label '-1'", "0 to 99,999"),
        ("class_labels", "a/1.jpg,0\nb/2.jpg,99999999999", 2, "label '99999999999'", "0 to 99,999"),
        ("class_labels", "a/1.jpg,0\nb/2.jpg,1\na/1.jpg,1", 3, "is not what line 1 says", "path,label"),
        ("image_sizes", "a/1.jpg,60,40\nb/2.jpg,30", 2, "'b/2.jpg,30'", "path,width,height"),
        ("image_sizes", "a/1.jpg,60,40\nb/2.jpg,30,0", 2, "size '30x0'", "path,width,height: whole numbers"),
        ("image_sizes", "a/1.jpg,60,40\nb/2.jpg,99999999,4", 2, "size '99999999x4'", "1 to 16,777,216"),
        ("image_sizes", "a/1.jpg,60,40\nb/2.jpg,nan,4", 2, "'b/2.jpg,nan,4'", "path,width,height in whole numbers"),
        ("localization", "a/1.jpg,1,2,3,4\nb/2.jpg,1,2,3", 2, "'b/2.jpg,1,2,3'", "path,x0,y0,x1,y1"),
        ("localization", "a/1.jpg,1,2,3,4\nb/2.jpg,1,2,3,x", 2, "'b/2.jpg,1,2,3,x'", "path,x0,y0,x1,y1"),
        ("localization", "a/1.jpg,1,2,3,4\nb/2.jpg,1,2,nan,4", 2, "is not finite, photo 'b/2.jpg'", "finite edges"),
        ("localization", "a/1.jpg,1,2,3,4\nb/2.jpg,1,2,inf,4", 2, "is not finite", "finite edges"),
        ("localization", "a/1.jpg,1,2,3,4\nb/2.jpg,9,2,3,4", 2, "box 9,2,3,4 is inverted", "x0 <= x1"),
        ("localization", "a/1.jpg,1,2,3,4\nb/2.jpg,1,2,1e30,4", 2, "out of all proportion", "16,777,216 pixels"),
        ("localization", "a/1.jpg,m.png,\nb/2.jpg,,", 2, "'b/2.jpg,,'", "path,mask.png,ignore.png"),
        ("localization", "a/1.jpg,m.png,\nb/2.jpg,../m.png,", 2, "the name '../m.png'", "stays below"),
        ("localization", "a/1.jpg,m.png,\nb/2.jpg,m.png,/i.png", 2, "the name '/i.png'", "a relative name"),
        (
            "localization",
            "a/1.jpg,m.png,\nb/2.jpg,m.png,\na/1.jpg,n.png,i.png",
            3,
            "an ignore mask, 'i.png', not on the first line of photo 'a/1.jpg'",
            "path,mask.png,ignore.png on its first line",
        ),
    ],
)  # fmt: skip
def test_wsol_problems(tmp_path: Path, file: str, text: str, line: int, message: str, expected: str) -> None:
    problems = faults(read_wsol, wsol(tmp_path, **{file: text}), "/photos")
    problem = next(p for p in problems if p.file == tmp_path / f"{file}.txt")
    assert problem.line == line and message in problem.message and expected in problem.expected
    assert str(problem).startswith(f"{tmp_path / file}.txt:{line}: ")


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    wsol(tmp_path, image_ids="a/1.jpg\nb/2.jpg\n../3", class_labels="a/1.jpg,-1\nb/2.jpg,1", localization="x")
    problems = faults(read_wsol, tmp_path, "/photos")
    assert [(p.file.stem, p.line) for p in problems] == [("image_ids", 3), ("localization", 1), ("class_labels", 1)]


def test_wsol_missing_files(tmp_path: Path) -> None:
    wsol(tmp_path / "val")
    (problem,) = faults(read_wsol, tmp_path, "/photos")
    assert problem.file == tmp_path / "image_ids.txt" and "the splits val" in problem.message
    (problem,) = faults(read_wsol, tmp_path, "/photos", "../val")
    assert "'../val'" in problem.message
    (tmp_path / "val" / "class_labels.txt").unlink()
    (problem,) = faults(read_wsol, tmp_path / "val", "/photos")
    assert problem.file.name == "class_labels.txt" and problem.message == "no such file"
    wsol(tmp_path / "none", image_ids="", class_labels="", image_sizes="", localization="")
    (problem,) = faults(read_wsol, tmp_path / "none", "/photos")
    assert "no photo" in problem.message


def test_read_set_recognises_class_folders(tmp_path: Path) -> None:
    photo(tmp_path / "train" / "cat" / "1.jpg")
    photo(tmp_path / "val" / "cat" / "1.jpg")
    (problem,) = faults(read_set, tmp_path)
    assert "train, val, look like splits" in problem.message and "split" in problem.expected
    assert read_set(tmp_path, split="val").classes == ("cat",)
    assert read_set(tmp_path, kind="folder").classes == ("train", "val")
    assert read_set(tmp_path / "val").kind == "folder"
    (tmp_path / "val" / "class_names.json").write_text("{}")
    assert read_set(tmp_path / "val").kind == "folder"


def test_read_set_says_what_it_looked_for(tmp_path: Path) -> None:
    (problem,) = faults(read_set, tmp_path)
    for word in ("image_ids.txt", "Annotations/", "data.yaml", ".json", "one folder of photos a class"):
        assert word in problem.expected
    (problem,) = faults(read_set, tmp_path / "no")
    assert problem.message == "no such file or folder"
    (problem,) = faults(read_set, photo(tmp_path / "1.jpg"))
    assert "no known layout" in problem.message
    coco(tmp_path / "annotations" / "instances_val.json")
    photo(tmp_path / "val" / "1.jpg")
    (problem,) = faults(read_set, tmp_path)
    assert "instances_val.json" in problem.expected


def test_read_set_arguments(tmp_path: Path) -> None:
    wsol(tmp_path)
    with pytest.raises(ValueError, match="photos: the wsol layout"):
        read_set(tmp_path)
    with pytest.raises(ValueError, match="kind must be one of auto, folder"):
        read_set(tmp_path, kind="imagenet")
    with pytest.raises(ValueError, match="split must be"):
        read_set(tmp_path, photos="/p", split="../x")
    with pytest.raises(ValueError, match="masks: the folder layout"):
        read_set(tmp_path, kind="folder", masks="/m")
    with pytest.raises(ValueError, match="split: the coco layout"):
        read_set(coco(tmp_path / "a.json"), split="val")


def test_read_set_hands_yolo_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.yaml").write_text("names: [cat]")
    sample = Sample("1.jpg", tmp_path / "1.jpg", 0, np.zeros((1, 4)))
    calls = []

    def read_yolo(path: Path, split: str | None = None) -> LocalizationSet:
        calls.append((path, split))
        if split == "bad":
            raise DataError([Problem(path, 1, "came", "form")])
        return LocalizationSet("mine", "yolo", (sample,), ("cat",))

    monkeypatch.setattr("molt.data.reading.read_yolo", read_yolo)
    assert read_set(tmp_path, split="val").samples == (sample,)
    assert read_set(tmp_path / "data.yaml").name == "mine"
    assert calls == [(tmp_path, "val"), (tmp_path / "data.yaml", None)]
    (problem,) = faults(read_set, tmp_path, split="bad")
    assert problem.message == "came"


def test_wsol_whole_numbers_with_a_point(tmp_path: Path) -> None:
    found = read_wsol(
        wsol(tmp_path, class_labels="a/1.jpg,0.0\nb/2.jpg,1.", image_sizes="a/1.jpg,60.0,40\nb/2.jpg, 30,20"), "/p"
    )
    assert [(s.label, s.size) for s in found.samples] == [(0, (60, 40)), (1, (30, 20))]


def test_classes_of_one_name_are_told_where_numbers_tell_them_apart(tmp_path: Path) -> None:
    found = read_wsol(wsol(tmp_path), "/photos", classes=["crane", "cat", "crane"])
    assert [sample.label for sample in found.samples] == [0, 1]
    (problem,) = found.remarks
    assert problem.message == "the classes 0 and 2 are both called 'crane'" and problem.expected == "names that differ"
