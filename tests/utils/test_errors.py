"""One function knows an error of too little memory, whoever raises it."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch

from sefi_fast.errors import ImageError, TrainingError, is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("std::bad_alloc"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.OutOfMemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        *map(
            RuntimeError,
            (
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate 4194304 bytes. Error code 12",
                "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
                "could not create a primitive",
                "could not create a memory object",
                "could not execute a primitive",
                "CUDA error: out of memory",
                "CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY",
                "Triton Error [CUDA]: out of memory",
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
                "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
                "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
                "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
                "unable to mmap 85 bytes from file </tmp/x>: Cannot allocate memory (12)",
                "std::bad_alloc",
            ),
        ),
    ],
    ids=repr,
)
def test_too_little_memory(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive descriptor for a matmul primitive"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("out of memory"),
        ImageError("there is no image at out of memory.png"),
        TrainingError("the subject out of memory.safetensors could not be written"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_another_error(error):
    assert not is_out_of_memory(error)


def test_an_array_of_numpy_that_is_too_large():
    with pytest.raises(MemoryError) as caught:
        np.empty(2**60, dtype=np.uint8)
    assert is_out_of_memory(caught.value)
