"""What the native modules take and give: tensors as addresses and strides, results laid out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MAX_KEYS = 256
MAX_HEAD_DIM = 256
_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ABSENT_VIEW = (0, 0, 0, 0, 0)
_ABSENT_ROWS = (0, 0, 0)

View = tuple[int, int, int, int, int]
Rows = tuple[int, int, int]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def why_not(query: Tensor, key: Tensor) -> str | None:
    """Why no native module takes a dtype, head width or number of keys, or None."""
    if query.dtype not in _CODES:
        return f"it takes float32, float16 and bfloat16, not {query.dtype}"
    if not 1 <= query.shape[-1] <= MAX_HEAD_DIM:
        return f"it takes head widths 1 to {MAX_HEAD_DIM}, not {query.shape[-1]}"
    if not 1 <= key.shape[2] <= MAX_KEYS:
        return f"it takes 1 to {MAX_KEYS} keys, not {key.shape[2]}"
    return None


class Inputs:
    """The operator's inputs in layouts a native module reads; keeps copies it made alive."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        reference_key: Tensor | None,
        token_weights: Tensor | None,
        key_mask: Tensor | None,
        map_tokens: Tensor | None,
    ) -> None:
        self.tensors = [
            None if tensor is None else _dense_rows(tensor)
            for tensor in (query, key, value, reference_key)
        ]
        self.rows = [
            None if tensor is None else tensor.contiguous()
            for tensor in (token_weights, key_mask, map_tokens)
        ]
        self.sizes = (*query.shape[:3], key.shape[2], query.shape[3])
        self.code = _CODES[query.dtype]

    def arguments(
        self, scale: float, map_all_heads: bool
    ) -> tuple[tuple[int, ...], int, float, list[View], list[Rows], bool]:
        return (
            self.sizes,
            self.code,
            scale,
            [_view(tensor) for tensor in self.tensors],
            [_ABSENT_ROWS if t is None else (t.data_ptr(), *t.shape) for t in self.rows],
            map_all_heads,
        )


ForwardArguments = tuple[tuple[int, ...], int, float, list[View], list[Rows], bool, View, int, int]
BackwardArguments = tuple[
    tuple[int, ...], int, float, list[View], list[Rows], bool, View, int, int, bool, list[View]
]


class ForwardCall(NamedTuple):
    """A forward call laid out; where `arguments` is None the results are there already."""

    results: tuple[Tensor, Tensor, Tensor]
    """Output, alignment and maps, to be written."""
    arguments: ForwardArguments | None
    held: tuple[object, ...]
    """What the addresses among the arguments point into."""


class BackwardCall(NamedTuple):
    """A backward call laid out; where `arguments` is None the results are there already."""

    results: Gradients
    """Gradients of query, key, value and reference key, to be written or zero already."""
    arguments: BackwardArguments | None
    held: tuple[object, ...]


def forward_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor | None,
    token_weights: Tensor | None,
    key_mask: Tensor | None,
    map_tokens: Tensor | None,
    *,
    map_all_heads: bool,
    scale: float,
) -> ForwardCall:
    """Lay out validated inputs and results."""
    batch, heads, queries, _ = query.shape
    columns = 0 if map_tokens is None else map_tokens.shape[1]
    output = _like(query)
    alignment = query.new_empty(batch, dtype=torch.float32)
    shape = (batch, heads, columns, queries) if map_all_heads else (batch, columns, queries)
    maps = query.new_empty(shape, dtype=torch.float32)
    if query.numel() == 0:
        return ForwardCall((output, alignment.zero_(), maps.zero_()), None, ())
    inputs = Inputs(query, key, value, reference_key, token_weights, key_mask, map_tokens)
    arguments = (
        *inputs.arguments(scale, map_all_heads),
        _view(output),
        alignment.data_ptr(),
        maps.data_ptr(),
    )
    return ForwardCall((output, alignment, maps), arguments, (inputs,))


def backward_call(
    grad_output: Tensor | None,
    grad_alignment: Tensor | None,
    grad_maps: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor | None,
    token_weights: Tensor | None,
    key_mask: Tensor | None,
    map_tokens: Tensor | None,
    *,
    map_all_heads: bool,
    scale: float,
    reference_grad: bool,
    needs: tuple[bool, bool, bool, bool],
) -> BackwardCall:
    """Lay out validated inputs, gradients of the outputs and those that `needs` asks for."""
    through_reference = reference_grad and reference_key is not None and grad_alignment is not None
    tensors = (query, key, value, reference_key)
    grads = [
        _like(tensor) if need and tensor is not None else None
        for tensor, need in zip(tensors, needs, strict=True)
    ]
    if query.numel() == 0:
        return BackwardCall(
            _four([grad if grad is None else grad.zero_() for grad in grads]), None, ()
        )
    written = list(grads)
    # The softmax over a single key is constant: nothing reaches its score, not even rounding.
    scores = key.shape[2] > 1
    reached = (scores, scores, grad_output is not None, scores and through_reference)
    for place, grad in enumerate(grads):
        if grad is not None and not reached[place]:
            grad.zero_()
            written[place] = None
    if all(grad is None for grad in written):
        return BackwardCall(_four(grads), None, ())
    inputs = Inputs(query, key, value, reference_key, token_weights, key_mask, map_tokens)
    if grad_output is not None:
        grad_output = _dense_rows(grad_output.to(query.dtype))
    # Gradients of sums come expanded, one number for all entries.
    if grad_alignment is not None:
        grad_alignment = grad_alignment.to(torch.float32).contiguous()
    if grad_maps is not None:
        grad_maps = grad_maps.to(torch.float32).contiguous()
    arguments = (
        *inputs.arguments(scale, map_all_heads),
        _view(grad_output),
        _address(grad_alignment),
        _address(grad_maps),
        reference_grad,
        [_view(grad) for grad in written],
    )
    held = (inputs, grad_output, grad_alignment, grad_maps)
    return BackwardCall(_four(grads), arguments, held)


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _like(tensor: Tensor) -> Tensor:
    """Uninitialised [B, H, L, D] as a view of a contiguous [B, L, H, D]."""
    batch, heads, length, width = tensor.shape
    return tensor.new_empty(batch, length, heads, width).transpose(1, 2)


def _view(tensor: Tensor | None) -> View:
    if tensor is None:
        return _ABSENT_VIEW
    batch, head, row, _ = tensor.stride()
    return (tensor.data_ptr(), tensor.shape[0], batch, head, row)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _four(grads: list[Tensor | None]) -> Gradients:
    return grads[0], grads[1], grads[2], grads[3]
