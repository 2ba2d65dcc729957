"""`molt train`: what it prints, writes, refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import molt
from molt.cli import main
from molt.cli.train import Display
from molt.training import RECIPES

COLOURS = {"blue": (20, 30, 220), "red": (220, 30, 20)}
GO_ON = ("--epochs", "3", "--batch", "4", "--device", "cpu")
QUICK = ("--sizes", "28,42", *GO_ON)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(8):
        name = ("blue", "red")[number % 2]
        pixels = rng.integers(90, 160, (40, 44, 3))
        pixels[8:30, 10:34] = COLOURS[name]
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command and return its exit code and what it wrote to stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["train", *map(str, arguments)])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


def test_trains_says_so_and_resumes(folder: Path, tmp_path: Path, say: Callable[..., tuple[int, str, str]]) -> None:
    (folder / "red" / "x.jpg").write_text("no photo")
    code, out, err = say(folder, "--out", tmp_path / "run", *QUICK)
    assert code == 0, err
    assert out.splitlines()[-1] == str(tmp_path / "run" / "best.safetensors")
    assert out.startswith("3 epochs in") and "1 photo skipped" in out and "best by held-out loss: epoch" in out
    assert "skipped: " in err and "x.jpg" in err and "epoch 3: loss" in err and "features: 9 of 9" in err
    assert "2 classes, 8 photos to learn from, 1 held out" in err and "only 1 photo is held out" in err
    assert f"next: molt localize PHOTOS --checkpoint {tmp_path}" in out
    model = molt.load_model(tmp_path / "run" / "best.safetensors")
    assert model.config.sizes == ((28, 28), (42, 42)) and model.class_names == ("blue", "red")
    code, _, err = say(folder, "--out", tmp_path / "run", *QUICK)
    assert code == 1 and "holds a run: resume it (resume=True, --resume)" in err
    code, out, _ = say(folder, "--out", tmp_path / "run", *QUICK, "--resume", "--json")
    found = json.loads(out)
    assert code == 0 and found["epochs"] == 3 and found["skipped"][0][0] == "red/x.jpg"
    code, _, err = say(folder, "--out", tmp_path / "run", *QUICK, "--resume", "--lr", "0.01")
    assert code == 1 and "other lr: 0.001, now 0.01" in err


def test_goes_on_with_a_trained_model(folder: Path, tmp_path: Path, say: Callable[..., tuple[int, str, str]]) -> None:
    assert say(folder, "--out", tmp_path / "run", *QUICK, "--val-share", 0)[0] == 0
    best = tmp_path / "run" / "best.safetensors"
    shutil.copytree(folder, tmp_path / "more photos")
    code, _, err = say(folder, "--out", tmp_path / "more", *QUICK, "--init", best)
    assert code == 2 and "--sizes: --init" in err
    code, out, err = say(
        folder, "--out", tmp_path / "more", *GO_ON, "--init", best, "--val", tmp_path / "more photos", "--no-cache"
    )
    assert code == 0, err
    assert "held-out loss" in out and not (tmp_path / "more" / "features").exists()
    (folder / "red").rename(folder / "green")
    code, _, err = say(folder, "--out", tmp_path / "other", *GO_ON, "--init", best)
    assert code == 2 and "model's class 1 is 'red', that of the photos 'green'" in err
    (folder / "yellow").mkdir()
    (folder / "yellow" / "a.png").write_bytes((folder / "green" / "1.png").read_bytes())
    code, _, err = say(folder, "--out", tmp_path / "other", *GO_ON, "--init", best)
    assert code == 2 and "model has 2 classes (blue, red), the photos have 3 (blue, green, yellow)" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--recipe", "mine"), "expected default, fine-tune, ts-cam, ts-cam-ilsvrc, sat or the path of a JSON file"),
        (("--clip-grad", "0"), "clip_grad must be finite and above 0"),
        (("--val-split", "val"), "--val-split val goes with --val"),
        (("--init", "some.safetensors", "--show-recipe"), "--show-recipe and --init exclude each other"),
        (("--sizes", "big"), "--sizes big: expected whole numbers parted by commas"),
        (("--sizes", "30"), "sizes must be multiples of the patch size 14x14"),
        (("--lr", "0"), "lr must be finite and above 0"),
        (("--head", "mlp"), "head must be one of patches"),
        (("--augment", "swirl"), "augmentation must be one of none, flip"),
        (("--precision", "int8"), "precision must be one of"),
        (("--val-share", "1"), "val_share must be in"),
        (("--cache", "x", "--no-cache"), "exclude each other"),
        (("--model", "resnet50"), "model 'resnet50' is unknown"),
        (("--device", "tpu"), "device must be"),
        (("--kind", "voc"), "Annotations"),
        (("--val", "nowhere"), "no such file"),
        (("--init", "nowhere.safetensors"), "nowhere.safetensors does not exist"),
    ],
)
def test_wrong_options(
    folder: Path,
    tmp_path: Path,
    say: Callable[..., tuple[int, str, str]],
    options: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = say(folder, "--out", tmp_path / "run", *options)
    assert (code, out) == (1 if "does not exist" in said else 2, ""), err
    assert said in " ".join(err.split())
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_learnt(folder: Path, tmp_path: Path, say: Callable[..., tuple[int, str, str]]) -> None:
    (folder / "green").mkdir()
    code, _, err = say(folder, "--out", tmp_path / "run")
    assert code == 2 and "no photo of the class 'green'" in err
    assert say(tmp_path / "nothing", "--out", tmp_path / "run")[0] == 2
    code, _, err = say("--out", tmp_path / "run")
    assert code == 2 and "DATA is missing" in err
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    (folder / "green").rmdir()
    code, _, err = say(folder, "--out", tmp_path / "run", *QUICK)
    assert code == 1 and "none of 7 photos can be read" in err


def test_errors_of_later_processes_are_said(
    folder: Path, tmp_path: Path, say: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    code, out, err = say(tmp_path / "nothing", "--out", tmp_path / "run")
    lines = err.splitlines()
    assert (code, out) == (2, "") and "no such file" in err
    assert all(line.startswith("molt: process 1: ") for line in lines) and "1 problem with the data" in lines[-1]
    code, _, err = say(folder, "--out", tmp_path / "run", "--lr", "0")
    assert (code, err) == (2, "molt: process 1: lr must be finite and above 0, got 0.0\n")
    (tmp_path / "file").write_text("")
    code, _, err = say(folder, "--out", tmp_path / "run", *QUICK, "--no-such-option")
    assert code == 2 and err.startswith("molt: process 1: No such option")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    code, _, err = say(folder, "--out", tmp_path / "run", *QUICK, "--resume")
    assert code == 1 and err.startswith("molt: process 1: ") and "its state is lost" in err
    assert say(folder, "--out", tmp_path / "other", *QUICK) == (0, "", "")
    monkeypatch.setenv("RANK", "0")
    assert say(tmp_path / "nothing", "--out", tmp_path / "run")[2].startswith(f"molt: {tmp_path}")


def test_recipes_of_files(folder: Path, tmp_path: Path, say: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = say("--recipe", "fine-tune", "--clip-grad", 0.5, "--sizes", "28,42", "--show-recipe")
    assert (code, err) == (0, "")
    values = json.loads(out)
    wanted = RECIPES["fine-tune"].change(clip_grad=0.5, sizes=((28, 28), (42, 42)))
    assert values == json.loads(json.dumps(wanted.to_json()))
    file = tmp_path / "own.json"
    file.write_text(json.dumps(values | {"name": "mine", "label_smoothing": 0.1}))
    code, out, _ = say("--recipe", file, "--show-recipe", "--freeze", "--epochs", 3, "--augment", "none")
    changed = {"label_smoothing": 0.1, "freeze": True, "backbone_lr": None, "epochs": 3, "augment": "none"}
    assert json.loads(out) == values | changed | {"name": "mine"}
    file.write_text(json.dumps({"label_smoothing": 0.1, "sizes": [[28, 28]]}))
    code, _, err = say(folder, "--out", tmp_path / "run", "--recipe", file, *GO_ON)
    assert code == 0 and "at 28 px, recipe own: " in err
    about = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]
    assert (about["label_smoothing"], about["epochs"], about["lr"]) == (0.1, 3, 1e-3)
    assert json.loads(say("--recipe", tmp_path / "run" / "run.json", "--show-recipe")[1]) == about


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"lr: 0.1", "expected a recipe as JSON"),
        (b"\xff\xfe", "expected a recipe as JSON"),
        (b"[" * 100_000, "expected a recipe as JSON"),
        (b"[1]", "a recipe must be an object, got [1]"),
        (b'{"recipe": 5}', "a recipe must be an object, got 5"),
        (b'{"speed": 1}', "a recipe has no speed"),
        (b'{"a\\u001bb": 1}', r"a recipe has no 'a\x1bb'"),
        (b'{"lr": "fast"}', "lr must be a number, got 'fast'"),
        (b'{"lr": NaN}', "lr must be finite and above 0"),
        (b'{"lr": 1' + b"0" * 400 + b"}", "a value is too large for a recipe"),
        (b'{"name": "a\\nb"}', "name must be printable text"),
        (b'{"sizes": 224}', "sizes must be a tuple of (H, W) pairs, got 224"),
        (b'{"sizes": [224]}', "sizes must be a tuple of (H, W) pairs, got 224 in it"),
        (b'{"sizes": [[224, 0]]}', "sizes must be at least 1, got 0"),
        (b'{"head": "' + b"x" * 5000 + b'"}', "head must be one of"),
        (b'{"name": "' + b"x" * 2**24 + b'"}', "a recipe has at most 16,777,216 bytes"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_files_that_are_no_recipes(
    tmp_path: Path, say: Callable[..., tuple[int, str, str]], content: bytes, said: str
) -> None:
    file = tmp_path / "r.json"
    file.write_bytes(content)
    code, out, err = say(tmp_path, "--recipe", file, "--show-recipe")
    assert (code, out) == (2, "")
    assert err.startswith(f"molt: {file}: ") and said in err and err.count("\n") == 1 and len(err) < 400


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "trains its heads alone, on features that are kept; on cpu"),
        ({"kept": False}, "trains its heads alone, on features that are computed anew in each epoch; on cpu"),
        ({"kept": False, "head": "spatial"}, "trains its heads and spatial token alone, on features that are computed"),
        ({"kept": False, "frozen": False}, "trains all of it; on cpu"),
        ({}, "90 photos to learn from, 30 held out to pick the best epoch; 10 epochs"),
        ({"held": 0}, "90 photos to learn from, none held out: the last epoch will be the best; 10 epochs"),
    ],
)
def test_what_is_said_at_the_beginning(
    changes: dict[str, object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {
        "model": "m", "sizes": ((28, 28),), "recipe": "r", "frozen": True, "kept": True, "head": "patches",
        "classes": 2, "train": 90, "held": 30, "steps": 9, "epochs": 10, "device": "cpu", "resumed": False,
    }  # fmt: skip
    with Display(quiet=False) as display:
        display("begin", values | changes)
    assert said in capsys.readouterr().err


def test_val_has_a_split_of_its_own(folder: Path, tmp_path: Path, say: Callable[..., tuple[int, str, str]]) -> None:
    parts = tmp_path / "parts"
    shutil.copytree(folder, parts / "train")
    shutil.copytree(folder, parts / "val")
    (parts / "val" / "red" / "1.png").unlink()
    split = (parts, "--split", "train", "--val", parts)
    code, _, err = say(*split, "--val-split", "val", "--out", tmp_path / "run", *QUICK)
    assert code == 0 and "8 photos to learn from, 7 held out" in err
    code, _, err = say(*split, "--out", tmp_path / "other", *QUICK)
    assert code == 2 and "look like splits" in err
