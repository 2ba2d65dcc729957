"""For training_speed.py: molt's loop over photos beside one that a user would write, and timm's networks in it."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import PIL.Image
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from training_speed_parts import Setting, middle, new_model

from molt.data.annotations import LocalizationSet, Sample
from molt.methods.molt import MOLT
from molt.training import find_recipe, train
from molt.training.recipe import Recipe
from molt.training.run import Run
from molt.training.setup import build_optimizer, networks, set_drop_path


class UserPhotos(Dataset[tuple[Tensor, int]]):
    """Photos by the transforms that a user would write for the recipe's augmentation."""

    def __init__(self, samples: Sequence[Sample], size: tuple[int, int]) -> None:
        self.samples = samples
        self.look = v2.Compose(
            [
                v2.RandomResizedCrop(size, (0.5, 1.0), interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
            ]
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        sample = self.samples[place]
        with PIL.Image.open(sample.path) as picture:
            return self.look(picture.convert("RGB")), sample.label


class PlainTimm(nn.Module):
    """The timm networks of a MOLT with timm's own linear classifiers, one a scale."""

    def __init__(self, model: MOLT, drop_path: float) -> None:
        super().__init__()
        self.scaled = model.pyramid
        self.nets = nn.ModuleList(
            timm.create_model(
                transformer.backbone.info.model,
                num_classes=model.config.num_classes,
                dynamic_img_size=True,
                drop_path_rate=drop_path,
            )
            for transformer in networks(model)
        )

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return [net(x) for net, x in zip(self.nets, self.scaled(pixels), strict=True)]


def user_epochs(
    setting: Setting,
    data: LocalizationSet,
    recipe: Recipe,
    net: Callable[[Tensor], list[Tensor]],
    optimizer: torch.optim.Optimizer,
    size: tuple[int, int],
) -> float:
    """Train for two epochs, as one would write it; return the photos a second of the second one."""
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    on_gpu = setting.device.type == "cuda"
    loader = DataLoader(
        UserPhotos(data.samples, size),
        recipe.batch,
        shuffle=True,
        num_workers=setting.workers,
        pin_memory=on_gpu,
        persistent_workers=setting.workers > 0,
    )
    scaler = torch.amp.GradScaler(setting.device.type, enabled=recipe.precision == "fp16")

    def epoch() -> None:
        total = torch.zeros((), device=setting.device)
        for pixels, labels in loader:
            x, y = pixels.to(setting.device, non_blocking=True), labels.to(setting.device, non_blocking=True)
            optimizer.zero_grad()
            with setting.autocast(recipe.precision):
                loss = torch.stack([F.cross_entropy(logits, y) for logits in net(x)]).mean()
            scaler.scale(loss).backward()
            if recipe.clip_grad is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, recipe.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            total += loss.detach()
        float(total)

    epoch()
    return len(data.samples) / setting.clock(epoch)


def time_loop(
    setting: Setting, data: LocalizationSet, *, name: str, sizes: Sequence[int], precision: str, batch: int
) -> list[dict[str, Any]]:
    """Return rows on fine-tuning from photos: photos/s of each run's second epoch, without what is saved after it."""
    recipe = find_recipe("fine-tune").change(
        model=name, sizes=tuple((side, side) for side in sizes), precision=precision, batch=batch, epochs=2
    )
    model = new_model(name, sizes, len(data.classes), recipe.pooling)
    model.reconfigure(class_names=data.classes)
    set_drop_path(model, recipe.drop_path)
    model.requires_grad_().to(setting.device)
    plain = PlainTimm(model, recipe.drop_path).to(setting.device)
    numbers = itertools.count()
    saving: list[float] = []
    original, saved = Run._entry, Run._save_epoch

    def ours() -> float:
        out = setting.folder / f"loop-{next(numbers)}"

        def entry(run: Run, seconds: float, first: int) -> dict[str, Any]:
            return original(run, seconds + setting.clock(setting.wait), first)  # the device is not done yet

        def save(run: Run, entry: dict[str, Any]) -> None:
            if len(saving) == 0:  # in the warm-up alone
                saving.append(setting.clock(lambda: saved(run, entry)))
            run.best = {"epoch": entry["epoch"], "score": None}

        with patch.object(Run, "_entry", entry), patch.object(Run, "_save_epoch", save):
            done = train(
                data,
                out,
                recipe=recipe,
                model=model,
                val_share=0.0,
                workers=setting.workers,
                device=setting.device.type,
            )
        shutil.rmtree(out, ignore_errors=True)
        return float(done.history[-1]["photos_per_second"])

    def looped() -> float:
        model.train()

        def whole(pixels: torch.Tensor) -> list[torch.Tensor]:
            return model.scale_logits(pixels)

        return user_epochs(setting, data, recipe, whole, build_optimizer(model, recipe), model.finest)

    def timm_alone() -> float:
        plain.train()
        optimizer = torch.optim.AdamW(plain.parameters(), recipe.backbone_lr or recipe.lr)
        return user_epochs(setting, data, recipe, plain, optimizer, model.finest)

    found = setting.turns({"molt": ours, "bare loop, same network": looped, "plain timm": timm_alone})
    speeds = {provider: middle(values) for provider, values in found.items()}
    return [
        {
            "provider": provider,
            "model": name,
            "sizes": list(sizes),
            "precision": precision,
            "photos": len(data.samples),
            "batch": batch,
            "workers": setting.workers,
            "photos_per_s": speed,
            "ratio": speed / speeds["bare loop, same network"],
            "ratio_timm": speed / speeds["plain timm"],
            "save_s": saving[0] if provider == "molt" else None,
        }
        for provider, speed in speeds.items()
    ]
