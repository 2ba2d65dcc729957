"""Backbones: exact CAM, tokens equal to timm's, any size; what is no CNN or ViT is refused."""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import timm
import torch
from torch import nn

from molt.backbones import CNNBackbone, ViTBackbone
from molt.backbones.preprocess import normalize, to_multiple

pytestmark = pytest.mark.usefixtures("one_thread")

CNNS = ["resnet18", "tf_efficientnet_lite0.in1k", "regnetx_002"]
# Networks whose last norm comes before the spatial mean, and those that normalise the mean; with their patches' side.
NORM_FIRST = {"swin_tiny_patch4_window7_224": 4, "swinv2_tiny_window8_256": 4, "convnext_tiny_hnf": 1}
MEAN_FIRST = {"convnext_atto": 1, "convnextv2_atto": 1}


@functools.cache
def classifier(name: str) -> CNNBackbone:
    """A network whose norms and classifier have weights and biases that differ from one channel to the next."""
    torch.manual_seed(0)
    # Of the deep stage as few blocks as do: the last maps are what is tested.
    with mock.patch.object(timm, "create_model", functools.partial(timm.create_model, depths=(1, 1, 2, 1))):
        cnn = CNNBackbone(name, pretrained=False)
    generator = torch.Generator().manual_seed(1)
    layers = [layer for layer in cnn.model.modules() if isinstance(layer, nn.LayerNorm)]
    with torch.no_grad():
        for layer in (*layers, cnn.model.get_classifier()):
            layer.weight += (
                0.5 * torch.randn(layer.weight.shape, generator=generator) * layer.weight.std().clamp_min(0.5)
            )
            layer.bias += torch.randn(layer.bias.shape, generator=generator)
    return cnn


def last_norm(cnn: CNNBackbone) -> nn.LayerNorm:
    """The one between the last block and the classifier."""
    layers = [layer for layer in cnn.model.modules() if isinstance(layer, nn.LayerNorm)]
    head = getattr(cnn.model.head, "norm", None)
    return head if isinstance(head, nn.LayerNorm) else layers[-1]


def miss(cnn: CNNBackbone, images: torch.Tensor) -> float:
    """The largest difference of mean plus bias from the network's own logits, relative to the largest logit."""
    features = cnn(images)
    classes = torch.tensor([[0, 7, 999], [5, 5, 1]])
    logits = cnn.cam(features, classes).mean((2, 3)) + cnn.model.get_classifier().bias[classes]
    expected = cnn.model(normalize(to_multiple(images, cnn.multiple), cnn.model))
    assert torch.allclose(features.logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    expected = expected.gather(1, classes)
    return float((logits - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def vit() -> ViTBackbone:
    torch.manual_seed(0)
    return ViTBackbone("vit_tiny_patch16_224", pretrained=False)


@pytest.mark.parametrize("name", CNNS)
@pytest.mark.parametrize("size", [(96, 96), (65, 130)])
def test_cam_mean_plus_bias_is_the_logit(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    cnn = CNNBackbone(name, pretrained=False)
    images = torch.rand(2, 3, *size)
    features = cnn(images)
    classes = torch.tensor([[0, 7, 999], [5, 5, 1]])
    cam = cnn.cam(features, classes)
    expected = cnn.model(normalize(images, cnn.model))
    assert torch.allclose(features.logits, expected, atol=1e-5)
    bias = cnn.model.get_classifier().bias[classes]
    assert torch.allclose(cam.mean((2, 3)) + bias, expected.gather(1, classes), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*NORM_FIRST, *MEAN_FIRST])
@pytest.mark.parametrize("size", [(64, 160), (65, 90), (97, 43)])
def test_cam_of_networks_that_normalise_last(name: str, size: tuple[int, int]) -> None:
    cnn = classifier(name)
    step = (NORM_FIRST | MEAN_FIRST)[name]
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2))
    assert cnn.multiple == (step, step)
    assert cnn(images).image_size == tuple(round(side / step) * step for side in size)
    assert miss(cnn, images) < 1e-4


@pytest.mark.parametrize("name", [*NORM_FIRST, *MEAN_FIRST])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_cam_knows_the_last_norms_parameters(name: str, part: str) -> None:
    """Were one forgotten the logits would not come out: so many do they change."""
    cnn = classifier(name)
    images = torch.rand(2, 3, 65, 90, generator=torch.Generator().manual_seed(2))
    norm, whole = last_norm(cnn), cnn(images)
    value = getattr(norm, part)
    keep = value.clone()
    with torch.no_grad():
        value.fill_(1 if part == "weight" else 0)
    without = cnn(images)
    assert miss(cnn, images) < 1e-4
    with torch.no_grad():
        value.copy_(keep)
    assert (without.activations - whole.activations).abs().mean() > 0.1
    change = (without.logits - whole.logits).abs().max() / whole.logits.abs().max()
    assert change > 0.05
    assert miss(cnn, images) < 1e-4


@pytest.mark.parametrize("name", NORM_FIRST)
def test_maps_after_the_last_norm_are_taken_as_they_are(name: str) -> None:
    cnn = classifier(name)
    images = torch.rand(2, 3, 96, 160, generator=torch.Generator().manual_seed(3))
    last = cnn.model.forward_features(normalize(images, cnn.model))
    rows_first = cnn.model.output_fmt == "NHWC" if hasattr(cnn.model, "output_fmt") else False
    assert rows_first == name.startswith("swin")
    found = cnn(images).activations
    assert found.shape[2:] == (3, 5)
    for y in range(3):
        for x in range(5):
            assert torch.allclose(found[:, :, y, x], last[:, y, x] if rows_first else last[:, :, y, x], atol=1e-5)


@pytest.mark.parametrize("name", MEAN_FIRST)
@pytest.mark.parametrize("eps", [1e-6, 2.0])
def test_maps_before_the_mean_are_normalised_by_the_means_deviation(name: str, eps: float) -> None:
    """Position by position: each is an affine function of the last maps there, the same at every position."""
    cnn = classifier(name)
    images = torch.rand(2, 3, 96, 64, generator=torch.Generator().manual_seed(3))
    norm = last_norm(cnn)
    assert norm.eps == 1e-6
    norm.eps = eps  # large enough to be seen
    try:
        last = cnn.model.forward_features(normalize(images, cnn.model))
        found = cnn(images).activations
        assert miss(cnn, images) < 1e-4
    finally:
        norm.eps = 1e-6
    deviation = (last.mean((2, 3)).var(1, correction=0, keepdim=True) + eps).sqrt()
    assert found.shape == last.shape and found.shape[2:] == (3, 2)
    for y in range(3):
        for x in range(2):
            here = last[:, :, y, x]
            expected = (here - here.mean(1, keepdim=True)) / deviation * norm.weight + norm.bias
            assert torch.allclose(found[:, :, y, x], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (found.flatten(2).std(-1) > 1e-3).any(), "positions differ"


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
@pytest.mark.parametrize(("size", "seen"), [((1, 1), (4, 4)), ((1, 30), (4, 32)), ((5, 3), (4, 4)), ((6, 10), (8, 8))])
def test_swin_resizes_to_whole_patches(name: str, size: tuple[int, int], seen: tuple[int, int]) -> None:
    cnn = classifier(name)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2))
    features = cnn(images)
    assert features.image_size == seen
    assert features.patches.shape[1] == features.grid[0] * features.grid[1] >= 1
    assert features.activations.shape[2:] == (1, 1) and features.logits.isfinite().all()
    assert miss(cnn, images) < 1e-4


def test_patches_have_the_stride_asked_for() -> None:
    for stride, side in ((8, 16), (16, 8), (32, 4)):
        features = CNNBackbone("resnet18", pretrained=False, stride=stride)(torch.rand(1, 3, 128, 128))
        assert features.grid == (side, side) and features.as_map().shape[2:] == (side, side)
    with pytest.raises(ValueError, match=r"stride must be one of \[2, 4, 8, 16, 32\] for resnet18, got 3"):
        CNNBackbone("resnet18", pretrained=False, stride=3)


@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv3_small_050",
        "mambaout_femto",
        "vit_tiny_patch16_224",
        "convnext_zepto_rms",
        "maxvit_rmlp_pico_rw_256",
        "maxvit_tiny_tf_224",
    ],
)
def test_networks_without_an_exact_cam_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"backbone '{name}'"):
        CNNBackbone(name, pretrained=False)


def test_a_hidden_layer_in_the_head_is_refused() -> None:
    """As convnext_large_mlp has; on its smallest sister, whose own head is taken."""
    assert CNNBackbone("convnext_atto", pretrained=False).num_classes == 1000
    hidden = functools.partial(timm.create_model, head_hidden_size=320)  # as wide as the maps
    with (
        mock.patch.object(timm, "create_model", hidden),
        pytest.raises(ValueError, match="backbone 'convnext_atto' has no exact CAM"),
    ):
        CNNBackbone("convnext_atto", pretrained=False)


def test_cam_refuses_wrong_classes() -> None:
    cnn = CNNBackbone("resnet18", pretrained=False)
    features = cnn(torch.rand(2, 3, 64, 64))
    with pytest.raises(ValueError, match="classes must have shape"):
        cnn.cam(features, torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"classes must be in 0\.\.999"):
        cnn.cam(features, torch.tensor([[1000], [0]]))


@pytest.mark.parametrize("size", [(224, 224), (96, 208), (16, 16)])
def test_vit_tokens_are_timms(vit: ViTBackbone, size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size)
    features = vit(images)
    tokens = vit.model.forward_features(normalize(images, vit.model))
    assert features.grid == (size[0] // 16, size[1] // 16) and features.image_size == size
    assert torch.equal(features.patches, tokens[:, 1:]) and torch.equal(features.class_token, tokens[:, 0])
    assert features.as_map()[1, :, 0, -1].equal(tokens[1, size[1] // 16])


@pytest.mark.parametrize(("size", "grid"), [((100, 50), (6, 3)), ((1, 1), (1, 1)), ((7, 333), (1, 21))])
def test_vit_takes_any_size(vit: ViTBackbone, size: tuple[int, int], grid: tuple[int, int]) -> None:
    features = vit(torch.rand(1, 3, *size))
    assert features.grid == grid and features.image_size == (grid[0] * 16, grid[1] * 16)
    assert features.patches.shape == (1, grid[0] * grid[1], 192)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 20), (23, 23)])
def test_a_tiny_image_is_one_patch(vit: ViTBackbone, size: tuple[int, int]) -> None:
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    features = vit(images)
    assert features.grid == (1, 1) and features.image_size == (16, 16)
    if size == (1, 1):
        assert torch.allclose(features.patches, vit(images.expand(-1, -1, 16, 16)).patches, atol=1e-4)


def test_registers_and_missing_class_tokens_are_left_out() -> None:
    registers = ViTBackbone("vit_small_patch14_reg4_dinov2", pretrained=False)
    features = registers(torch.rand(1, 3, 28, 42))
    assert features.patches.shape == (1, 6, 384) and features.class_token is not None
    pooled = ViTBackbone("vit_base_patch16_siglip_224", pretrained=False)(torch.rand(1, 3, 32, 32))
    assert pooled.patches.shape == (1, 4, 768) and pooled.class_token is None


def test_a_cnn_is_no_vit() -> None:
    with pytest.raises(ValueError, match="resnet18"):
        ViTBackbone("resnet18", pretrained=False)


def test_bad_images_are_named(vit: ViTBackbone) -> None:
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, H, W\), got \(3, 32, 32\)"):
        vit(torch.rand(3, 32, 32))
    with pytest.raises(TypeError, match="images must be floating point"):
        vit(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_normalisation_is_the_networks_own() -> None:
    cnn = CNNBackbone("resnet18", pretrained=False)
    config = timm.get_pretrained_cfg("resnet18")
    x = normalize(torch.full((1, 3, 2, 2), 0.5), cnn.model)
    expected = (0.5 - torch.tensor(config.mean)) / torch.tensor(config.std)
    assert torch.allclose(x[0, :, 0, 0], expected)


@pytest.mark.parametrize("size", [(1, 1), (3, 40)])
def test_tiny_images_are_enlarged_to_the_last_stride(size: tuple[int, int]) -> None:
    seen = CNNBackbone("convnext_atto", pretrained=False)(torch.rand(1, 3, *size))
    assert seen.image_size == (32, max(32, size[1])) and seen.logits is not None and seen.logits.isfinite().all()
