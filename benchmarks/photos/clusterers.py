"""Score cluster refinement on the benchmark photos: every clusterer on the plain CAM and on the default's seed map.

    python benchmarks/photos/clusterers.py [FOLDER] [--json FILE]

FOLDER is what fetch.py wrote. Maps are refined at 448 px with alpha 0.5, normalised again and boxed at the threshold of
a grid that suits each best on these same photos, the map without refinement likewise. A clusterer with a random start
counts as the mean over its seeds, photo by photo.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from evaluate import GRID, SIZE, best_iou, interval, read_boxes
from rich.console import Console
from rich.progress import track
from rich.table import Table

import molt
from molt import ops
from molt._files import whole_file
from molt.clustering import DeepClustering, Slic, TokenKMeans
from molt.data.images import read_photo

ALPHA = 0.5
SEEDS = (0, 1, 2)
BASES = ("CAM, 448 px", "seed map, ViT patches")


def clusterers() -> dict[str, tuple[str, list[Any]]]:
    """Return what each clusterer is shown (colour, vit or cnn) and its instances, one a seed."""
    return {
        "k-means 5, colour": ("colour", [TokenKMeans(seed=s) for s in SEEDS]),
        "k-means 5, CNN features": ("cnn", [TokenKMeans(seed=s) for s in SEEDS]),
        "k-means 5, ViT features": ("vit", [TokenKMeans(seed=s) for s in SEEDS]),
        "SLIC 100, colour": ("colour", [Slic(100)]),
        "deep, superpixel vote": ("colour", [DeepClustering(seed=s) for s in SEEDS]),
        "deep, continuity loss": ("colour", [DeepClustering(num_segments=0, continuity=1, seed=s) for s in SEEDS]),
        "deep, ViT features": ("vit", [DeepClustering(seed=s) for s in SEEDS]),
    }


def evaluate(folder: Path, console: Console) -> dict[str, Any]:
    """Run everything and return the table with what it was measured on."""
    truth = read_boxes(folder)
    loc, weak = molt.Localizer(), molt.Localizer(weights="weak")
    # ious[base, clusterer][seed][threshold] lists one IoU a photo; without refinement there is one seed.
    ious: dict[tuple[str, str], dict[int, dict[float, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    clusters, seconds = defaultdict(list), defaultdict(float)

    def score(key: tuple[str, str], seed: int, maps: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> None:
        for threshold in GRID:
            ious[key][seed][threshold].append(best_iou(maps, threshold, boxes, size))

    for photo, boxes in track(truth.items(), description="photos", console=console):
        image = read_photo(photo, SIZE)
        pixels = image.pixels[None]
        found, seen = loc._maps(pixels, None), weak._maps(pixels, None)
        bases = {
            "CAM, 448 px": ops.upsample_normalize(found.evidence.cam, (SIZE, SIZE)),
            "seed map, ViT patches": found.fused,
        }
        shown = {"colour": pixels, "vit": found.evidence.features, "cnn": seen.evidence.features}
        for base, maps in bases.items():
            score((base, "none"), 0, maps, boxes, image.size)
        for name, (what, instances) in clusterers().items():
            for seed, clusterer in enumerate(instances):
                start = time.perf_counter()
                labels, counts = clusterer(shown[what], (SIZE, SIZE))
                seconds[name] += (time.perf_counter() - start) / len(instances)
                clusters[name].append(int(counts[0]))
                for base, maps in bases.items():
                    refined = ops.cluster_refine(maps, labels, ALPHA, counts)
                    score((base, name), seed, ops.upsample_normalize(refined, (SIZE, SIZE)), boxes, image.size)

    single = np.array([len(boxes) == 1 for boxes in truth.values()])
    rows = []
    for base in BASES:
        plain, _ = at_best(ious[base, "none"], single)
        own = np.array(ious[base, "none"][0][loc.threshold])
        for name in ("none", *clusterers()):
            values, threshold = at_best(ious[base, name], single)
            change = (values - plain).mean(0)[single]
            fixed = np.mean([by[loc.threshold] for by in ious[base, name].values()], 0)
            rows.append(
                {
                    "name": f"{base} + {name}" if name != "none" else base,
                    "map": base,
                    "clusterer": name,
                    "photos": int(single.sum()),
                    "seeds": len(values),
                    "threshold": threshold,
                    "mean_iou": round(float(values[:, single].mean()), 3),
                    "interval": interval(values.mean(0)[single]),
                    "mean_iou_by_seed": [round(float(v[single].mean()), 3) for v in values],
                    "hits_all": round(float((values > 0.5).sum(1).mean()), 2),
                    "change": round(float(change.mean()), 3),
                    "change_interval": interval(change),
                    "improved": round(float((change > 0.01).mean()), 3),
                    "worsened": round(float((change < -0.01).mean()), 3),
                    "change_at_0.5": round(float((fixed - own)[single].mean()), 3),
                    "clusters": round(float(np.mean(clusters[name])), 1) if name != "none" else None,
                    "seconds": round(seconds[name] / len(truth), 3) if name != "none" else None,
                }
            )
    return {
        "command": "python benchmarks/photos/clusterers.py photos-data --json FILE",
        "device": f"cpu, {torch.get_num_threads()} threads",
        "versions": {"molt": molt.__version__, "torch": torch.__version__, "timm": timm.__version__}
        | {"python": platform.python_version()},
        "weights": [info.to_json() for info in loc.weights],
        "alpha": ALPHA,
        "rows": rows,
    }


def at_best(scores: dict[int, dict[float, list[float]]], single: np.ndarray) -> tuple[np.ndarray, float]:
    """Return IoUs (seeds, photos) at the threshold with the best mean over seeds and photos with one animal."""
    by_threshold = {t: np.array([by[t] for by in scores.values()]) for t in GRID}
    best = max(GRID, key=lambda t: by_threshold[t][:, single].mean())
    return by_threshold[best], best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("photos-data"))
    parser.add_argument("--json", type=Path, help="write the table here")
    arguments = parser.parse_args()
    console = Console()
    report = evaluate(arguments.folder, console)
    columns = ("map", "clusterer", "threshold", "mean IoU", "change", "95 % interval", "improved", "worsened")
    table = Table(*columns, "change at .5", "clusters", "seconds")
    for r in report["rows"]:
        cells = (r["map"], r["clusterer"], r["threshold"], r["mean_iou"], r["change"], r["change_interval"])
        table.add_row(
            *map(str, (*cells, r["improved"], r["worsened"], r["change_at_0.5"], r["clusters"], r["seconds"]))
        )
    console.print(table)
    if arguments.json is not None:
        with whole_file(arguments.json) as part:
            part.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
