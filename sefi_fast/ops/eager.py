"""The fused cross-attention in plain PyTorch operations: the reference for every other backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sefi_fast.ops.inputs import (
    AttentionInputs,
    InputGrads,
    Options,
    OutputGrads,
    Outputs,
    wide_dtype,
)


def not_supported_reason(inputs: AttentionInputs) -> str | None:
    """Return None: this backend takes every input."""
    return None


def forward(inputs: AttentionInputs, options: Options) -> Outputs:
    """Compute equations 4 and 5 of docs/method.md with whole maps in memory.

    Autograd can differentiate it. Without `options.reference_grad` the reference map is detached.

    Returns:
        output [B, H, N, D] in the query's dtype, a view of a contiguous [B, N, H, D]; the loss [B]
        and probabilities [B, (H,) T, N] in float32 (float64 for float64 inputs).
    """
    query, key, value, ref_key, token_weights, key_mask, probs_positions = _without_hidden(inputs)
    batch, heads, _, _ = query.shape
    probs = _probabilities(query, key, key_mask, options.scale)
    output = _heads_inside(probs.to(query.dtype) @ value)

    if ref_key is None:
        subject_loss = probs.new_zeros(batch)
    else:
        ref_probs = _probabilities(query, ref_key, key_mask, options.scale)
        squares = (probs - (ref_probs if options.reference_grad else ref_probs.detach())).square()
        if token_weights is not None:
            squares = squares * token_weights[:, None, None, :]
        subject_loss = squares.sum((1, 2, 3)) / max(heads, 1)

    if probs_positions is None:
        shape = inputs.probs_shape(options.probs_all_heads)
        return output, subject_loss, probs.new_zeros(shape)
    columns, inside = _columns(probs_positions, probs)
    attn_probs = (probs.gather(3, columns) * inside).transpose(2, 3)
    if not options.probs_all_heads:
        attn_probs = attn_probs.sum(1) / max(heads, 1)
    return output, subject_loss, attn_probs.contiguous()


def backward(grads: OutputGrads, inputs: AttentionInputs, options: Options) -> InputGrads:
    """Compute equations 7 to 11 of docs/method.md in closed form."""
    query, key, value, ref_key, token_weights, key_mask, probs_positions = _without_hidden(inputs)
    dtype, heads, scale = query.dtype, max(query.shape[1], 1), options.scale
    probs = _probabilities(query, key, key_mask, scale)
    d_probs = torch.zeros_like(probs)
    if grads.output is not None:
        d_probs += grads.output @ value.transpose(2, 3)
    d_ref_scores = None
    if grads.subject_loss is not None and ref_key is not None:
        ref_probs = _probabilities(query, ref_key, key_mask, scale)
        factor = (grads.subject_loss * (2.0 / heads))[:, None, None, None]
        d_probs_loss = (probs - ref_probs) * factor
        if token_weights is not None:
            d_probs_loss = d_probs_loss * token_weights[:, None, None, :]
        d_probs += d_probs_loss
        if options.reference_grad:
            d_ref_scores = _softmax_backward(ref_probs, -d_probs_loss).to(dtype)
    if grads.attn_probs is not None and probs_positions is not None:
        columns, inside = _columns(probs_positions, probs)
        every_head = options.probs_all_heads
        shares = grads.attn_probs if every_head else grads.attn_probs[:, None] / heads
        d_columns = shares.transpose(2, 3).to(probs.dtype) * inside
        d_probs.scatter_add_(3, columns, d_columns.expand(columns.shape))
    d_scores = _softmax_backward(probs, d_probs).to(dtype)

    # Gradients have the shapes of the inputs; a mask of every sample broadcasts the tensors above.
    found: list[Tensor | None] = [None, None, None, None]
    if options.needs[0]:
        d_query = d_scores @ key
        if d_ref_scores is not None and ref_key is not None:
            d_query = d_query + d_ref_scores @ ref_key
        found[0] = d_query * scale
    if options.needs[1]:
        found[1] = _sum_to((d_scores.transpose(2, 3) @ query) * scale, inputs.key)
    if options.needs[2]:
        if grads.output is None:
            found[2] = torch.zeros_like(inputs.value)
        else:
            found[2] = _sum_to(probs.to(dtype).transpose(2, 3) @ grads.output, inputs.value)
    if options.needs[3] and inputs.reference_key is not None:
        if d_ref_scores is None:
            found[3] = torch.zeros_like(inputs.reference_key)
        else:
            d_ref_key = (d_ref_scores.transpose(2, 3) @ query) * scale
            found[3] = _sum_to(d_ref_key, inputs.reference_key)
    laid_out = [None if grad is None else _heads_inside(grad) for grad in found]
    return laid_out[0], laid_out[1], laid_out[2], laid_out[3]


def _heads_inside(tensor: Tensor) -> Tensor:
    """Return a [B, H, L, D] as a view of a contiguous [B, L, H, D]."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _without_hidden(inputs: AttentionInputs) -> AttentionInputs:
    """Return the inputs with zeros in masked rows, where even a NaN must have no effect."""
    if inputs.key_mask is None:
        return inputs
    visible = inputs.key_mask[:, None, :, None]
    zero = inputs.key.new_zeros(())
    ref_key = inputs.reference_key
    return inputs._replace(
        key=torch.where(visible, inputs.key, zero),
        value=torch.where(visible, inputs.value, zero),
        reference_key=None if ref_key is None else torch.where(visible, ref_key, zero),
    )


def _probabilities(query: Tensor, key: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """Return softmax(Q Kᵀ · scale) [B, H, N, M] in float32 or float64, zero without any key."""
    wide = wide_dtype(query.dtype)
    if query.dtype == torch.float16 and 0 < abs(scale) < 1:
        # The products before the scale may lie beyond 65504; a power of two costs no rounding.
        power = 2.0 ** round(math.log2(abs(scale)))
        query, scale = query * power, scale / power
    scores = (query @ key.transpose(2, 3)) * scale
    if key_mask is None:
        return scores.softmax(-1, dtype=wide)
    hidden = ~key_mask[:, None, None, :]
    # Not minus infinity: a row without any key would be 0/0, and NaN in its gradient.
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(hidden, lowest).softmax(-1, dtype=wide).masked_fill(hidden, 0.0)


def _columns(probs_positions: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Return gather indices [B, H, N, T] of the positions, and which of them are keys at all."""
    batch, heads, queries, keys = probabilities.shape
    inside = (probs_positions >= 0) & (probs_positions < keys)
    columns = probs_positions.clamp(0, keys - 1)[:, None, None, :].expand(batch, heads, queries, -1)
    return columns, inside[:, None, None, :]


def _softmax_backward(probabilities: Tensor, grad: Tensor) -> Tensor:
    """Compute equation 8: dS = A ∘ (dA − rowsum(A ∘ dA))."""
    delta = (probabilities * grad).sum(-1, keepdim=True)
    return probabilities * (grad - delta)


def _sum_to(grad: Tensor, like: Tensor) -> Tensor:
    """Sum over the batch if the input was broadcast over it."""
    return grad.sum(0, keepdim=True) if like.shape[0] == 1 and grad.shape[0] != 1 else grad
