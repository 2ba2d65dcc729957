"""Files and folders that are no part of a data set: those of systems and programs, and molt's own."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

OVERLAY = b"drawn by molt: a photo with its heat map and boxes"  # comment in the JPEG file of an overlay
HIDDEN, SYSTEM, OWN = "hidden", "system", "molt's own"

_OUTPUTS = frozenset(
    {"molt-out", "molt-train", "molt-ablation", "molt-ablation-heads", "molt-evaluation", "molt-demo"}
    | {"molt-yolo", "molt-voc"}
)
# What the commands write to folders of any name.
_FILES = frozenset(
    {"molt.html", "run.json", "ablation.json", "comparison.json", "done.jsonl", "photos.jsonl", "molt-coco.json"}
    | {"state.safetensors", "best.safetensors", "last.safetensors", "cache.json", "marks.bin"}
)
_SYSTEM = frozenset(
    # macOS and its archives, Windows, Linux
    {"__macosx", "icon\r", "network trash folder", "temporary items", "thumbs.db", "ehthumbs.db", "desktop.ini"}
    | {"$recycle.bin", "recycler", "system volume information", "found.000", "lost+found", "__pycache__"}
    # Synology, QNAP and other network drives
    | {"@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp", "~snapshot"}
    # logs of training programs, which hold pictures
    | {"wandb", "mlruns", "lightning_logs"}
)
# What overlays, a cache's label maps and pages are called; the file says whether it is one.
_MARKED = re.compile(r".+-boxes.*\.jpe?g|[0-9a-f]{64}\.png|index\.html", re.IGNORECASE)
_MARKS = (OVERLAY, b"<title>molt: ", b"tEXtmolt\0", b"zTXtmolt\0", b"iTXtmolt\0")


@dataclass
class Walked:
    """What lies below a folder: photos, sorted; how many other files; and what was left out, by kind."""

    photos: list[Path] = field(default_factory=list)
    others: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def foreign(name: str) -> str | None:
    """Return whose a file or folder of this name is, HIDDEN, SYSTEM or OWN, or None where it may belong to a set."""
    if name.startswith("."):
        return HIDDEN
    if name.casefold() in _SYSTEM:
        return SYSTEM
    return OWN if name.casefold() in _OUTPUTS else None


def is_own_file(path: Path) -> bool:
    """Return whether molt wrote a file: an overlay, a label map, or one of the files of its runs."""
    if path.name in _FILES or not _MARKED.fullmatch(path.name):
        return path.name in _FILES
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except OSError:
        return False
    return any(mark in head for mark in _MARKS)


def entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield what is in a folder and may belong to a data set, sorted by name.

    Raises:
        OSError: the folder cannot be read.
    """
    yield from sorted((e for e in os.scandir(folder) if foreign(e.name) is None), key=lambda entry: entry.name)


def walk(folder: str | Path, suffixes: frozenset[str], fail: Callable[[OSError], None]) -> Walked:
    """Look for photos below a folder; links to folders are not followed, and what is left out is not looked into.

    Args:
        folder: where to look; its own name does not matter.
        suffixes: of photos, in lower case.
        fail: called for each folder that cannot be read.
    """
    found = Walked()
    for parent, below, names in os.walk(folder, onerror=fail):
        for name in [name for name in below if foreign(name)]:
            below.remove(name)
            found.left_out[f"{foreign(name)} folders"] += 1
        for name in names:
            path = Path(parent, name)
            whose = foreign(name) or (OWN if is_own_file(path) else None)
            if whose:
                found.left_out[f"{whose} files"] += 1
            elif path.suffix.lower() in suffixes:
                found.photos.append(path)
            else:
                found.others += 1
    found.photos.sort()
    return found
