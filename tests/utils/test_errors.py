"""Errors of too little memory are recognised, whichever library raises them."""

from __future__ import annotations

import errno

import pytest
import torch

from sefi_fast.errors import ImageError, TrainingError, is_out_of_memory

OUT_OF_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    RuntimeError("could not create a primitive"),
    RuntimeError("could not create a memory object"),
    RuntimeError("could not execute a primitive"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("unable to mmap 85 bytes from file </tmp/x>: Cannot allocate memory (12)"),
    RuntimeError("std::bad_alloc"),
]
OTHERS = [
    RuntimeError("could not create a primitive descriptor for a matmul primitive"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    OSError(errno.ENOSPC, "No space left on device"),
    ValueError("out of memory"),
    ImageError("there is no image at out of memory.png"),
    TrainingError("the subject out of memory.safetensors could not be written"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, *OTHERS], ids=repr)
def test_errors_of_too_little_memory(error):
    assert is_out_of_memory(error) == (error in OUT_OF_MEMORY)
