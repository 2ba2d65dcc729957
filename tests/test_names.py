"""Names that are hard to write: no text, of another normal form, for a terminal of another encoding."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import molt
from molt import Localization
from molt._text import name_key, plain_name, readable
from molt.classes import find_class
from molt.data import DataError, LocalizationSet, Sample, read_set, read_voc, write_coco, write_yolo
from molt.data.writers import Annotation
from molt.evaluation.bootstrap import poisson_weights
from molt.localizer import Explanation
from molt.methods import Seeded

pytestmark = pytest.mark.usefixtures("own_folder")

NFC, NFD = unicodedata.normalize("NFC", "Käse"), unicodedata.normalize("NFD", "Käse")
FAMILY = "\U0001f469\u200d\U0001f467"  # an emoji of three characters
NAMES = ("Jos\udce9.jpg", f"K\u00e4se {FAMILY}.jpg", "a\n\x1b[31mb.jpg", "br[red]x.jpg", "ok.jpg")


def photo(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (60, 40), "teal").save(path, "PNG")
    return path


class FakeLocalizer:
    """Answers at once; its one class is called like a folder whose name is no text."""

    def __init__(self, *arguments: object, **options: object) -> None:
        self.weights, self.profile = (), None
        self.method = SimpleNamespace(class_names=("Jos\udce9",))

    def stream(self, sources: list[Path], classes: object = None, *, explain: bool = False) -> Any:
        for source in sources:
            found = Localization(
                boxes=torch.tensor([[1.0, 2, 30, 20]]),
                classes=torch.tensor([0]),
                names=["Jos\udce9"],
                scores=torch.tensor([0.5]),
                size=(60, 40),
                heat=torch.rand(1, 8, 8),
                clusters=torch.zeros(8, 8, dtype=torch.int32),
                source=source,
            )
            maps = (torch.rand(8, 8), [], torch.rand(8, 8), torch.zeros(8, 8, dtype=torch.int32), torch.rand(8, 8))
            whole = Explanation(PIL.Image.new("RGB", (60, 40)), found, 0.5, *maps, Seeded.captions)
            yield source, whole if explain else found


def run(monkeypatch: pytest.MonkeyPatch, encoding: str, *arguments: object) -> SimpleNamespace:
    """Run `molt` in this process on a terminal of another encoding."""
    from molt.cli import main

    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    monkeypatch.undo()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    return SimpleNamespace(code=stopped.value.code or 0, out=out, err=err)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize("kind", ["coco", "yolo", "voc"])
def test_no_name_costs_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, kind: str) -> None:
    for name in NAMES:
        photo(tmp_path / "in" / name)
    monkeypatch.setattr("molt.localizer.Localizer", FakeLocalizer)
    out = tmp_path / "out"
    result = run(monkeypatch, encoding, "localize", tmp_path / "in", "--annotations", kind, "--out", out)
    assert "\x1b[31m" not in result.out + result.err and "Traceback" not in result.err
    assert "ok.jpg" in result.out and "br[red]x.jpg" in result.out
    assert len([path for path in out.iterdir() if path.name.endswith("-boxes.jpg")]) == len(NAMES)
    page = (out / "molt.html").read_bytes().decode()
    assert "Jos\\udce9.jpg" in page and FAMILY in page
    if kind == "coco":
        assert result.code == 0
        images = json.loads((out / "molt-coco.json").read_text("ascii"))["images"]
        assert {image["file_name"] for image in images} == set(NAMES)
        assert all((tmp_path / "in" / image["file_name"]).is_file() for image in images), "JSON finds the files again"
    elif kind == "yolo":
        data = read_set(out / "molt-yolo")
        assert {sample.name for sample in data.samples} == {NAMES[1], NAMES[3], NAMES[4]}
        assert result.code == 1 and "Jos\\udce9.jpg: not in the annotations" in result.err
        assert data.classes == ("Jos\udce9",)
    else:
        assert result.code == 1 and "Jos\\udce9.jpg: not in the annotations" in result.err
        assert read_voc(out / "molt-voc").classes == ("Jos\\udce9",)
        assert (out / "molt-voc/ImageSets/Main/train.txt").read_text("utf-8").count("\n") == 3


def test_json_lines_and_errors_keep_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        photo(tmp_path / name)
    monkeypatch.setattr("molt.localizer.Localizer", FakeLocalizer)
    result = run(monkeypatch, "ascii", "localize", tmp_path, tmp_path / "none\udce9", "--json")
    records = [json.loads(line) for line in result.out.splitlines()]
    assert sorted(Path(record["path"]).name for record in records) == sorted([*NAMES, "none\udce9"])
    assert result.code == 1 and "none\\udce9: no such file or folder" in result.err


def test_a_real_terminal_of_ascii(tmp_path: Path) -> None:
    photo(tmp_path / "in" / NFC / NAMES[0])
    photo(tmp_path / "in" / NFC / NAMES[1])
    command = [sys.executable, "-m", "molt.cli", "data", "check", str(tmp_path / "in")]
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, capture_output=True, env=env, timeout=100, check=False)
    assert done.returncode == 0 and b"K\\xe4se: 2" in done.stdout, done.stderr


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_sets_with_such_names_are_checked_evaluated_and_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    root = tmp_path / "s\udce9t"
    for name in NAMES:
        photo(root / name)
    items = [Annotation(name, (60, 40), [[10, 5, 30, 20]], [i % 2]) for i, name in enumerate(NAMES[:2] + NAMES[3:])]
    write_coco(root / "\udce9.json", items, [f"lone \ud83d {NFD} \x1b[31m", "Jos\udce9"])
    result = run(monkeypatch, encoding, "data", "check", root)
    assert result.code == 0, result.out
    more = ("--draws", 5, "--save-maps", tmp_path / "maps", "--out", tmp_path / "out")
    result = run(monkeypatch, encoding, "evaluate", root, "--method", "centre", *more)
    assert result.code == 0 and (tmp_path / "out" / "report.html").is_file(), result.err
    result = run(monkeypatch, encoding, "evaluate", root, "--method", f"maps:{tmp_path / 'maps'}", "--json")
    assert result.code == 0 and json.loads(result.out)["data"]["photos"] == 4
    assert poisson_weights(["Jos\udce9.jpg"], 3, 0).shape == (1, 4)


def test_train_on_folders_with_such_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for number in range(8):
        path = photo(tmp_path / "in" / (NFD, "Jos\udce9")[number % 2] / f"{number}{NAMES[number % 4]}")
        PIL.Image.fromarray(rng.integers(0, 255, (40, 44, 3)).astype(np.uint8)).save(path, "PNG")
    (tmp_path / "in" / "Jos\udce9" / "bad\udce9.jpg").write_text("no photo")
    quick = ("--sizes", 28, "--epochs", 1, "--batch", 4, "--device", "cpu", "--out", tmp_path / "run")
    result = run(monkeypatch, "ascii", "train", tmp_path / "in", *quick)
    assert result.code == 0, result.err
    assert "skipped: " in result.err and "bad\\udce9.jpg" in result.err
    unread = run(monkeypatch, "ascii", "train", tmp_path / "in", "--out", tmp_path / "run\udce9")
    assert unread.code == 2 and "out must be a path in UTF-8" in unread.err, "told before anything is computed"
    best = tmp_path / "run" / "best.safetensors"
    model = molt.load_model(best)
    assert model.class_names == ("Jos\udce9", NFC)
    for name in (NFC, NFD, f" {NFD.upper()}\n", "k\u00e4SE"):
        assert find_class(name, model.class_names) == 1
        asked = ("--checkpoint", best, "--class", name, "--json", "--device", "cpu")
        result = run(monkeypatch, "ascii", "localize", tmp_path / "in" / NFD, *asked)
        assert result.code == 0, result.err
    result = run(monkeypatch, "ascii", "localize", tmp_path / "in", "--checkpoint", best, "--class", "Kase")
    assert result.code == 2 and "did you mean: k\\xe4se?" in result.err


def test_the_one_form_of_names() -> None:
    assert plain_name(f" {NFD}\u00a0\n") == NFC == plain_name("K\udcc3\udca4se"), (
        "bytes of UTF-8, read in another locale"
    )
    assert plain_name("Jos\udce9") == "Jos\udce9" and plain_name("\ud83d") == "\ud83d"
    assert name_key("ǰA") == name_key("ǰa") == name_key(unicodedata.normalize("NFD", "ǰA"))
    assert readable(f"{FAMILY} \udce9\ud83d\n\x9b2J\u202eb\u2028") == f"{FAMILY} \\udce9\\ud83d  2J b "
    assert LocalizationSet("x", "folder", (), (f"{NFD} ",)).classes == (NFC,)


def test_every_reader_keeps_names_in_one_form(tmp_path: Path) -> None:
    for number, name in enumerate((NFD, "dog")):
        photo(tmp_path / "folders" / name / f"{number}.png")
    item = Annotation("x.png", (60, 40), [[10, 5, 30, 20]], [0])
    photo(tmp_path / "coco" / "x.png")
    write_coco(tmp_path / "coco" / "a.json", [item], [f"{NFD} ", "dog"])
    content = (tmp_path / "coco" / "a.json").read_text().replace(json.dumps(NFC)[1:-1], json.dumps(f" {NFD}")[1:-1])
    (tmp_path / "coco" / "a.json").write_text(content)
    write_yolo(tmp_path / "yolo", [item], [NFD, "dog"])
    assert NFC in (tmp_path / "yolo" / "data.yaml").read_text("utf-8")
    write_yolo(tmp_path / "yolo", [item], [NFC, "dog"], split="val")
    photo(tmp_path / "yolo" / "images" / "x.png")
    (tmp_path / "yolo" / "data.yaml").write_text(f"names: ['{NFD} ', dog]\ntrain: train.txt\n", "utf-8")
    object_of = (
        "<object><name> {} </name><bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>20</ymax></bndbox></object>"
    )
    photo(tmp_path / "voc" / "JPEGImages" / "x.jpg")
    (tmp_path / "voc" / "Annotations").mkdir()
    text = f"<annotation><filename>x.jpg</filename>{object_of.format(NFD)}{object_of.format(NFC)}</annotation>"
    (tmp_path / "voc" / "Annotations" / "x.xml").write_text(text, "utf-8")
    photo(tmp_path / "csv" / "x.png")
    (tmp_path / "csv" / "a.csv").write_text(f"x.png,{NFD} \n", "utf-8")
    for kind in ("folders", "coco", "yolo", "csv"):
        assert NFC in read_set(tmp_path / kind).classes, kind
    (sample,) = read_voc(tmp_path / "voc", classes=[f"{NFD} "]).samples
    assert len(sample.boxes) >= 1 and read_voc(tmp_path / "voc").classes == (NFC,)


def test_files_of_names_and_networks_are_compared_in_that_form(tmp_path: Path) -> None:
    from molt.cli._map_providers import network_classes
    from molt.cli.convert import _names
    from molt.cli.data import read_names

    (tmp_path / "names.txt").write_text(f"{NFD} \ndog\n", "utf-8")
    assert read_names(tmp_path / "names.txt") == _names(tmp_path / "names.txt") == [NFC, "dog"]
    data = LocalizationSet("x", "folder", (Sample("a", Path("a"), 0, np.zeros((0, 4))),), (NFC,))
    assert network_classes(data, ("dog", NFD), None)[0] == {0: (1,)}
    (tmp_path / "map.csv").write_text(f"{NFD},{NFC}\n", "utf-8")
    assert network_classes(data, ("dog", NFD, "x"), tmp_path / "map.csv")[0] == {0: (1,)}


def test_two_folders_of_one_name_are_an_error(tmp_path: Path) -> None:
    photo(tmp_path / NFC / "1.png")
    photo(tmp_path / NFD / "2.png")
    if len(list(tmp_path.iterdir())) == 2:  # where the file system keeps both
        with pytest.raises(DataError, match=r"the folders 'Ka\\u0308se' and 'K\\xe4se' are the same class name"):
            read_set(tmp_path)
    photo(tmp_path / "other" / "dog" / "1.png")
    photo(tmp_path / "other" / "dog " / "1.png")
    with pytest.raises(DataError, match="the folders 'dog' and 'dog ' are the same class name, 'dog'"):
        read_set(tmp_path / "other")


def test_quiet_streams_are_left_alone() -> None:
    from molt.cli import main

    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        main(["--version"])
    assert out.getvalue().startswith("molt ")
