"""What a frozen network sees, kept on disk a row a photo and view, so that it is computed once.

Each set of features has a folder of its own, named by a digest of all that they depend on: another network, size or
photo never meets them. In it lie ``cache.json``, which says what that is, a ``NAME.npy`` for each array, ``marks.bin``
with eight bytes a row, and ``bad.jsonl`` with the photos that could not be read. A row counts from its mark on, which
is written when its data are on disk, and holds a checksum of them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molt._arguments import check_int
from molt._files import user_path
from molt._words import count
from molt.data.annotations import Sample
from molt.training import _feature_files as files
from molt.training._feature_files import ABOUT, BAD, IS_BAD, IS_DONE, MARK, MARKS, CacheError, damaged

logger = logging.getLogger("molt")


class FeatureCache:
    """Rows of named arrays on disk, filled once and in any order; made by :meth:`open`.

    Several processes may fill it at once, one writing at a time, and any may be killed at any moment. Rows are read and
    written without mapping the files, so that a full or failing disk is an error and not the end of the process.

    Attributes:
        folder: where the files lie.
        rows: how many there are.
        bytes: of disk space that the files take.
    """

    def __init__(self, folder: Path, rows: int, arrays: files.Forms) -> None:
        self._files: dict[str, int] = {}
        self.folder = folder
        self.rows = rows
        self._arrays = dict(sorted(arrays.items()))
        self._sound = np.zeros(rows, np.bool_)  # rows whose checksum this process has looked at
        self._starts: dict[str, int] = {}
        try:
            for name, (shape, dtype) in self._arrays.items():
                self._starts[name] = files.check_array(folder, name, (rows, *shape), dtype)
                self._files[name] = files.open_file(folder, f"{name}.npy")
            self._marks = self._files[MARKS] = files.open_file(folder, MARKS)
            self._messages = self._files[BAD] = files.open_file(folder, BAD, os.O_APPEND)
            if (size := os.fstat(self._marks).st_size) != rows * MARK.itemsize:
                raise damaged(folder, f"{MARKS} has {count(size, 'byte')}, expected {rows * MARK.itemsize}")
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls,
        folder: str | Path,
        identity: Mapping[str, Any],
        *,
        arrays: Mapping[str, tuple[Sequence[int], torch.dtype]],
        rows: int,
    ) -> FeatureCache:
        """Return the features of this identity below a folder, empty ones where there are none yet.

        The space of all rows is taken at once, so that a disk that is too small is told before the work.

        Args:
            folder: of all caches; this one's is ``folder/DIGEST``, the digest of identity, arrays and rows.
            identity: all that the features depend on, as JSON knows it: network, digest of its weights, sizes,
                precision, views, and the photos, see :func:`photo_identity`.
            arrays: shape of a row and dtype of each array.
            rows: how many, at least 0.

        Raises:
            TypeError, ValueError: an argument of another type or form.
            CacheError: what lies there is damaged.
            OSError: it cannot be written, or the disk has too little room.
        """
        check_int("rows", rows, 0)
        wanted = {name: files.check_form(name, form) for name, form in arrays.items()}
        if not wanted:
            raise ValueError("arrays must hold at least one, got none")
        about = files.describe(identity, wanted, rows)
        top = user_path(folder)
        room = top / hashlib.sha256(about).hexdigest()[:32]
        top.mkdir(parents=True, exist_ok=True)
        with files.locked(top):
            if not (room / ABOUT).exists():
                others = [path for path in top.iterdir() if (path / ABOUT).exists()]
                if others:
                    taken = sum(path.stat().st_size for other in others for path in other.iterdir())
                    logger.info("%s: features of other settings are kept there too, %d bytes", top, taken)
                files.make(room, wanted, rows, about)
        held = room / ABOUT
        if held.stat().st_size != len(about) or held.read_bytes() != about:
            raise damaged(room, f"{ABOUT} says something else than the folder's name")
        return cls(room, rows, wanted)

    @property
    def bytes(self) -> int:
        """Bytes of disk space that the files take."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def width(self, name: str) -> int:
        """Return how many numbers a row of an array has."""
        return math.prod(self._arrays[name][0])

    def missing(self, rows: Any = None) -> list[int]:
        """Return those of the rows, by default of all, that are neither there nor marked bad, in the order given."""
        asked = self._rows(rows)
        state, _ = self._state(asked)
        return [int(row) for row in asked[state == 0]]

    def write(self, rows: Any, values: Mapping[str, Tensor | NDArray], *, keep_first: bool = False) -> int:
        """Keep rows; they count when this returns, which is with the number of rows that were written.

        Args:
            rows: (n,) integers, each once, of rows that are missing.
            values: (n, *shape) of each array, of exactly its dtype, on any device.
            keep_first: leave rows as they are that another process has filled or marked bad, in place of an error.

        Raises:
            TypeError, ValueError: an argument of another type, shape or range, or rows that are there already.
            OSError: a row cannot be written, as on a full disk; all rows marked before still count.
        """
        asked = self._rows(rows)
        blocks = self._blocks(asked, values)
        # Until the marks are written: the data of two processes would not fit one checksum.
        with files.locked(self.folder):
            places = self._missing_places(asked, keep_first)
            asked = asked[places]
            if len(asked) == 0:
                return 0
            sums = np.zeros(len(asked), np.uint32)
            with self._told("features cannot be written"):
                for name, block in blocks.items():
                    width = block.shape[1]
                    for number, (place, row) in enumerate(zip(places.tolist(), asked.tolist(), strict=True)):
                        files.write_at(self._files[name], block[place].data, self._starts[name] + row * width)
                        sums[number] = zlib.crc32(block[place].data, int(sums[number]))
                for name in blocks:
                    os.fdatasync(self._files[name])
                self._mark(asked, sums, IS_DONE)
        self._sound[asked] = True
        return len(asked)

    def mark_bad(self, row: int, message: str, *, keep_first: bool = False) -> None:
        """Remember that a row's photo cannot be read, and why.

        Args:
            row: one that is missing.
            message: why.
            keep_first: as for :meth:`write`.

        Raises:
            TypeError, ValueError: a row out of range or there already, or a message that is no text.
            OSError: it cannot be written.
        """
        asked = self._rows([row])
        if not isinstance(message, str):
            raise TypeError(f"message must be text, got {type(message).__name__}")
        # A new line on both sides: what another process left unfinished must not take this one along.
        line = f"\n{json.dumps({'row': int(asked[0]), 'message': message})}\n".encode()
        with files.locked(self.folder), self._told("a bad photo cannot be noted"):
            if len(self._missing_places(asked, keep_first)) == 0:
                return
            if (written := os.write(self._messages, line)) < len(line):
                raise OSError(errno.ENOSPC, f"{written} of {len(line)} bytes written")
            os.fdatasync(self._messages)
            self._mark(asked, np.array([files.sum_of(message)], np.uint32), IS_BAD)

    def bad(self) -> dict[int, str]:
        """Return the message of each row that is marked bad.

        Raises:
            CacheError: a message is lost.
        """
        every = self._rows(None)
        state, sums = self._state(every)
        wanted = {int(row): int(sums[row]) for row in every[state == 2]}
        found: dict[int, str] = {}
        lines = (self.folder / BAD).read_bytes().splitlines() if wanted else []
        for line in lines:
            try:
                said = json.loads(line)
                row, message = said["row"], said["message"]
                if wanted.get(row) == files.sum_of(message):
                    found[row] = message
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                continue  # empty, or left unfinished
        if lost := sorted(set(wanted) - set(found)):
            raise damaged(self.folder, f"{BAD} has no message for row {lost[0]}")
        return dict(sorted(found.items()))

    def read(self, rows: Any, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return rows (n, *shape) of each array, in the order given, bit for bit as they were written, on the CPU.

        Each row's checksum, which is of all arrays, is looked at when this process first reads it.

        Args:
            rows: (n,) integers.
            names: of the arrays to return; None returns all.

        Raises:
            TypeError, ValueError: rows of another type, out of range, missing or bad, or a name of no array.
            CacheError: a row is not what was written.
        """
        asked = self._rows(rows)
        wanted = set(self._arrays if names is None else names)
        if unknown := sorted(map(str, wanted - set(self._arrays))):
            raise ValueError(f"names must be of {', '.join(self._arrays)}, got {', '.join(unknown)}")
        sums = np.zeros(len(asked), np.uint32)
        if not self._sound[asked].all():  # or their marks are known already
            state, sums = self._state(asked)
            if (state != 1).any():
                place = int((state != 1).argmax())
                what = "marked bad" if state[place] == 2 else "missing"
                raise ValueError(f"rows must be filled, got row {asked[place]}, which is {what} ({self.folder})")
        found = {}
        check = np.zeros(len(asked), np.uint32)
        unsound = np.flatnonzero(~self._sound[asked]).tolist()
        for name, (shape, dtype) in self._arrays.items():
            if not unsound and name not in wanted:
                continue
            found[name] = torch.empty(len(asked), *shape, dtype=dtype)
            block = files.as_bytes(found[name])
            for first, last in files.runs(asked):
                start = self._starts[name] + int(asked[first]) * block.shape[1]
                if not files.read_at(self._files[name], block[first:last].reshape(-1).data, start):
                    raise damaged(self.folder, f"{name}.npy ends before row {asked[last - 1]}")
            for place in unsound:
                check[place] = zlib.crc32(block[place].data, int(check[place]))
        for place in unsound:
            if check[place] != sums[place]:
                raise damaged(self.folder, f"row {asked[place]} is not what was written")
        self._sound[asked] = True
        return {name: values for name, values in found.items() if name in wanted}

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise TypeError("a FeatureCache cannot be handed to another process: open it there")

    def _rows(self, rows: Any) -> NDArray[np.int64]:
        """Return rows as (n,) int64, checked to be in range."""
        if rows is None:
            return np.arange(self.rows)
        given = np.asarray(rows.cpu() if isinstance(rows, Tensor) else rows)
        if given.size == 0:
            return np.empty(0, np.int64)
        if given.ndim != 1 or given.dtype.kind not in "iu":
            raise TypeError(f"rows must be (n,) integers, got {given.dtype} of shape {given.shape}")
        if given.min() < 0 or given.max() >= self.rows:
            raise ValueError(f"rows must be in 0..{self.rows - 1}, got {given.min()} to {given.max()}")
        return given.astype(np.int64)

    def _blocks(self, rows: NDArray[np.int64], values: Mapping[str, Any]) -> dict[str, NDArray[np.uint8]]:
        """Return the bytes (n, width) of each array, checked."""
        if set(values) != set(self._arrays):
            raise ValueError(f"values must be of {', '.join(self._arrays)}, got {', '.join(sorted(values)) or 'none'}")
        if len(np.unique(rows)) < len(rows):
            raise ValueError("rows must name each row once")
        blocks = {}
        for name, (shape, dtype) in self._arrays.items():
            value = values[name]
            if isinstance(value, np.ndarray):
                with suppress(TypeError):  # told below
                    value = torch.from_numpy(np.require(value, requirements=("C", "W")))
            if not isinstance(value, Tensor) or value.dtype != dtype or tuple(value.shape) != (len(rows), *shape):
                form = getattr(value, "shape", None)
                came = f"{value.dtype} of shape {tuple(form)}" if form is not None else type(value).__name__
                raise ValueError(f"values[{name!r}] must be {dtype} of shape {(len(rows), *shape)}, got {came}")
            blocks[name] = files.as_bytes(value.detach().cpu().contiguous())
        return blocks

    def _state(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
        """Return for each row 0 where it is missing, 1 where it is there, 2 where it is bad; and the mark's checksum.

        Read anew each time, as other processes fill rows.
        """
        if len(rows) == 0:
            return np.empty(0, np.uint8), np.empty(0, np.uint32)
        first, last = int(rows.min()), int(rows.max())
        marks = np.empty(last - first + 1, MARK)
        if not files.read_at(self._marks, marks.view(np.uint8).data, first * MARK.itemsize):
            raise damaged(self.folder, f"{MARKS} ends before row {last}")
        marks = marks[rows - first]
        state = np.zeros(len(rows), np.uint8)
        # A mark that was torn fits neither seal, and its row is missing.
        state[marks["seal"] == files.seal(rows, marks["sum"], IS_DONE)] = 1
        state[marks["seal"] == files.seal(rows, marks["sum"], IS_BAD)] = 2
        state[(marks["seal"] == 0) & (marks["sum"] == 0)] = 0
        return state, marks["sum"]

    def _missing_places(self, rows: NDArray[np.int64], keep_first: bool) -> NDArray[np.int64]:
        """Return the places of those of the rows that are missing, all of them unless ``keep_first``."""
        state, _ = self._state(rows)
        if state.any() and not keep_first:
            raise ValueError(f"rows must be missing, got row {rows[int(state.argmax())]}, which is there or bad")
        return np.flatnonzero(state == 0)

    def _mark(self, rows: NDArray[np.int64], sums: NDArray[np.uint32], kind: int) -> None:
        marks = np.empty(len(rows), MARK)
        marks["sum"], marks["seal"] = sums, files.seal(rows, sums, kind)
        for first, last in files.runs(rows):
            files.write_at(self._marks, marks[first:last].view(np.uint8).data, int(rows[first]) * MARK.itemsize)
        os.fdatasync(self._marks)

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Say in an error of writing which folder it was, and what becomes of the rest."""
        try:
            yield
        except OSError as error:
            free = shutil.disk_usage(self.folder).free
            raise OSError(
                error.errno,
                f"{self.folder}: {what} ({error.strerror}; {free:,} bytes free); rows marked before still count",
            ) from error


def photo_identity(samples: Sequence[Sample]) -> list[list[Any]]:
    """Return name, bytes and time of change in ns of each photo, for an identity; None where it may not be read."""
    found: list[list[Any]] = []
    for sample in samples:
        try:
            state = sample.path.stat()
            readable = os.access(sample.path, os.R_OK)  # leave to read it changes neither bytes nor time
        except (OSError, ValueError):
            readable = False
        found.append([sample.name, state.st_size, state.st_mtime_ns] if readable else [sample.name, None, None])
    return found


__all__ = ["CacheError", "FeatureCache", "photo_identity"]
