"""`molt localize --annotations`: all boxes of a run as one set that reads back, or a refusal before networks run."""

from __future__ import annotations

import contextlib
import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch

from molt import Localization
from molt.cli.annotations import BoxSet
from molt.data import PhotoError, read_yolo, write_coco

NAMES = ("tabby", "crane", "crane", "goose, wild")
BOXES = {"one": [[1.0, 2, 30, 20], [0.5, 0, 60, 40]], "single": [[1.0, 2, 30, 20]], "none": [], "bad": None}


class FakeLocalizer:
    """Answers at once, by the photo's name: two boxes, or those in BOXES."""

    made = 0

    def __init__(self, *arguments: object, **options: object) -> None:
        FakeLocalizer.made += 1
        self.weights = ()
        self.profile = None
        self.method = SimpleNamespace(class_names=NAMES)

    def stream(self, sources: list[Path], classes: list[str] | None = None, *, explain: bool = False) -> object:
        label = -1 if classes == ["object"] else 2
        return ((source, self.answer(source, label)) for source in sources)

    def answer(self, source: Path, label: int) -> Localization | PhotoError:
        boxes = BOXES.get(source.stem, BOXES["one"])
        if boxes is None:
            return PhotoError(f"{source}: not a photo")
        return Localization(
            boxes=torch.tensor(boxes).reshape(-1, 4),
            classes=torch.tensor([label, 0][: len(boxes)], dtype=torch.int64),
            names=["?"] * len(boxes),
            scores=torch.tensor([0.5, 0.25][: len(boxes)]),
            size=(60, 40),
            heat=torch.rand(1, 4, 4),
            clusters=torch.zeros(4, 4, dtype=torch.int32),
            source=source,
        )


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import molt.localizer

    monkeypatch.setattr(molt.localizer, "Localizer", FakeLocalizer)
    monkeypatch.chdir(tmp_path)
    FakeLocalizer.made = 0


def call(*arguments: object) -> SimpleNamespace:
    """Run `molt localize --no-page` in this process."""
    from molt.cli import main

    out, err = io.StringIO(), io.StringIO()
    command = ["localize", "--no-page", *map(str, arguments)]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        main(command)
    return SimpleNamespace(code=stopped.value.code, out=out.getvalue(), err=err.getvalue())


def photo(*names: str) -> list[Path]:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(name)
    return [Path(name) for name in names]


def everything() -> list[str]:
    return sorted(path.as_posix() for path in Path().rglob("*") if not path.is_dir())


def test_coco_beside_the_overlays(tmp_path: Path) -> None:
    photo("photos/a/one.png", "photos/none.png", "photos/bad.png")
    result = call("photos", "--annotations", "coco")
    assert result.code == 1, "the bad photo"
    path = Path("molt-out/molt-coco.json")
    assert f"2 boxes of 2 photos in {path}; names start from {tmp_path / 'photos'}" in result.err
    record = json.loads(path.read_text())
    assert [image["file_name"] for image in record["images"]] == ["a/one.png", "none.png"]
    assert [(a["category_id"], a["bbox"], a["score"]) for a in record["annotations"]] == [
        (3, [1, 2, 29, 18], 0.5),
        (1, [0.5, 0, 59.5, 40], 0.25),
    ]
    names = [category["name"] for category in record["categories"]]
    assert names == ["tabby", "crane (1)", "crane (2)", "goose, wild"]


@pytest.mark.parametrize("kind", ["coco", "yolo", "voc"])
def test_json_lines_stay_alone_on_stdout(kind: str) -> None:
    photo("photos/one.png")
    result = call("photos", "--json", "--annotations", kind, "--annotations-to", "deep/set")
    assert result.code == 0 and len(result.out.splitlines()) == 1 and json.loads(result.out)["detections"]
    assert Path("deep/set").exists() and not Path("molt-out").exists()
    again = everything()
    assert call("photos", "--json", "--annotations", kind, "--annotations-to", "deep/set").code == 0
    assert everything() == again, "a second run takes the place of the first"


def test_yolo_reads_back_with_its_photos(tmp_path: Path) -> None:
    photo("photos/a/one.png", "photos/a/none.png", "photos/b/one.jpg")
    assert call("photos", "--annotations", "yolo", "--out", "out").code == 0
    found = read_yolo(Path("out/molt-yolo"))
    assert {(s.name, s.label) for s in found.samples} == {(n, c) for n in ("a/one.png", "b/one.jpg") for c in (0, 2)}
    assert found.classes == ("tabby", "crane (1)", "crane (2)", "goose, wild")
    assert found.samples[0].path.is_file() and Path("out/molt-yolo/images").readlink() == tmp_path / "photos"
    np.testing.assert_allclose(found.samples[0].boxes, [[1, 2, 30, 20]], atol=1e-6)
    assert Path("out/molt-yolo/labels/a/none.txt").read_text() == ""


@pytest.mark.parametrize("kind", ["coco", "yolo", "voc"])
def test_what_a_run_writes_passes_the_check(kind: str, tmp_path: Path) -> None:
    from molt.cli import main

    photo("photos/a/one.png", "photos/a/none.png", "photos/two.JPG")
    for _ in range(2):
        assert call("photos", "--annotations", kind).code == 0
    place = {"coco": "molt-coco.json", "yolo": "molt-yolo", "voc": "molt-voc"}[kind]
    out, options = io.StringIO(), ["--photos", "photos"] if kind == "coco" else []
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stopped:
        main(["data", "check", f"molt-out/{place}", *options, "--deep", "--json"])
    record = json.loads(out.getvalue())
    assert stopped.value.code == 0 and (record["photos"], record["boxes"], record["problems"]) == (3, 4, 0)


def test_voc_links_to_the_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo("photos/a/one.png", "photos/two.jpg", "set/JPEGImages/two.jpg")
    assert call("photos", "--annotations", "voc", "--annotations-to", "set").code == 0
    assert not Path("set/JPEGImages/two.jpg").is_symlink(), "what is there stays"
    assert Path("set/JPEGImages/a/one.png").readlink() == Path("../../../photos/a/one.png")

    def none(*_: object) -> None:
        raise OSError("A required privilege is not held by the client")

    monkeypatch.setattr(Path, "symlink_to", none)
    for kind in ("voc", "yolo"):
        result = call("photos", "--annotations", kind, "--annotations-to", f"{kind}-set")
        assert result.code == 0 and "2 photos could not be linked to; copy what is missing there from" in result.err


def test_voc_has_a_file_a_photo() -> None:
    photo("photos/a/one.png", "photos/none.png")
    assert call("photos", "--annotations", "voc", "--annotations-to", "set").code == 0
    assert Path("set/ImageSets/Main/train.txt").read_text() == "a/one\nnone\n"
    root = ET.parse("set/Annotations/a/one.xml").getroot()
    assert [item.findtext("name") for item in root.findall("object")] == ["crane (2)", "tabby"]
    assert not ET.parse("set/Annotations/none.xml").getroot().findall("object")


def test_class_agnostic_boxes_are_of_the_class_object() -> None:
    photo("more/single.png")
    call("more", "--annotations", "coco", "--class", "object")
    record = json.loads(Path("molt-out/molt-coco.json").read_text())
    assert [category["name"] for category in record["categories"]] == ["object"]
    assert record["annotations"][0]["category_id"] == 1
    call("more", "--annotations", "coco", "--class", "object", "--class", "tabby")
    record = json.loads(Path("molt-out/molt-coco.json").read_text())
    assert [category["name"] for category in record["categories"]][-2:] == ["goose, wild", "object"]


def test_names_start_where_all_inputs_do(tmp_path: Path) -> None:
    photo("x/one.png", "x/y/two.png", "z/three.png")
    for inputs, names in (
        (["x"], ["one.png", "y/two.png"]),
        (["x/one.png"], ["one.png"]),
        (["x", "z/three.png", "x/one.png"], ["x/one.png", "x/y/two.png", "z/three.png"]),
        (["x/y/../one.png", tmp_path / "x" / "one.png"], ["one.png"]),
    ):
        assert call(*inputs, "--annotations", "coco", "--annotations-to", "b.json").code == 0
        assert [image["file_name"] for image in json.loads(Path("b.json").read_text())["images"]] == names


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--annotations", "csv"], "--annotations must be one of coco, yolo, voc, got 'csv'"),
        (["--annotations-to", "x"], "--annotations-to x: in which format?"),
        (["--annotations", "coco", "--json"], "--annotations coco: where to?"),
        (["--annotations", "coco", "--annotations-to", "photos"], "is a folder, expected a file"),
        (["--annotations", "yolo", "--annotations-to", "photos/a/x.png"], "photos/a/x.png: is a file"),
        (["--annotations", "coco", "--annotations-to", "photos/a/x.png"], "is a photo given as input"),
        (["--annotations", "yolo"], "the photos 'a/x.jpg' and 'a/x.png' would share one annotation file"),
        (["--annotations", "voc"], "the photos 'a/x.jpg' and 'a/x.png' would share one annotation file ('a/x')"),
    ],
)
def test_what_cannot_be_written_is_told_before_networks_load(arguments: list[str], text: str) -> None:
    photo("photos/a/x.png", "photos/a/x.jpg")
    before = everything()
    result = call("photos", *arguments)
    assert result.code == 2 and text in result.err and len(result.err.splitlines()) == 1
    assert FakeLocalizer.made == 0 and everything() == before


def test_yolo_has_no_folder_called_images_in_names() -> None:
    photo("data/images/one.png")
    result = call("data", "--annotations", "yolo")
    assert result.code == 2 and "name must have no folder 'images', which YOLO replaces" in result.err
    assert FakeLocalizer.made == 0
    assert call("data/images", "--annotations", "yolo").code == 0


def test_a_folder_of_other_boxes_is_left_alone() -> None:
    photo("photos/one.png", "others/one.png")
    assert call("photos", "--annotations", "yolo").code == 0
    before = Path("molt-out/molt-yolo/labels/one.txt").stat().st_mtime_ns
    for inputs, text in ((["others"], "images must be what"), (["photos", "--class", "object"], "classes and place")):
        result = call(*inputs, "--annotations", "yolo")
        assert result.code == 2 and text in result.err
    assert Path("molt-out/molt-yolo/labels/one.txt").stat().st_mtime_ns == before


def test_a_set_that_cannot_be_written_is_one_line_and_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    photo("photos/one.png")
    Path("file").write_text("no folder")
    result = call("photos", "--annotations", "coco", "--annotations-to", "file/x.json", "--json")
    assert (result.code, result.out) == (1, ""), "told before a photo was looked at"
    assert result.err == "molt: --annotations-to file: the folder cannot be made (file is a file)\n"
    monkeypatch.setattr(BoxSet, "write", lambda _: write_coco(Path("file/x.json"), [], ("a",)))
    result = call("photos", "--annotations", "coco", "--annotations-to", "x.json", "--json")
    assert result.code == 1 and "the annotations were not written" in result.err and len(result.out.splitlines()) == 1


def test_where_every_photo_fails_the_old_set_stays() -> None:
    photo("photos/bad.png")
    Path("b.json").write_text("old")
    result = call("photos", "--annotations", "coco", "--annotations-to", "b.json", "--json")
    assert result.code == 1 and "not written, no photo was localized" in result.err
    assert Path("b.json").read_text() == "old"
