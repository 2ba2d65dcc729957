"""What a run leaves in its folder: after a kill, on a full disk, when files are gone; and what its numbers say."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

import molt
from molt._files import alone_in, remove_parts, save_tensors
from molt.data import read_set
from molt.training import Recipe, TrainingError, run_files, train
from molt.training.augment import find_augmentation, view
from molt.training.checkpoints import read_state
from molt.training.setup import gather_photos

TINY = Recipe(name="tiny", model="molt_deit_tiny", sizes=((32, 32),), shared=True, epochs=2, batch=5, lr=3e-3)
MODELS = (run_files.BEST, run_files.LAST)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen photos of two classes."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(13):
        place = root / ("blue", "red")[number % 2]
        place.mkdir(exist_ok=True)
        pixels = rng.integers(0, 255, (40, 44, 3)).astype(np.uint8)
        pixels[5:30, 5:30] = ((20, 30, 220), (220, 30, 20))[number % 2]
        PIL.Image.fromarray(pixels).save(place / f"{number:02d}.png")
    return root


def go(folder: Path, out: Path, recipe: Recipe = TINY, **options: Any) -> Any:
    options = {"pretrained": False, "val_share": 0.2, "device": "cpu"} | options
    return train(read_set(folder), out, recipe=recipe, **options)


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def about(out: Path) -> Any:
    return json.loads((out / run_files.RUN).read_text())


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@pytest.mark.parametrize("epochs", [1, 2])
def test_run_json_is_whole_after_a_kill_behind_the_last_state(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    original = run_files._summary

    def stop(run: Any) -> Any:
        if run.epoch == epochs:
            raise Killed
        return original(run)

    monkeypatch.setattr(run_files, "_summary", stop)
    with pytest.raises(Killed):
        go(folder, tmp_path / "run", TINY.change(epochs=epochs))
    monkeypatch.setattr(run_files, "_summary", original)
    found = go(folder, tmp_path / "run", TINY.change(epochs=epochs), resume=True)
    assert len(found.history) == epochs and about(found.folder)["history"] == found.history
    assert about(found.folder)["best"]["epoch"] == found.best_epoch


def test_models_that_are_gone(folder: Path, tmp_path: Path) -> None:
    """Those of the state's own epoch are written again; a best one of an earlier epoch is asked for."""
    found = go(folder, tmp_path / "run")
    before = files(found.folder)
    assert found.best_epoch == 2, "the last epoch is the best here"
    for name in MODELS:
        (found.folder / name).unlink()
    again = go(folder, tmp_path / "run", resume=True)
    assert again.best.is_file() and again.last.is_file()
    assert files(found.folder) == before

    worse = TINY.change(lr=3.0, schedule="constant")
    found = go(folder, tmp_path / "worse", worse)
    assert found.best_epoch == 1, "the rate is far too high"
    (found.folder / run_files.LAST).unlink()
    go(folder, tmp_path / "worse", worse, resume=True)
    assert found.last.is_file()
    found.best.unlink()
    with pytest.raises(TrainingError, match=r"best.safetensors is gone, the model of epoch 1, .*: put the file back"):
        go(folder, tmp_path / "worse", worse, resume=True)


@pytest.mark.parametrize("full", [run_files.STATE, run_files.BEST, run_files.LAST])
def test_a_full_disk_leaves_one_epoch_and_a_resume_ends_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    whole = go(folder, tmp_path / "whole")
    first: dict[str, bytes] = {}
    names = ("write_state", "save_model")
    originals = {name: getattr(run_files, name) for name in names}
    out = tmp_path / "run"

    def failing(name: str) -> Any:
        def write(*arguments: Any) -> None:
            path = next(one for one in arguments if isinstance(one, Path))
            if first and path.name == full:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            originals[name](*arguments)

        return write

    for name in names:
        monkeypatch.setattr(run_files, name, failing(name))
    with pytest.raises(OSError, match="No space left"):
        go(folder, out, on_event=lambda kind, values: first.update(files(out)) if kind == "epoch" else None)
    for name in names:
        monkeypatch.setattr(run_files, name, originals[name])
    left = files(out)
    if full == run_files.STATE:
        assert left == first, "all are of the first epoch"
    assert left[run_files.RUN] == first[run_files.RUN]
    assert read_state(out / run_files.STATE)[1]["epoch"] == (1 if full == run_files.STATE else 2)
    for name in MODELS:
        assert molt.load_model(out / name).trained
    resumed = go(folder, out, resume=True)
    assert [(out / name).read_bytes() for name in MODELS] == [one.read_bytes() for one in (whole.best, whole.last)]
    assert resumed.best_epoch == whole.best_epoch and about(out)["history"] == resumed.history


KILLED = """
import os, signal, sys
from pathlib import Path
from molt._files import save_tensors, whole_file
if sys.argv[2] == "tensors":
    import torch, safetensors.torch
    def half(tensors, path, metadata=None):
        Path(path).with_name(".tmpAbCdEf").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    safetensors.torch.save_file = half
    save_tensors(Path(sys.argv[1]) / "state.safetensors", {"a": torch.zeros(3)})
with whole_file(Path(sys.argv[1]) / "run.json") as part:
    part.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_write_left_goes_at_the_next_start(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for what in ("tensors", "text"):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
        done = subprocess.run([sys.executable, "-c", KILLED, str(out), what], env=environment, timeout=60, check=False)
        assert done.returncode == -signal.SIGKILL
    left = [path for path in out.rglob("*") if path != out]
    assert len([path for path in left if path.parent == out]) == 3 and len(left) == 4
    for path in left:  # as it is to a process that begins later
        os.utime(path, (0, 0))
    kept = [".abcd1234.part", ".tmpAbCdEf", "mine.part", ".notours-12.part"]
    for name in kept:
        (out / name).write_text("being written, or not ours")
    (out / ".abcdefgh.part").symlink_to(folder)
    os.utime(out / ".tmpAbCdEf", (0, 0))
    go(folder, out, TINY.change(epochs=1))
    wanted = {*kept, ".abcdefgh.part", run_files.STATE, run_files.RUN, *MODELS}
    assert {path.name for path in out.iterdir()} == wanted
    assert len(list(folder.rglob("*.png"))) == 13
    remove_parts(tmp_path / "nowhere")


def test_tensors_are_written_whole_and_alone(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a" / "x.safetensors", {"a": torch.ones(3)}, {"b": "c"})
    mask = os.umask(0)
    os.umask(mask)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.safetensors"]
    assert (tmp_path / "a" / "x.safetensors").stat().st_mode & 0o777 == 0o666 & ~mask


def test_the_held_out_loss_is_the_cross_entropy_alone(folder: Path, tmp_path: Path) -> None:
    recipe = TINY.change(head="spatial", epochs=1, lr=1e-12)
    changes = ({"spatial_weight": 0.0}, {"spatial_weight": 5.0}, {"spatial_weight": 0.0, "label_smoothing": 0.5})
    found = [go(folder, tmp_path / str(i), recipe.change(**change)) for i, change in enumerate(changes)]
    entries = [one.history[0] for one in found]
    assert len({round(entry["loss"], 4) for entry in entries}) == 3, "what is lowered differs"
    assert len({round(entry["val_loss"], 6) for entry in entries}) == 1
    photos = gather_photos(read_set(folder), None, 0.2, 0)
    model = molt.load_model(found[1].last)
    plain = find_augmentation("none")
    pixels = torch.stack([view(photos.samples[i].path, (32, 32), plain, seed=0, epoch=0, index=i) for i in photos.held])
    labels = torch.tensor([photos.samples[i].label for i in photos.held])
    with torch.no_grad():
        logits = model.scale_logits(pixels)[0]
    assert entries[1]["val_loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-5)


def test_what_features_took_is_kept_over_a_resume(folder: Path, tmp_path: Path) -> None:
    began: list[dict[str, Any]] = []

    def stop(kind: str, values: dict[str, Any]) -> None:
        if kind == "begin":
            began.append(values)
        if kind == "epoch" and values["epoch"] == 1:
            raise Killed

    with pytest.raises(Killed):
        go(folder, tmp_path / "run", on_event=stop)
    took = about(tmp_path / "run")["feature_seconds"]
    assert took > 0 and about(tmp_path / "run")["feature_photos"] == 13
    found = go(folder, tmp_path / "run", resume=True)
    assert found.feature_seconds == took == about(found.folder)["feature_seconds"]
    assert about(found.folder)["feature_photos"] == 13
    other = go(folder, tmp_path / "other", on_event=stop_not(began))
    assert other.feature_seconds == 0 == about(other.folder)["feature_photos"], "another run's features are found"
    assert [(one["kept"], one["head"], one["held"]) for one in began] == [(True, "patches", 3)] * 2
    go(folder, tmp_path / "live", TINY.change(epochs=1, head="spatial"), on_event=stop_not(began))
    assert (began[-1]["kept"], began[-1]["head"]) == (False, "spatial")


def stop_not(began: list[dict[str, Any]]) -> Any:
    return lambda kind, values: began.append(values) if kind == "begin" else None


def features_of(out: Path) -> int:
    return int(about(out)["feature_photos"])


def test_features_are_shared_between_runs(folder: Path, tmp_path: Path, weights_cache: Path) -> None:
    go(folder, tmp_path / "first")
    for number, change in enumerate(({"val_share": 0.3}, {"recipe": TINY.change(lr=1e-2, pooling="mean", epochs=1)})):
        go(folder, tmp_path / str(number), **change)
        assert features_of(tmp_path / str(number)) == 0
    (room,) = (weights_cache / "features").iterdir()
    assert room.name.startswith(folder.name), "whose they are can be seen"
    go(folder, tmp_path / "sizes", TINY.change(sizes=((48, 48),)))
    assert features_of(tmp_path / "sizes") == 13
    # Other photos of the same names, sizes in bytes and times, as unpacked archives have them.
    other = tmp_path / "other photos"
    shutil.copytree(folder, other)
    go(other, tmp_path / "elsewhere")
    assert features_of(tmp_path / "elsewhere") == 13
    go(folder, tmp_path / "own", cache=tmp_path / "features")
    assert features_of(tmp_path / "own") == 13 and (tmp_path / "features").is_dir()
    assert not any((tmp_path / name / "features").exists() for name in ("first", "own"))


def test_a_format_that_is_known_later_is_tried_again(folder: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(folder, photos)
    (photos / "red" / "x.png").write_bytes(b"MINE")
    assert [name for name, _ in go(photos, tmp_path / "before").skipped] == ["red/x.png"]

    def read(file: Any, _: str) -> PIL.Image.Image:
        return PIL.Image.new("RGB", (40, 44)) if file.read(4) == b"MINE" else PIL.Image.open(os.devnull)

    PIL.Image.register_open("MINE", read, lambda start: start.startswith(b"MINE"))
    try:
        found = go(photos, tmp_path / "after")
    finally:
        PIL.Image.ID.remove("MINE")
        del PIL.Image.OPEN["MINE"]
    assert features_of(tmp_path / "after") == 14 - len(found.skipped) > 0


def test_features_stay_with_the_run_where_the_shared_folder_cannot_be_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOLT_CACHE", str(tmp_path / "file"))
    go(folder, tmp_path / "run")
    assert (tmp_path / "run" / "features").is_dir() and features_of(tmp_path / "run") == 13
    (line,) = [record.getMessage() for record in caplog.records if "features are kept" in record.getMessage()]
    assert str(tmp_path / "run" / "features") in line and "for this run alone" in line and "file is a file" in line


def test_an_out_that_cannot_be_used_is_told_before_the_networks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molt.training.loop.build_model", None)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", Path("/proc/molt/run")):
        with pytest.raises(OSError, match=f"^{out}: the folder cannot be made"):
            go(folder, out)
    with alone_in(tmp_path / "run"), pytest.raises(BlockingIOError, match="run: another run is writing in this folder"):
        go(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()
