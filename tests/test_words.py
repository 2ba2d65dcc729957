"""English of messages: one is one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import molt
from molt._words import count
from molt.cli import main
from molt.cli.train import Display
from molt.data import read_set
from molt.evaluation import MaxBoxAcc
from molt.evaluation.runs import Settings, evaluate
from molt.training.setup import gather_photos

THINGS = "photos|classes|boxes|steps|epochs|problems|entries|images|maps|files|numbers|masks|rows|scales|views|batches"
MANY = re.compile(rf"(?<![\d.,])1 (?:more |other |of the )?(?:{THINGS})\b")


def test_counts() -> None:
    said = [count(n, thing) for n in (0, 1, 2) for thing in ("photo", "class", "box", "batch", "epoch")]
    assert said == [
        "0 photos", "0 classes", "0 boxes", "0 batches", "0 epochs",
        "1 photo", "1 class", "1 box", "1 batch", "1 epoch",
        "2 photos", "2 classes", "2 boxes", "2 batches", "2 epochs",
    ]  # fmt: skip
    assert count(1, "entry", "entries") == "1 entry" and count(1200, "entry", "entries") == "1200 entries"
    assert count(12_000, "photo is", "photos are") == "12000 photos are"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a set of one photo, one class and one box."""
    (tmp_path / "set" / "cat").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3)).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "set" / "cat" / "0.png")
    for folder, number in (("pets", 1), ("more", 2)):  # which share a photo
        for name in ("cat", "dog"):
            (tmp_path / folder / name).mkdir(parents=True)
        (tmp_path / folder / "cat" / "0.png").symlink_to(tmp_path / "set" / "cat" / "0.png")
        PIL.Image.fromarray(pixels // number).save(tmp_path / folder / "dog" / f"{number}.png")
    (tmp_path / "boxes").mkdir()
    rows = {"image_ids": "", "class_labels": ",0", "image_sizes": ",32,32", "localization": ",1,1,20,20"}
    for key, rest in rows.items():
        (tmp_path / "boxes" / f"{key}.txt").write_text(f"cat/0.png{rest}\n")
    (tmp_path / "classes.txt").write_text("cat\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SET = ("boxes", "--photos", "set", "--classes", "classes.txt")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("train", "pets", "--sizes", 28, "--epochs", 1, "--val-share", 0, "--device", "cpu"), "1 epoch of 1 step"),
        (("train", "pets", "--val", "more", "--device", "cpu"), "val: 1 photo is in data too"),
        (("train", "pets", "more", "--device", "cpu"), "data: 1 photo is in two of its sets"),
        (("evaluate", *SET, "--method", "centre", "--draws", 10), "MaxBoxAcc"),
        (("evaluate", *SET, "--method", "cam", "--draws", 10), "1 of the set's 1 class (1 photo) is not among"),
        (("evaluate", "set", "--method", "centre"), "none of 1 photo of"),
        (("data", "check", "set", "--num-classes", 1), "no problems"),
        (("data", "check", *SET, "--num-classes", 1), "no problems"),
        (("fit-clusters", "set", "--steps", 1, "--batch", 1, "--channels", 4), "1 step on 1 photo, loss"),
        (("ablate", *SET, "--groups", "scales", "--no-plots"), "not run"),
    ],
    ids=lambda value: " ".join(map(str, value))[:40] if isinstance(value, tuple) else "",
)
def test_commands_on_a_set_of_one(
    here: Path, command: tuple[Any, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(word) for word in command])
    told = " ".join("".join(capsys.readouterr()).split())
    assert said in told and not MANY.findall(told), (MANY.findall(told), told)


def test_what_training_says_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    values: dict[str, Any] = {
        "model": "m", "sizes": ((28, 28),), "recipe": "r", "frozen": True, "kept": True, "head": "patches",
        "classes": 1, "train": 1, "held": 1, "steps": 1, "epochs": 1, "device": "cpu", "resumed": False,
    }  # fmt: skip
    with Display(quiet=False) as display:
        display("begin", values)
    told = capsys.readouterr().err
    assert "1 class, 1 photo to learn from, 1 held out" in told and "1 epoch of 1 step\n" in told
    assert "only 1 photo is held out" in told and not MANY.findall(told)


def test_messages_about_one_thing(here: Path, photo: torch.Tensor) -> None:
    data = read_set("boxes", photos="set", classes=["cat"])
    one, two = torch.rand(1, 8, 8), torch.rand(2, 8, 8)
    calls: list[Any] = [
        lambda: molt.refine(two, photo[None]),
        lambda: molt.ops.fuse_maps([one[None]] * 2, (9, 9), [1.0]),
        lambda: MaxBoxAcc().update(two.numpy(), [[[0, 0, 1, 1]]]),
        lambda: evaluate(data, iter([two.numpy()[0]] * 2), Settings(size=8, thresholds=3, draws=2)),
        lambda: evaluate(data, lambda _: [], Settings(size=8, thresholds=3, draws=2)),
        lambda: evaluate(read_set("set"), iter([two.numpy()[0]])),
        lambda: gather_photos(read_set("pets"), read_set("more"), 0.0, 0),
        lambda: molt.create_model("molt_deit_tiny", 1, (32,), pretrained=False, class_names=["a", "b"]),
    ]
    for number, call in enumerate(calls):
        with pytest.raises((ValueError, TypeError)) as caught:
            call()
        assert "1" in str(caught.value) and not MANY.findall(str(caught.value)), (number, str(caught.value))
