"""Checks of arguments that classes and functions share. Every message names the argument, its range and what came."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

LARGEST_SEED = 2**63 - 1


def check_int(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Check for an integer, of Python or NumPy, from ``least`` to ``most`` and return it as Python's.

    Raises:
        TypeError: another type.
        ValueError: out of range.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be an integer, got {_short(value)}") from None
    if number < least or (most is not None and number > most):
        expected = f"at least {least}" if most is None else f"in {least}..{most}"
        raise ValueError(f"{name} must be {expected}, got {number}")
    return number


def check_number(name: str, value: Any, *, above: float | None = None) -> float:
    """Check for a finite number, above ``above`` or, where that is None, at least 0, and return it as a float.

    Raises:
        TypeError: another type.
        ValueError: out of range, NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {_short(value)}")
    number = float(value)
    if not math.isfinite(number) or (number < 0 if above is None else number <= above):
        expected = "finite and not negative" if above is None else f"finite and above {above:g}"
        raise ValueError(f"{name} must be {expected}, got {value}")
    return number


def check_device(value: Any, name: str = "device") -> Any:
    """Check for a device that can be used here, a name or a torch.device, and return it.

    Raises:
        TypeError, ValueError: another type, or a device that is unknown or missing.
    """
    import torch

    if not isinstance(value, str | torch.device):
        raise TypeError(f"{name} must be a name or a torch.device, got {_short(value)}")
    try:
        picked = torch.device(value)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} {str(value)!r} cannot be used here: {reason}") from error
    return picked


def check_clusterer(value: Any) -> None:
    """Check for None or something that can be called with images, not a class still to be built.

    Raises:
        TypeError: anything else.
    """
    if value is not None and (isinstance(value, type) or not callable(value)):
        hint = f": build it first, {value.__name__}()" if isinstance(value, type) else ""
        raise TypeError(
            f"clusterer must be callable, such as molt.clustering.DeepClustering(), got {_short(value)}{hint}"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else type(value).__name__
