"""Operators against their peers: checked first, timed in turns. `molt benchmark` runs it."""

from __future__ import annotations

from molt.benchmark.machine import device_name
from molt.benchmark.operations import OPERATIONS
from molt.benchmark.registry import Case, Inputs, NotRun, Operation, Provider
from molt.benchmark.run import failed, report, run_all, run_case

__all__ = [
    "OPERATIONS",
    "Case",
    "Inputs",
    "NotRun",
    "Operation",
    "Provider",
    "device_name",
    "failed",
    "report",
    "run_all",
    "run_case",
]
