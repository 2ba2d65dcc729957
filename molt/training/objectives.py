"""What training lowers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def classification_loss(
    scale_logits: Sequence[Tensor], labels: Tensor, *, loss_on: str = "scales", label_smoothing: float = 0.0
) -> Tensor:
    """Return each photo's cross-entropy (B,) on the patch-sequence logits, in float32.

    Args:
        scale_logits: one (B, num_classes) a scale.
        labels: (B,) int64.
        loss_on: ``"scales"``: the mean of the scales' losses, so that each learns alone, as the paper's separate
            transformers do; ``"fused"``: the loss of the mean logits.
        label_smoothing: 0 to 1.
    """
    shown = [torch.stack(list(scale_logits)).mean(0)] if loss_on == "fused" else scale_logits
    each = [
        F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing) for logits in shown
    ]
    return torch.stack(each).mean(0)
