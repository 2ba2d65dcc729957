"""Composites: exact masks and boxes, splits that share nothing, the same bytes again, and errors that say what came."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import shutil
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SIZE = 64
COUNTS = ["--train", "6,4", "--val", "3", "--test", "4,8"]


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def disc(width: int, height: int, colour: tuple[int, int, int], hidden: tuple[int, int, int] = (0, 255, 0)) -> Any:
    """RGBA: an ellipse with a soft rim, another colour where it is transparent."""
    y, x = np.mgrid[:height, :width]
    radius = np.hypot((x - (width - 1) / 2) / (width / 2 - 2), (y - (height - 1) / 2) / (height / 2 - 2))
    alpha = np.clip((1.05 - radius) * 2000, 0, 255).astype(np.uint8)
    pixels = np.where(alpha[..., None] > 0, np.array(colour), np.array(hidden))
    return np.dstack([pixels, alpha]).astype(np.uint8)


def write_sources(folder: Path, cutouts: int = 6, backgrounds: int = 6) -> None:
    """Three classes of discs, and noise."""
    rng = np.random.default_rng(1)
    for which, name in enumerate(("apple", "bird", "car")):
        (folder / "cut" / name).mkdir(parents=True)
        for i in range(cutouts):
            colour = tuple(np.roll([250, 10 * i, 20], which))
            pixels = disc(30 + i, 40, colour)
            pixels[18:22, 5:9, :3] //= 2  # left and right differ
            PIL.Image.fromarray(pixels).save(folder / "cut" / name / f"{i}.png")
    (folder / "back").mkdir()
    for i in range(backgrounds):
        noise = rng.integers(90, 160, (SIZE + 10 * i, 100, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(folder / "back" / f"{i}.png")


def make(folder: Path, out: Path, *more: str) -> None:
    sources = ["--cutouts", str(folder / "cut"), "--backgrounds", str(folder / "back")]
    load("composites").main([str(out), *sources, "--size", str(SIZE), *COUNTS, *more])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("composites")
    write_sources(folder)
    make(folder, folder / "out")
    return folder


def lines(path: Path) -> list[list[str]]:
    return [line.split(",") for line in path.read_text().splitlines()]


def read_mask(path: Path) -> Any:
    values = np.asarray(PIL.Image.open(path))
    assert set(np.unique(values)) <= {0, 255}
    return values == 255


def extent(mask: Any) -> list[int]:
    ys, xs = np.nonzero(mask)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def digests(out: Path) -> dict[str, str]:
    files = [path for path in out.rglob("*") if path.is_file()]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("name", "number"),
    [("train-one", 6), ("train-two", 4), ("val-one", 3), ("val-two", 3), ("test-one", 4), ("test-two", 8)],
)
def test_metadata_and_files_agree(made: Path, name: str, number: int) -> None:
    out = made / "out"
    classes = (out / "classes.txt").read_text().split()
    assert classes == ["apple", "bird", "car"]
    boxes, masks = out / "metadata" / "boxes" / name, out / "metadata" / "masks" / name
    ids = [row[0] for row in lines(boxes / "image_ids.txt")]
    assert len(ids) == len(set(ids)) == number
    for table in (boxes, masks):
        assert [row[0] for row in lines(table / "image_ids.txt")] == ids
        assert [row[0] for row in lines(table / "localization.txt")] == ids
        assert [row[1:] for row in lines(table / "image_sizes.txt")] == [["64", "64"]] * number
        assert [classes[int(row[1])] for row in lines(table / "class_labels.txt")] == [Path(i).parent.name for i in ids]
    for (image, *box), (_, file, ignore) in zip(
        lines(boxes / "localization.txt"), lines(masks / "localization.txt"), strict=True
    ):
        with PIL.Image.open(out / "photos" / image) as photo:
            assert photo.size == (SIZE, SIZE) and photo.format == "JPEG"
        mask = read_mask(out / "masks" / file)
        assert mask.shape == (SIZE, SIZE) and [int(side) for side in box] == extent(mask)
        assert not read_mask(out / "masks" / ignore).any()


def test_photos_work_as_class_folders(made: Path) -> None:
    from torchvision.datasets import ImageFolder

    found = ImageFolder(made / "out" / "photos" / "train" / "one")
    assert found.classes == ["apple", "bird", "car"] and [label for _, label in found.samples] == [0, 0, 1, 1, 2, 2]


def test_splits_share_neither_cutouts_nor_backgrounds(made: Path) -> None:
    out = made / "out"
    report = json.loads((out / "composites.json").read_text())
    used: dict[str, set[str]] = {split: set() for split in ("train", "val", "test")}
    with (out / "objects.csv").open() as file:
        for row in csv.DictReader(file):
            allowed = {name for splits in report["cutouts"].values() for name in splits[row["split"]]}
            objects = {row["cutout"], row["distractor_cutout"]} - {""}
            assert len(objects) == 1 + (row["kind"] == "two") and objects <= allowed
            assert row["background"] in report["backgrounds"][row["split"]]
            assert row["cutout"].startswith(f"{row['class']}/") and row["class"] != row["distractor_class"]
            used[row["split"]] |= objects | {row["background"]}
    assert sum(map(len, used.values())) == len(set().union(*used.values()))
    for splits in (*report["cutouts"].values(), report["backgrounds"]):
        assert sorted(map(len, splits.values())) == [2, 2, 2] and len(set().union(*splits.values())) == 6


def test_two_objects_are_of_two_classes_and_about_as_large(made: Path) -> None:
    out = made / "out"
    knobs = load("composites_scene").Knobs()
    for name in ("train-two", "val-two", "test-two"):
        boxes, masks = out / "metadata" / "boxes" / name, out / "metadata" / "masks" / name
        rows = zip(
            lines(masks / "localization.txt"),
            lines(boxes / "class_labels.txt"),
            lines(boxes / "distractors.txt"),
            lines(masks / "distractors.txt"),
            strict=True,
        )
        for (_, file, _), (_, label), (image, other, *box), (same, again, other_file) in rows:
            assert image == same and other == again != label
            first, second = read_mask(out / "masks" / file), read_mask(out / "masks" / other_file)
            assert [int(side) for side in box] == extent(second)
            assert not (first & second).any()
            areas = sorted((first.sum(), second.sum()))
            assert areas[1] <= knobs.ratio * areas[0]
            assert areas[0] >= knobs.visible * knobs.area_two[0] * SIZE**2 * 0.9  # 0.9: softened rims
    assert not list((out / "masks").glob("*/one/**/*-distractor.png"))


def test_same_seed_same_bytes(made: Path, tmp_path: Path) -> None:
    make(made, tmp_path / "again")
    assert digests(tmp_path / "again") == digests(made / "out")
    make(made, tmp_path / "again", "--seed", "1", "--replace")
    assert (
        digests(tmp_path / "again")["photos/test/one/apple/00000.jpg"]
        != digests(made / "out")["photos/test/one/apple/00000.jpg"]
    )


def flat(value: int, shape: tuple[int, int] = (SIZE, SIZE)) -> Any:
    return load("composites_sources").Background(str(value), np.full((*shape, 3), value, np.uint8))


def cutout(pixels: Any, name: str = "a/0") -> Any:
    return load("composites_sources").Cutout(name, pixels, int((pixels[..., 3] >= 128).sum()))


def plain_knobs(**changes: Any) -> Any:
    return replace(load("composites_scene").Knobs(size=SIZE, match=0.0), **changes)


@pytest.mark.parametrize("seed", range(8))
def test_mask_is_the_alpha_that_was_pasted(seed: int) -> None:
    scene = load("composites_scene")
    thing = cutout(disc(37, 50, (200, 60, 30)))
    dark, light = (
        scene.compose(flat(value), [thing], plain_knobs(), np.random.default_rng(seed)) for value in (0, 255)
    )
    opacity = 255 - (light.pixels.astype(int) - dark.pixels)
    assert ((opacity >= 128).all(2) == dark.masks[0]).all() and (dark.masks[0] == light.masks[0]).all()
    assert 0 < dark.masks[0].sum() < SIZE**2
    assert ((opacity > 5) & (opacity < 250)).any(), "no soft rim"
    # The colour under transparency is green without red: it must not show at the rim.
    shown = dark.pixels.astype(int)
    assert (shown[..., 1] <= 0.4 * shown[..., 0] + 2).all()


@pytest.mark.parametrize("seed", range(8))
def test_of_two_objects_the_front_one_hides_the_other(seed: int) -> None:
    scene = load("composites_scene")
    things = [cutout(disc(40, 30, (255, 0, 0), (0, 0, 0))), cutout(disc(25, 44, (0, 0, 255), (0, 0, 0)), "b/0")]
    knobs = plain_knobs(overlap=0.5, visible=0.5, area_two=(0.15, 0.3))
    made = scene.compose(flat(0), things, knobs, np.random.default_rng(seed))
    red, blue = made.pixels[..., 0].astype(float), made.pixels[..., 2].astype(float)
    assert not (made.masks[0] & made.masks[1]).any()
    for front, back, front_mask, back_mask in ((red, blue, *made.masks), (blue, red, *made.masks[::-1])):
        if ((front >= 128) != front_mask).any():
            continue  # this one is behind
        through = np.where(front < 128, back / (1 - np.minimum(front, 127) / 255), 0)
        assert back_mask[through >= 131].all() and not back_mask[through <= 125].any()
        break
    else:
        pytest.fail("neither is in front")


def test_box_holds_its_pixels_as_edges() -> None:
    mask = np.zeros((5, 7), bool)
    mask[0, 0] = True
    assert load("composites_scene").box_of(mask) == (0, 0, 1, 1)
    mask[4, 6] = True
    assert load("composites_scene").box_of(mask) == (0, 0, 7, 5)


def test_objects_reach_beyond_the_frame_but_little() -> None:
    scene = load("composites_scene")
    knobs = plain_knobs(area_one=(0.1, 0.1))
    thing = cutout(disc(40, 40, (9, 9, 9)))
    masks = [scene.compose(flat(0), [thing], knobs, np.random.default_rng(i)).masks[0] for i in range(100)]
    areas = np.array([mask.mean() for mask in masks])
    assert areas.max() <= 0.101 and areas.min() >= 0.85 * 0.09
    boxes = np.array([scene.box_of(mask) for mask in masks])
    assert (boxes[:, :2] == 0).any() and (boxes[:, 2:] == SIZE).any()


def test_upscaling_is_limited() -> None:
    scene = load("composites_scene")
    small = cutout(disc(10, 10, (9, 9, 9)))
    knobs = plain_knobs(area_one=(1e-4, 1.0), feather=0.01)
    assert scene.largest_area(small, knobs) == pytest.approx(small.area * 1.75**2 / SIZE**2)
    areas = [scene.compose(flat(0), [small], knobs, np.random.default_rng(i)).masks[0].sum() for i in range(50)]
    assert max(areas) <= 1.1 * small.area * 1.75**2
    wide = cutout(disc(60, 20, (9, 9, 9)))
    assert scene.largest_area(wide, knobs) == pytest.approx(wide.area / 60**2)


def test_brightness_goes_towards_the_ground() -> None:
    scene = load("composites_scene")
    thing = cutout(disc(40, 40, (200, 200, 200)))
    means = {}
    for match in (0.0, 0.3):
        made = scene.compose(flat(20), [thing], plain_knobs(match=match), np.random.default_rng(0))
        means[match] = made.pixels[made.masks[0]].mean()
    assert means[0.0] - means[0.3] == pytest.approx(0.3 * 180, abs=4)


def test_no_room_says_which() -> None:
    scene = load("composites_scene")
    things = [cutout(disc(60, 60, (9, 9, 9)), name) for name in ("a/0", "b/1")]
    with pytest.raises(scene.NoRoom, match="a/0 and b/1"):
        scene.compose(flat(0), things, plain_knobs(area_two=(0.6, 0.6)), np.random.default_rng(0))


def test_unusable_files_are_skipped_and_listed(tmp_path: Path) -> None:
    write_sources(tmp_path)
    birds = tmp_path / "cut" / "bird"
    good = disc(40, 40, (1, 2, 3))
    PIL.Image.fromarray(good[..., :3]).save(birds / "plain.png")
    PIL.Image.fromarray(np.where([0, 0, 0, 1], good // 3, good)).save(birds / "thin_air.png")
    PIL.Image.fromarray(np.maximum(good, [0, 0, 0, 200]).astype(np.uint8)).save(birds / "full.png")
    PIL.Image.fromarray(disc(9, 9, (1, 2, 3))).save(birds / "tiny.png")
    PIL.Image.open(birds / "0.png").transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT).save(birds / "twin.png")
    (birds / "cut_short.png").write_bytes((birds / "1.png").read_bytes()[:300])
    (birds / "words.png").write_text("not a picture")
    PIL.Image.fromarray(np.zeros((SIZE - 1, 200, 3), np.uint8)).save(tmp_path / "back" / "narrow.png")
    (tmp_path / "back" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    make(tmp_path, tmp_path / "out")
    skipped = json.loads((tmp_path / "out" / "composites.json").read_text())["skipped"]
    reasons = {entry["file"]: entry["reason"] for entry in skipped}
    expected = {
        "cutouts/bird/plain.png": "no alpha channel",
        "cutouts/bird/thin_air.png": "nowhere 128",
        "cutouts/bird/full.png": "nothing is cut out",
        "cutouts/bird/tiny.png": "too small or thin",
        "cutouts/bird/twin.png": "same picture as bird/0.png",
        "cutouts/bird/cut_short.png": "cannot be read",
        "cutouts/bird/words.png": "cannot be read",
        "backgrounds/narrow.png": "200x63 pixels, expected at least 64",
        "backgrounds/broken.jpg": "",
    }
    assert reasons.keys() == expected.keys()
    for file, part in expected.items():
        assert part in reasons[file] and reasons[file], file


def test_too_few_is_an_error_that_names_what(tmp_path: Path) -> None:
    write_sources(tmp_path)
    (tmp_path / "cut" / "bird" / "0.png").write_text("spoilt")
    with pytest.raises(
        SystemExit, match=r"class 'bird': 5 can be used, at least 6 .* 1 skipped, cutouts/bird/0.png: cannot"
    ):
        make(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out" / "photos").exists()
    (tmp_path / "cut" / "bird" / "0.png").unlink()
    shutil.rmtree(tmp_path / "cut" / "bird")
    (tmp_path / "back" / "3.png").unlink()
    with pytest.raises(SystemExit, match="backgrounds: 5 can be used, at least 6 are needed"):
        make(tmp_path, tmp_path / "out")
    shutil.rmtree(tmp_path / "cut" / "car")
    with pytest.raises(SystemExit, match="1 class folders, expected at least 2"):
        make(tmp_path, tmp_path / "out")
    (tmp_path / "cut" / "a,b").mkdir()
    with pytest.raises(SystemExit, match="'a,b': a name without comma"):
        make(tmp_path, tmp_path / "out")
    for missing in ("back", "cut"):
        (tmp_path / "cut" / "a,b").rename(tmp_path / "cut" / "fine") if missing == "back" else None
        shutil.rmtree(tmp_path / missing)
        with pytest.raises(SystemExit, match=f"{missing} is not a folder"):
            make(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("stop", ["photos", "moving"])
def test_an_interrupted_run_can_be_repeated(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    composites, files = load("composites"), load("composites_files")
    out, calls = tmp_path / "out", []

    def interrupted(*given: Any) -> None:
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        (files.write_photo if stop == "photos" else rename)(*given)

    rename = Path.rename
    with monkeypatch.context() as patched:
        target = (composites, "write_photo") if stop == "photos" else (Path, "rename")
        patched.setattr(*target, interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(made, out)
    assert not (out / "composites.json").exists()
    make(made, out)
    assert digests(out) == digests(made / "out")


def test_what_is_there_stays(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "out", tmp_path / "whole")
    with pytest.raises(SystemExit, match="holds a whole set"):
        make(made, tmp_path / "whole")
    assert digests(tmp_path / "whole") == digests(made / "out")
    (tmp_path / "mine" / "photos").mkdir(parents=True)
    (tmp_path / "mine" / "photos" / "holiday.jpg").write_text("dear")
    for more in ([], ["--replace"]):
        with pytest.raises(SystemExit, match="photos, which is of no set"):
            make(made, tmp_path / "mine", *more)
    assert (tmp_path / "mine" / "photos" / "holiday.jpg").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="is a file"):
        make(made, tmp_path / "file")


def test_json_goes_to_stdout_alone(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(made, tmp_path / "out", "--json")
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out" / "composites.json").read_text())


@pytest.mark.parametrize(
    ("option", "value", "part"),
    [
        ("--train", "1,2,3", "two with a comma"),
        ("--val", "-1", "0 to 99999"),
        ("--size", "63", "64 to 2048"),
        ("--seed", "x", "integer"),
    ],
)
def test_options_out_of_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, part: str
) -> None:
    with pytest.raises(SystemExit):
        load("composites").main([str(tmp_path), "--fetch", f"{option}={value}"])
    assert part in capsys.readouterr().err


def test_no_photos_or_no_sources_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load("composites").main([str(tmp_path), "--fetch", "--train=0", "--val=0", "--test=0"])
    assert "at least one photo" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        load("composites").main([str(tmp_path), "--cutouts", str(tmp_path)])
    assert "or --fetch" in capsys.readouterr().err


def test_without_apt_the_error_says_what_to_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"apt-get is needed: .*or pass --cutouts DIR .* --backgrounds DIR"):
        load("composites").main([str(tmp_path / "out"), "--fetch"])


CONTENT = b"what the archive holds"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
URI = f"'http://deb.example/p/thing_1%3a2.deb' thing_1%3a2.deb {len(CONTENT)} SHA256:{DIGEST}\n"


def fake_apt(monkeypatch: pytest.MonkeyPatch, content: bytes = CONTENT, uri: str = URI, code: int = 0) -> list[str]:
    """Let apt-get say and download this; return the list that its calls are added to."""
    debian_files, calls = load("debian_files"), []

    def run(command: list[str], folder: str | None = None) -> CompletedProcess[str]:
        calls.append(" ".join(command[:2]))
        if "--print-uris" in command:
            return CompletedProcess(command, code, uri, "W: old\nE: Unable to locate package thing\n" if code else "")
        if command[0] == "dpkg-deb":
            return CompletedProcess(command, 0, "1:2\n", "")
        assert folder is not None
        Path(folder, "thing_1%3a2.deb").write_bytes(content)
        return CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(debian_files, "_run", run)
    monkeypatch.setattr(debian_files.shutil, "which", lambda tool: tool)
    return calls


def test_download_is_checked_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_apt(monkeypatch)
    package = load("debian_files").download("thing", tmp_path)
    assert (package.version, package.digest) == ("1:2", f"SHA256:{DIGEST}")
    assert package.path.read_bytes() == CONTENT and [path.name for path in tmp_path.iterdir()] == ["thing_1%3a2.deb"]
    package.path.write_bytes(CONTENT[:-1] + b"x")
    load("debian_files").download("thing", tmp_path)
    assert package.path.read_bytes() == CONTENT
    assert calls.count("apt-get -q") == 2
    load("debian_files").download("thing", tmp_path)
    assert calls.count("apt-get -q") == 2, "what is there whole is not downloaded again"


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"content": CONTENT + b"!"}, "23 bytes, expected 22"),
        ({"content": CONTENT[::-1]}, f"expected {DIGEST}"),
        ({"code": 100, "uri": ""}, "Unable to locate package thing .*apt-get update"),
        ({"uri": "'http://x' thing.deb 22 MD5Sum:00\n"}, "no address with a digest"),
    ],
)
def test_download_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], part: str) -> None:
    fake_apt(monkeypatch, **given)
    debian_files = load("debian_files")
    with pytest.raises(debian_files.FetchError, match=part):
        debian_files.download("thing", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands in for dpkg-deb")
def test_files_come_from_the_package_without_paths_being_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    debian_files = load("debian_files")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("./usr/a.txt", "./../../escaped.txt", "./usr/unwanted.bin"):
            info = tarfile.TarInfo(name)
            info.size = 5
            archive.addfile(info, io.BytesIO(b"hello"))
        link = tarfile.TarInfo("./usr/link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    (tmp_path / "content.tar").write_bytes(buffer.getvalue())
    tool = tmp_path / "dpkg-deb"
    tool.write_text(f"#!/bin/sh\ncat '{tmp_path}/content.tar'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    package = debian_files.Package("thing", "1", "SHA256:0", tmp_path / "thing.deb")
    before = digests(tmp_path)
    assert package.files(lambda name: name.endswith(".txt")) == {"usr/a.txt": b"hello", "../../escaped.txt": b"hello"}
    assert digests(tmp_path) == before
    monkeypatch.setattr(debian_files, "MAX_MEMBER_BYTES", 4)
    with pytest.raises(debian_files.FetchError, match="usr/a.txt has 5 bytes"):
        package.files(lambda name: name == "usr/a.txt")
    tool.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(debian_files.FetchError, match="cannot be unpacked"):
        package.files(lambda name: True)


def test_fetch_takes_photos_only_and_credits_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = load("composites_sources")
    stamps = [
        *("animals/birds/owl", "animals/birds/cartoon/tux", "animals/mammals/cats/lion", "animals/fish/lobster"),
        *("animals/mammals/elephant", "plants/flowers/plastic/poo", "../birds/evil"),
    ]
    monuments = sources.MONUMENTS
    inside = {f"{monuments}india/fort.webp": b"fort", f"{monuments}usa/cabrillo.webp": b"statue"}
    inside |= {f"{monuments}README": b"Fort by Asha, CC0", "gcompris/src/activities/erase/resource/cat.webp": b"cat"}
    contents = {
        sources.STAMPS: {f"{sources.STAMP_ROOT}{name}.png": name.encode() for name in stamps},
        sources.PHOTOS: {"usr/share/explore_monuments.rcc": b""},
        sources.SCENES: {"usr/x/Dune.jpg": b"dune", "usr/x/LadyBird.jpg": b"beetle"},
    }

    class Fake(sources.Package):
        def files(self, wanted: Any) -> dict[str, bytes]:
            held = {**contents[self.name], f"usr/share/doc/{self.name}/copyright": f"by {self.name}'s authors".encode()}
            return {path: content for path, content in held.items() if wanted(path)}

    class Container:
        def members(self) -> dict[str, str]:
            return {path: path for path in inside}

        def read(self, node: str) -> bytes:
            return inside[node]

    downloads = []

    def download(name: str, cache: Path) -> Any:
        downloads.append(name)
        cache.mkdir(exist_ok=True)
        return Fake(name, "1.0", "SHA256:0", cache / "x.deb")

    monkeypatch.setattr(sources, "download", download)
    monkeypatch.setattr(sources.RccFile, "parse", lambda blob, name: Container())
    for _ in range(2):
        cut, back, packages = sources.fetch(tmp_path / "cache")
    assert len(downloads) == 3, "unpacked once"
    assert [package["name"] for package in packages] == downloads and packages[0]["version"] == "1.0"
    found = {path.relative_to(cut).as_posix() for path in cut.rglob("*.*")}
    assert found == {"bird/owl.png", "carnivore/lion.png", "CREDITS.txt"}
    found = {path.relative_to(back).as_posix() for path in back.rglob("*.*")}
    assert found == {"monument_fort.webp", "nature_Dune.jpg", "CREDITS.txt"}
    assert f"by {sources.STAMPS}'s authors" in (cut / "CREDITS.txt").read_text()
    text = (back / "CREDITS.txt").read_text()
    assert "Fort by Asha, CC0" in text and f"by {sources.SCENES}'s authors" in text
