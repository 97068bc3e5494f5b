"""The CUDA C++ backend: device addresses, scratch memory and a stream for sefi_fast._cuda."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sefi_fast.ops import native_call
from sefi_fast.ops.dispatch import cuda_device, on_device, why_not_cuda

try:
    from sefi_fast import _cuda
except ImportError as error:
    _cuda = None  # type: ignore[assignment]
    _missing = str(error)


def architectures() -> list[str] | None:
    """What the kernels were built for, as sm_90a and compute_80 (PTX); None: they were not."""
    return None if _cuda is None else _cuda.architectures()


def covers(target: str, capability: int) -> bool:
    """Whether code for `target` runs on a device of compute capability major * 10 + minor.

    Machine code runs on its own major version from its minor version on, PTX on everything newer;
    what is named with an "a" runs on that one architecture alone.
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
    """The newest CUDA that the driver knows, major * 1000 + minor * 10."""
    return _cuda.driver_version()


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _why_not_device(query: Tensor) -> str | None:
    reason = why_not_cuda(query)
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
    if not any(covers(target, capability) for target in usable):
        built = ", ".join(_cuda.architectures())
        wanted = (
            f"install again with SEFI_CUDA_ARCHS={'90a' if capability == 90 else capability}"
            if capability >= 80
            else "they need 8.0 (A100) or newer"
        )
        return (
            f"the device has compute capability {capability // 10}.{capability % 10}, and the "
            f"kernels were built for {built}: {wanted}"
        )
    return None


# By compute capability the head widths at which these kernels were measured to take less time than
# Triton's, in half precision with a text's 77 keys: docs/performance-gpu.md.
_FASTER_WIDTHS = {90: (40, 80, 160)}
_MOST_KEYS = 80


def faster_than_triton(query: Tensor, key: Tensor, *others: Tensor | None) -> bool:
    """Whether a call on this CUDA device takes less time here; unknown is no.

    others: value and reference key, whose rows must begin at multiples of 16 bytes as well for the
    matrix units' kernels (csrc/cuda/tensor.cu).
    """
    widths = _FASTER_WIDTHS.get(cuda_device(query.get_device()).capability, ())
    if query.dtype.itemsize != 2 or query.shape[3] not in widths or key.shape[2] > _MOST_KEYS:
        return False
    return all(tensor is None or _aligned(tensor) for tensor in (query, key, *others))


def _aligned(tensor: Tensor) -> bool:
    """Whether every row of two-byte elements begins at a multiple of 16 bytes."""
    strides = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    return tensor.data_ptr() % 16 == 0 and not any(size > 1 and step % 8 for size, step in strides)


def _place(query: Tensor) -> tuple[int, int]:
    """Multiprocessors of the query's device, and the handle of its current stream."""
    stream = torch.cuda.current_stream(query.device).cuda_stream
    return cuda_device(query.get_device()).multiprocessors, stream


def why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor | None,
    probs_positions: Tensor | None,
) -> str | None:
    """Why these kernels cannot take the tensors, or None where they can."""
    if _cuda is None:
        return (
            f"the module sefi_fast._cuda is not there ({_missing}): install sefi_fast with "
            "SEFI_CUDA=1 where a CUDA toolkit is to have it"
        )
    return _why_not_device(query) or native_call.why_not(query)


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
    """Equations 4 and 5 of docs/method.md in one pass over the query rows."""
    if scale < 0:
        query, scale = -query, -scale
    with on_device(query):
        call = native_call.forward_call(
            query, key, value, reference_key, token_weights, key_mask, probs_positions,
            probs_all_heads=probs_all_heads, scale=scale,
        )  # fmt: skip
        if call.arguments is not None:
            multiprocessors, stream = _place(query)
            scratch = _scratch(query, _cuda.forward_scratch(*call.arguments, multiprocessors))
            _cuda.forward(*call.arguments, scratch.data_ptr(), multiprocessors, stream)
    return call.results


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
) -> native_call.Gradients:
    """Equations 7 to 11 of docs/method.md; the probabilities are computed again, not stored.

    Args:
        needs: whether the gradients of query, key, value and reference_key are wanted.

    Returns:
        Those gradients, None where not wanted; each has its input's shape and dtype.
    """
    negative = scale < 0
    if negative:
        query, scale = -query, -scale
    with on_device(query):
        call = native_call.backward_call(
            grad_output, grad_subject_loss, grad_attn_probs,
            query, key, value, reference_key, token_weights, key_mask, probs_positions,
            probs_all_heads=probs_all_heads, scale=scale, reference_grad=reference_grad,
            needs=needs,
        )  # fmt: skip
        if call.arguments is not None:
            multiprocessors, stream = _place(query)
            scratch = _scratch(query, _cuda.backward_scratch(*call.arguments, multiprocessors))
            _cuda.backward(*call.arguments, scratch.data_ptr(), multiprocessors, stream)
        if negative and call.results[0] is not None:
            call.results[0].neg_()
    return call.results


def _scratch(query: Tensor, size: int) -> Tensor:
    """Uninitialised bytes of the current stream, as PyTorch's allocator aligns them: at 512."""
    return torch.empty(size, dtype=torch.uint8, device=query.device)
