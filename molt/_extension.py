"""Loads the compiled halves of molt, and remembers why it could not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

OLDEST_TORCH = (2, 10)  # what the compiled halves are made for: ABI_TARGET in setup.py


def _too_old() -> bool:
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH


if _too_old():
    HOW_TO_GET = HOW_TO_GET_CUDA = "run `pip install --upgrade torch`"
else:
    HOW_TO_GET = (
        "to compile it, install a C++ compiler and run `MOLT_REQUIRE_EXT=1 pip install --no-build-isolation .` "
        "in molt's source tree"
    )
    HOW_TO_GET_CUDA = (
        "to compile it, install nvcc and a CUDA build of torch and run "
        "`MOLT_CUDA=1 MOLT_REQUIRE_EXT=1 pip install --no-build-isolation .` in molt's source tree"
    )
_NOTE = Path(__file__).with_name("_build_note.txt")


@dataclass(frozen=True)
class Extension:
    """A compiled module, or the reason why there is none."""

    name: str
    module: ModuleType | None
    reason: str | None


def _load(name: str) -> Extension:
    if _too_old():
        oldest = ".".join(map(str, OLDEST_TORCH))
        return Extension(name, None, f"this is torch {torch.__version__}, and molt needs {oldest} or later")
    try:
        return Extension(name, importlib.import_module(name), None)
    except ModuleNotFoundError as error:
        if error.name != name:
            return Extension(name, None, f"{name} does not load: {error}")
        note = _NOTE.read_text(encoding="utf-8").strip() if _NOTE.exists() else "it was not built"
        return Extension(name, None, f"{name} is not there: {note}")
    except (ImportError, OSError) as error:
        return Extension(name, None, f"{name} does not load: {error}")


def _load_cuda() -> Extension:
    name = "molt._C_cuda"
    if CPU.module is None:
        return Extension(name, None, str(CPU.reason))  # the schemas are in molt._C
    if torch.version.cuda is None:
        return Extension(name, None, "this torch is a CPU build (torch.version.cuda is None)")
    found = _load(name)
    if found.reason is not None and "it was not built" in found.reason:
        return Extension(name, None, f"{name} was not built: CUDA {CPU.module.build_config()['cuda']}")
    return found


@functools.cache
def unfit_gpu(index: int) -> str | None:
    """Say why a CUDA device cannot run what molt._C_cuda was compiled for; None where it can, or nobody knows."""
    assert CPU.module is not None
    compiled = CPU.module.build_config()["cuda_archs"] or ""
    known = re.findall(r"(\d+)\.(\d+)\w*(\+PTX)?", compiled)
    major, minor = torch.cuda.get_device_capability(index)
    for its_major, its_minor, ptx in known:
        own = int(its_major), int(its_minor)
        # Machine code runs on later minor versions of its major one; the driver compiles PTX for all that came later.
        if own <= (major, minor) and (ptx or own[0] == major):
            return None
    if not known:
        return None
    name = torch.cuda.get_device_name(index)
    return (
        f"{name} has compute capability {major}.{minor}, and molt._C_cuda was compiled for {compiled}; "
        f"to compile it for this GPU, set TORCH_CUDA_ARCH_LIST={major}.{minor} and install molt from its source again"
    )


CPU = _load("molt._C")
CUDA = _load_cuda()
TRITON_MISSING = None if importlib.util.find_spec("triton") else "triton is not installed"
