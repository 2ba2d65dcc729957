"""What the operators share on their way to torch.ops.molt: calling, and registering what the C++ side cannot."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from molt import _extension

_TRITON_SCHEMAS = (
    "upsample_normalize(Tensor maps, SymInt height, SymInt width) -> Tensor",
    "fuse_maps(Tensor[] maps, SymInt height, SymInt width, float[] weights) -> Tensor",
    "kmeans(Tensor features, Tensor centres, int iterations, bool cosine) -> (Tensor, Tensor, Tensor)",
)


def call(name: str, *arguments: Any) -> Any:
    """Call an operator; in eager mode a value out of range is a ValueError, as the reference raises it."""
    op = getattr(torch.ops.molt, name)
    if torch.compiler.is_compiling():
        return op(*arguments)
    try:
        return op(*arguments)
    except RuntimeError as error:
        if str(error).startswith(("labels: ", "segments: ", "num_clusters: ", "images: ")):
            raise ValueError(str(error)) from None
        raise


def register(
    name: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
) -> None:
    """Register an operator's shapes and gradient, where its schema is there."""
    if not hasattr(torch.ops.molt, name):
        return

    @functools.wraps(fake)
    def on_one_device(*arguments: Any, **named: Any) -> Any:
        # A meta tensor among others brings a call here, where the answer would be memory that nothing wrote.
        lists = (value if isinstance(value, list | tuple) else [value] for value in (*arguments, *named.values()))
        devices = {str(value.device) for values in lists for value in values if isinstance(value, Tensor)}
        if len(devices) > 1 and "meta" in devices:
            raise RuntimeError(f"{name}: got tensors on {' and '.join(sorted(devices))}, expected one device")
        return fake(*arguments, **named)

    torch.library.register_fake(f"molt::{name}", on_one_device)
    if backward is not None:
        torch.library.register_autograd(f"molt::{name}", backward, setup_context=setup_context)


def _register_triton() -> torch.library.Library | None:
    """Give the operators that are Triton on a GPU their kernels there, and their schemas where molt._C is missing."""
    if _extension.TRITON_MISSING is not None:
        return None
    library = torch.library.Library("molt", "FRAGMENT")
    if _extension.CPU.module is None:
        for schema in _TRITON_SCHEMAS:
            library.define(schema)
    library.impl("upsample_normalize", lambda maps, height, width: _fuse([maps], height, width, [1.0]), "CUDA")
    library.impl("fuse_maps", _fuse, "CUDA")
    library.impl("kmeans", _kmeans, "CUDA")
    return library


def _fuse(maps: Sequence[Tensor], height: int, width: int, weights: Sequence[float]) -> Tensor:
    from molt.kernels.fuse_maps import fuse_maps

    return fuse_maps(list(maps), (height, width), list(weights))


def _kmeans(features: Tensor, centres: Tensor, iterations: int, cosine: bool) -> tuple[Tensor, Tensor, Tensor]:
    from molt.kernels.kmeans import kmeans

    return kmeans(features, centres, iterations, cosine)


_library = _register_triton()
