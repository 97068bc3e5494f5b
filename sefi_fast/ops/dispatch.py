"""Backends in order of preference, and the choice of one for given inputs."""

from __future__ import annotations

import functools
import importlib
import logging
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from sefi_fast.errors import BackendError
from sefi_fast.ops.inputs import AttentionInputs, InputGrads, Options, OutputGrads, Outputs

logger = logging.getLogger(__name__)

PRIORITY = {
    "cuda": ("triton", "cuda"),
    "cpu": ("cpu",),
}
"""Backends by device type, the fastest first. Each is the module sefi_fast.ops.<name>."""

NAMES = (*dict.fromkeys(chain.from_iterable(PRIORITY.values())), "eager")
"""All backends. "eager" takes every input."""

LOWEST_CAPABILITY = 80
"""Lowest compute capability of the CUDA kernels, major * 10 + minor: 8.0 is an A100."""


class Backend(Protocol):
    """The functions of a backend's module. They take validated inputs."""

    def not_supported_reason(self, inputs: AttentionInputs) -> str | None:
        """Say in one sentence why the backend cannot take the inputs; None where it can."""

    def forward(self, inputs: AttentionInputs, options: Options) -> Outputs:
        """Return output, subject loss and attention probabilities."""

    def backward(self, grads: OutputGrads, inputs: AttentionInputs, options: Options) -> InputGrads:
        """Return the gradients that `options.needs` asks for, as `empty_result` lays them out."""


class CudaDevice(NamedTuple):
    """A CUDA device as the kernels see it."""

    capability: int
    """major * 10 + minor."""
    multiprocessors: int


@functools.cache
def cuda_device(index: int) -> CudaDevice:
    """Return capability and size of the device of that number."""
    properties = torch.cuda.get_device_properties(index)
    return CudaDevice(properties.major * 10 + properties.minor, properties.multi_processor_count)


def cuda_not_supported_reason(tensor: Tensor) -> str | None:
    """Say why kernels for NVIDIA devices cannot run on the tensor's device; None where they can."""
    if tensor.device.type != "cuda":
        return f"the tensors are on {tensor.device.type}, and the kernels run on CUDA devices"
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm, and the kernels are made for NVIDIA devices"
    capability = cuda_device(tensor.get_device()).capability
    if capability < LOWEST_CAPABILITY:
        return (
            f"the device has compute capability {capability // 10}.{capability % 10}, "
            f"and the kernels need {LOWEST_CAPABILITY / 10} (A100) or newer"
        )
    return None


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's device the current one if it is a CUDA device and is not current yet."""
    if tensor.device.type == "cuda" and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


@functools.cache
def _import(name: str) -> Backend | str:
    """Return the backend's module, or one sentence that says why it cannot be imported."""
    if name not in NAMES:
        raise BackendError(
            f"unknown backend {name!r}: choose one of {', '.join(NAMES)}, or None for the best here"
        )
    try:
        return cast(Backend, importlib.import_module(f"sefi_fast.ops.{name}"))
    except ImportError as error:
        return f"its module cannot be imported ({error})"


def load(name: str) -> Backend:
    """Return the backend's module.

    Raises:
        BackendError: the backend is unknown, or its module cannot be imported here.
    """
    module = _import(name)
    if isinstance(module, str):
        raise BackendError(f"backend {name!r} is not there: {module}")
    return module


def _not_supported_reason(name: str, inputs: AttentionInputs) -> str | None:
    module = _import(name)
    return module if isinstance(module, str) else module.not_supported_reason(inputs)


# Head dimensions at which the backend "cuda" was measured to be faster than "triton", by compute
# capability, in half precision with the 77 keys of a text: docs/performance.md.
_FASTER_HEAD_DIMS = {90: (40, 80, 160)}
_MOST_KEYS = 80


def _cuda_is_faster(inputs: AttentionInputs) -> bool:
    """Return whether "cuda" is known to be faster than "triton" for a call on a CUDA device."""
    query, key = inputs.query, inputs.key
    fast = _FASTER_HEAD_DIMS.get(cuda_device(query.get_device()).capability, ())
    if query.dtype.itemsize != 2 or query.shape[3] not in fast or key.shape[2] > _MOST_KEYS:
        return False
    # The kernels for tensor cores (csrc/cuda) load rows in vectors.
    return all(tensor is None or _has_aligned_rows(tensor) for tensor in inputs[:4])


def _has_aligned_rows(tensor: Tensor) -> bool:
    """Return whether every row of two-byte elements begins at a multiple of 16 bytes."""
    strides = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    return tensor.data_ptr() % 16 == 0 and not any(size > 1 and step % 8 for size, step in strides)


def _fastest_first(inputs: AttentionInputs) -> tuple[str, ...]:
    kind = inputs.query.device.type
    names = PRIORITY.get(kind, ())
    if kind == "cuda" and _cuda_is_faster(inputs):
        return ("cuda", *(name for name in names if name != "cuda"))
    return names


@functools.cache
def _warn_of_eager(refused: tuple[str, ...]) -> None:
    """Warn once for the same reasons that the attention maps are stored."""
    logger.warning(
        "attention on this GPU takes the plain PyTorch path, with its maps in memory. %s",
        "; ".join(refused),
    )


def choose_backend(inputs: AttentionInputs, backend: str | None = None) -> str:
    """Return the name of the backend that runs: `backend`, or the fastest that takes the inputs.

    Raises:
        BackendError: `backend` is unknown or cannot take the inputs; the message says why.
    """
    if backend is None:
        refused = []
        for name in _fastest_first(inputs):
            reason = _not_supported_reason(name, inputs)
            if reason is None:
                return name
            refused.append(f"{name}: {reason}")
        if inputs.query.device.type == "cuda" and inputs.query.dtype != torch.float64:
            _warn_of_eager(tuple(refused))
        return "eager"
    reason = _not_supported_reason(backend, inputs)
    if reason is not None:
        raise BackendError(
            f"backend {backend!r} cannot take this input: {reason}. Pass backend=None to let the "
            "library choose"
        )
    return backend


def available_backends() -> dict[str, str | None]:
    """Map each backend to None where it runs on this machine, else to the reason why not."""
    reasons: dict[str, str | None] = {}
    for name in NAMES:
        on_cuda = name != "cpu" and torch.cuda.is_available()
        sample = torch.zeros(1, 1, 1, 8, device="cuda" if on_cuda else "cpu")
        reasons[name] = _not_supported_reason(name, AttentionInputs(sample, sample, sample))
    return reasons
