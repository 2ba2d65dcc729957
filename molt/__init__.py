"""molt: weakly-supervised object localization for PyTorch. Image-level labels in, boxes out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Loaded at first use, so that `molt --help` need not wait for torch.
_HOMES = {
    "Features": "molt.structures",
    "Localization": "molt.structures",
    "Localizer": "molt.localizer",
    "auto_alpha": "molt._auto_alpha",
    "MOLT": "molt.methods",
    "WeightsInfo": "molt.structures",
    "backend": "molt._backend",
    "config": "molt._backend",
    "create_model": "molt.methods",
    "list_models": "molt.methods",
    "load_model": "molt.methods",
    "refine": "molt._refine",
    "show_config": "molt._backend",
}
_ROOMS = ("backbones", "clustering", "data", "evaluation", "methods", "ops", "training")

if TYPE_CHECKING:
    from molt import backbones, clustering, data, evaluation, methods, ops, training
    from molt._auto_alpha import auto_alpha
    from molt._backend import backend, config, show_config
    from molt._refine import refine
    from molt.localizer import Localizer
    from molt.methods import MOLT, create_model, list_models, load_model
    from molt.structures import Features, Localization, WeightsInfo

__all__ = [
    "MOLT",
    "Features",
    "Localization",
    "Localizer",
    "WeightsInfo",
    "__version__",
    "auto_alpha",
    "backbones",
    "backend",
    "clustering",
    "config",
    "create_model",
    "data",
    "evaluation",
    "list_models",
    "load_model",
    "methods",
    "ops",
    "refine",
    "show_config",
    "training",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"molt.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'molt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
