"""Score cluster refinement on the benchmark photos: every clusterer on weak and strong maps, alpha fixed and auto.

    python benchmarks/photos/clusterers.py [FOLDER] [--json FILE]

FOLDER is what fetch.py wrote. The maps are the plain CAM and the seed maps of `weak` and of the default. They are
refined at 448 px, normalised again and boxed at the threshold of a grid that suits each best on these same photos, the
map without refinement likewise. A clusterer with a random start counts as the mean over its seeds, photo by photo.
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
from molt._auto_alpha import blend
from molt._files import whole_file
from molt.clustering import DeepClustering, Slic, TokenKMeans
from molt.data.images import read_photo

ALPHAS: tuple[float | str, ...] = (0.5, "auto")
SEEDS = tuple(range(5))
BASES = ("CAM, 448 px", "seed map, CNN patches", "seed map, ViT patches")
ONE: dict[str, Any] = {"starts": 1, "merged": 0}


def clusterers() -> dict[str, tuple[str, list[Any]]]:
    """Return what each clusterer is shown (colour, vit or cnn) and its instances, one a seed."""
    return {
        "k-means 5, colour": ("colour", [TokenKMeans(seed=s) for s in SEEDS]),
        "k-means 5, CNN features": ("cnn", [TokenKMeans(seed=s) for s in SEEDS]),
        "k-means 5, ViT features": ("vit", [TokenKMeans(seed=s) for s in SEEDS]),
        "SLIC 100, colour": ("colour", [Slic(100)]),
        "deep, fast": ("colour", [DeepClustering(seed=s) for s in SEEDS]),
        "deep, one network, 40 steps": ("colour", [DeepClustering(steps=40, **ONE, seed=s) for s in SEEDS]),
        "deep, one network, continuity loss": (
            "colour",
            [DeepClustering(steps=40, **ONE, num_segments=0, continuity=1, seed=s) for s in SEEDS],
        ),
        "deep, fast, ViT features": ("vit", [DeepClustering(seed=s) for s in SEEDS]),
    }


def evaluate(folder: Path, console: Console) -> dict[str, Any]:
    """Run everything and return the table with what it was measured on."""
    truth = read_boxes(folder)
    loc, weak = molt.Localizer(), molt.Localizer(weights="weak")
    # ious[base, clusterer, alpha][seed][threshold] lists one IoU a photo; without refinement there is one seed.
    ious: dict[tuple[str, str, Any], dict[int, dict[float, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    clusters, seconds, weights = defaultdict(list), defaultdict(float), defaultdict(list)

    def score(
        key: tuple[str, str, Any], seed: int, maps: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]
    ) -> None:
        for threshold in GRID:
            ious[key][seed][threshold].append(best_iou(maps, threshold, boxes, size))

    for photo, boxes in track(truth.items(), description="photos", console=console):
        image = read_photo(photo, SIZE)
        pixels = image.pixels[None]
        found, seen = loc._maps(pixels, None), weak._maps(pixels, None)
        bases = {
            "CAM, 448 px": ops.upsample_normalize(found.evidence.cam, (SIZE, SIZE)),
            "seed map, CNN patches": seen.fused,
            "seed map, ViT patches": found.fused,
        }
        shown = {"colour": pixels, "vit": found.evidence.features, "cnn": seen.evidence.features}
        for base, maps in bases.items():
            score((base, "none", 0), 0, maps, boxes, image.size)
        for name, (what, instances) in clusterers().items():
            for seed, clusterer in enumerate(instances):
                start = time.perf_counter()
                labels, counts = clusterer(shown[what], (SIZE, SIZE))
                seconds[name] += (time.perf_counter() - start) / len(instances)
                clusters[name].append(int(counts[0]))
                for base, maps in bases.items():
                    weights[base, name].append(float(molt.auto_alpha(maps, labels, counts)[0, 0]))
                    for alpha in ALPHAS:
                        refined = ops.upsample_normalize(blend(maps, labels, alpha, counts), (SIZE, SIZE))
                        score((base, name, alpha), seed, refined, boxes, image.size)

    single = np.array([len(boxes) == 1 for boxes in truth.values()])
    rows = []
    for base in BASES:
        plain, _ = at_best(ious[base, "none", 0], single)
        own = np.array(ious[base, "none", 0][0][loc.threshold])
        for name, alpha in (("none", 0), *((name, alpha) for name in clusterers() for alpha in ALPHAS)):
            values, threshold = at_best(ious[base, name, alpha], single)
            change = (values - plain).mean(0)[single]
            fixed = np.mean([by[loc.threshold] for by in ious[base, name, alpha].values()], 0)
            rows.append(
                {
                    "name": f"{base} + {name}, alpha {alpha}" if name != "none" else base,
                    "map": base,
                    "clusterer": name,
                    "alpha": alpha,
                    "mean_alpha": round(float(np.mean(weights[base, name])), 3) if alpha == "auto" else alpha,
                    "photos": int(single.sum()),
                    "seeds": len(values),
                    "threshold": threshold,
                    "mean_iou": round(float(values[:, single].mean()), 3),
                    "interval": interval(values.mean(0)[single]),
                    "mean_iou_by_seed": [round(float(v[single].mean()), 3) for v in values],
                    "spread": round(float(values[:, single].std(0, ddof=1).mean()), 4) if len(values) > 1 else None,
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
    pairs = []
    for base in BASES:
        for name in clusterers():
            fixed, auto = (at_best(ious[base, name, alpha], single)[0].mean(0)[single] for alpha in ALPHAS)
            difference = auto - fixed
            pairs.append(
                {
                    "name": f"{base} + {name}",
                    "auto_less_fixed": round(float(difference.mean()), 3),
                    "interval": interval(difference),
                    "better": round(float((difference > 0.01).mean()), 3),
                    "worse": round(float((difference < -0.01).mean()), 3),
                }
            )
    return {
        "command": "python benchmarks/photos/clusterers.py photos-data --json FILE",
        "device": f"cpu, {torch.get_num_threads()} threads",
        "versions": {"molt": molt.__version__, "torch": torch.__version__, "timm": timm.__version__}
        | {"python": platform.python_version()},
        "weights": [info.to_json() for info in loc.weights],
        "rows": rows,
        "auto_less_fixed": pairs,
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
    columns = ("map", "clusterer", "alpha", "threshold", "mean IoU", "change", "95 % interval", "improved", "worsened")
    table = Table(*columns, "change at .5", "clusters", "seconds")
    for r in report["rows"]:
        cells = (r["map"], r["clusterer"], r["alpha"], r["threshold"], r["mean_iou"], r["change"], r["change_interval"])
        table.add_row(
            *map(str, (*cells, r["improved"], r["worsened"], r["change_at_0.5"], r["clusters"], r["seconds"]))
        )
    console.print(table)
    if arguments.json is not None:
        with whole_file(arguments.json) as part:
            part.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
