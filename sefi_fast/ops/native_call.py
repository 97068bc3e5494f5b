"""What the native modules take and give: tensors as addresses and strides, results laid out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ABSENT_VIEW = (0, 0, 0, 0, 0)
_ABSENT_ROWS = (0, 0, 0)

View = tuple[int, int, int, int, int]
Rows = tuple[int, int, int]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def why_not(query: Tensor) -> str | None:
    """Why no native module takes the query's dtype, or None."""
    if query.dtype not in _CODES:
        return f"it takes float32, float16 and bfloat16, not {query.dtype}"
    return None


InputArguments = tuple[tuple[int, ...], int, float, list[View], list[Rows], bool]
ForwardArguments = tuple[tuple[int, ...], int, float, list[View], list[Rows], bool, View, int, int]
BackwardArguments = tuple[
    tuple[int, ...], int, float, list[View], list[Rows], bool, View, int, int, bool, list[View]
]


class ForwardCall(NamedTuple):
    """A forward call laid out; where `arguments` is None the results are there already."""

    results: tuple[Tensor, Tensor, Tensor]
    """Output, subject loss and maps, to be written."""
    arguments: ForwardArguments | None
    held: Sequence[Tensor]
    """Copies that addresses among the arguments point into."""


class BackwardCall(NamedTuple):
    """A backward call laid out; where `arguments` is None the results are there already."""

    results: Gradients
    """Gradients of query, key, value and reference key, to be written or zero already."""
    arguments: BackwardArguments | None
    held: Sequence[Tensor]


def forward_call(
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
) -> ForwardCall:
    """Lay out validated inputs and results."""
    batch, heads, queries, _ = query.shape
    columns = 0 if probs_positions is None else probs_positions.shape[1]
    output, output_view = _like(query)
    subject_loss = query.new_empty(batch, dtype=torch.float32)
    shape = (batch, heads, columns, queries) if probs_all_heads else (batch, columns, queries)
    attn_probs = query.new_empty(shape, dtype=torch.float32)
    if query.numel() == 0:
        return ForwardCall((output, subject_loss.zero_(), attn_probs.zero_()), None, ())
    held: list[Tensor] = []
    arguments = (
        *_inputs(
            query, key, value, reference_key, token_weights, key_mask, probs_positions,
            probs_all_heads, scale, held,
        ),
        output_view,
        subject_loss.data_ptr(),
        attn_probs.data_ptr(),
    )  # fmt: skip
    return ForwardCall((output, subject_loss, attn_probs), arguments, held)


def backward_call(
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
) -> BackwardCall:
    """Lay out validated inputs, gradients of the outputs and those that `needs` asks for."""
    through_reference = (
        reference_grad and reference_key is not None and grad_subject_loss is not None
    )
    # The softmax over a single key is constant: nothing reaches its score, not even rounding.
    scores = key.shape[2] > 1
    empty = query.numel() == 0
    grads: list[Tensor | None] = []
    written: list[View] = []
    held: list[Tensor] = []
    for tensor, need, reached in (
        (query, needs[0], scores),
        (key, needs[1], scores),
        (value, needs[2], grad_output is not None),
        (reference_key, needs[3], scores and through_reference),
    ):
        if not need or tensor is None:
            grads.append(None)
            written.append(_ABSENT_VIEW)
            continue
        grad, view = _like(tensor)
        grads.append(grad)
        if reached and not empty:
            written.append(view)
        else:
            grad.zero_()
            written.append(_ABSENT_VIEW)
    results = (grads[0], grads[1], grads[2], grads[3])
    if written.count(_ABSENT_VIEW) == len(written):
        return BackwardCall(results, None, ())
    if grad_output is not None and grad_output.dtype != query.dtype:
        grad_output = grad_output.to(query.dtype)
        held.append(grad_output)
    arguments = (
        *_inputs(
            query, key, value, reference_key, token_weights, key_mask, probs_positions,
            probs_all_heads, scale, held,
        ),
        _view(grad_output, held),
        _address(grad_subject_loss, held, torch.float32),
        _address(grad_attn_probs, held, torch.float32),
        reference_grad,
        written,
    )  # fmt: skip
    return BackwardCall(results, arguments, held)


def _inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor | None,
    token_weights: Tensor | None,
    key_mask: Tensor | None,
    probs_positions: Tensor | None,
    probs_all_heads: bool,
    scale: float,
    held: list[Tensor],
) -> InputArguments:
    """The operator's inputs in layouts a native module reads."""
    batch, heads, queries, head_dim = query.shape
    return (
        (batch, heads, queries, key.shape[2], head_dim),
        _CODES[query.dtype],
        scale,
        [_view(query, held), _view(key, held), _view(value, held), _view(reference_key, held)],
        [_rows(token_weights, held), _rows(key_mask, held), _rows(probs_positions, held)],
        probs_all_heads,
    )


def _like(tensor: Tensor) -> tuple[Tensor, View]:
    """Uninitialised [B, H, L, D] as a view of a contiguous [B, L, H, D], and its `_view`."""
    batch, heads, length, width = tensor.shape
    row = heads * width
    step = length * row
    made = tensor.new_empty_strided((batch, heads, length, width), (step, width, row, 1))
    return made, (made.data_ptr(), batch, step, width, row)


def _view(tensor: Tensor | None, held: list[Tensor]) -> View:
    """Address and strides of a tensor, or of a copy with a dense last axis where it has none.

    Copies go into `held`, which must live as long as their addresses are used.
    """
    if tensor is None:
        return _ABSENT_VIEW
    batch, head, row, last = tensor.stride()
    if last != 1 and tensor.shape[3] > 1:
        tensor = tensor.contiguous()
        held.append(tensor)
        batch, head, row, _ = tensor.stride()
    return (tensor.data_ptr(), tensor.shape[0], batch, head, row)


def _rows(tensor: Tensor | None, held: list[Tensor]) -> Rows:
    if tensor is None:
        return _ABSENT_ROWS
    return (_address(tensor, held), *tensor.shape)


def _address(tensor: Tensor | None, held: list[Tensor], dtype: torch.dtype | None = None) -> int:
    """Of a dense tensor. Gradients of sums come expanded, one number for all entries."""
    if tensor is None:
        return 0
    dense = (tensor if dtype is None or tensor.dtype == dtype else tensor.to(dtype)).contiguous()
    if dense is not tensor:
        held.append(dense)
    return dense.data_ptr()
