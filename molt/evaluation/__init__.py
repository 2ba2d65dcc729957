"""Localization metrics: what a heat map or a box is worth against true boxes and masks."""

from molt.evaluation.box_curves import BoxCurves, box_curves, to_levels
from molt.evaluation.cor_loc import CorLoc, MeanIoU
from molt.evaluation.max_box_acc import MaxBoxAcc
from molt.evaluation.pixel_precision import PxAP
from molt.evaluation.protocol import Protocol
from molt.evaluation.top_loc import TopKLoc

__all__ = ["BoxCurves", "CorLoc", "MaxBoxAcc", "MeanIoU", "Protocol", "PxAP", "TopKLoc", "box_curves", "to_levels"]
