"""MOLT against its bare forward passes and unfused attention, deep clustering against the published loop.

Weights are random, which does not change the time. Each case checks that the results agree before it times them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import molt
from molt import ops
from molt.backbones import ViTBackbone
from molt.benchmark import published
from molt.clustering import DeepClustering, Slic, TokenKMeans
from molt.clustering.slic import segment

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = 5


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.fixture(scope="module")
def smooth() -> torch.Tensor:
    """(1, 3, 224, 224) in [0, 1], smooth enough for superpixels to have a shape."""
    noise = torch.rand(1, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(noise, (224, 224), mode="bicubic").clamp(0, 1).to(DEVICE)


@pytest.mark.parametrize("provider", ["tokens alone", "molt: class rows beside fused attention", "unfused attention"])
@pytest.mark.parametrize("side", [224, 448])
def test_attention(benchmark: Any, provider: str, side: int) -> None:
    benchmark.group = f"class-row attention, DINOv2 small, {side} px"
    torch.manual_seed(0)
    vit = ViTBackbone(pretrained=False).to(DEVICE)
    x = torch.rand(1, 3, side, side, device=DEVICE)
    with torch.inference_mode():
        rows = vit.see(x).attention
        _, expected = published.attention_maps(vit.model, x)
        assert rows is not None
        torch.testing.assert_close(rows[0], expected, rtol=0, atol=1e-5)

        def run() -> None:
            if provider == "unfused attention":
                published.attention_maps(vit.model, x)
            else:
                vit.see(x, attention=provider != "tokens alone")
            wait()

        benchmark.pedantic(run, rounds=7, warmup_rounds=1)


@pytest.mark.parametrize("provider", ["localize", "bare forwards"])
def test_molt(benchmark: Any, provider: str) -> None:
    """Maps of 5 of 1000 classes at three scales; the limit is the networks' own passes."""
    benchmark.group = "molt_dinov2_small, 224 + 336 + 448 px"
    torch.manual_seed(0)
    model = molt.create_model("molt_dinov2_small", pretrained=False).to(DEVICE)
    x = torch.rand(1, 3, 448, 448, device=DEVICE)
    pyramid = model.pyramid(x)
    classes = torch.arange(5, device=DEVICE)[None]

    @torch.inference_mode()
    def run() -> None:
        if provider == "localize":
            assert model.localize(x, classes).shape == (1, 5, 448, 448)
        else:
            for i, pixels in enumerate(pyramid):
                model.transformer(i).backbone.model.forward_features(pixels)
        wait()

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("provider", ["molt", "published"])
@pytest.mark.parametrize(("side", "channels", "segments"), [(112, 32, 800), (224, 100, 10000)])
def test_deep_clustering(
    benchmark: Any, smooth: torch.Tensor, provider: str, side: int, channels: int, segments: int
) -> None:
    """The loop alone, 5 steps: superpixels are found before."""
    benchmark.group = f"deep clustering, {side} px, {channels} channels, {STEPS} steps"
    clusterer = DeepClustering(
        "published", channels=channels, steps=STEPS, min_labels=1, num_segments=segments, working_size=side
    )
    image = torch.nn.functional.interpolate(smooth, (side, side), mode="bilinear", antialias=True)
    array = image[0].permute(1, 2, 0).contiguous().cpu().numpy()
    superpixels = segment(image, segments, clusterer.compactness)
    state = [value.to(DEVICE) for value in clusterer.initial_states()[0]]

    def literal() -> Any:
        return published.deep_cluster(array, state, channels, 2, STEPS, 1, superpixels[0].cpu().numpy(), 0.0)

    def ours() -> torch.Tensor:
        labels = clusterer.train(image, superpixels)[0].argmax(0)
        wait()
        return labels

    differ = (ours().cpu().numpy() != literal().labels).mean()
    assert differ <= (0.001 if DEVICE == "cpu" else 0.02), f"{differ:.4f} of the pixels differ"
    benchmark.pedantic(ours if provider == "molt" else literal, rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("provider", ["molt", "published"])
def test_vote(benchmark: Any, smooth: torch.Tensor, provider: str) -> None:
    benchmark.group = "superpixel vote, 224 px, 100 labels, 10000 superpixels"
    superpixels = segment(smooth, 10000, 100.0)
    labels = torch.randint(0, 100, superpixels.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    arrays = labels[0].cpu().numpy(), superpixels[0].cpu().numpy()
    members = published.superpixel_members(arrays[1])
    limit = int(superpixels.max()) + 1

    def ours() -> torch.Tensor:
        voted = ops.cluster_vote(labels, superpixels, 100, limit)
        wait()
        return voted

    def literal() -> Any:
        return published.superpixel_vote(*arrays, members)

    assert (ours()[0].cpu().numpy() == literal()).all()
    benchmark.pedantic(ours if provider == "molt" else literal, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("clusterer", [TokenKMeans(), Slic(), DeepClustering()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("batch", [1, 8])
def test_clusterers(benchmark: Any, smooth: torch.Tensor, clusterer: Any, batch: int) -> None:
    benchmark.group = f"clusterers, {batch} photo{'s' * (batch > 1)} of 224 px"
    images = smooth.expand(batch, -1, -1, -1)

    def run() -> None:
        labels, counts = clusterer(images)
        wait()
        assert labels.shape == (batch, 224, 224)
        assert counts.shape == (batch,)

    benchmark.pedantic(run, rounds=2, warmup_rounds=1)
