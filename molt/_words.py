"""English of messages."""

from __future__ import annotations


def count(number: int, thing: str, things: str | None = None) -> str:
    """Return a number and what it counts: ``1 photo``, ``0 boxes``, ``12000 photos``.

    Args:
        number: how many.
        thing: the word for one.
        things: for several, where that is not ``thing`` with ``s`` or, after s, x and tch, ``es``.
    """
    if number != 1:
        thing = things or thing + ("es" if thing.endswith(("s", "x", "tch")) else "s")
    return f"{number} {thing}"
