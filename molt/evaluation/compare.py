"""Runs beside each other, on the photos they share, with intervals of their differences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molt._arguments import check_int
from molt.evaluation.runs import Run
from molt.evaluation.scores import (
    drawn_precision,
    drawn_scores,
    figures,
    interval,
    pixel_precision,
    scores,
)
from molt.evaluation.summary import fixed_threshold, tally

NAMED = 20  # photos named of those that are not shared; all are counted


def compare(runs: Sequence[Run], *, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Compare runs with the first one, photo by photo (paired bootstrap).

    In every draw the same photos are drawn for all runs, and each run takes its own best thresholds on them.

    Args:
        runs: two or more, of data sets that share photos.
        draws: bootstrap draws, at least 1.
        seed: of the draws.

    Returns:
        plain values, figures in percent. ``runs``: names; ``photos``: how many are shared, and ``pairs`` of a photo
        and a class where these are more; ``fixed``: whether no threshold was chosen on these photos; ``scores``: by
        metric, one value and interval a run on the shared photos; ``differences``: metric, run, against, difference,
        interval (95 %) and ``better``, the share of draws above zero; ``unshared``: photos that not all runs have, or
        whose true boxes differ; ``protocol``: settings that are not the same in all.

    Raises:
        ValueError: fewer than two runs, or none of their photos shared.
    """
    if len(runs) < 2:
        raise ValueError(f"runs must be two or more, got {len(runs)}")
    check_int("draws", draws, 1)
    check_int("seed", seed, 0)
    places = [{(row["name"], row["label"]): i for i, row in enumerate(run.rows)} for run in runs]
    everywhere = [key for key in places[0] if all(key in place for place in places)]
    alike = [key for key in everywhere if _one_truth(runs, places, key)]
    if not alike:
        raise ValueError(f"runs {', '.join(names(runs))} share no photo with the same true boxes")
    shared = [np.array([place[key] for key in alike], np.int64) for place in places]
    boxed = np.array([bool(runs[0].rows[i]["truth"]) for i in shared[0]])
    masked = np.all([[bool(run.rows[i]["masks"]) for i in rows] for run, rows in zip(runs, shared, strict=True)], 0)

    fixed = all(fixed_threshold(run.info) is not None for run in runs)
    ranked = all(run.curves.rank is not None for run in runs)
    any_object = all(run.info.get("data", {}).get("any_object") for run in runs)
    reported = figures(ranked=ranked, fixed=fixed, any_object=any_object)
    drawn: dict[str, list[tuple[float, NDArray[np.float64]]]] = {}
    for run, rows in zip(runs, shared, strict=True):
        grid, ious = run.settings.grid(), run.settings.ious
        if boxed.any():
            some = run.curves.take(rows[boxed])
            again, whole = drawn_scores(some, grid, ious, draws, seed), scores(some, grid, ious)
            for name in reported:
                drawn.setdefault(name, []).append((float(whole[name][0]), again[name]))
        if masked.any() and all(one.curves.pixels is not None for one in runs):
            assert run.curves.pixels is not None
            pixels = run.curves.pixels[rows[masked]]
            drawn.setdefault("pxap", []).append(
                (float(pixel_precision(pixels)[0]), drawn_precision(pixels, draws, seed))
            )
    rows_of = [runs[0].rows[i] for i in shared[0]]
    boxes, masks = ([row for row, has in zip(rows_of, some, strict=True) if has] for some in (boxed, masked))
    counted = dict.fromkeys(reported, tally(boxes)) | {"pxap": tally(masks)}
    unmasked = [key for key, has in zip(alike, masked, strict=True) if masked.any() and not has]
    called = names(runs)
    return {
        "runs": called,
        "fixed": fixed,
        **tally(rows_of),
        "draws": draws,
        "scores": {
            metric: [
                {"value": 100 * value, "interval": list(interval(100 * values))} | counted[metric]
                for value, values in found
            ]
            for metric, found in drawn.items()
        },
        "differences": [
            {
                "metric": metric,
                "run": called[i],
                "against": called[0],
                "difference": 100 * (found[i][0] - found[0][0]),
                "interval": list(interval(100 * (found[i][1] - found[0][1]))),
                "better": float((found[i][1] > found[0][1]).mean()),
            }
            for metric, found in drawn.items()
            for i in range(1, len(runs))
        ],
        "unshared": _unshared(called, places, everywhere, alike, unmasked),
        "protocol": _protocols(runs, called),
    }


def names(runs: Sequence[Run]) -> list[str]:
    """Return the runs' names, with their folders or numbers where two are the same."""
    found: list[str] = []
    often = Counter(run.name for run in runs)
    for run in runs:
        own = f"{run.name} in {run.folder.name}" if often[run.name] > 1 and run.folder is not None else run.name
        name, number = own, 1
        while name in found:
            number += 1
            name = f"{own} ({number})"
        found.append(name)
    return found


def _one_truth(runs: Sequence[Run], places: Sequence[dict[tuple[str, int], int]], key: tuple[str, int]) -> bool:
    rows = [run.rows[place[key]] for run, place in zip(runs, places, strict=True)]
    usable = {row["masks"] for row in rows} - {0}  # 0 also where a mask could not be read
    truths = [np.asarray(row["truth"], np.float64).reshape(-1, 4) for row in rows]
    # Formats that hold shares of the photo bring boxes back with other last digits.
    same = all(truth.shape == truths[0].shape and np.allclose(truth, truths[0], atol=1e-3) for truth in truths)
    return same and len(usable) <= 1


def _unshared(
    called: Sequence[str],
    places: Sequence[dict[tuple[str, int], int]],
    everywhere: Sequence[tuple[str, int]],
    alike: Sequence[tuple[str, int]],
    unmasked: Sequence[tuple[str, int]],
) -> list[dict[str, Any]]:
    """Return which photos were left out, and why."""
    both, same = set(everywhere), set(alike)
    found = [
        (f"only in some runs, among them {name}", [key for key in place if key not in both])
        for name, place in zip(called, places, strict=True)
    ]
    found.append(("true boxes or the number of masks differ", [key for key in everywhere if key not in same]))
    found.append(("without a usable mask in some run, so not in PxAP", list(unmasked)))
    return [{"reason": r, "count": len(k), "photos": [name for name, _ in k[:NAMED]]} for r, k in found if k]


def _protocols(runs: Sequence[Run], called: Sequence[str]) -> list[dict[str, Any]]:
    """Return the settings that differ, with each run's; the class of the maps only among runs that have one."""
    all_of = []
    for run in runs:
        data, fixed = run.info.get("data", {}), fixed_threshold(run.info)
        all_of.append(
            {key: value for key, value in run.info["protocol"].items() if key not in ("draws", "seed")}
            | {key: run.info["method"].get(key) for key in ("gt_map", "missing", "predictions")}
            | {"threshold": "the best" if fixed is None else fixed}
            | {"any_object": bool(data.get("any_object")), "counted": ", ".join(data.get("counted", ())) or "none"}
        )
    found = []
    for key in sorted({key for one in all_of for key in one}):
        values = [one.get(key) for one in all_of]
        if len({str(value) for value in values if value is not None}) > 1:
            found.append({"setting": key, "values": dict(zip(called, values, strict=True))})
    return found
