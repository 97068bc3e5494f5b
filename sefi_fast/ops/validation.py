"""Checks of the operator's arguments that read shapes, dtypes and devices, never a value."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MAX_KEYS = 256
MAX_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensors(query: Tensor, key: Tensor, value: Tensor, reference_key: Tensor | None) -> None:
    """Query, key, value and reference key: shapes, one dtype, one device, dense last axis.

    Raises:
        TypeError: no tensor, a dtype the operator does not take, or several dtypes.
        ValueError: shapes, devices or strides that do not fit.
    """
    if not isinstance(query, Tensor):
        raise TypeError(f"query is {_kind(query)}: give a tensor [B, H, N, D]")
    shape, dtype, device = query.shape, query.dtype, query.device
    if len(shape) != 4:
        raise ValueError(f"query has shape {tuple(shape)}: give [B, H, N, D]")
    if dtype not in _DTYPES:
        raise TypeError(f"query is {dtype}: give float32, float16 or bfloat16")
    batch, heads, _, head_dim = shape
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"the head width D is {head_dim}: it may be 1 to {MAX_HEAD_DIM}")
    _check_dense("query", query)

    keys = None
    for name, tensor in (("key", key), ("value", value), ("reference_key", reference_key)):
        if tensor is None and name == "reference_key":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {_kind(tensor)}: give a tensor [B or 1, H, M, D]")
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype} but query is {dtype}: give both alike")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} but query is on {device}: move one")
        other = tensor.shape
        if (
            len(other) != 4
            or (other[0] != batch and other[0] != 1)
            or other[1] != heads
            or other[3] != head_dim
            or (keys is not None and other[2] != keys)
        ):
            rows = "M" if keys is None else keys
            raise ValueError(
                f"{name} has shape {tuple(other)}: with query {tuple(shape)} "
                f"{'' if keys is None else f'and {keys} keys '}give "
                f"[{_batches(batch)}, {heads}, {rows}, {head_dim}]"
            )
        keys = other[2]
        _check_dense(name, tensor)
    if keys is None or not 1 <= keys <= MAX_KEYS:
        raise ValueError(f"there are {keys} keys: the operator takes 1 to {MAX_KEYS}")


def check_extras(
    query: Tensor,
    keys: int,
    token_weights: Tensor | None,
    key_mask: Tensor | None,
    map_tokens: Tensor | None,
) -> None:
    """Token weights, key mask and map tokens against a query that has passed `check_tensors`.

    Raises:
        TypeError: no tensor, or a dtype the operator does not take.
        ValueError: shapes or devices that do not fit, or weights that require a gradient.
    """
    if token_weights is not None:
        _check_extra("token_weights", token_weights, torch.float32, query, keys)
        if token_weights.requires_grad:
            raise ValueError(
                "token_weights requires a gradient, but the operator has none for it: detach it"
            )
    if key_mask is not None:
        _check_extra("key_mask", key_mask, torch.bool, query, keys)
    if map_tokens is not None:
        _check_extra("map_tokens", map_tokens, torch.int64, query, None)


def check_options(map_heads: str, scale: float | None) -> None:
    """Raises ValueError or TypeError unless map_heads is "mean" or "all" and scale is finite."""
    if map_heads != "mean" and map_heads != "all":
        raise ValueError(f"map_heads is {map_heads!r}: give 'mean' or 'all'")
    if scale is None:
        return
    # A tensor would have to be read, which waits for a CUDA device.
    if isinstance(scale, (Tensor, str)):
        raise TypeError(f"scale is {_kind(scale)}: give a number")
    # Comparisons, unlike math.isfinite, can be traced where the scale is a symbol.
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale is {scale}: give a finite number")


def _check_dense(name: str, tensor: Tensor) -> None:
    if tensor.stride(3) != 1 and tensor.shape[3] > 1:
        raise ValueError(
            f"{name} {tuple(tensor.shape)} has stride {tensor.stride(3)} along its last axis: that "
            "axis must be dense, any view of [B, L, H * D] is; call .contiguous() on it"
        )


def _check_extra(
    name: str, tensor: Tensor, dtype: torch.dtype, query: Tensor, length: int | None
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {_kind(tensor)}: give a {dtype} tensor")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}: give {dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name} is on {tensor.device} but query is on {query.device}: move one")
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


def _batches(batch: int) -> str:
    return "1" if batch == 1 else f"{batch} or 1"


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
