"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_PART = re.compile(r"\.[a-z0-9_]{8}\.part")
_BEGAN = time.time()  # nothing older is this process's own


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside ``path`` that takes its place when the block ends, and is removed if it raises.

    Folders above are made. The file gets the permissions an ordinary new file would have.

    Raises:
        OSError: the folder or file cannot be written.
    """
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
