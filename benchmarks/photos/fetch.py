"""Fetch the benchmark's animal photos from Debian's package gcompris-qt-data.

    python benchmarks/photos/fetch.py [FOLDER]

Writes FOLDER/NAME.webp (default: photos-data) and FOLDER/boxes.csv with boxes in pixels: photo,animal,x0,y0,x1,y1.
Needs apt-get and dpkg-deb (the package is downloaded and unpacked, not installed) and the Python packages pillow and
zstandard. Author and licence of every photo stand in the package's README files; the photos are never committed.
"""

from __future__ import annotations

import csv
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

PACKAGE = "gcompris-qt-data"
ROOT = "gcompris/src/activities/"
MAX_MEMBER_BYTES = 64 * 2**20


@dataclass(frozen=True)
class RccFile:
    """A Qt resource container (big-endian: header, tree of fixed-size entries, data blocks, names)."""

    blob: bytes
    version: int
    tree: int
    data: int
    names: int

    @classmethod
    def open(cls, path: Path) -> RccFile:
        blob = path.read_bytes()
        if blob[:4] != b"qres":
            raise ValueError(f"{path} is not a Qt resource container")
        return cls(blob, *struct.unpack_from(">4I", blob, 4))

    def members(self, node: int = 0, folder: str = "") -> dict[str, int]:
        """Return the tree position of every file by its path."""
        found: dict[str, int] = {}
        at = self._entry(node)
        _, _, count, first = struct.unpack_from(">IHII", self.blob, at)
        for child in range(first, first + count):
            name_at, flags = struct.unpack_from(">IH", self.blob, self._entry(child))
            path = folder + self._name(name_at)
            if flags & 2:
                found |= self.members(child, f"{path}/")
            else:
                found[path] = child
        return found

    def read(self, node: int) -> bytes:
        """Return one file's bytes, decompressed."""
        _, flags, _, _, offset = struct.unpack_from(">IHHHI", self.blob, self._entry(node))
        at = self.data + offset
        (length,) = struct.unpack_from(">I", self.blob, at)
        raw = self.blob[at + 4 : at + 4 + length]
        if flags & 1:
            return zlib.decompress(raw[4:])
        if flags & 4:
            import zstandard

            return zstandard.ZstdDecompressor().decompress(raw, max_output_size=MAX_MEMBER_BYTES)
        return raw

    def _entry(self, node: int) -> int:
        return self.tree + node * (22 if self.version >= 2 else 14)

    def _name(self, offset: int) -> str:
        (length,) = struct.unpack_from(">H", self.blob, self.names + offset)
        start = self.names + offset + 6  # length and hash come before the characters
        return self.blob[start : start + 2 * length].decode("utf-16-be")


def fetch(folder: Path) -> int:
    """Write the photos and their boxes; return the number of photos."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is needed: run this on Debian or Ubuntu, or in a container of theirs")
    with (Path(__file__).parent / "boxes.csv").open() as file:
        rows = list(csv.DictReader(file))
    folder.mkdir(parents=True, exist_ok=True)
    by_archive: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        by_archive[row["archive"]][row["member"]] = row["photo"]
    sizes: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["apt-get", "-q", "download", PACKAGE], cwd=scratch, check=True)
        (package,) = Path(scratch).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package.name, "content"], cwd=scratch, check=True)
        for archive, wanted in by_archive.items():
            (path,) = Path(scratch, "content").rglob(archive)
            rcc = RccFile.open(path)
            members = rcc.members()
            for member, photo in wanted.items():
                target = folder / f"{photo}.webp"
                target.write_bytes(rcc.read(members[ROOT + member]))
                with Image.open(target) as image:
                    sizes[photo] = image.size
    with (folder / "boxes.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["photo", "animal", "x0", "y0", "x1", "y1"])
        for row in rows:
            width, height = sizes[row["photo"]]
            box = [
                float(row[k]) * s for k, s in (("left", width), ("top", height), ("right", width), ("bottom", height))
            ]
            writer.writerow([row["photo"], row["animal"], *(round(value, 1) for value in box)])
    return len(sizes)


if __name__ == "__main__":
    destination = Path(sys.argv[1] if len(sys.argv) > 1 else "photos-data")
    print(f"{fetch(destination)} photos in {destination}")
