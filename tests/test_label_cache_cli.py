"""`molt localize --cache`: what it prints where, and its exit codes."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from molt.cli.localize import expand

pytestmark = pytest.mark.usefixtures("own_folder")

HASH = "ab" * 32


def call(*arguments: object) -> SimpleNamespace:
    """Run `molt localize` in this process, as its entry point does."""
    from molt.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        main(["localize", *map(str, arguments)])
    return SimpleNamespace(code=stopped.value.code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A folder with one label map and one foreign file."""
    folder = tmp_path / "maps"
    (folder / "ab").mkdir(parents=True)
    (folder / "ab" / f"{HASH}.png").write_bytes(b"x" * 2**20)
    (folder / "notes.txt").write_text("mine")
    return folder


@pytest.fixture
def no_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong usage is told before a network is loaded."""

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a network was loaded")

    monkeypatch.setattr("molt.localizer.Localizer", loaded)


def test_clusters_are_computed_once(photo: Path, tmp_path: Path) -> None:
    options = (photo, "--weights", "weak", "--device", "cpu", "--cache", tmp_path / "maps")
    first = call(*options, "--out", tmp_path / "out", "--no-page")
    assert first.code == 0 and "clusters: 1 computed, 0 found" in first.err
    assert str(tmp_path / "maps") in " ".join(first.err.split()) and "computed, of" not in first.out
    second = call(*options, "--json")
    assert second.code == 0 and second.err == ""
    (line,) = second.out.splitlines()
    told = call(*options, "--json", "--profile")
    assert told.out == second.out and "clusters: 0 computed, 1 found" in told.err
    bare = call(photo, "--weights", "weak", "--device", "cpu", "--json")
    assert bare.out == second.out and json.loads(line)["path"] == str(photo)
    emptied = call(*options, "--json", "--profile", "--cache-clear")
    assert emptied.code == 0 and emptied.out == second.out
    assert "1 file of " in emptied.err and " KiB removed" in emptied.err and "clusters: 1 computed" in emptied.err
    assert len(list((tmp_path / "maps").glob("??/*.png"))) == 1


@pytest.mark.usefixtures("no_networks")
def test_clear_alone(kept: Path) -> None:
    done = call("--cache-clear", "--cache", kept)
    assert done.code == 0 and done.out == "" and "1 file of 1024 KiB removed" in done.err and str(kept) in done.err
    assert [entry.name for entry in kept.iterdir()] == ["notes.txt"]
    again = call("--cache-clear", "--cache", kept, "--json")
    assert again.code == 0 and again.out == "" and "0 files" in again.err
    gone = call("--cache-clear", "--cache", kept / "none")
    assert gone.code == 0 and not (kept / "none").exists()


@pytest.mark.usefixtures("no_networks")
def test_wrong_usage(photo: Path, kept: Path) -> None:
    for arguments, told in (
        ((photo, "--cache", photo), "is a file"),
        (("--cache-clear", "--cache", photo), "is a file"),
        (("--cache-clear",), "--cache DIR"),
        ((photo, "--cache-clear"), "--cache DIR"),
        (("--cache", kept), "PATH"),
        ((), "PATH"),
        ((photo, "--cache"), "--cache"),
    ):
        done = call(*arguments)
        assert done.code == 2 and told in done.err and done.out == "", (arguments, done.err)
        assert len(done.err.splitlines()) == 1
    assert (kept / "ab" / f"{HASH}.png").exists()


def test_wrong_options_leave_the_maps(photo: Path, kept: Path) -> None:
    assert call(photo, "--cache", kept, "--cache-clear", "--method", "none").code == 2
    assert (kept / "ab" / f"{HASH}.png").exists()


@pytest.mark.usefixtures("no_networks")
def test_a_map_that_cannot_be_removed(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    done = call("--cache-clear", "--cache", kept)
    assert done.code == 1 and str(kept) in done.err and "Permission denied" in done.err


def test_label_maps_are_no_photos(photo: Path, kept: Path, tmp_path: Path) -> None:
    assert [item.path for item in expand([tmp_path], None, kept)] == [photo]
    assert [item.path for item in expand([tmp_path], None, tmp_path / "maps" / ".." / "maps")] == [photo]
    assert len(expand([tmp_path], None)) == 2
