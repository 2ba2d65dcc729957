"""From a data set and its maps to scores: one pass over the photos, memory flat in their number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

import molt
from molt._arguments import check_int, check_number
from molt._files import user_path
from molt._words import count
from molt.data.annotations import LocalizationSet, Problem, Sample
from molt.data.checking import check_sizes
from molt.data.images import PhotoError, read_photo
from molt.evaluation._spool import (
    ROWS,
    RUN,
    RunError,
    Spool,
    open_array,
    parse_rows,
    read_json,
)
from molt.evaluation.box_curves import box_curves, to_levels
from molt.evaluation.maps import MapError, Normalize, Resize, prepare
from molt.evaluation.masks import read_masks
from molt.evaluation.scores import Curves, pixel_histogram, thresholds
from molt.evaluation.summary import final_rows, scaled, summarize, tally
from molt.ops.sweep_boxes import largest_at_cuts

FORMAT = 2
Map = NDArray | Exception
MapBatch = Callable[[Sequence[Sample]], Iterable[Map]]
RankBatch = Callable[[Sequence[Sample]], Iterable[int | None]]
_NEVER = np.iinfo(np.int64).max  # the rank of a label that is not predicted


@dataclass(frozen=True)
class Settings:
    """How maps become scores; the defaults are wsolevaluation's.

    Attributes:
        size: side in pixels of the square where maps and boxes are compared.
        thresholds: how many thresholds, i / thresholds of each map's maximum, of which the best is taken.
        threshold: the only threshold of boxes, in [0, 1), or None for the best one.
        ious: the IoU a box must reach, one by one, for MaxBoxAccV2.
        resize: how maps come to ``size``, see :func:`molt.evaluation.maps.prepare`.
        normalize: ditto.
        truncate: whether true boxes, scaled to ``size``, are cut to whole pixels.
        area: of the largest contour: ``"contour"``, OpenCV's, or ``"pixels"``.
        clip: whether boxes end at the last pixel, ``size`` - 1.
        plus_one: whether a box from x0 to x1 is x1 - x0 + 1 wide.
        draws: bootstrap draws of the intervals.
        seed: of these.
    """

    size: int = 224
    thresholds: int = 1000
    ious: tuple[float, ...] = (0.3, 0.5, 0.7)
    resize: Resize = "cubic"
    normalize: Normalize = "minmax"
    truncate: bool = True
    area: Literal["contour", "pixels"] = "contour"
    clip: bool = True
    plus_one: bool = True
    draws: int = 1000
    seed: int = 0
    threshold: float | None = None

    def __post_init__(self) -> None:
        check_int("size", self.size, 2, 4096)
        check_int("thresholds", self.thresholds, 1, 100_000)
        check_int("draws", self.draws, 1, 1_000_000)
        check_int("seed", self.seed, 0)
        if self.threshold is not None and check_number("threshold", self.threshold) >= 1:
            raise ValueError(f"threshold must be in [0, 1), got {self.threshold}")
        if not self.ious or any(check_number("ious", iou, above=0) > 1 for iou in self.ious):
            raise ValueError(f"ious must be numbers above 0 and at most 1, got {self.ious}")
        for name, options in (("resize", get_args(Resize)), ("normalize", get_args(Normalize))):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}, got {getattr(self, name)!r}")
        if self.area not in ("contour", "pixels"):
            raise ValueError(f"area must be 'contour' or 'pixels', got {self.area!r}")

    def grid(self) -> NDArray[np.float64]:
        """Return the thresholds of boxes."""
        return thresholds(self.thresholds) if self.threshold is None else np.array([self.threshold], np.float64)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return asdict(self) | {"ious": list(self.ious)}


@dataclass(frozen=True, eq=False)
class Run:
    """What came of an evaluation.

    Attributes:
        info: everything :meth:`to_json` gives: method, data, protocol, scores, problems.
        rows: one a photo, or a photo and class: name, label, class, path, width, height, truth (boxes in the photo's
            pixels), size_share (of the largest true box), peak, rank (of the label among the predicted classes), iou
            (at MaxBoxAcc's best threshold), iou_v2 (by IoU, at its best), box (in the photo's pixels, or None), error,
            problem.
        curves: the photos' curves, in the same order.
        folder: where it is kept, or None.
    """

    info: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    curves: Curves
    folder: Path | None = None
    _keep: object = None  # the folder of a run that is kept nowhere else goes with it

    @property
    def name(self) -> str:
        """What to call it in tables."""
        return str(self.info["method"].get("name", "?"))

    @property
    def settings(self) -> Settings:
        """How its maps became scores."""
        given = dict(self.info["protocol"])
        return Settings(**given | {"ious": tuple(given["ious"])})

    def boxed(self) -> NDArray[np.int64]:
        """Return the indices of the photos with true boxes."""
        return np.array([i for i, row in enumerate(self.rows) if row["truth"]], np.int64)

    def to_json(self) -> dict[str, Any]:
        """Return all but the rows and curves as plain values."""
        return dict(self.info)

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read the folder that :func:`evaluate` wrote.

        Raises:
            RunError: it holds no complete run, or files that do not fit each other.
        """
        folder = user_path(folder)
        if not (folder / RUN).is_file():
            raise RunError(f"{folder}: holds no complete run, expected the --out folder of molt evaluate")
        info = read_json(folder / RUN)
        if info.get("format") != FORMAT:
            raise RunError(f"{folder / RUN}: has format {info.get('format')!r}, this molt reads {FORMAT}")
        try:
            rows = parse_rows(folder / ROWS, (folder / ROWS).read_bytes())
            run = cls(info, rows, _curves(folder, info, rows), folder)
            grid = run.settings.thresholds
            names = [(str(row["name"]), int(row["label"]), row["truth"]) for row in rows]
            if (
                len(names) != info["data"].get("pairs", info["data"]["photos"])
                or not isinstance(info["scores"], dict)
                or grid < 1
            ):
                raise RunError(f"{folder}: its files do not fit each other")
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, RunError):
                raise
            raise RunError(f"{folder}: is damaged ({type(error).__name__}: {error})") from error
        return run


def evaluate(
    data: LocalizationSet,
    maps: MapBatch | Iterable[Map],
    settings: Settings | None = None,
    *,
    method: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    restart: bool = False,
    batch: int = 16,
    save: Callable[[Sample, NDArray[np.float64]], object] | None = None,
    step: Callable[[int], object] | None = None,
    problems: Sequence[Problem] = (),
    sizes: Literal["check", "trust"] = "check",
    ranks: RankBatch | None = None,
    about: Mapping[str, Any] | None = None,
) -> Run:
    """Score the maps of a data set: MaxBoxAcc, MaxBoxAccV2, mean IoU, Top-k and GT-known Loc, and PxAP with masks.

    A map that cannot be used counts as one of zeros, a photo without true boxes or masks does not count where these
    are needed; both are listed in the run's problems.

    Args:
        data: the photos with their boxes or masks.
        maps: called with some samples, gives as many (h, w) maps; or an iterable of all maps in the set's order. In
            place of a map an exception may come, for a photo that has none.
        settings: None takes wsolevaluation's.
        method: what made the maps, as plain values: ``name``, ``weights``...
        out: folder of the run, which a later call with the same arguments continues; None keeps none.
        restart: True throws away what is in ``out``.
        batch: photos at a time, at least 1.
        save: called with each sample and its map as it was scored.
        step: called with the number of photos done, at the start and after each batch.
        problems: found before, to be listed with the run's own.
        sizes: ``"check"`` compares the annotated sizes with the photos that are there, whose headers are read, before
            the first map is asked for; ``"trust"`` does not, where :func:`molt.data.check_sizes` has.
        ranks: called with some samples after their maps, gives each the place of its label among the predicted classes,
            0 the likeliest, or None where it is not among them. None for no Top-k.
        about: more to say of the data set: ``any_object``, True where each photo is one sample with all its objects,
            for CorLoc, and ``counted``, the names of what is left out by default and counts here.

    Raises:
        DataError: photos that are not of their annotated size.
        RunError: ``out`` holds something else, or a run with other settings.
        TypeError: maps of another type.
        ValueError: a data set without photos or without any box or mask, or too few or too many maps.
    """
    settings = settings or Settings()
    check_int("batch", batch, 1)
    if not data.samples:
        raise ValueError("data must hold at least one photo, got none")
    masked = any(sample.masks for sample in data.samples)
    if not masked and not any(len(sample.boxes) for sample in data.samples):
        raise ValueError(
            f"data: none of {count(len(data), 'photo')} of {data.name!r} has a box or a mask to score against"
        )
    if sizes == "check":
        problems = (*problems, *check_sizes(data))
    said: dict[str, Any] = {
        "format": FORMAT,
        "molt": molt.__version__,
        "method": {"name": "maps"} | dict(method or {}),
        "protocol": settings.to_json(),
        "data": _about(data) | dict(about or {}),
        "photos": _digest(data),
        "ranks": ranks is not None,
    }
    # What only the figures depend on may change: they are computed anew from the curves.
    late = {"draws", "seed", "ious", "threshold"} | (set() if masked else {"thresholds"})
    state = said | {"protocol": {key: value for key, value in said["protocol"].items() if key not in late}}
    bins = len(thresholds(settings.thresholds)) + 1 if masked else 0
    spool = Spool(None if out is None else user_path(out), len(data), bins, state, restart=restart)
    if (spool.folder / RUN).exists():
        if spool.done != len(data):
            raise RunError(f"{spool.folder}: its files do not fit each other; --restart throws it away")
        if read_json(spool.folder / RUN).get("protocol") == said["protocol"]:
            if step is not None:
                step(len(data))
            return Run.load(spool.folder)

    grid = thresholds(settings.thresholds)
    if step is not None:
        step(spool.done)
    for samples, found in _batches(data.samples, maps, batch, spool.done):
        rows, scored = [], np.zeros((len(samples), settings.size, settings.size))
        for i, (sample, values) in enumerate(zip(samples, found, strict=True)):
            row, trouble = _row(sample, data), []
            if isinstance(values, Exception):
                trouble.append(_trouble(values, sample.path))
            else:
                try:
                    scored[i] = prepare(
                        _array(values), settings.size, resize=settings.resize, normalize=settings.normalize
                    )
                except MapError as error:
                    trouble.append(_trouble(error))
            if save is not None and not trouble:
                save(sample, scored[i])
            _measure(sample, row, trouble)
            row["problem"] = trouble
            rows.append(row)
        if ranks is not None:
            for row, rank in zip(rows, ranks(samples), strict=True):
                row["rank"] = rank
        kept = _curves_of(scored, rows, settings)
        if masked:
            kept["pixels"] = np.stack(
                [_pixels(s, row, m, grid, settings.thresholds) for s, row, m in zip(samples, rows, scored, strict=True)]
            )
        spool.append(rows, **kept)
        if step is not None:
            step(spool.done)

    curves = _as_curves(spool.array("curves"), spool.array("pixels"), spool.rows, ranked=ranks is not None)
    boxes = spool.array("boxes")
    assert boxes is not None
    info = {key: said[key] for key in ("format", "molt", "method", "protocol", "data", "ranks")}
    any_object = bool(info["data"].get("any_object"))
    info |= summarize(spool.rows, curves, settings, data.classes, (*data.remarks, *problems), any_object=any_object)
    rows = final_rows(spool.rows, curves, boxes, settings, info)
    info["errors"] = _errors(rows)
    spool.finish(rows, info)
    return Run(info, rows, curves, None if out is None else spool.folder, spool)


def _batches(
    samples: Sequence[Sample], maps: MapBatch | Iterable[Map], batch: int, done: int
) -> Iterator[tuple[Sequence[Sample], Iterable[Map]]]:
    """Yield some samples with their maps, as many of the one as of the other, from the first not done."""
    stream = None if callable(maps) else iter(maps)
    if stream is not None:
        next(islice(stream, done, done), None)
    for start in range(done, len(samples), batch):
        some = samples[start : start + batch]
        found = list(maps(some) if callable(maps) else islice(stream or (), len(some)))
        if len(found) != len(some):
            raise ValueError(
                f"maps gave {count(len(found), 'map')} for {count(len(some), 'photo')} from {some[0].name!r} on"
            )
        yield some, found
    if stream is not None and next(stream, None) is not None:
        raise ValueError(f"maps gave more than {count(len(samples), 'map')}, one a photo")


def _array(values: Any) -> NDArray:
    """Return a map as an array; a tensor may come as well."""
    if isinstance(values, torch.Tensor):
        values = values.detach().double().cpu().numpy()
    if not isinstance(values, np.ndarray):
        raise TypeError(f"a map must be an array, a tensor or an exception, got {type(values).__name__}")
    if values.dtype.kind not in "fu":
        raise MapError(f"the map holds {values.dtype}", "floating point numbers or uint8")
    return values / np.iinfo(values.dtype).max if values.dtype.kind == "u" else values


def _row(sample: Sample, data: LocalizationSet) -> dict[str, Any]:
    name = data.classes[sample.label] if 0 <= sample.label < len(data.classes) else str(sample.label)
    truth = np.asarray(sample.boxes, np.float64).reshape(-1, 4)
    return {"name": sample.name, "label": sample.label, "class": name, "path": str(sample.path)} | {
        "truth": truth.tolist(),
        "masks": len(sample.masks),
        "rank": None,
    }


def _measure(sample: Sample, row: dict[str, Any], trouble: list[dict[str, str]]) -> None:
    """Enter the photo's size and what share of it the largest true box takes."""
    size = sample.size
    if size is None and row["truth"]:
        try:
            size = read_photo(sample.path, 1).size
        except (ValueError, OSError) as error:
            trouble.append(_trouble(error, sample.path))
    row["width"], row["height"] = size or (None, None)
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in row["truth"]]
    row["size_share"] = max(areas) / (size[0] * size[1]) if size and areas else None


def _curves_of(maps: NDArray[np.float64], rows: list[dict[str, Any]], settings: Settings) -> dict[str, NDArray]:
    """Return the curves and boxes of a batch, and enter each map's peak in its row."""
    levels = np.asarray(to_levels(maps))
    curves = np.zeros((len(maps), 2, 255), np.float32)
    boxes = np.zeros((len(maps), 255, 4), np.int16)
    for row, level in zip(rows, levels, strict=True):
        row["peak"] = int(level.max())
    # Without the photo's size its true boxes have no place on the map, and it counts as missed.
    some = [i for i, row in enumerate(rows) if row["truth"] and row["width"]]
    if some:
        truth = [scaled(rows[i], settings.size, truncate=settings.truncate) for i in some]
        found = box_curves(levels[some], truth, area=settings.area, clip=settings.clip, plus_one=settings.plus_one)
        curves[some] = np.stack([np.asarray(found.any), np.asarray(found.largest)], 1)
        where, _ = largest_at_cuts(torch.from_numpy(levels[some])[:, None], contours=settings.area == "contour")
        boxes[some] = where[:, 0].numpy().astype(np.int16)
    return {"curves": curves, "boxes": boxes}


def _pixels(
    sample: Sample, row: dict[str, Any], scores: NDArray[np.float64], grid: NDArray, steps: int
) -> NDArray[np.uint32]:
    """Return a photo's pixel histogram, zeros where its masks cannot be had."""
    empty = np.zeros((2, len(grid) + 1), np.uint32)
    if not sample.masks:
        row["problem"].append({"message": "the photo has no mask", "expected": "one, as other photos of the set have"})
        return empty
    try:
        return pixel_histogram(scores, read_masks(sample, len(scores)), grid, steps)
    except (ValueError, OSError) as error:
        row["problem"].append(
            {"message": f"a mask: {_mask_trouble(error, sample)}", "expected": "masks that can be read"}
        )
        row["masks"] = 0
        return empty


def _trouble(error: Exception, path: Path | None = None) -> dict[str, str]:
    """Return what is wrong without the file's name, so that the same counts as the same."""
    text = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
    expected = "a picture that can be read" if isinstance(error, PhotoError | OSError) else "a map of the photo"
    return {"message": text.removeprefix(f"{path}: "), "expected": getattr(error, "expected", expected)}


def _about(data: LocalizationSet) -> dict[str, Any]:
    counted = tally([{"name": sample.name} for sample in data.samples])
    said = {"name": data.name, "kind": data.kind, **counted, "classes": len(data.classes)}
    return said | {"left_out": dict(data.left_out)}


def _digest(data: LocalizationSet) -> str:
    """Return what tells this set of photos and truths from another."""
    digest = hashlib.sha256(json.dumps(data.classes).encode())
    for sample in data.samples:
        truth = np.asarray(sample.boxes, np.float64).tolist()
        masks = [_file(path) for path in (*sample.masks, *([sample.ignore] if sample.ignore else []))]
        digest.update(json.dumps([sample.name, sample.label, truth, sample.size, masks]).encode())
    return digest.hexdigest()[:16]


def _mask_trouble(error: Exception, sample: Sample) -> str:
    text = " ".join(str(error).split())
    for path in (*sample.masks, *([sample.ignore] if sample.ignore else [])):
        text = text.removeprefix(f"{path}: ")
    return text


def _file(path: Path) -> tuple[str, int, int]:
    """Return what tells a file from another, or from itself after a change."""
    try:
        found = path.stat()
    except OSError:
        return str(path), -1, -1
    return str(path), found.st_size, found.st_mtime_ns


def _as_curves(
    curves: NDArray | None, pixels: NDArray | None, rows: Sequence[Mapping[str, Any]], *, ranked: bool
) -> Curves:
    assert curves is not None
    places = [_NEVER if row["rank"] is None else row["rank"] for row in rows] if ranked else None
    rank = None if places is None else np.array(places, np.int64)
    return Curves(curves[:, 0], curves[:, 1], np.array([row["peak"] for row in rows], np.int64), pixels, rank)


def _curves(folder: Path, info: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Curves:
    curves = open_array(folder / "curves.npy", np.float32, (len(rows), 2, 255))
    pixels = None
    if (folder / "pixels.npy").exists():
        bins = len(thresholds(int(info["protocol"]["thresholds"]))) + 1
        pixels = open_array(folder / "pixels.npy", np.uint32, (len(rows), 2, bins))
    found = _as_curves(curves, pixels, rows, ranked=bool(info["ranks"]))
    if len(found) and not 0 <= found.peak.min() <= found.peak.max() <= 255:
        raise RunError(f"{folder}: holds a peak that is no level, expected 0 to 255")
    return found


def _errors(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    kinds = [row["error"] for row in rows if row["error"] is not None]
    return {kind: kinds.count(kind) for kind in ("right", "multi_instance", "part", "more", "wrong")}
