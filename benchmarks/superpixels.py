"""Quality of molt's superpixels on photos beside scikit-image's, at the same settings.

    python benchmarks/superpixels.py FOLDER [--cutouts DIR] [--backgrounds DIR] [--json FILE]

FOLDER is what photos/fetch.py wrote. No photo has outlines drawn by hand, so there are two truths. Composites:
cut-outs of photos pasted on photos, whose masks are exact (two regions; the Debian packages of
docs/make_method_pictures.py, downloaded and unpacked if not given). Photos: the regions that another algorithm finds,
Felzenszwalb's graph cuts; that favours neither, but is no truth about objects.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy import ndimage

import molt
from molt import ops
from molt.data.images import read_photo

Labels = NDArray[np.integer]
SIZE, SMALL = 448, 224
# Superpixels wanted, and the longer side at which.
SETTINGS = ((50, SIZE), (100, SIZE), (200, SIZE), (800, SIZE), (10000, SMALL))
COMPACTNESS = 10.0
TOLERANCE = 2
COMPOSITES = 56
DRAWS = 10_000


def borders(labels: Labels) -> NDArray[np.bool_]:
    """(H, W): pixels whose right or lower neighbour has another label."""
    found = np.zeros(labels.shape, bool)
    found[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    found[:-1] |= labels[1:] != labels[:-1]
    return found


def boundary_recall(labels: Labels, truth: Labels, tolerance: int = TOLERANCE) -> float:
    """Share of the truth's border pixels with a superpixel's border pixel at most ``tolerance`` away; 1 without any."""
    wanted = borders(truth)
    near = ndimage.binary_dilation(borders(labels), np.ones((2 * tolerance + 1, 2 * tolerance + 1)))
    return float(near[wanted].mean()) if wanted.any() else 1.0


def _overlap(labels: Labels, truth: Labels) -> NDArray[np.int64]:
    """(superpixels, regions): shared pixels. Both are numbered anew."""
    rows, columns = (np.unique(values, return_inverse=True)[1].ravel() for values in (labels, truth))
    table = np.zeros((rows.max() + 1, columns.max() + 1), np.int64)
    np.add.at(table, (rows, columns), 1)
    return table


def achievable_accuracy(labels: Labels, truth: Labels) -> float:
    """Achievable segmentation accuracy: share of pixels right where each superpixel takes its most frequent region."""
    return float(_overlap(labels, truth).max(1).sum() / labels.size)


def undersegmentation(labels: Labels, truth: Labels) -> float:
    """Undersegmentation error of Neubert and Protzel (2012): the smaller part of what leaks over a region's border."""
    table = _overlap(labels, truth)
    return float(np.minimum(table, table.sum(1, keepdims=True) - table).sum() / labels.size)


METRICS: dict[str, Callable[[Labels, Labels], float]] = {
    "boundary recall": boundary_recall,
    "achievable segmentation accuracy": achievable_accuracy,
    "undersegmentation error": undersegmentation,
}


def ours(image: torch.Tensor, number: int, compactness: float = COMPACTNESS) -> Labels:
    """molt's superpixels (H, W) of an image (3, H, W) in [0, 1]."""
    return ops.slic(image[None], number, compactness).labels[0].numpy()


def theirs(image: torch.Tensor, number: int, compactness: float = COMPACTNESS) -> Labels:
    """scikit-image's, likewise."""
    from skimage.segmentation import slic

    wanted = min(number, image.shape[1] * image.shape[2])
    return slic(np.ascontiguousarray(image.permute(1, 2, 0).numpy()), wanted, compactness, start_label=0)


def composites(cutouts: Path | None, backgrounds: Path | None) -> Iterator[tuple[torch.Tensor, Labels]]:
    """Yield images (3, 448, 448) and their exact masks: classes in turn, on photos only; every choice is seeded."""
    sys.path.append(str(Path(__file__).parents[1] / "docs"))
    import make_method_pictures as method

    with tempfile.TemporaryDirectory() as scratch:
        groups = method.find_cutouts(cutouts or method.unpack(method.STAMPS, Path(scratch, "stamps")))
        grounds = method.find_grounds(backgrounds or method.unpack(method.SCENES, Path(scratch, "scenes")))
        rng = np.random.default_rng(0)
        for i in range(COMPOSITES):
            files = groups[i % len(groups)]
            file = files[int(rng.integers(len(files)))]
            photo = grounds[int(rng.integers(len(grounds)))]
            side = round(min(photo.size) * rng.uniform(0.4, 1))
            x, y = (int(rng.integers(length - side + 1)) for length in photo.size)
            ground = photo.resize((SIZE, SIZE), PIL.Image.Resampling.BICUBIC, (x, y, x + side, y + side))
            seed = int(rng.integers(2**31))
            plain = [PIL.Image.new("RGB", (SIZE, SIZE), colour) for colour in ("black", "white")]
            # The same draws paste the same way, so that black and white ground tell the cut-out's opacity.
            picture, dark, light = (
                method.paste(file, base, np.random.default_rng(seed))[0] for base in (ground, *plain)
            )
            seen = np.asarray(light, np.int64)[..., 0] - np.asarray(dark, np.int64)[..., 0]
            image = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
            yield image, (seen < 128).astype(np.int64)


def photos(folder: Path) -> Iterator[tuple[torch.Tensor, Labels]]:
    """Yield photos (3, H, W) of 448 px and the regions that Felzenszwalb's algorithm finds in them."""
    from skimage.segmentation import felzenszwalb

    for file in sorted(folder.glob("*.webp")):
        image = read_photo(file, SIZE).pixels
        yield image, felzenszwalb(image.permute(1, 2, 0).numpy(), scale=300, sigma=0.8, min_size=200)


def at(image: torch.Tensor, truth: Labels, size: int) -> tuple[torch.Tensor, Labels]:
    """Image and truth with the longer side at ``size``: antialiased, and the nearest pixel's region."""
    if size >= max(image.shape[1:]):
        return image, truth
    small = [max(1, round(side * size / max(image.shape[1:]))) for side in image.shape[1:]]
    resized = F.interpolate(image[None], small, mode="bilinear", antialias=True)[0].clamp(0, 1)
    rows, columns = ((np.arange(n) * 2 + 1) * side // (2 * n) for n, side in zip(small, truth.shape, strict=True))
    return resized, truth[rows[:, None], columns]


def interval(values: NDArray[np.float64]) -> list[float]:
    """95 % bootstrap interval of a mean."""
    draws = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    return [round(float(x), 5) for x in np.quantile(values[draws].mean(1), [0.025, 0.975])]


def evaluate(name: str, pairs: list[tuple[torch.Tensor, Labels]], console: Console) -> list[dict[str, Any]]:
    """Score both on every image and setting; one row a setting and metric."""
    rows = []
    for number, size in SETTINGS:
        scores: dict[str, list[tuple[float, float]]] = {metric: [] for metric in METRICS}
        found: list[tuple[int, int]] = []
        for image, truth in track(pairs, description=f"{name}, {number}", console=console, transient=True):
            small, regions = at(image, truth, size)
            both = [make(small, number) for make in (ours, theirs)]
            found.append((len(np.unique(both[0])), len(np.unique(both[1]))))
            for metric, score in METRICS.items():
                scores[metric].append((score(both[0], regions), score(both[1], regions)))
        for metric, values in scores.items():
            table = np.array(values)
            difference = table[:, 0] - table[:, 1]
            rows.append(
                {
                    "truth": name,
                    "images": len(pairs),
                    "segments": number,
                    "longer_side": size,
                    "metric": metric,
                    "molt": round(float(table[:, 0].mean()), 5),
                    "scikit_image": round(float(table[:, 1].mean()), 5),
                    "difference": round(float(difference.mean()), 5),
                    "interval_95": interval(difference),
                    "found_molt": round(float(np.mean([mine for mine, _ in found])), 1),
                    "found_scikit_image": round(float(np.mean([other for _, other in found])), 1),
                }
            )
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the table."""
    table = Table("truth", "wanted", "found", "metric", "molt", "scikit-image", "difference", "95 %")
    for row in rows:
        low, high = row["interval_95"]
        table.add_row(
            f"{row['images']} {row['truth']}",
            f"{row['segments']} at {row['longer_side']} px",
            f"{row['found_molt']:.0f} / {row['found_scikit_image']:.0f}",
            row["metric"],
            f"{row['molt']:.4f}",
            f"{row['scikit_image']:.4f}",
            f"{row['difference']:+.4f}",
            f"{low:+.4f} to {high:+.4f}",
        )
    console.print(table)


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what photos/fetch.py wrote")
    parser.add_argument("--cutouts", type=Path, help="folder of cut-outs; downloaded if not given")
    parser.add_argument("--backgrounds", type=Path, help="folder of backgrounds; downloaded likewise")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here, too")
    arguments = parser.parse_args()
    if not any(arguments.folder.glob("*.webp")):
        parser.error(f"{arguments.folder} holds no .webp: benchmarks/photos/fetch.py fills it")
    console = Console()
    rows = evaluate("composites", list(composites(arguments.cutouts, arguments.backgrounds)), console)
    rows += evaluate("photos", list(photos(arguments.folder)), console)
    show(rows, console)
    if arguments.json is not None:
        import skimage

        report = {
            "command": "python benchmarks/superpixels.py photos-data --json FILE",
            "truths": {
                "composites": "cut-outs of photos pasted on photos: exact masks, two regions",
                "photos": "regions of skimage.segmentation.felzenszwalb(scale=300, sigma=0.8, min_size=200) at 448 px",
            },
            "settings": {"compactness": COMPACTNESS, "tolerance_px": TOLERANCE, "bootstrap_draws": DRAWS},
            "versions": {
                "molt": molt.__version__,
                "torch": torch.__version__,
                "scikit-image": skimage.__version__,
                "python": platform.python_version(),
            },
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
