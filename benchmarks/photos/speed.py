"""Time and peak memory of each stage on the benchmark photos, against the networks' bare forward passes.

    python benchmarks/photos/speed.py [FOLDER] [--json FILE]

One warm-up photo, then every photo once, one at a time; reading and decoding the file is a stage and counts.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table

import molt
from molt.profiling import Profile


def measure(folder: Path, weights: str) -> dict[str, Any]:
    """Return the summary and the stages of one run over all photos."""
    loc = molt.Localizer(weights=weights, profile=True)
    photos = sorted(folder.glob("*.webp"))
    loc(photos[:1])
    loc.profile = Profile(loc.device)
    loc(photos)
    return {"weights": weights, **loc.profile.summary(), "stages": loc.profile.rows()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("photos-data"))
    parser.add_argument("--json", type=Path, help="write the numbers here")
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    report = {
        "command": "python benchmarks/photos/speed.py photos-data --json FILE",
        "device": device,
        "versions": {"molt": molt.__version__, "torch": torch.__version__, "timm": timm.__version__}
        | {"python": platform.python_version()},
        "runs": [measure(arguments.folder, weights) for weights in ("default", "weak")],
    }
    table = Table("stage", *(f"{run['weights']}, ms a photo" for run in report["runs"]))
    for stages in zip(*(run["stages"] for run in report["runs"]), strict=True):
        table.add_row(stages[0]["stage"], *(f"{1000 * s['seconds'] / s['calls']:.1f}" for s in stages))
    table.add_row("whole", *(f"{1000 * run['seconds_per_photo']:.1f}" for run in report["runs"]))
    table.add_row("x bare forwards", *(f"{run['total_over_forwards']:.2f}" for run in report["runs"]))
    Console().print(table)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
