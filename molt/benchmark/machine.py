"""What every report says of the machine and the sources it is of, and whether an earlier one is of the same."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import molt

PACKAGES = ("triton", "numpy", "scipy", "opencv-python-headless", "scikit-image", "scikit-learn", "torch-scatter")
OWN = frozenset({"rows", "quick", "date", "commit", "modified", "seconds_total"})  # what two runs of a kind differ in
TIME_IS_OVER = "not run: the {:g} minutes were over"


def device_name(device: torch.device | str) -> str:
    """Return the name of a device for files: ``nvidia-h200``, ``cpu-2-cores``."""
    device = torch.device(device)
    if device.type == "cuda":
        return "-".join(torch.cuda.get_device_name(device).lower().split())
    return f"cpu-{_cores()}-cores"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def about(device: str, schema: int) -> dict[str, Any]:
    """Return what every report says of itself.

    It is schema, device, cuda, threads, versions, sources, commit, modified and date.
    """
    found = {"molt": molt.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    commit, modified = _commit()
    return {
        "schema": schema,
        "device": device_name(device),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "versions": found,
        "sources": sources(),
        "commit": commit,
        "modified": modified,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@functools.cache
def sources() -> str:
    """Return a digest of this package's files, compiled ones included, which also a tree without a commit has."""
    root = Path(molt.__file__).parent
    found = hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *(root / "kernels").glob("*.py"), *root.glob("*.so")]):
        found.update(f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


def _commit() -> tuple[str | None, bool | None]:
    """The commit of the checkout this package is used from, and whether tracked files differ; None in a wheel."""
    root = Path(molt.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None, None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def earlier(path: Path, report: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
    """Return an earlier report to go on with.

    Args:
        path: of the earlier report, which need not be there.
        report: what this run's says of itself.

    Returns:
        The report, or None, and then why: device, versions, sources or settings are others.
    """
    if not path.is_file():
        return None, None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        return None, f"{path} is no report"
    differ = sorted(key for key in report.keys() - OWN if found.get(key) != report[key])
    return (None, f"{path} is of another run ({', '.join(differ)} differ)") if differ else (found, None)


def is_left(row: Mapping[str, Any]) -> bool:
    """Whether a row is to be measured again: the time was over, or something failed."""
    note = row["note"] or ""
    return note.endswith("minutes were over") or note.startswith("raises ") or row.get("match") is False
