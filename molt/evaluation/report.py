"""One HTML file about one or more runs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import PIL.Image
import PIL.ImageDraw
import torch
from markupsafe import Markup

import molt
from molt._files import whole_file
from molt.data.annotations import Sample
from molt.data.images import load_photo
from molt.evaluation._report_page import MARK, STYLE, TEMPLATE
from molt.evaluation._svg import Line, colour, plot
from molt.evaluation.compare import names
from molt.evaluation.maps import prepare
from molt.evaluation.runs import Map, Run
from molt.evaluation.scores import title as title_of
from molt.evaluation.summary import fixed_threshold, in_words, protocol_line, units
from molt.overlay import heat_overlay

MAX_BYTES = 5_000_000
CLASSES, PROBLEMS, PICTURES = 50, 50, 8
# Largest side in pixels and JPEG quality of a picture; the first that keeps the page below MAX_BYTES is taken.
_SIZES = ((360, 78), (240, 72), (140, 60), (0, 0))
_ERRORS = {
    "right": ("right", 2),
    "part": ("a part of the object", 4),
    "more": ("more than the object", 5),
    "multi_instance": ("several objects in one", 3),
    "wrong": ("elsewhere", 1),
}
_TRUE, _FOUND = (255, 255, 255), (255, 150, 0)


def write_report(
    path: str | Path,
    runs: Sequence[Run],
    *,
    comparison: Mapping[str, Any] | None = None,
    samples: Sequence[Sample] = (),
    maps: Callable[[Sequence[Sample]], Iterable[Map]] | None = None,
) -> Path:
    """Write one HTML file that shows scores, where they come from, and the best and worst photos.

    It asks for nothing outside itself and is smaller than 5 MB.

    Args:
        path: the file; it appears under this name only once it is whole.
        runs: one or more; of a single one the best and worst photos are shown.
        comparison: what :func:`molt.evaluation.compare.compare` returned for them.
        samples: of a single run, for its photos.
        maps: as for :func:`molt.evaluation.runs.evaluate`, for the heat maps of the photos shown; None shows none.

    Returns:
        The path.

    Raises:
        ValueError: no run, or one whose figures are damaged.
        FileExistsError: a file of that name that is no such report.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if not runs:
        raise ValueError("runs must hold at least one run, got none")
    if path.exists():
        with path.open("rb") as file:
            if MARK.encode() not in file.read(4000):
                raise FileExistsError(f"{path}: a file of that name is there, which molt evaluate did not write")
    shown = _shown(runs[0], samples, maps) if len(runs) == 1 else []
    text = ""
    for size, quality in _SIZES:
        try:
            text = _page(runs, comparison, shown, size, quality)
        except (KeyError, TypeError, AttributeError, jinja2.TemplateError) as error:
            raise ValueError(f"runs {', '.join(names(runs))} hold figures that do not fit ({error})") from error
        if len(text.encode(errors="replace")) < MAX_BYTES:
            break
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    return path


def _page(
    runs: Sequence[Run], comparison: Mapping[str, Any] | None, shown: list[tuple[str, list]], size: int, quality: int
) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    pictures = [
        (group, [_picture(row, sample, heat, size, quality) for row, sample, heat in chosen]) for group, chosen in shown
    ]
    first = runs[0].info["data"]
    title = f"{runs[0].name} on {first['name']}" if len(runs) == 1 else f"{len(runs)} runs on {first['name']}"
    page = environment.from_string(TEMPLATE).render(
        title=title,
        lead=[f"{in_words(first)} of {first['classes']} classes"],
        style=Markup(STYLE),
        comparison=comparison,
        runs=[_about(run, name, pictures) for run, name in zip(runs, names(runs), strict=True)],
        version=molt.__version__,
        colour=colour,
        metric_name=lambda name, fixed: title_of(name, fixed=fixed),
        counted=in_words,
        units=units,
        error_name=lambda kind: _ERRORS.get(kind, (str(kind), 6))[0],
        error_colour=lambda kind: _ERRORS.get(kind, ("", 6))[1],
    )
    return page.lstrip()


def _about(run: Run, name: str, pictures: list[tuple[str, list]]) -> dict[str, Any]:
    """Return what the page says of a run."""
    info = run.info
    fixed = fixed_threshold(info)
    lines = []
    for entry in info["by_iou"] if fixed is None else ():
        said = "largest contour" if entry["kind"] == "v1" else "any contour"
        values = [value / 100 for value in info["curves"][f"{entry['kind']} {entry['iou']:g}"]]
        mark = max(range(len(values)), key=values.__getitem__)
        lines.append(Line(f"{said}, IoU {entry['iou']:g}", values, mark))
    classes = sorted(info["classes"], key=lambda row: (row["max_box_acc"], row["mean_iou"], row["name"]))
    sizes = [
        row | {"title": f"{row['name']}, {100 * row['least']:.1f} to {100 * row['most']:.1f} %"}
        for row in info["sizes"]
    ]
    return {
        "name": name,
        "info": info,
        "protocol": protocol_line(info),
        "fixed": fixed is not None,
        "plot": Markup(plot(lines, "threshold, share of the map's maximum", "accuracy")) if lines else None,
        "lines": [line.name for line in lines],
        "sizes": sizes,
        "classes": [row | {"title": row["name"]} for row in classes[:CLASSES]],
        "more_classes": max(0, len(classes) - CLASSES),
        "problems": info["problems"]["listed"][:PROBLEMS],
        "pictures": pictures,
    }


def _shown(
    run: Run, samples: Sequence[Sample], maps: Callable[[Sequence[Sample]], Iterable[Map]] | None
) -> list[tuple[str, list]]:
    """Return the best and the worst photos of a run with their maps, under a heading each."""
    here = {(sample.name, sample.label): sample for sample in samples}
    ranked = sorted((row for row in run.rows if row["iou"] is not None), key=lambda row: -row["iou"])
    ranked = [row for row in ranked if (row["name"], row["label"]) in here]
    number = min(PICTURES, (len(ranked) + 1) // 2)
    groups = [("Best photos", ranked[:number]), ("Worst photos", ranked[number:][::-1][:number])]

    def heat(row: Mapping[str, Any]) -> torch.Tensor | None:
        if maps is None:
            return None
        found = next(iter(maps([here[row["name"], row["label"]]])), None)
        if found is None or isinstance(found, Exception):
            return None
        settings = run.settings
        try:
            values = prepare(found, settings.size, resize=settings.resize, normalize=settings.normalize)
        except ValueError:  # listed among the problems
            return None
        return torch.from_numpy(values)

    return [
        (title, [(row, here[row["name"], row["label"]], heat(row)) for row in rows]) for title, rows in groups if rows
    ]


def _picture(
    row: Mapping[str, Any], sample: Sample, heat: torch.Tensor | None, size: int, quality: int
) -> dict[str, Any]:
    """Return a photo with heat map and boxes as a data URI, and what stands below it."""
    about = {"name": row["name"], "label": row["class"], "iou": row["iou"], "error": row["error"]}
    about |= {"data": "", "note": ""}
    if not size:
        return about
    try:
        picture = load_photo(sample.path)
    except (ValueError, OSError) as error:
        return about | {"note": f"no picture: {error}"}
    picture.thumbnail((size, size))
    if heat is not None:
        picture = heat_overlay(picture, heat)
    if row["width"]:
        scale = (picture.width / row["width"], picture.height / row["height"])
        for box in row["truth"]:
            _draw(picture, box, scale, _TRUE)
        if row["box"]:
            _draw(picture, row["box"], scale, _FOUND)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, optimize=True)
    return about | {"data": "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")}


def _draw(
    picture: PIL.Image.Image, box: Sequence[float], scale: tuple[float, float], colour: tuple[int, int, int]
) -> None:
    across, down = scale
    x0, x1 = (min(max(float(v) * across, 0), picture.width - 1) for v in (box[0], box[2]))
    y0, y1 = (min(max(float(v) * down, 0), picture.height - 1) for v in (box[1], box[3]))
    x1, y1 = max(x0, x1), max(y0, y1)
    draw = PIL.ImageDraw.Draw(picture)
    # A dark rim keeps the line visible on any ground.
    draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline="black", width=5)
    draw.rectangle((x0, y0, x1, y1), outline=colour, width=3)
