"""Make docs/method/*.jpg, the pictures of docs/method.md: train a small head, then draw every stage of one photo.

    python docs/make_method_pictures.py [--cutouts DIR] [--backgrounds DIR] [--checkpoint FILE] [--out DIR]

No trained head of the paper's method is published, so this trains one on composites: a cut-out pasted on a photo
without objects or on a smooth field of colours. The only label is the group of the cut-out: bird, mammal and so on.
The backbone stays as it is, so what the loss needs of a composite is computed once.

Cut-outs and backgrounds come from the Debian packages tuxpaint-stamps-default and mate-backgrounds, which are
downloaded and unpacked, not installed: that needs apt-get and dpkg-deb, and once `apt-get update`. Folders with what
these packages hold do as well. About ten minutes on two CPU cores; every random choice is seeded.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

import molt
from molt import ops
from molt.clustering import DeepClustering, Slic
from molt.data.images import read_photo
from molt.data.samples import sample_photos
from molt.localizer import Explanation
from molt.overlay import cluster_overlay, draw_boxes, heat_overlay

MODEL, SIZES, SIDE = "molt_dinov2_small", (224, 336, 448), 448
STAMPS, SCENES = "tuxpaint-stamps-default", "mate-backgrounds"

# Class name -> folders of the stamps package with cut-outs of photos.
GROUPS = {
    "bird": ("animals/birds",),
    "mammal": ("animals/mammals", "animals/marsupials"),
    "fish": ("animals/fish",),
    "fruit": ("food/fruit",),
    "vegetable": ("food/vegetables",),
    "flower": ("plants/flowers",),
    "tool": ("household/tools", "hobbies/music"),
}
# Drawings and toys, mirrored twins, and what is in the wrong group.
LEFT_OUT = {"cartoon", "toys", "plastic", "hedgehog", "echidna", "measuring_tape_mirror", "lobster", "shrimp"}
# Photos that show no single object.
GROUNDS = ("Aqua", "Blinds", "Dune", "GreenMeadow", "RainDrops", "Storm", "Wood")

WIDTH, QUALITY = 320, 80


@dataclass(frozen=True)
class Composite:
    """A cut-out on a background: picture, place of its class in GROUPS, and box xyxy in pixels."""

    picture: PIL.Image.Image
    label: int
    box: tuple[int, int, int, int]


def unpack(package: str, folder: Path) -> Path:
    """Download a Debian package, unpack it into ``folder`` and return that."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is needed: run this on Debian or Ubuntu, or in a container of theirs")
    folder.mkdir(parents=True)
    if subprocess.run(["apt-get", "-q", "download", package], cwd=folder, check=False).returncode != 0:
        raise SystemExit(f"{package} could not be downloaded: run `apt-get update` first, or give its folder")
    (file,) = folder.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", file.name, "."], cwd=folder, check=True)
    file.unlink()
    return folder


def find_cutouts(folder: Path) -> list[list[Path]]:
    """Return the cut-outs of each class, found anywhere below ``folder``, in the order of their names."""
    roots = [path.parent for path in sorted(folder.rglob("animals")) if (path.parent / "plants").is_dir()]
    if not roots:
        raise SystemExit(f"{folder} holds no cut-outs: it needs the folders animals, food, plants... of {STAMPS}")
    found = []
    for places in GROUPS.values():
        files = [file for place in places for file in sorted((roots[0] / place).rglob("*.png"))]
        found.append([file for file in files if not LEFT_OUT & {*file.parts, file.stem}])
    return found


def find_grounds(folder: Path) -> list[PIL.Image.Image]:
    """Return the photos without objects found below ``folder``, at most 1280 px a side."""
    photos = []
    for file in sorted(folder.rglob("*.jpg")):
        if file.stem in GROUNDS:
            with PIL.Image.open(file) as image:
                photo = image.convert("RGB")
            photo.thumbnail((1280, 1280))
            photos.append(photo)
    return photos


def background(photos: Sequence[PIL.Image.Image], rng: np.random.Generator) -> PIL.Image.Image:
    """Return a square crop of a random photo, or in half of the cases a smooth field of random colours."""
    if photos and rng.random() < 0.5:
        photo = photos[rng.integers(len(photos))]
        side = round(min(photo.size) * rng.uniform(0.4, 1))
        x, y = (int(rng.integers(length - side + 1)) for length in photo.size)
        crop = photo.resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC, (x, y, x + side, y + side))
        return PIL.ImageEnhance.Color(crop).enhance(rng.uniform(0.2, 1.2))
    cells = int(rng.integers(2, 5))
    colours = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    field = PIL.Image.fromarray(colours).resize((SIDE, SIDE), PIL.Image.Resampling.BICUBIC)
    field = PIL.ImageEnhance.Color(field).enhance(rng.uniform(0.1, 0.6))
    grain = rng.normal(0, rng.uniform(0, 12), (SIDE, SIDE, 1))
    return PIL.Image.fromarray((np.asarray(field) + grain).clip(0, 255).astype(np.uint8))


def paste(file: Path, ground: PIL.Image.Image, rng: np.random.Generator) -> tuple[PIL.Image.Image, tuple[int, ...]]:
    """Return the background with a cut-out at a random size and place, and the cut-out's box."""
    with PIL.Image.open(file) as image:
        stamp = image.convert("RGBA")
    stamp = stamp.crop(stamp.getchannel("A").point(lambda a: 255 * (a > 127)).getbbox())
    if rng.random() < 0.5:
        stamp = stamp.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.3:  # fruit and vegetables are small pictures, and blur must not give the class away
        stamp.thumbnail((64, 64))
    scale = SIDE * rng.uniform(0.5, 1.1) / max(stamp.size)
    stamp = stamp.resize([max(1, round(side * scale)) for side in stamp.size], PIL.Image.Resampling.BICUBIC)
    x, y = (round(rng.uniform(min(0, SIDE - side), max(0, SIDE - side))) for side in stamp.size)
    picture = ground.copy()
    picture.paste(stamp, (x, y), stamp)
    return picture, (max(x, 0), max(y, 0), min(x + stamp.width, SIDE), min(y + stamp.height, SIDE))


def compose(
    cutouts: Sequence[Sequence[Path]], photos: Sequence[PIL.Image.Image], number: int, rng: np.random.Generator
) -> Iterator[Composite]:
    """Yield ``number`` composites, the classes in turn and within a class the cut-outs in a shuffled turn."""
    turns = [[files[i] for i in rng.permutation(len(files))] for files in cutouts]
    for i in range(number):
        label = i % len(turns)
        files = turns[label]
        picture, box = paste(files[i // len(turns) % len(files)], background(photos, rng), rng)
        yield Composite(picture, label, box)  # type: ignore[arg-type]


@torch.inference_mode()
def windows(model: molt.MOLT, picture: PIL.Image.Image) -> Tensor:
    """Return (scales, 9 D): the mean over the patches of the 3x3 window around each, which is all the head needs.

    The mean of a convolution is a linear map of this mean, so the patches themselves need not be kept.
    """
    pixels = read_photo(picture, (SIDE, SIDE)).pixels[None]
    means = []
    for scale, resized in enumerate(model.pyramid(pixels)):
        seen = model.transformer(scale).see(resized, attention=False)
        means.append(F.unfold(seen.as_map(), 3, padding=1).mean(-1)[0])
    return torch.stack(means)


def train(model: molt.MOLT, means: Tensor, labels: Tensor, steps: int, console: Console) -> float:
    """Train the shared head on the cross-entropy of each scale's logits; return the last batch's loss.

    Args:
        model: with one head for all scales.
        means: (composites, scales, 9 D) of :func:`windows`.
        labels: (composites,) int64.
        steps: of AdamW, at a rate that falls to zero along half a cosine.
        console: for the progress bar.
    """
    head = model.transformer(0).head
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    loss = torch.zeros(())
    for _ in track(range(steps), description="training the head", console=console):
        batch = torch.randint(len(means), (64,), generator=generator)
        logits = F.linear(means[batch], head.weight.flatten(1), head.bias)
        loss = F.cross_entropy(logits.flatten(0, 1), labels[batch].repeat_interleave(means.shape[1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


def check(loc: molt.Localizer, composites: Sequence[Composite], console: Console) -> dict[str, float]:
    """Return the accuracy on composites, and the mean IoU of the true class's box before and after refinement."""
    right, before, after = [], [], []
    names = loc.method.class_names
    for composite in track(composites, description="held-out composites", console=console):
        stages = loc.explain(composite.picture)
        right.append(stages.result.classes.tolist()[:1] == [composite.label])
        if not right[-1]:
            stages = loc.explain(composite.picture, classes=names[composite.label])
        fused = ops.upsample_normalize(stages.fused[None, None], stages.fused.shape)
        for maps, ious in ((fused, before), (stages.refined[None, None], after)):
            found = ops.component_boxes(maps, loc.threshold, largest=True).boxes
            ious.append(iou(found[0].tolist(), composite.box) if len(found) else 0.0)
    return {
        "accuracy": float(np.mean(right)),
        "mean IoU, fused map": float(np.mean(before)),
        "mean IoU, refined map": float(np.mean(after)),
    }


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the intersection over union of two boxes xyxy."""
    across, down = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return across * down / (areas - across * down)


def pictures(stages: Explanation, pixels: Tensor) -> Iterator[tuple[str, PIL.Image.Image]]:
    """Yield name and picture of each stage.

    Args:
        stages: what ``Localizer.explain`` returned.
        pixels: (1, 3, H, W) the photo as the clusterer was shown it.
    """
    photo = stages.photo.resize((WIDTH, round(WIDTH * stages.photo.height / stages.photo.width)))
    yield "photo", photo
    if stages.attention is not None:
        yield "attention", heat_overlay(photo, stages.attention)
    yield "class-map", heat_overlay(photo, stages.cam)
    for (height, _), values in stages.scale_maps:
        yield f"cam-{height}", heat_overlay(photo, values)
    yield "fused", heat_overlay(photo, stages.fused)
    deep = DeepClustering()
    superpixels = Slic(deep.num_segments, compactness=deep.compactness, working_size=deep.working_size)
    yield "superpixels", cluster_overlay(photo, superpixels(pixels)[0][0])
    yield "clusters", cluster_overlay(photo, stages.clusters)
    continuity = DeepClustering("published", channels=32, steps=40, num_segments=0, continuity=1, working_size=112)
    yield "clusters-continuity", cluster_overlay(photo, continuity(pixels)[0][0])
    yield "refined", heat_overlay(photo, stages.refined)
    result = stages.result
    yield "box", draw_boxes(photo, result.boxes, result.names, None, result.size)


def main() -> None:
    """Fetch, train, check and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cutouts", type=Path, help=f"folder with the cut-outs of {STAMPS}; downloaded if not given")
    parser.add_argument("--backgrounds", type=Path, help=f"folder with the photos of {SCENES}; downloaded likewise")
    parser.add_argument("--checkpoint", type=Path, help="keep the trained head here; a file that exists is used as is")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("method"), help="folder of the pictures")
    parser.add_argument("--photo", type=Path, help="the photo to draw; default: scikit-image's cat")
    parser.add_argument("--class", dest="wanted", default="mammal", help="the class to look for in it")
    parser.add_argument("--composites", type=int, default=350, help="to train on")
    parser.add_argument("--held-out", type=int, default=70, help="to check on")
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    console, start = Console(), time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        cutouts = find_cutouts(arguments.cutouts or unpack(STAMPS, Path(scratch, "stamps")))
        grounds = find_grounds(arguments.backgrounds or unpack(SCENES, Path(scratch, "scenes")))
        console.print(", ".join(f"{len(c)} x {n}" for n, c in zip(GROUPS, cutouts, strict=True)) + " cut-outs")
        rng = np.random.default_rng(0)
        kept = [[file for i, file in enumerate(files) if i % 5 != 2] for files in cutouts]
        rest = [[file for i, file in enumerate(files) if i % 5 == 2] for files in cutouts]
        shown = list(compose(kept, grounds, arguments.composites, rng))
        unseen = list(compose(rest, grounds, arguments.held_out, rng))
        path = arguments.checkpoint or Path(scratch, "head.safetensors")
        if not path.is_file():
            torch.manual_seed(0)
            model = molt.create_model(MODEL, len(GROUPS), SIZES, shared=True, class_names=list(GROUPS))
            model.freeze_backbones()
            means = [windows(model, c.picture) for c in track(shown, description="composites", console=console)]
            labels = torch.tensor([composite.label for composite in shown])
            loss = train(model, torch.stack(means), labels, arguments.steps, console)
            console.print(f"loss {loss:.3f}; the head goes to {path}")
            model.save(path, backbones=False)
        loc = molt.Localizer(MODEL, checkpoint=path)
    for name, value in check(loc, unseen, console).items():
        console.print(f"{name}: {value:.2f}, on {len(unseen)} composites of cut-outs not used in training")

    photo = arguments.photo or sample_photos()[0].path
    stages = loc.explain(photo, classes=arguments.wanted)
    console.print(stages.result, f"probability {stages.class_probability:.2f}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures(stages, read_photo(photo, loc.method.size).pixels[None]):
        file = arguments.out / f"{name}.jpg"
        picture.save(file, quality=QUALITY, optimize=True)
        console.print(f"{file}: {file.stat().st_size / 1000:.0f} kB")
    console.print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
