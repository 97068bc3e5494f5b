"""The C++ backend: hands addresses and strides of CPU tensors to the native core sefi_fast._C."""

from __future__ import annotations

import torch
from torch import Tensor

from sefi_fast.ops import native_call

try:
    from sefi_fast import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _missing = str(error)


def instruction_set() -> str | None:
    """Name of the instruction set the native core uses here; None where it was not built."""
    return None if _C is None else _C.instruction_set()


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor | None,
    probs_positions: Tensor | None,
) -> str | None:
    """Why the native core cannot take these tensors, or None where it can."""
    if _C is None:
        return (
            f"the native core sefi_fast._C is not there ({_missing}): install a C++17 compiler and "
            "reinstall sefi_fast to have it"
        )
    if not query.is_cpu:
        return f"it works on CPU tensors, these are on {query.device}"
    return native_call.why_not(query)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 4 and 5 of docs/method.md in one pass over the query rows."""
    call = native_call.forward_call(
        query, key, value, reference_key, token_weights, key_mask, probs_positions,
        probs_all_heads=probs_all_heads, scale=scale,
    )  # fmt: skip
    if call.arguments is not None:
        _C.forward(*call.arguments, torch.get_num_threads())
    return call.results


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
) -> native_call.Gradients:
    """Equations 7 to 11 of docs/method.md; the probabilities are computed again, not stored.

    Args:
        needs: whether the gradients of query, key, value and reference_key are wanted.

    Returns:
        Those gradients, None where not wanted; each has its input's shape and dtype.
    """
    call = native_call.backward_call(
        grad_output, grad_subject_loss, grad_attn_probs,
        query, key, value, reference_key, token_weights, key_mask, probs_positions,
        probs_all_heads=probs_all_heads, scale=scale, reference_grad=reference_grad, needs=needs,
    )  # fmt: skip
    if call.arguments is not None:
        _C.backward(*call.arguments, torch.get_num_threads())
    return call.results
