"""What a run is made of before its first step: photos and classes, network, optimizer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from molt._arguments import check_number
from molt._words import count
from molt.data.annotations import LocalizationSet, Sample
from molt.methods.molt import MOLT
from molt.methods.registry import create_model
from molt.methods.transformer import ObjectLocalizationTransformer
from molt.training.holdout import check_classes, hold_out
from molt.training.recipe import Recipe

UNDECAYED = ("cls_token", "pos_embed", "reg_token", "dist_token", "spatial_token")


@dataclass(frozen=True, eq=False)
class LabelledPhotos:
    """The photos of a run.

    Attributes:
        samples: all of them; those of a validation set of its own come last.
        train: places in ``samples`` to learn from.
        held: places that pick the best epoch.
        classes: names by label.
        digest: a hash of names, labels, sizes in bytes and places.
    """

    samples: tuple[Sample, ...]
    train: tuple[int, ...]
    held: tuple[int, ...]
    classes: tuple[str, ...]
    digest: str


def gather_photos(
    data: LocalizationSet | Sequence[LocalizationSet],
    val: LocalizationSet | Sequence[LocalizationSet] | None,
    val_share: float,
    seed: int,
) -> LabelledPhotos:
    """Join sets of the same classes and hold photos out of them, or take those of ``val``; boxes are not looked at.

    Raises:
        TypeError, ValueError: no sets, sets of other classes, labels without a class, a photo of a class that is
            in two sets of ``data`` or in ``val`` too, or too few photos to learn from.
    """
    sets = _sets("data", data)
    held_sets = [] if val is None else _sets("val", val)
    if check_number("val_share", val_share) >= 1:
        raise ValueError(f"val_share must be in [0, 1), got {val_share}")
    classes = sets[0].classes
    for one in [*sets[1:], *held_sets]:
        if one.classes != classes:
            differ = "got another order"
            for some, rest, name in ((one.classes, classes, one.name), (classes, one.classes, sets[0].name)):
                if odd := sorted(set(some) - set(rest)):
                    differ = f"{', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''} is in {name} alone"
            raise ValueError(f"{one.name} and {sets[0].name} must have the same classes: {differ}")
    samples = [sample for one in sets for sample in one.samples]
    check_classes([sample.label for sample in samples], classes)
    files = _files(samples)
    _check_apart(sets, files)
    if val is None:
        train, held = hold_out([sample.label for sample in samples], val_share, seed, photos=files)
    else:
        others = [sample for one in held_sets for sample in one.samples]
        train, held = list(range(len(samples))), list(range(len(samples), len(samples) + len(others)))
        samples += others
        files += _files(others)
        wrong = [sample.name for sample in others if not 0 <= sample.label < len(classes)]
        if wrong:
            raise ValueError(
                f"val: {count(len(wrong), 'photo has', 'photos have')} a label of no class, such as {wrong[0]}"
            )
    both = {files[i] for i in train} & {files[i] for i in held}
    if both:
        shared = count(len(both), "photo is", "photos are")
        raise ValueError(f"val: {shared} in data too, such as {min(both)}: they would not be held out")
    known = [(sample.name, sample.label, _bytes(sample.path)) for sample in samples]
    text = json.dumps([known, list(train), list(held), list(classes)])
    return LabelledPhotos(
        tuple(samples), tuple(train), tuple(held), tuple(classes), hashlib.sha256(text.encode()).hexdigest()[:16]
    )


def _check_apart(sets: Sequence[LocalizationSet], files: Sequence[str]) -> None:
    """Stop where two sets hold the same photo of the same class: it would count twice, and could not be held out."""
    seen: set[tuple[str, int]] = set()
    twice: set[tuple[str, int]] = set()
    rest = iter(files)
    for one in sets:
        own = {(next(rest), sample.label) for sample in one.samples}
        twice |= own & seen
        seen |= own
    if twice:
        number = count(len(twice), "photo is", "photos are")
        raise ValueError(f"data: {number} in two of its sets, such as {min(twice)[0]}: take each once")


def _files(samples: Sequence[Sample]) -> list[str]:
    """Return each photo's file, the same by whatever path it is given."""
    return [os.path.realpath(sample.path) for sample in samples]


def _bytes(path: Path) -> int:
    """Return a file's size, -1 where there is none."""
    return path.stat().st_size if path.is_file() else -1


def _sets(name: str, given: Any) -> list[LocalizationSet]:
    sets = [given] if isinstance(given, LocalizationSet) else list(given) if isinstance(given, list | tuple) else []
    if not sets or not all(isinstance(one, LocalizationSet) for one in sets):
        raise TypeError(f"{name} must be one or more LocalizationSets (molt.data.read_set), got {given!r:.80}")
    return sets


def build_model(recipe: Recipe, classes: Sequence[str], seed: int, source: str, pretrained: bool) -> MOLT:
    """Return a new MOLT as the recipe has it; its heads depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create_model(
            recipe.model,
            len(classes),
            recipe.sizes,
            recipe.shared,
            pretrained,
            head=recipe.head,
            pooling=recipe.pooling,
            clip=recipe.clip,
            class_names=classes,
            source=source,
        )


def check_model(model: MOLT, classes: Sequence[str]) -> None:
    """Hold the classes of a model that is to be trained further to those of the photos.

    Raises:
        ValueError: others.
    """
    own = model.class_names if model.config.class_names is not None else None
    if model.config.num_classes != len(classes):
        raise ValueError(
            f"model has {count(model.config.num_classes, 'class')}{_few(own)}, "
            f"the photos have {len(classes)}{_few(classes)}: a model is trained further on its own classes alone"
        )
    if own is not None and tuple(own) != tuple(classes):
        first = next(i for i, pair in enumerate(zip(own, classes, strict=True)) if pair[0] != pair[1])
        raise ValueError(f"model's class {first} is {own[first]!r}, that of the photos {classes[first]!r}")


def take_over(model: MOLT, classes: Sequence[str]) -> MOLT:
    """Bring a model that is to be trained further to float32, and name its classes where it has no names; return it.

    Weights that were rounded to fewer bits are no longer those of their source, and are marked so: files of the model
    must hold them.
    """
    dtypes = {value.dtype for value in model.parameters()}
    if dtypes != {torch.float32}:
        trained = model.trained
        model.float().mark_trained(trained)
    if low := [str(dtype).removeprefix("torch.") for dtype in dtypes if dtype.itemsize < 4]:
        model.weights = tuple(
            replace(info, source=f"{min(low)} of {info.source}", measured=False)
            if info.source.startswith(("package ", "hub "))
            else info
            for info in model.weights
        )
    return model if model.config.class_names is not None else model.reconfigure(class_names=tuple(classes))


def _few(names: Sequence[str] | None) -> str:
    return f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else ""


def networks(model: MOLT) -> list[ObjectLocalizationTransformer]:
    """Return a model's transformers, a shared one once."""
    return list(dict.fromkeys(model.transformer(scale) for scale in range(len(model.config.sizes))))


def set_drop_path(model: MOLT, rate: float) -> None:
    """Give every backbone stochastic depth that rises linearly to ``rate`` at its last block."""
    for transformer in networks(model):
        blocks = list(transformer.backbone.model.blocks)
        for place, block in enumerate(blocks):
            own = rate * place / max(1, len(blocks) - 1)
            for name in ("drop_path1", "drop_path2"):
                if hasattr(block, name):
                    setattr(block, name, DropPath(own) if own > 0 else nn.Identity())


def build_optimizer(model: MOLT, recipe: Recipe) -> torch.optim.Optimizer:
    """Return AdamW over what is trained; each group's ``peak`` is its highest learning rate."""
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            decayed = value.ndim > 1 and name.rsplit(".", 1)[-1] not in UNDECAYED
            groups.setdefault((".backbone." in name, decayed), []).append(value)
    backbone = recipe.lr if recipe.backbone_lr is None else recipe.backbone_lr
    given: list[dict[str, Any]] = [
        {
            "params": values,
            "lr": backbone if inside else recipe.lr,
            "peak": backbone if inside else recipe.lr,
            "weight_decay": recipe.weight_decay if decayed else 0.0,
        }
        for (inside, decayed), values in groups.items()
    ]
    return torch.optim.AdamW(given)
