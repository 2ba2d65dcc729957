"""Time training: computing features, heads on kept features, and fine-tuning beside loops that one would write.

    python benchmarks/training_speed.py [--device cuda] [--photos 1024] [--rounds 3] [--data FOLDER] [--json FILE]

With --resume, what is in --json FILE already, of the same machine, sources and settings, is not measured again.
Everything is warmed up once and then run in turns; medians of wall time until the device is done. Weights are random,
photos made up unless --data names class folders; of these --photos are taken, of the loop --loop-photos, spread evenly.

features  seconds a photo from files to features on disk, over those of the bare forward passes of the same backbones on
          decoded pixels on the device: no hooks, no classifier. Stages are timed one after the other; in the pass
          itself reading and writing run beside the network, in threads.
heads     the default recipe on features that are there, against a loop over tensors in memory; with and without files.
loop      fine-tuning from photos, the second epoch of each run, without validation and what is saved after it; against
          the same network and optimizer in a plain loop, and the timm network with its own classifier in the same loop.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from molt._files import whole_file
from molt.benchmark.machine import about, earlier
from molt.benchmark.targets import add_missed, told
from molt.data import read_set
from molt.data.annotations import LocalizationSet

sys.path.insert(0, str(Path(__file__).parent))
from training_speed_loops import time_loop
from training_speed_parts import Setting, make_photos, time_features, time_heads

PARTS = ("features", "heads", "loop")
FEATURE_MODEL, FEATURE_SIZES = "molt_dinov2_small", (224, 336, 448)
LOOPS = {
    "cpu": [("molt_deit_tiny", (224,), "no", 8)],
    "cuda": [("molt_deit_small", (224,), "bf16", 64), ("molt_deit_small", (224, 336, 448), "bf16", 64)],
}
PHOTOS = {"cpu": 16, "cuda": 1024}
LOOP_PHOTOS = {"cpu": 48, "cuda": 1024}  # an epoch of fewer is too short to be told from its beginning
MOST_FEATURES = 384  # photos: enough for a median, and waiting at every stage costs time
TARGETS = {"features": 1.1, "loop": 0.9}
ASKED = {"ratio_timm": 0.9}  # of molt_deit_small's loop on a GPU
MOST_WORKERS = 8
AHEAD = 3  # batches a worker that lie in shared memory at once, and one to spare


def find_workers(given: int | None, device: str, batch: int, side: int) -> int:
    """Return how many processes read: those asked for, else as many as cores and shared memory allow on a GPU."""
    if given is not None:
        return given
    if device == "cpu":
        return 0
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0
    return int(min(MOST_WORKERS, os.cpu_count() or 1, free // (AHEAD * batch * 3 * side * side * 4)))


def spread(data: LocalizationSet, count: int) -> LocalizationSet:
    """Return at most ``count`` of the photos, evenly spread over the set."""
    step = max(1.0, len(data.samples) / count)
    places = dict.fromkeys(int(i * step) for i in range(min(count, len(data.samples))))
    return replace(data, samples=tuple(data.samples[i] for i in places))


def measure(
    given: argparse.Namespace, parts: Sequence[str], console: Console, loops: Sequence[dict[str, Any]] = ()
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield each part with its rows, the loop after every network; ``loops`` are rows of it that are there."""
    device = torch.device(given.device)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(device, Path(folder), given.rounds)
        source = given.data or make_photos(Path(folder, "photos"), max(given.photos, given.loop_photos))
        data = read_set(source)
        model, sizes = given.model or FEATURE_MODEL, given.size or FEATURE_SIZES
        if "features" in parts:
            rows = []
            most = min(given.photos, MOST_FEATURES)
            for precision in ("no", "bf16"):
                console.print(f"features, precision {precision}")
                batch = given.batch or (64 if given.device == "cuda" else 8)
                how = {"name": model, "sizes": sizes, "precision": precision, "batch": batch}
                rows.append(time_features(setting, spread(data, most).samples, **how))
            yield "features", rows
        if "heads" in parts:
            console.print("heads")
            how = {"name": model, "sizes": sizes, "epochs": given.epochs, "photos": given.kept}
            yield "heads", time_heads(setting, **how)
        if "loop" in parts:
            rows = list(loops)
            for name, usual_sizes, precision, usual_batch in LOOPS[given.device]:
                how = {
                    "name": given.model or name,
                    "sizes": given.size or usual_sizes,
                    "precision": precision,
                    "batch": given.batch or usual_batch,
                }
                if any((row["model"], list(row["sizes"])) == (how["name"], list(how["sizes"])) for row in rows):
                    continue
                console.print(f"loop, {how['name']}, {how['sizes']} px, precision {precision}")
                workers = find_workers(given.workers, given.device, how["batch"], max(how["sizes"]))
                rows += time_loop(replace(setting, workers=workers), spread(data, given.loop_photos), **how)
                for row in rows:
                    ours = row["provider"] == "molt" and row["model"] == "molt_deit_small" and given.device == "cuda"
                    row["targets"] = ASKED if ours else {}
                add_missed(rows)
                yield "loop", rows


def tables(found: Mapping[str, Any]) -> list[Table]:
    """Return a table a part."""
    made = []
    if rows := found.get("features"):
        names = list(rows[0]["stages_s"])
        table = Table(
            "precision", "molt, ms", "bare, ms", "ratio", *names, title="features, a photo; target 1.1 at most"
        )
        for row in rows:
            stages = (f"{1000 * row['stages_s'][name]:.2f}" for name in names)
            times = (f"{1000 * row[key]:.2f}" for key in ("molt_s", "bare_s"))
            table.add_row(row["precision"], *times, f"{row['ratio']:.3f}", *stages)
        made.append(table)
    if rows := found.get("heads"):
        title = f"heads, {rows[0]['photos']} photos, {rows[0]['epochs']} epochs"
        table = Table("provider", "loop, s", "whole call, s", "photos/s", "x bare loop", title=title)
        for row in rows:
            speed, ratio = f"{row['photos_per_s']:.0f}", f"{row['ratio']:.2f}"
            table.add_row(row["provider"], f"{row['loop_s']:.2f}", f"{row['call_s']:.2f}", speed, ratio)
        made.append(table)
    if rows := found.get("loop"):
        names = ("network", "provider", "photos/s", "x bare loop", "x timm", "saving an epoch, s")
        table = Table(*names, title="fine-tuning; target 0.9 of the bare loop at least")
        for row in rows:
            network = f"{row['model']}, {'/'.join(map(str, row['sizes']))}, {row['precision']}"
            ratios = (f"{row[key]:.2f}" for key in ("ratio", "ratio_timm"))
            saving = "" if row["save_s"] is None else f"{row['save_s']:.2f}"
            table.add_row(network, row["provider"], f"{row['photos_per_s']:.1f}", *ratios, saving)
        made.append(table)
    return made


def main(arguments: list[str] | None = None) -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--photos", type=int, help="of features (default: 16, on a GPU 1024, of which 384 are taken)")
    parser.add_argument("--loop-photos", type=int, help="of the loop (default: 48, on a GPU 1024)")
    parser.add_argument("--kept", type=int, default=1000, help="photos whose features heads are trained on")
    parser.add_argument("--epochs", type=int, help="of heads (default: the recipe's)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, help="processes that read in the loop (default: 0, on a GPU up to 8)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="class folders of photos, instead of made ones")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--model", help="for all parts, in place of their own")
    parser.add_argument("--size", type=int, nargs="+", help="sides of the scales for all parts, in place of their own")
    parser.add_argument("--batch", type=int, help="of features and loop, in place of their own")
    parser.add_argument("--resume", action="store_true", help="keep what --json FILE holds already")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too; - prints them")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    given.photos = PHOTOS[given.device] if given.photos is None else given.photos
    given.loop_photos = LOOP_PHOTOS[given.device] if given.loop_photos is None else given.loop_photos
    for name in ("photos", "loop_photos", "kept", "rounds"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    # With --json - what is printed is JSON alone.
    console = Console(stderr=given.json == Path("-"), width=None if sys.stdout.isatty() else 120)
    if given.resume and given.json in (None, Path("-")):
        parser.error("--resume needs --json FILE")
    given.data = None if given.data is None else str(given.data)
    settings = {k: v for k, v in vars(given).items() if k not in ("json", "parts", "resume")}
    report = about(given.device, 1) | {"settings": settings, "targets": TARGETS}
    before, why = earlier(given.json, report) if given.resume else (None, None)
    if why is not None:
        console.print(f"measured anew: {why}")
    report |= {part: before[part] for part in PARTS if before is not None and part in before}
    left = [part for part in given.parts if part == "loop" or part not in report]
    for part, rows in measure(given, left, console, report.get("loop", ())):
        report[part] = rows
        # After every part and network: what was measured outlives an interruption.
        if given.json not in (None, Path("-")):
            with whole_file(given.json) as file:
                file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for table in tables(report):
        console.print(table)
    for row in report.get("loop", ()):
        for text in told(row):
            console.print(f"{row['model']}, {'/'.join(map(str, row['sizes']))}: {text}")
    if given.json == Path("-"):
        print(json.dumps(report))


if __name__ == "__main__":
    main()
