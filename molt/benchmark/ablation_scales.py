"""What each scale and each part of a MOLT's map is worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molt.benchmark.ablation_networks import ATTENTION, CLASS, PRODUCT, Clusters, Measured, TrainedMolt, View, refined
from molt.benchmark.ablation_rows import Found, hits_and_ious, mean_interval, paired
from molt.benchmark.ablation_store import Entry
from molt.clustering import TokenKMeans
from molt.evaluation.runs import Settings
from molt.methods.multiscale import Multiscale

SCALES, HEADS = "scales", "heads"
MOST_COMBINED = 5  # scales; of more only single ones, all but one, and all
COMPARED = 224  # px a side, where scales' maps are correlated
TERCILES = ("small", "medium", "large")
REFINED = "all scales, refined"


def subsets(scales: int) -> list[tuple[int, ...]]:
    """Return the sets of scales to fuse: every one, of many scales the single ones, all but one, and all."""
    sizes = range(1, scales + 1) if scales <= MOST_COMBINED else sorted({1, scales - 1, scales})
    return [some for size in sizes for some in combinations(range(scales), size)]


def scale_entries(scales: Sequence[str], clusters: Clusters) -> list[Entry]:
    """Return the columns of the group ``scales``.

    Args:
        scales: names of the scales.
        clusters: what the last row is refined with, see :func:`default_clusters`.
    """
    baseline = _name(scales, tuple(range(len(scales))), PRODUCT)
    found = []
    for kind in (PRODUCT, CLASS):
        for some in subsets(len(scales)):
            name = _name(scales, some, kind)
            settings = {"scales": [scales[i] for i in some], "map": kind, "refined": False}
            found.append(Entry(name, 0, None if name == baseline else baseline, settings))
    alpha = Multiscale.alpha
    settings = {"scales": list(scales), "map": PRODUCT, "refined": True, "clusterer": clusters.name, "alpha": alpha}
    return found + [Entry(REFINED, seed, baseline, settings) for seed in range(len(clusters.instances))]


def measure_scales(view: View, model: TrainedMolt, clusters: Clusters) -> Iterator[Measured]:
    """Yield the maps of a photo in the order of :func:`scale_entries`."""
    maps = model.maps(view)
    for kind in (PRODUCT, CLASS):
        for some in subsets(len(model.scales)):
            yield Measured(array2(model.fused(maps, some, kind)), None, float(maps["ms"][list(some)].sum()))
    labels, fused = clusters.labels(view, model), model.fused(maps)
    for seed in range(len(clusters.instances)):
        one = refined(fused, labels, seed, Multiscale.alpha)
        yield replace(one, ms=(one.ms or 0.0) + float(maps["ms"].sum()))


def scale_facts(view: View, model: TrainedMolt) -> dict[str, Any]:
    """Return Pearson's correlation of a photo's maps of each two scales, by kind of map; None for a constant map."""
    maps = model.maps(view)
    found: dict[str, Any] = {}
    for kind in (PRODUCT, CLASS):
        flat = [array2(model.fused(maps, [i], kind, COMPARED)).ravel() for i in range(len(model.scales))]
        found[kind] = {
            f"{model.scales[a]}, {model.scales[b]}": correlation(flat[a], flat[b])
            for a, b in combinations(range(len(flat)), 2)
        }
    return {"correlation": found}


def correlation(a: NDArray[Any], b: NDArray[Any]) -> float | None:
    """Return Pearson's correlation of two vectors, or None where one is constant."""
    a, b = a.astype(np.float64) - a.mean(dtype=np.float64), b.astype(np.float64) - b.mean(dtype=np.float64)
    spread = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / spread if spread > 1e-12 else None


def default_clusters(seeds: int, method: Multiscale) -> Clusters:
    """Return what :class:`molt.Localizer` refines this model's maps with, once a seed; the first seed is its own."""
    instances = []
    for seed in range(seeds):
        one: Any = method.clusterer()
        one.seed = seed
        instances.append(one)
    if not isinstance(instances[0], TokenKMeans):
        return Clusters("deep clustering", tuple(instances))
    name = f"k-means, tokens, k {instances[0].num_clusters}, {instances[0].restarts} restarts"
    return Clusters(name, tuple(instances), "tokens")


def head_entries(head: str, scales: Sequence[str], seed: int, baseline: str | None) -> list[Entry]:
    """Return the columns of one checkpoint in the group ``heads``: all scales, and the first one's plain class map.

    Args:
        head: name of the head.
        scales: names of the scales.
        seed: which of the checkpoints with this head.
        baseline: row that all are compared with.
    """
    found: list[Entry] = []
    for kind, some in ((PRODUCT, scales), (CLASS, scales), (ATTENTION, scales), (CLASS, scales[:1])):
        name = head_row(head, kind, some if len(some) < len(scales) else ())
        settings = {"head": head, "map": kind, "scales": list(some)}
        if name not in [entry.row for entry in found]:
            found.append(Entry(name, seed, None if name == baseline else baseline, settings))
    return found


def head_row(head: str, kind: str = PRODUCT, some: Sequence[str] = ()) -> str:
    """Return the name of a row of the group ``heads``, of some scales or of all."""
    return f"{head}: {kind}" + "".join(f", {scale} px alone" for scale in some)


def measure_heads(view: View, model: TrainedMolt) -> Iterator[Measured]:
    """Yield the maps of a photo in the order of :func:`head_entries`."""
    maps = model.maps(view)
    for kind in (PRODUCT, CLASS, ATTENTION):
        yield Measured(array2(model.fused(maps, None, kind)), None, float(maps["ms"].sum()))
    if len(model.scales) > 1:
        yield Measured(array2(model.fused(maps, [0], CLASS)), None, float(maps["ms"][0]))


def head_facts(view: View, model: TrainedMolt) -> dict[str, Any]:
    """Return whether the photo's likeliest class is its own, or None where that cannot be told."""
    correct = float(model.maps(view)["correct"])
    return {"correct": None if np.isnan(correct) else bool(correct)}


def scale_findings(
    found: Mapping[str, Found], facts: Sequence[Mapping[str, Any]], shares: NDArray[np.float64], settings: Settings
) -> dict[str, Any]:
    """Return the oracle of scales, correlations and terciles.

    The oracle takes for each photo the best of the single scales, each boxed at the thresholds that are best for it
    over all photos; ``gain`` is how much that adds to the best single scale, a bound on what choosing scales can give.

    Args:
        found: rows by name, see :mod:`molt.benchmark.ablation_rows`.
        facts: of :func:`scale_facts`, a photo each; empty where a photo had no maps.
        shares: (photos,) of the largest true box in the photo.
        settings: how maps are scored.
    """
    findings: dict[str, Any] = {}
    for kind in (PRODUCT, CLASS):
        rows = [row for row in found.values() if row.settings["map"] == kind and not row.settings["refined"]]
        single = [row for row in rows if len(row.settings["scales"]) == 1]
        values = [hits_and_ious(row.curves[0], settings) for row in single]
        oracle: dict[str, Any] = {"single": [row.name for row in single]}
        for place, metric in ((0, "score"), (1, "mean_iou")):
            stack = np.stack([value[place] for value in values])  # (scales, photos, IoUs) or (scales, photos)
            own = stack if place else stack.mean(2)
            best = own.max(0)
            gain, interval = paired(best, own, settings)
            oracle[metric] = 100 * float(best.mean())
            oracle[f"{metric}_interval"] = mean_interval(100 * best, settings)
            oracle[f"{metric}_best_single"] = 100 * float(own.mean(1).max())
            oracle[f"{metric}_gain"], oracle[f"{metric}_gain_interval"] = 100 * gain, [100 * v for v in interval]
        pairs: dict[str, Any] = {}
        known = [fact["correlation"][kind] for fact in facts if fact]
        for pair in known[0] if known else ():
            values_of = np.array([fact[pair] for fact in known if fact[pair] is not None])
            pairs[pair] = {"photos": len(values_of)} | (
                {"mean": float(values_of.mean()), "interval": mean_interval(values_of, settings)}
                if len(values_of)
                else {"mean": None, "interval": None}
            )
        findings[kind] = {"oracle": oracle, "correlation": pairs}
    group = np.searchsorted(np.quantile(shares, [1 / 3, 2 / 3]), shares, side="left")
    findings["sizes"] = []
    for number, name in enumerate(TERCILES):
        inside = np.flatnonzero(group == number)
        if not len(inside):
            continue
        part: dict[str, Any] = {"name": name, "photos": len(inside)}
        part |= {"least": float(shares[inside].min()), "most": float(shares[inside].max()), "rows": []}
        for row in found.values():
            # At the thresholds that are best over all photos.
            per_photo = [hits_and_ious(curves, settings) for curves in row.curves]
            hits = np.mean([value[0][inside].mean(1) for value in per_photo], 0)
            ious = np.mean([value[1][inside] for value in per_photo], 0)
            part["rows"].append(
                {
                    "name": row.name,
                    "score": 100 * float(hits.mean()),
                    "interval": mean_interval(100 * hits, settings),
                    "mean_iou": 100 * float(ious.mean()),
                }
            )
        findings["sizes"].append(part)
    return findings


def head_accuracy(facts: Sequence[Sequence[Mapping[str, Any]]], settings: Settings) -> dict[str, Any]:
    """Return the accuracy of heads of one kind, of several the mean, and its interval over photos.

    Args:
        facts: of :func:`head_facts`, a photo each, a checkpoint each.
        settings: of the bootstrap.
    """
    # A photo that cannot be read counts as wrong; None is a network that does not know the set's classes.
    told = [[fact.get("correct", False) for fact in one] for one in facts]
    if any(value is None for one in told for value in one):
        return {"accuracy": None, "accuracy_interval": None}
    rights = np.array(told, np.float64)
    return {
        "accuracy": 100 * float(rights.mean()),
        "accuracy_interval": mean_interval(100 * rights.mean(0), settings),
        "accuracy_by_seed": [100 * float(one.mean()) for one in rights],
    }


def array2(values: Any) -> NDArray[Any]:
    """Return the first map of (1, 1, H, W) as an array."""
    return np.asarray(values[0, 0].numpy())


def _name(scales: Sequence[str], some: tuple[int, ...], kind: str) -> str:
    return f"{' + '.join(scales[i] for i in some)} px, {kind}"
