"""The fused cross-attention operator and its backends."""

from sefi_fast.ops.cross_attention import CrossAttentionOutput, fused_cross_attention
from sefi_fast.ops.dispatch import available_backends, choose_backend
from sefi_fast.ops.inputs import AttentionInputs

__all__ = [
    "AttentionInputs",
    "CrossAttentionOutput",
    "available_backends",
    "choose_backend",
    "fused_cross_attention",
]
