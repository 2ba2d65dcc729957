"""Photos from files, pictures, arrays and tensors, checked and brought to one form."""

from __future__ import annotations

import functools
import operator
import os
import stat
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL.features
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from molt.data._folders import Walked, walk

T = TypeVar("T")

# Openers that run another program (EPS), that only identify a file and then fail to decode it, or that know a file by
# no signature and hold no photos.
_UNSAFE = frozenset({"EPS", "BUFR", "GRIB", "HDF5", "WMF", "MPEG", "FPX", "MIC", "IM", "IMT", "IPTC", "SPIDER"})
_OPTIONAL = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # format -> what Pillow must be built with
_JPEG = ("JPEG", "MPO")
_MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb
_opening = threading.Lock()  # held while Pillow's own limit is another one
_ORIENTATION = 0x0112
_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


class PhotoError(ValueError):
    """A photo that cannot be used; the message names it and says why, in one line."""


@dataclass(frozen=True, eq=False)
class Photo:
    """A photo ready for a network.

    Attributes:
        pixels: (3, H, W) float32 RGB in [0, 1], resized to the size asked for.
        size: (width, height) in pixels of the EXIF-rotated original.
        source: what was read.
    """

    pixels: Tensor
    size: tuple[int, int]
    source: Any


@functools.cache
def _formats() -> tuple[str, ...]:
    PIL.Image.init()
    found = set(PIL.Image.OPEN) - _UNSAFE
    return tuple(sorted(f for f in found if f not in _OPTIONAL or PIL.features.check(_OPTIONAL[f])))


@functools.cache
def photo_suffixes() -> frozenset[str]:
    """Return the lower-case file suffixes of the formats Pillow decodes here, each with its dot."""
    formats = {*_formats(), "MPO"}  # opened by the JPEG reader
    return frozenset(suffix for suffix, form in PIL.Image.registered_extensions().items() if form in formats)


def find_photos(folder: str | Path, on_error: Callable[[PhotoError], object] | None = None) -> tuple[list[Path], int]:
    """Return the photos below a folder by suffix, sorted, and how many other files there are.

    Links to folders are not followed. Hidden files and folders, those of systems (``__MACOSX``, ``@eaDir``...) and what
    molt itself wrote, overlays among them, are left out, each counted once.

    Args:
        folder: where to look.
        on_error: called for each folder that cannot be read, which is then left out; None raises.

    Raises:
        PhotoError: the folder, or one below it, cannot be read, and ``on_error`` is None.
    """
    found = walk_photos(folder, on_error)
    return found.photos, found.others + found.left_out.total()


def walk_photos(folder: str | Path, on_error: Callable[[PhotoError], object] | None = None) -> Walked:
    """Do what :func:`find_photos` does, and tell apart what is left out."""

    def fail(error: OSError) -> None:
        reason = error.strerror or type(error).__name__
        problem = PhotoError(f"{_one_line(error.filename or folder)}: the folder cannot be read ({reason})")
        if on_error is None:
            raise problem from error
        on_error(problem)

    return walk(folder, photo_suffixes(), fail)


def load_photo(source: Any) -> PIL.Image.Image:
    """Return a photo as an RGB picture at full size, EXIF-rotated.

    Args:
        source: path, PIL image, (H, W, 3) array or (3, H, W) tensor, uint8 or float in [0, 1]; arrays may also be
            (H, W), (H, W, 4), bool or uint16. Of an animation the first frame counts; what is transparent shows
            white; grey deeper than 8 bits is scaled down to 8.

    Raises:
        PhotoError: it cannot be read or has another shape or range; the message says which.
        TypeError: a source of another type.
    """
    if isinstance(source, str | Path):
        return _from_file(Path(source), None)[0]
    if isinstance(source, PIL.Image.Image):
        return _guard("the picture", lambda: _to_rgb(_upright(_with_pixels(source, "the picture"))))
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Tensor):
        pixels = _check_tensor(source)
        return PIL.Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
    raise TypeError(f"a photo must be a path, PIL image, NumPy array or torch tensor, got {type(source).__name__}")


def read_photo(source: Any, size: int | Sequence[int]) -> Photo:
    """Return a photo resized to ``size``, its sides squashed, with antialiasing.

    Args:
        source: as for :func:`load_photo`.
        size: (H, W) in pixels, or the side of a square.

    Raises:
        PhotoError, TypeError: as for :func:`load_photo`.
        ValueError: a size that is not one or two sides of at least 1.
    """
    height, width = _sides(size)
    if isinstance(source, Tensor):
        pixels = _check_tensor(source)
        original = (pixels.shape[2], pixels.shape[1])
        if tuple(pixels.shape[1:]) != (height, width):
            pixels = F.interpolate(pixels[None], (height, width), mode="bicubic", align_corners=False, antialias=True)
            pixels = pixels[0].clamp(0, 1)
        elif pixels.data_ptr() == source.data_ptr():
            pixels = pixels.clone()
        return Photo(pixels, original, source)
    if isinstance(source, str | Path):
        picture, original = _from_file(Path(source), (width, height))
    else:
        picture = load_photo(source)
        original = picture.size
    if picture.size != (width, height):
        picture = picture.resize((width, height), PIL.Image.Resampling.BICUBIC)
    return Photo(torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255, original, source)


def _sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Return the size asked for as (H, W)."""
    try:
        sides = [operator.index(side) for side in (size if isinstance(size, Sequence) else [size, size])]
    except TypeError as error:
        raise TypeError(f"size must be an int or (H, W), got {size!r}") from error
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"size must be one side or (H, W), each at least 1, got {size!r}")
    return sides[0], sides[1]


def _from_file(path: Path, wanted: tuple[int, int] | None) -> tuple[PIL.Image.Image, tuple[int, int]]:
    """Return the picture, for a JPEG possibly decoded smaller but not below ``wanted``, and its full upright size."""
    name = _one_line(path)

    def read() -> tuple[PIL.Image.Image, tuple[int, int]]:
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a null character
            raise PhotoError(f"{name}: no such file") from error
        if stat.S_ISDIR(found.st_mode):
            raise PhotoError(f"{name}: is a folder, not a photo")
        if not stat.S_ISREG(found.st_mode):
            raise PhotoError(f"{name}: is not a regular file")
        if found.st_size == 0:
            raise PhotoError(f"{name}: the file is empty")
        limit = _limit()
        with _open(path, limit) as image:
            _with_pixels(image, name)
            if image.width * image.height > limit:
                raise PhotoError(
                    f"{name}: {image.width}x{image.height} pixels are over the limit of {limit:,} (MOLT_MAX_PIXELS)"
                )
            full = None
            if wanted is not None and image.format in _JPEG:
                full = image.size[::-1] if _orientation(image) >= 5 else image.size
                image.draft("RGB", (max(wanted), max(wanted)))
            picture = _to_rgb(_upright(image))
            return picture, full or picture.size

    return _guard(name, read)


def _open(path: Path, limit: int) -> PIL.Image.Image:
    """Open a file, its pixels not yet decoded, of up to ``limit`` pixels whatever Pillow's own limit is."""
    if limit == _MAX_PIXELS:
        return PIL.Image.open(path, formats=_formats())
    # Pillow raises above its own number, before ours is looked at.
    with _opening:
        theirs = PIL.Image.MAX_IMAGE_PIXELS
        try:
            if theirs is not None:
                PIL.Image.MAX_IMAGE_PIXELS = max(theirs, limit)
            return PIL.Image.open(path, formats=_formats())
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = theirs


def _guard(name: str, read: Callable[[], T]) -> T:
    """Run ``read`` and turn whatever Pillow raises into one clear line."""
    try:
        return read()
    except PhotoError:
        raise
    except PIL.UnidentifiedImageError as error:
        raise PhotoError(f"{name}: not a photo that Pillow can read") from error
    except PIL.Image.DecompressionBombError as error:
        raise PhotoError(f"{name}: more pixels than the limit of {_limit():,} (MOLT_MAX_PIXELS)") from error
    except OSError as error:
        reason = error.strerror or _one_line(error)  # without an errno it is the decoder that complains
        raise PhotoError(f"{name}: cannot be {'read' if error.errno else 'decoded'} ({reason})") from error
    except Exception as error:
        raise PhotoError(f"{name}: cannot be decoded ({_one_line(error) or type(error).__name__})") from error


def _one_line(text: object) -> str:
    """Return the text without line breaks or other control characters, which a file name may hold."""
    return "".join(c if c.isprintable() or "\udc80" <= c <= "\udcff" else " " for c in str(text)).strip()


def _limit() -> int:
    """Largest number of pixels decoded: ``MOLT_MAX_PIXELS``, else Pillow's own limit."""
    given = os.environ.get("MOLT_MAX_PIXELS", "")
    if not given:
        return _MAX_PIXELS
    if not given.isdecimal() or int(given) == 0:
        raise PhotoError(f"MOLT_MAX_PIXELS must be a positive integer, got {given!r}")
    return int(given)


def _with_pixels(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    if 0 in image.size:
        raise PhotoError(f"{name}: has no pixels ({image.width}x{image.height})")
    return image


def _orientation(image: PIL.Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; broken EXIF counts as upright."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return value if value in _TURNS else 1


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Turn the picture as its EXIF orientation says."""
    image.load()  # a TIFF turns itself while it loads, and drops the mark
    orientation = _orientation(image)
    return image if orientation == 1 else image.transpose(_TURNS[orientation])


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return an RGB copy of any mode; what is transparent shows white."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        grey = _deep_grey(values, image.mode)
        grey[values == image.info.get("transparency")] = 255
        return PIL.Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        ground = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(ground, image)
    image = image.convert("RGB")  # a copy where it is RGB already
    image.info.clear()  # or the orientation would be followed again
    return image


def _deep_grey(values: np.ndarray, mode: str) -> np.ndarray:
    """Scale grey above 8 bits to uint8: 16 bits by 257, 32 bits and floats by the range they show."""
    grey = values.astype(np.float64)
    if not np.isfinite(grey).all():
        raise ValueError("NaN or infinite values")
    low, high = float(grey.min()), float(grey.max())
    if mode.startswith("I;16"):
        grey /= 257
    elif low < 0 or high > 65535:
        grey = (grey - low) * (255 / (high - low)) if high > low else np.zeros_like(grey)
    elif high > 255:
        grey /= 257
    elif mode == "F" and high <= 1:
        grey *= 255
    return grey.round().astype(np.uint8)


def _from_array(array: np.ndarray) -> PIL.Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        hint = "; a torch tensor may be (3, H, W)" if array.ndim == 3 and array.shape[0] == 3 else ""
        raise PhotoError(f"the array must have shape (H, W, 3), got {array.shape}{hint}")
    if 0 in array.shape:
        raise PhotoError(f"the array has no pixels: shape {array.shape}")
    if array.dtype.kind == "f":
        _check_range(float(array.min()), float(array.max()), "array")
        array = (array * 255).round().astype(np.uint8)
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = (array / 257).round().astype(np.uint8)
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise PhotoError(f"the array must be uint8, uint16 or float in [0, 1], got {array.dtype}")
    return _to_rgb(PIL.Image.fromarray(array))


def _check_tensor(tensor: Tensor) -> Tensor:
    """Return the tensor as (3, H, W) float32 in [0, 1] on its own device."""
    if tensor.ndim != 3 or tensor.shape[0] != 3:
        hint = "; a NumPy array may be (H, W, 3)" if tensor.ndim == 3 and tensor.shape[2] == 3 else ""
        hint = "; take one photo of the batch" if tensor.ndim == 4 else hint
        raise PhotoError(f"the tensor must have shape (3, H, W), got {tuple(tensor.shape)}{hint}")
    if 0 in tensor.shape:
        raise PhotoError(f"the tensor has no pixels: shape {tuple(tensor.shape)}")
    if tensor.layout != torch.strided:
        raise PhotoError(f"the tensor must be dense, got layout {tensor.layout}")
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    if not tensor.is_floating_point():
        raise PhotoError(f"the tensor must be uint8 or float in [0, 1], got {tensor.dtype}")
    low, high = torch.aminmax(tensor.detach().float())
    _check_range(float(low), float(high), "tensor")
    return tensor.detach().float()


def _check_range(low: float, high: float, kind: str) -> None:
    if not np.isfinite(low) or not np.isfinite(high):
        raise PhotoError(f"the {kind} holds NaN or infinite values")
    if low < 0 or high > 1:
        why = "it looks normalised: undo that" if low < 0 else "it looks like 0..255: divide by 255 or pass uint8"
        why = "clip it" if low > -0.1 and high < 1.1 else why
        raise PhotoError(f"the {kind} must hold floats in [0, 1], got {low:.8g} to {high:.8g} ({why})")
