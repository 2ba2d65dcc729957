"""What an ablation found, drawn as SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from molt._files import whole_file
from molt._words import count
from molt.benchmark.ablation_backbones import BACKBONES
from molt.benchmark.ablation_clusters import CLUSTERERS, CLUSTERS, NONE
from molt.benchmark.ablation_networks import PRODUCT
from molt.benchmark.ablation_scales import HEADS, SCALES

COLOURS = ("#d1495b", "#30638e", "#e6a23c", "#5b8c5a", "#8d6a9f", "#6b7a86", "#2b2b2b")
MARKS = ("o", "s", "D", "^", "v", "P", "X")
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
SCORE = "MaxBoxAccV2, %"
Report = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]


def need_matplotlib() -> None:
    """Raise ImportError, with what to do, where plots cannot be drawn."""
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib; --no-plots goes without") from error


def draw(report: Report, folder: Path) -> list[Path]:
    """Write the plots of what was measured and return their files.

    ``scales.svg``, ``heads.svg`` and ``backbones.svg``: scores with intervals; ``sizes.svg``: scores by size of
    object; ``clusters.svg``: score against the measured number of clusters, bars from the worst to the best seed;
    ``alphas.svg``: score against the weight of the cluster mean.

    Args:
        report: what :func:`molt.benchmark.ablation.run` returned.
        folder: where they go.

    Raises:
        ImportError: no matplotlib.
    """
    need_matplotlib()
    findings = report["findings"]
    ran = [row for row in report["rows"] if row["status"] == "ran"]
    of = {group: [row for row in ran if row["group"] == group] for group in (SCALES, HEADS, BACKBONES)}
    wanted: list[tuple[str, bool, Callable[[Path], None]]] = [
        ("scales.svg", bool(of[SCALES]), lambda path: _bars(path, of[SCALES])),
        ("heads.svg", bool(of[HEADS]), lambda path: _bars(path, of[HEADS])),
        ("backbones.svg", bool(of[BACKBONES]), lambda path: _bars(path, of[BACKBONES])),
        ("sizes.svg", SCALES in findings, lambda path: _sizes(path, findings[SCALES]["sizes"], of[SCALES])),
        ("clusters.svg", bool(findings.get(CLUSTERS)), lambda path: _clusters(path, findings[CLUSTERS], ran)),
        ("alphas.svg", bool(findings.get(CLUSTERERS)), lambda path: _alphas(path, findings[CLUSTERERS])),
    ]
    written = []
    for name, there, make in wanted:
        if there:
            make(folder / name)
            written.append(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)  # of an earlier run with other groups
    return written


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, list[Any]]:
    """Return a figure that belongs to no window, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, sharey=columns > 1)
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure, list(axes[0])


def _save(figure: Any, path: Path) -> None:
    """Write a figure as the same bytes each time, without the spaces that matplotlib leaves at line ends."""
    import io

    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "molt", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    with whole_file(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _bars(path: Path, rows: Rows) -> None:
    """One row a line: its score and interval."""
    figure, (ax,) = _figure(8, 1 + 0.27 * len(rows))
    places = np.arange(len(rows))[::-1]
    for place, row in zip(places, rows, strict=True):
        colour = COLOURS[0] if row["baseline"] is None else COLOURS[1]
        ax.plot(row["interval"], [place, place], color=colour, linewidth=2, solid_capstyle="butt")
        ax.plot(row["score"], place, "o", color=colour, markersize=6)
    ax.set_yticks(places, [row["name"] for row in rows], fontsize=8)
    ax.set_xlabel(SCORE)
    figure.suptitle("bars: 95 % interval; red: what others are compared with", fontsize=8)
    _save(figure, path)


def _sizes(path: Path, sizes: Rows, rows: Rows) -> None:
    """One line a single scale, and the fused and refined map, over terciles of object size."""
    shown = [
        row["name"]
        for row in rows
        if row["refined"] or (row["map"] == PRODUCT and (len(row["scales"]) == 1 or row["baseline"] is None))
    ]
    figure, (ax,) = _figure(9, 4.5)
    for i, name in enumerate(shown):
        found = [next(row for row in part["rows"] if row["name"] == name) for part in sizes]
        scores = np.array([row["score"] for row in found])
        low, high = np.array([row["interval"] for row in found]).T
        at = np.arange(len(sizes)) + 0.06 * (i - len(shown) / 2)
        errors = np.maximum([scores - low, high - scores], 0)
        ax.errorbar(at, scores, errors, label=name, color=_colour(i), marker=_mark(i), capsize=2, markersize=6)
    titles = [
        f"{part['name']}\n{part['least']:.0%} to {part['most']:.0%} of the photo\n{count(part['photos'], 'photo')}"
        for part in sizes
    ]
    ax.set_xticks(range(len(sizes)), titles)
    ax.set_ylabel(SCORE)
    _legend(figure, ax)
    _save(figure, path)


def _clusters(path: Path, points: Rows, rows: Rows) -> None:
    """One panel an alpha, one line a family."""
    alphas = list(dict.fromkeys(str(point["alpha"]) for point in points))
    families = list(dict.fromkeys(str(point["family"]) for point in points))
    plain = next((row for row in rows if row["group"] == CLUSTERS and row["name"] == NONE), None)
    figure, axes = _figure(2.5 + 4.5 * len(alphas), 4.5, len(alphas))
    for ax, alpha in zip(axes, alphas, strict=True):
        for i, family in enumerate(families):
            own = [point for point in points if point["family"] == family and str(point["alpha"]) == alpha]
            own.sort(key=lambda point: point["clusters"])
            scores = np.array([point["score"] for point in own])
            seeds = [point["score_by_seed"] for point in own]
            errors = np.maximum([[s - min(v), max(v) - s] for s, v in zip(scores, seeds, strict=True)], 0).T
            ax.errorbar(
                [point["clusters"] for point in own],
                scores,
                errors,
                label=family,
                color=_colour(i),
                marker=_mark(i),
                capsize=2,
            )
        if plain is not None:
            ax.axhline(plain["score"], color="#2b2b2b", linestyle=":", label=NONE)
        ax.set_xscale("log")
        most = max(point["clusters"] for point in points)
        ax.set_xticks([tick for tick in TICKS if tick <= 1.3 * most], minor=False)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
        ax.set_xlabel("clusters a photo, measured (mean)")
        ax.set_title(f"alpha {alpha}", fontsize=10)
    axes[0].set_ylabel(f"{SCORE} (bars: worst to best seed)")
    _legend(figure, axes[0])
    _save(figure, path)


def _alphas(path: Path, curves: Rows) -> None:
    """One panel a kind of map, one line a clusterer; the star is alpha auto at its mean weight."""
    maps = list(dict.fromkeys(str(curve["map"]) for curve in curves))
    ways = list(dict.fromkeys(str(curve["clusterer"]) for curve in curves))
    figure, axes = _figure(2 + 3.8 * len(maps), 4.2, len(maps))
    for ax, name in zip(axes, maps, strict=True):
        for curve in (curve for curve in curves if curve["map"] == name):
            i = ways.index(curve["clusterer"])
            ax.plot(curve["alphas"], curve["scores"], color=_colour(i), marker=_mark(i), label=curve["clusterer"])
            if curve["auto"] is not None:
                ax.plot(curve["auto"]["mean_alpha"], curve["auto"]["score"], "*", color=_colour(i), markersize=13)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("alpha (star: auto, at its mean)")
    axes[0].set_ylabel(SCORE)
    _legend(figure, axes[0])
    _save(figure, path)


def _legend(figure: Any, ax: Any) -> None:
    """Name the lines of a panel, which all panels share, beside the plot."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _mark(place: int) -> str:
    return MARKS[place % len(MARKS)]
