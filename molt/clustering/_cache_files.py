"""Label maps as PNG files in a folder that several processes share, and in which any file may be damaged."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL.Image
from PIL import PngImagePlugin

from molt._files import user_path, whole_file

logger = logging.getLogger("molt")
CHUNK = "molt"  # the text chunk that says what a file holds
MODES = {2**8: ("L",), 2**16: ("I;16", "I"), 2**24: ("RGB",)}  # most labels: modes that Pillow reads such a file in
MOST_LABELS = max(MODES)
STALE_SECONDS = 3600  # no write takes as long
STEP = 64  # the folder is looked through again once a 64th of its bound was written
ATTEMPTS = 10
_ROOM, _MAP, _PART = (re.compile(p) for p in (r"[0-9a-f]{2}", r"[0-9a-f]{64}\.png", r"\.[a-z0-9_]{8}\.part"))


class LabelFiles:
    """Label maps in ``folder/xx/KEY.png``, xx being KEY's first two digits; KEY 64 hexadecimal digits.

    Args:
        folder: made when first written to. Links in it are not followed.
        max_bytes: files are removed, the least recently used first, until no more are left.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._total: int | None = None
        self._written = 0  # since the folder was last looked through
        self._warned = False

    def load(self, key: str, made: str, size: tuple[int, int], most: int | None) -> tuple[np.ndarray, int] | None:
        """Return the int32 labels and count under a key, and mark them used; None where there are none to be trusted.

        Args:
            key: of the file.
            made: description that :meth:`store` was given, for the length a file can have.
            size: (H, W) of the labels.
            most: above every label, where known.
        """
        path = self._path(key)
        try:
            room = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                # A pipe of that name would keep an ordinary open waiting.
                file = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=room)
            finally:
                os.close(room)
        except (FileNotFoundError, NotADirectoryError):
            return None  # a link or file in the folder's place is told when it comes to writing
        except OSError as error:
            logger.warning("%s: the label map cannot be read (%s), computed again", path, error.strerror)
            return None
        try:
            found = decode(_read(file, size[0] * size[1] * 4 + 2 * len(made) + 2**16), key, size)
            if most is not None and int(found[0].max()) >= most:
                raise ValueError(f"label {found[0].max()}, expected less than {most}")
            with suppress(OSError):  # a folder that may only be read still serves
                os.utime(file)
        except Exception as error:  # Pillow raises nearly anything on a damaged file
            reason = " ".join(str(error).split())
            logger.warning("%s: the label map is damaged (%s), computed again", path, reason)
            return None
        finally:
            os.close(file)
        return found

    def store(self, key: str, made: str, labels: np.ndarray, count: int) -> None:
        """Write labels (H, W) int32 in 0..count-1; what hinders it is logged once."""
        try:
            if count > MOST_LABELS:
                raise OSError(f"{count} clusters, {MOST_LABELS} at most can be kept")
            data = encode(labels, count, key, made)
            if len(data) > self.max_bytes:
                raise OSError(f"one takes {len(data)} bytes, more than max_bytes = {self.max_bytes}")
            self._write(self._path(key), data)
            self._written += len(data)
            self._total = None if self._total is None else self._total + len(data)
            if self._total is None or self._total > self.max_bytes or self._written >= self.max_bytes // STEP:
                self._sweep(len(data))
        except OSError as error:
            self._warn(error.strerror or str(error))

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.png"

    def _write(self, path: Path, data: bytes) -> None:
        for attempt in range(ATTEMPTS):
            try:
                if path.parent.is_symlink():
                    raise OSError(f"{path.parent} is a link")
                if path.exists() and not path.is_file() and not path.is_dir():
                    path.unlink()  # a pipe, say: of that name there is only a label map
                with whole_file(path) as part:
                    part.write_bytes(data)
                return
            except (FileNotFoundError, FileExistsError):
                # Another process removed the folder, empty as it was, under our hands.
                if attempt == ATTEMPTS - 1:
                    raise

    def _sweep(self, newest: int) -> None:
        """Take stock of what all processes wrote, and remove files until the bound holds.

        Somewhat further than the bound asks, so that a full folder is not looked through at each write; the file just
        written, of ``newest`` bytes, fits.
        """
        goal = max(self.max_bytes - self.max_bytes // STEP, newest)
        kept = []
        for path, state, is_map in entries(self.folder):
            if is_map:
                kept.append((state.st_mtime_ns, state.st_size, path))
            else:
                _remove_stale(path, state)
        total = sum(size for _, size, _ in kept)
        if total > self.max_bytes:
            for _, size, path in sorted(kept):
                if total <= goal:
                    break
                path.unlink(missing_ok=True)
                total -= size
        self._total, self._written = total, 0

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("%s: label maps are not kept in this folder (%s)", self.folder, reason)


def clear(folder: str | Path) -> tuple[int, int]:
    """Remove the label maps that a :class:`CachedClusterer` keeps in a folder; return how many files and bytes went.

    Only files named as it names them, and its unfinished ones once they are an hour old; anything else stays. The
    two-digit folders that became empty go, the folder itself stays. One that is not there holds none.

    Raises:
        OSError: the folder cannot be read, or a file not removed.
    """
    files = size = 0
    rooms = set()
    for path, state, is_map in entries(user_path(folder)):
        if is_map:
            with suppress(FileNotFoundError):  # another process was quicker
                path.unlink()
                files, size = files + 1, size + state.st_size
        elif _remove_stale(path, state):
            files, size = files + 1, size + state.st_size
        rooms.add(path.parent)
    for room in rooms:
        with suppress(OSError):  # not empty, or gone
            room.rmdir()
    return files, size


def entries(folder: Path) -> Iterator[tuple[Path, os.stat_result, bool]]:
    """Yield path, state, and whether it is a map or else an unfinished file, of the cache's own files in a folder."""
    for room in _scan(folder):
        if not _ROOM.fullmatch(room.name) or not room.is_dir(follow_symlinks=False):
            continue
        for entry in _scan(room.path):
            is_map = is_map_name(room.name, entry.name)
            if not is_map and not _PART.fullmatch(entry.name):
                continue
            with suppress(FileNotFoundError):
                state = entry.stat(follow_symlinks=False)
                if stat.S_ISREG(state.st_mode):
                    yield Path(entry.path), state, is_map


def is_map_name(room: str, name: str) -> bool:
    """Return whether a file of this name in a folder of that name is one of a cache's label maps."""
    return _MAP.fullmatch(name) is not None and room == name[:2]


def encode(labels: np.ndarray, count: int, key: str, made: str) -> bytes:
    """Return a PNG of labels (H, W) int32 in 0..count-1: gray of 8 or 16 bits, or 24 bits as RGB, red the highest."""
    text = PngImagePlugin.PngInfo()
    held = {"key": key, "count": count, "digest": _digest(labels, count), "made": json.loads(made)}
    text.add_text(CHUNK, json.dumps(held, sort_keys=True))
    if count <= 2**8:
        pixels = labels.astype(np.uint8)
    elif count <= 2**16:
        pixels = labels.astype(np.uint16)
    else:
        pixels = np.stack([labels >> 16, labels >> 8 & 255, labels & 255], -1).astype(np.uint8)
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, format="PNG", pnginfo=text)
    return out.getvalue()


def decode(data: bytes, key: str, size: tuple[int, int]) -> tuple[np.ndarray, int]:
    """Return the labels (H, W) int32 and count that :func:`encode` wrote.

    Raises:
        Exception: of any kind, where the file is not what was written under this key.
    """
    # Not Image.open, which would refuse label maps of large photos; nothing is decoded before the size is known.
    image = PngImagePlugin.PngImageFile(io.BytesIO(data))
    if image.size != size[::-1]:
        raise ValueError(f"{image.size[0]}x{image.size[1]} pixels, expected {size[1]}x{size[0]}")
    held = json.loads(image.info.get(CHUNK, "null"))
    if not isinstance(held, dict) or held.get("key") != key:
        raise ValueError("not written under this key")
    count = held.get("count")
    if type(count) is not int or not 0 < count <= MOST_LABELS:
        raise ValueError(f"{count!r} clusters, expected 1 to {MOST_LABELS}")
    modes = next(modes for most, modes in MODES.items() if count <= most)
    if image.mode not in modes:
        raise ValueError(f"pixels are {image.mode}, expected {modes[0]}")
    image.load()
    labels = np.asarray(image).astype(np.int32)
    if labels.ndim == 3:
        labels = labels[..., 0] << 16 | labels[..., 1] << 8 | labels[..., 2]
    if held.get("digest") != _digest(labels, count):
        raise ValueError("its labels or their count are not those written")
    if int(labels.min()) < 0 or int(labels.max()) >= count:
        raise ValueError(f"labels {labels.min()} to {labels.max()}, expected 0 to {count - 1}")
    return labels, count


def _digest(labels: np.ndarray, count: int) -> str:
    # PNG's own sums are not enough: Pillow skips those of pixels, and all where it is told to read damaged files.
    found = hashlib.blake2b(str(count).encode(), digest_size=16)
    found.update(np.ascontiguousarray(labels, "<i4").data)
    return found.hexdigest()


def _read(file: int, limit: int) -> bytes:
    state = os.fstat(file)
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("not an ordinary file")
    if state.st_size > limit:
        raise ValueError(f"{state.st_size} bytes, expected at most {limit}")
    with open(file, "rb", closefd=False) as opened:
        return opened.read(limit)


def _remove_stale(path: Path, state: os.stat_result) -> bool:
    """Remove what a process that was killed left unfinished; return whether it went."""
    if time.time() - state.st_mtime < STALE_SECONDS:
        return False
    with suppress(FileNotFoundError):
        path.unlink()
        return True
    return False


def _scan(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except FileNotFoundError:
        return []
