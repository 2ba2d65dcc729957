"""What is asked of a row: names of its columns with a number each, chosen for an H200."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

AT_MOST = frozenset({"ratio", "launch_ratio"})  # of all others at least as much is asked


def add_missed(rows: Iterable[dict[str, Any]]) -> None:
    """Fill in ``missed``: the targets that a row's numbers do not reach. A number that is not there reaches none."""
    for row in rows:
        row["missed"] = [name for name, asked in row["targets"].items() if not _reached(name, row[name], asked)]


def _reached(name: str, found: float | None, asked: float) -> bool:
    return found is not None and (found <= asked if name in AT_MOST else found >= asked)


def told(row: Mapping[str, Any]) -> list[str]:
    """Return each target of a row with what was found, in words."""
    said = []
    for name, asked in row["targets"].items():
        bound = f"{name} {'<=' if name in AT_MOST else '>='} {asked:g}"
        found = "not measured" if row[name] is None else f"{row[name]:.3g}"
        said.append(f"{bound}: {found}{', missed' if name in row['missed'] else ', reached'}")
    return said
