"""`molt demo`: a page that shows every stage on sample photos."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from molt.cli._progress import Progress
from molt.cli._say import take_out

if TYPE_CHECKING:
    from molt.localizer import Localizer

TITLE = "A trained MOLT"
ABOUT = (
    "below the stages of the default method, which is not trained, stand those of the MOLT that comes with molt. Its "
    "heads know nine classes, learnt from the labels of 1200 pasted pictures, cut-outs on photos: {classes}. It shows "
    "how the method works. With so few classes and pictures it is no judge of what training on your own photos reaches."
)


def demo(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", help="Folder the page is written to, as index.html.")] = Path(
        "molt-demo"
    ),
) -> None:
    """Make a page that shows every stage on sample photos, of the default method and of a trained MOLT.

    The page is one HTML file; its path is printed last. The trained MOLT is left out, and the reason given, where the
    backbone weights at hand are not those that its heads were trained on.
    """
    from molt.data.samples import sample_photos

    photos = sample_photos()  # before anything slow
    take_out(context, out)
    with Progress() as progress:
        console = progress.console
        progress.show("loading the networks")
        from molt.localizer import Localizer
        from molt.page import Beside, write_page

        localizer = Localizer()
        trained, why_not = _trained()
        if why_not:
            console.print(f"molt: the trained MOLT is left out: {why_not}", markup=False)
        items, explained = [], []
        for number, photo in enumerate(photos):
            progress.show("every stage", number, len(photos), "photos", photo.name)
            items.append((photo, localizer.explain(photo.path)))
            if trained is not None:
                explained.append(trained.explain(photo.path))
        weights, about = list(localizer.weights), f"it is left out here: {why_not}."
        if trained is not None:
            about = ABOUT.format(classes=", ".join(trained.method.class_names))
            # The heads saw labels alone; what their backbone saw stands beside.
            heads = replace(trained.weights[-1], source="molt itself", saw_masks="no")
            weights += [*(info for info in trained.weights[:-1] if info.model not in {w.model for w in weights}), heads]
        path = write_page(out / "index.html", items, weights, beside=Beside(TITLE, about, explained))
    print(path)


def _trained() -> tuple[Localizer | None, str]:
    """Return the trained MOLT that molt brings along, or None and why it cannot be had."""
    from molt.data.samples import sample_checkpoint
    from molt.localizer import Localizer

    try:
        return Localizer("molt_dinov2_small", checkpoint=sample_checkpoint()), ""
    except (FileNotFoundError, ValueError) as error:
        return None, " ".join(str(error).split()).rstrip(".")
