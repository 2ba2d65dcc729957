"""What an evaluation must not do: reuse stale figures, drop things unsaid, change maps, forget what came before."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import PIL.Image
import pytest
import torch

from molt.data import Annotation, DataError, checking, read_voc, write_voc, write_wsol
from molt.data.annotations import LocalizationSet, Sample
from molt.evaluation import MaxBoxAcc, PxAP
from molt.evaluation.compare import compare
from molt.evaluation.masks import nearest
from molt.evaluation.runs import Settings, evaluate

SIDE = 224
FAST = ("--draws", "10")


def call(*arguments: object) -> SimpleNamespace:
    from molt.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return SimpleNamespace(code=stopped.value.code, out=out.getvalue(), err=" ".join(err.getvalue().split()))


def smooth(seed: int, low: float = 0.0, high: float = 1.0, cells: int = 7) -> np.ndarray:
    values = cv2.resize(np.random.default_rng(seed).random((cells, cells)), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    values = (values - values.min()) / (values.max() - values.min())
    return low + values * (high - low)


def opencv_scores(maps: list[np.ndarray], boxes: list[np.ndarray]) -> dict[str, float]:
    """MaxBoxAcc and MaxBoxAccV2 of maps as they are: 1000 thresholds, OpenCV at each."""
    grid = np.arange(0, 1, 0.001)
    best: dict[str, list[np.ndarray]] = {"v1": [], "v2": []}
    for values, truth in zip(maps, boxes, strict=True):
        levels = (values * 255).astype(np.uint8)
        at: dict[int, tuple[float, float]] = {}
        for cut in {int(t * levels.max()) for t in grid}:
            found = cv2.findContours((levels > cut).astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
            ious = []
            for contour in found or [np.array([[[-1, -1]]])]:
                x, y, w, h = cv2.boundingRect(contour) if found else (0, 0, 0, 0)
                x1, y1 = min(x + w, SIDE - 1), min(y + h, SIDE - 1)
                sides = np.minimum([x1, y1], truth[:, 2:]) - np.maximum([x, y], truth[:, :2]) + 1
                both = sides.clip(0).prod(1)
                whole = (x1 - x + 1) * (y1 - y + 1) + (truth[:, 2:] - truth[:, :2] + 1).prod(1) - both
                ious.append((both / whole).max())
            largest = int(np.argmax([cv2.contourArea(contour) for contour in found])) if found else 0
            at[cut] = ious[largest], max(ious)
        curve = np.array([at[int(t * levels.max())] for t in grid])
        best["v1"].append(curve[:, 0])
        best["v2"].append(curve[:, 1])
    v1 = (np.array(best["v1"]) >= 0.5).mean(0).max()
    v2 = np.mean([(np.array(best["v2"]) >= iou).mean(0).max() for iou in (0.3, 0.5, 0.7)])
    return {"max_box_acc": 100 * v1, "max_box_acc_v2": 100 * v2}


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Eight photos of 224 x 224 with a box or two each and a map each, some constant or between 0.1 and 0.9."""
    monkeypatch.chdir(tmp_path)
    maps = [smooth(seed, *((0.1, 0.9) if seed % 2 else (0.0, 1.0))) for seed in range(6)]
    maps += [np.full((SIDE, SIDE), 0.9), np.zeros((SIDE, SIDE))]
    generator = np.random.default_rng(0)
    items, boxes = [], []
    for number, values in enumerate(maps):
        levels = values > 0.7 * values.max()
        y, x = np.nonzero(levels) if levels.any() else (np.array([3, 40]), np.array([5, 60]))
        near = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        far = [*(low := generator.integers(0, 150, 2)), *(low + generator.integers(5, 70, 2))]
        own = np.array([near, far][: 1 + number % 2], float).clip(0, SIDE)
        boxes.append(own)
        items.append(Annotation(f"{number}.png", (SIDE, SIDE), own, np.zeros(len(own), int)))
        PIL.Image.new("RGB", (SIDE, SIDE), (10 * number, 90, 60)).save(f"{number}.png")
        Path("maps").mkdir(exist_ok=True)
        np.save(f"maps/{number}.png.npy", values)
    write_wsol("metadata", items, ["thing"])
    return maps, boxes


def test_stored_maps_are_scored_as_they_are(stored: tuple[list[np.ndarray], list[np.ndarray]]) -> None:
    maps, boxes = stored
    result = call("evaluate", "metadata", "--photos", ".", "--method", "maps:maps", "--json", *FAST)
    assert result.code == 0, result.err
    found, expected = json.loads(result.out), opencv_scores(maps, boxes)
    for name, value in expected.items():
        assert found["scores"][name]["value"] == pytest.approx(value), name
        assert 0 < value < 100
    assert found["protocol"]["normalize"] == "none"
    for version, name in (("v1", "max_box_acc"), ("v2", "max_box_acc_v2")):
        metric = MaxBoxAcc(version, bootstrap=0)
        metric.update(maps, boxes)
        assert metric.compute()["score"] == pytest.approx(expected[name])


def test_maps_of_another_range_stop_the_run_unless_they_are_normalised(stored: Any) -> None:
    for path in Path("maps").iterdir():
        np.save(path, 7 * np.load(path) - 3)
    given = ("evaluate", "metadata", "--photos", ".", "--method", "maps:maps", "--json", *FAST)
    result = call(*given)
    assert result.code == 2 and "0.png holds -3 to 4, expected [0, 1]; --normalize minmax" in result.err
    again = call(*given, "--normalize", "minmax")
    assert again.code == 0 and json.loads(again.out)["scores"]["max_box_acc"]["value"] > 0


def test_maps_that_have_changed_are_not_taken_for_those_of_before(stored: Any) -> None:
    given = ("evaluate", "metadata", "--photos", ".", "--method", "maps:maps", "--out", "run", *FAST)
    assert call(*given).code == 0
    assert call(*given).code == 0, "the same maps: the run is there"
    before = json.loads(Path("run/run.json").read_text())["scores"]
    for number in range(8):
        np.save(f"maps/{number}.png.npy", np.zeros((SIDE, SIDE)))
    result = call(*given)
    assert result.code == 2 and "other settings (method.files" in result.err and "--restart" in result.err
    assert call(*given, "--restart").code == 0
    after = json.loads(Path("run/run.json").read_text())["scores"]
    assert after["max_box_acc"]["value"] < before["max_box_acc"]["value"]


def test_what_the_reader_left_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    items = [Annotation(f"{i}.jpg", (50, 40), [[5, 5, 30, 30]], [0]) for i in range(3)]
    write_voc("voc", items, ["thing"], split="val")
    page = Path("voc/Annotations/2.xml")
    text = page.read_text()
    page.write_text(text.replace("</name>", "</name><difficult>1</difficult>", 1) if "difficult>" not in text else text)
    page.write_text(page.read_text().replace("<difficult>0</difficult>", "<difficult>1</difficult>"))
    assert len(read_voc("voc", "val")) == 2
    result = call("evaluate", "voc", "--split", "val", "--method", "centre", "--json", *FAST)
    found = json.loads(result.out)["data"]
    assert found["photos"] == 2
    assert found["left_out"] == {"difficult objects": 1, "photos without an object to keep": 1}
    told = call("evaluate", "voc", "--split", "val", "--method", "centre", "--out", "run", *FAST)
    assert "left out by the reader: difficult objects: 1" in told.out


def test_lines_about_photos_that_are_not_listed_are_listed_as_problems(stored: Any) -> None:
    with Path("metadata/localization.txt").open("a") as file:
        file.write("typo.png,1,1,5,5\n")
    result = call("evaluate", "metadata", "--photos", ".", "--method", "centre", "--json", *FAST)
    problems = json.loads(result.out)["problems"]
    assert problems["count"] == 1 and "not" in problems["listed"][0]["message"]


def test_the_same_thing_wrong_with_many_maps_is_one_kind(stored: Any) -> None:
    for number in range(5):
        np.save(f"maps/{number}.png.npy", np.full((3 + number, 4), np.nan))
    Path("maps/5.png.npy").unlink()
    given = ("evaluate", "metadata", "--photos", ".", "--method", "maps:maps", "--missing", "zero", "--json", *FAST)
    result = call(*given)
    problems = json.loads(result.out)["problems"]
    assert result.code == 1
    assert problems["count"] == 6
    assert problems["kinds"] == {"holds NaN or infinite values": 5, "the photo has no map": 1}


def masks_of(folder: Path, number: int, value: int = 255) -> LocalizationSet:
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for i in range(number):
        mask = np.zeros((30, 30), np.uint8)
        mask[5:15, 5 : 10 + i] = value
        PIL.Image.fromarray(mask).save(folder / f"{i}.png")
        box = np.array([[5.0, 5, 10 + i, 15]])
        samples.append(Sample(f"{i}.jpg", Path(), 0, box, (30, 30), (folder / f"{i}.png",)))
    return LocalizationSet("masks", "wsol", tuple(samples), ("it",))


def test_photos_that_do_not_count_for_pxap_are_not_counted(tmp_path: Path) -> None:
    settings = Settings(size=20, thresholds=10, draws=5)
    maps = [smooth(seed) for seed in range(4)]
    one = evaluate(masks_of(tmp_path / "a", 4), iter(maps), settings)
    broken = masks_of(tmp_path / "a", 4)
    broken.samples[2].masks[0].write_bytes(b"no picture")
    two = evaluate(broken, iter(maps), settings)
    found = compare([one, two], draws=5)
    assert found["photos"] == 4
    assert found["scores"]["pxap"][0]["photos"] == 3
    assert found["scores"]["max_box_acc"][0]["photos"] == 4
    assert [(left["reason"][:21], left["photos"]) for left in found["unshared"]] == [
        ("without a usable mask", ["2.jpg"])
    ]


def test_masks_without_an_object_give_no_pxap(tmp_path: Path) -> None:
    run = evaluate(masks_of(tmp_path, 2, 0), iter([smooth(0), smooth(1)]), Settings(size=20, thresholds=10, draws=5))
    assert "pxap" not in run.info["scores"]
    assert any("no pixel of any mask" in kind for kind in run.info["problems"]["kinds"])


def test_a_set_without_any_truth_stops_before_the_first_photo(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    PIL.Image.new("RGB", (9, 9)).save(tmp_path / "cat" / "1.jpg")
    result = call("evaluate", tmp_path, "--method", "full", "--json")
    assert result.code == 2 and "none of 1 photo of" in result.err and result.out == ""


def test_options_are_checked_for_every_method(stored: Any) -> None:
    for option in ("--gt-map", "--missing"):
        result = call("evaluate", "metadata", "--photos", ".", "--method", "centre", option, "foo", "--json")
        assert result.code == 2 and f"{option} foo: expected" in result.err


def test_a_refused_batch_does_not_cost_what_came_before() -> None:
    metric = MaxBoxAcc(thresholds=10, bootstrap=5)
    maps, boxes = torch.rand(3, 8, 8), [[[1, 1, 5, 5]]] * 3
    metric(maps, boxes)
    before = metric.compute()
    for bad in (maps * 3, maps[:2]):
        with pytest.raises(ValueError, match="maps|boxes"):
            metric(bad, boxes)
        metric._computed = None
        assert metric.compute() == before
    metric(maps, boxes)
    assert metric.compute()["count"] == 6


def test_a_photo_twice_in_a_batch_is_refused() -> None:
    metric = MaxBoxAcc(thresholds=10)
    with pytest.raises(ValueError, match="ids: got 'a' twice, expected each photo once"):
        metric.update(torch.rand(3, 8, 8), [[[1, 1, 5, 5]]] * 3, ids=["a", "b", "a"])


def test_a_list_of_maps_is_a_batch() -> None:
    maps, boxes = [smooth(seed)[:40, :50] for seed in range(3)], [[[1, 1, 25, 25]]] * 3
    scores = []
    for given in (np.stack(maps), maps, [torch.from_numpy(one) for one in maps], [one.tolist() for one in maps]):
        metric = MaxBoxAcc("v2", 20, bootstrap=0)
        metric.update(given, boxes)
        scores.append(metric.compute()["curves"])
    assert all(score == scores[0] for score in scores)
    with pytest.raises(ValueError, match="maps: got maps of different shapes"):
        MaxBoxAcc().update([maps[0], maps[1][:3]], boxes[:2])


def test_states_do_not_grow_and_keep_their_types() -> None:
    for metric in (MaxBoxAcc(thresholds=50, bootstrap=20), PxAP(50, bootstrap=20)):
        metric.set_dtype(torch.float16)
        sizes = []
        for number in (1, 40):
            for start in range(number):
                maps = torch.rand(4, 6, 6, generator=torch.Generator().manual_seed(start))
                metric.update(maps, maps > 0.5 if isinstance(metric, PxAP) else [[[1, 1, 4, 4]]] * 4)
            sizes.append(
                {name: (getattr(metric, name).shape, getattr(metric, name).dtype) for name in metric._defaults}
            )
        assert sizes[0] == sizes[1]
        assert torch.float16 not in {dtype for _, dtype in sizes[0].values()}


def test_missing_photos_and_masks_stop_the_run_before_networks_load(
    stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("no network is needed to see that photos are missing")

    monkeypatch.setattr("molt.localizer.Localizer", never)
    for number in range(3):
        Path(f"{number}.png").unlink()
    given = ("evaluate", "metadata", "--photos", ".", "--gt-map", "top1", "--json", *FAST)
    result = call(*given, "--method", "weak")
    assert result.code == 2 and "0.png: no such file" in result.err and "3 problems" in result.err
    with pytest.raises(AssertionError, match="no network"):
        call(*given, "--method", "weak", "--missing", "zero")
    assert call(*given, "--method", "centre").code == 0, "a box in the middle needs no photo of known size"
    assert call(*given, "--method", "maps:").code == 2


def test_mean_iou_is_at_the_best_of_equally_good_thresholds() -> None:
    values = np.zeros((40, 40))
    values[8:32, 8:32] = 0.2
    values[10:30, 10:30] = 1.0
    data = LocalizationSet("one", "wsol", (Sample("a", Path(), 0, np.array([[10.0, 10, 30, 30]]), (40, 40)),), ("it",))
    run = evaluate(data, iter([values]), Settings(size=40, thresholds=20, draws=3, plus_one=False, normalize="none"))
    assert run.info["scores"]["max_box_acc"]["value"] == 100
    assert run.info["by_iou"][0]["threshold"] == pytest.approx(0.2)
    assert run.info["scores"]["mean_iou"]["value"] == pytest.approx(100, abs=0.01)
    assert run.rows[0]["box"] == [10, 10, 30, 30]


def test_runs_of_one_method_are_told_apart_by_their_folders(stored: Any) -> None:
    for name in ("first", "second"):
        assert call("evaluate", "metadata", "--photos", ".", "--method", "centre", "--out", name, *FAST).code == 0
    found = json.loads(call("evaluate", "--compare", "first", "second", "--json", *FAST).out)
    assert found["runs"] == ["centre in first", "centre in second"]


def test_a_part_of_a_set_says_so(stored: Any) -> None:
    result = call("evaluate", "metadata", "--photos", ".", "--method", "centre", "--limit", "5", "--json", *FAST)
    assert json.loads(result.out)["data"]["name"].endswith(", 5 of 8 photos")


def test_boxes_that_differ_in_the_last_digits_are_the_same_truth() -> None:
    maps = [smooth(seed)[:30, :30] for seed in range(3)]

    def made(shift: float) -> LocalizationSet:
        boxes = np.array([[2.0, 3, 17, 22]]) + shift
        return LocalizationSet(
            "x", "wsol", tuple(Sample(f"{i}", Path(), 0, boxes, (30, 30)) for i in range(3)), ("it",)
        )

    settings = Settings(size=30, thresholds=10, draws=3)
    runs = [evaluate(made(shift), iter(maps), settings) for shift in (0, -1e-11, 0.5)]
    assert compare(runs[:2], draws=3)["photos"] == 3
    with pytest.raises(ValueError, match="share no photo"):
        compare(runs[1:], draws=3)


@pytest.mark.parametrize("method", ["weak", "maps:maps"])
def test_photos_of_another_size_than_annotated_stop_the_run(
    stored: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("no network is needed to see that sizes differ")

    monkeypatch.setattr("molt.localizer.Localizer", never)
    given = ("evaluate", "metadata", "--photos", ".", "--gt-map", "top1", "--method", method, "--json", *FAST)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (SIDE, 100)).save("3.png", exif=exif)
    for number in (1, 5, 6):
        PIL.Image.new("RGB", (SIDE, 100 + number)).save(f"{number}.png")
    result = call(*given)
    assert result.code == 2 and not result.out and "Traceback" not in result.err
    assert "photos of another size than the annotations say: 4 of 8, " in result.err
    assert f"'1.png' ({SIDE}x{SIDE} annotated, {SIDE}x101 in the file)" in result.err
    assert f"'3.png' ({SIDE}x{SIDE} annotated, 100x{SIDE} in the file, turned by its EXIF orientation)" in result.err
    assert "5.png" in result.err and "6.png" not in result.err and "molt data check lists all" in result.err
    for number in range(8):
        Path(f"{number}.png").unlink()
    if method == "maps:maps":
        assert call(*given).code == 0, "stored maps need no photos"


def test_python_compares_the_sizes_too_and_reads_each_header_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = np.array([[100.0, 100, 200, 150]])
    values = np.zeros((200, 400))
    values[100:150, 100:200] = 1
    settings = Settings(thresholds=10, draws=3, resize="bilinear")

    def score(*sizes: tuple[int, int] | None) -> Any:
        samples = [Sample("a.png", tmp_path / "a.png", label, box, size) for label, size in enumerate(sizes)]
        data = LocalizationSet("one", "coco", tuple(samples), ("it", "that"))
        return evaluate(data, iter([values] * len(sizes)), settings)

    PIL.Image.new("RGB", (400, 200)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"say: 1 of 1, 'a.png' \(640x640 annotated, 400x200 in the file\)"):
        score((640, 640))
    read = []
    header = checking._header
    monkeypatch.setattr(checking, "_header", lambda path: read.append(path) or header(path))
    for sizes in ([(400, 200)] * 2, [None]):
        assert score(*sizes).info["scores"]["mean_iou"]["value"] > 90
    assert len(read) == 2, "a photo of two classes is looked at once"
    (tmp_path / "a.png").write_bytes(b"no photo")
    assert score((400, 200)).info["scores"]["max_box_acc"]["value"] == 100, "stored maps do not need the photo"


@pytest.mark.parametrize(
    ("orientation", "size"), [(3, (SIDE, 60)), (2, (SIDE, 60)), (6, (SIDE, SIDE)), (1, (SIDE, 60))]
)
def test_turned_photos_whose_size_tells_nothing_are_remarked(
    tmp_path: Path, orientation: int, size: tuple[int, int]
) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    PIL.Image.new("RGB", size).save(tmp_path / "a.png", exif=exif)
    sample = Sample("a.png", tmp_path / "a.png", 0, np.array([[0.0, 0, 9, 9]]), size)
    data = LocalizationSet("one", "coco", (sample,), ("it",))
    listed = evaluate(data, iter([np.eye(8)]), Settings(thresholds=5, draws=2)).info["problems"]["listed"]
    said = "photos with an EXIF orientation of which no size tells whether the boxes heed it: 1"
    assert [one["message"] for one in listed] == ([said] if orientation > 1 else [])


def test_a_turned_tiff_has_the_size_that_is_seen(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (60, 40)).save(tmp_path / "a.tif", exif=exif)
    sample = Sample("a.tif", tmp_path / "a.tif", 0, np.array([[0.0, 0, 9, 9]]), (40, 60))
    assert not checking.check_sizes(LocalizationSet("one", "coco", (sample,), ("it",)))


def test_every_side_of_a_mask_is_resized_as_opencv_does() -> None:
    for new in (1, 17, 224, 512):
        for old in range(1, 4097):
            line = np.arange(old, dtype=np.float32)[None].repeat(2, 0)
            want = cv2.resize(line, (new, 2), interpolation=cv2.INTER_NEAREST)[0]
            assert np.array_equal(nearest(old, new), want), (old, new)
