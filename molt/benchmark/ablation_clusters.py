"""What clusters are worth: how many, of which clusterer, with which weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from molt._auto_alpha import Alpha
from molt.benchmark.ablation_networks import SIDE, Clusters, Measured, SeededMaps, TrainedMolt, View, refined
from molt.benchmark.ablation_rows import Found
from molt.benchmark.ablation_scales import array2
from molt.benchmark.ablation_store import Entry
from molt.clustering import DeepClustering, Slic, TokenKMeans
from molt.ops import upsample_normalize

CLUSTERS, CLUSTERERS = "clusters", "clusterers"
NUMBERS = (5, 10, 20, 50)
# Of the preset `fast`. What its four networks answer is merged into 32 clusters, whatever min_labels and channels:
# these are varied for a single network, as published, whose 20 steps cost as much as the preset's four of 5.
ONE: dict[str, Any] = {"starts": 1, "merged": 0, "steps": 20}
DEEP: tuple[tuple[str, tuple[dict[str, Any], ...]], ...] = (
    ("deep", ({},)),
    ("deep, merged", tuple({"merged": n} for n in (5, 10, 20, 50))),
    ("deep, one network, channels", tuple(ONE | {"channels": n} for n in (8, 16, 32, 64))),
    ("deep, one network, min_labels", tuple(ONE | {"min_labels": n} for n in (10, 20))),
)
COUNT_ALPHAS: tuple[Alpha, ...] = ("auto", 0.5)
ALPHAS: tuple[Alpha, ...] = (0.3, 0.5, 1.0, "auto")
NONE = "no clusters"
MOLT_MAPS, SEEDED_MAPS, CAM = "MOLT", "seeded", "CAM"


def counted(seeds: int) -> list[tuple[str, str, Clusters]]:
    """Return (family, what is varied, clusterer) of the group ``clusters``."""
    all_seeds = range(seeds)
    found: list[tuple[str, str, Clusters]] = []
    for k in NUMBERS:
        for name, on in (("k-means, tokens", "tokens"), ("k-means, colour", "pixels")):
            instances = tuple(TokenKMeans(k, seed=seed) for seed in all_seeds)
            found.append((name, str(k), Clusters(f"{name}, k {k}", instances, on)))
        found.append(("SLIC", str(k), Clusters(f"SLIC, {k} segments", (Slic(k),))))
    for family, ways in DEEP:
        for options in ways:
            deep = tuple(DeepClustering(seed=seed, **options) for seed in all_seeds)
            what = str(list(options.values())[-1]) if options else "defaults"
            found.append((family, what, Clusters(f"{family} {what}" if options else "deep, defaults", deep)))
    return found


def count_entries(variants: Sequence[tuple[str, str, Clusters]]) -> list[Entry]:
    """Return the columns of the group ``clusters``, whose maps are the MOLT's."""
    found = [Entry(NONE, 0, None, {"family": NONE, "clusterer": None, "alpha": 0.0})]
    for family, what, clusters in variants:
        for alpha in COUNT_ALPHAS:
            settings = {"family": family, "varied": what, "clusterer": clusters.name, "alpha": alpha}
            name = f"{clusters.name}, alpha {alpha}"
            found += [Entry(name, seed, NONE, settings) for seed in range(len(clusters.instances))]
    return found


def measure_counts(view: View, model: TrainedMolt, variants: Sequence[tuple[str, str, Clusters]]) -> Iterator[Measured]:
    """Yield the maps of a photo in the order of :func:`count_entries`."""
    fused = model.fused(model.maps(view))
    yield Measured(array2(fused))
    for _, _, clusters in variants:
        labels = clusters.labels(view, model)
        for alpha in COUNT_ALPHAS:
            for seed in range(len(clusters.instances)):
                yield refined(fused, labels, seed, alpha)


def defaults(seeds: int) -> list[Clusters]:
    """Return every clusterer at its defaults."""
    return [
        Clusters("k-means, tokens", tuple(TokenKMeans(seed=seed) for seed in range(seeds)), "tokens"),
        Clusters("k-means, colour", tuple(TokenKMeans(seed=seed) for seed in range(seeds))),
        Clusters("SLIC", (Slic(),)),
        Clusters("deep clustering", tuple(DeepClustering(seed=seed) for seed in range(seeds))),
    ]


def base_entries(bases: Sequence[str], clusterers: Sequence[Clusters], alphas: Sequence[Alpha]) -> list[Entry]:
    """Return a column for each map as it is, and for each way to refine it, which is compared with that."""
    found = []
    for base in bases:
        plain = f"{base}, alpha 0"
        found.append(Entry(plain, 0, None, {"map": base, "clusterer": None, "alpha": 0.0}))
        for clusters in clusterers:
            for alpha in alphas:
                settings = {"map": base, "clusterer": clusters.name, "alpha": alpha}
                name = f"{base} + {clusters.name}, alpha {alpha}"
                found += [Entry(name, seed, plain, settings) for seed in range(len(clusters.instances))]
    return found


Base = Callable[[View], tuple[Tensor, Any]]
"""Gives a photo's map (1, 1, SIDE, SIDE) and the network whose tokens are clustered."""


def measure_bases(
    view: View, bases: Sequence[Base], clusterers: Sequence[Clusters], alphas: Sequence[Alpha]
) -> Iterator[Measured]:
    """Yield the maps of a photo in the order of :func:`base_entries`."""
    for base in bases:
        values, network = base(view)
        yield Measured(array2(values))
        for clusters in clusterers:
            labels = clusters.labels(view, network)
            for alpha in alphas:
                for seed in range(len(clusters.instances)):
                    yield refined(values, labels, seed, alpha)


def molt_base(model: TrainedMolt) -> Base:
    """Return the maps that a MOLT fuses."""
    return lambda view: (model.fused(model.maps(view)), model)


def seeded_base(network: SeededMaps, what: str) -> Base:
    """Return the maps of the training-free method: ``"fused"``, or its ``"cam"`` or ``"attention"`` alone."""

    def base(view: View) -> tuple[Tensor, Any]:
        maps = network.maps(view)
        if what == "fused":
            return network.fused(maps), network
        given = network.attention(view) if what == "attention" else torch.from_numpy(maps[what])[None, None]
        return upsample_normalize(given, (SIDE, SIDE)), network

    return base


def count_findings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the points of score against measured clusters, from the finished rows of the group ``clusters``."""
    named = ("family", "varied", "alpha", "clusters", "score", "mean_iou", "score_by_seed", "difference")
    return [{name: row[name] for name in named} for row in rows if row["status"] == "ran" and row["clusters"]]


def alpha_findings(rows: Sequence[Mapping[str, Any]], found: Mapping[str, Found]) -> list[dict[str, Any]]:
    """Return the curve of each map and clusterer over alpha, from the finished rows of the group ``clusterers``."""
    curves: dict[tuple[str, str], dict[str, Any]] = {}
    plain = {row["map"]: row for row in rows if row["status"] == "ran" and row["clusterer"] is None}
    for row in rows:
        if row["status"] != "ran" or row["clusterer"] is None or row["name"] not in found:
            continue
        key = row["map"], row["clusterer"]
        curve = curves.setdefault(
            key,
            {"map": key[0], "clusterer": key[1], "alphas": [0.0], "scores": [plain[key[0]]["score"]], "auto": None},
        )
        if row["alpha"] == "auto":
            curve["auto"] = {"mean_alpha": row["mean_alpha"], "score": row["score"]}
        else:
            curve["alphas"].append(row["alpha"])
            curve["scores"].append(row["score"])
    return list(curves.values())
