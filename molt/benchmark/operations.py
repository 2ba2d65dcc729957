"""The registry: every public operator, with its cases and providers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from molt.benchmark import cases as c
from molt.benchmark import gate
from molt.benchmark.peers_clusters import mean_providers, refine_providers, vote_providers
from molt.benchmark.peers_maps import (
    box_providers,
    fuse_and_refine_providers,
    fuse_providers,
    kmeans_providers,
    resize_providers,
    slic_providers,
)
from molt.benchmark.peers_sweep import sweep_providers
from molt.benchmark.registry import Inputs, Operation, operator, own

# Maps in [0, 1]: a few float32 roundings, half a float16 step.
PIXELS = {torch.float32: 5e-6, torch.float16: 1e-3}
# A running float32 sum of n values errs by about sqrt(n) roundings, 100 for 224 x 224 / 5 pixels.
MEANS = {torch.float32: 1e-5, torch.float16: 1e-3}
EXACT = {torch.float32: 0.0, torch.float16: 0.0}
BOXES = {torch.float32: 1e-5, torch.float16: 1e-5}
# Of the squared distance.
CLUSTERS = {torch.float32: 1e-5, torch.float16: 1e-3}
# Of the images' variance.
SUPERPIXELS = {torch.float32: 0.02, torch.float16: 0.02}

REFINE: list[dict[str, Any]] = [
    {"k": 5, "labels": torch.int32, "kind": "blocks"},
    {"k": 32, "labels": torch.uint8, "kind": "blocks"},
    {"k": 100, "labels": torch.uint8, "kind": "blocks"},
    {"k": 100, "labels": torch.int32, "kind": "random"},
    {"k": 256, "labels": torch.uint8, "kind": "random"},
    {"k": 256, "labels": torch.int32, "kind": "blocks"},
]
# Of copy's bandwidth. Coherent labels read memory in order; random ones, and more of them, scatter.
REFINED = {("blocks", 32): 0.55, ("blocks", 256): 0.55, ("random", 32): 0.3, ("random", 256): 0.2}
ENLARGED = {c.LARGE: {"speedup_reference": 5.0}}
FUSED = {c.LARGE: {"share": 0.8, "speedup_reference": 12.0, "speedup_compiled": 1.5}}
SMALL = {8: {"launch_ratio": 2.0}}  # so small that launching is most of it
# On a GPU at the size where only memory counts: few and many clusters, narrow and wide labels, coherent and not.
REFINE_LARGE: list[dict[str, Any]] = [
    {"k": k, "labels": labels, "kind": kind, "targets": {"share": REFINED[kind, k], "speedup_peer": 3.0}}
    for kind in ("blocks", "random")
    for k in (32, 256)
    for labels in (torch.uint8, torch.int32)
]
MANY_CHANNELS: dict[str, Any] = {"k": 100, "labels": torch.int32, "kind": "blocks", "channels": 64}
USUAL: dict[str, Any] = {"k": 100, "labels": torch.int32, "kind": "blocks"}


def size_of(value: Any) -> int:
    """Bytes of all tensors in lists and tuples."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(size_of, value)) if isinstance(value, Sequence) and not isinstance(value, str) else 0


def _enlarged(inputs: Inputs) -> tuple[int, ...]:
    maps, size = inputs.args[:2]
    maps = maps[0] if isinstance(maps, list) else maps
    return (*maps.shape[:2], *size)


def _means_shape(inputs: Inputs) -> tuple[int, ...]:
    values, _, number = inputs.args
    return (*values.shape[:2], number)


def _fused_shape(inputs: Inputs) -> tuple[int, ...]:
    maps, labels = inputs.args[:2]
    return (*maps[0].shape[:2], *labels.shape[1:])


def _enlarged_bytes(inputs: Inputs) -> int:
    maps = inputs.args[0]
    one = maps[0] if isinstance(maps, list) else maps
    return size_of(maps) + math.prod(_enlarged(inputs)) * int(one.element_size())


def _mean_bytes(inputs: Inputs) -> int:
    values, labels, number = inputs.args
    return size_of([values, labels]) + len(values) * int(number) * (4 * int(values.shape[1]) + 8)


def _fused_bytes(inputs: Inputs) -> int:
    maps, labels = inputs.args[:2]
    return size_of([maps, labels]) + math.prod(_fused_shape(inputs)) * int(maps[0].element_size())


def _sweep_cases(targets: dict[str, float]) -> list[dict[str, Any]]:
    smooth = {"kind": "smooth"}
    many = {"images": c.MANY_MAPS, "headline": True, "targets": targets}
    return [
        *c.on("cpu", [{"images": 8, "headline": True}, {"images": 32}], contours=True, **smooth),
        *c.on("cpu", [{"images": 1}, {"images": 8}, {"images": 32}], contours=False, **smooth),
        *c.on("cpu", [{"contours": True}, {"contours": False}], images=2, kind="noise"),
        *c.on("cuda", [{"images": 8}, many], contours=False, **smooth),
        *c.on("cuda", [{"images": c.MEDIUM}], contours=False, kind="noise"),
    ]


def _on_cpu(name: str) -> Callable[..., Any]:
    """The C++ core: the plain twin takes seconds a map. Tests hold the two, and OpenCV, to be equal."""
    run = operator(name, "native")()

    def truth(levels: Tensor, **kwargs: Any) -> Any:
        return run(levels.cpu(), **kwargs)

    return truth


def _registry() -> tuple[Operation, ...]:
    one: dict[str, Any] = {"scales": c.SCALES[:1]}
    three: dict[str, Any] = {"scales": c.SCALES}
    many = c.on("cpu", [MANY_CHANNELS], images=8) + c.on("cuda", [MANY_CHANNELS], images=64)
    return (
        Operation(
            name="upsample_normalize",
            cases=c.cases(c.name_maps, c.sizes(backward=True, targets=ENLARGED | SMALL, **one)),
            make=c.make_upsample_normalize,
            providers=(*own("upsample_normalize", differentiable=True), *resize_providers()),
            moved=_enlarged_bytes,
            counted="the small maps read, the result written",
            compare=gate.values,
            tolerance=PIXELS,
            limit="fill",
            shape=_enlarged,
        ),
        Operation(
            name="fuse_maps",
            cases=c.cases(c.name_maps, c.sizes(backward=True, targets=FUSED | SMALL, **three)),
            make=c.make_fuse_maps,
            providers=(*own("fuse_maps", differentiable=True), *fuse_providers()),
            moved=_enlarged_bytes,
            counted="the small maps read, the result written",
            compare=gate.values,
            tolerance=PIXELS,
            limit="fill",
            shape=_enlarged,
        ),
        Operation(
            name="cluster_mean",
            cases=c.cases(
                c.name_clusters,
                [*c.sizes(backward=True, **USUAL), *c.both([REFINE[0], REFINE[3]]), *many],
            ),
            make=c.make_cluster_mean,
            providers=(*own("cluster_mean", differentiable=True), *mean_providers()),
            moved=_mean_bytes,
            counted="values and labels read, means and counts written",
            compare=gate.values,
            tolerance=MEANS,
            limit="copy",
            shape=_means_shape,
        ),
        Operation(
            name="cluster_refine",
            cases=c.cases(
                c.name_clusters,
                [
                    *c.on("cuda", REFINE_LARGE, images=c.LARGE),
                    *c.sizes(backward=True, targets=SMALL, **USUAL),
                    *c.on("cpu", REFINE, images=32),
                    *many,
                ],
            ),
            make=c.make_cluster_refine,
            providers=(*own("cluster_refine", differentiable=True), *refine_providers()),
            moved=lambda inputs: 2 * size_of(inputs.args[0]) + size_of(inputs.args[1]),
            counted="maps and labels read once, the result written",
            compare=gate.values,
            tolerance=MEANS,
            limit="copy",
            shape=lambda inputs: tuple(inputs.args[0].shape),
        ),
        Operation(
            name="fuse_and_refine",
            cases=c.cases(c.name_clusters, c.sizes(backward=True, **three, **USUAL)),
            make=c.make_fuse_and_refine,
            providers=(*own("fuse_and_refine", differentiable=True), *fuse_and_refine_providers()),
            moved=_fused_bytes,
            counted="the small maps and labels read, the result written",
            compare=gate.values,
            tolerance=MEANS,
            limit="fill",
            shape=_fused_shape,
        ),
        Operation(
            name="cluster_vote",
            cases=c.cases(
                c.name_vote,
                [
                    *c.sizes(half=False, k=32, labels=torch.int32, kind="square"),
                    *c.both(
                        [
                            {"k": 100, "labels": torch.int32, "kind": "random"},
                            {"k": 100, "labels": torch.uint8, "kind": "square"},
                        ]
                    ),
                ],
            ),
            make=c.make_cluster_vote,
            providers=(*own("cluster_vote"), *vote_providers()),
            moved=lambda inputs: 2 * size_of(inputs.args[0]) + size_of(inputs.args[1]),
            counted="labels and segments read once, the result written",
            compare=gate.labels,
            tolerance=EXACT,
            limit="copy",
        ),
        Operation(
            name="component_boxes",
            cases=c.cases(
                c.name_boxes,
                [
                    *c.on(
                        "cpu", [{"images": n, "headline": n == 32} for n in (8, 32, 64)], kind="smooth", largest=True
                    ),
                    *c.on(
                        "cuda", [{"images": n, "headline": n > 8} for n in (8, c.MEDIUM)], kind="smooth", largest=True
                    ),
                    *c.both([{"kind": "smooth", "largest": False}, {"kind": "noise", "largest": False}]),
                ],
            ),
            make=c.make_boxes,
            providers=(*own("component_boxes", compiled=False, slow=c.MEDIUM), *box_providers(largest=False)),
            moved=lambda inputs: size_of(inputs.args[0]),
            counted="maps read once; boxes are few",
            compare=gate.boxes,
            tolerance=BOXES,
            limit="copy",
        ),
        Operation(
            name="largest_box",
            cases=c.cases(
                c.name_boxes, [*c.sizes(half=False, headline=c.MEDIUM, kind="smooth"), *c.both([{"kind": "noise"}])]
            ),
            make=c.make_boxes,
            providers=(*own("largest_box", compiled=False, slow=c.MEDIUM), *box_providers(largest=True)),
            moved=lambda inputs: size_of(inputs.args[0]),
            counted="maps read once; boxes are few",
            compare=gate.boxes,
            tolerance=BOXES,
            limit="copy",
        ),
        Operation(
            name="sweep_boxes",
            cases=c.cases(c.name_sweep, _sweep_cases({})),
            make=c.make_sweep,
            providers=(*own("sweep_boxes", compiled=False, slow=1), *sweep_providers(largest=False)),
            moved=lambda inputs: size_of(inputs.args[0]),
            counted="levels read once; boxes are few",
            compare=gate.swept,
            tolerance=EXACT,
            limit="copy",
            truth=_on_cpu("sweep_boxes"),
        ),
        Operation(
            name="largest_at_cuts",
            cases=c.cases(c.name_sweep, _sweep_cases({"images_per_s": 20_000.0})),
            make=c.make_sweep,
            providers=(*own("largest_at_cuts", compiled=False, slow=1), *sweep_providers(largest=True)),
            moved=lambda inputs: size_of(inputs.args[0]),
            counted="levels read once; boxes are few",
            compare=gate.largest_swept,
            tolerance=EXACT,
            limit="copy",
            truth=_on_cpu("largest_at_cuts"),
        ),
        Operation(
            name="kmeans",
            cases=c.cases(
                c.name_kmeans,
                [
                    *c.on(
                        "cpu",
                        [
                            {"images": 32, "headline": True},
                            {"images": 8, "metric": "cosine"},
                            {"images": 8, "n": 1024, "k": 5},
                        ],
                        **{"n": 3600, "d": 384, "k": 2, "metric": "l2"},
                    ),
                    *c.on(
                        "cuda",
                        [
                            {"images": 32, "headline": True},
                            {"images": 32, "metric": "cosine"},
                            {"images": 8, "n": 1024, "k": 5},
                            {"images": 256},
                            {"images": 256, "dtype": torch.float16},
                        ],
                        **{"n": 3600, "d": 384, "k": 2, "metric": "l2"},
                    ),
                ],
            ),
            make=c.make_kmeans,
            providers=(*own("kmeans"), *kmeans_providers()),
            moved=lambda inputs: size_of(inputs.args[0]),
            counted="features read once, as if every image stayed in the cache from step to step",
            compare=gate.clusters,
            tolerance=CLUSTERS,
            limit="copy",
        ),
        Operation(
            name="slic",
            cases=c.cases(
                c.name_slic,
                [
                    *c.on(
                        "cpu",
                        [
                            {"images": 32, "headline": True},
                            {"images": 8},
                            {"images": 1},
                            {"images": 8, "segments": 10000},
                            {"images": 8, "side": 112, "segments": 800, "compactness": 100.0},
                        ],
                        **{"side": c.SIDE, "segments": 100, "compactness": 10.0},
                    ),
                    *c.on("cuda", [{"images": 8, "headline": True}], side=c.SIDE, segments=100, compactness=10.0),
                ],
            ),
            make=c.make_slic,
            providers=(*own("slic", compiled=False, slow=8), *slic_providers()),
            moved=lambda inputs: size_of(inputs.args[0]) + size_of(inputs.args[0][:, 0].float()),
            counted="images read once, labels written; each round reads them again",
            compare=gate.superpixels,
            tolerance=SUPERPIXELS,
            limit="copy",
        ),
    )


OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in _registry()}
