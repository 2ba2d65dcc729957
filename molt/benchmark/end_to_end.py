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

from molt.benchmark import agreement, photos, pipelines, timing
from molt.benchmark.configurations import Configuration
from molt.benchmark.pipelines import FULL_STEPS, Found
from molt.benchmark.registry import CANNOT, NotRun, first_line
from molt.benchmark.run import about
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
# Of deep_published: timed after the first, and between those two. On a GPU steps are replayed from a recording only
# where there are more than a few, and both runs must be of one kind.
FIRST_STEPS, STEPS = 4, 20
QUALITY_S, QUALITY_BATCH = 10.0, 8
HIT = 0.5


class Bench:
    """Measures configurations one by one.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: of autocast, for the whole and for the bare forward passes; float32 does without.
        folder: of photos, see :func:`molt.benchmark.photos.load`.
        seconds: of timing a row.

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
    ) -> None:
        self.device = torch.device(device)
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
        row = empty_row(one, self.dtype)
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
        row["trained"] = pipelines.METHODS[one.method].trained
        pipelines.make_clusterer(one.clusterer)
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
            if self.device.type == "cuda":
                whole()  # what is recorded once, and what libraries set up
            taken = take_turns({"start": start, "bare": forwards}, self.clock, self.seconds)
            taken["whole"] = once(whole, self.clock)
        else:
            runs = {"whole": whole, "bare": forwards}
            results = None if loop else self._results(one, loc, fewer)
            if results is not None:
                runs["results"] = results
            taken = take_turns(runs, self.clock, self.seconds)
        add_times(row, taken, one.batch, timed, steps)
        # Where a run takes long, the peaks of its stages tell the whole's.
        long = row["ms"] > 1000 * PATIENCE_S * one.batch / timed
        row["peak_mib"] = None if long or slow else self._peak(whole)
        profile = self._profile(one, loc, fewer, steps, 1 if row["ms"] > 1000 * one.batch / timed else 3)
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
            loc = pipelines.METHODS[one.method].build(str(self.device), one.size)
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
        clusterer = pipelines.make_clusterer(one.clusterer, steps, self._clusters_in())
        if one.provider.startswith("published"):
            vote: Any = "bincount" if one.provider == "published_bincount" else "numpy"
            return self._autocast(lambda: pipelines.literal(loc, clusterer, vote, loc._stage, images))
        return self._autocast(lambda: pipelines.library(loc, clusterer, images))

    def _results(self, one: Configuration, loc: Localizer, images: Tensor) -> Callable[[], Any] | None:
        """Return a function from ready maps to what Localizer returns; None without clusters."""
        if one.clusterer == "none":
            return None
        loc.clusterer = pipelines.make_clusterer(one.clusterer, None, self._clusters_in())
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
                self._references[at] = self._see(replace(one, provider="reference"), loc, given, len(found))
                loc.backend = backend
            truth = given.boxes if pipelines.METHODS[one.method].trained else None
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


def compare(
    found: Sequence[Found], reference: Sequence[Found], threshold: float, truth: Sequence[Tensor] | None
) -> dict[str, Any]:
    """Return the columns on quality of photos seen one by one; see `report`."""
    both = list(zip(found, reference, strict=False))
    ious = [float(agreement.mask_iou(ours.refined, theirs.refined, threshold)) for ours, theirs in both]
    rand = [
        agreement.adjusted_rand(ours.labels[0], theirs.labels[0])
        for ours, theirs in both
        if ours.labels is not None and theirs.labels is not None
    ]
    hits = None
    if truth is not None and len(found) == len(truth):  # of fewer photos it would not compare
        right = [agreement.best_iou(one.boxes[0], boxes) > HIT for one, boxes in zip(found, truth, strict=True)]
        hits = sum(right) / len(right)
    return {
        "iou_reference": sum(ious) / len(ious) if ious else None,
        "ari_reference": sum(rand) / len(rand) if rand else None,
        "photos_compared": len(both),
        "hits": hits,
        "photos_hit": None if hits is None else len(found),
    }


def empty_row(one: Configuration, dtype: torch.dtype) -> dict[str, Any]:
    """Return a row of a configuration without measurements."""
    row: dict[str, Any] = asdict(one)
    row |= {"dtype": str(dtype).removeprefix("torch."), "scales": None, "trained": None, "note": None}
    row |= dict.fromkeys(("ms", "p20_ms", "p80_ms"))
    row |= {"runs": 0}
    row |= dict.fromkeys(("photos_per_s", "bare_ms", "bare_photos_per_s", "ratio", "results_ms", "peak_mib"))
    row |= {"extrapolated": False, "photos_timed": None, "steps_timed": None, "steps_full": None, "step_ms": None}
    row |= {"stages": []}
    row |= dict.fromkeys(("iou_reference", "ari_reference", "photos_compared", "hits", "photos_hit"))
    return row


def add_times(
    row: dict[str, Any], taken: dict[str, list[float]], batch: int, timed: int, steps: int | None = None
) -> None:
    """Fill in times, extrapolated where fewer photos or steps were timed than the row is of.

    Args:
        row: of `empty_row`.
        taken: milliseconds of "whole" on ``timed`` photos, and of "bare" on ``batch``; "start" of the whole with
            `FIRST_STEPS` where ``steps`` are given; "results" where they were timed.
        batch: photos of the row.
        timed: photos of the whole.
        steps: of the whole's clustering, or None where they are those of the row.
    """
    share, more = batch / timed, 0.0
    if steps is not None:
        step = (timing.quantile(taken["whole"], 0.5) - timing.quantile(taken["start"], 0.5)) / (steps - FIRST_STEPS)
        more = max(step, 0.0) * (FULL_STEPS - steps)
        row |= {"steps_timed": steps, "steps_full": FULL_STEPS, "step_ms": max(step, 0.0) / timed}
    for name, quantile in (("ms", 0.5), ("p20_ms", 0.2), ("p80_ms", 0.8)):
        row[name] = share * (timing.quantile(taken["whole"], quantile) + more)
    bare = timing.quantile(taken["bare"], 0.5)
    row |= {
        "runs": len(taken["whole"]),
        "photos_per_s": 1000 * batch / row["ms"],
        "bare_ms": bare,
        "bare_photos_per_s": 1000 * batch / bare,
        "ratio": row["ms"] / bare,
        "results_ms": timing.quantile(taken["results"], 0.5) if "results" in taken else None,
        "extrapolated": timed < batch or steps is not None,
        "photos_timed": timed,
    }


def stages(profile: Sequence[dict[str, Any]], batch: int, timed: int, more_ms: float) -> list[dict[str, Any]]:
    """Return the stages of a row, in the order of their first use.

    Args:
        profile: rows of :class:`molt.profiling.Profile` of one run on ``timed`` photos.
        batch: photos of the row.
        timed: photos of the run.
        more_ms: that the stage "cluster" would have taken longer with all its steps.
    """
    found = []
    for stage in profile:
        ms = (1000 * stage["seconds"] + (more_ms if stage["stage"] == "cluster" else 0.0)) * batch / timed
        per_second = 1000 * batch / ms if ms > 0 else None
        found.append({"stage": stage["stage"], "ms": ms, "photos_per_s": per_second, "peak_mib": stage["peak_mib"]})
    return found


def take_turns(runs: dict[str, Callable[[], Any]], clock: timing.Clock, seconds: float) -> dict[str, list[float]]:
    """Return the milliseconds of functions called in turns, after one call each to warm up.

    As many rounds as go into ``seconds``, at least `LEAST_ROUNDS`; one where a round takes longer than `PATIENCE_S`.
    """
    start = time.perf_counter()
    for run in runs.values():
        run()
    clock.wait()
    each = time.perf_counter() - start
    rounds = 1 if each > PATIENCE_S else max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / max(each, 1e-6))))
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
    begin: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """Yield a row of each configuration; after so many minutes the rest as rows "not run".

    Args:
        bench: what measures them.
        work: in this order.
        minutes: no configuration is begun after so many.
        begin: called with what is measured next.
    """
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    for number, one in enumerate(work, 1):
        if time.monotonic() < end:
            begin(f"{number} of {len(work)}: {one}")
            yield bench.row(one)
            continue
        yield empty_row(one, bench.dtype) | {"note": f"not run: the {minutes:g} minutes were over"}


def failed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows whose configuration raised."""
    return [row for row in rows if (row["note"] or "").startswith("raises ")]


def report(rows: list[dict[str, Any]], bench: Bench, *, quick: bool, seconds_total: float) -> dict[str, Any]:
    """Return what is written as JSON.

    Each row has method, trained (False: a random head, whose boxes mean nothing), clusterer, provider, batch, size,
    scales (px), dtype, headline and note (why there is no time, or None). Times are of a batch: ms, p20_ms, p80_ms,
    bare_ms (the networks' forward passes alone), results_ms (from maps to what Localizer returns, boxes again and maps
    copied to the host), ratio (ms over bare_ms; 1 is the limit). peak_mib is of the allocator on a GPU, of the process
    on the CPU. extrapolated says that fewer photos (photos_timed) or clustering steps (steps_timed of steps_full, a
    step of a photo takes step_ms) were timed. stages are of a run of their own, with ms, photos_per_s and peak_mib.
    iou_reference and ari_reference are means over photos_compared photos against the reference's object and clusters;
    hits the share of photos_hit photos, all there are, whose box has an IoU above 0.5 with a true one.
    """
    return about(bench.device.type, SCHEMA) | {
        "dtype": str(bench.dtype).removeprefix("torch."),
        "photos": bench.source,
        "quick": quick,
        "seconds_total": round(seconds_total, 1),
        "rows": rows,
    }
