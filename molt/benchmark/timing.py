"""Clocks, memory, and the rounds in which providers take turns."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from molt.benchmark.gate import tensors
from molt.clustering import _training

Run = Callable[[int], Any]
LEAST_RUNS, MOST_RUNS = 5, 100
COPIES, MOST_COPIES = 4, 16
PATIENCE_S = 2.0  # a provider slower than this is timed once
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class CpuClock:
    """Wall time around a call. A flush would push the code out of the cache too, which no user meets; inputs rotate."""

    def __init__(self) -> None:
        self.cache_bytes = _last_cache()

    def copies(self, moved: int) -> int:
        """How many sets of inputs it takes for each to have left the cache when its turn comes, within reason."""
        return min(MOST_COPIES, 1 + 2 * self.cache_bytes // max(moved, 1))

    def sample(self, run: Callable[[], Any]) -> Callable[[], float]:
        """Call once; return a function that tells the milliseconds."""
        start = time.perf_counter()
        run()
        taken = 1000 * (time.perf_counter() - start)
        return lambda: taken

    def wait(self) -> None:
        """Nothing to wait for."""


class CudaClock:
    """CUDA events around a call, after a write of twice the L2 cache has pushed everything else out of it.

    The write also keeps the device busy while the host gets ahead; calls whose launches take longer than it are timed
    with what is left of that, as a user would wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cache_bytes = int(torch.cuda.get_device_properties(device).L2_cache_size)
        self.flush_bytes = 2 * self.cache_bytes
        self._buffer = torch.empty(self.flush_bytes, dtype=torch.int8, device=device)

    def copies(self, moved: int) -> int:
        """Sets of inputs to go round, beside the flush."""
        return COPIES if moved < self.cache_bytes else 1

    def sample(self, run: Callable[[], Any]) -> Callable[[], float]:
        """Call once; return a function that tells the milliseconds, after `wait`."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._buffer.zero_()
        start.record()
        run()
        end.record()
        return lambda: float(start.elapsed_time(end))

    def wait(self) -> None:
        """Wait until the device has done all it was given."""
        torch.cuda.synchronize(self.device)


def _last_cache() -> int:
    """Bytes of the CPU's last cache, as Linux tells; else a generous guess."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes if size[-1] in "KM"), default=2**25)


Clock = CpuClock | CudaClock


def make_clock(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def measure(
    runs: Mapping[str, Run], clock: Clock, seconds: float, refuse: Callable[[str, Exception], None] | None = None
) -> dict[str, list[float]]:
    """Time functions in turns, so that a busy moment of the machine hits all alike.

    Args:
        runs: functions by name; each is called with the number of the call, to choose among inputs.
        clock: how one call is timed.
        seconds: time for each function, which sets how often it runs: `LEAST_RUNS` to `MOST_RUNS` times, once where
            a call takes longer than `PATIENCE_S`.
        refuse: told of what raises while it warms up, which then takes nobody else along.

    Returns:
        Milliseconds of every call, by name.
    """
    counts = {}
    for name, run in runs.items():
        try:
            counts[name] = _how_often(run, clock, seconds)
        except Exception as error:
            if refuse is None:
                raise
            refuse(name, error)
    names = list(counts)
    readings: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
    for turn in range(max(counts.values(), default=0)):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if turn < counts[name]:
                run = runs[name]
                readings[name].append(clock.sample(lambda run=run, turn=turn: run(turn)))  # type: ignore[misc]
    clock.wait()
    return {name: [read() for read in reads] for name, reads in readings.items()}


def _how_often(run: Run, clock: Clock, seconds: float) -> int:
    """Warm a function up and choose its number of calls by the quicker of two."""
    taken = math.inf
    for call in range(3):
        clock.wait()
        start = time.perf_counter()
        run(call)
        clock.wait()
        now = time.perf_counter() - start
        if now > PATIENCE_S:
            return 1
        if call:
            taken = min(taken, now)
            if taken * LEAST_RUNS > seconds:
                break
    return max(LEAST_RUNS, min(MOST_RUNS, int(seconds / max(taken, 1e-6))))


def quantile(values: list[float], share: float) -> float:
    """Return a quantile by linear interpolation between the sorted values."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def extra_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Return the most memory that a call holds at once beyond its result.

    On CUDA PyTorch's allocator tells. On the CPU it is the peak of resident memory above what was resident before,
    after the C library gave back what it kept; None where the system has no resettable peak (other than Linux).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        return max(0, int(torch.cuda.max_memory_allocated(device)) - before - _held(result, device))
    _trim()
    before_cpu = _resident("VmRSS")
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    result = run()
    high = _resident("VmHWM")
    return None if before_cpu is None or high is None else max(0, high - before_cpu - _held(result, device))


def release(device: torch.device) -> None:
    """Give memory that nobody uses back: the C library's to the system, on a GPU PyTorch's to the device."""
    _training.forget()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    _trim()


def _trim() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _held(result: Any, device: torch.device) -> int:
    """Bytes of a result's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(result, device))


def _resident(field: str) -> int | None:
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = _STATUS.read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])
    return None
