"""From the curves of an ablation's photos to the rows of its table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molt.benchmark.ablation_store import Sheet
from molt.evaluation.runs import Settings
from molt.evaluation.scores import (
    BOX_SCORES,
    V1_IOU,
    Curves,
    at_threshold,
    best_threshold,
    drawn_scores,
    interval,
    over_thresholds,
    redraw,
    scores,
    thresholds,
)

HOW = (
    "95 % of bootstrap draws of the photos, the same draws for all rows; with several seeds a row is the mean of its "
    "seeds' scores, and each draw redraws the seeds too. Each seed and draw has its own best thresholds."
)


@dataclass(frozen=True, eq=False)
class Found:
    """What was measured for one row.

    Attributes:
        name: unique in its group.
        baseline: name of the row that it is compared with, or None.
        settings: plain values that tell it from others.
        curves: one a seed, of the same photos in the same order.
        facts: mean ``clusters``, ``ms`` and ``alpha`` over photos and seeds, None where there are none.
    """

    name: str
    baseline: str | None
    settings: Mapping[str, Any]
    curves: Sequence[Curves]
    facts: Mapping[str, float | None]


def gather(sheets: Iterable[Sheet]) -> dict[str, Found]:
    """Return the rows of a group by name; a row's seeds may be spread over its sheets."""
    places: dict[str, list[tuple[Sheet, int]]] = {}
    for sheet in sheets:
        for column, entry in enumerate(sheet.entries):
            places.setdefault(entry.row, []).append((sheet, column))
    found = {}
    for name, columns in places.items():
        first = columns[0][0].entries[columns[0][1]]
        facts: dict[str, float | None] = {}
        for what in ("clusters", "ms", "alpha"):
            means = [value for sheet, column in columns if (value := sheet.mean(column, what)) is not None]
            facts[what] = float(np.mean(means)) if means else None
        curves = _Lazy(columns)
        found[name] = Found(name, first.baseline, first.settings, curves, facts)
    return found


class _Lazy(Sequence[Curves]):
    """Curves that are read when they are asked for, so that memory holds those of one row."""

    def __init__(self, columns: Sequence[tuple[Sheet, int]]) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        sheet, column = self._columns[place]
        return sheet.curves(column)


def rows_of(group: str, found: Mapping[str, Found], settings: Settings) -> list[dict[str, Any]]:
    """Return the rows of a group as plain values, figures in percent.

    ``score`` is MaxBoxAccV2, ``max_box_acc`` V1, ``mean_iou`` at V1's best threshold; each with its interval.
    ``difference`` and ``mean_iou_difference`` are to the row ``baseline``, paired: the same draws of photos on both
    sides. ``clusters`` and ``ms`` are means a photo; ``ms`` is the networks' forward passes where scales or heads are
    compared, with clusters where these are refined, else clusters and blending alone.

    Args:
        group: their name.
        found: of :func:`gather`.
        settings: how maps are scored, and the bootstrap.
    """
    grid = thresholds(settings.thresholds)
    whole: dict[str, dict[str, float]] = {}
    drawn: dict[str, dict[str, NDArray[np.float64]]] = {}
    rows = []
    for name, row in found.items():
        seeds, draws = [], []
        for curves in row.curves:
            seeds.append({metric: float(values[0]) for metric, values in scores(curves, grid, settings.ious).items()})
            draws.append(drawn_scores(curves, grid, settings.ious, settings.draws, settings.seed))
            photos = len(curves)
        chosen = _redraw_seeds(len(seeds), settings)
        whole[name] = {metric: 100 * float(np.mean([seed[metric] for seed in seeds])) for metric in BOX_SCORES}
        drawn[name] = {
            metric: 100 * np.take_along_axis(np.stack([one[metric] for one in draws], 1), chosen, 1).mean(1)
            for metric in BOX_SCORES
        }
        said = blank(group, name, row.settings) | {"status": "ran", "photos": photos, "seeds": len(seeds)}
        said |= {"clusters": row.facts["clusters"], "ms": row.facts["ms"], "mean_alpha": row.facts["alpha"]}
        for metric in BOX_SCORES:
            place = "score" if metric == "max_box_acc_v2" else metric
            said[place] = whole[name][metric]
            said["interval" if place == "score" else f"{place}_interval"] = list(interval(drawn[name][metric]))
        said["score_by_seed"] = [100 * seed["max_box_acc_v2"] for seed in seeds]
        said["mean_iou_by_seed"] = [100 * seed["mean_iou"] for seed in seeds]
        said["baseline"] = row.baseline
        rows.append(said)
    for said in rows:  # a baseline may come after what is compared with it
        name, baseline = said["name"], said["baseline"]
        if baseline not in whole:
            continue
        for metric, place in (("max_box_acc_v2", "difference"), ("mean_iou", "mean_iou_difference")):
            said[place] = whole[name][metric] - whole[baseline][metric]
            said[f"{place}_interval"] = list(interval(drawn[name][metric] - drawn[baseline][metric]))
    return rows


def not_run(group: str, name: str, reason: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a row of what could not be measured."""
    return blank(group, name, settings or {}) | {"status": "not_run", "reason": " ".join(reason.split())}


def blank(group: str, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without figures."""
    figures = ("photos", "seeds", "score", "interval", "max_box_acc", "max_box_acc_interval", "mean_iou")
    more = ("mean_iou_interval", "clusters", "ms", "mean_alpha", "baseline", "difference", "difference_interval")
    last = ("mean_iou_difference", "mean_iou_difference_interval")
    return {"group": group, "name": name, "status": None, "reason": None, **settings} | dict.fromkeys(
        (*figures, *more, *last)
    )


def hits_and_ious(curves: Curves, settings: Settings) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return each photo's hits (n, IoUs), 0 or 1, and IoU (n,) at the thresholds that are best over all photos.

    The mean of the hits is MaxBoxAccV2; the IoU is that of the largest contour's box at MaxBoxAcc's threshold.
    """
    grid = thresholds(settings.thresholds)
    hits = []
    for iou in settings.ious:
        best = grid[over_thresholds(curves.any, curves.peak, grid, iou)[0].argmax()]
        values = at_threshold(curves.any, curves.peak, float(best))
        hits.append(values.astype(np.float32) >= np.float32(iou))  # in float32 as in the accuracy itself
    accuracy = over_thresholds(curves.largest, curves.peak, grid, V1_IOU)
    means = over_thresholds(curves.largest, curves.peak, grid, None)
    best = grid[best_threshold(accuracy, means)[0]]
    return np.stack(hits, 1).astype(np.float64), at_threshold(curves.largest, curves.peak, float(best))


def mean_interval(values: NDArray[np.float64], settings: Settings) -> list[float]:
    """Return the 95 % interval of the mean of one value a photo, photos redrawn."""
    means = [counts @ values / len(values) for counts in redraw(len(values), settings.draws, settings.seed)]
    return list(interval(np.concatenate(means)))


def paired(
    best: NDArray[np.float64], single: NDArray[np.float64], settings: Settings
) -> tuple[float, tuple[float, float]]:
    """Return how far the mean of (n,) values is above the best mean of (rows, n) others, and its interval.

    Each draw of the photos has its own best row.
    """
    means = [
        counts @ best / len(best) - (counts @ single.T / len(best)).max(1)
        for counts in redraw(len(best), settings.draws, settings.seed)
    ]
    return float(best.mean() - single.mean(1).max()), interval(np.concatenate(means))


def _redraw_seeds(seeds: int, settings: Settings) -> NDArray[np.int64]:
    """Return (draws, seeds) which seeds each draw takes; rows with as many seeds take the same."""
    generator = np.random.default_rng([settings.seed, seeds])
    return generator.integers(0, seeds, (settings.draws, seeds))
