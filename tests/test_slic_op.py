"""Superpixels: against the twin, against scikit-image by quality, and what must hold of every label."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import pytest
import skimage
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from molt import ops
from molt.ops import Superpixels

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "superpixels.py"
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    """The metrics of benchmarks/superpixels.py."""
    spec = importlib.util.spec_from_file_location("superpixels", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors would have threads wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def photo(name: str, side: int) -> Tensor:
    """One of scikit-image's own photos, (3, side, side)."""
    with PIL.Image.open(Path(skimage.__file__).parent / "data" / name) as image:
        small = image.convert("RGB").resize((side, side), PIL.Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 255


def smooth(*shape: int, seed: int = 0) -> Tensor:
    """Random blobs with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width = shape
    blobs = torch.rand(batch, channels, 6, 6, generator=generator)
    blobs = F.interpolate(blobs, (height, width), mode="bicubic", align_corners=False)
    return (blobs + 0.05 * torch.randn(shape, generator=generator)).clamp(0, 1)


def pieces(labels: Tensor) -> list[int]:
    """How many 4-connected pieces each label of one image has."""
    return [ndimage.label(labels.numpy() == k)[1] for k in range(int(labels.max()) + 1)]


def check_numbering(found: Superpixels) -> None:
    """Labels are 0..count-1 in reading order of their first pixels."""
    assert found.labels.dtype == torch.int32 and found.counts.dtype == torch.int64
    for labels, count in zip(found.labels, found.counts.tolist(), strict=True):
        names, first = np.unique(labels.numpy(), return_index=True)
        assert names.tolist() == list(range(count))
        assert (np.diff(first) > 0).all()


def same_partition(found: Tensor, other: Tensor) -> float:
    """Share of pixels on which one-to-one matched segments agree, the numbering left aside."""
    from scipy.optimize import linear_sum_assignment

    table = np.zeros((int(found.max()) + 1, int(other.max()) + 1), np.int64)
    np.add.at(table, (found.numpy().ravel(), other.numpy().ravel()), 1)
    return float(table[linear_sum_assignment(-table)].sum() / found.numel())


# The twin

SHAPES = [(1, 1, 1), (3, 1, 7), (3, 7, 1), (2, 1, 40), (5, 9, 13), (1, 16, 16), (3, 33, 57), (8, 20, 5), (40, 14, 14)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("number", [1, 2, 5, 40, 10**9])
def test_equals_the_twin_on_noise(shape: tuple[int, int, int], number: int) -> None:
    """In these continuous noises no pixel has two distances as near as rounding."""
    images = torch.rand(3, *shape, generator=torch.Generator().manual_seed(number % 1000))
    for more in ({}, {"min_size_factor": 0.9, "max_size_factor": 1.0}, {"enforce_connectivity": False}):
        for compactness in (0.05, 0.5, 20.0):
            options: dict[str, Any] = {"lab": False, "iterations": 6, **more}
            native = ops.slic(images, number, compactness, backend="native", **options)
            twin = ops.slic(images, number, compactness, backend="reference", **options)
            check_numbering(native)
            assert torch.equal(native.labels, twin.labels)
            assert torch.equal(native.counts, twin.counts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("number", "compactness"), [(30, 10.0), (30, 0.3), (900, 10.0), (12, 100.0)])
def test_agrees_with_the_twin_in_cielab(number: int, compactness: float, dtype: torch.dtype) -> None:
    """The colours differ by rounding, so that a pixel halfway may go either way, and its neighbours after it."""
    images = torch.cat([smooth(2, 3, 48, 40), photo("chelsea.png", 48)[None, :, :, :40]]).to(dtype)
    native = ops.slic(images, number, compactness, backend="native")
    twin = ops.slic(images, number, compactness, backend="reference")
    check_numbering(native)
    for found, expected in zip(native.labels, twin.labels, strict=True):
        assert same_partition(found, expected) >= 0.995


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_first_round_is_the_grid(backend: str) -> None:
    """Without colours each pixel joins the nearest seed: 3 x 4 squares of 10."""
    found = ops.slic(smooth(1, 3, 30, 40), 12, iterations=1, backend=backend)
    rows, columns = torch.arange(30)[:, None], torch.arange(40)
    # Seeds are 5, 15, 25...; halfway, at 10 and 20, the first wins.
    expected = (rows - 1).clamp(min=0).div(10, rounding_mode="floor").clamp(max=2) * 4
    expected = expected + (columns - 1).clamp(min=0).div(10, rounding_mode="floor").clamp(max=3)
    assert torch.equal(found.labels[0].long(), expected)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_two_flat_halves_are_told_apart(backend: str) -> None:
    images = torch.zeros(1, 3, 20, 36)
    images[..., 13:] = torch.tensor([0.9, 0.2, 0.1])[:, None, None]
    for lab, compactness in ((True, 2.0), (False, 0.02)):
        labels = ops.slic(images, 10, compactness, lab=lab, backend=backend).labels[0]
        assert not set(labels[:, :13].unique().tolist()) & set(labels[:, 13:].unique().tolist())


# Quality, beside scikit-image


@pytest.mark.parametrize("name", ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"])
@pytest.mark.parametrize(("number", "compactness"), [(100, 10.0), (40, 20.0), (400, 30.0)])
def test_clusters_are_scikit_images(name: str, number: int, compactness: float) -> None:
    """Before pieces are joined, which is done in another way, nearly every pixel lies in the same cluster."""
    from skimage.segmentation import slic

    if not (Path(skimage.__file__).parent / "data" / name).is_file():
        pytest.skip(f"this scikit-image comes without {name}")
    image = photo(name, 120)
    found = ops.slic(image[None], number, compactness, enforce_connectivity=False).labels[0]
    array = image.permute(1, 2, 0).contiguous().numpy()
    expected = slic(array, number, compactness, start_label=0, enforce_connectivity=False)
    assert same_partition(found, torch.from_numpy(expected)) >= 0.98


def hard_images() -> dict[str, tuple[Tensor, np.ndarray]]:
    """Images whose true regions are known: thin stripes, a disc in noise, a checkerboard, a ramp cut in two."""
    rows, columns = torch.meshgrid(torch.arange(120.0), torch.arange(120.0), indexing="ij")
    generator = torch.Generator().manual_seed(0)
    noise = 0.08 * torch.randn(3, 120, 120, generator=generator)
    stripes = (columns // 9) % 2
    disc = ((rows - 50) ** 2 + (columns - 66) ** 2 < 34**2).float()
    board = (rows // 15 + columns // 15) % 2
    ramp = (rows + columns > 120).float()
    colours = torch.tensor([0.5, -0.25, 0.2])[:, None, None]
    ground = torch.tensor([0.3, 0.5, 0.4])[:, None, None]
    slope = (columns / 600)[None]
    return {
        name: ((ground + colours * mask + noise + slope).clamp(0, 1), _regions(mask))
        for name, mask in {"stripes": stripes, "disc": disc, "board": board, "ramp": ramp}.items()
    }


def _regions(mask: Tensor) -> np.ndarray:
    """4-connected regions of both values, numbered."""
    on, number = ndimage.label(mask.numpy() == 1)
    off, _ = ndimage.label(mask.numpy() == 0)
    return np.where(mask.numpy() == 1, on, off + number)


@pytest.mark.parametrize("number", [50, 100, 800])
def test_quality_on_hard_images_is_scikit_images(number: int, quality: ModuleType) -> None:
    worse = {name: [] for name in quality.METRICS}
    for image, truth in hard_images().values():
        mine, other = quality.ours(image, number), quality.theirs(image, number)
        for name, metric in quality.METRICS.items():
            sign = -1 if "error" in name else 1
            worse[name].append(sign * (metric(other, truth) - metric(mine, truth)))
        if number == 800:
            assert quality.achievable_accuracy(mine, truth) > 0.9
    for name, values in worse.items():
        assert np.mean(values) <= 0.01, name
        assert name == "boundary recall" or max(values) <= 0.03, name


def test_the_metrics_themselves(quality: ModuleType) -> None:
    """By hand: left half and right half, and superpixels off by one column of ten."""
    truth = np.repeat(np.arange(2), 5)[None].repeat(10, 0)
    shifted = np.roll(truth, 1, 1)
    shifted[:, 0] = 0
    assert quality.boundary_recall(truth, truth) == quality.achievable_accuracy(truth, truth) == 1
    assert quality.undersegmentation(truth, truth) == 0
    assert quality.achievable_accuracy(shifted, truth) == 0.9
    assert quality.undersegmentation(shifted, truth) == pytest.approx(0.2)
    assert quality.boundary_recall(shifted, truth, 0) == 0
    assert quality.boundary_recall(shifted, truth, 1) == 1
    assert quality.boundary_recall(np.zeros_like(truth), truth) == 0
    assert quality.achievable_accuracy(np.zeros_like(truth), truth) == 0.5


# What holds of every result


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("number", "compactness"), [(20, 0.1), (20, 10.0), (300, 3.0), (5000, 10.0)])
def test_every_label_is_one_piece(number: int, compactness: float, backend: str) -> None:
    images = torch.cat([smooth(1, 3, 50, 70), torch.rand(1, 3, 50, 70, generator=torch.Generator().manual_seed(1))])
    for factors in ({}, {"min_size_factor": 0.0}, {"min_size_factor": 1.5, "max_size_factor": 1.0}):
        found = ops.slic(images, number, compactness, backend=backend, **factors)
        check_numbering(found)
        for labels in found.labels:
            assert set(pieces(labels)) == {1}


def test_sizes_keep_to_their_factors() -> None:
    image = torch.rand(1, 3, 60, 60, generator=torch.Generator().manual_seed(2))
    seeds = 36
    labels = ops.slic(image, seeds, 1.0, min_size_factor=0.5, max_size_factor=1.5).labels
    sizes = labels.flatten().bincount()
    assert sizes.min() >= 0.5 * 100
    cut = ops.slic(image, seeds, 1000.0, min_size_factor=0.0, max_size_factor=0.25).labels.flatten().bincount()
    assert cut.max() == 25
    free = ops.slic(image, seeds, 1.0, enforce_connectivity=False)
    assert max(pieces(free.labels[0])) > 1 and int(free.counts) <= seeds


def test_a_small_first_piece_joins_what_it_touches() -> None:
    """The corner has no segment before it to join."""
    image = torch.ones(1, 1, 12, 12)
    image[0, 0, 0, 0] = -30.0
    for backend in ("native", "reference"):
        found = ops.slic(image, 4, 0.01, lab=False, backend=backend)
        raw = ops.slic(image, 4, 0.01, lab=False, enforce_connectivity=False, backend=backend)
        assert (raw.labels == 0).sum() < 18 <= (found.labels == 0).sum()
        assert set(pieces(found.labels[0])) == {1}


@pytest.mark.parametrize(("shape", "number"), [((3, 200, 190), 60), ((3, 70, 300), 2000), ((1, 257, 129), 30)])
def test_same_bits_for_any_threads_batch_and_place(shape: tuple[int, int, int], number: int) -> None:
    images = torch.cat([smooth(7, *shape), torch.rand(5, *shape, generator=torch.Generator().manual_seed(3))])
    lab = shape[0] == 3
    torch.set_num_threads(1)
    expected = ops.slic(images, number, 5.0, lab=lab)
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        assert torch.equal(ops.slic(images, number, 5.0, lab=lab).labels, expected.labels)
        for i in (0, 4, 11):
            alone = ops.slic(images[i : i + 1], number, 5.0, lab=lab)
            assert torch.equal(alone.labels[0], expected.labels[i]) and alone.counts[0] == expected.counts[i]
        assert torch.equal(ops.slic(images.flip(0), number, 5.0, lab=lab).labels.flip(0), expected.labels)


def test_views_and_dtypes() -> None:
    images = (smooth(2, 3, 40, 44) * 255).round() / 256  # exact in every dtype but bfloat16 and its 8 bits
    expected = ops.slic(images, 25)
    wide = torch.zeros(2, 3, 40, 88)
    wide[..., ::2] = images
    for view in (wide[..., ::2], images.to(memory_format=torch.channels_last), images.half(), images.double()):
        assert torch.equal(ops.slic(view, 25).labels, expected.labels)
    rounded = images.bfloat16()
    assert torch.equal(ops.slic(rounded, 25).labels, ops.slic(rounded.float(), 25).labels)


def test_contrast_does_not_matter_for_lab_and_units_do_for_channels() -> None:
    images = smooth(2, 3, 40, 40)
    # A power of two and a shift that float32 holds exactly enough: the stretched values are the same.
    assert torch.equal(ops.slic(images * 0.25, 30).labels, ops.slic(images, 30).labels)
    features = torch.randn(2, 5, 20, 20, generator=torch.Generator().manual_seed(4))
    plain = ops.slic(features, 20, 0.5, lab=False).labels
    assert torch.equal(ops.slic(features * 8, 20, 4.0, lab=False).labels, plain)
    assert not torch.equal(ops.slic(features * 8, 20, 0.5, lab=False).labels, plain)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_constant_images_are_a_grid(backend: str) -> None:
    grey, black = torch.full((1, 3, 24, 24), 0.3), torch.zeros(1, 3, 24, 24)
    labels = ops.slic(torch.cat([grey, black]), 16, backend=backend).labels
    assert torch.equal(labels[0], labels[1])
    assert (
        labels[0].flatten().bincount().tolist()
        == ops.slic(black, 16, iterations=1).labels.flatten().bincount().tolist()
    )


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_the_smallest_inputs(backend: str) -> None:
    empty = ops.slic(torch.zeros(0, 3, 5, 6), backend=backend)
    assert empty.labels.shape == (0, 5, 6) and empty.counts.shape == (0,)
    assert empty.labels.dtype == torch.int32 and empty.counts.dtype == torch.int64
    one = ops.slic(torch.rand(2, 3, 1, 1), 7, backend=backend)
    assert one.labels.tolist() == [[[0]], [[0]]] and one.counts.tolist() == [1, 1]
    whole = ops.slic(smooth(2, 3, 30, 20), 1, backend=backend)
    assert not whole.labels.any() and whole.counts.tolist() == [1, 1]
    each = ops.slic(torch.zeros(1, 3, 4, 6), 10**12, min_size_factor=0, backend=backend)
    assert each.labels.flatten().tolist() == list(range(24))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_values_at_the_ends_of_their_range(dtype: torch.dtype) -> None:
    """Distances between them overflow; labels are still those of two flat halves."""
    top = torch.finfo(dtype).max
    images = torch.full((1, 3, 16, 16), -top, dtype=dtype)
    images[..., 7:] = top
    small = max(torch.finfo(dtype).tiny, 1e-200)
    for given in (images, (images > 0).to(dtype) * small):
        for lab, compactness in ((True, 1.0), (False, 1e-30 if given is images else small / 100)):
            for backend in ("native", "reference"):
                found = ops.slic(given, 4, compactness, lab=lab, backend=backend)
                labels = found.labels[0]
                assert not set(labels[:, :7].unique().tolist()) & set(labels[:, 7:].unique().tolist())
                check_numbering(found)


def test_a_large_offset_keeps_its_detail() -> None:
    """float64 features around a million are taken relative to their lowest value before they become float32."""
    features = torch.randint(0, 1000, (1, 2, 30, 30), generator=torch.Generator().manual_seed(5)).double() / 1024
    expected = ops.slic(features, 20, 0.3, lab=False).labels
    assert torch.equal(ops.slic(features + 2.0**30, 20, 0.3, lab=False).labels, expected)


def test_a_large_image_and_a_large_batch() -> None:
    image = smooth(1, 3, 1400, 1500)
    found = ops.slic(image, 300)
    check_numbering(found)
    assert 50 <= int(found.counts) <= 400
    tiny = torch.rand(40_000, 1, 3, 4, generator=torch.Generator().manual_seed(6))
    many = ops.slic(tiny, 2, 0.5, lab=False)
    picks = [0, 1, 19_999, 39_999]
    assert torch.equal(many.labels[picks], ops.slic(tiny[picks], 2, 0.5, lab=False).labels)


def test_too_many_pixels_are_refused() -> None:
    images = torch.zeros(1, 1, 1, 1, dtype=torch.float16).expand(1, 1, 1, 2**30 + 1)
    with pytest.raises(ValueError, match="images: got 1073741825 pixels an image, expected at most 1073741824"):
        ops.slic(images, 2, lab=False, backend="native")
    narrow = torch.zeros(1, 1, 1, 1, dtype=torch.float16).expand(1, 1, 2**27, 1)
    with pytest.raises(ValueError, match="images: got 134217728 x 1 pixels, expected at most 2147483647"):
        ops.slic(narrow, 2, lab=False, backend="native")


# Errors, compilation


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_not_finite_are_refused(value: float, dtype: torch.dtype, backend: str) -> None:
    for at in (0, 500, 35 * 36 - 1):
        images = torch.rand(6, 3, 35, 36).to(dtype)
        images[4, 1].view(-1)[at] = value
        for lab in (True, False):
            with pytest.raises(ValueError, match="^images: got NaN or infinite values in image 4, expected finite"):
                ops.slic(images, lab=lab, backend=backend)


@pytest.mark.parametrize(
    ("given", "named", "error", "message"),
    [
        (([[1.0]],), {}, TypeError, "images: got list, expected a tensor"),
        ((torch.zeros(1, 3, 4, 4, dtype=torch.uint8),), {}, TypeError, "images: got uint8, expected float16"),
        ((torch.zeros(3, 4, 4),), {}, ValueError, r"images: got shape \(3, 4, 4\), expected \(B, D, H, W\)"),
        ((torch.zeros(1, 3, 0, 4),), {}, ValueError, "images: got shape .* expected at least a channel and a pixel"),
        ((torch.zeros(1, 0, 4, 4),), {"lab": False}, ValueError, "images: got shape .* at least a channel"),
        ((torch.zeros(1, 4, 4, 4),), {}, ValueError, r"images: got shape \(1, 4, 4, 4\), expected \(B, 3, H, W\)"),
        ((torch.zeros(1, 3, 4, 4), 0), {}, ValueError, "num_segments must be at least 1, got 0"),
        ((torch.zeros(1, 3, 4, 4), 2.5), {}, TypeError, "num_segments must be an integer, got 2.5"),
        ((torch.zeros(1, 3, 4, 4), 2, 0.0), {}, ValueError, "compactness must be finite and above 0, got 0.0"),
        ((torch.zeros(1, 3, 4, 4), 2, float("inf")), {}, ValueError, "compactness must be finite"),
        ((torch.zeros(1, 3, 4, 4),), {"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        ((torch.zeros(1, 3, 4, 4),), {"min_size_factor": -1.0}, ValueError, "min_size_factor must be finite and not"),
        ((torch.zeros(1, 3, 4, 4),), {"max_size_factor": "x"}, TypeError, "max_size_factor must be a number"),
        ((torch.zeros(1, 3, 4, 4),), {"backend": "cuda"}, ValueError, "backend: got 'cuda', expected one of"),
    ],
)
def test_errors_name_the_argument(given: tuple, named: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.slic(*given, **named)


def test_opcheck_and_whole_graphs() -> None:
    images = smooth(2, 3, 20, 24)
    for connected in (True, False):
        torch.library.opcheck(torch.ops.molt.slic.default, (images, 9, 10.0, 5, True, connected, 0.5, 3.0))
    compiled = torch.compile(lambda x: ops.slic(x, 9), fullgraph=True, backend="aot_eager")
    found, expected = compiled(images), ops.slic(images, 9)
    assert torch.equal(found.labels, expected.labels) and torch.equal(found.counts, expected.counts)
    with pytest.raises(RuntimeError, match="images: got NaN or infinite values in image 1"):
        compiled(torch.stack([images[0], images[1] * torch.nan]))


def test_labels_carry_no_gradient() -> None:
    images = smooth(1, 3, 16, 16).requires_grad_()
    for backend in ("native", "reference"):
        assert not ops.slic(images, 4, backend=backend).labels.requires_grad


def test_the_library_does_not_import_scikit_image() -> None:
    """Whatever part of it is imported, and when superpixels are made."""
    code = """
import importlib, pkgutil, sys
sys.modules["skimage"] = None
import torch, molt
for module in pkgutil.walk_packages(molt.__path__, "molt."):
    if not module.name.rpartition(".")[2].startswith("_"):
        importlib.import_module(module.name)
from molt.clustering import DeepClustering, Slic
images = torch.rand(2, 3, 20, 20)
print(Slic(9)(images)[0].shape, DeepClustering(steps=1)(images)[0].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "torch.Size([2, 20, 20]) torch.Size([2, 20, 20])"
