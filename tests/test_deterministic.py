"""Nothing that PyTorch refuses on a GPU under `torch.use_deterministic_algorithms`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import molt
from molt import Features, ops
from molt.clustering import TokenKMeans
from molt.evaluation import PxAP
from molt.ops.kmeans import FIXED, _draw, spread_starts

aten = torch.ops.aten
# Of what that switch's documentation lists, what a forward pass could call.
REFUSED = {aten.histc, aten.kthvalue, aten.median, aten.nanmedian, aten.put, aten.put_, aten.nll_loss2d_forward}


class AsOnAGpu(TorchDispatchMode):
    """Refuse on the CPU what PyTorch refuses on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, kwargs = func.overloadpacket, kwargs or {}
        summed = packet in (aten.cumsum, aten.cumsum_) and (kwargs.get("dtype") or args[0].dtype).is_floating_point
        weighed = packet is aten.bincount and (len(args) > 1 or kwargs.get("weights") is not None)
        if packet in REFUSED or summed or weighed:
            raise RuntimeError(f"{func} has no deterministic form on a GPU")
        return func(*args, **kwargs)


def everything(device: str = "cpu") -> list[Tensor]:
    """What the public functions give that choose, sum or count."""
    generator = torch.Generator().manual_seed(0)
    photos = torch.rand(2, 3, 40, 48, generator=generator).to(device)
    maps = torch.rand(2, 2, 40, 48, generator=generator).to(device)
    labels = torch.randint(0, 5, (2, 40, 48), generator=generator).to(device)
    patches = torch.rand(2, 60, 16, generator=generator).to(device)
    found = [molt.refine(maps[0, 0], photos[0]), molt.refine(maps[0, 0], photos[0], alpha=0.3)]
    found += [molt.auto_alpha(maps, labels), *ops.cluster_mean(maps, labels, 5), ops.cluster_refine(maps, labels, 0.5)]
    found += [spread_starts(patches, 4, 3, 0), *ops.kmeans(patches, 4, restarts=2), ops.cluster_vote(labels, labels)]
    found += [*TokenKMeans(4)(photos), *TokenKMeans(4)(Features(patches, (6, 10), (84, 140)))]
    found += [ops.fuse_maps([maps, maps[:, :, ::2]], (30, 31)), ops.upsample_normalize(maps, (60, 50))]
    found += [*ops.largest_box(maps, 0.5), *ops.largest_at_cuts((255 * maps).byte())]
    metric = PxAP().to(device)
    metric.update(maps[:, 0], (labels > 2).byte())
    return [*found, torch.tensor(metric.compute()["score"])]


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_no_operation_that_a_gpu_refuses(backend: molt.Backend) -> None:
    with pytest.raises(RuntimeError, match="no deterministic form"), AsOnAGpu():
        torch.ones(3).cumsum(0)
    with molt.backend(backend):
        expected = everything()
        with AsOnAGpu():
            found = everything()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_gpu_refuses_nothing(backend: str) -> None:
    """In a process of its own: cuBLAS reads its variable once."""
    script = f"""
import torch, molt
from test_deterministic import everything
torch.use_deterministic_algorithms(True)
with molt.backend({backend!r}):
    first, second = everything("cuda"), everything("cuda")
assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
"""
    paths = [str(Path(__file__).parent), *filter(None, sys.path)]
    env = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_draws_of_starts_fall_by_share_and_by_rule() -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[0, 1, 0, 3], [0, 0, 0, 0], [1, nan, 2, 3], [1, inf, 2, inf], [1e-300, 1e300, 0, 0], [0, 0, 1e-320, 0]]
    distance = torch.tensor(rows, dtype=torch.float64)[..., None]
    for draw, expected in ((0.1, [1, 0, 3, 1, 1, 2]), (0.3, [3, 0, 3, 1, 1, 2]), (0.99, [3, 0, 3, 1, 1, 2])):
        drawn = _draw(distance.expand(-1, -1, 2), torch.full((2,), draw, dtype=torch.float64))
        assert drawn.tolist() == [[pick, pick] for pick in expected]
    assert int(FIXED) * 2**31 < 2**63


def test_draws_are_those_of_sums_in_floating_point() -> None:
    generator = torch.Generator().manual_seed(0)
    for number in (1, 2, 784, 5000):
        distance = torch.rand(3, number, 40, generator=generator, dtype=torch.float64).square()
        draw = torch.rand(40, generator=generator, dtype=torch.float64)
        total = distance.cumsum(1)
        expected = (total < draw * total[:, -1:]).sum(1)
        assert torch.equal(_draw(distance, draw), expected)
