"""Draw what `molt benchmark` wrote, and put its table where the documentation has a place for it.

    python benchmarks/plots.py [OPERATORS.json ...] [--check]

Reports lie in benchmarks/results/<device>/operators.json; others are copied there first. Each operator becomes an SVG
beside its report. In README.md, docs/*.md and benchmarks/README.md, what stands between the markers
<!-- operators:begin --> and <!-- operators:end --> is replaced by the table. With --check nothing is written, and the
exit code is 1 where a table is not that of the committed reports.
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

ROOT = Path(__file__).resolve().parents[1]
FILE = "operators.json"
BEGIN, END = "<!-- operators:begin -->", "<!-- operators:end -->"
COLOURS = {
    "native": "#d1495b",
    "variant": "#e8a0a9",
    "reference": "#30638e",
    "compiled": "#7fa3c1",
    "peer": "#8d99a6",
    "published": "#c9ced4",
    "limit": "#2b2b2b",
}
Report = Mapping[str, Any]


def load(path: Path) -> Report:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; molt benchmark writes molt-benchmark/<device>/{FILE}")
    report = json.loads(path.read_text(encoding="utf-8"))
    if report.get("schema") != 1 or not report.get("rows"):
        raise ValueError(f"{path}: not a report of this molt benchmark")
    return report


def check_replaces(report: Report, path: Path, old: Path) -> None:
    """Refuse to put a partial report in the place of a fuller one."""
    if not old.is_file() or old.resolve() == path.resolve():
        return
    missing = [name for name in dict(cases(load(old))) if name not in cases(report)]
    if missing:
        lost = ", ".join(sorted({operation for operation, _ in missing}))
        raise ValueError(f"{path} lacks cases that {old} has (of {lost}); a full `molt benchmark` measures them")


def committed(root: Path) -> list[Report]:
    """The reports in benchmarks/results, by device."""
    return [load(path) for path in sorted((root / "benchmarks" / "results").glob(f"*/{FILE}"))]


def cases(report: Report) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    """Rows by operation and case, in the order of the registry's operations."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in report["rows"]:
        found.setdefault((row["operation"], row["case"]), []).append(row)
    return found


def table(report: Report) -> str:
    """One line per operator: its headline case, native against everything else."""
    versions = report["versions"]
    cuda = f", CUDA {report['cuda']}" if report["cuda"] else f", {report['threads']} threads"
    lines = [
        f"`{report['device']}`, torch {versions['torch']}{cuda}, {report['date'][:10]}:",
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


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} x" if value < 10 else f"{value:.0f} x"


def milliseconds(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f} ms"


def pages(root: Path) -> list[Path]:
    """The pages that have a place for the table."""
    found = [root / "README.md", *sorted((root / "docs").glob("*.md")), root / "benchmarks" / "README.md"]
    return [page for page in found if page.exists() and BEGIN in page.read_text(encoding="utf-8")]


def filled(text: str, tables: str) -> str:
    """A page with the tables between its markers."""
    pattern = re.compile(rf"^{re.escape(BEGIN)}\n.*?^{re.escape(END)}$", re.DOTALL | re.MULTILINE)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"expected one {BEGIN} on a line of its own and one {END} after it")
    inside = f"\n{tables}\n\n" if tables else ""
    return pattern.sub(lambda _: f"{BEGIN}\n{inside}{END}", text)


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw one SVG per operation, a panel per case with two or more times; return the files."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "molt", "svg.fonttype": "none", "font.size": 8})
    from matplotlib import pyplot as plt

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
        path = folder / f"{operation}.svg"
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
        # matplotlib ends lines with spaces, which the repository's checks do not let pass
        lines = path.read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join(line.rstrip() for line in lines) + "\n", encoding="utf-8")
        drawn.append(path)
    return drawn


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
    if not options.check:
        results = root / "benchmarks" / "results"
        for path in options.reports or sorted(results.glob(f"*/{FILE}")):
            report = load(path)
            folder = results / report["device"]
            check_replaces(report, path, folder / FILE)
            folder.mkdir(parents=True, exist_ok=True)
            if path.resolve() != (folder / FILE).resolve():
                (folder / FILE).write_bytes(path.read_bytes())
            for drawn in draw(report, folder):
                print(drawn)
    reports = [load(path) for path in options.reports] if options.check and options.reports else committed(root)
    tables = "\n\n".join(table(report) for report in reports)
    wrong = 0
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        new = filled(text, tables)
        if new == text:
            continue
        if options.check:
            print(f"{page}: the table is not that of the committed reports; run benchmarks/plots.py", file=sys.stderr)
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
