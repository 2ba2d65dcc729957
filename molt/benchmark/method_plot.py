"""Time against MaxBoxAccV2, a point a method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molt._files import whole_file
from molt._words import count

FILE = "methods.svg"
COLOURS = {"no": "#30638e", "unknown": "#8d99a6", "probably": "#d1495b"}


def draw(report: Mapping[str, Any], path: Path) -> bool:
    """Write an SVG of a report's rows that have both time and score; return whether there was any.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install 'molt-wsol[bench]'") from error

    rows = [row for row in report["rows"] if row["ms"] and row["score"] is not None and row["same_as"] is None]
    if not rows:
        return False
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "molt"}):
        figure = Figure(figsize=(7.5, 5), layout="constrained")
        axes = figure.add_subplot()
        for row in rows:
            low, high = row["interval"]
            colour = COLOURS[row["saw_masks"]]
            axes.plot([row["ms"]] * 2, [low, high], color=colour, linewidth=1, alpha=0.4)
            axes.plot(row["ms"], row["score"], "o", color=colour)
            axes.annotate(row["name"], (row["ms"], row["score"]), (5, 4), textcoords="offset points", fontsize=8)
        for said in dict.fromkeys(row["saw_masks"] for row in rows):
            axes.plot([], [], "o", color=COLOURS[said], label=f"weights saw masks: {said}")
        axes.set_xscale("log")
        axes.set_xlabel(f"ms a photo, to the map ({report['device']}, batch {report['batch']})")
        axes.set_ylabel("MaxBoxAccV2, %, with 95 % interval")
        axes.set_title(f"{report['of']['data']['name']}, {count(report['of']['data']['photos'], 'photo')}", fontsize=10)
        axes.grid(alpha=0.2)
        axes.legend(fontsize=8, loc="lower right")
        with whole_file(path) as part:
            FigureCanvasSVG(figure).print_svg(part, metadata={"Date": None})
    return True
