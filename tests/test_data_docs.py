"""docs/data.md: its example runs, its commands have the options that are there."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
from pathlib import Path

import PIL.Image
import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_examples_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading, writing = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(writing, {})
    written = [(tmp_path / name).read_text() for name in ("found.json", "again.json")]
    assert written[0] == written[1] and '"cat"' in written[0] and not (tmp_path / "pets").exists()
    exec(reading, {})
    assert capsys.readouterr().out.startswith("folder 6 ('cat', 'cup') [3, 3]\n")
    shutil.rmtree(tmp_path / "pets")
    for name in ("cat", "dog"):
        (tmp_path / "pets" / "test" / name).mkdir(parents=True)
        PIL.Image.new("RGB", (9, 9)).save(tmp_path / "pets" / "test" / name / "1.jpg")
    exec(reading, {})
    assert capsys.readouterr().out.startswith("folder 2 ('cat', 'dog') [1, 1]\n"), "one's own photos"


def test_the_commands_have_right_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from molt.cli import main

    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^molt (data check .*)$", PAGE, re.M)
    assert len(commands) == 12
    for command in commands:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), pytest.raises(SystemExit) as stopped:
            main(shlex.split(command, comments=True))
        assert stopped.value.code == 1 and "no such file or folder" in out.getvalue(), command
