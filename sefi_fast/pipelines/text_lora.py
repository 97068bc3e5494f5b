"""LoRA layers of the text encoders at the scale that one call asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers

from sefi_fast.conditioning.parts import text_parts


@contextmanager
def text_lora(pipe: Any, scale: float | None) -> Iterator[None]:
    """Set the scale as the pipeline's own encode_prompt sets it, and take it back."""
    if scale is None:
        yield
        return
    pipe._lora_scale = scale
    if not USE_PEFT_BACKEND:
        yield
        return
    encoders = [part.text_encoder for part in text_parts(pipe)]
    for encoder in encoders:
        scale_lora_layers(encoder, scale)
    try:
        yield
    finally:
        for encoder in encoders:
            unscale_lora_layers(encoder, scale)
