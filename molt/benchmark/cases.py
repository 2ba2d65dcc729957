"""Inputs from a seed, and the cases they make up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molt.benchmark.registry import Case, Device, Inputs

SIDE = 224
SIZE = (SIDE, SIDE)
SCALES = (14, 21, 28)
ALPHA = 0.5
THRESHOLD = 0.5
SEGMENTS = (SIDE // 8) ** 2
STEPS = 20
MEDIUM = 512
MANY_MAPS = 2048
LARGE = 5400  # maps of 224 x 224 float32: 1.01 GiB


def short(dtype: torch.dtype) -> str:
    """Return ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def cases(describe: Callable[[Case], str], rows: Iterable[dict[str, Any]]) -> tuple[Case, ...]:
    """Build cases from keyword rows; keys that `Case` has no field for become its options."""
    fields = {"device", "images", "dtype", "headline", "backward", "targets"}
    built = []
    for row in rows:
        kept = {key: value for key, value in row.items() if key in fields}
        options = {key: value for key, value in row.items() if key not in fields}
        case = Case(name="", options=options, **kept)
        name = f"{describe(case)}{', forward + backward' if case.backward else ''}"
        built.append(Case(name=name, options=options, **kept))
    return tuple(built)


def sizes(
    *,
    backward: bool = False,
    half: bool = True,
    headline: int | None = None,
    targets: Mapping[int, Mapping[str, float]] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """The sizes that every map operator is measured at: 8, 32 and 64 images on the CPU; small to 1 GiB on a GPU.

    `headline` is the number of images of the GPU's headline case, by default the largest; `targets` are the GPU's, by
    number of images.
    """
    headline, asked = LARGE if headline is None else headline, targets or {}
    cpu: list[dict[str, Any]] = [{"images": n, "headline": n == 32} for n in (8, 32, 64)]
    cuda: list[dict[str, Any]] = [
        {"images": n, "headline": n == headline, "targets": asked.get(n, {})} for n in (LARGE, MEDIUM, 8)
    ]
    if half:
        cuda.append({"images": 2 * LARGE, "dtype": torch.float16})
    if backward:
        cpu.append({"images": 32, "backward": True})
        cuda.append({"images": MEDIUM, "backward": True})
    return on("cpu", cpu, **options) + on("cuda", cuda, **options)


def on(device: Device, rows: Iterable[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """Put rows on a device, with options that a row of its own can override."""
    return [{"device": device, **options, **row} for row in rows]


def both(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows on the CPU at 32 images and on a GPU at the medium size."""
    rows = list(rows)
    return on("cpu", rows, images=32) + on("cuda", rows, images=MEDIUM)


def rand(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in [0, 1)."""
    return torch.rand(shape, generator=generator, device=generator.device).to(dtype)


def label_map(
    generator: torch.Generator, images: int, number: int, dtype: torch.dtype, kind: str, step: int = 8
) -> Tensor:
    """Labels (images, 224, 224) below ``number``: in blocks, as clusters of photos come, or at random, the worst."""
    step = step if kind == "blocks" else 1
    shape = (images, SIDE // step, SIDE // step)
    labels = torch.randint(number, shape, generator=generator, device=generator.device, dtype=dtype)
    return labels.repeat_interleave(step, 1).repeat_interleave(step, 2)


def small_maps(case: Case, generator: torch.Generator) -> list[Tensor]:
    """One (images, C, s, s) map a scale, of both signs, as networks give them."""
    channels = case.options.get("channels", 1)
    return [rand(generator, case.images, channels, s, s, dtype=case.dtype) * 4 - 1 for s in case.options["scales"]]


def make_upsample_normalize(case: Case, generator: torch.Generator) -> Inputs:
    """Return maps and size."""
    return Inputs((small_maps(case, generator)[0], SIZE))


def make_fuse_maps(case: Case, generator: torch.Generator) -> Inputs:
    """Return maps of three scales, size and weights."""
    return Inputs((small_maps(case, generator), SIZE, (0.2, 0.3, 0.5)))


def _labels(case: Case, generator: torch.Generator) -> Tensor:
    options = case.options
    return label_map(generator, case.images, options["k"], options["labels"], options["kind"])


def _maps(case: Case, generator: torch.Generator) -> Tensor:
    return rand(generator, case.images, case.options.get("channels", 1), SIDE, SIDE, dtype=case.dtype)


def make_cluster_mean(case: Case, generator: torch.Generator) -> Inputs:
    """Return values, labels and their number."""
    return Inputs((_maps(case, generator), _labels(case, generator), case.options["k"]))


def make_cluster_refine(case: Case, generator: torch.Generator) -> Inputs:
    """Return maps, labels, alpha and the number of clusters."""
    return Inputs((_maps(case, generator), _labels(case, generator), ALPHA, case.options["k"]))


def make_fuse_and_refine(case: Case, generator: torch.Generator) -> Inputs:
    """Return maps of three scales, labels, alpha, the number of clusters and weights."""
    maps, labels = small_maps(case, generator), _labels(case, generator)
    return Inputs((maps, labels, ALPHA, case.options["k"], (0.2, 0.3, 0.5)))


def make_cluster_vote(case: Case, generator: torch.Generator) -> Inputs:
    """Return labels in small blocks, segments as a grid of squares or at random, and the number of each."""
    labels = label_map(generator, case.images, case.options["k"], case.options["labels"], "blocks", 2)
    if case.options["kind"] == "random":
        segments = label_map(generator, case.images, SEGMENTS, torch.int32, "random")
    else:
        row = torch.arange(SIDE, device=generator.device, dtype=torch.int32) // 8
        segments = (row[:, None] * (SIDE // 8) + row).expand(case.images, -1, -1).contiguous()
    return Inputs((labels, segments, case.options["k"], SEGMENTS))


def make_boxes(case: Case, generator: torch.Generator) -> Inputs:
    """Return maps, smooth as heat maps are or of noise, and the threshold."""
    if case.options["kind"] == "noise":
        maps = _maps(case, generator)
    else:
        seeds = rand(generator, case.images, 1, 14, 14)
        maps = F.interpolate(seeds, SIZE, mode="bilinear", align_corners=False).to(case.dtype)
    extra = {"largest": case.options["largest"]} if "largest" in case.options else {}
    return Inputs((maps, THRESHOLD), {"connectivity": 8, **extra})


def make_sweep(case: Case, generator: torch.Generator) -> Inputs:
    """Return 8-bit levels, smooth as heat maps are or of noise, each map from 0 to 255."""
    if case.options["kind"] == "noise":
        maps = _maps(case, generator)
    else:
        maps = F.interpolate(rand(generator, case.images, 1, 14, 14), SIZE, mode="bicubic", align_corners=False)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    levels = ((maps - low) / (high - low) * 255).to(torch.uint8)
    return Inputs((levels,), {"contours": case.options["contours"], "connectivity": 8})


def make_kmeans(case: Case, generator: torch.Generator) -> Inputs:
    """Return unit vectors of low rank, as tokens are, with noise; k of them are the start."""
    images, number, dim, k = case.images, case.options["n"], case.options["d"], case.options["k"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    spread = torch.linspace(2, 0.5, 8, device=generator.device)
    features = (normal(images, number, 8) * spread) @ normal(images, 8, dim)
    features = F.normalize(features + 0.5 * normal(images, number, dim), dim=-1).to(case.dtype)
    pick = torch.linspace(0, number - 1, k).long()
    start = features[:, pick].contiguous()
    return Inputs((features, k), {"metric": case.options["metric"], "iterations": STEPS, "centres": start})


def make_slic(case: Case, generator: torch.Generator) -> Inputs:
    """Return images as photos are, smooth over several scales with edges and a little noise; and the number wanted."""
    side = case.options["side"]

    def field(cells: int, channels: int) -> Tensor:
        seeds = rand(generator, case.images, channels, cells, cells)
        return F.interpolate(seeds, (side, side), mode="bicubic", align_corners=False)

    shades = 0.5 * field(4, 3) + 0.2 * field(16, 3) + 0.1 * field(48, 3)
    edges = (field(6, 3) > 0.5).float().mean(1, keepdim=True) * 0.2
    noise = 0.02 * torch.randn(shades.shape, generator=generator, device=generator.device)
    images = (shades + edges + noise).clamp(0, 1).to(case.dtype)
    return Inputs((images, case.options["segments"], case.options["compactness"]))


def name_slic(case: Case) -> str:
    """Describe a case of images to cut into superpixels."""
    side = case.options["side"]
    return f"{case.images} images, {side} x {side}, {case.options['segments']} segments, {short(case.dtype)}"


def name_maps(case: Case) -> str:
    """Describe a case of maps that grow."""
    scales = "+".join(map(str, case.options["scales"]))
    return f"{case.images} images, {scales} -> {SIDE}, {short(case.dtype)}"


def name_clusters(case: Case) -> str:
    """Describe a case of maps and labels."""
    channels = case.options.get("channels", 1)
    maps = f"{case.images} x {channels}" if channels != 1 else f"{case.images}"
    labels = f"{case.options['k']} {case.options['kind']} {short(case.options['labels'])}"
    return f"{maps} images, {short(case.dtype)}, clusters {labels}"


def name_vote(case: Case) -> str:
    """Describe a case of labels and segments."""
    kind = "random" if case.options["kind"] == "random" else "square"
    labels = short(case.options["labels"])
    return f"{case.images} images, {case.options['k']} clusters {labels}, {SEGMENTS} {kind} segments"


def name_boxes(case: Case) -> str:
    """Describe a case of maps to box."""
    which = {None: "", True: ", largest", False: ", all"}[case.options.get("largest")]
    return f"{case.images} images, {case.options['kind']}, {short(case.dtype)}{which}"


def name_sweep(case: Case) -> str:
    """Describe a case of levels to box at every cut."""
    return f"{case.images} images, {case.options['kind']}, {'contours' if case.options['contours'] else 'pixels'}"


def name_kmeans(case: Case) -> str:
    """Describe a case of features."""
    options = case.options
    return (
        f"{case.images} x {options['n']} x {options['d']}, k {options['k']}, {options['metric']}, {short(case.dtype)}"
    )
