"""Photos to try molt on, taken from the installed scikit-image package."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

_PHOTOS = (
    ("Chelsea the cat", "chelsea.png", "Stefan van der Walt, CC0"),
    ("Coffee cup", "coffee.png", "Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0"),
)


@dataclass(frozen=True)
class SamplePhoto:
    """A photo with a name to show and the credit that belongs under it."""

    name: str
    path: Path
    credit: str


def sample_photos() -> list[SamplePhoto]:
    """Return the sample photos; scikit-image is neither imported nor asked to download anything.

    Raises:
        FileNotFoundError: scikit-image, or one of its photos, is not installed.
    """
    spec = importlib.util.find_spec("skimage")
    folders = [Path(place, "data") for place in (spec.submodule_search_locations or ())] if spec is not None else []
    photos = []
    for name, file, credit in _PHOTOS:
        path = next((folder / file for folder in folders if (folder / file).is_file()), None)
        if path is None:
            what = f"{file} of scikit-image" if folders else "scikit-image"
            raise FileNotFoundError(
                f"the sample photos are missing ({what} is not installed): pip install 'molt-wsol[demo]'"
            )
        photos.append(SamplePhoto(name, path, credit))
    return photos
