"""Checkpoints of TS-CAM, DeiT and DINOv2, turned into files that :func:`molt.load_model` reads."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molt._arguments import LARGEST_SEED, check_int
from molt._files import user_path
from molt._words import count
from molt.backbones.weight_files import CheckpointError, misfits, read_tensors, some, told
from molt.backbones.weights import MASK_FREE
from molt.classes import imagenet_names
from molt.methods.molt import MOLT
from molt.methods.registry import BACKBONES, Size, create_model, list_models
from molt.structures import SawMasks, WeightsInfo

HEAD = ("head.weight", "head.bias")
# Of training alone; MOLT has no use for it.
HARMLESS = ("mask_token",)
HERE, HEAD_HERE = "transformers.0.backbone.model.", "transformers.0."


@dataclass(frozen=True)
class Outline:
    """What of a ViT can be read from its tensors, enough to know it by; sides in pixels.

    The number of attention heads, the epsilon of its norms and the mean and deviation of its pixels leave no trace:
    they come from the timm network with this outline.
    """

    width: int
    depth: int
    patch: tuple[int, int]
    side: int
    registers: int = 0
    layer_scale: bool = False

    def __str__(self) -> str:
        """Return it in words."""
        more = f", {count(self.registers, 'register token')}" if self.registers else ""
        return (
            f"width {self.width}, depth {self.depth}, patches of {self.patch[0]}x{self.patch[1]}, trained at "
            f"{self.side}x{self.side}{more}, {'with' if self.layer_scale else 'without'} LayerScale"
        )


def _deit(width: int, side: int = 224) -> Outline:
    return Outline(width, 12, (16, 16), side)


def _dinov2(width: int, depth: int, registers: int = 0) -> Outline:
    return Outline(width, depth, (14, 14), 518, registers, True)


# timm name -> the model's name and its outline.
KNOWN: dict[str, tuple[str, Outline]] = {
    "deit_tiny_patch16_224.fb_in1k": ("molt_deit_tiny", _deit(192)),
    "deit_small_patch16_224.fb_in1k": ("molt_deit_small", _deit(384)),
    "deit_base_patch16_224.fb_in1k": ("molt_deit_base", _deit(768)),
    "deit_base_patch16_384.fb_in1k": ("molt_deit_base", _deit(768, 384)),
}
for _size, _width, _depth in (("small", 384, 12), ("base", 768, 12), ("large", 1024, 24), ("giant", 1536, 40)):
    for _tag, _registers in (("", 0), ("_reg4", 4)):
        _name = f"vit_{_size}_patch14{_tag}_dinov2.lvd142m"
        KNOWN[_name] = ("molt_dinov2_small", _dinov2(_width, _depth, _registers))


@dataclass(frozen=True)
class Converted:
    """What :func:`convert_checkpoint` wrote.

    Attributes:
        path: the file.
        model, backbone: the names it has for :func:`molt.create_model`.
        num_classes: classes of the head.
        sizes: (H, W) in pixels of each scale; several share the weights.
        head: ``"patches"`` or ``"class_token"``.
        trained: whether the head came from the file; else it is random.
        saw_masks: ``"no"`` for a DeiT with its own ImageNet classifier, else ``"unknown"``.
        left_out: entries of the file that the model has no use for.
        notes: what one should know about the result, in sentences.
    """

    path: Path
    model: str
    backbone: str
    num_classes: int
    sizes: tuple[tuple[int, int], ...]
    head: str
    trained: bool
    saw_masks: SawMasks
    left_out: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        return asdict(self) | {"path": str(self.path)}


def convert_checkpoint(
    path: str | Path,
    out: str | Path,
    *,
    model: str | None = None,
    backbone: str | None = None,
    sizes: Sequence[Size] | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    new_head: bool = False,
    seed: int = 0,
    force: bool = False,
) -> Converted:
    """Turn a checkpoint of TS-CAM, DeiT or DINOv2 into a file for :func:`molt.load_model`.

    Which network a file is of, its tensors say. TS-CAM's convolution becomes the patch head, and with the one scale it
    was trained at maps and logits are TS-CAM's. A linear classifier on the class token becomes that head
    (``"class_token"``), so that an ImageNet DeiT localizes its classes without training. A network without classifier
    gets a new patch head, which is random until it is trained.

    Nothing in the file is run. It is left unchanged; the output is whole or not there.

    Args:
        path: file of ``torch.save`` or safetensors, in the key names of timm, TS-CAM, DeiT or DINOv2.
        out: file to write.
        model: one of :func:`molt.list_models`, in place of the one recognised; the tensors must fit it.
        backbone: timm name of another ViT with a class token, whose key names and shapes the file must have; needs
            ``model``, as for :func:`molt.create_model`.
        sizes: as for :func:`molt.create_model`; several scales share the one network. By default one: the side in
            pixels that the position embedding was made for.
        num_classes: classes of a new head; a head in the file must have as many.
        class_names: one name a class.
        new_head: True leaves the file's head out for a new one.
        seed: of a new head's random weights.
        force: True replaces an existing ``out``.

    Raises:
        FileNotFoundError: no such file.
        FileExistsError: ``out`` exists, and not ``force``.
        CheckpointError: a ValueError: a file that is broken or unsafe, of an unknown network, or does not fit.
        TypeError, ValueError: an argument of another type or out of range.
        OSError: the output cannot be written.
    """
    path, out = user_path(path), user_path(out)
    if model is not None and model not in BACKBONES:
        raise ValueError(f"model must be one of {', '.join(list_models())}, got {model!r}")
    if backbone is not None and model is None:
        raise ValueError(f"backbone {backbone!r} needs model, one of {', '.join(list_models())}")
    if out.is_dir() or (out.exists() and path.exists() and out.samefile(path)):
        raise FileExistsError(f"out must be another file than the one to convert, and no folder, got {out}")
    if out.exists() and not force:
        raise FileExistsError(f"out {out} exists: force (--force) replaces it")
    if isinstance(class_names, str):
        raise TypeError(f"class_names must be a sequence of names, got {class_names!r}")
    names = None if class_names is None else tuple(class_names)
    seed = check_int("seed", seed, 0, LARGEST_SEED)
    file = read_tensors(path)
    state, left_out = _timm_names(file.tensors, path)
    outline = _outline(state, path)
    name, network = _network(outline, model, backbone, state, path)
    if new_head:
        left_out += [f"{key} {_shape(state.pop(key))}" for key in HEAD if key in state]
    kind = _head(state, outline.width, path)
    trained, head = kind is not None, kind or "patches"
    count = _count(len(state["head.weight"]) if trained else None, num_classes, names, new_head, path)
    scales: Sequence[Size] = (outline.side,) if sizes is None else sizes
    options: dict[str, Any] = {
        "num_classes": count,
        "sizes": scales,
        "shared": isinstance(scales, Sequence) and len(scales) > 1,
        "pretrained": False,
        "backbone": network,
        "head": head,
        "class_names": names,
    }
    with torch.device("meta"):
        built = create_model(name, **options)
    _check_fit(built, state, trained, network, path)
    dtype = functools.reduce(torch.promote_types, {value.dtype for value in state.values()})
    tensors = {_here(key): value.detach().to(dtype, copy=True).contiguous() for key, value in state.items()}
    if not trained:
        tensors |= _random_head(built, seed, dtype)
    built.load_state_dict(tensors, assign=True)
    built.mark_trained(trained)
    classifies = head == "class_token" and count == len(imagenet_names())
    own = classifies and network in KNOWN and network.startswith("deit_") and network.endswith(MASK_FREE)
    saw_masks: SawMasks = "no" if own else "unknown"
    built.weights = (WeightsInfo(network, f"file {path.name}", saw_masks, False),)
    built.save(out)
    return Converted(
        path=out,
        model=name,
        backbone=network,
        num_classes=count,
        sizes=built.config.sizes,
        head=head,
        trained=trained,
        saw_masks=saw_masks,
        left_out=(*file.left_out, *left_out),
        notes=tuple(_notes(built, trained, outline, {value.dtype for value in state.values()})),
    )


def _timm_names(given: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return tensors under timm's names, as timm renames the original DINOv2's, and what was left out."""
    if any(key.startswith(("dist_token", "head_dist")) for key in given):
        raise CheckpointError(
            f"checkpoint {path} is a distilled DeiT: its second token and second classifier (dist_token, head_dist) "
            "have no place in a MOLT; take the DeiT of the same size without distillation"
        )
    state = {re.sub(r"\.mlp\.w(12|3)\.", lambda m: f".mlp.fc{1 if m[1] == '12' else 2}.", k): given[k] for k in given}
    if len(state) < len(given):
        raise CheckpointError(f"checkpoint {path} holds an MLP under both names, w12 and fc1")
    left_out = [key for key in HARMLESS if state.pop(key, None) is not None]
    if "register_tokens" in state:
        if "reg_token" in state:
            raise CheckpointError(f"checkpoint {path} holds both register_tokens and reg_token")
        state["reg_token"] = state.pop("register_tokens")
        position, token = state.get("pos_embed"), state.get("cls_token")
        if position is not None and token is not None and position.ndim == token.ndim == 3 and position.shape[1] > 1:
            if position.shape[::2] != token.shape[::2] or token.shape[1] != 1:
                raise CheckpointError(
                    f"checkpoint {path} has pos_embed {_shape(position)} and cls_token {_shape(token)}, which differ"
                )
            # timm's networks with registers embed the position of patches alone.
            state |= {"cls_token": token + position[:, :1], "pos_embed": position[:, 1:]}
    return state, left_out


def _outline(state: Mapping[str, Tensor], path: Path) -> Outline:
    """Read what a network is like from its tensors."""
    wanted = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}
    wrong = [
        f"{key} {_shape(state[key]) if key in state else 'missing'}"
        for key in wanted
        if _ndim(state, key) != wanted[key]
    ]
    blocks = {found[1] for key in state if (found := re.match(r"blocks\.(\d+)\.", key))}
    if wrong or not blocks:
        seen = some((f"{key} {_shape(value)}" for key, value in state.items()), 6)
        raise CheckpointError(
            f"checkpoint {path} is of no network known here: it holds {seen}; expected a ViT in the names of timm, "
            "TS-CAM or DINOv2: cls_token (1, 1, D), pos_embed (1, N, D), patch_embed.proj.weight (D, 3, P, P), blocks.N"
        )
    tokens = state["pos_embed"].shape[1]
    registers = state["reg_token"].shape[1] if _ndim(state, "reg_token") == 3 else 0
    grids = [math.isqrt(n) for n in (tokens, tokens - 1) if n > 0 and math.isqrt(n) ** 2 == n]
    patch = state["patch_embed.proj.weight"].shape
    if not grids or grids[0] < 2:
        raise CheckpointError(
            f"checkpoint {path} has a position embedding of {count(tokens, 'entry', 'entries')}, expected a square grid"
        )
    return Outline(
        width=state["cls_token"].shape[2],
        depth=len(blocks),
        patch=(patch[2], patch[3]),
        side=grids[0] * patch[2],
        registers=registers,
        layer_scale="blocks.0.ls1.gamma" in state,
    )


def _network(
    outline: Outline, model: str | None, backbone: str | None, state: Mapping[str, Tensor], path: Path
) -> tuple[str, str]:
    """Return the names of the model and of the timm network that a file is of."""
    if model is not None and backbone is not None:
        return model, backbone
    known = {network: entry for network, entry in KNOWN.items() if model in (None, entry[0])}
    for network, (name, expected) in known.items():
        if expected == outline:
            return name, network
    of = f"of {model} ({len(known)} known)" if model is not None else f"one of {len(known)}"
    near = sorted(known, key=lambda network: _distance(known[network][1], outline))[:2]
    closest = "; ".join(f"{network}: {known[network][1]}" for network in near)
    raise CheckpointError(
        f"checkpoint {path} has {outline}: expected the network {of}, nearest {closest}. Of another timm ViT: give "
        "model and backbone (--model NAME --backbone TIMM-NAME)"
    )


def _distance(a: Outline, b: Outline) -> tuple[int, int]:
    """Return in how many ways two networks differ, then how far in width."""
    return sum(x != y for x, y in zip(asdict(a).values(), asdict(b).values(), strict=True)), abs(a.width - b.width)


def _head(state: Mapping[str, Tensor], width: int, path: Path) -> str | None:
    """Return MOLT's name of the head in a file, or None where there is none."""
    weight = state.get("head.weight")
    if weight is None and "head.bias" in state:
        raise CheckpointError(f"checkpoint {path} has head.bias {_shape(state['head.bias'])} without head.weight")
    if weight is None:
        return None
    if weight.ndim == 4 and weight.shape[1:] == (width, 3, 3):
        return "patches"
    if weight.ndim == 2 and weight.shape[1] == width:
        return "class_token"
    raise CheckpointError(
        f"checkpoint {path} has head.weight {_shape(weight)}, expected TS-CAM's (C, {width}, 3, 3) or a linear "
        f"(C, {width})"
    )


def _count(found: int | None, num_classes: int | None, names: Sequence[str] | None, new_head: bool, path: Path) -> int:
    """Return the number of classes; ``found`` is that of the head in the file, or None."""
    if found is not None:
        for argument, given in (("num_classes", num_classes), ("class_names", None if names is None else len(names))):
            if given is not None and given != found:
                raise ValueError(
                    f"{argument} says {given}, the head in {path} has {count(found, 'class')}; new_head (--new-head) "
                    "leaves it out for a new one, to be trained"
                )
        return found
    if num_classes is None and names is None:
        why = f"the head in {path} is left out" if new_head else f"{path} holds no head"
        raise ValueError(f"num_classes or class_names is needed, as {why}: how many classes has the new one?")
    return len(names or ()) if num_classes is None else num_classes


def _random_head(model: MOLT, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a new head; the process's random numbers stay as they were."""
    head = copy.deepcopy(model.transformer(0).head).to_empty(device="cpu")
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed)
        head.reset_parameters()
    return {_here(f"head.{key}"): value.to(dtype) for key, value in head.state_dict().items()}


def _check_fit(shell: MOLT, state: Mapping[str, Tensor], trained: bool, network: str, path: Path) -> None:
    """Hold names and shapes to those of the network, before any memory is spent on it."""
    expected = {key.removeprefix(HERE).removeprefix(HEAD_HERE): value for key, value in shell.state_dict().items()}
    if not trained:
        expected = {key: value for key, value in expected.items() if key not in HEAD}
    if any((faults := misfits(state, expected)).values()):
        raise CheckpointError(f"checkpoint {path} does not fit {network}: {told(faults, len(expected))}")


def _notes(model: MOLT, trained: bool, outline: Outline, dtypes: set[torch.dtype]) -> list[str]:
    """Return what one should know about a result."""
    config = model.config
    heads = model.transformer(0).backbone.model.blocks[0].attn.num_heads
    notes = [
        f"{heads} attention heads, pixels normalised by mean {_numbers(model.mean)} and deviation "
        f"{_numbers(model.std)}: as {config.backbone} has them, a checkpoint does not say"
    ]
    if not trained:
        notes.append("the head is random: classes and maps mean nothing until it is trained")
    elif config.head == "class_token":
        notes.append(
            "the file's linear classifier on the class token gives the logits; maps are its response at each patch "
            "token times attention, though it was trained on the class token alone"
        )
    else:
        notes.append("the file's convolution on patch tokens gives logits and maps, as in TS-CAM")
        if config.num_classes == len(imagenet_names()):
            notes.append("TS-CAM's training on 1000 classes starts from the bias of DeiT's classifier: kept as it is")
    if trained and config.class_names is None:
        known = config.num_classes == len(imagenet_names())
        notes.append(f"classes are named {'as ImageNet-1k has them, in its order' if known else 'class 0, class 1...'}")
    if config.sizes != ((outline.side, outline.side),):
        notes.append(f"the network was trained at {outline.side}x{outline.side}: position embeddings are resampled")
    if len(dtypes) > 1:
        notes.append(f"tensors of several dtypes became {str(next(model.parameters()).dtype).removeprefix('torch.')}")
    return notes


def _here(key: str) -> str:
    return (HEAD_HERE if key in HEAD else HERE) + key


def _shape(value: Tensor) -> str:
    return str(tuple(value.shape))


def _ndim(state: Mapping[str, Tensor], key: str) -> int | None:
    return state[key].ndim if key in state else None


def _numbers(values: Sequence[float]) -> str:
    return "/".join(f"{value:g}" for value in values)
