"""Time the published clustering loop: seconds a step, and what a full run would take, extrapolated.

python benchmarks/published_speed.py --steps 20
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from molt.benchmark import published


def _sample(size: int, random: bool, seed: int) -> published.Floats:
    """A (size, size, 3) float32 photo in [0, 1]: scikit-image's astronaut, or noise."""
    if random:
        return np.random.default_rng(seed).random((size, size, 3), dtype=np.float32)
    from skimage import data, transform

    photo = transform.resize(data.astronaut(), (size, size), anti_aliasing=True)
    return np.asarray(photo, dtype=np.float32)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time the published clustering loop, and say what a full run would take.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=20, help="steps to time, 2 or more; the first is not counted")
    parser.add_argument("--size", type=int, default=224, help="height and width of the photo")
    parser.add_argument("--channels", type=int, default=100, help="channels of the network")
    parser.add_argument("--layers", type=int, default=2, help="3 x 3 convolutions")
    parser.add_argument("--segments", type=int, default=10000, help="superpixels asked for; 0 for no vote")
    parser.add_argument("--compactness", type=float, default=100.0, help="of the superpixels")
    parser.add_argument("--continuity", type=float, default=0.0, help="weight of the continuity loss")
    parser.add_argument("--full", type=int, default=1000, help="steps to extrapolate to")
    parser.add_argument("--random", action="store_true", help="noise in place of the sample photo")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and of the noise")
    parser.add_argument("--threads", type=int, default=None, help="PyTorch threads; its own choice if not given")
    parser.add_argument("--device", default="cpu", help="where the network runs; the vote is always on the CPU")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the numbers here, too")
    args = parser.parse_args()
    for name, least in {"steps": 2, "size": 2, "channels": 1, "layers": 0, "segments": 0, "full": 1}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} must be {least} or more")
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"no folder {args.json.parent} for --json")
    return args


def main() -> None:
    """Time the clustering loop on one photo; print seconds a step and what a full run would take, extrapolated."""
    from rich.console import Console
    from rich.table import Table

    args = _arguments()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    console = Console()
    image = _sample(args.size, args.random, args.seed)

    start = time.perf_counter()
    segments = published.superpixels(image, args.segments, args.compactness) if args.segments else None
    slic_seconds = time.perf_counter() - start
    start = time.perf_counter()
    members = None if segments is None else published.superpixel_members(segments)
    members_seconds = time.perf_counter() - start

    state = [tensor.to(args.device) for tensor in published.initial_state(args.channels, args.layers, args.seed)]
    ticks: list[float] = []
    last = np.zeros((args.size, args.size), dtype=np.int64)

    with console.status("clustering") as status:

        def tick(step: int, labels: published.Labels) -> None:
            ticks.append(time.perf_counter())
            last[:] = labels
            status.update(f"clustering: step {step + 1} of {args.steps}")

        # No photo has 0 labels, so no early stop.
        clusters = published.deep_cluster(
            image, state, args.channels, args.layers, args.steps, 0, segments, args.continuity, tick
        )
    # From one step's labels to the next one's: a whole step each, without the warm-up before the first.
    durations = [after - before for before, after in itertools.pairwise(ticks)]
    vote_seconds = 0.0
    if segments is not None:
        start = time.perf_counter()
        published.superpixel_vote(last, segments, members)
        vote_seconds = time.perf_counter() - start

    median = statistics.median(durations)
    count = 0 if members is None else len(members)
    extrapolated = slic_seconds + members_seconds + args.full * median
    record = {
        "photo": "noise" if args.random else "astronaut",
        "size": args.size,
        "channels": args.channels,
        "layers": args.layers,
        "segments_asked": args.segments,
        "segments": count,
        "compactness": args.compactness,
        "continuity": args.continuity,
        "seed": args.seed,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "steps_run": clusters.steps,
        "steps_timed": len(durations),
        "clusters_at_end": len(np.unique(clusters.labels)),
        "slic_seconds": slic_seconds,
        "members_seconds": members_seconds,
        "vote_seconds": vote_seconds,
        "step_seconds": {
            "median": median,
            "mean": statistics.fmean(durations),
            "min": min(durations),
            "max": max(durations),
        },
        "extrapolated": {"measured": False, "steps": args.full, "seconds": extrapolated},
    }

    table = Table(title=f"Published clustering loop, {args.size} x {args.size}, {args.channels} channels")
    table.add_column("what")
    table.add_column("seconds", justify="right")
    table.add_row(f"superpixels, once ({count} of {args.segments} asked for)", f"{slic_seconds:.3f}")
    table.add_row("pixel lists of the superpixels, once", f"{members_seconds:.3f}")
    table.add_row(f"a step, median of {len(durations)}", f"{median:.4f}")
    table.add_row("a step, fastest to slowest", f"{min(durations):.4f} to {max(durations):.4f}")
    table.add_row("of it the vote, timed once", f"{vote_seconds:.4f}")
    table.add_row(f"{args.full} steps, EXTRAPOLATED", f"{extrapolated:.1f}")
    console.print(table)
    console.print(
        f"The last line was not measured: it is {args.full} times the median step and what is done once. "
        f"A run that reaches its least number of labels stops before that. "
        f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}."
    )
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=2) + "\n")
        console.print(f"Wrote {args.json}")


if __name__ == "__main__":
    main()
