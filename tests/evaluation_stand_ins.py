"""Slow stand-ins, on OpenCV, for molt.ops.sweep_boxes and molt.evaluation.box_curves where these are not there.

To be deleted with them: python -m pytest -p tests.evaluation_stand_ins FILE
"""

import importlib
import importlib.util
import sys
import types
from dataclasses import dataclass

import cv2
import numpy as np
import torch


@dataclass(frozen=True)
class BoxCurves:
    any: np.ndarray
    largest: np.ndarray
    peak: np.ndarray


def to_levels(maps):
    maps = np.asarray(maps, np.float64)
    out = np.zeros(maps.shape, np.uint8)
    for i, m in enumerate(maps):
        if not np.isnan(m).any():
            out[i] = (255 * m).astype(np.uint8)
    return out


def _contours(level, cut):
    found = cv2.findContours((level > cut).astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    boxes = [cv2.boundingRect(c) for c in found]
    return [(x, y, x + w, y + h) for x, y, w, h in boxes], [cv2.contourArea(c) for c in found]


def largest_at_cuts(levels, *, contours=False, connectivity=8):
    batch, channels = levels.shape[:2]
    boxes, area = torch.zeros(batch, channels, 255, 4), torch.zeros(batch, channels, 255, dtype=torch.float64)
    for b in range(batch):
        for c in range(channels):
            for cut in range(255):
                found, sizes = _contours(levels[b, c].numpy(), cut)
                if found:
                    top = max(range(len(found)), key=sizes.__getitem__)
                    boxes[b, c, cut], area[b, c, cut] = torch.tensor(found[top]).float(), sizes[top]
    return boxes, area


def box_curves(levels, boxes, *, area="contour", clip=True, plus_one=True, empty=(0, 0, 0, 0)):
    levels = np.asarray(levels)
    best, top = np.zeros((len(levels), 255)), np.zeros((len(levels), 255))
    extra = 1 if plus_one else 0

    def iou(found, truth):
        a = np.array(found, float)
        if clip:
            a[:, 2:] = np.minimum(a[:, 2:], [levels.shape[2] - 1, levels.shape[1] - 1])
        a, b = a[:, None], np.asarray(truth, float)[None]
        shared = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]) + extra, 0, None)
        shared = shared.prod(-1)
        both = (a[..., 2:] - a[..., :2] + extra).prod(-1) + (b[..., 2:] - b[..., :2] + extra).prod(-1) - shared
        return (shared / np.maximum(both, 1e-12)).max(1)

    for i, level in enumerate(levels):
        for cut in range(255):
            found, sizes = _contours(level, cut)
            values = iou(found or [empty], boxes[i])
            best[i, cut] = values.max()
            top[i, cut] = values[max(range(len(found)), key=sizes.__getitem__)] if found else values[0]
    return BoxCurves(best, top, levels.reshape(len(levels), -1).max(1).astype(np.int64))


def _install(name, **members):
    if importlib.util.find_spec(name) is None:
        module = types.ModuleType(name)
        module.__dict__.update(members)
        sys.modules[name] = module
        home, _, last = name.rpartition(".")
        setattr(importlib.import_module(home), last, module)


_install("molt.ops.sweep_boxes", largest_at_cuts=largest_at_cuts)
_install("molt.evaluation.box_curves", box_curves=box_curves, to_levels=to_levels, BoxCurves=BoxCurves)
_install("molt.data.reading", read_set=None)
