"""The terms that hold a spatial token's map to a size and to a decision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from molt.training.spatial_loss import area_loss, decision_loss, spatial_loss


def test_losses_by_hand() -> None:
    half = torch.full((2, 1, 3, 3), 0.5)
    assert area_loss(half).item() == pytest.approx(0.15)
    assert area_loss(torch.stack([torch.ones(1, 2, 2), torch.zeros(1, 2, 2)])).item() == pytest.approx(0.15)
    assert area_loss(torch.zeros(1, 4, 4), 0.25).item() == pytest.approx(0.25)
    # One patch keeps 0.8974 of itself along each axis.
    one = 0.8974**2 * 0.7
    assert decision_loss(torch.tensor([[[[0.7]]]])).item() == pytest.approx(one * (1 - one), rel=1e-5)
    # Two patches: (1, 0) becomes 0.8974 of (0.8974, 0.0513).
    left, right = 0.8974 * 0.8974, 0.8974 * 0.0513
    expected = (left * (1 - left) + right * (1 - right)) / 2
    pair = torch.tensor([[[1.0, 0.0]]])
    assert decision_loss(pair).item() == pytest.approx(expected, rel=1e-5)
    total = spatial_loss(pair, area=0.25, area_weight=2, decision_weight=3)
    assert total.item() == pytest.approx(2 * 0.25 + 3 * expected, rel=1e-5)
    # Inside a large map of ones nothing is lost; a map that cannot decide loses the most.
    assert decision_loss(torch.ones(1, 60, 60)) < 0.02
    assert decision_loss(torch.full((1, 60, 60), 0.5)) > 0.24
    corner = torch.zeros(1, 1, 3, 3)
    corner[0, 0, 0, 0] = 1
    kernel = torch.tensor([0.0513, 0.8974, 0.0513])
    smooth = F.conv2d(corner, torch.outer(kernel, kernel)[None, None], padding=1)
    assert decision_loss(corner).item() == pytest.approx((smooth * (1 - smooth)).mean().item(), rel=1e-5)


def test_gradients_of_losses() -> None:
    maps = torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: spatial_loss(m, area=0.2, area_weight=0.7, decision_weight=1.3), (maps,))
    assert torch.autograd.gradcheck(decision_loss, (maps[:, 0].transpose(1, 2),))


BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: area_loss([0.5]), TypeError, r"maps must be a torch tensor \(B, 1, h, w\), got list"),
    (lambda: area_loss(torch.zeros(1, 2, 2, dtype=torch.int64)), TypeError, "maps must be floating point"),
    (lambda: decision_loss(torch.zeros(1, 2, 2, 2)), ValueError, r"maps must have shape .*got \(1, 2, 2, 2\)"),
    (lambda: decision_loss(torch.zeros(0, 1, 2, 2)), ValueError, "not be empty"),
    (lambda: area_loss(torch.zeros(1, 2, 2), 1.2), ValueError, r"area must be in \[0, 1\], got 1.2"),
    (lambda: spatial_loss(torch.zeros(1, 2, 2), area="a"), TypeError, "area must be a number"),
    (lambda: spatial_loss(torch.zeros(1, 2, 2), area_weight=-1), ValueError, "area_weight must be finite"),
    (lambda: spatial_loss(torch.zeros(1, 2, 2), decision_weight=float("nan")), ValueError, "decision_weight must be"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments_are_named(case: int) -> None:
    call, error, text = BAD[case]
    with pytest.raises(error, match=text):
        call()
