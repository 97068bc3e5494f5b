"""The public operator: checks types and calls the registered op, which checks all else."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from sefi_fast.ops.torch_library import forward_op
from sefi_fast.ops.validation import check_options, check_types


class CrossAttentionOutput(NamedTuple):
    """What `fused_cross_attention` returns.

    Attributes:
        output: [B, H, N, D] in the query's dtype, a view of a contiguous [B, N, H, D].
        subject_loss: [B] float32, equation 5 of docs/method.md; zeros without a reference key.
        attn_probs: [B, T, N], or [B, H, T, N] with probs_heads="all", float32; T = 0 without
            probs_positions.
    """

    output: Tensor
    subject_loss: Tensor
    attn_probs: Tensor


def fused_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    reference_key: Tensor | None = None,
    token_weights: Tensor | None = None,
    key_mask: Tensor | None = None,
    probs_positions: Tensor | None = None,
    probs_heads: Literal["mean", "all"] = "mean",
    scale: float | None = None,
    reference_grad: bool = False,
    backend: str | None = None,
) -> CrossAttentionOutput:
    """Cross-attention with separate keys and values, its distance to a reference, and columns.

    Equations 4 and 5 of docs/method.md; gradients are equations 7 to 11. No map [N, M] is stored,
    forward or backward, except by the "eager" backend. Every output is differentiable, once.
    Inside the transforms of torch.func the "eager" backend runs, which they differentiate freely.

    Args:
        query: [B, H, N, D] float32, float16 or bfloat16 (float64: eager only), D up to 256; any
            strides with a dense last axis, so a view of [B, N, H·D] costs no copy. Under autocast
            the first four tensors are cast to its dtype, float64 excepted.
        key, value, reference_key: [B or 1, H, M, D] like the query, M from 1 to 256.
        token_weights: float32 [B or 1, M], w of equation 5, ones by default; not differentiable.
        key_mask: bool [B or 1, M], True where a key may be attended to; holds for both maps.
            A query that may attend to nothing gives zeros and zero gradients.
        probs_positions: int64 [B or 1, T], keys whose probabilities are returned; a negative entry
            gives a map of zeros, and so does one that is too large on a CUDA device.
        probs_heads: "mean" over heads, or "all".
        scale: factor of the scores; default D ** -0.5.
        reference_grad: let gradients run through the reference map into query and reference_key.
        backend: "triton", "cuda", "cpu" or "eager"; default: the fastest that takes the input.

    Raises:
        TypeError: an argument of another type or dtype than above, or tensors of several dtypes.
        ValueError: shapes, devices, strides, storage or options that do not fit; on the CPU, a
            column that there is not.
        BackendError: the backend asked for is unknown or cannot take the input.
    """
    check_types(query, key, value, reference_key, token_weights, key_mask, probs_positions)
    if scale is not None or probs_heads != "mean":
        check_options(probs_heads, scale)
    output, subject_loss, attn_probs = forward_op(
        query,
        key,
        value,
        reference_key,
        token_weights,
        key_mask,
        probs_positions,
        probs_heads == "all",
        None if scale is None else float(scale),
        reference_grad,
        backend,
    )
    return CrossAttentionOutput(output, subject_loss, attn_probs)
