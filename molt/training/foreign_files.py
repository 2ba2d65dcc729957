"""Tensors out of checkpoints that other programs wrote, without running anything that such a file holds."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

LARGEST_FILE = 16 * 2**30  # bytes
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WRAPPERS = ("state_dict", "model", "model_state_dict", "model_state")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
# What training programs store beside the weights and no network is rebuilt from, but for numbers and texts.
BESIDE = (
    "amp",
    "args",
    "cfg",
    "config",
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
    """A file that cannot be converted; the message says what was found and what was expected."""


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


def read_tensors(path: Path) -> ForeignFile:
    """Read the state dict in a safetensors file or one of ``torch.save``, on the CPU.

    One of the wrappers around it (``state_dict``, ``model``...) and the prefixes of DataParallel and torch.compile are
    taken off. Pickles are read with ``weights_only=True``. Which kind of file it is, its first bytes say, not its name.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: a file too large, broken, or of something else; entries beside the weights that are not known
            to be harmless; tensors that are not dense floats, claim more than the file holds, or are NaN or infinite.
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
    tensors, left_out = _unwrap(content, path)
    _check(tensors, size, path)
    return ForeignFile(tensors, left_out)


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


def _unwrap(content: Any, path: Path) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the state dict and the names of what lay around it."""
    left_out: list[str] = []
    while True:
        if not isinstance(content, Mapping) or not content:
            what = "nothing" if isinstance(content, Mapping) else type(content).__name__
            raise CheckpointError(f"checkpoint {path} holds {what}, expected a state dict: tensors by name")
        if strange := [key for key in content if not isinstance(key, str)]:
            raise CheckpointError(f"checkpoint {path} names entries by {type(strange[0]).__name__}, expected text")
        names = list(content)
        inner = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        if len(inner) > 1:
            raise CheckpointError(f"checkpoint {path} holds several state dicts: {', '.join(inner)}; keep one of them")
        if unknown := [k for k, v in content.items() if k != inner[0] and k not in BESIDE and not _is_small(v)]:
            raise CheckpointError(
                f"checkpoint {path} holds more than {inner[0]!r}, not known to be harmless: {some(unknown)}"
            )
        left_out += [some([name]) for name in names if name != inner[0]]
        content = content[inner[0]]
    if wrong := [f"{name} ({type(value).__name__})" for name, value in content.items() if not _is_tensor(value)]:
        raise CheckpointError(f"checkpoint {path} holds entries that are no tensors: {some(wrong)}")
    for prefix in PREFIXES * 2:  # in either order
        if all(name.startswith(prefix) for name in names):
            names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, content.values(), strict=True)), tuple(left_out)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_small(value: Any) -> bool:
    """Tell a number, a text or the like from something that may hold weights."""
    scalar = _is_tensor(value) and value.ndim == 0
    return scalar or value is None or isinstance(value, bool | int | float | str | _Ignored)


def _check(tensors: Mapping[str, Tensor], size: int, path: Path) -> None:
    total = 0
    for name, value in tensors.items():
        dense = value.layout == torch.strided and not value.is_nested
        if not dense or value.dtype not in DTYPES or value.device.type != "cpu":
            kind = f"{str(value.dtype).removeprefix('torch.')}, {value.layout}, {value.device.type}"
            raise CheckpointError(f"checkpoint {path} holds {some([name])} as {kind}, expected dense floats")
        total += value.numel() * value.element_size()
    # Strides can spread a few bytes over any shape.
    if total > size:
        raise CheckpointError(f"checkpoint {path} claims {total:,} bytes of tensors and has {size:,}")
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"checkpoint {path} holds NaN or infinity in {some([name])}")
