"""The operator's tensors, gradients and options, and the checks of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul
from typing import Any, NamedTuple

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


def dtype_not_supported_reason(inputs: AttentionInputs) -> str | None:
    """Say why no compiled backend takes the inputs' dtype; None where they do."""
    if inputs.query.dtype not in KERNEL_DTYPES:
        return f"the dtype is {inputs.query.dtype}, and it takes float32, float16 and bfloat16"
    return None


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


_DTYPES = (*KERNEL_DTYPES, torch.float64)
_WANTED = {
    "query": "tensor [B, H, N, D]",
    **dict.fromkeys(("key", "value", "reference_key"), "tensor [B or 1, H, M, D]"),
    "token_weights": "torch.float32 tensor",
    "key_mask": "torch.bool tensor",
    "probs_positions": "torch.int64 tensor",
}
_NAMES = (*(f"grad_{name}" for name in OutputGrads._fields), *AttentionInputs._fields)


def check_types(*tensors: Any) -> None:
    """Raise TypeError unless the first three are tensors, and the other four tensors or None."""
    for place, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor) and (tensor is not None or place < 3):
            name = AttentionInputs._fields[place]
            raise TypeError(f"{name} is {_kind(tensor)}: give a {_WANTED[name]}")


def check_options(probs_heads: str, scale: Any) -> None:
    """Raise ValueError or TypeError unless probs_heads is "mean" or "all" and scale is a number."""
    if probs_heads not in ("mean", "all"):
        raise ValueError(f"probs_heads is {probs_heads!r}: give 'mean' or 'all'")
    # A tensor would have to be read, which waits for a CUDA device.
    if isinstance(scale, (Tensor, str)):
        raise TypeError(f"scale is {_kind(scale)}: give a number")


def refuse_layouts(*tensors: Tensor | None) -> None:
    """Raise ValueError if one of the operator's last arguments is sparse or nested."""
    for name, tensor in zip(_NAMES[-len(tensors) :], tensors, strict=True):
        if tensor is not None and (tensor.is_nested or tensor.layout is not torch.strided):
            layout = "nested" if tensor.is_nested else tensor.layout
            raise ValueError(
                f"{name} is {layout}. The operator takes strided tensors. Give a dense one."
            )


def check_inputs(inputs: AttentionInputs, scale: float | None, *, stored: bool) -> None:
    """Check everything that a backend relies on.

    Args:
        stored: whether the tensors have memory, unlike fake tensors.

    Raises:
        TypeError: an argument that is not a tensor, an unsupported dtype, or several dtypes.
        ValueError: shapes, devices, strides, layouts or a scale that do not fit, token weights
            that require a gradient, or storage smaller than its tensor.
    """
    query, key, value, reference_key, token_weights, key_mask, probs_positions = inputs
    if query is None or key is None or value is None:
        check_types(*inputs)
    dtype, device, shape = query.dtype, query.device, query.shape
    if dtype not in _DTYPES:
        raise TypeError(f"query is {dtype}: give float32, float16 or bfloat16")
    if len(shape) != 4:
        raise ValueError(f"query has shape {tuple(shape)}: give [B, H, N, D]")
    batch, heads, _, head_dim = shape
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"the head dimension D is {head_dim}: it may be 1 to {MAX_HEAD_DIM}")
    _check_strides("query", query, shape, stored)

    seqlen_k = key.shape[2] if key.dim() == 4 else 0
    wanted, shared = (batch, heads, seqlen_k, head_dim), (1, heads, seqlen_k, head_dim)
    for name, tensor in (("key", key), ("value", value), ("reference_key", reference_key)):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype} but query is {dtype}: give both alike")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} but query is on {device}: move one")
        other = tensor.shape
        if other != wanted and other != shared:
            length = "M" if name == "key" else seqlen_k
            raise ValueError(
                f"{name} has shape {tuple(other)}: with query {tuple(shape)} "
                f"{'' if name == 'key' else f'and {seqlen_k} keys '}give "
                f"[{_batches(batch)}, {heads}, {length}, {head_dim}]"
            )
        _check_strides(name, tensor, other, stored)
    if not 1 <= seqlen_k <= MAX_KEYS:
        raise ValueError(f"there are {seqlen_k} keys: the operator takes 1 to {MAX_KEYS}")

    if token_weights is not None:
        _check_extra("token_weights", token_weights, torch.float32, query, seqlen_k, stored)
        if token_weights.requires_grad:
            raise ValueError(
                "token_weights requires a gradient, but the operator has none for it: detach it"
            )
    if key_mask is not None:
        _check_extra("key_mask", key_mask, torch.bool, query, seqlen_k, stored)
    if probs_positions is not None:
        _check_extra("probs_positions", probs_positions, torch.int64, query, None, stored)
    # Comparisons, unlike math.isfinite, can be traced where the scale is a symbol.
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"scale is {scale}: give a finite number")


def check_positions(inputs: AttentionInputs) -> None:
    """Raise ValueError if a position on the CPU is past the last key.

    Reading values would wait for a CUDA device; there a position too large gives zeros.
    """
    positions = inputs.probs_positions
    if positions is not None and positions.is_cpu and positions.numel():
        largest, seqlen_k = int(positions.max()), inputs.key.shape[2]
        if largest >= seqlen_k:
            raise ValueError(
                f"probs_positions names key {largest}, but there are {seqlen_k} keys: give "
                f"0 to {seqlen_k - 1}, or a negative number for a map of zeros"
            )


def check_gradients(
    grads: OutputGrads,
    inputs: AttentionInputs,
    probs_all_heads: bool,
    needs: Sequence[bool],
    *,
    stored: bool,
    from_autograd: bool = False,
) -> None:
    """Check the backward's own arguments; the others have passed `check_inputs`.

    Args:
        from_autograd: autograd made the gradients, so they are tensors like the outputs. It does
            not notice that `.data` of an input was set to another shape.

    Raises:
        TypeError: a gradient in another dtype than its output.
        ValueError: a shape, device or layout that is not its output's, storage smaller than its
            tensor, or `needs` that do not fit the inputs.
    """
    query = inputs.query
    for name, grad, shape in (
        ("grad_output", grads.output, query.shape),
        ("grad_subject_loss", grads.subject_loss, (query.shape[0],)),
        ("grad_attn_probs", grads.attn_probs, inputs.probs_shape(probs_all_heads)),
    ):
        if grad is None:
            continue
        if not from_autograd:
            dtype = query.dtype if name == "grad_output" else wide_dtype(query.dtype)
            _check_kind(name, grad, dtype, query)
        if grad.shape != shape:
            raise ValueError(f"{name} has shape {tuple(grad.shape)}: give {list(shape)}")
        if stored and not from_autograd:
            _check_storage(name, grad)
    if len(needs) != 4:
        raise ValueError(f"needs has {len(needs)} entries: give 4")
    if needs[3] and inputs.reference_key is None:
        raise ValueError("needs asks for the gradient of a reference_key that is None: give one")


def _check_strides(name: str, tensor: Tensor, shape: Sequence[int], stored: bool) -> None:
    """Check that the last axis of [B, H, L, D] is dense, and that the storage is large enough."""
    batch, heads, length, head_dim = shape
    of_batch, of_head, of_row, of_column = tensor.stride()
    if of_column != 1 and head_dim > 1:
        raise ValueError(
            f"{name} {tuple(shape)} has stride {of_column} along its last axis: that "
            "axis must be dense, any view of [B, L, H * D] is; call .contiguous() on it"
        )
    if stored:
        # Every call comes here: faster than the loop of `_check_storage`.
        last = (batch - 1) * of_batch + (heads - 1) * of_head + (length - 1) * of_row
        end = (tensor.storage_offset() + last + head_dim) * tensor.itemsize
        if end > tensor.untyped_storage().nbytes():
            _check_storage(name, tensor)


def _check_storage(name: str, tensor: Tensor) -> None:
    """Check that the storage of a tensor of any shape reaches to its end."""
    strides = tensor.stride()
    last = sum(map(mul, tensor.shape, strides)) - sum(strides)
    end = (tensor.storage_offset() + last + 1) * tensor.itemsize
    # Of an empty tensor the end means nothing.
    if end > tensor.untyped_storage().nbytes() and tensor.numel():
        raise ValueError(
            f"The storage of {name} has {tensor.untyped_storage().nbytes()} bytes. Its shape and "
            f"strides need {end}. Resize the storage back before the call."
        )


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


def _batches(batch: int) -> str:
    return "1" if batch == 1 else f"{batch} or 1"


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
