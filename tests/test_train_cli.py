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
    assert out.startswith("3 epochs in") and "1 photos skipped" in out and "best by held-out loss: epoch" in out
    assert "skipped: " in err and "x.jpg" in err and "epoch 3: loss" in err and "features: 9 of 9" in err
    assert "2 classes, 8 photos to learn from, 1 held out" in err and "only 1 photos are held out" in err
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
        (("--recipe", "mine"), "recipe must be one of default"),
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
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    (folder / "green").rmdir()
    code, _, err = say(folder, "--out", tmp_path / "run", *QUICK)
    assert code == 1 and "none of the 7 photos can be read" in err
