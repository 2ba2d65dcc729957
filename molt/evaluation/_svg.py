"""Line plots as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Told apart by people with colour blindness too (after Okabe and Ito), on light and dark grounds.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8f8f8f", "#b3a200")
WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 40
POINTS = 250


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        name: in the legend.
        y: values in [0, 1], evenly spaced over x from 0 to 1.
        mark: index of the value to mark, or None.
    """

    name: str
    y: Sequence[float]
    mark: int | None = None


def colour(index: int) -> str:
    """Return the colour of a line by number; it repeats after eight."""
    return COLOURS[index % len(COLOURS)]


def plot(lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """Return an SVG element of lines over [0, 1], which are thinned but keep their marks."""
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{y_label} against {x_label}")}" '
        'xmlns="http://www.w3.org/2000/svg">'
    ]
    for step in range(6):
        value = step / 5
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_y(value)}" y2="{_y(value)}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{_y(value) + 4}" text-anchor="end">{value:.0%}</text>')
        parts.append(f'<text x="{_x(value)}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{_x(0.5)}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    for number, line in enumerate(lines):
        count = len(line.y)
        every = max(1, count // POINTS)
        kept = sorted({*range(0, count, every), count - 1, *([line.mark] if line.mark is not None else [])})
        points = " ".join(f"{_x(i / count)},{_y(line.y[i])}" for i in kept if i >= 0)
        parts.append(f'<polyline fill="none" stroke="{colour(number)}" stroke-width="2" points="{points}"/>')
        if line.mark is not None:
            x, y = _x(line.mark / count), _y(line.y[line.mark])
            title = escape(f"{line.name}: {line.y[line.mark]:.2%} at {line.mark / count:.3g}")
            parts.append(f'<circle cx="{x}" cy="{y}" r="5" fill="{colour(number)}"><title>{title}</title></circle>')
    return "".join([*parts, "</svg>"])


def _x(value: float) -> float:
    return round(LEFT + value * (WIDTH - LEFT - RIGHT), 1)


def _y(value: float) -> float:
    return round(TOP + (1 - value) * (HEIGHT - TOP - BOTTOM), 1)
