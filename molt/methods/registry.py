"""MOLT models by name, and from files."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from molt._arguments import check_int
from molt._files import user_path
from molt.backbones.weights import VIT
from molt.methods.config import MOST_LAYERS, MOLTConfig
from molt.methods.molt import FORMAT, MOLT, backbone_digest
from molt.structures import SawMasks, WeightsInfo

BACKBONES = {
    "molt_deit_tiny": "deit_tiny_patch16_224.fb_in1k",
    "molt_deit_small": "deit_small_patch16_224.fb_in1k",
    "molt_deit_base": "deit_base_patch16_224.fb_in1k",
    "molt_dinov2_small": VIT,
}
SIZES = (224, 336, 448)
MOST_PARAMETERS = 4_000_000_000

Size = int | tuple[int, int]


def list_models() -> list[str]:
    """Return the names :func:`create_model` knows."""
    return sorted(BACKBONES)


def create_model(
    name: str,
    num_classes: int = 1000,
    sizes: Sequence[Size] = SIZES,
    shared: bool = False,
    pretrained: bool = True,
    *,
    backbone: str | None = None,
    head: str = "patches",
    pooling: str = "mean",
    layers: Sequence[int] | None = None,
    over_layers: str = "sum",
    over_heads: str = "mean",
    clip: bool = False,
    order: str = "resize_first",
    scale_weights: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    source: str = "auto",
) -> MOLT:
    """Build a MOLT with a new head, in eval mode.

    Args:
        name: one of :func:`list_models`.
        num_classes: classes of the head, at least 1.
        sizes: one a scale: the side of a square or (H, W) in pixels, multiples of the backbone's patch size.
        shared: True uses one network at all scales; False gives each its own, as the paper has it.
        pretrained: False leaves the backbones' weights random.
        backbone: timm name of another ViT with a class token, in place of the name's own.
        head: ``"patches"``: a 3x3 convolution on the patch sequence, averaged; ``"class_token"``: a linear layer on
            the class token, for comparison; ``"spatial"``: the convolution and a learned spatial token, whose mask
            over the patches is the map of every class (SAT, ICCV 2023), for backbones of plain timm ViT blocks.
        pooling: of the patch head's responses to logits: ``"mean"``, or ``"attention"``, weighted by what the class
            token attends to.
        layers: blocks whose attention counts, negative ones from the end; None takes all. Like the next two it does
            not apply to ``"spatial"``.
        over_layers: ``"sum"``, ``"mean"`` or ``"max"`` of the layers' attention.
        over_heads: ``"mean"`` or ``"max"`` of the heads' attention.
        clip: True takes negative responses of the head for 0 in maps.
        order: ``"resize_first"``, then min-max; or ``"normalize_first"``.
        scale_weights: one number a scale for fusing the maps; None weighs all alike.
        class_names: one name a class.
        source: where backbone weights come from, see :func:`molt.backbones.weights.create_timm`.

    Raises:
        TypeError, ValueError: an unknown name, or an argument of another type or out of range.
        FileNotFoundError: the backbone's weights are nowhere to be had; the message says how to get them.
    """
    if not isinstance(name, str) or name not in BACKBONES:
        near = difflib.get_close_matches(str(name), BACKBONES, n=3, cutoff=0.5) or list_models()
        raise ValueError(f"model {name!r} is unknown; did you mean: {', '.join(near)}?")
    config = MOLTConfig(
        name=name,
        backbone=BACKBONES[name] if backbone is None else backbone,
        num_classes=check_int("num_classes", num_classes, 1),
        sizes=_sizes(sizes),
        shared=shared,
        head=head,
        pooling=pooling,
        layers=None
        if layers is None
        else tuple(check_int("layers", n, -MOST_LAYERS) for n in _listed("layers", layers)),
        over_layers=over_layers,
        over_heads=over_heads,
        clip=clip,
        order=order,
        scale_weights=None if scale_weights is None else _listed("scale_weights", scale_weights),
        class_names=None if class_names is None else _listed("class_names", class_names),
    )
    return MOLT(config, pretrained=pretrained, source=source)


def load_model(path: str | Path, *, source: str = "auto") -> MOLT:
    """Read a MOLT that :meth:`MOLT.save` wrote, on the CPU, in its dtype and in eval mode.

    Backbones that are not in the file stay frozen.

    Args:
        path: the file.
        source: where backbones come from that were left out of the file.

    Raises:
        FileNotFoundError: no such file, or backbone weights that are nowhere to be had.
        ValueError: not such a file, or one whose config or weights do not fit; the message says what.
    """
    path = user_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist or is not a file")
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("molt", "null"))
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint {path} is not a safetensors file of molt: {error}") from error
    if header is None:
        raise ValueError(f"checkpoint {path} holds no MOLT: model.save(FILE) writes one")
    config = _config(header, path)
    whole = bool(header.get("backbones"))
    _check_fit(config, shapes, whole, path)
    model = MOLT(config, pretrained=not whole, source=source)
    state = load_file(path)
    model.to(next(iter(state.values())).dtype).load_state_dict(state, strict=False)
    model.mark_trained(bool(header.get("trained")))
    if whole:
        given = header.get("saw_masks")
        saw_masks: SawMasks = given if given in get_args(SawMasks) else "unknown"
        model.weights = (WeightsInfo(config.backbone, f"file {path}", saw_masks, False),) * len(model.weights)
        return model
    found = [backbone_digest(model.transformer(i)) for i in range(len(model.transformers))]
    if found != header.get("digests"):
        raise ValueError(
            f"checkpoint {path} holds heads for other backbone weights: made with {header.get('source')!r:.200}, here "
            f"they come from {model.weights[0].source!r}; choose with source='package' or 'hub'"
        )
    heads = WeightsInfo(f"{config.name}, heads", f"file {path}", "unknown", False)
    model.freeze_backbones()
    model.weights = (*(replace(info, measured=False) for info in model.weights), heads)
    return model


def model_in(path: str | Path) -> str | None:
    """Return the name of the model that a file says it holds, None where it is no file of :meth:`MOLT.save`."""
    try:
        with safe_open(user_path(path), "pt") as file:
            header = json.loads((file.metadata() or {}).get("molt", "null"))
        return str(header["config"]["name"])
    except (OSError, SafetensorError, ValueError, RecursionError, TypeError, KeyError):
        return None


def _config(header: Any, path: Path) -> MOLTConfig:
    """Return the config of a header that anyone may have written."""
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else header
        raise ValueError(f"checkpoint {path} has format {found!r}, this molt reads {FORMAT}: another version wrote it")
    given = header.get("config")
    try:
        known = {field.name for field in fields(MOLTConfig)}
        if not isinstance(given, dict):
            raise TypeError(f"it must be an object, got {given!r}")
        values = {k: _tuples(v) for k, v in given.items()}
        if unknown := set(values) - known:
            raise ValueError(f"unknown entries {', '.join(sorted(unknown))}")
        return MOLTConfig(**values)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint {path} has a config that does not hold: {error}") from error


def _check_fit(config: MOLTConfig, got: dict[str, tuple[int, ...]], whole: bool, path: Path) -> None:
    """Hold the tensors in a file to its config, before any memory is spent on either."""
    try:
        with torch.device("meta"):
            shell = MOLT(config, pretrained=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {path} has a config that does not hold: {error}") from error
    if sum(p.numel() for p in shell.parameters()) > MOST_PARAMETERS:
        raise ValueError(f"checkpoint {path} asks for a network of more than {MOST_PARAMETERS:,} parameters")
    expected = {k: tuple(v.shape) for k, v in shell.state_dict().items() if whole or ".backbone." not in k}
    wrong = [f"{k} is {got[k]}, expected {expected[k]}" for k in expected if k in got and got[k] != expected[k]]
    missing = [k for k in expected if k not in got]
    more = [k for k in got if k not in expected]
    for what, found in (("shapes", wrong), ("missing", missing), ("unexpected", more)):
        if found:
            rest = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ValueError(f"checkpoint {path} does not fit its config: {what}: {'; '.join(found[:3])}{rest}")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _listed(name: str, value: Any) -> tuple[Any, ...]:
    """Return a sequence, array or tensor as a tuple."""
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        raise TypeError(f"{name} must be a sequence, got {value!r}")
    return tuple(value.tolist() if hasattr(value, "tolist") else value)


def _sizes(sizes: Sequence[Size]) -> tuple[tuple[int, int], ...]:
    pairs = []
    for size in _listed("sizes", sizes):
        pair = _listed("sizes", size) if isinstance(size, list | tuple) else (size, size)
        if len(pair) != 2:
            raise TypeError(f"sizes must hold sides or (H, W) pairs, got {size!r}")
        pairs.append((check_int("sizes", pair[0], 1), check_int("sizes", pair[1], 1)))
    return tuple(pairs)
