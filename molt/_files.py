"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from torch import Tensor

_PART = re.compile(r"\.[a-z0-9_]{8}\.part")
_BEGAN = time.time()  # nothing older is this process's own
_held: set[int] = set()  # descriptors of what this process has to itself


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path as given, a ~ in front replaced by the home folder."""
    return Path(os.path.expanduser(os.fsdecode(path)))  # noqa: PTH111 - expanduser of Path raises where there is no home


def _check_special(path: Path) -> None:
    """Refuse a device, pipe or socket, such as /dev/null, which a file would take the place of."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(f"{path}: is a device, pipe or socket, expected a file or folder")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside ``path`` that takes its place when the block ends, and is removed if it raises.

    Folders above are made. The file gets the permissions an ordinary new file would have.

    Raises:
        OSError: the folder or file cannot be written.
    """
    _check_special(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        yield part
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def _made(room: Path, *, keep: bool = False) -> Iterator[None]:
    """Make a folder for the block, and unless it is to be kept remove again what was made and is empty at the end."""
    made: list[Path] = []
    try:
        for one in [*reversed(room.parents), room]:
            try:
                if not one.is_dir():
                    one.mkdir(exist_ok=True)
                    made.append(one)
            except OSError as error:
                why = f"{one} is a file" if isinstance(error, FileExistsError) else error.strerror
                raise OSError(f"{room}: the folder cannot be made ({why})") from error
        yield
    finally:
        for one in () if keep else reversed(made):
            with suppress(OSError):
                one.rmdir()


def check_writable(path: Path, *, folder: bool = True, keep: bool = False) -> None:
    """Try whether files can be written in a folder, or a file in its place; a folder made for that goes unless kept.

    Raises:
        NotADirectoryError, IsADirectoryError: a file is where a folder is wanted, or the other way round.
        OSError: nothing can be written there.
    """
    try:
        if path.exists() and path.is_dir() != folder:
            kind = NotADirectoryError if folder else IsADirectoryError
            raise kind(f"{path}: is a {'file, expected a folder' if folder else 'folder, expected a file'}")
        _check_special(path)
        room = path if folder else path.parent
        with _made(room, keep=keep), tempfile.NamedTemporaryFile(dir=room, prefix=".", suffix=".part"):
            pass
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(f"{path}: cannot be written ({error.strerror})") from error


@contextmanager
def alone_in(path: Path | None, *, folder: bool = True) -> Iterator[None]:
    """Keep other runs out of an output folder, which is made, or from an output file, while the block runs.

    The lock is the system's and ends with the process, however that ends. Where there is none, as on some network
    disks, all may enter.

    Args:
        path: the folder or file; None keeps nobody out.
        folder: which of them it is.

    Raises:
        BlockingIOError: another run is at it.
        OSError: the folder cannot be made.
    """
    if path is None or fcntl is None:
        yield
        return
    # A file's lock is one beside it: the file itself is replaced when it is written.
    place = path if folder else path.with_name(f".{path.name}.lock")
    with _made(place if folder else place.parent):
        handle = os.open(place, os.O_RDONLY | (0 if folder else os.O_CREAT), 0o666)
        _held.add(handle)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                where = "in this folder" if folder else "this file"
                raise BlockingIOError(
                    f"{path}: another run is writing {where}; wait for it, or take another --out"
                ) from None
            except OSError:
                pass
            try:
                yield
            finally:
                if not folder:
                    place.unlink(missing_ok=True)
        finally:
            _held.discard(handle)
            os.close(handle)


def _leave() -> None:
    """Let go of locks in a forked process, which would keep them when its parent is killed."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_leave)


def is_part(path: Path) -> bool:
    """Return whether a name is that of a file or folder that :func:`whole_file` or :func:`save_tensors` writes to."""
    return _PART.fullmatch(path.name) is not None


def remove_parts(folder: Path) -> None:
    """Remove what killed processes left of :func:`whole_file` and :func:`save_tensors` in a folder, not below it.

    What was written to since this process began stays: another one may be at it.

    Raises:
        OSError: the folder cannot be read, or a file not removed.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if not is_part(path) or path.is_symlink():
            continue
        try:
            inside = list(path.iterdir()) if path.is_dir() else []
            if max(one.lstat().st_mtime for one in [path, *inside]) >= _BEGAN:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        except FileNotFoundError:  # another process was quicker
            continue


def check_readable_later(path: Path, name: str = "out") -> Path:
    """Return the path of what safetensors is to write.

    Raises:
        ValueError: it is not UTF-8: safetensors would write it, and not read it.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be a path in UTF-8, which safetensors can read again, got {path}") from None
    return path


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        OSError: it cannot be written, as on a full disk; the file from before is kept.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # safetensors writes to a file of its own naming beside the one it is given: a folder holds both.
    with (
        whole_file(path) as part,
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".", suffix=".part") as room,
    ):
        made = Path(room) / path.name
        try:
            save_file(tensors, made, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error
        made.replace(part)
