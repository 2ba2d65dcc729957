"""`molt ablate`: options, output, plots and exit codes."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import molt
from molt.benchmark import ablation, ablation_clusters, ablation_networks, ablation_plots, ablation_scales
from molt.benchmark.ablation_networks import Clusters
from molt.clustering import Slic

pytestmark = pytest.mark.usefixtures("one_thread")


def call(*arguments: object) -> SimpleNamespace:
    """Run `molt` in this process, as its entry point does."""
    from molt.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return SimpleNamespace(code=stopped.value.code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A set in the wsol layout and a checkpoint that knows its classes."""
    folder = tmp_path_factory.mktemp("set")
    metadata = folder / "metadata"
    metadata.mkdir()
    names, lines = [], []
    for i in range(3):
        values = np.full((40, 40, 3), 30 + 10 * i, np.uint8)
        values[5 : 20 + 5 * i, 5:25] = 200
        PIL.Image.fromarray(values).save(folder / f"{i}.png")
        names.append(f"{i}.png")
        lines.append(f"{i}.png,5,5,25,{20 + 5 * i}")
    (metadata / "image_ids.txt").write_text("\n".join(names))
    (metadata / "class_labels.txt").write_text("\n".join(f"{name},{i % 2}" for i, name in enumerate(names)))
    (metadata / "image_sizes.txt").write_text("\n".join(f"{name},40,40" for name in names))
    (metadata / "localization.txt").write_text("\n".join(lines))
    (folder / "classes.txt").write_text("disc\nsquare\n")
    torch.manual_seed(0)
    options: Any = {"backbone": "test_vit", "class_names": ("disc", "square"), "pretrained": False}
    model = molt.create_model("molt_deit_tiny", 2, (32, 48), **options)
    model.mark_trained(True)
    model.save(folder / "molt.safetensors")
    base = (metadata, "--photos", folder, "--classes", folder / "classes.txt", "--source", "package")
    return SimpleNamespace(folder=folder, base=base, checkpoint=folder / "molt.safetensors")


@functools.cache
def load_once(path: Path) -> molt.MOLT:
    return molt.load_model(path)


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = Clusters("SLIC", (Slic(9, working_size=32),))
    monkeypatch.setattr(ablation_networks, "load_model", lambda path, source: load_once(path))
    monkeypatch.setattr(ablation_scales, "default_clusters", lambda seeds, method: ways)
    monkeypatch.setattr(ablation_clusters, "counted", lambda seeds: [("SLIC", "9", ways)])
    monkeypatch.setattr(ablation_clusters, "defaults", lambda seeds: [ways])

    def nowhere(*_: Any) -> Any:
        raise ValueError("2 of the set's 2 classes are not among the network's")

    monkeypatch.setattr(ablation, "SeededMaps", nowhere)


def test_tables_json_and_plots(there: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    given = ("ablate", *there.base, "--checkpoint", there.checkpoint, "--draws", 20, "--out", out)
    some = (*given, "--groups", "scales,heads,clusters,clusterers")
    found = call(*some)
    assert found.code == 0, found.err
    for text in (
        "scales, 3 photos of",
        "all scales, refined",
        "oracle",
        "correlation of scales",
        "not run: seeded: 2 of",
    ):
        assert text in found.out
    assert "not run: class_token" in found.out and "head patches: classification" in found.out
    assert "scales, clusters, clusterers, heads: 12 of 12 to do" in found.err
    svgs = {path.name: path.read_bytes() for path in out.glob("*.svg")}
    assert set(svgs) == {"scales.svg", "heads.svg", "sizes.svg", "clusters.svg", "alphas.svg"}
    assert b"MaxBoxAccV2" in svgs["scales.svg"] and b"SLIC" in svgs["clusters.svg"]

    again = call(*some, "--json")
    report = json.loads(again.out)  # nothing else
    assert again.code == 0 and report == json.loads((out / "ablation.json").read_text())
    assert "0 of 9 to do" in again.err
    assert {path.name: path.read_bytes() for path in out.glob("*.svg")} == svgs
    only = call(*given, "--groups", "scales", "--json", "--no-plots")
    assert {row["group"] for row in json.loads(only.out)["rows"]} == {"scales"}


def test_plots_of_another_run_do_not_stay(there: SimpleNamespace, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "alphas.svg").write_text("old")
    written = ablation_plots.draw({"rows": [], "findings": {}}, tmp_path)
    assert written == [] and not (tmp_path / "alphas.svg").exists()


def test_without_matplotlib(there: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    given = ("ablate", *there.base, "--checkpoint", there.checkpoint, "--groups", "heads", "--out", tmp_path / "out")
    found = call(*given)
    assert found.code == 2 and "pip install matplotlib; --no-plots goes without" in found.err
    assert not (tmp_path / "out").exists()
    assert call(*given, "--no-plots", "--draws", 10).code == 0


def test_a_photo_that_cannot_be_read_ends_with_1(there: SimpleNamespace, tmp_path: Path) -> None:
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes((there.folder / name).read_bytes())
    (tmp_path / "2.png").write_bytes(b"no picture")
    base = (there.base[0], "--photos", tmp_path, *there.base[3:], "--checkpoint", there.checkpoint)
    found = call("ablate", *base, "--groups", "heads", "--draws", 10, "--no-plots", "--out", tmp_path / "out")
    assert found.code == 1 and "1 problem, the first" in found.out and "2.png" in found.out


def test_a_photo_of_another_size_than_annotated_stops_before_networks_run(
    there: SimpleNamespace, tmp_path: Path
) -> None:
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes((there.folder / name).read_bytes())
    PIL.Image.new("RGB", (31, 17)).save(tmp_path / "0.png")
    base = (there.base[0], "--photos", tmp_path, *there.base[3:], "--checkpoint", there.checkpoint)
    found = call("ablate", *base, "--no-plots", "--out", tmp_path / "out")
    assert found.code == 2 and "'0.png' (" in found.err and "31x17 in the file" in found.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--groups", "scales,colour"), "got colour"),
        (("--groups", "scales,"), "--groups 'scales,': expected names parted by commas"),
        (("--backbones", "resnet51"), "'resnet51' is not a timm model name"),
        (("--val", "x"), "--val x: goes with --train"),
        (("--seeds", "0"), "seeds must be in 1..1000, got 0"),
        (("--limit", "0"), "--limit 0: expected at least 1"),
        (("--gt-map", "agnostic"), "label or top1"),
        (("--gt-map", "top1", "--class-map", "x.csv"), "--class-map: goes with --gt-map label only"),
        (("--class-map", "gone.csv"), "gone.csv"),
        (("--checkpoint", "gone.safetensors"), "gone.safetensors does not exist"),
        (("--draws", "0"), "draws must be"),
        (("--kind", "folders"), "folders"),
    ],
)
def test_wrong_options(there: SimpleNamespace, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    found = call("ablate", *there.base, "--checkpoint", there.checkpoint, "--out", tmp_path / "out", *options)
    assert found.code == 2 and said in found.err and "Traceback" not in found.err, found.err
    assert found.out == "" and not (tmp_path / "out").exists()


def test_another_run_in_the_folder(there: SimpleNamespace, tmp_path: Path) -> None:
    given = ("ablate", *there.base, "--checkpoint", there.checkpoint, "--groups", "heads", "--no-plots", "--draws", 10)
    assert call(*given, "--out", tmp_path, "--json").code == 0
    found = call(*given, "--out", tmp_path, "--limit", 2)
    assert found.code == 2 and "--restart throws it away" in found.err
    assert call(*given, "--out", tmp_path, "--limit", 2, "--restart", "--json").code == 0


def test_heads_are_trained_on_sets_read_with_the_same_options(
    there: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[SimpleNamespace] = []

    def train(sets: Any, out: Path, *, recipe: Any, val: Any, **_: Any) -> SimpleNamespace:
        fresh = not (out / "state.safetensors").exists()
        runs.append(SimpleNamespace(sets=sets, val=val, name=out.name, fresh=fresh))
        out.mkdir(parents=True, exist_ok=True)
        for name in ("run.json", "best.safetensors", "last.safetensors", "state.safetensors"):
            (out / name).write_text("")
        (out / "best.safetensors").write_bytes(files[recipe.head].read_bytes())
        return SimpleNamespace(best=out / "best.safetensors")

    files = {"patches": there.checkpoint, "class_token": tmp_path / "token.safetensors"}
    options: Any = {"backbone": "test_vit", "class_names": ("disc", "square"), "pretrained": False}
    model = molt.create_model("molt_deit_tiny", 2, (32, 48), head="class_token", **options)
    model.mark_trained(True)
    model.save(files["class_token"])
    monkeypatch.setattr("molt.training.train", train)
    for name in ("disc", "square"):
        (tmp_path / "folders" / name).mkdir(parents=True)
        (tmp_path / "folders" / name / "1.png").write_bytes((there.folder / "0.png").read_bytes())
    metadata, out = there.base[0], tmp_path / "out"
    given = ("ablate", *there.base, "--train", metadata, "--train-seeds", 1, "--groups", "heads", "--draws", 10)
    given = (*given, "--no-plots", "--json", "--out", out)
    found = call(*given, "--train", tmp_path / "folders", "--val", metadata)
    assert found.code == 0, found.err
    assert [run.name for run in runs] == ["patches-0", "class_token-0"] and all(run.fresh for run in runs)
    first, second = runs[0].sets
    assert first.classes == ("disc", "square") and [s.path.parent for s in first.samples] == [there.folder] * 3
    assert second.kind == "folder" and len(runs[0].val[0].samples) == 3
    assert call(*given).code == 0 and not runs[-1].fresh
    for name in ("patches-x", "patches-7", "others"):
        (tmp_path / "out-heads" / name).mkdir()
        (tmp_path / "out-heads" / name / "best.safetensors").write_text("not of a run")
    assert call(*given, "--restart").code == 0 and runs[-1].fresh and runs[-2].fresh
    for name in ("patches-x", "patches-7", "others"):
        assert (tmp_path / "out-heads" / name / "best.safetensors").exists()

    begun = len(runs)
    found = call(*given, "--train", tmp_path / "folders", "--kind", "wsol", "--restart")
    assert found.code == 2 and "image_ids.txt" in found.err and len(runs) == begun
    found = call(*given, "--seeds", 0, "--restart")
    assert found.code == 2 and len(runs) == begun and (tmp_path / "out-heads" / "patches-0" / "run.json").exists()
