"""What the backends of CUDA devices ask of a tensor's device."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor


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
