"""Which implementation an operator uses, and what this installation has."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch

from molt import __version__, _extension

Backend = Literal["auto", "reference", "native"]
BACKENDS = ("auto", "reference", "native")

_logger = logging.getLogger("molt")


def _checked(value: str, source: str) -> str:
    if value not in BACKENDS:
        raise ValueError(f"{source}: got {value!r}, expected one of {', '.join(BACKENDS)}")
    return value


_default = _checked(os.environ.get("MOLT_BACKEND") or "auto", "MOLT_BACKEND")
_chosen: ContextVar[str | None] = ContextVar("molt_backend", default=None)
# An older torch.compile cannot read a context variable; it reads and guards this copy instead.
_READS_CONTEXT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 15)
_latest: str | None = None


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Use one backend inside a ``with`` block: ``"auto"``, ``"reference"`` or ``"native"``.

    The choice is a context variable: it holds for this thread or task only. Enter it outside compiled regions; those
    follow it, though before torch 2.15 they follow the latest choice made in any thread.

    Raises:
        ValueError: no such backend.
    """
    global _latest  # noqa: PLW0603  what compiled code reads where it cannot read a context variable
    token = _chosen.set(_checked(name, "backend"))
    _latest = name
    try:
        yield
    finally:
        _chosen.reset(token)
        _latest = _chosen.get()


def current() -> str:
    """Return the backend in force here: the ``with`` block's, else ``MOLT_BACKEND`` as it was at import, else auto."""
    if not _READS_CONTEXT and torch.compiler.is_compiling():
        return _latest or _default
    return _chosen.get() or _default


@functools.cache
def _say_once(level: int, text: str) -> None:
    _logger.log(level, "%s", text)


# On the GPU these are Triton kernels; the others are CUDA C++.
TRITON_OPS = ("upsample_normalize", "fuse_maps", "kmeans")


def _missing(op: str, device: torch.device) -> str | None:
    if device.type == "cpu":
        return None if _extension.CPU.module else f"{_extension.CPU.reason}; {_extension.HOW_TO_GET}"
    if device.type != "cuda":
        return f"there is no native kernel for {device.type} tensors, only for cpu and cuda"
    if op in TRITON_OPS:
        return _extension.TRITON_MISSING
    if _extension.CUDA.module is None:
        return f"{_extension.CUDA.reason}; {_extension.HOW_TO_GET_CUDA}"
    if torch.compiler.is_compiling():
        return None  # which cannot ask the device; the launch tells
    return _extension.unfit_gpu(torch.cuda.current_device() if device.index is None else device.index)


def use_native(op: str, device: torch.device, requested: str | None, without: str | None = None) -> bool:
    """Say whether `op` runs natively on `device`; `without` says why this call cannot, where it cannot anywhere.

    Raises:
        ValueError: `requested` is no backend.
        RuntimeError: the native backend was named, and there is none; says what is missing and how to get it.
    """
    wanted = current() if requested is None else _checked(requested, "backend")
    if wanted == "reference":
        return False
    missing = without or _missing(op, device)
    if missing is None:
        return True
    level = logging.INFO if without or device.type not in ("cpu", "cuda") else logging.WARNING
    if wanted == "native":
        raise RuntimeError(f"{op}: backend 'native' cannot run: {missing}")
    if not torch.compiler.is_compiling():
        _say_once(level, f"{op} uses the PyTorch reference: {missing}")
    return False


def config() -> dict[str, Any]:
    """Return what this installation has and uses, as plain values."""
    extension = _extension.CPU
    build = {} if extension.module is None else dict(extension.module.build_config())
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "molt": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": triton,
        "threads": torch.get_num_threads(),
        "backend": current(),
        "native": extension.module is not None,
        "native_missing": None if extension.module is not None else f"{extension.reason}; {_extension.HOW_TO_GET}",
        "native_file": getattr(extension.module, "__file__", None),
        "native_build": build,
        "cuda": _extension.CUDA.module is not None,
        "cuda_missing": None if _extension.CUDA.module else str(_extension.CUDA.reason),
        "cuda_file": getattr(_extension.CUDA.module, "__file__", None),
    }


def show_config() -> None:
    """Print `config()`, one line a value."""
    for key, value in config().items():
        if isinstance(value, dict):
            for inner, item in value.items():
                print(f"{key}.{inner}: {item}")
        else:
            print(f"{key}: {value}")
