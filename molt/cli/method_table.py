"""`molt benchmark --methods DATA`: cost and reach of every method on the same photos, in one table."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from molt._words import count
from molt.cli import _sets
from molt.cli._progress import Progress
from molt.cli._say import FAILED, say, stop_at, take_out
from molt.cli.end_to_end import names, number

if TYPE_CHECKING:
    from molt.benchmark.method_table import Groups, Work
    from molt.data.annotations import LocalizationSet

WIDTH = 170  # of a table that no terminal limits


@dataclass(frozen=True)
class Choice:
    """What is asked for, as typed; see `molt evaluate` for the options of the data set."""

    data: Path
    methods: str | None = None
    kind: str = "auto"
    split: str | None = None
    photos: Path | None = None
    classes: Path | None = None
    class_map: Path | None = None
    gt_map: str = "label"
    checkpoint: Path | None = None
    checkpoint_ts_cam: Path | None = None
    checkpoint_class_token: Path | None = None
    checkpoint_spatial: Path | None = None
    source: str = "auto"
    limit: int | None = None
    seed: int = 0
    batch: str | None = None
    restart: bool = False


def run(
    context: typer.Context,
    choice: Choice,
    device: str,
    out: Path,
    *,
    as_json: bool,
    show_list: bool,
    write: Callable[[Path, Mapping[str, Any]], None],
    dumps: Callable[[Mapping[str, Any]], str],
) -> None:
    """Measure what is chosen, print it, and write it to ``out`` after every row.

    Raises:
        typer.BadParameter: a name or number that is none of those possible, or a folder that cannot be gone on with.
        typer.Exit: with code 1 where a method raised, 2 where the data set cannot be used.
    """
    import torch
    from rich.console import Console

    from molt.benchmark import method_plot
    from molt.benchmark.method_table import run_all
    from molt.data.annotations import DataError
    from molt.evaluation._spool import RunError

    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"--device cuda: torch sees no CUDA device (torch {torch.__version__})")
    if not show_list:
        take_out(context, out)
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDTH
    status = errors.status("")
    progress: Progress = context.with_resource(Progress(bar=False))

    found: Mapping[str, Any] = {}
    try:
        work = _work(choice, device, out)
        if show_list:
            for plan in work.plans:
                print(f"{plan.name}  {plan.does}")
            return
        for found in run_all(work, functools.partial(progress.begin, status=status)):
            write(work.path, found)
        drawn = method_plot.draw(found, out / method_plot.FILE)
    except DataError as error:
        status.stop()
        stop_at(error.problems, " with the data")
    except ImportError as error:  # of the plot; a method's is a row's note
        drawn = False
        status.stop()
        errors.print(f"molt: {method_plot.FILE} not written: {error}", markup=False)
    except (RunError, ValueError, FileNotFoundError) as error:
        raise typer.BadParameter(str(error)) from None
    finally:
        status.stop()
    if as_json:
        print(dumps(found))
    else:
        show(console, found)
    plot = f", drawn in {out / method_plot.FILE}" if drawn else ""
    errors.print(f"written to {work.path}{plot}", markup=False)
    wrong = [row for row in found["rows"] if row["failed"]]
    for row in wrong:
        errors.print(f"{row['name']} {row['reason']}", markup=False)
    if wrong:
        raise typer.Exit(FAILED)


def _work(choice: Choice, device: str, out: Path) -> Work:
    """Read the data set and choose the rows."""
    from molt.benchmark.method_rows import Networks, plans
    from molt.benchmark.method_table import GT_MAPS, Work
    from molt.cli.end_to_end import numbers
    from molt.data.checking import check_sizes
    from molt.evaluation.runs import Settings, _digest

    if choice.gt_map not in GT_MAPS:
        raise ValueError(f"--gt-map {choice.gt_map}: expected {', '.join(GT_MAPS)}")
    batches = numbers("--batch", choice.batch, 1) or [1]
    if len(batches) != 1:
        raise ValueError(f"--batch {choice.batch}: expected one number with --methods")
    files = {
        "checkpoint": choice.checkpoint,
        "checkpoint-ts-cam": choice.checkpoint_ts_cam,
        "checkpoint-class-token": choice.checkpoint_class_token,
        "checkpoint-spatial": choice.checkpoint_spatial,
    }
    for option, path in files.items():
        if path is not None and not path.is_file():
            raise ValueError(f"--{option} {path}: there is no such file")

    def read(limit: int | None) -> Any:
        return _sets.read(
            choice.data,
            choice.kind,
            split=choice.split,
            photos=choice.photos,
            classes=choice.classes,
            limit=limit,
            seed=choice.seed,
        )

    # Classes are told apart among the whole set's, however few photos are taken.
    whole = read(None)
    data = whole if choice.limit is None else read(choice.limit)
    _sets.check_files([sample.path for sample in data.samples])
    for remark in check_sizes(data):
        say(str(remark))
    rows = plans(Networks(device, choice.source, files))
    wanted = names("--method", choice.methods, [plan.name for plan in rows])
    return Work(
        data,
        [plan for plan in rows if wanted is None or plan.name in wanted],
        functools.cache(functools.partial(_groups, whole, choice.class_map)),
        out,
        device,
        choice.gt_map,
        batches[0],
        Settings(seed=choice.seed),
        restart=choice.restart,
        said={"digest": _digest(data)},
    )


def _groups(data: LocalizationSet, class_map: Path | None, known: tuple[str, ...]) -> Groups:
    """Return a method's classes by label: by name, or where its classes are ImageNet's by the file, if there is one.

    Raises:
        ValueError: classes that are not the method's.
    """
    from molt.classes import imagenet_names
    from molt.cli._network_classes import network_classes

    return network_classes(data, known, class_map if known == imagenet_names() else None)[0]


def show(console: Any, report: Mapping[str, Any]) -> None:
    """Print the report's table, and below it why rows did not run."""
    from rich.table import Table

    of = report["of"]
    title = f"{of['data']['name']}, {count(of['data']['photos'], 'photo')}; {report['device']}, batch {report['batch']}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("method", no_wrap=True)
    heads = ("M params", "trained", "GMACs", "ms", "20-80 %", "to box ms", "peak MiB")
    for name in (*heads, "MaxBoxAcc", "V2", "mean IoU", "accuracy"):
        table.add_column(name, justify="right")
    table.add_column("saw masks?")
    for row in report["rows"]:
        if row["reason"] is not None:
            continue
        scores = row["scores"]
        table.add_row(
            row["name"],
            _millions(row["parameters"]),
            _millions(row["trained_parameters"]),
            number(row["gmacs"], "{:.3g}"),
            number(row["ms"], "{:.4g}"),
            "" if row["ms"] is None else f"{row['p20_ms']:.4g}-{row['p80_ms']:.4g}",
            number(row["box_ms"], "{:.4g}"),
            number(row["peak_mib"], "{:.0f}"),
            *(_share(scores.get(name)) for name in ("max_box_acc", "max_box_acc_v2", "mean_iou")),
            _share(row["accuracy"]),
            row["saw_masks"],
        )
    console.print(table)
    for row in report["rows"]:
        if row["reason"] is not None:
            console.print(f"  {row['name']}: not run: {row['reason']}", markup=False, soft_wrap=True)
        elif row["same_as"] is not None:
            console.print(f"  {row['name']}: the same as {row['same_as']}", markup=False, soft_wrap=True)
        if row["problems"]:
            text = f"  {row['name']}: {count(row['problems'], 'problem')} with photos or maps, in its folder's run.json"
            console.print(text, markup=False, soft_wrap=True)
    console.print(f"GMACs: {report['counted']}", markup=False, soft_wrap=True)


def _millions(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.3g}"


def _share(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    low, high = entry["interval"]
    return f"{entry['value']:.1f} ({low:.0f}-{high:.0f})"
