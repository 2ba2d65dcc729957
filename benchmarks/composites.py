"""Make a localization set with exact boxes and masks: cut-outs of photos pasted on photos without objects.

    python benchmarks/composites.py OUT --fetch
    python benchmarks/composites.py OUT --cutouts DIR --backgrounds DIR [--size 336] [--train 800,400] [--seed 0]

Cut-outs are RGBA PNGs in class folders, backgrounds photos; --fetch takes both from Debian packages (Debian or Ubuntu,
a network, once `apt-get update`). Photos show one object, or two of different classes and about the same size, of which
one is labelled. No cut-out and no background is in two splits. The same inputs and seed give the same bytes with the
same versions of Pillow and NumPy.

OUT/photos/<split>/<kind>/<class>/<id>.jpg     train, val, test; one, two objects; class folders
OUT/masks/<split>/<kind>/<class>/<id>.png      255 where the labelled object is seen; <id>-distractor.png: the other
OUT/metadata/{boxes,masks}/<split>-<kind>/     image_ids, class_labels, image_sizes, localization (as wsolevaluation has
                                               them) and distractors.txt: path,label,x0,y0,x1,y1 or path,label,mask
OUT/objects.csv                                which cut-outs and background each photo is made of
OUT/{classes.txt,composites.json,sheet.jpg,CREDITS.txt}

Names in the metadata are relative to OUT/photos and OUT/masks. A mask is where the pasted alpha is 128 or more and no
other object's is in front; a box holds just the mask's pixels, xyxy as edges.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import PIL.Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.append(str(Path(__file__).parent))
from composites_files import Record, begin, check_free, finish, write_metadata, write_photo
from composites_scene import Knobs, NoRoom, Scene, box_of, compose, largest_area
from composites_sheet import draw_sheet
from composites_sources import (
    THRESHOLD,
    Background,
    Cutout,
    Skipped,
    SourceError,
    credits_of,
    fetch,
    read_backgrounds,
    read_cutouts,
)
from debian_files import FetchError

SPLITS = {"train": 0.5, "val": 0.15, "test": 0.35}
KINDS = ("one", "two")
LEAST = 2  # cut-outs of a class, and backgrounds, in each split


def divide(names: Sequence[str], rng: np.random.Generator, what: str, about: str) -> dict[str, list[str]]:
    """Return names dealt at random to the splits, at least two to each.

    Raises:
        SourceError: too few names; ``what`` they are and ``about`` the skipped ones goes into the message.
    """
    needed = LEAST * len(SPLITS)
    if len(names) < needed:
        raise SourceError(
            f"{what}: {len(names)} can be used, at least {needed} are needed, "
            f"{LEAST} for each of {', '.join(SPLITS)}{about}"
        )
    order = [names[i] for i in rng.permutation(len(names))]
    counts = {split: max(LEAST, round(share * len(names))) for split, share in SPLITS.items() if split != "train"}
    while len(names) - sum(counts.values()) < LEAST:
        counts[max(counts, key=lambda split: counts[split])] -= 1
    found, at = {}, 0
    for split, count in {**counts, "train": len(names) - sum(counts.values())}.items():
        found[split] = sorted(order[at : at + count])
        at += count
    return {split: found[split] for split in SPLITS}


class Maker:
    """Composites of given cut-outs and backgrounds.

    Raises:
        SourceError: a split would have too few cut-outs of a class, or too few backgrounds.
    """

    def __init__(
        self,
        cutouts: dict[str, list[Cutout]],
        backgrounds: Sequence[Background],
        knobs: Knobs,
        seed: int,
        skipped: Skipped,
    ) -> None:
        self.knobs, self.seed = knobs, seed
        self.classes = sorted(cutouts)
        self.cutouts: dict[str, Cutout] = {}
        self.backgrounds = {ground.name: ground for ground in backgrounds}
        low = max(knobs.area_one[0], knobs.area_two[0])
        names: dict[str, list[str]] = {}
        for name in self.classes:
            names[name] = []
            for cutout in cutouts[name]:
                if (reach := largest_area(cutout, knobs)) < low:
                    height, width = cutout.pixels.shape[:2]
                    skipped.add(
                        f"cutouts/{cutout.name}.png",
                        f"too small or thin: {width}x{height} pixels, enlarged up to {knobs.upscale} times within the "
                        f"frame, cover {reach:.4f} of a photo, expected at least {low}",
                    )
                    continue
                self.cutouts[cutout.name] = cutout
                names[name].append(cutout.name)
        self.split_cutouts = {
            name: divide(found, self._rng(1, i), f"cut-outs of class {name!r}", skipped.about(f"cutouts/{name}/"))
            for i, (name, found) in enumerate(names.items())
        }
        self.split_backgrounds = divide(
            sorted(self.backgrounds), self._rng(2), "backgrounds", skipped.about("backgrounds/")
        )

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])

    def make(self, split: str, kind: str, index: int) -> tuple[Scene, Record]:
        """Return photo ``index`` of a split and kind: classes in turn, each one's cut-outs in turn."""
        place = list(SPLITS).index(split), KINDS.index(kind)
        rng = self._rng(3, *place, index)
        label, turn = index % len(self.classes), index // len(self.classes)
        own = self.split_cutouts[self.classes[label]][split]
        labels, names = (
            [label],
            [own[self._rng(4, *place, label, turn // len(own)).permutation(len(own))[turn % len(own)]]],
        )
        grounds = self.split_backgrounds[split]
        ground = self.backgrounds[grounds[int(rng.integers(len(grounds)))]]
        for _ in range(20):
            if kind == "two":
                other = int(rng.integers(len(self.classes) - 1))
                other += other >= label
                mates = self.split_cutouts[self.classes[other]][split]
                labels, names = [label, other], [names[0], mates[int(rng.integers(len(mates)))]]
            try:
                scene = compose(ground, [self.cutouts[name] for name in names], self.knobs, rng)
                break
            except NoRoom:
                continue
        else:
            raise SourceError(f"{names[0]}.png finds no place that obeys the rules in a photo of kind {kind!r}")
        record = Record(
            split,
            kind,
            f"{split}/{kind}/{self.classes[label]}/{index:05d}",
            tuple(labels),
            tuple(names),
            ground.name,
            tuple(box_of(mask) for mask in scene.masks),
            tuple(round(float(mask.mean()), 5) for mask in scene.masks),
        )
        return scene, record


def summary(maker: Maker, counts: dict[str, tuple[int, int]], records: Sequence[Record]) -> dict[str, Any]:
    """Return the knobs, counts and areas of a set."""
    photos: dict[str, Any] = {}
    for split, numbers in counts.items():
        for kind, number in zip(KINDS, numbers, strict=True):
            found = [record for record in records if (record.split, record.kind) == (split, kind)]
            labels = [record.labels[0] for record in found]
            areas = np.quantile([record.areas[0] for record in found], [0, 0.25, 0.5, 0.75, 1]) if found else []
            photos[f"{split}-{kind}"] = {
                "photos": number,
                "classes": {name: labels.count(label) for label, name in enumerate(maker.classes)},
                "area_quartiles": [round(float(area), 4) for area in areas],
            }
    return {
        "seed": maker.seed,
        "knobs": asdict(maker.knobs),
        "mask_threshold": THRESHOLD,
        "classes": maker.classes,
        "sets": photos,
        "cutouts": maker.split_cutouts,
        "backgrounds": maker.split_backgrounds,
        "versions": {"Pillow": PIL.__version__, "numpy": np.__version__, "python": platform.python_version()},
    }


def build(
    out: Path,
    maker: Maker,
    counts: dict[str, tuple[int, int]],
    extra: dict[str, Any],
    credits: str,
    console: Console,
) -> dict[str, Any]:
    """Make the whole set below ``out`` and return what composites.json says; that file comes last."""
    part = begin(out)
    wanted = [
        (split, kind, index)
        for split, numbers in counts.items()
        for kind, number in zip(KINDS, numbers, strict=True)
        for index in range(number)
    ]
    records = []
    for split, kind, index in track(wanted, "composites", console=console, disable=not console.is_terminal):
        scene, record = maker.make(split, kind, index)
        write_photo(part, scene, record, maker.knobs.quality)
        records.append(record)
    write_metadata(part, records, maker.classes, maker.knobs.size)
    (part / "CREDITS.txt").write_text(credits, encoding="utf-8")
    labelled = [
        (part / "photos" / f"{r.name}.jpg", [(maker.classes[n], box) for n, box in zip(r.labels, r.boxes, strict=True)])
        for r in records
        if r.split == ("test" if any(counts["test"]) else records[0].split)
    ]
    draw_sheet(labelled).save(part / "sheet.jpg", quality=90)
    report = {**summary(maker, counts, records), **extra}
    (part / "composites.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    finish(out)
    return report


def show(report: dict[str, Any], console: Console) -> None:
    """Print the counts."""
    table = Table("set", "photos", "classes", "cut-outs", "backgrounds", "area, quartiles")
    for name, found in report["sets"].items():
        split = name.split("-")[0]
        cutouts = sum(len(splits[split]) for splits in report["cutouts"].values())
        areas = " ".join(f"{area:.3f}" for area in found["area_quartiles"])
        classes = sum(count > 0 for count in found["classes"].values())
        row = [found["photos"], classes, cutouts, len(report["backgrounds"][split])]
        table.add_row(name, *map(str, row), areas)
    console.print(table)
    for entry in report["skipped"]:
        console.print(f"skipped {entry['file']}: {entry['reason']}", markup=False, highlight=False, soft_wrap=True)


def _counts(text: str) -> tuple[int, int]:
    """Return photos of one object and of two: `N` for both or `N,M`."""
    parts = text.split(",")
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or not all(0 <= number <= 99_999 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: a number from 0 to 99999 is expected, or two with a comma between")
    return numbers[0], numbers[-1]


def _size(text: str) -> int:
    if not text.isdecimal() or not 64 <= int(text) <= 2048:
        raise argparse.ArgumentTypeError(f"{text!r}: a side from 64 to 2048 pixels is expected")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: an integer of at least 0 is expected")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the set and print what is in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make the set in")
    parser.add_argument("--cutouts", type=Path, metavar="DIR", help="class folders of RGBA PNGs")
    parser.add_argument("--backgrounds", type=Path, metavar="DIR", help="photos that show no object")
    parser.add_argument("--fetch", action="store_true", help="take what is not given from Debian packages (250 MB)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where they are kept (default: OUT/packages)")
    parser.add_argument("--size", type=_size, default=336, help="side of the photos in pixels (default: 336)")
    for split, number in {"train": "800,400", "val": "100", "test": "250"}.items():
        text = f"{split} photos of each kind, or ONE,TWO (default: {number})"
        parser.add_argument(f"--{split}", type=_counts, default=_counts(number), metavar="N", help=text)
    parser.add_argument("--seed", type=_seed, default=0)
    parser.add_argument("--replace", action="store_true", help="remove the set that OUT holds")
    parser.add_argument("--json", action="store_true", help="print composites.json in place of tables")
    given = parser.parse_args(arguments)
    counts = {split: getattr(given, split) for split in SPLITS}
    if not any(map(any, counts.values())):
        parser.error("--train, --val and --test are all 0: at least one photo is expected")
    if not given.fetch and None in (given.cutouts, given.backgrounds):
        parser.error("give --cutouts and --backgrounds, or --fetch")
    console = Console(stderr=True)
    try:
        check_free(given.out, given.replace)
        report = _run(given, counts, console)
    except (SourceError, FetchError) as error:
        raise SystemExit(f"composites.py: {error}") from error
    if given.json:
        print(json.dumps(report, indent=1))
    else:
        show(report, Console())


def _run(given: argparse.Namespace, counts: dict[str, tuple[int, int]], console: Console) -> dict[str, Any]:
    cutouts, backgrounds, packages = given.cutouts, given.backgrounds, []
    if cutouts is None or backgrounds is None:
        with console.status("fetching packages"):
            fetched = fetch(given.cache or given.out / "packages")
        cutouts, backgrounds, packages = cutouts or fetched[0], backgrounds or fetched[1], fetched[2]
    knobs, skipped = Knobs(size=given.size), Skipped()
    with console.status("reading cut-outs and backgrounds"):
        objects = read_cutouts(cutouts, skipped)
        grounds = read_backgrounds(backgrounds, given.size, skipped)
    maker = Maker(objects, grounds, knobs, given.seed, skipped)
    credits = f"{credits_of(cutouts, 'Cut-outs')}\n{'=' * 80}\n\n{credits_of(backgrounds, 'Backgrounds')}"
    extra = {"packages": packages, "skipped": skipped.files}
    return build(given.out, maker, counts, extra, credits, console)


if __name__ == "__main__":
    main()
