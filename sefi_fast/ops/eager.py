"""The fused cross-attention written plainly in PyTorch: the meaning of every other backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor | None,
    probs_positions: Tensor | None,
) -> str | None:
    """None: the plain path takes every input."""
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor | None,
    token_weights: Tensor | None,
    key_mask: Tensor | None,
    probs_positions: Tensor | None,
    *,
    probs_all_heads: bool,
    scale: float,
    reference_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 4 and 5 of docs/method.md with whole maps in memory; autograd can differentiate it.

    Args:
        reference_grad: False detaches the reference map, as the operator's own default does.

    Returns:
        output [B, H, N, D] in the query's dtype, a view of a contiguous [B, N, H, D]; the loss [B]
        and maps [B, (H,) T, N] in float32 (float64 for float64 inputs).
    """
    batch, heads, queries, _ = query.shape
    key, value, reference_key = _shown(key_mask, key, value, reference_key)
    target = _probabilities(query, key, key_mask, scale)
    output = target.to(query.dtype) @ value
    output = output.transpose(1, 2).contiguous().transpose(1, 2)

    if reference_key is None:
        subject_loss = target.new_zeros(batch)
    else:
        reference = _probabilities(query, reference_key, key_mask, scale)
        squares = (target - (reference if reference_grad else reference.detach())).square()
        if token_weights is not None:
            squares = squares * token_weights[:, None, None, :]
        subject_loss = squares.sum((1, 2, 3)) / max(heads, 1)

    if probs_positions is None:
        shape = (batch, heads, 0, queries) if probs_all_heads else (batch, 0, queries)
        return output, subject_loss, target.new_zeros(shape)
    columns, inside = _columns(probs_positions, target)
    attn_probs = (target.gather(3, columns) * inside).transpose(2, 3)
    if not probs_all_heads:
        attn_probs = attn_probs.sum(1) / max(heads, 1)
    return output, subject_loss, attn_probs.contiguous()


def backward(
    grad_output: Tensor | None,
    grad_subject_loss: Tensor | None,
    grad_attn_probs: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor | None,
    token_weights: Tensor | None,
    key_mask: Tensor | None,
    probs_positions: Tensor | None,
    *,
    probs_all_heads: bool,
    scale: float,
    reference_grad: bool,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Equations 7 to 11 of docs/method.md, in closed form.

    Args:
        needs: whether the gradients of query, key, value and reference_key are wanted.

    Returns:
        Those gradients, None where not wanted, each with its input's shape and dtype and laid out
        as a view of a contiguous [.., length, H, D].
    """
    dtype = query.dtype
    heads = max(query.shape[1], 1)
    like = (key, value, reference_key)
    key, value, reference_key = _shown(key_mask, key, value, reference_key)
    target = _probabilities(query, key, key_mask, scale)
    grad_target = torch.zeros_like(target)
    if grad_output is not None:
        grad_target += grad_output @ value.transpose(2, 3)
    reference_scores = None
    if grad_subject_loss is not None and reference_key is not None:
        reference = _probabilities(query, reference_key, key_mask, scale)
        pull = (target - reference) * (grad_subject_loss * (2.0 / heads))[:, None, None, None]
        if token_weights is not None:
            pull = pull * token_weights[:, None, None, :]
        grad_target += pull
        if reference_grad:
            reference_scores = _softmax_backward(reference, -pull).to(dtype)
    if grad_attn_probs is not None and probs_positions is not None:
        columns, inside = _columns(probs_positions, target)
        shares = grad_attn_probs if probs_all_heads else grad_attn_probs[:, None] / heads
        column_grad = shares.transpose(2, 3).to(target.dtype) * inside
        grad_target.scatter_add_(3, columns, column_grad.expand(columns.shape))
    scores = _softmax_backward(target, grad_target).to(dtype)

    grads: list[Tensor | None] = [None, None, None, None]
    if needs[0]:
        grad_query = scores @ key
        if reference_scores is not None and reference_key is not None:
            grad_query = grad_query + reference_scores @ reference_key
        grads[0] = grad_query * scale
    if needs[1]:
        grads[1] = _fold((scores.transpose(2, 3) @ query) * scale, like[0])
    if needs[2]:
        if grad_output is None:
            grads[2] = torch.zeros_like(like[1])
        else:
            grads[2] = _fold(target.to(dtype).transpose(2, 3) @ grad_output, like[1])
    if needs[3] and like[2] is not None:
        if reference_scores is None:
            grads[3] = torch.zeros_like(like[2])
        else:
            folded = (reference_scores.transpose(2, 3) @ query) * scale
            grads[3] = _fold(folded, like[2])
    laid_out = [
        None if g is None else g.transpose(1, 2).contiguous().transpose(1, 2) for g in grads
    ]
    return laid_out[0], laid_out[1], laid_out[2], laid_out[3]


def _shown(
    key_mask: Tensor | None, key: Tensor, value: Tensor, reference_key: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The three with zeros in hidden rows: what stands there, be it NaN, has no say."""
    if key_mask is None:
        return key, value, reference_key
    shown = key_mask[:, None, :, None]
    zero = key.new_zeros(())
    rest = None if reference_key is None else torch.where(shown, reference_key, zero)
    return torch.where(shown, key, zero), torch.where(shown, value, zero), rest


def _probabilities(query: Tensor, key: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """softmax(Q Kᵀ · scale), [B, H, N, M] float32 or float64; rows without any key are zero."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
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
    """Gather indices [B, H, N, T] of the wanted columns, and which of them are columns at all."""
    batch, heads, queries, keys = probabilities.shape
    inside = (probs_positions >= 0) & (probs_positions < keys)
    columns = probs_positions.clamp(0, keys - 1)[:, None, None, :].expand(batch, heads, queries, -1)
    return columns, inside[:, None, None, :]


def _softmax_backward(probabilities: Tensor, grad: Tensor) -> Tensor:
    """Equation 8: dS = A ∘ (dA − rowsum(A ∘ dA))."""
    total = (probabilities * grad).sum(-1, keepdim=True)
    return probabilities * (grad - total)


def _fold(grad: Tensor, like: Tensor) -> Tensor:
    """Sum over the batch where the input was broadcast over it."""
    return grad.sum(0, keepdim=True) if like.shape[0] == 1 and grad.shape[0] != 1 else grad
