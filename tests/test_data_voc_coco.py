"""VOC and COCO: what their readers return, and that each wrong entry is named with its form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from molt.data import DataError, Problem, read_coco, read_set, read_voc
from molt.data.voc import VOC_CLASSES


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


def faults(read: object, *arguments: object, **options: object) -> tuple[Problem, ...]:
    with pytest.raises(DataError) as raised:
        read(*arguments, **options)
    return raised.value.problems


def test_voc(tmp_path: Path) -> None:
    files = {
        "1": xml(thing("dog", 1, 1, 60, 40), thing("cat", 2, 3, 4.5, 5), thing("dog", 9, 9, 9, 9), name="1.jpg"),
        "2": xml(thing("cat", 1, 1, 2, 2, 1), name="2.jpg"),
        "3": "\ufeff<?xml version='1.0' encoding='utf-8'?>\n<annotation><!-- no size --></annotation>",
    }
    root = voc(tmp_path / "VOC2012", files, val="1\n2\n\n3\n", train="3")
    for found in (
        read_voc(root, "val"),
        read_voc(tmp_path, "val"),
        read_voc(tmp_path, "val", 2012),
        read_set(root),
        read_set(tmp_path, split="val"),
    ):
        assert found.classes == VOC_CLASSES and found.kind == "voc"
        assert [(s.name, found.classes[s.label], s.size) for s in found.samples] == [
            ("1.jpg", "cat", (60, 40)), ("1.jpg", "dog", (60, 40)),
        ]  # fmt: skip
        np.testing.assert_array_equal(found.samples[0].boxes, [[1, 2, 4.5, 5]])
        np.testing.assert_array_equal(found.samples[1].boxes, [[0, 0, 60, 40], [8, 8, 9, 9]])
        assert found.samples[0].path.name == "1.jpg" and found.samples[0].path.parent.name == "JPEGImages"
    assert len(read_voc(root, difficult=True)) == 3
    assert read_voc(root, classes=["dog", "cat"]).classes == ("dog", "cat")
    (problem,) = faults(read_voc, root, classes=["cat"])
    assert problem.message == "an object of class 'dog'" and problem.expected == "one of cat"
    assert read_voc(voc(tmp_path / "own", files)).classes == ("cat", "dog")


BAD_XML = [
    ("<!DOCTYPE a [<!ENTITY x 'y'>]><annotation>&x;</annotation>", 1, "document type or entity", "<!DOCTYPE"),
    ("\n\n<!doctype a><annotation/>", 3, "document type or entity", "<!ENTITY"),
    ("<annotation><object>", 1, "not XML", "PASCAL VOC"),
    ("", 1, "not XML", "PASCAL VOC"),
    ("<other/>", None, "the outermost element 'other'", "<annotation>"),
    ("<annotation>\né</annotation>".encode("latin-1"), 2, "the byte 0xe9 is not UTF-8", "UTF-8"),
    ("<?xml version='1.0' encoding='ascii'?><a>é</a>".encode(), 1, "the byte 0xc3 is not ASCII", "text in ASCII"),
    ("<?xml version='1.0' encoding='klingon'?><a/>", 1, "the encoding 'klingon' is unknown", "such as utf-8"),
    ("<?xml version='1.0' encoding='punycode'?><a/>", 1, "the encoding 'punycode' is unknown", "such as utf-8"),
    ("<?xml version='1.0' encoding='hex'?><a/>", 1, "the encoding 'hex' is unknown", "such as utf-8"),
    ("<?xml version='1.0' encoding='utf-7'?><annotation>+2AA-</annotation>", None, "not XML", "PASCAL VOC"),
    ("<?xml version='1.0'?>\n<!DOCTYPE a><annotation/>".encode("utf-16"), 2, "document type or entity", "<!DOCTYPE"),
    ("<?xml version='1.0' encoding='utf-7'?>+ADwAIQ-DOCTYPE a+AD4-<annotation/>", 1, "document type", "<!DOCTYPE"),
    (xml(size="<width>60</width><height>40.5</height>"), None, "size '60x40.5'", "<width> and <height>"),
    (xml(name="../../1.jpg"), None, "the <filename> '../../1.jpg'", "stays below"),
    (xml(name="/1.jpg"), None, "the <filename> '/1.jpg'", "a relative name"),
    (xml(size="<width>60</width>"), None, "size '60x'", "<width> and <height>"),
    (xml(size="<width>0</width><height>9</height>"), None, "size '0x9'", "1 to 16,777,216"),
    (xml(thing("", 1, 1, 2, 2)), None, "object 1 has no <name>", "the name of its class"),
    (xml(thing("cat", 1, 1, 2, "")), None, "object 1: box '1,1,2,'", "xmin, ymin, xmax, ymax"),
    (xml(thing("cat", 1, 1, "nan", 2)), None, "object 1: box 0,0,nan,2 is not finite", "finite edges"),
    (xml(thing("cat", 9, 1, 2, 2)), None, "object 1: box 8,0,2,2 is inverted", "x0 <= x1"),
    (xml(thing("cat", 1, 1, 2, 2, "perhaps")), None, "<difficult> 'perhaps'", "0 or 1"),
    (xml(thing("cat", 1, 1, 10**400, 2)), None, "is not finite", "finite edges"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "line", "message", "expected"), BAD_XML)
def test_voc_problems(tmp_path: Path, text: str, line: int | None, message: str, expected: str) -> None:
    root = voc(tmp_path, {"1": text, "2": xml(thing("cat", 1, 1, 2, 2), name="2.jpg")})
    (problem,) = faults(read_voc, root)
    assert problem.file == root / "Annotations" / "1.xml" and problem.line == line
    assert message in problem.message and expected in problem.expected


@pytest.mark.parametrize(
    ("encoding", "declared"),
    [
        ("gbk", "gbk"), ("gb18030", "GB18030"), ("shift_jis", "Shift_JIS"), ("euc-jp", "EUC-JP"), ("big5", "Big5"),
        ("utf-16", "utf-16"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "utf-16"), ("utf-32", "utf-32"),
        ("utf-8", "utf-16"), ("utf-8", "UTF-8"), ("utf-8-sig", "gbk"), ("utf-8", None),
    ],
)  # fmt: skip
def test_voc_encodings(tmp_path: Path, encoding: str, declared: str | None) -> None:
    head = "<?xml version='1.0'?>" if declared is None else f'<?xml version="1.0" encoding="{declared}" ?>\r\n'
    root = voc(tmp_path, {"1": (head + xml(thing("犬", 1, 1, 2, 2), name="山.jpg")).encode(encoding)})
    found = read_voc(root)
    assert found.classes == ("犬",) and [s.name for s in found.samples] == ["山.jpg"]


def test_voc_photos_have_the_name_of_their_xml_file(tmp_path: Path) -> None:
    names = {
        "1": "1",
        "a/2": "2.jpg",
        "3": "C:\\photos\\3.jpg",
        "4": "other.jpg",
        "5": "5.png",
        "6": "none",
        "7": "8.jpg",
        "8.png": "",
        "x": "9",
        "y": "10.png",
    }
    files = {key: xml(thing("cat", 1, 1, 2, 2), name=name) for key, name in names.items()}
    (tmp_path / "Annotations" / "a").mkdir(parents=True)
    root = voc(tmp_path, files)
    (root / "JPEGImages" / "a").mkdir()
    there = (
        "1.JPEG",
        "a/2.jpg",
        "3.Png",
        "4.webp",
        "5.jpg",
        "5.png",
        "7.jpg",
        "8.jpg",
        "8.png",
        "9.jpg",
        "10.JPG",
        "1.txt",
    )
    for name in there:
        (root / "JPEGImages" / name).touch()
    found = read_voc(root)
    names = ["1.JPEG", "3.Png", "4.webp", "5.png", "none", "7.jpg", "8.png", "a/2.jpg", "9.jpg", "10.JPG"]
    assert [s.name for s in found.samples] == names
    assert found.notes == ("photos of another name than <filename> has: 6", "photos without an XML file, left out: 2")
    (remark,) = found.remarks
    assert remark.file.name == "7.xml"
    assert remark.message == "<filename> is '8.jpg', but '7.jpg' is there too and is what was taken"


def test_voc_files_with_a_suffix_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "Annotations").mkdir()
    root = voc(tmp_path, {})
    (root / "Annotations" / "1.XML").write_text(xml(thing("cat", 1, 1, 2, 2, 1)))
    assert len(read_voc(root, difficult=True)) == 1
    (problem,) = faults(read_voc, root)
    assert "no photo with a label; difficult objects: 1; photos without an object to keep: 1" in problem.message


def test_voc_folders_named_as_a_year_may_have_other_classes(tmp_path: Path) -> None:
    files = {"1": xml(thing("zebra", 1, 1, 2, 2), name="1.jpg"), "2": xml(thing("cat", 1, 1, 2, 2), name="2.jpg")}
    root = voc(tmp_path / "VOC2007", files)
    found = read_voc(root)
    assert found.classes == ("cat", "zebra") and [s.label for s in found.samples] == [1, 0]
    (line,) = found.notes
    assert "classes other than VOC's 20, so they are those found, sorted: cat, zebra" in line and "--classes" in line
    assert read_voc(root, classes=["zebra", "cat"]).notes == ()
    (problem,) = faults(read_voc, root, classes=["zebra", "cat", "zebra"])
    assert problem.message == "the classes 0 and 2 are both called 'zebra'"


def test_voc_boxes_that_come_twice_are_kept_once_and_told(tmp_path: Path) -> None:
    objects = [thing("cat", 1, 1, 2, 2), thing("dog", 1, 1, 2, 2), thing("cat", "1.0", 1, 2, " 2 ", "0.0")]
    found = read_voc(voc(tmp_path, {"1": xml(*objects)}))
    assert [len(s.boxes) for s in found.samples] == [1, 1] and found.left_out == {"boxes that come twice": 1}
    assert [p.message for p in found.remarks] == ["object 3 has class and box of object 1"]


def test_voc_photos_without_an_object_count(tmp_path: Path) -> None:
    hard = [thing("cat", 1, 1, 2, 2), thing("cat", 1, 1, 9, 9, "true"), thing("cat", 1, 1, 5, 5, "1")]
    files = {"1": xml(*hard[1:], name="1.jpg"), "2": xml(name="2.jpg"), "3": xml(*hard, name="3.jpg")}
    found = read_voc(voc(tmp_path, files))
    assert [s.name for s in found.samples] == ["3.jpg"] and [s.name for s in found.unlabelled] == ["1.jpg", "2.jpg"]
    found = read_voc(tmp_path, difficult=True)
    assert [(s.name, s.difficult) for s in found.samples] == [("1.jpg", (0, 1)), ("3.jpg", (1, 2))]


def test_voc_lists(tmp_path: Path) -> None:
    text = xml(thing("cat", 1, 1, 2, 2))
    root = voc(tmp_path, {"1": text, "2": text}, val="1\n\n1\n../1\nno\n1 -1", cat_val="1 1", both="1\n2\n")
    problems = faults(read_voc, root, "val")
    assert [p.line for p in problems] == [3, 4, 5, 6] and {p.file.name for p in problems} == {"val.txt"}
    for problem, word in zip(problems, ("listed twice", "'../1'", "no annotation", "'1 -1'"), strict=True):
        assert word in problem.message
    (problem,) = faults(read_voc, root, "tset")
    assert "there are both, val" in problem.message and problem.file.name == "tset.txt"
    (problem,) = faults(read_voc, root, "both")
    assert problem.file.name == "2.xml" and "annotated twice, first in 1.xml" in problem.message
    (problem,) = faults(read_voc, tmp_path / "JPEGImages")
    assert problem.message == "no such folder"


def test_a_large_xml_file_is_not_read(tmp_path: Path) -> None:
    root = voc(tmp_path, {"1": xml() + " " * (4 << 20)})
    (problem,) = faults(read_voc, root)
    assert "bytes" in problem.message and problem.expected == "at most 4,194,304"


def test_coco(tmp_path: Path) -> None:
    file = coco(tmp_path / "instances.json")
    for found in (read_coco(file, "/photos"), read_set(file, photos="/photos"), read_set(tmp_path, photos="/photos")):
        assert found.classes == ("cup", "cat") and found.kind == "coco" and found.name == "instances"
        assert [(s.name, s.label, s.size) for s in found.samples] == [
            ("1.jpg", 0, (60, 40)), ("1.jpg", 1, (60, 40)), ("s/2.jpg", 1, None),
        ]  # fmt: skip
        assert [s.boxes.tolist() for s in found.samples] == [
            [[5, 5, 10, 10]], [[0.5, 0, 10.5, 10.25], [20, 0, 30, 10]], [[1, 2, 4, 6]],
        ]  # fmt: skip
        assert found.samples[2].path == Path("/photos/s/2.jpg")
    assert read_coco(file).samples[0].path == tmp_path / "1.jpg"


def test_coco_crowds(tmp_path: Path) -> None:
    crowd = {"id": 1, "image_id": 7, "category_id": 2, "bbox": [0, 0, 9, 9], "iscrowd": 1}
    file = coco(tmp_path / "a.json", annotations=[crowd, {**crowd, "id": 2, "image_id": 3, "iscrowd": 0}])
    assert [s.name for s in read_coco(file).samples] == ["s/2.jpg"]
    assert [(s.name, s.crowd) for s in read_coco(file, crowd=True).samples] == [("1.jpg", (0,)), ("s/2.jpg", ())]
    for flag, count in (("0", 2), ("1", 1), (0.0, 2), (None, 2), (False, 2), (True, 1), ("false", 2)):
        coco(
            tmp_path / "a.json", annotations=[crowd | {"iscrowd": flag}, crowd | {"id": 2, "image_id": 3, "iscrowd": 0}]
        )
        assert len(read_coco(file)) == count, flag


@pytest.mark.parametrize("form", [str, float, lambda value: f" {value}.0 "])
def test_coco_numbers_of_another_type(tmp_path: Path, form: Callable[[int], object]) -> None:
    content = json.loads(coco(tmp_path / "a.json").read_text())
    expected = read_coco(tmp_path / "a.json").samples
    for entry in [entry for entries in content.values() for entry in entries]:
        for key in {"id", "image_id", "category_id", "width", "height"} & set(entry):
            entry[key] = form(entry[key])
        if "bbox" in entry:
            entry |= {"bbox": [str(value) for value in entry["bbox"]], "iscrowd": form(0)}
    found = read_coco(coco(tmp_path / "b.json", **content)).samples
    assert len(found) == len(expected) == 3
    for one, other in zip(found, expected, strict=True):
        assert (one.name, one.label, one.size, one.crowd) == (other.name, other.label, other.size, ())
        np.testing.assert_array_equal(one.boxes, other.boxes)


def test_coco_ids_that_are_names(tmp_path: Path) -> None:
    lists = {"images": [{"id": name, "file_name": f"{name}.jpg"} for name in ("7", "007", "a7")]}
    notes = [{"id": i, "image_id": x, "category_id": 2, "bbox": [i, 0, 9, 9]} for i, x in enumerate((7, "007", "a7"))]
    found = read_coco(coco(tmp_path / "a.json", **lists, annotations=notes))
    assert [(s.name, s.boxes[0, 0]) for s in found.samples] == [("7.jpg", 0), ("007.jpg", 1), ("a7.jpg", 2)]


def test_coco_objects_without_a_bbox_have_the_box_of_their_segmentation(tmp_path: Path) -> None:
    from pycocotools import mask

    picture = np.zeros((40, 60), np.uint8, order="F")
    picture[5:9, 20:31] = 1
    packed = mask.encode(picture)
    forms = [
        {"segmentation": [[1, 2, 30.5, 2, 30, 20], [0.5, 8, 9, 9, 3, 21]]},
        {"segmentation": ["1", 2, 30, 2, 30, "20"], "bbox": None},
        {"segmentation": {"size": [40, 60], "counts": packed["counts"].decode()}, "bbox": []},
        {"segmentation": {"size": ["40", 60.0], "counts": [80, 40, 2280]}},
        {"segmentation": [[1, 2, 3, 4, 5, 6]], "bbox": [0, 0, 9, 9]},
    ]
    notes = [{"id": i, "image_id": 7, "category_id": 2} | form for i, form in enumerate(forms)]
    found = read_coco(coco(tmp_path / "a.json", annotations=notes))
    (sample,) = found.samples
    assert sample.boxes.tolist() == [[0.5, 2, 30.5, 21], [1, 2, 30, 20], [20, 5, 31, 9], [2, 0, 3, 40], [0, 0, 9, 9]]
    assert found.notes == ("objects without a bbox, of which the box round the segmentation is taken: 4",)


def test_coco_boxes_that_come_twice_are_kept_once_and_told(tmp_path: Path) -> None:
    one = {"id": 1, "image_id": 7, "category_id": 2, "bbox": [0, 0, 9, 9]}
    others = [{"id": 2}, {"id": 3, "category_id": 44}, {"id": 4, "image_id": 3}, {"id": 5, "bbox": ["0", 0.0, 9, 9]}]
    found = read_coco(coco(tmp_path / "a.json", annotations=[one, *(one | other for other in others)]))
    assert [len(s.boxes) for s in found.samples] == [1, 1, 1] and found.left_out == {"boxes that come twice": 2}
    assert [p.message for p in found.remarks] == [
        f"annotations[{i}] has photo, category and box of annotations[0]" for i in (1, 4)
    ]


def test_coco_photos_without_an_object_count(tmp_path: Path) -> None:
    lists = {"images": [{"id": 7, "file_name": "1.jpg"}, {"id": 3, "file_name": "s/2.jpg", "width": 9, "height": 8}]}
    found = read_coco(coco(tmp_path / "a.json", **lists, **annotation()), "/photos")
    assert [(s.name, s.path, s.label, s.size, len(s.boxes)) for s in found.unlabelled] == [
        ("s/2.jpg", Path("/photos/s/2.jpg"), -1, (9, 8), 0)
    ]


def test_coco_the_group_of_a_roboflow_export_is_no_second_class(tmp_path: Path) -> None:
    lists = [{"id": 0, "name": "cat", "supercategory": "none"}, {"id": 2, "name": "cat", "supercategory": "cat"}]
    assert read_coco(coco(tmp_path / "a.json", categories=lists, **annotation())).classes == ("cat",)
    lists[1]["supercategory"] = "none"
    assert len(faults(read_coco, coco(tmp_path / "a.json", categories=lists, **annotation()))) == 1
    lists = [{"id": 0, "name": "pets", "supercategory": "none"}, {"id": 2, "name": "cat", "supercategory": "pets"}]
    assert read_coco(coco(tmp_path / "a.json", categories=lists, **annotation())).classes == ("cat",)
    shown = {"annotations": [*annotation()["annotations"], annotation(category_id=0, id=2)["annotations"][0]]}
    assert read_coco(coco(tmp_path / "a.json", categories=lists, **shown)).classes == ("pets", "cat")


def test_sizes_that_nobody_looked_up_are_unknown(tmp_path: Path) -> None:
    for sides in ({"width": 0, "height": 0}, {"width": None, "height": None}):
        found = read_coco(coco(tmp_path / "a.json", images=[{"id": 7, "file_name": "1.jpg", **sides}], **annotation()))
        assert found.samples[0].size is None and len(found.remarks) == (sides["width"] == 0)
    (tmp_path / "Annotations").mkdir()
    text = xml(thing("cat", 1, 1, 2, 2), size="<width>0</width><height>0</height>")
    found = read_voc(voc(tmp_path, {"1": text}))
    assert found.samples[0].size is None and found.remarks[0].message == "size '0x0'"


def test_a_mask_of_another_size_than_its_photo_gives_no_box(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    images = [{"id": 7, "file_name": "1.jpg", "width": 60, "height": 40}]
    rle = {"size": [80, 80], "counts": [0, 10, 6390]}
    file = coco(tmp_path / "a.json", images=images, **annotation(bbox=[], segmentation=rle))
    (problem,) = faults(read_coco, file)
    assert "an RLE of size [80, 80]" in problem.message and "[40, 60]" in problem.expected


def annotation(**changes: object) -> dict[str, object]:
    return {"annotations": [{"id": 1, "image_id": 7, "category_id": 2, "bbox": [0, 0, 9, 9]} | changes]}


@pytest.mark.parametrize(
    ("lists", "message", "expected"),
    [
        ({"images": 1}, 'no list "images"', "images, annotations and categories"),
        ({"annotations": None}, 'no list "annotations"', "images, annotations and categories"),
        ({"images": [{"id": 7, "file_name": "../1.jpg"}]}, "images[0]: the file_name '../1.jpg'", "stays below"),
        ({"images": [{"id": 7, "file_name": "/1.jpg"}]}, "images[0]: the file_name '/1.jpg'", "a relative name"),
        ({"images": [{"id": True, "file_name": "1.jpg"}]}, "images[0] is", '"id" and "file_name"'),
        ({"images": [{"id": 7, "file_name": "1.jpg"}] * 2}, "images[1] has the id 7 of images[0]", "ids that differ"),
        (
            {"images": [{"id": 7, "file_name": "1.jpg"}, {"id": 8, "file_name": "1.jpg"}]},
            "images[1]: photo '1.jpg' listed twice, as in images[0]",
            "it once",
        ),
        ({"images": [{"id": 7, "file_name": "1.jpg", "width": 0}]}, "images[0]: size 0 x None", "1 to 16,777,216"),
        ({"images": [{"id": 7, "file_name": "1\x1b[2J.jpg"}]}, "file_name '1\\x1b[2J.jpg'", "a relative name"),
        ({"images": [{"id": 7, "file_name": "1.jpg\n"}]}, "images[0]: the file_name '1.jpg\\n'", "a relative name"),
        ({"categories": [{"id": 2}]}, "categories[0] is", '"id" and "name"'),
        ({"categories": [{"id": 2, "name": "a"}] * 2}, "categories[1] has the id 2", "ids that differ"),
        (annotation(image_id=99), "annotations[0]: image_id 99", "the id of one of the images, such as 7"),
        (annotation(category_id=[2]), "annotations[0]: category_id [2]", "the id of one of the categories, such as 44"),
        (annotation(bbox=[1, 2, 3]), "annotations[0]: bbox [1, 2, 3]", "[x, y, width, height]"),
        (annotation(bbox=[1, 2, 3, True]), "annotations[0]: bbox", "[x, y, width, height]"),
        (annotation(bbox=[1, 2, 3, float("nan")]), "annotations[0]: box 1,2,4,nan is not finite", "finite edges"),
        (annotation(bbox=[1, 2, -3, 4]), "annotations[0]: box 1,2,-2,6 is inverted", "x0 <= x1"),
        (annotation(bbox=[1, 2, 10**400, 4]), "annotations[0]: box 1,2,inf,6 is not finite", "finite edges"),
        (annotation(bbox=[1, 2, 1e12, 4]), "out of all proportion", "16,777,216"),
        ({"annotations": ["x"]}, "annotations[0] is 'x'", "an object"),
        (annotation(image_id="07"), "annotations[0]: image_id '07'", "the id of one of the images, such as 7"),
        (annotation(image_id=7.5), "annotations[0]: image_id 7.5", "such as 7"),
        (annotation(image_id=True), "annotations[0]: image_id True", "such as 7"),
        (annotation(iscrowd="perhaps"), "annotations[0]: iscrowd 'perhaps'", "0 or 1"),
        (annotation(iscrowd=2), "annotations[0]: iscrowd 2", "0 or 1"),
        (annotation(bbox=["1", "2", "3", "x"]), "annotations[0]: bbox ['1', '2', '3', 'x']", "four numbers"),
        (annotation(bbox="0,0,9,9"), "annotations[0]: bbox '0,0,9,9'", "four numbers"),
        (annotation(bbox=None), "annotations[0]: neither bbox nor segmentation", "polygons [x, y, x, y, ...]"),
        (annotation(bbox=[], segmentation=[[1, 2, 3, 4, 5]]), "the segmentation [[1, 2, 3, 4, 5]]", "polygons"),
        (annotation(bbox=[], segmentation=[[1, 2, 3, 4, 5, None]]), "the segmentation [[1, 2,", "polygons"),
        (annotation(bbox=[], segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "box 1,nan,5,nan is not finite", "finite"),
        (annotation(bbox=[], segmentation={"size": [4, 0], "counts": [0]}), "the RLE {'size': [4, 0]", "counts and"),
        (annotation(bbox=[], segmentation={"size": [4, 4, 1], "counts": [1, 2, 13]}), "the RLE {'size'", "counts"),
        (annotation(bbox=[], segmentation={"size": "4", "counts": [1, 2, 13]}), "the RLE {'size'", "counts"),
        (annotation(bbox=[], segmentation={"size": [4, 4], "counts": [16]}), "no bbox, and the RLE", "counts and"),
        (annotation(bbox=[], segmentation={"size": [4, 4], "counts": [0, 99]}), "no bbox, and the RLE", "counts and"),
        (annotation(bbox=[], segmentation={"size": [4, 4]}), "no bbox, and the RLE", "counts and"),
        ({"categories": [{"id": 2, "name": "a"}, {"id": "9", "name": "a"}]}, "2 and 9 are both called 'a'", "differ"),
    ],
)  # fmt: skip
def test_coco_problems(tmp_path: Path, lists: dict[str, object], message: str, expected: str) -> None:
    file = coco(tmp_path / "a.json", **lists)
    problem = faults(read_coco, file)[0]
    assert problem.file == file and problem.line is None
    assert message in problem.message and expected in problem.expected


@pytest.mark.parametrize(
    ("text", "line"), [('{"images": [],\n oops', 2), ("", 1), ("[" * 100_000, None), ("[" + "1" * 5000 + "]", None)]
)
def test_coco_file_that_is_none(tmp_path: Path, text: str, line: int | None) -> None:
    (tmp_path / "a.json").write_text(text)
    (problem,) = faults(read_coco, tmp_path / "a.json")
    assert problem.line == line and "not JSON" in problem.message
