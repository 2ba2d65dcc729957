"""What an evaluation has done so far, on disk, so that a killed one goes on where it was."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from molt._files import is_part, remove_parts, user_path, whole_file
from molt._words import count

STATE, DONE, RUN, ROWS = "state.json", "done.jsonl", "run.json", "photos.jsonl"
ARRAYS = ("curves.npy", "boxes.npy", "pixels.npy")
FILES = (STATE, DONE, RUN, ROWS, *ARRAYS)


class RunError(ValueError):
    """A folder of results that cannot be used; the message says why, in one line."""


class Spool:
    """Rows and arrays of one run, appended to as photos are done.

    Args:
        folder: where they lie; None takes a folder that goes when the spool does.
        photos: how many there will be.
        bins: of each photo's pixel histogram, 0 for none.
        settings: what must be the same for a run to go on.
        restart: True throws away what an earlier run left there.

    Attributes:
        folder: where they lie.
        done: how many photos are complete.

    Raises:
        RunError: the folder holds other things, or a run with other settings.
        OSError: it cannot be written.
    """

    def __init__(
        self, folder: Path | None, photos: int, bins: int, settings: Mapping[str, Any], *, restart: bool = False
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="molt-evaluate-") if folder is None else None
        self.folder = Path(self._temporary.name) if self._temporary is not None else user_path(folder or ".")
        if self.folder.exists() and not self.folder.is_dir():
            raise RunError(f"{self.folder}: is a file, expected a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        _check_ours(self.folder)
        if restart:
            # The state stays until it is replaced: it says whose folder this is.
            for name in FILES:
                if name != STATE:
                    (self.folder / name).unlink(missing_ok=True)
        shapes: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
            "curves.npy": (np.dtype(np.float32), (photos, 2, 255)),
            "boxes.npy": (np.dtype(np.int16), (photos, 255, 4)),
        }
        if bins:
            shapes["pixels.npy"] = (np.dtype(np.uint32), (photos, 2, bins))
        begun = not restart and self._begun(settings)
        if not begun:
            # The arrays first: the state says that they are there.
            for name, (dtype, shape) in shapes.items():
                np.lib.format.open_memmap(self.folder / name, mode="w+", dtype=dtype, shape=shape)
            write_json(self.folder / STATE, settings)
        self._arrays = {name: _open(self.folder / name, dtype, shape, "r+") for name, (dtype, shape) in shapes.items()}
        self._rows = self._read_done(photos) if begun else []
        if not begun:
            (self.folder / DONE).write_text("", encoding="utf-8")

    @property
    def done(self) -> int:
        """How many photos are complete."""
        return len(self._rows)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was appended, a row a photo."""
        return self._rows

    def append(self, rows: Sequence[dict[str, Any]], **arrays: NDArray) -> None:
        """Add photos: a row each and their parts of the arrays ``curves``, ``boxes`` and ``pixels``."""
        where = slice(self.done, self.done + len(rows))
        for name, values in arrays.items():
            kept = self._arrays[f"{name}.npy"]
            kept[where] = values
            cast("np.memmap", kept).flush()
        # A photo is done once its line is complete, so this comes last.
        with (self.folder / DONE).open("a", encoding="utf-8", newline="\n") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        self._rows.extend(rows)

    def array(self, name: str) -> NDArray | None:
        """Return ``curves``, ``boxes`` or ``pixels``, or None where it is not kept."""
        return self._arrays.get(f"{name}.npy")

    def finish(self, rows: Sequence[dict[str, Any]], run: Mapping[str, Any]) -> None:
        """Write the final rows and the run itself, which says that it is complete."""
        with whole_file(self.folder / ROWS) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
        write_json(self.folder / RUN, run)
        (self.folder / DONE).unlink(missing_ok=True)

    def _begun(self, settings: Mapping[str, Any]) -> bool:
        """Return whether a run with these settings was begun here."""
        path = self.folder / STATE
        if not path.exists():
            return False
        there = read_json(path)
        wanted = json.loads(json.dumps(settings))
        if there != wanted:
            said = "; ".join(
                f"{key} {_short(old)} there, {_short(new)} now" for key, old, new in _changes(there, wanted)
            )
            raise RunError(f"{self.folder}: holds a run with other settings ({said}); --restart throws it away")
        return True

    def _read_done(self, photos: int) -> list[dict[str, Any]]:
        """Return the complete rows and cut what follows them from the file."""
        path = self.folder / (DONE if (self.folder / DONE).exists() else ROWS)
        if not path.exists():
            path.write_text("", encoding="utf-8")
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        rows = parse_rows(path, whole)
        if len(rows) > photos:
            raise RunError(
                f"{path}: holds {count(len(rows), 'photo')}, expected at most {photos}; --restart throws it away"
            )
        if len(whole) < len(text):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        return rows


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        RunError: it is missing, cannot be read, or is no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read ({' '.join(str(error).split())}), expected what a run wrote") from error
    if not isinstance(found, dict):
        raise RunError(f"{path}: holds no JSON object, expected what a run wrote")
    return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as a whole file."""
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8", newline="\n")


def parse_rows(path: Path, text: bytes) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines.

    Raises:
        RunError: a line that is no JSON object.
    """
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RunError(f"{path}:{number}: is no JSON ({error}), expected a photo's row") from error
        if not isinstance(row, dict):
            raise RunError(f"{path}:{number}: is no JSON object, expected a photo's row")
        rows.append(row)
    return rows


def open_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> NDArray:
    """Return an array of a run, mapped for reading.

    Raises:
        RunError: it is missing or has another form.
    """
    return _open(path, np.dtype(dtype), shape, "r")


def _open(path: Path, dtype: np.dtype, shape: tuple[int, ...], mode: Any) -> NDArray:
    try:
        found: Any = np.load(path, mmap_mode=mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise RunError(f"{path}: cannot be read ({' '.join(str(error).split())}), expected what a run wrote") from error
    if not isinstance(found, np.ndarray) or found.dtype != dtype or found.shape != shape:
        raise RunError(f"{path}: does not fit its run, expected {dtype} of shape {shape}")
    return cast("NDArray", found)


def _check_ours(folder: Path) -> None:
    """Refuse a folder that holds files but no run; what a kill left of a file that was being written is none."""
    if any(not is_part(path) for path in folder.iterdir()) and not (
        (folder / STATE).is_file() or (folder / ARRAYS[0]).is_file()
    ):
        raise RunError(f"{folder}: holds other files, expected a new or empty folder, or one of an earlier run")
    remove_parts(folder)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield what differs between two objects, with where it is and both values."""
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from ((f"{key}.{inner}", *values) for inner, *values in _changes(a, b))
        elif a != b:
            yield key, a, b


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
