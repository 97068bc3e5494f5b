"""The C++ backend: hands addresses and strides of CPU tensors to the native core sefi_fast._C."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from sefi_fast import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _missing = str(error)

MAX_KEYS = 256
MAX_HEAD_DIM = 256
_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ABSENT_VIEW = (0, 0, 0, 0, 0)
_ABSENT_ROWS = (0, 0, 0)

_View = tuple[int, int, int, int, int]
_Rows = tuple[int, int, int]


def instruction_set() -> str | None:
    """Name of the instruction set the native core uses here; None where it was not built."""
    return None if _C is None else _C.instruction_set()


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor | None,
    map_tokens: Tensor | None,
) -> str | None:
    """Why the native core cannot take these tensors, or None where it can."""
    if _C is None:
        return (
            f"the native core sefi_fast._C is not there ({_missing}): install a C++17 compiler and "
            "reinstall sefi_fast to have it"
        )
    if query.device.type != "cpu":
        return f"it works on CPU tensors, these are on {query.device}"
    if query.dtype not in _CODES:
        return f"it takes float32, float16 and bfloat16, not {query.dtype}"
    if not 1 <= query.shape[-1] <= MAX_HEAD_DIM:
        return f"it takes head widths 1 to {MAX_HEAD_DIM}, not {query.shape[-1]}"
    if not 1 <= key.shape[2] <= MAX_KEYS:
        return f"it takes 1 to {MAX_KEYS} keys, not {key.shape[2]}"
    return None


def forward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 4 and 5 of docs/method.md in one pass over the query rows."""
    batch, heads, queries, _ = query.shape
    columns = 0 if map_tokens is None else map_tokens.shape[1]
    output = _like(query)
    alignment = query.new_zeros(batch, dtype=torch.float32)
    shape = (batch, heads, columns, queries) if map_all_heads else (batch, columns, queries)
    maps = query.new_empty(shape, dtype=torch.float32)
    if query.numel() == 0:
        return output, alignment, maps.zero_()
    inputs = _Inputs(query, key, value, reference_key, token_weights, key_mask, map_tokens)
    _C.forward(
        *inputs.arguments(scale, map_all_heads),
        _view(output),
        alignment.data_ptr(),
        maps.data_ptr(),
        torch.get_num_threads(),
    )
    return output, alignment, maps


def backward(
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Equations 7 to 11 of docs/method.md; the probabilities are computed again, not stored.

    Args:
        needs: whether the gradients of query, key, value and reference_key are wanted.

    Returns:
        Those gradients, None where not wanted; each has its input's shape and dtype.
    """
    through_reference = reference_grad and reference_key is not None and grad_alignment is not None
    tensors = (query, key, value, reference_key)
    grads = [
        _like(tensor) if need and tensor is not None else None
        for tensor, need in zip(tensors, needs, strict=True)
    ]
    if query.numel() == 0:
        return _four([grad if grad is None else grad.zero_() for grad in grads])
    written = list(grads)
    if not through_reference and grads[3] is not None:
        grads[3].zero_()
        written[3] = None
    if grad_output is None and grads[2] is not None:
        grads[2].zero_()
        written[2] = None
    inputs = _Inputs(query, key, value, reference_key, token_weights, key_mask, map_tokens)
    if grad_output is not None:
        grad_output = _dense_rows(grad_output.to(query.dtype))
    # Gradients of sums come expanded, one number for all entries.
    if grad_alignment is not None:
        grad_alignment = grad_alignment.to(torch.float32).contiguous()
    if grad_maps is not None:
        grad_maps = grad_maps.to(torch.float32).contiguous()
    _C.backward(
        *inputs.arguments(scale, map_all_heads),
        _view(grad_output),
        _address(grad_alignment),
        _address(grad_maps),
        reference_grad,
        [_view(grad) for grad in written],
        torch.get_num_threads(),
    )
    return _four(grads)


class _Inputs:
    """The operator's inputs in layouts the native core reads; keeps copies it made alive."""

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
    ) -> tuple[tuple[int, ...], int, float, list[_View], list[_Rows], bool]:
        return (
            self.sizes,
            self.code,
            scale,
            [_view(tensor) for tensor in self.tensors],
            [_ABSENT_ROWS if t is None else (t.data_ptr(), *t.shape) for t in self.rows],
            map_all_heads,
        )


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _like(tensor: Tensor) -> Tensor:
    """Uninitialised [B, H, L, D] as a view of a contiguous [B, L, H, D]."""
    batch, heads, length, width = tensor.shape
    return tensor.new_empty(batch, length, heads, width).transpose(1, 2)


def _view(tensor: Tensor | None) -> _View:
    if tensor is None:
        return _ABSENT_VIEW
    batch, head, row, _ = tensor.stride()
    return (tensor.data_ptr(), tensor.shape[0], batch, head, row)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _four(
    grads: list[Tensor | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    return grads[0], grads[1], grads[2], grads[3]
