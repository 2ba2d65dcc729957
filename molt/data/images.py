"""Photos from files, pictures, arrays and tensors, checked and brought to one form."""

from __future__ import annotations

import operator
import os
import stat
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from molt._files import user_path
from molt.data._folders import Walked, walk
from molt.data.formats import known_formats, photo_suffixes
from molt.data.pixels import as_channels_first, as_channels_last, to_alpha, to_levels, to_unit

T = TypeVar("T")

_JPEG = ("JPEG", "MPO")
_MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb
_opening = threading.Lock()  # held while Pillow's own limit is another one
_ORIENTATION = 0x0112
_BITS, _PHOTOMETRIC, _PLANES = 258, 262, 284  # tags of TIFF
# Pillow's names of 16-bit colours in files -> the name under which the lower bytes come out in place of the upper ones.
_OTHER_ORDER = {f"{mode};16{a}": f"{mode};16{b}" for mode in ("RGB", "RGBX", "RGBA") for a, b in ("LB", "BL")}
_OTHER_ORDER |= {
    f"{mode};16N": _OTHER_ORDER[f"{mode};16{sys.byteorder[0].upper()}"] for mode in ("RGB", "RGBX", "RGBA")
}
_OTHER_ORDER["LA;16B"] = "RGBA"  # four bytes: upper and lower of grey, upper and lower of alpha
# libtiff gives values in the machine's order, which Pillow misses beyond 16 bits.
_SWAPPED = {"F;32BF": "F;32NF", "F;64BF": "F;64NF", "I;32BS": "I;32NS", "I;32B": "I;32N"}
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


def find_photos(
    folder: str | os.PathLike[str], on_error: Callable[[PhotoError], object] | None = None
) -> tuple[list[Path], int]:
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


def walk_photos(folder: str | os.PathLike[str], on_error: Callable[[PhotoError], object] | None = None) -> Walked:
    """Do what :func:`find_photos` does, and tell apart what is left out."""

    def fail(error: OSError) -> None:
        reason = error.strerror or type(error).__name__
        problem = PhotoError(f"{_one_line(error.filename or folder)}: the folder cannot be read ({reason})")
        if on_error is None:
            raise problem from error
        on_error(problem)

    return walk(user_path(folder), photo_suffixes(), fail)


def load_photo(source: Any) -> PIL.Image.Image:
    """Return a photo as an RGB picture at full size, EXIF-rotated.

    Args:
        source: a path, in which ~ is the home folder; a binary file object, which is read from its start and left open,
            standing anywhere; a PIL image; an array (H, W, 3), (H, W, 4), (H, W), (H, W, 1) or (1, H, W); or a tensor
            (3, H, W), (1, H, W), (H, W) or (H, W, 1). Of sides that may be channels the last counts in an array, the
            first in a tensor. Integers within 0..255 of any dtype, bools and floats in [0, 1] are taken as they are;
            for others :mod:`molt.data.pixels` says what is black and white; floats below 0 only in files and pictures.
            Of an animation the first frame counts; what is transparent shows white.

    Raises:
        PhotoError: it cannot be read or has another shape or dtype, NaN or, in an array or tensor, floats below 0; the
            message says which.
        TypeError: a source of another type.
    """
    if is_file(source):
        return _from_file(source, None)[0]
    if isinstance(source, PIL.Image.Image):
        return _guard("the picture", lambda: _to_rgb(_with_pixels(source, "the picture")))
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Tensor):
        pixels = _check_tensor(source)
        return PIL.Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
    kinds = "a path, binary file object, PIL image, NumPy array or torch tensor"
    raise TypeError(f"a photo must be {kinds}, got {type(source).__name__}")


def is_file(source: Any) -> bool:
    """Return whether a photo is given as a path or a file object, whatever it holds."""
    return isinstance(source, str | os.PathLike) or (hasattr(source, "read") and not isinstance(source, type))


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
    if is_file(source):
        picture, original = _from_file(source, (width, height))
    else:
        picture = load_photo(source)
        original = picture.size
    if picture.size != (width, height):
        picture = picture.resize((width, height), PIL.Image.Resampling.BICUBIC)
    return Photo(torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255, original, source)


def _sides(size: Any) -> tuple[int, int]:
    """Return the size asked for as (H, W)."""
    given = size.tolist() if isinstance(size, np.ndarray | Tensor) else size
    try:
        sides = [operator.index(side) for side in (given if isinstance(given, Sequence) else [given, given])]
    except TypeError as error:
        raise TypeError(f"size must be an int or (H, W), got {size!r}") from error
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"size must be one side or (H, W), each at least 1, got {size!r}")
    return sides[0], sides[1]


def _from_file(source: Any, wanted: tuple[int, int] | None) -> tuple[PIL.Image.Image, tuple[int, int]]:
    """Return the picture, for a JPEG possibly decoded smaller but not below ``wanted``, and its full upright size."""
    opened = hasattr(source, "read") and not isinstance(source, os.PathLike)
    file: Path | IO[bytes] = source if opened else user_path(source)
    given = getattr(source, "name", None) if opened else file
    name = _one_line(given) if isinstance(given, str | Path) else "the file object"

    def read() -> tuple[PIL.Image.Image, tuple[int, int]]:
        (_check_path if isinstance(file, Path) else _check_object)(file, name)
        limit = _limit()
        with _open(file, limit) as image:
            _with_pixels(image, name)
            if image.width * image.height > limit:
                raise PhotoError(
                    f"{name}: {image.width}x{image.height} pixels are over the limit of {limit:,} (MOLT_MAX_PIXELS)"
                )
            full = None
            if wanted is not None and image.format in _JPEG:
                full = image.size[::-1] if _orientation(image) >= 5 else image.size
                image.draft("RGB", (max(wanted), max(wanted)))
            picture = _to_rgb(image)
            return picture, full or picture.size

    return _guard(name, read)


def _check_path(path: Any, name: str) -> None:
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


def _check_object(file: Any, name: str) -> None:
    if getattr(file, "closed", False):
        raise PhotoError(f"{name}: is closed")
    if hasattr(file, "readable") and not file.readable():
        raise PhotoError(f"{name}: is not open for reading")
    if not isinstance(file.read(0), bytes):
        raise PhotoError(f"{name}: is open as text, expected binary: open it with 'rb'")


def _open(file: Path | IO[bytes], limit: int) -> PIL.Image.Image:
    """Open a file, its pixels not yet decoded, of up to ``limit`` pixels whatever Pillow's own limit is."""
    if limit == _MAX_PIXELS:
        return PIL.Image.open(file, formats=known_formats())
    # Pillow raises above its own number, before ours is looked at.
    with _opening:
        theirs = PIL.Image.MAX_IMAGE_PIXELS
        try:
            if theirs is not None:
                PIL.Image.MAX_IMAGE_PIXELS = max(theirs, limit)
            return PIL.Image.open(file, formats=known_formats())
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
    name = getattr(image, "filename", "")
    if name and image.format == "TIFF" and _orientation(image) >= 5:
        image.filename = ""  # type: ignore[attr-defined]  # or Pillow maps the file with height and width exchanged
    image.load()  # a TIFF turns itself while it loads, and drops the mark
    if name:
        image.filename = name  # type: ignore[attr-defined]
    orientation = _orientation(image)
    return image if orientation == 1 else image.transpose(_TURNS[orientation])


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Return an upright RGB copy of any mode; what is transparent shows white."""
    # Known of the file, not of a picture that was turned.
    negative = image.format == "TIFF" and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
    values, clear = _deep_colours(image), image.info.get("transparency")
    if values is None and (image.mode.startswith("I") or image.mode == "F"):
        _rename(image, _SWAPPED)
        values = np.asarray(_upright(image))
    if values is not None:
        return _blend(values, None if clear is None else np.atleast_1d(clear), negative=negative)
    image = _upright(image)
    if image.mode in ("RGBa", "La"):
        image = image.convert(image.mode.upper())
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        ground = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(ground, image)
    image = image.convert("RGB")  # a copy where it is RGB already
    image.info.clear()  # or the orientation would be followed again
    return image


def _deep_colours(image: PIL.Image.Image) -> np.ndarray | None:
    """Return (H, W, C) uint16, upright, of a file of 16-bit colours that is not decoded yet; None of others.

    Pillow keeps the upper byte of each alone: the file is decoded twice, once as if its bytes were in the other order.
    """
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" and getattr(image, "tile", []) else {}
    if tags.get(_PLANES) == 2 and max(tags.get(_BITS, (8,))) > 8:
        raise ValueError("Pillow misreads colours of more than 8 bits that lie in planes apart: store them by pixels")
    other = _OTHER_ORDER.get(_raw_mode(image))
    if other is None or (fp := getattr(image, "fp", None)) is None:
        return None
    halves = []
    for names in ({}, _OTHER_ORDER):
        with _open(fp, max(_limit(), image.width * image.height)) as half:
            if image.tell():
                half.seek(image.tell())
            _rename(half, names)
            halves.append(np.asarray(_upright(half)))
    upper, lower = halves
    lower = lower[..., [1, 1, 1, 3]] if other == "RGBA" else lower
    values: np.ndarray = upper.astype(np.uint16) << np.uint16(8) | lower
    return values


def _raw_mode(image: PIL.Image.Image) -> str:
    """Return Pillow's name of how pixels lie in the file, empty where they were decoded or lie in several ways."""
    given = {tile[3] if isinstance(tile[3], str) else str((tile[3] or ("",))[0]) for tile in getattr(image, "tile", ())}
    return given.pop() if len(given) == 1 else ""


def _rename(image: PIL.Image.Image, names: dict[str, str]) -> None:
    """Let the decoder take the pixels in the file for something else."""
    other, tiles = names.get(_raw_mode(image)), getattr(image, "tile", [])
    if other is None or (names is _SWAPPED and tiles[0][0] != "libtiff"):
        return
    for place, tile in enumerate(tiles):
        arguments = other if isinstance(tile[3], str) else (other, *tile[3][1:])
        tiles[place] = tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)


def _blend(values: np.ndarray, clear: np.ndarray | None = None, *, negative: bool = False) -> PIL.Image.Image:
    """Return values (H, W), (H, W, 3) or (H, W, 4) of any real dtype as an RGB picture on a white ground.

    Args:
        values: the last of four channels is the opacity.
        clear: (1,) or (3,): the value that is transparent.
        negative: small values are bright.
    """
    colours = values[..., :3] if values.ndim == 3 else values[..., None]
    alpha = to_alpha(values[..., 3]) if values.shape[2:] == (4,) else None
    if clear is not None:
        alpha = np.where((colours == clear).all(-1), 0, 255 if alpha is None else alpha).astype(np.uint8)
    levels = to_levels(colours, None if alpha is None else alpha > 0)
    rgb = np.broadcast_to(255 - levels if negative else levels, (*levels.shape[:2], 3))
    return _to_rgb(PIL.Image.fromarray(np.ascontiguousarray(rgb) if alpha is None else np.dstack([rgb, alpha])))


def _from_array(given: np.ndarray) -> PIL.Image.Image:
    array = as_channels_last(given)
    if array is None:
        hint = "; a torch tensor may be (3, H, W)" if given.ndim == 3 and given.shape[0] == 3 else ""
        hint = "; take one photo of the batch" if given.ndim == 4 else hint
        raise PhotoError(f"the array must have shape (H, W, 3), got {given.shape}{hint}")
    if 0 in array.shape:
        raise PhotoError(f"the array has no pixels: shape {given.shape}")
    if array.dtype.kind not in "biuf":
        raise PhotoError(f"the array must hold integers, floats or bools, got {array.dtype}")
    if array.dtype.kind == "f":
        _check_range(float(array.min()), float(array.max()), "array")
    return _blend(array.astype(np.uint8) * np.uint8(255) if array.dtype == np.bool_ else array)


def _check_tensor(given: Tensor) -> Tensor:
    """Return the tensor as (3, H, W) float32 in [0, 1] on its own device."""
    if given.layout != torch.strided:
        raise PhotoError(f"the tensor must be dense, got layout {given.layout}")
    tensor = as_channels_first(given.detach())
    if tensor is None:
        hint = "; a NumPy array may be (H, W, 3)" if given.ndim == 3 and given.shape[2] == 3 else ""
        hint = "; take one photo of the batch" if given.ndim == 4 else hint
        raise PhotoError(f"the tensor must have shape (3, H, W), got {tuple(given.shape)}{hint}")
    if 0 in tensor.shape:
        raise PhotoError(f"the tensor has no pixels: shape {tuple(given.shape)}")
    if tensor.is_complex() or tensor.is_quantized:
        raise PhotoError(f"the tensor must hold integers, floats or bools, got {tensor.dtype}")
    if tensor.is_floating_point():
        low, high = torch.aminmax(tensor.float())
        _check_range(float(low), float(high), "tensor")
    return to_unit(tensor)


def _check_range(low: float, high: float, kind: str) -> None:
    """Check floats in memory: one below 0 is no light, so that something was done to the photo."""
    if not np.isfinite(low) or not np.isfinite(high):
        raise PhotoError(f"the {kind} holds NaN or infinite values")
    if low < 0:
        why = "clip it" if low > -0.1 and high < 1.1 else "it looks normalised: undo that"
        raise PhotoError(f"the {kind} must hold floats in [0, 1], got {low:.8g} to {high:.8g} ({why})")


__all__ = ["Photo", "PhotoError", "find_photos", "is_file", "load_photo", "photo_suffixes", "read_photo"]
