"""Features on disk: bit for bit what was written, whatever stops the writing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import random
import resource
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

import molt
from molt.data import PhotoError, Sample, images, read_set
from molt.training import Recipe, features, train
from molt.training import _feature_files as files
from molt.training.augment import AUGMENTATIONS
from molt.training.checkpoints import TrainingError
from molt.training.feature_cache import CacheError, FeatureCache, photo_identity
from molt.training.features import FeatureStore
from molt.training.inputs import _Heads

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, MANY = 12, 80
FORMS = {"tokens": ((3, 5), torch.bfloat16), "logits": ((7,), torch.float32), "label": ((), torch.int64)}
IDENTITY = {"network": "a", "digest": "0123", "sizes": [224, 336], "photos": [["1.jpg", 5, 17], ["2.jpg", None, None]]}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that the system holds; waiting for the disk has a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(os, "fdatasync", lambda file: None)


def opened(folder: Path, *, identity: Any = None, forms: Any = None, rows: int = ROWS) -> FeatureCache:
    return FeatureCache.open(folder, IDENTITY if identity is None else identity, arrays=forms or FORMS, rows=rows)


def values(rows: list[int], forms: Any = None) -> dict[str, Tensor]:
    """What belongs into these rows: any bits, NaN and infinity among them."""
    found: dict[str, Tensor] = {}
    for number, (name, (shape, dtype)) in enumerate((forms or FORMS).items()):
        found[name] = torch.empty(len(rows), *shape, dtype=dtype)
        for place, row in enumerate(rows):
            draw = torch.Generator().manual_seed(100 * row + number)
            size = found[name][place].numel() * dtype.itemsize
            most = 2 if dtype == torch.bool else 256
            bits = torch.randint(most, (size,), generator=draw, dtype=torch.uint8)
            found[name][place] = bits.view(dtype).reshape(shape)
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bits, not values: NaN are there too."""
    assert set(one) == set(other)
    return all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and np.array_equal(files.as_bytes(one[name]), files.as_bytes(other[name]))
        for name in one
    )


def fill(cache: FeatureCache, rows: list[int], step: int = 3) -> None:
    for first in range(0, len(rows), step):
        some = cache.missing(rows[first : first + step])
        if some:
            cache.write(some, values(some))


def contents(cache: FeatureCache) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.folder.iterdir()}


def in_child(work: Callable[[], object]) -> int:
    """Start a process that does the work; 0 is its status where it ends without an error."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool],
)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 1, 3)])
def test_rows_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    forms = {"x": (shape, dtype)}
    with opened(tmp_path, forms=forms) as cache:
        cache.write([7, 2, 3], values([7, 2, 3], forms))
        cache.write(torch.tensor([0, 11]), values([0, 11], forms))
        cache.write(np.array([5], np.int32), values([5], forms))
        asked = [3, 2, 2, 11, 7, 0, 5]
        assert same(cache.read(asked), values(asked, forms))
    with opened(tmp_path, forms=forms) as again:
        assert again.missing() == [1, 4, 6, 8, 9, 10] and again.missing([9, 2, 1]) == [9, 1]
        found = again.read(np.array(asked))
        assert same(found, values(asked, forms))
        found["x"].zero_()
        assert same(again.read(asked), values(asked, forms)), "copies"


def test_arrays_of_numpy_and_odd_strides(tmp_path: Path) -> None:
    with opened(tmp_path, forms={"x": ((4, 6), torch.float32), "flag": ((), torch.bool)}) as cache:
        wide = torch.arange(96.0).reshape(2, 6, 8)
        cache.write([0, 1], {"x": wide[:, :, ::2].transpose(1, 2), "flag": torch.tensor([True, False])})
        array = np.arange(48, dtype=np.float32).reshape(2, 6, 4).swapaxes(1, 2)
        array.flags.writeable = False
        cache.write([5, 4], {"x": array, "flag": np.array([False, True])})
        needs = torch.ones(1, 4, 6, requires_grad=True)
        cache.write([8], {"x": needs, "flag": torch.tensor([True])})
        found = cache.read([0, 1, 5, 4, 8])
        assert torch.equal(found["x"][:2], wide[:, :, ::2].transpose(1, 2))
        assert np.array_equal(found["x"][2:4].numpy(), array) and torch.equal(found["x"][4:], needs.detach())
        assert found["flag"].tolist() == [True, False, False, True, True] and not found["x"].requires_grad


def test_files_are_what_numpy_reads(tmp_path: Path) -> None:
    with opened(tmp_path) as cache:
        fill(cache, list(range(ROWS)))
        expected = values(list(range(ROWS)))
        assert np.array_equal(np.load(cache.folder / "tokens.npy"), expected["tokens"].view(torch.int16).numpy())
        assert np.array_equal(np.load(cache.folder / "label.npy"), expected["label"].numpy())
        assert cache.bytes == sum(map(len, contents(cache).values())) > ROWS * (30 + 28 + 8 + 8)
        assert json.loads((cache.folder / "cache.json").read_text())["identity"] == IDENTITY


def test_bad_photos_are_remembered(tmp_path: Path) -> None:
    with opened(tmp_path) as cache:
        assert cache.bad() == {}
        cache.mark_bad(4, "4.jpg: the file is empty\nsecond line é\udcff")
        cache.mark_bad(1, "")
        cache.write([0], values([0]))
    with opened(tmp_path) as again:
        assert again.bad() == {1: "", 4: "4.jpg: the file is empty\nsecond line é\udcff"}
        assert again.missing() == [2, 3, 5, 6, 7, 8, 9, 10, 11]
        with pytest.raises(ValueError, match="row 4, which is marked bad"):
            again.read([0, 4])
        with pytest.raises(ValueError, match="row 2, which is missing"):
            again.read([2, 4])
        for again_there in (partial(again.mark_bad, 0, "no"), partial(again.write, [3, 1], values([3, 1]))):
            with pytest.raises(ValueError, match="rows must be missing, got row [01], which is there or bad"):
                again_there()
        assert again.missing([3]) == [3]


def test_data_are_on_disk_before_their_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []

    def spy(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def spied(file: int, *rest: Any) -> Any:
            done.append((what, Path(f"/proc/self/fd/{file}").readlink().name))
            return call(file, *rest)

        return spied

    with opened(tmp_path) as cache:
        monkeypatch.setattr(files, "write_at", spy("write", files.write_at))
        monkeypatch.setattr(os, "write", spy("write", os.write))
        monkeypatch.setattr(os, "fdatasync", spy("flush", lambda file: None))
        cache.write([3], values([3]))
        arrays = ["label.npy", "logits.npy", "tokens.npy"]
        mark = [("write", "marks.bin"), ("flush", "marks.bin")]
        assert done == [*(("write", name) for name in arrays), *(("flush", name) for name in arrays), *mark]
        done.clear()
        cache.mark_bad(4, "why")
        assert done == [("write", "bad.jsonl"), ("flush", "bad.jsonl"), *mark]


def die_at(call: int) -> Callable[..., Any]:
    """Wrap what writes so that its ``call``-th call writes half and kills the process."""
    calls = 0

    def wrap(write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(file: int, data: Any, *place: int) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                write(file, data[: len(data) // 2], *place)
                os.kill(os.getpid(), signal.SIGKILL)
            return write(file, data, *place)

        return wrapped

    return wrap


def filled_until(folder: Path, call: int) -> None:
    cache = opened(folder)
    wrap = die_at(call)
    files.write_at = wrap(files.write_at)
    os.write = wrap(os.write)
    cache.write([3, 4], values([3, 4]))
    cache.mark_bad(6, "6.jpg: is bad")
    cache.write([9], values([9]))


def test_killed_at_every_step_of_writing(tmp_path: Path) -> None:
    deaths, seen = 0, set()
    for call in range(1, 30):
        folder = tmp_path / str(call)
        ended = status(in_child(partial(filled_until, folder, call)))
        assert ended in (0, -signal.SIGKILL)
        deaths += ended != 0
        with opened(folder) as cache:
            there = [row for row in (3, 4, 9) if row not in cache.missing()]
            seen.add((*there, *cache.bad()))
            assert same(cache.read(there), values(there)), "what counts is right"
            assert cache.bad() in ({}, {6: "6.jpg: is bad"})
            if cache.missing([6]):
                cache.mark_bad(6, "6.jpg: is bad")
            fill(cache, [3, 4, 9])
            assert same(cache.read([3, 4, 9]), values([3, 4, 9])) and cache.bad() == {6: "6.jpg: is bad"}
        shutil.rmtree(folder)
        if ended == 0:
            break
    # Six writes of data and two marks, half of which is one; a line and a mark; three of data and a mark.
    assert deaths == 13 and seen == {(), (3,), (3, 4), (3, 4, 6), (3, 4, 9, 6)}


def test_killed_while_the_files_are_made(tmp_path: Path) -> None:
    def work(call: int) -> None:
        calls = 0
        flush = os.fsync

        def dying(file: int) -> None:
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(file)

        os.fsync = dying
        opened(tmp_path / str(call))

    for call in range(1, 8):
        ended = status(in_child(partial(work, call)))
        assert ended == (-signal.SIGKILL if call < 7 else 0), "three arrays, marks, messages, and what they are"
        assert (len(list((tmp_path / str(call)).glob("*/cache.json"))) == 1) == (call == 7), "the last of them"
        with opened(tmp_path / str(call)) as cache:
            assert cache.missing() == list(range(ROWS))
            fill(cache, [1, 2])


def fill_slowly(folder: Path, rows: list[int]) -> None:
    with opened(folder, rows=MANY) as cache:
        fill(cache, rows, step=1)


def fill_almost(folder: Path, rows: list[int]) -> None:
    fill_slowly(folder, rows[:-1])
    time.sleep(60)  # still there, however late the kill comes


def test_killed_at_any_moment(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).permutation(MANY).tolist()
    with opened(tmp_path / "killed", rows=MANY) as cache:
        for least in (15, 40):
            child = in_child(partial(fill_almost, tmp_path / "killed", rows))
            while MANY - len(cache.missing()) < least and os.waitpid(child, os.WNOHANG) == (0, 0):
                time.sleep(0.001)
            os.kill(child, signal.SIGKILL)
            assert status(child) == -signal.SIGKILL
            missing = set(cache.missing())
            there = [row for row in rows if row not in missing]
            assert least <= len(there) < MANY and same(cache.read(there), values(there))
        fill(cache, rows)
        with opened(tmp_path / "whole", rows=MANY) as whole:
            fill(whole, sorted(rows))
            assert contents(cache) == contents(whole), "as if nothing had happened"


def test_processes_fill_at_once(tmp_path: Path) -> None:
    # Neither finds the files made.
    children = [in_child(partial(fill_slowly, tmp_path, list(range(rank, MANY, 3)))) for rank in range(3)]
    assert [status(child) for child in children] == [0, 0, 0]
    with opened(tmp_path, rows=MANY) as cache:
        assert cache.missing() == [] and same(cache.read(range(MANY)), values(list(range(MANY))))
        assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def test_processes_fill_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has values of its own: of every row those of one process stay, whole."""
    monkeypatch.setattr(os, "fdatasync", lambda file: time.sleep(0.002))  # between data and marks

    def work(rank: int) -> None:
        with opened(tmp_path, rows=MANY) as cache:
            for first in range(0, MANY, 4):
                rows = list(range(first, first + 4))
                cache.write(rows, values([1000 * rank + row for row in rows]), keep_first=True)
            assert cache.missing() == []

    children = [in_child(partial(work, rank)) for rank in range(3)]
    assert [status(child) for child in children] == [0, 0, 0]
    with opened(tmp_path, rows=MANY) as cache:
        for row in range(MANY):
            assert any(same(cache.read([row]), values([1000 * rank + row])) for rank in range(3))


def test_the_first_of_two_writers_stands(tmp_path: Path) -> None:
    with opened(tmp_path) as one, opened(tmp_path) as other:
        assert one.write([3, 4], values([3, 4])) == 2
        one.mark_bad(6, "why")
        assert other.write([5, 4, 6, 2], values([5, 0, 0, 2]), keep_first=True) == 2
        assert other.write([4, 6], values([0, 0]), keep_first=True) == 0
        other.mark_bad(6, "another reason", keep_first=True)
        other.mark_bad(4, "another reason", keep_first=True)
        other.mark_bad(7, "why", keep_first=True)
        for cache in (one, other):
            assert same(cache.read([2, 3, 4, 5]), values([2, 3, 4, 5])) and cache.bad() == {6: "why", 7: "why"}


def test_one_process_makes_the_files_at_a_time(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        child = in_child(lambda: (os.close(held.fileno()), opened(tmp_path)))
        time.sleep(0.3)
        assert os.waitpid(child, os.WNOHANG) == (0, 0) and [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert status(child) == 0
    assert len(list(tmp_path.glob("*/cache.json"))) == 1


def test_one_process_sees_what_another_writes(tmp_path: Path) -> None:
    with opened(tmp_path) as one, opened(tmp_path) as other:
        one.write([3], values([3]))
        other.mark_bad(4, "why")
        assert other.missing([2, 3, 4]) == one.missing([2, 3, 4]) == [2]
        assert same(other.read([3]), values([3])) and one.bad() == {4: "why"}


def test_each_identity_has_a_folder_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = opened(tmp_path)
    fill(first, list(range(ROWS)))
    before = contents(first)
    others = [
        {"identity": {**IDENTITY, "digest": "0124"}},
        {"identity": {**IDENTITY, "photos": [["1.jpg", 5, 18], ["2.jpg", None, None]]}},
        {"rows": ROWS + 1},
        {"forms": {**FORMS, "logits": ((7,), torch.float16)}},
        {"forms": {**FORMS, "logits": ((7, 1), torch.float32)}},
    ]
    caplog.set_level("INFO", "molt")
    folders = set()
    for other in others:
        with opened(tmp_path, **other) as cache:
            assert len(cache.missing()) == other.get("rows", ROWS)
            folders.add(cache.folder)
    assert len(folders) == len(others) and first.folder not in folders and contents(first) == before
    assert "features of other settings are kept there too" in caplog.text
    turned = dict(reversed(list(IDENTITY.items())))
    with opened(tmp_path, identity=turned, forms=dict(reversed(list(FORMS.items())))) as again:
        assert again.folder == first.folder and again.missing() == []
    first.close()


def test_photos_are_known_by_name_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"123")
    os.utime(path, ns=(5, 1_000_000_007))
    some = [Sample("x/a.jpg", path, 0, np.zeros((0, 4))), Sample("b", tmp_path / "no.jpg", 0, np.zeros((0, 4)))]
    assert photo_identity(some) == [["x/a.jpg", 3, 1_000_000_007], ["b", None, None]]
    assert json.loads(json.dumps(photo_identity(some))) == photo_identity(some)


@pytest.mark.parametrize("torn", [slice(0, 4), slice(4, 8), slice(0, 7), slice(1, 8), slice(0, 1)])
def test_a_torn_mark_does_not_count(tmp_path: Path, torn: slice) -> None:
    with opened(tmp_path) as cache:
        fill(cache, [4, 5, 6])
        with (cache.folder / "marks.bin").open("r+b") as file:
            file.seek(5 * 8 + torn.start)
            file.write(bytes(torn.stop - torn.start))
        assert cache.missing([4, 5, 6]) == [5]
        fill(cache, [5])
        assert same(cache.read([4, 5, 6]), values([4, 5, 6]))


def test_a_mark_of_another_row_does_not_count(tmp_path: Path) -> None:
    with opened(tmp_path) as cache:
        fill(cache, [4])
        with (cache.folder / "marks.bin").open("r+b") as file:
            file.seek(4 * 8)
            mark = file.read(8)
            file.seek(5 * 8)
            file.write(mark)
        assert cache.missing([4, 5]) == [5]


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("pickles_are_loaded",)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def replaced(path: Path, write: Callable[[Path], object]) -> None:
    path.unlink()
    write(path)


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "array cut": ("tokens.npy", cut, "tokens.npy: "),
    "array longer": ("tokens.npy", lambda path: os.truncate(path, 10_000), "tokens.npy: it has 10000 bytes"),
    "array empty": ("tokens.npy", lambda path: os.truncate(path, 0), "tokens.npy: "),
    "array gone": ("tokens.npy", Path.unlink, "tokens.npy: "),
    "array text": ("logits.npy", lambda path: path.write_text("no array"), "logits.npy: "),
    "array pickled": (
        "logits.npy",
        lambda path: replaced(path, lambda p: np.save(p, np.array([Evil()], object), allow_pickle=True)),
        "logits.npy: ",
    ),
    "array of other arrays": (
        "logits.npy",
        lambda path: (np.savez(path.with_suffix(".npz"), a=1), path.with_suffix(".npz").rename(path)),
        "logits.npy: it holds no array",
    ),
    "array of another shape": ("logits.npy", lambda path: np.save(path, np.zeros((ROWS, 6), np.float32)), "(12, 6)"),
    "array of another dtype": ("logits.npy", lambda path: np.save(path, np.zeros((ROWS, 7))), "float64"),
    "array of another order": (
        "logits.npy",
        lambda path: np.save(path, np.zeros((ROWS, 7), np.float32, order="F")),
        "logits.npy: ",
    ),
    "array linked": ("logits.npy", lambda path: replaced(path, lambda p: p.symlink_to("tokens.npy")), "no ordinary"),
    "array a pipe": ("logits.npy", lambda path: replaced(path, os.mkfifo), "no ordinary"),
    "marks cut": ("marks.bin", cut, "marks.bin has 95 bytes, expected 96"),
    "marks gone": ("marks.bin", Path.unlink, "marks.bin is missing"),
    "messages gone": ("bad.jsonl", Path.unlink, "bad.jsonl is missing"),
    "messages a pipe": ("bad.jsonl", lambda path: replaced(path, os.mkfifo), "bad.jsonl is no ordinary file"),
    "description changed": (
        "cache.json",
        lambda path: path.write_text(path.read_text().replace("0123", "0124")),
        "cache.json says something else",
    ),
    "description cut": ("cache.json", cut, "cache.json says something else"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    file, damage, said = DAMAGES[name]
    with opened(tmp_path) as cache:
        fill(cache, [1, 2])
        cache.mark_bad(3, "why")
    damage(cache.folder / file)
    with pytest.raises(CacheError) as raised:
        opened(tmp_path)
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert str(raised.value).startswith(f"{cache.folder}: ") and "delete this folder" in str(raised.value)
    assert not Path("pickles_are_loaded").exists()
    shutil.rmtree(cache.folder)
    with opened(tmp_path) as again:
        assert again.missing() == list(range(ROWS))


def test_some_arrays_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first time all are read, as a checksum is of all; then those asked for."""
    with opened(tmp_path) as cache:
        fill(cache, list(range(ROWS)))
    with opened(tmp_path) as again:
        read: list[int] = []
        original = files.read_at
        monkeypatch.setattr(files, "read_at", lambda file, *rest: read.append(file) or original(file, *rest))
        wanted = {"logits": values([3, 1])["logits"]}
        assert same(again.read([3, 1], ["logits"]), wanted) and len(set(read)) == 4
        read.clear()
        assert same(again.read([3, 1], ["logits"]), wanted) and len(set(read)) == 1, "the array alone"
        assert again.read([3], []) == {} and again.width("tokens") == 15 and again.width("label") == 1
        with pytest.raises(ValueError, match="names must be of label, logits, tokens, got masks"):
            again.read([3], ["masks"])


def test_a_changed_byte_is_told_when_its_row_is_read(tmp_path: Path) -> None:
    with opened(tmp_path) as cache:
        fill(cache, list(range(ROWS)))
    path = cache.folder / "logits.npy"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - ROWS * 28 + 5 * 28)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with opened(tmp_path) as again:
        assert same(again.read([4, 6]), values([4, 6]))
        with pytest.raises(CacheError, match="row 5 is not what was written"):
            again.read([4, 5, 6])


def test_files_cut_under_our_hands_are_told(tmp_path: Path) -> None:
    with opened(tmp_path) as cache:
        fill(cache, list(range(ROWS)))
        cut(cache.folder / "logits.npy")
        with pytest.raises(CacheError, match="logits.npy ends before row 11"):
            cache.read([0, 11])
        assert same(cache.read([0]), values([0]))
        cut(cache.folder / "marks.bin")
        with pytest.raises(CacheError, match="marks.bin ends before row 11"):
            cache.missing()


def test_a_lost_message_is_told_and_a_torn_one_is_passed_over(tmp_path: Path) -> None:
    with opened(tmp_path) as cache:
        path = cache.folder / "bad.jsonl"
        path.write_bytes(b'{"row": 3, "mess')
        cache.mark_bad(3, "why")
        path.write_bytes(
            path.read_bytes() + b'\n[1]\n{"row": [], "message": 1}\n{"row": 3, "message": "other"}\n\xff\n'
        )
        assert cache.bad() == {3: "why"}
        path.write_bytes(b"")
        with pytest.raises(CacheError, match="has no message for row 3"):
            cache.bad()


def limited(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_no_room_is_told_before_the_work(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(OSError, match="bytes are needed") as raised:
        opened(tmp_path, rows=free // 60)
    assert raised.value.errno == errno.ENOSPC and "are free" in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"], "nothing is left"


def test_files_that_cannot_be_made_are_told(tmp_path: Path) -> None:
    def work() -> None:
        limited(250)  # tokens have 128 bytes of header and 12 x 30
        with pytest.raises(OSError, match=r"no room for features of [\d,]+ bytes \(File too large\)") as raised:
            opened(tmp_path)
        assert raised.value.errno == errno.EFBIG
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]

    assert status(in_child(work)) == 0
    with opened(tmp_path) as cache:
        fill(cache, [0])


@pytest.mark.parametrize("what", ["rows", "message"])
def test_a_disk_that_fails_while_filling(tmp_path: Path, what: str) -> None:
    def work() -> None:
        with opened(tmp_path) as cache:
            fill(cache, [0, 1])
            limited(128 + 28 * 2 + 13 if what == "rows" else 6)  # in the middle of row 2 of the logits
            with pytest.raises(OSError, match=r"File too large; [\d,]+ bytes free|bytes written") as raised:
                cache.write([2], values([2])) if what == "rows" else cache.mark_bad(2, "why")
            assert str(cache.folder) in str(raised.value) and "rows marked before still count" in str(raised.value)
            assert cache.missing([0, 1, 2]) == [2] and cache.bad() == {}
            assert same(cache.read([0, 1]), values([0, 1]))

    assert status(in_child(work)) == 0
    with opened(tmp_path) as cache:
        assert cache.missing([0, 1, 2]) == [2]
        fill(cache, [2])
        assert same(cache.read([0, 1, 2]), values([0, 1, 2]))


def test_space_is_taken_at_once(tmp_path: Path) -> None:
    with opened(tmp_path, forms={"x": ((1024,), torch.float32)}, rows=100) as cache:
        assert (cache.folder / "x.npy").stat().st_blocks * 512 >= 100 * 4096


def test_no_rows(tmp_path: Path) -> None:
    with opened(tmp_path, rows=0) as cache:
        assert cache.missing() == [] and cache.bad() == {}
        cache.write([], values([]))
        assert same(cache.read([]), values([])) and cache.read([])["tokens"].shape == (0, 3, 5)
        with pytest.raises(ValueError, match="rows must be in"):
            cache.missing([0])
    with opened(tmp_path, rows=0) as again, opened(tmp_path) as some:
        assert again.bytes > 0 and again.folder == cache.folder
        some.write([], values([]))
        assert same(some.read([]), values([])) and some.missing([]) == []


@pytest.mark.parametrize(
    ("wrong", "kind", "said"),
    [
        ({"identity": {"a": float("nan")}}, TypeError, "identity must be made of plain values"),
        ({"identity": {"a": object()}}, TypeError, "identity must be made of plain values"),
        ({"identity": "abc"}, TypeError, "identity must be a dict, got str"),
        ({"rows": -1}, ValueError, "rows must be at least 0, got -1"),
        ({"forms": {"../x": ((1,), torch.float32)}}, ValueError, "names of letters, digits, - and _, got '../x'"),
        ({"forms": {"x": ((0,), torch.float32)}}, ValueError, r"arrays['x'] must have sides of at least 1, got (0,)"),
        ({"forms": {"x": ((1,), np.float32)}}, TypeError, "arrays['x'] must have a torch.dtype"),
        ({"forms": {"x": ((1.5,), torch.float32)}}, TypeError, "arrays['x'] must be (shape, dtype), got ((1.5,)"),
        ({"forms": {"x": 3}}, TypeError, "arrays['x'] must be (shape, dtype), got 3"),
        ({"forms": {"x": ((1,), torch.float8_e4m3fn)}}, TypeError, "must have a dtype that NumPy knows, or bfloat16"),
    ],
)
def test_wrong_arguments_of_open(tmp_path: Path, wrong: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind) as raised:
        opened(tmp_path / "new", **wrong)
    assert said in str(raised.value) and not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="arrays must hold at least one"):
        FeatureCache.open(tmp_path, IDENTITY, arrays={}, rows=1)


def test_wrong_rows_and_values(tmp_path: Path) -> None:
    good = values([1, 2])
    with opened(tmp_path) as cache:
        for rows, what, kind, said in (
            ([1, 12], good, ValueError, "rows must be in 0..11, got 1 to 12"),
            ([-1, 1], good, ValueError, "got -1 to 1"),
            ([1.0, 2.0], good, TypeError, "rows must be (n,) integers, got float64"),
            ([[1, 2]], good, TypeError, "of shape (1, 2)"),
            ([True, False], good, TypeError, "got bool"),
            ([1, 1], good, ValueError, "rows must name each row once"),
            ([1, 2], {"tokens": good["tokens"]}, ValueError, "values must be of label, logits, tokens, got tokens"),
            ([1, 2], {**good, "logits": good["logits"][:1]}, ValueError, "values['logits'] must be torch.float32"),
            ([1, 2], {**good, "tokens": good["tokens"].float()}, ValueError, "got torch.float32 of shape (2, 3, 5)"),
            ([1, 2], {**good, "logits": [1]}, ValueError, "got list"),
            ([1, 2], {**good, "logits": np.array(["a"])}, ValueError, "got <U1 of shape (1,)"),
        ):
            with pytest.raises(kind) as raised:
                cache.write(rows, what)
            assert said in str(raised.value)
        with pytest.raises(TypeError, match="message must be text, got NoneType"):
            cache.mark_bad(1, None)  # type: ignore[arg-type]
        assert cache.missing() == list(range(ROWS)) and (cache.folder / "bad.jsonl").stat().st_size == 0
        with pytest.raises(TypeError, match="open it there"):
            pickle.dumps(cache)


def test_a_pass_in_threads_and_reading_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Bit for bit what one thread computes and what lies on disk, whatever the number of readers."""
    samples = []
    for number in range(7):
        path = tmp_path / f"{number}.png"
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(path)
        samples.append(Sample(path.name, path, 0, np.zeros((0, 4))))
    samples[4].path.write_bytes(b"no photo")
    torch.manual_seed(0)
    model = molt.create_model("molt_deit_tiny", 2, (32, 48), pretrained=False).eval().freeze_backbones()
    kept = []
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(3)
    for readers in (1, 5):
        store = FeatureStore(model, tmp_path / str(readers), samples, 2, AUGMENTATIONS["crop"], "no")
        done: list[int] = []
        store.fill(range(14), batch=3, device=torch.device("cpu"), step=done.append, readers=readers)
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3
        assert done == [3, 6, 9, 12, 14] and store.missing(range(7)) == []
        store.look(range(7))
        assert list(store.bad) == [4] and "4.png" in store.bad[4]
        good = [13, 0, 1, 6, 2]
        kept.append(store.read(good))
        assert [len(value) for value in store.read([])] == [0, 0]
        kept.append(store.read(good))
        with monkeypatch.context() as patch:
            patch.setattr(features, "MOST_HELD", 0)
            kept.append(store.read(good))
        with pytest.raises(ValueError, match="rows must be filled, got row 8"):
            store.read([0, 8])
    for other in kept[1:]:
        assert all(torch.equal(a, b) for a, b in zip(kept[0], other, strict=True))


def test_a_pass_ends_with_the_error_of_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written before counts, and no thread is left."""
    path = tmp_path / "0.png"
    PIL.Image.new("RGB", (40, 40)).save(path)
    samples = [Sample(f"{i}.png", path, 0, np.zeros((0, 4))) for i in range(6)]
    model = molt.create_model("molt_deit_tiny", 2, (32,), pretrained=False).eval().freeze_backbones()
    store = FeatureStore(model, tmp_path / "cache", samples, 1, AUGMENTATIONS["none"], "no")
    original = FeatureCache.write

    def full(cache: FeatureCache, rows: Any, found: Any, **rest: Any) -> int:
        if 2 in rows:
            raise OSError(errno.ENOSPC, "full")
        return original(cache, rows, found, **rest)

    monkeypatch.setattr(FeatureCache, "write", full)
    with pytest.raises(OSError, match="full"):
        store.fill(range(6), batch=2, device=torch.device("cpu"))
    assert store.missing(range(6)) == [2, 3] and not [t for t in threading.enumerate() if "molt-" in t.name]


CPU = torch.device("cpu")


def some_photos(folder: Path, count: int) -> list[Sample]:
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
    return [Sample(f"{i}.png", folder / f"{i}.png", 0, np.zeros((0, 4))) for i in range(count)]


@pytest.fixture(scope="module")
def tiny() -> molt.MOLT:
    torch.manual_seed(0)
    return molt.create_model("molt_deit_tiny", 2, (32, 48), pretrained=False).eval().freeze_backbones()


def new_store(model: molt.MOLT, folder: Path, samples: list[Sample]) -> FeatureStore:
    return FeatureStore(model, folder, samples, 1, AUGMENTATIONS["none"], "no")


def test_two_runs_fill_the_same_rows(tmp_path: Path, tiny: molt.MOLT) -> None:
    """The other fills all while the first is at its first batch; then in processes of their own."""
    samples = some_photos(tmp_path / "photos", 8)
    samples[1].path.write_bytes(b"no photo")
    good = [0, *range(2, 8)]
    one, other, alone = (new_store(tiny, tmp_path / name, samples) for name in ("shared", "shared", "alone"))
    alone.fill(range(8), batch=2, device=CPU)
    seen: list[int] = []
    see = one._see

    def late(found: Any, device: torch.device) -> Any:
        seen.extend(row for row, _ in found)
        values = see(found, device)
        other.fill(other.missing(range(8)), batch=2, device=device)
        return values

    one._see = late  # type: ignore[method-assign]
    done: list[int] = []
    one.fill(one.missing(range(8)), batch=2, device=CPU, step=done.append)
    assert done == [2, 4, 6, 8] and seen == [0, 2, 3, 4, 5], "what was read before, and nothing after"

    def work() -> None:
        store = new_store(tiny, tmp_path / "processes", samples)
        store.fill(range(8), batch=2, device=CPU)
        assert store.missing(range(8)) == []

    children = [in_child(work) for _ in range(2)]
    assert [status(child) for child in children] == [0, 0]
    for store in (one, other, new_store(tiny, tmp_path / "processes", samples)):
        store.look(range(8))
        assert store.missing(range(8)) == [] and list(store.bad) == [1]
        for found, expected in zip(store.read(good), alone.read(good), strict=True):
            torch.testing.assert_close(found, expected)


def test_two_runs_in_step_part(tmp_path: Path, tiny: molt.MOLT, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose row is always there by the time it would write it goes on elsewhere."""
    samples = some_photos(tmp_path / "photos", 16)
    one, other = (new_store(tiny, tmp_path / "cache", samples) for _ in range(2))
    see, calls, seen = one._see, iter(range(16)), []
    drawn = random.Random(0)
    monkeypatch.setattr(features.random, "Random", lambda: drawn)

    def in_step(found: Any, device: torch.device) -> Any:
        values = see(found, device)
        seen.extend(row for scale, rows, _ in values if scale == 0 for row in rows)
        other.fill(other.missing([next(calls)]), batch=1, device=device)
        return values

    one._see = in_step  # type: ignore[method-assign]
    one.fill(range(16), batch=1, device=CPU)
    assert one.missing(range(16)) == [] and len(seen) == len(set(seen)) <= 12


AWAY = "features done so far are kept, and resume=True (--resume) goes on when it can be read again"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("folder", f"4.png: no such file; {AWAY}"),
        ("disk", f"4.png: cannot be read (Input/output error); {AWAY}"),
        ("files", f"4.png: cannot be read (Too many open files); {AWAY}"),
        ("changed", "4.png: the file is empty; it was changed while features were computed"),
    ],
)
def test_a_moment_without_photos_is_not_kept(
    tmp_path: Path, tiny: molt.MOLT, monkeypatch: pytest.MonkeyPatch, what: str, said: str
) -> None:
    samples = some_photos(tmp_path / "photos", 6)
    samples[0].path.write_bytes(b"no photo")
    alone = new_store(tiny, tmp_path / "alone", samples)
    alone.fill(range(6), batch=1, device=CPU)
    store = new_store(tiny, tmp_path / "cache", samples)
    whole, state = samples[4].path.read_bytes(), samples[4].path.stat()
    original = images._open

    def failing(path: Path, limit: int) -> Any:
        if path == samples[4].path:
            number = errno.EIO if what == "disk" else errno.EMFILE
            raise OSError(number, os.strerror(number))
        return original(path, limit)

    with monkeypatch.context() as patch:
        if what == "folder":
            samples[4].path.rename(tmp_path / "away.png")
        elif what == "changed":
            samples[4].path.write_bytes(b"")
        else:
            patch.setattr(images, "_open", failing)
        with pytest.raises(TrainingError) as raised:
            store.fill(range(6), batch=1, device=CPU)
        assert said in str(raised.value) and str(samples[4].path) in str(raised.value)
        assert not [t for t in threading.enumerate() if "molt-" in t.name]
    samples[4].path.write_bytes(whole)
    os.utime(samples[4].path, ns=(state.st_atime_ns, state.st_mtime_ns))
    again = new_store(tiny, tmp_path / "cache", samples)
    assert again.missing(range(6)) == [4, 5] and again.caches[0].folder == store.caches[0].folder
    again.fill([4, 5], batch=1, device=CPU)
    again.look(range(6))
    assert list(again.bad) == [0], "a photo that cannot be decoded is bad for good"
    assert all(torch.equal(a, b) for a, b in zip(again.read(range(1, 6)), alone.read(range(1, 6)), strict=True))


@pytest.mark.parametrize("what", ["absent", "forbidden", "late"])
def test_photos_that_were_never_there_are_looked_for_again(
    tmp_path: Path, tiny: molt.MOLT, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """They are skipped, and features of the photos with them are others."""
    samples = some_photos(tmp_path / "photos", 3)
    original, access = images._open, os.access

    def forbidden(path: Path, limit: int) -> Any:
        if path == samples[1].path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return original(path, limit)

    with monkeypatch.context() as patch:
        if what == "forbidden":  # root may read all
            patch.setattr(os, "access", lambda path, mode: path != samples[1].path and access(path, mode))
            patch.setattr(images, "_open", forbidden)
        else:
            samples[1].path.rename(tmp_path / "away.png")
        store = new_store(tiny, tmp_path / "cache", samples)
        if what == "late":
            (tmp_path / "away.png").rename(samples[1].path)
        store.fill(range(3), batch=2, device=CPU)
        store.look(range(3))
    reasons = {
        "absent": "no such file",
        "forbidden": "cannot be read (Permission denied)",
        "late": "was not there when the features were begun",
    }
    assert store.bad == {1: f"{samples[1].path}: {reasons[what]}"} and store.missing(range(3)) == []
    if what == "absent":
        (tmp_path / "away.png").rename(samples[1].path)
    again = new_store(tiny, tmp_path / "cache", samples)
    assert again.missing(range(3)) == [0, 1, 2]
    again.fill(range(3), batch=2, device=CPU)
    again.look(range(3))
    assert again.bad == {}


def test_a_limit_of_pixels_is_part_of_what_features_are(
    tmp_path: Path, tiny: molt.MOLT, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = some_photos(tmp_path / "photos", 1)
    monkeypatch.setenv("MOLT_MAX_PIXELS", "100")
    store = new_store(tiny, tmp_path / "cache", samples)
    store.fill([0], batch=1, device=CPU)
    store.look([0])
    assert "over the limit of 100" in store.bad[0]
    monkeypatch.setenv("MOLT_MAX_PIXELS", "many")
    with pytest.raises(PhotoError, match="MOLT_MAX_PIXELS must be a positive integer"):
        new_store(tiny, tmp_path / "cache", samples)
    monkeypatch.delenv("MOLT_MAX_PIXELS")
    store = new_store(tiny, tmp_path / "cache", samples)
    assert store.missing([0]) == [0]
    store.fill([0], batch=1, device=CPU)
    assert store.caches[0].bad() == {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_models_of_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    samples = some_photos(tmp_path / "photos", 3)
    torch.manual_seed(0)
    model = molt.create_model("molt_deit_tiny", 2, (32, 48), pretrained=False).eval().freeze_backbones().to(dtype)
    store = new_store(model, tmp_path / "cache", samples)
    store.fill(range(3), batch=3, device=CPU)
    logits, _ = _Heads(model)(store.read(range(3)))
    pixels = torch.stack([images.read_photo(sample.path, model.finest).pixels for sample in samples]).to(dtype)
    with torch.inference_mode():
        expected = [model.transformer(scale).see(shown).logits for scale, shown in enumerate(model.pyramid(pixels))]
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-2}
    for found, one in zip(logits, expected, strict=True):
        assert found.dtype == dtype and one is not None
        torch.testing.assert_close(found, one, **close)
    assert new_store(model.float(), tmp_path / "cache", samples).missing(range(3)) == [0, 1, 2], "of another precision"


@pytest.mark.parametrize(("workers", "readers"), [(0, None), (3, 3)])
def test_workers_read_photos_of_kept_features(
    tmp_path: Path, tiny: molt.MOLT, monkeypatch: pytest.MonkeyPatch, workers: int, readers: int | None
) -> None:
    class Reached(Exception):
        pass

    def stopped(store: FeatureStore, rows: Any, **rest: Any) -> None:
        assert rest["readers"] == readers
        raise Reached

    for name in ("a", "b"):
        (tmp_path / "photos").mkdir(exist_ok=True)
        some_photos(tmp_path / "photos" / name, 3)
    monkeypatch.setattr(FeatureStore, "fill", stopped)
    recipe = Recipe(name="tiny", model="molt_deit_tiny", sizes=((32, 32),), epochs=1, batch=2)
    with pytest.raises(Reached):
        train(
            read_set(tmp_path / "photos"),
            tmp_path / "out",
            recipe=recipe,
            pretrained=False,
            device="cpu",
            workers=workers,
        )
