"""What systems, programs and molt itself leave among photos is no photo and no class; what cannot be read stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from molt import Localization
from molt.cli import main
from molt.clustering import CachedClusterer, Slic
from molt.data import DataError, find_photos, inspect_set, read_image_folder, read_set
from molt.data._folders import foreign
from molt.page import TITLE, is_page

SYSTEMS = [
    "__MACOSX", ".git", ".ipynb_checkpoints", "@eaDir", "lost+found", ".Trash-1000", "System Volume Information",
    "$RECYCLE.BIN", "#recycle", "__pycache__", ".AppleDouble",
]  # fmt: skip
OWN = ["molt-out", "molt-train", "molt-ablation", "molt-ablation-heads", "molt-evaluation", "molt-demo"]
Say = Callable[..., tuple[int, str, str]]


def photo(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return path


def result(source: Path) -> Localization:
    return Localization(
        boxes=torch.tensor([[1.0, 2, 30, 20]]),
        classes=torch.tensor([0]),
        names=["cat"],
        scores=torch.tensor([0.5]),
        size=(60, 40),
        heat=torch.rand(1, 8, 8),
        clusters=torch.zeros(8, 8, dtype=torch.int32),
        source=source,
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Photos of two classes, which is also the working folder."""
    for number in range(8):
        photo(tmp_path / "in" / ("cat", "dog")[number % 2] / f"{number}.jpg", number)
    monkeypatch.chdir(tmp_path / "in")
    return tmp_path / "in"


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


QUICK = ("--sizes", 28, "--epochs", 1, "--batch", 4, "--device", "cpu")


@pytest.mark.parametrize("name", SYSTEMS)
def test_folders_of_systems_are_no_classes(folder: Path, name: str) -> None:
    before = read_image_folder(folder)
    photo(folder / name / "cat" / "1.jpg")
    photo(folder / "cat" / name / "2.jpg")
    found = read_image_folder(folder)
    assert found.classes == ("cat", "dog") and len(found) == len(before) == 8
    assert found.left_out == {f"{foreign(name)} folders": 2}
    assert find_photos(folder) == ([sample.path for sample in found.samples], 2)
    assert read_set(folder).left_out == found.left_out
    assert len(find_photos(folder / name)[0]) == 1, "what is asked for by name is looked at"


def test_files_of_systems_are_no_photos(folder: Path) -> None:
    for name in ("._0.jpg", "Thumbs.db", "desktop.ini", ".DS_Store", ".hidden.png"):
        (folder / "cat" / name).write_bytes(b"\0\5")
    found = inspect_set(folder)
    assert found.problems == () and found.photos == 8
    assert found.left_out == {"hidden files": 3, "system files": 2}


def test_photos_below_images_of_yolo(tmp_path: Path) -> None:
    photo(tmp_path / "images" / "x.png")
    for name in ("._x.png", ".ipynb_checkpoints/x-checkpoint.png", "__MACOSX/x.png"):
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"\0\5")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "x.txt").write_text("0 0.5 0.5 1 1\n")
    (tmp_path / "data.yaml").write_text("names: [cat]\ntrain: images\n")
    assert [sample.name for sample in read_set(tmp_path).samples] == ["x.png"]
    assert inspect_set(tmp_path).problems == ()


@pytest.mark.parametrize("name", OWN)
def test_outputs_under_their_usual_names(folder: Path, name: str) -> None:
    photo(folder / name / "0-boxes.jpg")
    found = read_image_folder(folder)
    assert found.classes == ("cat", "dog") and found.left_out == {"molt's own folders": 1}


@pytest.mark.parametrize(
    "files",
    [
        ["molt.html"], ["run.json", "features/x/marks.bin"], ["deep/e1/last.safetensors"], ["ablation.json"],
        ["report.html", "comparison.json"], ["molt-coco.json"], ["deep/photos.jsonl"],
    ],
)  # fmt: skip
def test_outputs_under_any_name(folder: Path, files: list[str]) -> None:
    for name in files:
        (folder / "results" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "results" / name).write_text("x")
    found = read_image_folder(folder)
    assert found.classes == ("cat", "dog") and found.left_out == {"molt's own folders": 1}
    photo(folder / "results" / "1.jpg")
    assert read_image_folder(folder).classes == ("cat", "dog", "results"), "a folder with photos is a class"


def test_overlays_pages_and_label_maps_know_themselves(folder: Path) -> None:
    drawn = result(folder / "cat" / "0.jpg").plot()
    (folder / "mine").mkdir()
    drawn.save(folder / "mine" / "0-boxes.jpg", quality=90)
    drawn.save(folder / "cat" / "0-boxes-2.jpg")
    photo(folder / "cat" / "jewel-boxes.jpg")
    photo(folder / "cat" / "ab" / f"ab{'0' * 62}.png")
    CachedClusterer(Slic(), folder / "maps")(torch.rand(1, 3, 28, 28), (28, 28))
    (folder / "web").mkdir()
    (folder / "web" / "index.html").write_text(f"<!doctype html>\n<head>{TITLE}</head>")
    assert is_page(folder / "web" / "index.html")
    found = read_image_folder(folder)
    assert found.classes == ("cat", "dog") and len(found) == 10
    assert {"cat/jewel-boxes.jpg", f"cat/ab/ab{'0' * 62}.png"} <= {sample.name for sample in found.samples}
    assert found.left_out == {"molt's own files": 1, "molt's own folders": 3}
    (folder / "cat" / "molt-yolo").mkdir()
    (folder / "cat" / "molt-yolo" / "images").symlink_to(folder / "dog")
    assert read_image_folder(folder).remarks == found.remarks


def test_localize_then_train_twice(folder: Path, say: Say) -> None:
    for more in ((), ("--out", "results", "--cache", "maps"), ("--json", "--out", "bare", "--no-page")):
        code, _, err = say("localize", ".", "--weights", "weak", "--device", "cpu", *more)
        assert code == 0, err
    assert sorted(path.name for path in (folder / "results" / "cat").iterdir()) == [
        f"{i}-boxes.jpg" for i in (0, 2, 4, 6)
    ]
    assert err.count("left out, ") == 1 and "molt's own folders: 1" in err
    assert not list((folder / "bare").rglob("*boxes*boxes*")), "no overlay of an overlay"
    code, out, err = say("train", ".", *QUICK)
    assert code == 0, err
    assert err.count("left out, molt's own folders: 4") == 1 and "2 classes, 7 photos to learn from" in err
    code, out, err = say("train", ".", *QUICK, "--out", "runs/second")
    assert code == 0 and "molt's own folders: 5" in err
    code, out, err = say("train", ".", *QUICK, "--out", "runs/third", "--json")
    assert code == 0 and "molt's own folders: 6" in err and json.loads(out)["epochs"] == 1
    found = inspect_set(folder)
    assert (found.photos, found.classes, found.problems) == (8, 2, ())


def test_only_left_out_photos_are_none(folder: Path, say: Say) -> None:
    photo(folder / "empty" / ".ipynb_checkpoints" / "1-checkpoint.jpg")
    code, _, err = say("localize", folder / "empty", "--weights", "weak")
    assert code == 1 and "no photo in this folder" in err and "left out, hidden folders: 1" in err
    with pytest.raises(DataError, match="no known layout"):
        read_set(folder / "empty")
    code, _, err = say("train", folder, *QUICK)
    assert code == 2 and "no photo of the class 'empty'" in err


@pytest.mark.parametrize("recipe", ["default", "fine-tune"])
def test_a_class_none_of_whose_photos_can_be_read_stops(folder: Path, say: Say, recipe: str) -> None:
    for path in (folder / "dog").iterdir():
        path.write_bytes(b"no photo")
    code, _, err = say("train", folder, "--recipe", recipe, *QUICK, "--val-share", 0)
    assert code == 1 and f"none of 4 photos of class 'dog', in {folder / 'dog'}, can be read: " in err
    assert not (folder / "molt-train" / "best.safetensors").exists()
    photo(folder / "dog" / "1.jpg")
    assert say("train", folder, "--recipe", recipe, *QUICK, "--val-share", 0, "--out", "again")[0] == 0
