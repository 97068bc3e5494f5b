"""Compiles the CUDA sources for the host and calls them with CPU tensors, for tests."""

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
    # longjmp from one fiber's stack to another's is what its check is meant to refuse.
    *("-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas"),
)


def include_flags() -> list[str]:
    """The emulation first: its cuda_runtime.h, cuda/ptx.h and cuda/launch.h stand for the real."""
    return ["-I", str(HERE), "-I", str(CSRC)]


def sources() -> list[Path]:
    """Device sources, the emulated machine and the entry points for ctypes."""
    return [*sorted(CSRC.glob("cuda/*.cu")), HERE / "machine.cpp", HERE / "entry.cpp"]


def build(folder: Path) -> Path:
    """Compile everything, two files at a time, into a shared library in `folder`.

    Raises:
        pytest.skip.Exception: there is no C++ compiler.
        RuntimeError: the compiler refuses a file; its messages are in the text.
    """
    named = os.environ.get("CXX")
    compiler = shlex.split(named) if named else []
    if not compiler:
        found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
        compiler = [found] if found else []
    if not compiler or shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler for the emulated CUDA kernels")
    objects, waiting = [], []
    for source in sources():
        objects.append(folder / f"{source.stem}.o")
        command = [*compiler, *FLAGS, *include_flags(), "-x", "c++", "-c", str(source)]
        waiting.append((source, [*command, "-o", str(objects[-1])]))
    while waiting:
        now, waiting = waiting[:2], waiting[2:]
        runs = [
            (source, subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            for source, command in now
        ]
        for source, run in runs:
            messages = run.communicate()[1]
            if run.returncode:
                raise RuntimeError(f"{source.name} does not compile for the host:\n{messages}")
    library = folder / "libsefi_cuda_emulated.so"
    subprocess.run([*compiler, "-shared", "-o", str(library), *map(str, objects)], check=True)
    return library


class Emulated:
    """The native core's functions of the same name, run by the CUDA kernels on the host.

    Takes the place of `sefi_fast._C` inside sefi_fast.ops.cpu, whose contract it shares.
    """

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
        """The order in which a block's threads run, and when asynchronous copies land."""
        self._library.sefi_schedule(seed, int(late_copies))

    def shared_limit(self, size: int) -> None:
        """The most shared memory, in bytes, that a block of the pretended device may have."""
        self._library.sefi_shared_limit(size)

    def forward(
        self,
        sizes: Any,
        code: int,
        scale: float,
        inputs: Any,
        rows: Any,
        probs_all_heads: bool,
        output: Any,
        subject_loss: int,
        maps: int,
        threads: int,
    ) -> None:
        """As sefi_fast._C.forward; `threads` means nothing here."""
        numbers = [*sizes, code, *_flat(inputs), *_flat(rows), int(probs_all_heads)]
        self._run("sefi_forward", [*numbers, *output, subject_loss, maps], scale)

    def backward(
        self,
        sizes: Any,
        code: int,
        scale: float,
        inputs: Any,
        rows: Any,
        probs_all_heads: bool,
        grad_output: Any,
        grad_subject_loss: int,
        grad_attn_probs: int,
        reference_grad: bool,
        gradients: Any,
        threads: int,
    ) -> None:
        """As sefi_fast._C.backward; `threads` means nothing here."""
        numbers = [*sizes, code, *_flat(inputs), *_flat(rows), int(probs_all_heads)]
        numbers += [*grad_output, grad_subject_loss, grad_attn_probs, int(reference_grad)]
        self._run("sefi_backward", [*numbers, *_flat(gradients)], scale)

    def _run(self, name: str, numbers: list[int], scale: float) -> None:
        array = (ctypes.c_int64 * len(numbers))(*numbers)
        error = getattr(self._library, name)(array, scale, self.multiprocessors)
        if error is not None:
            raise RuntimeError(error.decode())


def _flat(groups: Any) -> list[int]:
    return [int(number) for group in groups for number in group]
