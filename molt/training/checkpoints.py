"""The state of a training run in one file, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from molt._files import save_tensors

FORMAT = 1
MOST_BYTES = 2**36


class TrainingError(RuntimeError):
    """A run that cannot begin or go on; the message says why and what is kept."""


def write_state(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and plain values to one safetensors file; where that fails, the file from before stays.

    Raises:
        OSError: the file cannot be written.
    """
    held = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    about = {"format": FORMAT, **header}
    save_tensors(path, held, {"molt_training": json.dumps(about)})


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and header of what :func:`write_state` wrote.

    Raises:
        TrainingError: not such a file, or one that is damaged.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise TrainingError(f"{path} is larger than {MOST_BYTES} bytes, no state of a run is")
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("molt_training", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise TrainingError(f"{path} is no state of a training run: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise TrainingError(f"{path} holds no state of a training run that this molt reads")
    return tensors, header


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's state as tensors by name and the rest as plain values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                plain[f"{index}.{key}"] = value
    return tensors, {"plain": plain, "groups": state["param_groups"]}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Put back what :func:`optimizer_tensors` returned.

    Raises:
        TrainingError: a state of another optimizer.
    """
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = value
    for name, plain in header["plain"].items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = plain
    try:
        optimizer.load_state_dict({"state": state, "param_groups": header["groups"]})
    except (ValueError, KeyError, RuntimeError) as error:
        raise TrainingError(f"the optimizer's state does not fit: {error}") from error
