"""molt.refine: whatever comes in goes out in kind, and the arithmetic is the one promised."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch

import molt
from molt import Features, ops
from molt.clustering import TokenKMeans


@pytest.fixture
def blob(photo: torch.Tensor) -> torch.Tensor:
    """A coarse heat map that covers part of the photo's disc."""
    maps = torch.zeros(6, 8)
    maps[1:3, 4:5] = 1
    maps[2, 5] = 0.4
    return maps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 8), (1, 6, 8), (2, 6, 8), (1, 3, 6, 8), (2, 3, 6, 8)])
def test_torch_in_torch_out(photo: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    maps = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = maps.clone()
    images = photo if len(shape) == 2 else photo.expand(shape[0], -1, -1, -1)
    out = molt.refine(maps, images)
    assert out.dtype == dtype and out.device == maps.device and out.shape == (*shape[:-2], 120, 160)
    assert torch.equal(maps, before)
    assert out.float().amin() == 0 and out.float().amax() == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_in_numpy_out(photo: torch.Tensor, dtype: type) -> None:
    maps = np.random.default_rng(0).random((2, 5, 7)).astype(dtype)
    before = maps.copy()
    pixels = (photo.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    out = molt.refine(maps, np.stack([pixels, pixels]))
    assert isinstance(out, np.ndarray) and out.dtype == dtype and out.shape == (2, 120, 160)
    assert np.array_equal(maps, before)


def test_numpy_and_torch_agree_and_strides_do_not_matter(photo: torch.Tensor) -> None:
    maps = torch.rand(8, 12, generator=torch.Generator().manual_seed(0))
    pixels = (photo.permute(1, 2, 0) * 255).to(torch.uint8)
    expected = molt.refine(maps, pixels.numpy())
    flipped = np.flip(np.flip(maps.numpy(), 1).copy(), 1)
    flipped.flags.writeable = False
    assert np.allclose(molt.refine(flipped, pixels.numpy()), expected.numpy(), atol=1e-6)
    assert torch.equal(molt.refine(maps.T.contiguous().T, pixels.numpy()), expected)


def test_photos_of_every_kind_agree(photo: torch.Tensor, blob: torch.Tensor, tmp_path: Path) -> None:
    pixels = (photo.permute(1, 2, 0) * 255).round().to(torch.uint8)
    picture = PIL.Image.fromarray(pixels.numpy())
    picture.save(tmp_path / "photo.png")
    expected = molt.refine(blob, pixels.permute(2, 0, 1))
    for kind in (pixels.numpy(), picture, tmp_path / "photo.png", str(tmp_path / "photo.png"), [picture]):
        maps = blob[None] if isinstance(kind, list) else blob
        assert torch.allclose(molt.refine(maps, kind).reshape(120, 160), expected, atol=1e-5)


def test_arithmetic_is_that_of_the_operators(photo: torch.Tensor, blob: torch.Tensor) -> None:
    labels, counts = TokenKMeans()(photo[None])
    resized = ops.upsample_normalize(blob[None, None], (120, 160))
    blended = ops.cluster_refine(resized, labels, 0.3, counts, backend="reference")
    expected = ops.upsample_normalize(blended, (120, 160))[0, 0]
    assert torch.allclose(molt.refine(blob, photo, alpha=0.3), expected, atol=1e-6)
    raw = molt.refine(blob * 3 - 1, photo, normalize=False, alpha=0)
    stretched = torch.nn.functional.interpolate((blob * 3 - 1)[None, None], (120, 160), mode="bilinear")[0, 0]
    assert torch.allclose(raw, stretched, atol=1e-6)


def test_it_helps_a_partial_map(photo: torch.Tensor, blob: torch.Tensor) -> None:
    """Colour clusters carry the map over the whole disc."""
    y, x = torch.meshgrid(torch.arange(120), torch.arange(160), indexing="ij")
    disc = (y - 50) ** 2 + (x - 100) ** 2 < 30**2

    def iou(maps: torch.Tensor) -> float:
        mask = maps >= 0.5
        return float((mask & disc).sum() / (mask | disc).sum())

    plain = ops.upsample_normalize(blob[None, None], (120, 160))[0, 0]
    assert iou(molt.refine(blob, photo, alpha=0.9)) > iou(plain) + 0.2


def test_features_take_the_place_of_photos() -> None:
    truth = torch.zeros(8, 8, dtype=torch.int64)
    truth[2:6, 2:6] = 1
    features = Features(torch.eye(5)[truth.flatten()][None], (8, 8), (112, 112))
    maps = torch.zeros(8, 8)
    maps[2, 2] = 1
    out = molt.refine(maps, features=features, alpha=1)
    assert out.shape == (112, 112)
    inside = torch.nn.functional.interpolate(truth[None, None].float(), (112, 112), mode="nearest")[0, 0].bool()
    assert out[inside].mean() > 0.95 and out[~inside].mean() < 0.05
    photo = torch.rand(3, 60, 40, generator=torch.Generator().manual_seed(0))
    assert molt.refine(maps, photo, features=features).shape == (60, 40)


def test_a_backbone_sees_the_photos_itself(photo: torch.Tensor, blob: torch.Tensor) -> None:
    from molt.backbones import ViTBackbone
    from molt.data import read_photo

    torch.manual_seed(0)
    vit = ViTBackbone("vit_tiny_patch16_224", pretrained=False)
    seen = vit(read_photo(photo, 448).pixels[None])
    assert torch.equal(molt.refine(blob, photo, features=vit), molt.refine(blob, photo, features=seen))


def test_size_clusterer_and_backend(photo: torch.Tensor, blob: torch.Tensor) -> None:
    assert molt.refine(blob, photo, size=(33, 21)).shape == (33, 21)
    calls = []

    def one_cluster(x: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append((x.shape, size))
        return torch.zeros(len(x), *size, dtype=torch.int32), torch.ones(len(x), dtype=torch.int64)

    out = molt.refine(blob, photo, clusterer=one_cluster, alpha=1)
    assert calls == [((1, 3, 120, 160), (120, 160))] and not out.any()
    native, reference = (molt.refine(blob, photo, backend=b) for b in ("native", "reference"))
    assert torch.allclose(native, reference, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (300, 2)])
def test_odd_maps_and_photos(shape: tuple[int, int]) -> None:
    maps = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    for size in ((1, 1), (2, 35)):
        out = molt.refine(maps, torch.rand(3, *size, generator=torch.Generator().manual_seed(1)))
        assert out.shape == size and out.isfinite().all()


@pytest.mark.parametrize("count", [1, 3])
def test_a_list_of_layers_comes_back_as_one(photo: torch.Tensor, count: int) -> None:
    """Each layer is refined as if it came alone, but the photos are clustered once."""
    generator = torch.Generator().manual_seed(0)
    layers: list[torch.Tensor | np.ndarray] = [
        torch.rand(2, 6 + i, 9 - i, generator=generator, dtype=torch.float64 if i else torch.float32)
        for i in range(count)
    ]
    layers[-1] = np.asarray(layers[-1])
    photos, calls = [photo, photo.flip(2)], []

    def counted(x: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(size)
        return TokenKMeans()(x, size)

    out = molt.refine(layers, photos, clusterer=counted)
    assert isinstance(out, list) and len(out) == count and calls == [(120, 160)]
    for refined, layer in zip(out, layers, strict=True):
        alone = molt.refine(layer, photos)
        assert type(refined) is type(layer) and refined.dtype == layer.dtype and refined.shape == (2, 120, 160)
        assert np.array_equal(refined, alone)


def test_gradient_reaches_the_maps(photo: torch.Tensor, blob: torch.Tensor) -> None:
    maps = blob.clone().requires_grad_()
    molt.refine(maps, photo).sum().backward()
    assert maps.grad is not None and maps.grad.isfinite().all() and maps.grad.any()


def test_big_endian_arrays_come_back_native(photo: torch.Tensor, blob: torch.Tensor) -> None:
    out = molt.refine(blob.numpy().astype(">f4"), photo)
    assert out.dtype == np.float32 and np.allclose(out, molt.refine(blob.numpy(), photo))


BAD: list[tuple[Callable[[torch.Tensor, torch.Tensor], object], type[Exception], str]] = [
    (lambda m, p: molt.refine(m), ValueError, "images or features must be given"),
    (lambda m, p: molt.refine({"map": m}, p), TypeError, "maps must be a NumPy array or torch tensor, got dict"),
    (lambda m, p: molt.refine([[1.0]], p), TypeError, r"maps\[0\] must be a NumPy array or torch tensor, got list"),
    (lambda m, p: molt.refine([], p), ValueError, "maps must hold at least one map, got an empty list"),
    (lambda m, p: molt.refine([m, m / 0], p), ValueError, r"maps\[1\] must be finite"),
    (
        lambda m, p: molt.refine([m, m], [p, p]),
        ValueError,
        r"maps\[0\] .* got 1 for 2 photos; a list holds",
    ),
    (lambda m, p: molt.refine(m.long(), p), TypeError, "maps must be floating point"),
    (lambda m, p: molt.refine(np.ones((3, 3), np.uint8), p), TypeError, "array of uint8"),
    (lambda m, p: molt.refine(m[0], p), ValueError, "maps must have shape"),
    (lambda m, p: molt.refine(m[:0], p), ValueError, "at least one value"),
    (lambda m, p: molt.refine(m / 0, p), ValueError, "maps must be finite"),
    (lambda m, p: molt.refine(m.expand(2, -1, -1), p), ValueError, "got 2 for 1 photo"),
    (lambda m, p: molt.refine(m, p, alpha=1.5), ValueError, "alpha must be 'auto' or a number in"),
    (lambda m, p: molt.refine(m, p, size=(0, 3)), ValueError, "size"),
    (lambda m, p: molt.refine(m, p, backend="fast"), ValueError, "fast"),
    (lambda m, p: molt.refine(m, p, signed="abs"), ValueError, "signed must be one of auto, clip, stretch, got 'abs'"),
    (lambda m, p: molt.refine(m, p, on_nan=None), ValueError, "on_nan must be one of stop, skip, got None"),
    (lambda m, p: molt.refine(m, p, features=p), TypeError, "features must be molt.Features or a backbone, got Tensor"),
    (
        lambda m, p: molt.refine(m, features=lambda x: x),
        ValueError,
        "images must be given where features is a backbone",
    ),
    (lambda m, p: molt.refine(m, p, features=lambda x: x), TypeError, "returns molt.Features, got Tensor"),
    (
        lambda m, p: molt.refine(m, p, features=timm.create_model("test_vit")),
        TypeError,
        r"features must be molt.Features or a backbone, got VisionTransformer: molt.backbones.ViTBackbone\(NAME\)",
    ),
    (lambda m, p: molt.refine(m, p, features=molt.backbones.ViTBackbone), TypeError, "got the class ViTBackbone"),
    (lambda m, p: molt.refine(m, p, features=molt.Features), TypeError, "got the class Features"),
    (lambda m, p: molt.refine(m, p, features="vit_tiny_patch16_224"), TypeError, "got str: molt.backbones.ViTBackbone"),
    (
        lambda m, p: molt.refine(m, p, features=torch.nn.Linear(3, 2)),
        TypeError,
        r"images \(1, 3, 448, 448\): Linear says",
    ),
    (
        lambda m, p: molt.refine(m, p, features=lambda x, y: x),
        TypeError,
        r"takes images .*: function says .* missing 1",
    ),
    (lambda m, p: molt.refine(m.expand(2, -1, -1), [p, p[:, :50]]), ValueError, "size must be given"),
    (lambda m, p: molt.refine(m, "nowhere.jpg"), ValueError, "nowhere.jpg"),
    (lambda m, p: molt.refine(m, p[:2]), ValueError, r"must have shape \(3, H, W\), got \(2, 120, 160\)"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments_are_named(case: int, photo: torch.Tensor, blob: torch.Tensor) -> None:
    call, error, text = BAD[case]
    with pytest.raises(error, match=text):
        call(blob, photo)


def example() -> torch.Tensor:
    """An object of 1 on ground of 0, and one value far below."""
    maps = torch.zeros(8, 8)
    maps[2:4, 2:4] = 1
    maps[6, 6] = -3
    return maps


def box(heat: torch.Tensor | np.ndarray) -> list[float]:
    return [round(x) for x in ops.component_boxes(heat, 0.5, largest=True).boxes.flatten().tolist()]


PLAIN = torch.zeros(3, 80, 80)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ground_is_no_heat_in_a_signed_map(dtype: torch.dtype) -> None:
    maps = example().to(dtype)
    for below in (-3, -30, -0.3):
        maps[6, 6] = below
        for signed in ("auto", "clip"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                heat = molt.refine(maps, PLAIN, alpha=0, signed=signed)
            assert box(heat) == [20, 20, 40, 40], (below, signed)
            assert heat[:10].abs().max() == 0, "the ground is cold, not just below the threshold"
    maps[6, 6] = -3
    assert box(molt.refine(maps, PLAIN, alpha=0, signed="stretch")) == [0, 0, 80, 80]
    without = molt.refine(maps.clamp(min=0), PLAIN, alpha=0)
    assert torch.equal(molt.refine(maps, PLAIN, alpha=0, signed="clip"), without)


@pytest.mark.filterwarnings("ignore:maps")
def test_signed_arrays_lists_and_batches() -> None:
    maps = example()
    for stack in (maps.numpy()[None], maps[None], torch.stack([maps, maps * 7])[None]):
        out = molt.refine(stack, PLAIN[None], alpha=0)
        assert box(out.reshape(-1, 80, 80)[0]) == box(out.reshape(-1, 80, 80)[-1]) == [20, 20, 40, 40]
    out = molt.refine([maps, maps.numpy()], PLAIN, alpha=0)
    assert [box(one) for one in out] == [[20, 20, 40, 40]] * 2
    # Each map by its own values: one that is nowhere below 0 is what it was.
    pair = torch.stack([maps, maps.clamp(min=0) + 0.25])
    assert torch.equal(molt.refine(pair, [PLAIN] * 2)[1], molt.refine(pair[1], PLAIN))


@pytest.mark.filterwarnings("ignore:maps")
def test_ground_around_and_below_zero() -> None:
    """Noise around 0 stays cold; ground well below 0 is told from the object; nothing above 0 is no heat."""
    noise = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) * 0.05
    noise[8:16, 8:16] += 1
    noise[24:26, 20:30] = -3
    assert box(molt.refine(noise, PLAIN, alpha=0)) == [20, 20, 40, 40]
    half = example()
    half[4:] = -3
    heat = molt.refine(half, PLAIN, alpha=0)
    assert heat[10, 60] == heat[:30].min() == pytest.approx(1 / 3), "zero is never more than a third"
    low = torch.full((8, 8), -0.8)
    low[2:4, 2:4] = 0.1
    assert box(molt.refine(low, PLAIN, alpha=0)) == [20, 20, 40, 40]
    for signed in ("auto", "clip"):
        for maps in (-example().abs() - 1, torch.full((8, 8), -1.0), -example().clamp(min=0)):
            assert not molt.refine(maps, PLAIN, alpha=0, signed=signed).any()
    assert molt.refine(-example().abs() - 1, PLAIN, alpha=0, signed="stretch").max() == 1


def test_a_warning_where_much_is_cut_off() -> None:
    maps = torch.stack([example(), example().clamp(min=0), -example().abs()])
    with pytest.warns(UserWarning, match=r"^maps: much heat below 0 is cut off in 2 of 3; .* 'stretch'") as told:
        molt.refine(maps, [PLAIN] * 3)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for signed in ("clip", "stretch"):
            molt.refine(maps, [PLAIN] * 3, signed=signed)
        molt.refine(example().clamp(min=-0.2), PLAIN)
        molt.refine(maps, [PLAIN] * 3, normalize=False)


def test_values_below_zero_stay_without_normalize_and_gradients_flow() -> None:
    maps = example()
    assert molt.refine(maps, PLAIN, alpha=0, normalize=False).min() < -1
    assert molt.refine(maps, PLAIN, alpha=0, normalize=False, signed="clip").min() == 0
    for signed in ("auto", "clip", "stretch"):
        leaf = (example().clamp(min=-0.2) + 0.01 * torch.arange(64.0).view(8, 8)).requires_grad_()
        molt.refine(leaf, PLAIN, signed=signed).sum().backward()
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.any()


NAN_AT = [
    (lambda m: m[0, 0], r"^maps must be finite: set"),
    (lambda m: m[:, 0], r"^maps must be finite, got NaN or infinity in 2 of 4: \[1\], \[3\]: set .* on_nan=\"skip\"$"),
    (lambda m: m, r"^maps must be finite, got NaN or infinity in 3 of 8: \[1, 0\], \[1, 1\], \[3, 0\]: set"),
    (lambda m: [m[:, 1], m[:, 0]], r"^maps\[0\] must be finite, got NaN or infinity in 1 of 4: \[1\]: set"),
]


@pytest.mark.parametrize("case", range(len(NAN_AT)))
def test_maps_with_nan_are_named_or_skipped(case: int, photo: torch.Tensor) -> None:
    maps = torch.rand(4, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    whole = maps.clone()
    maps[1, :, 2, 3], maps[3, 0, 0, 0] = torch.nan, -torch.inf
    given, text = NAN_AT[case]
    if case == 0:
        maps[0, 0, 0, 0] = torch.nan
    photos = photo if case == 0 else [photo] * 4
    with pytest.raises(ValueError, match=text):
        molt.refine(given(maps), photos)
    out, expected = molt.refine(given(maps), photos, on_nan="skip"), molt.refine(given(whole), photos)
    pairs = zip(out, expected, given(maps), strict=True) if case == 3 else [(out, expected, given(maps))]
    for got, wanted, raw in pairs:
        bad = ~raw.isfinite().flatten(-2).all(-1)
        assert got[bad].isnan().all() and torch.equal(got[~bad], wanted[~bad])
        assert len(ops.component_boxes(got, largest=True).boxes) == int((~bad).sum())
    many = np.full((20, 3, 3), np.nan)
    with pytest.raises(ValueError, match=r"in 20 of 20: \[0\], .* \[7\], \.\.\.: set"):
        molt.refine(many, [photo] * 20)
    assert np.isnan(molt.refine(many, [photo] * 20, on_nan="skip")).all()


def test_photos_of_every_form(photo: torch.Tensor, blob: torch.Tensor, tmp_path: Path) -> None:
    pixels = (photo.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    expected = molt.refine(blob, pixels)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    assert torch.equal(molt.refine(blob, file), expected)
    assert torch.allclose(molt.refine(blob, pixels.astype(np.int32) * 257), expected, atol=1e-5)
    grey = pixels[..., :1]
    expected = molt.refine(blob, grey[..., 0])
    for one in (grey, grey[..., 0][None], torch.from_numpy(grey), torch.from_numpy(grey[..., 0])[None]):
        assert torch.allclose(molt.refine(blob, one), expected, atol=1e-5)
    for batch in (grey[None], torch.from_numpy(grey[..., 0])[None, None], [grey]):
        assert torch.allclose(molt.refine(blob[None], batch)[0], expected, atol=1e-5)
