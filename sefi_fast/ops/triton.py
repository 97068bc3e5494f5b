"""The Triton backend: CUDA tensors, and CPU tensors through Triton's interpreter in tests."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from sefi_fast.ops.dispatch import cuda_device, cuda_not_supported_reason, on_device
from sefi_fast.ops.inputs import (
    AttentionInputs,
    InputGrads,
    Options,
    OutputGrads,
    Outputs,
    dtype_not_supported_reason,
    empty_result,
)

if TYPE_CHECKING:
    from sefi_fast.kernels import Device

# The interpreter has no multiprocessors; a small number makes every loop and split run there.
INTERPRETED_MULTIPROCESSORS = 2


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Return whether the kernels run in Triton's interpreter (TRITON_INTERPRET=1 at import)."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def _device(index: int | None) -> Device:
    """Return the CUDA device of that number, or the interpreter for None."""
    from sefi_fast.kernels import Device

    if index is None:
        return Device(90, INTERPRETED_MULTIPROCESSORS, True)
    found = cuda_device(index)
    return Device(found.capability, found.multiprocessors, interpreted(), index)


def _device_of(query: Tensor) -> Device:
    return _device(query.get_device() if query.is_cuda else None)


# Every call of the operator asks.
@functools.cache
def _compiler_not_supported_reason(
    dtype: torch.dtype, head_dim: int, seqlen_k: int, capability: int
) -> str | None:
    """Say why the kernels cannot be compiled for a device, or do not fit; None where they do."""
    from sefi_fast.kernels import configs, ptxas

    reason: str | None = ptxas.not_supported_reason(capability)
    return reason or configs.not_supported_reason(dtype, head_dim, seqlen_k, capability)


def not_supported_reason(inputs: AttentionInputs) -> str | None:
    """Say why this backend cannot take the inputs; None where it can."""
    if not _installed():
        return "the package triton is not installed"
    query = inputs.query
    if query.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1" or not interpreted():
            return (
                "the tensors are on the CPU, which Triton only reaches through its interpreter: "
                "move them to a CUDA device, or set TRITON_INTERPRET=1 before Python starts to test"
            )
    elif (reason := cuda_not_supported_reason(query)) is not None:
        return reason
    if (reason := dtype_not_supported_reason(inputs)) is not None:
        return reason
    if query.is_cuda:
        capability = cuda_device(query.get_device()).capability
        return _compiler_not_supported_reason(
            query.dtype, query.shape[3], inputs.key.shape[2], capability
        )
    return None


@functools.cache
def _max_row_stride() -> int:
    from sefi_fast.kernels import MAX_ROW_STRIDE

    return int(MAX_ROW_STRIDE)


def _dense(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


@overload
def _reachable(tensor: Tensor) -> Tensor: ...
@overload
def _reachable(tensor: None) -> None: ...
def _reachable(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor with a dense last axis, and rows close enough for 32-bit offsets."""
    if tensor is None:
        return None
    _, _, step, last = tensor.stride()
    if last == 1 and (step <= _max_row_stride() or tensor.shape[2] == 1):
        return tensor
    return tensor.contiguous()


def _prepare(inputs: AttentionInputs) -> AttentionInputs:
    """Return the inputs in layouts and dtypes that the kernels read."""
    mask = _dense(inputs.key_mask)
    return AttentionInputs(
        _reachable(inputs.query),
        _reachable(inputs.key),
        _reachable(inputs.value),
        _reachable(inputs.reference_key),
        _dense(inputs.token_weights),
        None if mask is None else mask.view(torch.uint8),
        _dense(inputs.probs_positions) if inputs.num_positions else None,
    )


def _work_dtype(query: Tensor, device: Device) -> torch.dtype:
    """Return the dtype that the kernels write: the interpreter cannot round to bfloat16."""
    upcast = device.interpreted and query.dtype == torch.bfloat16
    return torch.float32 if upcast else query.dtype


def forward(inputs: AttentionInputs, options: Options) -> Outputs:
    """Compute equations 4 and 5 of docs/method.md in one pass over the queries."""
    from sefi_fast.kernels import plan_forward

    query, scale = inputs.query, options.scale
    if scale < 0:
        query, scale = -query, -scale
        inputs = inputs._replace(query=query)
    device = _device_of(query)
    output = empty_result(query, _work_dtype(query, device))
    # The kernel writes every head's probabilities.
    num_positions = inputs.num_positions
    probs_shape = inputs.probs_shape(options.probs_all_heads or num_positions > 0)
    attn_probs = query.new_empty(probs_shape, dtype=torch.float32)
    subject_loss = None
    if output.numel() > 0:
        written = attn_probs if num_positions else None
        launch, partials = plan_forward(_prepare(inputs), output, written, scale, device)
        with on_device(query):
            launch.run()
        if partials is not None:
            subject_loss = partials.sum((1, 2))
    if subject_loss is None:
        subject_loss = query.new_zeros(query.shape[0], dtype=torch.float32)
    if num_positions and not options.probs_all_heads:
        # A mean over no heads would be NaN.
        shape = inputs.probs_shape(all_heads=False)
        attn_probs = attn_probs.mean(1) if attn_probs.numel() else attn_probs.new_zeros(shape)
    return output.to(query.dtype), subject_loss, attn_probs


def backward(grads: OutputGrads, inputs: AttentionInputs, options: Options) -> InputGrads:
    """Compute equations 7 to 11 of docs/method.md; probabilities are recomputed, not stored."""
    from sefi_fast.kernels import plan_backward

    query, scale = inputs.query, options.scale
    negative = scale < 0
    if negative:
        query, scale = -query, -scale
        inputs = inputs._replace(query=query)
    device = _device_of(query)
    work_dtype = _work_dtype(query, device)
    grad_attn_probs = grads.attn_probs if inputs.num_positions else None
    if grad_attn_probs is not None:
        grad_attn_probs = grad_attn_probs.to(torch.float32).contiguous()
    grads = OutputGrads(
        _reachable(grads.output),
        None if inputs.reference_key is None else grads.subject_loss,
        grad_attn_probs,
    )
    # The softmax over a single key is constant: nothing reaches its score, not even rounding.
    scores = query.numel() > 0 and inputs.key.shape[2] > 1
    reaches_scores = scores and any(grad is not None for grad in grads)
    reached = (
        reaches_scores,
        reaches_scores,
        grads.output is not None and query.numel() > 0,
        scores and options.reference_grad and grads.subject_loss is not None,
    )
    results: list[Tensor | None] = [None, None, None, None]
    written: list[Tensor | None] = [None, None, None, None]
    for place, tensor in enumerate(inputs[:4]):
        if tensor is not None and options.needs[place]:
            results[place] = result = empty_result(tensor, work_dtype)
            if reached[place]:
                written[place] = result
            else:
                result.zero_()
    if any(result is not None for result in written):
        totals = (written[0], written[1], written[2], written[3])
        launches = plan_backward(
            _prepare(inputs), grads, totals, scale, options.reference_grad, device
        )
        with on_device(query):
            for launch in launches:
                launch.run()
    if negative and results[0] is not None:
        results[0].neg_()
    found = [None if result is None else result.to(query.dtype) for result in results]
    return found[0], found[1], found[2], found[3]
