"""Deep clustering's presets on the benchmark photos: quality against time, and `fast` against `published`.

    python benchmarks/photos/presets.py [FOLDER] [--labels DIR] [--json FILE] [--plot FILE]

FOLDER is what fetch.py wrote. The plain CAM at 448 px is refined with alpha 0.5, normalised again and boxed at the
threshold of a grid that suits each row best on these same photos. `published` takes at most 200 steps at 224 px, with
two seeds: half an hour on 2 CPU cores. Label maps are kept in DIR (default: FOLDER/labels), so that a run that was
interrupted goes on where it was. Times are of clustering one photo after the other, measured apart, on the first
photos; that of `published` over 20 steps and extrapolated.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from clusterers import at_best
from evaluate import GRID, SIZE, best_iou, interval, read_boxes
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import molt
from molt import ops
from molt._files import whole_file
from molt.clustering import CachedClusterer, DeepClustering
from molt.data.images import read_photo

ALPHA = 0.5
FAST_SEEDS, PUBLISHED_SEEDS = 5, 2
PUBLISHED_SIDE, PUBLISHED_STEPS, TIMED_STEPS = 224, 200, 20
TIMED_PHOTOS, TIMED_LONG = 5, 3
ONE: dict[str, Any] = {"starts": 1, "merged": 0}


@dataclass(frozen=True)
class Row:
    """One point of the curve."""

    name: str
    family: str
    arguments: dict[str, Any]
    seeds: int = FAST_SEEDS

    def make(self, seed: int, **more: Any) -> DeepClustering:
        return DeepClustering(seed=seed, **{**self.arguments, **more})


def rows() -> list[Row]:
    """Return the points, `fast` first, `published` last, as it takes longest."""
    found = [Row("fast", "four networks, merged", {"preset": "fast"})]
    found += [Row(f"fast, {n} steps", "four networks, merged", {"preset": "fast", "steps": n}) for n in (0, 2, 10)]
    found += [
        Row(f"fast, {n} starts", "merged, by number of networks", {"preset": "fast", "starts": n}) for n in (1, 2, 8)
    ]
    found += [
        Row(f"fast, {n} px", "four networks, merged, by size", {"preset": "fast", "working_size": n, "num_segments": s})
        for n, s in ((64, 300), (160, 1600))
    ]
    found += [
        Row(f"one network, {n} steps", "one network", {"preset": "fast", "steps": n, **ONE})
        for n in (5, 10, 20, 40, 80)
    ]
    published = {"preset": "published", "steps": PUBLISHED_STEPS, "working_size": PUBLISHED_SIDE}
    return [*found, Row(f"published, {PUBLISHED_STEPS} steps", "published", published, PUBLISHED_SEEDS)]


def seconds_a_photo(row: Row, photos: list[Tensor]) -> float:
    """Return the median time of clustering a photo; of `published` a run of 20 steps, extrapolated."""
    if row.family != "published":
        clusterer = row.make(0)
        clusterer(photos[0], (SIZE, SIZE))
        return statistics.median(_timed(clusterer, photo) for photo in photos)
    # Both runs make superpixels, and the first of all warms up.
    _timed(row.make(0, steps=1, min_labels=1), photos[0])
    few, more = [], []
    for photo in photos[:TIMED_LONG]:
        few.append(_timed(row.make(0, steps=1, min_labels=1), photo))
        more.append(_timed(row.make(0, steps=1 + TIMED_STEPS, min_labels=1), photo))
    short, step = statistics.median(few), (statistics.median(more) - statistics.median(few)) / TIMED_STEPS
    return short + (PUBLISHED_STEPS - 1) * step


def _timed(clusterer: DeepClustering, photo: Tensor) -> float:
    start = time.perf_counter()
    clusterer(photo, (SIZE, SIZE))
    return time.perf_counter() - start


def evaluate(folder: Path, labels: Path, console: Console) -> dict[str, Any]:
    """Run everything and return the table with what it was measured on."""
    truth = {photo: boxes for photo, boxes in read_boxes(folder).items() if len(boxes) == 1}
    loc = molt.Localizer()
    images = {photo: read_photo(photo, SIZE) for photo in truth}
    pixels = {photo: image.pixels[None] for photo, image in images.items()}
    with torch.inference_mode():
        cams = {
            photo: ops.upsample_normalize(loc._maps(x, None).evidence.cam, (SIZE, SIZE)) for photo, x in pixels.items()
        }

    def scores(photo: Path, maps: Tensor) -> list[float]:
        return [best_iou(maps, threshold, truth[photo], images[photo].size) for threshold in GRID]

    every = np.ones(len(truth), dtype=bool)
    plain, plain_threshold = at_best(_by_threshold([[scores(photo, cams[photo]) for photo in truth]]), every)
    listed, values, work = rows(), {}, []
    work = [(row, seed, photo) for row in listed for seed in range(row.seeds) for photo in truth]
    table = []
    with Progress(console=console) as progress:
        task = progress.add_task("clustering", total=len(work))
        for row in listed:
            ious, counts = [], []
            for seed in range(row.seeds):
                clusterer = CachedClusterer(row.make(seed), labels, max_bytes=2**32)
                ious.append([])
                for photo in truth:
                    progress.update(task, description=f"{row.name}, seed {seed}")
                    found, number = clusterer(pixels[photo], (SIZE, SIZE))
                    refined = ops.cluster_refine(cams[photo], found, ALPHA, number)
                    ious[-1].append(scores(photo, ops.upsample_normalize(refined, (SIZE, SIZE))))
                    counts.append(int(number[0]))
                    progress.advance(task)
            best, threshold = at_best(_by_threshold(ious), every)
            values[row.name] = best
            change = best.mean(0) - plain[0]
            table.append(
                {
                    "name": row.name,
                    "family": row.family,
                    "settings": row.make(0).settings,
                    "photos": len(truth),
                    "seeds": row.seeds,
                    "threshold": threshold,
                    "mean_iou": round(float(best.mean()), 3),
                    "interval": interval(best.mean(0)),
                    "change": round(float(change.mean()), 3),
                    "change_interval": interval(change),
                    "mean_iou_by_seed": [round(float(v.mean()), 3) for v in best],
                    "spread": spread(best),
                    "clusters": round(float(np.mean(counts)), 1),
                }
            )
    shown = [pixels[photo] for photo in list(truth)[:TIMED_PHOTOS]]
    for row, entry in zip(listed, table, strict=True):
        entry["seconds"] = round(seconds_a_photo(row, shown), 4)
        entry["extrapolated"] = row.family == "published"
    fast, published = values["fast"].mean(0), values[listed[-1].name].mean(0)
    return {
        "command": "python benchmarks/photos/presets.py photos-data --json FILE",
        "device": f"cpu, {torch.get_num_threads()} threads",
        "versions": {"molt": molt.__version__, "torch": torch.__version__, "timm": timm.__version__}
        | {"python": platform.python_version()},
        "map": "CAM, 448 px",
        "alpha": ALPHA,
        "plain": {"mean_iou": round(float(plain.mean()), 3), "threshold": plain_threshold},
        "rows": table,
        "fast_less_published": {
            "mean_iou": round(float((fast - published).mean()), 3),
            "interval": interval(fast - published),
            "photos": len(truth),
            "published_steps": PUBLISHED_STEPS,
            "published_side": PUBLISHED_SIDE,
        },
    }


def spread(values: np.ndarray) -> float | None:
    """Return how far a photo's IoU moves with the seed: its standard deviation over seeds, mean over photos."""
    return round(float(values.std(0, ddof=1).mean()), 4) if len(values) > 1 else None


def _by_threshold(ious: list[list[list[float]]]) -> dict[int, dict[float, list[float]]]:
    """IoUs by seed, photo and threshold, as `at_best` wants them."""
    return {
        seed: {threshold: [photo[t] for photo in photos] for t, threshold in enumerate(GRID)}
        for seed, photos in enumerate(ious)
    }


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw quality, and its spread over seeds, against time."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, key in zip(panels, ("mean_iou", "spread"), strict=True):
        for family in dict.fromkeys(row["family"] for row in report["rows"]):
            mine = sorted((row for row in report["rows"] if row["family"] == family), key=lambda row: row["seconds"])
            axes.plot([row["seconds"] for row in mine], [row[key] for row in mine], marker="o", label=family)
            for row in mine:
                text = row["name"].removeprefix("fast, ").removeprefix("one network, ").removeprefix("published, ")
                at = (row["seconds"], row[key])
                if row["name"] == "fast":
                    axes.plot(*at, marker="*", markersize=16, color="black", zorder=3)
                axes.annotate(text, at, xytext=(3, 4), textcoords="offset points", fontsize=7)
        axes.set(xscale="log", xlabel="seconds a photo")
        axes.margins(x=0.1)
    panels[0].axhline(report["plain"]["mean_iou"], color="grey", linestyle=":", label="CAM without refinement")
    panels[0].set(ylabel="mean IoU")
    panels[1].set(ylabel="spread of a photo's IoU over seeds", ylim=(0, None))
    panels[0].legend(loc="lower right", fontsize=7)
    with whole_file(path) as part:
        figure.savefig(part, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("photos-data"))
    parser.add_argument("--labels", type=Path, help="where label maps are kept; default FOLDER/labels")
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--plot", type=Path, help="draw quality against time here, as SVG")
    arguments = parser.parse_args()
    console = Console()
    report = evaluate(arguments.folder, arguments.labels or arguments.folder / "labels", console)
    columns = ("row", "seconds", "mean IoU", "95 % interval", "change", "its interval", "spread over seeds", "clusters")
    table = Table(*columns)
    for row in report["rows"]:
        seconds = f"{row['seconds']:.3f}" + (" (extrapolated)" if row["extrapolated"] else "")
        cells = (
            row["mean_iou"],
            row["interval"],
            row["change"],
            row["change_interval"],
            row["spread"],
            row["clusters"],
        )
        table.add_row(row["name"], seconds, *map(str, cells))
    console.print(table)
    console.print("fast less published:", report["fast_less_published"])
    if arguments.json is not None:
        with whole_file(arguments.json) as part:
            part.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.plot is not None:
        draw(report, arguments.plot)


if __name__ == "__main__":
    main()
