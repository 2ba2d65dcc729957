"""The whole pipeline against its own forward passes, photo by photo: the limit is 1.0.

Weights are random, so that this runs where none are to be had; they do not change the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import molt
from molt.backbones import weights


@pytest.fixture(scope="module", params=["default", "weak"])
def loc(request: pytest.FixtureRequest) -> Iterator[molt.Localizer]:
    def untrained(name: str, **options: Any) -> Any:
        return weights.create_timm(name, **(options | {"pretrained": False}))

    with pytest.MonkeyPatch.context() as patch:
        for room in ("cnn", "vit"):
            patch.setattr(f"molt.backbones.{room}.create_timm", untrained)
        yield molt.Localizer(weights=request.param)


def pixels(loc: molt.Localizer) -> torch.Tensor:
    return torch.rand(1, 3, *loc.method.size, generator=torch.Generator().manual_seed(0))


def test_localizer(benchmark: Any, loc: molt.Localizer) -> None:
    photo = pixels(loc)
    (result,) = benchmark(lambda: loc(photo))
    assert result.heat.isfinite().all()


def test_bare_forwards(benchmark: Any, loc: molt.Localizer) -> None:
    """Only the networks, at the same sizes."""
    photo = pixels(loc).to(loc.device)
    method = loc.method
    sides = {224, max(method.size)} if method.vit is not None else {*method.scales}
    pyramid = {side: torch.nn.functional.interpolate(photo, (side, side)) for side in {*sides, *method.scales}}

    @torch.inference_mode()
    def forwards() -> None:
        for side in sides:
            method.cnn(pyramid[side])
        if method.vit is not None:
            for side in method.scales:
                method.vit(pyramid[side])
        if loc.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark(forwards)
