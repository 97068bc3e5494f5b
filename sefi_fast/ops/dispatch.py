"""Backends in order of preference, and the choice of one for given inputs."""

from __future__ import annotations

import functools
import importlib
import logging
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from sefi_fast.errors import BackendError


class CudaDevice(NamedTuple):
    """A CUDA device as the kernels see it."""

    capability: int
    """major * 10 + minor."""
    multiprocessors: int


@functools.cache
def cuda_device(index: int) -> CudaDevice:
    """Capability and size of the device of that number."""
    properties = torch.cuda.get_device_properties(index)
    return CudaDevice(properties.major * 10 + properties.minor, properties.multi_processor_count)


def why_not_cuda(tensor: Tensor) -> str | None:
    """Why kernels for NVIDIA devices cannot reach the tensor, or None."""
    if tensor.device.type != "cuda":
        return f"the tensors are on {tensor.device.type}, and the kernels run on CUDA devices"
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm, and the kernels are made for NVIDIA devices"
    return None


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one, where it is a CUDA device and is not already."""
    if tensor.device.type == "cuda" and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


logger = logging.getLogger(__name__)

NAMES = ("triton", "cuda", "cpu", "eager")

_Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def _by_speed(tensors: _Tensors) -> tuple[str, ...]:
    """Backends of the tensors' device, the first that takes the input being the fastest."""
    query = tensors[0]
    kind = query.device.type
    if kind != "cuda":
        return ("cpu",) if kind == "cpu" else ()
    cpp = _import("cuda")
    first = not isinstance(cpp, str) and cpp.faster_than_triton(*tensors[:4])
    return ("cuda", "triton") if first else ("triton", "cuda")


@functools.cache
def _import(name: str) -> ModuleType | str:
    """The backend's module, or one sentence why it cannot be imported."""
    if name not in NAMES:
        raise BackendError(
            f"unknown backend {name!r}: choose one of {', '.join(NAMES)}, or None for the best here"
        )
    try:
        return importlib.import_module(f"sefi_fast.ops.{name}")
    except ImportError as error:
        return f"its module cannot be imported ({error})"


def load(name: str) -> ModuleType:
    """The backend's module: `why_not`, `forward` and `backward` over validated tensors.

    Raises:
        BackendError: there is no backend of that name, or its module cannot be imported here.
    """
    module = _import(name)
    if isinstance(module, str):
        raise BackendError(f"backend {name!r} is not there: {module}")
    return module


def _why_not(name: str, tensors: _Tensors) -> str | None:
    module = _import(name)
    return module if isinstance(module, str) else module.why_not(*tensors)


@functools.cache
def _warn_of_eager(refused: tuple[str, ...]) -> None:
    """Once for the same reasons: the plain path costs what the library is there to save."""
    logger.warning(
        "attention on this GPU takes the plain PyTorch path, with its maps in memory. %s",
        "; ".join(refused),
    )


def choose_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    reference_key: Tensor | None = None,
    probs_positions: Tensor | None = None,
    backend: str | None = None,
) -> str:
    """Name of the backend that runs: the one asked for, or the fastest that takes the input.

    The operator itself asks this at every call, with the tensors it is about to hand over.

    Raises:
        BackendError: the backend asked for is unknown or cannot take the input; it says why.
    """
    tensors = (query, key, value, reference_key, probs_positions)
    if backend is None:
        refused = []
        for name in _by_speed(tensors):
            reason = _why_not(name, tensors)
            if reason is None:
                return name
            refused.append(f"{name}: {reason}")
        if query.device.type == "cuda" and query.dtype != torch.float64:
            _warn_of_eager(tuple(refused))
        return "eager"
    reason = _why_not(backend, tensors)
    if reason is not None:
        raise BackendError(
            f"backend {backend!r} cannot take this input: {reason}. Pass backend=None to let the "
            "library choose"
        )
    return backend


def available_backends() -> dict[str, str | None]:
    """Backend name → None where it runs on this machine, else one sentence why it does not."""
    reasons: dict[str, str | None] = {}
    for name in NAMES:
        on_cuda = name != "cpu" and torch.cuda.is_available()
        sample = torch.zeros(1, 1, 1, 8, device="cuda" if on_cuda else "cpu")
        reasons[name] = _why_not(name, (sample, sample, sample, None, None))
    return reasons
