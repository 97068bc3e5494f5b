"""IP-Adapter beside a subject: keys and values from its streams, the picture's part as it was."""

from __future__ import annotations

from typing import Any

from diffusers.models import attention_processor as diffusers_processors
from diffusers.models.attention_processor import Attention
from torch import Tensor


class _StreamView:
    """A cross-attention layer as a processor of diffusers sees it, given both streams at once.

    Where the processor projects its prompt [B, 2·M, C] to keys and to values, the K stream gives
    the keys and the V stream the values. Everything else is the layer's own.
    """

    def __init__(self, attn: Attention) -> None:
        self._attn = attn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attn, name)

    def to_k(self, prompt: Tensor) -> Any:
        return self._attn.to_k(prompt.chunk(2, dim=1)[0])

    def to_v(self, prompt: Tensor) -> Any:
        return self._attn.to_v(prompt.chunk(2, dim=1)[1])

    def prepare_attention_mask(
        self, mask: Tensor, target_length: int, batch_size: int, out_dim: int = 3
    ) -> Tensor:
        return self._attn.prepare_attention_mask(mask, target_length // 2, batch_size, out_dim)


class _SplitStreams:
    """In front of a processor of diffusers for IP-Adapter: the same call on a view of the layer."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        if not isinstance(encoder_hidden_states, tuple):
            raise TypeError(
                "an IP-Adapter layer got encoder_hidden_states of type "
                f"{type(encoder_hidden_states).__name__} and wants the prompt and the picture: "
                "give ip_adapter_image or ip_adapter_image_embeds, or unload the adapter with "
                "pipe.unload_ip_adapter()"
            )
        original: Any = super().__call__  # type: ignore[misc]
        return original(
            _StreamView(attn),
            hidden_states,
            encoder_hidden_states,
            attention_mask,
            temb,
            scale,
            ip_adapter_masks,
        )


class _Split(_SplitStreams, diffusers_processors.IPAdapterAttnProcessor):
    pass


class _Split2_0(_SplitStreams, diffusers_processors.IPAdapterAttnProcessor2_0):
    pass


class _SplitXFormers(_SplitStreams, diffusers_processors.IPAdapterXFormersAttnProcessor):
    pass


_SPLIT = {
    diffusers_processors.IPAdapterAttnProcessor: _Split,
    diffusers_processors.IPAdapterAttnProcessor2_0: _Split2_0,
    diffusers_processors.IPAdapterXFormersAttnProcessor: _SplitXFormers,
}


def is_ip_adapter(processor: Any) -> bool:
    """Whether `split_adapter` can stand in for this processor."""
    return type(processor) in _SPLIT


def split_adapter(processor: Any) -> Any:
    """A processor for split streams that shares weights and scales with IP-Adapter's own.

    It is of a subclass, by which set_ip_adapter_scale and unload_ip_adapter know it, and both have
    one state, so that a scale set on one is set on the other.
    """
    kind = _SPLIT[type(processor)]
    shared = kind.__new__(kind)
    shared.__dict__ = processor.__dict__
    return shared
