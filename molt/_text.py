"""Names as text: the one form in which class names are kept and compared, and what people are shown of any name."""

from __future__ import annotations

import functools
import re
import unicodedata

# Control characters, line separators and what turns the direction of writing: a terminal would act on them.
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


@functools.lru_cache(maxsize=1 << 17)
def plain_name(name: str) -> str:
    """Return a class name as molt keeps it: Unicode NFC, without white space at its ends.

    Bytes of a folder's name that are UTF-8, but were read under another locale, become the characters they stand for.
    """
    return (name if name.isascii() else unicodedata.normalize("NFC", _joined(name))).strip()


def name_key(name: str) -> str:
    """Return what two class names share where they are the same but for their case."""
    return unicodedata.normalize("NFC", plain_name(name).casefold())


def has_control(text: str) -> bool:
    """Return whether a text holds control characters or others that a terminal would act on."""
    return _UNSHOWN.search(text) is not None


def readable(text: object) -> str:
    r"""Return text for people, on one line and in characters that UTF-8 can write.

    Bytes of a file's name that are no text show as ``\udcXX``, the escape by which JSON has them, too, and which
    :func:`os.fsencode` turns back; control characters show as blanks.
    """
    return _UNSHOWN.sub(" ", _joined(str(text)).encode("utf-8", "backslashreplace").decode())


def slug(text: str) -> str:
    """Return a text as the name of a file or folder on any system."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.") or "unnamed"


def _joined(text: str) -> str:
    """Return a text in which bytes that a locale could not read, but are UTF-8, are characters."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a surrogate that stands for no byte, as from JSON
        return text
