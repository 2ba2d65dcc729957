"""The class token's attention in a timm ViT, without giving up fused attention."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from timm.layers.attention import AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import Attention  # type: ignore[attr-defined]
from torch import Tensor, nn


@dataclass
class Recording:
    """One forward pass: a row (B, heads, N) a block, and the last block's keys (B, heads, N, d)."""

    rows: list[Tensor] = field(default_factory=list)
    keys: Tensor | None = None
    query: Tensor | None = None
    rope: Tensor | None = None

    def last_keys(self) -> Tensor:
        """Return the keys of the block that ran last."""
        assert self.keys is not None
        return self.keys


class ClassRows:
    """Recomputes the class token's row of each block's attention: softmax(q_cls K^T * scale), nothing else.

    timm's attention modules hand their queries and keys to ``q_norm`` and ``k_norm``, which are identities where a
    network has no such norm; hooks there see what fused attention is about to use. Rotary position embeddings come
    later in the module, so they are applied here again.

    Raises:
        ValueError: the network has no class token, or attention that is not the plain softmax of timm's ViT and EVA
            families.
    """

    def __init__(self, model: nn.Module) -> None:
        if getattr(model, "cls_token", None) is None:
            raise ValueError("it has no class token")
        self.prefix: int = model.num_prefix_tokens  # type: ignore[assignment]
        # By thread, because a network may serve several at once.
        self._running: dict[int, Recording] = {}
        attentions: list[Any] = [getattr(block, "attn", None) for block in model.blocks]  # type: ignore[union-attr]
        for attention in attentions:
            if type(attention) not in (Attention, AttentionRope, EvaAttention):
                kind = "several modules" if attention is None else type(attention).__name__
                raise ValueError(f"its blocks attend by {kind}, which molt does not know")
        for attention in attentions:
            attention.register_forward_pre_hook(self._on_attention, with_kwargs=True)
            attention.q_norm.register_forward_hook(self._on_query)
            attention.k_norm.register_forward_hook(partial(self._on_keys, attention))

    def start(self) -> Recording:
        """Record what the network does in this thread until `stop`."""
        recording = Recording()
        self._running[_thread()] = recording
        return recording

    def stop(self) -> None:
        """End this thread's recording."""
        self._running.pop(_thread(), None)

    def _on_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording = self._running.get(_thread())
        if recording is not None:
            rotary = isinstance(module, AttentionRope | EvaAttention)
            recording.rope = kwargs.get("rope", args[1] if len(args) > 1 else None) if rotary else None

    def _on_query(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        recording = self._running.get(_thread())
        if recording is not None:
            recording.query = output[:, :, :1]  # the class token's, which is never rotated

    def _on_keys(self, attention: Any, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        recording = self._running.get(_thread())
        if recording is None or recording.query is None:
            return
        keys = recording.keys = output
        if recording.rope is not None:
            first = attention.num_prefix_tokens
            half = getattr(attention, "rotate_half", False)
            turned = apply_rot_embed_cat(keys[:, :, first:], recording.rope, half=half)
            keys = torch.cat([keys[:, :, :first], turned.to(keys.dtype)], 2)
        groups = getattr(attention, "num_kv_groups", 1)
        if groups > 1:
            keys = keys.repeat_interleave(groups, 1)
        scores = (recording.query * attention.scale) @ keys.transpose(2, 3)
        wide = torch.promote_types(scores.dtype, torch.float32)
        recording.rows.append(scores.softmax(-1, dtype=wide)[:, :, 0])
        recording.query = None


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
