"""Compile the CUDA sources for the host and call them with CPU tensors."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = (
    *("-std=c++17", "-O1", "-fPIC", "-fvisibility=default", "-Wall", "-Wextra", "-Werror"),
    # _FORTIFY_SOURCE refuses longjmp from the stack of one fiber to that of another.
    *("-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"),
    # The emulation first: its cuda_runtime.h, cuda/ptx.h and cuda/launch.h replace the real ones.
    *("-I", str(HERE), "-I", str(CSRC)),
)


def build(folder: Path) -> Path:
    """Compile everything, two files at a time, into a shared library in `folder`.

    Raises:
        pytest.skip.Exception: there is no C++ compiler.
        RuntimeError: a file does not compile; the compiler's messages are in the text.
    """
    named = os.environ.get("CXX")
    compiler = shlex.split(named or next(filter(shutil.which, ("c++", "g++", "clang++")), ""))
    if not compiler or shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler for the emulated CUDA kernels")
    sources = [*sorted(CSRC.glob("cuda/*.cu")), HERE / "machine.cpp", HERE / "entry.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    commands = [
        [*compiler, *FLAGS, "-x", "c++", "-c", str(source), "-o", str(target)]
        for source, target in zip(sources, objects, strict=True)
    ]
    for first in range(0, len(commands), 2):
        runs = [
            subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
            for command in commands[first : first + 2]
        ]
        for source, run in zip(sources[first:], runs, strict=False):
            messages = run.communicate()[1]
            if run.returncode:
                raise RuntimeError(f"{source.name} does not compile for the host:\n{messages}")
    library = folder / "libsefi_cuda_emulated.so"
    subprocess.run([*compiler, "-shared", "-o", str(library), *map(str, objects)], check=True)
    return library


class Emulated:
    """The functions of sefi_fast._C, computed by the CUDA kernels on the host."""

    def __init__(self, library: Path, multiprocessors: int = 2) -> None:
        self.multiprocessors = multiprocessors
        self._library = ctypes.CDLL(str(library))
        for name in ("sefi_forward", "sefi_backward"):
            function = getattr(self._library, name)
            function.restype = ctypes.c_char_p
            function.argtypes = [ctypes.POINTER(ctypes.c_int64), ctypes.c_double, ctypes.c_int]
        self._library.sefi_schedule.argtypes = [ctypes.c_uint32, ctypes.c_int]
        self._library.sefi_shared_limit.argtypes = [ctypes.c_int64]

    def schedule(self, seed: int, late_copies: bool) -> None:
        """Set the order in which threads run, and when asynchronous copies arrive."""
        self._library.sefi_schedule(seed, int(late_copies))

    def shared_limit(self, size: int) -> None:
        """Set the shared memory of the emulated device, in bytes per block."""
        self._library.sefi_shared_limit(size)

    def forward(self, *arguments: Any) -> None:
        """Compute what sefi_fast._C.forward computes; the number of threads is ignored."""
        self._run("sefi_forward", *arguments)

    def backward(self, *arguments: Any) -> None:
        """Compute what sefi_fast._C.backward computes; the number of threads is ignored."""
        self._run("sefi_backward", *arguments)

    def _run(self, name: str, sizes: Any, dtype: int, scale: float, *rest: Any) -> None:
        numbers = _flat((sizes, dtype, rest[:-1]))
        array = (ctypes.c_int64 * len(numbers))(*numbers)
        error = getattr(self._library, name)(array, scale, self.multiprocessors)
        if error is not None:
            raise RuntimeError(error.decode())


def _flat(value: Any) -> list[int]:
    """Return the integers of nested sequences in order."""
    if isinstance(value, int):
        return [int(value)]
    return [number for item in value for number in _flat(item)]
