"""What each method costs and what it reaches, on the same photos and the same device: a row a method."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from molt._words import count
from molt.benchmark import method_costs
from molt.benchmark.machine import about
from molt.benchmark.method_costs import COUNTED
from molt.benchmark.method_rows import Entry, Plan
from molt.benchmark.method_scores import score
from molt.benchmark.registry import NotRun, first_line
from molt.data.annotations import LocalizationSet
from molt.evaluation._spool import RunError, read_json
from molt.evaluation.runs import Settings

SCHEMA = 1
FILE, RUNS = "methods.json", "runs"
SECONDS = {"cpu": 2.0, "cuda": 1.0}  # of timing a function, where a call is that quick
GT_MAPS = ("label", "top1", "agnostic")
Groups = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class Work:
    """What to measure, and how.

    Attributes:
        data: the photos.
        plans: the rows.
        groups: from a method's class names to the method's classes, of several the likeliest, by the set's labels; -1
            is 'object', and a label that has none is left out. Raises ValueError where the two do not fit.
        out: folder of the report and of every row's evaluation, which a later call goes on with.
        device: ``"cpu"`` or ``"cuda"``.
        gt_map: whose map is scored: ``"label"``, ``"top1"`` or ``"agnostic"``.
        batch: photos at once in timing.
        settings: of the evaluation.
        seconds: of timing a function; None takes the device's usual.
        restart: throw away what an earlier run left.
        said: of the set and its classes, plain values that must be the same for a run to go on.
    """

    data: LocalizationSet
    plans: Sequence[Plan]
    groups: Callable[[tuple[str, ...]], Groups]
    out: Path
    device: str = "cpu"
    gt_map: str = "label"
    batch: int = 1
    settings: Settings = field(default_factory=Settings)
    seconds: float | None = None
    restart: bool = False
    said: Mapping[str, Any] | None = None

    @property
    def path(self) -> Path:
        """The report's file."""
        return self.out / FILE

    def folder(self, name: str) -> Path:
        """Return the folder of a row's evaluation."""
        return self.out / RUNS / re.sub(r"[^A-Za-z0-9_+.-]+", "-", name)


def run_all(work: Work, begin: Callable[[str], None] = lambda text: None) -> Iterator[dict[str, Any]]:
    """Yield the report, more of it every time: after the costs of each row, after the times, after each row's scores.

    Rows that cannot run say why in ``reason``. What an earlier run in ``work.out`` has measured is taken from it where
    device, versions and rows are the same.

    Args:
        work: what to measure.
        begin: called with what is done next.

    Raises:
        RunError: ``work.out`` holds a run of other photos, settings or weights.
        ValueError: an argument out of range, or photos none of which can be read.
    """
    if work.gt_map not in GT_MAPS:
        raise ValueError(f"gt_map must be one of {', '.join(GT_MAPS)}, got {work.gt_map!r}")
    start, head = time.perf_counter(), _head(work)
    rows: dict[str, dict[str, Any]] = {}
    entries: dict[str, Entry] = {}
    groups: dict[str, Groups | None] = {}
    first: dict[Any, str] = {}
    for plan in work.plans:
        begin(f"{plan.name}: loading")
        row = rows[plan.name] = empty_row(plan, work)
        if plan.key is not None and plan.key in first:
            row["same_as"] = first[plan.key]
            continue
        first[plan.key] = plan.name
        with _noted(row):
            entry = plan.build()
            groups[plan.name] = _groups(work, entry)
            row |= method_costs.parameters(entry)
            row["method"] = _method(plan, entry, work, groups[plan.name])
            row["weights"] = [info.to_json() for info in entry.weights]
            row["saw_masks"] = method_costs.saw_masks(entry)
            entries[plan.name] = entry

    def report() -> dict[str, Any]:
        for row in rows.values():
            row["status"] = "ran" if row["reason"] is None else "not_run"
            if row["same_as"] is not None:
                row |= {k: v for k, v in rows[row["same_as"]].items() if k not in ("name", "does", "same_as")}
        taken = round(time.perf_counter() - start, 1)
        return head | {"seconds_total": taken, "rows": list(rows.values())}

    earlier = _earlier(work, report())
    if not _take_costs(rows, earlier, report()):
        yield from _measure_costs(work, entries, rows, report, begin)
    for name, entry in entries.items():
        if rows[name]["reason"] is None:
            begin(f"{name}: {count(len(work.data), 'photo')}")
            with _noted(rows[name]):
                rows[name] |= score(work, name, entry, groups[name], rows[name]["method"])
        yield report()
    yield report()


def empty_row(plan: Plan, work: Work) -> dict[str, Any]:
    """Return a row without measurements."""
    row: dict[str, Any] = {
        "name": plan.name,
        "does": plan.does,
        "status": "ran",
        "reason": None,
        "failed": False,
        "same_as": None,
    }
    row |= {"photos": len(work.data), "seeds": 1, "score": None, "interval": None, "scores": {}}
    row |= {"thresholds": [], "accuracy": None, "accuracy_note": None, "problems": None}
    row |= dict.fromkeys(("parameters", "trained_parameters", *method_costs.COLUMNS))
    return row | {"runs": 0, "weights": [], "saw_masks": None, "method": None}


@contextmanager
def _noted(row: dict[str, Any]) -> Iterator[None]:
    """Turn what is missing or raised into a note; other settings in the folder stop the run."""
    try:
        yield
    except RunError:
        raise
    except torch.OutOfMemoryError as error:
        row["reason"] = f"out of memory: {first_line(error)}"
    except (NotRun, ImportError, FileNotFoundError) as error:
        row["reason"] = first_line(error)
    except Exception as error:  # one row's failure must not end the run
        row |= {"reason": f"raises {type(error).__name__}: {first_line(error)}", "failed": True}


def _groups(work: Work, entry: Entry) -> Groups | None:
    """Return the classes by label, None where the method or the run asks for none."""
    if entry.needs_class and work.gt_map == "agnostic":
        raise NotRun("its map is of a class, there is none of 'object'")
    if entry.class_names is None:
        return None
    try:
        return work.groups(entry.class_names)
    except ValueError as error:
        if work.gt_map == "label":
            raise NotRun(first_line(error)) from error
        return None


def _method(plan: Plan, entry: Entry, work: Work, groups: Groups | None) -> dict[str, Any]:
    """Return what tells this method from another with the same name."""
    said: dict[str, Any] = {"name": plan.name, "gt_map": work.gt_map if entry.class_names is not None else "agnostic"}
    said |= {"size": list(entry.size), "weights": [info.to_json() for info in entry.weights]}
    if groups is not None:
        said["classes"] = {str(label): list(group) for label, group in sorted(groups.items())}
    plain: dict[str, Any] = json.loads(json.dumps(said | dict(entry.said or {})))
    return plain


def _head(work: Work) -> dict[str, Any]:
    head = about(work.device, SCHEMA)
    data = {"name": work.data.name, "kind": work.data.kind, "photos": len(work.data), "classes": len(work.data.classes)}
    of = {"data": data, "gt_map": work.gt_map, "protocol": work.settings.to_json()} | dict(work.said or {})
    return head | {"table": "methods", "of": of, "batch": work.batch, "counted": COUNTED}


def _earlier(work: Work, now: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the report of an earlier run in the folder, None where there is none or it is thrown away.

    Raises:
        RunError: it is of other photos or settings, or the file is no such report.
    """
    if not work.path.exists() or work.restart:
        return None
    found = read_json(work.path)
    if found.get("table") != "methods" or found.get("schema") != SCHEMA or not isinstance(found.get("rows"), list):
        raise RunError(f"{work.path}: is no report of molt benchmark --methods; --restart throws it away")
    if found.get("of") != json.loads(json.dumps(now["of"])):
        raise RunError(f"{work.path}: is of other photos or settings; --restart throws it away")
    old = {row.get("name"): row for row in found["rows"] if isinstance(row, dict)}
    for row in now["rows"]:
        before = old.get(row["name"], {})
        if before.get("score") is not None and row["method"] is not None and before.get("method") != row["method"]:
            raise RunError(f"{work.path}: has {row['name']} with other weights or classes; --restart throws it away")
    return found


def _take_costs(rows: dict[str, dict[str, Any]], earlier: Mapping[str, Any] | None, now: Mapping[str, Any]) -> bool:
    """Take the costs from an earlier report if it has all of them from one round on such a machine."""
    if earlier is None:
        return False
    if any(earlier.get(key) != now[key] for key in ("device", "threads", "versions", "cuda", "batch", "counted")):
        return False
    old = {row["name"]: row for row in earlier["rows"]}
    runnable = [row for row in rows.values() if row["reason"] is None]
    for row in runnable:
        before = old.get(row["name"], {})
        if before.get("ms") is None or before.get("method") != row["method"]:
            return False
    for row in runnable:
        row |= {key: old[row["name"]][key] for key in (*method_costs.COLUMNS, "runs")}
    return True


def _measure_costs(
    work: Work,
    entries: Mapping[str, Entry],
    rows: dict[str, dict[str, Any]],
    report: Callable[[], dict[str, Any]],
    begin: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Fill in multiply-adds and memory row by row, then the times of all rows in turns."""
    ready = {}
    for name, entry in entries.items():
        begin(f"{name}: multiply-adds and memory")
        sets = method_costs.batches(work.data, entry.size, work.batch, work.device)
        with _noted(rows[name]):
            rows[name] |= method_costs.measured(entry, sets)
            method_costs.to_box(entry, sets[0])
            ready[name] = entry, sets
        yield report()
    begin("times, in turns")
    seconds = SECONDS[work.device] if work.seconds is None else work.seconds
    for name, found in method_costs.times(ready, torch.device(work.device), work.batch, seconds).items():
        rows[name] |= found
    yield report()
