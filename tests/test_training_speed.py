"""benchmarks/training_speed.py in its smallest form."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from molt.data import read_set
from molt.training import run, train

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = [
    "--model",
    "molt_deit_tiny",
    "--size",
    "32",
    "--photos",
    "4",
    "--loop-photos",
    "4",
    "--rounds",
    "1",
    "--batch",
    "2",
]


@pytest.fixture(scope="module")
def speed() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("training_speed")
    sys.path.remove(str(BENCHMARKS))


def test_every_part_is_measured(
    speed: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    saved, entry = run.Run._save_epoch, run.Run._entry
    file = tmp_path / "training_speed.json"
    speed.main([*SMALL, "--kept", "7", "--epochs", "2", "--json", str(file)])
    found = json.loads(file.read_text())
    assert {"schema", "device", "threads", "versions", "commit", "date", "settings", "targets"} <= found.keys()
    assert [row["precision"] for row in found["features"]] == ["no", "bf16"]
    for row in found["features"]:
        assert row["photos"] == 4 and row["batch"] == 2 and row["sizes"] == [32]
        assert row["ratio"] == pytest.approx(row["molt_s"] / row["bare_s"]) and row["bare_s"] > 0
        stages = dict(row["stages_s"])
        stages.pop("attention")  # a difference
        assert len(stages) == 5 and min(stages.values()) > 0
    assert [row["provider"] for row in found["heads"]] == ["molt", "molt, nothing saved", "bare loop"]
    for row in found["heads"]:
        assert row["photos_per_s"] == pytest.approx(7 * 2 / row["loop_s"]) and row["call_s"] >= row["loop_s"]
    assert found["heads"][-1]["ratio"] == 1
    loop = {row["provider"]: row for row in found["loop"]}
    assert list(loop) == ["molt", "bare loop, same network", "plain timm"]
    assert loop["molt"]["save_s"] > 0 and loop["plain timm"]["ratio_timm"] == 1
    assert loop["molt"]["ratio"] == pytest.approx(
        loop["molt"]["photos_per_s"] / loop["bare loop, same network"]["photos_per_s"]
    )
    printed = capsys.readouterr().out
    assert "features" in printed and "x bare loop" in printed
    assert (run.Run._save_epoch, run.Run._entry) == (saved, entry), "what was patched is put back"


def test_json_alone_on_standard_output(speed: ModuleType, capsys: pytest.CaptureFixture[str], one_thread: None) -> None:
    speed.main([*SMALL, "--parts", "features", "--json", "-"])
    found = json.loads(capsys.readouterr().out)
    assert len(found["features"]) == 2 and "heads" not in found and "loop" not in found
    with pytest.raises(SystemExit):
        speed.main(["--photos", "0"])
    assert "--photos must be at least 1" in capsys.readouterr().err


def test_photos_are_spread_over_a_folder(speed: ModuleType, tmp_path: Path) -> None:
    data = read_set(speed.make_photos(tmp_path / "photos", 20, side=16))
    some = speed.spread(data, 10)
    assert len({sample.label for sample in some.samples}) == len(data.classes) == 10
    assert len(speed.spread(data, 50).samples) == 20
    given = argparse.Namespace(workers=3)
    assert speed.find_workers(given.workers, "cuda", 64, 448) == 3
    assert speed.find_workers(None, "cpu", 64, 448) == 0
    assert 0 <= speed.find_workers(None, "cuda", 64, 448) <= speed.MOST_WORKERS


def test_what_is_timed_is_what_train_does(speed: ModuleType, tmp_path: Path, one_thread: None) -> None:
    """Heads are trained on the features that were made up, not on others computed in their place."""
    parts = importlib.import_module("training_speed_parts")
    events: list[str] = []

    def watched(*args: object, **options: object) -> object:
        return train(*args, **options, on_event=lambda kind, values: events.append(kind))  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "train", watched)
        parts.time_heads(
            parts.Setting(parts.torch.device("cpu"), tmp_path, 1),
            name="molt_deit_tiny",
            sizes=(32,),
            epochs=2,
            photos=7,
        )
    assert "features" not in events and "bad" not in events and events.count("epoch") == 8
    assert list(tmp_path.iterdir()) == [], "and nothing is left"
