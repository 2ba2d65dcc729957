"""Training a MOLT on image labels: on one CPU, one GPU or many processes, resumable to the bit."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from molt._arguments import LARGEST_SEED, check_device, check_int, check_number
from molt._files import alone_in, check_readable_later, check_writable, user_path
from molt.data.annotations import LocalizationSet
from molt.methods.molt import MOLT
from molt.training.augment import find_augmentation
from molt.training.checkpoints import TrainingError
from molt.training.features import shared_folder
from molt.training.recipe import Recipe, find_recipe
from molt.training.run import Event, Run
from molt.training.run_files import BEST, LAST, RUN, STATE
from molt.training.setup import build_model, check_model, gather_photos, take_over

SCALARS = ("loss", "accuracy", "val_loss", "val_accuracy", "rate", "photos_per_second")


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        folder: of its files.
        best: the model of the epoch that did best on the photos held out; the last one where none are.
        last: the model of the last epoch. :func:`molt.load_model` and ``Localizer(checkpoint=)`` read both.
        best_epoch: counted from 1.
        history: one entry an epoch: loss, accuracy, val_loss, val_accuracy, rate, seconds, photos_per_second.
        skipped: name and reason of photos that could not be read.
        feature_seconds: what computing features took, all calls together that left a state.
        seconds: what the training itself took, all calls together.
    """

    folder: Path
    best: Path
    last: Path
    best_epoch: int
    history: list[dict[str, Any]]
    skipped: list[tuple[str, str]]
    feature_seconds: float
    seconds: float


def train(
    data: LocalizationSet | Sequence[LocalizationSet],
    out: str | Path,
    *,
    recipe: Recipe | str = "default",
    model: MOLT | None = None,
    val: LocalizationSet | Sequence[LocalizationSet] | None = None,
    val_share: float = 0.1,
    cache: str | Path | None = "auto",
    micro: int | None = None,
    workers: int = 0,
    device: str | None = None,
    seed: int = 0,
    resume: bool = False,
    compile: bool = False,
    tensorboard: bool = False,
    save_minutes: float = 10,
    source: str = "auto",
    pretrained: bool = True,
    on_event: Event | None = None,
) -> Trained:
    """Train a MOLT on photos and one class each; boxes are never looked at.

    Under ``torchrun`` or ``accelerate launch`` processes, which must see the same folders, share each batch; gradients,
    and so the result up to rounding, are those of one process (but for stochastic depth, and for the area term of a
    spatial token, which is of each forward pass). A photo that cannot be read counts as one without gradient. On the
    CPU a run that was killed at any moment and resumed ends with the same bits.

    Args:
        data: photos with labels, :func:`molt.data.read_set`; several sets must have the same classes, and no photo of a
            class in common.
        out: folder of the run: best.safetensors, last.safetensors, state.safetensors, run.json.
        recipe: how the network is built and trained, by name or as a :class:`Recipe`.
        model: a MOLT to go on with in place of a new one; its own model, sizes, shared, head, pooling and clip take the
            place of the recipe's. It is trained in place and in float32, which it is brought to, and takes the photos'
            class names where it has none.
        val: photos that pick the best epoch, by their labels; one set or several.
        val_share: in [0, 1): share of ``data`` held out for that where there is no ``val``.
        cache: folder of features where backbones are frozen; ``"auto"`` is one that all runs of the user share, see
            :func:`molt.training.features.shared_folder`; None computes them anew in each epoch, with new augmentations.
        micro: photos a forward pass and process, at least 1; None takes a process's whole share of a batch.
        workers: processes that read photos, 0 reads in this one; for kept features threads, 0 picks their number.
        device: ``"cpu"`` or ``"cuda"``; None takes a GPU where there is one.
        seed: of new heads, of the order of photos, of augmentations and of the photos held out.
        resume: go on with the run in ``out``.
        compile: run the network through torch.compile.
        tensorboard: write loss, accuracy and rate to ``out/tensorboard``.
        save_minutes: the state is written after each epoch and when this much time has gone by.
        source: where backbone weights come from.
        pretrained: False begins with random backbones.
        on_event: called as the run goes on, in the first process.

    Raises:
        TypeError, ValueError: an argument of another type or range, classes that do not fit, too few photos.
        TrainingError: ``out`` holds a run and ``resume`` is False, or another run; a loss that is not finite (the state
            from before it is kept); the best model is gone.
        BlockingIOError: another run is at it in ``out``.
        OSError: a file cannot be written (the one from before is kept, and where that is the state all others are).
        ImportError: tensorboard is asked for and not installed.
    """
    if not isinstance(out, str | os.PathLike):
        raise TypeError(f"out must be the path of a folder, got {type(out).__name__}")
    if cache is not None and not isinstance(cache, str | os.PathLike):
        raise TypeError(f"cache must be 'auto', the path of a folder or None, got {type(cache).__name__}")
    if model is not None and not isinstance(model, MOLT):
        raise TypeError(
            f"model must be a MOLT (molt.create_model, molt.load_model) or None, got {model!r:.80}; a recipe names the "
            "model of a new one"
        )
    recipe = find_recipe(recipe)
    check_int("seed", seed, 0, LARGEST_SEED)
    check_int("workers", workers, 0, 1024)
    check_number("save_minutes", save_minutes)
    if micro is not None:
        check_int("micro", micro, 1)
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device must be 'cpu', 'cuda' or None, got {device!r}")
    if model is not None:  # what is kept of the run must be what was trained
        config = model.config
        recipe = recipe.change(
            model=config.name,
            sizes=config.sizes,
            shared=config.shared,
            head=config.head,
            pooling=config.pooling,
            clip=config.clip,
        )
    keeps = cache is not None and recipe.freeze and recipe.head != "spatial"
    if keeps and recipe.views == 1 and find_augmentation(recipe.augment).random:
        raise ValueError(
            f"augment {recipe.augment!r} does nothing to kept features of one view: take views=2 or more, or "
            "cache=None (--no-cache)"
        )
    if not keeps and recipe.views > 1:
        raise ValueError(f"views apply to kept features alone, got {recipe.views}: other photos are augmented anew")
    photos = gather_photos(data, val, val_share, seed)
    if model is not None:
        check_model(model, photos.classes)
    out = check_readable_later(user_path(out))
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, expected a folder")
    if (out / STATE).is_file() and not resume:
        raise TrainingError(f"{out} holds a run: resume it (resume=True, --resume), or take another folder")
    if resume and not (out / STATE).is_file() and (out / RUN).exists():
        raise TrainingError(f"{out} has no {STATE}: its state is lost, take another folder")
    writer = _tensorboard(out) if tensorboard else None
    if device == "cuda":
        check_device(device)  # accelerate would take the CPU
    accelerator = _accelerator(device, recipe.precision)
    with alone_in(out if accelerator.is_main_process else None):
        if accelerator.is_main_process:
            check_writable(out)
        folder = None
        if keeps:
            folder = shared_folder(photos.samples, out) if cache == "auto" else user_path(cache or "")
            check_writable(folder, keep=True)
        with torch.random.fork_rng():
            built = (
                build_model(recipe, photos.classes, seed, source, pretrained)
                if model is None
                else take_over(model, photos.classes)
            )
            run = Run(
                recipe,
                photos,
                built,
                accelerator,
                out,
                cache=folder,
                seed=seed,
                micro=micro,
                workers=workers,
                on_event=on_event,
            )
            run.prepare(compile=compile, resume=resume and (out / STATE).is_file())
            run.go(save_minutes * 60, writer if accelerator.is_main_process else None)
    assert run.best is not None
    return Trained(
        folder=out,
        best=out / BEST,
        last=out / LAST,
        best_epoch=run.best["epoch"],
        history=run.history,
        skipped=run.skipped(),
        feature_seconds=run.feature_seconds,
        seconds=run.seconds,
    )


def _accelerator(device: str | None, precision: str) -> Accelerator:
    """Return what runs the training; processes that it joins part at exit, so that a script may train again."""
    begun = torch.distributed.is_initialized()
    # Another run of this process may have had another precision or device.
    AcceleratorState._reset_state(reset_partial_state=not begun)
    # Small passes are molt's own; the number alone would give way to the environment's, and losses be divided by that.
    steps = GradientAccumulationPlugin(num_steps=1)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=precision, gradient_accumulation_plugin=steps)
    if torch.distributed.is_initialized() and not begun:
        # Threads of a group that is still there when the interpreter is gone can abort the process.
        atexit.register(_part)
    return accelerator


def _part() -> None:
    """End the group of processes, unless the caller did."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _tensorboard(out: Path) -> Callable[[dict[str, Any]], None]:
    """Return what writes an epoch's entry for TensorBoard; nothing is written before the first."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard is not installed: pip install tensorboard") from error

    writers: list[SummaryWriter] = []

    def write(entry: dict[str, Any]) -> None:
        if not writers:
            writers.append(SummaryWriter(str(out / "tensorboard")))
        for key in SCALARS:
            if entry[key] is not None:
                writers[0].add_scalar(key, entry[key], entry["epoch"])
        writers[0].flush()

    return write
