"""`molt data check`: what is wrong with a data set."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from molt._text import plain_name, readable
from molt._words import count
from molt.cli._progress import Progress
from molt.cli._say import FAILED, stop

if TYPE_CHECKING:
    from molt.data.checking import Findings


data = typer.Typer(name="data", help="Check a data set before it is used.", rich_markup_mode=None)


@data.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@data.command()
def check(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What holds the annotations: a folder, COCO's JSON, YOLO's data.yaml.")
    ],
    kind: Annotated[str, typer.Option(help="auto, folder, wsol, voc, coco, yolo, cub or csv.")] = "auto",
    split: Annotated[str | None, typer.Option(help="Part of the set: train, val, test...")] = None,
    photos: Annotated[Path | None, typer.Option(help="Folder of the photos, for wsol, coco and csv.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder of wsol's masks; that of the photos if not given.")] = None,
    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names of wsol, voc or csv by label, one a line.")
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option("--num-classes", min=1, help="Classes of the network; labels beyond are problems.")
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Decode each photo and mask whole. Takes longer.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    limit: Annotated[int, typer.Option(min=0, help="Problems shown, 0 for all; all are counted.")] = 20,
) -> None:
    """Check a data set: annotations, photos and masks.

    Exit code 0 if nothing is wrong; 1 for problems; 2 for a wrong option.
    """
    import warnings

    from molt.data.checking import inspect_set

    warnings.filterwarnings("ignore", module="PIL")
    progress = Progress()
    try:
        names = None if classes is None else read_names(classes)
        with progress:
            progress.show("reading the annotations")
            found = inspect_set(
                folder,
                kind=cast("Any", kind),
                split=split,
                photos=photos,
                masks=masks,
                classes=names,
                num_classes=num_classes,
                deep=deep,
                on_progress=lambda done, total: progress.show("checking", done, total, "files"),
            )
    except ValueError as error:
        stop(str(error))
    if as_json:
        sys.stdout.write(json.dumps(_record(folder, found, limit)) + "\n")
    else:
        _show(folder, found, limit)
    if found.problems:
        raise typer.Exit(FAILED)


def read_names(file: Path) -> list[str]:
    """Return the class names of a file, one a line."""
    try:
        names = file.read_text("utf-8-sig").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--classes {file}: {error}") from None
    names = [plain_name(name) for name in names]
    if not all(names):
        raise ValueError(f"--classes {file}: a blank line, expected one class name a line")
    return names


def _record(folder: Path, found: Findings, limit: int) -> dict[str, Any]:
    shown = found.problems[: limit or None]
    return {
        "path": str(folder),
        "name": found.name,
        "kind": found.kind,
        "photos": found.photos,
        "samples": found.samples,
        "classes": found.classes,
        "empty_classes": found.empty_classes,
        "smallest_class": None if found.smallest is None else {"name": found.smallest[0], "samples": found.smallest[1]},
        "boxes": found.boxes,
        "masks": found.masks,
        "left_out": found.left_out,
        "notes": list(found.notes),
        "problems": len(found.problems),
        "shown": [{"file": str(p.file), "line": p.line, "message": p.message, "expected": p.expected} for p in shown],
    }


def _show(folder: Path, found: Findings, limit: int) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)

    def line(text: str) -> None:
        console.print(readable(text), soft_wrap=True, markup=False)

    for problem in found.problems[: limit or None]:
        line(str(problem))
    if limit and len(found.problems) > limit:
        line(f"... and {len(found.problems) - limit:,} more; --limit 0 shows all")
    if found.kind is not None:
        table = Table("", "", show_header=False)
        rows = {"layout": found.kind, "photos": f"{found.photos:,}"}
        if found.samples != found.photos:
            rows["photos by class"] = f"{found.samples:,}"
        rows["classes"] = f"{found.classes:,}"
        if found.smallest is not None:
            rows["smallest class"] = f"{found.smallest[0]}: {found.smallest[1]:,}"
        if found.empty_classes:
            rows["classes without photos"] = f"{found.empty_classes:,}"
        rows |= {"boxes": f"{found.boxes:,}", "masks": f"{found.masks:,}"}
        rows |= {f"left out: {what}": f"{number:,}" for what, number in found.left_out.items()}
        for name, value in rows.items():
            table.add_row(name, escape(readable(value)))
        console.print(table)
    for note in found.notes:
        line(note)
    line(f"{folder}: {count(len(found.problems), 'problem') if found.problems else 'no problems'}")
