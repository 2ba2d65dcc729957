"""`molt benchmark --end-to-end`: the whole pipeline beside the bare forward passes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from molt._words import count
from molt.cli._progress import Progress
from molt.cli._say import FAILED

FILE = "end_to_end.json"
WIDTH = 150  # of a table that no terminal limits


@dataclass(frozen=True)
class Choice:
    """What is asked for, as typed; None takes the device's default."""

    providers: str | None
    methods: str | None
    clusterers: str | None
    batch: str | None
    size: str | None
    dtype: str | None
    photos: Path | None
    targets: bool = False
    random_weights: bool = False
    rehearse: bool = False
    resume: bool = False


def run(
    context: typer.Context,
    choice: Choice,
    device: str,
    out: Path,
    *,
    quick: bool,
    minutes: float | None,
    as_json: bool,
    show_list: bool,
    write: Callable[[Path, Mapping[str, Any]], None],
    dumps: Callable[[Mapping[str, Any]], str],
) -> None:
    """Measure what is chosen, print it, and write it to ``out`` after every row.

    Raises:
        typer.BadParameter: a name or number that is none of those possible.
        typer.Exit: with code 1 where a configuration raised.
    """
    import torch
    from rich.console import Console

    from molt.benchmark import configurations, end_to_end, pipelines
    from molt.benchmark.end_to_end_rows import key
    from molt.benchmark.machine import earlier
    from molt.cli.benchmark import report_path

    kind = "cuda" if choice.rehearse else device
    dtype = choice.dtype or ("bfloat16" if device == "cuda" else "float32")
    (dtype,) = names("--dtype", dtype, tuple(end_to_end.DTYPES)) or ("",)
    work = configurations.configurations(
        kind,
        methods=names("--method", choice.methods, tuple(pipelines.METHODS)),
        clusterers=names("--clusterer", choice.clusterers, pipelines.CLUSTERERS),
        providers=names("--providers", choice.providers, configurations.PROVIDERS),
        batches=numbers("--batch", choice.batch, 1),
        sizes=numbers("--size", choice.size, 32),
        quick=quick,
        targets=choice.targets,
    )
    if choice.rehearse:
        work = configurations.rehearsed(work)
    if not work and choice.targets:
        raise typer.BadParameter("--targets: nothing is asked of these rows, see --list without other options")
    if not work:
        raise typer.BadParameter("nothing to measure: the papers' loops are those of molt_* with a network's clusters")
    if show_list:
        for one in work:
            print(f"{'* ' if one.headline else '  '}{one}")
        return
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"--device cuda: torch sees no CUDA device (torch {torch.__version__})")
    path = report_path(out, device, FILE, choice.rehearse)
    how: dict[str, Any] = {"seconds": 0.0, "tiny": True} if choice.rehearse else {}
    how |= {"pretrained": not choice.random_weights, "folder": choice.photos}
    try:
        bench = end_to_end.Bench(device, dtype=end_to_end.DTYPES[dtype], **how)
    except ValueError as error:
        raise typer.BadParameter(f"--photos {error}") from None

    console, errors = Console(highlight=False), Console(stderr=True, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDTH
    found = end_to_end.report([], bench, quick=quick, seconds_total=0, rehearsal=choice.rehearse)
    old, why = earlier(path, found) if choice.resume else (None, None)
    if why is not None:
        errors.print(f"measured anew: {why}", markup=False)
    before: list[dict[str, Any]] = [] if old is None else old["rows"]
    kept = {key(row): row for row in before}
    rows: list[dict[str, Any]] = []
    start = time.perf_counter()
    status = errors.status("")
    progress: Progress = context.with_resource(Progress(bar=False))
    begin = functools.partial(progress.begin, status=status)

    try:
        for row in end_to_end.run_all(bench, work, minutes=minutes, earlier=before, begin=begin):
            kept[key(row)] = row
            rows = list(kept.values())
            # After every row: what was measured outlives an interruption.
            taken = time.perf_counter() - start
            found = end_to_end.report(rows, bench, quick=quick, seconds_total=taken, rehearsal=choice.rehearse)
            write(path, found)
    except KeyboardInterrupt:
        status.stop()
        if not as_json:
            show(console, rows)
        errors.print(f"interrupted; {count(len(rows), 'row is', 'rows are')} in {path}", markup=False)
        raise
    finally:
        status.stop()
    if as_json:
        print(dumps(found))
    else:
        show(console, rows)
    errors.print(f"written to {path}", markup=False)
    wrong = end_to_end.failed(rows)
    for row in wrong:
        errors.print(f"{row['method']}, {row['clusterer']}, {row['provider']}: {row['note']}", markup=False)
    if wrong:
        raise typer.Exit(FAILED)


def names(option: str, text: str | None, known: Sequence[str]) -> list[str] | None:
    """Return names parted by commas, each once; None for None.

    Raises:
        typer.BadParameter: no name, or one that is not known.
    """
    if text is None:
        return None
    found = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in found:
        if name not in known:
            raise typer.BadParameter(f"{option} {name}: no such name here; expected {', '.join(known)}")
    if not found:
        raise typer.BadParameter(f"{option}: names nothing; expected {', '.join(known)}")
    return found


def numbers(option: str, text: str | None, least: int) -> list[int] | None:
    """Return whole numbers parted by commas; None for None.

    Raises:
        typer.BadParameter: something else, or a number below ``least``.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise typer.BadParameter(f"{option} {text}: expected whole numbers of at least {least}, parted by commas")
    return list(dict.fromkeys(int(part) for part in parts))


def show(console: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one table a method, batch and size, the limit 1.0 being the bare forward passes."""
    from rich.table import Table

    from molt.benchmark.targets import told

    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["batch"], row["size"], row["dtype"]), []).append(row)
    for (method, batch, size, dtype), found in groups.items():
        title = f"{method}: {batch} x {size} px, {dtype}"
        if any(row["weights"] == "random" for row in found):
            title += ", random weights"
        elif any(row["trained"] is False for row in found):
            title += ", random head"
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("clusterer", no_wrap=True)
        table.add_column("provider", no_wrap=True)
        for name in ("photos/s", "ms", "bare ms", "x bare", "peak MiB", "IoU ref", "ARI ref", "hits"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("slowest stages, ms")
        for row in found:
            if row["ms"] is None:
                table.add_row(row["clusterer"], row["provider"], *[""] * 8, row["note"])
                continue
            mark = "~" if row["extrapolated"] else ""
            slowest = sorted(row["stages"], key=lambda stage: -stage["ms"])[:3]
            table.add_row(
                row["clusterer"],
                row["provider"],
                f"{mark}{row['photos_per_s']:.3g}",
                f"{mark}{row['ms']:.4g}",
                f"{row['bare_ms']:.4g}",
                f"{mark}{row['ratio']:{'.2f' if row['ratio'] < 10 else '.0f'}}",
                number(row["peak_mib"], "{:.0f}"),
                number(row["iou_reference"], "{:.3f}"),
                number(row["ari_reference"], "{:.3f}"),
                number(row["hits"], "{:.0%}"),
                ", ".join(f"{stage['stage']} {stage['ms']:.3g}" for stage in slowest),
            )
        console.print(table)
        for row in found:
            for text in told(row):
                console.print(f"  {row['clusterer']}, {text}", markup=False)
            if row["ms"] is not None and row["note"]:
                console.print(f"  {row['clusterer']}, {row['provider']}: {row['note']}", markup=False)
    if any(row["extrapolated"] for row in rows):
        console.print("~ extrapolated from fewer photos or clustering steps, see the JSON", markup=False)


def number(value: float | None, form: str) -> str:
    """Return a number as text, nothing for None."""
    return "" if value is None else form.format(value)
