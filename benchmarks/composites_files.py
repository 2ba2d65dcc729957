"""The files of a set of composites, for composites.py."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from composites_scene import Scene
from composites_sources import SourceError

PART = ".part"
FINISHED = ("photos", "masks", "metadata", "objects.csv", "classes.txt", "sheet.jpg", "CREDITS.txt", "composites.json")


@dataclass(frozen=True)
class Record:
    """What one photo shows; objects are the labelled one and in two-object photos the other."""

    split: str
    kind: str
    name: str  # without suffix
    labels: tuple[int, ...]
    cutouts: tuple[str, ...]
    background: str
    boxes: tuple[tuple[int, int, int, int], ...]
    areas: tuple[float, ...]


def write_photo(folder: Path, scene: Scene, record: Record, quality: int) -> None:
    """Write a photo and its masks."""
    photo, masks = folder / "photos" / f"{record.name}.jpg", folder / "masks" / record.name
    for parent in (photo.parent, masks.parent):
        parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(scene.pixels).save(photo, quality=quality, subsampling=0)
    for mask, suffix in zip(scene.masks, ("", "-distractor"), strict=False):
        PIL.Image.fromarray(mask.astype(np.uint8) * 255).save(f"{masks}{suffix}.png")


def write_metadata(folder: Path, records: Sequence[Record], classes: Sequence[str], size: int) -> None:
    """Write the annotations of all photos, in the layout of wsolevaluation, and objects.csv."""
    files: dict[Path, list[str]] = {}
    for record in records:
        image, mask = f"{record.name}.jpg", f"{record.name}.png"
        localization = {"boxes": ",".join(map(str, (image, *record.boxes[0]))), "masks": f"{image},{mask},ignore.png"}
        for truth, line in localization.items():
            place = folder / "metadata" / truth / f"{record.split}-{record.kind}"
            lines = {
                "image_ids": image,
                "class_labels": f"{image},{record.labels[0]}",
                "image_sizes": f"{image},{size},{size}",
                "localization": line,
            }
            if record.kind == "two":
                other = record.boxes[1] if truth == "boxes" else (f"{record.name}-distractor.png",)
                lines["distractors"] = ",".join(map(str, (image, record.labels[1], *other)))
            for stem, text in lines.items():
                files.setdefault(place / f"{stem}.txt", []).append(text)
    files[folder / "classes.txt"] = list(classes)
    for path, texts in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(texts) + "\n", encoding="utf-8", newline="\n")
    PIL.Image.new("L", (size, size)).save(folder / "masks" / "ignore.png")
    with (folder / "objects.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = ["class", "cutout", "area"]
        writer.writerow(["photo", "split", "kind", "background", *columns, *(f"distractor_{name}" for name in columns)])
        for record in records:
            row = [f"{record.name}.jpg", record.split, record.kind, record.background]
            for label, cutout, area in zip(record.labels, record.cutouts, record.areas, strict=True):
                row += [classes[label], cutout, str(area)]
            writer.writerow(row + [""] * (10 - len(row)))


def check_free(out: Path, replace: bool) -> None:
    """Check that a set may be made in ``out``.

    Raises:
        SourceError: it is a file, or holds a whole set or files of the same names that no interrupted run left.
    """
    if out.exists() and not out.is_dir():
        raise SourceError(f"OUT: {out} is a file; expected a folder, or a name for a new one")
    there = [name for name in FINISHED if (out / name).exists()]
    whole = (out / "composites.json").is_file()
    if whole and not replace:
        raise SourceError(f"OUT: {out} holds a whole set; expected an empty folder, or --replace to make it anew")
    if there and not whole and not (out / PART).is_dir():
        raise SourceError(f"OUT: {out} holds {there[0]}, which is of no set of this program; expected an empty folder")


def begin(out: Path) -> Path:
    """Return an empty folder below ``out`` to build the set in; remove the set, or part of one, that is there."""
    part = out / PART
    part.mkdir(parents=True, exist_ok=True)  # before anything goes: it tells that a run was interrupted
    for name in reversed(FINISHED):
        path = out / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    shutil.rmtree(part)
    part.mkdir()
    return part


def finish(out: Path) -> None:
    """Move what was built to its place; composites.json, which tells that the set is whole, comes last."""
    for name in FINISHED:
        (out / PART / name).rename(out / name)
    (out / PART).rmdir()
