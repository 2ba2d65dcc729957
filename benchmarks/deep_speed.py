"""Time deep clustering: the published loop beside molt's forms of a training step, the presets, and superpixels.

    python benchmarks/deep_speed.py [--steps 20] [--device cpu] [--json FILE]

Steps are timed in turns, form after form, round after round; medians. What a full run takes is extrapolated from them,
and says so. The photo is scikit-image's cat, or made from a seed where that is not installed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import molt
from molt import ops
from molt._files import whole_file
from molt.benchmark import photos, published
from molt.clustering import DeepClustering, fit
from molt.clustering._network import Fused, Grouped
from molt.clustering._training import step
from molt.clustering.deep import random_state

# (side, channels, superpixels): the published size at 224 px, and the smaller one of `fast`.
SIZES = ((224, 100, 10000), (112, 32, 800))
LAYERS, COMPACTNESS, BATCH = 2, 100.0, 8
FULL_STEPS = 1000


def sample(side: int) -> Tensor:
    """(1, 3, side, side) in [0, 1]."""
    return photos.load(None, (side, side)).images[:1]


def literal(image: Tensor, segments: Tensor, state: list[Tensor], steps: int, vote: published.Vote) -> list[float]:
    """Return the seconds of each step of the published loop, from one step's labels to the next one's."""
    array = image[0].permute(1, 2, 0).contiguous().cpu().numpy()
    ticks: list[float] = []
    published.deep_cluster(
        array,
        state,
        len(state[1]),
        LAYERS,
        steps + 1,
        0,
        segments[0].cpu().numpy(),
        0.0,
        lambda number, labels: ticks.append(time.perf_counter()),
        vote=vote,
    )
    return [after - before for before, after in itertools.pairwise(ticks)]


def ours(network: Grouped | Fused, segments: Tensor, steps: int) -> list[float]:
    """Return the seconds of each step of molt's networks, a photo."""
    number = len(network.parameters[-1]) // network.responses.shape[1] if isinstance(network, Grouped) else 1
    active = torch.ones(number, dtype=torch.bool, device=segments.device)
    limit = int(segments.max()) + 1
    seconds = []
    with torch.no_grad():
        for _ in range(steps):
            start = time.perf_counter()
            network.respond()
            step(network, segments, limit, active, 0)
            if segments.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append((time.perf_counter() - start) / number)
    return seconds


def grouped(image: Tensor, segments: Tensor, state: list[Tensor], steps: int, **how: Any) -> list[float]:
    """Return the seconds of each step and photo of some copies of a photo at once."""
    copies = how.pop("copies")
    network = Grouped(image.expand(copies, -1, -1, -1), [state], 0.0, **how)
    with torch.no_grad():
        network.respond()
    return ours(network, segments.expand(copies, -1, -1).contiguous(), steps)


def fused(image: Tensor, segments: Tensor, state: list[Tensor], steps: int) -> list[float]:
    return ours(Fused(image, state, 0.0), segments, steps)


def forms(device: str) -> dict[str, Callable[..., list[float]]]:
    """Return every way to take a step, called with image, segments, state and steps."""
    found: dict[str, Callable[..., list[float]]] = {
        f"published loop, {vote} vote": partial(literal, vote=vote) for vote in published.VOTES
    }
    if device == "cpu":
        found["molt, fused"] = fused
    for copies in (1, BATCH):
        for form in ("grouped", "products"):
            found[f"molt, {form}, {copies} at once"] = partial(grouped, copies=copies, form=form)
    found["molt, grouped, 1 at once, bfloat16"] = partial(grouped, copies=1, dtype=torch.bfloat16)
    return found


def time_steps(
    device: str, sizes: Sequence[tuple[int, int, int]], steps: int, rounds: int, progress: Progress
) -> list[dict[str, Any]]:
    """Return a row a size and form."""
    rows = []
    for side, channels, wanted in sizes:
        image = sample(side).to(device)
        segments = ops.slic(image, wanted, COMPACTNESS).labels
        state = [value.to(device) for value in random_state(channels, LAYERS, torch.Generator().manual_seed(0), 3)]
        seconds: dict[str, list[float]] = defaultdict(list)
        task = progress.add_task(f"{side} px, {channels} channels", total=rounds * len(forms(device)))
        for _ in range(rounds):
            for name, run in forms(device).items():
                # The first step of a run meets cold caches.
                seconds[name] += run(image, segments, state, steps=steps // rounds + 1)[1:]
                progress.advance(task)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name, values in seconds.items():
            row = {
                "side": side,
                "channels": channels,
                "superpixels": int(segments.max()) + 1,
                "form": name,
                "steps_timed": len(values),
                "step_ms": round(1000 * medians[name], 2),
                "fastest_ms": round(1000 * min(values), 2),
                "full_run_s": {"extrapolated": True, "steps": FULL_STEPS, "seconds": FULL_STEPS * medians[name]},
            }
            for vote in published.VOTES:
                loop = medians[f"published loop, {vote} vote"]
                row[f"times_faster_than_{vote}_vote"] = round(loop / medians[name], 2)
            rows.append(row)
    return rows


def time_presets(device: str, rounds: int) -> list[dict[str, Any]]:
    """Return the seconds a photo of 224 px of whole clusterers that take less than a minute, and of superpixels."""
    try:
        from skimage.segmentation import slic
    except ImportError:
        slic = None
    image = sample(224).to(device)
    array = image[0].permute(1, 2, 0).contiguous().cpu().numpy()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clusters.safetensors")
        fit([array], path, steps=2, batch_size=1)
        runs: dict[str, Callable[[], Any]] = {
            "fast": partial(DeepClustering(), image),
            "fast, one network, 20 steps": partial(DeepClustering(steps=20, starts=1, merged=0), image),
            "amortised": partial(DeepClustering("amortised", checkpoint=path), image),
        }
        for number in (100, 800, 10000):
            runs[f"ops.slic, {number}"] = partial(ops.slic, image, number)
            if slic is not None:
                runs[f"scikit-image slic, {number}"] = partial(slic, array, number, start_label=0)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                if device != "cpu":
                    torch.cuda.synchronize()
                if number:
                    seconds[name].append(time.perf_counter() - start)
    return [{"name": name, "ms": round(1000 * statistics.median(values), 2)} for name, values in seconds.items()]


def _size(text: str) -> tuple[int, int, int]:
    side, channels, segments = map(int, text.split(","))
    return side, channels, segments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="of each form, in all; at least 4")
    parser.add_argument("--rounds", type=int, default=4, help="turns that the steps are spread over")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--size", type=_size, action="append", metavar="SIDE,CHANNELS,SUPERPIXELS", help="in place of the usual two"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too; - prints them")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    if arguments.steps < 4 or arguments.rounds < 1:
        parser.error("--steps must be at least 4 and --rounds at least 1")
    console = Console()
    with Progress(console=console, transient=True) as progress:
        rows = time_steps(arguments.device, arguments.size or SIZES, arguments.steps, arguments.rounds, progress)
    presets = time_presets(arguments.device, max(3, arguments.steps // 2))
    report = {
        "command": "python benchmarks/deep_speed.py --json FILE",
        "device": arguments.device
        if arguments.device == "cpu"
        else torch.cuda.get_device_name(torch.device(arguments.device)),
        "threads": torch.get_num_threads(),
        "photo": photos.load(None, (32, 32)).source,
        "versions": {"molt": molt.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "steps": rows,
        "photos_224_px": presets,
    }
    table = Table(
        "size", "form", "ms a step and photo", "x NumPy vote", "x bincount vote", f"{FULL_STEPS} steps, extrapolated"
    )
    for row in rows:
        numbers = (row["step_ms"], row["times_faster_than_numpy_vote"], row["times_faster_than_bincount_vote"])
        size = f"{row['side']} px, {row['channels']} channels"
        table.add_row(size, row["form"], *map(str, numbers), f"{row['full_run_s']['seconds']:.0f} s")
    console.print(table)
    console.print(f"Runs of {FULL_STEPS} steps were not made: they are extrapolated from the median step.")
    table = Table("a photo of 224 px", "ms")
    for row in presets:
        table.add_row(row["name"], str(row["ms"]))
    console.print(table)
    if arguments.json == Path("-"):
        print(json.dumps(report))
    elif arguments.json is not None:
        with whole_file(arguments.json) as part:
            part.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
