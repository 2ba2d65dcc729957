"""Evaluate centre box, plain CAM, LayerCAM, weak and default on the benchmark photos and on the composites.

    python benchmarks/photos/fetch.py photos-data
    python benchmarks/composites.py composites-data --fetch --train 800,400 --val 100 --test 250
    python benchmarks/evaluation.py photos-data composites-data [--runs DIR] [--out benchmarks/results/DEVICE]

Runs `molt evaluate` for each set and method (what is in --runs already goes on from there), then writes to --out
evaluation.json, and for each set a page of all methods, evaluation-SET.html. Boxes of the photos are of all animals, so
the map of the network's likeliest class counts there; on the composites it is that of the labelled class, for which
composites_classes.csv names ImageNet's.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molt._files import whole_file
from molt.benchmark.machine import about
from molt.evaluation.compare import compare
from molt.evaluation.report import write_report
from molt.evaluation.runs import Run
from molt.evaluation.summary import protocol_line

HERE = Path(__file__).parent
METHODS = ("default", "weak", "layercam", "cam", "centre")
METRICS = ("max_box_acc", "max_box_acc_v2", "mean_iou", "pxap")
SETS = {
    "photos": "22 photos of animals",
    "composites-one": "composites, one object",
    "composites-two": "composites, two objects",
}


def options(name: str, photos: Path, composites: Path) -> list[str]:
    """Return what `molt evaluate` is given for a set."""
    if name == "photos":
        names = photos / "metadata" / "classes.txt"
        return [str(photos / "metadata"), "--photos", str(photos), "--classes", str(names), "--gt-map", "top1"]
    where = composites / "metadata" / "boxes" / f"test-{name.removeprefix('composites-')}"
    table = HERE / "composites_classes.csv"
    named = {"photos": composites / "photos", "classes": composites / "classes.txt", "class-map": table}
    return [str(where), *(part for key, value in named.items() for part in (f"--{key}", str(value)))]


def evaluate(name: str, given: Sequence[str], runs: Path) -> list[Run]:
    """Run every method on a set and return the runs, the first what others are compared with."""
    command = [sys.executable, "-m", "molt.cli", "evaluate", *given]
    for method in METHODS:
        subprocess.run([*command, "--method", method, "--out", str(runs / name / method)], check=True)
    return [Run.load(runs / name / method) for method in METHODS]


def summary(name: str, given: Sequence[str], runs: Sequence[Run]) -> dict[str, Any]:
    """Return what is kept of a set."""
    rows = []
    for run in runs:
        info = run.to_json()
        kept = {key: info[key] for key in ("scores", "by_iou", "sizes", "classes", "errors")}
        masks = sorted({weights["saw_masks"] for weights in info["method"]["weights"]}, key=("no", "probably").index)
        rows.append(
            {"method": run.name, "protocol": protocol_line(info), "saw_masks": masks[-1] if masks else "no"}
            | kept
            | {"problems": info["problems"]["count"], "weights": info["method"]["weights"]}
        )
    found = compare(runs)
    return {
        "set": name,
        "title": SETS[name],
        "photos": len(runs[0].rows),
        "command": f"molt evaluate {shlex.join(given)} --method METHOD",
        "rows": rows,
        "differences": found["differences"],
    }


def table(sets: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown table of the documentation."""
    lines = [
        "| photos | method | MaxBoxAcc | MaxBoxAccV2 | mean IoU | against the default, V2 | saw masks? |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in sets:
        changes = {(d["metric"], d["run"]): d for d in one["differences"]}
        for row in one["rows"]:
            cells = []
            for metric in ("max_box_acc", "max_box_acc_v2", "mean_iou"):
                score = row["scores"][metric]
                cells.append(f"{score['value']:.1f} ({score['interval'][0]:.1f} to {score['interval'][1]:.1f})")
            change = changes.get(("max_box_acc_v2", row["method"]))
            against = "" if change is None else f"{change['difference']:+.1f} ({change['interval'][0]:+.1f} to "
            against += "" if change is None else f"{change['interval'][1]:+.1f})"
            lines.append(f"| {one['title']} | {row['method']} | {' | '.join(cells)} | {against} | {row['saw_masks']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Evaluate, write, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("composites", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("molt-evaluation"), help="folder of the runs")
    parser.add_argument("--out", type=Path, help="folder of the report; --runs if not given")
    chosen = parser.parse_args()
    out = chosen.out or chosen.runs
    sets = []
    for name in SETS:
        given = options(name, chosen.photos, chosen.composites)
        runs = evaluate(name, given, chosen.runs)
        plain = options(name, Path("photos-data"), Path("composites-data"))
        if name != "photos":
            plain[-1] = "benchmarks/composites_classes.csv"
        sets.append(summary(name, plain, runs))
        write_report(out / f"evaluation-{name}.html", runs, comparison=compare(runs))
    report = about("cpu", 1) | {"sets": sets}
    with whole_file(out / "evaluation.json") as part:
        part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(sets))


if __name__ == "__main__":
    main()
