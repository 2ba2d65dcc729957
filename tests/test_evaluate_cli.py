"""`molt evaluate`: which maps it asks for, what it prints and writes, and its exit codes."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import pytest
import torch

from molt.classes import OBJECT, imagenet_names
from molt.cli import _map_providers
from molt.cli._map_providers import Wanted, network_classes, provider
from molt.data.annotations import LocalizationSet, Sample
from molt.evaluation.runs import Run
from molt.structures import WeightsInfo

ASKED: list[Any] = []
FAST = ("--size", "16", "--thresholds", "20", "--draws", "10")


def call(*arguments: object) -> SimpleNamespace:
    """Run `molt` in this process, as its entry point does."""
    from molt.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return SimpleNamespace(code=stopped.value.code, out=out.getvalue(), err=err.getvalue())


def data_set(folder: Path, names: tuple[str, ...] = ("tabby, tabby cat", "hen"), number: int = 6) -> LocalizationSet:
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for i in range(number):
        PIL.Image.new("RGB", (40, 40), (30 * i, 100, 50)).save(folder / f"{i}.png")
        boxes = np.array([[4.0, 4, 30, 20 + i]])
        samples.append(Sample(f"{i}.png", folder / f"{i}.png", i % len(names), boxes, (40, 40)))
    return LocalizationSet("photos", "folder", tuple(samples), names)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalizationSet:
    """A working folder with a data set that every `read_set` gives."""
    monkeypatch.chdir(tmp_path)
    data = data_set(tmp_path / "photos")
    ASKED.clear()

    def read_set(path: Path, **options: Any) -> LocalizationSet:
        ASKED.append((path, options))
        return data

    monkeypatch.setattr("molt.data.reading.read_set", read_set)
    return data


class FakeMethod:
    size = (16, 16)
    class_names = imagenet_names()


class FakeLocalizer:
    """The left half for class 8 (hen), else the right half; remembers what it was asked."""

    made: ClassVar[list[tuple[Any, ...]]] = []
    asked: ClassVar[list[Any]] = []

    def __init__(self, method: str, weights: str, **options: Any) -> None:
        FakeLocalizer.made.append((method, weights, options))
        self.method, self.device = FakeMethod(), torch.device("cpu")
        self.weights = (WeightsInfo("net", "package p 1", "probably", True),)

    def _maps(self, images: torch.Tensor, wanted: torch.Tensor | None) -> SimpleNamespace:
        assert images.shape[1:] == (3, 16, 16)
        FakeLocalizer.asked.append(None if wanted is None else wanted.tolist())
        maps = torch.zeros(len(images), 1, 16, 16)
        for i in range(len(images)):
            left = wanted is not None and int(wanted[i, 0]) == 8
            maps[i, 0, 2:14, slice(0, 8) if left else slice(8, 16)] = 1
        return SimpleNamespace(refined=maps)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeLocalizer]:
    import molt.localizer

    monkeypatch.setattr(molt.localizer, "Localizer", FakeLocalizer)
    FakeLocalizer.made, FakeLocalizer.asked = [], []
    return FakeLocalizer


def test_help_needs_no_torch() -> None:
    code = "import sys, molt.cli.evaluate; print([m for m in ('torch', 'numpy', 'PIL', 'jinja2') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"
    result = call("evaluate", "--help")
    assert result.code == 0 and "--save-maps" in result.out and "maps:FOLDER" in result.out


def test_stored_maps_from_start_to_report(here: LocalizationSet) -> None:
    for sample in here.samples:
        values = np.zeros((40, 40), np.float32)
        values[4:20, 4:30] = 1
        Path("maps").mkdir(exist_ok=True)
        np.save(Path("maps", f"{sample.name}.npy"), values)
    result = call("evaluate", "photos", "--method", "maps:maps", "--out", "run", "--kind", "folder", *FAST)
    assert result.code == 0, result.err
    assert [(Path("photos"), {"kind": "folder"})] == ASKED
    for said in ("MaxBoxAcc", "100.00", "protocol: 16 px", "20 thresholds", "report.html"):
        assert said in result.out
    run = Run.load("run")
    assert run.info["scores"]["max_box_acc"]["value"] == 100 and run.info["method"]["missing"] == "stop"
    assert "data:image/jpeg" in Path("run", "report.html").read_text()


def test_json_alone_on_stdout_and_nothing_written(here: LocalizationSet) -> None:
    result = call("evaluate", "photos", "--method", "centre", "--json", *FAST)
    found = json.loads(result.out)
    assert result.code == 0 and found["method"]["name"] == "centre" and found["protocol"]["normalize"] == "none"
    assert found["data"] == {"name": "photos", "kind": "folder", "photos": 6, "classes": 2, "left_out": {}}
    assert sorted(path.name for path in Path().iterdir()) == ["photos"]


def test_baselines_are_their_boxes(here: LocalizationSet) -> None:
    for name, least, most in (("centre", 0.15, 0.85), ("full", 0.0, 1.0)):
        call("evaluate", "photos", "--method", name, "--out", name, "--size", "200", "--draws", "5")
        box = Run.load(name).rows[0]["box"]
        np.testing.assert_allclose(box, [40 * least, 40 * least, 40 * most, 40 * most], atol=0.25)


def test_each_photo_gets_the_map_of_its_class(here: LocalizationSet, fake: type[FakeLocalizer]) -> None:
    result = call("evaluate", "photos", "--out", "run", "--batch", "4", "--save-maps", "kept", *FAST)
    assert result.code == 0, result.err
    assert fake.made[0][:2] == ("seeded", "default")
    tabby, hen = imagenet_names().index("tabby, tabby cat"), 8
    assert fake.asked[:2] == [[[tabby], [hen], [tabby], [hen]], [[tabby], [hen]]]
    run = Run.load("run")
    assert run.info["method"]["gt_map"] == "label" and run.info["method"]["weights"][0]["saw_masks"] == "probably"
    assert "seen pixel masks in training: probably" in result.out
    boxes = [row["box"] for row in run.rows]
    assert boxes[0][0] > 15 and boxes[1][2] < 25
    again = call("evaluate", "photos", "--method", "maps:kept", "--json", *FAST)
    assert json.loads(again.out)["scores"] == run.info["scores"]


@pytest.mark.parametrize(("gt_map", "expected"), [("top1", None), ("agnostic", [[OBJECT]] * 6)])
def test_maps_of_other_classes(
    here: LocalizationSet, fake: type[FakeLocalizer], gt_map: str, expected: list[list[int]] | None
) -> None:
    result = call("evaluate", "photos", "--gt-map", gt_map, "--method", "weak", "--json", *FAST)
    assert result.code == 0 and fake.asked == [expected] and fake.made[0][1] == "weak"
    assert json.loads(result.out)["method"]["gt_map"] == gt_map


def test_several_methods_are_compared(here: LocalizationSet, fake: type[FakeLocalizer]) -> None:
    result = call("evaluate", "photos", "--method", "default", "--method", "centre", "--out", "runs", *FAST)
    assert result.code == 0, result.err
    assert "centre - default" in result.out
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "centre",
        "comparison.json",
        "default",
        "report.html",
    ]
    compared = call("evaluate", "--compare", "runs/default", "runs/centre", "--json", "--draws", "10")
    assert json.loads(compared.out) == json.loads(Path("runs/comparison.json").read_text())
    shown = call("evaluate", "--compare", "runs/default", "runs/centre")
    assert shown.code == 0 and "6 photos that all share" in shown.out and "protocols differ in normalize" in shown.out
    assert call("evaluate", "--compare", "runs/default").code == 2
    assert "no complete run" in call("evaluate", "--compare", "runs/default", "photos").err


def test_a_checkpoint_says_which_method_it_is_of(
    here: LocalizationSet, fake: type[FakeLocalizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molt.methods.model_in", {Path("head.safetensors"): "molt_dinov2_small"}.get)
    Path("head.safetensors").touch()
    monkeypatch.setattr(FakeMethod, "class_names", here.classes)
    assert call("evaluate", "photos", "--checkpoint", "head.safetensors", "--out", "run").code == 0
    method, _, options = FakeLocalizer.made[0]
    assert method == "molt_dinov2_small" and options["checkpoint"] == Path("head.safetensors")


def test_limit_draws_by_seed_and_keeps_order(here: LocalizationSet) -> None:
    def names(*options: object) -> list[str]:
        assert call("evaluate", "photos", "--method", "full", "--out", "run", "--restart", *options, *FAST).code == 0
        return [row["name"] for row in Run.load("run").rows]

    first = names("--limit", 3, "--seed", 1)
    assert len(first) == 3 and first == sorted(first) == names("--limit", 3, "--seed", 1)
    assert len({tuple(names("--limit", 3, "--seed", seed)) for seed in range(5)}) > 1
    assert len(names("--limit", 99)) == 6


def test_a_photo_that_cannot_be_read_counts_and_is_told(here: LocalizationSet, fake: type[FakeLocalizer]) -> None:
    here.samples[1].path.write_bytes(b"broken")
    result = call("evaluate", "photos", "--out", "run", *FAST)
    assert result.code == 1 and "1 problem:" in result.out and "1.png" in result.out
    run = Run.load("run")
    assert run.info["scores"]["max_box_acc"]["photos"] == 6 and run.rows[1]["box"] is None
    assert [row["box"] is None for row in run.rows].count(True) == 1


def test_missing_maps_stop_before_anything_or_count_as_zero(here: LocalizationSet) -> None:
    Path("maps").mkdir()
    for sample in here.samples[:4]:
        np.save(Path("maps", f"{sample.name}.npy"), np.eye(16))
    stopped = call("evaluate", "photos", "--method", "maps:maps", "--out", "run", *FAST)
    assert stopped.code == 2 and "4.png" in stopped.err and "5.png" in stopped.err and not Path("run").exists()
    counted = call("evaluate", "photos", "--method", "maps:maps", "--missing", "zero", "--out", "run", *FAST)
    assert counted.code == 1 and "2 problems:" in counted.out and "missing maps: zero" in counted.out
    assert Run.load("run").info["problems"]["kinds"] == {"the photo has no map": 2}


def test_the_same_command_goes_on_and_another_is_refused(
    here: LocalizationSet, fake: type[FakeLocalizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = FakeLocalizer._maps

    def stopping(self: FakeLocalizer, images: torch.Tensor, wanted: torch.Tensor | None) -> SimpleNamespace:
        if len(FakeLocalizer.asked) == 2:
            raise KeyboardInterrupt
        return whole(self, images, wanted)

    command = ("evaluate", "photos", "--out", "run", "--batch", "2", *FAST)
    with monkeypatch.context() as patched:
        patched.setattr(FakeLocalizer, "_maps", stopping)
        result = call(*command)
    assert result.code == 130 and "4 of 6 photos are in run" in result.err
    FakeLocalizer.asked = []
    result = call(*command)
    assert result.code == 0 and len(FakeLocalizer.asked[0]) == 2
    assert len(Run.load("run").rows) == 6
    refused = call(*command, "--gt-map", "top1")
    assert refused.code == 2 and "--restart" in refused.err and "gt_map" in refused.err
    assert call(*command, "--gt-map", "top1", "--restart").code == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "PATH is missing"),
        (("photos", "more"), "one data set at a time"),
        (("photos", "--method", "magic"), "--method magic: expected default, weak"),
        (("photos", "--gt-map", "best"), "--gt-map best"),
        (("photos", "--method", "maps:nowhere"), "no such folder"),
        (("photos", "--checkpoint", "nowhere"), "--checkpoint nowhere: no file that holds a MOLT"),
        (("photos", "--ious", "a"), "--ious a"),
        (("photos", "--ious", "2"), "ious must be"),
        (("photos", "--limit", "0"), "--limit 0"),
        (("photos", "--batch", "0"), "--batch 0"),
        (("photos", "--resize", "lanczos"), "resize must be one of cubic"),
        (("photos", "--method", "full", "--out", "photos"), "other files"),
        (("photos", "--gt-map", "top1", "--class-map", "x.csv"), "--class-map: goes with"),
        (("photos", "--class-map", "x.csv"), "--class-map x.csv: cannot be read"),
    ],
)
def test_wrong_options_are_told_in_one_line(
    here: LocalizationSet, fake: type[FakeLocalizer], options: tuple[str, ...], said: str
) -> None:
    result = call("evaluate", *options)
    assert result.code == 2 and said in result.err and "Traceback" not in result.err
    assert not list(Path().rglob("run.json"))


def test_classes_the_network_lacks_need_a_map(tmp_path: Path, fake: type[FakeLocalizer]) -> None:
    data = data_set(tmp_path, ("hen", "gosling", "n02124075", "12", "beyond"), 10)
    known = imagenet_names()
    with pytest.raises(ValueError, match="3 of the set's 5 classes .6 photos.*--class-map"):
        provider(Wanted("default"), data)
    assert fake.made == [], "told before the networks are loaded"
    table = tmp_path / "map.csv"
    table.write_text("hen,8\ngosling,goose\nn02124075,tabby, tabby cat\n12,object\nbeyond,4000\n")
    found, problems = network_classes(data, known, table)
    assert found == {0: (8,), 1: (known.index("goose"),), 2: (known.index("tabby, tabby cat"),), 3: (OBJECT,)}
    assert len(problems) == 1 and "4000" in str(problems[0]) and "2 photos" in str(problems[0])
    maps = list(provider(Wanted("default", class_map=table), data).maps(data.samples[:5]))
    assert [isinstance(values, Exception) for values in maps] == [False] * 4 + [True]
    table.write_text("hen,8\n")
    with pytest.raises(ValueError, match="4 of the set's 5 classes"):
        network_classes(data, known, table)
    table.write_text("hen\n")
    with pytest.raises(ValueError, match=":1: got"):
        network_classes(data, known, table)


def test_several_network_classes_for_one_mean_the_likeliest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = data_set(tmp_path, ("bird", "cat"), 4)
    known = imagenet_names()
    table = tmp_path / "map.csv"
    table.write_text("bird,7-9\nbird,goose\nbird,8\ncat,281\n")
    found, problems = network_classes(data, known, table)
    assert found == {0: (7, 8, 9, known.index("goose")), 1: (281,)} and not problems
    for text in ("7-", "9-7", "990-1000", "-3-5"):
        table.write_text(f"bird,{text}\ncat,281\n")
        _, problems = network_classes(data, known, table)
        assert len(problems) == 1 and text in str(problems[0])
    table.write_text("bird,object\nbird,7\ncat,281\n")
    assert "no class among others" in str(network_classes(data, known, table)[1][0])

    logits = torch.zeros(2, len(known))
    logits[0, 9], logits[1, 7] = 5.0, 5.0
    logits[:, 281] = 50.0
    cnn = lambda images: SimpleNamespace(logits=logits[: len(images)])  # noqa: E731
    loc = SimpleNamespace(method=SimpleNamespace(cnn=cnn, size=32), device=torch.device("cpu"))
    asked = []

    def see(_: object, images: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
        asked.append(wanted)
        return torch.zeros(len(images), 1, 4, 4)

    maps = _map_providers._Network(loc, see, {0: (7, 8, 9), 1: (281,)}, agnostic=False)
    birds = [sample for sample in data.samples if sample.label == 0][:2]
    cats = [sample for sample in data.samples if sample.label == 1][:1]
    assert len(list(maps([birds[0], *cats, birds[1]]))) == 3
    assert asked[0].tolist() == [[9], [281], [7]]


def test_wordnet_ids_and_numbers_are_classes_where_they_can_be() -> None:
    known = imagenet_names()
    one = (Sample("a", Path("a"), 0, np.zeros((0, 4))),)
    data = LocalizationSet("x", "wsol", one, ("n02124075",))
    assert known[network_classes(data, known, None)[0][0][0]].startswith("Egyptian cat")
    numbered = LocalizationSet("x", "wsol", one, tuple(str(i) for i in range(1000)))
    assert network_classes(numbered, known, None)[0] == {0: (0,)}


def test_layercam_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(ImportError, match="pip install grad-cam"):
        provider(Wanted("layercam"), data_set(tmp_path))


def test_cam_is_the_method_s_class_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import molt.localizer

    class WithMethod(FakeLocalizer):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._stage = None

            def method(images: torch.Tensor, wanted: torch.Tensor, k: int, stage: object) -> SimpleNamespace:
                return SimpleNamespace(cam=wanted[:, :, None, None].float().expand(-1, -1, 2, 3))

            method.size, method.class_names = FakeMethod.size, FakeMethod.class_names  # type: ignore[attr-defined]
            self.method = method  # type: ignore[assignment]

    monkeypatch.setattr(molt.localizer, "Localizer", WithMethod)
    data = data_set(tmp_path)
    maps = list(provider(Wanted("cam"), data).maps(data.samples[:2]))
    assert maps[1].shape == (2, 3) and maps[1][0, 0] == 8
    assert WithMethod.made[-1][1] == "weak"


def test_a_wsol_set_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("molt.data.wsol")
    monkeypatch.chdir(tmp_path)
    data = data_set(tmp_path / "photos" / "val")
    folder = tmp_path / "meta" / "val"
    folder.mkdir(parents=True)
    names = [f"val/{sample.name}" for sample in data.samples]
    boxes = [",".join(f"{v:g}" for v in sample.boxes[0]) for sample in data.samples]
    (folder / "image_ids.txt").write_text("\n".join(names))
    (folder / "class_labels.txt").write_text("\n".join(f"{name},{i % 2}" for i, name in enumerate(names)))
    (folder / "image_sizes.txt").write_text("\n".join(f"{name},40,40" for name in names))
    (folder / "localization.txt").write_text("\n".join(map("{},{}".format, names, boxes)))
    command = ("evaluate", "meta", "--split", "val", "--photos", "photos", "--method", "centre", "--json", *FAST)
    result = call(*command)
    assert result.code == 0, result.err
    assert json.loads(result.out)["scores"]["max_box_acc"]["photos"] == 6
