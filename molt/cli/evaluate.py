"""`molt evaluate`: a data set and a method, or stored maps, in; scores, a table and a report out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from molt._words import count
from molt.cli._progress import Progress
from molt.cli._say import FAILED, check_out, stop, stop_at, take_out
from molt.cli._score_tables import REPORT, Scores, show, show_comparison, write_csv, write_latex
from molt.cli._sets import any_object as merged
from molt.cli._sets import read, some

if TYPE_CHECKING:
    from molt.cli._map_providers import Provider
    from molt.data.annotations import LocalizationSet
    from molt.evaluation.runs import Run, Settings

OUT = Path("molt-evaluation")
COMPARISON = "comparison.json"


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
    kind: Annotated[str, typer.Option(help="Layout: auto, folder, wsol, voc, coco, yolo, cub or csv.")] = "auto",
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
        str | None,
        typer.Option(
            help="Whose map counts: label (the photo's class), top1 (the likeliest) or agnostic. If not given label, "
            "and agnostic with --any-object."
        ),
    ] = None,
    any_object: Annotated[
        bool, typer.Option("--any-object", help="Each photo once, right with any object of any class: CorLoc.")
    ] = False,
    difficult: Annotated[
        bool, typer.Option("--difficult/--no-difficult", help="Objects marked difficult count (voc).")
    ] = False,
    crowd: Annotated[bool, typer.Option("--crowd/--no-crowd", help="Boxes round a crowd count (coco).")] = False,
    predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV",
            help="Lines: photo, then its classes from the likeliest down, for Top-1 and Top-5, not the network's.",
        ),
    ] = None,
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
    thresholds: Annotated[int, typer.Option(help="How many thresholds, of which the best is taken.")] = 1000,
    threshold: Annotated[
        float | None, typer.Option(metavar="T", help="The only threshold, a share of each map's maximum in [0, 1).")
    ] = None,
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
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the scores as CSV, too.")] = None,
    latex: Annotated[
        Path | None, typer.Option("--latex", metavar="FILE", help="Write them as a LaTeX table (booktabs), too.")
    ] = None,
) -> None:
    """Score a method or stored maps on photos with boxes or masks.

    Gives MaxBoxAcc, MaxBoxAccV2, mean IoU and PxAP, and where classes are predicted Top-1, Top-5 and GT-known Loc. The
    defaults are those of wsolevaluation. A run that was killed goes on with the same command. Exit code 0; 1 if a
    photo's map or truth could not be used (it is then listed, and the map counts as zeros); 2 for a wrong option.
    """
    from molt.data.annotations import DataError
    from molt.data.images import PhotoError
    from molt.evaluation._spool import RunError

    try:
        for option, path in (("--csv", csv), ("--latex", latex)):  # told before networks run
            check_out(option, path, folder=False)
    except OSError as error:
        stop(str(error))
    if not paths:
        stop("PATH is missing: give a data set, or runs with --compare (molt evaluate --help)")
    try:
        if compare:
            _compare(paths, out, as_json, draws, seed, csv, latex)
            return
        if len(paths) > 1:
            stop(f"one data set at a time, got {', '.join(map(str, paths))}; runs are compared with --compare")
        from molt.cli._map_providers import Wanted, provider
        from molt.data.checking import check_sizes
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
            threshold=threshold,
        )
        gt_map = gt_map or ("agnostic" if any_object else "label")
        if any_object and (gt_map == "label" or predictions is not None):
            given = f"--predictions {predictions}" if predictions is not None else "--gt-map label"
            raise ValueError(f"--any-object: takes no class into account, so {given} does not go with it")
        parts: dict[str, Any] = {"split": split, "photos": photos, "masks": masks, "classes": classes}
        whole = read(paths[0], kind, **parts, difficult=difficult, crowd=crowd)
        if any_object:
            whole = merged(whole)
        data = some(whole, limit, seed)
        flags = {"difficult objects": difficult, "crowds": crowd}
        about: dict[str, Any] = {"any_object": True} if any_object else {}
        if counted := [name for name, on in flags.items() if on]:
            about["counted"] = counted
        if batch < 1:
            raise ValueError(f"--batch {batch}: expected at least 1")
        remarks = check_sizes(data)
        runs = []
        check_out("--save-maps", save_maps)
        for name in methods if out is None else methods[:1]:
            take_out(context, out or _folder(None, data.name, name, single=True, as_json=as_json))
        for name in methods:
            wanted = Wanted(
                name,
                gt_map,
                class_map,
                cast("Any", missing),
                size,
                device,
                source,
                checkpoint,
                predictions,
                whole.samples,
                any_object,
            )
            with Progress() as progress:
                progress.show(f"{name}: loading what makes the maps")
                found = provider(wanted, data)
            found = replace(found, problems=(*remarks, *found.problems))
            own = replace(settings, normalize=found.normalize or cast("Any", normalize) or found.usual)
            _check_range(found, own, data)
            folder = _folder(out, data.name, name, single=len(methods) == 1, as_json=as_json)
            store = None if save_maps is None else save_maps / (_slug(name) if len(methods) > 1 else "")
            runs.append(_run(data, found, own, folder, store, restart=restart, batch=batch, about=about))
            if not as_json:
                show(runs[-1], folder)
        comparison = _together(runs, out if len(runs) > 1 else None, draws, seed)
        _write_tables(csv, latex, [(run.name, run.info["scores"]) for run in runs], runs)
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
        show_comparison(comparison)
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
    about: dict[str, Any],
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
                sizes="trust",
                ranks=found.ranks,
                about=about,
            )
        except KeyboardInterrupt:
            if folder is not None:
                what = "photo" if len(set(names)) == len(names) else "photo-class pair"
                progress.console.print(
                    f"molt: {done} of {count(len(data), what)} are in {folder}: the same command goes on", markup=False
                )
            raise
        if folder is not None:
            progress.show("writing the report")
            write_report(folder / REPORT, [run], samples=data.samples, maps=found.maps)
    return run


def _compare(
    folders: Sequence[Path],
    out: Path | None,
    as_json: bool,
    draws: int,
    seed: int,
    csv: Path | None,
    latex: Path | None,
) -> None:
    from molt.evaluation.runs import Run

    runs = [Run.load(folder) for folder in folders]
    found = _together(runs, out, draws, seed)
    if found is None:
        raise ValueError(f"--compare: got {len(folders)} run, expected two or more")
    scores = [{metric: entries[i] for metric, entries in found["scores"].items()} for i in range(len(runs))]
    _write_tables(csv, latex, list(zip(found["runs"], scores, strict=True)), runs)
    if as_json:
        print(json.dumps(found))
    else:
        show_comparison(found)


def _write_tables(csv: Path | None, latex: Path | None, rows: Scores, runs: Sequence[Run]) -> None:
    """Write the scores as the files that are asked for."""
    from molt.evaluation.summary import fixed_threshold, protocol_line

    try:
        if csv is not None:
            write_csv(csv, rows)
        if latex is not None:
            said = [f"{name}: {protocol_line(run.info)}" for (name, _), run in zip(rows, runs, strict=True)]
            fixed = all(fixed_threshold(run.info) is not None for run in runs)
            write_latex(latex, rows, fixed=fixed, said=said)
    except OSError as error:
        raise ValueError(f"--csv, --latex: {error}") from error


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
