"""One HTML page that shows every stage between photo and box."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import PIL.Image
import torch
from torch import Tensor

import molt
from molt._files import user_path, whole_file
from molt.classes import OBJECT, OBJECT_NAME
from molt.data.samples import SamplePhoto
from molt.localizer import Explanation
from molt.methods import Seeded
from molt.overlay import cluster_overlay, draw_boxes, heat_overlay
from molt.structures import Localization, SawMasks, WeightsInfo

MAX_BYTES = 5_000_000
PYTHON_LINES = """\
import molt
loc = molt.Localizer()
for result in loc("my_photos"): result.plot().save(f"{result.source.stem}-boxes.jpg")"""
SHELL_LINE = "molt localize my_photos"

# Largest side in pixels and JPEG quality of a picture; the first that keeps the page below MAX_BYTES is taken.
TILES, LEAST_BYTES = 8, 0.06  # tiles a photo and bytes a pixel, both on the low side: what is surely too large
_SIZES = ((720, 82), (480, 78), (320, 72), (200, 65), (120, 55))

_MASKS: dict[SawMasks, str] = {
    "no": "no: trained on image labels, or on no labels at all",
    "probably": "probably: pixel masks were most likely used in its training",
    "unknown": "unknown",
}

TITLE = "<title>molt: from photo to box</title>"

_STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --card: #ffffff; --text: #1d2226; --soft: #5b646c;
  --line: #dfe3e6; --accent: #0b6b6b; --code: #f1f3f4; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14181b; --card: #1c2125; --text: #e8ebed; --soft: #a3adb5; --line: #31383e; --accent: #6cc5c0;
    --code: #242a2f; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%; overflow-wrap: break-word; }
main { max-width: 1060px; margin: 0 auto; padding: 40px 24px 56px; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 12px; }
h2 { font-size: 1.35rem; line-height: 1.3; letter-spacing: -.01em; margin: 0 0 4px; }
h3 { font-size: 1rem; margin: 0 0 8px; }
p { margin: 0 0 10px; max-width: 44rem; }
.soft { color: var(--soft); }
.lead { font-size: 1.08rem; }
section { margin-top: 52px; padding-top: 28px; border-top: 1px solid var(--line); }
.found { margin-bottom: 4px; max-width: none; }
.found b { color: var(--accent); }
.credit { font-size: .875rem; margin-bottom: 18px; }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 10px; font-size: .875rem; margin-top: 16px; }
.scale { display: flex; align-items: center; gap: 8px; margin-right: 14px; }
.legend img { display: block; width: 150px; height: 10px; border-radius: 5px; }
.stages { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 22px 18px; margin: 0; padding: 0;
  list-style: none; }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 6px; background: var(--code); }
figcaption { font-size: .875rem; line-height: 1.45; color: var(--soft); margin-top: 8px; }
figcaption b { display: block; color: var(--text); font-size: .9375rem; }
.beside { margin-top: 28px; }
.beside h3 { margin-bottom: 4px; }
.beside .found { margin-bottom: 14px; }
.last img { outline: 2px solid var(--accent); outline-offset: 2px; }
.cards { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; margin-top: 18px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px 18px; }
.card h3 { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .875rem; }
dl { margin: 0; font-size: .9rem; }
dt { color: var(--soft); font-size: .8125rem; margin-top: 8px; }
dd { margin: 0; }
pre { background: var(--code); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; margin: 0 0 18px;
  overflow-x: auto; font: .875rem/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
footer { margin-top: 40px; font-size: .8125rem; color: var(--soft); }
@media (max-width: 640px) {
  main { padding: 24px 16px 40px; }
  h1 { font-size: 1.6rem; }
  section { margin-top: 40px; padding-top: 24px; }
  .stages { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 18px 12px; }
  .last { grid-column: 1 / -1; }
  .cards { grid-template-columns: minmax(0, 1fr); }
  figcaption { font-size: .8125rem; }
}
"""


@dataclass(frozen=True, eq=False)
class Beside:
    """A second method, whose stages stand below those of the first.

    Attributes:
        title: over its stages.
        about: what to know of it, said once at the top of the page.
        explanations: one a photo, in the order of the photos; none where the method is left out. A photo whose
            ``group`` is None shows none of its classes, so that whatever it names is wrong.
    """

    title: str
    about: str
    explanations: Sequence[Explanation]


def write_page(
    path: str | Path,
    items: Sequence[tuple[SamplePhoto, Explanation]],
    weights: Sequence[WeightsInfo],
    min_probability: float = 0.3,
    *,
    guide: bool = True,
    beside: Beside | None = None,
) -> Path:
    """Write one HTML file that shows every stage of each photo and asks for nothing outside itself.

    Args:
        path: the file; it appears under this name only once it is whole. Its folder is made where there is none.
        items: photos and what :meth:`molt.Localizer.explain` returned for them, in the order shown. The more there
            are, the smaller the pictures, so that the page stays below 5 MB (up to some 100 photos).
        weights: one WeightsInfo a network that was used.
        min_probability: in [0, 1]: a class is named only where its probability is above this, else it is 'object'.
        guide: False leaves out how to go on with photos of one's own.
        beside: a second method to show below the first.

    Returns:
        The path.

    Raises:
        ValueError: min_probability out of range.
        OSError: the file cannot be written.
    """
    if not 0 <= min_probability <= 1:
        raise ValueError(f"min_probability must be in [0, 1], got {min_probability}")
    path = user_path(path)
    for size, quality in _SIZES:
        shown = len(items) + (len(beside.explanations) if beside is not None else 0)
        if size != _SIZES[-1][0] and shown * TILES * size**2 * LEAST_BYTES > MAX_BYTES:
            continue
        text = "".join(_page(items, weights, min_probability, size, quality, guide, beside))
        if len(text.encode(errors="backslashreplace")) < MAX_BYTES:
            break
    with whole_file(path) as part:
        # A name may hold what is no text.
        part.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    return path


def is_page(path: Path) -> bool:
    """Return whether a file may be replaced by a page: there is none, or it is a page of molt."""
    if not path.exists():
        return True
    with path.open("rb") as file:
        return TITLE.encode() in file.read(2000)


def shown_names(explanation: Explanation, min_probability: float) -> list[str]:
    """Return a name for every box: the class where its probability is above ``min_probability``, else 'object'."""
    result = explanation.result
    return [
        name.split(",")[0] if chance > min_probability else OBJECT_NAME
        for name, chance in zip(result.names, _chances(explanation), strict=True)
    ]


def _chances(explanation: Explanation) -> list[float]:
    """Return the probability of every box's class, or where several classes were looked for what it is at least."""
    result = explanation.result
    if len(set(result.classes.tolist())) == 1:
        return [explanation.class_probability] * len(result)
    return list(result.scores.tolist())  # a score is a probability times a share


def _page(
    items: Sequence[tuple[SamplePhoto, Explanation]],
    weights: Sequence[WeightsInfo],
    min_probability: float,
    size: int,
    quality: int,
    guide: bool,
    beside: Beside | None,
) -> Iterator[str]:
    lead = items[0][1].captions.lead if items else Seeded.captions.lead
    about = f"<p><b>{escape(beside.title)}:</b> {escape(beside.about)}</p>\n" if beside is not None else ""
    named = ""
    if min_probability > 0:
        named = f"""<p class="soft">A class is named here only where its probability is above {min_probability:.0%};
otherwise it says &lsquo;object&rsquo;.</p>
"""
    yield f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<link rel="icon" href="data:,">
{TITLE}
<style>{_STYLE}</style>
</head>
<body>
<main>
<header>
<h1>From photo to box, step by step</h1>
<p class="lead">molt finds the object in a photo without box annotations: {escape(lead)}.</p>
{about}{named}<p class="legend soft"><span>Heat maps:</span><span class="scale">low {_legend(quality)} high</span>
<span>Clusters: colours only tell groups apart.</span></p>
</header>
"""
    second = beside.explanations if beside is not None else ()
    for number, (photo, explanation) in enumerate(items):
        more = ""
        if beside is not None and second:
            more = _second(photo, beside.title, second[number], min_probability, size, quality)
        yield _section(photo, explanation, min_probability, size, quality, more)
    yield _weights(weights)
    if guide:
        yield _guide()
    yield f"""<footer>Made by molt {escape(molt.__version__)}; this file holds everything it shows.</footer>
</main>
</body>
</html>
"""


def _guide() -> str:
    return f"""<section id="yours">
<h2>Your own photos</h2>
<p>Put some photos of your own in a folder, here called <code>my_photos</code>. In a shell, this writes a picture with
the boxes for every photo, and a page like this one:</p>
<pre id="shell">{escape(SHELL_LINE)}</pre>
<p>These three lines of Python do the same:</p>
<pre id="python">{escape(PYTHON_LINES)}</pre>
</section>
"""


def _section(
    photo: SamplePhoto, explanation: Explanation, min_probability: float, size: int, quality: int, more: str = ""
) -> str:
    credit = f'<p class="credit soft">Photo: {escape(photo.credit)}</p>\n' if photo.credit else ""
    return f"""<section class="photo">
<h2>{escape(photo.name)}</h2>
<p class="found">{_found(explanation, min_probability)}</p>
{credit}{_tiles(photo.name, explanation, min_probability, size, quality)}
{more}</section>
"""


def _second(
    photo: SamplePhoto, title: str, explanation: Explanation, min_probability: float, size: int, quality: int
) -> str:
    """Return the stages of the second method, which cannot name a photo that shows none of its classes."""
    found = _found(explanation, min_probability)
    if len(explanation.result):
        name = explanation.result.names[0]
        if photo.group is None:
            chance = _chances(explanation)[0]
            found = (
                f"Likeliest of its classes: <b>{escape(name)}</b> <span class='soft'>(probability {chance:.2f}), wrong "
                "by necessity, as the photo shows none of them: look at the maps, not at the name.</span>"
            )
            min_probability = 1.0
        elif name != photo.group:
            found += f" <span class='soft'>That is the wrong class: it is a {escape(photo.group)}.</span>"
    tiles = _tiles(f"{photo.name}, {title}", explanation, min_probability, size, quality, photo=False)
    return f"""<div class="beside">
<h3>{escape(title)}</h3>
<p class="found">{found}</p>
{tiles}
</div>
"""


def _tiles(
    name: str, explanation: Explanation, min_probability: float, size: int, quality: int, *, photo: bool = True
) -> str:
    picture = explanation.photo.convert("RGB")
    picture.thumbnail((size, size))
    stages = list(_stages(explanation, picture, min_probability))[0 if photo else 1 :]
    tiles = "\n".join(
        f'<li{kind}><figure><img src="{_data(tile, quality)}" width="{tile.width}" height="{tile.height}" '
        f'alt="{escape(f"{name}: {title}")}"><figcaption><b>{number}. {escape(title)}</b>{escape(caption)}'
        "</figcaption></figure></li>"
        for number, (kind, title, caption, tile) in enumerate(stages, 1)
    )
    return f'<ol class="stages">\n{tiles}\n</ol>'


def _stages(
    explanation: Explanation, picture: PIL.Image.Image, min_probability: float
) -> Iterator[tuple[str, str, str, PIL.Image.Image]]:
    """Yield (attributes, title, caption, picture) of each stage."""
    result = explanation.result

    def heat(values: Tensor) -> PIL.Image.Image:
        return heat_overlay(picture, values)

    yield "", "Photo", "What goes in.", picture
    said = explanation.captions
    if explanation.attention is not None:
        attended = "Where the network's class token looks at the finest scale, whatever the class."
        yield "", "Attention", attended, heat(explanation.attention)
    title, caption = said.cam
    yield "", title, caption, heat(explanation.cam)
    title, caption = said.scale
    for (height, width), values in explanation.scale_maps:
        size = f"{width}\u00d7{height}"
        side = f"{width if width == height else size}\u00a0px"
        yield "", title.format(side=side), caption.format(size=size), heat(values)
    yield "", "All scales together", said.fused, heat(explanation.fused)
    number = explanation.clusters.unique().numel()
    groups = f"{number} group{'' if number == 1 else 's'}"
    yield "", "Clusters", said.clusters.format(groups=groups), cluster_overlay(picture, explanation.clusters)
    refined = "Each pixel is pulled towards the mean of its cluster, so that the map keeps to outlines."
    yield "", "Refined map", refined, heat(explanation.refined)
    if len(result):
        names = shown_names(explanation, min_probability)
        boxes = draw_boxes(_spotlight(picture, result), result.boxes, names, None, result.size)
        named = ", ".join(dict.fromkeys(names))
        box = f"Encloses the largest part where the refined map is high. Shown as: {named}."
    else:
        boxes, box = picture, "The refined map has no part to enclose."
    yield ' class="last"', "Box", box, boxes


def _spotlight(picture: PIL.Image.Image, result: Localization) -> PIL.Image.Image:
    """Return the picture dimmed outside the boxes, which thin lines on a small tile would not make plain."""
    mask = PIL.Image.new("L", picture.size)
    across, down = picture.width / result.size[0], picture.height / result.size[1]
    for x0, y0, x1, y1 in result.boxes.tolist():
        mask.paste(255, (round(x0 * across), round(y0 * down), round(x1 * across), round(y1 * down)))
    dimmed = PIL.Image.blend(picture, PIL.Image.new("RGB", picture.size, (24, 28, 32)), 0.6)
    return PIL.Image.composite(picture, dimmed, mask)


def _found(explanation: Explanation, min_probability: float) -> str:
    result = explanation.result
    if not len(result):
        return "Nothing found."
    chance = _chances(explanation)[0]
    name = shown_names(explanation, min_probability)[0]
    if int(result.classes[0]) == OBJECT:
        why = "no class was asked for"
    elif name == OBJECT_NAME:
        why = f"the likeliest class has a probability of only {chance:.2f}, so it is not named"
    else:
        why = f"probability {chance:.2f}"
    x0, y0, x1, y1 = (f"{value:.0f}" for value in result.boxes[0].tolist())
    width, height = result.size
    return (
        f"Found: <b>{escape(name)}</b> <span class='soft'>({why}), from ({x0}, {y0}) to ({x1}, {y1}) in the "
        f"{width}\u00d7{height} photo.</span>"
    )


def _weights(weights: Sequence[WeightsInfo]) -> str:
    cards = []
    for info in weights:
        values = info.to_json()
        rows = (
            ("Weights from", values["source"]),
            ("Saw pixel masks in training", _MASKS.get(values["saw_masks"], values["saw_masks"])),
            ("molt's threshold on these weights", values["threshold"]),
        )
        entries = "".join(f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in rows)
        cards.append(f'<div class="card"><h3>{escape(values["model"])}</h3><dl>{entries}</dl></div>')
    note = ""
    if any(info.saw_masks != "no" for info in weights):
        note = (
            "<p>Not all of these weights are known to be free of masks, so the maps above may be better than image "
            "labels alone allow. <code>molt.Localizer(weights=&quot;weak&quot;)</code> uses image labels only.</p>"
        )
    return f"""<section id="weights">
<h2>The networks behind it</h2>
<p class="soft">Where each network's weights came from, and whether they had seen more than image labels.</p>
{note}<div class="cards">{"".join(cards)}</div>
</section>
"""


def _legend(quality: int) -> str:
    ramp = heat_overlay(PIL.Image.new("RGB", (256, 16), (150, 150, 150)), torch.linspace(0, 1, 256)[None])
    return f'<img src="{_data(ramp, quality)}" width="256" height="16" alt="colour scale from dark blue to yellow">'


def _data(picture: PIL.Image.Image, quality: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
