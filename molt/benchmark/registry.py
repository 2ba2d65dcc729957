"""What is measured: operations, their cases, and who provides each."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from molt import ops

Kind = Literal["reference", "compiled", "native", "variant", "peer", "published"]
Device = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = ("cpu", "cuda")
REHEARSED = 2  # images
CANNOT = "backend 'native' cannot run: "


class NotRun(Exception):
    """A provider that does not run here; the text says why."""


@dataclass(frozen=True)
class Case:
    """One set of inputs to measure on.

    Attributes:
        name: unique among the operation's cases on a device.
        device: ``"cpu"`` or ``"cuda"``.
        images: number of images.
        dtype: of the maps or features.
        options: what else the operation's input maker needs.
        headline: the case of `--quick` and of the tables; torch.compile, which takes seconds a case, runs on these.
        backward: measure forward and backward together.
        rehearses: the GPU's case that this one stands for on the CPU, which decides who takes part.
        targets: columns of the native provider's row with what is asked of them, see :mod:`molt.benchmark.targets`.
    """

    name: str
    device: Device
    images: int
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)
    headline: bool = False
    backward: bool = False
    targets: Mapping[str, float] = field(default_factory=dict)
    rehearses: Case | None = None


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Provider:
    """One implementation of an operation, called with the public operator's arguments.

    Attributes:
        name: as tables and ``--providers`` show it.
        kind: ``reference``, ``compiled`` (the reference under torch.compile), ``native``, ``variant`` (the library's
            other ways), ``peer`` (what a user would otherwise call) or ``published`` (a paper's literal loop).
        load: returns the function; may raise `NotRun`.
        package: module that must be importable, or None.
        distribution: what pip calls the package.
        devices: where it runs.
        numpy: takes and returns NumPy arrays; views of CPU tensors, so the conversion costs nothing.
        most_images: larger cases are too slow to wait for.
        differentiable: takes part in forward-and-backward cases.
    """

    name: str
    kind: Kind
    load: Callable[[], Callable[..., Any]]
    package: str | None = None
    distribution: str | None = None
    devices: tuple[Device, ...] = DEVICES
    numpy: bool = False
    most_images: int | None = None
    differentiable: bool = False

    def resolve(self, case: Case) -> Callable[..., Any]:
        """Return the function to call on a case.

        Raises:
            NotRun: a package or operator is missing, or the case is none for this provider.
        """
        case = case.rehearses or case
        if case.device not in self.devices:
            raise NotRun(f"runs on {' and '.join(self.devices)} only")
        if case.backward and not self.differentiable:
            raise NotRun("has no backward")
        if self.most_images is not None and case.images > self.most_images:
            raise NotRun(f"too slow for more than {self.most_images} images")
        if self.kind == "compiled" and not case.headline:
            raise NotRun("compiled for the headline cases only")
        if self.numpy and case.dtype == torch.bfloat16:
            raise NotRun("NumPy has no bfloat16")
        if self.package is not None:
            name = self.distribution or self.package
            if importlib.util.find_spec(self.package) is None:
                raise NotRun(f"{name} is not installed")
            try:
                importlib.import_module(self.package)
            except (ImportError, OSError) as error:
                raise NotRun(f"{name} does not import: {first_line(error)}") from None
        return self.load()


@dataclass(frozen=True)
class Operation:
    """One public operator with everything needed to check and time it.

    Attributes:
        name: of the operator in `molt.ops`.
        cases: what to measure on.
        make: makes a case's inputs from a generator on the case's device.
        providers: in the order of the tables; one is the reference.
        moved: bytes that must move at least once; GB/s are these over the time.
        counted: what `moved` counts, in words.
        compare: largest error of a result against the truth; infinite where they cannot be the same.
        tolerance: largest error that passes, by dtype.
        limit: ``"copy"`` or ``"fill"``, whichever memory traffic the operation cannot beat.
        shape: of the result that a gradient flows back through; None where there is no backward.
        truth: what results are compared with; None for the reference in float64.
    """

    name: str
    cases: tuple[Case, ...]
    make: Callable[[Case, torch.Generator], Inputs]
    providers: tuple[Provider, ...]
    moved: Callable[[Inputs], int]
    counted: str
    compare: Callable[[Any, Any, Inputs], float]
    tolerance: Mapping[torch.dtype, float]
    limit: Literal["copy", "fill"]
    shape: Callable[[Inputs], tuple[int, ...]] | None = None
    truth: Callable[..., Any] | None = None

    def cases_on(self, device: str, *, quick: bool = False, targets: bool = False) -> list[Case]:
        """Return the cases of a device, only the headline ones if ``quick``, only those with targets if ``targets``."""
        own = [case for case in self.cases if case.device == device]
        return [case for case in own if (case.headline or not quick) and (case.targets or not targets)]

    def rehearsed(self, *, targets: bool = False) -> list[Case]:
        """Return a GPU's cases as they run on the CPU where nothing is measured: one image, or two."""
        return [
            replace(case, device="cpu", images=min(case.images, REHEARSED), rehearses=case)
            for case in self.cases_on("cuda", targets=targets)
        ]


def first_line(error: BaseException) -> str:
    """Return what an exception says, cut to one line."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def given(function: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    """Return a loader of a function that is already there."""
    return lambda: function


def operator(name: str, backend: str) -> Callable[[], Callable[..., Any]]:
    """Return a loader of a public operator on one backend.

    The loader raises `NotRun` where `molt.ops` has no such operator, and its function where there is no such kernel.
    """

    def load() -> Callable[..., Any]:
        function = getattr(ops, name, None)
        if function is None:
            raise NotRun(f"molt.ops has no {name}")

        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs, backend=backend)

        if backend != "native":
            return call

        def native(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except RuntimeError as error:
                if CANNOT not in str(error):
                    raise
                raise NotRun(first_line(error).partition(CANNOT)[2]) from None

        return native

    return load


def own(name: str, *, compiled: bool = True, differentiable: bool = False, slow: int | None = None) -> list[Provider]:
    """Return the library's own providers of an operator: reference, the reference compiled, native.

    Args:
        name: of the operator.
        compiled: whether torch.compile can take the reference.
        differentiable: whether there is a backward.
        slow: most images to wait for the reference on.
    """
    reference = operator(name, "reference")
    providers = [
        Provider("reference", "reference", reference, differentiable=differentiable, most_images=slow),
        Provider("native", "native", operator(name, "native"), differentiable=differentiable),
    ]
    if compiled:
        providers.insert(1, Provider("compiled", "compiled", reference, differentiable=differentiable))
    return providers
