"""The weight of the cluster mean that a map and its clusters call for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import molt
from molt import ops
from molt._auto_alpha import CLEAR, ENOUGH, GAIN, LEVELS, blend


def blob(size: int = 40, sharpness: float = 1.0, seed: int = 0) -> Tensor:
    """A soft bump with some noise, (1, 1, size, size)."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    noise = 0.05 * torch.rand(size, size, generator=torch.Generator().manual_seed(seed))
    return (torch.sigmoid(sharpness * (0.3 - x.square() - y.square())) + noise)[None, None]


def disc(size: int = 40) -> Tensor:
    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    return ((x.square() + y.square()) < 0.3).long()[None]


def literal(values: np.ndarray, labels: np.ndarray) -> float:
    """The rule written out for one map, with every split of the histogram tried."""
    unit = (values - values.min()) / (values.max() - values.min())
    level = (np.minimum((unit * LEVELS).astype(int), LEVELS - 1) + 0.5) / LEVELS
    best = 0.0
    for cut in np.unique(level)[:-1]:
        parts = [level[level <= cut], level[level > cut]]
        best = max(best, sum(len(part) * (part.mean() - level.mean()) ** 2 for part in parts) / level.size)
    painted = np.zeros_like(unit)
    for k in np.unique(labels):
        painted[labels == k] = unit[labels == k].mean()
    explained = painted.var() / level.var()
    return float(np.clip(GAIN * (CLEAR - best / level.var()) * min(1, explained / ENOUGH), 0, 1))


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_rule_written_out(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 5, generator=generator), (31, 37), mode="bicubic")
    coarse = torch.randint(0, 7, (2, 6, 7), generator=generator)
    labels = coarse.repeat_interleave(6, 1)[:, :31].repeat_interleave(6, 2)[:, :, :37]
    found = molt.auto_alpha(maps, labels)
    assert found.shape == (2, 3) and found.dtype == torch.float32
    for b in range(2):
        for c in range(3):
            assert float(found[b, c]) == pytest.approx(
                literal(maps[b, c].double().numpy(), labels[b].numpy()), abs=1e-3
            )
    assert found.max() > 0.02
    assert torch.allclose(molt.auto_alpha(5 * maps - 2, labels), found, atol=2e-3), "the map's scale does not matter"


def test_a_vague_map_follows_clusters_and_a_clear_one_does_not() -> None:
    vague, clear = (float(molt.auto_alpha(blob(sharpness=s), disc())[0, 0]) for s in (1.0, 60.0))
    assert vague > 0.15 and clear == 0


def test_clusters_that_have_nothing_to_do_with_the_map_are_left_out() -> None:
    chance = torch.randint(0, 5, (1, 40, 40), generator=torch.Generator().manual_seed(1))
    assert float(molt.auto_alpha(blob(), chance)[0, 0]) < 0.02 < float(molt.auto_alpha(blob(), disc())[0, 0])
    assert float(molt.auto_alpha(blob(), torch.zeros(1, 40, 40, dtype=torch.int64))[0, 0]) == 0


def test_maps_without_a_meaning_are_left_alone() -> None:
    maps = blob().repeat(1, 4, 1, 1)
    maps[0, 0] = 0.3
    maps[0, 1, 3, 3] = float("nan")
    maps[0, 2, 3, 3] = float("inf")
    alpha = molt.auto_alpha(maps, disc(), 2)
    assert alpha[0, :3].tolist() == [0, 0, 0] and alpha[0, 3] > 0.15
    out = blend(maps, disc(), "auto", 2)
    assert torch.equal(out[0, 0], maps[0, 0])
    assert out[0, 1].isnan().sum() == 1 and torch.equal(out[0, 2], maps[0, 2])
    assert not torch.equal(out[0, 3], maps[0, 3])


@pytest.mark.parametrize("shape", [(0, 1, 4, 4), (1, 0, 4, 4), (2, 1, 0, 4), (1, 1, 1, 1), (1, 1, 1, 2)])
def test_small_and_empty_maps(shape: tuple[int, ...]) -> None:
    maps = torch.rand(shape)
    labels = torch.zeros(shape[0], *shape[2:], dtype=torch.int32)
    alpha = molt.auto_alpha(maps, labels, 3)
    assert alpha.shape == shape[:2] and (alpha == 0).all()
    assert blend(maps, labels, "auto", 3).shape == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_label_kinds(dtype: torch.dtype) -> None:
    expected = molt.auto_alpha(blob(), disc())
    found = molt.auto_alpha(blob().to(dtype), disc().to(torch.uint8), torch.tensor([2]))
    assert torch.allclose(found, expected, atol=0.02)
    out = blend(blob().to(dtype), disc(), "auto")
    assert out.dtype == dtype and (out - blob()).abs().max() > 0.01


@pytest.mark.parametrize(
    ("scale", "shift", "dtype"),
    [(1.3e5, -6.5e4, torch.float16), (1, 1e8, torch.float64), (1, 1e6, torch.float64), (1e34, 0, torch.float32),
     (1e-30, 0, torch.float32), (-1, 0, torch.float32)],
)  # fmt: skip
def test_the_scale_does_not_matter(scale: float, shift: float, dtype: torch.dtype) -> None:
    unit = ops.upsample_normalize(blob(), (40, 40)).double()
    expected = molt.auto_alpha(unit, disc())
    maps = (unit * scale + shift).to(dtype)
    found = molt.auto_alpha(maps, disc())
    assert torch.allclose(found, expected, atol=0.02) and 0.15 < float(expected) < 1
    out = blend(maps, disc(), "auto")
    assert out.isfinite().all() and out.amin() >= maps.amin() and out.amax() <= maps.amax()


def test_blend_is_cluster_refine_with_each_maps_weight() -> None:
    maps = torch.cat([blob(sharpness=s) for s in (0.5, 2.0, 30.0)], 1)
    alpha = molt.auto_alpha(maps, disc(), 2)
    assert len(alpha.unique()) == 3
    out = blend(maps, disc(), "auto", 2)
    for c in range(3):
        expected = ops.cluster_refine(maps[:, c : c + 1], disc(), float(alpha[0, c]), 2)
        assert (out[:, c] - expected[:, 0]).abs().max() < 1e-5
    assert torch.equal(blend(maps, disc(), 0.3, 2), ops.cluster_refine(maps, disc(), 0.3, 2))


def test_refine_takes_auto_and_it_is_the_default() -> None:
    photo = np.random.default_rng(0).random((40, 40, 3), dtype=np.float32) * 0.1
    photo[disc()[0].numpy().astype(bool)] += 0.8

    def fitting(x: Tensor, size: object) -> tuple[Tensor, Tensor]:
        return disc().int(), torch.tensor([2])

    cam = blob()[0, 0].numpy()
    auto = molt.refine(cam, photo, clusterer=fitting, alpha="auto")
    assert np.array_equal(auto, molt.refine(cam, photo, clusterer=fitting))
    weight = float(molt.auto_alpha(ops.upsample_normalize(blob(), (40, 40)), disc())[0, 0])
    fixed = molt.refine(cam, photo, clusterer=fitting, alpha=weight)
    assert np.abs(auto - fixed).max() < 1e-5 and 0.15 < weight < 1
    raw = molt.refine(3 * cam + 5, photo, clusterer=fitting, normalize=False)
    assert np.abs(raw - (3 * cam + 5)).max() > 0.05 and raw.max() <= (3 * cam + 5).max()
    for wrong, error in (("none", ValueError), (True, TypeError), (1.5, ValueError), (float("nan"), ValueError)):
        with pytest.raises(error, match="^alpha must be"):
            molt.refine(cam, photo, alpha=wrong)
