"""The CUDA C++ backend: passes device addresses, scratch memory and a stream to sefi_fast._cuda."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sefi_fast.ops import native_call
from sefi_fast.ops.dispatch import cuda_device, cuda_not_supported_reason, on_device
from sefi_fast.ops.inputs import (
    AttentionInputs,
    InputGrads,
    Options,
    OutputGrads,
    Outputs,
    dtype_not_supported_reason,
)

try:
    from sefi_fast import _cuda
except ImportError as error:
    _cuda = None  # type: ignore[assignment]
    _missing = str(error)


def architectures() -> list[str] | None:
    """Return the targets of the build, as sm_90a or compute_80 (PTX); None where there is none."""
    return None if _cuda is None else _cuda.architectures()


def covers(target: str, capability: int) -> bool:
    """Return whether code for `target` runs on a device of capability major * 10 + minor.

    Machine code runs on its own major version from its minor version on, PTX on everything newer.
    A target whose name ends in "a" runs on that one architecture alone.
    """
    kind, _, name = target.partition("_")
    number = int(name.rstrip("af"))
    if name.endswith("a"):
        return number == capability
    if kind == "sm" or name.endswith("f"):
        return number // 10 == capability // 10 and number <= capability
    return number <= capability


@functools.cache
def _driver_version() -> int:
    """Return the newest CUDA version that the driver supports, major * 1000 + minor * 10."""
    return _cuda.driver_version()


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _device_not_supported_reason(query: Tensor) -> str | None:
    reason = cuda_not_supported_reason(query)
    if reason is not None:
        return reason
    driver, runtime = _driver_version(), _cuda.runtime_version()
    if driver // 1000 < runtime // 1000:
        return (
            f"the kernels were built with CUDA {_version(runtime)} and the driver is of CUDA "
            f"{_version(driver)}: update the driver, or build with an older CUDA toolkit"
        )
    capability = cuda_device(query.get_device()).capability
    # A driver compiles no PTX of a toolkit newer than itself.
    usable = [
        target for target in _cuda.architectures() if target.startswith("sm_") or driver >= runtime
    ]
    if any(covers(target, capability) for target in usable):
        return None
    return (
        f"the device has compute capability {capability // 10}.{capability % 10}, and the kernels "
        f"were built for {', '.join(_cuda.architectures())}: install again with "
        f"SEFI_CUDA_ARCHS={'90a' if capability == 90 else capability}"
    )


def _launch_target(query: Tensor) -> tuple[int, int]:
    """Return the number of multiprocessors of the query's device, and its current stream."""
    stream = torch.cuda.current_stream(query.device).cuda_stream
    return cuda_device(query.get_device()).multiprocessors, stream


def not_supported_reason(inputs: AttentionInputs) -> str | None:
    """Say why these kernels cannot take the inputs; None where they can."""
    if _cuda is None:
        return (
            f"the module sefi_fast._cuda is not there ({_missing}): install sefi_fast with "
            "SEFI_CUDA=1 where a CUDA toolkit is to have it"
        )
    reason = _device_not_supported_reason(inputs.query)
    return reason or dtype_not_supported_reason(inputs)


def forward(inputs: AttentionInputs, options: Options) -> Outputs:
    """Compute equations 4 and 5 of docs/method.md in one pass over the queries."""
    if options.scale < 0:
        inputs, options = _with_positive_scale(inputs, options)
    with on_device(inputs.query):
        call = native_call.forward_call(inputs, options)
        if call.arguments is not None:
            multiprocessors, stream = _launch_target(inputs.query)
            size = _cuda.forward_scratch(*call.arguments, multiprocessors)
            scratch = _scratch(inputs.query, size)
            _cuda.forward(*call.arguments, scratch.data_ptr(), multiprocessors, stream)
    return call.results


def backward(grads: OutputGrads, inputs: AttentionInputs, options: Options) -> InputGrads:
    """Compute equations 7 to 11 of docs/method.md; probabilities are recomputed, not stored."""
    negative = options.scale < 0
    if negative:
        inputs, options = _with_positive_scale(inputs, options)
    with on_device(inputs.query):
        call = native_call.backward_call(grads, inputs, options)
        if call.arguments is not None:
            multiprocessors, stream = _launch_target(inputs.query)
            size = _cuda.backward_scratch(*call.arguments, multiprocessors)
            scratch = _scratch(inputs.query, size)
            _cuda.backward(*call.arguments, scratch.data_ptr(), multiprocessors, stream)
        if negative and call.results[0] is not None:
            call.results[0].neg_()
    return call.results


def _with_positive_scale(
    inputs: AttentionInputs, options: Options
) -> tuple[AttentionInputs, Options]:
    return inputs._replace(query=-inputs.query), options._replace(scale=-options.scale)


def _scratch(query: Tensor, size: int) -> Tensor:
    """Return uninitialized bytes of the current stream; PyTorch aligns them to 512 bytes."""
    return torch.empty(size, dtype=torch.uint8, device=query.device)
