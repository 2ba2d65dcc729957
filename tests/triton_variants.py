"""Counts what Triton would compile for tests that need a GPU, without one: a plugin of pytest.

    PYTHONPATH=tests python -m pytest -m gpu -p triton_variants tests/test_triton_kernels.py

Tensors stay on the CPU, whose kernels give the results, and each launch is reduced to what tells one compiled kernel
from another: constants, options, types, and for those arguments that are specialised whether 16 divides them or they
are 1. Tests that use streams or graphs fail where they reach for the device; only launches are of interest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from molt import ops
from molt.kernels import fuse_maps as fusion
from molt.kernels import kmeans as clusters

LAUNCHES: Counter[tuple[Any, ...]] = Counter()
KERNELS = [(fusion, "_fuse_kernel")]
KERNELS += [(clusters, name) for name in ("_assign_kernel", "_sum_kernel", "_centre_kernel", "_total_kernel")]


def kind(value: Any, special: bool) -> tuple[Any, ...]:
    """What the compiler knows of an argument."""
    if torch.is_tensor(value):
        return str(value.dtype), special and value.data_ptr() % 16 == 0
    if isinstance(value, float):
        return ("fp32",)
    size = "i32" if -(2**31) <= value < 2**31 else "i64"
    return (size, value % 16 == 0, value == 1) if special else (size,)


class Watched:
    """Stands in a kernel's place and launches nothing."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            free = {p.name for p in self.kernel.params if p.do_not_specialize}
            names = [p.name for p in self.kernel.params if not p.is_constexpr]
            kinds = tuple(kind(v, name not in free) for name, v in zip(names, arguments, strict=True))
            LAUNCHES[self.kernel.fn.__name__, kinds, tuple(sorted((k, str(v)) for k, v in options.items()))] += 1

        return launch


def record(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function of molt.kernels for its launches."""
    with pytest.MonkeyPatch.context() as stubs:
        for module, name in KERNELS:
            stubs.setattr(module, name, Watched(getattr(module, name)))
        function(*arguments)


FUSE, KMEANS = fusion.fuse_maps, clusters.kmeans


class Operators(TorchDispatchMode):
    """Records what the operators would launch on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name == "molt::fuse_maps":
            record(FUSE, list(args[0]), (args[1], args[2]), list(args[3]))
        elif name == "molt::upsample_normalize":
            record(FUSE, [args[0]], (args[1], args[2]), [1.0])
        elif name == "molt::kmeans":
            record(KMEANS, *args)
        return func(*args, **(kwargs or {}))


class OnCpu(TorchFunctionMode):
    """Makes on the CPU what is asked for on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def _fuse(maps: Any, size: Any, weights: Any) -> torch.Tensor:
    result: torch.Tensor = ops.fuse_maps(maps, size, weights) if len(maps) > 1 else ops.upsample_normalize(*maps, size)
    return result


@pytest.fixture(autouse=True)
def _counted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as stubs, OnCpu(), Operators():
        stubs.setattr(torch.Tensor, "cuda", lambda self, *_: self)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the kernels themselves get the operators, whose launches are seen."""
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        if module.__name__.endswith("test_triton_kernels"):
            vars(module).update(fuse_maps=_fuse, kmeans=torch.ops.molt.kmeans)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    each = Counter(name for name, *_ in LAUNCHES)
    terminalreporter.write_line(f"variants: {len(LAUNCHES)} ({', '.join(f'{n} {c}' for c, n in each.items())})")
