"""Time an evaluation as large as CUB's test set: MaxBoxAcc, MaxBoxAccV2 and PxAP of 5,794 maps of 224 x 224.

    python benchmarks/evaluation_speed.py [--maps 5794] [--json FILE]
    python benchmarks/evaluation_speed.py --peers [--photos 64] [--repeats 30] [--json FILE]

Maps are bicubic noise of 14 x 14, boxes and masks made up: what is timed does not depend on what they show. Each number
of maps runs in a process of its own, a tenth of them first, so that its peak memory can be compared.

With --peers TopKLoc at a fixed threshold and PxAP run beside the same on the calls of the published code, photo by
photo: TS-CAM's lib/cams_deit.py (threshold, findContours, contourArea and boundingRect of OpenCV for the five
likeliest classes and the label's, IoU box by box) and wsolevaluation's evaluation.py (two histograms of NumPy a photo).
Both sides get the same finished maps of 224 x 224 on one thread and must give the same figures; of each batch the least
of the repeats counts, taken in turns. molt's side includes the sums of its 1000 resamples (PxAP: 200) for intervals,
which the published code lacks; what it takes once, at the end, is a column of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from molt.benchmark.machine import about
from molt.evaluation import MaxBoxAcc, PxAP, TopKLoc

BATCH, SIDE, CELLS = 64, 224, 14
PEERS_BATCH = 16
EDGES = np.append(np.arange(0, 1, 0.001), [1.0, 2.0, 3.0])


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


def published_box(cam: np.ndarray, threshold: float) -> list[int]:
    """Return the box of the largest contour, by TS-CAM's calls."""
    cam = (cam * 255.0).astype(np.uint8)
    kept = cv2.threshold(cam, int(threshold * np.max(cam)), 255, cv2.THRESH_TOZERO)[1]
    contours = cv2.findContours(kept, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    if not contours:
        return [0, 0, 1, 1]
    x, y, w, h = cv2.boundingRect(max(contours, key=cv2.contourArea))
    return [x, y, x + w, y + h]


def published_shares(box: Any, truth: Any) -> tuple[float, float, float]:
    """Return IoU and the shares of both boxes, in NumPy as TS-CAM takes them, a pair at a time."""
    a, b = np.asarray(box, dtype=float)[None], np.asarray(truth, dtype=float)[None]
    width = np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0]) + 1
    height = np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1]) + 1
    both = np.maximum(width, 0.0) * np.maximum(height, 0.0)
    one, other = ((c[:, 2] - c[:, 0] + 1) * (c[:, 3] - c[:, 1] + 1) for c in (a, b))
    return (both / (one + other - both))[0], (both / other)[0], (both / one)[0]


def published_loc(
    cams: np.ndarray, known: np.ndarray, ranked: list[int], label: int, boxes: list, threshold: float
) -> list[bool]:
    """Return one photo's Top-1, Top-5 and GT-known Loc, by TS-CAM's calls."""
    found = [published_box(cam, threshold) for cam in cams]
    hits = []
    for k in (1, 5):
        hit = False
        for index, box in zip(ranked[:k], found[:k], strict=True):
            ious = [published_shares(box, truth)[0] for truth in boxes]
            if k == 1 and index == label and max(ious) <= 0.5:  # what is wrong with it
                published_shares(box, boxes[int(np.argmax(ious))])
            if index == label and max(ious) > 0.5:
                hit = True
                break
        hits.append(hit)
    box = published_box(known, threshold)
    return [*hits, max(published_shares(box, truth)[0] for truth in boxes) >= 0.5]


def published_counts(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Return the scores on objects and on ground in bins, by wsolevaluation's calls."""
    counts = np.zeros((2, len(EDGES) - 1))
    for scores, mask in zip(maps, masks, strict=True):
        if np.isnan(scores).any() or (scores > 1).any() or (scores < 0).any():
            raise ValueError("scores: expected all in [0, 1]")
        counts[0] += np.histogram(scores[mask == 1], bins=EDGES)[0]
        counts[1] += np.histogram(scores[mask == 0], bins=EDGES)[0]
    return counts


def published_pxap(counts: np.ndarray) -> float:
    """Return PxAP in percent, by wsolevaluation's calls."""
    hits, others = counts[:, ::-1].cumsum(1)
    precision = np.divide(hits, hits + others, out=np.zeros_like(hits), where=hits + others > 0)
    return float((precision[1:] * np.diff(hits / hits[-1])).sum() * 100)


def least(call: Callable[[], object], repeats: int, *others: Callable[[], object]) -> list[float]:
    """Return the least seconds of some calls, made in turns."""
    calls = (call, *others)
    seconds = [float("inf")] * len(calls)
    for _ in range(repeats):
        for index, one in enumerate(calls):
            begin = time.perf_counter()
            one()
            seconds[index] = min(seconds[index], time.perf_counter() - begin)
    return seconds


def peers(photos: int, repeats: int) -> list[dict[str, Any]]:
    """Time both sides of each metric on the same maps, batch by batch, and compare their figures."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    generator = torch.Generator().manual_seed(0)
    boxes = make(photos, generator)[1]
    maps = torch.stack([make(photos, generator)[0] for _ in range(5)], 1).float()
    places = torch.arange(photos) % 6  # the label's place among the likeliest classes; 5 is none of them
    named = maps[torch.arange(photos), places.clamp(max=4)]
    known = torch.where((places < 5)[:, None, None], named, maps[:, 4].flip(1))
    wide, masks = known.double(), known > 0.6
    ranked, threshold = torch.arange(5).expand(photos, 5), 0.5
    right: list[list[bool]] = []
    counts = np.zeros((2, len(EDGES) - 1))

    def their_loc(part: slice) -> list[list[bool]]:
        each = (maps[part].numpy(), known[part].numpy(), ranked[part].tolist(), places[part].tolist(), boxes[part])
        return [published_loc(*photo, threshold) for photo in zip(*each, strict=True)]

    scores, truths = wide.numpy(), masks.numpy().astype(np.uint8)
    loc, pixels = TopKLoc(threshold), PxAP()
    timed = TopKLoc(threshold), PxAP()
    took = np.zeros(4)
    for start in range(0, photos, PEERS_BATCH):
        part = slice(start, start + PEERS_BATCH)
        given = (maps[part], ranked[part], places[part], boxes[part], known[part])
        took += [
            *least(lambda: timed[0].update(*given), repeats, lambda: their_loc(part)),  # noqa: B023  called at once
            *least(
                lambda: timed[1].update(wide[part], masks[part]),  # noqa: B023
                repeats,
                lambda: published_counts(scores[part], truths[part]),  # noqa: B023
            ),
        ]
        loc.update(*given)
        pixels.update(wide[part], masks[part])
        right += their_loc(part)
        counts += published_counts(scores[part], truths[part])
    found = loc.compute()
    mine = [[found[name] for name in ("top1_loc", "top5_loc", "gt_known_loc")], [pixels.compute()["score"]]]
    theirs = [(np.mean(right, 0) * 100).tolist(), [published_pxap(counts)]]
    rows = []
    for index, (name, metric) in enumerate((("TopKLoc, fixed threshold", loc), ("PxAP", pixels))):
        ours, other = (1000 * took[2 * index : 2 * index + 2] / photos).tolist()
        (end,) = least(type(metric).compute.__get__(metric), repeats)
        off = max(abs(a - b) for a, b in zip(mine[index], theirs[index], strict=True))
        times = {"molt_ms": ours, "published_ms": other, "times": other / ours, "molt_at_the_end_ms": 1000 * end}
        rows.append({"metric": name} | times | {"off": off})
    return rows


def show_peers(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print how long each side takes; a figure that differs is an error."""
    heads = ("molt, ms a photo", "published calls", "times", "molt's compute, ms once", "figures differ by")
    table = Table("metric", *heads)
    for row in rows:
        keys = ("molt_ms", "published_ms", "times", "molt_at_the_end_ms", "off")
        table.add_row(row["metric"], *(f"{row[key]:.3g}" for key in keys))
    Console(width=110).print(table)
    if max(row["off"] for row in rows) > 1e-9:
        raise SystemExit("the two sides differ")


def main() -> None:
    """Run a tenth, then all; or the peers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=5794)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--peers", action="store_true", help="beside the calls of the published code")
    parser.add_argument("--photos", type=int, default=64, help="of --peers")
    parser.add_argument("--repeats", type=int, default=30, help="of --peers")
    options = parser.parse_args()
    if options.peers:
        with threadpool_limits(1):
            found = peers(options.photos, options.repeats)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(about("cpu", 1) | {"rows": found}, indent=1) + "\n")
        show_peers(found)
        return
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
