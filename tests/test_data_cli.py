"""`molt data check`: what it prints, and its exit codes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest


def photo(path: Path, size: tuple[int, int] = (60, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", size, "teal").save(path)
    return path


def wsol(folder: Path, **files: str) -> Path:
    """Write a split of two photos; files of that name take the place of the right ones."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "image_ids": "a/1.jpg\nb/2.jpg",
        "class_labels": "a/1.jpg,0\nb/2.jpg,1",
        "image_sizes": "a/1.jpg,60,40\nb/2.jpg,30,20",
        "localization": "a/1.jpg,1,2,30,20\nb/2.jpg,0,0,30,20\na/1.jpg,5,6,7,8",
    }
    for name, text in (texts | files).items():
        (folder / f"{name}.txt").write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def good(root: Path, **files: str) -> Path:
    """Write a wsol set with its two photos in root/photos."""
    photo(root / "photos" / "a" / "1.jpg", (60, 40))
    photo(root / "photos" / "b" / "2.jpg", (30, 20))
    return wsol(root / "meta", **files)


def call(*arguments: object) -> SimpleNamespace:
    """Run `molt` in this process, as its entry point does."""
    from molt.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return SimpleNamespace(code=stopped.value.code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


def test_a_good_set(tmp_path: Path, wide: None) -> None:
    result = call("data", "check", good(tmp_path), "--photos", tmp_path / "photos", "--deep", "--num-classes", 2)
    assert result.code == 0 and result.err == ""
    for word in ("wsol", "photos", "smallest class", "a: 1", "boxes", f"{tmp_path / 'meta'}: no problems"):
        assert word in result.out


def test_problems_are_shown_up_to_the_limit(tmp_path: Path, wide: None) -> None:
    good(tmp_path, localization="a/1.jpg,1\na/1.jpg,2\nb/2.jpg,3")
    command = ("data", "check", tmp_path / "meta", "--photos", tmp_path / "photos")
    result = call(*command, "--limit", 2)
    file = tmp_path / "meta" / "localization.txt"
    assert result.code == 1
    assert result.out.startswith(f"{file}:1: 'a/1.jpg,1' (expected path,x0,y0,x1,y1)\n{file}:2: ")
    assert f"{file}:3: " not in result.out and "... and 1 more; --limit 0 shows all" in result.out
    assert f"{tmp_path / 'meta'}: 3 problems" in result.out
    result = call(*command, "--limit", 0)
    assert f"{file}:3: " in result.out and "more;" not in result.out


def test_json(tmp_path: Path) -> None:
    good(tmp_path, localization="a/1.jpg,1,2,3,4\nb/2.jpg,3,4,99,5\nb/2.jpg,3,4,5,4")
    result = call("data", "check", tmp_path / "meta", "--photos", tmp_path / "photos", "--json", "--limit", 1)
    record = json.loads(result.out)
    assert result.code == 1 and result.out.count("\n") == 1
    assert (record["kind"], record["photos"], record["classes"], record["boxes"]) == ("wsol", 2, 2, 3)
    assert record["problems"] == 2 and record["smallest_class"] == {"name": "a", "samples": 1}
    (shown,) = record["shown"]
    assert shown["file"] == str(tmp_path / "meta" / "localization.txt") and shown["line"] == 2
    assert "reaches out" in shown["message"] and shown["expected"].startswith("edges")


def test_classes_file(tmp_path: Path, wide: None) -> None:
    good(tmp_path)
    names = tmp_path / "names.txt"
    names.write_text("wren\nrobin\n")
    command = ("data", "check", tmp_path / "meta", "--photos", tmp_path / "photos", "--classes", names)
    result = call(*command)
    assert result.code == 0 and "wren: 1" in result.out
    names.write_text("wren\n\nrobin")
    result = call(*command)
    assert result.code == 2 and "a blank line" in result.err
    names.unlink()
    assert call(*command).code == 2


def test_wrong_options(tmp_path: Path) -> None:
    result = call("data", "check", wsol(tmp_path))
    assert result.code == 2 and "photos: the wsol layout" in result.err
    result = call("data", "check", tmp_path, "--kind", "imagenet")
    assert result.code == 2 and "kind must be one of auto, folder, wsol, voc, coco, yolo" in result.err
    assert call("data", "check", tmp_path, "--num-classes", 0).code == 2
    assert call("data", "check").code == 2
    assert call("data", "chekc").code == 2


def test_what_is_not_recognised(tmp_path: Path, wide: None) -> None:
    result = call("data", "check", tmp_path)
    assert result.code == 1 and "no known layout" in result.out and "image_ids.txt" in result.out
    result = call("data", "check", tmp_path / "no")
    assert result.code == 1 and "no such file or folder" in result.out


def test_file_names_that_are_no_text(tmp_path: Path) -> None:
    photo(tmp_path / "cat" / "1.jpg")
    os.close(os.open(os.fsencode(tmp_path / "cat") + b"/\xff\n\x1b[b].jpg", os.O_CREAT | os.O_WRONLY))
    command = [sys.executable, "-m", "molt.cli", "data", "check", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 1 and "\\udcff  [b].jpg: the file is empty" in result.stdout
    result = call(*command[3:], "--json")
    assert json.loads(result.out)["problems"] == 1


def test_help() -> None:
    result = call("data")
    assert result.code == 0 and "check" in result.out
    result = call("data", "check", "--help")
    assert result.code == 0 and "--num-classes" in result.out
