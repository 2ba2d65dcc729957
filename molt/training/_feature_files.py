"""Files of a feature cache: made whole, looked at before they are used, read and written at given places."""

from __future__ import annotations

import errno
import fcntl
import io
import itertools
import json
import operator
import os
import re
import shutil
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molt._files import whole_file
from molt._words import count

FORMAT = 1
ABOUT, MARKS, BAD = "cache.json", "marks.bin", "bad.jsonl"
MARK = np.dtype([("sum", "<u4"), ("seal", "<u4")])
IS_DONE, IS_BAD = 0x6D6F6C74, 0x62616421
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
_KEPT_AS = {torch.bfloat16: torch.int16}  # what NumPy lacks
_LONGEST_READ = 2**30  # bytes a call; the system stops at 2**31

Forms = Mapping[str, tuple[tuple[int, ...], torch.dtype]]  # shape of a row and dtype by name


class CacheError(ValueError):
    """Features on disk that cannot be used; the message says which folder, and what to do."""


def damaged(room: Path, what: str) -> CacheError:
    """Return the error of a folder that is not what was written."""
    return CacheError(f"{room}: the features are damaged ({what}): delete this folder, and they are computed again")


def check_form(name: Any, form: Any) -> tuple[tuple[int, ...], torch.dtype]:
    """Check name and (shape, dtype) of an array and return the latter.

    Raises:
        TypeError, ValueError: a name that is no plain word, sides that are no positive integers, or a dtype that is
            none of torch's or not kept.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"arrays must have names of letters, digits, - and _, got {name!r}")
    try:
        sides, dtype = form
        shape = tuple(operator.index(side) for side in sides)
    except (TypeError, ValueError) as error:
        raise TypeError(f"arrays[{name!r}] must be (shape, dtype), got {form!r}") from error
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"arrays[{name!r}] must have a torch.dtype, got {dtype!r}")
    if min(shape, default=1) < 1:
        raise ValueError(f"arrays[{name!r}] must have sides of at least 1, got {shape}")
    _numpy_type(name, dtype)
    return shape, dtype


def describe(identity: Mapping[str, Any], arrays: Forms, rows: int) -> bytes:
    """Return the JSON of all that a cache is, the same for equal identities.

    Raises:
        TypeError: an identity that JSON does not know.
    """
    forms = {name: [list(shape), str(dtype).removeprefix("torch.")] for name, (shape, dtype) in arrays.items()}
    if not isinstance(identity, Mapping):
        raise TypeError(f"identity must be a dict, got {type(identity).__name__}")
    try:
        held = {"format": FORMAT, "rows": rows, "arrays": forms, "identity": dict(identity)}
        return json.dumps(held, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"identity must be made of plain values that JSON knows ({error})") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time into the block; a process that is killed leaves it."""
    with (folder / ".lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make(room: Path, arrays: Forms, rows: int, about: bytes) -> None:
    """Make the files of a cache without rows, all their space taken; what says what they are comes last.

    Raises:
        OSError: they cannot be written, or the disk has too little room; nothing is left then.
    """
    files = {
        f"{name}.npy": (_header(name, shape, dtype, rows), rows * width(shape, dtype))
        for name, (shape, dtype) in arrays.items()
    }
    files[MARKS] = (b"", rows * MARK.itemsize)
    files[BAD] = (b"", 0)
    needed = sum(len(head) + size for head, size in files.values()) + len(about)
    try:
        room.mkdir(exist_ok=True)
        for name in files:
            (room / name).unlink(missing_ok=True)
        if (free := shutil.disk_usage(room).free) < needed:
            raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed, {free:,} are free")
        for name, (head, size) in files.items():
            with (room / name).open("xb") as file:
                file.write(head)
                file.flush()
                if size > 0:
                    os.posix_fallocate(file.fileno(), len(head), size)
                os.fsync(file.fileno())
        with whole_file(room / ABOUT) as part, part.open("wb") as file:
            file.write(about)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        for name in files:
            with suppress(OSError):
                (room / name).unlink()
        with suppress(OSError):
            room.rmdir()
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"{room}: no room for features of {needed:,} bytes ({reason})") from error


def check_array(room: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return where in its file the array of this form begins, in bytes.

    Raises:
        CacheError: it is not there or has another form.
    """
    path = room / f"{name}.npy"
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise ValueError("it is no ordinary file")
        found: Any = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(found, np.memmap):
            raise ValueError("it holds no array")
        if found.shape != shape or found.dtype != _numpy_type(name, dtype) or not found.flags.c_contiguous:
            raise ValueError(f"it holds {found.dtype} of shape {found.shape}, expected {dtype} of shape {shape}")
        if (size := path.stat().st_size) != found.offset + found.nbytes:
            raise ValueError(f"it has {count(size, 'byte')}, expected {found.offset + found.nbytes}")
    except (OSError, ValueError, EOFError) as error:
        raise damaged(room, f"{path.name}: {' '.join(str(error).split())}") from error
    return int(found.offset)


def open_file(room: Path, name: str, flags: int = 0) -> int:
    """Return the descriptor of an ordinary file, for reading and writing.

    Raises:
        CacheError: there is none.
        OSError: it may not be opened.
    """
    try:
        # A pipe of that name would keep an ordinary open waiting.
        file = os.open(room / name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | flags)
    except FileNotFoundError as error:
        raise damaged(room, f"{name} is missing") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise damaged(room, f"{name} is no ordinary file")
    return file


def write_at(file: int, data: memoryview, start: int) -> None:
    """Write all of ``data`` at byte ``start``."""
    while len(data) > 0:
        written = os.pwrite(file, data, start)
        data, start = data[written:], start + written


def read_at(file: int, into: memoryview, start: int) -> bool:
    """Fill ``into`` from byte ``start``; return whether the file reaches so far."""
    while len(into) > 0:
        count = os.preadv(file, [into[:_LONGEST_READ]], start)
        if count == 0:
            return False
        into, start = into[count:], start + count
    return True


def runs(rows: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return (first, last + 1) of the places where rows follow one another."""
    if len(rows) == 0:
        return []
    ends = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    return list(itertools.pairwise(ends))


def width(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return the bytes of a row."""
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def as_bytes(values: Tensor) -> NDArray[np.uint8]:
    """Return the bytes (n, width) of a contiguous tensor (n, ...) on the CPU, which share its memory."""
    size = width(values.shape[1:], values.dtype)
    found: NDArray[np.uint8] = values.reshape(len(values), size // values.dtype.itemsize).view(torch.uint8).numpy()
    return found


def seal(rows: NDArray[np.int64], sums: NDArray[np.uint32], kind: int) -> NDArray[np.uint32]:
    """Return what, beside its checksum, makes the mark of each row whole and its own."""
    mixed = (sums.astype(np.uint64) ^ np.uint64(kind)) + rows.astype(np.uint64) * np.uint64(0x9E3779B1)
    return mixed.astype(np.uint32)


def sum_of(message: str) -> int:
    """Return the checksum of a bad photo's message."""
    return zlib.crc32(json.dumps(message).encode())


def _numpy_type(name: str, dtype: torch.dtype) -> np.dtype:
    try:
        found: np.dtype = torch.empty(0, dtype=_KEPT_AS.get(dtype, dtype)).numpy().dtype
    except TypeError as error:
        raise TypeError(f"arrays[{name!r}] must have a dtype that NumPy knows, or bfloat16, got {dtype}") from error
    return found


def _header(name: str, shape: tuple[int, ...], dtype: torch.dtype, rows: int) -> bytes:
    out = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(_numpy_type(name, dtype))
    said = {"descr": descr, "fortran_order": False, "shape": (rows, *shape)}
    np.lib.format.write_array_header_1_0(out, said)
    return out.getvalue()
