"""The paper's network: object localization transformers at several scales, their class activation maps fused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molt import ops
from molt._files import save_tensors, user_path
from molt._text import plain_name
from molt.backbones import ViTBackbone
from molt.backbones.preprocess import check_range, mean_and_std, normalize, resize
from molt.classes import OBJECT, find_class, imagenet_names
from molt.methods.config import MOLTConfig
from molt.methods.transformer import ObjectLocalizationTransformer
from molt.structures import Features, WeightsInfo

FORMAT = 1
SAMPLES = 64
WITHOUT_TRAINING = ("layers", "over_layers", "over_heads", "clip", "order", "scale_weights", "class_names")


class MOLT(nn.Module):
    """Multiscale object localization transformers (Kim, Cha and Kang, VCIP 2023, section II.A).

    The image is resized to each scale and goes through that scale's transformer; logits are the mean over scales.
    A scale's map of a class is the class token's attention times the head's response at each patch; maps are
    upsampled, min-max normalised and averaged. With one scale this is TS-CAM. The paper names neither backbone,
    sizes, head, layers nor the way of fusion: those are our choice and arguments of :func:`create_model`.

    Attributes:
        config: what it was built from.
        transformers: one a scale, or a single one where they share weights.
        weights: where the weights of each backbone came from.
    """

    def __init__(self, config: MOLTConfig, *, pretrained: bool = True, source: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.transformers = nn.ModuleList()
        for _ in range(1 if config.shared else len(config.sizes)):
            backbone = ViTBackbone(config.backbone, pretrained=pretrained, source=source)
            config.check_fit(backbone.patch_size, len(backbone.model.blocks))
            transformer = ObjectLocalizationTransformer(
                backbone,
                config.num_classes,
                config.head,  # type: ignore[arg-type]
                config.pooling,  # type: ignore[arg-type]
            )
            self.transformers.append(transformer.requires_grad_())
        self.patch_size = backbone.patch_size
        self.weights: tuple[WeightsInfo, ...] = tuple(transformer.backbone.info for transformer in self._all())
        self.mean, self.std = mean_and_std(backbone.model)
        self._fresh: list[Tensor] | None = None
        self.mark_trained(False)
        self.eval()

    @property
    def trained(self) -> bool:
        """Whether the heads are other than the random ones the model was created with."""
        if self._fresh is None:
            return True
        now = [_some(transformer.head) for transformer in self._all()]
        # In the dtype it has now, as rounding is no training.
        return not all(torch.equal(a, b.to(a.dtype)) for a, b in zip(now, self._fresh, strict=True))

    def mark_trained(self, trained: bool) -> None:
        """Say whether the heads as they are now count as trained; training from here on counts by itself."""
        self._fresh = None if trained else [_some(transformer.head) for transformer in self._all()]

    @property
    def finest(self) -> tuple[int, int]:
        """(H, W) in pixels of the largest scale."""
        return max(self.config.sizes, key=lambda size: size[0] * size[1])

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes: those given, ImageNet's where there are 1000, else ``class 0``, ``class 1``..."""
        if self.config.class_names is not None:
            return tuple(map(plain_name, self.config.class_names))
        names = imagenet_names()
        count = self.config.num_classes
        return names if count == len(names) else tuple(f"class {i}" for i in range(count))

    def reconfigure(self, **changes: Any) -> MOLT:
        """Change how maps are made, which needs no training; returns the model.

        Args:
            changes: any of layers, over_layers, over_heads, clip, order, scale_weights and class_names, as for
                :func:`molt.create_model`.

        Raises:
            TypeError, ValueError: another name, or a value of another type or out of range.
        """
        if unknown := set(changes) - set(WITHOUT_TRAINING):
            raise TypeError(f"reconfigure changes {', '.join(WITHOUT_TRAINING)}, got {', '.join(sorted(unknown))}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
        config = replace(self.config, **values)
        config.check_fit(self.patch_size, len(self.transformer(0).backbone.model.blocks))
        self.config = config
        return self

    def freeze_backbones(self) -> MOLT:
        """Leave only the heads to be trained; returns the model."""
        for transformer in self._all():
            transformer.backbone.requires_grad_(False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes), the mean over scales, in training and in evaluation alike.

        Args:
            x: (B, 3, H, W) RGB in [0, 1] of any size, at least one image, of the model's dtype and on its device. The
                model itself takes off the mean and divides by the deviation that its backbone was trained with.

        Raises:
            TypeError, ValueError: another type, dtype (uint8 must be divided by 255), device or shape, or values far
                outside [0, 1]: they were normalised already. On a GPU a model's first call alone looks at values, as
                it would wait for the device; ``torch.compile`` and CUDA graphs leave that out.
        """
        return torch.stack(self.scale_logits(x)).mean(0)

    def scale_logits(self, x: Tensor) -> list[Tensor]:
        """Return the logits (B, num_classes) of each scale, for a loss on each; arguments as for :meth:`forward`."""
        return [transformer(pixels) for transformer, pixels in zip(self._per_scale(), self.pyramid(x), strict=True)]

    def pyramid(self, x: Tensor) -> list[Tensor]:
        """Return x (B, 3, H, W), as for :meth:`forward`, normalised and resized to each scale, antialiased."""
        _check_input(x, next(self.parameters()))
        check_range(x, self, "x")
        normalised = normalize(x, self.transformer(0).backbone.model)
        return [resize(normalised, size) for size in self.config.sizes]

    def see(self, x: Tensor) -> list[Features]:
        """Return what each scale's transformer sees: Features with logits and attention."""
        return self.see_pyramid(self.pyramid(x))

    def see_pyramid(self, pyramid: Sequence[Tensor]) -> list[Features]:
        """Return what each scale's transformer sees of what :meth:`pyramid` returned."""
        return [transformer.see(pixels) for transformer, pixels in zip(self._per_scale(), pyramid, strict=True)]

    def cams(self, features: Sequence[Features], classes: Tensor) -> list[Tensor]:
        """Return each scale's class activation maps (B, C, h, w), not normalised, with gradient.

        Args:
            features: what :meth:`see` returned.
            classes: (B, C) int64 in 0..num_classes-1, or -1 for the class-agnostic 'object': attention alone.
        """
        config = self.config
        return [
            transformer.cam(
                seen,
                classes,
                layers=config.layers,
                over_layers=config.over_layers,
                over_heads=config.over_heads,
                clip=config.clip,
            )
            for transformer, seen in zip(self._per_scale(), features, strict=True)
        ]

    def localize(self, x: Tensor, classes: Any = None, size: Sequence[int] | None = None) -> Tensor:
        """Return fused maps (B, C, H, W) in [0, 1] of the wanted classes, in x's dtype; only these are upsampled.

        Args:
            x: as for :meth:`forward`.
            classes: one class or a list of them for all images, by name or index; (B, C) indices, one row an image;
                -1 or ``"object"`` is class-agnostic; None takes each image's likeliest class.
            size: (H, W) of the maps in pixels; by default the input's.

        Raises:
            TypeError, ValueError: an argument of another type, shape or range.
        """
        _check_input(x, next(self.parameters()))
        wanted = None if classes is None else self._classes(classes, x)
        features = self.see(x)
        if wanted is None:
            wanted = fused_logits(features).argmax(-1, keepdim=True)
        target = (x.shape[2], x.shape[3]) if size is None else size
        return ops.fuse_maps(self.cams(features, wanted), target, self.config.scale_weights, order=self.config.order)

    def save(self, path: str | Path, *, backbones: bool = True) -> None:
        """Write weights and config to one safetensors file, whole or not at all; :func:`load_model` reads it.

        The config is JSON in the file's header.

        Args:
            path: the file; its folder is made where there is none.
            backbones: False leaves the backbones out, which makes a small file where they are frozen; loading then
                takes them from their usual source, and makes sure that they are the same.

        Raises:
            ValueError: backbones that are random, from a file or not frozen are to be left out: they could not be had
                again.
            OSError: the file cannot be written.
        """
        if not backbones:
            sources = [info.source for info in self.weights[: len(self.transformers)]]
            lost = "random" if "random" in sources else ""
            if any(source.startswith("file ") for source in sources):
                lost = lost or "from a file"
            if any(p.requires_grad for t in self._all() for p in t.backbone.parameters()):
                lost = lost or "not frozen (model.freeze_backbones())"
            if lost:
                raise ValueError(f"backbones must be saved too: they are {lost}, and could not be had again")
        state = {
            key: value.detach().cpu().contiguous()
            for key, value in self.state_dict().items()
            if backbones or ".backbone." not in key
        }
        header = {
            "format": FORMAT,
            "trained": self.trained,
            "backbones": backbones,
            "saw_masks": self.weights[0].saw_masks,
            "source": self.weights[0].source,
            "digests": [backbone_digest(transformer) for transformer in self._all()],
            "config": asdict(self.config),
        }
        save_tensors(user_path(path), state, {"molt": json.dumps(header)})

    def transformer(self, scale: int) -> ObjectLocalizationTransformer:
        """Return the transformer of a scale, by its place in ``config.sizes``."""
        return self._per_scale()[scale]

    def _all(self) -> list[ObjectLocalizationTransformer]:
        return list(self.transformers)  # type: ignore[arg-type]

    def _per_scale(self) -> list[ObjectLocalizationTransformer]:
        return self._all() * len(self.config.sizes) if self.config.shared else self._all()

    def _classes(self, classes: Any, x: Tensor) -> Tensor:
        """Return classes as (B, C) int64 on the input's device."""
        if isinstance(classes, str):
            classes = [classes]
        if isinstance(classes, list | tuple) and any(isinstance(name, str) for name in classes):
            classes = [find_class(name, self.class_names) for name in classes]
        try:
            wanted = torch.as_tensor(classes)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"classes must be names or integers, got {classes!r}") from error
        if wanted.is_floating_point() or wanted.is_complex() or wanted.dtype == torch.bool:
            raise TypeError(f"classes must be integers, got {str(wanted.dtype).removeprefix('torch.')}")
        if wanted.ndim < 2:
            wanted = wanted.reshape(1, -1).expand(len(x), -1)
        if wanted.ndim != 2 or len(wanted) != len(x) or wanted.shape[1] == 0:
            raise ValueError(f"classes must have shape ({len(x)}, C) or (C,), got {tuple(wanted.shape)}")
        read = wanted.device.type == "cpu" and wanted.numel() > 0 and not torch.compiler.is_compiling()
        if read and not OBJECT <= int(wanted.min()) <= int(wanted.max()) < self.config.num_classes:
            raise ValueError(
                f"classes must be in 0..{self.config.num_classes - 1}, or -1 for 'object', got {wanted.tolist()}"
            )
        return wanted.long().to(x.device)


def _some(module: nn.Module) -> Tensor:
    """Return some values of each of a module's parameters, enough to tell whether they changed."""
    picked = []
    for value in module.parameters():
        flat = value.detach().flatten()
        picked.append(flat[:: max(1, len(flat) // SAMPLES)])
    values = torch.cat(picked)
    return values if values.is_meta else values.cpu().clone()


def backbone_digest(transformer: ObjectLocalizationTransformer) -> str:
    """Return a short hash of a backbone's weights, to know it again."""
    return hashlib.sha256(_some(transformer.backbone).float().numpy().tobytes()).hexdigest()[:16]


def fused_logits(features: Sequence[Features]) -> Tensor:
    """Return the mean over scales of the logits (B, num_classes)."""
    return torch.stack([seen.logits for seen in features if seen.logits is not None]).mean(0)


def _check_input(x: object, weight: Tensor) -> None:
    if not isinstance(x, Tensor):
        hint = ": stack photos of one size, or give photos of any size to molt.Localizer" if isinstance(x, list) else ""
        raise TypeError(f"x must be a torch tensor (B, 3, H, W) in [0, 1], got {type(x).__name__}{hint}")
    if x.ndim != 4 or x.shape[1] != 3 or 0 in x.shape[2:]:
        raise ValueError(f"x must have shape (B, 3, H, W), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point in [0, 1] (uint8: divide by 255), got {x.dtype}")
    if len(x) == 0:
        raise ValueError("x must hold at least one image, got none")
    if x.device != weight.device:
        raise ValueError(f"x must be on {weight.device}, where the model is, got {x.device}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x must be {weight.dtype} as the model is, got {x.dtype}")
