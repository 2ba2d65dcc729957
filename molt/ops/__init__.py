"""Public operators. Each checks its arguments and runs natively or as plain PyTorch (see `molt.backend`)."""

from __future__ import annotations

from molt.ops.cluster_refine import cluster_refine
from molt.ops.cluster_vote import cluster_vote
from molt.ops.component_boxes import Components, component_boxes
from molt.ops.fuse_maps import fuse_maps
from molt.ops.upsample_normalize import upsample_normalize

__all__ = ["Components", "cluster_refine", "cluster_vote", "component_boxes", "fuse_maps", "upsample_normalize"]
