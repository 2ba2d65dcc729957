"""Backbones: exact CAM, tokens equal to timm's, any size; what is no CNN or ViT is refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
from torch import nn

import molt
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
        "mobilenetv4_conv_small_035",
        "ghostnet_050",
        "lcnet_035",
        "resmlp_12_224",
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


@pytest.mark.parametrize(("name", "patch"), [("vit_tiny_r_s16_p8_224", 32), ("eva02_tiny_patch14_224", 14)])
@pytest.mark.parametrize("size", [(1, 1), (100, 130), (336, 336), (224, 448)])
def test_a_token_has_the_networks_true_stride(name: str, patch: int, size: tuple[int, int]) -> None:
    """A hybrid's tokens are patches of what its convolutions leave, not of the image."""
    backbone = vision(name)
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = backbone(images)
        tokens = backbone.model.forward_features(normalize(to_multiple(images, (patch, patch)), backbone.model))
    assert backbone.patch_size == (patch, patch)
    assert features.grid == tuple(max(1, round(side / patch)) for side in size)
    assert features.patches.shape[1] == features.attention.shape[-1] == features.grid[0] * features.grid[1]
    assert torch.equal(features.patches, tokens[:, backbone.model.num_prefix_tokens :])


@functools.cache
def vision(name: str) -> ViTBackbone:
    torch.manual_seed(0)
    return ViTBackbone(name, pretrained=False)


# Sides in pixels that a network's are resized to multiples of, and its shortest side.
SIDES = {
    "hrnet_w18_small": (32, 32),
    "dla46x_c": (32, 32),
    "csatv2": (64, 64),
    "efficientvit_m0": (1, 64),
    "mobilevit_xxs": (1, 32),
    "test_resnet": (1, 32),
}


@functools.cache
def sided(name: str) -> CNNBackbone:
    torch.manual_seed(0)
    return CNNBackbone(name, pretrained=False)


@pytest.mark.parametrize("name", SIDES)
@pytest.mark.parametrize("size", [(1, 1), (50, 70), (100, 130), (336, 336)])
def test_sides_are_those_the_network_takes(name: str, size: tuple[int, int]) -> None:
    """336 px are no whole cells of HRNet's last stage, whose branches then do not add up."""
    cnn, (multiple, least) = sided(name), SIDES[name]
    assert (cnn.multiple, cnn.least) == ((multiple, multiple), least)
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        features = cnn(images)
        assert features.image_size == tuple(max(least, round(side / multiple) * multiple) for side in size)
        assert features.patches.shape[1] == features.grid[0] * features.grid[1] > 0
        seen = to_multiple(images, cnn.multiple, cnn.least)
        expected = cnn.model(normalize(seen, cnn.model))
        mean = cnn.cam(features, torch.arange(cnn.num_classes)[None]).mean((2, 3))
        bias = cnn.model.get_classifier().bias
    assert torch.allclose(mean + bias, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        (ViTBackbone, "resnet18", "is no timm ViT that takes images of any size: ResNet"),
        (ViTBackbone, "hiera_tiny_224", "is no timm ViT that takes images of any size: Hiera"),
        (ViTBackbone, "swin_tiny_patch4_window7_224", "is no timm ViT that takes images of any size: SwinTransformer"),
        (
            ViTBackbone,
            "beit_base_patch16_224",
            "is no timm ViT that takes images of any size: Beit; CNNBackbone",
        ),
        (ViTBackbone, "cait_xxs24_224", "is no timm ViT that takes images of any size: Cait"),
        (CNNBackbone, "vit_tiny_patch16_224", "is a vision transformer with prefix tokens, no CNN"),
        (CNNBackbone, "hiera_tiny_224", "does not take images of any size: The size of tensor"),
        (CNNBackbone, "test_maxvit", "does not take images of any size: .* must be divisible by window"),
        (CNNBackbone, "botnet26t_256", "does not take images of any size: a check of timm's fails"),
        (CNNBackbone, "repvit_m1", "has no linear classifier"),
        (CNNBackbone, "mobilenetv3_small_050", "has no exact CAM: its logits are not linear"),
        (CNNBackbone, "resnet18.foo", "names weights that timm does not know, it has resnet18.a1_in1k"),
        (CNNBackbone, "", "is not a timm model name"),
    ],
)
def test_what_a_network_is_refused_for(kind: type[ViTBackbone | CNNBackbone], name: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"backbone '{name}' {text}"):
        kind(name, pretrained=False)


def test_a_network_without_a_token_a_patch_is_refused() -> None:
    with (
        mock.patch("timm.layers.PatchEmbed.feat_ratio", return_value=(32, 32)),
        pytest.raises(ValueError, match=r"backbone 'test_vit' does not take images of any size: patches must be"),
    ):
        ViTBackbone("test_vit", pretrained=False)


@pytest.mark.parametrize("kind", [ViTBackbone, CNNBackbone])
@pytest.mark.parametrize("given", [nn.Linear(2, 2), None, nn.Linear, 18])
def test_a_backbone_is_named(kind: type[ViTBackbone | CNNBackbone], given: object) -> None:
    with pytest.raises(TypeError, match=f"backbone must be a timm model name, got {type(given).__name__}"):
        kind(given, pretrained=False)
    with pytest.raises(TypeError, match="checkpoint must be the path of a file, got dict"):
        kind("test_vit", checkpoint={})


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"backbone": "resnet18"}, ValueError, "'resnet18' is no timm ViT.*: ResNet.*weights='weak'"),
        ({"backbone": "test_vit", "weights": "weak"}, ValueError, "'test_vit' is a vision transformer .*ViTBackbone"),
        ({"backbone": nn.Linear(2, 2)}, TypeError, "backbone must be a timm model name, got Linear"),
        ({"backbone": ""}, ValueError, "backbone '' is not a timm model name"),
    ],
)
def test_localizer_names_the_backbone_and_not_the_file(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    """The file is a good one of that very network."""
    name = options["backbone"]
    known = isinstance(name, str) and name
    torch.save(timm.create_model(name if known else "resnet18").state_dict(), tmp_path / "good.pth")
    with pytest.raises(error, match=text):
        molt.Localizer(checkpoint=tmp_path / "good.pth", **options)


@pytest.mark.parametrize(
    ("weights", "name"), [("weak", "hrnet_w18_small"), ("weak", "test_resnet"), ("default", "vit_tiny_r_s16_p8_224")]
)
def test_what_is_accepted_localizes(tmp_path: Path, weights: str, name: str) -> None:
    kind = CNNBackbone if weights == "weak" else ViTBackbone
    torch.manual_seed(0)
    torch.save(kind(name, pretrained=False).model.state_dict(), tmp_path / "own.pth")
    localizer = molt.Localizer(weights=weights, backbone=name, checkpoint=tmp_path / "own.pth", device="cpu")
    photo = torch.rand(3, 75, 100, generator=torch.Generator().manual_seed(0))
    result = localizer(photo, classes="tabby")
    assert result.boxes.shape[1] == 4 and result.heat.isfinite().all()
    assert localizer.weights[-1].to_json()["source"] == f"file {tmp_path / 'own.pth'}"


def test_bad_images_are_named(vit: ViTBackbone) -> None:
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, H, W\), got \(3, 32, 32\)"):
        vit(torch.rand(3, 32, 32))
    with pytest.raises(ValueError, match="images must hold at least one image, got none"):
        vit(torch.rand(0, 3, 32, 32))
    with pytest.raises(TypeError, match=r"images must be torch.float32 as the network is, got torch.float64"):
        vit(torch.rand(1, 3, 32, 32).double())
    with pytest.raises(ValueError, match="images must be on cpu, where the network is, got meta"):
        vit(torch.rand(1, 3, 32, 32, device="meta"))
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
