"""`molt evaluate`: a data set and a method, or stored maps, in; scores, a table and a report out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from molt._words import count
from molt.cli._progress import Progress
from molt.cli._say import FAILED, SHOWN, check_out, stop, stop_at, take_out
from molt.cli._sets import read

if TYPE_CHECKING:
    from molt.cli._map_providers import Provider
    from molt.data.annotations import LocalizationSet
    from molt.evaluation.runs import Run, Settings

OUT = Path("molt-evaluation")
REPORT, COMPARISON = "report.html", "comparison.json"
WIDTH = 110  # of tables that no terminal limits
NAMES = {
    "max_box_acc": "MaxBoxAcc",
    "max_box_acc_v2": "MaxBoxAccV2",
    "mean_iou": "mean IoU",
    "pxap": "PxAP",
}


def evaluate(
    context: typer.Context,
    paths: Annotated[
        list[Path] | None, typer.Argument(metavar="PATH", help="The data set's folder or file; of --compare: runs.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="M",
            help="default, weak, a method of molt (seeded, molt_...), cam, layercam, centre, full, or maps:FOLDER; "
            "repeatable. If not given the model in --checkpoint, else default.",
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare the runs in these folders, photo by photo.")
    ] = False,
    kind: Annotated[str, typer.Option(help="Layout: auto, folder, wsol, voc, coco or yolo.")] = "auto",
    split: Annotated[str | None, typer.Option(help="Split of the data set.")] = None,
    photos: Annotated[Path | None, typer.Option(help="Folder of the photos, where the set does not say.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder of the masks, of a wsol set.")] = None,
    classes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names, one a line, of a set that does not name them.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help=f"Folder of the run; {OUT}/SET-METHOD unless --json.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what an earlier run left in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON in place of tables.")] = False,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Only N photos, drawn by --seed.")] = None,
    seed: Annotated[int, typer.Option(help="Of --limit and of the intervals.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1...")] = None,
    batch: Annotated[int, typer.Option(help="Photos at once.")] = 8,
    gt_map: Annotated[
        str, typer.Option(help="Whose map counts: label (the photo's class), top1 (the likeliest) or agnostic.")
    ] = "label",
    class_map: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV",
            help="Lines: class name, network class, index or range (80-100), or object; of several the likeliest.",
        ),
    ] = None,
    source: Annotated[str, typer.Option(help="Where weights come from: auto, package or hub.")] = "auto",
    checkpoint: Annotated[Path | None, typer.Option(help="File of the trained molt_* model.")] = None,
    save_maps: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Store the maps as PHOTO.npy, to be scored again.")
    ] = None,
    missing: Annotated[
        str, typer.Option(help="stop where a photo, mask or map is missing, or let zero maps stand for them: zero.")
    ] = "stop",
    size: Annotated[int, typer.Option(help="Side of the square where maps and boxes are compared, px.")] = 224,
    thresholds: Annotated[int, typer.Option(help="How many thresholds.")] = 1000,
    ious: Annotated[str, typer.Option(metavar="A,B", help="IoUs of MaxBoxAccV2.")] = "0.3,0.5,0.7",
    resize: Annotated[str, typer.Option(help="Of maps: cubic, bilinear or none.")] = "cubic",
    normalize: Annotated[
        str | None,
        typer.Option(help="Of maps: minmax, max or none. If not given minmax, and none for maps:FOLDER."),
    ] = None,
    area: Annotated[str, typer.Option(help="Of the largest contour: contour (OpenCV's) or pixels.")] = "contour",
    truncate: Annotated[bool, typer.Option(help="Cut scaled true boxes to whole pixels.")] = True,
    clip: Annotated[bool, typer.Option(help="End boxes at the last pixel.")] = True,
    plus_one: Annotated[bool, typer.Option(help="Count widths as x1 - x0 + 1.")] = True,
    draws: Annotated[int, typer.Option(help="Bootstrap draws of the intervals.")] = 1000,
) -> None:
    """Score a method or stored maps on photos with boxes or masks.

    Gives MaxBoxAcc, MaxBoxAccV2, mean IoU and PxAP. The defaults are those of wsolevaluation. A run that was killed
    goes on with the same command. Exit code 0; 1 if a photo's map or truth could not be used (it is then listed, and
    the map counts as zeros); 2 for a wrong option.
    """
    from molt.data.annotations import DataError
    from molt.data.images import PhotoError
    from molt.evaluation._spool import RunError

    if not paths:
        stop("PATH is missing: give a data set, or runs with --compare (molt evaluate --help)")
    try:
        if compare:
            _compare(paths, out, as_json, draws, seed)
            return
        if len(paths) > 1:
            stop(f"one data set at a time, got {', '.join(map(str, paths))}; runs are compared with --compare")
        from molt.cli._map_providers import Wanted, provider
        from molt.evaluation.runs import Settings

        methods = list(dict.fromkeys(method or [_default(checkpoint)]))
        settings = Settings(
            size=size,
            thresholds=thresholds,
            ious=_ious(ious),
            resize=cast("Any", resize),
            normalize=cast("Any", normalize or "minmax"),
            area=cast("Any", area),
            truncate=truncate,
            clip=clip,
            plus_one=plus_one,
            draws=draws,
            seed=seed,
        )
        data = read(paths[0], kind, split=split, photos=photos, masks=masks, classes=classes, limit=limit, seed=seed)
        if batch < 1:
            raise ValueError(f"--batch {batch}: expected at least 1")
        runs = []
        check_out("--save-maps", save_maps)
        for name in methods if out is None else methods[:1]:
            take_out(context, out or _folder(None, data.name, name, single=True, as_json=as_json))
        for name in methods:
            wanted = Wanted(name, gt_map, class_map, cast("Any", missing), size, device, source, checkpoint)
            with Progress() as progress:
                progress.show(f"{name}: loading what makes the maps")
                found = provider(wanted, data)
            own = replace(settings, normalize=found.normalize or cast("Any", normalize) or found.usual)
            _check_range(found, own, data)
            folder = _folder(out, data.name, name, single=len(methods) == 1, as_json=as_json)
            store = None if save_maps is None else save_maps / (_slug(name) if len(methods) > 1 else "")
            runs.append(_run(data, found, own, folder, store, restart=restart, batch=batch))
            if not as_json:
                _show(runs[-1], folder)
        comparison = _together(runs, out if len(runs) > 1 else None, draws, seed)
    except DataError as error:
        stop_at(error.problems)
    except (RunError, ValueError, ImportError, PhotoError) as error:
        stop(str(error))
    if as_json:
        found_json: Any = (
            runs[0].to_json()
            if len(runs) == 1
            else {
                "runs": [run.to_json() for run in runs],
                "comparison": comparison,
            }
        )
        print(json.dumps(found_json))
    elif comparison is not None:
        _show_comparison(comparison)
    if any(row["problem"] or not (row["truth"] or row["masks"]) for run in runs for row in run.rows):
        raise typer.Exit(FAILED)


def _default(checkpoint: Path | None) -> str:
    """Return the method that is scored where none is named."""
    from molt.methods import model_in

    if checkpoint is None:
        return "default"
    name = model_in(checkpoint)
    if name is None:
        raise ValueError(f"--checkpoint {checkpoint}: no file that holds a MOLT, or name a --method")
    return name


def _check_range(found: Provider, settings: Settings, data: LocalizationSet) -> None:
    """Stop before the first photo where stored maps are of another range than they are taken to be."""
    import numpy as np

    if found.usual != "none" or settings.normalize != "none":
        return
    first = next(iter(found.maps(data.samples[:1])))
    if isinstance(first, np.ndarray) and not 0 <= first.min() <= first.max() <= 1:
        raise ValueError(
            f"the map of {data.samples[0].name} holds {first.min():.6g} to {first.max():.6g}, expected [0, 1]; "
            "--normalize minmax takes maps of any range"
        )


def _run(
    data: LocalizationSet,
    found: Provider,
    settings: Settings,
    folder: Path | None,
    store: Path | None,
    *,
    restart: bool,
    batch: int,
) -> Run:
    """Evaluate one method, with a progress bar where there is a terminal."""
    from molt.evaluation.maps import save_map
    from molt.evaluation.report import write_report
    from molt.evaluation.runs import evaluate as run_evaluation

    names = [sample.name for sample in data.samples]
    labelled = len(set(names)) < len(names)
    saved = {} if store is None else {"save_maps": str(store)}
    done = 0
    with Progress() as progress:

        def step(number: int) -> None:
            nonlocal done
            done = number
            progress.show(str(found.about["name"]), number, len(data), "photos")

        try:
            run = run_evaluation(
                data,
                found.maps,
                settings,
                method=found.about | saved,
                out=folder,
                restart=restart,
                batch=batch,
                save=None if store is None else lambda s, m: save_map(store, s, m, labelled=labelled),
                step=step,
                problems=found.problems,
            )
        except KeyboardInterrupt:
            if folder is not None:
                progress.console.print(f"molt: {done} of {len(data)} photos are in {folder}: the same command goes on")
            raise
        if folder is not None:
            progress.show("writing the report")
            write_report(folder / REPORT, [run], samples=data.samples, maps=found.maps)
    return run


def _compare(folders: Sequence[Path], out: Path | None, as_json: bool, draws: int, seed: int) -> None:
    from molt.evaluation.runs import Run

    found = _together([Run.load(folder) for folder in folders], out, draws, seed)
    if found is None:
        raise ValueError(f"--compare: got {len(folders)} run, expected two or more")
    if as_json:
        print(json.dumps(found))
    else:
        _show_comparison(found)


def _together(runs: Sequence[Run], out: Path | None, draws: int, seed: int) -> dict[str, Any] | None:
    """Return the comparison of two or more runs, and write it to ``out``."""
    from molt.evaluation._spool import write_json
    from molt.evaluation.compare import compare
    from molt.evaluation.report import write_report

    if len(runs) < 2:
        return None
    found = compare(runs, draws=draws, seed=seed)
    if out is not None:
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out}: is a file, expected a folder")
        write_json(out / COMPARISON, found)
        write_report(out / REPORT, runs, comparison=found)
    return found


def _folder(out: Path | None, data: str, method: str, *, single: bool, as_json: bool) -> Path | None:
    if out is None:
        return None if as_json else OUT / f"{_slug(data)}-{_slug(method)}"
    return out if single else out / _slug(method)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.") or "run"


def _ious(text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"--ious {text}: expected numbers parted by commas") from None


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    return console


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich.markup import escape
    from rich.table import Column, Table

    heads = [Column(columns[0], overflow="fold"), *(Column(name, justify="right") for name in columns[1:])]
    table = Table(*heads, title=escape(title), title_justify="left")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _percent(entry: Mapping[str, Any]) -> tuple[str, str]:
    low, high = entry["interval"]
    return f"{entry['value']:.2f}", f"{low:.1f} to {high:.1f}"


def _show(run: Run, folder: Path | None) -> None:
    """Print a run's tables, how it was scored, the weights behind it and what was wrong."""
    from molt.evaluation.summary import protocol_line

    info, console = run.info, _console()
    rows = [(NAMES[name], *_percent(entry), str(entry["photos"])) for name, entry in info["scores"].items()]
    data = info["data"]
    console.print(_table(f"{run.name} on {data['name']}", ("metric", "%", "95 % interval", "photos"), rows))
    if info["by_iou"]:
        rows_iou = [
            (
                NAMES["max_box_acc"] if e["kind"] == "v1" else f"any box, IoU {e['iou']:g}",
                *_percent(e),
                f"{e['threshold']:.3g}",
            )
            for e in info["by_iou"]
        ]
        console.print(_table("at its best threshold", ("box", "%", "95 % interval", "threshold"), rows_iou))
        split = ", ".join(f"{kind} {number}" for kind, number in info["errors"].items())
        console.print(f"largest box: {split}", soft_wrap=True, markup=False)
    plain = _printer(console)
    plain(f"protocol: {protocol_line(info)}")
    for used in info["method"].get("weights", ()):
        plain(f"weights: {used['model']}, {used['source']}; seen pixel masks in training: {used['saw_masks']}")
    for what, number in info["data"]["left_out"].items():
        plain(f"left out by the reader: {number} {what}")
    problems = info["problems"]
    if problems["count"]:
        plain(f"{count(problems['count'], 'problem')}:")
        for problem in problems["listed"][:SHOWN]:
            plain(f"  {problem['file']}: {problem['message']} (expected {problem['expected']})")
        if problems["count"] > SHOWN:
            plain(f"  and {problems['count'] - SHOWN} more" + (f", all in {folder}" if folder else ""))
    if folder is not None:
        plain(f"run in {folder}, report in {folder / REPORT}")


def _show_comparison(found: Mapping[str, Any]) -> None:
    console = _console()
    plain = _printer(console)
    rows = [
        (name, *("{} ({})".format(*_percent(entries[i])) for entries in found["scores"].values()))
        for i, name in enumerate(found["runs"])
    ]
    heads = [NAMES[metric] for metric in found["scores"]]
    console.print(_table(f"on the {count(found['photos'], 'photo')} that all share, %", ("run", *heads), rows))
    changes = [
        (
            f"{entry['run']} - {entry['against']}",
            NAMES[entry["metric"]],
            f"{entry['difference']:+.2f}",
            "{:+.1f} to {:+.1f}".format(*entry["interval"]),
        )
        for entry in found["differences"]
    ]
    console.print(_table("differences", ("runs", "metric", "points", "95 % interval"), changes))
    for left in found["unshared"]:
        more = ", ..." if left["count"] > len(left["photos"]) else ""
        plain(f"{count(left['count'], 'photo')} left out, {left['reason']}: {', '.join(left['photos'])}{more}")
    for other in found["protocol"]:
        said = ", ".join(f"{name} {value}" for name, value in other["values"].items())
        plain(f"protocols differ in {other['setting']}: {said}")


def _printer(console: Any) -> Callable[[str], None]:
    def plain(text: str) -> None:
        console.print(text, soft_wrap=True, markup=False)

    return plain
