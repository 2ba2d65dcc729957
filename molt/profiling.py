"""Time and peak memory of the stages of a run."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
SAMPLE_SECONDS = 0.002
_STATM = Path("/proc/self/statm")


@dataclass
class _Row:
    calls: int = 0
    seconds: float = 0.0
    peak_mib: float | None = None


class Profile:
    """Books wall time and peak memory by stage.

    On CUDA the peak is that of PyTorch's allocator, with a synchronisation at both ends of a stage; on the CPU it is
    the process's resident memory, sampled every 2 ms (Linux only, else None).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.photos = 0
        self._rows: dict[str, _Row] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Book what happens inside to ``name``."""
        row = self._rows.setdefault(name, _Row())
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        sampler = nullcontext([None]) if cuda else _resident_peak()
        start = time.perf_counter()
        with sampler as peak:
            yield
            if cuda:
                torch.cuda.synchronize(self.device)
        row.seconds += time.perf_counter() - start
        row.calls += 1
        mib = torch.cuda.max_memory_allocated(self.device) / MIB if cuda else peak[0]
        if mib is not None:
            row.peak_mib = max(mib, row.peak_mib or 0.0)

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict a stage in order of first use: stage, calls, seconds, peak_mib (None where unknown)."""
        return [
            {"stage": name, "calls": r.calls, "seconds": r.seconds, "peak_mib": r.peak_mib}
            for name, r in self._rows.items()
        ]

    def summary(self) -> dict[str, float]:
        """Return photos, total_seconds, seconds_per_photo, forward_seconds and total_over_forwards.

        Reading files is a stage of its own and counts in the total; loading weights does not.
        """
        total = sum(row.seconds for row in self._rows.values())
        forward = self._rows["forward"].seconds if "forward" in self._rows else 0.0
        return {
            "photos": self.photos,
            "total_seconds": total,
            "seconds_per_photo": total / self.photos if self.photos else 0.0,
            "forward_seconds": forward,
            "total_over_forwards": total / forward if forward else 0.0,
        }


@contextmanager
def _resident_peak() -> Iterator[list[float | None]]:
    """Yield a list whose one entry becomes the peak resident memory in MiB."""
    peak: list[float | None] = [None]
    if not _STATM.exists():
        yield peak
        return
    page = os.sysconf("SC_PAGE_SIZE") / MIB

    def sample() -> None:
        peak[0] = max(int(_STATM.read_text().split()[1]) * page, peak[0] or 0.0)

    done = threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            sample()

    sample()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        sample()
