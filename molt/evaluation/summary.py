"""The figures of a run from its rows and curves: overall, a class, a size of object."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from molt.data.annotations import Problem
from molt.evaluation.scores import (
    V1_IOU,
    Curves,
    at_threshold,
    best_threshold,
    drawn_precision,
    drawn_scores,
    error_kind,
    figures,
    interval,
    over_thresholds,
    pixel_precision,
    scores,
    title,
)

if TYPE_CHECKING:
    from molt.evaluation.runs import Settings

Rows = Sequence[Mapping[str, Any]]
SIZES = ("small", "medium", "large")
_NUMBER = re.compile(r"-?\d[\d.,]*(e[+-]?\d+)?")


def summarize(
    rows: Rows,
    curves: Curves,
    settings: Settings,
    classes: Sequence[str],
    problems: Sequence[Problem],
    *,
    any_object: bool = False,
) -> dict[str, Any]:
    """Return a run's figures as plain values.

    All are in percent. ``scores`` holds value, 95 % interval and number of photos by metric, and the number of
    photo-class pairs where a photo has several classes; ``by_iou`` the best threshold and accuracy at each IoU;
    ``curves`` accuracy against threshold; ``classes`` and ``sizes`` the figures of each class and tercile of object
    size at the thresholds that are best overall; ``problems`` what was found on the way.
    """
    grid = settings.grid()
    boxed = np.array([i for i, row in enumerate(rows) if row["truth"]], np.int64)
    found: dict[str, Any] = {"scores": {}, "by_iou": [], "curves": {}, "classes": [], "sizes": []}
    if len(boxed):
        some = curves if len(boxed) == len(rows) else curves.take(boxed)
        drawn = drawn_scores(some, grid, settings.ious, settings.draws, settings.seed)
        whole = scores(some, grid, settings.ious)
        picked = [rows[i] for i in boxed]
        for name in figures(ranked=curves.rank is not None, fixed=len(grid) == 1, any_object=any_object):
            found["scores"][name] = _score(whole[name][0], drawn[name], picked)
        found |= _by_threshold(some, grid, settings, drawn, picked)
        each = _each(some, settings, _best(found))
        found["classes"] = _classes(picked, each)
        found["sizes"] = _sizes(picked, each)
    masked = np.array([i for i, row in enumerate(rows) if row["masks"]], np.int64)
    if curves.pixels is not None and len(masked):
        pixels = curves.pixels[masked]
        if pixels[:, 0].any():
            drawn_pxap = drawn_precision(pixels, settings.draws, settings.seed)
            found["scores"]["pxap"] = _score(pixel_precision(pixels)[0], drawn_pxap, [rows[i] for i in masked])
        else:
            text = "no pixel of any mask is an object's, so there is no PxAP"
            problems = (*problems, Problem(Path("masks"), None, text, "masks of objects"))
    found["problems"] = _problems(rows, problems)
    return found


def final_rows(
    rows: Rows, curves: Curves, boxes: NDArray[np.int16], settings: Settings, info: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the rows with what depends on the best thresholds: iou, iou_v2, box and error."""
    finished = [dict(row) | {"iou": None, "iou_v2": {}, "box": None, "error": None} for row in rows]
    if not info["by_iou"]:
        return finished
    best = _best(info)
    ious = at_threshold(curves.largest, curves.peak, best["v1"])
    by_iou = {f"{iou:g}": at_threshold(curves.any, curves.peak, best[iou]) for iou in settings.ious}
    for i, row in enumerate(finished):
        if not row["truth"]:
            continue
        row["iou"] = round(float(ious[i]), 6)
        row["iou_v2"] = {name: round(float(values[i]), 6) for name, values in by_iou.items()}
        box = boxes[i, int(row["peak"] * best["v1"])].astype(np.float64)
        if settings.clip:
            box = np.minimum(box, settings.size - 1)
        there = bool(box[2:].any())
        if row["width"]:
            back = np.array([row["width"], row["height"]] * 2) / settings.size
            row["box"] = np.round(box * back, 2).tolist() if there else None
            truth = scaled(row, settings.size, truncate=settings.truncate)
            row["error"] = error_kind(box.tolist() if there else None, truth, ious[i], settings.plus_one)
        else:
            row["error"] = "wrong"
    return finished


def scaled(row: Mapping[str, Any], size: int, *, truncate: bool) -> NDArray[np.float64]:
    """Return a photo's true boxes, (n, 4), on the square of ``size`` pixels where they are compared."""
    sides = np.array([row["width"], row["height"]] * 2, np.float64)
    boxes = np.asarray(row["truth"], np.float64) * size / sides
    return np.trunc(boxes) if truncate else boxes


def protocol_line(info: Mapping[str, Any]) -> str:
    """Return how a run was scored, in one line: every knob that differs between papers."""
    said = info["protocol"]
    method = info["method"]
    ious = ", ".join(f"{iou:g}" for iou in said["ious"])
    fixed = fixed_threshold(info)
    name = title("max_box_acc", fixed=fixed is not None)
    parts = [
        f"{said['size']} px",
        f"maps {said['resize']} resized, normalised {said['normalize']}",
        f"threshold {fixed:g} of each map's maximum, fixed"
        if fixed is not None
        else f"{said['thresholds']} thresholds of each map's maximum, one best for all photos, chosen on these photos",
        f"{name}: largest contour by {said['area']} area, IoU >= {V1_IOU:g}; V2: any contour, IoU >= {ious}; "
        f"mean IoU at {name}'s threshold",
        f"true boxes {'cut to whole pixels' if said['truncate'] else 'not rounded'}",
        f"boxes {'clipped to the last pixel' if said['clip'] else 'not clipped'}",
        f"widths {'with' if said['plus_one'] else 'without'} + 1",
    ]
    if "pxap" in info["scores"]:
        parts.append("PxAP: all pixels pooled, masks resized to the nearest pixel, above 0 is object, ignored ones out")
    if "gt_map" in method:
        parts.append(f"map of: {method['gt_map']}")
    if "top1_loc" in info["scores"]:
        parts.append(
            "Top-k Loc: the label is among the k likeliest classes and the largest box of that map fits; "
            + ("a fixed threshold" if fixed is not None else "each k at its own best threshold")
        )
        parts.append(f"classes predicted by: {method.get('predictions', 'the network')}")
    if info["data"].get("any_object"):
        parts.append("CorLoc: one box a photo, right with any object of any class")
    parts += [f"{what} count" for what in info["data"].get("counted", ())]
    if "missing" in method:
        parts.append(f"missing maps: {method['missing']}")
    drawn = units(info["data"])
    parts.append(f"95 % intervals: {said['draws']} bootstrap draws of the {drawn}, seed {said['seed']}")
    return "; ".join(parts)


def fixed_threshold(info: Mapping[str, Any]) -> float | None:
    """Return the only threshold of a run, or None where the best of several is taken."""
    said = info["protocol"]
    if said["threshold"] is None and said["thresholds"] > 1:
        return None
    return float(said["threshold"] or 0.0)


def units(counted: Mapping[str, int]) -> str:
    """Return what is scored one by one: photos, or where one has several classes, pairs of a photo and a class."""
    return "photo-class pairs" if "pairs" in counted else "photos"


def in_words(counted: Mapping[str, Any]) -> str:
    """Return how many photos, and where these are not the same how many pairs of a photo and a class."""
    photos = f"{counted['photos']} photo{'s' * (counted['photos'] != 1)}"
    return f"{photos} ({counted['pairs']} {units(counted)})" if "pairs" in counted else photos


def how_many(rows: Rows) -> dict[str, int]:
    """Return how many photos the rows are of, and where a photo has several classes how many pairs of these."""
    photos = len({row["name"] for row in rows})
    return {"photos": photos} | ({} if photos == len(rows) else {"pairs": len(rows)})


def _score(value: float, drawn: NDArray[np.float64], rows: Rows) -> dict[str, Any]:
    return {"value": 100 * float(value), "interval": list(interval(100 * drawn))} | how_many(rows)


def _by_threshold(
    curves: Curves, grid: NDArray, settings: Settings, drawn: Mapping[str, NDArray[np.float64]], rows: Rows
) -> dict[str, Any]:
    """Return accuracy at each IoU, its best threshold and interval, and the lines to draw."""
    entries, lines = [], {}
    for kind, iou in [("v1", V1_IOU), *(("v2", iou) for iou in settings.ious)]:
        curve = curves.largest if kind == "v1" else curves.any
        line = over_thresholds(curve, curves.peak, grid, iou)[0]
        top = int(line.argmax())
        if kind == "v1":
            means = over_thresholds(curve, curves.peak, grid, None)
            top = int(best_threshold(line[None], means)[0])
        draws = drawn["max_box_acc" if kind == "v1" else f"any {iou:g}"]
        entries.append({"kind": kind, "iou": iou, "threshold": float(grid[top])} | _score(line[top], draws, rows))
        lines[f"{kind} {iou:g}"] = [round(100 * float(v), 4) for v in line]
    return {"by_iou": entries, "curves": lines}


def _best(info: Mapping[str, Any]) -> dict[Any, float]:
    """Return the best threshold by IoU, and MaxBoxAcc's as ``"v1"``."""
    return {"v1" if entry["kind"] == "v1" else entry["iou"]: entry["threshold"] for entry in info["by_iou"]}


def _each(curves: Curves, settings: Settings, best: Mapping[Any, float]) -> dict[str, NDArray[np.float64]]:
    """Return each photo's part, (n,), of every figure at given thresholds."""
    largest = at_threshold(curves.largest, curves.peak, best["v1"])
    reached = [_reached(at_threshold(curves.any, curves.peak, best[iou]), iou) for iou in settings.ious]
    return {
        "max_box_acc": _reached(largest, V1_IOU),
        "max_box_acc_v2": np.mean(reached, 0),
        "mean_iou": largest,
    }


def _reached(values: NDArray[np.float64], iou: float) -> NDArray[np.float64]:
    return (values.astype(np.float32) >= np.float32(iou)).astype(np.float64)


def _part(rows: Rows, each: Mapping[str, NDArray[np.float64]], inside: NDArray) -> dict[str, Any]:
    """Return the means of the figures over some rows, by index."""
    return how_many([rows[i] for i in inside]) | {name: 100 * float(own[inside].mean()) for name, own in each.items()}


def _classes(rows: Rows, each: Mapping[str, NDArray[np.float64]]) -> list[dict[str, Any]]:
    """Return the figures of each class, by label."""
    places: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        places[int(row["label"])].append(i)
    return [
        {"label": label, "name": str(rows[inside[0]]["class"])} | _part(rows, each, np.array(inside))
        for label, inside in sorted(places.items())
    ]


def _sizes(rows: Rows, each: Mapping[str, NDArray[np.float64]]) -> list[dict[str, Any]]:
    """Return the figures by tercile of the largest true box's share of the photo."""
    known = np.array([i for i, row in enumerate(rows) if row["size_share"] is not None], np.int64)
    if not len(known):
        return []
    shares = np.array([rows[i]["size_share"] for i in known])
    group = np.searchsorted(np.quantile(shares, [1 / 3, 2 / 3]), shares, side="left")
    found = []
    for number, name in enumerate(SIZES):
        inside = group == number
        if inside.any():
            limits = {"least": float(shares[inside].min()), "most": float(shares[inside].max())}
            found.append({"name": name} | limits | _part(rows, each, known[inside]))
    return found


def _problems(rows: Rows, before: Sequence[Problem]) -> dict[str, Any]:
    """Return every problem found and how many there are of each message."""
    listed = [{"file": str(p.file), "line": p.line, "message": p.message, "expected": p.expected} for p in before]
    for row in rows:
        for problem in row["problem"]:
            listed.append({"file": row["name"], "line": None} | problem)
        if not row["truth"] and not row["masks"] and not row["problem"]:
            expected = "a true box or mask; the photo counts nowhere"
            listed.append(
                {"file": row["name"], "line": None, "message": "the photo has no truth", "expected": expected}
            )
    counts: dict[str, int] = defaultdict(int)
    for problem in listed:
        # Names and numbers differ from photo to photo, what is wrong does not.
        counts[_NUMBER.sub("#", str(problem["message"]))] += 1
    return {"count": len(listed), "kinds": dict(sorted(counts.items(), key=lambda item: -item[1])), "listed": listed}
