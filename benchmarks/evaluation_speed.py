"""Time an evaluation as large as CUB's test set: MaxBoxAcc, MaxBoxAccV2 and PxAP of 5,794 maps of 224 x 224.

    python benchmarks/evaluation_speed.py [--maps 5794] [--json FILE]

Maps are bicubic noise of 14 x 14, boxes and masks made up: what is timed does not depend on what they show. Each number
of maps runs in a process of its own, a tenth of them first, so that its peak memory can be compared.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from molt.benchmark.machine import about
from molt.evaluation import MaxBoxAcc, PxAP

BATCH, SIDE, CELLS = 64, 224, 14


def make(count: int, generator: torch.Generator) -> tuple[torch.Tensor, list[list[list[float]]]]:
    """Return (count, 224, 224) float64 maps in [0, 1] and a box each."""
    maps = F.interpolate(torch.rand(count, 1, CELLS, CELLS, generator=generator), (SIDE, SIDE), mode="bicubic")[:, 0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    corner = torch.randint(0, 100, (count, 2), generator=generator)
    size = torch.randint(30, 120, (count, 2), generator=generator)
    return ((maps - low) / (high - low)).double(), torch.cat([corner, corner + size], 1)[:, None].tolist()


def run(count: int) -> dict[str, Any]:
    """Evaluate that many maps; return seconds by metric, peak memory and scores."""
    generator = torch.Generator().manual_seed(0)
    metrics = {"MaxBoxAcc": MaxBoxAcc("v1"), "MaxBoxAccV2": MaxBoxAcc("v2"), "PxAP": PxAP()}
    seconds = dict.fromkeys(metrics, 0.0)
    for start in range(0, count, BATCH):
        maps, boxes = make(min(BATCH, count - start), generator)
        masks = maps > 0.6
        for name, metric in metrics.items():
            begin = time.perf_counter()
            metric.update(maps, masks if name == "PxAP" else boxes)
            seconds[name] += time.perf_counter() - begin
    scores = {}
    for name, metric in metrics.items():
        begin = time.perf_counter()
        scores[name] = metric.compute()["score"]
        seconds[name] += time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"maps": count, "seconds": seconds, "total": sum(seconds.values()), "peak_MiB": peak, "scores": scores}


def main() -> None:
    """Run a tenth, then all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=5794)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(run(options.one)))
        return
    rows = []
    for count in (max(1, options.maps // 10), options.maps):
        command = [sys.executable, __file__, "--one", str(count)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    table = Table("maps", *rows[0]["seconds"], "all, s", "peak MiB")
    for row in rows:
        table.add_row(
            str(row["maps"]),
            *(f"{value:.2f}" for value in row["seconds"].values()),
            f"{row['total']:.1f}",
            f"{row['peak_MiB']:.0f}",
        )
    Console().print(table)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(about("cpu", 1) | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
