"""The whole pipeline beside the bare forward passes: a row a configuration."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molt.benchmark import photos, pipelines, timing
from molt.benchmark.configurations import Configuration, find_targets
from molt.benchmark.end_to_end_rows import (
    FIRST_STEPS,
    STEPS,
    add_speedups,
    add_times,
    compare,
    empty_row,
    key,
    stages,
)
from molt.benchmark.machine import TIME_IS_OVER, about, is_left
from molt.benchmark.pipelines import FULL_STEPS, Found
from molt.benchmark.registry import CANNOT, NotRun, first_line
from molt.clustering._labels import LARGE_CHUNK
from molt.localizer import Localizer
from molt.profiling import Profile

SCHEMA = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SECONDS = {"cpu": 2.0, "cuda": 1.0}  # of timing a row, where a round is that quick
LEAST_ROUNDS, MOST_ROUNDS = 3, 30
PATIENCE_S = 6.0  # a round slower than this is timed once
KEPT = 2  # networks
LOOP_PHOTOS = 2  # that the papers' loops are timed on; they take one after the other
QUALITY_S, QUALITY_BATCH = 10.0, 8


class Bench:
    """Measures configurations one by one.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of autocast, for the whole and for the bare forward passes; float32 does without.
        folder: of photos, see :func:`molt.benchmark.photos.load`.
        seconds: of timing a row.
        pretrained: False takes random weights, which cost as much time; what is right is then not asked.
        tiny: clusterers as small as they go, where times mean nothing.

    Attributes:
        source: where the photos are from.

    Raises:
        ValueError: a folder without usable photos.
    """

    def __init__(
        self,
        device: str,
        *,
        dtype: torch.dtype = torch.float32,
        folder: Path | None = None,
        seconds: float | None = None,
        pretrained: bool = True,
        tiny: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.pretrained, self.tiny = pretrained, tiny
        self.dtype = dtype
        self.folder = folder
        self.seconds = SECONDS[device] if seconds is None else seconds
        self.clock = timing.make_clock(self.device)
        self.source = photos.load(folder, (32, 32)).source
        self._built: dict[tuple[str, int], tuple[Localizer, photos.Photos]] = {}
        self._references: dict[tuple[str, int, str], list[Found]] = {}
        self._compared: dict[tuple[Any, ...], dict[str, Any]] = {}

    def row(self, one: Configuration) -> dict[str, Any]:
        """Measure one configuration; what fails is a note in its row."""
        row = empty_row(one, self.dtype) | {"weights": "pretrained" if self.pretrained else "random"}
        if self.dtype == torch.bfloat16:
            row["targets"] = find_targets(self.device.type, one)
        try:
            self._measure(one, row)
        except NotRun as error:
            row["note"] = f"not run: {error}"
        except torch.OutOfMemoryError as error:
            row["note"] = f"out of memory: {first_line(error)}"
        except Exception as error:  # one row's failure must not end the run
            text = first_line(error)
            missing = CANNOT in text
            row["note"] = f"not run: {text}" if missing else f"raises {type(error).__name__}: {text}"
        timing.release(self.device)
        return row

    def _measure(self, one: Configuration, row: dict[str, Any]) -> None:
        loc, given = self._prepare(one)
        row["scales"] = list(pipelines.sides(loc))
        row["trained"] = self.pretrained and pipelines.METHODS[one.method].trained
        pipelines.make_clusterer(one.clusterer, tiny=self.tiny)
        loop = one.provider.startswith("published")
        slow = one.clusterer == "deep_published"
        timed = min(one.batch, LOOP_PHOTOS if loop else one.batch)
        if slow:
            timed = min(timed, 1 if loop or self.device.type == "cpu" else LARGE_CHUNK)
        images = given.batch(one.batch, self.device)
        forwards = self._autocast(pipelines.bare(loc, images))
        fewer = images[:timed]
        steps = FIRST_STEPS + STEPS if slow else None
        whole = self._run(one, loc, fewer, steps)
        if slow:
            start = self._run(one, loc, fewer, FIRST_STEPS)
            if self.device.type == "cuda" and not loop:
                whole()  # what is recorded once, and what libraries set up
            taken = take_turns({"start": start, "bare": forwards}, self.clock, self.seconds)
            taken["whole"] = once(whole, self.clock)
        else:
            turns = {"whole": whole, "bare": forwards}
            results = None if loop else self._results(one, loc, fewer)
            if results is not None:
                turns["results"] = results
            taken = take_turns(turns, self.clock, self.seconds)
        add_times(row, taken, one.batch, timed, steps)
        # Where a run takes long, the peaks of its stages tell the whole's.
        long = row["ms"] > 1000 * PATIENCE_S * one.batch / timed
        row["peak_mib"] = None if long or slow else self._peak(whole)
        runs = 1 if self.tiny or row["ms"] > 1000 * one.batch / timed else 3
        profile = self._profile(one, loc, fewer, steps, runs)
        if long or slow:
            row["peak_mib"] = max((s["peak_mib"] for s in profile if s["peak_mib"] is not None), default=None)
        step = row["step_ms"] or 0.0
        row["stages"] = stages(profile, one.batch, timed, 0.0 if steps is None else (FULL_STEPS - steps) * step * timed)
        # A network that was fitted on the spot is there for its time.
        if not slow and one.clusterer != "deep_amortised":
            self._quality(one, loc, given, row)

    def _prepare(self, one: Configuration) -> tuple[Localizer, photos.Photos]:
        """Return the network and the photos at its size; the last two of them are kept."""
        at = (one.method, one.size)
        if at not in self._built:
            if len(self._built) == KEPT:
                del self._built[next(iter(self._built))]
                timing.release(self.device)
            options = {} if self.pretrained else {"pretrained": False}
            loc = pipelines.METHODS[one.method].build(str(self.device), one.size, **options)
            self._built[at] = loc, photos.load(self.folder, loc.method.size)
        loc, given = self._built[at]
        loc.backend = None if one.provider.startswith("published") else one.provider  # type: ignore[assignment]
        loc.profile = None
        return loc, given

    def _autocast(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """Return a run under autocast, entered anew each time, so that each pays for its casts."""
        if self.dtype == torch.float32:
            return run

        def cast() -> Any:
            with torch.autocast(self.device.type, self.dtype):
                return run()

        return cast

    def _clusters_in(self) -> torch.dtype:
        """What networks of clusterers compute in: on a GPU the run's own dtype where they can."""
        low = self.device.type == "cuda" and self.dtype == torch.bfloat16
        return torch.bfloat16 if low else torch.float32

    def _run(self, one: Configuration, loc: Localizer, images: Tensor, steps: int | None = None) -> Callable[[], Found]:
        clusterer = pipelines.make_clusterer(one.clusterer, steps, self._clusters_in(), tiny=self.tiny)
        if one.provider.startswith("published"):
            vote: Any = "bincount" if one.provider == "published_bincount" else "numpy"
            return self._autocast(lambda: pipelines.literal(loc, clusterer, vote, loc._stage, images))
        return self._autocast(lambda: pipelines.library(loc, clusterer, images))

    def _results(self, one: Configuration, loc: Localizer, images: Tensor) -> Callable[[], Any] | None:
        """Return a function from ready maps to what Localizer returns; None without clusters."""
        if one.clusterer == "none":
            return None
        loc.clusterer = pipelines.make_clusterer(one.clusterer, None, self._clusters_in(), tiny=self.tiny)
        shown = [photos.as_photo(image) for image in images]
        maps = self._autocast(lambda: loc._maps(images, None))()
        return lambda: loc._boxes(shown, maps)

    def _profile(
        self, one: Configuration, loc: Localizer, images: Tensor, steps: int | None, runs: int
    ) -> list[dict[str, Any]]:
        """Return the stages with the seconds of one run."""
        loc.profile = Profile(self.device)
        whole = self._run(one, loc, images, steps)
        for _ in range(runs):
            whole()
        rows = loc.profile.rows()
        loc.profile = None
        return [row | {"seconds": row["seconds"] / runs} for row in rows]

    def _peak(self, whole: Callable[[], Found]) -> float | None:
        profile = Profile(self.device)
        with profile.stage("whole"):
            whole()
        peak: float | None = profile.rows()[0]["peak_mib"]
        return peak

    def _quality(self, one: Configuration, loc: Localizer, given: photos.Photos, row: dict[str, Any]) -> None:
        """Fill in the agreement with the reference and the share of right boxes."""
        # Whatever the batch of the row.
        at = (one.method, one.size, one.clusterer)
        key = (*at, one.provider)
        if key not in self._compared:
            found = self._see(one, loc, given, len(given.images))
            if one.provider == "reference":
                self._references[at] = found
            elif at not in self._references:
                backend, loc.backend = loc.backend, "reference"
                try:
                    self._references[at] = self._see(replace(one, provider="reference"), loc, given, len(found))
                except Exception as error:  # a reference that fails takes no times along
                    row["note"] = f"not compared: the reference raises {type(error).__name__}: {first_line(error)}"
                    return
                finally:
                    loc.backend = backend
            truth = given.boxes if self.pretrained and pipelines.METHODS[one.method].trained else None
            self._compared[key] = compare(found, self._references[at], loc.threshold, truth)
        row |= self._compared[key]

    def _see(self, one: Configuration, loc: Localizer, given: photos.Photos, number: int) -> list[Found]:
        """Run over the photos in small batches; the papers' loops one by one, as far as the time goes."""
        loop = one.provider.startswith("published")
        end = time.monotonic() + QUALITY_S if loop else math.inf
        size = 1 if loop else QUALITY_BATCH
        seen: list[Found] = []
        for start in range(0, number, size):
            batch = self._run(one, loc, given.images[start : min(start + size, number)].to(self.device))()
            for i, box in enumerate(batch.boxes):
                labels = None if batch.labels is None else batch.labels[i : i + 1].cpu()
                seen.append(Found(batch.refined[i : i + 1].float().cpu(), labels, [box]))
            if time.monotonic() > end:
                break
        return seen


def take_turns(runs: dict[str, Callable[[], Any]], clock: timing.Clock, seconds: float) -> dict[str, list[float]]:
    """Return the milliseconds of functions called in turns, after one call each to warm up.

    As many rounds as go into ``seconds``, at least `LEAST_ROUNDS`; one where a round takes longer than `PATIENCE_S`, or
    no seconds are given.
    """
    start = time.perf_counter()
    for run in runs.values():
        run()
    clock.wait()
    each = time.perf_counter() - start
    rounds = (
        1 if each > PATIENCE_S or seconds == 0 else max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / max(each, 1e-6))))
    )
    names = list(runs)
    taken: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            taken[name].append(clock.sample(runs[name]))
            # A queue of calls would hold the memory of all of them.
            clock.wait()
    return {name: [read() for read in reads] for name, reads in taken.items()}


def once(run: Callable[[], Any], clock: timing.Clock) -> list[float]:
    """Return the milliseconds of one call, in a list."""
    read = clock.sample(run)
    clock.wait()
    return [read()]


def run_all(
    bench: Bench,
    work: Sequence[Configuration],
    *,
    minutes: float | None = None,
    earlier: Sequence[dict[str, Any]] = (),
    begin: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """Yield a row of each configuration; after so many minutes the rest as rows "not run".

    Args:
        bench: what measures them.
        work: in this order.
        minutes: no configuration is begun after so many.
        earlier: rows of another run, yielded in place of measuring them again.
        begin: called with what is measured next.
    """
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    done = {key(row): row for row in earlier if not is_left(row)}
    for number, one in enumerate(work, 1):
        if key(asdict(one)) in done:
            yield done[key(asdict(one))]
            continue
        if time.monotonic() < end:
            begin(f"{number} of {len(work)}: {one}")
            yield bench.row(one)
            continue
        yield empty_row(one, bench.dtype) | {"note": TIME_IS_OVER.format(minutes)}


def failed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows whose configuration raised."""
    return [row for row in rows if (row["note"] or "").startswith("raises ")]


def report(
    rows: list[dict[str, Any]], bench: Bench, *, quick: bool, seconds_total: float, rehearsal: bool = False
) -> dict[str, Any]:
    """Return what is written as JSON.

    Each row has method, trained (False: a random head, whose boxes mean nothing), weights (of the networks: pretrained
    or random), clusterer, provider, batch, size,
    scales (px), dtype, headline and note (why there is no time, or None). Times are of a batch: ms, p20_ms, p80_ms,
    bare_ms (the networks' forward passes alone), results_ms (from maps to what Localizer returns, boxes again and maps
    copied to the host), ratio (ms over bare_ms; 1 is the limit). peak_mib is of the allocator on a GPU, of the process
    on the CPU. extrapolated says that fewer photos (photos_timed) or clustering steps (steps_timed of steps_full, a
    step of a photo takes step_ms) were timed. stages are of a run of their own, with ms, photos_per_s and peak_mib.
    iou_reference and ari_reference are means over photos_compared photos against the reference's object and clusters;
    hits the share of photos_hit photos, all there are, whose box has an IoU above 0.5 with a true one.
    speedup_published and speedup_published_bincount are times faster than the papers' loops of the same configuration;
    targets are columns with what is asked of them, missed those not reached. rehearsal says that photos were fewer and
    times mean nothing.
    """
    add_speedups(rows)
    return about(bench.device.type, SCHEMA) | {
        "dtype": str(bench.dtype).removeprefix("torch."),
        "photos": bench.source,
        "weights": "pretrained" if bench.pretrained else "random",
        "rehearsal": rehearsal,
        "quick": quick,
        "seconds_total": round(seconds_total, 1),
        "rows": rows,
    }
