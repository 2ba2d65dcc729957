"""`molt benchmark`: operators against their peers, checked first; the whole pipeline; and methods side by side."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from molt.cli._progress import Progress
from molt.cli._say import FAILED, check_out

FILE = "operators.json"
WIDTH = 130  # of tables that no terminal limits


def benchmark(
    context: typer.Context,
    operations: Annotated[
        list[str] | None, typer.Argument(metavar="[OPERATION]...", help="Operators to measure; all by default.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda; by default cuda where there is one.")
    ] = None,
    providers: Annotated[
        str | None, typer.Option("--providers", metavar="A,B", help="Only these, e.g. reference,native.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One case an operator, about five minutes on 2 cores.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option("--minutes", help="Begin no further case after so many minutes.")
    ] = None,
    targets: Annotated[
        bool, typer.Option("--targets", help="Only a GPU's rows with a target; --list shows them.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the report that is there, if of the same device and sources."),
    ] = False,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Of --end-to-end: networks untrained, for their time alone.")
    ] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="A GPU's rows on the CPU, an image or two: times mean nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON in place of tables.")] = False,
    out: Annotated[
        Path,
        typer.Option("--out", help=f"Folder of the report, written to DEVICE-NAME/{FILE} in it; or a .json file."),
    ] = Path("molt-benchmark"),
    show_list: Annotated[bool, typer.Option("--list", help="List operators, cases and providers, and stop.")] = False,
    whole: Annotated[
        bool, typer.Option("--end-to-end", help="From photos to boxes, beside the networks' bare forward passes.")
    ] = False,
    photos: Annotated[
        Path | None,
        typer.Option(
            "--photos",
            help="Of --end-to-end: folder of photos, with boxes.csv for true boxes. Of --methods: as in molt evaluate.",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option("--batch", metavar="1,8", help="Of --end-to-end: photos at once. Of --methods: one number."),
    ] = None,
    size: Annotated[str | None, typer.Option("--size", metavar="224,448", help="Of --end-to-end: side, px.")] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="A,B", help="Of --end-to-end: seeded, weak, molt_... Of --methods: rows."),
    ] = None,
    clusterer: Annotated[
        str | None, typer.Option("--clusterer", metavar="A,B", help="Of --end-to-end: none, token_kmeans, slic...")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of --end-to-end: float32, or autocast to bfloat16 or float16.")
    ] = None,
    methods: Annotated[
        Path | None,
        typer.Option("--methods", metavar="DATA", help="Cost and reach of every method on a localization set."),
    ] = None,
    kind: Annotated[
        str, typer.Option("--kind", help="Of --methods: layout, auto, folder, wsol, voc, coco, yolo, cub or csv.")
    ] = "auto",
    split: Annotated[str | None, typer.Option("--split", help="Of --methods: split of the set.")] = None,
    classes: Annotated[
        Path | None, typer.Option("--classes", metavar="FILE", help="Of --methods: class names, one a line.")
    ] = None,
    class_map: Annotated[
        Path | None, typer.Option("--class-map", metavar="CSV", help="Of --methods: as in molt evaluate.")
    ] = None,
    gt_map: Annotated[
        str, typer.Option("--gt-map", help="Of --methods: whose map is scored: label, top1 or agnostic.")
    ] = "label",
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", metavar="FILE", help="Of --methods: the trained MOLT.")
    ] = None,
    checkpoint_ts_cam: Annotated[
        Path | None,
        typer.Option("--checkpoint-ts-cam", metavar="FILE", help="Of --methods: one trained with --pooling mean."),
    ] = None,
    checkpoint_class_token: Annotated[
        Path | None,
        typer.Option("--checkpoint-class-token", metavar="FILE", help="Of --methods: one with a class token head."),
    ] = None,
    checkpoint_spatial: Annotated[
        Path | None,
        typer.Option("--checkpoint-spatial", metavar="FILE", help="Of --methods: one with a spatial token."),
    ] = None,
    source: Annotated[
        str, typer.Option("--source", help="Of --methods: where weights come from: auto, package or hub.")
    ] = "auto",
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Of --methods: only N photos, drawn by --seed.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of --methods: of --limit and of the intervals.")] = 0,
    restart: Annotated[
        bool, typer.Option("--restart", help="Of --methods: throw away what an earlier run left in --out.")
    ] = False,
) -> None:
    """Time operators against plain PyTorch, torch.compile, other packages and a bare copy; or the whole pipeline.

    Or, with --methods DATA, what every method costs and reaches on the same photos, in one table; the report is then
    DIR/methods.json of --out DIR, and a run that was killed goes on with the same command.

    Every operator's result is compared with the truth first; what does not match is not timed, and the exit code is
    then 1.
    """
    import torch
    from rich.console import Console

    from molt.benchmark import OPERATIONS, failed, report, run_all
    from molt.benchmark.machine import earlier
    from molt.cli import end_to_end, method_table

    if rehearse and device not in (None, "cpu"):
        raise typer.BadParameter(f"--rehearse: runs on the CPU, got --device {device}")
    device = "cpu" if rehearse else device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device {device}: expected cpu or cuda")
    if targets and device == "cpu" and not rehearse and not show_list:
        raise typer.BadParameter("--targets: they are a GPU's; with --rehearse its rows run on the CPU")
    if minutes is not None and not minutes > 0:
        raise typer.BadParameter(f"--minutes {minutes:g}: expected a number above 0")
    of_methods: dict[str, Any] = {
        "kind": kind,
        "split": split,
        "classes": classes,
        "class_map": class_map,
        "gt_map": gt_map,
        "checkpoint": checkpoint,
        "checkpoint_ts_cam": checkpoint_ts_cam,
        "checkpoint_class_token": checkpoint_class_token,
        "checkpoint_spatial": checkpoint_spatial,
        "source": source,
        "limit": limit,
        "seed": seed,
        "restart": restart,
    }
    if methods is not None:
        others: dict[str, Any] = {
            "OPERATION": operations,
            "--end-to-end": whole,
            "--quick": quick,
            "--minutes": minutes,
            "--targets": targets,
            "--resume": resume,
            "--random-weights": random_weights,
            "--rehearse": rehearse,
        }
        others |= {"--providers": providers, "--size": size, "--clusterer": clusterer, "--dtype": dtype}
        for name, value in others.items():
            if value:
                raise typer.BadParameter(f"{name}: does not go with --methods")
        method_table.run(
            context,
            method_table.Choice(methods, method, photos=photos, batch=batch, **of_methods),
            device,
            out,
            as_json=as_json,
            show_list=show_list,
            write=_write,
            dumps=dumps,
        )
        return
    for name, value in of_methods.items():
        if value != getattr(method_table.Choice, name):
            raise typer.BadParameter(f"--{name.replace('_', '-')}: goes with --methods only")
    if whole:
        if operations:
            raise typer.BadParameter(f"--end-to-end: measures no operator, got {', '.join(operations)}")
        end_to_end.run(
            context,
            end_to_end.Choice(
                providers, method, clusterer, batch, size, dtype, photos, targets, random_weights, rehearse, resume
            ),
            device,
            out,
            quick=quick,
            minutes=minutes,
            as_json=as_json,
            show_list=show_list,
            write=_write,
            dumps=dumps,
        )
        return
    ours: dict[str, Any] = {
        "photos": photos,
        "batch": batch,
        "size": size,
        "method": method,
        "clusterer": clusterer,
        "dtype": dtype,
        "random-weights": random_weights or None,
    }
    for name, value in ours.items():
        if value is not None:
            raise typer.BadParameter(f"--{name}: goes with --end-to-end only")
    chosen = list(dict.fromkeys(operations or OPERATIONS))
    for name in chosen:
        if name not in OPERATIONS:
            raise typer.BadParameter(f"no operation {name}; expected {', '.join(OPERATIONS)}")
    work = [OPERATIONS[name] for name in chosen]
    known = list(dict.fromkeys(provider.name for operation in work for provider in operation.providers))
    wanted = end_to_end.names("--providers", providers, known)
    if show_list:
        _list(work, "cuda" if targets or rehearse else device, targets)
        return
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"--device cuda: torch sees no CUDA device (torch {torch.__version__})")
    if targets and not any(operation.cases_on("cuda", targets=True) for operation in work):
        raise typer.BadParameter(f"--targets: nothing is asked of {', '.join(chosen)}")
    path = report_path(out, device, FILE, rehearse)

    console, errors = Console(highlight=False), Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDTH
    found = report([], device, quick=quick, seconds_total=0, rehearsal=rehearse)
    old, why = earlier(path, found) if resume else (None, None)
    if why is not None:
        errors.print(f"measured anew: {why}", markup=False)
    before: list[dict[str, Any]] = [] if old is None else old["rows"]
    kept: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in before:
        kept.setdefault((one["operation"], one["case"]), []).append(one)
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    status = errors.status("")
    progress: Progress = context.with_resource(Progress(bar=False))
    begin = functools.partial(progress.begin, status=status)

    try:
        how: dict[str, Any] = {"quick": quick, "targets": targets, "rehearse": rehearse, "minutes": minutes}
        for case in run_all(work, device, providers=wanted, earlier=before, begin=begin, **how):
            status.stop()
            kept[case[0]["operation"], case[0]["case"]] = case
            rows = [row for part in kept.values() for row in part]
            if not as_json:
                _show(console, case, rehearse)
            # After every case: what was measured outlives an interruption.
            seconds = time.perf_counter() - start
            found = report(rows, device, quick=quick, seconds_total=seconds, rehearsal=rehearse)
            _write(path, found)
    finally:
        status.stop()
    if as_json:
        print(dumps(found))
    errors.print(f"written to {path}", markup=False)
    wrong = failed(rows)
    for row in wrong:
        errors.print(f"{row['operation']}, {row['case']}: {row['provider']} {row['note']}", markup=False)
    if wrong:
        raise typer.Exit(FAILED)


def dumps(found: Mapping[str, Any]) -> str:
    """Return a report as JSON with one row a line."""
    head = json.dumps({key: value for key, value in found.items() if key != "rows"}, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in found["rows"])
    return f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}'


def report_path(out: Path, device: str, file: str, rehearse: bool) -> Path:
    """Return where a report goes, whose folder is there then; a rehearsal's apart from those that were measured.

    Raises:
        typer.BadParameter: a file is where a folder is needed.
        OSError: nothing can be written there.
    """
    from molt.benchmark import device_name

    path = out if out.suffix == ".json" else out / ("rehearsal" if rehearse else device_name(device)) / file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise typer.BadParameter(f"--out {out}: is or holds a file where a folder is needed") from None
    except OSError as error:
        raise OSError(f"--out {out}: cannot be written ({error.strerror})") from None
    check_out("--out", path, folder=False)
    return path


def _write(path: Path, found: Mapping[str, Any]) -> None:
    from molt._files import whole_file

    with whole_file(path) as part:
        part.write_text(dumps(found) + "\n", encoding="utf-8")


def _list(work: Iterable[Any], device: str, targets: bool) -> None:
    for operation in work:
        print(f"{operation.name}  (GB/s of: {operation.counted}; limit: {operation.limit})")
        print(f"  providers  {', '.join(provider.name for provider in operation.providers)}")
        for case in operation.cases_on(device, targets=targets):
            asked = ", ".join(f"{name} {value:g}" for name, value in case.targets.items())
            print(f"  {'* ' if case.headline else '  '}{case.name}{f'  (asked: {asked})' if asked else ''}")
    print(f"cases on {device}; * are those of --quick")


def _show(console: Any, rows: Sequence[Mapping[str, Any]], rehearse: bool) -> None:
    """Print the rows of one case as a table, and below it why rows have no time."""
    from rich.table import Table

    from molt.benchmark.targets import told
    from molt.cli.end_to_end import number

    title = f"{rows[0]['operation']}: {rows[0]['case']}"
    if rehearse:
        title = f"rehearsal with an image or two, times mean nothing: {title}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("provider", no_wrap=True)
    table.add_column("matches", no_wrap=True)
    for name in ("median ms", "20-80 %", "runs", "GB/s", "of limit", "x reference", "x best peer", "extra MiB"):
        table.add_column(name, justify="right")
    reasons = []
    for row in rows:
        if row["median_ms"] is None:
            kind, _, reason = (row["note"] or "not run").partition(": ")
            if row["match"] is False and row["max_error"] is not None:
                kind, reason = row["note"], ""
            table.add_row(row["provider"], kind)
            if reason:
                reasons.append(f"  {row['provider']}: {reason}")
            continue
        table.add_row(
            row["provider"],
            "limit" if row["kind"] == "limit" else f"to {row['max_error']:.1g}",
            _milliseconds(row["median_ms"]),
            f"{_milliseconds(row['p20_ms'])}-{_milliseconds(row['p80_ms'])}",
            str(row["runs"]),
            f"{row['GBps']:.3g}",
            number(row["share"], "{:.0%}"),
            number(row["speedup_reference"], "{:.2f}"),
            number(row["speedup_peer"], "{:.2f}"),
            number(None if row["extra_bytes"] is None else row["extra_bytes"] / 2**20, "{:.0f}"),
        )
    console.print(table)
    for reason in reasons + [f"  {text}" for row in rows if not rehearse for text in told(row)]:
        console.print(reason, markup=False, soft_wrap=True)


def _milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
