"""`molt demo`: a page that shows every stage on sample photos."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder the page is written to, as index.html.")] = Path(
        "molt-demo"
    ),
) -> None:
    """Make a page that shows every stage on sample photos.

    The page is one HTML file; its path is printed last.
    """
    from rich.console import Console

    from molt.data.samples import sample_photos

    photos = sample_photos()  # before anything slow
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise typer.BadParameter(f"--out {out}: is a file, expected a folder") from None
    console = Console(stderr=True, highlight=False)
    with console.status("loading the networks") as status:
        from molt.localizer import Localizer
        from molt.page import write_page

        localizer = Localizer()
        items = []
        for number, photo in enumerate(photos, 1):
            status.update(f"photo {number} of {len(photos)}: {photo.name}")
            items.append((photo, localizer.explain(photo.path)))
        path = write_page(out / "index.html", items, localizer.weights)
    print(path)
