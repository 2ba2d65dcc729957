"""Score what `molt.refine` may do with heat below zero: cut it off, or stretch it in with the rest.

    python benchmarks/photos/signed.py [FOLDER] [--json FILE]

FOLDER is what fetch.py wrote. Maps are those that captum and CAM give, signed; boxes as in evaluate.py: the largest
component's, its best IoU with a true box, at threshold 0.5 and at the best threshold of the grid, photos of one animal.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections import defaultdict
from pathlib import Path
from typing import get_args

import numpy as np
import timm
import torch
from evaluate import GRID, SIZE, best_iou, layer_cam, read_boxes
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import molt
from molt._refine import Signed
from molt.backbones.preprocess import normalize
from molt.data.images import read_photo

WAYS: tuple[Signed, ...] = get_args(Signed)


def layer_grad_cam(model: torch.nn.Module, layer: torch.nn.Module, pixels: Tensor, label: int) -> Tensor:
    """Return (h, w) as captum's LayerGradCam does by default: mean gradients times activations, no ReLU."""
    kept: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _module, _given, out: kept.append(out))
    with torch.enable_grad():
        score = model(normalize(pixels, model).requires_grad_())[0, label]
        (grad,) = torch.autograd.grad(score, kept[0])
    hook.remove()
    return (grad.mean((2, 3), keepdim=True) * kept[0]).sum(1)[0].detach()


def maps_of(pixels: Tensor, loc: molt.Localizer, weak: molt.Localizer, model: torch.nn.Module) -> dict[str, Tensor]:
    """Return raw maps (h, w) of the likeliest class, signed where they are."""
    cnn, found = loc.method.cnn, loc._maps(pixels, None).evidence
    small = torch.nn.functional.interpolate(pixels, (224, 224), mode="bilinear", antialias=True)
    label = int(found.classes[0, 0])
    with torch.inference_mode():
        coarse = cnn.cam(cnn(small), found.classes)[0, 0].clone()
    maps = {"CAM, 224 px": coarse, "CAM, 448 px": found.cam[0, 0].clone()}
    maps["seed map, ViT"] = found.maps[-1][0, 0].clone()
    maps["seed map, CNN"] = weak._maps(pixels, None).evidence.maps[-1][0, 0].clone()
    for side, layer in ((14, model.blocks[-1]), (28, model.blocks[-3]), (56, model.blocks[2])):
        maps[f"LayerGradCam, {side} x {side}"] = layer_grad_cam(model, layer, pixels, label)
    if (explain := layer_cam(cnn)) is not None:
        maps["LayerCAM, 448 px"] = explain(pixels.clone(), label)[0, 0]
    return maps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("photos-data"))
    parser.add_argument("--json", type=Path, help="write the table here")
    arguments = parser.parse_args()
    truth = {photo: boxes for photo, boxes in read_boxes(arguments.folder).items() if len(boxes) == 1}
    warnings.simplefilter("ignore", UserWarning)  # of heat cut off, which is what is compared
    loc, weak = molt.Localizer(device="cpu"), molt.Localizer(weights="weak", device="cpu")
    model = timm.create_model(loc.method.cnn.info.model).eval()
    model.load_state_dict(loc.method.cnn.model.state_dict())
    ious: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    below = defaultdict(list)
    console = Console()
    for photo, boxes in track(truth.items(), console=console):
        image = read_photo(photo, SIZE)
        features = loc._maps(image.pixels[None], None).evidence.features
        for name, raw in maps_of(image.pixels[None], loc, weak, model).items():
            below[name].append(float(-raw.clamp(max=0).sum() / raw.abs().sum()))
            for way in WAYS:
                made = molt.refine(raw, features=features, size=(SIZE, SIZE), signed=way)
                for threshold in GRID:
                    ious[name, way][threshold].append(best_iou(made[None, None], threshold, boxes, image.size))
    table = Table("map", "share below 0", *(f"{way}, {at}" for at in ("at 0.5", "best") for way in WAYS))
    rows = []
    for name in below:
        means = {way: {t: float(np.mean(v)) for t, v in ious[name, way].items()} for way in WAYS}
        cells = [f"{means[way][0.5]:.2f}" for way in WAYS]
        cells += [f"{max(m.values()):.2f} @{max(m, key=m.__getitem__)}" for m in means.values()]
        table.add_row(name, f"{np.mean(below[name]):.2f}", *cells)
        found = {way: {"at_half": means[way][0.5], "best": max(means[way].values())} for way in WAYS}
        rows.append({"map": name, "below_zero": float(np.mean(below[name])), **found})
    console.print(table)
    if arguments.json is not None:
        report = {
            "command": "python benchmarks/photos/signed.py photos-data --json FILE",
            "photos": len(truth),
            "torch": torch.__version__,
            "weights": [info.to_json() for info in (*loc.weights, *weak.weights)],
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
