"""The operator's tensors, gradients and options, in the form that every backend takes.

This module imports torch alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_KEYS = 256
MAX_HEAD_DIM = 256
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of the compiled backends. Only the eager backend takes float64 as well."""


class AttentionInputs(NamedTuple):
    """Inputs of the operator; `fused_cross_attention` documents each."""

    query: Tensor
    key: Tensor
    value: Tensor
    reference_key: Tensor | None = None
    token_weights: Tensor | None = None
    key_mask: Tensor | None = None
    probs_positions: Tensor | None = None

    @property
    def num_positions(self) -> int:
        """T, the number of keys whose probabilities are returned."""
        return 0 if self.probs_positions is None else self.probs_positions.shape[1]

    def probs_shape(self, all_heads: bool) -> tuple[int, ...]:
        """Return the shape of attn_probs: [B, T, N], or [B, H, T, N] for all heads."""
        batch, heads, seqlen_q, _ = self.query.shape
        positions = self.probs_positions
        count = 0 if positions is None else positions.shape[1]
        return (batch, heads, count, seqlen_q) if all_heads else (batch, count, seqlen_q)


class OutputGrads(NamedTuple):
    """Gradients of the operator's outputs, None where an output has none."""

    output: Tensor | None
    subject_loss: Tensor | None
    attn_probs: Tensor | None


class Options(NamedTuple):
    """Options of a call that are not tensors.

    Attributes:
        needs: whether the gradients of query, key, value and reference_key are wanted.
    """

    probs_all_heads: bool
    scale: float
    reference_grad: bool
    needs: tuple[bool, bool, bool, bool] = (False, False, False, False)


Outputs = tuple[Tensor, Tensor, Tensor]
"""Output, subject loss and attention probabilities."""

InputGrads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Gradients of query, key, value and reference key, None where not wanted."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of subject loss and probabilities for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_result(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return uninitialized memory of a result [B, H, L, D]: a view of a contiguous [B, L, H, D]."""
    batch, heads, length, head_dim = like.shape
    row = heads * head_dim
    shape, strides = (batch, heads, length, head_dim), (length * row, head_dim, row, 1)
    if dtype is None:
        return like.new_empty_strided(shape, strides)
    return like.new_empty_strided(shape, strides, dtype=dtype)
