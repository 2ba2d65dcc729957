"""How large a photo is, from its header."""

from __future__ import annotations

from pathlib import Path

from molt._files import user_path
from molt.data.images import PhotoError, _guard, _limit, _one_line, _open, _orientation, load_photo


def photo_size(path: str | Path) -> tuple[int, int]:
    """Return (width, height) in pixels of the EXIF-rotated photo, as :func:`molt.data.load_photo` would show it.

    Only the header is read, except of a photo that EXIF turns on its side, which is decoded.

    Raises:
        PhotoError: it cannot be read; the message says why.
    """
    path = user_path(path)

    def read() -> tuple[int, int]:
        if not path.is_file():
            raise PhotoError(f"{_one_line(path)}: no such file")
        with _open(path, _limit()) as image:
            # Which of the two sizes an opened picture shows differs between formats.
            return load_photo(path).size if _orientation(image) >= 5 else image.size

    return _guard(_one_line(path), read)
