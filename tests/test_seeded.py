"""The seed step against an independent loop, and its limits."""

from __future__ import annotations

import pytest
import torch

from molt import Features
from molt.methods.seeded import contrast_maps


def slow_contrast(patches: torch.Tensor, cam: torch.Tensor, power: float) -> torch.Tensor:
    """One image, one map, sum by sum; cam on the patches' own grid."""
    vectors = [v / v.norm() for v in patches.double()]
    weight = cam.double().flatten().clamp_min(0)
    weight = weight / weight.max()
    front = sum(w**power * v for w, v in zip(weight, vectors, strict=True))
    back = sum((1 - w) * v for w, v in zip(weight, vectors, strict=True))
    return torch.stack([v @ front / front.norm() - v @ back / back.norm() for v in vectors]).view(cam.shape)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_contrast_maps_match_a_loop(power: float) -> None:
    generator = torch.Generator().manual_seed(0)
    patches, cam = torch.randn(2, 12, 7, generator=generator), torch.randn(2, 3, 3, 4, generator=generator)
    maps = contrast_maps(Features(patches, (3, 4), (42, 56)), cam, power=power)
    assert maps.shape == (2, 3, 3, 4)
    for b in range(2):
        for c in range(3):
            assert torch.allclose(maps[b, c].double(), slow_contrast(patches[b], cam[b, c], power), atol=1e-5)


def test_finds_the_object_from_a_corner_of_it() -> None:
    truth = torch.zeros(8, 8)
    truth[2:6, 1:7] = 1
    directions = torch.eye(6)[truth.long().flatten()]
    patches = directions + 0.05 * torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    seed = torch.zeros(1, 1, 8, 8)
    seed[..., 2, 1] = 1
    maps = contrast_maps(Features(patches[None], (8, 8), (112, 112)), seed)
    assert torch.equal((maps[0, 0] > 0).float(), truth)


def test_no_positive_cam_gives_zeros() -> None:
    x = Features(torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0)), (3, 3), (42, 42))
    assert not contrast_maps(x, -torch.ones(1, 2, 3, 3)).any()


def test_one_patch_and_half_precision() -> None:
    x = Features(torch.ones(1, 1, 4, dtype=torch.bfloat16), (1, 1), (14, 14))
    assert contrast_maps(x, torch.ones(1, 1, 5, 5, dtype=torch.bfloat16)).shape == (1, 1, 1, 1)
