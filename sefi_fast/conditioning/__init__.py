"""From a prompt with placeholders to the tensor that conditions every cross-attention layer."""

from __future__ import annotations

from sefi_fast.conditioning.encoding import Encoded, encode, encode_with_pooled
from sefi_fast.conditioning.packing import pack, packed_stages, select_stage, unpack
from sefi_fast.conditioning.parts import TextPart, text_parts
from sefi_fast.conditioning.prompt import (
    PromptTokens,
    class_token_ids,
    placeholder_ids,
    tokenize_prompts,
    word_positions,
)
from sefi_fast.conditioning.stage_hook import install_stage_hook
from sefi_fast.conditioning.stages import stage_of
from sefi_fast.conditioning.text import encode_text, encode_text_pooled, encode_texts

__all__ = [
    "Encoded",
    "PromptTokens",
    "TextPart",
    "class_token_ids",
    "encode",
    "encode_text",
    "encode_text_pooled",
    "encode_texts",
    "encode_with_pooled",
    "install_stage_hook",
    "pack",
    "packed_stages",
    "placeholder_ids",
    "select_stage",
    "stage_of",
    "text_parts",
    "tokenize_prompts",
    "unpack",
    "word_positions",
]
