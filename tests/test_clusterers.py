"""What every clusterer promises, and what SLIC and deep clustering promise besides."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import molt
from molt import Features, ops
from molt.clustering import DeepClustering, Slic, TokenKMeans, _labels

pytestmark = pytest.mark.usefixtures("one_thread")

# Small and quick: they work at 24 pixels a side.
MAKERS: dict[str, Callable[..., Any]] = {
    "kmeans": lambda **more: TokenKMeans(**{"num_clusters": 4, "working_size": 24, **more}),
    "slic": lambda **more: Slic(**{"num_segments": 12, "working_size": 24, **more}),
    "deep": lambda **more: DeepClustering(
        "published", **{"channels": 8, "steps": 5, "num_segments": 30, "working_size": 24, **more}
    ),
    "continuous": lambda **more: DeepClustering(
        "published", **{"channels": 8, "steps": 5, "num_segments": 0, "continuity": 1, "working_size": 24, **more}
    ),
    "merged": lambda **more: DeepClustering(
        **{"channels": 8, "steps": 2, "num_segments": 30, "working_size": 24, "starts": 3, "merged": 6, **more}
    ),
}
DEEP = ["deep", "continuous"]
EVERY = pytest.mark.parametrize("name", MAKERS)
CHUNKS = _labels.chunks


def photos(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth random colours with some noise."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(batch, 3, 4, 5, generator=generator)
    smooth = F.interpolate(colours, (height, width), mode="bilinear", align_corners=False)
    return 0.9 * smooth + 0.1 * torch.rand(batch, 3, height, width, generator=generator)


def features(batch: int = 3, grid: tuple[int, int] = (7, 9), dim: int = 12, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, dim, 3, 3, generator=generator)
    smooth = F.interpolate(coarse, grid, mode="bilinear", align_corners=False)
    patches = smooth + 0.2 * torch.randn(smooth.shape, generator=generator)
    return Features(patches.flatten(2).transpose(1, 2), grid, (grid[0] * 5, grid[1] * 6))


def check_contract(labels: Tensor, counts: Tensor, batch: int, size: tuple[int, int]) -> None:
    assert labels.dtype == torch.int32 and labels.shape == (batch, *size)
    assert counts.dtype == torch.int64 and counts.shape == (batch,)
    for image, count in zip(labels, counts.tolist(), strict=True):
        assert image.unique().tolist() == list(range(count)) and count >= 1


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_names_are_where_they_should_be() -> None:
    import molt.clustering

    assert set(molt.clustering.__all__) >= {"TokenKMeans", "DeepClustering", "Slic"}
    assert (molt.clustering.Slic, molt.clustering.DeepClustering) == (Slic, DeepClustering)


# 24 is the working size: above, below, at it, and one side far above.
@EVERY
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 7), (2, 1), (5, 4), (24, 24), (37, 50), (50, 37), (130, 90), (2048, 3), (2, 2048)]
)
def test_labels_are_the_images_size_and_have_no_gaps(name: str, size: tuple[int, int]) -> None:
    with no_warning():
        labels, counts = MAKERS[name]()(photos(2, *size))
    check_contract(labels, counts, 2, size)
    if min(size) > 3:
        assert (counts > 1).all()


@EVERY
@pytest.mark.parametrize("grid", [(7, 9), (1, 1), (1, 5), (30, 28)])
def test_features_are_labelled_at_their_images_size(name: str, grid: tuple[int, int]) -> None:
    x = features(grid=grid)
    with no_warning():
        labels, counts = MAKERS[name]()(x)
    check_contract(labels, counts, 3, (grid[0] * 5, grid[1] * 6))
    if min(grid) > 3:
        assert (counts > 1).all()


@EVERY
@pytest.mark.parametrize("size", [(11, 13), (64, 40), (1, 1), [20, 30], torch.Size((9, 9))])
def test_size_decides_the_labels_size(name: str, size: Any) -> None:
    for x in (photos(2, 30, 40), features(2)):
        labels, counts = MAKERS[name]()(x, size)
        check_contract(labels, counts, 2, tuple(size))
        assert torch.equal(MAKERS[name]()(x, size=size)[0], labels)


@EVERY
@pytest.mark.parametrize(
    ("size", "error"),
    [((0, 4), ValueError), ((4, -1), ValueError), ((4,), TypeError), (4, TypeError), ((4.5, 2), TypeError)],
)
def test_bad_sizes_are_named(name: str, size: Any, error: type[Exception]) -> None:
    for x in (photos(1, 6, 6), features(1)):
        with pytest.raises(error, match="^size"):
            MAKERS[name]()(x, size)


@EVERY
def test_labels_lie_where_the_image_says(name: str, photo: Tensor) -> None:
    """Also at another size than that worked at: the disc's labels stay in the disc."""
    disc = disc_mask()
    # The rim is left out, which is a pixel at the working size.
    y, x = torch.meshgrid(torch.arange(120.0), torch.arange(160.0), indexing="ij")
    distance = ((y - 50) ** 2 + (x - 100) ** 2).sqrt()
    inside, outside = distance < 26, distance > 34
    more = {"slic": {"num_segments": 40}, "kmeans": {"position": 0.1, "num_clusters": 2}}.get(name, {"steps": 20})
    labels, _ = MAKERS[name](working_size=60, **more)(photo[None])
    assert inside.sum() > 1500 and disc.sum() > 2500
    owner = torch.stack([((labels[0] == i) & inside).sum() for i in range(int(labels.max()) + 1)])
    stray = torch.stack([((labels[0] == i) & outside).sum() for i in range(int(labels.max()) + 1)])
    # Of each label all but a few pixels are on one side.
    assert torch.minimum(owner, stray).sum() < 0.02 * inside.sum()
    assert (owner > stray).any() and (owner < stray).any()


def disc_mask() -> Tensor:
    """Where the disc of the fixture `photo` is."""
    y, x = torch.meshgrid(torch.arange(120.0), torch.arange(160.0), indexing="ij")
    return (y - 50) ** 2 + (x - 100) ** 2 < 30**2


@EVERY
def test_photos_do_not_depend_on_their_batch(name: str) -> None:
    images = photos(8, 37, 50)
    images[5] = 0.4  # one that is done early
    cluster = MAKERS[name]()
    labels, counts = cluster(images)
    alone = [cluster(image[None]) for image in images]
    assert len({tuple(one.flatten().tolist()) for one, _ in alone}) == 8, "eight photos of their own"
    for i in range(8):
        assert torch.equal(alone[i][0][0], labels[i]) and alone[i][1][0] == counts[i]
    order = [6, 5, 0]
    some, some_counts = cluster(images[order])
    assert torch.equal(some, labels[order]) and torch.equal(some_counts, counts[order])
    assert torch.equal(MAKERS[name]()(images.flip(0))[0], labels.flip(0))


@EVERY
def test_features_do_not_depend_on_their_batch(name: str) -> None:
    x = features(4)
    cluster = MAKERS[name](**({"compactness": 0.1} if name == "slic" else {}))
    labels, _ = cluster(x)
    for i in (3, 1):
        alone = Features(x.patches[i : i + 1], x.grid, x.image_size)
        assert torch.equal(cluster(alone)[0][0], labels[i])
    assert not torch.equal(labels[3], labels[1])


@pytest.mark.parametrize("name", ["kmeans", *DEEP])
def test_seed_decides(name: str) -> None:
    for x in (photos(1, 30, 40), features(1)):
        first, again = (MAKERS[name](seed=1)(x)[0] for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.equal(first, MAKERS[name](seed=2)(x)[0])


@EVERY
def test_strides_do_not_matter(name: str) -> None:
    images = photos(2, 40, 40).permute(0, 1, 3, 2)[:, :, ::2, 3:]
    last = photos(2, 30, 40).to(memory_format=torch.channels_last)
    one = photos(1, 30, 40).expand(3, -1, -1, -1)
    for x in (images, last, one):
        before = x.clone()
        labels, counts = MAKERS[name]()(x)
        expected, expected_counts = MAKERS[name]()(x.clone(memory_format=torch.contiguous_format))
        assert torch.equal(labels, expected) and torch.equal(counts, expected_counts)
        assert torch.equal(x, before), "the images are left alone"
    assert not images.is_contiguous() and not last.is_contiguous() and not one.is_contiguous()


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_floats_are_taken_as_float32(name: str, dtype: torch.dtype) -> None:
    images = photos(2, 30, 40).to(dtype)
    labels, counts = MAKERS[name]()(images)
    check_contract(labels, counts, 2, (30, 40))
    assert torch.equal(labels, MAKERS[name]()(images.float())[0])
    x = features(2)
    other = Features(x.patches.to(dtype), x.grid, x.image_size)
    same = Features(x.patches.to(dtype).float(), x.grid, x.image_size)
    assert torch.equal(MAKERS[name]()(other)[0], MAKERS[name]()(same)[0])


@EVERY
def test_empty_batch(name: str) -> None:
    labels, counts = MAKERS[name]()(torch.rand(0, 3, 8, 8))
    check_contract(labels, counts, 0, (8, 8))
    labels, counts = MAKERS[name]()(torch.rand(0, 3, 8, 8), (5, 4))
    check_contract(labels, counts, 0, (5, 4))
    labels, counts = MAKERS[name]()(Features(torch.rand(0, 6, 4), (2, 3), (28, 42)))
    check_contract(labels, counts, 0, (28, 42))


@EVERY
@pytest.mark.parametrize("value", [0.0, 0.4, 1.0])
def test_constant_image(name: str, value: float) -> None:
    with no_warning():
        labels, counts = MAKERS[name]()(torch.full((2, 3, 20, 30), value))
        check_contract(labels, counts, 2, (20, 30))
        constant = Features(torch.full((2, 30, 4), value), (5, 6), (20, 24))
        labels, counts = MAKERS[name]()(constant)
    check_contract(labels, counts, 2, (20, 24))
    assert torch.equal(labels[0], labels[1])


@EVERY
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_mode_and_random_state_are_left_alone(name: str, mode: Callable) -> None:
    expected, _ = MAKERS[name]()(photos(2, 20, 30))
    expected_features, _ = MAKERS[name]()(features(2))
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        labels, counts = MAKERS[name]()(photos(2, 20, 30))
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
        assert torch.equal(MAKERS[name]()(features(2))[0], expected_features)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert torch.equal(labels, expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@EVERY
def test_images_made_in_inference_mode(name: str) -> None:
    with torch.inference_mode():
        images, x = photos(2, 20, 30), features(2)
    assert images.is_inference() and x.patches.is_inference()
    assert torch.equal(MAKERS[name]()(images)[0], MAKERS[name]()(photos(2, 20, 30))[0])
    assert torch.equal(MAKERS[name]()(x)[0], MAKERS[name]()(features(2))[0])


@EVERY
def test_images_that_require_a_gradient(name: str) -> None:
    images = photos(1, 20, 30).requires_grad_()
    labels, _ = MAKERS[name]()(images)
    assert not labels.requires_grad and images.grad is None
    assert torch.equal(labels, MAKERS[name]()(images.detach())[0])


@EVERY
def test_features_that_require_a_gradient(name: str) -> None:
    x = features(1)
    patches = x.patches.clone().requires_grad_()
    labels, _ = MAKERS[name]()(Features(patches, x.grid, x.image_size))
    assert not labels.requires_grad and patches.grad is None
    assert torch.equal(labels, MAKERS[name]()(x)[0])


@EVERY
def test_bad_images_are_named(name: str) -> None:
    cluster = MAKERS[name]()
    for shape in ((3, 8, 8), (1, 1, 8, 8), (1, 4, 8, 8), (1, 3, 0, 8), (1, 3, 8, 0), (1, 3, 2, 8, 8)):
        with pytest.raises(ValueError, match=r"^images must have shape \(B, 3, H, W\), got \(" + str(shape[0])):
            cluster(torch.zeros(shape))
    for dtype in (torch.uint8, torch.int64, torch.bool):
        with pytest.raises(TypeError, match=f"^images must be floating point.*{dtype}"):
            cluster(torch.zeros(1, 3, 8, 8, dtype=dtype))
    for value, kind in ((np.zeros((1, 3, 8, 8), np.float32), "ndarray"), ([[1.0]], "list"), (None, "NoneType")):
        with pytest.raises(TypeError, match=f"^images must be a torch tensor.*{kind}"):
            cluster(value)


@pytest.mark.parametrize("name", ["slic", *DEEP])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(name: str, value: float) -> None:
    images = photos(3, 10, 12)
    images[2, 1, 9, 11] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        MAKERS[name]()(images)
    x = features(2)
    x.patches[1, -1, 0] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        MAKERS[name]()(x)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kind", "argument", "values"),
    [
        (TokenKMeans, "num_clusters", (0, -1, 257)),
        (TokenKMeans, "restarts", (0, -2)),
        (TokenKMeans, "iterations", (0, -2)),
        (TokenKMeans, "position", (-0.1, -INF)),
        (TokenKMeans, "working_size", (0, -5)),
        (Slic, "num_segments", (0, -1)),
        (Slic, "compactness", (0, -1.0, NAN)),
        (Slic, "working_size", (0, -5)),
        (DeepClustering, "channels", (1, 0, -1, 1025)),
        (DeepClustering, "layers", (0, -1, 17)),
        (DeepClustering, "steps", (-1,)),
        (DeepClustering, "min_labels", (0, -1)),
        (DeepClustering, "num_segments", (-1,)),
        (DeepClustering, "continuity", (-0.1, NAN, INF)),
        (DeepClustering, "compactness", (0, -1.0, NAN)),
        (DeepClustering, "starts", (0, -1, 65)),
        (DeepClustering, "merged", (-1, 257)),
        (DeepClustering, "working_size", (0, -5)),
    ],
)
def test_arguments_out_of_range_are_named(kind: type, argument: str, values: tuple) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^{argument} must .*got {value}$"):
            kind(**{argument: value})


def test_arguments_at_their_ends_are_taken() -> None:
    images = photos(1, 9, 11)
    ends = [
        TokenKMeans(5, restarts=1, iterations=1, position=0, working_size=1),
        TokenKMeans(256),
        Slic(1, compactness=1e-3, working_size=1),
        Slic(10_000, compactness=1e4, working_size=None),
        DeepClustering("published", channels=2, layers=1, steps=0, min_labels=1, num_segments=0, working_size=1),
        DeepClustering(
            channels=1024,
            layers=1,
            steps=1,
            min_labels=2000,
            num_segments=1,
            continuity=1.0,
            compactness=1e-3,
            working_size=None,
        ),
    ]
    counts = []
    for cluster in ends:
        labels, count = cluster(images)
        check_contract(labels, count, 1, (9, 11))
        counts.append(int(count))
    assert counts[0] == counts[2] == counts[4] == 1, "one pixel is worked on"
    assert counts[1] == counts[3] == 99, "every pixel its own"


# SLIC


def test_slic_gives_about_as_many_as_asked_for() -> None:
    images = photos(2, 60, 80)
    for wanted in (1, 20, 100):
        _, counts = Slic(wanted, compactness=50)(images)
        assert (counts <= 1.3 * wanted).all() and (counts >= 0.6 * wanted).all()


def test_slic_segments_are_connected() -> None:
    from scipy import ndimage

    labels, counts = Slic(40)(photos(1, 60, 80))
    for i in range(int(counts)):
        _, pieces = ndimage.label(labels[0].numpy() == i, np.ones((3, 3)))
        assert pieces == 1


def test_slic_compactness_squares_the_segments() -> None:
    """Squarer superpixels have shorter borders."""
    images = photos(1, 60, 80)

    def border(labels: Tensor) -> int:
        return int((labels.diff(dim=1) != 0).sum() + (labels.diff(dim=2) != 0).sum())

    loose, square = (Slic(30, compactness=weight)(images)[0] for weight in (0.5, 100.0))
    assert border(square) < 0.8 * border(loose)


def test_slic_is_scikit_images_at_the_images_own_size() -> None:
    """Each side's segments lie inside the other's, but for small pieces, which join other neighbours."""
    from skimage.segmentation import slic

    images = photos(2, 30, 40)
    labels, counts = Slic(20, compactness=5, working_size=None)(images)
    for image, found, count in zip(images, labels.numpy(), counts.tolist(), strict=True):
        expected = slic(image.permute(1, 2, 0).double().numpy(), 20, 5, start_label=0)
        table = np.zeros((count, expected.max() + 1), int)
        np.add.at(table, (found, expected), 1)
        assert min(table.max(1).sum(), table.max(0).sum()) >= 0.85 * found.size
        assert abs(count - len(np.unique(expected))) <= 2
    small, _ = Slic(20, compactness=5, working_size=20)(images)
    assert not torch.equal(small, labels)
    assert torch.equal(Slic(20, compactness=5, working_size=40)(images)[0], labels), "nothing to shrink"


def test_slic_repeats_the_working_sizes_labels() -> None:
    """Each cell at 10 x 15 is a block of 4 x 4 pixels: what is worked on is the antialiased copy."""
    images = photos(1, 40, 60)
    labels, _ = Slic(12, working_size=15)(images)
    blocks = labels.unfold(1, 4, 4).unfold(2, 4, 4).flatten(3)
    assert blocks.shape == (1, 10, 15, 16) and (blocks == blocks[..., :1]).all()


# Deep clustering


ONE: dict[str, Any] = {"starts": 1, "merged": 0, "steps": 40}


@pytest.mark.parametrize("more", [ONE, {**ONE, "num_segments": 0, "continuity": 1.0}], ids=["vote", "continuity"])
def test_deep_finds_the_regions_of_a_simple_image(more: dict, photo: Tensor) -> None:
    """One label is the disc, and the ground has others."""
    labels, counts = DeepClustering(**more)(photo[None])
    disc = disc_mask()
    label = labels[0][disc].mode().values
    mask = labels[0] == label
    assert (mask & disc).sum() / (mask | disc).sum() > 0.85
    ground = labels[0][~disc].mode().values
    assert ground != label and 2 <= int(counts) <= 16
    assert (labels[0] == ground)[~disc].float().mean() > 0.5


def test_merged_clusters_do_not_cross_the_edge(photo: Tensor) -> None:
    """At the default's own settings there are more clusters than regions, but few pixels are on the wrong side."""
    labels, counts = DeepClustering()(photo[None])
    disc = disc_mask()
    assert 8 <= int(counts) <= 32
    inside = torch.stack([(labels[0] == k)[disc].sum() for k in range(int(counts))]).float()
    whole = labels[0].flatten().long().bincount(minlength=int(counts)).float()
    wrong = torch.minimum(inside, whole - inside).sum() / whole.sum()
    assert wrong < 0.03


def test_training_is_what_finds_them(photo: Tensor) -> None:
    """Labels become fewer as a network trains, in either form."""
    for more in ({"num_segments": 100}, {"num_segments": 0, "continuity": 1.0}):
        counts = [
            int(DeepClustering(**{**ONE, "steps": steps}, working_size=48, **more)(photo[None])[1]) for steps in (0, 40)
        ]
        assert counts[1] < counts[0]


@pytest.mark.parametrize("name", DEEP)
def test_deep_has_no_more_labels_than_channels(name: str) -> None:
    noise = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    for channels in (2, 3, 16):
        _, counts = MAKERS[name](channels=channels, steps=1)(noise)
        assert counts.tolist() == [channels] * 2, "noise uses all"


@pytest.mark.parametrize("name", DEEP)
def test_deep_stops_at_min_labels(name: str) -> None:
    images = photos(3, 20, 30)
    one, two, many = (MAKERS[name](steps=steps, min_labels=1)(images)[0] for steps in (1, 2, 5))
    assert torch.equal(MAKERS[name](steps=5, min_labels=8)(images)[0], one)
    assert not torch.equal(one, two) and not torch.equal(one, many)


@pytest.mark.parametrize("name", DEEP)
def test_deep_without_a_step_is_the_initial_network(name: str) -> None:
    """Written with PyTorch's own layers."""
    cluster = MAKERS[name](steps=0, layers=2)
    images = photos(1, 20, 24)
    state = cluster.initial_states()[0]
    layers: list[torch.nn.Module] = []
    for wide, kernel in ((3, 3), (8, 3), (8, 1)):
        layers += [torch.nn.Conv2d(wide, 8, kernel, padding=kernel // 2), torch.nn.ReLU(), torch.nn.BatchNorm2d(8)]
    del layers[7]  # none between the last convolution and its norm
    network = torch.nn.Sequential(*layers).train()
    with torch.no_grad():
        for value, given in zip(network.parameters(), state, strict=True):
            assert value.shape == given.shape
            value.copy_(given)
        expected = network(images).argmax(1)[0]
    labels, counts = cluster(images)
    assert int(counts) == len(expected.unique()) > 2
    pairs = set(zip(labels.flatten().tolist(), expected.flatten().tolist(), strict=True))
    assert len(pairs) == int(counts), "the same partition"


def plain_training(cluster: DeepClustering, image: Tensor, segments: np.ndarray | None) -> Tensor:
    """One image's training as the papers have it, with PyTorch's own layers, losses and optimiser."""
    layers: list[torch.nn.Module] = []
    widths = [3, *[cluster.channels] * cluster.layers]
    for wide in widths[:-1]:
        layers += [torch.nn.Conv2d(wide, cluster.channels, 3, padding=1), torch.nn.ReLU()]
        layers += [torch.nn.BatchNorm2d(cluster.channels)]
    layers += [torch.nn.Conv2d(cluster.channels, cluster.channels, 1), torch.nn.BatchNorm2d(cluster.channels)]
    network = torch.nn.Sequential(*layers).train()
    with torch.no_grad():
        for value, given in zip(network.parameters(), cluster.initial_states()[0], strict=True):
            value.copy_(given)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(cluster.steps):
        responses = network(image[None])[0].flatten(1).T
        target = responses.argmax(1)
        kinds = len(target.unique())
        if segments is not None:
            flat = torch.from_numpy(segments).flatten()
            for segment in flat.unique():
                target[flat == segment] = target[flat == segment].bincount().argmax()
        loss = F.cross_entropy(responses, target)
        grid = responses.view(*image.shape[1:], -1)
        if cluster.continuity:
            loss = loss + cluster.continuity * (grid.diff(dim=0).abs().mean() + grid.diff(dim=1).abs().mean())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if kinds <= cluster.min_labels:
            break
    with torch.no_grad():
        return network(image[None])


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("more", [{}, {"layers": 1, "channels": 5}, {"layers": 3, "steps": 3}, {"min_labels": 8}])
def test_deep_trains_as_a_plain_loop_does(name: str, more: dict) -> None:
    cluster = MAKERS[name](**more)
    images = photos(2, 20, 24)
    for image in images:
        segments = None
        if cluster.num_segments:
            made = ops.slic(image[None], cluster.num_segments, 100.0, backend="reference")
            segments = made.labels[0].numpy()
        expected = plain_training(cluster, image, segments)
        found = cluster._train(image[None], lab=True)
        assert (found - expected).abs().max() < 5e-3
        assert (found.argmax(1) != expected.argmax(1)).float().mean() <= 0.005
    untrained = MAKERS[name](**{**more, "steps": 0})._train(images[:1], lab=True)
    assert (untrained - cluster._train(images[:1], lab=True)).abs().max() > 0.1


@pytest.fixture(params=["native", "reference"])
def either_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference trains images together on the CPU too, where the native form takes one after the other."""
    with molt.backend(request.param):
        yield request.param


@pytest.mark.usefixtures("either_backend")
@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("early", [False, True])
def test_a_group_trains_as_each_alone(name: str, early: bool) -> None:
    """Also where one, whose labels are few after a step, stops before the others."""
    images = photos(3, 40, 56)
    images[1] = 0.4
    kinds = torch.tensor(
        [
            [
                len(MAKERS[name](steps=steps, min_labels=1)._train(image[None], lab=True).argmax(1).unique())
                for image in images
            ]
            for steps in range(5)
        ]
    )
    least = int(kinds[1, 1]) if early else 1
    assert (kinds[:, [0, 2]] > least).all()
    cluster = MAKERS[name](min_labels=least, steps=5)
    together = cluster._train(images, lab=True)
    alone = torch.cat([cluster._train(images[i : i + 1], lab=True) for i in range(3)])
    assert together.shape == alone.shape == (3, 8, 40, 56)
    assert (together.argmax(1) != alone.argmax(1)).float().mean() <= 0.001
    assert (together - alone).abs().max() < 0.02
    with molt.backend("native"):
        native = cluster._train(images, lab=True)
    assert (native.argmax(1) != together.argmax(1)).float().mean() <= 0.01, "stopped at the same steps"
    if early:
        on = MAKERS[name](min_labels=1, steps=5)._train(images, lab=True)
        moved = (on - together).flatten(1).abs().amax(1)
        assert moved[1] > 0.05 and (moved[[0, 2]] < 0.02).all(), "only the second stopped early"


@pytest.mark.parametrize("name", DEEP)
def test_initial_state_is_pytorchs_and_the_seeds(name: str) -> None:
    state = MAKERS[name](channels=64).initial_states(5)[0]
    shapes = [(64, 5, 3, 3), (64,), (64,), (64,), (64, 64, 3, 3), (64,), (64,), (64,), (64, 64, 1, 1), *[(64,)] * 3]
    assert [tuple(value.shape) for value in state] == shapes
    for weight, bias, fan in ((state[0], state[1], 45), (state[4], state[5], 576), (state[8], state[9], 64)):
        for value in (weight, bias):
            assert value.abs().max() <= 1 / math.sqrt(fan)
            assert value.abs().max() > 0.9 / math.sqrt(fan) and value.mean().abs() < 0.3 / math.sqrt(fan)
    again, other = (MAKERS[name](channels=64, seed=seed).initial_states(5)[0] for seed in (0, 1))
    assert torch.equal(state[4], again[4]) and not torch.equal(state[4], other[4])


# The unit of work


@pytest.mark.parametrize("number", range(40))
def test_units_on_a_gpu(number: int) -> None:
    units = CHUNKS(number, "cuda")
    assert [i for start, stop, _ in units for i in range(start, stop)] == list(range(number)), "each photo once"
    for start, stop, size in units:
        assert size in (2, 8) and 1 <= stop - start <= size
    # No larger unit than its photos need, and full ones but for the last.
    assert all(stop - start > 2 for start, stop, size in units if size == 8)
    assert all(stop - start == size for start, stop, size in units[:-1])
    assert all(size <= 2 * (stop - start) for start, stop, size in units), "no photo pays for more than two"


def test_units_of_few_photos() -> None:
    assert CHUNKS(1, "cuda") == [(0, 1, 2)] and CHUNKS(2, "cuda") == [(0, 2, 2)]
    assert CHUNKS(3, "cuda") == [(0, 2, 2), (2, 3, 2)] and CHUNKS(9, "cuda") == [(0, 8, 8), (8, 9, 2)]
    assert CHUNKS(3, "cpu") == [(0, 1, 1), (1, 2, 1), (2, 3, 1)] and CHUNKS(0, "cuda") == CHUNKS(0, "cpu") == []


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are worked on in a GPU's units."""
    monkeypatch.setattr(_labels, "chunks", lambda number, device_type: CHUNKS(number, "cuda"))


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("number", "sizes"),
    [(0, []), (1, [2]), (2, [2]), (3, [2, 2]), (5, [8]), (8, [8]), (9, [8, 2]), (12, [8, 2, 2]), (13, [8, 8])],
)
def test_the_last_unit_is_filled_up_and_cut(number: int, sizes: list[int]) -> None:
    seen = []

    def run(chunk: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(chunk)
        labels = chunk[:, :1, 0, 0, None].to(torch.int32).expand(-1, 4, 5)
        return labels, chunk[:, 0, 0, 0].long() + 1

    values = torch.arange(float(number)).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    labels, counts = _labels.in_chunks(run, values, (4, 5))
    assert [len(chunk) for chunk in seen] == sizes
    assert labels.shape == (number, 4, 5) and labels.dtype == torch.int32
    assert (labels == torch.arange(number).view(-1, 1, 1)).all() and counts.tolist() == list(range(1, number + 1))
    if seen:
        assert (torch.cat(seen)[number:] == number - 1).all(), "copies of the last"


@EVERY
@pytest.mark.parametrize("number", [1, 3, 8, 9])
def test_units_of_several_photos_give_each_its_own_labels(
    name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = MAKERS[name]()
    given = photos(number, 37, 50), features(number)
    alone = [cluster(x) for x in given]
    monkeypatch.setattr(_labels, "chunks", lambda number, device_type: CHUNKS(number, "cuda"))
    for x, (labels, counts) in zip(given, alone, strict=True):
        found, found_counts = cluster(x)
        check_contract(found, found_counts, number, labels.shape[1:])
        assert torch.equal(found_counts, counts)
        # Deep clustering in groups adds in another order.
        assert (found != labels).float().mean() <= (0.005 if name in DEEP else 0)


def test_a_channel_of_another_photo_in_the_unit_gives_no_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third channel is highest nowhere in the first photo, but would be between its cells once upsampled."""
    responses = torch.tensor([[[[3.0, -5.0]], [[-5.0, 3.0]], [[2.0, 2.0]]], [[[0.0, 0.0]], [[0.0, 0.0]], [[9.0, 9.0]]]])
    monkeypatch.setattr(DeepClustering, "_train", lambda self, images, *, lab: responses[images[:, 0, 0, 0].long()])
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 8)
    cluster = DeepClustering("published", channels=3)
    alone, counts = cluster(images)
    assert counts.tolist() == [2, 1] and alone[0, 0].tolist() == [0] * 4 + [1] * 4
    monkeypatch.setattr(_labels, "chunks", lambda number, device_type: CHUNKS(number, "cuda"))
    together, together_counts = cluster(images)
    assert torch.equal(together, alone) and torch.equal(together_counts, counts)


def test_numpy_numbers_are_taken_and_other_types_named() -> None:
    assert DeepClustering(channels=np.int64(8), continuity=np.float32(1)).channels == 8
    assert TokenKMeans(np.int32(3), seed=np.int64(4)).seed == 4
    for value in (8.0, "8", True):
        with pytest.raises(TypeError, match=r"^channels must be an integer, got"):
            DeepClustering(channels=value)
    with pytest.raises(TypeError, match=r"^compactness must be a number, got 'x'"):
        Slic(compactness="x")
    with pytest.raises(ValueError, match=r"^seed must be in 0\.\."):
        DeepClustering(seed=2**64)


def test_train_checks_its_tensors() -> None:
    cluster = MAKERS["deep"]()
    images = photos(2, 8, 9)
    assert cluster.train(images[:0]).shape == (0, 8, 8, 9)
    assert cluster.train(images.double()).dtype == torch.float32
    with pytest.raises(TypeError, match="images: got uint8"):
        cluster.train(images.byte())
    with pytest.raises(ValueError, match="images: got shape"):
        cluster.train(images[0])
    with pytest.raises(ValueError, match=r"segments: got shape \(2, 8, 8\), expected \(2, 8, 9\)"):
        cluster.train(images, torch.zeros(2, 8, 8, dtype=torch.int64))


def test_slic_on_features_follows_them() -> None:
    truth = torch.zeros(16, 16, dtype=torch.int64)
    truth[:, 5:11] = 1
    x = Features(torch.eye(8)[truth.flatten()][None], (16, 16), (16, 16))
    labels, _ = Slic(12)(x)
    for label in labels.unique():
        assert len(truth[labels[0] == label].unique()) == 1, "no superpixel crosses the edge"
