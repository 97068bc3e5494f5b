"""The C++ backend: passes addresses and strides of CPU tensors to the native core sefi_fast._C."""

from __future__ import annotations

import torch

from sefi_fast.ops import native_call
from sefi_fast.ops.inputs import (
    AttentionInputs,
    InputGrads,
    Options,
    OutputGrads,
    Outputs,
    dtype_not_supported_reason,
)

try:
    from sefi_fast import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _missing = str(error)


def instruction_set() -> str | None:
    """Return the name of the instruction set in use, None where the native core was not built."""
    return None if _C is None else _C.instruction_set()


def not_supported_reason(inputs: AttentionInputs) -> str | None:
    """Say why the native core cannot take these inputs; None where it can."""
    if _C is None:
        return (
            f"the native core sefi_fast._C is not there ({_missing}): install a C++17 compiler and "
            "reinstall sefi_fast to have it"
        )
    if not inputs.query.is_cpu:
        return f"it works on CPU tensors, these are on {inputs.query.device}"
    return dtype_not_supported_reason(inputs)


def forward(inputs: AttentionInputs, options: Options) -> Outputs:
    """Compute equations 4 and 5 of docs/method.md in one pass over the queries."""
    call = native_call.forward_call(inputs, options)
    if call.arguments is not None:
        _C.forward(*call.arguments, torch.get_num_threads())
    return call.results


def backward(grads: OutputGrads, inputs: AttentionInputs, options: Options) -> InputGrads:
    """Compute equations 7 to 11 of docs/method.md; probabilities are recomputed, not stored."""
    call = native_call.backward_call(grads, inputs, options)
    if call.arguments is not None:
        _C.backward(*call.arguments, torch.get_num_threads())
    return call.results
