"""Backbones: exact CAM, tokens equal to timm's, any size; what is no CNN or ViT is refused."""

from __future__ import annotations

import pytest
import timm
import torch

from molt.backbones import CNNBackbone, ViTBackbone
from molt.backbones.preprocess import normalize

CNNS = ["resnet18", "tf_efficientnet_lite0.in1k", "regnetx_002"]


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


def test_patches_have_the_stride_asked_for() -> None:
    for stride, side in ((8, 16), (16, 8), (32, 4)):
        features = CNNBackbone("resnet18", pretrained=False, stride=stride)(torch.rand(1, 3, 128, 128))
        assert features.grid == (side, side) and features.as_map().shape[2:] == (side, side)
    with pytest.raises(ValueError, match=r"stride must be one of \[2, 4, 8, 16, 32\] for resnet18, got 3"):
        CNNBackbone("resnet18", pretrained=False, stride=3)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "mambaout_femto", "vit_tiny_patch16_224"])
def test_networks_without_an_exact_cam_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        CNNBackbone(name, pretrained=False)


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
