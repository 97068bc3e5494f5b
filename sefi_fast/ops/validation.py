"""Checks of the operator's arguments: the front's of types, the registered ops' of all else.

Values are never read. What the kernels rely on is checked here and nowhere else in Python.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul
from typing import Any

import torch
from torch import Tensor

MAX_KEYS = 256
MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_NAMES = ("query", "key", "value", "reference_key", "token_weights", "key_mask", "probs_positions")
_ALL = ("grad_output", "grad_subject_loss", "grad_attn_probs", *_NAMES)
_WANTED = (
    "tensor [B, H, N, D]",
    *("tensor [B or 1, H, M, D]",) * 3,
    "torch.float32 tensor",
    "torch.bool tensor",
    "torch.int64 tensor",
)
_OPTIONAL = (Tensor, type(None))


def check_types(*tensors: Any) -> None:
    """Raise TypeError unless the first three are tensors, and the other four tensors or None."""
    for place, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor if place < 3 else _OPTIONAL):
            raise TypeError(f"{_NAMES[place]} is {_kind(tensor)}: give a {_WANTED[place]}")


def check_options(probs_heads: str, scale: float | None) -> None:
    """Raise ValueError or TypeError unless probs_heads is "mean" or "all" and scale is a number."""
    if probs_heads != "mean" and probs_heads != "all":
        raise ValueError(f"probs_heads is {probs_heads!r}: give 'mean' or 'all'")
    # A tensor would have to be read, which waits for a CUDA device.
    if isinstance(scale, (Tensor, str)):
        raise TypeError(f"scale is {_kind(scale)}: give a number")


def refuse_layouts(*tensors: Tensor | None) -> None:
    """Raise ValueError where one of these last arguments in `_ALL` is sparse or nested."""
    for name, tensor in zip(_ALL[-len(tensors) :], tensors, strict=True):
        if tensor is not None and (tensor.is_nested or tensor.layout is not torch.strided):
            layout = "nested" if tensor.is_nested else tensor.layout
            raise ValueError(
                f"{name} is {layout}. The operator takes strided tensors. Give a dense one."
            )


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor | None,
    token_weights: Tensor | None,
    key_mask: Tensor | None,
    probs_positions: Tensor | None,
    scale: float | None,
    *,
    stored: bool,
) -> None:
    """Check everything that a backend relies on.

    Args:
        stored: whether the tensors have memory, unlike those that only stand for a shape.

    Raises:
        TypeError: no tensor, a dtype the operator does not take, or several dtypes.
        ValueError: shapes, devices, strides, layouts or a scale that do not fit, token weights
            that require a gradient, or storage smaller than its tensor.
    """
    if query is None or key is None or value is None:
        check_types(query, key, value)
    dtype, device = query.dtype, query.device
    if dtype not in _DTYPES:
        raise TypeError(f"query is {dtype}: give float32, float16 or bfloat16")
    shape = query.shape
    if len(shape) != 4:
        raise ValueError(f"query has shape {tuple(shape)}: give [B, H, N, D]")
    batch, heads, _, head_dim = shape
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"the head width D is {head_dim}: it may be 1 to {MAX_HEAD_DIM}")
    _check_rows("query", query, shape, stored)

    keys = key.shape[2] if key.dim() == 4 else 0
    wanted, shared = (batch, heads, keys, head_dim), (1, heads, keys, head_dim)
    for name, tensor in (("key", key), ("value", value), ("reference_key", reference_key)):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype} but query is {dtype}: give both alike")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} but query is on {device}: move one")
        other = tensor.shape
        if other != wanted and other != shared:
            raise ValueError(
                f"{name} has shape {tuple(other)}: with query {tuple(shape)} "
                f"{'' if name == 'key' else f'and {keys} keys '}give "
                f"[{_batches(batch)}, {heads}, {'M' if name == 'key' else keys}, {head_dim}]"
            )
        _check_rows(name, tensor, other, stored)
    if not 1 <= keys <= MAX_KEYS:
        raise ValueError(f"there are {keys} keys: the operator takes 1 to {MAX_KEYS}")

    if token_weights is not None:
        _check_extra("token_weights", token_weights, torch.float32, query, keys, stored)
        if token_weights.requires_grad:
            raise ValueError(
                "token_weights requires a gradient, but the operator has none for it: detach it"
            )
    if key_mask is not None:
        _check_extra("key_mask", key_mask, torch.bool, query, keys, stored)
    if probs_positions is not None:
        _check_extra("probs_positions", probs_positions, torch.int64, query, None, stored)
    # Comparisons, unlike math.isfinite, can be traced where the scale is a symbol.
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"scale is {scale}: give a finite number")


def check_gradients(
    grad_output: Tensor | None,
    grad_subject_loss: Tensor | None,
    grad_attn_probs: Tensor | None,
    query: Tensor,
    reference_key: Tensor | None,
    probs_positions: Tensor | None,
    probs_all_heads: bool,
    needs: Sequence[bool],
    *,
    stored: bool,
    from_autograd: bool = False,
) -> None:
    """Check the backward's own arguments; the others have passed `check_inputs`.

    Args:
        from_autograd: autograd made the gradients, so they are tensors like the outputs. It does
            not see that `.data` of an input was set to another shape.

    Raises:
        TypeError: a gradient in another dtype than its output.
        ValueError: a shape, device or layout that is not its output's, storage smaller than its
            tensor, or `needs` that do not fit the inputs.
    """
    shape = query.shape
    batch, heads, queries, _ = shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    columns = 0 if probs_positions is None else probs_positions.shape[1]
    maps = (batch, heads, columns, queries) if probs_all_heads else (batch, columns, queries)
    for name, tensor, wanted in (
        ("grad_output", grad_output, shape),
        ("grad_subject_loss", grad_subject_loss, (batch,)),
        ("grad_attn_probs", grad_attn_probs, maps),
    ):
        if tensor is None:
            continue
        if not from_autograd:
            _check_kind(name, tensor, query.dtype if name == "grad_output" else wide, query)
        if tensor.shape != wanted:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: give {list(wanted)}")
        if stored and not from_autograd:
            _check_storage(name, tensor)
    if len(needs) != 4:
        raise ValueError(f"needs has {len(needs)} entries: give 4")
    if needs[3] and reference_key is None:
        raise ValueError("needs asks for the gradient of a reference_key that is None: give one")


def _check_rows(name: str, tensor: Tensor, shape: Sequence[int], stored: bool) -> None:
    """Check the strides of [B, H, L, D], and that the storage reaches to its end."""
    batch, heads, length, width = shape
    of_batch, of_head, of_row, of_column = tensor.stride()
    if of_column != 1 and width > 1:
        raise ValueError(
            f"{name} {tuple(shape)} has stride {of_column} along its last axis: that "
            "axis must be dense, any view of [B, L, H * D] is; call .contiguous() on it"
        )
    if stored:
        last = (batch - 1) * of_batch + (heads - 1) * of_head + (length - 1) * of_row + width - 1
        end = (tensor.storage_offset() + last + 1) * tensor.itemsize
        if end > tensor.untyped_storage().nbytes():
            _refuse_storage(name, tensor, end)


def _check_storage(name: str, tensor: Tensor) -> None:
    """Check that the storage of a tensor of any shape reaches to its end."""
    strides = tensor.stride()
    last = sum(map(mul, tensor.shape, strides)) - sum(strides)
    end = (tensor.storage_offset() + last + 1) * tensor.itemsize
    if end > tensor.untyped_storage().nbytes():
        _refuse_storage(name, tensor, end)


def _check_extra(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    query: Tensor,
    length: int | None,
    stored: bool,
) -> None:
    _check_kind(name, tensor, dtype, query)
    shape, batch = tensor.shape, query.shape[0]
    if (
        len(shape) != 2
        or (shape[0] != batch and shape[0] != 1)
        or (length is not None and shape[1] != length)
    ):
        raise ValueError(
            f"{name} has shape {tuple(shape)}: give "
            f"[{_batches(batch)}, {'T' if length is None else length}]"
        )
    if stored:
        _check_storage(name, tensor)


def _check_kind(name: str, tensor: Tensor, dtype: torch.dtype, query: Tensor) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}: give {dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device} but query is on {query.device}: move one")


def _refuse_storage(name: str, tensor: Tensor, end: int | torch.SymInt) -> None:
    # Of an empty tensor the end means nothing.
    if tensor.numel():
        raise ValueError(
            f"The storage of {name} has {tensor.untyped_storage().nbytes()} bytes. Its shape and "
            f"strides need {end}. Resize the storage back before the call."
        )


def _batches(batch: int) -> str:
    return "1" if batch == 1 else f"{batch} or 1"


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
