"""What every command does about its outputs and its user's patience: progress, folders that cannot be had, two runs."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from molt._files import alone_in, check_writable, whole_file
from molt.cli import main
from molt.cli._progress import EVERY, Progress
from molt.cli.train import Display

ROOT = Path(__file__).parents[1]


def call(*arguments: object) -> SimpleNamespace:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return SimpleNamespace(code=int(stopped.value.code or 0), out=out.getvalue(), err=err.getvalue())


@pytest.fixture
def clock() -> SimpleNamespace:
    """Seconds that go by when they are told to; the thread that looks at them is asked by hand."""
    return SimpleNamespace(now=100.0)


def test_a_line_every_20_seconds_where_there_is_no_terminal(
    clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(clock=lambda: clock.now)
    said: list[str] = []

    def wait(seconds: float) -> None:
        for _ in range(round(seconds)):
            clock.now += 1
            progress.tick()
            said.extend(capsys.readouterr().err.splitlines())

    wait(100)
    assert not said, "nothing to tell yet"
    clock.now = progress._last = 200.0
    progress.show("loading the networks")
    wait(41)
    assert said == ["loading the networks, 20 s so far", "loading the networks, 40 s so far"]
    for done in range(5):
        progress.show("localizing", done, 9, "photos")
        wait(10)
    assert said[2:] == ["localizing: 1 of 9 photos, 152 s left", "localizing: 3 of 9 photos, 78 s left"]
    said.clear()
    progress.show("fitting", 7, 400, "steps", "loss 1.5")
    wait(21)
    assert said == ["fitting: 7 of 400 steps, loss 1.5, 9 s so far"], "what was done before does not tell the speed"
    assert EVERY == 20 and capsys.readouterr().out == ""


def test_the_lines_come_by_themselves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("molt.cli._progress.EVERY", 0.0)
    for quiet in (True, False):
        with Progress(quiet=quiet) as progress:
            progress.show("downloading")
            end = time.monotonic() + (1.2 if quiet else 20)
            err = ""
            while not err and time.monotonic() < end:
                time.sleep(0.05)
                err = capsys.readouterr().err
        assert err.startswith("downloading, ") != quiet
    time.sleep(1.1)
    capsys.readouterr()
    time.sleep(1.1)
    assert capsys.readouterr().err == "", "none after the end"


def test_colours_that_are_forced_are_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert Progress().lines and not Progress(quiet=True).lines


def test_training_says_how_far_it_is(clock: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(quiet=False)
    display.progress._clock = lambda: clock.now
    display.progress._last = clock.now
    for done in (0, 2, 4):
        display("features", {"done": done, "total": 4})
        clock.now += 5
    step = {"epoch": 2, "epochs": 3, "steps": 10, "loss": 1.0, "accuracy": 0.5}
    for number in (1, 2):
        display("step", step | {"step": number})
        clock.now += 30
        display.progress.tick()
    assert capsys.readouterr().err.splitlines() == [
        "features: 0 of 4 photos and views, 0 s so far",
        "features: 4 of 4 photos and views, 0 s left",
        "training: 11 of 30 steps, epoch 2/3, loss 1.000, accuracy 0.50, 30 s so far",
        "training: 12 of 30 steps, epoch 2/3, loss 1.000, accuracy 0.50, 1080 s left",
    ]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with photos of two classes; whatever would load a network fails."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        for number in range(3):
            (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (40, 44, 3)).astype(np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    boxes = tmp_path / "boxes"
    boxes.mkdir()
    rows = {"image_ids": "", "class_labels": ",0", "image_sizes": ",44,40", "localization": ",1,1,20,20"}
    for key, rest in rows.items():
        (boxes / f"{key}.txt").write_text(f"cat/0.png{rest}\n")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("a network was loaded")

    for name in (
        "localizer.Localizer.__init__",
        "training.loop.build_model",
        "training.convert.convert_checkpoint",
        "clustering.fitting._Photos",
        "cli._map_providers.provider",
        "benchmark.ablation._checkpoints",
    ):
        monkeypatch.setattr(f"molt.{name}", no_network)
    return tmp_path


SET = ("boxes", "--photos", "photos", "--classes", "classes.txt")
COMMANDS = {
    "localize": ("localize", "photos"),
    "train": ("train", "photos", "--device", "cpu"),
    "evaluate": ("evaluate", *SET, "--method", "cam"),
    "evaluate, two methods": ("evaluate", *SET, "--method", "cam", "--method", "centre"),
    "ablate": ("ablate", *SET, "--no-plots"),
    "fit-clusters": ("fit-clusters", "photos", "--device", "cpu"),
}
FILES = {"fit-clusters", "convert", "benchmark", "--csv", "--latex"}  # whose output is a file
OTHERS = {
    "demo": ("demo", "--out"),
    "benchmark": ("benchmark", "fuse_maps", "--device", "cpu", "--out"),
    "benchmark --end-to-end": ("benchmark", "--end-to-end", "--device", "cpu", "--out"),
    "benchmark --methods": ("benchmark", "--methods", *SET, "--device", "cpu", "--out"),
    "convert": ("convert", "file"),
    "--cache": ("localize", "photos", "--cache"),
    "--annotations-to": ("localize", "photos", "--annotations", "voc", "--annotations-to"),
    "--save-maps": ("evaluate", *SET, "--method", "cam", "--save-maps"),
    "--csv": ("evaluate", *SET, "--method", "cam", "--csv"),
    "--latex": ("evaluate", *SET, "--method", "cam", "--latex"),
    "--cache of train": ("train", "photos", "--device", "cpu", "--out", "run", "--cache"),
}
ALL = {name: (*command, "--out") for name, command in COMMANDS.items()} | OTHERS


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("place", ["file/out", "/proc/molt/out", "/sys/molt-out"])
def test_an_output_that_cannot_be_written_is_told_before_a_network(here: Path, name: str, place: str) -> None:
    before = sorted(here.rglob("*"))
    done = call(*ALL[name], place)
    assert done.code in (1, 2) and done.out == ""
    assert done.err.count("\n") == 1 and place.rsplit("/", 1)[0] in done.err, done.err
    assert "cannot be" in done.err or "file where a folder is needed" in done.err
    option = ALL[name][-1] if name != "convert" else "OUT"
    assert option in done.err or name == "--cache of train", "which option it was"
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("name", [name for name in ALL if name not in FILES])
def test_a_file_in_the_place_of_a_folder_is_a_wrong_option(here: Path, name: str) -> None:
    done = call(*ALL[name], "file")
    assert done.code == 2 and "file" in done.err and done.err.count("\n") == 1, done.err
    assert (here / "file").read_text() == ""


def test_no_permission_is_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    (here / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.NamedTemporaryFile", refuse)
        done = call("localize", "photos", "--out", "out")
    assert (done.code, done.err) == (1, "molt: --out out: cannot be written (Permission denied)\n")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        done = call("localize", "photos", "--out", "new")
    assert (done.code, done.err) == (1, "molt: --out new: the folder cannot be made (Permission denied)\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_second_run_into_the_same_out_is_told(here: Path, name: str) -> None:
    folder = name not in FILES
    with alone_in(Path("out"), folder=folder):
        done = call(*COMMANDS[name], "--out", "out")
        assert done.code == 1 and done.err.count("\n") == 1, done.err
        assert "out: another run is writing" in done.err
        with pytest.raises(AssertionError, match="a network was loaded"):
            main([*COMMANDS[name], "--out", "other"])
    with pytest.raises(AssertionError, match="a network was loaded"):
        main([*COMMANDS[name], "--out", "out"])
    assert not list(here.glob("*out*")) and not list(here.glob(".*")), "no lock is left"


def test_runs_into_the_usual_folder_are_told_too(here: Path) -> None:
    with alone_in(Path("molt-out")):
        assert "molt-out: another run is writing in this folder" in call("localize", "photos").err
    with alone_in(Path("molt-evaluation") / "boxes-cam"):
        assert "boxes-cam: another run is writing" in call(*COMMANDS["evaluate"]).err


HOLD = """
import os, sys, time
from pathlib import Path
from molt._files import alone_in
with alone_in(Path(sys.argv[1]), folder=sys.argv[2] == "folder"):
    if os.fork() == 0:  # as a worker that reads photos, and outlives its parent
        print("held", flush=True)
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_lock_goes_with_its_process_however_it_ends(tmp_path: Path, kind: str) -> None:
    place, folder = tmp_path / "out", kind == "folder"
    command = [sys.executable, "-c", HOLD, str(place), kind]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env=environment, text=True, start_new_session=True
    ) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            with pytest.raises(BlockingIOError, match="another run is writing"), alone_in(place, folder=folder):
                pass
            os.kill(holder.pid, signal.SIGKILL)
            os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
            with alone_in(place, folder=folder):
                pass
        finally:
            os.killpg(holder.pid, signal.SIGKILL)


def test_a_disk_without_locks_lets_all_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_lock(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("molt._files.fcntl.flock", no_lock)
    with alone_in(tmp_path / "out"), alone_in(tmp_path / "out"), alone_in(None):
        (tmp_path / "out" / "x").write_text("")
    assert (tmp_path / "out" / "x").is_file()


def test_what_is_tried_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    check_writable(tmp_path / "c" / "d.json", folder=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(IsADirectoryError, match=f"^{tmp_path}: is a folder, expected a file$"):
        check_writable(tmp_path, folder=False)


def test_a_device_or_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe: is a device, pipe or socket"):
        check_writable(tmp_path / "pipe", folder=False)
    with pytest.raises(OSError, match="is a device, pipe or socket"), whole_file(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("module", ["molt", "molt.cli"])
def test_runs_as_a_module(module: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("molt "), done.stderr
