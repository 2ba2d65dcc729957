"""For training_speed.py: how things take turns; molt's pass over photos and its heads beside bare ones."""

from __future__ import annotations

import itertools
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molt import create_model
from molt.benchmark.pipelines import without_hooks
from molt.data.annotations import LocalizationSet, Sample
from molt.methods.molt import MOLT
from molt.training import find_recipe, train
from molt.training.augment import AUGMENTATIONS, view
from molt.training.features import TYPES, FeatureStore, _pooled
from molt.training.run import Run

CLASSES = 10
STAGES = ("reading", "scales", "network", "attention", "pooling", "writing")


@dataclass(frozen=True)
class Setting:
    """How much is measured where.

    Attributes:
        folder: for files that come and go.
        rounds: turns after the warm-up.
        workers: processes that read photos, in the loops over live photos.
    """

    device: torch.device
    folder: Path
    rounds: int
    workers: int = 0

    def wait(self) -> None:
        """Wait until the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def clock(self, run: Callable[[], Any]) -> float:
        """Return the seconds that a call takes until the device is done."""
        self.wait()
        began = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - began

    def turns(self, runs: Mapping[str, Callable[[], Any]]) -> dict[str, list[Any]]:
        """Call each once to warm up, then in turns; return what they returned, by name."""
        for run in runs.values():
            run()
        found: dict[str, list[Any]] = {name: [] for name in runs}
        names = list(runs)
        for turn in range(self.rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                found[name].append(runs[name]())
        return found

    def autocast(self, precision: str) -> AbstractContextManager[Any]:
        """Return the context of a precision of :class:`molt.training.Recipe`."""
        return torch.autocast(self.device.type, TYPES.get(precision), enabled=precision in TYPES)


def make_photos(folder: Path, count: int, side: int = 336) -> Path:
    """Write class folders of JPEGs, smooth noise at quality 95, and return the folder."""
    rng = np.random.default_rng(0)
    classes = min(CLASSES, count)
    for number in range(count):
        small = PIL.Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        path = folder / f"class-{number % classes:02d}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize((side, side), PIL.Image.Resampling.BICUBIC).save(path, quality=95)
    return folder


def new_model(name: str, sizes: Sequence[int], classes: int = CLASSES, pooling: str = "attention") -> MOLT:
    """Return a MOLT with random weights, which cost as much as others."""
    torch.manual_seed(0)
    return create_model(name, classes, tuple(sizes), pretrained=False, pooling=pooling)


def middle(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def time_features(
    setting: Setting, samples: Sequence[Sample], *, name: str, sizes: Sequence[int], precision: str, batch: int
) -> dict[str, Any]:
    """Return a row on the pass that computes and keeps features of frozen backbones; times in seconds a photo."""
    model = new_model(name, sizes).eval().to(setting.device)
    model.freeze_backbones()
    backbones = [model.transformer(scale).backbone for scale in range(len(sizes))]
    nets = [without_hooks(backbone.model) for backbone in backbones]
    rows = list(range(len(samples)))
    cuts = [rows[first : first + batch] for first in range(0, len(rows), batch)]
    numbers = itertools.count()
    opened: list[float] = []

    @contextmanager
    def new_store() -> Iterator[FeatureStore]:
        room = setting.folder / f"features-{next(numbers)}"
        began = time.perf_counter()
        store = FeatureStore(model, room, samples, 1, AUGMENTATIONS["none"], precision)
        opened.append(time.perf_counter() - began)
        try:
            yield store
        finally:
            for cache in store.caches:
                cache.close()
            shutil.rmtree(room)

    def read(cut: Sequence[int]) -> Tensor:
        none = AUGMENTATIONS["none"]
        return torch.stack([view(samples[i].path, model.finest, none, seed=0, epoch=0, index=i) for i in cut])

    def scales(pixels: Tensor) -> list[Tensor]:
        return model.pyramid(pixels.to(setting.device))

    with torch.inference_mode():
        decoded = [scales(read(cut)) for cut in cuts]

    def whole() -> float:
        with new_store() as store:
            return setting.clock(lambda: store.fill(rows, batch=batch, device=setting.device))

    def forwards() -> None:
        for pyramid in decoded:
            for net, pixels in zip(nets, pyramid, strict=True):
                with setting.autocast(precision):
                    net.forward_features(pixels)

    @torch.inference_mode()
    def bare() -> float:
        return setting.clock(forwards)

    @torch.inference_mode()
    def stages() -> dict[str, float]:
        """One after the other, without threads, waiting for the device in between."""
        seconds = dict.fromkeys(STAGES, 0.0)
        kept: dict[str, Any] = {}

        def stage(which: str, run: Callable[[], Any]) -> None:
            seconds[which] += setting.clock(lambda: kept.update(now=run()))

        with new_store() as store:
            for cut in cuts:
                stage("reading", lambda cut=cut: read(cut))
                stage("scales", lambda: scales(kept["now"]))
                pyramid = kept["now"]
                for scale, pixels in enumerate(pyramid):
                    with setting.autocast(precision):
                        stage("network", lambda net=nets[scale], x=pixels: net.forward_features(x))
                        stage("attention", lambda b=backbones[scale], x=pixels: b.see(x))
                    stage("pooling", lambda: _pooled(kept["now"]))
                    stage("writing", lambda cache=store.caches[scale], cut=cut: cache.write(cut, kept["now"]))
        seconds["attention"] -= seconds["network"]
        return seconds

    found = setting.turns({"molt": whole, "bare": bare, "stages": stages})
    count = len(samples)
    molt, least = (middle(found[which]) / count for which in ("molt", "bare"))
    # Turn by turn, as a shared machine is slower at one time than at another.
    ratios = [ours / theirs for ours, theirs in zip(found["molt"], found["bare"], strict=True)]
    return {
        "model": name,
        "sizes": list(sizes),
        "precision": precision,
        "photos": count,
        "batch": batch,
        "rounds": setting.rounds,
        "molt_s": molt,
        "bare_s": least,
        "ratio": middle(ratios),
        "ratios": ratios,
        "stages_s": {which: middle([one[which] for one in found["stages"]]) / count for which in STAGES},
        "open_s": middle(opened),
    }


def time_heads(
    setting: Setting, *, name: str, sizes: Sequence[int], epochs: int | None, photos: int
) -> list[dict[str, Any]]:
    """Return rows on training heads on kept features, random ones: photos/s over all epochs.

    No photos are held out. The network counts as one of a package, whose backbones are not saved again.
    """
    recipe = find_recipe("default").change(model=name, sizes=tuple((side, side) for side in sizes))
    recipe = recipe if epochs is None else recipe.change(epochs=epochs)
    classes = min(CLASSES, photos)
    model = new_model(name, sizes, classes, recipe.pooling)
    model.weights = tuple(replace(info, source="package none 1") for info in model.weights)
    boxes = np.zeros((0, 4))
    samples = tuple(Sample(f"{i}.jpg", setting.folder / f"{i}.jpg", i % classes, boxes) for i in range(photos))
    data = LocalizationSet("random features", "folder", samples, tuple(f"class {i}" for i in range(classes)))
    model.reconfigure(class_names=data.classes)
    width = int(model.transformer(0).backbone.model.num_features)
    generator = torch.Generator().manual_seed(0)
    cache = setting.folder / "kept"
    store = FeatureStore(model, cache, samples, recipe.views, AUGMENTATIONS[recipe.augment], recipe.precision)
    rows = list(range(photos * recipe.views))
    for one in store.caches:
        shapes = {"mean": 9 * width, "attention": 9 * width, "class_token": width}
        one.write(rows, {key: torch.randn(len(rows), size, generator=generator) for key, size in shapes.items()})
    inputs = [values.to(setting.device) for values in store.read(rows)]
    labels = torch.tensor([sample.label for sample in samples], device=setting.device)
    numbers = itertools.count()

    def ours(saving: bool) -> dict[str, float]:
        out = setting.folder / f"heads-{next(numbers)}"

        def not_saved(run: Run, entry: dict[str, Any]) -> None:
            run.best = {"epoch": entry["epoch"], "score": None}

        began = time.perf_counter()
        with patch.object(Run, "_save_epoch", Run._save_epoch if saving else not_saved):
            done = train(
                data, out, recipe=recipe, model=model, val_share=0.0, cache=cache, device=setting.device.type, workers=0
            )
        call = time.perf_counter() - began
        shutil.rmtree(out, ignore_errors=True)
        return {"loop": done.seconds, "call": call}

    def bare() -> dict[str, float]:
        heads = nn.ModuleList(nn.Linear(9 * width, classes) for _ in inputs).to(setting.device)
        optimizer = torch.optim.AdamW(heads.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
        plan = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * -(-photos // recipe.batch))

        def run() -> None:
            for _ in range(recipe.epochs):
                order = torch.randperm(photos)
                rows = order * recipe.views + torch.randint(recipe.views, (photos,))
                order, rows = order.to(setting.device), rows.to(setting.device)
                total = torch.zeros((), device=setting.device)
                for first in range(0, photos, recipe.batch):
                    part = slice(first, first + recipe.batch)
                    logits = [head(values[rows[part]]) for head, values in zip(heads, inputs, strict=True)]
                    loss = torch.stack([F.cross_entropy(one, labels[order[part]]) for one in logits]).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    plan.step()
                    total += loss.detach()
                float(total)

        seconds = setting.clock(run)
        return {"loop": seconds, "call": seconds}

    providers: dict[str, Callable[[], dict[str, float]]] = {
        "molt": lambda: ours(True),
        "molt, nothing saved": lambda: ours(False),
        "bare loop": bare,
    }
    found = setting.turns(providers)
    least = middle([one["loop"] for one in found["bare loop"]])
    made = []
    for provider, values in found.items():
        loop = middle([one["loop"] for one in values])
        made.append(
            {
                "provider": provider,
                "model": name,
                "sizes": list(sizes),
                "photos": photos,
                "epochs": recipe.epochs,
                "batch": recipe.batch,
                "loop_s": loop,
                "call_s": middle([one["call"] for one in values]),
                "photos_per_s": photos * recipe.epochs / loop,
                "ratio": least / loop,
            }
        )
    shutil.rmtree(cache)
    return made
