"""The report: one file, asking for nothing, whatever names it is given."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from molt.data.annotations import LocalizationSet, Problem, Sample
from molt.evaluation import report
from molt.evaluation._svg import Line, plot
from molt.evaluation.compare import compare
from molt.evaluation.report import write_report
from molt.evaluation.runs import Run, Settings, evaluate

EVIL = "<script>alert(1)</script>\"'&{{ 7 * 7 }}"
SETTINGS = Settings(size=16, thresholds=30, draws=10)


def data_set(folder: Path, number: int = 6, classes: int = 3) -> LocalizationSet:
    samples = []
    for i in range(number):
        path = folder / f"{i}.png"
        PIL.Image.new("RGB", (60, 40), (40 * (i % 6), 120, 90)).save(path)
        boxes = np.array([[5.0, 5, 30 + i % 20, 30]])
        samples.append(Sample(f"{EVIL} {i}", path, i % classes, boxes, (60, 40)))
    return LocalizationSet(EVIL, "folder", tuple(samples), tuple(f"{EVIL} class {i}" for i in range(classes)))


def maps(samples: Sequence[Sample]) -> Iterator[np.ndarray]:
    for sample in samples:
        values = np.zeros((16, 16))
        values[2 : 6 + int(sample.name.split()[-1]) % 9, 1:9] = 1
        yield values


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def run_of(data: LocalizationSet, name: str = EVIL) -> Run:
    weights = [{"model": "net", "source": "package p", "saw_masks": "probably", "threshold": "measured"}]
    stray = [Problem(Path("stray.npy"), None, "a map that belongs to no photo", EVIL)]
    return evaluate(data, maps, SETTINGS, method={"name": name, "weights": weights}, problems=stray)


def test_one_file_that_asks_for_nothing_and_escapes_every_name(tmp_path: Path) -> None:
    data = data_set(tmp_path)
    run = run_of(data)
    path = write_report(tmp_path / "report.html", [run], samples=data.samples, maps=maps)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open and text.startswith("<!doctype html>")
    assert "script" not in page.tags and "<script" not in text
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value.startswith("data:")
    assert "url(" not in text and "@import" not in text
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
    for said in (EVIL, f"{EVIL} class 0", "MaxBoxAccV2", "16 px", "probably", "stray.npy", "Worst photos"):
        assert said in page.text
    score = run.info["scores"]["max_box_acc"]["value"]
    assert f"{score:.2f}" in page.text
    pictures = [value for name, value in page.attributes if name == "src"]
    assert len(pictures) == 6
    for picture in pictures:
        with PIL.Image.open(io.BytesIO(base64.b64decode(picture.split(",", 1)[1]))) as opened:
            assert opened.format == "JPEG" and opened.size == (60, 40)


def test_pictures_show_heat_and_boxes(tmp_path: Path) -> None:
    data = data_set(tmp_path, 1)
    run = run_of(data)

    def pictures(given: object) -> np.ndarray:
        path = write_report(tmp_path / "report.html", [run], samples=data.samples, maps=given)  # type: ignore[arg-type]
        (data_uri,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', path.read_text())
        return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data_uri)))).astype(int)

    plain, heated = pictures(None), pictures(maps)
    assert np.abs(plain - heated).max() > 60
    x0, y0, x1, y1 = run.rows[0]["box"]
    ground = np.array([0, 120, 90])
    assert np.abs(plain[int(y0), int(x0 + x1) // 2] - ground).sum() > 100, "the box's upper edge"
    assert np.abs(plain[5, 17] - ground).sum() > 100, "the true box's upper edge"
    assert np.abs(plain[37, 57] - ground).sum() < 30


def test_photos_that_are_gone_leave_a_note(tmp_path: Path) -> None:
    data = data_set(tmp_path)
    run = run_of(data)
    data.samples[0].path.unlink()
    page = Page(write_report(tmp_path / "r.html", [run], samples=data.samples, maps=maps).read_text())
    assert "no such file" in page.text
    assert len([1 for name, _ in page.attributes if name == "src"]) == 5


def test_many_classes_and_problems_are_cut_with_a_note(tmp_path: Path) -> None:
    data = data_set(tmp_path, 60, 60)
    broken = evaluate(data, lambda samples: [ValueError("no map") for _ in samples], SETTINGS)
    assert len(broken.info["classes"]) == 60 and broken.info["problems"]["count"] == 60
    page = Page(write_report(tmp_path / "r.html", [broken]).read_text())
    assert "10 more" in page.text and "Problems: 60" in page.text and "The first 50" in page.text
    assert page.text.count("no map") == 50


def test_several_runs_side_by_side(tmp_path: Path) -> None:
    data = data_set(tmp_path)
    runs = [run_of(data, "one"), run_of(data, EVIL)]
    found = compare(runs, draws=20)
    text = write_report(tmp_path / "r.html", runs, comparison=found).read_text()
    page = Page(text)
    assert "one" in page.text and EVIL in page.text and "+0.0 to +0.0" in page.text and "<script" not in text
    assert page.tags.count("svg") == 2 and "img" not in page.tags


def test_a_page_of_large_photos_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_set(tmp_path)
    run = run_of(data)
    noise = np.random.default_rng(0).integers(0, 255, (900, 1200, 3), dtype=np.uint8)
    for sample in data.samples:
        PIL.Image.fromarray(noise).save(sample.path)
    monkeypatch.setattr(report, "MAX_BYTES", 150_000)
    path = write_report(tmp_path / "r.html", [run], samples=data.samples, maps=maps)
    assert path.stat().st_size < 150_000 and "data:image/jpeg" in path.read_text()


def test_other_peoples_files_stay(tmp_path: Path) -> None:
    data = data_set(tmp_path)
    (tmp_path / "report.html").write_text("<html>my thesis</html>")
    with pytest.raises(FileExistsError, match="did not write"):
        write_report(tmp_path / "report.html", [run_of(data)])
    assert (tmp_path / "report.html").read_text() == "<html>my thesis</html>"
    own = write_report(tmp_path / "own.html", [run_of(data)])
    assert write_report(own, [run_of(data)]) == own
    with pytest.raises(ValueError, match="at least one run"):
        write_report(own, [])


def test_damaged_figures_are_told(tmp_path: Path) -> None:
    run = run_of(data_set(tmp_path))
    info = dict(run.info) | {"scores": {"max_box_acc": {"value": "high"}}}
    with pytest.raises(ValueError, match="do not fit"):
        write_report(tmp_path / "r.html", [Run(info, run.rows, run.curves)])


def test_plot_is_xml_with_its_marks() -> None:
    values = [i / 1000 for i in range(1000)]
    root = ET.fromstring(plot([Line("<a> & b", values, 777), Line("c", [0.5], None)], "x < 1", "y"))
    tag = "{http://www.w3.org/2000/svg}"
    first, second = root.findall(f"{tag}polyline")
    points = [tuple(map(float, point.split(","))) for point in first.get("points", "").split()]
    assert 200 < len(points) < 400 and points == sorted(points)
    (circle,) = root.findall(f"{tag}circle")
    assert (float(circle.get("cx", 0)), float(circle.get("cy", 0))) in points
    assert circle.find(f"{tag}title").text.startswith("<a> & b: 77.70%")  # type: ignore[union-attr]
    assert len(second.get("points", "").split()) == 1
