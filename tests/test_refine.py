"""molt.refine: whatever comes in goes out in kind, and the arithmetic is the one promised."""

from __future__ import annotations

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
    (lambda m, p: molt.refine(m.expand(2, -1, -1), p), ValueError, "got 2 for 1 photos"),
    (lambda m, p: molt.refine(m, p, alpha=1.5), ValueError, "alpha must be 'auto' or a number in"),
    (lambda m, p: molt.refine(m, p, size=(0, 3)), ValueError, "size"),
    (lambda m, p: molt.refine(m, p, backend="fast"), ValueError, "fast"),
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
