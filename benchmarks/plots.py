"""Draw what `molt benchmark` wrote, and put its table where the documentation has a place for it.

    python benchmarks/plots.py [REPORT.json ...] [--check]

Reports lie in benchmarks/results/<device>/, operators.json and end_to_end.json; others are copied there first. Each
operator, and the whole pipeline, becomes an SVG beside its report. In README.md, docs/*.md and benchmarks/README.md,
what stands between the markers <!-- operators:begin --> and <!-- operators:end -->, and likewise end-to-end and gpu (of
what is asked of a GPU, what is reached), is replaced by the tables. With --check nothing is written, and the exit code
is 1 where a table is not that of the committed reports.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molt.benchmark.targets import AT_MOST

ROOT = Path(__file__).resolve().parents[1]
FILE, WHOLE, TRAINING = "operators.json", "end_to_end.json", "training_speed.json"
BEGIN, END = "<!-- operators:begin -->", "<!-- operators:end -->"
WHOLE_BEGIN, WHOLE_END = "<!-- end-to-end:begin -->", "<!-- end-to-end:end -->"
GPU_BEGIN, GPU_END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
NAMES = (("method", "clusterer"), ("operation", "case"), ("model", "sizes"))  # of rows of each kind of report
NO_GPU = "No GPU run is committed yet."
COLOURS = {
    "native": "#d1495b",
    "variant": "#e8a0a9",
    "reference": "#30638e",
    "compiled": "#7fa3c1",
    "peer": "#8d99a6",
    "published": "#c9ced4",
    "published_bincount": "#aeb6bf",
    "limit": "#2b2b2b",
}
Report = Mapping[str, Any]


def load(path: Path) -> Report:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; molt benchmark writes molt-benchmark/<device>/{path.name}")
    report = json.loads(path.read_text(encoding="utf-8"))
    if report.get("schema") != 1 or not report.get("rows"):
        raise ValueError(f"{path}: not a report of this molt benchmark")
    if report.get("rehearsal"):
        raise ValueError(f"{path}: of a rehearsal, whose times mean nothing")
    return report


def is_whole(report: Report) -> bool:
    """Whether it is of `molt benchmark --end-to-end`."""
    return "ratio" in report["rows"][0]


def measured(report: Report) -> dict[tuple[Any, ...], str]:
    """What a report is of, each with a name to say."""
    if not is_whole(report):
        return {key: key[0] for key in cases(report)}
    keys = ("method", "clusterer", "provider", "batch", "size", "dtype")
    return {tuple(row[key] for key in keys): row["clusterer"] for row in report["rows"] if row["ms"] is not None}


def check_replaces(report: Report, path: Path, old: Path) -> None:
    """Refuse to put a partial report in the place of a fuller one."""
    if not old.is_file() or old.resolve() == path.resolve():
        return
    mine = measured(report)
    missing = {name for key, name in measured(load(old)).items() if key not in mine}
    if missing:
        lost = ", ".join(sorted(missing))
        raise ValueError(f"{path} lacks cases that {old} has (of {lost}); a full `molt benchmark` measures them")


def committed(root: Path, file: str = FILE) -> list[Report]:
    """The reports of a kind in benchmarks/results, by device."""
    return [load(path) for path in sorted((root / "benchmarks" / "results").glob(f"*/{file}"))]


def cases(report: Report) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Rows by operation and case, in the order of the registry's operations."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in report["rows"]:
        found.setdefault((row["operation"], row["case"]), []).append(row)
    return found


def table(report: Report) -> str:
    """One line per operator: its headline case, native against everything else."""
    lines = [
        f"{machine(report)}:",
        "",
        "| operator | case | native | against the reference | against the fastest peer | of copy or fill |",
        "|---|---|---|---|---|---|",
    ]
    for (operation, case), rows in cases(report).items():
        if not rows[0]["headline"]:
            continue
        natives = [row for row in rows if row["kind"] == "native"]
        if not natives or natives[0]["median_ms"] is None:
            why = natives[0]["note"] if natives else "not run: not asked for"
            lines.append(f"| `{operation}` | {case} | {why} | | | |")
            continue
        native = natives[0]
        peers = [row for row in rows if row["kind"] == "peer" and row["median_ms"] is not None]
        peer = min(peers, key=lambda row: row["median_ms"], default=None)
        limit = next((row["provider"] for row in rows if row["kind"] == "limit"), "")
        against = "" if peer is None else f"{ratio(native['speedup_peer'])} ({peer['provider']})"
        lines.append(
            f"| `{operation}` | {case} | {milliseconds(native['median_ms'])} | {ratio(native['speedup_reference'])} "
            f"| {against} | {native['share']:.0%} of {limit} |"
        )
    return "\n".join(lines)


def machine(report: Report) -> str:
    """What a report was measured on, and when."""
    cuda = f", CUDA {report['cuda']}" if report["cuda"] else f", {report['threads']} threads"
    return f"`{report['device']}`, torch {report['versions']['torch']}{cuda}, {report['date'][:10]}"


def whole_table(report: Report) -> str:
    """One line per method and clusterer of the headline: each provider's time over the bare forward passes'."""
    groups = headline(report)
    row = next(iter(groups.values()))[0]
    lines = [
        f"{machine(report)}, {row['batch']} x {row['size']} px, {row['dtype']}; times the bare forward passes:",
        "",
        "| method | clusters | photos/s | native | reference | published, vote counted | published "
        "| IoU, ARI against the reference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (method, clusterer), rows in groups.items():
        by_name = {row["provider"]: row for row in rows}
        native = by_name.get("native")
        if native is None or native["ms"] is None:
            why = native["note"] if native else "not run: not asked for"
            lines.append(f"| `{method}` | {clusterer} | {why} | | | | | |")
            continue
        ratios = [whole_ratio(by_name.get(name)) for name in ("native", "reference", "published_bincount", "published")]
        untrained = ", random weights" if native.get("weights") == "random" else ", random head"
        name = f"`{method}`{untrained if native['trained'] is False else ''}"
        alike = [f"{native[key]:.3f}" for key in ("iou_reference", "ari_reference") if native[key] is not None]
        mark = "~" if native["extrapolated"] else ""
        lines.append(
            f"| {name} | {clusterer} | {mark}{native['photos_per_s']:.3g} | {' | '.join(ratios)} | {', '.join(alike)} |"
        )
    if any(row["extrapolated"] for rows in groups.values() for row in rows):
        lines += ["", "~ extrapolated from fewer photos or clustering steps."]
    return "\n".join(lines)


def targets_table(report: Report) -> str:
    """One line per number that is asked of a row, missed ones named as such; nothing where none is."""
    lines = []
    for row in report["rows"] if "rows" in report else report["loop"]:
        for name, asked in row.get("targets", {}).items():
            what = next(keys for keys in NAMES if keys[0] in row)
            random = ", random weights" if row.get("weights") == "random" else ""
            bound = f"{name} {'at most' if name in AT_MOST else 'at least'} {asked:g}"
            got = "not measured" if row[name] is None else f"{row[name]:.3g}"
            got = f"**{got}, missed**" if name in row["missed"] else got
            case = "/".join(map(str, row["sizes"])) + " px, fine-tuning" if what[1] == "sizes" else row[what[1]]
            note = (row.get("note") or "") if name in row["missed"] else ""
            lines.append(f"| `{row[what[0]]}`{random} | {case} | {bound} | {got} | {note} |")
    head = [f"{machine(report)}:", "", "| what | case | asked | reached | |", "|---|---|---|---|---|"]
    return "\n".join(head + lines) if lines else ""


def headline(report: Report) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """The headline's rows by method and clusterer, method by method."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in report["rows"]:
        if row["headline"]:
            found.setdefault((row["method"], row["clusterer"]), []).append(row)
    methods = list(dict.fromkeys(method for method, _ in found))
    return dict(sorted(found.items(), key=lambda item: methods.index(item[0][0])))


def whole_ratio(row: Mapping[str, Any] | None) -> str:
    if row is None or row["ratio"] is None:
        return ""
    return f"{'~' if row['extrapolated'] else ''}{ratio(row['ratio'])}"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} x" if value < 10 else f"{value:.0f} x"


def milliseconds(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f} ms"


def pages(root: Path, begin: str = BEGIN) -> list[Path]:
    """The pages that have a place for a table."""
    found = [root / "README.md", *sorted((root / "docs").glob("*.md")), root / "benchmarks" / "README.md"]
    return [page for page in found if page.exists() and begin in page.read_text(encoding="utf-8")]


def filled(text: str, tables: str, begin: str = BEGIN, end: str = END) -> str:
    """A page with the tables between its markers."""
    pattern = re.compile(rf"^{re.escape(begin)}\n.*?^{re.escape(end)}$", re.DOTALL | re.MULTILINE)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"expected one {begin} on a line of its own and one {end} after it")
    inside = f"\n{tables}\n\n" if tables else ""
    return pattern.sub(lambda _: f"{begin}\n{inside}{end}", text)


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw one SVG per operation, a panel per case with two or more times; return the files."""
    plt = pyplot()
    panels: dict[str, list[tuple[str, list[Mapping[str, Any]]]]] = {}
    for (operation, case), rows in cases(report).items():
        timed = [row for row in rows if row["median_ms"] is not None]
        if len(timed) > 2:
            panels.setdefault(operation, []).append((case, timed))
    drawn = []
    for operation, found in panels.items():
        heights = [len(rows) + 1.5 for _, rows in found]
        figure, axes = plt.subplots(
            len(found),
            1,
            figsize=(7.5, 0.2 * sum(heights) + 0.6),
            height_ratios=heights,
            squeeze=False,
            sharex=True,
            layout="constrained",
        )
        for axis, (case, rows) in zip(axes[:, 0], found, strict=True):
            _panel(axis, case, rows)
        times = [row["median_ms"] for _, rows in found for row in rows]
        axes[0, 0].set_xlim(10 ** math.floor(math.log10(min(times)) - 0.3), max(times) * 6)
        axes[-1, 0].set_xlabel("median ms, logarithmic")
        figure.suptitle(f"{operation}, {report['device']}", x=0.01, ha="left", fontweight="bold")
        drawn.append(saved(figure, folder / f"{operation}.svg"))
    return drawn


def draw_whole(report: Report, folder: Path) -> list[Path]:
    """Draw the headline's times over the bare forward passes, a panel a method; return the file, if there are any."""
    plt = pyplot()
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for (method, _), rows in headline(report).items():
        panels.setdefault(method, []).extend(row for row in rows if row["ratio"] is not None)
    panels = {method: rows for method, rows in panels.items() if rows}
    if not panels:
        return []
    heights = [len(rows) + 1.5 for rows in panels.values()]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(7.5, 0.2 * sum(heights) + 0.6),
        height_ratios=heights,
        squeeze=False,
        sharex=True,
        layout="constrained",
    )
    for axis, (method, rows) in zip(axes[:, 0], panels.items(), strict=True):
        order = rows[::-1]
        ratios = [row["ratio"] for row in order]
        axis.barh(range(len(order)), ratios, color=[COLOURS[row["provider"]] for row in order], height=0.75)
        axis.set_yticks(range(len(order)), [f"{row['clusterer']}, {row['provider']}" for row in order])
        for place, row in enumerate(order):
            axis.text(row["ratio"] * 1.06, place, whole_ratio(row), va="center")
        axis.axvline(1, color=COLOURS["limit"], linewidth=1)
        first = rows[0]
        axis.set_title(f"{method}, {first['batch']} x {first['size']} px, {first['dtype']}", loc="left", fontsize=8)
        axis.set_xscale("log")
        axis.spines[["top", "right"]].set_visible(False)
    every = [row["ratio"] for rows in panels.values() for row in rows]
    axes[0, 0].set_xlim(min(0.5, *every) * 0.9, max(every) * 6)
    axes[-1, 0].set_xlabel("time of the whole over the bare forward passes, logarithmic")
    figure.suptitle(f"photos to boxes, {report['device']}", x=0.01, ha="left", fontweight="bold")
    return [saved(figure, folder / "end_to_end.svg")]


def pyplot() -> Any:
    """matplotlib, set up to draw the same bytes again."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "molt", "svg.fonttype": "none", "font.size": 8})
    from matplotlib import pyplot as plt

    return plt


def saved(figure: Any, path: Path) -> Path:
    """Write a figure; matplotlib ends lines with spaces, which the repository's checks do not let pass."""
    figure.savefig(path, metadata={"Date": None})
    pyplot().close(figure)
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")
    return path


def _panel(axis: Any, case: str, rows: Sequence[Mapping[str, Any]]) -> None:
    rows = sorted(rows, key=lambda row: -row["median_ms"])
    times = [row["median_ms"] for row in rows]
    axis.barh(range(len(rows)), times, color=[COLOURS[row["kind"]] for row in rows], height=0.75)
    axis.set_xscale("log")
    axis.set_yticks(range(len(rows)), [row["provider"] for row in rows])
    for place, time in enumerate(times):
        axis.text(time * 1.06, place, milliseconds(time), va="center")
    axis.set_title(case, loc="left", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="*", type=Path, help="by default those in benchmarks/results")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a table differs")
    options = parser.parse_args(arguments)
    results = root / "benchmarks" / "results"
    if not options.check:
        for path in options.reports or sorted([*results.glob(f"*/{FILE}"), *results.glob(f"*/{WHOLE}")]):
            report = load(path)
            folder = results / report["device"]
            target = folder / (WHOLE if is_whole(report) else FILE)
            check_replaces(report, path, target)
            folder.mkdir(parents=True, exist_ok=True)
            if path.resolve() != target.resolve():
                target.write_bytes(path.read_bytes())
            for drawn in draw_whole(report, folder) if is_whole(report) else draw(report, folder):
                print(drawn)
    reports = [*committed(root), *committed(root, WHOLE)]
    if options.check and options.reports:
        reports = [load(path) for path in options.reports]
    wrong = 0
    operators = [table(report) for report in reports if not is_whole(report)]
    wholes = [whole_table(report) for report in reports if is_whole(report)]
    training = [json.loads(path.read_text()) for path in sorted(root.glob(f"benchmarks/results/*/{TRAINING}"))]
    asked = [found for report in [*reports, *training] if (found := targets_table(report))] or [NO_GPU]
    places = ((operators, BEGIN, END), (wholes, WHOLE_BEGIN, WHOLE_END), (asked, GPU_BEGIN, GPU_END))
    for found, begin, end in places:
        tables = "\n\n".join(found)
        for page in pages(root, begin):
            text = page.read_text(encoding="utf-8")
            new = filled(text, tables, begin, end)
            if new == text:
                continue
            if options.check:
                print(
                    f"{page}: the table is not that of the committed reports; run benchmarks/plots.py", file=sys.stderr
                )
                wrong = 1
            else:
                page.write_text(new, encoding="utf-8")
                print(page)
    return wrong


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"plots.py: {error}")
