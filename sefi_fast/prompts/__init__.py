"""From a prompt with placeholders to the tensor that conditions every cross-attention layer."""

from __future__ import annotations

from sefi_fast.prompts.encoding import PromptEmbeds, encode, encode_with_pooled
from sefi_fast.prompts.stages import (
    install_stage_hook,
    pack,
    packed_stages,
    select_stage,
    stage_of,
    unpack,
)
from sefi_fast.prompts.text_encoder import (
    TextEncoder,
    encode_text,
    encode_text_pooled,
    encode_texts,
    text_encoders,
)
from sefi_fast.prompts.tokenization import (
    PromptTokens,
    class_token_ids,
    placeholder_ids,
    tokenize_prompts,
    word_positions,
)

__all__ = [
    "PromptEmbeds",
    "PromptTokens",
    "TextEncoder",
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
    "text_encoders",
    "tokenize_prompts",
    "unpack",
    "word_positions",
]
