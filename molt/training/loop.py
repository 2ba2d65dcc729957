"""Training a MOLT on image labels: on one CPU, one GPU or many processes, resumable to the bit."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import molt
from molt._arguments import LARGEST_SEED, check_int, check_number
from molt._files import whole_file
from molt.backbones.spatial import spatial_map
from molt.data.annotations import LocalizationSet
from molt.methods.molt import MOLT
from molt.training.augment import find_augmentation
from molt.training.batches import Order, PhotoBatches
from molt.training.checkpoints import TrainingError, load_optimizer, optimizer_tensors, read_state, write_state
from molt.training.features import FeatureStore, PooledHeads
from molt.training.objectives import classification_loss
from molt.training.recipe import Recipe, find_recipe
from molt.training.setup import Photos, build_model, build_optimizer, check_model, gather_photos, set_drop_path
from molt.training.spatial_loss import spatial_loss

STATE, BEST, LAST, RUN, FEATURES = "state.safetensors", "best.safetensors", "last.safetensors", "run.json", "features"
Event = Callable[[str, dict[str, Any]], None]
"""Called with what happened, ``features``, ``step``, ``epoch`` or ``bad``, and plain values about it."""


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
        feature_seconds: what computing features took in this call.
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
    val: LocalizationSet | None = None,
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

    Under ``torchrun`` or ``accelerate launch`` processes share each batch; gradients, and so the result up to rounding,
    are those of one process. On the CPU a run that was killed at any moment and resumed ends with the same bits.

    Args:
        data: photos with labels, :func:`molt.data.read_set`; several sets must have the same classes.
        out: folder of the run: best.safetensors, last.safetensors, state.safetensors, run.json.
        recipe: how the network is built and trained, by name or as a :class:`Recipe`.
        model: a MOLT to go on with in place of a new one; the recipe's model, sizes, shared, head, pooling and clip are
            then not used.
        val: photos that pick the best epoch, by their labels.
        val_share: in [0, 1): share of ``data`` held out for that where there is no ``val``.
        cache: folder of features where backbones are frozen; ``"auto"`` is ``out/features``; None computes them anew in
            each epoch, with new augmentations.
        micro: photos a forward pass and process, at least 1; None takes a process's whole share of a batch.
        workers: processes that read photos; 0 reads in this one.
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
            from before it is kept).
        OSError: a file cannot be written (the one from before is kept).
        ImportError: tensorboard is asked for and not installed.
    """
    recipe = find_recipe(recipe)
    check_int("seed", seed, 0, LARGEST_SEED)
    check_int("workers", workers, 0, 1024)
    check_number("save_minutes", save_minutes)
    if micro is not None:
        check_int("micro", micro, 1)
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device must be 'cpu', 'cuda' or None, got {device!r}")
    photos = gather_photos(data, val, val_share, seed)
    if model is not None:
        check_model(model, photos.classes)
    out = Path(out).expanduser()
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, expected a folder")
    if (out / STATE).is_file() and not resume:
        raise TrainingError(f"{out} holds a run: resume it (--resume), or take another folder")
    if resume and not (out / STATE).is_file() and (out / RUN).exists():
        raise TrainingError(f"{out} has no {STATE}: its state is lost, take another folder")
    AcceleratorState._reset_state()  # another run of this process may have had another precision
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=recipe.precision)
    if device == "cuda" and accelerator.device.type != "cuda":
        raise ValueError("device 'cuda' cannot be used here")
    with torch.random.fork_rng():
        built = model if model is not None else build_model(recipe, photos.classes, seed, source, pretrained)
        folder = out / FEATURES if cache == "auto" else None if cache is None else Path(cache).expanduser()
        if not recipe.freeze or built.config.head == "spatial":
            folder = None
        run = _Run(recipe, photos, built, accelerator, out, folder, seed, micro, workers, on_event)
        run.prepare(compile=compile, resume=resume)
        writer = _tensorboard(out) if tensorboard and accelerator.is_main_process else None
        return run.go(save_minutes * 60, writer)


class _Run:
    """One run: what it is made of, where it stands."""

    def __init__(
        self,
        recipe: Recipe,
        photos: Photos,
        model: MOLT,
        accelerator: Accelerator,
        out: Path,
        cache: Path | None,
        seed: int,
        micro: int | None,
        workers: int,
        on_event: Event | None,
    ) -> None:
        self.recipe, self.photos, self.model, self.out, self.seed = recipe, photos, model, out, seed
        self.accelerator, self.micro, self.workers = accelerator, micro, workers
        self.device, self.world, self.rank = accelerator.device, accelerator.num_processes, accelerator.process_index
        self.on_event = on_event if accelerator.is_main_process else None
        self.epoch = self.step = 0
        self.sums = torch.zeros(3, dtype=torch.float64)  # of this epoch: losses, correct ones, photos
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.bad: dict[int, str] = {}
        self.seconds = self.feature_seconds = 0.0
        self.pending: tuple[int, Tensor] | None = None
        self.store: FeatureStore | None = None
        if recipe.freeze:
            model.freeze_backbones()
            if model.config.head != "spatial":
                model.eval()
        else:
            model.requires_grad_()
            set_drop_path(model, recipe.drop_path)
        self.model.to(self.device)
        if cache is not None:
            augmentation = find_augmentation(recipe.augment)
            self.store = FeatureStore(model, cache, photos.samples, recipe.views, augmentation, recipe.precision)
        self.steps = math.ceil(len(photos.train) / recipe.batch)

    def prepare(self, *, compile: bool, resume: bool) -> None:
        """Fill the cache, wrap the network, and take up where an earlier run stopped."""
        if self.store is not None:
            self._fill(self.store)
        net: nn.Module = PooledHeads(self.model) if self.store is not None else _Whole(self.model)
        self.optimizer = build_optimizer(self.model, self.recipe)
        torch.manual_seed(self.seed + self.rank)
        if resume and (self.out / STATE).is_file():
            self._resume()
        if compile:
            net = torch.compile(net)  # type: ignore[assignment]
        self.net, self.optimizer = self.accelerator.prepare(net, self.optimizer)

    def go(self, save_seconds: float, writer: Any) -> Trained:
        """Run the epochs that are left."""
        began, saved = time.monotonic() - self.seconds, time.monotonic()
        while self.epoch < self.recipe.epochs:
            self._train_mode(True)
            epoch_began = time.monotonic()
            first = self.step
            for inputs in self._batches(self.epoch, self.step):
                self._one_step(inputs)
                self.step += 1
                if save_seconds and time.monotonic() - saved > save_seconds and self.step < self.steps:
                    self.seconds = time.monotonic() - began
                    self._save_state()
                    saved = time.monotonic()
            self._check_pending()
            taken = time.monotonic() - epoch_began
            entry = self._entry(taken, self.step - first)
            self.history.append(entry)
            self.epoch, self.step = self.epoch + 1, 0
            self.sums.zero_()
            self.seconds = time.monotonic() - began
            self._save_epoch(entry)
            saved = time.monotonic()
            if writer is not None:
                for key in ("loss", "accuracy", "val_loss", "val_accuracy", "rate", "photos_per_second"):
                    if entry.get(key) is not None:
                        writer.add_scalar(key, entry[key], self.epoch)
            self._tell("epoch", entry)
        if writer is not None:
            writer.close()
        assert self.best is not None
        names = [(self.photos.samples[i].name, self.bad[i]) for i in sorted(self.bad)]
        return Trained(
            self.out,
            self.out / BEST,
            self.out / LAST,
            self.best["epoch"],
            self.history,
            names,
            self.feature_seconds,
            self.seconds,
        )

    def _fill(self, store: FeatureStore) -> None:
        """Compute the features that are missing, each process its share."""
        train, held = list(self.photos.train), list(self.photos.held)
        rows = sorted({*store.missing(train), *store.missing(held, 1)})
        began = time.monotonic()
        if rows:
            share = rows[len(rows) * self.rank // self.world : len(rows) * (self.rank + 1) // self.world]
            size = self.micro or (64 if self.device.type == "cuda" else 8)
            self._tell("features", {"done": 0, "total": len(share), "bytes": store.bytes})
            store.fill(
                share,
                batch=size,
                device=self.device,
                step=lambda done: self._tell("features", {"done": done, "total": len(share), "bytes": store.bytes}),
            )
        self.accelerator.wait_for_everyone()
        self.feature_seconds = time.monotonic() - began
        store.look([*train, *held])
        for index, message in store.bad.items():
            self._note_bad(index, message)
        if not set(train) - set(store.bad):
            raise TrainingError(f"none of the {len(train)} photos can be read: {next(iter(store.bad.values()))}")

    def _batches(self, epoch: int, start: int) -> Iterator[list[_Inputs]]:
        """Yield this process's part of each batch of an epoch, in forward passes."""
        train = self.photos.train
        if self.store is None:
            yield from self._photo_batches(train, epoch, start, shuffled=True)
            return
        order = Order(len(train), self.seed).epoch(epoch)
        chosen = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % LARGEST_SEED)
        views = torch.randint(self.recipe.views, (len(train),), generator=chosen).tolist()
        for number in range(start, self.steps):
            batch = order[number * self.recipe.batch : (number + 1) * self.recipe.batch]
            own = [train[i] for i in self._share(batch)]
            of = {train[i]: views[i] for i in batch}
            yield list(self._kept(own, of, len(batch)))

    def _kept(self, photos: Sequence[int], views: dict[int, int], total: int) -> Iterator[_Inputs]:
        """Yield kept features of some photos, in forward passes."""
        assert self.store is not None
        good = [i for i in photos if i not in self.store.bad]
        size = self.micro or max(1, len(good))
        for start in range(0, len(good), size):
            part = good[start : start + size]
            pooled = self.store.read([i * self.store.views + views.get(i, 0) for i in part])
            yield _Inputs(pooled, self._labels(part), total)

    def _photo_batches(
        self, places: Sequence[int], epoch: int, start: int, *, shuffled: bool
    ) -> Iterator[list[_Inputs]]:
        """Yield this process's part of each batch of photos, read and augmented, in forward passes."""
        samples = [self.photos.samples[i] for i in places]
        config = self.model.config
        loaded = PhotoBatches(
            samples,
            max(config.sizes, key=lambda size: size[0] * size[1]),
            find_augmentation(self.recipe.augment if shuffled else "none"),
            seed=self.seed,
            workers=self.workers,
        )
        for micro in loaded.epoch(
            epoch,
            start=start,
            batch=self.recipe.batch,
            micro=self.micro,
            rank=self.rank,
            world=self.world,
            shuffle=shuffled,
        ):
            found = []
            for part in micro:
                for index, message in part.bad:
                    self._note_bad(places[index], message)
                if len(part.labels):
                    found.append(_Inputs(part.pixels, part.labels, part.total))
            yield found

    def _share(self, batch: Sequence[int]) -> Sequence[int]:
        return batch[len(batch) * self.rank // self.world : len(batch) * (self.rank + 1) // self.world]

    def _labels(self, places: Sequence[int]) -> Tensor:
        return torch.tensor([self.photos.samples[i].label for i in places], dtype=torch.int64)

    def _one_step(self, inputs: list[_Inputs]) -> None:
        """Take one optimizer step on this process's part of a batch."""
        for group in self.optimizer.param_groups:
            progress = self.epoch + self.step / self.steps
            group["lr"] = group["peak"] * self.recipe.rate(progress, self.epoch)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        passes: list[_Inputs | None] = [*inputs] or [None]
        for number, part in enumerate(passes):
            last = number == len(passes) - 1
            hold: AbstractContextManager[Any] = nullcontext() if last else self.accelerator.no_sync(self.net)
            with hold:
                if part is None:  # every process must take part, also with nothing of its own
                    logits, masks = self.net(self._nothing())
                    loss = sum(one.float().sum() for one in logits) * 0.0
                else:
                    losses, correct = self._losses(part)
                    # Processes' gradients are averaged: over all of them this is the batch's mean.
                    loss = losses.sum() * (self.world / part.total)
                    sums += torch.stack([losses.detach().sum(), correct.sum(), losses.new_tensor(len(losses))]).double()
                self.accelerator.backward(loss)
        if self.world > 1:
            sums = self.accelerator.reduce(sums, "sum")  # type: ignore[assignment]
        self._check_pending()
        self.pending = (self.step, sums)
        if self.device.type == "cpu":  # elsewhere one step later, so that nobody waits for the device
            self._check_pending()
        if self.recipe.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.net.parameters(), self.recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _losses(self, part: _Inputs) -> tuple[Tensor, Tensor]:
        """Return (b,) losses, and (b,) whether the mean logits name the class."""
        labels = part.labels.to(self.device)
        shown = part.values
        moved = shown.to(self.device) if isinstance(shown, Tensor) else [one.to(self.device) for one in shown]
        logits, masks = self.net(moved)
        losses = classification_loss(
            logits, labels, loss_on=self.recipe.loss_on, label_smoothing=self.recipe.label_smoothing
        )
        if masks is not None and self.recipe.spatial_weight > 0:
            losses = losses + self.recipe.spatial_weight * torch.stack([spatial_loss(m) for m in masks]).mean()
        correct = torch.stack([one.detach().float() for one in logits]).mean(0).argmax(-1) == labels
        return losses, correct

    def _nothing(self) -> Any:
        """Return inputs of one photo that counts for nothing."""
        if self.store is not None:
            width = [t.head.weight[0].numel() for t in map(self.model.transformer, range(len(self.model.config.sizes)))]
            return [torch.zeros(1, each, device=self.device) for each in width]
        size = max(self.model.config.sizes, key=lambda size: size[0] * size[1])
        return torch.zeros(1, 3, *size, device=self.device)

    def _check_pending(self) -> None:
        """Add up the last step's sums; stop where its loss is not finite."""
        if self.pending is None:
            return
        step, sums = self.pending
        self.pending = None
        values = sums.cpu()
        if not bool(values.isfinite().all()):
            order = Order(len(self.photos.train), self.seed).epoch(self.epoch)
            batch = order[step * self.recipe.batch : (step + 1) * self.recipe.batch]
            names = [self.photos.samples[self.photos.train[i]].name for i in batch]
            listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            kept = f"the state from before is in {self.out / STATE}" if (self.out / STATE).is_file() else "no state yet"
            raise TrainingError(
                f"the loss is {float(values[0])} at epoch {self.epoch + 1}, batch {step + 1} of {self.steps} ({listed}); "
                f"{kept}. Try a lower lr, clip_grad, or precision 'no'"
            )
        self.sums += values
        total, correct, count = self.sums.tolist()
        if count:
            self._tell(
                "step",
                {
                    "epoch": self.epoch + 1,
                    "step": step + 1,
                    "steps": self.steps,
                    "epochs": self.recipe.epochs,
                    "loss": total / count,
                    "accuracy": correct / count,
                },
            )

    def _entry(self, seconds: float, steps: int) -> dict[str, Any]:
        """Return what is kept of an epoch."""
        total, correct, count = self.sums.tolist()
        if not count:
            raise TrainingError(
                f"none of the {len(self.photos.train)} photos can be read: {next(iter(self.bad.values()))}"
            )
        held = self._validate()
        return {
            "epoch": self.epoch + 1,
            "loss": total / count,
            "accuracy": correct / count,
            "val_loss": held[0],
            "val_accuracy": held[1],
            "rate": self.recipe.lr * self.recipe.rate(self.epoch + (self.steps - 1) / self.steps, self.epoch),
            "seconds": seconds,
            "photos_per_second": min(steps * self.recipe.batch, len(self.photos.train)) / max(seconds, 1e-9),
        }

    @torch.no_grad()
    def _validate(self) -> tuple[float | None, float | None]:
        """Return loss and accuracy on the photos held out, or None where there are none."""
        held = self.photos.held
        if not held:
            return None, None
        self._train_mode(False)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        if self.store is not None:
            size = self.recipe.batch
            parts: Any = (
                self._kept(self._share(held[start : start + size]), {}, size) for start in range(0, len(held), size)
            )
        else:
            parts = self._photo_batches(held, 0, 0, shuffled=False)
        for inputs in parts:
            for part in inputs:
                losses, correct = self._losses(part)
                sums += torch.stack([losses.sum(), correct.sum(), losses.new_tensor(len(losses))]).double()
        if self.world > 1:
            sums = self.accelerator.reduce(sums, "sum")  # type: ignore[assignment]
        total, right, count = sums.tolist()
        return (total / count, right / count) if count else (None, None)

    def _train_mode(self, on: bool) -> None:
        self.net.train(on)
        if self.recipe.freeze:
            for transformer in self.model.transformers:
                transformer.backbone.eval()  # type: ignore[union-attr, operator]

    def _save_epoch(self, entry: dict[str, Any]) -> None:
        """Write the epoch's model, the best one where it is, the state and run.json."""
        score = entry["val_loss" if self.recipe.best == "loss" else "val_accuracy"]
        better = score is None or self.best is None or self.best["score"] is None
        if not better:
            better = score < self.best["score"] if self.recipe.best == "loss" else score > self.best["score"]
        if better:
            self.best = {"epoch": entry["epoch"], "score": score}
        if self.accelerator.is_main_process:
            if better:
                self._save_model(self.out / BEST)
            self._save_model(self.out / LAST)
        # The state comes last: a run killed before it does this epoch again, to the same files.
        self._save_state()

    def _save_model(self, path: Path) -> None:
        lost = any(info.source == "random" for info in self.model.weights)
        self.model.save(path, backbones=lost or any(p.requires_grad for p in self._backbone_parameters()))

    def _backbone_parameters(self) -> Iterator[Tensor]:
        return (value for name, value in self.model.named_parameters() if ".backbone." in name)

    def _save_state(self) -> None:
        self._check_pending()
        random = [torch.get_rng_state()]
        if self.device.type == "cuda":
            random.append(torch.cuda.get_rng_state())
        if self.world > 1:
            from accelerate.utils import gather_object

            kept = gather_object([[value.tolist() for value in random]])
            random_of = [[torch.tensor(value, dtype=torch.uint8) for value in one] for one in kept]
        else:
            random_of = [random]
        if not self.accelerator.is_main_process:
            return
        tensors: dict[str, Tensor] = {f"model.{k}": v for k, v in self._trained_tensors().items()}
        held, about = optimizer_tensors(self.optimizer)
        tensors |= held
        for rank, states in enumerate(random_of):
            tensors |= {f"random.{rank}.{i}": value for i, value in enumerate(states)}
        scaler = getattr(self.accelerator, "scaler", None)
        header = self._identity() | {
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.sums.tolist(),
            "history": self.history,
            "best": self.best,
            "bad": {str(i): text for i, text in self.bad.items()},
            "seconds": self.seconds,
            "optimizer": about,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        write_state(self.out / STATE, tensors, header)
        self._write_summary()

    def _trained_tensors(self) -> dict[str, Tensor]:
        """Return what training changes, by name."""
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def _identity(self) -> dict[str, Any]:
        """Return what two runs must share for one to go on from the other's state."""
        config = self.model.config
        return {
            "recipe": self.recipe.to_json(),
            "photos": self.photos.digest,
            "seed": self.seed,
            "kept_features": self.store is not None,
            "model": json.loads(json.dumps([config.name, config.backbone, config.sizes, config.head, config.pooling])),
        }

    def _resume(self) -> None:
        tensors, header = read_state(self.out / STATE)
        for key, own in self._identity().items():
            if header.get(key) != json.loads(json.dumps(own)):
                theirs = header.get(key)
                if isinstance(own, dict) and isinstance(theirs, dict):
                    key, theirs, own = next(  # noqa: PLW2901 - names the field that differs
                        (k, theirs.get(k), v) for k, v in own.items() if theirs.get(k) != json.loads(json.dumps(v))
                    )
                raise TrainingError(
                    f"{self.out} holds a run with other {key}: {theirs!r:.100}, now {own!r:.100}; take another folder"
                )
        with torch.no_grad():
            for name, value in self._trained_tensors().items():
                if f"model.{name}" not in tensors or tensors[f"model.{name}"].shape != value.shape:
                    raise TrainingError(f"{self.out / STATE} lacks {name} or has it in another shape")
                value.copy_(tensors[f"model.{name}"])
        load_optimizer(self.optimizer, tensors, header["optimizer"])
        self.epoch, self.step, self.history, self.best = (header[k] for k in ("epoch", "step", "history", "best"))
        self.sums = torch.tensor(header["sums"], dtype=torch.float64)
        self.seconds = header["seconds"]
        self.bad = {int(i): text for i, text in header["bad"].items()} | self.bad
        self.model.mark_trained(self.epoch + self.step > 0)
        if f"random.{self.rank}.0" in tensors:
            torch.set_rng_state(tensors[f"random.{self.rank}.0"])
        if self.device.type == "cuda" and f"random.{self.rank}.1" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.{self.rank}.1"])
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and header.get("scaler"):
            scaler.load_state_dict(header["scaler"])

    def _write_summary(self) -> None:
        samples = self.photos.samples
        about = {
            "molt": molt.__version__,
            "torch": torch.__version__,
            "recipe": self.recipe.to_json(),
            "seed": self.seed,
            "processes": self.world,
            "device": self.device.type,
            "classes": list(self.photos.classes),
            "photos": {"train": len(self.photos.train), "held_out": len(self.photos.held)},
            "weights": [info.to_json() for info in dict.fromkeys(self.model.weights)],
            "trained_parameters": sum(v.numel() for v in self._trained_tensors().values()),
            "best": self.best,
            "best_rule": f"{self.recipe.best} on the photos held out" if self.photos.held else "last epoch",
            "seconds": self.seconds,
            "feature_seconds": self.feature_seconds,
            "skipped": [[samples[i].name, self.bad[i]] for i in sorted(self.bad)],
            "history": self.history,
        }
        with whole_file(self.out / RUN) as part:
            part.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    def _note_bad(self, index: int, message: str) -> None:
        if index not in self.bad:
            self.bad[index] = message
            self._tell("bad", {"name": self.photos.samples[index].name, "message": message})

    def _tell(self, kind: str, values: dict[str, Any]) -> None:
        if self.on_event is not None:
            self.on_event(kind, values)


@dataclass(frozen=True, eq=False)
class _Inputs:
    """One forward pass: pixels (b, 3, H, W) or kept features a scale, labels (b,), and photos in the whole batch."""

    values: Tensor | list[Tensor]
    labels: Tensor
    total: int


class _Whole(nn.Module):
    """A MOLT from pixels in [0, 1] to each scale's logits, and masks of spatial tokens."""

    def __init__(self, model: MOLT) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return a (B, num_classes) a scale, and a map (B, 1, h, w) a scale or None."""
        x = self.model.normalize(pixels)
        seen = [
            self.model.transformer(scale).see(shown, attention=False)
            for scale, shown in enumerate(self.model.pyramid(x))
        ]
        logits = [one.logits for one in seen if one.logits is not None]
        return logits, None if seen[0].masks is None else [spatial_map(one) for one in seen]


def _tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard is not installed: pip install tensorboard") from error
    return SummaryWriter(str(out / "tensorboard"))
