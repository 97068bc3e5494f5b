"""The public operator: checks types and calls the registered op, which checks the rest."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from sefi_fast.ops.inputs import check_options, check_types
from sefi_fast.ops.torch_library import forward_op


class CrossAttentionOutput(NamedTuple):
    """Outputs of `fused_cross_attention`, all on the query's device.

    Attributes:
        output: [B, H, N, D] in the query's dtype, a view of a contiguous [B, N, H, D]. So
            `output.transpose(1, 2).flatten(2)` costs no copy.
        subject_loss: [B] float32 (float64 for float64 inputs), equation 5 of docs/method.md; zeros
            without a reference key.
        attn_probs: [B, T, N], or [B, H, T, N] with probs_heads="all", float32 (float64 for float64
            inputs); T = 0 without probs_positions.
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
    """Compute cross-attention, its squared distance to a reference, and chosen probabilities.

    The equations are those of docs/method.md: 4 and 5 forward, 7 to 11 backward.

    Every output is differentiable once with respect to query, key, value and, with
    `reference_grad`, reference_key. Inside the transforms of torch.func the "eager" backend runs,
    which they can differentiate repeatedly.

    Memory: no attention map [N, M] is stored, forward or backward, except by the "eager" backend;
    autograd saves the inputs alone. Determinism: on one device the same inputs give the same bits,
    with every backend but "eager", which is as deterministic as PyTorch's own operations.

    Args:
        query: [B, H, N, D] float32, float16 or bfloat16 (float64: "eager" only), D from 1 to 256,
            on any device. The last axis must be dense; a view of [B, N, H·D] costs no copy. Under
            autocast the first four tensors are cast to its dtype, except float64.
        key: [B or 1, H, M, D] in the query's dtype and on its device, M from 1 to 256.
        value: [B or 1, H, M, D] like the key.
        reference_key: [B or 1, H, M, D] like the key; its map is the target of the subject loss.
        token_weights: [B or 1, M] float32, w of equation 5, ones by default; not differentiable.
        key_mask: [B or 1, M] bool, True where a key may be attended to, in both maps. A query
            without any such key gives zeros and zero gradients.
        probs_positions: [B or 1, T] int64, the keys whose probabilities are returned. A negative
            entry gives zeros, and so does one that is too large on a CUDA device.
        probs_heads: "mean" over heads, or "all".
        scale: factor of the scores; default D ** -0.5.
        reference_grad: whether gradients flow through the reference map into query and
            reference_key.
        backend: "triton", "cuda", "cpu" or "eager"; default: the fastest that takes the inputs.

    Raises:
        TypeError: an argument of another type or dtype than above, or tensors of several dtypes.
        ValueError: shapes, devices, strides, storage or options that do not fit, or a position past
            the last key on the CPU.
        BackendError: `backend` is unknown or cannot take the inputs.

    Example:
        >>> import torch
        >>> from sefi_fast import fused_cross_attention
        >>> query = torch.randn(2, 8, 64, 40, requires_grad=True)
        >>> key, value, reference_key = torch.randn(3, 2, 8, 77, 40)
        >>> result = fused_cross_attention(
        ...     query, key, value,
        ...     reference_key=reference_key, probs_positions=torch.tensor([[5, 6]]),
        ... )
        >>> (result.output.square().mean() + result.subject_loss.mean()).backward()
        >>> result.output.shape, result.subject_loss.shape, result.attn_probs.shape
        (torch.Size([2, 8, 64, 40]), torch.Size([2]), torch.Size([2, 2, 64]))
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
