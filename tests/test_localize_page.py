"""`molt localize` with a trained model, and the page of every stage beside the overlays."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from typer.testing import CliRunner

import molt
from molt.cli import app

pytestmark = pytest.mark.usefixtures("own_folder")

NAMES = ["cat", "dog & <b>friend</b>", "cup"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = molt.create_model("molt_deit_tiny", 3, (32, (48, 64)), pretrained=False, class_names=NAMES)
    model.mark_trained(True)
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    model.save(path)
    return path


def photo(path: Path, size: tuple[int, int] = (60, 40)) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return path


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["localize", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_a_trained_model_gives_overlays_and_a_page_of_every_stage(checkpoint: Path, tmp_path: Path) -> None:
    one, two = photo(tmp_path / "one.png"), photo(tmp_path / "two.png", (33, 90))
    out = tmp_path / "out"
    arguments = ("--checkpoint", checkpoint, "--out", out, "--profile")  # which says what it holds
    code, text = run(one, two, *arguments)
    assert code == 0, text
    assert "model.safetensors" in text and "never trained" not in text
    assert sorted(p.name for p in out.iterdir()) == ["molt.html", "one-boxes.jpg", "two-boxes.jpg"]
    html = (out / "molt.html").read_text(encoding="utf-8")
    for stage in (
        "Attention",
        "Class map",
        "32\xa0px",
        "64\u00d748\xa0px",
        "All scales together",
        "Clusters",
        "Refined map",
    ):
        assert len(re.findall(rf"<b>\d+\. [^<]*{stage}</b>", html)) == 2, stage
    assert html.count("data:image/jpeg") == 1 + 2 * 9, "a legend, and nine pictures a photo"
    assert "one.png" in html and "two.png" in html and "Your own photos" not in html
    assert "<b>friend" not in html and "named here only" not in html
    for stage in ("forward", "cluster", "cam"):
        assert stage in text, "the profile names the stages"


def test_json_with_a_class_by_its_name(checkpoint: Path, tmp_path: Path) -> None:
    arguments = (
        "--method",
        "molt_deit_tiny",
        "--checkpoint",
        checkpoint,
        "--json",
        "--class",
        "cup",
        "--class",
        "object",
    )
    code, text = run(photo(tmp_path / "one.png"), *arguments)
    assert code == 0
    record = json.loads(text)
    assert {d["name"] for d in record["detections"]} == {"cup", "object"}
    assert record["weights"][0]["threshold"] == "not measured" and not (tmp_path / "molt-out").exists()


def test_what_is_missing_or_wrong_is_told_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    one = photo(tmp_path / "one.png")
    code, text = run(one, "--method", "molt_deit_tiny", "--out", tmp_path / "out")
    assert code == 2 and "no trained head" in text and "--checkpoint FILE" in text and text.count("\n") == 1
    code, text = run(one, "--method", "molt_deit_tiny", "--checkpoint", tmp_path / "nowhere")
    assert code == 1 and "nowhere does not exist" in text and text.count("\n") == 1
    for nothing in (tmp_path / "nowhere", one):
        code, text = run(one, "--checkpoint", nothing)
        assert code in (1, 2) and nothing.name in text and text.count("\n") == 1, text
    code, text = run(one, "--clusterer", "watershed", "--checkpoint", checkpoint)
    assert code == 2 and "--clusterer watershed: expected tokens, slic, deep" in text and text.count("\n") == 1
    code, text = run(one, "--method", "molt_deit_tiny", "--checkpoint", one)
    assert code == 2 and "is not a safetensors file of molt" in text and text.count("\n") == 1
    code, text = run(one, "--method", "molt_deit_base", "--checkpoint", checkpoint)
    assert code == 2 and "holds molt_deit_tiny, expected molt_deit_base" in text
    code, text = run(one, "--method", "molt_deit_tiny", "--checkpoint", checkpoint, "--class", "tabby")
    assert code == 2 and "class 'tabby' is unknown" in text
    assert not (tmp_path / "out").exists()


def test_page_is_of_the_first_photos_and_can_be_left_out(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["molt.cli.localize"], "PAGE_PHOTOS", 2)
    photos = [photo(tmp_path / f"{i}.png") for i in range(3)]
    arguments = ("--method", "molt_deit_tiny", "--checkpoint", checkpoint)
    code, text = run(*photos, *arguments, "--out", tmp_path / "out")
    html = (tmp_path / "out" / "molt.html").read_text(encoding="utf-8")
    assert code == 0 and "(the first 2 photos)" in text
    assert html.count('<section class="photo">') == 2 and "2.png" not in html
    assert (tmp_path / "out" / "2-boxes.jpg").is_file()
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "molt.html").write_text("mine")
    code, text = run(photos[0], *arguments, "--out", tmp_path / "others")
    assert code == 1 and "which molt did not write" in text
    assert (tmp_path / "others" / "molt.html").read_text() == "mine"
    assert run(photos[0], *arguments, "--out", tmp_path / "out")[0] == 0, "a page of its own is replaced"
    run(photos[0], *arguments, "--out", tmp_path / "bare", "--no-page")
    assert [p.name for p in (tmp_path / "bare").iterdir()] == ["0-boxes.jpg"]


def test_a_page_that_cannot_be_written_fails_but_keeps_the_rest(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("molt.page.write_page", full)
    arguments = ("--method", "molt_deit_tiny", "--checkpoint", checkpoint, "--out", tmp_path / "out")
    code, text = run(photo(tmp_path / "one.png"), *arguments)
    assert code == 1 and "the page was not written (disk full)" in text
    assert (tmp_path / "out" / "one-boxes.jpg").is_file()
