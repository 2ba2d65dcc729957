"""From a batch of images to one map per scale and wanted class."""

from collections.abc import Callable

from molt.methods.evidence import Evidence, Method
from molt.methods.seeded import Seeded

METHODS: dict[str, Callable[..., Method]] = {"seeded": Seeded}

__all__ = ["METHODS", "Evidence", "Method", "Seeded"]
