"""What each part of the MOLT paper is worth: a grid of small measurements on any data set with boxes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from molt._arguments import check_device, check_int
from molt._words import count
from molt.benchmark import ablation_backbones as backbones
from molt.benchmark import ablation_clusters as clusters
from molt.benchmark import ablation_scales as scales
from molt.benchmark.ablation_networks import SIDE, FindClasses, Measured, SeededMaps, TrainedMolt, View, Wanted
from molt.benchmark.ablation_rows import HOW, gather, not_run, rows_of
from molt.benchmark.ablation_store import REPORT, Kept, Sheet, begin, digest, file_digest
from molt.benchmark.machine import about
from molt.data.annotations import LocalizationSet, Sample
from molt.data.images import PhotoError, read_photo
from molt.evaluation._spool import RunError, write_json
from molt.evaluation.box_curves import box_curves, to_levels
from molt.evaluation.maps import MapError, prepare
from molt.evaluation.runs import Settings
from molt.evaluation.summary import scaled
from molt.methods.config import MOLTConfig
from molt.methods.multiscale import Multiscale

SCHEMA = 1
GROUPS = (scales.SCALES, scales.HEADS, clusters.CLUSTERS, clusters.CLUSTERERS, backbones.BACKBONES)
NO_MOLT = "no trained MOLT was given (--checkpoint)"
NO_TOKEN = "no checkpoint with this head was given (--checkpoint-class-token)"
LEFT = {
    "deep clustering, published": "takes minutes a photo; benchmarks/photos/presets.py measures the presets",
    "deep clustering, amortised": "needs a network that molt fit-clusters fitted on other photos",
}
TAKES = (("--checkpoint", "patches"), ("--checkpoint-class-token", "class_token"))
LACKING = (FileNotFoundError, ImportError, ValueError)


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        groups: of :data:`GROUPS`.
        checkpoints: trained MOLTs that classify by their patches; the first one's maps are those that are refined,
            more are seeds of the group ``heads``.
        class_token: trained MOLTs that classify by their class token.
        gt_map: whose map counts: ``"label"``, the photo's class; or ``"top1"``, the likeliest.
        seeds: of each clusterer with a random start.
        backbones: timm names.
        device: where networks run.
        source: where weights come from.
        settings: how maps are scored, and the bootstrap.
    """

    groups: tuple[str, ...] = GROUPS
    checkpoints: tuple[Path, ...] = ()
    class_token: tuple[Path, ...] = ()
    gt_map: str = "label"
    seeds: int = 5
    backbones: tuple[str, ...] = backbones.DEFAULT
    device: str = "cpu"
    source: str = "auto"
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        check_int("seeds", self.seeds, 1, 1000)
        check_device(self.device)
        unknown = [name for name in self.groups if name not in GROUPS]
        if unknown or not self.groups:
            raise ValueError(f"groups must be of {', '.join(GROUPS)}, got {', '.join(unknown) or 'none'}")
        if self.gt_map not in ("label", "top1"):
            raise ValueError(f"gt_map must be label or top1, as class maps are compared, got {self.gt_map!r}")
        for name in self.backbones:
            backbones.full_name(name)


@dataclass(frozen=True)
class _Job:
    """A sheet and what fills it."""

    sheet: Sheet
    measure: Callable[[View], Iterator[Measured]]
    facts: Callable[[View], dict[str, Any]] | None = None


@dataclass(eq=False)
class _Grid:
    """The photos, and the way from a job to its sheet."""

    plan: Plan
    out: Path
    samples: Sequence[Sample]
    truth: Sequence[Mapping[str, Any]]
    start: Callable[[str, int, int], object]
    step: Callable[[], object]

    def __post_init__(self) -> None:
        self.kept = Kept(self.out)
        self.device = torch.device(self.plan.device)

    def sheet(self, name: str, entries: Any, **source: Any) -> Sheet:
        return Sheet(self.out, name, entries, len(self.samples), source)

    def work(self, title: str, jobs: Sequence[_Job]) -> None:
        """Fill the sheets of some jobs, photo by photo, so that each network sees a photo once for all of them."""
        done = sum(len(job.sheet.done) for job in jobs)
        self.start(title, len(jobs) * len(self.samples), done)
        for photo, sample in enumerate(self.samples):
            todo = [job for job in jobs if photo not in job.sheet.done]
            if not todo:
                continue
            view = View(photo, sample, self.kept, self.device)
            trouble = None
            try:
                view.pixels()
            except (PhotoError, OSError) as error:
                trouble = str(error)
            for job in todo:
                self._measure(job, view, trouble)
                self.step()

    def _measure(self, job: _Job, view: View, trouble: str | None) -> None:
        settings, begun = self.plan.settings, time.perf_counter()
        number = len(job.sheet.entries)
        levels = np.zeros((number, settings.size, settings.size), np.uint8)
        found: list[Measured | None] = [None] * number
        facts: dict[str, Any] = {}
        try:
            for i, one in enumerate(job.measure(view) if trouble is None else ()):
                values = prepare(one.values, settings.size, resize=settings.resize, normalize=settings.normalize)
                levels[i] = to_levels(values[None])[0]
                found[i] = Measured(one.values[:0], one.clusters, one.ms, one.alpha)
            facts = {} if job.facts is None or trouble is not None else job.facts(view)
        except MapError as error:  # its maps count as zeros, as in `molt evaluate`
            trouble, levels[:], found = str(error), 0, [None] * number
        if trouble is None and found[-1] is None:
            raise AssertionError(f"{job.sheet.name} gave fewer maps than it has entries")
        boxes = scaled(self.truth[view.photo], settings.size, truncate=settings.truncate)
        fit = box_curves(levels, [boxes] * number, area=settings.area, clip=settings.clip, plus_one=settings.plus_one)
        row = {
            "peak": fit.peak.tolist(),
            "clusters": [None if one is None else one.clusters for one in found],
            "ms": [None if one is None or one.ms is None else round(one.ms, 3) for one in found],
            "alpha": [None if one is None else one.alpha for one in found],
            "facts": facts,
            "problem": trouble,
            "seconds": round(time.perf_counter() - begun, 3),
        }
        job.sheet.append(view.photo, np.stack([fit.any, fit.largest], 1).astype(np.float32), row)


def run(
    data: LocalizationSet,
    plan: Plan,
    find: FindClasses,
    out: Path,
    *,
    restart: bool = False,
    start: Callable[[str, int, int], object] = lambda *_: None,
    step: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Measure the grid and write ``ablation.json``; a later call with the same arguments goes on where one ended.

    Maps are fused and refined at 448 px, as the training-free default does, and scored as ``molt evaluate`` scores
    them. A photo without maps counts as one of zeros; photos without boxes are left out.

    Args:
        data: the photos with their boxes.
        plan: what to measure.
        find: gives a network's classes by label of the set, for the network's class names.
        out: folder of the run. Groups and backbones may be added later; what was measured stays.
        restart: True throws away what is in it.
        start: called with a title, how many steps there are, and how many are done.
        step: called after each step.

    Returns:
        What is written: :func:`molt.benchmark.machine.about`, ``rows``, ``findings``, ``problems`` and how it was
        measured.

    Raises:
        RunError: ``out`` holds something else.
        FileNotFoundError, ValueError: a checkpoint that cannot be used, or no photo with boxes.
    """
    begun = time.perf_counter()
    samples = [sample for sample in data.samples if len(sample.boxes)]
    if not samples:
        raise ValueError(f"data: none of {count(len(data), 'photo')} of {data.name!r} has a box to score against")
    wanted = Wanted(plan.gt_map, find)
    trained, model = _checkpoints(plan, wanted)
    truth = [_truth(sample) for sample in samples]
    about_data = {"name": data.name, "photos": len(samples), "digest": _digest(samples, data.classes, find)}
    identity = {
        "data": about_data,
        "protocol": {k: v for k, v in plan.settings.to_json().items() if k not in ("draws", "seed", "ious")},
        "gt_map": plan.gt_map,
        "seeds": plan.seeds,
        "side": SIDE,
        "checkpoint": None if not plan.checkpoints else file_digest(plan.checkpoints[0]),
    }
    begin(out, identity, restart=restart)
    grid = _Grid(plan, out, samples, truth, start, step)
    sheets, lost = _measured(grid, wanted, trained, model)

    rows: list[dict[str, Any]] = []
    findings: dict[str, Any] = {}
    shares = np.array([row["size_share"] for row in truth])
    for group in plan.groups:
        found = gather(sheets.get(group, []))
        mine = rows_of(group, found, plan.settings)
        if group == scales.SCALES and found:
            facts = [sheets[group][0].row(i)["facts"] for i in range(len(samples))]
            findings[group] = scales.scale_findings(found, facts, shares, plan.settings)
        elif group == scales.HEADS:
            findings[group] = _accuracy(sheets.get(group, []), mine, plan.settings)
        elif group == clusters.CLUSTERS:
            findings[group] = clusters.count_findings(mine)
        elif group == clusters.CLUSTERERS:
            findings[group] = clusters.alpha_findings(mine, found)
        rows += mine + [row for row in lost if row["group"] == group]
    report = about(plan.device, SCHEMA) | {
        "data": about_data | {"without_boxes": len(data) - len(samples)},
        "gt_map": plan.gt_map,
        "protocol": plan.settings.to_json() | {"side": SIDE},
        "seeds": plan.seeds,
        "intervals": HOW,
        "checkpoints": trained,
        "seconds_a_photo": {group: {sheet.name: _seconds(sheet) for sheet in own} for group, own in sheets.items()},
        "seconds_total": round(time.perf_counter() - begun, 1),
        "problems": _problems(sheets, samples),
        "findings": findings,
        "rows": rows,
    }
    write_json(out / REPORT, report)
    return report


def _measured(
    grid: _Grid, wanted: Wanted, trained: Sequence[Mapping[str, Any]], model: TrainedMolt | None
) -> tuple[dict[str, list[Sheet]], list[dict[str, Any]]]:
    """Measure what is missing; return the sheets by group, and rows of what could not be run."""
    plan = grid.plan
    sheets: dict[str, list[Sheet]] = {group: [] for group in plan.groups}
    lost: list[dict[str, Any]] = []
    jobs: list[_Job] = []
    for group in plan.groups:
        if model is None and group not in (clusters.CLUSTERERS, backbones.BACKBONES):
            lost.append(not_run(group, group, NO_MOLT))
        elif group == scales.SCALES:
            assert model is not None
            jobs.append(_scale_job(grid, model))
        elif group == clusters.CLUSTERS:
            assert model is not None
            jobs.append(_count_job(grid, model))
        elif group == clusters.CLUSTERERS:
            own, missing = _clusterer_jobs(grid, wanted, model)
            jobs, lost = jobs + own, lost + missing
    for job in jobs:
        sheets[job.sheet.name.split(":")[0]].append(job.sheet)
    if scales.HEADS in plan.groups and model is not None:
        sheets[scales.HEADS], own = _heads(grid, wanted, trained, model)
        jobs = jobs + own
        if not plan.class_token:
            lost.append(not_run(scales.HEADS, scales.head_row("class_token"), NO_TOKEN, {"head": "class_token"}))
    if jobs:
        grid.work(", ".join(dict.fromkeys(job.sheet.name.split(":")[0] for job in jobs)), jobs)
    if backbones.BACKBONES in plan.groups:
        for name in dict.fromkeys(backbones.full_name(name) for name in plan.backbones):
            try:
                network = backbones.load(name, wanted, grid.device, plan.source)
            except LACKING as error:
                lost.append(not_run(backbones.BACKBONES, name, str(error)))
                continue
            own_sheet = _backbone(grid, name, network)
            sheets[backbones.BACKBONES].append(own_sheet)
    return sheets, lost


def _scale_job(grid: _Grid, model: TrainedMolt) -> _Job:
    own = scales.default_clusters(grid.plan.seeds, Multiscale(model.model))
    sheet = grid.sheet(scales.SCALES, scales.scale_entries(model.scales, own), model=model.key)
    return _Job(
        sheet, lambda view: scales.measure_scales(view, model, own), lambda view: scales.scale_facts(view, model)
    )


def _count_job(grid: _Grid, model: TrainedMolt) -> _Job:
    variants = clusters.counted(grid.plan.seeds)
    sheet = grid.sheet(clusters.CLUSTERS, clusters.count_entries(variants), model=model.key)
    return _Job(sheet, lambda view: clusters.measure_counts(view, model, variants))


def _clusterer_jobs(grid: _Grid, wanted: Wanted, model: TrainedMolt | None) -> tuple[list[_Job], list[dict[str, Any]]]:
    """Return a job for each kind of map, so that one that cannot be had costs the others nothing."""
    group = clusters.CLUSTERERS
    ways = clusters.defaults(grid.plan.seeds)
    lost = [not_run(group, name, reason, {"clusterer": name}) for name, reason in LEFT.items()]
    given: list[tuple[str, clusters.Base, str]] = []
    if model is None:
        lost.append(not_run(group, clusters.MOLT_MAPS, NO_MOLT, {"map": clusters.MOLT_MAPS}))
    else:
        given.append((clusters.MOLT_MAPS, clusters.molt_base(model), model.key))
    try:
        seeded = SeededMaps("default", wanted, grid.device, grid.plan.source)
    except LACKING as error:
        names = (clusters.SEEDED_MAPS, clusters.CAM)
        lost += [not_run(group, name, str(error), {"map": name}) for name in names]
    else:
        given.append((clusters.SEEDED_MAPS, clusters.seeded_base(seeded, "fused"), seeded.key))
        given.append((clusters.CAM, clusters.seeded_base(seeded, "cam"), seeded.key))
    jobs = []
    for name, base, key in given:
        sheet = grid.sheet(f"{group}: {name}", clusters.base_entries([name], ways, clusters.ALPHAS), network=key)
        jobs.append(_Job(sheet, _bases_of([base], ways, clusters.ALPHAS)))
    return jobs, lost


def _bases_of(bases: Any, ways: Any, alphas: Any) -> Callable[[View], Iterator[Measured]]:
    return lambda view: clusters.measure_bases(view, bases, ways, alphas)


def _heads(
    grid: _Grid, wanted: Wanted, trained: Sequence[Mapping[str, Any]], first: TrainedMolt
) -> tuple[list[Sheet], list[_Job]]:
    """Return a sheet for each checkpoint, and jobs for those to fill; equal backbones share their forward passes."""
    plan = grid.plan
    found: list[Sheet] = []
    jobs: list[_Job] = []
    often: dict[str, int] = {}
    baseline = scales.head_row(str(trained[0]["head"]))
    for path, said in zip((*plan.checkpoints, *plan.class_token), trained, strict=True):
        head = str(said["head"])
        seed = often[head] = often.get(head, -1) + 1
        sheet = grid.sheet(
            f"{scales.HEADS}: {head} {seed}",
            scales.head_entries(head, said["scales"], seed, baseline),
            model=said["digest"],
        )
        found.append(sheet)
        if len(sheet.done) < len(grid.samples):
            model = first
            if path != plan.checkpoints[0]:
                model = TrainedMolt(path, wanted, grid.device, plan.source)
                model.share_backbones(first)
            jobs.append(_head_job(sheet, model))
    return found, jobs


def _head_job(sheet: Sheet, model: TrainedMolt) -> _Job:
    return _Job(sheet, lambda view: scales.measure_heads(view, model), lambda view: scales.head_facts(view, model))


def _backbone(grid: _Grid, name: str, network: SeededMaps) -> Sheet:
    names, bases = backbones.bases(name, network)
    ways = backbones.clusterers(grid.plan.seeds)
    entries = clusters.base_entries(names, ways, backbones.ALPHAS)
    sheet = grid.sheet(f"{backbones.BACKBONES}: {name}", entries, network=network.key)
    grid.work(sheet.name, [_Job(sheet, _bases_of(bases, ways, backbones.ALPHAS))])
    return sheet


def _checkpoints(plan: Plan, wanted: Wanted) -> tuple[list[dict[str, Any]], TrainedMolt | None]:
    """Return what is to be said of each checkpoint, and the first; what cannot work is told before the first photo.

    Raises:
        FileNotFoundError, ValueError: one that cannot be used.
    """
    if plan.class_token and not plan.checkpoints:
        raise ValueError("--checkpoint-class-token: is compared with --checkpoint, which is missing")
    found: list[dict[str, Any]] = []
    first: TrainedMolt | None = None
    for path in (*plan.checkpoints, *plan.class_token):
        key = file_digest(path)
        if any(key == one["digest"] for one in found):
            raise ValueError(f"checkpoint {path}: was given twice, expected each once")
        network = TrainedMolt(path, wanted, torch.device(plan.device), plan.source)
        first = first or network
        config = network.model.config
        option, expected = TAKES[path in plan.class_token]
        if config.head != expected:
            homes = [f"which goes with {other}" for other, head in TAKES if head == config.head]
            said_of = homes[0] if homes else f"{option} takes {expected!r} alone"
            raise ValueError(f"checkpoint {path}: has the head {config.head!r}, {said_of}")
        said: dict[str, Any] = {
            "file": path.name,
            "digest": key,
            "head": _head_name(config),
            "backbone": config.backbone,
        }
        said |= {"sizes": [list(size) for size in config.sizes], "scales": network.scales, "shared": config.shared}
        found.append(said)
    return found, first


def _head_name(config: MOLTConfig) -> str:
    """Return what tells a kind of head from others."""
    weighted = config.head == "patches" and config.pooling == "attention"
    return f"{config.head}, attention pooling" if weighted else config.head


def _truth(sample: Sample) -> dict[str, Any]:
    """Return a photo's true boxes, its size and what share of it the largest box takes.

    Raises:
        PhotoError, OSError: the size is not in the annotations, and the photo cannot be read.
    """
    width, height = sample.size or read_photo(sample.path, 1).size
    boxes = np.asarray(sample.boxes, np.float64).reshape(-1, 4)
    share = float(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).max() / (width * height))
    return {"truth": boxes.tolist(), "width": width, "height": height, "size_share": share}


def _digest(samples: Sequence[Sample], classes: Sequence[str], find: FindClasses) -> str:
    """Return what tells these photos, truths and classes from others."""
    photos: list[Any] = []
    for sample in samples:
        truth: NDArray[Any] = np.asarray(sample.boxes, np.float64)
        stamp = sample.path.stat().st_size if sample.path.is_file() else -1
        photos.append([sample.name, sample.label, truth.tolist(), sample.size, stamp])
    return digest([photos, list(classes), getattr(find, "stamp", None)])


def _accuracy(sheets: Sequence[Sheet], rows: Sequence[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """Enter each head's accuracy in its rows, and return it by head."""
    by_head: dict[str, list[Sheet]] = {}
    for sheet in sheets:
        by_head.setdefault(str(sheet.entries[0].settings["head"]), []).append(sheet)
    found = []
    for head, own in by_head.items():
        facts = [[sheet.row(i)["facts"] for i in range(sheet.photos)] for sheet in own]
        said = scales.head_accuracy(facts, settings)
        for row in rows:
            if row["head"] == head:
                row.update(said)
        found.append({"head": head, "seeds": len(own)} | said)
    return found


def _seconds(sheet: Sheet) -> float:
    """Return the mean seconds a photo took, networks and clusters that it shares with others where it came first."""
    return round(float(np.mean([sheet.row(i)["seconds"] for i in range(sheet.photos)])), 3)


def _problems(sheets: Mapping[str, Sequence[Sheet]], samples: Sequence[Sample]) -> list[dict[str, str]]:
    return [
        {"photo": samples[i].name, "sheet": sheet.name, "problem": str(sheet.row(i)["problem"])}
        for own in sheets.values()
        for sheet in own
        for i in range(sheet.photos)
        if sheet.row(i)["problem"] is not None
    ]


__all__ = ["GROUPS", "Plan", "RunError", "run"]
