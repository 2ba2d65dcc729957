"""Cut-outs and backgrounds for composites.py: fetched from Debian packages, read from folders, checked."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from molt.data.images import PhotoError, find_photos, load_photo

sys.path.append(str(Path(__file__).parent))
from debian_files import FetchError, Package, RccFile, download

STAMPS, PHOTOS, SCENES = "tuxpaint-stamps-default", "gcompris-qt-data", "mate-backgrounds"
STAMP_ROOT = "usr/share/tuxpaint/stamps/"

# Class -> folders of the stamps, or single stamps. One picture a species, so a class is a group of species.
CLASSES = {
    "bird": ("animals/birds/",),
    "carnivore": (
        "animals/mammals/bears/",
        "animals/mammals/cats/",
        "animals/mammals/dogs/",
        "animals/mammals/aquatic/otter.",
        "animals/mammals/aquatic/sea_lion.",
        "animals/mammals/badger.",
        "animals/mammals/ferret.",
    ),
    "fish": ("animals/fish/",),
    "flower": ("plants/flowers/",),
    "fruit": ("food/fruit/", "plants/trees/rambutan."),
    "hoofed": (
        "animals/mammals/bovines/",
        "animals/mammals/camel/",
        "animals/mammals/deer/",
        "animals/mammals/equines/",
        "animals/mammals/giraffe.",
        "animals/mammals/hippopotamus.",
        "animals/mammals/pig.",
        "animals/mammals/pig_golden.",
        "animals/mammals/rhino_black.",
        "animals/mammals/wildboar.",
    ),
    "instrument": ("hobbies/music/",),
    "rodent": ("animals/mammals/rodents/", "animals/mammals/rabbit_little."),
    "vehicle": (
        "military/vehicles/bradley.",
        "military/vehicles/infantry-stryker.",
        "vehicles/auto/",
        "vehicles/construction/dumper.",
        "vehicles/cycle/",
        "vehicles/emergency/firetruck.",
        "vehicles/garbagetruck.",
        "vehicles/masstransit/",
        "vehicles/race/",
    ),
}
# Drawings and toys; no fish; and cut-outs that bring ground with them: grass, a stump.
LEFT_OUT = {"cartoon", "toys", "plastic", "lobster", "shrimp", "albino_peahen", "tiger_sumatran", "indian_blackbuck"}
LEFT_OUT |= {"fox"}

MONUMENTS = "gcompris/src/activities/explore_monuments/resource/"
# Statues and carved heads are objects; on the one grey photo any colour would give the object away.
NO_GROUND = {"cabrillo", "christTheRedeemer", "mountRushmore", "statueofLiberty", "castleClinton"}
# Photos of no single object; the package's others show flowers.
NATURE = {"Aqua", "Blinds", "Dune", "GreenMeadow", "RainDrops", "Storm", "Wood"}

MAX_CUTOUT_PIXELS = 40_000_000
THRESHOLD = 128


class SourceError(ValueError):
    """Cut-outs or backgrounds that cannot be used; the message names what came and what was expected."""


@dataclass(frozen=True, eq=False)
class Cutout:
    """One object.

    Attributes:
        name: class/file stem.
        pixels: (h, w, 4) uint8 RGBA, cropped to where alpha is not 0.
        area: pixels with alpha >= 128.
    """

    name: str
    pixels: NDArray[np.uint8]
    area: int


@dataclass(frozen=True, eq=False)
class Background:
    """A photo without objects: name and (h, w, 3) uint8 RGB pixels."""

    name: str
    pixels: NDArray[np.uint8]


@dataclass
class Skipped:
    """Files that were not used, each with the reason."""

    files: list[dict[str, str]] = field(default_factory=list)

    def add(self, name: str, reason: str) -> None:
        self.files.append({"file": name, "reason": reason})

    def about(self, folder: str) -> str:
        """Return how many files of a folder were skipped and why the first was, for an error."""
        found = [entry for entry in self.files if entry["file"].startswith(folder)]
        return f"; {len(found)} skipped, {found[0]['file']}: {found[0]['reason']}" if found else ""


def fetch(cache: Path) -> tuple[Path, Path, list[dict[str, str]]]:
    """Fetch the packages into ``cache`` and unpack what is wanted of them there, unless that was done before.

    Returns:
        The folder of cut-outs (class folders), that of backgrounds, and name, version and digest of each package.

    Raises:
        FetchError: a package cannot be had or lacks what is expected of it.
    """
    unpacked = cache / "unpacked"
    listing = unpacked / "packages.json"
    if not listing.is_file():
        try:
            packages = [download(name, cache) for name in (STAMPS, PHOTOS, SCENES)]
            part = cache / ".unpacked.part"
            for old in (part, unpacked):
                shutil.rmtree(old, ignore_errors=True)
            part.mkdir()
            _unpack(packages, part)
            part.rename(unpacked)
        except FetchError as error:
            folders = "--cutouts DIR (class folders of RGBA PNGs) and --backgrounds DIR (photos)"
            raise FetchError(f"{error}; or pass {folders} in place of --fetch") from error
    return unpacked / "cutouts", unpacked / "backgrounds", json.loads(listing.read_text(encoding="utf-8"))


def _unpack(packages: list[Package], folder: Path) -> None:
    """Write cutouts/, backgrounds/, each with CREDITS.txt, and packages.json."""
    stamps, photos, scenes = packages
    found = stamps.files(lambda path: (path.startswith(STAMP_ROOT) and path.endswith(".png")) or _is_copyright(path))
    for name, sources in CLASSES.items():
        (folder / "cutouts" / name).mkdir(parents=True)
        for path in sorted(found):
            inner = path.removeprefix(STAMP_ROOT)
            if inner.startswith(sources) and not LEFT_OUT & {*Path(inner).parts, Path(inner).stem}:
                (folder / "cutouts" / name / Path(path).name).write_bytes(found[path])
    _credit(folder / "cutouts", [(stamps, "cut-outs", _copyright(stamps, found))])

    (folder / "backgrounds").mkdir()
    found = photos.files(lambda path: path.endswith("/explore_monuments.rcc") or _is_copyright(path))
    containers = [RccFile.parse(content, path) for path, content in found.items() if path.endswith(".rcc")]
    if len(containers) != 1:
        raise FetchError(f"{photos.name} {photos.version} holds {len(containers)} explore_monuments.rcc, expected 1")
    (monuments,) = containers
    readme = ""
    for path, node in sorted(monuments.members().items()):
        if path == f"{MONUMENTS}README":
            readme = monuments.read(node).decode("utf-8", "replace")
        elif path.startswith(MONUMENTS) and path.endswith((".webp", ".jpg")) and Path(path).stem not in NO_GROUND:
            (folder / "backgrounds" / f"monument_{Path(path).name}").write_bytes(monuments.read(node))
    credits = [(photos, "photos of monuments", readme or _copyright(photos, found))]
    found = scenes.files(lambda path: (path.endswith(".jpg") and Path(path).stem in NATURE) or _is_copyright(path))
    for path in sorted(found):
        if path.endswith(".jpg"):
            (folder / "backgrounds" / f"nature_{Path(path).name}").write_bytes(found[path])
    _credit(folder / "backgrounds", [*credits, (scenes, "photos of nature", _copyright(scenes, found))])
    listing = [{"name": p.name, "version": p.version, "digest": p.digest} for p in packages]
    (folder / "packages.json").write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")


def _is_copyright(path: str) -> bool:
    return path.startswith("usr/share/doc/") and path.endswith("/copyright")


def _copyright(package: Package, files: dict[str, bytes]) -> str:
    texts = [content.decode("utf-8", "replace") for path, content in files.items() if _is_copyright(path)]
    if not texts:
        raise FetchError(f"{package.name} {package.version} holds no copyright file")
    return "\n".join(texts)


def _credit(folder: Path, parts: Iterable[tuple[Package, str, str]]) -> None:
    sections = [
        f"{what} from the Debian package {package.name} {package.version}, which says:\n\n{text.strip()}\n"
        for package, what, text in parts
    ]
    (folder / "CREDITS.txt").write_text(f"\n{'-' * 80}\n\n".join(sections), encoding="utf-8")


def read_cutouts(folder: Path, skipped: Skipped) -> dict[str, list[Cutout]]:
    """Return the cut-outs of each class folder, by name; what cannot be used is added to ``skipped``.

    Pixels that are equal, mirrored or not, are one object and count once.

    Raises:
        SourceError: no such folder, no class folders, or a class name with a comma or a line break.
    """
    if not folder.is_dir():
        raise SourceError(f"--cutouts: {folder} is not a folder; expected one with class folders of RGBA PNGs")
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(classes) < 2:
        raise SourceError(f"--cutouts: {folder} holds {len(classes)} class folders, expected at least 2")
    found: dict[str, list[Cutout]] = {}
    seen: dict[str, str] = {}
    for entry in classes:
        if set(entry.name) & set(",\r\n"):
            raise SourceError(f"--cutouts: class {entry.name!r}: a name without comma and line break is expected")
        found[entry.name] = []
        for file in sorted(path for path in entry.rglob("*") if path.suffix.lower() == ".png"):
            name = f"{entry.name}/{file.relative_to(entry).with_suffix('').as_posix()}"
            cutout = _read_cutout(file, name)
            if isinstance(cutout, str):
                skipped.add(f"cutouts/{name}.png", cutout)
                continue
            twin = seen.setdefault(_digest(cutout.pixels), name)
            if twin != name:
                skipped.add(f"cutouts/{name}.png", f"the same picture as {twin}.png, or its mirror image")
                continue
            found[entry.name].append(cutout)
    return found


def _read_cutout(file: Path, name: str) -> Cutout | str:
    """Return a cut-out, or why it cannot be one."""
    try:
        with PIL.Image.open(io.BytesIO(file.read_bytes()), formats=["PNG"]) as image:
            if image.width * image.height > MAX_CUTOUT_PIXELS:
                return f"{image.width}x{image.height} pixels, at most {MAX_CUTOUT_PIXELS:,} are read"
            if "A" not in image.getbands() and "transparency" not in image.info:
                return f"no alpha channel (mode {image.mode})"
            pixels = np.array(image.convert("RGBA"))
    except (OSError, SyntaxError, ValueError, EOFError, PIL.Image.DecompressionBombError) as error:
        return f"cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    alpha = pixels[..., 3]
    area = int((alpha >= THRESHOLD).sum())
    if area == 0:
        return f"alpha is nowhere {THRESHOLD} or more, so there is no object"
    if area == alpha.size:
        return f"alpha is {THRESHOLD} or more everywhere, so nothing is cut out"
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    return Cutout(name, pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy(), area)


def _digest(pixels: NDArray[np.uint8]) -> str:
    """Return a digest that a picture and its mirror image share; the colour of what is transparent does not count."""
    seen = np.where(pixels[..., 3:] > 0, pixels, 0).astype(np.uint8)
    both = [hashlib.sha256(side.tobytes()).hexdigest() for side in (seen, seen[:, ::-1])]
    return f"{pixels.shape} {min(both)}"


def read_backgrounds(folder: Path, size: int, skipped: Skipped) -> list[Background]:
    """Return the photos below a folder whose shorter side has ``size`` pixels or more, reduced to 2.5 times that.

    Raises:
        SourceError: no such folder.
    """
    if not folder.is_dir():
        raise SourceError(f"--backgrounds: {folder} is not a folder; expected one with photos that show no object")
    found: list[Background] = []
    seen: dict[str, str] = {}
    for file in find_photos(folder)[0]:
        name = file.relative_to(folder).as_posix()
        try:
            photo = load_photo(file)
        except PhotoError as error:
            skipped.add(f"backgrounds/{name}", str(error).removeprefix(f"{file}: "))
            continue
        if min(photo.size) < size:
            skipped.add(
                f"backgrounds/{name}",
                f"{photo.width}x{photo.height} pixels, expected at least {size} on the shorter side",
            )
            continue
        scale = 2.5 * size / min(photo.size)
        if scale < 1:
            photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), reducing_gap=2)
        pixels = np.array(photo)
        twin = seen.setdefault(_digest(np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])), name)
        if twin == name:
            found.append(Background(name, pixels))
        else:
            skipped.add(f"backgrounds/{name}", f"the same picture as {twin}, or its mirror image")
    return found


def credits_of(folder: Path, what: str) -> str:
    """Return the CREDITS.txt of a folder, or a line that says there is none."""
    file = folder / "CREDITS.txt"
    if not file.is_file():
        return f"{what}: their folder holds no CREDITS.txt, so authors and licences are not known here.\n"
    return file.read_text(encoding="utf-8", errors="replace")
