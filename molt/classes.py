"""Class names: ImageNet-1k as timm carries them, and the class-agnostic 'object'."""

from __future__ import annotations

import difflib
import functools
import operator
from typing import SupportsIndex

from molt._text import name_key, plain_name

OBJECT = -1
OBJECT_NAME = "object"
MOST_LISTED = 20


@functools.cache
def imagenet_names() -> tuple[str, ...]:
    """Return the 1000 ImageNet-1k descriptions in class order, e.g. ``"tabby, tabby cat"``."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))


def find_class(name: str | SupportsIndex, names: tuple[str, ...] | None = None) -> int:
    """Return the index of a class given by index, full description, or one of its comma-separated names.

    Case, Unicode's normal forms and white space around do not matter; ``"object"`` gives -1, the class-agnostic mode,
    where no class has that name.

    Raises:
        TypeError: neither a name nor an integer (of Python, NumPy or torch).
        ValueError: no such class or index, or a name that several classes share; close matches are listed.
    """
    names = imagenet_names() if names is None else names
    if not isinstance(name, str):
        try:
            name = operator.index(None if isinstance(name, bool) else name)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"a class must be a name or an index, got {name!r}") from None
    text = plain_name(str(name))
    wanted = name_key(text)
    whole = [i for i, description in enumerate(names) if name_key(description) == wanted]
    if isinstance(name, str) and len(whole) == 1:
        return whole[0]
    if text.removeprefix("-").isdecimal():
        index = int(text)
        if index == OBJECT or 0 <= index < len(names):
            return index
        raise ValueError(f"class {text} is out of range: expected 0..{len(names) - 1}")
    if wanted == OBJECT_NAME:
        return OBJECT
    parts: dict[str, list[int]] = {}
    for i, description in enumerate(names):
        for part in dict.fromkeys(name_key(description).split(", ")):
            parts.setdefault(part, []).append(i)
    found = whole or parts.get(wanted, [])
    if len(found) == 1:
        return found[0]
    if found:
        choices = "; ".join(f"{i} = {names[i]}" for i in found)
        raise ValueError(f"class {text!r} is not unique: give the index ({choices})")
    near = [part for part in parts if wanted and wanted in part.split()][:5]
    near = near or difflib.get_close_matches(wanted, parts, n=5, cutoff=0.6)
    hint = f"; did you mean: {', '.join(near[:5])}?" if near else ""
    if not hint and len(names) <= MOST_LISTED:
        hint = f"; known: {', '.join(names)}"
    raise ValueError(f"class {text!r} is unknown{hint}")


def class_name(index: int, names: tuple[str, ...] | None = None) -> str:
    """Return the description of a class index; -1 is 'object'."""
    if index == OBJECT:
        return OBJECT_NAME
    return (imagenet_names() if names is None else names)[index]
