"""A spatial token in a timm vision transformer: it says of each patch whether it belongs to an object."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Attention, Block, VisionTransformer  # type: ignore[attr-defined]
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from molt.backbones.vit import ViTBackbone
from molt.structures import Features

MASKED_BLOCKS = 3


def see_spatial(backbone: ViTBackbone, token: Tensor, pixels: Tensor, *, attention: bool = True) -> Features:
    """Return Features with masks of normalised pixels (B, 3, H, W), sides multiples of the patch size (SAT, ICCV 2023).

    The token stands between the prefix tokens and the patches, without a position of its own. In every block its
    query's scores before the softmax, averaged over the heads, go through a sigmoid: the block's mask over all tokens.
    In the last three blocks (all, where there are fewer) the softmax attention of all rows is multiplied by the mask,
    column by column and not normalised again. As in the authors' code that holds for the columns of the prefix tokens
    and of the token itself too, each dimmed by its own score; ``Features.masks`` holds those of the patches alone.

    Multiplying a column of the attention is multiplying that token's value, so that fused attention stays on in every
    block and no attention matrix is made.

    Gradients reach the token and the backbone. Attention and keys are those of the same blocks: the class token's row
    of the softmax, before any mask, without the column of the spatial token.

    Args:
        backbone: one that :func:`check_spatial` lets pass.
        token: (1, 1, D) float.
        pixels: float.
        attention: False leaves out attention and keys.
    """
    model = backbone.model
    at = int(model.num_prefix_tokens)
    x = model._pos_embed(model.patch_embed(pixels))
    x = model.norm_pre(torch.cat([x[:, :at], token.expand(len(x), -1, -1), x[:, at:]], 1))
    attention = attention and backbone.no_attention is None
    masks: list[Tensor] = []
    rows: list[Tensor] = []
    keys = None
    for i, block in enumerate(model.blocks):
        run = partial(_run_block, block, at=at, masked=i >= len(model.blocks) - MASKED_BLOCKS, attention=attention)
        x, mask, row, keys = checkpoint(run, x, use_reentrant=False) if model.grad_checkpointing else run(x)
        masks.append(mask)
        if row is not None:
            rows.append(row)
    x = model.norm(x)
    size = (pixels.shape[2], pixels.shape[3])
    return Features(
        patches=x[:, at + 1 :],
        grid=(size[0] // backbone.patch_size[0], size[1] // backbone.patch_size[1]),
        image_size=size,
        class_token=x[:, 0] if getattr(model, "cls_token", None) is not None else None,
        attention=torch.stack(rows, 1) if attention else None,
        keys=keys,
        masks=torch.stack(masks, 1),
    )


def spatial_map(features: Features) -> Tensor:
    """Return the mean (B, 1, h, w) of the last three masks, or of all where there are fewer, in [0, 1].

    Raises:
        ValueError: features without masks.
    """
    if features.masks is None:
        raise ValueError("features hold no masks: take them from a transformer with head='spatial'")
    return features.masks[:, -MASKED_BLOCKS:].mean(1).view(len(features.masks), 1, *features.grid)


@torch.no_grad()
def check_spatial(backbone: ViTBackbone) -> None:
    """Make sure that a network's blocks can be run with a spatial token.

    Raises:
        ValueError: it has blocks or attention other than those of timm's plain VisionTransformer, runs them in another
            way, or drops patches.
    """
    model = backbone.model

    def refuse(why: str) -> ValueError:
        return ValueError(f"backbone {backbone.info.model!r} takes no spatial token: {why}")

    if getattr(type(model), "forward_features", None) is not VisionTransformer.forward_features:
        raise refuse(f"{type(model).__name__} runs its blocks in its own way, unlike timm's VisionTransformer")
    if not isinstance(model.patch_drop, torch.nn.Identity):
        raise refuse("it drops patches in training, so that they are no grid")
    for block in model.blocks:
        if type(block) is not Block:
            raise refuse(f"its blocks are {type(block).__name__}, which molt cannot run with a mask, expected Block")
        if type(block.attn) is not Attention:
            raise refuse(
                f"its blocks attend by {type(block.attn).__name__}, expected Attention without rotary positions"
            )
    first = model.blocks[0]
    weight = first.attn.qkv.weight
    if weight.is_meta:
        return
    # Another version of timm may have added a step to its blocks.
    tokens = torch.randn(1, 4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    training = first.training
    first.eval()
    expected, (found, *_) = first(tokens), _run_block(first, tokens, at=0, masked=False, attention=False)
    first.train(training)
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise refuse("this version of timm runs its blocks in a way that molt does not know")


def _run_block(
    block: Any, x: Tensor, *, at: int, masked: bool, attention: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return what timm's block does to tokens (B, N, D), mask (B, h*w), class row (B, heads, h*w), keys (B, h*w, D)."""
    mixed, mask, row, keys = _attend(block.attn, block.norm1(x), at, masked, attention)
    x = x + block.drop_path1(block.ls1(mixed))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), mask, row, keys


def _attend(
    module: Any, x: Tensor, at: int, masked: bool, attention: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    batch, count, _ = x.shape
    qkv = module.qkv(x).view(batch, count, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)
    query, key = module.q_norm(query), module.k_norm(key)
    scores = _scores(query[:, :, at : at + 1], key, module.scale)
    mask = scores.mean(1).sigmoid()
    if masked:
        value = _dim(value, mask)
    dropout = module.attn_drop.p if module.training else 0.0
    mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, scale=module.scale)
    mixed = module.norm(mixed.transpose(1, 2).reshape(batch, count, -1))
    row = keys = None
    if attention:
        row = _scores(query[:, :, :1], key, module.scale).softmax(-1)[..., at + 1 :]
        keys = key[:, :, at + 1 :].transpose(1, 2).flatten(2)
    return module.proj_drop(module.proj(mixed)), mask[:, at + 1 :], row, keys


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return what one query (B, heads, 1, d) scores at each key (B, heads, N, d): (B, heads, N), float32 or wider."""
    scores = ((query * scale) @ key.transpose(2, 3))[:, :, 0]
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _dim(value: Tensor, mask: Tensor) -> Tensor:
    """Return values (B, heads, N, d) times the mask (B, N)."""
    return value * mask[:, None, :, None].to(value.dtype)
