"""From a batch of images to one map per scale and wanted class."""

from collections.abc import Callable
from functools import partial

from molt.methods.evidence import Evidence, Method
from molt.methods.molt import MOLT
from molt.methods.multiscale import Multiscale
from molt.methods.registry import create_model, list_models, load_model, model_in
from molt.methods.seeded import Seeded

METHODS: dict[str, Callable[..., Method]] = {
    "seeded": Seeded,
    **{name: partial(Multiscale, name) for name in list_models()},
}

__all__ = [
    "METHODS",
    "MOLT",
    "Evidence",
    "Method",
    "Multiscale",
    "Seeded",
    "create_model",
    "list_models",
    "load_model",
    "model_in",
]
