"""Poisson bootstrap over photos in memory that does not grow with their number, and the base of all metrics here."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from molt._arguments import LARGEST_SEED, check_int
from molt.evaluation.protocol import Protocol

# P(weight <= k) of Poisson(1) for k = 0, 1, ..., in 2^-32; above 12 it is below 1e-10.
_CUMULATIVE = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(13)]) * 2**32


def poisson_weights(keys: Sequence[str], resamples: int, seed: int) -> Tensor:
    """Draw how often each resample holds each photo: Poisson(1), a function of the seed and the photo's key alone.

    With such weights every photo decides by itself, so photos can come in any order, batch or process, and two metrics
    that see the same keys see the same resamples (Hanley and MacGibbon, 2006; Chamandy et al., 2012). The numbers come
    from SHAKE-128, so they are the same on every machine.

    Args:
        keys: one for each photo.
        resamples: R, at least 0.
        seed: of all resamples.

    Returns:
        (len(keys), 1 + R) int32; column 0 is all ones: the photos as they are.
    """
    weights = np.ones((len(keys), 1 + resamples), dtype=np.int32)
    for row, key in zip(weights, keys, strict=True):
        stream = hashlib.shake_128(f"{seed}:{key}".encode(errors="surrogatepass")).digest(4 * resamples)
        row[1:] = np.searchsorted(_CUMULATIVE, np.frombuffer(stream, dtype="<u4"), side="right")
    return torch.from_numpy(weights)


def percentile_interval(samples: Tensor, confidence: float) -> tuple[float, float] | None:
    """Return the central ``confidence`` share of (R,) resampled figures, or None where there are none.

    A NaN is a resample in which the figure does not exist, such as one without a photo, and is left out.
    """
    known = samples[~samples.isnan()].double()
    if known.numel() == 0:
        return None
    tail = (1 - confidence) / 2
    low, high = torch.quantile(known, torch.tensor([tail, 1 - tail], dtype=torch.float64, device=known.device)).tolist()
    return low, high


def add_steps(state: Tensor, hits: Tensor, weights: Tensor) -> None:
    """Add photos' curves to a sum of curves that is kept as differences along the thresholds.

    A curve of hits changes at few thresholds, and only those are touched: :func:`curves` adds them up.

    Args:
        state: (C, T, 1 + R) int32, changed in place.
        hits: (B, C, T) bool.
        weights: (B, 1 + R) int32, of :func:`poisson_weights`.
    """
    steps = hits.to(torch.int8).diff(dim=2, prepend=hits.new_zeros(*hits.shape[:2], 1, dtype=torch.int8))
    photo, curve, threshold = steps.nonzero(as_tuple=True)
    sign = steps[photo, curve, threshold].to(weights.dtype)
    state.view(-1, state.shape[2]).index_add_(0, curve * state.shape[1] + threshold, weights[photo] * sign[:, None])


def curves(state: Tensor) -> Tensor:
    """Return the (C, T, 1 + R) float64 counts whose differences :func:`add_steps` keeps."""
    return state.cumsum(1, dtype=torch.int64).double()


class PhotoMetric(Metric):
    """Base of metrics that are means over photos, with a bootstrap over photos and a protocol to print.

    States are sums: their size does not depend on how many photos came, and processes add theirs. A photo's key is its
    ``ids`` entry, or else its process's rank and its number there since the last ``reset()``.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    weights: Tensor

    def __init__(self, protocol: Protocol, bootstrap: int, seed: int, confidence: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bootstrap = check_int("bootstrap", bootstrap, 0)
        self.seed = check_int("seed", seed, 0, LARGEST_SEED)
        self.confidence = _check_share("confidence", confidence)
        self.protocol = protocol
        self._seen = 0
        self._inside_forward = False
        self.add_state("weights", torch.zeros(1 + self.bootstrap, dtype=torch.int64), dist_reduce_fx="sum")
        # MetricCollection takes metrics for one and the same whose states have equal names and, after one batch, equal
        # values, as those of two protocols can be. This name tells them apart.
        mark = zlib.crc32(f"{protocol}{self.seed}{self.bootstrap}".encode())
        self.add_state(f"protocol_{mark:08x}", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def count(self) -> int:
        """How many photos came."""
        return int(self.weights[0])

    def reset(self) -> None:
        """Forget all photos."""
        super().reset()
        # forward() resets to take one batch by itself; numbering photos anew would repeat their weights.
        if not self._inside_forward:
            self._seen = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch and return its own figures. Costs a compute(); ``update`` alone is much cheaper.

        A batch that is refused adds nothing.
        """
        self._inside_forward = True
        before, updates, seen = self._copy_state_dict(), self._update_count, self._seen
        try:
            return super().forward(*args, **kwargs)
        except Exception:
            # torchmetrics resets before it looks at the batch.
            for name, value in before.items():
                setattr(self, name, value)
            self._update_count, self._seen = updates, seen
            self._computed = None
            self._to_sync, self._should_unsync = self.sync_on_compute, True
            raise
        finally:
            self._inside_forward = False

    def set_dtype(self, dst_type: str | torch.dtype) -> PhotoMetric:
        """Keep the states' own types: they count, and narrower ones would not be exact."""
        del dst_type
        return self

    def _draw(self, number: int, ids: Sequence[str] | None) -> Tensor:
        """Return the weights (number, 1 + R) int32 of a batch and count them in."""
        if ids is None:
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
            keys = [f"#{rank}:{self._seen + i}" for i in range(number)]
        elif isinstance(ids, str) or len(ids) != number or not all(isinstance(key, str) for key in ids):
            raise ValueError(f"ids: got {_short(ids)}, expected {number} strings")
        elif len(set(ids)) < number:
            twice = next(key for index, key in enumerate(ids) if key in ids[:index])
            raise ValueError(f"ids: got {twice!r} twice, expected each photo once")
        else:
            keys = [f"={key}" for key in ids]
        self._seen += number
        drawn = poisson_weights(keys, self.bootstrap, self.seed).to(self.weights.device)
        self.weights += drawn.sum(0)
        return drawn

    def _totals(self) -> Tensor:
        """Return the number of photos in the set and in each resample, (1 + R,) float64, NaN for none."""
        if self.count == 0:
            raise RuntimeError(f"{type(self).__name__}.compute: no photo came yet; call update first")
        totals = self.weights.double()
        return torch.where(totals > 0, totals, torch.nan)

    def _interval(self, figures: Tensor) -> tuple[float, float] | None:
        """Return the interval of a figure (1 + R,), None without bootstrap."""
        return percentile_interval(figures[1:], self.confidence)


def _check_share(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError(f"{name}: got {value!r}, expected a number in (0, 1)")
    return float(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} of {len(value) if hasattr(value, '__len__') else '?'}"
