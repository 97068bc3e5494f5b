"""Give a layer's key projection the K stream of a prompt and its value projection the V stream.

The hooks stand on the projections, below whatever attention processor a layer has, so that those
of diffusers, of IP-Adapter and of users all take both streams.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class StreamHook:
    """Forward-pre-hook of a projection: of two streams [B, M, 2·C] side by side it passes on one.

    A prompt of width C is passed on as it is.

    Args:
        width: C, columns of a plain prompt.
        stream: 0 for keys, 1 for values, None for diffusers' fused projection, which gets both as
            [B, 2, M, C].
    """

    def __init__(self, width: int, stream: int | None) -> None:
        self.width = width
        self.stream = stream

    def __call__(self, projection: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        prompt = args[0]
        if prompt.shape[-1] != 2 * self.width:
            return None
        if self.stream is None:
            return prompt.unflatten(-1, (2, self.width)).transpose(1, 2), *args[1:]
        return prompt.chunk(2, dim=-1)[self.stream], *args[1:]


def _join_fused(projection: nn.Module, args: tuple[Any, ...], projected: Tensor) -> Tensor | None:
    """Forward hook of a fused projection: keys of the K stream next to values of the V stream."""
    if projected.dim() != 4:
        return None
    keys, values = projected.unbind(1)
    return torch.cat([keys.chunk(2, dim=-1)[0], values.chunk(2, dim=-1)[1]], dim=-1)


def hook_streams(attn: Attention) -> list[RemovableHandle]:
    """Hook the projections of a cross-attention layer that are not hooked."""
    handles = []
    width = attn.cross_attention_dim
    for name, stream in (("to_k", 0), ("to_v", 1), ("to_kv", None)):
        projection = getattr(attn, name, None)
        if projection is None or _is_hooked(projection):
            continue
        if stream is None:
            handles.append(projection.register_forward_hook(_join_fused))
        handles.append(projection.register_forward_pre_hook(StreamHook(width, stream)))
    return handles


def _is_hooked(projection: nn.Module) -> bool:
    return any(isinstance(hook, StreamHook) for hook in projection._forward_pre_hooks.values())
