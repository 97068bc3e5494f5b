"""Calls of the native modules: tensors as addresses and strides, and results laid out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sefi_fast.ops.inputs import (
    KERNEL_DTYPES,
    AttentionInputs,
    InputGrads,
    Options,
    OutputGrads,
    Outputs,
    empty_result,
)

View = tuple[int, int, int, int, int]
"""Address, batch size, and the strides of batch, head and row."""
Rows = tuple[int, int, int]
"""Address and shape of a dense [B or 1, L]."""
InputArguments = tuple[tuple[int, ...], int, float, list[View], list[Rows], bool]
ForwardArguments = tuple[tuple[int, ...], int, float, list[View], list[Rows], bool, View, int, int]
BackwardArguments = tuple[
    tuple[int, ...], int, float, list[View], list[Rows], bool, View, int, int, bool, list[View]
]

_CODES = {dtype: code for code, dtype in enumerate(KERNEL_DTYPES)}
_ABSENT_VIEW = (0, 0, 0, 0, 0)
_ABSENT_ROWS = (0, 0, 0)


class ForwardCall(NamedTuple):
    """A forward call; where `arguments` is None the results are complete already."""

    results: Outputs
    arguments: ForwardArguments | None
    keep_alive: Sequence[Tensor]
    """Copies whose addresses are among the arguments."""


class BackwardCall(NamedTuple):
    """A backward call; where `arguments` is None the results are complete already."""

    results: InputGrads
    arguments: BackwardArguments | None
    keep_alive: Sequence[Tensor]


def forward_call(inputs: AttentionInputs, options: Options) -> ForwardCall:
    """Lay out the results of validated inputs, and the arguments of the native call."""
    query = inputs.query
    output = empty_result(query)
    subject_loss = query.new_empty(query.shape[0], dtype=torch.float32)
    probs_shape = inputs.probs_shape(options.probs_all_heads)
    attn_probs = query.new_empty(probs_shape, dtype=torch.float32)
    if query.numel() == 0:
        return ForwardCall((output, subject_loss.zero_(), attn_probs.zero_()), None, ())
    keep_alive: list[Tensor] = []
    arguments = (
        *_input_arguments(inputs, options, keep_alive),
        _view(output, keep_alive),
        subject_loss.data_ptr(),
        attn_probs.data_ptr(),
    )
    return ForwardCall((output, subject_loss, attn_probs), arguments, keep_alive)


def backward_call(grads: OutputGrads, inputs: AttentionInputs, options: Options) -> BackwardCall:
    """Lay out the gradients that `options` needs, and the arguments of the native call."""
    query, needs = inputs.query, options.needs
    grad_output = grads.output
    not_empty = query.numel() > 0
    # The softmax over a single key is constant: nothing reaches its score, not even rounding.
    scores = not_empty and inputs.key.shape[2] > 1
    through_reference = options.reference_grad and grads.subject_loss is not None
    reached = (scores, scores, not_empty and grad_output is not None, scores and through_reference)
    results: list[Tensor | None] = [None, None, None, None]
    written: list[View] = [_ABSENT_VIEW] * 4
    keep_alive: list[Tensor] = []
    for place, tensor in enumerate(inputs[:4]):
        if tensor is None or not needs[place]:
            continue
        results[place] = grad = empty_result(tensor)
        if reached[place]:
            written[place] = _view(grad, keep_alive)
        else:
            grad.zero_()
    input_grads = (results[0], results[1], results[2], results[3])
    if written.count(_ABSENT_VIEW) == 4:
        return BackwardCall(input_grads, None, ())
    if grad_output is not None and grad_output.dtype != query.dtype:
        grad_output = grad_output.to(query.dtype)
        keep_alive.append(grad_output)
    arguments = (
        *_input_arguments(inputs, options, keep_alive),
        _view(grad_output, keep_alive),
        _address(grads.subject_loss, keep_alive, torch.float32),
        _address(grads.attn_probs, keep_alive, torch.float32),
        options.reference_grad,
        written,
    )
    return BackwardCall(input_grads, arguments, keep_alive)


def _input_arguments(
    inputs: AttentionInputs, options: Options, keep_alive: list[Tensor]
) -> InputArguments:
    """Return the inputs in layouts that a native module reads."""
    # Spelled out: loops over the tensors take longer.
    query, key, value, reference_key, token_weights, key_mask, probs_positions = inputs
    batch, heads, seqlen_q, head_dim = query.shape
    return (
        (batch, heads, seqlen_q, key.shape[2], head_dim),
        _CODES[query.dtype],
        options.scale,
        [
            _view(query, keep_alive),
            _view(key, keep_alive),
            _view(value, keep_alive),
            _view(reference_key, keep_alive),
        ],
        [
            _rows(token_weights, keep_alive),
            _rows(key_mask, keep_alive),
            _rows(probs_positions, keep_alive),
        ],
        options.probs_all_heads,
    )


def _view(tensor: Tensor | None, keep_alive: list[Tensor]) -> View:
    """Return address and strides of a tensor, or of a copy where its last axis is not dense.

    The copy is appended to `keep_alive`, which must live as long as the address is used.
    """
    if tensor is None:
        return _ABSENT_VIEW
    batch, head, row, last = tensor.stride()
    if last != 1 and tensor.shape[3] > 1:
        tensor = tensor.contiguous()
        keep_alive.append(tensor)
        batch, head, row, _ = tensor.stride()
    return (tensor.data_ptr(), tensor.shape[0], batch, head, row)


def _rows(tensor: Tensor | None, keep_alive: list[Tensor]) -> Rows:
    if tensor is None:
        return _ABSENT_ROWS
    return (_address(tensor, keep_alive), *tensor.shape)


def _address(
    tensor: Tensor | None, keep_alive: list[Tensor], dtype: torch.dtype | None = None
) -> int:
    """Return the address of a tensor or of a dense copy: gradients of sums come expanded."""
    if tensor is None:
        return 0
    dense = (tensor if dtype is None or tensor.dtype == dtype else tensor.to(dtype)).contiguous()
    if dense is not tensor:
        keep_alive.append(dense)
    return dense.data_ptr()
