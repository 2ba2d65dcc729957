"""Score maps in files, and the way from any map to what is scored: (size, size), in [0, 1]."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from molt._files import user_path, whole_file
from molt.data.annotations import DataError, Problem, Sample

Resize = Literal["cubic", "bilinear", "none"]
Normalize = Literal["minmax", "max", "none"]
Missing = Literal["stop", "zero"]

MOST_PIXELS = 2**26  # of one map; a file's header can claim anything
SUFFIXES = (".npy", ".png")
_FLOATS = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))
_FORM = "a (h, w) map: .npy of float16, float32, float64 or uint8, or a grey .png of 8 or 16 bits"


class MapError(ValueError):
    """A map that cannot be used; the message says why, in one line, ``expected`` what would do.

    ``reason`` is the message without the file's name, the same for all files with which the same is wrong.
    """

    def __init__(self, message: str, expected: str = _FORM, path: Path | None = None) -> None:
        super().__init__(message if path is None else f"{path}: {message}")
        self.expected, self.reason = expected, message


class StoredMaps:
    """Maps found in a folder by the name of their photo.

    Of photo ``a/b.jpg`` these files are tried, in this order: ``a/b.jpg.npy`` (as wsolevaluation stores them),
    ``a/b.npy`` and ``b.npy`` where no other photo is called so, and the same with ``.png``. A photo that is several
    samples, one a label, may have one map each in ``a/b.jpg@LABEL.npy``.

    Args:
        folder: where the maps lie.
        samples: the photos whose maps are wanted.
        of: all photos of the set where ``samples`` are some of them: a map of another photo is then none too many.
        labelled: False takes no map of one label only.
        missing: ``"stop"``: a map that is missing, or whose file cannot be one, is an error now, before anything is
            computed; ``"zero"``: a :class:`MapError` takes its place, which counts as a map of zeros.

    Attributes:
        problems: files that belong to no photo.
        stamp: tells these files from others, or from the same after a change.
        normalize: what :func:`prepare` is to do with them unless told otherwise: nothing, as wsolevaluation.

    Raises:
        DataError: no such folder; with ``missing="stop"`` maps that are missing or unreadable, all of them listed.
        ValueError: another ``missing``.
    """

    normalize: Normalize = "none"

    def __init__(
        self,
        folder: str | Path,
        samples: Sequence[Sample],
        *,
        missing: Missing = "stop",
        of: Sequence[Sample] | None = None,
        labelled: bool = True,
    ) -> None:
        if missing not in get_args(Missing):
            raise ValueError(f"missing must be one of {', '.join(get_args(Missing))}, got {missing!r}")
        self.folder = user_path(folder)
        if not self.folder.is_dir():
            raise DataError([Problem(self.folder, None, "no such folder", "a folder of maps")])
        there = {path for path in self.folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()}
        whole = samples if of is None else of
        names = [_inside(name).with_suffix("") for name in {sample.name for sample in whole}]
        stems = Counter(str(name) for name in names) + Counter(name.name for name in names if len(name.parts) > 1)
        self._files: dict[tuple[str, int], Path] = {}
        absent = []

        def places(sample: Sample) -> Iterator[Path]:
            return (path for path in _places(self.folder, sample, stems, labelled=labelled) if path in there)

        for sample in samples:
            found = next(places(sample), None)
            if found is None:
                expected = f"{sample.name}.npy, or the same without its suffix, or .png"
                absent.append(Problem(self.folder / sample.name, None, "the photo has no map", expected))
            else:
                self._files[sample.name, sample.label] = found
        if missing == "stop":
            absent += [problem for path in sorted(set(self._files.values())) if (problem := _unusable(path))]
            if absent:
                raise DataError(absent)
        self.stamp = _stamp(self._files.values())
        unused = sorted(there - set(self._files.values()) - {path for sample in of or () for path in places(sample)})
        stray = [Problem(path, None, "a map that belongs to no photo", "maps of the data set") for path in unused]
        self.problems = tuple(stray)

    def __call__(self, samples: Sequence[Sample]) -> Iterator[NDArray | MapError]:
        """Yield the map of each sample as it is in its file, or why there is none."""
        for sample in samples:
            path = self._files.get((sample.name, sample.label))
            try:
                if path is None:
                    raise MapError("the photo has no map", f"a file in {self.folder}")
                yield read_map(path)
            except MapError as error:
                yield error


def read_map(path: str | Path) -> NDArray:
    """Return the (h, w) map of a file: floats as they are stored, integers divided by the largest of their type.

    Args:
        path: ``.npy`` of float16, float32, float64 or uint8; or a grey ``.png`` of 8 or 16 bits. Pickled objects are
            never loaded.

    Raises:
        MapError: a file that is no such map, cannot be read, or holds NaN or infinite values.
    """
    path = user_path(path)
    values = _open(path)
    if values.dtype.kind == "u":
        return np.asarray(values, np.float64) / np.iinfo(values.dtype).max
    if not np.isfinite(values).all():
        raise MapError("holds NaN or infinite values", "finite values", path)
    return values


def save_map(folder: str | Path, sample: Sample, values: NDArray, *, labelled: bool = False) -> Path:
    """Write a map as float64 to ``FOLDER/PHOTO.npy``, where :class:`StoredMaps` and wsolevaluation find it.

    Args:
        folder: made where there is none.
        sample: whose map it is.
        values: (h, w).
        labelled: True writes ``PHOTO@LABEL.npy``, for photos that are several samples.

    Raises:
        ValueError: a photo's name that leads out of the folder.
        OSError: the file cannot be written.
    """
    name = f"{_inside(sample.name)}@{sample.label}" if labelled else _inside(sample.name)
    path = user_path(folder) / f"{name}.npy"
    if not path.parent.resolve().is_relative_to(user_path(folder).resolve()):
        raise ValueError(f"a link leads {path.parent} out of {folder}")
    with whole_file(path) as part, part.open("wb") as file:
        np.save(file, np.asarray(values, np.float64), allow_pickle=False)
    return path


def prepare(
    values: NDArray, size: int, *, resize: Resize = "cubic", normalize: Normalize = "minmax"
) -> NDArray[np.float64]:
    """Return a map as it is scored: (size, size) in [0, 1].

    Args:
        values: (h, w) floating point.
        size: side in pixels.
        resize: ``"cubic"`` (a = -0.75, no antialiasing, as OpenCV and torch), ``"bilinear"``, or ``"none"``: a map of
            another size is an error.
        normalize: after the resize: ``"minmax"`` as wsolevaluation, a constant map becoming zeros; ``"max"``: negative
            values cut, then divided by the maximum; ``"none"``: values must be in [0, 1], what cubic resizing adds
            is cut.

    Raises:
        MapError: another shape, NaN, infinite values, or values out of range where nothing normalises them.
    """
    if values.ndim != 2 or 0 in values.shape:
        raise MapError(f"the map has shape {values.shape}", "(h, w), with at least one pixel")
    if values.size > MOST_PIXELS:
        raise MapError(f"the map has {values.size:,} pixels", f"at most {MOST_PIXELS:,}")
    given = np.asarray(values, np.float64)
    low, high = float(given.min()), float(given.max())
    if not np.isfinite(high - low):
        raise MapError("the map holds NaN, infinite or huge values", "finite values")
    if normalize == "none" and (low < 0 or high > 1):
        raise MapError(f"the map holds {low:.6g} to {high:.6g}", "values in [0, 1], or another normalize")
    if given.shape != (size, size):
        if resize == "none":
            raise MapError(f"the map is {given.shape[1]}x{given.shape[0]}", f"{size}x{size}, or another resize")
        given = _resized(_resized(given, size, resize).T, size, resize).T
    if normalize == "none":
        return np.clip(given, 0, 1)
    given = given - given.min() if normalize == "minmax" else np.maximum(given, 0)
    top = given.max()
    # Constant but for rounding of the resize counts as constant.
    if low == high and normalize == "minmax":
        top = 0.0
    return given / top if top > 0 else np.zeros_like(given)


def _resized(values: NDArray[np.float64], size: int, kind: Resize) -> NDArray[np.float64]:
    """Return (h, size) of (h, w): each new column a weighted sum of old ones."""
    taps, weights = _taps(values.shape[1], size, kind)
    mixed = np.zeros((len(values), size))
    for place, weight in zip(taps.T, weights.T, strict=True):
        mixed += weight * values[:, place]
    return mixed


@functools.lru_cache(64)
def _taps(old: int, new: int, kind: Resize) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return which old columns each new one mixes, and how; columns beyond the edge repeat it.

    Of cubic ones places and weights are in single precision, as OpenCV has them whatever the map's type, so that sums
    are its own to the last digit.
    """
    at = (np.arange(new) + 0.5) * (1.0 / (new / old)) - 0.5
    if kind == "bilinear":
        first = np.floor(at).astype(np.int64)
        t = at - first
        steps, weights = np.arange(2), np.stack([1 - t, t], 1)
    else:
        near = at.astype(np.float32)
        first = np.floor(near).astype(np.int64)
        t = near - first.astype(np.float32)
        one, a = np.float32(1), np.float32(-0.75)
        beyond, away = t + one, one - t
        before = ((a * beyond - 5 * a) * beyond + 8 * a) * beyond - 4 * a
        here, after = (((a + 2) * d - (a + 3)) * d * d + one for d in (t, away))
        steps, weights = np.arange(-1, 3), np.stack([before, here, after, one - before - here - after], 1)
    return np.clip(first[:, None] + steps, 0, old - 1), weights.astype(np.float64)


def _open(path: Path) -> NDArray:
    """Return the map in a file, its form checked; of ``.npy`` no value is read yet."""
    try:
        return _open_png(path) if path.suffix.lower() == ".png" else _open_npy(path)
    except (OSError, ValueError, SyntaxError, EOFError, PIL.Image.DecompressionBombError) as error:
        if isinstance(error, MapError):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        if "pickle" in text or "Python objects" in text:
            text = "holds pickled objects, which are never loaded, or is no .npy file"
        raise MapError(f"cannot be read ({text})", path=path) from error


def _open_npy(path: Path) -> NDArray:
    if path.stat().st_size == 0:
        raise MapError("the file is empty", path=path)
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(values, np.ndarray):
        raise MapError("is an archive of arrays", path=path)
    if values.dtype.newbyteorder("=") not in _FLOATS and values.dtype != np.uint8:
        raise MapError(f"holds {values.dtype}", path=path)
    _check_shape(path, values.shape)
    return values


def _open_png(path: Path) -> NDArray:
    with PIL.Image.open(path, formats=["PNG"]) as picture:
        _check_shape(path, picture.size[::-1])
        if picture.mode not in ("L", "I;16", "I"):
            raise MapError(f"is a picture of mode {picture.mode}", path=path)
        values = np.asarray(picture)
        return values if picture.mode == "L" else values.astype(np.uint16)  # "I" is older Pillow's 16 bits


def _check_shape(path: Path, shape: Sequence[int]) -> None:
    if len(shape) != 2 or 0 in shape:
        raise MapError(f"has shape {tuple(shape)}", "(h, w), with at least one pixel", path)
    if shape[0] * shape[1] > MOST_PIXELS:
        raise MapError(f"has {shape[0] * shape[1]:,} pixels", f"at most {MOST_PIXELS:,}", path)


def _stamp(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(set(paths)):
        found = path.stat()
        digest.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _unusable(path: Path) -> Problem | None:
    """Return what is wrong with a file as far as its header says, or None."""
    try:
        _open(path)
    except MapError as error:
        return Problem(path, None, error.reason, error.expected)
    return None


def _places(folder: Path, sample: Sample, stems: Counter[str], *, labelled: bool) -> Iterable[Path]:
    """Yield where the map of a sample may be, the first choice first."""
    name = _inside(sample.name)
    bare = name.with_suffix("")
    own = [f"{name}@{sample.label}"] if labelled else []
    names = [*own, str(name), *(stem for stem in (str(bare), bare.name) if stems[stem] == 1)]
    for suffix in SUFFIXES:
        yield from (folder / f"{stem}{suffix}" for stem in dict.fromkeys(names))


def _inside(name: str) -> PurePosixPath:
    """Return a photo's name as a path that stays in its folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.name or ":" in path.parts[0]:
        raise ValueError(f"the photo's name {name!r} leads out of a folder of maps")
    return path
