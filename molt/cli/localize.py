"""`molt localize`: photos in; a table and overlays, or JSON lines, out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from molt._text import readable
from molt._words import count
from molt.cli._progress import Progress
from molt.cli._say import FAILED, USAGE, check_out, say, say_left_out, stop, take_out

if TYPE_CHECKING:
    from molt._auto_alpha import Alpha
    from molt._backend import Backend
    from molt.cli.annotations import BoxSet
    from molt.clustering import Clusterer
    from molt.data.samples import SamplePhoto
    from molt.localizer import Explanation, Localizer
    from molt.structures import Localization

PAGE_NAME, PAGE_PHOTOS = "molt.html", 24  # a page of more could not be read, and would hold memory for each


@dataclass(frozen=True)
class Item:
    """One photo to try, where its overlay goes below the output folder, or why it cannot be tried."""

    path: Path
    place: Path
    error: str | None = None


def localize(
    context: typer.Context,
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="PATH", help="Photos, or folders searched recursively.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="seeded, or a trained model: molt_deit_{tiny,small,base}, molt_dinov2_small. If not given the model "
            "in --checkpoint, else seeded."
        ),
    ] = None,
    weights: Annotated[str, typer.Option(help="default (CNN + ViT) or weak (image labels only).")] = "default",
    k: Annotated[int, typer.Option("--k", help="How many of the likeliest classes to localize.")] = 1,
    threshold: Annotated[
        float | None, typer.Option(help="Share of the map's maximum; the method's own if not given.")
    ] = None,
    multi: Annotated[bool, typer.Option("--multi", help="Box every component, not just the largest.")] = False,
    wanted: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="NAME", help="Class name or index, or 'object' for any; repeatable."),
    ] = None,
    alpha: Annotated[
        str | None,
        typer.Option(metavar="A", help="Weight of the clusters, 0 to 1 or auto; the method's own if not given."),
    ] = None,
    clusterer: Annotated[
        str | None,
        typer.Option(metavar="C", help="What refines: tokens (k-means), slic or deep; the method's own if not given."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1...")] = None,
    backend: Annotated[str | None, typer.Option(help="auto, reference or native.")] = None,
    source: Annotated[str, typer.Option(help="Where weights come from: auto, package or hub.")] = "auto",
    backbone: Annotated[str | None, typer.Option(help="Of seeded: timm network whose patches are compared.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File of the trained molt_* model; of seeded: weights for --backbone.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for overlays; molt-out unless --json.")] = None,
    page: Annotated[
        bool | None,
        typer.Option("--page/--no-page", help="Every stage of the first photos in molt.html; on unless --json."),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder where clusters are kept, to be computed once a photo.")
    ] = None,
    cache_clear: Annotated[
        bool, typer.Option("--cache-clear", help="Remove the label maps kept in --cache first; needs no PATH.")
    ] = False,
    annotations: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help="Write all boxes as one set, too: coco (with scores), yolo or voc."),
    ] = None,
    annotations_to: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Its file (coco) or folder, replaced; if not given, molt-FORMAT in --out."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line an input on stdout.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Print time and peak memory of each stage.")] = False,
) -> None:
    """Find the object in photos: a table and overlays, or JSON lines.

    Exit code 0; 1 if any input failed (the others are still done); 2 for a wrong option.
    """
    import logging
    import warnings

    logging.basicConfig(level=logging.WARNING, format="molt: %(message)s")
    warnings.filterwarnings("ignore", module="PIL")
    folder = out if out is not None or as_json else Path("molt-out")
    if cache_clear and cache is None:
        stop("--cache-clear: which folder? Give it with --cache DIR", USAGE)
    check_out("--cache", cache)
    if not paths:
        if cache is None or not cache_clear:
            stop("PATH is missing: give photos or folders (molt localize --help)", USAGE)
        _clear(cache)
        return
    take_out(context, folder)
    progress: Progress = context.with_resource(Progress())
    progress.show("loading the networks")

    try:
        from molt.classes import find_class
        from molt.cli.annotations import plan
        from molt.localizer import Localizer

        items = expand(paths, folder, cache)
        photos = [item.path for item in items if item.error is None]
        boxes = plan(annotations, annotations_to, folder, paths, photos)
        if boxes is not None:
            check_out("--annotations-to", boxes.target, folder=boxes.kind != "coco")
        # Told before the networks are loaded; other networks bring their own classes.
        for name in wanted or [] if backbone is None and (method or checkpoint or "seeded") == "seeded" else []:
            find_class(name)
        loc = Localizer(
            method,
            weights,
            k,
            threshold,
            multi,
            device,
            backend=cast("Backend | None", backend),
            backbone=backbone,
            checkpoint=checkpoint,
            source=source,
            clusterer=_clusterer(clusterer),
            cache=cache,
            alpha=_alpha(alpha),
            profile=profile,
        )
        if boxes is not None:
            boxes.name_classes(loc.method.class_names, wanted or [])
        shown = PAGE_PHOTOS if folder is not None and (not as_json if page is None else page) else 0
        results = chain(
            loc.stream(photos[:shown], wanted or None, explain=True), loc.stream(photos[shown:], wanted or None)
        )
    except ValueError as error:
        stop(str(error), USAGE)
    except (FileNotFoundError, RuntimeError) as error:
        stop(str(error), FAILED)
    if cache is not None and cache_clear:
        _clear(cache)
    failures = _run(items, results, loc, folder, as_json, boxes, progress)
    complete = boxes is None or _write_boxes(boxes)
    if cache is not None and (profile or not as_json):
        hits, misses = loc.clusterer.hits, loc.clusterer.misses
        say(f"clusters: {misses} computed, {hits} found in {cache}")
    if profile:
        _show_profile(loc)
    if failures and len(items) > 1:
        say(f"{failures} of {len(items)} inputs failed")
    if failures or not complete:
        raise typer.Exit(FAILED)


def expand(paths: list[Path], out: Path | None, cache: Path | None = None) -> list[Item]:
    """Return the photos to try, in order, with one place each for their overlays.

    A folder gives the photos below it, less those under ``out``, the label maps in ``cache`` and what
    :func:`molt.data.find_photos` leaves out; other files are counted on stderr. No two places are the same, also where
    letter case does not count, and none is that of an input.

    Raises:
        ValueError: ``out`` is itself a folder given as input, where overlays would mix with originals.
    """
    from molt.clustering.cache import is_label_map
    from molt.data.images import PhotoError, walk_photos

    items: list[Item] = []
    taken: set[str] = set()
    inputs = {path.resolve() for path in paths}

    def add(path: Path, relative: Path) -> None:
        place, number = relative.with_name(f"{relative.stem}-boxes.jpg"), 1
        while str(place).casefold() in taken or (out is not None and (out / place).resolve() in inputs):
            number += 1
            place = relative.with_name(f"{relative.stem}-boxes-{number}.jpg")
        taken.add(str(place).casefold())
        items.append(Item(path, place))

    for path in paths:
        try:
            path.stat()
        except FileNotFoundError:
            url = "; addresses are not fetched, give a file" if str(path).startswith(("http:", "https:")) else ""
            items.append(Item(path, Path(), f"{path}: no such file or folder{url}"))
            continue
        except OSError as error:
            items.append(Item(path, Path(), f"{path}: cannot be looked at ({error.strerror})"))
            continue
        if not path.is_dir():
            add(path, Path(path.name or "photo"))
            continue
        if out is not None and out.resolve() == path.resolve():
            raise ValueError(f"--out {out}: is a folder of photos given as input, expected another one")
        unreadable: list[PhotoError] = []
        walked = walk_photos(path, unreadable.append)
        found, others = walked.photos, walked.others
        items += [Item(path, Path(), str(error)) for error in unreadable]
        if out is not None and out.resolve().is_relative_to(path.resolve()):
            kept = [photo for photo in found if not photo.resolve().is_relative_to(out.resolve())]
            others, found = others + len(found) - len(kept), kept
        if cache is not None:
            found = [photo for photo in found if not is_label_map(photo, cache)]
        if others:
            say(f"{path}: {count(others, 'other file')} left alone")
        say_left_out(walked.left_out, path)
        if not found and not unreadable:
            items.append(Item(path, Path(), f"{path}: no photo in this folder"))
        for photo in found:
            add(photo, photo.relative_to(path))
    return items


def _alpha(text: str | None) -> Alpha | None:
    """Return the number, or "auto", that an option says."""
    if text is None or text == "auto":
        return cast("Alpha | None", text)
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--alpha {text}: expected a number in [0, 1] or auto") from None


def _clusterer(name: str | None) -> Clusterer | None:
    """Return the clusterer that an option names."""
    from molt.clustering import DeepClustering, Slic, TokenKMeans

    known: dict[str, Clusterer] = {"tokens": TokenKMeans(restarts=4), "slic": Slic(), "deep": DeepClustering()}
    if name is not None and name not in known:
        raise ValueError(f"--clusterer {name}: expected {', '.join(known)}")
    return None if name is None else known[name]


def _clear(cache: Path) -> None:
    from molt.clustering.cache import clear

    try:
        files, size = clear(cache)
    except OSError as error:
        stop(f"--cache {cache}: {error}", FAILED)
    there = "" if cache.is_dir() else ", which does not exist"
    say(f"{count(files, 'file')} of {size / 1024:.0f} KiB removed from {cache}{there}")


def _run(
    items: list[Item],
    results: Iterator[tuple[Any, Localization | Explanation | Exception]],
    loc: Localizer,
    out: Path | None,
    as_json: bool,
    boxes: BoxSet | None,
    progress: Progress,
) -> int:
    """Work through the items, writing each as it is done; return how many failed."""
    from molt.data.images import PhotoError
    from molt.data.samples import SamplePhoto
    from molt.localizer import Explanation
    from molt.page import is_page, write_page

    errors = progress.console
    rows: list[tuple[str, str, str, str]] = []
    explained: list[tuple[SamplePhoto, Explanation]] = []
    failures = 0
    with closing(progress):
        for number, item in enumerate(items):
            progress.show("localizing", number, len(items), "photos")
            found = Exception(item.error) if item.error else next(results)[1]
            result = found.result if isinstance(found, Explanation) else found
            if isinstance(found, Explanation):
                explained.append((SamplePhoto(readable(item.path), item.path, ""), found))
            if isinstance(result, Exception):
                failures += 1
                line = " ".join(str(result).splitlines())
                named = isinstance(result, PhotoError) or item.error is not None
                say(line if named else f"{item.path}: {line}", errors)
                if as_json:
                    _print_json({"path": str(item.path), "error": line})
                continue
            if boxes is not None:
                try:
                    boxes.add(item.path, result)
                except ValueError as error:
                    failures += 1
                    say(f"{item.path}: not in the annotations ({error})", errors)
            if as_json:
                _print_json(result.to_dict())
            else:
                rows += _rows(item.path, result)
            if out is not None:
                try:
                    _write_overlay(result, out, item.place)
                except OSError as error:
                    failures += 1
                    say(f"{item.path}: the overlay was not written ({error})", errors)
    page = None
    if explained and out is not None:
        try:
            if not is_page(out / PAGE_NAME):
                raise OSError("a file of that name is there, which molt did not write")
            page = write_page(out / PAGE_NAME, explained, loc.weights, min_probability=0, guide=False)
        except OSError as error:
            failures += 1
            say(f"{out / PAGE_NAME}: the page was not written ({error})", errors)
    if not as_json and rows:
        _show_table(rows, loc, out, page, len(explained) if len(items) > PAGE_PHOTOS else None)
    return failures


def _rows(path: Path, result: Localization) -> list[tuple[str, str, str, str]]:
    if not len(result):
        return [(readable(path), "nothing found", "", "")]
    return [
        (
            readable(path) if i == 0 else "",
            readable(name.split(",")[0]),
            f"{score:.2f}",
            "  ".join(f"{v:.0f}" for v in box),
        )
        for i, (name, score, box) in enumerate(
            zip(result.names, result.scores.tolist(), result.boxes.tolist(), strict=True)
        )
    ]


def _show_table(
    rows: list[tuple[str, str, str, str]], loc: Localizer, out: Path | None, page: Path | None, shown: int | None
) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    console = Console(highlight=False)
    table = Table(Column("photo", overflow="fold"), "class", "score", "box x0 y0 x1 y1, pixels")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
    for used in loc.weights:
        untried = "" if used.measured else "; the threshold was not measured on them"
        console.print(
            f"weights: {used.source}; seen pixel masks in training: {used.saw_masks}{untried}",
            soft_wrap=True,
            markup=False,
        )
    if out is not None:
        console.print(f"overlays in {readable(out)}", soft_wrap=True, markup=False)
    if page is not None:
        which = f" (the first {count(shown, 'photo')})" if shown is not None else ""
        console.print(f"every stage in {readable(page)}{which}", soft_wrap=True, markup=False)


def _write_overlay(result: Localization, out: Path, place: Path) -> None:
    from molt._files import whole_file

    if not (out / place).parent.resolve().is_relative_to(out.resolve()):
        raise OSError(f"a link leads {place.parent} out of {out}")
    picture = result.plot()
    with whole_file(out / place) as part:
        picture.save(part, format="JPEG", quality=90)


def _write_boxes(boxes: BoxSet) -> bool:
    """Write the set of all boxes and say where it is; return whether that went well."""
    if not boxes.found:
        say(f"{boxes.target}: not written, no photo was localized")
        return True  # each photo has failed by itself
    try:
        done = boxes.write()
    except (OSError, ValueError) as error:
        say(f"{boxes.target}: the annotations were not written ({error})")
        return False
    cut = f", {done.clipped} of them cut to their photo" if done.clipped else ""
    written = f"{count(done.boxes, 'box')} of {count(done.photos, 'photo')}{cut}"
    say(f"{written} in {done.path}; names start from {boxes.base}")
    if done.unlinked:
        missing = count(done.unlinked, "photo")
        say(f"{done.path}: {missing} could not be linked to; copy what is missing there from {boxes.base}")
    return True


def _show_profile(loc: Localizer) -> None:
    from rich.console import Console
    from rich.table import Table

    assert loc.profile is not None
    console = Console(stderr=True, highlight=False)
    table = Table("stage", "calls", "seconds", "ms a call", "peak MiB", title="time and peak memory")
    for row in loc.profile.rows():
        peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        mean = 1000 * row["seconds"] / row["calls"]
        table.add_row(row["stage"], str(row["calls"]), f"{row['seconds']:.3f}", f"{mean:.1f}", peak)
    console.print(table)
    total = loc.profile.summary()
    console.print(
        f"{count(int(total['photos']), 'photo')}, {total['seconds_per_photo']:.3f} s a photo, "
        f"{total['total_over_forwards']:.2f} x the bare forward passes"
    )


def _print_json(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()
