"""The papers' literal loops (molt/benchmark/published.py) and the library agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import molt
from molt import ops
from molt.benchmark import published
from molt.clustering import DeepClustering
from molt.clustering.slic import segment
from molt.data import read_photo, samples

SPEED = Path(__file__).parents[1] / "benchmarks" / "deep_speed.py"


@pytest.fixture(scope="module")
def cat() -> torch.Tensor:
    return read_photo(samples.sample_photos()[0].path, (75, 112)).pixels


def as_array(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).contiguous().numpy()


# The papers have one network a photo.
ONE = {"starts": 1, "merged": 0}
FORMS = [
    {"channels": 32},
    {"channels": 20, "layers": 3, "num_segments": 200},
    {"channels": 32, "num_segments": 0, "continuity": 1.0},
    {"channels": 16, "layers": 1, "num_segments": 300, "continuity": 5.0},
]


@pytest.mark.parametrize(("form", "seed"), [*zip(FORMS, (0, 0, 7, 7), strict=True), (FORMS[0], 7)])
def test_first_steps_have_equal_labels(cat: torch.Tensor, form: dict, seed: int) -> None:
    """From one initial state, at most one pixel in a thousand differs after one step, and few more after five.

    How many more: a response that rounding carries across 0 changes a gradient, and training amplifies that. So the
    literal loop is also run from states that differ from the initial one by its rounding, and ours may differ from it
    by half as much again as those do.
    """
    clusterer = DeepClustering(**{**ONE, **form}, seed=seed, steps=5, min_labels=1)
    segments = superpixels = None
    if clusterer.num_segments:
        superpixels = segment(cat[None], clusterer.num_segments, clusterer.compactness)
        segments = superpixels[0].numpy()
    state = clusterer.initial_states()[0]
    generator = torch.Generator().manual_seed(0)

    def literal(state: list[torch.Tensor]) -> list[np.ndarray]:
        seen: list[np.ndarray] = []
        last = published.deep_cluster(
            as_array(cat),
            state,
            clusterer.channels,
            clusterer.layers,
            5,
            1,
            segments,
            clusterer.continuity,
            lambda step, labels: seen.append(labels),
        )
        return [*seen, last.labels]

    seen = literal(state)
    nudged = [
        literal([v * (1 + 2e-7 * (2 * torch.rand(v.shape, generator=generator) - 1)) for v in state]) for _ in range(4)
    ]
    assert len(seen) == 6 and len({labels.tobytes() for labels in seen}) == 6, "every step changes something"
    for steps, labels in enumerate(seen[1:], 1):
        clusterer.steps = steps
        ours = clusterer.train(cat[None], superpixels)[0].argmax(0).numpy()
        rounding = max((other[steps] != labels).mean() for other in nudged)
        allowed = 0.001 if steps == 1 else max(0.001, 1.5 * rounding)
        assert (ours != labels).mean() <= allowed < 0.5, f"after {steps} steps"


def test_both_stop_at_the_same_step(cat: torch.Tensor) -> None:
    """Soon, before rounding is amplified so far that the counts of labels differ."""
    clusterer = DeepClustering(**ONE, channels=16, steps=60, min_labels=14, num_segments=0, continuity=2)
    last = published.deep_cluster(as_array(cat), clusterer.initial_states()[0], 16, 2, 60, 14, None, 2.0)
    assert 1 < last.steps < 60, "it stops by its rule"
    ours = clusterer.train(cat[None])[0]
    clusterer.steps, clusterer.min_labels = last.steps, 0
    assert torch.equal(ours, clusterer.train(cat[None])[0])


def test_both_votes_lead_to_the_same_labels(cat: torch.Tensor) -> None:
    segments = published.superpixels(as_array(cat), 200, 100.0)
    state = published.initial_state(12, 2)
    loop, counted = (
        published.deep_cluster(as_array(cat), state, 12, 2, 4, 1, segments, 0.0, vote=vote) for vote in published.VOTES
    )
    assert np.array_equal(loop.labels, counted.labels) and np.array_equal(loop.responses, counted.responses)
    with pytest.raises(ValueError, match="vote must be one of numpy, bincount, got 'majority'"):
        published.deep_cluster(as_array(cat), state, 12, 2, 4, 1, segments, 0.0, vote="majority")


def test_votes_agree_with_ties_and_empty_superpixels() -> None:
    random = np.random.default_rng(1)
    labels, segments = random.integers(0, 4, (17, 23)), random.integers(0, 60, (17, 23)) * 3
    counted = published.superpixel_vote_bincount(torch.from_numpy(labels), torch.from_numpy(segments), 4)
    assert np.array_equal(counted.numpy(), published.superpixel_vote(labels, segments))


def test_largest_box_agrees() -> None:
    maps = torch.rand(4, 1, 31, 44, generator=torch.Generator().manual_seed(0))
    maps[1], maps[2, :, 5:9, 40:] = 0, 3
    found = ops.largest_box(maps, 0.6)[0]
    assert published.largest_box(maps[1, 0].numpy(), 0.6) is None
    for i in (0, 2, 3):
        assert np.array_equal(published.largest_box(maps[i, 0].numpy(), 0.6), found[i, 0].numpy())


def test_labels_at_full_size_agree(cat: torch.Tensor) -> None:
    """The library renumbers labels; otherwise they are the same."""
    clusterer = DeepClustering(**ONE, channels=12, steps=3)
    large = F.interpolate(cat[None], (151, 230), mode="bilinear").clamp(0, 1)
    small = F.interpolate(large, (74, 112), mode="bilinear", antialias=True)
    array = as_array(small[0])
    segments = segment(small, clusterer.num_segments, clusterer.compactness)[0].numpy()
    literal = published.deep_cluster(array, clusterer.initial_states()[0], 12, 2, 3, 3, segments, 0.0)
    expected = published.upsample_labels(literal, (151, 230))
    labels, counts = clusterer(large)
    renumbered = np.unique(expected, return_inverse=True)[1].reshape(expected.shape)
    assert int(counts[0]) == renumbered.max() + 1
    assert (labels[0].numpy() != renumbered).mean() <= 0.002


def test_vote_and_cluster_mean_agree() -> None:
    random = np.random.default_rng(0)
    labels, segments = random.integers(0, 6, (30, 41)), random.integers(0, 50, (30, 41))
    voted = ops.cluster_vote(torch.from_numpy(labels)[None], torch.from_numpy(segments)[None])
    assert np.array_equal(voted[0].numpy(), published.superpixel_vote(labels, segments))
    cam = random.random((30, 41), dtype=np.float32)
    for backend in ("reference", "native"):
        for alpha in (0.0, 0.3, 1.0):
            with molt.backend(backend):
                refined = ops.cluster_refine(torch.from_numpy(cam)[None, None], torch.from_numpy(labels)[None], alpha)
                refined = ops.upsample_normalize(refined, (30, 41))
            assert np.allclose(refined[0, 0].numpy(), published.refine(cam, labels, alpha), atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.usefixtures("our_superpixels")
def test_the_whole_method_agrees(cat: torch.Tensor, shared: bool) -> None:
    torch.manual_seed(3)
    sizes = (32, (48, 80))
    model = molt.create_model("molt_deit_tiny", 6, sizes, shared=shared, pretrained=False)
    for transformer in model.transformers:
        transformer.backbone.model.blocks = transformer.backbone.model.blocks[:4]
        for block in transformer.backbone.model.blocks:
            block.attn.qkv.weight.data *= 8
    model.mark_trained(True)
    images = F.interpolate(cat[None], (48, 80), mode="bilinear", antialias=True)
    clusterer = DeepClustering(**ONE, channels=10, steps=4, num_segments=150, working_size=None)
    scales = [model.transformer(i) for i in range(2)]
    literal = published.localize(
        [t.backbone.model for t in scales],
        [(t.head.weight, t.head.bias) for t in scales],
        model.pyramid(images),
        (48, 80),
        [4, 1],
        as_array(images[0]),
        clusterer.initial_states()[0],
        channels=10,
        layers=2,
        steps=4,
        num_segments=150,
        alpha=0.5,
    )
    with torch.no_grad():
        assert np.allclose(model(images)[0].numpy(), literal.logits, atol=1e-5)
        assert np.allclose(model.localize(images, [4, 1])[0].numpy(), literal.maps, atol=1e-4)
    loc = molt.Localizer(model, device="cpu", clusterer=clusterer, alpha=0.5)
    found = loc._maps(images, torch.tensor([4, 1]))
    # The localizer puts the likelier class first.
    order = [[4, 1].index(int(c)) for c in found.evidence.classes[0]]
    assert np.allclose(found.refined[0].numpy(), literal.refined[order], atol=1e-3)


def test_reference_twins_agree_with_the_literal_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    cams = [torch.randn(3, *grid, generator=generator) for grid in ((4, 5), (6, 9), (1, 1))]
    cams[1][2] = 1.5  # constant
    literal = published.combine([published.upsample_minmax(cam, (31, 44)) for cam in cams])
    fused = ops.fuse_maps([cam[None] for cam in cams], (31, 44))[0].numpy()
    assert np.allclose(fused, literal, atol=1e-6)


def test_the_command_that_times_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "loop.json"
    command = [
        sys.executable,
        SPEED,
        "--steps",
        "4",
        "--rounds",
        "1",
        "--size",
        "24,6,40",
        "--json",
        path,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    assert "extrapolated" in done.stdout.lower() and all(row["full_run_s"]["extrapolated"] for row in report["steps"])
    forms = {row["form"] for row in report["steps"]}
    assert forms >= {"published loop, numpy vote", "published loop, bincount vote", "molt, fused"}
