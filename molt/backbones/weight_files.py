"""Tensors out of weight files that other programs wrote, without running anything that such a file holds."""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

logger = logging.getLogger("molt")

LARGEST_FILE = 16 * 2**30  # bytes
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
# Names of the entries, and first parts of tensors' names, that training programs put around a network, in any order
# and depth. Of two that fit alike the one further ahead is taken: averages of training are what is evaluated.
AROUND = (
    "state_dict_ema",
    "model_ema",
    "ema",
    "teacher",
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "student",
    "backbone",
    "encoder",
    "base_encoder",
    "encoder_q",
    "module",
    "_orig_mod",
)
DEEPEST = 8
# By which a ViT is found where the network is not known.
ANCHORS: dict[str, Tensor | None] = dict.fromkeys(("cls_token", "pos_embed", "patch_embed.proj.weight"))
# What training programs store beside the weights and no network is rebuilt from, but for numbers and texts.
BESIDE = (
    "amp",
    "args",
    "cfg",
    "config",
    "ema",
    "hyper_parameters",
    "loss_scaler",
    "lr_scheduler",
    "model_ema",
    "optimizer",
    "scaler",
    "scheduler",
    "state_dict_ema",
)


class CheckpointError(ValueError):
    """A weight file that cannot be read or does not fit; the message says what was found and what was expected."""


class _Ignored:
    """Stands for a harmless object beside the weights, such as the options of a training run; keeps nothing of it."""

    def __new__(cls, *_: Any) -> _Ignored:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# A pickle gets our class under these names: nothing of argparse or NumPy is called. The list is torch's, of the whole
# process: a torch.load in another thread at that moment would get it too.
STAND_INS: Any = [
    (_Ignored, name)
    for name in (
        "argparse.Namespace",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.scalar",
        "numpy.dtype",
        "numpy.dtypes.Float32DType",
        "numpy.dtypes.Float64DType",
        "numpy.dtypes.Int64DType",
    )
]


@dataclass(frozen=True)
class ForeignFile:
    """Tensors by name, and the entries beside them that were left out."""

    tensors: dict[str, Tensor]
    left_out: tuple[str, ...]


def read_tensors(path: Path, wanted: Mapping[str, Tensor] | None = None) -> ForeignFile:
    """Read the state dict in a safetensors file or one of ``torch.save``, on the CPU.

    What training programs put around it (``state_dict``, ``model``, ``teacher``..., ``module.``, ``backbone.``...) is
    taken off. Pickles are read with ``weights_only=True``. Which kind of file it is, its first bytes say, not its name.

    Args:
        path: the file.
        wanted: state dict of the network to be filled: of several networks in the file the one with most of these
            tensors is taken, and whatever else it holds is let pass. None refuses several, and entries beside the
            weights that are not known to be harmless.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: a file too large, broken, or of something else; tensors that are not dense floats (or, with
            ``wanted``, integers), claim more than the file holds, or are NaN or infinite.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist or is not a file")
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise CheckpointError(f"checkpoint {path} has {size:,} bytes, expected at most {LARGEST_FILE:,}")
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        content: Any = _safetensors(path)
    else:
        content = _pickled(path, zipped=start.startswith(b"PK\x03\x04"))
    tensors, left_out = _unwrap(content, path, wanted)
    _check(tensors, size, path, DTYPES if wanted is None else DTYPES + INTEGERS)
    return ForeignFile(tensors, left_out)


def misfits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the tensors that differ in shape, that are missing and that are left over, each with its shape.

    Counts of batches, of which nothing in evaluation depends, may be missing.
    """
    wrong = [
        f"{name} {_kind(found[name])}, expected {_kind(value)}"
        for name, value in wanted.items()
        if name in found and _kind(found[name]) != _kind(value)
    ]
    missing = [name for name in wanted if name not in found and not name.endswith("num_batches_tracked")]
    more = [f"{name} {_kind(value)}" for name, value in found.items() if name not in wanted]
    return {"shapes": wrong, "missing": missing, "left over": more}


def told(faults: Mapping[str, list[str]], count: int) -> str:
    """Return what :func:`misfits` found in words; ``count`` tensors were expected."""
    return "; ".join(
        f"{what}: {some(names)}" + (f" ({len(names)} of {count})" if len(names) > 1 and what != "left over" else "")
        for what, names in faults.items()
        if names
    )


def some(names: Iterable[str], most: int = 4) -> str:
    """Return the first few of some names from a file, fit to be printed."""
    names = list(names)
    shown = ", ".join(name if name.isprintable() and len(name) <= 80 else ascii(name)[:80] for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            if "molt" in (file.metadata() or {}):
                raise CheckpointError(f"checkpoint {path} is a MOLT already: molt.load_model reads it as it is")
        return dict(load_file(path))
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint {path} is a broken safetensors file: {error}") from error


def _pickled(path: Path, *, zipped: bool) -> Any:
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                # torch.save never compresses; a small file must not unfold to a large one.
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise CheckpointError(f"checkpoint {path} is a compressed archive, expected one of torch.save")
        with torch.serialization.safe_globals(STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except Exception as error:  # a broken pickle may raise anything
        # torch's own message advises to load the file unsafely.
        if found := re.search(r"GLOBAL (\S{1,100})|module (\S{1,100}) is blocked", str(error)):
            reason = f"it names {ascii(found[1] or found[2])[1:-1]}, which may run code: it is not loaded"
        else:
            reason = "expected a safetensors file or tensors of torch.save, without code"
        raise CheckpointError(f"checkpoint {path} cannot be read safely ({type(error).__name__}): {reason}") from None


def _unwrap(content: Any, path: Path, wanted: Mapping[str, Tensor] | None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the state dict and the names of what lay around it."""
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"checkpoint {path} holds {type(content).__name__}, expected a state dict: tensors by name"
        )
    entries = dict(_entries(content, path))
    if not entries:
        raise CheckpointError(f"checkpoint {path} holds nothing, expected a state dict: tensors by name")
    groups: dict[str, dict[str, Any]] = {}
    for name, value in entries.items():
        at, parts = 0, name.split(".")
        for part in (*parts, ""):
            groups.setdefault(name[:at], {})[name[at:]] = value
            if part not in AROUND:
                break
            at += len(part) + 1
    if wanted is None:
        groups = {prefix: group for prefix, group in groups.items() if _first(prefix) not in BESIDE}
    count = len(entries)
    scores = {
        prefix: (*_score(group, ANCHORS if wanted is None else wanted), 3 * len(group) >= count)
        for prefix, group in groups.items()
    }
    best = max(groups, key=lambda prefix: (*scores[prefix], _rank(prefix)))
    if others := [
        prefix
        for prefix, score in scores.items()
        if score[:2] == scores[best][:2] > (0, 0) and not best.startswith(prefix) and not prefix.startswith(best)
    ]:
        several = some(prefix[:-1] for prefix in (best, *others))
        if wanted is None:
            raise CheckpointError(f"checkpoint {path} holds several state dicts: {several}; keep one of them")
        logger.warning("checkpoint %s holds several networks: %s; the first is taken", path, several)
    group, outside = groups[best], {name: value for name, value in entries.items() if not name.startswith(best)}
    if wanted is not None:
        # A classifier may lie beside its backbone.
        ends = [0, *(at + 1 for at, letter in enumerate(best[:-1]) if letter == ".")]
        for around in (best[:end] for end in reversed(ends)):
            group = {name: outside[around + name] for name in wanted if around + name in outside} | group
        return {name: value for name, value in group.items() if _is_tensor(value)}, ()
    if wrong := [f"{name} ({type(value).__name__})" for name, value in group.items() if not _is_tensor(value)]:
        raise CheckpointError(f"checkpoint {path} holds entries that are no tensors: {some(wrong)}")
    if unknown := [k for k, v in outside.items() if _first(k) not in BESIDE and not _is_small(v)]:
        raise CheckpointError(
            f"checkpoint {path} holds more than {best[:-1]!r}, not known to be harmless: {some(unknown)}"
        )
    names = (_first(name) if _first(name) in BESIDE else name for name in outside)
    return group, tuple(some([name]) for name in dict.fromkeys(names))


def _entries(content: Mapping[Any, Any], path: Path, around: str = "") -> Iterator[tuple[str, Any]]:
    """Yield names and values, those inside of known entries too."""
    if around.count(".") > DEEPEST:
        raise CheckpointError(f"checkpoint {path} nests entries more than {DEEPEST} deep: {some([around])}")
    for key, value in content.items():
        if not isinstance(key, str):
            raise CheckpointError(f"checkpoint {path} names entries by {type(key).__name__}, expected text")
        if key in AROUND and isinstance(value, Mapping):
            yield from _entries(value, path, f"{around}{key}.")
        else:
            yield around + key, value


def _score(group: Mapping[str, Any], wanted: Mapping[str, Tensor | None]) -> tuple[int, int]:
    """Return how many tensors are there with their shape, and how many at all."""
    there = {name: value for name, value in wanted.items() if _is_tensor(group.get(name))}
    return sum(value is None or value.shape == group[name].shape for name, value in there.items()), len(there)


def _rank(prefix: str) -> list[int]:
    return [-AROUND.index(part) for part in prefix.split(".")[:-1]]


def _first(name: str) -> str:
    return name.split(".", 1)[0]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_small(value: Any) -> bool:
    """Tell a number, a text or the like from something that may hold weights."""
    scalar = _is_tensor(value) and value.ndim == 0
    return scalar or value is None or isinstance(value, bool | int | float | str | _Ignored)


def _kind(value: Tensor) -> str:
    return f"{tuple(value.shape)}" + ("" if value.is_floating_point() else " of integers")


def _check(tensors: Mapping[str, Tensor], size: int, path: Path, dtypes: tuple[torch.dtype, ...]) -> None:
    total = 0
    for name, value in tensors.items():
        dense = value.layout == torch.strided and not value.is_nested
        if not dense or value.dtype not in dtypes or value.device.type != "cpu":
            kind = f"{str(value.dtype).removeprefix('torch.')}, {value.layout}, {value.device.type}"
            raise CheckpointError(f"checkpoint {path} holds {some([name])} as {kind}, expected dense floats")
        total += value.numel() * value.element_size()
    # Strides can spread a few bytes over any shape.
    if total > size:
        raise CheckpointError(f"checkpoint {path} claims {total:,} bytes of tensors and has {size:,}")
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"checkpoint {path} holds NaN or infinity in {some([name])}")
