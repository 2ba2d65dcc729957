"""The same results on a GPU as on the CPU. Run with `pytest -m gpu`; `make gpu` does."""

from __future__ import annotations

import pytest
import torch

import molt
from molt import Features, ops
from molt.clustering import Clusterer, DeepClustering, Slic, TokenKMeans, _training
from molt.clustering._network import Grouped
from molt.clustering._training import Job
from molt.clustering.deep import random_state
from molt.methods.seeded import contrast_maps

pytestmark = pytest.mark.gpu


def test_operators_agree_with_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 3, side, side, generator=generator) for side in (16, 24, 32)]
    fused = ops.fuse_maps(maps, (448, 448))
    assert torch.allclose(ops.fuse_maps([m.cuda() for m in maps], (448, 448)).cpu(), fused, atol=1e-5)
    labels = torch.randint(0, 8, (2, 448, 448), generator=generator, dtype=torch.int32)
    refined = ops.cluster_refine(fused, labels, 0.5, 8)
    on_gpu = ops.cluster_refine(fused.cuda(), labels.cuda(), 0.5, 8)
    assert on_gpu.is_cuda and torch.allclose(on_gpu.cpu(), refined, atol=1e-4)
    found, expected = ops.component_boxes(on_gpu, 0.5), ops.component_boxes(on_gpu.cpu(), 0.5)
    assert found.boxes.is_cuda and torch.equal(found.boxes.cpu(), expected.boxes)


def test_clusters_agree_with_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 4, (2, 64), generator=generator)
    patches = torch.eye(16)[truth] + 0.05 * torch.randn(2, 64, 16, generator=generator)
    features = Features(patches, (8, 8), (112, 112))
    on_gpu = Features(patches.cuda(), (8, 8), (112, 112))
    labels, counts = TokenKMeans(4)(features, (8, 8))
    found, found_counts = TokenKMeans(4)(on_gpu, (8, 8))
    assert torch.equal(found.cpu(), labels) and torch.equal(found_counts.cpu(), counts)
    cam = torch.rand(2, 1, 8, 8, generator=generator)
    assert torch.allclose(contrast_maps(on_gpu, cam.cuda()).cpu(), contrast_maps(features, cam), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_refine_stays_on_the_device(dtype: torch.dtype, photo: torch.Tensor) -> None:
    maps = torch.rand(6, 8, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    out = molt.refine(maps, photo.cuda())
    assert out.is_cuda and out.dtype == dtype and out.shape == (120, 160)
    expected = molt.refine(maps.cpu(), photo)
    assert (out.cpu().float() - expected.float()).abs().mean() < 0.01


def test_localizer_agrees_with_the_cpu(monkeypatch: pytest.MonkeyPatch, photo: torch.Tensor) -> None:
    """Random weights: a GPU machine need not have the demo packages."""
    from molt.backbones import weights

    def untrained(name: str, **options: object) -> object:
        torch.manual_seed(0)
        return original(name, **(options | {"pretrained": False}))

    original = weights.create_timm
    for room in ("cnn", "vit"):
        monkeypatch.setattr(f"molt.backbones.{room}.create_timm", untrained)
    on_gpu = molt.Localizer(device="cuda")
    on_cpu = molt.Localizer(device="cpu")
    images, wanted = torch.rand(4, 3, 448, 448, device="cuda"), torch.tensor([3, -1], device="cuda")
    found = on_gpu._maps(images, wanted).evidence
    assert all(m.is_cuda for m in found.maps)
    batch = torch.stack([photo, photo.flip(2), photo.flip(1)])
    for a, b in zip(on_gpu(batch.cuda(), classes="tabby"), on_cpu(batch, classes="tabby"), strict=True):
        assert (a.heat - b.heat).abs().mean() < 0.02 and not a.boxes.is_cuda


def test_profile_counts_device_memory() -> None:
    from molt.profiling import Profile

    profile = Profile(torch.device("cuda"))
    with profile.stage("forward"):
        block = torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
    (row,) = profile.rows()
    assert row["peak_mib"] >= 64 and block.numel() > 0


def test_vote_agrees_with_the_cpu() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 9, (3, 50, 61), generator=generator)
    segments = torch.randint(0, 200, (3, 50, 61), generator=generator)
    assert torch.equal(ops.cluster_vote(labels.cuda(), segments.cuda()).cpu(), ops.cluster_vote(labels, segments))


@pytest.mark.parametrize(
    "clusterer", [TokenKMeans(), Slic(40), DeepClustering(steps=10)], ids=lambda c: type(c).__name__
)
def test_labels_do_not_depend_on_the_batch(clusterer: Clusterer, photo: torch.Tensor) -> None:
    """Bit for bit within one size of pass; across the two, where kernels may add in another order, but for a few."""
    generator = torch.Generator().manual_seed(0)
    others = torch.rand(9, 3, 120, 160, generator=generator)
    batch = torch.cat([photo[None], others])[:9].cuda()
    whole, counts = clusterer(batch)
    assert whole.is_cuda and counts.is_cuda
    turned, _ = clusterer(batch[[3, 1, 2, 0, 4, 5, 6, 7]])
    assert torch.equal(turned[3], whole[0]), "another place in a pass of the same size"
    alone, _ = clusterer(batch[:1])
    pair, _ = clusterer(batch[[5, 0]])
    assert torch.equal(alone[0], pair[1]), "both are passes of 2"
    again, _ = clusterer(batch)
    assert torch.equal(again, whole)
    if not isinstance(clusterer, DeepClustering):  # its training amplifies rounding between passes of 2 and of 8
        differ = (alone[0] != whole[0]).float().mean()
        assert differ < 0.02, f"{differ:.4f} of the pixels differ between passes of 2 and of 8"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorded_step_trains_as_step_by_step(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    """Twice, so that the second run meets a recording; different images each time."""
    generator = torch.Generator().manual_seed(0)
    states = [random_state(16, 2, torch.Generator().manual_seed(seed), 3) for seed in (0, 1)]
    job = Job(steps=6, min_labels=2, continuity=0.0, dtype=dtype)
    for _ in range(2):
        x = torch.rand(3, 3, 40, 48, generator=generator).cuda()
        votes = (torch.arange(40 * 48) // 9).view(1, 40, 48).expand(3, -1, -1).contiguous().cuda()
        limit = int(votes.max()) + 1
        with torch.no_grad():
            network = _training._grouped(x, states, job)
            expected = _training._run(network, network.repeat(votes), limit, job)
            found = _training._replay(x, votes, limit, states, job)
        assert torch.equal(found, expected)
    assert "without a CUDA graph" not in caplog.text


def test_forms_of_the_convolutions_agree() -> None:
    states = [random_state(20, 2, torch.Generator().manual_seed(seed), 3) for seed in (0, 1)]
    x = torch.rand(3, 3, 40, 48, generator=torch.Generator().manual_seed(0)).cuda()
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        grouped, products = (Grouped(x, states, 0.0, form=form) for form in ("grouped", "products"))
        assert (grouped.respond() - products.respond()).abs().max() < 1e-3
        on_cpu = Grouped(x.cpu(), states, 0.0).respond()
        assert (grouped.respond().cpu() - on_cpu).abs().max() < 1e-3


def test_molt_agrees_with_the_cpu() -> None:
    torch.manual_seed(0)
    model = molt.create_model("molt_deit_tiny", 5, (64, (96, 128)), pretrained=False)
    x = torch.rand(2, 3, 100, 130)
    logits, maps = model(x), model.localize(x, [3, -1])
    model.cuda()
    assert torch.allclose(model(x.cuda()).cpu(), logits, atol=1e-3)
    assert (model.localize(x.cuda(), [3, -1]).cpu() - maps).abs().mean() < 0.01
    model.mark_trained(True)
    loc = molt.Localizer(model, device="cuda")
    (found,) = loc(x[:1].sigmoid().cuda())
    assert found.heat.shape == (1, 96, 128)
