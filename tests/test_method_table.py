"""`molt benchmark --methods`: costs are those of what runs, scores those of `molt evaluate`, and no row is lost."""

from __future__ import annotations

import builtins
import contextlib
import functools
import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import molt
from molt.backbones.preprocess import normalize
from molt.benchmark import method_costs, method_rows, method_table, timing
from molt.benchmark.method_rows import Entry, Networks, Pick, Plan, at_scales
from molt.benchmark.method_table import Work, run_all
from molt.benchmark.registry import NotRun
from molt.data.annotations import LocalizationSet, Sample
from molt.evaluation._spool import RunError
from molt.evaluation.runs import Settings, evaluate
from molt.methods.transformer import class_attention
from molt.structures import WeightsInfo

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("left", "right")
SIDE = 32
FAST = Settings(size=32, thresholds=20, draws=20)
COLUMNS = {
    "name",
    "does",
    "status",
    "reason",
    "failed",
    "same_as",
    "photos",
    "seeds",
    "score",
    "interval",
    "scores",
    "runs",
}
COLUMNS |= {"thresholds", "accuracy", "accuracy_note", "problems", "parameters", "trained_parameters", "gmacs", "ms"}
COLUMNS |= {"p20_ms", "p80_ms", "box_ms", "box_p20_ms", "box_p80_ms", "weights_mib", "extra_mib", "peak_mib"}
COLUMNS |= {"weights", "saw_masks", "method"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting garbage before each measurement takes most of the time of tables this small."""
    monkeypatch.setattr(timing, "release", lambda device: None)


def make_set(folder: Path, number: int = 6) -> LocalizationSet:
    """Photos with a bright box in the left or right half, which is the class."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for i in range(number):
        pixels = np.full((40, 40, 3), 20, np.uint8)
        x = 4 if i % 2 == 0 else 22
        pixels[8:30, x : x + 14] = 230
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
        samples.append(Sample(f"{i}.png", folder / f"{i}.png", i % 2, np.array([[x, 8.0, x + 14, 30]]), (40, 40)))
    return LocalizationSet("photos", "folder", tuple(samples), NAMES)


class Halves:
    """Sees the half of the photo that its class says; remembers how many photos it was asked for."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.scored, self.timed, self.fail_at = 0, 0, fail_at
        self.network = nn.Conv2d(3, 2, 4, stride=4)
        nn.init.zeros_(self.network.weight)

    def see(self, images: Tensor, pick: Pick | None) -> tuple[Tensor, Tensor | None]:
        assert images.shape[1:] == (3, SIDE, SIDE)
        self.network(images)
        grey = images.mean(1)
        logits = torch.stack([grey[..., : SIDE // 2].mean((1, 2)), grey[..., SIDE // 2 :].mean((1, 2))], -1)
        if pick is None:
            self.timed += 1
            chosen = logits.argmax(-1, keepdim=True)
        else:
            if self.fail_at is not None and self.scored >= self.fail_at:
                raise KeyboardInterrupt
            self.scored += len(images)
            chosen = pick(logits)
        maps = torch.zeros(len(images), 1, SIDE, SIDE)
        for i, one in enumerate(chosen[:, 0].tolist()):
            half = {0: slice(0, SIDE // 2), 1: slice(SIDE // 2, SIDE), -1: slice(0, SIDE)}[one]
            maps[i, 0, :, half] = grey[i, :, half]
        return maps, logits

    def entry(self) -> Entry:
        weights = (WeightsInfo("net", "random", "probably", False),)
        return Entry(self.see, (SIDE, SIDE), (self.network,), (self.network,), NAMES, weights=weights)


def blind() -> Entry:
    """A method without classes and networks."""
    return Entry(lambda images, pick: (images.mean(1, keepdim=True), None), (SIDE, SIDE))


def missing() -> Entry:
    raise NotRun("needs the package nowhere")


def broken() -> Entry:
    def see(images: Tensor, pick: Pick | None) -> tuple[Tensor, Tensor | None]:
        raise RuntimeError("out of luck\nand more")

    return Entry(see, (SIDE, SIDE))


def table(tmp_path: Path, *some: Plan, **options: Any) -> Work:
    data = options.pop("data", None) or make_set(tmp_path / "photos")
    groups = options.pop("groups", {0: (0,), 1: (1,)})
    given: dict[str, Any] = {"settings": FAST, "seconds": 0.001} | options
    return Work(data, some, lambda known: groups, tmp_path / "out", **given)


def finish(work: Work) -> dict[str, Any]:
    """Run to the end, writing every report, as the command does."""
    found: dict[str, Any] = {}
    for found in run_all(work):
        work.out.mkdir(parents=True, exist_ok=True)
        work.path.write_text(json.dumps(found), "utf-8")
    return found


def named(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["rows"]}


def test_every_row_has_all_columns_and_says_why_it_did_not_run(tmp_path: Path) -> None:
    halves = Halves()
    some = (
        Plan("halves", "h", halves.entry, "key"),
        Plan("again", "the same", halves.entry, "key"),
        Plan("blind", "b", blind),
        Plan("missing", "m", missing),
        Plan("broken", "x", broken),
        Plan("no weights", "w", lambda: (_ for _ in ()).throw(FileNotFoundError("weights are nowhere"))),
    )
    work = table(tmp_path, *some)
    report = finish(work)
    assert report["table"] == "methods" and report["device"].startswith("cpu") and report["counted"]
    assert json.loads(json.dumps(report, allow_nan=False)) == json.loads(work.path.read_text())
    rows = named(report)
    assert list(rows) == [plan.name for plan in some]
    assert all(set(row) == COLUMNS and row["photos"] == 6 and row["seeds"] == 1 for row in rows.values())
    assert rows["missing"]["reason"] == "needs the package nowhere" and not rows["missing"]["failed"]
    assert rows["no weights"]["reason"] == "weights are nowhere" and not rows["no weights"]["failed"]
    assert rows["broken"]["reason"] == "raises RuntimeError: out of luck" and rows["broken"]["failed"]
    assert rows["again"]["same_as"] == "halves" and rows["again"]["does"] == "the same"
    same = set(COLUMNS) - {"name", "does", "same_as"}
    assert {key: rows["again"][key] for key in same} == {key: rows["halves"][key] for key in same}
    assert halves.scored == 6  # once, for both rows
    first = rows["halves"]
    assert first["score"] == first["scores"]["max_box_acc_v2"]["value"] > 90
    assert first["interval"] == first["scores"]["max_box_acc_v2"]["interval"]
    assert first["p20_ms"] <= first["ms"] <= first["p80_ms"] and first["box_ms"] > 0 and first["runs"] >= 3
    assert first["saw_masks"] == "probably" and rows["blind"]["saw_masks"] == "no"
    assert first["parameters"] == first["trained_parameters"] == 3 * 2 * 16 + 2
    assert first["gmacs"] == pytest.approx(3 * 2 * 16 * 8 * 8 / 1e9)
    assert first["accuracy"]["value"] == 100 and first["accuracy"]["photos"] == 6
    assert rows["blind"]["accuracy"] is None and rows["blind"]["accuracy_note"] == "knows no classes"
    assert rows["blind"]["parameters"] == rows["blind"]["gmacs"] == 0


def test_scores_are_those_of_evaluate(tmp_path: Path) -> None:
    work = table(tmp_path, Plan("halves", "h", Halves().entry), groups={0: (1,), 1: (0,)})
    found = named(finish(work))["halves"]
    maps = []
    for sample in work.data.samples:
        values = np.zeros((SIDE, SIDE), np.float32)
        grey = np.asarray(molt.data.read_photo(sample.path, (SIDE, SIDE)).pixels.mean(0))
        half = slice(SIDE // 2, SIDE) if sample.label == 0 else slice(0, SIDE // 2)
        values[:, half] = grey[:, half]
        maps.append(values)
    assert found["scores"] == evaluate(work.data, maps, FAST).info["scores"]
    assert found["accuracy"]["value"] == 0  # each photo is taken for the other class
    assert found["scores"]["max_box_acc"]["value"] == 0


@pytest.mark.parametrize(("gt_map", "right"), [("top1", 100), ("agnostic", 100), ("label", 0)])
def test_whose_map_counts(tmp_path: Path, gt_map: str, right: float) -> None:
    work = table(tmp_path, Plan("halves", "h", Halves().entry), groups={0: (1,), 1: (0,)}, gt_map=gt_map)
    row = named(finish(work))["halves"]
    assert row["scores"]["max_box_acc"]["value"] == right and row["method"]["gt_map"] == gt_map


def test_of_several_classes_the_likeliest_counts(tmp_path: Path) -> None:
    work = table(tmp_path, Plan("halves", "h", Halves().entry), groups={0: (1, 0), 1: (0, 1)})
    row = named(finish(work))["halves"]
    assert row["scores"]["max_box_acc"]["value"] == 100
    assert row["accuracy"]["value"] == 50  # both labels are equally likely, the first is taken


def test_what_a_row_cannot_say_is_noted(tmp_path: Path) -> None:
    entry = Halves().entry()
    needy = Entry(entry.see, entry.size, class_names=NAMES, needs_class=True)
    rows = named(finish(table(tmp_path, Plan("needy", "n", lambda: needy), gt_map="agnostic")))
    assert "there is none of 'object'" in rows["needy"]["reason"]

    def unknown(known: tuple[str, ...]) -> Any:
        raise ValueError("2 of the set's 2 classes are not among the network's")

    for gt_map, note in (("label", None), ("top1", "its classes are not the set's")):
        work = table(tmp_path / gt_map, Plan("halves", "h", Halves().entry), gt_map=gt_map)
        row = named(finish(Work(**(vars(work) | {"groups": unknown}))))["halves"]
        assert row["accuracy_note"] == note and (row["reason"] is None) == (note is not None)
    work = table(tmp_path / "object", Plan("halves", "h", Halves().entry), groups={0: (-1,), 1: (1,)})
    row = named(finish(work))["halves"]
    assert row["accuracy"] is None and "'object'" in row["accuracy_note"] and row["score"] is not None


def test_photos_that_cannot_be_read_count_as_missed(tmp_path: Path) -> None:
    data = make_set(tmp_path / "photos")
    data.samples[0].path.write_text("no picture")
    row = named(finish(table(tmp_path, Plan("halves", "h", Halves().entry), data=data)))["halves"]
    assert row["problems"] == 1
    assert row["accuracy"]["value"] == pytest.approx(500 / 6)
    for sample in data.samples:
        sample.path.write_text("no picture")
    with pytest.raises(ValueError, match="none of 6 photos of 'photos' can be read"):
        finish(table(tmp_path / "none", Plan("halves", "h", Halves().entry), data=data))


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    data = make_set(tmp_path / "photos", 10)
    first, second = Halves(), Halves(fail_at=4)
    plans = (Plan("first", "f", first.entry), Plan("second", "s", second.entry), Plan("missing", "m", missing))
    work = table(tmp_path, *plans, data=data)
    with pytest.raises(KeyboardInterrupt):
        finish(work)
    killed = named(json.loads(work.path.read_text()))
    assert killed["first"]["score"] is not None and killed["second"]["score"] is None
    assert killed["second"]["ms"] is not None
    with (work.folder("second").with_name("second.classes.jsonl")).open("a") as file:
        file.write('["9.png", 1')  # cut off
    second.fail_at, timed = None, (first.timed, second.timed)
    report = finish(work)
    assert (first.scored, second.scored) == (10, 10)  # no photo twice
    assert (first.timed, second.timed) == timed  # the times are those of the first round
    rows = named(report)
    assert rows["first"]["ms"] == killed["first"]["ms"] and rows["second"]["accuracy"]["value"] == 100
    fresh = named(finish(table(tmp_path / "fresh", *plans, data=data)))
    for name in ("first", "second"):
        for key in ("scores", "accuracy", "gmacs", "method", "thresholds"):
            assert rows[name][key] == fresh[name][key]


@pytest.mark.parametrize("left", ["", '["0.png", 0, 0]\n["1.png", 1'])
def test_classes_that_were_lost_are_seen_again(tmp_path: Path, left: str) -> None:
    halves = Halves()
    work = table(tmp_path, Plan("halves", "h", halves.entry))
    first = named(finish(work))["halves"]
    path = work.folder("halves").with_name("halves.classes.jsonl")
    whole = path.read_text()
    path.write_text(left)
    again = named(finish(work))["halves"]
    assert again["accuracy"] == first["accuracy"] and first["accuracy"]["value"] == 100
    assert again["scores"] == first["scores"] and path.read_text() == whole
    assert halves.scored == 6 + (5 if left else 6)
    path.write_text(left)
    work.data.samples[1].path.write_text("no picture")
    with pytest.raises(RunError, match=r"has no class of 1\.png"):
        finish(work)


def test_a_kill_while_the_classes_are_written_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves = Halves()
    work = table(tmp_path, Plan("halves", "h", halves.entry))
    finish(work)
    path = work.folder("halves").with_name("halves.classes.jsonl")
    whole, real = path.read_text(), Path.write_text

    def killed(self: Path, data: str, *rest: Any, **more: Any) -> int:
        if data == whole:
            real(self, "", "utf-8")
            raise KeyboardInterrupt
        return real(self, data, *rest, **more)

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        finish(work)
    assert path.read_text() == whole


def test_a_folder_of_another_run_is_refused_unless_it_may_be_thrown_away(tmp_path: Path) -> None:
    plan = Plan("halves", "h", Halves().entry)
    finish(table(tmp_path, plan))
    with pytest.raises(RunError, match="other photos or settings"):
        finish(table(tmp_path, plan, settings=Settings(size=16, thresholds=20, draws=20)))
    with pytest.raises(RunError, match="halves with other weights"):
        finish(table(tmp_path, plan, groups={0: (1,), 1: (0,)}))
    turned = finish(table(tmp_path, plan, groups={0: (1,), 1: (0,)}, restart=True))
    assert named(turned)["halves"]["accuracy"]["value"] == 0
    (tmp_path / "out" / "methods.json").write_text('{"rows": []}')
    with pytest.raises(RunError, match="is no report of molt benchmark --methods"):
        finish(table(tmp_path, plan))


def test_costs_of_another_batch_are_measured_anew(tmp_path: Path) -> None:
    halves = Halves()
    finish(table(tmp_path, Plan("halves", "h", halves.entry)))
    timed = halves.timed
    finish(table(tmp_path, Plan("halves", "h", halves.entry), batch=3))
    assert halves.timed > timed and halves.scored == 6


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_multiply_adds_forward_and_backward(groups: int, transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    network = kind(8, 12, 3, stride=2, padding=1, groups=groups)
    images = torch.rand(2, 8, 9, 11)
    places = 9 * 11 if transposed else 5 * 6
    forward = 2 * places * 9 * 8 * 12 / groups
    with torch.no_grad():
        assert method_costs.gmacs(lambda: network(images)) == pytest.approx(forward / 1e9)
    # The images take no gradient, the weight does.
    assert method_costs.gmacs(lambda: network(images).sum().backward()) == pytest.approx(2 * forward / 1e9)
    needy = images.clone().requires_grad_()
    assert method_costs.gmacs(lambda: network(needy).sum().backward()) == pytest.approx(3 * forward / 1e9)


def test_multiply_adds_of_attention_and_of_kmeans_count() -> None:
    query = torch.rand(1, 2, 50, 16)
    found = method_costs.gmacs(lambda: F.scaled_dot_product_attention(query, query, query))
    assert found == pytest.approx(2 * 2 * 50 * 50 * 16 / 1e9)
    query.requires_grad_()

    def there_and_back() -> None:
        F.scaled_dot_product_attention(query, query, query).sum().backward()

    assert method_costs.gmacs(there_and_back) == pytest.approx(3 * 2 * 2 * 50 * 50 * 16 / 1e9)
    points = torch.rand(1, 100, 8)
    assert method_costs.gmacs(lambda: molt.ops.kmeans(points, 3, iterations=2)) > 2 * 100 * 8 * 3 / 1e9


def test_parameters_are_counted_once_and_trained_ones_apart() -> None:
    backbone, head = nn.Linear(4, 5).requires_grad_(False), nn.Linear(5, 2)
    whole = nn.Sequential(backbone, head)
    entry = Entry(lambda images, pick: (images, None), (8, 8), (whole, backbone), (whole,))
    assert method_costs.parameters(entry) == {"parameters": 25 + 12, "trained_parameters": 12}


@functools.cache
def model(shared: bool = False) -> molt.MOLT:
    torch.manual_seed(0)
    made = molt.create_model(
        "molt_deit_tiny", 3, (48, 32, 64), shared, pretrained=False, scale_weights=(1, 2, 3), class_names=tuple("abc")
    )
    for transformer in made.transformers:
        transformer.backbone.model.blocks = transformer.backbone.model.blocks[:2]
        for block in transformer.backbone.model.blocks:
            block.attn.qkv.weight.data *= 8
    made.mark_trained(True)
    return made


@pytest.mark.parametrize("shared", [False, True])
def test_a_view_of_some_scales_runs_these_and_nothing_else(shared: bool) -> None:
    whole = model(shared)
    view = at_scales(whole, (0, 2))
    assert view.config.sizes == ((48, 48), (64, 64)) and view.config.scale_weights == (1, 3) and view.trained
    assert whole.config.sizes == ((48, 48), (32, 32), (64, 64)) and len(whole.transformers) == (1 if shared else 3)
    assert {id(p) for p in view.parameters()} <= {id(p) for p in whole.parameters()}
    assert method_costs.parameters(Entry(lambda i, p: (i, None), (8, 8), (view,)))["parameters"] == sum(
        p.numel() for p in view.parameters()
    )
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        seen, every = view.see(x), whole.see(x)
        wanted = torch.tensor([[1], [2]])
        for ours, theirs in zip(view.cams(seen, wanted), [whole.cams(every, wanted)[i] for i in (0, 2)], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert method_costs.gmacs(lambda: view.see(x)) < 0.95 * method_costs.gmacs(lambda: whole.see(x))
    if not shared:
        ran: list[int] = []
        hooks = [
            t.backbone.model.norm.register_forward_hook(lambda *_, i=i: ran.append(i))
            for i, t in enumerate(whole.transformers)
        ]
        view.see(x)
        for hook in hooks:
            hook.remove()
        assert ran == [0, 2]
    for scales in ((), (3,), (-1,)):
        with pytest.raises(ValueError, match="scales must be one or more of 0 to 2"):
            at_scales(whole, scales)


def test_an_untrained_view_stays_untrained() -> None:
    fresh = molt.create_model("molt_deit_tiny", 2, (32, 48), pretrained=False)
    assert not at_scales(fresh, (1,)).trained and not fresh.trained


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Networks:
    path = tmp_path / "molt.safetensors"
    path.write_bytes(b"weights")
    monkeypatch.setattr(method_rows, "load_model", lambda path, source: model())
    return Networks("cpu", files={"checkpoint": path})


def test_rows_of_a_molt_are_its_scales_alone_and_together(networks: Networks) -> None:
    names = [plan.name for plan in method_rows.plans(networks)]
    assert names[:4] == ["centre", "cam", "gradcam", "layercam"]
    assert names[4:8] == ["ts-cam", "scale-32", "scale-48", "scale-64"]
    assert names[8:12] == ["molt-1", "molt-2", "molt-3", "molt-3+refined"]
    assert names[12:] == ["class-token", "spatial", "tokencut", "tokencut-patches", "seeded", "weak"]
    by_name = {plan.name: plan for plan in method_rows.plans(networks)}
    assert by_name["molt-1"].key == by_name["scale-32"].key != by_name["scale-48"].key
    images = torch.rand(2, 3, 48, 48)
    maps, logits = by_name["scale-48"].build().see(images, None)
    with torch.no_grad():
        seen = model().transformer(0).see(normalize(images, model().transformer(0).backbone.model))
        wanted = seen.logits.argmax(-1, keepdim=True)
        product = class_attention(seen) * model().transformer(0).class_maps(seen, wanted)  # TS-CAM
        expected = molt.ops.upsample_normalize(product, (48, 48))
    torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, seen.logits)
    with pytest.raises(NotRun, match="--checkpoint-ts-cam FILE"):
        by_name["ts-cam"].build()
    with pytest.raises(NotRun, match="--checkpoint-spatial FILE"):
        by_name["spatial"].build()
    two = by_name["molt-2"].build()
    assert two.size == (48, 48) and two.said is not None and two.said["scales"] == [[48, 48], [32, 32]]
    assert two.said["checkpoint"] == "molt.safetensors" and len(two.said["sha256"]) == 16
    whole = by_name["molt-3"].build()
    big = torch.rand(1, 3, 64, 64)
    expected = model().localize(big, 1)
    torch.testing.assert_close(whole.see(big, lambda scores: torch.full((1, 1), 1))[0], expected)


def test_ts_cam_is_a_mean_pooled_scale_not_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    options: Any = {"backbone": "test_vit", "class_names": tuple("abc"), "pretrained": False, "clip": True}
    made = {
        f"{head}-{pooling}": molt.create_model(
            "molt_deit_tiny", 3, (448, 192, 32), head=head, pooling=pooling, **options
        )
        for head, pooling in (("patches", "mean"), ("patches", "attention"), ("class_token", "mean"))
    }
    made["patches-mean"].reconfigure(layers=(-1,))
    for name, one in made.items():
        one.mark_trained(True)
        (tmp_path / name).write_bytes(name.encode())
    monkeypatch.setattr(method_rows, "load_model", lambda path, source: made[path.name])

    def build(name: str) -> Entry:
        networks = Networks("cpu", files={"checkpoint-ts-cam": tmp_path / name})
        return next(plan for plan in method_rows.plans(networks) if plan.name == "ts-cam").build()

    whole = made["patches-mean"]
    entry = build("patches-mean")
    assert entry.size == (192, 192) and entry.said is not None and entry.said["clip"] is False
    assert entry.said["scales"] == [[192, 192]] and entry.said["checkpoint"] == "patches-mean"
    assert whole.config.clip and whole.config.layers == (-1,)  # is left as it is
    images = torch.rand(2, 3, 192, 192)
    with torch.no_grad():
        seen = whole.transformer(1).see(normalize(images, whole.transformer(1).backbone.model))
        wanted = torch.tensor([[0], [2]])
        answers = whole.transformer(1).class_maps(seen, wanted)
        expected = molt.ops.upsample_normalize(class_attention(seen) * answers, (192, 192))
    assert (answers < 0).any()
    maps, logits = entry.see(images, lambda scores: wanted)
    torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, seen.logits)
    with pytest.raises(NotRun, match="its head is pooled by 'attention', expected 'mean'"):
        build("patches-attention")
    with pytest.raises(NotRun, match="its head is 'class_token', expected 'patches'"):
        build("class_token-mean")


def test_the_refined_row_is_localizer_s(networks: Networks) -> None:
    entry = method_rows._molt(networks, "checkpoint", (0, 1, 2), refined=True)
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loc = molt.Localizer(model(), device="cpu")
    torch.testing.assert_close(entry.see(images, None)[0], loc._maps(images, None).refined)
    asked: list[Tensor] = []

    def pick(logits: Tensor) -> Tensor:
        asked.append(logits)
        return torch.tensor([[2]])

    maps, logits = entry.see(images, pick)
    torch.testing.assert_close(maps, loc._maps(images, torch.tensor([2])).refined)
    with torch.no_grad():
        torch.testing.assert_close(logits, model()(images))
    assert len(asked) == 1


def test_untrained_and_wrong_checkpoints_do_not_run(tmp_path: Path) -> None:
    fresh = molt.create_model("molt_deit_tiny", 2, (32, 224), True, pretrained=False)
    path = tmp_path / "fresh.safetensors"
    fresh.save(path)
    untrained = {plan.name: plan for plan in method_rows.plans(Networks("cpu", files={"checkpoint": path}))}
    for name in ("scale-224", "molt-1", "molt-3+refined"):
        with pytest.raises(NotRun, match="fresh.safetensors: its head was never trained"):
            untrained[name].build()
    fresh.mark_trained(True)
    fresh.save(path)
    files = {"checkpoint": path, "checkpoint-class-token": path, "checkpoint-spatial": path}
    rows = {plan.name: plan for plan in method_rows.plans(Networks("cpu", files=files))}
    assert [name for name in rows if name.startswith(("ts", "scale", "molt"))] == [
        "ts-cam", "scale-32", "scale-224", "molt-1", "molt-2", "molt-2+refined"
    ]  # fmt: skip
    with pytest.raises(NotRun, match="its head is 'patches', expected 'class_token'"):
        rows["class-token"].build()
    with pytest.raises(NotRun, match="its head is 'patches', expected 'spatial'"):
        rows["spatial"].build()
    entry = rows["molt-1"].build()
    assert str(tmp_path) not in json.dumps([info.to_json() for info in entry.weights])
    path.write_bytes(b"no file of weights")
    work = table(tmp_path, *method_rows.plans(Networks("cpu", files={"checkpoint": path}))[5:9])
    rows_found = finish(work)["rows"]
    assert all("is not a safetensors file" in row["reason"] for row in rows_found)


def test_a_missing_package_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pytorch_grad_cam", None)
    with pytest.raises(NotRun, match="pip install grad-cam"):
        method_rows._explained(Networks("cpu"), "GradCAM")


class SmallCNN(nn.Module):
    """The parts of a CNNBackbone that the rows use, on a random EfficientNet."""

    def __init__(self) -> None:
        super().__init__()
        from molt.backbones import CNNBackbone

        torch.manual_seed(0)
        self.real = CNNBackbone(pretrained=False)
        self.info, self.model, self.num_classes = self.real.info, self.real.model, self.real.num_classes

    def forward(self, images: Tensor) -> Any:
        return self.real(images)

    def cam(self, features: Any, classes: Tensor) -> Tensor:
        return self.real.cam(features, classes)


def test_baselines_of_the_cnn(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pytorch_grad_cam")
    monkeypatch.setattr(method_rows, "SIDE", 64)
    monkeypatch.setattr(method_rows, "CLASS_SIZE", 32)
    networks = Networks("cpu")
    networks.cnn = SmallCNN()  # type: ignore[assignment]
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    wanted = torch.tensor([[7]])
    cam = method_rows._cam(networks)
    maps, logits = cam.see(images, lambda scores: wanted)
    with torch.no_grad():
        torch.testing.assert_close(maps, networks.cnn.cam(networks.cnn(images), wanted))
    assert logits is not None and logits.shape == (1, 1000)
    # Grad-CAM on the last maps is the CAM's positive part, scaled (Selvaraju et al., appendix A).
    found = method_rows._explained(networks, "GradCAM")
    grad = found.see(images, lambda scores: wanted)[0]
    positive = F.interpolate(maps.clamp_min(0), (64, 64), mode="bilinear", align_corners=False)
    assert torch.corrcoef(torch.stack([grad.flatten(), positive.flatten()]))[0, 1] > 0.95
    costs = [method_costs.gmacs(lambda e=e: method_costs.to_map(e, images)) for e in (cam, found)]  # type: ignore[misc]
    assert 2 * costs[0] < costs[1] < 3.2 * costs[0]
    assert method_costs.to_box(found, images).shape[1] == 4  # gradients are there on the way to the box too


def call(*arguments: object) -> SimpleNamespace:
    """Run `molt benchmark` in this process, as its entry point does."""
    from molt.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        main(["benchmark", "--device", "cpu", *(str(argument) for argument in arguments)])
    return SimpleNamespace(code=stopped.value.code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalizationSet:
    """A working folder where every data set is the same one, and the rows are made up."""
    monkeypatch.chdir(tmp_path)
    data = make_set(tmp_path / "photos")
    plans = [Plan("halves", "h", Halves().entry), Plan("missing", "m", missing), Plan("blind", "b", blind)]
    monkeypatch.setattr("molt.data.reading.read_set", lambda path, **options: data)
    monkeypatch.setattr(method_rows, "plans", lambda networks: plans)
    monkeypatch.setattr(method_table, "SECONDS", {"cpu": 0.001})
    return data


def test_the_command_prints_a_table_and_writes_report_and_plot(here: LocalizationSet) -> None:
    pytest.importorskip("matplotlib")
    result = call("--methods", "set", "--out", "out")
    assert result.code == 0, result.err
    assert "halves" in result.out and "missing: not run: needs the package nowhere" in result.out
    rows = named(json.loads(Path("out/methods.json").read_text()))
    assert list(rows) == ["halves", "missing", "blind"]
    drawn = ET.parse("out/methods.svg").getroot()
    texts = {text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert {"halves", "blind"} <= texts and "missing" not in texts
    again = call("--methods", "set", "--out", "out", "--json")
    assert again.code == 0
    printed = named(json.loads(again.out))
    assert printed["halves"]["ms"] == rows["halves"]["ms"]
    call("--methods", "set", "--out", "few", "--limit", 2, "--method", "blind")
    few = json.loads(Path("few/methods.json").read_text())
    assert [row["name"] for row in few["rows"]] == ["blind"] and few["of"]["data"]["photos"] == 2


def test_without_matplotlib_the_plot_is_missed_and_said(here: LocalizationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError("no")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    result = call("--methods", "set", "--out", "out", "--method", "blind", "--json")
    assert result.code == 0 and "methods.svg not written: the plot needs matplotlib" in result.err
    assert json.loads(result.out)["rows"] and not Path("out/methods.svg").exists()


def test_a_row_that_raises_gives_exit_code_1(here: LocalizationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method_rows, "plans", lambda networks: [Plan("broken", "x", broken), Plan("blind", "b", blind)])
    result = call("--methods", "set", "--out", "out")
    assert result.code == 1 and "broken raises RuntimeError: out of luck" in result.err
    assert named(json.loads(Path("out/methods.json").read_text()))["blind"]["score"] is not None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--methods", "set", "--quick"), "--quick: does not go with --methods"),
        (("kmeans", "--methods", "set"), "OPERATION: does not go with --methods"),
        (("--methods", "set", "--gt-map", "best"), "--gt-map best: expected label, top1, agnostic"),
        (("--methods", "set", "--method", "nothing"), "--method nothing: no such name"),
        (("--methods", "set", "--batch", "1,2"), "--batch 1,2: expected one number"),
        (("--methods", "set", "--limit", "0"), "--limit 0: expected at least 1"),
        (("--methods", "set", "--checkpoint", "nowhere"), "--checkpoint nowhere: there is no such file"),
        (("--methods", "set", "--out", "photos/0.png"), "is a file, expected a folder"),
        (("--methods", "set", "--checkpoint-ts-cam", "nowhere"), "--checkpoint-ts-cam nowhere: there is no such file"),
        (("--end-to-end", "--checkpoint-ts-cam", "x"), "--checkpoint-ts-cam: goes with --methods only"),
        (("kmeans", "--class-map", "x.csv"), "--class-map: goes with --methods only"),
        (("--end-to-end", "--checkpoint-spatial", "x"), "--checkpoint-spatial: goes with --methods only"),
    ],
)
def test_wrong_options_are_named(here: LocalizationSet, arguments: tuple[str, ...], said: str) -> None:
    result = call(*arguments)
    assert result.code == 2 and said in " ".join(result.err.split())


def test_the_class_map_is_for_networks_of_imagenet(tmp_path: Path) -> None:
    from molt.classes import imagenet_names
    from molt.cli.method_table import _groups

    data = make_set(tmp_path)
    (tmp_path / "map.csv").write_text("left,3-5\nright,hen\n")
    assert _groups(data, tmp_path / "map.csv", imagenet_names()) == {0: (3, 4, 5), 1: (8,)}
    assert _groups(data, tmp_path / "map.csv", ("right", "left", "more")) == {0: (1,), 1: (0,)}
    with pytest.raises(ValueError, match="is not among the network's 2"):
        _groups(data, tmp_path / "map.csv", ("right", "other"))
    with pytest.raises(ValueError, match="--class-map FILE"):
        _groups(data, None, imagenet_names())


def test_a_missing_photo_stops_the_run_and_the_list_needs_no_run(here: LocalizationSet) -> None:
    assert call("--methods", "set", "--list").out.split() == ["halves", "h", "missing", "m", "blind", "b"]
    here.samples[3].path.unlink()
    result = call("--methods", "set", "--out", "out")
    assert result.code == 2 and "3.png" in result.err and not Path("out/methods.json").exists()
