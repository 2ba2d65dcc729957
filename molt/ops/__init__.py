"""Public operators. Each checks its arguments and runs natively or as plain PyTorch (see `molt.backend`)."""

from __future__ import annotations

from molt.ops.cluster_mean import cluster_mean
from molt.ops.cluster_refine import cluster_refine
from molt.ops.cluster_vote import cluster_vote
from molt.ops.component_boxes import Components, component_boxes, largest_box
from molt.ops.fuse_and_refine import fuse_and_refine
from molt.ops.fuse_maps import fuse_maps
from molt.ops.kmeans import KMeans, kmeans
from molt.ops.slic import Superpixels, slic
from molt.ops.sweep_boxes import SweptBoxes, largest_at_cuts, sweep_boxes
from molt.ops.upsample_normalize import upsample_normalize

__all__ = [
    "Components",
    "KMeans",
    "Superpixels",
    "SweptBoxes",
    "cluster_mean",
    "cluster_refine",
    "cluster_vote",
    "component_boxes",
    "fuse_and_refine",
    "fuse_maps",
    "kmeans",
    "largest_at_cuts",
    "largest_box",
    "slic",
    "sweep_boxes",
    "upsample_normalize",
]
