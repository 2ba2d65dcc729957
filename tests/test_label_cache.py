"""Label maps on disk: the same bits again, and no file trusted that was not written so."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

import molt
from molt import Features
from molt.clustering import CachedClusterer, DeepClustering, Slic, TokenKMeans, wants_features
from molt.clustering import _cache_files as files
from molt.clustering.cache import clear

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"bands": 3}
CHEAP = {
    "kmeans": TokenKMeans(3, working_size=24),
    "slic": Slic(9, working_size=24),
    "deep": DeepClustering(channels=8, layers=1, steps=2, num_segments=20, working_size=24),
}


class Bands:
    """Labels by brightness; counts how often it was asked and for how many images."""

    takes_features = False

    def __init__(self, bands: int = 3, **settings: Any) -> None:
        self.bands = bands
        self.settings = {"bands": bands, **settings}
        self.asked: list[int] = []

    def __call__(self, x: Any, size: Any = None) -> tuple[Tensor, Tensor]:
        values = x.as_map() if isinstance(x, Features) else x
        self.asked.append(len(values))
        size = size or (x.image_size if isinstance(x, Features) else x.shape[2:])
        light = torch.nn.functional.interpolate(values.mean(1, keepdim=True).float(), size)[:, 0]
        labels = (light.clamp(0, 0.999) * self.bands).to(torch.int32)
        return labels, labels.flatten(1).amax(1).long() + 1


class Fixed:
    """Answers with given labels."""

    def __init__(self, labels: Tensor, counts: Tensor) -> None:
        self.labels, self.counts = labels, counts
        self.settings: dict[str, Any] = {}

    def __call__(self, x: Any, size: Any = None) -> tuple[Tensor, Tensor]:
        return self.labels, self.counts


def images(number: int = 3, height: int = 20, width: int = 27, seed: int = 0) -> Tensor:
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(seed))


def features(number: int = 3, seed: int = 0) -> Features:
    draw = partial(torch.rand, generator=torch.Generator().manual_seed(seed))
    return Features(draw(number, 30, 8), (5, 6), (40, 48), class_token=draw(number, 8), logits=draw(number, 4))


def same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    assert one[0].dtype == other[0].dtype == torch.int32 and one[1].dtype == other[1].dtype == torch.int64
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def maps(folder: Path) -> list[Path]:
    return sorted(folder.glob("??/*.png"))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "molt"]


@pytest.mark.parametrize("name", CHEAP)
@pytest.mark.parametrize("shown", ["images", "features"])
@pytest.mark.parametrize("size", [None, (11, 13)])
def test_found_labels_are_the_computed_ones(name: str, shown: str, size: Any, tmp_path: Path) -> None:
    clusterer, x = CHEAP[name], images() if shown == "images" else features()
    cached, bare = CachedClusterer(clusterer, tmp_path), clusterer(x, size)
    assert same(cached(x, size), bare) and (cached.hits, cached.misses) == (0, 3)
    assert same(cached(x, size), bare) and (cached.hits, cached.misses) == (3, 3)
    again = CachedClusterer(clusterer, str(tmp_path))
    assert same(again(x, size), bare) and (again.hits, again.misses) == (3, 0)
    assert len(maps(tmp_path)) == 3
    assert all(path.parent.name == path.name[:2] and len(path.stem) == 64 for path in maps(tmp_path))


@pytest.mark.parametrize("x", [images(), features()], ids=["images", "features"])
def test_only_what_is_missing_is_computed_in_one_call(x: Any, tmp_path: Path) -> None:
    bands = Bands()
    cached = CachedClusterer(bands, tmp_path)
    middle = x[1:2] if isinstance(x, Tensor) else replace(x, patches=x.patches[1:2], class_token=None, logits=None)
    if isinstance(x, Features):
        middle = replace(middle, class_token=x.class_token[1:2], logits=x.logits[1:2])
    cached(middle)
    assert same(cached(x), Bands()(x))
    assert bands.asked == [1, 2] and (cached.hits, cached.misses) == (1, 3)


def test_an_image_twice_in_a_batch_is_computed_once(tmp_path: Path) -> None:
    bands = Bands()
    x = images(2)[[0, 1, 0]]
    assert same(CachedClusterer(bands, tmp_path)(x), Bands()(x)) and bands.asked == [2]


@pytest.mark.parametrize("name", ["kmeans", "slic"])
def test_layout_does_not_matter(name: str, tmp_path: Path) -> None:
    cached, x = CachedClusterer(CHEAP[name], tmp_path), images(2)
    bare = cached(x)
    for other in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        assert not other.is_contiguous() and same(cached(other), bare)
        assert same(CachedClusterer(CHEAP[name], tmp_path / "other")(other), bare)
    assert cached.misses == 2
    assert same(cached(x.clone().requires_grad_()), bare)
    with torch.inference_mode():
        assert same(cached(x + 0), bare)


@pytest.mark.parametrize("x", [images(0), features(0)], ids=["images", "features"])
def test_empty_batch(x: Any, tmp_path: Path) -> None:
    labels, counts = CachedClusterer(TokenKMeans(), tmp_path)(x, (4, 5))
    assert labels.shape == (0, 4, 5) and labels.dtype == torch.int32
    assert counts.shape == (0,) and counts.dtype == torch.int64


def test_one_pixel(tmp_path: Path) -> None:
    for _ in range(2):
        assert same(CachedClusterer(Slic(), tmp_path)(images(1, 1, 1)), Slic()(images(1, 1, 1)))


def test_another_content_size_dtype_or_setting_is_another_map(tmp_path: Path) -> None:
    x, seen = images(1), features(1)
    near = x.clone()
    near[0, 0, 0, 0] = torch.nextafter(near[0, 0, 0, 0], torch.tensor(2.0))
    asked: list[tuple[Any, Any, Any]] = [
        (Bands(), x, None),
        (Bands(), near, None),
        (Bands(), x.transpose(2, 3), None),
        (Bands(), x.reshape(1, 3, 27, 20), None),
        (Bands(), x.double(), None),
        (Bands(), x.half(), None),
        (Bands(), x.half().view(torch.bfloat16), None),
        (Bands(), x, (20, 26)),
        (Bands(), x.reshape(1, 3, 27, 20), (20, 26)),
        (Bands(4), x, None),
        (Bands(other=1), x, None),
        (Bands(other=1.0), x, None),
        (Bands(other=True), x, None),
        (Bands(), seen, None),
        (Bands(), replace(seen, patches=seen.patches + 1e-6), None),
        (Bands(), replace(seen, grid=(6, 5)), None),
        (Bands(), replace(seen, image_size=(48, 40)), None),
        (Bands(), replace(seen, logits=None), None),
        (TokenKMeans(3), x, None),
        (TokenKMeans(3, seed=1), x, None),
        (Slic(3), x, None),
        (Slic(3, working_size=None), x, None),
    ]
    for number, (clusterer, shown, size) in enumerate(asked):
        cached = CachedClusterer(clusterer, tmp_path)
        assert same(cached(shown, size), clusterer(shown, size)), number
        assert (cached.hits, cached.misses) == (0, 1), number
    default = CachedClusterer(Bands(), tmp_path)
    default(x, [20, 27])
    default(seen, (40, 48))
    assert (default.hits, default.misses) == (2, 0), "the size that None stands for"


def test_a_setting_changed_later_counts(tmp_path: Path) -> None:
    clusterer = TokenKMeans(3, working_size=24)
    cached = CachedClusterer(clusterer, tmp_path)
    cached(images(1))
    clusterer.num_clusters = 2
    assert same(cached(images(1)), TokenKMeans(2, working_size=24)(images(1))) and cached.misses == 2


def test_another_version_of_molt_computes_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CachedClusterer(Bands(), tmp_path)(images(1))
    monkeypatch.setattr("molt.clustering.cache.__version__", "99")
    cached = CachedClusterer(Bands(), tmp_path)
    cached(images(1))
    assert cached.misses == 1


def test_what_the_clusterer_says_of_itself_passes_through(tmp_path: Path) -> None:
    for clusterer in (TokenKMeans(7), Slic(), Bands()):
        cached = CachedClusterer(clusterer, tmp_path)
        assert wants_features(cached) == wants_features(clusterer)
        assert getattr(cached, "num_clusters", None) == getattr(clusterer, "num_clusters", None)
    assert not hasattr(CachedClusterer(Slic(), tmp_path), "num_clusters")
    twice = CachedClusterer(CachedClusterer(Bands(), tmp_path / "a"), tmp_path / "b")
    assert same(twice(images()), Bands()(images())) and same(twice(images()), Bands()(images()))


class Own(TokenKMeans):
    """May do anything differently."""


def test_settings_must_be_known(tmp_path: Path) -> None:
    bad = Bands()
    bad.settings = {"bands": torch.ones(1)}
    listed = Bands()
    listed.settings = [3]
    deep = Bands(nested={"a": [1, {2: "no string"}]})
    odd = TokenKMeans()
    odd.hook = print
    for clusterer, what in (
        (lambda x, size: None, "`settings`"),
        (Own(), "Own cannot be cached.*`settings`"),
        (bad, "'bands' must be made of numbers.*Tensor"),
        (listed, "settings must be a dict, got list"),
        (deep, "'nested'"),
        (odd, "'hook'.*`settings`"),
        (None, "clusterer must be callable"),
        (TokenKMeans, "clusterer must be callable.*build it first"),
    ):
        with pytest.raises(TypeError, match=what) as raised:
            CachedClusterer(clusterer, tmp_path)
        assert str(raised.value).startswith("clusterer")


def test_a_function_may_carry_settings(tmp_path: Path) -> None:
    def halves(x: Tensor, size: Any = None) -> tuple[Tensor, Tensor]:
        return (x[:, 0] > 0.5).int(), torch.full((len(x),), 2)

    halves.settings = {}  # type: ignore[attr-defined]
    cached = CachedClusterer(halves, tmp_path)
    assert same(cached(images()), cached(images())) and cached.hits == 3


def test_arguments(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for bound in (0, -1):
        with pytest.raises(ValueError, match="max_bytes must be at least 1"):
            CachedClusterer(Bands(), tmp_path, max_bytes=bound)
    with pytest.raises(TypeError, match="max_bytes"):
        CachedClusterer(Bands(), tmp_path, max_bytes=1.5)  # type: ignore[arg-type]
    for folder, error in ((file, ValueError), ("", ValueError), ("a\0b", ValueError), (None, TypeError)):
        with pytest.raises(error):
            CachedClusterer(Bands(), folder)
        if folder is not None:
            with pytest.raises(ValueError):
                molt.refine(torch.rand(4, 4), torch.rand(3, 4, 4), cache=folder)
    cached = CachedClusterer(Bands(), tmp_path)
    for x, size, error in (
        (torch.rand(3, 4, 4), None, ValueError),
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), None, TypeError),
        ("photo.jpg", None, TypeError),
        (images(1), (0, 4), ValueError),
        (images(1), 4, TypeError),
    ):
        with pytest.raises(error):
            cached(x, size)
    assert maps(tmp_path) == []


@pytest.mark.parametrize(("count", "mode"), [(1, "L"), (256, "L"), (257, "I;16"), (65536, "I;16"), (65537, "RGB")])
def test_depth_of_the_file_follows_the_count(count: int, mode: str, tmp_path: Path) -> None:
    side = 260 if count > 1000 else 20
    labels = torch.arange(side * side).remainder(count).view(1, side, side).int()
    labels[0, -1, -1] = count - 1
    cached = CachedClusterer(Fixed(labels, torch.tensor([count])), tmp_path)
    for _ in range(2):
        assert same(cached(images(1, side, side)), (labels, torch.tensor([count])))
    assert cached.hits == 1
    with PIL.Image.open(maps(tmp_path)[0]) as picture:
        assert picture.mode == mode or (mode == "I;16" and picture.mode == "I")
        assert picture.size == (side, side)
        held = json.loads(picture.info["molt"])
    assert held["count"] == count and held["made"]["clusterer"].endswith("Fixed")


def test_a_count_above_the_labels_is_kept(tmp_path: Path) -> None:
    labels = torch.zeros(1, 4, 5, dtype=torch.uint8)
    cached = CachedClusterer(Fixed(labels, torch.tensor([300], dtype=torch.int32)), tmp_path)
    for _ in range(2):
        assert same(cached(images(1, 4, 5)), (labels.int(), torch.tensor([300])))


def test_more_labels_than_a_file_holds_are_still_returned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels, counts = torch.full((1, 4, 5), 2**24, dtype=torch.int64), torch.tensor([2**24 + 1])
    cached = CachedClusterer(Fixed(labels, counts), tmp_path)
    assert same(cached(images(1, 4, 5)), (labels.int(), counts)) and maps(tmp_path) == []
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize(
    ("labels", "counts"),
    [
        (torch.full((1, 4, 5), 3), torch.tensor([3])),
        (torch.full((1, 4, 5), -1), torch.tensor([3])),
        (torch.full((1, 4, 5), 2**31), torch.tensor([2**32])),
        (torch.zeros(1, 4, 5), torch.tensor([1])),
        (torch.zeros(1, 5, 4, dtype=torch.int32), torch.tensor([1])),
        (torch.zeros(1, 4, 5, dtype=torch.int32), torch.tensor([1, 1])),
        (torch.zeros(1, 4, 5, dtype=torch.int32), 1),
    ],
)
def test_a_clusterer_that_breaks_its_word_is_named(labels: Tensor, counts: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Fixed: its (labels|counts) must be"):
        CachedClusterer(Fixed(labels, counts), tmp_path)(images(1, 4, 5))
    assert maps(tmp_path) == []


def kept(folder: Path) -> tuple[Path, bytes]:
    """Let one map be written; its path and bytes."""
    CachedClusterer(Bands(), folder)(images(1))
    (path,) = maps(folder)
    return path, path.read_bytes()


def check_recovery(path: Path, whole: bytes, caplog: pytest.LogCaptureFixture, reason: str) -> None:
    """The file is not believed, is logged, and is replaced by what belongs there."""
    caplog.clear()
    cached = CachedClusterer(Bands(), path.parents[1])
    assert same(cached(images(1)), Bands()(images(1))) and (cached.hits, cached.misses) == (0, 1)
    (line,) = warnings(caplog)
    assert str(path) in line and reason in line, line
    assert path.read_bytes() == whole and not path.is_symlink()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_files_that_were_not_written_so_are_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, whole = kept(tmp_path)
    held = json.loads(PIL.Image.open(path).info["molt"])
    made = json.dumps(held["made"], sort_keys=True)
    labels = Bands()(images(1))[0][0].numpy()
    encode = partial(files.encode, key=path.stem, made=made)
    assert encode(labels, 3) == whole
    other = tmp_path / "other.png"
    PIL.Image.new("L", (27, 20)).save(other)
    huge = whole[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)) + whole[33:]
    start = whole.index(b"IDAT") - 4
    repainted = whole[:start] + chunk(b"IDAT", zlib.compress(bytes(20 * 28))) + chunk(b"IEND", b"")
    text = b"molt\0" + json.dumps({**held, "count": 300}).encode()
    recounted = whole[:33] + chunk(b"tEXt", text) + whole[start:]
    for content, reason in (
        (b"", "damaged"),
        (b"no picture", "damaged"),
        (whole[:-30], "damaged"),
        (whole[:40], "damaged"),
        (other.read_bytes(), "not written under this key"),
        (files.encode(labels, 3, "0" * 64, made), "not written under this key"),
        (huge, "60000x60000 pixels, expected 27x20"),
        (encode(labels.T.copy(), 3), "20x27 pixels"),
        (encode(labels + 5, 3), "labels 5 to 7"),
        (repainted, "are not those written"),
        (recounted, "pixels are L, expected I;16"),
        (encode(labels, 0), "0 clusters"),
        (encode(labels, True), "True clusters"),
        (whole.replace(b'"count": 3', b'"count": 5'), "damaged"),
        (whole + b"\0" * 2**20, "bytes, expected at most"),
    ):
        path.write_bytes(content)
        check_recovery(path, whole, caplog, reason)


def test_any_byte_flipped_or_cut_never_changes_the_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, whole = kept(tmp_path)
    bare, x = Bands()(images(1)), images(1)
    for lenient in (False, True):
        monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", lenient)
        for place in range(lenient, len(whole), 3):
            for content in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x11]) + whole[place + 1 :]):
                path.write_bytes(content)
                assert same(CachedClusterer(Bands(), tmp_path)(x), bare), place
    assert len(warnings(caplog)) > len(whole)


def test_labels_above_num_clusters_are_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, whole = kept(tmp_path)
    limited = Bands()
    limited.num_clusters = 2  # type: ignore[attr-defined]
    CachedClusterer(limited, tmp_path)(images(1))
    assert "label 2, expected less than 2" in warnings(caplog)[0]


def test_links_pipes_and_folders_are_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, outside = tmp_path / "maps", tmp_path / "outside"
    path, whole = kept(folder)
    outside.write_bytes(whole)
    path.unlink()
    path.symlink_to(outside)
    check_recovery(path, whole, caplog, "cannot be read")
    assert outside.read_bytes() == whole
    path.unlink()
    os.mkfifo(path)
    check_recovery(path, whole, caplog, "not an ordinary file")
    path.unlink()
    path.mkdir()
    assert same(CachedClusterer(Bands(), folder)(images(1)), Bands()(images(1)))
    path.rmdir()
    elsewhere = tmp_path / "elsewhere"
    path.parent.rename(elsewhere)
    path.parent.symlink_to(elsewhere)
    (elsewhere / path.name).write_bytes(whole)
    caplog.clear()
    cached = CachedClusterer(Bands(), folder, max_bytes=1000)
    for seed in range(20):
        cached(images(1, seed=seed))
    assert "is a link" in warnings(caplog)[0] and cached.misses == 20
    assert [entry.name for entry in elsewhere.iterdir()] == [path.name], "nothing came or went outside"
    clear(folder)
    assert (elsewhere / path.name).read_bytes() == whole


@pytest.mark.parametrize("kind", ["read-only", "below a file", "no space"])
def test_a_folder_that_cannot_be_written_is_told_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "maps"
    if kind == "below a file":
        (tmp_path / "file").touch()
        folder = tmp_path / "file" / "maps"
    elif kind == "read-only":
        monkeypatch.setattr(Path, "mkdir", _refuse)
    else:
        monkeypatch.setattr(Path, "write_bytes", _refuse)
    cached = CachedClusterer(Bands(), folder)
    for _ in range(3):
        assert same(cached(images()), Bands()(images()))
    (line,) = warnings(caplog)
    assert str(folder) in line and cached.misses == 9
    monkeypatch.undo()
    assert list(tmp_path.rglob("*.p*")) == [], "nothing half written stays"


def _refuse(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_a_folder_that_may_only_be_read_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(tmp_path)
    monkeypatch.setattr(os, "utime", _refuse)
    cached = CachedClusterer(Bands(), tmp_path)
    assert same(cached(images(1)), Bands()(images(1))) and cached.hits == 1


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    path, whole = kept(tmp_path)
    path.unlink()
    cached = CachedClusterer(Bands(), tmp_path, max_bytes=int(4.5 * len(whole)))
    written: list[Path] = []
    for seed in range(4):
        cached(images(1, seed=seed))
        (new,) = set(maps(tmp_path)) - set(written)
        written.append(new)
        os.utime(new, (1000 + seed, 1000 + seed))
    cached(images(1, seed=0))
    assert cached.hits == 1 and time.time() - written[0].stat().st_mtime < 100, "a hit counts as use"
    cached(images(1, seed=4))
    assert set(maps(tmp_path)) >= {written[0], written[2], written[3]} and written[1] not in maps(tmp_path)
    for seed in range(30):
        cached(images(1, seed=seed))
        assert sum(file.stat().st_size for file in maps(tmp_path)) <= cached.max_bytes
    assert len(maps(tmp_path)) == 4


def test_one_map_larger_than_the_bound_is_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    noise, flat = images(1), torch.ones(1, 3, 20, 27)
    path, whole = kept(tmp_path)
    exact = CachedClusterer(Bands(), tmp_path / "exact", max_bytes=len(whole))
    small = CachedClusterer(Bands(), tmp_path / "small", max_bytes=len(whole) - 1)
    for cached in (exact, small):
        for x in (flat, noise):
            assert same(cached(x), Bands()(x))
            assert len(maps(cached.folder)) == 1
    assert maps(exact.folder)[0].read_bytes() == whole and maps(small.folder)[0].name != path.name
    (line,) = warnings(caplog)
    assert "max_bytes" in line and str(small.folder) in line


def test_a_folder_cleared_under_our_hands_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = [FileExistsError(), FileNotFoundError(), FileNotFoundError()]

    def whole_file(path: Path, real: Any = files.whole_file) -> Any:
        if failures:
            raise failures.pop()
        return real(path)

    monkeypatch.setattr(files, "whole_file", whole_file)
    CachedClusterer(Bands(), tmp_path)(images(1))
    assert len(maps(tmp_path)) == 1 and warnings(caplog) == []


def test_a_full_folder_is_not_looked_through_at_each_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(files, "entries", lambda folder, real=files.entries: looks.append(folder) or real(folder))
    kept_files = files.LabelFiles(tmp_path, 60_000)
    labels = np.zeros((4, 4), np.int32)
    for number in range(1200):
        kept_files.store(f"{number:02x}"[-2:] + f"{number:062x}", "{}", labels, 1)
    size = maps(tmp_path)[0].stat().st_size
    assert 0.97 * 60_000 < size * len(maps(tmp_path)) <= 60_000
    assert len(looks) < 300, "as many writes as fill a 64th of the bound lie between two looks, or half of that"


def test_clear_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    assert clear(tmp_path / "none") == (0, 0)
    CachedClusterer(Bands(), tmp_path)(images(4))
    found = maps(tmp_path)
    size = sum(file.stat().st_size for file in found)
    stale = found[0].parent / ".abcd_123.part"
    fresh = found[1].parent / ".zzzz_123.part"
    for part in (stale, fresh):
        part.write_bytes(b"12345")
    os.utime(stale, (1000, 1000))
    foreign = [
        tmp_path / "photo.png",
        tmp_path / found[2].name,
        tmp_path / "zz" / found[2].name,
        tmp_path / "abc" / found[2].name,
        tmp_path / ("00" if found[2].name[:2] != "00" else "01") / found[2].name,
        found[2].parent / "photo.png",
        found[2].parent / found[2].name.upper().replace("PNG", "jpg"),
        found[2].parent / "below" / found[2].name,
    ]
    for file in foreign:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x")
    link = found[3].parent / (found[3].name[:2] + "0" * 62 + ".png")
    link.symlink_to(foreign[0])
    assert clear(tmp_path) == (5, size + 5)
    assert all(file.exists() for file in [*foreign, fresh, link]) and maps(tmp_path) == sorted(
        [foreign[2], foreign[4], foreign[5], link]
    )
    assert not stale.exists() and not found[0].parent.exists() and found[2].parent.exists() and tmp_path.exists()
    with pytest.raises(NotADirectoryError):
        clear(foreign[0])


WORKER = """
import sys, time
from pathlib import Path
import torch
from molt.clustering import CachedClusterer
from molt.clustering.cache import clear

class Bands:
    settings = {}
    def __call__(self, x, size=None):
        labels = (x[:, 0] * 4).int()
        return labels, labels.flatten(1).amax(1).long() + 1

torch.set_num_threads(1)
folder, start, bound, clears = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "clears"
Path(folder, f"ready-{start}").touch()
while len(list(Path(folder).glob("ready-*"))) < 3:
    time.sleep(0.01)
cached = CachedClusterer(Bands(), folder, max_bytes=bound)
for turn in range(150):
    seed = (start + turn) % 7 if turn % 2 else start * 1000 + turn % 5
    x = torch.rand(2, 3, 6, 7, generator=torch.Generator().manual_seed(seed))
    found, bare = cached(x), Bands()(x)
    assert torch.equal(found[0], bare[0]) and torch.equal(found[1], bare[1])
    if clears and turn % 20 == 0:
        clear(folder)
print(cached.hits)
"""


@pytest.mark.parametrize(("bound", "clears"), [(3000, "keeps"), (20000, "clears")])
def test_processes_share_a_folder(bound: int, clears: str, tmp_path: Path) -> None:
    """Three at once read, write, evict and clear, and none ever sees half a file, another's labels or an error."""
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    running = [
        subprocess.Popen([*command, str(i), str(bound), clears], stdout=-1, stderr=-1, text=True) for i in range(3)
    ]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and err == "", err
        assert int(out) > 0
    sizes = [file.stat().st_size for file in maps(tmp_path)]
    assert sizes and sum(sizes) <= bound
    assert list(tmp_path.rglob("*.part")) == []


def test_localizer_keeps_clusters(tmp_path: Path) -> None:
    picture = PIL.Image.fromarray((images(1, 60, 80)[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8))
    folder = tmp_path / "photos" / "maps"
    (tmp_path / "photos").mkdir()
    picture.save(tmp_path / "photos" / "a.png")
    results = []
    for cache in (None, folder, folder):
        loc = molt.Localizer(weights="weak", device="cpu", clusterer=Slic(20, working_size=60), cache=cache)
        results += loc(tmp_path / "photos")
    assert len(results) == 3, "label maps below the photos are no photos"
    assert isinstance(loc.clusterer, CachedClusterer) and (loc.clusterer.hits, loc.clusterer.misses) == (1, 0)
    for result in results[1:]:
        assert torch.equal(result.clusters, results[0].clusters) and torch.equal(result.boxes, results[0].boxes)
        assert torch.equal(result.heat, results[0].heat)


def test_localizer_keeps_the_methods_own_clusters(tmp_path: Path) -> None:
    for _ in range(2):
        loc = molt.Localizer(weights="weak", device="cpu", cache=str(tmp_path))
        loc(images(1)[0])
    assert (
        isinstance(loc.clusterer, CachedClusterer) and loc.clusterer.num_clusters == loc.method.clusterer().num_clusters
    )
    assert loc.clusterer.hits == 1
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cache must be a folder, got the file"):
        molt.Localizer(weights="weak", cache=tmp_path / "file")
    with pytest.raises(TypeError, match="cache must be a path"):
        molt.Localizer(weights="weak", cache=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="clusterer.*`settings`"):
        molt.Localizer(weights="weak", cache=tmp_path, clusterer=lambda x, size: None)


@pytest.mark.parametrize("seen", [None, features(1)], ids=["images", "features"])
def test_refine_keeps_clusters(seen: Features | None, tmp_path: Path) -> None:
    heat, photo, bands = torch.rand(9, 9), images(1)[0], Bands()
    bare = molt.refine(heat, photo, features=seen, clusterer=bands)
    for _ in range(2):
        assert torch.equal(molt.refine(heat, photo, features=seen, clusterer=bands, cache=tmp_path), bare)
    assert bands.asked == [1, 1]
    default = molt.refine(heat, photo, cache=tmp_path)
    assert torch.equal(default, molt.refine(heat, photo)) and len(maps(tmp_path)) == 2
