"""Score boxes on the benchmark photos: molt's methods, the plain maps they grow from, and a centre box.

    python benchmarks/photos/evaluate.py [FOLDER] [--json FILE]

FOLDER is what fetch.py wrote. One threshold a method for all photos, the largest component's box. Methods with a
threshold of their own are scored at it; the others at the best of a grid on these same photos, which flatters them.
LayerCAM comes from the package grad-cam where it is installed.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torchvision.ops import box_iou

import molt
from molt import ops
from molt.data.images import read_photo

SIZE = 448
GRID = [round(0.05 * step, 2) for step in range(1, 20)]
DRAWS = 10_000


def read_boxes(folder: Path) -> dict[Path, Tensor]:
    """Return (n, 4) true boxes in pixels by photo."""
    boxes = defaultdict(list)
    with (folder / "boxes.csv").open() as file:
        for row in csv.DictReader(file):
            boxes[folder / f"{row['photo']}.webp"].append([float(row[k]) for k in ("x0", "y0", "x1", "y1")])
    return {photo: torch.tensor(rows) for photo, rows in sorted(boxes.items())}


def layer_cam(cnn: molt.backbones.CNNBackbone) -> Callable[[Tensor, int], Tensor] | None:
    """Return LayerCAM of the package grad-cam on the CNN's last maps, or None where it is not installed."""
    try:
        from pytorch_grad_cam import LayerCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError:
        return None
    from molt.backbones.preprocess import normalize

    model = timm.create_model(cnn.info.model).eval()
    model.load_state_dict(cnn.model.state_dict())
    explainer = LayerCAM(model=model, target_layers=[model.bn2])

    def run(pixels: Tensor, label: int) -> Tensor:
        maps = explainer(input_tensor=normalize(pixels, model), targets=[ClassifierOutputTarget(label)])
        return torch.from_numpy(maps).float()[None]

    return run


def stages(pixels: Tensor, loc: molt.Localizer, weak: molt.Localizer, layer: Any) -> dict[str, Tensor]:
    """Return every map to be scored of one photo, (1, 1, 448, 448) in [0, 1]."""

    def up(maps: Tensor) -> Tensor:
        return ops.upsample_normalize(maps, (SIZE, SIZE))

    found, found_weak = loc._maps(pixels, None), weak._maps(pixels, None)
    classes = found.evidence.classes
    cnn = loc.method.cnn
    with torch.inference_mode():
        small = torch.nn.functional.interpolate(pixels, (224, 224), mode="bilinear", antialias=True)
        middle = torch.nn.functional.interpolate(pixels, (336, 336), mode="bilinear", antialias=True)
        cams = [cnn.cam(cnn(side), classes) for side in (small, middle)] + [found.evidence.cam]
    agnostic = loc._maps(pixels, loc._wanted("object"))
    maps = {
        "CAM, 224 px": up(cams[0]),
        "CAM, 448 px": up(cams[2]),
        "CAM, three scales": ops.fuse_maps(cams, (SIZE, SIZE)),
        "seed map, CNN patches": found_weak.fused,
        "weak": found_weak.refined,
        "seed map, ViT patches": found.fused,
        "default": found.refined,
        "default, class-agnostic": agnostic.refined,
    }
    features = found.evidence.features
    bases = {"CAM, 448 px": maps["CAM, 448 px"], "seed map, ViT patches": found.fused}
    if layer is not None:
        maps["LayerCAM (grad-cam), 448 px"] = bases["LayerCAM (grad-cam), 448 px"] = up(
            layer(pixels.clone(), int(classes[0, 0]))
        )
    for name, base in bases.items():
        maps[f"{name} + refine, colour"] = molt.refine(base, pixels)
        maps[f"{name} + refine, ViT features"] = molt.refine(base, features=features)
        maps[f"{name} + refine, CNN features"] = molt.refine(base, features=found_weak.evidence.features)
    return maps


def best_iou(maps: Tensor, threshold: float, truth: Tensor, size: tuple[int, int]) -> float:
    """Return the IoU of the largest component's box with the true box it fits best, 0 without a box."""
    boxes = ops.component_boxes(maps, threshold, largest=True).boxes
    scale = torch.tensor([size[0] / SIZE, size[1] / SIZE]).repeat(2)
    return float(box_iou(boxes * scale, truth).max()) if len(boxes) else 0.0


def interval(values: np.ndarray) -> list[float]:
    """Return the 95 % bootstrap interval of the mean, photos redrawn."""
    draws = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    return [round(float(v), 3) for v in np.quantile(values[draws].mean(1), [0.025, 0.975])]


def row(name: str, ious: np.ndarray, single: np.ndarray, threshold: float | None, own: bool, masks: str) -> dict:
    """Return one row of the table."""
    return {
        "name": name,
        "photos": len(ious),
        "threshold": threshold,
        "threshold_from": "the method" if own else "the best on these photos" if threshold is not None else None,
        "hits_all": int((ious > 0.5).sum()),
        "hits_single": int((ious[single] > 0.5).sum()),
        "photos_single": int(single.sum()),
        "mean_iou_single": round(float(ious[single].mean()), 3),
        "interval": interval(ious[single]),
        "saw_masks": masks,
    }


def evaluate(folder: Path, console: Console) -> dict[str, Any]:
    """Run everything and return the table with what it was measured on."""
    truth = read_boxes(folder)
    loc, weak = molt.Localizer(), molt.Localizer(weights="weak")
    layer = layer_cam(loc.method.cnn)
    ious: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    centre = []
    for photo, boxes in track(truth.items(), description="photos", console=console):
        image = read_photo(photo, SIZE)
        width, height = image.size
        side = 0.7
        middle = torch.tensor([[(1 - side) / 2, (1 - side) / 2, (1 + side) / 2, (1 + side) / 2]])
        centre.append(float(box_iou(middle * torch.tensor([width, height]).repeat(2), boxes).max()))
        for name, maps in stages(image.pixels[None], loc, weak, layer).items():
            for threshold in GRID:
                ious[name][threshold].append(best_iou(maps, threshold, boxes, image.size))
    single = np.array([len(boxes) == 1 for boxes in truth.values()])
    rows = [row("centre box, 70 % of each side", np.array(centre), single, None, False, "no")]
    fixed = ("weak", "default", "seed map, CNN patches", "seed map, ViT patches", "default, class-agnostic")
    chosen: dict[str, np.ndarray] = {}
    best: dict[str, np.ndarray] = {}
    for name, by_threshold in ious.items():
        scores = {t: np.array(values) for t, values in by_threshold.items()}
        own = name in fixed
        top = max(scores, key=lambda t: scores[t][single].mean())
        at = loc.threshold if own else top
        chosen[name], best[name] = scores[at], scores[top]
        masks = max((i.saw_masks for i in loc.weights), key=["no", "unknown", "probably"].index)
        uses_vit = "ViT" in name or name.startswith("default")
        rows.append(row(name, scores[at], single, at, own, masks if uses_vit else "no"))
        rows[-1]["mean_iou_by_threshold"] = {str(t): round(float(v[single].mean()), 3) for t, v in scores.items()}
    pairs = []
    for name in chosen:
        base = {"weak": "seed map, CNN patches", "default": "seed map, ViT patches"}.get(name, name.split(" + ")[0])
        if base != name:
            # The method as it stands at its threshold; the drop-in with each map at its best.
            at_best = " + " in name
            values = best if at_best else chosen
            change = (values[name] - values[base])[single]
            pairs.append(
                {
                    "name": name,
                    "against": base,
                    "thresholds": "each its best" if at_best else "the method's",
                    "mean_iou_change": round(float(change.mean()), 3),
                    "interval": interval(change),
                    "better": int((change > 0.01).sum()),
                    "worse": int((change < -0.01).sum()),
                }
            )
    return {
        "command": "python benchmarks/photos/evaluate.py photos-data --json FILE",
        "device": f"cpu, {torch.get_num_threads()} threads",
        "versions": {"molt": molt.__version__, "torch": torch.__version__, "timm": timm.__version__}
        | {"python": platform.python_version()},
        "weights": [info.to_json() for info in loc.weights],
        "not_run": [] if layer is not None else ["LayerCAM: the package grad-cam is not installed"],
        "rows": rows,
        "refinement": pairs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("photos-data"))
    parser.add_argument("--json", type=Path, help="write the table here")
    arguments = parser.parse_args()
    console = Console()
    report = evaluate(arguments.folder, console)
    table = Table("method", "threshold", "hits, all", "hits, one animal", "mean IoU", "95 % interval", "saw masks?")
    for entry in report["rows"]:
        table.add_row(
            entry["name"],
            str(entry["threshold"] or "-"),
            f"{entry['hits_all']}/{entry['photos']}",
            f"{entry['hits_single']}/{entry['photos_single']}",
            f"{entry['mean_iou_single']:.3f}",
            str(entry["interval"]),
            entry["saw_masks"],
        )
    console.print(table)
    changes = Table("refined", "against", "thresholds", "mean IoU change", "95 % interval", "better", "worse")
    for entry in report["refinement"]:
        changes.add_row(*(str(value) for value in entry.values()))
    console.print(changes)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
