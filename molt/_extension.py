"""Loads the compiled half of molt, and remembers why it could not."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  molt._C needs torch's libraries in the process

HOW_TO_GET = (
    "to compile it, install a C++ compiler and run `MOLT_REQUIRE_EXT=1 pip install --no-build-isolation .` "
    "in molt's source tree"
)
_NOTE = Path(__file__).with_name("_build_note.txt")


@dataclass(frozen=True)
class Extension:
    """A compiled module, or the reason why there is none."""

    name: str
    module: ModuleType | None
    reason: str | None


def _load(name: str) -> Extension:
    try:
        return Extension(name, importlib.import_module(name), None)
    except ModuleNotFoundError as error:
        if error.name != name:
            return Extension(name, None, f"{name} does not load: {error}")
        note = _NOTE.read_text(encoding="utf-8").strip() if _NOTE.exists() else "it was not built"
        return Extension(name, None, f"{name} is not there: {note}")
    except (ImportError, OSError) as error:
        return Extension(name, None, f"{name} does not load: {error}")


CPU = _load("molt._C")
