"""Scores of runs as tables: on the terminal, as CSV and as LaTeX."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molt._files import whole_file
from molt._text import readable
from molt._words import count
from molt.cli._say import SHOWN

if TYPE_CHECKING:
    from molt.evaluation.runs import Run

WIDTH = 110  # of tables that no terminal limits
REPORT = "report.html"
Scores = Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]]
_TEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def write_csv(path: Path, rows: Scores) -> None:
    """Write a line a run: its name, then of each metric the percentage, its 95 % interval and what it is of.

    Args:
        path: the file; it appears under this name only once it is whole.
        rows: names of the runs and their scores, as ``run.json`` has them.

    Raises:
        OSError: the file cannot be written.
    """
    metrics = list(dict.fromkeys(name for _, scores in rows for name in scores))
    parts = ("", "_low", "_high", "_photos", "_pairs")
    with whole_file(path) as part, part.open("w", encoding="utf-8", newline="", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *(metric + end for metric in metrics for end in parts)])
        for name, scores in rows:
            cells: list[Any] = [name]
            for metric in metrics:
                entry = scores.get(metric)
                one = [""] * len(parts)
                if entry is not None:
                    one = [entry["value"], *entry["interval"], *_counted(entry, several=True)]
                cells += one
            writer.writerow(cells)


def write_latex(path: Path, rows: Scores, *, fixed: bool, said: Sequence[str] = ()) -> None:
    """Write the scores as a table for LaTeX with the package booktabs: a row a run, a column a metric, in percent.

    Args:
        path: the file; it appears under this name only once it is whole.
        rows: as for :func:`write_csv`.
        fixed: whether no threshold was chosen on the photos.
        said: lines of comment above the table.

    Raises:
        OSError: the file cannot be written.
    """
    from molt.evaluation.scores import title

    metrics = list(dict.fromkeys(name for _, scores in rows for name in scores))
    lines = [f"% {' '.join(text.split())}" for text in said]
    lines += [rf"\begin{{tabular}}{{l{'r' * len(metrics)}}}", r"\toprule"]
    lines.append(" & ".join(["Method", *(_tex(title(metric, fixed=fixed)) for metric in metrics)]) + r" \\")
    lines.append(r"\midrule")
    for name, scores in rows:
        cells = [f"{scores[metric]['value']:.1f}" if metric in scores else "--" for metric in metrics]
        lines.append(" & ".join([_tex(name), *cells]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    with whole_file(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace", newline="\n")


def _counted(entry: Mapping[str, Any], *, several: bool) -> list[str]:
    """Return the numbers of photos, and where some photo has several classes of photo-class pairs."""
    return [str(entry["photos"]), *([str(entry.get("pairs", entry["photos"]))] if several else [])]


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in " ".join(text.split()))


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
    table = Table(*heads, title=escape(readable(title)), title_justify="left")
    for row in rows:
        table.add_row(*(escape(readable(cell)) for cell in row))
    return table


def _percent(entry: Mapping[str, Any]) -> tuple[str, str]:
    low, high = entry["interval"]
    return f"{entry['value']:.2f}", f"{low:.1f} to {high:.1f}"


def show(run: Run, folder: Path | None) -> None:
    """Print a run's tables, how it was scored, the weights behind it and what was wrong."""
    from molt.evaluation.scores import title
    from molt.evaluation.summary import fixed_threshold, protocol_line

    info, console = run.info, _console()
    data, scores = info["data"], info["scores"]
    fixed = fixed_threshold(info)
    # Photos and photo-class pairs are told apart where a photo has several classes.
    several = any("pairs" in entry for entry in scores.values())
    heads = ("photos", "photo-class pairs") if several else ("photos",)
    rows = [
        (title(name, fixed=fixed is not None), *_percent(entry), *_counted(entry, several=several))
        for name, entry in scores.items()
    ]
    console.print(_table(f"{run.name} on {data['name']}", ("metric", "%", "95 % interval", *heads), rows))
    if info["by_iou"]:
        rows_iou = [
            (
                title("max_box_acc", fixed=fixed is not None) if e["kind"] == "v1" else f"any box, IoU {e['iou']:g}",
                *_percent(e),
                f"{e['threshold']:.3g}",
            )
            for e in info["by_iou"]
        ]
        where = "at its best threshold" if fixed is None else "at the fixed threshold"
        console.print(_table(where, ("box", "%", "95 % interval", "threshold"), rows_iou))
        split = ", ".join(f"{kind} {number}" for kind, number in info["errors"].items())
        console.print(f"largest box: {split}", soft_wrap=True, markup=False)
    plain = _printer(console)
    plain(f"protocol: {protocol_line(info)}")
    for used in info["method"].get("weights", ()):
        plain(f"weights: {used['model']}, {used['source']}; seen pixel masks in training: {used['saw_masks']}")
    for what, number in info["data"]["left_out"].items():
        plain(f"left out by the reader: {what}: {number:,}")
    problems = info["problems"]
    if problems["count"]:
        plain(f"{count(problems['count'], 'problem')}:")
        for problem in problems["listed"][:SHOWN]:
            plain(f"  {problem['file']}: {problem['message']} (expected {problem['expected']})")
        if problems["count"] > SHOWN:
            plain(f"  and {problems['count'] - SHOWN} more" + (f", all in {folder}" if folder else ""))
    if folder is not None:
        plain(f"run in {folder}, report in {folder / REPORT}")


def show_comparison(found: Mapping[str, Any]) -> None:
    from molt.evaluation.scores import title
    from molt.evaluation.summary import said_counts, unit

    console = _console()
    plain = _printer(console)
    rows = [
        (name, *("{} ({})".format(*_percent(entries[i])) for entries in found["scores"].values()))
        for i, name in enumerate(found["runs"])
    ]
    heads = [title(metric, fixed=found["fixed"]) for metric in found["scores"]]
    console.print(_table(f"on the {said_counts(found)} that all share, %", ("run", *heads), rows))
    changes = [
        (
            f"{entry['run']} - {entry['against']}",
            title(entry["metric"], fixed=found["fixed"]),
            f"{entry['difference']:+.2f}",
            "{:+.1f} to {:+.1f}".format(*entry["interval"]),
        )
        for entry in found["differences"]
    ]
    console.print(_table("differences", ("runs", "metric", "points", "95 % interval"), changes))
    for left in found["unshared"]:
        more = ", ..." if left["count"] > len(left["photos"]) else ""
        plain(f"{count(left['count'], unit(found))} left out, {left['reason']}: {', '.join(left['photos'])}{more}")
    for other in found["protocol"]:
        said = ", ".join(f"{name} {value}" for name, value in other["values"].items())
        plain(f"protocols differ in {other['setting']}: {said}")


def _printer(console: Any) -> Callable[[str], None]:
    def plain(text: str) -> None:
        console.print(readable(text), soft_wrap=True, markup=False)

    return plain
