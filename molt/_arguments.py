"""Checks of arguments that classes and functions share. Every message names the argument, its range and what came."""

from __future__ import annotations

import math


def check_int(name: str, value: object, least: int, most: int | None = None) -> None:
    """Check for an integer from ``least`` to ``most``.

    Raises:
        TypeError: another type.
        ValueError: out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name} must be {_range(least, most)}, got {value}")


def check_number(name: str, value: object, *, above: float | None = None) -> None:
    """Check for a finite number, above ``above`` or, where that is None, at least 0.

    Raises:
        TypeError: another type.
        ValueError: out of range, NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or (value < 0 if above is None else value <= above):
        expected = "finite and not negative" if above is None else f"finite and above {above:g}"
        raise ValueError(f"{name} must be {expected}, got {value}")


def _range(least: int, most: int | None) -> str:
    return f"at least {least}" if most is None else f"in {least}..{most}"
