"""Compile the real binding of the emulated kernels: the module sefi_fast._cuda."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shlex
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
from cuda_emulation.library import CSRC, FLAGS

TARGETS = "sm_80,compute_80,sm_90a"
VERSION = 13000


def build_module(library: Path) -> ModuleType:
    """Compile csrc/cuda/bindings.cpp, link it to the library of `build`, and import it."""
    pybind11 = pytest.importorskip("pybind11")
    target = library.with_name(f"_cuda{importlib.machinery.EXTENSION_SUFFIXES[0]}")
    flags = [flag for flag in FLAGS if flag != "-fvisibility=default"]
    flags += ["-fvisibility=hidden", f'-DSEFI_CUDA_TARGETS="{TARGETS}"']
    flags.append(f"-DSEFI_CUDA_VERSION={VERSION}")
    for folder in (pybind11.get_include(), sysconfig.get_path("include")):
        flags += ["-isystem", folder]
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    command = [*compiler, *flags, str(CSRC / "cuda" / "bindings.cpp"), "-shared", "-o", str(target)]
    command += [str(library), f"-Wl,-rpath,{library.parent}"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"the binding does not compile:\n{run.stderr}")
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(target))
    spec = importlib.util.spec_from_file_location("_cuda", target, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
