"""Rows of `molt benchmark --end-to-end`: their columns, filled in from what was timed and found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from molt.benchmark import agreement, timing
from molt.benchmark.configurations import Configuration
from molt.benchmark.pipelines import FULL_STEPS, Found
from molt.benchmark.targets import add_missed

# Of deep_published: timed after the first, and between those two. On a GPU steps are replayed from a recording only
# where there are more than a few, and both runs must be of one kind.
FIRST_STEPS, STEPS = 4, 20
HIT = 0.5
LOOPS = {"published": "speedup_published", "published_bincount": "speedup_published_bincount"}


def compare(
    found: Sequence[Found], reference: Sequence[Found], threshold: float, truth: Sequence[Tensor] | None
) -> dict[str, Any]:
    """Return the columns on quality of photos seen one by one; see `report`."""
    both = list(zip(found, reference, strict=False))
    ious = [float(agreement.mask_iou(ours.refined, theirs.refined, threshold)) for ours, theirs in both]
    rand = [
        agreement.adjusted_rand(ours.labels[0], theirs.labels[0])
        for ours, theirs in both
        if ours.labels is not None and theirs.labels is not None
    ]
    hits = None
    if truth is not None and len(found) == len(truth):  # of fewer photos it would not compare
        right = [agreement.best_iou(one.boxes[0], boxes) > HIT for one, boxes in zip(found, truth, strict=True)]
        hits = sum(right) / len(right)
    return {
        "iou_reference": sum(ious) / len(ious) if ious else None,
        "ari_reference": sum(rand) / len(rand) if rand else None,
        "photos_compared": len(both),
        "hits": hits,
        "photos_hit": None if hits is None else len(found),
    }


def empty_row(one: Configuration, dtype: torch.dtype) -> dict[str, Any]:
    """Return a row of a configuration without measurements."""
    row: dict[str, Any] = asdict(one)
    row |= {"dtype": str(dtype).removeprefix("torch."), "scales": None, "trained": None, "note": None}
    row |= dict.fromkeys(("ms", "p20_ms", "p80_ms"))
    row |= {"runs": 0}
    row |= dict.fromkeys(("photos_per_s", "bare_ms", "bare_photos_per_s", "ratio", "results_ms", "peak_mib"))
    row |= {"extrapolated": False, "photos_timed": None, "steps_timed": None, "steps_full": None, "step_ms": None}
    row |= {"stages": [], "weights": None, "targets": {}, "missed": []}
    row |= dict.fromkeys(LOOPS.values())
    row |= dict.fromkeys(("iou_reference", "ari_reference", "photos_compared", "hits", "photos_hit"))
    return row


def add_times(
    row: dict[str, Any], taken: dict[str, list[float]], batch: int, timed: int, steps: int | None = None
) -> None:
    """Fill in times, extrapolated where fewer photos or steps were timed than the row is of.

    Args:
        row: of `empty_row`.
        taken: milliseconds of "whole" on ``timed`` photos, and of "bare" on ``batch``; "start" of the whole with
            `FIRST_STEPS` where ``steps`` are given; "results" where they were timed.
        batch: photos of the row.
        timed: photos of the whole.
        steps: of the whole's clustering, or None where they are those of the row.
    """
    share, more = batch / timed, 0.0
    if steps is not None:
        step = (timing.quantile(taken["whole"], 0.5) - timing.quantile(taken["start"], 0.5)) / (steps - FIRST_STEPS)
        more = max(step, 0.0) * (FULL_STEPS - steps)
        row |= {"steps_timed": steps, "steps_full": FULL_STEPS, "step_ms": max(step, 0.0) / timed}
    for name, quantile in (("ms", 0.5), ("p20_ms", 0.2), ("p80_ms", 0.8)):
        row[name] = share * (timing.quantile(taken["whole"], quantile) + more)
    bare = timing.quantile(taken["bare"], 0.5)
    row |= {
        "runs": len(taken["whole"]),
        "photos_per_s": 1000 * batch / row["ms"],
        "bare_ms": bare,
        "bare_photos_per_s": 1000 * batch / bare,
        "ratio": row["ms"] / bare,
        "results_ms": timing.quantile(taken["results"], 0.5) if "results" in taken else None,
        "extrapolated": timed < batch or steps is not None,
        "photos_timed": timed,
    }


def stages(profile: Sequence[dict[str, Any]], batch: int, timed: int, more_ms: float) -> list[dict[str, Any]]:
    """Return the stages of a row, in the order of their first use.

    Args:
        profile: rows of :class:`molt.profiling.Profile` of one run on ``timed`` photos.
        batch: photos of the row.
        timed: photos of the run.
        more_ms: that the stage "cluster" would have taken longer with all its steps.
    """
    found = []
    for stage in profile:
        ms = (1000 * stage["seconds"] + (more_ms if stage["stage"] == "cluster" else 0.0)) * batch / timed
        per_second = 1000 * batch / ms if ms > 0 else None
        found.append({"stage": stage["stage"], "ms": ms, "photos_per_s": per_second, "peak_mib": stage["peak_mib"]})
    return found


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what tells a row of a report from its others."""
    return tuple(row[name] for name in ("method", "clusterer", "provider", "batch", "size"))


def add_speedups(rows: Sequence[dict[str, Any]]) -> None:
    """Fill in how many times faster than the papers' loops a row is, and the targets it misses."""
    times = {key(row): row["ms"] for row in rows}
    for row in rows:
        for loop, column in LOOPS.items():
            theirs = times.get(key(row | {"provider": loop}))
            row[column] = None if theirs is None or row["ms"] is None else theirs / row["ms"]
    add_missed(rows)
