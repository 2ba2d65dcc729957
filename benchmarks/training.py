"""Train MOLT's heads on the composites and score them on the photos with one and with two objects.

    python benchmarks/composites.py composites-data --fetch --train 800,400 --val 100 --test 250
    python benchmarks/photos/fetch.py photos-data
    python benchmarks/training.py composites-data --photos photos-data [--runs DIR] [--out benchmarks/results/DEVICE]

Trains, with seeds 0, 1 and 2, the default recipe, the same with mean pooling (TS-CAM's) and the same with a head on the
class token; features are computed once for all. Then runs `molt ablate --groups scales,heads` on both test splits and,
with the class that each head holds likeliest, on the photos of animals. What is in --runs already goes on from there.
Writes training.json: what was trained, how long it took, and those rows; and to --runs/photos-overlays a page of the
photos with the first head's single scales, fused and refined maps and boxes (photos are not ours to publish).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from molt._files import whole_file
from molt.benchmark.machine import about

SEEDS = (0, 1, 2)
KINDS: dict[str, list[str]] = {
    "default": [],
    "mean pooling": ["--pooling", "mean"],
    "class token": ["--head", "class_token"],
}
TESTS = {"two": "composites, two objects", "one": "composites, one object", "photos": "22 photos of animals"}


def train(data: Path, runs: Path, precision: str) -> list[dict[str, Any]]:
    """Train every kind of head with every seed, and return what is to be said of each."""
    photos = data / "photos"
    found = []
    for kind, options in KINDS.items():
        for seed in SEEDS:
            out = folder(runs, kind, seed)
            command = [sys.executable, "-m", "molt.cli", "train", str(photos / "train/one"), str(photos / "train/two")]
            command += ["--val", str(photos / "val/one"), "--val", str(photos / "val/two"), "--seed", str(seed)]
            command += ["--precision", precision, "--cache", str(runs / "features"), "--out", str(out), "--resume"]
            subprocess.run([*command, *options], check=True)
            run = json.loads((out / "run.json").read_text(encoding="utf-8"))
            best = run["history"][run["best"]["epoch"] - 1]
            keys = (
                "seconds",
                "feature_seconds",
                "feature_photos",
                "trained_parameters",
                "photos",
                "best_rule",
                "weights",
            )
            found.append({"kind": kind, "seed": seed, "best": best} | {key: run[key] for key in keys})
    return found


def folder(runs: Path, kind: str, seed: int) -> Path:
    """Return the folder of a run."""
    return runs / f"{kind.replace(' ', '-')}-{seed}"


def score(data: Path, photos: Path, runs: Path, test: str) -> dict[str, Any]:
    """Return the report of `molt ablate` on a test split or the photos, of all heads that were trained."""
    out = runs / f"ablation-{test}"
    command = [sys.executable, "-m", "molt.cli", "ablate", "--out", str(out)]
    if test == "photos":
        names = photos / "metadata" / "classes.txt"
        command += [str(photos / "metadata"), "--photos", str(photos), "--classes", str(names), "--gt-map", "top1"]
    else:
        command += [str(data / "metadata" / "boxes" / f"test-{test}"), "--photos", str(data / "photos")]
        command += ["--classes", str(data / "classes.txt")]
    command += ["--seeds", "1", "--groups", "scales,heads", "--no-plots"]
    for kind in KINDS:
        option = "--checkpoint-class-token" if kind == "class token" else "--checkpoint"
        for seed in SEEDS:
            command += [option, str(folder(runs, kind, seed) / "best.safetensors")]
    subprocess.run(command, check=True)
    report: dict[str, Any] = json.loads((out / "ablation.json").read_text(encoding="utf-8"))
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, score, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("composites", type=Path)
    parser.add_argument("--photos", type=Path, default=Path("photos-data"), help="of benchmarks/photos/fetch.py")
    parser.add_argument("--runs", type=Path, default=Path("molt-training"), help="folder of runs and features")
    parser.add_argument("--out", type=Path, help="folder of training.json; --runs if not given")
    parser.add_argument("--precision", default="bf16", help="of the backbone's pass over the photos: no, bf16 or fp16")
    chosen = parser.parse_args(arguments)
    trained = train(chosen.composites, chosen.runs, chosen.precision)
    reports = {test: score(chosen.composites, chosen.photos, chosen.runs, test) for test in TESTS}
    overlays = [sys.executable, "-m", "molt.cli", "localize", str(chosen.photos), "--method", "molt_dinov2_small"]
    overlays += ["--checkpoint", str(folder(chosen.runs, "default", 0) / "best.safetensors")]
    subprocess.run([*overlays, "--out", str(chosen.runs / "photos-overlays")], check=True, stdout=subprocess.DEVNULL)
    rows = [{"set": test, "title": TESTS[test]} | row for test, one in reports.items() for row in one["rows"]]
    findings = {test: one["findings"] for test, one in reports.items()}
    report = about("cpu", 1) | {"precision": chosen.precision, "trained": trained, "findings": findings, "rows": rows}
    with whole_file((chosen.out or chosen.runs) / "training.json") as part:
        part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
