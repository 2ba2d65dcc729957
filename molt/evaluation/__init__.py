"""Localization metrics: what a heat map or a box is worth against true boxes and masks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from molt.evaluation.box_curves import BoxCurves, box_curves, to_levels

if TYPE_CHECKING:
    from molt.evaluation.cor_loc import CorLoc, MeanIoU
    from molt.evaluation.max_box_acc import MaxBoxAcc
    from molt.evaluation.pixel_precision import PxAP
    from molt.evaluation.protocol import Protocol
    from molt.evaluation.top_loc import TopKLoc

# torchmetrics takes seconds to import; stored maps are scored without it.
_HOMES = {
    "CorLoc": "cor_loc",
    "MaxBoxAcc": "max_box_acc",
    "MeanIoU": "cor_loc",
    "Protocol": "protocol",
    "PxAP": "pixel_precision",
    "TopKLoc": "top_loc",
}

__all__ = ["BoxCurves", "CorLoc", "MaxBoxAcc", "MeanIoU", "Protocol", "PxAP", "TopKLoc", "box_curves", "to_levels"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
