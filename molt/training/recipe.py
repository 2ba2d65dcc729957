"""How a MOLT is built and trained: every number of it in one place, and recipes by name."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from molt._arguments import check_int, check_number
from molt._files import user_path
from molt.methods.registry import SIZES
from molt.methods.transformer import HEADS, POOLINGS

SCHEDULES = ("cosine", "constant", "steps")
PRECISIONS = ("no", "bf16", "fp16")
LOSS_ON = ("scales", "fused")
BEST = ("loss", "accuracy")
LARGEST_FILE = 16 * 2**20  # bytes; a run.json has an entry an epoch


@dataclass(frozen=True)
class Recipe:
    """A network's options and its training; plain values, so that it can be kept as JSON.

    Attributes:
        name: what it is called.
        model: one of :func:`molt.list_models`.
        sizes: (H, W) in pixels of each scale.
        shared: whether one network serves all scales.
        head: see :func:`molt.create_model`, as for pooling and clip.
        pooling: of the patch head.
        clip: whether maps take negative responses for 0.
        freeze: whether only the heads are trained; the backbones' features are then computed once a photo and view.
        epochs: passes over the photos.
        batch: photos of an optimizer step, all processes together.
        lr: peak learning rate of heads (and of a spatial token), for AdamW.
        backbone_lr: of the backbones; None takes ``lr``.
        weight_decay: of matrices and kernels; biases, norms and tokens have none.
        schedule: ``"cosine"`` to ``final_lr``, ``"constant"``, or ``"steps"``: times 0.1 before each epoch, counted
            from 1, that one of ``milestones`` divides.
        milestones: of ``"steps"``.
        warmup: epochs in which the rate rises linearly from 0.
        final_lr: share of the peak that the cosine ends at.
        drop_path: stochastic depth of the last block; it rises linearly from 0.
        label_smoothing: of the cross-entropy, 0 to 1.
        loss_on: ``"scales"``: the mean of each scale's cross-entropy, so that every scale learns alone; ``"fused"``:
            that of the mean logits.
        spatial_weight: of the two terms on a spatial token's masks.
        augment: name of an augmentation, see :mod:`molt.training.augment`.
        views: of each photo where features are computed once; the first is the photo as it is.
        clip_grad: largest norm of the gradient, or None.
        precision: ``"no"`` (float32), ``"bf16"`` or ``"fp16"`` mixed.
        best: what of the photos held out picks the best epoch: their ``"loss"`` or ``"accuracy"``. Boxes never do.

    Raises:
        TypeError, ValueError: a field of another type or out of range.
    """

    name: str = "default"
    model: str = "molt_dinov2_small"
    sizes: tuple[tuple[int, int], ...] = tuple((side, side) for side in SIZES)
    shared: bool = False
    head: str = "patches"
    pooling: str = "attention"
    clip: bool = True
    freeze: bool = True
    epochs: int = 10
    batch: int = 64
    lr: float = 1e-3
    backbone_lr: float | None = None
    weight_decay: float = 0.05
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    warmup: float = 0.0
    final_lr: float = 0.0
    drop_path: float = 0.0
    label_smoothing: float = 0.0
    loss_on: str = "scales"
    spatial_weight: float = 1.0
    augment: str = "none"
    views: int = 1
    clip_grad: float | None = None
    precision: str = "no"
    best: str = "loss"

    def __post_init__(self) -> None:
        """Check every field, as a file from elsewhere may hold anything."""
        for name in ("name", "model", "augment"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be text, got {getattr(self, name)!r:.100}")
        if not self.name.isprintable():
            raise ValueError(f"name must be printable text of one line, got {self.name!r:.100}")
        if not isinstance(self.sizes, tuple) or not self.sizes:
            raise TypeError(f"sizes must be a tuple of (H, W) pairs, got {self.sizes!r:.100}")
        for size in self.sizes:
            if not isinstance(size, tuple) or len(size) != 2:
                raise TypeError(f"sizes must be a tuple of (H, W) pairs, got {size!r:.100} in it")
            for side in size:
                check_int("sizes", side, 1)
        for name in ("shared", "clip", "freeze"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r:.100}")
        for name in ("epochs", "batch", "views"):
            check_int(name, getattr(self, name), 1, 1_000_000)
        check_number("lr", self.lr, above=0)
        if self.backbone_lr is not None:
            check_number("backbone_lr", self.backbone_lr)
        if self.clip_grad is not None:
            check_number("clip_grad", self.clip_grad, above=0)
        for name in ("weight_decay", "warmup", "spatial_weight"):
            check_number(name, getattr(self, name))
        for name in ("final_lr", "drop_path", "label_smoothing"):
            if check_number(name, getattr(self, name)) > 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name, options in (
            ("head", HEADS),
            ("pooling", POOLINGS),
            ("schedule", SCHEDULES),
            ("loss_on", LOSS_ON),
            ("precision", PRECISIONS),
            ("best", BEST),
        ):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}, got {getattr(self, name)!r:.100}")
        if self.warmup > self.epochs:
            raise ValueError(f"warmup must be at most epochs, {self.epochs}, got {self.warmup}")
        if not isinstance(self.milestones, tuple):
            raise TypeError(f"milestones must be a tuple, got {self.milestones!r:.100}")
        if (self.schedule == "steps") != bool(self.milestones):
            raise ValueError(
                f"milestones go with schedule 'steps', got {self.milestones!r:.100} with {self.schedule!r}"
            )
        if self.freeze and self.backbone_lr is not None:
            raise ValueError(f"backbone_lr does not apply to frozen backbones, got {self.backbone_lr}")
        for milestone in self.milestones:
            check_int("milestones", milestone, 1)

    def rate(self, progress: float, epoch: int) -> float:
        """Return the share of the peak learning rate at a moment.

        Args:
            progress: epochs done so far, whole and part.
            epoch: the one under way, from 0.
        """
        import math

        if progress < self.warmup:
            return progress / self.warmup
        if self.schedule == "cosine":
            done = (progress - self.warmup) / max(self.epochs - self.warmup, 1e-9)
            return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        if self.schedule == "steps":
            # Of the published code: every listed number counts, at each of its multiples.
            begun = range(1, epoch + 2)
            return float(0.1 ** sum(1 for e in begun if any(e % step == 0 for step in self.milestones)))
        return 1.0

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain values; :meth:`from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> Recipe:
        """Build a recipe from what :meth:`to_json` returned, perhaps by way of a file.

        Raises:
            TypeError, ValueError: no such thing, or a field that does not hold.
        """
        if not isinstance(values, dict):
            raise TypeError(f"a recipe must be an object, got {values!r:.100}")
        if unknown := set(values) - {field.name for field in fields(cls)}:
            named = ", ".join(sorted(key if str(key).isprintable() else ascii(key) for key in unknown))
            raise ValueError(f"a recipe has no {named:.100}")
        return cls(**{key: _tuples(value) for key, value in values.items()})

    def change(self, **changes: Any) -> Recipe:
        """Return the recipe with some fields changed."""
        if unknown := set(changes) - {field.name for field in fields(self)}:
            raise TypeError(f"a recipe has no {', '.join(sorted(unknown))}")
        return replace(self, **changes)


_TS_CAM = Recipe(
    name="ts-cam",
    model="molt_deit_small",
    sizes=((224, 224),),
    pooling="mean",
    clip=False,
    freeze=False,
    epochs=60,
    batch=128,
    lr=5e-5,
    schedule="steps",
    milestones=(30,),
    drop_path=0.1,
    augment="ts-cam",
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(),
        Recipe(
            name="fine-tune",
            freeze=False,
            epochs=20,
            lr=1e-3,
            backbone_lr=2e-5,
            warmup=1.0,
            final_lr=0.01,
            drop_path=0.1,
            augment="crop",
            clip_grad=1.0,
        ),
        _TS_CAM,
        _TS_CAM.change(name="ts-cam-ilsvrc", epochs=20, batch=256, lr=5e-4, milestones=(10, 12)),
        _TS_CAM.change(
            name="sat",
            head="spatial",
            epochs=1,
            batch=512,
            lr=1.5e-5,
            schedule="cosine",
            milestones=(),
            final_lr=1e-6 / 1.5e-5,
        ),
    )
}
"""Recipes by name: ``default`` and ``fine-tune`` are our choice; ``ts-cam`` (for CUB-200-2011) and ``ts-cam-ilsvrc``
train as TS-CAM's code does (ICCV 2021), ``sat`` as SAT's (ICCV 2023)."""


def find_recipe(recipe: Recipe | str) -> Recipe:
    """Return a recipe, by name or as it is.

    Raises:
        TypeError, ValueError: neither a recipe nor the name of one.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    return RECIPES[recipe]


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a JSON file: what :meth:`Recipe.to_json` returned, or the run.json of a run.

    Fields that are not there have the values of the recipe ``default``; the name is then that of the file.

    Raises:
        ValueError: no recipe; the file and the field are named.
        OSError: the file cannot be read.
    """
    path = user_path(path)
    with path.open("rb") as file:
        data = file.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise ValueError(f"{path}: a recipe has at most {LARGEST_FILE:,} bytes")
    try:
        values = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a recipe as JSON: {error}") from None
    if isinstance(values, dict) and "recipe" in values:
        values = values["recipe"]
    try:
        return Recipe.from_json({"name": path.stem} | values if isinstance(values, dict) else values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    except (OverflowError, RecursionError):
        raise ValueError(f"{path}: a value is too large for a recipe") from None


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
