"""MOLT models: TS-CAM as the one-scale case, heads, scales, classes, arguments."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import molt
from molt.backbones import CNNBackbone
from molt.backbones.preprocess import check_range, normalize, resize
from molt.methods.transformer import class_attention, pooled_windows

NAME = "molt_deit_tiny"


def build(seed: int = 0, num_classes: int = 5, sizes: Any = (32, 48), **options: Any) -> molt.MOLT:
    """Three blocks with random weights, their attention sharpened, as it is nearly even at random."""
    torch.manual_seed(seed)
    model = molt.create_model(NAME, num_classes, sizes, pretrained=False, **options)
    for transformer in model.transformers:
        vit = transformer.backbone.model
        vit.blocks = vit.blocks[:3]
        for block in vit.blocks:
            block.attn.qkv.weight.data *= 8
    return model


def pixels(batch: int = 2, height: int = 40, width: int = 56, seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def ts_cam(model: Any, head: torch.nn.Conv2d, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """TS-CAM's formula of one photo, from timm's weights: (C, h, w) maps and (C,) logits."""
    height, width = (side // 16 for side in x.shape[2:])
    tokens = model._pos_embed(model.patch_embed(x))
    summed = torch.zeros(height * width)
    for block in model.blocks:
        normed = block.norm1(tokens)
        query, key, value = block.attn.qkv(normed)[0].chunk(3, -1)
        heads, dim = block.attn.num_heads, query.shape[1] // block.attn.num_heads
        mixed = []
        for i in range(heads):
            part = slice(i * dim, (i + 1) * dim)
            attention = torch.softmax(query[:, part] @ key[:, part].T / math.sqrt(dim), -1)
            mixed.append(attention @ value[:, part])
            summed += attention[0, 1:] / heads
        tokens = tokens + block.attn.proj(torch.cat(mixed, -1))[None]
        tokens = tokens + block.mlp(block.norm2(tokens))
    patches = model.norm(tokens)[0, 1:].T.reshape(1, -1, height, width)
    semantic = head(patches)[0]
    return summed.view(height, width) * semantic, semantic.mean((1, 2))


@pytest.mark.parametrize("size", [64, (48, 80), 16])
def test_one_scale_is_ts_cam(size: Any) -> None:
    model = build(sizes=(size,))
    side = (size, size) if isinstance(size, int) else size
    x = pixels(2, *side)
    with torch.no_grad():
        maps, logits = model.localize(x, classes=[3, 0], size=(70, 91)), model(x)
        for i in range(2):
            transformer, vit = model.transformers[0], model.transformers[0].backbone.model
            cams, expected = ts_cam(transformer.backbone.model, transformer.head, normalize(x, vit)[i : i + 1])
            assert torch.allclose(logits[i], expected, atol=1e-5)
            for j, label in enumerate((3, 0)):
                large = F.interpolate(cams[label][None, None], (70, 91), mode="bilinear", align_corners=False)[0, 0]
                if side == (16, 16):
                    assert not maps[i, j].any(), "one patch is a constant map"
                    continue
                assert cams[label].std() > 0.05 * cams[label].abs().mean(), "a map that says something"
                assert torch.allclose(maps[i, j], (large - large.min()) / (large.max() - large.min()), atol=2e-5)


def test_attention_matters_in_the_test_above() -> None:
    """Otherwise equality with TS-CAM would prove nothing about attention."""
    model = build(sizes=(64,))
    (seen,) = model.see(pixels(1, 64, 64))
    attention = class_attention(seen)[0, 0]
    assert attention.max() > 2 * attention.mean() and attention.sum() < 3


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1), (2, 2), (6, 7)])
def test_pooled_windows_give_the_mean_of_the_convolution(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 8, *shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 8, 3, 3, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator, dtype=torch.float64)
    answers = F.conv2d(maps, weight, bias, padding=1)
    found = F.linear(pooled_windows(maps), weight.flatten(1), bias)
    assert torch.allclose(found, answers.mean((2, 3)), atol=1e-12)
    weights = torch.rand(3, shape[0] * shape[1], generator=generator, dtype=torch.float64)
    weights = weights / weights.sum(1, keepdim=True)
    found = F.linear(pooled_windows(maps, weights), weight.flatten(1), bias)
    assert torch.allclose(found, (answers.flatten(2) * weights[:, None]).sum(2), atol=1e-12)


def test_attention_pooling_weighs_the_patches_and_gives_attention_no_gradient() -> None:
    model = build(pooling="attention")
    seen = model.see(pixels())[0]
    transformer = model.transformers[0]
    weights = class_attention(seen)
    whole = transformer.head(seen.as_map()) * weights / weights.sum((2, 3), keepdim=True)
    assert torch.allclose(seen.logits, whole.sum((2, 3)), atol=1e-5)
    assert torch.allclose(transformer(model.pyramid(pixels())[0]), seen.logits), "logits need no attention to be asked"
    assert not torch.allclose(seen.logits, build()(pixels()), atol=1e-3)
    assert seen.attention.requires_grad
    assert torch.autograd.grad(seen.logits.sum(), seen.attention, allow_unused=True)[0] is None


def test_clipped_maps_are_never_negative() -> None:
    model, x = build(), pixels()
    features = model.see(x)
    classes = torch.tensor([[0, 3], [1, 1]])
    plain = model.cams(features, classes)
    clipped = model.reconfigure(clip=True).cams(features, classes)
    for before, after in zip(plain, clipped, strict=True):
        assert before.min() < 0 and torch.equal(after, before.clamp_min(0))


def test_logits_and_class_maps_are_those_of_the_whole_convolution() -> None:
    model = build()
    classes = torch.tensor([[4, 1, 1], [0, 3, 2]])
    for transformer, seen in zip(model.transformers, model.see(pixels()), strict=True):
        whole = transformer.head(seen.as_map())
        assert torch.allclose(seen.logits, whole.mean((2, 3)), atol=1e-5)
        picked = whole.gather(1, classes[..., None, None].expand(-1, -1, *seen.grid))
        assert torch.allclose(transformer.class_maps(seen, classes), picked, atol=1e-5)


def test_logits_are_fused_alike_in_train_and_eval() -> None:
    model, x = build(), pixels()
    scales = model.scale_logits(x)
    assert [s.shape for s in scales] == [(2, 5)] * 2
    assert not torch.allclose(scales[0], scales[1], atol=1e-3)
    for training in (True, False):
        fused = model.train(training)(x)
        assert fused.shape == (2, 5) and torch.allclose(fused, (scales[0] + scales[1]) / 2, atol=1e-6)


def test_gradient_reaches_every_weight() -> None:
    model = build().train()
    loss = F.cross_entropy(model(pixels()), torch.tensor([1, 4]))
    loss.backward()
    missing = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # The class token of the last block only feeds the class-token head.
    assert not missing, missing


def test_training_the_head_lowers_the_loss_and_counts_as_trained() -> None:
    model = build().freeze_backbones().train()
    learned = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learned) == sum(p.numel() for t in model.transformers for p in t.head.parameters())
    assert not model.trained
    optimizer = torch.optim.AdamW(learned, lr=0.01)
    x, labels = pixels(4), torch.tensor([0, 1, 2, 3])
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and model.trained


def test_scales_have_networks_of_their_own_unless_shared() -> None:
    separate, shared = build(), build(shared=True)
    assert len(separate.transformers) == 2 and len(shared.transformers) == 1
    first, second = (t.head.weight for t in separate.transformers)
    assert not torch.equal(first, second)
    x = pixels()
    one = shared.transformers[0]
    expected = [one(p) for p in shared.pyramid(x)]
    for a, b in zip(shared.scale_logits(x), expected, strict=True):
        assert torch.equal(a, b)


def test_maps_are_fused_as_the_operator_does() -> None:
    model = build(scale_weights=(1, 3), order="normalize_first")
    x = pixels()
    classes = torch.tensor([[2, 0], [1, 4]])
    cams = model.cams(model.see(x), classes)
    assert [c.shape for c in cams] == [(2, 2, 2, 2), (2, 2, 3, 3)]
    expected = torch.zeros(2, 2, 40, 56)
    for cam, weight in zip(cams, (0.25, 0.75), strict=True):
        low, high = cam.amin((2, 3), keepdim=True), cam.amax((2, 3), keepdim=True)
        expected += weight * F.interpolate((cam - low) / (high - low), (40, 56), mode="bilinear")
    assert torch.allclose(model.localize(x, classes), expected, atol=1e-5)
    other = build(scale_weights=(1, 3)).localize(x, classes)
    assert (other - expected).abs().max() > 0.01, "the order matters"


def test_layers_and_aggregation() -> None:
    model = build()
    (seen, _) = model.see(pixels())
    rows = seen.attention
    assert rows.shape == (2, 3, 3, 4)
    grid = (2, 1, 2, 2)
    assert torch.allclose(class_attention(seen), rows.mean(2).sum(1).view(grid), atol=1e-7)
    assert torch.allclose(class_attention(seen, (-1, 0)), rows.mean(2)[:, [2, 0]].sum(1).view(grid), atol=1e-7)
    assert torch.allclose(class_attention(seen, None, "mean"), rows.mean(2).mean(1).view(grid), atol=1e-7)
    assert torch.allclose(class_attention(seen, None, "max", "max"), rows.amax((1, 2)).view(grid), atol=1e-7)
    last = build(layers=(-1,), over_heads="max")
    classes = torch.tensor([[0], [0]])
    (cam, _) = last.cams(last.see(pixels()), classes)
    expected = rows[:, 2].amax(1).view(grid) * last.transformers[0].class_maps(seen, classes)
    assert torch.allclose(cam, expected, atol=1e-6)


def test_reconfigure_needs_no_training() -> None:
    model, x = build(), pixels()
    before = model.localize(x, 1)
    changed = model.reconfigure(layers=[-1], order="normalize_first", scale_weights=[0, 1])
    assert changed is model and model.config.layers == (-1,)
    expected = build(layers=[-1], order="normalize_first", scale_weights=[0, 1]).localize(x, 1)
    assert torch.equal(model.localize(x, 1), expected) and not torch.allclose(expected, before, atol=0.01)


def test_the_model_normalises_photos_itself_and_once() -> None:
    model, photos = build(sizes=(48,)), pixels(2, 48, 48)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.mean, model.std))
    by_hand = (photos - mean) / std
    assert torch.equal(model.pyramid(photos)[0], by_hand)
    assert torch.equal(model.scale_logits(photos)[0], model.transformer(0)(by_hand))
    both = build()  # normalised first and resized then, as its checkpoints and kept features were made
    for made, size in zip(both.pyramid(photos), both.config.sizes, strict=True):
        assert torch.equal(made, resize(by_hand, size))
    assert both.pyramid(photos.bfloat16().float())[0].dtype == torch.float32


CALLS = [
    lambda model, x: model(x),
    lambda model, x: model.scale_logits(x),
    lambda model, x: model.see(x),
    lambda model, x: model.localize(x, [0]),
    lambda model, x: model.transformer(0).backbone(x),
    lambda model, x: CNNBackbone("resnet10t", pretrained=False, stride=32)(x),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("training", [False, True])
def test_values_of_another_range_are_refused(call: Callable[[molt.MOLT, torch.Tensor], Any], training: bool) -> None:
    model, photos = build(sizes=(48,)).train(training), pixels(2, 48, 48)
    call(model, photos)
    call(model, photos * 1.1 - 0.05)  # what resizing overshoots
    by_hand = normalize(photos, model.transformer(0).backbone.model)
    for wrong, text in (
        (by_hand, "it looks normalised, which the network does itself"),
        ((photos - 0.5) / 0.5, r"must be RGB in \[0, 1\], got -0.* to 0.*: it looks normalised"),
        (photos * 255, "divide 0..255 by 255"),
    ):
        with pytest.raises(ValueError, match=text):
            call(model, wrong)
    with pytest.raises(TypeError, match=r"must be floating point in \[0, 1\] \(uint8: divide by 255\)"):
        call(model, (photos * 255).byte())


def test_a_gpu_is_waited_for_in_a_networks_first_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGPU:
        device, is_meta, is_cuda = torch.device("cuda"), False, True
        looks = 0

        def numel(self) -> int:
            return 3

        def detach(self) -> OnGPU:
            return self

        def aminmax(self) -> tuple[float, float]:
            OnGPU.looks += 1
            return 0.0, 1.0

    captured = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured[0])
    network, x = torch.nn.Identity(), cast("Any", OnGPU())
    check_range(x, network)
    assert OnGPU.looks == 0, "the capture of a CUDA graph must not be broken"
    captured[0] = False
    for _ in range(3):
        check_range(x, network)
    assert OnGPU.looks == 1
    check_range(x, torch.nn.Identity())
    assert OnGPU.looks == 2


def test_class_agnostic_map_is_attention_alone() -> None:
    model, x = build(), pixels()
    seen = model.see(x)
    for cam, one in zip(model.cams(seen, torch.full((2, 1), -1)), seen, strict=True):
        assert torch.allclose(cam, class_attention(one), atol=1e-7)
    both = model.localize(x, [-1, 2])
    assert torch.allclose(both[:, :1], model.localize(x, -1), atol=1e-6)
    assert torch.allclose(both[:, 1:], model.localize(x, 2), atol=1e-5)


def test_forms_of_classes() -> None:
    model, x = build(), pixels()
    rows = model.localize(x, torch.tensor([[1, 3], [1, 3]]))
    for form in ([1, 3], (1, 3), np.array([1, 3]), torch.tensor([1, 3], dtype=torch.int32), [[1, 3], [1, 3]]):
        assert torch.equal(model.localize(x, form), rows)
    named = build(class_names=["cat", "dog", "cup", "fish, pike", "bird"])
    for names in (["dog", "pike"], ("Dog", 3)):
        assert torch.equal(named.localize(x, names), rows)
    assert torch.equal(named.localize(x, "object"), named.localize(x, -1))
    top = model(x).argmax(-1)
    assert torch.allclose(model.localize(x), model.localize(x, top[:, None]), atol=1e-6)
    assert rows.shape == (2, 2, 40, 56) and rows.amin() >= 0 and rows.amax() <= 1 + 1e-6
    assert model.localize(x, 1, size=(7, 9)).shape == (2, 1, 7, 9)


def test_class_token_head() -> None:
    model = build(head="class_token")
    x = pixels()
    for transformer, seen, logits in zip(model.transformers, model.see(x), model.scale_logits(x), strict=True):
        assert torch.allclose(logits, transformer.head(seen.class_token), atol=1e-6)
        maps = transformer.class_maps(seen, torch.tensor([[2], [0]]))
        expected = transformer.head(seen.patches)[torch.arange(2), :, torch.tensor([2, 0])].view(2, 1, *seen.grid)
        assert torch.allclose(maps, expected, atol=1e-5)
    assert model.localize(x, [0]).isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (2048, 33)])
def test_photos_of_any_size(size: tuple[int, int]) -> None:
    maps = build().localize(pixels(1, *size), [0])
    assert maps.shape == (1, 1, *size) and maps.isfinite().all()


def test_float64_bfloat16_and_inference_mode() -> None:
    model, x = build(), pixels()
    maps = model.localize(x, [1])
    double = copy.deepcopy(model).double().localize(x.double(), [1])
    assert double.dtype == torch.float64 and torch.allclose(double.float(), maps, atol=1e-3)
    plain = molt.create_model(NAME, 5, (64,), pretrained=False)  # sharpened attention would sharpen rounding too
    half = copy.deepcopy(plain).bfloat16().localize(x.bfloat16(), [1])
    assert half.dtype == torch.bfloat16 and (half.float() - plain.localize(x, [1])).abs().mean() < 0.05
    with torch.inference_mode():
        assert torch.allclose(model.localize(x, [1]), maps, atol=1e-6)


@pytest.mark.parametrize("call", ["forward", "localize"])
def test_compiles_without_a_break(call: str) -> None:
    model, x = build(), pixels()
    classes = torch.tensor([[1, 2], [0, 3]])

    def run(x: torch.Tensor) -> torch.Tensor:
        return model(x) if call == "forward" else model.localize(x, classes)

    with torch.no_grad():
        assert torch.allclose(torch.compile(run, fullgraph=True, backend="eager")(x), run(x), atol=1e-5)


def test_list_models_and_names() -> None:
    assert molt.list_models() == ["molt_deit_base", "molt_deit_small", "molt_deit_tiny", "molt_dinov2_small"]
    assert build().class_names == tuple(f"class {i}" for i in range(5))
    assert build(class_names=list("abcde")).class_names == tuple("abcde")
    big = molt.create_model(NAME, pretrained=False, sizes=(16,))
    assert big.class_names[285] == "Egyptian cat"


BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: molt.create_model("molt_deit_smal"), ValueError, "did you mean: molt_deit_small"),
    (lambda: molt.create_model("resnet"), ValueError, "model 'resnet' is unknown"),
    (lambda: build(num_classes=0), ValueError, "num_classes must be at least 1, got 0"),
    (lambda: build(num_classes=10**6), ValueError, "num_classes must be in 1..100000, got 1000000"),
    (lambda: build(num_classes=2.5), TypeError, "num_classes must be an integer, got 2.5"),
    (lambda: build(sizes=(30,)), ValueError, "multiples of the patch size 16x16 of deit_tiny.*got 30x30; near: 32x32"),
    (lambda: build(sizes=((32, 40),)), ValueError, "got 32x40; near: 32x32"),
    (lambda: build(sizes=()), ValueError, "sizes must hold 1 to 16 entries, got 0"),
    (lambda: build(sizes=64), TypeError, "sizes must be a sequence, got 64"),
    (lambda: build(sizes=((32, 32, 32),)), TypeError, "sides or"),
    (lambda: build(sizes=(0,)), ValueError, "sizes must be at least 1, got 0"),
    (lambda: build(sizes=("a",)), TypeError, "sizes must be an integer, got 'a'"),
    (lambda: build(sizes="ab"), TypeError, "sizes must be a sequence"),
    (lambda: build(head="mlp"), ValueError, "head must be one of patches, class_token, spatial, got 'mlp'"),
    (lambda: build(layers=()), ValueError, "layers must hold 1 to 1000 entries, got 0"),
    (lambda: build(layers=(12,)), ValueError, "layers must be in -12..11, got 12"),
    (lambda: build(layers=(0, -12)), ValueError, "layers must name each block once"),
    (lambda: build(layers=5), TypeError, "layers must be a sequence, got 5"),
    (lambda: build(shared="False"), TypeError, "shared must be True or False, got 'False'"),
    (lambda: build(backbone=""), ValueError, "backbone must be printable text"),
    (lambda: build(backbone=5), TypeError, "backbone must be text, got 5"),
    (lambda: build(class_names="abcde"), TypeError, "class_names must be a sequence, got 'abcde'"),
    (lambda: build(class_names=[1, 2, 3, 4, 5]), TypeError, "class_names must be text, got 1"),
    (lambda: build(class_names=["a", "b", "c", "d", " "]), ValueError, "class_names must be printable text"),
    (lambda: molt.create_model(["a"]), ValueError, "is unknown"),
    (lambda: build(over_layers="rollout"), ValueError, "over_layers must be one of"),
    (lambda: build(over_heads="sum"), ValueError, "over_heads must be one of"),
    (lambda: build(order="resize"), ValueError, "order must be one of"),
    (lambda: build(scale_weights=(1,)), ValueError, "scale_weights must hold 2 entries, got 1"),
    (lambda: build(scale_weights=(0, 0)), ValueError, "scale_weights must add up to a finite number above 0"),
    (lambda: build(scale_weights=(1e308, 1e308)), ValueError, "scale_weights must add up"),
    (lambda: build(scale_weights=(1, float("nan"))), ValueError, "scale_weights must be finite"),
    (lambda: build(class_names=["a"]), ValueError, "class_names must hold 5 entries, got 1"),
    (lambda: build(backbone="nonsense"), ValueError, "backbone 'nonsense' is not a timm model name"),
    (lambda: build(backbone="resnet18"), ValueError, "no timm ViT"),
    (
        lambda: build(backbone="vit_medium_patch16_reg4_gap_256"),
        ValueError,
        "gives no class-row attention: it has no class token",
    ),
    (
        lambda: build()([torch.zeros(3, 8, 8)]),
        TypeError,
        r"x must be a torch tensor \(B, 3, H, W\) in \[0, 1\].*stack photos",
    ),
    (lambda: build()(torch.zeros(3, 8, 8)), ValueError, r"x must have shape \(B, 3, H, W\), got \(3, 8, 8\)"),
    (lambda: build()(torch.zeros(1, 4, 8, 8)), ValueError, "x must have shape"),
    (lambda: build()(torch.zeros(1, 3, 0, 8)), ValueError, "x must have shape"),
    (lambda: build()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), TypeError, "x must be floating point"),
    (lambda: build()(torch.zeros(1, 3, 8, 8).half()), TypeError, "x must be torch.float32 as the model is"),
    (lambda: build()(torch.zeros(0, 3, 8, 8)), ValueError, "x must hold at least one image"),
    (lambda: build()(torch.zeros(1, 3, 8, 8, device="meta")), ValueError, "x must be on cpu, where the model is"),
    (lambda: build().reconfigure(sizes=(32,)), TypeError, "reconfigure changes layers, .*, got sizes"),
    (lambda: build().reconfigure(layers=(3,)), ValueError, "layers must be in -3..2, got 3"),
    (lambda: build().localize(pixels(), [5]), ValueError, "classes must be in 0..4, or -1 for 'object'"),
    (lambda: build().localize(pixels(), [-2]), ValueError, "classes must be in 0..4, or -1 for 'object'"),
    (lambda: build().localize(pixels(), [0.5]), TypeError, "classes must be integers, got float"),
    (lambda: build().localize(pixels(), "cat"), ValueError, "class 'cat' is unknown; known: class 0, class 1"),
    (lambda: build().localize(pixels(), [[1], [2], [3]]), ValueError, r"classes must have shape \(2, C\)"),
    (lambda: build().localize(pixels(), []), (ValueError, TypeError), "classes must"),
    (lambda: build().localize(pixels(), [1], size=(0, 4)), ValueError, "size"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments_are_named(case: int) -> None:
    call, error, text = BAD[case]
    with pytest.raises(error, match=text):
        call()
