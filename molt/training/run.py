"""One training run: its steps and epochs."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from molt._files import remove_parts
from molt._words import count
from molt.methods.molt import MOLT
from molt.training.batches import Order
from molt.training.checkpoints import TrainingError, read_state
from molt.training.inputs import Inputs, KeptFeatures, LivePhotos
from molt.training.objectives import classification_loss
from molt.training.recipe import Recipe
from molt.training.run_files import STATE, check_same, resume_run, save_outcome, save_run, trained_tensors
from molt.training.setup import LabelledPhotos, build_optimizer, networks, set_drop_path
from molt.training.spatial_loss import spatial_loss

ASKED_EVERY = 20  # steps
Event = Callable[[str, dict[str, Any]], None]


class Run:
    """What a run is made of and where it stands.

    Attributes:
        epoch, step: the next ones, from 0.
        sums: of this epoch so far: losses, correct answers, photos.
        history: one entry an epoch.
        best: epoch, from 1, and score of the best one so far.
        bad: why photos could not be read, by place.
        kept: whether features are kept in place of photos.
        seconds, feature_seconds: what training, and computing features, took in all calls together.
        feature_photos: of how many photos features were computed.
    """

    def __init__(
        self,
        recipe: Recipe,
        photos: LabelledPhotos,
        model: MOLT,
        accelerator: Accelerator,
        out: Path,
        *,
        cache: Path | None,
        seed: int,
        micro: int | None,
        workers: int,
        on_event: Event | None,
    ) -> None:
        self.recipe, self.photos, self.model, self.out, self.seed = recipe, photos, model, out, seed
        self.accelerator, self.device = accelerator, accelerator.device
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.on_event = on_event if accelerator.is_main_process else None
        self.epoch = self.step = 0
        self.steps = math.ceil(len(photos.train) / recipe.batch)
        self.sums = torch.zeros(3, dtype=torch.float64)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.bad: dict[int, str] = {}
        self.seconds = self.feature_seconds = 0.0
        self.feature_photos = 0
        self.pending: tuple[int, Tensor] | None = None
        if recipe.freeze:
            model.freeze_backbones()
        else:
            model.requires_grad_()
            set_drop_path(model, recipe.drop_path)
        model.to(self.device)
        self.kept = cache is not None
        self.source: KeptFeatures | LivePhotos
        if cache is not None:
            self.source = KeptFeatures(model, photos, recipe, accelerator, seed, micro, workers, cache)
        else:
            self.source = LivePhotos(model, photos, recipe, accelerator, seed, micro, workers, self.note_bad)

    def prepare(self, *, compile: bool, resume: bool) -> None:
        """Compute features that are missing, wrap the network, and take up where an earlier run stopped."""
        if resume:  # before hours are spent on features
            check_same(self, read_state(self.out / STATE)[1])
        if self.accelerator.is_main_process:
            remove_parts(self.out)
        config = self.model.config
        self.tell(
            "begin",
            {
                "model": config.name,
                "sizes": config.sizes,
                "recipe": self.recipe.name,
                "head": self.recipe.head,
                "frozen": self.recipe.freeze,
                "kept": self.kept,
                "folder": str(self.source.folder) if isinstance(self.source, KeptFeatures) else None,
                "classes": len(self.photos.classes),
                "train": len(self.photos.train),
                "held": len(self.photos.held),
                "steps": self.steps,
                "epochs": self.recipe.epochs,
                "device": str(self.device),
                "resumed": resume,
            },
        )
        if isinstance(self.source, KeptFeatures):
            store = self.source.store
            rows = {*store.missing(self.photos.train), *store.missing(self.photos.held, 1)}
            took = self.source.fill(self.tell)
            self.feature_seconds = took if rows else 0.0
            self.feature_photos = len({row // store.views for row in rows} - set(store.bad))
            for index, message in store.bad.items():
                self.note_bad(index, message)
            self._some_photo()
        self.optimizer = build_optimizer(self.model, self.recipe)
        torch.manual_seed(self.seed + self.rank)
        if resume:
            resume_run(self)
        if self.world > 1:
            places = gather_object([(resume, self.epoch, self.step)])
            if len(set(places)) > 1:
                raise TrainingError(f"{self.out} must be a folder that all processes share: they found {places}")
        if resume:
            save_outcome(self)
        net = torch.compile(self.source.net) if compile else self.source.net
        self.net, self.stepper = self.accelerator.prepare(net, self.optimizer)

    def go(self, save_seconds: float, on_epoch: Callable[[dict[str, Any]], None] | None) -> None:
        """Run the epochs that are left; the state is kept after each, and within one every ``save_seconds``."""
        began = time.monotonic() - self.seconds
        while self.epoch < self.recipe.epochs:
            self._train_mode(True)
            epoch_began = saved = time.monotonic()
            first = self.step
            for inputs in self.source.train(self.epoch, self.step):
                self._one_step(inputs)
                self.step += 1
                if self.step < self.steps and self._agreed(time.monotonic() - saved > save_seconds):
                    self.seconds = time.monotonic() - began
                    self._settle()
                    self._check_finite()
                    save_run(self)
                    saved = time.monotonic()
            self._settle()
            entry = self._entry(time.monotonic() - epoch_began, first)
            self._check_finite(entry)
            self.history.append(entry)
            self.epoch, self.step = self.epoch + 1, 0
            self.sums.zero_()
            self.seconds = time.monotonic() - began
            self._save_epoch(entry)
            if on_epoch is not None:
                on_epoch(entry)
            left = (self.recipe.epochs - self.epoch) * entry["seconds"]
            self.tell("epoch", entry | {"epochs": self.recipe.epochs, "seconds_left": left})
        self.accelerator.wait_for_everyone()  # the first one writes what all may read from here on

    def skipped(self) -> list[tuple[str, str]]:
        """Return name and reason of every photo that could not be read."""
        return [(self.photos.samples[i].name, self.bad[i]) for i in sorted(self.bad)]

    def note_bad(self, index: int, message: str) -> None:
        """Remember a photo that could not be read."""
        if index not in self.bad:
            self.bad[index] = message
            self.tell("bad", {"name": self.photos.samples[index].name, "message": message})

    def tell(self, kind: str, values: dict[str, Any]) -> None:
        """Say what happened, in the first process."""
        if self.on_event is not None:
            self.on_event(kind, values)

    def _one_step(self, inputs: list[Inputs]) -> None:
        """Take one optimizer step on this process's part of a batch."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * self.recipe.rate(self.epoch + self.step / self.steps, self.epoch)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for number, part in enumerate(inputs or [None]):
            last = number >= len(inputs) - 1
            hold: AbstractContextManager[Any] = nullcontext() if last else self.accelerator.no_sync(self.net)
            with hold:
                if part is None:  # every process must take part, also with nothing of its own
                    logits, _ = self.net(self._moved(self.source.nothing()))
                    loss = sum(one.float().sum() for one in logits) * 0.0
                else:
                    losses, correct = self._losses(part)
                    # Processes' gradients are averaged: over all of them this is the batch's mean.
                    loss = losses.sum() * (self.world / part.total)
                    sums += torch.stack(
                        [losses.detach().double().sum(), correct.sum(), correct.new_ones(()) * len(losses)]
                    )
                self.accelerator.backward(loss)
        if self.world > 1:
            sums = self.accelerator.reduce(sums, "sum")
        self._settle()
        self.pending = (self.step, sums)
        if self.device.type == "cpu":  # elsewhere one step later, so that nobody waits for the device
            self._settle()
        if self.recipe.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.net.parameters(), self.recipe.clip_grad)
        self.stepper.step()
        self.stepper.zero_grad()

    def _losses(self, part: Inputs) -> tuple[Tensor, Tensor]:
        """Return (b,) losses, and (b,) 1 where the mean logits name the class, else 0."""
        logits, maps, labels = self._see(part)
        losses = classification_loss(
            logits, labels, loss_on=self.recipe.loss_on, label_smoothing=self.recipe.label_smoothing
        )
        if maps is not None:
            losses = losses + self.recipe.spatial_weight * torch.stack([spatial_loss(one) for one in maps]).mean()
        return losses, _correct(logits, labels)

    def _see(self, part: Inputs) -> tuple[list[Tensor], list[Tensor] | None, Tensor]:
        """Return logits a scale, maps of spatial tokens or None, and labels."""
        logits, maps = self.net(self._moved(part.values))
        return logits, maps, part.labels.to(self.device)

    def _moved(self, values: Any) -> Any:
        if not isinstance(values, Tensor):
            return [self._moved(one) for one in values]
        if self.device.type == "cuda":  # page-locked, so that nobody waits for the copy
            return values.pin_memory().to(self.device, non_blocking=True)
        return values.to(self.device)

    def _settle(self) -> None:
        """Add up the last step's sums; stop where its loss is not finite."""
        if self.pending is None:
            return
        step, sums = self.pending
        self.pending = None
        values = sums.cpu()
        if not bool(values.isfinite().all()):
            order = Order(len(self.photos.train), self.seed).epoch(self.epoch).tolist()
            batch = order[step * self.recipe.batch : (step + 1) * self.recipe.batch]
            names = [self.photos.samples[self.photos.train[i]].name for i in batch]
            listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise TrainingError(
                f"the loss is {float(values[0])} in epoch {self.epoch + 1}, batch {step + 1} of {self.steps} "
                f"({listed}); {self._kept_state()}. A lower lr, clip_grad (--clip-grad) or precision 'no' may help"
            )
        self.sums += values
        total, correct, count = self.sums.tolist()
        if count:
            about = {"epoch": self.epoch + 1, "epochs": self.recipe.epochs, "step": step + 1, "steps": self.steps}
            self.tell("step", about | {"loss": total / count, "accuracy": correct / count})

    def _entry(self, seconds: float, first: int) -> dict[str, Any]:
        """Return what is kept of an epoch, which this call began at step ``first``."""
        total, correct, count = self.sums.tolist()
        if self.world > 1:
            for bad in gather_object([self.bad]):
                self.bad |= bad
        self._some_photo()
        val_loss, val_accuracy = self._validate()
        seen = len(self.photos.train) - first * self.recipe.batch
        return {
            "epoch": self.epoch + 1,
            "loss": total / count,
            "accuracy": correct / count,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "rate": self.recipe.lr * self.recipe.rate(self.epoch + (self.steps - 1) / self.steps, self.epoch),
            "seconds": seconds,
            "photos_per_second": seen / max(seconds, 1e-9),
        }

    @torch.no_grad()
    def _validate(self) -> tuple[float | None, float | None]:
        """Return cross-entropy and accuracy on the photos held out, or None where there are none."""
        self._train_mode(False)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for inputs in self.source.held():
            for part in inputs:
                logits, _, labels = self._see(part)
                # Not what training lowers: neither smoothing nor a mask's size tells how well classes are known.
                losses = classification_loss(logits, labels, loss_on=self.recipe.loss_on)
                correct = _correct(logits, labels)
                sums += torch.stack([losses.double().sum(), correct.sum(), correct.new_ones(()) * len(losses)])
        if self.world > 1:
            sums = self.accelerator.reduce(sums, "sum")
        total, correct, count = sums.tolist()
        return (total / count, correct / count) if count else (None, None)

    def _train_mode(self, on: bool) -> None:
        self.net.train(on)
        if self.recipe.freeze:
            for transformer in networks(self.model):
                transformer.backbone.eval()

    def _check_finite(self, entry: dict[str, Any] | None = None) -> None:
        """Stop before weights, or a held-out loss, that are not finite take the place of the last good ones."""
        tensors = trained_tensors(self.model)
        lost = [name for name, value in tensors.items() if not bool(value.detach().isfinite().all())]
        if entry is not None and entry["val_loss"] is not None and not math.isfinite(entry["val_loss"]):
            lost.append("the loss on the photos held out")
        if lost:
            raise TrainingError(
                f"{lost[0]} is not finite after epoch {self.epoch + 1}, batch {self.step or self.steps} of "
                f"{self.steps}; {self._kept_state()}. A lower lr, clip_grad (--clip-grad) or precision 'no' may help"
            )

    def _kept_state(self) -> str:
        path = self.out / STATE
        return f"{path} is from before" if path.is_file() else "nothing was written yet"

    def _save_epoch(self, entry: dict[str, Any]) -> None:
        """Write the state, the epoch's model, and the best one if it is that."""
        score = entry["val_loss" if self.recipe.best == "loss" else "val_accuracy"]
        held = None if self.best is None else self.best["score"]
        better = held is None or score is None or (score < held if self.recipe.best == "loss" else score > held)
        if better:
            self.best = {"epoch": entry["epoch"], "score": score}
        save_run(self)

    def _agreed(self, wish: bool) -> bool:
        """Return the first process's wish, in all of them."""
        if self.world == 1:
            return wish
        if self.step % ASKED_EVERY:  # an answer waits for the device
            return False
        flag = torch.tensor([wish and self.rank == 0], dtype=torch.float32, device=self.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    def _some_photo(self) -> None:
        """Stop where no photo, or none of a class, can be read: what is learnt then looks good and is nothing."""
        train, samples = self.photos.train, self.photos.samples
        there = {samples[i].label for i in train if i not in self.bad}
        if not there:
            raise TrainingError(
                f"none of {count(len(train), 'photo')} can be read: {next(iter(self.bad.values()), '')}"
            )
        for label in sorted({samples[i].label for i in train} - there):
            lost = [i for i in train if samples[i].label == label]
            folder = os.path.commonpath([samples[i].path.parent for i in lost])
            which = f"class {self.photos.classes[label]!r}, in {folder},"
            raise TrainingError(f"none of {count(len(lost), 'photo')} of {which} can be read: {self.bad[lost[0]]}")


def _correct(logits: list[Tensor], labels: Tensor) -> Tensor:
    """Return (b,) 1 where the mean logits name the class, else 0."""
    fused = torch.stack([one.detach().float() for one in logits]).mean(0)
    return (fused.argmax(-1) == labels).double()
