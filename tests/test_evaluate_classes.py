"""`molt evaluate` where classes count: Top-k and GT-known Loc, CorLoc over all objects, fixed thresholds, tables."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from test_evaluate_cli import FakeLocalizer, call
from torch import Tensor, nn

import molt
from molt.classes import imagenet_names
from molt.cli import _sets
from molt.cli._map_providers import Wanted, provider
from molt.data import LocalizationSet, Sample, read_set
from molt.evaluation import CorLoc, MaxBoxAcc, TopKLoc
from molt.evaluation.maps import prepare
from molt.evaluation.predictions import Predictions, place
from molt.evaluation.runs import Run, Settings, evaluate
from molt.evaluation.summary import protocol_line

SIDE = 40
FAST = ("--size", SIDE, "--thresholds", 20, "--draws", 20)
PLAIN = ("--no-truncate", "--no-clip", "--no-plus-one", "--resize", "none", "--normalize", "none")


def boxed(*box: int) -> dict[str, Any]:
    x0, y0, x1, y1 = box
    return {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}


@pytest.fixture
def coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four photos of 40 x 40 with cats and dogs, two of them with both, one dog a crowd; maps of one box each."""
    monkeypatch.chdir(tmp_path)
    cats = {0: (2, 2, 20, 20), 1: (4, 4, 30, 30), 2: (10, 10, 38, 36)}
    dogs = {0: (20, 20, 40, 40), 1: (0, 20, 10, 40), 3: (5, 5, 25, 35)}
    found = []
    for category, boxes in ((1, cats), (2, dogs)):
        for photo, box in boxes.items():
            found.append({"id": len(found) + 1, "image_id": photo, "category_id": category} | boxed(*box))
    found.append({"id": 99, "image_id": 2, "category_id": 2} | boxed(0, 0, 40, 8) | {"iscrowd": 1})
    images = [{"id": i, "file_name": f"{i}.png", "width": SIDE, "height": SIDE} for i in range(4)]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    Path("set.json").write_text(json.dumps({"images": images, "annotations": found, "categories": categories}))
    Path("maps").mkdir()
    for photo, (x0, y0, x1, y1) in {0: dogs[0], 1: cats[1], 2: (0, 0, 40, 8), 3: (30, 0, 40, 10)}.items():
        PIL.Image.new("RGB", (SIDE, SIDE), "teal").save(f"{photo}.png")
        values = np.zeros((SIDE, SIDE))
        values[y0:y1, x0:x1] = 0.9
        values[0, 0] = max(values[0, 0], 0.3)
        np.save(f"maps/{photo}.npy", values)
    return tmp_path


def scores(*options: object) -> dict[str, Any]:
    result = call("evaluate", "set.json", "--method", "maps:maps", "--json", *FAST, *PLAIN, *options)
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_photos_are_photos_and_pairs_are_called_so(coco: Path) -> None:
    found = scores("--out", "run")
    assert found["data"]["photos"] == 4 and found["data"]["pairs"] == 6
    v1 = found["scores"]["max_box_acc"]
    assert (v1["photos"], v1["pairs"]) == (4, 6) and v1["value"] == pytest.approx(100 * 2 / 6)
    assert sum(entry["photos"] for entry in found["sizes"]) >= 4 and "bootstrap draws of the photo-class pairs" in (
        protocol_line(found)
    )
    shown = call("evaluate", "set.json", "--method", "maps:maps", *FAST, *PLAIN, "--out", "run")
    assert "photo-class pairs" in shown.out and Run.load("run").info["data"]["pairs"] == 6
    page = Path("run/report.html").read_text()
    assert "<td>4 (6 photo-class pairs)</td>" in page and "4 photos (6 photo-class pairs) of 2 classes" in page
    both = call("evaluate", "--compare", "run", "run")
    assert "on the 4 photos (6 photo-class pairs) that all share" in both.out
    one = scores("--any-object")
    assert one["data"]["photos"] == 4 and "pairs" not in one["data"] and "pairs" not in one["scores"]["corloc"]


def test_limit_draws_photos_with_all_their_classes(coco: Path) -> None:
    data = read_set("set.json")
    for limit in (1, 2, 3):
        for seed in range(5):
            part = _sets.some(data, limit, seed)
            names = {sample.name for sample in part.samples}
            assert len(names) == limit and f"{limit} of 4 photos" in part.name
            assert [s.label for s in part.samples] == [s.label for s in data.samples if s.name in names]
    assert _sets.some(data, 4, 0) is data


def test_maps_of_photos_that_were_not_drawn_belong_to_a_photo(coco: Path) -> None:
    np.save("maps/else.npy", np.zeros((SIDE, SIDE)))
    problems = scores("--limit", 1)["problems"]
    assert [Path(problem["file"]).name for problem in problems["listed"]] == ["else.npy"]
    assert scores()["problems"]["count"] == 1


def test_a_map_that_fits_two_photos_of_the_set_fits_none_that_was_drawn(tmp_path: Path) -> None:
    from molt.evaluation.maps import StoredMaps

    (tmp_path / "b.npy").write_bytes(b"")
    samples = [Sample(f"{folder}/b.png", Path(f"{folder}/b.png"), 0, np.zeros((0, 4))) for folder in "xy"]
    stored = StoredMaps(tmp_path, samples[:1], missing="zero", of=samples)
    assert isinstance(next(iter(stored(samples[:1]))), ValueError) and len(stored.problems) == 1


def test_corloc_takes_any_object_of_the_photo(coco: Path) -> None:
    found = scores("--any-object")
    assert found["scores"]["corloc"]["value"] == 50 == found["scores"]["max_box_acc"]["value"]
    assert scores("--any-object", "--crowd")["scores"]["corloc"]["value"] == 75
    said = protocol_line(scores("--any-object", "--crowd"))
    assert "CorLoc: one box a photo, right with any object of any class" in said and "crowds count" in said
    assert "corloc" not in scores()["scores"]

    data = _sets.any_object(read_set("set.json", crowd=True))
    metric = CorLoc()
    boxes = [[20, 20, 40, 40], [4, 4, 30, 30], [0, 0, 40, 8], [30, 0, 40, 10]]
    metric.update(boxes, [sample.boxes for sample in data.samples])
    assert metric.compute()["score"] == 75
    # A map of one label would be another one's here.
    np.save("maps/0.png@0.npy", np.ones((SIDE, SIDE)))
    assert scores("--any-object")["scores"]["corloc"]["value"] == 50
    for options, said in (
        (("--gt-map", "label"), "--gt-map label does not go with it"),
        (("--predictions", "x.csv"), "--predictions x.csv does not go with it"),
    ):
        result = call("evaluate", "set.json", "--method", "maps:maps", "--any-object", *options)
        assert result.code == 2 and said in result.err


def test_difficult_and_crowd_go_with_their_layouts(coco: Path) -> None:
    def voc(*flags: str) -> Any:
        return call(
            "evaluate", "voc", "--kind", "voc", "--method", "centre", "--json", *FAST, "--split", "test", *flags
        )

    root = Path("voc")
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    PIL.Image.new("RGB", (SIDE, SIDE)).save(root / "JPEGImages" / "a.jpg")
    thing = "<object><name>cat</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>7</ymin><xmax>34</xmax>"
    things = "".join((thing + "<ymax>34</ymax></bndbox></object>").format(*one) for one in ((1, 7), (0, 31)))
    size = f"<size><width>{SIDE}</width><height>{SIDE}</height></size>"
    (root / "Annotations" / "a.xml").write_text(f"<annotation><filename>a.jpg</filename>{size}{things}</annotation>")
    (root / "ImageSets" / "Main" / "test.txt").write_text("a\n")
    without, counted = json.loads(voc().out), json.loads(voc("--difficult").out)
    assert without["scores"]["max_box_acc"]["value"] == 0 and without["data"]["left_out"]
    assert counted["scores"]["max_box_acc"]["value"] == 100 and "difficult objects count" in protocol_line(counted)
    wrong = voc("--crowd")
    assert wrong.code == 2 and "crowd: the voc layout" in wrong.err
    wrong = call("evaluate", "set.json", "--method", "centre", "--difficult")
    assert wrong.code == 2 and "difficult: the coco layout" in wrong.err


def photos_of(number: int, seed: int = 0) -> tuple[LocalizationSet, list[np.ndarray], list[int | None]]:
    """Photos with boxes, smooth maps, and a rank each."""
    rng = np.random.default_rng(seed)
    samples, maps, ranks = [], [], []
    for i in range(number):
        low = rng.integers(0, 20, 2)
        box = np.array([[*low, *(low + rng.integers(8, 20, 2))]], float)
        samples.append(Sample(f"{i}.png", Path(f"{i}.png"), i % 3, box, (SIDE, SIDE)))
        y, x = np.mgrid[:SIDE, :SIDE]
        centre = (box[0, :2] + box[0, 2:]) / 2 + rng.uniform(-5, 5, 2)
        maps.append(np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / rng.uniform(60, 200)))
        ranks.append([0, 0, 3, 7, None][i % 5])
    return LocalizationSet("some", "folder", tuple(samples), ("a", "b", "c")), maps, ranks


@pytest.mark.parametrize("threshold", [None, 0.0, 0.4])
def test_top_k_and_gt_known_are_those_of_the_metric(threshold: float | None) -> None:
    data, maps, ranks = photos_of(40)
    settings = Settings(size=SIDE, thresholds=50, draws=30, threshold=threshold, resize="none")
    by_name = dict(zip((sample.name for sample in data.samples), ranks, strict=True))
    run = evaluate(data, iter(maps), settings, ranks=lambda samples: [by_name[s.name] for s in samples], batch=7)
    values = {name: entry["value"] for name, entry in run.info["scores"].items()}

    knobs: dict[str, Any] = {"strict_topk": False, "clip": True, "empty": (0, 0, 0, 0), "topk_box": "top1"}
    metric = TopKLoc("best" if threshold is None else threshold, thresholds=50, bootstrap=0, **knobs)
    ready = torch.from_numpy(np.stack([prepare(values, SIDE) for values in maps]))
    # The label stands where its rank says among eight classes, or nowhere.
    ranked = [[99 if j == rank else j for j in range(8)] for rank in ranks]
    metric.update(ready[:, None], ranked, [99] * 40, [sample.boxes for sample in data.samples], gt_maps=ready)
    found = metric.compute()
    for name in ("gt_known_loc", "top1_loc", "top5_loc", "top1_cls", "top5_cls"):
        assert values[name] == pytest.approx(found[name], abs=1e-9), name
    assert values["top1_cls"] == 40 and values["top5_cls"] == 60
    single = MaxBoxAcc("v1", 50 if threshold is None else [threshold], bootstrap=0)
    single.update(ready, [sample.boxes for sample in data.samples])
    assert values["max_box_acc"] == values["gt_known_loc"] == pytest.approx(single.compute()["score"])
    for entry in run.info["scores"].values():
        low, high = entry["interval"]
        assert low <= entry["value"] + 5 and high >= entry["value"] - 5
    said = protocol_line(run.info)
    assert "Top-k Loc" in said and ("chosen on these photos" in said) == (threshold is None)
    assert (f"threshold {threshold:g} of each map's maximum, fixed" in said) if threshold is not None else True


def test_another_threshold_needs_no_map_again_and_others_are_not_mixed(tmp_path: Path) -> None:
    data, maps, ranks = photos_of(12)
    rank_of = lambda samples: [ranks[int(s.name.split(".")[0])] for s in samples]  # noqa: E731

    def run(give: Any, **changes: Any) -> Run:
        options = {"ranks": changes.pop("ranks", rank_of), "about": changes.pop("about", None)}
        settings = Settings(size=SIDE, thresholds=20, draws=5, resize="none", **changes)
        return evaluate(data, give, settings, out=tmp_path / "run", **options)

    def never(samples: object) -> Any:
        raise AssertionError("the maps are known")

    best = run(iter(maps))
    fixed = run(never, threshold=0.9)
    alone = evaluate(data, iter(maps), Settings(size=SIDE, thresholds=20, draws=5, resize="none", threshold=0.9))
    assert fixed.info["scores"]["max_box_acc"] == alone.info["scores"]["max_box_acc"]
    assert fixed.info["scores"]["max_box_acc"]["value"] < best.info["scores"]["max_box_acc"]["value"]
    assert {row["rank"] for row in fixed.rows} == {0, 3, 7, None}
    assert run(never).info["scores"] == best.info["scores"]
    loaded = Run.load(tmp_path / "run")
    assert loaded.curves.rank is not None and loaded.settings.threshold is None
    for changes in ({"ranks": None}, {"about": {"any_object": True}}, {"about": {"counted": ["crowds"]}}):
        with pytest.raises(ValueError, match="--restart"):
            run(never, **changes)
    for wrong in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="threshold must"):
            Settings(threshold=wrong)


def test_a_fixed_threshold_is_no_maximum_in_any_table(coco: Path) -> None:
    result = call("evaluate", "set.json", "--method", "maps:maps", *FAST, *PLAIN, "--threshold", 0.5, "--out", "run")
    assert result.code == 0 and "MaxBoxAcc" not in result.out and "BoxAcc " in result.out and "BoxAccV2" in result.out
    assert "at the fixed threshold" in result.out and "chosen on these" not in result.out.replace("\n", " ")
    page = Path("run/report.html").read_text()
    assert "MaxBoxAcc" not in page and "GT-known Loc" in page and "fixed threshold" in page and "<svg" not in page
    info = Run.load("run").info
    assert {entry["threshold"] for entry in info["by_iou"]} == {0.5}
    assert "MaxBoxAcc" not in call("evaluate", "--compare", "run", "run").out
    # Above 0.3 of 0.9 the lone pixel goes, and with it the second contour.
    assert scores("--threshold", 0.2)["by_iou"][0]["threshold"] == 0.2


def test_predictions_of_stored_maps(coco: Path) -> None:
    Path("top.csv").write_text("0.png,dog,cat\n1.png,1,0\n2.png,-,cat\n3.png,dog,-\nelse.png,bird\n")
    found = scores("--predictions", "top.csv", "--limit", 4, "--out", "run")
    values = {name: entry["value"] for name, entry in found["scores"].items()}
    # Pairs: cats of 0, 1, 2, dogs of 0, 1, 3; the maps show the dog of 0 and the cat of 1.
    assert values["top1_cls"] == pytest.approx(50) and values["top5_cls"] == pytest.approx(100)
    assert values["gt_known_loc"] == pytest.approx(100 / 3) == values["top5_loc"]
    assert values["top1_loc"] == pytest.approx(100 / 6)
    assert "top.csv" in found["method"]["predictions"] and "classes predicted by: top.csv" in protocol_line(found)
    assert found["problems"]["count"] == 1 and "no photo of the set" in found["problems"]["listed"][0]["message"]
    both = call("evaluate", "--compare", "run", "run", "--json")
    assert json.loads(both.out)["scores"]["top1_loc"][0]["value"] == pytest.approx(100 / 6)
    Path("top.csv").write_text("0.png,cat,dog\n1.png,1,0\n2.png,-,cat\n3.png,dog,-\n")
    changed = call(
        "evaluate", "set.json", "--method", "maps:maps", *FAST, *PLAIN, "--predictions", "top.csv", "--out", "run"
    )
    assert changed.code == 2 and "--restart" in changed.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.png,dog,bird\n", "top.csv:1: "),
        ("0.png,dog\n", "photo '0.png' has 1 classes"),
        ("0.png,dog,cat\n0.png,dog,cat\n", "top.csv:2: photo '0.png' comes twice"),
        ("0.png,dog,cat\n", "photo '1.png' has no line"),
    ],
)
def test_predictions_that_do_not_hold_are_told(coco: Path, text: str, said: str) -> None:
    Path("top.csv").write_text(text)
    result = call("evaluate", "set.json", "--method", "maps:maps", "--predictions", "top.csv", *FAST)
    assert result.code == 2 and said in result.err and "Traceback" not in result.err
    gone = call("evaluate", "set.json", "--method", "maps:maps", "--predictions", "gone.csv", *FAST)
    assert gone.code == 2 and "gone.csv: cannot be read" in gone.err
    if "1.png" in said:
        data = read_set("set.json")
        lenient = Predictions(Path("top.csv"), data.samples, data.classes, missing="zero")
        ranks = {(s.name, s.label): rank for s, rank in zip(data.samples, lenient(data.samples), strict=True)}
        assert ranks["0.png", 1] == 0 and ranks["0.png", 0] == 1 and ranks["1.png", 0] is None


def test_places_of_classes() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.2, 0.1])
    assert [place(probabilities, (i,)) for i in range(5)] == [3, 0, 1, 2, 4]
    assert place(probabilities, (0, 3)) == 2 and place(probabilities, (4, 2)) == 1


class Classifier(nn.Module):
    """Sees class 8 likeliest on every photo, then 0 to 7, then the others."""

    size = (16, 16)
    class_names = imagenet_names()

    def forward(self, images: Tensor, classes: Tensor | None, k: int, stage: object) -> SimpleNamespace:
        scores = -torch.arange(1000.0).repeat(len(images), 1)
        scores[:, 8] = 1
        return SimpleNamespace(all_probabilities=scores, cam=torch.rand(len(images), 1, 4, 4))


@pytest.mark.parametrize("gt_map", ["label", "top1", "agnostic"])
def test_the_network_s_own_classes_are_ranked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gt_map: str) -> None:
    import molt.localizer

    class WithClassifier(FakeLocalizer):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.method, self._stage = Classifier(), None  # type: ignore[assignment]

        def _maps(self, images: Tensor, wanted: Tensor | None) -> SimpleNamespace:
            self.method(images, wanted, 1, None)
            return super()._maps(images, wanted)

    monkeypatch.setattr(molt.localizer, "Localizer", WithClassifier)
    names = ("hen", "goldfish, Carassius auratus", "tabby, tabby cat")
    samples = []
    for i in range(4):
        PIL.Image.new("RGB", (SIDE, SIDE)).save(tmp_path / f"{i}.png")
        samples.append(Sample(f"{i}.png", tmp_path / f"{i}.png", i % 3, np.array([[0.0, 4, 20, 36]]), (SIDE, SIDE)))
    (tmp_path / "3.png").write_bytes(b"no photo")
    data = LocalizationSet("some", "folder", tuple(samples), names)
    found = provider(Wanted("default", gt_map), data)
    assert found.ranks is not None
    list(found.maps(samples))
    assert found.ranks(samples) == [0, 2, 281, None]
    # Classes of other names cannot be ranked; whose map counts does not need them.
    other = LocalizationSet("some", "folder", tuple(samples), ("x", "y", "z"))
    if gt_map != "label":
        assert provider(Wanted("default", gt_map), other).ranks is None
    assert provider(Wanted("default", "agnostic", any_object=True), data).ranks is None


def test_a_trained_molt_ranks_its_classes(coco: Path) -> None:
    torch.manual_seed(0)
    options: Any = {"backbone": "test_vit", "class_names": ("cat", "dog", "bird"), "pretrained": False}
    model = molt.create_model("molt_deit_tiny", 3, (32, 48), **options)
    model.mark_trained(True)
    model.save("molt.safetensors")
    command = ("evaluate", "set.json", "--checkpoint", "molt.safetensors", "--source", "package", *FAST, "--json")
    result = call(*command, "--out", "run")
    assert result.code == 0, result.err
    found = {name: entry["value"] for name, entry in json.loads(result.out)["scores"].items()}
    assert found["top5_cls"] == 100 and found["top5_loc"] == pytest.approx(found["gt_known_loc"])
    loc = molt.Localizer("molt_deit_tiny", checkpoint="molt.safetensors", source="package")
    named = {row["name"]: loc(row["path"]).names[0] for row in Run.load("run").rows}
    assert [row["rank"] == 0 for row in Run.load("run").rows] == [
        named[row["name"]] == row["class"] for row in Run.load("run").rows
    ]


def test_tables_as_csv_and_latex(coco: Path) -> None:
    options = ("--csv", "out/scores.csv", "--latex", "out/scores.tex", "--out", "run")
    found = scores(*options)
    with Path("out/scores.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["run"] == "maps:maps"
    for name, entry in found["scores"].items():
        assert float(row[name]) == entry["value"]
        assert [float(row[f"{name}_{end}"]) for end in ("low", "high")] == entry["interval"]
        assert (int(row[f"{name}_photos"]), int(row[f"{name}_pairs"])) == (4, 6)
    text = Path("out/scores.tex").read_text()
    assert text.startswith("% maps:maps: 40 px") and r"\begin{tabular}{lrrr}" in text and r"\toprule" in text
    assert r"Method & MaxBoxAcc & MaxBoxAccV2 & mean IoU \\" in text and r"maps:maps & 33.3 & " in text
    Path("a_b & 50%").mkdir()
    for path in Path("maps").iterdir():
        (Path("a_b & 50%") / path.name).write_bytes(path.read_bytes())
    several = ("--method", "maps:maps", "--method", "maps:a_b & 50%", "--threshold", 0.3)
    result = call("evaluate", "set.json", *several, *FAST, *PLAIN, *options[:4], "--out", "both")
    assert result.code == 0, result.err
    text = Path("out/scores.tex").read_text()
    assert r"maps:a\_b \& 50\% & 33.3" in text and "Method & BoxAcc & BoxAccV2 & mean IoU & GT-known Loc" in text
    assert len(Path("out/scores.csv").read_text().splitlines()) == 3
    compared = call("evaluate", "--compare", "run", "run", *options[:4])
    assert compared.code == 0 and len(Path("out/scores.csv").read_text().splitlines()) == 3
    Path("file").write_text("")
    blocked = call("evaluate", "--compare", "run", "run", "--csv", "file/scores.csv")
    assert blocked.code == 2 and "--csv" in blocked.err and "Traceback" not in blocked.err
    early = call("evaluate", "set.json", "--method", "weak", "--latex", "maps", "--json", *FAST)
    assert early.code == 2 and "--latex maps: is a folder, expected a file" in early.err and not early.out
