"""What else boxes maps at many thresholds: OpenCV, level by level, and the evaluation of wsolevaluation as published.

All take the public operators' arguments, and give (P, 3) the image, channel and cut they looked at, and (R, 8) a row a
box: image, channel, cut, x0, y0, x1, y1, area.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molt.benchmark.peers_clusters import LOOPS
from molt.benchmark.registry import Kind, NotRun, Provider, given

Array = NDArray[Any]
Found = tuple[Array, Array]
Box = tuple[int, int, int, int, float]
Look = Callable[[Array, int], list[Box]]

THRESHOLDS = np.arange(0, 1, 0.001)


def contours_at(levels: Array, cut: int) -> list[Box]:
    """Contours of what is above a cut: edges and contourArea of each contour, in OpenCV's order."""
    import cv2

    _, kept = cv2.threshold(levels, cut, 255, cv2.THRESH_BINARY)
    found = cv2.findContours(kept, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[-2]
    boxes = []
    for contour in found:
        x, y, width, height = cv2.boundingRect(contour)
        boxes.append((x, y, x + width, y + height, cv2.contourArea(contour)))
    return boxes


def largest_contour_at(levels: Array, cut: int) -> list[Box]:
    """The box of the contour of largest contourArea, as published evaluations take it."""
    import cv2

    _, kept = cv2.threshold(levels, cut, 255, cv2.THRESH_BINARY)
    found = cv2.findContours(kept, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[-2]
    if not found:
        return []
    contour = max(found, key=cv2.contourArea)
    x, y, width, height = cv2.boundingRect(contour)
    return [(x, y, x + width, y + height, cv2.contourArea(contour))]


def components_at(levels: Array, cut: int) -> list[Box]:
    """Components of what is above a cut, by connectedComponentsWithStats."""
    import cv2

    _, kept = cv2.threshold(levels, cut, 255, cv2.THRESH_BINARY)
    _, _, stats, _ = cv2.connectedComponentsWithStats(kept, connectivity=8)
    return [(x, y, x + width, y + height, area) for x, y, width, height, area in stats[1:].tolist()]


def largest_component_at(levels: Array, cut: int) -> list[Box]:
    """The component of most pixels; of equal ones the first."""
    return sorted(components_at(levels, cut), key=lambda box: -box[4])[:1]


def distinct_cuts(levels: Array) -> list[int]:
    """Cuts between which something changes: each level of the map but the highest, and 0."""
    return [int(cut) for cut in np.union1d(levels, [0]) if cut < levels.max()]


def published_cuts(levels: Array) -> list[int]:
    """The cuts of 1000 thresholds, most of them several times."""
    return [int(threshold * np.max(levels)) for threshold in THRESHOLDS]


def _sweep(look: Look, cuts: Callable[[Array], list[int]], levels: Array, threads: int) -> Found:
    def one(where: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[tuple[float, ...]]]:
        own = levels[where]
        boxes = {cut: look(own, cut) for cut in cuts(own)}  # a cut that comes again is looked at again
        return [(*where, cut) for cut in boxes], [(*where, cut, *box) for cut, found in boxes.items() for box in found]

    maps = np.ndindex(*levels.shape[:2])
    if threads == 1:
        parts = [one(where) for where in maps]
    else:
        with ThreadPoolExecutor(threads) as pool:  # OpenCV lets go of the interpreter
            parts = list(pool.map(one, maps))
    pairs = [pair for own, _ in parts for pair in own]
    rows = [row for _, own in parts for row in own]
    return np.array(pairs, dtype=np.int64).reshape(-1, 3), np.array(rows, dtype=np.float64).reshape(-1, 8)


def _provider(
    name: str,
    kind: Kind,
    cuts: Callable[[Array], list[int]],
    *,
    largest: bool,
    threads: int = 1,
    most: int | None = None,
) -> Provider:
    def run(levels: Array, *, contours: bool, connectivity: int) -> Found:
        if connectivity != 8:
            raise NotRun("8 neighbours only")
        if kind == "published" and not contours:
            raise NotRun("published with contours only")
        looks = (contours_at, largest_contour_at) if contours else (components_at, largest_component_at)
        return _sweep(looks[largest], cuts, levels, threads)

    return Provider(
        name,
        kind,
        given(run),
        package="cv2",
        distribution="opencv-python-headless",
        devices=("cpu",),
        numpy=True,
        most_images=most,
    )


def sweep_providers(*, largest: bool) -> list[Provider]:
    """Peers of sweep_boxes, or of largest_at_cuts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [
        _provider("opencv", "peer", distinct_cuts, largest=largest),
        _provider("opencv_threads", "peer", distinct_cuts, largest=largest, threads=cores),
        _provider("published", "published", published_cuts, largest=largest, most=LOOPS),
    ]
