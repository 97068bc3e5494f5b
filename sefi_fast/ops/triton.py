"""The Triton backend: CUDA tensors, and CPU tensors through Triton's interpreter in tests."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from sefi_fast.ops.dispatch import cuda_device, on_device, why_not_cuda

if TYPE_CHECKING:
    from sefi_fast.kernels import Device

LOWEST_CAPABILITY = 80
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

SHARED_KIB = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
"""Shared memory that a program may have, by compute capability; 99 on the others from 8.6 on."""

# The interpreter has no multiprocessors; a small number makes every loop and split run there.
INTERPRETED_MULTIPROCESSORS = 2


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, as TRITON_INTERPRET=1 at import says."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def _device(index: int | None) -> Device:
    """The CUDA device of that number; the interpreter for None."""
    from sefi_fast.kernels import Device

    if index is None:
        return Device(90, INTERPRETED_MULTIPROCESSORS, True)
    found = cuda_device(index)
    return Device(found.capability, found.multiprocessors, interpreted(), index)


def _device_of(query: Tensor) -> Device:
    return _device(query.get_device() if query.is_cuda else None)


@functools.cache
def _why_not_assembler(capability: int) -> str | None:
    """Why no assembler is there to make these kernels for a device, None where one is."""
    if capability // 10 != 9:
        return None
    import triton

    from sefi_fast.kernels.ptxas import SOUND, assembler_version, is_sound

    version = assembler_version(capability)
    if is_sound(version, capability):
        return None
    sound = ".".join(map(str, SOUND))
    return (
        f"Triton {triton.__version__} uses the assembler ptxas {version}, which miscompiles "
        f"warp-group products on compute capability 9.0: pip install 'nvidia-cuda-nvcc>={sound}' "
        f"(the extra sefi_fast[hopper]), let TRITON_PTXAS_PATH name a ptxas of CUDA {sound} or "
        "newer, or use triton 3.9 or newer where PyTorch allows it"
    )


def _why_not_shared(query: Tensor, key: Tensor) -> str | None:
    """Why a device has too little shared memory for the kernels, None where it has enough."""
    capability = cuda_device(query.get_device()).capability
    return _short_of_shared(query.dtype, query.shape[3], key.shape[2], capability)


# Every call of the operator asks.
@functools.cache
def _short_of_shared(dtype: torch.dtype, head_dim: int, keys: int, capability: int) -> str | None:
    from sefi_fast.kernels import shared_bytes, split_tile

    tiles = (sum(split_tile(head_dim, 32)), *split_tile(keys, 64))
    needed = {name: shared_bytes(name, capability, *tiles) for name in ("single", "half")}
    own = needed["single" if dtype == torch.float32 else "half"]
    there = SHARED_KIB.get(capability, 99)
    if own <= 1024 * there:
        return None
    fits = ": bfloat16 fits" if needed["half"] <= 1024 * there else ""
    return (
        f"{str(dtype).removeprefix('torch.')} with {keys} keys of {head_dim} columns may "
        f"need {-(-own // 1024)} KiB of shared memory, and the device gives a program {there} "
        f"KiB{fits}"
    )


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor | None,
    probs_positions: Tensor | None,
) -> str | None:
    """One sentence saying why this backend cannot take the input, or None when it can."""
    if not _installed():
        return "the package triton is not installed"
    if query.device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1" or not interpreted():
            return (
                "the tensors are on the CPU, which Triton only reaches through its interpreter: "
                "move them to a CUDA device, or set TRITON_INTERPRET=1 before Python starts to test"
            )
    elif (reason := why_not_cuda(query)) is not None:
        return reason
    else:
        capability = cuda_device(query.get_device()).capability
        if capability < LOWEST_CAPABILITY:
            return (
                f"the device has compute capability {capability // 10}.{capability % 10}, "
                "and the kernels need 8.0 (A100) or newer"
            )
        if (reason := _why_not_assembler(capability)) is not None:
            return reason
        if (reason := _why_not_shared(query, key)) is not None:
            return reason
    if query.dtype not in DTYPES:
        return f"the dtype is {query.dtype}, and the kernels take float32, float16 and bfloat16"
    return None


@functools.cache
def _max_row_stride() -> int:
    from sefi_fast.kernels import MAX_ROW_STRIDE

    return MAX_ROW_STRIDE


def _dense(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


@overload
def _reachable(tensor: Tensor) -> Tensor: ...
@overload
def _reachable(tensor: None) -> None: ...
def _reachable(tensor: Tensor | None) -> Tensor | None:
    """The tensor with a dense last axis and rows near enough for 32-bit offsets inside a tile."""
    if tensor is None:
        return None
    _, _, step, last = tensor.stride()
    if last == 1 and (step <= _max_row_stride() or tensor.shape[2] == 1):
        return tensor
    return tensor.contiguous()


def _mask_bytes(key_mask: Tensor | None) -> Tensor | None:
    dense = _dense(key_mask)
    return None if dense is None else dense.view(torch.uint8)


def _work_dtype(query: Tensor, device: Device) -> torch.dtype:
    """Dtype the kernels write: the interpreter cannot round to bfloat16, so PyTorch does there."""
    upcast = device.interpreted and query.dtype == torch.bfloat16
    return torch.float32 if upcast else query.dtype


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
    """Output, subject loss and maps of validated inputs (equations 4 and 5 of docs/method.md)."""
    from sefi_fast.kernels import Inputs, plan_forward

    if scale < 0:
        query, scale = -query, -scale
    batch, heads, rows, head_dim = query.shape
    device = _device_of(query)
    shape = (batch, rows, heads, head_dim)
    output = query.new_empty(shape, dtype=_work_dtype(query, device))
    tokens = 0 if probs_positions is None else probs_positions.shape[1]
    attn_probs = None
    if tokens:
        attn_probs = query.new_empty((batch, heads, tokens, rows), dtype=torch.float32)
    subject_loss = None
    if output.numel() > 0:
        inputs = Inputs(
            _reachable(query),
            _reachable(key),
            _reachable(value),
            _reachable(reference_key),
            None if reference_key is None else _dense(token_weights),
            _mask_bytes(key_mask),
            _dense(probs_positions) if tokens else None,
        )
        launch, partials = plan_forward(inputs, output, attn_probs, scale, device)
        with on_device(query):
            launch.run()
        if partials is not None:
            subject_loss = partials.sum((1, 2))
    if subject_loss is None:
        subject_loss = query.new_zeros(batch, dtype=torch.float32)
    if attn_probs is None:
        kept = (heads,) if probs_all_heads else ()
        attn_probs = query.new_empty((batch, *kept, 0, rows), dtype=torch.float32)
    elif not probs_all_heads:
        attn_probs = (
            attn_probs.mean(1)
            if attn_probs.numel()
            else attn_probs.new_zeros((batch, tokens, rows))
        )
    return output.to(query.dtype).transpose(1, 2), subject_loss, attn_probs


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key, value and reference key (equations 7 to 11), each if `needs` it."""
    from sefi_fast.kernels import Gradients, Inputs, plan_backward

    negative = scale < 0
    if negative:
        query, scale = -query, -scale
    device = _device_of(query)
    work_dtype = _work_dtype(query, device)
    if reference_key is None:
        grad_subject_loss = None
    if probs_positions is None or probs_positions.shape[1] == 0:
        grad_attn_probs = None
    if grad_attn_probs is not None:
        grad_attn_probs = grad_attn_probs.to(torch.float32).contiguous()
    gradients = Gradients(_reachable(grad_output), grad_subject_loss, grad_attn_probs)
    inputs = Inputs(
        _reachable(query),
        _reachable(key),
        None if grad_output is None else _reachable(value),
        None if grad_subject_loss is None else _reachable(reference_key),
        None if grad_subject_loss is None else _dense(token_weights),
        _mask_bytes(key_mask),
        None if grad_attn_probs is None else _dense(probs_positions),
    )
    # The softmax over a single key is constant: nothing reaches its score, not even rounding.
    scores = query.numel() > 0 and key.shape[2] > 1
    reaches_scores = scores and any(gradient is not None for gradient in gradients)
    reaches = (
        reaches_scores,
        reaches_scores,
        grad_output is not None and query.numel() > 0,
        scores and reference_grad and grad_subject_loss is not None,
    )

    def make(like: Tensor | None, place: int) -> Tensor | None:
        """The [B, rows, H, D] buffer of a gradient: zeros when nothing reaches it."""
        if like is None or not needs[place]:
            return None
        batch, heads, rows, head_dim = like.shape
        new = like.new_empty if reaches[place] else like.new_zeros
        return new((batch, rows, heads, head_dim), dtype=work_dtype)

    results = [make(like, place) for place, like in enumerate((query, key, value, reference_key))]
    written = [result if reaches[place] else None for place, result in enumerate(results)]
    if any(total is not None for total in written):
        totals = (written[0], written[1], written[2], written[3])
        launches = plan_backward(inputs, gradients, totals, scale, reference_grad, device)
        with on_device(query):
            for launch in launches:
                launch.run()
    grads = [
        None if result is None else result.to(query.dtype).transpose(1, 2) for result in results
    ]
    if negative and grads[0] is not None:
        grads[0] = -grads[0]
    return grads[0], grads[1], grads[2], grads[3]
