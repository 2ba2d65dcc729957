"""Class-row attention and keys of ViTs against timm's own unfused attention, whose matrix its dropout is handed."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molt.backbones import ViTBackbone
from molt.backbones.preprocess import normalize

pytestmark = pytest.mark.usefixtures("one_thread")

# What each needs of molt: plain; a distillation token; DINOv2; registers; rotary embeddings in two layouts of the
# projection and a learned one for each layer; EVA's own; a query and key norm; fewer keys than queries.
NETWORKS = {
    "deit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_small_patch14_dinov2": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_small_patch16_dinov3": {},
    "vit_small_patch16_dinov3_qkvb": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_pe_core_tiny_patch16_384": {},
    "eva02_tiny_patch14_224": {},
    "vit_base_patch16_sapiens2": {"embed_dim": 192, "num_heads": 6, "num_kv_heads": 6},
    "vit_base_patch16_sapiens2 grouped": {"embed_dim": 192, "num_heads": 6, "num_kv_heads": 2},
}
PREFIX = {"deit_tiny_patch16_224": 1, "deit_tiny_distilled_patch16_224": 2, "vit_small_patch14_reg4_dinov2": 5}
ROTARY = [name for name in NETWORKS if any(word in name for word in ("dinov3", "rope", "pe_core", "eva02", "sapiens2"))]
NORMED = [name for name in NETWORKS if "sapiens2" in name]


def build(name: str, **options: Any) -> ViTBackbone:
    """Make a network of random weights that attends to few tokens, two blocks deep unless told otherwise."""
    options = {"depth": 2, **options}
    with mock.patch.object(timm, "create_model", functools.partial(timm.create_model, **options)):
        torch.manual_seed(0)
        backbone = ViTBackbone(name.split()[0], pretrained=False)
    sharpen(backbone.model)
    return backbone


def sharpen(model: Any, seed: int = 1) -> None:
    """Give every parameter noise, so that none is idle, and make queries and keys long."""
    generator = torch.Generator().manual_seed(seed)

    def noise(value: Tensor, deviation: float) -> Tensor:
        return deviation * torch.randn(value.shape, generator=generator).to(value)

    with torch.no_grad():
        for value in model.parameters():
            value.add_(noise(value, 0.1))
        for block in model.blocks:
            layers = [block.attn.qkv] if block.attn.qkv is not None else [block.attn.q_proj, block.attn.k_proj]
            for layer in layers:
                layer.weight.copy_(noise(layer.weight, 2 / layer.in_features**0.5))
            if not isinstance(block.attn.q_norm, nn.Identity):
                block.attn.q_norm.weight.mul_(4)  # their length is the norm's, whatever the projection


@functools.cache
def network(name: str) -> ViTBackbone:
    return build(name, **NETWORKS[name])


def unfused(backbone: ViTBackbone, images: Tensor) -> Tensor:
    """Return timm's own rows (B, layers, heads, h*w): class row, patch columns, of attention computed unfused."""
    attentions = [block.attn for block in backbone.model.blocks]
    seen: list[Tensor] = []
    hooks = [a.attn_drop.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for a in attentions]
    for attention in attentions:
        attention.fused_attn = False
    try:
        backbone.model.forward_features(normalize(images, backbone.model))
    finally:
        for attention, hook in zip(attentions, hooks, strict=True):
            attention.fused_attn = True
            hook.remove()
    assert len(seen) == len(attentions)
    return torch.stack([matrix[:, :, 0, backbone.model.num_prefix_tokens :] for matrix in seen], 1)


class Fused:
    """Counts calls of the fused attention and keeps the keys of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: list[Tensor] = []
        real = F.scaled_dot_product_attention

        def spy(query: Tensor, key: Tensor, *rest: Any, **more: Any) -> Tensor:
            self.keys.append(key)
            return real(query, key, *rest, **more)

        monkeypatch.setattr(F, "scaled_dot_product_attention", spy)


def side_by_side(keys: Tensor, prefix: int) -> Tensor:
    """(B, heads, N, d) as (B, h*w, heads * d)."""
    return keys[:, :, prefix:].transpose(1, 2).flatten(2)


def pictures(backbone: ViTBackbone, grid: tuple[int, int], batch: int = 2, seed: int = 0) -> Tensor:
    height, width = (cells * step for cells, step in zip(grid, backbone.patch_size, strict=True))
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", [(5, 5), (3, 8)])
@pytest.mark.parametrize("name", NETWORKS)
def test_rows_are_those_of_unfused_attention(name: str, grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = network(name)
    images = pictures(backbone, grid)
    expected = unfused(backbone, images)
    peak, uniform = expected.amax(-1).mean(), 1 / (grid[0] * grid[1])
    assert peak > 5 * uniform, "a row of equal numbers would be a test of nothing"

    fused = Fused(monkeypatch)
    features = backbone(images)
    assert len(fused.keys) == len(backbone.model.blocks)
    assert all(block.attn.fused_attn for block in backbone.model.blocks)
    assert features.grid == grid and features.attention.dtype == torch.float32
    assert (
        features.attention.shape
        == expected.shape
        == (2, 2, backbone.model.blocks[0].attn.num_heads, 24 + (grid[0] == 5))
    )
    assert (features.attention - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_one_patch(name: str) -> None:
    backbone = network(name)
    images = pictures(backbone, (1, 1), 8)
    features = backbone(images)
    expected = unfused(backbone, images)
    assert features.attention.shape == (8, 2, expected.shape[2], 1) and features.keys.shape[:2] == (8, 1)
    assert expected.std() > 0.05, "rows differ, so that the tolerance means something"
    assert (features.attention - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_keys_are_the_last_blocks_before_rotation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = network(name)
    attention, prefix = backbone.model.blocks[-1].attn, backbone.model.num_prefix_tokens
    given: list[Tensor] = []
    layer = attention.qkv if attention.qkv is not None else attention.k_proj
    hook = attention.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    fused = Fused(monkeypatch)
    images = pictures(backbone, (3, 4))
    keys = backbone(images).keys
    hook.remove()
    used = side_by_side(fused.keys[-1], prefix)
    if name in ROTARY:
        # From the block's input and weights alone. EVA's keys have no bias.
        whole = F.linear(given[0], layer.weight, layer.bias)
        if attention.qkv is not None:
            whole = whole.chunk(3, -1)[1]
        expected = whole.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        if name in NORMED:
            expected = attention.k_norm(expected)
            assert not isinstance(attention.k_norm, nn.Identity)
        expected = side_by_side(expected, prefix)
        assert keys.shape == (2, 12, expected.shape[2])
        assert (keys - expected).abs().max() < 1e-4
        if used.shape == keys.shape:
            # Rotation keeps each key's length, and turns all but few of them far.
            assert torch.allclose(keys.norm(dim=-1), used.norm(dim=-1), rtol=1e-4)
            assert (keys - used).norm() > 0.1 * used.norm()
    else:
        assert torch.equal(keys, used)


@pytest.mark.parametrize(("name", "prefix"), PREFIX.items())
def test_class_distillation_and_register_columns_are_left_out(name: str, prefix: int) -> None:
    backbone = network(name)
    assert backbone.model.num_prefix_tokens == prefix
    mass = backbone(pictures(backbone, (2, 2))).attention.sum(-1)
    assert (mass < 1 + 1e-5).all() and (mass > 0).all() and mass.min() < 0.9, "they attend to themselves, too"


def test_every_block_of_a_whole_network_has_its_row() -> None:
    backbone = build("deit_tiny_patch16_224", depth=12).double()  # rounding adds up over blocks
    images = pictures(backbone, (2, 3)).double()
    features = backbone(images)
    assert features.attention.shape == (2, 12, 3, 6) and features.keys.shape == (2, 6, 192)
    assert (features.attention - unfused(backbone, images)).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("vit_base_patch16_siglip_224", {"embed_dim": 192, "num_heads": 3}, "no class token"),
        ("vit_medium_patch16_reg4_gap_256", {}, "no class token"),
        ("vit_small_patch16_18x2_224", {}, "its blocks attend by"),
    ],
)
def test_networks_without_it_say_why(name: str, options: dict, why: str) -> None:
    with mock.patch.object(timm, "create_model", functools.partial(timm.create_model, depth=1, **options)):
        backbone = ViTBackbone(name, pretrained=False)
    features = backbone(pictures(backbone, (2, 2)))
    assert features.attention is None and features.keys is None
    assert why in backbone.no_attention
    assert features.patches.shape[:2] == (2, 4)


def test_attention_can_be_left_out() -> None:
    backbone = network("deit_tiny_patch16_224")
    images = pictures(backbone, (3, 3))
    without, whole = backbone(images, attention=False), backbone(images)
    assert without.attention is None and without.keys is None
    assert backbone.no_attention is None and whole.attention is not None and whole.keys is not None
    assert torch.equal(without.patches, whole.patches)


def test_recording_leaves_the_tokens_as_they_are() -> None:
    backbone = network("vit_small_patch16_dinov3")
    images = pictures(backbone, (3, 4))
    tokens = backbone.model.forward_features(normalize(images, backbone.model))
    assert torch.equal(backbone(images).patches, tokens[:, 5:])


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_gradients_are_those_of_unfused_attention(name: str) -> None:
    backbone = network(name)
    images = pictures(backbone, (3, 4)).requires_grad_()
    weight = backbone.model.blocks[-1].attn.qkv.weight

    def gradients(attention: Callable[[], Tensor]) -> list[Tensor]:
        weight.requires_grad_()
        try:
            rows = attention()
            toward = torch.randn(rows.shape, generator=torch.Generator().manual_seed(4))
            return list(torch.autograd.grad((rows * toward).sum(), [images, weight]))
        finally:
            weight.requires_grad_(False)

    found = gradients(lambda: backbone(images).attention)
    expected = gradients(lambda: unfused(backbone, images))
    for mine, theirs in zip(found, expected, strict=True):
        scale = theirs.abs().max()
        assert scale > 0 and (mine - theirs).abs().max() < 1e-3 * scale


def test_no_graph_where_none_is_wanted() -> None:
    backbone = network("deit_tiny_patch16_224")
    images = pictures(backbone, (2, 2)).requires_grad_()
    with torch.no_grad():
        features = backbone(images)
    assert not features.attention.requires_grad and not features.keys.requires_grad
    assert backbone(images).keys.requires_grad
    with torch.inference_mode():
        assert torch.equal(backbone(images).attention, features.attention)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_small_patch16_rope_mixed_224"])
def test_threads_get_their_own_rows(name: str) -> None:
    """Both hold a block's query and have yet to make its keys, which a barrier there sees to."""
    backbone = network(name)
    images = [pictures(backbone, (3, 4), seed=seed) for seed in (1, 2)]
    alone = [backbone(one) for one in images]
    assert (alone[0].attention - alone[1].attention).abs().max() > 0.05
    barrier = threading.Barrier(2, timeout=30)
    found: list[Any] = [None, None]

    def work(i: int) -> None:
        found[i] = backbone(images[i])

    def meet(*_: Any) -> None:
        barrier.wait()

    hooks = [block.attn.k_norm.register_forward_pre_hook(meet) for block in backbone.model.blocks]
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        for hook in hooks:
            hook.remove()
    for mine, expected in zip(found, alone, strict=True):
        assert mine.attention.shape == expected.attention.shape
        assert torch.allclose(mine.attention, expected.attention, atol=1e-5)
        assert torch.allclose(mine.keys, expected.keys, atol=1e-4)


def test_a_copy_records_its_own() -> None:
    backbone = network("vit_small_patch16_dinov3")
    images = pictures(backbone, (3, 4))
    before = backbone(images)
    twin = copy.deepcopy(backbone)
    assert torch.equal(twin(images).attention, before.attention)
    sharpen(twin.model, seed=9)
    after = twin(images).attention
    assert (after - unfused(twin, images)).abs().max() < 1e-5
    assert (after - before.attention).abs().max() > 0.05
    again = backbone(images)
    assert torch.equal(again.attention, before.attention) and torch.equal(again.keys, before.keys)
    for one, other in ((backbone, twin), (twin, backbone)):
        recording = one._rows.start()
        other(images)
        one._rows.stop()
        assert recording.rows == [] and recording.keys is None


def test_two_backbones_inside_one_another() -> None:
    """What one network records is not what another, run meanwhile in the same thread, attends to."""
    outer, inner = network("deit_tiny_patch16_224"), network("vit_small_patch16_dinov3")
    images = pictures(outer, (3, 4))
    expected = outer(images), inner(images)
    seen = []
    hook = outer.model.blocks[0].register_forward_hook(lambda *_: seen.append(inner(images)))
    found = outer(images)
    hook.remove()
    assert torch.equal(found.attention, expected[0].attention)
    assert torch.equal(seen[0].attention, expected[1].attention)


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_small_patch14_reg4_dinov2"])
def test_double_precision(name: str) -> None:
    backbone = copy.deepcopy(network(name)).double()
    images = pictures(backbone, (3, 4)).double()
    features = backbone(images)
    assert features.attention.dtype == features.keys.dtype == torch.float64
    assert (features.attention - unfused(backbone, images)).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_half_precision(name: str) -> None:
    """Attention comes in float32, near that of the same numbers in double precision."""
    backbone = copy.deepcopy(network(name))
    backbone.model.blocks = backbone.model.blocks[:1]  # rounding adds up over blocks
    backbone = backbone.bfloat16()
    images = pictures(backbone, (3, 4)).bfloat16()
    features = backbone(images)
    assert features.attention.dtype == torch.float32 and features.keys.dtype == torch.bfloat16
    expected = unfused(copy.deepcopy(backbone).double(), images.double())
    assert expected.amax(-1).mean() > 0.3
    assert (features.attention - expected).abs().max() < 0.05
    assert (features.attention - expected).abs().mean() < 0.003
