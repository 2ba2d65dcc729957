"""What an ablation has measured so far, on disk, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from molt._files import is_part, whole_file
from molt._text import slug
from molt.evaluation._spool import RunError, open_array, parse_rows, read_json, write_json
from molt.evaluation.scores import Curves

FORMAT = 1
STATE, DONE, CURVES, KEPT, SHEETS = "state.json", "done.jsonl", "curves.npy", "kept", "sheets"
REPORT = "ablation.json"
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Entry:
    """One column of a sheet: one map a photo, of one row of the table and one seed.

    Attributes:
        row: name of the row, unique in its group.
        seed: which of the row's seeds.
        baseline: the row that it is compared with, or None.
        settings: what tells the row from others, as plain values.
    """

    row: str
    seed: int = 0
    baseline: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def begin(folder: Path, identity: Mapping[str, Any], *, restart: bool) -> None:
    """Make the folder of a run, or check that the run in it is the same.

    Args:
        folder: of the run.
        identity: what must be the same for a run to go on, as plain values.
        restart: True throws away what an earlier run left there.

    Raises:
        RunError: it is a file, holds other things, or a run of something else.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder}: is a file, expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = json.loads(json.dumps({"format": FORMAT, **identity}))
    state = folder / STATE
    # What a kill left of a file that was being written is nobody's.
    stale = [path for path in folder.iterdir() if is_part(path) and path.is_file()]
    if not state.exists():
        if any(path not in stale for path in folder.iterdir()):
            raise RunError(f"{folder}: holds other files, expected a new or empty folder, or one of an earlier run")
    elif restart:
        # The state stays until it is replaced: it says whose folder this is.
        for name in (KEPT, SHEETS):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / REPORT).unlink(missing_ok=True)
    else:
        there = read_json(state)
        said = "; ".join(f"{name} {_short(old)} there, {_short(new)} now" for name, old, new in _changes(there, wanted))
        if said:
            raise RunError(f"{folder}: holds a run of something else ({said}); --restart throws it away")
    for path in stale:
        path.unlink(missing_ok=True)
    if restart or not state.exists():
        write_json(state, wanted)


class Kept:
    """What costs much and is used by several rows: maps and labels, one file a photo.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / KEPT

    def has(self, what: str, photo: int) -> bool:
        """Return whether it is there."""
        return self._path(what, photo).is_file()

    def get(self, what: str, photo: int, make: Callable[[], Arrays]) -> Arrays:
        """Return arrays by name as they are kept, made first where there are none.

        Args:
            what: names what is kept and everything it depends on.
            photo: its place in the set.
            make: gives the arrays.

        Raises:
            RunError: a damaged file.
        """
        path = self._path(what, photo)
        if not path.is_file():
            made = make()
            with whole_file(path) as part, part.open("wb") as file:
                np.savez_compressed(file, **cast("Any", made))
            return made
        try:
            with np.load(path, allow_pickle=False) as found:
                return {name: found[name] for name in found.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            text = " ".join(str(error).split())
            raise RunError(f"{path}: is damaged ({text}); without the file its photo is measured again") from error

    def _path(self, what: str, photo: int) -> Path:
        return self.folder / slug(what) / f"{photo:06d}.npz"


class Sheet:
    """The curves of all photos for some entries, appended to as photos are done.

    Args:
        folder: of the run.
        name: of the sheet.
        entries: its columns; other entries under the same name are another sheet.
        photos: how many there will be.
        source: what the entries depend on besides, as plain values.

    Raises:
        RunError: its files are damaged.
    """

    def __init__(
        self, folder: Path, name: str, entries: Sequence[Entry], photos: int, source: Mapping[str, Any]
    ) -> None:
        said = json.loads(json.dumps({"entries": [asdict(entry) for entry in entries], "source": dict(source)}))
        self.name, self.entries, self.photos = name, tuple(entries), photos
        self.folder = folder / SHEETS / f"{slug(name)}-{digest(said)}"
        shape = (len(entries), photos, 2, 255)
        if not (self.folder / STATE).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(self.folder / CURVES, mode="w+", dtype=np.float32, shape=shape)
            (self.folder / DONE).write_text("", encoding="utf-8")
            write_json(self.folder / STATE, said)  # last: it says that the others are there
        open_array(self.folder / CURVES, np.float32, shape)
        self._rows = {int(row["photo"]): row for row in self._read_done()}

    @property
    def done(self) -> frozenset[int]:
        """The photos that are complete."""
        return frozenset(self._rows)

    def row(self, photo: int) -> Mapping[str, Any]:
        """Return what was appended with a photo."""
        return self._rows[photo]

    def append(self, photo: int, curves: NDArray[np.float32], row: Mapping[str, Any]) -> None:
        """Add a photo.

        Args:
            photo: its place in the set.
            curves: (entries, 2, 255).
            row: ``peak``, ``clusters``, ``ms`` and ``alpha``, a list of one an entry each, and facts.
        """
        kept = np.load(self.folder / CURVES, mmap_mode="r+", allow_pickle=False)
        kept[:, photo] = curves
        kept.flush()
        whole = {"photo": photo, **row}
        # A photo is done once its line is complete, so this comes last.
        with (self.folder / DONE).open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(whole) + "\n")
        self._rows[photo] = whole

    def curves(self, column: int) -> Curves:
        """Return an entry's curves, all photos."""
        found = np.load(self.folder / CURVES, mmap_mode="r", allow_pickle=False)[column]
        peak = np.array([self._rows[i]["peak"][column] for i in range(self.photos)], np.int64)
        return Curves(np.array(found[:, 0]), np.array(found[:, 1]), peak)

    def mean(self, column: int, what: str) -> float | None:
        """Return the mean over photos of an entry's ``clusters``, ``ms`` or ``alpha``, or None where it has none."""
        values = [self._rows[i][what][column] for i in range(self.photos)]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    def _read_done(self) -> list[dict[str, Any]]:
        """Return the complete rows and cut what follows them from the file."""
        path = self.folder / DONE
        try:
            text = path.read_bytes()
        except OSError as error:
            raise RunError(f"{path}: cannot be read ({error}), expected what a run wrote") from error
        whole = text[: text.rfind(b"\n") + 1]
        rows = parse_rows(path, whole)
        for row in rows:
            lists = [row.get(name) for name in ("peak", "clusters", "ms", "alpha")]
            sound = all(isinstance(values, list) and len(values) == len(self.entries) for values in lists)
            if not sound or not isinstance(row.get("photo"), int) or not 0 <= row["photo"] < self.photos:
                raise RunError(f"{path}: holds a row that does not fit its run; --restart throws it away")
        if len(whole) < len(text):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        return rows


def digest(value: Any) -> str:
    """Return a short hash of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:10]


def file_digest(path: Path) -> str:
    """Return a short hash of a file's bytes.

    Raises:
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist or is not a file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:10]


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield what differs between two objects, with where it is and both values."""
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _changes(a, b, f"{above}{key}.")
        elif a != b:
            yield f"{above}{key}", a, b


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
