"""A contact sheet of photos with their boxes, for composites.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import PIL.ImageDraw

TILE, COLUMNS, ROWS = 224, 8, 6
CAPTION = 14
LABELLED, OTHER = "#00e000", "#ff4040"

Box = tuple[int, int, int, int]


def draw_sheet(photos: Sequence[tuple[Path, Sequence[tuple[str, Box]]]]) -> PIL.Image.Image:
    """Return up to 48 photos, spread evenly over those given, with class and box of their objects.

    Args:
        photos: file and (class, box xyxy in pixels) of each object, the labelled one, drawn green, first.
    """
    step = max(1.0, len(photos) / (COLUMNS * ROWS))
    chosen = [photos[int(i * step)] for i in range(min(len(photos), COLUMNS * ROWS))]
    rows = -(-len(chosen) // COLUMNS)
    sheet = PIL.Image.new("RGB", (COLUMNS * TILE, rows * (TILE + CAPTION)), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for place, (path, objects) in enumerate(chosen):
        x, y = place % COLUMNS * TILE, place // COLUMNS * (TILE + CAPTION)
        with PIL.Image.open(path) as photo:
            scale = TILE / photo.width
            sheet.paste(photo.resize((TILE, TILE), PIL.Image.Resampling.BICUBIC), (x, y))
        for (_, box), colour in reversed(list(zip(objects, (LABELLED, OTHER), strict=False))):
            x0, y0, x1, y1 = (round(side * scale) for side in box)
            draw.rectangle((x + x0, y + y0, x + x1 - 1, y + y1 - 1), outline=colour)
        draw.text((x + 3, y + TILE + 1), " | ".join(name for name, _ in objects), fill="black")
    return sheet
