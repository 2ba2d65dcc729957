"""Layouts of published sets: those read, those refused by name, and that no folder becomes a class by chance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from molt.data import DataError, LocalizationSet, read_set
from molt.data.checking import inspect_set

XML = (
    """<annotation><filename>{name}</filename><size><width>60</width><height>40</height></size>{objects}</annotation>"""
)
OBJECT = """<object><name>{name}</name><bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>
</object>"""


def xml(name: str, label: str = "cat", box: tuple[int, int, int, int] = (11, 6, 30, 20)) -> str:
    return XML.format(name=name, objects=OBJECT.format(*box, name=label))


def coco(*names: str, **more: Any) -> str:
    images = [{"id": i, "file_name": name, "width": 60, "height": 40} for i, name in enumerate(names)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [10, 5, 20, 15], **more} for i in range(len(names))]
    return json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]})


def tree(root: Path, *photos: str, **texts: str) -> Path:
    """Write photos of 60x40 pixels, and text files by name."""
    for name in photos:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (60, 40), "teal").save(root / name, "PNG")
    return write(root, texts)


def write(root: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def found(data: LocalizationSet) -> list[tuple[str, str, list[list[float]]]]:
    assert all(sample.path.is_file() for sample in data.samples)
    return [(sample.name, data.classes[sample.label], sample.boxes.tolist()) for sample in data.samples]


def refused(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_set(path, **options)
    (problem,) = caught.value.problems
    return str(problem)


BOX = [[10.0, 5, 30, 20]]


def test_raw_cub(tmp_path: Path) -> None:
    root = tree(tmp_path / "CUB_200_2011", "images/001.Wren/a.jpg", "images/002.Gull/b c.jpg")
    write(
        root,
        {
            "images.txt": "1 001.Wren/a.jpg\n2 002.Gull/b c.jpg\n",
            "image_class_labels.txt": "1 1\n2 2\n",
            "train_test_split.txt": "1 1\n2 0\n",
            "bounding_boxes.txt": "1 10.0 5.0 20.0 15.0\n2 0.0 0.0 60.0 40.0\n",
            "classes.txt": "1 001.Wren\n2 002.Gull\n",
            "parts/parts.txt": "1 back\n",
        },
    )
    both = read_set(root)
    assert both.kind == "cub" and both.classes == ("001.Wren", "002.Gull")
    assert found(both) == [("001.Wren/a.jpg", "001.Wren", BOX), ("002.Gull/b c.jpg", "002.Gull", [[0, 0, 60, 40]])]
    assert [s.name for s in read_set(root, split="train").samples] == ["001.Wren/a.jpg"]
    assert [s.name for s in read_set(root, split="test").samples] == ["002.Gull/b c.jpg"]
    assert inspect_set(root).problems == ()
    assert "no split 'val'" in refused(root, split="val")
    (root / "image_class_labels.txt").write_text("1 3\n2 2\n")
    assert f"{root / 'image_class_labels.txt'}:1: the class '3' (expected 1 to 2)" in refused(root)
    (root / "image_class_labels.txt").write_text("1 1\n2 2\n")
    (root / "bounding_boxes.txt").write_text("1 10 5 20\n")
    assert ":1: '1 10 5 20' (expected id x y width height" in refused(root)


def test_ilsvrc_in_class_folders(tmp_path: Path) -> None:
    a, b = "n01440764/ILSVRC2012_val_00000293.JPEG", "n01443537/ILSVRC2012_val_00000236.JPEG"
    kept = [(a, "n01440764", BOX), (b, "n01443537", [[0, 0, 60, 40]])]
    texts = {
        "ILSVRC2012_val_00000293.xml": xml("ILSVRC2012_val_00000293", "n01440764"),
        "ILSVRC2012_val_00000236.xml": XML.format(
            name="ILSVRC2012_val_00000236",
            objects=2 * OBJECT.format(0, 0, 60, 40, name="n01443537") + OBJECT.format(1, 1, 2, 2, name="n99999999"),
        ),
    }
    plain = tree(tmp_path / "plain" / "val", a, b)
    assert found(read_set(plain)) == [(a, "n01440764", []), (b, "n01443537", [])]
    for root, photos, places in (
        ("beside", "", "Annotations/"),
        ("split", "val/", "Annotations/val/"),
        ("flat", "val/", "Annotations/"),
        ("kaggle", "Data/CLS-LOC/val/", "Annotations/CLS-LOC/val/"),
    ):
        top = tree(tmp_path / root, photos + a, photos + b)
        write(top, {places + name: text for name, text in texts.items()})
        data = read_set(top, split="val" if photos else None)
        assert data.kind == "folder" and data.classes == ("n01440764", "n01443537") and found(data) == kept
        assert data.samples[0].size == (60, 40) and data.left_out == {"boxes that come twice": 1}
        assert found(read_set(top / photos)) == kept


@pytest.mark.parametrize(
    ("annotations", "photos"),
    [
        ("annotations", "images"),
        ("Annotations", "images"),
        ("annotations", "JPEGImages"),
        ("annotations/xmls", "images"),
        ("Annotations", "JPEGImages"),
        ("annotations", "."),
        (".", "."),
    ],
)
def test_xml_of_voc_in_other_folders(tmp_path: Path, annotations: str, photos: str) -> None:
    root = tree(tmp_path / "set", f"{photos}/x.jpg")
    write(root, {f"{annotations}/x.xml": xml("x.jpg"), f"{annotations}/._x.xml": "\0\5", ".DS_Store": ""})
    data = read_set(root)
    assert data.kind == "voc" and found(data) == [("x.jpg", "cat", BOX)]
    assert data.left_out == {"hidden files": 1}
    assert inspect_set(root).problems == ()


def test_roboflow_has_a_folder_a_split(tmp_path: Path) -> None:
    for kind, texts in (
        ("voc", {"x.xml": xml("x.jpg")}),
        ("coco", {"_annotations.coco.json": coco("x.jpg")}),
        ("yolo", {}),
    ):
        root = tmp_path / kind
        for split in ("train", "valid", "test"):
            write(tree(root / split, "images/x.jpg" if kind == "yolo" else "x.jpg"), texts)
            write(
                root / split, {"labels/x.txt": f"0 {20 / 60} {12.5 / 40} {20 / 60} {15 / 40}"} if kind == "yolo" else {}
            )
        write(root, {"README.dataset.txt": "from somewhere"} | ({"classes.txt": "cat\n"} if kind == "yolo" else {}))
        for split in ("train", "valid", "val", "test"):
            data = read_set(root, split=split)
            (sample,) = data.samples
            assert data.kind == kind and sample.name.endswith("x.jpg")
            assert sample.boxes.round(6).tolist() == BOX and sample.path.is_file()
        assert "train" in refused(root) and "test" in refused(root)


@pytest.mark.parametrize("listed", ["classes.txt", "labels/classes.txt"])
@pytest.mark.parametrize("split", ["", "train/"])
def test_yolo_without_yaml(tmp_path: Path, listed: str, split: str) -> None:
    root = tree(tmp_path, f"images/{split}x.png")
    write(root, {f"labels/{split}x.txt": "1 0.5 0.5 1 1\n", listed: "dog\nK\u00e4se \n"})
    data = read_set(root)
    assert data.kind == "yolo" and data.classes == ("dog", "Käse")
    assert found(data) == [(f"{split}x.png", "Käse", [[0, 0, 60, 40]])]
    (root / listed).unlink()
    assert "its folders, images, labels, look like parts" in refused(root)


def test_yolo_beside_its_photos(tmp_path: Path) -> None:
    root = tree(tmp_path, "x.png", "y.png", **{"classes.txt": "dog"})
    write(root, {"x.txt": "0 0.5 0.5 1 1\n", "y.txt": "0 0.5 0.5 0.5 0.5\n"})
    assert found(read_set(root)) == [("x.png", "dog", [[0, 0, 60, 40]]), ("y.png", "dog", [[15, 10, 45, 30]])]


def test_a_list_of_classes_beside_class_folders_makes_no_yolo(tmp_path: Path) -> None:
    root = tree(tmp_path, "train/cat/1.jpg", "val/cat/1.jpg", **{"classes.txt": "cat\n"})
    assert read_set(root, split="train").kind == "folder"
    assert read_set(tree(tmp_path / "other", "cat/1.jpg", **{"classes.txt": "cat\n", "notes.txt": ""})).kind == "folder"


@pytest.mark.parametrize("place", ["../elsewhere", "elsewhere", "ABSOLUTE"])
def test_yolo_path_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    tree(tmp_path / "elsewhere", "images/train/x.png")
    write(tmp_path / "elsewhere", {"labels/train/x.txt": "0 0.5 0.5 1 1\n"})
    monkeypatch.chdir(tmp_path)
    base = str(tmp_path / "elsewhere") if place == "ABSOLUTE" else place
    write(tmp_path, {"configs/data.yaml": f"path: {base}\ntrain: images/train\nnames: [cat]\n"})
    assert found(read_set(tmp_path / "configs" / "data.yaml")) == [("train/x.png", "cat", [[0, 0, 60, 40]])]
    write(tmp_path, {"configs/data.yaml": f"path: {base}\ntrain: ../images/../../x\nnames: [cat]\n"})
    assert "a place below the folder" in refused(tmp_path / "configs")


@pytest.mark.parametrize(
    ("file", "photos"),
    [
        ("annotations.json", "images"),
        ("labels.json", "data"),
        ("_annotations.coco.json", "."),
        ("result.json", "JPEGImages"),
        ("annotations/instances_val2017.json", "val2017"),
        ("annotations/instances_val2017.json", "images/val2017"),
        ("annotations/instances.json", "images"),
    ],
)
def test_coco_finds_its_photos(tmp_path: Path, file: str, photos: str) -> None:
    root = tree(tmp_path, f"{photos}/x.jpg", **{"._hidden.json": "\0"})
    write(root, {file: coco("x.jpg"), f"{Path(file).parent}/._instances.json": "\0\5"})
    given = root if "/" not in file else root / file
    data = read_set(given)
    assert data.kind == "coco" and found(data) == [("x.jpg", "cat", BOX)]
    assert inspect_set(given).problems == ()


def test_splits_by_other_names(tmp_path: Path) -> None:
    for train, test in (
        ("training_set", "test_set"), ("Training", "Testing"), ("Train", "Test"), ("seg_train", "seg_test"),
        ("TRAIN_IMAGES", "val-images"), ("train2017", "validation"),
    ):  # fmt: skip
        root = tree(tmp_path / train, f"{train}/cat/1.jpg", f"{train}/dog/2.jpg", f"{test}/cat/3.jpg")
        assert f"its folders, {', '.join(sorted([train, test]))}, look like splits" in refused(root)
        other = "test" if "est" in test else "val"
        for name in ("train", train, "training"):
            assert found(read_set(root, split=name)) == [("cat/1.jpg", "cat", []), ("dog/2.jpg", "dog", [])]
        assert [s.name for s in read_set(root, split=other).samples] == ["cat/3.jpg"]
        assert [s.name for s in read_set(root, kind="folder", split=other).samples] == ["cat/3.jpg"]
        said = refused(root, split="extra")
        assert f"{root / 'extra'}: no such folder; there are the splits" in said and other in said
    nested = tree(tmp_path / "packed", "training_set/training_set/cat/1.jpg", "test_set/test_set/cat/2.jpg")
    assert found(read_set(nested, split="train")) == [("cat/1.jpg", "cat", [])]
    classes = tree(tmp_path / "classes", "train/1.jpg", "bus/2.jpg", "test tube/3.jpg")
    assert read_set(classes).classes == ("bus", "test tube", "train")


@pytest.mark.parametrize(
    "text",
    [
        "a/1.png,cat\nb/2.png,dog\n",
        "path,label\na/1.png,cat\nb/2.png,dog\n",
        "\ufeffImage;Class\r\na/1.png;cat\r\nb/2.png;dog\r\n",
        'id,label,filename\n7,"cat ",a/1.png\n8,dog,b/2.png\n',
        "photo,breed\na/1.png,cat\n\nb/2.png,dog\n",
        "cat\ta/1.png\ndog\tb/2.png\n",
        '"path","label"\n"a/1.png","cat"\n"b/2.png","dog"\n',
        "id,breed\na/1,cat\nb/2,dog\n",
        "image_id,label\na/1,cat\nb/2,dog\n",
    ],
)
@pytest.mark.parametrize("below", ["", "images/"])
def test_a_table_of_paths_and_labels(tmp_path: Path, text: str, below: str) -> None:
    root = tree(tmp_path / "set", f"{below}a/1.png", f"{below}b/2.png")
    write(root, {"labels.csv": text})
    for data in (read_set(root / "labels.csv"), read_set(root / "labels.csv", photos=root / below)):
        assert data.kind == "csv" and found(data) == [("a/1.png", "cat", []), ("b/2.png", "dog", [])]
    if below:
        assert found(read_set(root)) == [("a/1.png", "cat", []), ("b/2.png", "dog", [])]
    assert inspect_set(root / "labels.csv").problems == ()


def test_a_table_beside_a_folder_of_any_name(tmp_path: Path) -> None:
    root = tree(tmp_path / "set", "pics/1.png", "pics/2.png", **{"labels.csv": "path,label\npics/1.png,cat\n"})
    assert found(read_set(root)) == [("pics/1.png", "cat", [])]
    write(root, {"labels.csv": "id,cat,dog\n1,0,1\n2,1,0\n"})
    assert "its only folder, pics, holds photos, of which labels.csv may say the classes" in refused(root)
    assert read_set(root, kind="folder").classes == ("pics",)


def test_a_table_with_a_column_of_splits(tmp_path: Path) -> None:
    rows = "path,label,Split\na/1.png,cat,train\na/2.png,dog,Training\na/3.png,dog,valid\n"
    file = tree(tmp_path, "a/1.png", "a/2.png", "a/3.png", **{"labels.csv": rows}) / "labels.csv"
    assert "rows of the splits 'train, Training, valid' (expected split to be one of them)" in refused(file)
    assert [sample.name for sample in read_set(file, split="train").samples] == ["a/1.png"]
    assert found(read_set(file, split="val")) == [("a/3.png", "dog", [])]
    assert "no split 'test': the column has" in "".join(map(str, inspect_set(file, split="test").problems))
    write(tmp_path, {"labels.csv": "path,label,set\na/1.png,cat,x\na/2.png,dog,y\n"})
    assert len(read_set(file)) == 2, "no splits"
    write(tmp_path, {"labels.csv": "path,label\na/1.png,cat\n"})
    assert "there is no column split" in "".join(map(str, inspect_set(file, split="test").problems))


def test_a_table_that_is_none(tmp_path: Path) -> None:
    root = tree(tmp_path, "1.png", "2.png")
    file = root / "labels.csv"
    for text, said in (
        ("what,ever\n1,2\n", ":1: the columns 'what,ever'"),
        ("", ":1: no line"),
        ("1.png,cat\n2.png\n", ":2: '2.png' (expected path,label in each line)"),
        ("1.png,cat\n../2.png,dog\n", ":2: the name '../2.png'"),
        ("1.png,cat\n2.png,\n", ":2: '2.png,'"),
    ):
        file.write_text(text)
        assert said in refused(file)
    file.write_text("1.png,cat|dog\n2.png,dog\n")
    assert ":1: the label 'cat|dog' looks like several" in refused(file)
    file.write_text(f"{root / '1.png'},cat\n./2.png,dog\n2.png,dog\n")
    assert found(read_set(file)) == [("1.png", "cat", []), ("2.png", "dog", [])]
    file.write_text("1.png,10\n2.png,9\n")
    assert found(read_set(file)) == [("1.png", "10", []), ("2.png", "9", [])] and read_set(file).classes == ("9", "10")
    file.write_text("1.png,1\n2.png,0\n")
    assert found(read_set(file, classes=["cat", "dog"])) == [("1.png", "dog", []), ("2.png", "cat", [])]
    file.write_text("1.png,cat\n2.png,cow\n")
    assert ":2: the class 'cow' (expected one of cat, dog)" in refused(file, classes=["cat", "dog"])
    file.write_text("1.png,cat\n1.png,dog\n1.png,cat\nnone.png,dog\n")
    told = [str(problem) for problem in inspect_set(file).problems]
    assert any(":3: repeats line 1" in one for one in told) and any("'none.png': no such file" in one for one in told)
    assert len(told) == 2


LABELME = '{"shapes": [], "imagePath": "x.jpg", "imageData": null}'


@pytest.mark.parametrize(
    ("texts", "what", "tool"),
    [
        ({"obj.data": "classes = 1\nnames = data/obj.names\n", "obj_train_data/x.txt": ""}, "darknet", "datum convert"),
        ({"x.json": LABELME}, "labelme", "labelme2coco"),
        ({"images/x.json": LABELME, "images/y.json": LABELME}, "labelme", "labelme2coco"),
        ({"boxes.csv": "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax\n"}, "OpenImages", "FiftyOne"),
        ({"_classes.csv": "filename, cat, dog\nx.jpg, 1, 0\n"}, "Roboflow", "COCO"),
        ({"_annotations.csv": "filename,width,height,class,xmin,ymin,xmax,ymax\n"}, "a table with boxes", "COCO"),
        ({"via.json": '{"x.jpg1": {"regions": [], "file_attributes": {}}}'}, "VIA", "export as COCO"),
        ({"meta.json": '{"classes": []}', "ds/ann/x.jpg.json": "{}", "ds/img/none": ""}, "Supervisely", "COCO"),
        ({"x.tfrecord": "\0"}, "TFRecord", "tf_detection_api"),
        ({"annotations.xml": "<annotations><image id='0'/></annotations>"}, "CVAT", "-if cvat"),
        ({"panoptic.json": '{"images": [], "annotations": [{"segments_info": []}]}'}, "panoptic", "panopticapi"),
        ({"captions.json": '{"images": [], "annotations": [{"caption": "a cat"}]}'}, "captions", "instances_"),
        (
            {"_annotations.createml.json": '[{"image": "x.jpg", "annotations": [{"coordinates": {}}]}]'},
            "CreateML",
            "COCO",
        ),
        ({"export.json": '[{"Labeled Data": "x.jpg", "Label": {}}]'}, "Labelbox", "fiftyone"),
        ({"annotations/default.json": '{"dm_format_version": "1.0", "items": []}'}, "datumaro", "datum convert"),
        ({"vott.json": '{"asset": {}, "regions": [{"boundingBox": {}}]}'}, "VoTT", "Pascal VOC"),
        (
            {"studio.json": '[{"annotations": [{"result": [{"from_name": "a", "to_name": "b"}]}]}]'},
            "Label Studio",
            "COCO",
        ),
        ({"bdd.json": '[{"name": "x.jpg", "labels": [{"box2d": {}}]}]'}, "BDD100K", "to_coco"),
        ({"label_2/x.txt": "Car 0", "image_2/none": ""}, "KITTI", "kitti"),
        ({"_darknet.labels": "cat\n"}, "darknet (_darknet.labels)", "datum convert"),
        ({"annotations.csv": "x.jpg,1,1,5,5,cat\n"}, "a table with boxes", "COCO"),
        ({"via.csv": "filename,file_size,file_attributes,region_shape_attributes\n"}, "VIA", "export as COCO"),
    ],
)
def test_sets_of_other_tools_are_refused_by_name(tmp_path: Path, texts: dict[str, str], what: str, tool: str) -> None:
    photo = next(
        (f"{Path(name).parent}/x.jpg" for name in texts if name.startswith(("images", "obj_"))), "ds/img/x.jpg"
    )
    root = write(tree(tmp_path, photo), texts)
    said = refused(root)
    assert what in said and "which molt does not read" in said and tool in said
    file = root / next(iter(texts))
    if file.parent == root and file.name not in ("meta.json",) and "label_2" not in str(file):
        assert what in refused(file)


@pytest.mark.parametrize(
    "names",
    [
        ("images/x.jpg",),
        ("images/x.jpg", "masks/x.png"),
        ("img/x.jpg", "ann/y.png"),
        ("JPEGImages/x.jpg", "SegmentationClass/x.png"),
        ("Images/a/1.jpg", "Annotation/a/1.jpg"),
        ("photos/cat/1.jpg", "labels/x.png", "more/1.jpg"),
    ],
)
def test_parts_of_a_layout_are_no_classes(tmp_path: Path, names: tuple[str, ...]) -> None:
    root = tree(tmp_path, *names)
    said = refused(root)
    assert "look like parts of a layout" in said
    assert "kind (--kind) to be one of folder, wsol, voc, coco, yolo, cub, csv" in said
    assert len(read_set(root, kind="folder").classes) == len({name.split("/")[0] for name in names})


def test_a_folder_round_the_set_is_no_class(tmp_path: Path) -> None:
    root = tree(tmp_path / "archive", "cats_and_dogs/cat/1.jpg", "cats_and_dogs/dog/1.jpg", "__MACOSX/cat/._1.jpg")
    assert f"its only folder, cats_and_dogs, holds folders of photos (expected {root / 'cats_and_dogs'}" in refused(
        root
    )
    assert read_set(root / "cats_and_dogs").classes == ("cat", "dog")
    root = write(tree(tmp_path / "voc", "mine/x.jpg"), {"mine/x.xml": xml("x.jpg")})
    assert "its only folder, mine, holds a set" in refused(root) and read_set(root / "mine").kind == "voc"
    root = write(
        tree(tmp_path / "cub", "CUB_200_2011/images/1.a/x.jpg", "segmentations/1.a/x.png"),
        {"CUB_200_2011/images.txt": "1 1.a/x.jpg\n", "CUB_200_2011/image_class_labels.txt": "1 1\n"},
    )
    for split in (None, "test"):
        assert f"(expected {root / 'CUB_200_2011'}; or kind" in refused(root, split=split)
    root = write(
        tree(tmp_path / "labelme", "mine/x.jpg", "mine/y.jpg"), {"mine/x.json": LABELME, "mine/y.json": LABELME}
    )
    assert "JSON of labelme" in refused(root)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("COVID/images/1.png", "COVID/masks/1.png", "Normal/images/2.png", "Normal/masks/2.png"), "hold COVID/masks"),
        (("bottle/train/good/1.png", "bottle/ground_truth/bad/1.png", "nut/train/1.png"), "hold bottle/ground_truth"),
        (("cat/train/1.jpg", "cat/test/2.jpg", "dog/train/1.jpg", "dog/test/2.jpg"), "each of its folders"),
        (("benign/b (1).png", "benign/b (1)_mask.png", "benign/b (1)_mask_1.png", "ok/2.png"), "what looks like masks"),
        (("jpg/image_00001.jpg",), "look like parts of a layout"),
        (("101_ObjectCategories/ant/1.jpg", "Annotations/ant/x.mat.png"), "look like parts of a layout"),
        (("a/b/cat/1.jpg", "a/b/dog/1.jpg"), "its only folder, a, holds folders of photos"),
        (("val/images/val_0.JPEG",), "look like splits"),
        (("Train/cat/1.jpg", "Validate/cat/2.jpg"), "look like splits"),
        (("trainval/cat/1.jpg", "test/cat/2.jpg"), "look like splits"),
        (("cars_train/1.jpg", "cars_test/2.jpg", "devkit/x.jpg"), "look like splits"),
        (("clipart/cat/1.jpg", "clipart/dog/1.jpg", "real/cat/1.jpg", "real/dog/1.jpg"), "holds the folders cat, dog"),
        (("trainA/1.jpg", "trainB/1.jpg", "testA/2.jpg", "testB/2.jpg"), "do not look like classes"),
        (("TrainData/1.jpg", "EvaluationData/1.jpg"), "do not look like classes"),
        (("query/1.jpg", "gallery/1.jpg", "bounding_box_train/2.jpg"), "do not look like classes"),
        (("imagesTr/1.jpg", "labelsTr/1.jpg"), "do not look like classes"),
        (("HR/1.jpg", "LR/1.jpg"), "do not look like classes"),
        (("one/train/1.jpg", "one/test/2.jpg", "two/train/1.jpg"), "each of its folders holds splits"),
        (("a/images/cat/1.jpg", "a/images/dog/1.jpg", "b/images/cat/1.jpg", "b/images/dog/1.jpg"), "folders cat, dog"),
    ],
)  # fmt: skip
def test_folders_that_are_hardly_classes_are_asked_for(tmp_path: Path, names: tuple[str, ...], said: str) -> None:
    text = refused(tree(tmp_path, *names))
    assert said in text and "kind (--kind) to be one of folder" in text
    assert len(read_set(tmp_path, kind="folder")) == len(names)


def test_classes_that_are_called_like_a_part(tmp_path: Path) -> None:
    assert read_set(tree(tmp_path / "a", "boxes/1.jpg", "bottles/1.jpg")).classes == ("bottles", "boxes")
    root = tree(
        tmp_path / "b", "train/cat/1.jpg", "test/cat/2.jpg", **{"labels.csv": "path,label\ntrain/cat/1.jpg,cat\n"}
    )
    assert read_set(root, split="train").kind == "folder"
    root = tree(tmp_path / "c", "cat/1.jpg", "dog/2.jpg", **{"boxes.csv": "path,label,xmin,ymin,xmax,ymax\n"})
    assert "a table with boxes" in refused(root) and "or kind (--kind) folder" in refused(root)
    root = tree(tmp_path / "e", "cat_images/1.jpg", "dog_images/2.jpg", "raw/3.jpg")
    assert read_set(root).classes == ("cat_images", "dog_images", "raw")
    root = write(tree(tmp_path / "d", "cat/1.jpg", "dog/2.jpg"), {"cat/annotations/1.txt": "x"})
    assert read_set(root).classes == ("cat", "dog")


def test_one_file_of_its_kind_is_taken(tmp_path: Path) -> None:
    cvat = write(
        tree(tmp_path / "cvat", "images/default/x.jpg"), {"annotations/instances_default.json": coco("default/x.jpg")}
    )
    assert found(read_set(cvat)) == [("default/x.jpg", "cat", BOX)]
    yolo = tree(tmp_path / "yolo", "images/x.png", **{"labels/x.txt": "0 0.5 0.5 1 1\n", "other.yaml": "a: 1\n"})
    write(yolo, {"coco128.yaml": "path: .\ntrain: images\nnames: [cat]\n"})
    assert found(read_set(yolo)) == [("x.png", "cat", [[0, 0, 60, 40]])]
    write(yolo, {"more.yaml": "path: .\ntrain: images\nnames: [cat]\n"})
    assert "look like parts of a layout" in refused(yolo)
    whole = tree(tmp_path / "whole", "train2017/x.jpg", "val2017/x.jpg")
    captions = '{"images": [], "annotations": [{"caption": "a cat"}]}'
    write(whole, {"annotations/captions_val2017.json": captions, "annotations/instances_val2017.json": coco("x.jpg")})
    text = refused(whole)
    assert "holds 2 JSON files in annotations/, one a split" in text and "such as" in text and "instances_val" in text
    write(whole, {"annotations/instances_train2017.json": coco("x.jpg")})
    for split in ("val", "val2017"):
        for kind in ("auto", "coco"):
            (sample,) = read_set(whole, split=split, kind=kind).samples
            assert sample.path == whole / "val2017/x.jpg"
    both = write(tree(tmp_path / "both", "images/x.jpg"), {"train.json": coco("x.jpg"), "val.json": coco("x.jpg")})
    assert "holds 2 JSON files of COCO, train.json, val.json" in refused(both)
