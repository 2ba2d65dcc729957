"""The check of a data set: each kind of problem is found where it is, and a good set has none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from molt.data import DataError, Problem, check_set, inspect_set, read_set
from molt.data._wsol_objects import OFFICIAL


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


def xml(*objects: str, name: str = "1.jpg", size: str = "<width>60</width><height>40</height>") -> str:
    return f"<annotation><filename>{name}</filename><size>{size}</size>{''.join(objects)}</annotation>"


def thing(name: str, x0: object, y0: object, x1: object, y1: object, difficult: object = 0) -> str:
    part = "<part><name>head</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></part>"
    box = f"<bndbox><xmax>{x1}</xmax><xmin>{x0}</xmin><ymin>{y0}</ymin><ymax>{y1}</ymax></bndbox>"
    return f"<object>{part}<name>{name}</name><difficult>{difficult}</difficult>{box}</object>"


def voc(root: Path, files: dict[str, str], **splits: str) -> Path:
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (root / "JPEGImages").mkdir(exist_ok=True)
    for name, text in files.items():
        (root / "Annotations" / f"{name}.xml").write_bytes(text.encode() if isinstance(text, str) else text)
    for name, text in splits.items():
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text(text)
    return root


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


def annotation(**changes: object) -> dict[str, object]:
    return {"annotations": [{"id": 1, "image_id": 7, "category_id": 2, "bbox": [0, 0, 9, 9]} | changes]}


def good(root: Path, **files: str) -> Path:
    """Write a wsol set with its two photos in root/photos."""
    photo(root / "photos" / "a" / "1.jpg", (60, 40))
    photo(root / "photos" / "b" / "2.jpg", (30, 20))
    return wsol(root / "meta", **files)


def check(root: Path, **options: object) -> list[Problem]:
    return check_set(root / "meta", photos=root / "photos", **options)


def only(problems: list[Problem], file: Path, line: int | None, message: str, expected: str) -> None:
    (problem,) = problems
    assert (problem.file, problem.line) == (file, line)
    assert message in problem.message and expected in problem.expected


@pytest.mark.parametrize("deep", [False, True])
def test_a_good_set(tmp_path: Path, deep: bool) -> None:
    good(tmp_path)
    steps: list[tuple[int, int]] = []
    found = inspect_set(
        tmp_path / "meta", photos=tmp_path / "photos", deep=deep, on_progress=lambda *step: steps.append(step)
    )
    assert found.problems == () and found.kind == "wsol" and steps == [(1, 2), (2, 2)]
    assert (found.photos, found.samples, found.classes, found.boxes, found.masks) == (2, 2, 2, 3, 0)
    assert found.smallest == ("a", 1) and found.empty_classes == 0 and not found.left_out


def test_labels(tmp_path: Path) -> None:
    good(tmp_path, class_labels="a/1.jpg,1\nb/2.jpg,5")
    file = tmp_path / "meta" / "class_labels.txt"
    only(check(tmp_path), file, None, "no photo has label 0, 2-4 (4 of 6)", "each number from 0 to 5")
    problems = check(tmp_path, num_classes=5)
    only(problems[1:], file, 2, "photo 'b/2.jpg' has label 5", "0 to 4, of 5 classes")
    assert len(check(tmp_path, num_classes=6)) == 1
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        check(tmp_path, num_classes=0)


@pytest.mark.parametrize(
    ("box", "message", "expected"),
    [
        ("5,6,5,20", "box 5,6,5,20 has no area", "x0 < x1"),
        ("5,6,9,6", "box 5,6,9,6 has no area", "y0 < y1"),
        ("-1,6,9,7", "box -1,6,9,7 reaches out of its photo of 30x20", "0 <= x <= width"),
        ("1,6,31,7", "reaches out of its photo of 30x20", "0 <= x <= width"),
        ("1,6,9,20.6", "reaches out of its photo of 30x20", "0 <= y <= height"),
        ("1,6,9999999,7", "reaches out of its photo of 30x20", "0 <= x <= width"),
        ("9,6,1,7", "is inverted", "x0 <= x1"),
    ],
)
@pytest.mark.parametrize("sizes", ["a/1.jpg,60,40\nb/2.jpg,30,20", ""])
def test_boxes(tmp_path: Path, box: str, message: str, expected: str, sizes: str) -> None:
    good(tmp_path, localization=f"b/2.jpg,{box}\na/1.jpg,0,0,60.4,40\nb/2.jpg,0,0,30,20.5", image_sizes=sizes)
    only(check(tmp_path), tmp_path / "meta" / "localization.txt", 1, message, expected)


def test_sizes(tmp_path: Path) -> None:
    good(tmp_path, image_sizes="b/2.jpg,20,30\na/1.jpg,61,40", localization="")
    file = tmp_path / "meta" / "image_sizes.txt"
    one, two = check(tmp_path)
    only([one], file, 2, "photo 'a/1.jpg' is annotated as 61x40", "60x40, its width and height")
    only([two], file, 1, "is annotated as 20x30, its sides swapped", "30x20")


def test_exif_orientation(tmp_path: Path) -> None:
    good(tmp_path)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (60, 40)).save(tmp_path / "photos" / "a" / "1.jpg", exif=exif)
    file = tmp_path / "meta" / "image_sizes.txt"
    only(check(tmp_path), file, 1, "60x40, that before its EXIF orientation turns it", "40x60")
    good_sizes = {"image_sizes": "a/1.jpg,40,60\nb/2.jpg,30,20"}
    wsol(tmp_path / "meta", **good_sizes)
    assert check(tmp_path) == []


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize(
    ("orientation", "size", "sizes", "count"),
    [
        (1, (60, 60), "60,60", 0),
        (3, (60, 40), "60,40", 1),
        (2, (60, 40), "60,40", 1),
        (6, (60, 60), "60,60", 1),
        (6, (40, 60), "60,40", 0),
        (8, (40, 60), None, 1),
    ],
)
def test_orientations_that_sizes_do_not_tell_are_counted(
    tmp_path: Path, form: str, orientation: int, size: tuple[int, int], sizes: str | None, count: int
) -> None:
    good(tmp_path, image_sizes="" if sizes is None else f"a/1.jpg,{sizes}\nb/2.jpg,30,20")
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    PIL.Image.new("RGB", size).save(tmp_path / "photos" / "a" / "1.jpg", form, exif=exif)
    options = {"photos": tmp_path / "photos"}
    found = inspect_set(tmp_path / "meta", **options)
    assert found.problems == () and len(found.notes) == count
    assert all("heed it: 1; they are taken to be on the photo as it is seen" in line for line in found.notes)
    wsol(tmp_path / "meta", localization="", image_sizes="")
    assert inspect_set(tmp_path / "meta", **options).notes == (), "there are no boxes"


@pytest.mark.parametrize(("orientation", "count"), [(3, 1), (6, 0), (1, 0)])
def test_orientations_of_masked_photos(tmp_path: Path, orientation: int, count: int) -> None:
    masked(tmp_path, "a/1.jpg,m.png,\nb/2.jpg,m2.png,", m=mask((60, 40)), m2=mask((30, 20)))
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    size = (40, 60) if orientation == 6 else (60, 40)
    PIL.Image.new("RGB", size).save(tmp_path / "photos" / "a" / "1.jpg", exif=exif)
    found = inspect_set(tmp_path / "meta", photos=tmp_path / "photos", masks=tmp_path)
    assert found.problems == () and len(found.notes) == count


def test_orientations_of_yolo(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for name in "ab":
        PIL.Image.new("RGB", (60, 40)).save(tmp_path / "images" / f"{name}.jpg", exif=exif)
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 1 1\n0 0.5 0.5 1 1")
    (tmp_path / "data.yaml").write_text("nc: 1\nnames: {'0': cat}\n")
    found = inspect_set(tmp_path)
    only(list(found.problems), tmp_path / "labels" / "a.txt", 2, "repeats line 1, '0 0.5 0.5 1 1'", "each box once")
    assert (found.photos, found.samples, found.boxes) == (2, 1, 1) and "heed it: 1;" in found.notes[1]
    assert found.notes[0] == "photos without a label file, taken as showing none of the classes: 1"
    assert found.left_out == {"photos without an object to keep": 1, "boxes that come twice": 1}


def test_photos(tmp_path: Path) -> None:
    good(tmp_path)
    first, second = tmp_path / "photos" / "a" / "1.jpg", tmp_path / "photos" / "b" / "2.jpg"
    whole = first.read_bytes()
    ids = tmp_path / "meta" / "image_ids.txt"
    first.unlink()
    only(check(tmp_path), ids, 1, "photo 'a/1.jpg': no such file", f"a photo at {first}")
    first.symlink_to(second)
    assert "is annotated as 60x40" in check(tmp_path)[0].message
    first.unlink()
    first.symlink_to(tmp_path / "nowhere")
    only(check(tmp_path), ids, 1, "no such file", "a photo at")
    first.unlink()
    for bad, message in ((b"", "the file is empty"), (b"GIF89a?", "not a photo"), (b"text", "not a photo")):
        first.write_bytes(bad)
        only(check(tmp_path), first, None, message, "a photo that Pillow can read")
    first.unlink()
    first.mkdir()
    only(check(tmp_path), first, None, "is a folder", "a photo that Pillow can read")
    first.rmdir()
    os.mkfifo(first)
    only(check(tmp_path), first, None, "is not a regular file", "a photo that Pillow can read")
    first.unlink()
    first.write_bytes(whole[: len(whole) // 2 + 300])
    assert check(tmp_path) == []
    only(check(tmp_path, deep=True), first, None, "cannot be decoded", "a photo that Pillow can read")


def test_photo_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good(tmp_path)
    monkeypatch.setenv("MOLT_MAX_PIXELS", "1000")
    only(check(tmp_path), tmp_path / "photos" / "a" / "1.jpg", None, "limit of 1,000", "a photo that Pillow can read")


def test_a_missing_photo_folder_is_one_problem(tmp_path: Path) -> None:
    good(tmp_path)
    problems = check_set(tmp_path / "meta", photos=tmp_path / "no")
    only(problems, tmp_path / "no", None, "no such folder", "the folder of the photos")


def test_photos_without_boxes(tmp_path: Path) -> None:
    good(tmp_path, localization="a/1.jpg,1,2,3,4")
    only(check(tmp_path), tmp_path / "meta" / "image_ids.txt", 2, "'b/2.jpg' has no box and no mask", "at least one")
    wsol(tmp_path / "meta", localization="")
    assert check(tmp_path) == []


def test_repeated_lines(tmp_path: Path) -> None:
    good(
        tmp_path,
        class_labels="a/1.jpg,0\nb/2.jpg,1\na/1.jpg,0",
        localization="a/1.jpg,1,2,3,4\nb/2.jpg,1,2,3,4\nb/2.jpg,1,2.0,3,4",
    )
    one, two = check(tmp_path)
    only([one], tmp_path / "meta" / "class_labels.txt", 3, "repeats line 1, 'a/1.jpg,0'", "one line a photo")
    only([two], tmp_path / "meta" / "localization.txt", 3, "repeats line 2", "each box or mask once")
    assert len(read_set(tmp_path / "meta", photos=tmp_path / "photos").samples[1].boxes) == 2


def test_lines_of_unlisted_photos(tmp_path: Path) -> None:
    good(tmp_path, localization="a/1.jpg,1,2,3,4\nx.jpg,1,2,3,4\nb/2.jpg,1,2,3,4\ny.jpg,0,0,1,1")
    message = "2 lines are of photos that image_ids.txt does not list, so not used; here 'x.jpg'"
    only(check(tmp_path), tmp_path / "meta" / "localization.txt", 2, message, "photos that image_ids.txt lists")


def test_the_parsers_problems_are_the_checks(tmp_path: Path) -> None:
    good(tmp_path, image_ids="a/1.jpg\nb/2.jpg\n../3.jpg\na/1.jpg", class_labels="a/1.jpg,0\nb/2.jpg,-1")
    problems = check(tmp_path)
    assert [(p.file.stem, p.line) for p in problems] == [("image_ids", 3), ("image_ids", 4), ("class_labels", 2)]
    with pytest.raises(DataError) as raised:
        read_set(tmp_path / "meta", photos=tmp_path / "photos")
    assert list(raised.value.problems) == problems


def masked(root: Path, lines: str, **masks: PIL.Image.Image) -> Path:
    good(root, localization=lines, image_sizes="")
    for name, picture in masks.items():
        picture.save(root / f"{name}.png")
    return root / "meta" / "localization.txt"


def mask(size: tuple[int, int], value: int = 255) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.full(size[::-1], value, np.uint8))


def test_masks(tmp_path: Path) -> None:
    lines = "a/1.jpg,m1.png,i1.png\nb/2.jpg,m2.png,\na/1.jpg,m3.png,"
    file = masked(tmp_path, lines, m1=mask((60, 40)), i1=mask((60, 40), 0), m2=mask((30, 20)), m3=mask((60, 40)))
    options = {"masks": tmp_path}
    assert check(tmp_path, **options) == [] == check(tmp_path, **options, deep=True)
    found = inspect_set(tmp_path / "meta", photos=tmp_path / "photos", masks=tmp_path)
    assert (found.masks, found.boxes, found.notes) == (3, 0, ())

    mask((90, 60)).save(tmp_path / "m3.png")
    mask((46, 31)).save(tmp_path / "m2.png")
    found = inspect_set(tmp_path / "meta", photos=tmp_path / "photos", masks=tmp_path)
    assert found.problems == () and found.notes == ("2 masks have the proportions but not the size of their photo",)
    mask((40, 60)).save(tmp_path / "m3.png")
    only(check(tmp_path, **options), file, 3, "mask 'm3.png' has size 40x60, photo 'a/1.jpg' 60x40", "proportions")
    mask((60, 40), 0).save(tmp_path / "m3.png")
    assert check(tmp_path, **options) == []
    only(check(tmp_path, **options, deep=True), file, 3, "'m3.png' of photo 'a/1.jpg': has no pixel", "a mask")
    (tmp_path / "m3.png").write_bytes(b"text")
    only(check(tmp_path, **options), file, 3, "not a photo that Pillow can read", "the picture of a mask")
    (tmp_path / "m3.png").unlink()
    only(check(tmp_path, **options), file, 3, "mask 'm3.png' of photo 'a/1.jpg': no such file", "a mask at")
    mask((60, 40)).save(tmp_path / "m3.png")
    (tmp_path / "i1.png").unlink()
    only(check(tmp_path, **options), file, 1, "mask 'i1.png' of photo 'a/1.jpg': no such file", "a mask at")


def test_an_ignore_mask_on_a_later_line(tmp_path: Path) -> None:
    file = masked(tmp_path, "a/1.jpg,m.png,\nb/2.jpg,n.png,\na/1.jpg,m.png,i.png", m=mask((60, 40)), n=mask((30, 20)))
    only(check(tmp_path, masks=tmp_path), file, 3, "an ignore mask, 'i.png', not on the first line", "path,mask.png")


def test_official_counts(tmp_path: Path) -> None:
    photo(tmp_path / "photos" / "a" / "1.jpg", (60, 40))
    photo(tmp_path / "photos" / "b" / "2.jpg", (30, 20))
    folder = wsol(tmp_path / "CUB" / "test")
    one, two = check_set(folder, photos=tmp_path / "photos")
    only([one], folder / "image_ids.txt", None, "has 2 of the official 5,794 lines", "all 5,794 lines of CUB")
    only([two], folder / "localization.txt", None, "has 3 of the official 5,794 lines", "all 5,794 lines of CUB")
    for name in ("Cubes", "CUB/mine", "Mine/test"):
        assert check_set(wsol(tmp_path / name), photos=tmp_path / "photos") == []
    assert OFFICIAL["ilsvrc", "test"].photos == 50_000 and OFFICIAL["openimages", "val"].objects == 3_854


def test_lines_that_the_official_file_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from molt.data import _wsol_objects

    good(tmp_path)
    folder = wsol(tmp_path / "CUB_mine" / "val", localization="a/1.jpg,1,2,3,4\nb/2.jpg,1,2,3,4\na/1.jpg,1,2,3,4")
    monkeypatch.setitem(OFFICIAL, ("cub", "val"), _wsol_objects.Official(2, 3, repeated=1))
    found = inspect_set(folder, photos=tmp_path / "photos")
    assert found.problems == () and found.notes == ("repeated lines in localization.txt: 1, as in the official file",)
    monkeypatch.setitem(OFFICIAL, ("cub", "val"), _wsol_objects.Official(2, 3, repeated=0))
    only(check_set(folder, photos=tmp_path / "photos"), folder / "localization.txt", 3, "repeats line 1", "once")


def test_class_folders(tmp_path: Path) -> None:
    photo(tmp_path / "set" / "cat" / "1.jpg")
    photo(tmp_path / "set" / "stray.png")
    photo(tmp_path / "elsewhere" / "2.jpg")
    (tmp_path / "set" / "dog").mkdir()
    (tmp_path / "set" / "cat" / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("readme.txt", "cat/notes.txt", ".hidden/x.jpg"):
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_text("x")
    found = inspect_set(tmp_path / "set")
    problems = {p.file.name: p for p in found.problems}
    assert set(problems) == {"stray.png", "dog", "link"}
    assert "outside the class folders" in problems["stray.png"].message
    assert problems["dog"].message == "no photo in this class folder" and problems["dog"].expected == "at least one"
    assert "not followed" in problems["link"].message
    assert found.left_out == {"other files": 2, "hidden folders": 1} and found.empty_classes == 1
    assert found.smallest == ("dog", 0) and found.photos == 1


def test_voc(tmp_path: Path) -> None:
    files = {
        "1": xml(thing("cat", 1, 1, 60, 40), thing("dog", 0, 1, 2, 2), thing("dog", 1, 1, 2, 2, 1)),
        "2": xml(thing("cat", 1, 1, 2, 2, 1), name="2.jpg"),
    }
    root = voc(tmp_path, files, val="1\n2")
    photo(root / "JPEGImages" / "1.jpg")
    found = inspect_set(root, split="val")
    expected = "edges 0 <= x <= width"
    only(list(found.problems), root / "Annotations" / "1.xml", None, "object 2: box -1,0,2,2 reaches out", expected)
    assert found.left_out == {"difficult objects": 2, "photos without an object to keep": 1}
    assert (found.photos, found.samples, found.boxes) == (2, 2, 2)
    photo(root / "JPEGImages" / "1.jpg", (40, 60))
    assert "its sides swapped" in check_set(root, split="val")[0].message
    (root / "JPEGImages" / "1.jpg").unlink()
    only(check_set(root, split="val")[:1], root / "ImageSets" / "Main" / "val.txt", 1, "no such file", "a photo at")


def test_coco(tmp_path: Path) -> None:
    file = coco(tmp_path / "a.json", **annotation(bbox=[0, 0, 61, 9]))
    photo(tmp_path / "1.jpg")
    found = inspect_set(file)
    only(list(found.problems), file, None, "annotations[0]: box 0,0,61,9 reaches out", "edges")
    assert found.left_out == {"photos without an object to keep": 1} and found.empty_classes == 1
    box = {"image_id": 7, "category_id": 2, "bbox": [0, 0, 60.3, 9]}
    coco(file, annotations=[{**box, "id": 1}, {**box, "id": 1}, {**box, "id": 2, "iscrowd": 1}])
    found = inspect_set(file)
    only(list(found.problems), file, None, "annotations[1] has the id of annotations[0], 1", "ids that differ")
    assert found.left_out["crowd annotations"] == 1
    coco(file, **annotation(bbox=[1, 1, 0, 5]))
    only(check_set(file), file, None, "box 1,1,1,6 has no area", "x0 < x1")


def test_what_is_not_recognised_is_a_problem(tmp_path: Path) -> None:
    found = inspect_set(tmp_path)
    assert found.kind is None and found.photos == 0
    only(list(found.problems), tmp_path, None, "no known layout", "image_ids.txt")
    with pytest.raises(ValueError, match="photos: the wsol layout"):
        check_set(wsol(tmp_path))


def test_an_empty_set_is_a_problem(tmp_path: Path) -> None:
    only(check_set(tmp_path, kind="folder"), tmp_path, None, "no photo with a label", "at least one")
