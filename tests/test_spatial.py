"""The spatial token against a slow twin with whole attention matrices and timm's own forward; head, files, losses."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import molt
from molt.backbones import ViTBackbone, spatial
from molt.backbones.spatial import check_spatial, spatial_map
from molt.clustering import TokenKMeans
from molt.data.images import read_photo
from molt.data.samples import SamplePhoto
from molt.methods.transformer import ObjectLocalizationTransformer, class_attention
from molt.page import write_page
from molt.training.spatial_loss import area_loss, spatial_loss

pytestmark = pytest.mark.usefixtures("one_thread")

NAME = "molt_deit_tiny"
# What each needs of molt: plain; a distillation token; LayerScale and another patch size; registers; positions for the
# patches alone; registers and no class token; norms of queries and keys.
NETWORKS: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_small_patch14_dinov2": {},
    "vit_small_patch14_reg4_dinov2": {},
    "deit3_small_patch16_224": {},
    "vit_medium_patch16_reg4_gap_256": {},
    "deit_tiny_patch16_224 normed": {"qk_norm": True, "scale_attn_norm": True},
}
PREFIX = [1, 2, 1, 5, 1, 4, 1]


def build(name: str, **options: Any) -> ObjectLocalizationTransformer:
    """Five blocks with noise on every parameter, so that none is idle, and with long queries, in float64."""
    options = {"depth": 5, "embed_dim": 192, "num_heads": 3, **NETWORKS.get(name, {}), **options}
    with mock.patch.object(timm, "create_model", functools.partial(timm.create_model, **options)):
        torch.manual_seed(0)
        backbone = ViTBackbone(name.split()[0], pretrained=False)
    transformer = ObjectLocalizationTransformer(backbone, 4, "spatial").requires_grad_().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in transformer.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
        for block in backbone.model.blocks:
            layer = block.attn.qkv
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / 192**0.5)
            if not isinstance(block.attn.q_norm, nn.Identity):
                block.attn.q_norm.weight.mul_(2)
    return transformer


@functools.cache
def network(name: str) -> ObjectLocalizationTransformer:
    return build(name)


def pixels(transformer: ObjectLocalizationTransformer, grid: tuple[int, int], batch: int = 2) -> Tensor:
    sides = [cells * step for cells, step in zip(grid, transformer.backbone.patch_size, strict=True)]
    return torch.randn(batch, 3, *sides, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def twin(transformer: Any, x: Tensor) -> dict[str, Tensor]:
    """SAT of one photo, a head and an attention matrix at a time, in the weights of timm's network."""
    model = transformer.backbone.model
    at = model.num_prefix_tokens
    tokens = model._pos_embed(model.patch_embed(x[None]))[0]
    tokens = model.norm_pre(torch.cat([tokens[:at], transformer.spatial_token[0], tokens[at:]]))
    masks, rows = [], []
    for number, block in enumerate(model.blocks):
        normed = block.norm1(tokens)
        query, key, value = block.attn.qkv(normed).chunk(3, -1)
        scores, values = [], []
        for head in range(block.attn.num_heads):
            part = slice(64 * head, 64 * head + 64)
            scores.append(block.attn.q_norm(query[:, part]) @ block.attn.k_norm(key[:, part]).T / 8)
            values.append(value[:, part])
        mask = torch.sigmoid(sum(matrix[at] for matrix in scores) / len(scores))
        mixed = []
        for matrix, moved in zip(scores, values, strict=True):
            attention = matrix.exp() / matrix.exp().sum(1, keepdim=True)
            rows.append(attention[0, at + 1 :])
            if number >= len(model.blocks) - 3:
                attention = attention * mask
            mixed.append(attention @ moved)
        masks.append(mask[at + 1 :])
        tokens = tokens + scaled(block.ls1, block.attn.proj(block.attn.norm(torch.cat(mixed, 1))))
        tokens = tokens + scaled(block.ls2, block.mlp(block.norm2(tokens)))
    tokens = model.norm(tokens)
    grid = [side // step for side, step in zip(x.shape[1:], transformer.backbone.patch_size, strict=True)]
    patches = tokens[at + 1 :]
    answers = transformer.head(patches.T.reshape(1, -1, *grid))
    return {
        "patches": patches,
        "first": tokens[0],
        "masks": torch.stack(masks),
        "attention": torch.stack(rows).view(len(masks), -1, len(patches)),
        "logits": answers.mean((2, 3))[0],
    }


def scaled(layer: Any, x: Tensor) -> Tensor:
    return x if isinstance(layer, nn.Identity) else x * layer.gamma


@pytest.mark.parametrize(("grid", "batch"), [((3, 5), 2), ((1, 1), 1), ((4, 1), 1)])
@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_those_of_whole_matrices(name: str, grid: tuple[int, int], batch: int) -> None:
    transformer = network(name)
    count = grid[0] * grid[1]
    with torch.no_grad():
        x = pixels(transformer, grid, batch)
        seen = transformer.see(x)
        assert seen.grid == grid and seen.patches.shape == (batch, count, 192) and seen.logits.shape == (batch, 4)
        assert seen.masks.shape == (batch, 5, count) and seen.masks.dtype == torch.float64
        has_class = "gap" not in name
        assert (seen.attention is not None) == (seen.keys is not None) == (seen.class_token is not None) == has_class
        for i in range(batch):
            expected = twin(transformer, x[i])
            assert (seen.patches[i] - expected["patches"]).abs().max() < 1e-10
            assert (seen.logits[i] - expected["logits"]).abs().max() < 1e-10
            assert (seen.masks[i] - expected["masks"]).abs().max() < 1e-12
            if has_class:
                assert (seen.class_token[i] - expected["first"]).abs().max() < 1e-10
                assert (seen.attention[i] - expected["attention"]).abs().max() < 1e-12
                assert seen.keys.shape == (batch, count, 192)
        bare = transformer.see(x, attention=False)
        assert bare.attention is None and bare.keys is None
        assert torch.equal(bare.patches, seen.patches) and torch.equal(bare.masks, seen.masks)
    if count > 1:
        assert seen.masks.std(-1).mean() > 0.05, "masks of one value would be a test of nothing"


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_have_the_prefix_meant(name: str) -> None:
    assert network(name).backbone.model.num_prefix_tokens == dict(zip(NETWORKS, PREFIX, strict=True))[name]


def hide(monkeypatch: pytest.MonkeyPatch, at: int, masks: bool = True) -> None:
    """Give the spatial token a score of minus infinity everywhere, and every mask the value 1."""
    real = F.scaled_dot_product_attention

    def hidden(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
        bias = query.new_zeros(query.shape[2], key.shape[2])
        bias[:, at] = -torch.inf
        return real(query, key, value, attn_mask=bias, **more)

    monkeypatch.setattr(spatial.F, "scaled_dot_product_attention", hidden)
    if masks:
        monkeypatch.setattr(spatial, "_dim", lambda value, mask: value)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_token_nobody_sees_leaves_timms_own_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = copy.deepcopy(network(name)).float()
    x = pixels(transformer, (3, 4)).float()
    model = transformer.backbone.model
    at = model.num_prefix_tokens
    with torch.no_grad():
        expected = model.forward_features(x)
        with monkeypatch.context() as patched:
            hide(patched, at)
            seen = transformer.see(x)
        tolerance = 1e-5 * expected.abs().max().clamp_min(1)
        assert (seen.patches - expected[:, at:]).abs().max() < tolerance
        if seen.class_token is not None:
            assert (seen.class_token - expected[:, 0]).abs().max() < tolerance
        with monkeypatch.context() as patched:
            hide(patched, at, masks=False)
            assert (transformer.see(x).patches - expected[:, at:]).abs().max() > 1e-2, "masks dim"


def test_drop_path_and_checkpointing_are_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = build("deit_tiny_patch16_224", drop_path_rate=0.6).train()
    model = transformer.backbone.model
    x = pixels(transformer, (2, 3), 3)
    with monkeypatch.context() as patched, torch.no_grad():
        torch.manual_seed(5)
        expected = model.forward_features(x)
        hide(patched, 1)
        torch.manual_seed(5)
        assert (transformer.see(x).patches - expected[:, 1:]).abs().max() < 1e-10
        assert (transformer.see(x).patches - expected[:, 1:]).abs().max() > 1e-2, "another draw"
    gradients = []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        transformer.zero_grad()
        torch.manual_seed(5)
        (transformer(x).square().sum()).backward()
        gradients.append([p.grad.clone() for p in transformer.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*gradients, strict=True))


def test_gradients_are_the_twins() -> None:
    """Of a class loss, which reaches the token through the masks and as a token, and of the loss on the map."""
    transformer = copy.deepcopy(network("vit_small_patch14_dinov2"))
    x, labels = pixels(transformer, (2, 3)), torch.tensor([1, 3])
    parameters = dict(transformer.named_parameters())

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
        return {k: v for k, v in zip(parameters, found, strict=True) if v is not None}

    seen = transformer.see(x, attention=False)
    twins = [twin(transformer, one) for one in x]
    logits, masks = (torch.stack([t[key] for t in twins]) for key in ("logits", "masks"))
    mine = gradients(F.cross_entropy(seen.logits, labels))
    expected = gradients(F.cross_entropy(logits, labels))
    assert "backbone.model.blocks.0.attn.qkv.weight" in mine and "head.weight" in mine
    assert mine["spatial_token"].norm() > 1e-3 and mine.keys() == expected.keys()
    assert all(torch.allclose(mine[k], expected[k], atol=1e-9) for k in mine)
    mine = gradients(spatial_loss(spatial_map(seen)))
    expected = gradients(spatial_loss(masks[:, -3:].mean(1).view(2, 1, 2, 3)))
    assert mine["spatial_token"].norm() > 1e-4 and mine.keys() == expected.keys() and "head.weight" not in mine
    assert all(torch.allclose(mine[k], expected[k], atol=1e-9) for k in mine)


def test_autocast_keeps_masks_wide() -> None:
    transformer = ObjectLocalizationTransformer(ViTBackbone("deit_tiny_patch16_224", pretrained=False), 4, "spatial")
    x = pixels(transformer, (3, 3)).float()
    plain = transformer.see(x)
    with torch.autocast("cpu", torch.bfloat16):
        seen = transformer.see(x)
        loss = spatial_loss(spatial_map(seen))
    assert seen.logits.dtype == torch.bfloat16 and seen.masks.dtype == loss.dtype == torch.float32
    assert (seen.masks - plain.masks).abs().max() < 0.02
    assert torch.equal(loss, spatial_loss(spatial_map(seen)))
    (loss + seen.logits.float().sum()).backward()
    assert transformer.spatial_token.grad.isfinite().all() and transformer.spatial_token.grad.any()


def model(sizes: Any = (32, 48), **options: Any) -> molt.MOLT:
    """Four blocks of random weights with queries long enough for masks that differ from patch to patch."""
    torch.manual_seed(0)
    made = molt.create_model(NAME, 5, sizes, pretrained=False, head="spatial", **options)
    for transformer in made.transformers:
        vit = transformer.backbone.model
        vit.blocks = vit.blocks[:4]
        for block in vit.blocks:
            block.attn.qkv.weight.data *= 8
    return made


def photos(batch: int = 2, height: int = 40, width: int = 56) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shared", [False, True])
def test_the_map_of_every_class_is_the_mean_of_the_last_three_masks(shared: bool) -> None:
    made, x = model(shared=shared), photos()
    tokens = [t.spatial_token for t in made.transformers]
    assert len(tokens) == (1 if shared else 2) and (shared or not torch.equal(*tokens))
    features = made.see(x)
    cams = made.cams(features, torch.tensor([[4, -1], [0, 2]]))
    expected = torch.zeros(2, 1, 40, 56)
    for cam, seen in zip(cams, features, strict=True):
        mean = sum(seen.masks[:, i] for i in (1, 2, 3)).view(2, 1, *seen.grid) / 3
        assert cam.shape == (2, 2, *seen.grid) and torch.allclose(cam, mean.expand_as(cam), atol=1e-6)
        assert torch.allclose(class_attention(seen), mean, atol=1e-6) and mean.std() > 0.01
        large = F.interpolate(mean, (40, 56), mode="bilinear")
        low, high = large.amin((2, 3), keepdim=True), large.amax((2, 3), keepdim=True)
        expected += (large - low) / (high - low) / 2
    found = made.localize(x, [3, -1])
    assert torch.allclose(found, expected.expand(-1, 2, -1, -1), atol=1e-5)
    assert torch.allclose(made.localize(x), expected, atol=1e-5)
    assert torch.allclose(made(x), torch.stack([seen.logits for seen in features]).mean(0), atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (5, 300)])
def test_photos_of_any_size(size: tuple[int, int]) -> None:
    maps = model().localize(photos(1, *size), [0])
    assert maps.shape == (1, 1, *size) and maps.isfinite().all()


def test_fewer_blocks_than_three_are_all_masked() -> None:
    transformer = build("deit_tiny_patch16_224", depth=2)
    x = pixels(transformer, (2, 2), 1)
    seen = transformer.see(x)
    assert torch.allclose(spatial_map(seen).flatten(), twin(transformer, x[0])["masks"].mean(0), atol=1e-10)
    assert torch.allclose(seen.patches[0], twin(transformer, x[0])["patches"], atol=1e-9)


def test_compiles_without_a_break() -> None:
    made, x = model(sizes=(48,)), photos()

    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (seen,) = made.see(x)
        return seen.logits, made.cams([seen], torch.tensor([[1], [2]]))[0], seen.masks

    with torch.no_grad():
        for compiled, plain in zip(torch.compile(run, fullgraph=True, backend="eager")(x), run(x), strict=True):
            assert torch.allclose(compiled, plain, atol=1e-5)


def test_frozen_backbones_leave_token_and_head_to_train() -> None:
    made, x = model(sizes=(48,)).freeze_backbones().train(), photos()
    learned = {k: p for k, p in made.named_parameters() if p.requires_grad}
    assert set(learned) == {f"transformers.0.{part}" for part in ("head.weight", "head.bias", "spatial_token")}
    assert not made.trained
    optimizer = torch.optim.AdamW(learned.values(), lr=0.05, weight_decay=0)
    losses = []
    for _ in range(12):
        (pyramid,) = made.pyramid(x)
        seen = made.transformer(0).see(pyramid, attention=False)
        area = area_loss(spatial_map(seen), 0.9)
        loss = F.cross_entropy(seen.logits, torch.tensor([0, 1])) + area
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((loss.item(), area.item()))
    assert losses[-1][0] < 0.7 * losses[0][0] and losses[-1][1] < 0.7 * losses[0][1] and made.trained


def test_backbone_keys_and_weights_are_timms() -> None:
    plain = molt.create_model(NAME, 5, (32,), pretrained=False).transformers[0]
    token = molt.create_model(NAME, 5, (32,), pretrained=False, head="spatial").transformers[0]
    more = set(token.state_dict()) - set(plain.state_dict())
    assert more == {"spatial_token"} and set(plain.state_dict()) < set(token.state_dict())
    token.backbone.load_state_dict(plain.backbone.state_dict())
    token.backbone.model.load_state_dict(timm.create_model("deit_tiny_patch16_224", num_classes=0).state_dict())


@pytest.mark.parametrize("shared", [False, True])
def test_saved_whole(tmp_path: Path, shared: bool) -> None:
    made = molt.create_model(NAME, 5, (32, 48), shared=shared, pretrained=False, head="spatial")
    for transformer in made.transformers:
        transformer.head.weight.data += 1
        transformer.spatial_token.data += torch.randn(192)
    made.save(tmp_path / "m")
    again, x = molt.load_model(tmp_path / "m"), photos()
    assert again.config == made.config and again.config.head == "spatial" and again.trained
    assert torch.equal(again(x), made(x)) and torch.equal(again.localize(x, [2]), made.localize(x, [2]))


def test_saved_without_backbones(tmp_path: Path) -> None:
    made = molt.create_model("molt_dinov2_small", 3, (28,), source="package", head="spatial").freeze_backbones()
    for transformer in made.transformers:
        transformer.spatial_token.data += torch.randn(384)
    made.mark_trained(True)
    path = tmp_path / "heads"
    made.save(path, backbones=False)
    state = load_file(path)
    assert set(state) == {f"transformers.0.{k}" for k in ("head.weight", "head.bias", "spatial_token")}
    again, x = molt.load_model(path, source="package"), photos()
    assert torch.equal(again(x), made(x)) and torch.equal(again.localize(x, [-1]), made.localize(x, [-1]))
    assert not any(p.requires_grad for t in again.transformers for p in t.backbone.parameters())
    assert all(t.spatial_token.requires_grad for t in again.transformers)

    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file({k: v for k, v in state.items() if k != "transformers.0.spatial_token"}, path, metadata=header)
    with pytest.raises(ValueError, match="missing: transformers.0.spatial_token"):
        molt.load_model(path, source="package")


def test_localizer_and_page(photo: Tensor, tmp_path: Path) -> None:
    made = model(sizes=(64, (96, 128)))
    made.mark_trained(True)
    loc = molt.Localizer(made, device="cpu", k=2, clusterer=TokenKMeans())
    stages = loc.explain(photo)
    images = read_photo(photo, (96, 128)).pixels[None]
    assert torch.allclose(stages.fused, made.localize(images)[0, 0], atol=1e-5)
    assert stages.attention is None and stages.captions.cam[0] == "Object map"
    assert torch.equal(stages.cam, stages.scale_maps[1][1]) and stages.result.heat.shape == (2, 96, 128)
    other = molt.Localizer(molt.create_model(NAME, 5, (32,), pretrained=False), device="cpu")
    assert other.method.captions.cam[0] == "Class map", "captions are each method's own"
    assert loc(photo, "object").heat.shape == (1, 96, 128)
    write_page(tmp_path / "page.html", [(SamplePhoto("disc", tmp_path / "x.png", ""), stages)], loc.weights)
    page = (tmp_path / "page.html").read_text()
    assert "Object map, 64\u00a0px" in page and "class token" not in page


def refused(name: str, **options: Any) -> Callable[[], object]:
    return lambda: build(name, **options)


BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (refused("eva02_tiny_patch14_224"), ValueError, "takes no spatial token: Eva runs its blocks in its own way"),
    (refused("vit_small_patch16_dinov3"), ValueError, "'vit_small_patch16_dinov3' takes no spatial token: Eva"),
    (refused("vit_base_patch16_xp_224"), ValueError, "its blocks are ParallelScalingBlock"),
    (refused("deit_tiny_patch16_224", attn_layer="diff"), ValueError, "attend by DiffAttention, expected Attention"),
    (refused("deit_tiny_patch16_224", patch_drop_rate=0.5), ValueError, "it drops patches in training"),
    (lambda: model(layers=(-1,)), ValueError, "layers does not apply to head 'spatial'"),
    (lambda: model(over_layers="mean"), ValueError, "over_layers does not apply to head 'spatial'.*got 'mean'"),
    (lambda: model(over_heads="max"), ValueError, "over_heads does not apply to head 'spatial'.*got 'max'"),
    (lambda: model().reconfigure(layers=[0]), ValueError, "layers does not apply to head 'spatial'"),
    (lambda: class_attention(model().see(photos())[0], (0,)), ValueError, "layers does not apply to head 'spatial'"),
    (lambda: spatial_map(network("deit_tiny_patch16_224").backbone.see(torch.zeros(1, 3, 16, 16).double())),
     ValueError, "features hold no masks"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_arguments_are_named(case: int) -> None:
    call, error, text = BAD[case]
    with pytest.raises(error, match=text):
        call()


def test_blocks_of_another_timm_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = ViTBackbone("deit_tiny_patch16_224", pretrained=False)
    check_spatial(backbone)
    real = spatial.Block.forward
    monkeypatch.setattr(spatial.Block, "forward", lambda block, x: real(block, x) + 1)
    with pytest.raises(ValueError, match="this version of timm runs its blocks in a way that molt does not know"):
        check_spatial(backbone)
